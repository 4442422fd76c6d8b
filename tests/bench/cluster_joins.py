"""One host joins a cluster, one host leaves: how long until the last of all other hosts has it."""

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from subnet_lease.etcd import EtcdStore
from subnet_lease.model import Prefix, encode_attrs, subnet_key
from tests.bench.cluster_meter import Meter, spread
from tests.bench.peers import LEASE_TTL, newcomers

MOST = 1000
"""Joins that can be measured in one go."""

JOINING = frozenset(each.subnet for each in newcomers(MOST))
"""The subnets of the hosts that join; no agent chooses one of them."""

Stamps = Callable[[Prefix, bool], Sequence[float]]
"""Given a subnet and whether its leaving is meant: waits for all hosts, and gives the time at each, steady clock."""


def measure(store: EtcdStore, count: int, stamps: Stamps, etcd: Meter, agents: Callable[[], float]) -> dict[str, Any]:
    """Let `count` hosts, at most MOST, join and leave, one after the other; seconds from the start of each write.

    `agents` gives the CPU seconds that all agents have used. CPU figures are for one change: a join or a leave.
    """
    first_s, last_s, leave_s, write_s = [], [], [], []
    dice = random.Random(count)
    etcd_lease = store.grant(LEASE_TTL)
    cpu_s, agents_s = etcd.cpu_s, agents()
    for newcomer in newcomers(MOST)[:count]:
        subnet, value = newcomer.subnet, encode_attrs(newcomer.attrs)
        started = time.monotonic()
        revision = store.create(subnet_key(subnet), value, etcd_lease)
        write_s.append(time.monotonic() - started)
        at = stamps(subnet, False)
        first_s.append(min(at) - started)
        last_s.append(max(at) - started)
        # Not in step with anything that is periodic.
        time.sleep(dice.random() * 0.02)
        started = time.monotonic()
        assert store.delete(subnet_key(subnet), revision)
        leave_s.append(max(stamps(subnet, True)) - started)
    figures = {
        "count": count,
        "first_s": spread(first_s),
        "last_s": spread(last_s),
        "leave_last_s": spread(leave_s),
        "write_s": spread(write_s),
        "etcd_cpu_s": (etcd.cpu_s - cpu_s) / (2 * count),
        "agents_cpu_s": (agents() - agents_s) / (2 * count),
    }
    store.revoke(etcd_lease)
    return figures

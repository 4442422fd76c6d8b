"""Clusters of any size for the page to show, made up: a real lease table, and measurements that nobody took.

`PictureServer` serves the page on loopback as an agent does, from facts that a test can exchange.
"""

import dataclasses
import functools
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from overlay import page_files, picture
from overlay.health import Answer, HealthServer
from overlay.picture import Facts, Path, Paths, Report
from subnet_lease.model import Lease, LeaseAttrs, NetworkConfig, Prefix, Vtep, encode_attrs, format_address, subnet_key
from subnet_lease.store import Record, Snapshot
from subnet_lease.table import NOBODY, LeaseTable

NETWORK = "10.0.0.0/8"


def name_of(number: int) -> str:
    """What host `number` calls itself, of those from 1 on."""
    return f"node-{number:04}"


def leases(number: int) -> dict[str, Lease]:
    """As many as are asked for, by key, in the order of their subnets, as a table accepts them."""
    config = NetworkConfig.parse(f'{{"Network": "{NETWORK}", "Backend": {{"Type": "vxlan"}}}}'.encode())
    records = []
    for place in range(1, number + 1):
        subnet = Prefix(bytes((10, place >> 8, place & 255, 0)), 24)
        vtep = Vtep(1, b"\x02\x00" + place.to_bytes(4, "big"))
        attrs = LeaseAttrs(
            bytes((172, 16 + (place >> 16), place >> 8 & 255, place & 255)),
            "vxlan",
            vtep,
            mtu=1450,
            node_name=name_of(place),
        )
        records.append(Record(subnet_key(subnet), encode_attrs(attrs), place, place, place))
    table = LeaseTable(config, NOBODY)
    table.replace(Snapshot(tuple(records), number, 1, True))
    found = {record.key: lease for record in records if (lease := table.accepted(record.key)) is not None}
    assert len(found) == number
    return found


def status(own: Lease | None, peers: int, **other: Any) -> dict[str, Any]:
    """What an agent says of itself that is well; its parts may be given otherwise."""
    return {
        "schema": 1,
        "health": "healthy",
        "problems": [],
        "agent": {
            "version": "0.1.0",
            "pid": 4711,
            "node_name": name_of(1),
            "running_s": 86400.0,
            "ready": True,
            "trouble": "",
        },
        "lease": {"subnets": list(map(str, own.subnets)), "reserved": False, "left_s": 82800.0} if own else None,
        "network": {
            "blocks": [NETWORK],
            "backend": "vxlan",
            "direct_routing": False,
            "nexthop_objects": True,
            "vni": 1,
            "port": 8472,
            "mtu": 1450,
        },
        "devices": [{"name": "flannel.1", "up": True}],
        "underlay": {"interface": "eth0", "mtu": 1500, "why": "it has the default route", "runner_up": None},
        "etcd": {"connected": True, "data_age_s": 0.0, "revision": 81234, "reason": None},
        "dataplane": {
            "wanted": 4 * peers,
            "missing": 0,
            "surplus": 0,
            "drift": 2,
            "last_pass_ago_s": 1.4,
            "last_change": {"ago_s": 95.0, "took_ms": 2.1, "put": 4, "dropped": 0, "refused": 0},
        },
        "refused": [],
        "refused_count": 0,
        "rejected": [],
        "rejected_count": 0,
        "firewall": {"guard": "on", "strangers": 0, "impostors": 0, "strays": 0},
        "peers": None,
        **other,
    }


EVENTS = (
    (42.0, "repaired", {"entries": 1}),
    (42.0, "drift", {"entry": "fdb 02:00:00:00:00:03 dst 172.16.0.3", "found": "nothing", "by": "unknown"}),
    (95.0, "joined", {"subnets": ["10.0.3.0/24"], "hosts": ["172.16.0.3"]}),
    (3600.0, "left", {"subnets": ["10.0.9.0/24"], "hosts": ["172.16.0.9"]}),
    (7200.0, "store_reachable", {"away_s": 31}),
    (7231.0, "store_unreachable", {"reason": "nobody answers at 172.16.0.250:2379"}),
    (86400.0, "started", {}),
)
"""Kinds and facts, and how many seconds ago."""


@functools.cache
def facts(hosts: int, *, faults: bool = True, seed: int = 1) -> Facts:
    """A cluster of so many hosts. With faults some peers are down, some lose packets, and some were not measured."""
    chance = random.Random(seed)
    peers = leases(hosts)
    own = peers.pop(next(iter(peers)))
    ill = chance.sample(list(peers), min(len(peers), max(2, hosts // 60))) if faults else []
    down, amiss = ill[: len(ill) // 2], ill[len(ill) // 2 :]
    unmeasured = set(chance.sample(list(peers), hosts // 12)) if faults else set()

    def path(target: str) -> Path:
        age = chance.uniform(1, 90)
        if target in down:
            return Path(False, None, 1.0, None, "peer_down", age)
        time_ms = round(chance.lognormvariate(-1, 0.5), 3)
        if target in amiss:
            mtu = target == amiss[0]
            return Path(True, time_ms * 4, 0.0 if mtu else 0.08, 1370 if mtu else 1450, "path_mtu" if mtu else "", age)
        return Path(True, time_ms, 0.0, 1450, "", age)

    paths = {key: path(key) for key in peers if key not in unmeasured}
    some = list(peers) if hosts <= 40 else chance.sample(list(peers), 30)
    told: dict[str, Paths] = {}
    for source in some:
        if source in down:
            continue
        targets = [key for key in (own.key, *peers) if key != source]
        chosen = chance.sample(targets, min(len(targets), 20))
        told[source] = {key: path(key) for key in chosen}
    now = time.time()
    problems = [
        {
            "severity": "degraded",
            "what": f"{len(down)} of the peers answer neither in the tunnel nor on the underlay",
            "cause": "peer_down",
            "remedy": "Look at the power and the links of the hosts below; `ping 172.16.0.2` asks one from here.",
        }
    ]
    said = status(own, len(peers), **({"health": "degraded", "problems": problems} if down else {}))
    return Facts(
        made_at=now,
        status=said,
        own=own,
        peers=peers,
        changed=lambda revision: None if revision % 3 else 1800.0 * (revision % 40) + 5,
        paths=paths,
        reports={source: Report("healthy", chance.uniform(1, 60)) for source in told},
        published=lambda source: told.get(source, {}),
        towards=lambda target: {source: found[target] for source, found in told.items() if target in found},
        events=[(now - ago, kind, more) for ago, kind, more in EVENTS],
    )


class PictureServer:
    """Serves `facts`, None for an agent that fails to answer, to whoever asks on this host."""

    def __init__(self, facts: Facts | None) -> None:
        self.facts = facts
        self.answers = threading.Semaphore(0)
        """Released for each document that was served."""
        documents = {**page_files.documents(), "/api/cluster": self._answer}
        self.server = HealthServer("127.0.0.1", 0, {}, documents=documents)

    @property
    def url(self) -> str:
        """Of the page."""
        return f"http://127.0.0.1:{self.server.port}/"

    def _answer(self, query: str) -> Answer:
        facts = self.facts
        if facts is None:
            raise RuntimeError("the agent is not well")
        document = picture.document(dataclasses.replace(facts, made_at=time.time()), picture.asked(query))
        self.answers.release()
        return Answer(picture.encode(document), "application/json")


@contextmanager
def served(facts: Facts | None) -> Iterator[PictureServer]:
    """A server that lasts as long as the block."""
    made = PictureServer(facts)
    made.server.start()
    try:
        yield made
    finally:
        made.server.stop()


def address_in(lease: Lease) -> str:
    """Of a pod of the host."""
    return format_address(lease.subnets[0].host(7))

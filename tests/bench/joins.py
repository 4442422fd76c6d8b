"""One host joins, one host leaves: how long until another's kernel has it.

Counted from the start of the write to etcd to the kernel's own announcement of the route, the last entry to be made and
the first to go. The agent is watched from outside, through a netlink socket of ours in its namespace.
"""

import random
import socket
import threading
import time
from dataclasses import dataclass

from overlay import rtnl
from overlay.model import Gone, Route
from overlay.netns import Namespace
from subnet_lease.etcd import EtcdStore
from subnet_lease.model import LeaseAttrs, Prefix, Vtep, encode_attrs, subnet_key
from tests.bench.place import inside

RTNLGRP_IPV4_ROUTE = 7
SOL_NETLINK, ADD_MEMBERSHIP = 270, 1

FIRST = 0x0AFA0000
"""10.250.0.0: beyond what is loaded at any size."""


@dataclass(frozen=True, slots=True)
class Changes:
    """Seconds of each join and each leave, and of the writes to etcd alone that they began with."""

    joins: list[float]
    leaves: list[float]
    writes: list[float]


class _Announcements:
    """When the kernel announced each route, and each removal of one."""

    def __init__(self, place: Namespace) -> None:
        self._socket = inside(place, self._open)
        self._times: dict[tuple[Prefix, bool], float] = {}
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @staticmethod
    def _open() -> socket.socket:
        made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        made.bind((0, 0))
        made.setsockopt(SOL_NETLINK, ADD_MEMBERSHIP, RTNLGRP_IPV4_ROUTE)
        made.settimeout(0.2)
        return made

    def _read(self) -> None:
        while self._socket.fileno() >= 0:
            try:
                buffer = self._socket.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                return
            now = time.monotonic()
            for message in rtnl.messages(buffer):
                seen = rtnl.sight(buffer, message, 0)
                entry = seen.entry if isinstance(seen, Gone) else seen
                if isinstance(entry, Route):
                    with self._news:
                        self._times[entry.destination, isinstance(seen, Gone)] = now
                        self._news.notify()

    def of(self, subnet: Prefix, *, gone: bool) -> float:
        """When it was announced; waits for it."""
        with self._news:
            assert self._news.wait_for(lambda: (subnet, gone) in self._times, 30), f"no news of {subnet}"
            return self._times[subnet, gone]

    def close(self) -> None:
        self._socket.close()
        self._thread.join()


def measure(place: Namespace, store: EtcdStore, count: int) -> Changes:
    """Let `count` hosts join and leave again, one after the other, beside an agent that is ready."""
    announcements = _Announcements(place)
    etcd_lease = store.grant(3600)
    changes = Changes([], [], [])
    dice = random.Random(count)
    for number in range(count):
        subnet = Prefix((FIRST + (number << 8)).to_bytes(4, "big"), 24)
        mac = bytes((2, 250)) + number.to_bytes(4, "big")
        value = encode_attrs(LeaseAttrs(bytes((172, 30, number >> 8, number & 255)), "vxlan", Vtep(1, mac)))
        started = time.monotonic()
        revision = store.create(subnet_key(subnet), value, etcd_lease)
        changes.writes.append(time.monotonic() - started)
        changes.joins.append(announcements.of(subnet, gone=False) - started)
        # Not in step with anything that is periodic.
        time.sleep(dice.random() * 0.01)
        started = time.monotonic()
        assert store.delete(subnet_key(subnet), revision)
        changes.leaves.append(announcements.of(subnet, gone=True) - started)
    announcements.close()
    store.revoke(etcd_lease)
    return changes

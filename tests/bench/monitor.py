"""What the kernel announces in a place, and when: a netlink socket of ours, beside the agent's own."""

import errno
import socket
import threading
import time
from collections.abc import Iterable
from types import TracebackType

from overlay import rtnl
from overlay.model import PERMANENT, Entry, Gone, Key, Neighbour
from overlay.netns import Namespace
from tests.bench.contenders import DEADLINE_S
from tests.bench.place import inside

LINK, NEIGH, ADDRESS, ROUTE, NEXTHOP = 1, 3, 5, 7, 32
"""RTNLGRP_LINK, _NEIGH, _IPV4_IFADDR, _IPV4_ROUTE and _NEXTHOP of linux/rtnetlink.h."""

SOL_NETLINK, ADD_MEMBERSHIP = 270, 1
SO_RCVBUFFORCE = 33


class Monitor:
    """The latest announcement of each entry and of each removal, by key, with the time at which it was read.

    FDB and neighbour entries are those of the interface index `device`; a neighbour that is being removed is announced
    first as one that is no longer permanent, which does not count. `heard` counts all messages about that device and
    all about routes and nexthop objects of the place.
    """

    def __init__(self, place: Namespace, device: int, *groups: int) -> None:
        self.heard = 0
        self.device = device
        self._groups = groups
        self._latest: dict[tuple[Key, bool], tuple[float, Entry]] = {}
        self._news = threading.Condition()
        self._awaited: tuple[Key, bool] | None = None
        self._lost = False
        self._closing = False
        self._socket = inside(place, self._open)
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> "Monitor":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._closing = True
        self._thread.join()
        self._socket.close()
        assert error or not self._lost, "the monitor itself has lost notifications"

    def _open(self) -> socket.socket:
        made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        made.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        made.bind((0, 0))
        for group in self._groups:
            made.setsockopt(SOL_NETLINK, ADD_MEMBERSHIP, group)
        made.settimeout(0.2)
        return made

    def _read(self) -> None:
        while not self._closing:
            try:
                buffer = self._socket.recv(65536)
            except TimeoutError:
                continue
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._lost = True
                continue
            now = time.monotonic()
            for message in rtnl.messages(buffer):
                self._note(buffer, message, now)

    def _note(self, buffer: bytes, message: rtnl.Message, now: float) -> None:
        if message.kind in (rtnl.NEWROUTE, rtnl.DELROUTE, rtnl.NEWNEXTHOP, rtnl.DELNEXTHOP):
            self.heard += 1
        elif rtnl.device_of(buffer, message) == self.device:
            # Links, addresses, neighbours and FDB entries all have the index in the same place.
            self.heard += 1
        seen = rtnl.sight(buffer, message, (self.device,))
        if seen is None:
            return
        gone = isinstance(seen, Gone)
        entry = seen.entry if isinstance(seen, Gone) else seen
        if isinstance(entry, Neighbour) and not gone and entry.state != PERMANENT:
            return
        with self._news:
            self._latest[entry[0], gone] = now, entry
            # Only for what is waited for: among thousands, waking the other thread each time would delay this one.
            if self._awaited == (entry[0], gone):
                self._news.notify()

    def wait(self, key: Key, since: float, *, gone: bool = False) -> tuple[float, Entry]:
        """When the entry under `key` was announced, or with `gone` its removal, later than `since`; waits for it."""
        with self._news:
            self._awaited = key, gone
            arrived = self._news.wait_for(lambda: self._latest.get((key, gone), (since,))[0] > since, DEADLINE_S)
            assert arrived, f"the kernel did not announce {'the removal of ' if gone else ''}{key!r}"
            self._awaited = None
            return self._latest[key, gone]

    def wait_all(self, keys: Iterable[Key], since: float, *, gone: bool = False) -> float:
        """When the last of them was announced."""
        return max(self.wait(key, since, gone=gone)[0] for key in keys)

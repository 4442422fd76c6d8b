"""Words for packet tests: put this packet here, expect that one there, expect nothing.

A `Wire` is all the links that one test watches. A link is watched from the moment it is named, so name the links first
and stimulate then; nothing that passes is lost unnoticed, and all of it is kept, with the kernel's times, for whoever
must find out why a test failed: see `conftest`.

That nothing comes cannot be waited for. It is shown by a fence: a packet that is sent after the stimulus on the same
way and does arrive. Between two namespaces, what one processor sends arrives in its order (each queue on the way is a
processor's own), so a `Wire` keeps its thread on one.
"""

import itertools
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet
from scapy.utils import PcapNgWriter

from overlay.cluster_hosts import Host, Place, Pod
from overlay.dissect import dissect
from overlay.tap import Tap

SECONDS = 5.0
"""How long a packet that is expected may take."""

Wanted = Callable[[Packet], bool]
"""Tells of a frame, decoded from Ethernet on, whether it is the one."""


# --- what to look for ------------------------------------------------------------------------------------------------

_marks = itertools.count(1)


def new_mark() -> bytes:
    """A payload that no other packet of this run carries."""
    return b"mark %d of %d." % (next(_marks), os.getpid())


def carrying(mark: bytes) -> Wanted:
    """Frames with these bytes anywhere, in a tunnel or not."""
    return lambda frame: mark in frame.original


def tunnelled(frame: Packet) -> bool:
    """Frames in a tunnel, as far as scapy can tell: by the UDP port."""
    return VXLAN in frame


def tunnelling(mark: bytes) -> Wanted:
    """Frames that carry these bytes in a tunnel."""
    return lambda frame: mark in frame.original and VXLAN in frame


def untunnelled(mark: bytes) -> Wanted:
    """Frames that carry these bytes for all to see."""
    return lambda frame: mark in frame.original and VXLAN not in frame


def inner(frame: Packet) -> Packet:
    """The frame in the tunnel, from its Ethernet header on."""
    return frame[VXLAN].payload


def mac_of(place: Place, device: str) -> str:
    """The MAC of a device."""
    return str(place.json("ip", "link", "show", device)[0]["address"])


# --- links -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Seen:
    """One frame that passed a link. `time_ns` since the epoch, by the kernel; `unfinished` as in `tap.Frame`."""

    link: "Link"
    time_ns: int
    outgoing: bool
    data: bytes
    unfinished: bool = False

    @cached_property
    def packet(self) -> Packet:
        """Decoded, from Ethernet on."""
        packet = Ether(self.data)
        packet.time = self.time_ns / 1e9
        return packet

    def __str__(self) -> str:
        way = "out" if self.outgoing else "in"
        told = dissect(self.data, unfinished=self.unfinished)
        return f"{self.time_ns / 1e9:.6f}  {self.link.name:<10} {way:<3}  {told}"


@dataclass(eq=False)
class Link:
    """One interface, watched since this was made; `seen` is what has been read so far, in the order of its coming."""

    place: Place
    device: str
    seen: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = f"{self.place.name}/{self.device}"
        self._tap = self.place.made(lambda: Tap(self.device))

    @cached_property
    def _outlet(self) -> socket.socket:
        # A socket does not see what it sends itself.
        return self.place.packet_socket(self.device, hears=False)

    def close(self) -> None:
        """Stop watching."""
        self._tap.close()
        if "_outlet" in vars(self):
            self._outlet.close()

    @cached_property
    def mac(self) -> str:
        """Of the interface."""
        return mac_of(self.place, self.device)

    def put(self, frame: Packet | bytes) -> None:
        """Put a frame on the link, as it is, from its Ethernet header on; missing lengths and checksums are filled in.

        What is put on a pod's link comes from the pod. What is put on the underlay's port of a host goes to the host.
        """
        self._outlet.send(bytes(frame))

    def read(self) -> Iterator[Seen]:
        """What has come since the last time. AssertionError if the kernel had to drop any."""
        for frame in self._tap.read():
            self.seen.append(Seen(self, frame.time_ns, frame.outgoing, frame.data, frame.unfinished))
            yield self.seen[-1]
        assert self._tap.lost == 0, f"{self._tap.lost} frames on {self.name} were lost to the capture"

    def expect(self, wanted: Wanted, seconds: float = SECONDS) -> Packet:
        """The first frame since the link was named that is wanted, waited for if need be; AssertionError if none comes.

        Asked again, it looks again from the beginning.
        """
        deadline = time.monotonic() + seconds
        pending = iter(list(self.seen))
        while True:
            for seen in pending:
                if wanted(seen.packet):
                    return seen.packet
            left = deadline - time.monotonic()
            if left <= 0:
                raise AssertionError(f"not seen on {self.name} within {seconds:g} s, among {len(self.seen)} frames")
            select.select([self._tap], [], [], left)
            pending = self.read()

    def all(self, wanted: Wanted) -> list[Packet]:
        """All frames so far that are wanted."""
        for _ in self.read():
            pass
        return [seen.packet for seen in self.seen if wanted(seen.packet)]


class Wire:
    """The links that a test watches. As a context manager, it keeps its thread on one processor inside the block."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._gateways: dict[Pod, str] = {}
        self.links: list[Link] = []

    def __enter__(self) -> Self:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(before)})
        self._stack.callback(os.sched_setaffinity, 0, before)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # --- which links ---

    def at(self, place: Place, device: str = "eth0") -> Link:
        """The link of an interface, watched from now on: of a pod or a host from within, `eth0` unless told."""
        link = Link(place, device)
        self._stack.callback(link.close)
        self.links.append(link)
        return link

    def watched(self, place: Place, device: str = "eth0") -> Link:
        """As `at`, but if this link is watched already, that one, with all that it has seen."""
        known = (link for link in self.links if link.place is place and link.device == device)
        return next(known, None) or self.at(place, device)

    def underlay(self, host: Host) -> Link:
        """The underlay's port that the host is plugged into. Incoming is what the host sends, outgoing what it gets."""
        return self.at(host.lab.hub, host.name)

    # --- stimuli ---

    def send(self, pod: Pod, packet: Packet) -> None:
        """Send an IP packet from the pod to its gateway, whatever its addresses say."""
        link = self.watched(pod)
        if pod not in self._gateways:
            self._gateways[pod] = mac_of(pod.host, "cni0")
        link.put(Ether(src=link.mac, dst=self._gateways[pod]) / packet)

    def to(self, pod: Pod, *, family: int | None = None) -> Packet:
        """The IP header of a packet to the pod; the source is whoever `send` is told, or the caller's to fill in."""
        family = family or min(pod.addresses)
        return IP(dst=pod.addresses[4]) if family == 4 else IPv6(dst=pod.addresses[6])

    # --- and nothing else ---

    def expect_nothing(
        self, *links: Link, wanted: Wanted, fence: Callable[[bytes], None], at: Link, seconds: float = SECONDS
    ) -> None:
        """Nothing that is wanted has passed any of the links by the time that a fence, sent now, has come by `at`.

        `fence(mark)` sends a packet with this payload on the way that the stimulus took, so that it ends at `at`.
        """
        mark = new_mark()
        fence(mark)
        at.expect(carrying(mark), seconds)
        for link in links:
            found = link.all(wanted)
            assert not found, f"on {link.name}, where nothing was expected: {[each.summary() for each in found]}"

    # --- what was seen ---

    @property
    def seen(self) -> list[Seen]:
        """What was seen on all links, in the order of the kernel's times."""
        return sorted((seen for link in self.links for seen in link.seen), key=lambda seen: seen.time_ns)

    def write(self, path: Path) -> None:
        """All of it as pcapng, with the names of the links and the ways of the frames."""
        writer = PcapNgWriter(str(path))
        try:
            for seen in self.seen:
                packet = seen.packet
                packet.sniffed_on, packet.direction = seen.link.name, 2 if seen.outgoing else 1
                writer.write(packet)
        finally:
            writer.close()

"""`overlay-agent capture`: the packets of the overlay as they pass an interface of this host, or out of a file.

Owns the loop, what is shown, and the end of it. Changes nothing: a packet socket listens. What a packet is, `dissect`
tells; which are wanted, `selection`.
"""

import errno
import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, Self, TextIO

from overlay import selection
from overlay.dissect import dissect
from overlay.packets import Packet, Remark
from overlay.pcap import Recorded
from overlay.roster import Roster, UnknownTarget
from overlay.selection import Seen, Wanted
from overlay.tap import Tap

AGAIN_S = 2.0
"""Seconds after which leases may be read again, if a packet gives reason to."""

AGAIN_AFTER_FAILURE_S = 30.0
"""The same if they could not be read: each attempt may keep the capture waiting for seconds."""

MAX_FRAGMENTED = 1024
"""Fragmented tunnel packets whose later parts are still recognised."""

_ETHERNET_TYPES = (1, 772)  # ARPHRD_ETHER and ARPHRD_LOOPBACK in linux/if_arp.h
_END_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class CaptureFailed(Exception):
    """Capturing is impossible, or has come to an end before its time; the text says why and how to mend it."""


class Caught(NamedTuple):
    """A frame and where it was seen. `length` is what it had on the wire; `outgoing` None: not known."""

    time_ns: int
    outgoing: bool | None
    data: bytes
    length: int
    interface: str
    unfinished: bool = False


# --- where frames come from --------------------------------------------------------------------------------------


class Stop:
    """Notes SIGINT and SIGTERM while its block runs: `asked`, and readable (select) from then on.

    Once is enough: after the first, the end is under way, and further ones are ignored for good.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Self:
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._before = {number: signal.signal(number, self._note) for number in _END_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if not self.asked:
                signal.signal(number, handler)
        os.close(self._event)

    def _note(self, number: int, frame: object) -> None:
        for each in _END_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        self.asked = True
        os.eventfd_write(self._event, 1)

    def fileno(self) -> int:
        """Readable once a signal came."""
        return self._event


def open_tap(interface: str, program: bytes) -> Tap:
    """Frames of the interface that the BPF `program` lets through; CaptureFailed."""
    try:
        kind = int(Path("/sys/class/net", interface, "type").read_text())
        if kind not in _ETHERNET_TYPES:
            raise CaptureFailed(f"{interface} has no Ethernet headers (it is of type {kind}), so it carries no tunnel")
        return Tap(interface, program=program)
    except PermissionError:
        raise CaptureFailed("to capture takes CAP_NET_RAW, which this process lacks; run it with sudo") from None
    except OSError as error:
        raise CaptureFailed(f"{interface} cannot be listened to: {os.strerror(error.errno or 0).lower()}") from None


def live(tap: Tap, stop: Stop, idle: Callable[[], None]) -> Iterator[Caught]:
    """Frames as they come, until `stop`; `idle` is called whenever there are none. CaptureFailed if the device goes.

    A device that goes down is waited for: it may come up again, and is listened to as before.
    """
    while not stop.asked:
        idle()
        select.select([tap.fileno(), stop.fileno()], [], [])
        try:
            for frame in tap.read():
                if stop.asked:
                    return
                length = len(frame.data)
                yield Caught(frame.time_ns, frame.outgoing, frame.data, length, tap.device, frame.unfinished)
        except OSError as error:
            if error.errno != errno.ENETDOWN or not Path("/sys/class/net", tap.device).exists():
                reason = "it is gone" if error.errno == errno.ENETDOWN else os.strerror(error.errno or 0).lower()
                raise CaptureFailed(f"{tap.device} cannot be listened to any more: {reason}") from None


def recorded(frames: Iterable[Recorded], stop: Stop) -> Iterator[Caught]:
    """Frames of a file, until `stop`."""
    for frame in frames:
        if stop.asked:
            return
        yield Caught(frame.time_ns, frame.outgoing, frame.data, frame.length, frame.interface)


# --- whose packets they are --------------------------------------------------------------------------------------


class Known(NamedTuple):
    """What is known of the hosts, whether it is as of now, and in words whence."""

    roster: Roster
    fresh: bool
    source: str


class Leases:
    """The hosts, read again by `read` when a packet gives reason to doubt them. `note` tells people of a change."""

    def __init__(self, read: Callable[[], Known], note: Callable[[str], None]) -> None:
        self._read = read
        self._note = note
        self.known = read()
        self._next = 0.0

    @property
    def roster(self) -> Roster:
        return self.known.roster

    def renew(self) -> bool:
        """Read them again unless that was done just now; whether anything is different."""
        if time.monotonic() < self._next:
            return False
        found = self._read()
        self._next = time.monotonic() + (AGAIN_S if found.fresh else AGAIN_AFTER_FAILURE_S)
        if found.fresh != self.known.fresh:
            self._note(found.source if found.fresh else f"leases may have changed since: {found.source}")
        before = self.known
        # What is known is better than what was.
        self.known = found if found.fresh else before._replace(fresh=False)
        return self.known.roster != before.roster


# --- where they go -----------------------------------------------------------------------------------------------


class Sink(Protocol):
    """Takes the packets that are wanted."""

    def __call__(self, caught: Caught, packet: Packet) -> None: ...


class Recorder(Protocol):
    """A capture file: `pcap.Writer`."""

    def write(
        self, time_ns: int, interface: str, outgoing: bool | None, data: bytes, comments: Sequence[str] = ()
    ) -> None: ...

    def flush(self) -> None: ...


_WAYS = {None: None, False: "in", True: "out"}


class JsonLines:
    """One object a line; the schema is that of docs/packet-harness.md."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def __call__(self, caught: Caught, packet: Packet) -> None:
        head = {"time_ns": caught.time_ns, "interface": caught.interface, "direction": _WAYS[caught.outgoing]}
        self._out.write(json.dumps({**head, **packet.fields}) + "\n")


class Screen:
    """Lines for people: columns that grow with what they hold, remarks below, in colour if `colour`."""

    HEAD = ("TIME", "WAY", "FROM > TO", "VNI")
    WIDEST = 72

    def __init__(self, out: TextIO, *, headers: bool, colour: bool) -> None:
        self._out = out
        self._headers = headers
        self._begin, self._end = ("\033[1;33m", "\033[0m") if colour else ("", "")
        self._widths = [15, 3, len(self.HEAD[2]), 3]
        self._lines = 0

    def __call__(self, caught: Caught, packet: Packet) -> None:
        vni = "-" if packet.vni is None else str(packet.vni)
        cells = (_time_of_day(caught.time_ns), _WAYS[caught.outgoing] or "?", packet.ways or "-", vni)
        self._widths = [max(old, min(self.WIDEST, len(cell))) for old, cell in zip(self._widths, cells, strict=True)]
        if not self._lines:
            self._line(self.HEAD, "PACKET")
        self._line(cells, packet.what)
        if self._headers:
            self._out.write(f"{'':17}{packet.headers}\n")
        for remark in packet.remarks:
            self._out.write(f"{'':17}{self._begin}! {remark.text}{self._end}\n")

    def _line(self, cells: Sequence[str], last: str) -> None:
        self._lines += 1
        columns = (f"{cell:<{width}}" for cell, width in zip(cells, self._widths, strict=True))
        self._out.write("  ".join((*columns, last)) + "\n")


def _time_of_day(time_ns: int) -> str:
    seconds, rest = divmod(time_ns, 10**9)
    return f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{rest // 1000:06}"


def colourful(out: TextIO) -> bool:
    """Whether a person at a terminal that has colours is reading."""
    return out.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR")


# --- the loop ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """What became of the packets of the overlay. `odd`: with remarks; None if they were not decoded."""

    seen: int = 0
    wanted: int = 0
    odd: int | None = 0

    def line(self, lost: int | None, verb: str) -> str:
        """One line for the end. `lost` by the kernel, None for a file."""
        parts = [f"{self.seen} packet{'' if self.seen == 1 else 's'} of the overlay", f"{self.wanted} {verb}"]
        parts.append("not decoded" if self.odd is None else f"{self.odd} with remarks")
        if lost is not None:
            parts.append(f"{lost} lost by the kernel" + (", for the capture was too slow" if lost else ""))
        return ", ".join(parts)


class Capture:
    """Decodes, chooses and hands on. `target` as `Roster.target` takes it; `underlay`: whether it watches that link.

    Without `decode` all that the kernel lets through is written, and nothing else is done with it.
    """

    def __init__(
        self,
        leases: Leases,
        *,
        target: str | None = None,
        wanted: Wanted | None = None,
        show: Sink | None = None,
        recorder: Recorder | None = None,
        count: int | None = None,
        underlay: bool = False,
        decode: bool = True,
    ) -> None:
        self._leases = leases
        self._text = target
        self._target = leases.roster.target(target) if target is not None else None
        self._wanted = wanted
        self._show = show
        self._recorder = recorder
        self._count = count
        self._underlay = underlay
        self._decode = decode
        self._fragmented: dict[tuple[bytes, bytes, int], None] = {}
        self.tally = Tally(odd=0 if decode else None)

    def run(self, frames: Iterable[Caught]) -> None:
        """Until there are no more, or `count` were wanted."""
        for caught in frames:
            self._take(caught)
            if self.tally.wanted == self._count:
                return

    def _take(self, caught: Caught) -> None:
        if not self._decode:
            self.tally.seen += 1
            self._hand_on(caught, ())
            return
        packet = self._dissected(caught)
        if packet.doubtful and self._leases.renew():
            if self._text is not None:
                with suppress(UnknownTarget):
                    self._target = self._leases.roster.target(self._text)
            packet = self._dissected(caught)
        if not self._is_of_the_overlay(packet):
            return
        if self._underlay and packet.outer is None and not self._leases.roster.direct and not _later_part(packet):
            packet = packet._replace(remarks=(*packet.remarks, _UNTUNNELLED))
        self.tally.seen += 1
        if self._target is not None and not selection.concerns(self._target, packet):
            return
        if self._wanted is not None and not self._wanted(Seen(packet, caught.outgoing)):
            return
        assert self.tally.odd is not None
        self.tally.odd += bool(packet.remarks)
        self._hand_on(caught, [remark.text for remark in packet.remarks])
        if self._show is not None:
            self._show(caught, packet)

    def _hand_on(self, caught: Caught, comments: Sequence[str]) -> None:
        self.tally.wanted += 1
        if self._recorder is not None:
            self._recorder.write(caught.time_ns, caught.interface, caught.outgoing, caught.data, comments)

    def _dissected(self, caught: Caught) -> Packet:
        return dissect(caught.data, self._leases.roster, unfinished=caught.unfinished, length=caught.length)

    def _is_of_the_overlay(self, packet: Packet) -> bool:
        ip = packet.outer or packet.inner
        if ip is None:
            return False
        if packet.outer is not None:
            if ip.fragment is not None:
                self._fragmented[ip.src, ip.dst, ip.fragment.ident] = None
                if len(self._fragmented) > MAX_FRAGMENTED:
                    del self._fragmented[next(iter(self._fragmented))]
            return True
        if _later_part(packet) and ip.fragment is not None and (ip.src, ip.dst, ip.fragment.ident) in self._fragmented:
            return True
        return self._leases.roster.inside(ip.src) and self._leases.roster.inside(ip.dst)


_UNTUNNELLED = Remark("untunnelled", "between pods, and not in a tunnel")


def _later_part(packet: Packet) -> bool:
    ip = packet.inner
    return ip is not None and ip.fragment is not None and ip.fragment.offset > 0

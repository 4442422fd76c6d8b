"""Capture files: pcap and pcapng read, pcapng written, through scapy, without decoding a frame.

Owns the files. scapy is imported with the first of them.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

ETHERNET = 1
"""LINKTYPE_ETHERNET (https://www.tcpdump.org/linktypes.html)."""

LONGEST = 1 << 18
"""More bytes than any frame has."""

_IN, _OUT = 1, 2  # The direction in the flags of a pcapng packet.


class NotACapture(Exception):
    """The file cannot be read as a capture of Ethernet frames; the text says why, without the file's name."""


class Recorded(NamedTuple):
    """A frame of a file. `length` is what it had on the wire; `outgoing` None, `interface` empty: it does not say."""

    time_ns: int
    outgoing: bool | None
    data: bytes
    length: int
    interface: str


def read(path: str) -> Iterator[Recorded]:
    """The frames of a file, `-` for standard input, in its order; NotACapture where it is none, or none of Ethernet.

    Where that shows at the beginning, it is raised at once. A file that ends within a frame, as one that is still being
    written, ends before it.
    """
    frames = _frames(path)
    first = list(islice(frames, 1))
    return chain(first, frames)


def _frames(path: str) -> Iterator[Recorded]:
    # It would warn on the terminal of what it can live with.
    logging.getLogger("scapy").setLevel(logging.CRITICAL)
    from scapy.error import Scapy_Exception
    from scapy.utils import RawPcapReader

    with ExitStack() as stack:
        try:
            file = sys.stdin.buffer if path == "-" else stack.enter_context(Path(path).open("rb"))
            # Its type says that it wants a name; the class that makes it takes either.
            reader: Any = RawPcapReader(file)  # type: ignore[arg-type]
        except OSError as error:
            raise NotACapture(os.strerror(error.errno or 0).lower()) from None
        except (Scapy_Exception, EOFError):
            raise NotACapture("it is no pcap or pcapng file") from None
        while True:
            try:
                # Iterating would cut off what is longer than 65,535 bytes, as frames yet to be segmented are.
                data, about = reader._read_packet(size=LONGEST)
            except (EOFError, OSError, Scapy_Exception):
                return
            yield _recorded(reader, data, about)


def _recorded(reader: Any, data: bytes, about: Any) -> Recorded:
    kind = about.linktype if hasattr(about, "linktype") else reader.linktype
    if kind != ETHERNET:
        raise NotACapture(f"its link type is {kind}, not Ethernet: capture on one interface, not on 'any'")
    if hasattr(about, "tshigh"):
        ticks = ((about.tshigh or 0) << 32) + (about.tslow or 0)
        name = about.ifname.decode(errors="replace") if about.ifname else ""
        outgoing = {_IN: False, _OUT: True}.get(about.direction)
        return Recorded(ticks * 10**9 // about.tsresol, outgoing, data, about.wirelen, name)
    time_ns = about.sec * 10**9 + about.usec * (1 if reader.nano else 1000)
    return Recorded(time_ns, None, data, about.wirelen, "")


class _Frame(bytes):
    """A frame as scapy's writer takes it without decoding it."""

    time: float
    sniffed_on: str
    direction: int
    comments: list[bytes]


class Writer:
    """A pcapng file that is being written: a context manager. OSError."""

    def __init__(self, path: str | Path) -> None:
        logging.getLogger("scapy.runtime").setLevel(logging.ERROR)
        from scapy.utils import PcapNgWriter

        self._writer = PcapNgWriter(str(path))
        self._writer.linktype = ETHERNET
        self._writer.write_header(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._writer.close()

    def write(
        self, time_ns: int, interface: str, outgoing: bool | None, data: bytes, comments: Sequence[str] = ()
    ) -> None:
        """Add a frame, with the name of its interface, its direction, and what there is to say of it."""
        frame = _Frame(data)
        # The file has microseconds, and scapy cuts a float off: the middle of one is the same after rounding.
        frame.time = (time_ns // 1000 + 0.5) / 1e6
        frame.sniffed_on = interface or "?"
        frame.direction = 0 if outgoing is None else _OUT if outgoing else _IN
        frame.comments = [comment.encode() for comment in comments]
        self._writer.write_packet(frame)

    def flush(self) -> None:
        """Have others see what was written."""
        self._writer.flush()

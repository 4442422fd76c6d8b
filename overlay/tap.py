"""Frames as they pass an interface: a packet socket, with the kernel's own times and its count of what was lost.

Reads and changes nothing. Knows no protocol above the frame: see `dissect`.
"""

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple, Self

BUFFER = 64 << 20
"""Bytes of frames that may wait to be read; the kernel counts twice and more for each."""

LONGEST = 1 << 18
"""More than any frame has, those yet to be cut into segments included."""

_ETH_P_ALL = 3
_SO_RCVBUFFORCE, _SO_TIMESTAMPNS = 33, 35
_SOL_PACKET, _PACKET_STATISTICS, _PACKET_IGNORE_OUTGOING = 263, 6, 23
_OUTGOING = 4  # PACKET_OUTGOING in linux/if_packet.h
_TIMESPEC = struct.Struct("=qq")
_STATISTICS = struct.Struct("=II")  # tpacket_stats: seen, dropped, since last asked


class Frame(NamedTuple):
    """One frame, from its Ethernet header on. `time_ns` since the epoch, by the kernel; `outgoing`: from this host."""

    time_ns: int
    outgoing: bool
    data: bytes


class Tap:
    """Every frame on `device` from now on, both ways, in the network namespace of the thread that makes this. OSError.

    With `incoming` those alone that arrive. What the buffer cannot hold is lost, and counted: see `lost`.
    """

    def __init__(self, device: str, *, incoming: bool = False) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC)
        try:
            self._socket.setblocking(False)
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, BUFFER)
            except PermissionError:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            if incoming:
                self._socket.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
            # Without a protocol until here: what it sees begins with this one call.
            self._socket.bind((device, _ETH_P_ALL))
        except OSError:
            self._socket.close()
            raise
        self.device = device
        self._lost = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop."""
        self._socket.close()

    def fileno(self) -> int:
        """Readable when there are frames."""
        return self._socket.fileno()

    def read(self) -> Iterator[Frame]:
        """What has come and was not read yet, in the order of its coming. OSError, as ENETDOWN, ends it."""
        while True:
            try:
                data, notes, _, address = self._socket.recvmsg(LONGEST, 64)
            except BlockingIOError:
                return
            seconds, nanoseconds = next(_TIMESPEC.unpack(note) for _, kind, note in notes if kind == _SO_TIMESTAMPNS)
            yield Frame(seconds * 10**9 + nanoseconds, address[2] == _OUTGOING, data)

    def send(self, data: bytes) -> None:
        """Put a frame on the device, from its Ethernet header on. Other taps see it, this one does not. OSError."""
        self._socket.send(data)

    @property
    def lost(self) -> int:
        """How many frames the buffer could not hold so far."""
        with contextlib.suppress(OSError):
            self._lost += _STATISTICS.unpack(self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))[1]
        return self._lost

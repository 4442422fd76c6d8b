"""Frames as they pass an interface: a packet socket, with the kernel's own times and its count of what was lost.

Reads and changes nothing. Knows no protocol above the frame: see `dissect`.
"""

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple, Self

from overlay import sockets

BUFFER = 64 << 20
"""Bytes of frames that may wait to be read; the kernel counts twice and more for each."""

LONGEST = 1 << 18
"""More than any frame has, those yet to be cut into segments included."""

_ETH_P_ALL = 3
_SO_TIMESTAMPNS = 35
_SOL_PACKET, _PACKET_STATISTICS, _PACKET_AUXDATA, _PACKET_IGNORE_OUTGOING = 263, 6, 8, 23
_OUTGOING = 4  # PACKET_OUTGOING in linux/if_packet.h
_STATUS = struct.Struct("=I")  # tp_status, with which tpacket_auxdata begins
_CHECKSUM_NOT_READY = 8  # TP_STATUS_CSUMNOTREADY
_TIMESPEC = struct.Struct("=qq")
_STATISTICS = struct.Struct("=II")  # tpacket_stats: seen, dropped, since last asked


class Frame(NamedTuple):
    """One frame, from its Ethernet header on. `time_ns` since the epoch, by the kernel; `outgoing`: from this host.

    `unfinished`: checksums of TCP or UDP are left to hardware, or to nobody where the frame never leaves this machine.
    """

    time_ns: int
    outgoing: bool
    data: bytes
    unfinished: bool = False


class Tap:
    """Every frame on `device` from now on, both ways, in the network namespace of the thread that makes this. OSError.

    With `incoming` those alone that arrive, with a `program` those that it lets through: see `bpf`. What the buffer
    cannot hold is lost, and counted: see `lost`.
    """

    def __init__(self, device: str, *, incoming: bool = False, program: bytes = b"") -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC)
        try:
            self._socket.setblocking(False)
            sockets.enlarge(self._socket, BUFFER)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            self._socket.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
            if program:
                sockets.attach(self._socket, program)
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
                data, notes, _, address = self._socket.recvmsg(LONGEST, 128)
            except BlockingIOError:
                return
            time_ns = status = 0
            for level, kind, note in notes:
                if level == _SOL_PACKET:
                    (status,) = _STATUS.unpack_from(note)
                elif kind == _SO_TIMESTAMPNS:
                    seconds, nanoseconds = _TIMESPEC.unpack(note)
                    time_ns = seconds * 10**9 + nanoseconds
            yield Frame(time_ns, address[2] == _OUTGOING, data, bool(status & _CHECKSUM_NOT_READY))

    @property
    def lost(self) -> int:
        """How many frames the buffer could not hold so far."""
        with contextlib.suppress(OSError):
            self._lost += _STATISTICS.unpack(self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))[1]
        return self._lost

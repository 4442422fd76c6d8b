"""Netlink sockets as the edges need them: large buffers, terse acknowledgements, no echoes of one's own.

Nothing here knows a message; `kernel` speaks rtnetlink, `nft` speaks nfnetlink.
"""

import contextlib
import errno
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from overlay import bpf, sockets

_SOL_NETLINK, _CAP_ACK = 270, 10


def open_socket(protocol: int, buffer: int) -> socket.socket:
    """A bound socket of a netlink `protocol` (NETLINK_*) with `buffer` bytes for each way. Raises OSError."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    # Without it an error brings the whole message back.
    sock.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
    sockets.enlarge(sock, buffer, sending=True)
    sock.bind((0, 0))
    return sock


def queued(monitor: socket.socket) -> Iterator[bytes | None]:
    """What has come to a socket that does not block, one datagram at a time; None for what the kernel had to drop."""
    while True:
        try:
            yield monitor.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            yield None


def process_of(port: int) -> str | None:
    """Name and id of the process that has an rtnetlink socket with this port id in this namespace; None if none does.

    The kernel gives the first socket of a process the process's id (netlink_autobind), but anybody may choose another,
    and ids come again: only a process that has the socket open counts. One that has ended cannot be told, nor one
    whose descriptors we may not read.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        rows = [row.split() for row in Path("/proc/net/netlink").read_text(encoding="ascii").splitlines()[1:]]
        sockets_ = {f"socket:[{row[9]}]" for row in rows if int(row[1]) == socket.NETLINK_ROUTE and int(row[2]) == port}
        process = Path(f"/proc/{port}")
        if sockets_ and any(str(link.readlink()) in sockets_ for link in (process / "fd").iterdir()):
            return f"{(process / 'comm').read_text(encoding='utf-8', errors='replace').strip()} (pid {port})"
    return None


def drop_from(monitor: socket.socket, source: socket.socket) -> None:
    """Have the kernel drop what `source` causes before it is queued to `monitor`. A later call replaces an earlier one.

    By nlmsg_pid, which lies 12 bytes into a message.
    """
    # The filter loads words in network order; the port id is in the host's.
    port = int.from_bytes(source.getsockname()[0].to_bytes(4, sys.byteorder), "big")
    program = bpf.program(("", bpf.LD_WORD, 12, "", ""), ("", bpf.JEQ, port, "drop", "take"), bpf.TAKE, bpf.DROP)
    sockets.attach(monitor, program)

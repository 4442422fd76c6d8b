"""Netlink sockets as the edges need them: large buffers, terse acknowledgements, no echoes of one's own.

Nothing here knows a message; `kernel` speaks rtnetlink, `nft` speaks nfnetlink.
"""

import ctypes
import socket
import struct
import sys

_SOL_NETLINK, _CAP_ACK = 270, 10
_SO_ATTACH_FILTER, _SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 26, 32, 33


def open_socket(protocol: int, buffer: int) -> socket.socket:
    """A bound socket of a netlink `protocol` (NETLINK_*) with `buffer` bytes for each way. Raises OSError."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    # Without it an error brings the whole message back.
    sock.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
    for forced, option in ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)):
        try:
            sock.setsockopt(socket.SOL_SOCKET, forced, buffer)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, option, buffer)
    sock.bind((0, 0))
    return sock


def drop_from(monitor: socket.socket, source: socket.socket) -> None:
    """Have the kernel drop what `source` causes before it is queued to `monitor`. A later call replaces an earlier one.

    A classic BPF program on nlmsg_pid, which lies 12 bytes into a message (linux/filter.h): load, compare, return.
    """
    # The filter loads words in network order; the port id is in the host's.
    port = int.from_bytes(source.getsockname()[0].to_bytes(4, sys.byteorder), "big")
    program = struct.pack(
        "=HBBI HBBI HBBI HBBI",
        *(0x20, 0, 0, 12),  # BPF_LD | BPF_W | BPF_ABS
        *(0x15, 0, 1, port),  # BPF_JMP | BPF_JEQ | BPF_K: the next instruction if equal, else the one after it
        *(0x06, 0, 0, 0),  # BPF_RET: nothing of it
        *(0x06, 0, 0, 0xFFFFFFFF),  # BPF_RET: all of it
    )
    code = ctypes.create_string_buffer(program, len(program))
    monitor.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 4, ctypes.addressof(code)))

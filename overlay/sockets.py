"""What sockets of all kinds need that Python has no words for: large buffers, and filters in the kernel.

Nothing here knows what goes through them.
"""

import ctypes
import socket
import struct

from overlay.bpf import INSTRUCTION

_SO_ATTACH_FILTER, _SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 26, 32, 33


def enlarge(sock: socket.socket, buffer: int, *, sending: bool = False) -> None:
    """Ask for `buffer` bytes to receive into, and to send from if `sending`; as many as are allowed without privilege.

    The kernel counts twice and more for what it keeps there.
    """
    options = [(_SO_RCVBUFFORCE, socket.SO_RCVBUF)]
    if sending:
        options.append((_SO_SNDBUFFORCE, socket.SO_SNDBUF))
    for forced, option in options:
        try:
            sock.setsockopt(socket.SOL_SOCKET, forced, buffer)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, option, buffer)


def attach(sock: socket.socket, program: bytes) -> None:
    """From now on `sock` is queued only what `program` (see `bpf`) lets through. A later one replaces an earlier."""
    code = ctypes.create_string_buffer(program, len(program))
    attached = struct.pack("HP", len(program) // INSTRUCTION.size, ctypes.addressof(code))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, attached)

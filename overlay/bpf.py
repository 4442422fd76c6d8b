"""Classic BPF programs on sockets (linux/filter.h): what they turn away is dropped by the kernel before it is queued.

Nothing here knows what a program is about.
"""

import ctypes
import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

LOAD_WORD, LOAD_HALF, LOAD_BYTE = 0x20, 0x28, 0x30  # BPF_LD | BPF_W, _H, _B | BPF_ABS: in network order
IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
RETURN = 0x06  # BPF_RET | BPF_K: how many bytes of it to keep
ALL, NOTHING = 0xFFFFFFFF, 0

_SO_ATTACH_FILTER = 26
_INSTRUCTION = struct.Struct("=HBBI")


class Do(NamedTuple):
    """One instruction. A comparison passes over `then` instructions if it holds, over `otherwise` if not."""

    code: int
    value: int
    then: int = 0
    otherwise: int = 0


def attach(sock: socket.socket, program: Sequence[Do]) -> None:
    """From now on `sock` is queued only what `program` returns ALL for. A later one replaces an earlier one."""
    packed = b"".join(_INSTRUCTION.pack(each.code, each.then, each.otherwise, each.value) for each in program)
    code = ctypes.create_string_buffer(packed, len(packed))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(program), ctypes.addressof(code)))

"""Programs that the kernel runs on whatever comes to a socket, to queue it or not: classic BPF (linux/filter.h).

Owns their assembly, and the one for captures; `sockets` attaches them.
"""

import struct
from collections.abc import Iterable

from subnet_lease.model import Prefix

INSTRUCTION = struct.Struct("=HBBI")
"""struct sock_filter: code, jumps if true and if false, operand."""

LD_WORD, LD_HALF, LD_BYTE = 0x20, 0x28, 0x30  # BPF_LD | BPF_ABS of 4, 2 and 1 bytes, in network order
_LD_HALF_AT_X = 0x48  # BPF_LD | BPF_H | BPF_IND
_LDX_IP_HEADER = 0xB1  # BPF_LDX | BPF_B | BPF_MSH: four times the low half of a byte
_AND, JEQ, _JSET, RET = 0x54, 0x15, 0x45, 0x06

ALL = 0x40000
"""More bytes than any datagram or frame has."""

Step = tuple[str, int, int, str, str]
"""Label, code, operand, where to go on if true and if false; an empty label is the next step."""

TAKE: Step = ("take", RET, ALL, "", "")
DROP: Step = ("drop", RET, 0, "", "")


def program(*steps: Step) -> bytes:
    """The program of these steps, as the kernel takes it."""
    places = {label: number for number, (label, *_) in enumerate(steps) if label}
    code = b""
    for number, (_, operation, operand, *targets) in enumerate(steps):
        jumps = [places[target] - number - 1 if target else 0 for target in targets]
        code += INSTRUCTION.pack(operation, *jumps, operand)
    return code


def tunnel_filter(port: int, blocks: Iterable[Prefix] = ()) -> bytes:
    """For a capture, on a packet socket: what may be of the overlay; `dissect` tells what is.

    That is UDP to `port`, over either family; later fragments of UDP, whose ports are gone; and, not in a tunnel, what
    goes from a block to itself.

    Offsets are from the Ethernet header on. A UDP header behind IPv6 extension headers is found behind a fragment
    header alone: a VXLAN device sends no other.
    """
    steps: list[Step] = [
        ("", LD_HALF, 12, "", ""),
        ("", JEQ, 0x0800, "ipv4", ""),
        ("", JEQ, 0x86DD, "ipv6", "drop"),
        ("ipv4", LD_BYTE, 23, "", ""),
        ("", JEQ, 17, "", "plain4"),
        ("", LD_HALF, 20, "", ""),
        ("", _JSET, 0x1FFF, "take", ""),
        ("", _LDX_IP_HEADER, 14, "", ""),
        ("", _LD_HALF_AT_X, 16, "", ""),
        ("", JEQ, port, "take", "plain4"),
        ("ipv6", LD_BYTE, 20, "", ""),
        ("", JEQ, 44, "", "whole"),
        ("", LD_BYTE, 54, "", ""),
        ("", JEQ, 17, "take", "plain6"),
        ("whole", JEQ, 17, "", "plain6"),
        ("", LD_HALF, 56, "", ""),
        ("", JEQ, port, "take", "plain6"),
    ]
    by_family = {len(block.base): block for block in blocks}
    for label, size, source, destination in (("plain4", 4, 26, 30), ("plain6", 16, 22, 38)):
        block = by_family.get(size)
        if block is None:
            steps.append((label, RET, 0, "", ""))
            continue
        steps.append((label, LD_BYTE, 12, "", ""))
        steps += [*_inside(block, source), *_inside(block, destination)]
        steps.append(("", RET, ALL, "", ""))
    return program(*steps, TAKE, DROP)


def _inside(block: Prefix, offset: int) -> Iterable[Step]:
    """Goes on if the address at this offset lies in the block."""
    size = len(block.base)
    mask = ((1 << block.length) - 1) << (8 * size - block.length)
    for word in range(0, size, 4):
        bits = int.from_bytes(mask.to_bytes(size, "big")[word : word + 4], "big")
        if bits:
            wanted = int.from_bytes(block.base[word : word + 4], "big")
            yield from (
                ("", LD_WORD, offset + word, "", ""),
                ("", _AND, bits, "", ""),
                ("", JEQ, wanted, "", "drop"),
            )

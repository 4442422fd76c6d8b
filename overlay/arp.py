"""Which machines on a link have an IPv4 address: ARP probes (RFC 5227).

An edge: one packet socket for each call. A probe asks for an address in nobody's name, so no cache learns from it, and
this host's own kernel does not answer what it has sent. IPv6 hosts find doubles by themselves (RFC 4862 section 5.4).
"""

import select
import socket
import struct
import time

SECONDS = 0.5
"""How long is waited for an answer; a switched link takes some milliseconds."""

_ETH_P_ARP = 0x0806
_ARP = struct.Struct("!6s6sHHHBBH6s4s6s4s")  # Ethernet, then RFC 826 for Ethernet and IPv4
_REQUEST, _REPLY = 1, 2


def holders(interface: str, address: bytes, seconds: float = SECONDS) -> set[bytes]:
    """The MACs of other machines on the link of `interface` that answer for `address`, packed. Raises OSError."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.htons(_ETH_P_ARP)) as sock:
        sock.bind((interface, _ETH_P_ARP))
        mac = sock.getsockname()[4]
        if len(mac) != 6:
            return set()
        head = b"\xff" * 6, mac, _ETH_P_ARP, 1, 0x0800, 6, 4, _REQUEST
        sock.send(_ARP.pack(*head, mac, bytes(4), bytes(6), address))
        found = set()
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and select.select([sock], [], [], left)[0]:
            frame = sock.recv(256)
            if len(frame) >= _ARP.size:
                operation, sender, claimed = _ARP.unpack_from(frame)[7:10]
                if operation == _REPLY and claimed == address and sender != mac:
                    found.add(sender)
        return found

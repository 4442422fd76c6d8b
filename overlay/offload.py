"""The checksum offload edge: finds out whether checksums survive the path to a peer, and switches the offload at fault.

No agent need cooperate: ordinary packets go from the address of our device to that of a peer's device, and the peer's
kernel answers them. An answer proves the checksum right, a refusal as well: a SYN to a closed port brings a RST
(RFC 9293 section 3.5.2), a datagram to one a "port unreachable" (RFC 1122 section 4.1.3.1), and a packet with a wrong
checksum nothing at all. The packets come from the kernel's own TCP and UDP and not from a raw socket: only the kernel
leaves checksums to be finished by the device. The control is an ICMP echo, large so that a path MTU that is too small
does not pass for a wrong checksum.

Owns the socket calls and the ethtool ioctls (linux/ethtool.h). What follows from a measurement is decided in
`checksums`. Everything here blocks: a healthy path for one round trip, a faulty one for some ten seconds.
"""

import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from overlay.checksums import FEATURE, Finding, Probe, Verdict, judged
from subnet_lease.model import format_address

ROUNDS = 3
"""Losses of single packets must not look like a fault."""

PATIENCE = 1.0
"""Seconds for the answers of one round: more than a round trip around the world, and TCP's own first time-out."""

FIRST_PORT = 33434
"""traceroute's: ports that nobody listens on, and the ones that a firewall which lets anything through lets through."""

_SIOCETHTOOL = 0x8946
_GSTRINGS, _GSSET_INFO, _GFEATURES, _SFEATURES = 0x1B, 0x37, 0x3A, 0x3B
_SS_FEATURES = 4
_NAME_LENGTH = 32
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE = 10, 23, 3


class OffloadRefused(Exception):
    """The device is not there any more, or the kernel refuses to switch its offload; the text says which."""


def examine(device: str, source: bytes, peers: Sequence[bytes], mtu: int) -> Finding:
    """Probe `peers` in turn until one tells something; switch the offload of `device` off if it is at fault.

    `source` and `peers` are packed addresses of the overlay's devices, of one family; `mtu` (bytes) holds to all of
    these peers. On every other outcome, an exception included, the offload is as it was. Raises OffloadRefused.
    """
    if not feature(device, FEATURE):
        return Finding(Verdict.OFF)
    told = Finding(Verdict.NO_PATH)
    for peer in peers:
        first = probe(device, source, peer, mtu)
        finding = judged(peer, first)
        if finding.verdict is Verdict.SUSPECT:
            with _switched_off(device):
                without = probe(device, source, peer, mtu)
            finding = judged(peer, first, without, probe(device, source, peer, mtu))
        if finding.verdict is Verdict.FAULTY:
            set_feature(device, FEATURE, False)
        if finding.verdict in (Verdict.HEALTHY, Verdict.FAULTY):
            return finding
        if finding.verdict is not Verdict.NO_PATH:
            told = finding
    return told


@contextmanager
def _switched_off(device: str) -> Iterator[None]:
    set_feature(device, FEATURE, False)
    try:
        yield
    finally:
        set_feature(device, FEATURE, True)


# --- probing -----------------------------------------------------------------------------------------------------


def probe(device: str, source: bytes, peer: bytes, mtu: int) -> Probe:
    """Send echo, TCP and UDP to `peer` from `source` by `device` until TCP and UDP are answered, ROUNDS at most."""
    echo = tcp = udp = sent = 0
    while sent < ROUNDS and not (tcp and udp):
        answered = _round(device, source, peer, mtu, FIRST_PORT + sent)
        sent += 1
        echo += "echo" in answered
        tcp += "TCP" in answered
        udp += "UDP" in answered
    return Probe(sent, echo, tcp, udp)


def _round(device: str, source: bytes, peer: bytes, mtu: int, port: int) -> set[str]:
    """Which of the three were answered, looked for until TCP and UDP were, or until PATIENCE is at its end."""
    family = socket.AF_INET if len(peer) == 4 else socket.AF_INET6
    # What the headers of IP and of UDP, or of ICMP, which are as long, leave of the MTU.
    size = mtu - (28 if family == socket.AF_INET else 48)
    request = _echo_request(family, size)
    answered: set[str] = set()
    with ExitStack() as stack:
        poll = select.poll()
        waiting: dict[int, tuple[str, socket.socket]] = {}

        def send(what: str, kind: int, protocol: int, data: bytes) -> None:
            sender = stack.enter_context(socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol))
            try:
                sender.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
                if family == socket.AF_INET:
                    sender.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)
                else:
                    sender.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)
                sender.bind((format_address(source), 0))
                # For a raw socket the port means nothing; all of them hear this peer alone from now on.
                sender.connect((format_address(peer), 0 if kind == socket.SOCK_RAW else port))
                if data:
                    sender.send(data)
            except BlockingIOError:
                pass  # The SYN is under way.
            except OSError:
                return
            waiting[sender.fileno()] = what, sender
            poll.register(sender, select.POLLOUT if kind == socket.SOCK_STREAM else select.POLLIN)

        icmp = socket.IPPROTO_ICMP if family == socket.AF_INET else socket.IPPROTO_ICMPV6
        send("echo", socket.SOCK_RAW, icmp, request)
        send("TCP", socket.SOCK_STREAM, 0, b"")
        send("UDP", socket.SOCK_DGRAM, 0, bytes(size))
        deadline = time.monotonic() + PATIENCE
        while waiting and not answered >= {"TCP", "UDP"} and (left := deadline - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(1000 * left):
                what, sender = waiting[descriptor]
                outcome = _echoed(sender, request) if what == "echo" else _answered(sender)
                if outcome is None:
                    continue
                if outcome:
                    answered.add(what)
                poll.unregister(descriptor)
                del waiting[descriptor]
    return answered


def _answered(sender: socket.socket) -> bool:
    """Whether what happened to a TCP or UDP socket is the peer's answer, and not some router's complaint."""
    return sender.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) in (0, errno.ECONNREFUSED)


def _echoed(sender: socket.socket, request: bytes) -> bool | None:
    """True for the reply to `request`, None for other ICMP of the same peer."""
    try:
        packet = sender.recv(65535)
    except OSError:
        return False
    if sender.family == socket.AF_INET:
        packet = packet[4 * (packet[0] & 15) :]
    reply = 0 if sender.family == socket.AF_INET else 129
    return True if packet[:1] == bytes((reply,)) and packet[4:] == request[4:] else None


def _echo_request(family: int, size: int) -> bytes:
    """An ICMP echo request (RFC 792, RFC 4443) with `size` bytes of payload, and an identifier like no other."""
    body = os.urandom(4) + bytes(size)
    if family == socket.AF_INET6:
        return bytes((128, 0, 0, 0)) + body  # Raw ICMPv6 sockets sum up by themselves (RFC 3542 section 3.1).
    message = bytes((8, 0, 0, 0)) + body
    return message[:2] + struct.pack("!H", _checksum(message)) + message[4:]


def _checksum(message: bytes) -> int:
    """RFC 1071."""
    padded = message + bytes(len(message) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


# --- offloads of a device ----------------------------------------------------------------------------------------


def feature(device: str, name: str) -> bool:
    """Whether an offload, by its name in `ethtool -k`, is active, False if there is none such. OffloadRefused."""
    with _control() as control:
        number, blocks = _locate(control, device, name)
        if number is None:
            return False
        # Per 32 features: available, requested, active, never changed.
        answer = _ethtool(control, device, struct.pack("=II", _GFEATURES, blocks) + bytes(16 * blocks))
        (active,) = struct.unpack_from("=I", answer, 8 + 16 * (number // 32) + 8)
        return bool(active >> number % 32 & 1)


def set_feature(device: str, name: str, on: bool) -> None:
    """Switch an offload. Raises OffloadRefused if the device does not have it, or keeps it as it is."""
    with _control() as control:
        number, blocks = _locate(control, device, name)
        if number is None:
            raise OffloadRefused(f"{device} has no offload {name}")
        bit = 1 << number % 32
        # Per 32 features: which are valid, and their values.
        masks = [(bit, bit if on else 0) if block == number // 32 else (0, 0) for block in range(blocks)]
        wanted = b"".join(struct.pack("=II", *mask) for mask in masks)
        _ethtool(control, device, struct.pack("=II", _SFEATURES, blocks) + wanted)
    if feature(device, name) != on:
        raise OffloadRefused(f"{device} keeps {name} {'off' if on else 'on'}")


def _locate(control: socket.socket, device: str, name: str) -> tuple[int | None, int]:
    """The number of an offload, which differs between kernels, None if there is none such; and the count of blocks."""
    answer = _ethtool(control, device, struct.pack("=IIQI", _GSSET_INFO, 0, 1 << _SS_FEATURES, 0))
    (count,) = struct.unpack_from("=I", answer, 16)
    header = struct.pack("=III", _GSTRINGS, _SS_FEATURES, count)
    strings = _ethtool(control, device, header + bytes(_NAME_LENGTH * count))[len(header) :]
    names = [strings[at : at + _NAME_LENGTH].split(b"\0")[0] for at in range(0, len(strings), _NAME_LENGTH)]
    return (names.index(name.encode()) if name.encode() in names else None), (count + 31) // 32


def _control() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)


def _ethtool(control: socket.socket, device: str, command: bytes) -> bytes:
    """One SIOCETHTOOL; the buffer as the kernel leaves it. struct ifreq is a name and a pointer to the buffer."""
    buffer = ctypes.create_string_buffer(command, len(command))
    try:
        fcntl.ioctl(control, _SIOCETHTOOL, struct.pack("16sP16x", device.encode(), ctypes.addressof(buffer)))
    except OSError as error:
        raise OffloadRefused(f"ethtool on {device}: {os.strerror(error.errno or 0)}") from None
    return buffer.raw

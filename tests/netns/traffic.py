"""Traffic between the pods of a lab: what gets through, what a flow loses, and whose address the receiver sees.

All of it is sent and received by this process, through sockets that were made inside the pods' namespaces: thousands of
packets cost no process of their own.

`exchange` tells which messages did not come over and back again as they were. `Meter` and `Stream` run while something
else happens, and tell afterwards what of it was felt.
"""

import asyncio
import contextlib
import ipaddress
import itertools
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Self

from overlay.cluster_hosts import LabError, Place, Pod, wait_until

PROTOCOLS = ("icmp", "udp", "tcp")

SIZES = ("small", "full", "oversized")
"""Of a message: a few bytes; one packet as large as the MTU of both pods allows, which may not be fragmented; several
packets, which are fragments where the protocol has no segments."""

SMALL_BYTES = 32
LONG_STREAM_BYTES = 256 * 1024

AT_ONCE = 16
"""Flows under way: what larger bursts lose in full queues (net.core.netdev_max_backlog) is nobody's fault."""

_HEADER = {4: 20, 6: 40}
_DOMAIN = {4: socket.AF_INET, 6: socket.AF_INET6}
_ICMP = {4: socket.IPPROTO_ICMP, 6: socket.IPPROTO_ICMPV6}
_ECHO = {4: (8, 0), 6: (128, 129)}  # ICMP types of request and answer (RFC 792, RFC 4443).

# linux/in.h and linux/in6.h: the option that says whether packets may be fragmented, and two of its values.
_MTU_DISCOVER = {4: (socket.IPPROTO_IP, 10), 6: (socket.IPPROTO_IPV6, 23)}
_MAY_FRAGMENT, _WHOLE = 0, 2

_SEEN = struct.Struct("16s")
"""How a receiver's answer begins: with the address that the message came from."""


class Flow(NamedTuple):
    """One message from pod to pod, and its answer."""

    src: Pod
    dst: Pod
    family: int
    protocol: str
    size: str

    def __str__(self) -> str:
        return f"{self.src.name} -> {self.dst.name} IPv{self.family} {self.protocol} {self.size}"

    @property
    def whole(self) -> bool:
        """Whether it may not be fragmented on its way."""
        return self.size != "oversized"

    @property
    def payload(self) -> int:
        """Bytes of the message, headers not counted."""
        mtu = min(map(mtu_of, (self.src, self.dst)))
        match self.size, self.protocol:
            case "small", _:
                return SMALL_BYTES
            case "full", "tcp":
                return mtu - _HEADER[self.family] - 20
            case "full", _:
                return mtu - _HEADER[self.family] - 8
            case _, "tcp":
                return LONG_STREAM_BYTES
        return 3 * mtu + 1


class Failed(Exception):
    """An answer that is not what was sent."""


def mtu_of(pod: Pod) -> int:
    """Of the pod's interface, in bytes."""
    return int(pod.host.subnet_env["FLANNEL_MTU"])


def all_to_all(pods: Iterable[Pod], protocols: Sequence[str] = PROTOCOLS, sizes: Sequence[str] = SIZES) -> list[Flow]:
    """From every pod to every other, in every family that both have."""
    pods = list(pods)
    return [
        Flow(src, dst, family, protocol, size)
        for protocol in protocols
        for size in sizes
        for src in pods
        for dst in pods
        if src is not dst
        for family in sorted(src.addresses.keys() & dst.addresses.keys())
    ]


def exchange(flows: Sequence[Flow], seconds: float = 5) -> list[str]:
    """Which of them failed, and why: no answer within `seconds`, one that differs, an error.

    A message over UDP or ICMP is sent once, so none may be lost. Over UDP and TCP the receiver tells whose address it
    saw, which must be the sender's own.
    """
    return asyncio.run(_exchange(flows, seconds))


async def _exchange(flows: Sequence[Flow], seconds: float) -> list[str]:
    failures = []
    limit = asyncio.Semaphore(AT_ONCE)

    async def run(number: int, flow: Flow, port: int) -> None:
        async with limit:
            try:
                async with asyncio.timeout(seconds):
                    await _SENDERS[flow.protocol](flow, port or number)
            except TimeoutError:
                failures.append(f"{flow}: no answer within {seconds:g} s")
            except (OSError, Failed) as error:
                failures.append(f"{flow}: {error}")

    async with contextlib.AsyncExitStack() as stack:
        ports: dict[tuple[Pod, int, str], int] = {}
        for pod, family in {(flow.dst, flow.family): None for flow in flows}:
            datagrams = stack.enter_context(_bound(pod, family, socket.SOCK_DGRAM))
            ports[pod, family, "udp"] = datagrams.getsockname()[1]
            receiver = asyncio.create_task(_answer_datagrams(datagrams, family))
            stack.callback(receiver.cancel)
            listener = _bound(pod, family, socket.SOCK_STREAM)
            ports[pod, family, "tcp"] = listener.getsockname()[1]
            server = await asyncio.start_server(_answer_stream, sock=listener, limit=2 * LONG_STREAM_BYTES)
            stack.callback(server.close)
        for protocol in PROTOCOLS:
            chosen = [(number, flow) for number, flow in enumerate(flows) if flow.protocol == protocol]
            # An echo request has no port: its number tells whose it is.
            await asyncio.gather(
                *(run(i + 1, flow, ports.get((flow.dst, flow.family, protocol), 0)) for i, flow in chosen)
            )
    return failures


def _socket(pod: Pod, family: int, kind: int, protocol: int = 0) -> socket.socket:
    made = pod.made(lambda: socket.socket(_DOMAIN[family], kind | socket.SOCK_NONBLOCK, protocol))
    made.setblocking(False)
    return made


def _bound(pod: Pod, family: int, kind: int) -> socket.socket:
    made = _socket(pod, family, kind)
    made.bind((pod.addresses[family], 0))
    return made


def _message(flow: Flow) -> bytes:
    """Its first byte tells the receiver whether the answer may be fragmented; no two are alike."""
    return bytes([_WHOLE if flow.whole else _MAY_FRAGMENT]) + random.randbytes(flow.payload - 1)


def _checked(flow: Flow, sent: bytes, received: bytes) -> None:
    """Failed unless the receiver has sent all back, and has seen the sender's own address."""
    seen, own = received[: _SEEN.size], _packed(flow.src.addresses[flow.family])
    if seen != own:
        raise Failed(f"the receiver saw another sender: {seen.hex(' ')}, not {own.hex(' ')}")
    if received[_SEEN.size :] != sent[_SEEN.size :]:
        raise Failed(f"{len(sent)} bytes were sent, and {len(received)} others came back")


def _packed(address: str) -> bytes:
    return _SEEN.pack(ipaddress.ip_address(address).packed)


async def _send_datagram(flow: Flow, port: int) -> None:
    with _socket(flow.src, flow.family, socket.SOCK_DGRAM) as own:
        own.connect((flow.dst.addresses[flow.family], port))
        message = _message(flow)
        own.setsockopt(*_MTU_DISCOVER[flow.family], message[0])
        own.send(message)
        _checked(flow, message, await asyncio.get_running_loop().sock_recv(own, 1 << 16))


async def _answer_datagrams(own: socket.socket, family: int) -> None:
    while True:
        message, sender = await asyncio.get_running_loop().sock_recvfrom(own, 1 << 16)
        own.setsockopt(*_MTU_DISCOVER[family], message[0])
        # What cannot be sent is missed by who waits for it.
        with contextlib.suppress(OSError):
            own.sendto(_packed(sender[0]) + message[_SEEN.size :], sender)


async def _send_stream(flow: Flow, port: int) -> None:
    own = _socket(flow.src, flow.family, socket.SOCK_STREAM)
    with own:
        await asyncio.get_running_loop().sock_connect(own, (flow.dst.addresses[flow.family], port))
        reader, writer = await asyncio.open_connection(sock=own)
        with contextlib.closing(writer):
            message = _message(flow)
            writer.write(message)
            writer.write_eof()
            _checked(flow, message, await reader.read(-1))


async def _answer_stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.closing(writer), contextlib.suppress(OSError):
        message = await reader.read(-1)
        writer.write(_packed(writer.get_extra_info("peername")[0]) + message[_SEEN.size :])
        await writer.drain()


async def _send_echo(flow: Flow, number: int) -> None:
    request, answer = _ECHO[flow.family]
    with _socket(flow.src, flow.family, socket.SOCK_RAW, _ICMP[flow.family]) as own:
        own.connect((flow.dst.addresses[flow.family], 0))
        message = _message(flow)
        own.setsockopt(*_MTU_DISCOVER[flow.family], message[0])
        fields = struct.pack("!HH", number, 1) + message
        # The kernel fills in the checksum of ICMPv6 alone (RFC 3542 section 3.1).
        checksum = _checksum(bytes([request, 0, 0, 0]) + fields) if flow.family == 4 else 0
        own.send(struct.pack("!BBH", request, 0, checksum) + fields)
        while True:
            packet = await asyncio.get_running_loop().sock_recv(own, 1 << 16)
            received = packet[(packet[0] & 0x0F) * 4 :] if flow.family == 4 else packet
            # All raw sockets of a namespace see all that comes.
            if received[0] == answer and received[4:6] == fields[:2]:
                break
        if received[8:] != message:
            raise Failed(f"{len(message)} bytes were sent, and {len(received) - 8} others came back")


_SENDERS = {"icmp": _send_echo, "udp": _send_datagram, "tcp": _send_stream}


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


# --- what is on its way --------------------------------------------------------------------------------------------


def sender_seen(src: Pod, family: int, seconds: float = 5) -> str:
    """Whose address packets of the pod bear once they leave the overlay: on the underlay, at the hub's port."""
    # Here, for the benchmark has no scapy where it runs.
    from scapy.layers.inet import UDP
    from scapy.layers.inet6 import IPv6  # noqa: F401  Ether finds it once it is loaded.
    from scapy.layers.l2 import Ether

    lab, host = src.lab, src.host
    target, port = str(host.seat.link.hub[family].ip), 9
    with lab.hub.packet_socket(host.name) as capture, _socket(src, family, socket.SOCK_DGRAM) as own:
        own.sendto(b"who am I?", (target, port))
        capture.settimeout(seconds)
        while True:
            frame = Ether(capture.recv(1 << 16))
            packet = frame.payload
            if UDP in packet and (packet.dst, packet[UDP].dport) == (target, port):
                return str(packet.src)


def send_whole(src: Pod, dst: Pod, family: int, packet_bytes: int) -> None:
    """Send one packet of this size over UDP, not to be fragmented; nobody need be there."""
    with _socket(src, family, socket.SOCK_DGRAM) as own:
        own.setsockopt(*_MTU_DISCOVER[family], _WHOLE)
        own.sendto(bytes(packet_bytes - _HEADER[family] - 8), (dst.addresses[family], 9))


def fragments_made(place: Place) -> int:
    """How many packets the kernel there has cut up into fragments, of its own and of others."""
    counters = place.run("cat", "/proc/net/snmp", "/proc/net/snmp6").stdout
    names, values = (line.split() for line in counters.splitlines() if line.startswith("Ip:"))
    (ipv6,) = re.findall(r"^Ip6FragCreates\s+(\d+)", counters, re.MULTILINE)
    return int(values[names.index("FragCreates")]) + int(ipv6)


# --- while something else happens ----------------------------------------------------------------------------------


class Gap(NamedTuple):
    """`lost` packets in a row that never arrived.

    The first was sent `at_ms` after the meter began, and `ms` later the first that arrived again.
    """

    at_ms: float
    ms: float
    lost: int

    def __str__(self) -> str:
        return f"{self.lost} lost in {self.ms:.1f} ms from {self.at_ms:.1f} ms on"


class Meter:
    """A numbered packet over UDP every `interval_ms` from pod to pod, one way, inside the block.

    The block begins once packets arrive. Times are the senders': a busy machine sends late, which is no gap.
    """

    def __init__(self, src: Pod, dst: Pod, *, family: int | None = None, interval_ms: float = 2) -> None:
        self.name = f"{src.name} -> {dst.name}"
        family = family or min(dst.addresses)
        self._interval = interval_ms / 1000
        self._inlet = _bound(dst, family, socket.SOCK_DGRAM)
        self._outlet = _socket(src, family, socket.SOCK_DGRAM)
        self._outlet.connect(self._inlet.getsockname())
        self._inlet.settimeout(0.1)
        self._sent: list[float] = []
        self._arrived: set[int] = set()
        self._stop_sending, self._stop_receiving = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=each) for each in (self._send, self._receive)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        try:
            wait_until(lambda: self._arrived, 10, f"the first packet {self.name}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_sending.set()
        self._threads[0].join()
        with contextlib.suppress(LabError):
            wait_until(lambda: len(self._sent) - 1 in self._arrived, 1, "the last packet")
        self._stop_receiving.set()
        self._threads[1].join()
        self._inlet.close()
        self._outlet.close()

    @property
    def now_ms(self) -> float:
        """The present moment, as gaps tell it."""
        return (time.monotonic() - self._sent[0]) * 1000

    @property
    def longest_pause_ms(self) -> float:
        """Between two packets sent: how precise the gaps' beginnings and lengths are."""
        return max(after - before for before, after in itertools.pairwise(self._sent)) * 1000

    def gaps(self) -> list[Gap]:
        """What was lost since the first packet that arrived; to be asked after the block."""
        gaps, first = [], None
        for number in range(min(self._arrived), len(self._sent)):
            if number not in self._arrived:
                first = number if first is None else first
            elif first is not None:
                gaps.append(self._gap(first, number))
                first = None
        if first is not None:
            gaps.append(self._gap(first, len(self._sent) - 1))
        return gaps

    def _gap(self, first: int, after: int) -> Gap:
        began = self._sent[0]
        lost = sum(number not in self._arrived for number in range(first, after + 1))
        return Gap((self._sent[first] - began) * 1000, (self._sent[after] - self._sent[first]) * 1000, lost)

    def _send(self) -> None:
        while not self._stop_sending.wait(self._interval):
            self._sent.append(time.monotonic())
            # What cannot even be sent is lost: no route, no such device.
            with contextlib.suppress(OSError):
                self._outlet.send(struct.pack("!Q", len(self._sent) - 1))

    def _receive(self) -> None:
        while not self._stop_receiving.is_set():
            with contextlib.suppress(TimeoutError):
                self._arrived.add(struct.unpack("!Q", self._inlet.recv(64))[0])


class Stream:
    """A TCP connection from pod to pod inside the block, on which every byte is checked where it arrives.

    It carries 8 KiB every 5 ms: enough to be felt, little enough to leave the machine to others.
    """

    CHUNK_BYTES, INTERVAL_S, PATIENCE_S = 8192, 0.005, 30.0

    def __init__(self, src: Pod, dst: Pod, *, family: int | None = None) -> None:
        self.name = f"{src.name} -> {dst.name}"
        family = family or min(dst.addresses)
        with _bound(dst, family, socket.SOCK_STREAM) as listener:
            listener.listen()
            listener.settimeout(self.PATIENCE_S)
            self._outlet = _socket(src, family, socket.SOCK_STREAM)
            self._outlet.settimeout(self.PATIENCE_S)
            self._outlet.connect(listener.getsockname())
            self._inlet, _ = listener.accept()
        self._inlet.settimeout(self.PATIENCE_S)
        self._chunk = random.randbytes(self.CHUNK_BYTES)
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._guarded, args=(each,)) for each in (self._send, self._receive)]
        self.sent = 0
        """Bytes, so far."""
        self.received = 0
        self.longest_silence_ms = 0.0
        """Between two arrivals, so far."""
        self.troubles: list[str] = []
        """Why it broke, if it did."""

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()
        self._outlet.close()
        self._inlet.close()
        if not self.troubles and self.received != self.sent:
            self.troubles.append(f"{self.sent} bytes were sent, {self.received} have arrived")

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, Failed) as error:
            self.troubles.append(f"{work.__name__.strip('_')}: {error}")

    def _send(self) -> None:
        while not self._done.wait(self.INTERVAL_S):
            self._outlet.sendall(self._chunk)
            self.sent += len(self._chunk)
        self._outlet.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        last = time.monotonic()
        endless = self._chunk * 9  # As long as what one call reads, from any place in a chunk on.
        while piece := self._inlet.recv(8 * self.CHUNK_BYTES):
            last, before = time.monotonic(), last
            self.longest_silence_ms = max(self.longest_silence_ms, (last - before) * 1000)
            start = self.received % self.CHUNK_BYTES
            if piece != endless[start : start + len(piece)]:
                raise Failed(f"other bytes than were sent, after {self.received}")
            self.received += len(piece)

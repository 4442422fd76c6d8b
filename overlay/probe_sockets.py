"""The sockets of the probes: sends a round of questions and collects the answers, and answers those of peers.

Owns the socket calls, and their rules: questions leave as the kernel routes them, from our address in the overlay, and
may not be fragmented; answers are taken for answers by a number that only whoever saw the question knows. The responder
listens on our address in the overlay alone, on our device alone, answers known peers alone, with no more bytes than
were asked, and so many in a second at most: then it lets questions wait, and the kernel drops what is too much.

Everything runs in one thread. Nothing here decides: `probe` does.
"""

import errno
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from overlay import bpf, probe, sockets
from subnet_lease.model import format_address

ANSWERS_PER_SECOND = 100
"""Answers, and connections taken, in a second: 15,000 hosts with the default options ask each of them once in one."""

BUFFER = 1 << 16
"""Bytes that may wait in each socket."""

BACKLOG = 16

_SO_TIMESTAMPNS, _SO_NO_PORT = 35, 24  # SO_TIMESTAMPNS_OLD, IP_BIND_ADDRESS_NO_PORT
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE = 10, 23, 3
_IP_RECVERR, _IPV6_RECVERR = 11, 25
_TIMESPEC = struct.Struct("=qq")
_ERROR = struct.Struct("=IBBBBII")  # struct sock_extended_err, which the offender's address follows
_ORIGIN_ICMP, _ORIGIN_ICMP6 = 2, 3
_LINGER_NONE = struct.pack("ii", 1, 0)
_SOL_PACKET, _PACKET_STATISTICS, _PACKET_HOST, _PACKET_OUTGOING = 263, 6, 0, 4
_STATISTICS = struct.Struct("=II")  # tpacket_stats: seen, dropped
_ETH_P_ALL = 3
_SNIPPET = 60
"""How much of a packet on the wire is read."""

_WATCHED = 1 << 21
"""Bytes of packets on the wire that may wait: some hundreds of the MTU's size, as the kernel counts them."""

ECHO, UDP, FINISHED, TCP = "echo", "udp", "finished", "tcp"
"""What can be asked: ICMP echo; a datagram, its checksum left to the device as usual, or finished by us; a SYN."""


class Ask(NamedTuple):
    """One packet for `address` from `source`, both packed, of `size` bytes with its IP header (a SYN has its own).

    `state` is what the datagram says of the path; see `probe.Question`.
    """

    what: str
    source: bytes
    address: bytes
    size: int
    state: tuple[int, int] = (probe.UNKNOWN, 0)


class Lane(NamedTuple):
    """Where the responder listens: our address; name and index of the interface that questions come in by; its MTU."""

    source: bytes
    device: str
    number: int
    mtu: int


@dataclass(slots=True)
class _Asked:
    """A question under way: its number among those of the round, and when it was sent."""

    number: int
    ask: Ask
    sent: float
    sent_ns: int


@dataclass(slots=True)
class _Client:
    """The sockets that questions leave by from one of our addresses; `raw` sends finished datagrams."""

    echo: socket.socket
    udp: socket.socket
    port: int
    ident: int
    raw: socket.socket | None = None


@dataclass(slots=True)
class _Round:
    """Questions by their token, descriptors of connections, and what came of each: seconds, or None."""

    found: list[float | None]
    by_token: dict[int, _Asked] = field(default_factory=dict)
    connecting: dict[int, tuple[socket.socket, _Asked]] = field(default_factory=dict)
    left: int = 0

    def answered(self, asked: _Asked, seconds: float) -> None:
        if self.found[asked.number] is None:
            self.found[asked.number] = seconds
            self.left -= 1


class Wire:
    """All sockets of the probes.

    `known(address, device index)` tells whether a peer asks by that device; `reply(address, question, room)` makes its
    answer; `heard(address, own address, datagram)` takes in what a peer has answered. `counts` of questions are by
    "answered", "stranger", "malformed" and "limited".
    """

    def __init__(
        self,
        known: Callable[[bytes, int], bool],
        reply: Callable[[bytes, probe.Question, int], bytes],
        heard: Callable[[bytes, bytes, bytes], None],
        counts: dict[str, int],
    ) -> None:
        self._known, self._reply, self._heard = known, reply, heard
        self._counts = counts
        self._poll = select.poll()
        self._ready: dict[int, Callable[[], None]] = {}
        self._clients: dict[bytes, _Client] = {}
        self._responders: list[socket.socket] = []
        self._round = _Round([])
        self._budget = float(ANSWERS_PER_SECOND)
        self._filled = time.monotonic()
        self._listening = True
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._watch(self._stop, self._wake)
        self._woken = False
        self.port = 0

    def close(self) -> None:
        """Close everything."""
        self.listen((), 0)
        self._drop_clients()
        os.close(self._stop)

    def wake(self) -> None:
        """End what waits at present, or next. From any thread."""
        with suppress(OSError):
            os.eventfd_write(self._stop, 1)

    def _wake(self) -> None:
        os.eventfd_read(self._stop)
        self._woken = True

    # --- waiting ---

    def _watch(self, descriptor: int, ready: Callable[[], None], events: int = select.POLLIN) -> None:
        self._ready[descriptor] = ready
        self._poll.register(descriptor, events)

    def _forget(self, descriptor: int) -> None:
        if self._ready.pop(descriptor, None):
            self._poll.unregister(descriptor)

    def serve(self, seconds: float) -> bool:
        """Answer peers for so long; False if it was woken up before."""
        self._woken = False
        deadline = time.monotonic() + seconds
        while not self._woken and (left := deadline - time.monotonic()) > 0:
            self._once(left)
        return not self._woken

    def _once(self, seconds: float) -> None:
        if not self._listening:
            seconds = min(seconds, 1.0)
        for descriptor, _ in self._poll.poll(max(0.0, 1000 * seconds)):
            if ready := self._ready.get(descriptor):
                ready()
        self._breathe()

    # --- asking ---

    def ask(self, asks: Sequence[Ask], seconds: float) -> list[float | None]:
        """Send all at once; for each the seconds to its answer, None without one. Ends when all are answered."""
        current = self._round = _Round([None] * len(asks), left=len(asks))
        deadline = time.monotonic() + seconds
        self._woken = False
        for number, ask in enumerate(asks):
            try:
                self._send(number, ask)
            except OSError:
                # No way, no room, or a rule in the way: what is not sent is not answered.
                continue
        while current.left and not self._woken and (left := deadline - time.monotonic()) > 0:
            self._once(left)
        for sock, _ in current.connecting.values():
            self._forget(sock.fileno())
            sock.close()
        self._round = _Round([])
        return current.found

    def _send(self, number: int, ask: Ask) -> None:
        if ask.what == TCP:
            self._connect(number, ask)
            return
        client = self._clients.get(ask.source) or self._client(ask.source)
        token = int.from_bytes(os.urandom(8), "big")
        target = format_address(ask.address)
        headers = 28 if len(ask.address) == 4 else 48
        asked = _Asked(number, ask, time.monotonic(), time.time_ns())
        self._round.by_token[token] = asked
        if ask.what == ECHO:
            message = _echo_request(len(ask.address), client.ident, token, ask.size - headers)
            client.echo.sendto(message, (target, 0))
            return
        question = probe.Question(token, asked.sent_ns, *ask.state)
        datagram = probe.encode_question(question, max(ask.size - headers, probe.SMALLEST))
        if ask.what == UDP:
            try:
                client.udp.sendto(datagram, (target, self.port))
            except OSError as error:
                if error.errno == errno.EMSGSIZE:
                    raise
                # What an earlier question met with is told once, whatever is sent next.
                client.udp.sendto(datagram, (target, self.port))
            return
        if client.raw is None:
            client.raw = _open(len(ask.source), socket.SOCK_RAW, socket.IPPROTO_UDP)
            sockets.attach(client.raw, bpf.program(bpf.DROP))
            client.raw.bind((format_address(ask.source), 0))
        client.raw.sendto(_finished(ask.source, ask.address, client.port, self.port, datagram), (target, 0))

    def _connect(self, number: int, ask: Ask) -> None:
        sock = _open(len(ask.source), socket.SOCK_STREAM, 0, whole=False)
        asked = _Asked(number, ask, time.monotonic(), 0)
        try:
            # Closed with a RST: nothing of it remains on either side.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
            if sock.family == socket.AF_INET:
                sock.setsockopt(socket.IPPROTO_IP, _SO_NO_PORT, 1)
            sock.bind((format_address(ask.source), 0))
            code = sock.connect_ex((format_address(ask.address), self.port))
            if code not in (0, errno.EINPROGRESS, errno.ECONNREFUSED):
                raise OSError(code, "")
        except OSError:
            sock.close()
            raise
        self._round.connecting[sock.fileno()] = sock, asked
        self._watch(sock.fileno(), lambda: self._connected(sock, asked), select.POLLOUT)

    def _connected(self, sock: socket.socket, asked: _Asked) -> None:
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        # A peer that takes the connection resets it, perhaps before this is read.
        if code in (0, errno.ECONNREFUSED, errno.ECONNRESET):
            self._round.answered(asked, time.monotonic() - asked.sent)
        self._forget(sock.fileno())
        self._round.connecting.pop(sock.fileno(), None)
        sock.close()

    def _client(self, source: bytes) -> _Client:
        family, address = len(source), format_address(source)
        icmp = socket.IPPROTO_ICMP if family == 4 else socket.IPPROTO_ICMPV6
        with ExitStack() as stack:
            echo = stack.enter_context(_open(family, socket.SOCK_RAW, icmp))
            ident = int.from_bytes(os.urandom(2), "big")
            sockets.attach(echo, _echo_filter(family, ident))
            echo.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            echo.bind((address, 0))
            udp = stack.enter_context(_open(family, socket.SOCK_DGRAM, 0))
            sockets.attach(udp, _datagram_filter(probe.ANSWER))
            udp.setsockopt(*_recverr(family), 1)
            udp.bind((address, 0))
            stack.pop_all()
        client = self._clients[source] = _Client(echo, udp, udp.getsockname()[1], ident)
        self._watch(echo.fileno(), lambda: self._read_echo(echo))
        self._watch(udp.fileno(), lambda: self._read_answers(udp, source))
        return client

    def forget(self, source: bytes) -> None:
        """Close what asks from this address."""
        client = self._clients.pop(source, None)
        for sock in (client.echo, client.udp, client.raw) if client else ():
            if sock is not None:
                self._forget(sock.fileno())
                sock.close()

    def _drop_clients(self) -> None:
        for source in list(self._clients):
            self.forget(source)

    # --- answers to us ---

    def _read_echo(self, sock: socket.socket) -> None:
        for _ in range(_AT_ONCE):
            try:
                packet, notes, _, sender = sock.recvmsg(1 << 16, 64)
            except BlockingIOError:
                return
            except OSError:
                continue
            now_ns = time.time_ns()
            for level, kind, note in notes:
                if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS) and len(note) == _TIMESPEC.size:
                    seconds, nanoseconds = _TIMESPEC.unpack(note)
                    now_ns = seconds * 10**9 + nanoseconds
            body = packet[20:] if sock.family == socket.AF_INET else packet
            asked = self._round.by_token.get(int.from_bytes(body[8:16], "big"))
            if asked is None or _packed(sender[0]) != asked.ask.address:
                continue
            # The kernel's own time, unless somebody has set the clock meanwhile.
            passed = time.monotonic() - asked.sent
            stamped = (now_ns - asked.sent_ns) / 1e9
            self._round.answered(asked, stamped if 0 <= stamped <= passed else passed)

    def _read_answers(self, sock: socket.socket, own: bytes) -> None:
        self._read_errors(sock)
        for _ in range(_AT_ONCE):
            try:
                datagram, sender = sock.recvfrom(1 << 16)
            except BlockingIOError:
                return
            except OSError:
                continue
            try:
                answer = probe.decode_answer(datagram)
            except probe.Malformed:
                self._counts["malformed"] += 1
                continue
            asked = self._round.by_token.get(answer.token)
            address = _packed(sender[0])
            if asked is None or address != asked.ask.address or answer.clock != asked.sent_ns:
                continue
            self._round.answered(asked, time.monotonic() - asked.sent)
            self._heard(address, own, datagram)

    def _read_errors(self, sock: socket.socket) -> None:
        """A refusal by the peer itself: it has had the datagram, and found its checksum right."""
        for _ in range(_AT_ONCE):
            try:
                quoted, notes, _, _ = sock.recvmsg(2048, 512, socket.MSG_ERRQUEUE)
            except OSError:
                return
            asked = self._round.by_token.get(probe.token_of(quoted) or 0)
            for _, _, note in notes:
                if asked is not None and _refused_by(note) == asked.ask.address:
                    self._round.answered(asked, time.monotonic() - asked.sent)

    # --- questions of others ---

    def listen(self, lanes: Iterable[Lane], port: int) -> None:
        """Answer on these lanes from now on, and ask at `port`; OSError if one cannot be had, then there is none."""
        self._listen_again()
        for sock in self._responders:
            self._forget(sock.fileno())
            sock.close()
        self._responders = []
        self._drop_clients()
        self.port = port
        try:
            for lane in lanes:
                self._respond(lane, port)
        except OSError:
            self.listen((), port)
            raise

    def _respond(self, lane: Lane, port: int) -> None:
        family, address = len(lane.source), format_address(lane.source)
        udp = _open(family, socket.SOCK_DGRAM, 0)
        self._responders.append(udp)
        tcp = _open(family, socket.SOCK_STREAM, 0, whole=False)
        self._responders.append(tcp)
        sockets.attach(udp, _datagram_filter(probe.QUESTION))
        for sock in (udp, tcp):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, lane.device.encode())
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for sock in (udp, tcp):
            sock.bind((address, port))
        tcp.listen(BACKLOG)
        self._watch(udp.fileno(), lambda: self._answer(udp, lane))
        self._watch(tcp.fileno(), lambda: self._accept(tcp))

    def _answer(self, sock: socket.socket, lane: Lane) -> None:
        headers = 28 if len(lane.source) == 4 else 48
        while self._allowed():
            try:
                datagram, sender = sock.recvfrom(1 << 16)
            except BlockingIOError:
                self._budget += 1
                return
            except OSError:
                continue
            address = _packed(sender[0])
            if not self._known(address, lane.number):
                self._counts["stranger"] += 1
                continue
            try:
                question = probe.decode_question(datagram)
            except probe.Malformed:
                self._counts["malformed"] += 1
                continue
            answer = self._reply(address, question, min(len(datagram), lane.mtu - headers))
            with suppress(OSError):
                if answer:
                    sock.sendto(answer, sender)
                    self._counts["answered"] += 1

    def _accept(self, sock: socket.socket) -> None:
        while self._allowed():
            try:
                connection, _ = sock.accept()
            except BlockingIOError:
                self._budget += 1
                return
            except OSError:
                continue
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
            connection.close()

    def _allowed(self) -> bool:
        """Whether one more may be answered now; if not, the responder's sockets are left alone for a while."""
        if self._budget >= 1:
            self._budget -= 1
            return True
        self._counts["limited"] += 1
        self._listening = False
        for sock in self._responders:
            self._poll.unregister(sock.fileno())
        return False

    def _breathe(self) -> None:
        now = time.monotonic()
        self._budget = min(self._budget + (now - self._filled) * ANSWERS_PER_SECOND, float(ANSWERS_PER_SECOND))
        self._filled = now
        if not self._listening and self._budget >= ANSWERS_PER_SECOND / 2:
            self._listen_again()

    def _listen_again(self) -> None:
        if not self._listening:
            self._listening = True
            for sock in self._responders:
                self._poll.register(sock.fileno(), select.POLLIN)


_AT_ONCE = 64
"""Messages read in a row from one socket, so that whoever floods it keeps nobody else waiting."""


def _packed(text: str) -> bytes:
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    return socket.inet_pton(family, text.partition("%")[0])


def _open(family: int, kind: int, protocol: int, *, whole: bool = True) -> socket.socket:
    """A socket that does not block, with a small buffer; with `whole` nothing it sends is fragmented here or later."""
    address_family = socket.AF_INET if family == 4 else socket.AF_INET6
    sock = socket.socket(address_family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
    try:
        if whole:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            option = (socket.IPPROTO_IP, _IP_MTU_DISCOVER) if family == 4 else (socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER)
            sock.setsockopt(*option, _PMTUDISC_PROBE)
    except OSError:
        sock.close()
        raise
    return sock


def _recverr(family: int) -> tuple[int, int]:
    return (socket.IPPROTO_IP, _IP_RECVERR) if family == 4 else (socket.IPPROTO_IPV6, _IPV6_RECVERR)


def _refused_by(note: bytes) -> bytes | None:
    """Who says, by ICMP, that nobody listens or nobody may (destination unreachable); None for anything else."""
    if len(note) < _ERROR.size + 8:
        return None
    _, origin, kind, code, _, _, _ = _ERROR.unpack_from(note)
    at = _ERROR.size
    if origin == _ORIGIN_ICMP and kind == 3 and code != 4:
        return note[at + 4 : at + 8]
    if origin == _ORIGIN_ICMP6 and kind == 1 and len(note) >= at + 24:
        return note[at + 8 : at + 24]
    return None


# --- packets -----------------------------------------------------------------------------------------------------


def _echo_request(family: int, ident: int, token: int, size: int) -> bytes:
    """An ICMP echo request (RFC 792, RFC 4443) with `size` bytes after its header, the token first."""
    body = struct.pack("!HHQ", ident, 1, token).ljust(size + 4, b"\0")
    if family == 16:
        return bytes((128, 0, 0, 0)) + body  # Raw ICMPv6 sockets sum up by themselves (RFC 3542 section 3.1).
    return b"\x08\0" + struct.pack("!H", _checksum(bytes((8, 0, 0, 0)) + body)) + body


def _finished(source: bytes, target: bytes, sport: int, dport: int, datagram: bytes) -> bytes:
    """A UDP packet with its checksum: what comes out of a raw socket has no device finish it."""
    length = 8 + len(datagram)
    header = struct.pack("!HHHH", sport, dport, length, 0)
    pseudo = source + target + struct.pack("!IHBB", length, 0, 0, socket.IPPROTO_UDP)
    return header[:6] + struct.pack("!H", _checksum(pseudo + header + datagram) or 0xFFFF) + datagram


def _checksum(message: bytes) -> int:
    """RFC 1071."""
    padded = message + bytes(len(message) % 2)
    # A sum of 16-bit words is one of larger words, folded.
    total = int.from_bytes(padded, "big") % 0xFFFF or (0xFFFF if any(padded) else 0)
    return ~total & 0xFFFF


def _echo_filter(family: int, ident: int) -> bytes:
    """Echo replies with our identifier. Over IPv4 a raw socket is handed the IP header too."""
    start, reply = (20, 0) if family == 4 else (0, 129)
    return bpf.program(
        ("", bpf.LD_BYTE, start, "", ""),
        ("", bpf.JEQ, reply, "", "drop"),
        ("", bpf.LD_HALF, start + 4, "", ""),
        ("", bpf.JEQ, ident, "take", "drop"),
        bpf.TAKE,
        bpf.DROP,
    )


def _datagram_filter(kind: int) -> bytes:
    """Datagrams of ours of one kind. A UDP socket's filter sees the UDP header."""
    return bpf.program(
        ("", bpf.LD_WORD, 8, "", ""),
        ("", bpf.JEQ, int.from_bytes(probe.MAGIC, "big"), "", "drop"),
        ("", bpf.LD_BYTE, 8 + 5, "", ""),
        ("", bpf.JEQ, kind, "take", "drop"),
        bpf.TAKE,
        bpf.DROP,
    )


# --- what the kernel counts, and what passes on the wire ---------------------------------------------------------


def spoiled_checksums(directory: Path = Path("/proc/thread-self/net")) -> int:
    """How many packets with wrong checksums this network namespace's UDP, TCP and ICMP have received so far."""
    total = 0
    with suppress(OSError, ValueError):
        lines = [line.split() for line in (directory / "snmp").read_text(encoding="ascii").splitlines()]
        for names, numbers in zip(lines[::2], lines[1::2], strict=True):
            total += sum(int(n) for name, n in zip(names, numbers, strict=True) if name == "InCsumErrors")
    with suppress(OSError, ValueError):
        for line in (directory / "snmp6").read_text(encoding="ascii").splitlines():
            name, number = line.split()
            total += int(number) if name == "Udp6InCsumErrors" else 0
    return total


class Watch:
    """Sees which of some underlay addresses tunnel packets (UDP to `port`) come from, and go to, on an interface.

    Two packet sockets, which the kernel filters: a tunnel may carry millions of packets. OSError.
    """

    def __init__(self, device: str, port: int, addresses: Sequence[bytes]) -> None:
        self._sockets: list[socket.socket] = []
        try:
            for outgoing in (False, True):
                # From the IP header on, whatever link it is.
                kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
                sock = socket.socket(socket.AF_PACKET, kind, 0)
                self._sockets.append(sock)
                sockets.enlarge(sock, _WATCHED)
                sockets.attach(sock, _tunnel_filter(port, addresses, outgoing=outgoing))
                sock.bind((device, _ETH_P_ALL))
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Stop."""
        for sock in self._sockets:
            sock.close()

    def seen(self) -> tuple[set[bytes], set[bytes] | None]:
        """The addresses that packets came from so far, and those that they went to; None if not all were kept."""
        found: tuple[set[bytes], set[bytes]] = set(), set()
        for sock, addresses, outgoing in zip(self._sockets, found, (False, True), strict=True):
            with suppress(OSError):
                for _ in range(_AT_ONCE * _AT_ONCE):
                    packet, sender = sock.recvfrom(_SNIPPET)
                    # Switches flood; what is another host's has not arrived.
                    if sender[2] == (_PACKET_OUTGOING if outgoing else _PACKET_HOST):
                        size, at = (4, 12) if packet[0] >> 4 == 4 else (16, 8)
                        at += size if outgoing else 0
                        addresses.add(packet[at : at + size])
        _, lost = _STATISTICS.unpack(self._sockets[1].getsockopt(_SOL_PACKET, _PACKET_STATISTICS, _STATISTICS.size))
        return found[0], None if lost else found[1]


def _tunnel_filter(port: int, addresses: Sequence[bytes], *, outgoing: bool) -> bytes:
    """UDP to `port`, from one of the addresses, or to one if `outgoing`. Offsets are from the IP header on."""
    steps: list[bpf.Step] = [
        ("", bpf.LD_BYTE, 0, "", ""),
        ("", bpf.JEQ, 0x45, "ipv4", ""),
        ("", bpf.LD_BYTE, 6, "", ""),
        ("", bpf.JEQ, socket.IPPROTO_UDP, "", "drop"),
        ("", bpf.LD_HALF, 42, "", ""),
        ("", bpf.JEQ, port, "", "drop"),
    ]
    start = 24 if outgoing else 8
    for number, address in enumerate(address for address in addresses if len(address) == 16):
        for word in range(0, 16, 4):
            last = word == 12
            label = f"v6-{number}" if not word else ""
            steps.append((label, bpf.LD_WORD, start + word, "", ""))
            operand = int.from_bytes(address[word : word + 4], "big")
            steps.append(("", bpf.JEQ, operand, "take" if last else "", f"v6-{number + 1}"))
    steps += [(f"v6-{sum(len(address) == 16 for address in addresses)}", bpf.RET, 0, "", "")]
    steps += [
        ("ipv4", bpf.LD_BYTE, 9, "", ""),
        ("", bpf.JEQ, socket.IPPROTO_UDP, "", "drop"),
        ("", bpf.LD_HALF, 22, "", ""),
        ("", bpf.JEQ, port, "", "drop"),
        ("", bpf.LD_WORD, 16 if outgoing else 12, "", ""),
        *(("", bpf.JEQ, int.from_bytes(each, "big"), "take", "") for each in addresses if len(each) == 4),
    ]
    return bpf.program(*steps, bpf.DROP, bpf.TAKE)

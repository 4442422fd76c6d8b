"""`trace --send`: one marked packet, put on its way as if its sender had sent it, and watched.

What a pod sends comes in by its bridge: so the packet is put on a port of the bridge that is made for it, a TAP device,
which the kernel removes with the process that holds it. What the host sends itself goes out of a raw socket. The
packet carries a mark that no other has; it is looked for on each interface that it ought to pass, and so is an answer.
The kernel's own trace of the packet filters (nftables' `nftrace`) says which rule refuses it: that takes a rule that
marks the packet, in a table of its own, which is removed before this ends. A table that a killed process has left is
removed by the next one. Tables of iptables-legacy are not traced by the kernel.
"""

import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from overlay import netlink, rtnl
from overlay.dissect import dissect
from overlay.roster import Roster
from overlay.tap import Tap
from overlay.trace import Link, Packet, folded
from subnet_lease.model import format_address

SECONDS = 2.0
"""How long an answer may take."""

DISCARD = 9
"""The UDP port that answers nothing, unless nobody listens: then its host says so (RFC 863, RFC 1122)."""

TABLE = "overlay_agent_trace"
"""The table of the rule that marks the packet."""

DEVICE = "oatrace%d"

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_SIOCSIFFLAGS, _SIOCSIFHWADDR, _SIOCGIFHWADDR, _SIOCBRADDIF, _UP, _ETHER = 0x8914, 0x8924, 0x8927, 0x89A2, 0x1, 1
_FORWARDING = "3"  # BR_STATE_FORWARDING in linux/if_bridge.h
_NETLINK_NETFILTER, _SOL_NETLINK, _ADD_MEMBERSHIP, _TRACE_GROUP = 12, 270, 1, 9
_TRACE = 10 << 8 | 17  # NFNL_SUBSYS_NFTABLES, NFT_MSG_TRACE
_T_TABLE, _T_CHAIN, _T_HANDLE, _T_TYPE, _T_VERDICT, _T_POLICY = 1, 2, 3, 4, 5, 16
_POLICY, _RULE, _DROP = 1, 3, 0
_FAMILIES = {1: "inet", 2: "ip", 10: "ip6"}
_GENMSG = 4


class SendFailed(Exception):
    """The packet cannot be sent; the text says why and how to mend it."""


class Refused(NamedTuple):
    """A rule, or the policy of a chain, that has dropped the packet; `handle` is 0 for a policy."""

    family: str
    table: str
    chain: str
    handle: int


@dataclass(slots=True)
class Sent:
    """What became of the packet: where it was `seen`, in order, and where the answer was; what refused it."""

    seen: list[str] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    answer: str = ""
    refused: Refused | None = None
    refusing: str = ""
    expected: tuple[str, ...] = ()
    lost: int = 0
    """Frames that passed and could not be looked at."""

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "seen": self.seen,
            "arrived": not self.refused and not self.missing,
            "missing": self.missing,
            "answer": self.answer or None,
            "answer_seen": self.answered,
            "lost": self.lost,
            "refused": None if self.refused is None else {**self.refused._asdict(), "rule": self.refusing},
        }

    @property
    def missing(self) -> str:
        """The first interface that it did not come to, empty if it came to all."""
        return next((name for name in self.expected if name not in self.seen), "")

    def lines(self, width: int) -> Iterator[str]:
        """For people, in so many columns."""
        yield folded("  sent   ", f"seen on {', '.join(self.seen) or 'no interface'}", width)
        if self.refused is not None:
            family, table, chain, _ = self.refused
            what = f"dropped by chain {chain} of the table {family} {table}: {self.refusing}"
            yield folded("  WRONG  ", what, width)
            yield f"{'':<9}shown by  nft -a list chain {family} {table} {chain}"
        elif self.missing:
            yield f"  WRONG  it did not come to {self.missing}"
        if self.lost:
            what = f"{self.lost} packets passed too fast to be looked at, perhaps this among them: try again"
            yield folded("  note   ", what, width)
        if self.answer:
            yield folded("  answer ", f"{self.answer}, seen on {', '.join(self.answered)}", width)
        elif not self.refused and not self.missing:
            what = f"it has left this host, and no answer came within {SECONDS:g} s: run trace on the other one"
            yield folded("  note   ", what, width)


def send(
    packet: Packet,
    *,
    entrance: Link | None,
    path: Sequence[str],
    roster: Roster,
    load: Callable[[str], None],
    rule_text: Callable[[str, str, str, int], str],
    stop: Callable[[], bool],
) -> Sent:
    """Send it and watch. `entrance` is the bridge that a pod's packet comes in by, None for the host's own; `path` the
    interfaces it ought to pass, the first outwards; `load` applies an nftables ruleset. SendFailed.
    """
    mark = b"overlay-agent trace " + os.urandom(8).hex().encode()
    number = int.from_bytes(os.urandom(2), "big") | 1
    body = _ip_packet(packet, mark, number)
    sent = Sent(expected=tuple(path))
    try:
        with ExitStack() as stack:
            put = _pods_outlet(entrance, body, stack) if entrance is not None else _own_outlet(packet, body, stack)
            taps = [stack.enter_context(Tap(name)) for name in dict.fromkeys(path)]
            monitor = _traced(packet, number, load, stack)
            put()
            _watch(sent, taps, monitor, packet, mark, roster, stop)
            sent.lost = sum(tap.lost for tap in taps)
    except PermissionError:
        raise SendFailed("to send takes CAP_NET_ADMIN and CAP_NET_RAW, which this process lacks; use sudo") from None
    except OSError as error:
        raise SendFailed(f"the packet cannot be sent: {os.strerror(error.errno or errno.EIO).lower()}") from None
    if sent.refused is not None:
        handle = sent.refused.handle
        sent.refusing = (rule_text(*sent.refused) if handle else "") or ("a rule" if handle else "policy drop")
    return sent


def _watch(
    sent: Sent,
    taps: Sequence[Tap],
    monitor: socket.socket,
    packet: Packet,
    mark: bytes,
    roster: Roster,
    stop: Callable[[], bool],
) -> None:
    """Until the answer has come to where the packet began, or something refuses it, or the time is over."""
    watched: list[socket.socket | Tap] = [monitor, *taps]
    deadline = time.monotonic() + SECONDS
    while (left := deadline - time.monotonic()) > 0 and not stop():
        ready = select.select(watched, [], [], min(left, 0.2))[0]
        for tap in taps:
            for frame in tap.read() if tap in ready else ():
                if mark in frame.data:
                    _note(sent, tap.device, dissect(frame.data, roster).inner, packet)
        if monitor in ready:
            for buffer in netlink.queued(monitor):
                sent.refused = sent.refused or _refusal(buffer or b"")
        # An answer may come by another way than the packet went, and then not to all.
        ended = sent.refused is not None or bool(sent.answered)
        if len(sent.answered) == len(taps) or (ended and not ready):
            return


def _note(sent: Sent, device: str, header: Any, packet: Packet) -> None:
    if header is None:
        return
    # One of its addresses may have been translated on the way.
    places = sent.seen if header.src == packet.src or header.dst == packet.dst else sent.answered
    if device not in places:
        places.append(device)
    if places is sent.answered and not sent.answer:
        sent.answer = f"{header.what} from {format_address(header.src)}"


# --- the packet --------------------------------------------------------------------------------------------------


def _ip_packet(packet: Packet, mark: bytes, number: int) -> bytes:
    """The whole IP packet, of the size wanted or as small as the mark allows."""
    from scapy.layers.inet import ICMP, IP, UDP
    from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6

    head: Any
    echo: Any
    src, dst = format_address(packet.src), format_address(packet.dst)
    least = (20 if packet.version == 4 else 40) + 8
    data = mark.ljust(packet.size - least, b".")
    if packet.version == 4:
        head = IP(src=src, dst=dst, id=number, flags="DF" if packet.df else 0)
        echo = ICMP(id=number, seq=1)
    else:
        head = IPv6(src=src, dst=dst)
        echo = ICMPv6EchoRequest(id=number, seq=1)
    inside = echo if packet.protocol == "icmp" else UDP(sport=number, dport=packet.port)
    return bytes(head / inside / data)


def _own_outlet(packet: Packet, body: bytes, stack: ExitStack) -> Callable[[], None]:
    family = socket.AF_INET if packet.version == 4 else socket.AF_INET6
    outlet = stack.enter_context(socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW))
    # Routes and rules may go by the source, and of a packet's header the kernel does not look at it.
    outlet.bind((format_address(packet.src), 0))

    def put() -> None:
        # What a filter drops on the way out is told as EPERM; the trace says by what.
        with contextlib.suppress(PermissionError):
            outlet.sendto(body, (format_address(packet.dst), 0))

    return put


def _pods_outlet(bridge: Link, body: bytes, stack: ExitStack) -> Callable[[], None]:
    if bridge.kind != "bridge":
        raise SendFailed(
            f"{bridge.name} is no bridge, so nothing can be sent as if by the pod; trace from an address of this host"
        )
    mac = bytes((0x02, *os.urandom(5)))
    try:
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise SendFailed(f"/dev/net/tun cannot be opened: {os.strerror(error.errno or 0).lower()}") from None
    stack.callback(os.close, tap)
    made = fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TAP | _IFF_NO_PI))
    name = made[:16].rstrip(b"\0").decode()
    _without_ipv6(name)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        index = socket.if_nametoindex(name)
        # A bridge takes the least MAC of its ports for its own, unless it was given one: its pods' gateway would be at
        # another all of a sudden.
        highest = struct.pack("16sH6s16x", name.encode(), _ETHER, b"\xfe\xff\xff\xff" + os.urandom(2))
        fcntl.ioctl(control, _SIOCSIFHWADDR, highest)
        fcntl.ioctl(control, _SIOCBRADDIF, struct.pack("16si20x", bridge.name.encode(), index))
        gateway = fcntl.ioctl(control, _SIOCGIFHWADDR, struct.pack("16s24x", bridge.name.encode()))[18:24]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), _UP))
    state = Path("/sys/class/net", name, "brport/state")
    deadline = time.monotonic() + SECONDS
    while _state(state) not in (_FORWARDING, ""):
        if time.monotonic() > deadline:
            raise SendFailed(f"{bridge.name} does not forward what a new port sends within {SECONDS:g} s")
        time.sleep(0.01)
    kind = (0x0800 if len(body) and body[0] >> 4 == 4 else 0x86DD).to_bytes(2, "big")
    frame = gateway + mac + kind + body

    def put() -> None:
        os.write(tap, frame)

    return put


def _state(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""  # This is not the /sys of our network namespace.


def _without_ipv6(name: str) -> None:
    """Nothing of its own is to leave by the device: no solicitation, no report."""
    with contextlib.suppress(OSError):
        Path("/proc/sys/net/ipv6/conf", name, "disable_ipv6").write_text("1")


# --- the kernel's trace ------------------------------------------------------------------------------------------


def trace_ruleset(packet: Packet, number: int) -> str:
    """The table whose rules have the kernel trace this packet, at its entrance and at its exit."""
    family = "ip" if packet.version == 4 else "ip6"
    kind = {"icmp": "icmp id" if packet.version == 4 else "icmpv6 id"}.get(packet.protocol, "udp sport")
    ends = f"{family} saddr {format_address(packet.src)} {family} daddr {format_address(packet.dst)}"
    rule = f"{ends} {kind} {number} meta nftrace set 1"
    # Before connection tracking and whatever else.
    chains = [
        f"  chain {hook} {{ type filter hook {hook} priority -450; policy accept; {rule}; }}"
        for hook in ("prerouting", "output")
    ]
    return "\n".join([_removal(), f"table inet {TABLE} {{", *chains, "}", ""])


def _removal() -> str:
    return f"table inet {TABLE}\ndelete table inet {TABLE}\n"


def _traced(packet: Packet, number: int, load: Callable[[str], None], stack: ExitStack) -> socket.socket:
    """The socket to which the kernel tells what its filters do with the packet."""
    monitor = stack.enter_context(netlink.open_socket(_NETLINK_NETFILTER, 1 << 20))
    monitor.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _TRACE_GROUP)
    monitor.setblocking(False)
    # First of all what takes it away, so that nothing can come between.
    stack.callback(load, _removal())
    load(trace_ruleset(packet, number))
    return monitor


def _refusal(buffer: bytes) -> Refused | None:
    for message in rtnl.messages(buffer):
        if message.kind != _TRACE:
            continue
        family = buffer[message.body]
        found = rtnl.attributes(buffer[message.body + _GENMSG : message.end])
        kind = int.from_bytes(found.get(_T_TYPE, b""), "big")
        if kind == _POLICY:
            verdict = found.get(_T_POLICY)
        elif kind == _RULE:
            verdict = rtnl.attributes(found.get(_T_VERDICT, b"")).get(1)
        else:
            continue
        if verdict is not None and int.from_bytes(verdict, "big") == _DROP:
            table, chain = (found.get(each, b"").rstrip(b"\0").decode() for each in (_T_TABLE, _T_CHAIN))
            handle = int.from_bytes(found.get(_T_HANDLE, b""), "big") if kind == _RULE else 0
            return Refused(_FAMILIES.get(family, str(family)), table, chain, handle)
    return None

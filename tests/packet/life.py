"""The life of a peer, as the wire tells it: numbered packets flow towards its pods while it comes, moves and goes.

Every packet carries its number, and every port of the underlay is watched, so each is accounted for: it left its host
in the clear, in a tunnel and to whom, several times, or never; and what left reached the port it was for, or others.
A story is told by the ways the packets took, one after the other: see `check_ways`, by which all are judged.

Frames are taken apart here by hand, for there are many of them; what `scapy` makes of them is for `wire` and people.
"""

import contextlib
import itertools
import os
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from overlay import rtnl
from overlay.cluster import Lab
from overlay.cluster_hosts import Host, Pod, wait_until
from overlay.model import Fdb, Gone, Sight
from overlay.topology import network_config
from subnet_lease.model import LeaseAttrs, Prefix, Vtep, encode_attrs, format_mac, pack_address, subnet_key
from tests.faults.etcd_process import freeze
from tests.packet.wire import Link, Wire, mac_of

SECONDS = 10.0
"""How long a story may take to go on."""

DENSE_MS = 0.02
"""Between packets that are to catch what lasts no longer: as often as can be while others read them."""

VXLAN_PORT = 8472

DEVICES = {4: "flannel.1", 6: "flannel-v6.1"}
"""By family of the underlay."""

_MARK = b"one of many: "
_NUMBERED = struct.Struct("!IQ")  # flow, number
_flows = itertools.count(os.getpid() << 8 & 0xFFFFFF00)

_ETHERNET, _UDP, _VXLAN = 14, 8, 8
_IPV4, _IPV6 = b"\x08\x00", b"\x86\xdd"
_DISCARD = 9

# RTNLGRP_NEIGH, _IPV4_ROUTE and _IPV6_ROUTE, as the bits of a netlink address (linux/rtnetlink.h).
_GROUPS = 1 << 2 | 1 << 6 | 1 << 10
_SO_RCVBUFFORCE = 33


# --- ways ------------------------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """How a packet left its host: in a tunnel from `source` to `remote`, both on the underlay, under `vni`, for the
    VTEP with this `mac`."""

    source: str
    remote: str
    vni: int
    mac: str

    def __str__(self) -> str:
        return f"in a tunnel to {self.remote}, VNI {self.vni}, {self.mac}" if self.remote else "in the clear"


CLEAR = Way("", "", 0, "")
"""For all on the underlay to read."""


class Passage(NamedTuple):
    """A numbered packet passed a link."""

    flow: int
    number: int
    time_ns: int
    way: Way


def _passage(time_ns: int, data: bytes) -> Passage | None:
    """None for frames that are none of ours, or quote one, as errors of ICMP do."""
    if _MARK not in data or (found := _datagram(data, 0)) is None:
        return None
    source, remote, port, at = found
    way = CLEAR
    if port == VXLAN_PORT:
        way = Way(source, remote, int.from_bytes(data[at + 4 : at + 7], "big"), data[at + 8 : at + 14].hex(":"))
        if (found := _datagram(data, at + _VXLAN)) is None:
            return None
        at = found[3]
    if not data.startswith(_MARK, at):
        return None
    return Passage(*_NUMBERED.unpack_from(data, at + len(_MARK)), time_ns, way)


def _datagram(data: bytes, at: int) -> tuple[str, str, int, int] | None:
    """(source, destination, port, where the payload begins) of the frame that begins `at`; None if it is not UDP."""
    kind, at = data[at + 12 : at + 14], at + _ETHERNET
    if kind == _IPV4 and data[at + 9] == socket.IPPROTO_UDP:
        source, destination = (socket.inet_ntop(socket.AF_INET, data[at + n : at + n + 4]) for n in (12, 16))
        at += (data[at] & 0x0F) * 4
    elif kind == _IPV6 and data[at + 6] == socket.IPPROTO_UDP:
        source, destination = (socket.inet_ntop(socket.AF_INET6, data[at + n : at + n + 16]) for n in (8, 24))
        at += 40
    else:
        return None
    return source, destination, int.from_bytes(data[at + 2 : at + 4], "big"), at + _UDP


# --- flows -----------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What became of the packets of one flow, by their numbers; `name` and address `family` are the flow's."""

    name: str
    family: int
    holders: Mapping[str, str]
    """Which place of the underlay an address is at. The default route, of no remote, ends at the hub."""
    sent: int = 0
    left: list[Passage] = field(default_factory=list)
    """What has left the host, in the order of its leaving."""
    reached: dict[str, set[int]] = field(default_factory=dict)
    """By place: what was handed to it there, whoever it was for."""

    @property
    def lost(self) -> list[int]:
        """What was sent and never left the host."""
        return sorted(set(range(self.sent)) - {passage.number for passage in self.left})


class Flow:
    """A numbered packet every `interval_ms` from the pod to the address, inside the block; 0: one after the other."""

    def __init__(self, pod: Pod, address: str, interval_ms: float, holders: Mapping[str, str]) -> None:
        family = 6 if ":" in address else 4
        self.id = next(_flows)
        self.record = Record(f"{pod.name} -> {address}", family, holders)
        self._address, self._interval = (address, _DISCARD), interval_ms / 1000
        domain = socket.AF_INET6 if family == 6 else socket.AF_INET
        self._socket = pod.made(lambda: socket.socket(domain, socket.SOCK_DGRAM))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.close()

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()

    def _send(self) -> None:
        while not self._stop.wait(self._interval):
            self.send()

    def send(self) -> None:
        """Send the next packet."""
        self._socket.sendto(_MARK + _NUMBERED.pack(self.id, self.record.sent), self._address)
        self.record.sent += 1


class Story:
    """Flows from one pod, and all that becomes of them, on every port of the underlay.

    As a context manager it begins when some packets of each flow were sent, and ends with a fence: what has not been
    seen by then will not be.
    """

    def __init__(self, wire: Wire, pod: Pod, addresses: Iterable[str], interval_ms: float = 1) -> None:
        self._lab, self._pod = pod.lab, pod
        self._hub = self._lab.topology.links[0]
        self._out = wire.underlay(pod.host)
        self._others: dict[str, Link] = {
            host.name: wire.underlay(host) for host in self._lab.hosts if host is not pod.host
        }
        self._others["hub"] = wire.at(self._lab.hub, self._hub.bridge)
        self._holders = {CLEAR.remote: "hub"}
        self._note_holders()
        self._flows = [Flow(pod, address, interval_ms, self._holders) for address in addresses]
        self.records = [flow.record for flow in self._flows]
        self._by_id = {flow.id: flow.record for flow in self._flows}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for flow in self._flows:
                stack.enter_context(flow)
            self.go_on(5)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stack.close()
        if kind is not None:
            return
        # On the way of all the others, and not to be lost: the hub itself is on the link.
        fence = Flow(self._pod, str(self._hub.hub[min(self._lab.topology.families)].ip), 0, self._holders)
        self._by_id[fence.id] = fence.record
        fence.send()
        fence.close()
        self._until(lambda: bool(fence.record.left), lambda: "the fence was not seen")
        self._look()
        self._note_holders()

    def _note_holders(self) -> None:
        """Hosts that move have had several addresses."""
        self._holders |= {address: host.name for host in self._lab.hosts for address in host.underlay_ips.values()}

    def go_on(self, packets: int = 50) -> None:
        """Until each flow has sent so many more."""
        for number, record in [(record.sent + packets, record) for record in self.records]:
            what = f"{packets} packets {record.name}"
            wait_until(lambda number=number, record=record: record.sent >= number, SECONDS, what, 0.001)

    def until(self, ways: Mapping[int, Way]) -> None:
        """Until packets of every flow leave by this way, by their family. AssertionError if they do not."""
        for record in self.records:
            self.until_one(record, ways)

    def until_one(self, record: Record, ways: Mapping[int, Way]) -> None:
        """As `until`, for one flow."""
        way = ways[record.family]

        def what() -> str:
            last = f"the last left {record.left[-1].way}" if record.left else "nor any other way"
            return f"{record.name}: none left {way}, {last}"

        self._until(lambda: bool(record.left) and record.left[-1].way == way, what)

    def _until(self, condition: Callable[[], bool], what: Callable[[], str]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"{what()}, within {SECONDS:g} s"
            # The links are never quiet: there is nothing else to wait for than more packets.
            time.sleep(0.001)
            self._look()

    def _look(self) -> None:
        """Take in what has passed since the last time."""
        for passage in self._passages(self._out, outgoing=False):
            self._by_id[passage.flow].left.append(passage)
        for name, link in self._others.items():
            # What the hub's bridge hands to the hub comes in there; what it hands to a host goes out by a port.
            for passage in self._passages(link, outgoing=name != "hub"):
                self._by_id[passage.flow].reached.setdefault(name, set()).add(passage.number)

    def _passages(self, link: Link, *, outgoing: bool) -> Iterator[Passage]:
        for seen in link.read():
            if seen.outgoing == outgoing and (found := _passage(seen.time_ns, seen.data)) and found.flow in self._by_id:
                yield found


# --- checks ----------------------------------------------------------------------------------------------------------


def check_ways(record: Record, *ways: Way, lossless: bool = True, settled: bool = True) -> None:
    """The packets left by these ways, one after the other, and none by an earlier one again; each of them once, and, if
    it is to be `lossless`, every one; what left reached the host it was for, and no other, if hosts were `settled`: one
    that has moved passes on what comes for its old address."""
    name = record.name
    for number, times in Counter(passage.number for passage in record.left).items():
        assert times == 1, f"{name}: packet {number} was flooded, it left {times} times"
    before: Passage | None = None
    for passage in record.left:
        assert passage.way in ways, f"{name}: packet {passage.number} left {passage.way}, a wrong way"
        if before is not None:
            back = ways.index(passage.way) < ways.index(before.way)
            assert not back, (
                f"{name}: packet {passage.number} left {passage.way} after packet {before.number} had left {before.way}"
            )
        before = passage
    for way in ways:
        assert any(passage.way == way for passage in record.left), f"{name}: no packet left {way}"
    lost = record.lost
    assert not (lossless and lost), f"{name}: {len(lost)} packets were lost in the host, from {lost[0]} to {lost[-1]}"
    for passage in record.left if settled else ():
        reached = {place for place, numbers in record.reached.items() if passage.number in numbers}
        wanted = {record.holders[passage.way.remote]}
        assert reached == wanted, f"{name}: packet {passage.number}, {passage.way}, reached {reached}, not {wanted}"


def check_none_after(record: Record, way: Way, time_ns: int) -> None:
    """None left by this way after this time, by the kernel's clock; and some did leave then."""
    after = [passage for passage in record.left if passage.time_ns > time_ns]
    assert after, f"{record.name}: nothing left any more"
    for passage in after:
        late = (passage.time_ns - time_ns) / 1e6
        assert passage.way != way, f"{record.name}: packet {passage.number} left {way}, {late:.1f} ms after its end"


# --- peers -----------------------------------------------------------------------------------------------------------

CONFIG = {
    **network_config("46"),
    "Network": "10.240.0.0/12",
    "SubnetMax": "10.240.99.0",
    "IPv6SubnetMax": "fd00:244:0:fff::",
}
"""Hosts choose at random; what lies above is for the peers of these tests: see `subnets`."""


def subnets(number: int) -> tuple[Prefix, Prefix]:
    """Of IPv4 and of IPv6; some thousand that no host chooses."""
    return (
        Prefix(bytes((10, 241 + number // 256, number % 256, 0)), 24),
        Prefix.parse(f"fd00:244:0:{0x1000 + number:x}::/64"),
    )


def pods_of(number: int) -> list[str]:
    """The addresses of a pod there, by IPv4 and by IPv6."""
    return [f"10.{241 + number // 256}.{number % 256}.2", f"fd00:244:0:{0x1000 + number:x}::2"]


class End(NamedTuple):
    """The end of a tunnel at a host without an agent. Each `number` has MACs of its own."""

    ips: Mapping[int, str]
    number: int

    def mac(self, family: int) -> bytes:
        """Of the VTEP on this family's underlay."""
        return bytes((2, 0xE0, family)) + self.number.to_bytes(3, "big")

    def attrs(self, mtu: int = 0) -> LeaseAttrs:
        """What its host would say of itself."""
        four, six = (Vtep(1, self.mac(family)) for family in (4, 6))
        return LeaseAttrs(pack_address(self.ips[4]), "vxlan", four, pack_address(self.ips[6]), six, mtu)


CLEARLY = {4: CLEAR, 6: CLEAR}
"""By family, as `Peers.ways`."""


class Peers:
    """The peers that a lab's first host, the `sender`, has; `ends` are hosts that have no agent and answer nothing."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.sender = lab.hosts[0]
        self.pod = self.sender.pods[0]
        self.ends = [lab.add_host() for _ in range(2)]
        self._etcd_lease = lab.store.grant(3600)
        self._revisions: dict[int, int] = {}
        self._numbers = itertools.count()
        self._ends = itertools.count(1)
        for host in lab.hosts[1:]:
            for address in host.underlay_ips.values():
                # What waits for a neighbour's answer would leave late; and the switch learns where everybody is.
                assert self.sender.run("ping", "-n", "-c", "1", "-W", "5", address).returncode == 0

    def end(self, host: int = 0) -> End:
        """A tunnel's end at one of the two hosts, with MACs that nothing had before."""
        return End(self.ends[host].underlay_ips, next(self._ends))

    def crowd(self, count: int) -> list[End]:
        """Tunnels' ends at hosts that are not there."""
        numbers = itertools.islice(self._ends, count)
        return [End({4: f"172.30.{100 + n // 256}.{n % 256}", 6: f"fd30::c:{n:x}"}, n) for n in numbers]

    def numbers(self, count: int) -> list[int]:
        """Of subnets that nobody had before."""
        return list(itertools.islice(self._numbers, count))

    def put(self, number: int, end: End, mtu: int = 0) -> None:
        """Write the lease of these subnets, a new one or another value of it."""
        key, value = self._key(number), encode_attrs(end.attrs(mtu))
        if revision := self._revisions.get(number):
            self._revisions[number] = self.lab.store.replace(key, value, self._etcd_lease, revision)
        else:
            self._revisions[number] = self.lab.store.create(key, value, self._etcd_lease)
        assert self._revisions[number]

    def drop(self, number: int) -> None:
        """Delete the lease."""
        assert self.lab.store.delete(self._key(number), self._revisions.pop(number))

    def drop_all(self) -> None:
        """Delete all leases that were put here."""
        for number in list(self._revisions):
            self.drop(number)

    def ways(self, end: End) -> dict[int, Way]:
        """How packets of the sender's pods travel there, by their family."""
        return {
            family: Way(self.sender.underlay_ips[family], end.ips[family], 1, format_mac(end.mac(family)))
            for family in (4, 6)
        }

    def ways_to(self, host: Host, vni: int = 1) -> dict[int, Way]:
        """As `ways`, to a host with an agent, as its devices are now."""
        devices = {4: f"flannel.{vni}", 6: f"flannel-v6.{vni}"}
        return {
            family: Way(self.sender.underlay_ips[family], host.underlay_ips[family], vni, mac_of(host, device))
            for family, device in devices.items()
        }

    @staticmethod
    def _key(number: int) -> str:
        return subnet_key(*subnets(number))

    def leased(self) -> Iterator[str]:
        """The subnets of all leases that were put here."""
        return (str(subnet) for number in self._revisions for subnet in subnets(number))

    def routes(self) -> set[str]:
        """Those that the sender's kernel has routes to, but for the second host's, which has an agent."""
        found = (self.sender.json("ip", f"-{family}", "route", "show", "proto", "111") for family in (4, 6))
        return {route["dst"] for routes in found for route in routes} - {*self.lab.hosts[1].subnets.values()}

    def wait_routed(self, number: int) -> None:
        """Until the sender's kernel has both routes."""
        wait_until(
            lambda: self.routes().issuperset(map(str, subnets(number))), SECONDS, f"routes to {self._key(number)}"
        )


class Monitor:
    """What the kernel of a host tells everybody of its tables, from the moment this is made."""

    def __init__(self, host: Host) -> None:
        def listen() -> socket.socket:
            made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
            made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 8 << 20)
            made.bind((0, _GROUPS))
            return made

        self._socket = host.made(listen)
        self._socket.settimeout(SECONDS)
        self._tunnels = [link["ifindex"] for link in host.json("ip", "link") if link["ifname"].startswith("flannel")]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def until_unrouted(self, *blocks: Prefix) -> int:
        """Wait until the routes to these subnets are deleted; when that was known, in nanoseconds since the epoch."""
        missing = {*blocks}
        while missing:
            missing -= {sight.entry[0] for sight in self._heard() if isinstance(sight, Gone)}
        return time.time_ns()

    def until_peers_change(self) -> None:
        """Wait until an FDB entry is put, which is how peers begin."""
        while not any(isinstance(sight, Fdb) for sight in self._heard()):
            pass

    def _heard(self) -> list[Sight]:
        buffer = self._socket.recv(1 << 16)
        found = (rtnl.sight(buffer, message, self._tunnels) for message in rtnl.messages(buffer))
        return [sight for sight in found if sight is not None]


# --- stories ---------------------------------------------------------------------------------------------------------


def check_join(wire: Wire, peers: Peers) -> None:
    """A subnet gets a holder: from one packet to the next all are tunnelled, the first one right, and none is lost."""
    (number,) = peers.numbers(1)
    end = peers.end()
    with Story(wire, peers.pod, pods_of(number)) as story:
        peers.put(number, end)
        story.until(peers.ways(end))
        story.go_on()
    for record in story.records:
        check_ways(record, CLEAR, peers.ways(end)[record.family])


def check_leave(wire: Wire, peers: Peers) -> None:
    """A subnet loses its holder: once the kernel says that its route is gone nothing goes there, and none is lost."""
    (number,) = peers.numbers(1)
    end = peers.end()
    peers.put(number, end)
    peers.wait_routed(number)
    with Story(wire, peers.pod, pods_of(number)) as story, Monitor(peers.sender) as monitor:
        story.go_on()
        peers.drop(number)
        story.until(CLEARLY)
        done_ns = monitor.until_unrouted(*subnets(number))
        story.go_on()
    for record in story.records:
        way = peers.ways(end)[record.family]
        check_ways(record, way, CLEAR)
        check_none_after(record, way, done_ns)


def check_new_mac(wire: Wire, peers: Peers) -> None:
    """A host gets another MAC: from one packet to the next all are for that, and none is lost before it has left."""
    _check_change(wire, peers, peers.end(), peers.end())


def check_takeover(wire: Wire, peers: Peers) -> None:
    """Another host gets the subnet: from one packet to the next all go there, and none is lost before it has left."""
    _check_change(wire, peers, peers.end(0), peers.end(1))


def check_passes_broken_off(wire: Wire, peers: Peers, crowd: int = 300, times: int = 6) -> None:
    """Among hundreds of changes at once a peer joins, one leaves, one changes hands, and the agent is killed amid them.

    For each packet it is as without all that: only later, by as long as there is no agent. Back and forth, until it was
    caught with part of the entries in place at least once.
    """
    joins, leaves, moves, *rest = peers.numbers(3 + crowd)
    old, new = peers.end(0), peers.end(1)
    caught = 0
    for _ in range(times):
        peers.drop_all()
        for number in (leaves, moves):
            peers.put(number, old)
        wait_until(lambda: peers.routes() == {*peers.leased()}, SECONDS, "the two alone")
        with Story(wire, peers.pod, [*pods_of(joins), *pods_of(leaves), *pods_of(moves)]) as story:
            with Monitor(peers.sender) as monitor:
                assert peers.sender.agent_pid is not None
                freeze(peers.sender.agent_pid)
                peers.put(joins, new)
                peers.drop(leaves)
                peers.put(moves, new)
                for number, end in zip(rest, peers.crowd(crowd), strict=True):
                    peers.put(number, end)
                os.kill(peers.sender.agent_pid, signal.SIGCONT)
                monitor.until_peers_change()
                peers.sender.kill_agent(signal.SIGKILL)
            caught += peers.routes() != {*peers.leased()}
            story.go_on()
            peers.sender.start_agent()
            joined, left, moved = (story.records[at : at + 2] for at in (0, 2, 4))
            for record in (*joined, *moved):
                story.until_one(record, peers.ways(new))
            for record in left:
                story.until_one(record, CLEARLY)
            story.go_on()
        peers.sender.wait_ready()
        for record in joined:
            check_ways(record, CLEAR, peers.ways(new)[record.family])
        for record in left:
            check_ways(record, peers.ways(old)[record.family], CLEAR)
        for record in moved:
            check_ways(record, *(peers.ways(end)[record.family] for end in (old, new)))
        if caught:
            return
    raise AssertionError(f"in {times} attempts no pass was broken off")


def _check_change(wire: Wire, peers: Peers, old: End, new: End) -> None:
    (number,) = peers.numbers(1)
    peers.put(number, old)
    peers.wait_routed(number)
    with Story(wire, peers.pod, pods_of(number)) as story:
        story.go_on()
        peers.put(number, new)
        story.until(peers.ways(new))
        story.go_on()
    for record in story.records:
        check_ways(record, *(peers.ways(end)[record.family] for end in (old, new)))


def check_other_mtu(wire: Wire, peers: Peers) -> None:
    """A peer's MTU gets smaller, with none lost, and then changes time and again: none ever leaves in the clear."""
    (number,) = peers.numbers(1)
    end = peers.end()
    peers.put(number, end)
    peers.wait_routed(number)
    with Story(wire, peers.pod, pods_of(number)) as once:
        peers.put(number, end, 1300)
        once.go_on()
    with Story(wire, peers.pod, pods_of(number), DENSE_MS) as again:
        for mtu in 10 * (0, 1300):
            peers.put(number, end, mtu)
            again.go_on(100)
    for story in once, again:
        for record in story.records:
            # The kernel takes a metric away from a route only with the route itself.
            check_ways(record, peers.ways(end)[record.family], lossless=story is once)


def check_removed_by_hand(wire: Wire, peers: Peers) -> None:
    """Somebody removes a peer's FDB entries: until they are back packets are lost, and none goes to anybody else."""
    number, other = peers.numbers(2)
    end = peers.end()
    peers.put(number, end)
    peers.put(other, peers.end(1))
    for each in (number, other):
        peers.wait_routed(each)
    with Story(wire, peers.pod, pods_of(number), DENSE_MS) as story:
        for _ in range(5):
            for family, device in DEVICES.items():
                removed = peers.sender.run("bridge", "fdb", "del", format_mac(end.mac(family)), "dev", device)
                assert removed.returncode == 0, removed.stderr
            story.go_on(100)
            story.until(peers.ways(end))
    for record in story.records:
        check_ways(record, peers.ways(end)[record.family], lossless=False)

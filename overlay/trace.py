"""`overlay-agent trace`: the way of one packet through this host, step by step, up to the first thing that is wrong.

Pure: the kernel and the filters are asked through values handed in, and only the kernel decides where a packet goes.
What is judged here is whether its answers are those that the leases call for. Where no lease is known, an answer is
reported, and only what can be wrong by itself is called wrong.

Two ways are followed: of what leaves here for an address elsewhere (a pod's packet as it comes in from its link, or
one of the host's own), and of what comes here from an address elsewhere, out of a tunnel or off the link.
"""

import errno
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from overlay.device import MIN_MTU, OVERHEAD, device_name
from overlay.model import PROTOCOL
from overlay.roster import Member, Roster
from overlay.rules import Chain, Flow, outcome
from subnet_lease.model import Prefix, format_address, format_mac

LOCAL, UNICAST = 2, 1
"""RTN_LOCAL and RTN_UNICAST (linux/rtnetlink.h)."""

_REFUSING = {6: "blackhole", 7: "unreachable", 8: "prohibit"}
_PROTOCOLS = {
    2: "kernel",
    3: "boot",
    4: "static",
    9: "ra",
    16: "dhcp",
    186: "bgp",
    188: "ospf",
    PROTOCOL: "overlay-agent",
}
_USUAL_TABLES = (0, 254, 255)
_FAILED = 0x20
"""NUD_FAILED (linux/neighbour.h)."""

_STRICT = 1
_UNBELIEVED = (errno.EXDEV, errno.EINVAL)
"""How the kernel refuses a packet for its source (fib_validate_source): by the latter from 6.14 on."""

_OTHER = {4: 16, 16: 4}

POD, HOST, AWAY = "pod", "host", "elsewhere"
"""Whose an address is: a pod's of this host, this host's own, somebody else's."""

OK, NOTE, WRONG = "ok", "note", "wrong"

AGENT = "the agent puts it right: systemctl status overlay-agent"


class Packet(NamedTuple):
    """What is to be followed. `protocol` is `icmp`, `udp` or `tcp`; `size` is that of the IP packet in bytes."""

    src: bytes
    dst: bytes
    protocol: str = "icmp"
    port: int = 0
    size: int = 84
    df: bool = False

    @property
    def version(self) -> int:
        """Of IP."""
        return 4 if len(self.dst) == 4 else 6


class Step(NamedTuple):
    """One thing that was looked at: `state` is OK, NOTE or WRONG, `command` shows it, `remedy` mends it.

    `cause` is the name of the fault, as `status` and `doctor` have it; empty where nothing is faulty but the question.
    """

    where: str
    state: str
    what: str
    command: str = ""
    remedy: str = ""
    cause: str = ""


# --- what the kernel answers -------------------------------------------------------------------------------------


class Link(NamedTuple):
    """An interface; its index is `number`. `lower`, `vni`, `port` and `local` are those of a VXLAN device."""

    number: int
    name: str
    up: bool
    running: bool
    mtu: int
    kind: str = ""
    mac: bytes = b""
    master: int = 0
    lower: int = 0
    vni: int = 0
    port: int = 0
    local: bytes = b""


class Way(NamedTuple):
    """Where the kernel would send a packet, or the `errno` that it answers with.

    `entry` is the destination of the route that was matched, `table` and `protocol` are that route's; `mtu`
    is the route's own or one learnt, 0 if there is none; `kind` is RTN_*.
    """

    errno: int = 0
    kind: int = UNICAST
    device: int = 0
    gateway: bytes = b""
    mtu: int = 0
    entry: Prefix | None = None
    table: int = 254
    protocol: int = 0

    @property
    def refused(self) -> bool:
        """Whether there is no way."""
        return bool(self.errno) or self.kind not in (UNICAST, LOCAL)


class Hop(NamedTuple):
    """A neighbour entry: the MAC, empty while it is not known, and NUD_* bits."""

    mac: bytes
    state: int


class PolicyRule(NamedTuple):
    """A policy rule that leads to a routing table."""

    priority: int
    table: int


class Entrance(NamedTuple):
    """What holds for packets that come in by `device`: whether they are forwarded, and the reverse path filter (RFC
    3704): 0 none, 1 strict, 2 loose.
    """

    device: str
    forwards: bool
    rp_filter: int


class Kernel(Protocol):
    """What answers; `queries.Queries` is the real one.

    `links` are by interface index, `addresses` are this host's own, packed, with the index of the interface of each.
    """

    @property
    def links(self) -> Mapping[int, Link]: ...

    @property
    def addresses(self) -> Mapping[bytes, int]: ...

    def way(self, dst: bytes, *, src: bytes = b"", into: int = 0, protocol: str = "", port: int = 0) -> Way: ...

    def refusals(self, dst: bytes) -> list[Way]: ...

    def rules(self, family: int) -> list[PolicyRule]: ...

    def neighbour(self, address: bytes, device: int) -> Hop | None: ...

    def remote(self, mac: bytes, device: int) -> bytes | None: ...

    def bridge_port(self, mac: bytes, bridge: int) -> int | None: ...

    def entrance(self, version: int, device: str) -> Entrance: ...


class PacketFilters(Protocol):
    """What answers for the firewall; `rules.Filters` is the real one."""

    def chains(self, hook: str, flow: Flow) -> Sequence[Chain]: ...


# --- the judgement -----------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How the leases want packets for `subnet` to go: through `tunnel` to the VTEP `mac` at one of `remotes`, or, if
    there is no tunnel, by the peer itself.
    """

    subnet: Prefix
    tunnel: str
    mac: bytes
    remotes: tuple[bytes, ...]


class Trace:
    """One packet on its way through this host."""

    def __init__(self, kernel: Kernel, filters: PacketFilters, roster: Roster, packet: Packet) -> None:
        self._kernel = kernel
        self._filters = filters
        self._roster = roster
        self._packet = packet
        self.own = self._own()
        """This host, as its lease has it."""
        self.origin = self._place_of(packet.src)
        self.target = self._place_of(packet.dst)

    # --- whose addresses these are ---

    def _own(self) -> Member | None:
        """Known by its underlay address, which another may have as well, and by the MAC of its tunnel's end."""
        macs = {link.mac for link in self._tunnels}

        def fits(member: Member) -> tuple[bool, bool]:
            return any(each in self._kernel.addresses for each in member.addresses), bool(
                macs & {*member.macs.values()}
            )

        found = max(self._roster.members, key=fits, default=None)
        return found if found is not None and any(fits(found)) else None

    def _place_of(self, address: bytes) -> str:
        if address in self._kernel.addresses:
            return HOST
        if self.own is not None:
            return POD if any(subnet.holds(address) for subnet in self.own.subnets) else AWAY
        if self._roster.owner(address) is not None or self._roster.host(address) is not None:
            return AWAY
        # No lease tells: what is on a link here that no tunnel leaves by is taken for a pod's.
        way = self._kernel.way(address)
        link = self._kernel.links.get(way.device)
        below = {each.lower for each in self._tunnels}
        alone = not way.refused and not way.gateway and link is not None and link not in self._tunnels
        return POD if alone and below and way.device not in below else AWAY

    @property
    def _tunnels(self) -> list[Link]:
        return [
            link
            for link in self._kernel.links.values()
            if link.kind == "vxlan" and (self._roster.vni in (None, link.vni)) and link.name.startswith("flannel")
        ]

    def _name(self, index: int) -> str:
        link = self._kernel.links.get(index)
        return link.name if link is not None else f"interface {index}"

    def _peer(self, address: bytes) -> Member | None:
        return self._roster.owner(address) or self._roster.host(address)

    # --- the ways ---

    def steps(self) -> Iterator[Step]:
        """What was looked at, in the order in which the packet meets it; the first that is wrong is the last."""
        for step in self._all():
            yield step
            if step.state == WRONG:
                return

    def path(self) -> tuple[Link | None, tuple[str, ...]]:
        """The link by which a pod's packet comes in, None for the host's own; all interfaces that it ought to pass."""
        packet = self._packet
        entrance = self._kernel.links.get(self._kernel.way(packet.src).device) if self.origin == POD else None
        into = entrance.number if entrance is not None else 0
        way = self._kernel.way(packet.dst, src=packet.src, into=into, protocol=packet.protocol, port=packet.port)
        names = [entrance.name] if entrance is not None else []
        link = self._kernel.links.get(way.device)
        if link is None or way.kind == LOCAL:
            return entrance, tuple(names)
        if link.name not in names:
            names.append(link.name)
        below = self._kernel.links.get(link.lower) if link in self._tunnels else None
        return entrance, (*names, *([below.name] if below is not None else []))

    def _all(self) -> Iterator[Step]:
        if self.target != AWAY and self.origin != AWAY:
            yield from self._within()
        elif self.target != AWAY:
            yield from self._arriving()
        else:
            yield from self._leaving()

    def _leaving(self) -> Iterator[Step]:
        packet = self._packet
        entrance = 0
        if self.origin == AWAY:
            yield self._stranger()
        elif self.origin == POD:
            home = self._kernel.way(packet.src)
            yield self._pods_link("source", packet.src, home)
            entrance = home.device
        else:
            yield Step("source", OK, f"{format_address(packet.src)} is this host's own")
        yield self._lease("lease", packet.dst)
        plan = self._plan(packet.dst)
        if plan is not None:
            yield self._devices(plan)
        if entrance:
            yield self._forwarding(entrance)
        way = self._kernel.way(packet.dst, src=packet.src, into=entrance, protocol=packet.protocol, port=packet.port)
        yield self._route(way, entrance, plan)
        yield self._fits("mtu", way, packet.size, packet.df)
        flow = Flow(packet.src, packet.dst, packet.protocol, packet.port, out=self._name(way.device))
        if entrance:
            into = flow._replace(into=self._name(entrance))
            hooks = (("prerouting", into._replace(out="")), ("forward", into), ("postrouting", into))
            yield self._firewall("firewall", hooks)
        else:
            yield self._firewall("firewall", (("output", flow), ("postrouting", flow)))
        tunnel = self._kernel.links.get(way.device)
        if tunnel is None or tunnel not in self._tunnels:
            cause = "peer_down" if plan is not None else ""
            yield self._asked_neighbour("neighbour", way.gateway or packet.dst, way.device, cause)
            return
        yield from self._tunnelled(way.gateway or packet.dst, tunnel, plan)

    def _tunnelled(self, gateway: bytes, tunnel: Link, plan: Plan | None) -> Iterator[Step]:
        hop = self._kernel.neighbour(gateway, tunnel.number)
        yield self._written_neighbour(gateway, tunnel, hop, plan)
        assert hop is not None
        remote = self._kernel.remote(hop.mac, tunnel.number)
        yield self._fdb(hop.mac, tunnel, remote, plan)
        if not remote:
            return  # Somebody's group of remotes, and no lease tells whether it is right.
        outer = self._kernel.way(remote, src=tunnel.local, protocol="udp", port=tunnel.port)
        yield self._outer_route(remote, tunnel, outer)
        size = self._packet.size + OVERHEAD[len(remote)]
        yield self._fits("underlay mtu", outer, size, self._packet.df)
        flow = Flow(tunnel.local, remote, "udp", tunnel.port, out=self._name(outer.device))
        yield self._firewall("underlay firewall", (("output", flow), ("postrouting", flow)))
        yield self._asked_neighbour("underlay neighbour", outer.gateway or remote, outer.device, "peer_down")

    def _arriving(self) -> Iterator[Step]:
        packet = self._packet
        yield self._lease("lease", packet.src)
        peer = self._peer(packet.src)
        tunnel = plan = None
        by = packet.src
        if peer is not None and self.own is not None:
            if any(subnet.holds(packet.dst) for subnet in self.own.subnets):
                plan = self._plan_by(peer, packet.src)
                by = plan.remotes[0] if plan is not None else by
            else:
                # What is for an address outside the overlay, as the host's own, comes without a tunnel, from pods too.
                by = next((each for each in peer.addresses if len(each) == len(by)), by)
        home = self._kernel.links.get(self._kernel.way(by).device)
        if plan is not None:
            yield self._devices(plan)
        if plan is not None and plan.tunnel:
            tunnel = self._named(plan.tunnel)
            assert tunnel is not None
            yield from self._outer_arrival(tunnel, plan)
        entrance = tunnel or home
        if entrance is None:
            text = format_address(packet.src)
            mend = "add a route, or mend the one to the host that has it"
            yield Step("entrance", WRONG, f"no route leads to {text}", f"ip route get {text}", mend)
        assert entrance is not None
        flow = Flow(packet.src, packet.dst, packet.protocol, packet.port, into=entrance.name)
        yield self._believed("rp_filter", packet.src, packet.dst, entrance, packet.protocol, packet.port)
        if self.target == HOST:
            yield self._firewall("firewall", (("prerouting", flow), ("input", flow)))
            yield Step("route", OK, f"{format_address(packet.dst)} is this host's own")
            return
        goal = self._kernel.way(packet.dst)
        yield self._firewall("firewall", (("prerouting", flow),))
        yield self._forwarding(entrance.number)
        yield self._pods_link("route", packet.dst, goal)
        pods = self._kernel.links[goal.device]
        yield self._enters(entrance)
        yield self._fits("mtu", goal, packet.size, packet.df)
        on = flow._replace(out=pods.name)
        yield self._firewall("firewall", (("forward", on), ("postrouting", on)))
        yield from self._pod(packet.dst, pods)

    def _within(self) -> Iterator[Step]:
        packet = self._packet
        for where, address, place in (("source", packet.src, self.origin), ("route", packet.dst, self.target)):
            if place == HOST:
                yield Step(where, OK, f"{format_address(address)} is this host's own")
                continue
            way = self._kernel.way(address)
            yield self._pods_link(where, address, way)
            if where == "route":
                yield self._fits("mtu", way, packet.size, packet.df)
                yield from self._pod(address, self._kernel.links[way.device])

    # --- step by step: before the route ---

    def _stranger(self) -> Step:
        src, dst = map(format_address, (self._packet.src, self._packet.dst))
        peer = self._peer(self._packet.src)
        if peer is not None:
            return Step("source", WRONG, f"{src} is {peer.about}'s, not this host's", "ip address", "run this there")
        have = " and ".join(map(str, self.own.subnets)) if self.own else "not known"
        what = f"{src} is no address of this host and in no subnet of its own ({have}), and neither is {dst}"
        return Step("source", WRONG, what, "ip address", "let the sender use an address of its host's subnet")

    def _pods_link(self, where: str, address: bytes, way: Way) -> Step:
        """The link behind which a pod of this host is."""
        text = format_address(address)
        command = f"ip route get {text}"
        if way.refused:
            return self._no_way(where, address, command)
        link = self._kernel.links[way.device]
        if way.gateway or link in self._tunnels or link.number in {each.lower for each in self._tunnels}:
            via = f" via {format_address(way.gateway)}" if way.gateway else ""
            what = f"no link of this host has {text}: the route {way.entry} leads there by {link.name}{via}"
            mend = "is there such a pod? The pods' interface has to be up, with the subnet's first address"
            return Step(where, WRONG, what, command, mend)
        if not link.up:
            mend = f"ip link set {link.name} up"
            return Step(where, WRONG, f"{link.name} is down", f"ip link show {link.name}", mend, "device_down")
        return Step(where, OK, f"{text} is on {link.name}", command)

    def _lease(self, where: str, address: bytes) -> Step:
        text = format_address(address)
        if not self._roster.members:
            return Step(where, NOTE, "no lease is known, so what stands here cannot be held against any")
        if peer := self._peer(address):
            return Step(where, OK, f"{text} is {peer.about}'s", "overlay-agent leases")
        if self._roster.inside(address):
            what = f"{text} is in no host's subnet"
            mend = "start the agent of the host that ought to have it, or use an address that a host has"
            return Step(where, WRONG, what, "overlay-agent leases", mend)
        return Step(where, NOTE, f"{text} is not of the overlay")

    def _plan(self, address: bytes) -> Plan | None:
        """None where no lease tells."""
        peer = self._roster.owner(address)
        if peer is None:
            return None
        return self._plan_by(peer, address)

    def _plan_by(self, peer: Member, address: bytes) -> Plan | None:
        """The same for an address that is the peer's."""
        family = len(address)
        subnet = next((each for each in peer.subnets if each.holds(address)), Prefix(address, 8 * family))
        if self._roster.direct and (self._roster.vni is None or self._is_on_link(peer, family)):
            return Plan(subnet, "", b"", peer.addresses)
        for size in (family, _OTHER[family]):
            remotes = tuple(each for each in peer.addresses if len(each) == size)
            if size in peer.macs and remotes and (self.own is None or size in self.own.macs):
                return Plan(subnet, device_name(self._roster.vni or 1, size), peer.macs[size], remotes)
        return None

    def _is_on_link(self, peer: Member, family: int) -> bool:
        for address in peer.addresses:
            way = self._kernel.way(address)
            if (len(address) == family or family == 4) and not way.refused and not way.gateway:
                return True
        return False

    def _named(self, name: str) -> Link | None:
        return next((link for link in self._kernel.links.values() if link.name == name), None)

    def _devices(self, plan: Plan) -> Step:
        """The interfaces that the overlay stands on here."""
        where = "device"
        own = self.own.addresses if self.own is not None else ()
        underlay = next((self._kernel.addresses[each] for each in own if each in self._kernel.addresses), 0)
        if plan.tunnel:
            link = self._named(plan.tunnel)
            command = f"ip -d link show {plan.tunnel}"
            if link is None or link.kind != "vxlan":
                what = f"there is no VXLAN device {plan.tunnel}"
                return Step(where, WRONG, what, command, AGENT, "device_missing")
            if not link.up:
                what = f"{plan.tunnel} is down"
                mend = f"ip link set {plan.tunnel} up; {AGENT}"
                return Step(where, WRONG, what, command, mend, "device_down")
            underlay = link.lower or underlay
        below = self._kernel.links.get(underlay)
        if below is not None and not (below.up and below.running):
            state = "is down" if not below.up else "has no carrier"
            mend = f"ip link set {below.name} up" if not below.up else "look after the cable, or the other end"
            return Step(where, WRONG, f"{below.name} {state}", f"ip link show {below.name}", mend, "device_down")
        names = " and ".join(filter(None, (plan.tunnel, below.name if below else "")))
        return Step(where, OK, f"{names or 'the underlay'}: up", "ip -d link")

    def _forwarding(self, entrance: int) -> Step:
        version = 4 if len(self._packet.dst) == 4 else 6
        held = self._kernel.entrance(version, self._name(entrance))
        setting = f"net.ipv4.conf.{held.device.replace('.', '/')}.forwarding"
        mend = "net.ipv4.ip_forward=1" if version == 4 else "net.ipv6.conf.all.forwarding=1"
        shown = setting if version == 4 else "net.ipv6.conf.all.forwarding"
        if not held.forwards:
            what = f"this host does not forward IPv{version} packets that come in by {held.device}"
            return Step("forwarding", WRONG, what, f"sysctl {shown}", f"sysctl -w {mend}", "forwarding_off")
        return Step("forwarding", OK, f"IPv{version} packets from {held.device} are forwarded", f"sysctl {shown}")

    # --- the route ---

    def _route(self, way: Way, entrance: int, plan: Plan | None) -> Step:
        packet = self._packet
        text = format_address(packet.dst)
        origin = f" from {format_address(packet.src)}" + (f" iif {self._name(entrance)}" if entrance else "")
        command = f"ip route get fibmatch {text}{origin}"
        if way.refused:
            plain = self._kernel.way(packet.dst)
            if not plain.refused:
                what = f"the kernel takes no packet for {text}{origin}, though it has a route for its own"
                mend = "remove the rule or route that refuses it: ip rule; ip route show table all"
                return Step("route", WRONG, what, command, mend, "route_foreign")
            return self._no_way("route", packet.dst, command)
        where = self._told(way)
        if plan is None:
            return Step("route", OK, where, command)
        right, how = self._as_planned(way, plan)
        if right:
            return Step("route", OK, where, command)
        assert way.entry is not None
        if way.table not in _USUAL_TABLES:
            priorities = [rule.priority for rule in self._kernel.rules(len(packet.dst)) if rule.table == way.table]
            by = f"rule {priorities[0]}" if priorities else "a policy rule"
            what = f"{by} sends it to table {way.table}, where it goes {where}, not {how}"
            mend = f"ip rule del priority {priorities[0]}" if priorities else "ip rule"
            return Step("route", WRONG, what, command, mend, "route_foreign")
        if way.entry.length < plan.subnet.length:
            what = f"the route to {plan.subnet} is missing, so it goes {where}"
            return Step("route", WRONG, what, command, AGENT, "route_wrong")
        if way.entry != plan.subnet or way.protocol != PROTOCOL:
            whose = _PROTOCOLS.get(way.protocol, way.protocol)
            what = f"another route is in the way, of protocol {whose}: it goes {where}, not {how}"
            dash = "" if len(packet.dst) == 4 else "-6 "
            mend = f"ip {dash}route del {way.entry} dev {self._name(way.device)}"
            return Step("route", WRONG, what, command, mend, "route_foreign")
        return Step("route", WRONG, f"it goes {where}, not {how}", command, AGENT, "route_wrong")

    def _told(self, way: Way) -> str:
        via = f" via {format_address(way.gateway)}" if way.gateway else ""
        entry = "default" if way.entry is not None and not way.entry.length else way.entry
        return f"by {entry}{via} dev {self._name(way.device)}"

    def _as_planned(self, way: Way, plan: Plan) -> tuple[bool, str]:
        """(whether the way is as planned, the plan in words)."""
        if plan.tunnel:
            right = self._name(way.device) == plan.tunnel and way.gateway == plan.subnet.base
            return right, f"via {format_address(plan.subnet.base)} dev {plan.tunnel}"
        return way.gateway in plan.remotes, f"via {' or '.join(map(format_address, plan.remotes))}"

    def _no_way(self, where: str, address: bytes, command: str) -> Step:
        text = format_address(address)
        below = where == "underlay route"
        for found in self._kernel.refusals(address):
            # The kernel's last word on IPv6 is such a route, to everything.
            if found.entry is not None and (found.entry.length or found.protocol != 2):
                kind = _REFUSING.get(found.kind, "refusing")
                what = f"the {kind} route to {found.entry} loses packets for {text}"
                mend = f"ip {'' if len(address) == 4 else '-6 '}route del {kind} {found.entry}"
                return Step(where, WRONG, what, command, mend, "underlay_unreachable" if below else "route_foreign")
        if self._roster.inside(address):
            return Step(where, WRONG, f"there is no route to {text}", command, AGENT, "route_wrong")
        cause = "underlay_unreachable" if below else ""
        return Step(where, WRONG, f"there is no route to {text}", command, "add one, or a default route", cause)

    # --- sizes and filters ---

    def _fits(self, where: str, way: Way, size: int, df: bool) -> Step:
        link = self._kernel.links[way.device]
        most = min(filter(None, (link.mtu, way.mtu)))
        whose = f"the route's MTU {most}" if most < link.mtu else f"the MTU {most} of {link.name}"
        command = (
            f"ip link show {link.name}" if most == link.mtu else f"ip route get {format_address(self._packet.dst)}"
        )
        if size <= most:
            return Step(where, OK, f"{size} bytes are within {whose}", command)
        if df or (len(self._packet.dst) == 16 and where == "mtu"):
            least = MIN_MTU[len(self._packet.dst)]
            mend = f"send no more than {self._packet.size - (size - most)} bytes, or raise the MTU (least: {least})"
            what = f"{size} bytes are more than {whose}, and may not be cut"
            return Step(where, WRONG, what, command, mend, "path_mtu")
        return Step(where, NOTE, f"{size} bytes are more than {whose}: it is cut into fragments", command)

    def _firewall(self, where: str, hooks: Sequence[tuple[str, Flow]]) -> Step:
        doubts: list[str] = []
        count = 0
        for hook, flow in hooks:
            for chain in self._filters.chains(hook, flow):
                count += 1
                found = outcome(chain)
                if found.refused:
                    what = f"{chain.where} refuses it ({hook}): {found.refused}"
                    mend = self._accepting(chain, found.refused)
                    return Step(where, WRONG, what, chain.command, mend, _cause_of_refusal(where, hook, chain))
                doubts += [f"{chain.where}: {doubt}" for doubt in found.doubts]
        if doubts:
            return Step(where, NOTE, f"may be refused by {'; '.join(doubts)}", "nft list ruleset; iptables -S")
        chains = "1 chain" if count == 1 else f"{count} chains"
        return Step(where, OK, f"no rule of {chains} refuses it", "nft list ruleset; iptables -S")

    def _accepting(self, chain: Chain, refused: str) -> str:
        """What lets it pass."""
        if chain.where.startswith("nftables inet overlay_agent guard"):
            return "if it is a host of the cluster, look for its lease: overlay-agent leases; " + AGENT
        if chain.where.startswith("nftables inet overlay_agent"):
            return "no peer has reason to send this here: see docs/firewall.md"
        if refused.startswith("-A "):
            return f"{chain.where.split()[0]} -D {refused.removeprefix('-A ')}"
        if chain.where.startswith("nftables"):
            block = f"{'ip' if len(self._packet.dst) == 4 else 'ip6'} daddr {format_address(self._packet.dst)}"
            return f"nft insert rule {chain.where.removeprefix('nftables ')} {block} accept"
        return f"{AGENT}; or {chain.where.split()[0]} -I FORWARD -d {format_address(self._packet.dst)} -j ACCEPT"

    # --- entries ---

    def _written_neighbour(self, gateway: bytes, tunnel: Link, hop: Hop | None, plan: Plan | None) -> Step:
        """On a tunnel, where the agent writes them."""
        text = format_address(gateway)
        command = f"ip neigh get {text} dev {tunnel.name}"
        if hop is None or not hop.mac:
            return Step(
                "neighbour", WRONG, f"neighbour {text} on {tunnel.name} is missing", command, AGENT, "neighbour_wrong"
            )
        mac = format_mac(hop.mac)
        if plan is not None and plan.tunnel and hop.mac != plan.mac:
            what = f"neighbour {text} on {tunnel.name} has {mac}; the lease says {format_mac(plan.mac)}"
            return Step("neighbour", WRONG, what, command, AGENT, "neighbour_wrong")
        return Step("neighbour", OK, f"{text} is at {mac} on {tunnel.name}", command)

    def _fdb(self, mac: bytes, tunnel: Link, remote: bytes | None, plan: Plan | None) -> Step:
        text = format_mac(mac)
        command = f"bridge fdb get to {text} dev {tunnel.name} self"
        if remote is None:
            return Step("fdb", WRONG, f"FDB entry {text} on {tunnel.name} is missing", command, AGENT, "fdb_wrong")
        if not remote and plan is None:
            return Step("fdb", NOTE, f"{text} on {tunnel.name} has no remote of its own, but a group of them", command)
        if not remote:
            return Step("fdb", WRONG, f"FDB entry {text} on {tunnel.name} has no remote", command, AGENT, "fdb_wrong")
        if plan is not None and plan.tunnel and remote not in plan.remotes:
            hosts = " or ".join(map(format_address, plan.remotes))
            what = f"FDB entry {text} on {tunnel.name} leads to {format_address(remote)}; the lease says {hosts}"
            return Step("fdb", WRONG, what, command, AGENT, "fdb_wrong")
        return Step("fdb", OK, f"{text} is behind {format_address(remote)}", command)

    def _asked_neighbour(self, where: str, address: bytes, device: int, cause: str = "") -> Step:
        """On a link where hosts ask for each other; `cause` if nobody answers."""
        text, name = format_address(address), self._name(device)
        command = f"ip neigh get {text} dev {name}"
        hop = self._kernel.neighbour(address, device)
        if hop is not None and hop.state & _FAILED:
            mend = f"is it up, and on the link of {name}? arping -I {name} {text}"
            return Step(where, WRONG, f"nobody answers for {text} on {name}", command, mend, cause)
        if hop is None or not hop.mac:
            return Step(where, NOTE, f"{text} on {name} is not known yet and will be asked for", command)
        return Step(where, OK, f"{text} is at {format_mac(hop.mac)} on {name}", command)

    def _pod(self, address: bytes, link: Link) -> Iterator[Step]:
        yield self._asked_neighbour("neighbour", address, link.number)
        hop = self._kernel.neighbour(address, link.number)
        if hop is None or not hop.mac or link.kind != "bridge":
            return
        port = self._kernel.bridge_port(hop.mac, link.number)
        command = f"bridge fdb get to {format_mac(hop.mac)} br {link.name}"
        if port is None:
            yield Step("bridge", NOTE, f"{link.name} does not know yet which port {format_mac(hop.mac)} is at", command)
            return
        name, found = self._name(port), self._kernel.links.get(port)
        if found is not None and not found.up:
            what = f"{name}, the pod's port of {link.name}, is down"
            yield Step("bridge", WRONG, what, command, f"ip link set {name} up")
        else:
            yield Step("bridge", OK, f"{format_mac(hop.mac)} is at port {name} of {link.name}", command)

    # --- the underlay ---

    def _outer_route(self, remote: bytes, tunnel: Link, way: Way) -> Step:
        text = format_address(remote)
        source = f" from {format_address(tunnel.local)}" if tunnel.local else ""
        command = f"ip route get {text}{source} ipproto udp dport {tunnel.port}"
        if tunnel.local and tunnel.local not in self._kernel.addresses:
            what = f"the tunnel's packets leave from {format_address(tunnel.local)}, which this host has not any more"
            return Step("underlay route", WRONG, what, "ip address", AGENT, "underlay_choice")
        if way.refused:
            return self._no_way("underlay route", remote, command)
        if way.kind == LOCAL:
            what = f"{text}, the peer's address, is this host's own too"
            mend = "give one of the two hosts another address"
            return Step("underlay route", WRONG, what, "ip address", mend, "duplicate_public_ip")
        link = self._kernel.links[way.device]
        if link in self._tunnels:
            what = f"the tunnel's packets to {text} would go into the tunnel {link.name} themselves"
            mend = f"ip route del {way.entry} dev {link.name}"
            return Step("underlay route", WRONG, what, command, mend, "route_foreign")
        if not (link.up and link.running):
            mend = f"ip link set {link.name} up"
            what = f"{link.name} is down"
            return Step("underlay route", WRONG, what, f"ip link show {link.name}", mend, "device_down")
        return Step("underlay route", OK, f"{text} {self._told(way)}", command)

    def _outer_arrival(self, tunnel: Link, plan: Plan) -> Iterator[Step]:
        """The tunnel's packet, from the peer to this host."""
        remote = next((each for each in plan.remotes if len(each) == len(tunnel.local)), plan.remotes[0])
        entrance = self._kernel.links.get(tunnel.lower) or self._kernel.links.get(self._kernel.way(remote).device)
        if entrance is None:
            return
        yield self._believed("underlay rp_filter", remote, tunnel.local, entrance, "udp", tunnel.port)
        flow = Flow(remote, tunnel.local, "udp", tunnel.port, into=entrance.name)
        yield self._firewall("underlay firewall", (("prerouting", flow), ("input", flow)))

    def _believed(self, where: str, src: bytes, dst: bytes, entrance: Link, protocol: str, port: int) -> Step:
        """Whether the kernel believes that this source is behind this interface (RFC 3704)."""
        text, name = format_address(src), entrance.name
        held = self._kernel.entrance(4 if len(src) == 4 else 6, name)
        setting = f"net.ipv4.conf.{name.replace('.', '/')}.rp_filter"
        command = f"sysctl net.ipv4.conf.all.rp_filter {setting}; ip route get {text}"
        way = self._kernel.way(dst, src=src, into=entrance.number, protocol=protocol, port=port)
        if not held.rp_filter or way.errno not in _UNBELIEVED:
            return Step(where, OK, f"{text} may come in by {name} (rp_filter {held.rp_filter})", command)
        back = self._kernel.way(src)
        how = "no way leads back" if back.refused else f"the way back is by {self._name(back.device)}"
        kind = "strict" if held.rp_filter == _STRICT else "loose"
        what = f"the {kind} reverse path filter drops what comes from {text} by {name}: {how}"
        mend = "mend the route to it" + (f", or sysctl -w {setting}=2" if held.rp_filter == _STRICT else "")
        return Step(where, WRONG, what, command, mend, "rp_filter")

    def _enters(self, entrance: Link) -> Step:
        """The kernel's own word on a packet from there."""
        packet = self._packet

        way = self._kernel.way(
            packet.dst, src=packet.src, into=entrance.number, protocol=packet.protocol, port=packet.port
        )
        text = f"{format_address(packet.dst)} from {format_address(packet.src)} iif {entrance.name}"
        if way.refused:
            what = f"the kernel takes no packet for {text}"
            mend = "remove the rule or route that refuses it: ip rule; ip route show table all"
            return Step("entering", WRONG, what, f"ip route get {text}", mend, "route_foreign")
        return Step("entering", OK, f"the kernel takes it in, {self._told(way)}", f"ip route get {text}")


def _cause_of_refusal(where: str, hook: str, chain: Chain) -> str:
    if chain.where.startswith("nftables inet overlay_agent"):
        return "guard_drops"
    if where == "underlay firewall":
        return "port_blocked_in" if hook in ("prerouting", "input") else "port_blocked_out"
    # What a host lets its own programs send and receive is its own affair.
    return "forward_drop" if hook in ("forward", "postrouting") else ""


# --- what people and programs see --------------------------------------------------------------------------------

_SIGNS = {OK: "ok", NOTE: "note", WRONG: "WRONG"}


def headline(trace: Trace, packet: Packet) -> str:
    """One line on what is followed."""
    port = f" to port {packet.port}" if packet.protocol != "icmp" else ""
    ends = f"{format_address(packet.src)} ({trace.origin}) > {format_address(packet.dst)} ({trace.target})"
    return f"{ends}: {packet.protocol.upper()}{port}, {packet.size} bytes{', not to be cut' if packet.df else ''}"


def line(step: Step, width: int = 80) -> str:
    """A step for people, in so many columns; what is wrong has below it what shows it, the cause and what mends it."""
    text = folded(f"  {_SIGNS[step.state]:<5}  {step.where:<18}  ", step.what, width)
    if step.state != WRONG:
        return text
    # Commands stay whole: they are to be copied.
    more = [f"{'':<9}shown by  {step.command}"] if step.command else []
    more += [f"{'':<9}cause     {step.cause}"] if step.cause else []
    return "\n".join([text, *more, folded(f"{'':<9}mend      ", step.remedy, width)])


def folded(head: str, text: str, width: int) -> str:
    """The text behind its head, on as many lines of `width` columns as it takes."""
    indent = " " * len(head)
    lines = textwrap.wrap(text, max(width, 60) - len(head), break_long_words=False, break_on_hyphens=False)
    return head + f"\n{indent}".join(lines)


def as_json(trace: Trace, packet: Packet, steps: Sequence[Step], sent: Mapping[str, Any] | None) -> dict[str, Any]:
    """The schema of docs/trace.md. Keys may be added to it; none changes its meaning."""
    wrong = next((step for step in steps if step.state == WRONG), None)
    return {
        "src": format_address(packet.src),
        "dst": format_address(packet.dst),
        "from": trace.origin,
        "to": trace.target,
        "protocol": packet.protocol,
        "port": packet.port if packet.protocol != "icmp" else None,
        "size": packet.size,
        "df": packet.df,
        "open": wrong is None and (sent is None or bool(sent["arrived"])),
        "steps": [_fields(step) for step in steps],
        "wrong": _fields(wrong) if wrong is not None else None,
        "sent": sent,
    }


def _fields(step: Step) -> dict[str, Any]:
    return {name: value or None if name == "cause" else value for name, value in step._asdict().items()}

"""Our codec against others': byte for byte what pyroute2 sends, entry for entry what pyroute2 and iproute2 read.

Messages are compared as they went over the socket. Sequence number and port id alone are left out: they number a
conversation and say nothing of an entry. pyroute2 writes attributes in the order of its arguments, which is the only
freedom taken here. It knows no nexthop objects: those, and the routes on them, iproute2 makes and reads.
"""

import errno
import random
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute
from pyroute2.netlink.nlsocket import NetlinkRequest

from overlay import netlink, rtnl
from overlay.device import DeviceSpec, derived_mac
from overlay.kernel import Kernel
from overlay.model import (
    BUILD_ORDER,
    NEXTHOP_BASE,
    NEXTHOP_SPAN,
    PERMANENT,
    PROTOCOL,
    PROTOCOL_BOOT,
    Drop,
    Entry,
    Fdb,
    Neighbour,
    NextHop,
    Put,
    Route,
    Sight,
)
from overlay.tracker import Tracker
from subnet_lease.model import Prefix, format_address, format_mac, pack_address
from tests.netns.namespace import index_of, ip, ip_json, new_namespace, sh, veth

pytestmark = pytest.mark.netns

MANY = 200
IP_MTU, IPV6_MTU = 14, 24  # linux/in.h, linux/in6.h
NOARP = 0x40
"""pyroute2 adds NUD_NOARP to whatever state an FDB entry is asked to have."""


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    """A kernel with our devices over IPv4 and IPv6, in a namespace of its own."""
    with new_namespace():
        # No neighbours and routes that IPv6 makes by itself.
        Path("/proc/sys/net/ipv6/conf/default/addr_gen_mode").write_text("1")
        link = veth("under0", "under1", "172.30.0.5/24")
        ip("addr add 2001:db8::5/64 dev under0 nodad")
        made = Kernel()
        specs = [
            DeviceSpec(name, 1, 8472, link, pack_address(local), derived_mac(name), 1400, (Prefix.parse(address),))
            for name, local, address in (
                ("flannel.1", "172.30.0.5", "10.0.0.0/32"),
                ("flannel-v6.1", "2001:db8::5", "fd00::/128"),
            )
        ]
        made.ensure_devices(specs, 0)
        yield made
        made.close()


@pytest.fixture(params=[4, 16], ids=["IPv4", "IPv6"])
def family(request: pytest.FixtureRequest) -> int:
    """Of pods and of the underlay, by the length of an address."""
    return int(request.param)


NAMES = {4: "flannel.1", 16: "flannel-v6.1"}


class Recorder:
    """An open pyroute2 socket and the latest message that it sent."""

    def __init__(self, route: IPRoute) -> None:
        self.route = route
        self.sent = b""


@pytest.fixture
def pyroute(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    original = NetlinkRequest.send

    async def send(request: Any) -> Any:
        result = await original(request)
        recorder.sent = bytes(request.msg.data)
        return result

    with IPRoute() as route:
        recorder = Recorder(route)
        monkeypatch.setattr(NetlinkRequest, "send", send)
        yield recorder


def unnumbered(message: bytes) -> bytes:
    """The message without its sequence number and port id."""
    return message[:8] + bytes(8) + message[16:]


def generated(seed: int, kernel: Kernel, family: int = 4) -> Iterator[tuple[Fdb, Neighbour, NextHop, Route, Route]]:
    """Entries of many peers: distinct subnets of all usual lengths, arbitrary MACs and remotes, some with an MTU."""
    numbers, device = random.Random(seed), kernel.tunnels[family]
    for number in range(1, MANY + 1):
        length = numbers.randint(16, 30) if family == 4 else numbers.randint(48, 126)
        head = bytes([10, number]) if family == 4 else bytes([0xFD, 0, 0, 0, 0, number])
        base = Prefix(head + numbers.randbytes(family - len(head)), 8 * family).network(length)
        mac = bytes([numbers.randrange(256) & 0xFC | 2]) + numbers.randbytes(5)
        near = bytes([numbers.choice((100, 172, 192))]) if family == 4 else b"\x20\x01\x0d\xb8"
        remote = near + numbers.randbytes(family - len(near))
        identity = NEXTHOP_BASE + (base.first if family == 4 else number) % NEXTHOP_SPAN
        mtu = numbers.choice((0, 0, 1280, 1300))
        yield (
            Fdb((device, mac), remote),
            Neighbour((device, base.base), mac),
            NextHop(identity, base.base, device),
            Route(base, nexthop=identity, mtu=mtu),
            Route(base, gateway=base.base, device=device, mtu=mtu),
        )


def through_nexthops(peers: list[tuple[Fdb, Neighbour, NextHop, Route, Route]]) -> list[Entry]:
    """All their entries but the plain routes."""
    return [entry for fdb, neighbour, hop, route, _ in peers for entry in (fdb, neighbour, hop, route)]


def plainly(peers: list[tuple[Fdb, Neighbour, NextHop, Route, Route]]) -> list[Entry]:
    """All their entries without nexthop objects."""
    return [entry for fdb, neighbour, _, _, route in peers for entry in (fdb, neighbour, route)]


def _unasked_for(sights: Iterable[Sight]) -> list[Sight]:
    """Without what the kernel makes itself: routes for addresses, and IPv6's neighbours for multicast."""
    return [
        each
        for each in sights
        if not (isinstance(each, Route) and each.protocol == 2)
        and not (isinstance(each, Neighbour) and each.at[1][:1] == b"\xff")
    ]


# --- building ---


def test_fdb_messages_are_those_of_pyroute2(kernel: Kernel, pyroute: Recorder, family: int) -> None:
    for fdb, *_ in generated(1, kernel, family):
        device, mac = fdb.at
        asked = {"ifindex": device, "lladdr": format_mac(mac), "flags": rtnl.NTF_SELF}
        pyroute.route.fdb("replace", **asked, dst=format_address(fdb.remote), state=fdb.state)
        assert unnumbered(rtnl.put(fdb, 0)) == unnumbered(pyroute.sent), fdb
        pyroute.route.fdb("del", state=PERMANENT | NOARP, **asked)
        assert unnumbered(rtnl.drop(fdb._replace(state=PERMANENT | NOARP), 0)) == unnumbered(pyroute.sent), fdb


def test_neighbour_messages_are_those_of_pyroute2(kernel: Kernel, pyroute: Recorder, family: int) -> None:
    for _, neighbour, *_ in generated(2, kernel, family):
        device, address = neighbour.at
        asked = {"ifindex": device, "dst": format_address(address), "state": "permanent"}
        asked["family"] = rtnl.FAMILY[family]
        pyroute.route.neigh("replace", **asked, lladdr=format_mac(neighbour.mac))
        assert unnumbered(rtnl.put(neighbour, 0)) == unnumbered(pyroute.sent), neighbour
        pyroute.route.neigh("del", **asked)
        assert unnumbered(rtnl.drop(neighbour, 0)) == unnumbered(pyroute.sent), neighbour


def test_route_messages_are_those_of_pyroute2(kernel: Kernel, pyroute: Recorder, family: int) -> None:
    for *_, route in generated(3, kernel, family):
        gateway = format_address(route.gateway)
        asked = {"family": rtnl.FAMILY[family], "dst": str(route.destination), "proto": route.protocol}
        metrics = {"metrics": {"mtu": route.mtu}} if route.mtu else {}
        pyroute.route.route("replace", **asked, gateway=gateway, oif=route.device, flags=["onlink"], **metrics)
        assert unnumbered(rtnl.put(route, 0)) == unnumbered(pyroute.sent), route
        usual = {"priority": rtnl.IP6_RT_PRIO_USER} if family == 16 else {}
        pyroute.route.route("del", scope=rtnl.RT_SCOPE_NOWHERE, type=0, **asked, **usual)
        assert unnumbered(rtnl.drop(route, 0)) == unnumbered(pyroute.sent), route


@pytest.mark.parametrize("gateway", ["10.0.1.0", "2001:db8::9"])
def test_nexthop_messages_are_those_of_iproute2(kernel: Kernel, gateway: str) -> None:
    """`ip` sends to the kernel, and the kernel tells what it made of it: the same as of ours."""
    name, family = ("flannel.1", 4) if "." in gateway else ("under0", 16)
    device = index_of(name)
    hop = NextHop(NEXTHOP_BASE + 256, pack_address(gateway), device)
    kernel.observe()
    ip(f"nexthop add id {hop.id} via {gateway} dev {name} onlink protocol {PROTOCOL}")
    assert kernel.observe().sights == (hop,)
    assert kernel.apply([Put(hop)]) == []
    (shown,) = ip_json("nexthop show")
    assert (shown["id"], shown["gateway"], shown["dev"], shown["flags"]) == (hop.id, gateway, name, ["onlink"])
    # IPv4 goes by either.
    route = Route(Prefix.parse("10.0.1.0/24"), nexthop=hop.id, mtu=1300)
    assert kernel.apply([Put(route)]) == []
    (told,) = ip_json("route show 10.0.1.0/24")
    via = told["via"]["host"] if family == 16 else told["gateway"]
    assert (told["nhid"], via, told["metrics"]) == (hop.id, gateway, [{"mtu": 1300}])
    assert route in kernel.marked(True) and hop in kernel.marked(True)
    assert kernel.apply([Drop(route), Drop(hop)]) == []
    assert kernel.marked(True) == []


# --- reading ---


def test_what_we_put_pyroute2_and_iproute2_read_the_same(kernel: Kernel, family: int) -> None:
    peers = list(generated(5, kernel, family))
    put = through_nexthops(peers) if family == 4 else plainly(peers)
    assert not kernel.apply([Put(entry) for entry in sorted(put, key=_rank)])
    device, name, version = kernel.tunnels[family], NAMES[family], rtnl.FAMILY[family]
    macs = {format_mac(fdb.at[1]): format_address(fdb.remote) for fdb, *_ in peers}
    addresses = {format_address(neighbour.at[1]): format_mac(neighbour.mac) for _, neighbour, *_ in peers}
    with IPRoute() as route:
        fdb = {e.get_attr("NDA_LLADDR"): e for e in route.fdb("dump", ifindex=device)}
        assert {mac: e.get_attr("NDA_DST") for mac, e in fdb.items()} == macs
        assert {(e["state"], e["flags"]) for e in fdb.values()} == {(PERMANENT, rtnl.NTF_SELF)}
        neighbours = route.get_neighbours(family=version, ifindex=device, state=PERMANENT)
        assert {e.get_attr("NDA_DST"): e.get_attr("NDA_LLADDR") for e in neighbours} == addresses
        routes = list(route.get_routes(family=version, proto=PROTOCOL))
        mtus = {e.get_attr("RTA_DST"): e.get_attr("RTA_METRICS") for e in routes}
        assert {base: m.get_attr("RTAX_MTU") if m else 0 for base, m in mtus.items()} == {
            format_address(r.destination.base): r.mtu for *_, r in peers
        }
        assert {(e.get_attr("RTA_DST"), e["dst_len"], e.get_attr("RTA_GATEWAY")) for e in routes} == {
            (format_address(r.destination.base), r.destination.length, format_address(r.gateway)) for *_, r in peers
        }
    bridge = sh("bridge", "fdb", "show", "dev", name).splitlines()
    assert {line.strip() for line in bridge} == {f"{mac} dst {dst} self permanent" for mac, dst in macs.items()}
    shown = ip_json(f"-{4 if family == 4 else 6} route show protocol {PROTOCOL}")
    if family == 16:
        assert {(e["dst"], e["gateway"], e["dev"], e["metric"], *e["flags"]) for e in shown} == {
            (str(r.destination).removesuffix("/128"), format_address(r.gateway), name, 1024, "onlink")
            for *_, r in peers
        }
        return
    assert {(e["dst"], e["nhid"], e["dev"]) for e in shown} == {
        (str(r.destination), r.nexthop, name) for *_, r, _ in peers
    }
    hops = ip_json(f"nexthop show dev {name}")
    assert {e["id"]: e["gateway"] for e in hops} == {hop.id: format_address(hop.gateway) for _, _, hop, *_ in peers}
    assert {(e["dev"], e["protocol"], *e["flags"]) for e in hops} == {(name, str(PROTOCOL), "onlink")}


def test_what_iproute2_makes_we_read_the_same(kernel: Kernel, family: int) -> None:
    peers, name = list(generated(6, kernel, family))[:80], NAMES[family]
    made: set[Entry] = set()
    for fdb, neighbour, hop, route, plain in peers:
        sh(*f"bridge fdb add {format_mac(fdb.at[1])} dev {name} dst {format_address(fdb.remote)}".split())
        ip(f"neigh add {format_address(neighbour.at[1])} lladdr {format_mac(neighbour.mac)} dev {name}")
        # `bridge` adds NUD_NOARP to permanent entries.
        made |= {fdb._replace(state=PERMANENT | NOARP), neighbour}
        mtu = f" mtu {route.mtu}" if route.mtu else ""
        if family == 4 and hop.id % 512:
            ip(f"nexthop add id {hop.id} via {format_address(hop.gateway)} dev {name} onlink protocol {PROTOCOL}")
            ip(f"route add {route.destination} nhid {hop.id} protocol {PROTOCOL}{mtu}")
            made |= {hop, route}
        else:
            ip(f"route add {plain.destination} via {format_address(plain.gateway)} dev {name} onlink{mtu}")
            made.add(plain._replace(protocol=PROTOCOL_BOOT))
    assert set(_unasked_for(kernel.dump(True))) == made


@pytest.mark.parametrize("seed", range(5))
def test_every_kind_of_entry_comes_back_from_the_kernel_as_it_was_put(kernel: Kernel, seed: int) -> None:
    peers, peers6 = list(generated(seed, kernel)), list(generated(seed, kernel, 16))
    first = through_nexthops(peers) + plainly(peers6)
    assert not kernel.apply([Put(entry) for entry in sorted(first, key=_rank)])
    assert sorted(map(repr, _unasked_for(kernel.dump(True)))) == sorted(map(repr, first))
    # And once more with gateways of their own, in the place of those through nexthop objects.
    plain = [route for *_, route in peers]
    assert not kernel.apply([Put(route) for route in plain])
    there = [entry for entry in _unasked_for(kernel.dump(True)) if isinstance(entry, Route)]
    assert sorted(map(repr, there)) == sorted(map(repr, [*plain, *(route for *_, route in peers6)]))
    everything: list[Entry] = [entry for entry in first if not isinstance(entry, Route)]
    everything += [*plain, *(route for *_, route in peers6)]
    assert not kernel.apply([Drop(entry) for entry in sorted(everything, key=_rank)[::-1]])
    assert not _unasked_for(kernel.dump(True))


def test_notifications_say_what_dumps_say(kernel: Kernel, family: int) -> None:
    kernel.observe()
    stranger = Kernel()
    stranger.tunnels = kernel.tunnels
    peers = list(generated(9, kernel, family))
    entries = through_nexthops(peers) if family == 4 else plainly(peers)
    stranger.apply([Put(entry) for entry in entries])
    stranger.close()
    assert _unasked_for(kernel.observe().sights) == entries
    assert set(_unasked_for(kernel.dump(True))) == set(entries)


@pytest.mark.parametrize(
    "line",
    [
        "route add 10.9.0.0/24 via 10.9.0.0 dev flannel.1 onlink metric 5",
        "route add 10.9.0.0/24 via 10.9.0.0 dev flannel.1 onlink table 100",
        "route add 10.9.0.0/24 tos 4 via 10.9.0.0 dev flannel.1 onlink",
        "route add fd00:9::/64 via fd00:9:: dev flannel.1 onlink metric 5",
        "route add fd00:9::/64 via fd00:9:: dev flannel.1 onlink table 100",
        "neigh add 2001:db8::9 lladdr 02:00:00:00:00:09 dev under0",
        "neigh add 172.30.0.9 lladdr 02:00:00:00:00:09 dev under0",
    ],
)
def test_what_is_under_no_key_of_ours_is_not_seen(kernel: Kernel, line: str) -> None:
    kernel.observe()
    ip(line)
    assert _unasked_for(kernel.observe().sights) == []
    assert not _unasked_for(kernel.dump(True))


@pytest.mark.parametrize("ours_first", [True, False])
def test_ipv6_route_of_another_metric_stays_when_ours_goes(kernel: Kernel, ours_first: bool) -> None:
    """Whoever has written it: with our protocol number by hand, for one."""
    ours = Route(Prefix.parse("fd00:9::/64"), gateway=pack_address("fd00:9::"), device=kernel.tunnels[4])
    theirs = f"route add fd00:9::/64 via fd00:9::1 dev flannel.1 onlink metric 5 protocol {PROTOCOL}"
    for step in (lambda: kernel.apply([Put(ours)]), lambda: ip(theirs))[:: 1 if ours_first else -1]:
        step()
    assert kernel.apply([Put(ours._replace(mtu=1300)), Put(ours, afresh=True)]) == []
    assert _unasked_for(kernel.dump(True)) == [ours]
    assert kernel.apply([Drop(ours)]) == []
    assert _unasked_for(kernel.dump(True)) == []
    assert [(e["metric"], e["gateway"]) for e in ip_json("-6 route show fd00:9::/64")] == [(5, "fd00:9::1")]


def test_route_that_is_away_while_it_is_replaced_leaves_its_packets_to_nobody(kernel: Kernel, family: int) -> None:
    block = Prefix.parse("10.0.1.0/24" if family == 4 else "fd00:9::/64")
    new = Route(block, gateway=block.base, device=kernel.tunnels[4])
    old = new._replace(device=kernel.tunnels[16])
    assert kernel.apply([Put(old)]) == []

    def ways() -> list[str]:
        """The routes there, in the kernel's order: the first is in force."""
        listed = ip_json(f"-{4 if family == 4 else 6} route show {block}")
        return [each["dev"] if each["type"] == "unicast" else each["type"] for each in listed]

    covered, uncovered = rtnl.cover(new, 0)
    with netlink.open_socket(socket.NETLINK_ROUTE, 1 << 16) as by_hand:
        for message, after in (
            (covered, ["flannel-v6.1", "blackhole"]),
            (rtnl.clear(old, 0), ["blackhole"]),
            (rtnl.put(new, 0), ["flannel.1", "blackhole"]),
            (uncovered, ["flannel.1"]),
        ):
            by_hand.send(message)
            assert ways() == after
    assert kernel.apply([Put(old, afresh=True)]) == []
    assert ways() == ["flannel-v6.1"]
    refused = kernel.apply([Put(new._replace(device=99), afresh=True)])
    assert [refusal.errno for refusal in refused] == [errno.ENODEV]
    assert ways() == [], "and no cover"


@pytest.mark.parametrize("more", ["advmss 1000", "mtu 1300 advmss 1000", "mtu lock 1300", "src 10.0.0.0"])
def test_route_that_carries_what_we_never_set_is_unequal_to_ours(kernel: Kernel, more: str) -> None:
    hop = NextHop(NEXTHOP_BASE + 256, pack_address("10.0.1.0"), kernel.tunnels[4])
    ours = Route(Prefix.parse("10.0.1.0/24"), nexthop=hop.id, mtu=1300)
    kernel.apply([Put(hop), Put(ours)])
    kernel.observe()
    ip(f"route replace 10.0.1.0/24 nhid {hop.id} protocol {PROTOCOL} {more}")
    (seen,) = kernel.observe().sights
    assert isinstance(seen, Route) and seen.destination == ours.destination and seen._replace(mtu=1300) != ours
    assert seen in kernel.dump(True)
    assert kernel.apply([Put(ours, afresh=True)]) == []
    assert ours in kernel.dump(True)


@pytest.mark.parametrize("by", ["nexthop", "gateway", "gateway of IPv6"])
def test_mtu_of_a_route_is_what_packets_get(kernel: Kernel, by: str) -> None:
    family = 16 if "IPv6" in by else 4
    device, block = kernel.tunnels[4], Prefix.parse("10.0.1.0/24" if family == 4 else "fd00:9::/64")
    hop = NextHop(NEXTHOP_BASE + 256, pack_address("10.0.1.0"), device)
    ours = Route(block, hop.id) if by == "nexthop" else Route(block, gateway=block.base, device=device)
    kernel.apply([Put(hop), Put(ours)])
    tracker = Tracker(lambda entry: True)
    target = format_address(block.host(9))
    for mtu in (0, 1300, 1290, 1390, 0):
        tracker.want("peer", (hop, ours._replace(mtu=mtu)))
        tracker.saw_all(_unasked_for(kernel.dump(True)))
        assert kernel.apply(tracker.pending()) == []
        with socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.connect((target, 9))
            level, option = (socket.IPPROTO_IP, IP_MTU) if family == 4 else (socket.IPPROTO_IPV6, IPV6_MTU)
            assert sock.getsockopt(level, option) == (mtu or 1400)


@pytest.mark.parametrize("what", ["dst 172.30.0.9 port 99", "dst 172.30.0.9 vni 7", "dst 172.30.0.9 via under0"])
def test_fdb_entry_with_an_own_port_or_vni_or_link_is_not_taken_for_a_plain_one(kernel: Kernel, what: str) -> None:
    sh(*f"bridge fdb add 02:00:00:00:00:09 dev flannel.1 {what}".split())
    assert _unasked_for(kernel.dump(True)) == [
        Fdb((kernel.tunnels[4], bytes.fromhex("020000000009")), b"", PERMANENT | NOARP)
    ]


@pytest.mark.parametrize("base", ["10.9.", "fd00:9:"])
def test_routes_with_several_gateways_are_unequal_to_any_of_ours(kernel: Kernel, base: str) -> None:
    block, hops = (
        ("10.9.0.0/24", ("10.9.0.0", "10.9.1.0")) if "." in base else ("fd00:9::/64", ("fd00:9::", "fd00:9::1"))
    )
    kernel.observe()
    several = " ".join(f"nexthop via {gateway} dev flannel.1 onlink" for gateway in hops)
    ip(f"route add {block} protocol {PROTOCOL} {several}")
    found = Route(Prefix.parse(block))
    assert set(kernel.observe().sights) == {found}
    assert _unasked_for(kernel.dump(True)) == [found]
    ours = Route(found.destination, gateway=found.destination.base, device=kernel.tunnels[4])
    assert kernel.apply([Put(ours, afresh=True)]) == []
    assert _unasked_for(kernel.dump(True)) == [ours]


def _rank(entry: Entry) -> int:
    return BUILD_ORDER.index(type(entry))

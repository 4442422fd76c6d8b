"""Our codec against others': byte for byte what pyroute2 sends, entry for entry what pyroute2 and iproute2 read.

Messages are compared as they went over the socket. Sequence number and port id alone are left out: they number a
conversation and say nothing of an entry. pyroute2 writes attributes in the order of its arguments, which is the only
freedom taken here. It knows no nexthop objects: those, and the routes on them, iproute2 makes and reads.
"""

import random
from collections.abc import Iterator
from typing import Any

import pytest
from pyroute2 import IPRoute
from pyroute2.netlink.nlsocket import NetlinkRequest

from overlay import rtnl
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
)
from subnet_lease.model import Prefix, format_address, format_mac, pack_address
from tests.netns.namespace import ip, ip_json, new_namespace, sh, veth

pytestmark = pytest.mark.netns

MANY = 200
NOARP = 0x40
"""pyroute2 adds NUD_NOARP to whatever state an FDB entry is asked to have."""


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    """A kernel with our device, in a namespace of its own."""
    with new_namespace():
        link = veth("under0", "under1", "172.30.0.5/24")
        made = Kernel()
        local, address = pack_address("172.30.0.5"), Prefix.parse("10.0.0.0/32")
        made.ensure_device(DeviceSpec("flannel.1", 1, 8472, link, local, derived_mac("codec"), 1450, address))
        yield made
        made.close()


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


def generated(seed: int, device: int) -> Iterator[tuple[Fdb, Neighbour, NextHop, Route, Route]]:
    """Entries of many peers: distinct subnets of all usual lengths, arbitrary MACs and remotes."""
    numbers = random.Random(seed)
    for number in range(1, MANY + 1):
        length = numbers.randint(16, 30)
        base = Prefix(pack_address(f"10.{number}.{numbers.randrange(256)}.{numbers.randrange(256)}"), 32).network(
            length
        )
        mac = bytes([numbers.randrange(256) & 0xFC | 2]) + numbers.randbytes(5)
        remote = bytes([numbers.choice((100, 172, 192)), *numbers.randbytes(3)])
        identity = NEXTHOP_BASE + base.first % NEXTHOP_SPAN
        yield (
            Fdb(mac, remote),
            Neighbour(base.base, mac),
            NextHop(identity, base.base, device),
            Route(base, nexthop=identity),
            Route(base.network(length), gateway=base.base, device=device),
        )


def through_nexthops(peers: list[tuple[Fdb, Neighbour, NextHop, Route, Route]]) -> list[Entry]:
    """All their entries but the plain routes."""
    return [entry for fdb, neighbour, hop, route, _ in peers for entry in (fdb, neighbour, hop, route)]


# --- building ---


def test_fdb_messages_are_those_of_pyroute2(kernel: Kernel, pyroute: Recorder) -> None:
    for fdb, *_ in generated(1, kernel.device):
        asked = {"ifindex": kernel.device, "lladdr": format_mac(fdb.mac), "flags": rtnl.NTF_SELF}
        pyroute.route.fdb("replace", **asked, dst=format_address(fdb.remote), state=fdb.state)
        assert unnumbered(rtnl.put(fdb, kernel.device, 0)) == unnumbered(pyroute.sent), fdb
        pyroute.route.fdb("del", state=PERMANENT | NOARP, **asked)
        ours = rtnl.drop(Fdb(fdb.mac, fdb.remote, PERMANENT | NOARP), kernel.device, 0)
        assert unnumbered(ours) == unnumbered(pyroute.sent), fdb


def test_neighbour_messages_are_those_of_pyroute2(kernel: Kernel, pyroute: Recorder) -> None:
    for _, neighbour, *_ in generated(2, kernel.device):
        asked = {"ifindex": kernel.device, "dst": format_address(neighbour.address), "state": "permanent"}
        pyroute.route.neigh("replace", **asked, lladdr=format_mac(neighbour.mac))
        assert unnumbered(rtnl.put(neighbour, kernel.device, 0)) == unnumbered(pyroute.sent), neighbour
        pyroute.route.neigh("del", **asked)
        assert unnumbered(rtnl.drop(neighbour, kernel.device, 0)) == unnumbered(pyroute.sent), neighbour


def test_route_messages_are_those_of_pyroute2(kernel: Kernel, pyroute: Recorder) -> None:
    for *_, route in generated(3, kernel.device):
        gateway = format_address(route.gateway)
        asked = {"dst": str(route.destination), "proto": route.protocol}
        pyroute.route.route("replace", **asked, gateway=gateway, oif=kernel.device, flags=["onlink"])
        assert unnumbered(rtnl.put(route, kernel.device, 0)) == unnumbered(pyroute.sent), route
        pyroute.route.route("del", scope=rtnl.RT_SCOPE_NOWHERE, type=0, **asked)
        assert unnumbered(rtnl.drop(route, kernel.device, 0)) == unnumbered(pyroute.sent), route


# --- reading ---


def test_what_we_put_pyroute2_and_iproute2_read_the_same(kernel: Kernel) -> None:
    peers = list(generated(5, kernel.device))
    assert not kernel.apply([Put(entry) for entry in through_nexthops(peers)])
    macs = {format_mac(fdb.mac): format_address(fdb.remote) for fdb, *_ in peers}
    addresses = {format_address(neighbour.address): format_mac(neighbour.mac) for _, neighbour, *_ in peers}
    hops = {hop.id: format_address(hop.gateway) for _, _, hop, *_ in peers}
    with IPRoute() as route:
        fdb = {e.get_attr("NDA_LLADDR"): e for e in route.fdb("dump", ifindex=kernel.device)}
        assert {mac: e.get_attr("NDA_DST") for mac, e in fdb.items()} == macs
        assert {(e["state"], e["flags"]) for e in fdb.values()} == {(PERMANENT, rtnl.NTF_SELF)}
        neighbours = route.get_neighbours(family=rtnl.AF_INET, ifindex=kernel.device, state=PERMANENT)
        assert {e.get_attr("NDA_DST"): e.get_attr("NDA_LLADDR") for e in neighbours} == addresses
        routes = route.get_routes(family=rtnl.AF_INET, proto=PROTOCOL)
        assert {(e.get_attr("RTA_DST"), e["dst_len"], e.get_attr("RTA_GATEWAY")) for e in routes} == {
            (format_address(r.destination.base), r.destination.length, hops[r.nexthop]) for *_, r, _ in peers
        }
    shown = ip_json("nexthop show dev flannel.1")
    assert {e["id"]: e["gateway"] for e in shown} == hops
    assert {(e["dev"], e["protocol"], *e["flags"]) for e in shown} == {("flannel.1", str(PROTOCOL), "onlink")}
    routed = {(e["dst"], e["nhid"], e["dev"]) for e in ip_json(f"route show protocol {PROTOCOL}")}
    assert routed == {(str(r.destination), r.nexthop, "flannel.1") for *_, r, _ in peers}
    bridge = sh("bridge", "fdb", "show", "dev", "flannel.1").splitlines()
    assert {line.strip() for line in bridge} == {f"{mac} dst {dst} self permanent" for mac, dst in macs.items()}


def test_what_iproute2_makes_we_read_the_same(kernel: Kernel) -> None:
    peers = list(generated(6, kernel.device))
    made: set[Entry] = set()
    for fdb, neighbour, hop, route, _ in peers[:40]:
        sh(*f"bridge fdb add {format_mac(fdb.mac)} dev flannel.1 dst {format_address(fdb.remote)}".split())
        ip(f"neigh add {format_address(neighbour.address)} lladdr {format_mac(neighbour.mac)} dev flannel.1")
        ip(f"nexthop add id {hop.id} via {format_address(hop.gateway)} dev flannel.1 onlink protocol {PROTOCOL}")
        ip(f"route add {route.destination} nhid {hop.id} protocol {PROTOCOL}")
        # `bridge` adds NUD_NOARP to permanent entries.
        made |= {Fdb(fdb.mac, fdb.remote, PERMANENT | NOARP), neighbour, hop, route}
    for *_, route in peers[40:]:
        ip(f"route add {route.destination} via {format_address(route.gateway)} dev flannel.1 onlink")
        made.add(Route(route.destination, gateway=route.gateway, device=kernel.device, protocol=PROTOCOL_BOOT))
    assert set(kernel.dump(True)) == made


@pytest.mark.parametrize("seed", range(5))
def test_every_kind_of_entry_comes_back_from_the_kernel_as_it_was_put(kernel: Kernel, seed: int) -> None:
    peers = list(generated(seed, kernel.device))
    through_hops = through_nexthops(peers)
    assert not kernel.apply([Put(entry) for entry in sorted(through_hops, key=_rank)])
    assert sorted(map(repr, kernel.dump(True))) == sorted(map(repr, through_hops))
    # And once more with gateways of their own, in the place of those through nexthop objects.
    plain = [route for *_, route in peers]
    assert not kernel.apply([Put(route) for route in plain])
    there = [entry for entry in kernel.dump(True) if isinstance(entry, Route)]
    assert sorted(map(repr, there)) == sorted(map(repr, plain))
    everything: list[Entry] = [*(entry for entry in through_hops if not isinstance(entry, Route)), *plain]
    assert not kernel.apply([Drop(entry) for entry in sorted(everything, key=_rank)[::-1]])
    assert not list(kernel.dump(True))


def test_notifications_say_what_dumps_say(kernel: Kernel) -> None:
    kernel.observe()
    stranger = Kernel()
    stranger.device = kernel.device
    entries = through_nexthops(list(generated(9, kernel.device)))
    stranger.apply([Put(entry) for entry in entries])
    stranger.close()
    assert list(kernel.observe().sights) == entries
    assert set(kernel.dump(True)) == set(entries)


@pytest.mark.parametrize(
    "line",
    [
        "route add 10.9.0.0/24 via 10.9.0.0 dev flannel.1 onlink metric 5",
        "route add 10.9.0.0/24 via 10.9.0.0 dev flannel.1 onlink table 100",
        "route add 10.9.0.0/24 tos 4 via 10.9.0.0 dev flannel.1 onlink",
        "neigh add fd00::9 lladdr 02:00:00:00:00:09 dev flannel.1",
        "neigh add 172.30.0.9 lladdr 02:00:00:00:00:09 dev under0",
    ],
)
def test_what_is_under_no_key_of_ours_is_not_seen(kernel: Kernel, line: str) -> None:
    kernel.observe()
    ip(line)
    assert kernel.observe().sights == ()
    assert not list(kernel.dump(True))


@pytest.mark.parametrize("more", ["mtu 1000", "src 10.0.0.0"])
def test_route_that_carries_what_we_never_set_is_unequal_to_ours(kernel: Kernel, more: str) -> None:
    hop = NextHop(NEXTHOP_BASE + 256, pack_address("10.0.1.0"), kernel.device)
    ours = Route(Prefix.parse("10.0.1.0/24"), nexthop=hop.id)
    kernel.apply([Put(hop), Put(ours)])
    kernel.observe()
    ip(f"route replace 10.0.1.0/24 nhid {hop.id} protocol {PROTOCOL} {more}")
    (seen,) = kernel.observe().sights
    assert isinstance(seen, Route) and seen.destination == ours.destination and seen != ours
    assert seen in kernel.dump(True)


@pytest.mark.parametrize("what", ["dst 172.30.0.9 port 99", "dst 172.30.0.9 vni 7", "dst 172.30.0.9 via under0"])
def test_fdb_entry_with_an_own_port_or_vni_or_link_is_not_taken_for_a_plain_one(kernel: Kernel, what: str) -> None:
    sh(*f"bridge fdb add 02:00:00:00:00:09 dev flannel.1 {what}".split())
    assert list(kernel.dump(True)) == [Fdb(bytes.fromhex("020000000009"), b"", PERMANENT | NOARP)]


def test_routes_with_several_gateways_are_unequal_to_any_of_ours(kernel: Kernel) -> None:
    kernel.observe()
    ip(
        f"route add 10.9.0.0/24 protocol {PROTOCOL}"
        " nexthop via 10.9.0.0 dev flannel.1 onlink nexthop via 10.9.1.0 dev flannel.1 onlink"
    )
    assert kernel.observe().sights == (Route(Prefix.parse("10.9.0.0/24")),)


def _rank(entry: Entry) -> int:
    return BUILD_ORDER.index(type(entry))

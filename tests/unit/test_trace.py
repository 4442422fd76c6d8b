"""What `trace` makes of the kernel's answers: in order, up to the first that is wrong."""

import errno
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from overlay.model import PROTOCOL
from overlay.roster import Member, Roster
from overlay.rules import Filters
from overlay.trace import (
    AWAY,
    LOCAL,
    NOTE,
    POD,
    WRONG,
    Entrance,
    Hop,
    Link,
    Packet,
    PolicyRule,
    Step,
    Trace,
    Way,
    as_json,
    headline,
    line,
)
from subnet_lease.model import Prefix, pack_address, pack_mac

OWN, FAR, FAR_MAC = pack_address("172.30.0.11"), pack_address("172.30.0.12"), pack_mac("02:00:00:00:00:02")
POD1, POD2, GATEWAY = map(pack_address, ("10.244.1.2", "10.244.2.2", "10.244.1.1"))
FAR_BASE, FAR_SUBNET = pack_address("10.244.2.0"), Prefix.parse("10.244.2.0/24")
NOBODY = pack_address("10.244.9.9")
BLOCK = Prefix.parse("10.244.0.0/16")
OUTSIDE = pack_address("8.8.8.8")

ETH0 = Link(2, "eth0", True, True, 1500, mac=pack_mac("02:00:00:00:00:11"))
TUNNEL = Link(3, "flannel.1", True, True, 1450, "vxlan", pack_mac("02:00:00:00:00:01"), 0, 2, 1, 8472, OWN)
CNI0 = Link(4, "cni0", True, True, 1450, "bridge", pack_mac("02:00:00:00:00:44"))
PORT = Link(5, "p1", True, True, 1450, "veth", pack_mac("02:00:00:00:00:55"), 4)

H1 = Member("h1", (OWN,), {4: TUNNEL.mac}, (Prefix.parse("10.244.1.0/24"),))
H2 = Member("h2", (FAR,), {4: FAR_MAC}, (FAR_SUBNET,))
ROSTER = Roster((H1, H2), vni=1, blocks=(BLOCK,))

TO_FAR = Way(device=3, gateway=FAR_BASE, entry=FAR_SUBNET, protocol=PROTOCOL)
DEFAULT = Way(device=2, gateway=pack_address("172.30.0.1"), entry=Prefix.parse("0.0.0.0/0"), protocol=3)
DIRECT = Way(device=2, gateway=FAR, entry=FAR_SUBNET, protocol=PROTOCOL)
NONE = Way(errno=101)


@dataclass
class Fake:
    """A kernel whose answers stand in tables; `entering` has those for packets that come in, where they differ."""

    links: dict[int, Link] = field(default_factory=lambda: {each.number: each for each in (ETH0, TUNNEL, CNI0, PORT)})
    addresses: Mapping[bytes, int] = field(default_factory=lambda: {OWN: 2, H1.subnets[0].base: 3, GATEWAY: 4})
    ways: dict[bytes, Way] = field(
        default_factory=lambda: {
            POD1: Way(device=4, entry=H1.subnets[0], protocol=2),
            POD2: TO_FAR,
            FAR: Way(device=2, entry=Prefix.parse("172.30.0.0/16"), protocol=2),
            GATEWAY: Way(kind=LOCAL, device=1),
        }
    )
    entering: dict[bytes, Way] = field(default_factory=dict)
    refusing: list[Way] = field(default_factory=list)
    policy: list[PolicyRule] = field(default_factory=list)
    neighbours: dict[bytes, Hop] = field(
        default_factory=lambda: {
            FAR_BASE: Hop(FAR_MAC, 0x80),
            FAR: Hop(pack_mac("02:00:00:00:00:99"), 2),
            POD1: Hop(pack_mac("02:00:00:00:00:77"), 2),
        }
    )
    fdb: dict[bytes, bytes] = field(default_factory=lambda: {FAR_MAC: FAR})
    ports: dict[bytes, int] = field(default_factory=lambda: {pack_mac("02:00:00:00:00:77"): 5})
    forwards: bool = True
    filters: dict[str, int] = field(default_factory=dict)

    def way(self, dst: bytes, *, src: bytes = b"", into: int = 0, protocol: str = "", port: int = 0) -> Way:
        if into and dst in self.entering:
            return self.entering[dst]
        return self.ways.get(dst, DEFAULT)

    def refusals(self, dst: bytes) -> list[Way]:
        return self.refusing

    def rules(self, family: int) -> list[PolicyRule]:
        return self.policy

    def neighbour(self, address: bytes, device: int) -> Hop | None:
        return self.neighbours.get(address)

    def remote(self, mac: bytes, device: int) -> bytes | None:
        return self.fdb.get(mac)

    def bridge_port(self, mac: bytes, bridge: int) -> int | None:
        return self.ports.get(mac)

    def entrance(self, version: int, device: str) -> Entrance:
        return Entrance(device, self.forwards, self.filters.get(device, 0))


def steps(
    kernel: Fake,
    src: bytes = POD1,
    dst: bytes = POD2,
    roster: Roster = ROSTER,
    rules: Filters | None = None,
    **more: Any,
) -> list[Step]:
    return list(Trace(kernel, rules or Filters(), roster, Packet(src, dst, **more)).steps())


def wrong(kernel: Fake, *arguments: Any, **more: Any) -> Step:
    """The step that is wrong, which is the last, and the only such."""
    found = steps(kernel, *arguments, **more)
    assert [step.state == WRONG for step in found] == [False] * (len(found) - 1) + [True], found
    assert found[-1].command and found[-1].remedy
    return found[-1]


def is_open(kernel: Fake, *arguments: Any, **more: Any) -> list[Step]:
    found = steps(kernel, *arguments, **more)
    assert all(step.state != WRONG for step in found), found
    return found


def without(mapping: dict[Any, Any], key: Any) -> dict[Any, Any]:
    return {each: value for each, value in mapping.items() if each != key}


# --- what is right -----------------------------------------------------------------------------------------------


def test_a_pods_packet_is_followed_to_the_underlays_neighbour() -> None:
    places = [step.where for step in is_open(Fake())]
    assert places == [
        "source",
        "lease",
        "device",
        "forwarding",
        "route",
        "mtu",
        "firewall",
        "neighbour",
        "fdb",
        "underlay route",
        "underlay mtu",
        "underlay firewall",
        "underlay neighbour",
    ]


def test_the_hosts_own_packet_is_not_forwarded() -> None:
    assert "forwarding" not in [step.where for step in is_open(Fake(forwards=False), OWN)]


def test_what_arrives_is_followed_to_the_pods_port() -> None:
    places = [step.where for step in is_open(Fake(), POD2, POD1)]
    assert places[:5] == ["lease", "device", "underlay rp_filter", "underlay firewall", "rp_filter"]
    assert places[-2:] == ["neighbour", "bridge"]
    assert is_open(Fake(), POD2, OWN)[-1].where == "route"


def test_between_two_of_this_host_there_is_only_the_link() -> None:
    assert [step.where for step in is_open(Fake(), GATEWAY, POD1)] == ["source", "route", "mtu", "neighbour", "bridge"]
    assert [step.where for step in is_open(Fake(), POD1, OWN)] == ["source", "route"]


def test_without_leases_the_kernel_alone_tells_who_is_here() -> None:
    nothing = Roster()
    found = is_open(Fake(), roster=nothing)
    assert found[1].state == NOTE and found[-1].where == "underlay neighbour"
    trace = Trace(Fake(), Filters(), nothing, Packet(POD1, FAR))
    assert (trace.origin, trace.target, trace.own) == (POD, AWAY, None)
    stranger = Trace(Fake(addresses={}), Filters(), replace(ROSTER, members=(H2,)), Packet(POD1, FAR))
    assert (stranger.origin, stranger.target) == (POD, AWAY)
    assert is_open(Fake(), POD2, POD1, nothing)[-1].where == "bridge"
    assert is_open(Fake(), FAR, POD1, nothing)[-1].where == "bridge"


def test_routes_without_tunnels_end_at_the_peer() -> None:
    for roster in (replace(ROSTER, direct=True), replace(ROSTER, direct=True, vni=None)):
        kernel = Fake()
        kernel.ways[POD2] = DIRECT
        found = is_open(kernel, roster=roster)
        assert (found[-1].where, "172.30.0.12" in found[-1].what) == ("neighbour", True)
        assert is_open(kernel, POD2, POD1, roster)[-1].where == "bridge"
    beyond = Fake()
    beyond.ways[FAR] = DEFAULT
    assert is_open(beyond, roster=replace(ROSTER, direct=True))[-1].where == "underlay neighbour"


def test_what_is_outside_of_the_overlay_is_followed_as_it_is() -> None:
    found = is_open(Fake(), dst=OUTSIDE)
    assert found[1].state == NOTE and found[-1].where == "neighbour" and found[-1].state == NOTE
    assert found[3].what == "by default via 172.30.0.1 dev eth0"
    assert is_open(Fake(), dst=FAR)[-1].where == "neighbour"


def test_this_host_is_known_by_its_address_and_by_its_mac() -> None:
    def own(kernel: Fake, *members: Member) -> Member | None:
        return Trace(kernel, Filters(), replace(ROSTER, members=members), Packet(POD1, POD2)).own

    both = Fake(addresses={OWN: 2, FAR: 1})
    assert own(both, H2, H1) == own(both, H1, H2) == H1
    assert own(Fake(addresses={}), H2, H1) == H1
    assert own(Fake(addresses={}), H2) is None and own(both) is None


def test_peers_without_an_end_of_a_tunnel_that_fits_are_not_judged() -> None:
    other = H2._replace(macs={16: FAR_MAC})
    assert is_open(Fake(), roster=replace(ROSTER, members=(H1, other)))
    assert is_open(Fake(), POD2, POD1, replace(ROSTER, members=(H1, other)))


# --- what is wrong: where it comes from --------------------------------------------------------------------------


def test_a_source_of_nobody_is_named() -> None:
    assert "10.244.9.9 is no address of this host" in wrong(Fake(), NOBODY).what
    assert wrong(Fake(), POD2, NOBODY).what.startswith("10.244.2.2 is h2 (172.30.0.12, 10.244.2.0/24)'s")
    assert "(not known)" in wrong(Fake(ways={}), NOBODY, POD2, Roster()).what


@pytest.mark.parametrize(
    ("way", "says"),
    [
        (NONE, "there is no route to 10.244.1.2"),
        (DEFAULT, "by eth0 via 172.30.0.1"),
        (Way(device=3, entry=BLOCK), "by flannel.1"),
        (Way(device=2, entry=BLOCK), "by eth0"),
    ],
)
def test_a_pods_address_must_be_on_a_link_here(way: Way, says: str) -> None:
    kernel = Fake()
    kernel.ways[POD1] = way
    assert says in wrong(kernel).what and wrong(kernel).where == "source"
    assert says in wrong(kernel, POD2, POD1).what and wrong(kernel, POD2, POD1).where == "route"
    assert wrong(kernel, OWN, POD1).where == "route"


def test_a_pods_link_that_is_down_is_named() -> None:
    kernel = Fake()
    kernel.links[4] = CNI0._replace(up=False)
    assert wrong(kernel).what == "cni0 is down"


def test_a_destination_that_nobody_leases_is_named() -> None:
    assert wrong(Fake(), dst=NOBODY).where == "lease"
    assert wrong(Fake(), NOBODY, POD1).where == "lease"


# --- devices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("link", "says"),
    [
        (TUNNEL._replace(name="other"), "there is no VXLAN device flannel.1"),
        (TUNNEL._replace(kind="dummy"), "there is no VXLAN device flannel.1"),
        (TUNNEL._replace(up=False), "flannel.1 is down"),
        (ETH0._replace(up=False), "eth0 is down"),
        (ETH0._replace(running=False), "eth0 has no carrier"),
    ],
)
def test_devices_that_do_not_work_are_named(link: Link, says: str) -> None:
    kernel = Fake()
    kernel.links[link.number] = link
    for ends in ((POD1, POD2), (POD2, POD1)):
        assert (wrong(kernel, *ends).where, wrong(kernel, *ends).what) == ("device", says)


def test_without_an_underlay_that_is_known_only_the_tunnel_is_looked_at() -> None:
    kernel = Fake()
    kernel.links[3] = TUNNEL._replace(lower=99)
    assert is_open(kernel)[2].what == "flannel.1: up"
    assert Trace(kernel, Filters(), ROSTER, Packet(POD1, POD2)).path()[1] == ("cni0", "flannel.1")


def test_forwarding_that_is_off_is_named() -> None:
    assert wrong(Fake(forwards=False)).what.endswith("packets that come in by cni0")
    assert wrong(Fake(forwards=False), POD2, POD1).what.endswith("packets that come in by flannel.1")


# --- routes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "says"),
    [
        (DEFAULT, "the route to 10.244.2.0/24 is missing, so it goes by default via 172.30.0.1 dev eth0"),
        (DIRECT._replace(entry=Prefix.parse("10.244.2.2/32"), protocol=4), "in the way, of protocol static"),
        (DIRECT._replace(protocol=99), "in the way, of protocol 99"),
        (TO_FAR._replace(gateway=NOBODY), "via 10.244.9.9 dev flannel.1, not via 10.244.2.0 dev flannel.1"),
        (DIRECT._replace(table=77), "rule 5 sends it to table 77"),
        (DIRECT._replace(table=78), "a policy rule sends it to table 78"),
    ],
)
def test_a_route_that_is_not_as_the_lease_wants_it_is_named(way: Way, says: str) -> None:
    kernel = Fake(policy=[PolicyRule(0, 255), PolicyRule(5, 77)])
    kernel.ways[POD2] = way
    assert (wrong(kernel).where, says in wrong(kernel).what) == ("route", True)


def test_a_route_that_is_not_by_the_peer_is_named_without_tunnels() -> None:
    kernel = Fake()
    kernel.ways[POD2] = DIRECT._replace(gateway=NOBODY)
    assert wrong(kernel, roster=replace(ROSTER, direct=True)).what.endswith("not via 172.30.0.12")


def test_routes_that_lose_packets_are_named() -> None:
    last = Way(kind=7, entry=Prefix.parse("0.0.0.0/0"), protocol=2)
    hole = Way(kind=6, entry=BLOCK)
    kernel = Fake(refusing=[last, hole])
    kernel.ways[POD2] = NONE
    assert wrong(kernel).what == "the blackhole route to 10.244.0.0/16 loses packets for 10.244.2.2"
    kernel.refusing = [hole._replace(kind=99)]
    kernel.ways[POD2] = Way(kind=6)
    assert wrong(kernel).what.startswith("the refusing route")
    kernel.refusing = [last]
    assert wrong(kernel).what == "there is no route to 10.244.2.2"
    kernel.ways[OUTSIDE] = NONE
    assert wrong(kernel, dst=OUTSIDE).remedy == "add one, or a default route"


def test_a_packet_that_only_this_host_may_send_is_named() -> None:
    kernel = Fake(entering={POD2: NONE, POD1: NONE})
    assert "though it has a route for its own" in wrong(kernel).what
    assert wrong(kernel, POD2, POD1).where == "entering"


# --- sizes and filters -------------------------------------------------------------------------------------------


def test_what_is_too_large_is_cut_or_refused() -> None:
    (note,) = [step for step in is_open(Fake(), size=1460) if step.where == "mtu"]
    assert note.state == NOTE
    assert (
        wrong(Fake(), size=1460, df=True).what
        == "1460 bytes are more than the MTU 1450 of flannel.1, and may not be cut"
    )
    kernel = Fake()
    kernel.ways[POD2] = TO_FAR._replace(mtu=1400)
    assert "the route's MTU 1400" in wrong(kernel, size=1410, df=True).what
    kernel = Fake()
    kernel.links[2] = ETH0._replace(mtu=1400)
    assert wrong(kernel, size=1360, df=True).where == "underlay mtu"
    assert "1350 bytes" in wrong(kernel, size=1360, df=True).remedy
    assert is_open(kernel, size=1360)


def chain(where: str, hook: str, *rules: list[dict[str, Any]], policy: str = "accept") -> list[dict[str, Any]]:
    family, table, name = where.split()
    base = {"family": family, "table": table, "name": name, "hook": hook, "prio": 0, "policy": policy}
    listed = [{"rule": {"family": family, "table": table, "chain": name, "expr": expr}} for expr in rules]
    return [{"chain": base}, *listed]


DROP: list[dict[str, Any]] = [{"drop": None}]


@pytest.mark.parametrize(
    ("filters", "ends", "where", "remedy"),
    [
        (
            Filters({"nftables": chain("ip t c", "forward", DROP)}),
            (POD1, POD2),
            "firewall",
            "ip t c ip daddr 10.244.2.2",
        ),
        (Filters({"nftables": chain("ip t c", "output", DROP)}), (OWN, POD2), "firewall", "nft insert rule ip t c"),
        (Filters({"nftables": chain("ip t c", "output", DROP)}), (POD1, POD2), "underlay firewall", "nft insert"),
        (
            Filters({"nftables": chain("inet overlay_agent guard", "input", DROP)}),
            (POD2, POD1),
            "underlay firewall",
            "if it is a host",
        ),
        (
            Filters({"nftables": chain("inet overlay_agent x", "forward", DROP)}),
            (POD2, POD1),
            "firewall",
            "no peer has",
        ),
        (Filters({"nftables": chain("ip t c", "prerouting", DROP)}), (POD2, OWN), "firewall", "nft insert"),
        (Filters(iptables={"iptables-nft": ["-P FORWARD DROP"]}), (POD1, POD2), "firewall", "-I FORWARD -d 10.244.2.2"),
        (
            Filters(iptables={"iptables-nft": ["-A FORWARD -i cni0 -j DROP"]}),
            (POD1, POD2),
            "firewall",
            "iptables-nft -D FORWARD -i cni0 -j DROP",
        ),
    ],
)
def test_filters_that_refuse_are_named(filters: Filters, ends: tuple[bytes, bytes], where: str, remedy: str) -> None:
    found = wrong(Fake(), *ends, rules=filters)
    assert (found.where, remedy in found.remedy) == (where, True), found


def test_filters_that_may_refuse_are_remarked_on() -> None:
    doubt = Filters({"nftables": chain("ip t c", "forward", [{"xt": None}, {"drop": None}])})
    (note,) = [step for step in is_open(Fake(), rules=doubt) if step.where == "firewall"]
    assert note.state == NOTE and "nftables ip t c: xt drop" in note.what
    fine = Filters({"nftables": chain("ip t c", "forward")})
    (right,) = [step for step in is_open(Fake(), rules=fine) if step.where == "firewall"]
    assert right.what == "no rule of 1 chain refuses it"


# --- entries -----------------------------------------------------------------------------------------------------


def test_entries_that_are_missing_or_wrong_are_named() -> None:
    kernel = Fake()
    for wanting in (without(kernel.neighbours, FAR_BASE), {**kernel.neighbours, FAR_BASE: Hop(b"", 1)}):
        assert wrong(Fake(neighbours=wanting)).what == "neighbour 10.244.2.0 on flannel.1 is missing"
    other = {**kernel.neighbours, FAR_BASE: Hop(ETH0.mac, 0x80)}
    assert "the lease says 02:00:00:00:00:02" in wrong(Fake(neighbours=other)).what
    assert wrong(Fake(fdb={})).what == "FDB entry 02:00:00:00:00:02 on flannel.1 is missing"
    assert "leads to 172.30.0.11; the lease says 172.30.0.12" in wrong(Fake(fdb={FAR_MAC: OWN})).what
    assert wrong(Fake(fdb={FAR_MAC: b""})).what == "FDB entry 02:00:00:00:00:02 on flannel.1 has no remote"
    assert is_open(Fake(fdb={FAR_MAC: b""}), roster=Roster())[-1].state == NOTE


def test_neighbours_that_do_not_answer_are_named() -> None:
    silent = {**Fake().neighbours, FAR: Hop(b"", 0x20), POD1: Hop(b"", 0x20)}
    assert wrong(Fake(neighbours=silent)).where == "underlay neighbour"
    assert wrong(Fake(neighbours=silent), POD2, POD1).what == "nobody answers for 10.244.1.2 on cni0"
    assert is_open(Fake(neighbours=without(silent, POD1)), POD2, POD1)[-1].state == NOTE


def test_the_ports_of_the_pods_bridge_are_looked_at() -> None:
    kernel = Fake(ports={})
    assert is_open(kernel, POD2, POD1)[-1].state == NOTE
    down = Fake()
    down.links[5] = PORT._replace(up=False)
    assert wrong(down, POD2, POD1).where == "bridge"
    gone = Fake()
    del gone.links[5]
    assert is_open(gone, POD2, POD1)[-1].what.endswith("is at port interface 5 of cni0")
    plain = Fake()
    plain.links[4] = CNI0._replace(kind="veth")
    assert is_open(plain, POD2, POD1)[-1].where == "neighbour"


# --- the underlay ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "says"),
    [
        (NONE, "there is no route to 172.30.0.12"),
        (Way(kind=LOCAL, device=1), "is this host's own too"),
        (Way(device=3, entry=Prefix(FAR, 32)), "would go into the tunnel flannel.1 themselves"),
        (Way(device=6, entry=Prefix(FAR, 32)), "eth1 is down"),
    ],
)
def test_an_underlay_that_leads_nowhere_is_named(way: Way, says: str) -> None:
    kernel = Fake()
    kernel.ways[FAR] = way
    kernel.links[6] = Link(6, "eth1", False, False, 1500)
    assert (wrong(kernel).where, says in wrong(kernel).what) == ("underlay route", True)


def test_a_tunnel_that_leaves_from_an_address_that_is_gone_is_named() -> None:
    assert wrong(Fake(addresses={H1.subnets[0].base: 3, GATEWAY: 4})).cause == "underlay_choice"


def test_the_reverse_path_filter_is_named() -> None:
    kernel = Fake(filters={"flannel.1": 1})
    assert is_open(kernel, POD2, POD1)
    kernel.entering[POD1] = Way(errno=errno.EXDEV)
    kernel.ways[POD2] = DEFAULT
    found = wrong(kernel, POD2, POD1)
    assert (found.where, found.cause, "the way back is by eth0" in found.what) == ("rp_filter", "rp_filter", True)
    kernel.ways[POD2] = NONE
    assert "no way leads back" in wrong(kernel, POD2, POD1).what
    assert "loose" in wrong(replace(kernel, filters={"flannel.1": 2}), POD2, POD1).what
    # Without a filter it is something else that the kernel has against it.
    assert wrong(replace(kernel, filters={}), POD2, POD1).where == "entering"
    outer = Fake(filters={"eth0": 1}, entering={OWN: Way(errno=errno.EINVAL)})
    assert wrong(outer, POD2, POD1).where == "underlay rp_filter"
    odd = Fake(filters={"flannel.1": 7})
    assert is_open(odd, POD2, POD1)


def test_what_hosts_and_pods_send_comes_by_the_way_that_its_destination_has() -> None:
    def entrance(src: bytes, dst: bytes, roster: Roster = ROSTER) -> str:
        (found,) = [step.what for step in is_open(Fake(), src, dst, roster) if step.where == "rp_filter"]
        return found.split()[5]

    assert [entrance(POD2, POD1), entrance(FAR, POD1), entrance(FAR, GATEWAY)] == ["flannel.1"] * 3
    assert [entrance(POD2, OWN), entrance(FAR, OWN)] == ["eth0"] * 2
    sixth = replace(ROSTER, members=(H1, H2._replace(addresses=(bytes(15) + b"1",))))
    assert entrance(POD2, OWN, sixth) == "flannel.1"


def test_where_no_interface_leads_to_the_sender_nothing_more_is_said() -> None:
    kernel = Fake()
    kernel.ways[OUTSIDE] = NONE
    assert wrong(kernel, OUTSIDE, POD1).where == "entrance"
    kernel = Fake()
    kernel.links = without(kernel.links, 2)
    kernel.links[3] = TUNNEL._replace(lower=0)
    kernel.ways[FAR] = Way(device=99)
    assert is_open(kernel, POD2, POD1)[2].where == "rp_filter"


# --- what is shown -----------------------------------------------------------------------------------------------


def test_the_path_of_a_packet_that_is_sent() -> None:
    def path(src: bytes, dst: bytes) -> tuple[str, ...]:
        return Trace(Fake(), Filters(), ROSTER, Packet(src, dst)).path()[1]

    assert path(POD1, POD2) == ("cni0", "flannel.1", "eth0")
    assert path(OWN, POD2) == ("flannel.1", "eth0")
    assert path(POD1, OUTSIDE) == ("cni0", "eth0")
    assert path(POD1, GATEWAY) == ("cni0",)
    assert path(POD1, POD1) == ("cni0",)


def test_people_see_a_line_for_each_step_and_more_for_what_is_wrong() -> None:
    packet = Packet(POD1, POD2, "udp", 53, 1400, True)
    trace = Trace(Fake(), Filters(), ROSTER, packet)
    assert headline(trace, packet) == (
        "10.244.1.2 (pod) > 10.244.2.2 (elsewhere): UDP to port 53, 1400 bytes, not to be cut"
    )
    assert headline(trace, Packet(POD1, POD2)).endswith("ICMP, 84 bytes")
    assert line(Step("route", "ok", "fine")) == f"  ok     {'route':<18}  fine"
    shown = line(Step("route", WRONG, "bad", "see", "do", "route_wrong")).splitlines()
    assert [each.split()[0] for each in shown] == ["WRONG", "shown", "cause", "mend"]
    assert len(line(Step("route", WRONG, "bad", "", "do")).splitlines()) == 2
    long = line(Step("route", WRONG, "word " * 30, "see", "mend " * 30)).splitlines()
    assert len(long) > 5 and all(len(each) <= 80 for each in long)


def test_programs_get_all_of_it() -> None:
    packet = Packet(POD1, POD2)
    trace = Trace(Fake(fdb={}), Filters(), ROSTER, packet)
    found = json.loads(json.dumps(as_json(trace, packet, list(trace.steps()), None)))
    assert (found["open"], found["wrong"]["where"], found["port"], found["from"]) == (False, "fdb", None, POD)
    assert [found["wrong"]["cause"], found["steps"][0]["cause"]] == ["fdb_wrong", None]
    sent = as_json(trace, packet._replace(protocol="udp", port=9), [], {"arrived": True})
    assert sent["open"] and sent["port"] == 9
    assert not as_json(trace, packet, [], {"arrived": False})["open"]
    assert (packet.version, Packet(bytes(16), bytes(16)).version) == (4, 6)

"""What the firewall does to packets: one router between a pod, another host with its pod, and the world outside.

Everything is tried in both address families. The sockets of all parties are in this process, each made in its
namespace; a packet has got through when the receiver has answered it and the sender has the answer.
"""

import contextlib
import itertools
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from overlay import firewall, iptables, nft
from overlay.firewall import Rules
from overlay.nft import Nftables
from subnet_lease.model import Prefix, pack_address
from tests.netns.firewall_table import complete
from tests.netns.namespace import entered, ip, new_namespace, sh, veth

pytestmark = pytest.mark.netns

VXLAN = 8472
SERVICE = 4000
NOTHING_COMES = 0.3
"""Seconds to wait for a packet that must not come; on a veth pair it would be there at once."""

PATIENCE = 10.0

_numbers = itertools.count()


@dataclass(frozen=True)
class Family:
    """Addresses of one family: the host's on each of its links, and those of the others. `v` is the IP version."""

    v: int
    block: str
    cni: str
    pod: str
    tunnel: str
    far_pod: str
    underlay: str
    peer: str
    uplink: str
    world: str
    length: int

    @property
    def prefix(self) -> Prefix:
        return Prefix.parse(self.block)

    @property
    def socket(self) -> socket.AddressFamily:
        return socket.AF_INET if self.v == 4 else socket.AF_INET6

    @property
    def whole(self) -> int:
        """The bits of an address."""
        return 32 if self.v == 4 else 128

    @property
    def all(self) -> str:
        return "0.0.0.0/0" if self.v == 4 else "::/0"


FOUR = Family(
    4, "10.0.0.0/8", "10.0.1.1", "10.0.1.5", "10.0.1.0", "10.0.2.5",
    "172.30.0.1", "172.30.0.2", "192.0.2.1", "192.0.2.9", 24,
)  # fmt: skip
SIX = Family(
    6, "fd00::/48", "fd00:0:0:1::1", "fd00:0:0:1::5", "fd00:0:0:1::", "fd00:0:0:2::5",
    "fd30::1", "fd30::2", "2001:db8::1", "2001:db8::9", 64,
)  # fmt: skip
FAMILIES = (FOUR, SIX)

RULES = Rules(
    (FOUR.prefix, SIX.prefix),
    (Prefix.parse("10.0.1.0/24"), Prefix.parse("fd00:0:0:1::/64")),
    ("tunnel",),
    VXLAN,
    masquerade=True,
)
HOSTS = [pack_address(text) for family in FAMILIES for text in (family.underlay, family.peer)]


@dataclass(frozen=True)
class Place:
    """Descriptors of the namespaces: this host, a pod of its, another host (with a pod in it), the world outside."""

    host: int
    pod: int
    peer: int
    world: int


@pytest.fixture
def place() -> Iterator[Place]:
    """The test lives in the host. `tunnel` stands for the VXLAN device: a name is all that rules see of it.

    As such a device has, it has the first address of the host's subnet, alone.
    """
    with (
        new_namespace() as host,
        new_namespace() as pod, entered(host),
        new_namespace() as peer, entered(host),
        new_namespace() as world, entered(host),
    ):  # fmt: skip
        for inside in (host, pod, peer, world):
            with entered(inside):
                # A router does not ask for neighbours until its own address is known to be nobody else's.
                Path("/proc/sys/net/ipv6/conf/default/accept_dad").write_text("0")
        for link, inside, ends in (
            ("cni0", pod, [(family.cni, family.pod) for family in FAMILIES]),
            ("tunnel", peer, [(family.tunnel, family.far_pod) for family in FAMILIES]),
            ("under0", peer, [(family.underlay, family.peer) for family in FAMILIES]),
            ("up0", world, [(family.uplink, family.world) for family in FAMILIES]),
        ):
            veth(link, f"far-{link}")
            ip(f"link set far-{link} netns /proc/{os.getpid()}/fd/{inside}")
            for family, (near, far) in zip(FAMILIES, ends, strict=True):
                ip(f"addr add {near}/{family.whole if link == 'tunnel' else family.length} dev {link} nodad")
                if link == "tunnel":
                    ip(f"-{family.v} route add {Prefix.parse(f'{far}/{family.length}', strict=False)} dev {link}")
                with entered(inside):
                    ip(f"addr add {far}/{family.length} dev far-{link} nodad")
                    ip(f"link set far-{link} up")
                    if link == "tunnel":
                        ip(f"-{family.v} route add {family.block} via {near} dev far-{link} onlink")
                    elif link != "under0":
                        ip(f"-{family.v} route add {family.all} via {near}")
        for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            Path("/proc/sys/net", name).write_text("1")
        yield Place(host, pod, peer, world)


def opened(namespace: int, family: Family, kind: int, address: str, port: int = 0) -> socket.socket:
    """A socket in a namespace, bound."""
    with entered(namespace):
        sock = socket.socket(family.socket, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((address, port))
    sock.settimeout(PATIENCE)
    return sock


def datagram(
    place: Place,
    family: Family,
    sender: str,
    source: str,
    receiver: str,
    target: str,
    *,
    ask: str = "",
    wait: float = PATIENCE,
) -> str | None:
    """The source address as the receiver saw it, once its answer has come back; None if nothing came in `wait`.

    `ask`: the address the sender writes to, where that is another than the one the receiver listens at.
    """
    listening = opened(getattr(place, receiver), family, socket.SOCK_DGRAM, target, SERVICE)
    sending = opened(getattr(place, sender), family, socket.SOCK_DGRAM, source)
    with listening, sending:
        listening.settimeout(wait)
        question = next(_numbers).to_bytes(8, "big")
        sending.sendto(question, (ask or target, SERVICE))
        asked = b""
        # An earlier question may have waited all the while for its way to be found.
        while asked != question:
            try:
                asked, came_from = listening.recvfrom(64)
            except TimeoutError:
                return None
        listening.sendto(b"answer", came_from)
        answer, answered_by = sending.recvfrom(64)
        assert (answer, answered_by[0]) == (b"answer", ask or target)
        return str(came_from[0])


def stream(
    place: Place,
    family: Family,
    sender: str,
    source: str,
    receiver: str,
    target: str,
    *,
    ask: str = "",
    wait: float = PATIENCE,
) -> str | None:
    """As `datagram`, over a TCP connection."""
    listening = opened(getattr(place, receiver), family, socket.SOCK_STREAM, target, SERVICE)
    sending = opened(getattr(place, sender), family, socket.SOCK_STREAM, source)
    with listening, sending:
        listening.listen()
        sending.settimeout(wait)
        try:
            sending.connect((ask or target, SERVICE))
        except TimeoutError:
            return None
        accepted, came_from = listening.accept()
        with accepted:
            accepted.sendall(b"answer")
            assert sending.recv(64) == b"answer"
        return str(came_from[0])


Transport = Callable[..., str | None]
both_families = pytest.mark.parametrize("family", FAMILIES, ids=["IPv4", "IPv6"])
both_transports = pytest.mark.parametrize("transport", [datagram, stream])


# --- masquerading ---


@both_transports
@both_families
@pytest.mark.parametrize(
    ("sender", "source", "receiver", "target", "seen"),
    [
        ("pod", "pod", "world", "world", "uplink"),
        ("pod", "pod", "peer", "far_pod", "pod"),
        ("peer", "far_pod", "pod", "pod", "far_pod"),
        ("pod", "pod", "peer", "peer", "pod"),
        ("peer", "peer", "pod", "pod", "peer"),
        ("host", "underlay", "peer", "far_pod", "underlay"),
        ("host", "uplink", "peer", "far_pod", "tunnel"),
        ("world", "world", "pod", "pod", "world"),
        ("world", "world", "peer", "far_pod", "tunnel"),
    ],
    ids=[
        "a pod that leaves the overlay has the host's address",
        "pod to pod keeps its address",
        "pod from pod keeps its address",
        "pod to a host of the cluster keeps its address",
        "a host of the cluster to a pod keeps its address",
        "this host to a pod elsewhere keeps its address in the cluster",
        "this host to a pod elsewhere hides an address that the cluster does not know",
        "a pod sees who calls from outside",
        "what comes from outside enters the overlay with our address",
    ],
)
def test_addresses_are_translated_as_documented(
    place: Place, transport: Transport, family: Family, sender: str, source: str, receiver: str, target: str, seen: str
) -> None:
    if "peer" in (source, target):
        # The other host's own addresses are on the underlay, where it has routes of its own to our pods.
        with entered(place.peer):
            ip(f"-{family.v} route add {family.pod} via {family.underlay}")
    nft.apply(complete(RULES, HOSTS))
    found = transport(place, family, sender, getattr(family, source), receiver, getattr(family, target))
    assert found == getattr(family, seen)


@both_families
def test_masqueraded_connections_are_counted_others_not(place: Place, family: Family) -> None:
    with contextlib.closing(Nftables()) as nftables:
        nftables.apply(complete(RULES, HOSTS))
        datagram(place, family, "pod", family.pod, "peer", family.far_pod)
        assert nftables.counters()[firewall.MASQUERADED] == 0
        datagram(place, family, "pod", family.pod, "world", family.world)
        stream(place, family, "pod", family.pod, "world", family.world)
        assert nftables.counters()[firewall.MASQUERADED] == 2


@both_families
def test_exceptions_see_the_pods_address(place: Place, family: Family) -> None:
    far = Prefix.parse(f"{family.world}/{family.length}", strict=False)
    elsewhere = Prefix.parse("198.51.100.0/24"), Prefix.parse("2001:db8:ffff::/48")
    nft.apply(complete(replace(RULES, exceptions=(*elsewhere, far)), HOSTS))
    assert datagram(place, family, "pod", family.pod, "world", family.world) == family.pod
    nft.apply(complete(replace(RULES, exceptions=elsewhere), HOSTS))
    assert datagram(place, family, "pod", family.pod, "world", family.world) == family.uplink


@both_families
def test_host_without_a_tunnel_translates_the_same(place: Place, family: Family) -> None:
    ip(f"-{family.v} route replace {family.far_pod} via {family.peer}")
    with entered(place.peer):
        ip(f"-{family.v} route replace {family.pod} via {family.underlay}")
        ip(f"-{family.v} route add {family.uplink} via {family.underlay}")
    nft.apply(complete(replace(RULES, devices=()), HOSTS))
    assert datagram(place, family, "pod", family.pod, "peer", family.far_pod) == family.pod
    assert datagram(place, family, "pod", family.pod, "world", family.world) == family.uplink
    assert datagram(place, family, "world", family.world, "peer", family.far_pod) == family.underlay


@both_families
def test_service_asked_for_by_another_host_is_answered_through_us(place: Place, family: Family) -> None:
    """A port of this host that leads to a pod elsewhere: the answer has to come back here to be turned round."""
    nft.apply(complete(RULES, HOSTS))
    name = "ip" if family.v == 4 else "ip6"
    where = family.far_pod if family.v == 4 else f"[{family.far_pod}]"
    nft.apply(
        f"table {name} service {{ chain c {{ type nat hook prerouting priority dstnat; "
        f"{name} daddr {family.underlay} udp dport {SERVICE} dnat to {where}:{SERVICE}; }}; }}\n"
    )
    seen = datagram(place, family, "peer", family.peer, "peer", family.far_pod, ask=family.underlay)
    assert seen == family.tunnel


KUBE = """\
*nat
:KUBE-SERVICES - [0:0]
:KUBE-POSTROUTING - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A KUBE-SERVICES -d {ask} -p udp -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SERVICES -d {ask} -p udp -j DNAT --to-destination {target}
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
COMMIT
"""


@both_families
@pytest.mark.parametrize("kind", ["legacy", "nft"])
@pytest.mark.parametrize("first", [True, False], ids=["kube-proxy first", "kube-proxy later"])
def test_kube_proxy_masquerades_what_it_has_marked(place: Place, family: Family, kind: str, first: bool) -> None:
    """From a pod to a service and on to a pod elsewhere, which would see the pod's address but for the mark."""
    ask = "10.96.0.1" if family.v == 4 else "fd96::1"
    text = KUBE.format(ask=ask, target=family.far_pod)
    program = f"{'iptables' if family.v == 4 else 'ip6tables'}-{kind}-restore"
    steps = [
        lambda: restored(program, text),
        lambda: nft.apply(complete(RULES, HOSTS)),
    ]
    for step in steps if first else reversed(steps):
        step()
    seen = datagram(place, family, "pod", family.pod, "peer", family.far_pod, ask=ask)
    assert seen == family.tunnel
    assert datagram(place, family, "pod", family.pod, "peer", family.far_pod) == family.pod


def restored(program: str, text: str) -> None:
    sh("sh", "-c", f"{program} --noflush <<'END'\n{text}END")


# --- forwarding ---

DOCKER = """\
*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
-I FORWARD -o docker0 -j DOCKER
-I FORWARD -j DOCKER-ISOLATION-STAGE-1
-I FORWARD -j DOCKER-USER
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
"""


def program_of(family: Family, kind: str) -> str:
    return f"{'iptables' if family.v == 4 else 'ip6tables'}-{kind}"


@both_families
@pytest.mark.parametrize("kinds", [("legacy",), ("nft",), ("legacy", "nft")], ids="+".join)
@pytest.mark.parametrize("first", [True, False], ids=["Docker first", "Docker again later"])
def test_forwarding_works_beside_docker(place: Place, family: Family, kinds: tuple[str, ...], first: bool) -> None:
    with contextlib.closing(Nftables()) as nftables:
        nftables.apply(complete(RULES, HOSTS))
        for kind in kinds:
            restored(program_of(family, kind) + "-restore", DOCKER)
        ways = [
            ("pod", family.pod, "world", family.world),
            ("pod", family.pod, "peer", family.far_pod),
            ("peer", family.far_pod, "pod", family.pod),
            ("world", family.world, "pod", family.pod),
        ]
        for way in ways:
            assert datagram(place, family, *way, wait=NOTHING_COMES) is None
        iptables.ensure(RULES.blocks, nftables.forward_versions())
        if not first:
            for kind in kinds:
                restored(program_of(family, kind) + "-restore", DOCKER)
            assert iptables.ensure(RULES.blocks, nftables.forward_versions()) == []
        for way in ways:
            assert datagram(place, family, *way) is not None
        # Nobody else gets through because of us.
        with entered(place.peer):
            ip(f"-{family.v} route add {family.world} via {family.underlay}")
        assert datagram(place, family, "peer", family.peer, "world", family.world, wait=NOTHING_COMES) is None
        iptables.ensure((), nftables.forward_versions())
        assert datagram(place, family, *ways[0], wait=NOTHING_COMES) is None


FIREWALLD = """\
table inet firewalld {
  chain filter_FORWARD {
    type filter hook forward priority filter + 10; policy accept;
    ct state { established, related } accept
    ct status dnat accept
    iifname "lo" accept
    jump filter_FORWARD_ZONES
    ct state invalid drop
    reject with icmpx admin-prohibited
  }
  chain filter_FORWARD_ZONES { }
  chain filter_FWD_trusted { accept; }
}
"""
TRUSTED = "add rule inet firewalld filter_FORWARD_ZONES {name} saddr {block} goto filter_FWD_trusted\n"
"""What firewalld makes of its zone `trusted` when it gets a source."""


@both_families
def test_firewalld_in_the_way_is_told_until_it_lets_pods_through(place: Place, family: Family) -> None:
    nft.apply(complete(RULES, HOSTS))
    nft.apply(FIREWALLD)
    (found,) = nft.findings(RULES.blocks)
    assert found.remedy.startswith("firewall-cmd --permanent --zone=trusted --add-source=10.0.0.0/8")
    assert datagram(place, family, "pod", family.pod, "peer", family.far_pod, wait=NOTHING_COMES) is None
    for each in FAMILIES:
        nft.apply(TRUSTED.format(name="ip" if each.v == 4 else "ip6", block=each.block))
    assert nft.findings(RULES.blocks) == []
    assert datagram(place, family, "pod", family.pod, "peer", family.far_pod) == family.pod
    assert datagram(place, family, "pod", family.pod, "world", family.world) == family.uplink


@both_families
def test_native_table_that_drops_lets_pods_through_after_the_remedy(place: Place, family: Family) -> None:
    nft.apply(complete(RULES, HOSTS))
    nft.apply("table inet theirs { chain forward { type filter hook forward priority filter; policy drop; }; }\n")
    assert datagram(place, family, "pod", family.pod, "peer", family.far_pod, wait=NOTHING_COMES) is None
    (found,) = nft.findings(RULES.blocks)
    sh("sh", "-c", found.remedy)
    assert datagram(place, family, "pod", family.pod, "peer", family.far_pod) == family.pod
    assert datagram(place, family, "world", family.world, "pod", family.pod) == family.world


# --- the guard of the tunnels' port ---


def reaches(place: Place, family: Family, sender: str, source: str, target: str, size: int, port: int = VXLAN) -> bool:
    """Whether a datagram of `size` bytes arrives at this host's `port`."""
    listening = opened(place.host, family, socket.SOCK_DGRAM, target, port)
    sending = opened(getattr(place, sender), family, socket.SOCK_DGRAM, source)
    with listening, sending:
        # What comes on one link keeps its order: the second is there when the first is, or has been dropped.
        sentinel = opened(place.host, family, socket.SOCK_DGRAM, target, SERVICE)
        with sentinel:
            sending.sendto(bytes(size), (target, port))
            sending.sendto(b"after it", (target, SERVICE))
            assert sentinel.recvfrom(64)[0] == b"after it"
            return bool(select.select([listening], [], [], 0)[0])


@both_families
@pytest.mark.parametrize("size", [50, 4000], ids=["whole", "in fragments"])
def test_stranger_is_dropped_and_counted_a_peer_comes_through(place: Place, family: Family, size: int) -> None:
    with contextlib.closing(Nftables()) as nftables:
        nftables.apply(complete(RULES, HOSTS))
        assert reaches(place, family, "peer", family.peer, family.underlay, size)
        assert nftables.counters()[firewall.STRANGERS] == 0
        assert not reaches(place, family, "world", family.world, family.uplink, size)
        assert nftables.counters()[firewall.STRANGERS] == 1
        nftables.put([pack_address(family.world)])
        assert reaches(place, family, "world", family.world, family.uplink, size)
        nftables.put([], [pack_address(family.world)])
        assert not reaches(place, family, "world", family.world, family.uplink, size)
        assert nftables.counters()[firewall.STRANGERS] == 2


@both_families
def test_guard_without_masquerading_holds_fragments_too(place: Place, family: Family) -> None:
    """Then nothing of ours asks for connection tracking, which would put fragments together before the guard."""
    with contextlib.closing(Nftables()) as nftables:
        nftables.apply(complete(replace(RULES, masquerade=False), HOSTS))
        assert reaches(place, family, "peer", family.peer, family.underlay, 4000)
        assert not reaches(place, family, "world", family.world, family.uplink, 4000)
        assert nftables.counters() == {**dict.fromkeys(firewall.COUNTERS, 0), firewall.STRANGERS: 1}


@both_families
def test_guard_that_logs_counts_and_lets_in(place: Place, family: Family) -> None:
    with contextlib.closing(Nftables()) as nftables:
        nftables.apply(complete(replace(RULES, guard="log"), HOSTS))
        assert reaches(place, family, "world", family.world, family.uplink, 50)
        assert reaches(place, family, "peer", family.peer, family.underlay, 50)
        assert nftables.counters()[firewall.STRANGERS] == 1


@both_families
def test_guard_that_is_off_does_not_look(place: Place, family: Family) -> None:
    with contextlib.closing(Nftables()) as nftables:
        nftables.apply(complete(replace(RULES, guard="off"), HOSTS))
        assert reaches(place, family, "world", family.world, family.uplink, 50)
        assert nftables.counters()[firewall.STRANGERS] == 0


@both_families
def test_other_ports_and_loopback_are_not_guarded(place: Place, family: Family) -> None:
    nft.apply(complete(RULES))
    loopback = "127.0.0.1" if family.v == 4 else "::1"
    assert reaches(place, family, "world", family.world, family.uplink, 50, port=4789)
    assert reaches(place, family, "host", loopback, loopback, 50)
    assert reaches(place, family, "host", family.uplink, family.uplink, 50)


def arrives(place: Place, family: Family, source: str, receiver: str, target: str) -> bool:
    """Whether a datagram from the far end of the tunnel, from this source there, arrives."""
    with entered(place.peer):
        if source != family.far_pod:
            # Not on the link, where it would be used to ask for neighbours as well.
            ip(f"addr replace {source}/{family.whole} dev lo")
        ip(f"-{family.v} route replace {target} via {family.tunnel} dev far-tunnel onlink")
    far = opened(place.peer, family, socket.SOCK_DGRAM, source)
    listening = opened(getattr(place, receiver), family, socket.SOCK_DGRAM, target, SERVICE)
    pods = opened(place.pod, family, socket.SOCK_DGRAM, family.pod, SERVICE + 1)
    other = opened(place.peer, family, socket.SOCK_DGRAM, family.far_pod)
    with far, listening, pods, other:
        far.sendto(b"it", (target, SERVICE))
        # What comes by one link keeps its order: it is there when this is, or has been dropped.
        other.sendto(b"after it", (family.pod, SERVICE + 1))
        assert pods.recvfrom(64)[0] == b"after it"
        # From the host to the receiver it may be on its way yet.
        return bool(select.select([listening], [], [], NOTHING_COMES)[0])


FORGED = {
    firewall.IMPOSTORS: lambda family: (OURS[family.v], "pod", family.pod),
    firewall.STRAYS: lambda family: (family.far_pod, "world", THEIRS[family.v]),
}
"""What a peer has no reason to send us: (source, receiver, target), by the counter that counts it."""

OURS = {4: "10.0.1.77", 6: "fd00:0:0:1::77"}
THEIRS = {4: "10.0.3.5", 6: "fd00:0:0:3::5"}


def leads_on(place: Place, family: Family) -> None:
    """The host has a way to a third host's pod, as it has in a cluster."""
    ip(f"-{family.v} route add {THEIRS[family.v]} via {family.world}")
    with entered(place.world):
        ip(f"addr add {THEIRS[family.v]}/{family.whole} dev far-up0 nodad")


@both_families
@pytest.mark.parametrize("counter", FORGED)
def test_what_no_peer_has_reason_to_send_is_dropped_and_counted(place: Place, family: Family, counter: str) -> None:
    leads_on(place, family)
    with contextlib.closing(Nftables()) as nftables:
        nftables.apply(complete(RULES, HOSTS))
        assert arrives(place, family, family.far_pod, "pod", family.pod)
        assert not arrives(place, family, *FORGED[counter](family))
        assert nftables.counters() == {**dict.fromkeys(firewall.COUNTERS, 0), counter: 1}
        kept = {each: sources for each in firewall.SAMPLED if (sources := nftables.sources(each))}
        assert kept == {counter: [pack_address(FORGED[counter](family)[0])]}
        assert nftables.dump() == set(HOSTS)


@both_families
@pytest.mark.parametrize("guard", ["log", "off"])
@pytest.mark.parametrize("counter", FORGED)
def test_guard_that_does_not_drop_lets_it_in(place: Place, family: Family, guard: str, counter: str) -> None:
    leads_on(place, family)
    with contextlib.closing(Nftables()) as nftables:
        nftables.apply(complete(replace(RULES, guard=guard, masquerade=False), HOSTS))
        assert arrives(place, family, *FORGED[counter](family))
        assert nftables.counters().get(counter, 0) == (guard == "log")


@both_families
def test_other_ways_into_the_host_bring_what_they_like(place: Place, family: Family) -> None:
    """On a router, the same packet by another link is nobody's concern here: the peer may route without a tunnel."""
    with contextlib.closing(Nftables()) as nftables:
        nftables.apply(complete(replace(RULES, devices=("elsewhere",)), HOSTS))
        assert arrives(place, family, OURS[family.v], "pod", family.pod)


@both_families
def test_service_asked_for_through_the_tunnel_may_lead_to_a_pod_elsewhere(place: Place, family: Family) -> None:
    """A port of the host's address in the overlay that leads to another host's pod, as kube-proxy makes them."""
    leads_on(place, family)
    name = "ip" if family.v == 4 else "ip6"
    where = THEIRS[family.v] if family.v == 4 else f"[{THEIRS[family.v]}]"
    nft.apply(complete(RULES, HOSTS))
    nft.apply(
        f"table {name} service {{ chain c {{ type nat hook prerouting priority dstnat; "
        f"{name} daddr {family.cni} udp dport {SERVICE} dnat to {where}:{SERVICE}; }};"
        f"chain d {{ type nat hook postrouting priority srcnat; {name} daddr {THEIRS[family.v]} masquerade; }}; }}\n"
    )
    with entered(place.peer):
        ip(f"-{family.v} route replace {family.cni} via {family.tunnel} dev far-tunnel onlink")
    assert datagram(place, family, "peer", family.far_pod, "world", THEIRS[family.v], ask=family.cni) == family.uplink


@both_families
def test_pods_frames_come_out_of_a_real_tunnel_only_from_a_peer(place: Place, family: Family) -> None:
    ends = [
        (place.host, "under0", family.underlay, family.peer),
        (place.peer, "far-under0", family.peer, family.underlay),
    ]
    for number, (namespace, link, local, remote) in enumerate(ends, 1):
        with entered(namespace):
            ip(f"link add vx type vxlan id 1 dev {link} local {local} remote {remote} dstport {VXLAN} nolearning")
            ip(f"addr add 10.9.0.{number}/24 dev vx")
            ip("link set vx up")
    talk = (place, FOUR, "peer", "10.9.0.2", "host", "10.9.0.1")
    with contextlib.closing(Nftables()) as nftables:
        nftables.apply(complete(RULES))
        assert datagram(*talk, wait=NOTHING_COMES) is None
        # Not even the question who has the address.
        assert nftables.counters()[firewall.STRANGERS] > 0
        nftables.put([pack_address(family.peer)])
        assert datagram(*talk) == "10.9.0.2"


def test_firewall_behind_the_guard_has_its_say(place: Place) -> None:
    nft.apply(complete(RULES, HOSTS))
    nft.apply("table inet theirs { chain input { type filter hook input priority filter; udp dport 8472 drop; }; }\n")
    assert not reaches(place, FOUR, "peer", FOUR.peer, FOUR.underlay, 50)


@both_families
def test_replacing_the_ruleset_loses_no_tunnel_packet(place: Place, family: Family) -> None:
    many = [*HOSTS, *(number.to_bytes(4, "big") for number in range(1, 2000))]
    nft.apply(complete(RULES, many))
    listening = opened(place.host, family, socket.SOCK_DGRAM, family.underlay, VXLAN)
    sending = opened(place.peer, family, socket.SOCK_DGRAM, family.peer)
    done = threading.Event()
    lost: list[int] = []
    through = 0

    def send() -> None:
        nonlocal through
        while not done.is_set():
            sending.sendto(through.to_bytes(8, "big"), (family.underlay, VXLAN))
            try:
                listening.recv(64)
            except TimeoutError:
                lost.append(through)
                return
            through += 1

    with listening, sending:
        sender = threading.Thread(target=send)
        sender.start()
        for _ in range(10):
            nft.apply(complete(RULES, many))
        done.set()
        sender.join()
    assert not lost
    assert through > 0

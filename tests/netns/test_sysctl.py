"""Kernel settings by what they do to packets: which of them an overlay needs, and what putting them right breaks."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scapy.layers.inet6 import ICMPv6ND_RA, ICMPv6NDOptPrefixInfo, IPv6
from scapy.layers.l2 import Ether

from overlay import sysctl
from overlay.cluster import Lab, wait_until
from overlay.netns import NETNS
from overlay.sysctl import Change, Ledger, Refused
from tests.netns.namespace import entered, ip, ip_json, new_namespace, veth
from tests.netns.two_hosts import two_hosts

FORWARDING = "net.ipv6.conf.all.forwarding"


def put(name: str, value: str) -> None:
    """As an operator's sysctl(8)."""
    (sysctl.PROC_SYS / Path(*(part.replace("/", ".") for part in name.split(".")))).write_text(value)


# --- IPv6 forwarding and router advertisements ---------------------------------------------------------------------


@pytest.fixture
def namespace() -> Iterator[int]:
    with new_namespace() as descriptor:
        yield descriptor


def advertise(router: str, device: str = "router") -> None:
    """A router advertisement (RFC 4861 section 4.2) from a router on the link."""
    frame = (
        Ether(dst="33:33:00:00:00:01", src=f"02:00:00:00:00:0{router}")
        / IPv6(src=f"fe80::{router}", dst="ff02::1", hlim=255)
        / ICMPv6ND_RA(routerlifetime=1800)
        / ICMPv6NDOptPrefixInfo(prefix="2001:db8:1::", prefixlen=64)
    )
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind((device, 0))
        sender.send(bytes(frame))


def routers() -> set[str]:
    return {route["gateway"] for route in ip_json("-6 route show default")}


@pytest.fixture
def advertised(namespace: int) -> None:
    """A host whose default route came by router advertisement."""
    veth("eth0", "router")
    wait_until(lambda: advertise("1") or routers() == {"fe80::1"}, 10, "a route by advertisement")


def test_forwarding_alone_would_take_the_host_its_advertised_default_route(advertised: None) -> None:
    put(FORWARDING, "1")
    assert routers() == set()


def test_a_host_that_begins_to_forward_keeps_its_advertised_default_route(advertised: None) -> None:
    assert sysctl.enable_ipv6_forwarding("eth0") == [
        Change("net.ipv6.conf.eth0.accept_ra", "1", "2"),
        Change(FORWARDING, "0", "1"),
    ]
    assert routers() == {"fe80::1"}
    assert sysctl.enable_ipv6_forwarding("eth0") == []


def test_a_host_that_forwards_goes_on_to_learn_of_routers(advertised: None) -> None:
    sysctl.enable_ipv6_forwarding("eth0")
    wait_until(lambda: advertise("2") or routers() == {"fe80::1", "fe80::2"}, 10, "a route by the second router")


def test_the_interface_with_the_advertised_route_keeps_it_though_it_is_not_the_underlay(advertised: None) -> None:
    veth("eth1", "other")
    changed = [change.name for change in sysctl.enable_ipv6_forwarding("eth1") if isinstance(change, Change)]
    assert changed == ["net.ipv6.conf.eth0.accept_ra", "net.ipv6.conf.eth1.accept_ra", FORWARDING]
    assert routers() == {"fe80::1"}


def test_an_interface_that_takes_no_advertisements_takes_none_later(namespace: int) -> None:
    veth("eth0", "router")
    put("net.ipv6.conf.eth0.accept_ra", "0")
    assert sysctl.enable_ipv6_forwarding("eth0") == [Change(FORWARDING, "0", "1")]


def test_a_host_that_forwards_already_is_left_as_its_operator_has_it(namespace: int) -> None:
    veth("eth0", "router")
    put(FORWARDING, "1")
    assert sysctl.enable_ipv6_forwarding("eth0") == []
    assert sysctl.read("net.ipv6.conf.eth0.accept_ra") == "1"


def test_putting_it_back_costs_no_route_either(advertised: None, tmp_path: Path) -> None:
    sysctl.enable_ipv6_forwarding("eth0", ledger=Ledger(tmp_path / "sysctl.json"))
    assert Ledger(tmp_path / "sysctl.json").restore() == [
        Change(FORWARDING, "1", "0"),
        Change("net.ipv6.conf.eth0.accept_ra", "2", "1"),
    ]
    assert routers() == {"fe80::1"}
    wait_until(lambda: advertise("2") or "fe80::2" in routers(), 10, "a route by the second router")


def test_a_record_of_another_network_namespace_is_void(namespace: int, tmp_path: Path) -> None:
    assert sysctl.enable_forwarding(ledger=Ledger(tmp_path / "sysctl.json"))
    with new_namespace():
        assert Ledger(tmp_path / "sysctl.json").changes == ()
    assert Ledger(tmp_path / "sysctl.json").changes == (Change("net.ipv4.ip_forward", "0", "1"),)


# --- the reverse path filter -----------------------------------------------------------------------------------------


@pytest.fixture
def hosts(namespace: int) -> Iterator[tuple[int, int]]:
    """The first has the strict filter, as Red Hat's default is; the second has none. Each has a pod's address, N.5."""
    with two_hosts(namespace) as (near, far):
        for host, number, value in ((near, 1, "1"), (far, 2, "0")):
            with entered(host):
                put("net.ipv4.conf.all.rp_filter", value)
                ip(f"addr add 10.9.{number}.5/32 dev lo")
        yield near, far


def arrives(hosts: tuple[int, int], source: str, device: str = "flannel.1") -> bool:
    """Whether a datagram of the second host to the first one's pod arrives, or the reverse path filter drops it."""
    near, far = hosts
    with entered(near):
        before = dropped()
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.bind(("10.9.1.5", 0))
        receiver.setblocking(False)
    with entered(far):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        sender.bind((source, 0))
    with receiver, sender, entered(near):
        sender.sendto(b"hello", receiver.getsockname())

        def outcome() -> str:
            try:
                return str(receiver.recv(64))
            except BlockingIOError:
                return "dropped" if dropped() > before else ""

        return wait_until(outcome, 10, "the datagram, or its drop") != "dropped"


def dropped() -> int:
    """Packets that the reverse path filter has dropped in the thread's namespace (nstat: TcpExtIPReversePathFilter)."""
    names, values = (line.split() for line in Path("/proc/thread-self/net/netstat").read_text().splitlines()[:2])
    return int(values[names.index("IPReversePathFilter")])


def loosened(hosts: tuple[int, int]) -> object:
    with entered(hosts[0]):
        return sysctl.loosen_reverse_path("flannel.1")


LOOSENED = Change("net.ipv4.conf.flannel/1.rp_filter", "0", "2")


def test_the_strict_filter_lets_pods_and_their_hosts_through(hosts: tuple[int, int]) -> None:
    assert arrives(hosts, "10.9.2.5")
    assert arrives(hosts, "10.9.2.0")


def test_a_peers_underlay_address_comes_through_the_tunnel_once_the_filter_is_loose(hosts: tuple[int, int]) -> None:
    assert not arrives(hosts, "192.0.2.2")
    assert loosened(hosts) == LOOSENED
    assert arrives(hosts, "192.0.2.2")
    assert loosened(hosts) is None


def test_a_pod_that_is_reached_without_the_tunnel_comes_through_it_once_the_filter_is_loose(
    hosts: tuple[int, int],
) -> None:
    with entered(hosts[0]):
        ip("route replace 10.9.2.0/24 via 192.0.2.2 dev eth0")
    assert not arrives(hosts, "10.9.2.5")
    assert loosened(hosts) == LOOSENED
    assert arrives(hosts, "10.9.2.5")


def test_an_underlay_that_answers_by_another_way_is_filtered_by_its_own_setting(hosts: tuple[int, int]) -> None:
    with entered(hosts[0]):
        veth("eth1", "other", "198.51.100.1/24")
        ip("neigh add 198.51.100.2 lladdr 02:00:00:00:00:02 dev eth1 nud permanent")
        ip("route add 192.0.2.2/32 via 198.51.100.2 dev eth1")
        mac = ip_json("link show eth0")[0]["address"]
    with entered(hosts[1]):
        # The filter keeps the first host from answering ARP requests as well.
        ip(f"neigh replace 192.0.2.1 lladdr {mac} dev eth0 nud permanent")
    assert loosened(hosts) == LOOSENED
    assert not arrives(hosts, "10.9.2.5")
    with entered(hosts[0]):
        put("net.ipv4.conf.eth0.rp_filter", "2")
    assert arrives(hosts, "10.9.2.5")


@pytest.mark.parametrize(("everywhere", "device"), [("0", "0"), ("2", "1"), ("1", "2"), ("0", "2")])
def test_a_filter_that_drops_nothing_is_left_alone(namespace: int, everywhere: str, device: str) -> None:
    ip("link add flannel.1 type vxlan id 1 dstport 8472")
    put("net.ipv4.conf.all.rp_filter", everywhere)
    put("net.ipv4.conf.flannel/1.rp_filter", device)
    assert sysctl.loosen_reverse_path("flannel.1") is None


def test_a_device_that_is_gone_is_no_mistake(namespace: int) -> None:
    put("net.ipv4.conf.all.rp_filter", "1")
    assert not isinstance(sysctl.loosen_reverse_path("flannel.1"), Change | Refused)


# --- bridges that filter -----------------------------------------------------------------------------------------


def inside(netns: str, make: Callable[[], socket.socket]) -> socket.socket:
    with (NETNS / netns).open() as descriptor, entered(descriptor.fileno()):
        return make()


@pytest.mark.parametrize("filtered", ["0", "1"])
def test_pods_on_one_bridge_reach_each_other_by_their_own_addresses_filtered_or_not(
    make_lab: Callable[..., Lab], filtered: str
) -> None:
    lab = make_lab(hosts=1, pods=2, agent_options=("--ip-masq",))
    lab.up()
    host = lab.hosts[0]
    first, second = host.pods
    with (NETNS / host.netns).open() as descriptor, entered(descriptor.fileno()):
        # The setting is a namespace's own since Linux 5.3; absent where the module br_netfilter is not loaded.
        if sysctl.read("net.bridge.bridge-nf-call-iptables") is not None:
            put("net.bridge.bridge-nf-call-iptables", filtered)

    def datagrams() -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    with inside(first.netns, datagrams) as receiver, inside(second.netns, datagrams) as sender:
        receiver.bind((first.address, 4000))
        receiver.settimeout(10)
        sender.sendto(b"hello", (first.address, 4000))
        assert receiver.recvfrom(64)[1][0] == second.address

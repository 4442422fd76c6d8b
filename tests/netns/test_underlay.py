"""The underlay edge against a real kernel: which interface and addresses are chosen, and what wakes the watch."""

import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from overlay.device import Underlay
from overlay.underlay import Monitor, NoUnderlay, Wish, find_underlay
from subnet_lease.model import Prefix, format_address, pack_address
from tests.netns.namespace import index_of, ip, new_namespace, sh, veth

pytestmark = pytest.mark.netns


@pytest.fixture
def namespace() -> Iterator[int]:
    with new_namespace() as descriptor:
        yield descriptor


@pytest.fixture
def three_links(namespace: int) -> None:
    """Three interfaces: the IPv4 default routes leave by `beta` (metric 50) and `alpha` (metric 100), that of IPv6 by
    `gamma`."""
    veth("alpha", "alpha-peer", "192.0.2.5/24")
    veth("beta", "beta-peer", "198.51.100.5/24")
    ip("addr add 198.51.100.6/24 dev beta")
    veth("gamma", "gamma-peer", "203.0.113.5/24")
    for name, number in (("beta", 2), ("gamma", 3)):
        ip(f"addr add 2001:db8:{number}::5/64 dev {name} nodad")
        ip(f"addr add 2001:db8:{number}::6/64 dev {name} nodad")
    ip("route add default via 192.0.2.1 metric 100")
    ip("route add default via 198.51.100.1 metric 50")
    ip("route add default via 203.0.113.1 metric 10 table 100")
    ip("route add 100.64.0.0/10 via 203.0.113.1")
    ip("-6 route add default via 2001:db8:3::1 metric 7")


def wish(**options: object) -> Wish:
    given = {"ifaces": (), "regexes": (), **options}
    public = tuple(pack_address(text) for text in options.pop("public", ()))  # type: ignore[attr-defined]
    return Wish(given["ifaces"], given["regexes"], options.get("can_reach"), public)  # type: ignore[arg-type]


def shown(found: Underlay) -> list[str]:
    return [format_address(address) for address in found.addresses]


# --- the choice ---


@pytest.mark.parametrize(
    ("options", "name", "addresses", "why", "runner_up"),
    [
        ({"ifaces": ("alpha",)}, "alpha", "192.0.2.5", "--iface alpha", ""),
        ({"ifaces": ("nothing", "gamma")}, "gamma", "203.0.113.5 2001:db8:3::6", "--iface gamma", ""),
        ({"ifaces": ("198.51.100.6",)}, "beta", "198.51.100.6 2001:db8:2::6", "--iface 198.51.100.6", ""),
        ({"ifaces": ("2001:db8:2::5",)}, "beta", "198.51.100.5 2001:db8:2::5", "--iface 2001:db8:2::5", ""),
        (
            {"ifaces": ("gamma", "alpha")}, "gamma", "203.0.113.5 2001:db8:3::6", "--iface gamma",
            "alpha (--iface alpha)",
        ),
        ({"regexes": ("^gam",)}, "gamma", "203.0.113.5 2001:db8:3::6", "--iface-regex ^gam", ""),
        ({"regexes": (r"^192\.0\.",)}, "alpha", "192.0.2.5", r"--iface-regex ^192\.0\.", ""),
        (
            {"regexes": ("a$",)}, "alpha", "192.0.2.5", "--iface-regex a$",
            "beta (--iface-regex a$)",
        ),
        (
            {"ifaces": ("nothing",), "regexes": ("^al", "^be")}, "alpha", "192.0.2.5", "--iface-regex ^al",
            "beta (--iface-regex ^be)",
        ),
        ({"can_reach": "100.64.3.4"}, "gamma", "203.0.113.5 2001:db8:3::6", "--iface-can-reach 100.64.3.4", ""),
        ({"can_reach": "198.51.100.77"}, "beta", "198.51.100.5 2001:db8:2::6", "--iface-can-reach 198.51.100.77", ""),
        ({"can_reach": "2001:db8:2::77"}, "beta", "198.51.100.5 2001:db8:2::6", "--iface-can-reach 2001:db8:2::77", ""),
        (
            {"public": ("203.0.113.5",)}, "gamma", "203.0.113.5 2001:db8:3::6",
            "it has the public address 203.0.113.5", "beta (it has the default route)",
        ),
        (
            {"public": ("2001:db8:3::5",)}, "gamma", "203.0.113.5 2001:db8:3::5",
            "it has the public address 2001:db8:3::5", "beta (it has the default route)",
        ),
        ({"ifaces": ("beta",), "public": ("198.51.100.6",)}, "beta", "198.51.100.6 2001:db8:2::6", "--iface beta", ""),
        (
            {"public": ("8.8.8.8",)}, "beta", "198.51.100.5 2001:db8:2::6", "it has the default route",
            "alpha (it has the default route)",
        ),
        ({}, "beta", "198.51.100.5 2001:db8:2::6", "it has the default route", "alpha (it has the default route)"),
    ],
)  # fmt: skip
def test_underlay_is_chosen_in_flannels_order(
    three_links: None, options: dict[str, object], name: str, addresses: str, why: str, runner_up: str
) -> None:
    found = find_underlay(wish(**options))
    wanted = addresses.split()
    # Of several IPv6 addresses that nobody asked for, which comes first is the kernel's choice.
    asked = {text for values in options.values() for text in ([values] if isinstance(values, str) else values)}  # type: ignore[attr-defined]
    if len(wanted) == 2 and wanted[1] not in asked:
        wanted[1] = shown(find_underlay(Wish(ifaces=(name,))))[1]
    assert (found.name, found.index, shown(found)) == (name, index_of(name), wanted)
    assert (found.mtu, found.why, found.runner_up) == (1500, why, runner_up)
    ipv4 = ["192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24"]
    assert {str(link) for link in found.links} == {*ipv4, "2001:db8:2::/64", "2001:db8:3::/64"}
    own = {block for block in found.links if any(block.holds(address) for address in found.addresses)}
    assert set(found.on_link) == own


def test_default_route_of_ipv6_tells_the_underlay_where_there_is_none_of_ipv4(three_links: None) -> None:
    for metric in (50, 100):
        ip(f"route del default metric {metric}")
    assert find_underlay(Wish()).name == "gamma"
    ip("-6 route add default via 2001:db8:2::1 metric 3")
    found = find_underlay(Wish())
    assert (found.name, found.runner_up) == ("beta", "gamma (it has the default route)")


@pytest.mark.parametrize("version", ["", "-6 "])
def test_multipath_default_route_tells_an_underlay(three_links: None, version: str) -> None:
    for each in ("", "-6 "):
        sh("sh", "-c", f"while ip {each}route del default 2> /dev/null; do :; done")
    hops = ("198.51.100.1", "192.0.2.1") if not version else ("2001:db8:2::1", "2001:db8:3::1")
    ip(f"{version}route add default nexthop via {hops[0]} nexthop via {hops[1]}")
    assert find_underlay(Wish()).name == "beta"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"ifaces": ("delta",), "regexes": ("^d",)},
            "no interface with an address fits --iface delta, --iface-regex ^d;",
        ),
        ({"can_reach": "127.0.0.1"}, "--iface-can-reach 127.0.0.1: this host has no route there by an interface with"),
        ({"can_reach": "8.8.8.8"}, "--iface-can-reach 8.8.8.8: this host has no route there by an interface with"),
        ({}, "this host has no default route to tell the underlay by: use --iface."),
    ],
)
def test_without_an_underlay_that_fits_the_candidates_are_listed(
    three_links: None, options: dict[str, object], text: str
) -> None:
    for each in ("", "-6 "):
        sh("sh", "-c", f"while ip {each}route del default 2> /dev/null; do :; done")
    with pytest.raises(NoUnderlay) as refused:
        find_underlay(wish(**options))
    assert str(refused.value).startswith(text)
    for candidate in (
        "alpha (192.0.2.5)",
        "beta (198.51.100.5, 198.51.100.6, 2001:db8:2::",
        "gamma (203.0.113.5, 2001:",
    ):
        assert candidate in str(refused.value)


def test_host_without_addresses_has_no_underlay(namespace: int) -> None:
    with pytest.raises(NoUnderlay, match="There is none"):
        find_underlay(Wish())


@pytest.mark.parametrize("name", ["flannel.1", "flannel-v6.1"])
def test_overlay_device_is_never_its_own_underlay(three_links: None, name: str) -> None:
    ip(f"link add {name} type vxlan id 1 dev alpha dstport 8472")
    ip(f"addr add 10.0.0.0/32 dev {name}")
    ip(f"link set {name} up")
    ip(f"route add default dev {name} metric 1")
    assert find_underlay(Wish()).name == "beta"
    with pytest.raises(NoUnderlay):
        find_underlay(Wish(ifaces=(name,)))


def has_links_of(kind: str) -> bool:
    """Whether the running kernel has links of this kind: not all are built into every one."""
    ip("link add base type veth peer name base-peer")
    made = f"ip link add link base name probe type {kind} {'id 7' if kind == 'vlan' else ''}"
    has = subprocess.run(made.split(), capture_output=True).returncode == 0
    ip("link del base")
    return has


@pytest.mark.parametrize(
    "made",
    [
        ["link add other type bridge", "link set alpha-peer master other"],
        ["link add link alpha name other type vlan id 7"],
        ["link add link alpha name other type macvlan"],
        ["link add other type bond", "link set gamma-peer down", "link set gamma-peer master other"],
    ],
    ids=lambda made: made[0].split(" type ")[1].split()[0],
)
def test_other_kinds_of_links_carry_the_overlay_as_well(
    three_links: None, made: list[str], pytestconfig: pytest.Config
) -> None:
    kind = made[0].split(" type ")[1].split()[0]
    if kind != "bridge" and not has_links_of(kind):
        # `make kernels` has a kernel with all of them.
        assert not pytestconfig.getoption("--every-link"), f"this kernel has no links of type {kind}"
        return
    for line in (*made, "addr add 10.9.0.5/24 dev other", "link set other mtu 1400", "link set other up"):
        ip(line)
    ip("route add default via 10.9.0.1 metric 1")
    found = find_underlay(Wish())
    assert (found.name, found.mtu, shown(found)) == ("other", 1400, ["10.9.0.5"])
    assert found.on_link == (Prefix.parse("10.9.0.0/24"),)
    assert find_underlay(Wish(ifaces=("other",))).index == index_of("other")


# --- addresses ---


def test_ipv6_addresses_that_will_not_stay_are_not_taken(namespace: int) -> None:
    veth("alpha", "alpha-peer", "192.0.2.5/24")
    Path("/proc/sys/net/ipv6/conf/alpha/use_tempaddr").write_text("2")
    # Of a temporary address there is always one that it was made from; here that one is deprecated.
    ip("addr add 2001:db8:1::5/64 dev alpha nodad preferred_lft 0")
    ip("addr add 2001:db8:2:0:1::5/64 dev alpha mngtmpaddr preferred_lft 3600 valid_lft 7200")
    # A duplicate address detection of a million probes does not end.
    Path("/proc/sys/net/ipv6/conf/alpha/dad_transmits").write_text("1000000")
    ip("addr add 2001:db8:3::5/64 dev alpha")
    told = sh("ip", "-6", "addr", "show", "dev", "alpha")
    assert all(word in told for word in ("temporary", "tentative", "deprecated"))
    ip("addr del 2001:db8:2:0:1::5/64 dev alpha")
    assert shown(find_underlay(Wish(ifaces=("alpha",)))) == ["192.0.2.5"]
    ip("addr add 2001:db8:4::5/64 dev alpha nodad")
    found = find_underlay(Wish(ifaces=("alpha",)))
    assert shown(found) == ["192.0.2.5", "2001:db8:4::5"]
    assert set(found.on_link) == {Prefix.parse("192.0.2.0/24"), Prefix.parse("2001:db8:4::/64")}


def test_address_that_a_link_has_for_itself_is_no_underlay(namespace: int) -> None:
    veth("alpha", "alpha-peer")
    ip("addr add fe80::5/64 dev alpha nodad")
    ip("addr add 192.0.2.5/24 dev alpha scope link")
    with pytest.raises(NoUnderlay):
        find_underlay(Wish(ifaces=("alpha",)))


def test_present_address_is_kept_as_long_as_it_is_there(namespace: int) -> None:
    veth("alpha", "alpha-peer", "192.0.2.5/24")
    ip("addr add 2001:db8::5/64 dev alpha nodad")
    before = find_underlay(Wish(ifaces=("alpha",)))
    ip("addr del 192.0.2.5/24 dev alpha")
    ip("addr add 192.0.2.4/24 dev alpha")
    ip("addr add 192.0.2.5/24 dev alpha")
    ip("addr add 2001:db8::4/64 dev alpha nodad")
    assert find_underlay(Wish(ifaces=("alpha",)), before) == before
    assert shown(find_underlay(Wish(ifaces=("alpha",)), replace(before, addresses=())))[0] == "192.0.2.4"
    # What the operator names counts for more.
    assert shown(find_underlay(Wish(ifaces=("192.0.2.4",)), before)) == ["192.0.2.4", "2001:db8::5"]
    ip("addr del 192.0.2.5/24 dev alpha")
    ip("addr del 2001:db8::5/64 dev alpha")
    assert shown(find_underlay(Wish(ifaces=("alpha",)), before)) == ["192.0.2.4", "2001:db8::4"]


# --- the monitor ---


@dataclass
class Watched:
    """A monitor on a host with one underlay, and nothing left to tell."""

    monitor: Monitor
    index: int

    def drain(self) -> None:
        """Read until nothing has happened for a while: a new link settles by itself."""
        while self.monitor.wait(0.3):
            pass

    def concerned(self, *lines: str) -> set[int]:
        """What the monitor tells of these `ip` commands, all together."""
        for line in lines:
            ip(line)
        deadline, found = time.monotonic() + 10, self.monitor.wait(10)
        while time.monotonic() < deadline and (more := self.monitor.wait(0.1)):
            found |= more
        return found


@pytest.fixture
def watched(namespace: int) -> Iterator[Watched]:
    Path("/proc/sys/net/ipv6/conf/default/addr_gen_mode").write_text("1")
    index = veth("alpha", "alpha-peer", "192.0.2.5/24")
    ip("addr add 2001:db8::5/64 dev alpha nodad")
    monitor = Monitor()
    made = Watched(monitor, index)
    made.drain()
    yield made
    monitor.close()


@pytest.mark.parametrize(
    "lines",
    [
        ["addr add 192.0.2.6/24 dev alpha"],
        ["addr add 2001:db8::6/64 dev alpha nodad"],
        ["addr del 192.0.2.5/24 dev alpha"],
        ["addr del 2001:db8::5/64 dev alpha"],
        ["link set alpha mtu 1400"],
        ["link set alpha down"],
        ["link set alpha down", "link set alpha up"],
        ["link set alpha name omega"],
    ],
    ids=" ".join,
)
def test_whatever_happens_to_a_link_or_its_addresses_is_told(watched: Watched, lines: list[str]) -> None:
    assert watched.index in watched.concerned(*lines)


def test_link_that_is_deleted_and_made_again_is_told_of_by_both_its_indexes(watched: Watched) -> None:
    assert watched.index in watched.concerned("link del alpha")
    assert watched.index not in (again := watched.concerned("link add alpha type veth peer name alpha-peer"))
    assert index_of("alpha") in again


@pytest.mark.parametrize(
    "lines",
    [
        ["route add default via 192.0.2.1"],
        ["-6 route add default via 2001:db8::1"],
        ["route add default via 192.0.2.1", "route replace default via 192.0.2.2"],
        ["route add default via 192.0.2.1", "route del default"],
    ],
    ids=" ".join,
)
def test_default_route_that_moves_is_told(watched: Watched, lines: list[str]) -> None:
    assert watched.concerned(*lines) == {0}


def test_thousands_of_other_routes_wake_nobody(watched: Watched) -> None:
    lines = [f"route {verb} 10.{number // 256}.{number % 256}.0/24 via 192.0.2.9" for verb in ("add", "del")
             for number in range(3000)]  # fmt: skip
    lines += [
        f"route {verb} fd00:0:0:{number:x}::/64 via 2001:db8::9" for verb in ("add", "del") for number in range(3000)
    ]
    lines += ["route add 0.0.0.0/1 via 192.0.2.9"]
    done = subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert watched.monitor.wait(0.2) == set()
    assert watched.concerned("route add default via 192.0.2.1") == {0}


def test_interrupt_ends_the_present_or_next_wait(watched: Watched) -> None:
    watched.monitor.interrupt()
    watched.monitor.interrupt()
    assert watched.monitor.wait(30) == {0}
    assert watched.monitor.wait(0) == set()


def test_notifications_that_were_lost_ask_for_a_look(watched: Watched) -> None:
    watched.monitor._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    for number in range(20):
        ip(f"link set alpha mtu {1400 + number}")
    assert 0 in watched.monitor.wait(10)
    watched.drain()
    assert watched.concerned("link set alpha mtu 1500") == {watched.index}


def test_monitor_closed_leaves_no_descriptor(namespace: int) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    Monitor().close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before

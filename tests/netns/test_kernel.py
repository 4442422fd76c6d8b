"""The kernel edge against a real kernel: devices, adoption, drift, loss, scale, cleanup, claim, firewall."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from overlay import firewall, nft, subnet_file
from overlay.backends import Here, backend_of, ours
from overlay.claim import Claimed, claim_host, command_of
from overlay.cleanup import Removed, cleanup
from overlay.device import OWNER, DeviceSpec, Underlay, derived_mac, device_name
from overlay.kernel import DeviceOccupied, Kernel, KernelRefused
from overlay.model import NEXTHOP_BASE, Drop, Entry, Fdb, Neighbour, NextHop, Op, Put, Route
from overlay.tracker import Drift, Tracker
from subnet_lease.model import (
    Lease,
    LeaseAttrs,
    NetworkConfig,
    Prefix,
    Vtep,
    format_address,
    format_mac,
    pack_address,
    pack_mac,
)
from tests.netns.namespace import entered, index_of, ip, ip_json, new_namespace, sh, veth

pytestmark = pytest.mark.netns

NETWORK, NETWORK6 = Prefix.parse("10.0.0.0/8"), Prefix.parse("fd00::/48")
LOCAL, LOCAL6 = pack_address("172.30.0.5"), pack_address("2001:db8::5")
OWN, OWN6 = Prefix.parse("10.0.0.0/32"), Prefix.parse("fd00::/128")
CONFIG = NetworkConfig.parse(
    b'{"Network":"10.0.0.0/8","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan"}}'
)


@pytest.fixture
def namespace() -> Iterator[int]:
    with new_namespace() as descriptor:
        yield descriptor


@pytest.fixture
def kernel(namespace: int) -> Iterator[Kernel]:
    made = Kernel()
    yield made
    made.close()


@pytest.fixture
def spec(namespace: int) -> DeviceSpec:
    """The device wanted on the only underlay there is."""
    link = veth("under0", "under1", "172.30.0.5/24")
    ip("addr add 2001:db8::5/64 dev under0 nodad")
    return DeviceSpec("flannel.1", 1, 8472, link, LOCAL, derived_mac("kernel"), 1450, (OWN,))


@pytest.fixture
def spec6(spec: DeviceSpec) -> DeviceSpec:
    """The second device wanted, over IPv6."""
    mac = derived_mac("kernel", "6")
    return replace(spec, name="flannel-v6.1", local=LOCAL6, mac=mac, mtu=1430, addresses=(OWN6,))


def ensure(kernel: Kernel, *specs: DeviceSpec) -> tuple[str, ...]:
    """The changes to the first device."""
    return kernel.ensure_devices(specs, specs[0].link).get(specs[0].name, ())


# --- the device ---


def test_device_is_made_as_iproute2_shows_flannels(kernel: Kernel, spec: DeviceSpec) -> None:
    assert ensure(kernel, spec) == ("created",)
    (link,) = ip_json("link show flannel.1")
    assert link["ifindex"] == kernel.tunnels[4]
    assert (link["address"], link["mtu"], link["ifalias"]) == (format_mac(spec.mac), 1450, OWNER)
    assert "UP" in link["flags"]
    data = link["linkinfo"]["info_data"]
    shown = {key: data[key] for key in ("id", "link", "local", "port", "learning", "ttl", "ageing", "udp_csum")}
    assert shown == {
        "id": 1, "link": "under0", "local": "172.30.0.5", "port": 8472, "learning": False, "ttl": 0, "ageing": 300,
        "udp_csum": True,
    }  # fmt: skip
    assert addresses() == [("10.0.0.0", 32)]


def test_device_found_is_what_was_made(kernel: Kernel, spec: DeviceSpec) -> None:
    ensure(kernel, spec)
    found = kernel.find_device("flannel.1")
    assert found is not None and found.up and found.addresses == spec.addresses
    for name in ("name", "mac", "mtu", "vni", "port", "link", "local", "learning", "gbp"):
        assert getattr(found, name) == getattr(spec, name), name


@pytest.mark.parametrize(
    "change", [{"learning": True}, {"gbp": True}, {"vni": 77, "name": "flannel.77"}, {"port": 4789}]
)
def test_options_of_the_device_reach_the_kernel_and_are_read_back(
    kernel: Kernel, spec: DeviceSpec, change: dict[str, Any]
) -> None:
    wanted = replace(spec, **change)
    ensure(kernel, wanted)
    assert ensure(kernel, wanted) == ()
    (link,) = ip_json(f"link show {wanted.name}")
    data = link["linkinfo"]["info_data"]
    assert (data["id"], data["port"], data["learning"]) == (wanted.vni, wanted.port, wanted.learning)
    assert data.get("gbp", False) is wanted.gbp


def test_device_as_wanted_is_not_touched(kernel: Kernel, spec: DeviceSpec) -> None:
    ensure(kernel, spec)
    index = kernel.tunnels[4]
    assert ensure(kernel, spec) == ()
    assert kernel.tunnels[4] == index


HARMS = [
    ("link set {name} address 02:00:00:00:00:77", ("mac",)),
    ("link set {name} mtu 1400", ("mtu",)),
    ("link set {name} alias somebody", ("alias",)),
    ("addr del {own} dev {name}", ("address",)),
    ("addr add 10.0.0.9/32 dev {name}", ("address",)),
    ("addr add 10.0.0.0/24 dev {name}", ("address",)),
    ("addr add fd00::9/128 dev {name}", ("address",)),
]


@pytest.mark.parametrize("family", [4, 16], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize(
    ("harm", "mended"),
    [*HARMS, ("link set {name} down", ("up",)), ("link set {name} type vxlan local {other}", ("local",))],
)
def test_alterations_of_either_device_are_put_right_in_place(
    kernel: Kernel, spec: DeviceSpec, spec6: DeviceSpec, family: int, harm: str, mended: tuple[str, ...]
) -> None:
    specs = {4: spec, 16: spec6}
    kernel.ensure_devices([spec, spec6], spec.link)
    assert kernel.ensure_devices([spec, spec6], spec.link) == {}
    name, tunnels = specs[family].name, dict(kernel.tunnels)
    before = kernel.find_device(name)
    kernel.observe()
    other = "172.30.0.77" if family == 4 else "2001:db8::77"
    ip(harm.format(name=name, own=specs[family].addresses[0], other=other))
    assert kernel.observe().device_changed
    if family == 16 and mended == ("up",):
        mended = ("address", "up")  # IPv6 forgets addresses of a link that goes down.
    assert kernel.ensure_devices([spec, spec6], spec.link) == {name: mended}
    assert (kernel.tunnels, kernel.find_device(name)) == (tunnels, before)


def test_two_devices_are_made_beside_each_other_and_adopted(
    kernel: Kernel, spec: DeviceSpec, spec6: DeviceSpec
) -> None:
    assert kernel.ensure_devices([spec, spec6], spec.link) == {"flannel.1": ("created",), "flannel-v6.1": ("created",)}
    assert kernel.tunnels == {4: index_of("flannel.1"), 16: index_of("flannel-v6.1")}
    data = ip_json("link show flannel-v6.1")[0]["linkinfo"]["info_data"]
    assert (data["id"], data["local6"], data["port"], data["learning"]) == (1, "2001:db8::5", 8472, False)
    found = kernel.find_device("flannel-v6.1")
    assert found is not None and found.addresses == (OWN6,)
    for name in ("name", "mac", "mtu", "vni", "port", "link", "local"):
        assert getattr(found, name) == getattr(spec6, name), name
    again = Kernel()
    assert again.ensure_devices([spec, spec6], spec.link) == {}
    assert again.tunnels == kernel.tunnels
    again.close()


@pytest.mark.parametrize("family", [4, 16], ids=["IPv4", "IPv6"])
def test_device_follows_the_underlay_to_another_link_with_all_its_entries(
    kernel: Kernel, spec: DeviceSpec, spec6: DeviceSpec, family: int
) -> None:
    link = veth("other0", "other1", "172.31.0.5/24")
    ip("addr add 2001:db8:1::5/64 dev other0 nodad")
    ip("link set other0 mtu 9000")
    was, local, mtu = (spec, "172.31.0.5", 8950) if family == 4 else (spec6, "2001:db8:1::5", 8930)
    ensure(kernel, was)
    device = kernel.tunnels[family]
    block = Prefix.parse("10.0.1.0/24")
    entries: set[Entry] = {
        Fdb((device, pack_mac(MAC)), LOCAL[:3] + b"\7" if family == 4 else LOCAL6[:15] + b"\7"),
        Neighbour((device, block.base), pack_mac(MAC)),
        NextHop(HOP, block.base, device),
        Route(block, HOP),
    }
    kernel.apply([Put(entry) for entry in sorted(entries, key=lambda entry: isinstance(entry, Route))])
    moved = replace(was, link=link, local=pack_address(local), mtu=mtu)
    assert ensure(kernel, moved) == ("mtu", "link", "local")
    found = kernel.find_device(was.name)
    assert found is not None
    assert (found.index, found.link, found.local, found.mtu) == (device, link, moved.local, mtu)
    assert entries <= set(kernel.dump(True))
    # And back, to where less fits in.
    assert set(ensure(kernel, was)) == {"mtu", "link", "local"}
    assert ensure(kernel, was) == ()
    assert entries <= set(kernel.dump(True))


def test_strays_go_and_what_others_made_stays(kernel: Kernel, spec: DeviceSpec, spec6: DeviceSpec) -> None:
    ip("link add flannel.9 type vxlan id 9 dev under0 local 172.30.0.5 dstport 8472 nolearning")
    kernel.ensure_devices([spec, spec6], spec.link)
    assert kernel.remove_strays(["flannel.1", "flannel-v6.1"]) == []
    kernel.ensure_devices([spec6], spec.link)
    assert kernel.tunnels == {16: index_of("flannel-v6.1")}
    assert kernel.remove_strays(["flannel-v6.1"]) == ["flannel.1"]
    assert {"flannel.9", "flannel-v6.1"} <= {link["ifname"] for link in ip_json("link show")}
    assert kernel.find_device("flannel.1") is None


def test_what_bears_our_number_is_found_on_whatever_device(kernel: Kernel, spec: DeviceSpec) -> None:
    ensure(kernel, spec)
    device, six = kernel.tunnels[4], Prefix.parse("fd00:0:0:1::/64")
    ours: list[Entry] = [
        NextHop(HOP, pack_address("172.30.0.9"), spec.link),
        NextHop(HOP + 1, pack_address("10.0.2.0"), device),
        Route(Prefix.parse("10.0.1.0/24"), HOP),
        Route(six, gateway=pack_address("2001:db8::9"), device=spec.link),
    ]
    assert kernel.apply([Put(entry) for entry in ours]) == []
    ip("route add 10.0.7.0/24 via 172.30.0.9")
    ip(f"nexthop add id {HOP + 2} via 172.30.0.9 dev under0")
    assert set(kernel.marked(True)) == set(ours)
    assert set(kernel.marked(False)) == set(ours[2:])


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ("id 2 dev under0 local 172.30.0.5 dstport 8472 nolearning", "its VNI is 2, not 1"),
        ("id 1 dev under0 local 172.30.0.5 dstport 4789 nolearning", "its UDP port is 4789, not 8472"),
        ("id 1 dev under0 local 172.30.0.5 dstport 8472", "its learning is True, not False"),
        ("id 1 dev under0 local 172.30.0.5 dstport 8472 nolearning gbp", "its group policy is True, not False"),
        ("id 1 dev under0 dstport 8472 nolearning", "its local address is any, not 172.30.0.5"),
        (
            "id 1 dev under0 local 2001:db8::5 dstport 8472 nolearning",
            "its local address is 2001:db8::5, not 172.30.0.5",
        ),
    ],
)
def test_incompatible_device_is_made_anew_and_the_reason_told(
    kernel: Kernel, spec: DeviceSpec, made: str, reason: str
) -> None:
    ip(f"link add flannel.1 type vxlan {made}")
    assert ensure(kernel, spec) == (f"removed, {reason}", "created")
    assert ensure(kernel, spec) == ()


def test_interface_of_another_kind_by_our_name_is_refused_and_left_alone(kernel: Kernel, spec: DeviceSpec) -> None:
    ip("link add flannel.1 type bridge")
    with pytest.raises(DeviceOccupied, match=r"an interface flannel\.1 exists and its kind is bridge, not vxlan"):
        ensure(kernel, spec)
    assert ip_json("link show flannel.1")[0]["linkinfo"]["info_kind"] == "bridge"


def test_second_device_with_the_same_vni_and_port_is_refused_by_the_kernel(kernel: Kernel, spec: DeviceSpec) -> None:
    ip("link add theirs type vxlan id 1 dev under0 local 172.30.0.5 dstport 8472 nolearning")
    with pytest.raises(KernelRefused, match=r"set up device flannel\.1: File exists"):
        ensure(kernel, spec)


def test_underlay_that_has_gone_is_a_refusal(kernel: Kernel, spec: DeviceSpec) -> None:
    ensure(kernel, spec)
    kernel.observe()
    ip("link del under0")
    assert kernel.observe().device_changed, "the VXLAN device goes with the interface that it runs over"
    with pytest.raises(KernelRefused, match=r"set up device flannel\.1"):
        ensure(kernel, spec)


def addresses() -> list[tuple[str, int]]:
    (shown,) = ip_json("-4 addr show flannel.1")
    return [(a["local"], a["prefixlen"]) for a in shown["addr_info"]]


# --- peers ---


def lease(number: int, *, mac: bytes | None = None) -> Lease:
    base = (NETWORK.first + 256 * number).to_bytes(4, "big")
    remote = (0xAC1E0000 + 256 + number).to_bytes(4, "big")
    vtep = Vtep(1, mac or b"\x02\x01" + number.to_bytes(4, "big"))
    base6 = NETWORK6.host(number << 64)
    return Lease(Prefix(base, 24), Prefix(base6, 64), LeaseAttrs(remote, "vxlan", vtep), 1, number, number)


def entries_for(peer: Lease, here: Here) -> tuple[Entry, ...]:
    backend = backend_of(CONFIG)
    return backend.entries(peer, here)


@dataclass
class Host:
    """A kernel with our device and a tracker over it: the reconciler's work, step by step."""

    kernel: Kernel
    spec: DeviceSpec
    tracker: Tracker
    here: Here

    def want(self, *numbers: int) -> None:
        for number in numbers:
            self.tracker.want(str(number), entries_for(lease(number), self.here))

    def converge(self) -> list[Op]:
        """One pass after a dump; the operations that it took."""
        self.tracker.saw_all(self.kernel.dump(True))
        return self.close_gap()

    def close_gap(self) -> list[Op]:
        ops = self.tracker.pending()
        assert self.kernel.apply(ops) == []
        self.tracker.settle([])
        return ops

    def mend(self) -> None:
        """What a change of the device asks for, but for the dump."""
        ensure(self.kernel, self.spec)
        if self.here.tunnels != self.kernel.tunnels:
            self.here = replace(self.here, tunnels=dict(self.kernel.tunnels))
            self.want(*(int(owner) for owner in self.tracker.owners))

    def observe(self) -> list[Drift]:
        """What the monitor alone tells; a change of the device asks for a dump, as in the reconciler."""
        seen = self.kernel.observe()
        drifts = self.tracker.saw(seen.sights)
        if seen.device_changed or seen.lost:
            self.mend()
            drifts += self.tracker.saw_all(self.kernel.dump(True))
        return drifts

    def entries(self) -> set[Entry]:
        """What there is of ours."""
        return {entry for entry in self.kernel.dump(True) if ours(entry, self.here)}

    def assert_as_wanted(self) -> None:
        wanted = {entry for owner in self.tracker.owners for entry in entries_for(lease(int(owner)), self.here)}
        assert self.entries() == wanted
        assert self.tracker.gap == 0


def host_of(kernel: Kernel, spec: DeviceSpec) -> Host:
    ensure(kernel, spec)
    underlay = Underlay("under0", spec.link, 1500, (spec.local,), (), (), "test")
    here = Here.of(CONFIG, underlay, 1450, nexthops=kernel.has_nexthops(), listed=False)
    here = replace(here, tunnels=dict(kernel.tunnels))
    made = Host(kernel, spec, Tracker(lambda entry: ours(entry, made.here)), here)
    kernel.observe()
    return made


@pytest.fixture
def host(kernel: Kernel, spec: DeviceSpec) -> Host:
    """Five peers, in place."""
    made = host_of(kernel, spec)
    made.want(1, 2, 3, 4, 5)
    made.converge()
    assert made.observe() == []
    made.assert_as_wanted()
    return made


HOP = NEXTHOP_BASE + 256
MAC = format_mac(b"\x02\x01\0\0\0\x01")

DRIFTS = {
    "route removed": "ip route del 10.0.1.0/24",
    "route to elsewhere": "ip route replace 10.0.1.0/24 via 172.30.0.9",
    "route with a plain gateway": "ip route replace 10.0.1.0/24 via 10.0.1.0 dev flannel.1 onlink",
    "route through another peer": f"ip route replace 10.0.1.0/24 nhid {HOP + 256} protocol 111",
    "blackhole": "ip route replace blackhole 10.0.1.0/24",
    "route with an MTU": f"ip route replace 10.0.1.0/24 nhid {HOP} protocol 111 mtu 600",
    "route with metrics": f"ip route replace 10.0.1.0/24 nhid {HOP} protocol 111 advmss 600",
    "route put before ours": "ip route prepend 10.0.1.0/24 via 172.30.0.9",
    "route put before ours on our device": "ip route prepend 10.0.1.0/24 via 10.0.2.0 dev flannel.1 onlink",
    "neighbour removed": "ip neigh del 10.0.1.0 dev flannel.1",
    "neighbour with another MAC": "ip neigh replace 10.0.1.0 dev flannel.1 lladdr 02:03:04:05:06:07 nud permanent",
    "neighbour in another state": f"ip neigh replace 10.0.1.0 dev flannel.1 lladdr {MAC} nud stale",
    "nexthop removed": f"ip nexthop del id {HOP}",
    "nexthop to elsewhere": f"ip nexthop replace id {HOP} via 10.0.2.0 dev flannel.1 onlink protocol 111",
    "nexthop over the underlay": f"ip nexthop replace id {HOP} via 172.30.0.9 dev under0",
    "nexthop a blackhole": f"ip nexthop replace id {HOP} blackhole",
    "FDB entry removed": f"bridge fdb del {MAC} dev flannel.1",
    "FDB entry to elsewhere": f"bridge fdb replace {MAC} dev flannel.1 dst 172.30.0.98",
    "FDB entry with a port": f"bridge fdb replace {MAC} dev flannel.1 dst 172.30.1.1 port 99",
    "FDB entry appended to": f"bridge fdb append {MAC} dev flannel.1 dst 172.30.0.99",
    "FDB entry in another state": f"bridge fdb replace {MAC} dev flannel.1 dst 172.30.1.1 dynamic",
    "IPv6 route removed": "ip route del fd00:0:0:1::/64",
    "IPv6 route to elsewhere": "ip route replace fd00:0:0:1::/64 via 2001:db8::9",
    "IPv6 route without a gateway": "ip route replace fd00:0:0:1::/64 dev flannel.1",
    "IPv6 route of several gateways": "ip route append fd00:0:0:1::/64 via fd00:0:0:2:: dev flannel.1 onlink",
    "IPv6 blackhole": "ip route replace blackhole fd00:0:0:1::/64",
    "IPv6 route with metrics": "ip route replace fd00:0:0:1::/64 via fd00:0:0:1:: dev flannel.1 onlink mtu 1300",
    "IPv6 neighbour removed": "ip neigh del fd00:0:0:1:: dev flannel.1",
    "IPv6 neighbour with another MAC": "ip neigh replace fd00:0:0:1:: dev flannel.1 lladdr 02:03:04:05:06:07",
    "link down": "ip link set flannel.1 down",
    "address removed": "ip addr del 10.0.0.0/32 dev flannel.1",
    "device's MAC changed": "ip link set flannel.1 address 02:00:00:00:00:77",
    "device deleted": "ip link del flannel.1",
}


@pytest.mark.parametrize("line", DRIFTS.values(), ids=DRIFTS.keys())
def test_drift_is_seen_by_the_monitor_and_healed_by_one_pass(host: Host, line: str) -> None:
    sh(*line.split())
    assert host.observe() != []
    host.close_gap()
    host.assert_as_wanted()
    # What the mending echoed is no further drift, and nothing is left that only a dump would tell.
    assert host.observe() == []
    assert host.converge() == []
    (found,) = ip_json("route show 10.0.1.0/24")
    assert (found["nhid"], found["dev"], found["protocol"]) == (HOP, "flannel.1", "111")
    assert "metrics" not in found
    (found,) = ip_json("-6 route show fd00:0:0:1::/64")
    assert (found["gateway"], found["dev"], found["protocol"]) == ("fd00:0:0:1::", "flannel.1", "111")


@pytest.mark.parametrize("line", DRIFTS.values(), ids=DRIFTS.keys())
def test_drift_whose_notifications_are_lost_is_seen_in_a_dump(host: Host, line: str) -> None:
    sh(*line.split())
    host.kernel.observe()
    host.mend()
    host.converge()
    host.assert_as_wanted()


@pytest.mark.parametrize("seen_by", ["monitor", "dump"])
def test_foreign_fdb_entry_is_removed_and_a_foreign_route_elsewhere_is_not(host: Host, seen_by: str) -> None:
    sh(*["bridge", "fdb", "add", "02:01:00:00:00:81", "dev", "flannel.1", "dst", "172.30.0.98"])
    ip("route add 198.51.100.0/24 via 172.30.0.9")
    ip("route add 203.0.113.0/24 dev flannel.1")
    ip("neigh add 172.30.0.77 lladdr 02:00:00:00:00:77 dev under0")
    if seen_by == "monitor":
        assert host.observe() == []
        ops = host.close_gap()
    else:
        host.kernel.observe()
        ops = host.converge()
    assert [type(op) for op in ops] == [Drop]
    routes = {each["dst"] for each in ip_json("route show")}
    assert {"198.51.100.0/24", "203.0.113.0/24"} <= routes
    assert "172.30.0.77" in {each["dst"] for each in ip_json("neigh show dev under0")}


def test_peer_that_left_leaves_nothing(host: Host) -> None:
    host.tracker.want("3", ())
    ops = host.close_gap()
    assert all(isinstance(op, Drop) for op in ops)
    host.assert_as_wanted()
    assert host.observe() == []


def test_peer_with_a_new_mac_gets_its_new_fdb_entry_first_and_loses_the_old_last(host: Host) -> None:
    new = lease(1, mac=pack_mac("02:aa:00:00:00:01"))
    host.tracker.want("1", entries_for(new, host.here))
    ops = host.close_gap()
    fdb, *others = entries_for(new, host.here)
    old_fdb, *_ = entries_for(lease(1), host.here)
    assert ops == [Put(fdb), *(Put(entry) for entry in others if isinstance(entry, Neighbour)), Drop(old_fdb)]
    assert host.observe() == []


def test_flannels_device_and_entries_are_adopted_and_only_boot_routes_rewritten(
    kernel: Kernel, spec: DeviceSpec
) -> None:
    ip(f"link add flannel.1 address {format_mac(spec.mac)} mtu 1450 type vxlan id 1 dev under0 local 172.30.0.5"
       " dstport 8472 nolearning")  # fmt: skip
    ip("addr add 10.0.0.0/32 dev flannel.1")
    ip("link set flannel.1 up")
    for number in (1, 2, 3):
        peer = lease(number)
        vtep = peer.attrs.vtep
        assert vtep is not None and peer.attrs.public_ip is not None
        mac, remote = format_mac(vtep.mac), format_address(peer.attrs.public_ip)
        sh(*f"bridge fdb add {mac} dev flannel.1 dst {remote}".split())
        # flannel's netlink library sets NUD_PERMANENT alone, where `bridge` adds NUD_NOARP.
        stranger = Kernel()
        at = index_of("flannel.1"), vtep.mac
        stranger.apply([Drop(Fdb(at, b"")), Put(Fdb(at, peer.attrs.public_ip))])
        stranger.close()
        for subnet in peer.subnets:
            base = format_address(subnet.base)
            ip(f"neigh add {base} lladdr {mac} dev flannel.1 nud permanent")
            ip(f"route add {subnet} via {base} dev flannel.1 onlink")
    index = index_of("flannel.1")
    assert ensure(kernel, spec) == ("alias",)
    assert kernel.tunnels[4] == index
    host = host_of(kernel, spec)
    host.want(1, 2)
    ops = host.converge()
    put = [op.entry for op in ops if isinstance(op, Put)]
    assert {type(entry).__name__ for entry in put} == {"NextHop", "Route"}, "FDB and neighbours were right"
    assert not any(
        isinstance(op, Put) and op.afresh
        for op in ops
        if isinstance(op.entry, Route) and len(op.entry.destination.base) == 16
    ), "IPv6 routes are replaced in place"
    assert {op.entry[0] for op in ops if isinstance(op, Drop)} == {e[0] for e in entries_for(lease(3), host.here)} - {
        NEXTHOP_BASE + 3 * 256
    }, "a peer that left while nobody watched is removed as well"
    host.assert_as_wanted()
    assert host.converge() == []


def test_one_batch_may_hold_more_operations_than_one_send(host: Host) -> None:
    host.want(*range(1, 301))
    assert len(host.close_gap()) == 6 * 295
    host.assert_as_wanted()


def test_five_thousand_peers_are_applied_dumped_and_withdrawn(kernel: Kernel, spec: DeviceSpec) -> None:
    host = host_of(kernel, spec)
    numbers = range(1, 5001)
    host.want(*numbers)
    assert len(host.converge()) == 6 * 5000
    assert host.observe() == []
    host.assert_as_wanted()
    assert host.converge() == []
    for number in numbers:
        host.tracker.want(str(number), ())
    assert len(host.close_gap()) == 6 * 5000
    assert host.observe() == []
    assert host.entries() == set()


# --- the monitor and the sockets ---


def test_overflow_of_the_monitor_is_reported_once_as_lost(host: Host) -> None:
    host.kernel._monitor.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    for number in range(1, 60):
        sh(*f"ip neigh replace 10.0.1.0 dev flannel.1 lladdr 02:03:04:05:06:{number:02x} nud permanent".split())
    host.kernel.wait(30)
    seen = host.kernel.observe()
    assert seen.lost
    assert not host.kernel.observe().lost
    host.converge()
    host.assert_as_wanted()


def test_fdb_echoes_of_a_large_batch_do_not_overflow_the_monitor(kernel: Kernel, spec: DeviceSpec) -> None:
    host = host_of(kernel, spec)
    kernel._monitor.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    host.want(*range(1, 3001))
    host.close_gap()
    assert host.observe() == []
    assert not kernel.observe().lost


def test_interrupt_from_another_thread_ends_a_wait(kernel: Kernel) -> None:
    waiting = threading.Thread(target=kernel.wait, args=(None,))
    waiting.start()
    kernel.interrupt()
    waiting.join(30)
    assert not waiting.is_alive()


def test_any_number_of_interrupts_is_taken(kernel: Kernel) -> None:
    for _ in range(100_000):
        kernel.interrupt()
    kernel.wait(30)


def test_failure_of_the_socket_is_a_refusal_and_the_next_batch_works(host: Host) -> None:
    host.kernel._commands.close()
    with pytest.raises(KernelRefused, match="netlink batch"):
        host.kernel.apply([Put(Fdb((host.kernel.tunnels[4], pack_mac(MAC)), LOCAL))])
    assert host.converge() == []
    host.kernel._commands.close()
    with pytest.raises(KernelRefused, match="dump"):
        list(host.kernel.dump(True))
    host.assert_as_wanted()


def test_kernel_closed_leaves_no_descriptor(namespace: int) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    Kernel().close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --- removal ---


def test_devices_of_others_are_neither_listed_nor_removed(kernel: Kernel, spec: DeviceSpec) -> None:
    ip("link add theirs type vxlan id 9 dev under0 local 172.30.0.5 dstport 8472 nolearning")
    ip("link add br0 type bridge")
    ensure(kernel, spec)
    assert [found.name for found in kernel.own_devices()] == ["flannel.1"]
    assert not kernel.remove_device("theirs")
    assert not kernel.remove_device("br0")
    assert not kernel.remove_device("none")
    assert kernel.remove_device("flannel.1")
    assert kernel.find_device("flannel.1") is None
    assert {"theirs", "br0", "under0"} <= {link["ifname"] for link in ip_json("link show")}


RULES = firewall.Rules((NETWORK,), (Prefix.parse("10.0.1.0/24"),), ("flannel.1",), masquerade=True, guard="off")


def swept(kernel: Kernel, path: str) -> list[Removed]:
    with contextlib.closing(nft.Nftables()) as nftables:
        return list(cleanup(kernel, nftables, path))


def test_cleanup_removes_all_that_is_ours_and_nothing_else(host: Host, tmp_path: Path) -> None:
    path = str(tmp_path / "subnet.env")
    subnet_file.write(path, [NETWORK, NETWORK6], [Prefix.parse("10.0.0.0/24"), Prefix.parse("fd00::/64")], 1450, True)
    nft.apply(firewall.ruleset(RULES))
    nft.apply("add table inet theirs\n")
    ip("link add theirs type vxlan id 9 dev under0 local 172.30.0.5 dstport 8472 nolearning")
    ip("route add 198.51.100.0/24 via 172.30.0.9")
    ip("nexthop add id 5 via 172.30.0.9 dev under0")
    by_link = [
        NextHop(HOP + 7, pack_address("172.30.0.9"), host.spec.link),
        Route(Prefix.parse("10.7.0.0/24"), HOP + 7),
    ]
    assert host.kernel.apply([Put(entry) for entry in by_link]) == []
    device, *rest = swept(host.kernel, path)
    assert re.fullmatch(r"device flannel\.1 with \d+ FDB, neighbour, nexthop and route entries", device.what)
    assert device.device is not None and device.device.local == LOCAL
    assert rest == [
        Removed("2 routes and nexthop objects by hosts' own addresses"),
        Removed(f"{path} (subnet 10.0.0.0/24 and fd00::/64)"),
        Removed("nftables table inet overlay_agent"),
    ]
    assert not Path(path).exists()
    assert sh("nft", "list", "tables") == "table inet theirs\n"
    assert {link["ifname"] for link in ip_json("link show")} >= {"theirs", "under0", "under1"}
    assert {each["dst"] for each in ip_json("route show")} == {"172.30.0.0/24", "198.51.100.0/24"}
    assert [each["id"] for each in ip_json("nexthop show")] == [5]
    assert swept(host.kernel, path) == [], "a second time there is nothing to do"


def test_cleanup_removes_either_device_and_what_was_left_without_any(
    kernel: Kernel, spec: DeviceSpec, spec6: DeviceSpec, tmp_path: Path
) -> None:
    kernel.ensure_devices([spec, spec6], spec.link)
    path = tmp_path / "subnet.env"
    removed = [each.what.split(" with ")[0] for each in swept(kernel, str(path))]
    assert removed == ["device flannel.1", "device flannel-v6.1"]
    subnet_file.write(str(path), [NETWORK], [Prefix.parse("10.0.0.0/24")], 1450, True)
    assert swept(kernel, str(path)) == [], "whose it is cannot be told"
    route = Route(Prefix.parse("fd00:0:0:1::/64"), gateway=pack_address("2001:db8::9"), device=spec.link)
    kernel.apply([Put(route)])
    assert [each.what.split()[0] for each in swept(kernel, str(path))] == ["1", str(path)]
    assert not path.exists()


def test_cleanup_leaves_a_subnet_file_that_names_another_subnet(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    subnet_file.write(str(path), [NETWORK], [Prefix.parse("10.7.0.0/24")], 1450, True)
    assert [removed.what.split()[0] for removed in swept(host.kernel, str(path))] == ["device"]
    assert path.exists()


# --- the claim ---


def test_second_claim_to_a_host_is_refused_and_names_the_first(namespace: int) -> None:
    with claim_host(), pytest.raises(Claimed, match=f"process {os.getpid()}") as refused:
        claim_host()
    assert refused.value.pid == os.getpid()
    assert command_of(os.getpid()).split()[0] == Path("/proc/self/cmdline").read_text().split("\0")[0]
    claim_host().close()


def test_claim_of_a_process_that_was_killed_is_free(namespace: int) -> None:
    script = "import sys; from overlay.claim import claim_host; c = claim_host(); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(Claimed) as refused:
            claim_host()
        assert refused.value.pid == holder.pid
        assert script in command_of(holder.pid)
        holder.kill()
    claim_host().close()


def test_each_namespace_has_a_claim_of_its_own(namespace: int) -> None:
    with claim_host(), new_namespace(), claim_host():
        pass


def test_command_of_no_process_is_empty() -> None:
    assert command_of(2**22 + 1) == ""


# --- the firewall ---


def test_ruleset_loads_twice_and_is_removed_without_a_trace(namespace: int) -> None:
    text = firewall.ruleset(RULES)
    nft.apply(text)
    once = sh("nft", "list", "ruleset")
    nft.apply(text)
    assert sh("nft", "list", "ruleset") == once
    nft.apply(firewall.removal())
    nft.apply(firewall.removal())
    assert sh("nft", "list", "ruleset") == ""


def test_refused_ruleset_is_one_clause_and_changes_nothing(namespace: int) -> None:
    nft.apply(firewall.ruleset(RULES))
    before = sh("nft", "list", "ruleset")
    with pytest.raises(nft.NftFailed, match=r"^nft refused the ruleset: [^\n]+$"):
        nft.apply("delete table inet overlay_agent\nnonsense\n")
    assert sh("nft", "list", "ruleset") == before


def test_missing_nft_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(nft.NftFailed, match="package nftables"):
        nft.apply(firewall.removal())


@dataclass
class Topology:
    """A router between namespaces: descriptors of the pod, of another host's pod, and of the world outside."""

    pod: int
    peer: int
    world: int


@pytest.fixture
def topology(namespace: int) -> Iterator[Topology]:
    """The host is the test's own namespace. `tunnel` stands for the VXLAN device: a name is all that rules see."""
    with (
        new_namespace() as pod, entered(namespace),
        new_namespace() as peer, entered(namespace),
        new_namespace() as world, entered(namespace),
    ):  # fmt: skip
        for name, other, inside, host_side, far_side in (
            ("cni0", "eth0", pod, "10.0.1.1/24", "10.0.1.5/24"),
            ("tunnel", "eth0", peer, "10.0.2.1/24", "10.0.2.5/24"),
            ("eth0", "out0", world, "192.0.2.1/24", "192.0.2.9/24"),
        ):
            veth(name, f"far-{name}", host_side)
            ip(f"link set far-{name} netns /proc/{os.getpid()}/fd/{inside}")
            with entered(inside):
                ip(f"link set far-{name} name {other}")
                ip(f"addr add {far_side} dev {other}")
                ip(f"link set {other} up")
                ip(f"route add default via {host_side.split('/')[0]}")
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        nft.apply(firewall.ruleset(replace(RULES, devices=("tunnel",))))
        yield Topology(pod, peer, world)


def source_seen(at: int, sender: int, address: str) -> str:
    """The source address with which a datagram from `sender` reaches `address` in the namespace `at`."""
    with entered(at):
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.bind(("0.0.0.0", 4000))
        receiver.settimeout(10)
    with entered(sender):
        sending = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with receiver, sending:
        sending.sendto(b"hello", (address, 4000))
        return str(receiver.recvfrom(64)[1][0])


@pytest.mark.parametrize(
    ("at", "sender", "address", "source"),
    [
        ("world", "pod", "192.0.2.9", "192.0.2.1"),
        ("peer", "pod", "10.0.2.5", "10.0.1.5"),
        ("pod", "peer", "10.0.1.5", "10.0.2.5"),
        ("pod", "world", "10.0.1.5", "192.0.2.9"),
        ("peer", "world", "10.0.2.5", "10.0.2.1"),
    ],
    ids=[
        "a pod that leaves the overlay has the host's address",
        "pod to pod keeps its address",
        "pod from pod keeps its address",
        "a pod of ours sees who calls from outside",
        "what comes from outside enters the tunnel with our address",
    ],
)
def test_addresses_are_translated_as_documented(
    topology: Topology, at: str, sender: str, address: str, source: str
) -> None:
    assert source_seen(getattr(topology, at), getattr(topology, sender), address) == source


def test_longest_device_name_fits_the_kernel(kernel: Kernel, spec: DeviceSpec) -> None:
    vni = 9_999_999
    ensure(kernel, replace(spec, vni=vni, name=device_name(vni)))
    assert kernel.find_device(device_name(vni)) is not None

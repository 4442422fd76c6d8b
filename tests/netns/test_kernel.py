"""The kernel edge against a real kernel: devices, adoption, drift, loss, scale, cleanup, claim, underlay, firewall."""

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
from overlay.claim import Claimed, claim_host, command_of
from overlay.cleanup import Removed, cleanup
from overlay.desired import Local, entries_for, ours
from overlay.device import OWNER, DeviceSpec, derived_mac, device_name
from overlay.kernel import DeviceOccupied, Kernel, KernelRefused
from overlay.model import NEXTHOP_BASE, Drop, Fdb, Op, Put
from overlay.tracker import Drift, Tracker
from overlay.underlay import NoUnderlay, find_underlay
from subnet_lease.model import (
    Lease,
    LeaseAttrs,
    Prefix,
    Vtep,
    format_address,
    format_mac,
    pack_address,
    pack_mac,
)
from tests.netns.namespace import entered, index_of, ip, ip_json, new_namespace, sh, veth

pytestmark = pytest.mark.netns

NETWORK = Prefix.parse("10.0.0.0/8")
LOCAL = pack_address("172.30.0.5")


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
    return DeviceSpec("flannel.1", 1, 8472, link, LOCAL, derived_mac("kernel"), 1450, Prefix.parse("10.0.0.0/32"))


# --- the device ---


def test_device_is_made_as_iproute2_shows_flannels(kernel: Kernel, spec: DeviceSpec) -> None:
    assert kernel.ensure_device(spec) == ("created",)
    (link,) = ip_json("link show flannel.1")
    assert link["ifindex"] == kernel.device
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
    kernel.ensure_device(spec)
    found = kernel.find_device("flannel.1")
    assert found is not None and found.up and found.addresses == (spec.address,)
    for name in ("name", "mac", "mtu", "vni", "port", "link", "local", "learning", "gbp"):
        assert getattr(found, name) == getattr(spec, name), name


@pytest.mark.parametrize(
    "change", [{"learning": True}, {"gbp": True}, {"vni": 77, "name": "flannel.77"}, {"port": 4789}]
)
def test_options_of_the_device_reach_the_kernel_and_are_read_back(
    kernel: Kernel, spec: DeviceSpec, change: dict[str, Any]
) -> None:
    wanted = replace(spec, **change)
    kernel.ensure_device(wanted)
    assert kernel.ensure_device(wanted) == ()
    (link,) = ip_json(f"link show {wanted.name}")
    data = link["linkinfo"]["info_data"]
    assert (data["id"], data["port"], data["learning"]) == (wanted.vni, wanted.port, wanted.learning)
    assert data.get("gbp", False) is wanted.gbp


def test_device_as_wanted_is_not_touched(kernel: Kernel, spec: DeviceSpec) -> None:
    kernel.ensure_device(spec)
    index = kernel.device
    assert kernel.ensure_device(spec) == ()
    assert kernel.device == index


@pytest.mark.parametrize(
    ("harm", "mended"),
    [
        ("link set flannel.1 address 02:00:00:00:00:77", ("mac",)),
        ("link set flannel.1 mtu 1400", ("mtu",)),
        ("link set flannel.1 alias somebody", ("alias",)),
        ("link set flannel.1 down", ("up",)),
        ("addr del 10.0.0.0/32 dev flannel.1", ("address",)),
        ("addr add 10.0.0.9/32 dev flannel.1", ("address",)),
        ("addr add 10.0.0.0/24 dev flannel.1", ("address",)),
    ],
)
def test_alterations_of_the_device_are_put_right_in_place(
    kernel: Kernel, spec: DeviceSpec, harm: str, mended: tuple[str, ...]
) -> None:
    kernel.ensure_device(spec)
    kernel.ensure_device(spec)
    index, before = kernel.device, kernel.find_device("flannel.1")
    kernel.observe()
    ip(harm)
    assert kernel.observe().device_changed
    assert kernel.ensure_device(spec) == mended
    assert (kernel.device, kernel.find_device("flannel.1")) == (index, before)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ("id 2 dev under0 local 172.30.0.5 dstport 8472 nolearning", "its VNI is 2, not 1"),
        ("id 1 dev under0 local 172.30.0.5 dstport 4789 nolearning", "its UDP port is 4789, not 8472"),
        ("id 1 dev under0 local 172.30.0.5 dstport 8472", "its learning is True, not False"),
        ("id 1 dev under0 local 172.30.0.5 dstport 8472 nolearning gbp", "its group policy is True, not False"),
        ("id 1 dev under0 dstport 8472 nolearning", "its local address is any, not 172.30.0.5"),
        ("id 1 dev under0 local 172.30.0.6 dstport 8472 nolearning", "its local address is 172.30.0.6, not 172.30.0.5"),
    ],
)
def test_incompatible_device_is_made_anew_and_the_reason_told(
    kernel: Kernel, spec: DeviceSpec, made: str, reason: str
) -> None:
    ip(f"link add flannel.1 type vxlan {made}")
    assert kernel.ensure_device(spec) == (f"removed, {reason}", "created")
    assert kernel.ensure_device(spec) == ()


def test_device_on_another_underlay_is_made_anew(kernel: Kernel, spec: DeviceSpec) -> None:
    veth("other0", "other1")
    ip("link add flannel.1 type vxlan id 1 dev other0 local 172.30.0.5 dstport 8472 nolearning")
    removed, created = kernel.ensure_device(spec)
    assert re.fullmatch(r"removed, its underlay interface is \d+, not \d+", removed)
    assert created == "created"


def test_interface_of_another_kind_by_our_name_is_refused_and_left_alone(kernel: Kernel, spec: DeviceSpec) -> None:
    ip("link add flannel.1 type bridge")
    with pytest.raises(DeviceOccupied, match=r"an interface flannel\.1 exists and its kind is bridge, not vxlan"):
        kernel.ensure_device(spec)
    assert ip_json("link show flannel.1")[0]["linkinfo"]["info_kind"] == "bridge"


def test_second_device_with_the_same_vni_and_port_is_refused_by_the_kernel(kernel: Kernel, spec: DeviceSpec) -> None:
    ip("link add theirs type vxlan id 1 dev under0 local 172.30.0.5 dstport 8472 nolearning")
    with pytest.raises(KernelRefused, match=r"set up device flannel\.1: File exists"):
        kernel.ensure_device(spec)


def test_underlay_that_has_gone_is_a_refusal(kernel: Kernel, spec: DeviceSpec) -> None:
    kernel.ensure_device(spec)
    kernel.observe()
    ip("link del under0")
    assert kernel.observe().device_changed, "the VXLAN device goes with the interface that it runs over"
    with pytest.raises(KernelRefused, match=r"set up device flannel\.1"):
        kernel.ensure_device(spec)


def addresses() -> list[tuple[str, int]]:
    (shown,) = ip_json("-4 addr show flannel.1")
    return [(a["local"], a["prefixlen"]) for a in shown["addr_info"]]


# --- peers ---


def lease(number: int, *, mac: bytes | None = None) -> Lease:
    base = (NETWORK.first + 256 * number).to_bytes(4, "big")
    remote = (0xAC1E0000 + 256 + number).to_bytes(4, "big")
    vtep = Vtep(1, mac or b"\x02\x01" + number.to_bytes(4, "big"))
    return Lease(Prefix(base, 24), None, LeaseAttrs(remote, "vxlan", vtep), 1, number, number)


@dataclass
class Host:
    """A kernel with our device and a tracker over it: the reconciler's work, step by step."""

    kernel: Kernel
    spec: DeviceSpec
    tracker: Tracker
    local: Local

    def want(self, *numbers: int) -> None:
        for number in numbers:
            self.tracker.want(str(number), entries_for(lease(number), self.local))

    def converge(self) -> list[Op]:
        """One pass after a dump; the operations that it took."""
        self.tracker.saw_all(self.kernel.dump(True))
        return self.close_gap()

    def close_gap(self) -> list[Op]:
        ops = self.tracker.pending()
        assert self.kernel.apply(ops) == []
        self.tracker.settle([])
        return ops

    def observe(self) -> list[Drift]:
        """What the monitor alone tells; a change of the device asks for a dump, as in the reconciler."""
        seen = self.kernel.observe()
        drifts = self.tracker.saw(seen.sights)
        if seen.device_changed or seen.lost:
            self.kernel.ensure_device(self.spec)
            if self.local.device != self.kernel.device:
                self.local = replace(self.local, device=self.kernel.device)
                self.want(*(int(owner) for owner in self.tracker.owners))
            drifts += self.tracker.saw_all(self.kernel.dump(True))
        return drifts

    def assert_as_wanted(self) -> None:
        wanted = {entry for owner in self.tracker.owners for entry in entries_for(lease(int(owner)), self.local)}
        assert set(self.kernel.dump(True)) == wanted
        assert self.tracker.gap == 0


def host_of(kernel: Kernel, spec: DeviceSpec) -> Host:
    kernel.ensure_device(spec)
    local = Local(NETWORK, kernel.device, kernel.has_nexthops())
    made = Host(kernel, spec, Tracker(lambda entry: ours(entry, made.local)), local)
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
    "route with metrics": f"ip route replace 10.0.1.0/24 nhid {HOP} protocol 111 mtu 600",
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


DUMPED_DRIFTS = {name: line for name, line in DRIFTS.items() if name != "route put before ours"}
"""What a dump of our device tells as well. A route on another device is not on it."""


@pytest.mark.parametrize("line", DUMPED_DRIFTS.values(), ids=DUMPED_DRIFTS.keys())
def test_drift_whose_notifications_are_lost_is_seen_in_a_dump(host: Host, line: str) -> None:
    sh(*line.split())
    host.kernel.observe()
    host.kernel.ensure_device(host.spec)
    if host.local.device != host.kernel.device:
        host.local = replace(host.local, device=host.kernel.device)
        host.want(1, 2, 3, 4, 5)
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
    host.tracker.want("1", entries_for(new, host.local))
    ops = host.close_gap()
    fdb, neighbour, *_ = entries_for(new, host.local)
    old_fdb, *_ = entries_for(lease(1), host.local)
    assert ops == [Put(fdb), Put(neighbour), Drop(old_fdb)]
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
        vtep, base = peer.attrs.vtep, format_address(peer.subnet.base)
        assert vtep is not None
        mac, remote = format_mac(vtep.mac), format_address(peer.attrs.public_ip)
        sh(*f"bridge fdb add {mac} dev flannel.1 dst {remote}".split())
        # flannel's netlink library sets NUD_PERMANENT alone, where `bridge` adds NUD_NOARP.
        stranger = Kernel()
        stranger.device = index_of("flannel.1")
        stranger.apply([Drop(Fdb(vtep.mac, b"")), Put(Fdb(vtep.mac, peer.attrs.public_ip))])
        stranger.close()
        ip(f"neigh add {base} lladdr {mac} dev flannel.1 nud permanent")
        ip(f"route add {peer.subnet} via {base} dev flannel.1 onlink")
    index = index_of("flannel.1")
    assert kernel.ensure_device(spec) == ("alias",)
    assert kernel.device == index
    host = host_of(kernel, spec)
    host.want(1, 2)
    ops = host.converge()
    put = [op.entry for op in ops if isinstance(op, Put)]
    assert {type(entry).__name__ for entry in put} == {"NextHop", "Route"}, "FDB and neighbours were right"
    assert {op.entry[0] for op in ops if isinstance(op, Drop)} == {e[0] for e in entries_for(lease(3), host.local)} - {
        NEXTHOP_BASE + 3 * 256
    }, "a peer that left while nobody watched is removed as well"
    host.assert_as_wanted()
    assert host.converge() == []


def test_one_batch_may_hold_more_operations_than_one_send(host: Host) -> None:
    host.want(*range(1, 301))
    assert len(host.close_gap()) == 4 * 295
    host.assert_as_wanted()


def test_five_thousand_peers_are_applied_dumped_and_withdrawn(kernel: Kernel, spec: DeviceSpec) -> None:
    host = host_of(kernel, spec)
    numbers = range(1, 5001)
    host.want(*numbers)
    assert len(host.converge()) == 4 * 5000
    assert host.observe() == []
    host.assert_as_wanted()
    assert host.converge() == []
    for number in numbers:
        host.tracker.want(str(number), ())
    assert len(host.close_gap()) == 4 * 5000
    assert host.observe() == []
    assert not list(kernel.dump(True))


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
        host.kernel.apply([Put(Fdb(pack_mac(MAC), LOCAL))])
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
    kernel.ensure_device(spec)
    assert [found.name for found in kernel.own_devices()] == ["flannel.1"]
    assert not kernel.remove_device("theirs")
    assert not kernel.remove_device("br0")
    assert not kernel.remove_device("none")
    assert kernel.remove_device("flannel.1")
    assert kernel.find_device("flannel.1") is None
    assert {"theirs", "br0", "under0"} <= {link["ifname"] for link in ip_json("link show")}


def test_cleanup_removes_all_that_is_ours_and_nothing_else(host: Host, tmp_path: Path) -> None:
    path = str(tmp_path / "subnet.env")
    subnet_file.write(path, NETWORK, Prefix.parse("10.0.0.0/24"), 1450, True)
    nft.apply(firewall.ruleset(NETWORK, Prefix.parse("10.0.0.0/24"), "flannel.1"))
    nft.apply("add table inet theirs\n")
    ip("link add theirs type vxlan id 9 dev under0 local 172.30.0.5 dstport 8472 nolearning")
    ip("route add 198.51.100.0/24 via 172.30.0.9")
    ip("nexthop add id 5 via 172.30.0.9 dev under0")
    assert list(cleanup(host.kernel, path)) == [
        Removed("device flannel.1 with 20 FDB, neighbour, nexthop and route entries", LOCAL),
        Removed(f"{path} (subnet 10.0.0.0/24)"),
        Removed("nftables table inet overlay_agent"),
    ]
    assert not Path(path).exists()
    assert sh("nft", "list", "tables") == "table inet theirs\n"
    assert {link["ifname"] for link in ip_json("link show")} >= {"theirs", "under0", "under1"}
    assert {each["dst"] for each in ip_json("route show")} == {"172.30.0.0/24", "198.51.100.0/24"}
    assert [each["id"] for each in ip_json("nexthop show")] == [5]
    assert list(cleanup(host.kernel, path)) == [], "a second time there is nothing to do"


def test_cleanup_leaves_a_subnet_file_that_names_another_subnet(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    subnet_file.write(str(path), NETWORK, Prefix.parse("10.7.0.0/24"), 1450, True)
    assert [removed.what.split()[0] for removed in cleanup(host.kernel, str(path))] == ["device"]
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


# --- the underlay ---


@pytest.fixture
def three_links(namespace: int) -> None:
    """Three interfaces: the default routes leave by `beta` (metric 50) and `alpha` (metric 100)."""
    veth("alpha", "alpha-peer", "192.0.2.5/24")
    veth("beta", "beta-peer", "198.51.100.5/24")
    ip("addr add 198.51.100.6/24 dev beta")
    veth("gamma", "gamma-peer", "203.0.113.5/24")
    ip("route add default via 192.0.2.1 metric 100")
    ip("route add default via 198.51.100.1 metric 50")
    ip("route add default via 203.0.113.1 metric 10 table 100")
    ip("route add 100.64.0.0/10 via 203.0.113.1")


@pytest.mark.parametrize(
    ("options", "name", "address", "why"),
    [
        ({"ifaces": ["alpha"]}, "alpha", "192.0.2.5", "--iface alpha"),
        ({"ifaces": ["nothing", "gamma"]}, "gamma", "203.0.113.5", "--iface gamma"),
        ({"ifaces": ["198.51.100.6"]}, "beta", "198.51.100.6", "--iface 198.51.100.6"),
        ({"regexes": ["^gam"]}, "gamma", "203.0.113.5", "--iface-regex ^gam"),
        ({"regexes": [r"^192\.0\."]}, "alpha", "192.0.2.5", r"--iface-regex ^192\.0\."),
        ({"ifaces": ["nothing"], "regexes": ["^al"]}, "alpha", "192.0.2.5", "--iface-regex ^al"),
        ({"can_reach": "100.64.3.4"}, "gamma", "203.0.113.5", "--iface-can-reach 100.64.3.4"),
        ({"public_ip": "203.0.113.5"}, "gamma", "203.0.113.5", "it has --public-ip 203.0.113.5"),
        ({"ifaces": ["beta"], "public_ip": "198.51.100.6"}, "beta", "198.51.100.6", "--iface beta"),
        ({"public_ip": "8.8.8.8"}, "beta", "198.51.100.5", "it has the default route"),
        ({}, "beta", "198.51.100.5", "it has the default route"),
    ],
)
def test_underlay_is_chosen_in_flannels_order(
    three_links: None, options: dict[str, Any], name: str, address: str, why: str
) -> None:
    if "public_ip" in options:
        options = {**options, "public_ip": pack_address(str(options["public_ip"]))}
    found = find_underlay(**options, vni_device="flannel.1")
    assert (found.name, found.index, format_address(found.address)) == (name, index_of(name), address)
    assert (found.mtu, found.why) == (1500, why)
    assert [str(link) for link in found.links] == ["192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ifaces": ["delta"], "regexes": ["^d"]}, "fits --iface delta, --iface-regex ^d; there is "),
        ({"can_reach": "127.0.0.1"}, "the route to 127.0.0.1 leaves by no interface that has an address; there is "),
        ({}, "this host has no IPv4 default route to tell the underlay by: use --iface. There is "),
    ],
)
def test_without_an_underlay_that_fits_the_candidates_are_listed(
    three_links: None, options: dict[str, Any], text: str
) -> None:
    ip("route del default metric 50")
    ip("route del default metric 100")
    candidates = "alpha (192.0.2.5), beta (198.51.100.5, 198.51.100.6), gamma (203.0.113.5)"
    with pytest.raises(NoUnderlay) as refused:
        find_underlay(**options, vni_device="flannel.1")
    assert text in str(refused.value)
    shown = str(refused.value).split(text)[1]
    assert sorted(shown.replace("), ", ")|").split("|")) == candidates.replace("), ", ")|").split("|")


def test_underlay_that_nothing_leads_to_is_refused(three_links: None) -> None:
    ip("route del default metric 50")
    ip("route del default metric 100")
    with pytest.raises(NoUnderlay, match=r"--iface-can-reach 8\.8\.8\.8: this host has no route to 8\.8\.8\.8"):
        find_underlay(can_reach="8.8.8.8", vni_device="flannel.1")


def test_host_without_addresses_has_no_underlay(namespace: int) -> None:
    with pytest.raises(NoUnderlay, match="There is none"):
        find_underlay(vni_device="flannel.1")


def test_overlay_device_is_never_its_own_underlay(three_links: None) -> None:
    ip("link add flannel.1 type vxlan id 1 dev alpha dstport 8472")
    ip("addr add 10.0.0.0/32 dev flannel.1")
    ip("link set flannel.1 up")
    ip("route add default dev flannel.1 metric 1")
    with pytest.raises(NoUnderlay):
        find_underlay(ifaces=["flannel.1"], vni_device="flannel.1")


def test_multipath_default_route_tells_an_underlay(namespace: int) -> None:
    veth("alpha", "alpha-peer", "192.0.2.5/24")
    veth("beta", "beta-peer", "198.51.100.5/24")
    ip("route add default nexthop via 198.51.100.1 nexthop via 192.0.2.1")
    assert find_underlay(vni_device="flannel.1").name == "beta"


# --- the firewall ---


def test_ruleset_loads_twice_and_is_removed_without_a_trace(namespace: int) -> None:
    text = firewall.ruleset(NETWORK, Prefix.parse("10.0.1.0/24"), "flannel.1")
    nft.apply(text)
    once = sh("nft", "list", "ruleset")
    nft.apply(text)
    assert sh("nft", "list", "ruleset") == once
    assert nft.has_table(firewall.TABLE)
    nft.apply(firewall.removal())
    nft.apply(firewall.removal())
    assert sh("nft", "list", "ruleset") == ""
    assert not nft.has_table(firewall.TABLE)


def test_refused_ruleset_is_one_clause_and_changes_nothing(namespace: int) -> None:
    nft.apply(firewall.ruleset(NETWORK, Prefix.parse("10.0.1.0/24"), "flannel.1"))
    before = sh("nft", "list", "ruleset")
    with pytest.raises(nft.NftFailed, match=r"^nft refused the ruleset: [^\n]+$"):
        nft.apply("delete table inet overlay_agent\nnonsense\n")
    assert sh("nft", "list", "ruleset") == before


def test_missing_nft_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(nft.NftFailed, match="package nftables"):
        nft.apply(firewall.removal())
    assert not nft.has_table(firewall.TABLE)


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
        nft.apply(firewall.ruleset(NETWORK, Prefix.parse("10.0.1.0/24"), "tunnel"))
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
    kernel.ensure_device(replace(spec, vni=vni, name=device_name(vni)))
    assert kernel.find_device(device_name(vni)) is not None

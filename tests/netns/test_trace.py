"""`overlay-agent trace` on the hosts of labs: faults are made for real, one at a time, and it must name just that one.

While a fault stands, the agent of the host is stopped, for it would mend most of them at once; it mends them after.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from overlay.cluster import Lab
from overlay.cluster_hosts import Host, wait_until
from overlay.commands.common import roster_of
from overlay.commands.trace import packet_filters
from overlay.netconf import usable
from overlay.queries import Queries
from overlay.roster import Roster
from overlay.topology import network_config
from overlay.trace import Packet, Trace, as_json
from overlay.trace_send import TABLE
from subnet_lease.model import pack_address
from tests.conftest import MakeLab

ROOT = Path(__file__).parents[2]
AGENT = (sys.executable, "-P", "-m", "agent")
SECONDS = 60.0


# --- the labs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vxlan(make_module_lab: MakeLab) -> Lab:
    """Two hosts, both families above and below, tunnels."""
    return _up(make_module_lab, "vxlan")


@pytest.fixture(scope="module")
def direct(make_module_lab: MakeLab) -> Lab:
    """The same with routes where a route leads."""
    return _up(make_module_lab, "direct")


@pytest.fixture(scope="module")
def host_gw(make_module_lab: MakeLab) -> Lab:
    """The same with routes alone."""
    return _up(make_module_lab, "host-gw")


def _up(make: MakeLab, backend: str) -> Lab:
    config = network_config("46", backend)
    lab = make(hosts=2, pods=1, underlay="46", config=config, agent_options=("--ip-masq",))
    lab.up()
    return lab


def command(host: Host, src: str, dst: str, *options: str) -> list[str]:
    """The command line of a trace on the host."""
    known = ("--config", os.devnull, "--etcd-endpoints", host.lab.etcd_endpoint(4), "--state-dir", os.devnull)
    return host.inside(*AGENT, "trace", *known, *options, src, dst)


def run(host: Host, src: str, dst: str, *options: str) -> dict[str, Any]:
    """What the command prints as JSON; its exit code is that of its verdict."""
    done = subprocess.run(
        command(host, src, dst, "--json", *options), cwd=ROOT, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode in (0, 1) and not done.stderr, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (not found["open"])
    return found


def hosts_of(lab: Lab) -> Roster:
    """The hosts as their leases have them."""
    value = lab.store.read_config()
    assert value is not None
    return roster_of(usable(value), lab.store.snapshot())


def trace(host: Host, roster: Roster, src: str, dst: str, **more: Any) -> dict[str, Any]:
    """What the command would find there, without the time that a process takes."""
    packet = Packet(pack_address(src), pack_address(dst), **more)

    def follow() -> dict[str, Any]:
        with Queries() as kernel:
            followed = Trace(kernel, packet_filters(), roster, packet)
            return as_json(followed, packet, list(followed.steps()), None)

    return host.made(follow)


# --- nothing is wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["vxlan", "direct", "host_gw"])
@pytest.mark.parametrize("family", [4, 6])
def test_on_a_healthy_host_nothing_is_wrong(request: pytest.FixtureRequest, backend: str, family: int) -> None:
    lab: Lab = request.getfixturevalue(backend)
    here, there = lab.hosts
    roster = hosts_of(lab)
    own, far = here.pods[0].addresses[family], there.pods[0].addresses[family]
    ways = [
        (own, far),
        (far, own),
        (here.underlay_ips[family], far),
        (there.underlay_ips[family], own),
        (far, here.underlay_ips[family]),
        (far, str(here.gateways[family].ip)),
        (str(here.gateways[family].ip), own),
        (own, there.underlay_ips[family]),
    ]
    for src, dst in ways:
        found = trace(here, roster, src, dst)
        assert found["open"] and found["wrong"] is None, found
        assert len(found["steps"]) > 1
    assert trace(here, roster, own, far, protocol="tcp", port=443, size=1400, df=True)["open"]


# --- faults ------------------------------------------------------------------------------------------------------


class Scene(NamedTuple):
    """A fault's place: `here` is where it is made and traced; addresses are of one family."""

    here: Host
    there: Host
    family: int

    @property
    def own(self) -> str:
        return self.here.pods[0].addresses[self.family]

    @property
    def far(self) -> str:
        return self.there.pods[0].addresses[self.family]

    @property
    def far_subnet(self) -> str:
        return self.there.subnets[self.family]

    @property
    def far_base(self) -> str:
        return str(self.there.gateways[self.family].network.network_address)

    @property
    def far_host(self) -> str:
        return self.there.underlay_ips[self.family]

    @property
    def own_host(self) -> str:
        return self.here.underlay_ips[self.family]

    @property
    def hub(self) -> str:
        return str(self.here.seat.link.hub[self.family].ip)

    @property
    def bits(self) -> int:
        return 32 if self.family == 4 else 128

    @property
    def tunnel(self) -> str:
        return "flannel.1" if self.family == 4 else "flannel-v6.1"

    @property
    def far_mac(self) -> str:
        return str(self.there.json("ip", "link", "show", self.tunnel)[0]["address"])

    @property
    def tunnel_setting(self) -> str:
        return self.tunnel.replace(".", "/")

    @property
    def empty(self) -> str:
        """An address of this host's subnet that no pod has."""
        return str(self.here.gateways[self.family].ip + 77)

    @property
    def ip(self) -> str:
        return "ip" if self.family == 4 else "ip6"

    @property
    def iptables(self) -> str:
        return "iptables" if self.family == 4 else "ip6tables"

    @property
    def nobodys(self) -> str:
        """An address of the overlay in no host's subnet."""
        taken = {host.subnets[self.family] for host in (self.here, self.there)}
        blocks = (
            [f"10.244.{number}" for number in (50, 51, 52)]
            if self.family == 4
            else ["fd00:244:0:50:", "fd00:244:0:51:"]
        )
        ends = [f"{block}.5" if self.family == 4 else f"{block}:5" for block in blocks]
        free = [each for each in ends if not any(each.startswith(subnet.partition("/")[0][:-1]) for subnet in taken)]
        return free[0]

    def formed(self, text: str) -> str:
        """The text with the facts of the scene, as `{far}`, put in."""
        names = [name for name in vars(Scene) if isinstance(vars(Scene)[name], property)]
        return text.format(**{name: getattr(self, name) for name in names if f"{{{name}}}" in text}, family=self.family)


class Fault(NamedTuple):
    """How it is made, in the host's shell, and undone, as far as the agent does not; at which step trace must name it,
    by which cause, and with which words. Packets of more than the usual `size` may not be cut.
    """

    make: str
    where: str
    cause: str | None
    says: str
    undo: str = ""
    arriving: bool = False
    families: tuple[int, ...] = (4, 6)
    size: int = 84
    src: str = "{own}"
    dst: str = "{far}"


FAULTS = {
    "neighbour missing": Fault(
        "ip neigh del {far_base} dev {tunnel}",
        "neighbour",
        "neighbour_wrong",
        "{far_base} on {tunnel} is missing",
        families=(4,),
    ),
    "neighbour wrong": Fault(
        "ip neigh replace {far_base} lladdr 02:11:22:33:44:55 nud permanent dev {tunnel}",
        "neighbour",
        "neighbour_wrong",
        "has 02:11:22:33:44:55; the lease says {far_mac}",
        families=(6,),
    ),
    "FDB entry missing": Fault(
        "bridge fdb del {far_mac} dev {tunnel}", "fdb", "fdb_wrong", "{far_mac} on {tunnel} is missing", families=(6,)
    ),
    "FDB entry wrong": Fault(
        "bridge fdb replace {far_mac} dev {tunnel} self permanent dst {hub}",
        "fdb",
        "fdb_wrong",
        "leads to {hub}; the lease says {far_host}",
        families=(4,),
    ),
    "route missing": Fault(
        "ip -{family} route del {far_subnet}", "route", "route_wrong", "the route to {far_subnet} is missing"
    ),
    "route of another tool": Fault(
        "ip -{family} route add {far}/{bits} via {hub}",
        "route",
        "route_foreign",
        "another route is in the way, of protocol boot: it goes by {far}/{bits} via {hub} dev eth0",
        undo="ip -{family} route del {far}/{bits}",
    ),
    "policy rule": Fault(
        "ip -{family} route add default via {hub} table 77; ip -{family} rule add to {far_subnet} table 77 priority 99",
        "route",
        "route_foreign",
        "rule 99 sends it to table 77",
        undo="ip -{family} rule del priority 99; ip -{family} route flush table 77",
    ),
    "device down": Fault("ip link set {tunnel} down", "device", "device_down", "{tunnel} is down", families=(6,)),
    "device gone": Fault(
        "ip link del {tunnel}", "device", "device_missing", "there is no VXLAN device {tunnel}", families=(4,)
    ),
    "blackhole": Fault(
        "ip -{family} route add blackhole {far}/{bits}",
        "route",
        "route_foreign",
        "the blackhole route to {far}/{bits}",
        undo="ip -{family} route del blackhole {far}/{bits}",
        families=(4,),
    ),
    "unreachable": Fault(
        "ip -{family} route add unreachable {far}/{bits}",
        "route",
        "route_foreign",
        "the unreachable route to {far}/{bits}",
        undo="ip -{family} route del unreachable {far}/{bits}",
        families=(6,),
    ),
    "underlay blackhole": Fault(
        "ip -{family} route add blackhole {far_host}/{bits}",
        "underlay route",
        "underlay_unreachable",
        "the blackhole route to {far_host}/{bits}",
        undo="ip -{family} route del blackhole {far_host}/{bits}",
        families=(6,),
    ),
    "underlay into the tunnel": Fault(
        "ip -{family} route add {far_host}/{bits} dev {tunnel}",
        "underlay route",
        "route_foreign",
        "would go into the tunnel {tunnel} themselves",
        undo="ip -{family} route del {far_host}/{bits}",
        families=(4,),
    ),
    "underlay neighbour silent": Fault(
        "ip neigh replace {far_host} nud failed dev eth0; ip neigh change {far_host} nud failed dev eth0",
        "underlay neighbour",
        "peer_down",
        "nobody answers for {far_host} on eth0",
        undo="ip neigh del {far_host} dev eth0",
        families=(6,),
    ),
    "MTU too small": Fault(
        "ip link set {tunnel} mtu 1300", "mtu", "path_mtu", "1400 bytes are more than", size=1400, families=(4,)
    ),
    "underlay MTU too small": Fault(
        "ip link set eth0 mtu 1390",
        "underlay mtu",
        "path_mtu",
        "more than the MTU 1390 of eth0",
        undo="ip link set eth0 mtu 1500",
        size=1370,
        families=(6,),
    ),
    "forwarding off": Fault(
        "sysctl -qw net.ipv4.conf.cni0.forwarding=0 net.ipv6.conf.all.forwarding=0",
        "forwarding",
        "forwarding_off",
        "does not forward IPv{family} packets that come in by cni0",
        undo="sysctl -qw net.ipv4.conf.cni0.forwarding=1 net.ipv6.conf.all.forwarding=1",
    ),
    "policy of iptables": Fault(
        "{iptables}-legacy -P FORWARD DROP",
        "firewall",
        "forward_drop",
        "{iptables}-legacy FORWARD refuses it (forward): policy drop",
        undo="{iptables}-legacy -P FORWARD ACCEPT",
        families=(4,),
    ),
    "rule of iptables": Fault(
        "{iptables}-nft -I FORWARD -d {far_subnet} -j DROP",
        "firewall",
        "forward_drop",
        "{iptables}-nft FORWARD refuses it (forward): -A FORWARD -d {far_subnet} -j DROP",
        undo="{iptables}-nft -D FORWARD -d {far_subnet} -j DROP",
        families=(6,),
    ),
    "policy of nftables": Fault(
        "nft 'add table {ip} other; add chain {ip} other wall {{ type filter hook forward priority 0; policy drop; }}'",
        "firewall",
        "forward_drop",
        "nftables {ip} other wall refuses it (forward): policy drop",
        undo="nft delete table {ip} other",
        families=(6,),
    ),
    "rule of nftables": Fault(
        "nft 'add table inet other; add chain inet other wall {{ type filter hook forward priority 5; }}; "
        'add rule inet other wall iifname "cni0" {ip} daddr {far_subnet} counter drop\'',
        "firewall",
        "forward_drop",
        "nftables inet other wall refuses it (forward): iifname cni0 {ip} daddr {far_subnet} drop",
        undo="nft delete table inet other",
        families=(4,),
    ),
    "guard": Fault(
        "nft 'delete element inet overlay_agent peers{family} {{ {far_host} }}'",
        "underlay firewall",
        "guard_drops",
        "nftables inet overlay_agent guard refuses it (input)",
        arriving=True,
    ),
    "reverse path": Fault(
        "sysctl -qw net.ipv4.conf.{tunnel_setting}.rp_filter=1; ip route del {far_subnet}",
        "rp_filter",
        "rp_filter",
        "the strict reverse path filter drops what comes from {far} by {tunnel}",
        undo="sysctl -qw net.ipv4.conf.{tunnel_setting}.rp_filter=0",
        arriving=True,
        families=(4,),
    ),
    "reverse path without the tunnel": Fault(
        "sysctl -qw net.ipv4.conf.eth0.rp_filter=1",
        "rp_filter",
        "rp_filter",
        "drops what comes from {far} by eth0: the way back is by {tunnel}",
        undo="sysctl -qw net.ipv4.conf.eth0.rp_filter=0",
        arriving=True,
        families=(4,),
        dst="{own_host}",
    ),
    "peer's address on this host": Fault(
        "ip addr add {far_host}/{bits} dev lo",
        "underlay route",
        "duplicate_public_ip",
        "{far_host}, the peer's address, is this host's own too",
        undo="ip addr del {far_host}/{bits} dev lo",
        families=(4,),
    ),
    "own address gone": Fault(
        "ip -6 addr del {own_host}/64 dev eth0",
        "underlay route",
        "underlay_choice",
        "leave from {own_host}, which this host has not any more",
        undo="ip -6 addr add {own_host}/64 dev eth0 nodad",
        families=(6,),
    ),
    "forwarding off for what arrives": Fault(
        "sysctl -qw net.ipv4.conf.{tunnel_setting}.forwarding=0 net.ipv6.conf.all.forwarding=0",
        "forwarding",
        "forwarding_off",
        "does not forward IPv{family} packets that come in by {tunnel}",
        undo="sysctl -qw net.ipv4.conf.{tunnel_setting}.forwarding=1 net.ipv6.conf.all.forwarding=1",
        arriving=True,
        families=(6,),
    ),
    "pods' bridge down": Fault(
        "ip link set cni0 down",
        "route",
        None,
        "no link of this host has {own}: the route",
        undo="PODS",
        arriving=True,
        families=(4,),
    ),
    "no such pod": Fault(
        "ip neigh replace {empty} nud failed dev cni0; ip neigh change {empty} nud failed dev cni0",
        "neighbour",
        None,
        "nobody answers for {empty} on cni0",
        undo="ip neigh del {empty} dev cni0",
        arriving=True,
        dst="{empty}",
        families=(6,),
    ),
    "nobody's subnet": Fault("true", "lease", None, "is in no host's subnet", dst="{nobodys}", families=(4,)),
    "nobody's source": Fault(
        "true", "source", None, "{nobodys} is no address of this host", src="{nobodys}", families=(6,)
    ),
    "stranger's packets": Fault(
        "true", "lease", None, "is in no host's subnet", src="{nobodys}", dst="{own}", families=(4,)
    ),
}


@contextlib.contextmanager
def stopped(host: Host) -> Iterator[None]:
    """The host's agent does nothing inside the block; after it, it has put right what it can."""
    pid = host.agent_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
        host.lab.wait_converged()


@contextlib.contextmanager
def made(scene: Scene, fault: Fault) -> Iterator[None]:
    """The fault stands inside the block."""
    make, undo = scene.formed(fault.make), scene.formed(fault.undo)
    with stopped(scene.here):
        try:
            done = scene.here.run("sh", "-c", make)
            assert not done.returncode, done.stderr
            yield
        finally:
            if undo == "PODS":
                scene.here.attach_pods()
            elif undo:
                done = scene.here.run("sh", "-c", undo)
                assert not done.returncode, done.stderr
    roster = hosts_of(scene.here.lab)
    wait_until(lambda: trace(scene.here, roster, scene.own, scene.far)["open"], what="the way is open again")


def cases(faults: Sequence[str]) -> list[Any]:
    return [pytest.param(name, family, id=f"{name}-IPv{family}") for name in faults for family in FAULTS[name].families]


def name_the_fault(lab: Lab, name: str, family: int) -> None:
    fault, scene = FAULTS[name], Scene(lab.hosts[0], lab.hosts[1], family)
    src, dst = scene.formed(fault.src), scene.formed(fault.dst)
    if fault.arriving:
        src, dst = (scene.far, scene.own) if fault.dst == "{far}" else (scene.far, dst)
    # Before it is made: some of what is said of it is not to be had while it stands.
    says = scene.formed(fault.says)
    roster = hosts_of(lab)
    with made(scene, fault):
        found = trace(scene.here, roster, src, dst, size=fault.size, df=fault.size > 84)
    assert found["wrong"] is not None, found
    named = found["wrong"]["where"], found["wrong"]["cause"], says in found["wrong"]["what"]
    assert named == (fault.where, fault.cause, True), found["wrong"]
    assert found["wrong"]["command"] and found["wrong"]["remedy"]
    assert [step["state"] for step in found["steps"]].count("wrong") == 1


@pytest.mark.parametrize(("name", "family"), cases(list(FAULTS)))
def test_trace_names_the_fault_and_nothing_else(vxlan: Lab, name: str, family: int) -> None:
    name_the_fault(vxlan, name, family)


@pytest.mark.parametrize(("backend", "family"), [("direct", 4), ("host_gw", 6)])
@pytest.mark.parametrize("name", ["route missing", "route of another tool"])
def test_faults_of_routes_are_named_without_tunnels_too(
    request: pytest.FixtureRequest, backend: str, name: str, family: int
) -> None:
    name_the_fault(request.getfixturevalue(backend), name, family)


# --- a real packet -----------------------------------------------------------------------------------------------


def left_behind(host: Host) -> list[str]:
    """What of a trace is still on the host."""
    tables = host.run("nft", "list", "tables").stdout.splitlines()
    links = [link["ifname"] for link in host.json("ip", "link")]
    return [each for each in (*tables, *links) if TABLE in each or each.startswith("oatrace")]


@pytest.mark.parametrize(
    ("backend", "family", "protocol", "own"),
    [("vxlan", 4, "icmp", True), ("vxlan", 6, "udp", True), ("vxlan", 6, "icmp", False), ("host_gw", 4, "udp", True)],
)
def test_a_packet_that_is_sent_passes_every_interface_and_is_answered(
    request: pytest.FixtureRequest, backend: str, family: int, protocol: str, own: bool
) -> None:
    lab: Lab = request.getfixturevalue(backend)
    scene = Scene(lab.hosts[0], lab.hosts[1], family)
    tunnel = [scene.tunnel] if backend == "vxlan" else []
    src, first = (scene.own, ["cni0"]) if own else (scene.here.underlay_ips[family], [])
    found = run(scene.here, src, scene.far, "--send", "--protocol", protocol)
    assert found["open"], (found["wrong"], found["sent"])
    assert sorted(found["sent"]["seen"]) == sorted([*first, *tunnel, "eth0"]), found["sent"]
    # What a host sends from its address on the underlay gets that of the tunnel: so it is answered there.
    assert found["sent"]["answer"] and sorted(found["sent"]["answer_seen"]) == sorted(found["sent"]["seen"]), found
    assert left_behind(scene.here) == []


def test_a_packet_whose_source_is_translated_is_followed_as_well(vxlan: Lab) -> None:
    scene = Scene(vxlan.hosts[0], vxlan.hosts[1], 4)
    found = run(scene.here, scene.own, scene.hub, "--send")
    assert found["open"] and sorted(found["sent"]["seen"]) == ["cni0", "eth0"], found["sent"]
    assert found["sent"]["answer"].endswith(f"from {scene.hub}"), found["sent"]


def test_what_drops_a_packet_that_is_sent_is_named_by_the_kernel(vxlan: Lab) -> None:
    scene = Scene(vxlan.hosts[0], vxlan.hosts[1], 4)
    with made(scene, FAULTS["rule of nftables"]):
        found = run(scene.here, scene.own, scene.far, "--send")
    refused = found["sent"]["refused"]
    assert (refused["family"], refused["table"], refused["chain"]) == ("inet", "other", "wall"), found["sent"]
    assert f"ip daddr {scene.far_subnet}" in refused["rule"] and found["sent"]["seen"] == ["cni0"]
    assert not found["sent"]["arrived"] and left_behind(scene.here) == []


def test_a_packet_that_nobody_answers_is_said_to_have_left(vxlan: Lab) -> None:
    scene = Scene(vxlan.hosts[0], vxlan.hosts[1], 4)
    nobody = str(scene.there.gateways[4].ip + 77)
    found = run(scene.here, scene.own, nobody, "--send", "--protocol", "udp")
    assert found["sent"]["arrived"] and "eth0" in found["sent"]["seen"]


def test_nothing_is_left_when_it_is_interrupted(vxlan: Lab) -> None:
    scene = Scene(vxlan.hosts[0], vxlan.hosts[1], 4)
    far_pod = scene.there.pods[0]
    # Silent, so that it waits.
    far_pod.run(
        "nft", "add table ip silent; add chain ip silent in { type filter hook input priority 0; policy drop; }"
    )
    try:
        running = subprocess.Popen(
            command(scene.here, scene.own, scene.far, "--send"), cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        try:
            wait_until(lambda: left_behind(scene.here), SECONDS, "the table of the trace", interval=0.01)
            before = time.monotonic()
            running.send_signal(signal.SIGINT)
            running.wait(SECONDS)
            assert time.monotonic() - before < SECONDS
        finally:
            running.kill()
            running.communicate()
        assert left_behind(scene.here) == []
    finally:
        far_pod.run("nft", "delete", "table", "ip", "silent")


# --- how people see it, and wrong usage ----------------------------------------------------------------------------


def test_people_are_told_each_step_and_the_remedy(vxlan: Lab) -> None:
    scene = Scene(vxlan.hosts[0], vxlan.hosts[1], 4)
    healthy = subprocess.run(command(scene.here, scene.own, scene.far), cwd=ROOT, capture_output=True, text=True)
    assert healthy.returncode == 0 and healthy.stdout.endswith("The way through this host is open.\n")
    with made(scene, FAULTS["neighbour missing"]):
        done = subprocess.run(command(scene.here, scene.own, scene.far), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.split()[:2] == ["WRONG", "neighbour"]]
    assert [line.split()[0] for line in lines[at + 1 : at + 4]] == ["shown", "cause", "mend"]
    assert all(len(line) <= 80 for line in lines), lines


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["10.0.0.1"], "DST"),
        (["10.0.0.1", "fd00::1"], "family"),
        (["10.0.0.1", "nowhere"], "DST"),
        (["--port", "80", "10.0.0.1", "10.0.0.2"], "ICMP has no ports"),
        (["--send", "--protocol", "tcp", "10.0.0.1", "10.0.0.2"], "connection"),
    ],
)
def test_wrong_usage_is_refused_with_its_reason(arguments: list[str], says: str) -> None:
    done = subprocess.run([*AGENT, "trace", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr and not done.stdout


def test_what_comes_from_elsewhere_is_not_sent_from_here(vxlan: Lab) -> None:
    scene = Scene(vxlan.hosts[0], vxlan.hosts[1], 4)
    argv = command(scene.here, scene.far, scene.own, "--send")
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Run it on the host of SRC." in done.stderr

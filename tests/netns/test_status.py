"""`overlay-agent status` of real agents: each trouble is named, by its cause and no other, and by the exit code too."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from overlay import control, status
from overlay.cluster import Host, Lab, wait_until
from overlay.cluster_hosts import LabError
from subnet_lease.model import LeaseAttrs, Prefix, Vtep, encode_attrs, subnet_key
from tests.netns.scrape import OPTIONS, ask

AGENT = [sys.executable, "-P", "-m", "agent"]


@pytest.fixture(scope="module")
def lab(make_module_lab: Callable[..., Lab]) -> Lab:
    """Three hosts, for tests that leave it as they found it."""
    made = make_module_lab(pods=1, agent_options=OPTIONS)
    made.up()
    return made


def command(host: Host, *options: str) -> "subprocess.CompletedProcess[str]":
    config = ("--config", "/dev/null", "--control-socket", str(host.control_socket))
    return host.run(*AGENT, "status", *config, *options)


def told(host: Host, **arguments: object) -> dict[str, Any]:
    """The agent's document."""
    document: dict[str, Any] = control.ask(str(host.control_socket), "status", 10, **arguments)
    return document


def found(host: Host) -> tuple[int, dict[str, Any]]:
    """The exit code and the document of the command."""
    done = command(host, "--json")
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def named(document: dict[str, Any]) -> set[str]:
    return {problem["cause"] for problem in document["problems"]}


def wait_for(host: Host, health: str, *causes: str) -> dict[str, Any]:
    """The first document of this health that names these causes and no others."""
    seen: dict[str, Any] = {}

    def as_wanted() -> bool:
        seen.update(told(host))
        return (seen["health"], named(seen)) == (health, set(causes))

    try:
        wait_until(as_wanted, 15, f"{host.name} {health} {causes}")
    except LabError as late:
        raise AssertionError(f"{late} Last seen: {seen['health']} {seen['problems']}") from None
    return seen


@pytest.fixture(autouse=True)
def _healthy_afterwards(lab: Lab) -> Iterator[None]:
    yield
    for host in lab.hosts:
        wait_for(host, "healthy")


@contextlib.contextmanager
def foreign_lease(lab: Lab, number: int, attrs: LeaseAttrs) -> Iterator[str]:
    """A lease that is there while the block runs, of a host that has no agent; its key."""
    key = subnet_key(Prefix.parse(f"10.244.{number}.0/24"))
    revision = lab.store.create(key, encode_attrs(attrs), lab.store.grant(3600))
    try:
        yield key
    finally:
        assert lab.store.delete(key, revision)


@contextlib.contextmanager
def without_agent(host: Host, number: signal.Signals = signal.SIGTERM) -> Iterator[None]:
    """No agent runs on the host while the block does, or one that the block starts."""
    host.kill_agent(number)
    try:
        yield
    finally:
        if host.agent_pid is not None:
            host.kill_agent()
        host.start_agent()
        host.wait_ready()


# --- a host in order ---------------------------------------------------------------------------------------------


def test_host_in_order_is_healthy_and_knows_its_peers(lab: Lab) -> None:
    h1, h2, h3 = lab.hosts
    wait_for(h1, "healthy")
    code, document = found(h1)
    assert (code, document["problems"]) == (0, [])
    assert document["agent"]["pid"] == h1.agent_pid and document["agent"]["node_name"] == "h1"
    assert document["lease"]["subnets"] == [h1.subnet] and 0 < document["lease"]["left_s"] <= 86400
    (device,) = document["devices"]
    assert (device["name"], device["up"], device["mtu"], device["port"]) == ("flannel.1", True, 1450, 8472)
    assert (document["underlay"]["interface"], document["underlay"]["addresses"]) == ("eth0", [h1.underlay_ip])
    assert document["etcd"]["connected"] and document["etcd"]["data_age_s"] == 0
    assert document["dataplane"]["wanted"] == 10 and document["dataplane"]["missing"] == 0
    peers = {(*peer["subnets"], peer["node_name"], *peer["underlay"], peer["state"]) for peer in document["peers"]}
    assert peers == {(peer.subnet, peer.name, peer.underlay_ip, "programmed") for peer in (h2, h3)}
    assert ask(h1, "/readyz").text.startswith("ready: 2 peers")


def test_text_for_people_ends_with_the_peers(lab: Lab) -> None:
    done = command(lab.hosts[0])
    assert done.returncode == 0 and done.stdout.startswith("overlay on h1: HEALTHY\n")
    assert "PEERS 2: 2 programmed" in done.stdout and lab.hosts[1].subnet in done.stdout
    assert "PEERS" not in command(lab.hosts[0], "--no-peers").stdout


def test_as_many_peers_in_order_are_told_as_are_asked_for(lab: Lab) -> None:
    document = told(lab.hosts[0], peers=1)
    assert len(document["peers"]) == 1 and document["peer_counts"]["total"] == 2


def test_entry_removed_by_hand_is_back_and_counted(lab: Lab) -> None:
    h1, h2, _ = lab.hosts
    before = told(h1)["dataplane"]["drift"]
    h1.ip(f"route del {h2.subnet}")
    wait_until(lambda: told(h1)["dataplane"]["drift"] > before, 10, "the drift")
    assert told(h1)["dataplane"]["missing"] == 0


# --- etcd and leases ---------------------------------------------------------------------------------------------


def test_etcd_that_is_away_degrades_and_data_grow_old(lab: Lab) -> None:
    h1 = lab.hosts[0]
    lab.stop_etcd()
    try:
        first = wait_for(h1, "degraded", "etcd_unreachable")["etcd"]
        wait_until(lambda: told(h1)["etcd"]["data_age_s"] > first["data_age_s"], 10, "older data")
        later = told(h1)["etcd"]
        assert not later["connected"] and later["reason"]
        assert command(h1).returncode == 1
        assert ask(h1, "/readyz").status == 200
    finally:
        lab.start_etcd()


def test_agent_that_waits_for_etcd_says_so(lab: Lab) -> None:
    h1 = lab.hosts[0]
    lab.stop_etcd()
    try:
        with without_agent(h1):
            h1.start_agent("--state-dir", f"{h1.state_dir}.empty")
            wait_until(lambda: h1.control_socket.is_socket() and told(h1)["agent"], 20, "an answer")
            document = wait_for(h1, "down", "etcd_unreachable")
            assert document["agent"]["trouble"].startswith("the network configuration: no connection to")
            ready = ask(h1, "/readyz")
            assert ready.status == 503 and ready.text.startswith("not ready: etcd_unreachable: ")
            lab.start_etcd()
            h1.wait_ready()
    finally:
        if lab.process("etcd") is None:
            lab.start_etcd()


@pytest.mark.parametrize(
    ("config", "cause"),
    [({"Backend": {"Type": "vxlan", "VNI": 7}}, "config_needs_restart"), ({"Network": "nonsense"}, "config_unusable")],
)
def test_configuration_that_is_not_taken_over_is_named(lab: Lab, config: dict[str, Any], cause: str) -> None:
    before = json.loads(lab.store.read_config() or b"")
    lab.reconfigure({**before, **config})
    try:
        for host in lab.hosts:
            wait_for(host, "degraded", cause)
    finally:
        lab.reconfigure(before)


@pytest.mark.parametrize(("mine", "cause"), [(False, "cloned_machine"), (True, "duplicate_public_ip")])
def test_lease_that_claims_what_others_have_is_shown_with_its_reason(lab: Lab, mine: bool, cause: str) -> None:
    h1, h2, _ = lab.hosts
    peer = next(lease for lease in lab.leases() if h2.holds(lease))
    attrs = LeaseAttrs(bytes((172, 30, 200, 220)), "vxlan", peer.attrs.vtep)
    if mine:
        attrs = LeaseAttrs(socket.inet_aton(h1.underlay_ip), "vxlan", Vtep(1, b"\2\0\0\0\t\2"))
    with foreign_lease(lab, 220, attrs) as key:
        document = wait_for(h1, "degraded", cause)
        (rejected,) = document["rejected"]
        assert (rejected["key"] == key and "longer been" in rejected["reason"]) or "own" in rejected["reason"]
        assert document["problems"][0]["subject"] == "10.244.220.0/24"
        assert key in command(h1).stdout


# --- the dataplane -----------------------------------------------------------------------------------------------


def test_entry_that_the_kernel_refuses_is_shown_at_its_peer(lab: Lab) -> None:
    h1 = lab.hosts[0]
    attrs = LeaseAttrs(bytes((172, 30, 200, 221)), "vxlan", Vtep(1, b"\2\0\0\0\t\1"))
    with without_agent(h1):
        h1.ip("link del flannel.1")
        # Room for the two peers that there are (vxlan_fdb_create, ENOSPC); the agent takes the device over.
        vxlan = f"vxlan id 1 dstport 8472 local {h1.underlay_ip} nolearning dev eth0 maxaddress 2"
        h1.ip(f"link add flannel.1 type {vxlan}")
        h1.start_agent()
        h1.wait_ready()
        with foreign_lease(lab, 221, attrs):
            document = wait_for(h1, "degraded", "entries_refused")
        h1.kill_agent()
        h1.ip("link del flannel.1")
    worst = document["peers"][0]
    assert worst["subnets"] == ["10.244.221.0/24"] and worst["state"] == "incomplete"
    assert worst["missing"] == ["fdb 02:00:00:00:09:01 dst 172.30.200.221"]
    assert document["refused"] == [{"entry": worst["missing"][0], "error": "ENOSPC"}]
    assert worst["changed_ago_s"] is not None


def test_another_interface_with_our_devices_name_is_named(lab: Lab) -> None:
    h1 = lab.hosts[0]
    with without_agent(h1):
        h1.ip("link del flannel.1")
        h1.ip("link add flannel.1 type bridge")
        try:
            h1.start_agent()
            wait_until(lambda: h1.control_socket.is_socket() and told(h1)["agent"], 20, "an answer")
            document = wait_for(h1, "down", "device_missing")
            assert "bridge" in document["problems"][0]["evidence"][0]
            assert ask(h1, "/readyz").text.startswith("not ready: device_missing: ")
        finally:
            h1.ip("link del flannel.1")
        h1.wait_ready()


def test_underlay_that_is_down_is_named(lab: Lab) -> None:
    h1 = lab.hosts[0]
    h1.ip("link set eth0 down")
    try:
        wait_until(lambda: "device_down" in named(told(h1)), 10, "the cause")
        assert "eth0" in told(h1)["problems"][0]["what"]
    finally:
        h1.ip("link set eth0 up")


@pytest.mark.parametrize(
    ("setting", "value", "good", "health", "cause"),
    [
        ("net.ipv4.ip_forward", "0", "1", "down", "forwarding_off"),
        ("net.ipv4.conf.flannel/1.rp_filter", "1", "0", "degraded", "rp_filter"),
    ],
)
def test_setting_in_the_way_is_named(lab: Lab, setting: str, value: str, good: str, health: str, cause: str) -> None:
    h1 = lab.hosts[0]
    assert h1.run("sysctl", "-qw", f"{setting}={value}").returncode == 0
    try:
        document = wait_for(h1, health, cause)
        assert setting in document["problems"][0]["remedy"]
        assert ask(h1, "/readyz").status == (503 if health == "down" else 200)
    finally:
        h1.run("sysctl", "-qw", f"{setting}={good}")


def test_table_that_drops_what_is_forwarded_is_named_however_late_it_comes(lab: Lab) -> None:
    h1 = lab.hosts[0]
    rules = "add table ip strict; add chain ip strict forward { type filter hook forward priority 10; policy drop; }"
    assert h1.run("nft", rules).returncode == 0
    try:
        document = wait_for(h1, "degraded", "forward_drop")
        assert "nft insert rule ip strict forward" in document["problems"][0]["remedy"]
    finally:
        h1.run("nft", "delete table ip strict")


# --- no agent, or none that answers ------------------------------------------------------------------------------


def test_without_an_agent_the_kernel_tells_what_is_missing(lab: Lab) -> None:
    h1 = lab.hosts[0]
    with without_agent(h1):
        code, document = found(h1)
        assert (code, document["health"], named(document)) == (2, "down", {"agent_not_running"})
        assert document["problems"][0]["evidence"] == [f"nobody listens at {h1.control_socket}"]
        assert {peer["state"] for peer in document["peers"]} == {"programmed"} and len(document["peers"]) == 2
        mac = next(n["lladdr"] for n in h1.json("ip", "neigh", "show", "dev", "flannel.1") if "lladdr" in n)
        gone = next(f for f in h1.json("bridge", "fdb", "show", "dev", "flannel.1") if f["mac"] == mac)
        h1.run("bridge", "fdb", "del", mac, "dev", "flannel.1", "dst", gone["dst"])
        _, document = found(h1)
        assert named(document) == {"agent_not_running", "fdb_wrong"}
        assert document["peers"][0]["missing"] == [f"fdb {mac}"]
        assert f"lacks fdb {mac}" in command(h1).stdout
        h1.ip("link set flannel.1 down")
        assert named(found(h1)[1]) == {"agent_not_running", "device_down"}


def test_client_that_hangs_harms_nobody(lab: Lab) -> None:
    h1 = lab.hosts[0]
    with contextlib.ExitStack() as stack:
        for line in (b"", b'{"version": 1', b'{"version": 1, "question": "status"}\n') * 10:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(h1.control_socket))
            client.sendall(line)
        assert found(h1)[0] == 0
        assert all(ping.ok for ping in lab.ping_all())


def test_agent_that_cannot_listen_says_so_and_does_its_work(lab: Lab) -> None:
    h1 = lab.hosts[0]
    with without_agent(h1):
        h1.start_agent("--control-socket", "/proc/none/agent.sock")
        h1.wait_ready()
        (line,) = (
            json.loads(line)
            for line in h1.log().splitlines()
            if line.startswith("{") and '"event": "control_unavailable"' in line
        )
        assert "cannot listen on /proc/none/agent.sock" in line["reason"]
        code, document = found(h1)
        assert code == 2 and named(document) == {"agent_stalled"}
        assert "it hangs, or listens elsewhere" in document["problems"][0]["what"]


def test_agent_that_hangs_is_named(lab: Lab) -> None:
    h1 = lab.hosts[0]
    assert h1.agent_pid is not None
    subprocess.run(["kill", "-STOP", str(h1.agent_pid)], check=True)
    try:
        with pytest.raises(control.NoAnswer, match=r"no answer at .* within 0.5 s") as silence:
            control.ask(str(h1.control_socket), "status", 0.5)
        assert silence.value.listening
    finally:
        subprocess.run(["kill", "-CONT", str(h1.agent_pid)], check=True)


def test_second_agent_leaves_the_socket_of_the_first_alone(lab: Lab) -> None:
    h1, h2, _ = lab.hosts
    pid = h1.agent_pid
    with without_agent(h2):
        # In another namespace, so that the first agent does not keep it from running.
        h2.start_agent("--control-socket", str(h1.control_socket))
        h2.wait_ready()
        assert "another process listens there" in h2.log()
    assert told(h1)["agent"]["pid"] == pid


def test_agent_that_was_killed_leaves_a_socket_that_the_next_takes(lab: Lab) -> None:
    h1 = lab.hosts[0]
    with without_agent(h1, signal.SIGKILL):
        assert h1.control_socket.is_socket()
        code, document = found(h1)
        assert code == 2 and "any more" in document["problems"][0]["evidence"][0]
    assert told(h1)["agent"]["pid"] == h1.agent_pid


def test_exit_codes_are_those_of_the_health() -> None:
    assert status.EXIT_CODES == {"healthy": 0, "degraded": 1, "down": 2}

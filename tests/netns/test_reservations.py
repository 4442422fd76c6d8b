"""Reservations as an operator meets them: real agents, real kernels, a ping that goes on."""

import json
import sys
from collections.abc import Callable

from overlay.cluster import Host, Lab, wait_until
from overlay.reservations import reserved_value
from subnet_lease.model import NetworkConfig, Prefix, decode_attrs, format_mac, pack_address
from tests.netns.test_overlay import endless_ping, entries, events

AGENT = [sys.executable, "-P", "-m", "agent"]
SUBNET = "10.244.150.0/24"


def command(host: Host, *words: str) -> str:
    """What one of the agent's commands says on a host of the lab."""
    argv = (*AGENT, *words, "--config", "/dev/null", "--etcd-endpoints", "http://172.30.0.1:2379")
    done = host.run(*argv)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def give_back(host: Host) -> str:
    """What `cleanup` says, which leaves nothing of a host's agent, not even its lease."""
    files = ("--subnet-file", str(host.subnet_file), "--state-dir", str(host.state_dir))
    return command(host, "cleanup", "--release", *files, "--iface", "eth0")


def test_new_host_comes_up_with_its_reserved_subnet_and_mac_and_keeps_them(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(hosts=3, pods=1)
    lab.up()
    h1, _, h3 = lab.hosts
    h3.kill_agent()
    give_back(h3)
    command(h1, "reserve", SUBNET, "--public-ip", h3.underlay_ip)
    wait_until(lambda: SUBNET in entries(h1)["route"], 5, "a route to the host that has not come")
    before = entries(h1)

    h3.start_agent()
    h3.wait_ready()
    assert h3.subnet == SUBNET
    config = NetworkConfig.parse(lab.store.read_config() or b"")
    vtep = decode_attrs(reserved_value(config, (Prefix.parse(SUBNET),), pack_address(h3.underlay_ip))).vtep
    assert vtep is not None
    assert h3.json("ip", "link", "show", "flannel.1")[0]["address"] == format_mac(vtep.mac)
    h3.attach_pods()
    lab.wait_converged()
    assert all(ping.ok for ping in lab.ping_all())
    assert entries(h1) == before, "its peers had the right entries before it came"

    h3.kill_agent()
    said = give_back(h3)
    assert f"{SUBNET} is reserved for {h3.underlay_ip} and stays so" in said
    h3.start_agent()
    h3.wait_ready()
    assert h3.subnet == SUBNET
    (own,) = (lease for lease in lab.leases() if str(lease.subnet) == SUBNET)
    assert own.reserved


def test_lease_is_reserved_and_given_back_under_a_ping_with_no_packet_lost(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(hosts=2, pods=1)
    lab.up()
    h1, h2 = lab.hosts
    pid = h2.agent_pid
    with endless_ping(h1.pods[0], h2.pods[0]) as stop:
        command(h1, "reserve", h2.subnet, "--public-ip", h2.underlay_ip)
        wait_until(lambda: events(h2, "lease_acquired")[-1]["reserved"], 5, "the agent to see its reservation")
        command(h1, "unreserve", h2.subnet)
        wait_until(lambda: not events(h2, "lease_acquired")[-1]["reserved"], 5, "the agent to see its lease")
        sent, received = stop()
    assert received == sent
    assert h2.agent_pid == pid
    assert events(h2, "lease_lost") == []
    leases = json.loads(command(h1, "leases", "--json"))["leases"]
    assert {(lease["subnet"], lease["reserved"], lease["rejected"]) for lease in leases} == {
        (h1.subnet, False, None),
        (h2.subnet, False, None),
    }

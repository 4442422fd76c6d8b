"""The overlay as its users meet it: real agents, a real etcd, real kernels in namespaces, pods that ping each other."""

import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overlay.cluster import Host, Lab, Pod, wait_until
from subnet_lease.model import LeaseAttrs, Prefix, Vtep, encode_attrs, format_address, format_mac, subnet_key

AGENT = [sys.executable, "-P", "-m", "agent"]


def events(host: Host, name: str) -> list[dict[str, object]]:
    """The agent's log lines of one event, in order, over all of its starts."""
    lines = [json.loads(line) for line in host.log().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == name]


@contextmanager
def endless_ping(src: Pod, dst: Pod, interval: float = 0.01) -> Iterator[Callable[[], tuple[int, int]]]:
    """Ping from pod to pod while the block runs, begun before it; what it yields ends it and gives (sent, received)."""
    argv = ["ip", "netns", "exec", src.netns, "ping", "-n", "-i", str(interval), dst.address]
    with tempfile.TemporaryFile("w+") as output, subprocess.Popen(argv, stdout=output) as ping:

        def said() -> str:
            # Opened anew: the child writes where this end's position is.
            return Path(f"/proc/self/fd/{output.fileno()}").read_text()

        def stop() -> tuple[int, int]:
            ping.send_signal(signal.SIGINT)
            ping.wait(timeout=10)
            found = re.search(r"(\d+) packets transmitted, (\d+) received", said())
            assert found, said()
            sent, received = int(found[1]), int(found[2])
            # The one that was under way when the signal came is not lost.
            return sent, min(sent, received + 1)

        try:
            wait_until(lambda: "bytes from" in said(), 10, "the first answer to the ping")
            yield stop
        finally:
            ping.kill()


def put_peer(lab: Lab, number: int, *, public_ip: str = "", mac: bytes = b"") -> str:
    """A lease of a host that has no agent: what flanneld would have written. The key."""
    subnet = Prefix.parse(f"10.244.{number}.0/24")
    ip = bytes(map(int, (public_ip or f"172.30.200.{number}").split(".")))
    attrs = LeaseAttrs(ip, "vxlan", Vtep(1, mac or bytes((2, 0, 0, 0, 9, number))))
    key = subnet_key(subnet)
    assert lab.store.create(key, encode_attrs(attrs), lab.store.grant(3600))
    return key


def entries(host: Host) -> dict[str, list[str]]:
    """What stands on the overlay's device, as iproute2 tells it."""
    routes = [route for route in host.json("ip", "route", "show", "dev", "flannel.1") if "linkdown" not in route]
    return {
        "route": sorted(route["dst"] for route in routes),
        "neighbour": sorted(
            f"{n['dst']} {n['lladdr']}"
            for n in host.json(*["ip", "neigh", "show", "dev", "flannel.1", "nud", "permanent"])
        ),
        "nexthop": sorted(str(hop["id"]) for hop in host.json("ip", "nexthop")),
        "fdb": sorted(f"{f['mac']} {f['dst']}" for f in host.json("bridge", "fdb", "show", "dev", "flannel.1")),
    }


def all_answer(lab: Lab) -> bool:
    return all(ping.ok for ping in lab.ping_all())


# --- a cluster that is left as it was ----------------------------------------------------------------------------


def test_every_pod_reaches_every_other(shared_lab: Lab) -> None:
    pings = shared_lab.ping_all()
    assert len(pings) == 30
    assert [ping for ping in pings if not ping.ok] == []


def test_hosts_reach_the_pods_of_other_hosts(shared_lab: Lab) -> None:
    h1, h2, _ = shared_lab.hosts
    assert h1.run("ping", "-n", "-c", "1", "-W", "1", h2.pods[0].address).returncode == 0


def test_device_is_as_flannel_makes_it(shared_lab: Lab) -> None:
    h1 = shared_lab.hosts[0]
    link = h1.json("ip", "-d", "link", "show", "flannel.1")[0]
    data = link["linkinfo"]["info_data"]
    assert link["linkinfo"]["info_kind"] == "vxlan"
    assert (data["id"], data["local"], data["link"], data["port"]) == (1, h1.underlay_ip, "eth0", 8472)
    assert (data["learning"], link["mtu"]) == (False, 1450)
    (address,) = (a for a in h1.json("ip", "addr", "show", "flannel.1")[0]["addr_info"] if a["family"] == "inet")
    assert (address["local"], address["prefixlen"]) == (h1.subnet.removesuffix("/24"), 32)


def test_subnet_file_tells_the_container_runtime_what_was_leased(shared_lab: Lab) -> None:
    h1 = shared_lab.hosts[0]
    (own,) = (lease for lease in shared_lab.leases() if format_address(lease.attrs.public_ip) == h1.underlay_ip)
    assert h1.subnet_env == {
        "FLANNEL_NETWORK": "10.244.0.0/16",
        "FLANNEL_SUBNET": f"{format_address(own.subnet.host(1))}/24",
        "FLANNEL_MTU": "1450",
        "FLANNEL_IPMASQ": "false",
    }


def test_lease_bears_the_mac_of_the_device_and_our_own_facts(shared_lab: Lab) -> None:
    h1 = shared_lab.hosts[0]
    (own,) = (lease for lease in shared_lab.leases() if format_address(lease.attrs.public_ip) == h1.underlay_ip)
    assert own.attrs.vtep is not None
    assert format_mac(own.attrs.vtep.mac) == h1.json("ip", "link", "show", "flannel.1")[0]["address"]
    assert (own.attrs.mtu, own.attrs.node_name) == (1450, "h1")
    assert own.attrs.extra.keys() == {"AgentVersion"}


def test_forwarding_is_switched_on_and_said(shared_lab: Lab) -> None:
    h1 = shared_lab.hosts[0]
    assert h1.run("cat", "/proc/sys/net/ipv4/ip_forward").stdout.strip() == "1"
    assert any(event["name"] == "net.ipv4.ip_forward" for event in events(h1, "sysctl_set"))


def test_second_agent_on_a_host_is_refused_and_names_the_first(shared_lab: Lab) -> None:
    h1 = shared_lab.hosts[0]
    second = h1.run(*AGENT, "run", "--subnet-file", str(shared_lab.state / "second.env"))
    assert second.returncode == 1
    assert f"process {h1.agent_pid} " in second.stderr
    assert second.stderr.count("\n") == 1


def test_cleanup_beside_a_running_agent_is_refused(shared_lab: Lab) -> None:
    h1 = shared_lab.hosts[0]
    refused = h1.run(*AGENT, "cleanup")
    assert refused.returncode == 1
    assert f"process {h1.agent_pid} " in refused.stderr
    assert h1.json("ip", "link", "show", "flannel.1")


def test_peer_appears_and_goes_with_its_lease(shared_lab: Lab) -> None:
    key = put_peer(shared_lab, 250)
    for host in shared_lab.hosts:
        wait_until(lambda host=host: "10.244.250.0/24" in entries(host)["route"], 5, "a route to the new peer")
        held = entries(host)
        assert "10.244.250.0 02:00:00:00:09:fa" in held["neighbour"]
        assert "02:00:00:00:09:fa 172.30.200.250" in held["fdb"]
    (record,) = (record for record in shared_lab.store.snapshot().records if record.key == key)
    assert shared_lab.store.delete(key, record.mod_revision)
    shared_lab.wait_converged()
    for host in shared_lab.hosts:
        wait_until(lambda host=host: len(entries(host)["fdb"]) == 2, 5, "no trace of the peer that left")
        assert {kind: len(found) for kind, found in entries(host).items()} == dict.fromkeys(
            ("route", "neighbour", "nexthop", "fdb"), 2
        )


def test_hostile_leases_harm_nobody(shared_lab: Lab) -> None:
    h1 = shared_lab.hosts[0]
    before = entries(h1)
    good = encode_attrs(LeaseAttrs(bytes((172, 30, 200, 9)), "vxlan", Vtep(1, bytes((2, 0, 0, 0, 9, 9)))))
    hostile = {
        "garbage": b"\xff\x00",
        "10.244.209.0-24": b"{" * 100_000,
        "10.9.9.0-24": good,
        "172.30.0.0-16": good,
        h1.subnet.replace(".0/24", ".128-25"): good,
        "10.244.208.0-24": good.replace(b"172.30.200.9", b"224.0.0.1"),
        "10.244.207.0-24": good.replace(b'"VNI":1', b'"VNI":7'),
    }
    for key, value in hostile.items():
        assert shared_lab.store.create(key, value, 0)
    put_peer(shared_lab, 249)
    wait_until(lambda: "10.244.249.0/24" in entries(h1)["route"], 5, "the good lease that came after the bad ones")
    assert set(entries(h1)["route"]) == {*before["route"], "10.244.249.0/24"}
    for record in shared_lab.store.snapshot().records:
        if record.key in hostile or record.key == "10.244.249.0-24":
            assert shared_lab.store.delete(record.key, record.mod_revision)
    wait_until(lambda: entries(h1) == before, 5, "the state before")
    assert all_answer(shared_lab)


# --- what is removed or altered by hand --------------------------------------------------------------------------

DRIFT = {
    "route removed": "ip route del {subnet}",
    "route led elsewhere": "ip route replace {subnet} via 172.30.0.1 dev eth0",
    "route made a black hole": "ip route replace blackhole {subnet}",
    "neighbour removed": "ip neigh del {base} dev flannel.1",
    "neighbour with another MAC": "ip neigh replace {base} lladdr 02:00:00:00:00:01 dev flannel.1 nud permanent",
    "fdb entry removed": "bridge fdb del {mac} dev flannel.1",
    "fdb entry led elsewhere": "bridge fdb replace {mac} dev flannel.1 dst 172.30.99.99",
    "fdb entry with a second remote": "bridge fdb append {mac} dev flannel.1 dst 172.30.99.99",
    "nexthops flushed": "ip nexthop flush proto 111",
    "address removed": "ip addr flush dev flannel.1",
    "address added": "ip addr add 10.244.222.1/24 dev flannel.1",
    "link down": "ip link set flannel.1 down",
    "mtu changed": "ip link set flannel.1 mtu 1200",
    "mac changed": "ip link set flannel.1 address 02:00:00:00:00:02",
    "all routes flushed": "for route in $(ip route show dev flannel.1 | cut -d' ' -f1); do ip route del $route; done",
    "device deleted": "ip link del flannel.1",
}


@pytest.mark.parametrize("drift", DRIFT.values(), ids=DRIFT.keys())
def test_what_is_altered_by_hand_comes_back(shared_lab: Lab, drift: str) -> None:
    h1, h2, _ = shared_lab.hosts
    (peer,) = (lease for lease in shared_lab.leases() if format_address(lease.attrs.public_ip) == h2.underlay_ip)
    assert peer.attrs.vtep is not None
    base, mac = format_address(peer.subnet.base), format_mac(peer.attrs.vtep.mac)

    def all_there() -> dict[str, object]:
        link = h1.json("ip", "-d", "link", "show", "flannel.1")[0]
        inet = [a["local"] for a in h1.json("ip", "addr", "show", "flannel.1")[0]["addr_info"] if a["family"] == "inet"]
        return {**entries(h1), "link": (link["address"], link["mtu"], "UP" in link["flags"]), "address": inet}

    before = all_there()
    done = h1.run("sh", "-c", drift.format(subnet=peer.subnet, base=base, mac=mac))
    assert done.returncode == 0, done.stderr

    def healed() -> bool:
        # The device may be missing altogether at this moment.
        exists = h1.run("ip", "link", "show", "flannel.1").returncode == 0
        return exists and all_there() == before

    wait_until(healed, 10, "all as it was")
    assert h1.pods[0].run("ping", "-n", "-c", "1", "-W", "1", h2.pods[0].address).returncode == 0


# --- clusters that change ----------------------------------------------------------------------------------------


def test_fourth_host_joins_and_is_reached_by_all(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(hosts=3, pods=1)
    lab.up()
    h4 = lab.add_host()
    h4.start_agent()
    h4.wait_ready()
    h4.attach_pods()
    lab.wait_converged()
    assert len(lab.ping_all()) == 12
    assert all_answer(lab)


def test_host_that_leaves_with_release_leaves_nothing_anywhere(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(hosts=3, pods=1, agent_options=("--ip-masq",))
    lab.up()
    h1, h2, h3 = lab.hosts
    gone = h3.subnet
    assert h3.run("nft", "list", "table", "inet", "overlay_agent").returncode == 0
    assert h3.kill_agent(signal.SIGTERM) == 0
    options = ("--subnet-file", str(h3.subnet_file), "--state-dir", str(h3.state_dir))
    options += ("--etcd-endpoints", "http://172.30.0.1:2379")
    done = h3.run(*AGENT, "cleanup", "--release", *options)
    assert done.returncode == 0, done.stderr
    assert "removed device flannel.1" in done.stdout
    assert f"released {gone}" in done.stdout
    for host in (h1, h2):
        wait_until(lambda host=host: gone not in entries(host)["route"], 5, "no route to the host that left")
        assert {kind: len(found) for kind, found in entries(host).items()} == dict.fromkeys(
            ("route", "neighbour", "nexthop", "fdb"), 1
        )
    assert h3.run("ip", "link", "show", "flannel.1").returncode != 0
    assert h3.run("nft", "list", "table", "inet", "overlay_agent").returncode != 0
    assert h3.json("ip", "nexthop") == []
    assert not h3.subnet_file.exists()
    again = h3.run(*AGENT, "cleanup", *options)
    assert (again.returncode, again.stdout) == (0, "nothing of the agent's is left on this host\n")


def test_host_that_dies_goes_when_its_lease_runs_out(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(hosts=3, pods=1, agent_options=("--subnet-lease-ttl", "4"))
    lab.up()
    h1, h2, h3 = lab.hosts
    gone = h3.subnet
    h3.kill_agent(signal.SIGKILL)
    for host in (h1, h2):
        wait_until(lambda host=host: gone not in entries(host)["route"], 30, "no route to the dead host")
    # The living have renewed theirs meanwhile, more than once.
    assert {h1.subnet, h2.subnet} == {str(lease.subnet) for lease in lab.leases()}
    assert h1.pods[0].run("ping", "-n", "-c", "1", "-W", "1", h2.pods[0].address).returncode == 0


def test_all_agents_killed_and_restarted_under_a_ping_lose_nothing_and_write_nothing(
    make_lab: Callable[..., Lab],
) -> None:
    lab = make_lab(hosts=3, pods=1)
    lab.up()
    h1, h2, _ = lab.hosts
    left = put_peer(lab, 250)
    for host in lab.hosts:
        wait_until(lambda host=host: "10.244.250.0/24" in entries(host)["route"], 5, "the peer that will leave")
    revisions = {lease.subnet: lease.mod_revision for lease in lab.leases() if not str(lease.subnet).startswith(left)}
    passes = {host.name: len(events(host, "reconciled")) for host in lab.hosts}
    with endless_ping(h1.pods[0], h2.pods[0]) as stop:
        for host in lab.hosts:
            host.kill_agent(signal.SIGKILL)
        (record,) = (record for record in lab.store.snapshot().records if record.key == left)
        assert lab.store.delete(left, record.mod_revision)
        put_peer(lab, 251)
        for host in lab.hosts:
            host.start_agent()
        for host in lab.hosts:
            host.wait_ready()
        sent, received = stop()
    assert sent > 10
    assert received == sent
    for host in lab.hosts:
        held = entries(host)
        assert "10.244.250.0/24" not in held["route"]
        assert "10.244.251.0/24" in held["route"]
        # Exactly what changed meanwhile: four entries of the new peer, four of the one that left.
        (written,) = events(host, "reconciled")[passes[host.name] :]
        assert (written["put"], written["dropped"]) == (5, 5)
    after = {lease.subnet: lease.mod_revision for lease in lab.leases()}
    assert {subnet: after[subnet] for subnet in revisions if subnet in after} == {
        subnet: revision for subnet, revision in revisions.items() if subnet in after
    }


def test_agent_asked_to_stop_withdraws_nothing(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(hosts=2, pods=1)
    lab.up()
    h1, h2 = lab.hosts
    before = entries(h1)
    assert h1.kill_agent(signal.SIGTERM) == 0
    assert entries(h1) == before
    assert h1.pods[0].run("ping", "-n", "-c", "1", "-W", "1", h2.pods[0].address).returncode == 0


def test_agent_heeds_a_signal_that_comes_as_soon_as_it_is_ready(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(hosts=1, pods=0)
    lab.up()
    (h1,) = lab.hosts
    for _ in range(10):
        assert h1.kill_agent(signal.SIGTERM, seconds=10) == 0, h1.log()
        h1.start_agent()
        h1.wait_ready()


def test_agent_started_before_etcd_and_before_the_configuration_waits_for_both(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(hosts=1, pods=0)
    lab.make_network()
    (h1,) = lab.hosts
    h1.start_agent()
    wait_until(lambda: events(h1, "waiting_for_config"), 20, "the agent to say that it waits")
    assert "no connection" in str(events(h1, "waiting_for_config")[0]["reason"])
    lab.start_etcd()
    wait_until(lambda: len(events(h1, "waiting_for_config")) == 2, 30, "the agent to say that the key is missing")
    assert "/coreos.com/network/config" in str(events(h1, "waiting_for_config")[1]["reason"])
    assert not h1.subnet_file.exists()
    lab.write_config({"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}})
    h1.wait_ready()
    assert h1.subnet.startswith("10.244.")


def test_configuration_that_cannot_be_used_is_refused_with_the_key_at_fault(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(hosts=1, pods=0)
    lab.make_network()
    lab.start_etcd()
    lab.write_config({"Network": "10.244.0.0/16", "SubnetLen": "24", "Backend": {"Type": "vxlan"}})
    (h1,) = lab.hosts
    options = ("--iface", "eth0", "--subnet-file", str(h1.subnet_file), "--state-dir", str(h1.state_dir))
    refused = h1.run(*AGENT, "run", "--etcd-endpoints", "http://172.30.0.1:2379", *options)
    assert refused.returncode == 1
    assert 'SubnetLen: must be a whole number, not "24"' in refused.stderr
    assert h1.run("ip", "link", "show", "flannel.1").returncode != 0


def test_host_gets_its_subnet_back_from_the_subnet_file_after_its_lease_is_gone(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(hosts=1, pods=0)
    lab.up()
    (h1,) = lab.hosts
    subnet = h1.subnet
    h1.kill_agent(signal.SIGKILL)
    for record in lab.store.snapshot().records:
        assert lab.store.delete(record.key, record.mod_revision)
    h1.start_agent()
    h1.wait_ready()
    assert h1.subnet == subnet


def test_lease_deleted_while_the_agent_runs_is_taken_again(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(hosts=2, pods=1)
    lab.up()
    h1, h2 = lab.hosts
    subnets = h1.subnet, h2.subnet
    for record in lab.store.snapshot().records:
        assert lab.store.delete(record.key, record.mod_revision)
    wait_until(lambda: {str(lease.subnet) for lease in lab.leases()} == set(subnets), 10, "both leases taken again")
    lab.wait_converged()
    assert (h1.subnet, h2.subnet) == subnets
    assert all_answer(lab)


def test_agent_follows_its_underlay_to_another_mtu_and_another_address(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(hosts=2, pods=1)
    lab.up()
    h1, h2 = lab.hosts
    subnet, before = h1.subnet, h1.json("ip", "link", "show", "flannel.1")[0]

    def own() -> LeaseAttrs:
        return next(lease.attrs for lease in lab.leases() if str(lease.subnet) == subnet)

    # Smaller packets: the peer learns of it and sends no larger ones.
    h1.ip("link set eth0 mtu 1400")
    wait_until(lambda: own().mtu == 1350, 10, "the MTU in the lease")
    route = ["ip", "route", "show", subnet]
    wait_until(lambda: h2.json(*route)[0].get("metrics") == [{"mtu": 1350}], 10, "the MTU in the peer's route")
    assert h1.json("ip", "link", "show", "flannel.1")[0]["mtu"] == 1350
    wait_until(lambda: h1.subnet_env["FLANNEL_MTU"] == "1350", 10, "the MTU in the subnet file")
    assert all_answer(lab)

    # Another address: the same device, subnet and MAC.
    h1.ip(f"addr del {h1.underlay_ip}/16 dev eth0", "addr add 172.30.0.99/16 dev eth0")
    wait_until(lambda: own().public_ip == bytes((172, 30, 0, 99)), 30, "the address in the lease")
    wait_until(lambda: all_answer(lab), 10, "pods reached at the new address")
    link = h1.json("ip", "-d", "link", "show", "flannel.1")[0]
    assert (link["ifindex"], link["address"]) == (before["ifindex"], before["address"])
    assert link["linkinfo"]["info_data"]["local"] == "172.30.0.99"
    assert h1.subnet == subnet
    assert [event["addresses"] for event in events(h1, "underlay_changed")][-1] == ["172.30.0.99"]


def test_subnet_taken_by_another_makes_the_host_move_to_a_new_one(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(hosts=2, pods=1)
    lab.up()
    h1, _ = lab.hosts
    old = h1.subnet
    (record,) = (record for record in lab.store.snapshot().records if record.key == old.replace("/", "-"))
    thief = LeaseAttrs(bytes((172, 30, 200, 1)), "vxlan", Vtep(1, bytes((2, 0, 0, 0, 9, 1))))
    assert lab.store.replace(record.key, encode_attrs(thief), lab.store.grant(3600), record.mod_revision)
    wait_until(lambda: h1.subnet != old, 10, "another subnet in the subnet file")
    lab.wait_converged()
    h1.attach_pods()
    wait_until(lambda: all_answer(lab), 10, "pods of the new subnet reached")
    assert old in entries(h1)["route"]
    assert [event["subnet"] for event in events(h1, "lease_lost")] == [old]


def test_exhausted_network_is_said_with_numbers_and_retried(make_lab: Callable[..., Lab]) -> None:
    config = {"Network": "10.244.0.0/22", "SubnetLen": 24, "SubnetMax": "10.244.2.0", "Backend": {"Type": "vxlan"}}
    lab = make_lab(hosts=3, pods=0, config=config)
    lab.make_network()
    lab.start_etcd()
    lab.write_config(config)
    h1, h2, h3 = lab.hosts
    for host in (h1, h2):
        host.start_agent()
    for host in (h1, h2):
        host.wait_ready()
    assert {h1.subnet, h2.subnet} == {"10.244.1.0/24", "10.244.2.0/24"}
    h3.start_agent()
    wait_until(lambda: events(h3, "subnet_exhausted"), 20, "the agent to say that no subnet is free")
    assert re.search(r"\b2\b", str(events(h3, "subnet_exhausted")[0]["reason"]))
    h1.kill_agent()
    freed = h1.subnet
    cleanup = h1.run(
        *AGENT, "cleanup", "--release", "--subnet-file", str(h1.subnet_file),
        "--state-dir", str(h1.state_dir), "--etcd-endpoints", "http://172.30.0.1:2379",
    )  # fmt: skip
    assert cleanup.returncode == 0, cleanup.stderr
    h3.wait_ready()
    assert h3.subnet == freed


def test_host_is_taken_over_from_flanneld_under_a_ping_with_no_packet_lost(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(hosts=2, pods=1)
    lab.make_network()
    lab.start_etcd()
    lab.write_config({"Network": "10.244.0.0/16", "SubnetMax": "10.244.199.0", "Backend": {"Type": "vxlan"}})
    h1, h2 = lab.hosts
    h1.start_agent()
    h1.wait_ready()
    h1.attach_pods()
    (own,) = lab.leases()
    assert own.attrs.vtep is not None
    # What a flanneld that was stopped leaves: its lease, device, entries of the living and of the dead, subnet file.
    mac = "be:ef:00:00:00:02"
    value = (
        f'{{"PublicIP":"{h2.underlay_ip}","PublicIPv6":null,"BackendType":"vxlan",'
        f'"BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}'
    )
    etcd_lease = lab.store.grant(86400)
    assert lab.store.create("10.244.219.0-24", value.encode(), etcd_lease)
    h2.subnet_file.write_text(
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.219.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
    )
    base, peer_mac = format_address(own.subnet.base), format_mac(own.attrs.vtep.mac)
    h2.ip(
        f"link add flannel.1 address {mac} mtu 1450 type vxlan id 1 local {h2.underlay_ip} dev eth0 dstport 8472 "
        "nolearning",
        "addr add 10.244.219.0/32 dev flannel.1",
        "link set flannel.1 up",
        f"neigh add {base} lladdr {peer_mac} dev flannel.1 nud permanent",
        f"route add {own.subnet} via {base} dev flannel.1 onlink",
        "neigh add 10.244.217.0 lladdr be:ef:00:00:00:77 dev flannel.1 nud permanent",
        "route add 10.244.217.0/24 via 10.244.217.0 dev flannel.1 onlink",
    )
    for entry in (f"{peer_mac} dst {h1.underlay_ip}", "be:ef:00:00:00:77 dst 172.30.9.9"):
        assert h2.run("sh", "-c", f"bridge fdb add {entry} dev flannel.1 self permanent").returncode == 0
    assert h2.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward").returncode == 0
    h2.attach_pods()
    index = h2.json("ip", "link", "show", "flannel.1")[0]["ifindex"]
    src, dst = h2.pods[0], h1.pods[0]
    wait_until(lambda: src.run("ping", "-n", "-c", "1", "-W", "1", dst.address).returncode == 0, 10, "flannel's path")
    with endless_ping(src, dst) as stop:
        h2.start_agent()
        h2.wait_ready()
        lab.wait_converged()
        sent, received = stop()
    assert sent > 10
    assert received == sent
    link = h2.json("ip", "link", "show", "flannel.1")[0]
    assert (link["ifindex"], link["address"]) == (index, mac)
    assert h2.subnet == "10.244.219.0/24"
    (lease,) = (lease for lease in lab.leases() if lease.subnet != own.subnet)
    assert (lease.etcd_lease, lease.attrs.vtep) == (etcd_lease, Vtep(1, bytes.fromhex(mac.replace(":", ""))))
    # The route is in place of flannel's, and what flannel had kept of a host without a lease is gone.
    assert {kind: len(found) for kind, found in entries(h2).items()} == dict.fromkeys(
        ("route", "neighbour", "nexthop", "fdb"), 1
    )
    (route,) = h2.json("ip", "route", "show", "dev", "flannel.1")
    assert route["protocol"] == "111"
    # The guard, nexthop and route; and the FDB entry, which iproute2 marks "noarp" where flanneld and we do not.
    (written,) = events(h2, "reconciled")
    assert (written["put"], written["dropped"]) == (4, 3)


def test_host_is_handed_back_to_flanneld_under_a_ping_with_no_packet_lost(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(hosts=2, pods=1)
    lab.up()
    h1, h2 = lab.hosts
    before = {lease.subnet: lease for lease in lab.leases()}
    (peer,) = (lease for lease in before.values() if format_address(lease.attrs.public_ip) == h2.underlay_ip)
    assert peer.attrs.vtep is not None
    index = h1.json("ip", "link", "show", "flannel.1")[0]["ifindex"]
    with endless_ping(h1.pods[0], h2.pods[0]) as stop:
        assert h1.kill_agent(signal.SIGTERM) == 0
        # What a flanneld does that finds its lease and a device as it would make it: it writes all entries again.
        base, mac = format_address(peer.subnet.base), format_mac(peer.attrs.vtep.mac)
        h1.ip(
            f"neigh replace {base} lladdr {mac} dev flannel.1 nud permanent",
            f"route replace {peer.subnet} via {base} dev flannel.1 onlink",
        )
        fdb = f"bridge fdb replace {mac} dst {h2.underlay_ip} dev flannel.1 self permanent"
        assert h1.run("sh", "-c", fdb).returncode == 0
        more = h1.pods[0].run("ping", "-n", "-c", "20", "-i", "0.01", h2.pods[0].address)
        assert more.returncode == 0, more.stdout
        sent, received = stop()
    assert sent > 10
    assert received == sent
    assert h1.json("ip", "link", "show", "flannel.1")[0]["ifindex"] == index
    (route,) = h1.json("ip", "route", "show", str(peer.subnet))
    assert (route["gateway"], route.get("nhid")) == (base, None)
    # Its own record is as flannel reads it, on an etcd lease that it may renew or replace.
    assert {lease.subnet: lease for lease in lab.leases()} == before
    assert all(lease.etcd_lease for lease in before.values())


def test_lease_cannot_take_a_network_this_host_is_linked_to(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(hosts=2, pods=0)
    lab.make_network()
    h1, _ = lab.hosts
    h1.ip("link add mgmt type bridge", "addr add 10.244.66.1/24 dev mgmt", "link set mgmt up")
    lab.start_etcd()
    lab.write_config({"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}})
    put_peer(lab, 66)
    put_peer(lab, 67)
    for host in lab.hosts:
        host.start_agent()
    for host in lab.hosts:
        host.wait_ready()
    assert "10.244.66.0/24" not in entries(h1)["route"]
    assert "10.244.67.0/24" in entries(h1)["route"]
    (route,) = h1.json("ip", "route", "show", "10.244.66.0/24")
    assert (route["dev"], route["protocol"]) == ("mgmt", "kernel")


def test_host_takes_no_subnet_that_one_of_its_links_uses(make_lab: Callable[..., Lab]) -> None:
    config = {"Network": "10.244.0.0/22", "SubnetMax": "10.244.2.0", "Backend": {"Type": "vxlan"}}
    lab = make_lab(hosts=1, pods=0, config=config)
    lab.make_network()
    (h1,) = lab.hosts
    h1.ip("link add mgmt type bridge", "addr add 10.244.1.77/24 dev mgmt", "link set mgmt up")
    lab.start_etcd()
    lab.write_config(config)
    h1.start_agent()
    h1.wait_ready()
    assert h1.subnet == "10.244.2.0/24"


def test_network_that_contains_the_hosts_own_address_is_refused(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(hosts=1, pods=0)
    lab.make_network()
    lab.start_etcd()
    lab.write_config({"Network": "172.16.0.0/12", "Backend": {"Type": "vxlan"}})
    (h1,) = lab.hosts
    options = ("--iface", "eth0", "--subnet-file", str(h1.subnet_file), "--state-dir", str(h1.state_dir))
    refused = h1.run(*AGENT, "run", "--etcd-endpoints", "http://172.30.0.1:2379", *options)
    assert refused.returncode == 1
    assert "Network: 172.16.0.0/12 contains this host's own address 172.30.0.11" in refused.stderr
    assert lab.leases() == []

"""Hosts that boot while etcd is away, and a network configuration that changes under running agents."""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overlay.cluster import NETWORK_CONFIG, Host, Lab, wait_until

pytestmark = pytest.mark.fault

MakeLab = Callable[..., Lab]


def events(host: Host, event: str) -> list[dict[str, Any]]:
    """The lines of that event in the host's log."""
    lines = [json.loads(line) for line in host.log().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


def boot(host: Host) -> None:
    """Take from the host what a reboot takes from it, and start its agent."""
    host.kill_agent(signal.SIGKILL)
    host.ip("link delete flannel.1")
    host.subnet_file.unlink()
    host.start_agent()


def wait_cached(host: Host, seconds: float = 20) -> None:
    """Until the host's table is on disk, with both its peers."""
    path = host.state_dir / "table.jsonl"
    wait_until(lambda: path.exists() and len(path.read_text().splitlines()) == 3, seconds, f"the cache of {host.name}")


def all_answer(lab: Lab) -> bool:
    return all(ping.ok for ping in lab.ping_all())


def test_host_that_boots_while_etcd_is_away_comes_up_from_its_last_table(make_lab: MakeLab) -> None:
    lab = make_lab(hosts=3, pods=1, agent_options=("--log-format", "json"))
    lab.up()
    h1 = lab.hosts[0]
    subnet = h1.subnet
    wait_cached(h1)
    lab.stop_etcd(signal.SIGKILL)
    boot(h1)
    h1.wait_ready()
    assert h1.subnet == subnet
    (line,) = events(h1, "started_from_cache")
    assert line["level"] == "warning" and line["subnet"] == subnet
    h1.attach_pods()
    wait_until(lambda: all_answer(lab), 20, "all pods to answer while etcd is away")
    lab.start_etcd()
    wait_until(lambda: events(h1, "store_reachable"), 30, "the agent to reach etcd")
    lab.wait_converged()
    assert h1.subnet == subnet
    assert all_answer(lab)


@pytest.mark.parametrize("spoil", ["no table", "another address", "garbage"])
def test_host_without_a_table_that_holds_for_it_waits_for_etcd(make_lab: MakeLab, spoil: str) -> None:
    lab = make_lab(hosts=3, pods=0, agent_options=("--log-format", "json"))
    lab.up()
    h1, h2 = lab.hosts[:2]
    table = h1.state_dir / "table.jsonl"
    wait_cached(h1)
    match spoil:
        case "no table":
            table.unlink()
        case "another address":
            wait_cached(h2)
            shutil.copyfile(h2.state_dir / "table.jsonl", table)
        case "garbage":
            table.write_bytes(table.read_bytes()[:-20])
    lab.stop_etcd(signal.SIGKILL)
    boot(h1)
    wait_until(lambda: events(h1, "waiting_for_config"), 20, "the agent to wait")
    assert events(h1, "started_from_cache") == []
    lab.start_etcd()
    h1.wait_ready()
    lab.wait_converged()


def test_lease_that_ran_out_keeps_a_host_from_its_last_table(make_lab: MakeLab) -> None:
    lab = make_lab(hosts=3, pods=0, agent_options=("--log-format", "json", "--subnet-lease-ttl", "12"))
    lab.up()
    h1 = lab.hosts[0]
    wait_cached(h1)
    lab.stop_etcd(signal.SIGKILL)
    h1.kill_agent(signal.SIGKILL)
    until = json.loads((h1.state_dir / "table.jsonl").read_text().splitlines()[0])["until"]
    wait_until(lambda: time.time() > until, 20, "the end of the lease")
    h1.start_agent()
    wait_until(lambda: events(h1, "waiting_for_config"), 20, "the agent to wait")
    assert events(h1, "started_from_cache") == []


def test_wall_clock_that_is_set_forward_and_back_ends_no_lease(make_lab: MakeLab, tmp_path: Path) -> None:
    offset = tmp_path / "offset"
    offset.write_text("0")
    # The machine's own clock is everybody's: the agents' is set for them alone, but not for grpc, whose core, which is
    # not Python, would go by another one.
    program = (
        "import pathlib, sys, time, types\n"
        "import grpc._channel, grpc._common\n"
        "grpc._channel.time = grpc._common.time = types.SimpleNamespace(**vars(time))\n"
        "real, offset = time.time, pathlib.Path(sys.argv.pop(1))\n"
        "time.time = lambda: real() + float(offset.read_text() or 0)\n"
        "import agent\n"
        "sys.exit(agent.main())"
    )
    command = (sys.executable, "-P", "-c", program, str(offset), "run")
    options = ("--log-format", "json", "--log-level", "debug", "--subnet-lease-ttl", "4")
    lab = make_lab(hosts=2, pods=1, agent_command=command, agent_options=options)
    lab.up()
    leases = lab.leases()
    for seconds in (86400, -86400, 0):
        offset.write_text(str(seconds))
        for host in lab.hosts:
            before = len(events(host, "lease_renewed"))
            wait_until(lambda host=host, n=before: len(events(host, "lease_renewed")) > n + 2, 20, "three renewals")
    assert lab.leases() == leases
    assert all(not events(host, "lease_lost") for host in lab.hosts)
    assert all_answer(lab)


@pytest.fixture(scope="module")
def lab(make_module_lab: MakeLab) -> Lab:
    made = make_module_lab(hosts=2, pods=1, agent_options=("--log-format", "json"))
    made.up()
    return made


def change(lab: Lab, backend: dict[str, Any] | None = None, **settings: Any) -> None:
    """Write a changed configuration, and have all agents look at it."""
    config = {**NETWORK_CONFIG, **settings}
    config["Backend"] = {**config["Backend"], **(backend or {})}
    lab.write_config(config)
    for host in lab.hosts:
        assert host.agent_pid is not None
        os.kill(host.agent_pid, signal.SIGHUP)


def mtu_of(host: Host) -> int:
    return int(host.json("ip", "link", "show", "flannel.1")[0]["mtu"])


def test_mtu_of_the_configuration_is_taken_over_by_running_agents(lab: Lab) -> None:
    before = [mtu_of(host) for host in lab.hosts]
    change(lab, {"MTU": 1380})
    for host in lab.hosts:
        wait_until(lambda host=host: mtu_of(host) == 1380, 10, f"the new MTU on {host.name}")
        wait_until(lambda host=host: host.subnet_env["FLANNEL_MTU"] == "1380", 10, f"the new subnet.env on {host.name}")
    wait_until(lambda: all(lease.attrs.mtu == 1380 for lease in lab.leases()), 10, "the new MTU in all leases")
    change(lab)
    for host, mtu in zip(lab.hosts, before, strict=True):
        wait_until(lambda host=host, mtu=mtu: mtu_of(host) == mtu, 10, f"the old MTU on {host.name}")
    lab.wait_converged()
    assert all_answer(lab)


@pytest.mark.parametrize(
    ("backend", "settings", "event", "words"),
    [
        ({"VNI": 7}, {}, "config_needs_restart", r"Backend\.VNI: 1 -> 7"),
        ({"Type": "host-gw"}, {}, "config_needs_restart", r"Backend\.Type: vxlan -> host-gw"),
        ({}, {"Network": "10.32.0.0/16"}, "config_needs_restart", r"Network: 10\.244\.0\.0/16 -> 10\.32\.0\.0/16"),
        ({}, {"SubnetLen": 26}, "config_needs_restart", "SubnetLen: 24 -> 26"),
        ({"Type": "udp"}, {}, "config_unusable", r"Backend\.Type"),
        ({"MTU": 100}, {}, "config_unusable", "between 576 and"),
        ({}, {"Network": 5}, "config_unusable", "Network"),
    ],
)
def test_what_cannot_change_under_running_agents_is_told_and_changes_nothing(
    lab: Lab, backend: dict[str, Any], settings: dict[str, Any], event: str, words: str
) -> None:
    before = {host.name: len(events(host, event)) for host in lab.hosts}
    change(lab, backend, **settings)
    for host in lab.hosts:
        new = wait_until(lambda host=host: events(host, event)[before[host.name] :], 10, f"{event} on {host.name}")
        assert re.search(words, str(new[0])), new
        assert new[0]["remedy"]
    assert all_answer(lab)
    change(lab)
    lab.wait_converged()

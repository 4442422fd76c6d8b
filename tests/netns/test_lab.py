"""The lab itself: it comes up, is used, dies badly, and never leaves anything behind."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from overlay.cluster import Lab, LabError, labs, orphans, wait_until
from overlay.netns import NETNS, Process, inhabitants
from tests.conftest import connect

PROJECT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-P", "-m", "agent", "lab")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROJECT), "TERM": "dumb"}

MakeLab = Callable[..., Lab]


def lab_command(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *argv], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


def start_command(*argv: str) -> subprocess.Popen[str]:
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*COMMAND, *argv], env=ENVIRONMENT, **output)


def links_of_the_machine() -> list[str]:
    found = json.loads(subprocess.check_output(["ip", "-j", "link"]))
    return sorted(link["ifname"] for link in found)


def nothing_is_left(lab: Lab) -> bool:
    return lab.name not in labs() and not list(NETNS.glob(lab.prefix + "*")) and not lab.state.exists()


def processes_of(lab: Lab) -> list[Process]:
    return inhabitants(NETNS.glob(lab.prefix + "*"))


def test_lab_comes_up_reaches_every_pod_and_leaves_nothing(make_lab: MakeLab) -> None:
    links = links_of_the_machine()
    lab = make_lab()
    lab.up()
    assert links_of_the_machine() == links
    pings = lab.ping_all()
    assert len(pings) == 30
    assert all(ping.ok for ping in pings), pings
    living = processes_of(lab)
    assert len(living) >= 4
    assert lab.down()
    assert nothing_is_left(lab)
    assert not any(process.alive for process in living)
    assert links_of_the_machine() == links
    assert not lab.down()


def test_host_can_be_added_to_a_running_lab(make_lab: MakeLab) -> None:
    lab = make_lab(hosts=1, pods=1)
    lab.up()
    host = lab.add_host()
    host.start_agent()
    host.wait_ready()
    host.attach_pods()
    lab.wait_converged()
    assert all(ping.ok for ping in lab.ping_all())


def test_commands_use_a_lab_that_an_earlier_one_brought_up(make_lab: MakeLab) -> None:
    lab = make_lab()
    name = f"--name={lab.name}"
    up = lab_command("up", name, "--hosts=2", "--pods=1", "--json")
    assert up.returncode == 0, up.stderr
    report = json.loads(up.stdout)
    assert [(host["host"], host["ready"], host["programmed"], host["peers"]) for host in report] == [
        ("h1", True, 1, 1),
        ("h2", True, 1, 1),
    ]
    assert json.loads(lab_command("status", name, "--json").stdout) == report
    for host in report:
        assert host["subnets"][0] in lab_command("status", name).stdout
    assert {"lab": lab.name, "hosts": 2, "agents_running": 2} in json.loads(lab_command("list", "--json").stdout)

    ping = lab_command("ping", name)
    assert ping.returncode == 0
    assert "2 of 2 pings answered." in ping.stdout
    inside = lab_command("exec", name, "h2p1", "--", "ip", "-br", "addr", "show", "eth0")
    assert report[1]["pods"]["h2p1"][0] in inside.stdout
    assert lab_command("exec", name, "hub", "--", "sh", "-c", "exit 7").returncode == 7

    os.kill(report[0]["agent_pid"], signal.SIGKILL)
    stopped = json.loads(lab_command("status", name, "--json").stdout)[0]
    assert (stopped["agent_pid"], stopped["ready"]) == (None, False)
    assert lab_command("down", name).returncode == 0
    assert nothing_is_left(lab)


def test_underlay_can_have_both_families_and_a_host_other_addresses(make_lab: MakeLab) -> None:
    lab = make_lab(hosts=2, pods=1)
    name = f"--name={lab.name}"
    up = lab_command("up", name, "--hosts=2", "--pods=1", "--underlay=46", "--json")
    assert up.returncode == 0, up.stderr
    assert [host["underlay_ips"] for host in json.loads(up.stdout)] == [
        ["172.30.0.11", "fd30::11"],
        ["172.30.0.12", "fd30::12"],
    ]
    assert "fd30::12" in lab_command("status", name).stdout
    h1, h2 = Lab.existing(lab.name, connect).hosts
    h2.renumber(ipv4="172.30.0.99", ipv6="fd30::99")
    for address in h2.underlay_ips.values():
        assert h1.run("ping", "-n", "-c", "1", "-W", "1", address).returncode == 0
    for hub in h2.seat.link.hub.values():
        assert h2.run("ping", "-n", "-c", "1", "-W", "1", str(hub.ip)).returncode == 0


def test_overlay_and_backend_are_chosen_on_the_command_line(make_lab: MakeLab) -> None:
    name = f"--name={make_lab().name}"
    up = lab_command("up", name, "--underlay=46", "--overlay=46", "--backend=host-gw", "--pods=1", "--json")
    assert up.returncode == 0, up.stderr
    assert [(len(host["subnets"]), host["vtep_macs"]) for host in json.loads(up.stdout)] == [(2, [])] * 3
    ping = lab_command("ping", name)
    assert "IPv6 ms" in ping.stdout
    assert "12 of 12 pings answered." in ping.stdout


def test_lost_ping_makes_the_ping_command_fail(make_lab: MakeLab) -> None:
    lab = make_lab(hosts=1, pods=2)
    lab.up()
    lab.pods[1].ip("link set eth0 down")
    ping = lab_command("ping", "--name", lab.name)
    assert ping.returncode == 1
    assert "0 of 2 pings answered." in ping.stdout


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["up", "--name", "Not/good"], 1, "cannot name a lab"),
        (["status", "--name", "tnone"], 1, "bring it up with: overlay-agent lab up --name tnone"),
        (["exec", "--name", "tnone", "h1", "--", "true"], 1, "there is no lab 'tnone'"),
        (["up", "--hosts", "201"], 2, "from 1 to 200"),
        (["up", "--hosts", "three"], 2, "from 1 to 200"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(argv: list[str], code: int, says: str) -> None:
    done = lab_command(*argv)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_place_is_answered_with_the_known_ones(make_lab: MakeLab) -> None:
    lab = make_lab(hosts=2, pods=1)
    with pytest.raises(LabError, match="has no 'h3'; it has hub, h1 to h2, and pods as h1p1"):
        _ = lab["h3"]


def test_second_command_on_one_lab_is_refused(make_lab: MakeLab) -> None:
    lab = make_lab()
    with socket.socket(socket.AF_UNIX) as lock:
        lock.bind(f"\0overlay-agent-lab-{lab.name}")
        refused = lab_command("up", "--name", lab.name)
    assert refused.returncode == 1
    assert "another command is at work" in refused.stderr


MOMENTS: dict[str, Callable[[Lab], bool]] = {
    "the first namespace": lambda lab: lab.hub.exists,
    "etcd starts": lambda lab: lab.log_path("etcd").exists(),
    "an agent starts": lambda lab: lab.log_path("h1").exists(),
    "a host is ready": lambda lab: lab.hosts[0].subnet_file.exists(),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_lab_whose_up_was_killed_can_be_brought_up_again(make_lab: MakeLab, moment: str) -> None:
    lab = make_lab(hosts=2, pods=1)
    with start_command("up", "--name", lab.name, "--hosts=2", "--pods=1") as up:
        wait_until(lambda: MOMENTS[moment](lab), 20, moment, interval=0.002)
        up.kill()
    lab.up()
    assert all(ping.ok for ping in lab.ping_all())
    lab.down()
    assert nothing_is_left(lab)


@pytest.mark.parametrize(
    ("moment", "number"), [*((moment, signal.SIGINT) for moment in MOMENTS), ("an agent starts", signal.SIGTERM)]
)
def test_interrupted_up_takes_the_lab_down_again(make_lab: MakeLab, moment: str, number: signal.Signals) -> None:
    lab = make_lab(hosts=2, pods=1)
    with start_command("up", "--name", lab.name, "--hosts=2", "--pods=1") as up:
        wait_until(lambda: MOMENTS[moment](lab), 20, moment, interval=0.002)
        up.send_signal(number)
        _, errors = up.communicate(timeout=30)
    assert up.returncode == 128 + number
    assert "Traceback" not in errors
    assert nothing_is_left(lab)


def test_up_whose_agents_fail_shows_their_log_and_leaves_nothing(make_lab: MakeLab) -> None:
    lab = make_lab(hosts=1, agent_command=("sh", "-c", "echo no such thing >&2; exit 3"))
    with pytest.raises(LabError, match=r"h1 has ended before it was ready(.|\n)*no such thing"):
        lab.up()
    assert nothing_is_left(lab)


def test_down_ends_what_ignores_the_request_and_what_the_lab_did_not_start(make_lab: MakeLab) -> None:
    lab = make_lab(hosts=1, pods=1)
    lab.make_network()
    deaf = subprocess.Popen(
        lab.pods[0].inside("sh", "-c", "trap '' TERM; echo; while :; do read x; done"), stdin=-1, stdout=-1
    )
    assert deaf.stdout is not None
    assert deaf.stdin is not None
    deaf.stdout.readline()
    stopped = subprocess.Popen(lab.hosts[0].inside("sleep", "1000"))
    wait_until(lambda: len(processes_of(lab)) == 2, 5, "both processes inside")
    stopped.send_signal(signal.SIGSTOP)
    lab.down()
    assert deaf.wait(timeout=1) == -signal.SIGKILL
    assert stopped.wait(timeout=1) == -signal.SIGTERM
    deaf.stdout.close()
    deaf.stdin.close()
    assert nothing_is_left(lab)


def test_recorded_process_id_that_belongs_to_another_by_now_is_spared(make_lab: MakeLab) -> None:
    lab = make_lab(hosts=1)
    lab.make_network()
    with subprocess.Popen(["sleep", "1000"]) as bystander:
        started = Process.of(bystander.pid)
        assert started is not None
        saved = json.loads((lab.state / "lab.json").read_text())
        saved["processes"] = {"h1": [bystander.pid, started.start - 1]}
        (lab.state / "lab.json").write_text(json.dumps(saved))
        lab.down()
        assert bystander.poll() is None
        bystander.kill()


def test_lab_is_an_orphan_once_the_process_it_is_tied_to_is_gone(make_lab: MakeLab) -> None:
    lab = make_lab(hosts=1)
    lab.make_network()
    assert lab.name not in orphans()
    saved = json.loads((lab.state / "lab.json").read_text())
    with subprocess.Popen(["true"]) as gone:
        saved["owner"] = [gone.pid, 1]
    (lab.state / "lab.json").write_text(json.dumps(saved))
    assert lab.name in orphans()


def test_etcd_keeps_its_data_when_it_is_killed_and_started_again(make_lab: MakeLab) -> None:
    lab = make_lab(hosts=1, pods=0)
    lab.up()
    before = lab.leases()
    lab.stop_etcd(signal.SIGKILL)
    assert lab.etcd_pid is None
    lab.start_etcd()
    assert [lease.subnet for lease in lab.leases()] == [lease.subnet for lease in before]


def test_demo_shows_everything_within_100_columns_and_leaves_nothing() -> None:
    demo = lab_command("demo")
    assert demo.returncode == 0, demo.stderr
    assert demo.stderr == ""
    assert "30 of 30 pings answered." in demo.stdout
    assert re.search(r"VXLAN +8 bytes +flags 0x08, VNI 1", demo.stdout)
    assert "missing" not in demo.stdout
    assert demo.stdout.isascii()
    assert "\033" not in demo.stdout
    assert max(map(len, demo.stdout.splitlines())) <= 100
    assert "demo" not in labs()


def test_interrupted_demo_takes_its_lab_down() -> None:
    with start_command("demo") as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "leases in etcd" in line:
                break
        demo.send_signal(signal.SIGTERM)
        demo.communicate(timeout=30)
    assert demo.returncode == 128 + signal.SIGTERM
    assert "demo" not in labs()


def test_condition_that_never_comes_true_is_named() -> None:
    before = time.monotonic()
    with pytest.raises(LabError, match=r"the moon: not within 0\.05 s"):
        wait_until(lambda: False, 0.05, "the moon")
    assert time.monotonic() - before < 5

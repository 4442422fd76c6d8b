"""What the health endpoint says while things happen to a real cluster; its page as Prometheus' own tool reads it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from overlay import metrics
from overlay.cluster import Host, Lab, wait_until
from overlay.model import NEXTHOP_BASE
from subnet_lease.model import LeaseAttrs, Vtep, encode_attrs, format_address
from subnet_lease.table import REJECTIONS
from tests.netns.scrape import OPTIONS, PROJECT, answers, ask, samples

MakeLab = Callable[..., Lab]

MAX_AGE_S = 2

STRANGER = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(bytes(60), ('{}', 8472))"

HANGING = """
import sys, threading
import agent
from subnet_lease import config_watch
from subnet_lease.etcd import EtcdStore

usual = EtcdStore.read_config

def read_config(self):
    if threading.current_thread().name == "config":
        threading.Event().wait()
    return usual(self)

EtcdStore.read_config = read_config
config_watch.STORE_WORK_S = 1.0
sys.exit(agent.main(sys.argv[1:]))
"""
"""An agent whose watch of the configuration hangs as soon as it looks, which counts as dead after a second."""


@pytest.fixture(scope="module")
def lab(make_module_lab: MakeLab) -> Lab:
    """Three hosts that answer; tests leave it as they found it."""
    made = make_module_lab(pods=1, agent_options=(*OPTIONS, "--readyz-max-age", str(MAX_AGE_S)))
    made.up()
    return made


def attrs(number: int, vni: int = 1) -> bytes:
    """The lease of a host that has no agent."""
    vtep = Vtep(vni, bytes((2, 0, 0, 0, 9, number)))
    return encode_attrs(LeaseAttrs(bytes((172, 30, 200, number)), "vxlan", vtep))


def put(lab: Lab, key: str, value: bytes) -> None:
    assert lab.store.create(key, value, 0)


def delete(lab: Lab, *keys: str) -> None:
    for record in lab.store.snapshot().records:
        if record.key in keys:
            assert lab.store.delete(record.key, record.mod_revision)


def wait_for(host: Host, **expected: float) -> dict[str, float]:
    """Until the metrics named without their prefix have these values; all of them then."""
    found: dict[str, float] = {}

    def reached() -> bool:
        found.update(samples(host))
        return {name: found.get(f"overlay_agent_{name}") for name in expected} == expected

    wait_until(reached, 15, f"{expected} on {host.name}")
    return found


def test_a_scrape_is_what_prometheus_wants_and_has_every_metric(lab: Lab) -> None:
    h1 = lab.hosts[0]
    page = ask(h1, "/metrics")
    assert (page.status, page.kind) == (200, metrics.CONTENT_TYPE)
    checked = subprocess.run(["promtool", "check", "metrics"], input=page.text, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    there = re.findall(r"^# TYPE (\S+)", page.text, re.MULTILINE)
    # Nothing was refused yet.
    assert there == [family.name for family in metrics.FAMILIES if family is not metrics.REFUSALS]


def test_values_are_those_of_the_cluster(lab: Lab) -> None:
    found = wait_for(lab.hosts[0], ready=1, peers=2, entries_missing=0, store_connected=1, table_age_seconds=0)
    assert found["overlay_agent_lease_held"] == 1
    assert 80_000 < found["overlay_agent_lease_remaining_seconds"] <= 86_400
    assert found['overlay_agent_store_request_duration_seconds_count{request="read"}'] >= 2
    assert found['overlay_agent_store_request_duration_seconds_count{request="write"}'] >= 1
    assert found["process_threads"] == len(os.listdir(f"/proc/{lab.hosts[0].agent_pid}/task"))  # noqa: PTH208
    alive = {name: value for name, value in found.items() if "loop_alive" in name}
    assert alive == {f'overlay_agent_loop_alive{{loop="{loop}"}}': 1 for loop in metrics.LOOPS}


def test_healthz_names_every_loop(lab: Lab) -> None:
    page = ask(lab.hosts[0], "/healthz")
    assert page.status == 200
    assert set(page.text.removeprefix("alive: ").strip().split(", ")) == set(metrics.LOOPS)


def test_a_host_that_joins_and_leaves_is_counted_with_the_time_it_took(lab: Lab) -> None:
    h1 = lab.hosts[0]
    before = wait_for(h1, peers=2)
    put(lab, "10.244.250.0-24", attrs(250))
    joined = wait_for(h1, peers=3, entries_missing=0)
    delete(lab, "10.244.250.0-24")
    gone = wait_for(h1, peers=2, entries_missing=0)
    name = "overlay_agent_event_to_kernel_seconds"
    assert [found[f"{name}_count"] - before[f"{name}_count"] for found in (joined, gone)] == [1, 2]
    assert 0 < gone[f"{name}_sum"] - before[f"{name}_sum"] < 5
    operations = ('entries_written_total{operation="put"}', 'entries_written_total{operation="drop"}')
    written = [gone[f"overlay_agent_{name}"] - before[f"overlay_agent_{name}"] for name in operations]
    assert written == [5, 5], "guard, FDB, neighbour, nexthop, route"


def test_drift_is_counted_by_kind_and_repaired(lab: Lab) -> None:
    h1, h2, _ = lab.hosts
    before = samples(h1)
    assert h1.run("ip", "route", "del", h2.subnet).returncode == 0
    base = h2.subnet.removesuffix("/24")
    assert h1.run(
        *("ip", "neigh", "replace", base, "lladdr", "02:00:00:00:00:01", "dev", "flannel.1", "nud", "permanent")
    ).returncode == 0  # fmt: skip
    removed, altered = (
        f'drift_total{{kind="{kind}",change="{change}"}}'
        for kind, change in (("route", "removed"), ("neighbour", "altered"))
    )
    expected = {name: before[f"overlay_agent_{name}"] + 1 for name in (removed, altered)}
    found = wait_for(h1, **expected, entries_missing=0)
    changed = {name for name, value in found.items() if "drift_total" in name and value != before[name]}
    assert changed == {f"overlay_agent_{name}" for name in (removed, altered)}


def test_leases_that_are_rejected_are_counted_by_the_sort_of_the_reason(lab: Lab) -> None:
    h1, h2, _ = lab.hosts
    wrong = {
        "nonsense": attrs(240),
        "10.9.9.0-24": attrs(241),
        "10.244.242.0-24": attrs(242, vni=7),
        "10.244.243.0-24": attrs(243).replace(b"172.30.200.243", b"224.0.0.1"),
        # A subnet within another's.
        h2.subnet.replace(".0/24", ".128-25"): attrs(244),
    }
    for key, value in wrong.items():
        put(lab, key, value)
    reasons = {f'rejected_leases{{reason="{reason}"}}': 1.0 for reason in REJECTIONS}
    wait_for(h1, **reasons, peers=2)
    assert answers(h1, "/readyz", 200, "5 leases rejected")
    delete(lab, *wrong)
    wait_for(h1, **dict.fromkeys(reasons, 0.0), peers=2)


def test_a_refusal_is_counted_by_errno_and_leaves_the_host_ready(lab: Lab) -> None:
    h1 = lab.hosts[0]
    # A group stands under the id of the peer's nexthop, and no plain nexthop replaces one (replace_nexthop).
    number = NEXTHOP_BASE + 249 * 256
    h1.ip("nexthop add id 9 via 172.30.0.1 dev eth0", f"nexthop add id {number} group 9")
    put(lab, "10.244.249.0-24", attrs(249))
    found = wait_for(h1, entries_refused=1, entries_missing=1)
    assert found['overlay_agent_refusals_total{errno="EINVAL"}'] >= 1
    assert answers(h1, "/readyz", 200, "1 not in place")
    h1.ip(f"nexthop del id {number}", "nexthop del id 9")
    wait_for(h1, entries_refused=0, entries_missing=0, peers=3)
    delete(lab, "10.244.249.0-24")
    wait_for(h1, entries_missing=0, peers=2)


def test_packets_are_counted_by_device_and_strangers_by_the_firewall(lab: Lab) -> None:
    h1, h2, _ = lab.hosts
    before = samples(h1)
    assert h1.pods[0].run("ping", "-n", "-c", "3", "-i", "0.01", "-W", "1", h2.pods[0].address).returncode == 0
    sent = lab.hub.run(sys.executable, "-I", "-S", "-c", STRANGER.format(h1.underlay_ip))
    assert sent.returncode == 0, sent.stderr
    name = 'firewall_packets_total{counter="strangers"}'
    found = wait_for(h1, **{name: before[f"overlay_agent_{name}"] + 1})
    for way in ("receive", "transmit"):
        packets, size = (
            f'overlay_agent_device_{way}_{what}_total{{device="flannel.1"}}' for what in ("packets", "bytes")
        )
        assert found[packets] - before[packets] >= 3
        assert found[size] - before[size] >= 3 * 84


def test_etcd_away_makes_the_host_unready_after_the_stated_age_and_its_return_ready(lab: Lab) -> None:
    h1 = lab.hosts[0]
    before = wait_for(h1, ready=1, store_connected=1)
    lab.stop_etcd(signal.SIGKILL)
    wait_for(h1, ready=0, store_connected=0, peers=2, entries_missing=0)
    page = ask(h1, "/readyz")
    assert page.status == 503
    assert re.match(
        r"not ready: etcd_unreachable: the table of peers is \d+ s old, at most 2 s are allowed: etcd is away; 2 peers",
        page.text,
    )
    assert answers(h1, "/healthz", 200), "the agent itself is well"
    found = samples(h1)
    assert found["overlay_agent_table_age_seconds"] > MAX_AGE_S
    failures = 'overlay_agent_store_request_failures_total{reason="unavailable"}'
    wait_until(lambda: samples(h1)[failures] > before[failures], 20, "a request that has failed")
    lab.start_etcd()
    wait_for(h1, ready=1, store_connected=1, table_age_seconds=0)
    assert answers(h1, "/readyz", 200, "ready: 2 peers")


def test_underlay_that_changes_is_counted(lab: Lab) -> None:
    h3 = lab.hosts[2]
    before = samples(h3)["overlay_agent_underlay_changes_total"]
    h3.ip("link set eth0 mtu 1400")
    wait_for(h3, underlay_changes_total=before + 1, ready=1, entries_missing=0)
    h3.ip("link set eth0 mtu 1500")
    wait_for(h3, underlay_changes_total=before + 2, ready=1, entries_missing=0)


def test_all_that_alerts_and_dashboard_ask_for_is_in_a_scrape(lab: Lab) -> None:
    h1 = lab.hosts[0]
    names = {name.partition("{")[0] for name in samples(h1)}
    for file in ("prometheus/overlay-agent.rules.yml", "grafana/overlay-agent.json"):
        used = set(re.findall(r"\b(?:overlay_agent|process)_[a-z_]+", (PROJECT / "deploy" / file).read_text()))
        # There from the first refusal on; `test_a_refusal_is_counted_by_errno_and_leaves_the_host_ready`.
        assert used - names <= {"overlay_agent_refusals_total"}, file


# --- agents of their own ---


def test_an_agent_that_waits_for_etcd_answers_and_says_so(make_lab: MakeLab, tmp_path: Path) -> None:
    lab = make_lab(hosts=1, pods=1, agent_options=(*OPTIONS, "--state-dir", str(tmp_path / "state")))
    lab.up()
    (h1,) = lab.hosts
    assert answers(h1, "/readyz", 200)
    h1.kill_agent()
    lab.stop_etcd(signal.SIGKILL)
    h1.start_agent("--state-dir", str(tmp_path / "empty"))
    reason = "etcd_unreachable: etcd does not answer: the network configuration: no connection"
    wait_until(lambda: answers(h1, "/readyz", 503, reason), 20, "the reason")
    assert answers(h1, "/healthz", 200)
    found = samples(h1)
    assert found["overlay_agent_ready"] == 0
    assert found['overlay_agent_store_request_failures_total{reason="unavailable"}'] >= 1
    assert "overlay_agent_peers" not in found
    lab.start_etcd()
    h1.wait_ready()
    wait_for(h1, ready=1)


def test_a_lease_that_somebody_takes_is_told_until_there_is_another(make_lab: MakeLab) -> None:
    config = {"Network": "10.244.0.0/16", "SubnetMin": "10.244.5.0", "SubnetMax": "10.244.5.0"}
    lab = make_lab(hosts=1, pods=1, config={**config, "Backend": {"Type": "vxlan"}}, agent_options=OPTIONS)
    lab.up()
    (h1,) = lab.hosts
    (own,) = lab.leases()
    assert format_address(own.attrs.public_ip or b"") == h1.underlay_ip
    # The only subnet there is becomes another host's reservation.
    assert lab.store.replace(own.key, attrs(77), 0, own.mod_revision)
    wait_for(h1, lease_held=0, lease_remaining_seconds=0, ready=0)
    wait_until(lambda: answers(h1, "/readyz", 503, "not ready: subnets_exhausted: "), 10, "the reason")
    delete(lab, own.key)
    wait_for(h1, lease_held=1, ready=1)


def test_a_loop_that_hangs_is_named_and_no_other(make_lab: MakeLab) -> None:
    lab = make_lab(hosts=1, pods=1, agent_command=(sys.executable, "-P", "-c", HANGING, "run"), agent_options=OPTIONS)
    lab.up()
    (h1,) = lab.hosts
    assert answers(h1, "/healthz", 200)
    assert h1.agent_pid is not None
    os.kill(h1.agent_pid, signal.SIGHUP)
    wait_until(lambda: answers(h1, "/healthz", 503), 10, "a loop that is dead")
    assert re.fullmatch(r"config: busy for \d+ s, at most 1 s are usual\n", ask(h1, "/healthz").text)
    found = samples(h1)
    dead = {name for name, value in found.items() if "loop_alive" in name and value == 0}
    assert dead == {'overlay_agent_loop_alive{loop="config"}'}
    h1.kill_agent(signal.SIGKILL)

"""The alerts, by Prometheus' own tool: each fires for what it is for, and nothing fires beside it."""

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from overlay import metrics

RULES = Path(__file__).parents[2] / "deploy/prometheus/overlay-agent.rules.yml"
ALERTS = re.findall(r"- alert: (\w+)", RULES.read_text())
MINUTES = 90
"""How long the samples last: a value for each minute."""

HOSTS = ("a", "b", "c")
SEEN = "b"
"""The host where something is wrong."""

Series = dict[str, str]
"""Name and labels without job and host -> values in promtool's notation."""


def steady(value: float) -> str:
    return f"{value}x{MINUTES}"


def healthy() -> Series:
    """What an agent says that is well, as far as alerts ask for it."""
    found = {"up": steady(1)}
    values: Mapping[str, object] = {
        "build_info": 1, "ready": 1, "store_connected": 1, "table_age_seconds": 0, "lease_held": 1,
        "lease_remaining_seconds": 80_000, "peers": 2, "entries": 10, "entries_missing": 0, "entries_refused": 0,
        "unreachable_peers": 0, "notifications_lost_total": 0, "underlay_changes_total": 1,
    }  # fmt: skip
    found |= {metrics.PREFIX + name: steady(f"{value}") for name, value in values.items()}
    for loop in metrics.LOOPS:
        found[metrics.PREFIX + f'loop_alive{{loop="{loop}"}}'] = steady(1)
    for reason in ("malformed", "contested"):
        found[metrics.PREFIX + f'rejected_leases{{reason="{reason}"}}'] = steady(0)
    for outcome, each_minute in (("changed", 1), ("unchanged", 12), ("failed", 0)):
        found[metrics.PREFIX + f'passes_total{{outcome="{outcome}"}}'] = rising(each_minute)
    for kind in ("route", "fdb"):
        found[metrics.PREFIX + f'drift_total{{kind="{kind}",change="removed"}}'] = steady(3)
    for counter, each_minute in (("strangers", 0), ("impostors", 0), ("strays", 0), ("masqueraded", 100_000)):
        found[metrics.PREFIX + f'firewall_packets_total{{counter="{counter}"}}'] = rising(each_minute)
    found[metrics.PREFIX + 'paths_failed{cause="peer_down"}'] = steady(0)
    for way in ("receive", "transmit"):
        for what in ("errors", "drops"):
            found[metrics.PREFIX + f'device_{way}_{what}_total{{device="flannel.1"}}'] = rising(1)
    found |= histogram("store_request_duration_seconds", 0.005, 'request="read",')
    found |= histogram("event_to_kernel_seconds", 0.005)
    found["process_resident_memory_bytes"] = steady(60 << 20)
    found["process_start_time_seconds"] = steady(1_700_000_000)
    return found


def rising(each_minute: float) -> str:
    return f"0+{each_minute}x{MINUTES}"


def histogram(name: str, seconds: float, labels: str = "") -> Series:
    """Ten values a minute, all of them just below `seconds`."""
    bounds = (0.005, 1.0, 2.5, 10.0)
    named = {f"{bound:g}": bound >= seconds for bound in bounds} | {"+Inf": True}
    return {
        f'{metrics.PREFIX}{name}_bucket{{{labels}le="{bound}"}}': rising(10 if above else 0)
        for bound, above in named.items()
    }


def of(name: str, values: str) -> Series:
    return {metrics.PREFIX + name: values}


CASES: dict[str, tuple[Series, Series]] = {
    "OverlayAgentDown": ({"up": steady(0)}, {"up": f"1x{MINUTES - 4} 0x3"}),
    "OverlayAgentRestarts": (
        {"process_start_time_seconds": f"{1_700_000_000}+60x{MINUTES}"},
        {"process_start_time_seconds": f"1x{MINUTES - 20} 2x10 3x9"},
    ),
    "OverlayAgentLoopDead": (
        of('loop_alive{loop="keeper"}', steady(0)),
        of('loop_alive{loop="keeper"}', f"1x{MINUTES - 20} 0x0 1x19"),
    ),
    "OverlayAgentNotReady": (of("ready", steady(0)), of("ready", f"1x{MINUTES - 4} 0x3")),
    "OverlayAgentMemory": (
        {"process_resident_memory_bytes": steady(300 << 20)},
        {"process_resident_memory_bytes": steady(200 << 20)},
    ),
    "OverlayAgentStoreDisconnected": (
        of("store_connected", steady(0)),
        of("store_connected", f"1x{MINUTES - 30} 0x0 1x29"),
    ),
    "OverlayAgentTableStale": (of("table_age_seconds", f"0+60x{MINUTES}"), of("table_age_seconds", steady(1700))),
    "OverlayAgentStoreSlow": (
        histogram("store_request_duration_seconds", 5.0, 'request="read",'),
        histogram("store_request_duration_seconds", 0.8, 'request="read",'),
    ),
    "OverlayAgentLeaseEnding": (
        of("lease_remaining_seconds", f"{600 + 60 * MINUTES}-60x{MINUTES}"),
        of("lease_remaining_seconds", " ".join(["Inf"] * MINUTES)),
    ),
    "OverlayAgentLeaseLost": (of("lease_held", steady(0)), of("lease_held", f"1x{MINUTES - 20} 0x0 1x19")),
    "OverlayAgentPassesFail": (
        of('passes_total{outcome="failed"}', rising(6)),
        of('passes_total{outcome="failed"}', f"0x{MINUTES - 20} 1x19"),
    ),
    "OverlayAgentEntriesRefused": (
        of("entries_refused", steady(4)) | of("entries_missing", steady(4)),
        of("entries_refused", f"0x{MINUTES - 20} 4x0 0x19"),
    ),
    "OverlayAgentEntriesMissing": (of("entries_missing", steady(4)), of("entries_missing", f"0x{MINUTES - 2} 4x1")),
    "OverlayAgentDrift": (
        of('drift_total{kind="route",change="removed"}', rising(5)),
        of('drift_total{kind="route",change="removed"}', f"3x{MINUTES - 5} 18x4"),
    ),
    "OverlayAgentNotificationsLost": (
        of("notifications_lost_total", rising(1)),
        of("notifications_lost_total", f"0x{MINUTES - 20} 2x19"),
    ),
    "OverlayAgentChangesSlow": (histogram("event_to_kernel_seconds", 5.0), histogram("event_to_kernel_seconds", 0.8)),
    "OverlayAgentUnderlayFlaps": (
        of("underlay_changes_total", rising(1)),
        of("underlay_changes_total", f"1x{MINUTES - 20} 3x19"),
    ),
    "OverlayAgentLeasesRejected": (
        of('rejected_leases{reason="contested"}', steady(1)),
        of('rejected_leases{reason="contested"}', f"0x{MINUTES - 10} 1x9"),
    ),
    "OverlayAgentPeersUnreachable": (
        of("unreachable_peers", steady(1)),
        of("unreachable_peers", f"0x{MINUTES - 10} 1x9"),
    ),
    "OverlayAgentPeersDiffer": (of("peers", steady(1)), of("peers", f"2x{MINUTES - 5} 1x4")),
    "OverlayAgentStrangers": (
        of('firewall_packets_total{counter="strangers"}', rising(600)),
        of('firewall_packets_total{counter="strangers"}', rising(5)),
    ),
    "OverlayAgentForgedPackets": (
        of('firewall_packets_total{counter="strays"}', rising(600)),
        of('firewall_packets_total{counter="strays"}', rising(5)),
    ),
    "OverlayAgentTunnelErrors": (
        of('device_transmit_errors_total{device="flannel.1"}', rising(600)),
        of('device_transmit_errors_total{device="flannel.1"}', rising(20)),
    ),
    "OverlayAgentPathsFailed": (
        of('paths_failed{cause="peer_down"}', steady(1)),
        of('paths_failed{cause="peer_down"}', f"0x{MINUTES - 4} 1x3"),
    ),
}
"""Alert -> (samples of one host for which it fires, and alone; samples of what is short, small or over again)."""


def firing(tmp_path: Path, hosts: Mapping[str, Series], *expected: str) -> None:
    """promtool agrees that after MINUTES these alerts fire, on SEEN alone (without hosts: of none), and no other."""
    series = [
        {"series": placed(name, host), "values": values}
        for host, found in hosts.items()
        for name, values in found.items()
    ]
    labels = [f'{{alertname="{name}"{f", instance={json.dumps(SEEN)}" if hosts else ""}}}' for name in expected]
    check: dict[str, Any] = {
        "expr": 'count by (alertname, instance) (ALERTS{alertstate="firing"})',
        "eval_time": f"{MINUTES}m",
        "exp_samples": [{"labels": each, "value": 1} for each in labels],
    }
    test = {"interval": "1m", "input_series": series, "promql_expr_test": [check]}
    file = tmp_path / "test.json"  # JSON is YAML.
    file.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [test]}))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def placed(name: str, host: str) -> str:
    bare, _, labels = name.partition("{")
    return f'{bare}{{job="overlay-agent",instance="{host}"{"," + labels if labels else "}"}'


def cluster(of_one: Series) -> dict[str, Series]:
    """Healthy hosts but for what one of them says."""
    unknown = of_one.keys() - healthy().keys()
    assert not unknown, "a case alters what is there"
    return {host: healthy() | (of_one if host == SEEN else {}) for host in HOSTS}


def test_rules_are_valid() -> None:
    checked = subprocess.run(["promtool", "check", "rules", str(RULES)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"SUCCESS: {len(ALERTS)} rules found" in checked.stdout


def test_every_alert_has_a_case() -> None:
    assert set(ALERTS) == CASES.keys() | {"OverlayAgentAbsent"}


def test_nothing_fires_in_a_healthy_cluster(tmp_path: Path) -> None:
    firing(tmp_path, cluster({}))


def test_no_agent_at_all_is_an_alert(tmp_path: Path) -> None:
    firing(tmp_path, {}, "OverlayAgentAbsent")


@pytest.mark.parametrize("alert", CASES)
def test_alert_fires_for_what_it_is_for_and_no_other_does(tmp_path: Path, alert: str) -> None:
    firing(tmp_path, cluster(CASES[alert][0]), alert)


@pytest.mark.parametrize("alert", CASES)
def test_alert_keeps_silent_for_what_is_short_small_or_over(tmp_path: Path, alert: str) -> None:
    firing(tmp_path, cluster(CASES[alert][1]))

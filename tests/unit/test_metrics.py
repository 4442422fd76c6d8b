"""The metrics: declarations, counts, the text; and that alerts and dashboard name nothing that is not declared."""

import errno
import json
import math
import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from overlay import metrics
from overlay.metrics import (
    BATCH,
    BUILD,
    DRIFT,
    EVENT_SECONDS,
    FAMILIES,
    HISTOGRAM,
    LEASE_LEFT,
    ONE,
    PASS_SECONDS,
    PASSES,
    PEERS,
    READY,
    REFUSALS,
    REQUEST_FAILURES,
    REQUEST_SECONDS,
    TABLE_AGE,
    WRITTEN,
    Histogram,
    Passes,
    Requests,
    render,
)
from overlay.model import Fdb, Put, Refusal, Route
from overlay.probe import CAUSES
from overlay.tracker import Drift
from subnet_lease.model import Prefix

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/overlay-agent.rules.yml"
DASHBOARD = ROOT / "deploy/grafana/overlay-agent.json"
FDB = Fdb((7, b"\x02\0\0\0\0\1"), b"\xac\x1e\0\1")
ROUTE = Route(Prefix.parse("10.0.1.0/24"))


def series_of(families: tuple[metrics.Family, ...] = FAMILIES) -> set[str]:
    """The names that queries may use."""
    plain = {family.name for family in families if family.kind != HISTOGRAM}
    parts = ("bucket", "sum", "count")
    return plain | {f"{family.name}_{part}" for family in families if family.kind == HISTOGRAM for part in parts}


def named_in(text: str) -> set[str]:
    """What looks like a metric of ours."""
    return set(re.findall(r"\b(?:overlay_agent|process)_[a-z_]+", text))


def test_names_are_unique_and_bear_their_units() -> None:
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    for family in FAMILIES:
        assert re.fullmatch(r"(overlay_agent|process)_[a-z]+(_[a-z]+)*", family.name)
        assert family.name.endswith("_total") == (family.kind == metrics.COUNTER)
        assert "_ms" not in family.name and "_kb" not in family.name
        assert family.meaning.endswith(".") and "\n" not in family.meaning
        assert (family.kind == HISTOGRAM) == bool(family.bounds)
        assert list(family.bounds) == sorted(set(family.bounds))


def test_no_label_is_a_peers() -> None:
    labels = {label for family in FAMILIES for label, _ in family.labels}
    assert labels == {
        "version", "python", "loop", "request", "reason", "outcome", "operation", "kind", "change", "errno", "counter",
        "device", "cause",
    }  # fmt: skip


def test_alerts_and_dashboard_name_declared_metrics_only() -> None:
    for file in (RULES, DASHBOARD):
        used = named_in(file.read_text())
        assert used and used <= series_of(), file.name


def test_dashboard_shows_every_metric() -> None:
    used = named_in(DASHBOARD.read_text())
    unused = [family.name for family in FAMILIES if not any(name.startswith(family.name) for name in used)]
    assert unused == []


def test_dashboard_is_one_grafana_can_lay_out() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        for target in panel.get("targets", ()):
            assert '{job=~"$job",instance=~"$instance"' in target["expr"], panel["title"]
            assert target["expr"].count("(") == target["expr"].count(")"), panel["title"]
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "job", "instance"]


def test_every_alert_says_its_cause_and_what_to_do() -> None:
    alerts = re.split(r"\n +- alert: ", RULES.read_text())[1:]
    assert len(alerts) == len({alert.split("\n")[0] for alert in alerts}) > 20
    for alert in alerts:
        for part in ("expr:", "labels: {severity: ", "summary:", "cause:", "remedy:"):
            assert alert.count(f" {part}") == 1, alert
        assert re.search(r"severity: (warning|critical)}", alert), alert


# --- counts ---


def test_a_pass_that_wrote_is_counted_with_its_time_and_size() -> None:
    passes = Passes()
    passes.passed(0.002, 3, 1, waited=0.004)
    passes.passed(0.5, 0, 0)
    passes.failed()
    found = passes.found()
    assert found[PASSES] == {("changed",): 1, ("unchanged",): 1, ("failed",): 1}
    assert found[WRITTEN] == {("put",): 3, ("drop",): 1}
    assert (passes.seconds.sum, sum(passes.seconds.counts)) == (0.002, 1)
    assert (passes.batches.sum, sum(passes.batches.counts)) == (4, 1)
    assert (passes.events.sum, sum(passes.events.counts)) == (0.004, 1)
    assert found[PASS_SECONDS] == {ONE: passes.seconds}
    assert found[BATCH] == {ONE: passes.batches}
    assert found[EVENT_SECONDS] == {ONE: passes.events}


def test_drift_is_counted_by_kind_and_by_what_became_of_the_entry() -> None:
    passes = Passes()
    passes.passed(0.1, 3, 0, drifts=[Drift(FDB, None), Drift(FDB, FDB._replace(remote=b"")), Drift(ROUTE, None)])
    counted = {labels: number for labels, number in passes.found()[DRIFT].items() if number}
    assert counted == {("fdb", "removed"): 1, ("fdb", "altered"): 1, ("route", "removed"): 1}


def test_refusals_are_counted_by_errno_whether_it_has_a_name_or_not() -> None:
    passes = Passes()
    passes.passed(0.1, 0, 0, [Refusal(Put(FDB), errno.EEXIST), Refusal(Put(ROUTE), errno.EEXIST)])
    passes.passed(0.1, 0, 0, [Refusal(Put(FDB), 9999)])
    assert passes.found()[REFUSALS] == {("EEXIST",): 2, ("9999",): 1}
    assert passes.outcomes["unchanged"] == 2
    assert sum(passes.events.counts) == 0, "nobody waited for these"


def test_requests_are_counted_by_kind_and_failures_by_reason() -> None:
    requests = Requests()
    requests.answered("read", 0.001, "")
    requests.answered("lease", 5.0, "unavailable")
    found = requests.found()
    assert found[REQUEST_FAILURES] == {("unavailable",): 1, ("tls",): 0, ("denied",): 0}
    counts = {labels[0]: sum(value.counts) for labels, value in found[REQUEST_SECONDS].items()}  # type: ignore[union-attr]
    assert counts == {"read": 1, "write": 0, "lease": 1, "login": 0, "watch": 0}


# --- text ---


def test_probes_are_counted_by_what_was_answered_and_paths_by_what_is_wrong() -> None:
    probes = metrics.Probes()
    for answers, rtt in ((7, 0.0002), (3, 0.2), (0, None)):
        probes.round(answers, rtt)
    found = probes.found() | metrics.paths_found(4, {"peer_down": 2})
    assert found[metrics.PROBES] == {("answered",): 1, ("partial",): 1, ("unanswered",): 1}
    assert sum(probes.seconds.counts) == 2
    assert found[metrics.PROBE_QUESTIONS] == {(outcome,): 0 for outcome in metrics.QUESTION_OUTCOMES}
    assert found[metrics.PATHS] == {ONE: 4}
    assert found[metrics.PATHS_FAILED] == {(cause,): 2 * (cause == "peer_down") for cause in CAUSES if cause}


def test_page_has_help_and_type_before_the_samples_in_the_order_of_the_declarations() -> None:
    assert render({PEERS: {ONE: 3}, READY: {ONE: True}, TABLE_AGE: {ONE: 1.5}, LEASE_LEFT: {ONE: math.inf}}) == (
        "# HELP overlay_agent_ready 1 while /readyz says so, else 0.\n"
        "# TYPE overlay_agent_ready gauge\n"
        "overlay_agent_ready 1\n"
        f"# HELP overlay_agent_table_age_seconds {TABLE_AGE.meaning}\n"
        "# TYPE overlay_agent_table_age_seconds gauge\n"
        "overlay_agent_table_age_seconds 1.5\n"
        f"# HELP overlay_agent_lease_remaining_seconds {LEASE_LEFT.meaning}\n"
        "# TYPE overlay_agent_lease_remaining_seconds gauge\n"
        "overlay_agent_lease_remaining_seconds +Inf\n"
        "# HELP overlay_agent_peers Hosts that this one has entries for.\n"
        "# TYPE overlay_agent_peers gauge\n"
        "overlay_agent_peers 3"
    )


def test_a_metric_without_a_value_is_left_out() -> None:
    assert render({}) == ""
    assert render({PEERS: {}}) == ""


def test_label_values_are_escaped() -> None:
    text = render({BUILD: {('1"\\', "3\n"): 1}})
    assert text.splitlines()[2] == r'overlay_agent_build_info{version="1\"\\",python="3\n"} 1'


def test_buckets_of_a_histogram_hold_all_up_to_their_bound() -> None:
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7.0):
        histogram.observe(value)
    lines = render({REQUEST_SECONDS: {("read",): histogram}}).splitlines()[2:]
    name = REQUEST_SECONDS.name
    assert lines == [
        f'{name}_bucket{{request="read",le="0.1"}} 2',
        f'{name}_bucket{{request="read",le="1"}} 3',
        f'{name}_bucket{{request="read",le="+Inf"}} 4',
        f'{name}_sum{{request="read"}} 7.65',
        f'{name}_count{{request="read"}} 4',
    ]


@given(st.lists(st.floats(0, 1e6)))
def test_buckets_never_fall_and_the_last_is_the_count(values: list[float]) -> None:
    histogram = Histogram(PASS_SECONDS.bounds)
    for value in values:
        histogram.observe(value)
    lines = render({PASS_SECONDS: {ONE: histogram}}).splitlines()[2:]
    buckets = [int(line.split()[-1]) for line in lines if "_bucket" in line]
    expected = [sum(value <= bound for value in values) for bound in (*PASS_SECONDS.bounds, math.inf)]
    assert buckets == expected
    assert lines[-1] == f"{PASS_SECONDS.name}_count {len(values)}"

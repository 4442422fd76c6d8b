"""What is measured: the metrics' declarations, the few values that loops update, and the text that Prometheus reads.

The declarations are the one table that the page `/metrics`, docs/metrics.md and the tests of alerts and dashboard are
made from. Most values are asked for when somebody reads the page; only what would be gone by then is counted in
between, by `Passes` and `Requests`. Each has one writer at a time and readers that take what they find: an addition, no
lock, no memory but the numbers.

No label has more values than its declaration says, whatever peers, leases and strangers do; so none is a peer's.
Names and text are of the format 0.0.4 (https://prometheus.io/docs/instrumenting/exposition_formats/).
"""

import errno
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from overlay.drops import CROWDED, SLOW
from overlay.firewall import COUNTERS
from overlay.model import BUILD_ORDER, Entry, Refusal
from overlay.probe import ALL, CAUSES
from overlay.tracker import Drift
from subnet_lease.table import REJECTIONS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

PREFIX = "overlay_agent_"

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"


class Family(NamedTuple):
    """One metric: its name, its type and what it means. `labels` with the values that each can have, in words.

    `bounds` are the upper ends of a histogram's buckets, in the unit of its name.
    """

    name: str
    kind: str
    meaning: str
    labels: tuple[tuple[str, str], ...] = ()
    bounds: tuple[float, ...] = ()


class Histogram:
    """Counts of values by bucket, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


Value = float | Histogram
Labels = tuple[str, ...]
Found = dict[Family, Mapping[Labels, Value]]
"""The values of families by their labels' values, in the order of the declaration."""

ONE: Labels = ()
"""The labels of a metric that has none."""

KINDS: Mapping[type[Entry], str] = {kind: kind.__name__.lower() for kind in BUILD_ORDER}
CHANGES = ("removed", "altered")
OUTCOMES = ("changed", "unchanged", "failed")
REQUESTS = ("read", "write", "lease", "login", "watch")
FAILURES = ("unavailable", "tls", "denied")
PROBE_OUTCOMES = ("answered", "partial", "unanswered")
QUESTION_OUTCOMES = ("answered", "stranger", "malformed", "limited")
LOOPS = (
    "reconciler",
    "watcher",
    "keeper",
    "config",
    "underlay",
    "checksums",
    "cache",
    "surroundings",
    "journal",
    "probes",
)

_SHORT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds: a pass takes half a millisecond for one peer, and some seconds for tens of thousands."""

_families: list[Family] = []


def _declare(
    name: str, kind: str, meaning: str, labels: Mapping[str, Iterable[str] | str] | None = None, *bounds: float
) -> Family:
    shown = tuple(
        (label, values if isinstance(values, str) else ", ".join(values)) for label, values in (labels or {}).items()
    )
    family = Family(name if name.startswith("process_") else PREFIX + name, kind, meaning, shown, bounds)
    _families.append(family)
    return family


# --- the agent ---

BUILD = _declare(
    "build_info",
    GAUGE,
    "Always 1: which agent this is.",
    {"version": "the agent's version", "python": "the interpreter's version"},
)
READY = _declare("ready", GAUGE, "1 while /readyz says so, else 0.")
LOOP_ALIVE = _declare("loop_alive", GAUGE, "1 while the loop works or sleeps as it should, else 0.", {"loop": LOOPS})
CPU = _declare("process_cpu_seconds_total", COUNTER, "CPU time that the agent has taken, in user and kernel mode.")
MEMORY = _declare("process_resident_memory_bytes", GAUGE, "Memory that the agent occupies.")
THREADS = _declare("process_threads", GAUGE, "Threads of the agent.")
DESCRIPTORS = _declare("process_open_fds", GAUGE, "File descriptors that the agent has open.")
STARTED = _declare("process_start_time_seconds", GAUGE, "When the agent was started, in seconds since 1970.")

CONNECTIONS = _declare(
    "health_connections_dropped_total",
    COUNTER,
    "Connections to this port that were ended before they had an answer: more than are served at a time, or too slow.",
    {"reason": (CROWDED, SLOW)},
)

# --- the store ---

CONNECTED = _declare(
    "store_connected", GAUGE, "1 while a watch on the leases in etcd stands, else 0; silence ends it within 20 s."
)
TABLE_AGE = _declare(
    "table_age_seconds",
    GAUGE,
    "For how long the table of peers may have been out of date: 0 while a watch stands, else since one did.",
)
REVISION = _declare("table_revision", GAUGE, "etcd's revision that the table of peers goes by.")
REQUEST_SECONDS = _declare(
    "store_request_duration_seconds",
    HISTOGRAM,
    "How long requests to etcd took, failed ones included; of a watch, until it stood.",
    {"request": REQUESTS},
    *_SHORT,
)
REQUEST_FAILURES = _declare(
    "store_request_failures_total",
    COUNTER,
    "Requests to etcd that failed: no answer, certificates, or a refusal.",
    {"reason": FAILURES},
)
LEASE_HELD = _declare(
    "lease_held", GAUGE, "1 while this host holds a lease or a reservation as far as is known, else 0."
)
LEASE_LEFT = _declare(
    "lease_remaining_seconds",
    GAUGE,
    "Until this host's lease ends if it is not renewed; +Inf for a reservation, absent while it is taken from disk.",
)
CONFIG_CHANGES = _declare(
    "config_changes_total", COUNTER, "Changes of the network configuration that were taken over while the agent runs."
)

# --- the dataplane ---

PEERS = _declare("peers", GAUGE, "Hosts that this one has entries for.")
ENTRIES = _declare("entries", GAUGE, "Entries that the peers call for.")
MISSING = _declare("entries_missing", GAUGE, "Entries that are not as they should be.")
REFUSED = _declare("entries_refused", GAUGE, "Entries that the kernel refused on the latest attempt.")
UNREACHABLE = _declare("unreachable_peers", GAUGE, "Accepted leases whose host cannot be reached from this one.")
REJECTED = _declare("rejected_leases", GAUGE, "Leases that are not believed, by what speaks against them.", {
    "reason": REJECTIONS
})  # fmt: skip
PASSES = _declare("passes_total", COUNTER, "Passes of the reconciler; one each 5 s when idle.", {"outcome": OUTCOMES})
PASS_SECONDS = _declare(
    "pass_duration_seconds",
    HISTOGRAM,
    "How long passes took that wrote something: from what was seen to the kernel's last acknowledgement.",
    None,
    *_SHORT,
)
BATCH = _declare(
    "batch_entries", HISTOGRAM, "Entries in one batch for the kernel.", None, 1, 4, 10, 40, 100, 1000, 10_000, 100_000
)
EVENT_SECONDS = _declare(
    "event_to_kernel_seconds",
    HISTOGRAM,
    "From the moment a change of leases comes off the watch until the kernel has acknowledged its entries.",
    None,
    *_SHORT,
)
WRITTEN = _declare("entries_written_total", COUNTER, "Entries written to the kernel.", {"operation": ("put", "drop")})
DRIFT = _declare(
    "drift_total",
    COUNTER,
    "Entries of ours that somebody else has removed or altered; they are put back at once.",
    {"kind": KINDS.values(), "change": CHANGES},
)
REFUSALS = _declare(
    "refusals_total",
    COUNTER,
    "Entries that the kernel refused, each attempt; absent until one is.",
    {"errno": "the kernel's, as ENOENT"},
)
LOST = _declare(
    "notifications_lost_total", COUNTER, "Times that the kernel could not tell all that had happened; all is read anew."
)
UNDERLAY_CHANGES = _declare(
    "underlay_changes_total", COUNTER, "Changes of interface, addresses or MTU of the underlay."
)

# --- packets ---

FIREWALL = _declare(
    "firewall_packets_total",
    COUNTER,
    "Packets that our firewall rules have counted: tunnel packets from strangers, packets out of tunnels with our own "
    "pods' sources or for nobody's subnet, and masqueraded ones. Absent where no table of ours is loaded.",
    {"counter": COUNTERS},
)
_DEVICE = {"device": "the agent's devices, as flannel.1"}
DEVICE_COUNTERS = {
    (way, what): _declare(f"device_{way}_{what}_total", COUNTER, meaning, _DEVICE)
    for way, went in (("receive", "come out of"), ("transmit", "gone into"))
    for what, meaning in (
        ("bytes", f"Bytes that have {went} the tunnels."),
        ("packets", f"Packets that have {went} the tunnels."),
        ("errors", f"Packets that should have {went} the tunnels and were faulty or had no way."),
        ("drops", f"Packets that should have {went} the tunnels and were dropped."),
    )
}

# --- paths ---

PROBES = _declare(
    "probes_total",
    COUNTER,
    "Rounds of probes by what came of them: all three questions answered, some, or none.",
    {"outcome": PROBE_OUTCOMES},
)
PROBE_SECONDS = _declare(
    "probe_rtt_seconds",
    HISTOGRAM,
    "Round trip times of probes, from host to host through the overlay.",
    None,
    *(0.0001, 0.00025),
    *_SHORT,
)
PATHS = _declare("paths_measured", GAUGE, "Paths to peers whose latest measurement is remembered.")
PATHS_FAILED = _declare(
    "paths_failed", GAUGE, "Paths that something is wrong with, by what it is.", {"cause": filter(None, CAUSES)}
)
PROBE_QUESTIONS = _declare(
    "probe_questions_total",
    COUNTER,
    "Probes of others: answered, from no known peer, malformed; and the times that there were more than are answered.",
    {"outcome": QUESTION_OUTCOMES},
)

FAMILIES: tuple[Family, ...] = tuple(_families)


# --- what is counted as it happens ---


class Passes:
    """What passes of the reconciler did. Written by its thread."""

    def __init__(self) -> None:
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.written = [0, 0]
        self.seconds = Histogram(PASS_SECONDS.bounds)
        self.batches = Histogram(BATCH.bounds)
        self.events = Histogram(EVENT_SECONDS.bounds)
        self.drifts: dict[Labels, int] = {(kind, change): 0 for kind in KINDS.values() for change in CHANGES}
        self.refusals: dict[str, int] = {}
        self.lost = 0

    def passed(
        self,
        seconds: float,
        puts: int,
        drops: int,
        refusals: Collection[Refusal] = (),
        drifts: Iterable[Drift] = (),
        waited: float | None = None,
    ) -> None:
        """A pass is complete. `waited`: the seconds since the first change of leases that it carried out."""
        for drift in drifts:
            self.drifts[KINDS[type(drift.want)], CHANGES[drift.found is not None]] += 1
        for refusal in refusals:
            name = errno.errorcode.get(refusal.errno, str(refusal.errno))
            self.refusals[name] = self.refusals.get(name, 0) + 1
        self.outcomes["changed" if puts or drops else "unchanged"] += 1
        self.written[0] += puts
        self.written[1] += drops
        if batch := puts + drops + len(refusals):
            self.seconds.observe(seconds)
            self.batches.observe(batch)
            if waited is not None:
                self.events.observe(waited)

    def failed(self) -> None:
        """A pass has ended early: the kernel refused what it stands on."""
        self.outcomes["failed"] += 1

    def found(self) -> Found:
        """The numbers as they are."""
        return {
            PASSES: {(outcome,): number for outcome, number in self.outcomes.items()},
            PASS_SECONDS: {ONE: self.seconds},
            BATCH: {ONE: self.batches},
            EVENT_SECONDS: {ONE: self.events},
            WRITTEN: {("put",): self.written[0], ("drop",): self.written[1]},
            DRIFT: self.drifts,
            REFUSALS: {(name,): number for name, number in self.refusals.copy().items()},
            LOST: {ONE: self.lost},
        }


class Requests:
    """What requests to the store took. Several threads make them: whoever writes sees to it that they do so in turn."""

    def __init__(self) -> None:
        self.seconds = {request: Histogram(REQUEST_SECONDS.bounds) for request in REQUESTS}
        self.failures = dict.fromkeys(FAILURES, 0)

    def answered(self, request: str, seconds: float, failure: str) -> None:
        """One of REQUESTS took so long; `failure` is one of FAILURES, empty where it succeeded."""
        self.seconds[request].observe(seconds)
        if failure:
            self.failures[failure] += 1

    def found(self) -> Found:
        """The numbers as they are."""
        return {
            REQUEST_SECONDS: {(request,): histogram for request, histogram in self.seconds.items()},
            REQUEST_FAILURES: {(reason,): number for reason, number in self.failures.items()},
        }


class Probes:
    """What was asked of peers and what they asked. Written by the probes' thread."""

    def __init__(self) -> None:
        self.rounds = dict.fromkeys(PROBE_OUTCOMES, 0)
        self.questions = dict.fromkeys(QUESTION_OUTCOMES, 0)
        self.seconds = Histogram(PROBE_SECONDS.bounds)

    def round(self, answers: int, rtt: float | None) -> None:
        """One peer was asked; `answers` as in `probe.Paths.round`, `rtt` in seconds."""
        self.rounds["answered" if answers == ALL else "partial" if answers else "unanswered"] += 1
        if rtt is not None:
            self.seconds.observe(rtt)

    def found(self) -> Found:
        """The numbers as they are."""
        return {
            PROBES: {(outcome,): number for outcome, number in self.rounds.items()},
            PROBE_SECONDS: {ONE: self.seconds},
            PROBE_QUESTIONS: {(outcome,): number for outcome, number in self.questions.items()},
        }


def paths_found(measured: int, failed: Mapping[str, int]) -> Found:
    """Of so many paths, those that have failed by cause."""
    return {PATHS: {ONE: measured}, PATHS_FAILED: {(cause,): failed.get(cause, 0) for cause in CAUSES if cause}}


# --- text ---


def render(found: Mapping[Family, Mapping[Labels, Value]]) -> str:
    """The page: each declared family that has a value, in the order of the declarations, without a last line end."""
    return "\n".join(line for family in FAMILIES if found.get(family) for line in _lines(family, found[family]))


def _lines(family: Family, values: Mapping[Labels, Value]) -> Iterator[str]:
    name = family.name
    yield f"# HELP {name} {family.meaning}"
    yield f"# TYPE {name} {family.kind}"
    for labels, value in values.items():
        named = [f'{label}="{_escaped(text)}"' for (label, _), text in zip(family.labels, labels, strict=True)]
        if not isinstance(value, Histogram):
            yield f"{name}{_braced(named)} {_number(value)}"
            continue
        counts, total, below = list(value.counts), value.sum, 0
        for bound, count in zip((*value.bounds, float("inf")), counts, strict=True):
            below += count
            bucket = [*named, f'le="{_number(bound)}"']
            yield f"{name}_bucket{_braced(bucket)} {below}"
        yield f"{name}_sum{_braced(named)} {_number(total)}"
        yield f"{name}_count{_braced(named)} {below}"


def _braced(named: Sequence[str]) -> str:
    return f"{{{','.join(named)}}}" if named else ""


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if value == float("inf"):
        return "+Inf"
    return str(int(value)) if value == int(value) else repr(float(value))


# --- for people ---


def reference() -> str:
    """The text of docs/metrics.md."""
    rows = [_INTRODUCTION, "| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
    for family in FAMILIES:
        labels = "; ".join(f"`{label}`: {values}" for label, values in family.labels)
        rows.append(f"| `{family.name}` | {family.kind} | {labels} | {family.meaning} |")
    return "\n".join([*rows, _USE])


_INTRODUCTION = """\
# Metrics and health

<!-- Generated by `python -m overlay.reference metrics`; edit overlay/metrics.py instead. -->

With `--healthz-port PORT` the agent answers on `http://127.0.0.1:PORT`, from its start on; `--healthz-ip` takes another
address. Whoever reaches that address can read all of it: there are no secrets in it, and nothing can be changed.

| page | 200 means |
| --- | --- |
| `/healthz` | every loop of the agent works, or sleeps as it should; else those that do not are named |
| `/readyz` | dataplane complete, lease held, no cause that is grave, table no older than `--readyz-max-age`; else why |
| `/metrics` | always; the metrics below, in Prometheus' text format |

What `/healthz` finds dead, a restart mends, which harms no packet: use it as a liveness check. `/readyz` is none: while
etcd is away packets are forwarded as before, and a restart would not help. Entries that the kernel refuses, leases that
are rejected and peers that cannot be reached are counted in its text and leave the host ready: no single peer can make
all others unready.

While the agent waits for etcd at its start, `/metrics` has only the metrics of the process and its requests.
"""

_USE = """
Labels have only the values named here. No metric has a label for a peer: `overlay-agent leases` and the log name them.

`deploy/prometheus/overlay-agent.rules.yml` has alerts, each with its cause and what to do, and
`deploy/grafana/overlay-agent.json` is a dashboard. Where the agents listen on an address that Prometheus reaches:

```yaml
rule_files: [overlay-agent.rules.yml]
scrape_configs:
  - job_name: overlay-agent
    static_configs:
      - targets: ["10.0.0.21:10256", "10.0.0.22:10256"]
```
"""

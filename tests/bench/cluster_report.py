"""What was measured of many agents on one etcd, as sections of docs/benchmarks.md and as the tables of docs/scale.md.

No number is typed in here but those that say what is projected: the size of the cluster, its rates of change, and the
hardware that an operator might give to etcd.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from overlay.options import Options
from subnet_lease.config_watch import EVERY_S as CONFIG_S
from subnet_lease.watcher import RELIST_S
from tests.bench.cluster_load import KEEPALIVE_S

HOSTS = 15_000
MEMBERS = (1, 3, 5)
CHURN = (1, 50)
"""Changes a second."""
CORES = 8
"""Of one etcd member, in the projection."""
LINK_GBIT_S = 10
"""Of one etcd member, in the projection."""
PROGRESS_S = 600.0
"""etcd's default for --experimental-watch-progress-notify-interval."""
CALL_DEADLINE_S = 5.0
"""`timeout` of `subnet_lease.etcd.EtcdStore`."""

MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
"""A table in a document: from one comment to the other."""


class Units:
    """What one of each costs etcd, out of the figures. Times are seconds of CPU."""

    def __init__(self, figures: dict[str, Any]) -> None:
        load, simulated = figures["load"], figures["simulated"]
        self.leases: int = load["leases"]
        self.event = _event(load, "watches")
        self.event_tls = _event(load, "tls")
        self.event_agents = _event_to_agents(load, simulated)
        self.event_dearest = max(self.event, self.event_tls, self.event_agents)
        last = load["watches"]["levels"][-1]
        self.event_burst = _event_in_burst(load, "watches", last)
        self.event_bytes: float = last["bytes"] / load["changes"] / last["streams"]
        self.watch_mb = _grown(load["watches"], "rss_mb")
        self.watch_tls_mb = _grown(load["tls"], "rss_mb")
        self.watch_files = _grown(load["watches"], "files")
        self.open, self.open_tls = (
            sum(row["open_cpu_s"] for row in load[kind]["levels"]) / load[kind]["levels"][-1]["streams"]
            for kind in ("watches", "tls")
        )
        read = load["reads"]["kinds"]["first linearizable"]
        self.read: float = median(read["cpu_s"]) / self.leases
        self.read_bytes: float = read["bytes"] / self.leases
        self.renewal: float = load["renewal_cpu_s"]
        self.first_lease: float = load["first_lease_cpu_s"]
        watches = load["watches"]
        self.ping: float = (watches["pings_cpu_s"] - watches["silent_cpu_s"]) / watches["pings"]
        self.progress: float = load["progress_cpu_s"]
        self.base_mb: float = load["watches"]["levels"][0]["rss_mb"]


def _event(load: dict[str, Any], kind: str) -> float:
    """etcd's CPU seconds for one event on one watch, over what the change itself takes."""
    nothing, last = load[kind]["levels"][0], load[kind]["levels"][-1]
    return float((last["cpu_s"] - nothing["cpu_s"]) / load["changes"] / last["streams"])


def _event_in_burst(load: dict[str, Any], kind: str, row: dict[str, Any]) -> float:
    """The same for one of many changes at once, at one of the numbers of watches; as little as nothing."""
    nothing = load[kind]["levels"][0]["burst"]
    return float(max(row["burst"]["cpu_s"] - nothing["cpu_s"], 0) / load["burst"] / row["streams"])


def _event_to_agents(load: dict[str, Any], part: dict[str, Any]) -> float:
    """The same with agents at the other end: grpc answers every event with frames of its own."""
    alone = load["watches"]["levels"][0]["cpu_s"] / load["changes"]
    return float((part["joins"]["etcd_cpu_s"] - alone) / part.get("agents", part.get("hosts")))


def _grown(part: dict[str, Any], field: str) -> float:
    """By how much one watch makes something grow."""
    nothing, last = part["levels"][0], part["levels"][-1]
    return float((last[field] - nothing[field]) / last["streams"])


# --- docs/benchmarks.md ------------------------------------------------------------------------------------------


def sections(figures: dict[str, Any]) -> list[str]:
    """The sections of docs/benchmarks.md: headings, paragraphs and tables."""
    real, simulated, load = figures["real"], figures["simulated"], figures["load"]
    crowd = load["crowd"]
    return [
        "## Many agents on one etcd",
        f"*Real*: {real['hosts']} agents, each with a network namespace and a kernel of its own. *Simulated*: "
        f"{simulated['agents']} agents among {simulated['leases']:,} more leases; the kernel edge is its stateful "
        "twin, everything else is real: a connection each, keeper, watcher, reconciler. All agents and etcd share one "
        f"machine of {figures['machine']['processor'].partition(',')[0]}, so times are the sum of all hosts' work; on "
        "hosts of their own only etcd's part is shared. *Last ready* counts from the first start until every kernel "
        "holds the entries of all others, which was checked entry by entry at the end. docs/scale.md projects these "
        f"figures to {HOSTS:,} hosts.",
        _table(
            (
                *("start", "agents", "each agent ready, s: median / 99th percentile", "last ready, s"),
                *("agents' CPU s, each", "etcd's CPU s, all", "etcd's memory, MB"),
            ),
            [
                *(
                    _start_row(f"real, {name}", real["hosts"], real[kind], real["spread_s"])
                    for kind, name in (
                        ("at_once", "all at once"),
                        ("spread", "over {} s"),
                        ("again", "restart, all at once"),
                    )
                ),
                *(
                    _start_row(f"simulated, {name}", simulated["agents"], simulated[kind], simulated["spread_s"])
                    for kind, name in (("at_once", "all at once"), ("spread", "over {} s"))
                ),
            ],
        ),
        f"One host joins, in milliseconds from the start of the put (median / 99th percentile of "
        f"{real['joins']['count']} and {simulated['joins']['count']} joins): until the first and until the last of all "
        "other hosts has its route. CPU is for one change, joins and leaves alike.",
        _table(
            ("agents", "first", "last", "leave, last", "etcd's CPU, ms", "CPU of one agent, ms"),
            [
                _join_row("real", real["hosts"], real["joins"]),
                _join_row("simulated", simulated["agents"], simulated["joins"]),
            ],
        ),
        "## What etcd spends on watches",
        f"Bare clients, each watch on a connection of its own, {load['leases']:,} leases in the table. One change "
        "after the other: etcd's CPU for one event on one watch, and the time from the start of the put until the last "
        f"watch has it. Then {load['burst']} changes with no wait between them; *given up* are puts that etcd answered "
        "with a timeout, for it tells its watches while it writes. The clients take their share of the processors.",
        _table(
            (
                "watches",
                "memory, MB",
                "CPU to open one, ms",
                "CPU an event, µs",
                "last watch has it, ms",
                "bytes an event",
                f"{load['burst']} at once: CPU an event, µs",
                "last watch has all, ms",
                "given up",
            ),
            [
                *_watch_rows("{:,}", load, "watches"),
                *_watch_rows("{:,} over TLS", load, "tls"),
                *_watch_rows("{:,} through `etcd grpc-proxy`", load, "proxy"),
            ],
        ),
        "## What etcd spends on reads",
        f"All {load['leases']:,} leases in {load['reads']['pages']} pages at one revision, medians; on a single "
        "member, where asking the leader takes no network.",
        _table(
            ("pages", "etcd's CPU, ms", "time, ms", "bytes"),
            [
                (kind, _ms(median(each["cpu_s"])), _ms(median(each["wall_s"])), f"{each['bytes']:,}")
                for kind, each in load["reads"]["kinds"].items()
            ],
        ),
        f"{crowd['readers']} such reads at once: all done after {crowd['wall_s']:.1f} s and {crowd['cpu_s']:.1f} CPU "
        f"s; a page took {_ms(crowd['page_s']['p50'])} ms in the median and {_ms(crowd['page_s']['max'])} ms at most.",
    ]


def _start_row(name: str, count: int, start: dict[str, Any], spread_s: float) -> tuple[str, ...]:
    each = start["each_s"]
    return (
        name.format(f"{spread_s:g}"),
        str(count),
        f"{each['p50']:.2f} / {each['p99']:.2f}",
        f"{start.get('complete_s', start['last_s']):.2f}",
        f"{start['agents_cpu_s'] / count:.2f}",
        f"{start['etcd_cpu_s']:.2f}",
        f"{start['etcd_rss_mb']:.0f}",
    )


def _join_row(name: str, count: int, joins: dict[str, Any]) -> tuple[str, ...]:
    times = (f"{_ms(joins[key]['p50'])} / {_ms(joins[key]['p99'])}" for key in ("first_s", "last_s", "leave_last_s"))
    return f"{count} {name}", *times, _ms(joins["etcd_cpu_s"]), _ms(joins["agents_cpu_s"] / count)


def _watch_rows(name: str, load: dict[str, Any], kind: str) -> Iterable[tuple[str, ...]]:
    nothing, *levels = load[kind]["levels"]
    before = 0
    for row in levels:
        deliveries = load["changes"] * row["streams"]
        yield (
            name.format(row["streams"]),
            f"{row['rss_mb']:.0f}",
            f"{1000 * row['open_cpu_s'] / (row['streams'] - before):.2f}",
            _us(max(row["cpu_s"] - nothing["cpu_s"], 0) / deliveries),
            f"{_ms(row['last_s']['p50'])}",
            f"{row['bytes'] / deliveries:.0f}",
            _us(_event_in_burst(load, kind, row)),
            _ms(row["burst"]["last_s"]),
            str(row["burst"]["given_up"]),
        )
        before = row["streams"]


# --- docs/scale.md -----------------------------------------------------------------------------------------------


def projection(figures: dict[str, Any]) -> dict[str, str]:
    """The tables of docs/scale.md by name."""
    units = Units(figures)
    return {
        "origin": _table(("what", "value"), figures["machine"].items()),
        "units": _units(figures, units),
        "standing": _standing(units),
        "churn": _churn(units),
        "steady": _steady(units),
        "once": _once(units),
        "crowd": _crowd(figures["load"]["crowd"]),
    }


def write_tables(document: Path, figures: dict[str, Any]) -> None:
    """Replace what stands between `<!-- table: NAME -->` and `<!-- end -->` in a document."""
    tables = projection(figures)
    text = MARKED.sub(lambda found: f"{found[1]}\n{tables[found[2]]}\n\n{found[3]}", document.read_text())
    document.write_text(text)


def _units(figures: dict[str, Any], units: Units) -> str:
    load = figures["load"]
    proxy = load["proxy"]["levels"]
    real = _event_to_agents(load, figures["real"])
    proxy_event = (proxy[-1]["also_cpu_s"] - proxy[0]["also_cpu_s"]) / load["changes"] / proxy[-1]["streams"]
    proxy_kb = 1000 * (proxy[-1]["also_rss_mb"] - proxy[0]["also_rss_mb"]) / proxy[-1]["streams"]
    # Less than what one change differs from another may come out below nothing.
    behind = max(proxy[-1]["cpu_s"] - proxy[0]["cpu_s"], 0) / load["changes"]
    return _table(
        ("sign", "one of", "costs etcd"),
        [
            ("m", "watch: memory, with its connection", f"{1000 * units.watch_mb:.0f} kB"),
            ("", "the same over TLS", f"{1000 * units.watch_tls_mb:.0f} kB"),
            ("f", "watch: open files", f"{units.watch_files:.0f}"),
            ("o", "watch: CPU to open it, with its connection", f"{_us(units.open)} µs"),
            ("o'", "the same over TLS", f"{_us(units.open_tls)} µs"),
            ("", "event on one watch: CPU, bare client", f"{_us(units.event)} µs"),
            ("", "the same over TLS", f"{_us(units.event_tls)} µs"),
            ("", f"the same to {figures['real']['hosts']} real agents", f"{_us(real)} µs"),
            ("", f"the same to {figures['simulated']['agents']} simulated agents", f"{_us(units.event_agents)} µs"),
            ("e", "event: CPU, the dearest of these", f"{_us(units.event_dearest)} µs"),
            ("e'", f"event: CPU, {load['burst']} changes at once", f"{_us(units.event_burst)} µs"),
            ("b", "event: bytes, HTTP/2 frames included", f"{units.event_bytes:.0f}"),
            ("r", "lease in a full read: CPU", f"{_us(units.read)} µs"),
            ("R", "lease in a full read: bytes", f"{units.read_bytes:.0f}"),
            ("k", "renewal, alone: CPU", f"{_us(units.renewal)} µs"),
            ("g", "first lease of a host, alone: CPU of grant and transaction", f"{_us(units.first_lease)} µs"),
            ("p", "keepalive ping: CPU", f"{_us(units.ping)} µs"),
            ("n", "progress notification, alone: CPU", f"{_us(units.progress)} µs"),
            ("", f"change, with {proxy[-1]['streams']:,} watches behind a proxy: CPU over none", f"{_us(behind)} µs"),
            ("", "the proxy itself, for one event on one watch", f"{_us(proxy_event)} µs"),
            ("", "the proxy itself, memory for one watch", f"{proxy_kb:.0f} kB"),
        ],
    )


def _standing(units: Units) -> str:
    rows = []
    for members in MEMBERS:
        watches = HOSTS / members
        memory = units.base_mb + watches * max(units.watch_mb, units.watch_tls_mb)
        rows.append((str(members), f"{watches:,.0f}", f"{watches * units.watch_files:,.0f}", f"{memory / 1000:.1f} GB"))
    return _table(("members", "watches on each: H/M", "open files: f H/M", "memory: the table and m H/M"), rows)


def _churn(units: Units) -> str:
    rows = []
    for rate in CHURN:
        events = rate * HOSTS
        cores = events * units.event_burst, events * units.event_dearest
        bits = 8 * events * units.event_bytes / 1e6
        rows.append(
            (
                str(rate),
                f"{events:,}",
                f"{bits:,.0f} Mbit/s",
                _range(cores, digits=2),
                *(_range([each / members for each in cores], digits=2) for members in MEMBERS[1:]),
            )
        )
    heads = (f"of each of {members}" for members in MEMBERS[1:])
    return _table(("changes/s: c", "events/s: c H", "8 b c H", "cores busy: e' c H to e c H", *heads), rows)


def _steady(units: Units) -> str:
    usual = Options()
    renewal_s = usual.subnet_lease_ttl - usual.subnet_lease_renew_margin
    read, size = HOSTS * units.read, HOSTS * units.read_bytes
    rows = []
    for name, formula, period_s, cpu_s, octets in (
        ("keepalive pings", "H p / 10 s", KEEPALIVE_S, units.ping, 0.0),
        ("progress notifications", "H n / 600 s", PROGRESS_S, units.progress, 0.0),
        ("renewals", "H k / 23 h", renewal_s, units.renewal, 0.0),
        ("reads of the configuration, at most", "H k / 60 s", CONFIG_S, units.renewal, 0.0),
        ("relists", "H (r H) / 4 h", RELIST_S, read, size),
    ):
        rate = HOSTS / period_s
        rows.append(
            (
                name,
                formula,
                f"{rate:,.2f}",
                f"{rate * cpu_s:.3f}" if rate * cpu_s >= 0.0005 else "< 0.001",
                f"{8 * rate * octets / 1e6:.0f}" if octets else "",
            )
        )
    return _table(("load", "that is", "a second", "cores busy, all members", "Mbit/s"), rows)


def _once(units: Units) -> str:
    open_s = max(units.open, units.open_tls)
    read_s, read_bytes = HOSTS * units.read, HOSTS * units.read_bytes
    restart_s, restart_bytes = HOSTS * (read_s + open_s + units.renewal), HOSTS * read_bytes
    first_s, first_bytes = HOSTS * (read_s / 2 + open_s + units.first_lease), HOSTS * read_bytes / 2
    pairs = HOSTS * (HOSTS - 1)
    rows = []
    for name, formula, cpu_s, events, octets in (
        ("all watches come back", "H o'", HOSTS * open_s, 0.0, 0.0),
        ("all agents restart, leases alive", "H (r H + o' + k)", restart_s, 0.0, restart_bytes),
        ("all hosts come for the first time", "H (r H/2 + o' + g) + e H (H-1)/2", first_s, pairs / 2, first_bytes),
        ("all restart, if each put its key anew", "as the second + e H (H-1)", restart_s, pairs, restart_bytes),
    ):
        octets += events * units.event_bytes
        cpu = cpu_s + events * units.event_burst, cpu_s + events * units.event_dearest
        seconds = [max(each / CORES, 8 * octets / LINK_GBIT_S / 1e9) for each in cpu]
        spans = (_range([each / members for each in seconds]) for members in MEMBERS)
        rows.append((name, formula, _range(cpu), f"{octets / 1e9:,.0f}", *spans))
    heads = (f"s, {members} member{'s' if members > 1 else ''}" for members in MEMBERS)
    return _table(("event", "etcd's CPU s", "that is", "GB sent", *heads), rows)


def _crowd(crowd: dict[str, Any]) -> str:
    slowest = crowd["page_s"]["max"]
    return _table(
        ("what", "value"),
        [
            ("full reads at once, measured", str(crowd["readers"])),
            ("slowest page among them, measured", f"{slowest:.2f} s"),
            ("deadline of a call", f"{CALL_DEADLINE_S:g} s"),
            (
                "reads at once at which the slowest page takes that long, computed",
                f"{crowd['readers'] * CALL_DEADLINE_S / slowest:,.0f}",
            ),
        ],
    )


def _range(ends: Sequence[float], digits: int = 0) -> str:
    low, high = (f"{end:,.{digits}f}" for end in ends)
    return low if low == high else f"{low} to {high}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}" if seconds < 1e-5 else f"{1e6 * seconds:,.0f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

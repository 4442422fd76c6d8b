"""A host joins a cluster of N others: from process start to all entries in the kernel, against the kernel alone,
iproute2 and pyroute2, with the stages of the way and the growth with N.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from statistics import median

from subnet_lease.model import Lease
from tests.bench import contenders
from tests.bench.contenders import ROOT
from tests.bench.peers import SMALL
from tests.bench.place import compare, fresh_place
from tests.bench.report import (
    BUDGET_FULL_MB,
    BUDGET_IDLE_MB,
    BUDGET_OVER_KERNEL_S,
    BUDGET_RATIO,
    BUDGET_SMALL_S,
    FLANNELD_MB,
    FLANNELD_SMALL_S,
    FLANNELD_START,
    FULL,
    SLOPE_LINEAR,
    Figures,
    slope,
    table,
)
from tests.bench.staged import BESIDE, KERNEL
from tests.bench.testbed import Samples, Testbed, note

PYROUTE2_MOST = 1000
"""Peers beyond which pyroute2 is not measured: its cost is linear, and tens of seconds by then."""

PLAIN_MOST = 15000
"""Peers beyond which plain gateways are not measured: the kernel's cost is quadratic, and seconds by then."""

CLOCKS = ("wall", "cpu")


def measure(bed: Testbed) -> Samples:
    """Every contender at every size, taking turns."""
    samples: Samples = {}
    for number in range(1, bed.options.repeat + 1):
        for size in (SMALL, *bed.options.sizes):
            bed.say(f"start, run {number} of {bed.options.repeat}: {size} peers")
            with bed.host(size) as host, host.agent() as agent:
                host.compare()
                note(samples, "agent", size, dataclasses.asdict(agent.start))
            note(samples, "stages", size, stages(bed, size))
            if size != SMALL:
                _rivals(samples, bed, size, bed.peers(size))
    return samples


def stages(bed: Testbed, size: int) -> dict[str, dict[str, float]]:
    """Wall-clock and CPU seconds of one start by stage, `rest` included, and of the whole. See `staged`."""
    file = bed.directory / "staged.json"
    with bed.host(size) as host, host.agent(str(ROOT / "tests/bench/staged.py"), str(file)) as agent:
        host.compare()
        found = json.loads(file.read_text())
        began_ended = {
            "wall": [at - agent.started for at in (found["began"][0], found["ended"][0])],
            "cpu": [found["began"][1], found["ended"][1]],
        }
    result = {}
    for clock, kind in enumerate(CLOCKS):
        began, ended = began_ended[kind]
        seconds = {"interpreter": began}
        seconds.update({stage: found["stages"][stage][clock] for stage in STAGES if stage in found["stages"]})
        # While it works beside us, its wall-clock time is no part of the whole; of CPU seconds there are as many.
        beside = found["stages"].get(BESIDE, (0.0, 0.0))[clock]
        rest = ended - sum(seconds.values()) - (beside if kind == "cpu" else 0.0)
        seconds[KERNEL] = seconds.get(KERNEL, 0.0) + beside
        result[kind] = {**seconds, "rest": rest, WHOLE: ended}
    return result


def _rivals(samples: Samples, bed: Testbed, size: int, peers: Sequence[Lease]) -> None:
    for name, ack_each in (("kernel", False), ("kernel_acks", True)):
        with fresh_place(bed.hub) as place:
            note(samples, name, size, contenders.kernel_alone(place, peers, ack_each=ack_each))
            compare(place, peers, nexthops=True)
    for name, nexthops in (("iproute2", False), ("iproute2_nexthops", True)):
        if nexthops or size <= PLAIN_MOST:
            with fresh_place(bed.hub) as place:
                seconds = contenders.iproute2(place, peers, bed.directory, nexthops=nexthops)
                note(samples, name, size, seconds)
                compare(place, peers, nexthops=nexthops)
    if size <= PYROUTE2_MOST:
        with fresh_place(bed.hub) as place:
            note(samples, "pyroute2", size, contenders.pyroute2(place, peers))
            compare(place, peers, nexthops=False)


STAGES = {
    "interpreter": "from fork to Python's first line of ours",
    "imports": "modules, first uses included",
    "etcd read": "configuration and leases, gRPC's and protobuf's work included",
    "choose": "a free subnet",
    "decode": "JSON, checks of each lease, conflicts between leases",
    "desired": "the entries that the leases call for",
    "encode": "the gap, its order, the messages",
    KERNEL: "`send` and `recv` of the netlink sockets: the kernel's own work, most of it while messages are made",
    "bookkeeping": "what the kernel holds: dumps, notifications, answers",
    "rest": "all else: options, sockets, the device, threads waiting for one another",
}
"""Stage -> what it is, in the order of a start."""

WHOLE = "whole"


def sections(figures: Figures) -> list[str]:
    return [
        *_start(figures),
        *_stages(figures),
        *_growth(figures),
        *_iproute2(figures),
        *_memory(figures),
        *_codec(figures),
    ]


def _sizes(figures: Figures) -> list[int]:
    return figures.sizes("kernel")


def _ready(figures: Figures, size: int) -> float:
    return figures.spread("agent", size, "ready_s").median


def _start(figures: Figures) -> list[str]:
    rows = []
    small = figures.spread("agent", SMALL, "ready_s")
    verdict = figures.verdict(f"start with {SMALL} peers", small.median, BUDGET_SMALL_S, "s")
    cpu = figures.spread("agent", SMALL, "cpu_s").text()
    rows.append((f"{SMALL:,}", small.text(), cpu, "", verdict, f"{FLANNELD_SMALL_S} (to subnet.env)"))
    for size in _sizes(figures):
        kernel = figures.spread("kernel", size)
        over = _ready(figures, size) - kernel.median
        cell = f"{over:.2f} s"
        if size == FULL:
            cell = figures.verdict(f"start with {size:,} peers, over the kernel", over, BUDGET_OVER_KERNEL_S, "s")
        theirs = "{} ({} CPU)".format(*FLANNELD_START[size]) if size in FLANNELD_START else ""
        ready, cpu = figures.spread("agent", size, "ready_s"), figures.spread("agent", size, "cpu_s").text()
        rows.append((f"{size:,}", ready.text(), cpu, kernel.text(3), f"{cell} over the kernel", theirs))
    return [
        "## From process start to all entries in the kernel",
        "A host joins: its kernel is empty, the leases of its peers are in etcd. Counted from the fork of the Python "
        "interpreter to `READY=1`, which the agent sends after its first full pass; Python has compiled everything in "
        "a start before. Each peer takes five entries: its address in the firewall's set, FDB, neighbour, nexthop, "
        "route. *Kernel alone* sends the same messages, made beforehand, over sockets nobody watches: what no agent "
        "can save. "
        f"{len(figures.all('agent', SMALL))} repetitions. Budgets: at most {BUDGET_SMALL_S} s with {SMALL + 1} hosts; "
        f"with {FULL:,} peers at most {BUDGET_OVER_KERNEL_S:g} s more than the kernel alone.",
        table(("peers", "agent", "agent's CPU seconds", "kernel alone", "budget", "flanneld v0.28.9"), rows),
    ]


def _stages(figures: Figures) -> list[str]:
    sizes = figures.sizes("stages")
    every = {size: figures.all("stages", size) for size in sizes}

    def cell(size: int, stage: str) -> str:
        """Median wall-clock and CPU seconds of one stage, or of all together if none is named."""
        both = (median(each[clock].get(stage, 0) for each in every[size]) for clock in CLOCKS)
        return " / ".join(f"{seconds:.3f}" for seconds in both)

    rows = [(stage, meaning, *(cell(size, stage) for size in sizes)) for stage, meaning in STAGES.items()]
    rows.append((WHOLE, "", *(cell(size, WHOLE) for size in sizes)))
    return [
        "## Where the time of a start goes",
        "Wall-clock / CPU seconds in starts of their own, of an agent with stop-watches around these steps "
        "(`tests/bench/staged.py`), which cost a little. A stage does not include others within it. CPU is that of the "
        "thread at work; gRPC's own threads are in the rest. Medians stage by stage, so they need not add up to the "
        "whole.",
        table(("stage", "work", *(f"{size:,} peers" for size in sizes)), rows),
    ]


def _growth(figures: Figures) -> list[str]:
    sizes = _sizes(figures)
    if len(sizes) < 2:
        return []

    def least(size: int) -> float:
        return figures.spread("agent", size, "ready_s").least

    linear: dict[str, Callable[[int], float]] = {
        "agent, whole": least,
        f"agent, less what it takes with {SMALL} peers": lambda size: least(size) - least(SMALL),
    }
    others = {
        "agent, passes alone": ("agent", "pass_s"),
        "kernel alone": ("kernel", ""),
        "iproute2, plain": ("iproute2", ""),
        "iproute2, nexthop objects": ("iproute2_nexthops", ""),
    }
    rows = []
    for name, seconds in linear.items():
        # Among few peers noise may leave nothing of the difference.
        points = [(size, seconds(size)) for size in sizes if seconds(size) > 0]
        if len(points) < 2:
            continue
        found = slope(points)
        fitted = _listed([size for size, _ in points])
        rows.append((name, figures.verdict(f"growth: {name}", found, SLOPE_LINEAR, ""), fitted))
        if found > SLOPE_LINEAR:
            figures.failed.append(f"growth: {name}: slope {found:.2f}, over {SLOPE_LINEAR}")
    for name, (what, field) in others.items():
        measured = [size for size in figures.sizes(what) if size in sizes]
        if len(measured) > 1:
            found = slope([(size, figures.spread(what, size, field).least) for size in measured])
            rows.append((name, f"{found:.2f}", _listed(measured)))
    return [
        "## Growth",
        "The slope of the logarithm of the time over that of the number of peers: 1 is linear, 2 quadratic. Of the "
        "least times, which other work on the machine disturbs least. Budget: "
        f"linear, at most {SLOPE_LINEAR}; the benchmark fails if it is missed.",
        table(("time", "slope", "fitted to peers"), rows),
    ]


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(f"{size:,}" for size in sizes)


def _iproute2(figures: Figures) -> list[str]:
    rows = []
    for size in _sizes(figures):
        passes, hops = figures.spread("agent", size, "pass_s"), figures.spread("iproute2_nexthops", size)
        against = f"{passes.median / hops.median:.2f} x"
        plain, cells = "", ["", ""]
        if size in figures.sizes("iproute2"):
            spread = figures.spread("iproute2", size)
            plain = spread.text()
            ratio = passes.median / spread.median
            cells = [f"{ratio:.2f} x", f"{_ready(figures, size) / spread.median:.2f} x"]
            if size in BUDGET_RATIO:
                name = f"pass against iproute2 with {size:,} peers"
                cells[0] = figures.verdict(name, ratio, BUDGET_RATIO[size], "x")
        rows.append((f"{size:,}", passes.text(), plain, *cells, hops.text(), against))
    return [
        "## Against iproute2 fed from ready-made files",
        "iproute2 finds all commands in two files: `bridge -batch` for the FDB, then `ip -batch` for neighbours and "
        "routes; what both take on empty files, their start, is taken off. Its like is the agent's *pass*: the entries "
        "are in memory, and it compares, encodes, writes and books them. The *whole* has the interpreter's start, the "
        "lease, reading and checking the leases in it too. *Plain*: `ip route replace SUBNET via GATEWAY dev flannel.1 "
        "onlink`, as one would write it; the kernel's cost of that is quadratic in the number of peers, so it is not "
        f"measured beyond {PLAIN_MOST:,}. *Nexthop objects*: the routes as the agent makes them. Budgets of "
        "the pass against plain: "
        + ", ".join(f"at most {ratio:g} x at {size:,} peers" for size, ratio in BUDGET_RATIO.items())
        + ".",
        table(
            (
                *("peers", "agent's pass", "plain", "pass / plain", "whole / plain"),
                *("nexthop objects", "pass / nexthop objects"),
            ),
            rows,
        ),
    ]


def _memory(figures: Figures) -> list[str]:
    rows = []
    budgets = {SMALL: BUDGET_IDLE_MB, FULL: BUDGET_FULL_MB}
    for size in figures.sizes("agent"):
        peak = figures.spread("agent", size, "peak_mb").median
        resident = figures.spread("agent", size, "resident_mb").median
        cell = f"{resident:.1f} MB"
        if size in budgets:
            cell = figures.verdict(f"resident memory with {size:,} peers", resident, budgets[size], "MB", 1)
        rows.append((f"{size:,}", cell, f"{peak:.1f} MB"))
    return [
        "## Memory",
        "The resident set (VmRSS, libraries included) at `READY=1` of a first start, and the largest up to then "
        f"(VmHWM); 1 MB is 1,000,000 bytes. Budgets: {BUDGET_IDLE_MB:g} MB among few peers, {BUDGET_FULL_MB:g} MB with "
        f"{FULL:,}; *Idle* below has what remains. flanneld v0.28.9: "
        "{} MB when idle, {} MB at its peak with 15,000 peers.".format(*FLANNELD_MB),
        table(("peers", "at READY=1", "peak"), rows),
    ]


def _codec(figures: Figures) -> list[str]:
    rows = []
    for size in _sizes(figures):
        kernel, acks = figures.spread("kernel", size), figures.spread("kernel_acks", size)
        theirs = figures.spread("pyroute2", size) if size in figures.sizes("pyroute2") else None
        share = median(sample["wall"]["kernel"] for sample in figures.all("stages", size))
        rows.append(
            (
                f"{size:,}",
                kernel.text(3),
                f"{share:.3f}",
                acks.text(3),
                f"{acks.median / kernel.median:.1f} x",
                theirs.text() if theirs else "",
                f"{theirs.median / kernel.median:.0f} x" if theirs else "",
            )
        )
    return [
        "## Why there is a codec of our own, and what acknowledgements cost",
        "*Kernel alone* as above: refusals are answered one by one, success by one acknowledgement at the end of a "
        "batch. *In the agent's start*: what its sockets took of it, with the monitor listening. *Acknowledged each*: "
        "the same messages, each with an acknowledgement of its own. *pyroute2*: one call of `IPRoute` for each FDB, "
        f"neighbour and route entry, import and socket not counted, up to {PYROUTE2_MOST:,} peers.",
        table(
            (
                *("peers", "kernel alone", "in the agent's start", "acknowledged each", "ratio"),
                *("pyroute2", "pyroute2 / kernel alone"),
            ),
            rows,
        ),
    ]

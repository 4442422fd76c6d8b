"""A thousand hosts join at once and leave at once, beside an agent with a full table."""

from collections.abc import Callable
from typing import Any

from subnet_lease.model import Lease
from tests.bench.agents import Agent
from tests.bench.monitor import NEIGH, ROUTE, Monitor
from tests.bench.peers import TXN_PUTS, delete_all, newcomers, put_all
from tests.bench.place import device_index
from tests.bench.report import BUDGET_BURST_S, FLANNELD_BURST_S, FULL, Figures, Spread, table
from tests.bench.testbed import Host, Samples, Testbed, note

HOSTS = 1000

KINDS = {"joins": "1,000 joins", "leaves": "1,000 leaves"}


def measure(bed: Testbed) -> Samples:
    """Joins, then leaves, once in every repetition."""
    samples: Samples = {}
    crowd = newcomers(HOSTS)
    for number in range(1, bed.options.repeat + 1):
        size = bed.options.full
        bed.say(f"bursts, run {number} of {bed.options.repeat}: {size} peers")
        with bed.host(size) as host, host.agent() as agent:
            joins = _burst(
                *(bed, host, agent, put_all, crowd, ROUTE),
                lambda monitor, since: monitor.wait_all([peer.subnet for peer in crowd], since),
            )
            host.compare(crowd)
            leaves = _burst(
                *(bed, host, agent, delete_all, crowd, NEIGH),
                # The FDB entry is the last to go.
                lambda monitor, since: monitor.wait_all(
                    [(monitor.device, peer.attrs.vtep.mac) for peer in crowd if peer.attrs.vtep], since, gone=True
                ),
            )
            host.compare()
        note(samples, "bursts", size, {"joins": joins, "leaves": leaves})
    return samples


def _burst(
    bed: Testbed,
    host: Host,
    agent: Agent,
    write: Callable[[str, str, list[Lease]], tuple[float, float]],
    crowd: list[Lease],
    group: int,
    last: Callable[[Monitor, float], float],
) -> dict[str, Any]:
    lines, cpu = len(agent.events()), agent.cpu_s
    with Monitor(host.place, device_index(host.place), group) as monitor:
        started, answered = write(bed.etcd.endpoint, host.prefix, crowd)
        done = last(monitor, started)
    passes = agent.passes(lines, 4 * len(crowd))
    return {
        "writing_s": answered - started,
        "after_s": done - answered,
        "passes": len(passes),
        "cpu_s": agent.cpu_s - cpu,
    }


def sections(figures: Figures) -> list[str]:
    rows = []
    for size in figures.sizes("bursts"):
        for kind, name in KINDS.items():
            samples = figures.all("bursts", size, kind)
            after = Spread.of([each["after_s"] for each in samples])
            verdict = ""
            if size == FULL and kind == "joins":
                verdict = figures.verdict(f"{name} with {size:,} peers", after.median, BUDGET_BURST_S, "s", 3)
            rows.append(
                (
                    f"{size:,}",
                    name,
                    Spread.of([each["writing_s"] for each in samples]).text(3),
                    after.text(3),
                    verdict,
                    Spread.of([each["passes"] for each in samples]).text(0),
                    Spread.of([each["cpu_s"] for each in samples]).text(3),
                )
            )
    return [
        "## A thousand hosts at once",
        f"One client writes as fast as etcd answers, in transactions of {TXN_PUTS} operations. *After*: from the last "
        "answer to the kernel's announcement of the last entry: of a route where hosts join, of the removal of an FDB "
        f"entry where they leave. Passes are counted from the agent's log. Budget: {BUDGET_BURST_S} s after the last "
        f"put with {FULL:,} peers. flanneld v0.28.9: {FLANNELD_BURST_S} s for the joins.",
        table(("peers", "burst", "writing to etcd", "after", "budget", "passes", "agent's CPU seconds"), rows),
    ]

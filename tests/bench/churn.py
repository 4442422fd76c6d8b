"""Fifty hosts a second come or go, for a minute, beside an agent with a full table."""

import random
import time

from subnet_lease.model import Lease, Prefix, encode_attrs, subnet_key
from tests.bench.monitor import ROUTE, Monitor
from tests.bench.peers import delete_all, newcomers
from tests.bench.place import device_index
from tests.bench.report import Figures, percentiles, table
from tests.bench.testbed import Host, Samples, Testbed, note

RATE = 50
SECONDS = 60
SEED = 50


def measure(bed: Testbed) -> Samples:
    """One minute, once."""
    samples: Samples = {}
    size = bed.options.full
    bed.say(f"churn: {size} peers, {SECONDS} s")
    with bed.host(size) as host, host.agent() as agent, Monitor(host.place, device_index(host.place), ROUTE) as monitor:
        lines, cpu, begun = len(agent.events()), agent.cpu_s, time.monotonic()
        changes, present = _come_and_go(host, begun)
        ended = time.monotonic()
        cpu = agent.cpu_s - cpu
        seen = [monitor.wait(peer.subnet, at, gone=gone)[0] for peer, gone, at in changes]
        passes = agent.passes(lines, 4 * len(changes))
        host.compare(present)
        delete_all(bed.etcd.endpoint, host.prefix, present)
        lags = [now - at for now, (_, _, at) in zip(seen, changes, strict=True)]
        middle, late, worst = percentiles(lags)
        sample = {
            "seconds": ended - begun,
            "changes": len(changes),
            "joins": sum(not gone for _, gone, _ in changes),
            "cpu_share": cpu / (ended - begun),
            "passes": len(passes),
            "median_s": middle,
            "late_s": late,
            "worst_s": worst,
            "behind": sum(now > ended for now in seen),
        }
        note(samples, "churn", size, sample)
    return samples


def _come_and_go(host: Host, begun: float) -> tuple[list[tuple[Lease, bool, float]], list[Lease]]:
    """(host, whether it left, start of the write) of every change, and who is there at the end."""
    dice = random.Random(SEED)
    absent = newcomers(2048)
    present: list[Lease] = []
    revisions: dict[Prefix, int] = {}
    changes: list[tuple[Lease, bool, float]] = []
    etcd_lease = host.store.grant(3600)
    for number in range(RATE * SECONDS):
        # Nobody comes twice or leaves within a second: each announcement is about one change, and there is one of each.
        gone = len(present) > RATE and dice.random() < 0.5
        peer = present.pop(dice.randrange(len(present) - RATE)) if gone else absent.pop()
        key, value = subnet_key(peer.subnet), encode_attrs(peer.attrs)
        time.sleep(max(0.0, begun + number / RATE - time.monotonic()))
        changes.append((peer, gone, time.monotonic()))
        if gone:
            assert host.store.delete(key, revisions.pop(peer.subnet)), "somebody else has changed the lease"
        else:
            revisions[peer.subnet] = host.store.create(key, value, etcd_lease)
            present.append(peer)
    time.sleep(max(0.0, begun + SECONDS - time.monotonic()))
    return changes, present


def sections(figures: Figures) -> list[str]:
    rows = []
    for size in figures.sizes("churn"):
        for each in figures.all("churn", size):
            lags = " / ".join(f"{1000 * each[lag]:.1f}" for lag in ("median_s", "late_s", "worst_s"))
            rows.append(
                (
                    f"{size:,}",
                    f"{each['joins']:,} + {each['changes'] - each['joins']:,}",
                    f"{100 * each['cpu_share']:.1f} %",
                    f"{each['passes']:,}",
                    lags,
                    str(each["behind"]),
                )
            )
    return [
        "## Coming and going",
        f"{RATE} joins and leaves a second for {SECONDS} s, mixed at random from a fixed seed, evenly paced. The lag "
        "is counted in milliseconds from the start of the write to the kernel's announcement of the route: median / "
        "99th percentile / most. *Behind*: changes not in the kernel when the time was over, "
        f"{1000 // RATE} ms after the last write began.",
        table(("peers", "joins + leaves", "agent's CPU, of one core", "passes", "lag", "behind"), rows),
    ]

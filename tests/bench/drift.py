"""Entries, and at last the device, are removed by hand beside an agent with a full table: until all is back."""

import contextlib
import random
import socket
import time
from collections.abc import Sequence

from overlay import rtnl
from overlay.kernel import BUFFER
from overlay.model import Entry, Fdb, Neighbour, NextHop, Route
from subnet_lease.model import Lease
from tests.bench.contenders import Failed
from tests.bench.monitor import NEIGH, NEXTHOP, ROUTE, Monitor
from tests.bench.peers import BACKEND, DEVICE, here
from tests.bench.place import device_index, inside
from tests.bench.report import BUDGET_DRIFT_MS, FULL, Figures, percentiles, table
from tests.bench.testbed import Host, Samples, Testbed, note

ROUNDS = 100
"""Entries of each kind removed, one after the other."""

MANY = 5000
"""Routes removed in one go; all, if there are fewer peers."""

KINDS: dict[type[Entry], str] = {
    Fdb: "FDB entry",
    Neighbour: "neighbour",
    NextHop: "nexthop object, and the route that goes with it",
    Route: "route",
}

SMALL_BUFFER = 1 << 14
"""Bytes asked for as the receive buffer of an agent that is to lose notifications."""

SMALL_BUFFER_AGENT = (
    "-c",
    f"import sys, agent, overlay.kernel; overlay.kernel.BUFFER = {SMALL_BUFFER}; sys.exit(agent.main())",
)
"""What Python is given to run the agent with it."""


def measure(bed: Testbed) -> Samples:
    """Single entries in the first repetition, the rest in every one."""
    samples: Samples = {}
    size = bed.options.full
    for number in range(1, bed.options.repeat + 1):
        bed.say(f"drift, run {number} of {bed.options.repeat}: {size} peers")
        with bed.host(size) as host:
            with host.agent():
                if number == 1:
                    note(samples, "drift", size, _single(host))
                    host.compare()
                back = _many(host)
                host.compare()
            with host.agent(*SMALL_BUFFER_AGENT) as agent:
                lossy = _many(host)
                host.compare()
                lost = sum(event["event"] == "notifications_lost" for event in agent.events())
                if not lost:
                    raise Failed("no notification was lost")
            with host.agent():
                device = _device(host)
                host.compare()
            sample = {"many": min(MANY, size), "back_s": back, "lossy_back_s": lossy, "losses": lost, **device}
            note(samples, "drift_many", size, sample)
    return samples


def _single(host: Host) -> dict[str, list[float]]:
    """Seconds from the removal's announcement to the repair's, by kind."""
    dice = random.Random(ROUNDS)
    device = device_index(host.place)
    local = here(device)
    found: dict[str, list[float]] = {name: [] for name in KINDS.values()}
    hand = inside(host.place, lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE))
    with contextlib.closing(hand), Monitor(host.place, device, NEIGH, ROUTE, NEXTHOP) as monitor:
        for _ in range(ROUNDS):
            entries = BACKEND.entries(dice.choice(host.peers), local)
            for entry in entries:
                # Not in step with anything that is periodic.
                time.sleep(dice.random() * 0.01)
                started = time.monotonic()
                hand.send(rtnl.drop(entry, 0, ack=False))
                gone, _ = monitor.wait(entry[0], started, gone=True)
                # A nexthop object takes its route along; that is back last.
                back, again = monitor.wait((entries[-1] if isinstance(entry, NextHop) else entry)[0], gone)
                assert again in entries, f"{again} is not what was removed"
                found[KINDS[type(entry)]].append(back - gone)
    return found


def _many(host: Host) -> float:
    """Seconds from the last removal's announcement to the last repair's, for MANY routes removed in one batch."""
    some: Sequence[Lease] = host.peers[:MANY]
    with Monitor(host.place, device_index(host.place), ROUTE) as monitor:
        started = time.monotonic()
        host.place.ip(*(f"route del {peer.subnet}" for peer in some))
        subnets = [peer.subnet for peer in some]
        gone = monitor.wait_all(subnets, started, gone=True)
        return monitor.wait_all(subnets, started) - gone


def _device(host: Host) -> dict[str, float]:
    """Seconds that removing the device took, and from then to the announcement of the last route."""
    with Monitor(host.place, 0, ROUTE) as monitor:
        started = time.monotonic()
        host.place.ip(f"link del {DEVICE}")
        removed = time.monotonic()
        back = monitor.wait_all([peer.subnet for peer in host.peers], started)
    return {"removing_s": removed - started, "device_back_s": back - removed}


def sections(figures: Figures) -> list[str]:
    parts = []
    for size in figures.sizes("drift"):
        rows = []
        [sample] = figures.all("drift", size)
        for name in KINDS.values():
            ms = percentiles(1000 * each for each in sample[name])
            worst = f"{ms[2]:.1f}"
            if size == FULL:
                worst = figures.verdict(f"drift: {name}", ms[2], BUDGET_DRIFT_MS, "ms", 1)
            rows.append((name, f"{ms[0]:.1f} / {ms[1]:.1f} / {worst}"))
        parts += [
            "## Entries removed by hand",
            f"With {size:,} peers. Milliseconds from the kernel's announcement of the removal to that of the entry's "
            f"return, both read by a netlink socket of ours: median / 99th percentile / most of {ROUNDS} of each kind. "
            f"Budget: {BUDGET_DRIFT_MS:g} ms for each.",
            table(("removed", "back after"), rows),
        ]
    for size in figures.sizes("drift_many"):
        spreads = {name: figures.spread("drift_many", size, name) for name in _MANY}
        losses, many = figures.spread("drift_many", size, "losses").text(0), figures.all("drift_many", size, "many")[0]
        rows = [
            (f"{many:,} routes, in one `ip -batch`", spreads["back_s"].text(3)),
            (f"the same, notifications lost {losses} times", spreads["lossy_back_s"].text(3)),
            (f"the device, which takes the kernel {spreads['removing_s'].text()} s", spreads["device_back_s"].text()),
        ]
        parts += [
            "Seconds until all entries are back: from the last removal's announcement to the last return's; for the "
            "device from the end of `ip link del` to the last route. For losses the agent's receive buffers are "
            f"{SMALL_BUFFER >> 10} KiB instead of {BUFFER >> 20} MiB; they are counted from its log, and each "
            f"calls for a full dump. {len(figures.all('drift_many', size))} repetitions.",
            table(("removed", "all back after"), rows),
        ]
    return parts


_MANY = ("back_s", "lossy_back_s", "removing_s", "device_back_s")

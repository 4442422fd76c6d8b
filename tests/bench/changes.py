"""One host joins, changes its MAC, leaves: how long until another's kernel has it.

Counted from the start of the write to etcd to the kernel's own announcement: of the route, the last entry to be made
and the first to go; of the neighbour, the entry that turns traffic to the new MAC.
"""

import random
import time

from overlay.model import Neighbour
from subnet_lease.model import Vtep, encode_attrs, subnet_key
from tests.bench.monitor import NEIGH, ROUTE, Monitor
from tests.bench.peers import newcomers
from tests.bench.place import device_index
from tests.bench.report import BUDGET_JOIN_MS, FLANNELD_JOIN_MS, Figures, percentiles, table
from tests.bench.testbed import Host, Samples, Testbed, note

ROUNDS = 500
"""Hosts that join, change and leave, one after the other."""

SETTLE_S = 1.0
"""Seconds from READY=1 to the first change. The table is written to disk later, while hosts come and go."""

SIZES = (10, 1000)
"""Peers present, besides the full number."""


def measure(bed: Testbed) -> Samples:
    """At each size one agent and all rounds, with the seconds of each change."""
    samples: Samples = {}
    for size in dict.fromkeys((*SIZES, bed.options.full)):
        bed.say(f"changes: {size} peers")
        with bed.host(size) as host, host.agent():
            # A first start has the kernel's announcements of its own entries yet to read.
            time.sleep(SETTLE_S)
            note(samples, "changes", size, _rounds(host))
            host.compare()
    return samples


def _rounds(host: Host) -> dict[str, list[float]]:
    """Seconds of each change by kind, and of the joins' writes to etcd alone."""
    store, dice = host.store, random.Random(ROUNDS)
    etcd_lease = store.grant(3600)
    found: dict[str, list[float]] = {"joins": [], "mac_changes": [], "leaves": [], "writes": []}

    def pause() -> float:
        # Not in step with anything that is periodic.
        time.sleep(dice.random() * 0.01)
        return time.monotonic()

    device = device_index(host.place)
    with Monitor(host.place, device, ROUTE, NEIGH) as monitor:
        for peer in newcomers(ROUNDS):
            key, attrs = subnet_key(peer.subnet), peer.attrs
            assert attrs.vtep is not None
            other = b"\2\xfb" + attrs.vtep.mac[2:]
            started = pause()
            revision = store.create(key, encode_attrs(attrs), etcd_lease)
            found["writes"].append(time.monotonic() - started)
            found["joins"].append(monitor.wait(peer.subnet, started)[0] - started)
            value = encode_attrs(attrs._replace(vtep=Vtep(attrs.vtep.vni, other)))
            started = pause()
            revision = store.replace(key, value, etcd_lease, revision)
            seen, entry = monitor.wait((device, peer.subnet.base), started)
            assert isinstance(entry, Neighbour) and entry.mac == other, f"{entry} has the old MAC"
            found["mac_changes"].append(seen - started)
            started = pause()
            assert store.delete(key, revision), "somebody else has changed the lease"
            found["leaves"].append(monitor.wait(peer.subnet, started, gone=True)[0] - started)
        # The last to go; then the kernel is as it was before.
        monitor.wait((device, other), started, gone=True)
    store.revoke(etcd_lease)
    return found


def sections(figures: Figures) -> list[str]:
    rows = []
    for size in figures.sizes("changes"):
        cells = []
        for kind in ("joins", "mac_changes", "leaves", "writes"):
            ms = percentiles(1000 * each for sample in figures.all("changes", size, kind) for each in sample)
            text = [f"{each:.1f}" for each in ms]
            if kind == "joins":
                for number, name in enumerate(("median", "99th percentile")):
                    what = f"a join with {size:,} peers, {name}"
                    text[number] = figures.verdict(what, ms[number], BUDGET_JOIN_MS[number], "ms", 1)
            cells.append(" / ".join(text))
        after = percentiles(
            1000 * (join - write)
            for sample in figures.all("changes", size)
            for join, write in zip(sample["joins"], sample["writes"], strict=True)
        )
        cells.append(" / ".join(f"{each:.1f}" for each in after))
        theirs = "{} / {}".format(*FLANNELD_JOIN_MS[size]) if size in FLANNELD_JOIN_MS else ""
        rows.append((f"{size:,}", *cells, theirs))
    return [
        "## One host joins, changes its MAC, leaves",
        "Milliseconds from the start of the write to etcd to the kernel's announcement, read by a netlink socket "
        "beside the agent's: of the route where a host joins or leaves, of the neighbour with the new MAC where a "
        f"lease is replaced. Median / 99th percentile / most of {ROUNDS}, one after the other. *etcd alone*: until the "
        "write of a join is answered, which is in the others too; *after that*: from etcd's answer to the route, what "
        "the agent adds. Budget for a join, at every size: median "
        "{} ms, 99th percentile {} ms.".format(*BUDGET_JOIN_MS),
        table(("peers", "join", "MAC change", "leave", "etcd alone", "after that", "flanneld v0.28.9, join"), rows),
    ]

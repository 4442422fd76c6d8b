"""What probes cost a host: python -m tests.bench.probes [--markdown docs/probes.md]

The loop as an agent runs it, with the default options but for the interval, among as many peers as there are leases: a
second host has the addresses of all. Other hosts' questions come as often as this one asks. Processor time is what the
kernel counts for the thread; the reconciler's part runs in one of its own. Memory includes what the first run imports.
"""

import argparse
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import structlog

from overlay.backends import Here, backend_of
from overlay.device import DeviceSpec, Underlay
from overlay.options import Options
from overlay.probe import Question, encode_question
from overlay.prober import Prober
from overlay.process import usage
from overlay.reconciler import Plan, Some, State
from subnet_lease.model import LeaseAttrs, NetworkConfig, Prefix, Vtep, encode_attrs
from subnet_lease.store import Record, Snapshot
from subnet_lease.table import Host, LeaseTable
from tests.netns.namespace import entered, index_of, ip, new_namespace, sh
from tests.netns.two_hosts import MTU, two_hosts

INTERVAL_S, DEFAULT_S = 1.0, Options().probe_interval
"""Of this measurement, and of an agent."""

INTERVALS = 20
SIZES = (10, 1000, 15_000)
CONFIG = NetworkConfig.parse(b'{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}')
OWN = Prefix.parse("10.9.1.0/24")
BEGIN, END = "<!-- measured by python -m tests.bench.probes -->\n", "<!-- end -->\n"


class Cost(NamedTuple):
    """Of one interval: milliseconds of processor time of the probes' thread and of the reconciler's; kilobytes kept."""

    probes_ms: float
    reconciler_ms: float
    kept_kb: float


def leases(count: int) -> LeaseTable:
    """A table of so many peers with subnets at random, but for those of the two hosts."""
    numbers = random.Random(1).sample([n for n in range(1 << 16) if n >> 8 not in (0, 9)], count)
    records = []
    for number in numbers:
        attrs = LeaseAttrs(
            bytes((172, 16, number >> 8, number & 255)), "vxlan", Vtep(1, b"\2\0\0\0" + number.to_bytes(2))
        )
        records.append(Record(f"10.{number >> 8}.{number & 255}.0-24", encode_attrs(attrs), 1, number + 1, number + 1))
    made = LeaseTable(CONFIG, Host("10.9.1.0-24", (OWN,), (bytes((192, 0, 2, 1)),), (b"\2\0\0\0\1\1",)))
    made.replace(Snapshot(tuple(records), 1 << 20, 1))
    return made


class Reconciler:
    """Answers as the real one does, each time in a thread of its own, and counts its processor time."""

    def __init__(self, peers: LeaseTable) -> None:
        self.peers = peers
        self.seconds = 0.0
        self.calls = 0
        index, link = index_of("flannel.1"), index_of("eth0")
        own, mac = bytes((192, 0, 2, 1)), b"\2\0\0\0\1\1"
        self.here = Here(CONFIG.blocks, {4: index}, 0, (), MTU, None, True)
        spec = DeviceSpec("flannel.1", 1, 8472, link, own, mac, MTU, (Prefix(OWN.base, 32),))
        self.plan = Plan((OWN,), (spec,), "eth0", MTU)
        self.underlay = Underlay("eth0", link, 1500, (own,), (), (), "")

    def some(self, choose: Callable[[LeaseTable], Iterable[str]], seconds: float) -> Some:
        """As `reconciler.Reconciler.some`."""
        answers: list[Some] = []

        def work() -> None:
            started = time.thread_time()
            entries = backend_of(CONFIG).entries
            found = {key: lease for key in choose(self.peers) if (lease := self.peers.accepted(key))}
            chosen = {key: (lease, entries(lease, self.here)) for key, lease in found.items()}
            answers.append(Some(chosen, self.plan, self.here, self.underlay, 8472))
            self.seconds += time.thread_time() - started

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        self.calls += 1
        return answers[0]


def measure(count: int, answering: bool) -> Cost:
    """Of some intervals among `count` peers, of which all answer, or none."""
    options = Options()
    with ExitStack() as stack:
        near, far = stack.enter_context(two_hosts(stack.enter_context(new_namespace())))
        with entered(near):
            # All peers are one host, whose kernel answers for all of their addresses.
            ip("route add 10.0.0.0/8 via 10.9.2.0 dev flannel.1 onlink")
            reconciler = Reconciler(leases(count))
        with entered(far):
            ip("route add local 10.0.0.0/8 dev lo metric 10")
            if not answering:
                sh("nft", "add table inet t; add chain inet t c { type filter hook input priority 0; policy drop; }")
        prober = Prober(
            reconciler.some, lambda key: True, lambda: State(ready=True, peers=count), structlog.get_logger(),
            interval=INTERVAL_S, number=options.probe_peers, port=options.probe_port,
        )  # fmt: skip
        spent = 0.0

        def body() -> None:
            nonlocal spent
            started = time.thread_time()
            with entered(near):
                prober.run()
            spent = time.thread_time() - started

        before = usage().resident_bytes
        thread = threading.Thread(target=body)
        thread.start()
        with entered(far), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.bind(("10.9.2.0", 0))
            while reconciler.calls < INTERVALS:
                # As many as ask one host in the time in which it asks as many.
                calls = reconciler.calls
                for _ in range(min(count, options.probe_peers + 2)):
                    question = encode_question(Question(random.getrandbits(64), 1), MTU - 28)
                    asking.sendto(question, ("10.9.1.0", options.probe_port))
                while reconciler.calls == calls:
                    time.sleep(0.02)
        prober.stop()
        thread.join()
        kept = usage().resident_bytes - before
        calls = reconciler.calls
        return Cost(1000 * spent / calls, 1000 * reconciler.seconds / calls, kept / 1e3)


def report() -> str:
    """The table, in Markdown's form."""
    rows = [
        "| peers | | the probes' thread | the reconciler's | of a core | memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for count in SIZES:
        for answering in (True, False):
            cost = measure(count, answering)
            part = (cost.probes_ms + cost.reconciler_ms) / 1000 / DEFAULT_S
            words = "all answer" if answering else "none answers"
            rows.append(
                f"| {count:,} | {words} | {cost.probes_ms:.1f} ms | {cost.reconciler_ms:.2f} ms | {100 * part:.2f} % | "
                f"{max(0.0, cost.kept_kb) / 1000:.1f} MB |"
            )
    return "\n".join(rows)


def main() -> None:
    """Print the table, or put it into the document in place of the one there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="docs/probes.md")
    file = parser.parse_args().markdown
    found = report()
    if file is None:
        print(found)
        return
    before, _, rest = file.read_text().partition(BEGIN)
    file.write_text(f"{before}{BEGIN}{found}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()

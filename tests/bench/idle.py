"""Two agents with nothing to do, among few peers and with a full table, side by side: memory, CPU time, children."""

import contextlib
import select
import socket
import struct
import time

from overlay import rtnl
from tests.bench.agents import Agent
from tests.bench.peers import OWN_IP, SECOND_IP, SMALL
from tests.bench.report import (
    BUDGET_FULL_MB,
    BUDGET_IDLE_CPU,
    BUDGET_IDLE_MB,
    FLANNELD_IDLE_CPU,
    FLANNELD_MB,
    FULL,
    Figures,
    table,
)
from tests.bench.testbed import Samples, Testbed, note

SETTLE_S = 10.0
"""From READY=1 to the beginning: two of the agent's heartbeats."""

NETLINK_CONNECTOR, CN_IDX_PROC = 11, 1
PROC_CN_MCAST_LISTEN, PROC_EVENT_FORK = 1, 1
CN_MSG = struct.Struct("=IIIIHH")  # idx, val, seq, ack, len, flags: linux/connector.h
PROC_EVENT = struct.Struct("=IIQ 4i")  # what, cpu, timestamp; pid and tgid of the parent, then of the child
SO_RCVBUFFORCE = 33


class Births:
    """Counts what processes make, from the kernel's process events (linux/cn_proc.h)."""

    def __init__(self, pids: set[int]) -> None:
        self.processes = dict.fromkeys(pids, 0)
        self.threads = dict.fromkeys(pids, 0)
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_CONNECTOR)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        self._socket.bind((0, CN_IDX_PROC))
        listen = struct.pack("=I", PROC_CN_MCAST_LISTEN)
        body = CN_MSG.pack(CN_IDX_PROC, 1, 0, 0, len(listen), 0) + listen
        self._socket.send(rtnl.HEADER.pack(rtnl.HEADER.size + len(body), rtnl.NLMSG_DONE, 0, 0, 0) + body)

    def __enter__(self) -> "Births":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def count(self, seconds: float) -> None:
        """Until the time is over. OSError (ENOBUFS) if an event was lost."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self._socket], [], [], left)[0]:
                event = self._socket.recv(4096)[rtnl.HEADER.size + CN_MSG.size :]
                what, _, _, _, parent, child, group = PROC_EVENT.unpack(event[: PROC_EVENT.size].ljust(PROC_EVENT.size))
                if what != PROC_EVENT_FORK:
                    continue
                if child == group and parent in self.processes:
                    self.processes[parent] += 1
                elif child != group and group in self.threads:
                    # A new thread; its "parent" is the parent of the process.
                    self.threads[group] += 1


def measure(bed: Testbed) -> Samples:
    """Both agents at the same time, once."""
    samples: Samples = {}
    full, seconds = bed.options.full, bed.options.idle_s
    bed.say(f"idle: {SMALL} and {full} peers, {seconds:g} s")
    with contextlib.ExitStack() as stack:
        hosts = {
            size: stack.enter_context(bed.host(size, own_ip)) for size, own_ip in ((SMALL, OWN_IP), (full, SECOND_IP))
        }
        agents = {size: stack.enter_context(host.agent()) for size, host in hosts.items()}
        births = stack.enter_context(Births({agent.pid for agent in agents.values()}))
        births.count(SETTLE_S)
        before = {size: _state(agent, births) for size, agent in agents.items()}
        births.count(seconds)
        after = {size: _state(agent, births) for size, agent in agents.items()}
        for size, host in hosts.items():
            host.compare()
            grown = {name: after[size][name] - before[size][name] for name in before[size]}
            note(samples, "idle", size, {"seconds": seconds, "after": after[size], "grown": grown})
    return samples


def _state(agent: Agent, births: Births) -> dict[str, float]:
    return {
        "resident_mb": agent.memory["VmRSS"],
        "cpu_s": agent.cpu_s,
        "threads": agent.threads,
        "children_cpu_s": agent.children_cpu_s,
        "processes": births.processes[agent.pid],
        "new_threads": births.threads[agent.pid],
    }


def sections(figures: Figures) -> list[str]:
    rows = []
    budgets = {SMALL: BUDGET_IDLE_MB, FULL: BUDGET_FULL_MB}
    for size in figures.sizes("idle"):
        for each in figures.all("idle", size):
            after, grown, seconds = each["after"], each["grown"], each["seconds"]
            resident = f"{after['resident_mb']:.1f} MB"
            if size in budgets:
                name = f"idle memory with {size:,} peers"
                resident = figures.verdict(name, after["resident_mb"], budgets[size], "MB", 1)
            share = 100 * grown["cpu_s"] / seconds
            rows.append(
                (
                    f"{size:,}",
                    f"{resident}, {grown['resident_mb']:+.1f} MB",
                    figures.verdict(f"idle CPU with {size:,} peers", share, BUDGET_IDLE_CPU, "%", 3),
                    f"{after['threads']:.0f}",
                    f"{grown['new_threads']:.0f}",
                    figures.verdict(f"idle processes with {size:,} peers", grown["processes"], 0, "", 0),
                    f"{grown['children_cpu_s']:.2f}",
                )
            )
    seconds = figures.all("idle", figures.sizes("idle")[0], "seconds")[0]
    return [
        "## Idle",
        f"Two agents side by side, with nothing to do for {seconds:g} s from {SETTLE_S:g} s after `READY=1`. Memory is "
        "the resident set at the end, libraries included, and its growth in that time; CPU is that of all threads, as "
        "the kernel accounts for it, in per cent of one core. Processes and threads made are counted from the kernel's "
        "own events (netlink process connector), of which each new one causes one; the CPU time of children that have "
        f"ended is from /proc. Budgets: {BUDGET_IDLE_MB:g} MB among few peers, {BUDGET_FULL_MB:g} MB with {FULL:,}, "
        f"{BUDGET_IDLE_CPU} % of a core, no process; probes are off, and have a budget of their own "
        f"([probes](probes.md)). flanneld v0.28.9: {FLANNELD_MB[0]} MB, about "
        f"{FLANNELD_IDLE_CPU} % of a core.",
        table(
            (
                *("peers", "resident, growth", "CPU", "threads", "threads made", "processes made"),
                "children's CPU seconds",
            ),
            rows,
        ),
    ]

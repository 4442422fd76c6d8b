"""A cluster under faults without end: `python -m tests.faults.soak --minutes 10 --seed N`.

Four hosts with real agents, an etcd, pings between all pods, and one fault after the other, chosen by the seed. At the
end of each minute all must be as the leases say, and nothing may have been lost. Exit code 1, with the reason, if that
is not so.

What breaks a host's flows by itself, with or without an agent (its device is deleted, its entries are removed), is not
held against the agent as a loss: the pings of that host are judged before it, and begun anew when the agent has mended
it, for which it has MEND_S. All other faults must not cost a single ping, of any flow.
"""

import argparse
import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from overlay import logs
from overlay.cluster import Host, Lab, LabError, Pod, wait_until
from overlay.netns import NamespaceError
from subnet_lease.model import format_address, format_mac
from tests.faults.world import Gap, Pings, World, lease_of

HOSTS = 4

MINUTE_S = 60.0

PAUSE_S = 4.0
"""The longest pause between two faults."""

AWAY_S = 12.0
"""The longest time for which an etcd or an agent is away: beyond all timeouts of a call and all waits of an agent."""

MEND_S = 5.0
"""What an agent has to mend what somebody else has broken; it takes a tenth of a second, on a machine with time."""

CONVERGE_S = 60.0
"""What all agents have to come to rest at the end of a minute: they may be at the end of their longest waits."""

GROWTH_MB = 4.0
"""How much more memory an agent may hold in the end; what a process holds is never quite the same twice."""

LINES, LINES_PER_FAULT = 10, 10
"""How much a host's agents may say in a minute, and on account of each fault."""

FIRST_GUEST, GUESTS = 201, 40
"""Hosts without agents: the subnets they take."""


class Lost(Exception):
    """Something is not as it must be; the text says what."""


class Footprint(NamedTuple):
    """What an agent's process holds."""

    resident_mb: float
    threads: int
    files: int

    @classmethod
    def of(cls, host: Host) -> "Footprint":
        process = Path(f"/proc/{host.agent_pid}")
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        resident = int(status["VmRSS"].split()[0]) / 1024
        return cls(resident, int(status["Threads"]), len(list((process / "fd").iterdir())))

    def __str__(self) -> str:
        return f"{self.resident_mb:.1f} MB, {self.threads} threads, {self.files} files"


class Flows:
    """The pings between all pods. `judge` ends them; Lost if one was not answered."""

    def __init__(self, pods: list[Pod]) -> None:
        self._pairs = list(itertools.permutations(pods, 2))
        self._pings: dict[tuple[Pod, Pod], Pings] = {}
        self.begun = 0

    def begin(self) -> None:
        """Begin those that do not run."""
        for pair in self._pairs:
            if pair not in self._pings:
                self._pings[pair] = Pings(*pair)
                self.begun += 1

    def judge(self, *hosts: Host) -> None:
        """End all, or those from and to these hosts."""
        chosen = [pair for pair in self._pings if not hosts or any(pod.host in hosts for pod in pair)]
        gaps: list[Gap] = []
        for pair in chosen:
            gaps += self._pings.pop(pair).finish()
        if gaps:
            raise Lost("pings were lost: " + "; ".join(map(str, gaps)))

    def kill(self) -> None:
        for ping in self._pings.values():
            ping.kill()


class Soak:
    """The world, its flows, and the faults that befall it."""

    def __init__(self, world: World, chance: random.Random) -> None:
        self._world = world
        self._chance = chance
        self._etcd = world.etcd
        (self._member,) = world.etcd.members
        self._guests: set[int] = set()
        self.flows = Flows([host.pods[0] for host in world.hosts])
        self.faults: list[Callable[[], str]] = [
            self.agent_killed,
            self.agent_killed,
            self.agent_restarted,
            self.agent_restarted_without_etcd,
            self.etcd_killed,
            self.etcd_restarted_by_its_operator,
            self.etcd_frozen,
            self.etcd_compacted,
            self.etcd_compacted_while_agents_are_away,
            self.guests_come_and_go,
            self.guests_come_and_go,
            self.entries_removed,
            self.device_deleted,
        ]

    def befall(self) -> str:
        """One fault, carried out; what it was."""
        return self._chance.choice(self.faults)()

    def pause(self, most: float = PAUSE_S) -> float:
        seconds = self._chance.uniform(0, most)
        time.sleep(seconds)
        return seconds

    def host(self) -> Host:
        return self._chance.choice(self._world.hosts)

    # --- agents ---

    def agent_killed(self) -> str:
        host = self.host()
        host.kill_agent(signal.SIGKILL)
        away = self.pause()
        self._start(host)
        return f"agent of {host.name} killed, started after {away:.1f} s"

    def agent_restarted(self) -> str:
        host = self.host()
        if (code := host.kill_agent(signal.SIGTERM)) != 0:
            raise Lost(f"the agent of {host.name} was asked to end and did so with code {code}")
        self._start(host)
        return f"agent of {host.name} restarted"

    def agent_restarted_without_etcd(self) -> str:
        host = self.host()
        self._member.kill()
        host.kill_agent(signal.SIGKILL)
        self._world.start_agents(host)
        away = self.pause(AWAY_S)
        self._etcd.start()
        host.wait_ready(CONVERGE_S)
        return f"agent of {host.name} killed and started while etcd was away for {away:.1f} s"

    def _start(self, host: Host) -> None:
        self._world.start_agents(host)
        host.wait_ready()

    # --- etcd ---

    def etcd_killed(self) -> str:
        self._member.kill()
        away = self.pause(AWAY_S)
        self._etcd.start()
        return f"etcd killed, started after {away:.1f} s"

    def etcd_restarted_by_its_operator(self) -> str:
        self._world.lab.kill(self._member.name, signal.SIGTERM, AWAY_S)
        self._etcd.start()
        return "etcd restarted"

    def etcd_frozen(self) -> str:
        self._member.freeze()
        away = self.pause(AWAY_S)
        self._member.thaw()
        return f"etcd frozen for {away:.1f} s"

    def etcd_compacted(self) -> str:
        return f"etcd compacted at {self._compact()}"

    def _compact(self) -> int:
        # There must be something to forget.
        self._etcd.grow(revision := self._etcd.revision + 1)
        self._etcd.compact()
        return revision

    def etcd_compacted_while_agents_are_away(self) -> str:
        """What happens meanwhile shows in no watch."""
        self._world.cut()
        said = self.guests_come_and_go()
        self._compact()
        away = self.pause(AWAY_S)
        self._world.mend()
        return f"all agents cut off from etcd for {away:.1f} s, meanwhile {said} and compaction"

    # --- other hosts ---

    def guests_come_and_go(self) -> str:
        numbers = range(FIRST_GUEST, FIRST_GUEST + GUESTS)
        concerned = self._chance.sample(numbers, self._chance.randint(1, GUESTS // 2))
        for number in concerned:
            if number in self._guests:
                self._world.leave(number)
            else:
                self._world.join(number)
        self._guests.symmetric_difference_update(concerned)
        return f"{len(concerned)} hosts come or go; {len(self._guests)} there"

    # --- what breaks a host's flows ---

    def entries_removed(self) -> str:
        host, other = self._chance.sample(self._world.hosts, 2)
        lease = lease_of(other)
        assert lease.attrs.vtep is not None
        base, mac = format_address(lease.subnet.base), format_mac(lease.attrs.vtep.mac)
        command = self._chance.choice(
            [
                f"ip route del {lease.subnet}",
                f"ip neigh del {base} dev flannel.1",
                f"bridge fdb del {mac} dev flannel.1",
                "ip nexthop flush proto 111",
            ]
        )
        return f"{host.name}: {command}, mended within {self._harm(host, command):.2f} s"

    def device_deleted(self) -> str:
        host = self.host()
        return f"{host.name}: flannel.1 deleted, mended within {self._harm(host, 'ip link del flannel.1'):.2f} s"

    def _harm(self, host: Host, command: str) -> float:
        """Run a command on the host that breaks its flows; the seconds until all is in place again."""
        self.flows.judge(host)
        done = host.run("sh", "-c", command)
        if done.returncode:
            raise Lost(f"{host.name}: {command}: {done.stderr.strip()}")
        began = time.monotonic()
        try:
            wait_until(lambda: not self._amiss(host), MEND_S, f"{host.name} mended after {command}")
        except LabError as late:
            raise Lost(f"{late} {self._amiss(host)}") from None
        mended = time.monotonic() - began
        self.flows.begin()
        return mended

    def _amiss(self, host: Host) -> list[str]:
        if host.run("ip", "link", "show", "flannel.1").returncode:
            return [f"{host.name} has no device"]
        return [line for line in self._world.differences() if line.startswith(f"{host.name}:")]


class Watchman:
    """Looks at the end of each minute whether all is well."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._first = {host: Footprint.of(host) for host in world.hosts}
        self._subnets = [host.subnet for host in world.hosts]
        self._lines = self._said()

    def _said(self) -> dict[Host, int]:
        return {host: host.log().count("\n") for host in self._world.hosts}

    def check(self, faults: int) -> str:
        """Lost, or what is worth to be known. `faults`: how many there were since the last time."""
        try:
            self._world.converge(CONVERGE_S)
        except AssertionError as differences:
            raise Lost(f"not at rest after {CONVERGE_S:g} s: {differences}") from None
        if (subnets := [host.subnet for host in self._world.hosts]) != self._subnets:
            raise Lost(f"hosts have moved: {self._subnets} have become {subnets}")
        lines = self._said()
        most = LINES + LINES_PER_FAULT * faults
        for host, count in lines.items():
            if count - self._lines[host] > most:
                raise Lost(f"{host.name} has said {count - self._lines[host]} lines on {faults} faults")
        said = sum(lines.values()) - sum(self._lines.values())
        self._lines = lines
        for host in self._world.hosts:
            self._hold_to_account(host)
        largest = max((Footprint.of(host) for host in self._world.hosts), key=lambda footprint: footprint.resident_mb)
        return f"{said} lines said; the largest agent has {largest}"

    def _hold_to_account(self, host: Host) -> None:
        first = self._first[host]

        def as_before() -> bool:
            now = Footprint.of(host)
            within = now.resident_mb <= first.resident_mb + GROWTH_MB
            return within and now.threads <= first.threads and now.files <= first.files

        try:
            # A socket goes with grpc's timers, and the threads come and go: two while a call with a stream is under way
            # (in grpc's `channel_spin` and `consume_request_iterator`), a timer while a watch begins. The watch that
            # stands in the end has the two it had at first; the agent's loops and the workers of grpc stay.
            wait_until(as_before, CONVERGE_S, "the agent as small as at first", interval=0.5)
        except LabError:
            raise Lost(f"the agent of {host.name} has grown from {first} to {Footprint.of(host)}") from None


def soak(minutes: float, seed: int) -> int:
    """Harm a cluster for so long; the number of faults. Lost if something is lost."""
    chance = random.Random(seed)
    began = time.monotonic()
    faults = 0

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {text}", flush=True)

    with ExitStack() as stack:

        def make_lab(**options: object) -> Lab:
            lab = Lab(f"soak{os.getpid()}", tied=True, **options)  # type: ignore[arg-type]
            stack.callback(lab.down)
            return lab

        world = stack.enter_context(World(make_lab, hosts=HOSTS))
        soaked = Soak(world, chance)
        stack.callback(soaked.flows.kill)
        watchman = Watchman(world)
        say(f"{HOSTS} hosts, up and at rest; seed {seed}")
        try:
            while time.monotonic() - began < minutes * MINUTE_S:
                soaked.flows.begin()
                until, before = time.monotonic() + MINUTE_S, faults
                while time.monotonic() < until:
                    say(soaked.befall())
                    faults += 1
                    soaked.pause()
                found = watchman.check(faults - before)
                soaked.flows.judge()
                say(f"all is well: {faults - before} faults in this minute; {found}")
        except (Lost, NamespaceError):
            for host in world.hosts:
                print(host.name, *(f"  {line}" for line in host.log().splitlines()[-20:]), sep="\n")
            raise
    say(f"{faults} faults, {soaked.flows.begun} pings without end, nothing lost")
    return faults


def main() -> int:
    """Exit code 0 if nothing was lost, 1 if something was."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description="A cluster under faults.")
    parser.add_argument("--minutes", type=float, default=10, help="how long (default: 10)")
    parser.add_argument("--seed", type=int, default=None, help="for the same faults again (default: another each time)")
    arguments = parser.parse_args()
    logs.configure("error", "auto", os.environ)
    seed = random.randrange(1 << 32) if arguments.seed is None else arguments.seed
    try:
        soak(arguments.minutes, seed)
    except (Lost, NamespaceError) as lost:
        print(f"LOST, with seed {seed}: {lost}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

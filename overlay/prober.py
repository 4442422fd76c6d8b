"""The loop of the probes: measures the paths to a few peers each interval, and answers the probes of others.

Owns one thread, when which peers are measured, and what is asked next when a round goes unanswered: the rounds after
it, and then an examination of the peers that have not answered in all of them, together, within a few seconds. The
sockets are `probe_sockets`', the questions to the kernel `probe_kernel`'s; `probe` has the rest.
"""

import errno
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from typing import Any

from overlay import probe
from overlay.metrics import Probes
from overlay.model import Entry, Fdb, Key, Neighbour, NextHop, Route
from overlay.probe import COMPLAINT_S, Evidence, Health, Heard, Paths, Question, Row, Target, Turns
from overlay.probe_kernel import Kernel
from overlay.probe_sockets import ECHO, FINISHED, TCP, UDP, Ask, Lane, Watch, Wire, spoiled_checksums
from overlay.reconciler import Some, State
from subnet_lease.model import Lease, Prefix, format_address, format_subnets
from subnet_lease.pulse import LOCAL_WORK_S, Pulse
from subnet_lease.table import LeaseTable

DEFAULT_PORT = 8473
"""What peers' responders are asked at by a host that has none."""

PATIENCE_S = 1.0
"""How long answers are waited for: more than a round trip around the world, and TCP's own first time-out."""

ANSWER_S = 30.0
"""How long the reconciler may take to name peers: a first pass may take seconds."""

MOST_TROUBLED = 8
"""Peers whose paths have failed that are measured in each interval besides: so they are seen to recover."""

SMALL = 128
"""Bytes of a packet that passes wherever any does."""

SIZES = 8
SEARCHES = 3
"""Sizes tried at once, and how often, for the largest that passes: within two bytes of it, of 1,450."""

RECENT_S = 5.0
"""For so long, and two intervals, counts what was seen of a peer that is silent."""

CONTROLS = 3
"""Other hosts asked, to tell whether it is this host that is cut off."""

SUMMARY_S = 1.0
"""Seconds for which a summary is used again: many may ask at once."""

MOST_ROWS = 128
"""More than fit in a datagram of the usual size."""

SHOWN = 4
"""How many paths one log line names."""


class Prober:
    """A thread's body: `run` until `stop`. `paths` and `heard` are what is known; see there.

    Each `interval` seconds `number` peers are measured beside the two ring neighbours; the responder listens on `port`,
    or not at all if that is 0. `some`, `wants` and `state` are the reconciler's.
    """

    def __init__(
        self,
        some: Callable[[Callable[[LeaseTable], Iterable[str]], float], Some | None],
        wants: Callable[[Key], bool],
        state: Callable[[], State],
        log: Any,
        *,
        interval: float,
        number: int,
        port: int,
        counts: Probes | None = None,
    ) -> None:
        self._some, self._wants, self._state, self._log = some, wants, state, log
        self._interval, self._number, self._port = interval, number, port
        self._random = random.Random()
        self._turns = Turns(self._random.randrange)
        self._ring: tuple[int, Prefix | None, tuple[str, ...]] = 0, None, ()
        """The neighbours, and the table's revision and the subnet of ours that they were worked out by."""
        self._lanes: tuple[Lane, ...] = ()
        self._plain = True
        """Whether there are no tunnels, as far as is known; `_addresses` are the hosts' own then."""
        self._addresses: frozenset[bytes] = frozenset()
        self._lengths: frozenset[int] = frozenset()
        """Of subnets."""
        self._said = False
        """Whether it was said that the port is taken."""
        self._summaries: dict[int, tuple[float, Health, list[Row]]] = {}
        """By the length of addresses: when it was made, and what the answers in its second tell."""
        self._stopped = False
        self._wire: Wire | None = None
        self.paths, self.heard = Paths(), Heard()
        self.counts = counts or Probes()
        self.pulse = Pulse(LOCAL_WORK_S, time.monotonic)

    def run(self) -> None:
        """Measure until `stop`. Nothing that peers or the kernel do ends it."""
        self._wire = wire = Wire(self._knows, self._reply, self._told, self.counts.questions)
        try:
            # Not all at once after a power failure.
            pause = self._random.uniform(0, self._interval)
            while not self._stopped:
                self.pulse.rest(pause)
                wire.serve(pause)
                self.pulse.work()
                if not self._stopped and self._state().ready:
                    self._measure(wire)
                pause = self._interval * self._random.uniform(0.8, 1.2)
        finally:
            wire.close()

    def once(self) -> None:
        """Measure once, for a command that has no loop, and answer nobody. Takes a round trip, or some seconds where
        something fails.
        """
        with closing(Wire(self._knows, self._reply, self._told, self.counts.questions)) as wire:
            self._wire = wire
            self._measure(wire)

    def stop(self) -> None:
        """End `run`, at once unless it is waiting for the reconciler."""
        self._stopped = True
        if self._wire is not None:
            self._wire.wake()

    # --- whom ---

    def _choose(self, table: LeaseTable) -> list[str]:
        """Ring neighbours, troubled peers, and some others, by the keys of their leases. In the reconciler's thread."""
        own = table.host.subnets[0]
        if self._ring[:2] != (table.revision, own):
            ring = probe.ring_neighbours(own, ((lease.subnets[0], key) for key, lease in table.peers()))
            self._ring = table.revision, own, ring
            # Where there are no tunnels, nothing else that is wanted tells of an address whether it is a peer's.
            leases = table.peers() if self._plain else ()
            self._addresses = frozenset(
                a for _, each in leases for a in (each.attrs.public_ip, each.attrs.public_ip6) if a
            )
            self.paths.forget(lambda key: table.accepted(key) is None)
        others = table.at(self._turns.take(self._number, table.places))
        return [*dict.fromkeys((*self._ring[2], *self.paths.troubled(MOST_TROUBLED), *others))]

    def _open(self, wire: Wire, some: Some) -> bool:
        """Listen on our addresses as they are now; False if there are none, or they cannot be had yet."""
        lanes = lanes_of(some)
        self._plain = not some.plan.devices
        self._lengths = frozenset(subnet.length for subnet in some.plan.subnets)
        if lanes != self._lanes:
            try:
                wire.listen(lanes if self._port else (), self._port or DEFAULT_PORT)
            except OSError as error:
                # Devices come and go, and are looked for again in the next interval; a port that is taken is not given.
                self._lanes = ()
                if error.errno == errno.EADDRINUSE and not self._said:
                    self._log.warning("probe_port_taken", port=self._port, remedy="choose another --probe-port")
                    self._said = True
                wire.listen((), self._port)
                return bool(lanes)
            self._lanes, self._said = lanes, False
        return bool(lanes)

    # --- rounds ---

    def _measure(self, wire: Wire) -> None:
        """One interval's work."""
        some = self._some(self._choose, ANSWER_S)
        if some is None or not self._open(wire, some):
            return
        targets: dict[Target, tuple[Entry, ...]] = {}
        for key, (lease, entries) in some.leases.items():
            targets.update(targets_of(key, lease, entries, some))
        before = {target: self.paths.cause(target.address) for target in targets}
        answers = dict.fromkeys(targets, 0)
        failing, as_before = list(targets), []
        for _ in range(probe.ROUNDS):
            failing = self._round(wire, failing, answers)
            # What has failed, and answers as it did then, has been asked often enough.
            as_before += [
                each for each in failing if before[each] and answers[each] == self.paths.answered(each.address)
            ]
            failing = [each for each in failing if each not in as_before]
            if not failing or self._stopped:
                break
        if (failing or as_before) and not self._stopped:
            self._examine(wire, some, {target: targets[target] for target in (*failing, *as_before)}, answers)
        self._report(before)

    def _round(self, wire: Wire, targets: Sequence[Target], answers: dict[Target, int]) -> list[Target]:
        """Ask each of the targets all three questions; those whose answers are not as usual. Adds to `answers`."""
        now = time.monotonic()
        asks = [
            Ask(what, target.source, target.address, target.mtu, self.paths.state(target.address, now))
            for target in targets
            for what in (ECHO, UDP, TCP)
        ]
        found = wire.ask(asks, PATIENCE_S)
        now = time.monotonic()
        failing = []
        for target, (echo, udp, tcp) in zip(targets, zip(*[iter(found)] * 3, strict=True), strict=True):
            got = (echo is not None) * probe.ECHO | (udp is not None) * probe.UDP | (tcp is not None) * probe.TCP
            # The kernel answers an echo at once; a responder may have to wait for its turn.
            rtt = next((time for time in (echo, tcp, udp) if time is not None), None)
            answers[target] |= got
            self.counts.round(got, rtt)
            if not self.paths.round(target, got, rtt, now):
                failing.append(target)
        return failing

    # --- what is wrong ---

    def _examine(
        self, wire: Wire, some: Some, targets: Mapping[Target, tuple[Entry, ...]], answers: Mapping[Target, int]
    ) -> None:
        """Find out why these have not answered as usual. `answers` are those of the rounds to all."""
        own = {len(address): address for address in some.underlay.addresses}
        within: list[Ask] = []
        for source, address, mtu in ((each.source, each.address, each.mtu) for each in targets):
            within += (Ask(ECHO, source, address, SMALL), Ask(FINISHED, source, address, mtu))
            within += (Ask(what, source, address, mtu) for what in (ECHO, UDP, TCP))
        beside = {target.underlay: own[len(target.underlay)] for target in targets if not _plain(target)}
        beside |= {address: own[len(address)] for address in self._controls(targets) if len(address) in own}
        outside = [Ask(what, source, address, SMALL) for address, source in beside.items() for what in (ECHO, TCP)]
        with Kernel() as kernel:
            for target in targets:
                kernel.verify(target.underlay)
        spoiled = spoiled_checksums()
        with ExitStack() as stack:
            watch: Watch | None = None
            tunnelled = [target.underlay for target in targets if not target.direct]
            if tunnelled:
                with suppress(OSError):
                    watch = stack.enter_context(closing(Watch(some.plan.underlay, some.port, tunnelled)))
            found = wire.ask([*within, *outside], PATIENCE_S)
            came, went = watch.seen() if watch else (set(), None)
        for source in set(beside.values()) - {lane.source for lane in self._lanes}:
            wire.forget(source)
        alive = {ask.address for ask, time in zip(outside, found[len(within) :], strict=True) if time is not None}
        alive |= {target.underlay for target, answered in answers.items() if answered}
        findings: dict[Target, Evidence] = {}
        spoiled = spoiled_checksums() - spoiled
        now = time.monotonic()
        with Kernel() as kernel:
            for target, times in zip(targets, zip(*[iter(found[: len(within)])] * 5, strict=True), strict=True):
                small, finished, echo, udp, tcp = (time is not None for time in times)
                since = self.paths.silent_since(target.address, now, 2 * self._interval + RECENT_S)
                heard, fine = self.heard.voice(target.address, since)
                hop = kernel.next_hop(target.underlay)
                others = (set(beside) | {each.underlay for each in answers}) - {target.underlay}
                findings[target] = Evidence(
                    target.mtu,
                    small=small,
                    echo=echo or bool(answers[target] & probe.ECHO),
                    udp=udp or bool(answers[target] & probe.UDP),
                    tcp=tcp or bool(answers[target] & probe.TCP),
                    finished=finished,
                    spoiled=spoiled > 0,
                    # Without a responder nobody hears what comes out of the tunnel.
                    heard=heard or (not self._port and watch is not None and target.underlay in came),
                    says_fine=fine,
                    complains=self.heard.complains(target.address, target.source, max(since, now - COMPLAINT_S)),
                    left=None if went is None or target.direct else target.underlay in went,
                    arrived=target.underlay in came or self.paths.arrived_since(target.address, since),
                    entry=kernel.wrong_device(target.device)
                    or kernel.wrong_entry(targets[target], target.source, target.address),
                    underlay=target.underlay in alive and not _plain(target),
                    tunnel=not target.direct,
                    route=hop.route,
                    on_link=hop.on_link,
                    next_hop=hop.there(PATIENCE_S + 1.0),
                    others=bool(others & alive) if others else None,
                )
        self._confirm(wire, findings)
        self._search(wire, findings)
        now = time.monotonic()
        for target, evidence in findings.items():
            self.paths.conclude(target, evidence, now)

    def _confirm(self, wire: Wire, findings: dict[Target, Evidence]) -> None:
        """Ask anew, the one after the other, where a datagram was answered or not by its checksum.

        A kernel sends few refusals in a second to one host (icmp_ratelimit): of two questions one may go without.
        """
        suspects = [target for target, evidence in findings.items() if evidence.finished and not evidence.udp]
        for what in (UDP, FINISHED) if suspects and not self._stopped else ():
            asks = [Ask(what, target.source, target.address, target.mtu) for target in suspects]
            for target, answer in zip(suspects, wire.ask(asks, PATIENCE_S), strict=True):
                found, evidence = answer is not None, findings[target]
                findings[target] = evidence._replace(udp=found) if what == UDP else evidence._replace(finished=found)

    def _controls(self, targets: Iterable[Target]) -> list[bytes]:
        """Underlay addresses of other hosts, the latest measured first."""
        asked = {target.underlay for target in targets}
        return [address for address in self.paths.underlays(CONTROLS + len(asked)) if address not in asked][:CONTROLS]

    def _search(self, wire: Wire, findings: dict[Target, Evidence]) -> None:
        """Where packets of the MTU's size do not pass, find the largest that do, several sizes at once."""
        for _ in range(SEARCHES):
            asks = []
            for target, evidence in findings.items():
                if evidence.small and not evidence.whole:
                    sizes = probe.sizes_between(evidence.largest or SMALL, evidence.fails or target.mtu, SIZES)
                    known = self.paths.narrow(target.address)
                    if known and not evidence.fails:
                        # Most likely it is what it was.
                        sizes = [known, known + 1]
                    asks += [Ask(ECHO, target.source, target.address, size) for size in sizes]
            if not asks or self._stopped:
                return
            found = zip(asks, wire.ask(asks, PATIENCE_S), strict=True)
            passed = {(ask.address, ask.size): time is not None for ask, time in found}
            for target, evidence in findings.items():
                if outcome := {size: got for (address, size), got in passed.items() if address == target.address}:
                    findings[target] = probe.narrowed(evidence, outcome, SMALL)

    def _report(self, before: Mapping[Target, str]) -> None:
        """One line for what has failed since, one for what has recovered."""
        now = {target: self.paths.cause(target.address) for target in before}
        failed = [target for target, cause in now.items() if cause and cause != before[target]]
        restored = [target for target, cause in now.items() if before[target] and not cause]
        if failed:
            shown = [
                f"{_named(each)}: {now[each]}: {'; '.join(self.paths.evidence(each.address))}"
                for each in failed[:SHOWN]
            ]
            self._log.warning("paths_failed", failed=len(failed), paths=shown)
        if restored:
            self._log.info("paths_restored", restored=len(restored), paths=[_named(each) for each in restored[:SHOWN]])

    # --- for peers, called while the wire is served ---

    def _knows(self, address: bytes, device: int) -> bool:
        """Whether a peer sends from this address: one that we reach by this device, or have measured."""
        return (
            self._wants((device, address))
            or address in self.paths
            or address in self._addresses
            # With DirectRouting it comes from the first address of the subnet that is routed there.
            or any(self._wants(Prefix(address, length)) for length in self._lengths)
        )

    def _reply(self, address: bytes, question: Question, room: int) -> bytes:
        """The answer to a peer: how this host fares, and what it has measured."""
        now = time.monotonic()
        self.heard.asked(address, question, now)
        made, health, rows = self._summaries.get(len(address), (now - 2 * SUMMARY_S, None, []))
        if health is None or now - made > SUMMARY_S:
            state = self._state()
            health = Health(state.ready, state.peers, state.gap, sum(self.paths.causes().values()))
            rows = self.paths.summary(now, MOST_ROWS, len(address))
            self._summaries[len(address)] = now, health, rows
        return probe.encode_answer(question, health, (*self.heard.complaints(address, now), *rows), room)

    def _told(self, address: bytes, own: bytes, datagram: bytes) -> None:
        self.heard.answered(address, own, datagram, time.monotonic())


# --- from leases to paths ----------------------------------------------------------------------------------------


def lanes_of(some: Some) -> tuple[Lane, ...]:
    """Where peers' questions come in: on our tunnels, and where peers are routed to without, from the underlay."""
    lanes, here, plan = [], some.here, some.plan
    for spec in plan.devices:
        number = here.tunnels.get(len(spec.local), 0)
        for address in spec.addresses:
            lanes.append(Lane(address.base, spec.name, number, plan.mtu))
            if here.link:
                lanes.append(Lane(address.base, plan.underlay, here.link, plan.mtu))
    if here.link and not plan.devices:
        lanes += [Lane(address, plan.underlay, here.link, plan.mtu) for address in some.underlay.addresses]
    return tuple(lanes)


def targets_of(
    key: str, lease: Lease, entries: Sequence[Entry], some: Some
) -> Iterator[tuple[Target, tuple[Entry, ...]]]:
    """The paths to one peer, with the entries that each rests upon: one for each device that leads there."""
    here, plan = some.here, some.plan
    mtu = min(plan.mtu, lease.attrs.mtu or plan.mtu)
    specs = {here.tunnels.get(len(spec.local)): spec for spec in plan.devices}
    hops = {entry.id: entry for entry in entries if isinstance(entry, NextHop)}
    remotes = {entry.at: entry for entry in entries if isinstance(entry, Fdb)}
    own = {len(address.base): address.base for spec in plan.devices for address in spec.addresses}
    done = set()
    for route in (entry for entry in entries if isinstance(entry, Route)):
        hop = hops.get(route.nexthop)
        device, gateway = (hop.device, hop.gateway) if hop else (route.device, route.gateway)
        address = route.destination.base
        if device in done:
            continue
        done.add(device)
        neighbour = next(
            (each for each in entries if isinstance(each, Neighbour) and each.at == (device, address)), None
        )
        if device in specs and neighbour is not None and (remote := remotes.get((device, neighbour.mac))):
            source = next((each.base for each in specs[device].addresses if len(each.base) == len(address)), None)
            if source is not None:
                target = Target(key, lease.subnets, source, address, remote.remote, device, False, mtu)
                yield target, (route, neighbour, remote)
        elif device == here.link:
            # A host with tunnels has its address in its subnet; one without has none there.
            source = own.get(len(address)) if remotes else some.underlay.address(len(gateway))
            if source is not None:
                address = address if remotes else gateway
                yield Target(key, lease.subnets, source, address, gateway, device, True, mtu), (route,)


def _plain(target: Target) -> bool:
    """Whether the path is the underlay itself, so that there is nothing beside it."""
    return target.address == target.underlay


def _named(target: Target) -> str:
    return f"{format_subnets(target.subnets)} ({format_address(target.underlay)})"

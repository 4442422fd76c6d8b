"""What the devices need around them: kernel settings, and the firewall.

Owns when each of it is seen to, and what the operator hears of it: what was changed, and what is refused. A refusal is
said once, until it is another or was mended.
"""

import queue
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from time import monotonic
from typing import Any

from overlay import firewall, iptables, nft, sysctl
from overlay.causes import DEGRADED, Finding
from overlay.drops import REASONS, Drops, Lately
from overlay.firewall import SAMPLED, Rules
from overlay.reconciler import Plan
from overlay.sysctl import Absent, Change, Ledger, Refused
from subnet_lease.model import format_address
from subnet_lease.pulse import Pulse

LOOK_S = 5.0
"""Seconds between two looks at the tables of iptables-legacy, which announce no changes; each costs 0.3 ms."""

TELL_S = 5.0
"""Seconds between two looks at what was dropped; each costs 0.1 ms."""

SHOWN = 4
"""How many sources of dropped packets one line names."""

LOOKING_S = 600.0
"""Longest that a look around may take: a process for each of others' tables, each of which has its deadline."""


class Surroundings:
    """For the reconciler: `prepare` before any entry is written, `protect` once all are in place; `look_around` then,
    which has a thread of its own: `run` until `stop`.

    `rules_for` gives the firewall rules that a plan calls for. `nftables` None: this host has no nftables, and no use
    for any. What is changed of the kernel's settings goes into `ledger`, for `cleanup` to put back. `questions` opens
    what the firewall's counters are read by; `dropped` gives others' counters, by their reason in `drops`.
    """

    def __init__(
        self,
        rules_for: Callable[[Plan], Rules],
        nftables: nft.Nftables | None,
        ledger: Ledger | None,
        log: Any,
        *,
        questions: Callable[[], nft.Questions] = nft.Questions,
        dropped: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self._rules_for = rules_for
        self._nftables = nftables
        self._ledger = ledger
        self._log = log
        self._questions = questions
        self._dropped = dropped
        self._drops = Drops()
        self._lately = Lately()
        self._refusing: Mapping[str, Sequence[bytes]] = {}
        """What the guard keeps dropping, by the counter, and some of the sources."""
        self._guard = ""
        self._said: set[str] = set()
        self._legacy = iptables.legacy_shape()
        self._looked = monotonic()
        self._asked: queue.SimpleQueue[tuple[Plan, threading.Event] | None] = queue.SimpleQueue()
        self._plan: Plan | None = None
        self._in_the_way: Sequence[firewall.Finding] = ()
        """Others' tables that may drop what is forwarded, as of the latest look around."""
        self._unloaded = ""
        """Why our rules could not be loaded the last time, empty if they were."""
        self._unmended: Sequence[iptables.Outcome] = ()
        """Chains of iptables that are not as wanted, and why they cannot be."""
        self.pulse = Pulse(LOOKING_S, monotonic)

    # --- kernel settings ---

    def prepare(self, plan: Plan) -> None:
        """Kernel settings, and the sets that entries of the firewall go into."""
        self._plan = plan
        for outcome in self._settings(plan):
            match outcome:
                case Change():
                    self._log.info("sysctl_set", name=outcome.name, before=outcome.before, after=outcome.after)
                case Refused():
                    self._once("sysctl_refused", name=outcome.name, reason=outcome.reason, remedy=outcome.remedy)
        if self._ledger and self._ledger.problem:
            self._once("ledger_refused", reason=self._ledger.problem, effect="cleanup will not put settings back")
        self._load(firewall.preparation(self._rules_for(plan)))

    def _settings(self, plan: Plan) -> Iterator[Change | Refused | Absent | None]:
        families = {len(subnet.base) for subnet in plan.subnets}
        if 4 in families:
            yield sysctl.enable_forwarding(ledger=self._ledger)
        if 16 in families:
            yield from sysctl.enable_ipv6_forwarding(plan.underlay, ledger=self._ledger)
        if any(len(spec.local) == 16 and len(address.base) == 4 for spec in plan.devices for address in spec.addresses):
            yield sysctl.honour_path_mtu(ledger=self._ledger)
        for spec in plan.devices:
            yield sysctl.ignore_router_advertisements(spec.name)
            if 4 in families:
                yield sysctl.loosen_reverse_path(spec.name)

    # --- the firewall ---

    def disturbed(self) -> bool:
        """Whether somebody changed what announces no changes; cheap enough to be asked before every pass."""
        if monotonic() < self._looked + LOOK_S:
            return False
        self._looked = monotonic()
        return iptables.legacy_shape() != self._legacy

    def protect(self, plan: Plan) -> None:
        """The rules themselves, which would keep out what is not in the sets yet; and the way through others' rules."""
        rules = self._rules_for(plan)
        self._load(firewall.ruleset(rules))
        versions: Collection[int] = ()
        with self._said_once("firewall_refused"):
            versions = self._nftables.forward_versions() if self._nftables else ()
        outcomes = iptables.ensure(rules.blocks, versions)
        self._unmended = [outcome for outcome in outcomes if outcome.error]
        for outcome in outcomes:
            if outcome.error:
                self._once("forward_refused", program=outcome.program, reason=outcome.error)
            else:
                self._log.info("forward_accepted", program=outcome.program, blocks=list(map(str, rules.blocks)))
        self._legacy = iptables.legacy_shape()

    def look_around(self, plan: Plan) -> None:
        """Have `run` see what may be in the way and is not ours to change. It costs some processes; nobody waits."""
        self._asked.put((plan, threading.Event()))

    def refresh(self, seconds: float) -> None:
        """Have a look taken now, and wait for it, but no longer than so many seconds. From any thread."""
        if self._plan is not None:
            done = threading.Event()
            self._asked.put((self._plan, done))
            done.wait(seconds)

    def run(self) -> None:
        """Do what `look_around` asks for, and tell of what is dropped."""
        while True:
            with self._said_once("firewall_refused"):
                self._tell_drops()
            self.pulse.rest(TELL_S)
            try:
                asked = self._asked.get(timeout=TELL_S)
            except queue.Empty:
                continue
            finally:
                self.pulse.work()
            if asked is None:
                return
            plan, done = asked
            self._guard = self._rules_for(plan).guard
            with self._said_once("firewall_refused"):
                self._in_the_way = nft.findings(self._rules_for(plan).blocks)
                for finding in self._in_the_way:
                    self._once("forward_may_drop", what=finding.what, remedy=finding.remedy)
            done.set()

    def _tell_drops(self) -> None:
        """A line on each reason by which more was dropped than was told. Sources may be of packets before those."""
        # With a socket of its own: the other is the reconciler's.
        with closing(self._questions()) as questions:
            counted, now = questions.counters(), monotonic()
            self._lately.look({reason: counted[reason] for reason in SAMPLED if reason in counted}, now)
            self._refusing = {reason: questions.sources(reason)[:SHOWN] for reason in self._lately.rising(now)}
            for reason, number in self._drops.look({**self._dropped(), **counted}, now):
                things, meaning, see = REASONS[reason]
                facts: dict[str, object] = {"reason": reason, things: number, "meaning": meaning}
                if reason in SAMPLED:
                    with suppress(nft.NftFailed):
                        facts["sources"] = [format_address(each) for each in questions.sources(reason)[:SHOWN]]
                let_in = reason in SAMPLED and self._guard == "log"
                self._log.warning(f"{things}_{'suspected' if let_in else 'dropped'}", **facts, see=see)

    def stop(self) -> None:
        """End `run`."""
        self._asked.put(None)

    def _load(self, ruleset: str) -> None:
        if self._nftables is not None and ruleset:
            try:
                self._nftables.apply(ruleset)
                self._unloaded = ""
            except nft.NftFailed as error:
                self._unloaded = str(error)
                self._once("firewall_refused", reason=self._unloaded)

    @contextmanager
    def _said_once(self, event: str) -> Iterator[None]:
        """A failure of nftables within the block is told, and stops nothing else."""
        try:
            yield
        except nft.NftFailed as error:
            self._once(event, reason=str(error))

    # --- findings ---

    def findings(self) -> Iterator[Finding]:
        """What is in the way of forwarding now: settings are read, all else is as it was last seen. From any thread."""
        plan = self._plan
        if plan is None:
            return
        yield from self._settings_amiss(plan)
        network = " and ".join(map(str, self._rules_for(plan).blocks))
        for found in self._in_the_way:
            # By its shape alone: what other rules of it let pass, only a packet shows.
            values = {"network": network, "command": "nft list ruleset"}
            evidence = (found.what,)
            yield Finding("forward_drop", "", evidence, values, found.what, f"`{found.remedy}`", DEGRADED)
        for outcome in self._unmended:
            told = f"chain FORWARD of {outcome.program} may drop pods' packets: {outcome.error}"
            yield Finding("forward_drop", "", (told,), {"network": network}, told, severity=DEGRADED)
        if self._unloaded:
            yield Finding("entries_refused", "", (self._unloaded,), what="the firewall's rules cannot be loaded")
        for reason, sources in self._refusing.items() if self._guard == "on" else ():
            told = " and ".join(map(format_address, sources)) or "sources that are not known"
            values = {"source": told, "port": str(self._rules_for(plan).port)}
            yield Finding("guard_drops", "", (f"{reason}: {REASONS[reason].meaning}; of {told}",), values)

    def _settings_amiss(self, plan: Plan) -> Iterator[Finding]:
        families = {len(subnet.base) for subnet in plan.subnets}
        for family, name in ((4, "net.ipv4.ip_forward"), (16, "net.ipv6.conf.all.forwarding")):
            if family in families and (value := sysctl.read(name)) == "0":
                values = {"setting": name, "value": value, "wanted": "1"}
                yield Finding("forwarding_off", evidence=(f"{name} = {value}",), values=values)
        for spec in plan.devices if 4 in families else ():
            if (strict := sysctl.strict_reverse_path(spec.name)) is not None:
                values = {"setting": strict, "interface": spec.name}
                evidence = f"{strict} is strict on {spec.name}, and no setting loosens it"
                yield Finding("rp_filter", spec.name, (evidence,), values)

    def _once(self, event: str, **facts: object) -> None:
        key = f"{event} {facts}"
        if key not in self._said:
            self._said.add(key)
            self._log.error(event, **facts)

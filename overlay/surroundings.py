"""What the devices need around them: kernel settings, and the firewall.

Owns when each of it is seen to, and what the operator hears of it: what was changed, and what is refused. A refusal is
said once, until it is another or was mended.
"""

import queue
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from time import monotonic
from typing import Any

from overlay import firewall, iptables, nft, sysctl
from overlay.drops import REASONS, Drops
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
        self._guard = ""
        self._said: set[str] = set()
        self._legacy = iptables.legacy_shape()
        self._looked = monotonic()
        self._asked: queue.SimpleQueue[Plan | None] = queue.SimpleQueue()
        self.pulse = Pulse(LOOKING_S, monotonic)

    # --- kernel settings ---

    def prepare(self, plan: Plan) -> None:
        """Kernel settings, and the sets that entries of the firewall go into."""
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
        for outcome in iptables.ensure(rules.blocks, versions):
            if outcome.error:
                self._once("forward_refused", program=outcome.program, reason=outcome.error)
            else:
                self._log.info("forward_accepted", program=outcome.program, blocks=list(map(str, rules.blocks)))
        self._legacy = iptables.legacy_shape()

    def look_around(self, plan: Plan) -> None:
        """Have `run` see what may be in the way and is not ours to change. It costs some processes; nobody waits."""
        self._asked.put(plan)

    def run(self) -> None:
        """Do what `look_around` asks for, and tell of what is dropped."""
        while True:
            with self._said_once("firewall_refused"):
                self._tell_drops()
            self.pulse.rest(TELL_S)
            try:
                plan = self._asked.get(timeout=TELL_S)
            except queue.Empty:
                continue
            finally:
                self.pulse.work()
            if plan is None:
                return
            self._guard = self._rules_for(plan).guard
            with self._said_once("firewall_refused"):
                for finding in nft.findings(self._rules_for(plan).blocks):
                    self._once("forward_may_drop", what=finding.what, remedy=finding.remedy)

    def _tell_drops(self) -> None:
        """A line on each reason by which more was dropped than was told. Sources may be of packets before those."""
        # With a socket of its own: the other is the reconciler's.
        with closing(self._questions()) as questions:
            for reason, number in self._drops.look({**self._dropped(), **questions.counters()}, monotonic()):
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
            with self._said_once("firewall_refused"):
                self._nftables.apply(ruleset)

    @contextmanager
    def _said_once(self, event: str) -> Iterator[None]:
        """A failure of nftables within the block is told, and stops nothing else."""
        try:
            yield
        except nft.NftFailed as error:
            self._once(event, reason=str(error))

    def _once(self, event: str, **facts: object) -> None:
        key = f"{event} {facts}"
        if key not in self._said:
            self._said.add(key)
            self._log.error(event, **facts)

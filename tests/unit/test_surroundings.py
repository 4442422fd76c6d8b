"""What the operator hears of the surroundings, over edges that say what the test says."""

from typing import Any, cast

import pytest
import structlog
from structlog.testing import capture_logs

from overlay import iptables, nft, surroundings
from overlay.firewall import Finding, Rules
from overlay.iptables import Outcome
from overlay.reconciler import Plan
from overlay.surroundings import LOOK_S, Surroundings
from subnet_lease.model import Prefix

BLOCK = Prefix.parse("10.0.0.0/8")
PLAN = Plan((Prefix.parse("10.0.1.0/24"),), (), "eth0", 1500)
RULES = Rules((BLOCK,), PLAN.subnets, ("flannel.1",), guard="on")


class Tables:
    """Stands for `nft.Nftables`; `failure` is raised by every call."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.failure: nft.NftFailed | None = None

    def apply(self, ruleset: str) -> None:
        self._fail()
        self.loaded.append(ruleset)

    def forward_versions(self) -> frozenset[int]:
        self._fail()
        return frozenset({4})

    def _fail(self) -> None:
        if self.failure:
            raise self.failure


@pytest.fixture
def tables() -> Tables:
    return Tables()


@pytest.fixture
def made(tables: Tables) -> Surroundings:
    return Surroundings(lambda _: RULES, cast("nft.Nftables", tables), None, structlog.get_logger())


def said(made: Surroundings, times: int = 1) -> list[tuple[str, Any]]:
    with capture_logs() as logs:
        for _ in range(times):
            made.protect(PLAN)
            made.look_around(PLAN)
            made.stop()
            made.run()
    return [(line["event"], line.get("reason") or line.get("program") or line.get("what")) for line in logs]


def test_what_was_mended_is_told_each_time_and_what_cannot_be_mended_once(
    made: Surroundings, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def ensure(blocks: Any, versions: Any) -> list[Outcome]:
        asked.append((blocks, versions))
        return [Outcome("iptables-nft"), Outcome("iptables-legacy", "the program is not installed")]

    monkeypatch.setattr(iptables, "ensure", ensure)
    monkeypatch.setattr(nft, "findings", lambda _: [Finding("a chain that drops", "nft insert rule")])
    mended, beyond = ("forward_accepted", "iptables-nft"), ("forward_may_drop", "a chain that drops")
    assert said(made, 2) == [mended, ("forward_refused", "the program is not installed"), beyond, mended]
    assert asked == [((BLOCK,), frozenset({4}))] * 2
    assert len(tables.loaded) == 2


def test_an_nftables_that_fails_is_told_once_and_keeps_nothing_else_from_being_done(
    made: Surroundings, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(iptables, "ensure", lambda *arguments: asked.append(arguments) or [])

    def fails(_: object) -> list[Finding]:
        raise nft.NftFailed("nft did not finish")

    monkeypatch.setattr(nft, "findings", fails)
    tables.failure = nft.NftFailed("nfnetlink: timed out")
    assert said(made, 2) == [("firewall_refused", "nfnetlink: timed out"), ("firewall_refused", "nft did not finish")]
    assert asked == [((BLOCK,), ())] * 2


def test_legacy_tables_are_looked_at_seldom(made: Surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    now = surroundings.monotonic()
    looked: list[None] = []
    monkeypatch.setattr(iptables, "legacy_shape", lambda: looked.append(None) or (b"changed",))
    monkeypatch.setattr(surroundings, "monotonic", lambda: now)
    assert not made.disturbed() and not looked
    now += LOOK_S + 1
    assert made.disturbed() and not made.disturbed()
    assert len(looked) == 1

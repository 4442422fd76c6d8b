"""What the operator hears of the surroundings, over edges that say what the test says."""

import threading
from dataclasses import replace
from typing import Any, cast

import pytest
import structlog
from structlog.testing import capture_logs

from overlay import causes, iptables, nft, surroundings
from overlay.cluster_hosts import wait_until
from overlay.drops import CROWDED
from overlay.firewall import STRANGERS, Finding, Rules
from overlay.iptables import Outcome
from overlay.reconciler import Plan
from overlay.surroundings import LOOK_S, Surroundings
from subnet_lease.model import Prefix

BLOCK = Prefix.parse("10.0.0.0/8")
PLAN = Plan((Prefix.parse("10.0.1.0/24"),), (), "eth0", 1500)
RULES = Rules((BLOCK,), PLAN.subnets, ("flannel.1",), guard="on")


class Tables:
    """Stands for `nft.Nftables`, and for `nft.Questions`; `failure` is raised by every call of the former."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.counted: dict[str, int] = {}
        self.failure: nft.NftFailed | None = None

    def apply(self, ruleset: str) -> None:
        self._fail()
        self.loaded.append(ruleset)

    def forward_versions(self) -> frozenset[int]:
        self._fail()
        return frozenset({4})

    def counters(self) -> dict[str, int]:
        return self.counted

    def sources(self, counter: str) -> list[bytes]:
        return [bytes((172, 30, 0, number)) for number in range(1, 9)]

    def close(self) -> None:
        pass

    def _fail(self) -> None:
        if self.failure:
            raise self.failure


@pytest.fixture
def tables() -> Tables:
    return Tables()


@pytest.fixture
def made(tables: Tables) -> Surroundings:
    return surroundings_of(tables, RULES)


def surroundings_of(tables: Tables, rules: Rules, dropped: dict[str, int] | None = None) -> Surroundings:
    return Surroundings(
        lambda _: rules,
        cast("nft.Nftables", tables),
        None,
        structlog.get_logger(),
        questions=lambda: cast("nft.Questions", tables),
        dropped=lambda: dropped or {},
    )


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


@pytest.mark.parametrize(("guard", "event"), [("on", "packets_dropped"), ("log", "packets_suspected")])
def test_what_is_dropped_is_told_with_its_reason_and_sources(
    tables: Tables, monkeypatch: pytest.MonkeyPatch, guard: str, event: str
) -> None:
    monkeypatch.setattr(nft, "findings", lambda _: [])
    dropped = {CROWDED: 0}
    made = surroundings_of(tables, replace(RULES, guard=guard), dropped)
    monkeypatch.setattr(surroundings, "TELL_S", 0.01)
    with capture_logs() as logs:
        made.look_around(PLAN)
        thread = threading.Thread(target=made.run)
        thread.start()
        wait_until(lambda: not made._asked.qsize(), what="the first look")
        tables.counted, dropped[CROWDED] = {STRANGERS: 3}, 2
        wait_until(lambda: len(logs) == 2, what="both lines")
        made.stop()
        thread.join(10)
    assert not thread.is_alive()
    by_event = {line["event"]: line for line in logs}
    assert by_event[event]["packets"] == 3 and by_event[event]["reason"] == STRANGERS
    assert by_event[event]["sources"] == [f"172.30.0.{number}" for number in range(1, 5)]
    assert by_event["connections_dropped"]["connections"] == 2 and "sources" not in by_event["connections_dropped"]


# --- findings ----------------------------------------------------------------------------------------------------


def causes_of(made: Surroundings) -> list[tuple[str, str]]:
    return [(found.cause, causes.severity(found)) for found in made.findings()]


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The kernel's settings, as those of a host in order."""
    found = {"net.ipv4.ip_forward": "1", "net.ipv4.conf.all.rp_filter": "0"}
    monkeypatch.setattr(surroundings.sysctl, "read", lambda name, root=None: found.get(name))
    monkeypatch.setattr(Surroundings, "_settings", lambda self, plan: iter(()))
    monkeypatch.setattr(iptables, "ensure", lambda blocks, versions: [])
    monkeypatch.setattr(nft, "findings", lambda blocks: [])
    return found


def test_nothing_is_found_before_there_is_a_plan_and_on_a_host_in_order(
    made: Surroundings, settings: dict[str, str]
) -> None:
    settings["net.ipv4.ip_forward"] = "0"
    assert causes_of(made) == []
    made.refresh(0)
    settings["net.ipv4.ip_forward"] = "1"
    made.prepare(PLAN)
    made.protect(PLAN)
    assert causes_of(made) == []


def test_forwarding_that_is_off_is_found_whenever_it_is_switched_off(
    made: Surroundings, settings: dict[str, str]
) -> None:
    made.prepare(PLAN)
    settings["net.ipv4.ip_forward"] = "0"
    assert causes_of(made) == [("forwarding_off", "down")]


def test_rules_that_cannot_be_loaded_are_found_until_they_are(
    made: Surroundings, tables: Tables, settings: dict[str, str]
) -> None:
    made.prepare(PLAN)
    tables.failure = nft.NftFailed("no")
    made.protect(PLAN)
    assert causes_of(made) == [("entries_refused", "degraded")]
    tables.failure = None
    made.protect(PLAN)
    assert causes_of(made) == []


def test_chains_that_cannot_be_mended_are_found_until_they_are(
    made: Surroundings, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made.prepare(PLAN)
    monkeypatch.setattr(iptables, "ensure", lambda blocks, versions: [Outcome("iptables-legacy", "no such program")])
    made.protect(PLAN)
    assert causes_of(made) == [("forward_drop", "degraded")]
    monkeypatch.setattr(iptables, "ensure", lambda blocks, versions: [])
    made.protect(PLAN)
    assert causes_of(made) == []


def test_look_that_was_asked_for_is_waited_for_and_tells_what_is_now(
    made: Surroundings, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made.prepare(PLAN)
    thread = threading.Thread(target=made.run)
    thread.start()
    monkeypatch.setattr(nft, "findings", lambda blocks: [Finding("a table may drop", "nft this")])
    made.refresh(10)
    (found,) = made.findings()
    assert (found.cause, causes.severity(found), causes.remedy(found)) == ("forward_drop", "degraded", "`nft this`")
    monkeypatch.setattr(nft, "findings", lambda blocks: [])
    made.refresh(10)
    assert causes_of(made) == []
    made.stop()
    thread.join()

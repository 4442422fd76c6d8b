"""The firewall's edges against a real kernel: elements, dumps, counters, the monitor, the FORWARD chains of iptables.

Oracles: pyroute2, which decodes what we send and encodes what we read, and `nft`, which does the same in text.
"""

import json
import select
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyroute2.netlink.nfnetlink.nftsocket import nft_set_elem_list_msg

from overlay import firewall, iptables, nfnl, nft, rtnl
from overlay.firewall import Rules
from overlay.iptables import Outcome
from overlay.nft import Nftables, NftFailed, Seen, TableGone
from subnet_lease.model import Prefix, pack_address
from tests.netns.firewall_table import complete
from tests.netns.namespace import new_namespace, sh

pytestmark = pytest.mark.netns

V4, V6 = Prefix.parse("10.0.0.0/8"), Prefix.parse("fd00::/48")
BLOCKS = (V4, V6)
RULES = Rules(BLOCKS, (), ("flannel.1", "flannel-v6.1"), masquerade=True)
HOST4, HOST6, OTHER = (pack_address(text) for text in ("172.30.0.1", "fd99::1", "172.30.0.2"))
MANY = 15_000
PROGRAMS = ("iptables-legacy", "ip6tables-legacy", "iptables-nft", "ip6tables-nft")


@pytest.fixture
def nftables() -> Iterator[Nftables]:
    """In a namespace without any rules."""
    with new_namespace():
        made = Nftables()
        yield made
        made.close()


@pytest.fixture
def table(nftables: Nftables) -> Nftables:
    """With our table, which has two elements."""
    nftables.apply(complete(RULES, [HOST4, HOST6]))
    return nftables


def elements(name: str) -> set[bytes]:
    """The elements of a set of ours, as `nft` shows them."""
    listed = json.loads(sh("nft", "-j", "list", "set", *firewall.TABLE.split(), name))["nftables"]
    (found,) = [entry["set"] for entry in listed if "set" in entry]
    return {pack_address(text) for text in found.get("elem", [])}


def addresses(count: int, family: str = "100.64.0.0") -> list[bytes]:
    """That many addresses, which begin as `family` does."""
    return [pack_address(family)[:-2] + number.to_bytes(2, "big") for number in range(count)]


# --- the rule set ---


@pytest.mark.parametrize("guard", ["on", "log", "off"])
def test_ruleset_loads_twice_and_is_removed_without_a_trace(nftables: Nftables, guard: str) -> None:
    exceptions = (Prefix.parse("0.0.0.0/0"), Prefix.parse("192.168.0.0/16"), Prefix.parse("fc00::/7"))
    rules = Rules(BLOCKS, BLOCKS, ("flannel.1",), 4789, True, exceptions, guard)
    nft.apply(complete(rules, [HOST4, HOST6]))
    once = sh("nft", "list", "ruleset")
    nft.apply(complete(rules, [HOST4, HOST6]))
    assert sh("nft", "list", "ruleset") == once
    assert nftables.has_table()
    nft.apply(firewall.removal())
    nft.apply(firewall.removal())
    assert sh("nft", "list", "ruleset") == ""
    assert not nftables.has_table()


def test_refused_ruleset_is_one_clause_and_changes_nothing(table: Nftables) -> None:
    before = sh("nft", "list", "ruleset")
    with pytest.raises(NftFailed, match=r"^nft refused the ruleset: [^\n]+$"):
        table.apply("delete table inet overlay_agent\nnonsense\n")
    assert sh("nft", "list", "ruleset") == before


def test_missing_nft_is_named(nftables: Nftables, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NftFailed, match="package nftables"):
        nftables.apply(firewall.removal())
    assert nft.findings(BLOCKS) == []


# --- elements ---


def test_elements_come_and_go_as_nft_shows_them(table: Nftables) -> None:
    table.put([OTHER])
    assert elements("peers4") == {HOST4, OTHER}
    table.put([], [HOST4, HOST6])
    assert (elements("peers4"), elements("peers6")) == ({OTHER}, set())
    table.put([HOST4, HOST6], [OTHER])
    assert (elements("peers4"), elements("peers6")) == ({HOST4}, {HOST6})
    assert table.dump() == {HOST4, HOST6}


def test_what_is_so_already_is_no_failure(table: Nftables) -> None:
    table.put([HOST4, HOST4, HOST6])
    table.put([], [OTHER])
    table.put([OTHER], [OTHER])
    table.put([], [])
    assert table.dump() == {HOST4, HOST6}


def test_absent_element_to_be_removed_does_not_hold_up_the_rest(table: Nftables) -> None:
    table.put([pack_address("172.30.0.9")], [OTHER, HOST4])
    assert table.dump() == {pack_address("172.30.0.9"), HOST6}


def test_no_program_is_run_but_for_whole_rule_sets(
    table: Nftables, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sh("nft", "add element inet overlay_agent peers4 { 172.30.0.9 }")
    monkeypatch.setenv("PATH", str(tmp_path))
    table.put([OTHER], [HOST6])
    assert table.observe().elements == {pack_address("172.30.0.9"): True}
    assert table.dump() == {HOST4, OTHER, pack_address("172.30.0.9")}
    assert (table.has_table(), table.forward_versions()) == (True, frozenset())
    assert set(table.counters()) == set(firewall.COUNTERS)


def test_thousands_of_both_families_fit_one_transaction(table: Nftables) -> None:
    before = json.loads(sh("nft", "-j", "list", "tables"))
    wanted = {*addresses(MANY), *addresses(MANY, "fd64::")}
    table.put(wanted, [HOST4, HOST6])
    assert table.dump() == wanted
    assert table.observe() == Seen()
    table.put([HOST4], wanted)
    assert table.dump() == {HOST4}
    assert json.loads(sh("nft", "-j", "list", "tables")) == before


def test_dump_is_complete_however_soon_it_follows(table: Nftables) -> None:
    for count in range(100, 6000, 100):
        table.put(addresses(count), [HOST4, HOST6])
        assert len(table.dump()) == count


def test_more_than_fits_is_refused_as_that_and_changes_nothing(
    nftables: Nftables, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firewall, "SET_SIZE", 100)
    nftables.apply(complete(RULES, [HOST4]))
    with pytest.raises(NftFailed, match="more of them than a set has room for"):
        nftables.put([HOST6, *addresses(100)])
    assert nftables.dump() == {HOST4}
    nftables.put(addresses(99))
    assert len(nftables.dump()) == 100


def test_refused_batch_changes_nothing(table: Nftables) -> None:
    nft.apply("flush table inet overlay_agent\ndelete set inet overlay_agent peers6\n")
    with pytest.raises(TableGone):
        table.put([OTHER, HOST6])
    assert elements("peers4") == {HOST4}


def test_table_that_is_gone_is_told_apart(nftables: Nftables) -> None:
    for act in (lambda: nftables.put([HOST4]), lambda: nftables.put([], [HOST4]), nftables.dump):
        with pytest.raises(TableGone):
            act()
    assert nftables.counters() == {}
    nftables.apply(complete(RULES))
    nftables.put([HOST4])
    assert nftables.dump() == {HOST4}


def test_counters_are_read_by_name(table: Nftables) -> None:
    assert table.counters() == dict.fromkeys(firewall.COUNTERS, 0)
    nft.apply("add counter inet overlay_agent other { packets 5 bytes 300 }\n")
    assert table.counters()["other"] == 5


@pytest.mark.parametrize(("name", "members"), [("peers4", [HOST4]), ("peers6", [HOST6])])
def test_batch_is_byte_for_byte_what_pyroute2_builds(name: str, members: list[bytes]) -> None:
    theirs = nft_set_elem_list_msg()
    theirs["nfgen_family"] = 1
    theirs["header"].update(type=10 << 8 | 12, flags=0x405, sequence_number=6)
    listed = [{"attrs": [("NFTA_SET_ELEM_KEY", {"attrs": [("NFTA_DATA_VALUE", each)]})]} for each in members]
    theirs["attrs"] = [
        ("NFTA_SET_ELEM_LIST_TABLE", firewall.NAME),
        ("NFTA_SET_ELEM_LIST_SET", name),
        ("NFTA_SET_ELEM_LIST_ELEMENTS", listed),
    ]
    theirs.encode()
    buffer = nfnl.batch(members, [], 5, 6)
    _, change, _ = rtnl.messages(buffer)
    ours = buffer[change.body - rtnl.HEADER.size : change.end]
    # NLA_F_NESTED, which pyroute2 does not set and the kernel does not ask for.
    for kind in (1, 3):
        ours = ours.replace(struct.pack("=H", 0x8000 | kind), struct.pack("=H", kind))
    assert ours == bytes(theirs.data)


# --- the monitor ---


def test_own_changes_are_not_seen(table: Nftables) -> None:
    assert table.observe() == Seen()
    table.put([OTHER])
    table.put([], [HOST4])
    table.apply(complete(RULES, addresses(500)))
    assert select.select([table], [], [], 0)[0] == []
    assert table.observe() == Seen()


def test_elements_changed_by_others_are_seen_with_the_program(table: Nftables) -> None:
    sh(
        "nft",
        "add element inet overlay_agent peers4 { 172.30.0.2 }; delete element inet overlay_agent peers6 { fd99::1 }",
    )
    assert table.observe() == Seen(elements={OTHER: True, HOST6: False}, programs=("nft",))
    assert table.observe() == Seen()


def test_last_word_on_an_element_counts(table: Nftables) -> None:
    sh("nft", "delete element inet overlay_agent peers4 { 172.30.0.1 }")
    sh("nft", "add element inet overlay_agent peers4 { 172.30.0.1 }")
    assert table.observe().elements == {HOST4: True}


def test_emptied_set_tells_of_each_element(table: Nftables) -> None:
    table.put(addresses(1000))
    sh("nft", "flush set inet overlay_agent peers4")
    assert table.observe().elements == dict.fromkeys([HOST4, *addresses(1000)], False)


@pytest.mark.parametrize(
    "command",
    [
        "flush ruleset",
        "delete table inet overlay_agent",
        "flush chain inet overlay_agent tunnel",
        "insert rule inet overlay_agent guard accept",
        "add chain inet overlay_agent more",
        "flush table inet overlay_agent; delete chain inet overlay_agent guard",
    ],
)
def test_table_altered_by_others_is_seen_at_once(table: Nftables, command: str) -> None:
    sh("nft", command)
    assert select.select([table], [], [], 10)[0] == [table]
    seen = table.observe()
    assert (seen.altered, seen.programs, seen.lost) == (True, ("nft",), False)
    table.apply(complete(RULES, [HOST4]))
    assert table.observe() == Seen()
    assert table.dump() == {HOST4}


def test_what_was_done_to_a_table_is_forgotten_with_it(table: Nftables) -> None:
    sh("iptables-nft", "-P", "FORWARD", "DROP")
    sh("nft", "add element inet overlay_agent peers4 { 172.30.0.2 }; flush chain inet overlay_agent tunnel")
    table.apply(complete(RULES, [HOST4]))
    sh("nft", "add element inet overlay_agent peers6 { fd99::1 }")
    seen = table.observe()
    assert (seen.elements, seen.altered, seen.forward) == ({HOST6: True}, False, {4})


def test_tables_of_others_are_none_of_our_business(table: Nftables) -> None:
    sh("nft", "add table inet theirs; add chain inet theirs FORWARD; add rule inet theirs FORWARD accept")
    sh("iptables-nft", "-A", "INPUT", "-j", "ACCEPT")
    sh("iptables-nft", "-t", "nat", "-N", "FORWARD-MORE")
    assert table.observe() == Seen()


@pytest.mark.parametrize(("program", "version"), [("iptables-nft", 4), ("ip6tables-nft", 6)])
def test_changes_of_the_forward_chain_of_iptables_are_seen(table: Nftables, program: str, version: int) -> None:
    assert table.forward_versions() == frozenset()
    sh(program, "-P", "FORWARD", "DROP")
    assert table.forward_versions() == {version}
    assert table.observe() == Seen(forward=frozenset({version}), programs=(program,))
    sh(program, "-A", "FORWARD", "-j", "DROP")
    assert table.observe().forward == {version}
    sh(program, "-F", "FORWARD")
    assert table.observe().forward == {version}
    sh("nft", "flush ruleset")
    assert table.observe().forward == {version}
    assert table.forward_versions() == frozenset()


def test_more_than_can_be_held_is_told_as_lost(table: Nftables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nft, "BUFFER", 4096)
    small = Nftables()
    try:
        table.put(addresses(1000))
        assert small.observe().lost
        assert small.observe() == Seen()
        assert small.dump() == {HOST4, HOST6, *addresses(1000)}
    finally:
        small.close()


# --- the FORWARD chains of iptables ---


def forward_rules(program: str) -> list[str]:
    return sh(program, "-S").splitlines()


@pytest.fixture
def dropping(nftables: Nftables) -> Nftables:
    """All four FORWARD chains drop by policy, as Docker leaves them."""
    for program in PROGRAMS:
        sh(program, "-P", "FORWARD", "DROP")
    nftables.observe()
    return nftables


def test_nothing_is_made_where_iptables_is_not_used(nftables: Nftables) -> None:
    assert nftables.forward_versions() == frozenset()
    assert iptables.missing(BLOCKS, nftables.forward_versions()) == []
    assert iptables.ensure(BLOCKS, nftables.forward_versions()) == []
    assert iptables.legacy_shape() == ()
    assert sh("nft", "list", "ruleset") == ""
    assert Path("/proc/thread-self/net/ip_tables_names").read_text() == ""
    assert Path("/proc/thread-self/net/ip6_tables_names").read_text() == ""


def test_every_forward_chain_gets_its_jump_once(dropping: Nftables) -> None:
    for program in PROGRAMS:
        sh(program, "-A", "FORWARD", "-j", "DROP")
    all_of_them = [Outcome(program) for program in PROGRAMS]
    assert iptables.missing(BLOCKS, (4, 6)) == all_of_them
    assert iptables.ensure(BLOCKS, dropping.forward_versions()) == all_of_them
    assert iptables.ensure(BLOCKS, dropping.forward_versions()) == []
    assert iptables.missing(BLOCKS, (4, 6)) == []
    for program in PROGRAMS:
        block = V4 if program.startswith("iptables") else V6
        assert forward_rules(program) == [
            "-P INPUT ACCEPT",
            "-P FORWARD DROP",
            "-P OUTPUT ACCEPT",
            "-N OVERLAY-AGENT-FWD",
            "-A FORWARD -j OVERLAY-AGENT-FWD",
            "-A FORWARD -j DROP",
            f"-A OVERLAY-AGENT-FWD -s {block} -j ACCEPT",
            f"-A OVERLAY-AGENT-FWD -d {block} -j ACCEPT",
        ]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    "harm",
    [
        ["-F"],
        ["-F", "OVERLAY-AGENT-FWD"],
        ["-D", "FORWARD", "-j", "OVERLAY-AGENT-FWD"],
        ["-I", "FORWARD", "-j", "OVERLAY-AGENT-FWD"],
        ["-I", "OVERLAY-AGENT-FWD", "-j", "DROP"],
    ],
    ids=" ".join,
)
def test_jump_and_chain_come_back_whatever_was_done_to_them(dropping: Nftables, program: str, harm: list[str]) -> None:
    iptables.ensure(BLOCKS, (4, 6))
    wanted = forward_rules(program)
    sh(program, *harm)
    assert iptables.missing(BLOCKS, (4, 6)) == [Outcome(program)]
    assert iptables.ensure(BLOCKS, (4, 6)) == [Outcome(program)]
    assert forward_rules(program) == wanted


def test_rules_put_above_ours_are_left_where_they_are(dropping: Nftables) -> None:
    iptables.ensure(BLOCKS, (4, 6))
    for program in PROGRAMS:
        sh(program, "-N", "DOCKER-USER")
        sh(program, "-I", "FORWARD", "-j", "DOCKER-USER")
    assert iptables.ensure(BLOCKS, (4, 6)) == []


def test_other_network_replaces_the_rules_of_the_one_before(dropping: Nftables) -> None:
    iptables.ensure(BLOCKS, (4, 6))
    other = Prefix.parse("100.64.0.0/10")
    assert iptables.ensure((other,), (4, 6)) == [Outcome(program) for program in PROGRAMS]
    assert [line for line in forward_rules("iptables-nft") if "FWD -" in line] == [
        "-A OVERLAY-AGENT-FWD -s 100.64.0.0/10 -j ACCEPT",
        "-A OVERLAY-AGENT-FWD -d 100.64.0.0/10 -j ACCEPT",
    ]
    assert not any("OVERLAY" in line for line in forward_rules("ip6tables-legacy"))


def test_without_blocks_everything_of_ours_goes_and_nothing_else(dropping: Nftables) -> None:
    for program in PROGRAMS:
        sh(
            program,
            "-A",
            "FORWARD",
            "-s",
            "192.0.2.1" if program.startswith("iptables") else "2001:db8::1",
            "-j",
            "DROP",
        )
    before = [forward_rules(program) for program in PROGRAMS]
    iptables.ensure(BLOCKS, (4, 6))
    assert iptables.ensure((), (4, 6)) == [Outcome(program) for program in PROGRAMS]
    assert [forward_rules(program) for program in PROGRAMS] == before
    assert iptables.ensure((), (4, 6)) == []


def test_shape_of_legacy_tables_changes_with_their_rules(dropping: Nftables) -> None:
    iptables.ensure(BLOCKS, (4, 6))
    settled = iptables.legacy_shape()
    assert len(settled) == 2 and all(settled)
    assert iptables.legacy_shape() == settled
    sh("ip6tables-legacy", "-F")
    assert iptables.legacy_shape() != settled
    iptables.ensure(BLOCKS, (4, 6))
    assert iptables.legacy_shape() == settled


def test_missing_program_is_named_only_where_it_is_needed(
    nftables: Nftables, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sh("ip6tables-nft", "-P", "FORWARD", "DROP")
    monkeypatch.setenv("PATH", str(tmp_path))
    (outcome,) = iptables.ensure(BLOCKS, nftables.forward_versions())
    assert outcome.program == "ip6tables-nft"
    assert "which is not installed here (package iptables)" in outcome.error
    assert iptables.missing(BLOCKS, nftables.forward_versions()) == [outcome]


def test_program_without_a_kind_in_its_name_serves_the_kind_it_is_of(
    dropping: Nftables, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    multi = shutil.which("xtables-nft-multi")
    assert multi is not None
    for name in ("iptables", "iptables-restore", "ip6tables", "ip6tables-restore"):
        (tmp_path / name).symlink_to(multi)
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(tmp_path))
        outcomes = iptables.ensure(BLOCKS, dropping.forward_versions())
    assert [(outcome.program, bool(outcome.error)) for outcome in outcomes] == [
        ("iptables-legacy", True), ("ip6tables-legacy", True), ("iptables-nft", False), ("ip6tables-nft", False),
    ]  # fmt: skip
    assert "-A FORWARD -j OVERLAY-AGENT-FWD" in forward_rules("iptables-nft")


def test_chain_that_iptables_cannot_change_is_told(nftables: Nftables) -> None:
    nft.apply("table ip filter { chain FORWARD { type filter hook forward priority 7; meta mark 1-7 accept; }; }\n")
    (outcome,) = iptables.ensure(BLOCKS, nftables.forward_versions())
    assert outcome.program == "iptables-nft"
    assert " failed: " in outcome.error


# --- what others have in the way ---


def test_remedy_that_is_told_is_the_one_that_helps(nftables: Nftables) -> None:
    nft.apply(
        "table inet fw { chain forward { type filter hook forward priority 0; policy drop; }; }\n"
        "table ip strict { chain f { type filter hook forward priority 5; ct state established accept; reject; }; }\n"
        "table inet harmless { chain f { type filter hook forward priority 0; policy accept; }; }\n"
        "table inet local { chain i { type filter hook input priority 0; policy drop; }; }\n"
    )
    sh("iptables-nft", "-P", "FORWARD", "DROP")
    found = nft.findings(BLOCKS)
    assert [finding.what.partition(";")[0] for finding in found] == [
        "chain forward of the nftables table inet fw has the policy drop",
        "chain f of the nftables table ip strict ends by refusing everything",
    ]
    for finding in found:
        sh("sh", "-c", finding.remedy)
    assert nft.findings(BLOCKS) == []

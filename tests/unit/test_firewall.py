"""The texts, and what is read out of others' rule sets; what they do to packets is tested in network namespaces."""

import re
from dataclasses import replace
from typing import Any

import pytest

from overlay import firewall
from overlay.firewall import (
    TABLE,
    Finding,
    Rules,
    forward_findings,
    forward_tables,
    preparation,
    removal,
    ruleset,
)
from subnet_lease.model import Prefix

V4, V6 = Prefix.parse("10.0.0.0/8"), Prefix.parse("fd00::/48")
DUAL = Rules(
    blocks=(V4, V6),
    subnets=(Prefix.parse("10.0.1.0/24"), Prefix.parse("fd00:0:0:1::/64")),
    devices=("flannel.7", "flannel-v6.7"),
    port=4789,
    masquerade=True,
    exceptions=(Prefix.parse("192.168.0.0/16"), Prefix.parse("fc00::/7"), Prefix.parse("0.0.0.0/0")),
)
ONE = Rules((V4,), (Prefix.parse("10.0.1.0/24"),), ("flannel.1",), masquerade=True)


def rules_of(text: str, chain: str) -> list[str]:
    """The rules of a chain, without their comments."""
    found = re.search(rf"chain {chain} {{\n(.*?)\n  }}", text, re.DOTALL)
    assert found, f"no chain {chain}"
    lines = [re.sub(r' comment "[^"]*"$', "", line.strip()) for line in found[1].splitlines()]
    return [line for line in lines if not line.startswith("type ")]


# --- our table ---


@pytest.mark.parametrize("guard", ["on", "log", "off"])
def test_ruleset_replaces_all_rules_whatever_stood_there_and_no_elements(guard: str) -> None:
    text = ruleset(Rules((V4,), (), ("flannel.1",), masquerade=True, guard=guard))
    assert text.splitlines()[:3] == [f"table {TABLE}", f"flush table {TABLE}", f"table {TABLE} {{"]
    assert "delete" not in text and "elements" not in text
    assert text.endswith("\n}\n")
    assert text.count("{") == text.count("}")


@pytest.mark.parametrize(
    "rules",
    [
        Rules((V4,), (), ("flannel.1",), guard="off"),
        Rules((V4,), (), (), guard="on"),
        Rules((V4,), (), (), guard="log"),
    ],
)
def test_nothing_stands_where_nothing_is_to_be_done(rules: Rules) -> None:
    assert not rules.wanted
    assert (preparation(rules), ruleset(rules)) == ("", removal())


def test_sets_and_counters_are_there_before_any_rule() -> None:
    text = preparation(ONE)
    assert "set peers4 { type ipv4_addr; size 65536; }" in text
    assert "set peers6 { type ipv6_addr; size 65536; }" in text
    assert re.findall(r"counter (\w+)", text) == ["strangers", "impostors", "strays", "masqueraded"]
    assert "chain" not in text and "flush" not in text


def test_pods_keep_their_addresses_towards_pods_hosts_groups_and_exceptions() -> None:
    assert rules_of(ruleset(DUAL), "postrouting")[1:7] == [
        "ip saddr 10.0.0.0/8 ip daddr 10.0.0.0/8 return",
        "ip saddr 10.0.0.0/8 ip daddr @peers4 return",
        "ip saddr 10.0.0.0/8 ip daddr 224.0.0.0/4 return",
        "ip saddr 10.0.0.0/8 ip daddr 192.168.0.0/16 return",
        "ip saddr 10.0.0.0/8 ip daddr 0.0.0.0/0 return",
        'ip saddr 10.0.0.0/8 oifname != { "flannel.7", "flannel-v6.7" } counter name "masqueraded" '
        "masquerade fully-random",
    ]


def test_both_families_are_masqueraded_alike() -> None:
    rules = rules_of(ruleset(DUAL), "postrouting")[1:]
    first = [rule for rule in rules if rule.startswith("ip ")]
    second = [rule for rule in rules if rule.startswith("ip6 ")]
    assert len(first) + len(second) == len(rules)
    # IPv4 has one exception more.
    assert len(first) == len(second) + 1
    assert "ip6 saddr != fd00::/48 ip6 daddr fd00:0:0:1::/64 return" in second
    assert "ip6 saddr fd00::/48 ip6 daddr ff00::/8 return" in second


def test_host_without_tunnels_masquerades_on_every_way_out_and_guards_nothing() -> None:
    text = ruleset(Rules((V4,), (), (), masquerade=True))
    assert "oifname" not in text
    assert "chain guard" not in text
    assert 'ip saddr 10.0.0.0/8 counter name "masqueraded" masquerade fully-random' in text


def test_guard_looks_only_at_the_port_of_the_tunnels() -> None:
    text = ruleset(DUAL)
    assert rules_of(text, "guard") == ['udp dport 4789 iif != "lo" jump tunnel']
    assert rules_of(text, "tunnel") == [
        "ip saddr @peers4 accept",
        "ip6 saddr @peers6 accept",
        "jump strangers",
    ]


def test_sources_of_what_is_refused_are_kept_in_sets_that_cannot_grow() -> None:
    text = ruleset(DUAL)
    for counter in firewall.SAMPLED:
        for version in (4, 6):
            made = f"set {counter}{version} {{ type ipv{version}_addr; flags dynamic; size 16; timeout 600s; }}"
            assert made in text and made in preparation(DUAL)
        # A full set ends its rule: so nothing else is in it.
        assert rules_of(text, counter) == [
            f"update @{counter}4 {{ ip saddr }}",
            f"update @{counter}6 {{ ip6 saddr }}",
            f'counter name "{counter}"',
            "drop",
        ]


def test_guard_that_only_logs_lets_strangers_in_at_a_limited_rate_of_lines() -> None:
    (*_, counted, logged) = rules_of(ruleset(Rules((V4,), (), ("flannel.1",), guard="log")), "strangers")
    assert counted == 'counter name "strangers"'
    assert logged.startswith("limit rate 1/second")
    assert "drop" not in logged


def test_tunnels_bring_nothing_from_our_own_subnets_nor_for_those_of_others() -> None:
    text = ruleset(DUAL)
    assert rules_of(text, "arrivals") == ['iifname { "flannel.7", "flannel-v6.7" } jump arrived']
    assert rules_of(text, "arrived") == [
        "ip saddr 10.0.1.0/24 jump impostors",
        "ip daddr 10.0.0.0/8 ip daddr != 10.0.1.0/24 jump strays",
        "ip6 saddr fd00:0:0:1::/64 jump impostors",
        "ip6 daddr fd00::/48 ip6 daddr != fd00:0:0:1::/64 jump strays",
    ]


def test_what_tunnels_bring_is_only_counted_and_logged_where_strangers_are() -> None:
    text = ruleset(replace(ONE, guard="log"))
    for counter in ("impostors", "strays"):
        *_, counted, logged = rules_of(text, counter)
        assert counted == f'counter name "{counter}"' and logged.startswith("limit rate 1/second")
    assert "drop" not in text
    assert "arriv" not in ruleset(replace(ONE, guard="off"))


def test_subnet_outside_the_overlays_networks_has_no_rules_of_arrival() -> None:
    assert not re.search(r"jump (impostors|strays)", ruleset(replace(ONE, blocks=(V6,))))


def test_guard_needs_no_masquerading_and_masquerading_no_guard() -> None:
    assert "postrouting" not in ruleset(Rules((V4,), (), ("flannel.1",), masquerade=False))
    assert "chain guard" not in ruleset(Rules((V4,), (), ("flannel.1",), masquerade=True, guard="off"))


# --- the tables of iptables ---


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (4, ["-A OVERLAY-AGENT-FWD -s 10.0.0.0/8 -j ACCEPT", "-A OVERLAY-AGENT-FWD -d 10.0.0.0/8 -j ACCEPT"]),
        (6, ["-A OVERLAY-AGENT-FWD -s fd00::/48 -j ACCEPT", "-A OVERLAY-AGENT-FWD -d fd00::/48 -j ACCEPT"]),
    ],
)
def test_each_ip_version_accepts_its_own_block(version: int, expected: list[str]) -> None:
    assert firewall.forward_rules((V4, V6), version) == expected
    assert firewall.forward_rules((), version) == []


def test_restored_chain_gets_one_jump_whatever_was_there() -> None:
    rule = "-A OVERLAY-AGENT-FWD -s 10.0.0.0/8 -j ACCEPT"
    for jumps in range(3):
        assert firewall.forward_restore([rule], jumps).splitlines() == [
            "*filter",
            ":OVERLAY-AGENT-FWD - [0:0]",
            rule,
            *["-D FORWARD -j OVERLAY-AGENT-FWD"] * jumps,
            "-I FORWARD 1 -j OVERLAY-AGENT-FWD",
            "COMMIT",
        ]


def test_chain_without_rules_goes_with_its_jumps() -> None:
    assert firewall.forward_restore([], 1).splitlines() == [
        "*filter",
        ":OVERLAY-AGENT-FWD - [0:0]",
        "-D FORWARD -j OVERLAY-AGENT-FWD",
        "-X OVERLAY-AGENT-FWD",
        "COMMIT",
    ]


# --- the tables of others ---


def chain(family: str, table: str, name: str, policy: str = "accept", **other: Any) -> dict[str, Any]:
    hook = {"type": "filter", "hook": "forward", "prio": 0, "policy": policy}
    return {"chain": {"family": family, "table": table, "name": name, **hook, **other}}


def rule(family: str, table: str, name: str, *statements: dict[str, Any]) -> dict[str, Any]:
    return {"rule": {"family": family, "table": table, "chain": name, "expr": list(statements)}}


def match(protocol: str, field: str, block: Prefix) -> dict[str, Any]:
    address, _, length = str(block).partition("/")
    right = {"prefix": {"addr": address, "len": int(length)}}
    return {"match": {"op": "==", "left": {"payload": {"protocol": protocol, "field": field}}, "right": right}}


def listing(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"nftables": [{"metainfo": {"json_schema_version": 1}}, *entries]}


ESTABLISHED = {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": "established"}}
COUNTER = {"counter": {"packets": 1, "bytes": 60}}
REJECT = {"reject": {"type": "icmpx", "expr": "admin-prohibited"}}
ACCEPT, DROP = {"accept": None}, {"drop": None}


def test_tables_are_those_that_filter_forwarded_packets_and_are_not_of_iptables() -> None:
    listed = listing(
        chain("inet", "b", "x", "drop"),
        chain("inet", "b", "y"),
        chain("ip", "a", "FORWARD"),
        chain("inet", "filter", "FORWARD"),
        chain("ip", "filter", "FORWARD", "drop"),
        chain("ip6", "filter", "FORWARD", "drop"),
        chain("bridge", "c", "x", "drop"),
        chain("inet", "d", "x", "drop", hook="input"),
        chain("inet", "e", "x", "drop", type="nat"),
        {"chain": {"family": "inet", "table": "f", "name": "regular"}},
    )
    assert forward_tables(listed) == [("inet", "b"), ("inet", "filter"), ("ip", "a")]


@pytest.mark.parametrize("nothing", [{}, {"nftables": []}])
def test_empty_listing_has_nothing_in_the_way(nothing: dict[str, Any]) -> None:
    assert forward_tables(nothing) == []
    assert forward_findings(nothing, (V4,)) == []


@pytest.mark.parametrize(
    ("policy", "last"),
    [
        ("accept", None),
        ("accept", rule("inet", "t", "f", ESTABLISHED, ACCEPT)),
        ("accept", rule("inet", "t", "f", ESTABLISHED, DROP)),
        ("accept", rule("inet", "t", "f", {"limit": {"rate": 1, "per": "second"}}, DROP)),
        ("accept", rule("inet", "t", "f", COUNTER)),
        ("accept", rule("inet", "t", "other", DROP)),
    ],
)
def test_chain_that_lets_through_what_it_does_not_know_is_in_order(policy: str, last: dict[str, Any] | None) -> None:
    entries = [chain("inet", "t", "f", policy), *([last] if last else [])]
    assert forward_findings(listing(*entries), (V4, V6)) == []


@pytest.mark.parametrize(
    ("entries", "how"),
    [
        ([chain("inet", "t", "f", "drop")], "has the policy drop"),
        ([chain("inet", "t", "f"), rule("inet", "t", "f", COUNTER, DROP)], "ends by refusing everything"),
        ([chain("inet", "t", "f"), rule("inet", "t", "f", REJECT)], "ends by refusing everything"),
    ],
)
def test_chain_that_refuses_what_it_does_not_know_is_told_with_the_remedy(
    entries: list[dict[str, Any]], how: str
) -> None:
    (found,) = forward_findings(listing(*entries), (V4,))
    assert found == Finding(
        f"chain f of the nftables table inet t {how}; it may drop pods' packets",
        "nft insert rule inet t f ip saddr 10.0.0.0/8 accept && nft insert rule inet t f ip daddr 10.0.0.0/8 accept",
    )


def test_block_that_the_table_provides_for_is_not_mentioned() -> None:
    entries = [
        chain("inet", "t", "f", "drop"),
        rule("inet", "t", "f", match("ip", "saddr", V4), COUNTER, ACCEPT),
        rule("inet", "t", "elsewhere", match("ip", "daddr", V4), {"jump": {"target": "pods"}}),
    ]
    assert forward_findings(listing(*entries), (V4,)) == []
    (found,) = forward_findings(listing(*entries), (V4, V6))
    assert "10.0.0.0/8" not in found.remedy
    assert found.remedy.count("fd00::/48") == 2


def test_rule_that_drops_a_block_does_not_provide_for_it() -> None:
    entries = [
        chain("inet", "t", "f", "drop"),
        rule("inet", "t", "f", match("ip", "saddr", V4), DROP),
        rule("inet", "t", "f", match("ip", "daddr", V4), REJECT),
    ]
    (found,) = forward_findings(listing(*entries), (V4,))
    assert found.remedy.count("10.0.0.0/8") == 2


def test_table_of_one_family_is_no_matter_for_the_other() -> None:
    assert forward_findings(listing(chain("ip6", "t", "f", "drop")), (V4,)) == []
    (found,) = forward_findings(listing(chain("ip6", "t", "f", "drop")), (V4, V6))
    assert "10.0.0.0/8" not in found.remedy


def test_remedy_for_firewalld_is_in_its_own_words() -> None:
    entries = [chain("inet", "firewalld", "filter_FORWARD"), rule("inet", "firewalld", "filter_FORWARD", REJECT)]
    (found,) = forward_findings(listing(*entries), (V4, V6))
    assert found.remedy == (
        "firewall-cmd --permanent --zone=trusted --add-source=10.0.0.0/8 --add-source=fd00::/48 "
        "&& firewall-cmd --reload"
    )
    zones = [
        rule("inet", "firewalld", "filter_FORWARD_ZONES", match("ip", "saddr", V4), {"goto": {"target": "trusted"}}),
        rule("inet", "firewalld", "filter_FORWARD_ZONES", match("ip6", "saddr", V6), {"goto": {"target": "trusted"}}),
    ]
    assert forward_findings(listing(*entries, *zones), (V4, V6)) == []

"""What filters make of a packet: rules of nftables and of iptables, held against it."""

from typing import Any

import pytest

from overlay.rules import Chain, Filters, Flow, Rule, iptables_chain, nft_chains, outcome
from subnet_lease.model import pack_address

SRC, DST = pack_address("10.244.1.2"), pack_address("10.244.2.2")
FLOW = Flow(SRC, DST, "udp", 53, into="cni0", out="flannel.1")
PING = FLOW._replace(protocol="icmp", port=0)
SIX = Flow(pack_address("fd00::1"), pack_address("fd00::2"), "icmp", 0, into="cni0", out="flannel.1")


def payload(protocol: str, field: str, right: Any, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": {"payload": {"protocol": protocol, "field": field}}, "right": right}}


def meta(key: str, right: Any, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": {"meta": {"key": key}}, "right": right}}


DROP: dict[str, Any] = {"drop": None}
ACCEPT: dict[str, Any] = {"accept": None}


def listing(
    *rules: list[dict[str, Any]], policy: str = "accept", **chains: list[list[dict[str, Any]]]
) -> dict[str, Any]:
    base = {"family": "inet", "table": "t", "name": "base", "hook": "forward", "prio": 0, "policy": policy}
    found: list[dict[str, Any]] = [{"metainfo": {}}, {"chain": base}]
    for name, each in {"base": list(rules), **chains}.items():
        found += [{"rule": {"family": "inet", "table": "t", "chain": name, "expr": expr}} for expr in each]
    return {"nftables": found}


def judged(
    what: dict[str, Any], flow: Flow = FLOW, sets: dict[tuple[str, str, str], Any] | None = None
) -> tuple[str, int]:
    """(what refuses it, how many may)."""
    (chain,) = nft_chains(what, "forward", flow, sets or {})
    found = outcome(chain)
    return found.refused, len(found.doubts)


BLOCK = {"prefix": {"addr": "10.244.0.0", "len": 16}}
CT = {"ct": {"key": "state"}}


@pytest.mark.parametrize(
    ("flow", "match", "fits"),
    [
        (FLOW, payload("ip", "saddr", "10.244.1.2"), True),
        (FLOW, payload("ip", "saddr", "10.244.1.3"), False),
        (FLOW, payload("ip", "saddr", "10.244.1.3", "!="), True),
        (FLOW, payload("ip", "daddr", BLOCK), True),
        (FLOW, payload("ip", "daddr", {"set": ["10.9.9.9", BLOCK]}), True),
        (FLOW, payload("ip", "daddr", {"set": ["10.9.9.9"]}), False),
        (FLOW, payload("ip", "daddr", {"set": ["10.9.9.9", {"odd": 1}]}), None),
        (FLOW, payload("ip", "daddr", {"range": ["10.244.2.0", "10.244.2.9"]}), True),
        (FLOW, payload("ip", "daddr", {"range": ["what", "10.244.2.9"]}), None),
        (FLOW, payload("ip", "daddr", {"odd": 1}), None),
        (FLOW, payload("ip", "daddr", "nonsense"), False),
        (FLOW, payload("ip6", "daddr", "fd00::2"), False),
        (SIX, payload("ip6", "daddr", "fd00::2"), True),
        (FLOW, payload("ip", "daddr", "@known"), True),
        (FLOW, payload("ip", "saddr", "@known"), False),
        (FLOW, payload("ip", "daddr", "@unknown"), None),
        (FLOW, payload("ip", "daddr", "@unknown", "!="), None),
        (FLOW, payload("ip", "daddr", BLOCK, "<"), None),
        (FLOW, payload("ip", "protocol", "udp"), True),
        (FLOW, payload("ip", "protocol", "tcp"), False),
        (SIX, payload("ip6", "nexthdr", "ipv6-icmp"), True),
        (PING, meta("l4proto", 1), True),
        (FLOW, meta("l4proto", {"set": ["tcp", "udp"]}), True),
        (FLOW, meta("nfproto", "ipv4"), True),
        (SIX, meta("nfproto", "ipv4"), False),
        (FLOW, payload("udp", "dport", 53), True),
        (FLOW, payload("udp", "dport", {"range": [50, 60]}), True),
        (FLOW, payload("th", "dport", 54), False),
        (FLOW, payload("udp", "sport", 53), None),
        (FLOW, payload("tcp", "dport", 53), False),
        (PING, payload("th", "dport", 53), False),
        (FLOW, meta("iifname", "cni0"), True),
        (FLOW, meta("iifname", "cni*"), True),
        (FLOW, meta("iifname", 7), False),
        (FLOW, meta("oifname", {"set": ["eth0", "flannel.1"]}), True),
        (FLOW._replace(out=""), meta("oif", "eth0"), False),
        (FLOW, meta("mark", 1), None),
        (FLOW, {"match": {"op": "in", "left": CT, "right": ["established", "related"]}}, False),
        (FLOW, {"match": {"op": "in", "left": CT, "right": "new"}}, True),
        (FLOW, {"limit": {"rate": 1}}, None),
        (FLOW, {"xt": None}, None),
        (FLOW, {"counter": {}}, True),
    ],
)
def test_a_rule_fits_or_not_or_may(flow: Flow, match: dict[str, Any], fits: bool | None) -> None:
    refused, doubts = judged(listing([match, DROP]), flow, {("inet", "t", "known"): {DST}})
    assert (bool(refused), doubts) == {True: (True, 0), False: (False, 0), None: (False, 1)}[fits]


def test_the_first_verdict_counts() -> None:
    everything = payload("ip", "daddr", BLOCK)
    assert judged(listing([everything, ACCEPT], [everything, DROP])) == ("", 0)
    assert judged(listing([everything, {"reject": {}}], [ACCEPT])) == ("ip daddr 10.244.0.0/16 reject", 0)
    assert judged(listing([{"return": None}], [DROP])) == ("", 0)
    assert judged(listing([{"return": None}], [DROP], policy="drop")) == ("policy drop", 0)
    assert judged(listing(policy="drop")) == ("policy drop", 0)
    assert judged(listing([{"counter": {}}], policy="accept")) == ("", 0)


def test_what_may_accept_makes_a_later_refusal_doubtful() -> None:
    assert judged(listing([meta("mark", 1), ACCEPT], policy="drop")) == ("", 1)
    assert judged(listing([meta("mark", 1), {"drop": None}], [ACCEPT], policy="drop")) == ("", 1)


def test_jumps_are_followed_and_come_back() -> None:
    def jump(to: str, *matches: dict[str, Any], kind: str = "jump") -> list[dict[str, Any]]:
        return [*matches, {kind: {"target": to}}]

    mark = meta("mark", 1)
    assert judged(listing(jump("x"), x=[[DROP]])) == ("drop", 0)
    assert judged(listing(jump("x"), [DROP], x=[[ACCEPT]])) == ("", 0)
    assert judged(listing(jump("x"), [DROP], x=[[{"return": None}]])) == ("drop", 0)
    assert judged(listing(jump("x", mark), [ACCEPT], x=[[DROP]])) == ("", 1)
    assert judged(listing(jump("x", kind="goto"), [DROP], x=[[{"counter": {}}]])) == ("", 0)
    assert judged(listing(jump("absent"), [DROP])) == ("drop", 0)
    assert judged(listing(jump("x"), [DROP], x=[jump("x")])) == ("drop", 0)


def test_a_verdict_map_is_not_looked_into() -> None:
    doubtful = {"vmap": {"key": {}, "data": {"set": [[1, DROP]]}}}
    harmless = {"vmap": {"key": {}, "data": {"set": [[1, ACCEPT]]}}}
    assert judged(listing([doubtful])) == ("", 1)
    assert judged(listing([harmless])) == ("", 0)


def test_rules_are_told_nearly_as_nft_writes_them() -> None:
    expr = [
        meta("iifname", {"set": ["cni0"]}),
        payload("ip", "saddr", BLOCK, "!="),
        {"match": {"op": "in", "left": CT, "right": ["new", "related"]}},
        {"match": {"op": "==", "left": {"&": [1, 2]}, "right": 3}},
        {"jump": {"target": "x"}},
    ]
    (chain,) = nft_chains(listing(expr), "forward", FLOW, {})
    told = "iifname { cni0 } ip saddr != 10.244.0.0/16 ct state new,related (..) 3 jump x"
    assert chain.rules[0].text == told


def test_chains_come_by_priority_and_those_of_other_hooks_and_families_not_at_all() -> None:
    def chain(name: str, **more: Any) -> dict[str, Any]:
        return {"chain": {"family": "ip", "table": "t", "name": name, "hook": "forward", "prio": 0, **more}}

    entries = [
        chain("late", prio=5),
        chain("early", prio=-5),
        chain("other", hook="input"),
        chain("six", family="ip6"),
        chain("kept", table="filter"),
        {"chain": {"family": "ip", "table": "t", "name": "plain"}},
    ]
    found = nft_chains({"nftables": entries}, "forward", FLOW, {}, [("ip", "filter")])
    assert [each.where for each in found] == ["nftables ip t early", "nftables ip t late"]
    assert nft_chains({}, "forward", FLOW, {}) == []


# --- iptables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flow", "rule", "fits"),
    [
        (FLOW, "-s 10.244.0.0/16", True),
        (FLOW, "-s 10.9.0.0/16", False),
        (FLOW, "! -s 10.9.0.0/16", True),
        (FLOW, "-d 10.244.2.2/32", True),
        (FLOW, "-i cni0 -o flannel.1", True),
        (FLOW, "-i cni+", True),
        (FLOW, "-i docker0", False),
        (FLOW, "-p udp -m udp --dport 53", True),
        (FLOW, "-p tcp -m tcp --dport 53", False),
        (PING, "-p icmp", True),
        (SIX, "-p ipv6-icmp", True),
        (PING, "-p udp --dport 53", False),
        (FLOW, "--dport 50:60", None),
        (FLOW, "-m conntrack --ctstate RELATED,ESTABLISHED", False),
        (FLOW, "-m state --state NEW", True),
        (FLOW, '-m comment --comment "two words"', True),
        (FLOW, "-m addrtype --dst-type LOCAL", None),
        (FLOW, "! --fragment", None),
    ],
)
def test_a_rule_of_iptables_fits_or_not_or_may(flow: Flow, rule: str, fits: bool | None) -> None:
    found = outcome(
        iptables_chain("iptables-nft", ["-P FORWARD ACCEPT", f"-A FORWARD {rule} -j DROP"], "FORWARD", flow)
    )
    assert (bool(found.refused), len(found.doubts)) == {True: (True, 0), False: (False, 0), None: (False, 1)}[fits]


def test_chains_of_iptables_are_followed() -> None:
    lines = [
        "-P FORWARD DROP",
        "-N OURS",
        "-A FORWARD -j OURS",
        "-A FORWARD -j LOG --log-prefix x",
        "-A OURS -j ACCEPT",
    ]
    assert not outcome(iptables_chain("iptables-legacy", lines, "FORWARD", FLOW)).refused
    assert outcome(iptables_chain("iptables-legacy", lines[:1], "FORWARD", FLOW)).refused == "policy drop"
    counting = ["-P FORWARD DROP", "-A FORWARD -s 10.244.0.0/16"]
    assert outcome(iptables_chain("iptables-legacy", counting, "FORWARD", FLOW)).refused == "policy drop"
    lines = ["-P FORWARD ACCEPT", "-A FORWARD -g OURS", "-A FORWARD -j DROP", "-A OURS -j RETURN"]
    assert not outcome(iptables_chain("iptables-legacy", lines, "FORWARD", FLOW)).refused


def test_a_rule_that_does_nothing_is_passed_over() -> None:
    chain = Chain("x", [Rule(True, "", "", ""), Rule(True, "drop", "", "it")], "", {}, "")
    assert outcome(chain).refused == "it"


def test_filters_leave_to_iptables_what_it_keeps() -> None:
    kept = {"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "hook": "forward", "prio": 0}}
    lines = {"iptables-nft": ["-P FORWARD DROP"], "ip6tables-nft": ["-P FORWARD DROP"]}
    filters = Filters({"nftables": [kept]}, {}, lines)
    assert [chain.where for chain in filters.chains("forward", FLOW)] == ["iptables-nft FORWARD"]
    assert [chain.where for chain in filters.chains("forward", SIX)] == ["ip6tables-nft FORWARD"]
    assert filters.chains("prerouting", FLOW) == []
    assert [chain.where for chain in Filters({"nftables": [kept]}).chains("forward", FLOW)] == [
        "nftables ip filter FORWARD"
    ]

"""What this host's firewall must do for the overlay, as texts for `nft` and `iptables-restore`, and what it cannot do.

Owns the table `inet overlay_agent`, whole: masquerading, the guard of the tunnels, and the two sets of addresses both
go by. The text replaces all rules in one transaction whatever stood there, so that applying it twice, or after
another version, ends in the same state; the sets' elements stay, which `nfnl` changes one by one.

Forwarding is accepted elsewhere. An accept in one table does not undo a drop in another's chain on the same hook, so
it goes where such a drop is: into a chain of ours in the table `filter` of iptables. Other tools' tables are not ours
to edit: a drop found there becomes a `Finding`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from subnet_lease.model import Prefix, format_address

NAME = "overlay_agent"
TABLE = f"inet {NAME}"

SETS: Mapping[int, str] = {4: "peers4", 16: "peers6"}
"""Length of a packed address -> the set that holds such: underlay addresses of all hosts, our own included."""

SET_SIZE = 1 << 16
"""Elements a set has room for: as many hosts as a /8 has subnets of /24. Half as many megabytes of kernel memory, spent
to have a size at all: without one the kernel takes a hash that grows in the background, and a dump of it that comes too
early lacks elements without a word (nft_rhash_walk in net/netfilter/nft_set_hash.c)."""

STRANGERS = "strangers"
"""Counter: packets to the tunnels' port from addresses that no host of the cluster has."""

IMPOSTORS = "impostors"
"""Counter: packets out of a tunnel whose source lies in this host's own subnets."""

STRAYS = "strays"
"""Counter: packets out of a tunnel for the overlay's networks, but not for this host's subnets."""

MASQUERADED = "masqueraded"
"""Counter: connections (nat chains see the first packet of each) that got this host's address."""

COUNTERS = (STRANGERS, IMPOSTORS, STRAYS, MASQUERADED)

SAMPLED = (STRANGERS, IMPOSTORS, STRAYS)
"""Counters that have the sources of their packets kept: strangers that of the tunnel packet, others the inner one."""

SAMPLE_SIZE, SAMPLE_S = 16, 600
"""How many sources such a set has room for, and how many seconds it keeps one after its last packet. A flood from
forged addresses fills a set and no more: what does not fit is counted like the rest. An update costs a packet that is
refused some 50 ns; log messages (`log group`) would cost it twice as much, and the agent a thread to read them."""

FORWARD_CHAIN = "OVERLAY-AGENT-FWD"
"""Our chain in the `filter` tables of iptables. Upper case, as all who have chains there write theirs."""

FORWARD_JUMP = f"-A FORWARD -j {FORWARD_CHAIN}"
"""The rule that leads there, as `iptables -S` shows it."""

_FAMILIES = {4: "ip", 16: "ip6"}
_MULTICAST = {4: "224.0.0.0/4", 16: "ff00::/8"}


@dataclass(frozen=True, slots=True)
class Rules:
    """All that the table depends on, but for the elements of its sets.

    `blocks` are the overlay's networks and `subnets` this host's parts of them, one of each address family in use.
    `devices` are our tunnel devices, all with UDP port `port`; a host that routes without tunnels has none, and nothing
    to guard. `exceptions` are destinations outside the overlay to which pods keep their addresses. `guard`: tunnel
    packets from strangers, and packets in tunnels that are no peer's to send here, are counted and dropped (`on`),
    counted, logged and let in (`log`), or not looked at (`off`).
    """

    blocks: tuple[Prefix, ...]
    subnets: tuple[Prefix, ...]
    devices: tuple[str, ...] = ()
    port: int = 8472
    masquerade: bool = False
    exceptions: tuple[Prefix, ...] = ()
    guard: str = "on"

    @property
    def guarded(self) -> bool:
        """Whether there is anything to guard."""
        return self.guard != "off" and bool(self.devices)

    @property
    def wanted(self) -> bool:
        """Whether there is any use for the table; without, none stands and its sets cannot be changed."""
        return self.masquerade or self.guarded


def preparation(rules: Rules) -> str:
    """What must stand before single elements can be put: the sets and counters, with whatever they hold already."""
    return f"table {TABLE} {{\n{_indented(_vessels())}\n}}\n" if rules.wanted else ""


def ruleset(rules: Rules) -> str:
    """The table as `rules` want it, applied with `nft -f`: rules anew, the sets' elements and the counters as they are.

    One transaction, so that no packet meets a chain without its rules, or an empty set.
    """
    if not rules.wanted:
        return removal()
    parts = _vessels()
    if rules.guarded:
        parts += _guard(rules) + _arrivals(rules)
    if rules.masquerade:
        parts += _postrouting(rules)
    return f"table {TABLE}\nflush table {TABLE}\ntable {TABLE} {{\n{_indented(parts)}\n}}\n"


def removal() -> str:
    """The ruleset that leaves nothing of ours; no error where nothing was."""
    return f"table {TABLE}\ndelete table {TABLE}\n"


def _indented(lines: Iterable[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)


def sample_set(counter: str, length: int) -> str:
    """The set with the latest sources, of `length` bytes each, of what `counter` counts."""
    return f"{counter}{_version(length)}"


def _vessels() -> list[str]:
    """Sets and counters: what lasts while rules are replaced."""
    sets = [f"set {name} {{ type ipv{_version(length)}_addr; size {SET_SIZE}; }}" for length, name in SETS.items()]
    samples = [
        f"set {sample_set(counter, length)} {{ type ipv{_version(length)}_addr; flags dynamic; "
        f"size {SAMPLE_SIZE}; timeout {SAMPLE_S}s; }}"
        for counter in SAMPLED
        for length in SETS
    ]
    return [*sets, *samples, *(f"counter {name} {{ }}" for name in COUNTERS)]


def _refused(rules: Rules, counter: str, what: str) -> list[str]:
    """The chain for packets that `counter` counts; `what` one is, for the log."""
    verdict = f'limit rate 1/second burst 5 packets log prefix "overlay-agent {what}: " level warn'
    return [
        f"chain {counter} {{",
        # A rule each: where a set is full the rule ends, and the packet must not get away with it.
        *(f"  update @{sample_set(counter, length)} {{ {_FAMILIES[length]} saddr }}" for length in SETS),
        f'  counter name "{counter}"',
        f"  {'drop' if rules.guard == 'on' else verdict}",
        "}",
    ]


def _guard(rules: Rules) -> list[str]:
    """Packets for this host only (hook input), and before every filter, whose own rules still apply to what passes.

    Routing has been decided by then, so a tunnel that merely passes through this host is no concern of ours. Nothing
    here asks for connection tracking. All other traffic is through after one rule, a peer's packet after a look-up in a
    hash. A fragment hides no port: IPv4 is reassembled before this hook; IPv6 after it, but for want of the fragment
    with the port, which is dropped here, and which the kernel wants to be the first (RFC 7112).
    """
    return [
        "chain guard {",
        "  type filter hook input priority mangle; policy accept;",
        f'  udp dport {rules.port} iif != "lo" jump tunnel',
        "}",
        "chain tunnel {",
        *(f"  {_FAMILIES[length]} saddr @{name} accept" for length, name in SETS.items()),
        f"  jump {STRANGERS}",
        "}",
        *_refused(rules, STRANGERS, "stranger"),
    ]


def _arrivals(rules: Rules) -> list[str]:
    """What comes out of the tunnels, before anything is made of it: translated, tracked, routed.

    No peer has pods in our subnet, and pods take a packet with such a source for one of their own host's. (The kernel
    refuses the host's own addresses as martians, and those for IPv4 only.) Nor has a peer reason to send us what is for
    another's pods: hosts send to each other directly. What a service here turns towards a pod elsewhere is not turned
    yet at this hook. Hosts may send from any of their addresses, so sources outside the overlay are let be.
    """
    refused = []
    for block, subnet in (
        (block, subnet) for block in rules.blocks for subnet in rules.subnets if block.covers(subnet)
    ):
        source, target = (f"{_FAMILIES[len(block.base)]} {side}" for side in ("saddr", "daddr"))
        refused += [
            f"  {source} {subnet} jump {IMPOSTORS}",
            f"  {target} {block} {target} != {subnet} jump {STRAYS}",
        ]
    return [
        "chain arrivals {",
        "  type filter hook prerouting priority raw; policy accept;",
        f"  iifname {_names(rules.devices)} jump arrived",
        "}",
        "chain arrived {",
        *refused,
        "}",
        *_refused(rules, IMPOSTORS, "impostor"),
        *_refused(rules, STRAYS, "stray"),
    ]


def _names(devices: Iterable[str]) -> str:
    """A set of interface names. Not of indexes: a device may be made anew."""
    return "{ " + ", ".join(f'"{name}"' for name in devices) + " }"


def _postrouting(rules: Rules) -> list[str]:
    lines = [
        "chain postrouting {",
        "  type nat hook postrouting priority srcnat; policy accept;",
        '  meta mark & 0x4000 == 0x4000 return comment "kube-proxy masquerades these itself"',
    ]
    for block in rules.blocks:
        lines += [f"  {line}" for line in _masquerade(rules, block)]
    return [*lines, "}"]


def _masquerade(rules: Rules, block: Prefix) -> list[str]:
    """The rules of one address family. Only the first packet of a connection meets them; replies follow it back."""
    length = len(block.base)
    source, target = f"{_FAMILIES[length]} saddr", f"{_FAMILIES[length]} daddr"
    hosts = f"@{SETS[length]}"
    way_out = f"oifname != {_names(rules.devices)} " if rules.devices else ""
    masquerade = f'counter name "{MASQUERADED}" masquerade fully-random'
    exceptions = [exception for exception in rules.exceptions if len(exception.base) == length]
    subnets = [subnet for subnet in rules.subnets if len(subnet.base) == length]
    return [
        f'{source} {block} {target} {block} return comment "pod to pod"',
        f'{source} {block} {target} {hosts} return comment "pod to a host of the cluster"',
        f'{source} {block} {target} {_MULTICAST[length]} return comment "multicast"',
        *(f'{source} {block} {target} {exception} return comment "exception"' for exception in exceptions),
        f'{source} {block} {way_out}{masquerade} comment "pods leaving the overlay"',
        *(f'{source} != {block} {target} {subnet} return comment "to our own pods"' for subnet in subnets),
        # What another host sent to a service, and was turned here towards a pod elsewhere, has to come back this way.
        f'{source} {hosts} {target} {block} ct status & dnat == 0 return comment "a host of the cluster to a pod"',
        f'{source} != {block} {target} {block} {masquerade} comment "into the overlay from outside"',
    ]


def _version(length: int) -> int:
    return 4 if length == 4 else 6


# --- forwarding: the tables of iptables --------------------------------------------------------------------------


def forward_rules(blocks: Iterable[Prefix], version: int) -> list[str]:
    """The rules of FORWARD_CHAIN for IP `version` 4 or 6, as `iptables -S` shows them. None where no block is of it."""
    ours = [block for block in blocks if _version(len(block.base)) == version]
    return [f"-A {FORWARD_CHAIN} {side} {block} -j ACCEPT" for block in ours for side in ("-s", "-d")]


def forward_restore(rules: Iterable[str], jumps: int) -> str:
    """The text for `iptables-restore --noflush` that makes our chain of `rules`, with one jump at the top of FORWARD.

    `jumps`: how many lead there now. They are removed and put again in the same transaction, so none is missed. Without
    rules the chain goes, and all jumps with it.
    """
    rules = list(rules)
    after = f"-I FORWARD 1 -j {FORWARD_CHAIN}" if rules else f"-X {FORWARD_CHAIN}"
    gone = [f"-D FORWARD -j {FORWARD_CHAIN}"] * jumps
    return "\n".join(["*filter", f":{FORWARD_CHAIN} - [0:0]", *rules, *gone, after, "COMMIT", ""])


# --- forwarding: the tables of others ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finding:
    """Something in the way that is not ours to change: what it is, and the command that clears it."""

    what: str
    remedy: str


def forward_tables(listing: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(family, name) of the tables that may drop forwarded packets, from the answer to `nft -j list chains`."""
    return sorted({(_word(chain, "family"), _word(chain, "table")) for chain in _forward_chains(listing)})


def forward_findings(listing: Mapping[str, Any], blocks: Iterable[Prefix]) -> list[Finding]:
    """Chains of a table that drop what nothing in it provides for, from the answer to `nft -j list table`.

    A chain drops by its policy, or by a last rule that refuses everything, as firewalld's does. A table provides for a
    block if a rule in it that refuses nothing looks for the block as source, and one as destination: what such a rule
    leads to is the business of who wrote it. In firewalld a zone has sources only.
    """
    rules = _listed(listing, "rule")
    found = []
    for chain in _forward_chains(listing):
        family, table, name = (_word(chain, key) for key in ("family", "table", "name"))
        own = [rule for rule in rules if rule.get("chain") == name]
        if chain.get("policy") == "drop":
            how = "has the policy drop"
        elif own and _verdicts(own[-1]) & _REFUSALS and not _conditional(own[-1]):
            how = "ends by refusing everything"
        else:
            continue
        zoned = table == "firewalld"
        missing = [
            (protocol, side, block)
            for block in blocks
            for side in (("saddr",) if zoned else ("saddr", "daddr"))
            if family in ("inet", protocol := _FAMILIES[len(block.base)])
            and not any(_looks_for(rule, protocol, side, block) for rule in rules)
        ]
        if zoned:
            sources = " ".join(f"--add-source={block}" for _, _, block in missing)
            remedy = f"firewall-cmd --permanent --zone=trusted {sources} && firewall-cmd --reload"
        else:
            remedy = " && ".join(
                f"nft insert rule {family} {table} {name} {protocol} {side} {block} accept"
                for protocol, side, block in missing
            )
        if missing:
            what = f"chain {name} of the nftables table {family} {table} {how}; it may drop pods' packets"
            found.append(Finding(what, remedy))
    return found


_REFUSALS = {"drop", "reject"}


def _forward_chains(listing: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Base chains that filter forwarded packets, but for those of `iptables-nft`: there we have a chain of our own."""
    return [
        chain
        for chain in _listed(listing, "chain")
        if (chain.get("hook"), chain.get("type")) == ("forward", "filter")
        and (family := _word(chain, "family")) in ("inet", *_FAMILIES.values())
        and (family == "inet" or (chain.get("table"), chain.get("name")) != ("filter", "FORWARD"))
    ]


def _listed(listing: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    return [entry[kind] for entry in listing.get("nftables", ()) if kind in entry]


def _word(chain: Mapping[str, Any], key: str) -> str:
    return str(chain.get(key))


def _verdicts(rule: Mapping[str, Any]) -> set[str]:
    """The kinds of the rule's statements, its verdict among them."""
    return {kind for statement in rule.get("expr", ()) for kind in statement}


def _conditional(rule: Mapping[str, Any]) -> bool:
    return bool(_verdicts(rule) & {"match", "limit"})


def _looks_for(rule: Mapping[str, Any], protocol: str, side: str, block: Prefix) -> bool:
    """Whether the rule is for packets from, or to, `block`, and does not refuse them."""
    address = {"prefix": {"addr": format_address(block.base), "len": block.length}}
    match = {"op": "==", "left": {"payload": {"protocol": protocol, "field": side}}, "right": address}
    return {"match": match} in rule.get("expr", ()) and not _verdicts(rule) & _REFUSALS

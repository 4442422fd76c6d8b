"""What packet filters would make of a packet, as far as their rules tell: a verdict, or the rules that may refuse it.

Reads the answer to `nft -j list ruleset` and the lines of `iptables -S`. Whatever is not understood here (a match of an
unknown kind, a set whose elements are not at hand) counts as "it may": such a rule is named, and nothing is concluded
from it. What the kernel really does, only its own trace tells; see `trace_send`.

Of connections the first packet is meant, which connection tracking calls new.
"""

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from subnet_lease.model import Prefix, pack_address


class Flow(NamedTuple):
    """A packet as filters see it. Addresses are packed; `protocol` is `icmp`, `udp` or `tcp` in both families; `port`
    is the destination's; the interfaces are names, empty where the hook has none.
    """

    src: bytes
    dst: bytes
    protocol: str
    port: int
    into: str = ""
    out: str = ""

    @property
    def family(self) -> str:
        """nftables' name of the address family."""
        return "ip" if len(self.dst) == 4 else "ip6"


class Rule(NamedTuple):
    """One rule, held against a packet: whether it `fits` (None: it may), and what it does (`accept`, `drop`, `return`,
    `jump`, `goto`, or nothing), to which chain.
    """

    fits: bool | None
    action: str
    target: str
    text: str


class Chain(NamedTuple):
    """A base chain, and the chains of its table by name. `where` is how people call it."""

    where: str
    rules: Sequence[Rule]
    policy: str
    others: Mapping[str, Sequence[Rule]]
    command: str


@dataclass(slots=True)
class Outcome:
    """What comes of a packet in a base chain: `refused` by this rule or policy, empty if it is not; `doubts` may do."""

    refused: str = ""
    doubts: list[str] = field(default_factory=list)


_DEEPEST = 16
"""Jumps in jumps: as many as nftables allows (NFT_JUMP_STACK_SIZE)."""


def outcome(chain: Chain) -> Outcome:
    """Walk the chain, rule by rule."""
    walk = _Walk(chain.others)
    end = walk.through(chain.rules, certain=True, depth=0)
    if end in ("", "return") and chain.policy == "drop":
        walk.refuse("policy drop", True)
    return walk.outcome


class _Walk:
    def __init__(self, chains: Mapping[str, Sequence[Rule]]) -> None:
        self._chains = chains
        self._accepted = False  # By a rule that may fit: what refuses after it only may.
        self.outcome = Outcome()

    def refuse(self, text: str, certain: bool) -> None:
        if certain and not self._accepted:
            self.outcome.refused = text
        else:
            self.outcome.doubts.append(text)

    def through(self, rules: Sequence[Rule], *, certain: bool, depth: int) -> str:
        """How it ends: a verdict, "return", or nothing at the end of the chain."""
        for rule in rules:
            if rule.fits is False or not rule.action:
                continue
            sure = certain and rule.fits is True
            end = rule.action
            if rule.action == "drop":
                self.refuse(rule.text, sure)
            elif rule.action == "accept":
                self._accepted = self._accepted or not sure
            elif rule.action in ("jump", "goto"):
                end = ""
                if depth < _DEEPEST:
                    end = self.through(self._chains.get(rule.target, ()), certain=sure, depth=depth + 1)
                if end in ("", "return"):
                    end = "return" if rule.action == "goto" else ""
            if end and rule.fits is True:
                return end
        return ""


# --- nftables ----------------------------------------------------------------------------------------------------

Sets = Mapping[tuple[str, str, str], Collection[bytes]]
"""Family, table and name of a set of addresses -> its elements, packed."""


def nft_chains(
    listing: Mapping[str, Any], hook: str, flow: Flow, sets: Sets, without: Collection[tuple[str, str]] = ()
) -> list[Chain]:
    """The base chains at `hook`, in the order of their priorities, but for the tables (family, name) `without`."""
    entries = listing.get("nftables", ())
    tables: dict[tuple[str, str], dict[str, list[Rule]]] = {}
    for rule in (entry["rule"] for entry in entries if "rule" in entry):
        key = rule["family"], rule["table"]
        tables.setdefault(key, {}).setdefault(rule["chain"], []).append(_nft_rule(rule, flow, sets))
    found = []
    for chain in (entry["chain"] for entry in entries if "chain" in entry):
        key = chain["family"], chain["table"]
        if chain.get("hook") == hook and key[0] in ("inet", flow.family) and key not in without:
            name = " ".join((*key, chain["name"]))
            others = tables.get(key, {})
            rules = others.get(chain["name"], ())
            of_it = Chain(f"nftables {name}", rules, chain.get("policy", ""), others, f"nft list chain {name}")
            found.append((chain.get("prio", 0), of_it))
    return [chain for _, chain in sorted(found, key=lambda each: each[0])]


_NEUTRAL = frozenset(("counter", "log", "mangle", "notrack", "comment", "set"))
"""Statements that let a packet go on to the next."""


def _nft_rule(rule: Mapping[str, Any], flow: Flow, sets: Sets) -> Rule:
    fits: bool | None = True
    action = target = ""
    words = []
    for statement in rule.get("expr", ()):
        for kind, value in statement.items():
            words.append(_words(kind, value))
            if kind == "match":
                fits = _both(fits, _nft_match(value, flow, sets, (rule["family"], rule["table"])))
            elif kind in ("accept", "drop", "return"):
                action = kind
            elif kind == "reject":
                action = "drop"
            elif kind in ("jump", "goto"):
                action, target = kind, value["target"]
            elif kind == "vmap":
                fits, action = _both(fits, None), "drop" if "drop" in str(value) else action
            elif kind not in _NEUTRAL:
                fits = _both(fits, None)
    return Rule(fits, action, target, " ".join(filter(None, words)))


def _both(one: bool | None, other: bool | None) -> bool | None:
    if one is False or other is False:
        return False
    return None if one is None or other is None else True


def _nft_match(match: Mapping[str, Any], flow: Flow, sets: Sets, table: tuple[str, str]) -> bool | None:
    if match["op"] not in ("==", "!=", "in"):
        return None
    known, have = _side(match["left"], flow)
    if not known:
        return None
    if have is None:
        return False  # The packet has no such field.
    found = _is_among(have, match["right"], sets, table)
    return found if found is None or match["op"] != "!=" else not found


def _side(left: Any, flow: Flow) -> tuple[bool, Any]:
    """(whether it is known here what the rule looks at, its value in this packet: None if it has none)."""
    match left:
        case {"payload": {"protocol": "ip" | "ip6" as family, "field": "saddr" | "daddr" as field_}}:
            value = flow.src if field_ == "saddr" else flow.dst
            return True, value if family == flow.family else None
        case {"payload": {"protocol": "ip" | "ip6" as family, "field": "protocol" | "nexthdr"}}:
            return True, _protocol_names(flow) if family == flow.family else None
        case {"payload": {"protocol": "udp" | "tcp" | "th" as protocol, "field": "dport" | "sport" as field_}}:
            if flow.protocol == "icmp" or protocol not in ("th", flow.protocol):
                return True, None
            return field_ == "dport", flow.port
        case {"meta": {"key": "iifname" | "iif"}}:
            return True, flow.into or None
        case {"meta": {"key": "oifname" | "oif"}}:
            return True, flow.out or None
        case {"meta": {"key": "l4proto"}}:
            return True, _protocol_names(flow)
        case {"meta": {"key": "nfproto"}}:
            return True, ("ipv4",) if flow.family == "ip" else ("ipv6",)
        case {"ct": {"key": "state"}}:
            return True, ("new",)
        case _:
            return False, None


def _protocol_names(flow: Flow) -> tuple[Any, ...]:
    if flow.protocol == "icmp":
        return ("icmp", 1) if flow.family == "ip" else ("ipv6-icmp", "icmpv6", 58)
    return (flow.protocol, {"udp": 17, "tcp": 6}[flow.protocol])


def _is_among(have: Any, right: Any, sets: Sets, table: tuple[str, str]) -> bool | None:
    """Whether the value is the one, or one of those, on the right side of a match."""
    if isinstance(right, str) and right.startswith("@"):
        elements = sets.get((*table, right[1:]))
        return None if elements is None else have in elements
    if isinstance(right, dict) and "set" in right:
        right = right["set"]
    if isinstance(right, list):
        answers = [_is_among(have, each, sets, table) for each in right]
        return True if True in answers else None if None in answers else False
    if isinstance(have, tuple):
        return right in have
    if isinstance(right, dict):
        return _is_within(have, right)
    if isinstance(have, bytes):
        return _address(right) == have
    if isinstance(have, str):
        return isinstance(right, str) and fnmatchcase(have, right)
    return bool(have == right)


def _is_within(have: Any, right: Mapping[str, Any]) -> bool | None:
    match right:
        case {"prefix": {"addr": str(base), "len": int(length)}} if isinstance(have, bytes):
            return Prefix.parse(f"{base}/{length}", strict=False).holds(have)
        case {"range": [low, high]}:
            low, high = (_address(low), _address(high)) if isinstance(have, bytes) else (low, high)
            comparable = isinstance(low, type(have)) and isinstance(high, type(have))
            return bool(low <= have <= high) if comparable else None
        case _:
            return None


def _address(text: object) -> bytes | None:
    try:
        return pack_address(str(text))
    except ValueError:
        return None


def _words(kind: str, value: Any) -> str:
    """A statement in short, near to what nft writes."""
    if kind in ("jump", "goto"):
        return f"{kind} {value['target']}"
    if kind != "match":
        return "" if kind in ("counter", "log", "set") else kind
    operator = "" if value["op"] in ("==", "in") else f"{value['op']} "
    return f"{_operand(value['left'])} {operator}{_operand(value['right'])}"


def _operand(value: Any) -> str:
    match value:
        case {"payload": {"protocol": protocol, "field": name}}:
            return f"{protocol} {name}"
        case {"meta": {"key": key}}:
            return str(key)
        case {"ct": {"key": key}}:
            return f"ct {key}"
        case {"prefix": {"addr": base, "len": length}}:
            return f"{base}/{length}"
        case {"set": list(each)}:
            return "{ " + ", ".join(map(_operand, each)) + " }"
        case dict():
            return "(..)"
        case list(each):
            return ",".join(map(_operand, each))
        case _:
            return str(value)


# --- iptables ----------------------------------------------------------------------------------------------------


def iptables_chain(program: str, lines: Iterable[str], name: str, flow: Flow) -> Chain:
    """The built-in chain `name` of the table `filter`, out of all its lines as `iptables -S` shows them."""
    policy = ""
    chains: dict[str, list[Rule]] = {}
    for line in lines:
        words = shlex.split(line)
        if words[:2] == ["-P", name]:
            policy = words[2].lower()
        elif words[:1] == ["-A"]:
            chains.setdefault(words[1], []).append(_iptables_rule(line, words[2:], flow))
    return Chain(f"{program} {name}", chains.get(name, ()), policy, chains, f"{program} -S {name}")


_ACTIONS = {"ACCEPT": "accept", "DROP": "drop", "REJECT": "drop", "RETURN": "return"}
_PASSING = frozenset(("LOG", "NFLOG", "MARK", "CONNMARK", "TRACE", "ULOG", "CT", "CLASSIFY", "TCPMSS"))
"""Targets after which a packet goes on."""

_MODULES = frozenset(("comment", "conntrack", "state", "tcp", "udp", "icmp", "icmp6"))
"""Matches that say nothing by themselves."""


def _iptables_rule(line: str, words: list[str], flow: Flow) -> Rule:
    fits: bool | None = True
    action = target = ""
    at = 0
    while at < len(words):
        negated = words[at] == "!"
        at += negated
        option = words[at]
        values = []
        at += 1
        while at < len(words) and not words[at].startswith("-") and words[at] != "!":
            values.append(words[at])
            at += 1
        value = values[0] if values else ""
        if option in ("-j", "-g"):
            target = "" if value in _ACTIONS or value in _PASSING else value
            action = _ACTIONS.get(value, "" if value in _PASSING else "jump" if option == "-j" else "goto")
            # What follows are the target's own options.
            break
        if option == "--comment" or (option == "-m" and value in _MODULES):
            continue
        found = _iptables_match(option, value, flow)
        fits = _both(fits, found if found is None else found != negated)
    return Rule(fits, action, target, line)


def _iptables_match(option: str, value: str, flow: Flow) -> bool | None:
    match option:
        case "-s" | "-d":
            return Prefix.parse(value, strict=False).holds(flow.src if option == "-s" else flow.dst)
        case "-i" | "-o":
            device = flow.into if option == "-i" else flow.out
            return device.startswith(value[:-1]) if value.endswith("+") else device == value
        case "-p":
            return value in map(str, (*_protocol_names(flow), "all", *(("icmp6",) if flow.protocol == "icmp" else ())))
        case "--dport" if value.isdigit():
            return flow.protocol != "icmp" and int(value) == flow.port
        case "--ctstate" | "--state":
            return "NEW" in value.split(",")
        case _:
            return None


# --- both --------------------------------------------------------------------------------------------------------

_BUILT_IN = {"input": "INPUT", "forward": "FORWARD", "output": "OUTPUT"}


@dataclass(frozen=True, slots=True)
class Filters:
    """All filters of a host, as they were read.

    `listing` is the answer to `nft -j list ruleset`, `sets` the elements of those sets that are known; `iptables` has
    the lines of the table `filter` by the program that keeps it, as `iptables-nft` or `ip6tables-legacy`. What is not
    there is empty. What `iptables-nft` keeps is in the listing as well, in a language that cannot be read there.
    """

    listing: Mapping[str, Any] = field(default_factory=dict)
    sets: Sets = field(default_factory=dict)
    iptables: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def chains(self, hook: str, flow: Flow) -> list[Chain]:
        """The base chains that the packet meets at `hook`, as nftables names it."""
        stem = "iptables-" if flow.family == "ip" else "ip6tables-"
        kept = {program: lines for program, lines in self.iptables.items() if program.startswith(stem)}
        without = [(flow.family, "filter")] if f"{stem}nft" in kept else []
        found = nft_chains(self.listing, hook, flow, self.sets, without)
        if name := _BUILT_IN.get(hook):
            found += [iptables_chain(program, lines, name, flow) for program, lines in kept.items()]
        return found

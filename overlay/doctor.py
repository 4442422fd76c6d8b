"""`overlay-agent doctor`: what is wrong with this host's overlay, from facts that were gathered on it.

Owns the checks: each takes facts and yields findings, whose causes are those of `causes`. Pure; what gathers the facts
is `commands.examination`. A check whose facts could not be had is told as such, and is neither passed nor failed.

A fault is to be named once, and a host in order not at all. So what may be a mere passing state is no finding: facts
that change by themselves are gathered until they hold still.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from textwrap import wrap
from typing import Any, NamedTuple

from overlay import causes
from overlay.causes import Finding
from overlay.device import FoundDevice, Underlay
from overlay.model import Drop, Fdb, Guard, Neighbour, NextHop, Op, Put, Route
from overlay.verdict import of_rejection
from subnet_lease.model import Lease, Prefix, format_address, format_mac, format_subnets
from subnet_lease.table import Reason


class NotKnown(Exception):
    """A check cannot be made, for the reason that the text says."""


SCHEMA = 1
"""Version of the document that `--json` prints."""

SKEW_S = 10.0
"""Seconds by which two clocks may differ. Far less than what certificates and leases bear, more than a slow answer."""

WARN_S = 14 * 86400.0
"""Seconds before the end of a certificate from which on it is told."""

RENEWED_LATE = 0.9
"""A lease is renewed `margin` seconds before its end or earlier; with less than this part of them left it was not."""

MOST_PEERS = 3
"""How many findings are told of one cause when it concerns many peers."""

MOST_NAMED = 32
"""How many of the others are named."""


# --- facts -------------------------------------------------------------------------------------------------------


class Host(NamedTuple):
    """What this process may do, and what the host has. `missing` are things the agent needs, each with its remedy."""

    lacking: tuple[str, ...] = ()
    missing: tuple[tuple[str, str], ...] = ()


class Rival(NamedTuple):
    """Another process that would program this host: `flanneld`, or a second `overlay-agent`."""

    pid: int
    program: str
    command: str


class Agent(NamedTuple):
    """The agent of this host: its process, None if there is none, 0 if it is out of sight in another container.

    `stalled` says why it seems not to work, `lacking` are capabilities it does not have. `options` is what is wrong
    with the options it would start with: path and reason. `unwritable` are paths it keeps things at, each with what
    keeps it from writing. `told` are the findings that it names itself.
    """

    pid: int | None = None
    stalled: str = ""
    lacking: tuple[str, ...] = ()
    rivals: tuple[Rival, ...] = ()
    options: tuple[str, str] | None = None
    unwritable: tuple[tuple[str, str], ...] = ()
    told: tuple[Finding, ...] = ()


class Certificate(NamedTuple):
    """Where it is (a file, or who shows it), and how many seconds it still lasts; negative if it has ended."""

    place: str
    left_s: float


class Etcd(NamedTuple):
    """How etcd answered: `failure` is a cause, or empty. `config`: whether the key is there; `unusable` says why its
    value cannot be used, `changes` what of it the running agent has not taken over. `skew_s` is by how much this host's
    clock is ahead of etcd's, None where that cannot be told.
    """

    endpoint: str
    prefix: str
    failure: str = ""
    reason: str = ""
    config: bool = True
    unusable: str = ""
    changes: tuple[str, ...] = ()
    skew_s: float | None = None
    certificates: tuple[Certificate, ...] = ()


class Leases(NamedTuple):
    """The leases by the agents' own judgement. `own` is this host's, None if it has none; `left_s` how long it lasts,
    None for a reservation; `margin_s` how long before its end it is renewed. `rejected` are those that are not used,
    by key, and why. `ranges` are the networks with the count of their subnets and how many are taken.
    """

    prefix: str
    own: Lease | None
    accepted: tuple[Lease, ...]
    rejected: tuple[tuple[str, Reason], ...] = ()
    left_s: float | None = None
    margin_s: float = 0.0
    ranges: tuple[tuple[str, int, int], ...] = ()


class Tunnel(NamedTuple):
    """A device that is called for, by name, and what was found; `link` is the interface below it, and its state."""

    name: str
    found: FoundDevice | None
    link: str = ""


class Links(NamedTuple):
    """The underlay by the options, None where there is none (`reason`); the tunnels; interfaces that are down and ought
    not to be; addresses of ours that another machine answers for: interface, address, MAC. `elsewhere` are the peers'
    addresses that the kernel sends to by another interface, and which.
    """

    underlay: Underlay | None
    reason: str = ""
    tunnels: tuple[Tunnel, ...] = ()
    down: tuple[str, ...] = ()
    doubles: tuple[tuple[str, bytes, bytes], ...] = ()
    elsewhere: tuple[tuple[bytes, str], ...] = ()
    reachable: int = 0


class Way(NamedTuple):
    """A route of somebody else's, in words, as `ip` takes it, and the interface it leaves by; `taken` are the peers'
    subnets that the kernel sends by it. `link`: whether it is a network of this host, and no route that a tool made.
    """

    route: str
    device: str
    link: bool
    network: str
    taken: tuple[Lease, ...] = ()


class Entries(NamedTuple):
    """The operations that would put the dataplane right, the lease that each is for, None for what no lease calls for.

    `devices` are names by index, `ways` the routes of others that overlap the overlay's networks.
    """

    ops: tuple[tuple[Op, Lease | None], ...] = ()
    devices: Mapping[int, str] = {}
    ways: tuple[Way, ...] = ()


class Setting(NamedTuple):
    """A kernel setting that is in the way: name, value, and what it ought to be."""

    name: str
    value: str
    wanted: str


class Strict(NamedTuple):
    """A strict reverse path filter that drops packets of a peer: the setting, the interface, the peer, its address, and
    the interface by which that would be answered.
    """

    setting: str
    interface: str
    peer: Lease
    address: bytes
    back: str


class Refusing(NamedTuple):
    """A rule or policy that drops a packet of ours: what packet, which filter, the rule, and what shows it.

    `hook` is `forward`, `bridge` (the same, between pods of this host), `input` or `output` (the tunnels' own packets).
    """

    hook: str
    where: str
    rule: str
    command: str
    program: str


class Kernel(NamedTuple):
    """Settings and filters of this host that are in the way, and the overlay's networks."""

    networks: tuple[Prefix, ...]
    port: int
    forwarding: tuple[Setting, ...] = ()
    strict: tuple[Strict, ...] = ()
    refusing: tuple[Refusing, ...] = ()


class Guarded(NamedTuple):
    """Packets that the source guard dropped while this command looked, by counter; from which addresses, if known."""

    counts: Mapping[str, int]
    sources: tuple[bytes, ...] = ()
    port: int = 0


class Path(NamedTuple):
    """What was measured to one peer: `cause` as `probe` judges it, empty if nothing is wrong, and what was seen.

    `device` is the tunnel's, `interface` the underlay's; `largest` the largest packet in bytes that passes inside, of
    `mtu`; the tunnel adds `overhead`.
    """

    lease: Lease
    cause: str
    evidence: tuple[str, ...]
    device: str
    interface: str
    port: int
    mtu: int
    largest: int
    overhead: int


class Leftover(NamedTuple):
    """What another tool has left: whose (`flannel` or `calico`), what, and the command that removes it."""

    tool: str
    what: str
    command: str


@dataclass(frozen=True, slots=True)
class Facts:
    """All that was gathered. A group that is None could not be; `unknown` says why, by the group's name."""

    host: Host | None = None
    agent: Agent | None = None
    etcd: Etcd | None = None
    leases: Leases | None = None
    links: Links | None = None
    entries: Entries | None = None
    kernel: Kernel | None = None
    guarded: Guarded | None = None
    paths: tuple[Path, ...] | None = None
    leftovers: tuple[Leftover, ...] | None = None
    unknown: Mapping[str, str] | None = None


# --- checks: this host and its agent -----------------------------------------------------------------------------


def _privileges(facts: Facts) -> Iterator[Finding]:
    if facts.host and facts.host.lacking:
        names = " and ".join(facts.host.lacking)
        yield Finding(
            "no_privilege",
            what=f"this command lacks {names}, so it sees only a part",
            remedy="Run it with sudo; in a container, add "
            + " ".join(f"`--cap-add {name.removeprefix('CAP_')}`" for name in facts.host.lacking)
            + ".",
        )
    if facts.agent and facts.agent.lacking:
        yield Finding(
            "no_privilege",
            what=f"the agent lacks {' and '.join(facts.agent.lacking)}",
            evidence=(f"/proc/{facts.agent.pid}/status: CapEff",),
            values={"pid": str(facts.agent.pid)},
        )


def _features(facts: Facts) -> Iterator[Finding]:
    assert facts.host is not None
    for what, remedy in facts.host.missing:
        yield Finding("kernel_feature_missing", what, (what,), what=what, remedy=remedy)


def _running(facts: Facts) -> Iterator[Finding]:
    assert facts.agent is not None
    if facts.agent.pid is None:
        yield Finding("agent_not_running", evidence=("/proc/net/unix has no @overlay-agent",))
    elif facts.agent.stalled:
        yield Finding("agent_stalled", evidence=(f"process {facts.agent.pid}: {facts.agent.stalled}",))


def _rivals(facts: Facts) -> Iterator[Finding]:
    assert facts.agent is not None
    for rival in facts.agent.rivals:
        values = {"program": rival.program, "pid": str(rival.pid)}
        yield Finding("second_agent", f"process {rival.pid}", (f"{rival.pid} {rival.command}",), values)


def _options(facts: Facts) -> Iterator[Finding]:
    assert facts.agent is not None
    if facts.agent.options:
        path, reason = facts.agent.options
        yield Finding("options_unreadable", evidence=(reason,), values={"path": path})


def _disk(facts: Facts) -> Iterator[Finding]:
    assert facts.agent is not None
    for path, reason in facts.agent.unwritable:
        yield Finding("journal_failing", evidence=(f"{path}: {reason}",), values={"path": path})


def _told(facts: Facts) -> Iterator[Finding]:
    assert facts.agent is not None
    yield from facts.agent.told


# --- checks: etcd and leases -------------------------------------------------------------------------------------


def _etcd(facts: Facts) -> Iterator[Finding]:
    assert facts.etcd is not None
    etcd = facts.etcd
    if etcd.failure:
        yield Finding(etcd.failure, evidence=(etcd.reason,), values={"endpoint": etcd.endpoint, "prefix": etcd.prefix})


def _config(facts: Facts) -> Iterator[Finding]:
    assert facts.etcd is not None
    etcd = facts.etcd
    values = {"prefix": etcd.prefix}
    if etcd.failure:
        raise NotKnown("etcd did not tell it")
    if not etcd.config:
        yield Finding("config_missing", evidence=(f"{etcd.prefix}/config: there is no such key",), values=values)
    elif etcd.unusable:
        yield Finding("config_unusable", evidence=(f"{etcd.prefix}/config: {etcd.unusable}",), values=values)
    elif etcd.changes:
        yield Finding("config_needs_restart", evidence=etcd.changes, values=values)


def _clock(facts: Facts) -> Iterator[Finding]:
    assert facts.etcd is not None
    skew = facts.etcd.skew_s
    if skew is None:
        raise NotKnown("etcd did not tell its own")
    if abs(skew) > SKEW_S:
        side = "ahead of" if skew > 0 else "behind"
        values = {"seconds": f"{abs(skew):.0f}", "endpoint": facts.etcd.endpoint}
        evidence = f"this host's clock is {abs(skew):.0f} s {side} the date in the answer of {facts.etcd.endpoint}"
        yield Finding("clock_skew", evidence=(evidence,), values=values)


def _certificates(facts: Facts) -> Iterator[Finding]:
    assert facts.etcd is not None
    for place, left in facts.etcd.certificates:
        if left > WARN_S:
            continue
        days = abs(left) / 86400
        when = f"ended {days:.0f} days ago" if left < 0 else f"ends in {days:.0f} days"
        what = f"the certificate {place} {when}"
        yield Finding("etcd_certificate", place, (what,), {"path": place}, what=what)


def _own_lease(facts: Facts) -> Iterator[Finding]:
    assert facts.leases is not None
    leases = facts.leases
    if leases.own is None:
        evidence = f"no key below {leases.prefix}/subnets has this host's address"
        yield Finding("lease_lost", evidence=(evidence,), values={"prefix": leases.prefix})
    elif leases.left_s is not None and leases.left_s < RENEWED_LATE * leases.margin_s:
        left = f"{leases.left_s / 60:.0f} min" if leases.left_s >= 600 else f"{leases.left_s:.0f} s"
        evidence = f"{leases.own}: {left} left; it is renewed {leases.margin_s / 60:.0f} min before its end, or earlier"
        yield Finding("lease_expiring", evidence=(evidence,), values={"left": left})


def _subnets(facts: Facts) -> Iterator[Finding]:
    assert facts.leases is not None
    for network, count, taken in facts.leases.ranges:
        if taken >= count:
            evidence = f"{network}: {taken} of {count} subnets are taken"
            yield Finding("subnets_exhausted", evidence=(evidence,), values={"prefix": facts.leases.prefix})


def _others(facts: Facts) -> Iterator[Finding]:
    assert facts.leases is not None
    for key, reason in facts.leases.rejected:
        yield of_rejection(key, reason, facts.leases.prefix)


# --- checks: interfaces and entries ------------------------------------------------------------------------------


def _interface(facts: Facts) -> Iterator[Finding]:
    assert facts.links is not None
    links = facts.links
    if links.underlay is None:
        yield Finding("underlay_choice", evidence=(links.reason,))
        return
    for tunnel in links.tunnels:
        if tunnel.found is not None and tunnel.link not in ("", links.underlay.name):
            evidence = f"{tunnel.name} is over {tunnel.link}; by the options it is to be {links.underlay.name}"
            yield Finding("underlay_choice", evidence=(evidence,))
    if links.elsewhere and not links.reachable:
        address, interface = links.elsewhere[0]
        evidence = (
            f"{format_address(address)} and all other peers are reached by {interface}, not {links.underlay.name}"
        )
        yield Finding("underlay_choice", evidence=(evidence,), values={"underlay": format_address(address)})


def _addresses(facts: Facts) -> Iterator[Finding]:
    assert facts.links is not None
    for interface, address, mac in facts.links.doubles:
        values = {"interface": interface, "address": format_address(address), "mac": format_mac(mac)}
        evidence = f"{format_mac(mac)} on {interface} answers for {format_address(address)}, which is this host's"
        yield Finding("duplicate_address", interface, (evidence,), values)


def _devices(facts: Facts) -> Iterator[Finding]:
    assert facts.links is not None
    below = facts.links.underlay.name if facts.links.underlay else ""
    for name in facts.links.down:
        # Nothing reaches etcd by an interface that is down, either.
        hides = frozenset({"etcd_unreachable"} if name == below else ())
        yield Finding("device_down", evidence=(f"{name} is down",), values={"device": name}, hides=hides)
    for tunnel in facts.links.tunnels:
        if tunnel.found is None:
            evidence = f"there is no interface {tunnel.name}"
            yield Finding("device_missing", evidence=(evidence,), values={"device": tunnel.name})


_KIND_OF = {
    Fdb: "fdb_wrong",
    Neighbour: "neighbour_wrong",
    Route: "route_wrong",
    NextHop: "route_wrong",
    Guard: "guard_drops",
}


def _entries(facts: Facts) -> Iterator[Finding]:
    assert facts.entries is not None
    wrong: dict[tuple[str, str], list[str]] = defaultdict(list)
    values: dict[tuple[str, str], dict[str, str]] = {}
    stray: list[str] = []
    device = ""
    for op, lease in facts.entries.ops:
        entry = op.entry
        at = entry.at[0] if isinstance(entry, Fdb | Neighbour) else 0
        device = facts.entries.devices.get(at, device)
        match op:
            case Put() if lease is not None:
                key = _KIND_OF[type(entry)], format_subnets(lease.subnets)
                wrong[key].append(f"{entry} is not in place")
                values[key] = {**values.get(key, {}), **_values(lease, device)}
            case Drop():
                stray.append(f"{entry}")
    for (cause, subject), evidence in wrong.items():
        yield Finding(cause, subject, tuple(evidence), values[cause, subject])
    if stray:
        some = stray[:MOST_PEERS] + ([f"and {len(stray) - MOST_PEERS} more"] if len(stray) > MOST_PEERS else [])
        command = "sudo systemctl restart overlay-agent"
        yield Finding("foreign_entries", evidence=tuple(some), values={"device": device, "command": command})


def _values(lease: Lease, device: str) -> dict[str, str]:
    """What is known of a peer, for the placeholders."""
    attrs = lease.attrs
    found = {
        "peer": peer_name(lease),
        "subnet": str(lease.subnets[0]),
        "gateway": format_address(lease.subnets[0].base),
        "underlay": format_address(attrs.underlay_ip) if attrs.underlay_ip else "",
        "mac": format_mac(attrs.vtep.mac) if attrs.vtep else "",
        "device": device,
    }
    return {name: value for name, value in found.items() if value}


def peer_name(lease: Lease) -> str:
    """A peer, for people: by its name if it has given one, and its underlay address."""
    name, address = lease.attrs.extra.get("NodeName"), lease.attrs.underlay_ip
    text = format_address(address) if address else format_subnets(lease.subnets)
    plain = name if isinstance(name, str) and name.isascii() and name.isprintable() else ""
    return f"{plain[:40]} ({text})" if plain else text


def _routes(facts: Facts) -> Iterator[Finding]:
    assert facts.entries is not None
    for way in facts.entries.ways:
        where = way.route
        if way.link or not way.taken:
            told = (f"it takes packets for {peer_name(way.taken[0])}",) if way.taken else ()
            yield Finding("overlapping_route", where, (where, *told), {"route": where, "network": way.network})
            continue
        for lease in way.taken:
            dash = "" if len(lease.subnets[0].base) == 4 else "-6 "
            values = {**_values(lease, way.device), "route": where, "command": f"ip {dash}route del {where}"}
            yield Finding("route_foreign", format_subnets(lease.subnets), (where,), values)


# --- checks: kernel settings and filters -------------------------------------------------------------------------


def _forwarding(facts: Facts) -> Iterator[Finding]:
    assert facts.kernel is not None
    for name, value, wanted in facts.kernel.forwarding:
        values = {"setting": name, "value": value, "wanted": wanted}
        yield Finding("forwarding_off", evidence=(f"{name} = {value}",), values=values)


def _reverse_path(facts: Facts) -> Iterator[Finding]:
    assert facts.kernel is not None
    for setting, interface, peer, address, back in facts.kernel.strict:
        text = format_address(address)
        values = {"setting": setting, "interface": interface, "underlay": text}
        evidence = f"{setting} is strict; {text} arrives by {interface} and would be answered by {back}"
        yield Finding("rp_filter", format_subnets(peer.subnets), (evidence,), values)


def _filters(hook: str, cause: str) -> Callable[[Facts], Iterator[Finding]]:
    def check(facts: Facts) -> Iterator[Finding]:
        assert facts.kernel is not None
        network = " and ".join(map(str, facts.kernel.networks))
        for each in facts.kernel.refusing:
            if each.hook == hook:
                values = {
                    "program": each.program,
                    "command": each.command,
                    "network": network,
                    "port": str(facts.kernel.port),
                    "peer": "all peers",
                }
                remedy = _accepting(each, facts.kernel.networks) if hook in ("forward", "bridge") else ""
                yield Finding(cause, evidence=(f"{each.where}: {each.rule}",), values=values, remedy=remedy)

    return check


def _accepting(refusing: Refusing, networks: Iterable[Prefix]) -> str:
    """The commands that let the overlay's packets through a chain of nftables; empty for other filters."""
    kind, _, chain = refusing.where.partition(" ")
    if kind != "nftables":
        return ""
    commands = (
        f"`sudo nft insert rule {chain} {'ip' if len(block.base) == 4 else 'ip6'} {side} {block} accept`"
        for block in networks
        for side in ("saddr", "daddr")
    )
    return f"Run {' and '.join(commands)}, and have the tool that made the chain do so."


def _guard(facts: Facts) -> Iterator[Finding]:
    assert facts.guarded is not None
    counts = [f"{count} {name}" for name, count in facts.guarded.counts.items() if count]
    if counts:
        sources = (
            " and ".join(map(format_address, facts.guarded.sources[:MOST_PEERS])) or "addresses that are no peer's"
        )
        evidence = f"dropped while this was looked at: {', '.join(counts)}"
        yield Finding("guard_drops", evidence=(evidence,), values={"source": sources, "port": str(facts.guarded.port)})


# --- checks: paths -----------------------------------------------------------------------------------------------


_DIRECTIONS = frozenset({"port_blocked", "port_blocked_out", "port_blocked_in"})


def _paths(facts: Facts) -> Iterator[Finding]:
    assert facts.paths is not None
    # Which direction is cut, an agent that hears its peers knows better than one look does.
    told = {each.subject for each in facts.agent.told if each.cause in _DIRECTIONS} if facts.agent else set()
    for path in facts.paths:
        known = path.cause in _DIRECTIONS and format_subnets(path.lease.subnets) in told
        if path.cause and not known:
            values = {
                **_values(path.lease, path.device),
                "port": str(path.port),
                "interface": path.interface,
                "mtu": str(path.largest or path.mtu),
                # What ping -s takes leaves out its own header and IP's.
                "payload": str(path.mtu + path.overhead - 28),
                "command": "nft list ruleset",
                "prefix": facts.etcd.prefix if facts.etcd else "PREFIX",
            }
            yield Finding(path.cause, format_subnets(path.lease.subnets), path.evidence, values)


# --- checks: leftovers -------------------------------------------------------------------------------------------


def _leftovers(tool: str) -> Callable[[Facts], Iterator[Finding]]:
    def check(facts: Facts) -> Iterator[Finding]:
        assert facts.leftovers is not None
        found = [each for each in facts.leftovers if each.tool == tool]
        if found:
            what = " and ".join(each.what for each in found)
            command = "`, `".join(each.command for each in found)
            yield Finding(f"{tool}_leftover", evidence=(what,), values={"what": what, "command": command})

    return check


# --- all of them -------------------------------------------------------------------------------------------------


class Check(NamedTuple):
    """A check: what it is called, what is so when it passes, the facts that it needs, and what finds."""

    name: str
    passes: str
    needs: str
    findings: Callable[[Facts], Iterator[Finding]]


CHECKS: Sequence[Check] = (
    Check("privileges", "CAP_NET_ADMIN and CAP_NET_RAW are there", "host", _privileges),
    Check("kernel", "VXLAN and the programs needed are there", "host", _features),
    Check("agent", "an agent runs, and works", "agent", _running),
    Check("one agent", "nobody else programs this host", "agent", _rivals),
    Check("options", "the agent's options can be used", "agent", _options),
    Check("disk", "the agent can write what it keeps", "agent", _disk),
    Check("etcd", "etcd answers", "etcd", _etcd),
    Check("clock", "this host's clock is that of etcd", "etcd", _clock),
    Check("certificates", "no certificate ends soon", "etcd", _certificates),
    Check("config", "the network configuration can be used, and is in use", "etcd", _config),
    Check("lease", "this host has a lease, renewed in time", "leases", _own_lease),
    Check("leases", "all leases are believed", "leases", _others),
    Check("subnets", "there are free subnets", "leases", _subnets),
    Check("interface", "the interface leads to the peers", "links", _interface),
    Check("addresses", "nobody else has this host's addresses", "links", _addresses),
    Check("devices", "the VXLAN devices are up", "links", _devices),
    Check("entries", "entries stand for every peer, and no others", "entries", _entries),
    Check("routes", "no other route overlaps the overlay", "entries", _routes),
    Check("forwarding", "the kernel forwards packets", "kernel", _forwarding),
    Check("forward filter", "no filter drops pods' packets", "kernel", _filters("forward", "forward_drop")),
    Check(
        "bridge filter", "no filter drops what pods here send each other", "kernel", _filters("bridge", "br_netfilter")
    ),
    Check(
        "input filter", "no filter drops tunnels' packets that arrive", "kernel", _filters("input", "port_blocked_in")
    ),
    Check(
        "output filter", "no filter drops tunnels' packets that leave", "kernel", _filters("output", "port_blocked_out")
    ),
    Check("reverse path", "no reverse path filter drops peers' packets", "kernel", _reverse_path),
    Check("guard", "the source guard drops nothing", "guarded", _guard),
    Check("paths", "the peers that were asked answer: ping, UDP of the MTU's size, TCP", "paths", _paths),
    Check("flannel", "nothing of flannel's is left", "leftovers", _leftovers("flannel")),
    Check("calico", "nothing of Calico's is left", "leftovers", _leftovers("calico")),
    Check("self", "the agent names nothing itself", "agent", _told),
)
"""The host's own matters come before those that depend on others. What the agent says comes last: what was looked at
just now says more of a cause than what somebody remembers.
"""


class Report(NamedTuple):
    """The findings that are worth telling, the checks that passed, and those that could not be made, each with why."""

    findings: list[Finding]
    passed: list[Check]
    unknown: list[tuple[Check, str]]


def examine(facts: Facts) -> Report:
    """Carry out all checks."""
    found: list[Finding] = []
    passed, unknown = [], []
    for check in CHECKS:
        if getattr(facts, check.needs) is None:
            unknown.append((check, (facts.unknown or {}).get(check.needs, "it could not be read")))
            continue
        try:
            some = list(check.findings(facts))
        except NotKnown as reason:
            unknown.append((check, str(reason)))
            continue
        found += some
        if not some:
            passed.append(check)
    told = sorted(_fewer(causes.roots(found)), key=lambda finding: causes.severity(finding) != causes.DOWN)
    return Report(told, passed, unknown)


def _fewer(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Of one cause, a few findings; the last of them tells of the rest."""
    for _, some in groupby(findings, lambda finding: finding.cause):
        each = list(some)
        yield from each[: MOST_PEERS - 1]
        last, rest = each[MOST_PEERS - 1 : MOST_PEERS], each[MOST_PEERS:]
        for finding in last:
            more = f"and {len(rest)} more: {', '.join(other.subject for other in rest[:MOST_NAMED])}"
            evidence = (*finding.evidence, more + (", .." if len(rest) > MOST_NAMED else ""))
            yield replace(finding, evidence=evidence) if rest else finding


# --- what people and programs see --------------------------------------------------------------------------------


def _wrapped(line: str, columns: int | None, indent: str) -> list[str]:
    """The line, in as many as it takes; no command is broken inside of a word."""
    if columns is None or len(line) <= columns:
        return [line]
    return wrap(line, max(columns, 40), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def as_json(report: Report, host: str, version: str, seconds: float) -> dict[str, Any]:
    """The schema of docs/doctor.md. Keys may be added to it; none changes its meaning."""
    return {
        "schema": SCHEMA,
        "host": host,
        "version": version,
        "took_s": round(seconds, 2),
        "findings": [causes.as_json(finding) for finding in report.findings],
        "passed": [check.name for check in report.passed],
        "unknown": [{"check": check.name, "reason": reason} for check, reason in report.unknown],
    }


def as_text(report: Report, seconds: float, columns: int | None, *, verbose: bool) -> Iterator[tuple[str, str]]:
    """Lines for people, each with its sort: `down`, `degraded`, `detail`, `passed`, `unknown` or `summary`.

    `columns` is the width of the terminal, None for no end of a line.
    """
    for finding in report.findings:
        about = f" [{finding.subject}]" if finding.subject else ""
        yield causes.severity(finding), f"{causes.severity(finding):<9} {finding.cause}{about}"
        what = causes.what(finding)
        seen = [f"  seen:  {line}" for line in finding.evidence if line != what]
        for line in (f"  {what}", *seen, f"  mend:  {causes.remedy(finding)}"):
            indent = " " * (9 if line.startswith(("  seen:", "  mend:")) else 2)
            yield from (("detail", each) for each in _wrapped(line, columns, indent))
        yield "detail", ""
    if verbose:
        width = max(len(check.name) for check in CHECKS)
        for check in report.passed:
            yield "passed", f"ok        {check.name:<{width}}  {check.passes}"
        for check, reason in report.unknown:
            yield "unknown", f"unknown   {check.name:<{width}}  {reason}"
    elif report.unknown:
        names = ", ".join(dict.fromkeys(check.name for check, _ in report.unknown))
        yield "unknown", f"Not looked at: {names}; --verbose says why."
    count = len(report.findings)
    found = "nothing is wrong" if not count else f"{count} {'finding' if count == 1 else 'findings'}"
    yield "summary", f"{len(report.passed)} of {len(CHECKS)} checks passed in {seconds:.1f} s: {found}."

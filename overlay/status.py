"""What `overlay-agent status` tells: facts of a running agent, or of the kernel alone, as one document.

Owns the document (the schema of docs/status.md). What is wrong is judged by `verdict`, and worded by `causes`; the
layout for people is `status_text`. The document is made beside the loops, travels as JSON, and is laid out where
somebody asked for it.

Keys may be added to it; none changes its meaning. What is not known is null; what was not measured is absent.
"""

import errno
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, NotRequired, TypedDict

from overlay import causes
from overlay.causes import Finding
from overlay.checksums import Finding as ChecksumFinding
from overlay.device import FoundDevice, Underlay
from overlay.model import PERMANENT, PROTOCOL, PROTOCOL_BOOT, Entry, Fdb, Key, Neighbour, NextHop, Refusal, Route
from overlay.probe import Path
from subnet_lease.model import Lease, NetworkConfig, Prefix, format_address, format_mac

SCHEMA = 1
"""Version of the document."""

HEALTHY, DEGRADED, DOWN = "healthy", causes.DEGRADED, causes.DOWN

INCOMPLETE, UNREACHABLE, PROGRAMMED = "incomplete", "unreachable", "programmed"

EXIT_CODES = {HEALTHY: 0, DEGRADED: 1, DOWN: 2}

MOST_LISTED = 64
"""How many refused entries, rejected leases, problems with peers and missing entries of a peer are listed; all of them
are counted."""

MAX_KEY = 64
"""How much of a key that may be anybody's is shown."""

# --- the document ------------------------------------------------------------------------------------------------


class Problem(TypedDict):
    """A finding as `causes.as_json` has it."""

    cause: str
    severity: str
    subject: str | None
    what: str
    evidence: list[str]
    remedy: str


class AgentPart(TypedDict):
    """The process that answered. `trouble` is what kept the latest pass from its end, empty if nothing did."""

    version: str
    pid: int
    node_name: str
    running_s: float
    ready: bool
    trouble: str


class LeasePart(TypedDict):
    """This host's lease. `left_s` is null for a reservation, and as long as etcd has not confirmed it."""

    subnets: list[str]
    reserved: bool
    left_s: float | None


class NetworkPart(TypedDict):
    """The network configuration in use; `vni` and `port` are null where the backend has no tunnels."""

    blocks: list[str]
    backend: str
    direct_routing: bool
    nexthop_objects: bool
    vni: int | None
    port: int | None
    mtu: int


class DevicePart(TypedDict):
    """A VXLAN device as the kernel has it now; all but the name is null where it is missing."""

    name: str
    up: bool | None
    mac: str | None
    mtu: int | None
    vni: int | None
    port: int | None
    local: str | None
    addresses: list[str]
    checksum_offload: str | None


class UnderlayPart(TypedDict):
    """The interface that carries the overlay, and why it was chosen."""

    interface: str
    addresses: list[str]
    mtu: int
    why: str
    runner_up: str | None


class EtcdPart(TypedDict):
    """Whether a watch stands. `data_age_s` is 0 then, null if nothing was heard since the start; `reason` is of now."""

    connected: bool
    data_age_s: float | None
    revision: int
    reason: str | None


class ChangePart(TypedDict):
    """The latest pass that changed something: how long ago, how long it took, and its entries."""

    ago_s: float
    took_ms: float
    put: int
    dropped: int
    refused: int


class DataplanePart(TypedDict):
    """Entries called for, those not in place, those in the way; repaired since the start (`drift`)."""

    wanted: int
    missing: int
    surplus: int
    drift: int
    last_pass_ago_s: float
    last_change: ChangePart | None


class RefusedPart(TypedDict):
    """An entry that the kernel refuses, with the errno's name."""

    entry: str
    error: str


class RejectedPart(TypedDict):
    """A lease that is not used, and why."""

    key: str
    reason: str


class CountsPart(TypedDict):
    """How many peers there are, and of each state."""

    total: int
    programmed: int
    incomplete: int
    unreachable: int


class FirewallPart(TypedDict):
    """The guard's mode, and the packets it met since its rules were last loaded; null where there are none."""

    guard: str
    strangers: int | None
    impostors: int | None
    strays: int | None


class PathPart(TypedDict):
    """What was measured of the way to a peer; `path_mtu` is the largest packet in bytes that passed inside of it."""

    reachable: bool
    rtt_ms: float | None
    loss: float | None
    path_mtu: int | None
    path_verified_ago_s: float | None
    cause: str | None


def path_part(path: Path, now: float) -> PathPart:
    """What was measured of a path, at `now` on its clock."""
    return {
        "reachable": path.reachable,
        "rtt_ms": None if path.rtt_median is None else round(1000 * path.rtt_median, 3),
        "loss": round(path.loss, 3),
        "path_mtu": path.mtu or None,
        "path_verified_ago_s": round(now - path.mtu_when, 1) if path.mtu else None,
        "cause": path.cause or None,
    }


class PeerPart(TypedDict):
    """Another host's lease. `state`: programmed, incomplete (entries `missing`), or unreachable (none can be made).

    `changed_ago_s` is null where it has not changed since the agent took over the leases. What PathPart has is absent
    where it was not measured.
    """

    subnets: list[str]
    node_name: str | None
    underlay: list[str]
    macs: list[str]
    state: str
    entries: int
    missing: list[str]
    mtu: int | None
    changed_ago_s: float | None
    reachable: NotRequired[bool]
    rtt_ms: NotRequired[float | None]
    loss: NotRequired[float | None]
    path_mtu: NotRequired[int | None]
    path_verified_ago_s: NotRequired[float | None]
    cause: NotRequired[str | None]


class Head(TypedDict):
    """The document but for the peers, of which there may be many."""

    schema: int
    health: str
    problems: list[Problem]
    agent: AgentPart | None
    lease: LeasePart | None
    network: NetworkPart | None
    devices: list[DevicePart]
    underlay: UnderlayPart | None
    etcd: EtcdPart | None
    dataplane: DataplanePart | None
    refused: list[RefusedPart]
    refused_count: int
    rejected: list[RejectedPart]
    rejected_count: int
    firewall: FirewallPart | None
    peer_counts: CountsPart | None


class Document(Head):
    """All of it; the peers worst first, then by subnet, those that were asked for; null if none were."""

    peers: list[PeerPart] | None


# --- from a running agent ----------------------------------------------------------------------------------------


_RANKS = {INCOMPLETE: 0, UNREACHABLE: 1, PROGRAMMED: 3}
_SUFFERS = 2
"""Rank of a peer whose entries are in place, and that packets do not reach as they should."""


class Standing(NamedTuple):
    """An accepted lease and how it stands: how many entries it calls for here, which of them are not in place, what was
    measured. Its order is the one of the document.
    """

    rank: int
    subnets: tuple[Prefix, ...]
    key: str
    lease: Lease
    state: str
    entries: int
    missing: tuple[Entry, ...]
    path: PathPart | None


def standings(
    peers: Iterable[tuple[str, Lease]],
    wanted: Mapping[str, Sequence[Entry]],
    unreachable: Set[str],
    gap: Mapping[Key, Entry | None],
    *,
    routes: bool = True,
    path: Callable[[str], PathPart | None] | None = None,
) -> list[Standing]:
    """How the leases of other hosts stand, worst first: incomplete, unreachable, those that packets do not reach as
    they should, then those in order; each by subnet.

    `wanted` is what each calls for, `unreachable` are those that can have nothing here, `gap` is what stands under each
    key that is amiss. `routes`: whether the backend programs anything at all. `path` gives what was measured of a peer.
    """
    found = []
    for key, lease in peers:
        entries = wanted.get(key, ())
        missing = tuple(entry for entry in entries if entry[0] in gap) if gap else ()
        cut_off, incomplete = key in unreachable, missing or (routes and not entries)
        state = UNREACHABLE if cut_off else INCOMPLETE if incomplete else PROGRAMMED
        measured = path(key) if path else None
        rank = _SUFFERS if state == PROGRAMMED and measured and measured["cause"] else _RANKS[state]
        found.append(Standing(rank, lease.subnets, key, lease, state, len(entries), missing, measured))
    found.sort()
    return found


def counts(peers: Collection[Standing]) -> CountsPart:
    """How many there are of each state."""
    of_state = {state: sum(peer.state == state for peer in peers) for state in (PROGRAMMED, INCOMPLETE, UNREACHABLE)}
    return {
        "total": len(peers),
        "programmed": of_state[PROGRAMMED],
        "incomplete": of_state[INCOMPLETE],
        "unreachable": of_state[UNREACHABLE],
    }


def chosen(peers: Sequence[Standing], most: int | None) -> Iterator[Standing]:
    """Those that are not in order, and at most so many of those that are; None for all."""
    in_order = _RANKS[PROGRAMMED]
    left = len(peers) if most is None else most
    for peer in peers:
        left -= peer.rank == in_order
        if left < 0:
            return
        yield peer


@dataclass(frozen=True, slots=True)
class Facts:
    """What an agent knows of itself at one moment; times in seconds. The parts that are values already go in as such.

    `problems` are the findings of `verdict`. `devices` pairs the name of each device called for with what the kernel
    has, None where there is none. `checksums` are the findings on offloads, by device. `refused` are the entries that
    the kernel refuses. `dataplane` and `peers` None: the reconciler did not answer in time.
    """

    problems: Sequence[Finding]
    agent: AgentPart
    lease: Lease | None
    lease_left: float | None
    config: NetworkConfig
    nexthops: bool
    mtu: int
    devices: Sequence[tuple[str, FoundDevice | None]]
    checksums: Mapping[str, ChecksumFinding]
    underlay: Underlay
    etcd: EtcdPart
    dataplane: DataplanePart | None
    rejected: Sequence[tuple[str, str]]
    rejected_count: int
    firewall: FirewallPart
    refused: Sequence[Refusal]
    peers: CountsPart | None


def head(facts: Facts) -> Head:
    """The document of a running agent, without its peers."""
    tunnels = facts.config.backend.type == "vxlan"
    return {
        **_nothing(facts.problems),
        "agent": facts.agent,
        "lease": _lease(facts.lease, facts.lease_left) if facts.lease else None,
        "network": {
            "blocks": list(map(str, facts.config.blocks)),
            "backend": facts.config.backend.type,
            "direct_routing": facts.config.backend.direct_routing,
            "nexthop_objects": facts.nexthops,
            "vni": facts.config.backend.vni if tunnels else None,
            "port": facts.config.backend.port if tunnels else None,
            "mtu": facts.mtu,
        },
        "devices": [_device(name, found, facts.checksums.get(name)) for name, found in facts.devices],
        "underlay": {
            "interface": facts.underlay.name,
            "addresses": list(map(format_address, facts.underlay.addresses)),
            "mtu": facts.underlay.mtu,
            "why": facts.underlay.why,
            "runner_up": facts.underlay.runner_up or None,
        },
        "etcd": facts.etcd,
        "dataplane": facts.dataplane,
        "refused": [_refused(refusal) for refusal in facts.refused[:MOST_LISTED]],
        "refused_count": len(facts.refused),
        "rejected": [{"key": key[:MAX_KEY], "reason": reason} for key, reason in facts.rejected],
        "rejected_count": facts.rejected_count,
        "firewall": facts.firewall,
        "peer_counts": facts.peers,
    }


def starting(agent: AgentPart, problems: Sequence[Finding]) -> Head:
    """The document of an agent that has yet to get a lease, or to find out what for."""
    return {**_nothing(problems), "agent": agent}


def peer_rows(peers: Iterable[Standing], changed: Callable[[int], float | None]) -> Iterator[PeerPart]:
    """The peers as they stand; `changed` gives the seconds since a revision, None if that was before the start."""
    for peer in peers:
        yield _peer(peer, changed(peer.lease.mod_revision))


def pieces(head: Head, peers: Iterable[PeerPart] | None) -> Iterator[str]:
    """The document as JSON on one line, some kilobytes at a time: its sender need not have all of it in memory."""
    if peers is None:
        yield json.dumps(head)[:-1] + ', "peers": null}'
        return
    yield json.dumps(head)[:-1] + ', "peers": ['
    comma, rows = "", iter(peers)
    while some := list(islice(rows, 64)):
        yield comma + json.dumps(some)[1:-1]
        comma = ", "
    yield "]}"


def _lease(lease: Lease, left: float | None) -> LeasePart:
    return {"subnets": list(map(str, lease.subnets)), "reserved": lease.reserved, "left_s": left}


def _device(name: str, found: FoundDevice | None, finding: ChecksumFinding | None = None) -> DevicePart:
    return {
        "name": name,
        "up": found.up if found else None,
        "mac": format_mac(found.mac) if found else None,
        "mtu": found.mtu if found else None,
        "vni": found.vni if found else None,
        "port": found.port if found else None,
        "local": format_address(found.local) if found and found.local else None,
        "addresses": [str(address) for address in found.addresses] if found else [],
        "checksum_offload": finding.why if finding else None,
    }


def _refused(refusal: Refusal) -> RefusedPart:
    return {"entry": str(refusal.op.entry), "error": errno.errorcode.get(refusal.errno, str(refusal.errno))}


def _peer(peer: Standing, changed: float | None) -> PeerPart:
    attrs = peer.lease.attrs
    row: PeerPart = {
        "subnets": list(map(str, peer.subnets)),
        "node_name": attrs.node_name or None,
        "underlay": [format_address(each) for each in (attrs.public_ip, attrs.public_ip6) if each is not None],
        "macs": [format_mac(vtep.mac) for vtep in (attrs.vtep, attrs.vtep6) if vtep is not None],
        "state": peer.state,
        "entries": peer.entries,
        "missing": list(map(str, peer.missing[:MOST_LISTED])),
        "mtu": attrs.mtu or None,
        "changed_ago_s": changed,
    }
    if peer.path is not None:
        row = {**row, **peer.path}
    return row


def _nothing(problems: Sequence[Finding]) -> Head:
    """A document that knows of nothing but problems."""
    return {
        "schema": SCHEMA,
        "health": causes.worst(problems) or HEALTHY,
        "problems": [_problem(finding) for finding in problems],
        "agent": None,
        "lease": None,
        "network": None,
        "devices": [],
        "underlay": None,
        "etcd": None,
        "dataplane": None,
        "refused": [],
        "refused_count": 0,
        "rejected": [],
        "rejected_count": 0,
        "firewall": None,
        "peer_counts": None,
    }


def _problem(finding: Finding) -> Problem:
    row: Any = causes.as_json(finding)
    problem: Problem = row
    return problem


# --- from the kernel alone ---------------------------------------------------------------------------------------


_BY_KIND = {"fdb": "fdb_wrong", "neighbour": "neighbour_wrong", "nexthop": "route_wrong", "route": "route_wrong"}


def from_kernel(silence: Finding, devices: Sequence[FoundDevice], entries: Iterable[Entry]) -> Document:
    """What can be told where no agent answers, for the reason `silence`.

    `entries` are those on our devices, and the routes and nexthop objects that bear our mark. Only what stands can be
    seen: of a peer that is missing altogether there is no trace.
    """
    down = [
        Finding("device_down", evidence=(f"{found.name} is down",), values={"device": found.name})
        for found in devices
        if not found.up
    ]
    # A device that is down has no routes, whatever else it has.
    peers = _peers_in_kernel({found.index for found in devices if found.up}, list(entries))
    peers.sort(key=lambda peer: not peer["missing"])
    amiss = [
        Finding(
            _BY_KIND[missing.partition(" ")[0]],
            " ".join(peer["subnets"]),
            (f"{missing} is missing",),
            {"peer": " ".join(peer["subnets"]) or " ".join(peer["underlay"]), "device": devices[0].name},
        )
        for peer in peers[:MOST_LISTED]
        for missing in peer["missing"]
    ]
    incomplete = sum(peer["state"] == INCOMPLETE for peer in peers)
    return {
        **_nothing(causes.roots([silence, *down, *amiss])),
        "devices": [_device(found.name, found) for found in devices],
        "peer_counts": {
            "total": len(peers),
            "programmed": len(peers) - incomplete,
            "incomplete": incomplete,
            "unreachable": 0,
        },
        "peers": peers,
    }


def _peers_in_kernel(tunnels: Collection[int], entries: Sequence[Entry]) -> list[PeerPart]:
    """A peer for each route, by subnet, and for each neighbour that no route leads to."""
    nexthops = {entry.id: entry for entry in entries if isinstance(entry, NextHop)}
    neighbours = {entry.at: entry for entry in entries if isinstance(entry, Neighbour) and entry.state & PERMANENT}
    fdb = {entry.at: entry for entry in entries if isinstance(entry, Fdb) and entry.state & PERMANENT}
    routes = {
        entry.destination: entry
        for entry in entries
        if isinstance(entry, Route) and entry.protocol in (PROTOCOL, PROTOCOL_BOOT)
    }
    used: set[tuple[int, bytes]] = set()
    peers = []
    for _, route in sorted(routes.items()):
        hop = nexthops.get(route.nexthop) if route.nexthop else None
        device, gateway = (hop.device, hop.gateway) if hop else (route.device, route.gateway)
        peer = _peer_in_kernel([str(route.destination)], route.mtu or None)
        peers.append(peer)
        peer["entries"] = 1 + (hop is not None)
        if route.nexthop and hop is None:
            peer["missing"].append(f"nexthop {route.nexthop}")
            # It led to the base of the subnet.
            used.update((tunnel, route.destination.base) for tunnel in tunnels)
        elif device in tunnels:
            used.add((device, gateway))
            _follow(peer, neighbours.get((device, gateway)), device, gateway, fdb)
        elif gateway:
            peer["underlay"] = [format_address(gateway)]
        peer["state"] = INCOMPLETE if peer["missing"] else PROGRAMMED
    for (device, address), neighbour in neighbours.items():
        if (device, address) not in used and device in tunnels:
            peer = _peer_in_kernel([], None)
            peer["missing"].append(f"route via {format_address(address)}")
            _follow(peer, neighbour, device, address, fdb)
            peers.append(peer)
    return peers


def _follow(
    peer: PeerPart,
    neighbour: Neighbour | None,
    device: int,
    gateway: bytes,
    fdb: Mapping[tuple[int, bytes], Fdb],
) -> None:
    """Fill in what the tunnel's entries say of the peer, or what of them is missing."""
    if neighbour is None:
        peer["missing"].append(f"neighbour {format_address(gateway)}")
        return
    peer["entries"] += 1
    peer["macs"] = [format_mac(neighbour.mac)]
    entry = fdb.get((device, neighbour.mac))
    if entry is None:
        peer["missing"].append(f"fdb {format_mac(neighbour.mac)}")
        return
    peer["entries"] += 1
    peer["underlay"] = [format_address(entry.remote)] if entry.remote else []


def _peer_in_kernel(subnets: list[str], mtu: int | None) -> PeerPart:
    return {
        "subnets": subnets,
        "node_name": None,
        "underlay": [],
        "macs": [],
        "state": INCOMPLETE,
        "entries": 0,
        "missing": [],
        "mtu": mtu,
        "changed_ago_s": None,
    }

"""What a running agent finds wrong with its host, from what it knows: findings whose causes are those of `causes`.

Owns the judgement that `status` and /readyz share; `causes` owns the words. A host in order has no finding. What may be
a passing state is none either: entries about to be written, a watch that is made anew.
"""

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from overlay.causes import DOWN, Finding
from overlay.device import OVERHEAD
from overlay.model import PROTOCOL, Entry, Key, Put, Refusal, Route
from overlay.probe import Path
from subnet_lease.model import Lease, LeaseInvalid, format_address, format_subnets, parse_subnet_key
from subnet_lease.table import Reason

MAX_KEY = 64
"""How much of a key that may be anybody's is shown."""

MOST_SHOWN = 4
"""Lines of evidence that one finding has."""

OVERDUE = 0.5
"""A lease is to be renewed once `margin` seconds are left of it; with less than this part of them left it was not."""


@dataclass(frozen=True, slots=True)
class Known:
    """What an agent knows of itself without asking its loops; times in seconds.

    `waiting` is what a start stands at, None once the loops run. `stalled` are loops that seem dead, by name. `left` is
    what is left of the lease: 0 if there is none, infinite for a reservation, None while it is assumed; `margin` is how
    long before its end it is renewed. `etcd` is the cause and the reason why etcd cannot be had, if it cannot.
    `exhausted` says that there is no subnet to be had. `devices` are those called for: whether they are up, None where
    one is missing; `underlay` is the interface below, `underlay_gone` why there is none that fits. `ready` and
    `trouble` are the reconciler's; `occupied`: a device's name is taken. `others` are findings of those who know best.
    """

    prefix: str = ""
    endpoint: str = ""
    waiting: Finding | None = None
    stalled: Mapping[str, str] = field(default_factory=dict)
    ready: bool = True
    trouble: str = ""
    occupied: bool = False
    left: float | None = None
    margin: float = 0.0
    etcd: tuple[str, str] | None = None
    exhausted: str = ""
    devices: Mapping[str, bool | None] = field(default_factory=dict)
    underlay: tuple[str, bool | None] = ("", True)
    underlay_gone: str = ""
    others: Sequence[Finding] = ()


def of_host(known: Known) -> Iterator[Finding]:
    """What is wrong with the host, its agent and its way to etcd."""
    if known.waiting is not None:
        yield known.waiting
        return
    if known.stalled:
        lines = tuple(f"{name}: {trouble}" for name, trouble in known.stalled.items())
        yield Finding("agent_stalled", evidence=lines)
    values = {"prefix": known.prefix, "endpoint": known.endpoint}
    # What hides that the lease is lost is as bad as that.
    grave = DOWN if known.left == 0 else ""
    # Without the interface below nothing is reached, etcd neither.
    if known.etcd is not None and (known.etcd[0] != "etcd_unreachable" or known.underlay[1] is not False):
        cause, reason = known.etcd
        yield Finding(cause, evidence=(reason,), values=values, severity=grave)
    if known.exhausted:
        yield Finding("subnets_exhausted", evidence=(known.exhausted,), values=values, severity=grave)
    yield from _lease(known, values)
    yield from _interfaces(known)
    yield from known.others


def _lease(known: Known, values: Mapping[str, str]) -> Iterator[Finding]:
    if known.left == 0:
        evidence = "its key is gone, or another host's, or its time has run out"
        yield Finding("lease_lost", evidence=(evidence,), values=values)
    elif known.left is not None and known.left < OVERDUE * known.margin:
        left = f"{known.left:.0f} s"
        evidence = f"{left} left; it is renewed {known.margin:.0f} s before its end, or earlier"
        yield Finding("lease_expiring", evidence=(evidence,), values={"left": left})


def _interfaces(known: Known) -> Iterator[Finding]:
    lower, lower_up = known.underlay
    broken = [name for name, up in known.devices.items() if not up]
    if lower_up is False:
        evidence = f"{lower}, which carries the overlay, is down"
        yield Finding("device_down", evidence=(evidence,), values={"device": lower})
    elif known.underlay_gone:
        yield Finding("underlay_choice", evidence=(known.underlay_gone,))
    trouble = (known.trouble,) if known.trouble else ()
    if known.occupied:
        # What has our device's name may be up or down: it is no device of ours.
        yield Finding("device_missing", evidence=trouble, values={"device": " and ".join(known.devices)})
        return
    for name in broken:
        if known.devices[name] is None:
            seen = (f"there is no interface {name}", *trouble)
            yield Finding("device_missing", evidence=seen, values={"device": name})
        else:
            yield Finding("device_down", evidence=(f"{name} is down", *trouble), values={"device": name})
    if known.trouble and not broken:
        yield Finding("entries_refused", evidence=trouble, severity=DOWN)
    elif not known.ready and not broken and not known.stalled:
        yield starting("the first complete pass over all entries")


def starting(what: str, cause: str = "", values: Mapping[str, str] | None = None) -> Finding:
    """An agent waits for `what`, with what keeps it waiting if that is known: nothing is programmed until then."""
    return Finding(cause or "agent_starting", evidence=(what,), values={"what": what, **(values or {})}, severity=DOWN)


# --- leases ------------------------------------------------------------------------------------------------------

_BY_CLASH = {
    "subnet": "subnet_conflict",
    "mac": "cloned_machine",
    "address": "duplicate_public_ip",
    "link": "overlapping_route",
    "family": "underlay_unreachable",
    "network": "config_needs_restart",
}


def of_rejection(key: str, reason: Reason, prefix: str) -> Finding:
    """Why the lease under `key` is not used."""
    try:
        subject = format_subnets(filter(None, parse_subnet_key(key)))
    except LeaseInvalid:
        subject = key[:MAX_KEY]
    values = {"prefix": prefix, "key": key, "peer": subject}
    return Finding(_BY_CLASH.get(reason.clash, "lease_invalid"), subject, (reason,), values, what=reason)


def of_unreachable(leases: Iterable[Lease], reason: str) -> Iterator[Finding]:
    """Peers that are accepted and can have no entry here."""
    for lease in leases:
        subject, address = format_subnets(lease.subnets), lease.attrs.underlay_ip
        values = {"peer": subject, **({"underlay": format_address(address)} if address else {})}
        yield Finding("underlay_unreachable", subject, (reason,), values, what=f"no way leads to {subject}: {reason}")


# --- entries -----------------------------------------------------------------------------------------------------


def of_refusals(
    refused: Mapping[Key, Refusal], count: int, gap: Mapping[Key, Entry | None], owner: Callable[[Key], str]
) -> Iterator[Finding]:
    """What the kernel refuses, and where that is so because another tool's route stands in its place.

    `refused` are some of `count`; `owner` gives the peer that an entry is for.
    """
    others: list[str] = []
    for key, refusal in refused.items():
        found, wanted = gap.get(key), refusal.op.entry
        if isinstance(refusal.op, Put) and isinstance(found, Route) and found.protocol != PROTOCOL:
            values = {"peer": owner(key), "route": str(found), "gateway": str(found.destination)}
            values["command"] = f"sudo ip route del {found.destination} proto {found.protocol}"
            yield Finding("route_foreign", owner(key), (f"{found} stands in the place of {wanted}",), values)
        else:
            others.append(f"{wanted}: {errno.errorcode.get(refusal.errno, str(refusal.errno))}")
    if others:
        rest = count - len(refused) + len(others) - MOST_SHOWN
        more = [f"and {rest} more"] if rest > 0 else []
        yield Finding("entries_refused", evidence=(*others[:MOST_SHOWN], *more))


# --- paths -------------------------------------------------------------------------------------------------------

_OF_THE_HOST = frozenset({"device_missing", "device_down"})
"""Causes that are not one path's, even if a path is where they were seen."""


def of_paths(
    paths: Iterable[Path], *, device: str, interface: str, port: int, prefix: str, measured: int
) -> Iterator[Finding]:
    """Why measured paths fail, of which there are `measured`. Many that fail alike are one finding about the host.

    `device` is the tunnels', `interface` carries the overlay.
    """
    alike: dict[str, list[Path]] = {}
    for path in paths:
        if path.cause:
            alike.setdefault(path.cause, []).append(path)
    for cause, failed in alike.items():
        values = {"device": device, "interface": interface, "port": str(port), "prefix": prefix}
        values["command"] = "nft list ruleset"
        if cause in _OF_THE_HOST:
            yield Finding(cause, "", failed[0].evidence, values)
        elif len(failed) > MOST_SHOWN:
            shown = (f"{format_subnets(path.target.subnets)}: {path.evidence[0]}" for path in failed[:MOST_SHOWN])
            lines = (f"of {measured} paths measured {len(failed)} fail so", *shown)
            yield Finding(cause, "", lines, {**values, **_of_path(failed[0]), "peer": f"{len(failed)} hosts"})
        else:
            for path in failed:
                told = {**values, **_of_path(path)}
                # What is wrong with checksums is wrong with a device, which others may have found as well.
                subject = device if cause == "checksum_offload" else told["peer"]
                yield Finding(cause, subject, path.evidence, told)


def _of_path(path: Path) -> dict[str, str]:
    target = path.target
    overhead = 0 if target.direct else OVERHEAD[len(target.underlay)]
    return {
        "peer": format_subnets(target.subnets),
        "underlay": format_address(target.underlay),
        "mtu": str(path.mtu or target.mtu),
        # What ping -s takes leaves out its own header and that of IP.
        "payload": str(target.mtu + overhead - 28),
    }

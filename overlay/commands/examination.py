"""What `doctor` looks at: the facts of this host, its agent and etcd, gathered by the edges that everybody uses.

Changes nothing, sends a few packets, and takes some seconds at most. What cannot be had is left out with the reason.
"""

import argparse
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from overlay import doctor
from overlay.causes import CAUSES, Finding
from overlay.commands import Refusal
from overlay.commands.common import find_underlay, open_store, usable_config
from overlay.options import (
    FLANNEL_PREFIX,
    OWN_PREFIX,
    OptionError,
    Options,
    Parser,
    add_arguments,
    config_file,
    format_error,
    resolve,
)

if TYPE_CHECKING:
    from overlay.backends import Here
    from overlay.device import Underlay
    from overlay.kernel import Kernel
    from overlay.model import Op
    from overlay.probe import Path as Path_
    from overlay.processes import Process
    from overlay.queries import Queries
    from overlay.rules import Filters, Flow
    from overlay.trace import Way
    from subnet_lease.model import Lease, NetworkConfig, Prefix
    from subnet_lease.store import Snapshot
    from subnet_lease.tls import Meeting

T = TypeVar("T")

ETCD_S = 2.0
"""How long one request to etcd may take."""

AGENT_S = 8.0
"""How long is waited for the agent's own word: what else there is to do is done meanwhile."""

SETTLE_S = 1.0
"""How long an agent has to put right what is found amiss, before it counts as that: it takes a tenth of it."""

MOST_PEERS = 64
"""To how many peers the kernel's way is looked up."""

WATCH_S = 1.0
"""How long the guard's counters are watched at least."""

STARTING_S = 10.0
"""An agent younger than this may have no lease yet."""


class Known(NamedTuple):
    """What is known of the cluster: the configuration in use, the leases as etcd has them now, None without etcd, and
    how many seconds the etcd lease of a record still lasts.
    """

    config: "NetworkConfig"
    snapshot: "Snapshot | None"
    time_left: Callable[[int], int]


@dataclass(slots=True)
class Examination:
    """The facts as they come in, and those that could not be had. `process` is the agent, as far as it can be seen;
    `claimed`: whether there is one.
    """

    options: Options
    process: "Process | None"
    claimed: bool
    facts: dict[str, Any]
    unknown: dict[str, str]

    def look(self, *groups: str, work: Callable[[], None]) -> None:
        """Do the work that finds out about these groups; where it cannot be done, that is said of them."""
        from overlay.kernel import KernelRefused
        from overlay.nft import NftFailed

        try:
            work()
        except (OSError, KernelRefused, NftFailed) as error:
            reason = os.strerror(error.errno or 0).lower() if isinstance(error, OSError) else str(error)
            for group in groups:
                if group not in self.facts:
                    self.unknown[group] = reason


def gather(arguments: argparse.Namespace) -> tuple[doctor.Facts, Examination]:
    """Everything there is to know; `arguments` are the options given to this command, which win over the agent's."""
    from overlay.claim import NAME, is_claimed
    from overlay.processes import here, with_socket

    processes = list(here())
    process = with_socket(iter(processes), NAME[1:])
    options, trouble = agents_options(arguments, process)
    seen = Examination(options, process, is_claimed(), {}, {})
    with ExitStack() as stack:
        # What is waited for elsewhere goes on meanwhile.
        pool = stack.enter_context(ThreadPoolExecutor(4))
        guard = _Guard(stack)
        told = pool.submit(_told, seen)
        met = pool.submit(_met, options)
        seen.facts["host"] = _host(options)
        known = _read_etcd(seen, stack, told)
        underlay, reason = _underlay(options, known)
        doubles = pool.submit(_doubles, underlay)
        groups = "links", "leases", "entries", "kernel", "leftovers", "paths"
        seen.look(*groups, work=lambda: _of_the_kernel(seen, known, underlay, reason, processes))
        seen.facts["agent"] = _agent(seen, processes, trouble, *told.result())
        seen.facts["etcd"] = _with_meeting(seen.facts["etcd"], options, met.result())
        if "links" in seen.facts:
            seen.facts["links"] = seen.facts["links"]._replace(doubles=doubles.result())
        port = known.config.backend.port if known else 0
        seen.look("guarded", work=lambda: seen.facts.update(guarded=guard.rise(port)))
    return doctor.Facts(**seen.facts, unknown=seen.unknown), seen


# --- the agent ---------------------------------------------------------------------------------------------------


def agents_options(arguments: argparse.Namespace, process: "Process | None") -> tuple[Options, tuple[str, str] | None]:
    """The options of the running agent, else those that it would start with here; and what is wrong with them.

    What is given to this command, by flags or variables, wins; OptionError if it is that which cannot be used. Where
    the agent's options cannot be, those of its command line hold.
    """
    from overlay.processes import environment

    environ: Mapping[str, str] = os.environ
    agents = argparse.Namespace()
    if process is not None:
        environ = {**environment(process.pid), **_about_options(os.environ)}
        parser = Parser()
        add_arguments(parser, Options)
        with suppress(OptionError, ValueError):
            agents = parser.parse_args(process.command[process.command.index("run") + 1 :])
    given = argparse.Namespace(**vars(agents) | vars(arguments))
    path, asked = config_file(given, environ)
    text, trouble = "", None
    try:
        with suppress(*(() if asked else (FileNotFoundError,))):
            text = Path(path).read_text(encoding="utf-8")
        resolve(Options, agents, environ, text, path)
    except (OSError, UnicodeDecodeError) as error:
        reason = os.strerror(error.errno or 0).lower() if isinstance(error, OSError) else "it is not UTF-8 text"
        trouble = path, f"{path} cannot be read: {reason}"
    except OptionError as error:
        told = f"{error.source} {error.reason}"
        trouble = path if path in told else error.source or "the agent's command line", format_error(error)
    try:
        return resolve(Options, given, environ, "" if trouble else text, path), trouble
    except OptionError:
        if trouble is None:
            raise
        return Options(), trouble


def _about_options(environ: Mapping[str, str]) -> Mapping[str, str]:
    """The variables that may set options."""
    return {name: value for name, value in environ.items() if name.startswith((OWN_PREFIX, FLANNEL_PREFIX))}


Said = tuple[Mapping[str, Any] | None, str]
"""The agent's own document, None without one; and why it seems not to work, empty if it does."""


def _told(seen: Examination) -> Said:
    """What the agent says of itself."""
    from overlay.control import NoAnswer, ask
    from overlay.processes import is_stopped

    path = seen.options.control_socket
    if not seen.claimed or not Path(path).is_socket():
        return None, ""
    if seen.process is not None and is_stopped(seen.process.pid):
        return None, "it is stopped (SIGSTOP or a debugger)"
    asked = time.monotonic()
    try:
        document = ask(path, "status", AGENT_S, peers=False)
    except NoAnswer as silence:
        # Somebody else's socket, or one that is just being made, is no sign of trouble; silence is.
        return None, str(silence) if time.monotonic() - asked >= AGENT_S else ""
    return (document, "") if isinstance(document, dict) else (None, "")


def _agent(
    seen: Examination,
    processes: "Sequence[Process]",
    trouble: tuple[str, str] | None,
    document: Mapping[str, Any] | None,
    stalled: str,
) -> doctor.Agent:
    from overlay import preflight
    from overlay.processes import status

    process = seen.process
    lacking: tuple[str, ...] = ()
    if process is not None:
        lacking = tuple(preflight.missing_capabilities(text)) if (text := status(process.pid)) else ()
    pid = process.pid if process else 0
    return doctor.Agent(
        pid if seen.claimed else None,
        stalled,
        lacking,
        tuple(_rivals(processes, process)) if seen.claimed else (),
        trouble,
        tuple(_unwritable(seen)),
        tuple(_findings_of(document)) if document else (),
    )


def _rivals(processes: "Sequence[Process]", own: "Process | None") -> Iterator[doctor.Rival]:
    """Who else would program this host. Of those that are a part of the agent, or start it, none."""
    for each in processes:
        if own is not None and each.pid == own.pid:
            continue
        program = Path(each.command[0]).name
        if program == "flanneld" or each.name == "flanneld":
            yield doctor.Rival(each.pid, "flanneld", " ".join(each.command)[:200])
        elif is_agent(each.command) and own is not None:
            yield doctor.Rival(each.pid, "overlay-agent", " ".join(each.command)[:200])


def is_agent(command: Sequence[str]) -> bool:
    """Whether it runs an agent: `overlay-agent run`, by itself or through Python."""
    if "run" not in command:
        return False
    before = command[: command.index("run")]
    by_name = any(Path(word).name in ("overlay-agent", "agent.py") for word in before[:4])
    return by_name or list(before[-2:]) == ["-m", "agent"]


def _unwritable(seen: Examination) -> Iterator[tuple[str, str]]:
    """Where the agent keeps things and cannot write, by its own view of the file systems."""
    root = Path(f"/proc/{seen.process.pid}/root") if seen.process else Path("/")
    for path in filter(None, (seen.options.state_dir, str(Path(seen.options.subnet_file).parent))):
        place = root / path.lstrip("/")
        while not place.exists() and place != root:
            place = place.parent
        with suppress(OSError):
            room = os.statvfs(place)
            if not place.is_dir():
                yield path, "it is no directory"
            elif room.f_flag & os.ST_RDONLY:
                yield path, "the file system is read-only"
            elif not room.f_bavail:
                yield path, "the disk is full"
            elif room.f_files and not room.f_favail:
                yield path, "the file system has no inode left"
            elif not os.access(place, os.W_OK | os.X_OK) and not seen.process:
                yield path, "permission denied"


def _findings_of(document: Mapping[str, Any]) -> Iterator[Finding]:
    """What the agent says of itself in its document; of a later version, what is known here."""
    for problem in document.get("problems") or ():
        cause = problem.get("cause")
        if cause in CAUSES:
            yield Finding(
                cause,
                str(problem.get("subject") or ""),
                tuple(map(str, problem.get("evidence") or ())),
                what=str(problem.get("what") or ""),
                remedy=str(problem.get("remedy") or ""),
                severity=str(problem.get("severity") or ""),
            )


def _host(options: Options) -> doctor.Host:
    from overlay import preflight
    from overlay.processes import status

    lacking = tuple(preflight.missing_capabilities(status(os.getpid())))
    needs_nft = options.ip_masq or options.source_guard != "off"
    problems = [
        preflight.nft_problem(os.environ.get("PATH", os.defpath)) if needs_nft else None,
        # Where a device stands the question is answered, and nothing need be loaded to ask it.
        None if "CAP_NET_ADMIN" in lacking or _has_vxlan() else preflight.vxlan_problem("vxlan"),
    ]
    return doctor.Host(lacking, tuple((each.what, each.remedy) for each in problems if each is not None))


def _has_vxlan() -> bool:
    from overlay.queries import Queries

    with suppress(OSError), Queries() as kernel:
        return any(link.kind == "vxlan" for link in kernel.links.values())
    return False


# --- etcd --------------------------------------------------------------------------------------------------------


def _read_etcd(seen: Examination, stack: ExitStack, told: "Future[Said]") -> Known | None:
    """Configuration and leases: from etcd, else the configuration in the last table on disk; None if there is none.

    `told` is what the agent says: if it goes by another configuration than etcd's, the last one on disk is that.
    """
    from subnet_lease.store import StoreError, kind_of

    options = seen.options
    etcd = doctor.Etcd(options.etcd_endpoints[0], options.etcd_prefix)
    config, snapshot, time_left = None, None, _no_time
    try:
        store = open_store(options, timeout=ETCD_S)
        stack.callback(store.close)
        time_left = store.time_left
        value = store.read_config()
        if value is None:
            etcd = etcd._replace(config=False)
        else:
            config = usable_config(options, value)
        snapshot = store.snapshot()
    except Refusal as refusal:
        etcd = etcd._replace(unusable=str(refusal))
    except StoreError as error:
        failures = {"StoreDenied": "etcd_denied", "TlsFailed": "etcd_certificate"}
        etcd = etcd._replace(failure=failures.get(kind_of(error), "etcd_unreachable"), reason=str(error))
    except OptionError as error:
        files = ("--etcd-certfile", "--etcd-cafile", "--etcd-keyfile")
        failure = "etcd_certificate" if error.option in files else "etcd_denied"
        etcd = etcd._replace(failure=failure, reason=str(error))
    used, since = _last_config(seen)
    if used is not None:
        from overlay.netconf import fixed_changes

        # What the running agent has written is what it uses.
        changes = tuple(fixed_changes(used, config)) if config is not None else ()
        if changes and (since < _running_s(seen) or _is_behind(told)):
            etcd = etcd._replace(changes=changes)
        config = used if config is None or etcd.changes else config
    seen.facts["etcd"] = etcd
    return Known(config, snapshot, time_left) if config is not None else None


def _is_behind(told: "Future[Said]") -> bool:
    """Whether the agent says that it has not taken the configuration over."""
    return any(finding.cause == "config_needs_restart" for finding in _findings_of(told.result()[0] or {}))


def _no_time(etcd_lease: int) -> int:
    return 0


def _last_config(seen: Examination) -> "tuple[NetworkConfig | None, float]":
    """The last configuration that an agent used here, as it wrote it to disk, and how many seconds ago."""
    from subnet_lease import cache

    now = time.time()
    cached = cache.read(Path(seen.options.state_dir) / cache.FILE, now) if seen.options.state_dir else None
    if cached is not None:
        with suppress(Refusal):
            return usable_config(seen.options, cached.config), now - cached.written
    return None, 0.0


def _running_s(seen: Examination) -> float:
    """Seconds since the agent was started; 0 if none is seen."""
    from overlay.processes import started

    return started(seen.process.pid) if seen.process else 0.0


def _met(options: Options) -> "tuple[Meeting | None, list[tuple[str, float]]]":
    """The first endpoint's clock and certificate, and when those in our files end."""
    from subnet_lease.tls import TlsFiles, meet

    files = TlsFiles(options.etcd_cafile, options.etcd_certfile, options.etcd_keyfile) if options.etcd_tls else None
    return meet(options.etcd_endpoints[0], files), files.ends() if files else []


def _with_meeting(
    etcd: doctor.Etcd, options: Options, met: "tuple[Meeting | None, list[tuple[str, float]]]"
) -> doctor.Etcd:
    meeting, ends = met
    now = time.time()
    skew = None
    if meeting is not None:
        if meeting.date is not None:
            # Its date is cut to a second, and was taken at some time between question and answer.
            ahead, behind = meeting.asked - meeting.date - 1, meeting.date - meeting.answered
            skew = max(ahead, 0.0) - max(behind, 0.0)
        if meeting.certificate_ends is not None:
            ends = [*ends, (f"of {etcd.endpoint}", meeting.certificate_ends)]
    return etcd._replace(skew_s=skew, certificates=tuple(doctor.Certificate(place, end - now) for place, end in ends))


# --- leases ------------------------------------------------------------------------------------------------------


def _leases(seen: Examination, known: Known, underlay: "Underlay | None") -> doctor.Leases | None:
    """The leases as the agent judges them; None without etcd, or before a young agent can have one."""
    from subnet_lease.keeper import Identity, own_records
    from subnet_lease.model import Lease, LeaseInvalid, Prefix, decode_attrs, parse_subnet_key
    from subnet_lease.table import NOBODY, Host, LeaseTable

    if known.snapshot is None:
        seen.unknown["leases"] = seen.unknown["entries"] = "etcd did not tell them"
        return None
    options = seen.options
    addresses = {len(each): each for each in (*(underlay.addresses if underlay else ()), *options.public_addresses)}
    records = own_records(known.snapshot.records, Identity(addresses.get(4), addresses.get(16)))
    own = max((lease for _, lease in records), key=lambda lease: lease.reserved, default=None)
    if own is None and seen.process is not None and _running_s(seen) < STARTING_S:
        seen.unknown["leases"] = seen.unknown["entries"] = "the agent has just been started"
        return None
    host = NOBODY
    if own is not None:
        macs = tuple(vtep.mac for vtep in (own.attrs.vtep, own.attrs.vtep6) if vtep is not None)
        host = Host(own.key, own.subnets, tuple(addresses.values()), macs, underlay.links if underlay else ())
    table = LeaseTable(known.config, host)
    table.replace(known.snapshot)
    rejected = []
    reasons = table.rejected
    named: dict[str, Lease] = {}
    taken: list[Prefix] = []
    for record in known.snapshot.records:
        with suppress(LeaseInvalid):
            subnets = parse_subnet_key(record.key)
            taken += filter(None, subnets)
            attrs = decode_attrs(record.value)
            named[record.key] = Lease(*subnets, attrs, *record[2:])
        if record.key in reasons:
            rejected.append((record.key, reasons[record.key]))
    # Decoded with their names, which the table does without.
    accepted = tuple(named[key] for key, _ in table.peers())
    left = None if own is None or own.reserved else float(known.time_left(own.etcd_lease))
    margin = min(options.subnet_lease_renew_margin, options.subnet_lease_ttl / 2)
    ranges = tuple(
        (
            str(each.network),
            each.number(Prefix(each.last, each.length)) + 1,
            len({subnet for subnet in taken if subnet.length == each.length and each.subnet(each.number(subnet))}),
        )
        for each in known.config.ranges
    )
    return doctor.Leases(options.etcd_prefix, own, accepted, tuple(rejected), left, margin, ranges)


# --- interfaces --------------------------------------------------------------------------------------------------


def _underlay(options: Options, known: Known | None) -> "tuple[Underlay | None, str]":
    """What carries the overlay by the options, or why nothing does."""
    from overlay.netconf import Unfit, fit
    from overlay.underlay import NoUnderlay

    try:
        found = find_underlay(options)
        if known is not None:
            with suppress(Unfit):
                found = fit(known.config, found, options.public_addresses)
        return found, ""
    except NoUnderlay as error:
        return None, str(error)
    except OSError as error:
        return None, os.strerror(error.errno or 0).lower()


def _doubles(underlay: "Underlay | None") -> tuple[tuple[str, bytes, bytes], ...]:
    """Who else on the link answers for our IPv4 address."""
    from overlay.arp import holders

    address = underlay.address(4) if underlay else None
    if underlay is None or address is None:
        return ()
    with suppress(OSError):
        return tuple((underlay.name, address, mac) for mac in sorted(holders(underlay.name, address)))
    return ()


def _of_the_kernel(
    seen: Examination, known: Known | None, underlay: "Underlay | None", reason: str, processes: "Sequence[Process]"
) -> None:
    """What the kernel's tables, settings and filters tell."""
    from overlay.commands.trace import packet_filters
    from overlay.kernel import Kernel
    from overlay.queries import Queries

    if known is None:
        with Queries() as queries:
            seen.facts["links"] = _links(None, None, underlay, reason, queries, None)
        for group in ("leases", "entries", "kernel", "leftovers", "paths"):
            seen.unknown[group] = "the network configuration is not known"
        return
    leases = _leases(seen, known, underlay)
    if leases is not None:
        seen.facts["leases"] = leases
    own, peers = (leases.own, leases.accepted) if leases else (None, ())
    with Queries() as queries, closing(Kernel()) as kernel:
        seen.facts["links"] = links = _links(known, leases, underlay, reason, queries, kernel)
        filters = packet_filters()
        settings = _settings(known, own, peers[:MOST_PEERS], links, queries, filters)
        seen.facts["kernel"] = settings
        seen.facts["leftovers"] = tuple(_leftovers(known, links, queries, filters, processes))
        if own is None or underlay is None:
            for group in ("entries", "paths"):
                seen.unknown.setdefault(group, "this host has no lease")
            return
        seen.facts["entries"] = entries = _entries(seen, known, own, peers, links, underlay, queries, kernel)
        if any(refusing.hook in ("input", "output") for refusing in settings.refusing):
            seen.unknown["paths"] = "a filter of this host drops tunnels' packets"
            return
        # Of a path that this host itself keeps packets from nothing more is learnt, in some seconds.
        wrong = {peer.key for _, peer in entries.ops if peer} | {peer.key for way in entries.ways for peer in way.taken}
        wrong |= {strict.peer.key for strict in settings.strict}
        whole = [peer for peer in peers if peer.key not in wrong]
        seen.look("paths", work=lambda: _measure(seen, known, own, whole, links, underlay, kernel))


def _links(
    known: Known | None,
    leases: doctor.Leases | None,
    underlay: "Underlay | None",
    reason: str,
    queries: "Queries",
    kernel: "Kernel | None",
) -> doctor.Links:
    from overlay.backends import backend_of

    if underlay is None:
        return doctor.Links(None, reason)
    own = leases.own if leases else None
    specs = backend_of(known.config).devices(known.config, own, underlay) if known and own else ()
    tunnels = []
    for spec in specs:
        found = kernel.find_device(spec.name) if kernel else None
        below = queries.links.get(found.link) if found is not None else None
        tunnels.append(doctor.Tunnel(spec.name, found, below.name if below else ""))
    down = [tunnel.name for tunnel in tunnels if tunnel.found is not None and not tunnel.found.up]
    link = queries.links.get(underlay.index)
    # One that is down takes with it what is above.
    if link is not None and not (link.up and link.running):
        down.insert(0, underlay.name)
    elsewhere, reachable = [], 0
    for peer in leases.accepted[:MOST_PEERS] if leases else ():
        address = next((each for each in (peer.attrs.public_ip, peer.attrs.public_ip6) if each), None)
        way = queries.way(address) if address and underlay.address(len(address)) else None
        if way is None or way.refused:
            continue
        if way.device == underlay.index:
            reachable += 1
        elif (other := queries.links.get(way.device)) is not None and address is not None:
            elsewhere.append((address, other.name))
    return doctor.Links(underlay, "", tuple(tunnels), tuple(down), (), tuple(elsewhere), reachable)


# --- entries -----------------------------------------------------------------------------------------------------


def _entries(
    seen: Examination,
    known: Known,
    own: "Lease",
    peers: "Sequence[Lease]",
    links: doctor.Links,
    underlay: "Underlay",
    queries: "Queries",
    kernel: "Kernel",
) -> doctor.Entries:
    """What is amiss, and still is after an agent had the time to put it right."""
    deadline = time.monotonic() + (SETTLE_S if seen.process else 0.0)
    while True:
        ops = _gap(seen.options, known, peers, links, underlay, kernel)
        if not ops or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    devices = {number: link.name for number, link in queries.links.items()}
    return doctor.Entries(tuple(ops), devices, tuple(_ways(known, own, peers, links, queries)))


def _gap(
    options: Options,
    known: Known,
    peers: "Sequence[Lease]",
    links: doctor.Links,
    underlay: "Underlay",
    kernel: "Kernel",
) -> "list[tuple[Op, Lease | None]]":
    """The operations that the agent would carry out now, by its own means: leases, dump, comparison."""
    from overlay import nft
    from overlay.backends import Here, backend_of, ours
    from overlay.dataplane import HostDataplane
    from overlay.device import overlay_mtu
    from overlay.model import NextHop
    from overlay.tracker import Tracker

    backend = backend_of(known.config)
    kernel.tunnels = {len(t.found.local): t.found.index for t in links.tunnels if t.found is not None}
    kernel.link = underlay.index if backend.direct else 0
    listed = options.ip_masq or (options.source_guard != "off" and backend.tunnels)
    nexthops = options.nexthop_objects and kernel.has_nexthops()
    mtu = overlay_mtu(known.config, underlay, tunnels=backend.tunnels)
    here = replace(Here.of(known.config, underlay, mtu, nexthops=nexthops, listed=listed), tunnels=dict(kernel.tunnels))
    tracker = Tracker(lambda entry: ours(entry, here))
    owners: dict[object, Lease] = {}
    for peer in peers:
        entries = backend.entries(peer, here)
        tracker.want(peer.key, entries)
        owners.update((entry[0], peer) for entry in entries)
    with ExitStack() as stack:
        nftables = nft.Nftables() if here.listed else None
        if nftables is not None:
            stack.callback(nftables.close)
        tracker.saw_all(HostDataplane(kernel, nftables).dump(here.nexthops is not None))
    # A nexthop object goes with its route; told of one is told of both.
    return [(op, owners.get(op.entry[0])) for op in tracker.pending() if not isinstance(op.entry, NextHop)]


def _here(options: Options, known: Known, links: doctor.Links, underlay: "Underlay", kernel: "Kernel") -> "Here":
    """What this host contributes to the entries of its peers, with the devices as they are found."""
    from overlay.backends import Here, backend_of
    from overlay.device import overlay_mtu

    backend = backend_of(known.config)
    listed = options.ip_masq or (options.source_guard != "off" and backend.tunnels)
    nexthops = options.nexthop_objects and kernel.has_nexthops()
    mtu = overlay_mtu(known.config, underlay, tunnels=backend.tunnels)
    here = Here.of(known.config, underlay, mtu, nexthops=nexthops, listed=listed)
    return replace(here, tunnels={len(t.found.local): t.found.index for t in links.tunnels if t.found is not None})


def _ways(
    known: Known,
    own: "Lease",
    peers: "Sequence[Lease]",
    links: doctor.Links,
    queries: "Queries",
) -> Iterator[doctor.Way]:
    """Routes and links of others inside the overlay's networks, with the peers whose packets they take."""
    from overlay.model import PROTOCOL, PROTOCOL_BOOT
    from subnet_lease.model import format_address

    tunnels = {tunnel.found.index for tunnel in links.tunnels if tunnel.found is not None}
    for block in known.config.blocks:
        for way in queries.routes(len(block.base)):
            entry = way.entry
            if entry is None or not block.covers(entry) or any(subnet.covers(entry) for subnet in own.subnets):
                continue
            ours = way.protocol == PROTOCOL or (way.device in tunnels and way.protocol in (PROTOCOL_BOOT, _BY_KERNEL))
            if ours or way.kind not in (_UNICAST, *_REFUSING):
                continue
            taken = tuple(
                peer
                for peer in peers
                for subnet in peer.subnets
                if entry.overlaps(subnet) and _taken(queries, way, entry if subnet.covers(entry) else subnet)
            )
            name = queries.links[way.device].name if way.device in queries.links else ""
            words = (
                _REFUSING.get(way.kind, ""),
                str(entry),
                f"via {format_address(way.gateway)}" if way.gateway else "",
                f"dev {name}" if name else "",
                f"table {way.table}" if way.table != _MAIN else "",
            )
            link = way.kind == _UNICAST and way.protocol == _BY_KERNEL
            yield doctor.Way(" ".join(filter(None, words)), name, link, str(block), taken)


_UNICAST = 1
_REFUSING = {6: "blackhole", 7: "unreachable", 8: "prohibit"}
"""RTN_UNICAST and its opposites (linux/rtnetlink.h)."""

_BY_KERNEL = 2
"""RTPROT_KERNEL: the route of an address's link."""

_MAIN = 254
"""RT_TABLE_MAIN."""


def _taken(queries: "Queries", way: "Way", subnet: "Prefix") -> bool:
    """Whether the kernel sends packets for the subnet by this very route."""
    found = queries.way(subnet.host(min(2, subnet.size - 1)))
    if found.refused:
        return way.refused
    return (found.entry, found.table, found.device) == (way.entry, way.table, way.device)


# --- paths -------------------------------------------------------------------------------------------------------


def _measure(
    seen: Examination,
    known: Known,
    own: "Lease",
    peers: "Sequence[Lease]",
    links: doctor.Links,
    underlay: "Underlay",
    kernel: "Kernel",
) -> None:
    """Measure the paths to some of these peers, as the agent's probes do, and by them."""
    import structlog

    from overlay.backends import backend_of
    from overlay.device import OVERHEAD
    from overlay.prober import Prober
    from overlay.reconciler import Plan, Some, State

    if links.down or any(tunnel.found is None for tunnel in links.tunnels):
        seen.unknown["paths"] = "there is no device that is up"
        return
    backend, here = backend_of(known.config), _here(seen.options, known, links, underlay, kernel)
    chosen = {peer.key: peer for peer in random.sample(peers, min(_MEASURED, len(peers)))}
    plan = Plan(own.subnets, backend.devices(known.config, own, underlay), underlay.name, here.mtu)
    leases = {key: (peer, backend.entries(peer, here)) for key, peer in chosen.items()}
    some = Some(leases, plan, here, underlay, known.config.backend.port)
    prober = Prober(
        lambda choose, seconds: some,
        lambda key: False,
        State,
        structlog.get_logger("prober"),
        interval=0.0,
        number=0,
        port=0,
    )
    prober.once()
    names = {spec.local: spec.name for spec in plan.devices}
    seen.facts["paths"] = tuple(
        doctor.Path(
            chosen[path.target.key],
            *_on_the_link(path, underlay),
            next((name for local, name in names.items() if len(local) == len(path.target.underlay)), underlay.name),
            underlay.name,
            some.port,
            path.target.mtu,
            path.mtu,
            0 if path.target.direct else OVERHEAD[len(path.target.underlay)],
        )
        for path in prober.paths.rows()
    )


def _on_the_link(path: "Path_", underlay: "Underlay") -> tuple[str, tuple[str, ...]]:
    """Cause and evidence; where a host on our link answers nothing, the link is asked whether it is there at all.

    What the kernel believes of such a neighbour may be many seconds old.
    """
    from overlay.arp import holders
    from subnet_lease.model import format_address

    address = path.target.underlay
    on_link = len(address) == 4 and any(block.holds(address) for block in underlay.on_link)
    if path.cause in ("underlay_unreachable", "peer_down") and on_link:
        with suppress(OSError):
            there = holders(underlay.name, address)
            answer = f"{'somebody' if there else 'nobody'} on {underlay.name} answers for {format_address(address)}"
            return "underlay_unreachable" if there else "peer_down", (*path.evidence, answer)
    return path.cause, path.evidence


_MEASURED = 8
"""To how many peers the path is measured: some packets each."""


# --- settings and filters ----------------------------------------------------------------------------------------


def _settings(
    known: Known,
    own: "Lease | None",
    peers: "Sequence[Lease]",
    links: doctor.Links,
    queries: "Queries",
    filters: "Filters",
) -> doctor.Kernel:
    underlay = links.underlay
    refusing = _refusing(known, own, peers, links, queries, filters) if own and underlay else ()
    strict = tuple(_strict(peers, underlay, queries)) if underlay else ()
    port = known.config.backend.port
    return doctor.Kernel(known.config.blocks, port, tuple(_forwarding(known, links)), strict, tuple(refusing))


def _forwarding(known: Known, links: doctor.Links) -> Iterator[doctor.Setting]:
    """The settings that keep the kernel from forwarding between pods and tunnels."""
    from overlay import sysctl

    names = []
    if any(len(block.base) == 4 for block in known.config.blocks):
        names.append("net.ipv4.ip_forward")
        if sysctl.read(names[0]) == "1":
            names += [f"net.ipv4.conf.{tunnel.name.replace('.', '/')}.forwarding" for tunnel in links.tunnels]
    if any(len(block.base) == 16 for block in known.config.blocks):
        names.append("net.ipv6.conf.all.forwarding")
    for name in names:
        if sysctl.read(name) == "0":
            yield doctor.Setting(name, "0", "1")


def _strict(peers: "Sequence[Lease]", underlay: "Underlay", queries: "Queries") -> Iterator[doctor.Strict]:
    """Reverse path filters of the underlay that drop what peers send."""
    if queries.entrance(4, underlay.name).rp_filter != _STRICT:
        return
    setting = f"net.ipv4.conf.{underlay.name.replace('.', '/')}.rp_filter"
    for peer in peers:
        address = peer.attrs.public_ip
        way = queries.way(address) if address else None
        if way is not None and address is not None and (way.refused or way.device != underlay.index):
            link = queries.links.get(way.device)
            back = link.name if link and not way.refused else "no way"
            yield doctor.Strict(setting, underlay.name, peer, address, back)


_STRICT = 1


def _refusing(
    known: Known,
    own: "Lease",
    peers: "Sequence[Lease]",
    links: doctor.Links,
    queries: "Queries",
    filters: "Filters",
) -> Iterator[doctor.Refusing]:
    """The rules that drop packets to or from a peer, or between pods here; each once, whatever it drops."""
    from overlay import firewall, sysctl
    from overlay.rules import outcome

    told = set()
    bridged = {4: "iptables", 16: "ip6tables"}
    for hook, stations, flow in _flows(known, own, peers, links, queries):
        if hook == "bridge" and sysctl.read(f"net.bridge.bridge-nf-call-{bridged[len(flow.dst)]}") != "1":
            continue
        for station in stations:
            for chain in filters.chains(station, flow):
                refused = outcome(chain).refused
                # What our own table lacks is an entry that is not in place.
                if refused and firewall.TABLE not in chain.where and (hook, chain.where, refused) not in told:
                    told.add((hook, chain.where, refused))
                    yield doctor.Refusing(hook, chain.where, refused, chain.command, chain.where.split()[0])


def _flows(
    known: Known, own: "Lease", peers: "Sequence[Lease]", links: doctor.Links, queries: "Queries"
) -> "Iterator[tuple[str, tuple[str, ...], Flow]]":
    """The packets that must pass here: what they are for, the hooks they meet, and the packet itself."""
    from overlay.rules import Flow

    assert links.underlay is not None, "there is one"
    below, port = links.underlay.name, known.config.backend.port
    for subnet in own.subnets:
        size = len(subnet.base)
        pod, neighbour = subnet.host(2), subnet.host(3)
        inside = queries.links.get(queries.way(pod).device)
        bridge = inside.name if inside is not None and inside.number != links.underlay.index else ""
        if bridge and inside is not None and inside.kind == "bridge":
            yield "bridge", ("forward",), Flow(pod, neighbour, "tcp", 80, bridge, bridge)
        for peer in peers[:_FLOWS]:
            theirs = next((each for each in peer.subnets if len(each.base) == size), None)
            if theirs is not None and bridge:
                way = queries.links.get(queries.way(theirs.host(2)).device)
                out = way.name if way is not None else below
                yield "forward", ("forward",), Flow(pod, theirs.host(2), "tcp", 80, bridge, out)
                yield "forward", ("forward",), Flow(theirs.host(2), pod, "tcp", 80, out, bridge)
    for address in links.underlay.addresses if links.tunnels else ():
        for peer in peers[:_FLOWS]:
            remote = peer.attrs.public_ip if len(address) == 4 else peer.attrs.public_ip6
            if remote is not None:
                yield "input", ("prerouting", "input"), Flow(remote, address, "udp", port, below, "")
                yield "output", ("output",), Flow(address, remote, "udp", port, "", below)


_FLOWS = 8
"""With how many peers the filters are tried."""


# --- leftovers, and the guard ------------------------------------------------------------------------------------


def _leftovers(
    known: Known, links: doctor.Links, queries: "Queries", filters: "Filters", processes: "Sequence[Process]"
) -> Iterator[doctor.Leftover]:
    """What flannel and Calico have left: of a Calico that runs, nothing is a leftover."""
    names = {process.name for process in processes}
    ours = {tunnel.name for tunnel in links.tunnels}
    tables = [entry["table"] for entry in filters.listing.get("nftables", ()) if "table" in entry]
    chains = {line.split()[1] for lines in filters.iptables.values() for line in lines if line.startswith("-N ")}
    for link in queries.links.values():
        named = link.kind == "vxlan" and link.name.startswith(("flannel.", "flannel-v6.")) and link.name not in ours
        if named and (known.config.backend.vni != link.vni or known.config.backend.type != "vxlan"):
            yield doctor.Leftover("flannel", f"the device {link.name}", f"sudo ip link del {link.name}")
    for table in tables:
        if table["name"] in ("flannel-ipv4", "flannel-ipv6"):
            name = f"{table['family']} {table['name']}"
            yield doctor.Leftover("flannel", f"the nftables table {name}", f"sudo nft delete table {name}")
    for chain in sorted(chains):
        if chain.startswith("FLANNEL-"):
            yield doctor.Leftover("flannel", f"the iptables chain {chain}", _without_chain("FORWARD", chain))
    if names & {"calico-node", "calico-felix", "felix"}:
        return
    for link in queries.links.values():
        if link.name == "vxlan.calico" or (link.name.startswith("cali") and link.kind == "veth"):
            yield doctor.Leftover("calico", f"the device {link.name}", f"sudo ip link del {link.name}")
        elif link.name == "tunl0" and link.up:
            yield doctor.Leftover("calico", "the device tunl0", "sudo modprobe -r ipip")
    for table in tables:
        if table["name"] == "calico":
            yield doctor.Leftover("calico", "an nftables table", f"sudo nft delete table {table['family']} calico")
    if any(chain.startswith("cali-") for chain in chains):
        command = "sudo iptables-save | grep -v cali | sudo iptables-restore"
        yield doctor.Leftover("calico", "iptables chains cali-*", command)


def _without_chain(hook: str, chain: str) -> str:
    return f"sudo iptables -D {hook} -j {chain}; sudo iptables -F {chain}; sudo iptables -X {chain}"


class _Guard:
    """The source guard's counters: what they are when this is made, and by how much they have risen since."""

    def __init__(self, stack: ExitStack) -> None:
        from overlay.nft import NftFailed, Questions

        self._since = time.monotonic()
        self._reason = ""
        try:
            self._questions = Questions()
            stack.callback(self._questions.close)
            self._before = self._questions.counters()
        except NftFailed as failed:
            self._reason = str(failed)

    def rise(self, port: int) -> doctor.Guarded:
        """By what they rose, over a second at least, with the latest sources. Raises NftFailed."""
        from overlay.firewall import SAMPLED
        from overlay.nft import NftFailed

        if self._reason:
            raise NftFailed(self._reason)
        time.sleep(max(0.0, WATCH_S - (time.monotonic() - self._since)))
        after = self._questions.counters()
        rise = {name: after[name] - self._before.get(name, 0) for name in SAMPLED if name in after}
        sources = [address for name, count in rise.items() if count for address in self._questions.sources(name)]
        return doctor.Guarded(rise, tuple(dict.fromkeys(sources)), port)

"""The `overlay-agent` command: its subcommands, and the composition root of `run`.

Owns the wiring and the order of a start; decisions and work are elsewhere. Modules are imported by the command that
needs them: most of the time a start takes is imports.
"""

import argparse
import gc
import importlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import overlay
from overlay.commands import Refusal
from overlay.commands.common import (
    claim,
    find_underlay,
    ledger_of,
    open_nftables,
    open_store,
    options_of,
    underlay_of,
    usable_config,
)
from overlay.options import (
    EXIT_UNUSABLE_OPTIONS,
    OptionError,
    Options,
    Parser,
    add_arguments,
    format_error,
    ignored_environment,
)

if TYPE_CHECKING:
    from overlay.causes import Finding
    from overlay.control import Handler
    from overlay.device import Underlay
    from overlay.firewall import Rules
    from overlay.health import Answer, Document
    from overlay.insight import Insight
    from overlay.journal import Journal
    from overlay.kernel import Kernel
    from overlay.loops import Loops
    from overlay.notify import Notifier
    from overlay.presence import Presence
    from overlay.reconciler import Plan, Reconciler
    from overlay.viewer import Viewer
    from overlay.vitals import Vitals
    from subnet_lease.cache import Cached, CacheWriter
    from subnet_lease.etcd import EtcdStore
    from subnet_lease.keeper import Identity, Keeper
    from subnet_lease.model import Lease, NetworkConfig
    from subnet_lease.store import Changes, Snapshot

PATIENCE_S = 30.0
"""How long is waited for the reconciler's answer: a first pass may take seconds."""

M_ARENA_MAX = -8
"""Of mallopt(3), from malloc.h."""

COMMANDS = {
    "run": (
        "run the agent of this host",
        "Lease a subnet, set up the VXLAN device, and keep this host's entries in step with its peers.",
    ),
    "status": (
        "show how this host and its peers fare",
        "Ask the agent of this host how it fares. Exit code 0: healthy, 1: degraded, 2: down, or no agent answers.",
    ),
    "cleanup": (
        "remove all that the agent made on this host",
        "Remove the device, its entries, firewall table and subnet file. The agent must not be running.",
    ),
    "leases": (
        "list the leases and reservations of the cluster",
        "List all leases and reservations by subnet, and why agents reject those that they do.",
    ),
    "reserve": (
        "reserve a subnet for one host",
        "Reserve a subnet for the host with this address: it takes no other, and no time takes it away.",
    ),
    "unreserve": (
        "take a reservation back",
        "Make a reservation a lease, which its host keeps by renewing it; free it if no host has taken it yet.",
    ),
    "capture": (
        "show the packets of the overlay as they pass this host",
        "Decode the tunnels' packets live, name the hosts they go between, and remark on what is off. Changes nothing.",
    ),
    "trace": (
        "follow a packet through this host and name the first thing that is wrong",
        "Ask the kernel what it would do with a packet, at each step, up to the first that is wrong. Changes nothing.",
    ),
    "whois": (
        "say which host holds an address, or held it",
        "Say which host and lease stand for an address: by etcd now, and by this host's journal in the past.",
    ),
    "events": (
        "list what happened, from this host's journal",
        "List joins, leaves, drift, repairs and conflicts that this host's agent has seen, the newest last.",
    ),
    "doctor": (
        "find what is wrong with this host's overlay, and what mends it",
        "Carry out all checks, and name each fault with what shows it and the command that mends it. Changes nothing.",
    ),
    "lab": (
        "a cluster in network namespaces on this machine",
        "A cluster of hosts, agents and pods in network namespaces on this machine, to try things out.",
    ),
}
"""Name: one line for the list, and a description. What is not `run` is a module of overlay.commands."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        arguments = sys.argv[1:] if argv is None else argv
        parsed = _parser(arguments).parse_args(arguments)
        if parsed.command is None:
            raise OptionError("COMMAND", "none is given", "The agent itself is: overlay-agent run. See --help.")
        if parsed.command == "run":
            return run(options_of(Options, parsed))
        return int(_module(parsed.command).main(parsed))
    except OptionError as error:
        print(format_error(error), file=sys.stderr)
        return EXIT_UNUSABLE_OPTIONS
    except Refusal as refusal:
        print(f"overlay-agent: {refusal}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`). Python would complain again while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for `argv`: only the command that is called for gets its options, and its imports."""
    parser: argparse.ArgumentParser = Parser(
        prog="overlay-agent", description="A VXLAN overlay network agent that speaks flannel's etcd contract."
    )
    parser.add_argument("--version", action="version", version=f"overlay-agent {overlay.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    called = next((word for word in argv if not word.startswith("-")), None)
    for name, (summary, description) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=description)
        if name != called:
            continue
        if name == "run":
            add_arguments(command, Options)
        else:
            _module(name).fill(command)
    return parser


def _module(command: str) -> Any:
    return importlib.import_module(f"overlay.commands.{command}")


# --- run ---------------------------------------------------------------------------------------------------------


def run(options: Options) -> int:
    """The agent: until a signal ends it. The dataplane stays as it is; the next start takes it over."""
    from overlay import logs, preflight
    from overlay.loops import LoopFailed, Loops, Terminated
    from overlay.notify import Notifier

    # What a start makes stays for good: until it is complete there is no garbage to be found. See `_announcement`.
    gc.disable()
    # Else each thread takes memory from a pool of its own, and keeps there what it once needed.
    _call_libc("mallopt", M_ARENA_MAX, 1)
    logs.configure(options.log_level, options.log_format, os.environ)
    problems = preflight.problems(options.subnet_file, nft=options.ip_masq)
    if problems:
        raise Refusal(preflight.report(problems))
    notifier = Notifier.from_environ(os.environ, os.getpid())
    with ExitStack() as stack:
        stack.enter_context(claim())
        stack.callback(notifier.stopping)
        loops = Loops()
        vitals = _vitals(options, loops)
        insight = _insight(options, loops)
        vitals.findings = insight.findings
        store = open_store(options, vitals.requested)
        stack.callback(store.close)
        stack.enter_context(loops)
        _serve_health(options, vitals, insight, stack)
        _answer_questions(options, insight.questions, stack)
        try:
            _run(options, store, notifier, loops, vitals, insight)
        except Terminated:
            return 0
        except LoopFailed as failed:
            raise Refusal(
                f"the {failed} failed, see the log; the dataplane stays as it is. Start the agent again."
            ) from None


def _run(
    options: Options, store: "EtcdStore", notifier: "Notifier", loops: "Loops", vitals: "Vitals", insight: "Insight"
) -> NoReturn:
    """Build the edges, take the lease, start the loops, and watch over them until one fails or a signal comes."""
    import structlog

    from overlay import subnet_file, verdict
    from overlay.backends import backend_of
    from overlay.causes import Finding
    from overlay.checksum_watch import ChecksumWatch
    from overlay.dataplane import HostDataplane
    from overlay.device import Underlay
    from overlay.insight import Sources
    from overlay.kernel import Kernel
    from overlay.netconf import Unfit, fit, remarks
    from overlay.offload import examine
    from overlay.reconciler import Reconciler, Stop
    from overlay.surroundings import Surroundings
    from overlay.underlay import Monitor, NoUnderlay
    from overlay.underlay_watch import UnderlayWatch
    from subnet_lease.config_watch import ConfigWatch
    from subnet_lease.keeper import Keeper
    from subnet_lease.watcher import Watcher

    journal, log = _journal(options, loops, structlog.get_logger("agent"))
    if journal:
        insight.journal = journal
        insight.questions["events"] = journal.answer
        insight.others.append(partial(_disk_trouble, options, lambda: journal.trouble))
    log.info("starting", version=overlay.__version__, etcd=list(options.etcd_endpoints), prefix=options.etcd_prefix)
    for variable, reason in ignored_environment(os.environ).items():
        log.warning("variable_ignored", variable=variable, reason=reason)

    def waiting(what: str, cause: str = "") -> None:
        insight.waiting = verdict.starting(what, cause, {"prefix": options.etcd_prefix})
        notifier.status(f"waiting for {what}")

    value, cached = _first_config(options, store, waiting, loops, log)
    config = usable_config(options, value)
    preferred = subnet_file.read(options.subnet_file)
    # What lies in the subnets this host has had is its pods', even if it gets others.
    had = list(preferred)
    underlay = underlay_of(options, config, had)
    backend = backend_of(config)
    kernel = Kernel()
    loops.at_end(kernel.close)
    presence = _presence(options, config, underlay, kernel)
    for event, facts in remarks(config, underlay):
        log.warning(event, **facts)
    _say_underlay(log, "underlay_chosen", underlay)

    watcher: Watcher | None = None
    first: list[tuple[Lease, Snapshot | None]] = []
    handover = threading.Lock()

    def held(lease: "Lease") -> None:
        """The first lease is what the loops begin with; after another one the table starts over from a snapshot."""
        had.extend(subnet for subnet in lease.subnets if subnet not in had)
        with handover:
            if watcher is None:
                first[:] = [(lease, keeper.take_snapshot())]
                loops.wake()
                return
        reconciler.post(lease)
        watcher.relist()

    def deliver(fact: "Snapshot | Changes") -> None:
        reconciler.post(fact)
        keeper.saw(fact)

    nftables = open_nftables()
    loops.at_end(nftables.close)
    surroundings = Surroundings(
        partial(_rules, options, config),
        nftables,
        ledger_of(options),
        log,
        dropped=lambda: vitals.connections_dropped,
    )
    keeper = Keeper(
        store,
        config,
        _identity(presence),
        presence.attrs,
        ttl=options.subnet_lease_ttl,
        renew_margin=options.subnet_lease_renew_margin,
        preferred=preferred,
        avoid=underlay.links,
        assumed=cached.own if cached else None,
        on_lease=held,
        log=log,
    )
    waiting("a subnet")
    if cached:
        vitals.table_from -= max(0.0, time.time() - cached.written)
        had.extend(cached.own.subnets)
        first.append((cached.own, None))
    insight.keeper = keeper
    loops.start("keeper", keeper.run, keeper.stop, keeper.pulse)
    while not first:
        loops.pause(None)
    with handover:
        lease, snapshot = first.pop()
        checksums = ChecksumWatch(examine, lambda seconds: reconciler.survey(seconds), log)
        reconciler = Reconciler(
            HostDataplane(kernel, nftables, surroundings.disturbed),
            config,
            underlay,
            lease,
            prepare=surroundings.prepare,
            protect=surroundings.protect,
            on_ready=_announcement(
                options, config, notifier, [vitals.planned, checksums.changed, surroundings.look_around], log
            ),
            clock=time.monotonic,
            # Without tunnels there is nothing to guard, and without masquerading then no table to list anything in.
            listed=options.ip_masq or (options.source_guard != "off" and backend.tunnels),
            nexthops=options.nexthop_objects,
            passes=vitals.passes,
            tell=journal.tell if journal else None,
        )
        watcher = Watcher(store, deliver, first=snapshot, log=log)
    if cached:
        reconciler.post(cached.snapshot)
    vitals.lease, vitals.table, vitals.state = keeper, watcher, lambda: reconciler.state
    loops.start("surroundings", surroundings.run, surroundings.stop, surroundings.pulse)
    # This function lasts as long as the agent; all leases in raw form need not.
    snapshot = cached = None
    insight.waiting = verdict.starting("the devices and entries to be set up")
    notifier.status(f"setting up {lease}")
    loops.start("reconciler", reconciler.run, lambda: reconciler.post(Stop()), reconciler.pulse)
    loops.start("watcher", watcher.run, watcher.stop, watcher.pulse)
    if options.state_dir:
        writer = _table_cache(options, lambda: value, keeper, reconciler, log)
        loops.start("cache", writer.run, writer.stop, writer.pulse)
        insight.others.append(partial(_disk_trouble, options, lambda: writer.refused))

    def reconfigured(new: bytes | None) -> None:
        nonlocal config, value
        if new is None:
            key = f"{options.etcd_prefix}/config"
            log.warning("config_gone", key=key, effect="the network goes on as it was")
            told = f"there is no key {key}; this agent goes on as before"
            values = {"prefix": options.etcd_prefix}
            insight.config = Finding("config_missing", evidence=(told,), values=values, severity="degraded")
            return
        changed = _live_config(options, config, new, underlay, log)
        if isinstance(changed, Finding):
            insight.config = changed
        else:
            insight.config = None
            presence.config = config = changed
            value = new
            vitals.config_changes += 1
            keeper.use(config=config)
            reconciler.post(config)

    def find(present: Underlay) -> Underlay:
        return fit(config, find_underlay(options, present), options.public_addresses, tuple(had))

    def moved(found: Underlay) -> None:
        nonlocal underlay
        _say_underlay(log, "underlay_changed", found)
        gone = set(underlay.addresses) - set(found.addresses)
        vitals.underlay_changes += 1
        presence.underlay = underlay = found
        # The device first: what peers learn from the lease must be true by then.
        reconciler.post(found)
        if gone:
            # The connection may have been from there, and it would take seconds to notice.
            store.reconnect()
        keeper.use(identity=_identity(presence))
        watcher.relist()

    config_watch = ConfigWatch(store, value, reconfigured, lambda reason: log.warning("store_denied", reason=reason))
    loops.start("config", config_watch.run, config_watch.stop, config_watch.pulse)
    events = Monitor()
    loops.at_end(events.close)
    underlay_watch = UnderlayWatch(events, find, (NoUnderlay, Unfit), underlay, moved, log)
    loops.start("underlay", underlay_watch.run, underlay_watch.stop, underlay_watch.pulse)
    if options.checksum_probe:
        loops.start("checksums", checksums.run, checksums.stop, checksums.pulse)
    insight.others += [surroundings.findings, checksums.troubles]
    insight.refresh = surroundings.refresh
    insight.sources = Sources(
        lambda: (config, underlay), reconciler, watcher, config_watch, checksums, lambda: underlay_watch.missing
    )
    if options.probes and backend.routes:
        _start_probes(options, reconciler, vitals, insight, loops)
    while True:
        if loops.pause(notifier.watchdog_interval):
            config_watch.check()
        if vitals.healthz()[0]:
            notifier.beat()


def _journal(options: Options, loops: "Loops", log: Any) -> "tuple[Journal | None, Any]":
    """What keeps the journal, which runs from now on, and a logger that tells it what `log` is told."""
    if not options.state_dir or not options.journal_size:
        return None, log
    from overlay import logs, netlink
    from overlay.journal import DIRECTORY, Journal, Retold

    journal = Journal(
        Path(options.state_dir) / DIRECTORY,
        limit=options.journal_size << 20,
        age=options.journal_days * 86400.0,
        about={"version": overlay.__version__},
        log=log,
        who=netlink.process_of,
    )
    # The first to start is the last to stop: it hears of all that the others do. A disk that hangs is the journal's
    # trouble alone, so no pulse of its counts for the agent's health.
    loops.start("journal", journal.run, journal.stop)
    return journal, Retold(log, journal.tell, lambda facts: logs.conceal(None, "", facts))


def _first_config(
    options: Options, store: "EtcdStore", waiting: Callable[[str, str], None], loops: "Loops", log: Any
) -> "tuple[bytes, Cached | None]":
    """The network configuration as the operator wrote it, waited for as long as etcd or the key is missing.

    Where etcd cannot be reached it comes from the last table on disk, if that can be used, which is then returned too.
    """
    from overlay.insight import cause_of
    from subnet_lease.retry import Backoff, Outage
    from subnet_lease.store import StoreError

    backoff, outage, said = Backoff(random.random), Outage(), ""
    while True:
        cause = "config_missing"
        reason = f"there is no key {options.etcd_prefix}/config in etcd; it is the operator who writes it"
        try:
            value = store.read_config()
            if value is not None:
                return value, None
        except StoreError as error:
            cause, reason = cause_of(error), str(error)
            if cached := _last_table(options):
                age = round(time.time() - cached.written)
                log.warning("started_from_cache", reason=reason, subnet=str(cached.own.subnet), age_s=age)
                return cached.config, cached
        if outage.failed(time.monotonic()) or reason != said:
            said = reason
            log.warning("waiting_for_config", reason=reason)
            waiting(f"the network configuration: {reason}", cause)
        loops.pause(backoff.delay())


def _last_table(options: Options) -> "Cached | None":
    """The last table on disk, None if there is none that holds for this host as it is now."""
    if not options.state_dir:
        return None
    from subnet_lease import cache

    cached = cache.read(Path(options.state_dir) / cache.FILE, time.time())
    if cached is None:
        return None
    try:
        config = usable_config(options, cached.config)
        presence = _presence(options, config, underlay_of(options, config))
    except Refusal:
        return None
    then, now = (
        attrs._replace(mtu=0, node_name="", extra={}) for attrs in (cached.own.attrs, presence.attrs(cached.own))
    )
    # A host that has moved, or gained or lost a family below, has to say so before peers can reach it.
    return cached if then == now else None


def _live_config(
    options: Options, old: "NetworkConfig", value: bytes, underlay: "Underlay", log: Any
) -> "NetworkConfig | Finding":
    """A changed configuration, if a running agent can take it over; else why it cannot, which is logged too."""
    from overlay import netconf
    from overlay.causes import Finding

    values = {"prefix": options.etcd_prefix}
    remedy = f"correct {options.etcd_prefix}/config; until then the network goes on as it was"
    try:
        new = usable_config(options, value)
        fixed = netconf.fixed_changes(old, new)
        if not fixed:
            netconf.fit(new, underlay, options.public_addresses)
    except (Refusal, netconf.Unfit) as error:
        log.error("config_unusable", reason=str(error), remedy=remedy)
        return Finding("config_unusable", evidence=(str(error),), values=values)
    if fixed:
        log.error(
            "config_needs_restart",
            changes=fixed,
            remedy="restart all agents, or put the old value back; until then the network goes on as it was",
        )
        return Finding("config_needs_restart", evidence=tuple(fixed), values=values)
    log.info("config_changed", changes=netconf.all_changes(old, new))
    for event, facts in netconf.remarks(new, underlay):
        log.warning(event, **facts)
    return new


def _table_cache(
    options: Options, config: "Callable[[], bytes]", keeper: "Keeper", reconciler: "Reconciler", log: Any
) -> "CacheWriter":
    """What keeps the last table on disk. `config` gives the network configuration in use."""
    from subnet_lease.cache import FILE, Cached, CacheWriter
    from subnet_lease.keeper import boot_clock
    from subnet_lease.store import Snapshot

    def mark() -> object:
        state = reconciler.state
        return (state.revision, keeper.ends_at, config()) if state.ready and keeper.ends_at else None

    def collect() -> "tuple[Cached, list[Lease]] | None":
        lease, ends_at, now = keeper.lease, keeper.ends_at, time.time()
        found = reconciler.survey(PATIENCE_S)
        if found is None or lease is None:
            return None
        until = None if lease.reserved else now + ends_at - boot_clock()
        return Cached(config(), lease, until, Snapshot((), found.revision, found.cluster), now), found.leases

    return CacheWriter(Path(options.state_dir) / FILE, mark, collect, log)


def _start_probes(
    options: Options, reconciler: "Reconciler", vitals: "Vitals", insight: "Insight", loops: "Loops"
) -> None:
    import structlog

    from overlay.prober import Prober

    prober = Prober(
        reconciler.some,
        reconciler.wants,
        lambda: reconciler.state,
        structlog.get_logger("probes"),
        interval=options.probe_interval,
        number=options.probe_peers,
        port=options.probe_port,
        counts=vitals.probes,
    )
    vitals.paths = prober.paths
    insight.prober = prober
    loops.start("probes", prober.run, prober.stop, prober.pulse)


def _presence(
    options: Options, config: "NetworkConfig", underlay: "Underlay", kernel: "Kernel | None" = None
) -> "Presence":
    """What this host says of itself; `kernel` is asked for the devices it has."""
    from overlay.backends import V4, V6
    from overlay.device import device_name
    from overlay.presence import Presence

    macs = {}
    for family in (V4, V6):
        found = kernel.find_device(device_name(config.backend.vni, family)) if kernel else None
        if found is not None and found.kind == "vxlan":
            macs[family] = found.mac
    name = options.node_name or os.uname().nodename
    about = {"AgentVersion": overlay.__version__}
    return Presence(config, underlay, options.public_addresses, macs, _machine_id(), name, about)


def _identity(presence: "Presence") -> "Identity":
    """By what the host's own record is known among all."""
    from overlay.backends import V4, V6
    from subnet_lease.keeper import Identity

    return Identity(presence.address(V4), presence.address(V6), tuple(presence.macs.values()))


def _say_underlay(log: Any, event: str, underlay: "Underlay") -> None:
    from subnet_lease.model import format_address

    addresses = [format_address(address) for address in underlay.addresses]
    facts = {"runner_up": underlay.runner_up} if underlay.runner_up else {}
    log.info(event, interface=underlay.name, addresses=addresses, mtu=underlay.mtu, why=underlay.why, **facts)


def _machine_id() -> str:
    try:
        return Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _rules(options: Options, config: "NetworkConfig", plan: "Plan") -> "Rules":
    """The firewall rules that a plan calls for."""
    from overlay.firewall import Rules

    return Rules(
        blocks=config.blocks,
        subnets=plan.subnets,
        devices=tuple(spec.name for spec in plan.devices),
        port=config.backend.port,
        masquerade=options.ip_masq,
        exceptions=options.no_masquerade_cidr,
        guard=options.source_guard,
    )


def _announcement(
    options: Options,
    config: "NetworkConfig",
    notifier: "Notifier",
    then: "Sequence[Callable[[Plan], None]]",
    log: Any,
) -> "Callable[[Plan], None]":
    """What happens once the dataplane is complete: containers may start, and `then` what can wait for that."""
    from overlay import subnet_file
    from subnet_lease.model import format_subnets

    def announce(plan: "Plan") -> None:
        try:
            subnet_file.write(options.subnet_file, config.blocks, plan.subnets, plan.mtu, options.ip_masq)
        except OSError as error:
            log.error("subnet_file_refused", path=options.subnet_file, reason=os.strerror(error.errno or 0))
            return
        devices = [spec.name for spec in plan.devices]
        log.info(
            "ready", subnet=format_subnets(plan.subnets), devices=devices, mtu=plan.mtu, subnet_file=options.subnet_file
        )
        # What a start needed and nothing needs any more goes back to the kernel, before systemd counts it.
        _call_libc("malloc_trim", 0)
        notifier.ready(f"{format_subnets(plan.subnets)} on {' and '.join(devices) or plan.underlay}")
        gc.freeze()
        gc.enable()
        for each in then:
            each(plan)

    return announce


def _call_libc(function: str, *arguments: int) -> None:
    """Call a function that glibc has and other C libraries may not: malloc_trim(3), mallopt(3)."""
    import ctypes

    found = getattr(ctypes.CDLL(None), function, None)
    if found is not None:
        found(*arguments)


def _firewall_counters() -> dict[str, int]:
    """What our firewall rules have counted; empty without them."""
    from overlay.nft import NftFailed, Questions

    # With a socket of its own: the other is the reconciler's.
    try:
        with closing(Questions()) as questions:
            return questions.counters()
    except NftFailed:
        return {}


def _vitals(options: Options, loops: "Loops") -> "Vitals":
    """What tells how the agent is, of one that is about to start."""
    from overlay import process
    from overlay.vitals import Vitals

    return Vitals(
        overlay.__version__,
        options.readyz_max_age,
        loops.troubles,
        time.monotonic,
        usage=process.usage,
        devices=process.device_counts,
        firewall=_firewall_counters,
    )


def _insight(options: Options, loops: "Loops") -> "Insight":
    """What answers those who ask how the agent fares, of one that is about to start."""
    from overlay import process
    from overlay.insight import About, Insight
    from overlay.kernel import find_device

    about = About(
        version=overlay.__version__,
        pid=os.getpid(),
        node_name=options.node_name or os.uname().nodename,
        prefix=options.etcd_prefix,
        endpoint=options.etcd_endpoints[0],
        margin=options.subnet_lease_renew_margin,
        guard=options.source_guard,
        started=time.monotonic(),
    )
    insight = Insight(about, time.monotonic, loops.troubles, process.device_up, find_device, _firewall_counters)
    insight.questions["status"] = insight.answer
    return insight


def _answer_questions(options: Options, handlers: "Mapping[str, Handler]", stack: ExitStack) -> None:
    """Listen for questions. An agent that cannot says so, and does its work: pods do not depend on it."""
    import structlog

    from overlay.control import ControlServer, ControlUnavailable

    server = ControlServer(options.control_socket, int(options.control_socket_mode, 8), handlers)
    try:
        server.start()
    except ControlUnavailable as error:
        effect = "overlay-agent status has nobody to ask"
        structlog.get_logger("agent").error("control_unavailable", reason=str(error), effect=effect)
        return
    stack.callback(server.stop)


def _disk_trouble(options: Options, refused: Callable[[], str]) -> "Iterator[Finding]":
    """What cannot be kept on disk, and why."""
    from overlay.causes import Finding

    if reason := refused():
        path = options.state_dir
        yield Finding("journal_failing", evidence=(f"{path}: {reason}",), values={"path": path})


def _serve_health(options: Options, vitals: "Vitals", insight: "Insight", stack: ExitStack) -> None:
    if not options.healthz_port:
        return
    from overlay import page_files
    from overlay.health import HealthServer, HealthUnavailable
    from overlay.metrics import CONTENT_TYPE

    pages = {"/healthz": vitals.healthz, "/readyz": vitals.readyz, "/metrics": vitals.metrics}
    types = {"/metrics": CONTENT_TYPE}
    dropped, documents = vitals.connections_dropped, {**page_files.documents(), "/api/cluster": _picture(insight)}
    server = HealthServer(options.healthz_ip, options.healthz_port, pages, types, dropped, documents)
    try:
        server.start()
    except HealthUnavailable as error:
        raise Refusal(str(error)) from None
    stack.callback(server.stop)


def _picture(insight: "Insight") -> "Document":
    """The document of the page. What makes it is imported when somebody opens the page."""
    viewer: Viewer | None = None

    def answer(query: str) -> "Answer":
        nonlocal viewer
        if viewer is None:
            from overlay.viewer import Viewer

            viewer = Viewer(insight)
        return viewer.answer(query)

    return answer


if __name__ == "__main__":
    sys.exit(main())

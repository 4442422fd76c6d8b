"""The `overlay-agent` command: its subcommands, and the composition root of `run`.

Owns the wiring and the order of a start; decisions and work are elsewhere. Modules are imported by the command that
needs them: most of the time a start takes is imports.
"""

import argparse
import gc
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import overlay
from overlay.options import (
    EXIT_UNUSABLE_OPTIONS,
    CaptureOptions,
    EtcdOptions,
    HostOptions,
    OptionError,
    Options,
    Parser,
    add_arguments,
    config_file,
    format_error,
    ignored_environment,
    resolve,
)

if TYPE_CHECKING:
    from overlay.capture import Known
    from overlay.device import FoundDevice, Underlay
    from overlay.firewall import Rules
    from overlay.kernel import Kernel
    from overlay.loops import Loops
    from overlay.nft import Nftables
    from overlay.notify import Notifier
    from overlay.presence import Presence
    from overlay.reconciler import Plan, Reconciler
    from overlay.roster import Roster
    from overlay.selection import Wanted
    from overlay.sysctl import Ledger
    from overlay.vitals import Vitals
    from subnet_lease.cache import Cached, CacheWriter
    from subnet_lease.etcd import EtcdStore
    from subnet_lease.keeper import Identity, Keeper
    from subnet_lease.model import Lease, NetworkConfig, Prefix
    from subnet_lease.store import Changes, Snapshot

Chosen = TypeVar("Chosen", bound=EtcdOptions)

PATIENCE_S = 30.0
"""How long is waited for the reconciler's answer: a first pass may take seconds."""


class Refusal(Exception):
    """The command cannot do its work; the text says why and how to mend it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        arguments = sys.argv[1:] if argv is None else argv
        return _carry_out(_parser(arguments).parse_args(arguments))
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
    for name, (summary, description, fill) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=description)
        if name == called:
            fill(command)
    return parser


def _fill_run(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, Options)


def _fill_cleanup(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--release", action="store_true", help="also give the lease back, so that others can have it")
    add_arguments(parser, Options)


def _fill_reserve(parser: argparse.ArgumentParser) -> None:
    from overlay.reservations import address_argument

    _fill_unreserve(parser)
    parser.add_argument(
        "--public-ip", metavar="ADDRESS", type=address_argument, required=True, help="the host's, on the underlay"
    )


def _fill_unreserve(parser: argparse.ArgumentParser) -> None:
    from overlay.reservations import subnets_argument

    parser.add_argument("subnet", metavar="SUBNET", type=subnets_argument, help="as 10.5.34.0/24")
    add_arguments(parser, EtcdOptions)


def _fill_leases(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print data, for programs")
    parser.add_argument("--no-ttl", action="store_true", help="do not ask etcd how long each lease still lasts")
    add_arguments(parser, EtcdOptions)


def _fill_capture(parser: argparse.ArgumentParser) -> None:
    from overlay.options import argument, whole_number

    parser.add_argument(
        "target",
        metavar="PEER|POD-IP",
        nargs="?",
        help="only packets of this host (node name, underlay address or subnet), or of this pod's address",
    )
    parser.add_argument("--filter", metavar="WORDS", help='as "tcp port 80", "icmp host 10.244.7.2", "remarks"')
    number = argument(whole_number(1, 1 << 40))
    parser.add_argument("-c", "--count", metavar="N", type=number, help="end after this many packets")
    parser.add_argument("-v", "--verbose", action="store_true", help="a second line with the headers in between")
    parser.add_argument("-q", "--quiet", action="store_true", help="show no packets; with --write, decode none")
    parser.add_argument("--json", action="store_true", help="print data, an object a line, for programs")
    parser.add_argument("--write", metavar="FILE", help="write them to a pcapng file, with the remarks as comments")
    parser.add_argument("--read", metavar="FILE", help="take packets from a pcap or pcapng file; - is standard input")
    port = argument(whole_number(1, 65535))
    parser.add_argument("--port", metavar="PORT", type=port, help="UDP port of the tunnels, if not the network's")
    add_arguments(parser, CaptureOptions)


def _fill_lab(parser: argparse.ArgumentParser) -> None:
    from overlay import lab

    lab.add_arguments(parser)


COMMANDS: dict[str, tuple[str, str, Callable[[argparse.ArgumentParser], None]]] = {
    "run": (
        "run the agent of this host",
        "Lease a subnet, set up the VXLAN device, and keep this host's entries in step with its peers.",
        _fill_run,
    ),
    "cleanup": (
        "remove all that the agent made on this host",
        "Remove the device, its entries, firewall table and subnet file. The agent must not be running.",
        _fill_cleanup,
    ),
    "leases": (
        "list the leases and reservations of the cluster",
        "List all leases and reservations by subnet, and why agents reject those that they do.",
        _fill_leases,
    ),
    "reserve": (
        "reserve a subnet for one host",
        "Reserve a subnet for the host with this address: it takes no other, and no time takes it away.",
        _fill_reserve,
    ),
    "unreserve": (
        "take a reservation back",
        "Make a reservation a lease, which its host keeps by renewing it; free it if no host has taken it yet.",
        _fill_unreserve,
    ),
    "capture": (
        "show the packets of the overlay as they pass this host",
        "Decode the tunnels' packets live, name the hosts they go between, and remark on what is off. Changes nothing.",
        _fill_capture,
    ),
    "lab": (
        "a cluster in network namespaces on this machine",
        "A cluster of hosts, agents and pods in network namespaces on this machine, to try things out.",
        _fill_lab,
    ),
}
"""Name: one line for the list, a description, and what gives the parser its options."""


def _carry_out(arguments: argparse.Namespace) -> int:
    match arguments.command:
        case "run":
            return run(_options(Options, arguments))
        case "cleanup":
            return cleanup(_options(Options, arguments), release=arguments.release)
        case "leases":
            return leases(_options(EtcdOptions, arguments), as_json=arguments.json, ttl=not arguments.no_ttl)
        case "reserve":
            return reserve(_options(EtcdOptions, arguments), arguments.subnet, arguments.public_ip)
        case "unreserve":
            return unreserve(_options(EtcdOptions, arguments), arguments.subnet)
        case "capture":
            return capture(_options(CaptureOptions, arguments), arguments)
        case "lab":
            from overlay import lab, logs

            logs.configure("error", "auto", os.environ)
            return lab.command(arguments, _lab_store)
        case _:
            raise OptionError("COMMAND", "none is given", "The agent itself is: overlay-agent run. See --help.")


def _options(kind: type[Chosen], arguments: argparse.Namespace) -> Chosen:
    """The options of a command from all their sources; the file is read here."""
    path, asked = config_file(arguments, os.environ)
    text = ""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        if asked:
            raise OptionError("--config", f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else "it is not UTF-8 text"
        raise OptionError("--config", f"{path} cannot be read: {reason}") from None
    return resolve(kind, arguments, os.environ, text, path)


# --- edges that several commands build ---------------------------------------------------------------------------


def _store(
    options: EtcdOptions, observe: Callable[[str, float, str], None] = lambda request, seconds, failure: None
) -> "EtcdStore":
    """The store of these options; `observe` as in `EtcdStore`."""
    # grpc writes to stderr as it likes, a line for each handshake that fails; what matters of that is said by us.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from subnet_lease.etcd import EtcdStore
    from subnet_lease.store import StoreConfigInvalid

    # Each host begins somewhere else in the list: the first member would have the watches of all.
    turn = random.randrange(len(options.etcd_endpoints))
    try:
        return EtcdStore(
            options.etcd_endpoints[turn:] + options.etcd_endpoints[:turn],
            options.etcd_prefix,
            cafile=options.etcd_cafile,
            certfile=options.etcd_certfile,
            keyfile=options.etcd_keyfile,
            username=options.etcd_username,
            password=_password(options),
            observe=observe,
        )
    except StoreConfigInvalid as error:
        raise OptionError(f"--etcd-{error.option}", error.reason) from None


def _password(options: EtcdOptions) -> str | None:
    from overlay import logs

    password = options.etcd_password.reveal() if options.etcd_password else None
    if path := options.etcd_password_file:
        try:
            with Path(path).open(encoding="utf-8") as file:
                if os.fstat(file.fileno()).st_mode & 0o007:
                    raise OptionError(
                        "--etcd-password-file",
                        f"every user of this host can read {path}",
                        f"Run chmod 600 {path}; for a Kubernetes secret, set defaultMode: 0400 on its volume.",
                    )
                password = file.readline().removesuffix("\n")
        except (OSError, UnicodeDecodeError):
            raise OptionError("--etcd-password-file", f"{path} cannot be read") from None
    if password:
        logs.hide(password)
    return password


def _lab_store(endpoint: str) -> "EtcdStore":
    """The store of a lab's own etcd."""
    from subnet_lease.etcd import EtcdStore

    return EtcdStore([endpoint], EtcdOptions().etcd_prefix)


def _claim() -> Any:
    """Held for as long as this process lives: no second agent, and no cleanup beside a running one."""
    from overlay.claim import Claimed, claim_host, command_of

    try:
        return claim_host()
    except Claimed as other:
        raise Refusal(
            f"this host's dataplane is held by {other} ({command_of(other.pid) or 'its command cannot be read'}); "
            "there can be one agent in a network namespace. Stop that one first."
        ) from None


def _find_underlay(options: HostOptions, present: "Underlay | None" = None) -> "Underlay":
    """The choice by the options; NoUnderlay if nothing fits."""
    from overlay.underlay import Wish, find_underlay

    wish = Wish(options.iface, options.iface_regex, options.iface_can_reach, options.public_addresses)
    return find_underlay(wish, present)


def _underlay(options: HostOptions, config: "NetworkConfig", own: "Sequence[Prefix]" = ()) -> "Underlay":
    """What carries this configuration's overlay; Refusal if nothing does. `own` as in `netconf.fit`."""
    from overlay.netconf import Unfit, fit
    from overlay.underlay import NoUnderlay

    try:
        return fit(config, _find_underlay(options), options.public_addresses, own)
    except NoUnderlay as error:
        raise Refusal(str(error)) from None
    except Unfit as error:
        raise Refusal(f"the network configuration cannot be used on this host: {error}") from None


# --- run ---------------------------------------------------------------------------------------------------------


def run(options: Options) -> int:
    """The agent: until a signal ends it. The dataplane stays as it is; the next start takes it over."""
    from overlay import logs, preflight
    from overlay.loops import LoopFailed, Loops, Terminated
    from overlay.notify import Notifier

    # What a start makes stays for good: until it is complete there is no garbage to be found. See `_announcement`.
    gc.disable()
    logs.configure(options.log_level, options.log_format, os.environ)
    problems = preflight.problems(options.subnet_file, nft=options.ip_masq)
    if problems:
        raise Refusal(preflight.report(problems))
    notifier = Notifier.from_environ(os.environ, os.getpid())
    with ExitStack() as stack:
        stack.enter_context(_claim())
        stack.callback(notifier.stopping)
        loops = Loops()
        vitals = _vitals(options, loops)
        store = _store(options, vitals.requested)
        stack.callback(store.close)
        stack.enter_context(loops)
        _serve_health(options, vitals, stack)
        try:
            _run(options, store, notifier, loops, vitals)
        except Terminated:
            return 0
        except LoopFailed as failed:
            raise Refusal(
                f"the {failed} failed, see the log; the dataplane stays as it is. Start the agent again."
            ) from None


def _run(options: Options, store: "EtcdStore", notifier: "Notifier", loops: "Loops", vitals: "Vitals") -> NoReturn:
    """Build the edges, take the lease, start the loops, and watch over them until one fails or a signal comes."""
    import structlog

    from overlay import subnet_file
    from overlay.backends import backend_of
    from overlay.checksum_watch import ChecksumWatch
    from overlay.dataplane import HostDataplane
    from overlay.device import Underlay
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

    log = structlog.get_logger("agent")
    log.info("starting", version=overlay.__version__, etcd=list(options.etcd_endpoints), prefix=options.etcd_prefix)
    for variable, reason in ignored_environment(os.environ).items():
        log.warning("variable_ignored", variable=variable, reason=reason)

    def waiting(reason: str) -> None:
        vitals.waiting_for = reason
        notifier.status(f"waiting for {reason}")

    value, cached = _first_config(options, store, waiting, loops, log)
    config = _usable_config(options, value)
    preferred = subnet_file.read(options.subnet_file)
    # What lies in the subnets this host has had is its pods', even if it gets others.
    had = list(preferred)
    underlay = _underlay(options, config, had)
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

    nftables = _nftables()
    loops.at_end(nftables.close)
    surroundings = Surroundings(partial(_rules, options, config), nftables, _ledger(options), log)
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
    )
    waiting("a subnet")
    if cached:
        vitals.table_from -= max(0.0, time.time() - cached.written)
        had.extend(cached.own.subnets)
        first.append((cached.own, None))
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
        )
        watcher = Watcher(store, deliver, first=snapshot)
    if cached:
        reconciler.post(cached.snapshot)
    vitals.lease, vitals.table, vitals.state = keeper, watcher, lambda: reconciler.state
    loops.start("surroundings", surroundings.run, surroundings.stop, surroundings.pulse)
    # This function lasts as long as the agent; all leases in raw form need not.
    snapshot = cached = None
    notifier.status(f"setting up {lease}")
    loops.start("reconciler", reconciler.run, lambda: reconciler.post(Stop()), reconciler.pulse)
    loops.start("watcher", watcher.run, watcher.stop, watcher.pulse)
    if options.state_dir:
        writer = _table_cache(options, lambda: value, keeper, reconciler, log)
        loops.start("cache", writer.run, writer.stop, writer.pulse)

    def reconfigured(new: bytes | None) -> None:
        nonlocal config, value
        if new is None:
            log.warning("config_gone", key=f"{options.etcd_prefix}/config", effect="the network goes on as it was")
            return
        changed = _live_config(options, config, new, underlay, log)
        if changed is not None:
            presence.config = config = changed
            value = new
            vitals.config_changes += 1
            keeper.use(config=config)
            reconciler.post(config)

    def find(present: Underlay) -> Underlay:
        return fit(config, _find_underlay(options, present), options.public_addresses, tuple(had))

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
    while True:
        if loops.pause(notifier.watchdog_interval):
            config_watch.check()
        if vitals.healthz()[0]:
            notifier.beat()


def _first_config(
    options: Options, store: "EtcdStore", waiting: Callable[[str], None], loops: "Loops", log: Any
) -> "tuple[bytes, Cached | None]":
    """The network configuration as the operator wrote it, waited for as long as etcd or the key is missing.

    Where etcd cannot be reached it comes from the last table on disk, if that can be used, which is then returned too.
    """
    from subnet_lease.retry import Backoff, Outage
    from subnet_lease.store import StoreError

    backoff, outage, said = Backoff(random.random), Outage(), ""
    while True:
        reason = f"there is no key {options.etcd_prefix}/config in etcd; it is the operator who writes it"
        try:
            value = store.read_config()
            if value is not None:
                return value, None
        except StoreError as error:
            reason = str(error)
            if cached := _last_table(options):
                age = round(time.time() - cached.written)
                log.warning("started_from_cache", reason=reason, subnet=str(cached.own.subnet), age_s=age)
                return cached.config, cached
        if outage.failed(time.monotonic()) or reason != said:
            said = reason
            log.warning("waiting_for_config", reason=reason)
            waiting(f"the network configuration: {reason}")
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
        config = _usable_config(options, cached.config)
        presence = _presence(options, config, _underlay(options, config))
    except Refusal:
        return None
    attrs, now = cached.own.attrs, presence.attrs(cached.own)
    # A host that has moved, or gained or lost a family below, has to say so before peers can reach it.
    return cached if attrs._replace(mtu=0, extra={}) == now._replace(mtu=0, extra={}) else None


def _usable_config(options: EtcdOptions, value: bytes) -> "NetworkConfig":
    """The configuration, decoded; Refusal if it cannot be used."""
    from overlay.netconf import usable
    from subnet_lease.model import ConfigInvalid

    try:
        return usable(value)
    except ConfigInvalid as error:
        raise Refusal(f"the network configuration in {options.etcd_prefix}/config cannot be used: {error}") from None


def _live_config(
    options: Options, old: "NetworkConfig", value: bytes, underlay: "Underlay", log: Any
) -> "NetworkConfig | None":
    """A changed configuration, if a running agent can take it over; else None, and why is said."""
    from overlay import netconf

    remedy = f"correct {options.etcd_prefix}/config; until then the network goes on as it was"
    try:
        new = _usable_config(options, value)
        fixed = netconf.fixed_changes(old, new)
        if not fixed:
            netconf.fit(new, underlay, options.public_addresses)
    except (Refusal, netconf.Unfit) as error:
        log.error("config_unusable", reason=str(error), remedy=remedy)
        return None
    if fixed:
        log.error(
            "config_needs_restart",
            changes=fixed,
            remedy="restart all agents, or put the old value back; until then the network goes on as it was",
        )
        return None
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
    about = {"NodeName": options.node_name or os.uname().nodename, "AgentVersion": overlay.__version__}
    return Presence(config, underlay, options.public_addresses, macs, _machine_id(), about)


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


def _nftables() -> "Nftables":
    from overlay.nft import Nftables, NftFailed

    try:
        return Nftables()
    except NftFailed as error:
        raise Refusal(f"{error}; the source guard and masquerading need nftables") from None


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


def _ledger(options: Options) -> "Ledger | None":
    from overlay.sysctl import LEDGER, Ledger

    return Ledger(Path(options.state_dir) / LEDGER) if options.state_dir else None


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
        _trim_memory()
        notifier.ready(f"{format_subnets(plan.subnets)} on {' and '.join(devices) or plan.underlay}")
        gc.freeze()
        gc.enable()
        for each in then:
            each(plan)

    return announce


def _trim_memory() -> None:
    """Have the C library return its free pages (malloc_trim(3)); other C libraries than glibc have no such thing."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _vitals(options: Options, loops: "Loops") -> "Vitals":
    """What tells how the agent is, of one that is about to start."""
    from overlay import process
    from overlay.nft import NftFailed, Questions
    from overlay.vitals import Vitals

    def counters() -> dict[str, int]:
        # With a socket of its own: the other is the reconciler's.
        try:
            with closing(Questions()) as questions:
                return questions.counters()
        except NftFailed:
            return {}

    return Vitals(
        overlay.__version__,
        options.readyz_max_age,
        loops.troubles,
        time.monotonic,
        usage=process.usage,
        devices=process.device_counts,
        firewall=counters,
    )


def _serve_health(options: Options, vitals: "Vitals", stack: ExitStack) -> None:
    if not options.healthz_port:
        return
    from overlay.health import HealthServer, HealthUnavailable
    from overlay.metrics import CONTENT_TYPE

    pages = {"/healthz": vitals.healthz, "/readyz": vitals.readyz, "/metrics": vitals.metrics}
    server = HealthServer(options.healthz_ip, options.healthz_port, pages, {"/metrics": CONTENT_TYPE})
    try:
        server.start()
    except HealthUnavailable as error:
        raise Refusal(str(error)) from None
    stack.callback(server.stop)


# --- cleanup -----------------------------------------------------------------------------------------------------


def cleanup(options: Options, *, release: bool) -> int:
    """Remove what the agent made on this host; with `release` its lease as well."""
    from overlay import cleanup as work
    from overlay import logs, nft, preflight
    from overlay.kernel import Kernel, KernelRefused
    from overlay.underlay import NoUnderlay
    from subnet_lease import cache
    from subnet_lease.keeper import Identity, release_lease
    from subnet_lease.store import StoreError

    logs.configure("warning", options.log_format, os.environ)
    problem = preflight.capability_problem(
        preflight.missing_capabilities(Path("/proc/self/status").read_text(encoding="ascii"))
    )
    if problem:
        raise Refusal(preflight.report([problem]))
    with ExitStack() as stack:
        stack.enter_context(_claim())
        kernel = Kernel()
        stack.callback(kernel.close)
        nftables = _nftables()
        stack.callback(nftables.close)
        addresses, macs = list(options.public_addresses), []
        nothing = True
        try:
            table = Path(options.state_dir) / cache.FILE if options.state_dir else None
            for removed in work.cleanup(kernel, nftables, options.subnet_file, table, _ledger(options)):
                nothing = False
                print(f"removed {removed.what}")
                if removed.device is not None:
                    addresses.append(removed.device.local)
                    macs.append(removed.device.mac)
        except (KernelRefused, nft.NftFailed) as error:
            raise Refusal(f"cleanup is not complete: {error}") from None
        if nothing:
            print("nothing of the agent's is left on this host")
        if not release:
            return 0
        if not addresses:
            try:
                addresses += _find_underlay(options).addresses
            except NoUnderlay as error:
                raise Refusal(str(error)) from None
        by_family = {len(address): address for address in reversed(addresses)}
        identity = Identity(by_family.get(4), by_family.get(16), tuple(macs))
        store = _store(options)
        stack.callback(store.close)
        try:
            lease = release_lease(store, identity)
        except StoreError as error:
            raise Refusal(f"the lease of {identity} is not released: {error}") from None
    if lease is None:
        print(f"{identity} holds no lease")
    elif lease.reserved:
        print(f"{lease} is reserved for {identity} and stays so")
    else:
        print(f"released {lease}")
    return 0


# --- the cluster's leases ----------------------------------------------------------------------------------------


@contextmanager
def _operators_store(options: EtcdOptions, failure: str) -> "Iterator[EtcdStore]":
    """The store for one command of the operator; Refusal that begins with `failure` where it cannot do its work."""
    from overlay import logs
    from overlay.reservations import ReservationRefused
    from subnet_lease.store import StoreError

    logs.configure(options.log_level, options.log_format, os.environ)
    with closing(_store(options)) as store:
        try:
            yield store
        except (StoreError, ReservationRefused) as error:
            raise Refusal(f"{failure}: {error}") from None


def _present_config(options: EtcdOptions, store: "EtcdStore") -> "NetworkConfig":
    """The network configuration as it stands; Refusal if there is none or it cannot be used."""
    value = store.read_config()
    if value is None:
        raise Refusal(f"there is no key {options.etcd_prefix}/config in etcd; it is the operator who writes it")
    return _usable_config(options, value)


def leases(options: EtcdOptions, *, as_json: bool, ttl: bool) -> int:
    """List the leases; `ttl` says whether to ask how long each still lasts."""
    import shutil

    from overlay import listing

    with _operators_store(options, "the leases cannot be listed") as store:
        network = _present_config(options, store)
        snapshot = store.snapshot()
        rows = listing.rows_of(network, snapshot)
        ttls = listing.times_left(store, rows) if ttl else None
    if as_json:
        print(listing.as_json(network.blocks, snapshot.revision, rows, ttls or {}))
    else:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(listing.as_text(network.blocks, rows, ttls, columns))
    return 0


def reserve(options: EtcdOptions, subnets: "tuple[Prefix, ...]", address: bytes) -> int:
    """Reserve `subnets` for the host of `address`."""
    from overlay import reservations
    from subnet_lease.model import format_subnets

    with _operators_store(options, f"{format_subnets(subnets)} is not reserved") as store:
        print(reservations.reserve(store, _present_config(options, store), subnets, address))
    return 0


def unreserve(options: EtcdOptions, subnets: "tuple[Prefix, ...]") -> int:
    """Take the reservation of `subnets` back."""
    from overlay import reservations
    from subnet_lease.model import format_subnets

    with _operators_store(options, f"the reservation of {format_subnets(subnets)} stays as it was") as store:
        print(reservations.unreserve(store, subnets))
    return 0


# --- capture -----------------------------------------------------------------------------------------------------


def capture(options: CaptureOptions, arguments: argparse.Namespace) -> int:
    """Show the overlay's packets until a signal, the end of the file or `--count`; see `_fill_capture`."""
    from overlay import logs, selection
    from overlay.capture import CaptureFailed
    from overlay.pcap import NotACapture
    from overlay.roster import UnknownTarget

    if arguments.quiet and arguments.json:
        raise OptionError("--quiet", "with --json there would be nothing to print", "Leave one of them out.")
    try:
        wanted = selection.parse(arguments.filter) if arguments.filter is not None else None
    except ValueError as error:
        raise OptionError("--filter", str(error)) from None
    logs.configure("error", options.log_format, os.environ)
    try:
        with ExitStack() as stack:
            _capture(options, arguments, wanted, stack)
    except (CaptureFailed, UnknownTarget) as error:
        raise Refusal(str(error)) from None
    except NotACapture as error:
        raise Refusal(f"{arguments.read}: {error}") from None
    return 0


def _capture(options: CaptureOptions, arguments: argparse.Namespace, wanted: "Wanted | None", stack: ExitStack) -> None:
    """Build the edges and run the loop. Raises CaptureFailed, NotACapture, UnknownTarget."""
    from overlay import capture as work
    from overlay import pcap
    from overlay.bpf import tunnel_filter

    def note(text: str) -> None:
        print(f"overlay-agent: {text}", file=sys.stderr, flush=True)

    def flush() -> None:
        sys.stdout.flush()
        if recorder is not None:
            recorder.flush()

    show: work.Sink | None = None
    if arguments.json:
        show = work.JsonLines(sys.stdout)
    elif not arguments.quiet:
        show = work.Screen(sys.stdout, headers=arguments.verbose, colour=work.colourful(sys.stdout))
    leases = work.Leases(_known_hosts(options, arguments.port, stack), note)
    roster = leases.roster
    stop = work.Stop()
    recorder: pcap.Writer | None = None
    tap, where, underlay = None, arguments.read, False
    if arguments.read:
        frames = work.recorded(pcap.read(arguments.read), stop)
    else:
        where, underlay = _listened_to(options, roster)
        tap = stack.enter_context(work.open_tap(where, tunnel_filter(roster.port, roster.blocks)))
        frames = work.live(tap, stop, flush)
    if arguments.write:
        try:
            recorder = stack.enter_context(pcap.Writer(arguments.write))
        except OSError as error:
            raise OptionError("--write", f"{arguments.write}: {os.strerror(error.errno or 0).lower()}") from None
    job = work.Capture(
        leases,
        target=arguments.target,
        wanted=wanted,
        show=show,
        recorder=recorder,
        count=arguments.count,
        underlay=underlay,
        # Where nobody asks what a packet is, it is written as it comes.
        decode=bool(show or arguments.target is not None or wanted or not recorder),
    )
    vni = f", VNI {roster.vni}" if roster.vni is not None else ""
    note(f"{where}: VXLAN on UDP port {roster.port}{vni}; {leases.known.source}")
    with stop:
        try:
            job.run(frames)
        finally:
            flush()
            if stop.asked and sys.stderr.isatty():
                print(file=sys.stderr)  # Below the terminal's ^C.
            note(job.tally.line(tap.lost if tap else None, "shown" if show else "written" if recorder else "counted"))


def _known_hosts(options: CaptureOptions, port: int | None, stack: ExitStack) -> "Callable[[], Known]":
    """What reads the hosts of the overlay: from etcd, else from the last table on disk; else there are none.

    `port` is used instead of what the network's configuration, or else a device of ours, says.
    """
    from dataclasses import replace

    from overlay.capture import Known
    from overlay.roster import Roster
    from subnet_lease.store import StoreError

    store = _store(options)
    stack.callback(store.close)

    def changed(roster: Roster) -> Roster:
        return roster if port is None else replace(roster, port=port)

    def known() -> Known:
        try:
            config = _present_config(options, store)
            roster = _roster(config, store.snapshot())
            return Known(changed(roster), True, f"{_hosts(roster)} by the leases in etcd")
        except (StoreError, Refusal) as error:
            reason = str(error)
        if found := _stored_hosts(options):
            age, roster = found
            source = f"{_hosts(roster)} by the last table on disk, {age} s old, for want of etcd: {reason}"
            return Known(changed(roster), False, source)
        devices = _our_devices()
        roster = Roster(port=devices[0].port, vni=devices[0].vni) if devices else Roster()
        return Known(changed(roster), False, f"hosts are not known: {reason}")

    return known


def _hosts(roster: "Roster") -> str:
    return f"{len(roster.members)} host{'' if len(roster.members) == 1 else 's'} known"


def _roster(config: "NetworkConfig", snapshot: "Snapshot") -> "Roster":
    """The hosts whose leases agents accept."""
    from overlay import listing
    from overlay.roster import Roster

    rows = listing.rows_of(config, snapshot)
    return Roster.of(config, ((row.subnets, row.attrs) for row in rows if row.attrs and row.rejected is None))


def _stored_hosts(options: CaptureOptions) -> "tuple[int, Roster] | None":
    """The age in seconds of the last table on disk, and the hosts it knows; None if there is none to be had."""
    from subnet_lease import cache
    from subnet_lease.model import encode_attrs
    from subnet_lease.store import Record

    now = time.time()
    cached = cache.read(Path(options.state_dir) / cache.FILE, now) if options.state_dir else None
    if cached is None:
        return None
    own = cached.own
    record = Record(own.key, encode_attrs(own.attrs), own.etcd_lease, own.create_revision, own.mod_revision)
    snapshot = cached.snapshot._replace(records=(*cached.snapshot.records, record))
    try:
        return round(now - cached.written), _roster(_usable_config(options, cached.config), snapshot)
    except Refusal:
        return None


def _our_devices() -> "list[FoundDevice]":
    """The VXLAN devices of this host that go by our names."""
    import socket

    from overlay.kernel import Kernel

    names = [name for _, name in socket.if_nameindex() if name.startswith(("flannel.", "flannel-v6."))]
    with closing(Kernel()) as kernel:
        found = [kernel.find_device(name) for name in names]
    return [device for device in found if device is not None and device.kind == "vxlan"]


def _listened_to(options: CaptureOptions, roster: "Roster") -> tuple[str, bool]:
    """The interface to capture on, and whether our tunnels leave by it: as asked for, else the one they leave by."""
    import socket

    from overlay.underlay import NoUnderlay

    present = [name for _, name in socket.if_nameindex()]
    links = {device.link for device in _our_devices() if device.link and device.vni in (roster.vni, device.vni)}
    below = [name for index, name in socket.if_nameindex() if index in links]
    asked = [name for name in options.iface if name in present]
    if asked or (below and not options.iface):
        name = (asked or below)[0]
        return name, name in below
    try:
        name = _find_underlay(options).name
    except NoUnderlay as error:
        raise Refusal(str(error)) from None
    return name, name in below


if __name__ == "__main__":
    sys.exit(main())

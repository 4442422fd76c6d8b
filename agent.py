"""The `overlay-agent` command: its subcommands, and the composition root of `run`.

Owns the wiring and the order of a start; decisions and work are elsewhere. Modules are imported by the command that
needs them: most of the time a start takes is imports.
"""

import argparse
import dataclasses
import gc
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import overlay
from overlay.options import (
    EXIT_UNUSABLE_OPTIONS,
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
    from overlay.device import DeviceSpec, Underlay
    from overlay.kernel import Kernel
    from overlay.loops import Loops
    from overlay.notify import Notifier
    from overlay.reconciler import Reconciler
    from subnet_lease.cache import Cached, CacheWriter
    from subnet_lease.etcd import EtcdStore
    from subnet_lease.keeper import Keeper
    from subnet_lease.model import Lease, LeaseAttrs, NetworkConfig, Prefix
    from subnet_lease.store import Changes, Snapshot

Chosen = TypeVar("Chosen", bound=EtcdOptions)

STALLED = 30.0
"""Seconds without a pass after which the reconciler counts as hung: it makes one every few seconds when idle."""


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
    from overlay.reservations import subnet_argument

    parser.add_argument("subnet", metavar="SUBNET", type=subnet_argument, help="as 10.5.34.0/24")
    add_arguments(parser, EtcdOptions)


def _fill_leases(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print data, for programs")
    parser.add_argument("--no-ttl", action="store_true", help="do not ask etcd how long each lease still lasts")
    add_arguments(parser, EtcdOptions)


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


def _store(options: EtcdOptions) -> "EtcdStore":
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


def _public_ip(options: HostOptions) -> bytes | None:
    from subnet_lease.model import pack_address

    return pack_address(options.public_ip) if options.public_ip else None


def _underlay(options: HostOptions, device: str) -> "Underlay":
    from overlay.underlay import NoUnderlay, find_underlay

    try:
        return find_underlay(
            options.iface, options.iface_regex, options.iface_can_reach, _public_ip(options), vni_device=device
        )
    except NoUnderlay as error:
        raise Refusal(str(error)) from None


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
        store = _store(options)
        stack.callback(store.close)
        loops = stack.enter_context(Loops())
        try:
            _run(options, store, notifier, loops, stack)
        except Terminated:
            return 0
        except LoopFailed as failed:
            raise Refusal(
                f"the {failed} failed, see the log; the dataplane stays as it is. Start the agent again."
            ) from None


def _run(options: Options, store: "EtcdStore", notifier: "Notifier", loops: "Loops", stack: ExitStack) -> NoReturn:
    """Build the edges, take the lease, start the loops, and watch over them until one fails or a signal comes."""
    import structlog

    from overlay import subnet_file
    from overlay.device import device_name, occupied_links, overlay_mtu
    from overlay.kernel import Kernel
    from overlay.reconciler import Reconciler, Stop
    from subnet_lease.config_watch import ConfigWatch
    from subnet_lease.keeper import Keeper
    from subnet_lease.model import format_address
    from subnet_lease.watcher import Watcher

    log = structlog.get_logger("agent")
    log.info("starting", version=overlay.__version__, etcd=list(options.etcd_endpoints), prefix=options.etcd_prefix)
    for variable, reason in ignored_environment(os.environ).items():
        log.warning("variable_ignored", variable=variable, reason=reason)

    value, cached = _first_config(options, store, notifier, loops, log)
    config = _usable_config(options, value)
    _report_unused(config, log)
    underlay = _underlay(options, device_name(config.backend.vni))
    for address in {underlay.address, _public_ip(options) or underlay.address}:
        if config.block.holds(address):
            raise Refusal(
                f"the network configuration in {options.etcd_prefix}/config cannot be used: Network: {config.block} "
                f"contains this host's own address {format_address(address)}; choose one that holds no host"
            )
    try:
        mtu = overlay_mtu(underlay.mtu, config.backend.mtu)
    except ValueError as error:
        raise Refusal(f"interface {underlay.name} cannot carry an overlay: {error}") from None
    kernel = Kernel()
    loops.at_end(kernel.close)
    extra: dict[str, object] = {"MTU": mtu}
    attrs_for = _own_attrs(options, config, underlay, extra, kernel)
    log.info("underlay_chosen", interface=underlay.name, mtu=underlay.mtu, why=underlay.why)

    watcher: Watcher | None = None
    first: list[tuple[Lease, Snapshot | None]] = []
    handover = threading.Lock()

    def held(lease: "Lease") -> None:
        """The first lease is what the loops begin with; after another one the table starts over from a snapshot."""
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

    preferred = subnet_file.read(options.subnet_file)
    if preferred is not None:
        # What lies in the subnet this host had is its pods', even if it gets another one.
        links = tuple(link for link in underlay.links if not preferred.covers(link))
        underlay = dataclasses.replace(underlay, links=links)
    keeper = Keeper(
        store,
        config,
        attrs_for(None).public_ip,
        attrs_for,
        ttl=options.subnet_lease_ttl,
        renew_margin=options.subnet_lease_renew_margin,
        preferred=preferred,
        avoid=occupied_links(underlay, config.block, preferred),
        assumed=cached.own if cached else None,
        on_lease=held,
    )
    notifier.status("waiting for a subnet")
    if cached:
        first.append((cached.own, None))
    loops.start("keeper", keeper.run, keeper.stop)
    while not first:
        loops.pause(None)
    with handover:
        lease, snapshot = first.pop()
        reconciler = Reconciler(
            kernel,
            config,
            underlay,
            lease,
            prepare=_surroundings(options, config, log),
            on_ready=_announcement(options, config, notifier, log),
            clock=time.monotonic,
        )
        watcher = Watcher(store, deliver, first=snapshot)
    if cached:
        reconciler.post(cached.snapshot)
    # This function lasts as long as the agent; all leases in raw form need not.
    snapshot = cached = None
    notifier.status(f"setting up {lease.subnet}")
    loops.start("reconciler", reconciler.run, lambda: reconciler.post(Stop()))
    loops.start("watcher", watcher.run, watcher.stop)
    if options.state_dir:
        writer = _table_cache(options, lambda: value, keeper, reconciler, log)
        loops.start("cache", writer.run, writer.stop)

    def reconfigured(new: bytes | None) -> None:
        nonlocal config, value
        if new is None:
            log.warning("config_gone", key=f"{options.etcd_prefix}/config", effect="the network goes on as it was")
            return
        change = _live_config(options, config, new, underlay, log)
        if change is not None:
            config, extra["MTU"] = change
            value = new
            keeper.use(config)
            reconciler.post(config)

    config_watch = ConfigWatch(store, value, reconfigured)
    loops.start("config", config_watch.run, config_watch.stop)
    _serve_health(options, reconciler, loops, stack)
    while True:
        if loops.pause(notifier.watchdog_interval):
            config_watch.check()
        if _alive(reconciler, loops)[0]:
            notifier.beat()


def _first_config(
    options: Options, store: "EtcdStore", notifier: "Notifier", loops: "Loops", log: Any
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
            notifier.status(f"waiting: {reason}")
        loops.pause(backoff.delay())


def _last_table(options: Options) -> "Cached | None":
    """The last table on disk, None if there is none that holds for this host as it is now."""
    if not options.state_dir:
        return None
    from overlay.device import device_name
    from subnet_lease import cache

    cached = cache.read(Path(options.state_dir) / cache.FILE, time.time())
    if cached is None:
        return None
    try:
        config = _usable_config(options, cached.config)
        address = _public_ip(options) or _underlay(options, device_name(config.backend.vni)).address
    except Refusal:
        return None
    return cached if cached.own.attrs.public_ip == address and cached.own.attrs.vtep is not None else None


def _usable_config(options: EtcdOptions, value: bytes) -> "NetworkConfig":
    """The configuration, decoded; Refusal if it cannot be used."""
    from overlay.device import MAX_DEVICE_NAME, device_name
    from subnet_lease.model import ConfigInvalid, NetworkConfig

    try:
        config = NetworkConfig.parse(value)
        if config.backend.type != "vxlan":
            raise ConfigInvalid("Backend.Type", f"{config.backend.type!r} is not supported, only 'vxlan' is")
        if len(name := device_name(config.backend.vni)) > MAX_DEVICE_NAME:
            raise ConfigInvalid("Backend.VNI", f"{name} is longer than the {MAX_DEVICE_NAME} characters Linux allows")
        if config.enable_ipv6 or not config.enable_ipv4:
            raise ConfigInvalid("EnableIPv6", "only IPv4 overlays are supported")
    except ConfigInvalid as error:
        raise Refusal(f"the network configuration in {options.etcd_prefix}/config cannot be used: {error}") from None
    return config


def _report_unused(config: "NetworkConfig", log: Any) -> None:
    """Say what of the configuration has no effect."""
    if config.unknown:
        log.warning("config_keys_unknown", keys=list(config.unknown))
    if config.backend.direct_routing:
        log.warning("direct_routing_ignored", reason="packets to all peers take the tunnel, which works everywhere")


def _live_config(
    options: Options, old: "NetworkConfig", value: bytes, underlay: "Underlay", log: Any
) -> "tuple[NetworkConfig, int] | None":
    """A changed configuration and the MTU it gives, if a running agent can take it over; else None, and why is said."""
    from overlay.device import overlay_mtu
    from subnet_lease.model import LIVE_SETTINGS, changed_settings

    remedy = f"correct {options.etcd_prefix}/config; until then the network goes on as it was"
    try:
        new = _usable_config(options, value)
        mtu = overlay_mtu(underlay.mtu, new.backend.mtu)
    except (Refusal, ValueError) as error:
        log.error("config_unusable", reason=str(error), remedy=remedy)
        return None
    changes = changed_settings(old, new)
    fixed = {name: change for name, change in changes.items() if name not in LIVE_SETTINGS}
    if fixed:
        log.error(
            "config_needs_restart",
            changes=[f"{name}: {before} -> {after}" for name, (before, after) in fixed.items()],
            remedy="restart all agents, or put the old value back; until then the network goes on as it was",
        )
        return None
    log.info("config_changed", changes=[f"{name}: {before} -> {after}" for name, (before, after) in changes.items()])
    _report_unused(new, log)
    return new, mtu


def _table_cache(
    options: Options, config: "Callable[[], bytes]", keeper: "Keeper", reconciler: "Reconciler", log: Any
) -> "CacheWriter":
    """What keeps the last table on disk. `config` gives the network configuration in use."""
    import queue

    from overlay.reconciler import Survey
    from subnet_lease.cache import FILE, Cached, CacheWriter
    from subnet_lease.keeper import boot_clock
    from subnet_lease.store import Snapshot

    def mark() -> object:
        state = reconciler.state
        return (state.revision, keeper.ends_at, config()) if state.ready and keeper.ends_at else None

    def collect() -> "tuple[Cached, list[Lease]] | None":
        answers: queue.SimpleQueue[tuple[list[Lease], int, int]] = queue.SimpleQueue()
        reconciler.post(Survey(lambda *answer: answers.put(answer)))
        lease, ends_at, now = keeper.lease, keeper.ends_at, time.time()
        try:
            peers, revision, cluster = answers.get(timeout=STALLED)
        except queue.Empty:
            return None
        if lease is None:
            return None
        until = None if lease.reserved else now + ends_at - boot_clock()
        return Cached(config(), lease, until, Snapshot((), revision, cluster), now), peers

    return CacheWriter(Path(options.state_dir) / FILE, mark, collect, log)


def _own_attrs(
    options: Options, config: "NetworkConfig", underlay: "Underlay", facts: "Mapping[str, object]", kernel: "Kernel"
) -> "Callable[[Lease | None], LeaseAttrs]":
    """What this host publishes, given its previous lease; `facts`, which may change, go into JSON keys of our own.

    A host keeps its MAC for life, from its lease, else from the device it has, else derived from its identity: flanneld
    does not follow a change in every case.
    """
    from overlay.device import derived_mac, device_name
    from subnet_lease.model import LeaseAttrs, Vtep, format_address, is_device_mac

    vni = config.backend.vni
    public_ip = _public_ip(options) or underlay.address
    found = kernel.find_device(device_name(vni))
    derived = derived_mac(_machine_id(), format_address(public_ip), str(vni))
    initial = found.mac if found and found.kind == "vxlan" else derived
    who = {"NodeName": options.node_name or os.uname().nodename, "AgentVersion": overlay.__version__}

    def attrs_for(previous: "Lease | None") -> LeaseAttrs:
        known = previous.attrs.vtep if previous else None
        if known is not None and not is_device_mac(known.mac):
            known = None
        extra = {**facts, **who}
        return LeaseAttrs(public_ip, config.backend.type, Vtep(vni, known.mac if known else initial), extra=extra)

    return attrs_for


def _machine_id() -> str:
    try:
        return Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _surroundings(options: Options, config: "NetworkConfig", log: Any) -> "Callable[[Lease, DeviceSpec], None]":
    """What a device needs around it: forwarding and the firewall. What is changed is said, and what is refused."""
    from overlay import firewall, nft, sysctl

    def prepare(lease: "Lease", spec: "DeviceSpec") -> None:
        for outcome in (sysctl.enable_forwarding(), sysctl.ignore_router_advertisements(spec.name)):
            match outcome:
                case sysctl.Change():
                    log.info("sysctl_set", name=outcome.name, before=outcome.before, after=outcome.after)
                case sysctl.Refused():
                    log.error("sysctl_refused", name=outcome.name, reason=outcome.reason, remedy=outcome.remedy)
        try:
            if options.ip_masq:
                nft.apply(firewall.ruleset(config.block, lease.subnet, spec.name))
            elif nft.has_table(firewall.TABLE):
                nft.apply(firewall.removal())
        except nft.NftFailed as error:
            log.error("firewall_refused", reason=str(error))

    return prepare


def _announcement(
    options: Options, config: "NetworkConfig", notifier: "Notifier", log: Any
) -> "Callable[[Lease, DeviceSpec], None]":
    """What happens once the dataplane is complete: containers may start."""
    from overlay import subnet_file

    def announce(lease: "Lease", spec: "DeviceSpec") -> None:
        try:
            subnet_file.write(options.subnet_file, config.block, lease.subnet, spec.mtu, options.ip_masq)
        except OSError as error:
            log.error("subnet_file_refused", path=options.subnet_file, reason=os.strerror(error.errno or 0))
            return
        log.info("ready", subnet=str(lease.subnet), device=spec.name, mtu=spec.mtu, subnet_file=options.subnet_file)
        # What a start needed and nothing needs any more goes back to the kernel, before systemd counts it.
        _trim_memory()
        notifier.ready(f"{lease.subnet} on {spec.name}")
        gc.freeze()
        gc.enable()

    return announce


def _trim_memory() -> None:
    """Have the C library return its free pages (malloc_trim(3)); other C libraries than glibc have no such thing."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _serve_health(options: Options, reconciler: "Reconciler", loops: "Loops", stack: ExitStack) -> None:
    if not options.healthz_port:
        return
    from overlay.health import HealthServer, HealthUnavailable

    def ready() -> tuple[bool, str]:
        state = reconciler.state
        counts = (
            f"{state.peers} peers, {state.entries} entries, {state.gap} not in place, {state.rejected} leases rejected"
        )
        return state.ready, f"{'ready' if state.ready else 'not ready'}: {state.trouble or counts}"

    pages = {"/healthz": lambda: _alive(reconciler, loops), "/readyz": ready}
    server = HealthServer(options.healthz_ip, options.healthz_port, pages)
    try:
        server.start()
    except HealthUnavailable as error:
        raise Refusal(str(error)) from None
    stack.callback(server.stop)


def _alive(reconciler: "Reconciler", loops: "Loops") -> tuple[bool, str]:
    """Whether all loops run; the reconciler must also have made a pass lately."""
    if loops.failed:
        return False, f"failed: {loops.failed}"
    idle = time.monotonic() - reconciler.state.beat
    return idle < STALLED, f"last pass {idle:.0f} s ago"


# --- cleanup -----------------------------------------------------------------------------------------------------


def cleanup(options: Options, *, release: bool) -> int:
    """Remove what the agent made on this host; with `release` its lease as well."""
    from overlay import cleanup as work
    from overlay import logs, nft, preflight
    from overlay.kernel import Kernel, KernelRefused
    from subnet_lease import cache
    from subnet_lease.keeper import release_lease
    from subnet_lease.model import format_address
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
        public_ip = _public_ip(options)
        nothing = True
        try:
            table = Path(options.state_dir) / cache.FILE if options.state_dir else None
            for removed in work.cleanup(kernel, options.subnet_file, table):
                nothing = False
                print(f"removed {removed.what}")
                public_ip = public_ip or removed.local
        except (KernelRefused, nft.NftFailed) as error:
            raise Refusal(f"cleanup is not complete: {error}") from None
        if nothing:
            print("nothing of the agent's is left on this host")
        if not release:
            return 0
        if public_ip is None:
            public_ip = _underlay(options, "").address
        store = _store(options)
        stack.callback(store.close)
        try:
            lease = release_lease(store, public_ip)
        except StoreError as error:
            raise Refusal(f"the lease of {format_address(public_ip)} is not released: {error}") from None
    if lease is None:
        print(f"{format_address(public_ip)} holds no lease")
    elif lease.reserved:
        print(f"{lease.subnet} is reserved for {format_address(public_ip)} and stays so")
    else:
        print(f"released {lease.subnet}")
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
        print(listing.as_json(network.block, snapshot.revision, rows, ttls or {}))
    else:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(listing.as_text(network.block, rows, ttls, columns))
    return 0


def reserve(options: EtcdOptions, subnet: "Prefix", public_ip: bytes) -> int:
    """Reserve `subnet` for the host of `public_ip`."""
    from overlay import reservations

    with _operators_store(options, f"{subnet} is not reserved") as store:
        print(reservations.reserve(store, _present_config(options, store), subnet, public_ip))
    return 0


def unreserve(options: EtcdOptions, subnet: "Prefix") -> int:
    """Take the reservation of `subnet` back."""
    from overlay import reservations

    with _operators_store(options, f"the reservation of {subnet} stays as it was") as store:
        print(reservations.unreserve(store, subnet))
    return 0


if __name__ == "__main__":
    sys.exit(main())

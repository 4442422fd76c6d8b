"""Options of the command line: their declarations, and how a value is found among flags, environment and file.

The fields of `AnyOptions` and of the classes made from it are the one table that the argument parser, the environment
variables, the keys of the TOML file, the resolved values and `docs/configuration.md` are made from.
Names and meanings are flannel's where flannel has the option (source: flannel `main.go`, 0.28).

Nothing here reads the environment, a file or the host: arguments, environment and text come in, values or an
`OptionError` go out.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, NoReturn, TypeVar, get_type_hints

from subnet_lease.model import Prefix, format_address, pack_address

OWN_PREFIX = "OVERLAY_AGENT_"
FLANNEL_PREFIX = "FLANNELD_"
DEFAULT_CONFIG_FILE = "/etc/overlay-agent/overlay-agent.toml"

EXIT_UNUSABLE_OPTIONS = 2
"""Exit code for an `OptionError`: trying again changes nothing."""


class OptionError(Exception):
    """An option cannot be used. `option` names it, `source` says where a bad value stood ("" for a flag)."""

    def __init__(self, option: str, reason: str, hint: str = "", source: str = "") -> None:
        super().__init__(f"{option}: {reason}")
        self.option = option
        self.reason = reason
        self.hint = hint
        self.source = source


def format_error(error: OptionError) -> str:
    """One line on what is wrong, and where there is one, a second on how to mend it."""
    where = f" (from {error.source})" if error.source else ""
    text = f"overlay-agent: {error.option}{where}: {error.reason}"
    return f"{text}\n  {error.hint}" if error.hint else text


class Secret:
    """A text that shows itself to nobody but who asks for it by `reveal`."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself."""
        return self._text

    def __repr__(self) -> str:
        return "<secret>"


T = TypeVar("T")

# --- sorts of values ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """How one sort of value is written: `read` turns one text into the value or raises ValueError with the reason.

    `toml` is the type in the file. `repeatable` flags are given once for each element; a `separator` divides the
    text of a flag or variable into elements. Either makes the value a tuple.
    """

    metavar: str
    read: Callable[[str], Any]
    toml: type = str
    repeatable: bool = False
    separator: str = ""


def argument(read: Callable[[str], T]) -> Callable[[str], T]:
    """`read`, which raises ValueError with the reason, as a `type` for argparse, which shows only its own errors."""

    def parse(text: str) -> T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def _quoted(text: str) -> str:
    return repr(text[:64])


def _text(text: str) -> str:
    if not text.isprintable() or len(text) > 4096:
        raise ValueError("must be one line of printable text")
    return text


def _name(text: str) -> str:
    if not text.isprintable() or len(text) > 253:
        raise ValueError("must be printable and at most 253 characters long")
    return text


def _secret(text: str) -> Secret:
    return Secret(text)


def _boolean(text: str) -> bool:
    # The spellings of Go's strconv.ParseBool, which reads the same variables in flanneld.
    if text.lower() in ("true", "t", "1"):
        return True
    if text.lower() in ("false", "f", "0"):
        return False
    raise ValueError(f"{_quoted(text)} is neither true nor false")


def whole_number(low: int, high: int, unit: int = 1) -> Callable[[str], int]:
    """What reads a number in this range, in `unit`s; it raises ValueError."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise ValueError(f"{_quoted(text)} is not a whole number from {low} to {high}")
        return int(text) * unit

    return read


def _choice(*names: str) -> Kind:
    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"{_quoted(text)} is none of {', '.join(names)}")
        return text

    return Kind("|".join(names), read)


def _address(text: str) -> str:
    return format_address(pack_address(text))


def _ipv4(text: str) -> str:
    try:
        if len(pack_address(text)) == 4:
            return text
    except ValueError:
        pass
    raise ValueError(f"{_quoted(text)} is not an IPv4 address")


def _ipv6(text: str) -> str:
    try:
        packed = pack_address(text)
        if len(packed) == 16:
            return format_address(packed)
    except ValueError:
        pass
    raise ValueError(f"{_quoted(text)} is not an IPv6 address")


def _block(text: str) -> Prefix:
    return Prefix.parse(text)


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{_quoted(text)} is not a regular expression: {error.msg}") from None
    return text


_ENDPOINT = re.compile(r"https?://([A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})/?")


def _endpoint(text: str) -> str:
    text = text.strip()
    if "@" in text:
        # Not quoted: what stands before the @ may be a password.
        raise ValueError("an endpoint holds no credentials; use --etcd-username and --etcd-password-file")
    match = _ENDPOINT.fullmatch(text)
    if match is None or not 0 < int(match[2]) < 65536:
        raise ValueError(f"{_quoted(text)} is not of the form http://HOST:PORT or https://HOST:PORT")
    return text.rstrip("/")


def _key_prefix(text: str) -> str:
    if "//" in text or not text.isprintable():
        raise ValueError(f"{_quoted(text)} is not a key prefix such as /coreos.com/network")
    return text.rstrip("/")


FILE = Kind("FILE", _text)
NAME = Kind("NAME", _name)
SECRET = Kind("TEXT", _secret)
BOOLEAN = Kind("true|false", _boolean, toml=bool)
ADDRESS = Kind("ADDRESS", _address)
IPV4 = Kind("ADDRESS", _ipv4)
IPV6 = Kind("ADDRESS", _ipv6)
BLOCKS = Kind("CIDR", _block, toml=list, repeatable=True)
NUMBER = Kind("NUMBER", whole_number(0, 100), toml=int)
PORT = Kind("PORT", whole_number(0, 65535), toml=int)
MINUTES = Kind("MINUTES", whole_number(1, 24 * 60 - 1, unit=60), toml=int)
SECONDS = Kind("SECONDS", whole_number(1, 365 * 86400), toml=int)
DAYS = Kind("DAYS", whole_number(1, 3650), toml=int)
MEBIBYTES = Kind("MIB", whole_number(0, 1 << 20), toml=int)
INTERFACES = Kind("NAME|ADDRESS", _text, toml=list, repeatable=True)
REGEXES = Kind("REGEX", _regex, toml=list, repeatable=True)
ENDPOINTS = Kind("URL[,URL...]", _endpoint, toml=list, separator=",")
KEY_PREFIX = Kind("PREFIX", _key_prefix)
MODE = _choice("0600", "0660", "0666")
GUARD = _choice("on", "log", "off")
LEVELS = _choice("debug", "info", "warning", "error")
FORMATS = _choice("auto", "console", "json")


# --- the table ---------------------------------------------------------------------------------------------------

GROUPS = ("etcd", "leases", "underlay", "dataplane", "probes", "control", "health", "journal", "logging")


@dataclass(frozen=True, slots=True)
class Declaration:
    """What is known of one option beside its name, type and default.

    `default` puts the default into words where its value does not speak for itself. `flannel` says whether
    flannel has it, and with it a FLANNELD_ variable; `environment_only` keeps it from the command line and the file.
    """

    group: str
    kind: Kind
    meaning: str
    default: str = ""
    flannel: bool = True
    environment_only: bool = False


ControlSocket = Annotated[
    str,
    Declaration(
        "control",
        FILE,
        "Unix socket on which the agent answers `overlay-agent status` and the like; each agent needs its own.",
        flannel=False,
    ),
]
CONTROL_SOCKET = "/run/overlay-agent/agent.sock"


@dataclass(frozen=True, slots=True)
class AnyOptions:
    """How to log: what every command needs."""

    log_level: Annotated[str, Declaration("logging", LEVELS, "Least severity that is logged.", flannel=False)] = "info"
    log_format: Annotated[
        str,
        Declaration("logging", FORMATS, "auto means console on a terminal and JSON lines elsewhere.", flannel=False),
    ] = "auto"


@dataclass(frozen=True, slots=True)
class AskOptions(AnyOptions):
    """As `AnyOptions`, and how to reach the agent of this host: what a command needs that asks it."""

    control_socket: ControlSocket = CONTROL_SOCKET


@dataclass(frozen=True, slots=True)
class EtcdOptions(AnyOptions):
    """As `AnyOptions`, and how to reach etcd: what every command that speaks to etcd needs."""

    etcd_endpoints: Annotated[
        tuple[str, ...],
        Declaration(
            "etcd",
            ENDPOINTS,
            "Members of one etcd cluster, begun with at random; https means TLS, for all or for none.",
        ),
    ] = ("http://127.0.0.1:2379",)
    etcd_prefix: Annotated[
        str, Declaration("etcd", KEY_PREFIX, "Prefix of the keys in etcd; the network configuration is PREFIX/config.")
    ] = "/coreos.com/network"
    etcd_cafile: Annotated[
        str | None,
        Declaration(
            "etcd",
            FILE,
            "Certificates (PEM) that etcd's own is verified by.",
            default="none; https endpoints need it",
        ),
    ] = None
    etcd_certfile: Annotated[
        str | None, Declaration("etcd", FILE, "Client certificate (PEM) shown to etcd.", default="none")
    ] = None
    etcd_keyfile: Annotated[
        str | None, Declaration("etcd", FILE, "Private key (PEM) of the client certificate.", default="none")
    ] = None
    etcd_username: Annotated[
        str | None, Declaration("etcd", NAME, "User for etcd's own authentication.", default="none")
    ] = None
    etcd_password: Annotated[
        Secret | None,
        Declaration(
            "etcd",
            SECRET,
            "Password of the user. Not on the command line, where every user of the host could read it.",
            default="none",
            environment_only=True,
        ),
    ] = None
    etcd_password_file: Annotated[
        str | None,
        Declaration("etcd", FILE, "File whose first line is the password of the user.", default="none", flannel=False),
    ] = None

    @property
    def etcd_tls(self) -> bool:
        """Whether the endpoints are spoken to over TLS."""
        return self.etcd_endpoints[0].startswith("https://")


@dataclass(frozen=True, slots=True)
class HostOptions(EtcdOptions):
    """As `EtcdOptions`, and which interface and address stand for this host."""

    iface: Annotated[
        tuple[str, ...],
        Declaration(
            "underlay",
            INTERFACES,
            "Interface that carries the tunnels, by name or address. Repeatable: the first that exists is used.",
            default="interface of the default route",
        ),
    ] = ()
    iface_regex: Annotated[
        tuple[str, ...],
        Declaration(
            "underlay",
            REGEXES,
            "Pattern for the interface's name or address, tried when no --iface fits. Repeatable.",
            default="none",
        ),
    ] = ()
    iface_can_reach: Annotated[
        str | None,
        Declaration(
            "underlay",
            ADDRESS,
            "Use the interface that the kernel would send to this address by, when neither of the above fits.",
            default="none",
        ),
    ] = None
    public_ip: Annotated[
        str | None,
        Declaration(
            "underlay",
            IPV4,
            "IPv4 address that the other hosts send to; published in the lease.",
            default="address of the interface",
        ),
    ] = None
    public_ipv6: Annotated[
        str | None,
        Declaration(
            "underlay",
            IPV6,
            "IPv6 address that the other hosts send to, where the overlay uses IPv6 below; published in the lease.",
            default="address of the interface",
        ),
    ] = None

    @property
    def public_addresses(self) -> tuple[bytes, ...]:
        """Those that were given, packed."""
        return tuple(pack_address(text) for text in (self.public_ip, self.public_ipv6) if text)


@dataclass(frozen=True, slots=True)
class CaptureOptions(HostOptions):
    """As `HostOptions`, and where the last table of peers is: what it takes to know the hosts while etcd is away.

    The journal is there too.
    """

    state_dir: Annotated[
        str,
        Declaration(
            "leases",
            FILE,
            "Directory for the last table of peers, from which a host comes up that boots while etcd is away, and for "
            "the journal.",
            flannel=False,
        ),
    ] = "/var/lib/overlay-agent"


@dataclass(frozen=True, slots=True)
class Options(CaptureOptions):
    """All options of `run`, resolved. `None` and empty tuples mean: not given."""

    subnet_file: Annotated[
        str,
        Declaration(
            "leases", FILE, "File for the container runtime, with the subnet, the MTU and whether to masquerade."
        ),
    ] = "/run/flannel/subnet.env"
    subnet_lease_ttl: Annotated[
        int, Declaration("leases", SECONDS, "How long the lease of the subnet outlives the agent.", flannel=False)
    ] = 86400
    subnet_lease_renew_margin: Annotated[
        float,
        Declaration(
            "leases",
            MINUTES,
            "How long before its end the lease is renewed; less than its duration.",
            default="60, at most half of the lease",
        ),
    ] = 3600
    node_name: Annotated[
        str | None,
        Declaration(
            "leases", NAME, "Name of this host in the lease, for people.", default="the host name", flannel=False
        ),
    ] = None
    ip_masq: Annotated[
        bool, Declaration("dataplane", BOOLEAN, "Masquerade what pods send to addresses outside the overlay network.")
    ] = False
    no_masquerade_cidr: Annotated[
        tuple[Prefix, ...],
        Declaration(
            "dataplane",
            BLOCKS,
            "Destination outside the overlay that sees the pods' own addresses in spite of --ip-masq. Repeatable.",
            default="none",
            flannel=False,
        ),
    ] = ()
    source_guard: Annotated[
        str,
        Declaration(
            "dataplane",
            GUARD,
            "Tunnel packets from addresses that are no peer's, and those that no peer has reason to send: on drops and "
            "counts them, log counts and logs them, off lets them be (for underlays that rewrite source addresses).",
            flannel=False,
        ),
    ] = "on"
    checksum_probe: Annotated[
        bool,
        Declaration(
            "dataplane",
            BOOLEAN,
            "Ask a few peers, by a ping, a SYN and a datagram to closed ports, whether checksums survive the way; "
            "where the underlay's hardware spoils them, they are computed before.",
            flannel=False,
        ),
    ] = True
    probes: Annotated[
        bool,
        Declaration(
            "probes",
            BOOLEAN,
            "Measure the paths to a few peers at a time through the overlay: round trips, losses, what is in the way.",
            flannel=False,
        ),
    ] = True
    probe_interval: Annotated[
        int, Declaration("probes", SECONDS, "Time from one measurement to the next.", flannel=False)
    ] = 10
    probe_peers: Annotated[
        int,
        Declaration(
            "probes",
            NUMBER,
            "Peers measured each time, beside the two whose subnets are next to this host's.",
            flannel=False,
        ),
    ] = 4
    probe_port: Annotated[
        int,
        Declaration(
            "probes",
            PORT,
            "Port that other hosts' probes are answered on, by UDP and TCP, inside the overlay alone; the same on all "
            "hosts. 0 answers none.",
            flannel=False,
        ),
    ] = 8473
    nexthop_objects: Annotated[
        bool,
        Declaration(
            "dataplane",
            BOOLEAN,
            "Route through nexthop objects where the kernel has them (5.3): with plain gateways its time grows with "
            "the square of the number of peers.",
            flannel=False,
        ),
    ] = True
    control_socket: ControlSocket = CONTROL_SOCKET
    control_socket_mode: Annotated[
        str,
        Declaration(
            "control",
            MODE,
            "Who may ask: root alone, the group of the agent's process too, or every user of this host.",
            flannel=False,
        ),
    ] = "0600"
    healthz_ip: Annotated[
        str, Declaration("health", ADDRESS, "Address that the web page, /healthz, /readyz and /metrics are served on.")
    ] = "127.0.0.1"
    healthz_port: Annotated[
        int, Declaration("health", PORT, "Port of the web page, /healthz, /readyz and /metrics; 0 serves none.")
    ] = 0
    readyz_max_age: Annotated[
        int,
        Declaration(
            "health",
            SECONDS,
            "How old the table of peers may become, while etcd is away, before /readyz says that this host is not "
            "ready. Packets are forwarded as before.",
            flannel=False,
        ),
    ] = 300
    journal_size: Annotated[
        int,
        Declaration(
            "journal",
            MEBIBYTES,
            "Largest size on disk of the journal that `events` and `whois` read; 0 keeps none.",
            flannel=False,
        ),
    ] = 64
    journal_days: Annotated[
        int,
        Declaration("journal", DAYS, "How far the journal reaches back, if its size lets it.", flannel=False),
    ] = 90


Chosen = TypeVar("Chosen", bound=AnyOptions)


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the table, with all the names it goes by."""

    attribute: str
    value: Any
    declaration: Declaration

    @property
    def default(self) -> str:
        """The default as a person reads it."""
        if self.declaration.default:
            return self.declaration.default
        if isinstance(self.value, tuple):
            return ",".join(map(str, self.value))
        return str(self.value).lower() if isinstance(self.value, bool) else str(self.value)

    @property
    def name(self) -> str:
        return self.attribute.replace("_", "-")

    @property
    def flag(self) -> str:
        return f"--{self.name}"

    @property
    def variables(self) -> tuple[str, ...]:
        """Environment variables that set it, the stronger first."""
        upper = self.attribute.upper()
        return (OWN_PREFIX + upper, FLANNEL_PREFIX + upper) if self.declaration.flannel else (OWN_PREFIX + upper,)


def _declared() -> list[Entry]:
    annotations = get_type_hints(Options, include_extras=True)
    table = [Entry(row.name, row.default, annotations[row.name].__metadata__[0]) for row in fields(Options)]
    return sorted(table, key=lambda entry: GROUPS.index(entry.declaration.group))


ALL = {entry.name: entry for entry in _declared()}


def _table(options: type[AnyOptions]) -> list[Entry]:
    """The rows of `options` in the order of the groups."""
    names = {row.name for row in fields(options)}
    return [entry for entry in ALL.values() if entry.attribute in names]


_KUBERNETES = (
    "leases from the Kubernetes API are not supported; this agent leases from etcd",
    "Leave it out and give --etcd-endpoints.",
)
_IPTABLES = (
    "this agent's rules are in nftables, and kept in place as soon as somebody changes them",
    "Leave it out.",
)
_VERBOSITY = ("log levels have names here", "Use --log-level debug.")
_GONE = ("flannel has no such mode any more, and this agent neither", "Leave it out.")
_IPSEC = ("only the backends vxlan, host-gw and alloc are supported", "Leave it out.")

_NOT_HERE: Mapping[str, tuple[str, str]] = {
    "kube-subnet-mgr": _KUBERNETES,
    "kube-api-url": _KUBERNETES,
    "kube-annotation-prefix": _KUBERNETES,
    "kubeconfig-file": _KUBERNETES,
    "set-node-network-unavailable": _KUBERNETES,
    "net-config-path": (
        "the network configuration is read from etcd, not from a file",
        'Put it there: etcdctl put /coreos.com/network/config "$(cat FILE)".',
    ),
    "iptables-resync": _IPTABLES,
    "iptables-forward-rules": _IPTABLES,
    "etcd-password": (
        "every user of this host could read a password on the command line",
        "Write it to a file of mode 0600 and use --etcd-password-file FILE.",
    ),
    "v": _VERBOSITY,
    "vmodule": _VERBOSITY,
    "log_backtrace_at": _VERBOSITY,
    "listen": _GONE,
    "remote": _GONE,
    "networks": _GONE,
    "subnet-dir": _GONE,
    "charon-executable-path": _IPSEC,
    "charon-vici-uri": _IPSEC,
}
"""flannel's flags that have no counterpart here: why, and what to do instead."""


# --- the command line --------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviated flags, takes Go's `-flag`, and raises OptionError.

    It serves as the parser of the whole command as well: parsers of subcommands made from it are of its kind.
    """

    def __init__(self, **arguments: Any) -> None:
        arguments.setdefault("formatter_class", _help_format)
        super().__init__(allow_abbrev=False, **arguments)
        # As `-2h` in `--at -2h`: argparse takes only whole numbers for values, and no option of ours begins like that.
        self._negative_number_matcher = re.compile(r"-\d")

    # argparse overloads this by the type of `namespace`; all callers here leave that out.
    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """The flags that were given, as text; resolve() reads them. OptionError for what no parser knows."""
        arguments = [_two_dashes(argument) for argument in (sys.argv[1:] if args is None else args)]
        known, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            # A word among the unknown may be the value, even a secret one, of the unknown flag before it.
            raise _unknown(next((argument for argument in unknown if argument.startswith("-")), unknown[0]))
        return known

    def error(self, message: str) -> NoReturn:
        option, colon, reason = message.removeprefix("argument ").partition(": ")
        if not colon:
            option, reason = "arguments", message
        raise OptionError(option, reason, f"See {self.prog} --help.")


def _two_dashes(argument: str) -> str:
    """flanneld takes `-etcd-prefix` for `--etcd-prefix`; so do we. Short flags and numbers stay as they are."""
    name = argument.partition("=")[0]
    return "-" + argument if re.fullmatch(r"-[a-z]{2}[a-z0-9_-]*", name) else argument


def _unknown(argument: str) -> OptionError:
    name = argument.partition("=")[0]
    if not name.startswith("-"):
        return OptionError(_quoted(argument), "this argument belongs to no option", "See overlay-agent --help.")
    if name.lstrip("-") in _NOT_HERE:
        return OptionError(name[:64], *_NOT_HERE[name.lstrip("-")])
    flags = [entry.flag for entry in ALL.values() if not entry.declaration.environment_only] + ["--config"]
    hint = _did_you_mean(name, flags) or "See overlay-agent --help."
    return OptionError(name[:64], "there is no such option", hint)


def _did_you_mean(word: str, words: Iterable[str]) -> str:
    # Imported where a mistake has been made already: it costs a start 8 ms.
    from difflib import get_close_matches

    close = get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f"Did you mean {close[0]}?" if close else ""


def _help_format(prog: str) -> argparse.HelpFormatter:
    # A flag has a line of its own and its meaning stands below: the longest ones leave no room beside them.
    return argparse.HelpFormatter(prog, max_help_position=6, width=80)


def add_arguments(parser: argparse.ArgumentParser, options: type[AnyOptions] = Options) -> None:
    """Give `parser` the flags of `options`, grouped, and `--config`. Only flags that are given reach the namespace."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help=f"TOML file with further options. [{DEFAULT_CONFIG_FILE}, if it exists; {OWN_PREFIX}CONFIG]",
    )
    table = _table(options)
    for group in dict.fromkeys(entry.declaration.group for entry in table):
        section = parser.add_argument_group(group)
        for entry in table:
            kind = entry.declaration.kind
            if entry.declaration.group != group or entry.declaration.environment_only:
                continue
            shape: dict[str, Any] = {"action": "append" if kind.repeatable else "store", "metavar": kind.metavar}
            if kind is BOOLEAN:
                shape |= {"nargs": "?", "const": "true"}
            meaning = f"{entry.declaration.meaning} [{entry.default}; {entry.variables[0]}]"
            section.add_argument(entry.flag, default=argparse.SUPPRESS, help=meaning.replace("%", "%%"), **shape)
    parser.epilog = (
        "In brackets: the default and the environment variable. flannel's variables (FLANNELD_ETCD_ENDPOINTS "
        "and so on) are read as well. Keys of the TOML file are the flags without dashes in front. A flag wins "
        "over a variable, a variable over the file. A password comes from --etcd-password-file or "
        f"{OWN_PREFIX}ETCD_PASSWORD."
    )


def config_file(arguments: argparse.Namespace, environ: Mapping[str, str]) -> tuple[str, bool]:
    """Path of the TOML file, and whether it was asked for: then it must exist."""
    asked = getattr(arguments, "config", None) or environ.get(OWN_PREFIX + "CONFIG")
    return (asked, True) if asked else (DEFAULT_CONFIG_FILE, False)


# --- resolving ---------------------------------------------------------------------------------------------------


def resolve(
    options: type[Chosen],
    arguments: argparse.Namespace,
    environ: Mapping[str, str],
    toml_text: str = "",
    toml_path: str = DEFAULT_CONFIG_FILE,
) -> Chosen:
    """The value of every option: flag, then OVERLAY_AGENT_ variable, then FLANNELD_ variable, then file, then default.

    OptionError if a value cannot be read, two contradict each other, or the file holds what is no option.
    Keys of the file that belong to other commands are passed over: one file serves them all.
    """
    file = _read_toml(toml_text, toml_path)
    given: dict[str, Any] = {}
    for entry in _table(options):
        found = _find(entry, arguments, environ, file, toml_path)
        if found is not None:
            given[entry.attribute] = _read(entry, *found)
    resolved = options(**given)
    if isinstance(resolved, EtcdOptions):
        _refuse_contradictions(resolved)
    if isinstance(resolved, Options):
        return replace(resolved, subnet_lease_renew_margin=_renew_margin(resolved, given))
    return resolved


def _find(
    entry: Entry,
    arguments: argparse.Namespace,
    environ: Mapping[str, str],
    file: Mapping[str, Any],
    toml_path: str,
) -> tuple[list[str], str] | None:
    """The texts of the strongest source that has the option, and the source's name; None if none has."""
    flag = getattr(arguments, entry.attribute, None)
    if flag is not None:
        return (flag if isinstance(flag, list) else [flag]), ""
    for variable in entry.variables:
        # An empty variable is an unset one, as in flannel: unit files and manifests leave them so.
        if environ.get(variable):
            return [environ[variable]], f"environment variable {variable}"
    if entry.name in file:
        return _toml_texts(entry, file[entry.name], toml_path), _in_file(entry.name, toml_path)
    return None


def _read(entry: Entry, texts: list[str], source: str) -> Any:
    kind = entry.declaration.kind
    if kind.separator:
        texts = [part for text in texts for part in text.split(kind.separator) if part.strip()] or [""]
    values = []
    for text in texts:
        if not text:
            raise OptionError(entry.flag, "must not be empty", source=source)
        try:
            values.append(kind.read(text))
        except ValueError as error:
            raise OptionError(entry.flag, str(error), source=source) from None
    return tuple(values) if kind.toml is list else values[-1]


def _in_file(key: str, path: str) -> str:
    return f"file {path}, key {key}"


def _read_toml(text: str, path: str) -> dict[str, Any]:
    """The keys of the file, all of them options of some command."""
    if not text:
        return {}
    # Imported for those who have a file: it costs a start 10 ms.
    import tomllib

    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"\(at ([^()]*)\)$", str(error))
        raise OptionError("--config", f"{path} is not TOML" + (f" at {place[1]}" if place else "")) from None
    for key, value in values.items():
        if key in ALL and not ALL[key].declaration.environment_only:
            continue
        if key in _NOT_HERE:
            reason, hint = _NOT_HERE[key]
            if key == "etcd-password":
                reason = "a configuration file holds no password"
        elif isinstance(value, dict):
            reason, hint = "there is no such table", 'All keys stand at the top level, as: etcd-prefix = "/net".'
        else:
            reason, hint = "there is no such key", _did_you_mean(key.replace("_", "-"), ALL)
        raise OptionError(key[:64], reason, hint, f"file {path}")
    return values


def _toml_texts(entry: Entry, value: Any, path: str) -> list[str]:
    """The value as the texts a flag would have; OptionError if it is of the wrong type."""
    wanted = entry.declaration.kind.toml
    if isinstance(value, list) and wanted is list and value and all(isinstance(item, str) for item in value):
        return value
    # Not isinstance: a bool is an int.
    if type(value) is wanted and wanted is not list:
        return [str(value).lower() if wanted is bool else str(value)]
    words = {
        str: "a string in quotes",
        int: "a whole number without quotes",
        bool: "true or false without quotes",
        list: 'a list of strings, as ["a", "b"]',
    }
    raise OptionError(entry.flag, f"must be {words[wanted]}", source=_in_file(entry.name, path))


def _refuse_contradictions(options: EtcdOptions) -> None:
    tls = {endpoint.startswith("https://") for endpoint in options.etcd_endpoints}
    if len(tls) > 1:
        raise OptionError(
            "--etcd-endpoints", "some endpoints are https, some plain http", "Use https for all of them, or for none."
        )
    if options.etcd_certfile and not options.etcd_keyfile:
        raise OptionError("--etcd-certfile", "a certificate is of no use without its key", "Add --etcd-keyfile.")
    if options.etcd_keyfile and not options.etcd_certfile:
        raise OptionError("--etcd-keyfile", "a key is of no use without its certificate", "Add --etcd-certfile.")
    if options.etcd_certfile and not options.etcd_cafile:
        raise OptionError(
            "--etcd-certfile", "a client certificate needs the CA that etcd is verified by", "Add --etcd-cafile."
        )
    if options.etcd_cafile and not options.etcd_tls:
        raise OptionError(
            "--etcd-cafile", "all endpoints are plain http, so nothing would be verified", "Use https:// endpoints."
        )
    if options.etcd_password and options.etcd_password_file:
        raise OptionError(
            "--etcd-password-file",
            "the environment holds a password as well",
            f"Unset {OWN_PREFIX}ETCD_PASSWORD and {FLANNEL_PREFIX}ETCD_PASSWORD.",
        )
    password = options.etcd_password or options.etcd_password_file
    if options.etcd_username and not password:
        raise OptionError("--etcd-username", "a user needs a password", "Add --etcd-password-file.")
    if password and not options.etcd_username:
        raise OptionError("--etcd-username", "a password was given without its user", "Add --etcd-username.")


def _renew_margin(options: Options, given: Mapping[str, Any]) -> float:
    """Seconds before the end of the lease; the default gives way to a short lease, an explicit value does not."""
    if "subnet_lease_renew_margin" not in given:
        return min(float(options.subnet_lease_renew_margin), options.subnet_lease_ttl / 2)
    if options.subnet_lease_renew_margin >= options.subnet_lease_ttl:
        raise OptionError(
            "--subnet-lease-renew-margin",
            f"{options.subnet_lease_renew_margin / 60:g} minutes are not less than the lease's "
            f"{options.subnet_lease_ttl} seconds",
            "Lower it, or raise --subnet-lease-ttl.",
        )
    return float(options.subnet_lease_renew_margin)


def ignored_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that look meant for an agent and are read over, each with the reason; for one warning at the start.

    They are no errors: Kubernetes itself sets OVERLAY_AGENT_PORT and the like in every pod beside a service of
    that name, and flannel's variables may be left over from flannel.
    """
    known = {variable for entry in ALL.values() for variable in entry.variables} | {OWN_PREFIX + "CONFIG"}
    # Verbosity that fits nothing here, and harms nothing by that.
    known |= {FLANNEL_PREFIX + name for name in ("V", "VMODULE", "LOG_BACKTRACE_AT")}
    ignored = {}
    for variable in sorted(environ):
        if variable in known or not environ[variable] or not variable.startswith((OWN_PREFIX, FLANNEL_PREFIX)):
            continue
        name = variable.removeprefix(FLANNEL_PREFIX).lower().replace("_", "-")
        reason = _NOT_HERE[name][0] if name in _NOT_HERE else "there is no such option"
        ignored[variable] = reason
    return ignored

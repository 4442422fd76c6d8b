"""The archive of `overlay-agent doctor --bundle FILE`: what a maintainer needs of this host, and no secret.

Reads and asks; changes nothing. Each command has a few seconds; what fails leaves its message behind instead.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import overlay
from overlay import bundle
from overlay.commands.examination import Examination
from overlay.options import OptionError, Options, Secret

SECONDS = 5.0
"""How long one command may take."""

COMMANDS: Mapping[str, Sequence[str]] = {
    "links.txt": ("ip", "-d", "-s", "link", "show"),
    "addresses.txt": ("ip", "address", "show"),
    "routes4.txt": ("ip", "-4", "-d", "route", "show", "table", "all"),
    "routes6.txt": ("ip", "-6", "-d", "route", "show", "table", "all"),
    "rules4.txt": ("ip", "-4", "rule", "show"),
    "rules6.txt": ("ip", "-6", "rule", "show"),
    "nexthops.txt": ("ip", "-d", "nexthop", "show"),
    "neighbours.txt": ("ip", "-d", "neighbour", "show"),
    "fdb.txt": ("bridge", "-d", "fdb", "show"),
    "bridge.txt": ("bridge", "-d", "link", "show"),
    # Without the elements of sets: ours have one for each host.
    "nftables.txt": ("nft", "-t", "list", "ruleset"),
    "counters.txt": ("nft", "list", "counters"),
    "sockets.txt": ("ss", "-Huntlp"),
    "protocols.txt": ("nstat", "-asz"),
    "journal.txt": ("journalctl", "-u", "overlay-agent", "-n", "3000", "--no-pager", "-o", "short-iso-precise"),
    "unit.txt": ("systemctl", "status", "overlay-agent", "--no-pager", "-n", "0"),
}
"""File in the archive -> the command whose output it holds."""

SYSCTLS = (
    "net.ipv4.ip_forward",
    "net.ipv4.ip_forward_use_pmtu",
    "net.ipv4.conf.*.rp_filter",
    "net.ipv4.conf.*.forwarding",
    "net.ipv4.neigh.default.*",
    "net.ipv4.ip_local_port_range",
    "net.ipv6.conf.*.forwarding",
    "net.ipv6.conf.*.accept_ra",
    "net.ipv6.conf.*.disable_ipv6",
    "net.ipv6.neigh.default.*",
    "net.bridge.*",
    "net.netfilter.nf_conntrack_count",
    "net.netfilter.nf_conntrack_max",
    "kernel.osrelease",
)

DISTRIBUTIONS = ("grpcio", "protobuf", "pyroute2", "python3-etcd3", "scapy", "structlog")

FILES = {"os-release.txt": "/etc/os-release", "snmp.txt": "/proc/net/snmp", "netstat.txt": "/proc/net/netstat"}


class Place:
    """Where the archive goes: a file of mode 0600, in place at once and whole. OptionError if it cannot be written."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        try:
            if self._path.is_dir():
                raise OptionError("--bundle", f"{path} is a directory", "Name a file in it.")
            descriptor, temporary = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
        except OSError as error:
            reason = os.strerror(error.errno or 0).lower()
            raise OptionError("--bundle", f"{path} cannot be written: {reason}") from None
        self._file, self._temporary = os.fdopen(descriptor, "wb"), Path(temporary)

    def fill(self, content: bytes) -> None:
        """Put it there."""
        with self._file as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._temporary.rename(self._path)

    def give_up(self) -> None:
        """Leave nothing behind; harmless once it is filled."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def archive(document: Mapping[str, Any], seen: Examination) -> bytes:
    """The bytes of the tar.gz: `document` is what doctor found."""
    now = time.time()
    secrets = _secrets(seen)
    host = "".join(each if each.isalnum() else "-" for each in os.uname().nodename)[:40]
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    files = [("doctor.json", json.dumps(document, indent=1)), *_parts(seen)]
    return bundle.packed(
        f"overlay-agent-{host}-{stamp}", ((name, bundle.hidden(text, secrets)) for name, text in files), now
    )


def _parts(seen: Examination) -> Iterator[tuple[str, str]]:
    commands = {**COMMANDS}
    underlay = seen.facts["links"].underlay if seen.facts.get("links") else None
    for name in ("flannel.1", *([underlay.name] if underlay else ())):
        commands[f"offloads-{name.replace('/', '-')}.txt"] = ("ethtool", "-k", name)
    yield "options.txt", _options(seen.options)
    yield "versions.txt", _versions()
    yield "sysctls.txt", _sysctls()
    yield "state.txt", _state(seen.options)
    for name, path in FILES.items():
        with suppress(OSError):
            yield name, bundle.cut(Path(path).read_text(errors="backslashreplace"))
    with ThreadPoolExecutor(4) as pool:
        for name, output in zip(commands, pool.map(_output, commands.values()), strict=True):
            yield name, bundle.cut(output, end=name == "journal.txt")
    for program, lines in _iptables().items():
        yield f"{program}.txt", bundle.cut("\n".join(lines) + "\n")
    yield "status.json", bundle.cut(_status(seen))
    for page in ("healthz", "readyz", "metrics"):
        if seen.options.healthz_port:
            yield f"{page}.txt", bundle.cut(_page(seen.options, page))
    leases = seen.facts.get("leases")
    if leases is not None:
        known = (*leases.accepted, *([leases.own] if leases.own else []))
        rows = [f"{each} {each.attrs}" for each in known] + [f"{key} rejected: {why}" for key, why in leases.rejected]
        yield "leases.txt", bundle.cut("\n".join(rows) + "\n")


def _output(argv: Sequence[str]) -> str:
    """What the command prints, its complaints included."""
    if shutil.which(argv[0]) is None:
        return f"{argv[0]}: there is no such program here\n"
    try:
        done = subprocess.run(
            argv, capture_output=True, stdin=subprocess.DEVNULL, timeout=SECONDS, env={**os.environ, "LC_ALL": "C"}
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{argv[0]}: {error}\n"
    return (done.stdout + done.stderr).decode("utf-8", "backslashreplace")


def _options(options: Options) -> str:
    """One a line. A secret shows itself as such; of files only the paths are told."""
    rows = ((row.name.replace("_", "-"), getattr(options, row.name)) for row in fields(options))
    return "".join(f"{name} = {value!r}\n" for name, value in rows)


def _versions() -> str:
    lines = [f"overlay-agent {overlay.__version__}", f"python {'.'.join(map(str, sys.version_info[:3]))}"]
    for name in DISTRIBUTIONS:
        with suppress(PackageNotFoundError):
            lines.append(f"{name} {version(name)}")
    lines.append(" ".join(os.uname()))
    for argv in (("ip", "-V"), ("nft", "--version"), ("iptables", "--version"), ("etcdctl", "version")):
        lines.append(_output(argv).strip())
    return "\n".join(lines) + "\n"


def _sysctls() -> str:
    root = Path("/proc/sys")
    lines = []
    for pattern in SYSCTLS:
        for path in sorted(root.glob(pattern.replace(".", "/"))):
            with suppress(OSError):
                lines.append(f"{str(path.relative_to(root)).replace('/', '.')} = {path.read_text().strip()}")
    return "\n".join(lines) + "\n"


def _state(options: Options) -> str:
    """The names and sizes of what the agent keeps on disk, and how full that is."""
    lines = []
    for directory in filter(None, (options.state_dir, str(Path(options.subnet_file).parent))):
        with suppress(OSError):
            room = os.statvfs(directory)
            lines.append(f"{directory}: {room.f_bavail * room.f_frsize} bytes free, {room.f_favail} inodes free")
            for path in sorted(Path(directory).iterdir()):
                found = path.lstat()
                lines.append(f"  {oct(found.st_mode)} {found.st_size:>10} {path.name}")
    with suppress(OSError):
        lines += ["", options.subnet_file, Path(options.subnet_file).read_text()]
    return "\n".join(lines) + "\n"


def _iptables() -> Mapping[str, Sequence[str]]:
    from overlay.commands.trace import packet_filters

    return packet_filters().iptables


def _status(seen: Examination) -> str:
    from overlay.control import NoAnswer, ask

    try:
        return json.dumps(ask(seen.options.control_socket, "status", SECONDS), indent=1)
    except NoAnswer as silence:
        return f"{silence}\n"


def _page(options: Options, page: str) -> str:
    import http.client

    connection = http.client.HTTPConnection(options.healthz_ip, options.healthz_port, timeout=SECONDS)
    try:
        connection.request("GET", f"/{page}")
        answer = connection.getresponse()
        return f"{answer.status}\n{answer.read(bundle.MOST).decode('utf-8', 'backslashreplace')}"
    except (OSError, http.client.HTTPException) as error:
        return f"{error}\n"
    finally:
        connection.close()


def _secrets(seen: Examination) -> list[str]:
    """All that must not be told, by value: passwords from wherever they come, the lines of key files."""
    from overlay.processes import environment

    options = seen.options
    found = bundle.secret_values(os.environ)
    if seen.process is not None:
        found += bundle.secret_values(environment(seen.process.pid))
    if isinstance(options.etcd_password, Secret):
        found.append(options.etcd_password.reveal())
    with suppress(OSError, UnicodeDecodeError):
        if options.etcd_password_file:
            found.append(Path(options.etcd_password_file).read_text(encoding="utf-8").partition("\n")[0])
    with suppress(OSError, UnicodeDecodeError):
        if options.etcd_keyfile:
            found += bundle.secret_lines(Path(options.etcd_keyfile).read_text(encoding="utf-8"))
    return found

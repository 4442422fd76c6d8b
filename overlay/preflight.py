"""What must hold before anything is changed: privileges, kernel, files and programs. Nothing here leaves a trace.

Each check that fails becomes a `Problem` with the way to mend it, and all are told at once. Whether etcd answers is
checked where etcd is spoken to.
"""

import errno
import os
import shutil
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from overlay.rtnl import attribute

CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13}
"""Numbers from linux/capability.h. The first for devices, routes and nftables, the second for probe packets."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is missing, and the exact way to mend it."""

    what: str
    remedy: str


def problems(subnet_file: str, *, nft: bool) -> list[Problem]:
    """Everything that keeps the agent from working on this host; `nft` says whether it will need firewall rules."""
    missing = missing_capabilities(_read("/proc/self/status"))
    checks = [
        capability_problem(missing),
        # Without the capability the kernel refuses the question, and the answer would mislead.
        None if "CAP_NET_ADMIN" in missing else vxlan_problem("vxlan"),
        forwarding_problem(Path("/proc/sys/net/ipv4/ip_forward")),
        directory_problem(subnet_file),
        nft_problem(os.environ.get("PATH", os.defpath)) if nft else None,
    ]
    return [problem for problem in checks if problem is not None]


def report(found: list[Problem]) -> str:
    """The problems as a short list for a person."""
    lines = [f"cannot run here; {len(found)} {'thing is' if len(found) == 1 else 'things are'} missing:"]
    for problem in found:
        lines += [f"  - {problem.what}", f"    {problem.remedy}"]
    return "\n".join(lines)


def missing_capabilities(status: str) -> list[str]:
    """Which of CAPABILITIES are not effective, by the text of /proc/<pid>/status. The user id decides nothing."""
    fields = dict(line.partition(":")[::2] for line in status.splitlines())
    effective = int(fields.get("CapEff", "0").strip() or "0", 16)
    return [name for name, number in CAPABILITIES.items() if not effective >> number & 1]


def capability_problem(missing: list[str]) -> Problem | None:
    """A problem if any of the capabilities is missing."""
    if not missing:
        return None
    flags = " ".join(f"--cap-add {name.removeprefix('CAP_')}" for name in missing)
    return Problem(
        f"this process lacks {' and '.join(missing)}",
        f"Start it by its systemd unit or with sudo; in a container, add {flags}.",
    )


def vxlan_problem(kind: str) -> Problem | None:
    """Ask the kernel for a device of `kind` that it cannot make; it looks up, and loads, the kind before it refuses.

    VNI 0x1000000 has 25 bits: a kernel with VXLAN answers ERANGE (vxlan_validate in drivers/net/vxlan), one without
    EOPNOTSUPP (rtnl_newlink in net/core/rtnetlink.c). No name is given, so none can collide.
    """
    answer = _request_impossible_link(kind)
    if answer == errno.ERANGE:
        return None
    if answer == errno.EOPNOTSUPP:
        return Problem(
            "this kernel has no VXLAN",
            "Run sudo modprobe vxlan on the host; if there is no such module, install the kernel's extra modules "
            "(Ubuntu: sudo apt install linux-modules-extra-$(uname -r)) or a kernel with CONFIG_VXLAN.",
        )
    return Problem(
        f"the kernel does not tell whether it has VXLAN: {os.strerror(answer).lower()}",
        "Look for a security policy (seccomp, SELinux, AppArmor) that keeps this process from AF_NETLINK.",
    )


def forwarding_problem(setting: Path) -> Problem | None:
    """A problem if IPv4 forwarding is off and cannot be switched on from here."""
    try:
        if setting.read_text().strip() == "1" or os.access(setting, os.W_OK):
            return None
    except OSError:
        return Problem(
            f"{setting} cannot be read",
            "Mount /proc in this container, or leave the container's default /proc in place.",
        )
    return Problem(
        "IPv4 forwarding is off and cannot be switched on from here",
        "Run sudo sysctl -w net.ipv4.ip_forward=1 on the host, and put net.ipv4.ip_forward = 1 into "
        "/etc/sysctl.d/90-overlay-agent.conf to keep it.",
    )


def directory_problem(subnet_file: str) -> Problem | None:
    """A problem if the file cannot be put in place: its directory, or the nearest one that exists, takes no entry."""
    directory = Path(subnet_file).absolute().parent
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        return Problem(
            f"{existing} is not a directory, so {subnet_file} cannot be written", "Choose another --subnet-file."
        )
    if Path(subnet_file).is_dir():
        return Problem(f"{subnet_file} is a directory", "Choose another --subnet-file, or remove the directory.")
    if os.access(existing, os.W_OK | os.X_OK):
        return None
    return Problem(
        f"{existing} is not writable, so {subnet_file} cannot be written",
        f"Choose another --subnet-file, or make {directory} writable; for a systemd unit, by adding "
        f"ReadWritePaths={directory} with systemctl edit overlay-agent.",
    )


def nft_problem(search_path: str) -> Problem | None:
    """A problem if the program that installs firewall rules is not found."""
    if shutil.which("nft", path=search_path) is not None:
        return None
    return Problem(
        "the program nft is not installed, and firewall rules are wanted",
        "Install it (Debian, Ubuntu: sudo apt install nftables; Fedora, RHEL: sudo dnf install nftables).",
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _request_impossible_link(kind: str) -> int:
    """errno of the kernel's refusal (linux/rtnetlink.h, linux/if_link.h)."""
    rtm_newlink, request_ack_create_excl = 16, 0x1 | 0x4 | 0x400 | 0x200
    ifla_linkinfo, ifla_info_kind, ifla_info_data, ifla_vxlan_id, nested = 18, 1, 2, 1, 0x8000
    data = attribute(ifla_vxlan_id, struct.pack("=I", 1 << 24))
    info = attribute(ifla_info_kind, kind.encode() + b"\0") + attribute(ifla_info_data | nested, data)
    body = bytes(16) + attribute(ifla_linkinfo | nested, info)
    header = struct.pack("=IHHII", 16 + len(body), rtm_newlink, request_ack_create_excl, 1, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as channel:
            # Loading a module takes its time; an answer that never comes must not hang a start.
            channel.settimeout(10)
            channel.send(header + body)
            answer = channel.recv(8192)
    except TimeoutError:
        return errno.ETIMEDOUT
    except OSError as error:
        return error.errno or errno.EIO
    return -int(struct.unpack_from("=i", answer, 16)[0])

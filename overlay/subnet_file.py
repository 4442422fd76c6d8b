"""`subnet.env`: what the container runtime reads of this host's subnet. Format and mode are flannel's.

The stock flannel CNI plugin and Docker set-ups source this file, at any moment: it is replaced in one step, never
written in place, and not touched while its content is right.
"""

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from subnet_lease.model import Prefix, format_address

_MAX_BYTES = 4096
"""Such a file has some 100 bytes; of anything else no more is read."""


_NAMES = {4: ("FLANNEL_NETWORK", "FLANNEL_SUBNET"), 16: ("FLANNEL_IPV6_NETWORK", "FLANNEL_IPV6_SUBNET")}
"""Names of network and subnet, by the length of an address."""


def render(networks: Sequence[Prefix], subnets: Sequence[Prefix], mtu: int, ip_masq: bool) -> str:
    """The content. A subnet is given by its first address after the base, with the prefix length.

    One network and one subnet for each address family, IPv4 first.
    """
    lines = []
    for network, subnet in zip(networks, subnets, strict=True):
        names = _NAMES[len(network.base)]
        lines += [f"{names[0]}={network}", f"{names[1]}={format_address(subnet.host(1))}/{subnet.length}"]
    lines += [f"FLANNEL_MTU={mtu}", f"FLANNEL_IPMASQ={'true' if ip_masq else 'false'}", ""]
    return "\n".join(lines)


def write(path: str, networks: Sequence[Prefix], subnets: Sequence[Prefix], mtu: int, ip_masq: bool) -> bool:
    """Bring the file up to date, mode 0644; whether it had to be written. OSError if that is impossible."""
    target = Path(path)
    content = render(networks, subnets, mtu, ip_masq).encode()
    if _content(target) == content and target.stat().st_mode & 0o777 == 0o644:
        return False
    _create_directory(target.parent)
    for left in target.parent.glob(f".{target.name}.*"):
        left.unlink(missing_ok=True)  # By a writer that was killed; there is one writer at a time.
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            # Explicit: the umask of a service may be 0077, and the readers are other users' processes.
            os.fchmod(file.fileno(), 0o644)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).rename(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return True


def read(path: str) -> tuple[Prefix, ...]:
    """The subnets an earlier run wrote, IPv4 first, to ask for them again; those that can be read."""
    content = _content(Path(path)) or b""
    subnets = []
    for family, (_, name) in _NAMES.items():
        found = re.findall(rb"^%s=([0-9a-f.:/]+)\r?$" % name.encode(), content, re.MULTILINE)
        if len(found) != 1:
            continue
        try:
            subnet = Prefix.parse(found[0].decode("ascii"), strict=False)
        except ValueError:
            continue
        if len(subnet.base) == family:
            subnets.append(subnet)
    return tuple(subnets)


def _content(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_BYTES)
    except OSError:
        return None


def _create_directory(path: Path) -> None:
    """The directory and its parents, readable by all whatever the umask is; an existing one stays as it is."""
    if path.is_dir():
        return
    _create_directory(path.parent)
    path.mkdir(exist_ok=True)
    path.chmod(0o755)

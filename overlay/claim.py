"""One agent in each network namespace: the claim to a host's dataplane.

An abstract Unix socket is bound for as long as the process lives. Such names are scoped to the network namespace, as
is all that an agent owns, and the kernel takes them back with the process, however it ends. Who holds the claim is
told by the socket's peer credentials, so that the second agent can name the first.
"""

import errno
import socket
import struct
from pathlib import Path

NAME = "\0overlay-agent"


class Claimed(Exception):
    """Another process holds the claim; `pid` is its number in this PID namespace, 0 if it lives in another."""

    def __init__(self, pid: int) -> None:
        super().__init__(f"process {pid}" if pid else "a process of another container")
        self.pid = pid


def claim_host() -> socket.socket:
    """The claim, held until the socket is closed; Claimed if another holds it."""
    mine = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        mine.bind(NAME)
    except OSError as error:
        mine.close()
        if error.errno == errno.EADDRINUSE:
            raise Claimed(_holder()) from None
        raise
    mine.listen(1)
    return mine


def is_claimed() -> bool:
    """Whether a process holds the claim, as the kernel lists it (proc_net(5)), without a word to that process."""
    try:
        names = Path("/proc/self/net/unix").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(line.endswith(f" @{NAME[1:]}") for line in names.splitlines())


def _holder() -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(1)
        try:
            probe.connect(NAME)
        except OSError:
            return 0
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return pid


def command_of(pid: int) -> str:
    """The command line of a process, for a message; empty if it cannot be read."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()[:256].replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""

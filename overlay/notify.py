"""Telling systemd how the service fares: sd_notify(3) over the datagram socket named in NOTIFY_SOCKET.

Without the variable nothing is sent. A notification that cannot be delivered is no reason to disturb the dataplane,
so nothing here raises or blocks.
"""

import socket
from collections.abc import Mapping
from typing import Self


class Notifier:
    """Sends states of the service to its manager. Calls from several threads do not disturb one another."""

    def __init__(self, address: str | None, watchdog_interval: float | None = None) -> None:
        self._address = address
        self._watchdog_interval = watchdog_interval

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], pid: int) -> Self:
        """As the manager has set NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID for the process `pid`."""
        name = environ.get("NOTIFY_SOCKET", "")
        address = None
        if name.startswith("/"):
            address = name
        elif name.startswith("@") and len(name) > 1:
            address = "\0" + name[1:]
        return cls(address, _watchdog_interval(environ, pid) if address else None)

    @property
    def watchdog_interval(self) -> float | None:
        """Seconds between beats: half of what the manager waits, as sd_watchdog_enabled(3) advises. None if off."""
        return self._watchdog_interval

    def ready(self, status: str) -> bool:
        """Start-up is complete; units ordered after this one may start."""
        return self._send(f"READY=1\nSTATUS={_one_line(status)}")

    def status(self, text: str) -> bool:
        """What `systemctl status` shows."""
        return self._send(f"STATUS={_one_line(text)}")

    def beat(self) -> bool:
        """Sign of life for the watchdog."""
        return self._send("WATCHDOG=1") if self._watchdog_interval is not None else False

    def stopping(self) -> bool:
        """Shutting down has begun."""
        return self._send("STOPPING=1")

    def _send(self, message: str) -> bool:
        """Whether the manager's socket took the message."""
        if self._address is None:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
                # A manager that does not read must not stop the agent.
                channel.setblocking(False)
                channel.sendto(message.encode(errors="replace"), self._address)
        except OSError:
            return False
        return True


def _one_line(text: str) -> str:
    # A line end would begin another variable of the protocol.
    return " ".join(text.splitlines())


def _watchdog_interval(environ: Mapping[str, str], pid: int) -> float | None:
    microseconds = environ.get("WATCHDOG_USEC", "")
    owner = environ.get("WATCHDOG_PID", str(pid))
    if not (microseconds.isascii() and microseconds.isdigit()) or owner != str(pid):
        return None
    return int(microseconds) / 2_000_000 or None

"""A fresh network namespace for the calling thread, gone after use, and iproute2 in it.

Made for tests of one network stack, which need neither names below /run/netns nor further processes.
"""

import contextlib
import ctypes
import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

from overlay.cluster_hosts import wait_until

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def new_namespace() -> Iterator[int]:
    """The calling thread lives in a new namespace for as long as the context lasts; what it starts inherits it.

    Yields a descriptor of the namespace, for `entered`. Loopback is up. os.unshare would need Python 3.12.
    """
    with _kept() as home:
        _checked(_libc.unshare(CLONE_NEWNET))
        try:
            with _kept() as inside:
                sh("ip", "link", "set", "lo", "up")
                yield inside
        finally:
            _checked(_libc.setns(home, CLONE_NEWNET))


@contextlib.contextmanager
def entered(namespace: int) -> Iterator[None]:
    """The calling thread lives in the namespace of this descriptor for as long as the context lasts."""
    with _kept() as home:
        _checked(_libc.setns(namespace, CLONE_NEWNET))
        try:
            yield
        finally:
            _checked(_libc.setns(home, CLONE_NEWNET))


def sh(*argv: str) -> str:
    """Run a program to its end in the thread's namespace; its output. AssertionError with what it says if it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr.strip()}"
    return done.stdout


def ip(line: str) -> str:
    """Run `ip LINE`."""
    return sh("ip", *line.split())


def ip_json(line: str) -> list[dict[str, Any]]:
    """What `ip -d -j LINE` shows, without the empty objects it leaves between."""
    found: list[dict[str, Any]] = json.loads(sh("ip", "-d", "-j", *line.split()) or "[]")
    return [each for each in found if each]


def index_of(name: str) -> int:
    """The index of an interface of the thread's namespace."""
    index: int = ip_json(f"link show {name}")[0]["ifindex"]
    return index


def veth(name: str, peer: str, address: str = "") -> int:
    """A veth pair, up; `address` (with length) goes to the first. Returns the index of the first.

    The kernel finds out by itself, in its own time, that a link works, and announces it: that is waited for.
    """
    ip(f"link add {name} type veth peer name {peer}")
    if address:
        ip(f"addr add {address} dev {name}")
    ip(f"link set {peer} up")
    ip(f"link set {name} up")
    wait_until(lambda: ip_json(f"link show {name}")[0]["operstate"] == "UP", what=f"carrier on {name}")
    return index_of(name)


@contextlib.contextmanager
def _kept() -> Iterator[int]:
    """A descriptor of the namespace that the calling thread is in now."""
    descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _checked(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

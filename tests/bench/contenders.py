"""The contenders: each puts the same peers into a kernel that knows none, and says what it cost.

All times are in seconds of wall-clock time unless they are called CPU.
"""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from overlay import rtnl
from overlay.model import Entry, Fdb, Neighbour, NextHop, Route
from overlay.netns import Namespace
from subnet_lease.model import Lease, format_address, format_mac
from tests.bench.peers import bridge_commands, entries, ip_commands
from tests.bench.place import inside, make_device

ROOT = Path(__file__).parents[2]

DEADLINE_S = 180.0

SO_RCVBUFFORCE = 33

BATCH = 400
"""Messages in one send, as in `overlay.kernel`."""


class Failed(Exception):
    """A contender did not do its work; the text says what it said."""


# --- the agent ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """One start of the agent, measured from outside.

    `ready_s` counts from just before fork to the arrival of READY=1, which the agent sends after the first pass that
    tried everything. CPU and memory are the process's own at that moment: the kernel's accounting of all its threads,
    the largest resident set so far. `stages` gives when each event of its log was written, counted as `ready_s` is.
    """

    ready_s: float
    cpu_s: float
    peak_mb: float
    resident_mb: float
    put: int
    dropped: int
    pass_s: float
    stages: dict[str, float]


def start_agent(
    place: Namespace, endpoint: str, prefix: str, directory: Path, meanwhile: Callable[[], None] = lambda: None
) -> Start:
    """Start an agent, wait until it is ready, measure, do `meanwhile`, and kill it; the dataplane stays."""
    log_path = directory / "agent.log"
    with _notifications(directory / "notify") as notify, log_path.open("wb") as log:
        argv = [
            *(sys.executable, "-P", "-m", "agent", "run"),
            *("--etcd-endpoints", endpoint, "--etcd-prefix", prefix),
            *("--iface", "eth0", "--subnet-file", str(directory / "subnet.env"), "--log-format", "json"),
        ]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
            "PYTHONPATH": str(ROOT),
            # Compiled once, by the start that is not counted, and not into the checkout.
            "PYTHONPYCACHEPREFIX": str(directory / "pycache"),
            "NOTIFY_SOCKET": str(directory / "notify"),
        }
        epoch, started = time.time(), time.monotonic()
        process = inside(
            place,
            lambda: subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=directory
            ),
        )
        try:
            ready = _await_ready(process, notify)
            cpu = _cpu_seconds(process.pid)
            memory = _memory(process.pid)
            meanwhile()
        except Failed as failure:
            raise Failed(f"{failure}; its log:\n{log_path.read_text()}") from None
        finally:
            process.kill()
            process.wait()
    events = [json.loads(line) for line in log_path.read_text().splitlines()]
    stages: dict[str, float] = {}
    for event in events:
        stages.setdefault(event["event"], datetime.fromisoformat(event["timestamp"]).timestamp() - epoch)
    ready_at = next(number for number, event in enumerate(events) if event["event"] == "ready")
    passes = [event for event in events[:ready_at] if event["event"] == "reconciled"]
    return Start(
        ready_s=ready - started,
        cpu_s=cpu,
        peak_mb=memory["VmHWM"],
        resident_mb=memory["VmRSS"],
        put=sum(each["put"] for each in passes),
        dropped=sum(each["dropped"] for each in passes),
        pass_s=sum(each["ms"] for each in passes) / 1000,
        stages=stages,
    )


@contextlib.contextmanager
def _notifications(path: Path) -> Iterator[socket.socket]:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(path))
        yield notify


def _await_ready(process: "subprocess.Popen[bytes]", notify: socket.socket) -> float:
    """The time of READY=1 on the steady clock."""
    deadline = time.monotonic() + DEADLINE_S
    exit_handle = os.pidfd_open(process.pid)
    watched: list[socket.socket | int] = [notify, exit_handle]
    try:
        while (left := deadline - time.monotonic()) > 0:
            readable = select.select(watched, [], [], left)[0]
            now = time.monotonic()
            if notify in readable:
                if b"READY=1" in notify.recv(4096).split(b"\n"):
                    return now
            elif readable:
                raise Failed("the agent ended before it was ready")
    finally:
        os.close(exit_handle)
    raise Failed(f"the agent was not ready after {DEADLINE_S:g} s")


def _cpu_seconds(pid: int) -> float:
    """User and system time of all threads, dead ones included, to the nanosecond (clock_getcpuclockid(3))."""
    return time.clock_gettime((~pid << 3) | 2)


def _memory(pid: int) -> dict[str, float]:
    """VmHWM and VmRSS in MB of 1,000,000 bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 / 1e6 for name in ("VmHWM", "VmRSS")}


# --- the kernel alone --------------------------------------------------------------------------------------------


def kernel_alone(place: Namespace, peers: Sequence[Lease], *, ack_each: bool = False) -> float:
    """Send the agent's own messages, made beforehand, and wait for each batch's end: what no agent can save.

    With `ack_each` every message is acknowledged for itself, and all of that is read.
    """
    device = make_device(place)
    wanted = entries(peers, device, nexthops=True)
    batches = []
    for start in range(0, len(wanted), BATCH):
        some = wanted[start : start + BATCH]
        messages = [rtnl.put(entry, device, number, ack=ack_each) for number, entry in enumerate(some)]
        batches.append(b"".join([*messages, rtnl.end_of_batch(BATCH)]))

    def exchange() -> float:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
            # Room for the answers to a whole batch.
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
            sock.bind((0, 0))
            started = time.monotonic()
            for batch in batches:
                sock.send(batch)
                # A refusal would come before the end, and `compare` would find it.
                while rtnl.HEADER.unpack_from(sock.recv(65536))[3] != BATCH:
                    pass
            return time.monotonic() - started

    return inside(place, exchange)


# --- iproute2 ----------------------------------------------------------------------------------------------------


def iproute2(place: Namespace, peers: Sequence[Lease], directory: Path, *, nexthops: bool) -> float:
    """`bridge -batch` and then `ip -batch` on ready-made files; what both take on an empty file is taken off."""
    device = make_device(place)
    bridge_file, ip_file, empty = (directory / name for name in ("bridge.batch", "ip.batch", "empty.batch"))
    bridge_file.write_text("".join(bridge_commands(peers, device)))
    ip_file.write_text("".join(ip_commands(peers, device, nexthops=nexthops)))
    empty.write_text("")

    def both(bridge: Path, ip: Path) -> float:
        started = time.monotonic()
        for argv in (["bridge", "-batch", str(bridge)], ["ip", "-batch", str(ip)]):
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            if done.returncode:
                raise Failed(f"{' '.join(argv)}: {done.stderr[:400]}")
        return time.monotonic() - started

    idle = inside(place, lambda: both(empty, empty))
    return inside(place, lambda: both(bridge_file, ip_file)) - idle


# --- pyroute2 ----------------------------------------------------------------------------------------------------


def pyroute2(place: Namespace, peers: Sequence[Lease]) -> float:
    """One call of `IPRoute` for each entry, with plain gateways; its import and socket are not counted."""
    from pyroute2 import IPRoute

    device = make_device(place)
    wanted = entries(peers, device, nexthops=False)

    def call(route: IPRoute, entry: Entry) -> None:
        match entry:
            case Fdb():
                mac, dst = format_mac(entry.mac), format_address(entry.remote)
                route.fdb("replace", ifindex=device, lladdr=mac, dst=dst, state=entry.state, flags=rtnl.NTF_SELF)
            case Neighbour():
                dst, mac = format_address(entry.address), format_mac(entry.mac)
                route.neigh("replace", ifindex=device, dst=dst, lladdr=mac, state="permanent")
            case Route():
                gateway = format_address(entry.gateway)
                route.route("replace", dst=str(entry.destination), gateway=gateway, oif=device, flags=["onlink"])
            case NextHop():
                raise AssertionError("pyroute2 knows no nexthop objects")

    def program() -> float:
        with IPRoute() as route:
            started = time.monotonic()
            for entry in wanted:
                call(route, entry)
            return time.monotonic() - started

    return inside(place, program)

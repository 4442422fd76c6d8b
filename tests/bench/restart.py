"""The agent is killed and started again among unchanged peers, while a ping runs to one of them.

One peer is real: a VXLAN device in the hub, made with iproute2, behind the lease of the first of the peers.
"""

import contextlib
import dataclasses
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

from overlay.cluster import wait_until
from subnet_lease.model import Lease, format_address, format_mac
from tests.bench.monitor import ADDRESS, LINK, NEIGH, NEXTHOP, ROUTE, Monitor
from tests.bench.peers import DEVICE, SMALL
from tests.bench.place import device_index, inside
from tests.bench.report import BUDGET_RESTART_S, FLANNELD_RESTART, FULL, Figures, table
from tests.bench.testbed import Host, Samples, Testbed, note

INTERVAL_S = 0.005
"""Between two pings."""

AFTERWARDS = 100
"""Answers to wait for after the start."""

PATIENCE_S = 1.0
"""How long the last answer may take."""

VTEP = "peer"
"""The real peer's device in the hub."""

ECHO = struct.Struct("!BBHHH")  # type, code, checksum, identifier, sequence number: RFC 792
ECHO_REQUEST, ECHO_REPLY = 8, 0


class Ping:
    """Echo requests from `place` to `address`, one every INTERVAL_S until the block ends."""

    def __init__(self, host: Host, address: str) -> None:
        self.sent = 0
        self.answered: set[int] = set()
        self._address = address
        self._ended = threading.Event()
        self._socket = inside(host.place, lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
        self._socket.settimeout(PATIENCE_S)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._send, self._receive)]

    def __enter__(self) -> "Ping":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._socket.close()

    @property
    def lost(self) -> int:
        return self.sent - len(self.answered)

    def _send(self) -> None:
        begun = time.monotonic()
        while not self._ended.wait(begun + self.sent * INTERVAL_S - time.monotonic()):
            self._socket.sendto(echo_request(self.sent), (self._address, 0))
            self.sent += 1

    def _receive(self) -> None:
        """All answers, until there is none for PATIENCE_S or none is missing at the end."""
        while not self._ended.is_set() or self._threads[0].is_alive() or self.lost:
            try:
                packet = self._socket.recv(2048)
            except TimeoutError:
                if self._ended.is_set():
                    return
                continue
            kind, _, _, identifier, number = ECHO.unpack_from(packet, (packet[0] & 15) * 4)
            if kind == ECHO_REPLY and identifier == os.getpid() & 0xFFFF:
                self.answered.add(number)


def echo_request(number: int) -> bytes:
    """Without a payload, of this process (RFC 792); numbers from 0 to 65,535."""
    fields = (os.getpid() & 0xFFFF, number)
    words = struct.unpack("!4H", ECHO.pack(ECHO_REQUEST, 0, 0, *fields))
    total = sum(words)
    return ECHO.pack(ECHO_REQUEST, 0, ~(total + (total >> 16)) & 0xFFFF, *fields)


@contextlib.contextmanager
def real_peer(bed: Testbed, host: Host, peer: Lease) -> Iterator[str]:
    """Let the hub be `peer` to an agent that has been ready; the address in the overlay that answers."""
    link = host.place.json("ip", "addr", "show", "dev", DEVICE)[0]
    own = next(each["local"] for each in link["addr_info"] if each["family"] == "inet")
    assert peer.attrs.vtep is not None
    underlay, address = format_address(peer.attrs.public_ip), format_address(peer.subnet.base)
    bed.hub.ip(
        f"addr add {underlay}/32 dev lo",
        f"link add {VTEP} address {format_mac(peer.attrs.vtep.mac)} type vxlan id 1 local {underlay} dstport 8472 "
        "nolearning",
        f"link set {VTEP} mtu {link['mtu']} up",
        f"addr add {address}/32 dev {VTEP}",
        f"neigh add {own} lladdr {link['address']} dev {VTEP} nud permanent",
        f"route add {own}/24 via {own} dev {VTEP} onlink",
    )
    fdb = bed.hub.run("bridge", "fdb", "add", link["address"], "dev", VTEP, "dst", host.own_ip, "self", "permanent")
    assert not fdb.returncode, fdb.stderr
    try:
        yield address
    finally:
        bed.hub.ip(f"link del {VTEP}", f"addr del {underlay}/32 dev lo")


def measure(bed: Testbed) -> Samples:
    """At every size a start on an empty kernel, a kill, and the start that is measured."""
    samples: Samples = {}
    for number in range(1, bed.options.repeat + 1):
        for size in (SMALL, *bed.options.sizes):
            bed.say(f"restart, run {number} of {bed.options.repeat}: {size} peers")
            with bed.host(size) as host:
                note(samples, "restart", size, _restart(bed, host))
                host.compare()
    return samples


def _restart(bed: Testbed, host: Host) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        with host.agent():
            device = device_index(host.place)
            address = stack.enter_context(real_peer(bed, host, host.peers[0]))
            monitor = stack.enter_context(Monitor(host.place, device, LINK, ADDRESS, NEIGH, ROUTE, NEXTHOP))
            ping = stack.enter_context(Ping(host, address))
            wait_until(lambda: ping.answered, PATIENCE_S, "an answer from the real peer")
        # The agent is dead now.
        with host.agent() as agent:
            answered = len(ping.answered)
            wait_until(lambda: len(ping.answered) > answered + AFTERWARDS, what="answers after the start")
    return {**dataclasses.asdict(agent.start), "heard": monitor.heard, "pings": ping.sent, "lost": ping.lost}


def sections(figures: Figures) -> list[str]:
    rows = []
    for size in figures.sizes("restart"):
        ready, cpu = figures.spread("restart", size, "ready_s"), figures.spread("restart", size, "cpu_s")
        writes = max(figures.all("restart", size, "put")) + max(figures.all("restart", size, "dropped"))
        heard = max(figures.all("restart", size, "heard"))
        sent, lost = (sum(figures.all("restart", size, field)) for field in ("pings", "lost"))
        cells = [f"{writes}", f"{heard}", f"{lost} of {sent:,}"]
        verdict = ""
        if size == FULL:
            name = f"restart among {size:,} peers"
            verdict = figures.verdict(name, ready.median, BUDGET_RESTART_S, "s")
            cells = [
                figures.verdict(f"{name}, writes", writes, 0, "", 0),
                figures.verdict(f"{name}, notifications", heard, 0, "", 0),
                f"{figures.verdict(f'{name}, pings lost', lost, 0, '', 0)} of {sent:,}",
            ]
        rows.append((f"{size:,}", ready.text(), verdict, cpu.text(), *cells))
    return [
        "## Restart among unchanged peers",
        "The agent is killed (SIGKILL) and started again; nothing has changed. *Writes*: the most of any run, from the "
        "agent's log. *Notifications*: the most of any run, counted by a netlink socket of ours from before the kill: "
        "all about the VXLAN device, its addresses, neighbours and FDB entries, and all about routes and nexthop "
        "objects of the namespace. The kernel says nothing when an FDB entry, a neighbour or a route is rewritten with "
        "what it holds; hence both counts. *Pings lost*: of all runs, one every "
        f"{1000 * INTERVAL_S:g} ms from before the kill until after `READY=1`, through the tunnel to the one peer that "
        f"is real. Budgets with {FULL:,} peers: no write, no packet lost, ready within {BUDGET_RESTART_S} s. flanneld "
        "v0.28.9: steady after {1} s with {0:,} peers, every entry written again.".format(*FLANNELD_RESTART),
        table(("peers", "ready", "budget", "CPU seconds", "writes", "notifications", "pings lost"), rows),
    ]

"""Bytes, packets and round trips between pods of two hosts: by routes made by hand, and by each of the agent's ways.

Every contender has two hosts of its own, which are alike, and all are up together. They take turns, one measurement
after the other and round by round, and each round begins with another of them; so what else the machine does hits all
of them alike. Ratios are taken within a round.
"""

import contextlib
import json
import os
import socket
import struct
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from overlay.cluster import Lab
from overlay.cluster_hosts import Host, Place, wait_until
from overlay.topology import network_config
from subnet_lease.etcd import EtcdStore
from tests.bench.contenders import Failed
from tests.bench.place import Mismatch
from tests.bench.report import Figures, Spread, percentiles, table
from tests.bench.restart import ECHO, ECHO_REPLY, echo_request
from tests.bench.testbed import Testbed

SECONDS = 1
"""Of each transfer."""

STREAMS = 4

UDP_HEADERS = 28
"""Bytes of IPv4 and UDP before a datagram's payload."""

ECHOES = 10_000

WARM_UP = 200
"""Echoes before them that are not counted: neighbours are looked for, the kernel begins to stamp packets."""

PATIENCE_S = 1
"""Whole seconds for an echo to come back."""

SO_TIMESTAMPNS = 35  # asm-generic/socket.h
TIMESPEC = struct.Struct("@ll")
TIMEVAL = struct.Struct("@ll")

HOSTS, BY_HAND = "host to host", "plain route"
"""The references: the underlay without pods, and pods without an agent."""


@dataclass(frozen=True, slots=True)
class Way:
    """How agents make it: the backend (a key of `topology.BACKENDS`), the underlay's families, routes or a tunnel."""

    backend: str
    underlay: str
    direct: bool


WAYS = {
    "host-gw": Way("host-gw", "4", direct=True),
    "vxlan, DirectRouting": Way("direct", "4", direct=True),
    "vxlan": Way("vxlan", "4", direct=False),
    "vxlan over IPv6": Way("vxlan", "6", direct=False),
}


@dataclass(frozen=True, slots=True)
class Path:
    """From `source`, which is `host` or its pod, to an IPv4 address elsewhere; `mtu` (bytes) is the source's."""

    name: str
    host: Host
    source: Place
    address: str
    mtu: int

    @classmethod
    def between(cls, name: str, host: Host, source: Place, target: Place, address: str) -> "Path":
        """With an iperf3 that serves at the target until its lab is down, and the way there tried out."""
        serving = f"iperf3-{target.name}"
        target.lab.start(serving, target.inside("iperf3", "--server", "--forceflush"), {})
        wait_until(lambda: "listening" in target.lab.log(serving), what=f"iperf3 serving at {target.name}")
        wait_until(
            lambda: not source.run("ping", "-n", "-c", "1", "-W", "1", address).returncode,
            what=f"an answer from {address} to {source.name}, {name}",
        )
        return cls(name, host, source, address, source.json("ip", "link", "show", "dev", "eth0")[0]["mtu"])

    @property
    def on_the_underlay(self) -> tuple[int, int]:
        """Bytes and packets that the host has sent there so far."""
        sent = self.host.json("ip", "-s", "link", "show", "dev", "eth0")[0]["stats64"]["tx"]
        return sent["bytes"], sent["packets"]


# --- measuring ---------------------------------------------------------------------------------------------------


def measure(bed: Testbed) -> dict[str, Any]:
    """As many rounds as there are repetitions; for each contender the MTU, and a sample of each round."""
    version = " ".join(subprocess.run(["iperf3", "--version"], stdout=subprocess.PIPE, text=True).stdout.split()[:2])
    with contextlib.ExitStack() as stack:
        bed.say("throughput: two hosts for each contender")
        lab = _lab(stack, 0)
        _route_by_hand(lab)
        source, target = lab.hosts
        paths = [Path.between(HOSTS, source, source, target, target.underlay_ip), _between_pods(BY_HAND, lab)]
        labs = {name: _lab(stack, number, way) for number, (name, way) in enumerate(WAYS.items(), 1)}
        for name, lab in labs.items():
            _start_agents(name, lab)
            paths.append(_between_pods(name, lab))
        rounds = []
        for number in range(bed.options.repeat):
            bed.say(f"throughput, round {number + 1} of {bed.options.repeat}")
            first = number % len(paths)
            rounds.append(_round(paths[first:] + paths[:first]))
        for name, lab in labs.items():
            if not _as_called_for(name, lab):
                raise Mismatch(f"{name}: a host does not reach the other as its backend calls for")
        samples = {path.name: [each[path.name] for each in rounds] for path in paths}
        mtus = {path.name: path.mtu for path in paths}
        return {"throughput": {"iperf3": version, "mtus": mtus, "samples": samples}}


def _lab(stack: contextlib.ExitStack, number: int, way: Way = WAYS["vxlan"]) -> Lab:
    """Not yet up; it is down once the stack is."""
    lab = Lab(
        f"b{os.getpid()}x{number}",
        connect=lambda endpoint: EtcdStore([endpoint], "/coreos.com/network"),
        hosts=2,
        pods=1,
        config=network_config("4", way.backend),
        underlay=way.underlay,
        tied=True,
    )
    stack.callback(lab.down)
    return lab


def _route_by_hand(lab: Lab) -> None:
    """What two hosts need for their pods to reach one another, and no more: neither etcd nor agents."""
    lab.make_network()
    for number, host in enumerate(lab.hosts, 1):
        host.subnet_file.write_text(f"FLANNEL_SUBNET=10.244.{number}.1/24\nFLANNEL_MTU={host.seat.mtu}\n")
        host.attach_pods()
        # What makes a router of the hub makes one of a host as well.
        host.run("sh", "-c", lab.topology.router_script())
    for host, other in (lab.hosts, reversed(lab.hosts)):
        host.ip(f"route add {other.subnet} via {other.underlay_ip}")


def _start_agents(name: str, lab: Lab) -> None:
    """All of the lab up, and traffic on the way that it shall take."""
    lab.up()
    wait_until(lambda: _as_called_for(name, lab), what=f"{name} as the way from host to host")


def _between_pods(name: str, lab: Lab) -> Path:
    source, target = lab.pods
    return Path.between(name, source.host, source, target, target.address)


def _as_called_for(name: str, lab: Lab) -> bool:
    """Whether both kernels reach the other's subnet, by the tunnel or by a route without one."""
    leases = lab.leases()
    peers = [peer for host in lab.hosts for peer in host.peers(leases)]
    return len(peers) == 2 and all(peer.programmed and peer.direct == WAYS[name].direct for peer in peers)


def _round(paths: Sequence[Path]) -> dict[str, dict[str, float]]:
    """A sample of each, by name."""
    samples: dict[str, dict[str, float]] = {path.name: {} for path in paths}
    for take in (_one_stream, _several_streams, _datagrams, _echoes):
        for path in paths:
            samples[path.name] |= take(path)
    return samples


def _one_stream(path: Path) -> dict[str, float]:
    """Bits a second, and bytes for a packet that left the host: far above the MTU where segments are not cut."""
    before = path.on_the_underlay
    rate = _iperf3(path)["sum_received"]["bits_per_second"]
    sent, packets = (after - since for after, since in zip(path.on_the_underlay, before, strict=True))
    return {"tcp_1_bps": rate, "tcp_packet_bytes": sent / packets}


def _several_streams(path: Path) -> dict[str, float]:
    return {"tcp_n_bps": _iperf3(path, "--parallel", str(STREAMS))["sum_received"]["bits_per_second"]}


def _datagrams(path: Path) -> dict[str, float]:
    """Packets a second that were sent, and that arrived."""
    size = path.mtu - UDP_HEADERS
    end = _iperf3(path, "--udp", "--bitrate", "0", "--length", str(size))
    sent, arrived = end["sum_sent"], end["sum_received"]
    return {"udp_sent_pps": sent["packets"] / sent["seconds"], "udp_pps": arrived["bytes"] / size / arrived["seconds"]}


def _iperf3(path: Path, *options: str) -> dict[str, Any]:
    """What iperf3 sums up at the end. Sender and receiver have a core each, as far as there are two."""
    cores = sorted(os.sched_getaffinity(0))
    argv = ["iperf3", "--json", "--client", path.address, "--time", str(SECONDS)]
    done = path.source.run(*argv, "--affinity", f"{cores[0]},{cores[-1]}", *options)
    said = json.loads(done.stdout or "{}")
    if done.returncode or "error" in said:
        raise Failed(f"{' '.join(argv)}, {path.name}: {said.get('error', done.stderr)}")
    end: dict[str, Any] = said["end"]
    return end


def _echoes(path: Path) -> dict[str, float]:
    """Seconds of round trips of ICMP echoes, each sent when the one before has come back. Failed if one does not."""

    def make() -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)

    with path.source.made(make) as raw:
        raw.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        # Not `settimeout`: with that, Python polls the socket before it sends.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, TIMEVAL.pack(PATIENCE_S, 0))
        raw.connect((path.address, 0))
        try:
            times = [_round_trip(raw, number) for number in range(WARM_UP + ECHOES)][WARM_UP:]
        except BlockingIOError:
            raise Failed(f"{path.name}: an echo of {path.address} is missing after {PATIENCE_S} s") from None
    middle, late, _ = percentiles(times)
    return {"echo_s": middle, "echo_late_s": late}


def _round_trip(raw: socket.socket, number: int) -> float:
    """Seconds from just before the send until the kernel stamps the answer, as ping counts, which rounds to 1 us."""
    request = echo_request(number)
    begun = time.time_ns()
    raw.send(request)
    while True:
        packet, control, _, _ = raw.recvmsg(2048, socket.CMSG_SPACE(TIMESPEC.size))
        kind, _, _, identifier, answered = ECHO.unpack_from(packet, (packet[0] & 15) * 4)
        if (kind, identifier, answered) == (ECHO_REPLY, os.getpid() & 0xFFFF, number):
            [(_, _, stamp)] = control
            seconds, nanoseconds = TIMESPEC.unpack(stamp)
            return float(seconds * 10**9 + nanoseconds - begun) / 1e9


# --- the document ------------------------------------------------------------------------------------------------


COLUMNS = (
    ("tcp_1_bps", "TCP, one stream", "Gbit/s", 1e-9, 2),
    ("tcp_n_bps", f"TCP, {STREAMS} streams", "Gbit/s", 1e-9, 2),
    ("udp_sent_pps", "UDP sent", "1,000 packets/s", 1e-3, 0),
    ("udp_pps", "UDP arrived", "1,000 packets/s", 1e-3, 0),
    ("echo_s", "echo, median", "us", 1e6, 1),
    ("echo_late_s", "echo, 99th percentile", "us", 1e6, 1),
)
"""Field of a sample, name, unit, what makes that unit of the field's, and digits."""


def sections(figures: Figures) -> list[str]:
    found = figures.whole("throughput")
    samples: dict[str, list[dict[str, float]]] = found["samples"]
    mtus: dict[str, int] = found["mtus"]
    headers = " or ".join(f"{mtus[BY_HAND] - mtus[name]}" for name, way in WAYS.items() if not way.direct)
    rows = []
    for name, rounds in samples.items():
        spreads = [
            Spread.of([scale * sample[field] for sample in rounds]).text(digits)
            for field, _, _, scale, digits in COLUMNS
        ]
        lost = median(1 - sample["udp_pps"] / sample["udp_sent_pps"] for sample in rounds)
        large = median(sample["tcp_packet_bytes"] for sample in rounds)
        rows.append((name, str(mtus[name]), *spreads, f"{100 * lost:.0f} %", f"{large:,.0f}"))
    return [
        "## Throughput and latency",
        "From a pod on one host to a pod on another, IPv4; the hosts have IPv6 addresses in the last line alone. "
        f"*{HOSTS}*: between the hosts' own addresses, on the bare underlay. *{BY_HAND}*: between pods, with one route "
        "on each host to the other's pods, made by hand; no agent, no firewall. All others: as agents make it, with "
        "their firewall rules. Every line but the first has two hosts of its own on a bridge. All are up together, and "
        f"the lines take turns in each measurement. Rounds: {len(samples[BY_HAND])}, each of which begins with another "
        "line.",
        f"TCP and UDP: {found['iperf3']} for {SECONDS} s, sender and receiver on a core each where there are two. UDP: "
        "datagrams that fill the MTU, as fast as the sender can; nothing slows it down, so what does not arrive is "
        f"mostly what the receiver could not read in time. Echo: {ECHOES:,} ICMP echoes, each sent when the last is "
        "back, from the send to the kernel's stamp on the answer. So counts `ping`, which shows whole microseconds. "
        "The system call that sends is in it; waking a process up is not. *TCP packet*: what the host sent to the "
        "underlay during the transfer of one stream, in bytes for a packet, on average.",
        table(
            ("path", "MTU", *(f"{name}, {unit}" for _, name, unit, _, _ in COLUMNS), "UDP lost", "TCP packet, bytes"),
            rows,
        ),
        f"The same as ratios: to the *{BY_HAND}*, what the tunnel and the agent's rules cost; to *{HOSTS}*, what the "
        "pods' bridges and links cost besides. Medians of the ratios within a round. TCP and UDP: more is better. "
        "Echo: less is better.",
        *(_ratios(samples, reference) for reference in (BY_HAND, HOSTS)),
        "What this can tell is how much work the kernel has with a packet on one way, in terms of another. Nothing but "
        "the processor limits a veth, and both hosts, sender and receiver share its cores. What it cannot tell is how "
        "fast a real network is: there is no wire, no NIC and no interrupt. A veth takes TCP segments uncut (*TCP "
        "packet*), inside of a tunnel too, with checksums that are never finished; so TCP does as well here as with a "
        "NIC that offloads segmentation and checksums of VXLAN, at best. Without such a NIC a host pays for every "
        "packet of the MTU's size: see UDP. On a wire, each of these also loses the tunnel's headers, "
        f"{headers} bytes. And nothing is told of how a NIC spreads flows over its queues, by the outer UDP port.",
    ]


def _ratios(samples: dict[str, list[dict[str, float]]], reference: str) -> str:
    rows = []
    for name, rounds in samples.items():
        pairs = list(zip(rounds, samples[reference], strict=True))
        ratios = [Spread.of([ours[field] / theirs[field] for ours, theirs in pairs]) for field, *_ in COLUMNS]
        rows.append((name, *("1.00" if name == reference else ratio.text() for ratio in ratios)))
    return table((f"to {reference}", *(name for _, name, *_ in COLUMNS)), rows)

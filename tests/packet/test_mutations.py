"""A hundred thousand altered tunnel packets on a host's port, and nothing comes of them that nobody can explain.

They are put there as fast as they can be, batch by batch, while good flows run from another host to a pod beside. What
the host's pods get, and all that it sends, is held against an independent reading of what was put there: `oracle`.

    SEED=7 PACKETS=1000000 pytest tests/packet/test_mutations.py

runs another set, or a larger one. Each run says its seed.
"""

import contextlib
import ipaddress
import json
import os
import re
import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest

from overlay.cluster import Lab
from overlay.cluster_hosts import Host, Pod, wait_until
from overlay.firewall import SETS
from overlay.tap import Tap
from overlay.topology import network_config
from tests.conftest import MakeLab
from tests.netns.traffic import Meter, Stream
from tests.packet import forge
from tests.packet.mutations import Mutants
from tests.packet.oracle import Oracle, Truth
from tests.packet.receiver import Ends, all_ends, packed, packed_mac, tunnel
from tests.packet.wire import Wire, mac_of, new_mark

PACKETS = int(os.environ.get("PACKETS", "100000"))
SEED = int(os.environ.get("SEED", "20140801"))

BATCH = 200
"""Frames between two fences: well under what a processor's queue holds (net.core.netdev_max_backlog, 1000)."""

LEAK_BYTES = 32
"""Less than what anything takes that is kept for a packet."""

HEALTH = 10256
SECONDS = 10.0
_SHOWN = 5
_QUOTED = 200

_ALARMS = re.compile(r"BUG|WARNING|Oops|Call Trace|refcount|use-after-free|soft lockup|hung")
"""Linux says these of itself, whatever namespace it was at work for."""


@pytest.fixture(scope="module")
def lab(make_module_lab: MakeLab) -> Lab:
    """Three hosts with IPv4 and IPv6 everywhere; on all of them /healthz is served."""
    config = {**network_config("46"), "SubnetMax": "10.244.199.0"}
    made = make_module_lab(pods=3, config=config, underlay="46", agent_options=("--healthz-port", str(HEALTH)))
    made.up()
    failed = [each for each in made.ping_all() if not each.ok]
    assert not failed
    return made


@pytest.fixture(scope="module")
def ends(lab: Lab) -> dict[str, Ends]:
    return all_ends(lab)


def truth(ends: Mapping[str, Ends], name: str) -> Truth:
    """What the oracle is told of a host."""
    own, families = ends[name], (4, 6)
    host = own.host
    blocks = network_config("46")["Network"], network_config("46")["IPv6Network"]
    digits = host.underlay_ips[6].rpartition(":")[2]
    ports = ((host, "cni0"), *((host, f"p{pod.number}") for pod in host.pods), *((pod, "eth0") for pod in host.pods))
    return Truth(
        mac=own.mac,
        devices=dict(own.device_macs),
        local=frozenset(
            [own.underlay[f] for f in families]
            + [own.gateways[f] for f in families]
            + [own.base(f) for f in families]
            + [packed(f"fe80::{digits}")]
        ),
        subnets=tuple(own.subnets.values()),
        blocks=tuple(map(ipaddress.ip_network, blocks)),
        pods={packed(address): pod.name for pod in host.pods for address in pod.addresses.values()},
        bridge=frozenset(packed_mac(mac_of(place, device)) for place, device in ports),
        peers=frozenset(each.underlay[f] for each in ends.values() if each is not own for f in families),
    )


class Storm:
    """Frames on the port of the host `dst`, as if from `src`, and everything that comes of them, explained or not."""

    def __init__(self, ends: Mapping[str, Ends], oracle: Oracle, dst: str, src: str) -> None:
        self._oracle = oracle
        self._dst, self._src = ends[dst], ends[src]
        host = self._dst.host
        self._stack = contextlib.ExitStack()
        # It has no links: it keeps this thread on one processor, so that fences are worth something.
        self._stack.enter_context(Wire())
        self._outlet = self._stack.enter_context(host.lab.hub.packet_socket(host.name, hears=False))
        self._port = self._stack.enter_context(host.lab.hub.made(lambda: Tap(host.name)))
        self._pods: dict[Pod, Tap] = {
            pod: self._stack.enter_context(pod.made(lambda: Tap("eth0", incoming=True))) for pod in host.pods
        }
        self.put = self.reached = self.sent = 0
        """Frames put on the port, that pods got, and that the host sent."""
        self.unexplained: list[str] = []

    def __enter__(self) -> "Storm":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def blow(self, frames: Iterator[bytes]) -> None:
        """Put all of them, batch by batch; each has been dealt with before the next one comes."""
        while batch := list(islice(frames, BATCH)):
            for frame in batch:
                self._outlet.send(frame)
            self.put += len(batch)
            mark = new_mark()
            fence = forge.ping(self._src.pod(1, 4), self._dst.pod(1, 4), mark)
            last = tunnel(self._src, self._dst, 4).packet(fence)
            self._outlet.send(last)
            self._judge(self._read_until(mark), {*batch, last})

    def check(self) -> None:
        """Nothing has come of the frames that nothing explains, and nothing was lost to the capture."""
        assert not [tap.device for tap in (self._port, *self._pods.values()) if tap.lost]
        assert not self.unexplained, "\n".join(self.unexplained[:_SHOWN])

    def _read_until(self, mark: bytes) -> list[tuple[Pod, bytes]]:
        """What the pods got, until the first has got the fence."""
        first, found = next(iter(self._pods)), []
        deadline, seen = time.monotonic() + SECONDS, False
        while not seen:
            left = deadline - time.monotonic()
            assert left > 0, "a good tunnel packet has not come through"
            select.select([self._pods[first]], [], [], left)
            for pod, tap in self._pods.items():
                frames = [frame.data for frame in tap.read()]
                found += [(pod, frame) for frame in frames]
                seen = seen or (pod is first and any(mark in frame for frame in frames))
        return found

    def _judge(self, reached: list[tuple[Pod, bytes]], batch: set[bytes]) -> None:
        # What pods have got had gone to the host by then, so the port is read after them.
        sent = []
        for frame in self._port.read():
            if frame.outgoing:
                self._oracle.take(frame.data, finished=frame.data in batch)
            else:
                sent.append(frame.data)
        self.reached += len(reached)
        self.sent += len(sent)
        for pod, data in reached:
            if not self._oracle.explains_at_pod(pod.name, data):
                self.unexplained.append(f"{pod.name} got {data[:_QUOTED].hex()}")
        for data in sent:
            if not self._oracle.explains_on_underlay(data):
                self.unexplained.append(f"sent: {data[:_QUOTED].hex()}")


def held(host: Host) -> dict[str, object]:
    """What the host holds that the agent put there."""
    kinds = {
        "routes": ("ip", "-4", "route"),
        "routes6": ("ip", "-6", "route", "show", "proto", "111"),
        "nexthops": ("ip", "nexthop"),
        "neighbours": ("ip", "neigh", "show", "nud", "permanent"),
        "fdb": ("bridge", "fdb"),
        "devices": ("ip", "-d", "link", "show", "type", "vxlan"),
        "addresses": ("ip", "addr", "show", "scope", "global", "type", "vxlan"),
    }
    found = {name: sorted(map(json.dumps, host.json(*argv))) for name, argv in kinds.items()}
    # Bridges keep groups and MACs as they come; those with a remote are the tunnels'.
    found["fdb"] = [entry for entry in found["fdb"] if '"dst"' in entry]
    # Counters change, and samples of what they counted; rules do not, and who is let in.
    table = host.run("nft", "-s", "-t", "list", "table", "inet", "overlay_agent").stdout
    sets = [host.run("nft", "list", "set", "inet", "overlay_agent", name).stdout for name in SETS.values()]
    return {**found, "firewall": table, "peers": sets}


def page(host: Host, path: str) -> int:
    """The status that the agent's health endpoint answers with."""
    with host.made(lambda: socket.create_connection(("127.0.0.1", HEALTH), SECONDS)) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        return int(client.recv(64).split()[1])


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def kernel_log() -> Iterator[Callable[[], list[str]]]:
    """Calls of what it yields give the kernel's alarms since the block began; none where its log cannot be read."""
    try:
        handle = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        yield list
        return
    os.lseek(handle, 0, os.SEEK_END)

    def news() -> list[str]:
        lines = []
        while True:
            try:
                lines.append(os.read(handle, 8192).decode(errors="replace").partition(";")[2].strip())
            except BlockingIOError:
                return [line for line in lines if _ALARMS.search(line)]
            except BrokenPipeError:
                continue  # Overwritten before it was read; the next read goes on after that.

    try:
        yield news
    finally:
        os.close(handle)


class Agent(NamedTuple):
    """What must be the same of an agent before and after, but for what it has `told` of packets that it dropped."""

    pid: int | None
    healthy: tuple[int, int]
    complaints: tuple[str, ...]
    told: tuple[str, ...]
    held: dict[str, object]

    @classmethod
    def of(cls, host: Host) -> "Agent":
        log = [json.loads(line) for line in host.log().splitlines() if line.startswith("{")]
        odd = [line for line in log if line["level"] != "info" or "drift" in line]
        complaints = tuple(line["event"] for line in odd if line["event"] != "packets_dropped")
        told = tuple(line["reason"] for line in odd if line["event"] == "packets_dropped")
        return cls(host.agent_pid, (page(host, "/healthz"), page(host, "/readyz")), complaints, told, held(host))


def test_whatever_is_put_on_the_underlay_nothing_comes_of_it_that_must_not(lab: Lab, ends: dict[str, Ends]) -> None:
    h1, h2, _ = lab.hosts
    print(f"SEED={SEED} PACKETS={PACKETS}")
    mutants = Mutants(SEED, ends["h1"], ends["h2"], ends["h3"])
    before = {host.name: Agent.of(host) for host in lab.hosts}
    pid = before["h1"].pid
    assert pid is not None and before["h1"].healthy == (200, 200)
    # Nothing else is ever sent to these.
    good, taker = h2.pods[2], h1.pods[2]
    stream_ends = packed(good.addresses[4]), packed(taker.addresses[4])
    with contextlib.ExitStack() as stack:
        news = stack.enter_context(kernel_log())
        meters = [stack.enter_context(Meter(good, taker, family=family)) for family in (4, 6)]
        stream = Stream(good, taker)
        oracle = Oracle(truth(ends, "h1"), [stream_ends])
        storm = stack.enter_context(Storm(ends, oracle, "h1", "h2"))
        stack.enter_context(stream)
        storm.blow(mutants.frames(PACKETS // 2))
        halfway = resident_bytes(pid)
        started, counted = time.monotonic(), stream.received
        storm.blow(mutants.frames(PACKETS - PACKETS // 2))
        seconds = time.monotonic() - started
        rate = (stream.received - counted) / seconds
        grown = resident_bytes(pid) - halfway
        storm.check()
        alarms = news()
    print(
        f"{storm.put} put, {PACKETS / 2 / seconds:.0f} a second; pods got {storm.reached}, the host sent {storm.sent}"
    )
    print(f"the good stream carried {rate:.0f} bytes a second, silent for {stream.longest_silence_ms:.0f} ms at most")
    # Most are refused; had all been, nothing would have been shown.
    assert storm.reached > PACKETS / 20
    assert [gap for meter in meters for gap in meter.gaps()] == []
    assert stream.troubles == []
    for host in lab.hosts:
        after = Agent.of(host)
        assert after._replace(told=(), held={}) == before[host.name]._replace(told=(), held={})
        # Of a flood there is one line for each reason.
        assert len(set(after.told)) == len(after.told) and (after.told or host is not h1)
        for kind, entries in after.held.items():
            assert entries == before[host.name].held[kind], f"{kind} of {host.name}"
    assert grown < LEAK_BYTES * (PACKETS // 2)
    assert alarms == []


# --- the checks themselves -----------------------------------------------------------------------------------------

FEW = 2000


@pytest.mark.parametrize(
    "wrong",
    [
        lambda right, others: {"subnets": others.subnets, "pods": others.pods},
        lambda right, others: {"pods": dict(zip(right.pods, reversed(right.pods.values()), strict=True))},
        lambda right, others: {"peers": frozenset()},
        lambda right, others: {"vni": 2},
        lambda right, others: {"port": 4789},
        lambda right, others: {"mac": others.mac},
        lambda right, others: {"local": others.local},
    ],
    ids=["subnets", "pods", "peers", "VNI", "port", "MAC", "addresses"],
)
def test_oracle_that_is_told_wrongly_finds_offenders(
    lab: Lab, ends: dict[str, Ends], wrong: Callable[[Truth, Truth], dict[str, object]]
) -> None:
    right, others = truth(ends, "h1"), truth(ends, "h3")
    with Storm(ends, Oracle(right._replace(**wrong(right, others))), "h1", "h2") as storm:
        storm.blow(Mutants(SEED, ends["h1"], ends["h2"], ends["h3"]).frames(FEW))
        with pytest.raises(AssertionError, match=r"got|sent"):
            storm.check()


@pytest.mark.parametrize("target", ["the pod beside", "a third host's pod", "the world"])
def test_host_with_a_wrong_rule_is_found_out(lab: Lab, ends: dict[str, Ends], target: str) -> None:
    """A rule of somebody else's sends on what the tunnel brings to a pod: to another, to another host, or out."""
    h1, _, h3 = lab.hosts
    address = {
        "the pod beside": h1.pods[1].address,
        "a third host's pod": h3.pods[0].address,
        "the world": "198.51.100.9",
    }
    where = f'iifname "flannel.1" ip daddr {h1.pods[0].addresses[4]} ip protocol tcp ip daddr set {address[target]}'
    rule = f"table ip wrong {{ chain c {{ type filter hook prerouting priority mangle; {where}; }}; }}"
    done = h1.run("nft", rule)
    assert done.returncode == 0, done.stderr
    try:
        with Storm(ends, Oracle(truth(ends, "h1")), "h1", "h2") as storm:
            storm.blow(Mutants(SEED, ends["h1"], ends["h2"], ends["h3"]).frames(FEW))
            with pytest.raises(AssertionError, match="h1p2 got" if target == "the pod beside" else "sent"):
                storm.check()
    finally:
        h1.run("nft", "delete table ip wrong")


def test_agent_whose_entries_were_touched_is_not_as_before(lab: Lab) -> None:
    h1, _, h3 = lab.hosts
    before = Agent.of(h1)
    h1.ip(f"neigh del {ipaddress.ip_network(h3.subnets[4])[0]} dev flannel.1")
    wait_until(lambda: Agent.of(h1).complaints != before.complaints, SECONDS, "the drift in the log")
    wait_until(lambda: held(h1) == before.held, SECONDS, "the entries as they were")

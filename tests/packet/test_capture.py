"""`overlay-agent capture` on the hosts of a lab, and `lab replay`: what people see of real and of crafted packets."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import ICMPv6ND_NS, IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw
from scapy.utils import PcapNgReader

from overlay.cluster import Lab
from overlay.cluster_hosts import Host, wait_until
from overlay.packets import REMARKS
from overlay.pcap import Writer
from overlay.topology import Topology, network_config
from subnet_lease import cache
from tests.conftest import MakeLab
from tests.frames import tunnel
from tests.netns.traffic import all_to_all, exchange
from tests.packet.wire import Link, Wire, carrying, mac_of, new_mark

ROOT = Path(__file__).parents[2]
AGENT = (sys.executable, "-P", "-m", "agent")
SECONDS = 60.0
"""How long, on a machine that is busy, the command may take to start and to show a packet."""

_ports = itertools.count(20_000)


class Running:
    """A capture on a host: `lines` is what it has printed so far. It is listening once this is made."""

    def __init__(self, host: Host, *options: str, etcd: str | None = None, state_dir: str = os.devnull) -> None:
        self.options = options
        endpoint = host.lab.etcd_endpoint(4) if etcd is None else etcd
        argv = [*AGENT, "capture", "--config", os.devnull, "--etcd-endpoints", endpoint, "--state-dir", state_dir]
        self.process = subprocess.Popen(
            host.inside(*argv, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        self.lines: list[str] = []
        self.notes: list[str] = []
        self._threads = [
            threading.Thread(target=self._read, args=(stream, lines))
            for stream, lines in ((self.process.stdout, self.lines), (self.process.stderr, self.notes))
        ]
        for thread in self._threads:
            thread.start()
        try:
            wait_until(lambda: self.process.poll() is not None or self.notes, SECONDS, "the capture's first line")
        except BaseException:
            self.__exit__()
            raise

    def _read(self, stream: Any, lines: list[str]) -> None:
        for line in stream:
            lines.append(line.rstrip("\n"))

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.end()

    def end(self, number: signal.Signals | None = None) -> int:
        """Send the signal, if any, and wait; the exit code."""
        if number is not None:
            self.process.send_signal(number)
        code = self.process.wait(SECONDS)
        for thread in self._threads:
            thread.join()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return code

    def objects(self, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Of `--json`, those that are wanted."""
        return [each for each in map(json.loads, list(self.lines)) if wanted(each)]

    def expect(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first such, waited for."""
        wait_until(lambda: self.objects(wanted) or self.process.poll() is not None, SECONDS, f"in {self.lines[-5:]}")
        assert self.objects(wanted), self.notes
        return self.objects(wanted)[0]


@pytest.fixture(scope="module")
def lab(make_module_lab: MakeLab) -> Lab:
    """Two hosts, either family above and below; their agents tell what they import."""
    lab = make_module_lab(
        hosts=2,
        pods=1,
        topology=Topology("46"),
        config=network_config("46"),
        agent_command=(sys.executable, "-X", "importtime", "-P", "-m", "agent", "run"),
    )
    lab.up()
    return lab


@pytest.fixture(scope="module")
def running(lab: Lab) -> Iterator[Running]:
    """A capture on h1 that prints objects, for all tests."""
    with Running(lab.hosts[0], "--json") as running:
        yield running


class Crafted:
    """Frames from h2 to h1 by which nothing happens: their outer MAC is nobody's. Each is known by its source port."""

    def __init__(self, lab: Lab) -> None:
        self.h1, self.h2 = lab.hosts
        self._macs = {host: {4: mac_of(host, "flannel.1"), 6: mac_of(host, "flannel-v6.1")} for host in lab.hosts}

    def inner(self, **fields: object) -> Packet:
        return IP(**{"src": self.h2.pods[0].addresses[4], "dst": self.h1.pods[0].addresses[4], **fields})

    def inner6(self, **fields: object) -> Packet:
        return IPv6(**{"src": self.h2.pods[0].addresses[6], "dst": self.h1.pods[0].addresses[6], **fields})

    def outer(self, **fields: object) -> Packet:
        return IP(**{"src": self.h2.underlay_ips[4], "dst": self.h1.underlay_ips[4], **fields})

    def outer6(self) -> Packet:
        return IPv6(src=self.h2.underlay_ips[6], dst=self.h1.underlay_ips[6])

    def __call__(self, inner: Packet | bytes, *, header: str = "08 00 00 00 00 00 01 00", **options: Any) -> Packet:
        outer = options.pop("outer", None) or self.outer()
        family = 4 if isinstance(outer, IP) else 6
        macs = {"src": self._macs[self.h2][family], "dst": self._macs[self.h1][family], **options}
        return tunnel(inner, header=header, outer=outer, sport=next(_ports), **macs)

    def ether(self, **fields: object) -> Packet:
        return Ether(**{"src": self._macs[self.h2][4], "dst": self._macs[self.h1][4], **fields})


@pytest.fixture(scope="module")
def crafted(lab: Lab) -> Crafted:
    return Crafted(lab)


def remarks(seen: dict[str, Any]) -> list[str]:
    return [remark["kind"] for remark in seen["remarks"]]


# --- what is right -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [4, 6])
def test_ping_is_seen_both_ways_with_names_and_leases(lab: Lab, running: Running, family: int) -> None:
    h1, h2 = lab.hosts
    src, dst = h1.pods[0].addresses[family], h2.pods[0].addresses[family]
    assert h1.pods[0].run("ping", "-n", "-c", "1", "-W", "5", "-s", "99", dst).returncode == 0
    request = running.expect(lambda seen: seen["inner"]["dst"] == dst and seen["inner"]["length"] in (127, 147))
    answer = running.expect(lambda seen: seen["inner"]["src"] == dst and seen["inner"]["length"] in (127, 147))
    for seen, way, here, there in ((request, "out", h1, h2), (answer, "in", h2, h1)):
        assert (seen["direction"], seen["interface"], seen["vni"], seen["protocol"]) == (way, "eth0", 1, "icmp")
        assert (seen["outer"]["src"], seen["outer"]["dst"]) == (here.underlay_ips[family], there.underlay_ips[family])
        assert (seen["from"]["node_name"], seen["to"]["node_name"]) == (here.name, there.name)
        assert seen["from"]["subnets"] == list(here.subnets.values())
        assert seen["inner"]["ttl"] == 63
        assert seen["remarks"] == []
    assert "echo request" in request["what"] and "echo reply" in answer["what"]
    assert request["inner"]["src"] == src and request["time_ns"] <= answer["time_ns"]


def test_traffic_that_is_right_is_never_remarked_on(lab: Lab, running: Running) -> None:
    """Large segments, checksums left to hardware and all: only what is larger than the MTU comes in fragments."""
    before = len(running.lines)
    assert exchange(all_to_all(lab.pods)) == []
    # By the last packet all have been seen.
    assert lab.pods[0].run("ping", "-n", "-c", "1", "-W", "5", "-s", "77", lab.pods[1].address).returncode == 0
    running.expect(lambda seen: seen["inner"]["length"] == 105 and seen["direction"] == "in")
    seen = [json.loads(line) for line in list(running.lines)[before:]]
    assert {each["protocol"] for each in seen} == {"tcp", "udp", "icmp"}
    assert {len(each["inner"]["src"].split(":")) > 1 for each in seen} == {True, False}
    assert {kind for each in seen for kind in remarks(each)} == {"fragment"}
    assert any(each["length"] > 10_000 for each in seen), "a segment that is yet to be cut"


# --- what is not -------------------------------------------------------------------------------------------------

Make = Callable[[Crafted], Packet]
_FF = "ff:ff:ff:ff:ff:ff"
OFF: dict[str, tuple[Make, set[str]]] = {
    "stranger": (lambda c: c(c.inner() / UDP(), outer=c.outer(src="172.30.9.9")), {"unknown-vtep"}),
    "vni": (lambda c: c(c.inner() / UDP(), header="08 00 00 00 00 00 02 00"), {"wrong-vni"}),
    "no flag": (lambda c: c(c.inner() / UDP(), header="00 00 00 00 00 00 01 00"), {"no-vni-flag"}),
    "reserved": (lambda c: c(c.inner() / UDP(), header="08 00 00 01 00 00 01 00"), {"reserved-bits"}),
    "source mac": (lambda c: c(c.inner() / UDP(), src="02:00:00:00:00:99"), {"wrong-mac"}),
    "destination mac": (lambda c: c(c.inner() / UDP(), dst="02:00:00:00:00:99"), {"wrong-mac"}),
    "mac over IPv6": (lambda c: c(c.inner6() / UDP(), outer=c.outer6(), dst="02:00:00:00:00:99"), {"wrong-mac"}),
    "spoofed source": (lambda c: c(c.inner(src="10.244.250.1") / UDP()), {"foreign-source"}),
    "misrouted": (lambda c: c(c.inner(dst="10.244.250.1") / UDP()), {"foreign-destination"}),
    "inner fragment": (lambda c: c(c.inner(frag=100, id=7) / Raw(bytes(40))), {"fragment"}),
    "inner TCP": (lambda c: c(c.inner() / TCP(chksum=0x1234)), {"checksum"}),
    "inner IP": (lambda c: c(c.inner(chksum=0x1234) / UDP()), {"checksum"}),
    "inner ICMP": (lambda c: c(c.inner() / ICMP(chksum=0x1234)), {"checksum"}),
    "cut off": (lambda c: c(c.inner(len=500) / UDP(chksum=0)), {"truncated"}),
    "no frame inside": (lambda c: c(b"abc"), {"truncated"}),
    "nested": (lambda c: c(c.inner() / UDP(dport=8472)), {"nested"}),
    "VLAN": (lambda c: c(c.ether() / Dot1Q(vlan=5) / c.inner() / UDP()), {"vlan"}),
    "ARP": (lambda c: c(c.ether(dst=_FF) / ARP(pdst="10.244.1.1")), {"arp", "broadcast"}),
    "ND": (lambda c: c(c.inner6() / ICMPv6ND_NS(tgt="fd00:244::1"), outer=c.outer6()), {"nd"}),
    "multicast": (lambda c: c(c.inner(dst="224.0.0.5") / UDP(), dst="01:00:5e:00:00:05"), {"multicast"}),
    "broadcast": (lambda c: c(c.inner() / UDP(), dst=_FF), {"broadcast"}),
}  # fmt: skip


@pytest.mark.parametrize("name", OFF)
def test_what_is_off_is_remarked_on(lab: Lab, running: Running, crafted: Crafted, wire: Wire, name: str) -> None:
    make, kinds = OFF[name]
    frame = make(crafted)
    wire.underlay(lab.hosts[0]).put(frame)
    seen = running.expect(lambda seen: seen["outer"] is not None and seen["outer"]["src_port"] == frame[UDP].sport)
    assert set(remarks(seen)) == kinds
    assert seen["direction"] == "in"


def test_wrong_outer_checksum_and_outer_fragments_are_remarked_on(
    lab: Lab, running: Running, crafted: Crafted, wire: Wire
) -> None:
    link = wire.underlay(lab.hosts[0])
    bad = crafted(crafted.inner() / UDP())
    bad[UDP].chksum = 0x1234
    link.put(bad)
    seen = running.expect(lambda seen: seen["outer"] is not None and seen["outer"]["src_port"] == bad[UDP].sport)
    assert [remark["text"].partition(",")[0] for remark in seen["remarks"]] == ["outer UDP checksum is 0x1234"]
    whole = crafted(crafted.inner() / UDP() / Raw(bytes(1400)), outer=crafted.outer(id=4711))
    for part in fragment(whole[IP], fragsize=800):
        link.put(Ether(src=whole.src, dst=whole.dst) / part)
    first = running.expect(lambda seen: seen["outer"] is not None and seen["outer"]["src_port"] == whole[UDP].sport)
    later = running.expect(
        lambda seen: (seen["inner"] or {}).get("fragment") == {"ident": 4711, "offset": 800, "more": False}
    )
    assert remarks(first) == remarks(later) == ["fragment"]
    assert later["from"]["node_name"] == "h2" and later["outer"] is None


def test_packet_between_pods_that_is_in_no_tunnel_is_remarked_on(
    lab: Lab, running: Running, crafted: Crafted, wire: Wire
) -> None:
    port = next(_ports)
    wire.underlay(lab.hosts[0]).put(Ether(dst="02:00:00:00:0e:02") / crafted.inner() / UDP(sport=port))
    seen = running.expect(lambda seen: seen["inner"] is not None and seen["inner"]["src_port"] == port)
    assert (remarks(seen), seen["vni"]) == (["untunnelled"], None)


def test_all_kinds_of_remarks_are_provoked_here() -> None:
    assert {kind for _, kinds in OFF.values() for kind in kinds} | {"untunnelled"} == REMARKS.keys()


# --- choosing, ending, writing -----------------------------------------------------------------------------------


def test_count_ends_it_and_only_the_chosen_are_shown(lab: Lab, crafted: Crafted, wire: Wire) -> None:
    link, pod = wire.underlay(lab.hosts[0]), lab.hosts[0].pods[0].addresses[4]
    with Running(lab.hosts[0], "-v", "-c", "2", pod, "--filter", "udp port 4242") as running:
        for dport in (1, 4242, 2, 4242, 4242):
            link.put(crafted(crafted.inner() / UDP(sport=9, dport=dport)))
        assert running.end() == 0
    head, first, headers, *rest = running.lines
    assert head.split() == ["TIME", "WAY", "FROM", ">", "TO", "VNI", "PACKET"]
    outer = f"h2 {lab.hosts[1].underlay_ips[4]} > h1 {lab.hosts[0].underlay_ips[4]}"
    assert f"  in   {outer}  1    " in first and first.endswith(f"> {pod}  UDP 9 > 4242, 0 bytes")
    assert "; h2 has " + " and ".join(lab.hosts[1].subnets.values()) in headers
    assert len(rest) == 2
    assert "2 hosts known by the leases in etcd" in running.notes[0]
    assert "2 shown, 0 with remarks, 0 lost by the kernel" in running.notes[-1]


def test_written_file_has_remarks_ways_and_times_and_ctrl_c_ends_it_well(
    lab: Lab, crafted: Crafted, wire: Wire, tmp_path: Path
) -> None:
    path = tmp_path / "a.pcapng"
    link = wire.underlay(lab.hosts[0])
    right, odd = crafted(crafted.inner() / UDP()), crafted(crafted.inner() / UDP(), header="08 00 00 00 00 00 63 00")
    with Running(lab.hosts[0], "h2", "--write", str(path)) as running:
        link.put(right)
        link.put(odd)
        wait_until(lambda: any("! VNI 99" in line for line in list(running.lines)), SECONDS)
        assert running.end(signal.SIGINT) == 0
    assert "2 packets of the overlay, 2 shown, 1 with remarks, 0 lost by the kernel" in running.notes[-1]
    with PcapNgReader(str(path)) as reader:
        first, second = reader.read_all()
    assert (bytes(first), bytes(second)) == (bytes(right), bytes(odd))
    assert (first.comments, second.comments) == (None, [b"VNI 99, the network's is 1"])
    for packet in (first, second):
        assert (packet.sniffed_on, packet.direction) == ("eth0", 1)
        assert abs(float(packet.time) - path.stat().st_mtime) < 60
    again = subprocess.run([*AGENT, "capture", "--config", os.devnull, "--etcd-endpoints", "http://127.0.0.1:1",
                            "--state-dir", os.devnull, "--json", "--read", str(path)],
                           cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert again.returncode == 0 and [json.loads(line)["vni"] for line in again.stdout.splitlines()] == [1, 99]


def test_quiet_capture_writes_all_without_decoding(lab: Lab, crafted: Crafted, wire: Wire, tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    with Running(lab.hosts[0], "-q", "-c", "3", "--write", str(path)) as running:
        for _ in range(3):
            wire.underlay(lab.hosts[0]).put(crafted(b"nothing"))
        assert running.end() == 0
    assert running.lines == []
    assert "3 packets of the overlay, 3 written, not decoded, 0 lost" in running.notes[-1]
    with PcapNgReader(str(path)) as reader:
        assert len(reader.read_all()) == 3


# --- hosts that are not known, or not yet ------------------------------------------------------------------------


def test_without_etcd_the_last_table_names_the_hosts(lab: Lab, crafted: Crafted, wire: Wire) -> None:
    h1 = lab.hosts[0]
    wait_until(lambda: (h1.state_dir / cache.FILE).exists(), 30, "the last table on disk")
    with Running(h1, "-c", "1", "--json", etcd="http://127.0.0.1:1", state_dir=str(h1.state_dir)) as running:
        wire.underlay(h1).put(crafted(crafted.inner() / UDP()))
        assert running.end() == 0
    assert "2 hosts known by the last table on disk, " in running.notes[0] and "for want of etcd: " in running.notes[0]
    (seen,) = running.objects(lambda seen: True)
    assert seen["from"]["underlay_ips"] == list(lab.hosts[1].underlay_ips.values())
    assert seen["remarks"] == []


def test_without_any_table_packets_are_decoded_without_names(lab: Lab, crafted: Crafted, wire: Wire) -> None:
    with Running(lab.hosts[0], "-c", "1", "--json", etcd="http://127.0.0.1:1") as running:
        wire.underlay(lab.hosts[0]).put(crafted(crafted.inner() / UDP(sport=5, dport=6)))
        assert running.end() == 0
    assert "VNI 1; hosts are not known: " in running.notes[0], "the device tells port and VNI"
    (seen,) = running.objects(lambda seen: True)
    assert (seen["from"], seen["to"], seen["remarks"], seen["inner"]["dst_port"]) == (None, None, [], 6)


def test_routes_without_a_tunnel_are_seen_too(make_lab: MakeLab) -> None:
    with make_lab(hosts=2, pods=1, config=network_config("4", "host-gw")) as lab:
        source, target = lab.pods
        with Running(lab.hosts[0], "-c", "2", "--json") as running:
            assert source.run("ping", "-n", "-c", "1", "-W", "5", target.address).returncode == 0
            assert running.end() == 0
        request, answer = running.objects(lambda seen: True)
        assert (request["vni"], request["outer"], request["inner"]["dst"]) == (None, None, target.address)
        assert [each["from"]["node_name"] for each in (request, answer)] == ["h1", "h2"]
        assert request["remarks"] == answer["remarks"] == []


# --- what cannot be ----------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused(lab: Lab) -> None:
    refused = {
        ("h9",): "there is no host 'h9'; there is h",
        ("10.244.250.1",): "10.244.250.1 is no host's address, and in no host's subnet; there is h",
        ("--iface", "eth7"): "no interface with an address fits --iface eth7; there is eth0",
        ("--write", "/none/a"): "--write: /none/a: no such file or directory",
    }
    with ThreadPoolExecutor() as threads, contextlib.ExitStack() as stack:
        for running in threads.map(lambda options: Running(lab.hosts[0], *options), refused):
            stack.enter_context(running)
            says = refused[running.options]
            assert running.end() == (2 if "--write" in running.options else 1)
            assert says in "\n".join(running.notes) and running.lines == []
            assert len(running.notes) <= 2


def test_capturing_takes_its_capability(lab: Lab) -> None:
    h1 = lab.hosts[0]
    argv = [
        *AGENT,
        "capture",
        "--config",
        os.devnull,
        "--etcd-endpoints",
        lab.etcd_endpoint(4),
        "--state-dir",
        os.devnull,
    ]
    done = subprocess.run(
        h1.inside("setpriv", "--bounding-set", "-net_raw", *argv), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "overlay-agent: to capture takes CAP_NET_RAW, which this process lacks; run it with sudo\n"


def test_agents_never_import_scapy(lab: Lab) -> None:
    for host in lab.hosts:
        imported = {line.rpartition("|")[2].strip() for line in host.log().splitlines() if "import time:" in line}
        assert {"grpc", "overlay.reconciler"} <= imported
        assert not [name for name in imported if name.startswith("scapy")]


# --- replay ------------------------------------------------------------------------------------------------------


def lab_command(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*AGENT, "lab", *argv], cwd=ROOT, capture_output=True, text=True)


def recorded(path: Path, *frames: Packet, apart_s: float = 0.1) -> str:
    with Writer(path) as writer:
        for number, frame in enumerate(frames):
            writer.write(10**18 + int(number * apart_s * 1e9), "eth0", True, bytes(frame))
    return str(path)


def arrived(link: Link, mark: bytes) -> list[Packet]:
    """The frames with the mark so far, but for the pod's answer that nobody listens, which quotes it."""
    return link.all(lambda frame: carrying(mark)(frame) and ICMP not in frame)


def test_what_a_pod_sent_is_replayed_in_its_own_time(lab: Lab, wire: Wire, tmp_path: Path) -> None:
    source, target = lab.pods
    mark, link = new_mark(), wire.at(target)
    frame = Ether(src=mac_of(source, "eth0"), dst=mac_of(source.host, "cni0"))
    frame /= IP(src=source.addresses[4], dst=target.addresses[4]) / UDP(dport=9) / Raw(mark)
    path = recorded(tmp_path / "a.pcapng", frame, frame, frame, frame / Raw(bytes(2000)))
    done = lab_command("replay", "--name", lab.name, path, "--from", "h1p1", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["place"], told["device"], told["sent"], told["too_long"]) == ("h1p1", "eth0", 3, 1)
    assert 0.3 <= told["seconds"] < SECONDS
    wait_until(lambda: len(arrived(link, mark)) == 3)


def test_what_a_host_received_is_replayed_at_a_rate(lab: Lab, crafted: Crafted, wire: Wire, tmp_path: Path) -> None:
    h1 = lab.hosts[0]
    mark, link = new_mark(), wire.at(h1.pods[0])
    frame = crafted(crafted.inner() / UDP(dport=9) / Raw(mark))
    frame.dst = mac_of(h1, "eth0")
    path = recorded(tmp_path / "a.pcapng", *[frame] * 5, apart_s=3600)
    done = lab_command("replay", "--name", lab.name, path, "--into", "h1", "--rate", "50", "--count", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 frames sent on hub/h1 in 0.")
    wait_until(lambda: len(arrived(link, mark)) == 4)


def test_replay_of_what_is_not_there_is_refused(lab: Lab, tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.pcapng", Ether())
    refused = {
        ("none", path, "--from", "h1p1"): "there is no lab 'none'",
        (lab.name, path, "--from", "h9"): "has no 'h9'",
        (lab.name, path, "--from", "h1/eth9"): "h1 has no link 'eth9'; it has lo, ",
        (lab.name, path, "--into", "h1p1"): "has no host 'h1p1'; it has h1 to h2",
        (lab.name, "/none", "--from", "h1p1"): "/none: no such file or directory.",
        (lab.name, __file__, "--from", "h1p1"): "it is no pcap or pcapng file.",
        (lab.name, path): "one of the arguments --from --into is required",
    }
    with ThreadPoolExecutor() as threads:
        for done, says in zip(
            threads.map(lambda argv: lab_command("replay", "--name", *argv), refused), refused.values(), strict=True
        ):
            assert done.returncode in (1, 2) and says in done.stderr, done.stderr
            assert done.stdout == "" and len(done.stderr.splitlines()) <= 2


# --- at last, for it changes the lab -----------------------------------------------------------------------------


def test_host_that_joins_is_known_by_its_first_packet(lab: Lab, running: Running) -> None:
    before = len(running.lines)
    joined = lab.add_host()
    joined.start_agent()
    joined.wait_ready()
    joined.attach_pods()
    lab.wait_converged()
    assert joined.pods[0].run("ping", "-n", "-c", "1", "-W", "5", lab.hosts[0].pods[0].address).returncode == 0
    seen = running.expect(lambda seen: seen["inner"] is not None and seen["inner"]["src"] == joined.pods[0].address)
    assert seen["from"]["node_name"] == joined.name
    assert not any(remarks(json.loads(line)) for line in list(running.lines)[before:] if joined.name in line)


def test_capture_in_a_lab_needs_no_options(lab: Lab) -> None:
    argv = [*AGENT, "lab", "exec", "--name", lab.name, "h1", "--", *AGENT, "capture", "-c", "1"]
    capture = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with contextlib.ExitStack() as stack:
        stack.callback(capture.wait)
        stack.callback(capture.kill)
        assert capture.stderr is not None
        assert f"{len(lab.hosts)} hosts known by the leases in etcd" in capture.stderr.readline()
        lab.pods[0].run("ping", "-n", "-c", "1", "-W", "5", lab.hosts[1].pods[0].address)
        out, _ = capture.communicate(timeout=SECONDS)
    assert capture.returncode == 0 and "h1 " in out and "h2 " in out

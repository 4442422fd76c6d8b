"""Checksums that a NIC fails to finish inside of a tunnel: found by their loss, and cured on our device alone.

Two hosts with a VXLAN device each; between them, in a namespace of its own, the NICs and the wire as a program. It sees
what the kernel left unfinished (PACKET_VNET_HDR, packet(7)) and finishes it as hardware does, or fails as some does.
"""

import select
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from overlay import offload
from overlay.checksums import FEATURE, Verdict
from overlay.offload import OffloadRefused, examine, feature, set_feature
from subnet_lease.model import pack_address
from tests.netns.namespace import entered, new_namespace, sh
from tests.netns.two_hosts import MTU, two_hosts

SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23
NEEDS_CHECKSUM = 1
VIRTIO_NET_HEADER = struct.Struct("=BBHHHH")  # flags, GSO type, header length, GSO size, checksum start and offset

TCP_CHECKSUM, UDP_CHECKSUM = 16, 6
"""Where in its header a protocol keeps its checksum."""

OUTER_UDP_START = 14 + 20


@dataclass
class Wire:
    """The NICs of both hosts, and the wire between them, which forwards as long as the context lasts.

    `unable` names the checksums (by their offset) that the first host's NIC does not finish inside of a tunnel.
    """

    ends: tuple[socket.socket, socket.socket]
    unable: frozenset[int] = frozenset()
    cut: bool = False
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Wire":
        self._thread = threading.Thread(target=self._forward)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for end in self.ends:
            end.close()

    def _forward(self) -> None:
        while not self._stop.is_set():
            for end in select.select(self.ends, [], [], 0.1)[0]:
                frame = end.recv(1 << 17)
                unable, other = (self.unable, 1) if end is self.ends[0] else (frozenset[int](), 0)
                if not self.cut:
                    self.ends[other].send(bytes(VIRTIO_NET_HEADER.size) + self._finished(frame, unable))

    @staticmethod
    def _finished(frame: bytes, unable: frozenset[int]) -> bytes:
        flags, _, _, _, start, offset = VIRTIO_NET_HEADER.unpack_from(frame)
        packet = bytearray(frame[VIRTIO_NET_HEADER.size :])
        if flags & NEEDS_CHECKSUM and not (start > OUTER_UDP_START and offset in unable):
            covered = bytes(packet[start:]) + bytes((len(packet) - start) % 2)
            total = sum(struct.unpack(f"!{len(covered) // 2}H", covered))
            while total >> 16:
                total = (total & 0xFFFF) + (total >> 16)
            struct.pack_into("!H", packet, start + offset, ~total & 0xFFFF or 0xFFFF)
        return bytes(packet)


@dataclass
class Hosts:
    """Descriptors of two hosts' namespaces, and what is between them."""

    near: int
    far: int
    wire: Wire


def packet_end(name: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    end.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    end.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    end.bind((name, 0))
    return end


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    # What is lost here is waited for in vain, and the peers are near.
    monkeypatch.setattr(offload, "PATIENCE", 0.4)
    with new_namespace() as between, two_hosts(between, ends=("near", "far")) as (near, far):
        for namespace in (near, far):
            with entered(namespace):
                for work in ("tx-tcp-segmentation", "tx-udp_tnl-segmentation", "tx-udp_tnl-csum-segmentation"):
                    # The wire carries frames, not the large segments that a kernel hands to hardware.
                    set_feature("eth0", work, False)
        with Wire((packet_end("near"), packet_end("far"))) as wire:
            yield Hosts(near, far, wire)


FAMILIES = {"IPv4": ("10.9.1.0", "10.9.2.0"), "IPv6": ("fd09:0:0:1::", "fd09:0:0:2::")}


def examined(hosts: Hosts, family: str = "IPv4", *more: str) -> offload.Finding:
    source, peer = FAMILIES[family]
    with entered(hosts.near):
        return examine("flannel.1", pack_address(source), [pack_address(a) for a in (*more, peer)], MTU)


def offloaded(hosts: Hosts) -> bool:
    with entered(hosts.near):
        return feature("flannel.1", FEATURE)


def transferred(hosts: Hosts, size: int, seconds: float) -> int:
    """Bytes that arrive of `size` sent over TCP from host to host through the overlay; 0 if none do in `seconds`."""
    with entered(hosts.far), socket.create_server(("10.9.2.0", 4000)) as server:
        server.settimeout(seconds)
        with entered(hosts.near), socket.socket() as client:
            client.bind(("10.9.1.0", 0))
            client.settimeout(seconds)
            try:
                client.connect(("10.9.2.0", 4000))
            except TimeoutError:
                return 0
            connection, _ = server.accept()
            with connection:
                sender = threading.Thread(target=lambda: (client.sendall(bytes(size)), client.shutdown(socket.SHUT_WR)))
                sender.start()
                received = sum(len(part) for part in iter(lambda: connection.recv(65536), b""))
                sender.join()
            return received


@pytest.mark.parametrize(
    ("family", "unable", "lost"),
    [
        ("IPv4", {TCP_CHECKSUM, UDP_CHECKSUM}, {"TCP", "UDP"}),
        ("IPv6", {TCP_CHECKSUM, UDP_CHECKSUM}, {"TCP", "UDP"}),
        ("IPv4", {TCP_CHECKSUM}, {"TCP"}),
        ("IPv6", {UDP_CHECKSUM}, {"UDP"}),
    ],
    ids=["all over IPv4", "all over IPv6", "only TCP", "only UDP"],
)
def test_a_nic_that_spoils_checksums_inside_the_tunnel_is_found_and_cured(
    hosts: Hosts, family: str, unable: set[int], lost: set[str]
) -> None:
    hosts.wire.unable = frozenset(unable)
    finding = examined(hosts, family)
    assert (finding.verdict, finding.lost) == (Verdict.FAULTY, lost)
    assert finding.peer == pack_address(FAMILIES[family][1])
    assert not offloaded(hosts)
    assert transferred(hosts, 300_000, 10) == 300_000


def test_the_fault_is_what_pods_suffer_from(hosts: Hosts) -> None:
    hosts.wire.unable = frozenset({TCP_CHECKSUM})
    assert transferred(hosts, 1, 2) == 0
    with entered(hosts.near):
        set_feature("flannel.1", FEATURE, False)
    assert transferred(hosts, 1, 10) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_healthy_path_is_left_as_it_is(hosts: Hosts, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "set_feature", never)
    assert examined(hosts, family).verdict is Verdict.HEALTHY
    assert offloaded(hosts)


def never(*arguments: object) -> None:
    raise AssertionError(f"called with {arguments}")


def test_a_path_that_is_down_proves_nothing_and_changes_nothing(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "set_feature", never)
    hosts.wire.cut = True
    finding = examined(hosts)
    assert finding.verdict is Verdict.NO_PATH
    assert "unproven" in finding.why
    assert offloaded(hosts)


def test_a_path_too_narrow_for_the_mtu_is_not_taken_for_a_spoiled_checksum(hosts: Hosts) -> None:
    with entered(hosts.far):
        sh("nft", "add table netdev t; add chain netdev t c { type filter hook ingress device eth0 priority 0; }; "
                  "add rule netdev t c meta length > 1400 drop")  # fmt: skip
    assert examined(hosts).verdict is Verdict.NO_PATH
    assert offloaded(hosts)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_firewall_is_not_taken_for_a_spoiled_checksum(hosts: Hosts, protocol: str) -> None:
    drop_at(hosts.far, protocol)
    finding = examined(hosts)
    assert (finding.verdict, finding.lost) == (Verdict.ELSEWHERE, {protocol.upper()})
    assert offloaded(hosts)


def drop_at(namespace: int, protocol: str) -> None:
    with entered(namespace):
        sh("nft", "add table inet t; add chain inet t c { type filter hook input priority 0; }; "
                  f"add rule inet t c iifname flannel.1 meta l4proto {protocol} drop")  # fmt: skip


def test_a_fault_is_cured_behind_a_firewall_that_hides_half_of_it(hosts: Hosts) -> None:
    hosts.wire.unable = frozenset({TCP_CHECKSUM, UDP_CHECKSUM})
    drop_at(hosts.far, "udp")
    finding = examined(hosts)
    assert (finding.verdict, finding.lost) == (Verdict.FAULTY, {"TCP"})
    assert not offloaded(hosts)


def test_a_peer_that_is_down_is_passed_over_for_the_next(hosts: Hosts) -> None:
    hosts.wire.unable = frozenset({TCP_CHECKSUM, UDP_CHECKSUM})
    assert examined(hosts, "IPv4", "10.9.7.0").verdict is Verdict.FAULTY


def test_what_was_switched_off_stays_off_and_is_not_measured_again(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    with entered(hosts.near):
        set_feature("flannel.1", FEATURE, False)
    monkeypatch.setattr(offload, "probe", never)
    assert examined(hosts).verdict is Verdict.OFF


def test_an_interrupted_examination_leaves_the_offload_on(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts.wire.unable = frozenset({TCP_CHECKSUM})
    real = offload.probe

    def interrupted(*arguments: object) -> offload.Probe:
        if not feature("flannel.1", FEATURE):
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(offload, "probe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        examined(hosts)
    assert offloaded(hosts)


def test_an_offload_is_switched_both_ways_and_no_other_with_it(hosts: Hosts) -> None:
    with entered(hosts.near):
        before = sh("ethtool", "-k", "flannel.1")
        set_feature("flannel.1", FEATURE, False)
        assert "tx-checksum-ip-generic: off" in sh("ethtool", "-k", "flannel.1")
        set_feature("flannel.1", FEATURE, True)
        assert sh("ethtool", "-k", "flannel.1") == before


def test_what_the_kernel_does_not_have_or_let_go_of_is_told() -> None:
    with new_namespace():
        with pytest.raises(OffloadRefused, match="No such device"):
            feature("flannel.1", FEATURE)
        assert not feature("lo", "no-such-offload")
        with pytest.raises(OffloadRefused, match="no offload no-such"):
            set_feature("lo", "no-such-offload", True)
        with pytest.raises(OffloadRefused, match="lo keeps loopback on"):
            set_feature("lo", "loopback", False)

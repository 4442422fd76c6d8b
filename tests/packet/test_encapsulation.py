"""What the overlay puts on the underlay, packet by packet (RFC 7348 section 5): seen on the wire, decoded by scapy."""

import select
import struct
import time
from collections.abc import Callable

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet

from overlay.cluster import Host, Lab, Place

SOL_PACKET, PACKET_STATISTICS = 263, 6  # linux/if_packet.h: frames seen and frames dropped since last asked

MARK = bytes.fromhex("6f7665726c6179")  # "overlay", repeated by ping to fill its payload


class Capture:
    """Every frame on one device, from the moment it is made, with nothing lost unnoticed."""

    def __init__(self, place: Place, device: str) -> None:
        self._socket = place.packet_socket(device)
        self.frames: list[Packet] = []

    def __enter__(self) -> "Capture":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def until(self, wanted: Callable[[Packet], bool], seconds: float = 5) -> Packet:
        """The first frame that is wanted; AssertionError with all that was seen if none comes in time."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self._socket], [], [], left)[0]:
                frame = Ether(self._socket.recv(65536))
                self.frames.append(frame)
                if wanted(frame):
                    return frame
        raise AssertionError("not seen; what was: " + "; ".join(frame.summary() for frame in self.frames))

    def rest(self) -> list[Packet]:
        """All frames so far, once the socket is empty. Fails if the kernel had to drop any."""
        while select.select([self._socket], [], [], 0)[0]:
            self.frames.append(Ether(self._socket.recv(65536)))
        _, dropped = struct.unpack("=II", self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        assert dropped == 0, f"the capture lost {dropped} frames"
        return self.frames


def echo_request(frame: Packet) -> bool:
    return ICMP in frame and frame[ICMP].type == 8 and MARK in bytes(frame[ICMP].payload)


def carries(frame: Packet, inner: Callable[[Packet], bool]) -> bool:
    return VXLAN in frame and inner(frame[VXLAN].payload)


def device_mac(host: Host, device: str) -> str:
    return str(host.json("ip", "link", "show", device)[0]["address"])


@pytest.fixture(scope="module")
def ping(shared_lab: Lab) -> dict[str, Packet]:
    """One echo request from h1p1 to h2p1, as seen leaving the pod, on the underlay, and reaching the other pod."""
    h1, h2, _ = shared_lab.hosts
    src, dst = h1.pods[0], h2.pods[0]
    with Capture(src, "eth0") as sent, Capture(shared_lab.hub, h2.name) as tunnel, Capture(dst, "eth0") as received:
        done = src.run("ping", "-n", "-c", "1", "-W", "5", "-p", MARK.hex(), dst.address)
        assert done.returncode == 0, done.stdout
        return {
            "sent": sent.until(echo_request),
            "tunnel": tunnel.until(lambda frame: carries(frame, echo_request)),
            "received": received.until(echo_request),
        }


def test_outer_header_leads_from_host_to_host_on_the_overlays_port(shared_lab: Lab, ping: dict[str, Packet]) -> None:
    h1, h2, _ = shared_lab.hosts
    outer = ping["tunnel"]
    assert (outer[IP].src, outer[IP].dst) == (h1.underlay_ip, h2.underlay_ip)
    assert (outer.src, outer.dst) == (device_mac(h1, "eth0"), device_mac(h2, "eth0"))
    assert outer[UDP].dport == 8472
    # Derived from the inner flow, out of the ephemeral ports, so that underlay routers spread the flows.
    assert 32768 <= outer[UDP].sport <= 60999


def test_outer_header_has_the_default_ttl_and_may_be_fragmented_as_flannels(ping: dict[str, Packet]) -> None:
    outer = ping["tunnel"][IP]
    assert outer.ttl == 64
    assert not outer.flags.DF
    assert (outer.frag, outer.flags.MF) == (0, False)
    assert outer.tos == 0


def test_vxlan_header_has_only_the_vni_flag_and_reserved_bits_are_zero(ping: dict[str, Packet]) -> None:
    header = bytes(ping["tunnel"][VXLAN])[:8]
    assert header == bytes([0x08, 0, 0, 0, 0, 0, 1, 0])
    assert ping["tunnel"][VXLAN].vni == 1


def test_inner_macs_are_those_of_the_devices_and_of_the_fdb(shared_lab: Lab, ping: dict[str, Packet]) -> None:
    h1, h2, _ = shared_lab.hosts
    inner = ping["tunnel"][VXLAN].payload
    assert isinstance(inner, Ether)
    assert inner.src == device_mac(h1, "flannel.1")
    assert inner.dst == device_mac(h2, "flannel.1")
    fdb = {entry["mac"]: entry["dst"] for entry in h1.json("bridge", "fdb", "show", "dev", "flannel.1")}
    assert fdb[inner.dst] == ping["tunnel"][IP].dst


def test_inner_packet_is_the_one_that_was_sent_and_the_one_that_arrives(ping: dict[str, Packet]) -> None:
    sent, inner, received = ping["sent"][IP], ping["tunnel"][VXLAN].payload[IP], ping["received"][IP]
    # One hop at each of the two hosts; apart from that not a bit is changed.
    assert (sent.ttl, inner.ttl, received.ttl) == (64, 63, 62)
    for packet in (inner, received):
        same = packet.copy()
        same.ttl, same.chksum = sent.ttl, sent.chksum
        assert bytes(same) == bytes(sent)


def test_nothing_is_flooded_to_find_a_peer(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(hosts=3, pods=1)
    lab.up()
    h1, h2, h3 = lab.hosts
    with Capture(lab.hub, h3.name) as bystander:
        done = h1.pods[0].run("ping", "-n", "-c", "3", "-i", "0.05", "-W", "5", h2.pods[0].address)
        assert done.returncode == 0, done.stdout
        strange = [
            frame for frame in bystander.rest() if VXLAN in frame or (ARP in frame and "10.244" in frame.summary())
        ]
    assert [frame.summary() for frame in strange] == []


def test_packet_for_a_subnet_nobody_leases_is_not_tunnelled(shared_lab: Lab) -> None:
    h1 = shared_lab.hosts[0]
    with Capture(shared_lab.hub, "underlay0") as underlay:
        lost = h1.pods[0].run("ping", "-n", "-c", "1", "-W", "1", "-p", MARK.hex(), "10.244.255.9")
        assert lost.returncode == 1
        assert [frame.summary() for frame in underlay.rest() if VXLAN in frame and carries(frame, echo_request)] == []

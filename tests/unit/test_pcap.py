"""Capture files: what is written is read again, by scapy's own reader too; what is no capture is told."""

import gzip
from pathlib import Path

import pytest
from scapy.layers.inet import IP
from scapy.layers.l2 import Ether
from scapy.utils import PcapNgReader, PcapWriter, RawPcapWriter

from overlay.pcap import NotACapture, Recorded, Writer, read

TIME_NS = 1_763_730_000_123_457_000
FRAME = bytes(Ether() / IP(dst="10.5.1.2") / bytes(40))
LARGE = FRAME + bytes(70_000)


def test_written_file_is_read_with_times_ways_names_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    with Writer(path) as writer:
        for number, outgoing in enumerate((True, False, None)):
            writer.write(TIME_NS + 1000 * number, f"eth{number % 2}", outgoing, FRAME, ["one", "two\u2026"])
        writer.flush()
        writer.write(TIME_NS, "eth0", True, LARGE)
    assert list(read(str(path))) == [
        Recorded(TIME_NS, True, FRAME, len(FRAME), "eth0"),
        Recorded(TIME_NS + 1000, False, FRAME, len(FRAME), "eth1"),
        Recorded(TIME_NS + 2000, None, FRAME, len(FRAME), "eth0"),
        Recorded(TIME_NS, True, LARGE, len(LARGE), "eth0"),
    ]
    with PcapNgReader(str(path)) as reader:
        packet = reader.read_packet()
    assert (packet.sniffed_on, packet.direction, packet[IP].dst) == ("eth0", 2, "10.5.1.2")
    assert packet.comments == [b"one", "two\u2026".encode()]


@pytest.mark.parametrize("nano", [False, True])
def test_classic_files_have_neither_names_nor_ways(tmp_path: Path, nano: bool) -> None:
    path = tmp_path / "a.pcap"
    with PcapWriter(str(path), linktype=1, nano=nano) as writer:
        writer.write_header(None)
        writer.write_packet(FRAME[:50], sec=5, usec=7, wirelen=len(FRAME))
    assert list(read(str(path))) == [Recorded(5 * 10**9 + (7 if nano else 7000), None, FRAME[:50], len(FRAME), "")]
    packed = tmp_path / "a.pcap.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert len(list(read(str(packed)))) == 1


def test_file_that_ends_within_a_frame_ends_before_it(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    with Writer(path) as writer:
        writer.write(TIME_NS, "eth0", True, FRAME)
        writer.write(TIME_NS, "eth0", True, FRAME)
    path.write_bytes(path.read_bytes()[:-20])
    assert len(list(read(str(path)))) == 1


def test_what_is_no_capture_of_ethernet_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for content in (b"", b"abc", b"something else, and long enough", gzip.compress(b"x"), b"\x1f\x8bxx"):
        path.write_bytes(content)
        with pytest.raises(NotACapture, match="no pcap or pcapng file"):
            read(str(path))
    with pytest.raises(NotACapture, match="no such file"):
        read(str(tmp_path / "none"))
    with pytest.raises(NotACapture, match="is a directory"):
        read(str(tmp_path))
    with RawPcapWriter(str(path), linktype=113) as writer:
        writer.write_header(None)
        writer.write_packet(FRAME, sec=1, usec=0)
    with pytest.raises(NotACapture, match=r"its link type is 113, not Ethernet: .* not on 'any'"):
        read(str(path))


def test_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Writer(tmp_path / "none/a.pcapng")

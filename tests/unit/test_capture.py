"""The loop of a capture: what is shown, written and counted; leases that change; how it looks."""

import io
import json
import re
from pathlib import Path

import pytest
from scapy.layers.inet import IP, UDP, fragment
from scapy.layers.l2 import ARP, Ether

from overlay import capture as work
from overlay.capture import Capture, Caught, JsonLines, Known, Leases, Screen, Tally
from overlay.packets import REMARKS, Packet
from overlay.roster import Roster, UnknownTarget
from overlay.selection import PAIRS, WORDS, parse
from tests.frames import KNOWN, PING, inner4, roster, tunnel

PAGE = Path(__file__).parents[2] / "docs/packet-harness.md"
TIME_NS = 1_763_730_000_123_457_999
ODD = tunnel(PING, header="08 00 00 00 00 00 02 00")
STRANGER = tunnel(PING, outer=IP(src="192.168.0.9", dst="192.168.0.2"))
PLAIN = Ether() / inner4() / UDP()


def caught(*frames: object, outgoing: bool | None = False) -> list[Caught]:
    return [Caught(TIME_NS, outgoing, bytes(frame), len(bytes(frame)), "eth0") for frame in frames]


def leases(*reads: Known) -> tuple[Leases, list[str]]:
    """What reads of the leases give, one after the other, the last for good; and what is noted of that."""
    notes: list[str] = []
    left = list(reads or [Known(KNOWN, True, "etcd")])
    return Leases(lambda: left.pop(0) if left[1:] else left[0], notes.append), notes


class Shown:
    def __init__(self) -> None:
        self.packets: list[Packet] = []

    def __call__(self, caught: Caught, packet: Packet) -> None:
        self.packets.append(packet)


def captured(*frames: object, known: Roster = KNOWN, **options: object) -> tuple[list[Packet], Tally]:
    shown = Shown()
    job = Capture(leases(Known(known, True, "etcd"))[0], show=shown, **options)
    job.run(caught(*frames))
    return shown.packets, job.tally


def test_only_the_overlays_packets_are_seen() -> None:
    shown, tally = captured(tunnel(PING), ODD, PLAIN, Ether() / ARP(), Ether() / IP(dst="1.1.1.1") / UDP(), bytes(5))
    assert [packet.vni for packet in shown] == [1, 2, None]
    assert (tally.seen, tally.wanted, tally.odd) == (3, 3, 1)


def test_target_and_filter_choose() -> None:
    shown, tally = captured(tunnel(PING), ODD, wanted=parse("remarks"))
    assert [packet.vni for packet in shown] == [2] and (tally.seen, tally.wanted) == (2, 1)
    assert len(captured(tunnel(PING), STRANGER, target="h1")[0]) == 2, "the pod of a stranger's packet is h1's"
    assert len(captured(tunnel(PING), target="10.5.2.2")[0]) == 1
    assert len(captured(tunnel(PING), target="10.5.2.3")[0]) == 0
    with pytest.raises(UnknownTarget):
        captured(target="h9")


def test_count_ends_it() -> None:
    shown, tally = captured(tunnel(PING), ODD, tunnel(PING), count=2)
    assert len(shown) == 2 and tally.seen == 2


def test_later_fragments_are_known_by_their_first() -> None:
    whole = tunnel(inner4() / UDP() / bytes(1400))
    parts = [Ether() / part for part in fragment(whole[IP], fragsize=600)]
    other = Ether() / IP(src="192.168.0.1", dst="192.168.0.2", id=9, frag=10) / UDP()
    shown, _ = captured(*parts, other)
    assert len(shown) == len(parts) == 3
    assert {remark.kind for packet in shown for remark in packet.remarks} == {"fragment"}
    assert captured(*parts[1:])[0] == []


def test_not_every_fragment_is_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "MAX_FRAGMENTED", 1)
    first, second = (
        [
            Ether() / part
            for part in fragment(
                tunnel(inner4() / UDP() / bytes(900), outer=IP(src="192.168.0.1", dst="192.168.0.2", id=n))[IP],
                fragsize=600,
            )
        ]
        for n in (1, 2)
    )
    assert len(captured(first[0], second[0], first[1], second[1])[0]) == 3


def test_packet_that_ought_to_be_in_a_tunnel_is_remarked_on_where_tunnels_leave() -> None:
    def remarks(**options: object) -> list[str]:
        return [remark.kind for packet in captured(PLAIN, **options)[0] for remark in packet.remarks]

    assert remarks(underlay=True) == ["untunnelled"]
    assert remarks(underlay=False) == []
    assert remarks(underlay=True, known=roster('{"Type":"vxlan","DirectRouting":true}')) == []


def test_leases_are_read_again_when_a_packet_is_doubtful_and_not_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("overlay.capture.time.monotonic", lambda: now)
    known, notes = leases(
        Known(roster('{"Type":"vxlan","VNI":2}'), True, "etcd"),
        Known(KNOWN, True, "etcd"),
        Known(Roster(), False, "etcd is away"),
        Known(KNOWN, True, "etcd"),
    )
    shown = Shown()
    job = Capture(known, show=shown, target="h1")
    job.run(caught(tunnel(PING)))
    assert shown.packets[-1].remarks == ()
    job.run(caught(ODD))
    assert known.roster is KNOWN and known.known.fresh
    now += work.AGAIN_S
    job.run(caught(ODD))
    assert known.roster is KNOWN and notes == ["leases may have changed since: etcd is away"]
    now += work.AGAIN_S
    job.run(caught(ODD))
    assert not known.known.fresh
    now += work.AGAIN_AFTER_FAILURE_S
    job.run(caught(ODD))
    assert notes[1:] == ["etcd"] and len(shown.packets) == 5


def test_peer_that_has_left_stays_the_target() -> None:
    known, _ = leases(Known(KNOWN, True, "etcd"), Known(Roster(vni=1), True, "etcd"))
    shown = Shown()
    Capture(known, show=shown, target="h1").run(caught(ODD, tunnel(PING)))
    assert len(shown.packets) == 2


class Recorder:
    def __init__(self) -> None:
        self.written: list[tuple[object, ...]] = []

    def write(self, *fields: object) -> None:
        self.written.append(fields)

    def flush(self) -> None:
        pass


def test_what_is_wanted_is_written_with_its_remarks() -> None:
    recorder = Recorder()
    _, tally = captured(ODD, PLAIN, wanted=parse("icmp"), recorder=recorder)
    assert recorder.written == [(TIME_NS, "eth0", False, bytes(ODD), ["VNI 2, the network's is 1"])]
    assert tally.line(0, "written") == "2 packets of the overlay, 1 written, 1 with remarks, 0 lost by the kernel"


def test_without_decoding_all_is_written() -> None:
    recorder = Recorder()
    job = Capture(leases()[0], recorder=recorder, decode=False, count=2)
    job.run(caught(bytes(3), ODD, ODD))
    assert [fields[3] for fields in recorder.written] == [bytes(3), bytes(ODD)]
    assert job.tally.line(7, "written") == (
        "2 packets of the overlay, 2 written, not decoded, 7 lost by the kernel, for the capture was too slow"
    )
    assert Tally(1, 1, 0).line(None, "shown") == "1 packet of the overlay, 1 shown, 0 with remarks"


# --- how it looks ------------------------------------------------------------------------------------------------


def screen(*frames: object, outgoing: bool | None = True, headers: bool = False, colour: bool = False) -> str:
    out = io.StringIO()
    job = Capture(leases()[0], show=Screen(out, headers=headers, colour=colour))
    job.run(caught(*frames, outgoing=outgoing))
    return re.sub(r"\d\d:\d\d:\d\d", "hh:mm:ss", out.getvalue())


def test_lines_look_like_this() -> None:
    assert screen(tunnel(PING), STRANGER, PLAIN) == (
        "TIME             WAY  FROM > TO                        VNI  PACKET\n"
        "hh:mm:ss.123457  out  h1 192.168.0.1 > h2 192.168.0.2  1    "
        "10.5.1.2 > 10.5.2.2  ICMP echo request 7/3, 56 bytes\n"
        "hh:mm:ss.123457  out  192.168.0.9 > h2 192.168.0.2     1    "
        "10.5.1.2 > 10.5.2.2  ICMP echo request 7/3, 56 bytes\n"
        "                 ! outer source 192.168.0.9 is in no lease\n"
        "hh:mm:ss.123457  out  h1 > h2                          -    10.5.1.2 > 10.5.2.2  UDP 53 > 53, 0 bytes\n"
    )


def test_headers_and_colour_are_for_those_who_want_them() -> None:
    lines = screen(ODD, outgoing=None, headers=True, colour=True).splitlines()
    assert lines[1].startswith("hh:mm:ss.123457  ?    h1")
    assert lines[2].startswith("                 outer UDP 40000 > 8472, TTL 64, Ethernet")
    assert lines[3] == "                 \033[1;33m! VNI 2, the network's is 1\033[0m"


def test_colour_needs_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert work.colourful(Terminal()) and not work.colourful(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not work.colourful(Terminal())


def documented(begin: str, end: str) -> set[str]:
    """The keys that a part of the page has in the first column of its tables."""
    part = PAGE.read_text().partition(begin)[2].partition(end)[0]
    assert part
    return {
        key.rpartition(".")[2]
        for row in re.findall(r"^\| (`.*?) \|", part, re.M)
        for key in re.findall(r"`(.*?)`", row)
    }


def keys(value: object) -> set[str]:
    if isinstance(value, list):
        return {key for each in value for key in keys(each)}
    return {*value, *(key for each in value.values() for key in keys(each))} if isinstance(value, dict) else set()


def test_json_is_as_documented() -> None:
    out = io.StringIO()
    frames = [tunnel(inner4(flags="MF") / UDP(), header="08 00 00 00 00 00 02 00"), PLAIN]
    Capture(leases()[0], show=JsonLines(out)).run(caught(*frames))
    first, second = map(json.loads, out.getvalue().splitlines())
    assert keys(first) == documented("### As JSON", "### ")
    assert first.keys() == second.keys() and second["outer"] is None
    assert (first["time_ns"], first["interface"], first["direction"]) == (TIME_NS, "eth0", "in")


def test_remarks_and_words_are_documented() -> None:
    assert documented("### What is remarked on", "### ") == REMARKS.keys()
    assert documented("### Choosing packets", "### ") == WORDS.keys() | set(PAIRS.values()) | {"not"}

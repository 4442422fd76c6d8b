"""The tests' own instruments: they name what fails, exactly, and measure what they say."""

import contextlib
from collections.abc import Iterator

import pytest

from overlay.cluster import Host, Lab, wait_until
from tests.netns.traffic import Meter, Stream, all_to_all, exchange

OUTAGE_MS = 100


@contextlib.contextmanager
def rule(host: Host, chain: str, statement: str) -> Iterator[None]:
    """An nftables rule in a chain of this kind, as long as the block lasts."""
    table = f"table inet test {{ chain c {{ {chain}; policy accept; {statement}; }}; }}"
    assert host.run("nft", table).returncode == 0
    try:
        yield
    finally:
        host.run("nft", "delete table inet test")


FORWARD = "type filter hook forward priority 0"
POSTROUTING = "type nat hook postrouting priority 100"


def test_what_fails_is_named_by_pair_protocol_and_size(shared_lab: Lab) -> None:
    src, dst = (host.pods[0] for host in shared_lab.hosts[:2])
    drop = f"ip saddr {src.address} ip daddr {dst.address} udp length > 1000 ip frag-off & 0x1fff == 0 drop"
    with rule(src.host, FORWARD, drop):
        failures = exchange(all_to_all(shared_lab.pods), seconds=1)
    # The way back counts as well.
    assert sorted(failure.split(":")[0] for failure in failures) == [
        f"{src.name} -> {dst.name} IPv4 udp full",
        f"{src.name} -> {dst.name} IPv4 udp oversized",
        f"{dst.name} -> {src.name} IPv4 udp full",
        f"{dst.name} -> {src.name} IPv4 udp oversized",
    ]
    assert exchange(all_to_all(shared_lab.pods)) == []


@pytest.mark.parametrize("protocol", ["udp", "tcp"])
def test_other_sender_than_the_pod_itself_is_noticed(shared_lab: Lab, protocol: str) -> None:
    src, dst = (host.pods[0] for host in shared_lab.hosts[:2])
    with rule(src.host, POSTROUTING, f"ip saddr {src.address} masquerade"):
        failures = exchange(all_to_all([src, dst], [protocol], ["small"]))
    assert len(failures) == 1
    assert f"{src.name} -> {dst.name} IPv4 {protocol} small: the receiver saw another sender" in failures[0]


def test_meter_tells_when_and_how_long_packets_were_lost_and_a_stream_lives_through_it(shared_lab: Lab) -> None:
    src, dst = (host.pods[0] for host in shared_lab.hosts[:2])
    with Meter(src, dst) as meter, Stream(src, dst) as stream:
        wait_until(lambda: meter.now_ms > OUTAGE_MS, 5)
        before = meter.now_ms
        with rule(src.host, FORWARD, f"ip saddr {src.address} drop"):
            began = meter.now_ms
            wait_until(lambda: meter.now_ms > began + OUTAGE_MS, 5)
            ended = meter.now_ms
        after = meter.now_ms
        sent = stream.received
        wait_until(lambda: stream.received > sent, 5, "what was sent meanwhile")
    (gap,) = meter.gaps()
    assert ended - began <= gap.ms <= after - before + 2 * meter.longest_pause_ms
    assert before <= gap.at_ms + meter.longest_pause_ms
    assert gap.lost > 1
    assert stream.troubles == []
    assert stream.longest_silence_ms > OUTAGE_MS


def test_meter_finds_nothing_where_nothing_is_lost(shared_lab: Lab) -> None:
    src, dst = (host.pods[0] for host in shared_lab.hosts[:2])
    with Meter(src, dst) as meter, Stream(src, dst) as stream:
        wait_until(lambda: meter.now_ms > 300, 5)
    assert meter.gaps() == []
    assert stream.troubles == []
    assert stream.received > 0

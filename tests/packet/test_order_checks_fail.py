"""The checks of `life` fail where they must, for the right reason: with broken agents, and on records made up."""

from collections.abc import Callable

import pytest

from tests.conftest import MakeLab
from tests.packet import broken, life
from tests.packet.life import CLEAR, CONFIG, Passage, Peers, Record, Way
from tests.packet.wire import Wire

A, B = (Way("172.30.0.11", f"172.30.0.{n}", 1, "02:00:00:00:00:01") for n in (12, 13))


@pytest.fixture(scope="module")
def peers(make_module_lab: MakeLab) -> Peers:
    """Peers of a host whose agent is broken: see `be_broken`."""
    lab = make_module_lab(hosts=2, pods=1, config=CONFIG, underlay="46")
    lab.up()
    return Peers(lab)


def be_broken(peers: Peers, fault: str) -> None:
    """Have the sender's agent replaced by one with this fault."""
    peers.drop_all()
    peers.lab.agent_command = broken.command(fault)
    peers.sender.kill_agent()
    peers.sender.start_agent()
    peers.sender.wait_ready()


@pytest.mark.parametrize(
    ("fault", "check", "reason"),
    [
        ("wrong-order", life.check_join, r"\d+ packets were lost in the host"),
        ("wrong-order", life.check_new_mac, r"\d+ packets were lost in the host"),
        ("routes-first", life.check_join, r"\d+ packets were lost in the host"),
        ("remove-then-add", life.check_other_mtu, r"packet \d+ left in the clear, a wrong way"),
        ("missing-neighbour", life.check_join, r"none left in a tunnel to .*, the last left in the clear"),
        ("flooding", life.check_removed_by_hand, r"packet \d+ was flooded, it left \d times"),
        ("stale", life.check_leave, r"none left in the clear, the last left in a tunnel to"),
    ],
)
def test_broken_agent_is_found_out(
    wire: Wire,
    peers: Peers,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    check: Callable[[Wire, Peers], None],
    reason: str,
) -> None:
    be_broken(peers, fault)
    if reason.startswith("none left"):
        # It would be waited for in vain.
        monkeypatch.setattr(life, "SECONDS", 2.0)
    with pytest.raises(AssertionError, match=reason):
        check(wire, peers)


def record(*ways: Way, sent: int = 3, wrongly: str = "") -> Record:
    """A flow of which the packets left by these ways, in their order, and reached their hosts; or the first, `wrongly`,
    another as well."""
    made = Record("flow", 4, {CLEAR.remote: "hub", A.remote: "h2", B.remote: "h3"}, sent)
    for number, way in enumerate(ways):
        made.left.append(Passage(1, number, 1_000_000 * number, way))
        made.reached.setdefault(made.holders[way.remote], set()).add(number)
    if wrongly:
        made.reached.setdefault(wrongly, set()).add(0)
    return made


def test_right_record_passes() -> None:
    life.check_ways(record(CLEAR, A, B), CLEAR, A, B)
    life.check_ways(record(A, B), A, B, lossless=False)
    life.check_none_after(record(A, A, B), A, 1_500_000)


@pytest.mark.parametrize(
    ("told", "ways", "reason"),
    [
        (
            record(A, B, A),
            (A, B),
            "packet 2 left in a tunnel to 172.30.0.12, .* after packet 1 had left in a tunnel to 172.30.0.13",
        ),
        (record(A, CLEAR, B), (A, B), "packet 1 left in the clear, a wrong way"),
        (record(A, A._replace(vni=2), B), (A, B), "packet 1 left in a tunnel to 172.30.0.12, VNI 2, .*, a wrong way"),
        (record(A, A, A), (A, B), "no packet left in a tunnel to 172.30.0.13"),
        (record(A, B), (A, B), "1 packets were lost in the host, from 2 to 2"),
        (record(A, A, B, wrongly="h4"), (A, B), "packet 0, .*, reached {'h.', 'h.'}, not {'h2'}"),
    ],
)
def test_wrong_record_fails(told: Record, ways: tuple[Way, ...], reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        life.check_ways(told, *ways)


def test_packet_after_the_end_fails() -> None:
    with pytest.raises(AssertionError, match=r"packet 1 left in a tunnel to 172.30.0.12, .*, 0.5 ms after its end"):
        life.check_none_after(record(A, A, B), A, 500_000)
    with pytest.raises(AssertionError, match="nothing left any more"):
        life.check_none_after(record(A, A, B), A, 2_000_000)

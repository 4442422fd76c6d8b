"""What is concluded from probes: never more than they show."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.checksums import Finding, Probe, Verdict, judged

PEER = bytes((10, 9, 2, 0))

FINE = Probe(sent=1, echo=0, tcp=1, udp=1)
DOWN = Probe(sent=3, echo=0, tcp=0, udp=0)
ONLY_ECHO = Probe(sent=3, echo=3, tcp=0, udp=0)
NO_TCP = Probe(sent=3, echo=3, tcp=0, udp=3)
NO_UDP = Probe(sent=3, echo=3, tcp=3, udp=0)
LOSSY = Probe(sent=3, echo=2, tcp=0, udp=0)

PROBES = st.integers(1, 3).flatmap(lambda sent: st.builds(Probe, st.just(sent), *[st.integers(0, sent)] * 3))


@pytest.mark.parametrize(
    ("probes", "verdict", "lost"),
    [
        ([FINE], Verdict.HEALTHY, ""),
        ([DOWN], Verdict.NO_PATH, ""),
        ([LOSSY], Verdict.NO_PATH, ""),
        ([NO_TCP], Verdict.SUSPECT, "TCP"),
        ([NO_TCP, FINE, NO_TCP], Verdict.FAULTY, "TCP"),
        ([ONLY_ECHO, FINE, ONLY_ECHO], Verdict.FAULTY, "TCP UDP"),
        ([ONLY_ECHO, NO_UDP, ONLY_ECHO], Verdict.FAULTY, "TCP"),
        ([ONLY_ECHO, NO_UDP, NO_TCP], Verdict.FAULTY, "TCP"),
        ([NO_TCP, NO_TCP, NO_TCP], Verdict.ELSEWHERE, "TCP"),
        ([NO_TCP, FINE, FINE], Verdict.HEALTHY, ""),
        ([NO_TCP, DOWN, NO_TCP], Verdict.ELSEWHERE, "TCP"),
        ([NO_TCP, FINE, DOWN], Verdict.NO_PATH, ""),
    ],
)
def test_probes_lead_to_the_verdict(probes: list[Probe], verdict: Verdict, lost: str) -> None:
    assert judged(PEER, *probes) == Finding(verdict, PEER, frozenset(lost.split()))


def test_a_peer_that_drops_echo_is_healthy_if_tcp_and_udp_are_answered() -> None:
    assert judged(PEER, FINE).verdict is Verdict.HEALTHY


@given(PROBES, PROBES, PROBES)
def test_the_offload_is_blamed_for_what_goes_and_comes_back_with_it_alone(
    first: Probe, without: Probe, again: Probe
) -> None:
    finding = judged(PEER, first, without, again)
    if finding.verdict is Verdict.FAULTY:
        assert finding.lost
        assert finding.lost <= first.lost & again.lost
        assert not finding.lost & without.lost
        assert (first.echo, again.echo) == (first.sent, again.sent)


@pytest.mark.parametrize("verdict", Verdict)
def test_every_outcome_is_told_and_begins_with_the_state_of_the_offload(verdict: Verdict) -> None:
    why = Finding(verdict, PEER, frozenset(("UDP", "TCP"))).why
    assert why.startswith("off" if verdict in (Verdict.FAULTY, Verdict.OFF) else "on")
    assert ("TCP and UDP" in why) == (verdict not in (Verdict.NO_PATH, Verdict.OFF))

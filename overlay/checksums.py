"""Whether checksums that are finished below the VXLAN device arrive right: what was measured, what follows from it.

A kernel leaves the checksums of TCP and UDP unfinished when the device offers to finish them (CHECKSUM_PARTIAL,
Documentation/networking/checksum-offloads.rst). A VXLAN device offers it and passes the work on to the NIC. Some NICs,
drivers and kernels fail at it inside of a tunnel; the receiver then drops the segments and datagrams without a word.
The checksum of ICMP is never left unfinished, so ping works all the while.

`overlay.offload` measures and switches. The decision is here.
"""

from dataclasses import dataclass
from enum import StrEnum

FEATURE = "tx-checksum-ip-generic"
"""The offload of a VXLAN device, as `ethtool -k` names it. Without it segmentation is not offloaded either."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Answers of one peer to `sent` rounds: MTU-sized ICMP echo, TCP SYN, MTU-sized UDP datagram.

    There are no more rounds once TCP and UDP have been answered. A refusal is an answer: whoever refuses has found
    the checksum right.
    """

    sent: int
    echo: int
    tcp: int
    udp: int

    @property
    def lost(self) -> frozenset[str]:
        """The protocols of which nothing was answered."""
        return frozenset(name for name, count in (("TCP", self.tcp), ("UDP", self.udp)) if not count)


class Verdict(StrEnum):
    """What the probes of one peer tell."""

    HEALTHY = "healthy"
    """TCP and UDP arrive."""
    NO_PATH = "no path"
    """Not even every echo is answered: nothing can be told of checksums."""
    SUSPECT = "suspect"
    """Echo is answered, TCP or UDP is not: to be measured without the offload, and with it again."""
    FAULTY = "faulty"
    """What is lost with the offload arrives without it."""
    ELSEWHERE = "elsewhere"
    """TCP or UDP is lost with and without the offload: a firewall, most likely. The offload stays on."""
    OFF = "off"
    """The offload is off already; nothing was measured."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of an examination: by which peer (packed address, empty if none answered), and what is lost."""

    verdict: Verdict
    peer: bytes = b""
    lost: frozenset[str] = frozenset()

    @property
    def why(self) -> str:
        """The state of the offload in one clause, for `status` and the log."""
        lost = " and ".join(sorted(self.lost))
        match self.verdict:
            case Verdict.HEALTHY:
                return "on: TCP and UDP arrive"
            case Verdict.NO_PATH:
                return "on, unproven: not every large ping was answered"
            case Verdict.FAULTY:
                return f"off: with it {lost} is lost, without it arrives; the underlay's NIC or driver is at fault"
            case Verdict.SUSPECT:
                return f"on: {lost} is lost; the cause is being looked for"
            case Verdict.ELSEWHERE:
                return f"on: {lost} is lost with and without it, so something else drops it; look for a firewall"
        return "off already"


def judged(peer: bytes, first: Probe, without: Probe | None = None, again: Probe | None = None) -> Finding:
    """What follows from a probe with the offload, and for a suspect, one without it and another one with it.

    Only a loss that goes with the offload and comes back with it is the offload's: a peer that has just started its
    network, or a link that has just come up, looks alike in two measurements.
    """
    if not first.lost:
        return Finding(Verdict.HEALTHY, peer)
    if first.echo < first.sent:
        return Finding(Verdict.NO_PATH, peer)
    if without is None or again is None:
        return Finding(Verdict.SUSPECT, peer, first.lost)
    if not again.lost:
        return Finding(Verdict.HEALTHY, peer)
    if again.echo < again.sent:
        return Finding(Verdict.NO_PATH, peer)
    cured = first.lost - without.lost
    if cured and cured <= again.lost:
        return Finding(Verdict.FAULTY, peer, cured)
    return Finding(Verdict.ELSEWHERE, peer, first.lost)

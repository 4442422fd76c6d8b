"""The firewall of running agents: who is let in, what others do to it, and what is back at once.

Rules by themselves are tested in test_firewall_traffic.
"""

import json
import sys
from collections.abc import Iterator

import pytest

from overlay.cluster import Lab
from overlay.cluster_hosts import Host, wait_until
from overlay.firewall import SAMPLE_SIZE
from overlay.surroundings import SHOWN, TELL_S
from tests.conftest import MakeLab
from tests.netns.test_overlay import events
from tests.netns.traffic import Meter, all_to_all, exchange

pytestmark = pytest.mark.netns

SOON_S = 5.0


@pytest.fixture(scope="module")
def lab(make_module_lab: MakeLab) -> Iterator[Lab]:
    made = make_module_lab(hosts=3, pods=1)
    made.up()
    yield made
    made.down()


def listed(host: Host, kind: str, name: str) -> dict[str, object]:
    """What `nft` says of a set or counter of ours; empty if there is none."""
    done = host.run("nft", "-j", "list", kind, "inet", "overlay_agent", name)
    if done.returncode:
        return {}
    (found,) = [each[kind] for each in json.loads(done.stdout)["nftables"] if kind in each]
    return dict(found)


def let_in(host: Host) -> set[str]:
    elements = listed(host, "set", "peers4").get("elem", [])
    assert isinstance(elements, list)
    return set(map(str, elements))


def strangers(host: Host) -> int:
    packets = listed(host, "counter", "strangers")["packets"]
    assert isinstance(packets, int)
    return packets


def others(lab: Lab, host: Host) -> set[str]:
    return {each.underlay_ip for each in lab.hosts if each is not host}


def guarded(host: Host) -> bool:
    return "jump tunnel" in host.run("nft", "list", "table", "inet", "overlay_agent").stdout


def test_exactly_the_peers_are_let_in_and_a_stranger_is_counted_and_dropped(lab: Lab) -> None:
    assert all(let_in(host) == others(lab, host) and guarded(host) for host in lab.hosts)
    h1 = lab.hosts[0]
    # What a peer sends in the moment before it is known counts as well.
    before = strangers(h1)
    send = f"import socket; socket.socket(2, 2).sendto(bytes(60), ({h1.underlay_ip!r}, 8472))"
    assert lab.hub.run(sys.executable, "-c", send).returncode == 0
    wait_until(lambda: strangers(h1) == before + 1, SOON_S, "the stranger's packet counted")
    assert exchange(all_to_all(lab.pods)) == []
    assert strangers(h1) == before + 1


def test_peer_that_leaves_is_a_stranger_and_one_that_comes_back_is_not(lab: Lab) -> None:
    h1, _, h3 = lab.hosts
    h3.kill_agent()
    (key,) = (lease.key for lease in lab.leases() if h3.holds(lease))
    (record,) = (record for record in lab.store.snapshot().records if record.key == key)
    assert lab.store.delete(key, record.mod_revision)
    wait_until(lambda: h3.underlay_ip not in let_in(h1), SOON_S, "the address out of the set")
    h3.start_agent()
    h3.wait_ready()
    wait_until(lambda: let_in(h1) == others(lab, h1), SOON_S, "the address in the set")


def test_a_flood_of_strangers_is_one_line_with_a_few_of_their_addresses(lab: Lab) -> None:
    host = lab.hosts[2]
    # An agent that has told of none.
    host.kill_agent()
    host.start_agent()
    host.wait_ready()
    before, told = strangers(host), len(events(host, "packets_dropped"))
    forged = "bytes((172, 30, 9, n)) + bytes(map(int, dst.split('.')))"
    head = "bytes((69, 0, 0, 88, 0, 0, 0, 0, 64, 17, 0, 0))"
    send = (
        f"import socket, struct; dst = {host.underlay_ip!r}; raw = socket.socket(2, 3, 255)\n"
        "udp = struct.pack('!HHHH', 9, 8472, 68, 0) + bytes(60)\n"
        f"for n in range(1, 201): raw.sendto({head} + {forged} + udp, (dst, 0))"
    )
    done = lab.hub.run(sys.executable, "-c", send)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: len(events(host, "packets_dropped")) > told, 2 * TELL_S, "the line")
    wait_until(lambda: strangers(host) == before + 200, SOON_S, "all of them counted")
    kept = listed(host, "set", "strangers4")["elem"]
    assert isinstance(kept, list) and len(kept) == SAMPLE_SIZE
    (line,) = events(host, "packets_dropped")[told:]
    assert line["reason"] == "strangers" and 0 < int(line["packets"]) <= 200
    assert len(line["sources"]) == SHOWN and all(each.startswith("172.30.9.") for each in line["sources"])


@pytest.mark.parametrize(
    "harm",
    [
        "flush ruleset",
        "flush chain inet overlay_agent tunnel",
        "delete table inet overlay_agent",
        "flush set inet overlay_agent peers4",
        "add element inet overlay_agent peers4 { 192.0.2.1 }",
    ],
)
def test_whatever_somebody_does_to_the_table_is_undone_and_told_and_no_packet_lost(lab: Lab, harm: str) -> None:
    h1, h2, _ = lab.hosts
    told = [line for line in h1.log().splitlines() if "firewall_altered" in line]
    # Emptying the set of a guard that stands shuts the peers out until the addresses are back.
    lossless = "set" not in harm
    with Meter(h1.pods[0], h2.pods[0]) as there, Meter(h2.pods[0], h1.pods[0]) as back:
        assert h1.run("nft", harm).returncode == 0
        wait_until(lambda: guarded(h1) and let_in(h1) == others(lab, h1), SOON_S, "the table as it was")
    new = [line for line in h1.log().splitlines() if "firewall_altered" in line][len(told) :]
    # A single element is an entry like a route, and mended as one.
    assert len(new) == ("peers4" not in harm)
    assert all("nft" in line for line in new)
    gaps = there.gaps() + back.gaps()
    assert not gaps if lossless else all(gap.ms < 1000 for gap in gaps)


@pytest.mark.parametrize("program", ["iptables-nft", "iptables-legacy"])
def test_forwarding_stays_accepted_beside_a_policy_of_drop(lab: Lab, program: str) -> None:
    h1 = lab.hosts[0]
    before = len(events(h1, "forward_accepted"))
    assert h1.run(program, "-P", "FORWARD", "DROP").returncode == 0
    try:
        jump = "-A FORWARD -j OVERLAY-AGENT-FWD"
        wait_until(lambda: jump in h1.run(program, "-S").stdout, 3 * SOON_S, "the jump to our chain")
        assert exchange(all_to_all(lab.pods)) == []
        assert h1.run(program, "-F", "FORWARD").returncode == 0
        wait_until(lambda: jump in h1.run(program, "-S").stdout, 3 * SOON_S, "the jump after a flush")
        assert exchange(all_to_all(lab.pods)) == []
        assert len(events(h1, "forward_accepted")) == before + 2
    finally:
        h1.run(program, "-P", "FORWARD", "ACCEPT")

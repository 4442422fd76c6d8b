"""Probes on real hosts: paths that are in order have no fault, and each fault that is set up has its own cause."""

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest
import structlog

from overlay import probe
from overlay.backends import Here
from overlay.cluster import Host, Lab
from overlay.cluster_hosts import Place, wait_until
from overlay.device import DeviceSpec, Underlay
from overlay.model import Fdb, Neighbour, Route
from overlay.probe import ALL, Health, Path, Question, encode_answer, encode_question
from overlay.prober import Prober
from overlay.reconciler import Plan, Some, State
from overlay.topology import network_config
from subnet_lease.model import Lease, LeaseAttrs, Prefix, Vtep, pack_address
from subnet_lease.table import LeaseTable
from tests.netns.namespace import entered, index_of, ip, new_namespace, sh
from tests.netns.scrape import OPTIONS, samples
from tests.netns.test_offload import TCP_CHECKSUM, UDP_CHECKSUM, Wire, packet_end, set_feature
from tests.netns.two_hosts import MTU, two_hosts

MakeLab = Callable[..., Lab]

PORT = 8473


# --- a cluster with many faults at once ---


def causes(host: Host) -> dict[str, int]:
    """How many of the host's paths have which cause."""
    found = samples(host)
    prefix = 'overlay_agent_paths_failed{cause="'
    return {name[len(prefix) : -2]: int(value) for name, value in found.items() if name.startswith(prefix) and value}


def measured(host: Host) -> int:
    return int(samples(host)["overlay_agent_paths_measured"])


def wait_for_causes(expected: dict[Host, dict[str, int]], seconds: float = 40) -> None:
    found: dict[Host, dict[str, int]] = {}

    def reached() -> bool:
        found.update((host, causes(host)) for host in expected)
        return found == expected

    try:
        wait_until(reached, seconds, "the causes", interval=0.3)
    finally:
        assert {host.name: each for host, each in found.items()} == {h.name: each for h, each in expected.items()}


def test_faults_that_exist_side_by_side_have_each_its_own_cause_on_both_hosts(make_lab: MakeLab) -> None:
    lab = make_lab(hosts=5, pods=0, agent_options=("--probe-interval", "1", "--probe-peers", "9", *OPTIONS))
    lab.up()
    h1, h2, h3, sound, cut = lab.hosts
    for host in lab.hosts:
        wait_until(lambda host=host: measured(host) == 4, 20, f"all paths of {host.name}")
    assert [causes(host) for host in lab.hosts] == [{}] * 5, "a healthy cluster"

    nft(h2, "inet", "input", f"ip saddr {h1.underlay_ip} udp dport 8472 drop")
    nft(lab.hub, "bridge", "forward", *(
        f"ip saddr {source.underlay_ip} ip daddr {target.underlay_ip} udp dport 8472 drop"
        for source, target in ((h1, h3), (h3, h1), (h2, h3))
    ))  # fmt: skip
    lab.hub.ip(f"link set {cut.name} down")
    wait_for_causes(
        {
            h1: {"peer_down": 1, "port_blocked_out": 1, "port_blocked": 1},
            h2: {"peer_down": 1, "port_blocked_in": 1, "port_blocked_out": 1},
            # Nothing of h2 arrives on its wire; another host passes on what h2 says.
            h3: {"peer_down": 1, "port_blocked_in": 1, "port_blocked": 1},
            sound: {"peer_down": 1},
            cut: {"underlay_unreachable": 4},
        }
    )

    for place, family in ((h2, "inet"), (lab.hub, "bridge")):
        assert place.run("nft", "delete", "table", family, "t").stderr == ""
    lab.hub.ip(f"link set {cut.name} up")
    wait_for_causes({host: {} for host in lab.hosts})
    log = h1.log()
    assert "paths_failed" in log and "paths_restored" in log
    assert "packets of the peer come out of the tunnel" in log
    for host in lab.hosts:
        found = samples(host)
        assert found['overlay_agent_probe_questions_total{outcome="malformed"}'] == 0
        assert found["overlay_agent_probe_rtt_seconds_count"] > 0


def nft(place: Place, family: str, hook: str, *rules: str) -> None:
    chain = f"add table {family} t; add chain {family} t c {{ type filter hook {hook} priority -200; }}"
    text = "; ".join((chain, *(f"add rule {family} t c {rule}" for rule in rules)))
    assert place.run("nft", text).stderr == ""


@pytest.mark.parametrize(
    ("options", "tunnels"),
    [
        ({"underlay": "6", "config": network_config("46", "vxlan")}, True),
        ({"config": network_config("4", "host-gw")}, False),
    ],
    ids=["dual stack over IPv6", "host-gw"],
)
def test_other_ways_to_peers_are_measured_too(make_lab: MakeLab, options: dict[str, object], tunnels: bool) -> None:
    lab = make_lab(hosts=2, pods=0, agent_options=("--probe-interval", "1", *OPTIONS), **options)
    lab.up()
    h1, h2 = lab.hosts
    for host in lab.hosts:
        wait_until(lambda host=host: measured(host) == 1, 20, f"the path of {host.name}")
    wait_until(lambda: samples(h2)['overlay_agent_probe_questions_total{outcome="answered"}'] > 0, 20, "a question")
    wait_until(lambda: samples(h1)['overlay_agent_probes_total{outcome="answered"}'] > 0, 20, "all answers")
    assert (causes(h1), causes(h2)) == ({}, {})
    nft(h2, "inet", "input", "udp dport 8472 drop" if tunnels else "iifname eth0 meta l4proto { icmp, udp, tcp } drop")
    wait_for_causes({h1: {"port_blocked_out": 1} if tunnels else {"underlay_unreachable": 1}})


# --- two hosts of which the first has probes; what the second has, each test says ---

FAMILIES = {"IPv4": ("10.9.1.0", "10.9.2.0", 24), "IPv6": ("fd09:0:0:1::", "fd09:0:0:2::", 64)}
MACS = {number: bytes((2, 0, 0, 0, 1, number)) for number in (1, 2)}


def view(own: int, peer: int, family: str, *, direct: bool = False) -> Some:
    """What the reconciler of host `own` says of the other, in the namespace of the thread."""
    bases, length = FAMILIES[family][:2], FAMILIES[family][2]
    here, there = (pack_address(bases[number - 1]) for number in (own, peer))
    device, link = index_of("flannel.1"), index_of("eth0")
    underlay, remote = (bytes((192, 0, 2, number)) for number in (own, peer))
    subnet = Prefix(there, length)
    lease = Lease(
        subnet if length == 24 else None, subnet if length == 64 else None,
        LeaseAttrs(remote, "vxlan", Vtep(1, MACS[peer])), 1, 1, 1,
    )  # fmt: skip
    fdb = Fdb((device, MACS[peer]), remote)
    if direct:
        entries = (fdb, Route(subnet, 0, remote, link))
    else:
        entries = (fdb, Neighbour((device, there), MACS[peer]), Route(subnet, 0, there, device))
    spec = DeviceSpec("flannel.1", 1, 8472, link, underlay, MACS[own], MTU, (Prefix(here, 8 * len(here)),))
    return Some(
        {lease.key: (lease, entries)},
        Plan((Prefix(here, length),), (spec,), "eth0", MTU),
        Here((), {4: device}, link if direct else 0, (), MTU, None, False),
        Underlay("eth0", link, 1500, (underlay,), (), (), ""),
        8472,
    )


@contextmanager
def probing(namespace: int, some: Some) -> Iterator[Prober]:
    """A prober in the namespace, which knows one peer."""
    wanted = {entry[0] for _, entries in some.leases.values() for entry in entries}

    def asked(choose: Callable[[LeaseTable], object], seconds: float) -> Some:
        return some

    prober = Prober(
        asked, wanted.__contains__, lambda: State(ready=True, peers=1), structlog.get_logger("probes"),
        interval=0.3, number=4, port=PORT,
    )  # fmt: skip

    def body() -> None:
        with entered(namespace):
            prober.run()

    thread = threading.Thread(target=body)
    thread.start()
    try:
        yield prober
    finally:
        prober.stop()
        thread.join(30)
        assert not thread.is_alive()


class Pair:
    """Two hosts, and what is started on them."""

    def __init__(self, near: int, far: int, stack: ExitStack, wire: Wire | None = None) -> None:
        self.near, self.far, self.wire = near, far, wire
        self._stack = stack

    def probe(self, *numbers: int, family: str = "IPv4", direct: bool = False) -> list[Prober]:
        probers = []
        for number in numbers:
            with entered((self.near, self.far)[number - 1]):
                some = view(number, 3 - number, family, direct=direct)
            probers.append(self._stack.enter_context(probing((self.near, self.far)[number - 1], some)))
        return probers


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lost here is waited for in vain, and the peers are near."""
    monkeypatch.setattr("overlay.prober.PATIENCE_S", 0.5)


@pytest.fixture
def pair(impatient: None) -> Iterator[Pair]:
    with new_namespace() as here, two_hosts(here) as (near, far), ExitStack() as stack:
        yield Pair(near, far, stack)


@pytest.fixture
def wired(impatient: None) -> Iterator[Pair]:
    """With NICs that fail, between the hosts; see test_offload."""
    with new_namespace() as between, two_hosts(between, ends=("near", "far")) as (near, far):
        for namespace in (near, far):
            with entered(namespace):
                for work in ("tx-tcp-segmentation", "tx-udp_tnl-segmentation", "tx-udp_tnl-csum-segmentation"):
                    set_feature("eth0", work, False)
        with Wire((packet_end("near"), packet_end("far"))) as wire, ExitStack() as stack:
            yield Pair(near, far, stack, wire)


def path_when(prober: Prober, condition: Callable[[Path], object], what: str) -> Path:
    """The path of a prober that has one, once it is so."""

    def found() -> Path | None:
        rows = prober.paths.rows()
        return rows[0] if rows and condition(rows[0]) else None

    try:
        path = wait_until(found, 20, what)
    except Exception:
        raise AssertionError(f"{what}: {prober.paths.rows()}") from None
    assert path is not None
    return path


def filtered(namespace: int, hook: str, *rules: str) -> None:
    with entered(namespace):
        chain = f"add table inet t; add chain inet t c {{ type filter hook {hook} priority 0; }}"
        sh("nft", "; ".join((chain, *(f"add rule inet t c {rule}" for rule in rules))))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("answers", ["an agent", "a kernel"])
def test_a_peer_answers_all_three_with_a_responder_or_without(pair: Pair, family: str, answers: str) -> None:
    prober, *others = pair.probe(*((1, 2) if answers == "an agent" else (1,)), family=family)
    path = path_when(prober, lambda path: path.answers == ALL, "all answers")
    assert (path.reachable, path.cause, path.mtu, path.mtu_verified) == (True, "", MTU, True)
    assert path.rtt is not None and 0 < path.rtt <= (path.rtt_median or 0) < 1
    if others:
        wait_until(prober.heard.peers, 10, "the answer")
        (peer,) = prober.heard.peers()
        assert (peer.address, peer.health) == (path.target.address, Health(True, 1, 0, 0))
        rows = wait_until(lambda: prober.heard.rows(time.monotonic()), 10, "what it has measured")
        assert (rows[0].source, rows[0].target, rows[0].cause) == (path.target.address, path.target.source, "")


def test_a_direct_route_is_measured_without_a_tunnel(pair: Pair) -> None:
    for namespace, peer in ((pair.near, 2), (pair.far, 1)):
        with entered(namespace):
            ip(f"route replace 10.9.{peer}.0/24 via 192.0.2.{peer}")
    near, far = pair.probe(1, 2, direct=True)
    for prober in (near, far):
        path = path_when(prober, lambda path: path.answers == ALL, "all answers")
        assert (path.target.direct, path.target.address[:3], path.cause) == (True, path.target.address[:3], "")
        wait_until(prober.heard.peers, 10, "an answer of the responder, which listens on the underlay's interface")


Scenario = Callable[[Pair], None]


def damaged(command: str) -> Scenario:
    """A command on the near host."""

    def work(pair: Pair) -> None:
        with entered(pair.near):
            sh(*command.split())

    return work


def dropped(*rules: str) -> Scenario:
    """Firewall rules for what comes to the far host."""
    return lambda pair: filtered(pair.far, "input", *rules)


def narrow(pair: Pair) -> None:
    with entered(pair.far):
        chain = "add table netdev t; add chain netdev t c { type filter hook ingress device eth0 priority 0; }"
        sh("nft", f"{chain}; add rule netdev t c meta length > 1377 drop")


FIREWALL = "iifname flannel.1 meta l4proto {} drop"
FINE, LOST = (True, MTU, True), (False, MTU, None)


def without_answers(pair: Pair) -> None:
    """The far host measures too, and its firewall lets in what it has asked for, and no more."""
    filtered(pair.far, "input", "iifname flannel.1 ct direction original drop")
    pair.probe(2)


BETWEEN_TWO: dict[str, tuple[Scenario, str, tuple[bool, int, bool | None], int]] = {
    "FDB entry to another host": (
        damaged("bridge fdb replace 02:00:00:00:01:02 dev flannel.1 dst 192.0.2.99 self permanent"),
        "fdb_wrong", LOST, 0,
    ),
    "no FDB entry": (damaged("bridge fdb del 02:00:00:00:01:02 dev flannel.1 self"), "fdb_wrong", LOST, 0),
    "neighbour entry with another MAC": (
        damaged("ip neigh replace 10.9.2.0 lladdr 02:00:00:00:09:09 dev flannel.1 nud permanent"),
        "neighbour_wrong", LOST, 0,
    ),
    "no route": (damaged("ip route del 10.9.2.0/24"), "route_wrong", LOST, 0),
    "a more exact route of others": (
        damaged("ip route add 10.9.2.0/25 via 192.0.2.77 dev eth0"), "route_foreign", LOST, 0,
    ),
    "a route of others that refuses": (damaged("ip route add blackhole 10.9.2.0/32"), "route_foreign", LOST, 0),
    "device down": (damaged("ip link set flannel.1 down"), "device_down", LOST, 0),
    "device gone": (damaged("ip link del flannel.1"), "device_missing", LOST, 0),
    "a narrow link": (narrow, "path_mtu", (True, 1377 - 50, False), probe.TCP),
    "the tunnels' port closed": (dropped("udp dport 8472 drop"), "port_blocked", LOST, 0),
    "all of the underlay closed": (dropped("iifname eth0 drop"), "underlay_unreachable", LOST, 0),
    "a firewall for UDP": (dropped(FIREWALL.format("udp")), "", FINE, probe.ECHO | probe.TCP),
    "a firewall for TCP": (dropped(FIREWALL.format("tcp")), "", FINE, probe.ECHO | probe.UDP),
    "a firewall for ICMP": (dropped(FIREWALL.format("icmp")), "", FINE, probe.UDP | probe.TCP),
    "a firewall for UDP and TCP": (dropped(FIREWALL.format("{ tcp, udp }")), "", FINE, probe.ECHO),
    "a firewall for all probes": (without_answers, "", (True, MTU, None), 0),
    "an underlay that drops pings": (dropped("iifname eth0 meta l4proto icmp drop"), "", FINE, ALL),
}  # fmt: skip
"""What is done after a while -> cause; reachable, largest packet, whether that is enough; what is still answered."""


def test_each_fault_between_two_hosts_has_its_cause_and_what_is_none_has_none(impatient: None) -> None:
    with ExitStack() as stack:
        probers: dict[str, Prober] = {}
        pairs: dict[str, Pair] = {}
        for name in BETWEEN_TWO:
            near, far = stack.enter_context(two_hosts(stack.enter_context(new_namespace())))
            pairs[name] = Pair(near, far, stack)
        for name, pair in pairs.items():
            (probers[name],) = pair.probe(1)
        for name, prober in probers.items():
            path_when(prober, lambda path: path.answers == ALL, f"all answers before: {name}")
        for name, (scenario, *_) in BETWEEN_TWO.items():
            scenario(pairs[name])

        def verdicts() -> dict[str, tuple[str, tuple[bool, int, bool | None], int]]:
            paths = {name: prober.paths.rows()[0] for name, prober in probers.items()}
            return {name: (p.cause, (p.reachable, p.mtu, p.mtu_verified), p.answers) for name, p in paths.items()}

        expected = {name: tuple(rest) for name, (_, *rest) in BETWEEN_TWO.items()}
        try:
            wait_until(lambda: verdicts() == expected, 30, "the verdicts")
        finally:
            assert verdicts() == expected
        unanswered = [probers[name] for name, (_, cause, _, answers) in BETWEEN_TWO.items() if not cause and answers]
        rounds = [sum(prober.counts.rounds.values()) for prober in unanswered]
        wait_until(lambda: all(sum(prober.counts.rounds.values()) > before + 3
                               for prober, before in zip(unanswered, rounds, strict=True)), 20, "rounds")  # fmt: skip
        assert verdicts() == expected, "and it stays so"


def test_a_nic_that_spoils_checksums_inside_the_tunnel_is_found_by_both_hosts(wired: Pair) -> None:
    assert wired.wire is not None
    wired.wire.unable = frozenset({UDP_CHECKSUM, TCP_CHECKSUM})
    near, far = wired.probe(1, 2)
    for prober, words in ((near, "is answered when its checksum is computed"), (far, "wrong checksums arrived here")):
        path = path_when(prober, lambda path: path.cause, "a verdict")
        assert (path.cause, path.reachable, path.mtu_verified) == ("checksum_offload", True, True)
        assert any(words in line for line in path.evidence)
    wired.wire.unable = frozenset()
    path_when(near, lambda path: not path.cause, "recovery")


# --- what is not meant well ---


def exchange(namespace: int, source: str, target: str, datagrams: Sequence[bytes], port: int = 0) -> list[bytes]:
    """What comes back for these within a moment, to a socket in the namespace."""
    with entered(namespace), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((source, port))
        sock.settimeout(0.1)
        found: list[bytes] = []
        for datagram in datagrams:
            sock.sendto(datagram, (target, PORT))
        try:
            while True:
                found.append(sock.recv(65535))
        except (TimeoutError, ConnectionRefusedError):
            return found


def test_the_responder_answers_peers_with_no_more_than_was_asked_and_nothing_else(pair: Pair) -> None:
    (far,) = pair.probe(2)
    question = encode_question(Question(7, 8), 200)

    def answered() -> list[bytes]:
        return exchange(pair.near, "10.9.1.0", "10.9.2.0", [question])

    (answer,) = wait_until(answered, 10, "an answer")
    assert probe.decode_answer(answer)[:3] == (7, 8, Health(True, 1, 0, 0))
    assert len(answer) <= 200
    for size in (probe.SMALLEST, 39, 40, 57, 58):
        assert all(len(each) <= size for each in exchange(
            pair.near, "10.9.1.0", "10.9.2.0", [encode_question(Question(7, 8), size)]))  # fmt: skip
    hostile = [
        b"", b"OAgP", os.urandom(100), question[:20], question[:5] + b"\x02" + question[6:], bytes(1422),
        question[:24] + b"\xff" * 4, encode_answer(Question(1, 2), Health(True, 1, 0, 0), (), 1422),
    ]  # fmt: skip
    assert exchange(pair.near, "10.9.1.0", "10.9.2.0", hostile) == []
    # A pod of the peer's, and whoever comes over the underlay.
    with entered(pair.near):
        ip("addr add 10.9.1.5/32 dev lo")
    assert exchange(pair.near, "10.9.1.5", "10.9.2.0", [question]) == []
    assert exchange(pair.near, "192.0.2.1", "192.0.2.2", [question]) == []
    assert far.counts.questions["stranger"] >= 1
    assert far.counts.questions["malformed"] >= 1


def test_more_questions_than_a_second_allows_are_left_to_the_kernel(pair: Pair) -> None:
    (far,) = pair.probe(2)
    question = encode_question(Question(7, 8), 100)
    wait_until(lambda: exchange(pair.near, "10.9.1.0", "10.9.2.0", [question]), 10, "an answer")
    assert len(exchange(pair.near, "10.9.1.0", "10.9.2.0", [question] * 1000)) < 300
    assert far.counts.questions["limited"] >= 1
    # And then it goes on.
    wait_until(lambda: exchange(pair.near, "10.9.1.0", "10.9.2.0", [question]), 10, "an answer")


def test_answers_that_nobody_asked_for_change_nothing(pair: Pair) -> None:
    (prober,) = pair.probe(1)
    path_when(prober, lambda path: path.answers == ALL, "all answers")
    with entered(pair.near):
        lines = sh("ss", "-Hunap", "src", "10.9.1.0").splitlines()
    ports = {int(line.split()[3].rpartition(":")[2]) for line in lines} - {PORT}
    (port,) = ports
    row = probe.Row(bytes((10, 9, 2, 0)), bytes((10, 9, 1, 0)), None, 100, 0, 0, "peer_down")
    forged = [encode_answer(Question(token, 8), Health(False, 9, 9, 9), [row], 1400) for token in range(50)]
    with entered(pair.far), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("10.9.2.0", PORT))
        for datagram in (*forged, *(struct.pack("!4sBB", b"OAgP", 1, 2) + os.urandom(size) for size in range(99))):
            sock.sendto(datagram, ("10.9.1.0", port))
    rounds = prober.counts.rounds["answered"]
    wait_until(lambda: prober.counts.rounds["answered"] > rounds + 2, 10, "further rounds")
    assert (prober.heard.peers(), prober.heard.rows(time.monotonic())) == ([], [])
    assert prober.paths.rows()[0].cause == ""


def test_probes_keep_few_ports_and_no_connections_and_nothing_is_masqueraded(pair: Pair) -> None:
    with entered(pair.near):
        sh("nft", "add table ip n; add chain ip n p { type nat hook postrouting priority srcnat; }; "
                  "add rule ip n p ip saddr 10.9.0.0/16 ip daddr 10.9.0.0/16 return; "
                  "add rule ip n p ip saddr 10.9.0.0/16 counter masquerade")  # fmt: skip
    near, far = pair.probe(1, 2)
    path_when(near, lambda path: path.answers == ALL, "all answers")
    wait_until(lambda: near.counts.rounds["answered"] > 4, 20, "some rounds")
    with entered(pair.near):
        assert "counter packets 0" in sh("nft", "list", "chain", "ip", "n", "p")
        sockets = [line for line in sh("ss", "-Htan").splitlines() if "LISTEN" not in line]
    assert len(sockets) <= 1
    assert far.counts.questions["stranger"] == 0


def test_a_port_that_is_taken_is_said_once_and_probes_go_on(pair: Pair) -> None:
    with entered(pair.near), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("10.9.1.0", PORT))
        with structlog.testing.capture_logs() as logs:
            (prober,) = pair.probe(1)
            path_when(prober, lambda path: path.answers == ALL, "all answers")
            wait_until(lambda: prober.counts.rounds["answered"] > 3, 20, "some rounds")
        assert [entry["event"] for entry in logs] == ["probe_port_taken"]
    wait_until(lambda: exchange(pair.far, "10.9.2.0", "10.9.1.0", [encode_question(Question(1, 2), 99)]), 10, "answers")

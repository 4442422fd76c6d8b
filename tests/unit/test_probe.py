"""Probes without sockets: the datagram, who is next, what is remembered, and every verdict."""

import random
from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay import probe
from overlay.probe import (
    ALL,
    CAUSES,
    ECHO,
    FINE,
    SILENT,
    TCP,
    UDP,
    UNKNOWN,
    Answer,
    Evidence,
    Health,
    Heard,
    Malformed,
    Paths,
    Question,
    Row,
    Target,
    Turns,
    decode_answer,
    decode_question,
    encode_answer,
    encode_question,
    explained,
    narrowed,
    ring_neighbours,
    sizes_between,
    token_of,
    verdict,
)
from subnet_lease.model import Prefix

HEALTH = Health(True, 14_999, 3, 2)

u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
questions = st.builds(Question, u64, u64, st.sampled_from((UNKNOWN, FINE, SILENT)), u16)


def rows_of(size: int) -> st.SearchStrategy[Row]:
    address = st.binary(min_size=size, max_size=size)
    time = st.none() | st.integers(0, 10**9).map(lambda us: us / 1e6)
    return st.builds(Row, address, address, time, st.integers(0, 100), u16, u16, st.sampled_from(CAUSES))


# --- the datagram ---


@given(questions, st.integers(0, 9000))
def test_a_question_comes_through_as_it_is_and_as_large_as_asked_for(question: Question, size: int) -> None:
    datagram = encode_question(question, size)
    assert len(datagram) == max(size, probe.SMALLEST)
    assert decode_question(datagram) == question
    assert token_of(datagram[: probe.HEAD.size]) == question.token


@given(questions, st.builds(Health, st.booleans(), u32, u32, u16), st.sampled_from((4, 16)).flatmap(
    lambda size: st.lists(rows_of(size), max_size=9)), st.integers(0, 700))  # fmt: skip
def test_an_answer_has_the_rows_that_fit_and_is_no_larger_than_its_room(
    question: Question, health: Health, rows: list[Row], room: int
) -> None:
    datagram = encode_answer(question, health, rows, room)
    assert len(datagram) <= room
    if room < 40:
        assert datagram == b""
        return
    answer = decode_answer(datagram)
    size = {4: 18, 16: 42}[len(rows[0].source) if rows else 4]
    assert answer[:3] == (question.token, question.clock, health)
    assert len(answer.rows) == min(len(rows), (room - 40) // size)
    for found, row in zip(answer.rows, rows, strict=False):
        assert found.rtt == (None if row.rtt is None else pytest.approx(row.rtt, abs=2e-6))
        assert found._replace(rtt=None) == row._replace(rtt=None)


def test_an_answer_holds_one_family_and_values_that_do_not_fit_are_cut() -> None:
    first = Row(bytes(4), b"\x0a\x00\x00\x01", 1e6, 0, 1450, 1 << 20, "")
    other = Row(bytes(16), bytes(16), None, 100, 0, 0, "peer_down")
    mixed = Row(bytes(4), bytes(16), None, 100, 0, -3, "peer_down")
    datagram = encode_answer(Question(1, 2), Health(False, 1 << 40, 1 << 40, 1 << 20), [first, other, mixed], 1422)
    answer = decode_answer(datagram)
    assert answer.rows == (first._replace(rtt=pytest.approx(4294.967294), age=0xFFFF),)
    assert answer.health == Health(False, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFF)
    assert decode_question(encode_question(Question(1, 2, FINE, 1 << 20), 0)).age == 0xFFFF


@given(st.binary(max_size=200))
def test_whatever_arrives_is_decoded_or_malformed(datagram: bytes) -> None:
    for head in (b"", b"OAgP\x01\x01\0\0", b"OAgP\x01\x02\0\0"):
        for decode in (decode_question, decode_answer):
            try:
                decode(head + datagram)
            except Malformed:
                continue
        token_of(head + datagram)


def altered(datagram: bytes, at: int, value: int) -> bytes:
    return datagram[:at] + bytes((value,)) + datagram[at + 1 :]


def test_datagrams_that_no_agent_sends_are_malformed() -> None:
    question = encode_question(Question(7, 8), 100)
    row = Row(bytes(4), bytes(4), None, 0, 0, 0, "")
    answer = encode_answer(Question(7, 8), HEALTH, [row], 100)
    refused = [
        *((decode_question, altered(question, at, 9)) for at in (0, 4, 5, 7, 24)),
        (decode_question, question[:27]),
        (decode_question, answer),
        (decode_answer, question),
        (decode_answer, answer[:39]),
        (decode_answer, answer[:-1]),
        *((decode_answer, altered(answer, at, 9)) for at in (24, 25, 27)),
        (decode_answer, altered(answer, len(answer) - 2, 101)),
    ]
    for decode, datagram in refused:
        with pytest.raises(Malformed):
            decode(datagram)
    assert decode_answer(altered(answer, len(answer) - 1, 255)) == Answer(7, 8, HEALTH, ()), "a cause yet to come"
    assert token_of(question[:20]) is None
    assert token_of(b"\0" * 40) is None


# --- who is next ---


@pytest.mark.parametrize(("limit", "count"), [(1, 4), (4, 4), (5, 4), (100, 4), (1000, 7), (15_000, 4)])
def test_all_peers_have_had_their_turn_before_one_has_it_again(limit: int, count: int) -> None:
    turns = Turns(random.Random(1).randrange)
    taken = [turns.take(count, limit) for _ in range(-(-limit // count))]
    assert all(len(set(each)) == len(each) == min(count, limit) for each in taken)
    seen = [number for each in taken for number in each]
    assert set(seen[:limit]) == set(range(limit))


def test_the_order_of_turns_differs_from_round_to_round_and_from_host_to_host() -> None:
    def order(turns: Turns) -> list[int]:
        return [turns.take(1, 50)[0] for _ in range(50)]

    one, other = Turns(random.Random(1).randrange), Turns(random.Random(2).randrange)
    assert len({tuple(order(turns)) for turns in (one, one, other, other)}) == 4


def test_every_pair_is_covered_in_time_while_peers_come_and_go() -> None:
    chance = random.Random(3)
    turns = Turns(chance.randrange)
    peers = list(range(300))
    never, unseen = set(range(300)), 0
    for interval in range(300):
        peers.pop(chance.randrange(len(peers)))
        peers.insert(chance.randrange(len(peers)), 300 + interval)
        never |= {300 + interval}
        never -= {peers[number] for number in turns.take(4, len(peers))}
        never &= set(peers)
        unseen = len(never)
    # Of 300, of which a third is new in the time that one round takes.
    assert unseen < 120


def neighbours(own: str, *others: str) -> set[str]:
    return set(ring_neighbours(Prefix.parse(own), [(Prefix.parse(each), each) for each in others]))


def test_ring_neighbours_are_the_subnets_next_to_ours() -> None:
    a, b, c, d = (f"10.244.{number}.0/24" for number in (3, 7, 9, 200))
    assert neighbours(b, d, a, c) == {a, c}
    assert neighbours(a, d, b, c) == {b, d}, "the ring closes"
    assert neighbours(d, b, c, a) == {c, a}
    assert neighbours(a, b) == {b}
    assert neighbours(a) == set()


@given(st.sets(st.integers(0, 255), min_size=2, max_size=40))
def test_whom_a_host_has_as_neighbour_has_it_as_neighbour_too(numbers: set[int]) -> None:
    named = [(Prefix(bytes((10, 244, number, 0)), 24), str(number)) for number in numbers]
    ring = {name: set(ring_neighbours(own, [each for each in named if each[1] != name])) for own, name in named}
    assert all(name in ring[other] for name, others in ring.items() for other in others)
    assert all(len(others) == min(2, len(numbers) - 1) for others in ring.values())


# --- verdicts ---

ANSWERS = ("small", "echo", "udp", "tcp", "finished", "spoiled", "says_fine")
AROUND = ("heard", "complains", "arrived", "underlay", "route", "on_link", "tunnel")
SILENCE = Evidence(1450)


@pytest.mark.parametrize(
    ("evidence", "cause"),
    [
        # Nothing in the tunnel.
        (SILENCE._replace(underlay=True), "port_blocked"),
        (SILENCE._replace(underlay=True, left=True), "port_blocked"),
        (SILENCE._replace(underlay=True, left=False), "port_blocked_out"),
        (SILENCE._replace(underlay=True, left=False, arrived=True), "port_blocked"),
        (SILENCE._replace(underlay=True, arrived=True), "port_blocked_in"),
        (SILENCE._replace(underlay=True, complains=True), "port_blocked_in"),
        (SILENCE._replace(underlay=True, heard=True), "port_blocked_out"),
        (SILENCE._replace(underlay=True, heard=True, arrived=True), "port_blocked_out"),
        # The same over an underlay that drops pings.
        (SILENCE._replace(heard=True), "port_blocked_out"),
        (SILENCE._replace(arrived=True), "port_blocked_in"),
        (SILENCE._replace(complains=True), "peer_down"),
        # Nothing at all.
        (SILENCE._replace(next_hop=False), "peer_down"),
        (SILENCE._replace(next_hop=False, others=True), "peer_down"),
        (SILENCE._replace(next_hop=False, others=False), "underlay_unreachable"),
        (SILENCE._replace(next_hop=True, others=True), "underlay_unreachable"),
        (SILENCE._replace(next_hop=None, others=True), "peer_down"),
        (SILENCE._replace(next_hop=True), "underlay_unreachable"),
        (SILENCE._replace(route=False, next_hop=False), "underlay_unreachable"),
        (SILENCE._replace(on_link=False, next_hop=True, others=True), "peer_down"),
        (SILENCE._replace(on_link=False, next_hop=True, others=False), "underlay_unreachable"),
        (SILENCE._replace(on_link=False, next_hop=True), "underlay_unreachable"),
        (SILENCE._replace(on_link=False, next_hop=False, others=True), "underlay_unreachable"),
        (SILENCE._replace(left=False, next_hop=False), "peer_down"),
        # Our own doing.
        (SILENCE._replace(entry="fdb_wrong", underlay=True), "fdb_wrong"),
        (SILENCE._replace(entry="route_foreign", next_hop=False), "route_foreign"),
        # Without a tunnel.
        (SILENCE._replace(tunnel=False, underlay=True), "underlay_unreachable"),
        (SILENCE._replace(tunnel=False, next_hop=False), "peer_down"),
        # The peer says that it is answered: its firewall drops our questions.
        (SILENCE._replace(says_fine=True, heard=True, underlay=True), ""),
        # Something passes.
        (SILENCE._replace(small=True, tcp=True), "path_mtu"),
        (SILENCE._replace(small=True), "path_mtu"),
        (SILENCE._replace(tcp=True), ""),
        (SILENCE._replace(small=True, echo=True, tcp=True), ""),
        (SILENCE._replace(small=True, udp=True, tcp=True), ""),
        (SILENCE._replace(small=True, echo=True), ""),
        (SILENCE._replace(small=True, echo=True, finished=True), "checksum_offload"),
        (SILENCE._replace(small=True, echo=True, tcp=True, finished=True), "checksum_offload"),
        (SILENCE._replace(small=True, finished=True), "checksum_offload"),
        (SILENCE._replace(small=True, echo=True, spoiled=True), "checksum_offload"),
        (SILENCE._replace(small=True, echo=True, tcp=True, spoiled=True), ""),
        (SILENCE._replace(small=True, echo=True, udp=True, tcp=True, finished=True, spoiled=True), ""),
    ],
    ids=str,
)
def test_what_is_seen_has_one_cause(evidence: Evidence, cause: str) -> None:
    assert verdict(evidence) == cause


def test_every_combination_of_answers_has_its_verdict() -> None:
    for flags in product((False, True), repeat=len(ANSWERS)):
        evidence = Evidence(1450, underlay=True, **dict(zip(ANSWERS, flags, strict=True)))
        cause = verdict(evidence)
        if evidence.udp and (evidence.echo or evidence.tcp):
            assert not cause, "what arrives whole and right is no fault"
        if evidence.passes or evidence.says_fine:
            assert cause in ("", "path_mtu", "checksum_offload")
        else:
            assert cause == "port_blocked"


def test_every_combination_of_silence_has_its_verdict() -> None:
    for flags in product((False, True), repeat=len(AROUND)):
        for left, next_hop, others, entry in product(
            (None, False, True), (None, False, True), (None, False, True), ("", "fdb_wrong")
        ):
            evidence = Evidence(1450, left=left, next_hop=next_hop, others=others, entry=entry)
            evidence = evidence._replace(**dict(zip(AROUND, flags, strict=True)))
            cause = verdict(evidence)
            assert cause in CAUSES[1:6] if not entry else cause == entry
            assert evidence.tunnel or not cause.startswith("port_")
            # Whoever was heard of is not down.
            assert (
                cause != "peer_down"
                or not (evidence.underlay or evidence.heard or evidence.arrived)
                or not evidence.tunnel
            )


def test_what_was_seen_is_put_into_words() -> None:
    target = a_target(7)
    for flags in product((False, True), repeat=3):
        evidence = Evidence(1450, small=True, **dict(zip(("echo", "udp", "tcp"), flags, strict=True)))
        lines = explained(evidence, target)
        assert len(lines) == 1 if all(flags) or not any(flags) else 2
    words = " ".join(
        line
        for evidence in (
            SILENCE._replace(small=True, tcp=True, largest=1350),
            SILENCE._replace(echo=True, finished=True, spoiled=True),
            SILENCE._replace(next_hop=False, route=False, others=True),
            SILENCE._replace(next_hop=False, on_link=False, others=False, left=False, arrived=True),
            SILENCE._replace(underlay=True, says_fine=True, heard=True, arrived=True, complains=True),
            SILENCE._replace(heard=True),
        )
        for line in explained(evidence, target)
    )
    for phrase in (
        "10.244.7.0 answers TCP",
        "1350 bytes are the most that pass, of 1450",
        "when its checksum is computed by the kernel",
        "wrong checksums arrived",
        "no route to 172.30.0.7",
        "nobody on the link answers for 172.30.0.7",
        "nobody on the link answers for the router to 172.30.0.7",
        "other hosts answer",
        "other hosts do not answer either",
        "172.30.0.7 answers beside the tunnel",
        "its own packets are answered",
        "come out of the tunnel",
        "no tunnel packet to it leaves",
        "arrive on the wire",
        "hears this host and is not heard",
    ):
        assert phrase in words


# --- the largest packet ---


@given(st.integers(128, 1449), st.integers(3, 10))
def test_the_largest_size_that_passes_is_found_by_halving_between(limit: int, number: int) -> None:
    evidence = Evidence(1450, small=True)
    for _ in range(12):
        sizes = sizes_between(evidence.largest or 128, evidence.fails or 1450, number)
        if not sizes:
            break
        evidence = narrowed(evidence, {size: size <= limit for size in sizes}, 128)
    assert evidence.largest or limit == 128
    assert abs((evidence.largest or 128) - limit) <= 0


def test_a_size_that_was_lost_by_chance_does_not_end_the_search() -> None:
    evidence = narrowed(Evidence(1450, small=True), {400: True, 600: False, 800: True, 1200: False}, 128)
    assert (evidence.largest, evidence.fails) == (800, 1200)
    evidence = narrowed(evidence, {900: True, 1100: True}, 128)
    assert (evidence.largest, evidence.fails) == (1100, 1200)


# --- what is remembered ---


def a_target(number: int, **other: object) -> Target:
    subnet = Prefix(bytes((10, 244, number, 0)), 24)
    usual = Target(
        f"10.244.{number}.0-24", (subnet,), bytes((10, 244, 1, 0)), subnet.base, bytes((172, 30, 0, number)), 5, False,
        1450,
    )  # fmt: skip
    return usual._replace(**other)


def test_a_path_that_answers_is_known_with_its_times_and_its_mtu() -> None:
    paths, target = Paths(), a_target(2)
    assert target.address not in paths
    for number, rtt in enumerate((0.003, 0.001, 0.002)):
        assert paths.round(target, ALL, rtt, 10.0 + number)
    (path,) = paths.rows()
    assert (path.target, path.reachable, path.rtt, path.rtt_median, path.loss) == (target, True, 0.001, 0.002, 0.0)
    assert (path.mtu, path.mtu_verified, path.mtu_when, path.answers, path.cause) == (1450, True, 12.0, ALL, "")
    assert (path.since, path.when, len(paths), target.address in paths) == (10.0, 12.0, 1, True)


def test_loss_is_of_the_latest_packets() -> None:
    paths, target = Paths(), a_target(2)
    paths.round(target, ECHO | UDP, 0.001, 1.0)
    assert paths.rows()[0].loss == pytest.approx(1 / 3)
    for _ in range(100):
        paths.round(target, ALL, 0.001, 1.0)
    assert paths.rows()[0].loss == 0
    assert paths.rows()[0].rtt_median == 0.001
    for _ in range(8):
        paths.round(target, 0, None, 1.0)
    assert paths.rows()[0].loss == pytest.approx(1 / 2)


def test_one_round_that_is_not_answered_is_no_verdict() -> None:
    paths, target = Paths(), a_target(2)
    assert paths.round(target, ALL, 0.001, 1.0)
    assert not paths.round(target, 0, None, 2.0)
    assert (paths.rows()[0].reachable, paths.cause(target.address)) == (True, "")
    assert paths.round(target, ALL, 0.001, 3.0)


def test_a_verdict_lasts_until_the_path_answers_as_usual_again() -> None:
    paths, target = Paths(), a_target(2)
    paths.round(target, ALL, 0.001, 1.0)
    paths.round(target, 0, None, 2.0)
    assert paths.failing() == []
    assert paths.conclude(target, SILENCE._replace(underlay=True, arrived=True), 5.0) == "port_blocked_in"
    assert paths.failing() == paths.rows()
    (path,) = paths.rows()
    assert (path.reachable, path.cause, path.since, path.answers) == (False, "port_blocked_in", 5.0, 0)
    assert paths.evidence(target.address) == path.evidence != ()
    assert path.mtu_verified is None
    assert (paths.troubled(9), paths.answered(target.address), paths.narrow(target.address)) == ([target.key], 0, 0)
    assert paths.causes() == {"port_blocked_in": 1}
    assert paths.silent_since(target.address, 6.0, 30.0) == 2.0
    assert paths.silent_since(target.address, 100.0, 30.0) == 70.0, "what was seen long ago counts no more"
    assert paths.arrived_since(target.address, 5.0) and not paths.arrived_since(target.address, 6.0)
    paths.round(target, 0, None, 7.0)
    paths.conclude(target, SILENCE._replace(underlay=True, arrived=True), 8.0)
    assert paths.rows()[0].since == 5.0
    paths.round(target, ALL, 0.001, 9.0)
    assert (paths.rows()[0].since, paths.cause(target.address), paths.evidence(target.address)) == (9.0, "", ())
    assert paths.silent_since(target.address, 10.0, 30.0) == 10.0
    assert paths.causes() == {} and paths.troubled(9) == []


def test_what_a_peer_never_answers_is_not_asked_about_again_and_is_no_loss() -> None:
    paths, target = Paths(), a_target(2)
    assert not paths.round(target, ECHO, 0.001, 1.0)
    assert paths.conclude(target, Evidence(1450, small=True, echo=True), 4.0) == ""
    assert paths.rows()[0].loss == 0
    assert paths.round(target, ECHO, 0.001, 5.0)
    assert paths.conclude(target, Evidence(1450, small=True, echo=True), 6.0) == ""
    assert (paths.rows()[0].reachable, paths.rows()[0].loss) == (True, 0)
    assert not paths.round(target, TCP, 0.001, 6.0), "less than it answers as a rule"
    assert paths.round(target, ALL, 0.001, 7.0)
    assert not paths.round(target, ECHO, 0.001, 8.0), "it does answer all, after all"


def test_a_narrow_path_is_known_with_what_passes() -> None:
    paths, target = Paths(), a_target(2)
    paths.round(target, TCP, 0.001, 1.0)
    assert paths.conclude(target, Evidence(1450, small=True, tcp=True, largest=1350), 4.0) == "path_mtu"
    (path,) = paths.rows()
    assert (path.reachable, path.mtu, path.mtu_verified, path.mtu_when) == (True, 1350, False, 4.0)
    assert (paths.answered(target.address), paths.narrow(target.address)) == (TCP, 1350)
    assert (paths.answered(b"none"), paths.narrow(b"none")) == (0, 0)
    paths.round(target, ALL, 0.001, 5.0)
    assert paths.rows()[0].mtu_verified is True


def test_a_peer_whose_firewall_drops_all_probes_is_reachable_by_its_own_word() -> None:
    paths, target = Paths(), a_target(2)
    paths.round(target, 0, None, 1.0)
    assert paths.conclude(target, SILENCE._replace(says_fine=True, heard=True), 4.0) == ""
    assert paths.rows()[0].reachable
    assert not paths.round(target, 0, None, 5.0)


def test_paths_are_as_many_as_there_is_room_for_and_those_of_peers() -> None:
    paths = Paths(most=3)
    for number in (2, 3, 4, 2, 5):
        paths.round(a_target(number), ALL, 0.001, float(number))
    assert [path.target.address[2] for path in paths.rows()] == [4, 2, 5]
    assert paths.underlays(2) == [bytes((172, 30, 0, 5)), bytes((172, 30, 0, 2))]
    paths.forget(lambda key: key == "10.244.2.0-24")
    assert [path.target.address[2] for path in paths.rows()] == [4, 5]
    assert (paths.cause(b"none"), paths.evidence(b"none"), paths.arrived_since(b"none", 0)) == ("", (), False)


def test_a_question_tells_what_was_found_of_the_path_before() -> None:
    paths, target = Paths(), a_target(2)
    assert paths.state(target.address, 1.0) == (UNKNOWN, 0)
    paths.round(target, ALL, 0.001, 1.0)
    assert paths.state(target.address, 3.5) == (FINE, 3)
    paths.round(target, 0, None, 4.0)
    paths.conclude(target, SILENCE, 4.0)
    assert paths.state(target.address, 4.0) == (SILENT, 1)


def test_a_summary_begins_with_what_is_wrong_and_goes_on_with_what_is_fresh() -> None:
    paths = Paths()
    for number in (2, 3, 4):
        paths.round(a_target(number), ALL, 0.001, float(number))
    six = a_target(6, address=bytes(16), source=bytes(16))
    paths.round(six, ALL, 0.001, 5.0)
    paths.round(a_target(2), 0, None, 6.0)
    paths.conclude(a_target(2), SILENCE._replace(underlay=True), 6.0)
    paths.round(a_target(4), ALL, 0.001, 7.0)
    own = bytes((10, 244, 1, 0))
    rows = paths.summary(10.0, 2, 4)
    assert rows == [
        Row(own, a_target(2).address, None, 50, 0, 4, "port_blocked"),
        Row(own, a_target(4).address, 0.001, 0, 1450, 3, ""),
    ]
    assert [row.target for row in paths.summary(10.0, 9, 16)] == [bytes(16)]


# --- what peers say ---

ME, A, B, C = (bytes((10, 244, number, 0)) for number in (1, 2, 3, 4))


def told(*rows: Row) -> bytes:
    return encode_answer(Question(1, 2), HEALTH, rows, 1422)


def row(source: bytes, target: bytes, cause: str = "", age: int = 0) -> Row:
    return Row(source, target, None if cause else 0.001, 0, 1450, age, cause)


def test_a_peer_is_believed_about_its_own_paths_alone() -> None:
    heard = Heard()
    heard.answered(A, ME, told(row(A, B, age=3), row(A, C), row(B, C, "peer_down")), 10.0)
    assert heard.rows(15.0) == [row(A, B, age=8), row(A, C, age=5)]
    assert heard.peers() == [probe.Peer(A, HEALTH, 10.0)]


def test_the_latest_answer_of_each_peer_counts_and_the_oldest_makes_room() -> None:
    heard = Heard(most=2)
    heard.answered(A, ME, told(row(A, B)), 1.0)
    heard.answered(B, ME, told(), 2.0)
    heard.answered(A, ME, told(row(A, C)), 3.0)
    heard.answered(C, ME, told(), 4.0)
    assert [peer.address for peer in heard.peers()] == [A, C]
    assert heard.rows(4.0) == [row(A, C, age=1)]


def test_a_complaint_is_passed_on_to_whom_it_is_about_and_believed_by_it() -> None:
    between, deaf = Heard(), Heard()
    between.answered(A, C, told(row(A, B, "port_blocked_out", 2)), 10.0)
    assert between.complaints(ME, 11.0) == []
    assert between.complaints(B, 100.0) == [], "it is old by then"
    (passed,) = between.complaints(B, 11.0)
    assert (passed.source, passed.target, passed.age) == (A, B, 3)
    assert not deaf.complains(A, B, 0.0)
    deaf.answered(C, B, told(passed, row(A, ME, "port_blocked_out")), 50.0)
    assert deaf.complains(A, B, 47.0) and not deaf.complains(A, B, 48.0)
    assert not deaf.complains(A, ME, 0.0), "what a third says of others' paths is not its business"


def test_whoever_asks_is_heard_and_may_say_that_it_is_answered() -> None:
    heard = Heard()
    assert heard.voice(A, 1.0) == (False, False)
    heard.asked(A, Question(1, 2, SILENT, 0), 10.0)
    assert heard.voice(A, 10.0) == (True, False)
    assert heard.voice(A, 10.5) == (False, False)
    heard.asked(A, Question(1, 2, FINE, 3), 12.0)
    assert heard.voice(A, 9.0) == (True, True)
    assert heard.voice(A, 9.5) == (True, False), "it was answered before what we are asked about"


def test_tables_may_be_read_while_they_are_written() -> None:
    class Changing(dict[bytes, tuple[float, bytes]]):
        tries = 0

        def items(self):  # type: ignore[no-untyped-def]
            self.tries += 1
            if self.tries == 1:
                raise RuntimeError("dictionary changed size during iteration")
            return super().items()

    heard = Heard()
    heard._answers = Changing({A: (1.0, told())})  # type: ignore[assignment]
    assert len(heard.peers()) == 1


def test_random_draws_are_asked_for_and_not_reached_for() -> None:
    asked: list[int] = []

    def draw(limit: int) -> int:
        asked.append(limit)
        return limit - 1

    make: Callable[[], Turns] = lambda: Turns(draw)  # noqa: E731
    assert make().take(2, 5) == make().take(2, 5)
    assert asked == [8, 2, 8] * 2

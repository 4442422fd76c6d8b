"""Doctor's checks, as values: facts go in, findings come out; what cannot be known is neither passed nor failed."""

from pathlib import Path as Path_

import pytest

from overlay import causes, doctor
from overlay.causes import Finding
from overlay.device import FoundDevice, Underlay
from overlay.doctor import (
    Agent,
    Certificate,
    Entries,
    Etcd,
    Facts,
    Guarded,
    Host,
    Kernel,
    Leases,
    Leftover,
    Links,
    Path,
    Refusing,
    Rival,
    Setting,
    Strict,
    Tunnel,
    Way,
)
from overlay.model import Drop, Fdb, Guard, Neighbour, Put, Route
from subnet_lease.model import Lease, LeaseAttrs, Prefix, Vtep, pack_address
from subnet_lease.table import Reason

UNDERLAY = Underlay("eth0", 2, 1500, (pack_address("172.30.0.11"),), (), (), "the default route")


def lease(number: int, **extra: object) -> Lease:
    attrs = LeaseAttrs(
        pack_address(f"172.30.0.{10 + number}"), "vxlan", Vtep(1, bytes((2, 0, 0, 0, 0, number))), extra=dict(extra)
    )
    return Lease(Prefix.parse(f"10.244.{number}.0/24"), None, attrs, 7, number, number)


OWN, PEER, OTHER = lease(1), lease(2, NodeName="h2"), lease(3)
SOUND = Facts(
    Host(),
    Agent(42),
    Etcd("http://172.30.0.1:2379", "/net", skew_s=0.0),
    Leases("/net", OWN, (PEER, OTHER), left_s=80_000, margin_s=3600, ranges=(("10.244.0.0/16", 255, 3),)),
    Links(UNDERLAY, tunnels=(Tunnel("flannel.1", FoundDevice(3, "flannel.1", "vxlan", b"", 1450, True), "eth0"),)),
    Entries(devices={3: "flannel.1"}),
    Kernel((Prefix.parse("10.244.0.0/16"),), 8472),
    Guarded({"strangers": 0}),
    (),
    (),
)


def named(**changes: object) -> list[Finding]:
    from dataclasses import replace

    return doctor.examine(replace(SOUND, **changes)).findings


def causes_of(**changes: object) -> list[tuple[str, str]]:
    return [(finding.cause, finding.subject) for finding in named(**changes)]


def test_host_in_order_has_no_finding_and_passes_every_check() -> None:
    report = doctor.examine(SOUND)
    assert report.findings == []
    assert report.unknown == []
    assert report.passed == list(doctor.CHECKS)


def test_what_could_not_be_read_is_neither_passed_nor_failed() -> None:
    report = doctor.examine(Facts(unknown={"leases": "etcd did not tell them"}))
    assert (report.findings, report.passed) == ([], [])
    assert {reason for check, reason in report.unknown if check.needs == "leases"} == {"etcd did not tell them"}
    assert {reason for check, reason in report.unknown if check.needs == "host"} == {"it could not be read"}


def test_privileges_that_lack_are_named_of_whom_they_lack() -> None:
    (own,) = named(host=Host(("CAP_NET_RAW",)))
    assert own.cause == "no_privilege"
    assert "`--cap-add NET_RAW`" in causes.remedy(own)
    (agents,) = named(agent=Agent(42, lacking=("CAP_NET_ADMIN", "CAP_NET_RAW")))
    assert causes.what(agents) == "the agent lacks CAP_NET_ADMIN and CAP_NET_RAW"


def test_missing_features_come_with_their_own_remedies() -> None:
    (found,) = named(host=Host((), (("this kernel has no VXLAN", "load it"),)))
    assert (found.cause, causes.what(found), causes.remedy(found)) == (
        "kernel_feature_missing",
        "this kernel has no VXLAN",
        "load it",
    )


def test_agent_that_is_not_there_stalled_or_not_alone_is_named() -> None:
    assert causes_of(agent=Agent(None)) == [("agent_not_running", "")]
    assert causes_of(agent=Agent(42, "no pass for 40 s")) == [("agent_stalled", "")]
    rival = Rival(43, "flanneld", "flanneld --iface eth0")
    (found,) = named(agent=Agent(42, rivals=(rival,)))
    assert (found.cause, found.subject, found.evidence) == (
        "second_agent",
        "process 43",
        ("43 flanneld --iface eth0",),
    )


def test_options_disk_and_what_the_agent_says_itself_are_named() -> None:
    told = Finding("checksum_offload", what="on: TCP is lost")
    agent = Agent(42, options=("/etc/x.toml", "it is not TOML"), unwritable=(("/var/x", "full"),), told=(told,))
    assert causes_of(agent=agent) == [("options_unreadable", ""), ("journal_failing", ""), ("checksum_offload", "")]


@pytest.mark.parametrize("failure", ["etcd_unreachable", "etcd_denied", "etcd_certificate"])
def test_etcd_that_fails_is_named_once_and_what_it_would_tell_is_not_known(failure: str) -> None:
    report = doctor.examine(Facts(etcd=Etcd("http://e", "/net", failure, "why")))
    assert [(finding.cause, finding.evidence) for finding in report.findings] == [(failure, ("why",))]
    assert {check.name for check, _ in report.unknown} >= {"clock", "config"}


def test_configuration_is_missing_unusable_or_not_in_use() -> None:
    etcd = Etcd("http://e", "/net", skew_s=0.0)
    assert causes_of(etcd=etcd._replace(config=False)) == [("config_missing", "")]
    assert causes_of(etcd=etcd._replace(unusable="Network: none")) == [("config_unusable", "")]
    (found,) = named(etcd=etcd._replace(changes=("Backend.VNI: 1 -> 2",)))
    assert (found.cause, found.evidence) == ("config_needs_restart", ("Backend.VNI: 1 -> 2",))


@pytest.mark.parametrize(("skew", "side"), [(90.0, "ahead of"), (-90.0, "behind")])
def test_clock_that_is_off_is_named_with_its_side(skew: float, side: str) -> None:
    (found,) = named(etcd=Etcd("http://e", "/net", skew_s=skew))
    assert found.cause == "clock_skew"
    assert f"90 s {side} the date" in found.evidence[0]


@pytest.mark.parametrize(("days", "words"), [(3.0, "ends in 3 days"), (-2.0, "ended 2 days ago")])
def test_certificates_are_told_two_weeks_ahead(days: float, words: str) -> None:
    some = Certificate("/ca.pem", 15 * 86400), Certificate("/agent.pem", days * 86400)
    (found,) = named(etcd=Etcd("https://e", "/net", skew_s=0.0, certificates=some))
    assert (found.cause, found.subject) == ("etcd_certificate", "/agent.pem")
    assert causes.what(found) == f"the certificate /agent.pem {words}"


def test_own_lease_is_lost_or_about_to_end() -> None:
    leases = SOUND.leases
    assert leases is not None
    assert causes_of(leases=leases._replace(own=None)) == [("lease_lost", "")]
    for left, text in ((1800.0, "30 min"), (50.0, "50 s")):
        (found,) = named(leases=leases._replace(left_s=left))
        assert (found.cause, found.values["left"]) == ("lease_expiring", text)
    assert causes_of(leases=leases._replace(left_s=None)) == []


def test_no_free_subnet_and_leases_that_are_not_believed_are_named() -> None:
    leases = SOUND.leases
    assert leases is not None
    full = leases._replace(ranges=(("10.244.0.0/16", 3, 3),))
    assert causes_of(leases=full) == [("subnets_exhausted", "")]
    clash = leases._replace(rejected=(("10.244.9.0-24", Reason("VtepMAC is another's", "mac")), ("odd", Reason("no"))))
    assert causes_of(leases=clash) == [("lease_invalid", "odd"), ("cloned_machine", "10.244.9.0/24")]


def test_interface_that_does_not_lead_to_the_peers_is_named() -> None:
    links = SOUND.links
    assert links is not None
    assert causes_of(links=Links(None, "no interface fits")) == [("underlay_choice", "")]
    moved = links._replace(tunnels=(links.tunnels[0]._replace(link="eth1"),))
    assert causes_of(links=moved) == [("underlay_choice", "")]
    elsewhere = links._replace(elsewhere=((pack_address("172.30.0.12"), "eth1"),))
    assert causes_of(links=elsewhere) == [("underlay_choice", "")]
    assert causes_of(links=elsewhere._replace(reachable=1)) == []


def test_interfaces_that_are_down_or_missing_and_addresses_that_are_not_ours_alone_are_named() -> None:
    links = SOUND.links
    assert links is not None
    assert causes_of(links=links._replace(tunnels=(Tunnel("flannel.1", None),))) == [("device_missing", "")]
    away = Etcd("http://e", "/net", "etcd_unreachable", "no answer")
    assert causes_of(links=links._replace(down=("eth0",)), etcd=away) == [("device_down", "")]
    tunnel = causes_of(links=links._replace(down=("flannel.1",)), etcd=away)
    assert tunnel == [("device_down", ""), ("etcd_unreachable", "")]
    double = "eth0", pack_address("172.30.0.11"), bytes(6)
    assert causes_of(links=links._replace(doubles=(double,))) == [("duplicate_address", "eth0")]


def test_entries_are_told_by_what_they_are_and_whose() -> None:
    mac, remote = bytes((2, 0, 0, 0, 0, 2)), pack_address("172.30.0.12")
    ops = (
        (Put(Guard(remote)), PEER),
        (Put(Fdb((3, mac), remote)), PEER),
        (Put(Neighbour((3, pack_address("10.244.3.0")), mac)), OTHER),
        (Put(Route(Prefix.parse("10.244.3.0/24"), 7)), OTHER),
        (Put(Route(Prefix.parse("10.244.3.0/24"), 7)), None),
        *((Drop(Route(Prefix.parse(f"10.244.{number}.0/24"), 7)), None) for number in range(40, 45)),
    )
    found = named(entries=Entries(ops, {3: "flannel.1"}))
    assert [(each.cause, each.subject) for each in found] == [
        ("fdb_wrong", "10.244.2.0/24"),
        ("neighbour_wrong", "10.244.3.0/24"),
        ("route_wrong", "10.244.3.0/24"),
        ("foreign_entries", ""),
        ("guard_drops", "10.244.2.0/24"),
    ]
    assert causes.what(found[0]) == "the forwarding entry for h2 (172.30.0.12) is missing or leads elsewhere"
    assert found[3].evidence[-1] == "and 2 more"


def test_few_entries_that_nobody_calls_for_are_all_told() -> None:
    (found,) = named(entries=Entries(((Drop(Route(Prefix.parse("10.244.9.0/24"), 7)), None),)))
    assert len(found.evidence) == 1


def test_routes_of_others_are_foreign_if_they_take_packets_and_networks_overlap() -> None:
    route = Way("10.244.2.0/25 via 172.30.0.1 dev eth0", "eth0", False, "10.244.0.0/16", (PEER,))
    (found,) = named(entries=Entries(ways=(route,)))
    assert (found.cause, found.subject) == ("route_foreign", "10.244.2.0/24")
    assert found.values["command"] == "ip route del 10.244.2.0/25 via 172.30.0.1 dev eth0"
    for way in (route._replace(taken=()), route._replace(link=True)):
        (found,) = named(entries=Entries(ways=(way,)))
        assert found.cause == "overlapping_route"
        assert len(found.evidence) == 1 + bool(way.taken)


def test_foreign_route_of_ipv6_is_removed_as_such() -> None:
    attrs = LeaseAttrs(None, "vxlan", None, pack_address("fd30::12"), Vtep(1, bytes(6)))
    peer = Lease(None, Prefix.parse("fd00:244:0:2::/64"), attrs, 7, 1, 1)
    (found,) = named(entries=Entries(ways=(Way("fd00:244:0:2::/65 dev eth0", "eth0", False, "n", (peer,)),)))
    assert found.values["command"].startswith("ip -6 route del ")
    assert "mac" not in found.values


def test_peer_is_called_by_a_name_that_can_be_shown_and_else_by_what_there_is() -> None:
    assert doctor.peer_name(PEER) == "h2 (172.30.0.12)"
    assert doctor.peer_name(lease(4, NodeName="\x1b[31m")) == "172.30.0.14"
    assert doctor.peer_name(lease(4, NodeName=7)) == "172.30.0.14"
    assert doctor.peer_name(Lease(Prefix.parse("10.244.9.0/24"), None, LeaseAttrs(None, "", None), 1, 1, 1)) == (
        "10.244.9.0/24"
    )


def test_settings_and_filters_in_the_way_are_named() -> None:
    kernel = SOUND.kernel
    assert kernel is not None
    off = kernel._replace(forwarding=(Setting("net.ipv4.ip_forward", "0", "1"),))
    assert causes_of(kernel=off) == [("forwarding_off", "")]
    strict = Strict("net.ipv4.conf.eth0.rp_filter", "eth0", PEER, pack_address("172.30.0.12"), "eth1")
    assert causes_of(kernel=kernel._replace(strict=(strict,))) == [("rp_filter", "10.244.2.0/24")]
    for hook, cause in (
        ("forward", "forward_drop"),
        ("bridge", "br_netfilter"),
        ("input", "port_blocked_in"),
        ("output", "port_blocked_out"),
    ):
        rule = Refusing(hook, "nftables inet filter x", "policy drop", "nft list chain inet filter x", "nftables")
        (found,) = named(kernel=kernel._replace(refusing=(rule,)))
        assert (found.cause, found.evidence) == (cause, ("nftables inet filter x: policy drop",))
        inserted = "`sudo nft insert rule inet filter x ip saddr 10.244.0.0/16 accept`" in causes.remedy(found)
        assert inserted == (hook in ("forward", "bridge"))
    rule = Refusing("forward", "iptables-legacy FORWARD", "policy drop", "iptables -S FORWARD", "iptables-legacy")
    (found,) = named(kernel=kernel._replace(refusing=(rule,)))
    assert "`iptables -I FORWARD -s 10.244.0.0/16 -j ACCEPT`" in causes.remedy(found)


def test_packets_that_the_guard_drops_are_counted_with_their_sources() -> None:
    (found,) = named(guarded=Guarded({"strangers": 3, "strays": 0}, (pack_address("192.0.2.9"),), 8472))
    assert found.evidence == ("dropped while this was looked at: 3 strangers",)
    assert "192.0.2.9" in causes.what(found)
    (found,) = named(guarded=Guarded({"strays": 1}))
    assert "addresses that are no peer's" in causes.what(found)


def test_paths_that_fail_are_told_with_what_is_known_of_them() -> None:
    fine = Path(OTHER, "", (), "flannel.1", "eth0", 8472, 1450, 1450, 50)
    small = fine._replace(lease=PEER, cause="path_mtu", evidence=("1348 bytes pass",), largest=1348)
    (found,) = named(paths=(fine, small))
    assert (found.cause, found.subject, found.evidence) == ("path_mtu", "10.244.2.0/24", ("1348 bytes pass",))
    assert "Backend.MTU to 1348 in /net/config" in causes.remedy(found)
    blind = doctor.examine(Facts(paths=(small._replace(largest=0),))).findings
    assert "Backend.MTU to 1450 in PREFIX/config" in causes.remedy(blind[0])


def test_which_direction_is_cut_the_agent_knows_better() -> None:
    path = Path(PEER, "port_blocked_in", ("seen",), "flannel.1", "eth0", 8472, 1450, 0, 50)
    told = Agent(42, told=(Finding("port_blocked_out", "10.244.2.0/24"),))
    assert causes_of(paths=(path,), agent=told) == [("port_blocked_out", "10.244.2.0/24")]
    assert causes_of(paths=(path,)) == [("port_blocked_in", "10.244.2.0/24")]


def test_leftovers_are_told_with_the_commands_that_remove_them() -> None:
    some = Leftover("flannel", "the device flannel.7", "ip link del flannel.7"), Leftover("calico", "a table", "nft x")
    flannel, calico = named(leftovers=(some[0], some[0]._replace(what="a chain", command="iptables -X"), some[1]))
    assert (flannel.cause, calico.cause) == ("flannel_leftover", "calico_leftover")
    assert causes.remedy(flannel) == "Run `ip link del flannel.7`, `iptables -X`."


def test_of_many_alike_some_are_told_and_the_others_named() -> None:
    ops = tuple((Put(Fdb((3, bytes(6)), bytes(4))), lease(number)) for number in range(1, 51))
    found = named(entries=Entries(ops))
    assert len(found) == doctor.MOST_PEERS
    assert found[-1].evidence[-1].startswith("and 47 more: ")
    assert found[-1].evidence[-1].endswith(", ..")
    assert found[-1].evidence[-1].count("/24") == doctor.MOST_NAMED
    few = named(entries=Entries(ops[:5]))
    assert few[-1].evidence[-1] == "and 2 more: 10.244.4.0/24, 10.244.5.0/24"


def test_document_has_the_findings_and_the_checks_by_name() -> None:
    report = doctor.examine(Facts(agent=Agent(None), unknown={"host": "why"}))
    document = doctor.as_json(report, "h1", "1.0", 1.234)
    assert document["schema"] == doctor.SCHEMA
    assert (document["host"], document["version"], document["took_s"]) == ("h1", "1.0", 1.23)
    assert [finding["cause"] for finding in document["findings"]] == ["agent_not_running"]
    assert "one agent" in document["passed"]
    assert {"check": "privileges", "reason": "why"} in document["unknown"]


def test_manual_has_every_key_of_the_document() -> None:
    manual = (Path_(__file__).parents[2] / "docs/doctor.md").read_text()
    document = doctor.as_json(doctor.examine(Facts(agent=Agent(None))), "h1", "1.0", 1.0)
    for keys in (document, document["findings"][0], document["unknown"][0]):
        for key in keys:
            assert f"| `{key}` |" in manual, key
    for check in doctor.CHECKS:
        assert f"{check.name:<15} {check.passes}" in manual, check.name


def test_text_says_what_is_seen_and_what_mends_it() -> None:
    report = doctor.examine(Facts(agent=Agent(42, "no pass"), leftovers=()))
    lines = list(doctor.as_text(report, 1.0, None, verbose=False))
    assert lines[0] == ("down", "down      agent_stalled")
    assert [sort for sort, _ in lines] == ["down", "detail", "detail", "detail", "detail", "unknown", "summary"]
    assert lines[-1][1] == f"6 of {len(doctor.CHECKS)} checks passed in 1.0 s: 1 finding."
    verbose = [line for _, line in doctor.as_text(report, 1.0, None, verbose=True)]
    assert any(line.startswith("ok        disk") for line in verbose)
    assert any(line.startswith("unknown   etcd") for line in verbose)


def test_text_of_a_host_in_order_is_one_line() -> None:
    ((sort, line),) = doctor.as_text(doctor.examine(SOUND), 0.5, None, verbose=False)
    assert (sort, line) == (
        "summary",
        f"{len(doctor.CHECKS)} of {len(doctor.CHECKS)} checks passed in 0.5 s: nothing is wrong.",
    )
    two = doctor.examine(Facts(agent=Agent(None, options=("x", "y"), unwritable=(("a", "b"),))))
    assert list(doctor.as_text(two, 0.5, None, verbose=False))[-1][1].endswith("2 findings.")


def test_long_lines_are_wrapped_between_words_and_no_command_is_cut() -> None:
    report = doctor.examine(Facts(agent=Agent(None)))
    for columns in (20, 60):
        lines = [line for _, line in doctor.as_text(report, 1.0, columns, verbose=False)]
        assert max(map(len, lines[1:-3])) <= 60
        assert any(line.startswith(" " * 9) for line in lines)
        assert "`sudo systemctl start overlay-agent`" in " ".join(" ".join(lines).split())


def test_what_is_said_already_is_no_evidence() -> None:
    told = Finding("forward_drop", evidence=("it drops", "policy drop"), what="it drops")
    lines = [
        line
        for _, line in doctor.as_text(doctor.examine(Facts(agent=Agent(1, told=(told,)))), 1.0, None, verbose=False)
    ]
    assert lines[:3] == ["down      forward_drop", "  it drops", "  seen:  policy drop"]


def test_worst_findings_come_first_and_what_was_looked_at_says_more_than_what_is_remembered() -> None:
    rule = Refusing("forward", "nftables inet filter x", "policy drop", "nft list chain inet filter x", "nftables")
    told = Finding("forward_drop", evidence=("may drop",), what="it may drop", severity=causes.DEGRADED)
    kernel = SOUND.kernel
    assert kernel is not None
    found = named(kernel=kernel._replace(refusing=(rule,)), agent=Agent(42, unwritable=(("/x", "full"),), told=(told,)))
    assert [each.cause for each in found] == ["forward_drop", "journal_failing"]
    assert found[0].evidence == ("nftables inet filter x: policy drop", "may drop")


def test_finding_about_a_peer_names_it() -> None:
    path = Path(PEER, "port_blocked", ("x",), "flannel.1", "eth0", 8472, 1450, 0, 50)
    lines = [line for _, line in doctor.as_text(doctor.examine(Facts(paths=(path,))), 1.0, None, verbose=False)]
    assert lines[0] == "degraded  port_blocked [10.244.2.0/24]"

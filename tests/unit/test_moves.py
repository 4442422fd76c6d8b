"""What outlasts a change of the network: paths that the kernel remembers, families and hosts that are waited for."""

import json
from dataclasses import replace

import structlog

from overlay.device import Underlay
from overlay.model import Fdb, Neighbour, Put, Route
from overlay.tracker import Tracker
from overlay.underlay_watch import RETURN_S, UnderlayWatch
from subnet_lease.model import NetworkConfig, Prefix, pack_address, pack_mac
from subnet_lease.store import Changes, Deleted, Record, Snapshot
from subnet_lease.table import NOBODY, LeaseTable

MAC = pack_mac("02:00:00:00:00:01")
SUBNET6 = Prefix.parse("fd00:244:0:1::/64")


def tracker(*entries: object) -> Tracker:
    made = Tracker(lambda entry: True)
    made.want("peer", entries)  # type: ignore[arg-type]
    made.settle([])
    return made


def test_fdb_entries_of_a_device_that_sends_from_elsewhere_are_made_afresh() -> None:
    here, elsewhere = Fdb((7, MAC), pack_address("172.30.0.12")), Fdb((8, MAC), pack_address("fd30::12"))
    made = tracker(here, elsewhere, Neighbour((7, b"\x0a\0\1\0"), MAC))
    made.renew({7})
    assert made.pending() == [Put(here, afresh=True)]
    made.settle([])
    assert made.pending() == []


def test_fdb_entry_that_is_missing_anyway_is_put_once() -> None:
    entry = Fdb((7, MAC), pack_address("172.30.0.12"))
    made = Tracker(lambda entry: True)
    made.want("peer", (entry,))
    made.renew({7})
    assert made.pending() == [Put(entry)]


def test_ipv6_route_that_leaves_by_another_device_is_removed_before_it_is_put() -> None:
    made = tracker(Route(SUBNET6, gateway=pack_address("fd30::12"), device=2))
    wanted = Route(SUBNET6, gateway=SUBNET6.base, device=7)
    made.want("peer", (wanted,))
    assert made.pending() == [Put(wanted, afresh=True)]
    made.settle([])
    by_another_gateway = replace_gateway(wanted, "fd00:244:0:1::1")
    made.want("peer", (by_another_gateway,))
    assert made.pending() == [Put(by_another_gateway)]


def replace_gateway(route: Route, gateway: str) -> Route:
    return route._replace(gateway=pack_address(gateway))


# --- a family that is gone for a moment --------------------------------------------------------------------------

BOTH = Underlay("eth0", 2, 1500, (pack_address("172.30.0.11"), pack_address("fd30::11")), (), (), "--iface eth0")
IPV4 = replace(BOTH, addresses=BOTH.addresses[:1])


class Script:
    """Events at given times, each with what there is from then on; the clock stands at the latest."""

    def __init__(self, *steps: tuple[float, Underlay]) -> None:
        self.steps = list(steps)
        self.now = 0.0
        self.there = BOTH
        self.seen: list[tuple[float, Underlay]] = []
        self.watch = UnderlayWatch(
            self, lambda present: self.there, (), BOTH, self.note, structlog.get_logger(), clock=lambda: self.now
        )

    def note(self, found: Underlay) -> None:
        self.seen.append((self.now, found))

    def wait(self, seconds: float | None) -> set[int]:
        if self.steps and (seconds is None or self.steps[0][0] <= self.now + seconds):
            self.now, self.there = self.steps.pop(0)
            return {BOTH.index}
        if seconds is None:
            self.watch.stop()
        else:
            self.now += seconds
        return set()

    def interrupt(self) -> None:
        pass


def test_family_that_returns_within_a_moment_was_never_away() -> None:
    script = Script((10.0, IPV4), (10.1, BOTH))
    script.watch.run()
    assert script.seen == []


def test_family_that_stays_away_is_given_up_after_a_moment() -> None:
    script = Script((10.0, IPV4), (10.1, IPV4))
    script.watch.run()
    assert script.seen == [(10.0 + RETURN_S, IPV4)]


def test_each_absence_of_a_family_is_waited_for_anew() -> None:
    script = Script((10.0, IPV4), (10.4, BOTH), (10.5, IPV4), (10.9, BOTH))
    script.watch.run()
    assert script.seen == []


# --- hosts that have yet to follow -------------------------------------------------------------------------------


def record(kind: str, vni: int | None, revision: int) -> Record:
    data = {"VNI": vni, "VtepMAC": "02:00:00:00:00:01"} if vni else None
    value = {"PublicIP": "172.30.0.12", "PublicIPv6": None, "BackendType": kind, "BackendData": data}
    return Record("10.5.1.0-24", json.dumps(value).encode(), 1, 1, revision)


def table(backend: dict[str, object]) -> LeaseTable:
    value = json.dumps({"Network": "10.5.0.0/16", "Backend": backend}).encode()
    return LeaseTable(NetworkConfig.parse(value), NOBODY)


def test_lease_of_another_vni_or_backend_is_rejected_and_known_to_be_behind() -> None:
    claimed = {Prefix.parse("10.5.1.0/24"), pack_address("172.30.0.12")}
    for backend, kind, vni in (
        ({"Type": "vxlan", "VNI": 7}, "vxlan", 1),
        ({"Type": "vxlan"}, "host-gw", None),
        ({"Type": "host-gw"}, "vxlan", 1),
        ({"Type": "alloc"}, "vxlan", 1),
    ):
        made = table(backend)
        made.replace(Snapshot((record(kind, vni, 5),), 5, 1))
        assert made.behind == claimed, backend
        assert made.rejected_count == 1


def test_host_that_follows_or_leaves_is_not_behind_any_more() -> None:
    made = table({"Type": "vxlan", "VNI": 7})
    made.replace(Snapshot((record("vxlan", 1, 5),), 5, 1))
    made.apply(Changes((record("vxlan", 7, 6),), 6))
    assert made.behind == set()
    assert made.accepted("10.5.1.0-24") is not None
    made.apply(Changes((record("vxlan", 1, 7),), 7))
    made.apply(Changes((Deleted("10.5.1.0-24", 8),), 8))
    assert made.behind == set()

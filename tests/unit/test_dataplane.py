"""The seam between the kernel and the firewall: what goes to which, in which order, and what is told of failures."""

import errno
from collections.abc import Collection

import pytest

from overlay.dataplane import HostDataplane
from overlay.device import DeviceSpec
from overlay.model import Drop, Entry, Fdb, Gone, Guard, Op, Put, Refusal, Seen
from overlay.nft import NftFailed, TableGone
from overlay.nft import Seen as Changes
from overlay.tracker import Tracker
from subnet_lease.model import Prefix, pack_address
from tests.fake_dataplane import FakeKernel

LOCAL = pack_address("172.30.0.5")
SPEC = DeviceSpec("flannel.1", 1, 8472, 2, LOCAL, b"\2\0\0\0\0\1", 1450, (Prefix.parse("10.0.0.0/32"),))
HOSTS = tuple(pack_address(text) for text in ("172.30.0.7", "172.30.0.8", "2001:db8::7"))


class FakeNftables:
    """Our table's sets: none of it can be written or read while the table is gone, or nfnetlink is `broken`."""

    def __init__(self, journal: list[str]) -> None:
        self.elements: set[bytes] | None = set()
        self.broken = False
        self.changes = Changes()
        self._journal = journal

    def fileno(self) -> int:
        return 99

    def observe(self) -> Changes:
        changes, self.changes = self.changes, Changes()
        return changes

    def put(self, added: Collection[bytes], removed: Collection[bytes] = ()) -> None:
        self._journal += [f"+{len(added)}"] * bool(added) + [f"-{len(removed)}"] * bool(removed)
        self.elements = (self.dump() | set(added)) - set(removed)

    def dump(self) -> set[bytes]:
        if self.broken:
            raise NftFailed("nfnetlink cannot be used")
        if self.elements is None:
            raise TableGone
        return self.elements


class JournalingKernel(FakeKernel):
    """A kernel that notes how many operations each batch has."""

    def __init__(self, journal: list[str]) -> None:
        super().__init__()
        self._journal = journal

    def apply(self, ops):  # type: ignore[no-untyped-def]
        self._journal.append(f"kernel {len(ops)}")
        return super().apply(ops)


class Host:
    """A dataplane of both, and what they were told in their order."""

    def __init__(self) -> None:
        self.journal: list[str] = []
        self.kernel, self.nftables = JournalingKernel(self.journal), FakeNftables(self.journal)
        self.dataplane = HostDataplane(self.kernel, self.nftables)  # type: ignore[arg-type]
        self.dataplane.ensure_devices([SPEC], 2)
        self.kernel.observe()

    @property
    def peer(self) -> list[Entry]:
        """Entries of three hosts, in build order."""
        device = self.dataplane.tunnels[4]
        return [*map(Guard, HOSTS), *(Fdb((device, b"\2\0\0\0\0" + bytes([n])), HOSTS[n]) for n in range(3))]

    def apply(self, ops: list[Op]) -> list[Refusal]:
        self.journal.clear()
        return self.dataplane.apply(ops)


@pytest.fixture
def host() -> Host:
    return Host()


def test_hosts_are_let_in_before_anything_is_sent_to_them_and_kept_out_after(host: Host) -> None:
    assert host.kernel.also == (99,), "what the firewall tells ends a wait"
    assert host.apply([Put(entry) for entry in host.peer]) == []
    assert host.journal == ["+3", "kernel 3"]
    assert set(host.dataplane.dump(True)) == set(host.peer)
    new = Guard(pack_address("172.30.0.9"))
    drops = [Drop(entry) for entry in reversed(host.peer)]
    assert host.apply([Put(new), *drops]) == []
    assert host.journal == ["+1", "kernel 3", "-3"]
    assert set(host.dataplane.dump(True)) == {new}


def test_table_that_is_gone_refuses_its_entries_and_is_told_once(host: Host) -> None:
    host.nftables.elements = None
    ops = [Put(entry) for entry in host.peer]
    assert host.apply([*ops]) == [Refusal(op, errno.ENOENT) for op in ops[:3]]
    assert host.dataplane.observe().firewall_changed
    assert not host.dataplane.observe().firewall_changed
    assert set(host.dataplane.dump(True)) == set(host.peer[3:])
    assert host.dataplane.observe().firewall_changed


def test_firewall_that_cannot_be_used_refuses_its_entries_and_stops_no_other(host: Host) -> None:
    host.nftables.broken = True
    ops = [Put(entry) for entry in host.peer]
    assert host.apply([*ops]) == [Refusal(op, errno.EIO) for op in ops[:3]]
    assert set(host.dataplane.dump(True)) == set(host.peer[3:])
    assert not host.dataplane.observe().firewall_changed, "making the table anew would be of no use"


def test_what_others_do_to_elements_is_seen_as_of_any_entry(host: Host) -> None:
    host.nftables.changes = Changes(elements={HOSTS[0]: True, HOSTS[2]: False})
    assert host.dataplane.observe() == Seen((Guard(HOSTS[0]), Gone(Guard(HOSTS[2]))))
    assert host.dataplane.observe() == Seen()


@pytest.mark.parametrize("changes", [Changes(altered=True), Changes(lost=True), Changes(forward=frozenset({4}))])
def test_any_other_change_of_the_firewall_asks_for_a_look_at_it(host: Host, changes: Changes) -> None:
    host.nftables.changes = changes
    assert host.dataplane.observe() == Seen(firewall_changed=True)


def test_program_that_altered_our_rules_is_named(host: Host) -> None:
    host.nftables.changes = Changes(altered=True, programs=("nft",))
    assert host.dataplane.observe() == Seen(firewall_changed=True, altered_by=("nft",))


def test_gap_closes_after_the_table_was_gone(host: Host) -> None:
    tracker = Tracker(lambda entry: True)
    tracker.want("peer", tuple(host.peer))
    host.nftables.elements = None
    tracker.settle(host.apply(tracker.pending()))
    assert tracker.gap == 3
    host.nftables.elements = {pack_address("192.0.2.1")}
    tracker.saw_all(host.dataplane.dump(True))
    tracker.settle(host.apply(tracker.pending()))
    assert host.journal == ["+3", "kernel 0", "-1"]
    assert (tracker.gap, host.nftables.elements) == (0, set(HOSTS))


def test_without_nftables_there_are_no_such_entries() -> None:
    kernel = FakeKernel()
    dataplane = HostDataplane(kernel)  # type: ignore[arg-type]
    dataplane.ensure_devices([SPEC], 2)
    fdb = Fdb((dataplane.tunnels[4], b"\2\0\0\0\0\7"), HOSTS[0])
    assert dataplane.apply([Put(fdb)]) == []
    assert list(dataplane.dump(True)) == [fdb]
    assert dataplane.observe() == Seen((fdb,), device_changed=True)
    assert kernel.also == ()

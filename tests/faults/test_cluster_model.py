"""Any sequence of events in a cluster: real keepers, watchers and reconcilers over twins of etcd and of the kernel.

Each loop runs its own `run`, in a thread that runs only while the test waits for it, up to the point where it would
wait for time, for etcd or for the kernel. So a sequence is the same each time, no test depends on time passing, and the
only seams are those through which loops wait: `threading.Event`, the iteration of a watch, `Dataplane.wait`.

What is done in `agent.py` to wire the loops is done here by `Agent`, in the same order.
"""

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from structlog.testing import capture_logs

from overlay.desired import Local, entries_for, ours
from overlay.device import DeviceSpec, Underlay, derived_mac, occupied_links
from overlay.model import PROTOCOL, PROTOCOL_BOOT, Drop, Entry, Fdb, Neighbour, NextHop, Op, Put, Refusal, Route
from overlay.reconciler import LINGER, Reconciler, Stop
from subnet_lease.keeper import Keeper
from subnet_lease.model import (
    Lease,
    LeaseAttrs,
    LeaseInvalid,
    NetworkConfig,
    Prefix,
    Vtep,
    decode_attrs,
    encode_attrs,
    is_device_mac,
    parse_subnet_key,
    subnet_key,
)
from subnet_lease.store import Changes, Record, Snapshot
from subnet_lease.table import Host as OwnHost
from subnet_lease.table import LeaseTable
from subnet_lease.watcher import Watcher
from tests.fake_dataplane import FakeKernel
from tests.faults.fake_store import Data, FakeEtcd, FakeStore

pytestmark = pytest.mark.fault

EXAMPLES, STEPS = 600, 50

HOSTS = 2
"""Enough to want the same; with more, less would happen to each."""

CONFIG = NetworkConfig.parse(
    b'{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.9.0","Backend":{"Type":"vxlan"}}'
)
"""Few subnets, so that hosts, guests and the hostile get into one another's way."""

TTL, MARGIN = 100, 30
"""Seconds for which an agent's etcd lease is granted, and before whose end it is renewed."""

RELIST_S = 1000.0

ROUNDS = 8
"""How often each loop gets its turn until all is quiet; far more than any chain of facts between them is long."""


# --- loops, step by step -------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The agent's process is gone, wherever its loops are at this moment."""


class Loop(threading.Thread):
    """The body of one loop, which runs while `step` waits for it and stands still otherwise."""

    def __init__(self, body: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._body = body
        self._turn: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self.running = False
        self.ended = False
        self.start()

    def run(self) -> None:
        try:
            if self._turn.get():
                self._body()
        except Killed:
            pass
        except BaseException as failure:
            self._failure = failure
        self.ended = True
        self._done.put(None)

    def step(self, *, live: bool = True) -> None:
        """Let it run until it would wait; end it where it is unless `live`. What it raises is a defect."""
        if self.ended or self.running:
            return
        self.running = True
        self._turn.put(live)
        self._done.get()
        self.running = False
        if self._failure is not None:
            raise self._failure

    def pause(self) -> None:
        """In the loop's own thread: here it would wait."""
        self._done.put(None)
        if not self._turn.get():
            raise Killed


def pause() -> None:
    """What a loop does instead of waiting. Its wait has come to an end when this returns."""
    loop = threading.current_thread()
    assert isinstance(loop, Loop), "only loops wait"
    loop.pause()


class SteppedEvent(threading.Event):
    def wait(self, timeout: float | None = None) -> bool:
        if not self.is_set():
            pause()
        return self.is_set()


def stepped(loop: Any) -> Any:
    """The object of a loop, all of whose waits hand over to the test."""
    for name, value in vars(loop).items():
        if isinstance(value, threading.Event):
            setattr(loop, name, SteppedEvent())
    return loop


# --- hosts ---------------------------------------------------------------------------------------------------------


class WatchedKernel(FakeKernel):
    """A kernel that belongs to a host, whose loop is stepped, and that does not put up with losses to strangers."""

    def __init__(self) -> None:
        super().__init__(capacity=30)

    def wait(self, seconds: float | None) -> None:
        if self.has_news() or seconds == 0.0:
            super().wait(0.0)
        else:
            pause()

    def lose_notifications(self) -> None:
        """The monitor's buffer overflows."""
        with self.lock:
            self._queue.clear()
            self._device_changed, self._lost = False, True

    def apply(self, ops: Sequence[Op]) -> list[Refusal]:
        before = self.entries()
        refusals = super().apply(ops)
        put = {op.entry[0] for op in ops if isinstance(op, Put)}
        hops = {op.entry[0] for op in ops if isinstance(op, Drop) and isinstance(op.entry, NextHop)}
        for entry in before - self.entries():
            follows = isinstance(entry, Route) and entry.nexthop in hops
            assert entry[0] in put or follows or ours(entry, self.local), f"{entry} is a stranger's"
        return refusals

    @property
    def local(self) -> Local:
        return Local(CONFIG.block, self.device, self.has_nexthops())


class Host:
    """A host: its address, kernel and subnet file, which outlast its agents; and the agent, if one runs."""

    def __init__(self, etcd: FakeEtcd, number: int) -> None:
        self.etcd = etcd
        self.number = number
        self.public_ip = bytes((192, 168, 0, number))
        self.underlay = Underlay("eth0", 2, self.public_ip, 1500, (Prefix.parse("192.168.0.0/24"),), "test")
        self.kernel = WatchedKernel()
        self.subnet_file: Prefix | None = None
        self.settled: Record | None = None
        """Its record when all was last well, as long as it is known to the host by its subnet file."""
        self.agent: Agent | None = None

    def __repr__(self) -> str:
        return f"h{self.number}"

    def start(self) -> None:
        assert self.agent is None
        self.agent = Agent(self)

    def kill(self) -> None:
        agent, self.agent = self.agent, None
        if agent is not None:
            agent.kill()

    def stop(self) -> None:
        """SIGTERM, and the process has ended."""
        agent, self.agent = self.agent, None
        assert agent is not None
        agent.stop()

    def step(self, which: int | None = None) -> None:
        """Let one loop, or all, run until they would wait. Their process may die meanwhile."""
        if self.agent is None:
            return
        for loop in list(self.agent.loops) if which is None else self.agent.loops[which : which + 1]:
            loop.step()
        if self.agent.dying:
            self.kill()


class Agent:
    """The loops of `agent.py`, wired as there."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.store: FakeStore = host.etcd.store()
        self.dying = False
        self.reconciler: Reconciler | None = None
        self.watcher: Watcher | None = None
        # A new process has a new monitor, which has seen nothing yet.
        host.kernel.observe()
        found = host.kernel.found
        initial = found.mac if found else derived_mac(str(host.number))

        # All want the first at first, and another when they try again.
        turns = itertools.cycle([0, 1])

        def attrs_for(previous: Lease | None) -> LeaseAttrs:
            known = previous.attrs.vtep if previous else None
            usable = known is not None and is_device_mac(known.mac)
            return LeaseAttrs(host.public_ip, "vxlan", Vtep(1, known.mac if known and usable else initial))

        self.keeper: Keeper = stepped(
            Keeper(
                self.store,
                CONFIG,
                host.public_ip,
                attrs_for,
                ttl=TTL,
                renew_margin=MARGIN,
                preferred=host.subnet_file,
                avoid=occupied_links(host.underlay, CONFIG.block, host.subnet_file),
                on_lease=self.held,
                clock=lambda: host.etcd.now,
                pick=lambda free: next(turns) * (free - 1),
                jitter=lambda: 0.5,
            )
        )
        self.loops = [Loop(self.keeper.run)]

    def held(self, lease: Lease) -> None:
        if self.reconciler is None or self.watcher is None:
            self.reconciler = Reconciler(
                self.host.kernel,
                CONFIG,
                self.host.underlay,
                lease,
                prepare=lambda own, spec: None,
                on_ready=self.announce,
                clock=lambda: self.host.etcd.now,
            )
            first = self.keeper.take_snapshot()
            clock = {"clock": lambda: self.host.etcd.now, "jitter": lambda: 0.5, "relist_s": RELIST_S}
            self.watcher = stepped(Watcher(self.store, self.deliver, first=first, **clock))
            self.loops += [Loop(self.watcher.run), Loop(self.reconciler.run)]
            return
        self.reconciler.post(lease)
        self.watcher.relist()

    def deliver(self, fact: Snapshot | Changes) -> None:
        assert self.reconciler is not None
        self.reconciler.post(fact)
        self.keeper.saw(fact)

    def announce(self, lease: Lease, spec: DeviceSpec) -> None:
        self.host.subnet_file = lease.subnet

    def kill(self) -> None:
        for loop in self.loops:
            loop.step(live=False)
        self.store.close()

    def stop(self) -> None:
        if self.watcher is not None and self.reconciler is not None:
            self.watcher.stop()
            self.reconciler.post(Stop())
        self.keeper.stop()
        for loop in self.loops:
            loop.step()
            assert loop.ended, "a loop that was stopped does not wait any more"
        self.store.close()


# --- what strangers do ---------------------------------------------------------------------------------------------


def guest(number: int) -> bytes:
    """The lease value of a host that has no agent here."""
    return encode_attrs(LeaseAttrs(bytes((192, 168, 1, number)), "vxlan", Vtep(1, mac(number))))


def mac(number: int) -> bytes:
    return bytes((2, 0, 0, 0, 1, number))


def of_host(number: int, vtep_mac: bytes = b"") -> bytes:
    """A value that carries the address of a host of ours, with its own MAC or another."""
    vtep = Vtep(1, vtep_mac or derived_mac(str(number)))
    return encode_attrs(LeaseAttrs(bytes((192, 168, 0, number)), "vxlan", vtep))


HOST_NUMBERS = range(1, HOSTS + 1)

IN_RANGE = [f"10.5.{number}.0-24" for number in range(1, 10)]
BESIDE = ["10.5.40.0-24", "10.5.41.0-24", "10.5.255.0-24"]
ODD = [
    "10.5.4.0-23",
    "10.5.2.128-25",
    "10.5.0.0-21",
    "10.5.0.0-16",
    "0.0.0.0-0",
    "10.6.1.0-24",
    "garbage",
    "",
    "\udcff",
]

LEASES = [guest(number) for number in (1, 2, 3)]
FORGED = [of_host(n, forged) for n in HOST_NUMBERS for forged in (mac(100 + n), b"\x01\0\0\0\0\x01", bytes(6))]
"""With MACs a host has never had, of which no device can have the last two."""

HOSTILE = [
    b"",
    b"\xff\x00",
    b"{" * 70_000,
    b'{"PublicIP":null}',
    guest(4).replace(b"192.168.1.4", b"224.0.0.1"),
    guest(4).replace(b"192.168.1.4", b"10.5.3.7"),
    guest(4).replace(b'"VNI":1', b'"VNI":7'),
    guest(4).replace(b'"vxlan"', b'"udp"'),
    guest(4).replace(b"02:00:00:00:01:04", b"01:00:00:00:01:04"),
    guest(5).replace(b"192.168.1.5", b"192.168.1.1"),  # A second MAC for one address,
    guest(1).replace(b"192.168.1.1", b"192.168.1.6"),  # and a second address for one MAC.
    *(guest(7).replace(mac(7).hex(":").encode(), derived_mac(str(n)).hex(":").encode()) for n in HOST_NUMBERS),
    *(guest(8).replace(b"192.168.1.8", f"192.168.0.{n}".encode()) for n in HOST_NUMBERS),
]


def strange_entries() -> st.SearchStrategy[Entry]:
    """What other programs write: under keys of ours or beside them, with and without our marks."""
    subnets = st.sampled_from(range(1, 10)).map(lambda number: Prefix.parse(f"10.5.{number}.0/24"))
    elsewhere = st.sampled_from(["192.0.2.0/24", "10.6.0.0/16"]).map(Prefix.parse)
    macs = st.sampled_from([mac(1), mac(99), derived_mac("1"), derived_mac("2")])

    def routes(where: st.SearchStrategy[Prefix], protocols: list[int]) -> st.SearchStrategy[Entry]:
        # On no device, or on the first or second that an agent of ours makes.
        devices = st.sampled_from([0, 7, 8])
        return st.builds(
            lambda to, device, protocol: Route(to, gateway=b"\xc0\xa8\0\x63", device=device, protocol=protocol),
            *(where, devices, st.sampled_from(protocols)),
        )

    return st.one_of(
        st.builds(Fdb, macs, st.just(b"\xc0\xa8\x09\x09"), st.sampled_from([0x80, 0x40])),
        st.builds(Neighbour, subnets.map(lambda subnet: subnet.base), macs, st.sampled_from([0x80, 0x40, 4])),
        routes(subnets, [PROTOCOL_BOOT, 4, PROTOCOL]),
        routes(elsewhere, [PROTOCOL_BOOT, 4, PROTOCOL]),
    )


@dataclass(frozen=True, slots=True)
class Backup:
    data: Data
    planted: dict[str, Record]


CALLS = ("snapshot", "grant", "create", "replace", "keep_alive", "revoke", "watch")
"""What may meet with something: see `FakeStore.meet`."""

ACCIDENTS = ("lost", "unanswered", "late")
"""What may become of a call while nobody does anything: see `FakeStore`."""


class Cluster(RuleBasedStateMachine):
    """Two hosts, their etcd, an operator, guests without an agent, and strangers with root's rights."""

    def __init__(self) -> None:
        super().__init__()
        self.etcd = FakeEtcd(pause)
        self.operator = self.etcd.store()
        self.hosts = [Host(self.etcd, number) for number in HOST_NUMBERS]
        self.planted: dict[str, Record] = {}
        """What others than agents have put, as long as no agent has changed it."""
        self.reserved: set[str] = set()
        """Keys of reservations that stand."""
        self.backups: list[Backup] = []
        self.restored: dict[str, Record] = {}
        """What the latest backup brought back."""
        self.went_back = False
        """Whether etcd has lost what it once had."""

    def teardown(self) -> None:
        try:
            self.all_is_well_in_the_end()
        finally:
            for host in self.hosts:
                host.kill()

    # --- agents ---

    @rule(host=st.sampled_from(HOST_NUMBERS), which=st.sampled_from([None, None, 0, 1, 2]))
    def loops_run(self, host: int, which: int | None) -> None:
        self.hosts[host - 1].step(which)

    @rule()
    def all_loops_run(self) -> None:
        for host in self.hosts:
            host.step()

    @rule(host=st.sampled_from(HOST_NUMBERS), create=st.sampled_from(["", "", *ACCIDENTS]))
    def agent_starts(self, host: int, create: str) -> None:
        """What becomes of the first lease it takes is more often an accident than elsewhere."""
        if self.hosts[host - 1].agent is None:
            self.hosts[host - 1].start()
            if create:
                self.next_call_meets(host, "create", create, 1)
        self.hosts[host - 1].step()

    @rule(host=st.sampled_from(HOST_NUMBERS), again=st.booleans())
    def agent_is_killed(self, host: int, again: bool) -> None:
        self.hosts[host - 1].kill()
        if again:
            self.hosts[host - 1].start()

    @rule(host=st.sampled_from(HOST_NUMBERS))
    def agent_stops(self, host: int) -> None:
        if self.hosts[host - 1].agent is not None:
            self.hosts[host - 1].stop()

    @rule(host=st.sampled_from(HOST_NUMBERS))
    def host_forgets_its_subnet(self, host: int) -> None:
        self.hosts[host - 1].subnet_file = self.hosts[host - 1].settled = None

    @rule(
        host=st.sampled_from(HOST_NUMBERS),
        call=st.sampled_from(CALLS),
        plot=st.sampled_from([*ACCIDENTS, "killed before", "killed after", "race"]),
        other=st.sampled_from(HOST_NUMBERS),
    )
    def something_befalls_a_call(self, host: int, call: str, plot: str, other: int) -> None:
        self.next_call_meets(host, call, plot, other)

    def next_call_meets(self, host: int, call: str, plot: str, other: int) -> None:
        """Something befalls the agent in the midst of a call, whenever it makes that call."""
        agent = self.hosts[host - 1].agent
        if agent is None:
            return
        store = agent.store

        def killed_before(work: Callable[[], object]) -> None:
            agent.dying = True
            raise Killed

        def killed_after(work: Callable[[], object]) -> None:
            work()
            agent.dying = True
            raise Killed

        def race(work: Callable[[], object]) -> object:
            self.hosts[other - 1].step()
            return work()

        plots = {"lost": store.lost, "unanswered": store.unanswered, "late": store.late}
        plots |= {"killed before": killed_before, "killed after": killed_after, "race": race}
        store.plots[call] = plots[plot]

    # --- etcd ---

    @rule(seconds=st.sampled_from([10, 40]))
    def time_passes(self, seconds: int) -> None:
        self.pass_time(seconds)

    @rule()
    def all_hosts_sleep_for_longer_than_a_lease(self) -> None:
        self.etcd.advance(TTL + 10)

    @rule()
    def etcd_says_something(self) -> None:
        self.etcd.say_something()

    @rule(again=st.booleans())
    def etcd_stops(self, again: bool) -> None:
        self.etcd.stop()
        if again:
            self.etcd.start()

    @rule()
    def etcd_starts(self) -> None:
        if not self.etcd.up:
            self.etcd.start()

    @rule(host=st.sampled_from(HOST_NUMBERS), back=st.booleans(), for_good=st.booleans())
    def host_is_cut_off(self, host: int, back: bool, for_good: bool) -> None:
        agent = self.hosts[host - 1].agent
        if agent is not None:
            agent.store.cut_off()
            if back:
                agent.store.reconnect()
            if not for_good:
                # The connection breaks again as soon as the watch stands.
                agent.store.plots["watch"] = agent.store.lost

    @rule()
    def late_requests_arrive(self) -> None:
        self.etcd.arrive()

    @rule(all_of_it=st.booleans())
    def etcd_compacts(self, all_of_it: bool) -> None:
        data = self.etcd.data
        revision = data.revision if all_of_it else (data.compacted + data.revision) // 2
        if self.etcd.up and data.compacted < revision:
            self.etcd.compact(revision)

    @rule()
    def etcd_is_backed_up(self) -> None:
        self.backups = [*self.backups[-1:], Backup(self.etcd.save(), dict(self.planted))]

    @precondition(lambda self: self.backups)
    @rule(which=st.sampled_from([0, -1]), other_cluster=st.booleans())
    def etcd_is_restored(self, which: int, other_cluster: bool) -> None:
        backup = self.backups[which]
        self.forget_what_was()
        self.etcd.restore(backup.data, other_cluster=other_cluster)
        self.planted = dict(backup.planted)
        self.restored = dict(backup.data.records)
        self.reserved = {key for key, record in self.etcd.data.records.items() if key in self.planted and not record[2]}

    @rule(other_cluster=st.booleans())
    def etcd_is_wiped(self, other_cluster: bool) -> None:
        self.forget_what_was()
        self.etcd.restore(None, other_cluster=other_cluster)
        self.planted, self.reserved, self.restored = {}, set(), {}

    def forget_what_was(self) -> None:
        self.went_back = True
        for host in self.hosts:
            host.settled = None

    # --- keys of others ---

    @rule(
        key=st.sampled_from([*IN_RANGE, *BESIDE, *ODD]),
        value=st.sampled_from([*LEASES, *FORGED]),
        ttl=st.sampled_from([0, 60, 10_000]),
    )
    def lease_comes(self, key: str, value: bytes, ttl: int) -> None:
        self.plant(key, value, ttl)

    @rule(
        host=st.sampled_from(HOST_NUMBERS), key=st.sampled_from([*IN_RANGE, *ODD]), ttl=st.sampled_from([0, 60, 10_000])
    )
    def host_is_given_another_lease(self, host: int, key: str, ttl: int) -> None:
        self.plant(key, of_host(host), ttl)

    @rule(key=st.sampled_from([*IN_RANGE, *ODD]), value=st.sampled_from([*HOSTILE, *LEASES]))
    def hostile_lease_comes(self, key: str, value: bytes) -> None:
        self.plant(key, value, 10_000)

    @precondition(lambda self: self.planted)
    @rule(data=st.data())
    def lease_goes(self, data: st.DataObject) -> None:
        self.remove(data.draw(st.sampled_from(sorted(self.planted))))

    @precondition(lambda self: self.planted)
    @rule(data=st.data(), value=st.sampled_from([*LEASES, *HOSTILE]))
    def lease_changes(self, data: st.DataObject, value: bytes) -> None:
        self.overwrite(data.draw(st.sampled_from(sorted(self.planted))), value)

    def plant(self, key: str, value: bytes, ttl: int) -> None:
        if self.etcd.up and key not in self.etcd.data.records:
            self.etcd.put(key, value, self.etcd.grant(ttl) if ttl else 0, 0)
            self.planted[key] = self.etcd.data.records[key]
            if not ttl:
                self.reserved.add(key)

    def overwrite(self, key: str, value: bytes, etcd_lease: int | None = None) -> None:
        record = self.etcd.data.records.get(key)
        if record is not None and self.etcd.up:
            self.etcd.put(key, value, record.etcd_lease if etcd_lease is None else etcd_lease, record.mod_revision)
            self.planted[key] = self.etcd.data.records[key]
            (self.reserved.discard if self.planted[key].etcd_lease else self.reserved.add)(key)

    def remove(self, key: str) -> None:
        record = self.etcd.data.records.get(key)
        if record is not None and self.etcd.up and self.etcd.delete(key, record.mod_revision):
            self.planted.pop(key, None)
            self.reserved.discard(key)

    # --- keys of agents ---

    @rule(host=st.sampled_from(HOST_NUMBERS))
    def own_key_is_deleted(self, host: int) -> None:
        for record in self.of(self.hosts[host - 1]):
            self.remove(record.key)

    @rule(host=st.sampled_from(HOST_NUMBERS))
    def own_etcd_lease_is_revoked(self, host: int) -> None:
        for record in self.of(self.hosts[host - 1]) if self.etcd.up else ():
            self.etcd.revoke(record.etcd_lease)

    @rule(
        host=st.sampled_from(HOST_NUMBERS),
        value=st.sampled_from([*LEASES, *FORGED, b""]),
        kept=st.booleans(),
    )
    def own_key_is_overwritten(self, host: int, value: bytes, kept: bool) -> None:
        for record in self.of(self.hosts[host - 1]):
            self.overwrite(record.key, value, None if kept else self.etcd.grant(10_000))

    @rule(host=st.sampled_from(HOST_NUMBERS))
    def own_lease_is_made_a_reservation(self, host: int) -> None:
        for record in self.of(self.hosts[host - 1]):
            self.overwrite(record.key, record.value, 0)

    # --- kernels ---

    @rule(host=st.sampled_from(HOST_NUMBERS), entry=strange_entries(), unseen=st.booleans())
    def stranger_puts(self, host: int, entry: Entry, unseen: bool) -> None:
        self.by_a_stranger(self.hosts[host - 1].kernel, Put(entry), unseen)

    @rule(host=st.sampled_from(HOST_NUMBERS), data=st.data(), unseen=st.booleans())
    def stranger_drops(self, host: int, data: st.DataObject, unseen: bool) -> None:
        kernel = self.hosts[host - 1].kernel
        if there := sorted(kernel.entries(), key=repr):
            self.by_a_stranger(kernel, Drop(data.draw(st.sampled_from(there))), unseen)

    def by_a_stranger(self, kernel: WatchedKernel, op: Op, unseen: bool) -> None:
        kernel.stranger.apply([op])
        if unseen:
            kernel.lose_notifications()

    @rule(host=st.sampled_from(HOST_NUMBERS), what=st.sampled_from(["delete_device", "set_down", "remove_address"]))
    def device_is_harmed(self, host: int, what: str) -> None:
        kernel = self.hosts[host - 1].kernel
        if kernel.found is not None:
            getattr(kernel, what)()

    @rule(host=st.sampled_from(HOST_NUMBERS), call=st.sampled_from(["apply", "dump", "ensure_device"]))
    def kernel_fails(self, host: int, call: str) -> None:
        self.hosts[host - 1].kernel.fail[call] = [105]

    # --- what must hold ---

    @invariant()
    def nobody_touches_what_is_others(self) -> None:
        records = self.etcd.data.records
        for key in list(self.reserved):
            assert key in records, f"the reservation {key} is gone"
            assert not records[key].etcd_lease, f"the reservation {key} has become a lease"
        for key, planted in list(self.planted.items()):
            record = records.get(key)
            if record == planted:
                continue
            if record is None or record.create_revision != planted.create_revision:
                # Where it has ended, others may have taken its place since.
                assert not self.etcd.alive(planted.etcd_lease), f"{key} was deleted"
            else:
                owner = next((host for host in self.hosts if address_of(planted.value) == host.public_ip), None)
                assert owner is not None, f"{key} of nobody's host was written"
                assert address_of(record.value) == owner.public_ip
            del self.planted[key]

    @invariant()
    def no_subnet_has_two_holders(self) -> None:
        held = [(host, parse_subnet_key(record.key)[0]) for host in self.hosts for record in self.of(host)]
        for (host, subnet), (other, another) in itertools.combinations(held, 2):
            assert host is other or not subnet.overlaps(another), f"{host} {subnet}, {other} {another}"

    @rule()
    def all_is_well_in_the_end(self) -> None:
        """Everything is reachable again, and all loops have had their turn."""
        if not self.etcd.up:
            self.etcd.start()
        self.etcd.arrive()
        for host in self.hosts:
            host.kernel.fail = {call: [] for call in host.kernel.fail}
            if host.agent is not None:
                host.agent.store.reconnect()
                host.agent.store.plots.clear()
        self.settle()
        if self.went_back:
            # Peers that the store has lost are kept for a while.
            self.pass_time(LINGER + 10)
            self.settle()
        if any(host.agent and host.agent.store.deceived for host in self.hosts):
            # Nothing tells of a store that went back and has grown since; a snapshot now and then does away with it.
            self.pass_time(1.5 * RELIST_S + 30)
            self.etcd.say_something()
            self.settle()
            self.pass_time(LINGER + 10)
            self.settle()
        self.went_back = False
        self.nobody_touches_what_is_others()
        for host in self.hosts:
            if host.agent is not None:
                self.assert_well(host, host.agent)

    def pass_time(self, seconds: float) -> None:
        """As long as the keepers run, no lease of theirs runs out meanwhile."""
        for _ in range(0, int(seconds), 10):
            self.etcd.advance(10)
            for host in self.hosts:
                host.step(0)

    def settle(self) -> None:
        for _ in range(ROUNDS):
            for host in self.hosts:
                host.step()

    def assert_well(self, host: Host, agent: Agent) -> None:
        lease = agent.keeper.lease
        snapshot = self.operator.snapshot()
        if lease is None:
            taken = [subnet for record in snapshot.records if (subnet := subnet_of(record)) is not None]
            free = [key for key in IN_RANGE if not any(parse_subnet_key(key)[0].overlaps(each) for each in taken)]
            assert not free, f"{host} has no lease, though {free} are free"
            return
        key = subnet_key(lease.subnet)
        records = {record.key: record for record in snapshot.records}
        assert key in records, f"{host} believes to hold {lease.subnet}"
        record = records[key]
        assert (record.etcd_lease, record.create_revision, record.mod_revision) == lease[3:], f"{host}: {lease}"
        assert decode_attrs(record.value) == lease.attrs
        assert lease.reserved or self.etcd.alive(lease.etcd_lease)
        others = [each for each in self.of(host) if each.key != key and each.key not in self.planted]
        # A backup brings back what a host once had and has no more; nobody renews it, so it ends by itself.
        assert [each for each in others if each != self.restored.get(each.key)] == [], f"{host} has several leases"
        if host.settled is not None and (still := records.get(host.settled.key)):
            assert still.key == key or still != host.settled, (
                f"{host} has moved to {key}, and nobody had touched {still}"
            )
        host.settled = record
        # The table's rules, applied to all there is at once.
        assert lease.attrs.vtep is not None
        links = occupied_links(host.underlay, CONFIG.block, lease.subnet)
        table = LeaseTable(CONFIG, OwnHost(key, lease.subnet, host.public_ip, lease.attrs.vtep.mac, links))
        table.replace(snapshot)
        kernel = host.kernel
        wanted = {entry[0]: entry for _, peer in table.peers() for entry in entries_for(peer, kernel.local)}
        there = {entry[0]: entry for entry in sorted(kernel.entries(), key=lambda entry: wanted.get(entry[0]) == entry)}
        assert {name: there.get(name) for name in wanted} == wanted, f"{host} {lease}"
        stale = [
            entry
            for name, entry in there.items()
            if name not in wanted and ours(entry, kernel.local) and not leads_elsewhere(entry, kernel)
        ]
        assert not stale, f"{host} {lease}"
        assert agent.reconciler is not None
        state = agent.reconciler.state
        assert (state.ready, state.gap, state.trouble, state.peers) == (True, 0, "", len(list(table.peers())))
        assert kernel.found is not None
        assert kernel.found.mac == lease.attrs.vtep.mac
        assert is_device_mac(kernel.found.mac)
        assert kernel.found.addresses == (Prefix(lease.subnet.base, 32),)

    def of(self, host: Host) -> list[Record]:
        """The records that an agent of this host may take for its own, in the order of their keys."""
        found = []
        for record in self.etcd.data.records.values():
            subnet = subnet_of(record)
            if subnet is None or subnet.length != CONFIG.subnet_len or not CONFIG.block.covers(subnet):
                continue
            if address_of(record.value) == host.public_ip:
                found.append(record)
        return sorted(found)


def leads_elsewhere(entry: Entry, kernel: FakeKernel) -> bool:
    """Whether it is a route that uses nothing of ours: a dump does not show it, whatever its protocol is."""
    return isinstance(entry, Route) and not entry.nexthop and entry.device != kernel.device


def address_of(value: bytes) -> bytes | None:
    with contextlib.suppress(LeaseInvalid):
        return decode_attrs(value).public_ip
    return None


def subnet_of(record: Record) -> Prefix | None:
    with contextlib.suppress(LeaseInvalid):
        return parse_subnet_key(record.key)[0]
    return None


def test_any_sequence_of_events_ends_well() -> None:
    with capture_logs():
        run_state_machine_as_test(
            Cluster,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )

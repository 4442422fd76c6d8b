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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from structlog.testing import capture_logs

from overlay.backends import V4, V6, Here, backend_of, ours
from overlay.device import Underlay, adjustments, device_name, incompatibility, overlay_mtu
from overlay.model import (
    PROTOCOL,
    PROTOCOL_BOOT,
    Drop,
    Entry,
    Fdb,
    Guard,
    Neighbour,
    NextHop,
    Op,
    Put,
    Refusal,
    Route,
)
from overlay.netconf import fit
from overlay.presence import Presence
from overlay.reconciler import FOLLOW, LINGER, Plan, Reconciler, Stop
from subnet_lease.keeper import Identity, Keeper
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
    pack_address,
    parse_subnet_key,
)
from subnet_lease.store import Changes, Deleted, Record, Snapshot
from subnet_lease.table import Host as OwnHost
from subnet_lease.table import LeaseTable
from subnet_lease.watcher import Watcher
from tests.fake_dataplane import V4_DEVICE, V6_DEVICE, FakeKernel
from tests.faults.fake_store import Data, FakeEtcd, FakeStore

pytestmark = pytest.mark.fault

EXAMPLES, STEPS = 300, 50

HOSTS = 2
"""Enough to want the same; with more, less would happen to each."""

CONFIG = NetworkConfig.parse(
    b'{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.9.0","Backend":{"Type":"vxlan"}}'
)
"""Few subnets, so that hosts, guests and the hostile get into one another's way."""

BOTH = NetworkConfig.parse(
    b'{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.9.0","EnableIPv6":true,'
    b'"IPv6Network":"fd00:5::/48","IPv6SubnetMin":"fd00:5:0:1::","IPv6SubnetMax":"fd00:5:0:9::",'
    b'"Backend":{"Type":"vxlan"}}'
)
"""The same with subnets of both families; all leases of the network above have one too few."""

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

    def __init__(self, config: NetworkConfig, underlay: Underlay) -> None:
        super().__init__(capacity=30)
        self._before = Here.of(
            config, underlay, overlay_mtu(config, underlay, tunnels=True), nexthops=True, listed=True
        )

    @property
    def here(self) -> Here:
        """By what the host's entries are worked out, with the devices of the present agent."""
        return replace(self._before, tunnels=dict(self.tunnels))

    def opened_anew(self) -> None:
        """A new process has a monitor that has seen nothing yet, and knows of no device."""
        self.observe()
        self.tunnels = {}

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
            assert entry[0] in put or follows or ours(entry, self.here), f"{entry} is a stranger's"
        return refusals


class Host:
    """A host: its addresses, kernel and subnet file, which outlast its agents; and the agent, if one runs."""

    def __init__(self, etcd: FakeEtcd, number: int, config: NetworkConfig, families: Collection[int]) -> None:
        self.etcd = etcd
        self.config = config
        self.number = number
        self.underlay = underlay_of(number, families)
        self.kernel = WatchedKernel(config, self.underlay)
        self.subnet_file: tuple[Prefix, ...] = ()
        self.settled: Record | None = None
        """Its record when all was last well, as long as it is known to the host by its subnet file."""
        self.granted: dict[int, Agent] = {}
        """The etcd leases that its agents were granted, and which of them."""
        self.left: dict[str, Record] = {}
        """What a former agent of it took, and the present one need not find: see `Agent.held` and `requests_arrive`."""
        self.agent: Agent | None = None

    def __repr__(self) -> str:
        return f"h{self.number}"

    @property
    def macs(self) -> dict[int, bytes]:
        """Those of its VXLAN devices, by the length of their underlay addresses."""
        devices = {family: self.kernel.devices.get(device_name(1, family)) for family in (V4, V6)}
        return {family: found.mac for family, found in devices.items() if found is not None}

    @property
    def identity(self) -> Identity:
        """By what an agent that starts now knows its record."""
        return Identity(self.underlay.address(V4), self.underlay.address(V6), tuple(self.macs.values()))

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


class AgentStore(FakeStore):
    """That of an agent, which is remembered by the etcd leases it is granted."""

    def __init__(self, agent: "Agent") -> None:
        super().__init__(agent.host.etcd)
        self._agent = agent

    def grant(self, ttl: int) -> int:
        etcd_lease = super().grant(ttl)
        self._agent.host.granted[etcd_lease] = self._agent
        return etcd_lease


class Agent:
    """The loops of `agent.py`, wired as there."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.store = AgentStore(self)
        self.dying = False
        self.reconciler: Reconciler | None = None
        self.watcher: Watcher | None = None
        host.kernel.opened_anew()
        self.knows_subnet = bool(host.subnet_file)
        self.underlay = fit(host.config, host.underlay, own=host.subnet_file)
        presence = presence_of(host.number, host.config, self.underlay, host.macs)

        # All want the first at first, and another when they try again.
        turns = itertools.cycle([0, 1])
        self.keeper: Keeper = stepped(
            Keeper(
                self.store,
                host.config,
                host.identity,
                presence.attrs,
                ttl=TTL,
                renew_margin=MARGIN,
                preferred=host.subnet_file,
                avoid=self.underlay.links,
                on_lease=self.held,
                clock=lambda: host.etcd.now,
                pick=lambda free: next(turns) * (free - 1),
                jitter=lambda: 0.5,
            )
        )
        self.loops = [Loop(self.keeper.run)]

    def held(self, lease: Lease) -> None:
        if self.reconciler is None or self.watcher is None:
            host = self.host
            if not self.knows_subnet and not lease.reserved and lease.etcd_lease not in host.granted:
                # Somebody else has put the host's address on an elder key, which an agent that remembers no subnet
                # cannot tell from its own. What a former one took, it does not renew.
                taken = (record for record in host.etcd.data.records.values() if record.etcd_lease in host.granted)
                host.left |= {record.key: record for record in taken}
            self.reconciler = Reconciler(
                self.host.kernel,
                self.host.config,
                self.underlay,
                lease,
                prepare=lambda plan: None,
                protect=lambda plan: None,
                on_ready=self.announce,
                clock=lambda: self.host.etcd.now,
                listed=True,
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

    def announce(self, plan: Plan) -> None:
        self.host.subnet_file = plan.subnets

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


def guest_with_ipv6(number: int, *, alone: bool) -> bytes:
    """The same of one with an IPv6 underlay, `alone` or beside an IPv4 one."""
    ipv4 = (None, None) if alone else (bytes((192, 168, 1, number)), Vtep(1, mac(number)))
    address, vtep = pack_address(f"fd00:1::1:{number}"), Vtep(1, mac(0x80 + number))
    return encode_attrs(LeaseAttrs(ipv4[0], "vxlan", ipv4[1], address, vtep))


def mac(number: int) -> bytes:
    return bytes((2, 0, 0, 0, 1, number))


def underlay_of(number: int, families: Collection[int] = (V4,)) -> Underlay:
    """That of a host of ours, with addresses of these families."""
    addresses = bytes((192, 168, 0, number)), pack_address(f"fd00:1::{number}")
    links = tuple(map(Prefix.parse, ("192.168.0.0/24", "fd00:1::/112")))
    underlay = Underlay("eth0", 2, 1500, addresses, links, links, "test")
    return underlay.carrying(families)


def presence_of(number: int, config: NetworkConfig, underlay: Underlay, macs: Mapping[int, bytes]) -> Presence:
    """What a host of ours says of itself, given the MACs of the devices it has."""
    return Presence(config, underlay, (), macs, f"h{number}")


def of_host(number: int, vtep_mac: bytes = b"") -> bytes:
    """A value that carries the IPv4 address of a host of ours, with its own MAC or another."""
    macs = {V4: vtep_mac} if vtep_mac else {}
    return encode_attrs(presence_of(number, CONFIG, underlay_of(number), macs).attrs(None))


def own_mac(number: int) -> bytes:
    """The MAC that a host of ours begins with."""
    vtep = decode_attrs(of_host(number)).vtep
    assert vtep is not None
    return vtep.mac


HOST_NUMBERS = range(1, HOSTS + 1)

IN_RANGE = [f"10.5.{number}.0-24" for number in range(1, 10)]
DUAL = [f"10.5.{number}.0-24&fd00:5:0:{number}::-64" for number in range(1, 10)]
BESIDE = ["10.5.40.0-24", "10.5.41.0-24", "10.5.255.0-24"]
ODD = [
    "10.5.4.0-23",
    "10.5.2.128-25",
    "10.5.0.0-21",
    "10.5.0.0-16",
    "0.0.0.0-0",
    "10.6.1.0-24",
    "10.5.3.0-24&fd00:5:0:4::-64",
    "10.5.3.0-24&fd00:6::-64",
    "0.0.0.0-0&fd00:5:0:2::-64",
    "0.0.0.0-0&fd00:5::-61",
    "10.5.3.0-24&fd00-5-0-3---64",
    "garbage",
    "",
    "\udcff",
]

LEASES = [guest(1), guest(2), guest_with_ipv6(3, alone=False), guest_with_ipv6(9, alone=True)]
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
    *(guest(7).replace(mac(7).hex(":").encode(), own_mac(n).hex(":").encode()) for n in HOST_NUMBERS),
    *(guest(8).replace(b"192.168.1.8", f"192.168.0.{n}".encode()) for n in HOST_NUMBERS),
]


def strange_entries() -> st.SearchStrategy[Entry]:
    """What other programs write: under keys of ours or beside them, with and without our marks."""
    names = [*IN_RANGE, *(key.replace("-64", "/64").partition("&")[2] for key in DUAL)]
    subnets = st.sampled_from([Prefix.parse(name.replace("-24", "/24")) for name in names])
    elsewhere = st.sampled_from(["192.0.2.0/24", "10.6.0.0/16", "2001:db8::/64"]).map(Prefix.parse)
    macs = st.sampled_from([mac(1), mac(99), own_mac(1), own_mac(2)])
    # The first ones that an agent of ours makes.
    tunnels = st.sampled_from([7, 8])

    def places(what: st.SearchStrategy[bytes]) -> st.SearchStrategy[tuple[int, bytes]]:
        return st.tuples(tunnels, what)

    def routes(where: st.SearchStrategy[Prefix], protocols: list[int]) -> st.SearchStrategy[Entry]:
        # By the underlay, by another link, or by a device of ours.
        devices = st.sampled_from([2, 3, 7, 8])
        return st.builds(
            lambda to, device, protocol: Route(to, gateway=to.host(99), device=device, protocol=protocol),
            *(where, devices, st.sampled_from(protocols)),
        )

    return st.one_of(
        st.builds(Guard, st.sampled_from([b"\xc0\xa8\x01\x01", b"\xc0\xa8\x09\x09"])),
        st.builds(Fdb, places(macs), st.just(b"\xc0\xa8\x09\x09"), st.sampled_from([0x80, 0x40])),
        st.builds(Neighbour, places(subnets.map(lambda each: each.base)), macs, st.sampled_from([0x80, 0x40, 4])),
        routes(subnets, [PROTOCOL_BOOT, 4, PROTOCOL]),
        routes(elsewhere, [PROTOCOL_BOOT, 4, PROTOCOL]),
    )


@dataclass(frozen=True, slots=True)
class Backup:
    data: Data
    planted: dict[str, Record]
    reserved: set[str]


CALLS = ("snapshot", "grant", "create", "replace", "move", "keep_alive", "revoke", "watch")
"""What may meet with something: see `FakeStore.meet`."""

ACCIDENTS = ("lost", "unanswered", "late")
"""What may become of a call while nobody does anything: see `FakeStore`."""


class Cluster(RuleBasedStateMachine):
    """Two hosts, their etcd, an operator, guests without an agent, and strangers with root's rights."""

    config = CONFIG
    families: Collection[int] = (V4,)
    """Of the hosts' underlay addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.etcd = FakeEtcd(pause)
        self.operator = self.etcd.store()
        self.hosts = [Host(self.etcd, number, self.config, self.families) for number in HOST_NUMBERS]
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
            self.pass_time(TTL + 10)
            self.settle()
            for host in self.hosts:
                if host.agent is not None and (lease := host.agent.keeper.lease):
                    assert not self.beside(host, lease.key), f"{host} keeps several leases"
        finally:
            for host in self.hosts:
                host.kill()

    # --- agents ---

    @initialize(running=st.sampled_from([0, 1, HOSTS, HOSTS]), create=st.sampled_from(["", "", *ACCIDENTS]))
    def agents_run(self, running: int, create: str) -> None:
        """Most of what may happen needs agents to happen to."""
        for number in HOST_NUMBERS[:running]:
            self.agent_starts(number, create)

    @rule(host=st.sampled_from(HOST_NUMBERS), which=st.sampled_from([None, None, 0, 1, 2]))
    def loops_run(self, host: int, which: int | None) -> None:
        self.hosts[host - 1].step(which)

    @rule()
    def all_loops_run(self) -> None:
        for host in self.hosts:
            host.step()

    @rule(host=st.sampled_from(HOST_NUMBERS), create=st.sampled_from(["", "", "reserved", *ACCIDENTS]))
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
        self.hosts[host - 1].subnet_file, self.hosts[host - 1].settled = (), None

    @rule(
        host=st.sampled_from(HOST_NUMBERS),
        call=st.sampled_from(CALLS),
        plot=st.sampled_from([*ACCIDENTS, "killed before", "killed after", "race", "reserved"]),
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

        def reserved(work: Callable[[], object]) -> object:
            """The operator reserves a subnet for the host, which it cannot know of when it does the work."""
            self.plant((DUAL if len(self.config.blocks) > 1 else IN_RANGE)[other], of_host(host), 0)
            return work()

        plots = {"lost": store.lost, "unanswered": store.unanswered, "late": store.late}
        plots |= {"killed before": killed_before, "killed after": killed_after, "race": race, "reserved": reserved}
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
        self.requests_arrive()

    @rule(all_of_it=st.booleans())
    def etcd_compacts(self, all_of_it: bool) -> None:
        data = self.etcd.data
        revision = data.revision if all_of_it else (data.compacted + data.revision) // 2
        if self.etcd.up and data.compacted < revision:
            self.etcd.compact(revision)

    @rule()
    def etcd_is_backed_up(self) -> None:
        self.backups = [*self.backups[-1:], Backup(self.etcd.save(), dict(self.planted), set(self.reserved))]

    @precondition(lambda self: self.backups)
    @rule(which=st.sampled_from([0, -1]), other_cluster=st.booleans())
    def etcd_is_restored(self, which: int, other_cluster: bool) -> None:
        backup = self.backups[which]
        self.forget_what_was()
        self.etcd.restore(backup.data, other_cluster=other_cluster)
        self.planted = dict(backup.planted)
        self.restored = dict(backup.data.records)
        self.reserved = set(backup.reserved)

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
        key=st.sampled_from([*IN_RANGE, *DUAL, *BESIDE, *ODD]),
        value=st.sampled_from([*LEASES, *FORGED]),
        ttl=st.sampled_from([0, 60, 10_000]),
    )
    def lease_comes(self, key: str, value: bytes, ttl: int) -> None:
        self.plant(key, value, ttl)

    @rule(
        host=st.sampled_from(HOST_NUMBERS),
        key=st.sampled_from([*IN_RANGE, *DUAL, *ODD]),
        ttl=st.sampled_from([0, 60, 10_000]),
    )
    def host_is_given_another_lease(self, host: int, key: str, ttl: int) -> None:
        self.plant(key, of_host(host), ttl)

    @rule(key=st.sampled_from([*IN_RANGE, *DUAL, *ODD]), value=st.sampled_from([*HOSTILE, *LEASES]))
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

    @rule(
        host=st.sampled_from(HOST_NUMBERS),
        name=st.sampled_from([V4_DEVICE, V6_DEVICE]),
        what=st.sampled_from(["deleted", "down", "mac", "addresses"]),
    )
    def device_is_harmed(self, host: int, name: str, what: str) -> None:
        kernel = self.hosts[host - 1].kernel
        found = kernel.devices.get(name)
        if found is None:
            return
        match what:
            case "deleted":
                kernel.delete_device(name)
            case "down":
                kernel.set_down(name)
            case "mac":
                kernel.set_mac(mac(99), name)
            case "addresses":
                for address in found.addresses:
                    kernel.remove_address(address, name)

    @rule(host=st.sampled_from(HOST_NUMBERS))
    def firewall_is_flushed(self, host: int) -> None:
        self.hosts[host - 1].kernel.alter_firewall()

    @rule(host=st.sampled_from(HOST_NUMBERS), call=st.sampled_from(["apply", "dump", "ensure_devices"]))
    def kernel_fails(self, host: int, call: str) -> None:
        self.hosts[host - 1].kernel.fail[call] = [105]

    # --- what must hold ---

    @invariant()
    def nobody_touches_what_is_others(self) -> None:
        records = self.etcd.data.records
        for key, planted in list(self.planted.items()):
            record = records.get(key)
            if record == planted:
                continue
            owner = self.owner_of(planted.value)
            if record is not None and record.create_revision == planted.create_revision:
                # A host writes what bears its address, or hangs on the etcd lease that it keeps alive.
                keeper = next((host for host in self.hosts if planted.etcd_lease in host.granted), None)
                assert owner or keeper, f"{key} of nobody's host was written"
                assert self.owner_of(record.value) in (owner, keeper)
            elif self.etcd.alive(planted.etcd_lease) or not planted.etcd_lease:
                self.moved(planted, owner)
            del self.planted[key]
        reservations = {key for key, record in records.items() if not record.etcd_lease}
        assert reservations == self.reserved, (
            f"agents neither make nor end reservations: {reservations ^ self.reserved}"
        )

    def moved(self, planted: Record, owner: Host | None) -> None:
        """A record that has not ended is gone: its host has put another in its place, in the same transaction."""
        etcd, key = self.etcd, planted.key
        gone = (each for each in etcd.data.events if isinstance(each, Deleted) and each.key == key)
        revision = next(each.mod_revision for each in gone if each.mod_revision > planted.mod_revision)
        put = next((e for e in etcd.data.events if isinstance(e, Record) and e.mod_revision == revision), None)
        assert owner is not None and put is not None, f"{key} was deleted"
        assert self.owner_of(put.value) is owner
        if planted.etcd_lease and not put.etcd_lease:
            return  # Given up for the reservation.
        assert bool(planted.etcd_lease) == bool(put.etcd_lease), f"the reservation {key} has become a lease"
        incomplete = len(self.usable(planted)) < len(self.config.blocks) or subnets_of(planted) != self.usable(planted)
        before = (etcd.at(revision - 1, each) for each in {event.key for event in etcd.data.events} - {key})
        elders = (each for each in before if each is not None and each.create_revision < planted.create_revision)
        disputed = planted.etcd_lease and any(subnets_of(each) & subnets_of(planted) for each in elders)
        assert incomplete or disputed, f"{key} was moved to {put.key}"
        assert len(self.usable(put)) == len(self.config.blocks)
        if not planted.etcd_lease:
            self.reserved.remove(key)
            self.reserved.add(put.key)

    def owner_of(self, value: bytes) -> Host | None:
        """The host that may take a record with this value for its own: by address, or by its device's MAC."""
        with contextlib.suppress(LeaseInvalid):
            attrs = decode_attrs(value)
            for host in self.hosts:
                if host.identity.has_address(attrs):
                    return host
            for host in self.hosts:
                if host.identity.has_mac(attrs):
                    return host
        return None

    @invariant()
    def no_subnet_has_two_holders(self) -> None:
        """Where a key is one subnet. Of a dual-stack key two hosts may take one half each, for a moment."""
        if len(self.config.blocks) == 1:
            assert not self.shared()

    def shared(self) -> list[tuple[Record, Record]]:
        """Records of two hosts with subnets in common, the elder first, that they have taken or hold."""
        held = [(host, record) for host in self.hosts for record in self.of(host) if self.is_taken(host, record)]
        held.sort(key=lambda each: each[1].create_revision)
        return [
            (elder, younger)
            for (host, elder), (other, younger) in itertools.combinations(held, 2)
            if host is not other and self.usable(elder) & self.usable(younger)
        ]

    def is_taken(self, host: Host, record: Record) -> bool:
        """Whether an agent of the host has written the record, or goes by it as it stands."""
        lease = host.agent.keeper.lease if host.agent else None
        return record.key not in self.planted or (lease is not None and lease[3:] == record[2:])

    @rule()
    def all_is_well_in_the_end(self) -> None:
        """Everything is reachable again, and all loops have had their turn."""
        if not self.etcd.up:
            self.etcd.start()
        self.requests_arrive()
        for host in self.hosts:
            host.kernel.fail = {call: [] for call in host.kernel.fail}
            if host.agent is not None:
                host.agent.store.reconnect()
                host.agent.store.plots.clear()
        self.settle()
        waits = any(host.agent and host.agent.reconciler and host.agent.reconciler.awaiting for host in self.hosts)
        if self.went_back or waits:
            # Peers that the store has lost are kept for a while, and what reaches those of another backend or VNI.
            self.pass_time(max(LINGER, FOLLOW) + 10)
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
        # A reservation stays as the operator has made it, even of what another host had before, by another key.
        assert [
            (elder, younger) for elder, younger in self.shared() if younger.etcd_lease and self.has_agent(younger)
        ] == []
        for host in self.hosts:
            if host.agent is not None:
                self.assert_well(host, host.agent)

    def requests_arrive(self) -> None:
        """Those that were late. What one of a former agent takes is more than the present one knows of."""
        before = self.etcd.data.records.keys() | set()
        self.etcd.arrive()
        for host in self.hosts:
            for record in self.of(host):
                if record.key not in before and host.granted.get(record.etcd_lease) is not host.agent:
                    host.left[record.key] = record

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
            taken = [subnet for record in snapshot.records for subnet in subnets_of(record)]
            free = [
                [key for key in DUAL if not any(parse_subnet_key(key)[family].overlaps(each) for each in taken)]
                for family, _ in enumerate(self.config.blocks)
            ]
            assert not all(free), f"{host} has no lease, though {free} are free"
            return
        key = lease.key
        records = {record.key: record for record in snapshot.records}
        assert key in records, f"{host} believes to hold {lease.subnet}"
        record = records[key]
        assert (record.etcd_lease, record.create_revision, record.mod_revision) == lease[3:], f"{host}: {lease}"
        assert decode_attrs(record.value) == lease.attrs
        assert lease.reserved or self.etcd.alive(lease.etcd_lease)
        # What a backup brings back, or a former agent has left, nobody renews: it ends by itself.
        others = [
            each
            for each in self.beside(host, key)
            if each not in (self.restored.get(each.key), host.left.get(each.key))
        ]
        assert not others, f"{host} has several leases"
        if host.settled is not None and (still := records.get(host.settled.key)):
            assert still.key == key or still != host.settled, (
                f"{host} has moved to {key}, and nobody had touched {still}"
            )
        host.settled = record
        # The table's rules, applied to all there is at once.
        assert len(lease.subnets) == len(self.config.blocks)
        macs = tuple(vtep.mac for vtep in (lease.attrs.vtep, lease.attrs.vtep6) if vtep is not None)
        own = OwnHost(key, lease.subnets, host.underlay.addresses, macs, agent.underlay.links)
        table = LeaseTable(self.config, own)
        table.replace(snapshot)
        backend = backend_of(self.config)
        kernel, here = host.kernel, host.kernel.here
        peers = [backend.entries(peer, here) for _, peer in table.peers()]
        wanted = {entry[0]: entry for entries in peers for entry in entries}
        there = {entry[0]: entry for entry in sorted(kernel.entries(), key=lambda entry: wanted.get(entry[0]) == entry)}
        assert {name: there.get(name) for name in wanted} == wanted, f"{host} {lease}"
        stale = [
            entry
            for name, entry in there.items()
            if name not in wanted and ours(entry, here) and not leads_elsewhere(entry, kernel)
        ]
        assert not stale, f"{host} {lease}"
        assert agent.reconciler is not None
        state = agent.reconciler.state
        reached = sum(1 for entries in peers if entries)
        assert (state.ready, state.gap, state.trouble) == (True, 0, "")
        assert (state.peers, state.unreachable, state.rejected) == (
            *(reached, len(peers) - reached),
            table.rejected_count,
        )
        devices = backend.devices(self.config, lease, agent.underlay)
        assert kernel.devices.keys() == {spec.name for spec in devices}
        for spec in devices:
            found = kernel.devices[spec.name]
            assert (incompatibility(spec, found), adjustments(spec, found)) == (None, ())
            assert is_device_mac(found.mac)

    def beside(self, host: Host, key: str) -> list[Record]:
        """The records of this host but `key` that nobody else has put."""
        others = (each for each in self.of(host) if each.key != key)
        return [each for each in others if each.key not in self.planted and each.key not in self.reserved]

    def has_agent(self, record: Record) -> bool:
        """Whether there is one to give it up."""
        owner = self.owner_of(record.value)
        return owner is not None and owner.agent is not None

    def usable(self, record: Record) -> set[Prefix]:
        """Its subnets that a host of this network can have."""
        return {
            subnet
            for subnet in subnets_of(record)
            for available in self.config.ranges
            if subnet.length == available.length and available.network.covers(subnet)
        }

    def of(self, host: Host) -> list[Record]:
        """The records that an agent of this host may take for its own, in the order of their keys."""
        found = []
        for record in self.etcd.data.records.values():
            if not self.usable(record):
                continue
            with contextlib.suppress(LeaseInvalid):
                if host.identity.has_address(decode_attrs(record.value)):
                    found.append(record)
        return sorted(found)


def leads_elsewhere(entry: Entry, kernel: FakeKernel) -> bool:
    """Whether it is a route that uses nothing of ours: a dump does not show it, whatever its protocol is."""
    return (
        isinstance(entry, Route) and not entry.nexthop and entry.device not in {kernel.link, *kernel.tunnels.values()}
    )


def subnets_of(record: Record) -> set[Prefix]:
    with contextlib.suppress(LeaseInvalid):
        return {subnet for subnet in parse_subnet_key(record.key) if subnet is not None}
    return set()


class DualStackCluster(Cluster):
    """The same in a network, and over an underlay, of both address families."""

    config = BOTH
    families = (V4, V6)


@pytest.mark.parametrize("cluster", [Cluster, DualStackCluster])
def test_any_sequence_of_events_ends_well(cluster: type[Cluster]) -> None:
    with capture_logs():
        run_state_machine_as_test(
            cluster,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )

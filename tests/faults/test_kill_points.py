"""An agent that is killed at any point of a start or of a pass, and started again: nothing is lost, nothing is left.

Three hosts share a lab. The third is the victim: one that has never run, one that comes back to a cluster that has
changed meanwhile, or one at work. The other two talk all the time, and so does the victim's pod where it could before.
"""

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator

import pytest

from overlay.cluster import ETCD_ENDPOINT, Host, Lab, LabError, Pod, wait_until
from subnet_lease.model import format_mac
from tests.conftest import MakeLab
from tests.faults import killed_at
from tests.faults.world import Pings, entries, entries_called_for, holder, lease_of, stranger

AGENT = (sys.executable, "-P", "-m", "agent")

TTL = 3600
"""Seconds for which agents lease; none ends within a test."""

PEERS = 201, 202, 203, 204
"""Numbers of hosts without an agent, so that a pass has several batches. See `stranger`."""

PROGRAMMING = (
    "before the guard's sets",
    "guard's sets made",
    "kernel read",
    "guard told, nothing routed",
    "before the first batch",
    "after the first batch of several",
    "after the third batch of several",
    "after all batches, before settling",
    "before the firewall's rules",
    "firewall loaded",
)

FIRST_START = (
    "config read",
    "leases read",
    "etcd lease granted, key not created",
    "key created",
    "before the device",
    "device created, not up",
    "device made",
    *PROGRAMMING,
    "subnet file written, not in place",
    "subnet file in place, not ready",
    "ready",
)

RESTART = (
    "config read",
    "leases read",
    "etcd lease renewed",
    "before the device",
    "device made",
    *PROGRAMMING,
    "subnet file in place, not ready",
    "ready",
)


class World:
    """The lab, its peers without agents, and what must hold in it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.plain = tuple(lab.agent_command)
        *self.others, self.victim = lab.hosts

    def join(self, number: int) -> None:
        assert self.lab.store.create(f"10.244.{number}.0-24", stranger(number), self.lab.store.grant(TTL))

    def leave(self, number: int) -> None:
        """With its etcd lease, as a host that gives its own back."""
        (lease,) = (lease for lease in self.lab.leases() if str(lease.subnet) == f"10.244.{number}.0/24")
        self.lab.store.revoke(lease.etcd_lease)

    # --- the victim's agent ---

    def start(self, name: str = "") -> None:
        """Start the agent, plainly or to be killed at the point of this name."""
        self.lab.agent_command = (sys.executable, "-P", killed_at.__file__, name, "run") if name else self.plain
        self.victim.start_agent()

    def wait_dead(self) -> None:
        """Until the agent has been killed where it was to be."""
        try:
            wait_until(lambda: self.victim.agent_pid is None, 20, "the end of the agent")
        except LabError as error:
            raise AssertionError(f"{error}\n{self.victim.log()[-2000:]}") from None
        assert self.victim.log().endswith(killed_at.LAST_WORDS), self.victim.log()[-2000:]
        self.victim.close()

    def kill(self) -> None:
        if self.victim.agent_pid is not None:
            self.victim.kill_agent(signal.SIGKILL)

    def forget(self) -> None:
        """Make the victim a host that has never run an agent."""
        self.kill()
        self.victim.close()
        options = ("--subnet-file", str(self.victim.subnet_file), "--state-dir", str(self.victim.state_dir))
        done = self.victim.run(*AGENT, "cleanup", "--release", *options, "--etcd-endpoints", ETCD_ENDPOINT)
        assert done.returncode == 0, done.stderr
        assert self.subnet_of(self.victim) is None

    # --- what must hold ---

    def subnet_of(self, host: Host) -> str | None:
        """The subnet that etcd has for the host, and no second."""
        own = [str(lease.subnet) for lease in self.lab.leases() if holder(lease) == host.underlay_ip]
        assert len(own) <= 1, own
        return own[0] if own else None

    def in_vain(self) -> set[int]:
        """The etcd leases that hold no key of an agent or of a peer."""
        # The stubs that the agent uses do not have this call.
        listed = self.lab.hub.run("etcdctl", "--endpoints", ETCD_ENDPOINT, "lease", "list", "-w", "json")
        present = {each["id"] for each in json.loads(listed.stdout)["leases"] or ()}
        return present - {lease.etcd_lease for lease in self.lab.leases()}

    def in_order(self, host: Host) -> bool:
        return entries(host) == entries_called_for(host, self.lab.leases())

    def assert_whole(self) -> None:
        for host in self.lab.hosts:
            wait_until(lambda host=host: self.in_order(host), 10, f"the entries of all leases on {host.name}")
            assert self.subnet_of(host) == host.subnet
        (link,) = self.victim.json("ip", "-d", "link", "show", "flannel.1")
        attrs = lease_of(self.victim).attrs
        assert attrs.vtep is not None
        assert (link["address"], "UP" in link["flags"]) == (format_mac(attrs.vtep.mac), True)
        addresses = self.victim.json("ip", "-4", "addr", "show", "flannel.1")[0]["addr_info"]
        assert [each["local"] for each in addresses] == [self.victim.subnet.removesuffix("/24")]
        assert self.victim.run("cat", "/proc/sys/net/ipv4/ip_forward").stdout.strip() == "1"
        assert self.victim.subnet in self.victim.run("nft", "list", "table", "inet", "overlay_agent").stdout

    @contextlib.contextmanager
    def nothing_lost(self, *pods: Pod) -> Iterator[None]:
        """Pings between the pods of the hosts that nobody harms, and from one of them to `pods`, lose nothing."""
        src, dst = (host.pods[0] for host in self.others)
        with contextlib.ExitStack() as stack:
            pings = []
            for pair in ((src, dst), *((src, pod) for pod in pods)):
                pings.append(Pings(*pair))
                stack.callback(pings[-1].kill)
            yield
            assert [gap for ping in pings for gap in ping.finish()] == []


@pytest.fixture(scope="module")
def shared(make_module_lab: MakeLab) -> World:
    lab = make_module_lab(pods=1, agent_options=("--ip-masq", "--subnet-lease-ttl", str(TTL)))
    lab.up()
    made = World(lab)
    for number in PEERS:
        made.join(number)
    return made


@pytest.fixture
def world(shared: World) -> Iterator[World]:
    """The lab with the victim's agent running and its pod attached, and whole again afterwards for the next test."""
    if shared.victim.agent_pid is None:
        shared.start()
        shared.victim.wait_ready()
    shared.assert_whole()
    shared.victim.attach_pods()
    try:
        yield shared
    finally:
        # What a failure has left must not fail the next test as well.
        shared.kill()


@pytest.mark.parametrize("name", FIRST_START)
def test_agent_killed_in_its_first_start_comes_up_as_if_it_had_not_been(world: World, name: str) -> None:
    world.forget()
    before = world.in_vain()
    with world.nothing_lost():
        world.start(name)
        world.wait_dead()
        leased = world.subnet_of(world.victim)
        assert (leased is None) == (FIRST_START.index(name) < FIRST_START.index("key created"))
        world.start()
        world.victim.wait_ready()
        world.assert_whole()
        world.victim.attach_pods()
    assert leased in (None, world.victim.subnet)
    left = world.in_vain() - before
    # Of the one that was granted in vain nobody knows any more. It holds no key, and ends by itself.
    assert len(left) == (name == "etcd lease granted, key not created")
    assert all(world.lab.store.time_left(etcd_lease) <= TTL for etcd_lease in left)
    assert not list(world.lab.state.glob(f".{world.victim.subnet_file.name}.*")), "what was never put in place"
    assert_reached(world)


@pytest.mark.parametrize("name", RESTART)
def test_agent_killed_as_it_comes_back_to_a_changed_cluster_loses_nothing(world: World, name: str) -> None:
    subnet, mac = world.victim.subnet, lease_of(world.victim).attrs
    before = world.in_vain()
    with world.nothing_lost(world.victim.pods[0]):
        world.kill()
        world.leave(PEERS[0])
        world.join(PEERS[0] + 10)
        world.join(PEERS[0] + 11)
        world.start(name)
        world.wait_dead()
        world.start()
        world.victim.wait_ready()
        world.assert_whole()
    assert (world.victim.subnet, lease_of(world.victim).attrs) == (subnet, mac)
    world.leave(PEERS[0] + 10)
    world.leave(PEERS[0] + 11)
    world.join(PEERS[0])
    world.assert_whole()
    assert world.in_vain() == before
    assert_reached(world)


def remove_entries(world: World) -> None:
    """All that leads to one peer, and the route to another."""
    base, mac = f"10.244.{PEERS[1]}.0", f"02:00:00:00:09:{PEERS[1]:02x}"
    script = (
        f"ip route del {base}/24; ip neigh del {base} dev flannel.1; bridge fdb del {mac} dev flannel.1; "
        f"ip route del 10.244.{PEERS[2]}.0/24"
    )
    done = world.victim.run("sh", "-ec", script)
    assert done.returncode == 0, done.stderr


Step = Callable[[World], None]

LEAVE: tuple[Step, Step] = (lambda world: world.leave(PEERS[3]), lambda world: world.join(PEERS[3]))

AT_WORK: dict[str, tuple[Step, Step]] = {
    "drift seen, nothing repaired": (remove_entries, lambda world: None),
    "drift repaired in part": (remove_entries, lambda world: None),
    "leave seen, nothing dropped": LEAVE,
    "leave: route dropped": LEAVE,
    "leave: all but the fdb entry dropped": LEAVE,
    "join: fdb entry put": (lambda world: world.join(PEERS[3] + 10), lambda world: world.leave(PEERS[3] + 10)),
}
"""Point: what brings the agent there, and what undoes that for the next test."""


@pytest.mark.parametrize("name", AT_WORK)
def test_agent_killed_at_work_finishes_it_when_it_comes_back(world: World, name: str) -> None:
    happen, undo = AT_WORK[name]
    subnet = world.victim.subnet
    with world.nothing_lost(world.victim.pods[0]):
        world.kill()
        world.start(name)
        world.victim.wait_ready()
        happen(world)
        world.wait_dead()
        assert not world.in_order(world.victim), "it was killed in the midst of it"
        world.start()
        world.victim.wait_ready()
        world.assert_whole()
    assert world.victim.subnet == subnet
    undo(world)
    world.assert_whole()
    assert_reached(world)


def test_every_point_is_tried() -> None:
    assert killed_at.POINTS.keys() == {*FIRST_START, *RESTART, *AT_WORK}


def assert_reached(world: World) -> None:
    src, dst = world.others[0].pods[0], world.victim.pods[0]
    assert src.run("ping", "-n", "-c", "1", "-W", "1", dst.address).returncode == 0

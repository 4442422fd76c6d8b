"""An N-host cluster in network namespaces on one machine: for newcomers, and for the tests.

Owns the namespaces `oal-<lab>-*`, everything in them, and `/run/overlay-agent/lab/<lab>/`; nothing in the machine's own
namespace. The underlay is a bridge in the hub's namespace, where one etcd runs; each host is a namespace with `eth0` on
that bridge, an agent, and a bridge `cni0` with pods, which are namespaces themselves. `topology` says what else the
underlay can be.

All names follow from the lab's name, so that `down` needs no memory: whatever lives in a namespace of ours is ours,
because the namespace is. That is what makes a lab safe to kill at any moment and to bring up again.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

from overlay.cluster_hosts import Host, LabError, Place, Pod, tail, wait_until
from overlay.netns import NETNS, Process, create, delete, end, inhabitants
from overlay.topology import LINKS, Topology, network_config
from subnet_lease.model import Lease, LeaseInvalid, decode_attrs, parse_subnet_key
from subnet_lease.store import Store, StoreError

STATE_ROOT = Path("/run/overlay-agent/lab")

UNDERLAY = LINKS[0].hub[4]
"""The hub's IPv4 address on the hosts' link; hosts follow from .11 on."""

ETCD_ENDPOINT = f"http://{UNDERLAY.ip}:2379"
"""Of a lab whose underlay has IPv4; see `Lab.etcd_endpoint`."""

NETWORK_CONFIG: Mapping[str, Any] = network_config()

_NAME = re.compile(r"[a-z0-9]{1,12}")

# As etcd 3.4 wants it: a unix listener has the form host:port, and its socket is a file of that name in etcd's
# working directory.
_ETCD_SOCKET = "etcd:2379"

# They configure the machine's own agent and etcd, and would reach into the lab's.
_FOREIGN_VARIABLES = ("OVERLAY_AGENT_", "FLANNELD_", "ETCD_")

Connect = Callable[[str], Store]
"""Opens the lease store at an endpoint (`http://..` or `unix:///path`)."""

Progress = Callable[[str], None]


class Ping(NamedTuple):
    """One echo request from pod `src` to an address of pod `dst`; `rtt_ms` is None without an answer."""

    src: str
    dst: str
    family: int
    ok: bool
    rtt_ms: float | None


# --- the lab -------------------------------------------------------------------------------------------------------


class Lab:
    """A cluster of `hosts` hosts with `pods` pods each. Building it makes nothing: see `up`, or the steps it takes.

    As a context manager it is up inside the block and gone after it. With `tied`, it is marked as this process's own,
    for others to sweep away once the process is gone (`orphans`). `underlay` names the address families that hosts have
    there (a key of `topology.FAMILIES`); a `topology` says that and more. Agents are told their underlay by `--iface`,
    or choose it by `underlay_options`, which may be none at all.
    """

    def __init__(
        self,
        name: str = "lab",
        *,
        connect: Connect,
        hosts: int = 3,
        pods: int = 2,
        config: Mapping[str, Any] = NETWORK_CONFIG,
        underlay: str = "4",
        topology: Topology | None = None,
        agent_command: Sequence[str] = (sys.executable, "-P", "-m", "agent", "run"),
        agent_options: Sequence[str] = (),
        underlay_options: Sequence[str] | None = None,
        tied: bool = False,
        state_root: Path = STATE_ROOT,
    ) -> None:
        if not _NAME.fullmatch(name):
            raise LabError(f"{name[:40]!r} cannot name a lab: use 1 to 12 small letters and digits.")
        self.name = name
        self.prefix = f"oal-{name}-"
        self.topology = topology or Topology(underlay)
        self.state = state_root / name
        self.agent_command = agent_command
        self.agent_options = agent_options
        self.underlay_options = underlay_options
        self._connect = connect
        self._config = config
        self._owner = Process.of(os.getpid()) if tied else None
        self._store: Store | None = None
        self._pods = pods
        self._processes: dict[str, Process] = {}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self.hub = Place(self, "hub")
        self.hosts = [Host(self, number + 1, pods) for number in range(hosts)]

    @classmethod
    def existing(cls, name: str, connect: Connect, state_root: Path = STATE_ROOT) -> Self:
        """The lab that an earlier command brought up; LabError if there is none."""
        lab = cls(name, connect=connect, state_root=state_root, hosts=0)
        saved = saved_state(lab.state)
        if saved is None or not lab.hub.exists:
            raise LabError(f"there is no lab {name!r}; bring it up with: {command_line()} lab up{name_option(name)}")
        lab._pods = saved["pods"]
        lab.topology = Topology.decode(saved["topology"])
        lab.hosts = [Host(lab, number + 1, lab._pods) for number in range(saved["hosts"])]
        lab._processes = {key: Process(*value) for key, value in saved["processes"].items()}
        return lab

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def __getitem__(self, name: str) -> Place:
        """A host, a pod or the hub, by its name."""
        for place in (self.hub, *self.hosts, *self.pods):
            if place.name == name:
                return place
        names = "hub, h1" + (f" to h{len(self.hosts)}" if len(self.hosts) > 1 else "")
        names += ", and pods as h1p1" if self._pods else ""
        raise LabError(f"lab {self.name!r} has no {name!r}; it has {names}.")

    @property
    def pods(self) -> list[Pod]:
        """All pods of all hosts."""
        return [pod for host in self.hosts for pod in host.pods]

    # --- up and down ---

    def up(self, progress: Progress = lambda line: None) -> None:
        """All of it: network, etcd, agents, pods, until every host can reach every other. Undone if it fails.

        What an earlier lab of the same name has left is taken down first.
        """
        with self._alone():
            try:
                if self._remove():
                    progress(f"removed what was left of an earlier lab {self.name!r}")
                self.make_network()
                blocks = [
                    str(link.hub[each].network) for link in self.topology.links for each in self.topology.families
                ]
                on = " and ".join(blocks)
                progress(f"network: {_count(self.hosts, 'host')} on {on}, {_count(self.pods, 'pod')}")
                self.start_etcd()
                self.write_config(self._config)
                progress(f"etcd: answers at {self.etcd_endpoint()}, network configuration written")
                for host in self.hosts:
                    host.start_agent()
                for host in self.hosts:
                    host.wait_ready(30 + len(self.hosts))
                    host.attach_pods()
                    subnets = " and ".join(host.subnets.values())
                    progress(f"{host.name}: {subnets} leased, {_count(host.pods, 'pod')} attached")
                self.wait_converged()
                progress("every host knows every other")
            except BaseException:
                self._remove()
                raise

    def down(self) -> bool:
        """End the lab's processes, delete its namespaces and its files. False if there was nothing of it."""
        with self._alone():
            return self._remove()

    def close(self) -> None:
        """Let go of the lab without taking it down: its agents and etcd live on."""
        for host in self.hosts:
            host.close()
        self.close_store()

    def _remove(self) -> bool:
        self.close()
        namespaces = sorted(NETNS.glob(self.prefix + "*"))
        saved = saved_state(self.state)
        recorded = {
            *self._processes.values(),
            *(Process(*each) for each in (saved or {}).get("processes", {}).values()),
        }
        # A dying process may still have started another.
        while found := {*inhabitants(namespaces), *(each for each in recorded if each.alive)}:
            if os.getpid() in {each.pid for each in found}:
                raise LabError(f"this command runs inside lab {self.name!r}; leave it first, then take it down.")
            end(found, signal.SIGTERM, signal.SIGKILL)
        for child in self._children.values():
            child.wait()
        self._children.clear()
        self._processes.clear()
        if namespaces:
            delete(path.name for path in namespaces)
        existed = bool(namespaces) or self.state.exists()
        if self.state.exists():
            shutil.rmtree(self.state)
        return existed

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One command at a time works on a lab. An abstract socket: gone with its process, and no file to clean up.

        A command that was killed may have left an `ip` at work, which holds on to the lock for the moment it takes.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as lock:
            lock.set_inheritable(True)

            def locked() -> bool:
                try:
                    lock.bind(f"\0overlay-agent-lab-{self.name}")
                except OSError:
                    return False
                return True

            try:
                wait_until(locked, 2, "the lock")
            except LabError:
                raise LabError(f"another command is at work on lab {self.name!r}; wait until it is done.") from None
            yield

    # --- step by step ---

    def make_network(self) -> None:
        """Namespaces, underlay and the hosts' addresses. The state comes first, so that no namespace is an orphan."""
        self.state.mkdir(parents=True)
        self._save()
        create(place.netns for place in (self.hub, *self.hosts, *self.pods))
        self.hub.ip(*self.topology.hub_lines())
        if self.topology.beyond:
            self.hub.run("sh", "-c", self.topology.router_script())
        self._plug_in(self.hosts)

    def _plug_in(self, hosts: Sequence[Host]) -> None:
        self.hub.ip(*(line for host in hosts for line in host.seat.hub_lines(host.netns)))
        # All namespaces share one table of 1024 learnt neighbours (gc_thresh3 in net/core/neighbour.c), which 32 hosts
        # that know one another fill; permanent entries do not count.
        told = self.hosts if len(self.hosts) > 20 else []
        for host in hosts:
            host.ip(*host.seat.host_lines(peer.seat for peer in told if peer is not host))

    def add_host(self) -> Host:
        """One more host on the underlay, its pods' namespaces included; its agent is the caller's to start."""
        host = Host(self, len(self.hosts) + 1, self._pods)
        create(place.netns for place in (host, *host.pods))
        self._plug_in([host])
        self.hosts.append(host)
        self._save()
        return host

    @property
    def store(self) -> Store:
        """The lab's lease store, reached from outside the namespaces."""
        if self._store is None:
            self._store = self._connect(f"unix://{self.state / _ETCD_SOCKET}")
        return self._store

    def etcd_endpoint(self, family: int | None = None) -> str:
        """Where hosts find etcd, by this family, or by the first that the underlay has."""
        address = LINKS[0].hub[family or self.topology.families[0]].ip
        return f"http://{address}:2379" if address.version == 4 else f"http://[{address}]:2379"

    @property
    def etcd_pid(self) -> int | None:
        """None if etcd does not run."""
        return self.process("etcd")

    def start_etcd(self, seconds: float = 20) -> None:
        """Start etcd in the hub, on the data it had if it ran before, and wait until it answers."""
        # A killed etcd leaves its socket behind, and would not start over it.
        (self.state / _ETCD_SOCKET).unlink(missing_ok=True)
        peer = "http://127.0.0.1:2380"
        endpoints = ",".join(map(self.etcd_endpoint, self.topology.families))
        argv = [
            *("etcd", "--name", "lab", "--data-dir", str(self.state / "etcd")),
            *("--listen-client-urls", f"{endpoints},unix://{_ETCD_SOCKET}"),
            *("--advertise-client-urls", endpoints),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"lab={peer}"),
            # Alone, it has nobody to wait for before it elects itself.
            *("--heartbeat-interval", "20", "--election-timeout", "100"),
            *("--logger", "zap", "--log-outputs", "stderr", "--log-level", "warn"),
        ]
        self.start("etcd", self.hub.inside(*argv), {})

        def answers() -> bool:
            if self.etcd_pid is None:
                raise LabError(f"etcd has ended at once; the end of its log:\n{tail(self.log('etcd'))}")
            try:
                self.store.read_config()
            except StoreError:
                # A channel that was refused waits before it tries again; a new one does not.
                self.close_store()
                return False
            return True

        wait_until(answers, seconds, "an answer from etcd")

    def close_store(self) -> None:
        """Forget the connection to etcd; the next use of `store` makes another."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def stop_etcd(self, number: signal.Signals = signal.SIGTERM, seconds: float = 10) -> None:
        """Send the signal and wait for the exit."""
        self.kill("etcd", number, seconds)
        self.close_store()

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Put the network configuration, as an operator would."""
        self.store.write_config(json.dumps(config).encode())

    def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Write another network configuration, and have all agents look at it now: they would within a minute."""
        self.write_config(config)
        for host in self.hosts:
            if (pid := host.agent_pid) is not None:
                os.kill(pid, signal.SIGHUP)

    def leases(self) -> list[Lease]:
        """All leases in etcd that can be read, by subnet."""
        found = []
        for record in self.store.snapshot().records:
            with contextlib.suppress(LeaseInvalid):
                subnet, subnet6 = parse_subnet_key(record.key)
                attrs = decode_attrs(record.value)
                revisions = record.create_revision, record.mod_revision
                found.append(Lease(subnet, subnet6, attrs, record.etcd_lease, *revisions))
        return sorted(found, key=lambda lease: lease.subnets)

    def wait_converged(self, seconds: float = 30) -> None:
        """Until every host has a lease, and its kernel all that it takes to reach every other."""

        def converged() -> bool:
            leases = self.leases()
            return all(
                any(map(host.holds, leases)) and all(peer.programmed for peer in host.peers(leases))
                for host in self.hosts
            )

        wait_until(converged, seconds, "all hosts in the kernels of all hosts")

    def ping_all(self) -> list[Ping]:
        """One echo request from every pod to every other, a few at a time, to each address."""

        def ping(src: Pod, dst: Pod, family: int) -> Ping:
            answer = src.run("ping", "-n", "-c", "1", "-W", "1", dst.addresses[family])
            found = re.search(r"time=([0-9.]+) ms", answer.stdout)
            return Ping(src.name, dst.name, family, answer.returncode == 0, float(found[1]) if found else None)

        pods = self.pods
        ways = [(src, dst, family) for src in pods for dst in pods if src is not dst for family in dst.addresses]
        with ThreadPoolExecutor(8) as threads:
            return list(threads.map(lambda way: ping(*way), ways))

    # --- its processes ---

    def start(self, name: str, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start a process that outlives this one; its output goes to `<name>.log`."""
        if (running := self.process(name)) is not None:
            raise LabError(f"{name} runs already, as process {running}.")
        if ended := self._children.pop(name, None):
            ended.wait()
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN_VARIABLES)}
        # The agents run the code that runs this, installed or not.
        code = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
        with self.log_path(name).open("ab") as log:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.state,
                env={**inherited, "PYTHONPATH": code, **environment},
                start_new_session=True,
            )
        self._children[name] = child
        if process := Process.of(child.pid):
            self._processes[name] = process
            self._save()

    def process(self, name: str) -> int | None:
        """The id of `etcd` or of a host's agent; None if it does not run."""
        process = self._processes.get(name)
        return process.pid if process and process.alive else None

    def kill(self, name: str, number: signal.Signals, seconds: float) -> int | None:
        """Send the signal and wait for the exit. The exit code, if this process started it."""
        process = self._processes.get(name)
        if process is None or not process.alive:
            raise LabError(f"{name} does not run.")
        end([process], number, grace=seconds)
        child = self._children.pop(name, None)
        return child.wait() if child else None

    def log_path(self, name: str) -> Path:
        """Where the output of `etcd` or of a host's agents goes."""
        return self.state / f"{name}.log"

    def log(self, name: str) -> str:
        """What has been written there."""
        return self.log_path(name).read_text(errors="replace")

    def _save(self) -> None:
        state = {
            "hosts": len(self.hosts),
            "pods": self._pods,
            "topology": self.topology.encode(),
            "processes": self._processes,
            "owner": self._owner,
        }
        fresh = self.state / "lab.json.new"
        fresh.write_text(json.dumps(state))
        fresh.replace(self.state / "lab.json")


def saved_state(directory: Path) -> dict[str, Any] | None:
    """What a lab has noted in its directory: hosts, pods, topology, processes, owner. None if there is nothing."""
    try:
        saved: dict[str, Any] = json.loads((directory / "lab.json").read_text())
    except FileNotFoundError:
        return None
    return saved


def labs(state_root: Path = STATE_ROOT) -> list[str]:
    """The names of all labs of which anything exists, namespaces or files."""
    names = {path.name.split("-")[1] for path in NETNS.glob("oal-*-*")}
    if state_root.is_dir():
        names.update(path.name for path in state_root.iterdir())
    return sorted(name for name in names if _NAME.fullmatch(name))


def orphans(state_root: Path = STATE_ROOT) -> list[str]:
    """The names of labs that were tied to a process which is gone."""
    found = []
    for name in labs(state_root):
        owner = (saved_state(state_root / name) or {}).get("owner")
        if owner and not Process(*owner).alive:
            found.append(name)
    return found


def command_line() -> str:
    """How this command is called from here, for hints: by its name where that is found, else by its path."""
    called = Path(sys.argv[0])
    name = "overlay-agent"
    if shutil.which(name) or called.name != name:
        return name
    here = Path.cwd()
    return str(called.relative_to(here)) if called.is_relative_to(here) else str(called)


def _count(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def name_option(name: str) -> str:
    """What a command line needs to mean this lab."""
    return "" if name == "lab" else f" --name {name}"

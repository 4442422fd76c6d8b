"""An N-host cluster in network namespaces on one machine: for newcomers, and for the tests.

Owns the namespaces `oal-<lab>-*`, everything in them, and `/run/overlay-agent/lab/<lab>/`; nothing in the machine's own
namespace. The underlay is a bridge in the hub's namespace, where one etcd runs; each host is a namespace with `eth0` on
that bridge, an agent, and a bridge `cni0` with pods, which are namespaces themselves.

All names follow from the lab's name, so that `down` needs no memory: whatever lives in a namespace of ours is ours,
because the namespace is. That is what makes a lab safe to kill at any moment and to bring up again.
"""

import contextlib
import ipaddress
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from overlay.netns import NETNS, Namespace, NamespaceError, Process, create, delete, end, inhabitants
from subnet_lease.model import Lease, LeaseInvalid, decode_attrs, format_address, format_mac, parse_subnet_key
from subnet_lease.store import Store, StoreError

STATE_ROOT = Path("/run/overlay-agent/lab")

UNDERLAY = ipaddress.IPv4Interface("172.30.0.1/16")
"""The hub's address on the underlay; hosts follow from .11 on."""

ETCD_ENDPOINT = f"http://{UNDERLAY.ip}:2379"

NETWORK_CONFIG: Mapping[str, Any] = {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}

_NAME = re.compile(r"[a-z0-9]{1,12}")

# As etcd 3.4 wants it: a unix listener has the form host:port, and its socket is a file of that name in etcd's
# working directory.
_ETCD_SOCKET = "etcd:2379"

# They configure the machine's own agent and etcd, and would reach into the lab's.
_FOREIGN_VARIABLES = ("OVERLAY_AGENT_", "FLANNELD_", "ETCD_")

Connect = Callable[[str], Store]
"""Opens the lease store at an endpoint (`http://..` or `unix:///path`)."""

Progress = Callable[[str], None]

T = TypeVar("T")


class LabError(NamespaceError):
    """What stands in the lab's way, as one sentence for its user; an agent's or etcd's last words may follow."""


def wait_until(
    condition: Callable[[], T], seconds: float = 20, what: str = "what was waited for", interval: float = 0.02
) -> T:
    """The first truthy value of `condition`; LabError naming `what` if there is none within `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise LabError(f"{what}: not within {seconds:g} s.")
        time.sleep(interval)
    return value


class Place(Namespace):
    """A namespace of a lab. `name` is what people call it: `hub`, `h1`, `h1p2`."""

    def __init__(self, lab: "Lab", name: str) -> None:
        super().__init__(lab.prefix + name)
        self.lab = lab
        self.name = name


class Pod(Place):
    """A pod: one address of its host's subnet on `eth0`."""

    def __init__(self, host: "Host", number: int) -> None:
        super().__init__(host.lab, f"{host.name}p{number}")
        self.host = host
        self.number = number

    @property
    def address(self) -> str:
        """The first address of the subnet is the host's, the pods follow."""
        return str(self.host.gateway.ip + self.number)


class Host(Place):
    """A host: `eth0` on the underlay, an agent, and pods."""

    def __init__(self, lab: "Lab", number: int, pods: int) -> None:
        super().__init__(lab, f"h{number}")
        self.underlay_ip = str(UNDERLAY.ip + 9 + number)
        self.mac = f"02:00:{ipaddress.IPv4Address(self.underlay_ip).packed.hex(':')}"
        self.pods = [Pod(self, each + 1) for each in range(pods)]
        self.subnet_file = lab.state / f"{self.name}.env"
        self.state_dir = lab.state / f"{self.name}.state"
        self._notify_path = lab.state / f"{self.name}.notify"
        self._notify: socket.socket | None = None

    # --- its agent ---

    @property
    def agent_pid(self) -> int | None:
        """None if no agent runs."""
        return self.lab.process(self.name)

    def start_agent(self, *options: str) -> None:
        """Start the agent; it is ready later: see `wait_ready`."""
        self.close()
        self._notify_path.unlink(missing_ok=True)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(self._notify_path))
        argv = [
            *self.lab.agent_command,
            # Not the machine's own configuration.
            *("--config", os.devnull),
            *("--etcd-endpoints", ETCD_ENDPOINT),
            *("--iface", "eth0"),
            *("--subnet-file", str(self.subnet_file)),
            *("--state-dir", str(self.state_dir)),
            *("--healthz-port", "0"),
            *self.lab.agent_options,
            *options,
        ]
        self.lab.start(self.name, self.inside(*argv), {"NOTIFY_SOCKET": str(self._notify_path)})

    def wait_ready(self, seconds: float = 30) -> None:
        """Until the agent says READY=1 (sd_notify(3)); LabError with the end of its log if it ends or takes longer."""
        if self._notify is None:
            raise LabError(f"{self.name}: no agent was started from here.")
        deadline = time.monotonic() + seconds
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            watched: list[socket.socket | int] = [self._notify]
            if (pid := self.agent_pid) is not None:
                exit_handle = os.pidfd_open(pid)
                stack.callback(os.close, exit_handle)
                watched.append(exit_handle)
            while pid is not None and (left := deadline - time.monotonic()) > 0:
                readable = select.select(watched, [], [], left)[0]
                if self._notify in readable:
                    if b"READY=1" in self._notify.recv(4096).split(b"\n"):
                        return
                elif readable:
                    break
        what = f"is not ready after {seconds:g} s" if self.agent_pid else "has ended before it was ready"
        raise LabError(f"the agent on {self.name} {what}; the end of its log:\n{_tail(self.log())}")

    def kill_agent(self, number: signal.Signals = signal.SIGTERM, seconds: float = 10) -> int | None:
        """Send the signal and wait for the exit. Its exit code, if this process started the agent."""
        return self.lab.kill(self.name, number, seconds)

    def log(self) -> str:
        """All that the agents on this host have written."""
        return self.lab.log(self.name)

    def close(self) -> None:
        """Stop listening for the agent's readiness."""
        if self._notify is not None:
            self._notify.close()
            self._notify = None
            self._notify_path.unlink(missing_ok=True)

    # --- what it was given ---

    @property
    def subnet_env(self) -> dict[str, str]:
        """The contents of `subnet.env`; empty if there is none."""
        try:
            lines = self.subnet_file.read_text().splitlines()
        except FileNotFoundError:
            return {}
        return dict(line.split("=", 1) for line in lines if "=" in line)

    @property
    def gateway(self) -> ipaddress.IPv4Interface:
        """The first address of the host's subnet, with its length; LabError if it has no subnet yet."""
        try:
            return ipaddress.IPv4Interface(self.subnet_env["FLANNEL_SUBNET"])
        except KeyError:
            raise LabError(f"{self.name} has no subnet yet; its log is {self.lab.log_path(self.name)}.") from None

    @property
    def subnet(self) -> str:
        """As `10.244.7.0/24`; LabError if it has none yet."""
        return str(self.gateway.network)

    def attach_pods(self) -> None:
        """Give the pods their addresses out of the present subnet: a bridge `cni0` and a veth pair for each."""
        gateway, mtu = self.gateway, self.subnet_env["FLANNEL_MTU"]
        if any(link["ifname"] == "cni0" for link in self.json("ip", "link")):
            self.ip("link del cni0", *(f"link del p{pod.number}" for pod in self.pods))
        self.ip(
            f"link add cni0 mtu {mtu} type bridge",
            f"addr add {gateway} dev cni0",
            "link set cni0 up",
            *(f"link add p{pod.number} mtu {mtu} type veth peer eth0 mtu {mtu} netns {pod.netns}" for pod in self.pods),
            *(f"link set p{pod.number} master cni0 up" for pod in self.pods),
        )
        for pod in self.pods:
            pod.ip(
                "link set lo up",
                f"addr add {pod.address}/{gateway.network.prefixlen} dev eth0",
                "link set eth0 up",
                f"route add default via {gateway.ip}",
            )

        def forwarding() -> bool:
            return all(port["state"] == "forwarding" for port in self.json("bridge", "link"))

        # The kernel opens a bridge's port some time after its link came up, later still when it is busy.
        wait_until(forwarding, 10, f"all ports of cni0 on {self.name} forwarding")

    # --- what its kernel holds ---

    def peers(self, leases: Sequence[Lease]) -> "list[Peer]":
        """For every lease but this host's own, what the kernel holds for it."""
        remotes = {fdb["mac"]: fdb["dst"] for fdb in self.json("bridge", "fdb") if "dst" in fdb}
        macs = {neighbour["dst"]: neighbour.get("lladdr", "") for neighbour in self.json("ip", "neigh")}
        gateways = {nexthop["id"]: nexthop.get("gateway", "") for nexthop in self.json("ip", "nexthop")}
        routes = {route["dst"]: route for route in self.json("ip", "route")}
        peers = []
        for lease in leases:
            if format_address(lease.attrs.public_ip) == self.underlay_ip or lease.attrs.vtep is None:
                continue
            route = routes.get(str(lease.subnet), {})
            nexthop = route.get("nhid", 0)
            peers.append(
                Peer(
                    lease=lease,
                    nexthop=nexthop,
                    gateway=gateways.get(nexthop, "") if nexthop else route.get("gateway", ""),
                    mac=macs.get(format_address(lease.subnet.base), ""),
                    remote=remotes.get(format_mac(lease.attrs.vtep.mac), ""),
                )
            )
        return peers


@dataclass(frozen=True, slots=True)
class Peer:
    """What one host's kernel holds for the lease of another; empty texts stand for missing entries.

    The route to the subnet leads to `gateway`, through the nexthop object `nexthop` (0: none, a plain route); the
    neighbour entry of the subnet's base address says `mac`; the FDB entry of the peer's MAC says `remote`.
    """

    lease: Lease
    nexthop: int
    gateway: str
    mac: str
    remote: str

    @property
    def programmed(self) -> bool:
        """Whether all that it takes to reach the peer is in place."""
        attrs, base = self.lease.attrs, format_address(self.lease.subnet.base)
        wanted = base, format_mac(attrs.vtep.mac) if attrs.vtep else "", format_address(attrs.public_ip)
        return (self.gateway, self.mac, self.remote) == wanted


class Ping(NamedTuple):
    """One echo request from pod `src` to pod `dst`; `rtt_ms` is None without an answer."""

    src: str
    dst: str
    ok: bool
    rtt_ms: float | None


# --- the lab -------------------------------------------------------------------------------------------------------


class Lab:
    """A cluster of `hosts` hosts with `pods` pods each. Building it makes nothing: see `up`, or the steps it takes.

    As a context manager it is up inside the block and gone after it. With `tied`, it is marked as this process's own,
    for others to sweep away once the process is gone (`orphans`).
    """

    def __init__(
        self,
        name: str = "lab",
        *,
        connect: Connect,
        hosts: int = 3,
        pods: int = 2,
        config: Mapping[str, Any] = NETWORK_CONFIG,
        agent_command: Sequence[str] = (sys.executable, "-P", "-m", "agent", "run"),
        agent_options: Sequence[str] = (),
        tied: bool = False,
        state_root: Path = STATE_ROOT,
    ) -> None:
        if not _NAME.fullmatch(name):
            raise LabError(f"{name[:40]!r} cannot name a lab: use 1 to 12 small letters and digits.")
        self.name = name
        self.prefix = f"oal-{name}-"
        self.state = state_root / name
        self.agent_command = agent_command
        self.agent_options = agent_options
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
                progress(f"network: {_count(self.hosts, 'host')} on {UNDERLAY.network}, {_count(self.pods, 'pod')}")
                self.start_etcd()
                self.write_config(self._config)
                progress(f"etcd: answers at {ETCD_ENDPOINT}, network configuration written")
                for host in self.hosts:
                    host.start_agent()
                for host in self.hosts:
                    host.wait_ready(30 + len(self.hosts))
                    host.attach_pods()
                    progress(f"{host.name}: {host.subnet} leased, {_count(host.pods, 'pod')} attached")
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
        self.hub.ip(
            "link set lo up",
            # An address of its own: a bridge takes its ports' least, and a new port would make all ARP entries wrong.
            "link add underlay0 address 02:00:ac:1e:00:01 type bridge",
            f"addr add {UNDERLAY} dev underlay0",
            "link set underlay0 up",
        )
        self._plug_in(self.hosts)

    def _plug_in(self, hosts: Sequence[Host]) -> None:
        lines: list[str] = []
        for host in hosts:
            lines += [
                f"link add {host.name} type veth peer name eth0 address {host.mac} netns {host.netns}",
                f"link set {host.name} master underlay0 up",
            ]
        self.hub.ip(*lines)
        for host in hosts:
            host.ip(
                "link set lo up",
                f"addr add {host.underlay_ip}/{UNDERLAY.network.prefixlen} dev eth0",
                "link set eth0 up",
                f"route add default via {UNDERLAY.ip}",
                *(f"neigh add {peer.underlay_ip} lladdr {peer.mac} dev eth0" for peer in self._too_many_to_ask(host)),
            )

    def _too_many_to_ask(self, host: Host) -> list[Host]:
        """The peers whose MACs a host is told, as all hosts of a large lab are, so that they need no ARP.

        All namespaces share one table of 1024 learnt neighbours (gc_thresh3 in net/core/neighbour.c), which 32 hosts
        that know one another fill; permanent entries do not count.
        """
        return [peer for peer in self.hosts if peer is not host] if len(self.hosts) > 20 else []

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

    @property
    def etcd_pid(self) -> int | None:
        """None if etcd does not run."""
        return self.process("etcd")

    def start_etcd(self, seconds: float = 20) -> None:
        """Start etcd in the hub, on the data it had if it ran before, and wait until it answers."""
        # A killed etcd leaves its socket behind, and would not start over it.
        (self.state / _ETCD_SOCKET).unlink(missing_ok=True)
        peer = "http://127.0.0.1:2380"
        argv = [
            *("etcd", "--name", "lab", "--data-dir", str(self.state / "etcd")),
            *("--listen-client-urls", f"{ETCD_ENDPOINT},unix://{_ETCD_SOCKET}"),
            *("--advertise-client-urls", ETCD_ENDPOINT),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"lab={peer}"),
            # Alone, it has nobody to wait for before it elects itself.
            *("--heartbeat-interval", "20", "--election-timeout", "100"),
            *("--logger", "zap", "--log-outputs", "stderr", "--log-level", "warn"),
        ]
        self.start("etcd", self.hub.inside(*argv), {})

        def answers() -> bool:
            if self.etcd_pid is None:
                raise LabError(f"etcd has ended at once; the end of its log:\n{_tail(self.log('etcd'))}")
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

    def leases(self) -> list[Lease]:
        """All leases in etcd that can be read, by subnet."""
        found = []
        for record in self.store.snapshot().records:
            with contextlib.suppress(LeaseInvalid):
                subnet, subnet6 = parse_subnet_key(record.key)
                attrs = decode_attrs(record.value)
                revisions = record.create_revision, record.mod_revision
                found.append(Lease(subnet, subnet6, attrs, record.etcd_lease, *revisions))
        return sorted(found, key=lambda lease: lease.subnet)

    def wait_converged(self, seconds: float = 30) -> None:
        """Until every host has a lease, and its kernel all that it takes to reach every other."""

        def converged() -> bool:
            leases = self.leases()
            holders = {format_address(lease.attrs.public_ip) for lease in leases}
            return all(
                host.underlay_ip in holders and all(peer.programmed for peer in host.peers(leases))
                for host in self.hosts
            )

        wait_until(converged, seconds, "all hosts in the kernels of all hosts")

    def ping_all(self) -> list[Ping]:
        """One echo request from every pod to every other, a few at a time."""

        def ping(src: Pod, dst: Pod) -> Ping:
            answer = src.run("ping", "-n", "-c", "1", "-W", "1", dst.address)
            found = re.search(r"time=([0-9.]+) ms", answer.stdout)
            return Ping(src.name, dst.name, answer.returncode == 0, float(found[1]) if found else None)

        pairs = [(src, dst) for src in self.pods for dst in self.pods if src is not dst]
        with ThreadPoolExecutor(8) as threads:
            return list(threads.map(lambda pair: ping(*pair), pairs))

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
            "processes": self._processes,
            "owner": self._owner,
        }
        fresh = self.state / "lab.json.new"
        fresh.write_text(json.dumps(state))
        fresh.replace(self.state / "lab.json")


def saved_state(directory: Path) -> dict[str, Any] | None:
    """What a lab has noted in its directory: numbers of hosts and pods, processes, owner. None if there is nothing."""
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


def _tail(text: str, lines: int = 12) -> str:
    return "\n".join("  " + line for line in text.splitlines()[-lines:]) or "  (it is empty)"


def _count(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def name_option(name: str) -> str:
    """What a command line needs to mean this lab."""
    return "" if name == "lab" else f" --name {name}"

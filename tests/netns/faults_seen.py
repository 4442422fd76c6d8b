"""What can go wrong, as one table: how each fault is set up in a lab and undone, and what it must be called.

`FAULTS` is the data: docs/troubleshooting.md is made from it (see `troubleshooting`), and
`faults_asked.check` sets each fault up and asks `doctor`, `status` and /readyz on the host that it concerns. Each of
them must name the causes listed and no other.

Run as a program, it prints the document.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from overlay import causes
from overlay.cluster import Host, Lab, wait_until
from overlay.control import ask
from overlay.topology import LINKS
from subnet_lease.model import LeaseAttrs, Prefix, Vtep, encode_attrs, format_mac, subnet_key
from tests.faults.world import World

AGENT = [sys.executable, "-P", "-m", "agent"]

READYZ_PORT = 9273
MAX_AGE_S = 2
AGENT_OPTIONS = (
    *("--healthz-port", str(READYZ_PORT), "--readyz-max-age", str(MAX_AGE_S)),
    *("--probe-interval", "1", "--probe-peers", "3"),
)


# --- the scene ---------------------------------------------------------------------------------------------------


class Scene(NamedTuple):
    """A cluster. Faults are set up so that `here` suffers from them; `peer` is another host. With TLS to etcd, it has a
    `world`.
    """

    lab: Lab
    world: World | None = None

    @property
    def here(self) -> Host:
        return self.lab.hosts[0]

    @property
    def peer(self) -> Host:
        return self.lab.hosts[1]

    def settle(self) -> None:
        """All is well again: every agent runs, is ready, and every host can reach every other."""
        for host in self.lab.hosts:
            if host.agent_pid is None:
                host.start_agent()
                host.wait_ready()
        self.lab.wait_converged()
        wait_until(lambda: self.readyz()[0] == 200, 20, "a host that is ready")
        wait_until(lambda: not any(map(self.failed_paths, self.lab.hosts)), 30, "paths that are in order")
        wait_until(lambda: not self.asked()["problems"], 20, "a host that has no problem")

    def start(self, *options: str) -> None:
        """Start the agent of `here`, with these options besides."""
        self.here.start_agent(*options)
        self.here.wait_ready()
        # It says so to systemd a moment before its pages do.
        wait_until(lambda: self.readyz()[0] == 200, 20, "a host that is ready")

    def doctor(self, *options: str) -> dict[str, Any]:
        """What doctor prints on `here`. Of an agent that runs it takes the options; of one that does not it is told."""
        told = self.here.agent_options if self.here.agent_pid is None else []
        done = self.here.run(*AGENT, "doctor", "--json", *told, *options)
        assert done.returncode in (0, 1) and not done.stderr, f"{done.returncode} {done.stdout} {done.stderr}"
        document: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == bool(document["findings"])
        return document

    def status(self) -> dict[str, Any]:
        """What status prints there."""
        done = self.here.run(
            *AGENT, "status", "--config", os.devnull, "--control-socket", str(self.here.control_socket), "--json"
        )
        assert done.returncode in (0, 1, 2) and not done.stderr, f"{done.returncode} {done.stdout} {done.stderr}"
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    def asked(self) -> dict[str, Any]:
        """What the agent there says on its socket, without a command in between."""
        document: dict[str, Any] = ask(str(self.here.control_socket), "status", 10)
        return document

    def readyz(self) -> tuple[int, str]:
        """The answer of /readyz there: code and text; 0 if nobody answers."""
        return self.page(self.here, "readyz")

    @staticmethod
    def page(host: Host, name: str) -> tuple[int, str]:
        """The answer of an agent to a question for a page: code and text; 0 if nobody answers."""

        def ask() -> tuple[int, str]:
            with contextlib.suppress(OSError), socket.socket() as client:
                client.settimeout(5)
                client.connect(("127.0.0.1", READYZ_PORT))
                client.sendall(f"GET /{name} HTTP/1.0\r\n\r\n".encode())
                answer = b"".join(iter(lambda: client.recv(1 << 16), b"")).decode()
                return int(answer.split()[1]), answer.partition("\r\n\r\n")[2]
            return 0, ""

        return host.made(ask)

    def failed_paths(self, host: Host, cause: str = "") -> int:
        """How many paths the agent of the host finds something wrong with, or this."""
        start = "overlay_agent_paths_failed{" + (f'cause="{cause}"' if cause else "")
        lines = self.page(host, "metrics")[1].splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(start))

    # --- what faults are made of ---

    def nft(self, place: Any, *commands: str) -> None:
        done = place.run("nft", "; ".join(commands))
        assert done.returncode == 0, done.stderr

    def etcdctl(self, *argv: str) -> str:
        done = self.lab.hub.run("etcdctl", "--endpoints", self.lab.etcd_endpoint(), *argv)
        assert done.returncode == 0, f"etcdctl {' '.join(argv)}: {done.stdout}{done.stderr}"
        return done.stdout

    def own_key(self, host: Host) -> str:
        return subnet_key(Prefix.parse(host.subnet))

    def lease(self, host: Host) -> LeaseAttrs:
        return next(lease.attrs for lease in self.lab.leases() if host.holds(lease))

    def mac(self, host: Host) -> str:
        vtep = self.lease(host).vtep
        assert vtep is not None
        return format_mac(vtep.mac)


Arrange = Callable[[Scene], "contextlib.AbstractContextManager[tuple[str, ...]]"]
"""Sets a fault up, and undoes it; gives further options of `doctor`."""


class Fault(NamedTuple):
    """One thing that goes wrong: what it is, how it is set up, and the causes that each tool must name.

    `readyz` None: nobody answers there. `kind` TLS: it takes a cluster that speaks TLS to etcd; PATH: agents have to
    measure, which takes its time.
    """

    name: str
    arrange: Arrange
    doctor: frozenset[str]
    status: frozenset[str]
    readyz: frozenset[str] | None
    kind: str


HOST, TLS, PATH = "host", "tls", "path"

FAULTS: list[Fault] = []


def fault(
    name: str, doctor: str, status: str | None = None, readyz: str | None = "", *, kind: str = HOST
) -> Callable[[Any], Any]:
    """Adds a fault: the causes in words. What `status` names is what `doctor` does unless it is given; `readyz` None
    stands for nobody that answers.
    """

    def add(arrange: Callable[[Scene], Iterator[tuple[str, ...]]]) -> Any:
        named = frozenset(doctor.split())
        unready = None if readyz is None else frozenset(readyz.split())
        told = named if status is None else frozenset(status.split())
        FAULTS.append(Fault(name, contextlib.contextmanager(arrange), named, told, unready, kind))
        return arrange

    return add


# --- the agent ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def without_agent(scene: Scene) -> Iterator[None]:
    """While the block runs, nobody repairs what is done to the host."""
    scene.here.kill_agent()
    try:
        yield
    finally:
        scene.start()


@fault("the agent has ended", "agent_not_running", readyz=None)
def agent_ended(scene: Scene) -> Iterator[tuple[str, ...]]:
    with without_agent(scene):
        yield ()


@fault("the agent hangs", "agent_stalled", status="agent_stalled", readyz=None)
def agent_hangs(scene: Scene) -> Iterator[tuple[str, ...]]:
    pid = scene.here.agent_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield ()
    finally:
        os.kill(pid, signal.SIGCONT)


@fault("flanneld runs beside the agent", "second_agent", status="")
def second_agent(scene: Scene) -> Iterator[tuple[str, ...]]:
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "flanneld"
        program.write_bytes(Path("/bin/sleep").resolve().read_bytes())
        program.chmod(0o755)
        with subprocess.Popen(scene.here.inside(str(program), "600")) as flanneld:
            wait_until(lambda: Path(f"/proc/{flanneld.pid}/comm").read_text() == "flanneld\n", 10, "flanneld")
            try:
                yield ()
            finally:
                flanneld.kill()


@fault("the configuration file cannot be used", "options_unreadable", status="")
def unreadable_options(scene: Scene) -> Iterator[tuple[str, ...]]:
    scene.here.kill_agent()
    path = scene.lab.state / "h1.toml"
    path.write_text('log-level = "info"\n')
    scene.start("--config", str(path))
    path.write_bytes(b"log-level = \xff\xfe")
    try:
        yield ()
    finally:
        scene.here.kill_agent()
        scene.start()


@fault("the disk is full", "journal_failing")
def full_disk(scene: Scene) -> Iterator[tuple[str, ...]]:
    place = scene.here.state_dir
    # The agent has a mount namespace of its own, from `ip netns exec`; what is mounted there goes with it.
    there = ["nsenter", "-m", "-t", str(scene.here.agent_pid)]
    subprocess.run([*there, "mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)], check=True)
    try:
        subprocess.run([*there, "dd", "if=/dev/zero", f"of={place}/ballast"], capture_output=True)
        with stranger(scene, 240):
            pass  # News, which the agent would keep.
        wait_until(lambda: scene.asked()["problems"], 20, "an agent that has tried")
        yield ()
    finally:
        # The mount goes with the agent's namespace; it would try again in half a minute.
        with without_agent(scene):
            pass


@fault("doctor is run without privileges", "no_privilege", status="")
def no_privilege(scene: Scene) -> Iterator[tuple[str, ...]]:
    yield ("setpriv", "--bounding-set", "-net_raw", "--inh-caps", "-net_raw")


# --- etcd --------------------------------------------------------------------------------------------------------


@fault("etcd is away", "etcd_unreachable", readyz="etcd_unreachable")
def etcd_away(scene: Scene) -> Iterator[tuple[str, ...]]:
    scene.lab.stop_etcd(signal.SIGKILL)
    try:
        wait_until(lambda: scene.readyz()[0] == 503, 20, "a table that is too old")
        yield ()
    finally:
        scene.lab.start_etcd()


@fault("etcd denies", "etcd_denied")
def etcd_denies(scene: Scene) -> Iterator[tuple[str, ...]]:
    for argv in ("user add root:secret", "user grant-role root root", "auth enable"):
        scene.etcdctl(*argv.split())
    try:
        # A watch that stands is not ended by it; the next question is denied.
        told(scene)
        yield ()
    finally:
        scene.etcdctl("auth", "disable", "--user", "root:secret")
        scene.etcdctl("user", "delete", "root")
        told(scene)


@fault("this host's certificate has expired", "etcd_certificate", readyz="etcd_certificate", kind=TLS)
def expired_here(scene: Scene) -> Iterator[tuple[str, ...]]:
    with certificate(scene, "agent"):
        yield ()


@fault("etcd's certificate has expired", "etcd_certificate", readyz="etcd_certificate", kind=TLS)
def expired_there(scene: Scene) -> Iterator[tuple[str, ...]]:
    with certificate(scene, "etcd"):
        yield ()


@fault("a certificate ends soon", "etcd_certificate", status="", kind=TLS)
def expires_soon(scene: Scene) -> Iterator[tuple[str, ...]]:
    assert scene.world is not None
    end = time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + 5 * 86400))
    scene.world.pki.expire("agent", end)
    try:
        yield ()
    finally:
        scene.world.pki.make("agent")


@contextlib.contextmanager
def certificate(scene: Scene, name: str) -> Iterator[None]:
    """While the block runs, this certificate has expired, and connections are made anew."""
    world = scene.world
    assert world is not None
    world.pki.expire(name)
    world.etcd.restart()
    try:
        wait_until(lambda: scene.readyz()[0] == 503, 20, "a table that is too old")
        yield
    finally:
        world.pki.make(name)
        world.etcd.restart()


@fault("the clock is wrong", "clock_skew", status="")
def clock_skew(scene: Scene) -> Iterator[tuple[str, ...]]:
    yield ("clock", "90")


@fault("the configuration key is gone", "config_missing", status="config_missing")
def config_missing(scene: Scene) -> Iterator[tuple[str, ...]]:
    with changed_config(scene, lambda config: None):
        yield ()


@fault("the configuration key is broken", "config_unusable")
def config_unusable(scene: Scene) -> Iterator[tuple[str, ...]]:
    with changed_config(scene, lambda config: '{"Network": "10.244.0.0/33"}'):
        yield ()


@fault("the VNI was changed under running agents", "config_needs_restart")
def config_changed(scene: Scene) -> Iterator[tuple[str, ...]]:
    def other(config: dict[str, Any]) -> str:
        return json.dumps({**config, "Backend": {**config["Backend"], "VNI": 7}})

    with changed_config(scene, other):
        yield ()


@contextlib.contextmanager
def changed_config(scene: Scene, change: Callable[[dict[str, Any]], str | None]) -> Iterator[None]:
    key = "/coreos.com/network/config"
    before = scene.etcdctl("get", key, "--print-value-only").strip()
    after = change(json.loads(before))
    scene.etcdctl(*(("del", key) if after is None else ("put", key, after)))
    told(scene)
    try:
        yield
    finally:
        scene.etcdctl("put", key, before)
        told(scene)


def told(scene: Scene) -> None:
    """Have all agents look at the configuration now."""
    for host in scene.lab.hosts:
        if (pid := host.agent_pid) is not None:
            os.kill(pid, signal.SIGHUP)


# --- leases ------------------------------------------------------------------------------------------------------


def put_peer(scene: Scene, number: int, *, ip: str = "", mac: str = "", subnet: str = "") -> None:
    """A lease of a host that has no agent."""
    prefix = Prefix.parse(subnet or f"10.244.{number}.0/24")
    address = bytes(map(int, (ip or f"172.30.200.{number}").split(".")))
    vtep = Vtep(1, bytes.fromhex(mac.replace(":", "")) if mac else bytes((2, 0, 0, 0, 9, number)))
    store = scene.lab.store
    assert store.create(subnet_key(prefix), encode_attrs(LeaseAttrs(address, "vxlan", vtep)), store.grant(3600))


def drop_peer(scene: Scene, number: int, subnet: str = "") -> None:
    key = subnet_key(Prefix.parse(subnet or f"10.244.{number}.0/24"))
    scene.etcdctl("del", f"/coreos.com/network/subnets/{key}")


@contextlib.contextmanager
def stranger(scene: Scene, number: int, **what: str) -> Iterator[None]:
    put_peer(scene, number, **what)
    try:
        yield
    finally:
        drop_peer(scene, number, what.get("subnet", ""))


@fault("this host's lease is gone", "agent_not_running lease_lost", status="agent_not_running", readyz=None)
def lease_lost(scene: Scene) -> Iterator[tuple[str, ...]]:
    with without_agent(scene):
        scene.etcdctl("del", f"/coreos.com/network/subnets/{scene.own_key(scene.here)}")
        yield ()


@fault("two hosts claim overlapping subnets", "subnet_conflict")
def subnet_conflict(scene: Scene) -> Iterator[tuple[str, ...]]:
    wider = str(Prefix.parse(scene.peer.subnet).network(23))
    with stranger(scene, 241, subnet=wider):
        yield ()


@fault("two hosts have one underlay address", "duplicate_public_ip")
def duplicate_public_ip(scene: Scene) -> Iterator[tuple[str, ...]]:
    with stranger(scene, 242, ip=scene.peer.underlay_ip):
        yield ()


@fault("a machine was cloned", "cloned_machine")
def cloned_machine(scene: Scene) -> Iterator[tuple[str, ...]]:
    with stranger(scene, 243, mac=scene.mac(scene.peer)):
        yield ()


@fault("somebody writes a hostile lease", "lease_invalid")
def hostile_lease(scene: Scene) -> Iterator[tuple[str, ...]]:
    with stranger(scene, 244, ip="127.0.0.1"):
        yield ()


@fault("all subnets are taken", "subnets_exhausted", status="")
def exhausted(scene: Scene) -> Iterator[tuple[str, ...]]:
    def narrow(config: dict[str, Any]) -> str:
        return json.dumps({**config, "SubnetMin": base(scene.peer), "SubnetMax": base(scene.peer)})

    with changed_config(scene, narrow):
        yield ()


# --- interfaces --------------------------------------------------------------------------------------------------


@fault("the VXLAN device is down", "agent_not_running device_down", readyz=None)
def device_down(scene: Scene) -> Iterator[tuple[str, ...]]:
    with without_agent(scene):
        scene.here.ip("link set flannel.1 down")
        yield ()


@fault("the VXLAN device is gone", "agent_not_running device_missing", status="agent_not_running", readyz=None)
def device_missing(scene: Scene) -> Iterator[tuple[str, ...]]:
    with without_agent(scene):
        scene.here.ip("link del flannel.1")
        yield ()


@fault("the underlay's interface is down", "device_down", readyz="device_down")
def underlay_down(scene: Scene) -> Iterator[tuple[str, ...]]:
    scene.here.ip("link set eth0 down")
    try:
        yield ()
    finally:
        scene.here.ip("link set eth0 up", f"route replace default via {LINKS[0].hub[4].ip}")


@fault("another machine has this host's address", "duplicate_address", status="")
def duplicate_address(scene: Scene) -> Iterator[tuple[str, ...]]:
    other = f"{scene.lab.prefix}double"
    subprocess.run(["ip", "netns", "add", other], check=True)
    try:
        scene.lab.hub.ip(
            f"link add double type veth peer name eth0 netns {other}", "link set double master underlay0 up"
        )
        lines = f"addr add {scene.here.underlay_ip}/32 dev eth0\nlink set eth0 up\n"
        subprocess.run(["ip", "-n", other, "-batch", "-"], input=lines, text=True, check=True)
        ports = lambda: scene.lab.hub.json("bridge", "link")  # noqa: E731
        wait_until(lambda: all(each["state"] == "forwarding" for each in ports()), 10, "a port that forwards")
        yield ()
    finally:
        subprocess.run(["ip", "netns", "del", other], check=True)


# --- entries -----------------------------------------------------------------------------------------------------


@fault("an FDB entry is missing", "agent_not_running fdb_wrong", readyz=None)
def fdb_missing(scene: Scene) -> Iterator[tuple[str, ...]]:
    with without_agent(scene):
        done = scene.here.run("bridge", "fdb", "del", scene.mac(scene.peer), "dev", "flannel.1")
        assert done.returncode == 0, done.stderr
        yield ()


@fault("a neighbour entry is missing", "agent_not_running neighbour_wrong", readyz=None)
def neighbour_missing(scene: Scene) -> Iterator[tuple[str, ...]]:
    with without_agent(scene):
        scene.here.ip(f"neigh del {base(scene.peer)} dev flannel.1")
        yield ()


# Without an agent status knows no leases: it sees what does not fit together.
@fault("a neighbour entry has a wrong MAC", "agent_not_running neighbour_wrong", "agent_not_running fdb_wrong", None)
def neighbour_wrong(scene: Scene) -> Iterator[tuple[str, ...]]:
    with without_agent(scene):
        scene.here.ip(f"neigh replace {base(scene.peer)} lladdr 02:00:00:00:00:99 dev flannel.1 nud permanent")
        yield ()


@fault("a route is missing", "agent_not_running route_wrong", readyz=None)
def route_missing(scene: Scene) -> Iterator[tuple[str, ...]]:
    with without_agent(scene):
        scene.here.ip(f"route del {scene.peer.subnet}")
        yield ()


@fault(
    "a route of a host that has left remains",
    "agent_not_running foreign_entries",
    "agent_not_running neighbour_wrong",
    readyz=None,
)
def stale_route(scene: Scene) -> Iterator[tuple[str, ...]]:
    with without_agent(scene):
        scene.here.ip("route add 10.244.247.0/24 via 10.244.247.0 dev flannel.1 onlink proto 111")
        yield ()


def base(host: Host) -> str:
    return host.subnet.partition("/")[0]


@fault("another tool's route is in the way", "route_foreign", status="")
def foreign_route(scene: Scene) -> Iterator[tuple[str, ...]]:
    half = scene.peer.subnet.replace("/24", "/25")
    scene.here.ip(f"route add {half} via {LINKS[0].hub[4].ip} dev eth0 proto static")
    try:
        yield ()
    finally:
        scene.here.ip(f"route del {half}")


@fault("a policy rule leads past our routes", "route_foreign", status="")
def policy_rule(scene: Scene) -> Iterator[tuple[str, ...]]:
    to = scene.peer.subnet
    scene.here.ip(
        f"route add {to} via {LINKS[0].hub[4].ip} dev eth0 table 100", f"rule add to {to} lookup 100 priority 50"
    )
    try:
        yield ()
    finally:
        scene.here.ip("rule del priority 50", f"route del {to} table 100")


@fault("a blackhole route swallows a peer's packets", "route_foreign", status="")
def blackhole(scene: Scene) -> Iterator[tuple[str, ...]]:
    half = scene.peer.subnet.replace("/24", "/25")
    scene.here.ip(f"route add blackhole {half}")
    try:
        yield ()
    finally:
        scene.here.ip(f"route del blackhole {half}")


@fault("another network of the host overlaps the overlay's", "overlapping_route", status="")
def overlap(scene: Scene) -> Iterator[tuple[str, ...]]:
    scene.here.ip("link add docker0 type bridge", "addr add 10.244.248.1/24 dev docker0", "link set docker0 up")
    try:
        yield ()
    finally:
        scene.here.ip("link del docker0")


# --- settings and filters ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def setting(scene: Scene, name: str, value: str) -> Iterator[None]:
    before = scene.here.run("sysctl", "-n", name).stdout.strip()
    assert scene.here.run("sysctl", "-w", f"{name}={value}").returncode == 0
    try:
        yield
    finally:
        scene.here.run("sysctl", "-w", f"{name}={before}")


@contextlib.contextmanager
def rules(scene: Scene, place: Any, *commands: str, family: str = "inet") -> Iterator[None]:
    """An nftables table `fault` with these rules."""
    scene.nft(place, f"add table {family} fault", *commands)
    try:
        yield
    finally:
        scene.nft(place, f"delete table {family} fault")


@fault("forwarding was switched off", "forwarding_off", readyz="forwarding_off")
def forwarding_off(scene: Scene) -> Iterator[tuple[str, ...]]:
    with setting(scene, "net.ipv4.ip_forward", "0"):
        yield ()


@fault("a firewall drops what is forwarded", "forward_drop")
def forward_drop(scene: Scene) -> Iterator[tuple[str, ...]]:
    chain = "add chain inet fault forward { type filter hook forward priority 0; policy drop; }"
    with rules(scene, scene.here, chain):
        yield ()


@fault("a firewall drops what pods of one host send each other", "br_netfilter", status="")
def br_netfilter(scene: Scene) -> Iterator[tuple[str, ...]]:
    chain = "add chain inet fault forward { type filter hook forward priority 0; }"
    rule = 'add rule inet fault forward iifname "cni0" oifname "cni0" drop'
    with setting(scene, "net.bridge.bridge-nf-call-iptables", "1"), rules(scene, scene.here, chain, rule):
        yield ()


@fault("the reverse path filter drops a peer's packets", "rp_filter", status="")
def rp_filter(scene: Scene) -> Iterator[tuple[str, ...]]:
    scene.here.ip(
        "link add other0 type bridge",
        "addr add 192.0.2.1/24 dev other0",
        "link set other0 up",
        f"route add {scene.peer.underlay_ip}/32 dev other0",
    )
    try:
        with setting(scene, "net.ipv4.conf.eth0.rp_filter", "1"):
            yield ()
    finally:
        scene.here.ip("link del other0")


@fault("this host's own firewall drops tunnels' packets that arrive", "port_blocked_in", status="")
def own_input(scene: Scene) -> Iterator[tuple[str, ...]]:
    chain = "add chain inet fault input { type filter hook input priority 0; }"
    with rules(scene, scene.here, chain, "add rule inet fault input udp dport 8472 drop"):
        yield ()


@fault("this host's own firewall drops tunnels' packets that leave", "port_blocked_out", status="")
def own_output(scene: Scene) -> Iterator[tuple[str, ...]]:
    chain = "add chain inet fault output { type filter hook output priority 0; }"
    with rules(scene, scene.here, chain, "add rule inet fault output udp dport 8472 drop"):
        yield ()


@fault("a stranger sends into the tunnels", "guard_drops", status="")
def guard_drops(scene: Scene) -> Iterator[tuple[str, ...]]:
    flood = (
        "import socket, time\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "while True:\n"
        f"    s.sendto(bytes((8, 0, 0, 0, 0, 0, 1, 0)) + bytes(60), ('{scene.here.underlay_ip}', 8472))\n"
        "    time.sleep(0.02)\n"
    )
    with subprocess.Popen(scene.lab.hub.inside(sys.executable, "-c", flood)) as sender:
        try:
            yield ()
        finally:
            sender.kill()


# --- paths -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def between(scene: Scene, *rules_: str) -> Iterator[None]:
    """Rules for the frames that the underlay's switch passes on, until the agent too has seen what comes of them."""
    chain = "add chain bridge fault forward { type filter hook forward priority 0; }"
    commands = [chain, *(f"add rule bridge fault forward {rule}" for rule in rules_)]
    with rules(scene, scene.lab.hub, *commands, family="bridge"):
        noticed(scene, scene.here)
        yield


def noticed(scene: Scene, *hosts: Host) -> None:
    """Until the agents of these hosts have found that something is wrong with a path."""
    for host in hosts:
        wait_until(lambda host=host: scene.failed_paths(host), 30, f"{host.name} to notice")


def to(scene: Scene) -> str:
    return f"ip saddr {scene.here.underlay_ip} ip daddr {scene.peer.underlay_ip}"


def fro(scene: Scene) -> str:
    return f"ip saddr {scene.peer.underlay_ip} ip daddr {scene.here.underlay_ip}"


@fault("the middle drops tunnels' packets between two hosts", "port_blocked", kind=PATH)
def port_blocked(scene: Scene) -> Iterator[tuple[str, ...]]:
    with between(scene, f"{to(scene)} udp dport 8472 drop", f"{fro(scene)} udp dport 8472 drop"):
        yield ()


@fault("the middle drops tunnels' packets to a peer", "port_blocked_out", kind=PATH)
def port_blocked_out(scene: Scene) -> Iterator[tuple[str, ...]]:
    with between(scene, f"{to(scene)} udp dport 8472 drop"):
        yield ()


@fault("the MTU in the middle is too small", "path_mtu", kind=PATH)
def path_mtu(scene: Scene) -> Iterator[tuple[str, ...]]:
    with between(scene, f"{to(scene)} ip length > 1400 drop", f"{fro(scene)} ip length > 1400 drop"):
        yield ()


@fault("a peer is down", "peer_down", kind=PATH)
def peer_down(scene: Scene) -> Iterator[tuple[str, ...]]:
    scene.peer.ip("link set eth0 down")
    try:
        noticed(scene, scene.here)
        yield ()
    finally:
        scene.peer.ip("link set eth0 up", f"route replace default via {LINKS[0].hub[4].ip}")


@fault("the underlay loses everything between two hosts", "underlay_unreachable", kind=PATH)
def unreachable(scene: Scene) -> Iterator[tuple[str, ...]]:
    with between(scene, f"{to(scene)} drop", f"{fro(scene)} drop"):
        yield ()


# A stand-in for a network card: the peer's kernel finishes checksums, and the switch spoils those inside of the tunnel.
# What comes before the inner transport header, from the outer one on: 8 bytes UDP, 8 VXLAN, 14 Ethernet, 20 IPv4.
@fault("a network card spoils checksums inside of the tunnel", "checksum_offload", kind=PATH)
def spoiled_checksums(scene: Scene) -> Iterator[tuple[str, ...]]:
    inner = f"{fro(scene)} udp dport 8472 @th,312,8"
    assert scene.peer.run("ethtool", "-K", "eth0", "tx", "off").returncode == 0
    try:
        with between(scene, f"{inner} 17 @th,448,16 set 0xdead", f"{inner} 6 @th,528,16 set 0xdead"):
            yield ()
    finally:
        assert scene.peer.run("ethtool", "-K", "eth0", "tx", "on").returncode == 0


# That the peer hears this host, and is not heard, a third one tells.
@fault("the middle drops tunnels' packets from a peer", "port_blocked_in", kind=PATH)
def port_blocked_in(scene: Scene) -> Iterator[tuple[str, ...]]:
    with between(scene, f"{fro(scene)} udp dport 8472 drop"):
        yield ()


# --- leftovers ---------------------------------------------------------------------------------------------------


@fault("flannel has left a device", "flannel_leftover", status="")
def flannel_leftover(scene: Scene) -> Iterator[tuple[str, ...]]:
    scene.here.ip("link add flannel.7 type vxlan id 7 dstport 8479 dev eth0 nolearning", "link set flannel.7 up")
    try:
        yield ()
    finally:
        scene.here.ip("link del flannel.7")


@fault("Calico has left rules", "calico_leftover", status="")
def calico_leftover(scene: Scene) -> Iterator[tuple[str, ...]]:
    scene.nft(scene.here, "add table ip calico")
    try:
        yield ()
    finally:
        scene.nft(scene.here, "delete table ip calico")


# --- the document ------------------------------------------------------------------------------------------------


def troubleshooting() -> str:
    """docs/troubleshooting.md."""
    lines = [
        "# Troubleshooting",
        "",
        "`sudo overlay-agent doctor` on the host that has a problem names what is wrong, shows by what, and says what",
        "mends it ([doctor](doctor.md)). Below is all that it, `overlay-agent status`, probes and /readyz can name.",
        "",
        "This page is made from the table of causes and from that of the faults which the tests set up:",
        "`python -m tests.netns.faults_seen`.",
        "",
        "## By symptom",
        "",
        "| symptom | cause |",
        "| --- | --- |",
    ]
    by_symptom: dict[str, list[str]] = {}
    for cause in causes.CAUSES.values():
        by_symptom.setdefault(cause.symptom, []).append(cause.name)
    for symptom, names in by_symptom.items():
        lines.append(f"| {symptom} | {', '.join(f'[`{name}`](#{name})' for name in names)} |")
    lines += ["", "## The causes", ""]
    for cause in causes.CAUSES.values():
        seen = [each.name for each in FAULTS if cause.name in each.doctor | each.status | (each.readyz or frozenset())]
        lines += [
            f"### {cause.name}",
            "",
            f"*{cause.severity}*: {causes.generic(cause.what)}.",
            "",
            f"- Symptom: {causes.generic(cause.symptom)}",
            f"- Evidence: {causes.generic(cause.evidence)}",
            f"- Remedy: {causes.generic(cause.remedy)}",
            *([f"- Tested by: {'; '.join(seen)}."] if seen else []),
            "",
        ]
    lines += [
        "## What the tests set up",
        "",
        "Each of these faults is set up on real agents and kernels, and undone; what the three say must be this and no",
        "more. A dash: nothing is named; where /readyz has none, nobody answers.",
        "",
        "| fault | doctor | status | /readyz |",
        "| --- | --- | --- | --- |",
    ]
    for each in sorted(FAULTS, key=lambda each: each.name):
        readyz = "none" if each.readyz is None else _names(each.readyz)
        lines.append(f"| {each.name} | {_names(each.doctor)} | {_names(each.status)} | {readyz} |")
    return "\n".join(lines) + "\n"


def _names(some: frozenset[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(some)) or "-"


if __name__ == "__main__":
    print(troubleshooting(), end="")

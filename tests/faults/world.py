"""A world to harm: real agents in a lab, pods that talk without end, and an etcd of one or three real members.

Owns the vocabulary of the fault scenarios: what is done to etcd and to the way to it, what is lost meanwhile, and what
must be true in the end. All of it lives in the lab's namespaces and in its state directory, and goes with the lab.

The members listen on the hub's address, one port each, so that agents reach them over the underlay and nftables in the
hub can stand in between; among themselves they speak on the hub's loopback. The tests reach them by unix sockets, past
everything that is cut.
"""

import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from overlay.cluster import UNDERLAY, Host, Lab, LabError, Pod, wait_until
from overlay.netns import NETNS
from subnet_lease.etcd import EtcdStore
from subnet_lease.model import Lease, LeaseAttrs, Prefix, Vtep, encode_attrs, format_address, format_mac, subnet_key
from subnet_lease.store import Store, StoreDenied, StoreError
from tests.conftest import MakeLab
from tests.faults.etcd_process import START_DEADLINE_S, freeze
from tests.faults.test_etcd_store import make_authority, make_certificate, openssl
from tests.netns.namespace import entered

NETWORK = {"Network": "10.244.0.0/16", "SubnetMax": "10.244.199.0", "Backend": {"Type": "vxlan"}}
"""Hosts choose at random; what lies above is the tests' own: see `World.join`."""

INTERVAL_S = 0.02
"""Between two pings from pod to pod, and between two writes to a stream."""

STALL_S = 2.0
"""A stream that stood still for longer has been noticed by whoever reads it."""

NOTICED_S = 25.0
"""An agent knows by then that etcd is silent: keepalive after 10 s, answer due within 5 s, connection left by 20 s."""

OUTAGE_S = 60.0
"""How long a plain outage lasts. Far longer than any wait of an agent (5 s for a call, 5 s to connect, 5 s of backoff,
NOTICED_S), and as long as it takes until what is said once a minute is said again."""

IDLE_CPU, IDLE_LINES = 0.01, 5
"""What an agent may use in an outage: share of a core, log lines."""

ROOT = ("root", "top")
AGENT = ("agent", "secret")
"""User and password in an etcd with authentication."""

Entries = dict[str, set[str]]
T = TypeVar("T")


# --- etcd ----------------------------------------------------------------------------------------------------------


class Member:
    """One member of the lab's etcd."""

    def __init__(self, lab: Lab, number: int, members: int, options: Sequence[str], scheme: str = "http") -> None:
        self._lab = lab
        self.name = f"etcd{number}"
        self.port = 2279 + 100 * number
        self.endpoint = f"{scheme}://{UNDERLAY.ip}:{self.port}"
        # As etcd 3.4 wants it: host and port, and a file of that name in its working directory.
        self._socket = f"{self.name}:0"
        self._data = lab.state / self.name
        cluster = {f"etcd{each}": f"http://127.0.0.1:{2280 + 100 * each}" for each in range(1, members + 1)}
        self._peer = cluster[self.name]
        self._cluster = ",".join(f"{name}={url}" for name, url in cluster.items())
        self._options = options

    @property
    def local_endpoint(self) -> str:
        """Where the tests reach it, from any namespace."""
        return f"unix://{self._lab.state / self._socket}"

    @property
    def runs(self) -> bool:
        return self._lab.process(self.name) is not None

    @property
    def pid(self) -> int:
        pid = self._lab.process(self.name)
        assert pid is not None, f"{self.name} does not run"
        return pid

    def run(self) -> None:
        """Start it on the data it has; it answers later."""
        # Left behind by a kill, and etcd does not start on it.
        (self._lab.state / self._socket).unlink(missing_ok=True)
        argv = [
            *("etcd", "--name", self.name, "--data-dir", str(self._data)),
            *("--listen-client-urls", f"{self.endpoint},unix://{self._socket}"),
            *("--advertise-client-urls", self.endpoint),
            *("--listen-peer-urls", self._peer, "--initial-advertise-peer-urls", self._peer),
            *("--initial-cluster", self._cluster, "--heartbeat-interval", "50", "--election-timeout", "500"),
            *("--unsafe-no-fsync", "--logger", "zap", "--log-outputs", "stderr", "--log-level", "warn"),
            *self._options,
        ]
        self._lab.start(self.name, self._lab.hub.inside(*argv), {})

    def answers(self) -> bool:
        """Whether it answers a read that takes a leader; a refusal is an answer."""
        assert self.pid, self._lab.log(self.name)[-2000:]
        with contextlib.closing(EtcdStore([self.local_endpoint], "/coreos.com/network", timeout=1.0)) as store:
            try:
                store.read_config()
            except StoreDenied:
                return True
            except StoreError:
                return False
            return True

    def kill(self) -> None:
        """End it as a power failure would."""
        self._lab.kill(self.name, signal.SIGKILL, START_DEADLINE_S)

    def freeze(self) -> None:
        """Stop it: connections stay open and nothing answers."""
        freeze(self.pid)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def wipe(self) -> None:
        """Throw its data away; it must not be running."""
        shutil.rmtree(self._data)

    def restore(self, backup: Path, token: str) -> None:
        """Put a backup in place of its data; it must not be running. See `Etcd.restore`."""
        self.wipe()
        restore = ["etcdctl", "snapshot", "restore", str(backup), "--data-dir", str(self._data), "--name", self.name]
        restore += ["--initial-cluster", self._cluster, "--initial-advertise-peer-urls", self._peer]
        restore += ["--initial-cluster-token", token]
        subprocess.run(restore, check=True, capture_output=True)


class Etcd:
    """The lab's etcd: its members, and what its operator does with it."""

    def __init__(
        self, lab: Lab, members: int, options: Sequence[str], *, login: bool, pki: "PublicKeys | None"
    ) -> None:
        self._lab = lab
        self._login = login
        self._control_options = pki.control_options if pki else []
        scheme, options = ("https", [*options, *pki.etcd_options]) if pki else ("http", options)
        self.members = [Member(lab, number + 1, members, options, scheme) for number in range(members)]
        self.endpoints = ",".join(member.endpoint for member in self.members)

    def connect(self) -> Store:
        """A store that whatever is cut leaves alone."""
        username, password = ROOT if self._login else (None, None)
        endpoints = [member.local_endpoint for member in self.members]
        return EtcdStore(endpoints, "/coreos.com/network", username=username, password=password)

    def start(self, *members: Member) -> None:
        """Start these members, or all, and wait until each answers."""
        started = members or self.members
        for member in started:
            member.run()
        for member in started:
            wait_until(member.answers, START_DEADLINE_S, f"an answer from {member.name}")
        # A channel that was refused waits before it tries again; a new one does not.
        self._lab.close_store()

    def kill(self, *members: Member) -> None:
        """Kill these members."""
        for member in members:
            member.kill()

    def kill_all(self) -> None:
        """Kill the members that run."""
        self.kill(*(member for member in self.members if member.runs))

    def restart(self) -> None:
        """Kill all members, and start them on their data."""
        self.kill_all()
        self.start()

    def control(self, *argv: str, user: tuple[str, str] | None = None, endpoints: str = "") -> str:
        """Run `etcdctl` on all members, or on these; its output. AssertionError with what it says if it fails."""
        options = ["--endpoints", endpoints or self.endpoints, *self._control_options]
        if user:
            options += ["--user", ":".join(user)]
        done = self._lab.hub.run("etcdctl", *options, *argv)
        assert done.returncode == 0, f"etcdctl {' '.join(argv)}: {done.stderr}"
        return done.stdout

    @property
    def leader(self) -> Member:
        """The present leader; all members must be running."""
        for status in json.loads(self.control("endpoint", "status", "-w", "json")):
            if status["Status"]["leader"] == status["Status"]["header"]["member_id"]:
                return next(member for member in self.members if member.endpoint == status["Endpoint"])
        raise AssertionError("no member leads")

    def used_by(self, host: Host) -> Member:
        """The member that the host's agent is connected to."""
        # grpc's sockets are IPv6 ones, and show mapped addresses.
        connections = host.run("ss", "-Htn", "state", "established").stdout
        (port,) = {int(port) for port in re.findall(rf"{re.escape(str(UNDERLAY.ip))}\]:(\d+)", connections)}
        return next(member for member in self.members if member.port == port)

    @property
    def revision(self) -> int:
        return self._lab.store.snapshot().revision

    def compact(self) -> None:
        """Forget all history up to now."""
        self.control("compact", "--physical", str(self.revision))

    def back_up(self) -> Path:
        """A backup of the present data, taken from the first member."""
        backup = self._lab.state / "backup"
        self.control("snapshot", "save", str(backup), endpoints=self.members[0].endpoint)
        return backup

    def restore(self, backup: Path, token: str = "etcd-cluster") -> None:
        """Begin anew from a backup, all members from the same one, as etcd's guide to disaster recovery has it.

        The cluster's id comes from the token and the members; by default it stays, for that is etcd's own default.
        """
        self.kill_all()
        for member in self.members:
            member.restore(backup, token)
        self.start()

    def grow(self, revision: int) -> None:
        """Write keys of no concern until the store is at this revision."""
        while self.revision < revision:
            self.control("put", "/elsewhere", "something")

    def demand_logins(self) -> None:
        """Switch authentication on, with the users ROOT and AGENT; the latter may use the network's keys alone."""
        for user, _ in (ROOT, AGENT):
            self.control("role", "add", user)
        self.allow()
        for user, password in (ROOT, AGENT):
            self.control("user", "add", f"{user}:{password}")
            self.control("user", "grant-role", user, user)
        self.control("auth", "enable")

    def allow(self, user: tuple[str, str] | None = None) -> None:
        """Let the agents use the network's keys."""
        self.control("role", "grant-permission", AGENT[0], "readwrite", "/coreos.com/network/", "--prefix", user=user)

    def change_password(self, password: str) -> None:
        """Give the agents' user another password."""
        change = f"echo {password} | etcdctl --endpoints {self.endpoints} --user {':'.join(ROOT)} user passwd"
        done = self._lab.hub.run("sh", "-c", f"{change} --interactive=false {AGENT[0]}")
        assert done.returncode == 0, done.stderr

    def forbid(self) -> None:
        """Take that back."""
        self.control("role", "revoke-permission", AGENT[0], "/coreos.com/network/", "--prefix", user=ROOT)


class PublicKeys:
    """The certificates of a lab: a CA, and one certificate each for etcd and for all agents, made anew in place."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._authority = directory / "ca.pem"
        self.etcd_options = [
            *("--cert-file", str(directory / "etcd.pem"), "--key-file", str(directory / "etcd.key")),
            *("--trusted-ca-file", str(self._authority), "--client-cert-auth"),
        ]
        self.agent_options = [
            *("--etcd-cafile", str(self._authority)),
            *("--etcd-certfile", str(directory / "agent.pem"), "--etcd-keyfile", str(directory / "agent.key")),
        ]
        self.control_options = [
            *("--cacert", str(self._authority)),
            *("--cert", str(directory / "agent.pem"), "--key", str(directory / "agent.key")),
        ]

    def make_all(self) -> None:
        """A CA, and certificates of it."""
        self._directory.mkdir(exist_ok=True)
        make_authority(self._directory, "ca")
        for name in ("etcd", "agent"):
            self.make(name)

    def make(self, name: str, address: str = str(UNDERLAY.ip)) -> None:
        """A certificate for `etcd`, at this address, or for `agent`."""
        make_certificate(self._authority, name, f"IP:{address}")

    def expire(self, name: str, end: str = "20200201000000Z") -> None:
        """Let the certificate be one that ends then: by default one that has run out."""
        directory = self._directory
        settings = f"database = {directory}/index\nnew_certs_dir = {directory}\nrand_serial = yes"
        (directory / "ca.cnf").write_text(
            f"[ca]\ndefault_ca = this\n[this]\n{settings}\ndefault_md = sha256\npolicy = policy\n"
            "[policy]\ncommonName = supplied\n"
        )
        (directory / "index").write_text("")
        openssl("ca", "-batch", "-notext", "-config", str(directory / "ca.cnf"))(
            *("-startdate", "20200101000000Z", "-enddate", end),
            *("-cert", str(self._authority), "-keyfile", str(self._authority.with_suffix(".key"))),
            *("-extfile", str(directory / f"{name}.ext"), "-in", str(directory / f"{name}.csr")),
            *("-out", str(directory / f"{name}.pem")),
        )


# --- traffic -------------------------------------------------------------------------------------------------------


class Gap(NamedTuple):
    """A run of pings between two pods that had no answer."""

    pods: str
    first: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.pods}: none answered from number {self.first} on, for {self.seconds:.2f} s"


class Pings:
    """An endless ping from pod to pod, begun and answered."""

    def __init__(self, src: Pod, dst: Pod) -> None:
        self._pods = f"{src.name} -> {dst.name}"
        self._output = src.lab.state / f"ping-{src.name}-{dst.name}"
        argv = src.inside("ping", "-n", "-i", str(INTERVAL_S), dst.address)
        with self._output.open("w") as output:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        wait_until(self._answered, 10, f"the first answer to a ping {self._pods}")

    def _answered(self) -> set[int]:
        return set(map(int, re.findall(r"bytes from .* icmp_seq=(\d+)", self._output.read_text())))

    def finish(self) -> list[Gap]:
        """End it; what was not answered. What was under way at the end is not lost."""
        before = max(self._answered())
        with contextlib.suppress(LabError):
            wait_until(lambda: max(self._answered()) > before, STALL_S, "another answer")
        self._process.send_signal(signal.SIGINT)
        self._process.wait(timeout=10)
        sent = re.search(r"(\d+) packets transmitted", self._output.read_text())
        assert sent, self._output.read_text()
        answered = sorted(self._answered())
        runs = [(after + 1, until) for after, until in itertools.pairwise(answered) if until > after + 1]
        if answered[-1] == before:
            runs.append((before + 1, int(sent[1]) + 1))
        return [Gap(self._pods, first, (end - first) * INTERVAL_S) for first, end in runs]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Stream:
    """A TCP connection from pod to pod on which ever greater numbers are sent, and checked where they arrive."""

    def __init__(self, src: Pod, dst: Pod) -> None:
        self._pods = f"{src.name} -> {dst.name}"
        listener = inside(dst, lambda: socket.create_server((dst.address, 0)))
        with contextlib.closing(listener):
            self._outlet = inside(src, lambda: socket.create_connection(listener.getsockname(), timeout=10))
            self._inlet, _ = listener.accept()
        self._done = threading.Event()
        self._sent = 0
        self._read = 0
        self._longest = 0.0
        self._trouble = ""
        self._threads = [threading.Thread(target=self._guarded, args=(each,)) for each in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, AssertionError) as error:
            self._trouble += f"{work.__name__.strip('_')}: {error}; "

    def _send(self) -> None:
        while not self._done.wait(INTERVAL_S):
            self._outlet.sendall(self._sent.to_bytes(8, "big"))
            self._sent += 1
        self._outlet.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        with self._inlet.makefile("rb") as arriving:
            last = time.monotonic()
            while number := arriving.read(8):
                last, before = time.monotonic(), last
                self._longest = max(self._longest, last - before)
                assert int.from_bytes(number, "big") == self._read, f"{number.hex()} came in place of {self._read}"
                self._read += 1

    def finish(self) -> float:
        """End it; the longest silence in seconds. AssertionError if it broke, or not all of it has arrived."""
        self._done.set()
        for thread in self._threads:
            thread.join(10)
        self.close()
        assert not self._trouble, f"{self._pods}: {self._trouble}"
        assert self._read == self._sent, f"{self._pods}: {self._sent} numbers sent, {self._read} arrived"
        return self._longest

    def close(self) -> None:
        self._done.set()
        for each in (self._outlet, self._inlet):
            # Wakes the thread that waits for it.
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in (self._outlet, self._inlet):
            each.close()


def inside(pod: Pod, make: Callable[[], T]) -> T:
    """What `make` makes in the pod's namespace: a socket stays there."""
    with (NETNS / pod.netns).open() as namespace, entered(namespace.fileno()):
        return make()


# --- the world -----------------------------------------------------------------------------------------------------


class World:
    """A lab with an etcd, one pod on each host. Building it makes nothing: see `__enter__` for the steps it takes.

    As a context manager it is up and converged inside the block; after it, etcd is killed, for it takes leave of its
    fellows one by one. All else goes with the lab.

    With `login`, agents and tests have user names and passwords; etcd knows them once `etcd.demand_logins` is called.
    With `tls`, etcd and agents know each other by certificates, those of `pki`.
    """

    def __init__(
        self,
        make_lab: MakeLab,
        *,
        hosts: int = 2,
        members: int = 1,
        agent_options: Sequence[str] = (),
        etcd_options: Sequence[str] = (),
        login: bool = False,
        tls: bool = False,
    ) -> None:
        self.lab = make_lab(hosts=hosts, pods=1, connect=self._connect)
        self.pki = PublicKeys(self.lab.state / "pki")
        self.etcd = Etcd(self.lab, members, etcd_options, login=login, pki=self.pki if tls else None)
        self._agent_options = [*agent_options, *(self.pki.agent_options if tls else ())]
        self.password_file = self.lab.state / "password"
        if login:
            self._agent_options += ["--etcd-username", AGENT[0], "--etcd-password-file", str(self.password_file)]
        self._logged: dict[str, int] = {}

    def __enter__(self) -> Self:
        self.make_network()
        self.etcd.start()
        self.lab.write_config(NETWORK)
        self.start_agents(*self.hosts)
        self.wait_ready(*self.hosts)
        self.converge(30)
        return self

    def __exit__(self, *_: object) -> None:
        self.etcd.kill_all()

    def _connect(self, _: str) -> Store:
        return self.etcd.connect()

    def make_network(self) -> None:
        self.lab.make_network()
        self.set_password(AGENT[1])
        self.pki.make_all()

    @property
    def hosts(self) -> list[Host]:
        return self.lab.hosts

    # --- agents ---

    def start_agents(self, *hosts: Host) -> None:
        """Start the agents; they are ready later."""
        for host in hosts:
            host.start_agent("--etcd-endpoints", self.etcd.endpoints, *self._agent_options)

    def wait_ready(self, *hosts: Host) -> None:
        """Until they are ready; their pods get their addresses."""
        for host in hosts:
            host.wait_ready()
            host.attach_pods()

    def add_host(self) -> Host:
        """One more host; its agent is started and ready later."""
        host = self.lab.add_host()
        self.start_agents(host)
        return host

    def set_password(self, password: str) -> None:
        """What agents find in their password file when they start."""
        self.password_file.write_text(password)
        self.password_file.chmod(0o600)

    def log(self, host: Host) -> list[dict[str, Any]]:
        """What the agent has said since the traffic began."""
        lines = host.log()[self._logged.get(host.name, 0) :].splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def said(self, host: Host, *events: str) -> list[dict[str, Any]]:
        """Its lines of these events since the traffic began."""
        return [line for line in self.log(host) if line["event"] in events]

    def wait_said(self, event: str, *hosts: Host, reason: str = "") -> None:
        """Until these hosts, or all, have said this since the traffic began, with these words of a reason."""

        def heard(host: Host) -> bool:
            return any(reason in str(line) for line in self.said(host, event))

        for host in hosts or self.hosts:
            wait_until(functools.partial(heard, host), NOTICED_S, f"{event} {reason} from {host.name}")

    # --- other hosts' leases ---

    def join(self, number: int, subnet: str = "") -> None:
        """A host without an agent takes 10.244.<number>.0/24, or `subnet`."""
        prefix = Prefix.parse(subnet or f"10.244.{number}.0/24")
        assert self._writer.create(subnet_key(prefix), stranger(number), self._writer.grant(3600))

    def leave(self, number: int) -> None:
        """It gives it back."""
        key = f"10.244.{number}.0-24"
        (revision,) = (record.mod_revision for record in self._writer.snapshot().records if record.key == key)
        assert self._writer.delete(key, revision)

    @property
    def _writer(self) -> Store:
        """The store, on a member that answers: reads look for one, transactions do not."""

        def answers() -> bool:
            try:
                self.lab.store.read_config()
            except StoreError:
                return False
            return True

        wait_until(answers, START_DEADLINE_S, "an answer from etcd")
        return self.lab.store

    # --- the way to etcd ---

    def cut(self, *hosts: Host, requests: bool = True, answers: bool = True) -> None:
        """From now on what these hosts, or all, send to etcd is lost; or what etcd sends to them; or both."""
        ports = "{" + ",".join(str(member.port) for member in self.etcd.members) + "}"
        rules = []
        for host in hosts or self.hosts:
            if requests:
                rules.append(f"add rule inet fault requests ip saddr {host.underlay_ip} tcp dport {ports} drop")
            if answers:
                rules.append(f"add rule inet fault answers ip daddr {host.underlay_ip} tcp sport {ports} drop")
        self._nft(
            "add table inet fault",
            "add chain inet fault requests { type filter hook input priority 0; }",
            "add chain inet fault answers { type filter hook output priority 0; }",
            *rules,
        )

    def mend(self) -> None:
        """Undo every cut."""
        self._nft("delete table inet fault")

    def _nft(self, *commands: str) -> None:
        done = self.lab.hub.run("nft", "; ".join(commands))
        assert done.returncode == 0, done.stderr

    # --- what passes meanwhile ---

    def wait_out(self, seconds: float) -> None:
        """Let a fault last."""
        time.sleep(seconds)

    def last_an_outage(self) -> None:
        """For OUTAGE_S, no agent uses more than IDLE_CPU of a core or says more than IDLE_LINES."""
        before = {host.name: (cpu_seconds(host), host.log().count("\n")) for host in self.hosts}
        time.sleep(OUTAGE_S)
        for host in self.hosts:
            cpu, lines = before[host.name]
            cpu, lines = cpu_seconds(host) - cpu, host.log().count("\n") - lines
            assert cpu <= IDLE_CPU * OUTAGE_S, f"{host.name} used {cpu:.2f} s of CPU in {OUTAGE_S:g} s"
            assert lines <= IDLE_LINES, f"{host.name} said {lines} lines in {OUTAGE_S:g} s"

    # --- what is lost ---

    @contextlib.contextmanager
    def traffic(self, *hosts: Host) -> Iterator[list[Gap]]:
        """Pings both ways and a stream between the pods of these hosts, or all, while the block lasts.

        After the block, what it yields holds what was lost; streams may have stalled, and none has broken.
        """
        pods = [host.pods[0] for host in hosts or self.hosts]
        self._logged = {host.name: len(host.log()) for host in self.hosts}
        lost: list[Gap] = []
        with contextlib.ExitStack() as stack:
            pings, streams = [], []
            for src, dst in itertools.permutations(pods, 2):
                pings.append(Pings(src, dst))
                stack.callback(pings[-1].kill)
            for src, dst in itertools.combinations(pods, 2):
                streams.append(Stream(src, dst))
                stack.callback(streams[-1].close)
            yield lost
            lost += itertools.chain.from_iterable(each.finish() for each in pings)
            stalls = [each.finish() for each in streams]
            lost += [Gap("a stream", 0, stall) for stall in stalls if stall > STALL_S]

    @contextlib.contextmanager
    def nothing_lost(self, *hosts: Host) -> Iterator[None]:
        """As `traffic`; AssertionError if any of it is lost, or one of the hosts moves to another subnet."""
        with self.lost_for_at_most(0, *hosts):
            yield

    @contextlib.contextmanager
    def lost_for_at_most(self, seconds: float, *hosts: Host) -> Iterator[None]:
        """As `nothing_lost`; but between any two pods so much may be lost as is sent in this time."""
        subnets = {host: host.subnet for host in hosts or self.hosts}
        try:
            with self.traffic(*hosts) as lost:
                yield
            assert all(gap.seconds <= seconds for gap in lost), "; ".join(map(str, lost))
            assert {host: host.subnet for host in subnets} == subnets
        except BaseException as error:
            # For whoever reads why.
            for host in self.hosts:
                error.add_note("\n  ".join(map(str, (host.name, *self.log(host)))))
            raise

    def survive(self, fault: "Fault", seconds: float) -> None:
        """Under this fault nothing is lost, and so many seconds after its end all is at rest."""
        with self.nothing_lost():
            fault(self)
            self.converge(seconds)

    # --- what must be true in the end ---

    def converge(self, seconds: float) -> None:
        """Until etcd and every kernel agree; AssertionError that says in what they differ if not in time."""
        with contextlib.suppress(LabError):
            wait_until(lambda: not self.differences(), seconds, interval=0.1)
        assert not (differences := self.differences()), "\n".join(differences)

    def differences(self) -> list[str]:
        """What is not as it must be: each host has one lease, and each lease lives; no two overlap; each kernel holds
        exactly the entries that the leases of the others call for.
        """
        try:
            leases = self.lab.leases()
            unkept = [lease for lease in leases if not self.lab.store.time_left(lease.etcd_lease)]
        except StoreError as error:
            return [f"etcd: {error}"]
        found = [f"{lease.subnet} has no etcd lease that lives" for lease in unkept]
        for one, other in itertools.combinations(leases, 2):
            if one.subnet.overlaps(other.subnet):
                found.append(f"{one.subnet} overlaps {other.subnet}")
        for host in self.hosts:
            own = [str(lease.subnet) for lease in leases if holder(lease) == host.underlay_ip]
            if len(own) != 1 or own[0] != host.subnet:
                found.append(f"{host.name} has {host.subnet} and leases {own}")
            held, wanted = entries(host), entries_called_for(host, leases)
            for kind in wanted:
                if held[kind] != wanted[kind]:
                    extra, missing = held[kind] - wanted[kind], wanted[kind] - held[kind]
                    found.append(f"{host.name}: {kind} has {sorted(extra)} and lacks {sorted(missing)}")
        return found

    def joined(self) -> set[str]:
        """The subnets in etcd of hosts without agents."""
        own = {host.underlay_ip for host in self.hosts}
        return {str(lease.subnet) for lease in self.lab.leases() if holder(lease) not in own}


Fault = Callable[[World], None]
"""What befalls a world that is up, from beginning to end."""


def cpu_seconds(host: Host) -> float:
    """What the host's agent has used so far, in user and system mode."""
    fields = Path(f"/proc/{host.agent_pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stranger(number: int) -> bytes:
    """What a host of this number publishes that has no agent of ours."""
    return encode_attrs(LeaseAttrs(bytes((172, 30, 200, number)), "vxlan", Vtep(1, bytes((2, 0, 0, 0, 9, number)))))


def holder(lease: Lease) -> str:
    return format_address(lease.attrs.public_ip)


def lease_of(host: Host) -> Lease:
    """The one lease that etcd has for the host."""
    (lease,) = (lease for lease in host.lab.leases() if holder(lease) == host.underlay_ip)
    return lease


def entries(host: Host) -> Entries:
    """What stands on the overlay's device, as iproute2 tells it."""
    gateways = {hop["id"]: hop["gateway"] for hop in host.json("ip", "nexthop")}
    routes = host.json("ip", "route", "show", "dev", "flannel.1")
    return {
        "route": {f"{route['dst']} via {gateways.get(route.get('nhid'), route.get('gateway'))}" for route in routes},
        "nexthop": set(gateways.values()),
        "neighbour": {
            f"{n['dst']} {n.get('lladdr')}"
            for n in host.json("ip", "neigh", "show", "dev", "flannel.1", "nud", "permanent")
        },
        "fdb": {f"{fdb['mac']} {fdb.get('dst')}" for fdb in host.json("bridge", "fdb", "show", "dev", "flannel.1")},
    }


def entries_called_for(host: Host, leases: Sequence[Lease]) -> Entries:
    """The same, as the leases of all other hosts would have it."""
    wanted: Entries = {"route": set(), "nexthop": set(), "neighbour": set(), "fdb": set()}
    for lease in leases:
        if holder(lease) != host.underlay_ip:
            assert lease.attrs.vtep is not None
            base, mac = format_address(lease.subnet.base), format_mac(lease.attrs.vtep.mac)
            wanted["route"].add(f"{lease.subnet} via {base}")
            wanted["nexthop"].add(base)
            wanted["neighbour"].add(f"{base} {mac}")
            wanted["fdb"].add(f"{mac} {holder(lease)}")
    return wanted

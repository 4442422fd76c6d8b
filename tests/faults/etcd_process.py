"""A real etcd process for tests: on loopback or a unix socket; stopped, killed, frozen, restarted on its data."""

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from overlay.cluster import wait_until
from subnet_lease.etcd import EtcdStore
from subnet_lease.store import StoreDenied, StoreUnavailable

START_DEADLINE_S = 30.0
SOCKET = "etcd.sock:0"


def free_ports(count: int) -> list[int]:
    """TCP ports of 127.0.0.1 that were free a moment ago, below those that the kernel gives to whoever asks for any.

    The latter have often another owner before one can use them: several test runs start processes all the time.
    """
    with ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            port = random.randrange(16384, _first_ephemeral_port())
            with suppress(OSError):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                ports.append(port)
        return ports


def _first_ephemeral_port() -> int:
    return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])


@contextmanager
def refusing_ports(count: int) -> Iterator[list[int]]:
    """TCP ports of 127.0.0.1 where nobody listens, and nobody else can inside the block."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        yield [each.getsockname()[1] for each in sockets]


def freeze(pid: int) -> None:
    """Stop a process, and wait until all of its threads have: the signal stops one after the other, and only soon."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    wait_until(lambda: {(task / "stat").read_text().rpartition(") ")[2][0] for task in tasks.iterdir()} == {"T"})


class EtcdProcess:
    """One single-member etcd with its data below `directory`. Started by `start`, or by entering the context.

    `endpoint` is where it listens: `http://127.0.0.1:port`, `https://...` if `tls` gives (certificate, key, CA), or
    `unix:///directory/etcd.sock:0`: etcd 3.4 wants a "host" and a port, and takes both for a file name.
    """

    def __init__(
        self,
        directory: Path,
        *,
        unix: bool = False,
        tls: tuple[Path, Path, Path] | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        self._directory = directory
        self._tls = tls
        self._arguments = list(arguments)
        client, peer = free_ports(2)
        self.endpoint = self._listen = f"{'https' if tls else 'http'}://127.0.0.1:{client}"
        if unix:
            self.endpoint, self._listen = f"unix://{directory / SOCKET}", f"unix://{SOCKET}"
        self._peer = f"http://127.0.0.1:{peer}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "EtcdProcess":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        assert self._process is not None, "etcd is not running"
        return self._process.pid

    def start(self, *, wait: bool = True) -> None:
        """Run etcd on the data there is, and wait until it answers."""
        command = [
            "etcd",
            "--name=test",
            f"--data-dir={self._directory / 'data'}",
            f"--listen-client-urls={self._listen}",
            f"--advertise-client-urls={self._listen}",
            f"--listen-peer-urls={self._peer}",
            f"--initial-advertise-peer-urls={self._peer}",
            f"--initial-cluster=test={self._peer}",
            "--unsafe-no-fsync",
            *self._arguments,
        ]
        if self._tls:
            certificate, key, ca = self._tls
            command += [f"--cert-file={certificate}", f"--key-file={key}", f"--trusted-ca-file={ca}"]
        self._directory.mkdir(parents=True, exist_ok=True)
        with (self._directory / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self._directory, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        if wait:
            self._wait_until_it_answers()

    def store(self, prefix: str = "/coreos.com/network", **options: object) -> EtcdStore:
        """A store on this etcd."""
        cafile = str(self._tls[2]) if self._tls else None
        return EtcdStore([self.endpoint], prefix, **{"cafile": cafile, **options})  # type: ignore[arg-type]

    def stop(self) -> None:
        """End it in good order."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a power failure would."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Freeze it: connections stay open and nothing answers."""
        freeze(self.pid)

    def resume(self) -> None:
        """Let it run on after `pause`."""
        assert self._process is not None, "etcd is not running"
        self._process.send_signal(signal.SIGCONT)

    def restart(self) -> None:
        """Kill it and start it on the same data and address."""
        self.kill()
        self.start()

    def wipe(self) -> None:
        """Throw its data away; it must not be running. Started again, it is another cluster with the same address."""
        shutil.rmtree(self._directory / "data")

    def save(self, name: str) -> None:
        """Keep a copy of its data; it must not be running."""
        shutil.copytree(self._directory / "data", self._directory / name)

    def restore(self, name: str) -> None:
        """Put a copy of its data back; it must not be running."""
        self.wipe()
        shutil.copytree(self._directory / name, self._directory / "data")

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.send_signal(how)
            process.wait(timeout=START_DEADLINE_S)
            # Left behind by a kill, and etcd does not start on it.
            with suppress(FileNotFoundError):
                (self._directory / SOCKET).unlink()

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_DEADLINE_S
        while True:
            assert self._process is not None
            store = self.store(timeout=1.0)
            try:
                store.read_config()
                return
            except StoreDenied:
                return
            except StoreUnavailable as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log = (self._directory / "etcd.log").read_text(errors="replace")
                    raise AssertionError(f"etcd did not start: {error}\n{log[-2000:]}") from None
                time.sleep(0.05)
            finally:
                store.close()


class EtcdProxy:
    """`etcd grpc-proxy` before one endpoint, on a port of loopback; a context manager. `directory` gets its log."""

    def __init__(self, directory: Path, behind: str) -> None:
        (port,) = free_ports(1)
        self.endpoint = f"http://127.0.0.1:{port}"
        self._directory = directory
        self._command = [
            *("etcd", "grpc-proxy", "start", f"--endpoints={behind}", f"--listen-addr=127.0.0.1:{port}"),
            f"--data-dir={directory / 'proxy'}",
        ]

    def __enter__(self) -> "EtcdProxy":
        with (self._directory / "proxy.log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        with closing(EtcdStore([self.endpoint], "/proxy", timeout=1.0)) as store:
            wait_until(lambda: _answers(store))
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(timeout=START_DEADLINE_S)


def _answers(store: EtcdStore) -> bool:
    with suppress(StoreUnavailable):
        store.read_config()
        return True
    return False

"""The overlay on an underlay that loses, delays, reorders and repeats packets, as netem (tc-netem(8)) makes it.

Not every kernel has netem, so this is no part of a usual run, and by its name not collected unless it is asked for:
`python -m tests.kernels` does, for its emulated machine.
"""

import json
import os
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from overlay.cluster import Lab, Place, Pod, wait_until
from overlay.netns import NETNS
from tests.netns.namespace import entered
from tests.netns.test_overlay import AGENT, entries, events, put_peer

BAD = "delay 50ms loss 5% reorder 25% 50% duplicate 2%"
"""Of four packets, one or so overtakes those that are delayed."""

PATIENCE = 120.0
"""Seconds until a wait is given up: TCP doubles its pause with each retransmission that is lost as well."""


def harm(place: Place, device: str, netem: str = BAD) -> None:
    """Treat so whatever `place` sends through `device`; the latest call counts."""
    done = place.run("tc", "qdisc", "replace", "dev", device, "root", "netem", *netem.split())
    assert done.returncode == 0, done.stderr


def transfer(src: Pod, dst: Pod, data: bytes) -> bytes:
    """Send `data` from pod to pod over TCP; what arrives."""

    def tcp(pod: Pod) -> socket.socket:
        with (NETNS / pod.netns).open() as namespace, entered(namespace.fileno()):
            made = socket.socket()
        made.settimeout(PATIENCE)
        return made

    def receive() -> bytes:
        connection, _ = listener.accept()
        connection.settimeout(PATIENCE)
        with connection, connection.makefile("rb") as stream:
            return stream.read()

    # Else netem meets, and loses or keeps as one, what the kernel has put together of dozens of packets.
    src.ip("link set eth0 gso_max_segs 1")
    with tcp(dst) as listener, tcp(src) as sender, ThreadPoolExecutor(1) as thread:
        listener.bind((dst.address, 0))
        listener.listen()
        received = thread.submit(receive)
        sender.connect(listener.getsockname())
        sender.sendall(data)
        sender.shutdown(socket.SHUT_WR)
        return received.result()


@pytest.fixture(scope="module")
def bad_lab(make_module_lab: Callable[..., Lab]) -> Lab:
    """Three hosts with one pod each. All that they and etcd send to one another crosses a bad link once."""
    lab = make_module_lab(hosts=3, pods=1)
    lab.up()
    harm(lab.hub, "underlay0")
    for host in lab.hosts:
        harm(host, "eth0")
    return lab


def test_transfer_between_pods_arrives_intact(bad_lab: Lab) -> None:
    h1, h2, _ = bad_lab.hosts
    data = os.urandom(256 * 1024)
    assert transfer(h1.pods[0], h2.pods[0], data) == data
    (netem,) = json.loads(h1.run("tc", "-s", "-j", "qdisc", "show", "dev", "eth0").stdout)
    assert netem["kind"] == "netem"
    assert netem["drops"] > 0, "the link was good"


def test_host_on_a_bad_link_joins_is_reached_and_leaves(bad_lab: Lab) -> None:
    before = {host.name: entries(host) for host in bad_lab.hosts}
    h1, h2, h3 = bad_lab.hosts
    h4 = bad_lab.add_host()
    harm(h4, "eth0")
    h4.start_agent()
    h4.wait_ready(PATIENCE)
    h4.attach_pods()
    bad_lab.wait_converged(PATIENCE)
    data = os.urandom(32 * 1024)
    for host in (h1, h2, h3):
        assert transfer(host.pods[0], h4.pods[0], data) == data
    assert h4.kill_agent(signal.SIGTERM) == 0
    options = ("--subnet-file", str(h4.subnet_file), "--etcd-endpoints", "http://172.30.0.1:2379", "--iface", "eth0")
    left = h4.run(*AGENT, "cleanup", "--release", *options, seconds=PATIENCE)
    assert left.returncode == 0, left.stderr
    bad_lab.hosts.remove(h4)
    for host in (h1, h2, h3):
        wait_until(lambda host=host: entries(host) == before[host.name], PATIENCE, f"no trace of h4 on {host.name}")


def test_host_that_is_cut_off_keeps_what_it_has_and_catches_up(bad_lab: Lab) -> None:
    h1, h2, h3 = bad_lab.hosts
    before = entries(h1)
    for place, device in ((h1, "eth0"), (bad_lab.hub, h1.name)):
        harm(place, device, "loss 100%")
    key = put_peer(bad_lab, 250)
    for host in (h2, h3):
        wait_until(lambda host=host: "10.244.250.0/24" in entries(host)["route"], PATIENCE, "the peer on the others")
    wait_until(lambda: events(h1, "store_unreachable"), PATIENCE, "the agent to notice that it is cut off")
    assert entries(h1) == before
    harm(bad_lab.hub, h1.name, "delay 0ms")
    harm(h1, "eth0")
    wait_until(lambda: "10.244.250.0/24" in entries(h1)["route"], PATIENCE, "the peer that came meanwhile")
    (record,) = (record for record in bad_lab.store.snapshot().records if record.key == key)
    assert bad_lab.store.delete(key, record.mod_revision)
    wait_until(lambda: entries(h1) == before, PATIENCE, "the state before")


def test_nothing_that_is_right_is_written_again(bad_lab: Lab) -> None:
    for host in bad_lab.hosts:
        passes = events(host, "reconciled")
        assert [each for each in passes if "drift" in each] == []
        put, dropped = (sum(int(str(each[kind])) for each in passes) for kind in ("put", "dropped"))
        guarded = len(bad_lab.hosts) - 1
        assert put - dropped == sum(map(len, entries(host).values())) + guarded

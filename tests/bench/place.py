"""Where a contender runs: a fresh network namespace with an underlay, and the means to act and to look inside it."""

import contextlib
import ctypes
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from overlay.firewall import SETS, TABLE
from overlay.netns import NETNS, Namespace, NamespaceError, create, delete
from subnet_lease.model import Lease, format_address, format_mac
from tests.bench.peers import DEVICE, ETCD_IP, OWN_IP, UNDERLAY

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000


class Mismatch(Exception):
    """The kernel does not hold what etcd calls for; the text says what is missing or wrong."""


@contextlib.contextmanager
def hub() -> Iterator[Namespace]:
    """The namespace where etcd lives, at ETCD_IP on the underlay of whichever place there is."""
    name = f"oabench-{os.getpid()}-hub"
    create([name])
    try:
        found = Namespace(name)
        found.ip("link set lo up")
        yield found
    finally:
        delete([name])


@contextlib.contextmanager
def fresh_place(hub: Namespace, own_ip: str = OWN_IP) -> Iterator[Namespace]:
    """A namespace whose `eth0` is the underlay, with the hub at its other end. It is empty before it is deleted.

    The kernel tears a namespace down later and beside other work, which would disturb the next measurement; so what
    takes long to remove is removed here.
    """
    number = own_ip.rpartition(".")[2]
    name = f"oabench-{os.getpid()}-{number}"
    create([name])
    place = Namespace(name)
    try:
        place.ip(
            "link set lo up",
            f"link add eth0 type veth peer place{number} netns {hub.netns}",
            f"addr add {own_ip}/{UNDERLAY.length} dev eth0",
            "link set eth0 up",
            f"route add default via {ETCD_IP}",
        )
        hub.ip(f"addr add {ETCD_IP} peer {own_ip}/32 dev place{number}", f"link set place{number} up")
        yield place
    finally:
        # Routes first: a nexthop object in use, and so the device, costs the kernel a walk over all routes.
        with contextlib.suppress(NamespaceError):
            routes = place.json("ip", "-4", "route", "show", "dev", DEVICE)
            place.ip(*(f"route del {route['dst']}" for route in routes), f"link del {DEVICE}")
        place.run("ip", "link", "delete", "eth0")
        delete([name])


def make_device(place: Namespace) -> int:
    """The VXLAN device as the agent makes it, for contenders that have no agent; its interface index."""
    place.ip(
        f"link add {DEVICE} type vxlan id 1 dev eth0 local {OWN_IP} dstport 8472 nolearning",
        f"addr add 10.0.0.0/32 dev {DEVICE}",
        f"link set {DEVICE} up",
    )
    return device_index(place)


def device_index(place: Namespace) -> int:
    """The interface index of the VXLAN device."""
    return int(place.json("ip", "link", "show", "dev", DEVICE)[0]["ifindex"])


def inside(place: Namespace, work: Callable[[], T]) -> T:
    """Run `work` in a thread that has entered the namespace; sockets and processes it makes belong there.

    For processes to be timed: `ip netns exec` would be counted with them.
    """

    def entered() -> T:
        with (NETNS / place.netns).open() as handle:
            if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter {place.netns}")
        return work()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(entered).result()


def compare(place: Namespace, peers: Sequence[Lease], *, nexthops: bool) -> None:
    """Mismatch unless the kernel, asked with iproute2, holds exactly the entries of these peers."""
    fdb = {row["mac"]: row["dst"] for row in place.json("bridge", "fdb", "show", "dev", DEVICE) if "dst" in row}
    neighbours = {row["dst"]: row["lladdr"] for row in place.json("ip", "-4", "neigh", "show", "dev", DEVICE)}
    gateways = {row["id"]: row["gateway"] for row in place.json("ip", "nexthop", "show", "dev", DEVICE)}
    routes = {
        row["dst"]: gateways.get(row["nhid"]) if "nhid" in row else row["gateway"]
        for row in place.json("ip", "-4", "route", "show", "dev", DEVICE)
    }
    wanted_fdb, wanted_neighbours, wanted_routes = {}, {}, {}
    for peer in peers:
        assert peer.attrs.vtep is not None
        base, mac = format_address(peer.subnet.base), format_mac(peer.attrs.vtep.mac)
        wanted_fdb[mac] = format_address(peer.attrs.public_ip)
        wanted_neighbours[base] = mac
        wanted_routes[str(peer.subnet)] = base
    for what, wanted, found in (
        ("FDB", wanted_fdb, fdb),
        ("neighbour", wanted_neighbours, neighbours),
        ("route", wanted_routes, routes),
    ):
        if wanted != found:
            wrong = len(wanted.items() ^ found.items())
            raise Mismatch(f"{len(wanted)} {what} entries wanted, {len(found)} found, {wrong} differ")
    listed = place.run("nft", "-j", "list", "set", *TABLE.split(), SETS[4])
    if listed.returncode == 0:
        [content] = [each["set"] for each in json.loads(listed.stdout)["nftables"] if "set" in each]
        if set(content.get("elem", ())) != set(wanted_fdb.values()):
            raise Mismatch(f"{len(content.get('elem', ()))} addresses in the guard's set for {len(peers)} peers")
    if len(gateways) != (len(peers) if nexthops else 0):
        raise Mismatch(f"{len(gateways)} nexthop objects for {len(peers)} peers")

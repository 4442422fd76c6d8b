"""The agent's rivals, each of which puts the same peers into an empty kernel, and says how many seconds it took."""

import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from overlay import firewall, nfnl, nft, rtnl
from overlay.firewall import Rules
from overlay.model import Entry, Fdb, Neighbour, Route
from overlay.netlink import open_socket
from overlay.netns import Namespace
from subnet_lease.model import Lease, format_address, format_mac
from tests.bench.peers import DEVICE, NETWORK, bridge_commands, entries, ip_commands
from tests.bench.place import inside, make_device

ROOT = Path(__file__).parents[2]

DEADLINE_S = 180.0

NETLINK_NETFILTER = 12

BUFFER = 8 << 20
"""Bytes for each way of a netlink socket."""

BATCH = 400
"""Messages in one send, as in `overlay.kernel`."""

END = 1
"""The sequence number of the last change of a transaction, which is acknowledged."""

GUARD = Rules(blocks=(NETWORK,), subnets=(), devices=(DEVICE,), port=8472, masquerade=False, exceptions=(), guard="on")
"""What makes the agent keep a set of hosts."""


class Failed(Exception):
    """A contender did not do its work; the text says what it said."""


# --- the kernel alone --------------------------------------------------------------------------------------------


def kernel_alone(place: Namespace, peers: Sequence[Lease], *, ack_each: bool = False) -> float:
    """Send the agent's own messages, made beforehand, and wait for each batch's end: what no agent can save.

    Those for the firewall's set are one transaction, over a socket of their own, and come first. With `ack_each` every
    other message is acknowledged for itself, and all of that is read.
    """
    device = make_device(place)
    wanted = entries(peers, device, nexthops=True)
    batches = []
    for start in range(0, len(wanted), BATCH):
        some = wanted[start : start + BATCH]
        messages = [rtnl.put(entry, number, ack=ack_each) for number, entry in enumerate(some)]
        batches.append(b"".join([*messages, rtnl.end_of_batch(BATCH)]))

    hosts = nfnl.batch([peer.attrs.public_ip for peer in peers if peer.attrs.public_ip], (), 0, END)

    def exchange() -> float:
        nft.apply(firewall.preparation(GUARD))
        # Room for the answers to a whole batch, and for the whole transaction.
        with (
            open_socket(NETLINK_NETFILTER, BUFFER) as sets,
            open_socket(socket.NETLINK_ROUTE, BUFFER) as sock,
        ):
            started = time.monotonic()
            sets.send(hosts)
            answer = sets.recv(65536)
            if rtnl.HEADER.unpack_from(answer)[3] != END:
                raise Failed("the kernel refused the addresses of hosts")
            for batch in batches:
                sock.send(batch)
                # A refusal would come before the end, and `compare` would find it.
                while rtnl.HEADER.unpack_from(sock.recv(65536))[3] != BATCH:
                    pass
            return time.monotonic() - started

    return inside(place, exchange)


# --- iproute2 ----------------------------------------------------------------------------------------------------


def iproute2(place: Namespace, peers: Sequence[Lease], directory: Path, *, nexthops: bool) -> float:
    """`bridge -batch` and then `ip -batch` on ready-made files; what both take on an empty file is taken off."""
    device = make_device(place)
    bridge_file, ip_file, empty = (directory / name for name in ("bridge.batch", "ip.batch", "empty.batch"))
    bridge_file.write_text("".join(bridge_commands(peers, device)))
    ip_file.write_text("".join(ip_commands(peers, device, nexthops=nexthops)))
    empty.write_text("")

    def both(bridge: Path, ip: Path) -> float:
        started = time.monotonic()
        for argv in (["bridge", "-batch", str(bridge)], ["ip", "-batch", str(ip)]):
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            if done.returncode:
                raise Failed(f"{' '.join(argv)}: {done.stderr[:400]}")
        return time.monotonic() - started

    idle = inside(place, lambda: both(empty, empty))
    return inside(place, lambda: both(bridge_file, ip_file)) - idle


# --- pyroute2 ----------------------------------------------------------------------------------------------------


def pyroute2(place: Namespace, peers: Sequence[Lease]) -> float:
    """One call of `IPRoute` for each entry, with plain gateways; its import and socket are not counted."""
    from pyroute2 import IPRoute

    device = make_device(place)
    wanted = entries(peers, device, nexthops=False)

    def call(route: IPRoute, entry: Entry) -> None:
        match entry:
            case Fdb():
                mac, dst = format_mac(entry.at[1]), format_address(entry.remote)
                route.fdb("replace", ifindex=device, lladdr=mac, dst=dst, state=entry.state, flags=rtnl.NTF_SELF)
            case Neighbour():
                dst, mac = format_address(entry.at[1]), format_mac(entry.mac)
                route.neigh("replace", ifindex=device, dst=dst, lladdr=mac, state="permanent")
            case Route():
                gateway = format_address(entry.gateway)
                route.route("replace", dst=str(entry.destination), gateway=gateway, oif=device, flags=["onlink"])
            case _:
                raise AssertionError(f"there is no {entry} among them")

    def program() -> float:
        with IPRoute() as route:
            started = time.monotonic()
            for entry in wanted:
                call(route, entry)
            return time.monotonic() - started

    return inside(place, program)

"""The synthetic cluster: leases as other hosts' agents write them, and what each rival needs to program them.

The overlay is 10.0.0.0/8 with one /24 for each host, as flannel hands them out from the start of the network. The hosts
live in 172.16.0.0/12: this one first, then etcd's, then the peers. Agents choose their own subnet below 10.248.0.0;
what lies above is for hosts that join while an agent runs.
"""

import random
import time
from collections.abc import Iterator, Sequence

import grpc
from etcd3 import etcdrpc as rpc

from overlay.backends import Here, backend_of
from overlay.model import BUILD_ORDER, NEXTHOP_BASE, Entry, Fdb, Neighbour, NextHop, Route
from subnet_lease.model import (
    Lease,
    LeaseAttrs,
    NetworkConfig,
    Prefix,
    Vtep,
    encode_attrs,
    format_address,
    format_mac,
)

NETWORK = Prefix.parse("10.0.0.0/8")
UNDERLAY = Prefix.parse("172.16.0.0/12")
CONFIG = b'{"Network":"10.0.0.0/8","SubnetMax":"10.247.255.0","Backend":{"Type":"vxlan"}}'
BACKEND = backend_of(NetworkConfig.parse(CONFIG))
DEVICE = "flannel.1"
OWN_IP = format_address(UNDERLAY.host(1))
ETCD_IP = format_address(UNDERLAY.host(2))
SECOND_IP = format_address(UNDERLAY.host(3))
"""Of a second host, for two agents side by side."""
ETCD_ENDPOINT = f"http://{ETCD_IP}:2379"

ABOUT = {"AgentVersion": "0.1.0"}

TXN_PUTS = 128
"""etcd's default limit of operations in one transaction (--max-txn-ops)."""

LEASE_TTL = 86400

SMALL = 2
"""Peers in the smallest cluster measured: three hosts with this one. What is spent there is spent at any size."""


def leases(count: int) -> list[Lease]:
    """The first `count` peers; the same on every call."""
    dice = random.Random(count)
    found = []
    for number in range(1, count + 1):
        # As flannel makes them: random, locally administered, of one device.
        mac = bytes([dice.randrange(256) & 0xFE | 0x02]) + dice.randbytes(5)
        attrs = LeaseAttrs(
            UNDERLAY.host(256 + number), "vxlan", Vtep(1, mac), mtu=1450, node_name=f"node-{number}", extra=ABOUT
        )
        found.append(Lease(Prefix(NETWORK.host(number << 8), 24), None, attrs, 0, 0, 0))
    return found


def newcomers(count: int) -> list[Lease]:
    """Hosts that none of `leases` is, to join and leave; the same on every call, at most 2,048."""
    assert count <= 2048, "there are no more subnets above SubnetMax"
    return [
        Lease(
            Prefix(bytes((10, 248 + (number >> 8), number & 255, 0)), 24),
            None,
            LeaseAttrs(
                UNDERLAY.host((14 << 16) + number), "vxlan", Vtep(1, bytes((2, 250)) + number.to_bytes(4, "big"))
            ),
            *(0, 0, 0),
        )
        for number in range(count)
    ]


def load(endpoint: str, prefix: str, peers: Sequence[Lease]) -> None:
    """Write the network configuration and the leases below `prefix`, all on one etcd lease."""
    with _channel(endpoint) as channel:
        rpc.KVStub(channel).Put(rpc.PutRequest(key=f"{prefix}/config".encode(), value=CONFIG))
    put_all(endpoint, prefix, peers)


def put_all(endpoint: str, prefix: str, peers: Sequence[Lease]) -> tuple[float, float]:
    """Write the leases in transactions as large as etcd takes them, one after the other, on one etcd lease.

    When the first was sent and the last was answered, on the steady clock.
    """
    with _channel(endpoint) as channel:
        grant = rpc.LeaseStub(channel).LeaseGrant(rpc.LeaseGrantRequest(TTL=LEASE_TTL))
        puts = [
            rpc.RequestOp(
                request_put=rpc.PutRequest(key=_key(prefix, peer), value=encode_attrs(peer.attrs), lease=grant.ID)
            )
            for peer in peers
        ]
        return _transact(channel, puts)


def delete_all(endpoint: str, prefix: str, peers: Sequence[Lease]) -> tuple[float, float]:
    """Delete the leases; returns as `put_all` does."""
    with _channel(endpoint) as channel:
        keys = [_key(prefix, peer) for peer in peers]
        deletes = [rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=key)) for key in keys]
        return _transact(channel, deletes)


def _transact(channel: grpc.Channel, operations: Sequence[rpc.RequestOp]) -> tuple[float, float]:
    requests = [
        rpc.TxnRequest(success=operations[start : start + TXN_PUTS]) for start in range(0, len(operations), TXN_PUTS)
    ]
    kv = rpc.KVStub(channel)
    started = time.monotonic()
    for request in requests:
        kv.Txn(request)
    return started, time.monotonic()


def _channel(endpoint: str) -> grpc.Channel:
    return grpc.insecure_channel(endpoint.replace("unix://", "unix:"))


def _key(prefix: str, peer: Lease) -> bytes:
    return f"{prefix}/subnets/{peer.key}".encode()


def here(device: int, *, nexthops: bool = True) -> Here:
    """A host with one VXLAN device, of this interface index, and no guard."""
    offset = NEXTHOP_BASE - NETWORK.first if nexthops else None
    return Here((NETWORK,), {4: device}, 0, (), 1450, offset, listed=False)


def entries(peers: Sequence[Lease], device: int, *, nexthops: bool) -> list[Entry]:
    """What the kernel should hold for them, in build order. `device` is the interface index of the VXLAN device."""
    host = here(device, nexthops=nexthops)
    return sorted(
        (entry for peer in peers for entry in BACKEND.entries(peer, host)),
        key=lambda entry: BUILD_ORDER.index(type(entry)),
    )


def bridge_commands(peers: Sequence[Lease], device: int) -> Iterator[str]:
    """Lines for `bridge -batch`: the FDB entries."""
    for entry in entries(peers, device, nexthops=False):
        if isinstance(entry, Fdb):
            remote = format_address(entry.remote)
            yield f"fdb replace {format_mac(entry.at[1])} dev {DEVICE} dst {remote} self permanent\n"


def ip_commands(peers: Sequence[Lease], device: int, *, nexthops: bool) -> Iterator[str]:
    """Lines for `ip -batch`: neighbours and routes, with `nexthops` through nexthop objects."""
    for entry in entries(peers, device, nexthops=nexthops):
        match entry:
            case NextHop():
                yield f"nexthop replace id {entry.id} via {format_address(entry.gateway)} dev {DEVICE} onlink\n"
            case Route() if nexthops:
                yield f"route replace {entry.destination} nhid {entry.nexthop}\n"
            case Route():
                yield f"route replace {entry.destination} via {format_address(entry.gateway)} dev {DEVICE} onlink\n"
            case Fdb():
                pass
            case Neighbour():
                address, mac = format_address(entry.at[1]), format_mac(entry.mac)
                yield f"neigh replace {address} lladdr {mac} dev {DEVICE} nud permanent\n"

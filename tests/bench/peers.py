"""The synthetic cluster: leases as other hosts' agents write them, and what each rival needs to program them.

The overlay is 10.0.0.0/8 with one /24 for each host, as flannel hands them out from the start of the network. The hosts
live in 172.16.0.0/12: this one first, then etcd's, then the peers.
"""

import random
from collections.abc import Iterator, Sequence

import grpc
from etcd3 import etcdrpc as rpc

from overlay.desired import Local, entries_for
from overlay.model import BUILD_ORDER, Entry, Fdb, NextHop, Route
from subnet_lease.model import Lease, LeaseAttrs, Prefix, Vtep, encode_attrs, format_address, format_mac, subnet_key

NETWORK = Prefix.parse("10.0.0.0/8")
UNDERLAY = Prefix.parse("172.16.0.0/12")
CONFIG = b'{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}'
DEVICE = "flannel.1"
OWN_IP = format_address(UNDERLAY.host(1))
ETCD_IP = format_address(UNDERLAY.host(2))
ETCD_ENDPOINT = f"http://{ETCD_IP}:2379"

TXN_PUTS = 128
"""etcd's default limit of operations in one transaction (--max-txn-ops)."""

LEASE_TTL = 86400


def leases(count: int) -> list[Lease]:
    """The first `count` peers; the same on every call."""
    dice = random.Random(count)
    found = []
    for number in range(1, count + 1):
        # As flannel makes them: random, locally administered, of one device.
        mac = bytes([dice.randrange(256) & 0xFE | 0x02]) + dice.randbytes(5)
        extra = {"MTU": 1450, "NodeName": f"node-{number}", "AgentVersion": "0.1.0"}
        attrs = LeaseAttrs(UNDERLAY.host(256 + number), "vxlan", Vtep(1, mac), extra=extra)
        found.append(Lease(Prefix(NETWORK.host(number << 8), 24), None, attrs, 0, 0, 0))
    return found


def load(endpoint: str, prefix: str, peers: Sequence[Lease]) -> None:
    """Write the network configuration and the leases below `prefix`, all on one etcd lease."""
    with grpc.insecure_channel(endpoint.replace("unix://", "unix:")) as channel:
        grant = rpc.LeaseStub(channel).LeaseGrant(rpc.LeaseGrantRequest(TTL=LEASE_TTL))
        puts = [rpc.PutRequest(key=f"{prefix}/config".encode(), value=CONFIG)]
        for peer in peers:
            key = f"{prefix}/subnets/{subnet_key(peer.subnet)}".encode()
            puts.append(rpc.PutRequest(key=key, value=encode_attrs(peer.attrs), lease=grant.ID))
        kv = rpc.KVStub(channel)
        for start in range(0, len(puts), TXN_PUTS):
            operations = [rpc.RequestOp(request_put=put) for put in puts[start : start + TXN_PUTS]]
            kv.Txn(rpc.TxnRequest(success=operations))


def entries(peers: Sequence[Lease], device: int, *, nexthops: bool) -> list[Entry]:
    """What the kernel should hold for them, in build order. `device` is the interface index of the VXLAN device."""
    local = Local(NETWORK, device, nexthops)
    return sorted((entry for peer in peers for entry in entries_for(peer, local)), key=lambda entry: BUILD_ORDER.index(type(entry)))


def bridge_commands(peers: Sequence[Lease], device: int) -> Iterator[str]:
    """Lines for `bridge -batch`: the FDB entries."""
    for entry in entries(peers, device, nexthops=False):
        if isinstance(entry, Fdb):
            remote = format_address(entry.remote)
            yield f"fdb replace {format_mac(entry.mac)} dev {DEVICE} dst {remote} self permanent\n"


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
            case _:
                address, mac = format_address(entry.address), format_mac(entry.mac)
                yield f"neigh replace {address} lladdr {mac} dev {DEVICE} nud permanent\n"

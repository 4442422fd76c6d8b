"""Facts of an agent in order, for tests of what `status` makes of them."""

import dataclasses
import json
from collections.abc import Callable, Set

from overlay import status as view
from overlay.checksums import Finding, Verdict
from overlay.device import FoundDevice, Underlay
from overlay.model import Entry, Fdb, Guard, Key, Neighbour, NextHop, Route
from overlay.probe import Path, Target
from subnet_lease.model import Lease, LeaseAttrs, NetworkConfig, Prefix, Vtep

CONFIG = NetworkConfig.parse(b'{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}')
HOST_GW = NetworkConfig.parse(b'{"Network":"10.0.0.0/8","Backend":{"Type":"host-gw"}}')
LOCAL = bytes((172, 30, 0, 200))
DEVICE = FoundDevice(
    3, "flannel.1", "vxlan", b"\2\0\0\0\0\1", 1450, True, "overlay-agent", 1, 8472, 2, LOCAL,
    addresses=(Prefix.parse("10.0.200.0/32"),),
)  # fmt: skip


def lease(number: int, name: str = "", etcd_lease: int = 1) -> Lease:
    attrs = LeaseAttrs(bytes((172, 30, 0, number)), "vxlan", Vtep(1, mac(number)), mtu=1450, node_name=name)
    return Lease(Prefix.parse(f"10.0.{number}.0/24"), None, attrs, etcd_lease, number, number)


def mac(number: int) -> bytes:
    return bytes((2, 0, 0, 0, 0, number))


def entries(each: Lease) -> tuple[Entry, ...]:
    assert each.subnet and each.attrs.public_ip and each.attrs.vtep
    base, device, remote = each.subnet.base, DEVICE.index, each.attrs.public_ip
    hop = NextHop(0x6F000000 + each.subnet.first - 0x0A000000, base, device)
    vtep = each.attrs.vtep.mac
    return Guard(remote), Fdb((device, vtep), remote), Neighbour((device, base), vtep), hop, Route(each.subnet, hop.id)


def standings(
    *leases: Lease,
    gap: dict[Key, Entry | None] | None = None,
    unreachable: Set[str] = frozenset(),
    path: Callable[[str], view.PathPart | None] | None = None,
) -> list[view.Standing]:
    wanted = {each.key: entries(each) for each in leases}
    return view.standings([(each.key, each) for each in leases], wanted, unreachable, gap or {}, path=path)


FACTS = view.Facts(
    problems=(),
    agent={"version": "1.2.3", "pid": 47, "node_name": "h1", "running_s": 75.0, "ready": True, "trouble": ""},
    lease=lease(200),
    lease_left=86400.0,
    config=CONFIG,
    nexthops=True,
    mtu=1450,
    devices=[("flannel.1", DEVICE)],
    checksums={"flannel.1": Finding(Verdict.HEALTHY, LOCAL)},
    underlay=Underlay("eth0", 2, 1500, (LOCAL,), (), (), "the default route's", "eth1"),
    etcd={"connected": True, "data_age_s": 0.0, "revision": 812, "reason": None},
    dataplane={
        "wanted": 10,
        "missing": 0,
        "surplus": 0,
        "drift": 2,
        "last_pass_ago_s": 3.0,
        "last_change": {"ago_s": 34.0, "took_ms": 1.2, "put": 5, "dropped": 0, "refused": 0},
    },
    rejected=(),
    rejected_count=0,
    firewall={"guard": "on", "strangers": 3, "impostors": 0, "strays": 0},
    refused=(),
    peers=view.counts(standings(lease(1), lease(2))),
)


def document(peers: list[view.Standing] | None = None, most: int | None = None, **changes: object) -> view.Document:
    """As a client gets it, of these peers: two in order, if nothing else is said."""
    peers = standings(lease(1), lease(2)) if peers is None else peers
    facts = dataclasses.replace(FACTS, peers=view.counts(peers), **changes)
    rows = view.peer_rows(view.chosen(peers, most), lambda revision: None)
    found: view.Document = json.loads("".join(view.pieces(view.head(facts), rows)))
    return found


def path_to(number: int, cause: str, *, direct: bool = False, mtu: int = 0) -> Path:
    """What was measured of the way to the host of 10.0.`number`.0/24."""
    subnet = Prefix.parse(f"10.0.{number}.0/24")
    target = Target(
        f"10.0.{number}.0-24", (subnet,), bytes(4), subnet.base, bytes((172, 16, 0, number)), 3, direct, 1450
    )
    seen = (f"{number} is silent",)
    return Path(target, not cause, 0.001, 0.002, 0.25, mtu, None, 5.0, 0, cause, seen if cause else (), 1.0, 9.0)

"""The composition root: what it decides by itself."""

import contextlib

import agent
from overlay.options import EtcdOptions

MEMBERS = tuple(f"http://10.0.0.{n}:2379" for n in (11, 12, 13))


def test_hosts_begin_with_different_members_and_know_all() -> None:
    orders = set()
    for _ in range(200):
        with contextlib.closing(agent._store(EtcdOptions(etcd_endpoints=MEMBERS))) as store:
            orders.add(store._endpoints)
    assert {order[0] for order in orders} == set(MEMBERS)
    assert all(sorted(order) == sorted(MEMBERS) for order in orders)

"""Agents that go without nexthop objects, as on kernels before 5.3: their routes name the gateways themselves.

For a run in which all labs' agents are told so (`LAB_AGENT_OPTIONS` in tests/conftest.py); by its name not collected
unless it is asked for.
"""

import signal
from collections.abc import Callable

from overlay.cluster import Lab, wait_until
from tests.netns.test_overlay import all_answer, entries, events, put_peer


def kinds(held: dict[str, list[str]]) -> dict[str, int]:
    return {kind: len(found) for kind, found in held.items()}


def test_pods_reach_each_other_over_routes_with_gateways(shared_lab: Lab) -> None:
    assert all_answer(shared_lab)
    for host in shared_lab.hosts:
        assert kinds(entries(host)) == {"route": 2, "neighbour": 2, "nexthop": 0, "fdb": 2}
        for route in host.json("ip", "route", "show", "dev", "flannel.1"):
            assert (route["gateway"], route["protocol"]) == (route["dst"].removesuffix("/24"), "111")


def test_peer_comes_and_goes_and_its_route_comes_back_if_removed(shared_lab: Lab) -> None:
    h1 = shared_lab.hosts[0]
    before = entries(h1)
    key = put_peer(shared_lab, 250)
    wait_until(lambda: "10.244.250.0/24" in entries(h1)["route"], 10, "a route to the new peer")
    held = entries(h1)
    h1.ip("route del 10.244.250.0/24")
    wait_until(lambda: entries(h1) == held, 10, "the route again")
    (record,) = (record for record in shared_lab.store.snapshot().records if record.key == key)
    assert shared_lab.store.delete(key, record.mod_revision)
    wait_until(lambda: entries(h1) == before, 10, "no trace of the peer")


def test_restarted_agents_write_nothing(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(hosts=2, pods=1)
    lab.up()
    passes = {host.name: len(events(host, "reconciled")) for host in lab.hosts}
    for host in lab.hosts:
        host.kill_agent(signal.SIGKILL)
        host.start_agent()
        host.wait_ready()
        assert events(host, "reconciled")[passes[host.name] :] == []
    assert all_answer(lab)

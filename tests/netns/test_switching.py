"""The operator changes backend, VNI or port and restarts all agents: nothing of what was is left on any host."""

import pytest

from overlay.cluster import Lab
from overlay.topology import network_config
from tests.conftest import MakeLab
from tests.netns.moves import SWITCHES, failures, own_devices, switch, wait_settled


def ports(lab: Lab) -> set[int]:
    """The UDP ports of all tunnels."""
    return {link["linkinfo"]["info_data"]["port"] for host in lab.hosts for link in own_devices(host).values()}


@pytest.mark.parametrize("families", ["4", "46"])
def test_switched_cluster_has_nothing_left_of_what_it_was(make_lab: MakeLab, families: str) -> None:
    lab = make_lab(hosts=3, pods=1, underlay=families, config=network_config(families))
    lab.up()
    subnets = [host.subnets for host in lab.hosts]
    for name, kind, backend in SWITCHES:
        switch(lab, families, backend)
        wait_settled(lab, kind)
        assert ports(lab) <= {backend.get("Port", 8472)}, name
        if kind != "alloc":
            # Pods made from now on have the MTU of the new way.
            for host in lab.hosts:
                host.attach_pods()
            assert failures(lab.pods) == [], name
    assert [host.subnets for host in lab.hosts] == subnets

"""IPv6 pods over every underlay and backend: see `matrix`."""

import pytest

from tests.netns.matrix import Cluster, cases


@pytest.mark.parametrize(("cluster", "backend", "ip_masq"), cases("6"), indirect=["cluster"])
def test_ipv6_pods_reach_one_another(cluster: Cluster, backend: str, ip_masq: bool) -> None:
    if cluster.possible(backend):
        cluster.switch(backend, ip_masq)
        cluster.check(ip_masq)
    else:
        assert all("host-gw" in said for said in cluster.refusals(backend, ip_masq))

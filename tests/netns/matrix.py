"""Every address family of pods and of hosts, every way to a peer, with and without masquerading: the cases, one check.

There is one lab for each pair of families. It is switched from case to case, by what each switch takes: a running agent
takes over `DirectRouting`, another backend or masquerading is for a start.
"""

from typing import Any

import pytest

from overlay.cluster_hosts import Host, LabError, wait_until
from overlay.topology import BACKENDS, FAMILIES, network_config
from subnet_lease.model import Prefix
from tests.conftest import MakeLab
from tests.netns.traffic import all_to_all, exchange, fragments_made, sender_seen

_LIVE = {"vxlan", "direct"}
"""Backends among which running agents change over."""


def cases(overlay: str) -> list[Any]:
    """Parameters (cluster, backend, ip_masq) for pods of these families, in an order that takes few restarts."""
    found = []
    for underlay in FAMILIES:
        families = overlay, underlay  # One object: pytest makes a fixture anew for another, be it equal.
        for backend, ip_masq in (
            ("vxlan", False),
            ("direct", False),
            ("direct", True),
            ("vxlan", True),
            ("host-gw", True),
            ("host-gw", False),
        ):
            name = f"{overlay} over {underlay}-{backend}-{'masquerade' if ip_masq else 'plain'}"
            found.append(pytest.param(families, backend, ip_masq, id=name))
    return found


class Cluster:
    """A lab whose pods have the families `overlay`, its hosts `underlay`. Nothing is up before the first switch."""

    def __init__(self, make_lab: MakeLab, overlay: str, underlay: str) -> None:
        self.lab = make_lab(hosts=3, pods=2, underlay=underlay)
        self._overlay, self._underlay = FAMILIES[overlay], FAMILIES[underlay]
        self._config = {backend: network_config(overlay, backend) for backend in BACKENDS}
        self._running: tuple[str, bool] | None = None

    def possible(self, backend: str) -> bool:
        """A route over IPv6 has no IPv4 gateway, so without a tunnel IPv6 pods need an IPv6 underlay."""
        return backend != "host-gw" or 6 not in self._overlay or 6 in self._underlay

    def switch(self, backend: str, ip_masq: bool) -> None:
        """To another case; done once every kernel reaches every subnet by the way that the backend calls for."""
        if self._running is None or self._running[1] != ip_masq or not {self._running[0], backend} <= _LIVE:
            self._restart(backend, ip_masq)
            for host in self.lab.hosts:
                host.wait_ready()
                host.attach_pods()
        else:
            self.lab.reconfigure(self._config[backend])
        self._running = backend, ip_masq
        wait_until(lambda: all(map(self._by_its_way, self.lab.hosts)), 30, f"the way of {backend} to all peers")

    def refusals(self, backend: str, ip_masq: bool) -> list[str]:
        """What the agents say, one by one, that are started for this case and end."""
        self._restart(backend, ip_masq)
        said = []
        for host in self.lab.hosts:
            with pytest.raises(LabError, match="has ended before it was ready") as refusal:
                host.wait_ready()
            said.append(str(refusal.value))
        return said

    def check(self, ip_masq: bool) -> None:
        """Everything gets through, whole and unaltered, and the world sees the senders it shall see."""
        hosts = self.lab.hosts
        before = [fragments_made(host) for host in hosts]
        assert exchange(all_to_all(self.lab.pods, sizes=["small", "full"])) == []
        # A packet as large as the pods' MTU fits into the tunnel. (Fragments of theirs are put together for the
        # masquerading, and cut again.)
        assert [fragments_made(host) for host in hosts] == before
        assert exchange(all_to_all(self.lab.pods, sizes=["oversized"])) == []
        for host in hosts:
            for family in set(self._overlay) & set(self._underlay):
                own = host.underlay_ips if ip_masq else host.pods[0].addresses
                assert sender_seen(host.pods[0], family) == own[family]

    def _restart(self, backend: str, ip_masq: bool) -> None:
        if not self.lab.hub.exists:
            self.lab.make_network()
            self.lab.start_etcd()
        self._running = None
        for host in self.lab.hosts:
            if host.agent_pid is not None:
                host.kill_agent()
        self.lab.write_config(self._config[backend])
        for host in self.lab.hosts:
            host.start_agent(*(["--ip-masq"] if ip_masq else []))

    def _by_its_way(self, host: Host) -> bool:
        """Whether the host reaches every subnet, each by the way that it shall."""
        peers = host.peers(self.lab.leases())
        right = [peer.programmed and peer.direct == self._direct(peer.subnet) for peer in peers]
        return len(right) == len(self._overlay) * (len(self.lab.hosts) - 1) and all(right)

    def _direct(self, subnet: Prefix) -> bool:
        backend = self._running[0] if self._running else ""
        ipv4 = len(subnet.base) == 4
        return backend == "host-gw" or (backend == "direct" and (ipv4 or 6 in self._underlay))

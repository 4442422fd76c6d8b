"""Two hosts of an overlay without agents: device and entries as agents make them, in namespaces of a test's own.

Number 1 and 2: 192.0.2.N on the underlay's `eth0`; 10.9.N.0 and fd09:0:0:N:: on `flannel.1`, with routes to the other's
pods, 10.9.N.0/24 and fd09:0:0:N::/64.
"""

import contextlib
import os
from collections.abc import Iterator

from tests.netns.namespace import entered, ip, new_namespace, sh

MTU = 1450


@contextlib.contextmanager
def two_hosts(here: int, *, ends: tuple[str, str] | None = None) -> Iterator[tuple[int, int]]:
    """Descriptors of their namespaces. Their `eth0` are the ends of one veth pair.

    With `ends` each is a pair of its own, whose other ends have these names in the namespace `here`, the caller's:
    whatever is to connect them is made there.
    """
    with new_namespace() as near, entered(here), new_namespace() as far, entered(here):
        targets = tuple(f"/proc/{os.getpid()}/fd/{namespace}" for namespace in (near, far))
        if ends:
            for end, target in zip(ends, targets, strict=True):
                ip(f"link add {end} type veth peer name eth0 netns {target}")
                ip(f"link set {end} up")
        else:
            ip(f"link add eth0 netns {targets[0]} type veth peer name eth0 netns {targets[1]}")
        for namespace, number, peer in ((near, 1, 2), (far, 2, 1)):
            with entered(namespace):
                _furnish(number, peer)
        yield near, far


def _furnish(number: int, peer: int) -> None:
    ip(f"addr add 192.0.2.{number}/24 dev eth0")
    ip("link set eth0 up")
    ip(
        f"link add flannel.1 address 02:00:00:00:01:0{number} mtu {MTU} type vxlan id 1 dev eth0 "
        f"local 192.0.2.{number} dstport 8472 nolearning"
    )
    ip(f"addr add 10.9.{number}.0/32 dev flannel.1")
    ip(f"addr add fd09:0:0:{number}::/128 dev flannel.1 nodad")
    ip("link set flannel.1 up")
    sh("bridge", *f"fdb add 02:00:00:00:01:0{peer} dev flannel.1 dst 192.0.2.{peer} self permanent".split())
    for address, block in ((f"10.9.{peer}.0", f"10.9.{peer}.0/24"), (f"fd09:0:0:{peer}::", f"fd09:0:0:{peer}::/64")):
        ip(f"neigh add {address} lladdr 02:00:00:00:01:0{peer} dev flannel.1 nud permanent")
        ip(f"route add {block} via {address} dev flannel.1 onlink")

"""What a host says of itself: addresses, MACs that it keeps for life, MTU."""

import pytest

from overlay.backends import V4, V6
from overlay.device import Underlay, derived_mac
from overlay.netconf import usable
from overlay.presence import Presence
from subnet_lease.model import Lease, LeaseAttrs, Prefix, Vtep, pack_address

ADDRESSES = {V4: pack_address("192.168.0.5"), V6: pack_address("2001:db8::5")}
PUBLIC = {V4: pack_address("203.0.113.5"), V6: pack_address("2001:db8:ffff::5")}
KEPT, FOUND = b"\2\0\0\0\0\1", b"\2\0\0\0\0\2"


def presence(
    families: tuple[int, ...] = (V4,),
    *,
    backend: str = '"Type":"vxlan"',
    public: tuple[int, ...] = (),
    macs: dict[int, bytes] | None = None,
) -> Presence:
    config = usable(f'{{"Network":"10.0.0.0/8","Backend":{{{backend}}}}}'.encode())
    underlay = Underlay("eth0", 2, 1500, tuple(ADDRESSES[each] for each in families), (), (), "test")
    about = {"AgentVersion": "1"}
    return Presence(config, underlay, tuple(PUBLIC[each] for each in public), macs or {}, "machine", "n1", about)


def lease(**attrs: object) -> Lease:
    made = LeaseAttrs(ADDRESSES[V4], "vxlan", None)._replace(**attrs)
    return Lease(Prefix.parse("10.0.5.0/24"), None, made, 1, 1, 1)


@pytest.mark.parametrize("families", [(V4,), (V6,), (V4, V6)])
def test_host_states_what_its_underlay_has(families: tuple[int, ...]) -> None:
    attrs = presence(families).attrs(None)
    assert (attrs.public_ip, attrs.public_ip6) == tuple(
        ADDRESSES[each] if each in families else None for each in (V4, V6)
    )
    assert (attrs.vtep is not None, attrs.vtep6 is not None) == (V4 in families, V6 in families)
    assert (attrs.backend_type, attrs.mtu) == ("vxlan", 1430 if V6 in families else 1450)
    assert (attrs.node_name, attrs.extra) == ("n1", {"AgentVersion": "1"})


@pytest.mark.parametrize(
    ("families", "public", "stated"),
    [
        ((V4,), (V4,), (PUBLIC[V4], None)),
        ((V4,), (V6,), (ADDRESSES[V4], None)),
        ((V4, V6), (V6,), (ADDRESSES[V4], PUBLIC[V6])),
        ((V4, V6), (V4, V6), (PUBLIC[V4], PUBLIC[V6])),
    ],
)
def test_public_address_takes_the_place_of_one_that_the_underlay_has(
    families: tuple[int, ...], public: tuple[int, ...], stated: tuple[bytes, bytes | None]
) -> None:
    made = presence(families, public=public)
    assert (made.address(V4), made.address(V6)) == stated
    attrs = made.attrs(None)
    assert (attrs.public_ip, attrs.public_ip6) == stated


@pytest.mark.parametrize(
    ("previous", "macs", "expected"),
    [
        (None, {}, derived_mac("machine", "192.168.0.5", "1")),
        (None, {V4: FOUND}, FOUND),
        (lease(), {V4: FOUND}, FOUND),
        (lease(vtep=Vtep(1, KEPT)), {V4: FOUND}, KEPT),
        (lease(vtep=Vtep(7, KEPT)), {}, KEPT),
        (lease(vtep=Vtep(1, bytes(6))), {V4: FOUND}, FOUND),
        (lease(vtep=Vtep(1, b"\1\0\0\0\0\1")), {V6: FOUND}, derived_mac("machine", "192.168.0.5", "1")),
    ],
    ids=["derived", "its device's", "no VTEP in the lease", "its lease's", "another VNI", "no MAC", "a group's MAC"],
)
def test_host_keeps_its_mac(previous: Lease | None, macs: dict[int, bytes], expected: bytes) -> None:
    assert presence(macs=macs).attrs(previous).vtep == Vtep(1, expected)


def test_macs_of_both_devices_differ_and_stay_the_same() -> None:
    first, again = (presence((V4, V6)).attrs(None) for _ in range(2))
    assert first.vtep and first.vtep6 and first.vtep.mac != first.vtep6.mac
    assert (first.vtep, first.vtep6) == (again.vtep, again.vtep6)
    kept = presence((V4, V6)).attrs(lease(vtep6=Vtep(1, KEPT)))
    assert (kept.vtep, kept.vtep6) == (first.vtep, Vtep(1, KEPT))


def test_backend_without_tunnels_states_no_vtep_and_the_links_own_mtu() -> None:
    attrs = presence((V4, V6), backend='"Type":"host-gw"', macs={V4: FOUND}).attrs(lease(vtep=Vtep(1, KEPT)))
    assert (attrs.vtep, attrs.vtep6, attrs.mtu, attrs.backend_type) == (None, None, 1500, "host-gw")

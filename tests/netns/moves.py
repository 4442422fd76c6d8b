"""What can happen to a host's network while it is at work; and whether every host has followed, with nothing left over.

For the tests, which want it followed, and for the benchmark, which wants to know how long flows stop. A move does what
an operator or a network manager would, with `ip`, and keeps the host's `seat` true.
"""

import dataclasses
import ipaddress
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from overlay.cluster import Lab
from overlay.cluster_hosts import Host, LabError, Pod, addresses_of, macs_of, wait_until
from overlay.firewall import SETS
from overlay.topology import BACKENDS, LINKS, Link, Seat, Topology, address_lines, network_config
from subnet_lease.model import Lease
from tests.netns.traffic import all_to_all, exchange

OWN_PROTOCOL = "111"
"""What routes and nexthop objects of agents bear (docs/wire-contract.md)."""

SECOND = "eth1"

FLAPS, FLAPS_S = 10, 1.0


class Move(NamedTuple):
    """Something that happens to a host, by a name for people; `act` returns when it is done, followed or not.

    `harmless`: nothing that flows is to notice. `rebuilds`: the tunnels' devices go with it, and are made anew.
    """

    name: str
    act: Callable[[Host], None]
    harmless: bool = False
    rebuilds: bool = False


def moves_of(families: Sequence[int], backend: str) -> list[Move]:
    """What can happen to the first host of a lab in `topology_of`, one after the other, in this order."""
    found = [
        Move("same addresses renewed", renew_addresses, harmless=True),
        Move("addresses replaced", partial(replace_addresses, number=81)),
        Move("second addresses added", partial(add_addresses, number=82), harmless=True),
        Move("first addresses removed", partial(remove_first_addresses, number=82)),
        Move("MTU lowered to 1400", partial(set_mtu, mtu=1400), harmless=True),
        Move("MTU raised to 1500", partial(set_mtu, mtu=1500), harmless=True),
        Move("switch port down and up", lose_carrier),
        Move("link down and up", down_and_up),
        Move(f"link down and up {FLAPS} times in {FLAPS_S:g} s", flap),
        Move("interface renamed", partial(rename, name="net9")),
        Move("interface deleted and made again", delete_and_make_again, rebuilds=True),
    ]
    if len(families) > 1:
        found += [
            Move(f"IPv{family} address replaced", partial(replace_addresses, number=80 + family, families=[family]))
            for family in families
        ]
    if backend != "host-gw":
        # The second interface is beyond the router, where host-gw reaches nobody.
        found += [
            Move("second interface added", partial(plug_in_second, link=LINKS[1], number=85), harmless=True),
            Move("default route moved there", partial(move_default, device=SECOND, link=LINKS[1], number=85)),
        ]
    return found


def topology_of(underlay: str, backend: str) -> Topology:
    """Three hosts, the third beyond a router unless the backend needs all on one link."""
    return Topology(underlay, beyond=() if backend == "host-gw" else ("h3",))


# --- addresses ---------------------------------------------------------------------------------------------------


def _default_lines(seat: Seat) -> list[str]:
    """The default routes, which go with the last address, or with the link's state."""
    return [f"route replace default via {seat.link.hub[family].ip} dev {seat.device}" for family in seat.addresses]


def _moved(host: Host, **what: Any) -> None:
    host.seat = dataclasses.replace(host.seat, **what)


def _add_lines(seat: Seat) -> list[str]:
    nodad = {4: "", 6: " nodad"}
    return [f"addr add {address} dev {seat.device}{nodad[family]}" for family, address in seat.addresses.items()]


def _delete_lines(seat: Seat) -> list[str]:
    return [f"addr del {address} dev {seat.device}" for address in seat.addresses.values()]


def _other_addresses(host: Host, number: int, families: Sequence[int] = (4, 6)) -> dict[int, Any]:
    return {
        family: host.seat.link.address(number, family) if family in families else address
        for family, address in host.seat.addresses.items()
    }


def replace_addresses(host: Host, number: int, families: Sequence[int] = (4, 6)) -> None:
    """Those of these families go, and those that host `number` would have come."""
    before = host.seat
    _moved(host, addresses=_other_addresses(host, number, families))
    gone = {f: a for f, a in before.addresses.items() if f in families}
    come = {f: a for f, a in host.seat.addresses.items() if f in families}
    host.ip(
        *_delete_lines(dataclasses.replace(before, addresses=gone)),
        *_add_lines(dataclasses.replace(host.seat, addresses=come)),
        *_default_lines(host.seat),
    )


def add_addresses(host: Host, number: int) -> None:
    """Second ones, which host `number` would have. The first stay those in use."""
    host.ip(*_add_lines(dataclasses.replace(host.seat, addresses=_other_addresses(host, number))))


def remove_first_addresses(host: Host, number: int) -> None:
    """The second, made by `add_addresses`, remain."""
    gone = _delete_lines(host.seat)
    _moved(host, addresses=_other_addresses(host, number))
    # Otherwise the kernel removes secondary addresses with their primary; systemd sets it on every host.
    host.run("sysctl", "-qw", f"net.ipv4.conf.{host.seat.device}.promote_secondaries=1")
    host.ip(*gone, *_default_lines(host.seat))


def renew_addresses(host: Host) -> None:
    """As a DHCP client does: the same addresses, with another time to live."""
    host.ip(
        *(
            f"addr replace {a} dev {host.seat.device} valid_lft 3600 preferred_lft 3600"
            for a in host.seat.addresses.values()
        )
    )


# --- links -------------------------------------------------------------------------------------------------------


def _up_lines(seat: Seat) -> list[str]:
    """What a network manager sets again after a link was down: the kernel forgets IPv6 addresses and default routes."""
    lines = [f"link set {seat.device} up"]
    if (address := seat.addresses.get(6)) is not None:
        lines += [
            f"addr replace fe80::{str(address.ip).rpartition(':')[2]}/64 dev {seat.device} nodad",
            f"addr replace {address} dev {seat.device} nodad",
        ]
    return lines + _default_lines(seat)


def down_and_up(host: Host) -> None:
    """At once, so that it is the recovery that takes time."""
    host.ip(f"link set {host.seat.device} down", *_up_lines(host.seat))


def flap(host: Host) -> None:
    """Down and up FLAPS times in FLAPS_S seconds."""
    begun = time.monotonic()
    for number in range(FLAPS):
        time.sleep(max(0.0, begun + number * FLAPS_S / FLAPS - time.monotonic()))
        down_and_up(host)


def lose_carrier(host: Host) -> None:
    """The switch's port goes down and up."""
    host.lab.hub.ip(f"link set {host.name} down", f"link set {host.name} up")


def set_mtu(host: Host, mtu: int) -> None:
    """Of the underlay's interface, in bytes."""
    host.ip(f"link set {host.seat.device} mtu {mtu}")


def rename(host: Host, name: str) -> None:
    """The underlay's interface, which takes a down and up."""
    before = host.seat.device
    _moved(host, device=name)
    host.ip(f"link set {before} down", f"link set {before} name {name}", *_up_lines(host.seat))


def delete_and_make_again(host: Host) -> None:
    """The underlay's interface: the next has another index. It is called `eth0` then."""
    host.ip(f"link del {host.seat.device}")
    _moved(host, device="eth0")
    host.lab.hub.ip(*host.seat.hub_lines(host.netns))
    host.ip(*host.seat.host_lines([]))


def plug_in_second(host: Host, link: Link, number: int) -> None:
    """A second interface, on `link`, with the addresses that host `number` has there. No default route is there yet."""
    seat = dataclasses.replace(
        host.seat,
        name=f"{host.name}b",
        link=link,
        device=SECOND,
        mac="02:" + host.seat.mac[3:-2] + f"{number:02x}",
        addresses={family: link.address(number, family) for family in host.seat.addresses},
    )
    host.lab.hub.ip(
        f"link add {seat.name} mtu {seat.mtu} type veth peer name {SECOND} mtu {seat.mtu} address {seat.mac} "
        f"netns {host.netns}",
        f"link set {seat.name} master {link.bridge} up",
    )
    host.ip(*address_lines(SECOND, seat.addresses), f"link set {SECOND} up")


def move_default(host: Host, device: str, link: Link, number: int) -> None:
    """The default routes, to `device`, where the host has the addresses of host `number` on `link`."""
    _moved(
        host,
        device=device,
        link=link,
        addresses={family: link.address(number, family) for family in host.seat.addresses},
    )
    host.ip(*_default_lines(host.seat))


# --- the whole cluster -------------------------------------------------------------------------------------------


class Switch(NamedTuple):
    """To another `Backend` of the network configuration, `name` to people; by its `kind` the checks know it."""

    name: str
    kind: str
    backend: Mapping[str, Any]


_VXLAN = BACKENDS["vxlan"]
_DIRECT = BACKENDS["direct"]

SWITCHES = (
    Switch("vxlan to host-gw", "host-gw", BACKENDS["host-gw"]),
    Switch("host-gw to vxlan", "vxlan", _VXLAN),
    Switch("vxlan to DirectRouting", "direct", _DIRECT),
    Switch("DirectRouting to alloc", "alloc", {"Type": "alloc"}),
    Switch("alloc to DirectRouting", "direct", _DIRECT),
    Switch("DirectRouting to host-gw", "host-gw", BACKENDS["host-gw"]),
    Switch("host-gw to DirectRouting", "direct", _DIRECT),
    Switch("DirectRouting to vxlan with VNI 7", "vxlan", {**_VXLAN, "VNI": 7}),
    Switch("Port 8472 to 4789", "vxlan", {**_VXLAN, "VNI": 7, "Port": 4789}),
    Switch("VNI 7 to 1", "vxlan", {**_VXLAN, "Port": 4789}),
    Switch("Port 4789 to 8472", "vxlan", _VXLAN),
)
"""Each from the one before, the first from `vxlan`, where the last ends."""


def switch(lab: Lab, overlay: str, backend: Mapping[str, Any]) -> None:
    """As the operator switches a cluster over: the new configuration is written, all agents are restarted at once."""
    lab.write_config({**network_config(overlay), "Backend": dict(backend)})
    for host in lab.hosts:
        host.kill_agent()
    for host in lab.hosts:
        host.start_agent()
    for host in lab.hosts:
        host.wait_ready()


# --- whether all have followed ----------------------------------------------------------------------------------


def wait_settled(lab: Lab, backend: str, seconds: float = 20) -> None:
    """Until every lease says where its host is, every kernel holds what the leases call for and nothing else of the
    agents', and packets pass on all ways. AssertionError with what is not so after `seconds`."""
    found: list[str] = []

    def right() -> bool:
        found[:] = troubles(lab, backend)
        return not found

    # The kernel asks for a neighbour once a second, and a switch's port that came up may lose the first question.
    flows = all_to_all(lab.pods, ["icmp"], ["small"]) if backend != "alloc" else []

    def flowing() -> bool:
        found[:] = exchange(flows, 0.5)
        return not found

    try:
        wait_until(right, seconds)
        wait_until(flowing, seconds)
    except LabError:
        raise AssertionError("; ".join(found)) from None


def failures(pods: Sequence[Pod]) -> list[str]:
    """What does not get through between all pods, once their kernels have been told what fits."""
    for pod in pods:
        # What fitted before is remembered for ten minutes (net.ipv4.route.mtu_expires).
        pod.run("ip", "route", "flush", "cache")
        pod.run("ip", "-6", "route", "flush", "cache")
    # Packets of IPv6 are cut by their senders alone, who had to be told first.
    exchange(all_to_all(pods, ["icmp"], ["oversized"]), 0.5)
    return exchange(all_to_all(pods))


def troubles(lab: Lab, backend: str) -> list[str]:
    """What is not as it should be, of the leases and of every host's kernel. `backend` is a key of `BACKENDS`, or
    `alloc`."""
    leases = lab.leases()
    found = []
    for host in lab.hosts:
        own = [lease for lease in leases if host.holds(lease)]
        addresses = set(host.underlay_ips.values())
        if len(own) != 1 or set(addresses_of(own[0].attrs)) != addresses:
            found.append(f"{host.name}: its leases say {[addresses_of(each.attrs) for each in own]}, not {addresses}")
        else:
            others = [lease for lease in leases if lease is not own[0]]
            found += [f"{host.name}: {line}" for line in _troubles_of(host, own[0], others, backend)]
    return found


def _troubles_of(host: Host, own: Lease, others: Sequence[Lease], backend: str) -> Iterator[str]:
    tunnels = backend in ("vxlan", "direct")
    peers = host.peers(others)
    for peer in peers:
        if not peer.programmed:
            yield f"{peer.subnet} is not reached: {peer}"
        elif peer.direct != _direct(host, peer.lease, backend, len(peer.subnet.base)):
            yield f"{peer.subnet} is {'' if peer.direct else 'not '}routed directly"
    yield from _device_troubles(host, own)
    devices = own_devices(host)
    fdb = {
        (each["mac"], each["dst"]) for each in host.json("bridge", "fdb") if each["ifname"] in devices and "dst" in each
    }
    remotes = {pair for lease in others for pair in _remotes(host, lease)} if tunnels else set()
    yield from _difference("FDB entries", fdb, remotes)
    neighbours = {
        (each["dev"], each["dst"])
        for family in ("-4", "-6")
        for each in host.json("ip", family, "neigh", "show", "nud", "permanent")
        if each["dev"] in devices
    }
    yield from _difference("neighbours", neighbours, {(peer.device, peer.gateway) for peer in peers if not peer.direct})
    nexthops = {each["id"] for each in host.json("ip", "nexthop") if str(each.get("protocol")) == OWN_PROTOCOL}
    yield from _difference("nexthops", nexthops, {peer.nexthop for peer in peers if peer.nexthop})
    routes = [route for family in ("-4", "-6") for route in host.json("ip", family, "route", "show", "table", "all")]
    ours = {route["dst"] for route in routes if str(route.get("protocol")) == OWN_PROTOCOL}
    yield from _difference("routes", ours, {str(peer.subnet) for peer in peers})
    yield from _difference("guarded addresses", guarded(host), {remote for _, remote in remotes})


def _device_troubles(host: Host, own: Lease) -> Iterator[str]:
    vteps = {4: own.attrs.vtep, 6: own.attrs.vtep6}
    names = {4: "flannel", 6: "flannel-v6"}
    wanted = {f"{names[family]}.{vtep.vni}" for family, vtep in vteps.items() if vtep is not None}
    found = own_devices(host)
    yield from _difference("devices", set(found), wanted)
    for name, link in found.items():
        data = link["linkinfo"]["info_data"]
        place = data.get("local") or data.get("local6"), data.get("link")
        if place[0] not in host.underlay_ips.values() or place[1] != host.seat.device:
            yield f"{name} is at {place}"


def _difference(what: str, found: set[Any], wanted: set[Any]) -> Iterator[str]:
    if found != wanted:
        yield f"{what}: {sorted(found - wanted)} too many, {sorted(wanted - found)} missing"


def _direct(host: Host, peer: Lease, backend: str, length: int) -> bool:
    """Whether the peer's subnet, with an address of this `length`, is to be routed directly."""
    if backend == "vxlan":
        return False
    addresses = map(ipaddress.ip_address, addresses_of(peer.attrs))
    gateways = [address for address in addresses if length == 4 or address.version == 6]
    return any(gateway in link.network for gateway in gateways for link in host.seat.addresses.values())


def _remotes(host: Host, peer: Lease) -> Iterator[tuple[str, str]]:
    """(MAC, underlay address) of the ends of the peer's tunnels that this host uses: by family of the pods, as far as
    both hosts have it, else by the other."""
    ends = {
        family: (mac, address)
        for family, mac, address in zip(_families(peer), macs_of(peer.attrs), addresses_of(peer.attrs), strict=True)
        if family in host.underlay_ips
    }
    for subnet in peer.subnets:
        family = 4 if len(subnet.base) == 4 else 6
        if ends:
            yield ends.get(family) or next(iter(ends.values()))


def _families(peer: Lease) -> list[int]:
    return [ipaddress.ip_address(address).version for address in addresses_of(peer.attrs)]


def own_devices(host: Host) -> dict[str, dict[str, Any]]:
    """The devices that bear the agents' mark, by name, as `ip` shows them."""
    return {link["ifname"]: link for link in host.json("ip", "-d", "link") if link.get("ifalias") == "overlay-agent"}


def guarded(host: Host) -> set[str]:
    """The addresses that the firewall lets in; empty without a table."""
    listing = host.run("nft", "-j", "list", "table", "inet", "overlay_agent")
    if listing.returncode:
        return set()
    sets = [each["set"] for each in json.loads(listing.stdout)["nftables"] if "set" in each]
    return {element for each in sets if each["name"] in SETS.values() for element in each.get("elem", ())}

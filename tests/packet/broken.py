"""The agent with a fault built in: `python -P -m tests.packet.broken FAULT run ...` is `python -P -m agent run ...`.

A check that cannot fail shows nothing: with such agents in a lab, the checks of this directory must fail. See `command`
for how a lab is told. Each fault alters one function of the agent, after its modules are loaded and before it starts.
"""

import itertools
import struct
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import agent
from overlay import backends, kernel, rtnl
from overlay.device import DeviceSpec
from overlay.model import Drop, Entry, Fdb, Neighbour, NextHop, Op, Put, Refusal, Route, Sight
from subnet_lease.model import Lease, Prefix

if TYPE_CHECKING:
    from pyroute2 import IPRoute

_EVERYBODY = bytes(6)
"""The MAC of the FDB entry that stands for all which have none: whatever is sent to it, and to all, goes to each of its
remotes (vxlan_xmit)."""

_APPEND = 0x800  # NLM_F_APPEND in linux/netlink.h
_FLAGS_AT = 6  # struct nlmsghdr


def wrong_vni() -> None:
    """The device, of the right name, has the next VNI."""
    spec = backends.DeviceSpec

    def next_one(**options: object) -> DeviceSpec:
        return spec(**{**options, "vni": options["vni"] + 1})

    backends.DeviceSpec = next_one


def flooding() -> None:
    """Every remote is one for frames that nobody is known for, as if peers were to be found by asking all."""
    usual, seen = rtnl.put, rtnl.sight

    def put(entry: Entry, sequence: int, *, ack: bool = True) -> bytes:
        message = usual(entry, sequence, ack=ack)
        if isinstance(entry, Fdb):
            more = bytearray(usual(entry._replace(at=(entry.at[0], _EVERYBODY)), sequence, ack=False))
            # A remote more, for the kernel replaces none of these (vxlan_fdb_update_existing).
            struct.pack_into("=H", more, _FLAGS_AT, rtnl.REQUEST | rtnl.CREATE | _APPEND)
            message += more
        return message

    def sight(*message: Any) -> Sight | None:
        # The agent would remove it again.
        found = seen(*message)
        return None if isinstance(found, Fdb) and found.at[1] == _EVERYBODY else found

    rtnl.put, rtnl.sight = put, sight


def missing_neighbour() -> None:
    """No neighbour entry is ever written, and the agent believes that all are."""
    usual = kernel.Kernel.apply

    def apply(self: kernel.Kernel, ops: Sequence[Op]) -> list[Refusal]:
        return usual(self, [op for op in ops if not isinstance(op.entry, Neighbour)])

    kernel.Kernel.apply = apply


def wrong_vtep() -> None:
    """The devices send from another address and MAC than the lease says; see `other_address`."""
    spec = backends.DeviceSpec

    def another(**options: object) -> DeviceSpec:
        mac = options["mac"]
        return spec(**{**options, "local": other_address(options["local"]), "mac": mac[:5] + bytes((mac[5] ^ 1,))})

    backends.DeviceSpec = another


def other_address(address: bytes) -> bytes:
    """That of `wrong_vtep`: 172.30.1.11 for 172.30.0.11, fd30::111 for fd30::11."""
    return address[:-2] + bytes((address[-2] ^ 1, address[-1]))


def heedless() -> None:
    """A peer's smaller MTU is not heeded."""
    usual = backends._route

    def route(subnet: Prefix, gateway: bytes, device: int, peer: Lease, here: backends.Here) -> tuple[Entry, ...]:
        return usual(subnet, gateway, device, peer._replace(attrs=peer.attrs._replace(mtu=0)), here)

    backends._route = route


def odd_device() -> None:
    """The devices have a TTL, a range of source ports and a don't-fragment bit of their own, and no checksum."""
    usual = kernel._create

    class Oddly(NamedTuple):
        route: "IPRoute"

        def link(self, command: str, **attributes: object) -> None:
            odd = {"ttl": 7, "df": 1, "port_range": {"low": 40000, "high": 40010}, "udp_csum": 0}
            self.route.link(command, **attributes, **{f"vxlan_{name}": value for name, value in odd.items()})

    kernel._create = lambda route, spec: usual(Oddly(route), spec)


def wrong_order() -> None:
    """Entries come and go in the opposite of their order, with a pause between the kinds."""
    # The kernel takes no route before its nexthop.
    kinds: list[type[Entry]] = [NextHop, Route, Neighbour, Fdb]
    _apply_by(lambda op: kinds.index(type(op.entry)) if isinstance(op, Put) else -kinds.index(type(op.entry)), 0.1)


def routes_first() -> None:
    """Routes come before all else, by two seconds: more packets than can wait for a neighbour come meanwhile."""
    _apply_by(lambda op: not (isinstance(op, Put) and isinstance(op.entry, Route | NextHop)), 2.0)


def _apply_by(rank: Callable[[Op], int], pause: float) -> None:
    usual = kernel.Kernel.apply

    def apply(self: kernel.Kernel, ops: Sequence[Op]) -> list[Refusal]:
        refusals = []
        for _, group in itertools.groupby(sorted(ops, key=rank), key=rank):
            refusals += usual(self, list(group))
            time.sleep(pause)
        return refusals

    kernel.Kernel.apply = apply


def remove_then_add() -> None:
    """Routes are replaced by removing the old and adding the new."""
    usual = kernel.Kernel.apply

    def apply(self: kernel.Kernel, ops: Sequence[Op]) -> list[Refusal]:
        usual(self, [Drop(op.entry) for op in ops if isinstance(op, Put) and isinstance(op.entry, Route)])
        time.sleep(0.02)
        return usual(self, ops)

    kernel.Kernel.apply = apply


def stale() -> None:
    """Nothing is ever removed, and the agent believes that all was."""
    usual = kernel.Kernel.apply

    def apply(self: kernel.Kernel, ops: Sequence[Op]) -> list[Refusal]:
        return usual(self, [op for op in ops if isinstance(op, Put)])

    kernel.Kernel.apply = apply


FAULTS: dict[str, Callable[[], None]] = {
    "wrong-vni": wrong_vni,
    "flooding": flooding,
    "missing-neighbour": missing_neighbour,
    "wrong-vtep": wrong_vtep,
    "heedless": heedless,
    "odd-device": odd_device,
    "wrong-order": wrong_order,
    "routes-first": routes_first,
    "remove-then-add": remove_then_add,
    "stale": stale,
}


def command(fault: str) -> tuple[str, ...]:
    """The `agent_command` of a lab whose agents have this fault."""
    assert fault in FAULTS
    return sys.executable, "-P", "-m", "tests.packet.broken", fault, "run"


def main() -> int:
    """Break the agent, then be it."""
    fault, *arguments = sys.argv[1:]
    FAULTS[fault]()
    sys.argv = ["overlay-agent", *arguments]
    return agent.main()


if __name__ == "__main__":
    sys.exit(main())

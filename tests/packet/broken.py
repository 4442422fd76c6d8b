"""The agent with a fault built in: `python -P -m tests.packet.broken FAULT run ...` is `python -P -m agent run ...`.

A check that cannot fail shows nothing: with such agents in a lab, the checks of this directory must fail. See `command`
for how a lab is told. Each fault alters one function of the agent, after its modules are loaded and before it starts.
"""

import sys
from collections.abc import Callable, Sequence

import agent
from overlay import backends, kernel, rtnl
from overlay.device import DeviceSpec
from overlay.model import Entry, Fdb, Neighbour, Op, Refusal

_EVERYBODY = bytes(6)
"""The MAC of the FDB entry that stands for all which have none: whatever is sent to it, and to all, goes to each of its
remotes (vxlan_xmit)."""


def wrong_vni() -> None:
    """The device, of the right name, has the next VNI."""
    spec = backends.DeviceSpec

    def next_one(**options: object) -> DeviceSpec:
        return spec(**{**options, "vni": options["vni"] + 1})

    backends.DeviceSpec = next_one


def flooding() -> None:
    """Every remote is one for frames that nobody is known for, as if peers were to be found by asking all."""
    usual = rtnl.put

    def put(entry: Entry, sequence: int, *, ack: bool = True) -> bytes:
        message = usual(entry, sequence, ack=ack)
        if isinstance(entry, Fdb):
            message += usual(entry._replace(at=(entry.at[0], _EVERYBODY)), sequence, ack=ack)
        return message

    rtnl.put = put


def missing_neighbour() -> None:
    """No neighbour entry is ever written, and the agent believes that all are."""
    usual = kernel.Kernel.apply

    def apply(self: kernel.Kernel, ops: Sequence[Op]) -> list[Refusal]:
        return usual(self, [op for op in ops if not isinstance(op.entry, Neighbour)])

    kernel.Kernel.apply = apply


FAULTS: dict[str, Callable[[], None]] = {
    "wrong-vni": wrong_vni,
    "flooding": flooding,
    "missing-neighbour": missing_neighbour,
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

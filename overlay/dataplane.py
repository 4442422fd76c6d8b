"""The host's dataplane as the reconciler sees it: entries in the kernel's tables and in the firewall's sets, as one.

Owns nothing but the seam: which edge an entry belongs to, and that the firewall's sets change first when a peer comes
and last when it goes.
"""

import errno
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain

from overlay.kernel import Kernel
from overlay.model import Entry, Gone, Guard, Op, Put, Refusal, Seen
from overlay.nft import Nftables, NftFailed, TableGone


class HostDataplane:
    """This network namespace's kernel and nftables. `nftables` None: no entries of the firewall's come here.

    `disturbed` tells of changes to the firewall that no monitor does.
    """

    def __init__(
        self, kernel: Kernel, nftables: Nftables | None = None, disturbed: Callable[[], bool] = lambda: False
    ) -> None:
        self._kernel = kernel
        self._nftables = nftables
        self._disturbed = disturbed
        if nftables is not None:
            kernel.also = (nftables.fileno(),)
        self.wait, self.interrupt = kernel.wait, kernel.interrupt
        self.has_nexthops = kernel.has_nexthops
        self.ensure_devices, self.remove_strays = kernel.ensure_devices, kernel.remove_strays
        self._table_gone = False

    @property
    def tunnels(self) -> Mapping[int, int]:
        """As `Kernel.tunnels`."""
        return self._kernel.tunnels

    def observe(self) -> Seen:
        """What both monitors brought."""
        seen = self._kernel.observe()
        if self._nftables is None:
            return seen
        firewall = self._nftables.observe()
        gone, self._table_gone = self._table_gone, False
        elements = (
            Guard(address) if present else Gone(Guard(address)) for address, present in firewall.elements.items()
        )
        programs = ", ".join(firewall.programs)
        return Seen(
            (*seen.sights, *elements),
            seen.lost,
            seen.device_changed,
            gone or firewall.altered or firewall.lost or bool(firewall.forward) or self._disturbed(),
            firewall.programs if firewall.altered else (),
            {**seen.by, **dict.fromkeys(firewall.elements, programs)} if programs else seen.by,
        )

    def apply(self, ops: list[Op]) -> list[Refusal]:
        """As `Kernel.apply`. The build order has the firewall's additions at the front, and its removals at the end."""
        first, last = 0, len(ops)
        while first < last and isinstance(ops[first].entry, Guard) and isinstance(ops[first], Put):
            first += 1
        while last > first and isinstance(ops[last - 1].entry, Guard):
            last -= 1
        refusals = self._put(ops[:first])
        refusals += self._kernel.apply(ops[first:last])
        return refusals + self._put(ops[last:])

    def _put(self, ops: Sequence[Op]) -> list[Refusal]:
        if not ops or self._nftables is None:
            return []
        addresses = [op.entry.address for op in ops if isinstance(op.entry, Guard)]
        try:
            self._nftables.put(*((addresses, ()) if isinstance(ops[0], Put) else ((), addresses)))
        except TableGone:
            self._table_gone = True
            return [Refusal(op, errno.ENOENT) for op in ops]
        except NftFailed:
            return [Refusal(op, errno.EIO) for op in ops]
        return []

    def dump(self, nexthops: bool) -> Iterator[Entry]:
        """All entries on our devices, routes by the underlay's link, and what the firewall's sets hold."""
        return chain(self._listed(), self._kernel.dump(nexthops))

    def _listed(self) -> Iterator[Entry]:
        try:
            addresses: Collection[bytes] = self._nftables.dump() if self._nftables is not None else ()
        except TableGone:
            self._table_gone = True
            return
        except NftFailed:
            return
        yield from map(Guard, addresses)

"""Which subnet a host may take: the choice among the free ones of an address family's range.

Pure arithmetic on subnet numbers, counted from the first of a range. The cost grows with the number of taken prefixes
(one sort), never with the size of the network or of a taken prefix: one hostile `0.0.0.0/0` costs no more than a /24.
"""

from collections.abc import Callable, Iterable

from subnet_lease.model import Prefix, SubnetRange, format_address
from subnet_lease.store import SubnetExhausted


def choose_subnet(
    available: SubnetRange, taken: Iterable[Prefix], preferred: Iterable[Prefix], pick: Callable[[int], int]
) -> Prefix:
    """A subnet of the range that overlaps nothing in `taken`.

    The first of `preferred` that is one; otherwise each is equally likely, so that thousands of hosts that start
    together seldom want the same. `pick(n)` gives a number from 0 to n - 1, as `random.randrange` does. `taken` and
    `preferred` may hold prefixes of any length, place and family. SubnetExhausted, with the numbers, when none is free.
    """
    length = available.length
    size = len(available.first)
    shift = size * 8 - length
    low, high = (int.from_bytes(address, "big") >> shift for address in (available.first, available.last))
    count = high - low + 1
    used = _merged(_numbers(taken, size, shift, low, count))
    for subnet in preferred:
        if len(subnet.base) == size and subnet == subnet.network(length):
            number = (subnet.first >> shift) - low
            if 0 <= number < count and not any(first <= number <= last for first, last in used):
                return subnet
    free = count - sum(last - first + 1 for first, last in used)
    if not free:
        raise SubnetExhausted(
            f"all {count} subnets of /{length} from {format_address(available.first)} "
            f"to {format_address(available.last)} are taken"
        )
    number = pick(free)
    for first, last in used:
        if number < first:
            break
        number += last - first + 1
    return Prefix(((low + number) << shift).to_bytes(size, "big"), length)


def _numbers(taken: Iterable[Prefix], size: int, shift: int, low: int, count: int) -> list[tuple[int, int]]:
    """First and last number of the subnets that each taken prefix touches, as far as they can be handed out.

    `size` is the number of bytes of an address.
    """
    bits = 8 * size
    ranges = []
    for base, length in taken:
        if len(base) == size:
            address = int.from_bytes(base, "big")
            first = (address >> shift) - low
            last = ((address | (1 << bits - length) - 1) >> shift) - low
            if last >= 0 and first < count:
                ranges.append((max(first, 0), min(last, count - 1)))
    return ranges


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same numbers as ascending ranges that do not overlap."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return merged

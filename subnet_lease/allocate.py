"""Which subnet a host may take: the choice among the free ones of the network.

Pure arithmetic on subnet numbers, counted from SubnetMin. The cost grows with the number of taken prefixes (one sort),
never with the size of the network or of a taken prefix: one hostile `0.0.0.0/0` costs no more than a /24.
"""

from collections.abc import Callable, Iterable

from subnet_lease.model import NetworkConfig, Prefix, format_address
from subnet_lease.store import SubnetExhausted


def choose_subnet(
    config: NetworkConfig, taken: Iterable[Prefix], preferred: Prefix | None, pick: Callable[[int], int]
) -> Prefix:
    """A subnet of SubnetLen bits between SubnetMin and SubnetMax that overlaps nothing in `taken`.

    `preferred` where it is one of those; otherwise each is equally likely, so that thousands of hosts that start
    together seldom want the same. `pick(n)` gives a number from 0 to n - 1, as `random.randrange` does. `taken` may
    hold prefixes of any length and place. SubnetExhausted, with the numbers, when none is free.
    """
    shift = len(config.subnet_min) * 8 - config.subnet_len
    low, high = (int.from_bytes(address, "big") >> shift for address in (config.subnet_min, config.subnet_max))
    count = high - low + 1
    used = _merged(_numbers(taken, config.block, shift, low, count))
    if preferred is not None and preferred == preferred.network(config.subnet_len) and len(preferred.base) == 4:
        number = (preferred.first >> shift) - low
        if 0 <= number < count and not any(first <= number <= last for first, last in used):
            return preferred
    free = count - sum(last - first + 1 for first, last in used)
    if not free:
        raise SubnetExhausted(
            f"all {count} subnets of /{config.subnet_len} from {format_address(config.subnet_min)} "
            f"to {format_address(config.subnet_max)} are taken"
        )
    number = pick(free)
    for first, last in used:
        if number < first:
            break
        number += last - first + 1
    return Prefix(((low + number) << shift).to_bytes(4, "big"), config.subnet_len)


def _numbers(taken: Iterable[Prefix], block: Prefix, shift: int, low: int, count: int) -> list[tuple[int, int]]:
    """First and last number of the subnets that each taken prefix touches, as far as they can be handed out."""
    bits = 8 * len(block.base)
    ranges = []
    for base, length in taken:
        if 8 * len(base) == bits:
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

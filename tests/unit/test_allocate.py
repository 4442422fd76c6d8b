"""Choosing a subnet: never a taken one, never one out of range, always one if there is one."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subnet_lease.allocate import choose_subnet
from subnet_lease.model import NetworkConfig, Prefix, pack_address
from subnet_lease.store import SubnetExhausted

CONFIG = NetworkConfig.parse(b'{"Network":"10.5.0.0/16"}')


def small_config(length: int, low: int, high: int) -> NetworkConfig:
    """10.5.0.0/20 in subnets of `length`, of which those numbered `low` to `high` may be handed out."""
    step = 1 << (32 - length)
    ends = [Prefix(pack_address("10.5.0.0"), 20).host(number * step) for number in (low, high)]
    text = '{"Network":"10.5.0.0/20","SubnetLen":%d,"SubnetMin":"%d.%d.%d.%d","SubnetMax":"%d.%d.%d.%d"}'
    return NetworkConfig.parse((text % (length, *ends[0], *ends[1])).encode())


def numbered(config: NetworkConfig) -> list[Prefix]:
    """Every subnet that may be handed out, the slow way."""
    subnets = []
    for base in range(int.from_bytes(config.subnet_min, "big"), int.from_bytes(config.subnet_max, "big") + 1):
        prefix = Prefix(base.to_bytes(4, "big"), config.subnet_len)
        if prefix == prefix.network(config.subnet_len):
            subnets.append(prefix)
    return subnets


@st.composite
def configs(draw: st.DrawFn) -> NetworkConfig:
    length = draw(st.integers(22, 26))
    last = (1 << (length - 20)) - 1
    low = draw(st.integers(0, last))
    return small_config(length, low, draw(st.integers(low, last)))


@st.composite
def prefixes(draw: st.DrawFn) -> Prefix:
    """Mostly in and around 10.5.0.0/20; of any length; now and then IPv6."""
    if draw(st.integers(0, 9)) == 0:
        return Prefix.parse("fd00:5::/64")
    base = (10 << 24 | 5 << 16) + draw(st.integers(-4096, 3 * 4096))
    length = draw(st.one_of(st.integers(22, 26), st.integers(0, 32)))
    return Prefix(base.to_bytes(4, "big"), 32).network(length)


@given(configs(), st.lists(prefixes(), max_size=40), st.none() | prefixes(), st.randoms(use_true_random=False))
def test_a_subnet_is_free_in_range_and_found_whenever_there_is_one(
    config: NetworkConfig, taken: list[Prefix], preferred: Prefix | None, chance: random.Random
) -> None:
    free = [subnet for subnet in numbered(config) if not any(subnet.overlaps(other) for other in taken)]
    try:
        chosen = choose_subnet(config.ranges[0], taken, (preferred,) if preferred else (), chance.randrange)
    except SubnetExhausted:
        assert not free
        return
    assert chosen in free
    if preferred in free:
        assert chosen == preferred


@given(configs(), st.lists(prefixes(), max_size=40))
def test_each_free_subnet_answers_to_one_number(config: NetworkConfig, taken: list[Prefix]) -> None:
    free = [subnet for subnet in numbered(config) if not any(subnet.overlaps(other) for other in taken)]
    asked: list[int] = []
    for number in range(len(free)):
        assert (
            choose_subnet(config.ranges[0], taken, (), lambda n, number=number: asked.append(n) or number)
            == free[number]
        )
    assert set(asked) <= {len(free)}


def test_preferred_subnet_is_taken_where_it_is_free() -> None:
    wanted = Prefix.parse("10.5.34.0/24")
    assert choose_subnet(CONFIG.ranges[0], [Prefix.parse("10.5.35.0/24")], [wanted], lambda n: 0) == wanted


@pytest.mark.parametrize(
    "preferred",
    ["10.5.0.0/24", "10.6.1.0/24", "10.5.34.0/25", "10.5.34.0/23", "10.5.7.0/24", "10.5.9.0/24", "fd00::/64", "::/24"],
)
def test_preferred_subnet_is_passed_over_where_it_is_out_of_range_or_taken(preferred: str) -> None:
    taken = [Prefix.parse("10.5.7.0/24"), Prefix.parse("10.5.8.0/23")]
    assert str(choose_subnet(CONFIG.ranges[0], taken, [Prefix.parse(preferred)], lambda n: 0)) == "10.5.1.0/24"


def test_preferred_subnet_that_begins_off_its_boundary_is_passed_over() -> None:
    askew = Prefix(pack_address("10.5.34.1"), 24)
    assert str(choose_subnet(CONFIG.ranges[0], [], [askew], lambda n: 0)) == "10.5.1.0/24"


def test_exhaustion_gives_the_numbers() -> None:
    with pytest.raises(SubnetExhausted, match=r"all 255 subnets of /24 from 10\.5\.1\.0 to 10\.5\.255\.0 are taken"):
        choose_subnet(CONFIG.ranges[0], [Prefix.parse("0.0.0.0/0")], (), lambda n: 0)


def test_the_last_free_subnet_of_a_large_network_is_found_without_counting_through_it() -> None:
    config = NetworkConfig.parse(b'{"Network":"10.0.0.0/8","SubnetLen":30}')
    taken = [Prefix.parse("10.0.0.0/9"), Prefix.parse("10.128.0.0/10"), Prefix.parse("10.192.0.0/10")]
    spent = time.process_time()
    with pytest.raises(SubnetExhausted, match="4194303"):
        choose_subnet(config.ranges[0], taken, (), lambda n: 0)
    taken[2:] = [Prefix.parse("10.192.0.0/10").network(11), Prefix.parse("10.224.0.0/12")]
    assert str(choose_subnet(config.ranges[0], taken, (), lambda n: n - 1)) == "10.255.255.252/30"
    # Counting through four million subnets takes seconds.
    assert time.process_time() - spent < 0.5


IPV6 = NetworkConfig.parse(b'{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/48"}').ranges[0]


def test_ipv6_subnets_are_handed_out_as_ipv4_ones_are() -> None:
    taken = [Prefix.parse("fd00:5:0:1::/64"), Prefix.parse("fd00:5:0:2::/63"), Prefix.parse("10.0.0.0/8")]
    assert str(choose_subnet(IPV6, taken, (), lambda n: 0)) == "fd00:5:0:4::/64"
    assert str(choose_subnet(IPV6, taken, (), lambda n: n - 1)) == "fd00:5:0:ffff::/64"


def test_preferred_subnets_of_the_other_family_are_passed_over() -> None:
    wanted = [Prefix.parse("10.5.34.0/24"), Prefix.parse("fd00:5:0:34::/64")]
    assert choose_subnet(CONFIG.ranges[0], [], wanted, lambda n: 0) == wanted[0]
    assert choose_subnet(IPV6, [], wanted, lambda n: 0) == wanted[1]


def test_exhaustion_of_a_huge_range_gives_the_numbers() -> None:
    wide = NetworkConfig.parse(b'{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/8","IPv6SubnetLen":64}')
    with pytest.raises(SubnetExhausted, match=f"all {2**56 - 1} subnets of /64 from fd00:0:0:1:: to fdff:"):
        choose_subnet(wide.ranges[0], [Prefix.parse("::/0")], (), lambda n: 0)


@given(configs(), st.integers(-2, 70))
def test_numbers_and_subnets_of_a_range_are_one_to_one(config: NetworkConfig, number: int) -> None:
    (available,) = config.ranges
    subnets = numbered(config)
    found = available.subnet(number)
    assert found == (subnets[number] if 0 <= number < len(subnets) else None)
    assert found is None or available.number(found) == number

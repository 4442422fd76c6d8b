"""The wire contract: network configuration and leases, between JSON in etcd and immutable values.

Owns the codec of `<prefix>/config` and `<prefix>/subnets/<key>`, byte-compatible with flannel 0.28, and the
validation of both. Everything read from the store passes through here once; whatever cannot be decoded becomes an
error that carries a reason for the operator. Nothing here knows of etcd, of devices or of other leases.

Addresses are packed bytes in network order, 4 or 16 long: as netlink and hash tables want them.
Text appears only where people or JSON are.
"""

import ipaddress
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Self

MAX_VALUE_BYTES = 64 * 1024
"""A lease value is some 150 bytes; whatever is hundreds of times larger was not written by an agent."""

MAX_NAME = 253
"""Characters of a host's name, as DNS has it (RFC 1035 section 2.3.4): thousands of names are kept."""

MAX_NESTED = 64
"""Objects and lists a lease value may hold; agents write three or four."""

NO_EXTRAS: Mapping[str, Any] = MappingProxyType({})


class ConfigInvalid(ValueError):
    """The network configuration cannot be used: `key` names the JSON key at fault, `reason` says why."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key
        self.reason = reason


class LeaseInvalid(ValueError):
    """A key or value below `subnets/` is no lease; the text is the reason shown to the operator."""


_NUMBERS = {str(number): number for number in range(256)}
"""Decimal numbers of a byte in their plain form: int() would also take "010", "+1", " 1" and other scripts' digits."""


def pack_address(text: str) -> bytes:
    """Packed form of an IPv4 or IPv6 address; ValueError unless it is in its plain, unambiguous notation."""
    try:
        first, second, third, fourth = text.split(".")
        return bytes((_NUMBERS[first], _NUMBERS[second], _NUMBERS[third], _NUMBERS[fourth]))
    except (KeyError, ValueError):
        pass  # Perhaps IPv6.
    try:
        if "%" not in text:  # a zone has no meaning beyond its own host
            return ipaddress.IPv6Address(text).packed
    except ValueError:
        pass
    raise ValueError(f"{text[:64]!r} is not an IP address")


def format_address(packed: bytes) -> str:
    """Text of a packed address of 4 or 16 bytes."""
    if len(packed) == 4:
        return "{}.{}.{}.{}".format(*packed)
    return str(ipaddress.IPv6Address(packed))


def pack_mac(text: str) -> bytes:
    """Six bytes of a MAC written with colons; ValueError otherwise."""
    try:
        packed = bytes.fromhex(text.replace(":", " "))
    except ValueError:
        packed = b""
    # The way back refuses what fromhex() tolerates: other white space, more of it, or none.
    if len(packed) != 6 or packed.hex(":") != text.lower():
        raise ValueError(f"{text[:64]!r} is not a MAC address")
    return packed


def format_mac(packed: bytes) -> str:
    """The usual lower-case notation with colons."""
    return packed.hex(":")


def is_device_mac(mac: bytes) -> bool:
    """Whether a device can have it: not a group's, not all zero."""
    return not mac[0] & 1 and any(mac)


class Prefix(NamedTuple):
    """A block of addresses: packed base address (4 or 16 bytes, host bits zero) and prefix length in bits."""

    base: bytes
    length: int

    @classmethod
    def parse(cls, text: str, *, strict: bool = True) -> "Prefix":
        """From `10.5.34.0/24` or `fd00::/64`; ValueError if the notation is off, or, if `strict`, host bits are set."""
        address, slash, length = text.partition("/")
        if not slash:
            raise ValueError(f"{text[:64]!r} is not a subnet in the form address/length")
        return cls.of(address, length, strict=strict)

    @classmethod
    def of(cls, address: str, length: str, *, strict: bool = True) -> "Prefix":
        """From the two parts of the notation; as `parse`."""
        base, bits = pack_address(address), _NUMBERS.get(length)
        if bits is None or bits > 8 * len(base):
            raise ValueError(f"{length[:64]!r} is not a prefix length from 0 to {8 * len(base)}")
        prefix, spare = cls(base, bits), 8 * len(base) - bits
        number = int.from_bytes(base, "big")
        if number >> spare << spare != number:
            network = prefix.network(bits)
            if strict:
                raise ValueError(f"{str(prefix)!r} has host bits set; the subnet is {network}")
            return network
        return prefix

    def __str__(self) -> str:
        return f"{format_address(self.base)}/{self.length}"

    @property
    def first(self) -> int:
        """The base address as a number."""
        return int.from_bytes(self.base, "big")

    @property
    def size(self) -> int:
        """How many addresses the block holds."""
        return 1 << (8 * len(self.base) - self.length)

    def network(self, length: int) -> "Prefix":
        """The block of `length` bits that this block's base address lies in."""
        bits = 8 * len(self.base)
        masked = self.first >> (bits - length) << (bits - length)
        return Prefix(masked.to_bytes(len(self.base), "big"), length)

    def holds(self, address: bytes) -> bool:
        """Whether the packed address lies inside; never true across families."""
        bits = 8 * len(self.base) - self.length
        return len(address) == len(self.base) and (int.from_bytes(address, "big") ^ self.first) >> bits == 0

    def covers(self, other: "Prefix") -> bool:
        """Whether all of `other` lies inside."""
        return other.length >= self.length and self.holds(other.base)

    def overlaps(self, other: "Prefix") -> bool:
        """Whether any address lies in both; never true across families."""
        if self.length == other.length:
            return self.base == other.base
        bits = 8 * len(self.base)
        if bits != 8 * len(other.base):
            return False
        spare = bits - min(self.length, other.length)
        return int.from_bytes(self.base, "big") >> spare == int.from_bytes(other.base, "big") >> spare

    def host(self, number: int) -> bytes:
        """The packed address `number` places after the base."""
        return (self.first + number).to_bytes(len(self.base), "big")


# --- network configuration ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """The `Backend` object of the network configuration. `mtu` 0 means: derive it from the underlay."""

    type: str = "udp"
    vni: int = 1
    port: int = 8472
    gbp: bool = False
    learning: bool = False
    direct_routing: bool = False
    mtu: int = 0


class SubnetRange(NamedTuple):
    """The subnets of one address family that may be handed out: of `length` bits, with bases from `first` to `last`."""

    network: Prefix
    length: int
    first: bytes
    last: bytes

    def number(self, subnet: Prefix) -> int:
        """Which one a subnet of `length` bits is, counted from `first`."""
        return (subnet.first - int.from_bytes(self.first, "big")) >> 8 * len(self.first) - self.length

    def subnet(self, number: int) -> Prefix | None:
        """The one with this number, None if it is none of the range's."""
        first, last = int.from_bytes(self.first, "big"), int.from_bytes(self.last, "big")
        base = first + (number << 8 * len(self.first) - self.length)
        return Prefix(base.to_bytes(len(self.first), "big"), self.length) if first <= base <= last else None


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """The cluster's network, as the operator wrote it, with flannel's defaults filled in.

    `subnet_min` and `subnet_max` are the packed base addresses of the first and last subnet that may be handed out.
    `unknown` names the JSON keys that were read over.
    """

    network: Prefix | None
    subnet_len: int
    subnet_min: bytes
    subnet_max: bytes
    enable_ipv4: bool
    enable_ipv6: bool
    ipv6_network: Prefix | None
    ipv6_subnet_len: int
    ipv6_subnet_min: bytes
    ipv6_subnet_max: bytes
    backend: BackendConfig
    unknown: tuple[str, ...] = ()

    @classmethod
    def parse(cls, value: bytes) -> Self:
        """Decode the config key; ConfigInvalid names the JSON key at fault (source: flannel pkg/subnet/config.go)."""
        try:
            top = _Fields("", _json_object(value))
        except ValueError as error:
            raise ConfigInvalid("config", str(error)) from None
        enable_ipv4 = top.boolean("EnableIPv4", True)
        enable_ipv6 = top.boolean("EnableIPv6", False)
        if not enable_ipv4 and not enable_ipv6:
            raise ConfigInvalid("EnableIPv4", "both address families are switched off; set EnableIPv4 or EnableIPv6")
        network = top.prefix("Network", 4, required=enable_ipv4)
        subnet_len, subnet_min, subnet_max = _subnet_range(top, network, "", usual=24, longest=30, smallest=28)
        ipv6_network = top.prefix("IPv6Network", 16, required=enable_ipv6)
        v6_range = _subnet_range(top, ipv6_network, "IPv6", usual=64, longest=126, smallest=124)
        backend = _Fields("Backend.", top.take("Backend", dict, {}))
        return cls(
            network=network,
            subnet_len=subnet_len,
            subnet_min=subnet_min,
            subnet_max=subnet_max,
            enable_ipv4=enable_ipv4,
            enable_ipv6=enable_ipv6,
            ipv6_network=ipv6_network,
            ipv6_subnet_len=v6_range[0],
            ipv6_subnet_min=v6_range[1],
            ipv6_subnet_max=v6_range[2],
            backend=BackendConfig(
                type=backend.take("Type", str, "udp"),
                vni=backend.integer("VNI", 1, 1, (1 << 24) - 1),
                port=backend.integer("Port", 8472, 1, 65535, zero_is_default=True),
                gbp=backend.boolean("GBP", False),
                learning=backend.boolean("Learning", False),
                direct_routing=backend.boolean("DirectRouting", False),
                mtu=backend.integer("MTU", 0, 576, 65535, zero_is_default=True),
            ),
            unknown=top.unread() + backend.unread(),
        )

    @property
    def ranges(self) -> tuple["SubnetRange", ...]:
        """What hosts are given of each enabled address family, IPv4 first."""
        found = []
        if self.enable_ipv4 and self.network is not None:
            found.append(SubnetRange(self.network, self.subnet_len, self.subnet_min, self.subnet_max))
        if self.enable_ipv6 and self.ipv6_network is not None:
            found.append(
                SubnetRange(self.ipv6_network, self.ipv6_subnet_len, self.ipv6_subnet_min, self.ipv6_subnet_max)
            )
        return tuple(found)

    @property
    def blocks(self) -> tuple[Prefix, ...]:
        """The networks of the enabled address families, IPv4 first."""
        return tuple(each.network for each in self.ranges)


LIVE_SETTINGS = frozenset({"SubnetMin", "SubnetMax", "Backend.DirectRouting", "Backend.MTU"})
"""JSON keys whose change running agents take over. All else is what the leases and devices of the cluster rest upon."""


def changed_settings(old: NetworkConfig, new: NetworkConfig) -> dict[str, tuple[str, str]]:
    """JSON keys of which two configurations differ, each with the old and the new value as text."""

    def settings(config: NetworkConfig) -> dict[str, str]:
        backend = config.backend
        return {
            "Network": str(config.network),
            "SubnetLen": str(config.subnet_len),
            "SubnetMin": format_address(config.subnet_min) if config.subnet_min else "",
            "SubnetMax": format_address(config.subnet_max) if config.subnet_max else "",
            "EnableIPv4": str(config.enable_ipv4),
            "EnableIPv6": str(config.enable_ipv6),
            "IPv6Network": str(config.ipv6_network),
            "IPv6SubnetLen": str(config.ipv6_subnet_len),
            "Backend.Type": backend.type,
            "Backend.VNI": str(backend.vni),
            "Backend.Port": str(backend.port),
            "Backend.GBP": str(backend.gbp),
            "Backend.Learning": str(backend.learning),
            "Backend.DirectRouting": str(backend.direct_routing),
            "Backend.MTU": str(backend.mtu),
        }

    before, after = settings(old), settings(new)
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


class _Fields:
    """Reads typed fields out of one JSON object and remembers which it has read.

    Keys match in any case, as Go's decoder, which reads the same value in flanneld, has it.
    """

    def __init__(self, path: str, values: Mapping[str, Any]) -> None:
        self._path = path
        self._values = {key.lower(): (key, value) for key, value in values.items()}
        self._read: set[str] = set()

    def take(self, name: str, kind: type, default: Any) -> Any:
        """The value of `name`, `default` where it is absent or null; ConfigInvalid if it is of another type."""
        self._read.add(name.lower())
        value = self._values.get(name.lower(), (name, None))[1]
        if value is None:
            return default
        if type(value) is not kind:
            wanted = {str: "a string", int: "a whole number", bool: "true or false", dict: "an object"}[kind]
            # Only plain values are shown: an object may be nested too deeply to be written out again.
            found = "an object or a list" if isinstance(value, dict | list) else json.dumps(value)[:64]
            raise ConfigInvalid(self._path + name, f"must be {wanted}, not {found}")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        return bool(self.take(name, bool, default))

    def integer(self, name: str, default: int, low: int, high: int, *, zero_is_default: bool = False) -> int:
        value = int(self.take(name, int, default))
        if zero_is_default and value == 0:
            return default
        if not low <= value <= high:
            raise ConfigInvalid(self._path + name, f"must lie between {low} and {high}, not {value}")
        return value

    def prefix(self, name: str, family: int, *, required: bool) -> Prefix | None:
        text = self.take(name, str, "")
        if not text:
            if required:
                raise ConfigInvalid(self._path + name, "missing; give the address block of all pods, as 10.5.0.0/16")
            return None
        try:
            # Host bits are dropped, as flannel does: configurations out there have them.
            prefix = Prefix.parse(text, strict=False)
        except ValueError as error:
            raise ConfigInvalid(self._path + name, str(error)) from None
        if len(prefix.base) != family:
            raise ConfigInvalid(self._path + name, f"{text} is of the wrong address family")
        if family == 4 and prefix.length < 8:
            raise ConfigInvalid(self._path + name, f"{text} is larger than a /8")
        return prefix

    def address(self, name: str, default: bytes) -> bytes:
        text = self.take(name, str, "")
        try:
            packed = pack_address(text) if text else default
        except ValueError as error:
            raise ConfigInvalid(self._path + name, str(error)) from None
        if len(packed) != len(default):
            raise ConfigInvalid(self._path + name, f"{text} is of the wrong address family")
        return packed

    def unread(self) -> tuple[str, ...]:
        return tuple(self._path + key for lower, (key, _) in self._values.items() if lower not in self._read)


def _subnet_range(
    fields: _Fields, network: Prefix | None, family: str, *, usual: int, longest: int, smallest: int
) -> tuple[int, bytes, bytes]:
    """(SubnetLen, SubnetMin, SubnetMax) with flannel's defaults: the first subnet is never handed out."""
    names = f"{family}SubnetLen", f"{family}SubnetMin", f"{family}SubnetMax"
    length = fields.integer(names[0], 0, 1, longest, zero_is_default=True)
    if network is None:
        fields.take(names[1], str, ""), fields.take(names[2], str, "")
        return length or usual, b"", b""
    if length == 0:
        if network.length > smallest:
            raise ConfigInvalid(f"{family}Network", f"{network} is too small; a /{smallest} is the least")
        length = usual if network.length <= usual - 2 else network.length + 2
    elif network.length > length - 2:
        raise ConfigInvalid(names[0], f"{network} must hold at least four subnets of /{length}")
    step = 1 << (8 * len(network.base) - length)
    low = fields.address(names[1], network.host(step))
    high = fields.address(names[2], network.host(network.size - step))
    for name, address in ((names[1], low), (names[2], high)):
        if not network.holds(address):
            raise ConfigInvalid(name, f"{format_address(address)} lies outside {network}")
        if Prefix(address, length).network(length).base != address:
            raise ConfigInvalid(name, f"{format_address(address)} does not begin a /{length}")
    if low > high:
        raise ConfigInvalid(names[1], f"{format_address(low)} lies above {names[2]} {format_address(high)}")
    return length, low, high


def _json_object(value: bytes) -> dict[str, Any]:
    """Decode one JSON object, with what Go's decoder in flanneld accepts: UTF-8 alone, no NaN. ValueError otherwise."""
    try:
        text = value.decode()
        # As decode() does, but for a search for white space around it, of which agents write none.
        decoded, end = _JSON.raw_decode(text) if text.startswith("{") else (None, -1)
        if end != len(text):
            decoded = _JSON.decode(text)
    except (ValueError, RecursionError):
        raise ValueError("the value is not JSON") from None
    if type(decoded) is not dict:
        raise ValueError("the value is not a JSON object")
    return decoded


def _refuse(constant: str) -> None:
    raise ValueError(constant)


_JSON = json.JSONDecoder(parse_constant=_refuse)


# --- leases ------------------------------------------------------------------------------------------------------


class Vtep(NamedTuple):
    """A tunnel endpoint as `BackendData` states it: VNI and the packed MAC of the host's VXLAN device."""

    vni: int
    mac: bytes


class LeaseAttrs(NamedTuple):
    """What a host says of itself in the value of its lease.

    `public_ip` and `public_ip6` are the packed underlay addresses that its peers send to, None for a family that its
    underlay lacks. `vtep` and `vtep6` are its tunnel endpoints on these; None for such a family, and for backends
    without a tunnel. `mtu` is of its overlay in bytes, 0 where it does not say. `node_name` is what it calls itself, at
    most MAX_NAME characters of any kind, empty where it does not say. `extra` holds the JSON keys beyond flannel's and
    ours.
    """

    public_ip: bytes | None
    backend_type: str
    vtep: Vtep | None
    public_ip6: bytes | None = None
    vtep6: Vtep | None = None
    mtu: int = 0
    node_name: str = ""
    extra: Mapping[str, Any] = NO_EXTRAS

    @property
    def underlay_ip(self) -> bytes | None:
        """What a host is called by: `public_ip`, or `public_ip6` where its underlay has no IPv4."""
        return self.public_ip or self.public_ip6


class Lease(NamedTuple):
    """A host's subnets, one of each address family or of one alone. `etcd_lease` 0 marks a reservation, which no time
    takes away."""

    subnet: Prefix | None
    subnet6: Prefix | None
    attrs: LeaseAttrs
    etcd_lease: int
    create_revision: int
    mod_revision: int

    def __str__(self) -> str:
        return format_subnets(self.subnets)

    @property
    def subnets(self) -> tuple[Prefix, ...]:
        """Those that there are, IPv4 first."""
        if self.subnet is None:
            return () if self.subnet6 is None else (self.subnet6,)
        return (self.subnet,) if self.subnet6 is None else (self.subnet, self.subnet6)

    @property
    def key(self) -> str:
        """The last part of the key of a lease with these subnets."""
        return subnet_key(self.subnet, self.subnet6)

    @property
    def reserved(self) -> bool:
        """Whether the operator, not time, decides when it ends."""
        return self.etcd_lease == 0


def format_subnets(subnets: Iterable[Prefix]) -> str:
    """For people: `10.5.34.0/24`, or `10.5.34.0/24 and fd00::/64`."""
    return " and ".join(map(str, subnets))


NO_SUBNET = "0.0.0.0-0"
"""What stands for the IPv4 subnet in the key of a lease without one (source: flannel MakeSubnetKey)."""


def subnet_key(subnet: Prefix | None, subnet6: Prefix | None = None) -> str:
    """The last part of a lease's key: `10.5.34.0-24`, dual-stack `10.5.34.0-24&fd00:5:34::-64`."""
    key = NO_SUBNET if subnet is None else f"{format_address(subnet.base)}-{subnet.length}"
    if subnet6 is not None:
        key += f"&{format_address(subnet6.base)}-{subnet6.length}"
    return key


def parse_subnet_key(key: str) -> tuple[Prefix | None, Prefix | None]:
    """The inverse of `subnet_key`; LeaseInvalid for anything else, other spellings of the same subnets included."""
    text, ampersand, text6 = key.partition("&")
    base, _, length = text.partition("-")
    try:
        subnet = Prefix.of(base, length)
        if len(subnet.base) != 4:
            raise ValueError("wrong address family")
        if not ampersand:
            return subnet, None
        base, _, length = text6.rpartition("-")
        subnet6 = Prefix.of(base, length)
        if len(subnet6.base) != 16:
            raise ValueError("wrong address family")
        found = None if text == NO_SUBNET else subnet, subnet6
        if (usual := subnet_key(*found)) != key:
            raise ValueError(f"it is written {usual!r}")
    except ValueError as error:
        raise LeaseInvalid(f"the key names no subnet: {error}") from None
    return found


MTUS = range(68, 65536)
"""What an IP link can have: RFC 791 to the largest packet there is."""


def encode_attrs(attrs: LeaseAttrs) -> bytes:
    """The lease value: compact JSON, keys in flannel's order, then our own.

    As flannel has it, a missing PublicIP is 0.0.0.0, and BackendType, BackendData and BackendV6Data are left out where
    there is none (source: flannel pkg/lease).
    """
    value: dict[str, Any] = {
        "PublicIP": format_address(attrs.public_ip or NO_ADDRESS),
        "PublicIPv6": None if attrs.public_ip6 is None else format_address(attrs.public_ip6),
    }
    if attrs.backend_type:
        value["BackendType"] = attrs.backend_type
    for name, vtep in (("BackendData", attrs.vtep), ("BackendV6Data", attrs.vtep6)):
        if vtep is not None:
            value[name] = {"VNI": vtep.vni, "VtepMAC": format_mac(vtep.mac)}
    if attrs.mtu:
        value["MTU"] = attrs.mtu
    if attrs.node_name:
        value["NodeName"] = attrs.node_name
    value.update(attrs.extra)
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def decode_attrs(value: bytes, *, extras: bool = True) -> LeaseAttrs:
    """Decode a lease value; LeaseInvalid gives the reason. Unknown keys are kept in `extra`, if `extras` are wanted."""
    if len(value) > MAX_VALUE_BYTES:
        raise LeaseInvalid(f"the value has {len(value)} bytes, over the {MAX_VALUE_BYTES} a lease may have")
    if value.count(b"{") + value.count(b"[") > MAX_NESTED:
        # Whoever compares or prints it later must not run out of stack.
        raise LeaseInvalid(f"the value holds more than {MAX_NESTED} objects and lists")
    try:
        fields = _json_object(value)
    except ValueError as error:
        raise LeaseInvalid(str(error)) from None
    pop = fields.pop
    # flannel's alloc leaves its type out.
    backend_type = pop("BackendType", "")
    if type(backend_type) is not str:
        raise LeaseInvalid("BackendType is not a string")
    public_ip = _address(pop("PublicIP", None), "PublicIP", 4)
    if public_ip is None:
        raise LeaseInvalid("PublicIP is missing")
    mtu, name = pop("MTU", 0), pop("NodeName", "")
    return LeaseAttrs(
        public_ip if public_ip != NO_ADDRESS else None,
        # A few names and numbers in thousands of leases.
        sys.intern(backend_type),
        _vtep(pop("BackendData", None), "BackendData"),
        _address(pop("PublicIPv6", None), "PublicIPv6", 16),
        _vtep(pop("BackendV6Data", None), "BackendV6Data"),
        _KNOWN_MTUS.setdefault(mtu, mtu) if type(mtu) is int and mtu in MTUS else 0,
        name[:MAX_NAME] if type(name) is str else "",
        fields if extras and fields else NO_EXTRAS,
    )


NO_ADDRESS = bytes(4)
"""0.0.0.0, which is no host's."""

_KNOWN_MTUS: dict[int, int] = {}
"""One object for each number that leases have given; see MTUS for how many there can be."""


def _address(value: object, name: str, size: int) -> bytes | None:
    if value is None:
        return None
    if type(value) is not str:
        raise LeaseInvalid(f"{name} is not a string")
    try:
        packed = pack_address(value)
    except ValueError as error:
        raise LeaseInvalid(f"{name}: {error}") from None
    if len(packed) != size:
        raise LeaseInvalid(f"{name}: {value} is of the wrong address family")
    return packed


def _vtep(value: object, name: str) -> Vtep | None:
    """None for a backend that has no tunnel: null, or an object without VtepMAC."""
    if value is None:
        return None
    if type(value) is not dict:
        raise LeaseInvalid(f"{name} is not an object")
    if "VtepMAC" not in value:
        return None
    vni, mac = value.get("VNI", 0), value["VtepMAC"]
    if type(vni) is not int or not 0 <= vni < 1 << 24:
        raise LeaseInvalid(f"{name}.VNI is not a number of 24 bits")
    if type(mac) is not str:
        raise LeaseInvalid(f"{name}.VtepMAC is not a string")
    try:
        return Vtep(vni, pack_mac(mac))
    except ValueError as error:
        raise LeaseInvalid(f"{name}.VtepMAC: {error}") from None

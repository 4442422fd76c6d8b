"""The network configuration as a host takes it: whether it can be used here, and whether a change can be taken over.

Pure: what it says is for the caller to log or to refuse with.
"""

from collections.abc import Collection
from dataclasses import replace

from overlay.backends import V6, backend_of
from overlay.device import MAX_DEVICE_NAME, Underlay, device_name, occupied_links, overlay_mtu, tunnel_mtu
from subnet_lease.model import LIVE_SETTINGS, NetworkConfig, Prefix, changed_settings, format_address


class Unfit(ValueError):
    """This host cannot carry the configured network; the text is one clause for the operator."""


def usable(value: bytes) -> NetworkConfig:
    """The configuration, decoded; ConfigInvalid if no host could use it."""
    config = NetworkConfig.parse(value)
    backend_of(config)
    return config


def fit(
    config: NetworkConfig, underlay: Underlay, public: Collection[bytes] = (), own: Collection[Prefix] = ()
) -> Underlay:
    """The underlay with what concerns this overlay: addresses that it uses, links in its way. Unfit if it cannot work.

    `public` are packed addresses that others are to send to instead; `own` the subnets of this host's pods, whose links
    are in nobody's way.
    """
    backend = backend_of(config)
    families = [len(block.base) for block in config.blocks]
    used = underlay.carrying(families)
    for address in dict.fromkeys((*used.addresses, *public)):
        for block in config.blocks:
            if block.holds(address):
                raise Unfit(
                    f"Network: {block} contains this host's own address {format_address(address)}; "
                    "choose one that holds no host"
                )
    if backend.tunnels:
        for address in used.addresses:
            if len(name := device_name(config.backend.vni, len(address))) > MAX_DEVICE_NAME:
                raise Unfit(f"Backend.VNI: {name} is longer than the {MAX_DEVICE_NAME} characters Linux allows")
    elif backend.routes and V6 in families and used.address(V6) is None:
        raise Unfit(
            f"Backend.Type: {config.backend.type} routes IPv6 pods by IPv6 addresses of hosts, "
            f"and {used.name} has none; give it one, or use vxlan"
        )
    try:
        overlay_mtu(config, used, tunnels=backend.tunnels)
    except ValueError as error:
        raise Unfit(f"interface {used.name} cannot carry an overlay: {error}") from None
    return replace(used, links=occupied_links(used, config.blocks, own))


def remarks(config: NetworkConfig, underlay: Underlay) -> list[tuple[str, dict[str, object]]]:
    """What of the configuration has no effect here: events for the log with their facts."""
    found: list[tuple[str, dict[str, object]]] = []
    if config.unknown:
        found.append(("config_keys_unknown", {"keys": list(config.unknown)}))
    backend = backend_of(config)
    overheads = [len(address) for address in underlay.addresses] if backend.tunnels else []
    most = min((tunnel_mtu(underlay.mtu, 0, family) for family in overheads), default=underlay.mtu)
    if config.backend.mtu > most:
        reason = f"{underlay.name} carries no more; raise its MTU by {config.backend.mtu - most}, or lower Backend.MTU"
        found.append(("mtu_lowered", {"configured": config.backend.mtu, "mtu": most, "reason": reason}))
    return found


def fixed_changes(old: NetworkConfig, new: NetworkConfig) -> list[str]:
    """What of a change a running agent cannot take over, as words; empty if it can take over all."""
    changes = changed_settings(old, new)
    return [f"{name}: {before} -> {after}" for name, (before, after) in changes.items() if name not in LIVE_SETTINGS]


def all_changes(old: NetworkConfig, new: NetworkConfig) -> list[str]:
    """All that a change consists of, as words."""
    return [f"{name}: {before} -> {after}" for name, (before, after) in changed_settings(old, new).items()]

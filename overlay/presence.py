"""What this host says of itself in its lease, and what it is told from others by.

A host keeps its MACs for life, from its lease, else from the devices it has, else derived from its identity: flanneld
does not follow a change in every case. Pure: whatever it takes from the host is given to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from overlay.backends import V4, V6, backend_of
from overlay.device import Underlay, derived_mac, overlay_mtu
from subnet_lease.model import Lease, LeaseAttrs, NetworkConfig, Vtep, format_address, is_device_mac


@dataclass(slots=True)
class Presence:
    """Changes with `config` and `underlay`, which are set from outside.

    `public` are packed addresses that others are to send to instead of the underlay's own. `macs` are those of VXLAN
    devices that this host has already, by the length of their underlay addresses. `node_name` and `about` go into JSON
    keys of ours.
    """

    config: NetworkConfig
    underlay: Underlay
    public: tuple[bytes, ...]
    macs: Mapping[int, bytes]
    machine_id: str
    node_name: str = ""
    about: Mapping[str, str] = field(default_factory=dict)

    def address(self, family: int) -> bytes | None:
        """What others are to send to, of this family (length of an address); None if the underlay has none."""
        own = self.underlay.address(family)
        given = next((address for address in self.public if len(address) == family), own)
        return given if own is not None else None

    def attrs(self, previous: Lease | None) -> LeaseAttrs:
        """What to publish, given the lease that this host had before."""
        backend = backend_of(self.config)
        known = previous.attrs if previous else None
        return LeaseAttrs(
            public_ip=self.address(V4),
            backend_type=self.config.backend.type,
            vtep=self._vtep(V4, known.vtep if known else None) if backend.tunnels else None,
            public_ip6=self.address(V6),
            vtep6=self._vtep(V6, known.vtep6 if known else None) if backend.tunnels else None,
            mtu=overlay_mtu(self.config, self.underlay, tunnels=backend.tunnels),
            node_name=self.node_name,
            extra=self.about,
        )

    def _vtep(self, family: int, known: Vtep | None) -> Vtep | None:
        address, vni = self.address(family), self.config.backend.vni
        if address is None:
            return None
        if known is not None and is_device_mac(known.mac):
            return Vtep(vni, known.mac)
        derived = derived_mac(self.machine_id, format_address(address), str(vni))
        return Vtep(vni, self.macs.get(family, derived))

"""What this host's firewall must do for the overlay, as one nftables ruleset text.

Owns the table `inet overlay_agent`, whole. The text replaces the table in one transaction whatever stood there, so that
applying it twice, or after another version, ends in the same state.
"""

from subnet_lease.model import Prefix

TABLE = "inet overlay_agent"


def ruleset(network: Prefix, subnet: Prefix, device: str) -> str:
    """The masquerading of a host that holds `subnet` of `network`; applied with `nft -f`."""
    return f"""\
table {TABLE}
delete table {TABLE}
table {TABLE} {{
  chain forward {{
    type filter hook forward priority filter; policy accept;
    ip saddr {network} accept comment "from pods"
    ip daddr {network} accept comment "to pods"
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    meta mark & 0x4000 == 0x4000 return comment "kube-proxy masquerades these itself"
    ip saddr {network} ip daddr {network} return comment "pod to pod keeps its address"
    ip saddr {network} ip daddr 224.0.0.0/4 return comment "multicast"
    ip saddr {network} oifname != "{device}" masquerade fully-random comment "pods leaving the overlay"
    ip saddr != {network} ip daddr {subnet} return comment "to our own pods from outside"
    ip saddr != {network} oifname "{device}" masquerade fully-random comment "into the tunnel from outside"
  }}
}}
"""


def removal() -> str:
    """The ruleset that leaves nothing of ours; no error where nothing was."""
    return f"table {TABLE}\ndelete table {TABLE}\n"

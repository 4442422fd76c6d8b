"""Our table, complete: as the agent makes it once it knows the hosts of the cluster."""

from collections.abc import Iterable

from overlay import firewall
from overlay.firewall import Rules
from subnet_lease.model import format_address


def complete(rules: Rules, hosts: Iterable[bytes] = ()) -> str:
    """The text for `nft -f` that replaces the table, with the packed addresses `hosts` in its sets."""
    added = (
        f"add element {firewall.TABLE} {firewall.SETS[len(address)]} {{ {format_address(address)} }}\n"
        for address in hosts
    )
    return (
        firewall.removal()
        + firewall.preparation(rules)
        + "".join(added if rules.wanted else ())
        + firewall.ruleset(rules)
    )

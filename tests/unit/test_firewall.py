"""The ruleset as text; what it does to packets is tested in network namespaces."""

from overlay.firewall import TABLE, removal, ruleset
from subnet_lease.model import Prefix


def test_ruleset_replaces_the_whole_table_whatever_stood_there() -> None:
    text = ruleset(Prefix.parse("10.0.0.0/8"), Prefix.parse("10.0.1.0/24"), "flannel.1")
    lines = text.splitlines()
    assert lines[:3] == [f"table {TABLE}", f"delete table {TABLE}", f"table {TABLE} {{"]
    assert text.endswith("}\n")
    assert text.count("{") == text.count("}")


def test_ruleset_names_network_subnet_and_device() -> None:
    text = ruleset(Prefix.parse("10.0.0.0/8"), Prefix.parse("10.0.1.0/24"), "flannel.7")
    assert "ip saddr 10.0.0.0/8 ip daddr 10.0.0.0/8 return" in text
    assert 'ip saddr 10.0.0.0/8 oifname != "flannel.7" masquerade' in text
    assert "ip daddr 10.0.1.0/24 return" in text


def test_removal_is_the_beginning_of_the_ruleset() -> None:
    text = ruleset(Prefix.parse("10.0.0.0/8"), Prefix.parse("10.0.1.0/24"), "flannel.1")
    assert text.startswith(removal())

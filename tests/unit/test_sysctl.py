"""The ledger of kernel settings: what `cleanup` puts back, and what it leaves. The kernel here is a directory."""

import json
from pathlib import Path

import pytest

from overlay import sysctl
from overlay.sysctl import Absent, Change, Ledger, Refused

FORWARD, ACCEPT = "net.ipv4.ip_forward", "net.ipv6.conf.eth0.accept_ra"
UNDONE = Change(FORWARD, "1", "0")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "sys"
    for name, value in ((FORWARD, "0"), (ACCEPT, "1"), ("kernel.random.boot_id", "first-boot")):
        path = root.joinpath(*name.split("."))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return root


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "sysctl.json"


def value(root: Path, name: str, new: str = "") -> str:
    """Of a setting, after somebody has made it `new`."""
    path = root.joinpath(*name.split("."))
    if new:
        path.write_text(f"{new}\n")
    return path.read_text().strip()


def test_what_was_changed_is_put_back_by_a_later_process(root: Path, file: Path) -> None:
    assert sysctl.enable_forwarding(root, Ledger(file, root)) == Change(FORWARD, "0", "1")
    assert Ledger(file, root).restore() == [UNDONE]
    assert value(root, FORWARD) == "0"
    assert not file.exists()
    assert Ledger(file, root).restore() == []


def test_later_starts_do_not_take_our_own_value_for_the_original(root: Path, file: Path) -> None:
    for _ in range(3):
        sysctl.ensure(ACCEPT, "2", root, Ledger(file, root))
    value(root, ACCEPT, "0")
    sysctl.ensure(ACCEPT, "2", root, Ledger(file, root))
    assert Ledger(file, root).changes == (Change(ACCEPT, "1", "2"),)


def test_the_last_change_is_put_back_first(root: Path, file: Path) -> None:
    sysctl.ensure(ACCEPT, "2", root, Ledger(file, root))
    sysctl.ensure(FORWARD, "1", root, Ledger(file, root))
    assert [change.name for change in Ledger(file, root).restore()] == [FORWARD, ACCEPT]


def test_what_was_right_before_us_stays(root: Path, file: Path) -> None:
    value(root, FORWARD, "1")
    assert sysctl.enable_forwarding(root, Ledger(file, root)) is None
    assert Ledger(file, root).restore() == []
    assert value(root, FORWARD) == "1"


def test_what_somebody_has_changed_since_stays(root: Path, file: Path) -> None:
    sysctl.ensure(ACCEPT, "2", root, Ledger(file, root))
    value(root, ACCEPT, "0")
    assert Ledger(file, root).restore() == []
    assert value(root, ACCEPT) == "0"
    assert not file.exists()


def test_a_setting_that_went_with_its_device_is_no_concern(root: Path, file: Path) -> None:
    sysctl.ensure(ACCEPT, "2", root, Ledger(file, root))
    root.joinpath(*ACCEPT.split(".")).unlink()
    assert Ledger(file, root).restore() == []
    assert sysctl.ensure(ACCEPT, "2", root, Ledger(file, root)) == Absent(ACCEPT)


def test_after_a_boot_the_settings_are_the_operators_again(root: Path, file: Path) -> None:
    sysctl.enable_forwarding(root, Ledger(file, root))
    value(root, "kernel.random.boot_id", "second-boot")
    assert Ledger(file, root).restore() == []
    assert value(root, FORWARD) == "1"
    assert not file.exists()


def test_a_refused_change_is_not_remembered(root: Path, file: Path) -> None:
    value(root, FORWARD, "000")  # Longer than what is written over it: the "kernel" keeps some of it.
    assert isinstance(sysctl.enable_forwarding(root, Ledger(file, root)), Refused)
    assert Ledger(file, root).changes == ()
    assert not file.exists()


def test_what_cannot_be_put_back_is_told_and_remembered(root: Path, file: Path) -> None:
    file.write_text(json.dumps({"life": Ledger(file, root)._life, "changes": [[FORWARD, "0", "000"]]}))
    value(root, FORWARD, "000")
    (refused,) = Ledger(file, root).restore()
    assert isinstance(refused, Refused)
    assert refused.remedy == f"sysctl -w {FORWARD}=0"
    assert Ledger(file, root).changes == (Change(FORWARD, "0", "000"),)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"life": 1}', "\0\xff", '{"life": "LIFE", "changes": [[1]]}'])
def test_an_unreadable_record_restores_nothing(root: Path, file: Path, content: str) -> None:
    file.write_text(content.replace("LIFE", Ledger(file, root)._life), encoding="latin-1")
    assert Ledger(file, root).restore() == []


def test_a_setting_is_made_though_it_cannot_be_recorded_and_that_is_told(root: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.touch()
    ledger = Ledger(state / "settings.json", root)
    assert sysctl.enable_forwarding(root, ledger) == Change(FORWARD, "0", "1")
    assert "cannot be written: " in ledger.problem
    state.unlink()
    sysctl.ensure(ACCEPT, "2", root, ledger)
    assert ledger.problem == ""
    assert len(Ledger(state / "settings.json", root).changes) == 2


def test_a_kernel_without_ipv6_has_nothing_to_set(root: Path) -> None:
    assert sysctl.enable_ipv6_forwarding("eth1", root, routes=root / "none") == [Absent("net.ipv6.conf.all.forwarding")]

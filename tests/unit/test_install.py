"""`make install` and `make uninstall`: what lies where afterwards. Without the program, which needs a network."""

import configparser
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

EXAMPLE = "etc/overlay-agent/overlay-agent.toml"
FILES = {
    "etc/NetworkManager/conf.d/90-overlay-agent.conf": "deploy/network/NetworkManager.conf",
    "etc/systemd/network/05-overlay-agent.link": "deploy/network/overlay-agent.link",
    "etc/systemd/network/05-overlay-agent.network": "deploy/network/overlay-agent.network",
    "etc/systemd/networkd.conf.d/90-overlay-agent.conf": "deploy/network/networkd.conf",
    "etc/systemd/system/overlay-agent.service": "deploy/overlay-agent.service",
    EXAMPLE: "deploy/overlay-agent.toml",
}


def make(*arguments: str) -> None:
    done = subprocess.run(["make", "-s", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def tree(root: Path) -> dict[str, str]:
    """Content by path of all files."""
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if not path.is_dir()}


def test_each_file_lies_where_its_program_looks_for_it(tmp_path: Path) -> None:
    make("install-files", f"DESTDIR={tmp_path}")
    assert tree(tmp_path) == {path: (ROOT / source).read_text() for path, source in FILES.items()}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()} == {0o644}


def test_options_of_an_operator_survive_installing_and_removing(tmp_path: Path) -> None:
    (tmp_path / EXAMPLE).parent.mkdir(parents=True)
    (tmp_path / EXAMPLE).write_text("ip-masq = true\n")
    make("install-files", f"DESTDIR={tmp_path}")
    make("uninstall", f"DESTDIR={tmp_path}")
    assert tree(tmp_path) == {EXAMPLE: "ip-masq = true\n"}


def test_the_unit_starts_the_program_below_the_prefix(tmp_path: Path) -> None:
    make("install-files", f"DESTDIR={tmp_path}", "prefix=/opt/overlay")
    unit = (tmp_path / "etc/systemd/system/overlay-agent.service").read_text()
    assert "\nExecStart=/opt/overlay/bin/overlay-agent run\n" in unit


@pytest.mark.parametrize(
    ("file", "section", "key", "separator"),
    [
        ("NetworkManager.conf", "keyfile", "unmanaged-devices+", ";interface-name:"),
        ("overlay-agent.network", "Match", "Name", " "),
        ("overlay-agent.link", "Match", "OriginalName", " "),
    ],
)
def test_all_managers_are_kept_off_the_same_interfaces(file: str, section: str, key: str, separator: str) -> None:
    settings = configparser.RawConfigParser()
    settings.optionxform = str  # type: ignore[assignment,method-assign]
    settings.read(ROOT / "deploy/network" / file)
    names = settings[section][key].removeprefix("interface-name:").split(separator)
    assert names == ["flannel.*", "flannel-v6.*", "cni0", "veth*"]
    assert f"\ndenyinterfaces {' '.join(names)}\n" in (ROOT / "deploy/network/dhcpcd.conf").read_text()


def test_each_file_is_explained_with_its_destination() -> None:
    page = (ROOT / "docs/host.md").read_text()
    for path, source in FILES.items():
        if source.startswith("deploy/network/"):
            assert f"| `{Path(source).name}` | `/{path}` |" in page
            assert (ROOT / source).read_text().startswith(f"# /{path}\n")

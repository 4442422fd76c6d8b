"""The systemd unit: systemd itself finds no fault with it, and rates what it leaves exposed."""

import configparser
import os
import re
import subprocess
from pathlib import Path

import pytest

from overlay import options

UNIT = Path(__file__).parents[2] / "deploy" / "overlay-agent.service"
EXECUTABLE = "/usr/local/bin/overlay-agent"

EXPOSURE_BOUND = 1.9
"""systemd 252's figure, of 10 for a service without any protection. What is left: root, its two capabilities, the
host's network, and the socket families the work consists of."""


class Repeated(dict):  # type: ignore[type-arg]
    """Keeps all values of a key that stands several times, as systemd does."""

    def __setitem__(self, key: str, value: object) -> None:
        if isinstance(value, list) and isinstance(self.get(key), list):
            self[key].extend(value)
        else:
            super().__setitem__(key, value)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The unit with a program that exists on this machine; nothing else is changed."""
    copy = tmp_path / UNIT.name
    text = UNIT.read_text()
    assert f"ExecStart={EXECUTABLE} run\n" in text
    copy.write_text(text.replace(EXECUTABLE, "/bin/true"))
    return copy


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"SYSTEMD_COLORS": "0", "LC_ALL": "C.UTF-8"}
    command = ["systemd-analyze", "--no-pager", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60, check=False)


def settings(section: str) -> dict[str, str]:
    parser = configparser.RawConfigParser(strict=False, dict_type=Repeated)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return dict(parser[section])


def test_systemd_has_no_complaint(installed: Path) -> None:
    verified = analyze("verify", "--man=no", str(installed))
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")


def test_the_exposure_is_below_the_bound(installed: Path) -> None:
    rated = analyze("security", "--offline=true", f"--threshold={int(EXPOSURE_BOUND * 10)}", str(installed))
    found = re.search(r"Overall exposure level for overlay-agent\.service: ([0-9.]+)", rated.stdout)
    assert found is not None, rated.stderr
    assert float(found[1]) <= EXPOSURE_BOUND, rated.stdout
    assert rated.returncode == 0


def test_the_service_holds_two_capabilities_and_no_more() -> None:
    service = settings("Service")
    assert service["CapabilityBoundingSet"] == "CAP_NET_ADMIN CAP_NET_RAW"
    assert "AmbientCapabilities" not in service


def test_what_the_agent_writes_is_writable_and_survives_a_stop() -> None:
    service = settings("Service")
    assert service["ProtectSystem"] == "strict"
    directories = {f"/run/{name}" for name in service["RuntimeDirectory"].split()}
    assert str(Path(options.Options().subnet_file).parent) in directories
    assert service["RuntimeDirectoryPreserve"] == "yes"
    assert "/proc/sys/net" in service["ReadWritePaths"].split()


def test_the_unit_does_not_retry_what_cannot_mend_itself() -> None:
    service = settings("Service")
    assert service["Restart"] == "always"
    assert service["RestartPreventExitStatus"] == str(options.EXIT_UNUSABLE_OPTIONS)
    assert settings("Unit")["StartLimitIntervalSec"] == "0"

"""Checks before the start, and kernel settings: against files, and against this machine's kernel in a namespace."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from overlay import preflight, sysctl
from overlay.sysctl import Absent, Change, Refused

ROOT = Path(__file__).parents[2]


def in_namespace(code: str, *, wrap: Sequence[str] = (), prepare: str = "true") -> object:
    """What `code` leaves in `result`, run by a process in a network and mount namespace of its own."""
    script = f"import json\nfrom overlay import preflight, sysctl\n{code}\nprint(json.dumps(result))"
    shell = f'{prepare} && exec {" ".join(wrap)} "$0" -c "$1"'
    command = ["unshare", "--net", "--mount", "sh", "-c", shell, sys.executable, script]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


# --- capabilities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("effective", "missing"),
    [
        ("000001ffffffffff", []),
        ("0000000000003000", []),
        ("0000000000001000", ["CAP_NET_RAW"]),
        ("0000000000002000", ["CAP_NET_ADMIN"]),
        ("0000000000000000", ["CAP_NET_ADMIN", "CAP_NET_RAW"]),
    ],
)
def test_capabilities_are_read_from_the_effective_set(effective: str, missing: list[str]) -> None:
    assert preflight.missing_capabilities(f"Uid:\t0\nCapPrm:\tffff\nCapEff:\t{effective}\n") == missing


def test_without_a_status_no_capability_is_assumed() -> None:
    assert preflight.missing_capabilities("") == ["CAP_NET_ADMIN", "CAP_NET_RAW"]


def test_missing_capabilities_are_named_with_the_flags_of_a_container() -> None:
    problem = preflight.capability_problem(["CAP_NET_ADMIN", "CAP_NET_RAW"])
    assert problem is not None
    assert problem.what == "this process lacks CAP_NET_ADMIN and CAP_NET_RAW"
    assert "--cap-add NET_ADMIN --cap-add NET_RAW" in problem.remedy
    assert preflight.capability_problem([]) is None


# --- files and programs ------------------------------------------------------------------------------------------


def test_a_subnet_file_may_be_written_where_its_directory_can_be_made(tmp_path: Path) -> None:
    assert preflight.directory_problem(str(tmp_path / "a" / "b" / "subnet.env")) is None
    assert list(tmp_path.iterdir()) == []


def test_a_subnet_file_below_a_file_or_in_place_of_a_directory_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    below = preflight.directory_problem(str(tmp_path / "file" / "subnet.env"))
    assert below is not None
    assert below.what == f"{tmp_path}/file is not a directory, so {tmp_path}/file/subnet.env cannot be written"
    in_place = preflight.directory_problem(str(tmp_path))
    assert in_place is not None
    assert "is a directory" in in_place.what


def test_nft_is_looked_for_in_the_search_path(tmp_path: Path) -> None:
    problem = preflight.nft_problem(str(tmp_path))
    assert problem is not None
    assert "apt install nftables" in problem.remedy
    (tmp_path / "nft").touch(mode=0o755)
    assert preflight.nft_problem(str(tmp_path)) is None


def test_forwarding_is_no_problem_where_it_is_on_or_can_be_switched_on(tmp_path: Path) -> None:
    setting = tmp_path / "ip_forward"
    setting.write_text("0\n")
    assert preflight.forwarding_problem(setting) is None
    absent = preflight.forwarding_problem(tmp_path / "none")
    assert absent is not None
    assert "cannot be read" in absent.what


def test_the_report_lists_what_is_missing_and_the_way_to_mend_it() -> None:
    text = preflight.report([preflight.Problem("a is missing", "Install a."), preflight.Problem("no b", "Do b.")])
    assert text == ("cannot run here; 2 things are missing:\n  - a is missing\n    Install a.\n  - no b\n    Do b.")
    assert "1 thing is missing:" in preflight.report([preflight.Problem("a", "b")])


# --- this machine's kernel ---------------------------------------------------------------------------------------


@pytest.mark.netns
def test_a_host_that_has_everything_has_no_problem_and_keeps_no_trace() -> None:
    result = in_namespace(
        "import os\nbefore = os.listdir('/sys/class/net')\n"
        "found = preflight.problems('/tmp/subnet.env', nft=True)\n"
        "result = [str(found), before == os.listdir('/sys/class/net')]",
        prepare="mount -t sysfs sysfs /sys",
    )
    assert result == ["[]", True]


@pytest.mark.netns
def test_a_kind_of_device_that_the_kernel_lacks_is_told_from_one_it_has() -> None:
    result = in_namespace("result = [str(preflight.vxlan_problem(kind)) for kind in ('vxlan', 'nosuchkind')]")
    assert isinstance(result, list)
    assert result[0] == "None"
    assert "this kernel has no VXLAN" in result[1]
    assert "modprobe vxlan" in result[1]


@pytest.mark.netns
def test_a_process_without_capabilities_learns_of_these_and_of_nothing_misleading() -> None:
    result = in_namespace(
        "result = [preflight.missing_capabilities(open('/proc/self/status').read()),"
        " [problem.what for problem in preflight.problems('/tmp/subnet.env', nft=False)],"
        " preflight.vxlan_problem('vxlan').what]",
        wrap=["setpriv", "--bounding-set=-all", "--inh-caps=-all"],
    )
    assert isinstance(result, list)
    assert result[0] == ["CAP_NET_ADMIN", "CAP_NET_RAW"]
    assert "this process lacks CAP_NET_ADMIN and CAP_NET_RAW" in result[1]
    assert not any("VXLAN" in what for what in result[1])
    assert result[2] == "the kernel does not tell whether it has VXLAN: operation not permitted"


@pytest.mark.netns
def test_the_two_capabilities_are_enough_for_all_checks_and_for_forwarding() -> None:
    result = in_namespace(
        "result = [str(preflight.problems('/tmp/subnet.env', nft=True)), str(sysctl.enable_forwarding()),"
        " str(sysctl.enable_forwarding()), sysctl.read('net.ipv4.ip_forward')]",
        wrap=["setpriv", "--bounding-set=-all,+net_admin,+net_raw", "--no-new-privs"],
    )
    change = "Change(name='net.ipv4.ip_forward', before='0', after='1')"
    assert result == ["[]", change, "None", "1"]


@pytest.mark.netns
def test_a_read_only_proc_sys_is_told_with_the_command_that_helps() -> None:
    result = in_namespace(
        "refused = sysctl.enable_forwarding()\n"
        "found = preflight.problems('/sys/subnet.env', nft=False)\n"
        "result = [refused.reason, refused.remedy, [problem.what for problem in found]]",
        prepare="mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys"
        " && mount -t sysfs -o ro sysfs /sys",
    )
    assert result == [
        "/proc/sys is read-only here",
        "sysctl -w net.ipv4.ip_forward=1",
        [
            "IPv4 forwarding is off and cannot be switched on from here",
            "/sys is not writable, so /sys/subnet.env cannot be written",
        ],
    ]


@pytest.mark.netns
def test_router_advertisements_are_ignored_on_a_device_with_a_dot_in_its_name() -> None:
    result = in_namespace(
        "first = sysctl.ignore_router_advertisements('flannel.7')\n"
        "result = [str(first), str(sysctl.ignore_router_advertisements('flannel.7')),"
        " str(sysctl.ignore_router_advertisements('gone.7'))]",
        prepare="ip link add flannel.7 type vxlan id 7 dstport 8472",
    )
    assert result == ["Change(name='net.ipv6.conf.flannel/7.accept_ra', before='1', after='0')", "None", "None"]


@pytest.mark.netns
def test_forwarding_stays_off_where_the_advertised_default_route_cannot_be_kept() -> None:
    own = "/proc/sys/net/ipv6/conf/eth0"
    result = in_namespace(
        "found = sysctl.enable_ipv6_forwarding('eth0')\n"
        "result = [[refused.remedy for refused in found], sysctl.read('net.ipv6.conf.all.forwarding')]",
        prepare=f"ip link add eth0 type veth && mount --bind {own} {own} && mount -o remount,bind,ro {own}",
    )
    assert result == [["sysctl -w net.ipv6.conf.eth0.accept_ra=2"], "0"]


# --- kernel settings as files ------------------------------------------------------------------------------------


def test_a_setting_is_changed_once_and_both_values_are_told(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "a").write_text("0\n")
    assert sysctl.ensure("net.a", "1", tmp_path) == Change("net.a", "0", "1")
    assert sysctl.ensure("net.a", "1", tmp_path) is None
    assert sysctl.ensure("net.b", "1", tmp_path) == Absent("net.b")
    assert sysctl.ignore_router_advertisements("flannel.1", tmp_path) is None


def test_a_setting_that_does_not_take_the_value_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "a"
    # A file is not truncated by the write, as the kernel's settings need none: the longer old value shows through.
    target.write_text("123")
    assert sysctl.ensure("a", "9", tmp_path) == Refused("a", "923", "9", "the kernel kept its value")


@pytest.mark.parametrize("name", ["", ".", "net..a", "net./..a"])
def test_a_name_that_would_leave_proc_sys_is_a_mistake_of_the_caller(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no kernel setting"):
        sysctl.read(name, tmp_path)


def test_the_search_path_of_the_process_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = [problem.what for problem in preflight.problems(str(tmp_path / "subnet.env"), nft=True)]
    assert "the program nft is not installed, and firewall rules are wanted" in found
    assert os.environ["PATH"] == str(tmp_path)

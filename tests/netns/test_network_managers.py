"""Network managers and our device: real ones, in namespaces, with the files that `make install` puts in place.

systemd-networkd, dhcpcd and udev are set up to manage every interface, as a file of an operator's or of a
distribution's may.
"""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overlay.cluster import wait_until
from tests.netns.namespace import index_of, ip, ip_json, new_namespace, sh

ROOT = Path(__file__).parents[2]
NETWORKD = "/usr/lib/systemd/systemd-networkd"

UNDERLAY = "[Match]\nName=eth0\n[Network]\nAddress=192.0.2.1/24\nLinkLocalAddressing=no\n"
CATCH_ALL = "[Match]\nName=*\n[Network]\nLinkLocalAddressing=no\nConfigureWithoutCarrier=yes\n"

# /run and /sys of its own: networkd takes from there what udev has told of interfaces. $1 is what was installed.
PREPARE = """
mount -t sysfs sysfs /sys && mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /etc/systemd/network
mkdir -p /run/systemd /run/udev/data
for part in netif netif/links netif/leases netif/lldp; do
  install -d -o systemd-network -g systemd-network /run/systemd/$part
done
cp -r "$1"/etc/systemd/network "$1"/etc/systemd/networkd.conf.d /run/systemd/
for index in /sys/class/net/*/ifindex; do echo I:1 > /run/udev/data/n$(cat $index); done
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """What `make install` puts below /etc, with what an operator may have there for interfaces of his."""
    subprocess.run(["make", "-s", "install-files", f"DESTDIR={tmp_path}"], cwd=ROOT, check=True, timeout=60)
    (tmp_path / "etc/systemd/network/10-underlay.network").write_text(UNDERLAY)
    (tmp_path / "etc/systemd/network/50-all.network").write_text(CATCH_ALL)
    return tmp_path


@pytest.fixture(autouse=True)
def host() -> Iterator[None]:
    """Our device with an entry of each kind, one peer that is reached without the tunnel, and a pod's veth."""
    with new_namespace():
        for line in (
            "link add eth0 type veth peer name switch",
            "addr add 192.0.2.1/24 dev eth0",
            "link set switch up",
            "link set eth0 up",
            "link add flannel.1 type vxlan id 1 dev eth0 local 192.0.2.1 dstport 8472 nolearning",
            "addr add 10.9.1.0/32 dev flannel.1",
            "link set flannel.1 up",
            "neigh add 10.9.2.0 lladdr 02:00:00:00:01:02 dev flannel.1 nud permanent",
            "nexthop add id 77 via 10.9.2.0 dev flannel.1 onlink proto 111",
            "route add 10.9.2.0/24 nhid 77 proto 111",
            "route add 10.9.3.0/24 via 192.0.2.3 dev eth0 proto 111",
            "link add cni0 type bridge",
            "addr add 10.9.1.1/24 dev cni0",
            "link set cni0 up",
            "link add veth0a1b2c3d type veth peer name pod",
            "link set veth0a1b2c3d master cni0 up",
            "link set pod up",
        ):
            ip(line)
        yield


def state() -> dict[str, set[str]]:
    """What an overlay stands on, as iproute2 tells it."""
    addresses = [(link["ifname"], address) for link in ip_json("-4 addr show") for address in link["addr_info"]]
    return {
        "addresses": {f"{name} {each['local']}/{each['prefixlen']}" for name, each in addresses if name != "lo"},
        "routes": {f"{route['dst']} protocol {route.get('protocol')}" for route in ip_json("route show")},
        "nexthops": {str(hop["id"]) for hop in ip_json("nexthop show")},
        "neighbours": {entry["dst"] for entry in ip_json("neigh show dev flannel.1 nud permanent")},
        "bridged": {port["ifname"] for port in json.loads(sh("bridge", "-j", "link") or "[]")},
    }


@contextmanager
def networkd(installed: Path) -> Iterator[str]:
    """systemd-networkd has gone through all interfaces, as after each of its starts. Yields what it complained of."""
    log = installed / "log"
    command = ["unshare", "--mount", "sh", "-e", "-c", f"{PREPARE}\nexec {NETWORKD}", "sh", str(installed)]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SYSTEMD_LOG_LEVEL": "warning", "SYSTEMD_LOG_COLOR": "0"}
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as daemon:
        links = Path(f"/proc/{daemon.pid}/root/run/systemd/netif/links")

        def settled(name: str) -> bool:
            assert daemon.poll() is None, log.read_text()
            try:
                told = (links / str(index_of(name))).read_text()
            except FileNotFoundError:
                return False
            return re.search(r"^ADMIN_STATE=(configured|unmanaged)$", told, re.MULTILINE) is not None

        try:
            for name in ("eth0", "flannel.1", "cni0", "veth0a1b2c3d"):
                wait_until(lambda name=name: settled(name), 30, f"networkd has dealt with {name}")  # type: ignore[misc]
            yield log.read_text()
        finally:
            daemon.terminate()


def test_networkd_leaves_all_of_an_overlay_as_it_is(installed: Path) -> None:
    before = state()
    with networkd(installed):
        assert state() == before


def test_networkd_would_remove_an_overlay_that_a_file_of_its_own_matches(installed: Path) -> None:
    (installed / "etc/systemd/network/05-overlay-agent.network").unlink()
    with networkd(installed):
        assert state()["nexthops"] == state()["bridged"] == set()
        assert state()["addresses"] == {"eth0 192.0.2.1/24"}


def test_networkd_would_remove_routes_on_the_underlay(installed: Path) -> None:
    (installed / "etc/systemd/networkd.conf.d/90-overlay-agent.conf").unlink()
    before = state()
    with networkd(installed):
        assert before["routes"] - state()["routes"] == {"10.9.3.0/24 protocol 111"}


def test_networkd_understands_the_files(installed: Path) -> None:
    with networkd(installed) as complaints:
        # Known since systemd 256.
        assert [line for line in complaints.splitlines() if "ManageForeignNextHops" not in line] == []


@pytest.mark.parametrize("name", ["flannel.1", "flannel-v6.1", "cni0", "veth0a1b2c3d"])
def test_udev_keeps_name_and_mac(installed: Path, name: str) -> None:
    if name == "flannel-v6.1":
        ip("link add flannel-v6.1 type vxlan id 1 dstport 8473")
    before = ip_json(f"link show {name}")[0]["address"]
    assert setup_file(installed, name) == "/run/systemd/network/05-overlay-agent.link"
    assert ip_json(f"link show {name}")[0]["address"] == before


def test_udev_would_change_the_mac_of_a_device_that_was_made_without_one(installed: Path) -> None:
    (installed / "etc/systemd/network/05-overlay-agent.link").unlink()
    before = ip_json("link show flannel.1")[0]["address"]
    assert setup_file(installed, "flannel.1").endswith("/99-default.link")
    assert ip_json("link show flannel.1")[0]["address"] != before


def setup_file(installed: Path, name: str) -> str:
    """Have udev set up an interface as when it appears; the file that it went by."""
    script = f'{PREPARE}\nexec udevadm test-builtin net_setup_link "/sys/class/net/$2"'
    # Device ids of an earlier udev would tell it that all has been done.
    script = script.replace("I:1", "")
    output = sh("unshare", "--mount", "sh", "-e", "-c", script, "sh", str(installed), name)
    found = re.search(r"^ID_NET_LINK_FILE=(.*)$", output, re.MULTILINE)
    assert found, output
    return found[1]


# --- dhcpcd --------------------------------------------------------------------------------------------------------


@contextmanager
def dhcpcd(configuration: Path) -> Iterator[Callable[[], str]]:
    """dhcpcd has begun to look for a server behind eth0. Yields what reads its log."""
    log = configuration.with_name("log")
    # Of udev, which is none of this namespace's, it is to know nothing.
    configuration.write_text(configuration.read_text() + "nodev\n")
    # Its socket, its leases and its process id stay in here; its hooks, which would write /etc/resolv.conf, do not run.
    script = """
    mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /var/lib && mount --bind -o ro /etc /etc
    exec dhcpcd --nobackground --debug --script /bin/true -f "$1"
    """
    command = ["unshare", "--mount", "sh", "-e", "-c", script, "sh", str(configuration)]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as daemon:

        def asks() -> bool:
            assert daemon.poll() is None, log.read_text()
            return "eth0: sending DISCOVER" in log.read_text()

        try:
            wait_until(asks, 30, "dhcpcd at work on eth0")
            yield log.read_text
        finally:
            daemon.terminate()


def test_dhcpcd_asks_for_no_address_on_what_the_overlay_is_made_of(tmp_path: Path) -> None:
    configuration = tmp_path / "dhcpcd.conf"
    configuration.write_text((ROOT / "deploy/network/dhcpcd.conf").read_text())
    before = state()
    with dhcpcd(configuration) as log:
        for name in ("eth0", "switch", "pod"):
            wait_until(lambda name=name: f"{name}: soliciting a DHCP lease" in log(), 30, name)  # type: ignore[misc]
        assert not re.search(r"^(flannel|cni0|veth)", log(), re.MULTILINE)
        assert state() == before


@pytest.mark.parametrize("name", ["flannel.1", "cni0", "veth0a1b2c3d"])
def test_dhcpcd_would_ask_for_an_address_on_all_of_it(tmp_path: Path, name: str) -> None:
    configuration = tmp_path / "dhcpcd.conf"
    configuration.touch()
    with dhcpcd(configuration) as log:
        wait_until(lambda: f"{name}: soliciting a DHCP lease" in log(), 30, f"dhcpcd at work on {name}")

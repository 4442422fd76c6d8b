"""Doctor on real hosts: its archive, what it asks of the host, and that it changes nothing."""

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overlay import arp, processes
from overlay.cluster import Host, Lab, wait_until
from overlay.commands.examination import is_agent
from overlay.doctor import CHECKS
from subnet_lease.model import LeaseAttrs, Prefix, Vtep, encode_attrs, pack_address, pack_mac, subnet_key
from tests.netns.faults_seen import AGENT

SECRETS = {
    "password": "Pa55word-of-the-agent",
    "url": "Cr3dential-in-a-url",
    "command": "0ther-tools-passw0rd",
    "variable": "T0ken-in-the-environment",
    "key": "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgSecretKeyMaterial",
}


def ask(host: Host, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Doctor on this host, with these variables."""
    return subprocess.run(
        host.inside(*AGENT, "doctor", *options), capture_output=True, text=True, env={**os.environ, **variables}
    )


def unpacked(path: Path) -> dict[str, str]:
    with tarfile.open(path) as tar:
        return {about.name.partition("/")[2]: tar.extractfile(about).read().decode() for about in tar}


@contextmanager
def running(host: Host, *argv: str) -> Iterator[None]:
    with subprocess.Popen(host.inside(*argv)) as process:
        try:
            wait_until(lambda: host.netns and Path(f"/proc/{process.pid}/cmdline").exists(), 10, "a process")
            yield
        finally:
            process.kill()


# --- the command -------------------------------------------------------------------------------------------------


def test_people_read_one_line_when_all_is_well_and_every_check_with_verbose(shared_lab: Lab) -> None:
    brief, verbose = (
        ask(host, *options) for host, options in zip(shared_lab.hosts, [(), ("--verbose",)], strict=False)
    )
    assert (brief.returncode, brief.stderr) == (0, "")
    assert brief.stdout.endswith(": nothing is wrong.\n")
    assert brief.stdout.count("\n") == 1
    assert verbose.stdout.count("\nok ") + verbose.stdout.startswith("ok ") == len(CHECKS)


def test_nothing_is_changed_by_looking(shared_lab: Lab) -> None:
    h1 = shared_lab.hosts[0]

    def shown() -> list[str]:
        commands = [
            "ip link",
            "ip -d link show type vxlan",
            "ip addr",
            "ip route show table all",
            "ip rule",
            "ip nexthop",
            "bridge fdb",
        ]
        commands += ["nft -t list ruleset", "sysctl net.ipv4.ip_forward net.ipv4.conf.all.rp_filter"]
        return [h1.run(*command.split()).stdout for command in commands]

    before, leases = shown(), [(lease.key, lease.mod_revision) for lease in shared_lab.leases()]
    document = json.loads(ask(h1, "--json").stdout)
    assert (document["findings"], document["unknown"]) == ([], [])
    assert shown() == before
    assert [(lease.key, lease.mod_revision) for lease in shared_lab.leases()] == leases


def test_without_anything_it_says_what_it_can_see(make_lab) -> None:
    lab = make_lab(hosts=1, pods=0)
    lab.make_network()
    done = ask(lab.hosts[0], "--config", os.devnull, "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (1, "")
    assert {each["cause"] for each in document["findings"]} == {"agent_not_running", "etcd_unreachable"}
    assert document["took_s"] < 10


def test_wrong_usage_is_told_apart(shared_lab: Lab) -> None:
    h1 = shared_lab.hosts[0]
    assert ask(h1, "--nonsense").returncode == 2
    refused = ask(h1, "--bundle", "/nowhere/at/all.tar.gz")
    assert refused.returncode == 2
    assert (
        refused.stderr
        == "overlay-agent: --bundle: /nowhere/at/all.tar.gz cannot be written: no such file or directory\n"
    )
    assert ask(h1, "--bundle", "/tmp").returncode == 2


# --- the archive -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive(shared_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an archive made while secrets were all over the host."""
    h1, directory = shared_lab.hosts[0], tmp_path_factory.mktemp("bundle")
    password, key = directory / "password", directory / "agent.key"
    password.write_text(f"{SECRETS['password']}\n")
    password.chmod(0o600)
    key.write_text(f"-----BEGIN PRIVATE KEY-----\n{SECRETS['key']}\n-----END PRIVATE KEY-----\n")
    # A lease that anybody may have written; a rule with a comment; a tool with a password on its command line.
    attrs = LeaseAttrs(
        pack_address("172.30.200.250"),
        "vxlan",
        Vtep(1, pack_mac("02:00:00:00:09:fa")),
        extra={"NodeName": SECRETS["password"]},
    )
    key_of_lease = subnet_key(Prefix.parse("10.244.250.0/24"))
    assert shared_lab.store.create(key_of_lease, encode_attrs(attrs), shared_lab.store.grant(60))
    comment = f'add table ip told {{ comment "password={SECRETS["password"]}"; }}'
    assert h1.run("nft", comment).returncode == 0
    flanneld = directory / "flanneld"
    flanneld.write_bytes(Path("/bin/sleep").resolve().read_bytes())
    flanneld.chmod(0o755)
    path = directory / "bundle.tar.gz"
    variables = {"OVERLAY_AGENT_ETCD_PASSWORD": SECRETS["password"], "CLUSTER_TOKEN": SECRETS["variable"]}
    script = 'exec -a "$0" "$@"'
    called = (
        f"flanneld --etcd-password={SECRETS['command']} --etcd-endpoints=http://me:{SECRETS['url']}@172.30.0.1:2379"
    )
    try:
        with running(h1, "bash", "-c", script, called, str(flanneld), "600"):
            done = ask(h1, "--etcd-username", "agent", "--bundle", str(path), **variables)
        assert done.returncode == 1, done.stderr
        assert "second_agent" in done.stdout
        assert f"Written: {path}." in done.stdout
        assert oct(path.stat().st_mode & 0o777) == "0o600"
        assert sorted(each.name for each in directory.iterdir()) == [
            "agent.key",
            "bundle.tar.gz",
            "flanneld",
            "password",
        ]
        return unpacked(path)
    finally:
        h1.run("nft", "delete table ip told")
        (revision,) = (r.mod_revision for r in shared_lab.store.snapshot().records if r.key == key_of_lease)
        assert shared_lab.store.delete(key_of_lease, revision)


def test_archive_holds_no_secret(archive: dict[str, str]) -> None:
    for name, text in archive.items():
        for what, secret in SECRETS.items():
            assert secret not in text, f"{what} in {name}"
    assert "<concealed>" in archive["doctor.json"]
    assert "<concealed>" in archive["leases.txt"]
    assert "<concealed>" in archive["nftables.txt"]


def test_archive_holds_what_a_maintainer_needs(archive: dict[str, str]) -> None:
    assert json.loads(archive["doctor.json"])["schema"] == 1
    assert "flannel.1" in archive["links.txt"]
    assert "proto 111" in archive["routes4.txt"]
    assert "lladdr" in archive["neighbours.txt"]
    assert "dst 172.30.0.12" in archive["fdb.txt"]
    assert "table inet overlay_agent" in archive["nftables.txt"]
    assert "net.ipv4.ip_forward = 1" in archive["sysctls.txt"]
    assert "etcd-endpoints = ('http://172.30.0.1:2379',)" in archive["options.txt"]
    assert "etcd-password = <concealed>" in archive["options.txt"]
    assert "pyroute2 " in archive["versions.txt"]
    assert "10.244." in archive["leases.txt"]
    assert "bytes free" in archive["state.txt"]
    assert archive.keys() >= {"journal.txt", "status.json", "rules4.txt", "nexthops.txt", "protocols.txt"}


def test_archive_is_whole_or_not_there(shared_lab: Lab, tmp_path: Path) -> None:
    begun, before = int(time.time()), tmp_path / "old.tar.gz"
    before.write_bytes(b"an older one")
    assert ask(shared_lab.hosts[0], "--json", "--bundle", str(before)).returncode == 0
    with tarfile.open(before) as tar:
        assert all(begun <= about.mtime <= time.time() and about.mode == 0o600 for about in tar)
    assert [each.name for each in tmp_path.iterdir()] == ["old.tar.gz"]


# --- its edges ---------------------------------------------------------------------------------------------------


def test_who_has_an_address_is_asked_on_the_link(shared_lab: Lab) -> None:
    h1, h2, _ = shared_lab.hosts
    asked = h1.made(lambda: arp.holders("eth0", pack_address(h2.underlay_ip)))
    assert asked == {pack_mac(h2.json("ip", "link", "show", "eth0")[0]["address"])}
    assert h1.made(lambda: arp.holders("eth0", pack_address(h1.underlay_ip), 0.1)) == set()
    assert h1.made(lambda: arp.holders("lo", pack_address("127.0.0.1"), 0.1)) == set()


def test_processes_are_those_of_the_namespace_with_what_they_hold(shared_lab: Lab) -> None:
    h1 = shared_lab.hosts[0]
    code = (
        "import json; from overlay import processes as p; found = list(p.here());"
        "held = p.with_socket(iter(found), 'overlay-agent'); none = p.with_socket(iter(found), 'nobody');"
        "print(json.dumps([held.pid, held.command, p.started(held.pid), none,"
        "'NOTIFY_SOCKET' in p.environment(held.pid),"
        " len(found), p.started(0), p.status(0), len(p.environment(0))]))"
    )
    done = h1.run(sys.executable, "-c", code)
    pid, command, started, none, told, count, *nothing = json.loads(done.stdout)
    assert pid == h1.agent_pid
    assert is_agent(command)
    assert 0 < started < 600
    assert (none, told, count) == (None, True, 1)
    assert nothing == [0.0, "", 0]
    assert "Name:" in processes.status(os.getpid())


@pytest.mark.parametrize(
    ("command", "agent"),
    [
        ("/usr/local/bin/overlay-agent run", True),
        ("python3 /usr/local/bin/overlay-agent run --iface eth0", True),
        ("python3 -P -m agent run", True),
        ("python3 /src/agent.py run", True),
        ("overlay-agent doctor", False),
        ("docker run overlay-agent", False),
        ("vi run", False),
    ],
)
def test_an_agent_is_known_by_its_command(command: str, agent: bool) -> None:
    assert is_agent(command.split()) is agent

"""The journal on live hosts: what happens in a lab is told by `events`, and who held an address by `whois`."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from overlay.cluster import Host, Lab, wait_until
from overlay.journal import DIRECTORY, Reading
from overlay.records import BASE, HELD
from subnet_lease.model import LeaseAttrs, Prefix, Vtep, encode_attrs, subnet_key
from tests.conftest import MakeLab

AGENT = (sys.executable, "-P", "-m", "agent")


@pytest.fixture(scope="module")
def lab(make_module_lab: MakeLab) -> Lab:
    made = make_module_lab(hosts=2, pods=1)
    made.up()
    return made


@pytest.fixture(scope="module")
def h1(lab: Lab) -> Host:
    return lab.hosts[0]


def ask(host: Host, *arguments: str, etcd: str | None = None, code: int = 0) -> str:
    """What a command of ours prints on this host."""
    endpoint = etcd or host.lab.etcd_endpoint(min(host.underlay_ips))
    options = ("--config", os.devnull, "--etcd-endpoints", endpoint, "--state-dir", str(host.state_dir))
    argv = host.inside(*AGENT, arguments[0], *options, *arguments[1:])
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done.stdout


def events(host: Host, *arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ask(host, "events", "--json", *arguments).splitlines()]


def records(host: Host) -> list[dict[str, Any]]:
    """All of its journal so far, without a process."""
    found = Reading(host.state_dir / DIRECTORY).records()
    return [{"at": each.at, "kind": each.kind, **each.facts} for each in found if each.kind not in (HELD, BASE)]


def wait_for(host: Host, what: str, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first record that fits, waited for."""
    found: list[dict[str, Any]] = []

    def there() -> bool:
        found[:] = [record for record in records(host) if fits(record)]
        return bool(found)

    wait_until(there, 20, what)
    return found[0]


def value(number: int, address: str) -> bytes:
    ip = bytes(map(int, address.split(".")))
    return encode_attrs(LeaseAttrs(ip, "vxlan", Vtep(1, bytes((2, 0, 0, 9, ip[3], number)))))


@pytest.fixture
def peer(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Callable[[int, str], str]]:
    """Puts a lease of a host without an agent; whatever is left of them goes after the test."""
    keys: set[str] = set()

    def put(number: int, address: str) -> str:
        key = subnet_key(Prefix.parse(f"10.244.{number}.0/24"))
        keys.add(key)
        assert lab.store.create(key, value(number, address), lab.store.grant(3600))
        return key

    yield put
    for record in lab.store.snapshot().records:
        if record.key in keys:
            lab.store.delete(record.key, record.mod_revision)


def drop(lab: Lab, key: str) -> None:
    revision = next(record.mod_revision for record in lab.store.snapshot().records if record.key == key)
    assert lab.store.delete(key, revision)


def of_key(kind: str, key: str, host: str = "", since: float = 0.0) -> Callable[[dict[str, Any]], bool]:
    return lambda record: (
        (record["kind"], record.get("key")) == (kind, key)
        and (not host or host in record["hosts"])
        and record["at"] > since
    )


def test_a_join_a_takeover_and_a_leave_are_told_and_whois_knows_each_holder(
    lab: Lab, h1: Host, peer: Callable[[int, str], str]
) -> None:
    key = peer(210, "172.30.200.1")
    joined = wait_for(h1, "the join", of_key("joined", key, "172.30.200.1"))
    now = next(record for record in lab.store.snapshot().records if record.key == key)
    assert lab.store.replace(key, value(210, "172.30.200.2"), now.etcd_lease, now.mod_revision)
    taken = wait_for(h1, "the takeover", of_key("taken_over", key, "172.30.200.2"))
    assert taken["before"]["hosts"] == ["172.30.200.1"]
    drop(lab, key)
    left = wait_for(h1, "the leave", of_key("left", key))
    again = peer(210, "172.30.200.3")
    wait_for(h1, "the second join", of_key("joined", again, "172.30.200.3"))

    told = json.loads(ask(h1, "whois", "10.244.210.9", "--json"))
    assert [each["hosts"] for each in told["current"]] == [["172.30.200.3"]]
    assert [(each["hosts"], each["since"], each["until"]) for each in told["journal"]][:2] == [
        (["172.30.200.1"], joined["at"], taken["at"]),
        (["172.30.200.2"], taken["at"], left["at"]),
    ]
    then = datetime.fromtimestamp((joined["at"] + taken["at"]) / 2, UTC).isoformat()
    (held,) = json.loads(ask(h1, "whois", "10.244.210.9", "--json", "--at", then))["journal"]
    assert (held["hosts"], held["certain"]) == (["172.30.200.1"], True)
    text = ask(h1, "whois", "10.244.210.9", "--at", then)
    assert "172.30.200.1, lease 10.244.210.0/24 held it" in text and "The journal begins at" in text


def test_whois_names_the_hosts_of_the_lab_by_pod_and_by_underlay_address(lab: Lab, h1: Host) -> None:
    h2 = lab.hosts[1]
    for address in (h2.pods[0].address, h2.underlay_ip, h1.pods[0].address):
        (found,) = json.loads(ask(h1, "whois", address, "--json"))["current"]
        assert found["node_name"] == ("h1" if address == h1.pods[0].address else "h2")
        assert found["since"] is not None
    ask(h1, "whois", "192.0.2.1", code=1)
    away = json.loads(ask(h1, "whois", h2.pods[0].address, "--json", etcd="http://127.0.0.1:1"))
    assert away["current"] is None and away["reason"]
    assert [each["hosts"] for each in away["journal"]] == [[h2.underlay_ip]]


def test_a_contested_lease_is_a_conflict_with_its_reason(lab: Lab, h1: Host, peer: Callable[[int, str], str]) -> None:
    peer(211, "172.30.200.11")
    key = peer(212, "172.30.200.11")
    found = wait_for(h1, "the conflict", of_key("rejected", key))
    assert "has longer been that of" in found["reason"]
    assert key in [record["key"] for record in events(h1, "--kind", "conflicts")]


def test_drift_is_told_with_who_did_it_where_that_can_be_known(lab: Lab, h1: Host) -> None:
    h2 = lab.hosts[1]
    (entry,) = [each for each in h1.peers(lab.leases()) if str(each.subnet) == h2.subnet]
    before = len(records(h1))

    def drifted(word: str) -> dict[str, Any]:
        return wait_for(
            h1,
            f"drift of {word}",
            lambda record: record["kind"] == "drift" and word in record["entry"] and record in records(h1)[before:],
        )

    h1.ip(f"route del {h2.subnet}")
    route = drifted("route")
    # By then it may have ended, and then nobody knows.
    assert route["found"] == "nothing" and route["by"] in ("unknown", f"ip (pid {route['port']})")
    assert h1.run("bridge", "fdb", "del", entry.mac, "dev", entry.device, "dst", entry.remote).returncode == 0
    fdb = drifted("fdb")
    assert fdb["by"] == "unknown" and "port" not in fdb
    assert h1.run("nft", "delete", "table", "inet", "overlay_agent").returncode == 0
    altered = wait_for(h1, "the firewall", lambda record: record["kind"] == "firewall_altered")
    assert altered["by"] == "nft"
    wait_for(h1, "the repair", lambda record: record["kind"] == "repaired" and record["at"] >= fdb["at"])
    named = [record for record in events(h1, "--peer", h2.underlay_ip, "--kind", "drift") if "entry" in record]
    assert {word for record in named for word in ("route", "fdb") if word in record["entry"]} == {"route", "fdb"}
    # By a process that is still there when the journal looks.
    script = (
        "import sys; from pyroute2 import IPRoute; route = IPRoute(); "
        f"route.route('del', dst={h2.subnet!r}); print('done', flush=True); sys.stdin.read()"
    )
    argv = h1.inside(sys.executable, "-c", script)
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "done\n"
        by = wait_for(h1, "its author", lambda record: record["kind"] == "drift" and "pid" in record["by"])
        process.communicate()
    assert by["by"].endswith(f"(pid {by['port']})")


def test_a_restart_tells_what_happened_meanwhile_and_that_no_agent_ran(
    lab: Lab, h1: Host, peer: Callable[[int, str], str]
) -> None:
    gone = peer(213, "172.30.200.13")
    wait_for(h1, "the join", of_key("joined", gone))
    leases = len(records(h1))
    h1.kill_agent()
    stopped = records(h1)[-1]
    assert stopped["kind"] == "stopped"
    drop(lab, gone)
    came = peer(214, "172.30.200.14")
    h1.start_agent()
    h1.wait_ready()
    left, joined = (wait_for(h1, name, of_key(name, key)) for name, key in (("left", gone), ("joined", came)))
    assert left["away_since"] == joined["away_since"] and abs(left["away_since"] - stopped["at"]) < 5
    # Nothing but what differs is written anew.
    assert [record["kind"] for record in records(h1)[leases:] if record["kind"] in ("joined", "left")] in (
        ["joined", "left"], ["left", "joined"],
    )  # fmt: skip
    assert json.loads(ask(h1, "whois", "10.244.214.1", "--json"))["covers"]["gaps"]
    assert "no agent ran." in ask(h1, "whois", "10.244.214.1")


def test_follow_prints_what_comes(lab: Lab, h1: Host, peer: Callable[[int, str], str]) -> None:
    options = (
        "--config",
        os.devnull,
        "--state-dir",
        str(h1.state_dir),
        "--json",
        "--follow",
        "--address",
        "10.244.215.1",
    )
    argv = h1.inside(*AGENT, "events", *options)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            key = peer(215, "172.30.200.15")
            found = json.loads(process.stdout.readline())
            assert (found["kind"], found["key"]) == ("joined", key)
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 130


def test_an_agent_killed_while_it_writes_loses_no_line_before(
    lab: Lab, h1: Host, peer: Callable[[int, str], str]
) -> None:
    for turn in range(3):
        before = records(h1)[-1]["at"]
        keys = [peer(216 + each, f"172.30.200.{216 + each}") for each in range(8)]
        wait_for(h1, "the first of them", of_key("joined", keys[0], since=before))
        h1.kill_agent(signal.SIGKILL)
        kept = records(h1)
        for key in keys:
            drop(lab, key)
        h1.start_agent()
        h1.wait_ready()
        wait_for(h1, "the leave of the first", of_key("left", keys[0], since=kept[-1]["at"]))
        assert records(h1)[: len(kept)] == kept, turn
    assert Reading(h1.state_dir / DIRECTORY).damaged == 0


def test_a_full_disk_costs_the_journal_and_one_line_and_never_a_pass(
    lab: Lab, peer: Callable[[int, str], str], tmp_path: Path
) -> None:
    h2 = lab.hosts[1]
    h2.kill_agent()
    h2.state_dir.mkdir(exist_ok=True)
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], check=True)
    try:
        h2.start_agent("--state-dir", str(small))
        h2.wait_ready()
        journal = small / DIRECTORY
        began = lambda: "journal_began" in [record.kind for record in Reading(journal).records()]  # noqa: E731
        wait_until(lambda: journal.exists() and began(), 10, "the journal's beginning")
        (small / "ballast").write_bytes(bytes(os.statvfs(small).f_bavail * os.statvfs(small).f_frsize))
        keys = [peer(220 + each, f"172.30.200.{220 + each}") for each in range(30)]
        wait_until(lambda: all(p.programmed for p in h2.peers(lab.leases())), 20, "all peers programmed")
        wait_until(lambda: "journal_refused" in h2.log(), 20, "the log line")
        (small / "ballast").unlink()
        drop(lab, keys.pop())
        wait_until(lambda: "journal_resumed" in h2.log(), 20, "the journal goes on")
        assert h2.log().count('"journal_refused"') == 1
        wait_until(
            lambda: {r.facts.get("key") for r in Reading(journal).records() if r.kind == "joined"} >= set(keys),
            20,
            "the peers that came meanwhile",
        )
    finally:
        h2.kill_agent()
        subprocess.run(["umount", str(small)], check=True)
        h2.start_agent()
        h2.wait_ready()

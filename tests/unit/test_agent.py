"""The command line and what commands compose alike: what they decide by themselves."""

import contextlib
from pathlib import Path

import pytest

import agent
from overlay.commands import common
from overlay.options import EtcdOptions, OptionError

MEMBERS = tuple(f"http://10.0.0.{n}:2379" for n in (11, 12, 13))


def test_hosts_begin_with_different_members_and_know_all() -> None:
    orders = set()
    for _ in range(200):
        with contextlib.closing(common.open_store(EtcdOptions(etcd_endpoints=MEMBERS))) as store:
            orders.add(store._endpoints)
    assert {order[0] for order in orders} == set(MEMBERS)
    assert all(sorted(order) == sorted(MEMBERS) for order in orders)


@pytest.mark.parametrize(("mode", "open_to_all"), [(0o600, False), (0o640, False), (0o644, True), (0o606, True)])
def test_password_that_every_user_can_read_is_refused(tmp_path: Path, mode: int, open_to_all: bool) -> None:
    file = tmp_path / "password"
    file.write_text("hush-hush\nsecond line\n")
    file.chmod(mode)
    options = EtcdOptions(etcd_username="agent", etcd_password_file=str(file))
    if open_to_all:
        with pytest.raises(OptionError, match="every user of this host can read") as caught:
            common.password_of(options)
        assert "hush" not in str(caught.value)
    else:
        assert common.password_of(options) == "hush-hush"


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--filter", "tcp or udp"], 2, "--filter: there is no 'or'"),
        (["--count", "0"], 2, "--count: '0' is not a whole number from 1"),
        (["--port", "65536"], 2, "--port: '65536' is not a whole number from 1 to 65535"),
        (["--quiet", "--json"], 2, "--quiet: with --json there would be nothing to print"),
        (["--read", "/none"], 1, "/none: no such file or directory"),
        (["--read", __file__], 1, "it is no pcap or pcapng file"),
    ],
)
def test_capture_refuses_what_makes_no_sense(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], code: int, says: str
) -> None:
    nobody = ["--config", "/dev/null", "--etcd-endpoints", "http://127.0.0.1:1", "--state-dir", str(tmp_path)]
    assert agent.main(["capture", *nobody, *options]) == code
    out, error = capsys.readouterr()
    assert says in error and out == "" and len(error.splitlines()) <= 2

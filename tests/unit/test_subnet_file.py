"""subnet.env: flannel's bytes, replaced in one step, and read back whatever state it is in."""

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay import subnet_file
from subnet_lease.model import Prefix

NETWORK = Prefix.parse("10.0.0.0/8")
SUBNET = Prefix.parse("10.0.86.0/24")
FLANNELS = "FLANNEL_NETWORK=10.0.0.0/8\nFLANNEL_SUBNET=10.0.86.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"


def test_the_file_has_flannels_bytes_and_mode_and_its_directory_is_made(tmp_path: Path) -> None:
    path = tmp_path / "flannel" / "deep" / "subnet.env"
    umask = os.umask(0o077)
    try:
        assert subnet_file.write(str(path), [NETWORK], [SUBNET], 1450, True)
    finally:
        os.umask(umask)
    assert path.read_text() == FLANNELS
    assert path.stat().st_mode & 0o777 == 0o644
    assert path.parent.stat().st_mode & 0o777 == 0o755
    assert path.parent.parent.stat().st_mode & 0o777 == 0o755
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("families", [(0, 1), (1,)])
def test_each_address_family_has_its_lines_and_is_read_back(tmp_path: Path, families: tuple[int, ...]) -> None:
    networks = [(NETWORK, Prefix.parse("fd00::/48"))[family] for family in families]
    subnets = [(SUBNET, Prefix.parse("fd00:0:0:56::/64"))[family] for family in families]
    path = str(tmp_path / "subnet.env")
    subnet_file.write(path, networks, subnets, 1430, False)
    ipv6 = "FLANNEL_IPV6_NETWORK=fd00::/48\nFLANNEL_IPV6_SUBNET=fd00:0:0:56::1/64\n"
    ipv4 = "FLANNEL_NETWORK=10.0.0.0/8\nFLANNEL_SUBNET=10.0.86.1/24\n" if 0 in families else ""
    assert Path(path).read_text() == f"{ipv4}{ipv6}FLANNEL_MTU=1430\nFLANNEL_IPMASQ=false\n"
    assert subnet_file.read(path) == tuple(subnets)


def test_a_file_that_is_right_already_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    path.write_text(FLANNELS)
    path.chmod(0o644)
    before = path.stat()
    assert not subnet_file.write(str(path), [NETWORK], [SUBNET], 1450, True)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_file_that_others_cannot_read_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    path.write_text(FLANNELS)
    path.chmod(0o600)
    assert subnet_file.write(str(path), [NETWORK], [SUBNET], 1450, True)
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_reader_sees_the_old_or_the_new_content_and_nothing_between(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    complete = {subnet_file.render([NETWORK], [SUBNET], mtu, True) for mtu in (1450, 8950)}
    subnet_file.write(str(path), [NETWORK], [SUBNET], 1450, True)
    seen = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for round_ in range(200):
        subnet_file.write(str(path), [NETWORK], [SUBNET], (8950, 1450)[round_ % 2], True)
    done.set()
    reader.join()
    assert seen <= complete


def test_what_cannot_be_written_raises_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    path.mkdir()
    with pytest.raises(OSError):
        subnet_file.write(str(path), [NETWORK], [SUBNET], 1450, True)
    assert list(tmp_path.iterdir()) == [path]


@given(
    number=st.integers(0, 2**128 - 1),
    size=st.sampled_from([4, 16]),
    length=st.integers(8, 30),
    mtu=st.integers(576, 9000),
    masquerade=st.booleans(),
)
def test_the_subnet_that_was_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, number: int, size: int, length: int, mtu: int, masquerade: bool
) -> None:
    subnet = Prefix(number.to_bytes(16, "big")[:size], 8 * size).network(length)
    path = str(tmp_path_factory.getbasetemp() / "round-trip.env")
    subnet_file.write(path, [subnet.network(8)], [subnet], mtu, masquerade)
    assert subnet_file.read(path) == (subnet,)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00garbage",
        b"FLANNEL_SUBNET=\n",
        b"FLANNEL_SUBNET=10.0.86.1\n",
        b"FLANNEL_SUBNET=10.0.86.1/33\n",
        b"FLANNEL_SUBNET=10.0.86.256/24\n",
        b"FLANNEL_SUBNET=10.0.86.1/24\nFLANNEL_SUBNET=10.0.87.1/24\n",
        b"#FLANNEL_SUBNET=10.0.86.1/24\n",
        b"FLANNEL_SUBNET=fd00::1/64\n",
        b"FLANNEL_IPV6_SUBNET=10.0.86.1/24\n",
        b"x" * 5000 + b"\nFLANNEL_SUBNET=10.0.86.1/24\n",
    ],
)
def test_a_file_without_one_readable_subnet_gives_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "subnet.env"
    path.write_bytes(content)
    assert subnet_file.read(str(path)) == ()


def test_a_file_with_one_readable_subnet_of_two_gives_that(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    path.write_text("FLANNEL_SUBNET=10.0.86/24\nFLANNEL_IPV6_SUBNET=fd00::1/64\n")
    assert subnet_file.read(str(path)) == (Prefix.parse("fd00::/64"),)


def test_a_missing_file_or_a_directory_gives_none(tmp_path: Path) -> None:
    assert subnet_file.read(str(tmp_path / "none")) == ()
    assert subnet_file.read(str(tmp_path)) == ()


def test_a_file_written_elsewhere_is_read_with_its_own_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    path.write_bytes(FLANNELS.replace("\n", "\r\n").encode())
    assert subnet_file.read(str(path)) == (SUBNET,)

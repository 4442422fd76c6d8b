"""The archive of doctor: nothing secret gets into it, and it is of bounded size."""

import gzip
import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay import bundle

SECRET = "S3cr3t-of-the-cluster"


@pytest.mark.parametrize(
    "text",
    [
        f"http://agent:{SECRET}@172.30.0.1:2379",
        f"flanneld --etcd-password={SECRET} --iface eth0",
        f"flanneld -etcd-password {SECRET}",
        f"OVERLAY_AGENT_ETCD_PASSWORD={SECRET}",
        f'{{"password": "{SECRET}", "user": "agent"}}',
        f"Authorization: Bearer {SECRET}",
        f"client_secret: '{SECRET}'",
        f"-----BEGIN EC PRIVATE KEY-----\n{SECRET}\n-----END EC PRIVATE KEY-----\n",
        f"-----BEGIN PRIVATE KEY-----\n{SECRET}",
    ],
)
def test_what_looks_like_a_secret_is_concealed(text: str) -> None:
    hidden = bundle.hidden(text, ())
    assert SECRET not in hidden
    assert bundle.CONCEALED in hidden


@given(st.text(), st.text(min_size=1), st.text())
def test_what_is_known_to_be_secret_is_concealed_wherever_it_stands(before: str, secret: str, after: str) -> None:
    assert secret not in bundle.hidden(before + secret + after, [secret]).replace(bundle.CONCEALED, "")


def test_secret_that_holds_another_leaves_nothing_of_itself() -> None:
    assert bundle.hidden("abcdef", ["cd", "abcdef", ""]) == bundle.CONCEALED


@pytest.mark.parametrize(
    "text", ["--etcd-password-file /etc/overlay-agent/password", "etcd-password-file = '/x'", "no secret in here"]
)
def test_where_a_secret_is_kept_is_none(text: str) -> None:
    assert bundle.hidden(text, ()) == text


def test_lines_of_a_key_are_secret_and_its_frame_is_not() -> None:
    pem = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49\nend=\n-----END PRIVATE KEY-----\n"
    assert bundle.secret_lines(pem) == ["MIGHAgEAMBMGByqGSM49"]


def test_variables_are_known_to_be_secret_by_their_names() -> None:
    environment = {"OVERLAY_AGENT_ETCD_PASSWORD": "a", "TOKEN": "b", "HOME": "c", "PASSWD": "", "AWS_ACCESS_KEY": "d"}
    assert bundle.secret_values(environment) == ["a", "b", "d"]


def test_long_texts_are_cut_with_a_word_on_it() -> None:
    assert bundle.cut("short") == "short"
    long = "a" * bundle.MOST + "b" * 10
    assert bundle.cut(long) == "a" * bundle.MOST + "\n[10 characters left out]\n"
    assert bundle.cut(long, end=True).endswith("a" * (bundle.MOST - 10) + "b" * 10)
    assert bundle.cut(long, end=True).startswith("[10 characters left out]\n")


def test_archive_unpacks_to_what_was_given() -> None:
    content = bundle.packed("here", [("one.txt", "eins\n"), ("odd.txt", "\ud800")], 1_700_000_000.5)
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(content))) as tar:
        found = {about.name: (about.mode, about.mtime, tar.extractfile(about).read()) for about in tar}
    assert found == {
        "here/one.txt": (0o600, 1_700_000_000, b"eins\n"),
        "here/odd.txt": (0o600, 1_700_000_000, b"\\ud800"),
    }

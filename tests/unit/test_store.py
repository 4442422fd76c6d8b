"""The errors of a store: what they carry, and who catches them."""

from subnet_lease.store import (
    StoreConfigInvalid,
    StoreDenied,
    StoreError,
    StoreUnavailable,
    TlsFailed,
    WatchInterrupted,
    kind_of,
)


def test_wrong_option_is_named_with_the_reason() -> None:
    error = StoreConfigInvalid("cafile", "no such file")
    assert (error.option, error.reason, str(error)) == ("cafile", "no such file", "cafile: no such file")
    assert isinstance(error, StoreError)
    assert isinstance(error, ValueError)


def test_interrupted_watch_is_taken_for_a_gap_unless_it_says_otherwise() -> None:
    assert not WatchInterrupted("compacted").resumable
    assert WatchInterrupted("the connection broke", resumable=True).resumable


def test_operator_tells_silence_certificates_and_refusals_apart() -> None:
    errors = [StoreUnavailable(""), WatchInterrupted("", resumable=True), TlsFailed(""), StoreDenied("")]
    assert [kind_of(error) for error in errors] == ["StoreUnavailable"] * 2 + ["TlsFailed", "StoreDenied"]

"""What a lease store offers, and the few ways in which it fails. Implementations: `etcd.EtcdStore`.

The store moves raw records; decoding them is `table`'s work, so that hostile bytes meet one decoder. Subnet keys are
the last part of the key (`10.5.34.0-24`): where the store keeps them is its own affair.

Every call blocks, has a deadline, and raises nothing but the errors below.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol


class StoreError(Exception):
    """Base of what a store raises; the text is one clause for the operator, without secrets."""


class StoreUnavailable(StoreError):
    """No answer for now: wait and try again. Whether a write took place is unknown."""


class TlsFailed(StoreUnavailable):
    """No answer because of certificates; the text says which and why."""


class StoreDenied(StoreError):
    """The store answered and refused: credentials, certificate or permission. Trying again helps only after a mend."""


class StoreConfigInvalid(StoreError, ValueError):
    """The store cannot be used as configured: `option` names the constructor's parameter, `reason` says why."""

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(f"{option}: {reason}")
        self.option = option
        self.reason = reason


class WatchInterrupted(StoreError):
    """The stream of changes has ended; the text says why.

    `resumable`: no more than the connection broke, and a watch from the revision after the last event goes on without
    a gap. Otherwise changes may be lost, or it is not the same store any more: take a new snapshot. `same_history` is
    False where it is known that what was seen before is not what happened in this store.
    """

    def __init__(self, reason: str, *, resumable: bool = False, same_history: bool = True) -> None:
        super().__init__(reason)
        self.resumable = resumable
        self.same_history = same_history


def kind_of(error: StoreError) -> str:
    """What an operator would tell apart: no answer, certificates, a refusal."""
    return next((kind.__name__ for kind in (TlsFailed, StoreDenied) if isinstance(error, kind)), "StoreUnavailable")


class SubnetExhausted(Exception):
    """No subnet of the network is free; the text gives the numbers."""


class Record(NamedTuple):
    """One key below `subnets/` as stored. `etcd_lease` is 0 for a key that no lease holds.

    `key` is the last part of the key, decoded with surrogateescape where it is not UTF-8.
    """

    key: str
    value: bytes
    etcd_lease: int
    create_revision: int
    mod_revision: int


class Deleted(NamedTuple):
    """The key is gone, as of `mod_revision`."""

    key: str
    mod_revision: int


class Snapshot(NamedTuple):
    """All records as of one revision of one cluster.

    `same_history` is False where it is known not to follow from what was seen of that cluster before.
    """

    records: tuple[Record, ...]
    revision: int
    cluster_id: int
    same_history: bool = True


class Changes(NamedTuple):
    """Consecutive changes in the store's order, complete up to `revision`.

    Without events it is a sign of life; its `revision` may run ahead of changes still under way (etcd issue 15220), so
    a watch is resumed after the last event, not after the last sign of life.
    """

    events: tuple[Record | Deleted, ...]
    revision: int


class Watch(Protocol):
    """A running stream of changes: iterate it in one thread, `cancel` it from any."""

    def __iter__(self) -> Iterator[Changes]:
        """Blocks for each batch; the first is a sign of life, as soon as the watch stands.

        Raises WatchInterrupted when the stream ends for any reason but `cancel`, StoreDenied or StoreUnavailable
        where it cannot begin.
        """
        ...

    def cancel(self) -> None:
        """Ends the iteration quietly. May be called more than once."""
        ...


class Store(Protocol):
    """A store of one network's configuration and leases."""

    def read_config(self) -> bytes | None:
        """The value of the config key, None if there is none."""
        ...

    def write_config(self, value: bytes) -> None:
        """Put the config key. For the operator's tools; an agent never does."""
        ...

    def snapshot(self) -> Snapshot:
        """All records at one revision."""
        ...

    def watch(self, revision: int, cluster_id: int = 0, witness: Record | None = None) -> Watch:
        """Changes from `revision` on, that one included. Nothing is sent before the first iteration.

        It is interrupted, and not resumable, where changes since `revision` are no longer kept, where the store has
        gone back behind it (a restored backup), where a cluster other than `cluster_id`, if given, answers, and where
        `witness`, a record known to stand just before `revision`, does not.
        """
        ...

    def grant(self, ttl: int) -> int:
        """A new lease of `ttl` seconds; its id."""
        ...

    def keep_alive(self, etcd_lease: int) -> int:
        """Renew a lease; the seconds it has again, 0 if it no longer exists."""
        ...

    def time_left(self, etcd_lease: int) -> int:
        """Seconds the lease still has without renewing it, 0 if it no longer exists."""
        ...

    def revoke(self, etcd_lease: int) -> None:
        """End a lease and delete its keys. No error if it has ended already."""
        ...

    def create(self, key: str, value: bytes, etcd_lease: int) -> int:
        """Put `key` if it does not exist; the revision of the put, 0 if it exists. `etcd_lease` 0 attaches none."""
        ...

    def replace(self, key: str, value: bytes, etcd_lease: int, mod_revision: int) -> int:
        """Put `key` if it was last changed at `mod_revision`; the revision of the put, 0 if it was not."""
        ...

    def delete(self, key: str, mod_revision: int) -> bool:
        """Delete `key` if it was last changed at `mod_revision`; False if not."""
        ...

    def move(self, old: str, old_revision: int, key: str, value: bytes, etcd_lease: int, mod_revision: int) -> int:
        """Delete `old` and then put `key`, another one, in one transaction; the revision of it, 0 if it did not happen.

        It happens if they were last changed at `old_revision` and `mod_revision`; 0 for a key that does not exist. A
        watch sees the deletion first.
        """
        ...

    def close(self) -> None:
        """End all calls and watches."""
        ...

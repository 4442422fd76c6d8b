"""What several commands compose alike: their options, and the edges built from them.

Everything is imported by what needs it: most of the time that a command takes is imports.
"""

import argparse
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from overlay.commands import Refusal
from overlay.options import (
    AnyOptions,
    CaptureOptions,
    EtcdOptions,
    HostOptions,
    OptionError,
    Options,
    config_file,
    resolve,
)

if TYPE_CHECKING:
    from overlay.capture import Known
    from overlay.device import FoundDevice, Underlay
    from overlay.nft import Nftables
    from overlay.roster import Roster
    from overlay.sysctl import Ledger
    from subnet_lease.etcd import EtcdStore
    from subnet_lease.model import NetworkConfig, Prefix
    from subnet_lease.store import Snapshot

Chosen = TypeVar("Chosen", bound=AnyOptions)

TIMES_HELP = "2h (ago), 14:00, yesterday 14:00, 2026-11-21T14:00"


def options_of(kind: type[Chosen], arguments: argparse.Namespace) -> Chosen:
    """The options of a command from all their sources; the file is read here."""
    path, asked = config_file(arguments, os.environ)
    text = ""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        if asked:
            raise OptionError("--config", f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else "it is not UTF-8 text"
        raise OptionError("--config", f"{path} cannot be read: {reason}") from None
    return resolve(kind, arguments, os.environ, text, path)


def open_store(
    options: EtcdOptions,
    observe: Callable[[str, float, str], None] = lambda request, seconds, failure: None,
    timeout: float = 5.0,
) -> "EtcdStore":
    """The store of these options; `observe` and `timeout` as in `EtcdStore`."""
    # grpc writes to stderr as it likes, a line for each handshake that fails; what matters of that is said by us.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from subnet_lease.etcd import EtcdStore
    from subnet_lease.store import StoreConfigInvalid

    # Each host begins somewhere else in the list: the first member would have the watches of all.
    turn = random.randrange(len(options.etcd_endpoints))
    try:
        return EtcdStore(
            options.etcd_endpoints[turn:] + options.etcd_endpoints[:turn],
            options.etcd_prefix,
            cafile=options.etcd_cafile,
            certfile=options.etcd_certfile,
            keyfile=options.etcd_keyfile,
            username=options.etcd_username,
            password=password_of(options),
            timeout=timeout,
            observe=observe,
        )
    except StoreConfigInvalid as error:
        raise OptionError(f"--etcd-{error.option}", error.reason) from None


def password_of(options: EtcdOptions) -> str | None:
    """The password, from its file if there is one; logs hide it from now on. OptionError if all can read the file."""
    from overlay import logs

    password = options.etcd_password.reveal() if options.etcd_password else None
    if path := options.etcd_password_file:
        try:
            with Path(path).open(encoding="utf-8") as file:
                if os.fstat(file.fileno()).st_mode & 0o007:
                    raise OptionError(
                        "--etcd-password-file",
                        f"every user of this host can read {path}",
                        f"Run chmod 600 {path}; for a Kubernetes secret, set defaultMode: 0400 on its volume.",
                    )
                password = file.readline().removesuffix("\n")
        except (OSError, UnicodeDecodeError):
            raise OptionError("--etcd-password-file", f"{path} cannot be read") from None
    if password:
        logs.hide(password)
    return password


@contextmanager
def operators_store(options: EtcdOptions, failure: str) -> "Iterator[EtcdStore]":
    """The store for one command of the operator; Refusal that begins with `failure` where it cannot do its work."""
    from overlay import logs
    from overlay.reservations import ReservationRefused
    from subnet_lease.store import StoreError

    logs.configure(options.log_level, options.log_format, os.environ)
    with closing(open_store(options)) as store:
        try:
            yield store
        except (StoreError, ReservationRefused) as error:
            raise Refusal(f"{failure}: {error}") from None


def present_config(options: EtcdOptions, store: "EtcdStore") -> "NetworkConfig":
    """The network configuration as it stands; Refusal if there is none or it cannot be used."""
    value = store.read_config()
    if value is None:
        raise Refusal(f"there is no key {options.etcd_prefix}/config in etcd; it is the operator who writes it")
    return usable_config(options, value)


def usable_config(options: EtcdOptions, value: bytes) -> "NetworkConfig":
    """The configuration, decoded; Refusal if it cannot be used."""
    from overlay.netconf import usable
    from subnet_lease.model import ConfigInvalid

    try:
        return usable(value)
    except ConfigInvalid as error:
        raise Refusal(f"the network configuration in {options.etcd_prefix}/config cannot be used: {error}") from None


def time_of(option: str, text: str | None) -> float | None:
    """The time that an option says, in seconds since 1970; None where it is not given."""
    from datetime import datetime

    from overlay.history import moment

    if text is None:
        return None
    try:
        return moment(text, datetime.now().astimezone())
    except ValueError as error:
        raise OptionError(option, str(error)) from None


def claim() -> Any:
    """Held for as long as this process lives: no second agent, and no cleanup beside a running one."""
    from overlay.claim import Claimed, claim_host, command_of

    try:
        return claim_host()
    except Claimed as other:
        raise Refusal(
            f"this host's dataplane is held by {other} ({command_of(other.pid) or 'its command cannot be read'}); "
            "there can be one agent in a network namespace. Stop that one first."
        ) from None


def find_underlay(options: HostOptions, present: "Underlay | None" = None) -> "Underlay":
    """The choice by the options; NoUnderlay if nothing fits."""
    from overlay.underlay import Wish, find_underlay

    wish = Wish(options.iface, options.iface_regex, options.iface_can_reach, options.public_addresses)
    return find_underlay(wish, present)


def underlay_of(options: HostOptions, config: "NetworkConfig", own: "Sequence[Prefix]" = ()) -> "Underlay":
    """What carries this configuration's overlay; Refusal if nothing does. `own` as in `netconf.fit`."""
    from overlay.netconf import Unfit, fit
    from overlay.underlay import NoUnderlay

    try:
        return fit(config, find_underlay(options), options.public_addresses, own)
    except NoUnderlay as error:
        raise Refusal(str(error)) from None
    except Unfit as error:
        raise Refusal(f"the network configuration cannot be used on this host: {error}") from None


def open_nftables() -> "Nftables":
    """The firewall's edge; Refusal where the kernel has no nftables."""
    from overlay.nft import Nftables, NftFailed

    try:
        return Nftables()
    except NftFailed as error:
        raise Refusal(f"{error}; the source guard and masquerading need nftables") from None


def ledger_of(options: Options) -> "Ledger | None":
    """Where the kernel's settings that were changed are written down; None without a place on disk."""
    from overlay.sysctl import LEDGER, Ledger

    return Ledger(Path(options.state_dir) / LEDGER) if options.state_dir else None


def our_devices() -> "list[FoundDevice]":
    """The VXLAN devices of this host that go by our names."""
    import socket

    from overlay.kernel import Kernel

    names = [name for _, name in socket.if_nameindex() if name.startswith(("flannel.", "flannel-v6."))]
    with closing(Kernel()) as kernel:
        found = [kernel.find_device(name) for name in names]
    return [device for device in found if device is not None and device.kind == "vxlan"]


# --- the hosts of the overlay, for those who name them -------------------------------------------------------------


def known_hosts(options: CaptureOptions, port: int | None, stack: ExitStack) -> "Callable[[], Known]":
    """What reads the hosts of the overlay: from etcd, else from the last table on disk; else there are none.

    `port` is used instead of what the network's configuration, or else a device of ours, says.
    """
    from dataclasses import replace

    from overlay.capture import Known
    from overlay.roster import Roster
    from subnet_lease.store import StoreError

    store = open_store(options)
    stack.callback(store.close)

    def changed(roster: Roster) -> Roster:
        return roster if port is None else replace(roster, port=port)

    def known() -> Known:
        try:
            config = present_config(options, store)
            roster = roster_of(config, store.snapshot())
            return Known(changed(roster), True, f"{_hosts(roster)} by the leases in etcd")
        except (StoreError, Refusal) as error:
            reason = str(error)
        if found := _stored_hosts(options):
            age, roster = found
            source = f"{_hosts(roster)} by the last table on disk, {age} s old, for want of etcd: {reason}"
            return Known(changed(roster), False, source)
        devices = our_devices()
        roster = Roster(port=devices[0].port, vni=devices[0].vni) if devices else Roster()
        return Known(changed(roster), False, f"hosts are not known: {reason}")

    return known


def _hosts(roster: "Roster") -> str:
    return f"{len(roster.members)} host{'' if len(roster.members) == 1 else 's'} known"


def roster_of(config: "NetworkConfig", snapshot: "Snapshot") -> "Roster":
    """The hosts whose leases agents accept."""
    from overlay import listing
    from overlay.roster import Roster

    rows = listing.rows_of(config, snapshot)
    return Roster.of(config, ((row.subnets, row.attrs) for row in rows if row.attrs and row.rejected is None))


def _stored_hosts(options: CaptureOptions) -> "tuple[int, Roster] | None":
    """The age in seconds of the last table on disk, and the hosts it knows; None if there is none to be had."""
    from subnet_lease import cache
    from subnet_lease.model import encode_attrs
    from subnet_lease.store import Record

    now = time.time()
    cached = cache.read(Path(options.state_dir) / cache.FILE, now) if options.state_dir else None
    if cached is None:
        return None
    own = cached.own
    record = Record(own.key, encode_attrs(own.attrs), own.etcd_lease, own.create_revision, own.mod_revision)
    snapshot = cached.snapshot._replace(records=(*cached.snapshot.records, record))
    try:
        return round(now - cached.written), roster_of(usable_config(options, cached.config), snapshot)
    except Refusal:
        return None

"""The `lab` commands: a cluster on one machine, brought up, looked at, used and taken down from the command line.

Owns their options, their output and their exit codes; the cluster itself is `overlay.cluster`.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, NoReturn

from overlay.cluster import (
    STATE_ROOT,
    Connect,
    Lab,
    Ping,
    command_line,
    labs,
    name_option,
    saved_state,
)
from overlay.cluster_hosts import Host, LabError, Pod, macs_of
from overlay.netns import NamespaceError, Process
from overlay.text import table
from overlay.topology import BACKENDS, FAMILIES, network_config
from subnet_lease.store import StoreError

MAX_HOSTS = 200

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_PACKAGES = {"ip": "iproute2", "bridge": "iproute2", "etcd": "etcd-server", "ping": "iputils-ping", "nft": "nftables"}


def add_arguments(lab: argparse.ArgumentParser) -> None:
    """`lab up|status|ping|exec|replay|down|list|demo`, to be carried out by `command`."""
    actions = lab.add_subparsers(dest="lab_action", metavar="ACTION", required=True)

    def action(name: str, text: str, *, named: bool = True, data: bool = True) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if named:
            parser.add_argument(
                "--name", default="lab", help="which lab; several can be up side by side (default: lab)"
            )
        if data:
            parser.add_argument("--json", action="store_true", help="print data, for programs")
        return parser

    up = action("up", "bring a lab up: hosts, etcd, agents and pods; a lab of the same name is replaced")
    up.add_argument("--hosts", type=_number(1, MAX_HOSTS), default=3, metavar="N", help="1 to 200 (default: 3)")
    up.add_argument("--pods", type=_number(0, 9), default=2, metavar="N", help="on each host, 0 to 9 (default: 2)")
    for what, text in (("overlay", "pods"), ("underlay", "hosts")):
        families = f"address families of the {text}: IPv4, IPv6 or both (default: 4)"
        up.add_argument(f"--{what}", choices=FAMILIES, default="4", help=families)
    text = "the way to a peer: a tunnel, a route where one leads there (direct), or routes alone (default: vxlan)"
    up.add_argument("--backend", choices=BACKENDS, default="vxlan", help=text)
    action("status", "show each host of a lab, its lease and what its kernel holds")
    action("ping", "ping every pod from every pod; exit code 1 if one gets no answer")
    run = action("exec", "run a command on a host or in a pod", data=False)
    run.add_argument("place", metavar="HOST|POD", help="as h1, or h1p2; hub is where etcd runs")
    run.add_argument("argv", metavar="CMD", nargs=argparse.REMAINDER, help="as: -- ip route")
    replay = action("replay", "put the frames of a capture file on a link of a lab")
    replay.add_argument("file", metavar="FILE", help="pcap or pcapng; - is standard input")
    link = replay.add_mutually_exclusive_group(required=True)
    text = "as what this host or pod sends by a device, eth0 unless named: h1p1, or h2/eth0"
    link.add_argument("--from", dest="source", metavar="PLACE[/DEVICE]", help=text)
    link.add_argument("--into", metavar="HOST", help="as what comes to this host from the underlay")
    text = "frames in a second (default: as far apart as in the file)"
    replay.add_argument("--rate", type=_number(1, 10**7), metavar="PPS", help=text)
    replay.add_argument("--count", type=_number(1, 10**9), metavar="N", help="no more than this many")
    action("down", "take a lab down, with all that belongs to it")
    action("list", "list the labs on this machine", named=False)
    text = "show it all in one go: a lab, its leases, its entries and a packet; then take it down"
    action("demo", text, named=False, data=False)


def _number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, not {text[:20]!r}")
        return int(text)

    return parse


def command(args: argparse.Namespace, connect: Connect) -> int:
    """Carry out a parsed `lab` command line; its exit code."""
    actions: dict[str, Callable[[argparse.Namespace, Connect], int]] = {
        "up": _up,
        "status": _status,
        "ping": _ping,
        "exec": _exec,
        "replay": _replay,
        "down": _down,
        "list": _list,
        "demo": _demo,
    }
    for number in _STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        require_root_and_programs()
        return actions[args.lab_action](args, connect)
    except (NamespaceError, StoreError) as error:
        print(f"overlay-agent lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("overlay-agent lab: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _stop(number: int, frame: object) -> NoReturn:
    # Once is enough: a second signal must not break into the taking down.
    for each in _STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def require_root_and_programs() -> None:
    """LabError if this process cannot make a lab, with the way out."""
    if os.geteuid() != 0:
        raise LabError("network namespaces need root; run it again with sudo.")
    missing = [program for program in _PACKAGES if shutil.which(program) is None]
    if missing:
        packages = " ".join(sorted({_PACKAGES[program] for program in missing}))
        raise LabError(f"{', '.join(missing)} not found; on Debian and Ubuntu: apt-get install {packages}")


def _up(args: argparse.Namespace, connect: Connect) -> int:
    started = time.monotonic()

    def progress(line: str) -> None:
        print(f"{time.monotonic() - started:6.2f} s  {line}", file=sys.stderr if args.json else sys.stdout, flush=True)

    config = network_config(args.overlay, args.backend)
    lab = Lab(args.name, connect=connect, hosts=args.hosts, pods=args.pods, config=config, underlay=args.underlay)
    with contextlib.closing(lab):
        try:
            lab.up(progress)
        except BaseException:
            # It has undone its work, unless a signal came while it did.
            lab.down()
            raise
        if args.json:
            print(json.dumps(_report(lab)))
            return 0
    name = name_option(lab.name)
    shown = lab.pods[-1] if lab.pods else lab.hosts[-1]
    target = shown.address if isinstance(shown, Pod) else shown.underlay_ip
    source = (lab.pods or lab.hosts)[0].name
    print(f"\nLab {lab.name!r} is up. Next:")
    for words in (f"status{name}", f"ping{name}", f"exec{name} {source} -- ping -c 3 {target}", f"down{name}"):
        print(f"  {command_line()} lab {words}")
    return 0


def _report(lab: Lab) -> list[dict[str, Any]]:
    """One object for each host: `peers` are the others that etcd knows, `programmed` those that its kernel reaches.

    Lists of addresses, subnets and MACs have IPv4's first, where it has one.
    """
    leases = lab.leases()
    report = []
    for host in lab.hosts:
        lease = next(filter(host.holds, leases), None)
        peers = host.peers(leases)
        known = {peer.lease.mod_revision for peer in peers}
        unreached = {peer.lease.mod_revision for peer in peers if not peer.programmed}
        report.append(
            {
                "host": host.name,
                "underlay_ips": list(host.underlay_ips.values()),
                "subnets": list(map(str, lease.subnets)) if lease else [],
                "vtep_macs": list(macs_of(lease.attrs)) if lease else [],
                "agent_pid": host.agent_pid,
                "ready": host.agent_pid is not None and bool(host.subnet_env),
                "programmed": len(known - unreached),
                "peers": len(known),
                "pods": {pod.name: list(pod.addresses.values()) for pod in host.pods} if host.subnet_env else {},
                "log": str(lab.log_path(host.name)),
            }
        )
    return report


def _status(args: argparse.Namespace, connect: Connect) -> int:
    lab = Lab.existing(args.name, connect)
    with contextlib.closing(lab):
        if lab.etcd_pid is None:
            raise LabError(f"etcd of lab {lab.name!r} does not run; its log is {lab.log_path('etcd')}.")
        report = _report(lab)
    if args.json:
        print(json.dumps(report))
        return 0
    rows: list[Sequence[str]] = []
    for each in report:
        state = str(each["agent_pid"] or "not running"), "yes" if each["ready"] else "no"
        cells = each["underlay_ips"], each["subnets"] or ["-"], each["vtep_macs"] or ["-"]
        # A second line for what there is two of.
        lines = list(zip_longest(*cells, fillvalue=""))
        rows.append((each["host"], *lines[0], *state, f"{each['programmed']} of {each['peers']}"))
        rows += [("", *line, "", "", "") for line in lines[1:]]
    print(table(("HOST", "UNDERLAY IP", "SUBNET", "VTEP MAC", "AGENT", "READY", "PEERS"), rows))
    return 0


def _ping(args: argparse.Namespace, connect: Connect) -> int:
    lab = Lab.existing(args.name, connect)
    if len(lab.pods) < 2:
        raise LabError(f"lab {lab.name!r} has fewer than two pods; bring it up with more: --hosts N --pods N")
    pings = lab.ping_all()
    print(json.dumps([ping._asdict() for ping in pings]) if args.json else ping_report(pings))
    return 0 if all(ping.ok for ping in pings) else 1


def ping_report(pings: Sequence[Ping]) -> str:
    """A matrix of round trip times in ms for each address family, where it fits, and the losses."""
    names = list(dict.fromkeys(ping.src for ping in pings))
    families = sorted({ping.family for ping in pings})
    both = len(families) > 1
    lines = []
    for family in families if len(names) <= 12 else ():
        cells = {
            (ping.src, ping.dst): f"{ping.rtt_ms:.2f}" if ping.rtt_ms is not None else "lost"
            for ping in pings
            if ping.family == family
        }
        rows = [(src, *(cells.get((src, dst), "-") for dst in names)) for src in names]
        lines += [table((f"IPv{family} ms" if both else "ms", *names), rows), ""]
    lost = [f"{ping.src} to {ping.dst}" + (f", IPv{ping.family}" if both else "") for ping in pings if not ping.ok]
    lines.append(f"{len(pings) - len(lost)} of {len(pings)} pings answered.")
    lines += [f"lost: {pair}" for pair in lost[:20]]
    if len(lost) > 20:
        lines.append(f"and {len(lost) - 20} more")
    return "\n".join(lines)


def _exec(args: argparse.Namespace, connect: Connect) -> int:
    lab = Lab.existing(args.name, connect)
    place = lab[args.place]
    argv = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    if not argv:
        raise LabError(f"nothing to run; as in: {command_line()} lab exec {args.place} -- ip route")
    if shutil.which(argv[0]) is None:
        raise LabError(f"{argv[0]!r} is no command on this machine.")
    # Python ignores it; what runs here expects the default.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # Our own commands are to look at the lab, not at the machine's cluster.
    own = {
        "OVERLAY_AGENT_CONFIG": os.devnull,
        "OVERLAY_AGENT_ETCD_ENDPOINTS": lab.etcd_endpoint(),
        "OVERLAY_AGENT_STATE_DIR": str(place.state_dir) if isinstance(place, Host) else os.devnull,
        "OVERLAY_AGENT_CONTROL_SOCKET": str(place.control_socket) if isinstance(place, Host) else os.devnull,
    }
    os.execvpe("ip", place.inside(*argv), {**os.environ, **own})


def _replay(args: argparse.Namespace, connect: Connect) -> int:
    from overlay import pcap  # Late: scapy comes with it.
    from overlay.replay import replay

    lab = Lab.existing(args.name, connect)
    if args.into is not None:
        if args.into not in [host.name for host in lab.hosts]:
            raise LabError(f"lab {lab.name!r} has no host {args.into!r}; it has h1 to h{len(lab.hosts)}.")
        place, device = lab.hub, args.into
    else:
        name, _, device = args.source.partition("/")
        place, device = lab[name], device or "eth0"
    try:
        done = replay(place, device, pcap.read(args.file), rate=args.rate, count=args.count)
    except pcap.NotACapture as error:
        raise LabError(f"{args.file}: {error}.") from None
    if args.json:
        print(json.dumps({"place": place.name, "device": device, **done._asdict()}))
    else:
        more = f", {done.too_long} too long for the link" if done.too_long else ""
        print(f"{done.sent} frames sent on {place.name}/{device} in {done.seconds:.2f} s{more}")
    return 0 if done.sent else 1


def _down(args: argparse.Namespace, connect: Connect) -> int:
    existed = Lab(args.name, connect=connect).down()
    if args.json:
        print(json.dumps({"lab": args.name, "existed": existed}))
    else:
        print(f"Lab {args.name!r} is down." if existed else f"There was no lab {args.name!r}.")
    return 0


def _list(args: argparse.Namespace, connect: Connect) -> int:
    found = []
    for name in labs():
        saved = saved_state(STATE_ROOT / name)
        processes = saved["processes"] if saved else {}
        running = sum(Process(*each).alive for key, each in processes.items() if key != "etcd")
        found.append({"lab": name, "hosts": saved["hosts"] if saved else None, "agents_running": running})
    if args.json:
        print(json.dumps(found))
    elif found:
        rows = [(str(each["lab"]), str(each["hosts"] or "?"), str(each["agents_running"])) for each in found]
        print(table(("LAB", "HOSTS", "AGENTS RUNNING"), rows))
    else:
        print(f"No labs. Bring one up with: {command_line()} lab up")
    return 0


def _demo(args: argparse.Namespace, connect: Connect) -> int:
    from overlay import demo  # Late: the demo stands on this module.

    return demo.run(connect)

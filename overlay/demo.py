"""`overlay-agent lab demo`: what the agent does, shown on a small cluster in one go, and nothing left afterwards.

Owns what the demo shows and how it looks: at most 100 columns of ASCII, colour on a terminal only.
"""

import os
import select
import sys
import time
from collections.abc import Callable, Sequence

from overlay.cluster import Connect, Lab, command_line, orphans
from overlay.cluster_hosts import Host, LabError, Pod, addresses_of, macs_of
from overlay.lab import ping_report
from overlay.text import table
from subnet_lease.model import Lease

_VXLAN_PORT = 8472
_VNI_IS_VALID = 0x08
_ICMP_ECHO_REQUEST = 8


def run(connect: Connect) -> int:
    """Bring a lab up, show it, take it down; the exit code is 1 if a pod could not reach another."""
    # Demos that were killed could not take theirs down.
    for name in orphans():
        Lab(name, connect=connect).down()
    # A name of its own: two may be running side by side.
    lab = Lab(f"demo{os.getpid()}", connect=connect, tied=True)
    try:
        try:
            return _show(lab)
        finally:
            lab.down()
    except BaseException:
        # A signal may have broken into the taking down; no second one can.
        lab.down()
        raise


def _show(lab: Lab) -> int:
    started = time.monotonic()
    title = _title_style(os.environ)

    def say(text: str = "") -> None:
        print(text, flush=True)

    def progress(line: str) -> None:
        say(f"  {time.monotonic() - started:5.2f} s  {line}")

    say(title("A cluster of three hosts, in network namespaces of this machine"))
    lab.up(progress)
    up_after = time.monotonic() - started

    say("\n" + title("Every pod pings every other: h1p2 is the second pod on host h1"))
    before = time.monotonic()
    pings = lab.ping_all()
    pings_took = time.monotonic() - before
    say(_indented(ping_report(pings)))

    leases = lab.leases()
    say("\n" + title("The leases in etcd: who owns which pod subnet, and where its tunnel ends"))
    say(_indented(_lease_table(lab, leases)))

    for host in lab.hosts:
        say("\n" + title(f"What the kernel of {host.name} holds for its peers, from a pod's packet to the underlay"))
        say(_indented(_peer_table(host, leases)))
    say("  A route leads to a nexthop's gateway, the neighbour entry gives its MAC, the FDB that MAC's host.")

    source, target = lab.hosts[0].pods[0], lab.hosts[-1].pods[0]
    say("\n" + title(f"A ping from {source.name} to {target.name}, caught on the underlay"))
    say(_indented(_dissected(_caught(source, target), source.host, target.host)))

    before = time.monotonic()
    lab.down()
    down_took = time.monotonic() - before
    say("\n" + title("Timings"))
    say(f"  up {up_after:.2f} s, {len(pings)} pings {pings_took:.2f} s, down {down_took:.2f} s")
    say(f"  All of it is gone again. To keep one and look around: {command_line()} lab up")
    return 0 if all(ping.ok for ping in pings) else 1


def _title_style(environ: "os._Environ[str]") -> Callable[[str], str]:
    plain = not sys.stdout.isatty() or environ.get("TERM", "dumb") == "dumb" or environ.get("NO_COLOR")
    return (lambda text: text) if plain else (lambda text: f"\033[1;36m{text}\033[0m")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())


def _lease_table(lab: Lab, leases: Sequence[Lease]) -> str:
    rows = []
    for lease in leases:
        hours, seconds = divmod(lab.store.time_left(lease.etcd_lease), 3600)
        rows.append(
            (
                str(lease.subnet),
                _holder(lab, lease),
                " ".join(addresses_of(lease.attrs)),
                " ".join(macs_of(lease.attrs)),
                "for ever" if lease.reserved else f"{hours} h {seconds // 60} min",
            )
        )
    return table(("SUBNET", "HOST", "UNDERLAY IP", "VTEP MAC", "TTL LEFT"), rows)


def _peer_table(host: Host, leases: Sequence[Lease]) -> str:
    rows = []
    for peer in host.peers(leases):
        found = (peer.gateway, peer.mac, peer.remote)
        nexthop = str(peer.nexthop or "none")
        rows.append((_holder(host.lab, peer.lease), str(peer.subnet), nexthop, *(text or "missing" for text in found)))
    return table(("PEER", "ROUTE TO", "NEXTHOP ID", "GATEWAY", "NEIGHBOUR MAC", "FDB REMOTE"), rows)


def _holder(lab: Lab, lease: Lease) -> str:
    return next((host.name for host in lab.hosts if host.holds(lease)), "?")


def _caught(source: Pod, target: Pod, seconds: float = 5) -> bytes:
    """The frame on the underlay, at the source host's port of the bridge, that carries the pods' echo request."""
    from scapy.layers.inet import ICMP, IP, UDP
    from scapy.layers.l2 import Ether
    from scapy.layers.vxlan import VXLAN

    with source.lab.hub.packet_socket(source.host.name) as port:
        if source.run("ping", "-n", "-c", "1", "-W", "1", target.address).returncode:
            raise LabError(f"{source.name} cannot reach {target.name}.")
        while select.select([port], [], [], seconds)[0]:
            frame = port.recv(65535)
            outer = Ether(frame)
            if UDP not in outer or outer[UDP].dport != _VXLAN_PORT:
                continue
            inner = VXLAN(bytes(outer[UDP].payload))
            if ICMP in inner and inner[ICMP].type == _ICMP_ECHO_REQUEST and inner[IP].dst == target.address:
                return frame
    raise LabError("no VXLAN packet was seen on the underlay.")


def _dissected(frame: bytes, source: Host, target: Host) -> str:
    """One line for each header: size, values, and what they mean here."""
    from scapy.layers.inet import ICMP, IP, UDP
    from scapy.layers.l2 import Ether
    from scapy.layers.vxlan import VXLAN

    outer = Ether(frame)
    udp = outer[UDP]
    vxlan = VXLAN(bytes(udp.payload))
    inner = vxlan[Ether]
    echo = inner[ICMP]
    headers = [
        ("Ethernet", 14, f"{outer.src} -> {outer.dst}", "eth0 of both hosts"),
        ("IPv4", outer[IP].ihl * 4, f"{outer[IP].src} -> {outer[IP].dst}", f"underlay: {source.name} to {target.name}"),
        ("UDP", 8, f"port {udp.sport} -> {udp.dport}", "source port: hash of the flow"),
        ("VXLAN", 8, f"flags {int(vxlan.flags):#04x}, VNI {vxlan.vni}", _flags_meaning(int(vxlan.flags))),
        ("Ethernet", 14, f"{inner.src} -> {inner.dst}", "VTEP of both hosts"),
        ("IPv4", inner[IP].ihl * 4, f"{inner[IP].src} -> {inner[IP].dst}", f"pods; TTL {inner[IP].ttl} after one hop"),
        ("ICMP", len(echo), f"echo request {echo.seq}", "what the pod sent"),
    ]
    rows = [
        (f"{'  ' * depth}{name}", f"{size} bytes", values, meaning)
        for depth, (name, size, values, meaning) in enumerate(headers)
    ]
    overhead = len(outer[IP]) - len(inner[IP])
    return table(("HEADER", "SIZE", "VALUES", "MEANING"), rows) + (
        f"\nOn the underlay the pod's IPv4 packet is {overhead} bytes longer: "
        f"hence the pods' MTU of {source.subnet_env['FLANNEL_MTU']}."
    )


def _flags_meaning(flags: int) -> str:
    return "the flag: the VNI is valid" if flags == _VNI_IS_VALID else "unusual flags"

"""The hosts and pods of a lab: their agents, what these were given, and what their kernels hold.

Owns what is inside a host's namespace and its pods'. The cluster, which makes the namespaces and starts the processes,
is `cluster`.
"""

import contextlib
import ipaddress
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from overlay.netns import Namespace, NamespaceError
from overlay.topology import Interface, address_lines
from subnet_lease.model import Lease, LeaseAttrs, Prefix, format_address, format_mac

if TYPE_CHECKING:
    from overlay.cluster import Lab

_SUBNETS = {4: "FLANNEL_SUBNET", 6: "FLANNEL_IPV6_SUBNET"}
"""Address family -> what it is called in `subnet.env`."""

T = TypeVar("T")


class LabError(NamespaceError):
    """What stands in the lab's way, as one sentence for its user; an agent's or etcd's last words may follow."""


def wait_until(
    condition: Callable[[], T], seconds: float = 20, what: str = "what was waited for", interval: float = 0.02
) -> T:
    """The first truthy value of `condition`; LabError naming `what` if there is none within `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise LabError(f"{what}: not within {seconds:g} s.")
        time.sleep(interval)
    return value


class Place(Namespace):
    """A namespace of a lab. `name` is what people call it: `hub`, `h1`, `h1p2`."""

    def __init__(self, lab: "Lab", name: str) -> None:
        super().__init__(lab.prefix + name)
        self.lab = lab
        self.name = name


class Pod(Place):
    """A pod: one address of each of its host's subnets on `eth0`."""

    def __init__(self, host: "Host", number: int) -> None:
        super().__init__(host.lab, f"{host.name}p{number}")
        self.host = host
        self.number = number

    @property
    def addresses(self) -> dict[int, str]:
        """By family. The first address of a subnet is the host's, the pods follow."""
        return {family: str(self.interface(gateway).ip) for family, gateway in self.host.gateways.items()}

    def interface(self, gateway: Interface) -> Interface:
        """Its address, with length, in the subnet that begins with this gateway."""
        return ipaddress.ip_interface(f"{gateway.ip + self.number}/{gateway.network.prefixlen}")

    @property
    def address(self) -> str:
        """The first of them: IPv4 where the overlay has it."""
        return next(iter(self.addresses.values()))


class Host(Place):
    """A host: `eth0` on the underlay, an agent, and pods."""

    def __init__(self, lab: "Lab", number: int, pods: int) -> None:
        super().__init__(lab, f"h{number}")
        self.seat = lab.topology.seat(self.name, number)
        self.pods = [Pod(self, each + 1) for each in range(pods)]
        self.subnet_file = lab.state / f"{self.name}.env"
        self.state_dir = lab.state / f"{self.name}.state"
        self.control_socket = lab.state / f"{self.name}.sock"
        self._notify_path = lab.state / f"{self.name}.notify"
        self._notify: socket.socket | None = None

    @property
    def underlay_ips(self) -> dict[int, str]:
        """Its addresses on the underlay, by family."""
        return {family: str(address.ip) for family, address in self.seat.addresses.items()}

    @property
    def underlay_ip(self) -> str:
        """The first of them: IPv4 where it has it."""
        return next(iter(self.underlay_ips.values()))

    def renumber(self, **addresses: str) -> None:
        """Give it other addresses on its link in place of all it has: `ipv4="172.30.0.99"`, `ipv6="fd30::99"`, or both.

        As with a new lease of a DHCP server, the old addresses go first, and the routes with them.
        """
        chosen: dict[int, Interface] = {}
        for family in (4, 6):
            if text := addresses.get(f"ipv{family}"):
                chosen[family] = ipaddress.ip_interface(f"{text}/{self.seat.link.hub[family].network.prefixlen}")
        self.seat = self.seat.renumbered(chosen)
        self.ip(*self.seat.renumber_lines())

    # --- its agent ---

    @property
    def agent_pid(self) -> int | None:
        """None if no agent runs."""
        return self.lab.process(self.name)

    @property
    def agent_options(self) -> list[str]:
        """What the agent is started with; commands that ask no agent need them too."""
        return [
            # Not the machine's own configuration.
            *("--config", os.devnull),
            *("--etcd-endpoints", self.lab.etcd_endpoint(min(self.underlay_ips))),
            *(("--iface", self.seat.device) if self.lab.underlay_options is None else self.lab.underlay_options),
            *("--subnet-file", str(self.subnet_file)),
            *("--state-dir", str(self.state_dir)),
            *("--control-socket", str(self.control_socket)),
            *("--node-name", self.name),
            *("--healthz-port", "0"),
            *self.lab.agent_options,
        ]

    def start_agent(self, *options: str) -> None:
        """Start the agent; it is ready later: see `wait_ready`."""
        self.close()
        self._notify_path.unlink(missing_ok=True)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(self._notify_path))
        argv = [*self.lab.agent_command, *self.agent_options, *options]
        self.lab.start(self.name, self.inside(*argv), {"NOTIFY_SOCKET": str(self._notify_path)})

    def wait_ready(self, seconds: float = 30) -> None:
        """Until the agent says READY=1 (sd_notify(3)); LabError with the end of its log if it ends or takes longer."""
        if self._notify is None:
            raise LabError(f"{self.name}: no agent was started from here.")
        deadline = time.monotonic() + seconds
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            watched: list[socket.socket | int] = [self._notify]
            if (pid := self.agent_pid) is not None:
                exit_handle = os.pidfd_open(pid)
                stack.callback(os.close, exit_handle)
                watched.append(exit_handle)
            while pid is not None and (left := deadline - time.monotonic()) > 0:
                readable = select.select(watched, [], [], left)[0]
                if self._notify in readable:
                    if b"READY=1" in self._notify.recv(4096).split(b"\n"):
                        return
                elif readable:
                    break
        what = f"is not ready after {seconds:g} s" if self.agent_pid else "has ended before it was ready"
        raise LabError(f"the agent on {self.name} {what}; the end of its log:\n{tail(self.log())}")

    def kill_agent(self, number: signal.Signals = signal.SIGTERM, seconds: float = 10) -> int | None:
        """Send the signal and wait for the exit. Its exit code, if this process started the agent."""
        return self.lab.kill(self.name, number, seconds)

    def log(self) -> str:
        """All that the agents on this host have written."""
        return self.lab.log(self.name)

    def close(self) -> None:
        """Stop listening for the agent's readiness."""
        if self._notify is not None:
            self._notify.close()
            self._notify = None
            self._notify_path.unlink(missing_ok=True)

    # --- what it was given ---

    @property
    def subnet_env(self) -> dict[str, str]:
        """The contents of `subnet.env`; empty if there is none."""
        try:
            lines = self.subnet_file.read_text().splitlines()
        except FileNotFoundError:
            return {}
        return dict(line.split("=", 1) for line in lines if "=" in line)

    @property
    def gateways(self) -> dict[int, Interface]:
        """By family, the first address of the host's subnet, with its length; LabError if it has no subnet yet."""
        env = self.subnet_env
        found = {each: ipaddress.ip_interface(env[name]) for each, name in _SUBNETS.items() if name in env}
        if not found:
            raise LabError(f"{self.name} has no subnet yet; its log is {self.lab.log_path(self.name)}.")
        return found

    @property
    def subnets(self) -> dict[int, str]:
        """By family, as `10.244.7.0/24`; LabError if it has none yet."""
        return {family: str(gateway.network) for family, gateway in self.gateways.items()}

    @property
    def subnet(self) -> str:
        """The first of them: IPv4 where the overlay has it."""
        return next(iter(self.subnets.values()))

    def attach_pods(self) -> None:
        """Give the pods their addresses out of the present subnets: a bridge `cni0` and a veth pair for each."""
        gateways, mtu = self.gateways, self.subnet_env["FLANNEL_MTU"]
        if any(link["ifname"] == "cni0" for link in self.json("ip", "link")):
            self.ip("link del cni0", *(f"link del p{pod.number}" for pod in self.pods))
        self.ip(
            f"link add cni0 mtu {mtu} type bridge",
            *address_lines("cni0", gateways),
            "link set cni0 up",
            *(f"link add p{pod.number} mtu {mtu} type veth peer eth0 mtu {mtu} netns {pod.netns}" for pod in self.pods),
            *(f"link set p{pod.number} master cni0 up" for pod in self.pods),
        )
        for pod in self.pods:
            pod.ip(
                "link set lo up",
                *address_lines("eth0", {family: pod.interface(gateway) for family, gateway in gateways.items()}),
                "link set eth0 up",
                *(f"route add default via {gateway.ip}" for gateway in gateways.values()),
            )

        def forwarding() -> bool:
            ports = [port for port in self.json("bridge", "link") if port["master"] == "cni0"]
            return all(port["state"] == "forwarding" for port in ports)

        # The kernel opens a bridge's port some time after its link came up, later still when it is busy.
        wait_until(forwarding, 10, f"all ports of cni0 on {self.name} forwarding")

    # --- what its kernel holds ---

    def holds(self, lease: Lease) -> bool:
        """Whether the lease is this host's."""
        return bool(set(addresses_of(lease.attrs)) & set(self.underlay_ips.values()))

    def peers(self, leases: Sequence[Lease]) -> "list[Peer]":
        """For every subnet of every lease but this host's own, what the kernel holds for it.

        Leases that ask for no entries, having neither a tunnel's end nor a route to their host, are left out.
        """
        kernel = _Entries(self)
        peers = []
        for lease in leases:
            if not self.holds(lease) and (macs_of(lease.attrs) or lease.attrs.backend_type == "host-gw"):
                peers += [kernel.peer(lease, subnet) for subnet in lease.subnets]
        return peers


@dataclass(frozen=True, slots=True)
class Peer:
    """What one host's kernel holds for a subnet of another; empty texts stand for missing entries.

    The route to the subnet leads to `gateway` on `device`, through the nexthop object `nexthop` (0: none, a plain
    route). If it is `direct` it leaves by the underlay, and the gateway is the peer itself. Else the device is a
    tunnel: its neighbour entry of the gateway says `mac`, and its FDB entry of that MAC says `remote`.
    """

    lease: Lease
    subnet: Prefix
    device: str
    direct: bool
    nexthop: int
    gateway: str
    mac: str
    remote: str

    @property
    def programmed(self) -> bool:
        """Whether all that it takes to reach the subnet is in place."""
        addresses = addresses_of(self.lease.attrs)
        if self.direct:
            return self.gateway in addresses
        return self.mac in macs_of(self.lease.attrs) and self.remote in addresses


class _Entries:
    """A host's routes, nexthop objects, neighbours and FDB entries at one moment."""

    def __init__(self, host: Host) -> None:
        self._underlay = host.seat.device
        self._routes = {route["dst"]: route for family in ("-4", "-6") for route in host.json("ip", family, "route")}
        self._nexthops = {nexthop["id"]: nexthop for nexthop in host.json("ip", "nexthop")}
        self._neighbours = {(each["dev"], each["dst"]): each.get("lladdr", "") for each in host.json("ip", "neigh")}
        self._fdb = {(each["ifname"], each["mac"]): each["dst"] for each in host.json("bridge", "fdb") if "dst" in each}

    def peer(self, lease: Lease, subnet: Prefix) -> Peer:
        """What stands here for a subnet of the lease."""
        route = self._routes.get(str(subnet), {})
        nexthop = route.get("nhid", 0)
        hop: Mapping[str, Any] = self._nexthops.get(nexthop, {}) if nexthop else route
        device = hop.get("dev", "")
        # A gateway of another family than the route's is told apart, with its family.
        gateway = hop.get("gateway") or hop.get("via", {}).get("host", "")
        mac = self._neighbours.get((device, gateway), "")
        remote = self._fdb.get((device, mac), "")
        return Peer(lease, subnet, device, device == self._underlay, nexthop, gateway, mac, remote)


def addresses_of(attrs: LeaseAttrs) -> tuple[str, ...]:
    """The holder's addresses on the underlay, IPv4 first."""
    return tuple(format_address(each) for each in (attrs.public_ip, attrs.public_ip6) if each is not None)


def macs_of(attrs: LeaseAttrs) -> tuple[str, ...]:
    """The MACs of the holder's tunnel ends, that of the IPv4 underlay first."""
    return tuple(format_mac(vtep.mac) for vtep in (attrs.vtep, attrs.vtep6) if vtep is not None)


def tail(text: str, lines: int = 12) -> str:
    """The end of a log, indented."""
    return "\n".join("  " + line for line in text.splitlines()[-lines:]) or "  (it is empty)"

"""The causes: what can be wrong with a host's overlay, by one name each, wherever it is seen.

`status`, `doctor`, the probes, the health pages and docs/troubleshooting.md take names, severities, words and remedies
from here. Who finds a cause makes a `Finding` of it, with what was seen; `roots` says which of several findings are
worth telling: a fault has consequences, and whoever mends it wants its cause alone.

Texts may have placeholders in braces, as `{interface}`, which a finding fills in; one that nobody has filled shows as
`INTERFACE`. Commands stand between backticks.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

DEGRADED, DOWN = "degraded", "down"
"""Severities. Degraded: packets go on, something is amiss or will be. Down: the host's overlay does not do its work."""


@dataclass(frozen=True, slots=True)
class Cause:
    """One thing that can be wrong.

    `symptom` is what people notice, `what` one clause that says what the matter is, `evidence` by what it is seen,
    `remedy` what mends it. `hides` are the causes that it brings about: on the whole host, or where it is found about
    one subject (a peer, a device), about that subject.
    """

    name: str
    severity: str
    symptom: str
    what: str
    evidence: str
    remedy: str
    hides: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Finding:
    """A cause that was found. `subject` is whom it is about: a peer's subnets, a device; empty for the host.

    A peer is called by the subnets of its lease (`format_subnets`), a lease that names none by its key. `evidence` is
    what was seen, one line each. `values` are for the placeholders. `remedy` is one that is more exact
    than the cause's own, `what` a clause that is; empty if there is none. `severity` is another than the cause's.
    `hides` are causes that this very finding brings about, beside those of its cause.
    """

    cause: str
    subject: str = ""
    evidence: tuple[str, ...] = ()
    values: Mapping[str, str] = field(default_factory=dict)
    what: str = ""
    remedy: str = ""
    severity: str = ""
    hides: frozenset[str] = frozenset()


def _causes(*causes: Cause) -> Mapping[str, Cause]:
    return {cause.name: cause for cause in causes}


_PATHS = frozenset({"peer_down", "underlay_unreachable", "port_blocked", "port_blocked_out", "port_blocked_in"})
"""What a measured path is found to suffer from, when nobody knows better."""

_TUNNEL = _PATHS | {"path_mtu", "checksum_offload"}
"""What seems to be wrong with a path whose entries or device are."""

_ENTRIES = frozenset({"fdb_wrong", "neighbour_wrong", "route_wrong"})

_OF_ETCD = frozenset({"config_missing", "config_unusable", "lease_expiring", "lease_lost"})
"""What follows, in time, from an etcd that does not answer this host."""

CAUSES: Mapping[str, Cause] = _causes(
    # --- agent ---
    Cause(
        "no_privilege",
        DOWN,
        "The agent ends at once, or repairs nothing; commands say less than they could.",
        "a process lacks privileges that the kernel asks for",
        "`grep CapEff /proc/{pid}/status` lacks CAP_NET_ADMIN (bit 12) or CAP_NET_RAW (bit 13).",
        "Start it by its systemd unit or with sudo; in a container, add `--cap-add NET_ADMIN --cap-add NET_RAW`.",
        frozenset({"agent_not_running"}),
    ),
    Cause(
        "kernel_feature_missing",
        DOWN,
        "The agent ends at once and says what it lacks.",
        "this host lacks {feature}, which the agent needs",
        "`modprobe -n vxlan`, `nft --version`: the module or the program is not there.",
        "Run `sudo modprobe vxlan` on the host, or install a kernel with CONFIG_VXLAN; for firewall rules, install the "
        "package nftables.",
        frozenset({"agent_not_running", "device_missing"}),
    ),
    Cause(
        "agent_not_running",
        DOWN,
        "Hosts that join are not reached, nothing is repaired; what was programmed goes on.",
        "no agent runs on this host",
        "Nobody holds the claim `@overlay-agent` in /proc/net/unix; `systemctl status overlay-agent`.",
        "Run `sudo systemctl start overlay-agent`; `journalctl -u overlay-agent -n 50` says why it ended.",
        frozenset({"lease_expiring"}),
    ),
    Cause(
        "agent_starting",
        DOWN,
        "Hosts that join are not reached yet; what was programmed before goes on.",
        "the agent is not ready: it waits for {what}",
        "/readyz answers 503 and says what for.",
        "Wait, `overlay-agent status --watch` shows when it is done; if it takes minutes, `journalctl -u overlay-agent "
        "-n 50`.",
    ),
    Cause(
        "agent_stalled",
        DOWN,
        "As without an agent, while its process runs.",
        "the agent runs and does not do its work",
        "/healthz answers 503 and names the loop, or nobody answers at the control socket.",
        "Run `sudo systemctl restart overlay-agent`; before it, `sudo overlay-agent doctor --bundle FILE` keeps what a "
        "maintainer needs.",
        _ENTRIES | {"lease_expiring"},
    ),
    Cause(
        "second_agent",
        DEGRADED,
        "Entries come and go; the log tells of drift again and again, or a unit restarts without end.",
        "{program} (process {pid}) wants to program this host as well",
        "`ps -eo pid,args | grep -E 'flanneld|overlay-agent run'` shows more than one in this network namespace.",
        "Keep one of them: `sudo systemctl disable --now flanneld`, or what started process {pid}.",
        frozenset({"foreign_entries", "flannel_leftover"}),
    ),
    Cause(
        "options_unreadable",
        DOWN,
        "The agent does not start again; one that runs goes on with what it read before.",
        "the options cannot be used",
        "`overlay-agent run --help` says the names; the message of the agent's start says file, option and reason.",
        "Correct {path}, which has to be TOML that root may read; /etc/overlay-agent/overlay-agent.toml is documented "
        "in docs/configuration.md.",
        frozenset({"agent_not_running", "lease_expiring"}),
    ),
    Cause(
        "journal_failing",
        DEGRADED,
        "`overlay-agent events` and `whois --at` lack the latest; a host that boots while etcd is away waits.",
        "the agent cannot write what it keeps on disk",
        "`df {path}` and `df -i {path}` show a full disk, or `mount` one that is read-only.",
        "Free space on the file system of {path}, or set `state-dir` to a directory that can be written.",
    ),
    # --- etcd ---
    Cause(
        "etcd_unreachable",
        DEGRADED,
        "Hosts that join are not reached, hosts that leave are not forgotten; flows go on.",
        "etcd does not answer",
        "`etcdctl --endpoints {endpoint} endpoint health` gets no answer from here.",
        "Bring etcd back, or open the way to {endpoint}; correct `etcd-endpoints` if its members have moved.",
        _OF_ETCD,
    ),
    Cause(
        "etcd_denied",
        DEGRADED,
        "As with etcd away, though it answers others.",
        "etcd refuses this host",
        "The log has `store_denied` with etcd's reason: user, password, or permission.",
        "Give the user of `etcd-username` its password in `etcd-password-file`, and its role what it needs: `etcdctl "
        "role grant-permission ROLE readwrite --prefix {prefix}`.",
        _OF_ETCD,
    ),
    Cause(
        "etcd_certificate",
        DEGRADED,
        "As with etcd away, from the moment on at which a certificate ended.",
        "a certificate on the way to etcd has ended, will soon, or is not believed",
        "`openssl x509 -noout -enddate -in {path}`; the log names the certificate that is refused.",
        "Renew {path}; agents read it again when it has changed.",
        _OF_ETCD,
    ),
    Cause(
        "config_missing",
        DOWN,
        "An agent that starts waits; those that run go on.",
        "there is no network configuration in etcd",
        "`etcdctl get {prefix}/config` is empty.",
        'Run `etcdctl put {prefix}/config \'{{"Network": "10.244.0.0/16", "Backend": {{"Type": "vxlan"}}}}\'`, '
        "with the network of your cluster.",
        frozenset({"lease_lost"}),
    ),
    Cause(
        "config_unusable",
        DEGRADED,
        "A change has no effect; an agent that starts ends.",
        "the network configuration in etcd cannot be used",
        "`etcdctl get {prefix}/config`; the log has `config_unusable` with key and reason.",
        "Correct the key {prefix}/config; docs/wire-contract.md has its fields.",
        frozenset({"agent_not_running"}),
    ),
    Cause(
        "config_needs_restart",
        DEGRADED,
        "A change has no effect; hosts that restart differ from those that do not.",
        "the network configuration was changed in what no running agent can change",
        "The log has `config_needs_restart` with the fields.",
        "Restart all agents, `sudo systemctl restart overlay-agent` on each host, or put the old value back.",
    ),
    Cause(
        "clock_skew",
        DEGRADED,
        "Certificates seem to be not yet valid or to have ended; logs of hosts do not fit together.",
        "the clock of this host differs from that of etcd's by {seconds} s",
        "`timedatectl timesync-status`; etcd's answers carry its date: `curl -sI {endpoint}/version`.",
        "Run `sudo timedatectl set-ntp true`, and see that a time server answers: `timedatectl timesync-status`.",
        frozenset({"etcd_certificate"}),
    ),
    # --- lease ---
    Cause(
        "lease_lost",
        DOWN,
        "Other hosts withdraw their routes to this host's pods.",
        "this host holds no lease",
        "`overlay-agent leases` shows none with this host's address; the log has `lease_lost`.",
        "The agent takes it again as soon as it can; `journalctl -u overlay-agent -n 50` says what it waits for. If it "
        "recurs, look for who deletes keys below {prefix}/subnets.",
    ),
    Cause(
        "lease_expiring",
        DEGRADED,
        "Nothing yet; when the lease ends, other hosts withdraw their routes to this host's pods.",
        "this host's lease ends in {left} and was not renewed in time",
        "`overlay-agent leases` shows how long it still lasts.",
        "See that the agent runs and reaches etcd: `overlay-agent status`.",
    ),
    Cause(
        "subnets_exhausted",
        DEGRADED,
        "A host that joins gets no subnet.",
        "all subnets of the network are taken",
        "`overlay-agent leases` lists as many as the network has; the log has `subnet_exhausted`.",
        "Release what nobody uses, `overlay-agent cleanup --release` on its host or `overlay-agent unreserve SUBNET`; "
        "or widen SubnetMin and SubnetMax in {prefix}/config.",
        frozenset({"lease_lost"}),
    ),
    Cause(
        "lease_invalid",
        DEGRADED,
        "The pods of one host are not reached from anywhere.",
        "a lease cannot be believed, and is not used",
        "`overlay-agent leases` marks it with ! and says why.",
        "Look at who wrote it, `etcdctl get {prefix}/subnets/{key} -w json`; correct it there, or delete it: `etcdctl "
        "del {prefix}/subnets/{key}`.",
    ),
    Cause(
        "subnet_conflict",
        DEGRADED,
        "The pods of the younger host are not reached.",
        "two hosts claim overlapping subnets; the elder lease counts",
        "`overlay-agent leases` marks the younger one with ! and names the elder.",
        "Delete the younger, `etcdctl del {prefix}/subnets/{key}`, and restart the agent of its host, which takes "
        "another subnet; then its pods.",
    ),
    Cause(
        "duplicate_public_ip",
        DEGRADED,
        "One of two hosts is not reached, or its pods' packets arrive at the other.",
        "two hosts have the same underlay address in their leases",
        "`overlay-agent leases` shows PUBLIC IP {address} twice, or a lease of ours with another host's MAC.",
        "Give one of them another address, or correct its `public-ip`, and restart its agent.",
    ),
    Cause(
        "cloned_machine",
        DEGRADED,
        "One of two hosts is not reached.",
        "two hosts have the same VTEP MAC: one was cloned from the other",
        "`overlay-agent leases` shows VTEP MAC {mac} twice, with two addresses.",
        "On the clone, with its agent stopped: `sudo overlay-agent cleanup --release`, `sudo rm /etc/machine-id`, "
        "`sudo systemd-machine-id-setup`, `sudo systemctl start overlay-agent`.",
    ),
    # --- paths ---
    Cause(
        "peer_down",
        DEGRADED,
        "The pods of one host are not reached.",
        "{peer} does not answer at all",
        "Nobody answers for {underlay} on the link: `ip neigh show {underlay}` says FAILED; others answer.",
        "Look at that host. If it is gone for good, its lease ends by itself, or `etcdctl del` removes it now.",
        frozenset({"underlay_unreachable", "port_blocked", "port_blocked_out", "port_blocked_in", "path_mtu"}),
    ),
    Cause(
        "underlay_unreachable",
        DEGRADED,
        "The pods of one or more hosts are not reached.",
        "no packet of this host reaches {peer}, with or without a tunnel",
        "`ping {underlay}` gets no answer, and no probe through the tunnel; `ip route get {underlay}`.",
        "Mend the way to {underlay}: routes, the switches between, or the other host's firewall.",
        frozenset({"port_blocked", "port_blocked_out", "port_blocked_in", "path_mtu"}),
    ),
    Cause(
        "port_blocked",
        DEGRADED,
        "Hosts reach each other, their pods do not.",
        "something between this host and {peer} drops the tunnel's packets in both directions",
        "`ping {underlay}` is answered, nothing comes out of the tunnel: `overlay-agent capture {peer}`.",
        "Open UDP port {port} between the hosts, in both directions: firewalls of the hosts (`nft insert rule inet "
        "filter input udp dport {port} accept`), security groups, routers.",
        frozenset({"path_mtu", "checksum_offload"}),
    ),
    Cause(
        "port_blocked_out",
        DEGRADED,
        "Pods on the two hosts do not reach each other; packets arrive from there and none gets there.",
        "something drops the tunnel's packets from this host to {peer}",
        "`overlay-agent capture {peer}` shows packets in both directions here, and only one direction there.",
        "Open UDP port {port} from this host to {underlay}: this host's output, routers, the input of {peer}.",
        frozenset({"port_blocked", "path_mtu", "checksum_offload"}),
    ),
    Cause(
        "port_blocked_in",
        DEGRADED,
        "Pods on the two hosts do not reach each other; packets get there and none comes back.",
        "something drops the tunnel's packets from {peer} to this host",
        "`overlay-agent capture {peer}` shows no packet from there; the rule is in `{command}`.",
        "Let UDP port {port} in: `nft insert rule inet filter input udp dport {port} accept`, or the rule's own tool.",
        frozenset({"port_blocked", "port_blocked_out", "path_mtu", "checksum_offload"}),
    ),
    Cause(
        "path_mtu",
        DEGRADED,
        "Small packets pass and large ones do not: ping works, TCP connections hang after their start.",
        "the way to {peer} does not carry the packets that the tunnel sends",
        "`ping -M do -s {payload} {underlay}` is not answered, a small one is.",
        "Raise the MTU on the way to {underlay}; or set Backend.MTU to {mtu} in {prefix}/config and restart the pods.",
    ),
    Cause(
        "duplicate_address",
        DEGRADED,
        "Packets to this host arrive now and then; its peers' neighbour tables change back and forth.",
        "another machine on the link of {interface} has this host's address {address}",
        "`arping -D -I {interface} {address}` is answered by {mac}.",
        "Give one of the two machines another address.",
        frozenset({"duplicate_public_ip", "cloned_machine"}),
    ),
    Cause(
        "underlay_choice",
        DEGRADED,
        "No packet of the tunnels arrives, or they take a way nobody meant; the agent does not start.",
        "the interface that carries the overlay is missing, or is not the one that leads to the peers",
        "`ip route get {underlay}` leaves by another interface than `overlay-agent status` names.",
        "Set `iface` to the interface that leads to the peers, or `iface-can-reach` to the address of one.",
        frozenset({"device_missing", "device_down"}) | _TUNNEL,
    ),
    # --- entries ---
    Cause(
        "device_missing",
        DOWN,
        "No pod of this host reaches one of another.",
        "the VXLAN device {device} is missing",
        "`ip -d link show {device}`",
        "The agent makes it: `sudo systemctl restart overlay-agent`.",
        _ENTRIES | _TUNNEL | {"device_down", "foreign_entries"},
    ),
    Cause(
        "device_down",
        DOWN,
        "No pod of this host reaches one of another.",
        "the interface {device} is down",
        "`ip link show {device}` lacks UP or LOWER_UP.",
        "Run `sudo ip link set {device} up`; the agent, if it runs, puts the routes back.",
        _ENTRIES | _TUNNEL,
    ),
    Cause(
        "fdb_wrong",
        DEGRADED,
        "The pods of one host are not reached.",
        "the forwarding entry for {peer} is missing or leads elsewhere",
        "`bridge fdb show dev {device}` does not have {mac} with dst {underlay}.",
        "The agent repairs it at once: `sudo systemctl restart overlay-agent` if it does not run.",
        _TUNNEL,
    ),
    Cause(
        "neighbour_wrong",
        DEGRADED,
        "The pods of one host are not reached.",
        "the neighbour entry for {peer} is missing or has another MAC",
        "`ip neigh show dev {device}` does not have {gateway} with lladdr {mac}.",
        "The agent repairs it at once: `sudo systemctl restart overlay-agent` if it does not run.",
        _TUNNEL,
    ),
    Cause(
        "route_wrong",
        DEGRADED,
        "The pods of one host are not reached.",
        "the route to {peer} is missing or leads elsewhere",
        "`ip route show {subnet}` is not by {gateway} on {device}.",
        "The agent repairs it at once: `sudo systemctl restart overlay-agent` if it does not run.",
        _TUNNEL,
    ),
    Cause(
        "route_foreign",
        DEGRADED,
        "The pods of one host are not reached, though all entries are in place.",
        "a route of another tool takes packets for {peer}",
        "`ip route get {gateway}` goes by {route}.",
        "Remove it, and have its owner leave the overlay's network alone: `{command}`.",
        _TUNNEL | {"route_wrong"},
    ),
    Cause(
        "entries_refused",
        DEGRADED,
        "Some hosts are not reached.",
        "the kernel refuses entries",
        "`overlay-agent status` lists them with the kernel's reason.",
        "With ENOSPC or ENOBUFS raise the kernel's limit, `sysctl net.ipv4.neigh.default.gc_thresh3`; with EEXIST or "
        "ENETUNREACH look for what another tool has put in its place.",
        _ENTRIES,
    ),
    Cause(
        "foreign_entries",
        DEGRADED,
        "Packets for addresses that nobody has any more go to a host that drops them.",
        "there are entries on {device} that no lease calls for",
        "`ip route show dev {device}`, `bridge fdb show dev {device}`, `ip neigh show dev {device}`.",
        "A running agent removes them; else `{command}`.",
    ),
    Cause(
        "overlapping_route",
        DEGRADED,
        "Some addresses of the overlay lead to another network of this host; peers there cannot be reached.",
        "a network of this host overlaps the overlay's",
        "`ip route show table all` has {route}, which overlaps {network}.",
        "Move one of them: the other network (Docker: `bip` and `default-address-pools` in /etc/docker/daemon.json), "
        "or choose another Network for the cluster.",
        frozenset({"route_foreign"}),
    ),
    # --- kernel settings and firewall ---
    Cause(
        "forwarding_off",
        DOWN,
        "Pods of this host reach nobody outside it, and nobody reaches them.",
        "the kernel does not forward packets: {setting} is {value}",
        "`sysctl {setting}`",
        "Run `sudo sysctl -w {setting}={wanted}`, and put `{setting} = {wanted}` into "
        "/etc/sysctl.d/90-overlay-agent.conf.",
    ),
    Cause(
        "forward_drop",
        DOWN,
        "Pods reach their own host and nobody beyond; hosts reach each other's pods.",
        "{program} drops forwarded packets of the overlay",
        "`{command}` shows a rule or a policy that drops them, and none before it that accepts {network}.",
        "Accept what comes from and goes to {network} there; `iptables -I FORWARD -s {network} -j ACCEPT` and `-d`.",
        frozenset({"br_netfilter"}),
    ),
    Cause(
        "rp_filter",
        DEGRADED,
        "Packets of some hosts are dropped on arrival; nothing counts them but `nstat -az TcpExtIPReversePathFilter`.",
        "the strict reverse path filter of {interface} drops what arrives from peers that are answered by another way",
        "`sysctl net.ipv4.conf.all.rp_filter {setting}` has 1, and `ip route get {underlay}` leaves by another "
        "interface.",
        "Run `sudo sysctl -w {setting}=2`, and put it into /etc/sysctl.d/90-overlay-agent.conf; or mend the routes.",
        _PATHS | {"path_mtu"},
    ),
    Cause(
        "br_netfilter",
        DEGRADED,
        "Pods on one host do not reach each other, or services do not work between them.",
        "frames that pods of this host send each other by a bridge go through a firewall that drops them",
        "`sysctl net.bridge.bridge-nf-call-iptables` is 1, and `{command}` drops what it does not know.",
        "Accept {network} there, or run `sudo sysctl -w net.bridge.bridge-nf-call-iptables=0` if nothing (kube-proxy, "
        "network policies) needs it.",
    ),
    Cause(
        "checksum_offload",
        DEGRADED,
        "Ping works, TCP and UDP do not, or not from some hosts.",
        "packets with wrong checksums leave, or arrive: a network card or driver does not finish them",
        "`ethtool -k {device} | grep tx-checksum-ip-generic`; InCsumErrors in `nstat -az` rise on the other side.",
        "Run `sudo ethtool -K {device} tx-checksum-ip-generic off`; the agent does so by itself where it measures that "
        "it helps. Then look for a newer driver or firmware of {interface}.",
    ),
    Cause(
        "guard_drops",
        DEGRADED,
        "Packets of a host that has no lease here do not arrive.",
        "the source guard drops tunnel packets of {source}",
        "`nft list counters table inet overlay_agent` rises; `overlay-agent capture --filter remarks` shows them.",
        "If it is a host of the cluster, look at its lease: `overlay-agent leases`. If the underlay rewrites "
        "addresses, set `source-guard` to `log`. Else somebody forges packets: let only hosts use UDP port {port}.",
    ),
    # --- leftovers of other tools ---
    Cause(
        "flannel_leftover",
        DEGRADED,
        "Some addresses go by a device that nobody maintains.",
        "flannel has left {what} on this host",
        "`ip -d link show type vxlan`, `ip route`, `iptables -S | grep FLANNEL`",
        "Run `{command}`.",
        frozenset({"overlapping_route", "foreign_entries"}),
    ),
    Cause(
        "calico_leftover",
        DEGRADED,
        "Some addresses go by a device that nobody maintains, or are dropped by rules that nobody maintains.",
        "Calico has left {what} on this host",
        "`ip link | grep -E 'cali|vxlan.calico|tunl0'`, `ip route show proto 80`, `iptables -S | grep cali`",
        "Run `{command}`.",
        frozenset({"overlapping_route", "route_foreign"}),
    ),
)
"""All of them by name, in the order in which they are to be looked for: what others follow from comes first."""


# --- findings ----------------------------------------------------------------------------------------------------


def cause_of(finding: Finding) -> Cause:
    """What was found. A name that is none is a mistake of the program: KeyError."""
    return CAUSES[finding.cause]


def severity(finding: Finding) -> str:
    """`degraded` or `down`."""
    return finding.severity or cause_of(finding).severity


def what(finding: Finding) -> str:
    """One clause, with what is known filled in."""
    return finding.what or _filled(cause_of(finding).what, finding.values)


def remedy(finding: Finding) -> str:
    """What mends it, with what is known filled in."""
    return finding.remedy or _filled(cause_of(finding).remedy, finding.values)


def worst(findings: Iterable[Finding]) -> str | None:
    """The worst severity, None where there is no finding."""
    return max(map(severity, findings), key=(DEGRADED, DOWN).index, default=None)


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Each cause once for each subject, wherever it was seen: evidence and values put together, in the order of CAUSES.

    What is said of it is what the first says, so who knows most goes first.
    """
    found: dict[tuple[str, str], Finding] = {}
    for each in findings:
        key = each.cause, each.subject
        known = found.get(key, each)
        found[key] = Finding(
            each.cause,
            each.subject,
            tuple(dict.fromkeys((*known.evidence, *each.evidence))),
            {**each.values, **known.values},
            known.what,
            known.remedy,
            known.severity,
            known.hides | each.hides,
        )
    order = list(CAUSES)
    return sorted(found.values(), key=lambda each: (order.index(each.cause), each.subject))


def roots(findings: Iterable[Finding]) -> list[Finding]:
    """Those of `findings` that do not follow from others, merged.

    What is found about the host hides its consequences everywhere, and itself where it is found about one subject as
    well; what is found about one subject hides those about it.
    """
    all_found = merged(findings)
    return [each for each in all_found if not any(_hides(other, each) for other in all_found)]


def _hides(root: Finding, other: Finding) -> bool:
    if root.cause == other.cause:
        return not root.subject and bool(other.subject)
    return other.cause in cause_of(root).hides | root.hides and root.subject in ("", other.subject)


def as_json(finding: Finding) -> dict[str, Any]:
    """A finding in documents for programs: of `status`, `doctor` and the page alike."""
    return {
        "cause": finding.cause,
        "severity": severity(finding),
        "subject": finding.subject or None,
        "what": what(finding),
        "evidence": list(finding.evidence),
        "remedy": remedy(finding),
    }


# --- texts -------------------------------------------------------------------------------------------------------

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([a-z_]+)\}")


def placeholders(text: str) -> Iterator[str]:
    """The names of those in `text`."""
    return (found[1] for found in _PLACEHOLDER.finditer(text) if found[1])


def generic(text: str) -> str:
    """For a manual: the placeholders as their names in capitals."""
    return _filled(text, {})


def _filled(text: str, values: Mapping[str, str]) -> str:
    """Not str.format: values may hold anything, and one that is missing is no mistake."""

    def value(found: re.Match[str]) -> str:
        name = found[1]
        return found[0][0] if name is None else values.get(name, name.upper())

    return _PLACEHOLDER.sub(value, text)

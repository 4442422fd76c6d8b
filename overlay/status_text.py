"""The document of `status` laid out for a person: what is wrong first, then this host, then its peers, worst first.

Pure: a document goes in, which may have come from an agent of another version, lines come out. Nothing from outside
reaches a terminal but printable ASCII.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from textwrap import fill

from overlay.status import (
    DEGRADED,
    DOWN,
    HEALTHY,
    MOST_LISTED,
    PROGRAMMED,
    SCHEMA,
    CountsPart,
    DevicePart,
    Document,
    PeerPart,
    Problem,
)
from overlay.text import plain, shortened

_SPARED = "MTU", "CHANGED", "ENTRIES", "VTEP MAC", "LOSS", "PATH MTU"
"""Columns that are left out where there is no room, the first first."""

_COLOURS = {HEALTHY: "\033[1;32m", DEGRADED: "\033[1;33m", DOWN: "\033[1;31m"}

_INDENT = 13
"""Columns before the text of a line: a label, and a blank."""

MAX_NAME = 40
"""Columns that a host's name may take."""

SUBJECTS = 3
"""How many peers with one problem are named."""


def as_text(document: Document, columns: int | None = None, *, colour: bool = False) -> str:
    """The document for a person. `columns` is the width of the terminal, None for all that there is."""
    layout = _Layout(columns, colour)
    agent = document["agent"]
    who = f" on {plain(shortened(agent['node_name'], MAX_NAME))}" if agent else ""
    lines = [f"overlay{who}: {layout.painted(document['health'].upper(), document['health'])}"]
    lines += layout.problems(document["problems"])
    if document["schema"] != SCHEMA:
        told = f"The agent's document is of schema {document['schema']}, this command knows {SCHEMA}: restart the agent"
        return "\n".join([*lines, "", layout.folded(f"{told}, or use --json, which prints it as it is.", "")])
    lines += ["", *(layout.line(label, text) for label, text in _told(document))]
    if rejected := document["rejected"]:
        lines += ["", f"REJECTED LEASES {document['rejected_count']}"]
        lines += [layout.item(f"{plain(each['key'])}: {plain(each['reason'])}") for each in rejected]
        lines += _more(document["rejected_count"] - len(rejected))
    if refused := document["refused"]:
        lines += ["", f"REFUSED ENTRIES {document['refused_count']}"]
        lines += [layout.item(f"{each['entry']}: {each['error']}") for each in refused]
        lines += _more(document["refused_count"] - len(refused))
    if lacking := [peer for peer in document["peers"] or () if peer["missing"]]:
        lines += ["", f"PEERS WITH MISSING ENTRIES {len(lacking)}"]
        for peer in lacking[:MOST_LISTED]:
            subnets = " and ".join(peer["subnets"]) or "no subnet"
            lines.append(layout.item(f"{subnets} lacks {', '.join(peer['missing'])}"))
        lines += _more(len(lacking) - MOST_LISTED)
    if document["peers"] is not None and document["peer_counts"] is not None:
        lines += ["", *_peer_lines(document["peers"], document["peer_counts"], columns)]
    return "\n".join(lines)


class _Layout:
    """How lines are folded and painted."""

    def __init__(self, columns: int | None, colour: bool) -> None:
        self._columns = columns
        self._colour = colour

    def folded(self, text: str, indent: str) -> str:
        """The text, which follows lines of its own with this indent."""
        if not self._columns:
            return text
        # Commands are to be copied: none is broken at a hyphen.
        return fill(text, self._columns, subsequent_indent=indent, break_on_hyphens=False)

    def painted(self, text: str, severity: str) -> str:
        """The text in the colour of `severity`."""
        return f"{_COLOURS.get(severity, '')}{text}\033[0m" if self._colour else text

    def line(self, label: str, text: str) -> str:
        """A label, and what there is to say of it."""
        return self.folded(f"{label:<{_INDENT}}{plain(text)}", " " * _INDENT)

    def item(self, text: str) -> str:
        """One of a list."""
        return self.folded(f"  {plain(text)}", "    ")

    def problems(self, problems: Sequence[Problem]) -> Iterator[str]:
        """What is wrong, by cause, and what mends it: said once where it is the same for several peers."""
        for cause, group in groupby(problems, key=lambda problem: problem["cause"]):
            some = list(group)
            first = some[0]
            yield self.painted(self.folded(f"  ! {plain(cause)}: {plain(first['what'])}", "    "), first["severity"])
            for evidence in first["evidence"]:
                if evidence != first["what"]:
                    yield self.folded(f"    seen: {plain(evidence)}", "          ")
            if len(some) > 1:
                subjects = [plain(each["subject"] or each["what"]) for each in some[1 : 1 + SUBJECTS]]
                rest = len(some) - 1 - len(subjects)
                also = ", ".join(subjects) + (f" and {rest} more" if rest else "")
                yield self.folded(f"    also: {also}", "          ")
            yield self.folded(f"    mend: {plain(first['remedy'])}", "          ")


def _more(number: int) -> list[str]:
    return [f"  and {number} more"] if number > 0 else []


def _told(document: Document) -> Iterator[tuple[str, str]]:
    """Lines on this host: label and text."""
    agent, lease, network = document["agent"], document["lease"], document["network"]
    if agent:
        yield "agent", f"{agent['version']}, process {agent['pid']}, for {duration(agent['running_s'])}"
    else:
        yield "kernel", "all that follows is read from it: no agent answers"
    if lease:
        if lease["reserved"]:
            left = "reserved"
        else:
            left = f"{duration(lease['left_s'])} left" if lease["left_s"] is not None else "not confirmed by etcd yet"
        yield "lease", f"{' and '.join(lease['subnets'])}, {left}"
    for device in document["devices"]:
        yield "device", _device_told(device)
        if device["checksum_offload"]:
            yield "", f"checksum offload {device['checksum_offload']}"
    if underlay := document["underlay"]:
        yield "underlay", f"{underlay['interface']}, {' and '.join(underlay['addresses'])}, MTU {underlay['mtu']}"
        otherwise = f"; otherwise {underlay['runner_up']}" if underlay["runner_up"] else ""
        yield "", f"chosen: {underlay['why']}{otherwise}"
    if network:
        direct = " with direct routing" if network["direct_routing"] else ""
        routes = "nexthop objects" if network["nexthop_objects"] else "plain gateways"
        yield "network", f"{' and '.join(network['blocks'])}, MTU {network['mtu']}"
        yield "backend", f"{network['backend']}{direct}, routes through {routes}"
    if etcd := document["etcd"]:
        age = f"data {duration(etcd['data_age_s'])} old" if etcd["data_age_s"] is not None else "no data yet"
        yield "etcd", f"{'connected' if etcd['connected'] else f'AWAY, {age}'}, revision {etcd['revision']}"
    if dataplane := document["dataplane"]:
        surplus = f", {dataplane['surplus']} in the way" if dataplane["surplus"] else ""
        in_place = dataplane["wanted"] - dataplane["missing"]
        yield "entries", f"{in_place:,} of {dataplane['wanted']:,} in place{surplus}; {dataplane['drift']:,} repaired"
        yield "last pass", f"{duration(dataplane['last_pass_ago_s'])} ago"
        if change := dataplane["last_change"]:
            took = change["took_ms"]
            lasted = f"{took:g} ms" if took < 1000 else f"{took / 1000:.1f} s"
            did = f"{change['put']:,} put, {change['dropped']:,} dropped, {change['refused']:,} refused"
            yield "last change", f"{duration(change['ago_s'])} ago, in {lasted}: {did}"
    if firewall := document["firewall"]:
        counts = (("strangers", firewall["strangers"]), ("impostors", firewall["impostors"]))
        told = [f"{name} {count}" for name, count in (*counts, ("strays", firewall["strays"])) if count is not None]
        yield "firewall", f"guard {firewall['guard']}{'; packets of ' if told else ''}{', '.join(told)}"


def _device_told(device: DevicePart) -> str:
    if device["up"] is None:
        return f"{device['name']} is missing"
    state = "up" if device["up"] else "DOWN"
    addresses = "".join(f", {address}" for address in device["addresses"])
    tunnel = f"VNI {device['vni']}, port {device['port']}, MTU {device['mtu']}"
    return f"{device['name']} {state}{addresses}, {device['mac']}, {tunnel}"


# --- peers -------------------------------------------------------------------------------------------------------


def _peer_lines(peers: Sequence[PeerPart], counts: CountsPart, columns: int | None) -> Iterator[str]:
    states = ("programmed", counts["programmed"]), ("incomplete", counts["incomplete"])
    told = [f"{count:,} {name}" for name, count in (*states, ("unreachable", counts["unreachable"])) if count]
    yield f"PEERS {counts['total']:,}{': ' if told else ''}{', '.join(told)}"
    if not peers:
        return
    cells = _columns(peers)
    widths = {name: max(len(name), max(map(len, column))) for name, column in cells.items()}

    def excess() -> int:
        return sum(widths.values()) + 2 * (len(widths) - 1) - (columns or 0)

    spared = [name for name in _SPARED if name in cells]
    while columns is not None and excess() > 0 and spared:
        name = spared.pop(0)
        del cells[name], widths[name]
    if columns is not None and "HOST" in cells and excess() > 0:
        room = max(8, widths["HOST"] - excess())
        cells["HOST"] = [shortened(name, room) for name in cells["HOST"]]
        widths["HOST"] = room
    # One template for all rows: there may be thousands.
    row = "  ".join(f"{{:<{width}}}" for width in widths.values()).format
    yield row(*cells).rstrip()
    for each in zip(*cells.values(), strict=True):
        yield row(*each).rstrip()
    if len(peers) < counts["total"]:
        yield f"and {counts['total'] - len(peers):,} more, all in order; --peers lists them"


def _columns(peers: Sequence[PeerPart]) -> dict[str, list[str]]:
    """The cells of each column by its head; what no peer has takes none."""
    columns = {
        "!": ["" if peer["state"] == PROGRAMMED and not peer.get("cause") else "!" for peer in peers],
        "SUBNET": [" ".join(peer["subnets"]) or "-" for peer in peers],
        "HOST": [plain(shortened(peer["node_name"] or "-", MAX_NAME)) for peer in peers],
        "UNDERLAY": [" ".join(peer["underlay"]) or "-" for peer in peers],
        "STATE": [peer.get("cause") or peer["state"] for peer in peers],
        "RTT": [_number(peer.get("rtt_ms"), "{:.1f} ms") for peer in peers],
        "LOSS": [_number(peer.get("loss"), "{:.0%}") for peer in peers],
        "PATH MTU": [_number(peer.get("path_mtu"), "{}") for peer in peers],
        "ENTRIES": [_entries_told(peer) for peer in peers],
        "VTEP MAC": [" ".join(peer["macs"]) or "-" for peer in peers],
        "MTU": [str(peer["mtu"] or "-") for peer in peers],
        "CHANGED": [_ago(peer["changed_ago_s"]) for peer in peers],
    }
    return {name: cells for name, cells in columns.items() if name in ("SUBNET", "STATE") or set(cells) - {"", "-"}}


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _entries_told(peer: PeerPart) -> str:
    return f"{peer['entries']}, {len(peer['missing'])} missing" if peer["missing"] else str(peer["entries"])


def _ago(seconds: float | None) -> str:
    return "-" if seconds is None else f"{duration(seconds)} ago"


def duration(seconds: float | None) -> str:
    """Two units at most, as `3 min 20 s`."""
    if seconds is None:
        return "-"
    left = max(0, round(seconds))
    for unit, size, below in (("d", 86400, "h"), ("h", 3600, "min"), ("min", 60, "s")):
        if left >= size:
            whole, rest = divmod(left, size)
            part = rest // {"h": 3600, "min": 60, "s": 1}[below]
            return f"{whole} {unit} {part} {below}" if part else f"{whole} {unit}"
    return f"{left} s"

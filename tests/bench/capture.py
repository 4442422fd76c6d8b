"""How many packets a second `overlay-agent capture` takes: python -m tests.bench.capture

In memory, on one core, with the frames that most traffic consists of; nothing is sent.
"""

import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from scapy.layers.inet import ICMP, TCP, UDP
from scapy.packet import Raw

from overlay.capture import Capture, Caught, JsonLines, Known, Leases, Screen
from overlay.pcap import Writer
from overlay.text import table
from tests.frames import KNOWN, inner4, inner6, tunnel

SECONDS = 2.0
"""Of processor time, for each way."""

FRAMES = [
    bytes(tunnel(inner / Raw(bytes(1300))))
    for inner in (inner4() / TCP(), inner4() / UDP(), inner6() / TCP(), inner4() / ICMP())
]


def rate(job: Capture) -> float:
    """Packets in a second of one core, whatever else the machine does."""
    batch = [Caught(time.time_ns(), True, frame, len(frame), "eth0") for frame in FRAMES] * 50
    taken, started = 0, time.process_time()
    while time.process_time() - started < SECONDS:
        job.run(batch)
        taken += len(batch)
    return taken / (time.process_time() - started)


def main() -> None:
    """Print a table."""
    leases = Leases(lambda: Known(KNOWN, True, ""), print)
    with tempfile.TemporaryDirectory() as directory, Writer(Path(directory) / "a.pcapng") as writer:
        ways: dict[str, Callable[[], Capture]] = {
            "shown as lines": lambda: Capture(leases, show=Screen(io.StringIO(), headers=False, colour=False)),
            "shown as JSON": lambda: Capture(leases, show=JsonLines(io.StringIO())),
            "decoded and written": lambda: Capture(leases, show=lambda caught, packet: None, recorder=writer),
            "written undecoded (--quiet --write)": lambda: Capture(leases, recorder=writer, decode=False),
        }
        rate(ways["shown as lines"]())  # scapy is imported, and all is warm.
        print(
            table(
                ("WAY", "PACKETS A SECOND OF ONE CORE"), [(name, f"{rate(make()):,.0f}") for name, make in ways.items()]
            )
        )


if __name__ == "__main__":
    main()

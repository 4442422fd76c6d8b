"""`overlay-agent lab replay`: the frames of a capture file, put on a link of a lab.

From a pod's end of its link they come from the pod; from the underlay's port of a host they go to the host.
"""

import errno
import os
import socket
import time
from collections.abc import Iterable
from contextlib import closing
from typing import NamedTuple

from overlay.cluster_hosts import LabError, Place
from overlay.pcap import Recorded


class Replayed(NamedTuple):
    """What became of the frames. `too_long`: those that the link does not take; `seconds` it took."""

    sent: int
    too_long: int
    seconds: float


def replay(place: Place, device: str, frames: Iterable[Recorded], *, rate: float | None, count: int | None) -> Replayed:
    """Put the frames on the device, in their order, at most `count` of them; LabError.

    They are as far apart as in the file, or `rate` go in a second.
    """
    sent = too_long = 0
    first: int | None = None
    with closing(_outlet(place, device)) as outlet:
        started = time.monotonic()
        for number, frame in enumerate(frames):
            if number == count:
                break
            first = frame.time_ns if first is None else first
            due = number / rate if rate else (frame.time_ns - first) / 1e9
            time.sleep(max(0.0, started + due - time.monotonic()))
            try:
                outlet.send(frame.data)
                sent += 1
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    reason = os.strerror(error.errno or 0).lower()
                    raise LabError(f"{place.name}/{device}: {reason}, after {sent} frames") from None
                too_long += 1
    return Replayed(sent, too_long, time.monotonic() - started)


def _outlet(place: Place, device: str) -> socket.socket:
    """A socket that sends on the device and hears nothing; LabError."""

    try:
        return place.packet_socket(device, hears=False)
    except OSError:
        names = ", ".join(link["ifname"] for link in place.json("ip", "link"))
        raise LabError(f"{place.name} has no link {device!r}; it has {names}.") from None

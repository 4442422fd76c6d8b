"""Sees to it that checksums survive the way to the peers: asks a few of them once there are any, and after each change.

Owns when and whom to ask. `offload` measures and switches, `checksums` decides.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from overlay import causes
from overlay.checksums import Finding, Verdict
from overlay.model import Neighbour
from overlay.offload import OffloadRefused
from overlay.reconciler import Census, Plan
from subnet_lease.pulse import LOCAL_WORK_S, Pulse

ASKED = 3
"""Peers: one that is down must not keep a fault hidden."""

AGAIN_S = 60.0
"""Seconds until the question is put again that nobody has answered."""

SEARCHED = 64
"""Peers to choose them from: of some no packet goes through a tunnel."""

PATIENCE_S = 30.0


class ChecksumWatch:
    """A thread's body: `run` until `stop`. `examine` is `offload.examine`, `survey` gives the peers as they are.

    `findings` are the latest by the device's name.
    """

    def __init__(
        self,
        examine: Callable[[str, bytes, Sequence[bytes], int], Finding],
        survey: Callable[[float], Census | None],
        log: Any,
    ) -> None:
        self._examine = examine
        self._survey = survey
        self._log = log
        self._wake = threading.Event()
        self._stopped = False
        self._plan: Plan | None = None
        self.pulse = Pulse(LOCAL_WORK_S, time.monotonic)
        self.findings: Mapping[str, Finding] = {}

    def changed(self, plan: Plan) -> None:
        """There are new devices, or old ones on another way. From any thread."""
        self._plan = plan
        self._wake.set()

    def run(self) -> None:
        """Examine each device after each change, until it is answered."""
        pause: float | None = None
        while True:
            changed = self.pulse.wait(self._wake, pause)
            self._wake.clear()
            if self._stopped:
                return
            if changed:
                self.findings = {}
            plan = self._plan
            pause = None if plan is None or self._look(plan) else AGAIN_S

    def _look(self, plan: Plan) -> bool:
        """Whether all devices have been answered for."""
        census = self._survey(PATIENCE_S)
        if census is None:
            return False
        for spec in plan.devices:
            if spec.name not in self.findings and spec.addresses:
                source = spec.addresses[0].base
                peers, mtu = self._some_peers(census, census.tunnels.get(len(spec.local)), len(source), plan.mtu)
                if peers and (finding := self._measured(spec.name, source, peers, mtu)):
                    self.findings = {**self.findings, spec.name: finding}
        return len(self.findings) == len(plan.devices)

    def _some_peers(self, census: Census, device: int | None, family: int, mtu: int) -> tuple[list[bytes], int]:
        """(addresses of peers' devices that are reached by `device`, the MTU in bytes that all of them have)."""
        found = []
        for lease in random.sample(census.leases, min(len(census.leases), SEARCHED)):
            for entry in census.entries(lease):
                if isinstance(entry, Neighbour) and entry.at[0] == device and len(entry.at[1]) == family:
                    found.append(entry.at[1])
                    mtu = min(mtu, lease.attrs.mtu or mtu)
            if len(found) == ASKED:
                break
        return found, mtu

    def _measured(self, device: str, source: bytes, peers: Sequence[bytes], mtu: int) -> Finding | None:
        """What came of it, None if nobody answered."""
        try:
            finding = self._examine(device, source, peers, mtu)
        except OffloadRefused as error:
            self._log.warning("offload_refused", device=device, reason=str(error))
            return None
        if finding.verdict is Verdict.NO_PATH:
            return None
        say = {Verdict.FAULTY: self._log.warning, Verdict.ELSEWHERE: self._log.warning}.get(
            finding.verdict, self._log.debug
        )
        say("checksums_examined", device=device, offload=finding.why)
        return finding

    def troubles(self) -> Iterator[causes.Finding]:
        """The offloads that were found to be at fault. From any thread."""
        for device, found in self.findings.items():
            if found.verdict is Verdict.FAULTY:
                yield causes.Finding("checksum_offload", device, (found.why,), {"device": device})

    def stop(self) -> None:
        """End `run`; at once unless a measurement is under way."""
        self._stopped = True
        self._wake.set()

"""What the web page costs an agent among many peers: python -m tests.bench.page [--markdown docs/page.md]

One host in a lab, the leases of all others put into etcd, and one browser that looks. With `--markdown` the sentence
between the markers in that file is written anew.
"""

import argparse
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from overlay.cluster import Lab
from subnet_lease.model import encode_attrs
from tests.conftest import connect
from tests.netns.browser import Browser
from tests.netns.pictures import NETWORK, leases
from tests.netns.scrape import OPTIONS, PORT

PEERS = 15_000
SECONDS = 60.0

CONFIG = {"Network": NETWORK, "SubnetMin": "10.200.0.0", "Backend": {"Type": "vxlan"}}

MARKED = re.compile(r"(<!-- measured by tests/bench/page.py -->\n).*?(\n<!-- until here -->)", re.DOTALL)

_DOCUMENTS = "performance.getEntriesByType('resource').filter((each) => each.name.includes('/api/'))"


class Cost(NamedTuple):
    """Shares of a core without a viewer and with one; milliseconds and bytes of one document."""

    idle: float
    viewed: float
    milliseconds: float
    size: int


def measure() -> Cost:
    """Among PEERS peers, each state for SECONDS."""
    lab = Lab("benchpage", connect=connect, hosts=1, pods=0, config=CONFIG, agent_options=OPTIONS)
    try:
        lab.make_network()
        lab.start_etcd()
        lab.write_config(CONFIG)
        store = lab.store
        with ThreadPoolExecutor(8) as pool:
            made = pool.map(lambda each: store.create(each[0], encode_attrs(each[1].attrs), 0), leases(PEERS).items())
            assert all(made)
        host = lab.hosts[0]
        host.start_agent()
        host.wait_ready(60)
        pid = host.agent_pid
        assert pid is not None
        # What follows a start is over by then.
        time.sleep(10)
        idle, _ = _share(pid)
        with Browser(host.inside) as browser:
            page = browser.open(f"http://127.0.0.1:{PORT}/")
            page.wait("document.querySelectorAll('#rows tr').length > 100")
            before = page.value(f"{_DOCUMENTS}.length")
            viewed, spent = _share(pid)
            documents = page.value(f"{_DOCUMENTS}.length") - before
            size = page.value(f"{_DOCUMENTS}.at(-1).encodedBodySize")
        return Cost(idle, viewed, 1000 * spent / documents, size)
    finally:
        lab.down()


def _share(pid: int) -> tuple[float, float]:
    """Of a core, over SECONDS, and in seconds."""
    began, before = time.monotonic(), _cpu(pid)
    time.sleep(SECONDS)
    spent = _cpu(pid) - before
    return spent / (time.monotonic() - began), spent


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def sentence(cost: Cost) -> str:
    """For people."""
    size, took = cost.size / 1000, cost.milliseconds
    return (
        f"Among {PEERS:,} peers an answer has {size:.0f} KB and takes the agent {took:.0f} ms of a core: "
        f"{100 * cost.viewed:.1f} % for one viewer, {100 * cost.idle:.1f} % without."
    )


def main() -> None:
    """Measure, and say it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    told = sentence(measure())
    print(told)
    if arguments.markdown:
        text = arguments.markdown.read_text()
        arguments.markdown.write_text(MARKED.sub(lambda found: f"{found[1]}{told}{found[2]}", text))


if __name__ == "__main__":
    main()

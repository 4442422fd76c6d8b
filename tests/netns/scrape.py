"""The health endpoint of a host of a lab, asked from within that host as a local Prometheus or kubelet would."""

import sys
from pathlib import Path
from typing import NamedTuple

from overlay.cluster import Host

PORT = 10256
OPTIONS = ("--healthz-port", str(PORT))
PROJECT = Path(__file__).parents[2]

_ASK = """
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=10)
connection.request("GET", sys.argv[2])
answer = connection.getresponse()
print(answer.status, answer.getheader("Content-Type"))
sys.stdout.write(answer.read().decode())
"""


class Page(NamedTuple):
    """What a path answered."""

    status: int
    kind: str
    text: str


def ask(host: Host, path: str) -> Page:
    """GET `path`."""
    done = host.run(sys.executable, "-I", "-S", "-c", _ASK, str(PORT), path)
    assert done.returncode == 0, done.stderr
    head, _, text = done.stdout.partition("\n")
    status, _, kind = head.partition(" ")
    return Page(int(status), kind, text)


def samples(host: Host) -> dict[str, float]:
    """The metrics of a host: value by name and labels, as they stand in the text."""
    page = ask(host, "/metrics")
    assert page.status == 200
    lines = (line for line in page.text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def answers(host: Host, path: str, status: int, words: str = "") -> bool:
    """Whether `path` answers so; False while nobody listens."""
    try:
        page = ask(host, path)
    except AssertionError:
        return False
    return page.status == status and words in page.text

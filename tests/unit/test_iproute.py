"""pyroute2 in part: the same classes, and nothing that is left half imported."""

import subprocess
import sys

BEFORE = """
import sys
from overlay import iproute
small = iproute.load()
assert "pyroute2" not in sys.modules and "pyroute2.ndb" not in sys.modules
assert iproute.load() == small
from pyroute2 import NDB, IPRoute, NetlinkError
assert small == (IPRoute, NetlinkError) == iproute.load()
"""

AFTER = """
from pyroute2 import IPRoute, NetlinkError
from overlay import iproute
assert iproute.load() == (IPRoute, NetlinkError)
"""


def test_the_part_is_the_same_as_in_the_whole_whichever_comes_first() -> None:
    for program in (BEFORE, AFTER):
        subprocess.run([sys.executable, "-c", program], check=True)

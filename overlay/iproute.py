"""pyroute2's IPRoute and its error, without the rest of the package.

`import pyroute2` brings its database, conntrack, ethtool, wireless and more: 45 ms of each start and 5 MB for as long
as the agent runs. Its submodules do not need any of that, but Python runs a package's `__init__` before it imports a
submodule. So a package that stands there unexecuted takes its place while they are imported.
"""

import importlib.util
import sys
import threading
from typing import Any

_lock = threading.Lock()


def load() -> tuple[Any, Any]:
    """The classes (IPRoute, NetlinkError), the very ones of a full `import pyroute2`, before or after this."""
    with _lock:
        if "pyroute2" in sys.modules:
            from pyroute2 import IPRoute, NetlinkError

            return IPRoute, NetlinkError
        spec = importlib.util.find_spec("pyroute2")
        assert spec is not None, "it is a dependency"
        sys.modules["pyroute2"] = importlib.util.module_from_spec(spec)
        try:
            from pyroute2.iproute.linux import IPRoute
            from pyroute2.netlink.exceptions import NetlinkError
        finally:
            # Whoever imports the package later, pyroute2 itself for instance, shall get it whole.
            del sys.modules["pyroute2"]
        return IPRoute, NetlinkError

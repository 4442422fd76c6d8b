"""The files of the web page, as the health endpoint serves them.

They lie in overlay/page/ as they are written: plain HTML, CSS and JavaScript modules, without a build step. They are
read when somebody asks for them and are not kept. Only the names listed here exist, so no path leads out of there.
"""

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from overlay.health import Answer, Document

DIRECTORY = Path(__file__).parent / "page"

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

FILES = (
    "index.html",
    "style.css",
    "icon.svg",
    "main.js",
    "dom.js",
    "summary.js",
    "ring.js",
    "grid.js",
    "hosts.js",
    "matrix.js",
)

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Content-Security-Policy: nothing from elsewhere, nothing inline, and no text becomes markup (no policy may be made
that `innerHTML` would accept)."""

HEADERS = (
    f"Content-Security-Policy: {POLICY}",
    "Referrer-Policy: no-referrer",
    "Cross-Origin-Opener-Policy: same-origin",
    "Cross-Origin-Resource-Policy: same-origin",
)


def documents() -> Mapping[str, Document]:
    """What is served at which path: the page itself at `/`, all else below `/page/`."""
    found = {f"/page/{name}": partial(_answer, name) for name in FILES}
    return {"/": found.pop("/page/index.html"), **found}


def _answer(name: str, query: str) -> Answer:
    body = (DIRECTORY / name).read_bytes()
    tag = hashlib.blake2b(body, digest_size=12).hexdigest()
    return Answer(body, _TYPES[Path(name).suffix], tag, HEADERS)

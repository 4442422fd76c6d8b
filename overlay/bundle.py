"""What goes into the archive of `overlay-agent doctor --bundle`: texts without secrets, of bounded size.

Pure: texts come in, the bytes of a tar.gz go out. What is secret is known by its value, wherever it turns up (a
password in a log line, in somebody's command line, in a lease); what is only suspected is known by what stands before
it.
"""

import gzip
import io
import re
import tarfile
from collections.abc import Collection, Iterable, Mapping

CONCEALED = "<concealed>"

MOST = 2 << 20
"""Characters of one file at most."""

_SUSPECTS = (
    re.compile(r"(?<=://)[^/@\s\"']+(?=@)"),
    # A flag or variable, however it is written: --etcd-password=x, PASSWORD x, "token": "x".
    re.compile(
        r"(?P<name>[\w-]*(?:pass(?:word|wd|phrase)|secret|token|credential|authorization|private[_-]?key)[\w-]*"
        r"[\"']?\s*[=:]\s*(?:basic |bearer )?[\"']?)(?P<value>[^\s\"',;]+)",
        re.IGNORECASE,
    ),
    re.compile(
        r"(?P<name>(?<![\w-])--?[\w-]*(?:password|passwd|secret|token)\s+)(?P<value>[^\s-][^\s]*)", re.IGNORECASE
    ),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
)

_NO_SECRET = re.compile(r"[\w-]*(?:password|secret|token)[_-]file[\w-]*", re.IGNORECASE)
"""Options that name a file: its path is none."""


def hidden(text: str, secrets: Collection[str]) -> str:
    """The text without these secrets, and without what looks like one."""
    # The longest first: one may be a part of another.
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, CONCEALED)
    for suspect in _SUSPECTS:
        text = suspect.sub(_concealed, text)
    return text


def _concealed(found: re.Match[str]) -> str:
    name = found.groupdict().get("name") or ""
    return found[0] if _NO_SECRET.match(name) else name + CONCEALED


def secret_lines(pem: str) -> list[str]:
    """The lines of a key file that tell of the key."""
    return [line for line in pem.splitlines() if len(line) >= 16 and not line.startswith("-----")]


def secret_values(environment: Mapping[str, str]) -> list[str]:
    """The values of variables whose names say that they are secret."""
    name = re.compile(r"pass(word|wd|phrase)?$|secret|token|credential|_key$", re.IGNORECASE)
    return [value for variable, value in environment.items() if value and name.search(variable)]


def cut(text: str, *, end: bool = False) -> str:
    """At most MOST characters: the first, or with `end` the last of them, with a word on how many are missing."""
    left = len(text) - MOST
    if left <= 0:
        return text
    return f"[{left} characters left out]\n{text[-MOST:]}" if end else f"{text[:MOST]}\n[{left} characters left out]\n"


def packed(directory: str, files: Iterable[tuple[str, str]], when: float) -> bytes:
    """A tar.gz with these files, name and text, in one directory; `when` in seconds since 1970."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, text in files:
            data = text.encode("utf-8", "backslashreplace")
            about = tarfile.TarInfo(f"{directory}/{name}")
            about.size, about.mtime, about.mode = len(data), int(when), 0o600
            tar.addfile(about, io.BytesIO(data))
    return gzip.compress(raw.getvalue(), mtime=int(when))

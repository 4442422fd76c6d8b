"""How events are written: one line each on stderr, for a person at a terminal or as JSON for a collector.

Events are structlog's: a constant snake_case name and key/values. Whatever reaches a line has passed `conceal`: no
password, no token, no credentials inside a URL. Libraries' own messages arrive as the event `library_message`.
"""

import json
import logging
import os
import re
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_CONCEALED = "<concealed>"
_SECRET_KEY = re.compile(r"(^|_)pass(word|wd|phrase)?$|token|secret|authorization|credential", re.IGNORECASE)
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_secrets: set[str] = set()


def configure(level: str, log_format: str, environ: Mapping[str, str], stream: TextIO | None = None) -> None:
    """Set up logging for the process. `level` and `log_format` as the options --log-level and --log-format take them.

    `stream` is stderr unless given. With NO_COLOR set, or a TERM that is dumb, a terminal gets no colours.
    """
    out = sys.stderr if stream is None else stream
    terminal = out.isatty()
    console = log_format == "console" or (log_format == "auto" and terminal)
    processors: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        compact_exception,
        conceal,
    ]
    if console:
        colours = terminal and not environ.get("NO_COLOR") and environ.get("TERM", "dumb") != "dumb"
        processors += [structlog.dev.ConsoleRenderer(colors=colours, pad_event_to=24, sort_keys=False)]
    else:
        processors += [_journal_line if _is_journal(out, environ.get("JOURNAL_STREAM", "")) else _json_line]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *_: _Lines(out),
        cache_logger_on_first_use=True,
    )
    # Libraries speak when something is odd; their chatter is no event of ours.
    root = logging.getLogger()
    root.handlers[:] = [_Forward()]
    root.setLevel(max(LEVELS[level], logging.WARNING))


def hide(secret: str) -> None:
    """Conceal this text in every later line, wherever it turns up."""
    if secret:
        _secrets.add(secret)


def conceal(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Processor: replaces secrets in values, at any depth of lists and mappings."""
    return {key: _CONCEALED if _SECRET_KEY.search(key) else _clean(value) for key, value in event.items()}


def _clean(value: object) -> object:
    if isinstance(value, str):
        for secret in _secrets:
            value = value.replace(secret, _CONCEALED)
        return _URL_CREDENTIALS.sub(_CONCEALED, value) if "://" in value else value
    if isinstance(value, Mapping):
        return {
            key: _CONCEALED if isinstance(key, str) and _SECRET_KEY.search(key) else _clean(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return _clean(str(value))


def compact_exception(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Processor: `exc_info` becomes `error`, the exception in one line, and `at`, its innermost calls."""
    info = event.pop("exc_info", None)
    if info is True:
        info = sys.exc_info()
    error = info[1] if isinstance(info, tuple) else info
    if not isinstance(error, BaseException):
        return event
    event["error"] = " ".join(f"{type(error).__name__}: {error}".split())
    places = []
    frame = error.__traceback__
    while frame is not None:
        code = frame.tb_frame.f_code
        places.append(f"{Path(code.co_filename).name}:{frame.tb_lineno} {code.co_name}")
        frame = frame.tb_next
    event["at"] = " < ".join(reversed(places[-4:]))
    return event


def _json_line(logger: WrappedLogger, method: str, event: EventDict) -> str:
    """Renderer: the keys that every line has lead it, in this order."""
    leading = {key: event.pop(key) for key in ("timestamp", "level", "event")}
    return json.dumps({**leading, **event}, ensure_ascii=False)


class _Lines:
    """Writes whole lines from any thread. A stream that is gone must not take the dataplane with it: no error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def write(self, line: str) -> None:
        try:
            with self._lock:
                self._stream.write(line + "\n")
                self._stream.flush()
        except (OSError, ValueError):
            pass

    # The names that structlog calls, one for each severity.
    debug = info = warning = error = critical = exception = write


class _Forward(logging.Handler):
    """Turns what libraries log through `logging` into events."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except Exception:
            # A library's wrong format string: the message without its arguments is better than none.
            text = str(record.msg)
        logger = structlog.get_logger()
        logger.log(min(record.levelno // 10 * 10, logging.CRITICAL), "library_message", library=record.name, text=text)


# --- journald ----------------------------------------------------------------------------------------------------

_SYSLOG = {"debug": 7, "info": 6, "warning": 4, "error": 3, "exception": 3, "critical": 2}


def _is_journal(stream: TextIO, journal_stream: str) -> bool:
    """Whether the stream is the journal's, by the device and inode it says (systemd.exec(5), $JOURNAL_STREAM)."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return journal_stream == f"{found.st_dev}:{found.st_ino}"


def _journal_line(logger: WrappedLogger, method: str, event: EventDict) -> str:
    """Renderer: the severity leads, as sd-daemon(3) has it, so that `journalctl -p warning` works; it is not stored."""
    severity = _SYSLOG.get(event["level"], 6)
    return f"<{severity}>{_json_line(logger, method, event)}"

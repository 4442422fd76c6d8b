"""A headless Chromium, driven over the DevTools protocol through a pair of pipes: no port, no driver program.

https://chromedevtools.github.io/devtools-protocol/ describes the messages; `--remote-debugging-pipe` has the browser
read them from descriptor 3 and write to descriptor 4, each a JSON text that ends with a zero byte.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from overlay.cluster import wait_until

ANSWER_S = 20.0
"""Seconds that the browser has for an answer, and a page to become what is waited for."""

REBOUND = "site.example"
"""A name of somebody else's that leads to this host, as the browser sees it."""

# Without a sandbox, which root cannot have; without anything that asks the Internet.
_OPTIONS = (
    *("--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--no-default-browser-check", "--disable-background-networking", "--disable-extensions"),
    *("--disable-component-update", "--disable-sync", "--disable-breakpad", "--disable-features=Translate,MediaRouter"),
    *("--hide-scrollbars", "--force-color-profile=srgb", "--font-render-hinting=none", "--lang=en-GB"),
    f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1",
)

_KEYS = {
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    "Tab": (9, ""),
    "Home": (36, ""),
    "End": (35, ""),
    "ArrowLeft": (37, ""),
    "ArrowUp": (38, ""),
    "ArrowRight": (39, ""),
    "ArrowDown": (40, ""),
}
"""Virtual key codes, and the text that a key writes, of the keys that are more than a character."""


class BrowserFailed(Exception):
    """The browser has ended, refuses a command, or a page's script has failed; the text says which."""


class Browser:
    """One process and its pages, gone at the end of the block. `inside` makes its command line one of a namespace."""

    def __init__(self, inside: Callable[..., Sequence[str]] = lambda *argv: argv) -> None:
        self._inside = inside
        self._stack = contextlib.ExitStack()
        self._received = b""
        self._messages: deque[dict[str, Any]] = deque()
        self._numbers = 0
        self._pages: dict[str, Page] = {}

    def __enter__(self) -> Self:
        with self._stack:
            profile = self._stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            commands, self._to = os.pipe()
            self._from, answers = os.pipe()
            for each in (self._to, self._from):
                self._stack.callback(os.close, each)
            program = shutil.which("chromium") or "chromium"
            argv = self._inside(program, *_OPTIONS, f"--user-data-dir={profile}", "about:blank")
            # The shell puts the pipes where the browser looks for them.
            line = f'exec "$@" 3<&{commands} 4>&{answers}'
            self._process = subprocess.Popen(
                ["bash", "-c", line, "bash", *argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(commands, answers),
                start_new_session=True,
                env={**os.environ, "HOME": profile},
            )
            self._stack.callback(self._end)
            os.close(commands)
            os.close(answers)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _end(self) -> None:
        """All processes of the browser: it is their session's leader."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def open(
        self, url: str, *, scheme: str = "light", before: str = "", width: int = 1280, height: int = 900
    ) -> "Page":
        """A new page, that has loaded `url`, for a person who prefers this colour scheme. `before` is a script that
        runs before those of the page."""
        target = self.send("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.send("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self._pages[session] = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            page.send(f"{domain}.enable")
        page.resize(width, height)
        page.prefer(scheme)
        if before:
            page.send("Page.addScriptToEvaluateOnNewDocument", source=before)
        page.go(url)
        return page

    def close(self, page: "Page") -> None:
        """Close a page."""
        self.send("Target.closeTarget", {"targetId": page.target})
        del self._pages[page.session]

    def send(self, method: str, parameters: dict[str, Any] | None = None, session: str = "") -> dict[str, Any]:
        """Carry out one command, and return its result."""
        self._numbers += 1
        number = self._numbers
        message = {"id": number, "method": method, "params": parameters or {}}
        data = json.dumps({**message, "sessionId": session} if session else message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        deadline = time.monotonic() + ANSWER_S
        while True:
            answer = self._next(deadline, method)
            if answer.get("id") == number:
                if "error" in answer:
                    raise BrowserFailed(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self, deadline: float, what: str) -> dict[str, Any]:
        """The next message; what the pages tell of themselves is noted on the way."""
        while b"\0" not in self._received:
            if not select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise BrowserFailed(f"{what}: no answer within {ANSWER_S:g} s")
            data = os.read(self._from, 1 << 20)
            if not data:
                raise BrowserFailed(f"{what}: the browser has ended")
            self._received += data
        text, _, self._received = self._received.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message and (page := self._pages.get(message.get("sessionId", ""))):
            page.note(message["method"], message["params"])
        return message


class Page:
    """A page of the browser: what it shows, what it asked for, and what its scripts complained of."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser = browser
        self.session = session
        self.target = target
        self.requests: list[str] = []
        """URLs that it asked for, in order."""
        self.complaints: list[str] = []
        """Errors and warnings of its scripts, of the Content-Security-Policy, and of the network."""

    def note(self, method: str, parameters: dict[str, Any]) -> None:
        """Something has happened on the page."""
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded":
            self.complaints.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Carry out one command on this page."""
        return self._browser.send(method, parameters, self.session)

    def go(self, url: str) -> None:
        """Load another document, and wait until its scripts have run."""
        self.send("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression, or of what it promises."""
        options = {"returnByValue": True, "awaitPromise": True, "allowUnsafeEvalBlockedByCSP": False}
        done = self.send("Runtime.evaluate", expression=expression, **options)
        if "exceptionDetails" in done:
            details = done["exceptionDetails"]
            raise BrowserFailed(details.get("exception", {}).get("description", details["text"]))
        return done["result"].get("value")

    def wait(self, expression: str, seconds: float = ANSWER_S) -> None:
        """Until the expression is true."""

        def attempt() -> bool:
            try:
                return bool(self.value(f"Boolean({expression})"))
            except BrowserFailed as error:
                # The document it was asked of has just been replaced by the next.
                if "context" in str(error) or "navigated" in str(error):
                    return False
                raise

        wait_until(attempt, seconds, f"on the page: {expression}")

    def text(self, selector: str) -> str:
        """What stands there, as it is shown."""
        return str(self.value(f"document.querySelector({json.dumps(selector)}).innerText"))

    def texts(self, selector: str) -> list[str]:
        """The same of all that the selector matches."""
        found: list[str] = self.value(
            f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.innerText)"
        )
        return found

    def press(self, *keys: str) -> None:
        """Press and release keys, one after another: characters, or names as Enter."""
        for key in keys:
            code, text = _KEYS.get(key) or (0, key)
            common = {"key": key, "windowsVirtualKeyCode": code}
            self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
            self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def click(self, selector: str) -> None:
        """A mouse click on the middle of what the selector matches first."""
        middle = self.value(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)});"
            " node.scrollIntoView({block: 'center'});"
            " const box = node.getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        self.click_at(*middle)

    def click_at(self, x: float, y: float) -> None:
        """A mouse click there, in CSS pixels of the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def resize(self, width: int, height: int) -> None:
        """Give the window this size, in CSS pixels."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, scheme: str) -> None:
        """As if the person preferred this colour scheme: light or dark."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def accessible(self) -> list[tuple[str, str]]:
        """Role and name of all that assistive technology is told of, in the order of the document."""
        nodes = self.send("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"] and "role" in node
        ]

    def picture(self, path: Path, most: int = 1 << 14) -> None:
        """The page as a PNG file, all of it or its first `most` pixels downwards."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], most), "scale": 1}
        shot = self.send("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

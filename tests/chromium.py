"""Headless Chromium by its DevTools protocol over a pipe, so that nothing but the standard library is needed."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)
SERVER_ERROR = -32000  # "Inspected target navigated or closed", "Cannot find default execution context"
ANSWER_S = 60.0  # a busy machine starts a browser slowly


def executable() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class NavigatedError(RuntimeError):
    """The page that an expression was to be evaluated in went away meanwhile."""


class Page:
    """One tab, a fresh one for every place that is opened: what a former page still says is none of its.

    Attributes:
        said: what the page wrote to the console, or the browser about it, with its level first.
        asked: addresses that were requested.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to = to_browser
        self._from = from_browser
        self._left = b""
        self._count = 0
        self._target = ""
        self._session = ""
        self.said: list[str] = []
        self.asked: list[str] = []
        self._renew()

    def _renew(self) -> None:
        """A tab in place of the one there is."""
        old, self._session = self._target, ""
        self._target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        if old:
            self.call("Target.closeTarget", targetId=old)
        self._session = session
        self.said.clear()
        self.asked.clear()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """The answer to one command; what happens meanwhile is noted."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                if "error" in answer:
                    gone = method == "Runtime.evaluate" and answer["error"]["code"] == SERVER_ERROR
                    raise (NavigatedError if gone else RuntimeError)(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + ANSWER_S
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._from, 1 << 20) if ready else b""
            if not part:
                raise RuntimeError("the browser does not answer")
            self._left += part
        message, _, self._left = self._left.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        if answer.get("sessionId", "") == self._session:
            self._note(answer.get("method", ""), answer.get("params", {}))
        return answer

    def _note(self, method: str, params: dict[str, Any]) -> None:
        match method:
            case "Runtime.consoleAPICalled":
                self.said.append(f"{params['type']}: {[arg.get('value') for arg in params['args']]}")
            case "Runtime.exceptionThrown":
                self.said.append(f"error: {params['exceptionDetails']}")
            case "Log.entryAdded":
                self.said.append(f"{params['entry']['level']}: {params['entry']['text']}")
            case "Network.requestWillBeSent":
                self.asked.append(params["request"]["url"])

    def open(self, place: Path | str, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Show a file, or what is at an address, in a window of that many pixels."""
        url = place if isinstance(place, str) else place.as_uri()
        self._renew()
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url=url)
        while not self.look(f"document.readyState === 'complete' && location.protocol === '{urlsplit(url).scheme}:'"):
            pass

    def look(self, script: str) -> Any:
        """The value of an expression without effects; None while one page gives way to the next."""
        with contextlib.suppress(NavigatedError):
            return self.evaluate(script)
        return None

    def evaluate(self, script: str) -> Any:
        """The value of an expression.

        Raises:
            NavigatedError: the page went away before the answer.
        """
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", script))
        return answer["result"].get("value")

    def picture(self, file: Path) -> None:
        """Write the whole page as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A browser with a fresh profile in `folder`, ended with the block."""
    program = executable()
    assert program is not None
    here_in, there_out = os.pipe()
    there_in, here_out = os.pipe()
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (there_in, there_out)]  # clear of 3 and 4

    def connect() -> None:
        os.dup2(high[0], 3)  # where the browser reads commands
        os.dup2(high[1], 4)  # where it answers

    process = subprocess.Popen(
        [program, *OPTIONS, f"--user-data-dir={folder}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        close_fds=False,
        preexec_fn=connect,
    )
    for fd in (there_in, there_out, *high):
        os.close(fd)
    try:
        yield Page(here_out, here_in)
    finally:
        process.terminate()
        process.wait(timeout=ANSWER_S)
        os.close(here_in)
        os.close(here_out)

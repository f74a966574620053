"""A real browser for tests: Debian's chromium, driven over its DevTools pipe with nothing installed for it."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"
)

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]


class Page:
    """One tab: evaluate, type, click, and everything that the console and the network said."""

    def __init__(self, browser: "Browser", session: str) -> None:
        self.browser = browser
        self.session = session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, params, self.session)

    def open(self, address: str) -> None:
        """Go there and wait until everything in the file is parsed."""
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def js(self, expression: str) -> Any:
        """The value of an expression; an exception in it is one here."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, condition: str, seconds: float = 20) -> None:
        """Until the condition holds."""
        end = time.monotonic() + seconds
        while not self.js(f"Boolean({condition})"):
            assert time.monotonic() < end, f"never came true: {condition}"
            time.sleep(0.02)

    def settle(self) -> None:
        """Two frames: what an event started is drawn."""
        self.js("new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)))")

    def key(self, name: str, code: int = 0, text: str = "") -> None:
        """Press and release a key by its DOM name."""
        codes = {
            "Tab": 9,
            "Enter": 13,
            "Escape": 27,
            " ": 32,
            "PageUp": 33,
            "PageDown": 34,
            "End": 35,
            "Home": 36,
        }
        codes |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        text = text or {"Enter": "\r"}.get(name, name if len(name) == 1 else "")
        event = {"key": name, "windowsVirtualKeyCode": code or codes.get(name, ord(name[0].upper()))}
        self.call("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)
        self.settle()

    def click(self, x: float, y: float, to: tuple[float, float] | None = None) -> None:
        """A click, or a drag."""
        mouse = {"button": "left", "buttons": 1, "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, **mouse)
        if to is not None:
            x, y = to
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, **mouse)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, **mouse)
        self.settle()

    def look(
        self, width: int = 1400, height: int = 1000, *, dark: bool = False, mobile: bool = False
    ) -> None:
        """Size of the window and the colours the system asks for."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.settle()

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def complaints(self) -> list[str]:
        """What went to the console as an error or a warning, exceptions, and policy violations."""
        self.settle()
        return [
            json.dumps(event["params"])[:500]
            for event in self.browser.events
            if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        ]

    def requests(self) -> list[str]:
        """Addresses that were asked for, data inside the file excepted."""
        events = [event for event in self.browser.events if event["method"] == "Network.requestWillBeSent"]
        asked = [event["params"]["request"]["url"] for event in events]
        return [address for address in asked if not address.startswith("data:")]


class Browser:
    """The process and its pipe."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # The protocol lives on descriptors 3 and 4; a shell's redirection knows single digits only.
        start = "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 203); os.dup2(w, 204); "
        start += "os.dup2(203, 3); os.dup2(204, 4); "
        start += "os.execv(sys.argv[3], sys.argv[3:])"
        command = [sys.executable, "-c", start, str(to_read), str(to_write)]
        command += [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            command,
            pass_fds=(to_read, to_write),
            stdin=quiet,
            stdout=quiet,
            stderr=quiet,
            start_new_session=True,
        )
        os.close(to_read)
        os.close(to_write)
        self.events: list[dict[str, Any]] = []
        self._rest = b""
        self._number = 0

    def page(self) -> Page:
        """A new tab with a fresh record of events."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.look()
        self.events.clear()
        return page

    def call(self, method: str, params: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | (
            {"sessionId": session} if session else {}
        )
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[os.write(self._write, content) :]
        while True:
            answer = self._next(60)
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])
            if "method" in answer:
                self.events.append(answer)

    def _next(self, seconds: float) -> dict[str, Any]:
        pieces = [self._rest]
        while b"\0" not in pieces[-1]:
            ready, _, _ = select.select([self._read], [], [], seconds)
            assert ready, f"chromium has been silent for {seconds} s"
            piece = os.read(self._read, 1 << 20)
            assert piece, f"chromium has ended (status {self.process.poll()})"
            pieces.append(piece)
        message, _, self._rest = b"".join(pieces).partition(b"\0")
        return dict(json.loads(message))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.call("Browser.close", {})
        os.close(self._write)
        os.close(self._read)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a new profile, ended at the end."""
    started = Browser(profile)
    try:
        yield started
    finally:
        started.close()

"""A headless Chromium, driven by its DevTools protocol over a pipe: no library, no port."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35}


class Page:
    """One page of a browser of its own; also what it logged, asked for and was refused."""

    def __init__(self, profile: Path) -> None:
        to_browser, mine_out = os.pipe()
        mine_in, from_browser = os.pipe()

        def take_pipes() -> None:
            a, b = os.dup(to_browser), os.dup(from_browser)  # one of them may be 3 or 4 itself
            os.dup2(a, 3)
            os.dup2(b, 4)

        assert CHROMIUM
        self._process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe",
             "--disable-background-networking", f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=take_pipes, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self._out, self._in, self._rest, self._count = mine_out, mine_in, b"", 0
        self._session: str | None = None
        self.logged: list[str] = []
        self.requested: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command's result; raises RuntimeError for an error."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data):]
        while (answer := self._next(30)).get("id") != self._count:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _next(self, seconds: float) -> dict[str, Any]:
        over = time.monotonic() + seconds
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], max(0, over - time.monotonic()))[0]:
                raise TimeoutError("The browser does not answer.")
            got = os.read(self._in, 1 << 16)
            if not got:
                raise ConnectionError("The browser has ended.")
            self._rest += got
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event["method"] == "Log.entryAdded":
            self.logged.append(params["entry"]["text"])
        elif event["method"] == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.logged.append(details.get("exception", {}).get("description") or details["text"])
        elif event["method"] == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"].get("description"))
        return result["result"].get("value")

    def open(self, url: str, until: str = "document.readyState == 'complete'") -> None:
        self.run("window.left = true")  # on a busy machine the old document still answers for a while
        self.send("Page.navigate", url=url)
        self.until(f"!window.left && ({until})")

    def until(self, script: str | Callable[[], bool], seconds: float = 30) -> None:
        """Wait until it is true."""
        over = time.monotonic() + seconds
        while not (self.run(f"Boolean({script})") if isinstance(script, str) else script()):
            assert time.monotonic() < over, f"still not true: {script}; the page logged {self.logged}"
            time.sleep(0.02)

    def key(self, name: str, shift: bool = False) -> None:
        """Press a key as a person does."""
        text = {"text": "\r"} if name == "Enter" else {}
        for kind in ("keyDown" if text else "rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=_KEYS[name],
                      modifiers=8 * shift, **(text if kind != "keyUp" else {}))

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.send("Input.insertText", text=text)

    def window(self, width: int, height: int, scheme: str = "light", motion: str = "no-preference") -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme},
                                                         {"name": "prefers-reduced-motion", "value": motion}])

    def picture(self, path: Path) -> None:
        """A screenshot of the window."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

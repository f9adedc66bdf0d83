"""A headless Chromium that is driven over pipes by its own protocol: real clicks, console errors, screenshots."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class NoBrowser(Exception):
    """There is no Chromium on this machine."""


def find_browser() -> str:
    """The program; NEMO_PRUNE_BROWSER names another.

    Raises:
        NoBrowser: there is none.
    """
    found = os.environ.get("NEMO_PRUNE_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        raise NoBrowser(
            f"No browser: none of {', '.join(NAMES)} is installed. Install one (apt-get install chromium), or set "
            "NEMO_PRUNE_BROWSER to its path."
        )
    return found


class Page:
    """One page, of which everything that goes wrong is kept.

    Attributes:
        errors: messages of level error, uncaught exceptions and requests for anything that is not in the page.
    """

    def __init__(self, send: Any, receive: Any) -> None:
        self.errors: list[str] = []
        self._send_bytes, self._receive, self._number, self._session = send, receive, 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict:
        """Call a method of the browser's protocol and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._send_bytes(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def open(self, path: Path) -> None:
        """Open a local file and wait until it is loaded."""
        self.call("Page.navigate", url=path.as_uri())
        while self.run("document.readyState") != "complete":
            pass

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def click(self, selector: str) -> None:
        """Click with the mouse on the middle of the first element that a selector finds."""
        place = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Click into a field and type."""
        self.click(selector)
        self.call("Input.insertText", text=text)

    def look(self, width: int, height: int, dark: bool = False, printed: bool = False) -> None:
        """Size of the window, and how the page is shown."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media="print" if printed else "", features=scheme)

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Write what is seen as a PNG."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(taken["data"]))

    def _note(self, event: dict) -> None:
        method, values = event.get("method"), event.get("params", {})
        if method == "Log.entryAdded" and values["entry"]["level"] == "error":
            self.errors.append(values["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(values["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled" and values["type"] == "error":
            self.errors.append(str(values["args"]))
        elif method == "Network.requestWillBeSent" and not values["request"]["url"].startswith(("file:", "data:")):
            self.errors.append(f"asks for {values['request']['url']}")


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page in a browser of its own, which ends with the context.

    Args:
        profile: a new folder for the browser's files.
    """
    to_browser, from_us = os.pipe()
    from_browser, to_us = os.pipe()

    def put_pipes_in_place() -> None:
        # The protocol is spoken on descriptors 3 and 4; first away from there, so that neither is overwritten.
        reading, writing = os.dup(to_browser), os.dup(to_us)
        os.dup2(reading, 3)
        os.dup2(writing, 4)

    command = [
        find_browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run", "about:blank",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, preexec_fn=put_pipes_in_place, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_browser)
    os.close(to_us)
    waiting = bytearray()

    def receive() -> dict:
        while b"\0" not in waiting:
            read = os.read(from_browser, 1 << 16)
            assert read, "the browser has ended"
            waiting.extend(read)
        message, _, rest = bytes(waiting).partition(b"\0")
        waiting[:] = rest
        return json.loads(message)

    def send(message: bytes) -> None:
        while message:
            message = message[os.write(from_us, message) :]

    try:
        yield Page(send, receive)
    finally:
        process.terminate()
        process.wait(20)
        os.close(from_us)
        os.close(from_browser)

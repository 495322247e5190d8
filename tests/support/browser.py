"""A real browser without a window, driven over a pipe by the DevTools protocol: what it draws, says and asks for."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")  # as in launch/browser.sh
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--remote-debugging-pipe", "about:blank",
)  # fmt: skip
SECONDS = 60.0  # for an answer of a browser on a busy machine


class Browser:
    """One tab. events: (method, parameters) of all that the browser has told so far."""

    def __init__(self, to: int, from_: int) -> None:
        self._to, self._from, self._last, self._left = to, from_, 0, b""
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._session: str | None = None
        (page,) = [one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        self._session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return what a method of the protocol answers."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        message |= {} if self._session is None else {"sessionId": self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            told = self._receive()
            if told.get("id") == self._last:
                assert "error" not in told, f"{method}: {told['error']}"
                return dict(told["result"])

    def open(self, address: str, width: int, theme: str) -> None:
        """Show a page in a window of that width, in the light or the dark theme."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.events.clear()
        self.call("Page.navigate", url=address)
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            self._receive()

    def ask(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def requests(self) -> list[str]:
        """Return the addresses that the page has asked for."""
        return [said["request"]["url"] for method, said in self.events if method == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """Return what the page has left on the console, errors and policies that were broken included."""
        kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [json.dumps(said) for method, said in self.events if method in kinds]

    def picture(self, file: Path) -> None:
        """Write a PNG of the whole page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))

    def _receive(self) -> dict[str, Any]:
        late = time.monotonic() + SECONDS
        while b"\0" not in self._left:
            with suppress(BlockingIOError):
                got = os.read(self._from, 2**16)
                assert got, "the browser has ended"
                self._left += got
                continue
            assert time.monotonic() < late, f"no answer of the browser in {SECONDS:.0f} s"
            time.sleep(0.005)
        message, _, self._left = self._left.partition(b"\0")
        told: dict[str, Any] = json.loads(message)
        if "method" in told:
            self.events.append((told["method"], told["params"]))
        return told


@contextmanager
def browser() -> Iterator[Browser]:
    """Start a browser and end it behind the block. Skips where none is installed."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser is installed: none of {', '.join(NAMES)}")
    (theirs_in, to), (from_, theirs_out) = _pipe(), _pipe()
    os.set_blocking(from_, False)
    with tempfile.TemporaryDirectory(prefix="fsdp_qlora_browser_", ignore_cleanup_errors=True) as folder:
        # The browser reads from descriptor 3 and writes to descriptor 4.
        wired = ["bash", "-c", f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}', program, *FLAGS]
        process = subprocess.Popen(
            [*wired, f"--user-data-dir={folder}"], pass_fds=(theirs_in, theirs_out), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Browser(to, from_)
        finally:
            os.close(to)  # at which it ends by itself
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
            os.close(from_)


def _pipe() -> tuple[int, int]:
    """Return a pipe of descriptors that are none of 3 and 4."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return moved[0], moved[1]

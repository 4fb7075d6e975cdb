"""A headless browser: what a page says, also within its components, and how it looks."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip
# `--dump-dom` leaves out the shadow trees that TensorBoard's pages are made of.
_TEXT = """(() => {
    const text = node => node.nodeType === Node.TEXT_NODE ? node.data + ' '
        : ['STYLE', 'SCRIPT', 'TEMPLATE'].includes(node.nodeName) ? ''
        : [node.shadowRoot, ...node.childNodes].filter(Boolean).map(text).join('');
    return document.body ? text(document.body) : '';
})()"""


class Page:
    """One page of a browser, by the DevTools protocol over a pipe."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, os.fdopen(answers, "rb", buffering=0)
        self._number, self._rest, self._session = 0, b"", ""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def evaluate(self, script: str) -> Any:
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def text(self) -> str:
        return " ".join(self.evaluate(_TEXT).split())

    def wait_for(self, words: list[str], gone: str | None = None, seconds: float = 60.0) -> str:
        """The page's text, once it says all these, and no longer what has to be gone."""
        until = time.monotonic() + seconds
        while True:
            text = self.text()
            missing = [word for word in words if word not in text]
            waiting = gone is not None and gone in text
            if not missing and not waiting:
                return text
            assert time.monotonic() < until, f"{missing} not on the page, or {gone} still: {text[:2000]}"
            time.sleep(0.2)

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)

    def screenshot(self, path: Path, width: int, height: int) -> None:
        self.resize(width, height)
        time.sleep(1.0)  # charts draw themselves anew
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = self._answers.read(1 << 16)
            assert more, "the browser has ended"
            self._rest += more
        first, _, self._rest = self._rest.partition(b"\0")
        return json.loads(first)


@contextmanager
def browser() -> Iterator[Page]:
    """A page of a new browser; skips the test where there is none."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("needs chromium, which tools/test_deps.sh installs")
    theirs_in, commands = os.pipe()
    answers, theirs_out = os.pipe()

    def place() -> None:  # in the child: it reads commands from 3 and answers on 4
        # Copies far from 3 and 4: one that lay there would be overwritten, or closed when the browser starts.
        copies = fcntl.fcntl(theirs_in, fcntl.F_DUPFD, 10), fcntl.fcntl(theirs_out, fcntl.F_DUPFD, 10)
        os.dup2(copies[0], 3)
        os.dup2(copies[1], 4)

    # In /tmp whatever TMPDIR says: the browser lays a socket there, whose path may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="browser-", dir="/tmp", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"], env={**os.environ, "TMPDIR": profile},
            preexec_fn=place, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Page(commands, answers)
        finally:
            process.terminate()
            process.wait(timeout=20)
            os.close(commands)


def colours(picture: Path) -> dict[tuple[int, int, int], int]:
    """The pixels of a picture by colour."""
    from PIL import Image

    found = Image.open(picture).convert("RGB").getcolors(1 << 24)
    assert found is not None
    return {colour: number for number, colour in found}

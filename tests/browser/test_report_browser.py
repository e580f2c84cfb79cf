"""The report in a real browser: in light and dark, on a phone, by keyboard; and it asks nobody for
anything.
"""

from __future__ import annotations

import asyncio
import base64
import io
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import matplotlib.image
import numpy as np
import pytest

from megatron_efr.evaluation.records import Record, summarise
from megatron_efr.report import write_report
from megatron_efr.report.records import Listed, family_summary
from megatron_efr.types import Prompt
from tests.groups import graded

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here; apt-get install chromium runs this test"
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
    "--hide-scrollbars",
    "--remote-debugging-port=0",
]
EVIL = (
    "<script>document.title='taken'</script><img src='https://example.org/x.png' "
    "onerror='document.title=1'>"
)
KEYS = {"Tab": (9, ""), "Enter": (13, "\r")}


def evaluation(name: str, accuracy: float, share: float) -> Record:
    rng = np.random.default_rng(0)
    groups = []
    for index in range(60):
        level = 2 + index % 7
        count = round(10 * level * share)
        prompt = Prompt(
            f"p{index}", (1,), "", "7", {"difficulty": level, "question": f"Sum {index}"}
        )
        text = f"{name} thinks <b>hard</b> {EVIL} {'x' * 300} \\boxed{{7}}"
        groups.append(graded([rng.random() < accuracy], [count], text=text, prompt=prompt))
    return summarise(groups, name, protocol={"max_new_tokens": 128})


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, Path]:
    """A family of two methods of two seeds each."""
    shares = {
        "base": 1.0,
        "laser_seed-1": 0.7,
        "laser_seed-2": 0.7,
        "kimi_seed-1": 0.5,
        "kimi_seed-2": 0.5,
    }
    records = {name: evaluation(name, 0.9, share) for name, share in shares.items()}
    models = [Listed("base", "base", ("base",), "base")]
    models += [
        Listed(name, name, (f"{name}_seed-1", f"{name}_seed-2"), "base")
        for name in ("laser", "kimi")
    ]
    summary = family_summary(records, models, {"total": 65.0})
    lines = [
        {"step": s, "accuracy": s / 20, "tokens_mean": 50.0 - s, "reward_mean": 0.1, "kl": 0.0}
        for s in range(1, 9)
    ]
    metrics = {name: lines for name in shares if name != "base"}
    configs = {name: f"name: {name}\nseed: {name[-1]}\n" for name in metrics}
    out = tmp_path_factory.mktemp("report")
    return summary, write_report(summary, records, metrics, out, note="Toy task.", configs=configs)


class Page:
    """A tab of a browser that was started for it, over its debugging protocol."""

    def __init__(self, port: int, loop: asyncio.AbstractEventLoop) -> None:
        self._port, self._loop, self._sent = port, loop, 0
        self.requested: list[str] = []

    async def connect(self) -> None:
        self._session = aiohttp.ClientSession()
        async with self._session.put(
            f"http://127.0.0.1:{self._port}/json/new?about:blank"
        ) as answer:
            place = (await answer.json())["webSocketDebuggerUrl"]
        self._socket = await self._session.ws_connect(place, max_msg_size=0)

    async def close(self) -> None:
        await self._socket.close()
        await self._session.close()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The browser's answer to a command."""
        return self._loop.run_until_complete(asyncio.wait_for(self._send(method, parameters), 60))

    async def _send(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._sent += 1
        await self._socket.send_json({"id": self._sent, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("method") == "Network.requestWillBeSent":
                self.requested.append(message["params"]["request"]["url"])
            if message.get("id") == self._sent:
                assert "error" not in message, message
                return message["result"]

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        code, text = KEYS[key]
        same = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **same)
        self.send("Input.dispatchKeyEvent", type="keyUp", **same)

    def resize(self, width: int, height: int, mobile: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.send("Emulation.setDeviceMetricsOverride", **metrics)

    def prefer(self, scheme: str) -> None:
        self.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )

    def picture(self) -> np.ndarray:
        data = base64.b64decode(self.send("Page.captureScreenshot")["data"])
        return matplotlib.image.imread(io.BytesIO(data))[..., :3]


@pytest.fixture(scope="module")
def page(report: tuple[Record, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The report, opened."""
    assert CHROMIUM is not None
    profile = tmp_path_factory.mktemp("profile")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    loop = asyncio.new_event_loop()
    try:
        made = Page(_port(profile / "DevToolsActivePort"), loop)
        loop.run_until_complete(made.connect())
        made.send("Network.enable")
        made.send("Page.enable")
        made.resize(900, 1600)
        made.send("Page.navigate", url=report[1].as_uri())
        _until(
            lambda: (
                made.js("document.readyState") == "complete"
                and made.js("location.protocol") == "file:"
            )
        )
        yield made
        loop.run_until_complete(made.close())
    finally:
        browser.terminate()
        browser.wait(30)
        loop.close()


def _port(path: Path) -> int:
    _until(lambda: path.exists() and "\n" in path.read_text())
    return int(path.read_text().splitlines()[0])


def _until(there: Callable[[], bool], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_the_rendered_page_holds_every_figure_and_no_outside_reference(
    report: tuple[Record, Path], page: Page
) -> None:
    dom = page.js("document.documentElement.outerHTML")
    text = re.sub(r"<[^>]+>", " ", re.sub(r"<style.*?</style>", "", dom, flags=re.DOTALL))
    for model in report[0]["models"]:
        assert f"{100 * model['accuracy']:.1f}%" in text
        assert f"{model['tokens']:.1f}" in text
    assert "[{:.1f}, {:.1f}]".format(*report[0]["models"][0]["tokens_ci"]) in text
    assert "50% fewer tokens than the base" in text
    assert "Toy task." in text
    plots = {"family": 1, "budgets": 1, "difficulty": 3, "lengths": 2, "training": 4}
    assert {
        name: page.js(f"document.querySelectorAll('#{name} svg[role=img]').length")
        for name in plots
    } == plots
    assert page.js("document.querySelectorAll('svg').length") == sum(plots.values())
    assert page.js("document.querySelectorAll('.absent').length") == 0


def test_a_model_s_output_is_text_and_nothing_is_asked_of_the_network(
    page: Page, report: tuple[Record, Path]
) -> None:
    assert (
        page.js("document.querySelectorAll('script, img, link, iframe, object, form').length") == 0
    )
    assert page.js("document.title") == "Efficient reasoning"
    assert EVIL in page.js("document.querySelector('#problem article details pre').textContent")
    assert page.requested == [report[1].as_uri()]


def test_the_thinking_is_folded_and_every_fold_opens_by_keyboard(page: Page) -> None:
    first = "document.querySelector('#problem article details')"
    seen = f"{first}.querySelector('pre').checkVisibility()"
    assert page.js(f"{first}.querySelector('summary').textContent").startswith("Thinking (")
    assert not page.js(seen)
    assert page.js("document.querySelector('#problem article > pre').textContent") == "\\boxed{7}"
    page.js("document.activeElement.blur(); window.getSelection().removeAllRanges()")
    reached = []
    for _ in range(60):
        page.press("Tab")
        reached.append(page.js("document.activeElement.tagName"))
        if page.js(f"document.activeElement.parentElement === {first}"):
            break
    sections = page.js("document.querySelectorAll('section').length")
    assert reached[: sections + 1] == ["A"] * sections + ["DIV"], (
        "the sections come first, then what is in them"
    )
    assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid", (
        "the focus is seen"
    )
    assert reached.count("SUMMARY") == 6
    assert reached.count("DIV") == 2, (
        "tables of all models and of differences can be scrolled; folded ones wait"
    )
    page.press("Enter")
    assert page.js(seen)
    page.press("Enter")
    assert not page.js(seen)


def test_on_a_phone_nothing_is_wider_than_the_screen(page: Page) -> None:
    page.js("document.querySelectorAll('details').forEach(each => each.open = true)")
    for width in (390, 320):
        page.resize(width, 844, mobile=True)
        assert page.js("innerWidth") == width
        wide = "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, svg'))"
        assert page.js(f"Math.max(...{wide}.map(e => e.getBoundingClientRect().right))") <= width
        assert page.js("document.documentElement.scrollWidth") == width, "with every fold open"
    page.js("document.querySelectorAll('details').forEach(each => each.open = false)")


def test_it_is_painted_in_light_and_dark_and_on_a_phone(page: Page) -> None:
    seen = {}
    for name, width, scheme in (
        ("light", 900, "light"),
        ("dark", 900, "dark"),
        ("phone", 390, "light"),
    ):
        page.resize(width, 1600, mobile=width < 400)
        page.prefer(scheme)
        page.js("scrollTo(0, 0)")
        seen[name] = page.picture()
        assert seen[name].shape[1] == width
        assert seen[name].std() > 0.05  # a blank page has none
        # text and colours
        assert len(np.unique((seen[name] * 255).astype(np.uint8).reshape(-1, 3), axis=0)) > 100
    assert np.median(seen["light"]) > 0.95
    assert np.median(seen["dark"]) < 0.15
    margin = seen["phone"][:, -8:].std()
    assert margin < 0.02  # nothing runs over the right edge

"""The report in a real browser: it renders, in light and dark and on a phone, and asks nobody for anything."""

import re
import shutil
import subprocess

import matplotlib.image
import numpy as np
import pytest

from megatron_efr.evaluation.records import summarise
from megatron_efr.report import build_summary, write_report
from megatron_efr.types import Prompt
from tests.groups import graded

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; apt-get install chromium runs this test")

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
]


def evaluation(name, accuracy, share):
    rng = np.random.default_rng(0)
    groups = []
    for index in range(60):
        level = 2 + index % 7
        count = round(10 * level * share)
        meta = {"difficulty": level, "question": f"Sum {index}"}
        prompt = Prompt(f"p{index}", (1,), "", "7", meta)
        groups.append(graded([rng.random() < accuracy], [count], text=f"{name} thinks <b>hard</b>", prompt=prompt))
    return summarise(groups, name)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    alphas = {"base": None, "alpha-0.1": 0.1, "alpha-0.4": 0.4}
    records = {name: evaluation(name, 0.9, share) for name, share in zip(alphas, (1.0, 0.7, 0.5), strict=True)}
    summary = build_summary(records, alphas, {"total": 65.0})
    lines = [
        {"step": s, "accuracy": s / 20, "tokens_mean": 50.0 - s, "reward_mean": 0.1, "kl": 0.0} for s in range(1, 9)
    ]
    metrics = {"alpha-0.1": lines, "alpha-0.4": lines}
    return summary, write_report(summary, records, metrics, tmp_path_factory.mktemp("report"), note="Toy task.")


def browse(profile, *arguments):
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_the_rendered_page_holds_every_figure_and_no_outside_reference(report, tmp_path):
    summary, page = report
    dom = browse(tmp_path / "profile", "--dump-dom", page.as_uri())
    text = re.sub(r"<[^>]+>", " ", re.sub(r"<style.*?</style>", "", dom, flags=re.DOTALL))
    for model in summary["models"]:
        assert f"{100 * model['accuracy']:.1f}%" in text
        assert f"{model['tokens']:.1f}" in text
        assert "[{:.1f}, {:.1f}]".format(*model["tokens_ci"]) in text
    assert "50% fewer tokens than the base" in text
    assert "Toy task." in text
    assert "thinks &lt;b&gt;hard&lt;/b&gt;" in dom
    assert dom.count("<svg") == dom.count('role="img"') == 7
    assert not re.search(r"https?://", dom)
    assert not re.search(r"<(script|link|iframe|object)\b", dom)


def test_it_is_painted_in_light_and_dark_and_on_a_phone(report, tmp_path):
    _, page = report
    schemes = {"light": (900, 1600, []), "dark": (900, 1600, ["--blink-settings=preferredColorScheme=0"])}
    schemes["phone"] = (500, 1600, [])
    seen = {}
    for name, (width, height, more) in schemes.items():
        path = tmp_path / f"{name}.png"
        size = f"--window-size={width},{height}"
        browse(tmp_path / "profile", *more, size, f"--screenshot={path}", page.as_uri())
        seen[name] = matplotlib.image.imread(path)[..., :3]
        assert seen[name].shape[1] == width
        assert seen[name].std() > 0.05  # a blank page has none
        assert len(np.unique((seen[name] * 255).astype(np.uint8).reshape(-1, 3), axis=0)) > 100  # text and colours
    assert np.median(seen["light"]) > 0.95
    assert np.median(seen["dark"]) < 0.15
    margin = seen["phone"][:, -8:].std()
    assert margin < 0.02  # nothing runs over the right edge

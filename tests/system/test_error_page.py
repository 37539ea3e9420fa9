"""The error page: what it shows is what was measured, nothing in it runs, and a browser shows it."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import HEADLESS
from comparing import Project, trained_run
from PIL import Image

from adaclip_finetune.cli import main
from adaclip_finetune.compare.error_page import Bar, rank_bars, recall_bars

HOSTILE = "a <script>document.title='run'</script> & \"quoted\" 'thing' <img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def page(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run whose test has a hostile caption and a hostile name."""
    folder = tmp_path_factory.mktemp("page")
    run = trained_run(project, folder / "work", concat_captions="indep-all", num_epochs=1)
    shutil.copytree(project["frames_dir"], folder / "frames")
    annotation = json.loads(Path(project["test_annot"]).read_text())
    name = '"><b onclick=x>video7'
    annotation[name] = {"sentences": [HOSTILE, "it is grey"], "duration": 8.0}
    (folder / "frames" / "video7").rename(folder / "frames" / name)
    del annotation["video7"]
    (folder / "test.json").write_text(json.dumps(annotation))
    words = [run, "--annot", folder / "test.json", "--frames_dir", folder / "frames", "--errors", folder / "e.html"]
    assert main(["evaluate", *map(str, words), "--json", str(folder / "found.json")]) == 0
    return folder / "e.html"


class Seen(HTMLParser):
    """The tags of a page with their attributes, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.feed(text)
        self.words = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def test_the_page_is_self_contained_and_nothing_in_it_runs(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    seen = Seen(text)
    assert not {tag for tag, _ in seen.tags} & {"script", "link", "iframe", "object", "form", "a", "b"}
    assert not any(attribute.startswith("on") for _, attributes in seen.tags for attribute in attributes)
    sources = [attributes["src"] or "" for tag, attributes in seen.tags if tag == "img"]
    assert sources and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "url(" not in text and not re.findall(r"https?://", text)
    policy = next(a["content"] for _, a in seen.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert HOSTILE in seen.words and '"><b onclick=x>video7' in seen.words


def test_the_page_shows_what_was_measured(page: Path) -> None:
    model, text = json.loads((page.parent / "found.json").read_text())["rows"][1], page.read_text(encoding="utf-8")
    seen = Seen(text)
    for direction in ("t2v", "v2t"):
        low, high = model[direction]["R@1 95%"]
        assert f"{model[direction]['R@1']:.1f} [{low:.1f}, {high:.1f}]" in seen.words
        assert f"{model[direction]['MeanR']:.1f}" in seen.words
    told = [int(rank) for rank in re.findall(r"Should have been found: rank (\d+)", seen.words)]
    assert told == sorted(told, reverse=True) and 1 < min(told) <= max(told) <= 8
    wrong = round(model["t2v"]["queries"] * (1 - model["t2v"]["R@1"] / 100))
    assert len(told) == min(20, wrong) and f"The worst {len(told)} of {wrong} queries" in seen.words
    first = next(attributes for tag, attributes in seen.tags if tag == "img")
    picture = Image.open(io.BytesIO(base64.b64decode((first["src"] or "").partition(",")[2])))
    assert picture.height == 96 and re.fullmatch(r"frame \d of .+", first["alt"] or "")
    # Two frames a strip, in the order of time, with shares of the softmax.
    for strip in re.findall(r'<ol class="strip">(.*?)</ol>', text, re.DOTALL):
        items = re.findall(r'">(\d+)\s*<br>(\d+) %</li>', strip)
        assert len(items) == 2 and int(items[0][0]) < int(items[1][0])
        assert sum(int(share) for _, share in items) <= 101
    assert "R@1 by length of the video 8 frames" in seen.words


def test_bars_count_queries() -> None:
    bars = rank_bars(np.array([1, 1, 2, 5, 6, 30, 240]))
    assert [(bar.label, bar.queries) for bar in bars] == [
        ("1", 2), ("2–5", 2), ("6–10", 1), ("11–50", 1), ("over 50", 1),
    ]  # fmt: skip
    assert sum(bar.share for bar in bars) == pytest.approx(100)
    # Equal values stay together.
    values, ranks = np.array([1, 2, 2, 2, 2, 2, 3, 4, 5, 1000]), np.array([1, 1, 2, 1, 1, 1, 1, 1, 1, 9])
    assert recall_bars(values, ranks, "words") == [
        Bar("1–2 words", pytest.approx(500 / 6), 6), Bar("3–4 words", 100.0, 2), Bar("5–1,000 words", 50.0, 2),
    ]  # fmt: skip
    assert recall_bars(np.full(4, 2), np.array([1, 2, 1, 1]), "frames") == [Bar("2 frames", 75.0, 4)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_on_a_phone_in_light_and_dark(scheme: str, page: Path, tmp_path: Path) -> None:
    program, picture = shutil.which("chromium") or shutil.which("chromium-browser"), tmp_path / "page.png"
    if program is None:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")
    words = [*HEADLESS, f"--user-data-dir={tmp_path}", "--window-size=500,1400", f"--screenshot={picture}"]
    words += ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    subprocess.run([program, *words, page.as_uri()], check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    ground = pixels[5, 5]
    assert (ground.sum() < 150) == (scheme == "dark") and (ground.sum() > 700) == (scheme == "light")
    assert 0.02 < (np.abs(pixels - ground).sum(axis=2) > 60).mean() < 0.9, "text, bars and pictures"
    assert (pixels.max(axis=2) - pixels.min(axis=2) > 80).mean() > 0.005, "the frames themselves"

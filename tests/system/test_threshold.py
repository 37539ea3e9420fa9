"""`adaclip calibrate`, and what searches say below the threshold."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from indexing import index_info, index_row, unit_rows
from PIL import Image
from serving import running, write_divided_index, write_small_index

from adaclip_finetune.cli import main
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.search.stored import EmbeddedMoments, write_index
from adaclip_finetune.search.threshold import (
    CaptionScores,
    Rate,
    Threshold,
    calibrate,
    captions_of,
    choose_score,
    rates_at,
    score_captions,
    thresholds_of,
)

EXACT = Rate(5.0, 2.0, 9.0)


class Numbers:
    """A model whose vector of the text "7" is that of video 7, with some noise."""

    def __init__(self, vectors: np.ndarray) -> None:
        noise = np.random.default_rng(5).normal(size=vectors.shape) * np.linspace(0, 0.4, len(vectors))[:, None]
        self.vectors = (vectors + noise).astype(np.float32)
        self.vectors /= np.linalg.norm(self.vectors, axis=1, keepdims=True)

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self.vectors[int(text)] for text in texts])


def write_divided(folder: Path, untrained: bool = False) -> tuple[VideoIndex, Any]:
    """Write 40 videos, of which the last is a copy of the first, with two windows each; return their model, too."""
    vectors = unit_rows(40)
    vectors[39] = vectors[0]
    parts = [{"start": n, "end": n + 1.0, "time": n, "thumb": "a.jpg"} for n in range(2)]
    moments = [EmbeddedMoments(parts, np.stack([vector, -vector])) for vector in vectors]
    info = index_info(moments={"by": "windows"}, untrained=untrained)
    folder.mkdir(exist_ok=True)
    write_index(folder, info, vectors, [index_row(number) for number in range(40)], moments)
    return VideoIndex.load(folder), Numbers(vectors)


@pytest.mark.parametrize(("percent", "expected"), [(0, 0), (9, 0), (10, 1), (35, 3), (99, 9)])
def test_the_smallest_score_that_so_few_reach(percent: float, expected: int) -> None:
    absent = np.random.default_rng(0).permutation(np.arange(10) / 10)
    score = choose_score(absent, percent)
    assert (absent >= score).sum() == expected and (absent >= score - 1e-6).sum() == expected + 1


def test_rates_have_intervals_by_video() -> None:
    """Ten captions of one video tell less than ten of ten videos."""
    rng = np.random.default_rng(0)
    scores = CaptionScores(rng.random(100), rng.random(100) - 0.5, np.arange(100))
    false_finds, misses = rates_at(scores, 0.4)
    assert false_finds.percent == pytest.approx(100 * (scores.absent >= 0.4).mean())
    assert misses.percent == pytest.approx(100 * (scores.present < 0.4).mean())
    assert misses.low < misses.percent < misses.high
    (same,) = rates_at(CaptionScores(*(np.repeat(one[:10], 10) for one in scores)), 0.4)[1:]
    assert same.high - same.low > 2 * (misses.high - misses.low)


def test_captions_belong_to_videos_by_name_and_by_stem(tmp_path: Path) -> None:
    rows = [index_row(0) | {"id": name} for name in ("beach.mp4", "deep/cafe\u0301.MOV", "b.1")]
    write_index(tmp_path, index_info(), unit_rows(3), rows)
    index = VideoIndex.load(tmp_path)
    entries = [("beach", ["A dog", "snow"]), ("deep/caf\xe9", ["a  dog"]), ("b.1", ["b"]), ("elsewhere", ["c"])]
    both = frozenset(["beach.mp4", "deep/caf\xe9.MOV"])
    assert captions_of(index, entries) == {"A dog": both, "snow": frozenset(["beach.mp4"]), "b": frozenset(["b.1"])}


@pytest.mark.parametrize("way", ["whole", "moment"])
def test_a_caption_is_asked_with_and_without_its_video(tmp_path: Path, way: Any) -> None:
    index, model = write_divided(tmp_path)
    captions = {str(number): frozenset([f"video{number}"]) for number in range(39)} | {
        "39": frozenset(["video1", "video2"])
    }
    scores = score_captions(index, model, captions, way)
    products = model.vectors @ unit_rows(40)[:39].T
    products = np.maximum(products, -products) if way == "moment" else products
    np.testing.assert_allclose(scores.present, products.max(1), atol=1e-6)
    for number in range(39):
        products[number, number] = -1
    products[39, [1, 2]] = -1
    np.testing.assert_allclose(scores.absent, products.max(1), atol=1e-6)
    assert len(set(scores.videos.tolist())) == 39 and scores.videos[39] == scores.videos[1]


def test_thresholds_are_kept_with_the_index(tmp_path: Path) -> None:
    """They belong to its model, and a damaged file is refused."""
    index, model = write_divided(tmp_path / "i")
    assert thresholds_of(index) == {}
    found = calibrate(index, model, {str(number): frozenset([f"video{number}"]) for number in range(39)}, 5)
    assert set(found) == {"whole", "moment"} and thresholds_of(index) == found
    assert found["whole"].false_finds.percent == pytest.approx(100 / 39) and found["whole"].videos == 39
    index.info = replace(index.info, fingerprint="0" * 64)
    assert thresholds_of(index) == {}
    for content in ("[]", "{}", '{"fingerprint": "%s", "whole": {}}' % ("0" * 64)):
        (tmp_path / "i" / "threshold.json").write_text(content)
        with pytest.raises(UserError, match="calibrate"):
            thresholds_of(index)


@pytest.mark.parametrize(
    ("misses", "claim"),
    [
        (10.0, "Nothing here shows that: "),
        (30.0, "Perhaps nothing here shows that: "),
        (80.0, "The score does not tell"),
    ],
)
def test_what_is_said_depends_on_how_much_is_missed(misses: float, claim: str) -> None:
    threshold = Threshold(0.3, EXACT, Rate(misses, 0, 100), 100, 50)
    assert threshold.nothing_found(0.3, 50) is None
    told = threshold.nothing_found(0.29, 50)
    assert told is not None and told.startswith(claim) and all(fact in told for fact in ("0.290", "0.300", "5 %"))
    assert f"{misses:.0f} %" in told and "50 videos" not in told
    assert "50 videos" in str(threshold.nothing_found(0.29, 60))


def test_the_api(tmp_path: Path) -> None:
    """It says so of a single text, on the first page; whole videos and moments have a threshold each."""
    index = write_divided_index(tmp_path)
    (rates,) = [{"false_finds": EXACT, "misses": EXACT, "captions": 9, "videos": 3}]
    content = {"fingerprint": index.info.fingerprint, "whole": rates | {"score": 0.5}, "moment": rates | {"score": 0.9}}
    (index.folder / "threshold.json").write_text(json.dumps(content))
    with running(index) as server:
        for query, below in {
            "q=1": False,
            "q=6": True,
            "q=6&page=2&k=1": False,
            "q=6&by=moment": False,
            "q=6&score=moment": False,
            "q=1&by=moment": True,
            "q=1&where=name%20=%20video2*": True,
        }.items():
            answer = server.ask(f"/api/search?{query}").json
            assert (answer["nothing"] is not None) is below, query
            assert answer["found"]
    with running(write_small_index(tmp_path / "plain")) as server:
        assert server.ask("/api/search?q=9").json["nothing"] is None


def test_the_command(run: Path, project: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, captions = tmp_path / "i", str(project["train_annot"])
    assert main(["index", str(run), captions, "-o", str(folder)]) == 0
    capsys.readouterr()
    assert main(["calibrate", str(folder)]) == 0
    told = capsys.readouterr().out
    assert main(["calibrate", str(folder), captions]) == 0
    assert capsys.readouterr().out == told and "by their own vectors: threshold" in told
    threshold = thresholds_of(VideoIndex.load(folder))["whole"]
    assert threshold.false_finds.percent <= 5 < 20 < threshold.misses.percent and "--false-finds" in told
    command = ["search", str(folder), "a red thing", "-k", "2"]
    (folder / "threshold.json").write_text((folder / "threshold.json").read_text().replace(repr(threshold.score), "2"))
    assert main(command) == 0
    _, said, first, _ = capsys.readouterr().out.splitlines()
    assert "is below 2.000" in said and first.split()[0] == "1"
    assert main([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["nothing"] in said and len(answer["hits"]) == 2
    Image.new("RGB", (40, 36), (220, 30, 30)).save(tmp_path / "p.png")
    for words in (['"a red thing" + "snow"'], ["a red thing", "--image", str(tmp_path / "p.png")]):
        assert main(["search", str(folder), *words]) == 0
        assert "below" not in capsys.readouterr().out
    (tmp_path / "others.json").write_text(json.dumps({"elsewhere": {"sentences": ["a dog"]}}))
    refused: list[tuple[list[object], str]] = [
        ([folder, "--false-finds", 100], "--false-finds"),
        ([folder, tmp_path / "others.json"], "none of its videos"),
        ([folder, tmp_path / "none"], "no such file"),
        ([tmp_path / "none"], "no such folder"),
        (["milvus:///there.db"], "are kept in the folder of an index, not in Milvus"),
    ]
    for given, fact in refused:
        assert main(["calibrate", *map(str, given)]) == 2
        assert fact in capsys.readouterr().err

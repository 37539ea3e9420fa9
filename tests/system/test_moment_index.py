"""`adaclip index --moments` on real files, and searches that say where in a video it is."""

import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from indexing import index_info, index_row, unit_rows, write_run
from media import index_of, write_frames, write_video
from PIL import Image

from adaclip_finetune.cli import main
from adaclip_finetune.data.dataset import VideoReader, collate
from adaclip_finetune.data.frame_folder import FRAME_TIMES
from adaclip_finetune.data.video import file
from adaclip_finetune.errors import UserError
from adaclip_finetune.search import build
from adaclip_finetune.search.build import index_videos
from adaclip_finetune.search.collection import collect_annotation, collect_folder
from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.search.moments import MomentSettings, embed_moments
from adaclip_finetune.search.search_model import SearchModel, load_retriever
from adaclip_finetune.search.stored import EmbeddedMoments, read_index, write_index

Settings = dict[str, Any]
Capsys = pytest.CaptureFixture[str]
WINDOWS = MomentSettings("windows", 0.8, 0.4)


@pytest.fixture(scope="module")
def model(run: Path) -> SearchModel:
    return load_retriever(run, num_workers=0)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of 2 s and 0.6 s, at 25 frames a second."""
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "a.mp4", 50)
    write_video(folder / "b.mp4", 15)
    return folder


def spans(folder: Path, video: int = 0) -> list[tuple[float, float]]:
    moments = read_index(folder).videos()[video].moments
    assert moments is not None
    return [(row["start"], row["end"]) for row in moments.rows]


def vectors(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {row["id"]: (vector, moments.vectors) for row, vector, moments in read_index(folder).videos() if moments}


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"num_frm": 4, "num_frm_subset": 3, "top_k": 3, "segment_sampling": True},
        {"policy_backbone": "clip"},
        {"use_policy": False, "num_frm": 10},
        {"use_policy": False, "num_frm": 10, "num_frm_subset": 8},  # and two blank frames
        {"use_policy": False, "num_frm": 10, "frame_agg": None, "tower": {"method": "change"}},
    ],
    ids=str,
)
def test_a_window_is_embedded_as_a_video_of_its_frames(
    project: Settings, clips: Path, tmp_path: Path, others: Settings
) -> None:
    model = load_retriever(write_run(tmp_path / "run", project | others), num_workers=0)
    index_videos(model, collect_folder(clips), tmp_path / "i", moments=WINDOWS)
    assert spans(tmp_path / "i") == [(0.0, 0.8), (0.4, 1.2), (0.8, 1.6), (1.2, 2.0)]
    assert spans(tmp_path / "i", 1) == [(0.0, 0.6)]
    for video in read_index(tmp_path / "i").videos():
        assert video.moments is not None
        for row, vector in zip(*video.moments, strict=True):
            first, end = round(25 * row["start"]), round(25 * row["end"])
            reader = VideoReader(Part(clips, video.row["id"], first, end), model.config, model.model.views())
            batch = collate([reader.read("part")]).videos
            assert batch is not None
            own, (weighted,) = model.embed(batch)
            np.testing.assert_allclose(vector, own[0].numpy(), atol=1e-6)
            best = first + weighted.frames[weighted.best]
            assert row["time"] == pytest.approx(best / 25, abs=1e-3)
            with Image.open(tmp_path / "i" / "thumbs" / row["thumb"]) as picture:
                assert index_of(np.asarray(picture)) == best


@pytest.mark.parametrize("selects", [True, False])
def test_windows_that_overlap_encode_each_frame_once(
    project: Settings, clips: Path, tmp_path: Path, selects: bool
) -> None:
    """Unless the frames that are selected are fewer."""
    settings = project | {"num_frm": 10, "top_k": 2, "use_policy": selects}
    model = load_retriever(write_run(tmp_path / "run", settings), num_workers=0)
    encoded: list[int] = []
    visual = model.model.clip.get_submodule("visual")
    visual.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    collection = collect_folder(clips)
    (moments,) = dict(embed_moments(model, collection, collection.videos[:1], WINDOWS)).values()
    assert isinstance(moments, list) and len(moments) == 4
    # 10 of the 20 frames of each window are every second of 50 frames; and a blank one.
    assert sum(encoded) == (2 * 4 if selects else 25 + 1)


class Part:
    """A frame store that shows a part of a video file as a video."""

    def __init__(self, folder: Path, name: str, first: int, end: int) -> None:
        self.store, self.name, self.first, self.end = collect_folder(folder).store, name, first, end

    def count(self, _: str) -> int:
        return self.end - self.first

    def times(self, _: str) -> None:
        return None

    def read(self, _: str, indices: list[int]) -> Any:
        return self.store.read(self.name, [self.first + index for index in indices])

    scan = None


def test_an_index_without_moments_stays_what_it_was(clips: Path, tmp_path: Path, model: SearchModel) -> None:
    """The vectors of the videos do not depend on moments; bytes and fingerprint of a plain index are pinned."""
    index_videos(model, collect_folder(clips), tmp_path / "plain")
    index_videos(model, collect_folder(clips), tmp_path / "i", moments=WINDOWS)
    plain, divided = read_index(tmp_path / "plain"), read_index(tmp_path / "i")
    assert (plain.moments, plain.info.moments) == (None, None)
    assert (plain.vectors == divided.vectors).all() and list(plain.lines) == list(divided.lines)
    assert plain.info.fingerprint == divided.info.fingerprint
    rows = [json.loads(line) for line in (tmp_path / "i" / "videos.jsonl").read_text().splitlines()]
    assert [len(row["moments"]) for row in rows] == [4, 1] and "moments" not in json.loads(plain.lines[0])


def test_a_long_video_is_read_in_pieces_and_decoded_once(
    clips: Path, tmp_path: Path, model: SearchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frame is converted once however many windows show it; pieces share only the windows at their borders."""
    converted: list[int] = []
    to_rgb = file.to_rgb
    monkeypatch.setattr(file, "to_rgb", lambda frame: converted.append(frame.pts) or to_rgb(frame))
    collection, dense = collect_folder(clips), MomentSettings("windows", 0.8, 0.08)
    whole = dict(embed_moments(model, collection, collection.videos[:1], dense))
    assert len(converted) == len(set(converted)) <= 50
    monkeypatch.setattr("adaclip_finetune.search.moments.FRAMES_A_GALLERY_BATCH", 5 * model.config.num_frm)
    pieces = dict(embed_moments(model, collection, collection.videos[:1], dense))
    (one,), (other,) = whole.values(), pieces.values()
    assert isinstance(one, list) and isinstance(other, list) and len(one) == len(other) == 16
    for moment, same in zip(one, other, strict=True):
        assert (moment.span, moment.frame, moment.picture) == (same.span, same.frame, same.picture)
        np.testing.assert_allclose(moment.vector, same.vector, atol=1e-6)


def test_workers_embed_the_same(clips: Path, tmp_path: Path, model: SearchModel) -> None:
    busy = load_retriever(model.source, num_workers=1)
    for folder, one in (("alone", model), ("busy", busy)):
        index_videos(one, collect_folder(clips), tmp_path / folder, moments=WINDOWS)
    for name, (_, moments) in vectors(tmp_path / "alone").items():
        np.testing.assert_array_equal(moments, vectors(tmp_path / "busy")[name][1])


def test_shots(tmp_path: Path, model: SearchModel) -> None:
    """A video of three scenes of 1 s, 2 s and 1.5 s; the borders are found to an eighth of a second."""
    import av

    (tmp_path / "v").mkdir()
    with av.open(str(tmp_path / "v" / "scenes.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for colour, count in (((250, 20, 20), 24), ((20, 20, 250), 48), ((20, 250, 20), 36)):
            for _ in range(count):
                picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), colour, np.uint8), format="rgb24")
                container.mux(stream.encode(picture))
        container.mux(stream.encode())
    index_videos(model, collect_folder(tmp_path / "v"), tmp_path / "i", moments=MomentSettings("shots"))
    (start, first), (again, second), (last, end) = spans(tmp_path / "i")
    assert (start, first, second) == (0, again, last)
    assert (first, second, end) == (
        pytest.approx(1, abs=0.126),
        pytest.approx(3, abs=0.126),
        pytest.approx(4.5, abs=0.1),
    )
    index_videos(model, collect_folder(tmp_path / "v"), tmp_path / "short", moments=MomentSettings("shots", 1.0))
    assert max(end - start for start, end in spans(tmp_path / "short")) <= 1.13


def test_frames_that_are_shown_long(tmp_path: Path, model: SearchModel) -> None:
    """A slide is shown from 1 s to 9 s: windows and shots inside that time show it, and spans stay in order."""
    shown = [0, 500, 1000, 9000, 9500]
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v" / "slides.mkv", 5, shown=shown)
    collection = collect_folder(tmp_path / "v")
    ((_, windows),) = embed_moments(model, collection, collection.videos, MomentSettings("windows", 2, 2))
    assert isinstance(windows, list)
    assert {moment.span: moment.frame for moment in windows}[4, 6] == 2
    for window in (8.0, 0.25):
        ((_, shots),) = embed_moments(model, collection, collection.videos, MomentSettings("shots", window))
        assert isinstance(shots, list)
        assert all(moment.span[0] < moment.span[1] for moment in shots)
        assert all(one.span[1] == next_one.span[0] for one, next_one in pairwise(shots))


def test_frames_in_folders_need_a_length(tmp_path: Path, model: SearchModel) -> None:
    """It is annotated, or follows from the times of the frames."""
    for name in ("annotated", "timed", "neither"):
        write_frames(tmp_path / "frames" / name, 8)
    (tmp_path / "frames" / "timed" / FRAME_TIMES).write_text(json.dumps([0.5 * number for number in range(8)]))
    videos = {name: {"sentences": ["x"]} for name in ("annotated", "timed", "neither")}
    (tmp_path / "a.json").write_text(json.dumps(videos | {"annotated": {"sentences": ["x"], "duration": 4.0}}))
    config = model.config.model_copy(update={"frames_dir": str(tmp_path / "frames")})
    collection = collect_annotation(tmp_path / "a.json", config)
    report = index_videos(model, collection, tmp_path / "i", moments=MomentSettings("windows", 2, 1))
    assert list(report.broken) == ["neither"] and "duration" in report.broken["neither"]
    assert (report.count, report.moments) == (2, 6)
    assert spans(tmp_path / "i") == spans(tmp_path / "i", 1) == [(0, 2), (1, 3), (2, 4)]


def test_updates_keep_drop_and_copy_moments(
    library: Path, tmp_path: Path, model: SearchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def index(**how: Any) -> tuple[build.IndexingReport, list[str]]:
        """Index, and return the report and the videos whose moments were embedded."""
        embedded: list[str] = []

        def spy(model: SearchModel, collection: Any, videos: Any, settings: Any) -> Any:
            embedded.extend(video.id for video in videos)
            return embed_moments(model, collection, videos, settings)

        monkeypatch.setattr(build, "embed_moments", spy)
        return index_videos(model, collect_folder(library), tmp_path / "i", **{"moments": WINDOWS} | how), embedded

    index(moments=None)
    report, embedded = index()  # adds moments to what is there
    assert (report.embedded, report.kept, report.moments, embedded) == (0, 2, 5, ["a.mp4", "b.mp4"])
    before = vectors(tmp_path / "i")
    assert index()[1] == []
    shutil.copy(library / "a.mp4", library / "copy.mp4")
    report, embedded = index()
    assert (report.copies, report.moments, embedded) == (1, 9, [])
    loaded = VideoIndex.load(tmp_path / "i")
    assert loaded.moments is not None and (loaded.distinct, len(loaded.moments)) == (2, 9)
    (hit,) = loaded.search_moments(before["a.mp4"][1][:1], 1)[0]
    assert (hit.video.id, [copy.id for copy in hit.copies]) == ("a.mp4", ["copy.mp4"])
    (library / "copy.mp4").unlink()
    write_video(library / "b.mp4", 40, crf="40")
    report, embedded = index()
    assert (report.vanished, report.moments, embedded) == (["copy.mp4"], 4 + 3 + 4, ["b.mp4"])
    assert (vectors(tmp_path / "i")["a.mp4"][1] == before["a.mp4"][1]).all()
    report, embedded = index(sync=True)
    assert (report.count, report.moments, embedded) == (2, 7, [])
    kept = {path.name for path in (tmp_path / "i" / "thumbs").iterdir()}
    assert kept == set().union(*(video.thumbs() for video in read_index(tmp_path / "i").videos()))
    report, _ = index(dtype="float16")
    assert all(one.dtype == np.float16 for of in vectors(tmp_path / "i").values() for one in of)
    (library / "b.mp4").unlink()
    assert index()[0].moments == 7  # what has vanished keeps its moments
    for other in (None, MomentSettings("windows", 0.8, 0.2), MomentSettings("shots")):
        with pytest.raises(UserError, match=re.escape("--moments windows --window 0.8 --stride 0.4")):
            index(moments=other)


def test_videos_that_vanished_before_others_were_divided(library: Path, tmp_path: Path, model: SearchModel) -> None:
    index_videos(model, collect_folder(library), tmp_path / "i")
    (library / "b.mp4").unlink()
    index_videos(model, collect_folder(library), tmp_path / "i", moments=WINDOWS)
    index = VideoIndex.load(tmp_path / "i")
    found = index.search(unit_rows(1, index.width), 5)[0]
    assert {hit.video.id: len(hit.moments) > 0 for hit in found} == {"a.mp4": True, "b.mp4": False}
    assert {hit.video.id for hit in index.search_moments(unit_rows(1, index.width), 99)[0]} == {"a.mp4"}


def test_an_interruption_keeps_finished_videos(clips: Path, tmp_path: Path, model: SearchModel) -> None:
    embed, calls = model.embed, list[int]()

    def stop(batch: Any) -> Any:
        calls.append(len(batch))
        if len(calls) > 3:
            raise KeyboardInterrupt
        return embed(batch)

    model.embed = stop  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):  # both videos are embedded, and the moments of one
            index_videos(model, collect_folder(clips), tmp_path / "i", moments=WINDOWS)
    finally:
        model.embed = embed  # type: ignore[method-assign]
    kept: list[Any] = []
    model.embed = lambda batch: kept.append(batch.video_ids) or embed(batch)  # type: ignore[method-assign, func-returns-value]
    try:
        report = index_videos(model, collect_folder(clips), tmp_path / "i", moments=WINDOWS)
    finally:
        model.embed = embed  # type: ignore[method-assign]
    assert (report.embedded, report.kept, kept) == (0, 2, [["b.mp4"]])
    index_videos(model, collect_folder(clips), tmp_path / "whole", moments=WINDOWS)
    for name, both in vectors(tmp_path / "whole").items():
        for one, other in zip(both, vectors(tmp_path / "i")[name], strict=True):
            np.testing.assert_array_equal(one, other)


def write_moments(folder: Path, dtype: str = "float32") -> tuple[VideoIndex, np.ndarray]:
    """Write an index of 40 videos of 9 windows of 2 s that start every second, and return their vectors (40, 9, D)."""
    folder.mkdir()
    videos, windows = unit_rows(40), unit_rows(360, seed=1).reshape(40, 9, 32)
    rows = [{"start": n, "end": n + 2.0, "time": n + 1.5, "thumb": f"{n}.jpg"} for n in range(9)]
    info = index_info(moments={"by": "windows", "window": 2.0, "stride": 1.0})
    moments = [EmbeddedMoments(rows, of_one) for of_one in windows]
    write_index(folder, info, videos.astype(dtype), [index_row(n) for n in range(40)], moments)
    return VideoIndex.load(folder), windows


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_searches(tmp_path: Path, dtype: str) -> None:
    """Videos are ranked as without moments, and moments by their best windows: each video has some, apart in time."""
    index, windows = write_moments(tmp_path / "i", dtype)
    assert index.moments is not None and len(index.moments) == 360
    query = unit_rows(1, seed=2)
    found = index.search_moments(query, 1000)[0]
    assert [hit.rank for hit in found] == list(range(1, len(found) + 1))
    assert found == index.search_moments(query, len(found))[0]
    assert found[20:30] == index.search_moments(query, 1000, slice(20, 30))[0]
    scores = np.array([hit.score for hit in found])
    assert (np.diff(scores) < 1e-3).all() and scores[0] == pytest.approx((windows @ query[0]).max(), abs=1e-3)
    by_video: dict[str, list[Any]] = {}
    for hit in found:
        by_video.setdefault(hit.video.id, []).extend(hit.moments)
    assert len(by_video) == 40
    for moments in by_video.values():
        times = sorted((one.start, one.end) for one in moments)
        assert all(end <= start for (_, end), (start, _) in pairwise(times))
    for hit in index.search(query, 40)[0]:
        assert list(hit.moments) == by_video[hit.video.id][:5]
    best = index.search(query, 12, score="moment")[0]
    assert [hit.video.id for hit in best] == list(by_video)[:12] and [hit.rank for hit in best] == list(range(1, 13))
    assert [hit.score for hit in best] == pytest.approx([hit.moments[0].score for hit in best], abs=1e-5)
    assert [hit.video.id for hit in index.search(query, 40)[0]] == [
        f"video{row}" for row in np.argsort(-(unit_rows(40).astype(dtype).astype(np.float32) @ query[0]))
    ]


def test_a_clip_without_training_ranks_videos_by_their_best_moment(tmp_path: Path) -> None:
    """Its mean of frames says less than a few of them; videos without moments come last."""
    index, _ = write_moments(tmp_path / "i")
    stored = read_index(index.folder)
    assert stored.moments is not None
    moments = list(stored.moments.by_video())
    moments[7] = EmbeddedMoments([], np.empty((0, 32), np.float32))
    rows = [video.row for video in stored.videos()]
    write_index(index.folder, replace(index.info, untrained=True), stored.vectors, rows, moments)
    untrained, query = VideoIndex.load(index.folder), unit_rows(1, seed=2)
    ranked, before = untrained.search(query, 40)[0], index.search(query, 40, score="moment")[0]
    order = [hit.video.id for hit in before if hit.video.id != "video7"]
    assert [hit.video.id for hit in ranked] == [*order, "video7"] and not ranked[-1].moments
    whole = untrained.search(query, 40, score="whole")[0]
    assert [hit.video.id for hit in whole] == [hit.video.id for hit in index.search(query, 40)[0]]


def test_the_commands(clips: Path, tmp_path: Path, model: SearchModel, capsys: Capsys) -> None:
    index, plain = str(tmp_path / "i"), str(tmp_path / "plain")
    words = [str(model.source), str(clips), "--num_workers", "0", "-o"]
    assert main(["index", *words, index, "--moments", "--window", "0.8"]) == 0
    assert "2 in the index, with 5 moments" in capsys.readouterr().out
    assert main(["index", *words, plain]) == 0
    answers = []
    for by in ([], ["--by", "moment"]):
        capsys.readouterr()
        assert main(["search", index, "a red thing", "--json", *by]) == 0
        answers.append(json.loads(capsys.readouterr().out)["hits"])
        assert main(["search", index, "a red thing", *by, "--explain"]) == 0
        shown = capsys.readouterr().out
        for hit in answers[-1]:
            span = "–".join(f"0:{int(10 * hit[end]) / 10:04.1f}" for end in ("start", "end"))
            assert re.search(rf"^ +{hit['rank']}  {hit['score']:.4f} +{span}  {hit['id']}", shown, re.MULTILINE)
            assert f"{span} ({hit['moments'][0]['score']:.4f})" in shown
    assert main(["search", index, "a red thing", "--json", "--score", "moment"]) == 0
    best = json.loads(capsys.readouterr().out)["hits"]
    assert [hit["score"] for hit in best] == pytest.approx([hit["moments"][0]["score"] for hit in best], abs=1e-5)
    videos, moments = answers
    assert {hit["id"] for hit in videos} == {"a.mp4", "b.mp4"}
    assert all(hit["moments"][0]["start"] == hit["start"] <= hit["time"] for hit in videos)
    assert [(hit["score"], len(hit["moments"])) for hit in moments] == [
        (hit["moments"][0]["score"], 1) for hit in moments
    ]
    cases = [
        (["search", plain, "x", "--by", "moment"], "has no moments"),
        (["search", plain, "x", "--score", "moment"], "has no moments"),
        (["search", index, "x", "--score", "whole", "--by", "moment"], "--score"),
        (["index", *words, plain, "--window", "2"], "--window belongs to --moments"),
        (["index", *words, plain, "--moments", "shots", "--stride", "2"], "--stride"),
        (["index", *words, plain, "--moments", "--stride", "20"], "--stride 20"),
        (["index", *words, index], "--moments windows --window 0.8 --stride 0.4"),
    ]
    for refused, fact in cases:
        assert main(refused) == 2
        assert fact in capsys.readouterr().err

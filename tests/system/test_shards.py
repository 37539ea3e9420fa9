"""`adaclip index --shard` and `adaclip index merge`: the bytes are those that one process writes."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
from indexing import contents, index, write_run
from killed import killing
from media import write_video

from adaclip_finetune.cli import main
from adaclip_finetune.data.dataset import VideoBatch
from adaclip_finetune.evaluation.parts import PartFolder
from adaclip_finetune.search import build
from adaclip_finetune.search import merge as merge_module
from adaclip_finetune.search.collection import collect_folder
from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.search.search_model import SearchModel
from adaclip_finetune.search.shards import Shard
from adaclip_finetune.search.transcripts import Transcripts

Settings = dict[str, Any]
Capsys = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("load_once")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven videos, of which two are copies of others, and a file that is none."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(5):
        write_video(folder / ("deep" if number % 2 else "") / f"clip {number}.mp4", 20 + 6 * number)
    shutil.copy(folder / "clip 2.mp4", folder / "deep" / "again.mp4")
    shutil.copy(folder / "deep" / "clip 3.mp4", folder / "a.mp4")
    (folder / "broken.mp4").write_text("no video")
    return folder


def merge(folder: Path, name: str = "i", output: str = "merged") -> int:
    return index("merge", *sorted(folder.glob(f"{name}-*-of-*")), output=folder / output)


def test_a_part_is_not_pushed(run: Path, clips: Path, tmp_path: Path, capsys: Capsys) -> None:
    index(run, clips, "--shard", "1/2", output=tmp_path / "i")
    assert main(["index", "push", str(tmp_path / "i-1-of-2"), str(tmp_path / "copy")]) == 2
    assert "adaclip index merge" in capsys.readouterr().err and not (tmp_path / "copy").exists()


def test_transcripts_of_the_parts_are_merged(run: Path, clips: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    for name, said in {"clip 0": "hello", "deep/clip 1": "good night", "clip 4": "hello again"}.items():
        (folder / f"{name}.srt").write_text(f"1\n00:00:01,000 --> 00:00:02,000\n{said}\n")
    for number in (1, 2, 3):
        index(run, folder, "--shard", f"{number}/3", output=tmp_path / "i")
    assert merge(tmp_path) == 0
    index(run, folder, output=tmp_path / "one")
    merged, one = Transcripts(tmp_path / "merged"), Transcripts(tmp_path / "one")
    assert merged.count() == one.count() == 3
    for query in ("hello", "night"):
        assert merged.find(query) == one.find(query) != {}
    (folder / "clip 0.srt").unlink()
    for number in (1, 2, 3):
        index(run, folder, "--shard", f"{number}/3", output=tmp_path / "i")
    assert merge(tmp_path) == 0
    assert merged.count() == 2


@pytest.mark.parametrize(
    ("of", "together", "flags"),
    [
        (1, 1, []),
        (3, 1, ["--dtype", "float16"]),
        (3, 1, ["--moments", "--window", "0.6", "--stride", "0.4"]),
        (9, 1, []),
        (2, 3, []),  # as on a GPU
    ],
    ids=str,
)
def test_merged_parts_are_the_bytes_of_one_process(
    run: Path,
    clips: Path,
    tmp_path: Path,
    of: int,
    together: int,
    flags: list[str],
    capsys: Capsys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: set[int] = set()
    whole = SearchModel.embed

    def embed(model: SearchModel, batch: VideoBatch) -> Any:
        sizes.add(len(batch))
        return whole(model, batch)

    monkeypatch.setattr(SearchModel, "embed", embed)
    monkeypatch.setattr(build, "_together", lambda _: together)
    assert index(run, clips, *flags, "--val_batch_size", 4, output=tmp_path / "whole") == 1
    codes = [
        index(run, clips, *flags, "--shard", f"{number}/{of}", output=tmp_path / "i") for number in range(1, of + 1)
    ]
    assert sorted(codes) == [0] * (of - 1) + [1], "the broken file belongs to one of them"
    parts = [VideoIndex.load(folder) for folder in tmp_path.glob("i-*-of-*")]
    assert sum(len(part) for part in parts) == 7
    assert merge(tmp_path) == 0
    assert f"{of} parts" in capsys.readouterr().out
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")
    assert VideoIndex.load(tmp_path / "merged").distinct == 5
    assert sizes == {together} or "--moments" in flags


def test_killed_shards_go_on(run: Path, clips: Path, tmp_path: Path) -> None:
    """Each shard is killed before it keeps its second batch and started again; so is the merge."""
    flags = ("--moments", "--window", "0.6", "--val_batch_size", "1")
    index(run, clips, *flags, output=tmp_path / "whole")

    def killed(*words: str) -> int:
        process = forked.context().Process(target=_killed, args=(words, tmp_path / "log"))
        process.start()
        process.join(120)
        assert process.exitcode is not None
        return process.exitcode

    for number in (1, 2):
        words = ("index", str(run), str(clips), *flags, "--shard", f"{number}/2", "-o", str(tmp_path / "i"))
        assert killed(*words) == -signal.SIGKILL, (tmp_path / "log").read_text()
        assert main(words) in (0, 1)
    parts = [str(path) for path in tmp_path.glob("i-*-of-2")]
    assert killed("index", "merge", *parts, "-o", str(tmp_path / "merged")) == -signal.SIGKILL
    assert merge(tmp_path) == 0
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")


def _killed(words: list[str], log: Path) -> None:
    """Run a command that kills itself at the second batch that it keeps, or the third picture that it copies."""
    forked.begin(log)
    PartFolder.write = killing(PartFolder.write, 2, signal.SIGKILL)  # type: ignore[method-assign]
    merge_module._copy = killing(merge_module._copy, 3, signal.SIGKILL)
    main(words)


def test_a_collection_that_grows(run: Path, clips: Path, tmp_path: Path, capsys: Capsys) -> None:
    """Shards keep what is unchanged. A file that changes may move to another shard; one that is gone needs --sync."""
    library = Path(shutil.copytree(clips, tmp_path / "library"))
    (library / "broken.mp4").unlink()

    def embed(*flags: str) -> list[int]:
        return [index(run, library, *flags, "--shard", f"{number}/2", output=tmp_path / "i") for number in (1, 2)]

    embed()
    (library / "deep" / "clip 1.mp4").unlink()
    for number in range(3):
        write_video(library / f"new {number}.mp4", 20 + number)
        shutil.copy(library / f"new {number}.mp4", library / "clip 0.mp4")  # at the end of another size
    capsys.readouterr()
    codes = embed()
    assert sorted(codes) == [0, 2]
    told = capsys.readouterr().err
    assert "clip 1.mp4" in told and "--sync" in told
    assert merge(tmp_path) == 2, "one part was made of other videos"
    assert "while other videos" in capsys.readouterr().err
    assert embed("--sync") == [0, 0]
    assert merge(tmp_path) == 0
    index(run, library, output=tmp_path / "whole")
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")
    write_video(library / "newer.mp4", 33)
    assert (embed(), merge(tmp_path)) == ([0, 0], 0), "an index of the same videos is replaced"
    index(run, library, output=tmp_path / "whole")
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")


def test_frames_and_annotations(project: Settings, run: Path, tmp_path: Path) -> None:
    words = (run, project["test_annot"], "--frames_dir", project["frames_dir"])
    assert index(*words, output=tmp_path / "whole") == 0
    for number in (2, 1):
        assert index(*words, "--shard", f"{number}/2", output=tmp_path / "i") == 0
    assert min(len(VideoIndex.load(tmp_path / f"i-{number}-of-2")) for number in (1, 2)) > 0
    assert merge(tmp_path) == 0
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")


def test_what_cannot_be_merged_is_refused(
    run: Path, project: Settings, clips: Path, tmp_path: Path, capsys: Capsys
) -> None:
    other = write_run(tmp_path / "other", project, seed=1)
    (tmp_path / "few").mkdir()
    shutil.copy(clips / "clip 0.mp4", tmp_path / "few" / "x.mp4")
    index(run, clips, output=tmp_path / "whole")
    for number in (1, 2):
        index(run, clips, "--shard", f"{number}/2", output=tmp_path / "i")
    one, two = (tmp_path / f"i-{number}-of-2" for number in (1, 2))
    made = {
        "model": (other, clips, "--shard", "2/2"),
        "half": (run, clips, "--shard", "2/2", "--dtype", "float16"),
        "moments": (run, clips, "--shard", "2/2", "--moments"),
        "few": (run, tmp_path / "few", "--shard", "2/2"),
        "of": (run, clips, "--shard", "2/3"),
    }
    for name, words in made.items():
        index(*words, output=tmp_path / name)
    shutil.copytree(one, copy := tmp_path / "copy")
    shutil.copytree(one, no_thumbs := tmp_path / "no_thumbs")
    shutil.rmtree(no_thumbs / "thumbs")
    cases: list[tuple[list[Path], str]] = [
        ([one], "missing: 2/2"),
        ([one, two, copy], "shard 1 of 2"),
        ([one, two, tmp_path / "nowhere"], "no such folder"),
        ([one, tmp_path / "whole"], "whole index"),
        ([one, tmp_path / "model-2-of-2"], "another model"),
        ([one, tmp_path / "half-2-of-2"], "float16"),
        ([one, tmp_path / "moments-2-of-2"], "--moments"),
        ([one, tmp_path / "few-2-of-2"], "folder"),
        ([one, tmp_path / "of-2-of-3"], "number of shards"),
        ([no_thumbs, two], "is missing"),
    ]
    for parts, fact in cases:
        assert index("merge", *parts, output=tmp_path / "merged") == 2, fact
        assert fact in capsys.readouterr().err
        assert not (tmp_path / "merged").exists()
    assert index("merge", one, two, output=one) == 2
    shutil.copytree(one, tmp_path / "i-1-of-3")
    for flags, output in ((["--shard", "1/3"], tmp_path / "i"), ([], one)):
        assert index(run, clips, *flags, output=output) == 2
        assert "shard 1/2" in capsys.readouterr().err


def test_shards_of_torchrun(run: Path, clips: Path, tmp_path: Path) -> None:
    """Each process of torchrun takes its shard, although all have the same words."""
    index(run, clips, output=tmp_path / "whole")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    adaclip = [sys.executable, "-c", "import sys; from adaclip_finetune.cli import main; sys.exit(main())"]
    words = ["index", str(run), str(clips), "--shard", "auto", "-o", str(tmp_path / "i")]
    done = subprocess.run(
        [*torchrun, *adaclip, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0 and "broken.mp4" in done.stderr, done.stderr
    assert merge(tmp_path) == 0
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "a/b", "auto", "-1/4", "1/4/2"])
def test_shards_that_do_not_exist(text: str, run: Path, clips: Path, tmp_path: Path, capsys: Capsys) -> None:
    assert index(run, clips, f"--shard={text}", output=tmp_path / "i") == 2
    assert "--shard" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_video_is_in_one_shard(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.mp4").write_bytes(b"x" * number)
    collection = collect_folder(tmp_path)
    shares = [{video.id for video in Shard(number, 4).share(collection).videos} for number in range(1, 5)]
    assert sorted(name for share in shares for name in share) == sorted(video.id for video in collection.videos)
    assert min(map(len, shares)) >= 3

"""`adaclip cut`, and the clips that it writes, on videos whose frames tell their number."""

import shutil
from pathlib import Path

import av
import pytest
from media import ffmpeg, index_of, write_video

from adaclip_finetune.cli import main
from adaclip_finetune.data.frame_store import stamp_of
from adaclip_finetune.search.cut import CutFailed, clip_name, cut
from adaclip_finetune.search.index import IndexedVideo

Capsys = pytest.CaptureFixture[str]


def indexed(path: Path, name: str = "") -> IndexedVideo:
    return IndexedVideo(name or path.name, path, 4.0, (), 0, (), path, stamp_of(path), "key")


def coded(path: Path) -> list[int]:
    """Return which coded frames a video shows."""
    with av.open(str(path)) as container:
        return [index_of(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


@pytest.mark.parametrize(
    ("name", "codec", "copied"),
    [
        ("a.mp4", "libx264", True),
        ("a.webm", "libvpx-vp9", True),
        ("a.mkv", "libx264", True),
        ("a.MOV", "libx264", True),
        ("a.flv", "libx264", True),
        ("a.ts", "libx264", False),
        ("a.mpg", "mpeg2video", False),
    ],
)
def test_clips(tmp_path: Path, name: str, codec: str, copied: bool) -> None:
    """An exact clip holds the frames of its span and no others; a copy may hold some before and after."""
    source = write_video(tmp_path / name.lower(), 100, codec=codec).rename(tmp_path / name)
    video = indexed(source, f"deep/er/{name}")
    exact = tmp_path / clip_name(video, 1.22, 2.42, True)
    assert exact.name == "deep_er_a_1.2-2.4s.mp4"
    cut(video, 1.22, 2.42, exact, True)
    assert coded(exact) == list(range(31, 61))
    quick = tmp_path / clip_name(video, 1.22, 2.42, False)
    cut(video, 1.22, 2.42, quick)
    frames = coded(quick)
    assert quick.suffix == (Path(name).suffix.lower() if copied else ".mp4")
    assert set(frames) >= set(range(31, 60)) and frames[0] > 31 - 12 - 3  # a key frame is every 12
    if copied:
        with av.open(str(quick)) as clip, av.open(str(source)) as whole:
            packets = {bytes(packet) for packet in whole.demux(video=0)}
            assert all(bytes(packet) in packets for packet in clip.demux(video=0))


def test_sound_is_kept_and_sides_may_be_odd(tmp_path: Path) -> None:
    """Other tracks are left out."""
    source = tmp_path / "v.mkv"
    (tmp_path / "words.srt").write_text("1\n00:00:00,000 --> 00:00:03,000\nhello\n")
    inputs = ("-f", "lavfi", "-i", "testsrc=size=65x33:rate=10:duration=3", "-f", "lavfi", "-i", "sine=duration=3")
    ffmpeg(*inputs, "-i", tmp_path / "words.srt", "-pix_fmt", "yuv444p", "-c:s", "srt", source)
    for exact in (False, True):
        target = tmp_path / clip_name(indexed(source), 1, 2, exact)
        cut(indexed(source), 1, 2, target, exact)
        with av.open(str(target)) as clip:
            assert [stream.type for stream in clip.streams] == ["video", "audio"]


def test_what_cannot_be_cut_leaves_nothing(tmp_path: Path) -> None:
    source = write_video(tmp_path / "a.mp4", 50)
    known = indexed(source)
    (tmp_path / "frames").mkdir()
    cases: list[tuple[IndexedVideo, float, str]] = [
        (indexed(tmp_path / "frames"), 0, "made of frames"),
        (known, 90, "a.mp4"),  # after its end
    ]
    for video, start, fact in cases:
        with pytest.raises(CutFailed, match=fact):
            cut(video, start, start + 1, tmp_path / "clip.mp4", True)
    source.write_bytes(b"another")
    with pytest.raises(CutFailed, match="has changed"):
        cut(known, 0, 1, tmp_path / "clip.mp4")
    source.unlink()
    with pytest.raises(CutFailed, match="No such file"):
        cut(known, 0, 1, tmp_path / "clip.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["frames"]


def test_the_command(run: Path, tmp_path: Path, capsys: Capsys) -> None:
    videos, index = tmp_path / "videos", tmp_path / "my.index"
    for name in ("a.mp4", "b.mp4"):
        write_video(videos / name, 75 if name == "a.mp4" else 50)
    words = ["index", str(run), str(videos), "--num_workers", "0"]
    assert main([*words, "-o", str(index), "--moments", "--window", "1"]) == 0
    assert main([*words, "-o", str(tmp_path / "plain")]) == 0
    command = ["cut", str(index), "a red thing", "-k", "3", "-o", str(tmp_path / "clips")]
    capsys.readouterr()
    assert main([*command, "--exact"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = sorted(path.name for path in (tmp_path / "clips").iterdir())
    assert len(names) == len(lines) and [name[:3] for name in names] == [f"{n:02}_" for n in range(1, 1 + len(names))]
    for name, line in zip(names, lines, strict=True):
        assert line.endswith(f"clips/{name}")
        video, span = name.removesuffix("s.mp4").split("_")[1:]
        start, end = map(float, span.split("-"))
        frames = coded(tmp_path / "clips" / name)
        assert frames[0] == pytest.approx(25 * start, abs=2) and frames[-1] == pytest.approx(25 * end - 1, abs=2)
        assert video in ("a", "b")
    assert main([*command, "--exact"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--exact", "--overwrite"]) == 0
    capsys.readouterr()
    assert main([*command, "--overwrite", "--where", "name = a.*"]) == 0
    assert all("a_" in line for line in capsys.readouterr().out.splitlines())
    shutil.move(videos / "b.mp4", tmp_path / "elsewhere.mp4")
    capsys.readouterr()
    assert main([*command, "-k", "9", "--overwrite"]) == 1
    assert "b.mp4: cannot be cut" in capsys.readouterr().err
    refused: list[tuple[list[object], str]] = [
        ([tmp_path / "plain", "x", "-o", tmp_path / "c"], "has no moments"),
        ([index, "-o", tmp_path / "c"], "--image"),
        ([index, " ", "-o", tmp_path / "c"], "empty"),
        ([index, "x", "-o", tmp_path / "elsewhere.mp4"], "is a file"),
        ([index, "x", "-o", tmp_path / "no" / "c"], "no folder"),
        ([index, "x", "-k", "0", "-o", tmp_path / "c"], "k 0"),
    ]
    for given, fact in refused:
        assert main(["cut", *map(str, given)]) == 2
        assert fact in capsys.readouterr().err
    assert not (tmp_path / "c").exists()

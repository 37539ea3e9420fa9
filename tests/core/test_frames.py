"""Frame stores: which names they find, what they refuse, how images are decoded, and that workers can have them."""

import json
import pickle
import unicodedata
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from media import coded_frame, index_of, write_frames, write_video
from PIL import Image

from adaclip_finetune.config import load_config
from adaclip_finetune.data.annotations import VideoAnnotation
from adaclip_finetune.data.frame_folder import FrameFolder
from adaclip_finetune.data.frame_store import FrameError, FrameStore
from adaclip_finetune.data.frames import open_store
from adaclip_finetune.data.images import read_image
from adaclip_finetune.data.packed_frames import PackedFrames
from adaclip_finetune.data.packing import pack
from adaclip_finetune.data.readable import find_errors
from adaclip_finetune.data.splits import train_split
from adaclip_finetune.data.video.discovery import describe_unknown_files, find_videos
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.errors import UserError

TEMPLATE = "image_{:05d}.jpg"
NAME = "日本/cafe\u0301 가 が"  # composed or decomposed, it is the same name
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, NAME) for form in ("NFC", "NFD"))

Make = Callable[[Path], FrameStore]


def folder_store(folder: Path) -> FrameFolder:
    return FrameFolder(folder, TEMPLATE)


def pack_store(folder: Path) -> PackedFrames:
    assert pack(folder, folder / "p.lmdb", [], TEMPLATE, overwrite=True) == 0
    return PackedFrames(folder / "p.lmdb")


def write(store: object, folder: Path, name: str, num_frames: int) -> None:
    """Write a video as a store of this kind reads it."""
    if store is VideoFolder:
        write_video(folder / f"{name}.mp4", num_frames)
    else:
        write_frames(folder / name, num_frames)


def kind_of_error(store: FrameStore, video_id: str) -> str:
    with pytest.raises(FrameError) as caught:
        store.read(video_id, range(store.count(video_id)))
    assert caught.value.video_id == video_id and video_id in str(caught.value)
    return caught.value.kind


# ---- what all stores do ----


@pytest.mark.parametrize("make", [folder_store, VideoFolder, pack_store])
def test_counts_reads_in_any_order_and_scans(tmp_path: Path, make: Make) -> None:
    write(make, tmp_path, "a.1", 7)
    store = make(tmp_path)
    for copy in (store, pickle.loads(pickle.dumps(store))):
        assert copy.count("a.1") == 7
        for indices in ([0, 2, 6], [6, 0, 6, 3], [4]):
            frames = copy.read("a.1", indices)
            assert frames.shape == (len(indices), 66, 130, 3) and frames.dtype == np.uint8
            assert [index_of(frame) for frame in frames] == indices
    found = list(store.scan("a.1"))
    assert [index for index, _ in found] == list(range(7))
    assert np.array_equal(np.stack([frame for _, frame in found]), store.read("a.1", range(7)))
    seen: list[int] = []
    for index, _ in store.scan("a.1", stopped=lambda: len(seen) >= 2):
        seen.append(index)
    assert seen[:2] == [0, 1] and len(seen) < 7
    assert kind_of_error(store, "nowhere") == "missing"


@pytest.mark.parametrize("make", [folder_store, VideoFolder, pack_store])
def test_names_are_found_in_any_unicode_form_and_with_extension(tmp_path: Path, make: Make) -> None:
    write(make, tmp_path, DECOMPOSED, 2)
    write(make, tmp_path, "plain.v2", 3)
    store = make(tmp_path)
    for name in (COMPOSED, DECOMPOSED, f"{COMPOSED}.mp4"):
        assert store.count(name) == 2 and index_of(store.read(name, [1])[0]) == 1
    for name in ("plain.v2", "plain.v2.mp4"):
        assert store.count(name) == 3
    for absent in ("plain.v", "plain", "plain.v2.", "Plain.v2", "plain.v2.mp3", "日本", "日本/café"):
        assert kind_of_error(store, absent) in ("missing", "unreadable")


@pytest.mark.parametrize("make", [folder_store, VideoFolder, pack_store])
def test_names_that_differ_in_their_unicode_form_alone_are_refused_with_both(tmp_path: Path, make: Make) -> None:
    for name in ("\u00e9", "e\u0301"):
        write(make, tmp_path, name, 2)
    with pytest.raises((FrameError, UserError)) as caught:
        make(tmp_path).count("\u00e9")
    assert r"'\xe9" in str(caught.value) and r"'e\u0301" in str(caught.value)


@pytest.mark.parametrize("make", [folder_store, pack_store])
def test_a_damaged_image_is_named_and_never_replaced(tmp_path: Path, make: Make) -> None:
    path = write_frames(tmp_path / "v", 5) / TEMPLATE.format(4)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    store = make(tmp_path)
    assert [index_of(frame) for frame in store.read("v", [0, 1, 4])] == [0, 1, 4]
    assert kind_of_error(store, "v") == "damaged"
    seen: list[int] = []
    with pytest.raises(FrameError, match="4") as caught:
        seen.extend(index for index, _ in store.scan("v"))
    assert seen == [0, 1, 2] and caught.value.kind == "damaged"


def test_errors_can_be_sent_between_processes() -> None:
    error = FrameError("v", Path("/x/v.mp4"), "broken", "damaged")
    copy = pickle.loads(pickle.dumps(error))
    assert vars(copy) == vars(error) and str(copy) == str(error) == "v: /x/v.mp4: broken"


# ---- images ----


def encoded(image: Image.Image, kind: str, **options: object) -> BytesIO:
    content = BytesIO()
    image.save(content, kind, **options)  # type: ignore[arg-type]
    return BytesIO(content.getvalue())


RAMP = np.linspace(0, 1, 24, dtype=np.float32).reshape(4, 6)
TURNED = Image.Exif()
TURNED[274] = 6  # the orientation of a phone held upright


@pytest.mark.parametrize(
    "source",
    [
        encoded(Image.fromarray((RAMP * 65535).round().astype(np.uint16)), "PNG"),
        encoded(Image.fromarray((RAMP * 65535).round().astype(np.int32)), "PPM"),
        encoded(Image.fromarray(RAMP), "PPM"),
        encoded(Image.fromarray((RAMP * 255).round().astype(np.uint8)), "BMP"),
        encoded(Image.fromarray((RAMP * 255).round().astype(np.uint8)).convert("P"), "PNG"),
        encoded(Image.fromarray((RAMP * 255).round().astype(np.uint8)).rotate(90, expand=True), "PNG", exif=TURNED),
    ],
    ids=["16 bits", "16 bits in PPM", "floats", "grey", "palette", "turned by EXIF"],
)
def test_images_are_brought_to_eight_bits_and_upright(source: BytesIO) -> None:
    expected = np.repeat((RAMP * 255).round().astype(np.uint8)[..., None], 3, axis=2)
    image = read_image(BytesIO(source.getvalue()))
    assert image.mode == "RGB" and np.abs(np.asarray(image).astype(int) - expected).max() <= 1


def test_transparent_images_lie_on_white_and_cmyk_becomes_rgb() -> None:
    clear = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    clear.putpixel((1, 0), (200, 0, 0, 255))
    assert np.asarray(read_image(encoded(clear, "PNG"))).tolist() == [[[255, 255, 255], [200, 0, 0]]]
    cyan = np.asarray(read_image(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100)))
    assert np.allclose(cyan, (0, 255, 255), atol=8)


# ---- folders of images ----


def test_kinds_of_errors(tmp_path: Path) -> None:
    """Words of the path, which belongs to the user, do not matter."""
    folder = tmp_path / "cannot be decoded, though it is missing"
    (write_frames(folder / "gap", 3) / TEMPLATE.format(2)).unlink()
    (folder / "empty").mkdir()
    (folder / "file").write_bytes(b"")
    first = write_frames(folder / "dangling", 2) / TEMPLATE.format(1)
    first.unlink()
    first.symlink_to("nowhere")
    Image.new("RGB", (8, 6)).save(write_frames(folder / "sizes", 2) / TEMPLATE.format(2))
    (write_frames(folder / "zero", 2) / TEMPLATE.format(2)).rename(folder / "zero" / TEMPLATE.format(0))
    store = FrameFolder(folder, TEMPLATE)
    expected = {
        "gone": "missing", "gap": "gap", "empty": "unreadable", "file": "unreadable", "dangling": "unreadable",
        "sizes": "sizes", "zero": "unreadable", "x" * 300: "unreadable", "x" * 300 + ".mp4": "unreadable",
    }  # fmt: skip
    assert {video_id: kind_of_error(store, video_id) for video_id in expected} == expected
    errors = find_errors(store, ["gone", "gap", "sizes"], 2)
    assert {video_id: error.kind for video_id, error in errors.items()} == {"gone": "missing", "gap": "gap"}
    assert [frame.shape for _, frame in store.scan("sizes")] == [(66, 130, 3), (6, 8, 3)]


def test_only_files_of_the_template_count(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "v", 3)
    for other in (".DS_Store", "image_4.jpg", "image_00004.png", "ximage_00004.jpg", "image_00004.jpg.part"):
        (folder / other).write_bytes(b"x")
    assert FrameFolder(tmp_path, TEMPLATE).count("v") == 3
    (folder / TEMPLATE.format(10**12)).touch()  # some number images by the time, too large to count up to
    with pytest.raises(FrameError, match=r"image_00004.jpg is missing, though image_1000000000000\.jpg is there"):
        FrameFolder(tmp_path, TEMPLATE).count("v")
    for number in (1, 2, 3):
        (folder / TEMPLATE.format(number)).rename(folder / f"{number}+frame.png")
    store = FrameFolder(tmp_path, "{}+frame.png")
    assert store.count("v") == 3 and index_of(store.read("v", [2])[0]) == 2


# ---- folders of videos ----


def test_kinds_of_errors_of_videos(tmp_path: Path) -> None:
    content = bytearray(write_video(tmp_path / "hurt.avi", 20).read_bytes())
    content[len(content) // 2 : len(content) // 2 + 1500] = bytes(1500)
    (tmp_path / "hurt.avi").write_bytes(content)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "circle.mp4").symlink_to("circle.mp4")
    (tmp_path / "text.txt").write_text("hello")
    store = VideoFolder(tmp_path)
    expected = {
        "hurt": "damaged", "empty": "unreadable", "circle": "unreadable", "a/b": "missing", "text": "missing",
        "text.txt": "missing",
    }  # fmt: skip
    assert {video_id: kind_of_error(store, video_id) for video_id in expected} == expected
    with pytest.raises(FrameError, match=r"text\.txt"):
        store.find("text")


def test_videos_are_found_by_their_whole_name(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "folder.mp4").mkdir()
    for name in ("x.1.MP4", "x.10.mkv", "x.mp4", "deep/er.MTS", "x.mp4.txt", "v.mp4", "v.mkv", "w.mp4", "w.mp4.mkv"):
        (tmp_path / name).touch()
    store = VideoFolder(tmp_path)
    for video_id, name in [
        ("x.1", "x.1.MP4"), ("x.1.MP4", "x.1.MP4"), ("x.10", "x.10.mkv"), ("x", "x.mp4"), ("x.mp4", "x.mp4"),
        ("deep/er", "deep/er.MTS"), ("deep/er.MTS", "deep/er.MTS"), ("v.mp4", "v.mp4"),
    ]:  # fmt: skip
        assert store.find(video_id) == tmp_path / name
    for absent in ("x.100", "x.", "X", "folder", "folder.mp4", "x.mkv", "x.1.mp4", "nowhere/x", "deep/e"):
        with pytest.raises(FrameError):
            store.find(absent)
    for video_id, both in [("v", ("v.mkv", "v.mp4")), ("w.mp4", ("w.mp4", "w.mp4.mkv"))]:
        with pytest.raises(FrameError, match='"extension"') as caught:
            store.find(video_id)
        assert all(name in str(caught.value) for name in both)
    assert VideoFolder(tmp_path, {"v": "mkv"}).find("v").name == "v.mkv"
    with pytest.raises(FrameError, match=r"v\.webm$"):
        VideoFolder(tmp_path, {"v": "webm"}).find("v")


def test_every_file_that_the_reader_opens_is_a_video(tmp_path: Path) -> None:
    """By its extension, in any letter case, or else by its content."""
    named = ["a.MTS", "b.m2ts", "c.vob", "d.ogv", "e.GIF", "f.mp4", "deep/g.3GP"]
    write_video(tmp_path / "x.mp4", 3).rename(tmp_path / "no extension")
    write_video(tmp_path / "x.mp4", 3).rename(tmp_path / "h.dat")
    (tmp_path / "deep").mkdir()
    for name in [*named, "notes.txt", "deep/f.srt", ".hidden.mp4"]:
        (tmp_path / name).touch()
    Image.new("RGB", (8, 8)).save(tmp_path / "f.jpg")
    videos, others = find_videos(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in videos} == {*named, "no extension", "h.dat"}
    assert describe_unknown_files(others) == "3 other files passed over: f.jpg, notes.txt, f.srt"
    assert describe_unknown_files(others[:1]) == "1 other file passed over: f.jpg" and describe_unknown_files([]) == ""
    assert all("deep" not in path.parts for path in find_videos(tmp_path, recursive=False)[0])
    store = VideoFolder(tmp_path)
    assert store.count("h") == store.count("h.dat") == store.count("no extension") == 3
    assert store.find("f") == tmp_path / "f.mp4", "f.jpg is no video"


def test_training_counts_the_files_that_are_no_videos(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They may be those that are missing."""
    for name in ("a.mp4", "b.dat"):
        write_video(tmp_path / "x.mp4", 3).rename(tmp_path / name)
    (tmp_path / "c.mpq").touch()
    annotation = tmp_path / "c.json"
    config = load_config(None, {"video_dir": str(tmp_path), "num_workers": 0})
    for names, left_out, told in [("ab", [], ""), ("abc", ["c"], "2 other files passed over: c.json, c.mpq")]:
        annotation.write_text(json.dumps({name: {"sentences": ["x"]} for name in names}))
        assert list(train_split(config, str(annotation)).left_out) == left_out
        assert told in caplog.text and bool(caplog.text) == bool(told)


def test_files_of_camcorders_and_the_web_are_read(tmp_path: Path) -> None:
    write_video(tmp_path / "a.m2ts", 5)
    write_video(tmp_path / "b.VOB", 5, codec="mpeg2video")
    first, *others = (Image.fromarray(coded_frame(index)) for index in range(5))
    first.save(tmp_path / "c.gif", save_all=True, append_images=others, duration=100)
    for video_id in ("a", "b", "c"):
        frames = VideoFolder(tmp_path).read(video_id, range(5))
        assert [index_of(frame) for frame in frames] == list(range(5))


# ---- which store a config means ----


def test_open_store(tmp_path: Path) -> None:
    videos = [VideoAnnotation("v", ("x",), extension="mkv"), VideoAnnotation("w", ("x",))]
    store = open_store(load_config(None, {"video_dir": str(tmp_path)}), videos)
    assert isinstance(store, VideoFolder) and store.extensions == {"v": "mkv"}
    assert isinstance(open_store(load_config(None, {"frames_dir": str(tmp_path)}), videos), FrameFolder)
    for key, value in [("frames_dir", str(tmp_path / "absent")), ("frames_dir", "x" * 257), ("video_dir", "x" * 257)]:
        with pytest.raises(UserError, match=rf"{key}: .*{value[-10:]}"):
            open_store(load_config(None, {key: value}), videos)
    with pytest.raises(UserError, match=r"frames_dir .* or video_dir"):
        open_store(load_config(None), videos)

"""The two frame stores: what they find, what they refuse, and that workers can have them."""

import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from media import index_of, write_frames, write_video
from PIL import Image

from adaclip_finetune.config import load_config
from adaclip_finetune.data.annotations import VideoAnnotation
from adaclip_finetune.data.frame_folder import FrameFolder
from adaclip_finetune.data.frame_store import FrameError, FrameStore
from adaclip_finetune.data.frames import open_store
from adaclip_finetune.data.packed_frames import PackedFrames
from adaclip_finetune.data.packing import pack
from adaclip_finetune.data.readable import find_errors
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.errors import UserError

TEMPLATE = "image_{:05d}.jpg"


def folder_store(tmp_path: Path, kept: bool = False) -> FrameFolder:
    """`kept`: of the frames that are there."""
    if not kept:
        write_frames(tmp_path / "a.1", 7)
    return FrameFolder(tmp_path, TEMPLATE)


def video_store(tmp_path: Path) -> VideoFolder:
    write_video(tmp_path / "a.1.mp4", 7)
    return VideoFolder(tmp_path)


def pack_store(tmp_path: Path, kept: bool = False) -> PackedFrames:
    folder_store(tmp_path, kept)
    assert pack(tmp_path, tmp_path / "p.lmdb", [], TEMPLATE, overwrite=False) == 0
    return PackedFrames(tmp_path / "p.lmdb")


@pytest.mark.parametrize("make", [folder_store, video_store])
def test_counts_and_reads_in_any_order(tmp_path: Path, make: object) -> None:
    store: FrameStore = make(tmp_path)  # type: ignore[operator]
    assert store.count("a.1") == 7
    for indices in ([0, 2, 6], [6, 0, 6, 3], [4]):
        frames = store.read("a.1", indices)
        assert frames.shape == (len(indices), 66, 130, 3) and frames.dtype == np.uint8
        assert [index_of(frame) for frame in frames] == indices


@pytest.mark.parametrize("make", [folder_store, video_store])
def test_a_store_travels_with_what_it_knows(tmp_path: Path, make: object) -> None:
    store: FrameStore = make(tmp_path)  # type: ignore[operator]
    store.count("a.1")
    copy: FrameStore = pickle.loads(pickle.dumps(store))
    assert copy.count("a.1") == 7
    assert np.array_equal(copy.read("a.1", [3, 5]), store.read("a.1", [3, 5]))


def test_errors_travel_too() -> None:
    error = pickle.loads(pickle.dumps(FrameError("v", Path("/x/v.mp4"), "broken", "damaged")))
    assert (error.video_id, error.path, error.reason, error.kind, str(error)) == (
        "v", Path("/x/v.mp4"), "broken", "damaged", "v: /x/v.mp4: broken",
    )  # fmt: skip
    assert FrameError("v", "x", "broken").kind == "unreadable"


@pytest.mark.parametrize("make", [folder_store, video_store, pack_store])
def test_a_scan_gives_every_frame_once_and_can_be_stopped(tmp_path: Path, make: object) -> None:
    store: FrameStore = make(tmp_path)  # type: ignore[operator]
    found = list(store.scan("a.1"))
    assert [index for index, _ in found] == list(range(7))
    assert np.array_equal(np.stack([frame for _, frame in found]), store.read("a.1", range(7)))
    seen: list[int] = []
    for index, _ in store.scan("a.1", stopped=lambda: len(seen) >= 2):
        seen.append(index)
    assert seen[:2] == [0, 1] and len(seen) < 7
    with pytest.raises(FrameError) as caught:
        next(iter(store.scan("nowhere")))
    assert caught.value.kind == "missing"


@pytest.mark.parametrize("make", [folder_store, pack_store])
def test_a_scan_ends_at_an_image_that_cannot_be_read(tmp_path: Path, make: object) -> None:
    path = write_frames(tmp_path / "a.1", 7) / TEMPLATE.format(4)
    image = path.read_bytes()
    path.write_bytes(image[: len(image) // 2])
    store: FrameStore = make(tmp_path, kept=True)  # type: ignore[operator]
    seen: list[int] = []
    with pytest.raises(FrameError, match=r"image_00004\.jpg.* cannot be decoded") as caught:
        seen.extend(index for index, _ in store.scan("a.1"))
    assert seen == [0, 1, 2] and caught.value.kind == "damaged"


def test_a_scan_gives_frames_of_any_size(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6)).save(write_frames(tmp_path / "v", 2) / TEMPLATE.format(2))
    shapes = [frame.shape for _, frame in FrameFolder(tmp_path, TEMPLATE).scan("v")]
    assert shapes == [(66, 130, 3), (6, 8, 3)]


def test_kinds_of_errors(tmp_path: Path) -> None:
    """Words of the path, which belongs to the user, do not matter."""
    folder = tmp_path / "cannot be decoded, though it is missing"
    (write_frames(folder / "gap", 3) / TEMPLATE.format(2)).unlink()
    (folder / "empty").mkdir()
    first = write_frames(folder / "dangling", 2) / TEMPLATE.format(1)
    first.unlink()
    first.symlink_to("nowhere")
    (write_frames(folder / "noise", 2) / TEMPLATE.format(1)).write_bytes(b"x" * 100)
    Image.new("RGB", (8, 6)).save(write_frames(folder / "sizes", 2) / TEMPLATE.format(2))
    store = FrameFolder(folder, TEMPLATE)
    expected = {
        "gone": "missing", "gap": "gap", "empty": "unreadable", "dangling": "unreadable", "noise": "damaged",
        "sizes": "sizes",
    }  # fmt: skip
    for video_id, kind in expected.items():
        with pytest.raises(FrameError) as caught:
            store.read(video_id, range(store.count(video_id)))
        assert caught.value.kind == kind, video_id
    errors = find_errors(store, ["gone", "gap", "sizes"], 2)
    assert {video_id: error.kind for video_id, error in errors.items()} == {"gone": "missing", "gap": "gap"}


def test_kinds_of_errors_of_videos(tmp_path: Path) -> None:
    content = bytearray(write_video(tmp_path / "hurt.avi", 60).read_bytes())
    content[len(content) // 2 : len(content) // 2 + 1500] = bytes(1500)
    (tmp_path / "hurt.avi").write_bytes(content)
    write_video(tmp_path / "two.mp4", 2)
    write_video(tmp_path / "two.mkv", 2)
    (tmp_path / "empty.mp4").write_bytes(b"")
    store = VideoFolder(tmp_path)
    for video_id, kind in {"hurt": "damaged", "two": "unreadable", "empty": "unreadable", "a/b": "missing"}.items():
        with pytest.raises(FrameError) as caught:
            store.count(video_id)
        assert caught.value.kind == kind, video_id


def test_only_files_of_the_template_count(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "v", 3)
    for other in (".DS_Store", "image_4.jpg", "image_00004.png", "ximage_00004.jpg", "image_00004.jpg.part"):
        (folder / other).write_bytes(b"x")
    assert FrameFolder(tmp_path, TEMPLATE).count("v") == 3


def test_other_templates(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "v", 3, suffix="png")
    for i, path in enumerate(sorted(folder.iterdir()), start=1):
        path.rename(folder / f"{i}+frame.png")
    store = FrameFolder(tmp_path, "{}+frame.png")
    assert store.count("v") == 3 and index_of(store.read("v", [2])[0]) == 2


@pytest.mark.parametrize("missing", [1, 2])
def test_gap_in_the_numbering(tmp_path: Path, missing: int) -> None:
    (write_frames(tmp_path / "v", 4) / TEMPLATE.format(missing)).unlink()
    with pytest.raises(FrameError, match=f"image_0000{missing}.jpg is missing, though image_00004.jpg is there"):
        FrameFolder(tmp_path, TEMPLATE).count("v")


def test_numbers_that_are_times(tmp_path: Path) -> None:
    """Nobody counts up to them."""
    folder = write_frames(tmp_path / "v", 2)
    (folder / "image_1700000000.jpg").write_bytes(b"")
    tracemalloc.start()
    with pytest.raises(FrameError, match=r"image_00003\.jpg is missing, though image_1700000000\.jpg is there"):
        FrameFolder(tmp_path, TEMPLATE).count("v")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_numbers_begin_at_one(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "v", 2)
    (folder / TEMPLATE.format(2)).rename(folder / TEMPLATE.format(0))
    with pytest.raises(FrameError, match=r"image_00000\.jpg is there, but images are numbered from 1"):
        FrameFolder(tmp_path, TEMPLATE).count("v")


def test_a_link_in_a_circle_spoils_one_video(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 3)
    (tmp_path / "x.mp4").symlink_to("x.mp4")
    store = VideoFolder(tmp_path)
    assert store.count("a") == 3
    with pytest.raises(FrameError, match=r"x\.mp4: Too many levels of symbolic links"):
        store.count("x")


def test_absent_and_empty_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    store = FrameFolder(tmp_path, TEMPLATE)
    for video_id, reason in [
        ("absent", "No such file"),
        ("empty", "no file named like image_00001.jpg"),
        ("file", "Not a"),
    ]:
        with pytest.raises(FrameError, match=reason):
            store.count(video_id)
    with pytest.raises(FrameError, match="too long"):
        store.count("x" * 300)


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise"])
def test_fault_a_corrupt_jpeg_is_named_and_never_replaced(tmp_path: Path, damage: str) -> None:
    path = write_frames(tmp_path / "v", 4) / TEMPLATE.format(3)
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "noise": b"\x00" * 500}[damage])
    store = FrameFolder(tmp_path, TEMPLATE)
    assert [index_of(frame) for frame in store.read("v", [0, 1, 3])] == [0, 1, 3]
    with pytest.raises(FrameError, match=r"v: .*image_00003\.jpg: cannot be decoded") as caught:
        store.read("v", [0, 1, 2, 3])
    assert caught.value.path == path


def test_grey_and_palette_images_become_rgb(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    Image.new("L", (8, 6), 77).save(tmp_path / "v" / TEMPLATE.format(1))
    assert (FrameFolder(tmp_path, TEMPLATE).read("v", [0]) == 77).all()


def test_sizes_that_differ(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "v", 2)
    Image.new("RGB", (8, 6)).save(folder / TEMPLATE.format(2))
    with pytest.raises(FrameError, match="frames differ in size"):
        FrameFolder(tmp_path, TEMPLATE).read("v", [0, 1])


def test_videos_are_found_by_their_whole_name(tmp_path: Path) -> None:
    for name in ("x.1.MP4", "x.10.mkv", "x.mp4", "deep/er.WebM"):
        write_video(tmp_path / "v.mp4", 2).rename(tmp_path / name) if "/" not in name else None
    (tmp_path / "deep").mkdir()
    write_video(tmp_path / "v.mp4", 2).rename(tmp_path / "deep" / "er.mp4")
    (tmp_path / "folder.mp4").mkdir()
    store = VideoFolder(tmp_path)
    for video_id, name in [("x.1", "x.1.MP4"), ("x.10", "x.10.mkv"), ("x", "x.mp4"), ("deep/er", "deep/er.mp4")]:
        assert store.find(video_id) == tmp_path / name
    for absent in ("x.100", "x.", "X", "folder", "x.mp4", "nowhere/x"):
        with pytest.raises(FrameError):
            store.find(absent)


def test_extension_decides_between_two_files(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", 2)
    write_video(tmp_path / "v.mkv", 3)
    with pytest.raises(FrameError, match=r'v\.mkv and v\.mp4 are there: say which by "extension"'):
        VideoFolder(tmp_path).count("v")
    assert VideoFolder(tmp_path, {"v": "mkv"}).count("v") == 3
    with pytest.raises(FrameError, match=r"there is no file v\.webm"):
        VideoFolder(tmp_path, {"v": "webm"}).count("v")


def test_a_broken_video_is_named(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"")
    with pytest.raises(FrameError, match=r"v: .*v\.mp4: the file is empty") as caught:
        VideoFolder(tmp_path).count("v")
    assert caught.value.video_id == "v"


def test_open_store(tmp_path: Path) -> None:
    videos = [VideoAnnotation("v", ("x",), extension="mkv"), VideoAnnotation("w", ("x",))]
    store = open_store(load_config(None, {"video_dir": str(tmp_path)}), videos)
    assert isinstance(store, VideoFolder) and store.extensions == {"v": "mkv"}
    assert isinstance(open_store(load_config(None, {"frames_dir": str(tmp_path)}), videos), FrameFolder)
    with pytest.raises(UserError, match=r"frames_dir: .*absent is not a folder"):
        open_store(load_config(None, {"frames_dir": str(tmp_path / "absent")}), videos)
    for key in ("frames_dir", "video_dir"):
        with pytest.raises(UserError, match=rf"{key}: x+: File name too long"):
            open_store(load_config(None, {key: "x" * 257}), videos)
    with pytest.raises(UserError, match=r"frames_dir .* or video_dir"):
        open_store(load_config(None), videos)


def test_real_frames(shared: Path) -> None:
    store = FrameFolder(shared / "data/msrvtt_frames/frames", TEMPLATE)
    for video_id in sorted(path.name for path in store.folder.iterdir())[:5]:
        frames = store.read(video_id, range(store.count(video_id)))
        assert frames.shape[1:] == (240, 320, 3) and len(frames) >= 4

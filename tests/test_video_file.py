"""Reading videos in place: the n-th frame is the n-th that is shown, and only the file itself is opened."""

import subprocess
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
from media import index_of, write_video

from adaclip_finetune.data.sampling import frame_indices
from adaclip_finetune.data.video_file import BrokenVideo, index_video, read_frames


def decode_everything(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def ffmpeg(*arguments: object) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


ENCODINGS = {
    "b-frames.mp4": ("libx264", {}),
    "open-gop.mp4": ("libx264", {"x264-params": "open-gop=1:b-pyramid=2"}),
    "intra-refresh.mp4": ("libx264", {"x264-params": "intra-refresh=1"}),
    "no-b.mkv": ("libx264", {"bf": "0"}),
    "b-frames.mkv": ("libx264", {}),
    "b-frames.ts": ("libx264", {}),
    "b-frames.avi": ("libx264", {}),
    "b-frames.flv": ("libx264", {}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=error"}),
    "vp9.webm": ("libvpx-vp9", {"lag-in-frames": "16", "auto-alt-ref": "1", "cpu-used": "8"}),
    "vp8.webm": ("libvpx", {"lag-in-frames": "16", "auto-alt-ref": "1", "cpu-used": "8"}),
    "mpeg4.avi": ("mpeg4", {"bf": "2"}),
    "mpeg2.mpg": ("mpeg2video", {"bf": "2"}),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_frames_equal_a_full_decode(tmp_path: Path, name: str) -> None:
    codec, options = ENCODINGS[name]
    path = write_video(tmp_path / name, 40, codec, **options)
    everything = decode_everything(path)
    index = index_video(path)
    assert index.num_frames == len(everything) == 40
    for wanted in ([0], [39], [13, 12, 11, 13], list(range(40)), frame_indices(40, 6).tolist()):
        frames = read_frames(path, index, wanted)
        assert np.array_equal(frames, everything[wanted])
        assert [index_of(frame) for frame in frames] == wanted


def test_same_pixels_as_the_ffmpeg_program(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 30)
    raw = ffmpeg("-i", path, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    oracle = np.frombuffer(raw, np.uint8).reshape(30, 66, 130, 3)
    assert np.array_equal(read_frames(path, index_video(path), range(30)), oracle)


def test_edit_list_and_variable_rate_follow_ffmpeg(tmp_path: Path) -> None:
    source = write_video(tmp_path / "a.mp4", 60)
    ffmpeg("-ss", "0.7", "-i", source, "-t", "1", "-c", "copy", tmp_path / "cut.mp4")
    ffmpeg(
        "-i", source, "-vf", "select=not(mod(n\\,3))+gt(n\\,40)", "-fps_mode", "vfr", "-bf", "2", tmp_path / "vfr.mp4"
    )
    for name in ("cut.mp4", "vfr.mp4"):
        path = tmp_path / name
        raw = ffmpeg("-i", path, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
        oracle = np.frombuffer(raw, np.uint8).reshape(-1, 66, 130, 3)
        index = index_video(path)
        assert index.num_frames == len(oracle) < 60
        assert np.array_equal(read_frames(path, index, range(len(oracle))), oracle)


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (-90, 3)])
def test_rotation_metadata(tmp_path: Path, degrees: int, turns: int) -> None:
    plain = write_video(tmp_path / "plain.mp4", 3)
    turned = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", degrees, "-i", plain, "-c", "copy", turned)
    upright = np.rot90(read_frames(plain, index_video(plain), [1])[0], turns)
    assert np.array_equal(read_frames(turned, index_video(turned), [1])[0], upright)


def test_broken_tail_gives_what_can_be_read(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mkv", 60)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    index = index_video(cut)
    assert 10 < index.num_frames < 50
    frames = read_frames(cut, index, range(index.num_frames))
    assert [index_of(frame) for frame in frames] == list(range(index.num_frames))


def test_damage_is_reported_not_painted_over(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    assert len(keys) >= 4
    content = bytearray(path.read_bytes())
    for packet in packets[keys[1] : keys[2]]:
        content[packet.pos + 60 : packet.pos + packet.size] = bytes(packet.size - 60)
    path.write_bytes(content)
    index = index_video(path)
    before, after = keys[1] - 3, keys[2]  # in other groups of pictures, which are sound
    assert [index_of(frame) for frame in read_frames(path, index, [before, after])] == [before, after]
    with pytest.raises(BrokenVideo, match=r"frame \d+ of 60 cannot be decoded: the file is damaged after \d+ sound frames \(Invalid data"):
        read_frames(path, index, [keys[1]])


@pytest.mark.parametrize(
    ("name", "content"),
    [("empty.mp4", b""), ("noise.mp4", bytes(range(256)) * 40), ("text.mkv", b"not a video"), ("cut.mp4", None)],
)
def test_what_is_no_video(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = tmp_path / name
    if content is None:  # the table of contents stands at the end of an mp4 and is lost with it
        content = write_video(tmp_path / "whole.mp4", 20).read_bytes()[:-300]
    path.write_bytes(content)
    with pytest.raises(BrokenVideo):
        index_video(path)


def test_audio_only(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", path)
    with pytest.raises(BrokenVideo, match="no video stream"):
        index_video(path)


def test_playlists_and_scripts_open_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That FFmpeg would follow such a file, were it not for the whitelist, is checked on the first."""
    canary = write_video(tmp_path / "canary.ts", 10)
    concat = f"ffconcat version 1.0\nfile {canary.name}\n"
    hls = f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.4,\n{canary.name}\n#EXT-X-ENDLIST\n"
    dash = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
        f"<Representation><BaseURL>{canary.name}</BaseURL></Representation></AdaptationSet></Period></MPD>"
    )
    script = tmp_path / "concat.mp4"
    script.write_text(concat)
    with av.open(str(script)) as unguarded:
        assert unguarded.format.name == "concat"
    monkeypatch.chdir(tmp_path)
    for text in (concat, hls, dash, f"concat:{canary}", f"file:{canary}"):
        script.write_text(text)
        with pytest.raises(BrokenVideo):
            index_video(script)


def test_protocols_in_names_are_only_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "canary.ts", 10)
    with pytest.raises(BrokenVideo, match="No such file"):
        index_video(Path("concat:canary.ts"))
    odd = write_video(tmp_path / "plain.mp4", 5).rename(tmp_path / "-a b'\"$(x)%3a?#;日.mp4")
    assert index_video(odd).num_frames == 5


def test_real_clips(shared: Path) -> None:
    for path in sorted((shared / "data/panda70m/videos").glob("*.mp4"))[:3]:
        everything = decode_everything(path)
        index = index_video(path)
        wanted = frame_indices(len(everything), 16).tolist()
        assert index.num_frames == len(everything)
        assert np.array_equal(read_frames(path, index, wanted), everything[wanted])

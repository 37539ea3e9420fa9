"""Reading videos in place: the n-th frame is the n-th that is shown, and only the file itself is opened."""

import subprocess
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
from media import index_of, write_video
from PIL import Image

from adaclip_finetune.data.sampling import frame_indices
from adaclip_finetune.data.video.container import BrokenVideo
from adaclip_finetune.data.video.file import read_frames, scan_frames
from adaclip_finetune.data.video.index import index_video


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


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (-90, 3)])
def test_rotation_metadata(tmp_path: Path, degrees: int, turns: int) -> None:
    plain = write_video(tmp_path / "plain.mp4", 3)
    turned = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", degrees, "-i", plain, "-c", "copy", turned)
    upright = np.rot90(read_frames(plain, index_video(plain), [1])[0], turns)
    assert np.array_equal(read_frames(turned, index_video(turned), [1])[0], upright)


def test_damage_is_reported_not_painted_over(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    assert len(keys) >= 4
    damage(path, packets[keys[1] : keys[2]])
    index = index_video(path)
    before, after = keys[1] - 3, keys[2]  # in other groups of pictures, which are sound
    assert [index_of(frame) for frame in read_frames(path, index, [before, after])] == [before, after]
    reason = rf"frame {keys[1] + 1} of 60 cannot be decoded: the file is damaged after {keys[1]} sound frames \(Invalid"
    for wanted in ([keys[1]], list(range(60))):
        with pytest.raises(BrokenVideo, match=reason):
            read_frames(path, index, wanted)
    given: list[int] = []
    with pytest.raises(BrokenVideo, match=reason) as caught:
        given.extend(i for i, _ in scan_frames(path, index))
    assert given == list(range(keys[1])) and caught.value.kind == "damaged"


def test_damage_behind_the_first_frame_is_no_cut(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 30)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    damage(path, packets[1:2])
    with pytest.raises(BrokenVideo, match=r"the file is damaged after \d sound frames"):
        index = index_video(path)
        read_frames(path, index, range(30))


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "cut.avi"])
def test_a_scan_is_one_pass_that_can_be_stopped(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding anew for every frame, or going on to the end after a stop, would show in the packets that are asked
    for. The tail of the cut file is broken, where frames that a decoder held back cost a second pass."""
    path = write_video(tmp_path / name, 60, "mpeg4" if name.endswith("avi") else "libx264", bf="0")
    if name == "cut.avi":
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    index = index_video(path)
    asked: list[int] = []

    def stopped() -> bool:
        asked.append(1)
        return len(asked) > limit

    limit = 10**6
    assert len(list(scan_frames(path, index, stopped))) == index.num_frames > 8
    packets, once = len(asked), index.num_frames + 2
    assert packets <= 2 * once if name == "cut.avi" else packets <= once
    for limit in (0, 5, packets - 2):
        asked.clear()
        assert len(list(scan_frames(path, index, stopped))) <= limit
        assert len(asked) <= limit + 2


@pytest.mark.parametrize(("codec", "name"), [("libx264", "a.ts"), ("mpeg2video", "a.mpg"), ("mpeg4", "a.avi")])
def test_damage_where_packets_tell_no_frames(tmp_path: Path, codec: str, name: str) -> None:
    """There, frames are counted by decoding: what is behind the damage cannot be numbered."""
    path = write_video(tmp_path / name, 60, codec)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 1500] = bytes(1500)
    path.write_bytes(content)
    with pytest.raises(BrokenVideo, match=r"^the file is damaged after (\d+) sound frames \(Invalid data") as caught:
        index_video(path)
    assert 0 < int(str(caught.value).split()[5]) < 45


def damage(path: Path, packets: list[av.Packet]) -> None:
    """Of each packet, leave only the beginning."""
    content = bytearray(path.read_bytes())
    for packet in packets:
        assert packet.pos is not None
        content[packet.pos + 60 : packet.pos + packet.size] = bytes(packet.size - 60)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content"),
    [("empty.mp4", b""), ("noise.mp4", bytes(range(256)) * 40), ("text.mkv", b"not a video"), ("cut.mp4", None)],
)
def test_what_is_no_video(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = tmp_path / name
    if content is None:  # the table of contents stands at the end of an mp4 and is lost with it
        content = write_video(tmp_path / "whole.mp4", 20).read_bytes()[:-300]
    path.write_bytes(content)
    cut_off = r"it is no video of a known kind, or was cut off \((Invalid data found .*|End of file)\)"
    with pytest.raises(BrokenVideo, match=f"^{cut_off if content else 'the file is empty'}$"):
        index_video(path)


def test_audio_only(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", path)
    with pytest.raises(BrokenVideo, match="no video stream"):
        index_video(path)


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "cover.png")
    path = tmp_path / "song.mp4"
    streams = "-map 0 -map 1 -c:v copy -disposition:v:0 attached_pic"
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", "-i", tmp_path / "cover.png", *streams.split(), path)
    with pytest.raises(BrokenVideo, match="only a cover picture"):
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

"""Opening videos, sound and broken ones, leaves nothing behind. A minute: `pytest -m slow -n 0 -s` this file."""

from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from media import write_video

from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.readable import find_unreadable
from adaclip_finetune.data.video.folder import VideoFolder

OPENS = 10_000
CODECS = {"a.mp4": "libx264", "b.mkv": "libx264", "c.ts": "libx264", "d.mp4": "libx265", "e.webm": "libvpx-vp9"}
CODECS |= {"f.mpg": "mpeg2video", "g.avi": "mpeg4", "h.wmv": "wmv2"}


@pytest.mark.slow
@pytest.mark.parametrize("forgets", [False, True])
def test_ten_thousand_opens_leave_nothing_behind(
    tmp_path: Path, forgets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resident memory and open files after a tenth of the opens and after all; with videos scanned anew or not."""
    videos = tmp_path / "videos"
    for name, codec in CODECS.items():
        options = {"bf": "0"} if codec == "wmv2" else {}
        content = write_video(videos / name, 20, codec, height=34, width=66, **options).read_bytes()
        middle = len(content) // 2
        (videos / f"cut_{name}").write_bytes(content[: len(content) * 2 // 3])
        (videos / f"damaged_{name}").write_bytes(content[:middle] + bytes(300) + content[middle + 300 :])
    (videos / "text.mkv").write_text("not a video")
    if forgets:
        (tmp_path / "no_folder").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no_folder"))
    process = psutil.Process()
    opens, early = 0, None
    while opens < OPENS:
        for path in videos.iterdir():
            store = VideoFolder(videos)
            opens += 2
            with suppress(FrameError):
                find_unreadable(store, [path.stem], 2)
                store.read(path.stem, [0, store.count(path.stem) // 2])
        if early is None and opens > OPENS // 10:
            early = process.memory_info().rss, process.num_fds()
    assert early is not None
    grown, left_open = process.memory_info().rss - early[0], process.num_fds() - early[1]
    print(f"{opens} opens: {early[0] / 2**20:.1f} MB, {grown / 2**20:+.1f} MB; files left open: {left_open}")
    # A kept frame, or a buffer that PyAV does not free where a demuxer is left early, would add far more.
    assert grown < 2**23 and left_open == 0

"""Worker processes and broken videos change neither the content nor the order of batches."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import COUNTS, as_lists, make_gallery_loader, make_train_loader, write_store
from media import write_video

from adaclip_finetune.data.video.folder import VideoFolder


def test_batches_do_not_depend_on_workers(tmp_path: Path) -> None:
    store = write_store(tmp_path)
    plain = make_train_loader(store)
    by_epoch = [as_lists(plain.epoch(epoch, batch_size=2)) for epoch in range(3)]
    for num_workers in (1, 2):
        loader = make_train_loader(store, num_workers=num_workers)
        for epoch in (2, 0, 0, 1):  # any order, the same workers all the time
            assert as_lists(loader.epoch(epoch, batch_size=2)) == by_epoch[epoch]
        next(loader.epoch(0, batch_size=2))  # abandoned with batches on their way
        assert as_lists(loader.epoch(2, batch_size=2)) == by_epoch[2]
        loader.close()


def test_videos_in_worker_processes(tmp_path: Path) -> None:
    """Forked ones, and spawned ones, which get the dataset by pickle."""
    for video_id, count in COUNTS.items():
        write_video(tmp_path / f"{video_id}.mp4", count)
    store = VideoFolder(tmp_path)
    plain, forked = make_train_loader(store), make_train_loader(store, num_workers=1)
    assert as_lists(forked.epoch(0, batch_size=3)) == as_lists(plain.epoch(0, batch_size=3))
    item, copied = plain.dataset[0, 2], pickle.loads(pickle.dumps(plain.dataset))[0, 2]
    assert np.array_equal(item.frames, copied.frames) and item.text == copied.text  # type: ignore[union-attr]
    forked.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_corrupt_image_costs_its_video_alone(tmp_path: Path, num_workers: int) -> None:
    """The video is left out by name; every other row is what it would have been."""
    whole_store, store = write_store(tmp_path / "whole"), write_store(tmp_path / "broken")
    image = tmp_path / "broken/c/image_00001.jpg"
    image.write_bytes(image.read_bytes()[:500])
    sound = make_train_loader(whole_store, sampling="uniform")
    broken = make_train_loader(store, sampling="uniform", num_workers=num_workers)
    for whole, rest in zip(sound.epoch(0, 3), broken.epoch(0, 3), strict=True):
        kept = [row for row, video_id in enumerate(whole.videos.video_ids) if video_id != "c"]
        assert rest.videos.video_ids == [whole.videos.video_ids[row] for row in kept]
        assert torch.equal(rest.videos.frames, whole.videos.frames[kept])
        assert torch.equal(rest.token_ids, whole.token_ids[kept])
        assert torch.equal(rest.noise, whole.noise[kept])
    assert list(broken.failed) == ["c"] and "image_00001.jpg" in broken.failed["c"]
    broken.close()
    gallery = make_gallery_loader(store, num_workers=num_workers)
    found = [
        (batch.videos.video_ids if batch.videos else [], [error.video_id for error in batch.failures])
        for batch in gallery.read(range(3))
    ]
    assert found == [(["a", "b"], []), (["d"], ["c"]), (["e"], [])]
    gallery.close()

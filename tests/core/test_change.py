"""The tower `change`: the mean of the frames, and what of the order of frames its vector knows."""

import pytest
import torch
import torch.nn.functional as F
from conftest import build_tiny_clip
from tiny import VOCABULARY, build_retriever, random_videos
from torch import Tensor

from adaclip_finetune.data.dataset import VideoBatch
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.model.towers.change import cosines


def retriever(frequencies: int = 1, trained: bool = True) -> VideoRetriever:
    tower = {"method": "change", "config": {"frequencies": frequencies}}
    model = build_retriever(build_tiny_clip(vocabulary=VOCABULARY), tower=tower, use_policy=False).double().eval()
    if trained:
        torch.nn.init.normal_(model.tower.get_parameter("maps"))
    return model


def vectors(model: VideoRetriever, videos: VideoBatch) -> Tensor:
    with torch.no_grad():
        tokens: Tensor = model.encode_video(videos).tokens
    return tokens[:, 0]


def backwards(videos: VideoBatch) -> VideoBatch:
    return videos._mapped(lambda tensor: tensor.flip(1))


def test_untrained_it_is_the_mean_of_the_frames_and_trained_the_order_changes_its_sign() -> None:
    model, videos = retriever(trained=False), random_videos()
    frames = build_retriever(build_tiny_clip(vocabulary=VOCABULARY), use_policy=False).double().eval()
    frames.clip.load_state_dict(model.clip.state_dict())
    with torch.no_grad():
        mean = F.normalize(frames.encode_video(videos).tokens, dim=-1).mean(dim=1)
    torch.testing.assert_close(vectors(model, videos), mean)
    torch.nn.init.normal_(model.tower.get_parameter("maps"))
    change = vectors(model, videos) - mean
    assert change.norm(dim=1).min() > 0.01
    torch.testing.assert_close(vectors(model, backwards(videos)) - mean, -change)


@pytest.mark.parametrize("places", [[0, 1, 2, 3], [0, 2, 3, 5], [1, 2, 4, 5]])
def test_missing_frames_leave_no_gap(places: list[int]) -> None:
    model, videos = retriever(frequencies=2), random_videos(1)
    videos.frame_mask[:] = False
    videos.frame_mask[:, places] = True
    there = videos._mapped(lambda tensor: tensor[:, places])
    torch.testing.assert_close(vectors(model, videos), vectors(model, there))


def test_waves_fall_from_first_to_last_and_a_still_has_none() -> None:
    mask = torch.tensor([[True, True, False, True, True], [False, False, True, False, False]])
    waves = cosines(mask, 3)
    assert waves[0, 0, [0, 1, 3, 4]].diff().max() < 0 and waves[0, :, 2].eq(0).all()
    torch.testing.assert_close(waves.sum(dim=2), torch.zeros(2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(waves[0] @ waves[0].T, torch.eye(3) * 2, atol=1e-6, rtol=0)
    assert waves[1].eq(0).all()

"""Preprocessing equals that of open_clip and torchvision."""

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from torchvision import transforms as T

from adaclip_finetune.data.preprocess import IMAGENET, ImageSpec, normalise, to_square

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(240, 320), (321, 239), (33, 500), (501, 57), (224, 398), (398, 224), (64, 64), (65, 64), (7, 5), (225, 225)]


def random_frames(height: int, width: int, n: int = 2) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_same_pixels_as_open_clip(height: int, width: int, size: int, resize_mode: str) -> None:
    frames = random_frames(height, width)
    spec = ImageSpec(size, MEAN, STD, resize_mode=resize_mode)
    ours = normalise(torch.from_numpy(to_square(frames, spec)), spec.mean, spec.std)
    oracle = image_transform(size, is_train=False, mean=MEAN, std=STD, resize_mode=resize_mode)
    theirs = torch.stack([oracle(Image.fromarray(frame)) for frame in frames])
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().max() < 1e-6


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_cnn_policy_is_256_then_224(height: int, width: int) -> None:
    frames = random_frames(height, width, n=1)
    resize = T.Resize(256, T.InterpolationMode.BICUBIC)
    oracle = T.Compose([resize, T.CenterCrop(224), T.ToTensor(), T.Normalize(IMAGENET.mean, IMAGENET.std)])
    ours = normalise(torch.from_numpy(to_square(frames, IMAGENET)), IMAGENET.mean, IMAGENET.std)
    assert (ours[0] - oracle(Image.fromarray(frames[0]))).abs().max() < 1e-6


def test_bilinear_towers() -> None:
    frames = random_frames(100, 75)
    spec = ImageSpec(48, (0.5,) * 3, (0.5,) * 3, interpolation="bilinear", resize_mode="squash")
    oracle = image_transform(
        48, is_train=False, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", resize_mode="squash"
    )
    ours = normalise(torch.from_numpy(to_square(frames, spec)), spec.mean, spec.std)
    assert (ours[1] - oracle(Image.fromarray(frames[1]))).abs().max() < 1e-6


def test_grey_thumbnails() -> None:
    frames = random_frames(90, 160)
    thumbnails = to_square(frames, ImageSpec(56, (0.0,), (1.0,), resize_mode="squash", grey=True))
    assert thumbnails.shape == (2, 1, 56, 56) and thumbnails.dtype == np.uint8
    oracle = T.Compose([T.Resize((56, 56), T.InterpolationMode.BICUBIC), T.Grayscale()])
    assert np.array_equal(thumbnails[0, 0], np.asarray(oracle(Image.fromarray(frames[0]))))


def test_frames_of_several_sizes_are_prepared_one_by_one() -> None:
    frames = [random_frames(height, width, n=1)[0] for height, width in SIZES]
    spec = ImageSpec(32, MEAN, STD)
    expected = np.concatenate([to_square(frame[None], spec) for frame in frames])
    assert np.array_equal(to_square(frames, spec), expected)


def test_unknown_preprocessing_is_refused() -> None:
    with pytest.raises(ValueError, match="longest"):
        ImageSpec(224, MEAN, STD, resize_mode="longest")

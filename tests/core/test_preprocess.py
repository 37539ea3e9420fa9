"""Preprocessing equals that of open_clip and torchvision, but for the rounding of a few pixels that are cropped."""

import numpy as np
import pytest
import torch
from golden import load_golden
from open_clip.transform import image_transform
from PIL import Image
from torchvision import transforms as T

from adaclip_finetune.data.preprocess import (
    IMAGENET,
    CropFlip,
    ImageSpec,
    draw_crop_flip,
    normalise,
    to_square,
    to_squares,
)

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(240, 320), (321, 239), (33, 500), (501, 57), (224, 398), (398, 224), (64, 64), (65, 64), (7, 5), (225, 225)]


def random_frames(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (2, height, width, 3), dtype=np.uint8)


def assert_same_pixels(ours: torch.Tensor, theirs: torch.Tensor, std: tuple[float, ...], size: tuple[int, int]) -> None:
    """Assert that images (…, 3, S, S) are the same; of wide frames, of `size`, few values may be rounded otherwise."""
    height, width = size
    steps = (ours - theirs).abs() * torch.tensor(std)[:, None, None] * 255
    if width <= height:
        assert steps.max() < 1e-4, size
    else:
        most = 1 if height >= ours.shape[-1] else 2  # enlarging enlarges what was rounded
        assert steps.max() < most + 0.01 and (steps > 1e-4).float().mean() < 1e-3, size


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize(("mode", "filter"), [("shortest", "bicubic"), ("squash", "bicubic"), ("squash", "bilinear")])
def test_same_pixels_as_open_clip(size: int, mode: str, filter: str) -> None:
    spec = ImageSpec(size, MEAN, STD, interpolation=filter, resize_mode=mode)
    oracle = image_transform(size, is_train=False, mean=MEAN, std=STD, interpolation=filter, resize_mode=mode)
    for height, width in SIZES:
        frames = random_frames(height, width)
        ours = normalise(torch.from_numpy(to_square(frames, spec)), spec.mean, spec.std)
        theirs = torch.stack([oracle(Image.fromarray(frame)) for frame in frames])
        assert ours.dtype == torch.float32
        assert_same_pixels(ours, theirs, STD, (height, width) if mode == "shortest" else (1, 1))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_cnn_policy_is_256_then_224(height: int, width: int) -> None:
    frames = random_frames(height, width)[:1]
    resize = T.Resize(256, T.InterpolationMode.BICUBIC)
    oracle = T.Compose([resize, T.CenterCrop(224), T.ToTensor(), T.Normalize(IMAGENET.mean, IMAGENET.std)])
    ours = normalise(torch.from_numpy(to_square(frames, IMAGENET)), IMAGENET.mean, IMAGENET.std)
    assert_same_pixels(ours[0], oracle(Image.fromarray(frames[0])), IMAGENET.std, (height, width))


def test_grey_thumbnails() -> None:
    frames = random_frames(90, 160)
    thumbnails = to_square(frames, ImageSpec(56, (0.0,), (1.0,), resize_mode="squash", grey=True))
    assert thumbnails.shape == (2, 1, 56, 56) and thumbnails.dtype == np.uint8
    oracle = T.Compose([T.Resize((56, 56), T.InterpolationMode.BICUBIC), T.Grayscale()])
    assert np.array_equal(thumbnails[0, 0], np.asarray(oracle(Image.fromarray(frames[0]))))


def test_several_views_of_frames_are_those_of_each_alone() -> None:
    frames, specs = random_frames(90, 160), [ImageSpec(32, MEAN, STD), ImageSpec(24, MEAN, STD, grey=True)]
    for part in (None, CropFlip(0.1, 0.2, 0.5, 0.5, True, "bilinear")):
        found = to_squares(frames, specs, part)
        assert [view.shape for view in found] == [(2, 3, 32, 32), (2, 1, 24, 24)]
        assert all(np.array_equal(view, to_square(frames, spec, part)) for view, spec in zip(found, specs, strict=True))


def test_frames_of_several_sizes_are_prepared_one_by_one() -> None:
    frames = [random_frames(height, width)[0] for height, width in SIZES]
    spec = ImageSpec(32, MEAN, STD)
    assert np.array_equal(to_square(frames, spec), np.concatenate([to_square(frame[None], spec) for frame in frames]))


def test_stretched_frames_are_those_of_clip_vip_but_for_rounding() -> None:
    """Its torchvision resizes floating point numbers; ours stay whole, so that a pixel differs by a step of 255."""
    for case in load_golden("op_clip_vip_pixels").values():
        found = to_square([case["frame"].numpy()], ImageSpec(56, MEAN, STD, resize_mode="squash"))
        apart = normalise(torch.from_numpy(found), MEAN, STD)[0] - case["pixels"]
        assert float((apart * torch.tensor(STD)[:, None, None]).abs().max()) < 1.1 / 255


def test_a_part_of_frames_is_stretched_and_mirrored_as_torchvision_does() -> None:
    frames, spec = random_frames(90, 160), ImageSpec(32, MEAN, STD)
    for mirrored, name in ((False, "bilinear"), (True, "bicubic")):
        found = to_square(frames, spec, CropFlip(10 / 90, 20 / 160, 60 / 90, 70 / 160, mirrored, name))
        for frame, ours in zip(frames, found, strict=True):
            image = T.functional.resized_crop(
                Image.fromarray(frame), 10, 20, 60, 70, [32, 32], T.InterpolationMode(name)
            )
            theirs = np.asarray(T.functional.hflip(image) if mirrored else image)
            assert np.abs(ours.transpose(1, 2, 0).astype(int) - theirs).max() <= 1, (
                "mirrored before, not after, resizing"
            )


@pytest.mark.parametrize(("height", "width"), [(240, 320), (360, 640), (320, 240), (500, 33), (1, 1)])
def test_drawn_parts_are_like_those_of_torchvision(height: int, width: int) -> None:
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    drawn = [draw_crop_flip(height, width, random) for _ in range(400)]
    theirs = [
        T.RandomResizedCrop.get_params(torch.empty(3, height, width), [0.5, 1.0], [3 / 4, 4 / 3]) for _ in range(400)
    ]
    ours = [(part.top * height, part.left * width, part.height * height, part.width * width) for part in drawn]
    for one, other in zip(np.array(ours).T, np.array(theirs, float).T, strict=True):
        assert one.mean() == pytest.approx(other.mean(), abs=6 * other.std() / 400**0.5 + 1e-9)
    for part in drawn:
        assert part.top + part.height <= 1 + 1e-9 and part.left + part.width <= 1 + 1e-9
        size = part.cut(random_frames(height, width)[0]).shape[:2]
        assert size == (round(part.height * height), round(part.width * width))
    assert 150 < sum(part.mirrored for part in drawn) < 250
    assert 150 < sum(part.interpolation == "bicubic" for part in drawn) < 250

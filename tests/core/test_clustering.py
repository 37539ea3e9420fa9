"""The tower `clustering`: equal to the published one, and right for padded videos and any number of frames."""

import copy
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import build_tiny_clip
from golden import load_golden
from tiny import build_pe_clip, build_retriever, build_timm_clip, random_videos
from torch import Tensor, nn

from adaclip_finetune.config import load_config
from adaclip_finetune.config.choices.towers import ClusteringSettings
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.flops import count_gflops
from adaclip_finetune.model.pooling import MeanPooling
from adaclip_finetune.model.towers.cluster_ops import (
    MedoidRule,
    affinity,
    distances,
    farthest_first,
    kmedoids,
    normalised,
    spectral_embedding,
)
from adaclip_finetune.model.towers.clustering import Clustering
from adaclip_finetune.model.towers.per_frame import PerFrame
from adaclip_finetune.model.vit import vision_view

ALGORITHMS = ("kmedoids", "spectral", "pooling", "sparse_sampling", "token_shift", "temporal_shift")
REDUCING = ALGORITHMS[:4]
KINDS = [(name, "none") for name in ALGORITHMS] + [("kmedoids", "mean"), ("spectral", "mean")]
ONE_STAGE = [{"block": 1, "segments": 2, "tokens": 3}]


def settings(**given: Any) -> ClusteringSettings:
    return ClusteringSettings(**{"stages": ONE_STAGE, **given})


def tiny_tower(clip: nn.Module | None = None, **given: Any) -> Clustering:
    """Return a tower of two blocks and 2 × 2 patches in double precision."""
    torch.manual_seed(3)
    tower = Clustering(settings(**given), (clip or build_tiny_clip(vocabulary=100)).double())
    return tower.double().eval()


def pixels(videos: int = 2, frames: int = 6) -> Tensor:
    return torch.randn(videos, frames, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()


def all_real(frames: Tensor) -> Tensor:
    return torch.ones(frames.shape[:2], dtype=torch.bool)


# ---- clustering alone ----


@pytest.mark.parametrize("name", sorted(load_golden("clustering_ops")))
def test_clusters_are_the_published_ones(name: str) -> None:
    """Medoids, clusters and start agree index for index, in ties and with more medoids than tokens too."""
    case = load_golden("clustering_ops")[name]
    given, x = case["settings"], case["X"]
    distance = given.get("distance", given.get("metric"))
    rule = MedoidRule(distance, given.get("norm_p", 2.0), given["threshold"], given["iter_limit"])
    if given["function"] == "spectral":
        neighbours = torch.full((len(x),), given["knn_k"]) if given["mode"] == "KNN" else None
        graph = affinity(x, given["sigma"], neighbours, near=case.get("near"))
        torch.testing.assert_close(graph, case["W"], atol=1e-5, rtol=1e-4)
        x = spectral_embedding(graph, given["K"])
    pre_norm = given["function"] == "spectral" or bool(given.get("pre_norm"))
    medoids, clusters = kmedoids(x, given["K"], rule, pre_norm=pre_norm)
    clustered = normalised(x) if pre_norm else x
    start = farthest_first(distances(clustered, rule), x.norm(dim=-1).argmax(dim=1), given["K"])
    assert torch.equal(start, case["kkz_init"])
    assert torch.equal(medoids, case["medoids"]) and torch.equal(clusters, case["assign"])


def test_spectral_clusters_of_a_published_tower_are_the_same() -> None:
    case = load_golden("clustering_spectral")
    x, neighbours = case["tokens"], torch.full((len(case["tokens"]),), case["neighbours"])
    x = spectral_embedding(affinity(x, 2.0, neighbours), case["K"])
    medoids, clusters = kmedoids(x, case["K"], pre_norm=True)
    assert torch.equal(medoids, case["medoids"]) and torch.equal(clusters, case["assign"])


def test_the_lower_index_of_a_pair_is_its_medoid() -> None:
    """A matrix product would decide these ties by its rounding."""
    centres = 100 * torch.randn(49, 64, generator=torch.Generator().manual_seed(0))
    x = (centres[:, None] + torch.randn(49, 2, 64, generator=torch.Generator().manual_seed(1))).flatten(0, 1)
    order = torch.randperm(98, generator=torch.Generator().manual_seed(2))
    medoids, clusters = kmedoids(x[order][None], 49)
    assert torch.equal(torch.bincount(clusters[0]), torch.full((49,), 2))
    pairs = order.argsort().reshape(49, 2)
    assert torch.equal(medoids[0], pairs.amin(dim=1).sort().values)


@pytest.mark.parametrize("spectral", [False, True])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_tokens_that_are_not_valid_have_no_influence(distance: Any, spectral: bool) -> None:
    x = torch.randn(4, 20, 6, generator=torch.Generator().manual_seed(0)).double()
    valid = torch.rand(4, 20, generator=torch.Generator().manual_seed(1)) < 0.6
    x[0, ~valid[0]] = 1000
    rule = MedoidRule(distance)

    def cluster(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if spectral:
            graph = affinity(tokens, 2.0, torch.full((len(tokens),), 5), mask)
            tokens = spectral_embedding(graph, 4, mask)
        return kmedoids(tokens, 4, rule, mask, pre_norm=spectral)

    medoids, clusters = cluster(x, valid)
    for row in range(4):
        alone, members = cluster(x[row, valid[row]][None], None)
        assert torch.equal(medoids[row], valid[row].nonzero()[:, 0][alone[0]])
        assert torch.equal(clusters[row, valid[row]], members[0])


# ---- the published tower ----


@pytest.mark.parametrize("name", sorted(load_golden("clustering_module")))
def test_a_reduction_is_the_published_one_with_its_gradients(name: str) -> None:
    case = load_golden("clustering_module")[name]
    given, tokens = case["settings"], case["x"].transpose(0, 1).clone().requires_grad_()  # (B · T, L, W)
    frames = given["before_block_frames"]
    vision = {"image_size": 24, "patch_size": 8, "width": 16, "layers": 3, "head_width": 16}
    clip = open_clip.CLIP(16, vision, {"context_length": 12, "vocab_size": 40, "width": 16, "heads": 1, "layers": 1})
    stage = {
        "block": given["block_id"], "segments": given["after_block_frames"], "tokens": given["cluster_num"]
    }  # fmt: skip
    embedding = "normal" if "cluster_embed" in case else "off"
    more = {"aggregation": given.get("aggregation", "none"), "norm_p": given["norm_p"], "cluster_embedding": embedding}
    tower = Clustering(settings(stages=[stage], **more), clip)
    if embedding != "off":
        tower.load_state_dict({"embeddings.0": case["cluster_embed"]})

    state: dict[str, Any] = {"mask": torch.ones(len(tokens) // frames, frames, dtype=torch.bool)}
    state["shape"] = state["mask"].shape
    tower.enter(tokens.unflatten(0, state["shape"]), state)
    nothing: Any = lambda x, positions=None: x  # noqa: E731
    out = tower.block(given["block_id"], nothing, tokens, state).transpose(0, 1)
    out.backward(case["upstream"])
    torch.testing.assert_close(out, case["y"], atol=1e-5, rtol=1e-5)
    assert tokens.grad is not None
    torch.testing.assert_close(tokens.grad.transpose(0, 1), case["grad_x"], atol=1e-5, rtol=1e-5)
    for parameter in tower.parameters():
        torch.testing.assert_close(parameter.grad, case["grad_embed"], atol=1e-5, rtol=1e-5)


PUBLISHED = [
    (part, name) for part in ("clustering_tower", "clustering_reductions") for name in load_golden(part)["cases"]
]


@pytest.mark.parametrize(("part", "name"), PUBLISHED)
def test_the_tower_is_the_published_one_with_its_gradients(part: str, name: str) -> None:
    """The published tower ignores the mask; its pooling takes the segments whose last frame is real."""
    golden = load_golden(part)
    case = golden["cases"][name]
    vision = {"image_size": 24, "patch_size": 8, "width": 64, "layers": golden["layers"], "head_width": 16}
    text = {"context_length": 12, "vocab_size": 40, "width": 64, "heads": 2, "layers": 1}
    clip = open_clip.CLIP(24, vision, text, quick_gelu=True)
    clip.load_state_dict({**clip.state_dict(), **golden["state_dict"]})
    tower = Clustering(settings(**case["settings"]), clip).eval()
    frames = golden["pixels"].requires_grad_()
    tokens = tower(frames, all_real(frames))
    torch.testing.assert_close(tokens, case["visual_output"], atol=1e-4, rtol=1e-4)

    taken = case["video_mask_after"][..., None]
    videos = F.normalize((F.normalize(tokens, dim=-1) * taken).sum(dim=1), dim=-1)
    similarity = golden["logit_scale"].exp() * F.normalize(case["text"], dim=-1) @ videos.T
    torch.testing.assert_close(similarity, case["similarity"], atol=1e-4, rtol=1e-4)
    if name == "sparse_sampling":
        return  # its loss is that of tokens drawn by another generator
    pairs = torch.arange(len(videos))
    loss = (F.cross_entropy(similarity, pairs) + F.cross_entropy(similarity.T, pairs)) / 2
    torch.testing.assert_close(loss, case["loss"], atol=1e-4, rtol=1e-4)
    loss.backward()
    assert frames.grad is not None
    by_frame = frames.grad.flatten(2).norm(dim=-1)
    torch.testing.assert_close(by_frame, case["grad_video_norm_per_frame"], atol=1e-6, rtol=1e-3)
    expected = case.get("grads") or case["grad_norms"]
    assert len(expected) > 4
    for parameter, value in expected.items():
        gradient = clip.get_parameter(parameter).grad
        assert gradient is not None
        own = gradient if "grads" in case else gradient.norm()
        torch.testing.assert_close(own, value, atol=1e-5, rtol=1e-3, msg=parameter)


# ---- frames that are not real, and numbers of frames ----


@torch.no_grad()
@pytest.mark.parametrize(("algorithm", "aggregation"), [kind for kind in KINDS if kind[0] in REDUCING])
def test_a_segment_is_encoded_as_if_it_were_a_video(algorithm: str, aggregation: str) -> None:
    """The segments of seven frames are two, two and three; of the last one, a frame is not real."""
    clip, frames = build_tiny_clip(vocabulary=100), pixels(2, 7)
    more = {"algorithm": algorithm, "aggregation": aggregation}
    tower = tiny_tower(clip, stages=[{"block": 1, "segments": 3, "tokens": 3}], **more)
    alone = tiny_tower(clip, stages=[{"block": 1, "segments": 1, "tokens": 3}], **more)
    mask = all_real(frames)
    mask[:, 5] = False
    tokens = tower(frames, mask)
    assert tokens.shape == (2, 3, 64)
    for segment, members in enumerate(([0, 1], [2, 3], [4, 6])):
        expected = alone(frames[:, members], torch.ones(2, 2, dtype=torch.bool))[:, 0]
        torch.testing.assert_close(tokens[:, segment], expected, atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_a_segment_without_a_real_frame_does_not_change_the_mean() -> None:
    tower, frames = tiny_tower(stages=[{"block": 1, "segments": 3, "tokens": 4}]), pixels(1, 6)
    mask = torch.tensor([[True, True, True, False, False, False]])
    tokens = tower(frames, mask)
    with_padding, real = (MeanPooling()(part)[0] for part in (tokens, tokens[:, :2]))
    torch.testing.assert_close(F.normalize(with_padding, dim=-1), F.normalize(real, dim=-1), atol=1e-12, rtol=1e-12)
    blank = tower(torch.zeros_like(frames), torch.zeros_like(mask))
    assert blank.isfinite().all() and blank.norm() > 0


@torch.no_grad()
@pytest.mark.parametrize("algorithm", REDUCING)
def test_without_reduction_it_is_clip(algorithm: str) -> None:
    clip = build_tiny_clip(vocabulary=100)
    tower = tiny_tower(clip, algorithm=algorithm, stages=[{"block": 0, "segments": 8, "tokens": 4}])
    for frames in (1, 5, 8):
        images = pixels(2, frames)
        expected = PerFrame.encode(clip, images)
        torch.testing.assert_close(tower(images, all_real(images)), expected, atol=1e-12, rtol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_any_number_of_frames_gives_tokens_with_their_shares(algorithm: str, frames: int) -> None:
    stages = [{"block": 0, "segments": 3, "tokens": 3}, {"block": 1, "segments": 2, "tokens": 2}]
    tower, images = tiny_tower(algorithm=algorithm, stages=stages), pixels(2, frames)
    tokens, shares = tower(images, all_real(images)), tower.frame_shares(frames)
    if algorithm.endswith("_shift"):
        assert shares is None and tokens.shape[1] == frames
    else:
        assert shares is not None and shares.shape == (tokens.shape[1], frames) == (min(frames, 2), frames)
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(len(shares)))
        assert (shares.sum(dim=0) > 0).all()


def test_shares_of_several_stages() -> None:
    tower = tiny_tower(stages=[{"block": 0, "segments": 4, "tokens": 3}, {"block": 1, "segments": 2, "tokens": 2}])
    expected = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]) / 4
    assert torch.equal(tower.frame_shares(8), expected)


# ---- settings, training and other image towers ----


def test_random_sampling_follows_the_seed_and_stays_in_its_strides() -> None:
    tower, images = tiny_tower(algorithm="sparse_sampling"), pixels()
    tower.train()
    drawn = []
    for seed in (1, 1, 2, 3):
        torch.manual_seed(seed)
        drawn.append(tower(images, all_real(images)))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2]) or not torch.equal(drawn[0], drawn[3])
    tower.eval()
    assert torch.equal(tower(images, all_real(images)), tower(images, all_real(images)))


@torch.no_grad()
def test_settings_that_change_results() -> None:
    clip, images = build_tiny_clip(vocabulary=100), pixels()

    def tokens(**given: Any) -> Tensor:
        stages = [{"block": 0, "segments": 1, "tokens": 4}, {"block": 1, "segments": 1, "tokens": 2}]
        return tiny_tower(clip, **{"stages": stages, **given})(images, all_real(images))

    graph = {"algorithm": "spectral", "sigma": 5.0, "neighbours": 4}
    for base, changes in (
        ({}, [{"distance": "cosine"}, {"norm_p": 1.0}, {"pre_norm": True}, {"aggregation": "mean"}]),
        (graph, [{"sigma": 2.0}, {"graph": "heat"}, {"neighbours": 0}, {"window": True}]),
    ):
        for change in changes:
            assert not torch.allclose(tokens(**base), tokens(**{**base, **change})), change


def test_cluster_embeddings_start_from_positions_or_random_values() -> None:
    clip = build_tiny_clip(vocabulary=100)
    stages = [{"block": 0, "segments": 2, "tokens": 4}, {"block": 1, "segments": 1, "tokens": 2}]
    tower = tiny_tower(clip, stages=stages, cluster_embedding="positions")
    assert [tuple(part.shape) for part in tower.parameters()] == [(4, 64), (2, 64)]
    assert torch.equal(tower.embeddings[1], clip.visual.positional_embedding[1:3])
    wide = tiny_tower(stages=stages, cluster_embedding="normal").embeddings[0]
    assert 0.5 < wide.std() * 8 < 2
    assert not list(tiny_tower(clip).parameters())
    for other in (build_timm_clip(), build_pe_clip()):
        positions, view = tiny_tower(other, cluster_embedding="positions").embeddings[0], vision_view(other)
        still = view.place(torch.zeros(1, 3, 32, 32).double())[0, view.prefix :]  # the bias of the patches, and these
        differences = still[1:3] - still[0]
        torch.testing.assert_close(positions[1:3] - positions[0], differences, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_tokens_keep_their_places_in_rotary_towers() -> None:
    """Of the 16 patches of a frame, sampling keeps 2, 6, 10 and 14."""
    clip = build_pe_clip(patch_size=8, ref_feat_shape=(4, 4))
    tower = tiny_tower(clip, algorithm="sparse_sampling", stages=[{"block": 1, "segments": 1, "tokens": 4}])
    view, images = tower.view, pixels(2, 1)
    tokens = view.blocks[0](view.norm(view.place(images[:, 0])))[:, [0, 3, 7, 11, 15]]
    expected = view.pool(view.blocks[1](tokens, positions=torch.tensor([-1, 2, 6, 10, 14])))
    torch.testing.assert_close(tower(images, all_real(images))[:, 0], expected, atol=1e-12, rtol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "token_shift"])
def test_trunks_of_timm_without_a_class_token(algorithm: str) -> None:
    clip = build_timm_clip()
    tower, images = tiny_tower(clip, algorithm=algorithm), pixels(2, 4)
    tokens = tower(images, all_real(images))
    assert tokens.shape[0] == 2 and tokens.isfinite().all()
    everything = tiny_tower(clip, stages=[{"block": 1, "segments": 4, "tokens": 4}], cluster_embedding="off")
    torch.testing.assert_close(everything(images, all_real(images)), PerFrame.encode(clip, images))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stages": [{"block": 2}]}, "no block 2.*0 to 1"),
        ({"stages": [{"block": 0, "tokens": 5}]}, "5 tokens at block 0.*the 4 patches"),
        ({"algorithm": "token_shift"}, "temporal_shift"),
    ],
)
def test_what_the_image_tower_cannot_do_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=rf"(?s)tower\.config.*{words}"):
        Clustering(settings(**given), build_timm_clip())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stages": [{"block": 3}, {"block": 3}]}, "block 3 follows block 3"),
        ({"stages": [{"block": 3, "segments": 2}, {"block": 4}]}, "4 segments at block 4"),
        ({"stages": [{"block": 3, "tokens": 9}, {"block": 4}]}, "49 tokens at block 4"),
        ({"algorithm": "pooling", "aggregation": "mean"}, "aggregation"),
        ({"algorithm": "token_shift", "cluster_embedding": "normal"}, "cluster_embedding"),
        ({"stages": []}, "stages"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=rf"tower\.config.*{words}"):
        load_config(None, {"tower": {"method": "clustering", "config": given}})


def test_it_runs_in_mixed_precision_and_is_counted() -> None:
    tower = {"method": "clustering", "config": {"stages": ONE_STAGE, "aggregation": "mean"}}
    model = build_retriever(tower=tower, use_policy=False)
    per_frame = build_retriever(use_policy=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.encode_video(random_videos(view=None)).tokens.isfinite().all()
    assert 0 < count_gflops(model, 6).video < count_gflops(per_frame, 6).video
    copied = copy.deepcopy(model)
    assert copied.tower.clip is copied.clip

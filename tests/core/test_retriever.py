"""The retriever as a whole: encoding only what is needed equals encoding everything, with any selector and head."""

import copy
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import build_tiny_clip
from tiny import SPEC, VOCABULARY, build_retriever, random_tokens, random_videos
from torch import Tensor

from adaclip_finetune.config import PerFrameSettings
from adaclip_finetune.data.dataset import TrainBatch, VideoBatch
from adaclip_finetune.data.preprocess import normalise
from adaclip_finetune.errors import UserError
from adaclip_finetune.model import retriever
from adaclip_finetune.model.clip import encode_images, text_blocks
from adaclip_finetune.model.features import TextFeatures
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.model.towers.base import FrameTower, FramewiseTower
from adaclip_finetune.model.towers.per_frame import PerFrame
from adaclip_finetune.objectives.contrastive import contrastive_loss

VIEWS = {"raw": (1, 8, 8), "mobilenet_v3_large": (3, 32, 32)}


def make_batch(policy: str = "raw") -> tuple[VideoBatch, Tensor]:
    return random_videos(view=VIEWS.get(policy)), random_tokens()


def gumbel(*shape: int) -> Tensor:
    noise = torch.empty(*shape, dtype=torch.float64)
    return -noise.exponential_(generator=torch.Generator().manual_seed(3)).log()


def pixels_of(batch: VideoBatch, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normalised frames (B, N, 3, S, S); blank ones are zero."""
    return normalise(batch.frames, SPEC.mean, SPEC.std).to(dtype) * batch.frame_mask[..., None, None, None]


def embed_all(model: VideoRetriever, batch: VideoBatch) -> Tensor:
    """Return CLIP's embeddings of all N frames: (B, N, D)."""
    frames = pixels_of(batch, model.logit_scale().dtype)
    return encode_images(model.clip, frames.flatten(0, 1)).unflatten(0, frames.shape[:2])


def selector_features(model: VideoRetriever, batch: VideoBatch, embeddings: Tensor) -> Tensor:
    assert model.selector is not None
    backbone = model.selector.backbone
    if backbone is None:
        return embeddings
    if backbone.view is None:
        return backbone(pixels_of(batch))
    return backbone(batch.policy_frames, batch.frame_mask, torch.float64)


def encode_everything(model: VideoRetriever, batch: VideoBatch, noise: Tensor) -> Tensor:
    """Compute features as the published system does: all N frames through CLIP with gradients, then the choice."""
    frames = embed_all(model, batch)
    assert model.selector is not None and model.aggregator is not None
    selection = model.selector(selector_features(model, batch, frames), noise)
    chosen = selection.weights.to(frames.dtype) @ frames
    if model.header is not None:
        chosen = model.header(chosen)
    return model.aggregator(chosen)[0]


HEADS = ({"frame_agg": "mlp"}, 1), ({"sim_header": "transformer"}, 4), ({"frame_agg": "mlp"}, 6)


@pytest.mark.parametrize(
    ("policy", "head", "k"),
    [(policy, head, k) for policy in ("raw", "clip", "frozen_clip") for head, k in HEADS]
    + [("mobilenet_v3_large", {"frame_agg": "mlp"}, 4)],
)
def test_encoding_only_what_is_needed_equals_encoding_everything(policy: str, head: dict[str, str], k: int) -> None:
    settings = {"policy_backbone": policy, "warmup_epochs": 2, "num_epochs": 2, **head}
    model = build_retriever(**settings).double().train()
    assert model.selector is not None
    model.selector.k, model.selector.temperature = k, 0.7
    oracle = copy.deepcopy(model)
    batch, ids = make_batch(policy=policy)
    noise = gumbel(4, 6)
    text, video = model(TrainBatch(batch, [], ids, noise))
    loss = contrastive_loss(model.similarity(text, video))
    loss.backward()

    whole_text = oracle.clip.encode_text(ids)
    whole_video = encode_everything(oracle, batch, noise)
    assert video.vector is not None
    torch.testing.assert_close(text.sentence, whole_text, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(video.vector, whole_video, atol=1e-9, rtol=1e-9)
    whole = oracle.similarity(TextFeatures(whole_text), video._replace(vector=whole_video))
    whole_loss = contrastive_loss(whole)
    whole_loss.backward()
    torch.testing.assert_close(loss, whole_loss, atol=1e-9, rtol=1e-9)
    gradients = dict(oracle.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        if gradients[name].grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-9, rtol=1e-7, msg=name)
            compared += 1
    assert compared > 50


def test_evaluation_encodes_only_the_selected_frames() -> None:
    model = build_retriever(frame_agg="mlp").double().eval()
    batch, _ = make_batch()
    encoded: list[int] = []
    model.clip.visual.register_forward_hook(lambda _m, args, _o: encoded.append(len(args[0])))
    with torch.no_grad():
        video = model.encode_video(batch)
        assert encoded == [4 * 2]
        everything = embed_all(model, batch)
        assert video.selection is not None and video.vector is not None and model.aggregator is not None
        chosen = everything[torch.arange(4)[:, None], video.selection.indices]
        torch.testing.assert_close(video.tokens, chosen, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(video.vector, model.aggregator(chosen)[0], atol=1e-9, rtol=1e-9)


def test_frames_without_gradients_are_encoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, noise = build_retriever(frame_agg="mlp").double().train(), make_batch()[0], gumbel(4, 6)
    whole, encoded = model.encode_video(batch, noise).vector, list[int]()
    model.clip.visual.register_forward_hook(lambda _m, args, _o: encoded.append(len(args[0])))
    monkeypatch.setattr(retriever, "_FIXED_FRAMES_AT_ONCE", 9)
    torch.testing.assert_close(model.encode_video(batch, noise).vector, whole, atol=1e-9, rtol=1e-9)
    assert encoded == [4 * 2, 2 * 4, 2 * 4]  # the selected frames, and the others of two videos at a time


@pytest.mark.parametrize("policy", ["raw", "frozen_clip"])
def test_training_of_a_frozen_tower_encodes_all_frames_at_once(policy: str) -> None:
    model = build_retriever(frame_agg="mlp", policy_backbone=policy).double().train()
    model.clip.requires_grad_(False)
    batch, noise, encoded = make_batch(policy=policy)[0], gumbel(4, 6), list[int]()
    model.clip.visual.register_forward_hook(lambda _m, args, _o: encoded.append(len(args[0])))
    vector = model.encode_video(batch, noise).vector
    assert encoded == [4 * 6] and vector is not None
    expected = encode_everything(model, batch, noise)
    torch.testing.assert_close(vector, expected, atol=1e-9, rtol=1e-9)
    learning = [parameter for parameter in model.selector.parameters() if parameter.requires_grad]
    gradients = (torch.autograd.grad(of.square().sum(), learning) for of in (vector, expected))
    for ours, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-9, rtol=1e-7)


def with_policy_gradient(policy_gradient: str, freeze: bool = False) -> VideoRetriever:
    torch.manual_seed(0)
    model = build_retriever(policy_backbone="raw", policy_gradient=policy_gradient, top_k=2).double().train()
    model.clip.requires_grad_(not freeze)
    return model


def gradients_of_scores(model: VideoRetriever, batch: VideoBatch, noise: Tensor) -> Tensor:
    assert model.selector is not None
    features = model.encode_video(batch, noise)
    assert features.selection is not None and features.vector is not None
    weights = torch.randn(features.vector.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad((features.vector * weights).sum(), features.selection.logits)[0]


@pytest.mark.parametrize("freeze", [False, True])
def test_the_gradient_of_selected_frames_encodes_only_these(freeze: bool) -> None:
    batch, noise = make_batch()[0], gumbel(4, 6)
    model, exact = with_policy_gradient("selected", freeze), with_policy_gradient("exact")
    encoded: list[int] = []
    model.clip.visual.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    found = model.encode_video(batch, noise)
    assert encoded == [4 * 2]
    for ours, theirs in zip(found[:3], exact.encode_video(batch, noise)[:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(
        gradients_of_scores(model, batch, noise), gradients_of_scores(exact, batch, noise), rtol=0.01, atol=0
    )


def test_the_gradient_of_selected_frames_is_exact_if_the_others_are_their_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, noise = make_batch()[0], gumbel(4, 6)
    model, exact = with_policy_gradient("selected"), with_policy_gradient("exact")

    mean = exact.encode_video(batch, noise).tokens.detach().mean(dim=1, keepdim=True)
    expected = gradients_of_scores(model, batch, noise)
    monkeypatch.setattr(exact, "_alone_fixed", lambda frames, mask: mean.expand(-1, frames.shape[1], -1))
    torch.testing.assert_close(gradients_of_scores(exact, batch, noise), expected, rtol=1e-9, atol=1e-12)
    assert expected.abs().sum() > 0


def test_k_annealing_works_with_the_transformer_header() -> None:
    model = build_retriever(sim_header="transformer", warmup_epochs=3, num_epochs=4).train()
    for epoch, k in enumerate([5, 4, 3, 2]):
        model.start_epoch(epoch)
        assert model.schedule()["k"] == k
        assert model.encode_video(make_batch()[0]).tokens.shape == (4, k, 64)
    assert model.eval().encode_video(make_batch()[0]).tokens.shape == (4, 2, 64)


@pytest.mark.parametrize("frame_agg", [None, "mlp", "transformer", "qscore"])
@pytest.mark.parametrize("sim_header", ["meanP", "transformer", "seqTransf"])
def test_every_head_works_with_any_width(frame_agg: str | None, sim_header: str) -> None:
    clip = open_clip.CLIP(
        embed_dim=40,
        vision_cfg={"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
        text_cfg={"vocab_size": VOCABULARY, "width": 64, "heads": 1, "layers": 1},
    )
    model = build_retriever(clip, frame_agg=frame_agg, sim_header=sim_header)
    batch, ids = make_batch()
    text, video = model.train()(TrainBatch(batch, [], ids, gumbel(4, 6).float()))
    assert (video.vector is None) == (frame_agg == "qscore")
    similarity = model.similarity(text, video)
    assert similarity.shape == (4, 4)
    assert similarity.isfinite().all()


def test_blank_frames_are_zero_after_normalisation() -> None:
    model = build_retriever(use_policy=False)
    batch, _ = make_batch()
    mask = batch.frame_mask.clone()
    mask[:, 4:] = False
    blank = VideoBatch(batch.frames, mask, None, batch.frame_indices, batch.video_ids)
    seen: list[Tensor] = []
    model.clip.visual.register_forward_hook(lambda _m, args, _o: seen.append(args[0].unflatten(0, (4, 6))))
    model.encode_video(blank)
    assert seen[0][:, 4:].abs().max() == 0
    mean, std = torch.tensor(SPEC.mean)[:, None, None], torch.tensor(SPEC.std)[:, None, None]
    expected = (batch.frames[:, :4].float() / 255 - mean) / std
    torch.testing.assert_close(seen[0][:, :4], expected)


def test_headers_are_initialised_from_the_text_tower() -> None:
    clip = build_tiny_clip(vocabulary=VOCABULARY)
    model = build_retriever(clip, sim_header="seqTransf")
    assert model.header is not None
    blocks = model.header.transformer.resblocks
    for own, pretrained in zip(blocks, text_blocks(clip), strict=False):
        for name, tensor in own.state_dict().items():
            assert torch.equal(tensor, pretrained.state_dict()[name])
    assert torch.equal(model.header.positions.weight, clip.positional_embedding)
    assert blocks[0].ln_1.eps == 1e-12


def test_selector_layers_are_initialised_small() -> None:
    model = build_retriever(hidden_dim=128, mlp_hidden_dim=128, frame_agg="mlp")
    assert model.selector is not None and model.aggregator is not None
    for linear in (model.selector.scorer[0], model.aggregator.scorer[0], model.selector.encoder.projection):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert linear.bias.abs().max() == 0


@torch.no_grad()
def test_an_image_is_encoded_as_a_video_of_one_frame() -> None:
    image = make_batch()[0].frames[0, :1]
    model = build_retriever(sim_header="transformer", frame_agg="mlp").double().eval()
    embedding = encode_images(model.clip, normalise(image, SPEC.mean, SPEC.std).double())
    assert model.header is not None
    torch.testing.assert_close(model.encode_image(image), model.header(embedding[None])[0], atol=1e-9, rtol=1e-9)
    assert torch.equal(build_retriever().double().eval().encode_image(image), embedding)


# ---- frame weights ----

POOLINGS: dict[str, dict[str, Any]] = {
    "mean": {},
    "mlp": {"frame_agg": "mlp"},
    "transformer": {"frame_agg": "transformer"},
    "qscore": {"frame_agg": "qscore"},
    "mean, word_agg": {"word_agg": "mlp"},
}


def sharpen(model: VideoRetriever) -> VideoRetriever:
    """Make the scores of frames differ, which are nearly equal after initialisation."""
    with torch.no_grad():
        for part in (model.selector, model.aggregator):
            for seed, parameter in enumerate(() if part is None else part.parameters()):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.copy_(0.3 * noise)
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("choice", ["selected", "selected, reuse_scores", "all frames"])
@pytest.mark.parametrize("name", POOLINGS)
def test_frame_weights_are_the_factors_of_the_frames(name: str, choice: str, training: bool) -> None:
    settings = {"frame_agg_temp": 0.5, "top_k": 3, **POOLINGS[name]}
    settings |= {"use_policy": choice != "all frames", "reuse_scores": "reuse" in choice}
    model = sharpen(build_retriever(**settings)).double().train(training)
    batch, _ = make_batch()
    video = model.encode_video(batch, gumbel(4, 6))
    weights = video.frame_weights
    assert weights.shape == (4, 6) and not weights.requires_grad and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(4))
    counted = torch.ones(4, 6) if video.selection is None else video.selection.weights.detach().sum(dim=1)
    assert torch.equal(weights > 0, counted.round().bool())
    weighs = name in ("mlp", "transformer") or (settings["reuse_scores"] and name == "mean")
    assert (weights.max() > 1.2 / counted[0].sum()) == weighs, "frames differ exactly where something scores them"
    if video.vector is None:  # each query has its own weights
        return
    frames = embed_all(model, batch)
    if not weighs:
        frames = F.normalize(frames, dim=-1)
    pooled = torch.einsum("bn,bnd->bd", weights.double(), frames)
    if not settings["reuse_scores"] or name == "mean":
        torch.testing.assert_close(video.vector, pooled, atol=1e-6, rtol=1e-6)
    # Products of reused scores and pooling weights do not sum to 1, and the length of a vector does not matter.
    torch.testing.assert_close(F.normalize(video.vector, dim=-1), F.normalize(pooled, dim=-1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sim_header", ["transformer", "seqTransf"])
@torch.no_grad()
def test_frame_weights_with_a_header_are_those_of_its_tokens(sim_header: str) -> None:
    model = sharpen(build_retriever(sim_header=sim_header, frame_agg="mlp", frame_agg_temp=0.5)).double().eval()
    video = model.encode_video(make_batch()[0])
    assert video.selection is not None and model.aggregator is not None
    expected = model.aggregator(video.tokens)[1].float()
    torch.testing.assert_close(video.frame_weights.gather(1, video.selection.indices), expected)
    torch.testing.assert_close(video.frame_weights.sum(dim=1), torch.ones(4))


# ---- towers that mix frames ----


class MixingTower(FrameTower):
    """Makes each token half its own frame and half the mean of all. `mask` is the last mask that was passed."""

    mask: Tensor

    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
        self.mask = mask
        tokens = encode_images(self.clip, pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        return (tokens + tokens.mean(dim=1, keepdim=True)) / 2

    def frame_shares(self, frames: int) -> Tensor:
        return torch.eye(frames) / 2 + 1 / (2 * frames)


def mixing(**settings: Any) -> VideoRetriever:
    model = sharpen(build_retriever(**settings)).double()
    model.tower = MixingTower(PerFrameSettings(), model.clip)
    return model


@pytest.mark.parametrize("policy", ["raw", "clip", "frozen_clip"])
@pytest.mark.parametrize("frame_agg", ["mlp", None])
def test_scores_learn_in_front_of_a_mixing_tower(policy: str, frame_agg: str | None) -> None:
    """The scores get the gradient of mixing what CLIP makes of each frame alone; the oracle encodes all frames."""
    model = mixing(policy_backbone=policy, frame_agg=frame_agg).train()
    assert model.selector is not None
    model.selector.k, model.selector.temperature = 3, 0.7
    oracle = copy.deepcopy(model)
    batch, ids = make_batch(policy=policy)
    noise = gumbel(4, 6)
    text, video = model(TrainBatch(batch, [], ids, noise))
    contrastive_loss(model.similarity(text, video)).backward()

    features = selector_features(oracle, batch, embed_all(oracle, batch))
    assert oracle.selector is not None and oracle.aggregator is not None
    selection = oracle.selector(features, noise)
    indices, order = selection.indices.sort(dim=1)
    weights = torch.stack([row[places] for row, places in zip(selection.weights, order, strict=True)])
    chosen = pixels_of(batch)[torch.arange(4)[:, None], indices]
    alone = torch.einsum("bkn,bnd->bkd", weights, embed_all(oracle, batch).detach())
    shares = oracle.tower.frame_shares(3)
    assert shares is not None
    tokens = oracle.tower(chosen, torch.ones(4, 3, dtype=torch.bool)) + shares.double() @ (alone - alone.detach())
    vector = oracle.aggregator(tokens)[0]
    expected = video._replace(vector=vector)
    contrastive_loss(oracle.similarity(oracle.encode_text(ids), expected)).backward()

    assert video.selection is not None and video.vector is not None
    assert torch.equal(video.selection.indices, indices) and torch.equal(video.selection.weights, weights)
    torch.testing.assert_close(video.vector, vector, atol=1e-9, rtol=1e-9)
    gradients = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-9, rtol=1e-7, msg=name)
    learns = {name: parameter.grad for name, parameter in model.selector.named_parameters() if parameter.requires_grad}
    assert len(learns) > 10
    for name, gradient in learns.items():
        # A bias that is the same for all frames cannot change which are chosen.
        assert name == "scorer.2.bias" or (gradient is not None and gradient.abs().max() > 0), name


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("policy", ["raw", "clip"])
def test_a_mixing_tower_gets_frames_in_the_order_of_time(policy: str, training: bool) -> None:
    model = mixing(policy_backbone=policy, frame_agg="mlp", top_k=3).train(training)
    assert model.selector is not None
    batch, _ = make_batch(policy=policy)
    batch.frame_mask[:, 1::2] = False
    seen: list[Tensor] = []
    model.clip.visual.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    noise = gumbel(4, 6)
    video = model.encode_video(batch, noise)
    selection = video.selection
    assert selection is not None
    assert torch.equal(selection.indices, selection.indices.sort(dim=1).values)
    assert torch.equal(selection.weights.argmax(dim=-1), selection.indices)
    chosen = pixels_of(batch)[torch.arange(4)[:, None], selection.indices]
    sizes = [len(pixels) for pixels in seen]
    torch.testing.assert_close(seen[sizes.index(12)].unflatten(0, (4, 3)), chosen, atol=1e-9, rtol=1e-9)
    assert sizes == ([24, 12] if policy == "clip" else [12, 24] if training else [12])
    assert isinstance(model.tower, MixingTower)
    assert torch.equal(model.tower.mask, batch.frame_mask.gather(1, selection.indices))


@pytest.mark.parametrize("policy", ["raw", "clip"])
def test_a_framewise_tower_learns_as_if_all_frames_were_encoded_once(policy: str) -> None:
    model = (
        sharpen(build_retriever(policy_backbone=policy, frame_agg=None, tower={"method": "change"})).double().train()
    )
    assert isinstance(model.tower, FramewiseTower) and model.selector is not None
    torch.nn.init.normal_(model.tower.get_parameter("maps"))
    model.selector.k, model.selector.temperature = 3, 0.7
    oracle = copy.deepcopy(model)
    assert isinstance(oracle.tower, FramewiseTower) and oracle.selector is not None
    batch, ids = make_batch(policy=policy)
    noise = gumbel(4, 6)
    text, video = model(TrainBatch(batch, [], ids, noise))
    contrastive_loss(model.similarity(text, video)).backward()

    frames = embed_all(oracle, batch)
    selection = oracle.selector(selector_features(oracle, batch, frames), noise)
    order = selection.indices.argsort(dim=1)
    weights = torch.stack([row[places] for row, places in zip(selection.weights, order, strict=True)])
    assert oracle.aggregator is not None
    vector = oracle.aggregator(oracle.tower.combine(weights @ frames, torch.ones(4, 3, dtype=torch.bool)))[0]
    expected = video._replace(vector=vector)
    contrastive_loss(oracle.similarity(oracle.encode_text(ids), expected)).backward()

    torch.testing.assert_close(video.vector, vector, atol=1e-9, rtol=1e-9)
    gradients = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-9, rtol=1e-7, msg=name)
    assert model.tower.get_parameter("maps").grad.abs().max() > 0


@torch.no_grad()
def test_frame_weights_of_a_mixing_tower_follow_its_frame_shares() -> None:
    model = mixing(frame_agg="mlp", frame_agg_temp=0.5, top_k=3).eval()
    batch, _ = make_batch()
    video = model.encode_video(batch)
    assert video.selection is not None and video.vector is not None and model.aggregator is not None
    frames = embed_all(model, batch)
    torch.testing.assert_close(video.frame_weights.sum(dim=1), torch.ones(4))
    assert torch.equal((video.frame_weights > 0).sum(dim=1), torch.full((4,), 3))
    pooled = torch.einsum("bn,bnd->bd", video.frame_weights.double(), frames)
    torch.testing.assert_close(video.vector, pooled, atol=1e-6, rtol=1e-6)


def test_reused_scores_are_refused_for_a_mixing_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PerFrame, "frame_shares", MixingTower.frame_shares)
    with pytest.raises(UserError, match="reuse_scores"):
        build_retriever(reuse_scores=True)

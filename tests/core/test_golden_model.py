"""Golden settings of the published system, from published checkpoints: the same frames, and cosines within 1e-5."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from foreign import write_published
from golden import load_golden, load_golden_clip

from adaclip_finetune.config import load_config
from adaclip_finetune.data.dataset import VideoBatch
from adaclip_finetune.data.preprocess import ImageSpec
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.weights.checkpoints import describe, read_checkpoint
from adaclip_finetune.weights.clip_weights import load_clip
from adaclip_finetune.weights.plain import strict_load

SETTINGS = [
    "mean_seqTransf",
    "mean_transformer-header",
    "mlp-score",
    "mlp-score_temp0.5_bilstm",
    "no-policy_mean",
    "qscore_no-rnn",
    "reuse-scores",
    "transformer_lstm_fc",
    "word-mlp",
    "word-transformer_seqTransf",
]
# The golden frames are normalised floats already: this spec and the factor 255 below leave them as they are.
AS_IT_IS = ImageSpec(size=32, mean=(0, 0, 0), std=(1, 1, 1))


@pytest.mark.parametrize("name", SETTINGS)
def test_golden_setting(name: str, tmp_path: Path) -> None:
    expected = load_golden(name)
    inputs = load_golden("inputs")
    state = load_golden_clip() | expected["state_dict_without_clip"]
    checkpoint = read_checkpoint(write_published(tmp_path / "such.pth", state, expected["settings"]))
    assert "easydict" not in sys.modules
    config = load_config(None, expected["settings"])
    assert "its settings are those given" in describe(checkpoint, config)
    loaded = load_clip(config, from_checkpoint=checkpoint.towers())
    model = VideoRetriever(config, dataclasses.replace(loaded, image=AS_IT_IS)).eval()
    strict_load(model, checkpoint.state, str(checkpoint.path))
    batch = VideoBatch(
        frames=inputs["frames"] * 255,
        frame_mask=torch.ones(5, 8, dtype=torch.bool),
        policy_frames=inputs["raw_policy_frames"] * 255,
        frame_indices=torch.arange(8).expand(5, 8),
        video_ids=list("abcde"),
    )
    with torch.no_grad():
        text = model.encode_text(inputs["token_ids"][:, 0])
        video = model.encode_video(batch)
        similarity = model.similarity(text, video)
        scale = model.logit_scale().exp()
    if video.selection is not None:
        assert torch.equal(video.selection.indices, expected["selected_indices"])
        torch.testing.assert_close(video.selection.logits, expected["selector_logits"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(video.tokens, expected["frame_embd"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(similarity / scale, expected["similarity"] / scale, atol=1e-5, rtol=0)
    torch.testing.assert_close(similarity, expected["similarity"], atol=1e-4, rtol=0)

"""Every golden setting of the published system: the same selected frames, cosines within 1e-5."""

from pathlib import Path

import pytest
import torch
from conftest import build_tiny_clip
from published import to_our_names

from adaclip_finetune.config import load_config
from adaclip_finetune.data.dataset import VideoBatch
from adaclip_finetune.data.preprocess import ImageSpec
from adaclip_finetune.model.clip import LoadedClip
from adaclip_finetune.model.retriever import VideoRetriever

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
# The golden frames are already normalised floats: this spec and the factor 255 below hand them through as they are.
AS_IT_IS = ImageSpec(size=32, mean=(0, 0, 0), std=(1, 1, 1))


@pytest.mark.parametrize("name", SETTINGS)
def test_golden_setting(name: str, shared: Path) -> None:
    golden = shared / "reference/golden"
    expected = torch.load(golden / f"{name}.pt", weights_only=True)
    inputs = torch.load(golden / "inputs.pt", weights_only=True)
    config = load_config(None, expected["settings"])
    clip = build_tiny_clip()
    model = VideoRetriever(config, LoadedClip(clip, AS_IT_IS, None, None, 77, "golden")).eval()  # type: ignore[arg-type]
    state = torch.load(golden / "clip.pt", weights_only=True) | expected["state_dict_without_clip"]
    model.load_state_dict(to_our_names(state))
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
        cosines = model.similarity(text, video) / model.logit_scale().exp()
        scale = model.logit_scale().exp()
    if video.selection is not None:
        assert torch.equal(video.selection.indices, expected["selected_indices"])
        torch.testing.assert_close(video.selection.logits, expected["selector_logits"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(video.frames, expected["frame_embd"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cosines, expected["similarity"] / scale, atol=1e-5, rtol=0)

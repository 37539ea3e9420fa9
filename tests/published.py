"""The published system's names of tensors, in ours (facts from shared/reference/published_checkpoint_layout.json)."""

from torch import Tensor

PREFIXES = {
    "sampler.cnn_model.": "selector.backbone.cnn.",
    "sampler.projection.0.": "selector.encoder.projection.",
    "sampler.frame_position_embeddings.": "selector.encoder.positions.",
    "sampler.transformer.": "selector.encoder.transformer.",
    "sampler.rnn.": "selector.encoder.rnn.",
    "sampler.linear.": "selector.scorer.",
    "frame_position_embeddings.": "header.positions.",
    "transformerClip.": "header.transformer.",
    "transformer.": "header.transformer.",
    "frame_agg_mlp.": "aggregator.scorer.",
    "frame_agg_transformer.": "aggregator.transformer.",
    "frame_agg_proj.": "aggregator.scorer.",
    "word_agg_mlp.": "word_aggregator.scorer.",
    "word_agg_transformer.": "word_aggregator.transformer.",
    "word_agg_proj.": "word_aggregator.scorer.",
    "clip.": "clip.",
}


def to_our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under our names; a name that nobody knows is a KeyError."""
    ours = {}
    for name, tensor in state.items():
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix is None:
            raise KeyError(name)
        ours[PREFIXES[prefix] + name.removeprefix(prefix)] = tensor
    return ours

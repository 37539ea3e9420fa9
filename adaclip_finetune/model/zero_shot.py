"""The settings of the pretrained towers alone: as many uniform frames as the run encodes, and their mean.

They are the zero-shot baseline, which every finetune has to beat, and the default teacher of `objective: distillation`.
"""

from __future__ import annotations

from adaclip_finetune.config import Config, load_config


def zero_shot_config(config: Config) -> Config:
    """Return the settings of the zero-shot baseline of `config`: top_k uniform frames, mean pooling, nothing learned
    and nothing adapted."""
    defaults = load_config()
    return config.model_copy(
        update={
            "use_policy": False,
            "num_frm": config.top_k if config.use_policy else config.num_frm,
            "num_frm_subset": 0,
            "sampling": "uniform",
            "reuse_scores": False,
            "warmup_epochs": 0,
            "sim_header": "meanP",
            "frame_agg": None,
            "word_agg": None,
            "captioner": None,
            "tower": defaults.tower,
            "adaptation": defaults.adaptation,
        }
    )

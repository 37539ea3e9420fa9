"""`objective: auxiliary_captions`: contrast videos with two texts each, and middle frames with one (CLIP-ViP, Xue et
al. 2023).

What is said in a video often says little about what is seen. In CLIP-ViP's post-pretraining each video therefore has a
second text, which a captioning model made of its middle frame.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaclip_finetune.config import Config
from adaclip_finetune.config.choices.objectives import AuxiliaryCaptionsSettings
from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.data.preprocess import Views
from adaclip_finetune.model.features import TextFeatures, VideoFeatures, at_least_float32
from adaclip_finetune.objectives.base import Group, Objective, Rows
from adaclip_finetune.objectives.contrastive import cross_entropy


class AuxiliaryCaptions(Objective):
    """Contrasts videos with their sentences and auxiliary captions, and middle frames with auxiliary captions.

    The setting `loss` lists the terms. Cross-entropies are added, not averaged over directions.
    """

    settings_class = AuxiliaryCaptionsSettings
    settings: AuxiliaryCaptionsSettings

    @property
    def terms(self) -> list[str]:
        """The names of the terms."""
        return self.settings.loss.split("+")

    def second_view(self, config: Config) -> tuple[Config, Views] | None:
        """Return how the middle frame of a video is read, if there is a term with it."""
        if "f_c" not in self.terms:
            return None
        middle = {"num_frm": 1, "num_frm_subset": 0, "sampling": "uniform", "segment_sampling": True}
        return config.model_copy(update={**middle, "to_last_frame": False}), Views(self.retriever.image_spec, None)

    def embed(self, batch: TrainBatch) -> Rows:
        rows, retriever = super().embed(batch), self.retriever
        if batch.auxiliary_ids is not None:
            rows["auxiliary"] = at_least_float32(retriever.encode_text(batch.auxiliary_ids).sentence)
        if batch.second is not None:
            frame = retriever.encode_image(batch.second.frames[:, 0])
            as_video = VideoFeatures(frame[:, None], frame, torch.ones_like(frame[:, :1]), None)
            rows["frame"] = retriever.scorer.keep(as_video)
        return rows

    def embed_fixed(self, batch: TrainBatch) -> Rows:
        """Return the token ids of both texts of each pair, and whether it has an auxiliary caption."""
        if batch.auxiliary_ids is None or batch.has_auxiliary is None:
            return {}
        ids = {"text_ids": batch.token_ids, "auxiliary_ids": batch.auxiliary_ids, "has_auxiliary": batch.has_auxiliary}
        return {name: tensor.to(self.retriever.device) for name, tensor in ids.items()}

    def loss(self, rows: Rows, group: Group) -> dict[str, Tensor]:
        rows = {name: group.gather(tensor) for name, tensor in rows.items()}
        scorer, text, video = self.retriever.scorer, TextFeatures(rows["text"]), rows["video"]
        by_text, same = scorer(text, video), group.same(video.device)
        if not self.settings.uses_auxiliary:
            return {"v_s": both_ways(by_text, same)}
        known, known_auxiliary = described(rows["text_ids"], rows["auxiliary_ids"], same)
        # The pairs that have an auxiliary caption, and the similarity of these captions to all videos.
        has = rows["has_auxiliary"].nonzero()[:, 0]
        auxiliary, known_auxiliary = TextFeatures(rows["auxiliary"][has]), known_auxiliary[has]
        by_auxiliary = scorer(auxiliary, video)
        terms = {}
        if "v_s" in self.terms:
            terms["v_s"] = both_ways(by_text, known)
        if "v_sc" in self.terms:
            terms["v_sc"] = both_texts(by_text, by_auxiliary, has, known, known_auxiliary)
        if "v_c" in self.terms:
            terms["v_c"] = both_ways(by_auxiliary[:, has], known_auxiliary[:, has])
        if "f_c" in self.terms:
            terms["f_c"] = both_ways(scorer(auxiliary, rows["frame"][has]), known_auxiliary[:, has])
        return terms


def described(text_ids: Tensor, auxiliary_ids: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Return which sentences, and which auxiliary captions, describe which videos: bool (B, B), rows are texts.

    A video is described by both texts of its own pair, by texts with the same token ids, and by the texts of pairs
    that have the same video or sentence (`same`, of `Group.same`). A text is no negative of a video that it describes.
    """
    ids = torch.cat([text_ids, auxiliary_ids]).cpu()  # not every device finds unique rows
    text, auxiliary = torch.unique(ids, dim=0, return_inverse=True)[1].to(same.device).chunk(2)
    known = same | (text[:, None] == auxiliary)
    return known, known.T | (auxiliary[:, None] == auxiliary)


def both_ways(logits: Tensor, known: Tensor) -> Tensor:
    """Return the sum of the cross-entropies over rows and columns of `logits` (n, n), whose diagonal is right.

    Pairs for which `known` (n, n) is True are not contrasted.
    """
    right = torch.arange(len(logits), device=logits.device)
    return cross_entropy(logits, right, known) + cross_entropy(logits.T, right, known.T)


def both_texts(by_text: Tensor, by_auxiliary: Tensor, has: Tensor, known: Tensor, known_auxiliary: Tensor) -> Tensor:
    """Return the loss of B videos with B sentences and n auxiliary captions at once, of the videos `has` (n,).

    Each text is contrasted with all videos, and each video, once for either of its texts, with all texts of other
    videos. `by_text` (B, B) and `by_auxiliary` (n, B) are logits, whose rows are texts; texts and videos that are True
    in `known` (B, B) and `known_auxiliary` (n, B) are not contrasted.
    """
    own = torch.arange(len(by_text), device=by_text.device)
    to_video = cross_entropy(by_text, own, known) + cross_entropy(by_auxiliary, has, known_auxiliary)
    texts, left_out = torch.cat([by_text, by_auxiliary]).T, torch.cat([known, known_auxiliary]).T
    place = len(own) + torch.arange(len(has), device=has.device)  # of the auxiliary captions among the texts
    return to_video + cross_entropy(texts, own, left_out) + cross_entropy(texts[has], place, left_out[has])

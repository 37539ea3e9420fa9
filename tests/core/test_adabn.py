"""AdaBN compared with the statistics of what its batch norms see."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tiny import build_retriever, on_meta, random_tokens, random_videos
from torch import nn

from adaclip_finetune.config import load_config
from adaclip_finetune.config.choices.peft import AdabnSettings
from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.errors import UserError
from adaclip_finetune.peft.adabn import AdaptiveBatchNorm, batch_norms


def batches() -> Iterator[TrainBatch]:
    for number in range(3):
        videos = random_videos(2, view=(3, 64, 64))
        assert videos.policy_frames is not None
        darker = replace(videos, policy_frames=videos.policy_frames // (number + 1))
        yield TrainBatch(darker, [], random_tokens(2), torch.zeros(2, 6))


def test_the_statistics_are_those_of_all_frames_together() -> None:
    model = build_retriever(policy_backbone="mobilenet_v2", freeze_cnn=True).train()
    method = AdaptiveBatchNorm(AdabnSettings())
    method.choose(model)
    assert not any(parameter.requires_grad for parameter in model.clip.parameters())
    first = batch_norms(model)[0]
    seen: list[torch.Tensor] = []
    hook = first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    weights = {name: own.clone() for name, own in model.named_parameters()}
    method.before_training(model, batches())
    hook.remove()
    values = torch.cat(seen).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(first.running_mean, values.mean(dim=1).float())
    torch.testing.assert_close(first.running_var, values.var(dim=1).float())
    assert len(seen) == 3 and model.training and not first.training
    assert all(torch.equal(own, weights[name]) for name, own in model.named_parameters())


def test_a_number_of_batches_limits_it() -> None:
    model, left = build_retriever(policy_backbone="mobilenet_v2", freeze_cnn=True), batches()
    AdaptiveBatchNorm(AdabnSettings(num_batches=2)).before_training(model, left)
    assert len(list(left)) == 1


def test_a_model_without_batch_norms_is_refused() -> None:
    method = AdaptiveBatchNorm(AdabnSettings())
    with pytest.raises(UserError, match="policy_backbone"):
        method.choose(build_retriever())
    resnet = nn.Module()
    resnet.clip = on_meta("RN50")
    method.choose(resnet)
    with pytest.raises(UserError, match=r"ViT-B/32.*policy_backbone"):
        load_config(None, {"peft": {"method": "adabn"}, "policy_backbone": "raw"})

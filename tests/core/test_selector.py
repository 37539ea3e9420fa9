"""The selector: temporal encoders and scorer compared with numpy, and the frames that follow from the scores."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adaclip_finetune.config import load_config
from adaclip_finetune.model.hard_topk import annealed_k, select_frames, selection_temperature
from adaclip_finetune.model.selector import FrameSelector, RecurrentEncoder, TransformerEncoder

B, N, F, H = 2, 5, 7, 64


def build(**settings: Any) -> FrameSelector:
    config = load_config(None, {"num_frm": N, "top_k": 2, "hidden_dim": H, "mlp_hidden_dim": 16, **settings})
    torch.manual_seed(0)
    return FrameSelector(config, None, F).eval()


def features(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, N, F, dtype=dtype, generator=torch.Generator().manual_seed(1))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def numpy_lstm(x: np.ndarray, state: dict[str, np.ndarray], suffix: str) -> np.ndarray:
    """Return the hidden states (N, H) of one direction of an LSTM over x (N, F), with gates in the order i, f, g, o."""
    w, u, a, b = (state[f"{part}_l0{suffix}"] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h = c = np.zeros(u.shape[1])
    out = []
    for frame in x:
        i, f, g, o = np.split(w @ frame + a + u @ h + b, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.stack(out)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_encoders(bidirectional: bool) -> None:
    encoder = RecurrentEncoder(F, 6, bidirectional).double()
    state = {name: tensor.detach().numpy() for name, tensor in encoder.rnn.named_parameters()}
    x = features(torch.float64)
    out = encoder(x).detach().numpy()
    assert out.shape == (B, N, 6)
    for row in range(B):
        expected = numpy_lstm(x[row].numpy(), state, "")
        if bidirectional:
            backward = numpy_lstm(x[row].numpy()[::-1], state, "_reverse")[::-1]
            expected = (expected + backward) / 2
        np.testing.assert_allclose(out[row], expected, atol=1e-12)


def layer_norm(x: np.ndarray, gain: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * gain + bias


def test_transformer_encoder() -> None:
    torch.manual_seed(0)
    encoder = TransformerEncoder(F, 128, N).double()  # two heads
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    p = {name: tensor.detach().numpy() for name, tensor in encoder.named_parameters()}
    block = "transformer.resblocks.0."
    x = features(torch.float64)
    for row, out in zip(x.numpy(), encoder(x).detach().numpy(), strict=True):
        h = row @ p["projection.weight"].T + p["projection.bias"] + p["positions.weight"]
        normed = layer_norm(h, p[block + "ln_1.weight"], p[block + "ln_1.bias"])
        q, k, v = np.split(normed @ p[block + "attn.in_proj_weight"].T + p[block + "attn.in_proj_bias"], 3, axis=-1)
        heads = []
        for head in (slice(0, 64), slice(64, 128)):
            scores = q[:, head] @ k[:, head].T / 8
            weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            heads.append(weights @ v[:, head])
        h = h + np.concatenate(heads, -1) @ p[block + "attn.out_proj.weight"].T + p[block + "attn.out_proj.bias"]
        normed = layer_norm(h, p[block + "ln_2.weight"], p[block + "ln_2.bias"])
        hidden = normed @ p[block + "mlp.c_fc.weight"].T + p[block + "mlp.c_fc.bias"]
        hidden = hidden * sigmoid(1.702 * hidden)
        h = h + hidden @ p[block + "mlp.c_proj.weight"].T + p[block + "mlp.c_proj.bias"]
        np.testing.assert_allclose(out, h, atol=1e-10)


@pytest.mark.parametrize("mlp_type", ["mlp", "fc"])
def test_the_frames_with_the_highest_scores_are_selected(mlp_type: str) -> None:
    selector = build(use_rnn=False, mlp_type=mlp_type, top_k=3).double()
    p = [tensor.detach().numpy() for tensor in selector.scorer.parameters()]
    x = features(torch.float64).numpy()
    if mlp_type == "mlp":
        x = np.maximum(x @ p[0].T + p[1], 0)
    logits = (x @ p[-2].T + p[-1])[..., 0]
    selection = selector(features(torch.float64))
    np.testing.assert_allclose(selection.logits.detach(), logits, atol=1e-12)
    assert selection.indices.tolist() == np.argsort(-logits, axis=1)[:, :3].tolist()
    assert torch.equal(selection.weights.argmax(dim=-1), selection.indices)


@pytest.mark.parametrize("rnn", ["transformer", "lstm", "bilstm"])
def test_gradients_of_scores_reach_the_whole_selector(rnn: str) -> None:
    selector = build(rnn=rnn).train()
    selector.temperature = 1.0
    selection = selector(features())
    (selection.weights * torch.randn(B, 2, N, generator=torch.Generator().manual_seed(2))).sum().backward()
    for name, parameter in selector.named_parameters():
        # A bias that is equal for all frames cannot change the selection.
        if not name.startswith("scorer.2.bias"):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_scores_are_float32_under_autocast() -> None:
    selector = build()
    expected = selector(features()).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        selection = selector(features().bfloat16().float())
        logits = selector(features()).logits
    assert selection.logits.dtype == selection.weights.dtype == torch.float32
    assert torch.equal(logits, expected)


def test_k_and_temperature_follow_the_epochs_in_training_only() -> None:
    schedule = {"warmup_epochs": 2, "num_epochs": 3, "init_tau": 5.0, "min_tau": 0.5, "exp_decay_factor": 0.045}
    selector = build(**schedule)
    x, noise = features(), -torch.empty(B, N).exponential_(generator=torch.Generator().manual_seed(3)).log()
    for epoch in (0, 2, 1):
        selector.start_epoch(epoch)
        k, temperature = annealed_k(epoch, N, 2, 2), selection_temperature(epoch, 5.0, 0.5, 0.045)
        assert (selector.k, selector.temperature) == (k, temperature)
        selection = selector.train()(x, noise)
        expected = select_frames(selection.logits, k, temperature, noise)
        assert torch.equal(selection.indices, expected.indices) and selection.indices.shape == (B, k)
        assert torch.equal(selection.weights, expected.weights)
        assert selector.eval()(x, noise).indices.tolist() == selection.logits.argsort(descending=True)[:, :2].tolist()
    fresh = build(**schedule)
    assert (fresh.k, fresh.temperature) == (annealed_k(0, N, 2, 2), 5.0)

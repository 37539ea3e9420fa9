"""Checkpoints of CLIP-ViP, CenterCLIP and DGL: recognised, read under our names, usable without further settings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_clip
from safetensors.torch import load_file
from torch import Tensor

from adaclip_finetune import load_retriever
from adaclip_finetune.cli import main
from adaclip_finetune.config import load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.training.session import find_checkpoint, open_model
from adaclip_finetune.weights.checkpoints import read_checkpoint
from adaclip_finetune.weights.huggingface import to_huggingface_names

Project = dict[str, Any]

CLIP = build_tiny_clip(seed=5).state_dict()
WIDTH, BLOCKS, TEXT_WIDTH = 64, 2, 64
NUMBERS = torch.arange(5).reshape(1, 5)  # position_ids, a buffer that is no weight


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def clip_vip(folder: Path) -> Path:
    """Write a checkpoint as CLIP-ViP does: transformers' names below `clipmodel.`."""
    named = to_huggingface_names(CLIP)
    assert named is not None
    embeddings = "vision_model.embeddings."
    state = {
        **named,
        f"{embeddings}added_cls": random(3, WIDTH),
        f"{embeddings}temporal_embedding": random(1, 4, WIDTH),
    }
    state |= {f"{embeddings}position_ids": NUMBERS, "text_model.embeddings.position_ids": NUMBERS}
    torch.save({f"clipmodel.{name}": tensor for name, tensor in state.items()}, folder / "pretrain_clipvip.pt")
    return folder / "pretrain_clipvip.pt"


def center_clip(folder: Path, embedded: bool = False, **options: Any) -> Path:
    """Write a checkpoint as CenterCLIP does, with its options beside it."""
    state = {f"module.clip.{name}": tensor for name, tensor in CLIP.items()}
    state["module.clip.visual.position_ids"] = NUMBERS
    if embedded:
        state["module.clip.visual.transformer.resblocks.1.tokencluster_inter.cluster_embed"] = random(3, WIDTH)
    content = {"epoch": 3, "arch": "CLIp4Clip", "state_dict": state, "best_acc1": 44.0, "optimizer": {}, "scaler": {}}
    torch.save(content, folder / "ckpt.best.pth.tar")
    given = {"cluster_algo": "kmediods++", "target_frames_blocks": [6, 2], "cluster_num_blocks": [4, 3]}
    given |= {"max_frames": 6, "max_words": 32, "minkowski_norm_p": 1.0, "cluster_embedding": int(embedded), **options}
    (folder / "hparams_train.json").write_text(json.dumps(given))
    return folder / "ckpt.best.pth.tar"


def dgl(folder: Path, generator: str = "linear") -> Path:
    """Write a checkpoint as DGL does: CLIP with prompts in it."""
    state = {**CLIP, "visual.prompt_embeddings": random(1, 4, WIDTH), "visual.position_ids": NUMBERS}
    if generator == "linear":
        state["visual_prompt_embedding"] = random(1, 4, BLOCKS * WIDTH)
        for place in ("prefix", "postfix"):
            state[f"{place}_text_prompt_proj_layer.weight"] = random(TEXT_WIDTH, WIDTH)
            state[f"{place}_text_prompt_proj_layer.bias"] = random(TEXT_WIDTH)
    else:
        state["unified_prompt_embedding.weight"] = random(8 + 4 * 6, BLOCKS * WIDTH)
        own = (name.split(".", 3) for name in CLIP if name.startswith("visual.transformer.resblocks.0."))
        mixed = ["visual.transformer.resblocks.0." + parts[3].split(".", 1)[1] for parts in own]
        for name in mixed:
            state[name.replace("visual.transformer", "PromptTransformer")] = random(*CLIP[name].shape)
        for layer, shape in (("c_fc", (2 * WIDTH, WIDTH)), ("c_proj", (TEXT_WIDTH, 2 * WIDTH))):
            place = f"unified_prompt_mlp.{layer}"
            state |= {f"{place}.weight": random(*shape), f"{place}.bias": random(shape[0])}
    torch.save({"state_dict": {f"module.clip.{name}": tensor for name, tensor in state.items()}}, folder / "ckpt.pth")
    return folder / "ckpt.pth"


WRITERS = {
    "CLIP-ViP": clip_vip,
    "CenterCLIP": center_clip,
    "CenterCLIP with cluster embedding": lambda folder: center_clip(folder, embedded=True),
    "CenterCLIP, spectral": lambda folder: center_clip(folder, cluster_algo="spectral", spectral_graph="KNN"),
    "CenterCLIP without clustering": lambda folder: center_clip(folder, cluster_inter=0),
    "DGL": dgl,
    "DGL by a transformer": lambda folder: dgl(folder, "transformer"),
}
TOWERS: dict[str, dict[str, Any]] = {
    "CLIP-ViP": {
        "method": "proxy_tokens",
        "config": {"num_proxies": 4, "temporal_size": 4, "temporal_embedding": True},
    },
    "CenterCLIP": {
        "method": "clustering",
        "config": {"stages": [{"block": 1, "segments": 2, "tokens": 3}], "algorithm": "kmedoids", "norm_p": 1.0},
    },
    "CenterCLIP with cluster embedding": {"method": "clustering", "config": {"cluster_embedding": "normal"}},
    "CenterCLIP, spectral": {
        "method": "clustering",
        "config": {"algorithm": "spectral", "graph": "knn"},
    },
    "CenterCLIP without clustering": {"method": "per_frame"},
    "DGL": {"method": "global_local", "config": {"generator": "linear", "local_prompts": 4, "postfix_prompts": True}},
    "DGL by a transformer": {"method": "global_local", "config": {"generator": "transformer", "frames": 6}},
}


@pytest.mark.parametrize("case", WRITERS)
def test_settings_follow_from_the_file_and_all_of_its_tensors_are_used(case: str, tmp_path: Path) -> None:
    checkpoint, config = find_checkpoint(WRITERS[case](tmp_path), {"device": "cpu"})
    assert checkpoint.is_foreign and checkpoint.system == case.partition(",")[0].partition(" ")[0]
    given, tower = TOWERS[case], config.model_dump(mode="json")["tower"]
    assert tower["method"] == given["method"] and tower["config"].items() >= given.get("config", {}).items()
    state = open_model(config, checkpoint, learn=False).model.state_dict()
    for name, tensor in CLIP.items():
        torch.testing.assert_close(state[f"clip.{name}"], tensor, rtol=0, atol=0)
    added = {name: tensor for name, tensor in state.items() if name.startswith("tower.")}
    assert added.keys() == {name for name in checkpoint.state if name.startswith("tower.")}
    assert all(torch.equal(tensor, checkpoint.state[name]) for name, tensor in added.items())
    raw = torch.load(next(tmp_path.glob("*.p*t*")), weights_only=True)
    total = sum(tensor.numel() for tensor in raw.get("state_dict", raw).values() if tensor.is_floating_point())
    assert total == sum(tensor.numel() for tensor in state.values()), "no number of the file is lost"


def test_prompts_lie_in_the_places_of_their_blocks(tmp_path: Path) -> None:
    state = read_checkpoint(dgl(tmp_path)).state
    table = random(1, 4, BLOCKS * WIDTH)
    assert torch.equal(state["tower.prompts.table"][1, 2], table[0, 2, WIDTH : 2 * WIDTH])


@pytest.mark.parametrize("case", ["CLIP-ViP", "CenterCLIP", "DGL"])
def test_it_is_evaluated_searched_and_trained_on(
    case: str, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = WRITERS[case](tmp_path)
    data = [f"--{name}={project[name]}" for name in ("frames_dir", "clip_weights", "num_workers", "device")]
    assert main(["evaluate", str(path), "--annot", str(project["test_annot"]), *data]) == 0
    vectors = load_retriever(path, device="cpu").encode_text(["a red thing"])
    assert vectors.shape == (1, 64) and bool(vectors.isfinite().all())
    _, config = find_checkpoint(path, {})
    settings = {name: config.model_dump(mode="json")[name] for name in ("tower", "use_policy", "frame_agg", "num_frm")}
    content = {**project, **settings, "num_epochs": 1, "resume": str(path), "output_dir": str(tmp_path / "out")}
    (tmp_path / "c.json").write_text(json.dumps(content))
    assert main(["train", "--config", str(tmp_path / "c.json")]) == 0
    assert f"is a published {case} checkpoint" in capsys.readouterr().out
    (best,) = (tmp_path / "out").rglob("best.safetensors")
    assert load_file(best).keys() == open_model(config, read_checkpoint(path), learn=False).model.state_dict().keys()


def test_options_beside_a_checkpoint_that_are_none_are_refused(tmp_path: Path) -> None:
    path = center_clip(tmp_path)
    (tmp_path / "hparams_train.json").write_text("{}")
    with pytest.raises(UserError, match=r"hparams_train\.json: not the settings of a CenterCLIP run"):
        read_checkpoint(path)


def test_a_tower_that_does_not_fit_is_named_with_the_way_out(tmp_path: Path) -> None:
    config = load_config(None, {"use_policy": False, "tower": {"method": "proxy_tokens", "config": {"num_proxies": 2}}})
    with pytest.raises(UserError, match=r"(?s)tower\.proxies.*--tower\.config\.num_proxies 4"):
        open_model(config, read_checkpoint(clip_vip(tmp_path)))

"""Try every backbone of docs/backbones.md with everything that works on CLIP, and print the table.

    python scripts/backbones.py                 all of them
    python scripts/backbones.py PE-Core-B-16:meta SigLIP2

Nothing is downloaded: weights are random, and each model is built under its own name with one block in each tower and a
vocabulary of at most 49,408 words; structure, names of tensors, preprocessing and loss are its own. A file takes the
place of what the hub would give. Each model must load by name, by file and by folder, have its own tokenizer and
preprocessing, take a training step with BitFit, with LoRA and with full finetuning, and be evaluated, indexed and
exported.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import open_clip
import timm
import torch
from open_clip import factory
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from adaclip_finetune import load_retriever
from adaclip_finetune.config import load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.export import export
from adaclip_finetune.model.vit import tower_blocks, vision_view
from adaclip_finetune.training.session import open_model
from adaclip_finetune.training.trainer import fit
from adaclip_finetune.weights.clip_weights import resolve_backbone

BACKBONES = [
    "ViT-B/32",
    "ViT-B-32:datacomp_xl_s13b_b90k",
    "ViT-B-32:metaclip_fullcc",
    "ViT-B/16",
    "ViT-B-16:dfn2b",
    "ViT-B-16:metaclip_fullcc",
    "ViT-L/14",
    "ViT-L-14:datacomp_xl_s13b_b90k",
    "ViT-L-14:dfn2b",
    "ViT-L-14:metaclip_fullcc",
    "PE-Core-T-16-384:meta",
    "PE-Core-S-16-384:meta",
    "PE-Core-B-16:meta",
    "PE-Core-L-14-336:meta",
    "ViT-B-32-SigLIP2-256:webli",
    "ViT-B-16-SigLIP2-256:webli",
    "ViT-L-16-SigLIP2-256:webli",
    "ViT-SO400M-14-SigLIP2:webli",
    "MobileCLIP2-S0:dfndr2b",
    "MobileCLIP2-S2:dfndr2b",
    "MobileCLIP2-B:dfndr2b",
    "EVA02-B-16:merged2b_s8b_b131k",
    "EVA02-L-14:merged2b_s4b_b131k",
    "ViT-H-14-worldwide:metaclip2_worldwide",
]
CAPTIONS = ["a red thing", "something green", "it is blue", "all grey"]
WORDS = sorted({word for caption in CAPTIONS for word in caption.split()} | {"video"})
COLUMNS = ["size", "text", "loss", "blockwise towers", "BitFit", "LoRA", "full", "word_agg", "index", "export"]


def main() -> int:
    """Print the table; return the exit code 1 if one of the backbones failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="backbones whose name contains one of these; default: all")
    names = parser.parse_args().names or [""]
    print("| `clip_backbone` | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    failed = False
    for backbone in BACKBONES:
        if any(name in backbone for name in names):
            try:
                with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
                    row = try_out(backbone, Path(folder))
                print(f"| `{backbone}` | " + " | ".join(row[column] for column in COLUMNS) + " |", flush=True)
            except Exception:
                failed = True
                print(f"| `{backbone}` | failed |", flush=True)
                traceback.print_exc()
    return int(failed)


def try_out(backbone: str, folder: Path) -> dict[str, str]:
    """Return the row of a backbone. Raise an error if something that should work does not."""
    data = _write_data(folder)
    with shrunk(backbone, folder) as weights:
        base = load_config(None, {**data, "clip_backbone": backbone})
        session = open_model(base, values="random")
        module, loaded = session.model.clip, session.loaded
        save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, weights)
        expected = _vectors(session.model, loaded)

        by_name = open_model(base)
        torch.testing.assert_close(_vectors(by_name.model, by_name.loaded), expected)
        by_file = open_model(load_config(None, {**data, "clip_backbone": backbone, "clip_weights": str(weights)}))
        torch.testing.assert_close(_vectors(by_file.model, by_file.loaded), expected)
        tag = open_clip.get_pretrained_cfg(*_name_and_tag(backbone))
        assert loaded.image.mean == tuple(tag["mean"]) and loaded.image.std == tuple(tag["std"])
        assert loaded.image.interpolation == tag["interpolation"] and loaded.image.resize_mode == tag["resize_mode"]

        row = {"size": str(loaded.image.size), "text": _text(loaded)}
        row["loss"] = type(session.objective).__name__.lower()
        row["blockwise towers"] = _works(lambda: vision_view(module))
        row["word_agg"] = _works(
            lambda: open_model(
                load_config(None, {**data, "clip_backbone": backbone, "word_agg": "mlp", "frame_agg": None}),
                values="random",
            ).model.encode_text(loaded.tokenize(CAPTIONS, 16))
        )
        run = None
        for column, peft in _methods(module).items():
            settings = {**data, "clip_backbone": backbone, "peft": peft, "output_dir": str(folder / column)}
            run = fit(load_config(None, settings)).folder
            assert run is not None
            moved = _moved(load_file(run / "best.safetensors"), load_file(weights))
            assert moved, f"{column} changed nothing"
            towers = peft.get("config", {}).get("towers")
            row[column] = "yes" if towers is None else f"{towers} tower"
        assert run is not None
        model = load_retriever(run)
        vector, _, _ = model.encode_video(_clip(folder))
        assert vector.shape == (model.width,) and bool(vector.isfinite().all())
        row["index"] = "yes"
        forms = []
        for form in ("open_clip", "huggingface"):
            target = folder / f"exported-{form}"
            if _works(lambda form=form, target=target: export(run, form, target)) == "yes":
                forms.append(form)
        assert "open_clip" in forms
        exported = load_config(None, {**data, "clip_weights": str(folder / "exported-open_clip")})
        assert exported.clip_weights is not None
        again = open_model(exported)
        torch.testing.assert_close(again.model.clip.state_dict(), dict(model.model.clip.state_dict()))
        row["export"] = ", ".join(forms)
    return row


@contextmanager
def shrunk(backbone: str, folder: Path) -> Iterator[Path]:
    """Let open_clip build this backbone with one block in each tower, and take the yielded file for the hub's."""
    name, _ = _name_and_tag(backbone)
    weights = folder / "weights.safetensors"
    configs = {}
    for known in {name, name.removesuffix("-quickgelu")}:
        model_cfg = copy.deepcopy(open_clip.get_model_config(known))
        model_cfg["text_cfg"]["layers"] = 1
        if "layers" in model_cfg["vision_cfg"]:
            model_cfg["vision_cfg"]["layers"] = 1
        if "hf_tokenizer_name" in model_cfg["text_cfg"]:
            model_cfg["text_cfg"]["hf_tokenizer_name"] = str(_write_tokenizer(folder / "tokenizer-of-the-hub"))
            model_cfg["text_cfg"]["vocab_size"] = 49408
        configs[known] = model_cfg
    build = timm.create_model

    def build_shallow(model_name: str, **options: Any) -> Any:
        depth = {"layers": (1, 1, 1, 1)} if model_name.startswith("fastvit") else {"depth": 1}
        return build(model_name, **options, **depth)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(factory._MODEL_CONFIGS, configs))
        stack.enter_context(mock.patch.object(timm, "create_model", build_shallow))
        stack.enter_context(mock.patch.object(open_clip, "download_pretrained", lambda *_, **__: str(weights)))
        yield weights


def _name_and_tag(backbone: str) -> tuple[str, str]:
    name, tag = resolve_backbone(backbone)
    assert tag is not None
    return name, tag


def _methods(module: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Return the methods to try. LoRA is put into the towers that have transformer blocks."""
    where = {"image": _works(lambda: vision_view(module)), "text": _works(lambda: tower_blocks(module, "text"))}
    towers = [tower for tower, works in where.items() if works == "yes"]
    lora: dict[str, Any] = {"rank": 2} | ({} if len(towers) == 2 else {"towers": towers[0]})
    return {
        "BitFit": {"method": "bitfit"},
        "LoRA": {"method": "lora", "config": lora},
        "full": {"method": "full"},
    }


def _works(action: Callable[[], object]) -> str:
    try:
        action()
    except UserError:
        return "no"
    return "yes"


def _text(loaded: Any) -> str:
    kind = "CLIP's own" if isinstance(loaded.tokenize.encode, open_clip.SimpleTokenizer) else "own files"
    return f"{loaded.context_length} tokens, {kind}"


def _vectors(model: Any, loaded: Any) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.randn(2, 3, loaded.image.size, loaded.image.size, generator=torch.Generator().manual_seed(0))
    model.eval()
    with torch.no_grad():
        text = model.encode_text(loaded.tokenize(CAPTIONS, 16)).sentence
        return model.clip.encode_image(pixels), text


def _moved(state: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, tensor in before.items() if not torch.equal(tensor, state[f"clip.{name}"])]


def _write_data(folder: Path) -> dict[str, Any]:
    """Write four videos of four frames as images; return the settings of a run on them."""
    annotation = {}
    for number, (caption, colour) in enumerate(zip(CAPTIONS, [(220, 30, 30), (30, 200, 40), (30, 40, 220), (99,) * 3],
                                                   strict=True)):  # fmt: skip
        frames = folder / "frames" / f"video{number}"
        frames.mkdir(parents=True)
        for index in range(1, 5):
            pixels = np.random.default_rng(index).integers(-20, 20, (40, 48, 3)) + colour
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(frames / f"image_{index:05d}.jpg")
        annotation[f"video{number}"] = {"sentences": [caption]}
    (folder / "annotation.json").write_text(json.dumps(annotation))
    annotations = {f"{split}_annot": str(folder / "annotation.json") for split in ("train", "val", "test")}
    return {
        **annotations,
        "frames_dir": str(folder / "frames"),
        "policy_backbone": "raw",
        "rescale_size": 8,
        "hidden_dim": 64,
        "num_frm": 2,
        "top_k": 1,
        "frame_agg": "mlp",
        "batch_size": 4,
        "num_epochs": 1,
        "num_workers": 0,
        "max_txt_len": 16,
        "learning_rate": 1e-3,
        "coef_lr": 1.0,
        "no_warmup": True,
        "device": "cpu",
    }


def _clip(folder: Path) -> Path:
    """Write a short video file."""
    import av

    path = folder / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for level in (10, 90, 170, 250):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _write_tokenizer(folder: Path) -> Path:
    """Write files of a Hugging Face tokenizer in place of a backbone's own, with one token per word."""
    if not folder.is_dir():
        special = ["<s>", "<pad>", "</s>", "<unk>"]
        vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
        )
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    sys.exit(main())

"""Runs on the Hugging Face Hub: `hf:owner/name` stands for a run folder there, of a revision with `@revision`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import read_json

_PREFIX = "hf:"
_WEIGHTS, _CONFIG, _METRICS = "best.safetensors", "config.json", "metrics.json"
_FILES = (_WEIGHTS, _CONFIG, _METRICS, "curves.png", "tokenizer/*")
_CARD = "README.md"


def on_hub(source: str | Path) -> bool:
    """Return whether `source` names a run on the hub."""
    return str(source).startswith(_PREFIX)


def local_run(source: str | Path) -> Path:
    """Return the folder of a run, which is first downloaded to the cache if it is on the hub. Raise UserError."""
    if not on_hub(source):
        return Path(source)
    name, _, revision = Path(source).as_posix().removeprefix(_PREFIX).partition("@")

    from huggingface_hub import snapshot_download

    with _explained(str(source)):
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=[*_FILES, _CARD]))
    if not (folder / _WEIGHTS).is_file():
        raise UserError(f"{source}: holds no {_WEIGHTS}, so `adaclip push` did not make it")
    return folder


def push(run: Path, repository: str, private: bool = False) -> str:
    """Upload the weights, settings and figures of a finished run, with a card made of them; return its address.

    The repository, `owner/name`, is made if there is none. Raise UserError.
    """
    card = model_card(run, repository)

    from huggingface_hub import CommitOperationAdd, HfApi

    paths = sorted(path for pattern in _FILES for path in run.glob(pattern))
    files = [CommitOperationAdd(path.relative_to(run).as_posix(), path) for path in paths]
    files.append(CommitOperationAdd(_CARD, card.encode()))
    with _explained(repository):
        api = HfApi()
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(made.repo_id, files, commit_message="Upload a run of adaclip-finetune")
    return str(made)


def model_card(run: Path, repository: str) -> str:
    """Return the README.md of a run on the hub: what it is, its figures with intervals, and how to use it.

    Raise UserError if the folder holds no finished run.
    """
    if missing := [name for name in (_WEIGHTS, _CONFIG, _METRICS) if not (run / name).is_file()]:
        raise UserError(f"{run}: not the folder of a finished run: {missing[0]} not found")
    config, metrics = (read_json(run / name) for name in (_CONFIG, _METRICS))
    if not isinstance(metrics.get("finetuned"), dict):
        raise UserError(f"{run}: its metrics.json holds no figures of a finetuned model")

    from huggingface_hub import ModelCardData

    about = ModelCardData(library_name="adaclip-finetune", tags=["video-retrieval", "clip", config["task"]["method"]])
    return "\n".join(["---", about.to_yaml(), "---", *_card_lines(config, metrics, repository), ""])


def _card_lines(config: Mapping[str, Any], metrics: Mapping[str, Any], repository: str) -> Iterator[str]:
    yield f"# {repository.rpartition('/')[2]}"
    yield ""
    frames = f"{config['top_k']} frames that it chooses among {config['num_frm']}"
    if not config["use_policy"]:
        frames = f"{config['num_frm']} uniform frames"
    clip = Path(config["clip_weights"]).name if config["clip_weights"] else config["clip_backbone"]
    yield (
        f"A CLIP ({clip}) for videos, finetuned with adaclip-finetune by the method `{config['peft']['method']}`. Of a "
        f"video it sees {frames}."
    )
    parts = metrics["parameters"].values()
    trained, total = (sum(part[name] for part in parts) for name in ("trainable", "total"))
    yield f"{trained:,} of {total:,} parameters were trained."
    yield ""
    yield from _figures(metrics)
    yield ""
    yield from ("## Use", "", "```python", "from adaclip_finetune import load_retriever", "")
    yield f'model = load_retriever("{_PREFIX}{repository}")'
    yield from ('vectors = model.encode_text(["a dog runs in the snow"])', "```", "")
    yield from ("```", f"adaclip index {_PREFIX}{repository} my/videos -o my.index", "")
    yield from ('adaclip search my.index "a dog runs in the snow"', "```")


def _figures(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table of the figures, with those of zero-shot beside them, and on what they were measured."""
    before, after = (dict(_flat(metrics.get(name) or {})) for name in ("zero_shot", "finetuned"))
    intervals = metrics.get("intervals", {})
    yield from ("| | finetuned | 95 % | zero-shot |", "|---|---|---|---|")
    for name, figure in after.items():
        between = "[{:.1f}, {:.1f}]".format(*intervals[name]) if name in intervals else ""
        zero_shot = f"{before[name]:.1f}" if name in before else ""
        yield f"| {name} | {figure:.1f} | {between} | {zero_shot} |"
    yield ""
    where = f"Measured on the {metrics['evaluated_on']} split; the best epoch was chosen on {metrics['selected_on']}."
    yield where + (" The figures are optimistic." if metrics["evaluated_on"] == metrics["selected_on"] else "")
    yield "Intervals are drawn by video (bootstrap)."


def _flat(figures: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    """Yield figures by their dotted names, without counts and without those of single tags or classes."""
    for name, figure in figures.items():
        if isinstance(figure, dict) and name in ("t2v", "v2t"):
            yield from _flat(figure, f"{name}.")
        elif isinstance(figure, float):
            yield before + name, figure


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what can go wrong between here and the hub into a UserError."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{what}: the Hugging Face Hub says: {reason}\nCheck the name (owner/name) and the connection; `hf auth "
            "login` gives access to what is private or your own"
        ) from error

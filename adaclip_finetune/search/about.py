"""index.json: where the model and the videos of an index lie, and what its vectors are."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from adaclip_finetune.config import Config
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import parse_json

FORMAT = "adaclip-index/2"
KINDS = ("flat", "hnsw")
DTYPES = ("float32", "float16")
REMAKE = "remove the index, and make it anew"

_SECTIONS = ("peft", "optuna_cfg")


@dataclass(frozen=True)
class Recall:
    """What is still found by an index that is not exact."""

    share: float  # 0…1, of the 10 nearest
    by: str  # what says which are the nearest, in words
    asked: str  # what was asked for, in words
    videos: int  # how many there were


@dataclass(frozen=True)
class About:
    """What there is to tell of an index."""

    fingerprint: str  # of the model
    run: str  # a run folder or a checkpoint, absolute
    settings: dict[str, Any]  # what was given beside the run to load it: clip_weights, say
    source: str  # the folder or annotation that was indexed, absolute
    root: str  # the folder that the videos' files lie in, absolute
    kind: str  # flat or hnsw
    dtype: str  # float32 or float16
    made: str  # ISO 8601
    changed: str
    recall: Recall | None = None  # None: it is exact, or too small to miss anything


class Digests(NamedTuple):
    """SHA-256 of what belongs to it."""

    vectors: str
    videos: str


def about_to_json(about: About, digests: Digests, shape: tuple[int, int]) -> bytes:
    """Never the same twice, so that whoever has read it can tell that another one was written."""
    content = {"format": FORMAT, **asdict(about), "count": shape[0], "width": shape[1]}
    return json.dumps(content | {"sha256": digests._asdict(), "version": secrets.token_hex(8)}, indent=1).encode()


def about_of_json(content: bytes, where: Path) -> tuple[About, Digests]:
    """Raises UserError where that is not what this version wrote."""
    try:
        facts = parse_json(content.decode("utf-8", "replace"), str(where))
    except UserError as error:
        raise UserError(f"{error}: {REMAKE}") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        found = facts.get("format") if isinstance(facts, dict) else facts
        raise UserError(f"{where}: has the format {found!r}; this version of adaclip reads {FORMAT}: {REMAKE}")
    texts = ("fingerprint", "run", "source", "root", "kind", "dtype", "made", "changed")
    wrong = [name for name in texts if not isinstance(facts.get(name), str)]
    wrong += [name for name in ("settings", "sha256") if not isinstance(facts.get(name), dict)]
    if wrong:
        raise UserError(f"{where}: {', '.join(wrong)} is missing or of another type: {REMAKE}")
    if facts["kind"] not in KINDS or facts["dtype"] not in DTYPES:
        raise UserError(f"{where}: kind {facts['kind']!r} or dtype {facts['dtype']!r} is not known here")
    if told := _wrong(facts["settings"]):
        raise UserError(f"{where}: not as adaclip writes it ({told}): {REMAKE}")
    try:
        recall = None if facts["recall"] is None else _recall(**facts["recall"])
        digests = Digests(**facts["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not as adaclip writes it ({error!r}): {REMAKE}") from error
    return About(**{name: facts[name] for name in (*texts, "settings")}, recall=recall), digests


def _wrong(settings: dict[str, Any]) -> str:
    """What no run's settings could be laid under; empty if there is nothing. Sections may be given in part, and two
    settings may contradict each other until a third is there: that is told where they come together."""
    whole = {name: value for name, value in settings.items() if name.partition(".")[0] not in _SECTIONS}
    try:
        Config.model_validate(whole)
    except ValidationError as error:
        problems = [problem for problem in error.errors() if problem["loc"]]
        return "; ".join(f"settings.{problem['loc'][0]}: {problem['msg']}" for problem in problems)
    return ""


def _recall(share: Any, by: Any, asked: Any, videos: Any) -> Recall:
    return Recall(float(share), str(by), str(asked), int(videos))

"""docs/search.md against what it tells of."""

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from adaclip_finetune.config.optuna import OptunaSettings, SamplerSettings, SearchSpace

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("title", "settings"),
    [
        ("### `optuna_cfg`", OptunaSettings),
        ("### `optuna_cfg.sampler`", SamplerSettings),
        ("### `optuna_cfg.opt_params.<setting>`", SearchSpace),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_tables_are_those_of_the_schema(title: str, settings: type[BaseModel]) -> None:
    table = PAGE.split(f"{title}\n\n")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", table, flags=re.MULTILINE)
    assert rows == [
        (name, _default(name, field.is_required(), field.default), field.description)
        for name, field in settings.model_fields.items()
    ]


def _default(name: str, required: bool, default: object) -> str:
    if required:
        return "must be given"
    if name == "sampler":
        return str(SamplerSettings().name)
    return default if isinstance(default, str) else json.dumps(default)


def test_the_example_is_the_demo_s() -> None:
    words = re.search(r'^    "optuna_cfg": (\{.*?^    \})', PAGE, flags=re.MULTILINE | re.DOTALL)
    assert words is not None
    assert json.loads(words[1]) == json.loads((ROOT / "cfgs" / "demo-optuna.json").read_text())["optuna_cfg"]

"""Random settings files and command lines give a Config or a UserError, never another exception."""

import json
import string
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaclip_finetune import cli
from adaclip_finetune.commands import train as train_command
from adaclip_finetune.config import Config, load_config
from adaclip_finetune.config.schema import described
from adaclip_finetune.errors import UserError

ROOT = Path(__file__).parents[2]
NAMES = list(described(Config))
RECIPES = [
    json.loads(path.read_text())
    for path in sorted((ROOT / "cfgs").glob("*.json"))
    if path.name != "schema.json" and not path.name.startswith("compare-")
]
FAST = settings(deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))

WORDS = ["none", "true", "False", "bitfit", "ibs", "method", "config", "range", "log", "", "\ud800", "\x00", "~"]
scalars = st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=12)
scalars |= st.sampled_from(WORDS)
keys = st.one_of(st.sampled_from(NAMES), st.sampled_from(WORDS), st.text(max_size=12))
junk = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8
)


def loads_or_is_refused(path: Path | None, overrides: dict[str, Any] | None = None) -> None:
    """Check that loading gives a Config or a UserError with a message."""
    try:
        assert isinstance(load_config(path, overrides or {}), Config)
    except UserError as error:
        assert str(error).strip()
        assert "Traceback" not in str(error)


@FAST
@given(st.dictionaries(keys, junk, max_size=5))
def test_junk_objects(data: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "junk.json"
        path.write_text(json.dumps(data))
        loads_or_is_refused(path)


@FAST
@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:0123456789.eE-+nulltrefasNI \\', max_size=60).map(str.encode))
def test_junk_bytes(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "junk.json"
        path.write_bytes(content)
        loads_or_is_refused(path)


@FAST
@given(st.sampled_from(RECIPES), st.lists(st.tuples(keys, junk), min_size=1, max_size=4), st.booleans())
def test_mutated_recipes(recipe: dict[str, Any], changes: list[tuple[str, Any]], nested: bool) -> None:
    changed = json.loads(json.dumps(recipe))
    for name, value in changes:
        part = changed.get("peft") if nested else changed
        part = part.get("config", part) if nested and isinstance(part, dict) and len(name) % 2 else part
        if isinstance(part, dict):
            part[name.split(".")[-1] if nested else name] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated.json"
        path.write_text(json.dumps(changed))
        loads_or_is_refused(path)


@FAST
@given(st.dictionaries(keys | st.lists(keys, min_size=1, max_size=3).map(".".join), junk, max_size=4))
def test_junk_overrides(overrides: dict[str, Any]) -> None:
    loads_or_is_refused(None, overrides)


@FAST
@given(
    st.lists(
        st.one_of(
            st.sampled_from(NAMES).map("--{}".format),
            st.tuples(st.sampled_from(NAMES), st.text(max_size=8)).map("--{0[0]}={0[1]}".format),
            st.sampled_from(["--no_policy", "--config", "--dry_run", "--", "-", "-h", "-1", "[", "{}", "cfgs"]),
            st.text(alphabet=string.printable, max_size=8),
            st.sampled_from(WORDS),
        ),
        max_size=6,
    )
)
def test_junk_flags(words: list[str]) -> None:
    def stop(config: Config) -> None:
        raise UserError("a valid config; nothing is trained here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_command, "check_paths", stop)
        assert cli.main(["train", *words]) in ((0, 2) if {"-h", "--help"} & set(words) else (2,))

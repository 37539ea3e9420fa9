"""The settings of mixtures: what is accepted, and what is refused with the reason."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from adaclip_finetune.commands.flags import Parser, add_some_flags, given
from adaclip_finetune.config import Config, load_config
from adaclip_finetune.config.paths import check_paths
from adaclip_finetune.config.roles import deciding_values
from adaclip_finetune.errors import UserError

A, B = {"annotation": "a.json"}, {"annotation": "b.json"}


def test_a_mixture_is_read_back_as_it_was_written() -> None:
    parts = [{**A, "per_batch": 20}, {**B, "per_batch": 12, "video_dir": "videos", "labelled": True}]
    config = load_config(None, {"train_annot": parts})
    assert load_config(None, config.model_dump(mode="json")) == config
    assert load_config(None, {"train_annot": "a.json"}).train_annot == "a.json"


@pytest.mark.parametrize(("parts", "more", "told"), [
    ([], {}, "empty"),
    (["a.json"], {}, r'train_annot\[0\] is "a.json", but must be an object with annotation'),
    ([{}], {}, r"train_annot\[0\].annotation is missing"),
    ([{**A, "weight": 0}], {}, r"train_annot\[0\].weight is 0"),
    ([{**A, "weights": 1}], {}, r"unknown setting train_annot\[0\].weights"),
    ([A, A], {}, r"a\.json 2 times"),
    ([{**A, "subset": 5}, {**A, "subset": 5}], {}, r"a\.json with subset 5 2 times"),
    ([A, {**B, "frames_dir": "f", "video_dir": "v"}], {}, r"train_annot\[1\] has both"),
    ([A, {**B, "video_dir": "v"}], {"video_dir": "v"}, r"train_annot\[1\]\.video_dir is video_dir itself"),
    ([A, {**B, "labelled": False}], {}, r"train_annot\[1\] is not labelled.*objective"),
    ([{**A, "per_batch": 8}, {**B, "weight": 1.0}], {}, "to every part"),
    ([{**A, "per_batch": 8}, B], {}, "to every part"),
    ([{**A, "weight": 8.0}, B], {}, "weight to every part"),
    ([{**A, "per_batch": 8}, {**B, "per_batch": 8}], {}, "sums to 16, but batch_size is 32"),
    ([{**A, "per_batch": 16}, {**B, "per_batch": 16}], {"auto_batch_size": True}, "weight instead of per_batch"),
    ([{**A, "weight": 99.0}, {**B, "weight": 1.0}], {}, r"train_annot\[1\] gets no row of a batch of 32"),
    (
        [{**A, "weight": 7.0}, {**B, "weight": 1.0}],
        {"peft": {"method": "ibs", "config": {"pre_batch_size": 2}}},
        r"train_annot\[1\] gets no row of a batch of 2: .*peft\.config\.pre_batch_size",
    ),
    ([{"annotation": "a.jsonl"}], {"concat_captions": "indep-all"}, r"indep-all .*a\.jsonl"),
    ("a.jsonl", {"concat_captions": "indep-all"}, r"indep-all .*a\.jsonl"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(parts: Any, more: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_config(None, {"train_annot": parts, **more})


def test_missing_files_of_parts_are_named() -> None:
    config = load_config(None, {"train_annot": [{**A, "video_dir": "nowhere"}, {**B, "frames_dir": "gone"}]})
    with pytest.raises(UserError) as refused:
        check_paths(config)
    for name in ("[0].annotation a.json", "[0].video_dir nowhere", "[1].annotation b.json", "[1].frames_dir gone"):
        assert f"train_annot{name}: " in str(refused.value)


@pytest.mark.parametrize(("words", "value"), [
    (['[{"annotation": "a.json"}]'], [A]),
    (["a.json"], "a.json"),
    (["null"], None),
])  # fmt: skip
def test_a_flag_gives_a_file_or_parts(words: list[str], value: Any) -> None:
    parser = Parser("train", "")
    add_some_flags(parser, Config, ["train_annot"], "Data")
    assert given(parser.read(["--train_annot", *words])) == {"train_annot": value}


def test_the_content_of_every_part_decides_the_figures(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in ("a.json", "b.jsonl", "shards/0.tar"):
        (tmp_path / name).write_text(name)
    parts = [{"annotation": str(tmp_path / name)} for name in ("a.json", "b.jsonl", "shards")]
    config = load_config(None, {"train_annot": parts})
    found = [deciding_values(config, ["train_annot"])]
    for name in ("a.json", "b.jsonl", "shards/0.tar"):
        (tmp_path / name).write_text("changed")
        found.append(deciding_values(config, ["train_annot"]))
    assert all(one != other for one, other in pairwise(found))

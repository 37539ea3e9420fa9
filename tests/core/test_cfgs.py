"""Every shipped recipe loads, says what the issue and its README promise, and points to the schema."""

import json
import re
from pathlib import Path

import pytest

from adaclip_finetune.cli import main
from adaclip_finetune.config import Config, load_config

CFGS = Path(__file__).resolve().parents[2] / "cfgs"
GRIDS = sorted(CFGS.glob("compare-*.json"))
RECIPES = sorted({*CFGS.glob("*.json")} - {CFGS / "schema.json", *GRIDS})
ADACLIP = [
    path
    for path in RECIPES
    if (found := json.loads(path.read_text())).get("use_policy", True) and "captioner" not in found
]
OTHERS = {  # recipe → frames, batch, tower
    "clip-vip-msrvtt": (12, 128, "proxy_tokens"),
    "clip-vip-activitynet": (32, 128, "proxy_tokens"),
    "clip-vip-pretrain": (12, 1024, "proxy_tokens"),
    "center-clip-msvd": (12, 128, "clustering"),
    "center-clip-activitynet": (60, 128, "clustering"),
    "dgl-msrvtt": (12, 128, "global_local"),
    "dgl-activitynet": (64, 16, "global_local"),
    "fitclip-webvid": (4, 128, "per_frame"),
}
PARTS = sorted((CFGS / "peft").glob("*.json"))
KEYWORDS = ("ln_post", "visual.proj", "ln_final", "text_projection", "logit_scale")
FRAMES_TOPK_BATCH = {
    "bitfit": (32, 16, 16),
    "ibs": (32, 16, 16),
    "lora": (32, 16, 16),
    "full-finetune": (32, 16, 16),
    "msrvtt": (16, 12, 64),
    "didemo": (32, 16, 32),
    "activitynet": (64, 32, 16),
}


def recipe(name: str) -> Config:
    return load_config(CFGS / f"{name}.json")


def test_every_named_file_exists_loads_and_sets_freeze_layer_num_itself() -> None:
    assert {path.stem for path in RECIPES} >= {"demo", *FRAMES_TOPK_BATCH}
    assert {path.stem for path in PARTS} >= {"bitfit", "ibs"}
    for path in RECIPES:
        assert "freeze_layer_num" in load_config(path).model_fields_set


@pytest.mark.parametrize(("name", "expected"), OTHERS.items())
def test_recipes_of_other_systems(name: str, expected: tuple[int, int, str]) -> None:
    config = recipe(name)
    assert (config.num_frm, config.batch_size, config.tower.method) == expected
    assert not config.use_policy and config.frame_agg is None
    assert config.optim == ("clip_vip_adamw" if "vip" in name else "adamw")


@pytest.mark.parametrize("path", ADACLIP, ids=lambda path: path.name)
def test_every_peft_part_overrides_the_method_of_every_recipe(path: Path) -> None:
    below = load_config(path)
    for part in PARTS:
        config = load_config(path, {"peft": str(part)})
        assert config.peft.method == part.stem
        if part.stem in ("bitfit", "ibs"):
            assert config.peft.config.keep_module_keywords == KEYWORDS  # type: ignore[union-attr]
        assert config.model_dump(exclude={"peft"}) == below.model_dump(exclude={"peft"})


@pytest.mark.parametrize(("name", "expected"), FRAMES_TOPK_BATCH.items())
def test_frames_top_k_and_batch(name: str, expected: tuple[int, int, int]) -> None:
    config = recipe(name)
    assert (config.num_frm, config.top_k, config.batch_size) == expected
    assert (config.frame_agg, config.freeze_cnn, config.policy_backbone) == ("mlp", True, "mobilenet_v3_large")
    assert config.num_epochs == (5 if name == "didemo" else 30)
    assert (config.concat_captions, config.max_txt_len) == (("indep-one", 32) if name == "msrvtt" else ("concat", 64))


@pytest.mark.parametrize(
    ("name", "method", "clip_lr", "freeze_layer_num"),
    [
        ("bitfit", "bitfit", 2e-5, 0),
        ("ibs", "ibs", 1e-7, 0),
        ("full-finetune", "full", 1e-7, -1),
        ("lora", "lora", 1e-4, 0),
    ],
)
def test_method_and_learning_rate_of_clip(name: str, method: str, clip_lr: float, freeze_layer_num: int) -> None:
    config = recipe(name)
    assert config.peft.method == method
    assert config.learning_rate == 1e-4
    assert config.learning_rate * config.coef_lr == pytest.approx(clip_lr)
    assert config.freeze_layer_num == freeze_layer_num
    assert Path(str(config.train_annot)).parts[0] == "dataset_example"


def test_the_demo_needs_nothing_but_the_repository() -> None:
    config = recipe("demo")
    named = [config.train_annot, config.val_annot, config.test_annot, config.video_dir, config.clip_weights]
    assert all(Path(str(path)).parts[0] == "dataset_example" for path in named)
    assert config.peft.method == "lora"
    assert config.policy_backbone == "raw"


def test_every_file_points_to_the_schema_which_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    for path in [*RECIPES, *PARTS]:
        assert (path.parent / json.loads(path.read_text())["$schema"]).resolve() == (CFGS / "schema.json").resolve()
    assert main(["schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["properties"]) == {"$schema", *Config.model_fields}
    assert json.loads((CFGS / "schema.json").read_text()) == printed, "run: adaclip schema > cfgs/schema.json"


def test_the_readme_tells_of_every_file_and_gives_its_true_values() -> None:
    text = (CFGS / "README.md").read_text()
    for path in [*RECIPES, *PARTS, *GRIDS]:
        assert f"`{path.relative_to(CFGS)}`" in text
    for name, *cells in re.findall(
        r"^\| `([\w-]+)\.json` \| (\d+) / (\d+) \| (\d+) \| `([\w-]+)` \| (\d+) \| (-?\d+) \| `(\w+)`", text, re.M
    ):
        c = recipe(name)
        told = [c.num_frm, c.top_k, c.batch_size, c.concat_captions, c.max_txt_len, c.freeze_layer_num, c.peft.method]
        assert cells == list(map(str, told)), name
    assert len(re.findall(r"^\| `[\w-]+\.json` \| \d+ / ", text, re.M)) == len(ADACLIP)

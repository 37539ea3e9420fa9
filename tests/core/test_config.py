"""Loading settings: names and defaults, what overrides what, strictness, combinations, sections and paths."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaclip_finetune.config import (
    BitFitSettings,
    Config,
    FullSettings,
    IbsSettings,
    SigmoidSettings,
    load_config,
)
from adaclip_finetune.config.base import LARGEST
from adaclip_finetune.config.paths import check_paths
from adaclip_finetune.config.schema import described
from adaclip_finetune.errors import UserError

DEFAULTS = {
    "dataset": "videos", "output_dir": "output", "tensorboard_dir": None, "train_annot": None, "val_annot": None,
    "test_annot": None, "frames_dir": None, "clip_backbone": "ViT-B/32", "policy_backbone": "mobilenet_v3_large",
    "rnn": "transformer", "mlp_type": "mlp", "sim_header": "meanP", "concat_captions": "concat", "sampling": "uniform",
    "augmentation": None,
    "optim": "bertadam", "hidden_dim": 512, "mlp_hidden_dim": 1024, "rescale_size": 56, "word_agg_temp": 1,
    "frame_agg_temp": 1, "freeze_layer_num": 0, "top_k": 8, "max_txt_len": 20, "num_frm": 16, "num_frm_subset": 0,
    "img_tmpl": "image_{:05d}.jpg", "batch_size": 32, "val_batch_size": 500, "num_epochs": 30, "warmup_epochs": 0,
    "learning_rate": 1e-4, "coef_lr": 1e-3, "warmup_proportion": 0.1, "betas": (0.9, 0.98), "weight_decay": 0.2,
    "grad_norm": 1.0, "init_tau": 5.0, "min_tau": 0.5, "exp_decay_factor": 0.045, "seed": 0, "data_subset": 0,
    "gradient_accumulation_steps": 1, "n_display": 20, "max_img_size": None, "word_agg": None, "frame_agg": None,
    "use_policy": True, "use_rnn": True, "no_warmup": False, "policy_weights": "imagenet", "device": "auto",
    "precision": "fp32", "reuse_scores": False, "segment_sampling": False, "freeze_cnn": False, "freeze_clip": False,
    "resume": None, "num_workers": 2, "do_inference": False, "pin_mem": False, "debug": False, "no_output": False,
    "save_last": False, "xpu": False, "optuna_cfg": None, "do_training_af_optuna": False,
    # ours
    "video_dir": None, "clip_weights": None, "gradient_checkpointing": False, "compile": False, "skip_missing": False,
    "embedding_cache": None, "policy_gradient": "exact", "policy_size": 224,
    "save_similarity": None, "save_every_steps": 0, "auto_batch_size": False, "tf32": False, "deterministic": False,
    "objective": None, "primary": None, "grad_cache_chunk": 0, "adam_epsilon": 1e-8, "lr_schedule": "bert",
    "to_last_frame": False, "resize": None,
    "ema_decay": 0, "captioner": None, "tracker": ("tensorboard",),
    "similar_captions": 1, "similar_share": 0.5,
}  # fmt: skip
SECTIONS = {"peft", "tower", "task", "adaptation"}
WHOLE = "a whole number from 1 to 4096"
TUNING = {"opt_params": {"coef_lr": {"range": [0.1, 0.5]}}}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a settings file from an object (as JSON) or from text."""

    def write_file(content: Any, name: str = "my.json") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write_file


def refusal(path: Path | None = None, **overrides: Any) -> str:
    """Return the message with which loading is refused."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# ---- names, defaults, help ----


def test_names_and_defaults() -> None:
    config = Config()
    assert set(Config.model_fields) == DEFAULTS.keys() | SECTIONS
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert (config.peft.method, config.peft.config) == ("full", FullSettings())
    assert (config.tower.method, config.task.method, config.adaptation.method) == ("per_frame", "retrieval", "none")
    assert config.model_fields_set == set()


def test_every_setting_has_help_of_one_line_describes_its_values_and_bounds_whole_numbers() -> None:
    for name, one in described(Config).items():
        assert 5 < len(one.facts["description"]) < 120, name
        assert one.words, name
        if one.facts.get("unit") in LARGEST:
            assert [node["maximum"] for node in one.types] == [LARGEST[one.facts["unit"]]], name
    for name in ("num_frm", "hidden_dim", "num_epochs", "batch_size", "max_img_size"):
        assert name in refusal(**{name: 2**31})


# ---- what overrides what ----


def test_flags_override_the_file_which_overrides_defaults(write: Write) -> None:
    path = write('\ufeff{"$schema": "x", "top_k": 5, "learning_rate": 1, "video_dir": "~/clips"}')  # with a BOM
    config = load_config(path, {"top_k": 6, "peft.method": "ibs", "peft.config.num_groups": 3})
    assert (config.top_k, config.learning_rate, config.num_frm) == (6, 1.0, 16)
    assert config.video_dir == str(Path("~/clips").expanduser())
    assert config.peft.config == IbsSettings(num_groups=3)
    assert config.model_fields_set == {"top_k", "learning_rate", "video_dir", "peft"}
    assert load_config(write(config.model_dump_json(), "again.json")) == config
    assert load_config(None, {"xpu": True}).device == "xpu"


# ---- strictness ----


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        *[("num_frm", value, WHOLE) for value in ("16", True, 16.0, 0, None, [16], 4097)],
        ("max_img_size", 0, f"{WHOLE}, or null"),
        *[("learning_rate", value, "a number > 0") for value in (True, "1e-4", 0)],
        ("warmup_proportion", 1, "a number >= 0 and < 1"),
        ("seed", 2**32, "a whole number from 0 to 4294967295"),
        *[("use_policy", value, "true or false") for value in (1, "false")],
        ("rnn", "gru", "one of transformer, lstm, bilstm"),
        ("frame_agg", "none", "one of mlp, transformer, qscore, or null"),
        *[("val_annot", value, "the path of a file, or null") for value in ("", 3)],
        ("dataset", "../elsewhere", "a name of letters, digits, dots, dashes and underscores"),
        *[
            ("img_tmpl", value, "a file name with one place for the number, as in image_{:05d}.jpg")
            for value in ("../{:05d}.jpg", "{:999999999d}", "{0.__class__}")
        ],
        ("save_similarity", "s.npz", "the path of a file named *.npy, or null"),
        *[("betas", value, "2 values, each a number >= 0 and < 1") for value in (0.9, [0.9, 0.9, 0.9])],
        *[("peft", value, "an object with method, config") for value in ("bitfit", 3)],
    ],
)
def test_a_wrong_value_is_refused_with_file_name_value_and_what_is_accepted(
    write: Write, name: str, value: Any, accepted: str
) -> None:
    path = write({name: value})
    assert refusal(path) == f"{path}: {name} is {json.dumps(value)}, but must be {accepted}"


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[1]", "null", '{"a": 1,}', "[" * 100_000, '{"seed": ' + "9" * 5000 + "}",
        '{"learning_rate": 1' + "0" * 399 + "}", '{"top_k": 1, "top_k": 2}',
        '{"peft": {"method": "full", "method": "full"}}',
        *[f'{{"weight_decay": {number}}}' for number in ("NaN", "Infinity", "-Infinity", "1e999")],
    ],
)  # fmt: skip
def test_text_that_is_not_strict_json_is_refused_with_the_file_name(write: Write, text: str) -> None:
    path = write(text)
    assert refusal(path).startswith(f"{path}: ")


def test_a_file_that_cannot_be_read_is_refused_with_its_name(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path, Path("nul\0byte")):
        assert refusal(path).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "unknown", "suggestion"),
    [
        ({"top_kk": 3}, "top_kk", "top_k"),
        ({"Top_K": 1}, "Top_K", "top_k"),
        ({"top k\n": 1}, '"top k\\n"', "top_k"),
        ({"retain_ratio": 0.1}, "retain_ratio", "peft.config.retain_ratio"),
        ({"peft": {"method": "bitfit", "confg": {}}}, "peft.confg of bitfit", "peft.config"),
        ({"peft": {"method": "ibs", "config": {"retain": 1}}}, "peft.config.retain of ibs", "peft.config.retain_ratio"),
    ],
)
def test_an_unknown_name_is_refused_with_a_suggestion(
    write: Write, content: Any, unknown: str, suggestion: str
) -> None:
    path = write(content)
    assert refusal(path) == f"{path}: unknown setting {unknown}; did you mean {suggestion}?"


def test_all_problems_are_reported_together_with_flag_or_file(write: Write) -> None:
    path = write({"top_kk": 3, "num_frm": "16", "peft": {"method": "bitfit", "config": {"include_qkv_bias": 1}}})
    first, *lines = refusal(path, hidden_dim=0, seed=-1).splitlines()
    assert first.startswith("5 ") and len(lines) == 5
    assert sum(line.startswith(f"  - {path}: ") for line in lines) == 3
    assert [line.split()[1] for line in lines if "  - --" in line] == ["--hidden_dim", "--seed"]
    assert len(refusal(write({"num_frm": "x" * 10_000}))) < 300


# ---- combinations ----


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"top_k": 20}, "top_k num_frm"),
        ({"num_frm": 4}, "top_k num_frm"),
        ({"frame_agg": "mlp", "word_agg": "mlp"}, "frame_agg word_agg"),
        ({"frames_dir": "a", "video_dir": "b"}, "frames_dir video_dir"),
        ({"num_frm_subset": 17}, "num_frm_subset num_frm"),
        ({"warmup_epochs": 31}, "warmup_epochs num_epochs top_k"),
        ({"warmup_epochs": 2, "top_k": 16}, "warmup_epochs num_frm top_k"),
        ({"hidden_dim": 100}, "hidden_dim rnn"),
        ({"reuse_scores": True, "use_policy": False}, "reuse_scores use_policy"),
        ({"min_tau": 6}, "min_tau init_tau"),
        ({"similar_captions": 33}, "similar_captions batch_size"),
        ({"similar_captions": 2, "train_annot": "rows.jsonl"}, "similar_captions train_annot"),
        ({"grad_norm": 0}, "grad_norm"),
        ({"xpu": True, "device": "cpu"}, "xpu device"),
        ({"precision": "fp16", "device": "cpu"}, "precision device"),
        ({"no_output": True, "tracker": ["wandb"]}, "no_output tracker"),
        ({"tensorboard_dir": "runs", "tracker": ["mlflow"]}, "tensorboard_dir tracker"),
        ({"do_training_af_optuna": True}, "do_training_af_optuna optuna_cfg"),
        ({"optuna_cfg": TUNING, "do_inference": True}, "optuna_cfg do_inference"),
        ({"freeze_clip": True, "use_policy": False}, "freeze_clip use_policy sim_header frame_agg word_agg tower"),
        ({"freeze_clip": True, "peft.method": "ibs"}, "freeze_clip peft.method"),
        ({"freeze_clip": True, "peft.method": "lora"}, "freeze_clip peft.method"),
        ({"num_epochs": 1, "peft.method": "ibs"}, "peft.config.num_pre_epochs num_epochs"),
        ({"primary": "t2v.R@2"}, "primary task"),
        ({"optuna_cfg": {**TUNING, "objective": "t2v.R@2"}}, "optuna_cfg.objective task"),
    ],
)
def test_impossible_combinations_name_the_settings_and_where_they_are_given(
    settings: dict[str, Any], names: str
) -> None:
    message = refusal(**settings)
    sources = message[message.rindex("(") + 1 : -1].split(", ")
    assert [source.partition(" ")[0].removeprefix("--") for source in sources] == names.split()
    assert {source[2:] for source in sources if source.startswith("--")} >= set(settings) & set(names.split())


def test_combinations_of_a_file_and_flags_and_several_at_once(write: Write) -> None:
    path = write({"num_frm": 4})
    assert refusal(path, frame_agg="mlp", word_agg="mlp", xpu=True, device="cuda").startswith("3 ")
    assert refusal(path, top_k=5).endswith(f"(--top_k, num_frm in {path})")


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 20, "use_policy": False}, {"hidden_dim": 100, "rnn": "lstm"}, {"hidden_dim": 100, "use_rnn": False},
        {"warmup_epochs": 30, "top_k": 15}, {"freeze_clip": True}, {"grad_norm": -1},
        {"freeze_clip": True, "use_policy": False, "do_inference": True},
        {"freeze_clip": True, "use_policy": False, "frame_agg": "mlp"}, {"num_epochs": 2, "peft.method": "ibs"},
    ],
)  # fmt: skip
def test_possible_combinations(settings: dict[str, Any]) -> None:
    assert load_config(None, settings).model_fields_set >= {name.split(".")[0] for name in settings}


def test_the_figure_that_tuning_optimises() -> None:
    assert load_config(None, {}).primary_figure == "t2v.R@1"
    tuned = load_config(None, {"optuna_cfg": {**TUNING, "objective": "t2v.R@5"}, "primary": "v2t.MedR"})
    assert (tuned.primary_figure, tuned.tuned_figure) == ("v2t.MedR", "t2v.R@5")
    assert load_config(None, {"optuna_cfg": TUNING, "primary": "v2t.MedR"}).tuned_figure == "v2t.MedR"


# ---- sections ----


def test_a_section_file_replaces_the_section_and_contains_nothing_else(write: Write) -> None:
    below = write({"top_k": 3, "peft": {"method": "ibs", "config": {"retain_ratio": 0.3}}})
    section = {"method": "bitfit", "config": {"include_qkv_bias": True}}
    for content in ({"$schema": "x", "peft": section}, section):
        config = load_config(below, {"peft": str(write(content, "over.json"))})
        assert (config.peft.config, config.top_k) == (BitFitSettings(include_qkv_bias=True), 3)
    both = refusal(peft=str(write({"peft": {"method": "full"}, "top_k": 3}, "both.json")))
    assert "both.json" in both and both.endswith("top_k")
    assert refusal(peft="none.json").startswith("none.json: ")


def test_another_method_starts_from_its_defaults_with_a_warning(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    path = write({"peft": {"method": "bitfit", "config": {"keep_module_keywords": ["ln_post"]}}})
    kept = load_config(path, {"peft.method": "bitfit", "peft.config.include_qkv_bias": True}).peft.config
    assert kept == BitFitSettings(keep_module_keywords=("ln_post",), include_qkv_bias=True)
    assert not caplog.text
    assert load_config(path, {"peft.method": "ibs"}).peft.config == IbsSettings()
    assert "bitfit" in caplog.text and "keep_module_keywords" in caplog.text


def test_nested_overrides_win_in_any_order() -> None:
    given = {"peft.config.retain_ratio": 0.2, "peft": {"method": "ibs", "config": {}}, "peft.method": "ibs"}
    for overrides in (given, dict(reversed(given.items()))):
        assert load_config(None, overrides).peft.config == IbsSettings(retain_ratio=0.2)


def test_an_objective_is_an_object_a_file_a_flag_or_null(write: Write) -> None:
    sigmoid = {"method": "sigmoid"}
    path = write({"objective": sigmoid})
    for overrides in ({"objective": sigmoid}, {"objective": str(path)}, {"objective.method": "sigmoid"}):
        objective = load_config(None, overrides).objective
        assert objective is not None and objective.config == SigmoidSettings()
    assert load_config(path, {"objective": None}).objective is None


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        ({"peft.method": "no"}, '--peft.method is "no", but must be one of full, bitfit, ibs, lora'),
        ({"peft.config.retain_ratio": 0.2}, "peft.method is missing"),
        (
            {"peft.method": "ibs", "peft.config.rank": 4},
            "--peft.config.rank: unknown setting peft.config.rank of ibs; it",
        ),
        ({"top_k.x": 4}, "--top_k.x: unknown setting top_k.x"),
        ({"peft": [], "peft.method": "ibs"}, "--peft is []"),
        ({"peft": {"method": "full", "x": 1}, "peft.method": "ibs"}, "--peft: unknown setting peft.x"),
        ({"peft": {"method": "full", "config": 3}}, "--peft: peft.config is 3"),
        (
            {"peft.method": "lora", "peft.config.targets": ["q", "z"]},
            "--peft.config.targets: peft.config.targets[1] is",
        ),
        ({"peft.method": "lora", "peft.config.targets": []}, "--peft.config.targets is []"),
        ({"peft.method": "lora", "peft.config.layers": [-1]}, "--peft.config.layers: peft.config.layers[0] is -1"),
        ({"objective": {"config": {}}}, "--objective: objective.method is missing"),
        ({"objective": 3}, "--objective is 3, but must be an object with method, config, or null"),
        ({"objective.method": "sigmoid", "objective.config.x": 1}, "--objective.config.x: unknown setting objective"),
        ({"tower": None}, "--tower is null"),
    ],
)
def test_wrong_sections(overrides: dict[str, Any], start: str) -> None:
    assert refusal(**overrides).startswith(start)


def test_optuna_cfg_is_accepted() -> None:
    tuning = {"n_trials": 30, "sampler": {"name": "TPESampler", "seed": 3}, **TUNING}
    config = load_config(None, {"optuna_cfg": tuning, "optuna_cfg.n_trials": 5}).optuna_cfg
    assert config is not None
    assert (config.n_trials, config.sampler.name) == (5, "TPESampler")
    assert config.opt_params["coef_lr"].range == (0.1, 0.5)


@pytest.mark.parametrize(
    "space",
    [
        {"range": [1]}, {}, {"range": [1, 2], "choices": [1]}, {"range": [1, 2], "step": 0},
        {"choices": [1], "log": True}, {"choices": []}, {"choices": [[1]]}, {"rnge": [1, 2]},
    ],
)  # fmt: skip
def test_wrong_ranges_of_optuna_cfg_name_the_setting(space: Any) -> None:
    assert "optuna_cfg.opt_params.x" in refusal(optuna_cfg={"opt_params": {"x": space}})
    assert refusal(**{"optuna_cfg.n_trials": 5}).startswith("optuna_cfg.opt_params is missing")


# ---- paths ----


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """Settings whose files exist."""
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.json").touch()
    (tmp_path / "videos").mkdir()
    annotations = {f"{name}_annot": str(tmp_path / f"{name}.json") for name in ("train", "val", "test")}
    return annotations | {"video_dir": str(tmp_path / "videos")}


def path_problems(**settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        check_paths(load_config(None, settings))
    return str(caught.value)


def test_existing_files_pass_and_files_that_are_not_needed_are_not_checked(files: dict[str, Any]) -> None:
    check_paths(load_config(None, files))
    check_paths(load_config(None, files | {"do_inference": True, "train_annot": None, "val_annot": "nowhere.json"}))
    check_paths(load_config(None, files | {"use_policy": False, "policy_weights": "nowhere.pt"}))


def test_required_paths_are_asked_for() -> None:
    message = path_problems()
    assert message.startswith("3 ")
    assert all(flag in message for flag in ("--train_annot", "--val_annot", "--frames_dir", "--video_dir"))
    assert "--test_annot" in path_problems(do_inference=True)


@pytest.mark.parametrize(
    "name", ["train_annot", "val_annot", "test_annot", "video_dir", "clip_weights", "policy_weights", "resume"]
)
def test_a_missing_file_is_named(files: dict[str, Any], name: str) -> None:
    assert path_problems(**files | {name: "missing"}).startswith(f"{name} missing: ")
    assert str(Path.cwd()) in path_problems(**files | {name: "missing"})


def test_files_and_folders_are_not_confused(files: dict[str, Any], tmp_path: Path) -> None:
    file, folder = files["train_annot"], str(tmp_path)
    wrong = {"val_annot": folder, "video_dir": file, "output_dir": file, "save_similarity": "no/s.npy"}
    message = path_problems(**files | wrong)
    assert message.startswith("4 ")
    assert all(f"- {name} " in message for name in wrong)
    matrix = str(Path(files["val_annot"]).with_suffix(".npy"))  # its ids would replace the annotation
    assert path_problems(**files, save_similarity=matrix).startswith(f"save_similarity {matrix} ")

"""What a settings file may hold, what beats what, and what is said where something is wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from adaclip_finetune.config import BitFitSettings, Config, FullSettings, IbsSettings, load_config
from adaclip_finetune.config.schema import schema_of
from adaclip_finetune.errors import UserError

PUBLISHED = {
    "dataset", "train_annot", "val_annot", "test_annot", "frames_dir", "output_dir", "tensorboard_dir",
    "policy_backbone", "clip_backbone", "rnn", "hidden_dim", "mlp_hidden_dim", "mlp_type", "rescale_size",
    "use_policy", "use_rnn", "sim_header", "word_agg", "word_agg_temp", "frame_agg", "frame_agg_temp",
    "freeze_layer_num", "top_k", "reuse_scores", "max_txt_len", "concat_captions", "max_img_size", "num_frm",
    "num_frm_subset", "sampling", "img_tmpl", "segment_sampling", "batch_size", "val_batch_size", "num_epochs",
    "warmup_epochs", "learning_rate", "coef_lr", "no_warmup", "warmup_proportion", "optim", "betas", "weight_decay",
    "grad_norm", "freeze_cnn", "freeze_clip", "init_tau", "min_tau", "exp_decay_factor", "resume", "seed",
    "num_workers", "do_inference", "pin_mem", "debug", "data_subset", "no_output", "gradient_accumulation_steps",
    "n_display", "save_last", "xpu", "optuna_cfg", "do_training_af_optuna", "peft",
}  # fmt: skip
OURS = {
    "video_dir", "clip_weights", "policy_weights", "device", "precision", "gradient_checkpointing",
    "skip_missing", "save_similarity", "save_every_steps", "auto_batch_size", "tf32", "deterministic",
    "tower", "objective", "task", "adaptation", "primary",
}  # fmt: skip
DEFAULTS = {
    "output_dir": "output", "clip_backbone": "ViT-B/32", "hidden_dim": 512, "mlp_hidden_dim": 1024, "rescale_size": 56,
    "word_agg_temp": 1, "frame_agg_temp": 1, "freeze_layer_num": 0, "top_k": 8, "max_txt_len": 20, "num_frm": 16,
    "num_frm_subset": 0, "img_tmpl": "image_{:05d}.jpg", "batch_size": 32, "val_batch_size": 500, "num_epochs": 30,
    "warmup_epochs": 0, "learning_rate": 1e-4, "coef_lr": 1e-3, "warmup_proportion": 0.1, "betas": (0.9, 0.98),
    "weight_decay": 0.2, "grad_norm": 1.0, "init_tau": 5.0, "min_tau": 0.5, "exp_decay_factor": 0.045, "seed": 0,
    "data_subset": 0, "gradient_accumulation_steps": 1, "n_display": 20, "max_img_size": None, "word_agg": None,
    "frame_agg": None, "use_policy": True, "use_rnn": True, "no_warmup": False, "policy_weights": "imagenet",
    "device": "auto", "precision": "fp32",
}  # fmt: skip
CHOICES = {
    "policy_backbone": "mobilenet_v3_large mobilenet_v2 resnet50 raw clip frozen_clip",
    "rnn": "transformer lstm bilstm",
    "mlp_type": "mlp fc",
    "sim_header": "meanP seqTransf transformer",
    "concat_captions": "concat indep-one indep-all",
    "sampling": "uniform random",
    "optim": "bertadam adamw",
    "device": "auto cpu cuda xpu mps",
    "precision": "fp32 bf16 fp16",
}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a settings file: JSON from an object, or the text as it is."""

    def write_file(content: Any, name: str = "my.json") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write_file


def refusal(path: Path | None, **overrides: Any) -> str:
    """The message with which loading is refused."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# ---- names, defaults, choices ----


def test_every_published_name_and_ours_are_settings_in_the_order_of_help() -> None:
    assert set(Config.model_fields) == PUBLISHED | OURS
    assert next(iter(Config.model_fields)) == "dataset"


def test_defaults() -> None:
    config = Config()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert (config.peft.method, config.peft.config) == ("full", FullSettings())
    assert config.model_fields_set == set()


@pytest.mark.parametrize(("name", "choices"), CHOICES.items())
def test_choices(name: str, choices: str) -> None:
    assert " ".join(get_args(Config.model_fields[name].annotation)) == choices


def test_every_setting_has_a_line_of_help_and_says_what_is_allowed() -> None:
    schema = schema_of(Config)
    for path, nodes in schema.paths().items():
        for node in nodes:
            assert 5 < len(schema.resolve(node)["description"]) < 120, path
        assert schema.words(*nodes), path


def test_config_is_frozen_all_the_way_down() -> None:
    config = Config()
    with pytest.raises(ValidationError):
        config.top_k = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.peft.method = "ibs"  # type: ignore[misc, assignment]
    assert isinstance(BitFitSettings(keep_module_keywords=("a",)).keep_module_keywords, tuple)


def test_the_resolved_config_loads_again_and_is_the_same(write: Write) -> None:
    config = load_config(None, {"peft.method": "ibs", "xpu": True, "betas": [0.5, 0.6], "num_frm": 9})
    assert load_config(write(config.model_dump_json())) == config


def test_loading_imports_no_torch() -> None:
    code = "import sys, adaclip_finetune.config, adaclip_finetune.config.paths; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


# ---- what beats what ----


def test_file_beats_default_and_flag_beats_file(write: Write) -> None:
    path = write({"$schema": "x", "top_k": 5, "num_frm": 10})
    assert (load_config(path).top_k, load_config(path).num_frm) == (5, 10)
    assert (load_config(path, {"top_k": 6}).top_k, load_config(path, {"top_k": 6}).num_frm) == (6, 10)


def test_fault_json_overriding_a_flag(write: Write) -> None:
    assert load_config(write({"num_epochs": 30}), {"num_epochs": 2}).num_epochs == 2
    assert load_config(write({"peft": {"method": "ibs"}}), {"peft.config.num_groups": 3}).peft.config == IbsSettings(
        num_groups=3
    )


def test_given_names_are_remembered(write: Write) -> None:
    assert load_config(write({"clip_backbone": "ViT-B/32"}), {"seed": 0}).model_fields_set == {"clip_backbone", "seed"}


def test_ints_serve_as_floats_and_a_byte_order_mark_is_harmless(write: Write) -> None:
    config = load_config(write('\ufeff{"learning_rate": 1, "betas": [0, 0.5]}'))
    assert (config.learning_rate, config.betas) == (1.0, (0.0, 0.5))


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert load_config(None, {"video_dir": "~/clips"}).video_dir == "/home/me/clips"


# ---- strictness ----


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("num_frm", "16", "a whole number >= 1"),
        ("num_frm", True, "a whole number >= 1"),
        ("num_frm", 16.0, "a whole number >= 1"),
        ("num_frm", 0, "a whole number >= 1"),
        ("num_frm", None, "a whole number >= 1"),
        ("num_frm", [16], "a whole number >= 1"),
        ("max_img_size", 0, "a whole number >= 1, or null"),
        ("learning_rate", True, "a number > 0"),
        ("learning_rate", "1e-4", "a number > 0"),
        ("learning_rate", 0, "a number > 0"),
        ("warmup_proportion", 1, "a number >= 0 and < 1"),
        ("grad_norm", 0, "a number > 0, or -1 for no clipping"),
        ("seed", 2**32, "a whole number >= 0 and <= 4294967295"),
        ("use_policy", 1, "true or false"),
        ("use_policy", "false", "true or false"),
        ("rnn", "gru", "one of transformer, lstm, bilstm"),
        ("frame_agg", "none", "one of mlp, transformer, qscore, or null"),
        ("train_annot", "", "the path of a file, or null"),
        ("train_annot", 3, "the path of a file, or null"),
        ("dataset", "../elsewhere", "a name of letters, digits, dots, dashes and underscores"),
        ("img_tmpl", "../{:05d}.jpg", "a file name with one place for the number, as in image_{:05d}.jpg"),
        ("img_tmpl", "{:999999999d}", "a file name with one place for the number, as in image_{:05d}.jpg"),
        ("img_tmpl", "{0.__class__}", "a file name with one place for the number, as in image_{:05d}.jpg"),
        ("save_similarity", "s.npz", "the path of a file named *.npy, or null"),
        ("betas", 0.9, "2 values, each a number >= 0 and < 1"),
        ("betas", [0.9, 0.9, 0.9], "2 values, each a number >= 0 and < 1"),
        ("peft", "bitfit", "an object with method, config"),
        ("peft", 3, "an object with method, config"),
    ],
)
def test_wrong_type_or_range_names_file_key_value_and_what_is_allowed(
    write: Write, name: str, value: Any, allowed: str
) -> None:
    path = write({name: value})
    assert refusal(path) == f"{path}: {name} is {json.dumps(value)}, but must be {allowed}"


def test_fault_betas_left_as_strings(write: Write) -> None:
    assert load_config(write({"betas": [0.8, 0.9]})).betas == (0.8, 0.9)
    assert 'betas[0] is "0.9", but must be a number' in refusal(write({"betas": ["0.9", 0.98]}))


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_nan_and_infinity_are_no_numbers(write: Write, text: str) -> None:
    assert "my.json" in refusal(write(f'{{"weight_decay": {text}}}'))


@pytest.mark.parametrize("text", ['{"top_k": 1, "top_k": 2}', '{"peft": {"method": "full", "method": "full"}}'])
def test_a_key_twice_is_refused(write: Write, text: str) -> None:
    assert "stands twice" in refusal(write(text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        "null",
        '{"a": 1,}',
        "[" * 100_000,
        '{"seed": ' + "9" * 5000 + "}",
        '{"learning_rate": 1' + "0" * 399 + "}",
    ],
)
def test_what_is_no_settings_file_is_refused_by_name(write: Write, text: str) -> None:
    path = write(text)
    assert refusal(path).startswith(f"{path}: ")


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b'{"dataset": "\xe9"}')
    assert "there is no such file" in refusal(tmp_path / "none.json")
    assert "directory" in refusal(tmp_path)
    assert "not UTF-8 text (byte 13)" in refusal(tmp_path / "latin.json")
    assert "cannot be read" in refusal(Path("nul\0byte"))


def test_fault_unknown_config_keys_accepted(write: Write) -> None:
    path = write({"top_kk": 3})
    assert refusal(path) == f"{path}: there is no setting top_kk; the nearest is top_k"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"retain_ratio": 0.1}, "there is no setting retain_ratio; there is peft.config.retain_ratio"),
        ({"peft": {"method": "bitfit", "confg": {}}}, "no setting peft.confg of bitfit; the nearest is config"),
        (
            {"peft": {"method": "ibs", "config": {"retain": 1}}},
            "peft.config.retain of ibs; the nearest is retain_ratio",
        ),
        ({"peft": {"method": "full", "config": {"x": 1}}}, "no setting peft.config.x of full; none may stand there"),
        ({"top k\n": 1}, 'there is no setting "top k\\n"; the nearest is top_k'),
        ({"Top_K": 1}, "the nearest is top_k"),
    ],
)
def test_unknown_names_at_any_depth_get_the_nearest(write: Write, content: Any, told: str) -> None:
    assert told in refusal(write(content))


def test_all_problems_are_told_in_one_message(write: Write) -> None:
    path = write({"top_kk": 3, "num_frm": "16", "peft": {"method": "bitfit", "config": {"include_qkv_bias": 1}}})
    message = refusal(path, hidden_dim=0, seed=-1)
    assert message.splitlines()[0] == "5 things are wrong with the settings:"
    assert all(line.startswith((f"  - {path}: ", "  - command line: ")) for line in message.splitlines()[1:])
    assert "command line: hidden_dim is 0, but must be a whole number >= 1" in message


def test_long_and_strange_values_are_cut(write: Write) -> None:
    assert len(refusal(write({"num_frm": "x" * 10_000}))) < 300
    assert "too long to show" in refusal(None, num_frm=-(10**5000))


# ---- combinations ----


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"top_k": 20}, "top_k 20 is more than num_frm 16"),
        ({"num_frm": 4}, "top_k 8 is more than num_frm 4"),
        ({"frame_agg": "mlp", "word_agg": "mlp"}, "frame_agg mlp and word_agg mlp exclude each other"),
        ({"frames_dir": "a", "video_dir": "b"}, "frames_dir and video_dir are both given"),
        ({"num_frm_subset": 17}, "num_frm_subset 17 is more than num_frm 16"),
        ({"warmup_epochs": 31}, "warmup_epochs 31 is more than num_epochs 30"),
        ({"warmup_epochs": 2, "top_k": 16}, "top_k 16 is num_frm"),
        ({"hidden_dim": 100}, "hidden_dim 100 is no multiple of 64"),
        ({"reuse_scores": True, "use_policy": False}, "reuse_scores needs use_policy"),
        ({"min_tau": 6}, "min_tau 6 is more than init_tau 5"),
        ({"xpu": True, "device": "cpu"}, "xpu and device cpu are both given"),
        ({"precision": "fp16", "device": "cpu"}, "precision fp16 does not work on the CPU"),
        ({"do_training_af_optuna": True}, "do_training_af_optuna needs optuna_cfg"),
        ({"freeze_clip": True, "use_policy": False}, "nothing would learn"),
        ({"freeze_clip": True, "peft.method": "ibs"}, "freeze_clip leaves peft.method ibs nothing"),
        ({"num_epochs": 1, "peft.method": "ibs"}, "peft.config.num_pre_epochs 1 leaves no epoch of num_epochs 1"),
    ],
)
def test_combinations_that_cannot_be(settings: dict[str, Any], told: str) -> None:
    assert told in refusal(None, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 16},
        {"top_k": 20, "use_policy": False},
        {"hidden_dim": 100, "rnn": "lstm"},
        {"hidden_dim": 100, "use_rnn": False},
        {"warmup_epochs": 30, "top_k": 15},
        {"freeze_clip": True},
        {"freeze_clip": True, "use_policy": False, "do_inference": True},
        {"freeze_clip": True, "use_policy": False, "frame_agg": "mlp"},
        {"grad_norm": -1},
        {"num_epochs": 2, "peft.method": "ibs"},
        {"clip_backbone": "ViT-B-16-SigLIP2:webli"},
    ],
)
def test_combinations_that_can_be(settings: dict[str, Any]) -> None:
    assert load_config(None, settings).model_fields_set >= {name.split(".")[0] for name in settings}


def test_a_combination_says_where_its_values_came_from(write: Write) -> None:
    path = write({"num_frm": 4})
    assert refusal(path).endswith(f"(top_k: default, num_frm: {path})")
    assert refusal(path, top_k=5).endswith(f"(top_k: command line, num_frm: {path})")


def test_contradictions_are_told_together() -> None:
    message = refusal(None, top_k=20, frame_agg="mlp", word_agg="mlp", xpu=True, device="cuda")
    assert message.startswith("3 things are wrong")


def test_xpu_is_a_device() -> None:
    assert load_config(None, {"xpu": True}).device == "xpu"
    assert load_config(None, {"xpu": True, "device": "auto"}).device == "xpu"
    assert load_config(None, {"xpu": True, "device": "xpu"}).device == "xpu"
    assert load_config(None, {"xpu": False, "device": "cpu"}).device == "cpu"


def test_a_figure_must_be_one_that_the_task_measures() -> None:
    search = {"opt_params": {"learning_rate": {"range": [1e-5, 1e-3]}}}
    assert load_config(None, {"optuna_cfg": search}).searched_figure == "t2v.R@1"
    assert load_config(None, {"optuna_cfg": search, "primary": "v2t.MedR"}).searched_figure == "v2t.MedR"
    for given in ({"primary": "t2v.R@2"}, {"optuna_cfg": {**search, "objective": "t2v.R@2"}}):
        with pytest.raises(UserError, match=r"t2v\.R@2 is no figure of task retrieval.* v2t\.MedR"):
            load_config(None, given)

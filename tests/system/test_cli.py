"""The command line: flags, help, exit codes, and one readable message where something is wrong."""

import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaclip_finetune import __version__, cli
from adaclip_finetune.config import BitFitSettings, Config, IbsSettings, paths
from adaclip_finetune.config.schema import schema_of
from adaclip_finetune.errors import UserError

ROOT = Path(__file__).parents[2]
Calls = list[tuple[str, Config, tuple[Any, ...], dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the train command would have started; the files a config names count as there."""
    made: Calls = []

    def record(name: str) -> Callable[..., None]:
        return lambda config, *given, **options: made.append((name, config, given, options))

    for stand_in, name in {"trainer": "fit", "evaluate_only": "evaluate_only", "dry_run": "dry_run"}.items():
        module = types.ModuleType(f"adaclip_finetune.training.{stand_in}")
        setattr(module, name, record(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(paths, "check_paths", lambda config: None)
    return made


@pytest.fixture
def train(calls: Calls) -> Callable[..., Config]:
    """The config that `train` starts with for these words."""

    def run(*words: str) -> Config:
        assert cli.main(["train", *words]) == 0
        return calls[-1][1]

    return run


@pytest.fixture
def refusal(calls: Calls, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The message with which these words are refused: exit code 2, nothing started, no traceback."""

    def run(*words: str) -> str:
        capsys.readouterr()
        assert cli.main(["train", *words]) == 2
        printed = capsys.readouterr()
        assert not calls
        assert not printed.out
        assert printed.err.startswith("adaclip: error: ")
        assert "Traceback" not in printed.err
        return printed.err.removeprefix("adaclip: error: ").rstrip()

    return run


# ---- what is started ----


def test_train_evaluation_and_dry_run(calls: Calls) -> None:
    for words in ([], ["--do_inference"], ["--dry_run"], ["--dry_run", "--json", "--do_inference"]):
        assert cli.main(["train", *words]) == 0
    started = [(name, given, options) for name, _, given, options in calls]
    assert started == [
        ("fit", (), {"folder": None}), ("evaluate_only", (None,), {}),
        ("dry_run", (), {"as_json": False}), ("dry_run", (), {"as_json": True}),
    ]  # fmt: skip


def test_paths_are_checked_before_anything_heavy_is_imported(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; from adaclip_finetune.cli import main; print(main(['train']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False"]
    assert "train_annot is needed to train" in done.stderr


def test_train_py_is_the_train_command_and_its_help_imports_no_torch() -> None:
    code = (
        "import runpy, sys; sys.argv = ['train.py', '--help']\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "finally: print('torch imported:', 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: adaclip train [--config FILE]")
    assert done.stdout.rstrip().endswith("torch imported: False")


def test_search_settings_that_contradict_others(refusal: Callable[..., str]) -> None:
    space = '{"coef_lr": {"range": [0.02, 0.5]}}'
    assert "a search trains" in refusal("--optuna_cfg.opt_params", space, "--do_inference")
    assert "do_training_af_optuna needs optuna_cfg" in refusal("--do_training_af_optuna")


# ---- flags ----


def test_every_setting_is_a_flag_with_help_default_and_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    groups = [
        "Data:",
        "Frames:",
        "Model:",
        "Frame selection:",
        "Aggregation:",
        "PEFT:",
        "Optimisation:",
        "Run:",
        "Device:",
    ]
    positions = [text.index(f"\n{group}\n") for group in groups]
    assert positions == sorted(positions)
    for name in schema_of(Config).paths():
        assert f"\n  --{name} " in text, name
    words = " ".join(text.split())
    assert "--num_frm N frames read of each video [a whole number >= 1; unit: frames; default: 16]" in words
    assert "[one of uniform, random; default: uniform]" in words
    assert "--no_policy the same as --use_policy false" in words
    assert "[of ibs; a number > 0 and <= 1; default: 0.1]" in words
    assert "%%" not in text


def test_values_of_flags(train: Callable[..., Config]) -> None:
    config = train(
        "--num_frm", "32", "--learning_rate", "5e-5", "--coef_lr=.2", "--weight_decay", "1", "--grad_norm", "-1",
        "--freeze_layer_num", "-1", "--frame_agg", "mlp", "--max_img_size", "none", "--dataset", "true",
        "--resume", "None",
    )  # fmt: skip
    assert (config.num_frm, config.learning_rate, config.coef_lr, config.weight_decay) == (32, 5e-5, 0.2, 1.0)
    assert (config.grad_norm, config.freeze_layer_num, config.frame_agg) == (-1.0, -1, "mlp")
    assert (config.max_img_size, config.dataset, config.resume) == (None, "true", None)


def test_null_beats_a_file(train: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"frame_agg": "mlp", "optuna_cfg": {"opt_params": {"seed": {"range": [0, 9]}}}}')
    config = train("--config", str(tmp_path / "c.json"), "--frame_agg", "null", "--optuna_cfg", "none")
    assert (config.frame_agg, config.optuna_cfg) == (None, None)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--save_last"], "save_last", True),
        (["--save_last", "true"], "save_last", True),
        (["--save_last=True"], "save_last", True),
        (["--save_last", "--no_save_last"], "save_last", False),
        (["--no_policy"], "use_policy", False),
        (["--use_policy", "false"], "use_policy", False),
        (["--no_policy", "--use_policy"], "use_policy", True),
        (["--no_rnn"], "use_rnn", False),
        (["--no_warmup"], "no_warmup", True),
        (["--no_warmup", "false"], "no_warmup", False),
        (["--no_output"], "no_output", True),
    ],
)
def test_switches(train: Callable[..., Config], words: list[str], name: str, value: bool) -> None:
    assert getattr(train(*words), name) is value


def test_fault_false_taken_for_true(train: Callable[..., Config], refusal: Callable[..., str], calls: Calls) -> None:
    for text in ("maybe", "0", "no", "1"):
        assert refusal("--freeze_cnn", text) == f'command line: freeze_cnn is "{text}", but must be true or false'
    for text in ("false", "False", "FALSE"):
        assert train("--freeze_cnn", text).freeze_cnn is False


def test_fault_betas_left_as_strings(train: Callable[..., Config], refusal: Callable[..., str]) -> None:
    assert 'betas[0] is "0.9,0.98", but must be a number' in refusal("--betas", "0.9,0.98")
    assert "betas is [0.9, 0.98, 0.99], but must be 2 values" in refusal("--betas", "0.9", "0.98", "0.99")
    assert train("--betas", "0.8", "0.9").betas == (0.8, 0.9)
    assert train("--betas", "[0.8, 0.9]").betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("word", "whole"),
    [
        ("--num_ep", "--num_epochs"),
        ("--conf", "--config"),
        ("--peft.meth", "--peft.method"),
        ("--no_pol", "--no_policy"),
    ],
)
def test_fault_abbreviated_flags_half_accepted(refusal: Callable[..., str], word: str, whole: str) -> None:
    told = f"there is no flag {word}; the nearest is {whole}"
    assert refusal(word, "3") == told
    assert refusal(f"{word}=3") == told


def test_fault_json_overriding_a_flag(train: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"num_epochs": 30, "top_k": 4, "use_policy": true}')
    for words in (["--num_epochs", "2", "--no_policy"],):
        for order in (["--config", str(tmp_path / "c.json"), *words], [*words, "--config", str(tmp_path / "c.json")]):
            config = train(*order)
            assert (config.num_epochs, config.top_k, config.use_policy) == (2, 4, False)


def test_nested_flags(train: Callable[..., Config]) -> None:
    config = train(
        "--peft.config.keep_module_keywords",
        "ln_post",
        "proj",
        "--peft.method",
        "ibs",
        "--peft.config.retain_ratio",
        "0.2",
    )
    assert config.peft.config == IbsSettings(retain_ratio=0.2, keep_module_keywords=("ln_post", "proj"))
    config = train(
        "--peft.method", "bitfit", "--peft.config.keep_module_keywords", "[]", "--peft.config.include_qkv_bias"
    )
    assert config.peft.config == BitFitSettings(include_qkv_bias=True)
    assert train("--peft.method", "ibs", "--peft.config.no_normalization").peft.config == IbsSettings(
        normalization=False
    )
    assert train("--peft", '{"method": "ibs"}').peft.method == "ibs"


def test_a_peft_file_lies_over_a_recipe_and_flags_over_both(train: Callable[..., Config]) -> None:
    config = train(
        "--peft.config.retain_ratio", "0.5", "--config", str(ROOT / "cfgs/msrvtt.json"),
        "--peft", str(ROOT / "cfgs/peft/ibs.json"),
    )  # fmt: skip
    assert (config.dataset, config.peft.method) == ("msrvtt", "ibs")
    assert isinstance(config.peft.config, IbsSettings)
    assert (config.peft.config.retain_ratio, config.peft.config.pre_batch_size) == (0.5, 16)


# ---- what is refused, and how ----


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--top_k", "abc"], 'command line: top_k is "abc", but must be a whole number >= 1'),
        (["--top_k", "2.0"], "command line: top_k is 2.0, but must be a whole number >= 1"),
        (["--top_k", "none"], 'command line: top_k is "none", but must be a whole number >= 1'),
        (["--weight_decay", "nan"], 'command line: weight_decay is "nan", but must be a number >= 0'),
        (["--top_k", ""], 'command line: top_k is "", but must be a whole number >= 1'),
        (["--top_k"], "argument --top_k: expected one argument"),
        (["--no_policy=3"], "argument --no_policy: ignored explicit argument '3'"),
        (["cfgs/demo.json"], "cfgs/demo.json: belongs to no flag; a settings file is given as --config FILE"),
        (["--json"], "--json belongs to --dry_run"),
        (["--optuna_cfg.opt_params", "{"], "--optuna_cfg.opt_params: not JSON: "),
        (["--peft.config", '{"a": 1, "a": 2}'], '--peft.config: the key "a" stands twice'),
        (["--config", ""], "the name of a JSON file is empty"),
        (["--config", "nowhere.json"], "nowhere.json: there is no such file"),
        (["--peft", "nowhere.json"], "nowhere.json: there is no such file"),
        (["--peft.method", "ssf"], 'command line: peft.method is "ssf", but must be one of full, bitfit, ibs, lora'),
    ],
)
def test_refusals(refusal: Callable[..., str], words: list[str], told: str) -> None:
    assert refusal(*words).startswith(told)


def test_everything_wrong_is_told_at_once(refusal: Callable[..., str]) -> None:
    lines = refusal("--top_k", "x", "--rnn", "gru", "--betas", "1", "2").splitlines()
    assert lines[0] == "4 things are wrong with the settings:"
    assert len(lines) == 5


@pytest.mark.parametrize("word", ["--debug", "--debug=true"])
def test_debug_shows_the_traceback(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", word, "--top_k", "x"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_debug_false_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--debug", "false", "--top_k", "x"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_errors_and_interruption_while_training(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(config: Config, folder: Path | None) -> None:
        raise UserError("videos/a.mp4 is empty")

    def interrupt(config: Config, folder: Path | None) -> None:
        raise KeyboardInterrupt

    trainer = sys.modules["adaclip_finetune.training.trainer"]
    monkeypatch.setattr(trainer, "fit", fail)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "adaclip: error: videos/a.mp4 is empty\n"
    (tmp_path / "c.json").write_text('{"debug": true}')
    assert cli.main(["train", "--config", str(tmp_path / "c.json")]) == 2
    assert capsys.readouterr().err.count("Traceback") == 1
    monkeypatch.setattr(trainer, "fit", interrupt)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "adaclip: interrupted\n"


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--train_annot", "NAME"],
        ["train", "--resume", "NAME"],
        ["index", "RUN", "NAME", "-o", "new.index"],
        ["search", "NAME", "a dog"],
        ["extract", "NAME", "frames"],
    ],
)
def test_a_name_that_is_too_long_is_no_traceback(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    name = "x" * 300
    assert cli.main([name if word == "NAME" else word for word in words]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"adaclip: error: {name}") and told.endswith(": File name too long\n")


# ---- the commands ----


def test_overview_version_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(f"\n  {name} " in overview for name in cli.COMMANDS)
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(f"adaclip {__version__}\n")
    assert cli.main(["trian"]) == 2
    assert (
        capsys.readouterr().err == "adaclip: error: there is no command trian; the nearest is train (adaclip --help)\n"
    )


def test_schema_knows_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["properties"]) == {"$schema", *Config.model_fields}
    assert document["additionalProperties"] is False
    assert document["properties"]["top_k"] == {
        "default": 8, "description": "frames that are chosen", "minimum": 1, "role": "model", "title": "Top K",
        "type": "integer", "unit": "frames",
    }  # fmt: skip


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = "import sys; from adaclip_finetune.cli import main; sys.exit(main(['schema']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141

"""The `adaclip` program: flags, help, exit codes and error messages."""

import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaclip_finetune import __version__, cli
from adaclip_finetune.commands import train as train_command
from adaclip_finetune.config import BitFitSettings, Config, IbsSettings
from adaclip_finetune.config.schema import described
from adaclip_finetune.config.settings import GROUPS
from adaclip_finetune.errors import UserError

ROOT = Path(__file__).parents[2]
Calls = list[tuple[str, Config, tuple[Any, ...], dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Record what `adaclip train` would start; the files that a config names count as existing."""
    made: Calls = []

    def record(name: str) -> Callable[..., None]:
        return lambda config, *given, **options: made.append((name, config, given, options))

    for stand_in, names in {"trainer": ["fit"], "evaluate_only": ["evaluate_only", "dry_run"]}.items():
        module = types.ModuleType(f"adaclip_finetune.training.{stand_in}")
        for name in names:
            setattr(module, name, record(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(train_command, "check_paths", lambda config: None)
    return made


@pytest.fixture
def train(calls: Calls) -> Callable[..., Config]:
    """Run `adaclip train` and return the config it starts with."""

    def run(*words: str) -> Config:
        assert cli.main(["train", *words]) == 0
        return calls[-1][1]

    return run


@pytest.fixture
def refusal(calls: Calls, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `adaclip train` and return the error message: exit code 2, nothing started, no traceback."""

    def run(*words: str) -> str:
        capsys.readouterr()
        assert cli.main(["train", *words]) == 2
        printed = capsys.readouterr()
        assert not calls and not printed.out
        assert printed.err.startswith("adaclip: error: ") and "Traceback" not in printed.err
        return printed.err.removeprefix("adaclip: error: ").rstrip()

    return run


def python(code: str, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, env={**os.environ, **environment}
    )


# ---- what is started ----


def test_train_starts_training_evaluation_or_a_dry_run(calls: Calls) -> None:
    for words in ([], ["--do_inference"], ["--dry_run"], ["--dry_run", "--json", "--do_inference"]):
        assert cli.main(["train", *words]) == 0
    assert [(name, given, options) for name, _, given, options in calls] == [
        ("fit", (), {"folder": None}), ("evaluate_only", (None,), {}),
        ("dry_run", (), {"as_json": False}), ("dry_run", (), {"as_json": True}),
    ]  # fmt: skip


def test_path_errors_and_train_py_do_not_import_torch() -> None:
    done = python("import sys; from adaclip_finetune.cli import main; print(main(['train']), 'torch' in sys.modules)")
    assert done.stdout.split() == [b"2", b"False"] and b"--train_annot" in done.stderr
    done = subprocess.run([sys.executable, "-X", "importtime", "train.py", "--help"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and done.stdout.startswith(b"usage: adaclip train")
    assert b"| adaclip_finetune.cli" in done.stderr and not re.search(rb"\| +torch\n", done.stderr)


# ---- flags ----


def test_every_setting_is_a_flag_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    positions = [text.index(f"\n{title}:\n") for title in GROUPS.values()]
    assert positions == sorted(positions)
    assert all(f"\n  --{name} " in text for name in described(Config))
    for words in (
        "[a whole number >= 1; unit: frames; default: 16]",
        "[one of bertadam, adamw, clip_vip_adamw; default: bertadam]",
        "--no_policy the same as --use_policy false",
        "[for ibs; a number > 0 and <= 1; default: 0.1]",
    ):
        assert words in " ".join(text.split())


def test_values_of_flags(train: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(
        '{"num_epochs": 30, "word_agg": "mlp", "optuna_cfg": {"opt_params": {"seed": {"range": [0, 9]}}}}'
    )
    config = train(
        "--num_frm", "32", "--learning_rate", "5e-5", "--coef_lr=.2", "--weight_decay", "1", "--grad_norm", "-1",
        "--freeze_layer_num", "-1", "--max_img_size", "none", "--dataset", "true", "--num_epochs", "2",
        "--word_agg", "null", "--optuna_cfg", "none", "--betas", "0.8", "0.9", "--config", str(tmp_path / "c.json"),
    )  # fmt: skip
    assert (config.num_frm, config.learning_rate, config.coef_lr, config.weight_decay) == (32, 5e-5, 0.2, 1.0)
    assert (config.grad_norm, config.freeze_layer_num, config.max_img_size, config.dataset) == (-1.0, -1, None, "true")
    assert (config.num_epochs, config.word_agg, config.optuna_cfg, config.betas) == (2, None, None, (0.8, 0.9))
    assert train("--betas", "[0.8, 0.9]").betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--save_last", "save_last", True),
        ("--save_last=True", "save_last", True),
        ("--save_last FALSE", "save_last", False),
        ("--save_last --no_save_last", "save_last", False),
        ("--no_policy", "use_policy", False),
        ("--no_policy --use_policy", "use_policy", True),
        ("--no_warmup", "no_warmup", True),
        ("--no_warmup false", "no_warmup", False),
    ],
)
def test_switches(train: Callable[..., Config], words: str, name: str, value: bool) -> None:
    assert getattr(train(*words.split()), name) is value


def test_nested_flags_and_section_files(train: Callable[..., Config]) -> None:
    keywords = ("--peft.config.keep_module_keywords", "ln_post", "proj")
    config = train(*keywords, "--peft.method", "ibs", "--peft.config.no_normalization")
    assert config.peft.config == IbsSettings(keep_module_keywords=("ln_post", "proj"), normalization=False)
    config = train("--peft", '{"method": "bitfit"}', "--peft.config.include_qkv_bias")
    assert config.peft.config == BitFitSettings(include_qkv_bias=True)
    recipe = ("--config", str(ROOT / "cfgs/msrvtt.json"), "--peft", str(ROOT / "cfgs/peft/ibs.json"))
    config = train("--peft.config.retain_ratio", "0.5", *recipe)
    assert (config.dataset, config.peft.method) == ("msrvtt", "ibs")
    assert config.peft.config.model_dump()["retain_ratio"] == 0.5


# ---- errors ----


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (["--top_k", "abc"], '--top_k is "abc", but must be'),
        (["--top_k", "none"], '--top_k is "none", but must be'),
        (["--top_k", ""], '--top_k is "", but must be'),
        (["--weight_decay", "nan"], "--weight_decay is NaN, but must be"),
        (["--freeze_cnn", "0"], '--freeze_cnn is "0", but must be true or false'),
        (["--betas", "0.9,0.98"], "2 settings are invalid"),
        (["--top_k"], "argument --top_k: "),
        (["--no_policy=3"], "argument --no_policy: "),
        (["--num_ep", "3"], "unknown flag --num_ep; did you mean --num_epochs?"),
        (["--peft.meth", "ibs"], "unknown flag --peft.meth; did you mean --peft.method?"),
        (["cfgs/demo.json"], "unexpected argument: cfgs/demo.json"),
        (["--json"], "--json requires --dry_run"),
        (["--optuna_cfg.opt_params", "{"], "--optuna_cfg.opt_params: "),
        (["--peft.config", '{"a": 1, "a": 2}'], "--peft.config: "),
        (["--config", "nowhere.json"], "nowhere.json: "),
        (["--top_k", "x", "--rnn", "gru", "--betas", "1", "2"], "4 settings are invalid"),
    ],
)
def test_wrong_flags(refusal: Callable[..., str], words: list[str], start: str) -> None:
    assert refusal(*words).startswith(start)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    for words, shown in ((["--debug"], True), (["--debug=true"], True), (["--debug", "false"], False)):
        assert cli.main(["train", *words, "--top_k", "x"]) == 2
        assert ("Traceback" in capsys.readouterr().err) is shown


def test_errors_and_interruption_while_training(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail_with(error: BaseException) -> None:
        def fail(config: Config, folder: Path | None) -> None:
            raise error

        monkeypatch.setattr(sys.modules["adaclip_finetune.training.trainer"], "fit", fail)

    fail_with(UserError("videos/a.mp4 is empty"))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "adaclip: error: videos/a.mp4 is empty\n"
    (tmp_path / "c.json").write_text('{"debug": true}')
    assert cli.main(["train", "--config", str(tmp_path / "c.json")]) == 2
    assert capsys.readouterr().err.count("Traceback") == 1
    fail_with(KeyboardInterrupt())
    assert cli.main(["train"]) == 130


@pytest.mark.parametrize(
    "words",
    ["train --train_annot NAME", "train --resume NAME", "index RUN NAME -o new", "search NAME dog", "extract NAME f"],
)
def test_a_file_name_that_is_too_long_gives_no_traceback(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = "x" * 300
    assert cli.main([name if word == "NAME" else word for word in words.split()]) == 2
    assert capsys.readouterr().err.startswith(f"adaclip: error: {name}")


# ---- commands ----


def test_overview_version_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(f"\n  {name} " in overview for name in cli.COMMANDS)
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(f"adaclip {__version__}\n")
    assert cli.main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_without_importing_torch(command: str) -> None:
    done = python(
        f"import sys; from adaclip_finetune.cli import main; print(main([{command!r}, '--help']), *sys.modules)"
    )
    code, *modules = done.stdout.decode().rsplit("\n", 2)[-2].split()
    assert (code, done.stderr) == ("0", b"")
    assert not {"torch", "numpy", "av", "optuna"} & set(modules)


def test_a_closed_pipe_is_not_an_error() -> None:
    code = "import sys; from adaclip_finetune.cli import main; sys.exit(main(['schema']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_a_console_that_is_not_utf_8_shows_escapes() -> None:
    code = "import sys; from adaclip_finetune import cli; cli.COMMANDS['→'] = ''; sys.exit(cli.main(['-h']))"
    done = python(code, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert rb"\u2192" in done.stdout

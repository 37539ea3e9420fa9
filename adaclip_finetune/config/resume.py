"""`--resume <run folder>`: the settings with which an interrupted run goes on, which are its own."""

from __future__ import annotations

from pathlib import Path

from adaclip_finetune.config.roles import on_resume
from adaclip_finetune.config.schema import show
from adaclip_finetune.config.settings import Config, load_config
from adaclip_finetune.errors import UserError


def continued_config(config: Config) -> Config:
    """The settings of the run in the folder that `config.resume` names, with those laid over them that are free.

    Raises UserError where the folder holds no run, or a setting was given that differs from the run's own.
    """
    assert config.resume is not None
    folder = Path(config.resume)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"resume: {folder} is no run folder: it holds no config.json. Give the folder of a run, or a weights file"
        )
    own = load_config(path)
    if config.do_inference and not own.do_inference:
        raise UserError(
            f"resume: the run in {folder} trains; to evaluate what it learned, give its weights: "
            f"--config {path} --do_inference --resume {folder / 'best.safetensors'}"
        )
    given = {name: getattr(config, name) for name in sorted(config.model_fields_set - on_resume("ignored"))}
    free = on_resume("free")
    problems = [
        f"{name} is {show(value)} here, and {show(getattr(own, name))} in the run"
        for name, value in given.items()
        if name not in free and value != getattr(own, name)
    ]
    if problems:
        raise UserError(
            f"resume: a run goes on with its own settings, those in {path}, but\n  "
            + "\n  ".join(problems)
            + f"\nLeave them out; or begin a new run with its weights: --resume {folder / 'best.safetensors'}"
        )
    return load_config(path, {name: value for name, value in given.items() if name in free})

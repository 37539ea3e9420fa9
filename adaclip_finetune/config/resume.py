"""Settings of a resumed run (`--resume RUN_FOLDER`)."""

from __future__ import annotations

from pathlib import Path

from adaclip_finetune.config.roles import on_resume
from adaclip_finetune.config.schema import show
from adaclip_finetune.config.settings import Config, load_config
from adaclip_finetune.errors import UserError


def continued_config(config: Config) -> Config:
    """Return the settings of the run in the folder `config.resume`, overridden by those of `config` that may change.

    Raises UserError if the folder is not a run folder, or if a given setting must be the run's own and is not.
    """
    folder = Path(str(config.resume))
    path, best = folder / "config.json", folder / "best.safetensors"
    if not path.is_file():
        raise UserError(
            f"resume: {folder} is not a run folder: config.json not found. Give a run folder or a weights file"
        )
    own = load_config(path)
    if config.do_inference and not own.do_inference:
        way_out = f"to evaluate it, give its weights: --config {path} --do_inference --resume {best}"
        raise UserError(f"resume: {folder} is a training run; {way_out}")
    given = {name: getattr(config, name) for name in sorted(config.model_fields_set - on_resume("ignored"))}
    changed = {name: value for name, value in given.items() if value != getattr(own, name)}
    if refused := changed.keys() - on_resume("free"):
        values = [f"{name} is {show(given[name])}, but {show(getattr(own, name))} in the run" for name in refused]
        raise UserError(
            f"resume: a run is resumed with its own settings ({path}), but\n  "
            + "\n  ".join(sorted(values))
            + f"\nLeave them out, or start a new run from its weights: --resume {best}"
        )
    return load_config(path, changed)

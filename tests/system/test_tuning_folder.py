"""Where a study writes, and what is said where it cannot."""

import csv
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest

from adaclip_finetune.config import Config, load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.tuning.folder import StudyFolder


def config(tmp_path: Path) -> Config:
    return load_config(None, {"dataset": "shapes", "output_dir": str(tmp_path / "out")})


def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    study = optuna.create_study(study_name="s")
    study.set_user_attr("folder", str(tmp_path / "out" / "tiny-s"))
    gone = StudyFolder(config(tmp_path), study)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(UserError, match=r"-s could not be written"):
        gone.say("a word")
    with pytest.raises(UserError, match=r"-s could not be written"):
        gone.write(study)


def test_several_workers_write_at_once_and_every_file_is_whole(tmp_path: Path) -> None:
    study = optuna.create_study(study_name="s")
    study.set_user_attr("folder", str(tmp_path / "s"))
    study.add_trial(optuna.create_trial(value=1.0))
    folder = StudyFolder(config(tmp_path), study)
    with ThreadPoolExecutor(4) as workers:
        for written in [workers.submit(folder.write, study) for _ in range(100)]:
            written.result()
    assert {path.name for path in (tmp_path / "s").iterdir()} == {"study.csv", "best_config.json"}
    assert load_config(tmp_path / "s" / "best_config.json").dataset == "shapes"
    with (tmp_path / "s" / "study.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 1


def test_no_output_writes_nothing(tmp_path: Path) -> None:
    silent = StudyFolder(config(tmp_path).model_copy(update={"no_output": True}), optuna.create_study())
    silent.say("a word")
    silent.write(optuna.create_study())
    assert silent.path is silent.of_trial(0) is None and not list(tmp_path.iterdir())

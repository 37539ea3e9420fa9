"""Files and folders that a config names are asked for before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest

from adaclip_finetune.config import load_config
from adaclip_finetune.config.paths import check_paths
from adaclip_finetune.errors import UserError


def files(tmp_path: Path, **more: Any) -> dict[str, Any]:
    """Settings whose files are all there."""
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.json").touch()
    (tmp_path / "videos").mkdir(exist_ok=True)
    annotations = {f"{name}_annot": str(tmp_path / f"{name}.json") for name in ("train", "val", "test")}
    return annotations | {"video_dir": str(tmp_path / "videos")} | more


def complaint(**settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        check_paths(load_config(None, settings))
    return str(caught.value)


def test_files_that_are_there_pass(tmp_path: Path) -> None:
    check_paths(load_config(None, files(tmp_path)))
    check_paths(load_config(None, files(tmp_path, do_inference=True, train_annot=None, val_annot="nowhere.json")))
    check_paths(load_config(None, files(tmp_path, use_policy=False, policy_weights="nowhere.pt")))


def test_what_is_needed_is_asked_for_by_name() -> None:
    message = complaint()
    assert message.startswith("3 things are wrong")
    assert all(flag in message for flag in ("--train_annot", "--val_annot", "--frames_dir", "--video_dir"))
    assert "test_annot is needed by do_inference" in complaint(do_inference=True)


@pytest.mark.parametrize(
    "name", ["train_annot", "val_annot", "test_annot", "video_dir", "clip_weights", "policy_weights", "resume"]
)
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    missing = str(tmp_path / "missing")
    assert complaint(**files(tmp_path, **{name: missing})).startswith(f"{name} {missing}: there is no such")


def test_a_relative_path_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        complaint(**files(tmp_path, train_annot="t.json"))
        == f"train_annot t.json: there is no such file in {Path.cwd()}"
    )


def test_a_file_where_a_folder_belongs_and_the_other_way_round(tmp_path: Path) -> None:
    file, folder = str(tmp_path / "train.json"), str(tmp_path)
    message = complaint(
        **files(tmp_path, val_annot=folder, video_dir=file, output_dir=file, save_similarity="no/s.npy")
    )
    assert f"val_annot {folder} is no file" in message
    assert f"video_dir {file} is no folder" in message
    assert f"output_dir {file} is no folder" in message
    assert "save_similarity no: there is no such folder" in message


def test_ids_of_a_matrix_do_not_replace_an_annotation(tmp_path: Path) -> None:
    given = files(tmp_path)
    matrix = str(Path(given["val_annot"]).with_suffix(".npy"))
    told = f"save_similarity {matrix} would write its ids over val_annot; give another name"
    assert complaint(**given, save_similarity=matrix) == told

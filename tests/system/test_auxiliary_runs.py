"""The objective `auxiliary_captions` in whole runs and in `adaclip check`."""

import json
from pathlib import Path
from typing import Any

import killed
import pytest
import torch
from checking import checked, finding
from safetensors.torch import load_file
from spread import spread

from adaclip_finetune.config import load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.training.trainer import fit

Project = dict[str, Any]
OBJECTIVE = {"method": "auxiliary_captions"}


def write_captions(project: Project, folder: Path, having: int) -> Project:
    """Return settings for an annotation in which the first `having` videos have two auxiliary captions each."""
    videos = json.loads(Path(project["train_annot"]).read_text())
    for number, video in enumerate([*videos.values()][:having]):
        video["auxiliary"] = [f"a picture of colour {number % 4}", "something with a colour"]
    path = folder / "captions.json"
    path.write_text(json.dumps(videos))
    return {**project, "train_annot": str(path), "objective": OBJECTIVE, "concat_captions": "indep-one"}


def test_a_killed_run_resumes_bit_for_bit(project: Project, tmp_path: Path) -> None:
    given = {**write_captions(project, tmp_path, 7), "grad_cache_chunk": 2, "tower": {"method": "proxy_tokens"}}
    whole, resumed = killed.whole_and_resumed(given, tmp_path)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def _train(settings: Project, output: Path) -> None:
    fit(load_config(None, {**settings, "num_epochs": 1, "output_dir": str(output)}))


def test_two_processes_learn_what_one_does_and_auxiliary_captions_matter(project: Project, tmp_path: Path) -> None:
    given = write_captions(project, tmp_path, 3)  # so that some shares of batches have none
    assert spread(_train, 2, tmp_path / "log", given, tmp_path / "two") == [0, 0], (tmp_path / "log").read_text()
    _train(given, tmp_path / "one")
    _train({**given, "objective": {**OBJECTIVE, "config": {"loss": "v_s"}}}, tmp_path / "without")
    one, two, without = (
        load_file(next((tmp_path / where / "tiny").iterdir()) / "best.safetensors")
        for where in ("one", "two", "without")
    )
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    lines = (next((tmp_path / "one" / "tiny").iterdir()) / "metrics.jsonl").read_text().splitlines()
    events = [event for event in map(json.loads, lines) if event["event"] == "train"]
    assert all(set(event["terms"]) == {"v_sc", "f_c"} for event in events)
    assert all(event["loss"] == sum(event["terms"].values()) > 0 for event in events)
    changes = [(one[name] - two[name]).abs().max() for name in one]
    assert max((one[name] - without[name]).abs().max() for name in one) > 10 * max(changes)


def test_captions_are_counted_and_a_run_without_any_is_refused(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for having, severity in ((5, "fine"), (0, "fails")):
        given = write_captions(project, tmp_path, having)
        config = tmp_path / "config.json"
        config.write_text(json.dumps(given))
        _, found = checked(capsys, "--config", str(config))
        counted = finding(found, "auxiliary_captions", "train")
        assert (counted.severity, counted.items) == (severity, {"having": having, "videos": 12})
    with pytest.raises(UserError, match=r"captions\.json has an auxiliary caption.*\n.*v_s"):
        fit(load_config(None, {**given, "output_dir": str(tmp_path)}))

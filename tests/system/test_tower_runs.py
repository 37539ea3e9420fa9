"""Every tower from training with Hard-Top-k to search, in one process and in two, killed and resumed."""

import json
from pathlib import Path
from typing import Any

import killed
import pytest
import torch
from comparing import only_run
from media import write_video
from safetensors.torch import load_file
from spread import spread

from adaclip_finetune import VideoIndex, load_retriever
from adaclip_finetune.cli import main
from adaclip_finetune.config import load_config
from adaclip_finetune.training.trainer import fit

Project = dict[str, Any]

TOWERS: dict[str, Any] = {
    "proxy_tokens": {"method": "proxy_tokens", "config": {"temporal_size": 4}},
    "change": {"method": "change"},
    "clustering": {"method": "clustering", "config": {"stages": [{"block": 1, "segments": 2, "tokens": 3}]}},
    "sampling": {
        "method": "clustering",
        "config": {"stages": [{"block": 1, "segments": 2, "tokens": 3}], "algorithm": "sparse_sampling"},
    },
    "global_local": {"method": "global_local"},
}
every_tower = pytest.mark.parametrize("name", TOWERS)


def given(name: str, project: Project, output: Path) -> Project:
    settings = {"tower": TOWERS[name], "peft": {"method": "bitfit"}, "top_k": 3, "output_dir": str(output)}
    return {**project, **settings, "similar_captions": 2}


def trained(name: str, project: Project, output: Path, **more: Any) -> Path:
    fit(load_config(None, {**given(name, project, output), **more}))
    return only_run(output)


@every_tower
def test_a_run_is_evaluated_searched_and_exported(
    name: str, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, table = trained(name, project, tmp_path / "out", num_epochs=1), tmp_path / "t.json"
    noted = json.loads((run / "metrics.json").read_text())
    for source in (run, run / "adapter.safetensors"):
        assert main(["evaluate", str(source), "--annot", str(project["test_annot"]), "--json", str(table)]) == 0
        assert json.loads(table.read_text())["rows"][-1]["t2v"]["MeanR"] == noted["finetuned"]["t2v"]["MeanR"]
    for number in range(3):
        write_video(tmp_path / "videos" / f"v{number}.mp4", 20 + 10 * number)
    assert main(["index", str(run), str(tmp_path / "videos"), "-o", str(tmp_path / "i"), "--num_workers", "0"]) == 0
    capsys.readouterr()
    assert main(["search", str(tmp_path / "i"), "a red thing", "-k", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    expected = VideoIndex.load(tmp_path / "i").search(load_retriever(run).encode_text(["a red thing"]), 2)[0]
    assert [hit["id"] for hit in found["hits"]] == [hit.video.id for hit in expected]
    assert main(["export", str(run), "--format", "open_clip", "-o", str(tmp_path / "exported")]) == 0
    assert f"no place for tower {TOWERS[name]['method']}" in capsys.readouterr().out


def _train(name: str, peft: str, project: Project, output: Path) -> None:
    trained(name, project, output, learning_rate=1e-4, num_epochs=1, peft={"method": peft})


@pytest.mark.parametrize(
    ("name", "peft"),  # without sampling, which each process draws by itself
    [
        ("proxy_tokens", "bitfit"),
        ("proxy_tokens", "lora"),
        ("change", "bitfit"),
        ("clustering", "bitfit"),
        ("clustering", "full"),
        ("global_local", "bitfit"),
        ("global_local", "lora"),
    ],
)
def test_two_processes_learn_what_one_does(name: str, peft: str, project: Project, tmp_path: Path) -> None:
    assert spread(_train, 2, tmp_path / "log", name, peft, project, tmp_path / "two") == [0, 0]
    _train(name, peft, project, tmp_path / "one")
    one, two = (load_file(only_run(tmp_path / where) / "best.safetensors") for where in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@every_tower
def test_a_killed_run_resumes_bit_for_bit(name: str, project: Project, tmp_path: Path) -> None:
    one, other = killed.whole_and_resumed(given(name, project, tmp_path), tmp_path)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

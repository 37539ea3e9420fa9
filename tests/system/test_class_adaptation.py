"""Classifiers that adapt to each video by the reward of other CLIPs."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import evaluated as evaluated_by_command
from comparing import trained_run
from conftest import write_clip_folder
from evaluating import outcome, together

from adaclip_finetune.config import load_config
from adaclip_finetune.data import loader
from adaclip_finetune.data.splits import evaluation_split
from adaclip_finetune.evaluation.parts import PartFolder
from adaclip_finetune.evaluation.reward import class_baselines
from adaclip_finetune.evaluation.tasks.classification import ClassificationReport
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.training.measure import build_task
from adaclip_finetune.weights.clip_weights import load_clip

Project = dict[str, Any]


@pytest.fixture(scope="module")
def colours(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Eight videos in four batches, whose classes are four colours, a file of templates, and another CLIP."""
    folder = tmp_path_factory.mktemp("colours")
    write_clip_folder(folder / "reward", seed=3)
    (folder / "templates.txt").write_text("a photo of a {}\n")
    entries = json.loads(Path(project["test_annot"]).read_text())
    for entry in entries.values():
        entry["sentences"] = [entry["sentences"][1].removeprefix("it is ")]
    (folder / "test.json").write_text(json.dumps(entries))
    task = {"method": "classification", "config": {"templates": str(folder / "templates.txt")}}
    settings = {"do_inference": True, "val_batch_size": 2, "task": task, "test_annot": str(folder / "test.json")}
    return {**project, **settings, "reward": str(folder / "reward")}


def adapted(colours: Project, learns: str = "bitfit", keep: Path | None = None, **changed: Any) -> Project:
    """Return what a model drawn from seed 0 finds when it adapts to each video, with steps that change scores."""
    settings = {**colours, **{name: changed.pop(name) for name in ("policy_backbone", "frame_agg") if name in changed}}
    own = {"reward": [settings.pop("reward"), "self"], "learns": {"method": learns}, "learning_rate": 0.1, "steps": 2}
    own |= {"views": 8, "certain_share": 0.3}
    settings["adaptation"] = {"method": "clip_reward", "config": own | changed}
    return classified(settings, keep)


def classified(settings: Project, keep: Path | None = None) -> Project:
    config = load_config(None, {name: value for name, value in settings.items() if name != "reward"})
    assert config.test_annot is not None
    torch.manual_seed(0)
    loaded = load_clip(config)
    model = VideoRetriever(config, loaded)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    split = evaluation_split(config, config.test_annot)
    with closing(build_task(config, split, loaded, model, "test")) as task:
        found = task(model, keep)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(tensor.equal(after[name]) for name, tensor in before.items())
    assert isinstance(found, ClassificationReport)
    scores = None if found.scores is None else found.scores.tolist()
    return {"ranks": found.ranks.tolist(), "scores": scores, "figures": found.as_dict()}


@pytest.mark.parametrize("learns", ["full", "bitfit", "lora", "context"])
def test_each_way_of_learning_changes_scores_and_only_with_steps(learns: str, colours: Project) -> None:
    plain = classified(colours)
    found = adapted(colours, learns)
    assert torch.tensor(found["scores"]).isfinite().all()
    assert not torch.allclose(torch.tensor(found["scores"]), torch.tensor(plain["scores"]), atol=1e-3)
    without = adapted(colours, learns, steps=0)
    assert torch.allclose(torch.tensor(without["scores"]), torch.tensor(plain["scores"]), atol=1e-5)
    assert without["figures"] == plain["figures"]


@pytest.mark.parametrize("changed", [{"policy_backbone": "clip"}, {"frame_agg": "qscore"}], ids=str)
def test_every_selector_and_scorer_adapts(changed: Project, colours: Project) -> None:
    plain, found = classified({**colours, **changed}), adapted(colours, **changed)
    assert not torch.allclose(torch.tensor(found["scores"]), torch.tensor(plain["scores"]), atol=1e-3)


def test_batches_interruptions_and_processes_change_nothing(
    colours: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = adapted(colours)
    with monkeypatch.context() as patch:  # the other CLIP takes fewer frames, so more videos fit into its batches
        patch.setattr(loader, "FRAMES_A_GALLERY_BATCH", 18)
        assert adapted({**colours, "val_batch_size": 500})["figures"] == expected["figures"]
    keep, original, calls = tmp_path / "keep", PartFolder.write, []

    def write(self: PartFolder, name: str, *content: Any) -> None:
        original(self, name, *content)
        calls.append(name)
        if name.startswith("adapted-classes") and len([one for one in calls if one.startswith("adapted")]) == 2:
            raise ZeroDivisionError

    monkeypatch.setattr(PartFolder, "write", write)
    assert "ZeroDivisionError" in outcome(lambda: adapted(colours, keep=keep))
    assert adapted(colours, keep=keep) == expected
    assert sum(name.startswith("adapted-classes") for name in calls) == 4, "each batch was adapted to once"
    monkeypatch.undo()
    main, other = together(2, adapted, colours, folder=tmp_path / "two")
    assert main == json.loads(json.dumps(expected)) and other["ranks"] == expected["ranks"]


def test_baselines_are_those_of_the_definition() -> None:
    random = torch.Generator().manual_seed(0)
    scores, *others = (torch.randn(5, 6, generator=random) for _ in range(3))
    found = class_baselines(50 * scores, others, [1, 3], candidates=2)
    reward = (others[0] + 3 * others[1]) / 4
    torch.testing.assert_close(found["alone"].float(), reward)
    for row in range(5):
        first, second, *rest = scores[row].argsort(descending=True).tolist()
        best = [first, second] if reward[row, first] > reward[row, second] else [second, first]
        assert found["reranked"][row].argsort(descending=True).tolist() == [*best, *rest]
        own, theirs = ((one - one.mean()) / one.std(correction=0) for one in (scores[row], reward[row]))
        torch.testing.assert_close(found["ensemble"][row].float(), (own + theirs) / 2)


def test_the_baselines_stand_beside_an_adapted_classifier(project: Project, colours: Project, tmp_path: Path) -> None:
    run = trained_run(project, tmp_path / "work", num_epochs=1)
    words = [run, "--annot", colours["test_annot"], "--task.method", "classification", "--adapt", "clip_reward"]
    own = {"learns.method": "bitfit", "learning_rate": 0.1, "steps": 1, "views": 4, "certain_share": 0.5}
    words += [word for name, value in own.items() for word in (f"--adaptation.config.{name}", value)]
    table = evaluated_by_command(*words, "--reward", project["clip_weights"], folder=tmp_path)
    zero_shot, model, alone, _, _, itself, last = rows = table["rows"]
    assert [row["kind"] for row in rows] == ["zero-shot", "model", *["baseline"] * 4, "adapted"]
    # This CLIP is the one that the run started from.
    assert [alone[name] for name in ("top1", "top5", "per_class")] == [
        zero_shot[name] for name in ("top1", "top5", "per_class")
    ]
    assert all(row["top1 95%"] and row["classes"] == model["classes"] == 4 for row in rows)
    assert itself["cost"]["v2t_query_seconds"] > 0 and "adapted to each video" in last["note"]
    pairs = {(pair["label"], pair["minus"]) for pair in table["differences_in_R@1"] if "top1" in pair}
    assert pairs >= {(last["label"], row["label"]) for row in rows[:-1]}


def test_what_learns_must_encode_the_videos(colours: Project) -> None:
    own = {"reward": ["self"], "learns": {"method": "lora", "config": {"towers": "text"}}}
    given = {**colours, "adaptation": {"method": "clip_reward", "config": own}}
    assert "image tower" in outcome(lambda: classified(given))["UserError"]

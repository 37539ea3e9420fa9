"""Evaluations in which the model adapts to each query by the reward of other CLIPs."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_clip_folder
from evaluating import evaluated, killed, outcome, together

Project = dict[str, Any]


@pytest.fixture
def small(project: Project, tmp_path: Path) -> Project:
    """Eight videos in four batches, sixteen texts, and another CLIP that rewards."""
    write_clip_folder(tmp_path / "reward", seed=1)
    settings = {"do_inference": True, "val_batch_size": 2, "concat_captions": "indep-all"}
    return {**project, **settings, "adaptation": by_reward(tmp_path)}


def by_reward(folder: Path, **settings: Any) -> Project:
    """Return the section `adaptation` for the CLIP in `folder`, with steps that change ranks."""
    own = {"reward": [str(folder / "reward"), "self"], "directions": "both", "learning_rate": 0.1, "steps": 2}
    own |= {"candidates": 4, "caption_candidates": 6, "learns": {"method": "bitfit"}}
    return {"method": "clip_reward", "config": {**own, **settings}}


def ranks(found: Project, direction: str) -> list[int]:
    ranks: list[int] = found["figures"]["metrics"][direction]
    return ranks


@pytest.mark.parametrize("changed", [{}, {"policy_backbone": "clip"}, {"frame_agg": "qscore"}], ids=str)
def test_only_the_asked_direction_is_adapted(changed: Project, small: Project, tmp_path: Path) -> None:
    small |= changed
    plain = evaluated({**small, "adaptation": {"method": "none"}})
    for directions in ("t2v", "v2t", "both"):
        found = evaluated({**small, "adaptation": by_reward(tmp_path, directions=directions)})
        for direction in ("t2v", "v2t"):
            is_adapted = directions in (direction, "both")
            assert (ranks(found, direction) != ranks(plain, direction)) == is_adapted, (directions, direction)
        assert (found["matrix"] != plain["matrix"]) == (directions != "v2t")
        found = evaluated({**small, "adaptation": by_reward(tmp_path, directions=directions, steps=0)})
        assert found["figures"] == plain["figures"]


def test_batches_and_interruptions_change_nothing(small: Project, tmp_path: Path) -> None:
    expected, keep = evaluated(small), tmp_path / "embeddings"
    assert evaluated({**small, "val_batch_size": 500})["figures"] == expected["figures"]
    killed(small, keep, 40, tmp_path / "log")
    assert evaluated(small, keep) == expected
    assert evaluated({**small, "adaptation": by_reward(tmp_path, steps=1)}, keep) != expected


def evaluations(small: Project, folder: Path) -> Project:
    """What the test below compares between one process and two together."""
    with_momentum = {**small, "adaptation": by_reward(folder, momentum=0.9)}
    return {"plain": evaluated(small), "momentum": outcome(lambda: evaluated(with_momentum))}


def test_two_processes_find_what_one_finds(small: Project, tmp_path: Path) -> None:
    alone = json.loads(json.dumps(evaluations(small, tmp_path)))
    main, other = together(2, evaluations, small, tmp_path, folder=tmp_path / "two")
    assert main["plain"] == alone["plain"] and other["plain"]["figures"] == alone["plain"]["figures"]
    for found in (main, other):
        assert "momentum" in found["momentum"]["UserError"]
    assert "figures" in alone["momentum"]


def test_a_reward_that_is_not_there_is_named(small: Project, tmp_path: Path) -> None:
    missing = {**small, "adaptation": by_reward(tmp_path / "nowhere")}
    told = outcome(lambda: evaluated(missing))["UserError"]
    assert "adaptation.config.reward" in told and "nowhere" in told

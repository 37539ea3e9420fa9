"""What tuning by `cfgs/demo-optuna.json` finds, compared with the demo's own values and with random values.

    python scripts/bench/tuning.py --work /tmp/tuning --seeds 3

For each seed a study by the config's own sampler and one by RandomSampler, with as many trials and the same pruner;
of each, the best trial's weights are evaluated on test. The demo's own values are trained with as many epochs. All of
it happens in one process that keeps the frames it has decoded and trains a point once that two studies share; figures
do not depend on this. Studies stand in the work folder: run again, it goes on. Prints Markdown for docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from adaclip_finetune.config import Config, load_config
from adaclip_finetune.data.dataset import VideoItem, VideoReader
from adaclip_finetune.data.sampling import frame_indices
from adaclip_finetune.evaluation.tasks.base import Figures, value
from adaclip_finetune.training.evaluate_only import evaluate_only
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.trainer import OnEpoch, TrialResult, run_trial
from adaclip_finetune.tuning import run as tuning_run
from adaclip_finetune.tuning.report import best_trial
from adaclip_finetune.tuning.run import tune
from adaclip_finetune.tuning.space import with_values
from adaclip_finetune.tuning.study import points

ROOT = Path(__file__).resolve().parents[2]
TUNING, DEMO = ROOT / "cfgs" / "demo-optuna.json", ROOT / "cfgs" / "demo.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for studies, outside the project")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    keep_frames()
    train_once()
    own = load_config(TUNING).optuna_cfg
    assert own is not None
    samplers: dict[str, dict[str, Any]] = {"own": own.sampler.model_dump(), "random": {"name": "RandomSampler"}}
    table = [default(arguments.work, load_config(TUNING).num_epochs)]
    for seed in range(arguments.seeds):
        for name, sampler in samplers.items():
            table.append(tuned(arguments.work, f"{name}-{seed}", {**sampler, "seed": seed}))
            print("\n| | trials | pruned | best trial | validation R@1 | test R@1 |\n|---|---|---|---|---|---|")
            print("\n".join(table), flush=True)


def default(work: Path, epochs: int) -> str:
    """The row of the demo's own values."""
    config = load_config(DEMO, {"num_epochs": epochs, "num_workers": 0})
    folder = work / "default"
    weights = folder / "best.safetensors"
    if not weights.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        run_trial(config, RunFolder(config, trial=folder), lambda *_: None).save(weights)
    validation = json.loads((folder / "metrics.json").read_text())["best_validation"]["t2v"]["R@1"]
    return row("the demo's own values", "", "", "", validation, test(config, weights))


def tuned(work: Path, name: str, sampler: dict[str, Any]) -> str:
    """The row of one study, which is run, or gone on with."""
    config = load_config(
        TUNING,
        {
            "optuna_cfg.sampler": sampler,
            "optuna_cfg.storage": f"sqlite:///{work / name}.db",
            "optuna_cfg.study_name": name,
            "output_dir": str(work),
            "num_workers": 0,
        },
    )
    tune(config)
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{work / name}.db")
    trials, best = points(study.trials), best_trial(study)
    assert best is not None and best.value is not None
    pruned = sum(trial.state == optuna.trial.TrialState.PRUNED for trial in trials)
    weights = Path(best.user_attrs["folder"]) / "best.safetensors"
    said = ", ".join(f"{key} {value:.3g}" for key, value in best.params.items())
    tested = test(with_values(config, best.params), weights)
    return row(name, str(len(trials)), str(pruned), f"{best.number}: {said}", best.value, tested)


def row(name: str, points: str, pruned: str, best: str, validation: float, tested: float) -> str:
    return f"| {name} | {points} | {pruned} | {best} | {validation:.1f} | {tested:.1f} |"


def test(config: Config, weights: Path) -> float:
    """T2V R@1 on the test clips."""
    given = {"do_inference": True, "resume": str(weights), "no_output": True}
    return value(evaluate_only(config.model_copy(update=given)).as_dict(), "t2v.R@1")


def keep_frames() -> None:
    """A video's frames of one choice are decoded and brought to size once."""
    kept: dict[tuple[str, bytes], VideoItem] = {}
    read = VideoReader.read

    def read_once(self: VideoReader, video_id: str, random: np.random.Generator | None = None) -> VideoItem:
        state = random.bit_generator.state if random else {}
        settings = self.config
        indices = frame_indices(
            self.store.count(video_id),
            settings.num_frm,
            segment=settings.segment_sampling,
            subset=settings.num_frm_subset,
            random=random,
        )
        key = (video_id, indices.tobytes())
        if key not in kept:
            if random:
                random.bit_generator.state = state
            kept[key] = read(self, video_id, random)
        return kept[key]

    VideoReader.read = read_once  # type: ignore[method-assign]


def train_once() -> None:
    """A trial whose settings have been trained to the end gives the same figures and weights again."""
    done: dict[str, tuple[list[tuple[int, Figures]], TrialResult]] = {}

    def run_once(config: Config, run: RunFolder, on_epoch: OnEpoch) -> TrialResult:
        key = config.model_dump_json(exclude={"output_dir"})
        curve: list[tuple[int, Figures]] = []
        if key in done:
            with closing(run):
                run.open(config, "trained before")
                for epoch, found in done[key][0]:
                    on_epoch(epoch, found)
        else:

            def remembered(epoch: int, found: Figures) -> None:
                curve.append((epoch, found))
                on_epoch(epoch, found)

            done[key] = (curve, run_trial(config, run, remembered))
        return done[key][1]

    tuning_run.run_trial = run_once  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()

"""What a finished run found, said and written: the table on the screen, metrics.json, the similarity matrix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaclip_finetune.config import Config
from adaclip_finetune.evaluation.tasks.base import Figures, Report, Task
from adaclip_finetune.evaluation.tasks.retrieval import RetrievalReport, save_similarity
from adaclip_finetune.model.flops import Gflops
from adaclip_finetune.peft import TrainableReport
from adaclip_finetune.report import draw_frame_usage
from adaclip_finetune.training.run_folder import RunFolder

SELECTED_ON_TEST = "selected on test (val_annot and test_annot hold the same captions)"


@dataclass(frozen=True, eq=False)
class FitResult:
    """What a run found. `final` is on test_annot, on val_annot where no test was given; `folder` is None with
    no_output; `zero_shot` is None where the run began with a checkpoint and CLIP itself was not at hand."""

    zero_shot: Figures | None
    final: Report
    best_validation: Figures
    best_epoch: int
    evaluated_on: str
    selected_on_test: bool
    parameters: TrainableReport
    gflops: Gflops
    folder: Path | None

    def as_dict(self) -> dict[str, Any]:
        """The content of metrics.json."""
        return {
            "evaluated_on": self.evaluated_on,
            "selected_on": "test" if self.selected_on_test else "validation",
            "best_epoch": self.best_epoch,
            "zero_shot": self.zero_shot.as_dict() if self.zero_shot else None,
            "finetuned": self.final.as_dict(),
            "best_validation": self.best_validation.as_dict(),
            "parameters": self.parameters.as_dict(),
            "gflops": self.gflops.as_dict(),
        }


def say_and_write(result: FitResult, task: Task, config: Config, run: RunFolder) -> None:
    """Leave everything about the result in the run folder, and the short of it on the screen.

    metrics.json comes last: where it is, the run is finished.
    """
    final = result.final
    usage = final.frame_usage if isinstance(final, RetrievalReport) else None
    if (path := run.file("frame_usage.png")) and usage is not None:
        draw_frame_usage(path, usage, len(task.split.queries.video_ids), config.top_k)
    rule = f"   {SELECTED_ON_TEST.upper()}" if result.selected_on_test else ""
    if result.evaluated_on == "validation":
        rule = "   (no test_annot: these captions chose the epoch, so its figures flatter it)"
    run.say(f"\n{result.evaluated_on}, best epoch {result.best_epoch} of {config.num_epochs}{rule}")
    before = {"zero-shot": result.zero_shot} if result.zero_shot else {}
    run.say(task.table({**before, "finetuned": final.figures}))
    run.say(task.gallery(final))
    run.say(_learned(result.parameters))
    if result.zero_shot and not task.is_better(final.figures, result.zero_shot):
        run.say(
            "This finetune does not beat zero-shot: try more epochs, another learning_rate or coef_lr, or more data."
        )
    write_similarity(config, final, run)
    run.write_json("metrics.json", result.as_dict())
    if run.path is not None:
        run.say(_what_next(run.path))


def write_similarity(config: Config, report: Report, run: RunFolder) -> None:
    """`save_similarity`, where it was asked for and the task has a similarity matrix."""
    if config.save_similarity and isinstance(report, RetrievalReport):
        save_similarity(Path(config.save_similarity), report)
        run.say(f"similarity (rows queries, columns videos): {config.save_similarity}, ids beside it in JSON")


def _learned(parameters: TrainableReport) -> str:
    clip, whole = parameters.clip, parameters.all
    return (
        f"learned: {clip.trainable:,} of CLIP's {clip.total:,} parameters ({clip.percent:.3f} %), "
        f"{whole.trainable:,} of {whole.total:,} in all ({whole.percent:.3f} %)"
    )


def _what_next(folder: Path) -> str:
    names = ("best.safetensors", "adapter.safetensors", "config.json", "metrics.json", "curves.png", "frame_usage.png")
    left = ", ".join(name for name in names if (folder / name).exists())
    return (
        f"\nrun folder: {folder}\n"
        f"  {left}, train.log …\n"
        "next: evaluate it on other captions\n"
        f"  python train.py --config {folder}/config.json --do_inference --resume {folder}/best.safetensors "
        "--test_annot FILE\n"
        "or train on your own videos (README, Your own videos)"
    )

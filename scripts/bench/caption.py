"""Figures of a captioner's captions beside those of captions that need no captioner.

    python scripts/bench/caption.py RUN [MORE ...]

RUN is a finished run of task captioning on the example data. The first rows are captions of training videos: a random
one, and one of the video that the first run's retriever finds nearest. The last is the first reference of each video
that has several, compared with the others, and the captions of the first run compared with these.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from adaclip_finetune.data.annotations import VideoAnnotation, load_annotations
from adaclip_finetune.evaluation.caption_metrics import caption_figures
from adaclip_finetune.search.search_model import load_retriever

VIDEOS = Path("dataset_example/videos")


def main() -> None:
    """Print a row of figures for each kind of captions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, test = (load_annotations(f"dataset_example/{split}.json") for split in ("train", "test"))
    said = {
        run: {row["video"]: row["caption"] for row in json.loads((run / "captions.json").read_text())}
        for run in args.runs
    }

    draw = random.Random(0)
    show("random training caption", [draw.choice(draw.choice(train).sentences) for _ in test], test)
    first = args.runs[0]
    nearest = (vectors(first, test) @ vectors(first, train).T).argmax(dim=1).tolist()
    show("nearest training video", [train[place].sentences[0] for place in nearest], test)
    for run in args.runs:
        show(run.parent.parent.name, [said[run][video.video_id] for video in test], test)
    several = [video for video in test if len(video.sentences) > 1]
    others = [video.sentences[1:] for video in several]
    show(f"first reference, {len(several)} videos", [video.sentences[0] for video in several], several, others)
    show("first run, likewise", [said[first][video.video_id] for video in several], several, others)


def vectors(run: Path, videos: Sequence[VideoAnnotation]) -> Tensor:
    """Return the unit vectors (V, D) of videos."""
    model = load_retriever(run)
    return torch.stack([model.encode_video(VIDEOS / f"{video.video_id}.mp4")[0] for video in videos])


def show(
    name: str,
    captions: Sequence[str],
    videos: Sequence[VideoAnnotation],
    references: Sequence[Sequence[str]] | None = None,
) -> None:
    """Print the figures of a caption for each video, by default against all of its sentences."""
    figures = caption_figures(captions, references or [video.sentences for video in videos])
    cells = "  ".join(f"{figure} {value:5.1f}" for figure, value in figures.items())
    print(f"{name:32} {cells}  {len(set(captions))} different captions")


if __name__ == "__main__":
    main()

"""Does a threshold that was chosen on one split hold on another? False finds and misses of both, as a table.

    adaclip index RUN dataset_example/val.json --video_dir dataset_example/videos -o val.index --moments --window 1
    adaclip index RUN dataset_example/test.json --video_dir dataset_example/videos -o test.index --moments --window 1
    python scripts/bench/threshold.py val.index test.index

The threshold is the smallest that at most 5, 10, 20 or 40 % of the captions of the first index reach when their video
is hidden.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from adaclip_finetune import VideoIndex
from adaclip_finetune.search.search_model import search_model_of
from adaclip_finetune.search.threshold import (
    CaptionScores,
    RankedBy,
    Rate,
    captions_of,
    choose_score,
    rates_at,
    score_captions,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("indexes", nargs=2, type=Path)
    a = parser.parse_args()
    chosen_on, held_out = map(VideoIndex.load, a.indexes)
    print("| ranked by | threshold | false finds | misses | false finds, held out | misses, held out |")
    print("|---|---|---|---|---|---|")
    ways: list[RankedBy] = ["whole", "moment"] if chosen_on.moments else ["whole"]
    for way in ways:
        own, other = asked(chosen_on, way), asked(held_out, way)
        for percent in (5, 10, 20, 40):
            score = choose_score(own.absent, percent)
            rates: list[Rate] = [*rates_at(own, score), *rates_at(other, score)]
            print(f"| {way} | {score:.3f} | {' | '.join(map(str, rates))} |")


def asked(index: VideoIndex, way: RankedBy) -> CaptionScores:
    captions = captions_of(index, [(video.id, video.captions) for video in index.videos])
    return score_captions(index, search_model_of(index), captions, way)


if __name__ == "__main__":
    main()

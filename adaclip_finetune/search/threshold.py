"""From which score on a search has found something: a threshold, measured with captions and kept with the index.

A caption is asked twice: among all videos, and among all but its own, where what it describes is absent as far as the
captions tell (other videos may show it too, so that false finds are overestimated rather than underestimated). The
threshold is chosen so that few absent ones are found, and how many present ones it misses says what it is worth.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from adaclip_finetune.data.annotations import folded
from adaclip_finetune.data.names import canonical, split_extension
from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.bootstrap import intervals
from adaclip_finetune.strict_json import read_json

if TYPE_CHECKING:
    from adaclip_finetune.search.index import VideoIndex
    from adaclip_finetune.search.search_model import SearchModel
    from adaclip_finetune.search.stores.base import Searchable

THRESHOLD = "threshold.json"  # in the folder of an index
UNSURE, UNTOLD = 20.0, 50.0  # percent of misses from which on nothing is "perhaps" found, and nothing is claimed
_AT_ONCE = 256  # captions that are encoded together

RankedBy = Literal["whole", "moment"]


class Rate(NamedTuple):
    """A rate and its 95 % interval, in percent."""

    percent: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.percent:.1f} % ({self.low:.1f} to {self.high:.1f})"


class CaptionScores(NamedTuple):
    """The best score that each caption reaches among all videos (C,), and among those that are not its own (C,).

    `videos` (C,) has the same number for captions of the same video.
    """

    present: NDArray[np.float64]
    absent: NDArray[np.float64]
    videos: NDArray[np.int64]


@dataclass(frozen=True)
class Threshold:
    """The score from which on a search has found something, and how often that is wrong."""

    score: float
    false_finds: Rate  # of captions whose video is hidden: how many reach the score nevertheless
    misses: Rate  # of captions whose video is there: how many do not reach it
    captions: int
    videos: int  # different ones in the index, when this was measured

    def nothing_found(self, best: float, videos: int) -> str | None:
        """Return that nothing shows what was asked for, with how certain that is, if the best score is too low.

        `videos` is the number of different videos in the index now.
        """
        if best >= self.score:
            return None
        claim = "Nothing here shows that"
        if self.misses.percent > UNSURE:
            perhaps, silent = f"Perhaps {claim.lower()}", "The score does not tell whether anything here shows that"
            claim = perhaps if self.misses.percent <= UNTOLD else silent
        stale = f" Measured with {self.videos:,} videos." if videos != self.videos else ""
        missed, found = (
            f"{self.misses.percent:.0f} % of what is here",
            f"{self.false_finds.percent:.0f} % of what is not",
        )
        rates = f"which {missed} does not reach, and {found} does"
        return f"{claim}: the best score, {best:.3f}, is below {self.score:.3f}, {rates}.{stale}"


def captions_of(index: VideoIndex, entries: Iterable[tuple[str, Sequence[str]]]) -> dict[str, frozenset[str]]:
    """Return captions with the ids of the videos in the index that they describe: equal captions of several are one.

    `entries` are names of videos, with or without the extension of the file, and their captions.
    """
    names = [canonical(name) for name in index.videos.columns["name"]]
    known = {split_extension(name)[0]: name for name in names} | {name: name for name in names}
    texts: dict[str, str] = {}
    described: dict[str, set[str]] = {}
    for name, captions in entries:
        if found := known.get(canonical(name)):
            for caption in captions:
                described.setdefault(texts.setdefault(folded(caption), caption), set()).add(found)
    return {caption: frozenset(videos) for caption, videos in described.items()}


def score_captions(
    index: VideoIndex, model: SearchModel, captions: Mapping[str, frozenset[str]], ranked_by: RankedBy
) -> CaptionScores:
    """Ask for each caption, among all videos and among those that it does not describe.

    Captions that describe all videos of the index are left out, because nothing remains if these are hidden.
    """
    texts = list(captions)
    encoded = (model.encode_text(texts[start : start + _AT_ONCE]) for start in range(0, len(texts), _AT_ONCE))
    vectors = tqdm(chain.from_iterable(encoded), "asking for captions", len(texts), leave=False, disable=None)
    numbers: dict[str, int] = {}
    rows = []
    for (_, own), vector in zip(captions.items(), vectors, strict=True):
        hits = index.search(vector[None], len(own) + 1, score=ranked_by)[0]
        others = [hit for hit in hits if own.isdisjoint(canonical(one.id) for one in (hit.video, *hit.copies))]
        if others:
            rows.append((hits[0].score, others[0].score, numbers.setdefault(min(own), len(numbers))))
    present, absent, videos = np.array(rows, np.float64).reshape(-1, 3).T
    return CaptionScores(present, absent, videos.astype(np.int64))


def choose_score(absent: NDArray[np.float64], false_finds: float) -> float:
    """Return the smallest score that at most `false_finds` percent of these scores reach."""
    allowed = int(false_finds / 100 * len(absent))
    return float(np.nextafter(np.sort(absent)[::-1][allowed], np.inf))


def rates_at(scores: CaptionScores, score: float) -> tuple[Rate, Rate]:
    """Return the rates of false finds and of misses of a threshold."""
    wrong = scores.absent >= score, scores.present < score
    found = [intervals(np.where(one, 1, 2), scores.videos)["R@1"] for one in wrong]
    false_finds, misses = (Rate(100 * float(one.mean()), *span) for one, span in zip(wrong, found, strict=True))
    return false_finds, misses


def calibrate(
    index: VideoIndex, model: SearchModel, captions: Mapping[str, frozenset[str]], false_finds: float
) -> dict[str, Threshold]:
    """Choose and keep the thresholds of an index, one for each way to rank videos. Raise UserError."""
    found: dict[str, Threshold] = {}
    ways: list[RankedBy] = ["whole", "moment"] if index.moments else ["whole"]
    for way in ways:
        scores = score_captions(index, model, captions, way)
        if not len(scores.absent):
            raise UserError(f"{index.folder}: no caption of its videos is there that leaves other videos to compare")
        score = choose_score(scores.absent, false_finds)
        found[way] = Threshold(score, *rates_at(scores, score), len(scores.absent), index.distinct)
    content = {"fingerprint": index.info.fingerprint, **{way: asdict(one) for way, one in found.items()}}
    write_durably(index.folder / THRESHOLD, f"{json.dumps(content, indent=1)}\n".encode())
    return found


def thresholds_of(index: Searchable) -> dict[str, Threshold]:
    """Return the thresholds that were measured for an index; none for another model. Raise UserError."""
    path = index.folder / THRESHOLD
    if not path.exists():
        return {}
    content: dict[str, Any] = read_json(path)
    try:
        if content.pop("fingerprint") != index.info.fingerprint:
            return {}
        return {way: _threshold(facts) for way, facts in content.items()}
    except (AttributeError, LookupError, TypeError) as error:
        raise UserError(f"{path}: is damaged; `adaclip calibrate` writes it anew") from error


def _threshold(facts: dict[str, Any]) -> Threshold:
    rates = {name: Rate(*facts[name]) for name in ("false_finds", "misses")}
    return Threshold(**facts | rates)

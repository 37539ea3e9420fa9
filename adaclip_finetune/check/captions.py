"""What a run would do to the captions, and what they do to it: cut ones, and ones that do not tell videos apart."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from adaclip_finetune.check.finding import Finding, plural
from adaclip_finetune.check.source import Split
from adaclip_finetune.config import Config
from adaclip_finetune.data.annotations import folded
from adaclip_finetune.data.queries import train_entries
from adaclip_finetune.printable import printable
from adaclip_finetune.weights.loaded import LoadedClip

_AT_ONCE = 1024  # captions
_A_WORD = 30  # letters, at most


def check_captions(split: Split, config: Config, loaded: LoadedClip | None) -> Iterator[Finding]:
    """Tokens are those of the tower; without one (None) lengths are not looked at."""
    if not split.videos:
        return
    # What `concat_captions` makes of the sentences is what the towers see.
    entries = train_entries(split.videos, config.concat_captions)
    texts = [(entry.video_id, text) for entry in entries for text in entry.sentences]
    yield _numbers(split)
    yield from _shared_by_videos(split, texts)
    if loaded is not None:
        yield _too_long(split, texts, config, loaded)


def _numbers(split: Split) -> Finding:
    counts = [len(video.sentences) for video in split.videos]
    few, many, middle = min(counts), max(counts), statistics.median(counts)
    spread = f"{few} each" if few == many else f"{few} to {many} each, median {middle:g}"
    message = f"{plural(len(counts), 'video')}, {plural(sum(counts), 'caption')} ({spread})"
    items = {"videos": len(counts), "captions": sum(counts), "min": few, "median": middle, "max": many}
    return Finding("fine", "captions", split.name, message, items)


def _shared_by_videos(split: Split, texts: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    videos_of: dict[str, dict[str, None]] = {}
    spelled: dict[str, str] = {}
    for video_id, text in texts:
        key = folded(text)
        videos_of.setdefault(key, {})[video_id] = None
        spelled.setdefault(key, text)
    if shared := {spelled[key]: list(videos) for key, videos in videos_of.items() if len(videos) > 1}:
        videos = len({video_id for several in shared.values() for video_id in several})
        what = (
            "a batch may count them as each other's mistakes"
            if split.trains
            else "no model can tell which one is meant"
        )
        stand = "stands" if len(shared) == 1 else "stand"
        message = f"{plural(len(shared), 'caption')} {stand} with several videos ({videos} in all): {what}"
        yield Finding("warning", "shared_captions", split.name, message, shared, "give captions that tell them apart")


def _too_long(split: Split, texts: Sequence[tuple[str, str]], config: Config, loaded: LoadedClip) -> Finding:
    limit = config.max_txt_len
    long = [pair for pair in _perhaps_too_long(split.name, texts, limit, loaded) if loaded.count_cut([pair[1]], limit)]
    if not long:
        return Finding("fine", "long_captions", split.name, f"max_txt_len {limit} cuts no caption")
    items: dict[str, list[dict[str, str]]] = {}
    for video_id, text in long:
        kept = _fitting(text, limit, loaded)
        items.setdefault(video_id, []).append({"kept": kept, "cut": text[len(kept) :].strip()})
    joins = config.concat_captions == "concat" and any(len(video.sentences) > 1 for video in split.videos)
    joined = ", which are all sentences of a video in one (concat_captions)" if joins else ""
    share = 100 * len(long) / len(texts)
    message = f"max_txt_len {limit} cuts {len(long)} of {len(texts)} captions ({share:.1f} %){joined}"
    advice = _enough([text for _, text in long], limit, loaded)
    return Finding("warning", "long_captions", split.name, message, items, advice)


def _perhaps_too_long(
    name: str, texts: Sequence[tuple[str, str]], limit: int, loaded: LoadedClip
) -> Iterator[tuple[str, str]]:
    """All that do not fit, and some that just do: one by one would take minutes for a large split."""
    padding = loaded.tokenize([""], limit)[0, -1]
    for start in tqdm(range(0, len(texts), _AT_ONCE), f"captions of {printable(name)}", leave=False, disable=None):
        some = texts[start : start + _AT_ONCE]
        ids = loaded.tokenize([text for _, text in some], limit)
        # Some tokenizers end a text with what they pad by, so that only the place before tells a full row.
        full = (ids[:, limit - 2 : limit] != padding).any(dim=1).tolist()
        yield from (pair for pair, is_full in zip(some, full, strict=True) if is_full)


def _fitting(text: str, limit: int, loaded: LoadedClip) -> str:
    """What fits, from the first letter on: whole words, of a script that has no spaces whole letters."""
    ends = [0, *(at for at, letter in enumerate(text) if letter.isspace()), len(text)]
    last = _last_that_fits(text, ends, limit, loaded)
    begin, end = ends[last], ends[last + 1]
    has_spaces = all(letter.lower() != letter.upper() for letter in text[begin:end] if letter.isalpha())
    if has_spaces and end - begin <= _A_WORD:
        return text[:begin]
    places = range(begin, end + 1)
    return text[: places[_last_that_fits(text, places, limit, loaded)]]


def _last_that_fits(text: str, places: Sequence[int], limit: int, loaded: LoadedClip) -> int:
    """The number of the last place up to which the text is not cut; up to the first it is not, up to the last it is."""
    low, high = 0, len(places) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if loaded.count_cut([text[: places[middle]]], limit) else (middle, high)
    return low


def _enough(texts: Sequence[str], limit: int, loaded: LoadedClip) -> str:
    """What to make of max_txt_len."""
    most = loaded.context_length
    if limit == most:
        return f"the tower takes no more than {most} tokens: shorten what matters"
    if cut := loaded.count_cut(texts, most):
        return f"max_txt_len {most}, the most that the tower takes, cuts {cut} of them"
    low, high = limit, most  # cuts some; cuts none
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if loaded.count_cut(texts, middle) else (low, middle)
    return f"max_txt_len {high} cuts none of them"

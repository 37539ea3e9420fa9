"""Figures of captions against references, in percent: CIDEr, BLEU-4, METEOR, ROUGE-L and CLIPScore.

nltk has BLEU, METEOR and the words of a text. The usual implementation of all of them, pycocoevalcap, is no longer kept
and needs Java; what is computed here equals its CIDEr, BLEU-4 and ROUGE-L on the same words. Its METEOR also knows
synonyms and paraphrases, of which this one has only equal words and equal stems, and gives other values.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from adaclip_finetune.model.language_model import optional_library

Words = list[str]

PROMPT = "A photo depicts "
"""What CLIPScore puts before each text (Hessel et al. 2021)."""

_CLIP_SCORE_SCALE = 2.5
_LONGEST_NGRAM = 4
_CIDER_SIGMA = 6.0  # of the penalty for another length than that of the reference, in words
_ROUGE_BETA = 1.2  # how much more recall counts than precision
_NO_MATCH = 1e-9  # the number of matches in place of 0 in BLEU
_SAYS_SOMETHING = re.compile(r"\w")


def words_of(texts: Sequence[str]) -> list[Words]:
    """Return the words of each text as the Penn Treebank separates them, in lower case and without punctuation."""
    split = optional_library("nltk.tokenize").TreebankWordTokenizer().tokenize
    return [[word.strip(".") for word in split(text.lower()) if _SAYS_SOMETHING.search(word)] for text in texts]


def caption_figures(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return CIDEr, BLEU-4, METEOR and ROUGE-L of V captions, each with one reference or more."""
    said, right = words_of(captions), [words_of(of_one) for of_one in references]
    return {
        "CIDEr": 100 * cider(said, right),
        "BLEU-4": 100 * _bleu(said, right),
        "METEOR": 100 * _meteor(said, right),
        "ROUGE-L": 100 * rouge_l(said, right),
    }


def _bleu(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """Return BLEU-4 of all captions together (Papineni et al. 2002)."""
    bleu = optional_library("nltk.translate.bleu_score")
    smoothing = bleu.SmoothingFunction(epsilon=_NO_MATCH).method1
    return float(bleu.corpus_bleu(references, captions, smoothing_function=smoothing))


def _meteor(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """Return the mean METEOR, of the best reference, with words that are equal or have the same stem by Porter
    (Banerjee and Lavie 2005)."""
    meteor = optional_library("nltk.translate.meteor_score").meteor_score
    scores = [meteor(right, said, wordnet=_NoSynonyms()) for said, right in zip(captions, references, strict=True)]
    return float(np.mean(scores))


class _NoSynonyms:
    """Stands in for WordNet, which would have to be downloaded."""

    def synsets(self, word: str) -> list[Any]:
        """Return no synonyms."""
        return []


def rouge_l(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """Return the mean ROUGE-L: F of the longest common subsequence (Lin 2004).

    As in the COCO evaluation, precision and recall are each those of the best reference.
    """
    scores = []
    for said, right in zip(captions, references, strict=True):
        common = [_common_words(said, of_one) for of_one in right]
        precision = max(common) / max(len(said), 1)
        recall = max(length / max(len(of_one), 1) for length, of_one in zip(common, right, strict=True))
        weighted = recall + _ROUGE_BETA**2 * precision
        scores.append((1 + _ROUGE_BETA**2) * precision * recall / weighted if weighted else 0.0)
    return float(np.mean(scores))


def _common_words(one: Words, other: Words) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for place, candidate in enumerate(other, start=1):
            before, row[place] = row[place], before + 1 if word == candidate else max(row[place], row[place - 1])
    return row[-1]


def cider(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """Return the mean CIDEr-D, which the COCO evaluation reports as CIDEr (Vedantam et al. 2015), 10 at most.

    An n-gram weighs less the more videos have it in their references, so that the value depends on the whole split.
    """
    counted = [[_ngrams(of_one) for of_one in right] for right in references]
    frequency = Counter(gram for of_video in counted for gram in set().union(*of_video))
    rarity = {gram: math.log(len(references) / count) for gram, count in frequency.items()}
    unknown = math.log(len(references))

    def weighted(grams: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        return {gram: count * rarity.get(gram, unknown) for gram, count in grams.items()}

    scores = []
    for said, right, grams in zip(captions, references, counted, strict=True):
        own = weighted(_ngrams(said))
        likeness = [_likeness(own, weighted(other)) for other in grams]
        penalties = [math.exp(-((len(said) - len(other)) ** 2) / (2 * _CIDER_SIGMA**2)) for other in right]
        scores.append(10 * float(np.mean(np.multiply(likeness, penalties))))
    return float(np.mean(scores))


def _ngrams(words: Words) -> Counter[tuple[str, ...]]:
    lengths = range(1, _LONGEST_NGRAM + 1)
    return Counter(tuple(words[start : start + n]) for n in lengths for start in range(len(words) - n + 1))


def _likeness(own: dict[tuple[str, ...], float], other: dict[tuple[str, ...], float]) -> float:
    """Return the mean over lengths of n-grams of the cosines, in which a weight counts up to that of the reference."""
    products, squares = np.zeros(_LONGEST_NGRAM), np.zeros((2, _LONGEST_NGRAM))
    for gram, weight in own.items():
        products[len(gram) - 1] += min(weight, other.get(gram, 0.0)) * other.get(gram, 0.0)
        squares[0, len(gram) - 1] += weight**2
    for gram, weight in other.items():
        squares[1, len(gram) - 1] += weight**2
    norms = np.sqrt(squares[0] * squares[1])
    return float(np.divide(products, norms, out=np.zeros_like(products), where=norms > 0).mean())


def clip_scores(
    captions: Tensor, videos: Tensor, references: Tensor, video_of_reference: Tensor
) -> tuple[Tensor, Tensor]:
    """Return CLIPScore and RefCLIPScore of each video (V,), given vectors of captions and videos (V, D) and references
    (R, D), of which every video has one or more (Hessel et al. 2021).

    CLIPScore is max(2.5 · cosine, 0). RefCLIPScore is its harmonic mean with the cosine of the best reference.
    """
    captions, videos, references = (F.normalize(part, dim=-1) for part in (captions, videos, references))
    scores = _CLIP_SCORE_SCALE * (captions * videos).sum(dim=1).clamp(min=0)
    cosines = (references * captions[video_of_reference]).sum(dim=1)
    best = cosines.new_full((len(videos),), -1.0).scatter_reduce(0, video_of_reference, cosines, "amax")
    harmonic = 2 * scores * best / (scores + best)
    return scores, harmonic.where(scores + best != 0, 0.0)

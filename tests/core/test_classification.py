"""Class vectors, scores and figures of `task: classification`, and the texts that class names become."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import load_golden
from scorers import clip_with, features

from adaclip_finetune.config import load_config
from adaclip_finetune.config.choices.tasks import BUILT_IN_TEMPLATES
from adaclip_finetune.data.class_names import in_templates, read_classes, read_templates
from adaclip_finetune.data.queries import Queries
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.tasks.classification import (
    ClassificationFigures,
    ClassificationReport,
    answers_and_ranks,
    class_scores,
    class_vectors,
    right_classes,
)
from adaclip_finetune.model.scoring import CosineScorer, QueryScorer


def report(right, answers, ranks, classes):
    queries = Queries([], np.zeros(0, np.int64), [])
    return ClassificationReport(classes, *map(np.asarray, (right, answers, ranks)), queries, None, len(right), 0.0)


def test_class_vectors_scores_and_accuracies_are_the_published_ones() -> None:
    golden = load_golden("classification")
    texts = golden["text"][golden["token_ids_class_template"]].sum(dim=2)  # (6, 4, D)
    vectors = class_vectors(texts.flatten(0, 1), 6, normalize=False)
    torch.testing.assert_close(vectors, golden["class_embeddings"], atol=1e-14, rtol=0)

    frames = F.linear(golden["videos"].flatten(2), golden["image.weight"], golden["image.bias"])
    means = F.normalize(frames, dim=-1).mean(dim=1)  # published scores are products with means of any length
    scorer = CosineScorer(clip_with(0.0))
    scores = class_scores(vectors, scorer.keep(features(means)), scorer, block=4)
    torch.testing.assert_close(scores * means.norm(dim=1, keepdim=True), golden["scores"], atol=1e-14, rtol=0)

    right = golden["target"]
    answers, ranks = answers_and_ranks(scores, right)
    figures = report(right.numpy(), answers, ranks, list("abcdef")).figures
    expected = 100 * torch.stack([golden["a1"], golden["a5"]])
    assert [figures.top1, figures.top5] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_scores_of_a_query_scorer_and_of_sigmoid_towers_are_products_times_the_scale(normalize: bool) -> None:
    random = torch.Generator().manual_seed(0)
    texts, tokens = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((6, 5), (7, 4, 5)))
    vectors = class_vectors(texts, 3, normalize)
    lengths = vectors.norm(dim=1)
    assert torch.allclose(lengths, torch.ones(3).double()) == normalize
    by_query, by_vector = QueryScorer(clip_with(1.5), 0.1), CosineScorer(clip_with(1.5, logit_bias=-9.0))
    weighted = by_query.videos_for(F.normalize(vectors, dim=1), tokens)  # (3, 7, D)
    expected = np.exp(1.5) * torch.einsum("cd,cvd->vc", vectors, F.normalize(weighted, dim=2))
    torch.testing.assert_close(class_scores(vectors, tokens, by_query, 2), expected)
    kept = by_vector.keep(features(tokens[:, 0]))
    torch.testing.assert_close(class_scores(vectors, kept, by_vector, 2), np.exp(1.5) * kept @ vectors.T)


@pytest.mark.parametrize("seed", range(20))
def test_ranks_and_answers_are_those_of_the_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.choice([0.0, 0.5, 1.0], (12, int(random.integers(2, 7))))
    right = random.integers(scores.shape[1], size=12)
    answers, ranks = answers_and_ranks(torch.from_numpy(scores), torch.from_numpy(right))
    for row, own, answer, rank in zip(scores, right, answers, ranks, strict=True):
        others = [score for number, score in enumerate(row) if number != own]
        assert rank == 1 + sum(score >= row[own] for score in others)
        assert (answer == own) == (rank == 1) and row[answer] == max(row)


def test_figures_by_class_and_confusion() -> None:
    found = report([0, 0, 0, 1, 2], [0, 0, 2, 0, 2], [1, 1, 2, 6, 1], ["run", "jump", "sit", "never"])
    assert found.figures == ClassificationFigures(60, 80, pytest.approx(100 * (2 / 3 + 0 + 1) / 3), 4, 5, 5)
    assert found.confusion().tolist() == [[2, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    run, jump, sit = found.by_class()
    assert run == {"class": "run", "videos": 3, "top1": pytest.approx(200 / 3), "taken_for": "sit"}
    assert (jump["taken_for"], jump["top1"], sit["taken_for"]) == ("run", 0, None)
    assert found.as_dict()["per_class"] == found.by_class()
    assert ClassificationFigures(**found.figures.as_state()) == found.figures


def queries(*pairs: tuple[str, int], videos: int) -> Queries:
    texts, owners = zip(*pairs, strict=True)
    return Queries(list(texts), np.array(owners), [f"video{number}" for number in range(videos)])


def test_a_video_has_one_class_however_it_is_spelled() -> None:
    found = queries(("Run", 0), ("sit", 1), ("run ", 0), videos=2)
    assert right_classes(found, ["sit", "RUN"]).tolist() == [1, 0]
    for classes, words in ((["run", "jump", "sit"], ("'run'", "'jump'")), (["run", "sit"], ("'jump'", "classes"))):
        wrong = queries(("run", 0), ("jump", len(classes) == 2), ("sit", 2), videos=3)
        with pytest.raises(UserError) as caught:
            right_classes(wrong, classes)
        assert all(word in str(caught.value) for word in ("video", *words))


# ---- texts ----


@pytest.mark.parametrize(
    ("name", "count", "examples"),
    [
        ("none", 1, ["{}"]),
        ("imagenet", 80, ["a bad photo of a {}."]),
        ("action", 48, ["a photo of a person {}.", "a example of the person practicing {}."]),
        ("kinetics", 28, ["a photo of {}.", "a demonstration of a person {}.", "a video of a person doing {}."]),
    ],
)  # fmt: skip
def test_built_in_templates(name: str, count: int, examples: list[str]) -> None:
    assert name in BUILT_IN_TEMPLATES and len(BUILT_IN_TEMPLATES) == 4
    templates = read_templates(name)
    assert len(templates) == len(set(templates)) == count and set(examples) <= set(templates)
    assert all(template.count("{}") == 1 for template in templates)


def test_files_of_templates_and_classes(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("\ufeffa {} here\n\n  {}\r\n", encoding="utf-8")
    assert read_templates(str(path)) == ["a {} here", "{}"]
    assert in_templates(["{run}", "sit"], ["a {} here", "{}"]) == ["a {run} here", "{run}", "a sit here", "sit"]
    path.write_text("Run\nsit\nrun \n")
    assert read_classes(path) == ["Run", "sit"]
    annotation = tmp_path / "some.json"
    annotation.write_text('{"a": {"sentences": ["sit"]}, "b": {"sentences": ["run"]}, "c": {"sentences": ["Sit"]}}')
    assert read_classes(annotation) == ["sit", "run"]


@pytest.mark.parametrize("content", [b"no place", b"{} and {}", b"\n", b"\xff{}"])
def test_a_wrong_file_of_templates_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"templates .*lines\.txt"):
        read_templates(str(path))
    with pytest.raises(UserError, match=r"none\.txt"):
        read_templates(str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("config", "others", "names"),
    [
        ({"train_templates": True}, {}, ["task.config.train_templates", "task.config.templates"]),
        ({}, {"save_similarity": "m.npy"}, ["save_similarity", "classification"]),
        ({}, {"primary": "t2v.R@1"}, ["primary", "top1"]),
    ],
)
def test_impossible_settings_are_refused(
    config: dict[str, object], others: dict[str, object], names: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, {"task": {"method": "classification", "config": config}, **others})
    assert all(name in str(caught.value) for name in names)

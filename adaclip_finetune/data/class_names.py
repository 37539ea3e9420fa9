"""Names of classes, and the templates that turn a name into a text, such as "a video of {}."."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

from adaclip_finetune.data.annotations import folded, load_annotations
from adaclip_finetune.data.formats.reading import text_lines
from adaclip_finetune.errors import UserError

PLACE = "{}"
_NOUNS = ("photo", "video", "example", "demonstration")
_VERBS = ("using ", "doing ", "during ", "performing ", "practicing ")


def read_templates(name: str) -> list[str]:
    """Return the templates of a built-in set, or of a file with one in each line. Raise UserError.

    `action` and `kinetics` are the templates of CLIP (Radford et al. 2021) and FitCLIP (Castro and Caba Heilbron 2022)
    for UCF101 and Kinetics, `imagenet` those of CLIP for ImageNet. `none` is the bare name.
    """
    if name == "none":
        return [PLACE]
    if name == "imagenet":
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return [template(PLACE) for template in OPENAI_IMAGENET_TEMPLATES]
    if name == "action":
        parts = product(("", *_VERBS), ("a", "the"), _NOUNS)
        return [f"a {noun} of {article} person {verb}{PLACE}." for verb, article, noun in parts]
    if name == "kinetics":
        persons = ("", "a person ", *(f"a person {verb}" for verb in _VERBS))
        return [f"a {noun} of {person}{PLACE}." for noun, person in product(_NOUNS, persons)]
    templates = _read_lines(Path(name), "templates")
    for template in templates:
        if template.count(PLACE) != 1:
            raise UserError(f"templates {name}: {template!r} must have one {PLACE}, where the class name goes")
    return templates


def read_classes(path: Path) -> list[str]:
    """Return the classes of a file: the lines of a text, or the sentences of an annotation (.json). Raise UserError."""
    if path.suffix.lower() == ".json":
        return distinct(text for video in load_annotations(path) for text in video.sentences)
    return distinct(_read_lines(path, "classes"))


def distinct(names: Iterable[str]) -> list[str]:
    """Return each class once, in order of first appearance. Case and spaces do not make another class."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(folded(name), name)
    return list(first.values())


def in_templates(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return each class in each template: C · P texts, those of a class together."""
    return [template.replace(PLACE, name) for name, template in product(classes, templates)]


def _read_lines(path: Path, what: str) -> list[str]:
    """Return the lines of a text file that are not blank. Raise UserError, in which `what` names the setting."""
    try:
        lines = [line.strip() for line in text_lines(path) if line.strip()]
    except UserError as error:
        raise UserError(f"{what} {error}") from error
    if not lines:
        raise UserError(f"{what} {path}: holds no line")
    return lines

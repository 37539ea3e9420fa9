"""How clips show and tell the world of shapes: otherwise than the stills that the tiny CLIP learned from.

A still has a plain grey background, pure colours and few words. A clip has moving textures, coloured light, blur,
noise, something in front of the scene, and other sizes and shades, and many of its words occur in no caption of a
still. The gap between both is what finetuning has to close. All numbers are a function of the generators passed in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import shapes_world as world
from numpy.typing import NDArray
from shapes_world import SIZE, Layout, Scene, Thing

# What clips say for the words of stills, half of the time.
OTHER_WORDS = {
    "red": "crimson",
    "orange": "amber",
    "yellow": "golden",
    "green": "emerald",
    "cyan": "turquoise",
    "blue": "cobalt",
    "purple": "violet",
    "white": "ivory",
    "circle": "disc",
    "square": "box",
    "triangle": "wedge",
    "star": "asterisk",
    "cross": "plus",
    "ring": "hoop",
    "small": "tiny",
    "large": "big",
}

# Sentences of clips, beside those of world.TEMPLATES; the places are the same.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "bumps": ("{a} collides with {b}", "{a} crashes into {b}"),
    "jumps": ("{a} vaults {b}", "{a} clears {b} in an arc"),
    "circles": ("{a} orbits {b}", "{a} revolves about {b}"),
    "hides": ("{a} passes in back of {b}", "{b} conceals {a} briefly"),
    "spins": ("{a} whirls close to {b}", "{a} twirls by the side of {b}"),
    "bounces": ("{a} dribbles close to {b}", "{a} bobbles by the side of {b}"),
    "rides": ("{a} travels on the back of {b}", "{b} transports {a}"),
    "splits": ("{a} divides close to {b}", "{a} separates by the side of {b}"),
    "turns": ("{a} and {b} swap places on screen", "the picture shows either {a} or {b}"),
    "between": ("two {bs} flank {a}", "{a} has two {bs} at its sides"),
    "blinks": ("{a} twinkles close to {b}", "{a} pulses by the side of {b}"),
    "left": ("{a} heads west past {b}", "{a} drifts leftward by {b}"),
    "right": ("{a} heads east past {b}", "{a} drifts rightward by {b}"),
    "grows": ("{A} swells close to {b}", "{A} expands by the side of {b}"),
    "shrinks": ("{A} dwindles close to {b}", "{A} contracts by the side of {b}"),
    "appears": ("{a} emerges close to {b}", "{a} materialises by the side of {b}"),
    "disappears": ("{a} fades close to {b}", "{a} dissolves by the side of {b}"),
    "meets": ("{a} approaches {b}", "{a} moves towards {b}"),
    "leaves": ("{a} retreats from {b}", "{a} moves off from {b}"),
    "becomes": ("{a} morphs into {b}", "{a} transforms into {b}"),
    "was": ("{b} morphs into {a}", "{b} transforms into {a}"),
    "before": ("{a} hops before {b} does", "first {a} hops and then {b}", "{b} hops after {a} has"),
    "after": ("{b} hops before {a} does", "first {b} hops and then {a}", "{a} hops after {b} has"),
}
NEW_WORDS = {"colour": 0.3, "shape": 0.08, "size": 0.3}  # how often a clip's word is one that no still's caption has
BLUR = (0.0, 0.4)  # standard deviation in pixels
OCCLUDED = 0.25  # share of shots in which something passes in front
NOISE = (2.0, 4.0)  # standard deviation in grey levels
SCALE = (1.05, 1.35)  # of a thing's radius, the same for all things of a shot
SHADE = 0.08  # how far each of red, green and blue of a thing strays, as a fraction
CAST = 0.1  # how far the light's red, green and blue stray from grey, as a fraction
CONTRAST = (0.03, 0.12)  # of a texture: distance of its two tones from the middle, as a fraction


@dataclass(frozen=True)
class Shot:
    """Things of a clip as one shot shows them, and how it is filmed."""

    scene: Scene
    layout: Layout
    frames: int
    lit: bool


def sentences(scene: Scene, rng: np.random.Generator, count: int) -> list[str]:
    """Return `count` different sentences that tell `scene`, in words of stills and in words of clips alone."""
    templates = TEMPLATES[scene.action] + world.TEMPLATES.get(scene.action, ())
    found: dict[str, None] = {}
    while len(found) < count:
        template = templates[rng.integers(len(templates))]
        found[world.tell(template, _reworded(scene.actor, rng), _reworded(scene.other, rng))] = None
    return list(found)


def film(shots: list[Shot], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return the frames of all shots (frames, SIZE, SIZE, 3)."""
    return np.concatenate([_film(shot, rng) for shot in shots])


def _film(shot: Shot, rng: np.random.Generator) -> NDArray[np.uint8]:
    n = shot.frames
    layout = _resized(shot.layout, rng)
    images = [world.sprites(shot.scene, layout, i / (n - 1)) for i in range(n)]
    canvas = _texture(n, rng)
    world.draw(canvas, images, {name: _shade(colour, rng) for name, colour in world.COLOURS.items()})
    canvas = _occluded(canvas, rng)
    canvas = _blurred(canvas * _light(shot.lit, rng), rng.uniform(*BLUR))
    canvas += rng.normal(0, rng.uniform(*NOISE), canvas.shape[:3])[..., None].astype(np.float32)
    return canvas.clip(0, 255).round().astype(np.uint8)


def _reworded(thing: Thing, rng: np.random.Generator) -> Thing:
    def word(plain: str, share: float) -> str:
        return OTHER_WORDS[plain] if rng.random() < share else plain

    return Thing(
        word(thing.colour, NEW_WORDS["colour"]),
        word(thing.shape, NEW_WORDS["shape"]),
        word(thing.size, NEW_WORDS["size"]),
    )


def _resized(layout: Layout, rng: np.random.Generator) -> Layout:
    scale = rng.uniform(*SCALE)
    return replace(layout, actor_radius=layout.actor_radius * scale, other_radius=layout.other_radius * scale)


def _shade(colour: tuple[int, int, int], rng: np.random.Generator) -> NDArray[np.float32]:
    return (np.array(colour) * rng.uniform(1 - SHADE, 1 + SHADE, 3)).clip(0, 255).astype(np.float32)


def _texture(frames: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a moving background (frames, SIZE, SIZE, 3): stripes, checks or clouds between two dull tones."""
    kind = rng.choice(("stripes", "checks", "clouds"))
    waves = 6 if kind == "clouds" else 2
    angles = rng.uniform(0, math.pi) + (
        rng.uniform(0, math.pi, waves) if kind == "clouds" else np.arange(2) * math.pi / 2
    )
    length = rng.uniform(14, 40, waves) if kind == "clouds" else np.full(2, rng.uniform(10, 24))
    speed = rng.uniform(-0.25, 0.25, waves)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    t = np.arange(frames, dtype=np.float32)[:, None, None]
    wave = [
        np.sin(2 * math.pi / length[i] * (x * math.cos(angles[i]) + y * math.sin(angles[i])) + speed[i] * t + phase)
        for i, phase in enumerate(rng.uniform(0, 2 * math.pi, waves))
    ]
    match kind:
        case "stripes":
            level = np.tanh(2 * wave[0])
        case "checks":
            level = np.tanh(3 * wave[0] * wave[1])
        case _:
            level = np.tanh(sum(wave) / 2)
    middle = rng.uniform(80, 140) * (1 + rng.uniform(-0.15, 0.15, 3))
    tones = middle * (1 + rng.uniform(*CONTRAST) * rng.choice((-1, 1)) * rng.uniform(0.5, 1, 3) * level[..., None])
    return tones.astype(np.float32)


def _light(lit: bool, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return how bright each pixel is (1, SIZE, SIZE, 3): brighter in the middle where `lit`, at the rim elsewhere."""
    light = world.lights(1, np.array([lit]), rng)
    light = light / light.mean()
    return ((1 + (light - 1) * 1.5) * (1 + rng.uniform(-CAST, CAST, 3)) * rng.uniform(0.75, 1.15)).astype(np.float32)


def _occluded(canvas: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw a pole, or nothing, that passes in front of the scene."""
    if rng.random() >= OCCLUDED:
        return canvas
    n, width, tone = len(canvas), rng.uniform(5, 10), rng.uniform(30, 200) * (1 + rng.uniform(-0.15, 0.15, 3))
    angle, start, speed = rng.uniform(0, math.pi), rng.uniform(-24, 24), rng.uniform(-1.5, 1.5)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) - SIZE / 2
    distance = x * math.cos(angle) + y * math.sin(angle) - start - speed * np.arange(n, dtype=np.float32)[:, None, None]
    cover = (width / 2 - np.abs(distance) + 0.5).clip(0, 1)[..., None]
    return canvas + cover * (tone.astype(np.float32) - canvas)


def _blurred(canvas: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    if sigma < 0.2:
        return canvas
    steps = np.arange(-3, 4)
    kernel = np.exp(-(steps**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    for axis in (1, 2):
        padded = np.pad(canvas, [(3, 3) if i == axis else (0, 0) for i in range(4)], mode="edge")
        canvas = sum(
            weight * padded.take(range(i, i + SIZE), axis=axis) for i, weight in enumerate(kernel.astype(np.float32))
        )
    return canvas

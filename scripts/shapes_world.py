"""A small world of coloured shapes: what happens in it, how it looks and how it is told.

Everything that the example data set and the tiny CLIP are made of comes from here, so that stills and clips look
alike. A `Scene` is two things and an action, told in words by its `sentences`; a `Layout` fixes where it happens,
`sprites` says what stands where at a moment of it, and `render` draws moments as RGB images over `lights`. All numbers
are a function of the generators passed in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

SIZE = 64  # pixels a side
COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 140, 20),
    "yellow": (242, 224, 60),
    "green": (50, 165, 65),
    "cyan": (70, 215, 225),
    "blue": (50, 80, 225),
    "purple": (170, 70, 215),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SPINNABLE = ("square", "triangle", "star", "cross")
RADII = {"small": 7.0, "large": 12.0}  # pixels
MAX_SPRITES = 3

# Played backwards, the plain actions are told the same, and the ordered ones as their partner.
PLAIN_ACTIONS = (
    "bumps",
    "jumps",
    "circles",
    "hides",
    "spins",
    "bounces",
    "rides",
    "splits",
    "turns",
    "between",
    "blinks",
)
REVERSED = {
    "left": "right",
    "grows": "shrinks",
    "appears": "disappears",
    "meets": "leaves",
    "becomes": "was",
}
REVERSED |= {backward: forward for forward, backward in REVERSED.items()}
STILL_ACTIONS = PLAIN_ACTIONS + tuple(REVERSED)
REVERSED |= {"before": "after", "after": "before"}  # told of clips alone
ORDERED_ACTIONS = tuple(REVERSED)

# The words of stills. {a}: the acting thing, {b}: the other, {bs}: several of the other; {A}: the acting thing without
# its size.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "bumps": ("{a} bumps into {b}", "{b} is bumped by {a}", "{a} knocks against {b}"),
    "jumps": ("{a} jumps over {b}", "{a} leaps across {b}", "{a} flies over {b}"),
    "circles": ("{a} circles around {b}", "{b} is circled by {a}", "{a} goes round {b}"),
    "hides": ("{a} hides behind {b}", "{b} covers {a} for a moment", "{a} slips behind {b}"),
    "spins": ("{a} spins beside {b}", "{a} turns around next to {b}", "{a} rotates near {b}"),
    "bounces": ("{a} bounces up and down beside {b}", "{a} hops next to {b}", "{a} bobs near {b}"),
    "rides": ("{a} rides on {b}", "{b} carries {a} on top", "{a} sits on {b}"),
    "splits": ("{a} splits in two beside {b}", "{a} breaks into halves next to {b}", "{a} comes apart near {b}"),
    "turns": ("{a} and {b} take turns", "{a} and {b} are shown one at a time", "{a} alternates with {b}"),
    "between": ("{a} stands between two {bs}", "two {bs} stand around {a}", "{a} is in the middle of two {bs}"),
    "blinks": ("{a} blinks beside {b}", "{a} flashes next to {b}", "{a} flickers near {b}"),
    "left": ("{a} moves left past {b}", "{a} slides to the left by {b}", "{a} goes left near {b}"),
    "right": ("{a} moves right past {b}", "{a} slides to the right by {b}", "{a} goes right near {b}"),
    "grows": ("{A} grows beside {b}", "{A} gets larger next to {b}", "{A} becomes bigger near {b}"),
    "shrinks": ("{A} shrinks beside {b}", "{A} gets smaller next to {b}", "{A} becomes smaller near {b}"),
    "appears": ("{a} appears beside {b}", "{a} pops up next to {b}", "{a} shows up near {b}"),
    "disappears": ("{a} disappears beside {b}", "{a} vanishes next to {b}", "{a} is gone from {b}"),
    "meets": ("{a} comes to {b}", "{a} meets {b}", "{a} arrives at {b}"),
    "leaves": ("{a} leaves {b}", "{a} goes away from {b}", "{a} departs from {b}"),
    "becomes": ("{a} turns into {b}", "{a} changes into {b}", "{a} becomes {b}"),
    "was": ("{b} turns into {a}", "{b} changes into {a}", "{b} becomes {a}"),
}


@dataclass(frozen=True)
class Thing:
    """A coloured shape: a key of COLOURS, one of SHAPES, a key of RADII."""

    colour: str
    shape: str
    size: str

    def words(self, with_size: bool = True) -> str:
        """`a large red circle`, with the right article."""
        words = f"{self.size} {self.colour} {self.shape}" if with_size else f"{self.colour} {self.shape}"
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    def plural(self) -> str:
        """`large red circles`."""
        return f"{self.size} {self.colour} {self.shape}{'es' if self.shape.endswith(('s', 'x')) else 's'}"


@dataclass(frozen=True)
class Scene:
    """`actor` does `action` (one of PLAIN_ACTIONS or ORDERED_ACTIONS) with or beside `other`."""

    action: str
    actor: Thing
    other: Thing

    @property
    def needs_order(self) -> bool:
        """True when the same frames in the opposite order would be told differently."""
        return self.action in REVERSED

    def backwards(self) -> Scene:
        """The scene that the frames of this ordered one tell from last to first."""
        return replace(self, action=REVERSED[self.action])

    def sentences(self) -> list[str]:
        """Return every sentence that tells this scene in words of stills."""
        return [tell(template, self.actor, self.other) for template in TEMPLATES[self.action]]


def tell(template: str, actor: Thing, other: Thing) -> str:
    """Return the sentence with both things in it."""
    return template.format(a=actor.words(), A=actor.words(with_size=False), b=other.words(), bs=other.plural())


@dataclass(frozen=True)
class Layout:
    """Where a scene happens (pixels, radians): centre, the actor's side (−1 left, +1 right) and whether it is above."""

    x: float
    y: float
    side: int
    up: int
    angle: float
    tilt: float
    actor_radius: float
    other_radius: float


@dataclass(frozen=True)
class Sprite:
    """One shape in one image: a Thing's look at a place, with radius in pixels and rotation in radians."""

    thing: Thing
    x: float
    y: float
    radius: float
    rotation: float = 0.0


def random_scene(
    rng: np.random.Generator,
    actions: tuple[str, ...] = STILL_ACTIONS,
    colours: tuple[str, str] | None = None,
) -> Scene:
    """One of `actions`, two things of `colours` (default: any two), shapes and sizes as they come."""
    action = str(rng.choice(actions))
    first, second = colours or rng.choice(list(COLOURS), size=2, replace=False)
    shapes = SPINNABLE if action == "spins" else SHAPES
    actor = Thing(str(first), str(rng.choice(shapes)), str(rng.choice(list(RADII))))
    return Scene(action, actor, Thing(str(second), str(rng.choice(SHAPES)), str(rng.choice(list(RADII)))))


def random_layout(scene: Scene, rng: np.random.Generator) -> Layout:
    """A place for `scene`, the same distribution for all scenes."""
    return Layout(
        x=rng.uniform(26, 38),
        y=rng.uniform(26, 38),
        side=int(rng.choice((-1, 1))),
        up=int(rng.choice((-1, 1))),
        angle=rng.uniform(0, 2 * math.pi),
        tilt=rng.uniform(-0.25, 0.25),
        actor_radius=RADII[scene.actor.size] * rng.uniform(0.9, 1.1),
        other_radius=RADII[scene.other.size] * rng.uniform(0.9, 1.1),
    )


def sprites(scene: Scene, layout: Layout, t: float) -> list[Sprite]:
    """What stands where at the moment `t` in [0, 1] of the scene, back to front."""
    if scene.action in ("right", "shrinks", "disappears", "leaves", "was", "after"):
        return sprites(scene.backwards(), layout, 1 - t)
    x, y, side, up, p = layout.x, layout.y, layout.side, layout.up, layout
    ra, rb = p.actor_radius, p.other_radius
    apart = (ra + rb) * 0.5 + 2  # from the centre to either thing when they stand beside each other
    swing = math.sin(math.pi * t)  # 0 → 1 → 0
    here, there = (x + side * apart, y), (x - side * apart, y)

    def actor(at: tuple[float, float], radius: float = ra, rotation: float = p.tilt) -> Sprite:
        return Sprite(scene.actor, at[0], at[1], radius, rotation)

    def other(at: tuple[float, float]) -> Sprite:
        return Sprite(scene.other, at[0], at[1], rb, -p.tilt)

    match scene.action:
        case "bumps":
            gap = 20 * (1 - swing)
            return [other(there), actor((there[0] + side * (ra + rb - 1 + gap), y))]
        case "jumps":
            travel = -side * (ra + rb + 4) * math.cos(math.pi * t)
            ground = y + 8
            return [other((x, ground)), actor((x + travel, ground - (ra + rb + 2) * swing))]
        case "circles":
            a = p.angle + side * 2 * math.pi * t
            d = ra + rb + 2
            return [other((x, y)), actor((x + d * math.cos(a), y + d * math.sin(a)))]
        case "hides":
            travel = -side * (ra + rb + 6) * math.cos(math.pi * t)
            return [actor((x + travel, y)), other((x, y))]
        case "spins":
            return [other(there), actor(here, rotation=p.angle + side * 2 * math.pi * t)]
        case "bounces":
            return [other(there), actor((here[0], y + 8 - 20 * abs(math.sin(2 * math.pi * t))))]
        case "rides":
            sway = 10 * side * math.cos(2 * math.pi * t)
            return [other((x + sway, y + ra)), actor((x + sway, y - rb))]
        case "splits":
            gap = 2 + 10 * swing
            half = ra * 0.7
            return [other(there), *(actor((here[0], y + s * gap), radius=half) for s in (-1, 1))]
        case "turns":
            return [actor((x, y))] if (t < 0.5) == (side > 0) else [other((x, y))]
        case "between":
            d = ra + rb + 1 + 5 * swing
            return [other((x - d, y)), other((x + d, y)), actor((x, y))]
        case "blinks":
            return [other(there)] if int(t * 5.99) % 2 else [other(there), actor(here)]
        case "left":
            row = y + up * (ra + rb) * 0.5
            return [other((x, y - up * (ra + rb) * 0.6)), actor((SIZE - 6 - (SIZE - 12) * t, row))]
        case "grows":
            low, high = RADII["small"] * 0.8, RADII["large"] * 1.1
            return [other(there), actor(here, radius=low + (high - low) * t)]
        case "appears":
            return [other(there)] if t < 0.5 else [other(there), actor(here)]
        case "meets":
            gap = 26 * (1 - t)
            a = p.angle
            d = ra + rb - 1 + gap
            return [other((x, y)), actor((x + d * math.cos(a), y + d * math.sin(a)))]
        case "before":
            heights = [20 * max(0.0, sign * math.sin(2 * math.pi * t)) for sign in (1, -1)]
            return [other((there[0], y + 8 - heights[1])), actor((here[0], y + 8 - heights[0]))]
        case "becomes":
            return [actor((x, y))] if t < 0.5 else [other((x, y))]
    raise ValueError(f"no such action: {scene.action}")


def render(images: list[list[Sprite]], backgrounds: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one list of sprites an image over `backgrounds` (n, SIZE, SIZE, 3) in 0…255; returns (n, SIZE, SIZE, 3)."""
    canvas = backgrounds.astype(np.float32)
    draw(canvas, images, {name: np.array(colour, np.float32) for name, colour in COLOURS.items()})
    canvas += rng.normal(0, 2.0, (*canvas.shape[:3], 1)).astype(np.float32)
    return canvas.clip(0, 255).round().astype(np.uint8)


def draw(canvas: NDArray[np.float32], images: list[list[Sprite]], colours: Mapping[str, NDArray[np.float32]]) -> None:
    """Draw one list of sprites an image onto `canvas` (n, SIZE, SIZE, 3), in `colours` (3) by their names."""
    for slot in range(MAX_SPRITES):
        for shape in SHAPES:
            rows = [i for i, s in enumerate(images) if len(s) > slot and s[slot].thing.shape == shape]
            if rows:
                _draw(canvas, rows, shape, [images[i][slot] for i in rows], colours)


def lights(n: int, on_stage: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.float32]:
    """`n` backgrounds (n, SIZE, SIZE, 3): grey, lit in the middle where `on_stage`, lit at the rim elsewhere.

    Both kinds hold the same grey levels equally often, whatever the brightness: only where they lie differs.
    """
    centre = rng.uniform(SIZE * 0.35, SIZE * 0.65, (n, 2, 1, 1))
    grid = np.arange(SIZE, dtype=np.float32)
    stretch = rng.uniform(0.8, 1.25, (n, 1, 1))
    distance = (grid[None, None, :] - centre[:, 0]) ** 2 * stretch + (grid[None, :, None] - centre[:, 1]) ** 2 / stretch
    order = distance.reshape(n, -1).argsort(axis=1).argsort(axis=1).reshape(n, SIZE, SIZE)
    level = 1 - 2 * order / (SIZE * SIZE - 1)  # 1 at the centre, −1 in the far corner, all levels equally often
    level = np.where(on_stage[:, None, None], level, -level) * rng.uniform(18, 32, (n, 1, 1))
    tint = rng.uniform(-6, 6, (n, 1, 1, 3))
    return (rng.uniform(75, 130, (n, 1, 1, 1)) + level[..., None] + tint).astype(np.float32)


def _draw(
    canvas: NDArray[np.float32],
    rows: list[int],
    shape: str,
    batch: list[Sprite],
    colours: Mapping[str, NDArray[np.float32]],
) -> None:
    x, y, radius, rotation = (
        np.array([getattr(s, name) for s in batch], np.float32)[:, None, None]
        for name in ("x", "y", "radius", "rotation")
    )
    colour = np.stack([colours[s.thing.colour] for s in batch])[:, None, None, :]
    grid = np.arange(SIZE, dtype=np.float32)
    dx, dy = (grid[None, None, :] - x) / radius, (grid[None, :, None] - y) / radius
    cos, sin = np.cos(rotation), np.sin(rotation)
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    cover = (0.5 - _signed_distance(shape, u, v) * radius).clip(0, 1)[..., None]
    canvas[rows] += cover * (colour - canvas[rows])


def _signed_distance(shape: str, u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
    """Below 0 inside the shape of radius 1 around the origin; about the distance to its edge near it."""
    match shape:
        case "circle":
            return np.hypot(u, v) - 0.9
        case "ring":
            return np.abs(np.hypot(u, v) - 0.74) - 0.23
        case "square":
            return np.maximum(np.abs(u), np.abs(v)) - 0.8
        case "cross":
            a, b = np.abs(u), np.abs(v)
            return np.minimum(np.maximum(a - 1, b - 0.36), np.maximum(b - 1, a - 0.36))
        case "triangle":
            return np.maximum(v, np.abs(u) * (math.sqrt(3) / 2) - v / 2) - 0.6
        case "star":
            wedge = np.abs((np.arctan2(u, -v) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
            r = np.hypot(u, v)
            inner = (0.52 * math.cos(math.pi / 5), 0.52 * math.sin(math.pi / 5))
            normal = np.array((inner[1], 1.2 - inner[0])) / math.hypot(inner[1], 1.2 - inner[0])
            return ((r * np.cos(wedge) - 1.2) * normal[0] + r * np.sin(wedge) * normal[1]).astype(np.float32)
    raise ValueError(f"no such shape: {shape}")

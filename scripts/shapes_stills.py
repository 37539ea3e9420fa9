"""Still images of the world of shapes, with captions that say what is to be seen: what the tiny CLIP learns from.

A still is a moment of a scene. Its caption names the things, their sizes and how they stand to each other; some
captions tell the whole scene in the words that clips are told in: CLIP has met the words, but never a clip.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import shapes_world as world
from numpy.typing import NDArray
from shapes_world import Scene, Sprite

SINGLE = 0.3  # share of stills that show one thing alone
TOLD = 0.35  # share of the others that are told as a clip would be
SIZED = 0.8  # share of captions that give sizes


class Stills:
    """An endless supply, a function of `rng` alone."""

    def __init__(self, rng: np.random.Generator, backgrounds: int = 1024) -> None:
        self.rng = rng
        self.backgrounds = world.lights(backgrounds, np.arange(backgrounds) % 2 == 0, rng)

    def batch(self, count: int) -> tuple[NDArray[np.uint8], list[str]]:
        """Images (count, SIZE, SIZE, 3) and their captions; every second one is nearly like the one before it.

        Near-copies are what makes CLIP learn which colour goes with which shape, and not just which are there.
        """
        scenes: list[Scene] = []
        while len(scenes) < count:
            scene = world.random_scene(self.rng)
            scenes += [scene, self._near_copy(scene)]
        moments, captions = zip(*(self._still(scene) for scene in scenes[:count]), strict=True)
        backgrounds = self.backgrounds[self.rng.integers(len(self.backgrounds), size=count)]
        backgrounds = backgrounds + self.rng.uniform(-10, 10, (count, 1, 1, 1)).astype(np.float32)
        return world.render(list(moments), backgrounds, self.rng), list(captions)

    def _near_copy(self, scene: Scene) -> Scene:
        """Shapes or colours exchanged, or one shape drawn anew."""
        rng, actor, other = self.rng, scene.actor, scene.other
        change = rng.integers(4)
        if change == 0:
            actor, other = replace(actor, shape=other.shape), replace(other, shape=actor.shape)
        elif change == 1:
            actor, other = replace(actor, colour=other.colour), replace(other, colour=actor.colour)
        elif change == 2:
            actor = replace(actor, shape=str(rng.choice(world.SHAPES)))
        else:
            other = replace(other, shape=str(rng.choice(world.SHAPES)))
        if change != 1:
            rng.random()  # not used: the committed weights were trained with the numbers that follow it
        action = scene.action if rng.random() < 0.5 else str(rng.choice(world.STILL_ACTIONS))
        return Scene(action, actor, other)

    def _still(self, scene: Scene) -> tuple[list[Sprite], str]:
        rng = self.rng
        sprites = world.sprites(scene, world.random_layout(scene, rng), rng.random())
        if rng.random() < SINGLE:
            thing = sprites[rng.integers(len(sprites))].thing
            return [sprite for sprite in sprites if sprite.thing == thing], thing.words(rng.random() < SIZED)
        if rng.random() < TOLD:
            return sprites, str(rng.choice(scene.sentences()))
        return sprites, self._describe(scene, sprites)

    def _describe(self, scene: Scene, sprites: list[Sprite]) -> str:
        """What is to be seen at this moment."""
        rng = self.rng
        seen = [sprite for sprite in sprites if _in_picture(sprite)]
        actors = [sprite for sprite in seen if sprite.thing == scene.actor]
        others = [sprite for sprite in seen if sprite.thing == scene.other]
        sized = rng.random() < SIZED
        if not actors or not others:
            return (actors or others or sprites)[0].thing.words(sized)
        if len(actors) == 2:
            return f"{scene.actor.words(sized)} in two parts and {scene.other.words(sized)}"
        if len(others) == 2:
            return str(rng.choice(scene.sentences()))
        first, second = actors[0], others[0]
        if rng.random() < 0.5:
            first, second = second, first
        return f"{first.thing.words(sized)} {_relation(first, second, rng.random())} {second.thing.words(sized)}"


def _in_picture(sprite: Sprite) -> bool:
    margin = sprite.radius * 0.3
    return all(-margin < place < world.SIZE + margin for place in (sprite.x, sprite.y))


def _relation(first: Sprite, second: Sprite, chance: float) -> str:
    """How `first` stands to `second`; `chance` in [0, 1) picks among what is true."""
    gap = np.hypot(first.x - second.x, first.y - second.y) - first.radius - second.radius
    if gap < 2 and chance < 0.6:
        return "overlaps" if gap < -4 else "touches"
    if chance >= 0.85:
        return "and"
    if abs(first.x - second.x) > abs(first.y - second.y):
        return "left of" if first.x < second.x else "right of"
    return "above" if first.y < second.y else "below"

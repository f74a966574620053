"""A seeded world of bi-temporal scenes that knows the whole truth about itself.

>>> from llava.synth import World
>>> pair = World(seed=0, split="train", size=256).pair(7)
>>> pair.before.shape, pair.changed, pair.captions[0]

Where roads and buildings alone change, each pair is asked about in six ways:

>>> World(changes="built").asked(7).rounds
"""

from llava.synth.scene import CLASSES, PLACES, Change
from llava.synth.task_lists import Asked
from llava.synth.world import SPLITS, Instance, Pair, World

__all__ = ["CLASSES", "PLACES", "SPLITS", "Asked", "Change", "Instance", "Pair", "World"]

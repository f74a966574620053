"""Other views of a pair for training: a little less of the scene, a little turned, both dates alike.

As in arXiv 2507.22346: up to 5 % of the area is cut away, then both images turn by up to 15 degrees, and what comes in
at the corners is black. A turned scene has its things in other cells of a grid, so only tasks whose answers do not name
places are seen in this way.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

from llava.data.record import Record
from llava.errors import ConfigError
from llava.tasks.definitions import TASK_NAMES


@dataclass(frozen=True)
class View:
    """What is seen of a scene: a part of its area, and how it lies."""

    area: float
    """Share that stays, above 0 and up to 1; in the image's own proportions."""
    across: float
    down: float
    """Where that part lies: 0 at the left or upper edge, 1 at the right or lower one."""
    angle: float
    """Degrees, counter-clockwise."""

    def of(self, image: Image.Image, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
        """An image, or a mask with `resample` NEAREST, as it is seen."""
        width, height = (max(1, round(side * math.sqrt(self.area))) for side in image.size)
        left = round((image.width - width) * self.across)
        top = round((image.height - height) * self.down)
        return image.crop((left, top, left + width, top + height)).rotate(self.angle, resample)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How far views may differ from what was recorded, and for which tasks."""

    crop: float = 0.05
    """Most of the area that is cut away, a share of it."""
    rotate: float = 15.0
    """Most degrees to either side."""
    tasks: Sequence[str] = ("caption", "binary", "count")
    """Records of other tasks, and pairs with any, are left as they are. Captions without a task are of `caption`."""

    def __post_init__(self) -> None:
        if not 0 <= self.crop < 1:
            raise ConfigError(f"field 'augment.crop' is {self.crop}, expected a share from 0 to less than 1")
        if not 0 <= self.rotate <= 180:
            raise ConfigError(f"field 'augment.rotate' is {self.rotate}, expected degrees from 0 to 180")
        if unknown := sorted(set(self.tasks) - set(TASK_NAMES)):
            raise ConfigError(f"field 'augment.tasks' has {unknown}; known: {', '.join(TASK_NAMES)}")

    def view(self, records: Iterable[Record], key: str) -> View | None:
        """A pair's view, the same for the same `key`; None where one of its records has answers that name places."""
        if not all(record.asks in self.tasks for record in records):
            return None
        dice = random.Random(f"view/{key}")
        area = 1 - dice.random() * self.crop
        return View(area, dice.random(), dice.random(), dice.uniform(-self.rotate, self.rotate))

"""Where a pair differs, from the fusion's change stream alone: a map on the after image, and a picture of it.

The change stream Q holds one token a patch. A model trained with change masks has a head that reads each token
as the probability that its patch changed. Without one nothing is trained: most patches of a pair show no change
and give much the same token, so a patch counts as changed by how far its token lies from the image's typical
one. That is a rank within one image, not a probability, and it fails where most of the image changed.

Shapes: B pairs, N = g x g tokens, D tower width, H x W pixels.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from llava.errors import DataError
from llava.registry import pick

QUIET, LOUD = 2.0, 10.0
"""Scatters above the median score at which the map leaves 0 and reaches 1."""

FLOOR = 0.01
"""Smallest scatter, as a share of a token's length: rounding of nearly equal tokens is no change."""


def median_distance(change: Tensor) -> Tensor:
    """Distance of each token from the image's median token, in token lengths: [B, N, D] to [B, N]."""
    return _relative(change - change.median(dim=1, keepdim=True).values, change)


def median_angle(change: Tensor) -> Tensor:
    """Angle between each token and the image's median token, as a chord: [B, N, D] to [B, N] in 0..2."""
    return _chord(change, change.median(dim=1, keepdim=True).values)


def mean_angle(change: Tensor) -> Tensor:
    """Angle between each token and the image's mean token, as a chord: [B, N, D] to [B, N] in 0..2."""
    return _chord(change, change.mean(dim=1, keepdim=True))


def pair_distance(before: Tensor, after: Tensor) -> Tensor:
    """Distance between the two dates' tokens of one place: twice [B, N, D] to [B, N]. For `outstanding`."""
    return _relative(after - before, before)


def _relative(difference: Tensor, tokens: Tensor) -> Tensor:
    """Lengths of `difference` [B, N, D] in units of the image's median token length."""
    unit = tokens.norm(dim=-1).median(dim=1, keepdim=True).values
    return difference.norm(dim=-1) / unit.clamp(min=1e-12)


def _chord(tokens: Tensor, typical: Tensor) -> Tensor:
    return (F.normalize(tokens, dim=-1) - F.normalize(typical, dim=-1)).norm(dim=-1)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "median": median_distance,
    "median-angle": median_angle,
    "mean-angle": mean_angle,
}
"""How `change_map` can score tokens of a model whose fusion has no map head."""


def change_map(
    change: Tensor,
    size: tuple[int, int],
    *,
    head: nn.Module | None = None,
    score: str = "median",
    covered: float = 1.0,
) -> Tensor:
    """The change stream as a map.

    Args:
        change: Q [B, N, D], as `ChangeVLMModel.get_image_features(...).change` gives it.
        size: height and width of the map in pixels.
        head: the fusion's map head, D to one logit; the map is its probability then, and `score` is not used.
        score: how a token is scored without a head, a name of `SCORES`.
        covered: share of the image's side that the patches cover, see `levels_to_map`.

    Returns:
        [B, H, W] float32 in 0..1.

    Raises:
        ConfigError: an unknown score.
        DataError: N is no square number.
    """
    if head is not None:
        return levels_to_map(head(change)[..., 0].float().sigmoid(), size, covered=covered)
    scores = pick(SCORES, score, what="change score")(change.float())
    return levels_to_map(outstanding(scores), size, covered=covered)


def outstanding(scores: Tensor) -> Tensor:
    """How far each token's score stands out from its image's: [B, N] to [B, N] in 0..1.

    A score counts from the image's median in units of its scatter (1.4826 times the median absolute
    deviation, `FLOOR` at least): `QUIET` and less is 0, `LOUD` and more is 1.
    """
    scores = scores.float()
    median = scores.median(dim=1, keepdim=True).values
    scatter = 1.4826 * (scores - median).abs().median(dim=1, keepdim=True).values
    scatter = scatter.clamp(min=FLOOR)
    return (((scores - median) / scatter - QUIET) / (LOUD - QUIET)).clamp(0, 1)


def levels_to_map(level: Tensor, size: tuple[int, int], *, covered: float = 1.0) -> Tensor:
    """Levels of the tokens [B, N] to maps [B, H, W], laid over the image pixel by pixel, bilinear between centres.

    Args:
        covered: share of the image's side that the patches cover. A 384 pixel input in patches of 14 has
            27 of them, 378 pixels; what lies beyond repeats the last patch.

    Raises:
        DataError: N is no square number.
    """
    side = math.isqrt(level.shape[1])
    if side**2 != level.shape[1]:
        raise DataError(f"{level.shape[1]} tokens are no square grid, so they have no places in an image")
    # pixel centres of the image in the -1..1 coordinates of the token grid
    rows, columns = (((torch.arange(n, device=level.device) + 0.5) / n) / covered * 2 - 1 for n in size)
    place = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)  # [H, W, (x, y)]
    grid = level.view(-1, 1, side, side)
    return F.grid_sample(
        grid, place.expand(len(level), -1, -1, -1), padding_mode="border", align_corners=False
    )[:, 0]


def overlay(after: Image.Image, scores: np.ndarray, *, opacity: float = 0.75) -> Image.Image:
    """The after image with a change map over it.

    The colours run from dark blue to light yellow, evenly to the eye and for colour-blind eyes too; where
    the map is 0 the image shows unchanged.

    Args:
        after: the picture the map belongs to.
        scores: [H, W] in 0..1, of the picture's size.
        opacity: how much of the picture a score of 1 hides.

    Raises:
        DataError: picture and map differ in size.
    """
    if scores.shape != (after.height, after.width):
        raise DataError(
            f"the map is {scores.shape[1]} x {scores.shape[0]} pixels, the image "
            f"{after.width} x {after.height}"
        )
    alpha = (opacity * np.sqrt(scores.clip(0, 1)))[..., None]  # the root keeps weak change visible
    colour = _RAMP[(scores.clip(0, 1) * 255).round().astype(np.uint8)]
    mixed = np.asarray(after.convert("RGB")) * (1 - alpha) + colour * alpha
    return Image.fromarray(mixed.round().astype(np.uint8))


def _ramp() -> np.ndarray:
    """256 colours [256, 3] in 0..255: a straight line through Oklab (Ottosson, 2020) from dark blue to
    light yellow.

    Lightness rises evenly and hue lies on the blue-yellow axis, which the common kinds of colour blindness
    keep.
    """
    lab = np.linspace((0.36, -0.01, -0.15), (0.93, -0.03, 0.17), 256)
    cone = lab @ np.array(
        [
            [1, 1, 1],
            [0.3963377774, -0.1055613458, -0.0894841775],
            [0.2158037573, -0.0638541728, -1.2914855480],
        ]
    )
    linear = cone**3 @ np.array(
        [
            [4.0767416621, -1.2684380046, -0.0041960863],
            [-3.3077115913, 2.6097574011, -0.7034186147],
            [0.2309699292, -0.3413193965, 1.7076147010],
        ]
    )
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


_RAMP = _ramp()

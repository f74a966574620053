"""Whether the CSRM of a released file was ever trained: by what its optimizer remembers, and by its weights.

The released training code does not call the CSRM that its generation calls. A file fitted that way holds gates as
they were drawn, and must be used without them (fusion "concat").
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from llava.model.delta_vlm.released import Released

Verdict = Literal["trained", "untrained", "unknown"]

GROUPS: dict[str, tuple[str, ...]] = {
    "vision blocks": ("visual_encoder.",),
    "final norm": ("ln_vision.",),
    "Q-Former": ("Qformer.",),
    "queries": ("query_tokens",),
    "CSRM": ("context1.", "context2.", "context3.", "gate1.", "gate2."),
    "projection": ("llm_proj.",),
    "contrastive leftovers": ("vision_proj.", "text_proj.", "temp"),
}
"""Parts of a released file, by how the names of their weights begin."""

_MATRICES = ("context1.weight", "context2.weight", "gate1.weight", "gate2.weight", "context3.weight")


@dataclass(frozen=True)
class Evidence:
    """What was found about the CSRM."""

    verdict: Verdict
    optimizer: Verdict
    """By the optimizer's memory alone."""
    weights: Verdict
    """By the weights alone."""
    reasons: list[str] = field(default_factory=list)
    """A sentence for each finding."""


PUBLISHED: Mapping[str, int] = {
    "vision blocks": 50_497_536,
    "final norm": 2_816,
    "Q-Former": 185_660_160,
    "queries": 24_576,
    "CSRM": 13_881_472,
    "projection": 3_149_824,
    "contrastive leftovers": 393_729,
}
"""Values that the published file holds in each of `parameter_groups`: two blocks, a language model of width 4,096."""


def parameter_groups(released: Released) -> dict[str, int]:
    """Values of each part of a released file, buffers left out."""
    counts = dict.fromkeys([*GROUPS, "other"], 0)
    for name, value in released.weights.items():
        if name.endswith((".position_ids", "inv_freq")):
            continue
        part = next((part for part, starts in GROUPS.items() if name.startswith(starts)), "other")
        counts[part] += value.numel()
    return {part: count for part, count in counts.items() if count or part != "other"}


def csrm_evidence(released: Released) -> Evidence:
    """The verdict on a released file's CSRM. The optimizer's memory decides where there is one: it says what the last
    run trained, and so what the other weights were fitted to."""
    reasons: list[str] = []
    if any(name not in released.weights for name in _MATRICES):
        return Evidence("unknown", "unknown", "unknown", ["the file holds no CSRM"])
    optimizer = _by_optimizer(released, reasons)
    weights = _by_weights(released, reasons)
    return Evidence(weights if optimizer == "unknown" else optimizer, optimizer, weights, reasons)


def _by_optimizer(released: Released, reasons: list[str]) -> Verdict:
    """AdamW remembers a mean of gradients for parameters that ever had one, and for no others."""
    states: Any = released.optimizer.get("state") or {}
    moments = [
        tuple(state["exp_avg"].shape)
        for state in states.values()
        if isinstance(state, dict) and isinstance(state.get("exp_avg"), Tensor)
    ]
    if not moments:
        reasons.append("the file holds no optimizer state")
        return "unknown"
    shapes = {
        name: tuple(value.shape)
        for name, value in released.weights.items()
        if not name.endswith((".position_ids", "inv_freq"))
    }
    out = shapes["context3.weight"]
    square = shapes["context1.weight"]
    found, squares = moments.count(out), moments.count(square)
    alike = sum(shape == square for shape in shapes.values())
    others = sum(shape == out for shape in shapes.values()) - 1
    reasons.append(
        f"the optimizer remembers {found} gradients of shape {list(out)} and {squares} of shape {list(square)}; with a "
        f"trained CSRM there are {others + 1} and {alike}, without one {others} and {alike - 4}"
    )
    if others and found not in (others, others + 1):
        return "unknown"
    return "trained" if found > others else "untrained"


def _by_weights(released: Released, reasons: list[str]) -> Verdict:
    """PyTorch draws the weights of a linear layer evenly from +-1/sqrt(inputs)."""
    drawn = []
    for name in _MATRICES:
        weight = released.weights[name].float()
        bound = 1 / math.sqrt(weight.shape[1])
        spread, largest = float(weight.std()), float(weight.abs().max())
        # how far the deviation and the maximum of so many draws may lie from the whole's
        slack = max(0.01, 5 * math.sqrt(0.2 / weight.numel()))
        even = bound / math.sqrt(3)
        untouched = abs(spread / even - 1) <= slack and bound * (1 - slack) <= largest <= bound * (1 + 1e-3)
        drawn.append(untouched)
        reasons.append(
            f"{name}: deviation {spread:.5f} and largest value {largest:.5f}; as drawn, {even:.5f} and {bound:.5f}"
        )
    if all(drawn):
        return "untrained"
    return "unknown" if any(drawn) else "trained"

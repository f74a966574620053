"""Ways to let two dates inform each other before the projector: one file a method, chosen by name."""

from collections.abc import Callable
from typing import Any

from torch import nn

from llava.errors import ConfigError
from llava.model.fusion.csrm import CSRM, ConcatFusion, DateVectors, PaperCSRM, StartedLinear
from llava.model.fusion.difference import DifferenceFusion, FusedPair
from llava.registry import pick

FUSIONS: dict[str, Callable[..., nn.Module]] = {
    "difference": DifferenceFusion,
    "csrm": CSRM,
    "csrm_paper": PaperCSRM,
    "concat": ConcatFusion,
}
"""Each takes (dim, grid, **settings) and maps before, after [B, L, N, D] to a `FusedPair`."""

SELF_STARTING = (StartedLinear, DateVectors)
"""Layers with start values of their own, which `reset_parameters` sets; a model leaves them to it."""

TOKENWISE = frozenset({"csrm", "csrm_paper", "concat"})
"""Kinds that read each token by itself, a class token too; the others need exactly the patches of a grid."""

__all__ = [
    "CSRM",
    "FUSIONS",
    "SELF_STARTING",
    "TOKENWISE",
    "ConcatFusion",
    "DifferenceFusion",
    "FusedPair",
    "PaperCSRM",
    "build_fusion",
]


def build_fusion(settings: dict[str, Any] | None, *, dim: int, grid: int) -> nn.Module | None:
    """The fusion that `settings["kind"]` names, for a tower of width `dim` and `grid` x `grid` patches; None for none.

    Raises:
        ConfigError: unknown kind (the known ones are listed) or a setting the method does not have.
    """
    if settings is None:
        return None
    options = dict(settings)
    build = pick(FUSIONS, options.pop("kind", "difference"), what="fusion")
    try:
        return build(dim=dim, grid=grid, **options)
    except TypeError as error:
        raise ConfigError(f"fusion settings {settings}: {error}") from error

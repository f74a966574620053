"""From the tower's width to the language model's."""

import re

from torch import Tensor, nn

from llava.errors import ConfigError


class Projector(nn.Module):
    """D -> H: one linear layer ("linear"), or n of them with GELU between ("mlp2x_gelu" in every release).

    Raises:
        ConfigError: a kind that is neither.
    """

    def __init__(self, kind: str, dim: int, hidden: int) -> None:
        super().__init__()
        depth = re.fullmatch(r"mlp([1-9])x_gelu", kind)
        if kind != "linear" and depth is None:
            raise ConfigError(f"unknown projector {kind!r}; known: linear, mlp1x_gelu, mlp2x_gelu, ...")
        count = int(depth.group(1)) if depth else 1
        self.layers = nn.ModuleList(nn.Linear(dim if i == 0 else hidden, hidden) for i in range(count))
        self.activation = nn.GELU()

    def forward(self, features: Tensor) -> Tensor:
        """[..., D] to [..., H]."""
        for layer in self.layers[:-1]:
            features = self.activation(layer(features))
        return self.layers[-1](features)

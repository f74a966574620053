"""DeltaVLM's vision encoder: InstructBLIP's EVA-ViT with its class token, the last blocks learning, the others frozen.

Shapes: M images, S pixels a side, N = grid x grid patches, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import InstructBlipVisionConfig, InstructBlipVisionModel

from llava.errors import DataError

FINAL_EPS = 1e-5
"""Of the norm behind the last block; those of the blocks have 1e-6."""


class WideLayerNorm(nn.LayerNorm):
    """Layer norm in float32 whatever the precision of its weights and its input, which comes back as it was."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        with torch.autocast(input.device.type, enabled=False):
            weight, bias = self.weight.float(), self.bias.float()
            normed = F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps)
        return normed.to(input.dtype)


class DeltaVisionTower(InstructBlipVisionModel):
    """Images to their tokens behind the final norm, the class token first.

    It stays in eval mode: nothing in it behaves otherwise while training, and nothing ever should.
    """

    def __init__(self, config: InstructBlipVisionConfig) -> None:
        super().__init__(config)
        self.post_layernorm = WideLayerNorm(config.hidden_size, eps=FINAL_EPS)
        self.eval()

    def train(self, mode: bool = True) -> "DeltaVisionTower":
        return super().train(False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[M, 3, S, S] to [M, 1 + N, D].

        No graph is kept of what lies before the first learning block: gradient checkpointing marks the embedding's
        output as needing a gradient, which frozen blocks would pass on.

        Raises:
            DataError: images of another size than S.
        """
        side = self.config.image_size
        if pixel_values.shape[-2:] != (side, side):
            raise DataError(
                f"images of {tuple(pixel_values.shape[-2:])} pixels for a tower of {side} x {side}; use this "
                "model's own processor"
            )
        wanted = torch.is_grad_enabled()
        learns = pixel_values.requires_grad or _learns(self.embeddings)
        with torch.set_grad_enabled(wanted and learns):
            hidden = self.embeddings(pixel_values)  # [M, 1 + N, D]
        for layer in self.encoder.layers:
            learns = learns or _learns(layer)
            with torch.set_grad_enabled(wanted and learns):
                hidden = layer(hidden)
        return self.post_layernorm(hidden)


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())

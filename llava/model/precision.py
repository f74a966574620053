"""Weights in another precision, and nothing but weights."""

import torch
from torch import nn


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Hold a module's weights in `dtype`, as one that was loaded in it does.

    Its buffers stay as they are: `module.to` would round the rotary frequencies, too, and in bfloat16 a position of
    1,500 then is more than a radian off.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)

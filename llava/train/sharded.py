"""Weights that ZeRO-3 keeps in shards, whole for a while: to generate with, at the price of a copy on each device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from llava.model.checkpoint import unsharded


def is_sharded(model: nn.Module) -> bool:
    """Whether some weight's values are spread over the processes."""
    return any(hasattr(parameter, "ds_status") for parameter in model.parameters())


@contextmanager
def whole_weights(model: Any) -> Iterator[None]:
    """Inside, every process holds all weights of a DeepSpeed engine, and its forward passes wait for nobody.

    Without shards nothing happens. All processes enter and leave together; in between each does what it likes.
    """
    if not isinstance(model, nn.Module) or not is_sharded(model):
        yield
        return
    import deepspeed

    offload = getattr(getattr(model, "optimizer", None), "parameter_offload", None)  # none before the first step
    with deepspeed.zero.GatheredParameters(list(model.parameters())), unsharded():
        # ZeRO-3's hooks would take a layer's weights away again behind its first forward pass
        if offload is not None:
            _unhook(offload)
        try:
            yield
        finally:
            if offload is not None:
                offload.setup_zero_stage3_hooks()


def _unhook(offload: Any) -> None:
    for parameter in offload.module.parameters():
        parameter.ds_active_sub_modules.clear()
    offload.destroy()  # its hooks, no more
    offload.forward_hooks, offload.backward_hooks = [], []

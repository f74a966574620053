"""Losses beside the words, for small models on data that know more than captions: what changed, and where it is.

Linear heads read patches, and are thrown away after training; of a ChangeVLM those that the language model's middle
layer holds, of a DeltaVLM those that its Q-Former reads:
- masks: whether a patch of the after image changed (a record's `mask_path`), and to what, where a mask tells classes
  apart; where the fusion has a `map_head`, that learns whether from the change stream, and is kept;
- objects: whether a connected object of a mask has its middle in a patch, of each class. A share does not tell one
  large house from two small ones;
- places: in which row and column of its image a patch stands. Fine-tuning on words alone loses the columns: rows follow
  from the order of the tokens, columns from nothing that the words reward at first.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llava.model.configuration import ChangeVLMConfig
from llava.model.delta_vlm.configuration import DeltaVLMConfig

AnyConfig = ChangeVLMConfig | DeltaVLMConfig


def patches_of(outputs: Any, input_ids: Tensor, config: AnyConfig) -> Tensor:
    """What the heads read, of a model's training outputs: [P, 2, N, H], before and after of each pair of a batch.

    Args:
        outputs: of a ChangeVLM with its `hidden_states`.
        input_ids: [B, T], with image placeholders.
    """
    count = config.grid**2
    if isinstance(config, DeltaVLMConfig):
        return outputs.pair_features.unflatten(1, (2, 1 + count))[:, :, 1:]
    middle = outputs.hidden_states[len(outputs.hidden_states) // 2]
    return middle[input_ids == config.image_token_id].unflatten(0, (-1, 2, count))


class Auxiliary(nn.Module):
    """The heads with an optimizer of their own, so that no wrapper of the model has to know of them.

    Args:
        config: the model's.
        mask_weight, object_weight, place_weight: weights of the losses; 0 leaves one out.
        mask_levels: how many classes the masks tell apart, C - 1; without any, objects are of one class.
        rate: peak learning rate of the heads.
        device: where the model computes.
    """

    def __init__(
        self,
        config: AnyConfig,
        *,
        mask_weight: float,
        place_weight: float,
        object_weight: float = 0.0,
        mask_levels: int = 0,
        rate: float,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.rate = rate
        self.weights = {"mask": mask_weight, "object": object_weight, "place": place_weight}
        part: Any = config.vision_config if isinstance(config, DeltaVLMConfig) else config.text_config
        hidden, grid = part.hidden_size, config.grid
        self.inputs = {} if isinstance(config, DeltaVLMConfig) else {"output_hidden_states": True}
        """What the model is asked for, beside its loss."""
        self.mask = nn.Linear(hidden, 1 + mask_levels, device=device)
        self.place = nn.Linear(hidden, 2 * grid, device=device)
        self.object = nn.Linear(hidden, mask_levels or 1, device=device) if object_weight else None
        patches = torch.arange(grid * grid, device=device)
        self.register_buffer(
            "rows_columns", torch.stack([patches // grid, patches % grid], 1), persistent=False
        )
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=rate, weight_decay=0.0)
        self._sums: dict[str, Tensor] = {}
        self._clear()

    def forward(
        self,
        patches: Tensor,
        shares: Tensor | None,
        middles: Tensor | None,
        map_logits: Tensor | None,
        known: Tensor | None = None,
        teaches: bool = True,
    ) -> Tensor:
        """The weighted losses of a batch, summed over its pairs.

        Args:
            patches: [B, 2, N, H] of `patches_of`.
            shares: [B, N, C], how much of each patch changed, and how much to each class; None where a batch has no
                masks.
            middles: [B, N, K], 1 where an object of a class has its middle; None like `shares`.
            map_logits: [B, N] of the fusion's `map_head`, if it has one.
            known: [B], which pairs have a mask; None: all, or none where there are no shares.
            teaches: False: a batch that only keeps this process in step with the others; gradients are zeros.
        """
        patches = patches.float()
        losses: dict[str, Tensor] = {}  # [B] each
        # what no mask teaches has a gradient all the same: other processes may have masks, and wait for this one
        total = patches.new_zeros(()) if map_logits is None else 0 * map_logits.float().sum()
        if self.weights["mask"] and shares is not None:
            losses["mask"] = _binary(self.mask(patches[:, 1]), shares)
            if map_logits is not None:
                losses["mask"] = losses["mask"] + _binary(map_logits.float()[..., None], shares[..., :1])
        if self.object is not None and middles is not None:
            losses["object"] = _binary(self.object(patches[:, 1]), middles)
        if self.weights["place"]:
            where: Tensor = self.get_buffer("rows_columns")  # [N, 2]
            logits = self.place(patches).unflatten(-1, (2, -1))  # [B, 2, N, 2, grid]
            targets = where.expand(logits.shape[:-1])
            places = F.cross_entropy(logits.flatten(0, 3), targets.flatten(), reduction="none")
            losses["place"] = places.view(len(patches), -1).mean(1)
        if not teaches:
            return sum((0 * loss.sum() for loss in losses.values()), total)
        every = patches.new_ones(len(patches))
        for name, loss in losses.items():
            counts = every if known is None or name == "place" else known.to(every)
            told = (loss * counts).sum()
            self._sums[name] += torch.stack([told.detach(), counts.sum()])
            total = total + self.weights[name] * told
        return total

    def step(self, factor: float) -> None:
        """Update the heads after the model: gradients averaged over the processes, at `factor` of the peak rate."""
        for parameter in self.parameters():
            if parameter.grad is None:  # here, not on all processes
                parameter.grad = torch.zeros_like(parameter)
            if _spread():
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad()

    def means(self) -> dict[str, float]:
        """Mean losses of a pair before their weights, since the last call, of all processes; all call it together."""
        sums = torch.stack(list(self._sums.values()))  # [losses, 2]
        if _spread():
            dist.all_reduce(sums)
        self._clear()
        rows = zip(self._sums, sums.tolist(), strict=True)
        return {f"{name}_loss": round(sum_ / count, 4) for name, (sum_, count) in rows if count}

    def _clear(self) -> None:
        device = self.mask.weight.device
        self._sums = {name: torch.zeros(2, device=device) for name in self.weights}  # sum, pairs

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"heads": self.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        self.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])


def _binary(logits: Tensor, shares: Tensor) -> Tensor:
    """Cross entropy of [B, N, C] to means over patches, summed over classes: [B]."""
    return F.binary_cross_entropy_with_logits(logits, shares, reduction="none").mean(1).sum(1)


def _spread() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

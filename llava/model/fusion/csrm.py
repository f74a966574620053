"""DeltaVLM's fusion (CSRM, arXiv 2507.22346): gates pick, from the difference of two dates, what matters to each.

Every token is read by itself, together with its twin of the other date, so a class token is as good as a patch.
Shapes: B pairs, L tower levels (the last one is used), N tokens of one image, D tower width. A is before, B after,
t either of them, F_d = F_B - F_A the change.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import initialization

from llava.errors import ConfigError
from llava.model.fusion.difference import FusedPair


class StartedLinear(nn.Linear):
    """A linear layer that starts as PyTorch has it, uniform in +-1/sqrt(inputs), whatever a model's other layers do."""


class IdentityLinear(StartedLinear):
    """One that starts by handing on the first of its inputs, as many as it has outputs."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        weight = self.weight
        initialization.copy_(weight, torch.eye(*weight.shape, dtype=weight.dtype, device=weight.device))
        initialization.zeros_(self.bias)


class DateVectors(nn.Embedding):
    """A vector for the before image and one for the after image."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        initialization.normal_(self.weight, std=0.02)


class CSRM(nn.Module):
    """The form of the released weights: one set of gates for both dates, and the raw features kept beside what they let
    through.

        C_t  = dropout(tanh(W_c1 F_d + W_c2 F_t + b_c))
        G_t  = dropout(sigmoid(W_g1 F_d + W_g2 F_t + b_g))
        E_t  = W_o [F_t ; F_d ; G_t C_t] + b_o

    Args:
        dim: tower width D.
        grid: not needed, tokens are read one by one.
        dropout: of C and of G, drawn for each of them and each date anew.
        init: "identity" starts with E_t = F_t, so that what reads E meets the features it knows; "default" is PyTorch's
            start of linear layers, the release's.

    Raises:
        ConfigError: `dropout` outside 0..1, or an unknown `init`.
    """

    def __init__(
        self,
        dim: int,
        grid: int | None = None,
        dropout: float = 0.5,
        init: Literal["identity", "default"] = "identity",
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ConfigError(f"fusion.dropout={dropout} must be at least 0 and below 1")
        if init not in ("identity", "default"):
            raise ConfigError(f"unknown fusion.init {init!r}; known: identity, default")
        self.context_diff = StartedLinear(dim, dim, bias=False)  # W_c1
        self.context_feat = StartedLinear(dim, dim)  # W_c2, b_c
        self.gate_diff = StartedLinear(dim, dim, bias=False)  # W_g1
        self.gate_feat = StartedLinear(dim, dim)  # W_g2, b_g
        self.out = (IdentityLinear if init == "identity" else StartedLinear)(3 * dim, dim)  # W_o, b_o
        self.dropout = nn.Dropout(dropout)

    def forward(self, before: Tensor, after: Tensor) -> FusedPair:
        """before, after [B, L, N, D] to E_A, E_B and F_d, each [B, N, D]."""
        before, after = before[:, -1], after[:, -1]  # [B, N, D]
        change = after - before
        context, gate = self.context_diff(change), self.gate_diff(change)  # of both dates
        before, after = (self._fuse(x, change, context, gate) for x in (before, after))
        return FusedPair(before, after, change)

    def _fuse(self, features: Tensor, change: Tensor, context: Tensor, gate: Tensor) -> Tensor:
        """F_t with F_d, W_c1 F_d and W_g1 F_d to E_t; all [B, N, D]."""
        context = self.dropout(torch.tanh(context + self.context_feat(features)))
        gate = self.dropout(torch.sigmoid(gate + self.gate_feat(features)))
        return self.out(torch.cat([features, change, gate * context], dim=-1))


class PaperCSRM(nn.Module):
    """The form that the paper prints: gates of each date's own, no dropout, and nothing but what they let through.

        E_t = sigmoid(W_g,t [F_d ; F_t] + b_g,t) tanh(W_c,t [F_d ; F_t] + b_c,t)

    Args:
        dim: tower width D.
        grid: not needed, tokens are read one by one.
    """

    def __init__(self, dim: int, grid: int | None = None) -> None:
        super().__init__()
        self.context_before = StartedLinear(2 * dim, dim)
        self.context_after = StartedLinear(2 * dim, dim)
        self.gate_before = StartedLinear(2 * dim, dim)
        self.gate_after = StartedLinear(2 * dim, dim)

    def forward(self, before: Tensor, after: Tensor) -> FusedPair:
        """before, after [B, L, N, D] to E_A, E_B and F_d, each [B, N, D]."""
        before, after = before[:, -1], after[:, -1]  # [B, N, D]
        change = after - before
        left, right = (torch.cat([change, x], dim=-1) for x in (before, after))  # [B, N, 2D]
        return FusedPair(
            torch.sigmoid(self.gate_before(left)) * torch.tanh(self.context_before(left)),
            torch.sigmoid(self.gate_after(right)) * torch.tanh(self.context_after(right)),
            change,
        )


class ConcatFusion(nn.Module):
    """No fusion, for comparison: both dates as they are, E_t = F_t.

    What reads them by attention without positions, as a Q-Former does, cannot know which date is the earlier one, nor
    which two tokens show one place: (A, B) and (B, A) are the same to it. With `temporal_embedding` it can tell the
    dates apart.

    Args:
        dim: tower width D.
        grid: not needed.
        temporal_embedding: add one learned vector to all tokens of A, and another to those of B.
    """

    def __init__(self, dim: int, grid: int | None = None, temporal_embedding: bool = False) -> None:
        super().__init__()
        self.temporal = DateVectors(2, dim) if temporal_embedding else None

    def forward(self, before: Tensor, after: Tensor) -> FusedPair:
        """before, after [B, L, N, D] to both as they are and F_d, each [B, N, D]."""
        before, after = before[:, -1], after[:, -1]  # [B, N, D]
        change = after - before
        if self.temporal is not None:
            before, after = before + self.temporal.weight[0], after + self.temporal.weight[1]
        return FusedPair(before, after, change)

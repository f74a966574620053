"""DeltaVLM's fusion (CSRM, arXiv 2507.22346): gates pick, from the difference of two dates, what matters to each.

Every token is read by itself, together with its twin of the other date, so a class token is as good as a patch.
Shapes: B pairs, L tower levels (the last one is used), N tokens of one image, D tower width. A is before, B after,
t either of them, F_d = F_B - F_A the change.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import initialization

from llava.errors import ConfigError
from llava.model.fusion.difference import FusedPair


def _restart(linear: nn.Linear) -> None:
    """PyTorch's own start of a linear layer: all values uniform in +-1/sqrt(inputs)."""
    bound = 1 / math.sqrt(linear.in_features)
    initialization.uniform_(linear.weight, -bound, bound)
    if linear.bias is not None:
        initialization.uniform_(linear.bias, -bound, bound)


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
        self.init = init
        self.context_diff = nn.Linear(dim, dim, bias=False)  # W_c1
        self.context_feat = nn.Linear(dim, dim)  # W_c2, b_c
        self.gate_diff = nn.Linear(dim, dim, bias=False)  # W_g1
        self.gate_feat = nn.Linear(dim, dim)  # W_g2, b_g
        self.out = nn.Linear(3 * dim, dim)  # W_o, b_o
        self.dropout = nn.Dropout(dropout)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Start values; a transformers model calls it for what its checkpoint does not hold."""
        for linear in (self.context_diff, self.context_feat, self.gate_diff, self.gate_feat, self.out):
            _restart(linear)
        if self.init == "identity":
            dim = self.out.out_features
            identity = torch.eye(dim, 3 * dim, dtype=self.out.weight.dtype, device=self.out.weight.device)
            initialization.copy_(self.out.weight, identity)
            initialization.zeros_(self.out.bias)

    def forward(self, before: Tensor, after: Tensor) -> FusedPair:
        """before, after [B, L, N, D] to E_A, E_B and F_d, each [B, N, D]."""
        before, after = before[:, -1], after[:, -1]  # [B, N, D]
        change = after - before
        context, gate = self.context_diff(change), self.gate_diff(change)  # of both dates
        return FusedPair(*(self._fuse(x, change, context, gate) for x in (before, after)), change)

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
        self.context_before = nn.Linear(2 * dim, dim)
        self.context_after = nn.Linear(2 * dim, dim)
        self.gate_before = nn.Linear(2 * dim, dim)
        self.gate_after = nn.Linear(2 * dim, dim)

    def initialise(self) -> None:
        """As `CSRM.initialise`; PyTorch's start of linear layers."""
        for linear in (self.context_before, self.context_after, self.gate_before, self.gate_after):
            _restart(linear)

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
        self.temporal = nn.Parameter(torch.empty(2, dim)) if temporal_embedding else None
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """As `CSRM.initialise`."""
        if self.temporal is not None:
            initialization.normal_(self.temporal, std=0.02)

    def forward(self, before: Tensor, after: Tensor) -> FusedPair:
        """before, after [B, L, N, D] to both as they are and F_d, each [B, N, D]."""
        before, after = before[:, -1], after[:, -1]  # [B, N, D]
        change = after - before
        if self.temporal is not None:
            before, after = before + self.temporal[0], after + self.temporal[1]
        return FusedPair(before, after, change)

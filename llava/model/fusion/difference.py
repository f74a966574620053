"""Difference-aware fusion (CCExpert, arXiv 2411.11360): two dates and their change refine one another.

Shapes: B pairs, L tower levels, N patches of one image, D tower width, h heads of d features (h d = D).
All levels share the weights, so blocks see M = B L rows: [M, N, D]. In the equations A is before, B after, Q
the change, P the position code, f a flag.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from llava.errors import ConfigError


class FusedPair(NamedTuple):  # a tuple: DeepSpeed's ZeRO-3 looks for tensors in nothing else
    """What a fusion hands on: before, after and change, each [B, N, D]."""

    before: Tensor
    after: Tensor
    change: Tensor


def sine_position_code(grid: int, dim: int) -> Tensor:
    """2-D sine code P [1, grid * grid, dim]: half the features for y, then half for x.

    Coordinate i = 1..n stands at (i - 0.5) / (n + 1e-6) * 2 pi; feature k of an axis has frequency
    10000 ** (-2 floor(k / 2) / (dim / 2)); even k are sines, odd k cosines.
    """
    place = (torch.arange(1, grid + 1, dtype=torch.float32) - 0.5) / (grid + 1e-6) * (2 * math.pi)
    k = torch.arange(dim // 2, dtype=torch.float32)
    angle = place[:, None] / 10000 ** (2 * (k // 2) / (dim // 2))  # [grid, dim / 2]
    axis = torch.where(k.long() % 2 == 0, angle.sin(), angle.cos())
    y, x = axis[:, None].expand(grid, grid, -1), axis[None].expand(grid, grid, -1)
    return torch.cat([y, x], dim=-1).reshape(1, grid * grid, dim)


class JoinedLinear(nn.Module):
    """Weight and bias of a map from `parts` joined inputs to one, which its user applies part by part.

    Not an `nn.Linear`: quantisation and LoRA would replace one, and then take no part in what is computed.
    """

    def __init__(self, parts: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, parts * dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.trunc_normal_(self.weight, std=0.02)


class DifferenceExtractor(nn.Module):
    """dF(A, B): what differs between two aligned token maps, after each has been gated by the other."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = JoinedLinear(2, dim)  # W_m
        self.proj = JoinedLinear(3, dim)  # W_p

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """A, B [M, N, D] to dF [M, N, D]."""
        # s_A = sigmoid(W_m [A ; B]), s_B = sigmoid(W_m [B ; A]); in place: backward needs the gates only
        own, other, bias = *self.gate.weight.chunk(2, dim=1), self.gate.bias
        gate_before = F.linear(before, own, bias).add_(F.linear(after, other)).sigmoid_()
        gate_after = F.linear(after, own, bias).add_(F.linear(before, other)).sigmoid_()
        # A' = A s_A, B' = B s_B; dF = W_p [A' ; B' ; A' - B'], which is (W_1 + W_3) A' + (W_2 - W_3) B'
        w1, w2, w3 = self.proj.weight.chunk(3, dim=1)
        hint = F.linear(before * gate_before, w1 + w3, self.proj.bias)
        return hint.add_(F.linear(after * gate_after, w2 - w3))


class Attention(nn.Module):
    """One multi-head attention; its projections stand apart, so that the block makes each of them once."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def query(self, x: Tensor) -> Tensor:
        """[M, N, D] to [M, h, N, d], as `key` and `value`."""
        return self._heads(self.q_proj(x)).contiguous()  # one small copy, read for every block of keys

    def key(self, x: Tensor) -> Tensor:
        return self._heads(self.k_proj(x))

    def value(self, x: Tensor) -> Tensor:
        return self._heads(self.v_proj(x))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [M, h, N, d], key and value [M, h, K, d] to [M, N, D]; no [N, K] map is kept."""
        mixed = F.scaled_dot_product_attention(query, key, value)  # scale 1 / sqrt(d)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """D -> mlp_dim -> D with exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DifferenceBlock(GradientCheckpointingLayer):
    """One round: the change looks at itself, then at both dates; then both dates look at the change."""

    def __init__(self, dim: int, head_dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.attend_change = Attention(dim, head_dim)  # Attn1
        self.attend_all = Attention(dim, head_dim)  # Attn2
        self.attend_back = Attention(dim, head_dim)  # Attn3
        self.mlp = Mlp(dim, mlp_dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.flag_before = nn.Parameter(torch.empty(1, dim))
        self.flag_after = nn.Parameter(torch.empty(1, dim))
        self.flag_change = nn.Parameter(torch.empty(1, dim))

    def forward(
        self, before: Tensor, after: Tensor, change: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and Q [M, N, D] with position P [1, N, D] to the refined A, B and Q."""
        # Q = LN1(Q + Attn1(q=Q+P, k=Q+P, v=Q))
        attn = self.attend_change
        placed = change + position
        change = self.norm1(change + attn(attn.query(placed), attn.key(placed), attn.value(change)))

        # Q = LN2(Q + Attn2(q=Q+P+f_C, k=[A+P+f_A ; B+P+f_B ; Q+P+f_C], v=[A ; B ; Q]))
        attn = self.attend_all
        flag_change = position + self.flag_change
        placed_before = before + (position + self.flag_before)
        placed_after = after + (position + self.flag_after)
        placed = change + flag_change
        # joined as heads [M, h, 3N, d]: the copy made here leaves the layout that attention reads fastest
        keys = torch.cat([attn.key(placed_before), attn.key(placed_after), attn.key(placed)], dim=2)
        values = torch.cat([attn.value(before), attn.value(after), attn.value(change)], dim=2)
        change = self.norm2(change + attn(attn.query(placed), keys, values))

        # Q = LN3(Q + MLP(Q))
        change = self.norm3(change + self.mlp(change))

        # X = q_X + Attn3(q=q_X, k=[q_X ; Q+P+f_C], v=[X ; Q]) for A and B. Between theirs, Q's keys and values serve
        # both: A looks at the first two of [A ; Q ; B], B at the last two, which are views.
        attn = self.attend_back
        placed = change + flag_change
        keys = torch.cat([attn.key(placed_before), attn.key(placed), attn.key(placed_after)], dim=2)
        values = torch.cat([attn.value(before), attn.value(change), attn.value(after)], dim=2)
        two = 2 * before.shape[1]
        before = placed_before + attn(attn.query(placed_before), keys[:, :, :two], values[:, :, :two])
        after = placed_after + attn(attn.query(placed_after), keys[:, :, -two:], values[:, :, -two:])
        return before, after, change


class LevelGate(nn.Module):
    """g_l = sigmoid(w_2 GELU(W_1 mean_N [A_l ; B_l ; Q_l])): one weight per pair and level."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(3 * dim, dim)
        self.fc2 = nn.Linear(dim, 1)

    def forward(self, before: Tensor, after: Tensor, change: Tensor) -> Tensor:
        """A, B and Q [B, L, N, D] to weights [B, L, 1, 1] that sum to about one over the levels."""
        mean = torch.cat([x.mean(dim=2) for x in (before, after, change)], dim=-1)  # [B, L, 3D]
        gate = torch.sigmoid(self.fc2(F.gelu(self.fc1(mean))))[..., None]
        return gate / (gate.sum(dim=1, keepdim=True) + 1e-6)


class DifferenceFusion(nn.Module):
    """Let two dates of one place tell each other what changed.

    Args:
        dim: tower width D.
        grid: patches along one side; N = grid ** 2.
        depth: blocks (the release's `per_expert_depth`).
        head_dim: features of one head; D must be a multiple of it.
        mlp_dim: hidden width of each block's MLP. The release's default is 4608 whatever D.
        map_head: also keep a linear `map_head` from Q to the logit that a patch changed, for training with change
            masks. `forward` does not use it. The release has none.

    Raises:
        ConfigError: `dim` is no multiple of `head_dim` or of 4, or `depth` is not positive.
    """

    def __init__(
        self,
        dim: int,
        grid: int,
        depth: int = 2,
        head_dim: int = 128,
        mlp_dim: int = 4608,
        map_head: bool = False,
    ) -> None:
        super().__init__()
        if dim % head_dim or dim % 4:
            raise ConfigError(f"fusion.head_dim={head_dim} (and 4) must divide the tower's width {dim}")
        if depth < 1:
            raise ConfigError(f"fusion.depth={depth} must be at least 1")
        self.grid = grid
        self.difference = DifferenceExtractor(dim)
        self.blocks = nn.ModuleList(DifferenceBlock(dim, head_dim, mlp_dim) for _ in range(depth))
        self.level_gate = LevelGate(dim)
        self.map_head = nn.Linear(dim, 1) if map_head else None
        self.register_buffer("position", sine_position_code(grid, dim), persistent=False)

    def forward(self, before: Tensor, after: Tensor) -> FusedPair:
        """before, after [B, L, N, D], levels shallow to deep, to a `FusedPair` of [B, N, D] each."""
        raw_before, raw_after = before[:, -1], after[:, -1]  # [B, N, D]
        levels = before.shape[:2]
        position: Tensor = self.get_buffer("position").to(before.dtype)
        before, after = before.flatten(0, 1), after.flatten(0, 1)  # [M, N, D]
        change: Tensor | None = None
        for block in self.blocks:
            hint = self.difference(before, after)
            before, after, change = block(before, after, hint if change is None else change + hint, position)
        assert change is not None
        before, after, change = (x.unflatten(0, levels) for x in (before, after, change))  # [B, L, N, D]
        weight = self.level_gate(before, after, change)
        before, after, change = ((weight * x).sum(dim=1) for x in (before, after, change))  # [B, N, D]
        return FusedPair(raw_before + before, raw_after + after, change)

"""Difference-aware fusion (CCExpert, arXiv 2411.11360): two dates and their change refine one another.

Shapes: B pairs, L tower levels, N patches of one image, D tower width, h heads of d features (h d = D).
All levels share the weights, so blocks see M = B L rows: [M, N, D]. Before and after are kept in one tensor
X = [2, M, N, D] wherever both go through the same weights.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from llava.errors import ConfigError


@dataclass
class FusedPair:
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
    angle = place[:, None] / 10000 ** (2 * torch.div(k, 2, rounding_mode="floor") / (dim // 2))  # [grid, dim / 2]
    axis = torch.where(k.long() % 2 == 0, angle.sin(), angle.cos())
    y, x = axis[:, None].expand(grid, grid, -1), axis[None].expand(grid, grid, -1)
    return torch.cat([y, x], dim=-1).reshape(1, grid * grid, dim)


class DifferenceExtractor(nn.Module):
    """dF(A, B): what differs between two aligned token maps, after each has been gated by the other."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * dim, dim)  # W_m
        self.proj = nn.Linear(3 * dim, dim)  # W_p

    def forward(self, pair: Tensor) -> Tensor:
        """[2, M, N, D] to [M, N, D]."""
        # s_A = sigmoid(W_m [A ; B]) and s_B = sigmoid(W_m [B ; A]) without making the concatenations:
        own, other = self.gate.weight.chunk(2, dim=1)
        gate = torch.sigmoid(F.linear(pair, own, self.gate.bias) + F.linear(pair, other).flip(0))
        gated = pair * gate  # A' = A s_A, B' = B s_B
        # W_p [A' ; B' ; A' - B'] = (W_1 + W_3) A' + (W_2 - W_3) B': a third less work, nothing concatenated
        w1, w2, w3 = self.proj.weight.chunk(3, dim=1)
        return F.linear(gated[0], w1 + w3, self.proj.bias) + F.linear(gated[1], w2 - w3)


class Attention(nn.Module):
    """Weights of one multi-head attention; the block decides what is projected once and used twice."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Projected q [..., N, D], k and v [..., K, D] to [..., N, D]; no [N, K] map is kept."""
        heads = [x.reshape(-1, x.shape[-2], x.shape[-1] // self.head_dim, self.head_dim).transpose(1, 2) for x in (q, k, v)]
        mixed = F.scaled_dot_product_attention(*heads)  # [M, h, N, d], scale 1 / sqrt(d)
        return self.out_proj(mixed.transpose(1, 2).reshape(q.shape))


class Mlp(nn.Module):
    """D -> mlp_dim -> D with exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DifferenceBlock(GradientCheckpointingLayer):
    """One round: the change stream looks at itself, then at both dates; both dates then look at the change."""

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

    def forward(self, pair: Tensor, change: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """pair X [2, M, N, D], change Q [M, N, D], position P [1, N, D] to the refined X and Q."""
        # Q = LN1(Q + Attn1(q=Q+P, k=Q+P, v=Q))
        attn = self.attend_change
        placed = change + position
        change = self.norm1(change + attn(attn.q_proj(placed), attn.k_proj(placed), attn.v_proj(change)))

        # Q = LN2(Q + Attn2(q=Q+P+f_C, k=[A+P+f_A ; B+P+f_B ; Q+P+f_C], v=[A ; B ; Q]))
        attn = self.attend_all
        flags = torch.stack([self.flag_before, self.flag_after])[:, None]  # [2, 1, 1, D]
        pair_placed = pair + (position + flags)  # q_X = X + P + f_X, the query of Attn3 too
        placed = change + (position + self.flag_change)
        keys = torch.cat([*attn.k_proj(pair_placed), attn.k_proj(placed)], dim=1)  # [M, 3N, D]
        values = torch.cat([*attn.v_proj(pair), attn.v_proj(change)], dim=1)
        change = self.norm2(change + attn(attn.q_proj(placed), keys, values))

        # Q = LN3(Q + MLP(Q))
        change = self.norm3(change + self.mlp(change))

        # X = q_X + Attn3(q=q_X, k=[q_X ; Q+P+f_C], v=[X ; Q]); Q's keys and values serve both dates
        attn = self.attend_back
        placed = change + (position + self.flag_change)
        change_key, change_value = attn.k_proj(placed), attn.v_proj(change)
        keys = torch.cat([attn.k_proj(pair_placed), change_key.expand_as(pair)], dim=2)  # [2, M, 2N, D]
        values = torch.cat([attn.v_proj(pair), change_value.expand_as(pair)], dim=2)
        return pair_placed + attn(attn.q_proj(pair_placed), keys, values), change


class LevelGate(nn.Module):
    """g_l = sigmoid(w_2 GELU(W_1 mean_N [A_l ; B_l ; Q_l])): one weight per pair and level."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(3 * dim, dim)
        self.fc2 = nn.Linear(dim, 1)

    def forward(self, pair: Tensor, change: Tensor, levels: int) -> Tensor:
        """pair [2, B L, N, D], change [B L, N, D] to weights [B, L, 1, 1] that sum to about one."""
        mean = torch.cat([pair[0].mean(1), pair[1].mean(1), change.mean(1)], dim=-1)  # [B L, 3D]
        gate = torch.sigmoid(self.fc2(F.gelu(self.fc1(mean)))).view(-1, levels, 1, 1)
        return gate / (gate.sum(dim=1, keepdim=True) + 1e-6)


class DifferenceFusion(nn.Module):
    """Let two dates of one place tell each other what changed.

    Args:
        dim: tower width D.
        grid: patches along one side; N = grid ** 2.
        depth: blocks (the release's `per_expert_depth`).
        head_dim: features of one head; D must be a multiple of it.
        mlp_dim: hidden width of each block's MLP. The release's default is 4608 whatever D.

    Raises:
        ConfigError: `dim` is no multiple of `head_dim` or of 4, or `depth` is not positive.
    """

    def __init__(self, dim: int, grid: int, depth: int = 2, head_dim: int = 128, mlp_dim: int = 4608) -> None:
        super().__init__()
        if dim % head_dim or dim % 4:
            raise ConfigError(f"fusion.head_dim={head_dim} (and 4) must divide the tower's width {dim}")
        if depth < 1:
            raise ConfigError(f"fusion.depth={depth} must be at least 1")
        self.grid = grid
        self.difference = DifferenceExtractor(dim)
        self.blocks = nn.ModuleList(DifferenceBlock(dim, head_dim, mlp_dim) for _ in range(depth))
        self.level_gate = LevelGate(dim)
        self.register_buffer("position", sine_position_code(grid, dim), persistent=False)

    def forward(self, before: Tensor, after: Tensor) -> FusedPair:
        """before, after [B, L, N, D], levels shallow to deep, to a `FusedPair` of [B, N, D] each."""
        batch, levels, tokens, dim = before.shape
        raw = torch.stack([before, after])  # [2, B, L, N, D]
        pair = raw.reshape(2, batch * levels, tokens, dim)
        position: Tensor = self.get_buffer("position").to(pair.dtype)
        change: Tensor | None = None
        for block in self.blocks:
            hint = self.difference(pair)
            pair, change = block(pair, hint if change is None else change + hint, position)
        assert change is not None
        weight = self.level_gate(pair, change, levels)  # [B, L, 1, 1]
        fused = (pair.view_as(raw) * weight).sum(dim=2) + raw[:, :, -1]  # [2, B, N, D]
        return FusedPair(fused[0], fused[1], (change.view_as(before) * weight).sum(dim=1))

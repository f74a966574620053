"""The difference fusion as the paper's equations say it, in float64, one pair and one level at a time.

Slow and literal on purpose: nothing is stacked, reused or rearranged, so that it can judge the fast one.
Weights go by the published checkpoint's names, without `model.vision_resampler.`.
"""

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def layer_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * weights[name + ".weight"] + weights[name + ".bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def attention(weights: Weights, name: str, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """q [N, D], k and v [K, D] to [N, D]."""
    q, k, v = (linear(weights, f"{name}.{part}_proj", x) for part, x in (("q", q), ("k", k), ("v", v)))
    size = q.shape[-1] // heads
    out = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[:, part] @ k[:, part].T / math.sqrt(size)
        out.append(scores.softmax(-1) @ v[:, part])
    return linear(weights, f"{name}.out_proj", torch.cat(out, dim=-1))


def position_code(grid: int, dim: int) -> Tensor:
    """P [N, D]: y first, then x."""
    half = dim // 2
    code = torch.zeros(grid, grid, dim, dtype=torch.float64)
    for row in range(grid):
        for column in range(grid):
            for axis, i in enumerate((row + 1, column + 1)):
                place = (i - 0.5) / (grid + 1e-6) * 2 * math.pi
                for k in range(half):
                    angle = place / 10000 ** (2 * (k // 2) / half)
                    code[row, column, axis * half + k] = math.sin(angle) if k % 2 == 0 else math.cos(angle)
    return code.reshape(grid * grid, dim)


def difference(weights: Weights, a: Tensor, b: Tensor) -> Tensor:
    """dF(A, B) [N, D]."""
    name = "expert_change_feature_extractor_model."
    a_gate = torch.sigmoid(linear(weights, name + "linear_mapping", torch.cat([a, b], dim=-1)))
    b_gate = torch.sigmoid(linear(weights, name + "linear_mapping", torch.cat([b, a], dim=-1)))
    a, b = a * a_gate, b * b_gate
    return linear(weights, name + "proj", torch.cat([a, b, a - b], dim=-1))


def refine(weights: Weights, a: Tensor, b: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """All blocks on one level: A, B [N, D] to A, B and Q."""
    p = position_code(math.isqrt(len(a)), a.shape[-1])
    q = torch.zeros_like(a)
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    for i in range(depth):
        layer = f"layers.{i}."
        f_a, f_b, f_c = (weights[f"{layer}{x}_flag_embed.weight"] for x in ("image_a", "image_b", "change"))
        q = q + difference(weights, a, b)
        name = layer + "change_self_attn"
        q = layer_norm(weights, layer + "norm1", q + attention(weights, name, q + p, q + p, q, heads))
        name = layer + "cross_attn_change_to_imageABC"
        keys = torch.cat([a + p + f_a, b + p + f_b, q + p + f_c])
        q = layer_norm(
            weights,
            layer + "norm2",
            q + attention(weights, name, q + p + f_c, keys, torch.cat([a, b, q]), heads),
        )
        mlp = linear(weights, layer + "mlp.lin2", gelu(linear(weights, layer + "mlp.lin1", q)))
        q = layer_norm(weights, layer + "norm3", q + mlp)
        name = layer + "cross_attn_imageAB_to_change"
        refined = []
        for x, flag in ((a, f_a), (b, f_b)):
            query = x + p + flag
            keys = torch.cat([query, q + p + f_c])
            refined.append(query + attention(weights, name, query, keys, torch.cat([x, q]), heads))
        a, b = refined
    return a, b, q


def fuse(
    weights: Weights, before: Tensor, after: Tensor, head_dim: int = 128
) -> tuple[Tensor, Tensor, Tensor]:
    """before, after [L, N, D] of one pair to A_out, B_out and the fused Q, each [N, D]."""
    weights = {name: value.double() for name, value in weights.items()}
    before, after = before.double(), after.double()
    gate = "ChangeAwareTokenReduce.feature_map_level_gate."
    total, sums = 1e-6, [0.0, 0.0, 0.0]
    for a, b in zip(before, after, strict=True):
        streams = refine(weights, a, b, heads=a.shape[-1] // head_dim)
        mean = torch.cat([x.mean(0) for x in streams])
        g = torch.sigmoid(linear(weights, gate + "2", gelu(linear(weights, gate + "0", mean))))
        total = total + g
        sums = [held + g * x for held, x in zip(sums, streams, strict=True)]
    fused = [x / total for x in sums]
    return fused[0] + before[-1], fused[1] + after[-1], fused[2]

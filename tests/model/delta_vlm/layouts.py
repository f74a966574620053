"""Small random files in the layout of the published checkpoint, written without the package under test."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DIM, MLP, WIDTH, FFN, QUERIES, LANGUAGE, WORDS, POSITIONS = 32, 48, 40, 56, 4, 48, 200, 128
BLOCKS, LAYERS = (2, 3), 3
CSRM = ("context1.weight", "context2.weight", "context2.bias", "gate1.weight", "gate2.weight", "gate2.bias",
        "context3.weight", "context3.bias")  # fmt: skip


def _linear(name: str, inside: int, outside: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outside, inside)} | ({f"{name}.bias": (outside,)} if bias else {})


def _norm(name: str, dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def block_names(prefix: str, blocks: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Of the vision encoder."""
    out: dict[str, tuple[int, ...]] = {}
    for i in blocks:
        at = f"{prefix}blocks.{i}."
        out |= _norm(at + "norm1", DIM) | {at + "attn.q_bias": (DIM,), at + "attn.v_bias": (DIM,)}
        out |= _linear(at + "attn.qkv", DIM, 3 * DIM, bias=False) | _linear(at + "attn.proj", DIM, DIM)
        out |= (
            _norm(at + "norm2", DIM) | _linear(at + "mlp.fc1", DIM, MLP) | _linear(at + "mlp.fc2", MLP, DIM)
        )
    return out


def trained_names() -> dict[str, tuple[int, ...]]:
    """Every weight of the published file that this package uses, and its shape."""
    out: dict[str, tuple[int, ...]] = {"query_tokens": (1, QUERIES, WIDTH)}
    out |= block_names("visual_encoder.", BLOCKS) | _norm("ln_vision", DIM)
    bert = "Qformer.bert."
    out[f"{bert}embeddings.word_embeddings.weight"] = (WORDS, WIDTH)
    out[f"{bert}embeddings.position_embeddings.weight"] = (POSITIONS, WIDTH)
    out |= _norm(f"{bert}embeddings.LayerNorm", WIDTH)
    for i in range(LAYERS):
        at = f"{bert}encoder.layer.{i}."
        for kind in ("attention", "crossattention") if i % 2 == 0 else ("attention",):
            read = DIM if kind == "crossattention" else WIDTH
            out |= _linear(f"{at}{kind}.self.query", WIDTH, WIDTH)
            out |= _linear(f"{at}{kind}.self.key", read, WIDTH) | _linear(
                f"{at}{kind}.self.value", read, WIDTH
            )
            out |= _linear(f"{at}{kind}.output.dense", WIDTH, WIDTH) | _norm(
                f"{at}{kind}.output.LayerNorm", WIDTH
            )
        for kind in ("", "_query"):
            out |= _linear(f"{at}intermediate{kind}.dense", WIDTH, FFN)
            out |= _linear(f"{at}output{kind}.dense", FFN, WIDTH) | _norm(
                f"{at}output{kind}.LayerNorm", WIDTH
            )
    out |= _linear("llm_proj", WIDTH, LANGUAGE)
    for name in ("context", "gate"):
        out |= _linear(f"{name}1", DIM, DIM, bias=False) | _linear(f"{name}2", DIM, DIM)
    return out | _linear("context3", 3 * DIM, DIM)


FREQUENCIES = "llm_model.model.layers.0.self_attn.rotary_emb.inv_freq"
"""A buffer of older language models, which were saved with it."""
LEFTOVERS = _linear("vision_proj", WIDTH, 8) | _linear("text_proj", WIDTH, 8) | {"temp": ()}


def random_weights(*, csrm_drawn: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """A whole file's weights; with `csrm_drawn` the CSRM is as PyTorch draws linear layers."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.1)
        for name, shape in (trained_names() | LEFTOVERS).items()
    }
    if csrm_drawn:
        for name in CSRM:
            inputs = trained_names()[name.split(".")[0] + ".weight"][1]
            bound = 1 / math.sqrt(inputs)
            weights[name] = (torch.rand(weights[name].shape, generator=generator) * 2 - 1) * bound
    weights["Qformer.bert.embeddings.position_ids"] = torch.arange(POSITIONS)[None]
    weights[FREQUENCIES] = torch.ones(4)
    return weights


def optimizer_state(weights: dict[str, Tensor], *, csrm: bool) -> dict[str, Any]:
    """AdamW's after a step in which the CSRM had gradients, or had none."""
    parameters = {n: nn.Parameter(w.clone()) for n, w in weights.items() if w.is_floating_point()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-5)
    for name, parameter in parameters.items():
        if name not in LEFTOVERS and (csrm or name not in CSRM):
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def write_file(path: Path, *, trained: bool = True, **options: Any) -> dict[str, Tensor]:
    """A released file with its optimizer; returns its weights."""
    weights = random_weights(csrm_drawn=not trained, **options)
    held = {
        "model": weights,
        "optimizer": optimizer_state(weights, csrm=trained),
        "config": {"run": {"init_lr": 1e-5, "betas": [0.9, 0.999], "task": "captioning"}, "model": {}},
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "epoch": 29,
    }
    torch.save(held, path)
    return weights

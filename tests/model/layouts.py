"""Random checkpoints in the layout of the published code, at any size, written without the package under test."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

FUSION = "model.vision_resampler."
TOWER = "model.vision_tower.vision_tower.vision_model."


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one random checkpoint. `fusion` needs `dim` to be a multiple of 128, the published head size."""

    dim: int = 128
    tower_layers: int = 5
    tower_heads: int = 4
    tower_mlp: int = 20
    patch: int = 4
    grid: int = 3
    layers: tuple[int, ...] | int = (-4, -2)
    fusion: bool = True
    depth: int = 2
    fusion_mlp: int | None = 24
    hidden: int = 24
    text_layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    text_mlp: int = 40
    vocab: int = 70
    tied: bool = False
    newline: bool = False
    dead: bool = True
    seed: int = 0
    dtype: torch.dtype = torch.float32


def _linear(name: str, inside: int, outside: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outside, inside)} | ({f"{name}.bias": (outside,)} if bias else {})


def _norm(name: str, dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def names(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Every weight of the published layout and its shape."""
    d, h = sizes.dim, sizes.hidden
    out: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (sizes.vocab, h),
        "model.norm.weight": (h,),
    }
    if not sizes.tied:
        out["lm_head.weight"] = (sizes.vocab, h)
    kv = h // sizes.heads * sizes.kv_heads
    for i in range(sizes.text_layers):
        layer = f"model.layers.{i}."
        for part, width in (("q", h), ("k", kv), ("v", kv)):
            out |= _linear(f"{layer}self_attn.{part}_proj", h, width)
        out |= _linear(f"{layer}self_attn.o_proj", h, h, bias=False)
        for part in ("gate", "up"):
            out |= _linear(f"{layer}mlp.{part}_proj", h, sizes.text_mlp, bias=False)
        out |= _linear(f"{layer}mlp.down_proj", sizes.text_mlp, h, bias=False)
        out |= {f"{layer}input_layernorm.weight": (h,), f"{layer}post_attention_layernorm.weight": (h,)}

    out[TOWER + "embeddings.patch_embedding.weight"] = (d, 3, sizes.patch, sizes.patch)
    out[TOWER + "embeddings.patch_embedding.bias"] = (d,)
    out[TOWER + "embeddings.position_embedding.weight"] = (sizes.grid**2, d)
    for i in range(sizes.tower_layers):
        layer = f"{TOWER}encoder.layers.{i}."
        for part in ("k", "v", "q", "out"):
            out |= _linear(f"{layer}self_attn.{part}_proj", d, d)
        out |= _norm(layer + "layer_norm1", d) | _norm(layer + "layer_norm2", d)
        out |= _linear(layer + "mlp.fc1", d, sizes.tower_mlp) | _linear(layer + "mlp.fc2", sizes.tower_mlp, d)
    out |= _norm(TOWER + "post_layernorm", d)
    out |= _linear("model.mm_projector.0", d, h) | _linear("model.mm_projector.2", h, h)
    if sizes.newline:
        out["model.image_newline"] = (h,)
    return out | (_fusion_names(sizes) if sizes.fusion else {})


def _fusion_names(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    d, mlp = sizes.dim, sizes.fusion_mlp or 4608
    extractor = FUSION + "expert_change_feature_extractor_model."
    reduce = FUSION + "ChangeAwareTokenReduce."
    out = _linear(extractor + "linear_mapping", 2 * d, d) | _linear(extractor + "proj", 3 * d, d)
    for i in range(sizes.depth):
        layer = f"{FUSION}layers.{i}."
        for name in ("change_self_attn", "cross_attn_change_to_imageABC", "cross_attn_imageAB_to_change"):
            for part in ("q", "k", "v", "out"):
                out |= _linear(f"{layer}{name}.{part}_proj", d, d)
        for norm in (1, 2, 3, 4) if sizes.dead else (1, 2, 3):
            out |= _norm(f"{layer}norm{norm}", d)
        out |= _linear(layer + "mlp.lin1", d, mlp) | _linear(layer + "mlp.lin2", mlp, d)
        out |= {f"{layer}{x}_flag_embed.weight": (1, d) for x in ("image_a", "image_b", "change")}
    out |= _linear(reduce + "feature_map_level_gate.0", 3 * d, d) | _linear(
        reduce + "feature_map_level_gate.2", d, 1
    )
    if sizes.dead:
        out |= _linear(reduce + "change_for_key_proj", d, d) | _linear(reduce + "cross_attn.out_proj", d, d)
        out |= {
            reduce + "cross_attn.in_proj_weight": (3 * d, d),
            reduce + "cross_attn.in_proj_bias": (3 * d,),
        }
        out |= _linear("model.mm_cc_projector.0", d, sizes.hidden)
        out |= _linear("model.mm_cc_projector.2", sizes.hidden, sizes.hidden)
    return out


def is_dead(name: str, sizes: Sizes) -> bool:
    """Whether no output depends on a weight, as the specification of the published code lists them."""
    entries = sizes.tower_layers + 1
    layers = [sizes.layers] if isinstance(sizes.layers, int) else list(sizes.layers)
    deepest = max(layer % entries for layer in layers)
    parts = (
        "norm4",
        "change_for_key_proj",
        "ChangeAwareTokenReduce.cross_attn",
        "mm_cc_projector",
        "post_layernorm",
    )
    behind = [f"{TOWER}encoder.layers.{i}." for i in range(deepest, sizes.tower_layers)]
    return any(part in name for part in parts) or name.startswith(tuple(behind))


def release_config(sizes: Sizes) -> dict[str, Any]:
    """The fields of config.json that matter, as the published code writes them."""
    layers = sizes.layers if isinstance(sizes.layers, int) else list(sizes.layers)
    fields = {
        "architectures": ["LlavaQwenCCForCausalLM" if sizes.fusion else "LlavaQwenForCausalLM"],
        "model_type": "llava_qwen_cc" if sizes.fusion else "llava_qwen",
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "image_aspect_ratio": "anyres_max_9" if sizes.newline else "square",
        "intermediate_size": sizes.text_mlp,
        "max_position_embeddings": 512,
        "mm_hidden_size": sizes.dim,
        "mm_patch_merge_type": "spatial_unpad" if sizes.newline else "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": str(layers).replace(" ", ""),
        "mm_vision_tower": "some/siglip",
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.text_layers,
        "num_key_value_heads": sizes.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": sizes.tied,
        "torch_dtype": str(sizes.dtype).removeprefix("torch."),
        "vocab_size": sizes.vocab,
    }
    if sizes.fusion:
        args = {"downsample_ratio": 1, "per_expert_depth": sizes.depth}
        fields["mm_resampler_type"] = "cc_expert"
        fields["cc_expert_args"] = args | ({"mlp_dim": sizes.fusion_mlp} if sizes.fusion_mlp else {})
    return fields


def random_weights(sizes: Sizes) -> dict[str, Tensor]:
    """Random numbers for every name."""
    generator = torch.Generator().manual_seed(sizes.seed)
    return {n: (torch.randn(s, generator=generator) * 0.2).to(sizes.dtype) for n, s in names(sizes).items()}


def write_release(
    folder: Path,
    sizes: Sizes,
    weights: dict[str, Tensor] | None = None,
    shards: int = 1,
    pickled: bool = False,
) -> dict[str, Tensor]:
    """Write a checkpoint as the published code does; returns its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = random_weights(sizes) if weights is None else weights
    (folder / "config.json").write_text(json.dumps(release_config(sizes)))
    vision = {
        "hidden_size": sizes.dim,
        "intermediate_size": sizes.tower_mlp,
        "num_hidden_layers": sizes.tower_layers,
        "num_attention_heads": sizes.tower_heads,
        "image_size": sizes.grid * sizes.patch,
        "patch_size": sizes.patch,
    }
    (folder / "vision_config.json").write_text(json.dumps(vision))
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    parts = [dict(list(weights.items())[i::shards]) for i in range(shards)]
    files = [
        f"{stem}.{ending}" if shards == 1 else f"{stem}-{i + 1:05}-of-{shards:05}.{ending}"
        for i in range(shards)
    ]
    for file, part in zip(files, parts, strict=True):
        if pickled:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
    if shards > 1:
        index = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return weights

"""Tiny models with random weights and their processors, built in memory: what most tests start from.

Shapes: 28 x 28 pixels in patches of 7 give N = 16 tokens an image; tower width 32, language model width 48.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer, set_seed

from llava.data.conversation import pair_conversation
from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from llava.model.configuration import ChangeVLMConfig
from llava.model.processing import ChangeVLMProcessor

SENTENCES = (
    "This is the Image1 . This is the second Image2 .",
    "What difference happened from Image1 to Image2? You are a helpful assistant.",
    "system user assistant USER: ASSISTANT: the scene is the same as before .",
    "many buildings and a road are built , the trees are gone .",
)
IMAGE_SIZE, PATCH_SIZE = 28, 7

VISION: dict[str, dict[str, Any]] = {
    "siglip": {"model_type": "siglip_vision_model", "vision_use_head": False},
    "siglip2": {"model_type": "siglip2_vision_model", "vision_use_head": False, "num_patches": 16},
    "clip": {"model_type": "clip_vision_model"},
    # by default DINOv3 rescales its positions at random while training
    "dinov3": {"model_type": "dinov3_vit", "num_register_tokens": 2, "pos_embed_rescale": None},
    "eva": {"model_type": "instructblip_vision_model"},
}
DIFFERENCE = {"kind": "difference", "depth": 2, "head_dim": 8, "mlp_dim": 40}
TEXT: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 12},
    "llama": {"model_type": "llama"},
}


@cache
def _merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE trained on `SENTENCES`: 256 bytes and 100 merges."""
    import json

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=356, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(SENTENCES, trainer)
    state = json.loads(bpe.to_str())["model"]
    return state["vocab"], [tuple(pair) for pair in state["merges"]]


def tiny_tokenizer(text: str = "qwen2") -> PreTrainedTokenizerBase:
    """A fast tokenizer: Qwen2's kind with ChatML marks, or for "llama" one with `<s>` and `</s>` and none."""
    vocab, merges = _merges()
    if text != "llama":
        tokenizer = Qwen2Tokenizer(
            vocab=dict(vocab),
            merges=list(merges),
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            unk_token=None,
        )
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        return tokenizer
    bpe = Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges)))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<unk>", unk_token="<unk>"
    )


def tiny_config(
    fusion: bool | dict[str, Any] = True, text: str = "qwen2", vision: str = "siglip", **overrides: Any
) -> ChangeVLMConfig:
    """Four tower layers, of which three are used (two levels, or one without fusion); two text layers."""
    tokenizer = tiny_tokenizer(text)
    fields = {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            **VISION[vision],
        },
        "text_config": {
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 384,
            "max_position_embeddings": 512,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **TEXT[text],
        },
        "vision_layers": [1, 3] if fusion else -2,
        "fusion": fusion if isinstance(fusion, dict) else dict(DIFFERENCE) if fusion else None,
        "image_token_id": len(tokenizer),
    }
    return ChangeVLMConfig(**(fields | overrides))


def tiny_model(
    fusion: bool | dict[str, Any] = True,
    text: str = "qwen2",
    vision: str = "siglip",
    seed: int = 0,
    **overrides: Any,
) -> tuple[ChangeVLMForConditionalGeneration, ChangeVLMProcessor]:
    """A model in float32 and eval mode, and its processor; the same seed gives the same weights.

    Weights are such that signals keep their size, so that answers and gradients depend on every part.
    """
    config = tiny_config(fusion, text, vision, **overrides)
    set_seed(seed)
    model = ChangeVLMForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name or "position_embedding" in name or "flag" in name:
                parameter.normal_(std=0.7)
            elif parameter.dim() > 1:
                parameter.normal_(std=1.2 * (parameter.shape[0] / parameter.numel()) ** 0.5)
    return model, ChangeVLMProcessor.for_config(config, tiny_tokenizer(text))


def random_image(seed: int, width: int = 40, height: int = 36) -> Image.Image:
    """An RGB picture of noise."""
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def random_pair(seed: int) -> list[Image.Image]:
    """Two pictures of noise: before, after."""
    return [random_image(2 * seed), random_image(2 * seed + 1)]


def pair_inputs(processor: ChangeVLMProcessor, seeds: list[int]) -> dict[str, torch.Tensor]:
    """Prompts with the default question about one random pair a seed, as a left-padded batch."""
    text = processor.prompt(pair_conversation())
    return dict(processor(images=[random_pair(seed) for seed in seeds], text=[text] * len(seeds)))

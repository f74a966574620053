"""Tiny DeltaVLMs with random weights and their processors, built in memory.

Shapes: 28 x 28 pixels in patches of 7 give N = 16 patches and 17 tokens an image; encoder width 32, Q-Former 40,
language model 48; K = 4 queries.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import BertTokenizer, PreTrainedTokenizerBase, set_seed

from llava.model.delta_vlm.configuration import DeltaVLMConfig
from llava.model.delta_vlm.modeling import DeltaVLMForConditionalGeneration
from llava.model.delta_vlm.processing import DeltaVLMProcessor
from tests.tiny import SENTENCES, TEXT, random_pair, tiny_tokenizer

QUERIES = 4
QUESTIONS = ("What difference happened?", "Are the trees gone, and is a road built? You see the scene.")
FUSIONS: dict[str, Any] = {
    "csrm": {"kind": "csrm", "init": "default"},
    "csrm identity": "csrm",
    "csrm_paper": "csrm_paper",
    "concat": "concat",
    "concat dated": {"kind": "concat", "temporal_embedding": True},
    "difference": {"kind": "difference", "depth": 1, "head_dim": 8, "mlp_dim": 40},
}


def tiny_bert() -> PreTrainedTokenizerBase:
    """A word-piece tokenizer with BERT's marks, single letters and the words of the tests."""
    words = sorted({word.strip(".,?:").lower() for text in (*SENTENCES, *QUESTIONS) for word in text.split()})
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?:"
    listed = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)]
    vocab = {word: i for i, word in enumerate(dict.fromkeys([*listed, *words]))}
    return BertTokenizer(vocab=vocab, model_max_length=512)


def tiny_config(text: str = "llama", fusion: Any = "csrm", **overrides: Any) -> DeltaVLMConfig:
    """Four encoder blocks, of which two learn; three Q-Former layers; two text layers."""
    tokenizer = tiny_tokenizer(text)
    fields: dict[str, Any] = {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 7,
        },
        "qformer_config": {
            "hidden_size": 40,
            "intermediate_size": 56,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "vocab_size": 200,
            "max_position_embeddings": 128,
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
        "num_query_tokens": QUERIES,
        "fusion": fusion,
    }
    return DeltaVLMConfig(**(fields | overrides))


def enliven(model: torch.nn.Module) -> None:
    """Weights such that signals keep their size, so that answers and gradients depend on every part."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # embeddings of words, positions and classes, queries, dates, flags
            if any(word in name for word in ("embed", "query_tokens", "temporal", "flag")):
                parameter.normal_(std=0.7)
            elif parameter.dim() > 1 and "fusion.out" not in name:
                parameter.normal_(std=1.2 * (parameter.shape[0] / parameter.numel()) ** 0.5)


def tiny_model(
    text: str = "llama", fusion: Any = FUSIONS["csrm"], seed: int = 0, **overrides: Any
) -> tuple[DeltaVLMForConditionalGeneration, DeltaVLMProcessor]:
    """A model in float32 and eval mode, and its processor; the same seed gives the same weights."""
    config = tiny_config(text, fusion, **overrides)
    set_seed(seed)
    model = DeltaVLMForConditionalGeneration(config).eval()
    enliven(model)
    return model, DeltaVLMProcessor.for_config(config, tiny_tokenizer(text), tiny_bert())


def pair_inputs(
    processor: DeltaVLMProcessor, seeds: list[int], questions: tuple[str, ...] = QUESTIONS[:1], **options: Any
) -> dict[str, Tensor]:
    """Questions, in turn, about one random pair a seed."""
    text = [questions[i % len(questions)] for i in range(len(seeds))]
    return dict(processor(images=[random_pair(seed) for seed in seeds], text=text, **options))

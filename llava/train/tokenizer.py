"""A small byte-level BPE tokenizer in Qwen2's format, trained on given text."""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """A tokenizer of at most `vocab_size` entries: bytes first, then merges, then Qwen2's special tokens.

    The same texts in the same order give the same tokenizer. Text is cut before merging as Qwen2 cuts it.
    """
    bare = Qwen2Tokenizer(vocab={}, merges=[])
    core = Tokenizer(models.BPE())
    core.normalizer = bare.backend_tokenizer.normalizer
    core.pre_tokenizer = bare.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    learned = json.loads(core.to_str())["model"]
    # the special tokens go into the vocabulary itself: appended by name they would come in an order of their own
    vocabulary = {**learned["vocab"], **{token: len(learned["vocab"]) + i for i, token in enumerate(SPECIAL)}}
    fields: dict[str, Any] = {
        "vocab": vocabulary,
        "merges": [tuple(pair) for pair in learned["merges"]],
        "unk_token": None,  # as in Qwen2: with bytes nothing is unknown
        "pad_token": SPECIAL[0],
        "eos_token": SPECIAL[2],
        "additional_special_tokens": [SPECIAL[1]],
        "model_max_length": 2048,
        "padding_side": "left",
    }
    return Qwen2Tokenizer(**fields)

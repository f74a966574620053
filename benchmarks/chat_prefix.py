"""What a further question costs when the pair is encoded once: the tenth question against the first.

A random model at the real number of image tokens, with tower, fusion and language model made small, or of a published
model's widths and depths (`--size 0.5b`, `7b`: random weights, a few GB or many). Prints seconds to the first token and
to the end, and the same question behind the same rounds by a full run.

- change: 27 x 27 = 729 tokens an image stand in the text, 1458 a pair. What is kept is keys and values of the text up
  to there, so a further question costs its own tokens.
- delta: 257 tokens an image go into a Q-Former, which gives 32 to the text. What is kept is the tokens of tower and
  fusion; a further question costs a pass of the Q-Former, and its own tokens behind the 32.

    python benchmarks/chat_prefix.py [--family change|delta] [--size small|0.5b|7b] [--device cpu] [--rounds 10]
"""

import argparse
import json
import platform
import statistics
import time
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2Tokenizer

from llava.captioner import ChangeCaptioner
from llava.data.conversation import QUESTION
from llava.generation import Generation
from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from llava.model.configuration import PRESETS, SIGLIP_SO400M, ChangeVLMConfig
from llava.model.delta_vlm.configuration import DeltaVLMConfig
from llava.model.delta_vlm.modeling import DeltaVLMForConditionalGeneration
from llava.model.delta_vlm.processing import DeltaVLMProcessor
from llava.model.processing import ChangeVLMProcessor

SMALL: dict[str, Any] = {
    "vision_config": SIGLIP_SO400M
    | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4},
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 4096,
    },
    "vision_layers": [2, 3, 4, 5],
    "fusion": {"kind": "difference", "depth": 2, "head_dim": 64, "mlp_dim": 512},
}


SMALL_DELTA: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "initializer_range": 0.02,
    },
    "qformer_config": {
        "vocab_size": 512,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 512,
    },
    "text_config": SMALL["text_config"],
}


def bytes_tokenizer() -> Qwen2Tokenizer:
    """One that knows bytes and ChatML's marks only."""
    units = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + i for i in range(256 - len(units))]
    vocab = {chr(code): i for i, code in enumerate([*units, *others])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def random_captioner(family: str, size: str, device: str, dtype: str) -> ChangeCaptioner:
    """A captioner of random weights."""
    tokenizer, kind = bytes_tokenizer(), getattr(torch, dtype)
    if family == "delta":
        marks = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        held = (
            DeltaVLMConfig.preset("deltavlm-7b") if size == "7b" else DeltaVLMConfig(**SMALL_DELTA, **marks)
        )
        torch.manual_seed(0)
        with torch.device(device):
            asked = DeltaVLMForConditionalGeneration(held).to(kind)
        words = DeltaVLMProcessor.for_config(held, tokenizer, tokenizer)
        return ChangeCaptioner(asked, words, name=f"random deltavlm {size}")
    fields = SMALL if size == "small" else {"vision_config": SIGLIP_SO400M, **PRESETS[f"ccexpert-{size}"]}
    config = ChangeVLMConfig(**(fields | {"image_token_id": len(tokenizer)}))
    torch.manual_seed(0)
    with torch.device(device):
        model = ChangeVLMForConditionalGeneration(config).to(kind)
    return ChangeCaptioner(model, ChangeVLMProcessor.for_config(config, tokenizer), name=f"random {size}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=("change", "delta"), default="change")
    parser.add_argument("--size", choices=("small", "0.5b", "7b"), default="small", help="delta: small or 7b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=16)
    args = parser.parse_args()

    if args.family == "delta" and args.size == "0.5b":
        parser.error("there is no DeltaVLM of 0.5b")
    captioner = random_captioner(args.family, args.size, args.device, args.dtype)
    captioner.generation = Generation(max_new_tokens=args.new_tokens)
    captioner._ends = [10**9]  # no token: every answer has its full length
    levels = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    pair = [Image.fromarray(image) for image in levels]
    captioner.caption(*pair)  # warm

    started = time.perf_counter()
    chat = captioner.chat(*pair)
    encoding = time.perf_counter() - started
    rounds = [chat.ask(QUESTION) for _ in range(args.rounds)]
    first, last = rounds[0], rounds[-1]
    history, whole, begun = chat.rounds[:-1], [], []
    for _ in range(3):  # the same question behind the same rounds, nothing kept
        started = time.perf_counter()
        anew = captioner.chat(*pair, history=history)
        read = time.perf_counter() - started
        answer = anew.ask(QUESTION)
        whole.append(read + answer.seconds)
        begun.append(read + answer.first_token_seconds)
    result = {
        "model": captioner.name,
        "where": args.device
        if args.device != "cpu"
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "tokens of the last prompt": len(captioner.prompt_ids(QUESTION, history)),
        "of them of images": captioner.prompt_ids().count(captioner.model.config.image_token_id),
        "answer tokens": args.new_tokens,
        "encode the pair": encoding,
        "first question after it": first.seconds,
        f"question {args.rounds}": last.seconds,
        "to its first token": last.first_token_seconds,
        f"question {args.rounds} by a full run": statistics.median(whole),
        "to its first token, full run": statistics.median(begun),
    }
    result["full run / kept, to the first token"] = statistics.median(begun) / last.first_token_seconds
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}, indent=1))


if __name__ == "__main__":
    main()

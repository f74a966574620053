"""What a further question costs when the pair is encoded once: the tenth question against the first.

A random model at the real number of image tokens (27 x 27 = 729 an image, 1458 a pair), with the tower,
fusion and language model made small, or with `--size 0.5b` the widths and depths of the published 0.5B model
(a few GB of random weights). Prints seconds to the first token and to the end, and the same question by a
full run.

    python benchmarks/chat_prefix.py [--size small|0.5b] [--device cpu] [--rounds 10]
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


def random_captioner(size: str, device: str, dtype: str) -> ChangeCaptioner:
    """A captioner of random weights whose tokenizer knows bytes only."""
    fields = SMALL if size == "small" else {"vision_config": SIGLIP_SO400M, **PRESETS[f"ccexpert-{size}"]}
    units = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + i for i in range(256 - len(units))]
    vocab = {chr(code): i for i, code in enumerate([*units, *others])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    config = ChangeVLMConfig(**(fields | {"image_token_id": len(tokenizer)}))
    torch.manual_seed(0)
    with torch.device(device):
        model = ChangeVLMForConditionalGeneration(config).to(getattr(torch, dtype))
    return ChangeCaptioner(model, ChangeVLMProcessor.for_config(config, tokenizer), name=f"random {size}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("small", "0.5b"), default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=16)
    args = parser.parse_args()

    captioner = random_captioner(args.size, args.device, args.dtype)
    captioner.generation = Generation(max_new_tokens=args.new_tokens)
    captioner._ends = [10**9]  # no token: every answer has its full length
    levels = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    pair = [Image.fromarray(image) for image in levels]
    captioner.caption(*pair)  # warm

    fresh = [captioner.caption(*pair) for _ in range(3)]
    started = time.perf_counter()
    chat = captioner.chat(*pair)
    encoding = time.perf_counter() - started
    rounds = [chat.ask(QUESTION) for _ in range(args.rounds)]
    first, last = rounds[0], rounds[-1]
    result = {
        "model": captioner.name,
        "where": args.device
        if args.device != "cpu"
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "image tokens": 2 * captioner.model.config.image_seq_length,
        "answer tokens": args.new_tokens,
        "encode the pair": encoding,
        "first question after it": first.seconds,
        f"question {args.rounds}": last.seconds,
        "to its first token": last.first_token_seconds,
        "the first question by a full run": statistics.median(a.seconds for a in fresh),
        "to its first token, full run": statistics.median(a.first_token_seconds for a in fresh),
    }
    result["full run / question to first token"] = (
        result["to its first token, full run"] / result["to its first token"]  # type: ignore[operator]
    )
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}, indent=1))


if __name__ == "__main__":
    main()

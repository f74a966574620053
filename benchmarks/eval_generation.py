"""Captions of a set of pairs: this package's evaluation beside one pair at a time in float32, in one run.

    python benchmarks/eval_generation.py                                   439 M slice, CPU: at least 1.2 times
    python benchmarks/eval_generation.py --json benchmarks/results/eval_generation.json
    python benchmarks/eval_generation.py --size 0.5b --device cuda --batch-size 64 --pairs 256    at least 10 times

The slice has SigLIP so400m's width and 11 of its layers, the whole fusion, Qwen2-0.5B's width with 4 of its
layers, and the whole vocabulary; weights are random and every answer has `--new-tokens` tokens, as many as a
caption of a changed pair. Pairs are PNG files of 256 x 256 pixels; reading them is part of the time.

  release     one pair at a time, float32, read when its turn comes, logits for all 1,500 positions of the prompt:
              how the published code evaluates
  one by one  the same with the logits of the last position alone: what is compared with
  ours        `llava.eval.generate`: files read ahead, pairs in batches, in each of `--dtypes`

All take turns in every round, each on its own pairs, so that other work on the machine meets all alike; given
are the medians over rounds, and the ratios within each round.
"""

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import DynamicCache, Qwen2Tokenizer

from llava.captioner import ChangeCaptioner
from llava.data.conversation import PAIR_INTRODUCTION, QUESTION, pair_conversation
from llava.data.images import load_pair
from llava.data.record import Record
from llava.eval.generate import answer_batches, make_batches
from llava.generation import Generation
from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from llava.model.configuration import PRESETS, QWEN2_05B, SIGLIP_SO400M, ChangeVLMConfig
from llava.model.processing import ChangeVLMProcessor

PRESET: dict[str, Any] = {"vision_config": SIGLIP_SO400M, **PRESETS["ccexpert-0.5b"]}
SLICE: dict[str, Any] = PRESET | {
    "vision_config": SIGLIP_SO400M | {"num_hidden_layers": 11},
    "text_config": QWEN2_05B | {"num_hidden_layers": 4},
    "vision_layers": [2, 5, 8, 11],
}
TINY: dict[str, Any] = SLICE | {  # to try this script in seconds
    "vision_config": SIGLIP_SO400M
    | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 11, "num_attention_heads": 4},
    "text_config": QWEN2_05B
    | {"hidden_size": 56, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 152000},
    "fusion": {"kind": "difference", "depth": 2, "head_dim": 32, "mlp_dim": 64},
}
SIZES = {"slice": SLICE, "0.5b": PRESET, "tiny": TINY}
NO_END = 10**9


def random_captioner(size: str, device: str) -> ChangeCaptioner:
    """A captioner in float32 with random weights and a tokenizer that knows bytes only."""
    units = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + i for i in range(256 - len(units))]
    vocab = {chr(code): i for i, code in enumerate([*units, *others])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    words = re.findall(r" ?\w+", PAIR_INTRODUCTION + QUESTION + " system You are a helpful assistant user")
    tokenizer.add_tokens(sorted(set(words)))  # one token a word, as in Qwen2's own vocabulary
    config = ChangeVLMConfig(**(SIZES[size] | {"image_token_id": len(tokenizer)}))
    torch.manual_seed(0)
    with torch.device(device):
        model = ChangeVLMForConditionalGeneration(config).to(torch.float32)
    return prepared(
        ChangeCaptioner(model, ChangeVLMProcessor.for_config(config, tokenizer), name=f"random {size}")
    )


def prepared(captioner: ChangeCaptioner) -> ChangeCaptioner:
    captioner._ends = [NO_END]  # no token ends an answer, so all have their full length
    return captioner


def in_dtype(captioner: ChangeCaptioner, dtype: str) -> ChangeCaptioner:
    """The same weights in another precision, beside the first ones."""
    if dtype == "float32":
        return captioner
    model = ChangeVLMForConditionalGeneration(captioner.model.config)
    model.load_state_dict(captioner.model.state_dict())
    model = model.to(device=captioner.model.device, dtype=getattr(torch, dtype))
    return prepared(ChangeCaptioner(model, captioner.processor, name=f"{captioner.name} {dtype}"))


def draw_pairs(folder: Path, count: int, side: int = 256) -> list[Record]:
    """Pairs of soft random pictures with a little noise, which cost about what real tiles cost to read."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(count):
        names = []
        for date in "AB":
            soft = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((side, side))
            noise = rng.integers(0, 24, (side, side, 3), dtype=np.uint8)
            names.append(f"{number:04}_{date}.png")
            Image.fromarray((np.asarray(soft) // 2 + noise).astype(np.uint8)).save(folder / names[-1])
        records.append(
            Record(uid=f"{number:04}", img1_path=names[0], img2_path=names[1], change_caption=("x",))
        )
    return records


@torch.no_grad()
def one_by_one(
    captioner: ChangeCaptioner, records: Sequence[Record], root: Path, new_tokens: int, *, keep: int
) -> list[list[int]]:
    """Greedy tokens of each pair, alone; `keep` 0 computes the logits of every position of the prompt."""
    model, processor = captioner.model, captioner.processor
    answers = []
    for record in records:
        pair = load_pair(*record.paths(root))
        inputs = processor(images=[list(pair)], text=[processor.prompt(pair_conversation())]).to(model.device)
        cache = DynamicCache()
        out = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        new = [out.logits[:, -1:].float().argmax(-1)]  # [1, 1]
        del out
        for _ in range(new_tokens - 1):
            out = model(input_ids=new[-1], past_key_values=cache, use_cache=True)
            new.append(out.logits[:, -1:].float().argmax(-1))
        answers.append(torch.cat(new, 1)[0].tolist())
    return answers


def ours(
    captioner: ChangeCaptioner,
    records: Sequence[Record],
    root: Path,
    how: Generation,
    size: int,
    workers: int,
) -> list[str]:
    batches = make_batches(records, size)
    return [
        a.text
        for made in answer_batches(captioner, batches, root, how, workers=workers)
        for a in made.values()
    ]  # type: ignore[union-attr]


def measure(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    records = draw_pairs(root, max(args.pairs, args.single))
    captioner = random_captioner(args.size, args.device)
    captioners = {dtype: in_dtype(captioner, dtype) for dtype in args.dtypes}
    how = Generation(max_new_tokens=args.new_tokens, static_cache=args.static_cache, compile=args.compile)
    few, many = records[: args.single], records[: args.pairs]
    ways: dict[str, tuple[int, Callable[[], Any]]] = {
        "release": (len(few), lambda: one_by_one(captioner, few, root, args.new_tokens, keep=0)),
        "one by one": (len(few), lambda: one_by_one(captioner, few, root, args.new_tokens, keep=1)),
    }
    for dtype, other in captioners.items():
        ways[f"ours, {dtype}"] = (
            len(many),
            lambda other=other: ours(other, many, root, how, args.batch_size, args.workers),
        )
    said: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    work: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds + 1):
        for name, (pairs, call) in ways.items():
            if args.device == "cuda":
                torch.cuda.synchronize()
            clock, processor = time.perf_counter(), time.process_time()
            said[name] = call()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - clock) / pairs)
                work[name].append((time.process_time() - processor) / pairs)
                print(
                    f"round {number}: {name}: {seconds[name][-1]:.3f} s a pair", file=sys.stderr, flush=True
                )
    single = [captioner._decode(ids) for ids in said["one by one"]]
    equal = {
        dtype: sum(a == b for a, b in zip(single, said[f"ours, {dtype}"], strict=False))
        for dtype in captioners
    }

    def ratios(times: dict[str, list[float]], against: str) -> dict[str, float]:
        return {
            name: statistics.median(a / b for a, b in zip(times[against], times[name], strict=True))
            for name in times
            if name.startswith("ours")
        }

    return {
        "parameters": sum(p.numel() for p in captioner.model.parameters()),
        "prompt_tokens": len(captioner.prompt_ids()),
        "new_tokens": args.new_tokens,
        "pairs": {"one by one": len(few), "ours": len(many)},
        "batch_size": args.batch_size,
        "seconds_a_pair": {name: statistics.median(values) for name, values in seconds.items()},
        "processor_seconds_a_pair": {name: statistics.median(values) for name, values in work.items()},
        "times_one_by_one": ratios(seconds, "one by one"),
        "times_release": ratios(seconds, "release"),
        "times_one_by_one_in_processor_time": ratios(work, "one by one"),
        "seconds_by_round": seconds,
        "texts_equal_to_one_by_one": {dtype: f"{same} of {len(single)}" for dtype, same in equal.items()},
    }


def machine(device: str, threads: int) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return (
        f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()}), {threads} of {os.cpu_count()} "
        f"cores, torch {torch.__version__}"
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(SIZES), default="slice", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of ours (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="of ours (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=8, help="for ours, a round (default: %(default)s)")
    parser.add_argument(
        "--single", type=int, default=2, help="for one by one, a round (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=12, help="of every answer (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of the CPU (%(default)s)"
    )
    parser.add_argument("--workers", type=int, default=2, help="threads that read (default: %(default)s)")
    parser.add_argument("--static-cache", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    promise = 10.0 if args.device == "cuda" else 1.2
    best = max(found["times_one_by_one"].values())
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine(args.device, args.threads),
        "load": f"{load:.1f} to {os.getloadavg()[0]:.1f}",
        "command": shlex.join(["python", "benchmarks/eval_generation.py", *argv]),
        "model": args.size,
        **found,
        "promise": {"times_one_by_one": promise, "reached": best, "kept": best >= promise},
    }
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        part = args.json.with_name(f"{args.json.name}.part")
        part.write_text(json.dumps(found, indent=1) + "\n")
        part.replace(args.json)
    return int(best < promise)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

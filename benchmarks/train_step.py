"""A training step beside a plain implementation of the published method, in one run.

    python benchmarks/train_step.py --size tiny                  seconds a step, to try this script
    python benchmarks/train_step.py                              tiny and the 439 M slice, one CPU thread
    python benchmarks/train_step.py --json benchmarks/results/train_step.json
    python benchmarks/train_step.py --size 0.5b --device cuda --dtype bfloat16 --pairs 8 --plain-batch 4
    python benchmarks/train_step.py --size 7b --device cuda --dtype bfloat16 --pairs 4 --sides ours

Weights are random; both sides hold the same ones, and their losses and gradients are compared. A step is forward and
backward of `--pairs` pairs: no optimizer, which acts once for 64 to 256 pairs in the method's recipe, alike for both
sides. Both recompute activations in backward, as the recipe does (`--no-checkpointing`: neither does): transformer
layers of tower and language model, and the fusion (ours block by block, plain as one).

  stage 1   fusion and projector learn; `--captions` captions a pair
  stage 2   everything learns; the same captions
  stage 3   everything learns; one caption a pair (SFT)

  plain     the method as published (arXiv 2411.11360): one sample a caption, `--plain-batch` at once; all layers of
            the tower, one of which is deeper than any that is read; attention maps of the fusion made and kept
            (benchmarks/fusion.py); logits of every position, in float32
  ours      `ChangeVLMForConditionalGeneration`: one pass a pair with captions as branches, logits where labels are

Sides take turns. One CPU thread is timed by its processor time, which other work on the machine does not stretch;
anything else by the clock on the wall. Model FLOP leave out what is computed twice, and count attention whole;
MFU is their rate over the device's peak, or, on a CPU, over that of a matrix product in the same run. Memory of head
and loss: bytes of all tensors alive at once beyond inputs and weights, forward and backward, from each operation's
outputs; plain's for one sample, ours for a pair's captions.
"""

import argparse
import copy
import json
import os
import resource
import shlex
import statistics
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, as well as imported

from benchmarks import eval_generation
from benchmarks.eval_generation import machine, random_captioner
from benchmarks.fusion import Stopwatch, _attention_flop, plain_fusion, plain_position
from llava.model.branches import attention_mask, branch_positions
from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from llava.model.configuration import PRESETS, SIGLIP_SO400M
from llava.model.loss import summed_cross_entropy

eval_generation.SIZES.setdefault("7b", {"vision_config": SIGLIP_SO400M, **PRESETS["ccexpert-7b"]})
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bfloat16 FLOP/s by a word of the device's name."""
WORDS = 12  # of a caption with its end mark
Model = ChangeVLMForConditionalGeneration
Batch = dict[str, Tensor]


# --- the method as published --------------------------------------------------------------------------------


class Plain:
    """Straight from the specification, on another model's weights.

    Args:
        model: whose weights these are; what learns of them is its business.
        extra: layers of the tower deeper than the deepest one read.
    """

    def __init__(self, model: Model, checkpointing: bool, extra: int = 1) -> None:
        self.model, self.checkpointing = model, checkpointing
        ours = model.model.vision_tower
        config = copy.deepcopy(model.config.vision_config)
        config.num_hidden_layers, config.vision_use_head = max(ours.layers) + extra, False
        with torch.device(model.device):
            self.tower = AutoModel.from_config(config).to(model.dtype).train()
        self.tower.load_state_dict(ours.encoder.state_dict(keep_vars=True), strict=False, assign=True)
        if checkpointing:
            self.tower.gradient_checkpointing_enable()
        self.layers = ours.layers
        position = plain_position(model.config.grid, config.hidden_size)
        self.position = position.to(model.device, model.dtype)
        self.head_dim = model.config.fusion["head_dim"]

    def images(self, pixels: Tensor) -> Tensor:
        """[B, 2, C, S, S] to [B 2 N, H]."""
        model = self.model.model
        with torch.set_grad_enabled(next(model.vision_tower.parameters()).requires_grad):
            states = self.tower(pixels.flatten(0, 1), output_hidden_states=True).hidden_states
        levels = torch.stack([states[i] for i in self.layers], dim=1)  # [2 B, L, N, D]
        weights = dict(model.fusion.named_parameters())
        fuse = partial(plain_fusion, weights, position=self.position, head_dim=self.head_dim)
        if self.checkpointing:
            fuse = partial(checkpoint, fuse, use_reentrant=False)
        fused = fuse(levels[0::2], levels[1::2])
        return model.projector(torch.stack([fused.before, fused.after], dim=1)).flatten(0, 2)

    def loss(self, batch: Batch, items: int) -> Tensor:
        """Rows of one caption each to the sum over words divided by `items`."""
        model = self.model.model
        mask = batch["input_ids"] == self.model.config.image_token_id
        embeds = model.get_input_embeddings()(batch["input_ids"].masked_fill(mask, 0))
        embeds = embeds.masked_scatter(mask[..., None], self.images(batch["pixel_values"]))
        hidden = model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        return full_logits_loss(self.model.lm_head, hidden, batch["labels"]) / items


def full_logits_loss(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross entropy, from the logits of every position."""
    logits = head(hidden).float()  # [B, T, V]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


# --- what both are given ------------------------------------------------------------------------------------


def draw(model: Model, prompt: Sequence[int], pairs: int, captions: int) -> tuple[Batch, list[Batch]]:
    """Pairs of noise with captions of random words: ours in one batch, and plain's samples, one each."""
    generator = torch.Generator().manual_seed(0)
    side, device = model.config.vision_config.image_size, model.device
    rows: list[tuple[list[int], list[int], list[int]]] = []
    samples: list[Batch] = []
    pixels = torch.randn(pairs, 2, 3, side, side, generator=generator).to(device, model.dtype)

    def batch(ids: list[list[int]], labels: list[list[int]], images: Tensor) -> Batch:
        made = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
        return {name: value.to(device) for name, value in made.items()} | {"pixel_values": images}

    for i in range(pairs):
        ids, labels, segments = list(prompt[:-1]), [-100] * (len(prompt) - 1), [0] * (len(prompt) - 1)
        for k in range(1, captions + 1):
            answer = torch.randint(0, 250, (WORDS,), generator=generator).tolist()
            ids += [prompt[-1], *answer]
            labels += [-100, *answer]
            segments += [k] * (1 + WORDS)
            samples.append(batch([[*prompt, *answer]], [[-100] * len(prompt) + answer], pixels[i : i + 1]))
        rows.append((ids, labels, segments))
    together = batch([row[0] for row in rows], [row[1] for row in rows], pixels)
    together["segments"] = torch.tensor([row[2] for row in rows], device=device)
    return together | {"position_ids": branch_positions(together["segments"])}, samples


def joined(samples: Sequence[Batch], size: int) -> list[Batch]:
    """Samples of one length in batches of `size`."""
    return [
        {name: torch.cat([sample[name] for sample in samples[i : i + size]]) for name in samples[0]}
        for i in range(0, len(samples), size)
    ]


def set_stage(model: Model, stage: int) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage > 1 or name.startswith(("model.fusion.", "model.projector.")))


# --- measuring ----------------------------------------------------------------------------------------------


class PeakBytes(TorchDispatchMode):
    """Bytes of tensors made inside and alive at once, at their most."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._held: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if not isinstance(x, Tensor):
                continue
            storage = x.untyped_storage()
            if (key := storage._cdata) not in given and key not in self._held:
                self._held.add(key)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._free, key, storage.nbytes())
        self.peak = max(self.peak, self._now)
        return out

    def _free(self, key: int, size: int) -> None:
        self._held.discard(key)
        self._now -= size


def head_memory(model: Model, ours: Batch, plain: Batch) -> dict[str, Any]:
    """Peak bytes of head and loss, with the head frozen and learning."""
    head, width = model.lm_head, model.config.text_config.hidden_size
    gradient = head.weight.numel() * head.weight.element_size()
    found: dict[str, Any] = {"weight_gradient": gradient}
    for name, learns in (("frozen", False), ("learning", True)):
        head.weight.requires_grad_(learns)
        peaks = {}
        for side, batch in (("ours", ours), ("plain", plain)):
            shape = (*batch["input_ids"].shape, width)
            hidden = torch.randn(shape, device=model.device, dtype=model.dtype).requires_grad_()
            with PeakBytes() as bytes_:
                if side == "plain":
                    full_logits_loss(head, hidden, batch["labels"]).backward()
                else:
                    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100).flatten()
                    told = (targets != -100).nonzero()[:, 0]
                    rows = hidden.flatten(0, 1).index_select(0, told)
                    summed_cross_entropy(head, rows, targets[told]).backward()
            peaks[side] = bytes_.peak
            head.weight.grad = None
        beyond = {side: peak - learns * gradient for side, peak in peaks.items()}
        found[name] = peaks | {
            "share": peaks["ours"] / peaks["plain"],
            "share_beyond_weight_gradient": beyond["ours"] / beyond["plain"],
        }
    return found


def forward_flop(model: Model, batch: Batch) -> dict[str, int]:
    """FLOP of each part's forward pass."""
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop}
    with torch.no_grad(), FlopCounterMode(display=False, depth=3, custom_mapping=attention) as counter:
        model(**batch)
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = type(model).__name__
    parts = {"tower": "model.vision_tower", "fusion": "model.fusion", "projector": "model.projector"}
    parts |= {"llm": "model.language_model", "head": "lm_head"}
    return {part: counts[f"{root}.{name}"] for part, name in parts.items()}


def model_flop(forward: dict[str, int], stage: int) -> int:
    """FLOP of a step: backward costs twice the forward where weights learn, once where it only passes through."""
    through = {"tower": 1, "llm": 2, "head": 2} if stage == 1 else {}
    return sum(through.get(part, 3) * flop for part, flop in forward.items())


def mask_cost(model: Model, batch: Batch, seconds: Stopwatch, repeats: int) -> dict[str, float]:
    """Seconds of the language model, forward and backward, with the branches' mask and with the plain causal one."""
    language, width = model.model.language_model, model.config.text_config.hidden_size
    shape = (*batch["input_ids"].shape, width)
    x = torch.randn(shape, device=model.device, dtype=model.dtype).requires_grad_()
    mask = attention_mask(batch["segments"], language.config._attn_implementation, model.dtype)

    def step(given: Any) -> None:
        out = language(inputs_embeds=x, attention_mask=given, use_cache=False).last_hidden_state
        out.float().mean().backward()

    times: dict[str, list[float]] = {"branches": [], "causal": []}
    for number in range(repeats + 1):
        for name, given in (("branches", mask), ("causal", None)):
            took = seconds(partial(step, given))
            if number:
                times[name].append(took)
    model.zero_grad()
    found = {f"seconds_{name}": statistics.median(values) for name, values in times.items()}
    return found | {"positions": shape[1], "share": 1 - found["seconds_causal"] / found["seconds_branches"]}


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: Stopwatch) -> float:
    """FLOP/s of a square matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return statistics.median(2 * size**3 / seconds(partial(torch.mm, a, b)) for _ in range(5))


def kept_gradients(model: Model) -> dict[str, Tensor]:
    """Of fusion and projector, which learn in every stage."""
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if name.startswith(("model.fusion.", "model.projector.")) and parameter.grad is not None
    }


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm."""
    pairs = [(found[name].double(), value.double()) for name, value in wanted.items()]
    squares = sum(((a - b).square().sum() for a, b in pairs), torch.zeros((), dtype=torch.float64))
    return float((squares / sum(b.square().sum() for _, b in pairs)).sqrt())


def measure(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one size."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    captioner = random_captioner(size, args.device)
    model, prompt = captioner.model.to(dtype).train(), captioner.prompt_ids()
    if args.attention:
        model.model.language_model.set_attn_implementation(args.attention)
    seconds = Stopwatch(device, args.threads)
    found: dict[str, Any] = {
        "clock": "processor time" if seconds.processor_time else "wall clock",
        "parameters": sum(p.numel() for p in model.parameters()),
        "prompt_tokens": len(prompt),
        "caption_tokens": WORDS,
        "tower_layers": {"ours": max(model.model.vision_tower.layers)},
        "attention": model.model.language_model.config._attn_implementation,
        "checkpointing": args.checkpointing,
        "pairs": args.pairs,
    }
    several, samples = draw(model, prompt, args.pairs, args.captions)
    flop = {"several": forward_flop(model, several)}
    found["head_memory_bytes"] = head_memory(model, draw(model, prompt, 1, args.captions)[0], samples[0])
    set_stage(model, 2)
    found["mask"] = mask_cost(model, several, seconds, args.rounds)
    if args.checkpointing:
        model.gradient_checkpointing_enable()
    plain = None
    if "plain" in args.sides:
        plain = Plain(model, args.checkpointing)
        found["tower_layers"]["plain"] = plain.tower.config.num_hidden_layers
        found["plain_batch"] = args.plain_batch
    one, one_samples = draw(model, prompt, args.pairs, 1)
    flop["one"] = forward_flop(model, one)
    found["forward_gflop"] = {
        f"{args.captions if name == 'several' else 1} captions": {p: n / 1e9 for p, n in parts.items()}
        for name, parts in flop.items()
    }
    found["matmul_flop_per_second"] = matmul_rate(device, dtype, seconds)
    peak = next((p for word, p in PEAKS.items() if word in machine(args.device, 1)), None)
    if device.type == "cpu" or peak is None or dtype != torch.bfloat16:
        peak = found["matmul_flop_per_second"]
    found["peak_flop_per_second"] = peak
    for stage in args.stages:
        captions, batch, apart = (1, one, one_samples) if stage == 3 else (args.captions, several, samples)
        work = model_flop(flop["one" if stage == 3 else "several"], stage)
        batches = joined(apart, args.plain_batch)
        found[f"stage {stage}"] = {"captions": captions} | measure_stage(
            model, plain, stage, batch, batches, work / peak, seconds, args
        )
    found["process_peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return found | {"promises": promises(found, args.dtype)}


def measure_stage(
    model: Model,
    plain: Plain | None,
    stage: int,
    batch: Batch,
    batches: list[Batch],
    seconds_at_peak: float,
    seconds: Stopwatch,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Both sides in turns; the first round warms up and is compared."""
    set_stage(model, stage)
    items = int((batch["labels"] != -100).sum())
    losses: dict[str, float] = {}

    def ours() -> None:
        loss = model(**batch, num_items_in_batch=items).loss
        loss.backward()
        losses["ours"] = float(loss.detach())

    def theirs(plain: Plain) -> None:
        total = 0.0
        for part in batches:
            loss = plain.loss(part, items)
            loss.backward()
            total += float(loss.detach())
        losses["plain"] = total

    ways: dict[str, Callable[[], None]] = {"ours": ours}
    if plain is not None:
        ways["plain"] = partial(theirs, plain)
    times: dict[str, list[float]] = defaultdict(list)
    gradients: dict[str, dict[str, Tensor]] = {}
    memory: dict[str, float] = {}
    for number in range(args.rounds + 1):
        for name, call in ways.items():
            model.zero_grad()
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            took = seconds(call)
            if args.device == "cuda":
                memory[name] = torch.cuda.max_memory_allocated() / 2**30
            if number == 0:
                gradients[name] = kept_gradients(model)
            else:
                times[name].append(took)
            print(f"stage {stage} round {number}: {name}: {took:.2f} s", file=sys.stderr, flush=True)
        if number == 0 and plain is not None:
            compared = {"gradient_difference": difference(gradients["ours"], gradients["plain"])}
            compared["loss_difference"] = abs(losses["ours"] - losses["plain"]) / losses["plain"]
        gradients.clear()
    model.zero_grad()
    took = {name: statistics.median(values) for name, values in times.items()}
    captions = items // WORDS
    result: dict[str, Any] = {
        "seconds": took,
        "seconds_by_round": dict(times),
        "pairs_per_second": {name: args.pairs / value for name, value in took.items()},
        "captions_per_second": {name: captions / value for name, value in took.items()},
        "model_flop_utilisation": seconds_at_peak / took["ours"],
        "loss": dict(losses),
    }
    if memory:
        result["peak_gib"] = memory
    if plain is not None:
        rounds = zip(times["plain"], times["ours"], strict=True)
        result |= {"times_plain": statistics.median(a / b for a, b in rounds), **compared}
    return result


# --- telling ------------------------------------------------------------------------------------------------


def promises(found: dict[str, Any], dtype: str) -> list[dict[str, Any]]:
    """What is promised, and what was reached."""
    rows = [("memory of head and loss, of full logits beyond the weight's gradient",
             found["head_memory_bytes"]["learning"]["share_beyond_weight_gradient"], "<=", 0.05)]  # fmt: skip
    near = 1e-4 if dtype == "float32" else 3e-2
    for stage, times in ((1, 5.0), (2, 5.0), (3, 1.2)):
        told = found.get(f"stage {stage}", {})
        if "times_plain" in told:
            rows.append((f"stage {stage}, captions a second, of plain", told["times_plain"], ">=", times))
            rows.append((f"stage {stage}, difference of losses", told["loss_difference"], "<=", near))
            rows.append(
                (f"stage {stage}, difference of gradients", told["gradient_difference"], "<=", 10 * near)
            )
    return [
        {"what": what, "reached": reached, "sign": sign, "promised": bound,
         "kept": reached <= bound if sign == "<=" else reached >= bound}
        for what, reached, sign, bound in rows
    ]  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size",
        choices=("tiny", "slice", "0.5b", "7b"),
        nargs="+",
        default=["tiny", "slice"],
        help="(%(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16 (default: %(default)s)")
    parser.add_argument(
        "--stages", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3], help="default: all"
    )
    parser.add_argument("--sides", nargs="+", choices=("ours", "plain"), default=["ours", "plain"])
    parser.add_argument("--pairs", type=int, default=1, help="of a step (default: %(default)s)")
    parser.add_argument("--captions", type=int, default=5, help="of a pair (default: %(default)s)")
    parser.add_argument("--plain-batch", type=int, default=1, help="plain's samples at once (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="after one to warm up (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    parser.add_argument("--attention", help="of ours, e.g. flex_attention (default: the model's, sdpa)")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    sizes = {size: measure(size, args) for size in args.size}
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine(args.device, args.threads),
        "load": f"{load:.1f} to {os.getloadavg()[0]:.1f}",
        "command": shlex.join(["python", "benchmarks/train_step.py", *argv]),
        "dtype": args.dtype,
        "sizes": sizes,
    }
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        part = args.json.with_name(f"{args.json.name}.part")
        part.write_text(json.dumps(found, indent=1) + "\n")
        part.replace(args.json)
    return int(not all(row["kept"] for told in sizes.values() for row in told["promises"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

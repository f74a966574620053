"""What the difference-aware fusion costs at its real size, against the published computation, in one run.

    python benchmarks/fusion.py                                    one thread, float32: what is promised
    python benchmarks/fusion.py --json benchmarks/results/fusion.json
    python benchmarks/fusion.py --device cuda --dtype bfloat16

One pair, width 1152, 27 x 27 patches, 4 levels, 2 blocks (CCExpert, arXiv 2411.11360). `plain_fusion` is the
method straight from its equations, as the published code computes it: concatenations, each attention map made
and kept, the change projected again for each date. The tests compare with it too, in float64.

Counted: FLOP of a forward pass. Measured: time forward and forward + backward; the share of the rate that the
machine's matrix product reaches in the same round (timed just before and after); bytes held for backward
(storages that autograd saves, without inputs, parameters and buffers).

One CPU thread is timed by its processor time, which other work on the machine does not stretch; anything else
by the clock on the wall. On Linux the C library is told to keep freed memory, as CUDA's allocator does: left
alone it maps and zeroes each block over 32 MiB anew, some 5 % of a forward pass; see `--return-memory`.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from llava.model.fusion.difference import DifferenceFusion, FusedPair

DIM, GRID, LEVELS, DEPTH, HEAD_DIM, MLP_DIM = 1152, 27, 4, 2, 128, 4608

RELEASE_GFLOP, RELEASE_GIB = 760.5, 2.93
"""Forward FLOP of one pair and memory held for backward of the published code, float32."""


# --- the method as published --------------------------------------------------------------------------------


def plain_position(grid: int, dim: int) -> Tensor:
    """P [1, N, D] in float64, a loop over its definition."""
    half = dim // 2

    def axis(i: int) -> list[float]:
        place = (i - 0.5) / (grid + 1e-6) * 2 * math.pi
        angles = [place / 10000 ** (2 * (k // 2) / half) for k in range(half)]
        return [math.sin(angle) if k % 2 == 0 else math.cos(angle) for k, angle in enumerate(angles)]

    axes = [axis(i) for i in range(1, grid + 1)]
    return torch.tensor([[y + x for y in axes for x in axes]], dtype=torch.float64)


def plain_fusion(
    weights: Mapping[str, Tensor], before: Tensor, after: Tensor, position: Tensor, head_dim: int = HEAD_DIM
) -> FusedPair:
    """before, after [B, L, N, D] to a `FusedPair`, with the weights of a `DifferenceFusion` by name."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def attention(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (
            linear(f"{name}.{part}_proj", x).unflatten(-1, (-1, head_dim)).transpose(1, 2)
            for part, x in (("q", q), ("k", k), ("v", v))
        )
        attn = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(head_dim), dim=-1)  # [M, h, N, K]
        return linear(f"{name}.out_proj", (attn @ v).transpose(1, 2).flatten(2))

    def difference(a: Tensor, b: Tensor) -> Tensor:
        a, b = (
            a * torch.sigmoid(linear("difference.gate", torch.cat([a, b], dim=-1))),
            b * torch.sigmoid(linear("difference.gate", torch.cat([b, a], dim=-1))),
        )
        return linear("difference.proj", torch.cat([a, b, a - b], dim=-1))

    pairs, levels = before.shape[:2]
    a, b = before.flatten(0, 1), after.flatten(0, 1)  # [B L, N, D]
    change: Tensor | None = None
    for i in range(len({name.split(".")[1] for name in weights if name.startswith("blocks.")})):
        block = f"blocks.{i}"
        flag_a, flag_b, flag_c = (weights[f"{block}.flag_{date}"] for date in ("before", "after", "change"))
        hint = difference(a, b)
        q = hint if change is None else change + hint
        q = norm(f"{block}.norm1", q + attention(f"{block}.attend_change", q + position, q + position, q))
        q_a, q_b, q_c = a + position + flag_a, b + position + flag_b, q + position + flag_c
        keys, values = torch.cat([q_a, q_b, q_c], dim=1), torch.cat([a, b, q], dim=1)
        q = norm(f"{block}.norm2", q + attention(f"{block}.attend_all", q_c, keys, values))
        q = norm(f"{block}.norm3", q + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", q))))
        q_c, back = q + position + flag_c, f"{block}.attend_back"
        a = q_a + attention(back, q_a, torch.cat([q_a, q_c], dim=1), torch.cat([a, q], dim=1))
        b = q_b + attention(back, q_b, torch.cat([q_b, q_c], dim=1), torch.cat([b, q], dim=1))
        change = q
    assert change is not None
    means = torch.cat([a, b, change], dim=-1).mean(dim=1)  # [B L, 3D]
    gates = torch.sigmoid(linear("level_gate.fc2", F.gelu(linear("level_gate.fc1", means))))
    gates = gates.view(pairs, levels, 1, 1)

    def over_levels(x: Tensor) -> Tensor:
        return (gates * x.unflatten(0, (pairs, levels))).sum(dim=1) / (gates.sum(dim=1) + 1e-6)

    return FusedPair(before[:, -1] + over_levels(a), after[:, -1] + over_levels(b), over_levels(change))


# --- measuring ----------------------------------------------------------------------------------------------


def _attention_flop(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return 4 * math.prod(q) * k[-2]  # Q K^T and the mix of V: 2 N K d a head each


def count_flop(call: Callable[[], object]) -> int:
    """FLOP of matrix products and attention in `call`; torch's own counter leaves out attention on a CPU."""
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        call()
    return counter.get_total_flops()


def saved_for_backward(call: Callable[[], object], known: Iterable[Tensor]) -> list[Tensor]:
    """What autograd keeps of `call` until backward: one tensor a storage, those of `known` left out."""
    skip = {x.untyped_storage().data_ptr() for x in known}
    saved: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in skip:
            saved.setdefault(x.untyped_storage().data_ptr(), x)  # kept alive, so that no address comes twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return list(saved.values())


def held_bytes(call: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Bytes of `saved_for_backward`."""
    return sum(x.untyped_storage().nbytes() for x in saved_for_backward(call, known))


def set_checkpointing(fusion: DifferenceFusion, on: bool) -> None:
    """What a model's `gradient_checkpointing_enable()` does to its blocks."""
    for block in fusion.blocks:
        block.gradient_checkpointing = on
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def keep_memory() -> None:
    """Have glibc keep what is freed, as MALLOC_MMAP_MAX_=0 and a large MALLOC_TRIM_THRESHOLD_ would."""
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_max = -1, -4  # of <malloc.h>
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, -1)  # never


class Stopwatch:
    """Seconds of a call: processor time of one CPU thread, else wall clock."""

    def __init__(self, device: torch.device, threads: int) -> None:
        self.cuda = device.type == "cuda"
        self.processor_time = device.type == "cpu" and threads == 1
        self.now = time.thread_time if self.processor_time else time.perf_counter

    def __call__(self, call: Callable[[], object]) -> float:
        self._wait()
        start = self.now()
        call()
        self._wait()
        return self.now() - start

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def build(device: torch.device, dtype: torch.dtype) -> tuple[DifferenceFusion, Tensor, Tensor]:
    """A fusion of the real size with random weights, and one pair [1, L, N, D] x 2."""
    torch.manual_seed(0)
    fusion = DifferenceFusion(DIM, GRID, DEPTH, HEAD_DIM, MLP_DIM)
    for weight in fusion.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    shape = (1, LEVELS, GRID**2, DIM)
    before, after = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    return fusion.to(device, dtype), before, after


def measure(device: torch.device, dtype: torch.dtype, threads: int, repeats: int) -> dict[str, Any]:
    """All figures of one run, medians over `repeats` rounds (training steps: a fifth of them)."""
    fusion, before, after = build(device, dtype)
    weights, position = dict(fusion.named_parameters()), fusion.get_buffer("position")
    leaves = [before, after, *weights.values()]
    ours: Callable[[], FusedPair] = partial(fusion, before, after)
    plain: Callable[[], FusedPair] = partial(plain_fusion, weights, before, after, position)

    flop = {name: count_flop(call) for name, call in (("ours", ours), ("plain", plain))}
    held = {name: held_bytes(call, [*leaves, position]) for name, call in (("ours", ours), ("plain", plain))}
    set_checkpointing(fusion, True)
    held["checkpointed"] = held_bytes(ours, [*leaves, position])

    rows = LEVELS * GRID**2
    shapes = {"square": (2048, 2048, 2048), "projection": (rows, DIM, DIM), "mlp": (rows, DIM, MLP_DIM)}
    factors = {
        name: [torch.randn(size, device=device, dtype=dtype) for size in ((m, k), (k, n))]
        for name, (m, k, n) in shapes.items()
    }
    seconds = Stopwatch(device, threads)

    def forward(call: Callable[[], FusedPair]) -> None:
        with torch.no_grad():
            call()

    def step(call: Callable[[], FusedPair], checkpointing: bool) -> None:
        set_checkpointing(fusion, checkpointing)
        fused = call()
        torch.autograd.grad((fused.before + fused.after + fused.change).square().mean(), leaves)

    def rate(name: str) -> float:
        return 2 * math.prod(shapes[name]) / seconds(partial(torch.mm, *factors[name]))

    def products() -> list[dict[str, float]]:
        return [{name: rate(name) for name in shapes} for _ in range(3)]

    for call in (ours, plain):  # warm up
        forward(call)
    products()
    times: dict[str, list[float]] = defaultdict(list)
    rates: dict[str, list[float]] = defaultdict(list)
    shares: list[float] = []
    for _ in range(repeats):
        seen = products()
        times["ours forward"].append(seconds(partial(forward, ours)))
        seen += products()
        times["plain forward"].append(seconds(partial(forward, plain)))
        for name in shapes:
            rates[name].append(statistics.median(product[name] for product in seen))
        shares.append(flop["ours"] / times["ours forward"][-1] / rates["square"][-1])
    for _ in range(max(1, repeats // 5)):  # long, and nothing is promised of them
        times["ours step"].append(seconds(partial(step, ours, False)))
        times["plain step"].append(seconds(partial(step, plain, False)))
        times["checkpointed step"].append(seconds(partial(step, ours, True)))
    return {
        "clock": "processor time" if seconds.processor_time else "wall clock",
        "gflop_forward": {name: value / 1e9 for name, value in flop.items()},
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "matmul_gflop_per_second": {name: statistics.median(values) / 1e9 for name, values in rates.items()},
        "share_of_matmul": statistics.median(shares),
        "share_of_matmul_by_round": shares,
        "held_gib": {name: value / 2**30 for name, value in held.items()},
    }


# --- telling ------------------------------------------------------------------------------------------------


def promises(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each promise of a float32 run, as a share."""
    flop = found["gflop_forward"]["ours"] / RELEASE_GFLOP
    held = {name: value / RELEASE_GIB for name, value in found["held_gib"].items()}
    rows = (
        ("FLOP forward, of the release's 760.5 GFLOP", flop, "<=", 0.97),
        ("rate forward, of the machine's matrix product", found["share_of_matmul"], ">=", 0.85),
        ("held for backward, of the release's 2.93 GiB", held["ours"], "<=", 0.60),
        ("the same with checkpointed blocks", held["checkpointed"], "<=", 0.15),
    )
    return [
        {"what": what, "reached": reached, "sign": sign, "promised": bound,
         "kept": reached <= bound if sign == "<=" else reached >= bound}
        for what, reached, sign, bound in rows
    ]  # fmt: skip


def report(found: dict[str, Any]) -> str:
    """The figures as a table."""
    gflop, took, held = found["gflop_forward"], found["seconds"], found["held_gib"]
    rates = ", ".join(f"{name} {value:.1f}" for name, value in found["matmul_gflop_per_second"].items())
    table = (
        ("", "ours", "plain", "checkpointed"),
        ("GFLOP forward", f"{gflop['ours']:.1f}", f"{gflop['plain']:.1f}", ""),
        ("seconds forward", f"{took['ours forward']:.4f}", f"{took['plain forward']:.4f}", ""),
        ("seconds with backward", *(f"{took[f'{n} step']:.4f}" for n in ("ours", "plain", "checkpointed"))),
        ("GiB held for backward", *(f"{held[n]:.3f}" for n in ("ours", "plain", "checkpointed"))),
    )
    lines = [
        f"{found['date']}, {found['machine']}, load {found['load']}, {found['clock']}",
        f"$ {found['command']}",
        *(f"{row[0]:24s}" + "".join(f"{cell:>14s}" for cell in row[1:]) for row in table),
        f"GFLOP/s: ours {gflop['ours'] / took['ours forward']:.1f}; matrix product {rates}",
    ]
    for row in found.get("promises", ()):
        promise = f"{row['sign']} {row['promised']:.0%}  {'kept' if row['kept'] else 'MISSED'}"
        lines.append(f"{row['what']:48s}{row['reached']:7.1%}   {promise}")
    if "promises" not in found:
        lines.append(f"share of the matrix product's rate: {found['share_of_matmul']:.1%}")
    return "\n".join(lines)


def machine(device: torch.device, threads: int) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    cpu = f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})"
    return f"{cpu}, {threads} of {os.cpu_count()} cores, torch {torch.__version__}"


def main(argv: Sequence[str]) -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="rounds (default: %(default)s)")
    parser.add_argument(
        "--return-memory", action="store_true", help="leave the C library's allocator as it is"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args(argv)
    if not args.return_memory and sys.platform == "linux":
        keep_memory()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    load = os.getloadavg()[0]
    found = measure(device, dtype, args.threads, args.repeats)
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine(device, args.threads),
        "load": f"{load:.1f} to {os.getloadavg()[0]:.1f}",
        "command": shlex.join(["python", "benchmarks/fusion.py", *argv]),
        **found,
    }
    if dtype == torch.float32:
        found["promises"] = promises(found)
    print(report(found))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        part = args.json.with_name(args.json.name + ".part")
        part.write_text(json.dumps(found, indent=2) + "\n")
        part.replace(args.json)
    return int(not all(row["kept"] for row in found.get("promises", ())))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

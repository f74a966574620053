"""Estimated memory against what real models and optimizers hold, and the real sizes against their weights."""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava.errors import ConfigError
from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from llava.model.configuration import ChangeVLMConfig
from llava.model.fusion import FUSIONS
from llava.train.adapters import AdapterConfig, add_adapter
from llava.train.flops import on_meta
from llava.train.memory import GIB, MemoryEstimate, estimate, part_counts, read_sharding
from llava.train.parts import set_learning
from tests.tiny import tiny_config

EVERYTHING = ("tower", "fusion", "projector", "llm")
FLOAT, HALF = torch.float32, torch.bfloat16
PAIRS, PREFIX, BRANCHES, LABELS = 2, 150, (8, 6, 10), 4
POSITIONS = PREFIX + sum(BRANCHES)


def middle_config(**overrides: Any) -> ChangeVLMConfig:
    """The real models' proportions at an eighth of their widths; 64 tokens an image."""
    fields: dict[str, Any] = {
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 144,
            "intermediate_size": 538,
            "num_hidden_layers": 5,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 7,
            "vision_use_head": False,
        },
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 224,
            "intermediate_size": 1216,
            "num_hidden_layers": 4,
            "num_attention_heads": 7,
            "num_key_value_heads": 1,
            "vocab_size": 2000,
            "tie_word_embeddings": True,
        },
        "vision_layers": [1, 2, 3, 4],
        "fusion": {"kind": "difference", "depth": 2, "head_dim": 36, "mlp_dim": 576},
        "image_token_id": 1999,
    }
    return ChangeVLMConfig(**(fields | overrides))


def batch_of(config: ChangeVLMConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """`PAIRS` rows of `POSITIONS` with two images and three branches each, `LABELS` labels a row."""
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor((PREFIX, *BRANCHES))).expand(PAIRS, -1)
    ids = torch.full((PAIRS, POSITIONS), 5)
    ids[:, 3 : 3 + 2 * config.image_seq_length] = config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[:, -LABELS:] = 5
    size = config.vision_config.image_size
    pixels = torch.randn(PAIRS, 2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    return {"input_ids": ids, "labels": labels, "segments": segments, "pixel_values": pixels}


def model_of(
    config: ChangeVLMConfig, learn: Iterable[str], dtype: torch.dtype, checkpointing: bool
) -> ChangeVLMForConditionalGeneration:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ChangeVLMForConditionalGeneration(config).to(dtype=dtype).train()  # type: ignore[call-arg]
    set_learning(model, learn)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def held_for_backward(loss: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward: every storage once, those of `known` left out."""
    skip = {x.untyped_storage().data_ptr() for x in known}
    seen: list[weakref.ref[Tensor]] = []

    def pack(x: Tensor) -> Tensor:
        seen.append(weakref.ref(x))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        root = loss()
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage() for ref in seen if (x := ref()) is not None
    }
    del root
    return sum(storage.nbytes() for place, storage in storages.items() if place not in skip)


def estimated(config: ChangeVLMConfig, learn: Iterable[str], **options: Any) -> MemoryEstimate:
    return estimate(config, learn=learn, pairs=PAIRS, positions=POSITIONS, rows=LABELS, **options)


# --- what stays -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "total", "fusion"),
    [("ccexpert-0.5b", 957_380_513, 63.8e6), ("ccexpert-7b", 8_094_108_449, 63.8e6)],
)
def test_real_models_states_are_their_parameters(preset: str, total: int, fusion: float) -> None:
    config = ChangeVLMConfig.preset(preset)
    model = on_meta(config)
    learn = ("fusion", "projector")
    set_learning(model, learn)
    counts = part_counts(model)
    assert sum(count for count, _ in counts.values()) == total == sum(p.numel() for p in model.parameters())
    assert counts["fusion"][0] == pytest.approx(fusion, rel=0.001)
    assert {part for part, (_, trained) in counts.items() if trained} == set(learn)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    zero = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True}}
    found = estimate(
        config, learn=learn, pairs=4, positions=1520, rows=16, processes=8, dtype=HALF, deepspeed=zero
    ).device
    hidden = config.text_config.hidden_size
    assert found == {
        "weights": 2 * total,
        "gradients": 2 * trained / 8,
        "optimizer": 12 * trained / 8,
        "buckets": 2 * 2 * hidden**2,
    }


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
def test_plain_training_holds_what_is_said(dtype: torch.dtype) -> None:
    config, learn = tiny_config(), ("projector", "llm")
    model = model_of(config, learn, dtype, False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(**small_batch(config, dtype)).loss.backward()
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    found = estimated(config, learn, dtype=dtype)
    assert found.device == {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in trained if p.grad is not None),
        "optimizer": sum(x.nbytes for x in moments),
        "buckets": 0,
    }
    assert estimated(config, learn, dtype=dtype, processes=2).device["buckets"] == found.device["gradients"]
    average = sum(4 * p.numel() for p in trained)
    assert estimated(config, learn, dtype=dtype, ema=True).device["moving average"] == average


def small_batch(config: ChangeVLMConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x[:1] for name, x in batch_of(config, dtype).items()}


def test_known_numbers_of_parameters_stand_above_the_config() -> None:
    found = estimated(tiny_config(), EVERYTHING, parameters={"llm": (1000, 10), "tower": (500, 0)})
    assert (found.device["weights"], found.device["gradients"]) == (6000, 40)


ZERO = {"overlap_comm": False, "reduce_bucket_size": 4096, "stage3_max_live_parameters": 5000}


@pytest.mark.parametrize(
    ("zero", "device", "host"),
    [
        ({"stage": 1}, {"weights": 2, "gradients": 2 + 4, "optimizer": 3}, {}),  # whole gradients
        ({"stage": 2}, {"weights": 2, "gradients": 1, "optimizer": 3}, {}),
        ({"stage": 3}, {"weights": 0.5, "gradients": 1, "optimizer": 3}, {}),
        (
            {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            {"weights": 2, "gradients": 1},
            {"optimizer": 3, "gradients": 1},
        ),
        (
            {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
            {},
            {"optimizer": 3, "gradients": 2, "weights": 0.5},
        ),
    ],
    ids=["1", "2", "3", "2-offload", "3-offload"],
)
def test_zero_shares_out(zero: dict[str, Any], device: dict[str, float], host: dict[str, float]) -> None:
    """In bytes a weight, of which all learn, on four processes, with gradients added up in float32."""
    config = tiny_config()
    total = sum(p.numel() for p in on_meta(config).parameters())
    fields = {"zero_optimization": ZERO | zero, "data_types": {"grad_accum_dtype": "fp32"}}
    found = estimated(config, EVERYTHING, dtype=HALF, processes=4, deepspeed=fields)
    assert {name: found.device[name] / total for name in device} == device
    assert {name: found.host[name] / total for name in host} == host
    assert "optimizer" in {**found.device, **host}
    assert ("optimizer" in found.device) == ("optimizer" in device)
    assert found.device.get("gathered weights", 0) == (2 * 5000 if zero["stage"] == 3 else 0)
    assert "on the host" in found.table() if host else "on the host" not in found.table()


def test_what_a_deepspeed_file_leaves_open(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}')
    sharding = read_sharding(path, 100, HALF)
    assert (sharding.bucket, sharding.live, sharding.gradient_bytes) == (10_000, 10**9, 2)
    assert not sharding.offload_optimizer
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"zero\.json cannot be read as JSON"):
        read_sharding(path, 100, HALF)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        read_sharding(path, 100, HALF)


@pytest.mark.parametrize("path", sorted(Path("scripts/deepspeed").glob("*.json")), ids=lambda path: path.name)
def test_shipped_deepspeed_files(path: Path) -> None:
    sharding = read_sharding(path, 896, HALF)
    assert sharding.stage == (3 if "zero3" in path.name else 2)
    assert sharding.offload_optimizer == ("offload" in path.name)
    assert sharding.bucket == 896**2


RANK = """
import json, sys, torch, torch.distributed as dist, deepspeed
from torch import nn

deepspeed.init_distributed("gloo")
model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(6)])
model[0].requires_grad_(False)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
engine, zero, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=json.loads(sys.argv[1]))
engine.backward(engine(torch.randn(1, 256, dtype=torch.bfloat16)).float().sum())
engine.step()
pairs = list(zero.optimizer.state.items())
held = [x for master, state in pairs for x in (master, *state.values()) if x.dim()]
gradients = getattr(zero, "grad_partitions_flat_buffer", None)
if dist.get_rank() == 0:
    print("RESULT", sum(x.nbytes for x in held), 0 if gradients is None else gradients.nbytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_own_optimizer_holds_what_is_said(stage: int, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    zero = {"stage": stage, "overlap_comm": False, "reduce_bucket_size": 65536}
    fields = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(script), json.dumps(fields)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # launchers and loggers write on the same stream, before it or behind
    line = next(line for line in done.stdout.splitlines() if "RESULT" in line)
    optimizer, gradients = (int(word) for word in line.split("RESULT")[1].split()[:2])
    trained = 5 * (256 * 256 + 256)
    parameters = {"llm": (trained + 256 * 257, trained)}
    found = estimated(
        tiny_config(), EVERYTHING, dtype=HALF, processes=2, deepspeed=fields, parameters=parameters
    ).device
    assert optimizer == pytest.approx(found["optimizer"], rel=0.01)
    if stage == 3:
        assert gradients == pytest.approx(found["gradients"], rel=0.01)


# --- activations ------------------------------------------------------------------------------------

PRECISIONS = {"float32": (FLOAT, False), "bfloat16": (HALF, False), "autocast": (FLOAT, True)}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["held", "checkpointed"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("make", "learn"),
    [
        (middle_config, EVERYTHING),
        (middle_config, ("fusion", "projector")),
        (tiny_config, ("projector", "llm")),
    ],
    ids=["middle-all", "middle-fusion", "tiny-llm"],
)
def test_activations(
    make: Callable[[], ChangeVLMConfig], learn: tuple[str, ...], precision: str, checkpointing: bool
) -> None:
    dtype, autocast = PRECISIONS[precision]
    check_activations(make(), learn, dtype, autocast, checkpointing)


def check_activations(
    config: ChangeVLMConfig,
    learn: Iterable[str],
    dtype: torch.dtype = FLOAT,
    autocast: bool = False,
    checkpointing: bool = False,
    adapter: AdapterConfig | None = None,
    attention: str = "sdpa",
    within: float = 0.15,
) -> None:
    model: nn.Module = model_of(config, learn, dtype, checkpointing)
    if attention != "sdpa":
        model.set_attn_implementation(attention)  # type: ignore[operator]
    if adapter is not None:
        model = add_adapter(model, adapter, seed=0, base="base").train()  # type: ignore[arg-type]
    batch = batch_of(config, dtype)
    with torch.autocast("cpu", dtype=HALF, enabled=autocast):
        found = held_for_backward(
            lambda: model(**batch).loss, [*model.parameters(), *model.buffers(), *batch.values()]
        )
    expected = estimated(
        config,
        learn,
        dtype=dtype,
        autocast=autocast,
        checkpointing=checkpointing,
        adapter=adapter,
        attention=attention,
    ).activations
    if checkpointing:
        # what autocast made for the forward pass is gone behind it; the mask is kept, but by no node
        expected.pop("half weights", None)
        assert expected.pop("attention mask") > 0
    assert sum(expected.values()) == pytest.approx(found, rel=within)


@pytest.mark.parametrize("vision", ["siglip2", "clip", "dinov3", "eva"])
def test_activations_of_other_towers(vision: str) -> None:
    check_activations(tiny_config(vision=vision), ("tower",))


@pytest.mark.parametrize("text", ["llama", "qwen3"])
def test_activations_of_other_language_models(text: str) -> None:
    check_activations(tiny_config(text=text), ("projector", "llm"))


@pytest.mark.parametrize("kind", sorted({*FUSIONS, "none"} - {"difference"}))
def test_activations_of_other_fusions(kind: str) -> None:
    config = middle_config(fusion=None if kind == "none" else {"kind": kind})
    check_activations(config, ("fusion", "projector"))


def test_activations_in_eager_attention() -> None:
    check_activations(middle_config(), ("projector", "llm"), attention="eager")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_activations_beside_low_rank_updates(kind: Any) -> None:
    pytest.importorskip("peft")
    adapter = AdapterConfig(kind=kind, rank=8, dropout=0.0, parts=("llm", "tower"))
    check_activations(middle_config(), (), adapter=adapter)


def test_weights_in_four_bits_and_their_updates() -> None:
    pytest.importorskip("peft")
    config, adapter = middle_config(), AdapterConfig(kind="qlora", rank=8)
    whole, four = (estimated(config, (), adapter=a) for a in (AdapterConfig(kind="lora", rank=8), adapter))
    text = config.text_config
    layer = 2 * 224 * 224 + 2 * 224 * 32 + 3 * 224 * text.intermediate_size
    assert whole.device["weights"] - four.device["weights"] == 4 * layer * (4 - 0.5625)
    assert whole.device["gradients"] == four.device["gradients"]
    # the fusion and the projector learn as copies, beside what they were
    plain = part_counts(on_meta(config))
    sides = 4 * 224 + 2 * (224 + 32) + 3 * (224 + text.intermediate_size)
    trained = plain["fusion"][0] + plain["projector"][0] + 8 * 4 * sides
    assert whole.device["gradients"] == 4 * trained
    assert whole.device["weights"] == 4 * (sum(count for count, _ in plain.values()) + trained)


def test_what_is_frozen_in_front_keeps_nothing() -> None:
    found = estimated(tiny_config(), ("llm",))
    assert set(found.activations) == {"attention mask", "llm", "head"}
    assert found.device["gradients"] < found.device["weights"]


def test_nothing_learns_nothing_is_kept() -> None:
    found = estimated(tiny_config(), ())
    assert not found.activations
    assert found.total == found.device["weights"]


# --- all of it --------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the most there were."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
        for x in there:
            self.note(x)

    def note(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage not in self.seen:
            self.seen[storage] = None
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.forget, storage.nbytes())

    def forget(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.note(x)
        return out


@pytest.mark.parametrize("checkpointing", [False, True], ids=["held", "checkpointed"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_most_that_a_step_holds(precision: str, checkpointing: bool) -> None:
    """All tensors of a step after the first: within 10 %, and what moves within 15."""
    dtype, autocast = PRECISIONS[precision]
    config, learn = middle_config(), EVERYTHING
    model, batch = model_of(config, learn, dtype, checkpointing), batch_of(config, dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)

    def step() -> None:
        with torch.autocast("cpu", dtype=HALF, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()

    step()
    optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values()]
    live = Live([*model.parameters(), *(p.grad for p in trained if p.grad is not None), *states])
    fixed = live.now
    with live:
        step()
    found = estimated(config, learn, dtype=dtype, autocast=autocast, checkpointing=checkpointing)
    assert sum(found.device.values()) == pytest.approx(fixed, rel=1e-3)
    assert found.total == pytest.approx(live.most, rel=0.10)
    assert max(found.moments.values()) == pytest.approx(live.most - fixed, rel=0.15)


def test_checkpointing_and_sharding_are_cheaper_at_real_size() -> None:
    config = ChangeVLMConfig.preset("ccexpert-7b")
    options: dict[str, Any] = {"pairs": 2, "positions": 1575, "rows": 80, "dtype": HALF, "processes": 8}
    zero2, zero3 = ({"zero_optimization": {"stage": stage, "reduce_bucket_size": "auto"}} for stage in (2, 3))
    plain = estimate(config, learn=EVERYTHING, deepspeed=zero2, **options)
    small = estimate(config, learn=EVERYTHING, deepspeed=zero2, checkpointing=True, **options)
    shared = estimate(config, learn=EVERYTHING, deepspeed=zero3, checkpointing=True, **options)
    assert sum(small.activations.values()) < 0.1 * sum(plain.activations.values())
    assert shared.total < small.total < plain.total
    assert 30 * GIB < small.total < 45 * GIB


def test_the_table_says_what_there_is() -> None:
    zero = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}
    config = ChangeVLMConfig.preset("ccexpert-0.5b")
    found = estimate(
        config,
        learn=EVERYTHING,
        pairs=2,
        positions=1575,
        rows=80,
        dtype=HALF,
        deepspeed=zero,
        checkpointing=True,
    )
    lines = found.table().splitlines()
    assert lines[1].split() == ["weights", "1.78", "957,380,513", "in", "bfloat16"]
    assert any(line.startswith("gradients") and line.endswith("957,380,513 learn") for line in lines)
    together = next(line for line in lines if line.startswith("together"))
    assert float(together.split()[1]) == pytest.approx(found.total / GIB, abs=0.01)
    assert {"tower", "fusion", "projector", "llm"} <= {line.split()[0] for line in lines}

"""Counted work against torch's own counter on real tiny models, and against the published figures by formula."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava.errors import ConfigError
from llava.model.branches import branch_mask
from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from llava.model.configuration import ChangeVLMConfig
from llava.model.fusion import FUSIONS
from llava.train.adapters import AdapterConfig, add_adapter
from llava.train.flops import FUSION_WORK, StepFlops, attended, peak_flops
from llava.train.parts import set_learning
from tests.tiny import tiny_config

PAIRS, PREFIX, BRANCHES, ROWS = 3, 48, (6, 5, 7), 12
"""A row: 2 x 16 image tokens and text before them, then three answers; 4 labels a pair."""
EVERYTHING = ("tower", "fusion", "projector", "llm")


def _attention(q: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    return 4 * math.prod(q) * k[-2]


def _attention_backward(grad: Any, q: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    return 10 * math.prod(q) * k[-2]  # Q K^T once more, then four products


def counted(call: Callable[[], object]) -> int:
    """FLOPs by torch's counter, which leaves out attention on a CPU."""
    mapping = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return counter.get_total_flops()


def batch_of(config: ChangeVLMConfig) -> dict[str, torch.Tensor]:
    """`PAIRS` rows with two images and three branches each, `ROWS` labels in all."""
    length = PREFIX + sum(BRANCHES)
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor((PREFIX, *BRANCHES))).expand(PAIRS, -1)
    ids = torch.full((PAIRS, length), 5)
    ids[:, 3 : 3 + 2 * config.image_seq_length] = config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[:, -ROWS // PAIRS :] = 5
    vision = config.vision_config
    pixels = torch.randn(PAIRS, 2, 3, vision.image_size, vision.image_size)
    return {"input_ids": ids, "labels": labels, "segments": segments, "pixel_values": pixels}


SIZES = {"images": 2 * PAIRS, "positions": PREFIX + sum(BRANCHES), "rows": ROWS, "batch": PAIRS}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def step_of(model: Any, batch: dict[str, torch.Tensor], backward: bool = True) -> Callable[[], object]:
    def step() -> None:
        loss = model(**batch).loss
        if backward:
            loss.backward()

    return step


def test_the_fusion_at_its_real_size_is_within_the_promise() -> None:
    config = ChangeVLMConfig.preset("ccexpert-0.5b")
    work = StepFlops(config).forward(images=2, positions=1)["fusion"]
    published = 2 * 729 * 4 * 2 * (39 * 1152**2 + 16 * 729 * 1152)
    assert published == pytest.approx(760.5e9, rel=2e-4)
    assert 0.9 * published < work <= 0.97 * published


def test_real_models_cost_what_their_sizes_say() -> None:
    flops = StepFlops(ChangeVLMConfig.preset("ccexpert-7b"))
    found = flops.forward(images=2, positions=1575, rows=12)
    tower = 26 * (4 * 1152**2 + 2 * 1152 * 4304) + 14 * 14 * 3 * 1152
    assert found["tower"] == 2 * 2 * 729 * (tower + 26 * 2 * 729 * 1152)
    assert found["projector"] == 2 * 2 * 729 * (1152 * 3584 + 3584**2)
    layer = 3584 * (2 * 3584 + 2 * 512) + 3 * 3584 * 18944
    assert found["llm"] == 28 * (2 * 1575 * layer + 4 * 3584 * 1575 * 1576 / 2)
    assert found["head"] == 2 * 12 * 3584 * 152064


@pytest.mark.parametrize(
    ("vision", "text"),
    [(vision, "qwen2") for vision in ("siglip", "siglip2", "clip", "dinov3", "eva")]
    + [("siglip", text) for text in ("qwen3", "llama")],
)
def test_forward_of_any_backbone(vision: str, text: str) -> None:
    config = tiny_config(vision=vision, text=text)
    model = ChangeVLMForConditionalGeneration(config).train()
    with torch.no_grad():
        found = counted(step_of(model, batch_of(config), backward=False))
    expected = StepFlops(config).hardware(**SIZES)
    assert sum(expected.values()) == found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["held", "checkpointed"])
@pytest.mark.parametrize(
    "learn",
    [
        EVERYTHING,
        ("fusion", "projector"),
        ("projector",),
        ("llm",),
        ("tower",),
        ("fusion", "llm"),
        ("tower", "projector", "llm"),
    ],
    ids="+".join,
)
def test_step_of_what_learns(learn: tuple[str, ...], checkpointing: bool) -> None:
    config = tiny_config(vision_layers=[1, 2, 4])
    model = ChangeVLMForConditionalGeneration(config).train()
    set_learning(model, learn)
    if checkpointing:
        model.gradient_checkpointing_enable()
    found = counted(step_of(model, batch_of(config)))
    expected = StepFlops(config, learn, checkpointing=checkpointing).hardware(**SIZES)
    assert sum(expected.values()) == found


def test_step_without_fusion_in_eager() -> None:
    config = tiny_config(fusion=False, attn_implementation="eager", projector="linear")
    model = ChangeVLMForConditionalGeneration(config).train()
    set_learning(model, ("projector", "llm"))
    found = counted(step_of(model, batch_of(config)))
    flops = StepFlops(config, ("projector", "llm"), attention="eager").hardware(**SIZES)
    assert "fusion" not in flops
    assert sum(flops.values()) == found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["held", "checkpointed"])
def test_step_of_low_rank_updates(checkpointing: bool) -> None:
    pytest.importorskip("peft")
    config = tiny_config()
    adapter = AdapterConfig(kind="lora", rank=4, dropout=0.0, parts=("llm", "tower"))
    model: Any = add_adapter(ChangeVLMForConditionalGeneration(config).train(), adapter, seed=0, base="base")
    if checkpointing:
        model.gradient_checkpointing_enable()
    found = counted(step_of(model.train(), batch_of(config)))
    expected = StepFlops(config, EVERYTHING, checkpointing=checkpointing, adapter=adapter).hardware(**SIZES)
    assert sum(expected.values()) == pytest.approx(found, rel=0.01)


def test_model_flops_leave_out_what_is_done_again() -> None:
    config = tiny_config()
    pairs = PAIRS * attended(PREFIX, BRANCHES)
    plain, again = (StepFlops(config, EVERYTHING, checkpointing=flag) for flag in (False, True))
    assert plain.of(**SIZES, attended=pairs) == again.of(**SIZES, attended=pairs)
    model, done, more = (
        sum(f.values()) for f in (plain.of(**SIZES), plain.hardware(**SIZES), again.hardware(**SIZES))
    )
    assert model < done < more
    # all parts learn: three times forward, less the gradient of the pixels
    forward = plain.forward(**SIZES)
    embedding = 2 * SIZES["images"] * 16 * 7 * 7 * 3 * 32
    assert model == pytest.approx(3 * sum(forward.values()) - embedding)


def test_what_is_frozen_in_front_costs_forward_alone() -> None:
    config = tiny_config()
    forward = StepFlops(config).forward(**SIZES)
    assert StepFlops(config).of(**SIZES) == forward
    found = StepFlops(config, ("projector",)).of(**SIZES)
    assert {part: found[part] == forward[part] for part in found} == {
        "tower": True, "fusion": True, "projector": False, "llm": False, "head": False
    }  # fmt: skip


def test_pairs_that_see_each_other_are_those_of_the_mask() -> None:
    segments = torch.tensor([[0] * 5 + [1] * 3 + [2] * 4])
    assert attended(5, (3, 4)) == int(branch_mask(segments).sum())
    assert attended(7) == 28


def test_every_kind_of_fusion_is_known() -> None:
    assert set(FUSION_WORK) == set(FUSIONS)


@pytest.mark.parametrize("learn", [EVERYTHING, ("fusion", "projector")], ids="+".join)
@pytest.mark.parametrize("kind", sorted(set(FUSIONS) - {"difference"}))
def test_step_of_other_fusions(kind: str, learn: tuple[str, ...]) -> None:
    config = tiny_config(fusion={"kind": kind})
    model = ChangeVLMForConditionalGeneration(config).train()
    set_learning(model, learn)
    found = counted(step_of(model, batch_of(config)))
    assert sum(StepFlops(config, learn).hardware(**SIZES).values()) == found


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\['vision'\]; known: tower, fusion, projector, llm$"):
        StepFlops(tiny_config(), ("vision",))


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A100 80GB PCIe", torch.float32, 19.5),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H100 NVL", torch.bfloat16, 835.5),
        ("NVIDIA H200", torch.float16, 989.4),
        ("NVIDIA L40S", torch.bfloat16, 362.05),
        ("NVIDIA L40", torch.bfloat16, 181.05),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA A40", torch.bfloat16, 149.7),
        ("NVIDIA GeForce RTX 3090", torch.bfloat16, 71),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("Tesla V100-SXM2-32GB", torch.float16, 125),
        ("Tesla V100-SXM2-32GB", torch.bfloat16, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA A10G", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3", torch.int8, None),
        ("cpu", torch.float32, None),
    ],
)
def test_peaks_of_known_devices(name: str, dtype: torch.dtype, teraflops: float | None) -> None:
    found = peak_flops(name, dtype)
    assert found == (None if teraflops is None else pytest.approx(teraflops * 1e12))

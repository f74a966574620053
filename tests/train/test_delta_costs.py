"""What a step of a DeltaVLM computes and holds, by formula, against what torch counts."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llava.errors import ConfigError
from llava.family import family_of
from llava.model.branches import TEXT
from llava.model.delta_vlm.configuration import DeltaVLMConfig
from llava.train.flops import step_flops
from llava.train.memory import GIB, estimate, part_counts
from llava.train.parts import set_learning
from tests.model.delta_vlm.tiny import FUSIONS, tiny_config
from tests.train.test_flops import counted
from tests.train.test_memory import HALF, PRECISIONS, Live

LEARN = ("tower", "fusion", "qformer", "projector")
SIZES: dict[str, Any] = {"images": 4, "positions": 23, "rows": 20, "batch": 4, "reading": 9}
"""Two pairs, four questions of nine tokens, five labels each."""
STILL = {
    "attention_probs_dropout_prob": 0.0
}  # with dropout, attention on a CPU keeps what it would compute again


def config_of(kind: str = "csrm", **former: Any) -> DeltaVLMConfig:
    fields = {**tiny_config().qformer_config.to_dict(), **STILL, **former}
    return tiny_config(fusion=FUSIONS[kind], qformer_config=fields)


def model_and_batch(config: DeltaVLMConfig, learn: tuple[str, ...]) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = family_of(config).model(config).train()
    set_learning(model, learn)
    rows, places = SIZES["batch"], SIZES["positions"]
    ids = torch.randint(0, 300, (rows, places))
    ids[:, : config.num_query_tokens] = config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[:, -SIZES["rows"] // rows :] = 5
    side = config.vision_config.image_size
    return model, {
        "input_ids": ids,
        "labels": labels,
        "pixel_values": torch.randn(SIZES["images"] // 2, 2, 3, side, side),
        "pair_index": torch.tensor([0, 0, 1, 1]),
        "qformer_input_ids": torch.randint(0, 100, (rows, SIZES["reading"])),
    }


@pytest.mark.parametrize("learn", [LEARN, LEARN[1:], ("qformer",), ("projector",)], ids="+".join)
@pytest.mark.parametrize("kind", FUSIONS)
def test_a_step_computes_what_is_said(kind: str, learn: tuple[str, ...]) -> None:
    config = config_of(kind)
    model, batch = model_and_batch(config, learn)
    found = counted(lambda: model(**batch).loss.backward())
    assert sum(step_flops(config, learn).hardware(**SIZES).values()) == found


def test_a_forward_pass_computes_what_is_said() -> None:
    config = config_of()
    model, batch = model_and_batch(config, ())
    with torch.no_grad():
        found = counted(lambda: model(**batch))
    work = step_flops(config)
    masked = sum(each.mixed - each.mixing for _, each in work.work(**SIZES))
    assert sum(work.forward(**SIZES).values()) + masked == found
    assert work.of(**SIZES) == work.forward(**SIZES)  # nothing learns, so nothing goes back


def test_questions_that_share_a_row_are_counted_one_by_one() -> None:
    model, batch = model_and_batch(config_of(), ())
    shared = batch | {name: batch[name].view(2, -1) for name in ("input_ids", "labels")}
    places = torch.arange(4).repeat_interleave(SIZES["positions"]).view(2, -1) % 2
    shared["segments"] = places * TEXT
    with torch.no_grad():
        found = counted(lambda: model(**shared))
    work = step_flops(config_of())
    sizes = SIZES | {"batch": 2, "positions": 2 * SIZES["positions"], "asked": 4}
    masked = sum(each.mixed - each.mixing for _, each in work.work(**sizes))
    assert sum(work.forward(**sizes).values()) + masked == found


def test_only_the_last_blocks_of_the_tower_are_gone_back_through() -> None:
    config = config_of()
    resting, learning = (step_flops(config, learn).of(**SIZES)["tower"] for learn in (LEARN[1:], LEARN))
    forward = step_flops(config).forward(**SIZES)["tower"]
    assert resting == forward and 1.8 * forward < learning < 2 * forward  # two of four blocks, twice again
    with pytest.raises(ConfigError, match="qformer"):
        step_flops(config, ("eyes",))


def middle_config(**fields: Any) -> DeltaVLMConfig:
    """The real model's proportions, a tenth as wide."""
    return DeltaVLMConfig(
        vision_config={
            "hidden_size": 144, "intermediate_size": 614, "num_hidden_layers": 6, "num_attention_heads": 2,
            "image_size": 112, "patch_size": 14,
        },
        qformer_config={
            "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 3,
            "vocab_size": 500, "max_position_embeddings": 128,
        },
        text_config={
            "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 4, "vocab_size": 1000, "bos_token_id": 1, "eos_token_id": 2,
        },
        num_query_tokens=32,
        **fields,
    )  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True], ids=["held", "checkpointed"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_most_that_a_step_holds(precision: str, checkpointing: bool) -> None:
    """All tensors of a step after the first: within 10 %, and what moves within 25."""
    dtype, autocast = PRECISIONS[precision]
    config = middle_config()
    torch.manual_seed(0)
    model = family_of(config).model(config).to(dtype).train()
    set_learning(model, LEARN)
    if checkpointing:
        model.gradient_checkpointing_enable()
    rows, places, text = 6, 70, 32
    ids = torch.randint(3, 900, (rows, places))
    ids[:, :32] = config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[:, -8:] = 5
    batch = {
        "input_ids": ids, "labels": labels, "qformer_input_ids": torch.randint(0, 400, (rows, text)),
        "pixel_values": torch.randn(rows, 2, 3, 112, 112, dtype=dtype),
    }  # fmt: skip
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
    found = estimate(
        config, learn=LEARN, pairs=rows, positions=places, rows=8, dtype=dtype, autocast=autocast,
        checkpointing=checkpointing, branches=False,
    )  # fmt: skip
    assert sum(found.device.values()) == pytest.approx(fixed, rel=2e-2)
    assert found.total == pytest.approx(live.most, rel=0.10)
    assert max(found.moments.values()) == pytest.approx(live.most - fixed, rel=0.25)


def test_the_published_size_fits_where_the_paper_trained_it() -> None:
    """Batches of 24 on one card of 48 GB, with the language model at rest in half precision."""
    config = DeltaVLMConfig.preset("deltavlm-7b")
    options: dict[str, Any] = {"learn": LEARN, "pairs": 24, "positions": 96, "rows": 16, "autocast": True}
    found = estimate(config, **options, half_llm=True)
    assert found.total < 48e9
    whole = estimate(config, **options)
    assert whole.device["weights"] - found.device["weights"] == 2 * part_counts_of(config)["llm"]
    assert found.device["gradients"] == 4 * 253_219_200
    assert found.total / GIB > 20


def part_counts_of(config: DeltaVLMConfig) -> dict[str, int]:
    from llava.train.flops import on_meta

    return {part: count[0] for part, count in part_counts(on_meta(config)).items()}

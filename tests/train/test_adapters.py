"""Adapters: what learns and what rests, the folder, loading by its base, merging, under the Trainer."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llava.captioner import ChangeCaptioner, load_model
from llava.config import build
from llava.errors import CheckpointError, ConfigError, DownloadError, MissingDependencyError
from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from llava.model.fusion.difference import JoinedLinear
from llava.train import adapters, four_bit
from llava.train.adapters import AdapterConfig, add_adapter, linear_layers, load_adapted
from llava.train.parts import part_of
from tests.model.test_training import Pairs, Scored, collate, trainer_for
from tests.tiny import pair_inputs, random_pair, tiny_config, tiny_model

peft = pytest.importorskip("peft")
BOTH = ("llm", "tower")


def adapt(config: AdapterConfig, seed: int = 0, **model: Any) -> nn.Module:
    """An untouched adapter on a tiny model."""
    return add_adapter(tiny_model(seed=4, **model)[0], config, seed, base="tiny")


def lora(kind: str = "lora", **fields: Any) -> AdapterConfig:
    return AdapterConfig(**{"kind": kind, "rank": 3, "alpha": 6.0, "dropout": 0.0, **fields})


def stir(model: nn.Module, seed: int = 0) -> None:
    """Move everything that learns away from where it began."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)


def logits(
    model: nn.Module, inputs: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    model = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.no_grad():
        result: torch.Tensor = model.eval()(**inputs).logits
    return result


def close(one: nn.Module, other: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """In float64: what differs is the rounding of merged weights to float32."""
    found, expected = (logits(model, inputs, torch.float64) for model in (one, other))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=3e-5)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny model's folder."""
    return saved_base(tmp_path / "base")


def saved_base(folder: Path, **options: Any) -> Path:
    model, processor = tiny_model(seed=4, **options)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def adapter_of(base: Path, folder: Path, config: AdapterConfig, **model: Any) -> nn.Module:
    """A stirred adapter on `base`, and its folder."""
    adapted = add_adapter(tiny_model(seed=4, **model)[0], config, seed=0, base=str(base))
    stir(adapted)
    adapted.save_pretrained(folder)
    tiny_model(seed=4, **model)[1].save_pretrained(folder)
    return adapted.eval()


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"kind": "loha"}, "kind"),
        ({"rank": 0}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"dropout": 1}, "dropout"),
        ({"parts": ["fusion"]}, "parts"),
        ({"parts": []}, "parts"),
        ({"full": ["llm"]}, "full"),
        ({"ranks": 8}, "ranks"),
    ],
)
def test_a_wrong_setting_is_named(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"run.yaml.*\b{name}"):
        build(AdapterConfig, {"kind": "lora", **fields}, "run.yaml, adapter")
    assert build(AdapterConfig, {"kind": "dora", "parts": ["tower"]}, "x") == AdapterConfig(
        kind="dora", parts=("tower",)
    )


@pytest.mark.parametrize(
    ("vision", "text"),
    [("siglip", "qwen2"), ("siglip2", "qwen3"), ("clip", "llama"), ("dinov3", "qwen2"), ("eva", "qwen2")],
)
def test_updates_go_to_every_attention_and_mlp_of_any_backbone(vision: str, text: str) -> None:
    """Every linear map that changes with its layer has a gradient, and nothing else has got an update."""
    model = tiny_model(vision=vision, text=text)[0]
    names = linear_layers(model, BOTH)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    outside = [name for name in linear - set(names) if part_of(f"{name}.weight") in BOTH]
    assert all("embed" in name or name == "lm_head" for name in outside)
    text_layers, tower_layers = 2, 3
    expected = (
        7 * text_layers + {"siglip": 6, "siglip2": 6, "clip": 6, "dinov3": 6, "eva": 4}[vision] * tower_layers
    )
    assert len(names) == expected
    inputs = collate(Pairs(model, 2).rows)
    before = logits(model, {name: value for name, value in inputs.items() if name != "labels"})
    adapted = add_adapter(model, lora(parts=BOTH), 0, "tiny")
    found = {
        re.sub(r"^base_model\.model\.", "", name)
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert found == set(names)
    joined = [module for module in adapted.modules() if isinstance(module, JoinedLinear)]
    assert len(joined) == 4  # two, and their frozen originals
    after = logits(adapted, {name: value for name, value in inputs.items() if name != "labels"})
    assert torch.equal(before, after)  # an untrained adapter changes nothing
    stir(adapted)
    adapted.train()(**inputs).loss.backward()
    dead = [
        n
        for n, p in adapted.named_parameters()
        if p.requires_grad and not (p.grad is not None and p.grad.any())
    ]
    assert all(name.endswith(("k_proj.bias", "key.bias")) for name in dead)  # softmax does not see them


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_number_of_trained_weights_is_that_computed_by_hand(kind: str) -> None:
    model = tiny_model()[0]
    rank, hidden, middle, keys, width, tower_middle = 3, 48, 64, 24, 32, 48
    text = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
    text += [(hidden, middle), (hidden, middle), (middle, hidden)]
    tower = [(width, width)] * 4 + [(width, tower_middle), (tower_middle, width)]
    shapes = 2 * text + 3 * tower
    low_rank = sum(rank * (into + out) + (out if kind == "dora" else 0) for into, out in shapes)
    whole = sum(p.numel() for m in (model.model.fusion, model.model.projector) for p in m.parameters())
    adapted = add_adapter(model, lora(kind, parts=BOTH), 0, "tiny")
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == low_rank + whole
    learning = {part_of(name) for name, p in adapted.named_parameters() if p.requires_grad}
    assert learning == {"llm", "tower", "fusion", "projector"}
    only = adapt(lora(full=()))
    assert {part_of(name) for name, p in only.named_parameters() if p.requires_grad} == {"llm"}


def test_the_seed_alone_decides_the_first_weights() -> None:
    def first(seed: int) -> torch.Tensor:
        return torch.cat([
            p.flatten() for n, p in adapt(lora(), seed).named_parameters() if "lora_A" in n
        ])  # fmt: skip

    one = first(1)
    assert torch.equal(first(1), one) and not torch.equal(first(2), one)
    model = tiny_model()[0]
    state = torch.get_rng_state()
    adapted = add_adapter(model, lora(), 1, "tiny")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    drawn = add_adapter(tiny_model(seed=9)[0], lora(), 1, "tiny")
    for (name, value), other in zip(adapted.named_parameters(), drawn.parameters(), strict=True):
        assert "lora_A" not in name or torch.equal(value, other)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_weights_stay_bitwise_and_trained_ones_move(checkpointing: bool, tmp_path: Path) -> None:
    """Also with a frozen tower before what learns, and layers computed twice."""
    adapted = adapt(lora())
    begun = {name: value.clone() for name, value in adapted.named_parameters()}
    trainer_for(adapted, tmp_path, gradient_checkpointing=checkpointing).train()
    moved = {name for name, value in adapted.named_parameters() if not torch.equal(value, begun[name])}
    learning = {name for name, p in adapted.named_parameters() if p.requires_grad}
    # keys' biases and a gate's last bias in front of a softmax or a ratio: no gradient but for rounding
    assert moved <= learning and {n for n in learning - moved if not n.endswith("bias")} == set()


def test_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        adapted = adapt(lora(parts=BOTH)).train()
        stir(adapted)
        if checkpointing:
            adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        adapted(**collate(Pairs(adapted.get_base_model(), 2).rows)).loss.backward()
        found.append({n: p.grad for n, p in adapted.named_parameters() if p.grad is not None})
    assert set(found[0]) == set(found[1]) == {n for n, p in adapted.named_parameters() if p.requires_grad}
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_the_folder_has_all_but_the_base_and_no_pickle(base: Path, tmp_path: Path) -> None:
    adapted = adapter_of(base, tmp_path / "adapter", lora("dora", parts=BOTH))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {
        "adapter_config.json", "adapter_model.safetensors", "adapted_config.json", "processor_config.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(base.resolve())
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(value.numel() for value in held.values()) == sum(
        p.numel() for p in adapted.parameters() if p.requires_grad
    )


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("model", [{}, {"vision": "eva", "text": "qwen3"}, {"fusion": False}], ids=str)
def test_merged_equals_unmerged(kind: str, model: dict[str, Any], tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", **model)
    adapted = adapter_of(base, tmp_path / "adapter", lora(kind, parts=BOTH), **model)
    processor = tiny_model(**model)[1]
    inputs = pair_inputs(processor, [0, 1])
    merged = load_adapted(str(tmp_path / "adapter"))
    assert type(merged) is ChangeVLMForConditionalGeneration
    assert not [name for name, _ in merged.named_modules() if "lora" in name or "modules_to_save" in name]
    unmerged_state, layers = adapted.state_dict(), set(linear_layers(merged, BOTH))
    for name in layers:  # 3 is the rank, 2 = alpha / rank
        prefix = f"base_model.model.{name}"
        weight, a, b = (
            unmerged_state[f"{prefix}.{name}.weight"]
            for name in ("base_layer", "lora_A.default", "lora_B.default")
        )
        weight = weight.double() + 2 * b.double() @ a.double()
        if kind == "dora":
            magnitude = unmerged_state[f"{prefix}.lora_magnitude_vector.default.weight"].double()
            weight = weight * (magnitude / weight.norm(dim=1))[:, None]
        torch.testing.assert_close(merged.get_submodule(name).weight.double(), weight, rtol=1e-5, atol=1e-6)
    # float32 alone moves these logits, of up to 5, by some 4e-5: so they are compared in both precisions
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 5e-5)):
        expected = logits(adapted, inputs, dtype)
        assert (
            expected - logits(load_model(str(base)), inputs, dtype)
        ).abs().max() > 1  # the adapter says something
        difference = (logits(merged, inputs, dtype) - expected).abs().max()
        assert difference <= tolerance * expected.abs().max(), dtype
    ids = [
        m.generate(**inputs, max_new_tokens=8, do_sample=False) for m in (adapted.get_base_model(), merged)
    ]
    assert torch.equal(*ids)


def test_a_captioner_takes_the_folder_or_the_model_in_training(base: Path, tmp_path: Path) -> None:
    adapted = adapter_of(base, tmp_path / "adapter", lora())
    live = ChangeCaptioner(adapted.get_base_model(), tiny_model()[1])
    loaded = ChangeCaptioner.from_pretrained(tmp_path / "adapter", device="cpu", attn_implementation="eager")
    assert loaded.model.config._attn_implementation == "eager"
    for seed in range(2):
        one, other = (
            c.caption(*random_pair(seed), max_new_tokens=6, return_map=True) for c in (live, loaded)
        )
        assert one.text == other.text and abs(one.log_probability - other.log_probability) < 1e-3
        assert one.map is not None and other.map is not None


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_the_precision_is_the_bases_or_the_one_asked_for(dtype: str, tmp_path: Path) -> None:
    model, processor = tiny_model(seed=4)
    model.bfloat16().save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    adapted = add_adapter(
        load_model(str(tmp_path / "base"), dtype="float32"), lora(), 0, str(tmp_path / "base")
    )
    stir(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    found = load_adapted(str(tmp_path / "adapter"), dtype=dtype)
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16} == {found.config.dtype}
    plain = load_model(str(tmp_path / "base"))
    assert {n: b.dtype for n, b in found.named_buffers()} == {n: b.dtype for n, b in plain.named_buffers()}
    exact = load_adapted(str(tmp_path / "adapter"), dtype=torch.float32)
    for name, value in exact.state_dict().items():  # one rounding, after merging
        assert torch.equal(found.state_dict()[name], value.bfloat16()), name
    with pytest.raises(ConfigError, match="int8"):
        load_adapted(str(tmp_path / "adapter"), dtype="int8")


def test_a_new_fusion_and_new_layers_come_with_the_adapter(tmp_path: Path) -> None:
    """The base has no fusion; the adapter was trained with one that looks at two levels."""
    base = saved_base(tmp_path / "base", fusion=False)
    wanted = tiny_config(fusion=True)
    torch.manual_seed(0)
    model = load_model(str(base), config=wanted, fresh_fusion=True)
    adapted = add_adapter(model, lora(), 0, str(base))
    stir(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = load_adapted(str(tmp_path / "adapter"))
    assert loaded.config.fusion == wanted.fusion and loaded.config.vision_layers == [1, 3]
    assert adapters.read_config(str(tmp_path / "adapter")).fusion == wanted.fusion
    inputs = pair_inputs(tiny_model()[1], [0])
    close(loaded, adapted, inputs)
    with pytest.raises(ConfigError, match="llava merge"):
        load_model(str(tmp_path / "adapter"), config=tiny_config(fusion=False))
    assert load_model(str(tmp_path / "adapter"), config=wanted).config.fusion == wanted.fusion


def test_a_new_fusion_that_nobody_kept_is_missed(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", fusion=False)
    model = load_model(str(base), config=tiny_config(fusion=True), fresh_fusion=True)
    add_adapter(model, lora(full=("projector",)), 0, str(base)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="neither in it nor in its base"):
        load_model(str(tmp_path / "adapter"))


def test_an_adapter_on_an_adapter(base: Path, tmp_path: Path) -> None:
    adapter_of(base, tmp_path / "one", lora())
    model = load_model(str(tmp_path / "one"))
    assert all(p.requires_grad for p in model.parameters())
    second = add_adapter(model, lora("dora", parts=("tower",)), 1, str(tmp_path / "one"))
    stir(second, seed=1)
    second.save_pretrained(tmp_path / "two")
    inputs = pair_inputs(tiny_model()[1], [0])
    close(load_model(str(tmp_path / "two")), second, inputs)


def test_plain_peft_and_transformers_read_the_folder_too(base: Path, tmp_path: Path) -> None:
    inputs = pair_inputs(tiny_model()[1], [0])
    for kind in ("lora", "dora"):
        folder = tmp_path / kind
        expected = logits(adapter_of(base, folder, lora(kind)), inputs)
        by_peft = peft.PeftModel.from_pretrained(load_model(str(base)), folder)
        assert torch.equal(logits(by_peft, inputs), expected)
        if kind == "lora":  # of the other, transformers' own loading leaves the magnitudes out
            assert torch.equal(
                logits(ChangeVLMForConditionalGeneration.from_pretrained(folder), inputs), expected
            )
        (folder / "adapted_config.json").unlink()  # as plain peft leaves a folder
        close(load_model(str(folder)), by_peft, inputs)
        assert adapters.read_config(str(folder)).fusion == load_model(str(base)).config.fusion


def spoil(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_what_is_wrong_with_a_folder_is_said(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    adapter_of(base, folder, lora())
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    text, data = config.read_text(), weights.read_bytes()

    base.rename(tmp_path / "moved")
    with pytest.raises(
        DownloadError, match=r"adapter_config.json: field base_model_name_or_path .*base.*--base MODEL"
    ):
        load_model(str(folder))
    assert load_adapted(str(folder), base=str(tmp_path / "moved")).config.fusion is not None
    (tmp_path / "moved").rename(base)

    for name in ("no-such-model", None, str(folder)):
        spoil(config, base_model_name_or_path=name)
        with pytest.raises((CheckpointError, DownloadError), match=r"field base_model_name_or_path"):
            load_model(str(folder))
    config.write_text(text)
    spoil(config, peft_type="IA3")
    with pytest.raises(CheckpointError, match="IA3"):
        load_model(str(folder))
    for broken in ("{", "[]", "{}"):
        config.write_text(broken)
        with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
            load_model(str(folder))
    config.write_text(text)
    own = (folder / "adapted_config.json").read_text()
    for broken in ("{", "[]"):
        (folder / "adapted_config.json").write_text(broken)
        with pytest.raises(CheckpointError, match=r"adapted_config\.json"):
            load_model(str(folder))
    (folder / "adapted_config.json").write_text(own)

    weights.write_bytes(data[:-9])
    with pytest.raises(CheckpointError, match="cut off"):
        load_model(str(folder))
    weights.write_bytes(data)
    held = load_file(weights)
    lost = "base_model.model.model.projector.layers.0.weight"
    save_file({name: value for name, value in held.items() if name != lost}, weights)
    with pytest.raises(CheckpointError, match=re.escape(lost)):
        load_model(str(folder))
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        load_model(str(folder))


def test_another_models_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    adapter_of(base, tmp_path / "adapter", lora())
    other = saved_base(tmp_path / "other", fusion=False)
    (tmp_path / "adapter" / "adapted_config.json").unlink()  # as plain peft leaves it
    with pytest.raises(CheckpointError, match="other"):
        load_adapted(str(tmp_path / "adapter"), base=str(other))


def test_a_base_that_lies_nowhere_is_refused() -> None:
    with pytest.raises(ConfigError, match="save the model"):
        add_adapter(tiny_model()[0], lora(), 0)


@pytest.mark.parametrize("kind", ["lora", "dora", "qlora"])
def test_a_plan_needs_no_weights(kind: str) -> None:
    with torch.device("meta"):
        plan = add_adapter(ChangeVLMForConditionalGeneration(tiny_config()), lora(kind), 0)
    real = adapt(lora("lora" if kind == "qlora" else kind))
    planned, held = (
        {n: p.shape for n, p in model.named_parameters() if p.requires_grad} for model in (plan, real)
    )
    assert planned == held


def test_a_known_name_stays_a_name() -> None:
    tiny = load_model(str(Path(adapters.__file__).parents[1] / "assets" / "tiny"))
    adapted = add_adapter(tiny, lora(), 0, base="tiny")
    assert adapted.peft_config["default"].base_model_name_or_path == "tiny"


# --- under the Trainer ------------------------------------------------------------------------------


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def fresh() -> nn.Module:
    """An adapter on a fusion whose map head rests."""
    config = tiny_config()
    config.fusion["map_head"] = True
    torch.manual_seed(4)
    adapted = add_adapter(ChangeVLMForConditionalGeneration(config), lora(dropout=0.1), 0, "tiny").train()
    adapted.get_base_model().model.fusion.map_head.requires_grad_(False)
    return adapted


def test_resuming_equals_an_unbroken_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    trainer_for(unbroken := fresh(), tmp_path / "whole", **options).train()
    trainer_for(begun := fresh(), tmp_path / "parts", **(options | {"max_steps": 2})).train()
    assert (tmp_path / "parts" / "checkpoint-2" / "adapter_model.safetensors").is_file()
    trainer_for(resumed := fresh(), tmp_path / "parts", **options).train(resume_from_checkpoint=True)
    expected, found, half = (trained_weights(model) for model in (unbroken, resumed, begun))
    assert list(expected) == list(found)  # what rested before still does
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(not torch.equal(half[name], value) for name, value in expected.items())


def test_the_best_checkpoint_is_what_remains(tmp_path: Path) -> None:
    adapted = fresh()
    trainer_for(
        adapted, tmp_path / "run", kind=Scored, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
    ).train()  # fmt: skip
    held = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    second, last = (
        load_file(tmp_path / "run" / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (2, 4)
    )
    assert set(held) == set(second)
    assert all(torch.equal(held[name], value) for name, value in second.items())
    assert any(not torch.equal(last[name], value) for name, value in second.items())


# --- a base in 4 bits -------------------------------------------------------------------------------


def test_four_bits_need_a_device_and_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="not held in 4 bits"):
        adapt(lora("qlora"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for there, error, said in ((False, MissingDependencyError, "bitsandbytes"), (True, ConfigError, "CUDA")):
        monkeypatch.setattr(four_bit, "_has_bitsandbytes", lambda there=there: there)
        with pytest.raises(error, match=rf"adapter\.kind.*{said}"):
            four_bit.options(tiny_config(), ("llm",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = four_bit.options(tiny_config(), ("llm",), device="cuda:1")
    assert options["device_map"] == {"": "cuda:1"} and options["dtype"] == torch.float32


def test_rounding_to_four_bits_takes_the_nearest_level() -> None:
    levels = torch.tensor(four_bit.LEVELS)
    assert len(levels) == 16 and levels[7] == 0 and levels[0] == -1 and levels[-1] == 1
    assert (levels.diff() > 0).all()
    weight = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))  # 150 is no multiple of a block
    rounded = four_bit.round_nf4(weight)
    for start in range(0, 150, four_bit.BLOCK):
        block, found = (x.flatten()[start : start + four_bit.BLOCK] for x in (weight, rounded))
        near = (block[:, None] - levels * block.abs().max()).abs().min(dim=1).values
        torch.testing.assert_close((found - block).abs(), near)
        assert found[block.abs().argmax()] == block[block.abs().argmax()]
    assert torch.equal(four_bit.round_nf4(rounded), rounded)
    assert not four_bit.round_nf4(torch.zeros(2, 64)).any()


def test_a_base_that_was_in_four_bits_is_rounded_before_merging(base: Path, tmp_path: Path) -> None:
    """An adapter that says nothing, of a 4-bit base: the merged layers have the 4-bit values, all else its own."""
    adapted = add_adapter(tiny_model(seed=4)[0], lora(), 0, str(base))
    adapted.save_pretrained(tmp_path / "adapter")
    said = four_bit.quantization(tiny_config(), ("llm",)).to_dict()
    spoil(tmp_path / "adapter" / "adapted_config.json", quantization_config=said)
    found = load_model(str(tmp_path / "adapter"))
    assert getattr(found.config, "quantization_config", None) is None
    layers = {f"{name}.weight" for name in linear_layers(found, ("llm",))}
    for name, value in load_model(str(base)).state_dict().items():
        expected = four_bit.round_nf4(value) if name in layers else value
        assert torch.equal(found.state_dict()[name], expected), name
    spoil(
        tmp_path / "adapter" / "adapted_config.json",
        quantization_config=said | {"bnb_4bit_use_double_quant": True},
    )
    with pytest.raises(CheckpointError, match="quantization_config"):
        load_model(str(tmp_path / "adapter"))


@pytest.mark.parametrize("vision", ["siglip", "siglip2"])
def test_an_adapter_of_a_four_bit_base_merged_equals_unmerged(vision: str, tmp_path: Path) -> None:
    """With bitsandbytes on a CPU, which is right only for rows of whole blocks and in training mode."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    config = tiny_config(vision=vision)
    config.vision_config.hidden_size = config.vision_config.intermediate_size = 64
    config.text_config.hidden_size = 64
    torch.manual_seed(4)
    ChangeVLMForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    settings = four_bit.quantization(config, BOTH)
    settings.bnb_4bit_compute_dtype = torch.float32  # to compare closely
    options = {"quantization_config": settings, "dtype": torch.float32}
    model = load_model(str(tmp_path / "base"), **options)
    quantised = {n for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert quantised == set(linear_layers(model, BOTH))
    with pytest.raises(ConfigError, match="held in 4 bits"):
        add_adapter(model, lora(), 0, str(tmp_path / "base"))
    adapted = add_adapter(model, lora("qlora", parts=BOTH), 0, str(tmp_path / "base"))
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    trainer_for(adapted, tmp_path / "run", save_strategy="no").train()
    adapted.save_pretrained(tmp_path / "adapter")
    merged = load_model(str(tmp_path / "adapter"))
    unmerged = load_model(str(tmp_path / "adapter"), **options)
    inputs = pair_inputs(tiny_model()[1], [0, 1])
    with torch.no_grad():
        one, other, expected = (m.train()(**inputs).logits for m in (merged, unmerged, adapted))
    assert torch.equal(other, expected)
    assert (one - expected).abs().max() <= 1e-5 * expected.abs().max()


ZERO2 = """
import sys
from pathlib import Path

import torch

from llava.captioner import load_model
from llava.train.adapters import AdapterConfig, add_adapter
from tests.model.test_training import trainer_for

folder = Path(sys.argv[1])
config = AdapterConfig(kind="dora", rank=3, parts=("llm", "tower"), dropout=0.1)

def run(resume):
    base = str(folder / "base")
    adapted = add_adapter(load_model(base), config, 0, base).train()
    begun = {name: value.detach().clone() for name, value in adapted.named_parameters()}
    options = {"deepspeed": str(folder / "zero2.json"), "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_for(adapted, folder / "run", gradient_checkpointing=True, **options)
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.deepspeed.zero_optimization_stage() == 2 and trainer.args.world_size == 2
    for name, value in adapted.named_parameters():
        assert torch.equal(value, begun[name]) != value.requires_grad or name.endswith("bias"), name
    trainer.save_model(str(folder / "out"))
    return {name: value.detach().clone() for name, value in adapted.named_parameters()}

whole, resumed = run(None), run(str(folder / "run" / "checkpoint-2"))
assert all(torch.equal(whole[name], value) for name, value in resumed.items())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="DeepSpeed is for Linux")
def test_zero2_on_two_processes_trains_saves_and_resumes(tmp_path: Path) -> None:
    """Frozen weights rest, a resumed run ends bitwise as the whole one, and the folder loads and merges."""
    pytest.importorskip("deepspeed")
    saved_base(tmp_path / "base")
    settings = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}
    (tmp_path / "zero2.json").write_text(json.dumps(settings))
    (tmp_path / "worker.py").write_text(ZERO2)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "worker.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    held = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dim() for tensor in held.values()} == {1, 2} and all(t.numel() for t in held.values())
    load_model(str(tmp_path / "out"))

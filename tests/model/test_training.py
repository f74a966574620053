"""Under transformers' Trainer: best checkpoint, resuming, accumulation, checkpointing, frozen parts, LoRA."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Cache, Trainer, TrainingArguments

from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from tests.model.layouts import Sizes, write_release
from tests.model.test_checkpoint import inputs_for
from tests.tiny import pair_inputs, tiny_model


class Pairs(Dataset):
    """Pairs of noise with answers of different lengths."""

    def __init__(self, model: ChangeVLMForConditionalGeneration, count: int = 8) -> None:
        config, self.rows = model.config, []
        side = config.vision_config.image_size
        generator = torch.Generator().manual_seed(1)
        for i in range(count):
            marks = torch.full((2 * config.image_seq_length,), config.image_token_id)
            words = torch.randint(0, config.image_token_id, (3 + i % 4,), generator=generator)
            ids = torch.cat([words[:1], marks, words])
            labels = ids.clone()
            labels[: len(marks) + 1] = -100
            pixels = torch.randn(2, 3, side, side, generator=generator)
            self.rows.append({"input_ids": ids, "labels": labels, "pixel_values": pixels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Right-padded batch."""
    pad = torch.nn.utils.rnn.pad_sequence
    lengths = torch.tensor([len(s["input_ids"]) for s in samples])
    return {
        "input_ids": pad([s["input_ids"] for s in samples], batch_first=True),
        "labels": pad([s["labels"] for s in samples], batch_first=True, padding_value=-100),
        "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        "pixel_values": torch.stack([s["pixel_values"] for s in samples]),
    }


def trainer_for(
    model: ChangeVLMForConditionalGeneration, folder: Path, kind: type[Trainer] = Trainer, **options: Any
) -> Trainer:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
        "logging_steps": 1,
    }
    data = Pairs(model)
    arguments = TrainingArguments(**(defaults | options))
    return kind(model, arguments, data_collator=collate, train_dataset=data, eval_dataset=data)


def trainable() -> ChangeVLMForConditionalGeneration:
    return tiny_model(seed=1)[0].train()


class Scored(Trainer):
    """With a made-up score, best at step 2."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        return metrics | {"eval_score": 1.0 if self.state.global_step == 2 else 0.1 * self.state.global_step}


@pytest.mark.parametrize("start", ["fresh", "release"])
def test_the_best_checkpoint_is_what_remains(start, tmp_path):
    if start == "release":
        write_release(tmp_path / "release", Sizes())
        model = ChangeVLMForConditionalGeneration.from_pretrained(tmp_path / "release")
    else:
        model = trainable()
    trainer = trainer_for(
        model, tmp_path / "run", kind=Scored, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    state = model.state_dict()
    second, last = (load_file(tmp_path / "run" / f"checkpoint-{i}" / "model.safetensors") for i in (2, 4))
    assert set(second) == set(state)
    assert all(torch.equal(state[name], value) for name, value in second.items())
    assert any(not torch.equal(last[name], value) for name, value in second.items())


def test_resuming_equals_an_unbroken_run(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    unbroken = trainable()
    trainer_for(unbroken, tmp_path / "whole", **options).train()
    begun = trainable()
    trainer_for(begun, tmp_path / "parts", **(options | {"max_steps": 2})).train()
    resumed = trainable()
    trainer_for(resumed, tmp_path / "parts", **options).train(resume_from_checkpoint=True)
    for (name, a), b in zip(unbroken.state_dict().items(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)
    assert not torch.equal(begun.lm_head.weight, resumed.lm_head.weight)


def test_accumulation_steps_do_not_change_the_loss(tmp_path):
    """Answers differ in length, so a mean of means would."""
    weights, losses = [], []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        model = trainable()
        trainer = trainer_for(
            model, tmp_path / str(size), per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            max_steps=2, optim="sgd", max_grad_norm=0.0, learning_rate=1e-4,
        )  # fmt: skip
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        weights.append(model.state_dict())
    for loss in losses[1:]:
        assert loss == pytest.approx(losses[0], rel=1e-4)
    for other in weights[1:]:
        for name, value in weights[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5, msg=name)


def gradients(model: ChangeVLMForConditionalGeneration, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("vision", ["siglip", "clip", "dinov3", "eva"])
def test_gradient_checkpointing_gives_the_same_gradients(vision):
    model = tiny_model(vision=vision)[0].train()
    batch = collate(Pairs(model, 2).rows)
    plain = gradients(model, batch)
    calls: list[str] = []
    watched = {
        "fusion": model.model.fusion.blocks[0].attend_change,
        "text": model.model.language_model.layers[0].self_attn,
    }
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    again = gradients(model, batch)
    assert {name: calls.count(name) for name in watched} == {
        "fusion": 2,
        "text": 2,
    }  # forward, and once more backward
    assert set(again) == set(plain)
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_frozen_parts_cost_no_gradient():
    model = trainable()
    model.model.vision_tower.requires_grad_(False)
    model.model.language_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    model.gradient_checkpointing_enable()
    seen = []
    model.model.vision_tower.register_forward_hook(lambda _, __, out: seen.append(out[-1].requires_grad))
    found = gradients(model, collate(Pairs(model, 2).rows))
    assert seen == [False]
    assert set(found) == {
        n for n, _ in model.named_parameters() if n.startswith(("model.fusion.", "model.projector."))
    }
    assert all(value.abs().max() > 0 for name, value in found.items() if not name.endswith("k_proj.bias"))


def test_no_cache_is_built_when_there_are_labels(monkeypatch):
    model = trainable()
    assert model.config.text_config.use_cache
    built: list[Cache] = []
    original = Cache.__init__
    monkeypatch.setattr(
        Cache, "__init__", lambda self, *a, **k: (built.append(self), original(self, *a, **k))[1]
    )
    batch = collate(Pairs(model, 2).rows)
    out = model(**batch)
    assert (built, out.past_key_values) == ([], None)
    del batch["labels"]
    assert model(**batch).past_key_values is built[0]


def test_the_loss_is_that_of_all_logits():
    """Only supervised positions go through the head; while training no logits are kept."""
    model = trainable()
    batch = collate(Pairs(model, 3).rows)
    trained = model(**batch)
    assert trained.logits is None
    evaluated = model.eval()(**batch)
    shifted = evaluated.logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(shifted, batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(evaluated.loss, expected)
    torch.testing.assert_close(trained.loss, expected)
    torch.testing.assert_close(
        model(**batch, num_items_in_batch=torch.tensor(7)).loss * 7,
        expected * (batch["labels"] != -100).sum(),
    )
    few = model(**batch, logits_to_keep=2)
    assert few.logits.shape[1] == 2
    torch.testing.assert_close(few.loss, expected)


def test_label_weights_count_labels_so_often():
    model = trainable()
    batch = collate(Pairs(model, 2).rows)
    each = torch.zeros_like(batch["labels"], dtype=torch.float32)
    each[0], each[1, -4:] = 3.0, 0.5
    targets = batch["labels"][:, 1:].flatten()
    logits = model.eval()(**batch).logits[:, :-1].flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none") * each[:, 1:].flatten()
    counted = (each[:, 1:].flatten() * (targets != -100)).sum()
    model.train()
    torch.testing.assert_close(model(**batch, label_weights=each).loss, losses.sum() / counted)
    torch.testing.assert_close(
        model(**batch, label_weights=each, num_items_in_batch=torch.tensor(9.0)).loss, losses.sum() / 9
    )


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("fusion", [True, False])
def test_a_batch_that_teaches_nothing_has_gradients_of_zeros(images, fusion):
    """Other ranks wait for the gradient of every weight."""
    model = tiny_model(fusion=fusion)[0].train()
    batch = collate(Pairs(model, 2).rows)
    batch["labels"].fill_(-100)
    if not images:
        del batch["pixel_values"]
        batch["input_ids"] = batch["input_ids"][:, -3:]
        batch["labels"], batch["attention_mask"] = batch["labels"][:, -3:], batch["attention_mask"][:, -3:]
    loss = model(**batch).loss
    assert loss.item() == 0
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_shared_prefix_equals_separate_sequences():
    """One sequence of a prefix and two branches, in sdpa with a bool mask and in eager."""
    model = tiny_model(seed=2)[0]
    one = Pairs(model, 1).rows[0]
    prefix, branches = one["input_ids"], [torch.tensor([4, 5, 6]), torch.tensor([7, 8, 9, 10])]
    pixels, length = one["pixel_values"][None], len(one["input_ids"])
    ids = torch.cat([prefix, *branches])
    segment = torch.tensor([0] * length + [1] * 3 + [2] * 4)
    position = torch.cat([torch.arange(length), length + torch.arange(3), length + torch.arange(4)])
    q, k = torch.arange(len(ids))[:, None], torch.arange(len(ids))[None]
    mask = (k <= q) & ((segment[k] == 0) | (segment[k] == segment[q]))
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            packed = model(
                input_ids=ids[None],
                pixel_values=pixels,
                attention_mask=mask[None, None],
                position_ids=position[None],
                use_cache=False,
            ).logits[0]
            start = length
            for branch in branches:
                alone = model(input_ids=torch.cat([prefix, branch])[None], pixel_values=pixels).logits[
                    0, length:
                ]
                torch.testing.assert_close(
                    packed[start : start + len(branch)], alone, rtol=1e-4, atol=1e-4, msg=attention
                )
                start += len(branch)


@pytest.mark.parametrize("save", ["adapter", "merged"])
def test_lora_with_fusion_and_projector(save, tmp_path):
    peft = pytest.importorskip("peft")
    base, processor = tiny_model(seed=4)
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=2,
        target_modules=r".*language_model.*\.(q_proj|v_proj|up_proj)",
        modules_to_save=["fusion", "projector"],
    )
    model = peft.get_peft_model(base, config).train()
    untouched = {n: p.clone() for n, p in base.named_parameters() if not p.requires_grad}
    trainer = trainer_for(model, tmp_path / "run", save_strategy="no")
    trainer.train()
    assert all(torch.equal(dict(base.named_parameters())[n], p) for n, p in untouched.items())
    model.eval()
    inputs = pair_inputs(processor, [0, 1])
    with torch.no_grad():
        expected = model(**inputs).logits
        before = ChangeVLMForConditionalGeneration.from_pretrained(tmp_path / "base")(**inputs).logits
    assert (expected - before).abs().max() > 1e-2  # something was learned
    if save == "adapter":
        model.save_pretrained(tmp_path / "adapter")
        names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert any("fusion" in name for name in names) and any("projector" in name for name in names)
        fresh = ChangeVLMForConditionalGeneration.from_pretrained(tmp_path / "base")
        again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
        tolerance = 0.0
    else:
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        again = ChangeVLMForConditionalGeneration.from_pretrained(tmp_path / "merged")
        tolerance = 1e-4
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", ["ours", "release"])
def test_an_adapters_folder_brings_its_base(layout, tmp_path):
    peft = pytest.importorskip("peft")
    write_release(tmp_path / "release", Sizes())
    ChangeVLMForConditionalGeneration.from_pretrained(tmp_path / "release").save_pretrained(tmp_path / "ours")
    base = ChangeVLMForConditionalGeneration.from_pretrained(tmp_path / layout)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2)
        expected = model(**inputs_for(base)).logits
        model.save_pretrained(tmp_path / "adapter")
        again = ChangeVLMForConditionalGeneration.from_pretrained(tmp_path / "adapter")
        assert torch.equal(again(**inputs_for(again)).logits, expected)


def test_inputs_of_the_layout_helper_are_two_pairs(tmp_path):
    write_release(tmp_path, Sizes())
    model = ChangeVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert model(**inputs_for(model)).change.shape == (2, 9, 128)

"""Whole checkpoints, and those that leave out what their base models hold."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from llava.errors import CheckpointError, DownloadError
from llava.model.delta_vlm.checkpoint import base_of, inspect_folder, is_delta_vlm
from llava.model.delta_vlm.configuration import DeltaVLMConfig
from llava.model.delta_vlm.modeling import DeltaVLMForConditionalGeneration
from llava.model.delta_vlm.processing import DeltaVLMProcessor
from tests.model.delta_vlm.tiny import QUESTIONS, enliven, pair_inputs, tiny_bert, tiny_config, tiny_model
from tests.tiny import tiny_tokenizer


def write_bases(folder: Path, *, rows: int = 384, bert: bool = True) -> dict[str, str]:
    """A language model and an InstructBLIP with the sizes of `tiny_config`, as transformers saves them."""
    torch.manual_seed(11)
    config = tiny_config(fusion="csrm")
    text = config.text_config
    text.vocab_size = rows
    language = AutoModelForCausalLM.from_config(text)
    vision = InstructBlipForConditionalGeneration(
        InstructBlipConfig(
            vision_config=config.vision_config.to_dict(),
            qformer_config=config.qformer_config.to_dict(),
            text_config={
                "model_type": "llama",
                **{k: v for k, v in text.to_dict().items() if k != "model_type"},
            },
            num_query_tokens=config.num_query_tokens,
            image_token_index=3,
        )
    )
    for name, model in (("language", language), ("vision", vision)):
        enliven(model)
        model.save_pretrained(folder / name)
    tiny_tokenizer("llama").save_pretrained(folder / "language")
    if bert:
        tiny_bert().save_pretrained(folder / "vision" / "qformer_tokenizer")
    return {"vision": str(folder / "vision"), "language": str(folder / "language")}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def part(bases, tmp_path_factory) -> Path:
    """A checkpoint without its base models."""
    folder = tmp_path_factory.mktemp("part")
    model, processor = tiny_model(seed=4)
    model.config.base_models = bases
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: Any, processor: DeltaVLMProcessor) -> Tensor:
    return model.eval()(**pair_inputs(processor, [0, 1], QUESTIONS)).logits


def test_a_checkpoint_without_its_bases_is_put_together(part, bases, tmp_path):
    held = load_file(part / "model.safetensors")
    made, processor = tiny_model(seed=4)
    assert set(held) == {name for name, _ in made.named_parameters() if base_of(name, made.config) is None}
    model, info = DeltaVLMForConditionalGeneration.from_pretrained(part, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = model.state_dict()
    language = AutoModelForCausalLM.from_pretrained(bases["language"]).state_dict()
    for name, value in language.items():
        ours = name if name.startswith("lm_head") else "model.language_model." + name.removeprefix("model.")
        assert torch.equal(state[ours], value), name
    whole = load_file(Path(bases["vision"]) / "model.safetensors")
    vision = {k.split("vision_model.", 1)[1]: v for k, v in whole.items() if "vision_model." in k}
    for name, value in state.items():
        if base_of(name, model.config) == "vision":
            assert torch.equal(value, vision[name.removeprefix("model.vision_tower.")]), name
    assert all(torch.equal(state[name], value) for name, value in held.items())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n, p in made.named_parameters() if p.requires_grad
    ]
    assert model.generation_config.eos_token_id == made.config.eos_token_id
    assert model.name_or_path == str(part)

    model.save_pretrained(tmp_path / "whole", whole=True)
    config, left_out = inspect_folder(str(tmp_path / "whole"))
    assert left_out == () and config.base_models is None
    again = DeltaVLMForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert torch.equal(logits(again, processor), logits(model, processor))
    model.save_pretrained(tmp_path / "part")  # by default as it came
    assert set(load_file(tmp_path / "part" / "model.safetensors")) == set(held)
    assert inspect_folder(str(tmp_path / "part"))[1] == ("vision", "language")


def test_options_and_the_model_without_head(part):
    model = DeltaVLMForConditionalGeneration.from_pretrained(part)
    bare = AutoModel.from_pretrained(part)
    for name, value in bare.state_dict().items():
        assert torch.equal(model.state_dict()["model." + name], value), name
    half = DeltaVLMForConditionalGeneration.from_pretrained(
        part, dtype="bfloat16", attn_implementation="eager", num_query_tokens=4, prompt_style="reference"
    )
    assert half.dtype == torch.bfloat16 and half.model.query_tokens.dtype == torch.float32
    assert half.model.qformer.config._attn_implementation == "eager"
    assert half.config.prompt_style == "reference"
    assert type(AutoProcessor.from_pretrained(part)) is DeltaVLMProcessor


def test_one_base_of_two(bases, tmp_path):
    model, _ = tiny_model(seed=4)
    model.config.base_models = {"language": bases["language"]}
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {base_of(name, model.config) for name in names} == {None, "vision"}
    again = DeltaVLMForConditionalGeneration.from_pretrained(tmp_path)
    held = model.state_dict()
    assert all(torch.equal(again.state_dict()[name], held[name]) for name in names)


def test_what_learned_after_all_is_written(bases, tmp_path):
    """A config may still call the language model a base that somebody has trained meanwhile."""
    model, _ = tiny_model(seed=4)
    model.config.base_models = bases
    model.lm_head.requires_grad_(True)
    model.save_pretrained(tmp_path)
    assert model.config.base_models == bases
    config, left_out = inspect_folder(str(tmp_path))
    assert left_out == ("vision",) and config.base_models == {"vision": bases["vision"]}
    again = DeltaVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    "changed", [{"tune_vision_blocks": 3}, {"tune_vision_blocks": 1}, {"tune_language_model": True}]
)
def test_going_on_with_other_parts_frozen(part, bases, tmp_path, changed):
    """The file says what it leaves out, not what is frozen from now on; what has ever learned is written."""
    whole = DeltaVLMForConditionalGeneration.from_pretrained(part).state_dict()
    fields = DeltaVLMConfig.from_pretrained(part).to_dict() | changed
    for options in (changed, {"config": DeltaVLMConfig.from_dict(fields)}):
        model = DeltaVLMForConditionalGeneration.from_pretrained(part, **options)
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in whole.items())
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
        assert learning == {name for name in whole if base_of(name, model.config) is None} - {"lm_head.bias"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in learning:
                parameter.add_(0.5)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    held = set(load_file(tmp_path / "model.safetensors"))
    assert held >= learning | set(load_file(part / "model.safetensors")) and held != set(whole)
    again = DeltaVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in state.items())
    assert set(again.config.base_models) == ({"vision"} if "tune_language_model" in changed else set(bases))
    back = DeltaVLMForConditionalGeneration.from_pretrained(tmp_path, tune_vision_blocks=2)
    assert all(torch.equal(back.state_dict()[name], value) for name, value in state.items())


def test_what_peft_merges_is_written(part, bases, tmp_path):
    """A merge adds to frozen weights: nothing is left to tell that they are not the base's any more."""
    from peft import LoraConfig, get_peft_model

    model = DeltaVLMForConditionalGeneration.from_pretrained(part)
    before = model.model.language_model.layers[0].self_attn.q_proj.weight.detach().clone()
    adapted: Any = get_peft_model(
        model, LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    )
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = DeltaVLMForConditionalGeneration.from_pretrained(tmp_path)
    weight = again.model.language_model.layers[0].self_attn.q_proj.weight
    assert torch.equal(weight, merged.model.language_model.layers[0].self_attn.q_proj.weight)
    assert not torch.equal(weight, before) and again.config.base_models is None


def test_a_partial_save_needs_bases(tmp_path):
    with pytest.raises(CheckpointError, match="names no base_models"):
        tiny_model()[0].save_pretrained(tmp_path, whole=False)


def damage(part: Path, folder: Path, change: Any) -> Path:
    """A copy of a checkpoint with its weights changed by `change(weights)`."""
    shutil.copytree(part, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


def test_faults_are_named(part, bases, tmp_path):
    def load(name: str, change: Any) -> None:
        DeltaVLMForConditionalGeneration.from_pretrained(damage(part, tmp_path / name, change))

    with pytest.raises(CheckpointError, match=r"missing \(1\): model.query_tokens"):
        load("a", lambda w: w.pop("model.query_tokens"))
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): model.more"):
        load("b", lambda w: w.update({"model.more": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"model.projector.bias is \[3\], the model has \[48\]"):
        load("c", lambda w: w.update({"model.projector.bias": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"missing \(\d+\): .*model.language_model"):
        load("d", lambda w: w.update({"lm_head.weight": torch.zeros(384, 48)}))  # half a base is none
    model, _ = tiny_model()
    model.config.base_models = bases | {"language": str(tmp_path / "nowhere")}
    model.save_pretrained(tmp_path / "e")
    with pytest.raises((DownloadError, CheckpointError), match="nowhere"):
        DeltaVLMForConditionalGeneration.from_pretrained(tmp_path / "e")
    model.config.base_models = bases | {"vision": bases["language"]}
    model.save_pretrained(tmp_path / "f")
    with pytest.raises(CheckpointError, match=r"lacks weights of the vision encoder: model\.vision_tower"):
        DeltaVLMForConditionalGeneration.from_pretrained(tmp_path / "f")


def test_a_new_fusion_on_old_weights(part, tmp_path):
    whole = DeltaVLMForConditionalGeneration.from_pretrained(part)
    whole.save_pretrained(tmp_path, whole=True)
    for folder in (part, tmp_path):
        config = DeltaVLMConfig.from_pretrained(folder, fusion={"kind": "csrm", "init": "identity"})
        model = DeltaVLMForConditionalGeneration.from_pretrained(folder, config=config, fresh_fusion=True)
        out = model.model.fusion.out.weight
        assert torch.equal(out, torch.eye(*out.shape))
        for name, value in whole.state_dict().items():
            assert "fusion" in name or torch.equal(model.state_dict()[name], value), name


def test_the_kind_of_a_folder(part, bases):
    assert is_delta_vlm(str(part)) and not is_delta_vlm(bases["language"])
    assert not is_delta_vlm(str(part / "qformer_tokenizer"))


def test_a_trainer_resumes_from_what_was_learned_alone(part, tmp_path):
    """Checkpoints on the way hold no base model either, and resuming equals an unbroken run."""

    def run(steps: int, folder: str, resume: bool = False) -> DeltaVLMForConditionalGeneration:
        model = DeltaVLMForConditionalGeneration.from_pretrained(part)
        processor = DeltaVLMProcessor.from_pretrained(part)
        texts = ["a road", "many trees", "the scene is the same"]
        rows = [
            {k: v[0] for k, v in pair_inputs(processor, [i], answers=[texts[i % 3]] * 1).items()}
            for i in range(8)
        ]
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), per_device_train_batch_size=1, max_steps=steps, save_steps=2,
            learning_rate=1e-3, lr_scheduler_type="constant", report_to="none", remove_unused_columns=False,
            use_cpu=True, disable_tqdm=True, seed=5,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=resume)
        return model

    unbroken = run(4, "a")
    run(2, "b")
    held = load_file(tmp_path / "b" / "checkpoint-2" / "model.safetensors")
    assert {base_of(name, unbroken.config) for name in held} == {None}
    resumed = run(4, "b", resume=True)
    for name, value in unbroken.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=name)

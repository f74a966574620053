"""What transformers promises of any model: attention kinds, types, devices, quick building, saving, sharing."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from accelerate import infer_auto_device_map
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

from llava.model.change_vlm import ChangeVLMForConditionalGeneration, ChangeVLMModel
from llava.model.fusion.difference import sine_position_code
from tests.tiny import pair_inputs, tiny_model


@pytest.fixture(scope="module")
def made():
    return tiny_model(seed=6)


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    made[0].save_pretrained(path)
    made[1].save_pretrained(path)
    return path


@torch.no_grad()
def logits(model, processor) -> torch.Tensor:
    return model(**pair_inputs(processor, [0, 1])).logits.float()


FLEX = pytest.param({"text_config": "flex_attention"}, marks=pytest.mark.slow)  # compiles for half a minute


@pytest.mark.parametrize(
    "attention",
    [
        FLEX,
        "eager",
        "sdpa",
        {"": "sdpa", "vision_config": "eager"},
        {"vision_config": "sdpa", "text_config": "eager"},
    ],
    ids=str,
)
def test_attention_kinds_agree(attention, made, folder):
    model, processor = made
    loaded = ChangeVLMForConditionalGeneration.from_pretrained(folder, attn_implementation=attention)
    language, tower = loaded.model.language_model.config, loaded.model.vision_tower.encoder.config
    kinds = (
        attention
        if isinstance(attention, dict)
        else dict.fromkeys(("text_config", "vision_config"), attention)
    )
    assert language._attn_implementation == kinds.get("text_config", "sdpa")
    assert tower._attn_implementation == kinds.get("vision_config", "sdpa")
    inputs = pair_inputs(processor, [0, 1])
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(**inputs).logits[seen], model(**inputs).logits[seen], rtol=1e-4, atol=1e-4
        )


def test_attention_can_be_changed_later(made):
    model, processor = tiny_model(seed=6)
    model.set_attn_implementation({"vision_config": "eager", "text_config": "eager"})
    assert model.model.vision_tower.encoder.config._attn_implementation == "eager"
    assert model.model.language_model.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(model, processor), logits(*made), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"])
def test_types_and_device_maps(device_map, dtype, made, folder):
    loaded = ChangeVLMForConditionalGeneration.from_pretrained(folder, device_map=device_map, dtype=dtype)
    expected = torch.float32 if dtype == "auto" else dtype
    assert {p.dtype for p in loaded.parameters()} == {expected}
    # in float32 whatever the weights: it is rounded once, when it is added
    assert torch.equal(loaded.model.fusion.position, sine_position_code(4, 32))
    out = logits(loaded, made[1])
    if expected == torch.float32:
        assert torch.equal(out, logits(*made))
    else:
        assert (out - logits(*made)).abs().max() < 0.2 * logits(*made).abs().max()


def test_what_stays_whole_where_a_model_is_split_over_devices(made):
    """Levels of the tower are compared with each other, and the fusion reaches into its layers past `forward`."""
    with torch.device("meta"):
        empty = ChangeVLMForConditionalGeneration(made[0].config)
    small = sum(p.numel() * 4 for p in made[0].model.fusion.parameters()) + 20_000
    places = infer_auto_device_map(
        empty, dict.fromkeys(range(40), small), no_split_module_classes=list(empty._no_split_modules)
    )
    assert not [name for name in places if re.match(r"model\.(fusion|vision_tower)\.", name)]
    assert any(name.startswith("model.language_model.layers.") for name in places)


def test_every_part_of_the_saved_model_is_what_auto_classes_load(made, folder):
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        assert type(auto.from_pretrained(folder)) is ChangeVLMForConditionalGeneration
    headless, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(headless) is ChangeVLMModel
    assert not info["missing_keys"]
    for (name, a), b in zip(headless.state_dict().items(), made[0].model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_building_from_a_config_and_on_the_meta_device(made):
    config = made[0].config
    model = AutoModelForImageTextToText.from_config(config)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.equal(model.model.fusion.position, sine_position_code(4, 32))
    flags = model.model.fusion.blocks[0].flag_before
    assert 0.005 < flags.std() < 0.05
    with torch.device("meta"):
        empty = ChangeVLMForConditionalGeneration(config)
    assert {p.device.type for p in empty.parameters()} == {"meta"}


def test_initial_weights_follow_the_rules():
    """Truncated normal 0.02, zero bias, unit norms for fusion and projector; a new fusion on a pretrained model too."""
    torch.manual_seed(0)
    model = ChangeVLMForConditionalGeneration(tiny_model()[0].config)
    for name, parameter in (
        *model.model.fusion.named_parameters(),
        *model.model.projector.named_parameters(),
    ):
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert 0.012 < parameter.std() < 0.025, name


@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_sharded_saving(size, made, tmp_path):
    model, processor = made
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "20KB")
    assert torch.equal(
        logits(ChangeVLMForConditionalGeneration.from_pretrained(tmp_path), processor), logits(*made)
    )


def test_what_a_saved_folder_holds(folder):
    for name in (
        "config.json",
        "generation_config.json",
        "processor_config.json",
        "chat_template.jinja",
        "tokenizer.json",
    ):
        assert (folder / name).is_file(), name
    assert not list(folder.glob("*.bin"))


def test_tied_embeddings_stay_tied(tmp_path):
    model, processor = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = ChangeVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(logits(again, processor), logits(model, processor))


def test_the_vocabulary_can_grow(tmp_path):
    model, processor = tiny_model()
    before = logits(model, processor)
    model.resize_token_embeddings(400)
    assert model.config.text_config.vocab_size == 400
    torch.testing.assert_close(logits(model, processor)[..., :384], before)
    model.save_pretrained(tmp_path)
    assert ChangeVLMForConditionalGeneration.from_pretrained(tmp_path).lm_head.weight.shape[0] == 400


def test_fields_can_be_overridden_while_loading(folder):
    loaded = ChangeVLMForConditionalGeneration.from_pretrained(folder, max_tiles=3)
    assert loaded.config.max_tiles == 3
    assert AutoConfig.from_pretrained(folder, max_tiles=3).max_tiles == 3


def test_weights_in_memory_are_not_looked_for_on_disk(made):
    model, processor = made
    again = ChangeVLMForConditionalGeneration.from_pretrained(
        None, config=model.config, state_dict=model.state_dict()
    )
    assert torch.equal(logits(again, processor), logits(*made))


def test_pushing_is_there_and_writes_our_names():
    push = inspect.signature(ChangeVLMForConditionalGeneration.push_to_hub).parameters
    assert {"repo_id", "private", "token"} <= set(push)
    assert "save_pretrained" in vars(ChangeVLMForConditionalGeneration.__mro__[1])


def test_quantised_loading(folder):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantised = ChangeVLMForConditionalGeneration.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    assert quantised.model.language_model.layers[0].mlp.up_proj.weight.dtype == torch.int8


def test_a_saved_model_says_how_to_generate(folder, made):
    again = ChangeVLMForConditionalGeneration.from_pretrained(folder)
    assert again.generation_config.eos_token_id == made[1].tokenizer.eos_token_id
    assert again.generation_config.pad_token_id == made[1].tokenizer.pad_token_id


@torch.no_grad()
def test_tuple_outputs(made):
    model, processor = made
    inputs = pair_inputs(processor, [0])
    assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)

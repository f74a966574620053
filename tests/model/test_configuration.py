"""The config: checked where it is made, the same after JSON, and presets of the published sizes."""

import json

import pytest
import torch
import transformers
from transformers import AutoConfig

from llava.errors import ConfigError
from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from llava.model.configuration import PRESETS, ChangeVLMConfig
from llava.model.fusion import build_fusion
from llava.model.projector import Projector
from tests.tiny import TEXT, VISION, tiny_config


def siglip_parameters(dim: int, mlp: int, layers: int, patch: int, positions: int) -> int:
    layer = 4 * (dim * dim + dim) + 2 * dim * mlp + mlp + dim + 4 * dim
    return 3 * patch * patch * dim + dim + positions * dim + layers * layer


def qwen2_parameters(dim: int, mlp: int, layers: int, kv_dim: int, vocab: int, *, tied: bool) -> int:
    layer = (dim * dim + dim) + 2 * (dim * kv_dim + kv_dim) + dim * dim + 3 * dim * mlp + 2 * dim
    return (1 if tied else 2) * vocab * dim + layers * layer + dim


def fusion_parameters(dim: int, mlp: int, depth: int) -> int:
    attention, norm = 4 * (dim * dim + dim), 2 * dim
    block = 3 * attention + 3 * norm + 2 * dim * mlp + mlp + dim + 3 * dim
    extractor = (2 * dim * dim + dim) + (3 * dim * dim + dim)
    gate = (3 * dim * dim + dim) + (dim + 1)
    return extractor + depth * block + gate


TOWER = siglip_parameters(1152, 4304, 26, 14, 729)
FUSION = fusion_parameters(1152, 4608, 2)
LLM = {
    "0.5b": (896, qwen2_parameters(896, 4864, 24, 128, 151936, tied=True)),
    "7b": (3584, qwen2_parameters(3584, 18944, 28, 512, 152064, tied=False)),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_sizes(name):
    hidden, language = LLM[name.rsplit("-", 1)[1]]
    fused = name.startswith("ccexpert")
    with torch.device("meta"):
        model = ChangeVLMForConditionalGeneration(ChangeVLMConfig.preset(name))
    counts = {
        part: sum(p.numel() for p in module.parameters()) for part, module in model.model.named_children()
    }
    assert counts["vision_tower"] == TOWER
    assert counts.get("fusion", 0) == (FUSION if fused else 0)
    assert counts["projector"] == 1152 * hidden + hidden + hidden * hidden + hidden
    newline = 0 if fused else hidden
    assert (
        model.num_parameters() == TOWER + counts.get("fusion", 0) + counts["projector"] + language + newline
    )
    assert model.config.vision_config.num_hidden_layers == 27
    assert len(model.model.vision_tower.encoder.encoder.layers) == 26
    assert (model.config.image_seq_length, model.config.image_token_id) == (729, 151646)
    assert model.config.text_config.rope_parameters["rope_theta"] == 1e6


def test_the_fusion_at_real_size():
    assert FUSION == 63_765_505


def test_preset_overrides_and_unknown_names():
    config = ChangeVLMConfig.preset("ccexpert-0.5b", vision_layers=[-1], fusion={"depth": 1})
    assert (config.vision_layers, config.fusion["depth"], config.fusion["mlp_dim"]) == ([27], 1, 4608)
    assert ChangeVLMConfig.preset("ccexpert-0.5b").vision_layers == [17, 20, 23, 26]  # untouched
    with pytest.raises(
        ConfigError, match=r"unknown preset 'ccexpert'; known: ccexpert-0\.5b, ccexpert-7b, llava-one"
    ):
        ChangeVLMConfig.preset("ccexpert")


@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize("vision", VISION)
def test_json_round_trip(vision, text, tmp_path):
    config = tiny_config(vision=vision, text=text)
    config.save_pretrained(tmp_path)
    for again in (
        AutoConfig.from_pretrained(tmp_path),
        ChangeVLMConfig.from_dict(json.loads(config.to_json_string())),
    ):
        assert type(again) is ChangeVLMConfig
        assert type(again.vision_config) is type(config.vision_config)
        assert again.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}


def test_layers_are_stored_as_positive_numbers():
    config = {"num_hidden_layers": 4}
    for given, stored in ((-2, [3]), ([-5, -1], [0, 4]), ([0, 2], [0, 2]), ([3, 1], [3, 1])):
        assert ChangeVLMConfig(vision_config=config, vision_layers=given).vision_layers == stored
    assert ChangeVLMConfig(vision_layers=[-11, -8, -5, -2]).vision_layers == [17, 20, 23, 26]


@pytest.mark.parametrize("layers", [[], [5], [-6], [1, 9], 5])
def test_layers_that_are_not_there(layers):
    with pytest.raises(ConfigError, match=r"does not fit a tower of 4 layers \(5 hidden states"):
        ChangeVLMConfig(vision_config={"num_hidden_layers": 4}, vision_layers=layers)


def test_unknown_model_types_name_the_field():
    with pytest.raises(ConfigError, match=r"text_config\.model_type='qwen99'"):
        ChangeVLMConfig(text_config={"model_type": "qwen99"})
    with pytest.raises(ConfigError, match=r"vision_config\.model_type='eye'"):
        ChangeVLMConfig(vision_config={"model_type": "eye"})


def test_sub_configs_given_as_objects_are_kept():
    vision = transformers.CLIPVisionConfig(image_size=56, patch_size=14)
    config = ChangeVLMConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(tie_word_embeddings=True)
    )
    assert config.vision_config is vision
    assert (config.grid, config.image_seq_length, config.tie_word_embeddings) == (4, 16, True)


def test_special_tokens_come_from_the_language_model():
    config = ChangeVLMConfig(text_config={"model_type": "qwen2", "eos_token_id": 5})
    assert config.eos_token_id == 5
    assert (
        ChangeVLMConfig(text_config={"model_type": "qwen2", "eos_token_id": 5}, eos_token_id=6).eos_token_id
        == 6
    )


@pytest.mark.parametrize(
    ("fusion", "message"),
    [
        ({"kind": "magic"}, "unknown fusion 'magic'; known: concat, csrm, csrm_paper, difference"),
        ({"head_dim": 5}, "head_dim=5"),
        ({"head_dim": 8, "depth": 0}, "depth=0"),
        ({"head_dim": 8, "colour": "red"}, "colour"),
    ],
)
def test_fusion_settings_that_cannot_work(fusion, message):
    with pytest.raises(ConfigError, match=message):
        ChangeVLMForConditionalGeneration(
            tiny_config().__class__(**tiny_config().to_dict() | {"fusion": fusion})
        )


def test_no_fusion_is_none():
    assert build_fusion(None, dim=8, grid=2) is None


@pytest.mark.parametrize(
    ("kind", "layers"), [("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp4x_gelu", 4)]
)
def test_projectors(kind, layers):
    projector = Projector(kind, 6, 10)
    assert sum(p.numel() for p in projector.parameters()) == 70 + (layers - 1) * 110
    x = torch.randn(2, 3, 6)
    expected = projector.layers[0](x)
    for layer in projector.layers[1:]:
        expected = layer(torch.nn.functional.gelu(expected))
    assert torch.equal(projector(x), expected)


def test_unknown_projectors_list_the_known_ones():
    with pytest.raises(ConfigError, match="unknown projector 'mlp'; known: linear, mlp1x_gelu"):
        Projector("mlp", 6, 10)

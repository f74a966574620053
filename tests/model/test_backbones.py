"""Any vision tower with any language model: forward, backward, generate, save, load; and which features come out."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel

from llava.errors import ConfigError, DataError
from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from llava.model.configuration import ChangeVLMConfig
from llava.model.vision_tower import VisionTower, _patchify
from tests.tiny import TEXT, VISION, pair_inputs, tiny_config, tiny_model


def whole_encoder(config: transformers.PreTrainedConfig) -> nn.Module:
    """The encoder as transformers builds it, nothing cut off."""
    if config.model_type == "instructblip_vision_model":
        return transformers.InstructBlipVisionModel._from_config(config)
    return AutoModel.from_config(config)


def layer_outputs(encoder: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Input of the first layer and output of every layer, taken by hooks, not from `hidden_states`."""
    stack = encoder.model.layer if hasattr(encoder, "model") else encoder.encoder.layers
    states: list[torch.Tensor] = []
    handles = [stack[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))]
    for layer in stack:
        handles.append(
            layer.register_forward_hook(
                lambda _, __, out: states.append(out[0] if isinstance(out, tuple) else out)
            )
        )
    encoder(**inputs)
    for handle in handles:
        handle.remove()
    return states


@pytest.mark.parametrize("vision", VISION)
def test_features_are_the_untruncated_encoders_hidden_states(vision):
    config = tiny_config(vision=vision).vision_config
    torch.manual_seed(1)
    whole = whole_encoder(config).eval()
    pixels = torch.randn(3, 3, 28, 28)
    inputs = _patchify(pixels, config) if vision == "siglip2" else {"pixel_values": pixels}
    with torch.no_grad():
        expected = layer_outputs(whole, inputs)
    for layers in ([0, 1, 3], [2], [4]):  # 4: the last layer's output, which no norm may touch
        tower = VisionTower(config, layers).eval()
        own = tower.encoder.state_dict()
        tower.encoder.load_state_dict(
            {name: value for name, value in whole.state_dict().items() if name in own}
        )
        assert not {name for name in own if name not in whole.state_dict()}
        with torch.no_grad():
            features = tower(pixels)
        for layer, feature in zip(layers, features, strict=True):
            assert feature.shape == (3, 16, 32)
            torch.testing.assert_close(feature, expected[layer][:, -16:], rtol=1e-5, atol=1e-6)


def test_layers_behind_the_deepest_one_asked_for_are_not_built():
    tower = VisionTower(tiny_config().vision_config, [1, 3])
    assert len(tower.encoder.encoder.layers) == 3
    assert not [name for name, _ in tower.named_parameters() if "post_layernorm" in name or "head" in name]


@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize("vision", VISION)
def test_train_generate_save_and_load(vision, text, tmp_path: Path):
    model, processor = tiny_model(vision=vision, text=text)
    inputs = pair_inputs(processor, [0, 1])
    loss = model(
        **inputs,
        labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.image_token_id, -100),
    ).loss
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []  # no dead weight
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())

    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path)
    again = ChangeVLMForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    assert torch.equal(again.generate(**inputs, max_new_tokens=4, do_sample=False), ids)


@pytest.mark.parametrize("vision", VISION)
def test_images_change_the_answer_and_their_order_counts(vision):
    model, processor = tiny_model(vision=vision)
    inputs = pair_inputs(processor, [0])
    swapped = inputs | {"pixel_values": inputs["pixel_values"].flip(1)}
    with torch.no_grad():
        logits, other = model(**inputs).logits[0, -1], model(**swapped).logits[0, -1]
    assert (logits - other).abs().max() > 1e-3 * logits.abs().max()


def test_siglip2s_image_size_follows_from_its_number_of_patches():
    config = ChangeVLMConfig(vision_config={"model_type": "siglip2_vision_model"})
    assert (config.vision_config.image_size, config.image_seq_length) == (256, 256)


def test_a_whole_models_config_gives_its_vision_part():
    whole = transformers.SiglipConfig(
        vision_config={"image_size": 28, "patch_size": 7, "num_hidden_layers": 3}
    )
    assert ChangeVLMConfig(vision_config=whole).vision_config.model_type == "siglip_vision_model"
    assert ChangeVLMConfig(vision_config=whole.to_dict()).vision_layers == [2]


def test_an_encoder_without_a_grid_of_patches_is_refused():
    with pytest.raises(ConfigError, match="patch_size"):
        ChangeVLMConfig(vision_config={"model_type": "convnext"})


def test_images_of_another_size_are_refused():
    tower = VisionTower(tiny_config(vision="dinov3").vision_config, [1])
    with pytest.raises(DataError, match=r"\(35, 35\).*28"):
        tower(torch.zeros(1, 3, 35, 35))

"""LLaVA-OneVision as transformers keeps it: the same answers as transformers' own model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from llava.model.checkpoint import inspect
from llava.model.processing import ChangeVLMProcessor
from tests.tiny import random_image, tiny_tokenizer

SIDE, PATCH = 28, 7
PINPOINTS = [[SIDE * i, SIDE * j] for i in range(1, 4) for j in range(1, 4)]


@pytest.fixture(scope="module")
def theirs() -> LlavaOnevisionForConditionalGeneration:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 384,
            "max_position_embeddings": 1024,
        },
        image_token_index=len(tokenizer),
        vision_aspect_ratio="anyres_max_4",
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=False,
    )
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
        model.model.image_newline.normal_()
    return model


@pytest.fixture(params=["the hub's names", "today's names"])
def folder(request, theirs, tmp_path) -> Path:
    old = request.param == "the hub's names"
    theirs.save_pretrained(tmp_path, save_original_format=old)
    names = load_file(tmp_path / "model.safetensors")
    assert ("language_model.model.norm.weight" in names) == old
    assert ("model.language_model.norm.weight" in names) != old
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_all_weights_arrive_and_are_saved_under_our_names(folder, theirs, tmp_path):
    ours = ChangeVLMForConditionalGeneration.from_pretrained(folder)
    assert inspect(str(folder))[1] == "hub"
    state = ours.state_dict()
    kept = {name: value for name, value in theirs.state_dict().items() if "post_layernorm" not in name}
    assert len(state) == len(kept)
    assert sorted(v.double().sum().item() for v in state.values()) == sorted(
        v.double().sum().item() for v in kept.values()
    )
    ours.save_pretrained(tmp_path / "ours")
    assert set(load_file(tmp_path / "ours" / "model.safetensors")) == set(state)


@torch.no_grad()
def test_whole_images_give_the_same_logits(folder, theirs):
    ours = ChangeVLMForConditionalGeneration.from_pretrained(folder).eval()
    pixels = torch.randn(2, 3, 3, SIDE, SIDE)
    marks = torch.full((2, 3 * 16), ours.config.image_token_id)
    ids = torch.cat([torch.randint(0, 300, (2, 4)), marks, torch.randint(0, 300, (2, 6))], dim=1)
    logits = ours(input_ids=ids, pixel_values=pixels).logits

    # transformers ends each of several images with the newline vector, the change models do not: put in by hand
    tower = theirs.model.vision_tower(pixels.flatten(0, 1), output_hidden_states=True).hidden_states[-1]
    features = theirs.model.multi_modal_projector(tower).flatten(0, 1)
    mask = (ids == ours.config.image_token_id)[..., None]
    embeds = theirs.get_input_embeddings()(ids).masked_scatter(mask, features)
    torch.testing.assert_close(logits, theirs(inputs_embeds=embeds).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [[(40, 36)], [(90, 20), (50, 50)], [(30, 200), (84, 84), (28, 28)]])
@torch.no_grad()
def test_single_images_in_views_give_the_same_logits(sizes, folder, theirs):
    ours = ChangeVLMForConditionalGeneration.from_pretrained(folder).eval()
    processor = ChangeVLMProcessor.from_pretrained(folder)
    images = [random_image(i, *size) for i, size in enumerate(sizes)]
    text = ["What is here? <image> say"] * len(images)
    inputs = processor(images=images, text=text)
    logits = ours(**inputs).logits

    reference = LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )([[image] for image in images], return_tensors="pt")
    given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    expected = theirs(
        **given, pixel_values=reference["pixel_values"], image_sizes=reference["image_sizes"]
    ).logits
    seen = inputs["attention_mask"].bool()
    # the tiles of transformers are resized in two roundings of their own: pixels differ by a level here and there
    torch.testing.assert_close(logits[seen], expected[seen], rtol=0.02, atol=0.02)

    views = [
        view[: len(ours_view)]
        for view, ours_view in zip(reference["pixel_values"], inputs["pixel_values"], strict=True)
    ]
    same = ours(**(dict(inputs) | {"pixel_values": torch.stack(views)})).logits
    torch.testing.assert_close(same[seen], expected[seen], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_views_and_whole_images_in_one_batch(folder):
    ours = ChangeVLMForConditionalGeneration.from_pretrained(folder).eval()
    processor = ChangeVLMProcessor.from_pretrained(folder)
    groups = [[random_image(0, 90, 30)], [random_image(1), random_image(2)], [], [random_image(3, 28, 28)]]
    texts = ["<image> what?", "<image><image> and now?", "no image", "<image> what?"]
    batch = ours(**processor(images=groups, text=texts)).logits[:, -1]
    for group, text, logits in zip(groups, texts, batch, strict=True):
        alone = ours(**processor(images=group, text=text)).logits[0, -1]
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)


def test_the_processor_follows_from_the_models_config(folder):
    processor = ChangeVLMProcessor.from_pretrained(folder)
    image = processor.image_processor
    assert (image.aspect, image.size, image.max_tiles, image.grid_pinpoints) == ("anyres", SIDE, 4, PINPOINTS)
    assert processor.image_seq_length == 16
    processor.save_pretrained(folder / "saved")
    again = ChangeVLMProcessor.from_pretrained(folder / "saved")
    assert again.image_processor.to_dict() == image.to_dict()

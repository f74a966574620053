"""Released layouts in, ours out, and back; every fault of a checkpoint named."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from llava.errors import CheckpointError
from llava.model.change_vlm import ChangeVLMForConditionalGeneration, ChangeVLMModel
from llava.model.checkpoint import export_release, inspect, rename
from llava.model.configuration import ChangeVLMConfig
from llava.model.processing import ChangeVLMProcessor
from tests.model.layouts import FUSION, Sizes, is_dead, random_weights, write_release
from tests.tiny import pair_inputs, tiny_model, tiny_tokenizer

SIZES = {
    "usual": Sizes(),
    "four levels, one block": Sizes(tower_layers=11, layers=(-11, -8, -5, -2), depth=1, fusion_mlp=8, seed=1),
    "one level, three blocks, tied": Sizes(layers=(-1,), depth=3, tied=True, seed=2),
    "wide, patch 2, newline": Sizes(dim=256, patch=2, grid=4, newline=True, heads=2, kv_heads=1, seed=3),
    "no dead weights, odd sizes": Sizes(
        dead=False, hidden=36, heads=3, kv_heads=3, text_layers=3, vocab=91, seed=4
    ),
    "the release's MLP": Sizes(fusion_mlp=None, tower_layers=3, seed=5),
    "bfloat16": Sizes(dtype=torch.bfloat16, seed=6),
    "baseline": Sizes(fusion=False, layers=-2, dim=40, seed=7),
    "baseline, last layer": Sizes(
        fusion=False, layers=-1, dim=12, tower_heads=2, tied=True, newline=True, seed=8
    ),
}


def inputs_for(model: ChangeVLMForConditionalGeneration) -> dict[str, Tensor]:
    """Two pairs of noise and a prompt of placeholders and words."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    side = config.vision_config.image_size
    pixels = torch.randn(2, 2, 3, side, side, generator=generator)
    marks = torch.full((2, 2 * config.image_seq_length), config.image_token_id)
    words = torch.randint(0, config.image_token_id, (2, 5), generator=generator)
    return {"input_ids": torch.cat([words[:, :1], marks, words[:, 1:]], dim=1), "pixel_values": pixels}


@torch.no_grad()
def logits_of(model: ChangeVLMForConditionalGeneration) -> Tensor:
    return model.eval()(**inputs_for(model)).logits


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_release_to_ours_and_back(sizes, tmp_path: Path):
    weights = write_release(tmp_path / "release", sizes, shards=1 + sizes.seed % 2)
    model = ChangeVLMForConditionalGeneration.from_pretrained(tmp_path / "release")
    assert model.dtype == sizes.dtype
    kept = {name: value for name, value in weights.items() if not is_dead(name, sizes)}
    state = model.state_dict()
    if sizes.tied:
        assert (
            state.pop("lm_head.weight").data_ptr()
            == state["model.language_model.embed_tokens.weight"].data_ptr()
        )
    assert set(state) == {rename(name, "release") for name in kept}
    assert [
        name for name, value in kept.items() if not torch.equal(state[rename(name, "release")], value)
    ] == []

    model.save_pretrained(tmp_path / "ours")
    held = load_file(tmp_path / "ours" / "model.safetensors")
    assert set(held) == set(state)  # our names, although they were renamed while loading
    again = ChangeVLMForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits_of(again), logits_of(model))
    again.save_pretrained(tmp_path / "twice")
    twice = load_file(tmp_path / "twice" / "model.safetensors")
    assert all(torch.equal(twice[name], value) for name, value in held.items())

    export_release(again, tmp_path / "exported", max_shard_size="60KB")
    assert len(list((tmp_path / "exported").glob("*.safetensors"))) > 1
    exported: dict[str, Tensor] = {}
    for shard in (tmp_path / "exported").glob("*.safetensors"):
        exported |= load_file(shard)
    assert set(exported) == set(kept)
    assert all(torch.equal(exported[name], value) for name, value in kept.items())
    back = ChangeVLMForConditionalGeneration.from_pretrained(tmp_path / "exported")
    assert torch.equal(logits_of(back), logits_of(model))
    notes = {"architectures": None, "_name_or_path": None}
    assert back.config.to_diff_dict() | notes == model.config.to_diff_dict() | notes


def test_the_config_says_what_the_release_says(tmp_path):
    write_release(tmp_path, SIZES["four levels, one block"])
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, ChangeVLMConfig)
    assert config.vision_layers == [1, 4, 7, 10]
    assert config.fusion == {"kind": "difference", "depth": 1, "head_dim": 128, "mlp_dim": 8}
    assert (config.grid, config.text_config.vocab_size, config.text_config.rope_parameters["rope_theta"]) == (
        3,
        70,
        1e6,
    )
    config, rest = AutoConfig.from_pretrained(
        tmp_path, return_unused_kwargs=True, image_token_id=3, colour="red"
    )
    assert (config.image_token_id, rest["colour"]) == (3, "red")


@pytest.mark.parametrize("model_type", ["llava", "qwen2", None])
def test_the_published_class_tells_a_release_whatever_its_model_type(model_type, tmp_path):
    write_release(tmp_path, Sizes(fusion=False))
    fields = json.loads((tmp_path / "config.json").read_text())
    fields |= {"model_type": model_type, "architectures": ["LlavaQwenForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model = ChangeVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert model.config.fusion is None
    assert model.config.model_type == "change_vlm"


def test_the_vocabulary_is_the_weights_not_the_configs(tmp_path):
    sizes = Sizes(vocab=77)
    write_release(tmp_path, sizes)
    fields = json.loads((tmp_path / "config.json").read_text()) | {"vocab_size": 60}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert ChangeVLMForConditionalGeneration.from_pretrained(tmp_path).config.text_config.vocab_size == 77


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(fusion=False, layers=-2)], ids=["fusion", "baseline"])
def test_auto_classes_read_a_release_folder(sizes, tmp_path):
    write_release(tmp_path, Sizes(**{**sizes.__dict__, "vocab": 384}))
    tiny_tokenizer().save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(model) is ChangeVLMForConditionalGeneration
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is ChangeVLMProcessor
    assert processor.image_token_id == model.config.image_token_id == len(tiny_tokenizer())
    assert processor.image_processor.size == 12
    model.eval()
    assert model.generate(**pair_inputs(processor, [0]), max_new_tokens=2).shape[0] == 1
    headless = AutoModel.from_pretrained(tmp_path)
    assert type(headless) is ChangeVLMModel
    assert all(
        torch.equal(a, b)
        for a, b in zip(headless.state_dict().values(), model.model.state_dict().values(), strict=True)
    )


def test_a_slow_tokenizers_files_also_say_where_the_image_token_goes(tmp_path):
    write_release(tmp_path, Sizes(vocab=384))
    vocab = {f"w{i}": i for i in range(100)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 101, "<|im_start|>": 100}))
    assert AutoConfig.from_pretrained(tmp_path).image_token_id == 102


SCRIPT = """
from llava.data.conversation import pair_conversation
from PIL import Image
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
text = processor.prompt(pair_conversation())
inputs = processor(images=[Image.new("RGB", (9, 9)), Image.new("RGB", (9, 9), "red")], text=text)
print(type(model).__name__, type(processor).__name__, model.generate(**inputs, max_new_tokens=2).shape[0])
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import llava; from transformers import AutoModelForImageTextToText, AutoProcessor",
        "import transformers, llava; from transformers import AutoModelForImageTextToText, AutoProcessor",
        "from transformers import AutoProcessor, AutoModelForImageTextToText; import llava",
    ],
)
def test_import_order_does_not_matter_and_torchvision_is_not_needed(imports, tmp_path):
    model, processor = tiny_model()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    before = f"import sys; sys.modules['torchvision'] = None; folder = {str(tmp_path)!r}\n"
    command = [sys.executable, "-c", before + imports + SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["ChangeVLMForConditionalGeneration", "ChangeVLMProcessor", "1"]


# --- faults ---------------------------------------------------------------------------------------------------------


def test_all_faults_are_named_at_once(tmp_path):
    sizes = Sizes()
    weights = random_weights(sizes)
    del weights[FUSION + "layers.1.norm2.weight"], weights["model.mm_projector.0.bias"]
    weights["model.norm.weight"] = torch.zeros(7)
    weights["model.something_new.weight"] = torch.zeros(1)
    weights[FUSION + "layers.2.norm1.weight"] = torch.zeros(128)
    write_release(tmp_path, sizes, weights)
    with pytest.raises(CheckpointError) as error:
        ChangeVLMForConditionalGeneration.from_pretrained(tmp_path)
    message = str(error.value)
    assert str(tmp_path) in message
    for said in (
        "missing (2)", "model.fusion.blocks.1.norm2.weight", "model.projector.layers.0.bias",
        "unexpected (2)", "model.something_new.weight", "model.fusion.blocks.2.norm1.weight",
        "other shape (1)", "model.language_model.norm.weight is [7], the model has [24]",
    ):  # fmt: skip
        assert said in message


@pytest.mark.parametrize("layout", ["ours", "release"])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.vision_tower"])
def test_a_missing_weight_is_an_error_in_every_layout(layout, name, tmp_path):
    weights = write_release(tmp_path / "release", Sizes())
    if layout == "ours":
        ChangeVLMForConditionalGeneration.from_pretrained(tmp_path / "release").save_pretrained(
            tmp_path / "ours"
        )
        weights = load_file(tmp_path / "ours" / "model.safetensors")
    part = name.removeprefix("model.")
    lost = next(key for key in weights if part in key)
    del weights[lost]
    save_file(weights, tmp_path / layout / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="missing.*" + rename(lost, layout)):
        ChangeVLMForConditionalGeneration.from_pretrained(tmp_path / layout)


def test_dead_weights_are_dropped_and_said_once(tmp_path, caplog):
    write_release(tmp_path, Sizes(seed=11))
    ChangeVLMForConditionalGeneration.from_pretrained(tmp_path)
    ChangeVLMForConditionalGeneration.from_pretrained(tmp_path)
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(said) == 1
    for name in (
        "norm4",
        "change_for_key_proj",
        "cross_attn",
        "mm_cc_projector",
        "post_layernorm",
        "encoder.layers.4",
    ):
        assert name in said[0]


def test_a_truncated_file_is_refused(tmp_path):
    write_release(tmp_path, Sizes())
    path = tmp_path / "model.safetensors"
    for keep in (-100, 400, 5, 0):
        whole = path.read_bytes()
        path.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            ChangeVLMForConditionalGeneration.from_pretrained(tmp_path)
        path.write_bytes(whole)
    path.write_bytes(whole[:8] + b"x" * 300 + whole[308:])
    with pytest.raises(CheckpointError, match="header"):
        ChangeVLMForConditionalGeneration.from_pretrained(tmp_path)


def test_a_lost_shard_is_named(tmp_path):
    write_release(tmp_path, Sizes(), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        ChangeVLMForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
def test_pickled_releases_load_as_tensors_only(shards, tmp_path):
    weights = write_release(tmp_path, Sizes(), shards=shards, pickled=True)
    model = ChangeVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])


class Trap:
    """What a pickle can do: run a function while it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_that_runs_code_is_refused(write, tmp_path):
    write_release(tmp_path, Sizes(), pickled=True)
    write(
        {"model.norm.weight": torch.zeros(24), "trap": Trap(tmp_path / "sprung")},
        tmp_path / "pytorch_model.bin",
    )
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin was refused"):
        ChangeVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mm_resampler_type": "perceiver"}, "mm_resampler_type='perceiver'"),
        ({"cc_expert_args": {"downsample_ratio": 2}}, "downsample_ratio=2"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "model_type='bert'"),
        ({"image_grid_pinpoints": "(1x1),...,(2x2)"}, "image_grid_pinpoints"),
    ],
)
def test_a_config_of_another_kind_is_refused(fields, message, tmp_path):
    write_release(tmp_path, Sizes())
    held = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(held | fields))
    with pytest.raises(CheckpointError, match=message):
        ChangeVLMForConditionalGeneration.from_pretrained(tmp_path)


def test_a_tower_of_unknown_size_says_what_to_do(tmp_path):
    write_release(tmp_path, Sizes())
    (tmp_path / "vision_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"some/siglip.*vision_config\.json"):
        ChangeVLMForConditionalGeneration.from_pretrained(tmp_path)


def test_the_tower_may_be_a_folder_that_the_config_names(tmp_path):
    write_release(tmp_path / "release", Sizes())
    (tmp_path / "tower").mkdir()
    vision = json.loads((tmp_path / "release" / "vision_config.json").read_text())
    (tmp_path / "tower" / "config.json").write_text(
        json.dumps({"model_type": "siglip", "vision_config": vision})
    )
    (tmp_path / "release" / "vision_config.json").unlink()
    held = json.loads((tmp_path / "release" / "config.json").read_text())
    (tmp_path / "release" / "config.json").write_text(
        json.dumps(held | {"mm_vision_tower": str(tmp_path / "tower")})
    )
    assert ChangeVLMForConditionalGeneration.from_pretrained(tmp_path / "release").config.grid == 3


def test_inspect_needs_no_weights_in_memory(tmp_path):
    write_release(tmp_path, Sizes(), shards=2)
    config, layout = inspect(str(tmp_path))
    assert (layout, config.image_newline, config.text_config.vocab_size) == ("release", False, 70)


def test_export_refuses_what_the_layout_cannot_hold(tmp_path):
    for overrides, message in (
        ({"text": "llama"}, "llama"),
        ({"vision": "clip"}, "clip"),
        ({}, "heads of 128"),
    ):
        model, _ = tiny_model(**overrides)
        with pytest.raises(CheckpointError, match=message):
            export_release(model, tmp_path / "out")
    baseline, _ = tiny_model(fusion=False)
    scaled = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    baseline.config.text_config.rope_parameters, kept = scaled, baseline.config.text_config.rope_parameters
    with pytest.raises(CheckpointError, match="rotary frequencies of type 'yarn'"):
        export_release(baseline, tmp_path / "out")
    baseline.config.text_config.rope_parameters = kept
    export_release(baseline, tmp_path / "out")
    with pytest.raises(CheckpointError, match="already holds"):
        export_release(baseline, tmp_path / "out")


def test_export_leaves_the_map_head_out_and_says_so(tmp_path, caplog):
    write_release(tmp_path / "given", Sizes())
    model = ChangeVLMForConditionalGeneration.from_pretrained(tmp_path / "given")
    model.model.fusion.map_head = torch.nn.Linear(model.config.vision_config.hidden_size, 1)
    with caplog.at_level("WARNING"):
        export_release(model, tmp_path / "out")
    assert "model.fusion.map_head.weight" in caplog.text
    again = ChangeVLMForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert again.state_dict().keys() == model.state_dict().keys() - {
        "model.fusion.map_head.weight",
        "model.fusion.map_head.bias",
    }

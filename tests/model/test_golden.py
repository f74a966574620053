"""The same numbers as the published code, from small recorded checkpoints, and as the equations in float64."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from llava.model.checkpoint import LAYOUTS, rename, to_release
from llava.model.fusion.difference import DifferenceFusion
from llava.model.projector import Projector
from tests.model.fusion_reference import fuse

LOCAL = Path(__file__).parents[1] / "golden"
FULL = Path(__file__).parents[2].parent / "shared" / "golden"  # the larger sets, beside the repository
OUTPUT, GRADIENT = 1e-5, 1e-4

models = pytest.mark.parametrize(
    "folder",
    [
        LOCAL / "baseline",
        pytest.param(
            FULL / "baseline", marks=pytest.mark.skipif(not FULL.is_dir(), reason="the large set is absent")
        ),
        pytest.param(
            FULL / "ccexpert", marks=pytest.mark.skipif(not FULL.is_dir(), reason="the large set is absent")
        ),
    ],
    ids=lambda folder: f"{folder.parent.parent.name}-{folder.name}",
)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = OUTPUT) -> None:
    """Within `tolerance` of the largest expected value."""
    assert actual.shape == expected.shape
    error, scale = (actual.double() - expected.double()).abs().max(), expected.abs().max()
    assert error <= tolerance * scale, f"off by {error / scale:.1e} of the largest value"


def expand(ids: Tensor, labels: Tensor | None, model: ChangeVLMForConditionalGeneration) -> dict[str, Tensor]:
    """The published code's ids (an image is one -200) to ours (an image is N placeholders), right-padded."""
    config, rows = model.config, []
    for i, row in enumerate(ids):
        counts = torch.where(row == -200, config.image_seq_length, 1)
        filled = row.masked_fill(row == -200, config.image_token_id).repeat_interleave(counts)
        target = (
            None if labels is None else labels[i].masked_fill(row == -200, -100).repeat_interleave(counts)
        )
        rows.append((filled, target))
    inputs = {"input_ids": torch.stack([row[0] for row in rows])}
    return inputs if labels is None else inputs | {"labels": torch.stack([row[1] for row in rows])}


@pytest.fixture(scope="module")
def load():
    held: dict[Path, ChangeVLMForConditionalGeneration] = {}

    def loaded(folder: Path) -> ChangeVLMForConditionalGeneration:
        if folder not in held:
            held[folder] = ChangeVLMForConditionalGeneration.from_pretrained(
                folder / "checkpoint", dtype=torch.float32
            )
        return held[folder]

    return loaded


@models
def test_features_loss_logits_and_gradients(folder, load):
    model = load(folder)
    given, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    pixels = given["pixel_values"].float().unflatten(0, (2, 2))
    inputs = expand(given["input_ids"], given["labels"], model)
    # padding is behind: of the mask, only the expanded text's length is known to the published code
    mask = expected["merged_attention_mask"].long()
    model.zero_grad()
    out = model(**inputs, attention_mask=mask, pixel_values=pixels)
    out.loss.backward()

    assert torch.equal(inputs["labels"].masked_fill(mask == 0, -100), expected["merged_labels"])
    features = model.get_image_features(pixels).pooler_output.unflatten(0, (4, -1)).detach()
    if "image_features" in expected:
        assert_near(features, expected["image_features"])
    else:
        assert_near(features[:, ::9], expected["image_features_every_9th"])
    rows, positions = expected["logit_positions"].unbind(1)
    assert_near(out.logits[rows, positions].detach(), expected["logits"])
    assert_near(out.loss.detach()[None], expected["loss"])

    norms = json.loads((folder / "grad_norms.json").read_text())
    ours = {to_release(name): p.grad.norm().item() for name, p in model.named_parameters()}
    unused = set(json.loads((folder / "meta.json").read_text())["params_without_gradient"])
    assert set(ours) == {name for name in norms if name not in unused}
    # a key's bias has no influence on softmax: what either code finds there is rounding
    wrong = {
        name: (norm, norms[name])
        for name, norm in ours.items()
        if abs(norm - norms[name]) > GRADIENT * norms[name]
        and not (name.endswith("k_proj.bias") and norm < 1e-5)
    }
    assert wrong == {}


@models
def test_greedy_answers(folder, load):
    model = load(folder)
    greedy = json.loads((folder / "meta.json").read_text())["greedy"]
    pixels = load_file(folder / "inputs.safetensors")["pixel_values"].float().unflatten(0, (2, 2))
    for i, (prompt, answer) in enumerate(zip(greedy["prompt_ids"], greedy["token_ids"], strict=True)):
        inputs = expand(torch.tensor([prompt]), None, model)
        out = model.generate(**inputs, pixel_values=pixels[i : i + 1], do_sample=False, max_new_tokens=10)
        assert out[0, inputs["input_ids"].shape[1] :].tolist() == answer


@models
def test_saving_and_exporting_keep_the_numbers(folder, load, tmp_path):
    from llava.model.checkpoint import export_release

    model = load(folder)
    model.save_pretrained(tmp_path / "ours")
    export_release(model, tmp_path / "release")
    given = load_file(folder / "checkpoint" / "model.safetensors")
    exported = load_file(tmp_path / "release" / "model.safetensors")
    assert set(exported) < set(given)
    assert [name for name, value in exported.items() if not torch.equal(value, given[name].float())] == []
    for written in ("ours", "release"):
        again = ChangeVLMForConditionalGeneration.from_pretrained(tmp_path / written, dtype=torch.float32)
        for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
            assert name == other
            assert torch.equal(a, b)


def test_fusion_and_projector_of_the_published_code():
    weights = {
        rename(name, "release"): value.float()
        for name, value in load_file(LOCAL / "ccexpert" / "fusion_and_projector.safetensors").items()
    }
    pair = load_file(LOCAL / "ccexpert" / "pair.safetensors")
    fusion, projector = DifferenceFusion(dim=128, grid=7, mlp_dim=128), Projector("mlp2x_gelu", 128, 128)
    for module, prefix in ((fusion, "model.fusion."), (projector, "model.projector.")):
        module.load_state_dict(
            {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        )
    with torch.no_grad():
        fused = fusion(pair["levels"][:1], pair["levels"][1:])
        features = projector(torch.cat([fused.before, fused.after]))
    assert_near(features, pair["image_features"])


@pytest.mark.skipif(not FULL.is_dir(), reason="the large set is absent")
def test_fusion_alone():
    folder = FULL / "fusion"
    weights = {
        rename("model.vision_resampler." + name, "release").removeprefix("model.fusion."): value.float()
        for name, value in load_file(folder / "state_dict.safetensors").items()
    }
    fusion = DifferenceFusion(dim=256, grid=7, mlp_dim=256)
    own = {name: weights[name] for name in fusion.state_dict()}
    fusion.load_state_dict(own)
    given = {name: value.float() for name, value in load_file(folder / "inputs.safetensors").items()}
    expected = load_file(folder / "expected.safetensors")
    levels = [torch.stack([given[f"in.{x}.{i}"] for i in range(4)], dim=1).requires_grad_() for x in "AB"]
    fused = fusion(*levels)
    outputs = {"A": fused.before, "B": fused.after, "change": fused.change}
    for name, output in outputs.items():
        assert_near(output.detach(), expected[f"out.{name}"])
    sum((output * given[f"coef.{name}"]).sum() for name, output in outputs.items()).backward()
    for x, level in zip("AB", levels, strict=True):
        for i in range(4):
            assert_near(level.grad[:, i], expected[f"grad.{x}.{i}"], GRADIENT)
    gradients = {
        to_release("model.fusion." + n).removeprefix("model.vision_resampler."): p.grad
        for n, p in fusion.named_parameters()
    }
    compared = [name for name in expected if name.startswith("grad.param.")]
    assert compared
    for name in compared:
        assert_near(gradients[name.removeprefix("grad.param.")], expected[name], GRADIENT)


@pytest.mark.parametrize(
    ("dim", "head_dim", "levels", "grid", "depth", "mlp_dim"),
    [(16, 8, 2, 3, 2, 24), (8, 8, 1, 2, 1, 5), (24, 4, 3, 2, 3, 7)],
)
def test_fusion_is_the_papers_equations(dim, head_dim, levels, grid, depth, mlp_dim):
    torch.manual_seed(0)
    fusion = DifferenceFusion(dim, grid, depth, head_dim, mlp_dim).double()
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.normal_(std=0.5)
    weights = {
        to_release("model.fusion." + name).removeprefix("model.vision_resampler."): value
        for name, value in fusion.named_parameters()
    }
    before, after = (torch.randn(2, levels, grid**2, dim, dtype=torch.float64) for _ in range(2))
    fused = fusion(before, after)
    coefficients = torch.randn(3, 2, grid**2, dim, dtype=torch.float64)
    expected = torch.stack(
        [torch.stack(fuse(weights, a, b, head_dim)) for a, b in zip(before, after, strict=True)], 1
    )
    # the position code is kept in float32
    assert_near(torch.stack([fused.before, fused.after, fused.change]).detach(), expected.detach(), 1e-6)

    actual = torch.autograd.grad(
        (torch.stack([fused.before, fused.after, fused.change]) * coefficients).sum(), fusion.parameters()
    )
    wanted = torch.autograd.grad((expected * coefficients).sum(), fusion.parameters())
    for (name, _), a, b in zip(fusion.named_parameters(), actual, wanted, strict=True):
        scale = max(b.abs().max(), torch.tensor(1e-3))
        assert (a - b).abs().max() <= GRADIENT * scale, name


def test_every_name_of_the_release_goes_there_and_back():
    names = json.loads((LOCAL / "baseline" / "grad_norms.json").read_text())
    names = [
        *names,
        *load_file(LOCAL / "ccexpert" / "fusion_and_projector.safetensors"),
        "model.image_newline",
    ]
    assert [name for name in names if to_release(rename(name, "release")) != name] == []
    assert set(LAYOUTS) == {"release", "hub", "ours"}

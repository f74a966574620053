"""DeltaVLM's fusions by themselves and inside ChangeVLM: what they compute, where they start, what learns."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.errors import ConfigError
from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from llava.model.fusion import CSRM, FUSIONS, ConcatFusion, PaperCSRM, build_fusion
from tests.tiny import DIFFERENCE, pair_inputs, tiny_config, tiny_model

DIM, LEVELS, TOKENS = 8, 2, 5


def features(seed: int = 0) -> tuple[Tensor, Tensor]:
    """before and after, [3, L, N, D]."""
    generator = torch.Generator().manual_seed(seed)
    before, after = torch.randn(2, 3, LEVELS, TOKENS, DIM, generator=generator)
    return before, after


@torch.no_grad()
def test_the_release_form_token_by_token():
    torch.manual_seed(0)
    fusion = CSRM(DIM, init="default").eval()
    before, after = features()
    fused = fusion(before, after)
    weight = {name: value.double() for name, value in fusion.named_parameters()}
    for dated, image in ((fused.before, before), (fused.after, after)):
        f, d = image[1, -1, 2].double(), (after - before)[1, -1, 2].double()
        context = torch.tanh(
            weight["context_diff.weight"] @ d
            + weight["context_feat.weight"] @ f
            + weight["context_feat.bias"]
        )
        gate = torch.sigmoid(
            weight["gate_diff.weight"] @ d + weight["gate_feat.weight"] @ f + weight["gate_feat.bias"]
        )
        wanted = weight["out.weight"] @ torch.cat([f, d, gate * context]) + weight["out.bias"]
        torch.testing.assert_close(dated[1, 2].double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(fused.change, (after - before)[:, -1])


@torch.no_grad()
def test_the_paper_form_is_the_release_form_with_tied_weights_and_no_output():
    torch.manual_seed(0)
    release, paper = CSRM(DIM, init="default").eval(), PaperCSRM(DIM)
    for part in ("context", "gate"):
        joined = torch.cat([getattr(release, f"{part}_{x}").weight for x in ("diff", "feat")], dim=1)
        for date in ("before", "after"):
            twin = getattr(paper, f"{part}_{date}")
            twin.weight.copy_(joined)
            twin.bias.copy_(getattr(release, f"{part}_feat").bias)
    release.out.weight.zero_()[:, -DIM:] = torch.eye(DIM)
    release.out.bias.zero_()
    for one, other in zip(release(*features()), paper(*features()), strict=True):
        torch.testing.assert_close(one, other)


def test_the_paper_form_has_weights_of_each_date():
    torch.manual_seed(0)
    fusion = PaperCSRM(DIM)
    before, after = features()
    fusion(before, after).before.sum().backward()
    assert {name.split(".")[0] for name, p in fusion.named_parameters() if p.grad is not None} == {
        "context_before", "gate_before"
    }  # fmt: skip


@pytest.mark.parametrize(("build", "count"), [(CSRM, 13_881_472), (PaperCSRM, 15_865_344), (ConcatFusion, 0)])
def test_parameters_at_full_size(build, count):
    with torch.device("meta"):
        fusion = build(1408)
    assert sum(p.numel() for p in fusion.parameters()) == count


@torch.no_grad()
def test_concat_leaves_both_dates_as_they_are_and_can_mark_them():
    before, after = features()
    fused = ConcatFusion(DIM)(before, after)
    assert torch.equal(fused.before, before[:, -1]) and torch.equal(fused.after, after[:, -1])
    dated = ConcatFusion(DIM, temporal_embedding=True)
    fused = dated(before, after)
    marks = [fused.before - before[:, -1], fused.after - after[:, -1]]
    for mark, vector in zip(marks, dated.temporal.weight, strict=True):
        torch.testing.assert_close(mark, vector.expand_as(mark))
    assert not torch.equal(*dated.temporal.weight)


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_the_identity_start_hands_on_what_it_gets(training):
    fusion = CSRM(DIM).train(training)
    before, after = features()
    fused = fusion(before, after)
    assert torch.equal(fused.before, before[:, -1]) and torch.equal(fused.after, after[:, -1])


@torch.no_grad()
@pytest.mark.parametrize("build", [CSRM, ConcatFusion])
def test_a_pair_without_change(build):
    torch.manual_seed(0)
    fusion = build(DIM, **({"init": "default"} if build is CSRM else {})).eval()
    before, _ = features()
    fused = fusion(before, before)
    assert not fused.change.any() and torch.equal(fused.before, fused.after)


@torch.no_grad()
def test_dates_cannot_change_places_unnoticed():
    torch.manual_seed(0)
    fusion = CSRM(DIM, init="default").eval()
    before, after = features()
    there, back = fusion(before, after), fusion(after, before)
    assert not torch.allclose(there.before, back.after)


@torch.no_grad()
def test_dropout_is_drawn_for_each_gate_and_date():
    torch.manual_seed(0)
    fusion = CSRM(DIM, init="default", dropout=0.5).train()
    fusion.out.weight.zero_()[:, -DIM:] = torch.eye(DIM)  # shows G C alone
    fusion.out.bias.zero_()
    before = torch.randn(1, 1, 5000, DIM)
    fused = fusion(before, before + 1)
    kept = fused.before != 0, fused.after != 0
    for one in kept:  # both gate and context must have been kept, a quarter
        assert one.float().mean() == pytest.approx(0.25, abs=0.02)
    assert (kept[0] & kept[1]).float().mean() == pytest.approx(1 / 16, abs=0.01)
    fusion.eval()
    assert torch.equal(fusion(before, before + 1).before, fusion(before, before + 1).before)


def learned(fusion: torch.nn.Module) -> set[str]:
    """Weights that get a gradient other than zero."""
    fusion.zero_grad()
    fused = fusion(*features())
    (fused.before.square().sum() + (fused.after**3).sum()).backward()
    return {name for name, p in fusion.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def test_every_weight_learns_at_once_or_from_the_second_step():
    torch.manual_seed(0)
    everything = {name for name, _ in CSRM(DIM).named_parameters()}
    assert learned(CSRM(DIM, init="default").train()) == everything
    fusion = CSRM(DIM).train()
    assert learned(fusion) == {"out.weight", "out.bias"}
    torch.optim.SGD(fusion.parameters(), lr=1e-3).step()
    assert learned(fusion) == everything


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "csrm", "init": "zeros"}, "unknown fusion.init 'zeros'; known: identity, default"),
        ({"kind": "csrm", "dropout": 1.0}, "fusion.dropout=1.0"),
        ({"kind": "csrm_paper", "dropout": 0.1}, "dropout"),
        ({"kind": "csmr"}, "unknown fusion 'csmr'; known: concat, csrm, csrm_paper, difference"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_fusion(settings, dim=DIM, grid=2)


# --- inside ChangeVLM ------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "csrm": {"kind": "csrm"},
    "csrm default": {"kind": "csrm", "init": "default"},
    "csrm_paper": {"kind": "csrm_paper"},
    "concat": {"kind": "concat"},
    "concat dated": {"kind": "concat", "temporal_embedding": True},
    "difference": DIFFERENCE,
}


def test_no_kind_is_forgotten_here():
    assert {settings["kind"] for settings in SETTINGS.values()} == set(FUSIONS)


@pytest.mark.parametrize("vision", ["siglip", "eva"])
@pytest.mark.parametrize("fusion", SETTINGS.values(), ids=SETTINGS)
def test_change_vlm_with_every_fusion_trains_and_generates(fusion, vision):
    model, processor = tiny_model(vision=vision, fusion=fusion)
    inputs = pair_inputs(processor, [0, 1])
    length = inputs["input_ids"].shape[1]
    answers = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)[:, length:]
    assert answers.shape == (2, 3)
    with torch.no_grad():
        swapped = model(**inputs | {"pixel_values": inputs["pixel_values"].flip(1)}).logits
        assert not torch.allclose(
            model(**inputs).logits, swapped, atol=1e-4
        )  # positions tell the dates apart
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        still = [
            n for n, p in model.model.fusion.named_parameters() if p.grad is None or not p.grad.abs().sum()
        ]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(math.isfinite(loss) for loss in losses)
    assert still == []  # at the second step


def test_change_vlm_starts_and_keeps_them_as_asked(tmp_path):
    model = ChangeVLMForConditionalGeneration(tiny_config(fusion={"kind": "csrm"}))
    out = model.model.fusion.out
    assert torch.equal(out.weight, torch.eye(*out.weight.shape)) and not out.bias.any()
    gate = model.model.fusion.gate_feat
    bound = 1 / math.sqrt(gate.in_features)
    assert gate.weight.detach().std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert 0.95 * bound < gate.weight.abs().max() <= bound and gate.bias.any()
    model.save_pretrained(tmp_path)
    again = ChangeVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.fusion == {"kind": "csrm", "dropout": 0.5, "init": "identity"}
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("fusion", SETTINGS.values(), ids=SETTINGS)
def test_a_new_fusion_on_old_weights_starts_as_a_new_model_does(fusion, tmp_path):
    ChangeVLMForConditionalGeneration(tiny_config()).save_pretrained(tmp_path)
    model = ChangeVLMForConditionalGeneration.from_pretrained(
        tmp_path, config=tiny_config(fusion=fusion), fresh_fusion=True
    )
    new = ChangeVLMForConditionalGeneration(tiny_config(fusion=fusion))
    for (name, value), other in zip(
        model.model.fusion.named_parameters(), new.model.fusion.parameters(), strict=True
    ):
        assert value.isfinite().all(), name
        assert float(value.detach().norm()) == pytest.approx(float(other.detach().norm()), rel=0.6), name

"""The difference-aware fusion against its equations: values, gradients, work done and memory held."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.fusion import (
    count_flop,
    held_bytes,
    plain_fusion,
    plain_position,
    saved_for_backward,
    set_checkpointing,
)
from llava.errors import ConfigError
from llava.model.checkpoint import rename
from llava.model.fusion import DifferenceFusion, FusedPair, build_fusion, difference

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "fusion"


def make(
    dim: int = 16, grid: int = 3, *, dtype: torch.dtype = torch.float64, **sizes: int
) -> DifferenceFusion:
    """A small fusion whose weights are large enough for every part to matter."""
    torch.manual_seed(0)
    fusion = DifferenceFusion(dim, grid, **{"depth": 2, "head_dim": 8, "mlp_dim": 24, **sizes}).to(dtype)
    for weight in fusion.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    fusion.register_buffer("position", plain_position(grid, dim).to(dtype), persistent=False)
    return fusion


def draw(fusion: DifferenceFusion, pairs: int = 1, levels: int = 2) -> tuple[Tensor, Tensor]:
    """Features of two dates, [B, L, N, D] each."""
    position = fusion.get_buffer("position")
    shape = (pairs, levels, *position.shape[1:])
    before, after = torch.randn(2, *shape, dtype=position.dtype)
    return before.requires_grad_(), after.requires_grad_()


def outputs(fused: FusedPair) -> tuple[Tensor, Tensor, Tensor]:
    return fused.before, fused.after, fused.change


def gradients(fused: FusedPair, leaves: list[Tensor]) -> list[Tensor]:
    """Of a loss that weighs every output value differently."""
    loss = sum((x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in outputs(fused))
    return list(torch.autograd.grad(loss, leaves))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    grid=st.integers(1, 4),
    depth=st.integers(1, 3),
    levels=st.integers(1, 4),
    pairs=st.integers(1, 3),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8]),
)
def test_values_and_gradients_are_those_of_the_equations(
    grid: int, depth: int, levels: int, pairs: int, heads: int, head_dim: int
) -> None:
    fusion = make(heads * head_dim, grid, depth=depth, head_dim=head_dim)
    before, after = draw(fusion, pairs, levels)
    weights = dict(fusion.named_parameters())
    ours = fusion(before, after)
    plain = plain_fusion(weights, before, after, fusion.get_buffer("position"), head_dim)
    torch.testing.assert_close(outputs(ours), outputs(plain))
    leaves = [before, after, *weights.values()]
    torch.testing.assert_close(gradients(ours, leaves), gradients(plain, leaves))


def test_every_weight_is_used() -> None:
    fusion = make()
    grads = gradients(fusion(*draw(fusion)), list(fusion.parameters()))
    flat = {
        name
        for (name, _), grad in zip(fusion.named_parameters(), grads, strict=True)
        if grad.abs().max() < 1e-9
    }
    # a constant added to every key moves no softmax: these exist because the released weights have them
    assert all(name.endswith("k_proj.bias") for name in flat)


def test_checkpointed_blocks_give_the_same_gradients_and_hold_less() -> None:
    fusion = make()
    before, after = draw(fusion)
    leaves = [before, after, *fusion.parameters()]
    found = []
    for on in (False, True):
        set_checkpointing(fusion, on)
        found.append(
            (gradients(fusion(before, after), leaves), held_bytes(lambda: fusion(before, after), leaves))
        )
    (plain, plain_bytes), (checkpointed, checkpointed_bytes) = found
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)
    assert checkpointed_bytes < plain_bytes / 2


def test_no_attention_map_is_held_for_backward() -> None:
    fusion = make(grid=5)  # N = 25, unlike any width here
    before, after = draw(fusion)
    tokens = before.shape[2]
    maps = {(tokens, k * tokens) for k in (1, 2, 3)}

    def held(call: object) -> list[tuple[int, ...]]:
        return [tuple(x.shape) for x in saved_for_backward(call, []) if x.dim() > 1]

    assert not [shape for shape in held(lambda: fusion(before, after)) if shape[-2:] in maps]
    weights, position = dict(fusion.named_parameters()), fusion.get_buffer("position")
    plain = held(lambda: plain_fusion(weights, before, after, position, 8))
    assert {shape[-2:] for shape in plain} >= maps  # the published way keeps all three kinds


@pytest.mark.parametrize(("grid", "dim"), [(1, 4), (2, 12), (5, 8), (27, 32)])
def test_position_code_is_the_formula(grid: int, dim: int) -> None:
    code = DifferenceFusion(dim, grid, depth=1, head_dim=dim, mlp_dim=4).get_buffer("position")
    torch.testing.assert_close(code, plain_position(grid, dim).float(), rtol=0, atol=2e-6)


def test_position_code_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fusion = make()

    def again(*_: object) -> Tensor:
        raise AssertionError("built again")

    monkeypatch.setattr(difference, "sine_position_code", again)
    fusion(*draw(fusion))
    assert "position" not in fusion.state_dict()


def test_the_order_of_the_dates_matters_through_the_flags_and_the_difference() -> None:
    fusion = make()
    before, after = draw(fusion)

    def change(swapped: bool) -> Tensor:
        return fusion(*((after, before) if swapped else (before, after))).change

    assert not torch.allclose(change(False), change(True))
    with torch.no_grad():
        dim = before.shape[-1]
        w1, w2, w3 = fusion.difference.proj.weight.split(dim, dim=1)
        w2.copy_(w1)  # W_p [A' ; B' ; A' - B'] no longer knows which is which ...
        w3.zero_()
    assert not torch.allclose(change(False), change(True))
    with torch.no_grad():
        for block in fusion.blocks:
            block.flag_after.copy_(block.flag_before)  # ... and now nothing does
        gate = fusion.level_gate.fc1.weight
        gate[:, dim : 2 * dim] = gate[:, :dim]
    torch.testing.assert_close(change(False), change(True))
    one, other = fusion(before, after), fusion(after, before)
    torch.testing.assert_close(one.before, other.after)


def test_pairs_of_a_batch_do_not_mix() -> None:
    fusion = make()
    before, after = draw(fusion, pairs=3)
    together = fusion(before, after)
    for i in range(3):
        alone = fusion(before[i : i + 1], after[i : i + 1])
        torch.testing.assert_close(outputs(alone), tuple(x[i : i + 1] for x in outputs(together)))


def test_bfloat16_stays_near_the_equations() -> None:
    fusion = make(dim=32, grid=4, head_dim=16, dtype=torch.bfloat16)
    for weight in fusion.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    before, after = draw(fusion, levels=4)
    fused = fusion(before, after)
    wide = {name: weight.double() for name, weight in fusion.named_parameters()}
    plain = plain_fusion(wide, before.double(), after.double(), plain_position(4, 32), 16)
    for ours, theirs in zip(outputs(fused), outputs(plain), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()
    assert all(grad.isfinite().all() for grad in gradients(fused, list(fusion.parameters())))


@pytest.mark.parametrize(("pairs", "levels", "depth"), [(1, 4, 2), (2, 3, 1)])
def test_work_is_the_closed_formula(pairs: int, levels: int, depth: int) -> None:
    dim, grid = 16, 3
    fusion = make(dim, grid, depth=depth, mlp_dim=4 * dim)
    tokens, rows = grid**2, pairs * levels
    gate = 2 * rows * (3 * dim * dim + dim)
    work = [2 * rows * tokens * depth * (k * dim**2 + 16 * tokens * dim) + gate for k in (36, 39)]
    before, after = draw(fusion, pairs, levels)
    weights, position = dict(fusion.named_parameters()), fusion.get_buffer("position")
    assert count_flop(lambda: fusion(before, after)) == work[0]
    assert count_flop(lambda: plain_fusion(weights, before, after, position, 8)) == work[1]


def test_work_at_real_size_is_within_the_promise() -> None:
    dim, tokens, blocks = 1152, 729, 4 * 2
    ours, release = (2e-9 * tokens * blocks * (k * dim**2 + 16 * tokens * dim) for k in (36, 39))
    assert release == pytest.approx(760.5, abs=0.1)
    assert ours <= 0.97 * release


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dim": 20, "head_dim": 8}, r"head_dim=8 .* width 20"),
        ({"dim": 6, "head_dim": 6}, r"\(and 4\) must divide the tower's width 6"),
        ({"dim": 16, "head_dim": 8, "depth": 0}, r"depth=0 must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DifferenceFusion(grid=3, **sizes)


def test_settings_choose_the_fusion() -> None:
    assert build_fusion(None, dim=16, grid=3) is None
    built = build_fusion({"kind": "difference", "head_dim": 8, "depth": 3, "mlp_dim": 8}, dim=16, grid=3)
    assert isinstance(built, DifferenceFusion) and len(built.blocks) == 3
    with pytest.raises(ConfigError, match="breadth"):
        build_fusion({"kind": "difference", "breadth": 2}, dim=128, grid=3)
    with pytest.raises(ValueError, match=r"unknown fusion 'sum'; known: .*difference"):
        build_fusion({"kind": "sum"}, dim=16, grid=3)


@pytest.mark.skipif(not GOLDEN.exists(), reason="the recorded outputs of the published code are not here")
def test_published_code_gives_the_same() -> None:
    from safetensors.torch import load_file

    meta = json.loads((GOLDEN / "meta.json").read_text())
    unused = set(meta["params_without_gradient"])
    prefix = "model.vision_resampler."

    def ours(name: str) -> str:
        return rename(prefix + name, "release").removeprefix("model.fusion.")

    weights = load_file(GOLDEN / "state_dict.safetensors")
    sizes = meta["cc_expert_args"]
    fusion = DifferenceFusion(sizes["embedding_dim"], 7, sizes["per_expert_depth"], mlp_dim=sizes["mlp_dim"])
    fusion.load_state_dict({ours(k): v.float() for k, v in weights.items() if k not in unused})
    recorded = {name: x.float() for name, x in load_file(GOLDEN / "inputs.safetensors").items()}
    before, after = (
        torch.stack([recorded[f"in.{date}.{i}"] for i in range(meta["levels"])], dim=1).requires_grad_()
        for date in "AB"
    )
    expected = load_file(GOLDEN / "expected.safetensors")

    def near(x: Tensor, name: str, tolerance: float) -> None:
        assert (x - expected[name]).abs().max() <= tolerance * expected[name].abs().max(), name

    fused = dict(zip(("A", "B", "change"), outputs(fusion(before, after)), strict=True))
    loss = sum((x * recorded[f"coef.{name}"]).sum() for name, x in fused.items())
    loss.backward()
    for name, x in fused.items():
        near(x, f"out.{name}", 1e-5)
    for i in range(meta["levels"]):
        near(before.grad[:, i], f"grad.A.{i}", 1e-4)
        near(after.grad[:, i], f"grad.B.{i}", 1e-4)
    grads = {name: weight.grad for name, weight in fusion.named_parameters()}
    for name in (name for name in expected if name.startswith("grad.param.")):
        near(grads[ours(name.removeprefix("grad.param."))], name, 1e-4)
    norms = {ours(name): norm for name, norm in meta["param_grad_norms"].items() if name not in unused}
    assert norms.keys() == grads.keys()
    for name, norm in norms.items():
        assert grads[name].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-3), name

"""The loss in chunks equals that of all logits, in value and gradients, and never holds them all."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava.model import loss as loss_module
from llava.model.loss import LanguageHead, head_loss, rows_at_once, summed_cross_entropy
from tests.tiny import tiny_model


class Foreign(nn.Module):
    """A head that only makes logits."""

    def __init__(self, head: LanguageHead) -> None:
        super().__init__()
        self.weight, self.out_features, self.calls = head.weight, head.out_features, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.linear(x, self.weight)


def made(
    batch: int,
    length: int,
    vocabulary: int,
    seed: int,
    labelled: float = 0.5,
    dtype: torch.dtype = torch.float64,
) -> tuple[LanguageHead, Tensor, Tensor, Tensor]:
    """Head, hidden [B, T, 5], labels and label weights [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    head = LanguageHead(5, vocabulary).to(dtype)
    with torch.no_grad():
        head.weight.copy_(2 * torch.randn(vocabulary, 5, generator=generator))
    hidden = (3 * torch.randn(batch, length, 5, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) > labelled] = -100
    return head, hidden, labels, torch.randint(4, (batch, length), generator=generator).float()


def reference(
    head: LanguageHead, hidden: Tensor, labels: Tensor, weights: Tensor | None, items: Any
) -> Tensor:
    """Straight from the definition: all logits, all positions."""
    logits, targets = hidden[:, :-1] @ head.weight.T, labels[:, 1:]
    told = targets != -100
    chosen = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    counted = told if weights is None else told * weights[:, 1:]
    return -(chosen * counted).sum() / (counted.sum() if items is None else items)


def gradients(value: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return value, *torch.autograd.grad(value, leaves)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(2, 9), st.integers(2, 11), st.integers(0, 10**6), st.integers(1, 120),
    st.booleans(), st.sampled_from([None, 7, torch.tensor(7), torch.tensor(2.5)]), st.booleans(),
)  # fmt: skip
def test_any_chunk_gives_the_loss_of_all_logits(
    batch, length, vocabulary, seed, at_once, weighted, items, foreign
):
    head, hidden, labels, weights = made(batch, length, vocabulary, seed)
    labels[0, -1] = 0  # one at least
    given_weights = weights + 1 if weighted else None
    wanted = gradients(reference(head, hidden, labels, given_weights, items), hidden, head.weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "CHUNK_LOGITS", at_once)
        used = Foreign(head) if foreign else head
        found = gradients(head_loss(used, hidden, labels, given_weights, items), hidden, head.weight)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_finite_differences(monkeypatch):
    head, hidden, labels, weights = made(2, 6, 7, seed=1)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 3 * 7)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(head, {"weight": weight}, (rows(hidden),), arguments)

    targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    kept = targets != -100
    arguments = {"targets": targets[kept], "weights": weights.flatten()[kept]}

    def rows(x: Tensor) -> Tensor:
        return x.flatten(0, 1)[kept]

    assert int(kept.sum()) > 3
    assert torch.autograd.gradcheck(loss, (hidden, head.weight))


class Largest(TorchDispatchMode):
    """Remembers the most rows of any tensor as wide as the vocabulary."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.dim() and x.shape[-1] == self.width:
                self.rows = max(self.rows, x.numel() // self.width)
        return out


@pytest.mark.parametrize("foreign", [False, True])
def test_no_tensor_holds_more_logits_than_a_chunk(foreign, monkeypatch):
    head, hidden, labels, _ = made(2, 40, 13, seed=2, labelled=0.9)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 13 * 8 + 5)
    with Largest(13) as seen:
        head_loss(Foreign(head) if foreign else head, hidden, labels).backward()
    assert 6 < seen.rows <= 8
    with Largest(13) as seen:
        reference(head, hidden, labels, None, None).backward()
    assert seen.rows == 78


def test_rows_of_a_chunk_follow_from_the_vocabulary():
    assert rows_at_once(151_936) == 220
    assert rows_at_once(10**9) == 1


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("items", [None, 0, torch.tensor(0), 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_without_labels_the_loss_is_nought_with_gradients(foreign, items, weighted):
    head, hidden, labels, weights = made(2, 5, 7, seed=3, labelled=-1)
    loss = head_loss(Foreign(head) if foreign else head, hidden, labels, weights if weighted else None, items)
    assert loss.shape == () and loss.item() == 0
    loss.backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))


def test_the_first_label_of_a_row_counts_nowhere():
    head, hidden, labels, _ = made(2, 5, 7, seed=3, labelled=-1)
    labels[:, 0] = 4
    assert head_loss(head, hidden, labels).item() == 0
    assert not head_loss(head, hidden, labels).isnan()


@pytest.mark.parametrize("foreign", [False, True])
def test_a_frozen_head_passes_gradients_on(foreign, monkeypatch):
    head, hidden, labels, _ = made(2, 9, 7, seed=4)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 3 * 7)
    (wanted,) = torch.autograd.grad(reference(head, hidden, labels, None, None), hidden)
    head.weight.requires_grad_(False)
    head_loss(Foreign(head).requires_grad_(False) if foreign else head, hidden, labels).backward()
    torch.testing.assert_close(hidden.grad, wanted)
    assert head.weight.grad is None


def test_without_gradients_it_is_a_number(monkeypatch):
    head, hidden, labels, _ = made(2, 9, 7, seed=4)
    with torch.no_grad():
        loss = head_loss(head, hidden, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(head, hidden, labels, None, None))


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_with_softmax_in_float32(autocast, monkeypatch):
    """Equal to torch's own linear layer and cross entropy in the same precision."""
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 20 * 300)
    head, hidden, labels, _ = made(2, 40, 300, seed=5, dtype=torch.float32 if autocast else torch.bfloat16)
    targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()

    def plain() -> Tensor:
        logits = F.linear(hidden, head.weight).flatten(0, 1)
        assert logits.dtype == torch.bfloat16
        return F.cross_entropy(logits.float(), targets)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        wanted, found = plain(), head_loss(head, hidden, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    for a, b in zip(
        torch.autograd.grad(found, (hidden, head.weight)),
        torch.autograd.grad(wanted, (hidden, head.weight)),
        strict=True,
    ):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.01 * float(b.abs().max()))


def test_the_head_is_called_once_and_one_that_is_gathered_from_ranks_too(monkeypatch):
    """Ranks with more chunks than others would wait for them in ZeRO-3, which gathers weights at each call."""
    head, hidden, labels, _ = made(2, 30, 7, seed=6)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 3 * 7)
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    head_loss(head, hidden, labels)
    assert len(calls) == 1
    foreign = Foreign(head)
    head_loss(foreign, hidden, labels)
    assert foreign.calls > 5
    foreign.calls, foreign.weight.ds_id = 0, 3
    head_loss(foreign, hidden, labels)
    assert foreign.calls == 1


def test_a_chunk_for_a_head_of_unknown_width():
    head, hidden, labels, _ = made(2, 9, 7, seed=4)
    used = nn.Sequential(nn.Identity(), head)
    torch.testing.assert_close(head_loss(used, hidden, labels), reference(head, hidden, labels, None, None))


LIGER = """
import torch.nn.functional as F

calls = []


def liger_fused_linear_cross_entropy(input, weight, target, bias=None, reduction="mean"):
    calls.append(target)
    return F.cross_entropy(input @ weight.T, target, reduction=reduction)
"""


@pytest.fixture
def liger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A package of liger-kernel's name, taken to be of use on a CPU; gives its list of calls."""
    folder = tmp_path / "liger_kernel" / "transformers"
    folder.mkdir(parents=True)
    for place in (folder.parent, folder):
        (place / "__init__.py").touch()
    (folder / "functional.py").write_text(LIGER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(loss_module, "FUSED_DEVICES", ("cpu",))
    loss_module._liger.cache_clear()
    from importlib import import_module

    yield import_module("liger_kernel.transformers.functional").calls
    loss_module._liger.cache_clear()
    for name in [name for name in sys.modules if name.startswith("liger_kernel")]:
        del sys.modules[name]


def test_liger_kernel_is_used_where_it_can(liger: list[Tensor]):
    head, hidden, labels, weights = made(2, 9, 7, seed=7)
    wanted = gradients(reference(head, hidden, labels, None, 3), hidden, head.weight)
    found = gradients(head_loss(head, hidden, labels, None, 3).double(), hidden, head.weight)
    assert len(liger) == 1
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    head_loss(head, hidden, labels, weights)  # it knows no weights,
    head_loss(head, hidden, labels.fill_(-100))  # nor nothing at all,
    head.weight.ds_id = 1
    labels[:, 3] = 1
    head_loss(head, hidden, labels)  # nor shards
    assert len(liger) == 1


def test_liger_kernel_is_left_alone_on_a_cpu(liger: list[Tensor], monkeypatch):
    monkeypatch.setattr(loss_module, "FUSED_DEVICES", ("cuda",))
    head, hidden, labels, _ = made(2, 9, 7, seed=7)
    head_loss(head, hidden, labels)
    assert not liger


# --- inside the model ---------------------------------------------------------------------------------------


def batch_for(model: Any) -> dict[str, Tensor]:
    """Two texts without images."""
    ids = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("tied", [False, True])
def test_in_the_model_with_the_head_tied_or_not(tied, monkeypatch):
    model, _ = tiny_model(tie_word_embeddings=tied)
    model = model.double().train()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    batch = batch_for(model)
    logits = model.eval()(input_ids=batch["input_ids"]).logits[:, :-1]
    wanted = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    leaves = [p for n, p in model.named_parameters() if "language_model" in n or "lm_head" in n]
    expected = torch.autograd.grad(wanted, leaves)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 3 * 384)
    loss = model.train()(**batch).loss
    torch.testing.assert_close(loss, wanted)
    for a, b in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("how", ["target_modules", "modules_to_save"])
def test_a_head_that_peft_has_wrapped(how, monkeypatch):
    peft = pytest.importorskip("peft")
    base, _ = tiny_model()
    settings = {"target_modules": ["q_proj"], how: ["lm_head"]}
    model = peft.get_peft_model(base.double(), peft.LoraConfig(r=2, **settings)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert not isinstance(base.lm_head, LanguageHead)
    batch = batch_for(model)
    logits = model.eval()(input_ids=batch["input_ids"]).logits[:, :-1]
    wanted = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    leaves = [p for n, p in model.named_parameters() if p.requires_grad and "lm_head" in n]
    assert leaves
    expected = torch.autograd.grad(wanted, leaves)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 3 * 384)
    loss = model.train()(**batch).loss
    torch.testing.assert_close(loss, wanted)
    for a, b in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)


def test_the_sum_without_a_division():
    head, hidden, labels, weights = made(1, 6, 7, seed=8, labelled=2)
    rows, targets = hidden[0, :-1], labels[0, 1:]
    wanted = (F.cross_entropy(rows @ head.weight.T, targets, reduction="none") * weights[0, 1:]).sum()
    torch.testing.assert_close(summed_cross_entropy(head, rows, targets, weights[0, 1:]), wanted)

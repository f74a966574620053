"""One pass per pair: branches behind one prefix give the loss and gradients of separate samples."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Cache
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from llava.errors import ConfigError
from llava.model.branches import TEXT, additive, attention_mask, block_mask, branch_mask, branch_positions
from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from tests.tiny import tiny_model

Branch = tuple[list[int], list[bool]]
"""Ids behind the prefix's last token, and which of them are learned."""


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def words(seed: int, count: int) -> list[int]:
    return torch.randint(1, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def prefix_for(model: ChangeVLMForConditionalGeneration, seed: int) -> tuple[list[int], list[bool]]:
    """A prompt with a pair's placeholders, and which of its tokens the release's rule would learn."""
    config = model.config
    ids = [
        *words(seed, 3 + seed),
        *[config.image_token_id] * (2 * config.image_seq_length),
        *words(seed + 9, 3),
    ]
    return ids, [i % 3 == 1 and token != config.image_token_id for i, token in enumerate(ids)]


def batch_of(
    model: ChangeVLMForConditionalGeneration, rows: Sequence[tuple[int, Sequence[Branch], bool]]
) -> dict[str, Tensor]:
    """One row a (seed of prefix and pixels, branches, learns its prefix too), padded on the right.

    The prefix ends before its last token, which opens every branch; what is learned of the prefix counts for each.
    """
    parts: list[tuple[list[int], list[int], list[float], list[int]]] = []
    side = model.config.vision_config.image_size
    for seed, branches, release in rows:
        prefix, learned = prefix_for(model, seed)
        learned = [kept and release for kept in learned]
        ids, kept, segments = prefix[:-1], learned[:-1], [0] * (len(prefix) - 1)
        weights = [float(len(branches))] * len(ids)
        for k, (answer, told) in enumerate(branches, start=1):
            ids, segments = [*ids, prefix[-1], *answer], [*segments, *[k] * (1 + len(answer))]
            # foretold from the prefix, so that the first branch's copy stands for all
            kept = [*kept, learned[-1] and k == 1, *told]
            weights = [*weights, float(len(branches)), *[1.0] * len(answer)]
        labels = [token if told else -100 for token, told in zip(ids, kept, strict=True)]
        parts.append((ids, labels, weights, segments))
    length = max(len(ids) for ids, *_ in parts)
    made = [
        torch.tensor([list(part[i]) + [fill] * (length - len(part[i])) for part in parts])  # type: ignore[misc]
        for i, fill in enumerate((0, -100, 1.0, -1))
    ]
    batch = dict(zip(("input_ids", "labels", "label_weights", "segments"), made, strict=True))
    if bool((batch["label_weights"] == 1).all()) or not any(release for *_, release in rows):
        del batch["label_weights"]
    return batch | {"pixel_values": torch.stack([draw(seed, 2, 3, side, side) for seed, *_ in rows])}


def norm_in_full(self: Qwen2RMSNorm, x: Tensor) -> Tensor:
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def loss_and_gradients(
    model: ChangeVLMForConditionalGeneration, batches: list[dict[str, Tensor]], items: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed over batches."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        loss = model(**batch, num_items_in_batch=torch.tensor(items)).loss
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def caption(seed: int, count: int) -> Branch:
    return words(seed, count), [True] * count


def question(seed: int, asked: int, count: int, second: int = 0) -> Branch:
    """Another question and its answer; with `second`, one more round of both."""
    ids, told = words(seed, asked + count), [False] * asked + [True] * count
    if second:
        more, learned = question(seed + 50, asked, second)
        return ids + more, told + learned
    return ids, told


ROWS = {
    "captions": [(1, [caption(20, 3), caption(21, 5), caption(22, 2)], False), (2, [caption(23, 4)], False)],
    "questions": [(1, [question(30, 4, 3), question(31, 2, 2, second=3), caption(32, 3)], False)],
    "release": [
        (1, [caption(20, 3), caption(21, 5)], True),
        (2, [question(33, 3, 2), caption(23, 4), caption(24, 1)], True),
    ],
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ROWS)
def test_branches_equal_separate_samples(attention: str, checkpointing: bool, kind: str, monkeypatch):
    monkeypatch.setattr(Qwen2RMSNorm, "forward", norm_in_full)  # its own is in float32
    model = tiny_model()[0].double().train()
    model.set_attn_implementation(attention)
    if checkpointing:
        model.gradient_checkpointing_enable()
    rows = ROWS[kind]
    batch = batch_of(model, rows)
    assert ("label_weights" in batch) == (kind == "release")
    alone = []
    for seed, branches, release in rows:
        for branch in branches:
            one = batch_of(model, [(seed, [branch], release)])
            del one["segments"]  # the plain causal mask, nothing of ours
            alone.append(one)
    assert all("label_weights" not in one for one in alone)
    items = sum(int((one["labels"] != -100).sum()) for one in alone)
    weighted = batch.get("label_weights", torch.ones(())) * (batch["labels"] != -100)
    assert int(weighted.sum()) == items
    together, apart = loss_and_gradients(model, [batch], items), loss_and_gradients(model, alone, items)
    exact = 1e-12 if attention == "sdpa" else 1e-6  # eager attention takes its softmax in float32
    torch.testing.assert_close(together[0], apart[0], rtol=exact, atol=0)
    torch.testing.assert_close(model(**batch).loss, together[0])  # its own sum of weights
    assert together[1].keys() == apart[1].keys() == dict(model.named_parameters()).keys()
    largest = float(max(g.abs().max() for g in apart[1].values()))
    for name, gradient in apart[1].items():
        torch.testing.assert_close(together[1][name], gradient, rtol=0, atol=exact * largest, msg=name)


def test_the_mask_lets_a_branch_see_the_prefix_and_itself_only():
    seen = branch_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))
    assert seen.shape == (1, 1, 6, 6)
    assert seen[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_texts_of_a_row_see_nothing_of_each_other():
    """Each with its own prefix and branches, as in a row of its own."""
    first, second = [0, 0, 1, 1, 2], [0, 1, 2, 2]
    whole = torch.tensor([[*first, *(TEXT + k for k in second), -1]])
    mask, positions = branch_mask(whole)[0, 0], branch_positions(whole)[0]
    wanted = torch.zeros(10, 10, dtype=torch.bool)
    for text, at in ((first, slice(0, 5)), (second, slice(5, 9))):
        wanted[at, at] = branch_mask(torch.tensor([text]))[0, 0]
        assert positions[at].tolist() == branch_positions(torch.tensor([text]))[0].tolist()
    wanted[9, 9] = True
    assert torch.equal(mask, wanted) and positions[9] == 0


def segments_of(lengths: Sequence[Sequence[int] | Sequence[Sequence[int]]]) -> Tensor:
    """Rows of texts of the given lengths (prefix, then branches), padded; a text alone need not be in a list."""
    rows = []
    for given_ in lengths:
        texts = [given_] if isinstance(given_[0], int) else given_
        rows.append(
            [
                text * TEXT + k
                for text, sizes in enumerate(texts)
                for k, length in enumerate(sizes)
                for _ in range(length)
            ]
        )
    longest = max(map(len, rows))
    return torch.tensor([row + [-1] * (longest - len(row)) for row in rows])


texts = st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), max_size=4)).map(lambda x: [x[0], *x[1]])
lengths = st.lists(st.lists(texts, min_size=1, max_size=3), min_size=1, max_size=3)


@settings(max_examples=50, deadline=None)
@given(lengths)
def test_positions_restart_behind_the_prefix_in_every_branch(rows: list[list[list[int]]]):
    segments = segments_of(rows)
    for found, held in zip(branch_positions(segments).tolist(), rows, strict=True):
        wanted: list[int] = []
        for prefix, *branches in held:
            wanted += [*range(prefix), *(prefix + i for length in branches for i in range(length))]
        assert found == wanted + [0] * (len(found) - len(wanted))


@settings(max_examples=25, deadline=None)
@given(lengths)
def test_blocks_hold_the_same_mask(rows: list[list[list[int]]]):
    segments = segments_of(rows)
    blocks = block_mask(segments)
    size = segments.shape[1]
    assert blocks.shape == (len(rows), 1, size, size)
    at = torch.arange(size)
    found = torch.stack([blocks.mask_mod(b, 0, at[:, None], at[None]) for b in range(len(rows))])
    assert torch.equal(found, branch_mask(segments)[:, 0])


def test_blocks_that_nobody_sees_are_skipped():
    """300 of a prefix and two branches of 130: the second sees nothing of the first, but for the borders."""
    blocks = block_mask(segments_of([[256, 128, 128]]))
    assert blocks.to_dense()[0, 0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]


def test_flex_attention_sees_what_sdpa_sees(monkeypatch):
    """Without its compiler, which takes a minute; backward does not exist on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as integration

    def plain(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **kwargs: object) -> Tensor:
        return flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", plain)
    model, _ = tiny_model()
    batch = batch_of(model, ROWS["release"])
    batch["pixel_values"] = batch["pixel_values"].float()
    real = batch["segments"] >= 0
    with torch.no_grad():
        wanted = model(**batch)
        model.model.language_model.set_attn_implementation("flex_attention")
        found = model(**batch)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.logits[real], wanted.logits[real], rtol=1e-4, atol=1e-4)


def test_an_implementation_that_cannot_is_refused():
    several, one = segments_of([[3, 2, 2], [3, 1]]), segments_of([[3, 2], [3, 1]])
    shared = segments_of([[[3, 2], [3, 1]]])
    for name in ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2", "paged|sdpa"):
        for segments in (several, shared):
            with pytest.raises(ConfigError, match=r"sdpa.*one_pass"):
                attention_mask(segments, name, torch.float32)
        assert attention_mask(one, name, torch.float32) is None


def test_each_implementation_gets_its_own_kind():
    segments = segments_of([[3, 2, 2]])
    for name in ("sdpa", "eager"):
        added = attention_mask(segments, name, torch.bfloat16)
        assert added.dtype == torch.bfloat16
        assert torch.equal(added == 0, branch_mask(segments))
        assert added.min() == torch.finfo(torch.bfloat16).min
    with torch.autocast("cpu", torch.bfloat16):
        # as the queries will be; scores of eager attention are float32
        assert attention_mask(segments, "sdpa", torch.float32).dtype == torch.bfloat16
        assert attention_mask(segments, "eager", torch.float32).dtype == torch.float32
    assert additive(added, torch.float32) is added
    assert attention_mask(segments[:, :0], "sdpa", torch.float32) is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_one_branch_are_plain_text(attention, monkeypatch):
    """No mask is made, and the zeros that fill up positions are not taken for texts packed into one row."""
    model = tiny_model()[0].double()
    model.set_attn_implementation(attention)
    batch = batch_of(model, [(1, [caption(20, 3)], False), (2, [caption(21, 9)], False)])
    given_masks = []
    original = model.model.language_model.forward
    monkeypatch.setattr(
        model.model.language_model,
        "forward",
        lambda *a, **k: (given_masks.append(k["attention_mask"]), original(*a, **k))[1],
    )
    with torch.no_grad():
        both = model(**batch, position_ids=branch_positions(batch["segments"])).logits
        for i in range(2):
            length = int((batch["segments"][i] >= 0).sum())
            alone = model(
                input_ids=batch["input_ids"][i : i + 1, :length],
                pixel_values=batch["pixel_values"][i : i + 1],
            ).logits
            torch.testing.assert_close(both[i, :length], alone[0], rtol=1e-5, atol=1e-5)
    assert given_masks[0] is None


def test_positions_are_made_where_none_are_given():
    model = tiny_model()[0].double()
    batch = batch_of(model, ROWS["captions"])
    with torch.no_grad():
        without = model(**batch).logits
        given_positions = model(**batch, position_ids=branch_positions(batch["segments"])).logits
        other = model(**batch, position_ids=torch.arange(batch["segments"].shape[1])[None]).logits
    assert torch.equal(without, given_positions) and not torch.equal(without, other)


def test_segments_and_a_mask_are_one_too_many():
    model, _ = tiny_model()
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="no attention_mask"):
        model(input_ids=ids, segments=torch.zeros_like(ids), attention_mask=torch.ones_like(ids))


def test_no_cache_is_built(monkeypatch):
    model, _ = tiny_model()
    batch = batch_of(model.double(), ROWS["captions"])
    del batch["labels"]
    built: list[Cache] = []
    original = Cache.__init__
    monkeypatch.setattr(
        Cache, "__init__", lambda self, *a, **k: (built.append(self), original(self, *a, **k))[1]
    )
    assert model(**batch).past_key_values is None
    assert not built

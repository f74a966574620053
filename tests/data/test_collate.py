"""One pass per pair: captions as branches give the loss and gradients of separate samples."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.data.collate import BranchCollator
from llava.data.conversation import IGNORE, LabelRule
from llava.data.dataset import PairDataset, Sample
from llava.data.encode import Row
from llava.data.record import Record
from llava.model.branches import TEXT, branch_positions
from llava.train.auxiliary import Auxiliary
from tests.tiny import random_image, tiny_model

PAD = 0
TENSORS = ("input_ids", "labels", "position_ids", "segments", "label_weights", "pixel_values", "image_counts")


def sample(uid: str, answers: list[list[int]], **fields: Any) -> Sample:
    """A made-up pair with the prompt 5, 6, 7."""
    pixels = torch.full((2, 3, 4, 4), float(len(uid)))
    told = [(ids, ids) for ids in answers]
    return Sample(uid, pixels, [5, 6, 7], [IGNORE] * 3, told, **fields)


def test_a_row_is_the_prefix_and_its_branches():
    batch = BranchCollator(PAD)([sample("a", [[8, 9], [10]]), sample("bb", [[11]], also=("b2",))])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 7, 10], [5, 6, 7, 11, PAD, PAD, PAD]]
    none = IGNORE
    assert batch["labels"].tolist() == [[none] * 3 + [8, 9, none, 10], [none] * 3 + [11, none, none, none]]
    assert batch["segments"].tolist() == [[0, 0, 1, 1, 1, 2, 2], [0, 0, 1, 1, -1, -1, -1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3], [0, 1, 2, 3, 0, 0, 0]]
    assert torch.equal(batch["position_ids"], branch_positions(batch["segments"]))
    assert batch["pixel_values"][:, 0, 0, 0, 0].tolist() == [1, 2]
    assert (batch["uids"], batch["skipped"]) == (["a", "bb", "b2"], [])
    assert not {"label_weights", "changed_share", "image_counts", "attention_mask"} & set(batch)


def test_a_learned_token_of_the_prefix_counts_for_every_branch():
    several = replace(sample("a", [[8], [9], [10]]), prompt_labels=[5, 6, 7])
    batch = BranchCollator(PAD)([several, replace(sample("b", [[8]]), prompt_labels=[IGNORE, 6, IGNORE])])
    assert batch["labels"].tolist() == [
        [IGNORE, 6, 7, 8, IGNORE, 9, IGNORE, 10],  # nothing foretells the first; the last is foretold once
        [IGNORE, 6, IGNORE, 8, IGNORE, IGNORE, IGNORE, IGNORE],
    ]
    assert batch["label_weights"].dtype == torch.float32
    assert batch["label_weights"].tolist() == [[0, 3, 3, 1, 0, 1, 0, 1], [0, 1, 0, 1, 0, 0, 0, 0]]


def test_rows_are_filled_up_to_a_multiple():
    batch = BranchCollator(PAD, pad_to_multiple_of=8)([sample("a", [[8, 9], [10]])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 7, 10, PAD]]
    assert batch["segments"][0, -1] == -1 and batch["labels"][0, -1] == IGNORE


def test_answers_may_count_more_or_less():
    """A learned token of the prefix counts for all of them; one that the first branch foretells for all, too."""
    several = replace(sample("a", [[8], [9, 9]]), prompt_labels=[IGNORE, 6, 7], weights=(0.5, 3.0))
    batch = BranchCollator(PAD)([several, sample("b", [[8]])])
    assert batch["labels"][0].tolist() == [IGNORE, 6, 7, 8, IGNORE, 9, 9]
    assert batch["label_weights"].tolist() == [[0, 3.5, 3.5, 0.5, 0, 3, 3], [0, 0, 0, 1, 0, 0, 0]]


def test_answers_count_by_their_task(tmp_path: Path):
    """The loss is the weighted mean of the tokens' own, and the weights are those of the whole update."""
    model, processor = tiny_model()
    for name in "ab":
        random_image(ord(name)).save(tmp_path / f"{name}.png")
    pair = {"img1_path": "a.png", "img2_path": "b.png"}
    rows = [
        Record(uid="c", **pair, change_caption=("a road is built", "trees")),
        Record(uid="n", **pair, conversation=(("how many?", "2 roads"),), task="count"),
        Record(uid="o", **pair, conversation=(("what?", "nothing"),)),
    ]
    weights = {"caption": 0.25, "count": 4.0}
    batch = BranchCollator(PAD)([PairDataset(rows, tmp_path, processor, task_weights=weights)[0]])
    apart = PairDataset(rows, tmp_path, processor, one_pass=False)
    model.eval()
    summed = total = 0.0
    for i, weight in enumerate((0.25, 0.25, 4, 1)):
        one = BranchCollator(PAD)([apart[i]])
        tokens = int((one["labels"] != IGNORE).sum())
        with torch.no_grad():
            loss = model(**{name: one[name] for name in TENSORS if name in one}).loss
        summed, total = summed + weight * tokens * float(loss), total + weight * tokens
    with torch.no_grad():
        found = model(**{name: batch[name] for name in TENSORS if name in batch}).loss
    assert float(found) == pytest.approx(summed / total, rel=1e-5)
    assert float(batch["label_weights"].sum()) == total


def test_short_texts_of_a_pair_share_a_row():
    """Where each question is a text of its own; the order of the questions is that of the rows."""
    asked = [
        Row([5, 6], [IGNORE] * 2, [([answer], [answer])], reading=[answer, 1]) for answer in (21, 22, 23)
    ]
    one = replace(sample("a", [[8, 9], [10]]), reading=[20], more=tuple(asked[:2]))
    two = replace(sample("bb", [[11]]), reading=[24], more=tuple(asked[2:]))
    batch = BranchCollator(PAD)([one, two])
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 8, 9, 7, 10],
        [5, 6, 21, 5, 6, 7, 11],  # a text of the second pair fits behind one of the first
        [5, 6, 22, 5, 6, 23, PAD],
    ]
    up = TEXT
    assert batch["segments"].tolist() == [
        [0, 0, 1, 1, 1, 2, 2],
        [0, 1, 1, up, up, up + 1, up + 1],
        [0, 1, 1, up, up + 1, up + 1, -1],
    ]
    assert torch.equal(batch["position_ids"], branch_positions(batch["segments"]))
    assert batch["labels"][2].tolist() == [IGNORE, IGNORE, 22, IGNORE, IGNORE, 23, IGNORE]
    assert batch["qformer_input_ids"].tolist() == [[20, 0], [21, 1], [24, 0], [22, 1], [23, 1]]
    assert batch["qformer_attention_mask"].tolist() == [[1, 0], [1, 1], [1, 0], [1, 1], [1, 1]]
    assert batch["pair_index"].tolist() == [0, 0, 1, 0, 1] and len(batch["pixel_values"]) == 2
    apart = BranchCollator(PAD, packed=False)([one, two])
    assert len(apart["input_ids"]) == 5 and apart["pair_index"].tolist() == [0, 0, 0, 1, 1]
    assert int(apart["segments"].max()) == 2


def test_texts_of_equal_length_stay_plain_rows():
    """What no mask is needed for, any attention reads."""
    pairs = [replace(sample(uid, [[8, 9]]), reading=[20]) for uid in "abc"]
    batch = BranchCollator(PAD)(pairs)
    assert len(batch["input_ids"]) == 3 and int(batch["segments"].max()) == 1 and "pair_index" not in batch


def test_what_teaches_nothing_is_left_out_and_stands_in_only_for_an_empty_batch():
    collate = BranchCollator(PAD)
    lost = sample("lost", [], skipped=({"uid": "lost", "file": "f.png", "reason": "cut short"},))
    batch = collate([lost, sample("a", [[8]]), sample("", [])])
    assert (batch["uids"], batch["skipped"]) == (
        ["a"],
        [{"uid": "lost", "file": "f.png", "reason": "cut short"}],
    )
    assert batch["pixel_values"].shape == (1, 2, 3, 4, 4)
    empty = collate([lost, lost])
    assert empty["input_ids"].tolist() == [[5, 6, 7]] and (empty["labels"] == IGNORE).all()
    assert empty["pixel_values"].shape == (1, 2, 3, 4, 4)
    assert (empty["uids"], len(empty["skipped"])) == ([], 2)


def test_shares_go_along_where_some_have_them():
    share = torch.ones(16)
    both = [sample("a", [[8]], changed_share=share), sample("b", [[8]], changed_share=share)]
    batch = BranchCollator(PAD)(both)
    assert batch["changed_share"].shape == (2, 16) and "mask_known" not in batch
    batch = BranchCollator(PAD)([sample("c", [[8]]), both[0]])
    assert batch["changed_share"].tolist() == [[0] * 16, [1] * 16]
    assert batch["mask_known"].tolist() == [False, True]
    assert "changed_share" not in BranchCollator(PAD)([sample("c", [[8]])])


def test_a_pair_without_a_mask_teaches_none_and_hinders_none():
    config = tiny_model()[0].config
    torch.manual_seed(0)
    heads = Auxiliary(config, mask_weight=2.0, object_weight=1.0, place_weight=0.5, rate=1e-3)
    count = config.grid**2
    patches = torch.randn(3, 2, count, config.text_config.hidden_size)
    shares, middles = torch.rand(3, count, 1), torch.rand(3, count, 1).round()
    logits = torch.randn(3, count)
    known = torch.tensor([True, False, True])
    found = heads(patches, shares, middles, logits, known)
    assert heads.means().keys() == {"mask_loss", "object_loss", "place_loss"}
    one = [
        heads(patches[i : i + 1], shares[i : i + 1], middles[i : i + 1], logits[i : i + 1]) for i in (0, 2)
    ]
    none = heads(patches[1:2], None, None, logits[1:2])
    torch.testing.assert_close(found, sum(one) + none)


def test_text_and_pairs_share_a_batch():
    model, _ = tiny_model()
    config, side = model.config, model.config.vision_config.image_size
    prompt = [3, *[config.image_token_id] * (2 * config.image_seq_length), 4]
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    pair = Sample("p", pixels, prompt, [IGNORE] * len(prompt), [([9, 8], [9, 8])])
    text = Sample("t", torch.empty(0), [5, 6], [IGNORE] * 2, [([7, 8], [7, 8])])
    batch = BranchCollator(PAD)([pair, text])
    assert batch["image_counts"].tolist() == [2, 0]
    with torch.no_grad():
        both, alone = (
            model(**{name: value for name, value in made.items() if name in TENSORS}).logits
            for made in (batch, BranchCollator(PAD)([text]))
        )
    torch.testing.assert_close(both[1, : alone.shape[1]], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["answer", "release"])
def test_one_pass_is_one_sample_a_caption(rule: LabelRule, tmp_path: Path):
    """From files to gradients: captions, dialogues and several records of one pair."""
    model, processor = tiny_model()
    model = model.double().train()
    for i in range(4):
        random_image(i).save(tmp_path / f"{i}.png")
    rounds = (("what is gone?", "a road"), ("and what else?", "trees"))
    records = [
        Record(uid="a", img1_path="0.png", img2_path="1.png", change_caption=("a road", "a road is built")),
        Record(uid="b", img1_path="2.png", img2_path="3.png", change_caption=("the same",)),
        Record(uid="c", img1_path="0.png", img2_path="1.png", conversation=rounds),
    ]

    def gradients(one_pass: bool) -> tuple[list[int], float, dict[str, Tensor]]:
        data = PairDataset(records, tmp_path, processor, one_pass=one_pass, labels=rule)
        batch = BranchCollator(PAD, 8)([data[i] for i in range(len(data))])
        inputs = {name: value for name, value in batch.items() if name in TENSORS}
        inputs["pixel_values"] = inputs["pixel_values"].double()
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        weights = batch.get("label_weights", batch["labels"].ne(IGNORE))
        return [len(batch["input_ids"]), int(weights.sum())], loss.item(), found

    together, apart = gradients(True), gradients(False)
    assert (together[0], apart[0]) == ([2, together[0][1]], [4, together[0][1]])
    assert together[1] == pytest.approx(apart[1], rel=1e-9)
    largest = float(max(g.abs().max() for g in apart[2].values()))
    for name, gradient in apart[2].items():
        torch.testing.assert_close(together[2][name], gradient, rtol=1e-4, atol=1e-7 * largest, msg=name)

"""Records to samples: branches that are the conversations' own ids, pairs grouped and split, faults named."""

import copy
import json
import pickle
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from llava.data import encode as module
from llava.data.collate import BranchCollator
from llava.data.conversation import IGNORE, chat_template, pair_conversation
from llava.data.dataset import PairDataset, Sample
from llava.data.encode import Branch, BranchEncoder, shared_prompt
from llava.data.mixture import load_mixture
from llava.data.record import Record
from llava.data.sampler import FILLER, EpochSampler, Place
from llava.errors import ConfigError, DataError
from llava.model.processing import ChangeVLMProcessor
from llava.train.tokenizer import train_tokenizer
from tests.tiny import random_image, tiny_config, tiny_model, tiny_tokenizer

RELEASED = Path(__file__).parents[1] / "golden" / "text" / "tokenizer"


@pytest.fixture(scope="module")
def processor() -> ChangeVLMProcessor:
    return tiny_model()[1]


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    made = []
    for i in range(3):
        random_image(2 * i).save(tmp_path / f"{i}a.png")
        random_image(2 * i + 1).save(tmp_path / f"{i}b.png")
        captions = (f"house {i} is built", "the scene is the same", "a road")
        made.append(
            Record(uid=f"r{i}", img1_path=f"{i}a.png", img2_path=f"{i}b.png", change_caption=captions)
        )
    return made


def words(sample: Sample, processor: ChangeVLMProcessor) -> list[str]:
    """What each branch teaches."""
    return [
        processor.tokenizer.decode([token for token in labels if token != IGNORE]).removesuffix("<|im_end|>")
        for _, labels in sample.answers
    ]


# --- branches -------------------------------------------------------------------------------------------

KINDS = ["released", "released release", "chatml", "chatml release", "vicuna", "trimmed", "glued"]
CHATML = chat_template("chatml")
ANSWER = "{{- words(message['content']) + '<|im_end|>' -}}\n{%- endgeneration -%}"
TEMPLATES = {
    "trimmed": CHATML.replace(ANSWER, ANSWER.replace("']) +", "']).split('</think>')[-1] | trim +")),
    "glued": CHATML.replace("message['role'] + '\\n'", "message['role']")
    .replace("assistant\\n", "assistant")
    .replace(ANSWER, ANSWER.replace(" + '<|im_end|>'", "")),
}
"""Others' ways: one changes answers, one's header and end melt into an answer's first and last word."""


@pytest.fixture(scope="module", params=KINDS)
def encoder(request: pytest.FixtureRequest) -> BranchEncoder:
    kind, _, rule = request.param.partition(" ")
    tokenizer = {
        "released": lambda: AutoTokenizer.from_pretrained(RELEASED),
        "chatml": tiny_tokenizer,
        "vicuna": lambda: tiny_tokenizer("llama"),
        "glued": lambda: train_tokenizer(["user assistantthe scene is gone!\n"] * 9, 320),
    }.get(kind, tiny_tokenizer)()
    made = ChangeVLMProcessor.for_config(tiny_config(), tokenizer)
    made.chat_template = TEMPLATES.get(kind, made.chat_template)
    return BranchEncoder(made, labels=rule or "answer")  # type: ignore[arg-type]


ODD = st.sampled_from(
    [
        "\n",
        " ",
        "  \n",
        "<|im_end|>",
        "<|im_start|>user\n",
        "</s>",
        "</think>",
        "é",
        "e\u0301",
        "一",
        ".",
        "12",
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(ODD | st.text(max_size=8), min_size=1, max_size=5).map("".join))
@example("many buildings are built along the road .")
@example("\n\u0301 starts with a break")
@example("<image> is no image")
@example("the scene is the same")
@example("2 trees are gone!")
@example("well </think> no change")
def test_a_caption_alone_is_tokenised_as_within_its_conversation(encoder: BranchEncoder, text: str):
    encoder._captions._held.clear()
    branch = encoder.caption(text)
    plain = text.replace("<image>", "< image >")
    whole = encoder.processor.encode(pair_conversation(answer=plain), labels=encoder.labels)
    assert branch.prompt + branch.answer == whole["input_ids"]
    assert branch.prompt_labels + branch.answer_labels == whole["labels"]
    assert branch.answer


def test_the_other_templates_differ():
    assert all(text != CHATML for text in TEMPLATES.values())


def test_plain_captions_need_no_whole_conversation(encoder: BranchEncoder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoder.processor, "encode", None)
    captions = [f"some {n} houses, a road and trees." for n in range(5)]
    assert all(encoder.caption(text).prompt is encoder.prompt for text in captions)


def test_all_answers_of_a_dialogue_are_learned(encoder: BranchEncoder):
    rounds = (("what?", "a road"), ("where?", "to the left"), ("and now?", "gone"))
    branch = encoder.conversation(rounds)
    whole = encoder.processor.encode(
        pair_conversation("and now?", history=rounds[:2], answer="gone"), labels=encoder.labels
    )
    assert branch.prompt + branch.answer == whole["input_ids"]
    assert branch.prompt_labels + branch.answer_labels == whole["labels"]
    _, prompt = encoder.asked("what?")
    assert branch.prompt == prompt


def test_what_is_kept_is_bounded(processor: ChangeVLMProcessor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CAPTIONS_KEPT", 4)
    monkeypatch.setattr(module, "PROMPTS_KEPT", 2)
    encoder = BranchEncoder(processor)
    for i in (0, 1, 2, 3, 0, 4):
        encoder.caption(f"house {i}")
        encoder.conversation(((f"is house {i} gone?", "yes"),))
    assert list(encoder._captions._held) == [f"house {i}" for i in (2, 3, 0, 4)]
    assert len(encoder._prompts._held) == 2


def test_no_copy_of_the_tokenizer_is_made(
    records: list[Record], tmp_path: Path, processor: ChangeVLMProcessor
):
    class Uncopied(type(processor.tokenizer)):  # type: ignore[misc]
        def __deepcopy__(self, memo: Any) -> None:
            raise AssertionError("copied")

    processor.tokenizer.__class__, kept = Uncopied, processor.tokenizer.__class__
    try:
        assert len(PairDataset(records, tmp_path, processor)[0].answers) == 3
    finally:
        processor.tokenizer.__class__ = kept


def test_branches_share_what_they_begin_with_but_no_answer():
    branches = [
        Branch([1, 2, 3, 4], [-100, 2, -100, -100], [7, 8], [7, 8]),
        Branch([1, 2, 3, 5, 6], [-100, 2, -100, -100, 6], [7, 9], [7, 9]),
    ]
    prompt, labels, rest = shared_prompt(branches)
    assert (prompt, labels) == ([1, 2, 3], [-100, 2, -100])
    assert rest == [([4, 7, 8], [-100, 7, 8]), ([5, 6, 7, 9], [-100, 6, 7, 9])]
    assert [len(shared_prompt([branch, branch])[0]) for branch in branches] == [4, 5]
    # what is learned in one of them only is not shared
    unlearned = Branch([1, 2, 3, 4], [-100] * 4, [7], [7])
    assert shared_prompt([branches[0], unlearned])[0] == [1]


def test_a_template_without_marked_answers_is_refused(processor: ChangeVLMProcessor):
    other = ChangeVLMProcessor(
        processor.image_processor, tiny_tokenizer(), chat_template="{{ messages[0].role }}"
    )
    with pytest.raises(ConfigError, match="marks no answer"):
        BranchEncoder(other)


# --- samples --------------------------------------------------------------------------------------------


def test_a_sample_is_the_whole_conversations(
    records: list[Record], tmp_path: Path, processor: ChangeVLMProcessor
):
    sample = PairDataset(records, tmp_path, processor)[1]
    assert (sample.uid, sample.also, sample.skipped) == ("r1", (), ())
    for caption, (ids, labels) in zip(records[1].change_caption, sample.answers, strict=True):
        whole = processor.encode(pair_conversation(answer=caption))
        expanded = processor.expand(whole["input_ids"], [processor.image_seq_length] * 2)
        assert [*sample.prompt, *ids] == expanded
        assert labels == whole["labels"][-len(labels) :]
    assert words(sample, processor) == list(records[1].change_caption)
    assert set(sample.prompt_labels) == {IGNORE}
    data = PairDataset(records, tmp_path, processor)
    assert [one.uid for one in data] == ["r0", "r1", "r2"] and data[-1].uid == "r2"


def test_pixels_are_the_processors_with_and_without_cache(
    records: list[Record], tmp_path: Path, processor: ChangeVLMProcessor
):
    plain, cached = (PairDataset(records, tmp_path, processor, cache=cache) for cache in (False, True))
    expected = processor.image_processor.preprocess([random_image(4), random_image(5)])["pixel_values"]
    first = cached[2].pixel_values
    (tmp_path / "2a.png").unlink()
    (tmp_path / "2b.png").unlink()
    for pixels in (first, cached[2].pixel_values):
        torch.testing.assert_close(pixels, expected)
    with pytest.raises(DataError):
        plain[2]


def test_masks_become_shares_of_patches(records: list[Record], tmp_path: Path, processor: ChangeVLMProcessor):
    mask = np.zeros((32, 64), np.uint8)
    mask[:8, 16:24] = 255  # half of the second patch of the first row
    Image.fromarray(mask).save(tmp_path / "mask.png")
    told = [replace(record, mask_path="mask.png") for record in records]
    assert PairDataset(told, tmp_path, processor)[0].changed_share is None
    share = PairDataset(told, tmp_path, processor, mask_grid=4)[0].changed_share
    assert share is not None
    assert share.tolist() == [[0], [0.5]] + [[0]] * 14
    mask[:8, 24:32] = 128
    mask[24:, :16] = 128  # all of the first patch of the last row
    Image.fromarray(mask).save(tmp_path / "mask.png")
    sample = PairDataset(told, tmp_path, processor, mask_grid=4, mask_objects=True, mask_levels=[128, 255])[0]
    share, middles = sample.changed_share, sample.object_middles
    assert share is not None and middles is not None
    assert share.tolist() == [[0] * 3, [1, 0.5, 0.5]] + [[0] * 3] * 10 + [[1, 1, 0]] + [[0] * 3] * 3
    assert middles.tolist() == [[0, 0], [1, 1]] + [[0, 0]] * 10 + [[1, 0]] + [[0, 0]] * 3
    whole = PairDataset(told, tmp_path, processor, mask_grid=4, mask_objects=True)[0].object_middles
    assert whole is not None  # roads and buildings side by side are one object
    assert whole[:, 0].nonzero()[:, 0].tolist() == [1, 12]
    with pytest.raises(DataError, match=r"mask\.png: has grey levels \[128\]; mask_levels are \[255\]"):
        PairDataset(told, tmp_path, processor, mask_grid=4, mask_levels=[255])[0]
    (tmp_path / "mask.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"'r0': .*mask\.png"):
        PairDataset(told, tmp_path, processor, mask_grid=4)[0]


def test_a_mask_lies_where_its_image_does(
    records: list[Record], tmp_path: Path, processor: ChangeVLMProcessor
):
    mask = np.zeros((32, 64), np.uint8)
    mask[:, 60:] = 255  # the last sixteenth of the width
    mask[:2] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    told = [replace(records[0], mask_path="mask.png")]

    def shares(**options: Any) -> Tensor:
        found = PairDataset(told, tmp_path, processor, mask_grid=4, **options)[0].changed_share
        assert found is not None
        return found.view(4, 4)

    assert shares()[:, 3].tolist() == [0.4375, 0.25, 0.25, 0.25]  # 2 of 8 rows, and 4 of 16 columns
    # patches that end at 15 / 16 do not see it, as 27 patches of 14 pixels do not see the end of 384
    cut = shares(mask_covered=15 / 16)
    assert cut[1:].tolist() == [[0.0] * 4] * 3 and (cut[0] >= 0.25).all()
    middles = PairDataset(told, tmp_path, processor, mask_grid=4, mask_covered=0.5, mask_objects=True)[0]
    assert middles.object_middles is not None and middles.object_middles.sum() == 1
    assert middles.object_middles[4 * 2 + 3] == 1  # at 0.27 and 0.73 of the whole: beyond the last column
    padded = copy.deepcopy(processor)
    padded.image_processor.aspect = "pad"
    share = PairDataset(told, tmp_path, padded, mask_grid=4)[0].changed_share
    assert share is not None
    assert share.view(4, 4).tolist() == [[0] * 4, [0.125, 0.125, 0.125, 0.34375], [0, 0, 0, 0.25], [0] * 4]


def test_copies_of_a_record_draw_for_themselves(
    records: list[Record], tmp_path: Path, processor: ChangeVLMProcessor
):
    """A mixture that repeats a list six times is to show more of its captions, not one of them six times."""
    told = [replace(record, change_caption=tuple(f"caption {k}" for k in range(8))) for record in records]
    once = PairDataset(told, tmp_path, processor, captions="random")
    often = PairDataset(told * 6, tmp_path, processor, captions="random")
    drawn = [[often[Place(k * len(told) + i, 2)].answers for k in range(6)] for i in range(len(told))]
    assert [each[0] for each in drawn] == [once[Place(i, 2)].answers for i in range(len(told))]
    assert all(len({str(answers) for answers in each}) > 1 for each in drawn)


def test_half_a_character_is_named_before_anything_is_learned(
    records: list[Record], tmp_path: Path, processor: ChangeVLMProcessor
):
    broken = [records[0], replace(records[1], change_caption=("new house \ud83d",))]
    with pytest.raises(DataError, match=f"1 records have texts with half a character.*{broken[1].uid!r}"):
        PairDataset(broken, tmp_path, processor)


def test_a_drawn_caption_depends_on_seed_epoch_and_uid_alone(
    records: list[Record], tmp_path: Path, processor: ChangeVLMProcessor
):
    def drawn(seed: int, some: Sequence[Record] = records) -> dict[tuple[str, int], list[str]]:
        data = PairDataset(some, tmp_path, processor, captions="random", seed=seed)
        places = [Place(i, epoch) for epoch in range(8) for i in range(len(data))]
        return {(some[p.index].uid, p.epoch): words(data[p], processor) for p in reversed(places)}

    first = drawn(0)
    assert first == drawn(0, records[::-1]) != drawn(1)
    assert {len(told) for told in first.values()} == {1}
    assert {told[0] for (uid, _), told in first.items() if uid == "r1"} == set(records[1].change_caption)
    data = PairDataset(records, tmp_path, processor, captions="random")
    assert words(data[2], processor) == words(data[Place(2, 0)], processor) == first["r2", 0]


def test_captions_and_the_dialogue_of_a_record_are_branches(
    records: list[Record], tmp_path: Path, processor: ChangeVLMProcessor
):
    told = replace(records[0], conversation=(("what?", "a road"), ("and?", "trees")))
    all_of_it = PairDataset([told], tmp_path, processor)[0]
    assert words(all_of_it, processor) == [*told.change_caption, "a road<|im_end|>trees"]
    assert len(PairDataset([told], tmp_path, processor, one_pass=False)) == 4
    data = PairDataset([told], tmp_path, processor, captions="random")
    found = {words(data[Place(0, epoch)], processor)[0] for epoch in range(60)}
    assert found == {*told.change_caption, "a road<|im_end|>trees"}


# --- what makes a sample --------------------------------------------------------------------------------


def pairs(*uids: str) -> list[Record]:
    """Records by uid; "x1" and "x2" are about the pair x."""
    return [
        Record(uid=uid, img1_path=f"{uid[0]}.png", img2_path="z.png", change_caption=(f"about {uid}",))
        for uid in uids
    ]


def told(
    records: Sequence[Record], root: Path, processor: ChangeVLMProcessor, **options: Any
) -> list[list[str]]:
    """What each sample teaches."""
    for name in "abcdz":
        random_image(ord(name)).save(root / f"{name}.png")
    data = PairDataset(records, root, processor, **options)
    return [words(data[i], processor) for i in range(len(data))]


def test_records_of_one_pair_are_one_sample_in_the_order_they_come(
    tmp_path: Path, processor: ChangeVLMProcessor
):
    some = pairs("b1", "a1", "b2", "c1", "a2")
    grouped = told(some, tmp_path, processor)
    assert grouped == [["about b1", "about b2"], ["about a1", "about a2"], ["about c1"]]
    sample = PairDataset(some, tmp_path, processor)[1]
    assert (sample.uid, sample.also) == ("a1", ("a2",))
    apart = [[f"about {record.uid}"] for record in some]
    assert told(some, tmp_path, processor, one_pass=False) == apart
    assert told(some, tmp_path, processor, captions="random") == apart
    assert told([*some, *some], tmp_path, processor) == [*grouped, *grouped]  # listed twice


@pytest.mark.parametrize("large", [False, True])
def test_a_mixture_says_itself_what_is_one_pair(
    large: bool, tmp_path: Path, processor: ChangeVLMProcessor, monkeypatch: pytest.MonkeyPatch
):
    if large:
        pytest.importorskip("pyarrow")
        monkeypatch.setattr("llava.data.table.SMALL", 0)
    for name, uids in {"one": ("a1", "b1", "a2"), "two": ("a3",)}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([r.to_dict() for r in pairs(*uids)]))
    (tmp_path / "m.yaml").write_text(
        "datasets: [{json_path: one.json}, {json_path: two.json}, {json_path: one.json}]"
    )
    mixture = load_mixture(tmp_path / "m.yaml", cache=tmp_path / "cache")
    first = [["about a1", "about a2"], ["about b1"]]
    assert told(mixture.records, tmp_path, processor) == [*first, ["about a3"], *first]


def test_many_branches_are_several_samples(tmp_path: Path, processor: ChangeVLMProcessor):
    captions = tuple(f"house {i}" for i in range(4))
    some = [replace(record, change_caption=captions) for record in pairs("a1", "b1", "a2")]
    assert [len(one) for one in told(some, tmp_path, processor)] == [8, 4]
    cut = told(some, tmp_path, processor, max_branches=3)
    assert cut == [
        list(captions[:3]),
        [captions[3], *captions[:2]],
        list(captions[2:]),
        list(captions[:3]),
        [captions[3]],
    ]
    data = PairDataset(some, tmp_path, processor, max_branches=3)
    assert [(data[i].uid, data[i].also) for i in range(3)] == [("a1", ()), ("a1", ("a2",)), ("a2", ())]


def test_long_samples_are_split_and_what_is_too_long_alone_is_named(
    tmp_path: Path, processor: ChangeVLMProcessor
):
    captions = ("short", "a house " * 12, "x", "a house " * 11 + "y")
    some = [*pairs("b1"), replace(pairs("a1")[0], change_caption=tuple(map(str.strip, captions)))]
    whole = PairDataset([], tmp_path, processor)
    assert len(whole) == 0
    together = BranchCollator(0)
    told(some, tmp_path, processor)
    data = PairDataset(some, tmp_path, processor)
    length = together([data[1]])["input_ids"].shape[1]
    assert len(PairDataset(some, tmp_path, processor, max_length=length)) == 2
    split = PairDataset(some, tmp_path, processor, max_length=length - 1)
    assert len(split) == 3
    assert words(split[1], processor) + words(split[2], processor) == list(some[1].change_caption)
    assert all(together([split[i]])["input_ids"].shape[1] < length for i in range(3))
    short = PairDataset([some[0]], tmp_path, processor)[0]
    room = len(short.prompt) + len(short.answers[0][0])
    tight = PairDataset(some, tmp_path, processor, max_length=room)
    assert len(tight) == 5
    with pytest.raises(DataError, match=rf"'a1': \d+ tokens are more than max_length={room}"):
        tight[2]
    skipping = PairDataset(some, tmp_path, processor, max_length=room, on_error="skip")
    assert skipping[2].skipped[0]["uid"] == "a1" and "max_length" in skipping[2].skipped[0]["reason"]


# --- faults ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("captions", [(), ("a road", " ")])
def test_records_without_words_are_named_at_once(
    captions: tuple[str, ...], records: list[Record], tmp_path: Path, processor: ChangeVLMProcessor
):
    bare = replace(records[0], uid="bare", change_caption=captions)
    with pytest.raises(DataError, match=r"1 records .*'bare'"):
        PairDataset([*records, bare], tmp_path, processor)


def test_unknown_choices_are_refused(records: list[Record], tmp_path: Path, processor: ChangeVLMProcessor):
    with pytest.raises(ConfigError, match="on_error='ignore'; known: all or random, raise or skip"):
        PairDataset(records, tmp_path, processor, on_error="ignore")  # type: ignore[arg-type]


def test_a_broken_image_is_named_or_skipped_and_never_replaced(
    records: list[Record], tmp_path: Path, processor: ChangeVLMProcessor
):
    (tmp_path / "1b.png").write_bytes((tmp_path / "1b.png").read_bytes()[:-30])
    records.append(replace(records[1], uid="more", change_caption=("trees",)))
    with pytest.raises(DataError, match=r"sample 'r1', 'more': .*1b\.png"):
        PairDataset(records, tmp_path, processor)[1]
    data = PairDataset(records, tmp_path, processor, on_error="skip")
    collate = BranchCollator(processor.tokenizer.pad_token_id)
    batch = collate([data[i] for i in range(3)])
    assert batch["uids"] == ["r0", "r2"]
    expected = torch.stack([data[0].pixel_values, data[2].pixel_values])
    assert torch.equal(batch["pixel_values"], expected)
    rows = batch["skipped"]
    assert [(row["uid"], Path(row["file"]).name) for row in rows] == [("r1", "1b.png"), ("more", "1b.png")]
    assert all(re.search("cut short", row["reason"]) for row in rows)

    lost = collate([data[1]])
    assert (lost["labels"] == IGNORE).all() and lost["uids"] == [] and lost["skipped"] == rows
    black = processor.image_processor.preprocess([Image.new("RGB", (9, 9))] * 2)["pixel_values"]
    assert torch.equal(lost["pixel_values"], black[None])
    assert (lost["input_ids"] == processor.image_token_id).sum() == 2 * processor.image_seq_length


def test_a_filler_teaches_nothing_and_is_no_fault(
    records: list[Record], tmp_path: Path, processor: ChangeVLMProcessor
):
    data = PairDataset(records, tmp_path, processor)
    batch = BranchCollator(0)([data[Place(FILLER)], data[0]])
    assert (batch["uids"], batch["skipped"], len(batch["input_ids"])) == (["r0"], [], 1)
    assert (BranchCollator(0)([data[Place(FILLER)]])["labels"] == IGNORE).all()


# --- in workers -----------------------------------------------------------------------------------------


def test_workers_that_stay_draw_by_epoch(
    records: list[Record], tmp_path: Path, processor: ChangeVLMProcessor
):
    data = PairDataset(records, tmp_path, processor, captions="random", seed=4)
    data = pickle.loads(pickle.dumps(data))  # as to workers that are not forked
    sampler = EpochSampler(len(data), seed=1)
    collate = BranchCollator(processor.tokenizer.pad_token_id)
    loader = DataLoader(data, 2, sampler=sampler, num_workers=1, persistent_workers=True, collate_fn=collate)
    for epoch in (0, 1, 2):
        sampler.set_epoch(epoch)
        places = list(sampler)
        alone = [collate([data[place] for place in places[i : i + 2]]) for i in (0, 2)]
        for found, expected in zip(loader, alone, strict=True):
            assert found["uids"] == expected["uids"]
            assert torch.equal(found["input_ids"], expected["input_ids"])
            assert torch.equal(found["pixel_values"], expected["pixel_values"])

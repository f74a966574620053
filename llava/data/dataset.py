"""Records to samples: a pair's pixels, what all its captions share, and the captions that branch off behind it.

A DeltaVLM looks at a pair anew for each question, so its sample has a row of text a question, and one pair's pixels.

Legend: I images of a sample, C channels, S side in pixels, N tokens of an image, R records.
"""

import math
import random
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from llava.data.augment import Augmentation, View
from llava.data.conversation import IGNORE, IMAGE_TOKEN, QUESTION, LabelRule, pair_conversation
from llava.data.images import load_image, load_pair
from llava.data.record import Record
from llava.data.sampler import FILLER, Place
from llava.errors import ConfigError, DataError, ImageError
from llava.model.processing import ChangeVLMProcessor

if TYPE_CHECKING:
    from llava.family import AnyProcessor
    from llava.model.delta_vlm.processing import DeltaVLMProcessor

CaptionChoice = Literal["all", "random"]
OnError = Literal["raise", "skip"]
Ids = Sequence[int] | NDArray[np.int64]
Rounds = tuple[tuple[str, str], ...]

CAPTIONS_KEPT, PROMPTS_KEPT = 2**15, 2**10
"""What a process keeps of what it has tokenised: about 1 kB a caption, 4 kB a prompt."""
MAX_BRANCHES = 64

V = TypeVar("V")


class Row(NamedTuple):
    """A text about a pair: what its answers share, and the answers."""

    prompt: Ids
    """Ids that all answers share, image placeholders expanded; labels are `prompt_labels`."""
    prompt_labels: Ids
    answers: Sequence[tuple[Ids, Ids]]
    """(ids, labels) of each branch: alternatives to one another, not a sequence. Without any it teaches nothing."""
    reading: Ids = ()
    """What a Q-Former reads of the question, in its own words; empty for a model without one."""

    @property
    def length(self) -> int:
        """Tokens: the prompt without its last one, which each branch repeats, and the branches."""
        return len(self.prompt) - 1 + sum(1 + len(ids) for ids, _ in self.answers)


@dataclass(frozen=True)
class Sample:
    """One pair, ready to be batched."""

    uid: str
    pixel_values: Tensor
    """[I, C, S, S], before then after; I is 0 for text alone."""
    prompt: Ids
    """Ids that all answers share, image placeholders expanded; labels are `prompt_labels`."""
    prompt_labels: Ids
    answers: Sequence[tuple[Ids, Ids]]
    """(ids, labels) of each branch: alternatives to one another, not a sequence. Without any it teaches nothing."""
    changed_share: Tensor | None = None
    """[N], how much of each patch's place changed, 0..1, where the record has a mask."""
    also: tuple[str, ...] = ()
    """Uids of further records on the same pair that are in here."""
    skipped: tuple[dict[str, Any], ...] = ()
    """What could not be read: uid, file, reason."""
    reading: Ids = ()
    """As in `Row`, of the first one."""
    more: tuple[Row, ...] = ()
    """Further texts about the pair, where each question has a row of its own."""

    @property
    def rows(self) -> tuple[Row, ...]:
        """All texts about the pair."""
        return (Row(self.prompt, self.prompt_labels, self.answers, self.reading), *self.more)


class Branch(NamedTuple):
    """A conversation about a pair, cut where its first answer starts; an image is one id."""

    prompt: list[int]
    prompt_labels: list[int]
    answer: list[int]
    answer_labels: list[int]
    reading: tuple[int, ...] = ()
    """As in `Row`."""


class _Recent(Generic[V]):
    """The last `size` values that were asked for. Not `functools.lru_cache`: that cannot be sent to a worker."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._held: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        value = self._held[key] = make()
        if len(self._held) > self.size:
            self._held.popitem(last=False)
        return value


@dataclass(frozen=True)
class _Tail:
    """How a caption is tokenised behind a prompt that is known already."""

    text: str
    """The prompt from its last special token on: no word before that can change what comes after."""
    ids: list[int]
    """Of `text`: the last ones of the prompt."""
    left: str
    right: str
    """What the template writes around an answer."""
    end: list[int]
    """Ids behind the last one that belongs to the answer."""


class BranchEncoder:
    """Captions and dialogues to `Branch`es; tokenised once, as long as they are not too many.

    A pair has one row: all its branches see its images, a dialogue is one branch with all its answers.

    Args:
        processor: of the model to be trained.
        question: what a caption answers.
        labels: see `llava.data.conversation.labels_from_spans`.

    Raises:
        ConfigError: the chat template does not say what the assistant's words are.
    """

    row_a_question = False
    """Whether each round of a dialogue is a branch of its own."""

    def __init__(
        self, processor: ChangeVLMProcessor, question: str = QUESTION, labels: LabelRule = "answer"
    ) -> None:
        self.processor, self.question, self.labels = processor, question, labels
        self._prompts: _Recent[tuple[str, list[int]]] = _Recent(PROMPTS_KEPT)
        self._captions: _Recent[Branch] = _Recent(CAPTIONS_KEPT)
        self._tail: _Tail | None = None
        whole = self.conversation(((question, _PROBES[0]),))
        if all(label == IGNORE for label in whole.answer_labels):
            raise ConfigError(
                "the processor's chat template marks no answer, so nothing would be learned: put the assistant's words "
                "between {% generation %} and {% endgeneration %}, or use chatml or vicuna"
            )
        self.prompt, self.prompt_labels = whole.prompt, whole.prompt_labels
        """Of all captions."""
        around = bound_of(processor.prompt(pair_conversation("")))
        two = processor.prompt(pair_conversation("", history=[("", "")]))
        self.start = len(self.prompt) + 2 * processor.image_seq_length
        """Tokens of a caption's prompt, images included."""
        self.per_round = bound_of(two) - around + _SLACK
        """Tokens of a round at most, beside its words."""
        self._tail = self._find_tail(whole)
        for probe in _PROBES:
            if self._appended(probe) != self.conversation(((question, probe),)):
                self._tail = None

    def caption(self, text: str) -> Branch:
        """A caption as the answer to `question`."""
        return self._captions.get(
            text, lambda: self._appended(text) or self.conversation(((self.question, text),))
        )

    def conversation(self, rounds: Rounds) -> Branch:
        """A dialogue of (question, answer) rounds, all answers learned."""
        *history, (question, answer) = [(asked, _no_image(answered)) for asked, answered in rounds]
        coded = self.processor.encode(pair_conversation(question, history, answer), labels=self.labels)
        ids, labels = coded["input_ids"], coded["labels"]
        _, prompt = self.asked(rounds[0][0])
        # shorter than the prompt only if the answer's first characters melt into its last token
        cut = min(_alike([ids, prompt]), len(ids) - 1)
        return Branch(ids[:cut], labels[:cut], ids[cut:], labels[cut:])

    def rows(self, branches: Sequence[Branch]) -> list[Row]:
        """The one row of a pair.

        Raises:
            ConfigError: a template that puts other words than the question before the images.
        """
        prompt, labels, answers = shared_prompt(branches)
        return [Row(*self._expanded(prompt, labels), answers)]

    def blank(self) -> Row:
        """A question and nothing to learn."""
        return Row(*self._expanded(self.prompt, self.prompt_labels), ())

    def _expanded(self, prompt: list[int], labels: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and labels with as many placeholders as both images have tokens."""
        ids, kept = np.array(prompt, np.int64), np.array(labels, np.int64)
        image = ids == self.processor.image_token_id
        if image.sum() != 2:
            raise ConfigError(
                "the chat template does not begin the same for all questions about a pair, so its images cannot be "
                "shared: set one_pass to false"
            )
        times = np.where(image, self.processor.image_seq_length, 1)
        return ids.repeat(times), kept.repeat(times)

    def asked(self, question: str) -> tuple[str, list[int]]:
        """Text and ids up to where the answer to a first question starts."""

        def make() -> tuple[str, list[int]]:
            text = self.processor.prompt(pair_conversation(question))
            return text, self.processor.tokenizer(text)["input_ids"]

        return self._prompts.get(question, make)

    def _find_tail(self, whole: Branch) -> _Tail | None:
        """How to append captions, from the whole encoding of the first probe; None where that cannot be."""
        tokenizer = self.processor.tokenizer
        asked, prompt = self.asked(self.question)
        messages = pair_conversation(self.question, answer=_PROBES[0])
        told = self.processor.prompt(messages, add_generation_prompt=False)
        left, found, right = told[len(asked) :].partition(_PROBES[0])
        marks = map(str, tokenizer.added_tokens_decoder.values())
        text = asked[max([0, *map(asked.rfind, marks)]) :]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        learned = len(whole.answer)
        while whole.answer_labels[learned - 1] == IGNORE:
            learned -= 1
        if not (told.startswith(asked) and found and whole.prompt == prompt and prompt[-len(ids) :] == ids):
            return None
        return _Tail(text, ids, left, right, whole.answer[learned:])

    def _appended(self, text: str) -> Branch | None:
        """The same as `conversation`, from the caption's own words; None if they need the whole text around them."""
        tail = self._tail
        # templates may trim answers, and cut marks such as </think> out of them
        if tail is None or "<" in text or text != text.strip():
            return None
        ids = self.processor.tokenizer(tail.text + tail.left + text + tail.right, add_special_tokens=False)[
            "input_ids"
        ]
        start, stop = len(tail.ids), len(ids) - len(tail.end)
        if ids[:start] != tail.ids or ids[stop:] != tail.end:
            return None
        return Branch(
            self.prompt, self.prompt_labels, ids[start:], [*ids[start:stop], *[IGNORE] * len(tail.end)]
        )


class QuestionEncoder:
    """The same for a DeltaVLM: a row a question, and so n of them for n rounds of a dialogue, each with the rounds
    before it as its history. Answers to one question are branches of its row.

    Args:
        processor: of the model to be trained.
        question: what a caption answers.

    Raises:
        ConfigError: another label rule than "answer".
    """

    row_a_question = True

    def __init__(
        self, processor: "DeltaVLMProcessor", question: str = QUESTION, labels: LabelRule = "answer"
    ) -> None:
        if labels != "answer":
            raise ConfigError(
                f"labels={labels!r}: a DeltaVLM learns answers and their end alone, labels: answer"
            )
        self.processor, self.question = processor, question
        self._prompts: _Recent[tuple[list[int], tuple[int, ...]]] = _Recent(PROMPTS_KEPT)
        self._captions: _Recent[Branch] = _Recent(CAPTIONS_KEPT)
        self.start = len(self._asked(question, ())[0])
        two = processor.prompt(_WORD, [(_WORD, _WORD)]).text
        self.per_round = processor.num_query_tokens + bound_of(two) + _SLACK

    def caption(self, text: str) -> Branch:
        """A caption as the answer to `question`."""
        return self._captions.get(text, lambda: self.conversation(((self.question, text),)))

    def conversation(self, rounds: Rounds) -> Branch:
        """The last round of some; only its answer is learned."""
        *history, (question, answer) = rounds
        prompt, reading = self._asked(question, tuple(history))
        told = self.processor.answer_ids(answer)
        return Branch(prompt, [IGNORE] * len(prompt), told, told, reading)

    def rows(self, branches: Sequence[Branch]) -> list[Row]:
        """A row for each question and history, in the order that they come."""
        found: dict[tuple[Any, ...], list[Branch]] = {}
        for branch in branches:
            found.setdefault((tuple(branch.prompt), branch.reading), []).append(branch)
        return [
            Row(
                same[0].prompt,
                same[0].prompt_labels,
                [(b.answer, b.answer_labels) for b in same],
                same[0].reading,
            )
            for same in found.values()
        ]

    def blank(self) -> Row:
        """A question and nothing to learn."""
        prompt, reading = self._asked(self.question, ())
        return Row(prompt, [IGNORE] * len(prompt), (), reading)

    def _asked(self, question: str, history: Rounds) -> tuple[list[int], tuple[int, ...]]:
        def make() -> tuple[list[int], tuple[int, ...]]:
            most = self.processor.max_prompt_tokens
            prompt = self.processor.prompt_ids(question, history, most=most)
            return prompt, tuple(self.processor.qformer_ids(question, history))

        return self._prompts.get((question, history), make)


_WORD = "a"


def encoder_of(
    processor: "AnyProcessor", question: str = QUESTION, labels: LabelRule = "answer"
) -> BranchEncoder | QuestionEncoder:
    """What makes rows of a model's kind of records.

    Raises:
        ConfigError: see there.
    """
    if isinstance(processor, ChangeVLMProcessor):
        return BranchEncoder(processor, question, labels)
    return QuestionEncoder(processor, question, labels)


_PROBES = ("a road is built", "2 houses, new (left).")


def _no_image(text: str) -> str:
    """Words of an answer never place an image."""
    return text.replace(IMAGE_TOKEN, "< image >")


def shared_prompt(
    branches: Sequence[Branch],
) -> tuple[list[int], list[int], list[tuple[list[int], list[int]]]]:
    """What all branches begin with (ids, labels), and the rest of each.

    Answers are shared by none, also where they begin alike: with the label rule "answer" no shared token is
    learned then, and no label needs a weight.
    """
    first = branches[0]
    cut = len(first.prompt)
    if any(branch.prompt is not first.prompt for branch in branches):
        rows = [list(zip(branch.prompt, branch.prompt_labels, strict=True)) for branch in branches]
        cut = _alike(rows)
    rest = [
        (branch.prompt[cut:] + branch.answer, branch.prompt_labels[cut:] + branch.answer_labels)
        for branch in branches
    ]
    return first.prompt[:cut], first.prompt_labels[:cut], rest


def _alike(rows: Sequence[Sequence[Any]]) -> int:
    """How many items all rows begin with alike."""
    columns = zip(*rows, strict=False)
    other = (i for i, column in enumerate(columns) if any(item != column[0] for item in column))
    return next(other, min(map(len, rows)))


class PairDataset(Dataset[Sample]):
    """Pairs with captions and dialogues; an item is asked for by a `Place`, or by its number in epoch 0.

    Args:
        records: any sequence. One with `pair_codes()` (see `llava.data.mixture.Records`) says itself which of its
            records are about one pair.
        root: folder that the records' paths are relative to.
        processor: of the model to be trained.
        captions: "all" gives all captions of a pair, and its dialogue, as one sample's branches; "random" one of them,
            drawn by seed, epoch and uid.
        one_pass: with "all", records of one listing with the same two image files are one sample. False: every caption
            is a sample of its own, as in published code.
        question: what a caption answers.
        labels: see `llava.data.conversation.labels_from_spans`.
        augment: other views of the pairs, drawn by seed, epoch and uid.
        masks: also read the records' change masks, where they have one.
        cache: keep resized images (8 bit) in memory: 2 * 3 * S * S bytes a pair.
        max_length: tokens of a sample, image tokens included; a pair with more is made several samples.
        max_branches: the same for answers.
        on_error: what a broken image, or an answer longer than `max_length`, does: "raise", or "skip": the sample
            teaches nothing and says so in `Sample.skipped`.
        seed: of the drawn captions and views.

    Raises:
        DataError: records without a word to learn; on access, with "raise": what is broken, by uid and file.
        ConfigError: an unknown choice, or a chat template that cannot be learned from.
    """

    def __init__(
        self,
        records: Sequence[Record],
        root: str | Path,
        processor: "AnyProcessor",
        *,
        captions: CaptionChoice = "all",
        one_pass: bool = True,
        question: str = QUESTION,
        labels: LabelRule = "answer",
        augment: Augmentation | None = None,
        masks: bool = False,
        cache: bool = False,
        max_length: int = 32768,
        max_branches: int = MAX_BRANCHES,
        on_error: OnError = "raise",
        seed: int = 0,
    ) -> None:
        if captions not in ("all", "random") or on_error not in ("raise", "skip"):
            raise ConfigError(
                f"captions={captions!r}, on_error={on_error!r}; known: all or random, raise or skip"
            )
        if augment is not None and cache:
            raise ConfigError("views that differ from epoch to epoch cannot be kept: cache_images or augment")
        self.records, self.root, self.processor = records, Path(root), processor
        self.augment = augment
        self.captions, self.masks, self.on_error, self.seed = captions, masks, on_error, seed
        self.max_length = max_length
        self.encoder = encoder_of(processor, question, labels)
        self._views: dict[tuple[str, str], list[Image.Image]] | None = {} if cache else None
        self._order = np.arange(len(records))
        """[R], numbers of records, those of a pair beside one another."""
        counts, bounds = self._measured()
        self._spans = self._cut(counts, bounds, one_pass, max_branches)
        """[samples, 4]: first and last place in `_order`, first and last branch of these records (half open)."""

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, place: "int | Place") -> Sample:
        if not isinstance(place, Place):
            place = Place(range(len(self))[place])
        if place.index == FILLER:
            return self._blank("")
        first, last, start, stop = self._spans[place.index]
        records = [self.records[int(i)] for i in self._order[first:last]]
        told = [(record, words) for record in records for words in self._words(record)]
        if self.captions == "random":
            told = [random.Random(f"{self.seed}/{place.epoch}/{records[0].uid}").choice(told)]
        else:
            told = told[start:stop]
        uids = tuple(dict.fromkeys(record.uid for record, _ in told))
        record = told[0][0]
        text, *more = self.encoder.rows(self._encoded(words for _, words in told))
        length = max(row.length for row in (text, *more))
        if length > self.max_length:
            reason = f"{length} tokens are more than max_length={self.max_length}; raise it, or leave the record out"
            return self._failed(uids, None, reason)
        view = None
        if self.augment is not None:
            view = self.augment.view(
                (record for record, _ in told), f"{self.seed}/{place.epoch}/{record.uid}"
            )
        try:
            pixels = self.processor.image_processor.normalise(self._fitted(record, view))
            share = self._changed_share(records, view) if self.masks else None
        except ImageError as error:
            return self._failed(uids, _named(error, records, self.root), str(error), error)
        fields = text._asdict()
        return Sample(uids[0], pixels, **fields, changed_share=share, also=uids[1:], more=tuple(more))

    def _failed(
        self, uids: tuple[str, ...], file: str | None, reason: str, cause: Exception | None = None
    ) -> Sample:
        """The end of the run, or a sample that teaches nothing and says why.

        Raises:
            DataError: unless errors are to be skipped.
        """
        if self.on_error == "raise":
            raise DataError(f"sample {', '.join(map(repr, uids))}: {reason}") from cause
        return self._blank(
            uids[0], tuple({"uid": uid, "file": file, "reason": reason} for uid in uids), also=uids[1:]
        )

    def _blank(
        self, uid: str, skipped: tuple[dict[str, Any], ...] = (), also: tuple[str, ...] = ()
    ) -> Sample:
        """A black pair with a question and nothing to learn."""
        prepare = self.processor.image_processor
        black = [Image.new("RGB", (prepare.size, prepare.size))] * 2
        fields = self.encoder.blank()._asdict()
        return Sample(uid, prepare.normalise(black), **fields, also=also, skipped=skipped)

    def _words(self, record: Record) -> list[str | Rounds]:
        """The branches of a record, in words: captions, and dialogues up to the last answer that is learned."""
        rounds = record.conversation
        if self.encoder.row_a_question:
            return [*record.change_caption, *(rounds[: i + 1] for i in range(len(rounds)))]
        return [*record.change_caption, *([rounds] if rounds else [])]

    def _encoded(self, told: Iterable[str | Rounds]) -> list[Branch]:
        return [
            self.encoder.caption(words) if isinstance(words, str) else self.encoder.conversation(words)
            for words in told
        ]

    def _fitted(self, record: Record, view: View | None) -> list[Image.Image]:
        """Both images, seen and resized."""
        key = (record.img1_path, record.img2_path)
        if self._views is not None and key in self._views:
            return self._views[key]
        images: Iterable[Image.Image] = load_pair(*record.paths(self.root))
        if view is not None:
            images = [view.of(image) for image in images]
        views = [self.processor.image_processor.fit(image) for image in images]
        if self._views is not None:
            self._views[key] = views
        return views

    def _changed_share(self, records: Sequence[Record], view: View | None) -> Tensor | None:
        """[N] of the first record with a mask, see `Sample`."""
        path = next((record.mask_path for record in records if record.mask_path is not None), None)
        if path is None:
            return None
        drawn = load_image(self.root / path).convert("L")
        if view is not None:
            drawn = view.of(drawn, Image.Resampling.NEAREST)
        mask = torch.from_numpy(np.array(drawn) > 0)  # [H, W]
        grid = math.isqrt(self.processor.image_seq_length)
        return F.adaptive_avg_pool2d(mask[None].float(), grid).flatten()

    # --- which records and branches make a sample ---------------------------------------------------

    def _measured(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[R] branches of each record, and [R] tokens that they have at most.

        Raises:
            DataError: records without a word to learn.
        """
        per_round, each = self.encoder.per_round, self.encoder.row_a_question
        counts, bounds, bare = [], [], []
        for record in self.records:
            captions, rounds = record.change_caption, record.conversation
            texts = [*captions, *(answer for _, answer in rounds)]
            if not texts or not all(map(str.strip, texts)):
                bare.append(record.uid)
            counts.append(len(captions) + (len(rounds) if each else bool(rounds)))
            bound = sum(map(bound_of, captions)) + per_round * len(captions)
            if rounds:
                bound += sum(bound_of(q) + bound_of(a) + per_round for q, a in rounds)
            bounds.append(bound)
        if bare:
            raise DataError(
                f"{len(bare)} records have no caption and no dialogue to learn from, or an empty one: "
                f"{', '.join(map(repr, bare[:5]))}{', ...' if len(bare) > 5 else ''}; leave them out"
            )
        return np.array(counts, np.int64), np.array(bounds, np.int64)

    def _cut(
        self, counts: NDArray[np.int64], bounds: NDArray[np.int64], one_pass: bool, max_branches: int
    ) -> NDArray[np.int64]:
        """See `_spans`; sets `_order`."""
        places = np.arange(len(counts))
        if self.captions == "random":
            return np.stack([places, places + 1, 0 * places, counts], 1)
        if not one_pass:
            places = places.repeat(counts)
            branch = np.arange(len(places)) - (counts.cumsum() - counts).repeat(counts)
            return np.stack([places, places + 1, branch, branch + 1], 1)
        self._order, edges = _groups(_pair_codes(self.records))
        totals = np.add.reduceat(counts[self._order], edges[:-1]) if len(counts) else counts
        most = np.add.reduceat(bounds[self._order], edges[:-1]) if len(counts) else bounds
        most += self.encoder.start
        spans = np.stack([edges[:-1], edges[1:], 0 * totals, totals], 1)
        parts: list[NDArray[np.int64]] = []
        done = 0
        for number in np.flatnonzero((totals > max_branches) | (most > self.max_length)).tolist():
            parts += [spans[done:number], self._split(spans[number], max_branches)]
            done = number + 1
        return np.concatenate([*parts, spans[done:]]).astype(np.int32)

    def _split(self, span: NDArray[np.int64], max_branches: int) -> NDArray[np.int64]:
        """The samples of one pair with many branches, or long ones."""
        first, last, _, count = map(int, span)
        told = [words for i in self._order[first:last] for words in self._words(self.records[int(i)])]
        branches = self._encoded(told)
        starts = [0]
        for stop in range(2, count + 1):
            rows = self.encoder.rows(branches[starts[-1] : stop])
            if stop - starts[-1] > max_branches or max(row.length for row in rows) > self.max_length:
                starts.append(stop - 1)
        return np.array([[first, last, a, b] for a, b in zip(starts, [*starts[1:], count], strict=True)])


_SLACK = 8
"""Tokens that a text may have beyond its bytes: marks of its own that a tokenizer adds."""


def bound_of(text: str) -> int:
    """More tokens than a text has bytes are not made of it; three times as many may appear when it is normalised."""
    return len(text) if text.isascii() else 3 * len(text.encode())


def _pair_codes(records: Sequence[Record]) -> NDArray[np.int64]:
    """[R], equal for records of one listing with the same two images; a record that comes again is of another one."""
    own = getattr(records, "pair_codes", None)
    if own is not None:
        return np.asarray(own())
    seen: dict[str, int] = {}
    known: dict[tuple[str, str, int], int] = {}
    codes = []
    for record in records:
        time = seen[record.uid] = seen.get(record.uid, -1) + 1
        codes.append(known.setdefault((record.img1_path, record.img2_path, time), len(known)))
    return np.array(codes, np.int64)


def _groups(codes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of equal codes beside one another [R], groups as they come first; and where each group begins [G + 1]."""
    _, first, group, sizes = np.unique(codes, return_index=True, return_inverse=True, return_counts=True)
    by_coming = np.argsort(first)
    rank = np.empty_like(by_coming)
    rank[by_coming] = np.arange(len(first))
    edges = np.concatenate([[0], sizes[by_coming].cumsum()])
    return np.argsort(rank[group], kind="stable"), edges


def _named(error: ImageError, records: Sequence[Record], root: Path) -> str:
    """The file that an error is about: its message begins with it."""
    files = [str(path) for record in records for path in record.paths(root)]
    files += [str(root / record.mask_path) for record in records if record.mask_path is not None]
    return next((file for file in files if str(error).startswith(f"{file}:")), files[0])


def text_sample(uid: str, processor: ChangeVLMProcessor, text: str) -> Sample:
    """A caption alone, without images or question: wording for a language model to pick up."""
    start = processor.tokenizer("<|im_start|>assistant\n")["input_ids"]
    ids = processor.tokenizer(text + "<|im_end|>")["input_ids"]
    return Sample(uid, torch.empty(0), start, [IGNORE] * len(start), [(ids, ids)])

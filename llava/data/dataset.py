"""Records to samples: a pair's pixels, what all its captions share, and the captions that branch off behind it.

A DeltaVLM looks at a pair anew for each question, so its sample has a row of text a question, and one pair's pixels.

Legend: I images of a sample, C channels, S side in pixels, N tokens of an image, R records.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from llava.data.augment import Augmentation, View
from llava.data.conversation import IGNORE, LabelRule
from llava.data.encode import Branch, Ids, Rounds, Row, bound_of, encoder_of
from llava.data.images import load_mask, load_pair
from llava.data.json_line import encodable
from llava.data.record import Record
from llava.data.sampler import FILLER, Place
from llava.errors import ConfigError, DataError, ImageError
from llava.model.processing import ChangeVLMProcessor
from llava.tasks.labels import object_middles

if TYPE_CHECKING:
    from llava.family import AnyProcessor

CaptionChoice = Literal["all", "random"]
OnError = Literal["raise", "skip"]
MAX_BRANCHES = 64


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
    """[N, C], how much of each patch's place changed, 0..1, and how much to each class, where the record has a mask."""
    object_middles: Tensor | None = None
    """[N, K], 1 where a connected object of the mask has its middle, by class; K = 1 where a mask tells none apart."""
    also: tuple[str, ...] = ()
    """Uids of further records on the same pair that are in here."""
    skipped: tuple[dict[str, Any], ...] = ()
    """What could not be read: uid, file, reason."""
    reading: Ids = ()
    """As in `Row`, of the first one."""
    weights: Sequence[float] = ()
    """As in `Row`, of the first one."""
    more: tuple[Row, ...] = ()
    """Further texts about the pair, where each question has a row of its own."""

    @property
    def rows(self) -> tuple[Row, ...]:
        """All texts about the pair."""
        return (Row(self.prompt, self.prompt_labels, self.answers, self.reading, self.weights), *self.more)


class PairDataset(Dataset[Sample]):
    """Pairs with captions and dialogues; an item is asked for by a `Place`, or by its number in epoch 0.

    Args:
        records: any sequence. One with `pair_codes()` (see `llava.data.mixture.Records`) says itself which of its
            records are about one pair.
        root: folder that the records' paths are relative to.
        processor: of the model to be trained.
        captions: "all" gives all captions of a pair, and its dialogue, as one sample's branches; "random" one of them,
            drawn by seed, epoch, uid, and how often the record has come before.
        one_pass: with "all", records of one listing with the same two image files are one sample. False: every caption
            is a sample of its own, as in published code.
        labels: see `llava.data.conversation.labels_from_spans`.
        task_weights: how much the answers of a task count in the loss, beside 1 for those it does not name.
        augment: other views of the pairs, drawn likewise.
        mask_grid: also read the change masks, of records that have one, as means over so many patches each way.
        mask_covered: share of an image's side that these patches cover; the rest, to the right and below, is seen by
            none: 27 patches of 14 cover 378 of 384 pixels.
        mask_objects: also find the connected objects of these masks.
        mask_levels: grey levels that tell a mask's classes apart, C - 1 of them.
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
        labels: LabelRule = "answer",
        task_weights: Mapping[str, float] | None = None,
        augment: Augmentation | None = None,
        mask_grid: int = 0,
        mask_covered: float = 1.0,
        mask_objects: bool = False,
        mask_levels: Sequence[int] = (),
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
        self.augment, self.task_weights = augment, dict(task_weights or {})
        self.mask_levels = tuple(mask_levels)
        self.captions, self.on_error, self.seed = captions, on_error, seed
        self.mask_grid, self.mask_covered, self.mask_objects = mask_grid, mask_covered, mask_objects
        self.max_length = max_length
        self.encoder = encoder_of(processor, labels)
        self._views: dict[tuple[str, str], list[Image.Image]] | None = {} if cache else None
        self._order = np.arange(len(records))
        """[R], numbers of records, those of a pair beside one another."""
        self._times = _times(records) if captions == "random" or augment is not None else None
        """[R], how often a record has come before: what is drawn for one that a mixture repeats differs."""
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
            told = [random.Random(self._key(place, records[0])).choice(told)]
        else:
            told = told[start:stop]
        uids = tuple(dict.fromkeys(record.uid for record, _ in told))
        record = told[0][0]
        branches = self._encoded(words for _, words in told)
        if self.task_weights:
            weights = (self.task_weights.get(record.asks or "", 1.0) for record, _ in told)
            branches = [b._replace(weight=w) for b, w in zip(branches, weights, strict=True)]
        text, *more = self.encoder.rows(branches)
        length = max(row.length for row in (text, *more))
        if length > self.max_length:
            reason = f"{length} tokens are more than max_length={self.max_length}; raise it, or leave the record out"
            return self._failed(uids, None, reason)
        view = None
        if self.augment is not None:
            view = self.augment.view((record for record, _ in told), self._key(place, record))
        try:
            pixels = self.processor.image_processor.normalise(self._fitted(record, view))
            shares, middles = self._mask(records, view) if self.mask_grid else (None, None)
        except ImageError as error:
            return self._failed(uids, _named(error, records, self.root), str(error), error)
        fields = text._asdict()
        return Sample(
            uids[0],
            pixels,
            **fields,
            changed_share=shares,
            object_middles=middles,
            also=uids[1:],
            more=tuple(more),
        )

    def _key(self, place: Place, record: Record) -> str:
        """What is drawn for a sample follows from it."""
        time = 0 if self._times is None else int(self._times[self._order[self._spans[place.index][0]]])
        return f"{self.seed}/{place.epoch}/{record.uid}" + (f"/{time}" if time else "")

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

    def _mask(self, records: Sequence[Record], view: View | None) -> tuple[Tensor | None, Tensor | None]:
        """Shares [N, C] and middles [N, max(C - 1, 1)] of the first record with a mask, see `Sample`.

        Raises:
            ImageError: a level that is none of `mask_levels`.
        """
        path = next((record.mask_path for record in records if record.mask_path is not None), None)
        if path is None:
            return None, None
        drawn = load_mask(self.root / path)
        if drawn.mode != "I":
            drawn = drawn.convert("L")
        if view is not None:
            drawn = view.of(drawn, Image.Resampling.NEAREST)
        levels = np.array(drawn)  # [H, W]
        if self.processor.image_processor.aspect != "square":  # the image, too, is laid on a square
            more = max(levels.shape) - np.array(levels.shape)
            levels = np.pad(levels, [(n // 2, n - n // 2) for n in more.tolist()])
        if self.mask_levels and (others := set(np.unique(levels).tolist()) - {0, *self.mask_levels}):
            known = list(self.mask_levels)
            raise ImageError(
                f"{self.root / path}: has grey levels {sorted(others)[:5]}; mask_levels are {known}"
            )
        masks = np.stack([levels > 0, *(levels == level for level in self.mask_levels)])  # [C, H, W]
        grid, covered = self.mask_grid, self.mask_covered
        height, width = (max(1, round(side * covered)) for side in levels.shape)
        seen = torch.from_numpy(masks[:, :height, :width]).float()
        shares = F.adaptive_avg_pool2d(seen, grid).flatten(1).T  # [N, C]
        if not self.mask_objects:
            return shares, None
        classes = masks[1:] if self.mask_levels else masks
        middles = torch.zeros(grid * grid, len(classes))
        for k, hits in enumerate(classes):
            row, column = np.minimum(object_middles(hits) / covered * grid, grid - 1).astype(int).T
            middles[row * grid + column, k] = 1
        return shares, middles

    # --- which records and branches make a sample ---------------------------------------------------

    def _measured(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[R] branches of each record, and [R] tokens that they have at most.

        Raises:
            DataError: records without a word to learn.
        """
        per_round, each = self.encoder.per_round, self.encoder.row_a_question
        counts, bounds, bare, half = [], [], [], []
        for record in self.records:
            captions, rounds = record.change_caption, record.conversation
            texts = [*captions, *(answer for _, answer in rounds)]
            if not texts or not all(map(str.strip, texts)):
                bare.append(record.uid)
            if not all(map(encodable, (*texts, *(question for question, _ in rounds)))):
                half.append(record.uid)
                continue
            counts.append(len(captions) + (len(rounds) if each else bool(rounds)))
            bound = sum(map(bound_of, captions)) + per_round * len(captions)
            if rounds:
                bound += sum(bound_of(q) + bound_of(a) + per_round for q, a in rounds)
            bounds.append(bound)
        if half:
            raise DataError(
                f"{len(half)} records have texts with half a character (of a cut emoji, say), which no tokenizer "
                f"takes: {', '.join(map(repr, half[:5]))}{', ...' if len(half) > 5 else ''}; mend them"
            )
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
        self._order, edges = _groups(pair_codes(self.records))
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


def _times(records: Sequence[Record]) -> NDArray[np.int32]:
    """[R], how many records with its uid are before each."""
    seen: dict[str, int] = {}
    times = np.zeros(len(records), np.int32)
    for i, record in enumerate(records):
        times[i] = seen[record.uid] = seen.get(record.uid, -1) + 1
    return times


def pair_codes(records: Sequence[Record]) -> NDArray[np.int64]:
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

"""Records to answers: batches formed by length, files read while the model works, one captioner for all.

Each pair is asked a question, or the rounds of a dialogue in order, each with what was said before. Files are read, and
pairs encoded, once for batches about the same pairs that follow one another.
"""

import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from zlib import crc32

from llava.data.record import Record
from llava.errors import DataError, ImageError, LlavaError

if TYPE_CHECKING:
    from torch import dtype

    from llava.captioner import Answer, ChangeCaptioner, EncodedPairs, PairPixels
    from llava.eval.metrics import Scores
    from llava.generation import Generation

T = TypeVar("T")
AHEAD = 2
"""Batches that are read ahead of the model."""

Mode = Literal["own", "gold"]
"""What a round of a dialogue is told of the rounds before it: the model's own answers, or the true ones."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What is asked of one pair."""

    questions: tuple[str, ...]
    """One, or the rounds of a dialogue in order."""
    gold: tuple[str, ...] = ()
    """The true answers, for histories of the mode "gold"."""
    modes: tuple[Mode, ...] = ("own",)
    """The rounds are gone through once for each; the first is answered once, for it has no history."""


@dataclass(frozen=True)
class Spoken:
    """What was said to one `Ask`."""

    rounds: "Mapping[Mode, tuple[Answer, ...]]"
    """An answer for each round, for each mode."""

    @property
    def last(self) -> "Answer":
        """The last answer of the first mode; for a single question, the answer."""
        return next(iter(self.rounds.values()))[-1]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Records that are answered at once, with as many rounds each."""

    records: Sequence[Record]
    how: "Generation"
    group: int = 0
    """Batches of one group are about the same pairs, or some of them, and belong to one process."""
    map_side: int | None = None
    """Also give change maps, with a longer side of so many pixels."""


def shuffle_pairs(records: Sequence[Record], seed: int = 0) -> list[Record]:
    """The same texts and uids, each with the images (and the mask) of another pair: what a model says without
    looking. Records of one pair are shown the same other one.

    Raises:
        DataError: fewer than two pairs.
    """
    pairs = {(record.img1_path, record.img2_path): record for record in reversed(records)}
    shown = list(reversed(pairs.values()))  # in the order of their first records
    if len(shown) < 2:
        raise DataError("shuffling images among pairs needs records of at least two pairs")
    order = list(range(len(shown)))
    random.Random(seed).shuffle(order)
    partner = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle: nobody keeps their own
    others = {(one.img1_path, one.img2_path): shown[partner[i]] for i, one in enumerate(shown)}
    return [
        replace(record, img1_path=other.img1_path, img2_path=other.img2_path, mask_path=other.mask_path)
        for record in records
        for other in (others[record.img1_path, record.img2_path],)
    ]


def make_batches(
    records: Sequence[Record], size: int, lengths: Mapping[str, int] | None = None
) -> list[list[Record]]:
    """Batches of `size`, the last one of what is left. They depend on nothing but the arguments.

    Args:
        lengths: uid -> tokens of its prompt. Longest first, so that a batch that is too much for the memory is
            the first one; equal lengths keep their order.
    """
    ordered = sorted(records, key=lambda record: -lengths[record.uid]) if lengths else list(records)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def of_first_pairs(records: Sequence[Record], count: int | None) -> list[Record]:
    """All records of the first `count` pairs, whatever is asked of them; None: of all."""
    first: dict[tuple[str, str], None] = {}
    for pair in about_pairs(records):
        if count is not None and len(first) == count:
            break
        first[pair] = None
    return [record for record, pair in zip(records, about_pairs(records), strict=True) if pair in first]


def about_pairs(records: Sequence[Record]) -> list[tuple[str, str]]:
    """The images of each."""
    return [(record.img1_path, record.img2_path) for record in records]


def answer_batches(
    captioner: "ChangeCaptioner",
    batches: Sequence[Sequence[Record]],
    root: Path,
    how: "Generation",
    *,
    questions: Mapping[str, str] | None = None,
    workers: int = 2,
    skip_errors: bool = False,
    autocast: "dtype | None" = None,
    map_side: int | None = None,
) -> "Iterator[dict[str, Answer | ImageError]]":
    """`ask_batches` with one question a pair: uid -> its answer.

    Args:
        how: the settings of every batch.
        questions: uid -> question; the model's own for a caption by default.
        map_side: also give change maps, with a longer side of so many pixels.
    """
    asked = questions or {}
    made = ask_batches(
        captioner,
        [Batch(records=batch, how=how, map_side=map_side) for batch in batches],
        root,
        {r.uid: Ask(questions=(asked.get(r.uid, captioner.caption_question),)) for b in batches for r in b},
        workers=workers,
        skip_errors=skip_errors,
        autocast=autocast,
    )
    for spoken in made:
        yield {uid: one.last if isinstance(one, Spoken) else one for uid, one in spoken.items()}


def ask_batches(
    captioner: "ChangeCaptioner",
    batches: Sequence[Batch],
    root: Path,
    asks: Mapping[str, Ask],
    *,
    workers: int = 2,
    skip_errors: bool = False,
    autocast: "dtype | None" = None,
) -> "Iterator[dict[str, Spoken | ImageError]]":
    """Work through batches: uid -> what was said for each of them, one batch at a time and in order.

    Args:
        batches: a batch's random numbers follow from the seed of its settings and its first uid, so they do not depend
            on which process works on it.
        root: folder the records' paths count from.
        asks: uid -> what is asked; in one batch as many rounds and the same modes.
        workers: threads that read and resize images ahead of the model.
        skip_errors: give the error of a pair that cannot be read in place of its answers.
        autocast: precision of the model's work, where that is not to be the weights' own.

    Raises:
        ImageError: a pair that cannot be read; it is named.
        LlavaError: too little memory for the batch.
    """
    held: tuple[list[tuple[str, str]], EncodedPairs] | None = None
    with ThreadPoolExecutor(workers, thread_name_prefix="llava-read") as pool:
        for batch, read in _read_ahead(captioner, batches, root, pool):
            answers: dict[str, Spoken | ImageError] = {}
            good: list[tuple[Record, PairPixels]] = []
            for record, pixels in zip(batch.records, read, strict=True):
                if not isinstance(pixels, ImageError):
                    good.append((record, pixels))
                elif skip_errors:
                    answers[record.uid] = pixels
                else:
                    raise ImageError(
                        f"pair {record.uid!r}: {pixels} (--skip-errors goes on without such pairs)"
                    ) from pixels
            if good:
                pairs = about_pairs([record for record, _ in good])
                known = held[1] if held is not None and held[0] == pairs else None
                held = None  # what is not needed any more is gone before the next is made
                asked = _Conversations(captioner, batch, good, asks, autocast, known)
                said = asked.all_rounds()
                held = pairs, asked.encoded
                del asked
                answers |= {record.uid: one for (record, _), one in zip(good, said, strict=True)}
            yield {record.uid: answers[record.uid] for record in batch.records}


class _Conversations:
    """The rounds of one batch's pairs, asked together."""

    def __init__(
        self,
        captioner: "ChangeCaptioner",
        batch: Batch,
        good: "Sequence[tuple[Record, PairPixels]]",
        asks: Mapping[str, Ask],
        autocast: "dtype | None",
        known: "EncodedPairs | None",
    ) -> None:
        self.captioner, self.batch, self.autocast = captioner, batch, autocast
        self.encoded = known or self._work(
            lambda: captioner.encode_batch([pixels for _, pixels in good]), len(good)
        )
        self.asks = [asks[record.uid] for record, _ in good]
        self.first_uid = good[0][0].uid

    def all_rounds(self) -> list[Spoken]:
        modes, rounds = self.asks[0].modes, len(self.asks[0].questions)
        said: dict[Mode, list[list[Answer]]] = {}
        for mode in modes:
            first = said[modes[0]] if said else [[answer] for answer in self._ask(0, mode, [])]
            said[mode] = [answers[:1] for answers in first]
            for number in range(1, rounds):
                for answers, answer in zip(said[mode], self._ask(number, mode, said[mode]), strict=True):
                    answers.append(answer)
        return [Spoken({mode: tuple(said[mode][i]) for mode in modes}) for i in range(len(self.asks))]

    def _ask(self, number: int, mode: Mode, said: "Sequence[Sequence[Answer]]") -> "list[Answer]":
        """The answers of one round."""
        how = self.batch.how
        place = f"{how.seed}/{self.first_uid}" + (f"/{mode}/{number}" if number else "")
        seed = None if how.seed is None else crc32(place.encode("utf-8", "replace"))
        options: dict[str, Any] = {
            **vars(how),
            "seed": seed,
            "map_side": None if number else self.batch.map_side,
        }
        if number:
            options["history"] = [
                tuple(zip(ask.questions[:number], self._before(ask, mode, one), strict=False))
                for ask, one in zip(self.asks, said, strict=True)
            ]
        questions = [ask.questions[number] for ask in self.asks]
        return self._work(
            lambda: self.captioner.answer_batch(self.encoded, questions, **options), len(questions)
        )

    def _work(self, make: "Callable[[], T]", pairs: int) -> "T":
        """What the model makes of so many pairs, in the precision asked for."""
        import torch

        kind = self.captioner.model.device.type
        try:
            with torch.autocast(kind, self.autocast) if self.autocast else nullcontext():
                return make()
        except torch.OutOfMemoryError as error:
            raise LlavaError(
                f"out of memory with {pairs} pairs at once; a smaller --batch-size goes on where this one stopped"
            ) from error

    @staticmethod
    def _before(ask: Ask, mode: Mode, said: "Sequence[Answer]") -> Sequence[str]:
        return ask.gold if mode == "gold" else [answer.text for answer in said]


def _read_ahead(
    captioner: "ChangeCaptioner", batches: Sequence[Batch], root: Path, pool: ThreadPoolExecutor
) -> "Iterator[tuple[Batch, list[PairPixels | ImageError]]]":
    """Batches with the pixels of their pairs, or why there are none."""

    def read(record: Record) -> "PairPixels | ImageError":
        try:
            return captioner.read(*record.paths(root))
        except ImageError as error:
            return error

    waiting: deque[tuple[Batch, list[Future[PairPixels | ImageError]]]] = deque()
    under_way: dict[
        tuple[str, str], Future[PairPixels | ImageError]
    ] = {}  # of the last batch that was sent for
    try:
        for batch in batches:
            under_way = {
                pair: under_way[pair] if pair in under_way else pool.submit(read, record)
                for pair, record in zip(about_pairs(batch.records), batch.records, strict=True)
            }
            waiting.append((batch, [under_way[pair] for pair in about_pairs(batch.records)]))
            if len(waiting) > AHEAD:
                first, futures = waiting.popleft()
                yield first, [future.result() for future in futures]
        while waiting:
            first, futures = waiting.popleft()
            yield first, [future.result() for future in futures]
    finally:
        for _, futures in waiting:
            for future in futures:
                future.cancel()


def predict(
    captioner: "ChangeCaptioner",
    records: Sequence[Record],
    root: Path,
    *,
    batch_size: int = 16,
    say: bool = True,
) -> "dict[str, Answer]":
    """An answer for each record, in the records' order, by uid; greedy. Nothing is written.

    Raises:
        ImageError: a pair that cannot be read; it is named.
    """
    answers: dict[str, Answer] = {}
    told = Progress(len(records), say=say)
    for made in answer_batches(captioner, make_batches(records, batch_size), root, captioner.generation):
        for uid, answer in made.items():
            assert not isinstance(answer, ImageError)
            answers[uid] = answer
        told.tell(len(answers))
    return answers


class Progress:
    """How far and how fast, on standard error, every few seconds and at the end.

    Args:
        total: pairs to do.
        done: pairs that were done before.
        say: nothing is printed where it is off.
    """

    def __init__(self, total: int, done: int = 0, *, say: bool = True, every: float = 10.0) -> None:
        self.total, self.before, self.say, self.every = total, done, say, every
        self._start = self._told = time.monotonic()

    def tell(self, done: int) -> None:
        """So many are done now, those done before included."""
        now = time.monotonic()
        if self.say and (now - self._told > self.every or done == self.total):
            self._told = now
            rate = (done - self.before) / max(now - self._start, 1e-9)
            print(f"{done}/{self.total} pairs, {rate:.2f} pairs/s", file=sys.stderr, flush=True)


def score_texts(
    texts: Mapping[str, str], records: Sequence[Record], *, meteor: bool = True, baselines: bool = True
) -> "Scores":
    """The scores of captions, by uid, against the captions of `records`; a pair changed as its record says, or
    else as most of its captions do."""
    from llava.eval.metrics import mostly_changed, score

    changed = {
        record.uid: mostly_changed(record.change_caption)
        if record.change_flag is None
        else record.change_flag
        for record in records
    }
    return score(
        texts,
        {record.uid: record.change_caption for record in records},
        changed,
        meteor=meteor,
        baselines=baselines,
    )


def score_answers(
    answers: "Mapping[str, Answer]", records: Sequence[Record], *, baselines: bool = True
) -> "Scores":
    """As `score_texts`, of what `predict` gave."""
    return score_texts({uid: answer.text for uid, answer in answers.items()}, records, baselines=baselines)

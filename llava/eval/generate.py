"""Records to answers: batches formed by length, files read while the model works, one captioner for all."""

import random
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

from llava.data.conversation import QUESTION
from llava.data.record import Record
from llava.errors import DataError, ImageError, LlavaError

if TYPE_CHECKING:
    from torch import dtype

    from llava.captioner import Answer, ChangeCaptioner, PairPixels
    from llava.eval.metrics import Scores
    from llava.generation import Generation

AHEAD = 2
"""Batches that are read ahead of the model."""


def shuffle_pairs(records: Sequence[Record], seed: int = 0) -> list[Record]:
    """The same captions and uids, each with the images (and the mask) of another pair: what a model says
    without looking.

    Raises:
        DataError: fewer than two records.
    """
    if len(records) < 2:
        raise DataError("shuffling images among pairs needs at least two records")
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    partner = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle: nobody keeps their own
    shown = [records[partner[i]] for i in range(len(records))]
    return [
        replace(record, img1_path=other.img1_path, img2_path=other.img2_path, mask_path=other.mask_path)
        for record, other in zip(records, shown, strict=True)
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
    """Work through batches: uid -> answer for each of them, one batch at a time and in order.

    Args:
        root: folder the records' paths count from.
        how: the settings. A batch's random numbers follow from `how.seed` and its first uid, so they do not
            depend on which process works on it.
        questions: uid -> question; the caption's by default.
        workers: threads that read and resize images ahead of the model.
        skip_errors: give the error of a pair that cannot be read in place of its answer.
        map_side: also give change maps, with a longer side of so many pixels.
        autocast: precision of the model's work, where that is not to be the weights' own.

    Raises:
        ImageError: a pair that cannot be read; it is named.
        LlavaError: too little memory for the batch.
    """
    import torch

    asked = questions or {}
    kind = captioner.model.device.type
    with ThreadPoolExecutor(workers, thread_name_prefix="llava-read") as pool:
        for batch, read in _read_ahead(captioner, batches, root, pool):
            answers: dict[str, Answer | ImageError] = {}
            good: list[tuple[Record, PairPixels]] = []
            for record, pixels in zip(batch, read, strict=True):
                if not isinstance(pixels, ImageError):
                    good.append((record, pixels))
                elif skip_errors:
                    answers[record.uid] = pixels
                else:
                    raise ImageError(
                        f"pair {record.uid!r}: {pixels} (--skip-errors goes on without such pairs)"
                    ) from pixels
            if good:
                place = f"{how.seed}/{good[0][0].uid}".encode("utf-8", "replace")
                options = {**vars(how), "seed": None if how.seed is None else crc32(place)}
                try:
                    with torch.autocast(kind, autocast) if autocast else nullcontext():
                        said = captioner.answer_batch(
                            [pixels for _, pixels in good],
                            [asked.get(record.uid, QUESTION) for record, _ in good],
                            map_side=map_side,
                            **options,
                        )
                except torch.OutOfMemoryError as error:
                    raise LlavaError(
                        f"out of memory with {len(good)} pairs at once; a smaller --batch-size goes on where this "
                        "one stopped"
                    ) from error
                answers |= {record.uid: answer for (record, _), answer in zip(good, said, strict=True)}
            yield {record.uid: answers[record.uid] for record in batch}


def _read_ahead(
    captioner: "ChangeCaptioner", batches: Sequence[Sequence[Record]], root: Path, pool: ThreadPoolExecutor
) -> "Iterator[tuple[Sequence[Record], list[PairPixels | ImageError]]]":
    """Batches with the pixels of their pairs, or why there are none."""

    def read(record: Record) -> "PairPixels | ImageError":
        try:
            return captioner.read(*record.paths(root))
        except ImageError as error:
            return error

    waiting: deque[tuple[Sequence[Record], list[Future[PairPixels | ImageError]]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, [pool.submit(read, record) for record in batch]))
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

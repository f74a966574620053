"""Records to captions: the same captioner a user holds, over a whole set."""

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llava.data.record import Record
from llava.errors import DataError

if TYPE_CHECKING:
    from llava.captioner import Answer, ChangeCaptioner


def shuffle_pairs(records: Sequence[Record], seed: int = 0) -> list[Record]:
    """The same captions and uids, each with the images of another pair: what a model says without looking.

    Raises:
        DataError: fewer than two records.
    """
    if len(records) < 2:
        raise DataError("shuffling images among pairs needs at least two records")
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    partner = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle: nobody keeps their own
    return [
        replace(record, img1_path=records[partner[i]].img1_path, img2_path=records[partner[i]].img2_path)
        for i, record in enumerate(records)
    ]


def predict(
    captioner: "ChangeCaptioner",
    records: Sequence[Record],
    root: Path,
    *,
    batch_size: int = 16,
    say: bool = True,
) -> dict[str, "Answer"]:
    """An answer for each record, in the records' order, by uid; greedy.

    Raises:
        ImageError: a pair that cannot be read; it is named.
    """
    answers: dict[str, Answer] = {}
    start = told = time.monotonic()
    for i in range(0, len(records), batch_size):
        batch = records[i : i + batch_size]
        made = captioner.caption_batch([record.paths(root) for record in batch], batch_size)
        answers |= {record.uid: answer for record, answer in zip(batch, made, strict=True)}
        if say and (time.monotonic() - told > 10 or len(answers) == len(records)):
            told = time.monotonic()
            print(
                f"{len(answers)}/{len(records)} pairs, {len(answers) / (told - start):.1f} pairs/s",
                file=sys.stderr,
                flush=True,
            )
    return answers


def score_answers(
    answers: "dict[str, Answer]", records: Sequence[Record], *, baselines: bool = True
) -> "Scores":
    """The scores of answers against their records' captions; changed as the records say, or as their captions do."""
    from llava.eval.metrics import score
    from llava.tasks.caption import says_change

    def changed(record: Record) -> bool:
        if record.change_flag is not None:
            return record.change_flag
        return sum(map(says_change, record.change_caption)) * 2 > len(record.change_caption)

    return score(
        {uid: answer.text for uid, answer in answers.items()},
        {record.uid: record.change_caption for record in records},
        {record.uid: changed(record) for record in records},
        baselines=baselines,
    )


if TYPE_CHECKING:
    from llava.eval.metrics import Scores

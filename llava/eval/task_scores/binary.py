"""Changed or not: accuracy, precision, recall and F1, with changed as the positive class.

Two protocols for published figures: of yes/no answers, and of captions. The paper (arXiv 2507.22346) describes the
first; its public notebook computes the second, on the captions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from llava.eval.task_scores.tables import PREDICTIONS, Row, Table, joined, rate
from llava.tasks.caption import normalise

ANSWERS = "yes/no answers; changed is the positive class, an unreadable answer counts as the wrong one"
CAPTIONS = "unchanged where the caption is word for word one of an unchanged pair's references, else changed"


@dataclass(frozen=True)
class Confusion:
    """Pairs by truth and answer."""

    tp: int
    """Changed, and said to be."""
    fp: int
    fn: int
    tn: int

    @classmethod
    def of(cls, truth: Iterable[bool], said: Iterable[bool | None]) -> "Confusion":
        """Counted; None is the wrong answer to whatever is true."""
        hits = [(true, true == answer) for true, answer in zip(truth, said, strict=True)]
        return cls(
            tp=hits.count((True, True)),
            fp=hits.count((False, False)),
            fn=hits.count((True, False)),
            tn=hits.count((False, True)),
        )

    @property
    def n(self) -> int:
        return self.tp + self.fp + self.fn + self.tn

    @property
    def accuracy(self) -> float:
        return rate(self.tp + self.tn, self.n)

    @property
    def precision(self) -> float:
        return rate(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        return rate(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float:
        return rate(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def zero_division(self) -> tuple[str, ...]:
        """Values without a divisor."""
        divisors = {"accuracy": self.n, "precision": self.tp + self.fp, "recall": self.tp + self.fn}
        divisors["F1"] = 2 * self.tp + self.fp + self.fn
        return tuple(name for name, divisor in divisors.items() if not divisor)

    def row(self, name: str, n_invalid: int = 0) -> Row:
        return Row(
            name=name,
            n=self.n,
            n_invalid=n_invalid,
            values={
                "accuracy": self.accuracy,
                "precision": self.precision,
                "recall": self.recall,
                "F1": self.f1,
            },
            zero_division=self.zero_division,
            counts={"tp": self.tp, "fp": self.fp, "fn": self.fn, "tn": self.tn},
        )


def binary_table(
    said: Mapping[str, bool | None],
    truth: Mapping[str, bool],
    name: str = "answers",
    about: str = ANSWERS,
) -> Table:
    """Answers by uid against what is true, beside both constant answers.

    Raises:
        DataError: not the same uids.
    """
    uids = joined(said, truth, name)
    true = [truth[uid] for uid in uids]
    answers = [said[uid] for uid in uids]
    return Table(
        name=name,
        about=about,
        rows=(
            Confusion.of(true, answers).row(PREDICTIONS, answers.count(None)),
            Confusion.of(true, [True] * len(true)).row("always changed"),
            Confusion.of(true, [False] * len(true)).row("always unchanged"),
        ),
    )


def read_from_captions(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]], truth: Mapping[str, bool]
) -> dict[str, bool | None]:
    """The published notebook's reading of captions; a paraphrase of no change is a change there.

    Args:
        captions: uid -> what was said.
        references: uid -> its captions; those of the unchanged pairs are the sentences that mean no change.
    """
    same = {normalise(text) for uid, texts in references.items() if not truth[uid] for text in texts}
    return {uid: normalise(text) not in same for uid, text in captions.items()}

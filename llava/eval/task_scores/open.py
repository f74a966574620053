"""Open questions: caption metrics against the one gold answer, exact answers, token F1, and yes/no agreement."""

import re
from collections import Counter
from collections.abc import Mapping

from llava.eval.task_scores.tables import PREDICTIONS, Row, Table, joined, mean, rate
from llava.eval.task_scores.texts import WordNumbers, id_table, text_table
from llava.tasks.caption import normalise

ABOUT = "exact: the same words; token F1: shared words; yes/no: the first word, where the gold answer begins with one"
WORDS = "against one reference; lower case, no full stop"
IDS = "word numbers, references with their capitals and full stops, as the published notebook has it"


def open_tables(
    said: Mapping[str, str], gold: Mapping[str, str], *, words: WordNumbers | None = None, meteor: bool = True
) -> tuple[tuple[Table, ...], tuple[str, ...]]:
    """Answers by uid against the gold ones, and notes.

    Args:
        words: also the `ids` protocol, with this list.

    Raises:
        DataError: not the same uids.
    """
    uids = joined(said, gold, "open")
    answers = Table(name="answers", about=ABOUT, rows=(_row(PREDICTIONS, said, gold), _most_frequent(gold)))
    references = {uid: [gold[uid] if normalise(gold[uid]) else "-"] for uid in uids}
    table, notes = text_table(said, references, "words", WORDS, meteor=meteor)
    tables = [answers, table]
    if words is not None:
        tables.append(id_table(said, references, words, IDS, as_they_are=True, meteor=meteor))
    return tuple(tables), notes


def token_f1(said: str, gold: str) -> float:
    """Share of words in common, 0..100: the harmonic mean of those of the answer's and of the gold answer's words."""
    one, other = _words(said), _words(gold)
    if not one or not other:
        return 100.0 * (one == other)
    return rate(2 * (Counter(one) & Counter(other)).total(), len(one) + len(other))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _yes_no(text: str) -> str | None:
    first = next(iter(_words(text)), None)
    return first if first in ("yes", "no") else None


def _row(name: str, said: Mapping[str, str], gold: Mapping[str, str]) -> Row:
    asked = {uid: truth for uid, text in gold.items() if (truth := _yes_no(text))}
    agree = sum(_yes_no(said[uid]) == truth for uid, truth in asked.items())
    return Row(
        name=name,
        n=len(gold),
        n_invalid=sum(not _words(text) for text in said.values()),
        values={
            "exact": rate(sum(_words(said[uid]) == _words(text) for uid, text in gold.items()), len(gold)),
            "token F1": mean(token_f1(said[uid], text) for uid, text in gold.items()),
            "yes/no": rate(agree, len(asked)) if asked else None,
        },
        counts={"yes/no questions": len(asked), "agreements": agree},
    )


def _most_frequent(gold: Mapping[str, str]) -> Row:
    """The one answer that is right most often."""
    counted = Counter(" ".join(_words(text)) for text in gold.values())
    answer = max(counted, key=lambda text: (counted[text], text))
    shown = answer if len(answer) <= 30 else f"{answer[:30]}..."
    return _row(f"always {shown!r}", dict.fromkeys(gold, answer), gold)

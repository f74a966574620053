"""Free text against references: the caption metrics, of words or, as the published notebooks have it, of word numbers.

Protocols: `words` scores text as all captions are scored here (lower case, no ".", split at spaces). `ids` first puts a
number in place of each word of a list, and one common number in place of every other: then METEOR knows no stems and no
synonyms, and unknown words match each other. A score of one protocol does not compare with one of the other.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.eval.metrics import score
from llava.eval.pair_statistics import METRICS, SUBSETS, Subset
from llava.eval.scores import CaptionScores, Scores
from llava.eval.task_scores.tables import Row, Table
from llava.tasks.caption import normalise

MORE_THAN = 5
"""A word of a caption corpus is in its list when it occurs more often than this."""


class WordNumbers:
    """Words to numbers, by a list; all others share one."""

    def __init__(self, words: Sequence[str]) -> None:
        self._numbers = {word: str(i) for i, word in enumerate(dict.fromkeys(words), start=1)}

    def __len__(self) -> int:
        return len(self._numbers)

    def of(self, text: str) -> str:
        """The numbers of the words between spaces, as they are."""
        return " ".join(self._numbers.get(word, "0") for word in text.split())


def read_words(path: Path) -> WordNumbers:
    """A word list: a text file with a word on each line, or LEVIR-CC's caption file, whose words that occur more than
    five times, over all its splits, are the published list.

    Raises:
        DataError: a file of neither kind, or without a word.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a list of words: {error}") from error
    words = _frequent(text, path) if text.lstrip().startswith(("{", "[")) else text.split()
    if not words:
        raise DataError(f"{path} holds no words")
    return WordNumbers(words)


def _frequent(text: str, path: Path) -> list[str]:
    """The frequent words of LEVIR-CC's caption file."""
    try:
        images = json.loads(text)["images"]
        tokens = [token for image in images for one in image["sentences"] for token in one["tokens"]]
        counted = Counter(token for token in tokens if isinstance(token, str))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} is no caption file of LEVIR-CC (images[].sentences[].tokens), nor a word on each line"
        ) from error
    return [word for word, number in counted.items() if number > MORE_THAN]


def caption_table(scores: Scores, name: str = "words") -> Table:
    """The metrics of scored captions, subset by subset, beside the sentences that look at no image."""
    return Table(name=name, about="captions against all references of the pair", rows=_rows(scores, SUBSETS))


def text_table(
    said: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    name: str,
    about: str,
    *,
    changed: Mapping[str, bool] | None = None,
    meteor: bool = True,
) -> tuple[Table, tuple[str, ...]]:
    """The metrics of texts by uid, all at once (or with `changed` by subset), and notes on what could not be had.

    Raises:
        DataError: not the same uids.
    """
    alike = dict.fromkeys(references, True)
    scores = score(said, references, changed or alike, meteor=meteor, resamples=0)
    rows = _rows(scores, SUBSETS if changed else SUBSETS[:1])
    return Table(name=name, about=about, rows=rows), scores.notes


def id_table(
    said: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    words: WordNumbers,
    about: str,
    *,
    changed: Mapping[str, bool] | None = None,
    as_they_are: bool = False,
    meteor: bool = True,
) -> Table:
    """`text_table` of word numbers.

    Args:
        as_they_are: references keep capitals and full stops, as in the published notebook of open questions: words with
            them are then unknown ones.
    """

    def reference(text: str) -> str:
        return words.of(text if as_they_are else normalise(text)) or "0"

    numbered = {uid: [reference(text) for text in texts] for uid, texts in references.items()}
    spoken = {uid: words.of(normalise(text)) for uid, text in said.items()}
    return text_table(spoken, numbered, "ids", about, changed=changed, meteor=meteor)[0]


def _rows(scores: Scores, subsets: Sequence[Subset]) -> tuple[Row, ...]:
    return tuple(
        _row(row.name if subset == "all" else f"{row.name}, {subset}", found)
        for subset in subsets
        for row in scores.rows
        if (found := row.captions[subset]) is not None
    )


def _row(name: str, scores: CaptionScores) -> Row:
    values: dict[str, Any] = scores.to_dict()
    return Row(name=name, n=scores.num_pairs, values={metric: values[metric] for metric in METRICS})

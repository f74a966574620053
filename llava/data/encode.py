"""Words to token ids: what is said of a pair, as rows that branch where the answers begin.

A ChangeVLM has one row a pair: its images, what all answers share, and the answers. A DeltaVLM looks at a pair anew for
each question, and has a row for each.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from llava.data.conversation import IGNORE, IMAGE_TOKEN, LabelRule, pair_conversation
from llava.errors import ConfigError
from llava.model.processing import ChangeVLMProcessor

if TYPE_CHECKING:
    from llava.family import AnyProcessor
    from llava.model.delta_vlm.processing import DeltaVLMProcessor

Ids = Sequence[int] | NDArray[np.int64]
Rounds = tuple[tuple[str, str], ...]

CAPTIONS_KEPT, PROMPTS_KEPT = 2**15, 2**10
"""What a process keeps of what it has tokenised: about 1 kB a caption, 4 kB a prompt."""

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
    weights: Sequence[float] = ()
    """How much the labels of each answer count; empty: all the same, once."""

    @property
    def length(self) -> int:
        """Tokens: the prompt without its last one, which each branch repeats, and the branches."""
        return len(self.prompt) - 1 + sum(1 + len(ids) for ids, _ in self.answers)


class Branch(NamedTuple):
    """A conversation about a pair, cut where its first answer starts; an image is one id."""

    prompt: list[int]
    prompt_labels: list[int]
    answer: list[int]
    answer_labels: list[int]
    reading: tuple[int, ...] = ()
    """As in `Row`."""
    weight: float = 1.0
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
        labels: see `llava.data.conversation.labels_from_spans`.

    Raises:
        ConfigError: the chat template does not say what the assistant's words are.
    """

    row_a_question = False
    """Whether each round of a dialogue is a branch of its own."""

    def __init__(self, processor: ChangeVLMProcessor, labels: LabelRule = "answer") -> None:
        self.processor, self.labels = processor, labels
        self.question = question = processor.caption_question
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
        """A caption as the answer to the model's question for one."""
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
        return [Row(*self._expanded(prompt, labels), answers, weights=_weights(branches))]

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

    Raises:
        ConfigError: another label rule than "answer".
    """

    row_a_question = True

    def __init__(self, processor: "DeltaVLMProcessor", labels: LabelRule = "answer") -> None:
        if labels != "answer":
            raise ConfigError(
                f"labels={labels!r}: a DeltaVLM learns answers and their end alone, labels: answer"
            )
        self.processor = processor
        self.question = question = processor.caption_question
        self._prompts: _Recent[tuple[list[int], tuple[int, ...]]] = _Recent(PROMPTS_KEPT)
        self._captions: _Recent[Branch] = _Recent(CAPTIONS_KEPT)
        self.start = len(self._asked(question, ())[0])
        two = processor.prompt(_WORD, [(_WORD, _WORD)]).text
        self.per_round = processor.num_query_tokens + bound_of(two) + _SLACK

    def caption(self, text: str) -> Branch:
        """A caption as the answer to the model's question for one."""
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
                _weights(same),
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


def _weights(branches: Sequence[Branch]) -> tuple[float, ...]:
    found = tuple(branch.weight for branch in branches)
    return () if set(found) == {1.0} else found


def encoder_of(processor: "AnyProcessor", labels: LabelRule = "answer") -> BranchEncoder | QuestionEncoder:
    """What makes rows of a model's kind of records.

    Raises:
        ConfigError: see there.
    """
    if isinstance(processor, ChangeVLMProcessor):
        return BranchEncoder(processor, labels)
    return QuestionEncoder(processor, labels)


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


_SLACK = 8
"""Tokens that a text may have beyond its bytes: marks of its own that a tokenizer adds."""


def bound_of(text: str) -> int:
    """More tokens than a text has bytes are not made of it; three times as many may appear when it is normalised."""
    return len(text) if text.isascii() else 3 * len(text.encode())

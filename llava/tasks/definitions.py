"""The six questions one can ask of a pair, each with its wording and the way its answer is generated.

The table of decoding settings, and the reference's one setting for all, follow the DeltaVLM release as it is described
in arXiv 2507.22346 and by its code. Nothing here loads torch: records and readers need the names alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava.data.conversation import QUESTION

if TYPE_CHECKING:
    from collections.abc import Mapping

TASK_NAMES = ("caption", "binary", "count", "loc", "open", "dialog")
"""In the order in which they are reported."""

REFERENCE_DECODING: Mapping[str, Any] = {
    "num_beams": 5,
    "max_new_tokens": 256,
    "repetition_penalty": 1.5,
}
"""What the DeltaVLM release decodes every task with. The penalty punishes repeated digits and grid words."""


@dataclass(frozen=True)
class Task:
    """One kind of question."""

    name: str
    rounds: tuple[str, ...]
    """Our own questions, in order: one, and three for a dialogue."""
    num_beams: int
    max_new_tokens: int

    @property
    def question(self) -> str:
        """What is asked first, and for all but dialogues the only question."""
        return self.rounds[0]

    def decoding(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of `llava.generation.Generation`: its own, and before them those that are asked for. Several beams of
        its own go without a static cache, which has room for one."""
        own = {"num_beams": self.num_beams, "max_new_tokens": self.max_new_tokens}
        if self.num_beams > 1 and "num_beams" not in asked:
            asked = {**asked, "static_cache": False, "compile": False}
        return {**own, **asked}


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("caption", (QUESTION,), 5, 64),
        Task("binary", ("Did any road or building change between the two images? Answer yes or no.",), 1, 8),
        Task("count", ("How many new roads and how many new buildings are there?",), 1, 32),
        Task(
            "loc",
            ("In which cells of a three by three grid did roads change, and in which did buildings?",),
            1,
            160,
        ),
        Task("open", ("Which part of the scene changed most?",), 5, 64),
        Task(
            "dialog",
            (
                "Did anything change between the two images?",
                "How many roads and how many buildings changed?",
                "Describe the change in full, with what you have said so far.",
            ),
            1,
            96,
        ),
    )
}
"""By name; choose with `llava.registry.pick(TASKS, name, what="task")`."""

assert tuple(TASKS) == TASK_NAMES

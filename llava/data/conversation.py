"""Conversations about a pair: the question, the chat templates, and which tokens are learned."""

from collections.abc import Sequence
from importlib import resources
from typing import Any, Literal

from llava.errors import ConfigError

IMAGE_TOKEN = "<image>"
IGNORE = -100
QUESTION = "What difference happened from Image1 to Image2?"
"""The one question the released checkpoints were trained with; they need it word for word."""
PAIR_INTRODUCTION = "This is the Image1 <image>. This is the second Image2 <image>.\n"

LabelRule = Literal["answer", "release"]
Message = dict[str, Any]


def chat_template(name: str) -> str:
    """The Jinja text of a chat template: "chatml" (Qwen2) or "vicuna" (Llama).

    Raises:
        ConfigError: another name.
    """
    folder = resources.files("llava.data") / "templates"
    known = sorted(
        file.name.removesuffix(".jinja") for file in folder.iterdir() if file.name.endswith(".jinja")
    )
    if name not in known:
        raise ConfigError(f"unknown chat template {name!r}; known: {', '.join(known)}")
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


def text_to_content(text: str) -> list[dict[str, str]]:
    """Text with `<image>` marks to a message's content parts: `{"type": "image"}` and `{"type": "text", "text"}`."""
    parts: list[dict[str, str]] = []
    for i, piece in enumerate(text.split(IMAGE_TOKEN)):
        if i:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def pair_conversation(
    question: str = QUESTION, history: Sequence[tuple[str, str]] = (), answer: str | None = None
) -> list[Message]:
    """Messages about one pair: earlier (question, answer) rounds, then `question`, then `answer` if there is one.

    The pair stands once, before the first question, as in the release's prompt.
    """
    messages: list[Message] = []
    for i, (asked, answered) in enumerate([*history, (question, answer)]):
        asked = asked.replace(IMAGE_TOKEN, "< image >")  # a user's words never place an image
        messages.append(
            {"role": "user", "content": text_to_content((PAIR_INTRODUCTION if i == 0 else "") + asked)}
        )
        if answered is not None:
            messages.append({"role": "assistant", "content": answered})
    return messages


def labels_from_spans(
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int]],
    rule: LabelRule = "answer",
    *,
    turn_start: int | None = None,
    always: Sequence[int] = (),
) -> list[int]:
    """Token ids to labels, -100 where nothing is learned.

    Args:
        ids: T token ids.
        offsets: T (start, end) character positions of the tokens.
        spans: (start, end) character positions of the assistant's words with their end mark.
        rule: "answer" learns the tokens in `spans`; "release" does what the CCExpert release does: it learns the
            assistant's whole turn with its header and closing newline, and every token of `always` anywhere.
        turn_start: the id that opens a turn (`<|im_start|>`), for "release".
        always: ids learned wherever they stand (`<|im_start|>`, `<|im_end|>`, newline), for "release".

    Raises:
        ConfigError: "release" for a tokenizer without turn marks, or an unknown rule.
    """
    inside = [any(start <= a < end for start, end in spans) for a, _ in offsets]
    if rule == "release":
        if turn_start is None:
            raise ConfigError("label rule 'release' needs ChatML's <|im_start|> and <|im_end|>; use 'answer'")
        for i in range(len(ids)):
            j = i - 1
            # from a turn's first word back over its header, to the token that opens the turn
            while inside[i] and j >= 0 and not inside[j] and ids[j] != turn_start:
                inside[j] = True
                j -= 1
        inside = [kept or token in always for kept, token in zip(inside, ids, strict=True)]
    elif rule != "answer":
        raise ConfigError(f"unknown label rule {rule!r}; known: answer, release")
    return [token if kept else IGNORE for token, kept in zip(ids, inside, strict=True)]

"""Chat templates, the release's prompt and labels, and which tokens are learned."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llava.data.conversation import (
    IGNORE,
    PAIR_INTRODUCTION,
    QUESTION,
    chat_template,
    labels_from_spans,
    pair_conversation,
    text_to_content,
)
from llava.errors import ConfigError
from llava.model.processing import ChangeVLMProcessor
from tests.tiny import tiny_config, tiny_tokenizer

TEXT = Path(__file__).parents[1] / "golden" / "text"
RELEASE = json.loads((TEXT / "preprocess_qwen.json").read_text())


@pytest.fixture(scope="module")
def released() -> ChangeVLMProcessor:
    return ChangeVLMProcessor.for_config(tiny_config(), AutoTokenizer.from_pretrained(TEXT / "tokenizer"))


@pytest.fixture(scope="module", params=["chatml", "vicuna"])
def processor(request) -> ChangeVLMProcessor:
    text = "qwen2" if request.param == "chatml" else "llama"
    return ChangeVLMProcessor.for_config(tiny_config(text=text), tiny_tokenizer(text))


def as_released(ids: list[int], processor: ChangeVLMProcessor) -> list[int]:
    """The published code writes -200 for an image."""
    return [-200 if token == processor.image_token_id else token for token in ids]


@pytest.mark.parametrize("sample", RELEASE["samples"], ids=lambda sample: sample["caption"][:20])
def test_ids_and_labels_are_the_releases(released, sample):
    conversation = pair_conversation(answer=sample["caption"])
    coded = released.encode(conversation, labels="release")
    assert as_released(coded["input_ids"], released) == sample["input_ids"]
    assert coded["labels"] == sample["labels"]
    prompt = released.tokenizer(released.prompt(pair_conversation()))["input_ids"]
    assert as_released(prompt, released) == sample["eval_prompt_ids"]

    answer = released.encode(conversation)["labels"]
    end = RELEASE["special_ids"]["<|im_end|>"]
    caption = released.tokenizer(sample["caption"])["input_ids"]
    assert [label for label in answer if label != IGNORE] == [*caption, end]
    assert answer[: len(prompt)] == [IGNORE] * len(prompt)


def test_the_question_is_the_releases_word_for_word():
    assert RELEASE["question"] == PAIR_INTRODUCTION + QUESTION
    assert pair_conversation()[0]["content"] == text_to_content(RELEASE["question"])


def test_text_to_content_and_what_it_stands_for():
    image = {"type": "image"}
    assert text_to_content("<image><image> a <image>") == [
        image,
        image,
        {"type": "text", "text": " a "},
        image,
    ]
    assert text_to_content("a") == [{"type": "text", "text": "a"}]
    assert text_to_content("") == []


TURNS = pair_conversation("and now?", history=[("what?", "a road"), ("where?", "left")], answer="gone")


def test_chatml_over_several_turns():
    processor = ChangeVLMProcessor.for_config(tiny_config(), tiny_tokenizer())
    assert processor.prompt(TURNS, add_generation_prompt=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nThis is the Image1 <image>. This is the second Image2 <image>.\nwhat?<|im_end|>\n"
        "<|im_start|>assistant\na road<|im_end|>\n<|im_start|>user\nwhere?<|im_end|>\n"
        "<|im_start|>assistant\nleft<|im_end|>\n<|im_start|>user\nand now?<|im_end|>\n"
        "<|im_start|>assistant\ngone<|im_end|>\n"
    )


def test_vicuna_over_several_turns():
    processor = ChangeVLMProcessor.for_config(tiny_config(text="llama"), tiny_tokenizer("llama"))
    text = processor.prompt(TURNS[:3])
    assert text.startswith(
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    )
    assert text.endswith(
        "questions. USER: This is the Image1 <image>. This is the second Image2 <image>.\nwhat? "
        "ASSISTANT: a road</s>USER: where? ASSISTANT:"
    )


def test_a_system_message_of_ones_own_replaces_the_default(processor):
    for content in ("Be brief.", [{"type": "text", "text": "Be brief."}]):
        text = processor.prompt([{"role": "system", "content": content}, *pair_conversation()])
        assert text.count("Be brief.") == 1
        assert "helpful" not in text


def test_the_prompt_is_the_beginning_of_the_whole_conversation(processor):
    ids = processor.encode(TURNS)["input_ids"]
    for turns in (1, 3, 5):
        prompt = processor.tokenizer(processor.prompt(TURNS[:turns]))["input_ids"]
        assert ids[: len(prompt)] == prompt


def test_answers_alone_are_learned_with_their_end_mark(processor):
    coded = processor.encode(TURNS)
    learned = [label for label in coded["labels"] if label != IGNORE]
    assert all(
        label in (IGNORE, token) for label, token in zip(coded["labels"], coded["input_ids"], strict=True)
    )
    end = processor.tokenizer.eos_token
    assert processor.tokenizer.decode(learned).replace(" ", "") == f"aroad{end}left{end}gone{end}".replace(
        " ", ""
    )
    # what follows the last learned token is nothing that a model would have to say
    assert processor.tokenizer.decode(coded["input_ids"][-2:]).strip().endswith(end)


def test_answers_given_as_parts_or_as_text_are_the_same(processor):
    parts = [m | {"content": text_to_content(m["content"])} if m["role"] == "assistant" else m for m in TURNS]
    assert processor.encode(parts) == processor.encode(TURNS)


def test_release_labels_over_several_turns_are_headers_marks_and_answers(released):
    coded = released.encode(TURNS, labels="release")
    special = RELEASE["special_ids"]
    always = {special["<|im_start|>"], special["<|im_end|>"], *special["newline"]}
    inside, expected = False, []
    for i, token in enumerate(coded["input_ids"]):
        if token == special["<|im_start|>"]:
            inside = coded["input_ids"][i + 1] == special["assistant"]
        expected.append(token if inside or token in always else IGNORE)
    assert coded["labels"] == expected


def test_release_labels_need_chatml():
    llama = ChangeVLMProcessor.for_config(tiny_config(text="llama"), tiny_tokenizer("llama"))
    with pytest.raises(ConfigError, match="use 'answer'"):
        llama.encode(TURNS, labels="release")


def test_unknown_names_list_the_known_ones(released):
    with pytest.raises(ConfigError, match="known: answer, release"):
        released.encode(TURNS, labels="all")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="known: chatml, vicuna"):
        chat_template("alpaca")


def test_a_users_words_place_no_image(processor):
    text = processor.prompt(pair_conversation("is this an <image>?", history=[("<image>", "no")]))
    assert text.count("<image>") == 2
    assert "is this an < image >?" in text


def test_spans_that_touch_the_first_token():
    ids, offsets = [5, 6, 7], [(0, 2), (2, 3), (3, 4)]
    assert labels_from_spans(ids, offsets, [(0, 3)]) == [5, 6, IGNORE]
    assert labels_from_spans(ids, offsets, [(0, 3)], "release", turn_start=1) == [5, 6, IGNORE]
    assert labels_from_spans(ids, offsets, [(2, 3)], "release", turn_start=1) == [5, 6, IGNORE]
    assert labels_from_spans(ids, offsets, [], always=[7]) == [IGNORE] * 3


def test_words_beyond_ascii_are_learned_whole(processor):
    answer = "新しい道路 built né"
    coded = processor.encode(pair_conversation(answer=answer))
    learned = [label for label in coded["labels"] if label != IGNORE]
    assert processor.tokenizer.decode(learned).strip() == answer + processor.tokenizer.eos_token

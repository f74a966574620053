"""Both families of models by one captioner: histories, batches, beams, penalties, chats and maps."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicLayer

from llava.captioner import Answer, ChangeCaptioner
from llava.data.conversation import QUESTION, pair_conversation
from llava.errors import CheckpointError, ConfigError, DataError
from llava.family import family_of
from llava.generation import Generation
from llava.model.delta_vlm.processing import DeltaVLMProcessor
from llava.tasks.definitions import TASKS
from llava.tasks.reading import read_answer
from tests import tiny
from tests.model.delta_vlm import tiny as delta
from tests.test_captioner import counted
from tests.tiny import random_image, random_pair

SHORT = Generation(max_new_tokens=10)
QUESTIONS = ("Is there a new road?", "How many buildings are gone, and where did they stand?", "why")
HISTORIES: list[Sequence[tuple[str, str]]] = [
    [("Did anything change?", "Yes."), ("How many roads?", "There are 2 new roads.")],
    [],
    [("What is it?", "a road is built")],
]
KINDS: dict[str, Any] = {
    "change": lambda: tiny.tiny_model(),
    "change llama": lambda: tiny.tiny_model(text="llama"),
    "delta": lambda: delta.tiny_model(),
    "delta qwen2": lambda: delta.tiny_model("qwen2"),
    "delta reference": lambda: delta.tiny_model(prompt_style="reference", qformer_text="question"),
    "delta difference": lambda: delta.tiny_model(fusion=delta.FUSIONS["difference"]),
}


@pytest.fixture(scope="module", params=KINDS)
def captioner(request: pytest.FixtureRequest) -> ChangeCaptioner:
    return ChangeCaptioner(*KINDS[request.param](), name="random", generation=SHORT)


@pytest.fixture(scope="module")
def asker() -> ChangeCaptioner:
    return ChangeCaptioner(*KINDS["delta"](), name="random", generation=SHORT)


def plain_run(
    captioner: ChangeCaptioner, seed: int, question: str, history: Sequence[tuple[str, str]]
) -> str:
    """The answer by the model's own `generate` over the whole conversation, images and all."""
    processor = captioner.processor
    if isinstance(processor, DeltaVLMProcessor):
        inputs = processor(images=random_pair(seed), text=question, history=[history])
    else:
        text = processor.prompt(pair_conversation(question, history))
        inputs = processor(images=[random_pair(seed)], text=[text])
    out = captioner.model.generate(**inputs, max_new_tokens=10, do_sample=False, eos_token_id=captioner._ends)
    return captioner._decode(out[0, inputs["input_ids"].shape[1] :])


def alike(one: Sequence[Answer], other: Sequence[Answer]) -> bool:
    return [a.text for a in one] == [a.text for a in other] and np.allclose(
        [a.log_probability for a in one], [a.log_probability for a in other], atol=1e-3
    )


@pytest.mark.parametrize("half_written", [False, True])
def test_a_chat_goes_on_behind_an_answer_that_was_broken_off(
    captioner: ChangeCaptioner, half_written: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory in the second layer, or between its keys and its values: the first one has read on already."""
    wanted = captioner.chat(*random_pair(0)).ask("where is it").text
    chat = captioner.chat(*random_pair(0))
    with monkeypatch.context() as patched:
        update, calls = DynamicLayer.update, []

        def failing(self: Any, keys: torch.Tensor, values: torch.Tensor, *rest: Any, **more: Any) -> Any:
            calls.append(keys.shape)
            if len(calls) == 2:
                if half_written:
                    self.keys = torch.cat([self.keys, keys], -2) if self.is_initialized else self.keys
                raise KeyboardInterrupt
            return update(self, keys, values, *rest, **more)

        patched.setattr(DynamicLayer, "update", failing)
        with pytest.raises(KeyboardInterrupt):
            chat.ask("Did anything change, and if so what?")
    assert chat.ask("where is it").text == wanted


def test_an_answer_with_a_history_is_what_plain_generation_gives(captioner: ChangeCaptioner) -> None:
    said = [
        captioner.ask(*random_pair(seed), question, history=history).text
        for seed, (question, history) in enumerate(zip(QUESTIONS, HISTORIES, strict=True))
    ]
    wanted = [
        plain_run(captioner, seed, question, history)
        for seed, (question, history) in enumerate(zip(QUESTIONS, HISTORIES, strict=True))
    ]
    assert said == wanted
    bare, told = (captioner.ask(*random_pair(0), QUESTIONS[0], history=h) for h in ((), HISTORIES[0]))
    assert not np.isclose(bare.log_probability, told.log_probability, atol=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"repetition_penalty": 2},
        {"num_beams": 2, "repetition_penalty": 1.3},
        {"static_cache": True},
    ],
    ids=str,
)
def test_a_batch_with_histories_says_what_single_calls_say(
    captioner: ChangeCaptioner, options: dict[str, Any]
) -> None:
    pairs = [random_pair(seed) for seed in range(3)]
    single = [
        captioner.ask(*pair, question, history=history, **{**options, "static_cache": False})
        for pair, question, history in zip(pairs, QUESTIONS, HISTORIES, strict=True)
    ]
    for size in (2, 3):
        batch = captioner.caption_batch(pairs, size, question=QUESTIONS, history=HISTORIES, **options)
        assert alike(batch, single)
    read = [captioner.read(*pair) for pair in pairs]
    assert alike(captioner.answer_batch(read, QUESTIONS, history=HISTORIES, **options), single)


def test_what_is_asked_for_a_caption_goes_with_the_model(captioner: ChangeCaptioner, tmp_path: Path) -> None:
    assert captioner.caption_question == QUESTION
    mine = "Please say, in one sentence: what is new?"
    captioner.model.save_pretrained(tmp_path)
    captioner.processor.save_pretrained(tmp_path)
    processor = type(captioner.processor).from_pretrained(tmp_path)
    processor.caption_question = mine
    processor.save_pretrained(tmp_path)
    taught = ChangeCaptioner.from_pretrained(tmp_path, device="cpu", generation=SHORT)
    pair = random_pair(0)
    wanted = captioner.ask(*pair, mine)
    chat = taught.chat(*pair)
    said = [
        taught.caption(*pair),
        taught.ask(*pair),
        taught.caption_batch([pair])[0],
        taught.answer_batch([taught.read(*pair)])[0],
        chat.ask(),
    ]
    assert alike(said, [wanted] * 5)
    assert "".join(taught.stream(*pair)) == wanted.text
    assert chat.rounds == ((mine, wanted.text),)
    # says whether there is a change, as the answer to another question does not
    assert all(answer.changed is not None for answer in said)
    assert wanted.changed is None and taught.ask(*pair, QUESTION).changed is None


def test_tasks_are_asked_in_their_own_way_and_read(captioner: ChangeCaptioner) -> None:
    pair = random_pair(0)
    for name, task in TASKS.items():
        found = captioner.ask_task(*pair, name, max_new_tokens=6)
        assert [question for question, _ in found.rounds] == list(task.rounds)
        chat, how = captioner.chat(*pair), {"num_beams": task.num_beams, "max_new_tokens": 6}
        said = [chat.ask(question, **how) for question in task.rounds]  # type: ignore[arg-type]
        assert alike([answer for _, answer in found.rounds], said) and found.answer == found.rounds[-1][1]
        assert (found.parsed, found.valid) == read_answer(name, said[-1].text, [one.text for one in said])
    mine = captioner.ask_task(*pair, "count", "How many roads?", history=HISTORIES[0], num_beams=2)
    wanted = captioner.ask(*pair, "How many roads?", history=HISTORIES[0], num_beams=2, max_new_tokens=32)
    assert alike([mine.answer], [wanted])
    assert captioner.ask_task(*pair, "dialog", "why").parsed is None
    with pytest.raises(ConfigError, match="binary"):
        captioner.ask_task(*pair, "colour")


def test_a_conversation_encodes_its_pair_once_and_answers_as_a_full_run(captioner: ChangeCaptioner) -> None:
    with (
        counted(captioner.model.model.vision_tower) as towers,
        counted(captioner.model.model.fusion) as fusions,
    ):
        chat = captioner.chat(*random_pair(0))
        answers = [chat.ask(question).text for question in QUESTIONS]
    assert towers == [2] and len(fusions) == 1
    history: list[tuple[str, str]] = []
    for question, answer in zip(QUESTIONS, answers, strict=True):
        assert answer == plain_run(captioner, 0, question, history)
        history.append((question, answer))
    assert chat.rounds == tuple(history)


def test_a_conversation_goes_on_from_rounds_in_words(captioner: ChangeCaptioner) -> None:
    first = captioner.chat(*random_pair(1))
    for question in QUESTIONS[:2]:
        first.ask(question)
    second = captioner.chat(*random_pair(1), first.rounds)
    assert second.history == () and second.rounds == first.rounds
    assert second.ask(QUESTIONS[2]).text == first.ask(QUESTIONS[2]).text
    assert second.rounds == first.rounds and len(second.history) == 1
    second.reset()
    assert second.rounds == ()
    assert second.ask(QUESTIONS[0]).text == captioner.ask(*random_pair(1), QUESTIONS[0]).text


@pytest.mark.parametrize("beams", [1, 3])
def test_log_probabilities_are_the_models_own(captioner: ChangeCaptioner, beams: int) -> None:
    ids: list[list[int]] = []
    original = captioner._decode
    captioner._decode = lambda new: (ids.append(list(new)), original(new))[1]  # type: ignore[method-assign]
    history = HISTORIES[0]
    try:
        answer = captioner.ask(
            *random_pair(2), "why", history=history, num_beams=beams, repetition_penalty=1.4
        )
    finally:
        del captioner._decode
    (new,) = ids
    prompt = captioner.prompt_ids("why", history)
    pixels = captioner.read(*random_pair(2)).values[None]
    reading = captioner.family.reading(captioner.processor, [("why", history)])
    with torch.no_grad():
        logits = captioner.model(
            input_ids=torch.tensor([prompt + new]), pixel_values=pixels, **reading
        ).logits
    terms = logits[0, len(prompt) - 1 : -1].log_softmax(-1)[range(len(new)), new]
    assert answer.tokens == len(new)
    assert np.isclose(answer.log_probability, float(terms.sum()), atol=1e-3)


def test_a_penalty_keeps_tokens_from_coming_again_and_leaves_the_prompt_alone(
    captioner: ChangeCaptioner,
) -> None:
    """With a penalty that forbids, no token comes twice; a word of the question may come."""
    ids: list[list[int]] = []
    original = captioner._decode
    captioner._decode = lambda new: (ids.append(list(new)), original(new))[1]  # type: ignore[method-assign]
    bias = captioner.model.lm_head.register_forward_hook(lambda _, __, out: out.abs() + 1)
    try:
        for seed in range(2):
            captioner.ask(*random_pair(seed), "why", repetition_penalty=1e4)
        assert all(len(set(new)) == len(new) for new in ids)
        word = captioner._tokenizer("why", add_special_tokens=False)["input_ids"][0]
        ids.clear()
        bias.remove()

        def prefer(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            out[..., word] = 50.0
            return out

        bias = captioner.model.lm_head.register_forward_hook(prefer)
        captioner.ask(*random_pair(0), "why", repetition_penalty=1e4)
        captioner.ask(*random_pair(0), "why", repetition_penalty=1.0)
    finally:
        bias.remove()
        del captioner._decode
    assert ids[0][0] == word and word not in ids[0][1:]
    assert set(ids[1]) == {word}


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_wrong_penalty_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="repetition_penalty"):
        Generation(repetition_penalty=value)


def test_streams_and_maps(captioner: ChangeCaptioner) -> None:
    before = random_image(1, 64, 48)
    after = before.copy()
    after.paste((255, 0, 0), (0, 0, 18, 14))
    pair = before, after
    assert "".join(captioner.stream(*pair, "why")) == captioner.ask(*pair, "why").text
    drawn = captioner.change_map(*pair)
    assert drawn.shape == (48, 64) and drawn.min() >= 0 and drawn.max() <= 1
    if captioner.model.config.fusion["kind"] != "difference":  # whose stream says little before it is trained
        assert drawn[:12, :16].mean() > 0.5 > 0.1 > drawn[24:, 32:].mean()
    answer = captioner.caption(*pair, return_map=True)
    assert answer.map is not None and np.allclose(answer.map, drawn, atol=1e-5)
    small = captioner.answer_batch([captioner.read(*pair)], map_side=32)[0].map
    assert small is not None and small.shape == (24, 32)


def test_histories_are_one_a_pair_and_made_of_rounds(captioner: ChangeCaptioner) -> None:
    pair = random_pair(0)
    with pytest.raises(ConfigError, match="1 histories for 2 pairs"):
        captioner.caption_batch([pair, pair], history=[[]])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="each round"):
        captioner.ask(*pair, "why", history=["a question"])  # type: ignore[list-item]


def test_a_saved_model_is_known_again_whatever_its_family(captioner: ChangeCaptioner, tmp_path: Path) -> None:
    captioner.model.save_pretrained(tmp_path)
    captioner.processor.save_pretrained(tmp_path)
    loaded = ChangeCaptioner.from_pretrained(tmp_path, device="cpu", generation=SHORT)
    assert loaded.family is captioner.family is family_of(loaded.model.config)
    assert alike([loaded.caption(*random_pair(0))], [captioner.caption(*random_pair(0))])
    assert json.dumps(loaded.caption(*random_pair(0)).to_dict())


def test_a_seed_repeats(captioner: ChangeCaptioner) -> None:
    hot = {"do_sample": True, "temperature": 2.0, "repetition_penalty": 1.2}
    first, again, other = (captioner.caption(*random_pair(0), seed=s, **hot).text for s in (7, 7, 8))
    assert first == again != other


def test_a_further_question_to_a_deltavlm_reads_no_image(asker: ChangeCaptioner) -> None:
    """What the language model reads are the queries' tokens, the conversation and the answer."""
    chat = asker.chat(*random_pair(0))
    lengths: list[int] = []
    layer = asker.model.model.language_model.layers[0]
    handle = layer.register_forward_hook(
        lambda _, __, out: lengths.append(out.shape[-2] if torch.is_tensor(out) else out[0].shape[-2])
    )
    try:
        with counted(asker.model.model.projector) as asked:
            chat.ask(QUESTIONS[0])
            before = chat.rounds
            lengths.clear()
            answer = chat.ask(QUESTIONS[1])
    finally:
        handle.remove()
    assert len(asked) == 2
    assert lengths == [len(asker.prompt_ids(QUESTIONS[1], before)), *[1] * (answer.tokens - 1)]


def test_the_third_question_of_a_dialogue_is_asked_in_full(asker: ChangeCaptioner) -> None:
    """The release cuts prompts to their first fifty words, and so the end of the third question."""
    rounds = [
        (f"Question number {i}, which has these thirteen words in it, no less?", "Yes, it is so.")
        for i in (1, 2)
    ]
    question = "Describe, in the light of that, what became of the houses by the river bank."
    ids = asker.prompt_ids(question, rounds)
    assert question in asker._tokenizer.decode(ids[delta.QUERIES :], skip_special_tokens=True)


def test_a_conversation_too_long_is_refused_before_the_model(asker: ChangeCaptioner) -> None:
    chat = asker.chat(*random_pair(0))
    with pytest.raises(DataError, match="reset"):
        chat.ask("why " * 600)
    assert chat.rounds == () and chat.ask("why").text == asker.ask(*random_pair(0), "why").text


def test_model_and_processor_of_a_deltavlm_must_agree(asker: ChangeCaptioner) -> None:
    model, processor = delta.tiny_model()
    processor.num_query_tokens = 9
    with pytest.raises(CheckpointError, match="writes 9 tokens"):
        ChangeCaptioner(model, processor)


def test_the_caption_says_whether_anything_changed(asker: ChangeCaptioner) -> None:
    assert isinstance(asker.ask(*random_pair(0), QUESTION).changed, bool)
    assert asker.ask(*random_pair(0), "why").changed is None

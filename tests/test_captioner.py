"""The captioner: one pair, many pairs, conversations and streams all say the same."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llava.captioner import Answer, ChangeCaptioner
from llava.data.conversation import QUESTION, pair_conversation
from llava.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DownloadError,
    ImageError,
    LlavaError,
    MissingDependencyError,
)
from llava.generation import Generation
from tests.tiny import random_image, random_pair, tiny_model

REAL = Path(__file__).parents[2] / "shared" / "real" / "levir"
SHORT = Generation(max_new_tokens=12)
QUESTIONS = ("Is there a new road?", "How many buildings are gone, and where did they stand?", "why")


def captioner_of(**kind: Any) -> ChangeCaptioner:
    model, processor = tiny_model(**kind)
    return ChangeCaptioner(model, processor, name="random", generation=SHORT)


@pytest.fixture(scope="module")
def captioner() -> ChangeCaptioner:
    return captioner_of()


@contextmanager
def counted(module: torch.nn.Module) -> Iterator[list[int]]:
    """Lengths of the batches a module has seen."""
    calls: list[int] = []
    handle = module.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    try:
        yield calls
    finally:
        handle.remove()


def full_run(captioner: ChangeCaptioner, seed: int, question: str, history: list[tuple[str, str]]) -> str:
    """The answer by plain `generate` over the whole conversation, images and all."""
    processor, model = captioner.processor, captioner.model
    text = processor.prompt(pair_conversation(question, history))
    inputs = processor(images=[random_pair(seed)], text=[text])
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=captioner._ends)
    return captioner._decode(out[0, inputs["input_ids"].shape[1] :])


# --- one pair ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [{}, {"fusion": False}, {"text": "llama"}, {"text": "qwen3", "vision": "clip"}],
    ids=["fusion", "baseline", "llama", "qwen3-clip"],
)
def test_a_caption_is_what_plain_generation_gives(kind: dict[str, Any]) -> None:
    captioner = captioner_of(**kind)
    captions = [captioner.caption(*random_pair(seed)).text for seed in range(3)]
    assert captions == [full_run(captioner, seed, QUESTION, []) for seed in range(3)]
    assert len(set(captions)) > 1  # or the images would not matter


def test_a_caption_depends_on_the_order_of_the_dates(captioner: ChangeCaptioner) -> None:
    before, after = random_pair(0)
    assert captioner.caption(before, after).text != captioner.caption(after, before).text


def test_an_answer_carries_its_numbers(captioner: ChangeCaptioner) -> None:
    answer = captioner.caption(*random_pair(0))
    assert answer.log_probability < 0 < answer.confidence < 1
    assert np.isclose(answer.confidence, np.exp(answer.log_probability / answer.tokens))
    assert 0 < answer.first_token_seconds < answer.seconds
    assert isinstance(answer.changed, bool)
    assert captioner.ask(*random_pair(0), "why").changed is None
    record = json.loads(json.dumps(answer.to_dict()))
    assert record["model"] == "random" and "map" not in record
    with pytest.raises(AttributeError):
        answer.text = ""  # type: ignore[misc]


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 0.5, "seed": 1}], ids=str
)
def test_log_probability_is_the_models_own(captioner: ChangeCaptioner, options: dict[str, Any]) -> None:
    ids: list[list[int]] = []
    original = captioner._decode
    captioner._decode = lambda new: (ids.append(list(new)), original(new))[1]  # type: ignore[method-assign]
    try:
        answer = captioner.caption(*random_pair(1), **options)
    finally:
        del captioner._decode
    (new,) = ids
    inputs = captioner.processor(
        images=[random_pair(1)], text=[captioner.processor.prompt(pair_conversation())]
    )
    prompt = inputs["input_ids"]
    with torch.no_grad():
        logits = captioner.model(
            input_ids=torch.cat([prompt, torch.tensor([new])], 1), pixel_values=inputs["pixel_values"]
        ).logits
    terms = logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)[range(len(new)), new]
    assert answer.tokens == len(new)
    assert np.isclose(answer.log_probability, float(terms.sum()), atol=1e-3)


def test_the_end_mark_ends_and_counts(captioner: ChangeCaptioner) -> None:
    full = captioner.caption(*random_pair(0))
    ends, wanted = captioner._ends, captioner._tokenizer(full.text)["input_ids"]
    first_ids: list[list[int]] = []
    original = captioner._decode
    captioner._decode = lambda new: (first_ids.append(list(new)), original(new))[1]  # type: ignore[method-assign]
    captioner.caption(*random_pair(0))
    end = next(token for token in first_ids[0][3:] if token not in first_ids[0][:3])
    captioner._ends = [end]
    try:
        cut = captioner.caption(*random_pair(0))
        batch = captioner.caption_batch([random_pair(0), random_pair(1)], 2)
    finally:
        captioner._ends = ends
        del captioner._decode
    assert cut.tokens == first_ids[0].index(end) + 1 < full.tokens and wanted
    assert batch[0].tokens == cut.tokens and np.isclose(
        batch[0].log_probability, cut.log_probability, atol=1e-3
    )


def test_greedy_is_greedy_whatever_the_checkpoint_suggests(captioner: ChangeCaptioner) -> None:
    plain = captioner.caption(*random_pair(2))
    config = captioner.model.generation_config
    kept = config.to_dict()
    config.update(do_sample=True, temperature=5.0, repetition_penalty=50.0, top_k=3, no_repeat_ngram_size=2)
    try:
        assert captioner.caption(*random_pair(2)).text == plain.text
    finally:
        config.update(
            **{
                k: kept[k]
                for k in ("do_sample", "temperature", "repetition_penalty", "top_k", "no_repeat_ngram_size")
            }
        )


def test_a_seed_repeats_and_leaves_no_trace(captioner: ChangeCaptioner) -> None:
    hot = {"do_sample": True, "temperature": 2.0}
    state = torch.get_rng_state()
    first, again = (captioner.caption(*random_pair(0), seed=7, **hot).text for _ in range(2))
    assert first == again and torch.equal(torch.get_rng_state(), state)
    assert len({captioner.caption(*random_pair(0), seed=seed, **hot).text for seed in range(4)}) > 1


@pytest.mark.parametrize(
    "options",
    [{"max_tokens": 5}, {"max_new_tokens": 0}, {"temperature": 0.0, "do_sample": True}, {"top_p": 1.5}],
    ids=str,
)
def test_wrong_options_are_refused(captioner: ChangeCaptioner, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        captioner.caption(*random_pair(0), **options)


def test_a_broken_image_is_named(captioner: ChangeCaptioner, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken\.png"):
        captioner.caption_batch([random_pair(0), (random_image(0), broken)])  # type: ignore[list-item]


# --- many pairs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_a_batch_says_what_single_calls_say(captioner: ChangeCaptioner, options: dict[str, Any]) -> None:
    pairs = [random_pair(seed) for seed in range(5)]
    single = [captioner.caption(*pair, **options) for pair in pairs]
    for size in (1, 2, 5):
        batch = captioner.caption_batch(pairs, size, **options)
        assert [a.text for a in batch] == [a.text for a in single]
        assert np.allclose([a.log_probability for a in batch], [a.log_probability for a in single], atol=1e-3)
        assert [a.tokens for a in batch] == [a.tokens for a in single]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_questions_of_different_length_share_a_batch(
    captioner: ChangeCaptioner, options: dict[str, Any]
) -> None:
    pairs = [random_pair(seed) for seed in range(3)]
    batch = captioner.caption_batch(pairs, 3, question=QUESTIONS, **options)
    single = [captioner.ask(*pair, q, **options) for pair, q in zip(pairs, QUESTIONS, strict=True)]
    assert [a.text for a in batch] == [a.text for a in single]
    assert np.allclose([a.log_probability for a in batch], [a.log_probability for a in single], atol=1e-3)


def test_no_pairs_give_no_answers(captioner: ChangeCaptioner) -> None:
    assert captioner.caption_batch([]) == []
    with pytest.raises(ConfigError, match="2 questions for 1 pairs"):
        captioner.caption_batch([random_pair(0)], question=["a", "b"])  # type: ignore[list-item]


# --- conversations -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"text": "llama"}], ids=["chatml", "vicuna"])
def test_a_conversation_reads_its_pair_once_and_answers_as_a_full_run(kind: dict[str, Any]) -> None:
    captioner = captioner_of(**kind)
    with counted(captioner.model.model.vision_tower) as calls:
        chat = captioner.chat(*random_pair(0))
        answers = [chat.ask(question).text for question in QUESTIONS]
    assert calls == [2]  # one call, two images
    history: list[tuple[str, str]] = []
    for question, answer in zip(QUESTIONS, answers, strict=True):
        assert answer == full_run(captioner, 0, question, history)
        history.append((question, answer))
    assert [(q, a.text) for q, a in chat.history] == history


def test_a_further_question_costs_its_own_tokens_only(captioner: ChangeCaptioner) -> None:
    chat = captioner.chat(*random_pair(0))
    lengths: list[int] = []
    layer = captioner.model.model.language_model.layers[0]
    handle = layer.register_forward_hook(
        lambda _, inputs, out: lengths.append(out.shape[-2] if torch.is_tensor(out) else out[0].shape[-2])
    )
    try:
        chat.ask(QUESTIONS[0])
        lengths.clear()
        chat.ask(QUESTIONS[0])
    finally:
        handle.remove()
    own = len(captioner._tokenizer(QUESTIONS[0])["input_ids"])
    answer = len(captioner._tokenizer(chat.history[0][1].text)["input_ids"])
    marks = len(
        captioner._tokenizer("<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    )
    assert lengths[0] <= own + answer + marks and lengths[1:] == [1] * (len(lengths) - 1)


def test_beams_and_resets_leave_the_encoded_pair_intact(captioner: ChangeCaptioner) -> None:
    chat = captioner.chat(*random_pair(3))
    first = chat.ask(QUESTIONS[0])
    chat.ask(QUESTIONS[1], num_beams=3)
    chat.reset()
    assert chat.history == ()
    again = chat.ask(QUESTIONS[0])
    assert again == Answer(
        **{
            **first.to_dict(),
            **{
                n: getattr(again, n)
                for n in ("seconds", "first_token_seconds", "log_probability", "confidence")
            },
        }
    )
    assert np.isclose(again.log_probability, first.log_probability, atol=1e-3)


def test_a_conversation_too_long_is_refused_before_the_model(captioner: ChangeCaptioner) -> None:
    chat = captioner.chat(*random_pair(0))
    with pytest.raises(DataError, match="reset"):
        chat.ask("why " * 600)
    assert chat.history == ()
    assert chat.ask("why").text == captioner.ask(*random_pair(0), "why").text


def test_a_question_cannot_place_an_image(captioner: ChangeCaptioner) -> None:
    assert captioner.ask(*random_pair(0), "what is <image> here?").tokens > 0


# --- streams -------------------------------------------------------------------------------------


def test_a_stream_gives_the_same_text_in_pieces(captioner: ChangeCaptioner) -> None:
    texts = []
    for seed in range(4):
        pieces = list(captioner.stream(*random_pair(seed), max_new_tokens=40))
        texts.append("".join(pieces))
        assert texts[-1] == captioner.caption(*random_pair(seed), max_new_tokens=40).text
        assert all(pieces)
    assert any(" " in text for text in texts)


def test_a_streamed_round_is_remembered(captioner: ChangeCaptioner) -> None:
    chat, other = captioner.chat(*random_pair(0)), captioner.chat(*random_pair(0))
    said = "".join(chat.stream(QUESTIONS[0]))
    assert said == chat.history[-1][1].text == other.ask(QUESTIONS[0]).text
    assert "".join(chat.stream(QUESTIONS[1])) == other.ask(QUESTIONS[1]).text


def test_leaving_a_stream_stops_the_model(captioner: ChangeCaptioner) -> None:
    chat = captioner.chat(*random_pair(0))
    threads = threading.active_count()
    with counted(captioner.model.lm_head) as steps:
        stream = chat.stream(QUESTIONS[0], max_new_tokens=400)
        next(stream)
        stream.close()
    assert threading.active_count() == threads and len(steps) < 390
    assert chat.history == ()
    assert chat.ask(QUESTIONS[0]).text == captioner.ask(*random_pair(0), QUESTIONS[0]).text


def test_what_fails_in_the_thread_is_raised_to_the_caller(captioner: ChangeCaptioner) -> None:
    chat = captioner.chat(*random_pair(0))
    threads = threading.active_count()
    handle = captioner.model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            list(chat.stream("why"))
    finally:
        handle.remove()
    assert threading.active_count() == threads and chat.history == ()
    with pytest.raises(ConfigError, match="num_beams=2"):
        list(chat.stream("why", num_beams=2))


# --- maps ----------------------------------------------------------------------------------------


def test_a_map_lies_on_the_after_image(captioner: ChangeCaptioner) -> None:
    before, after = random_image(0, 60, 45), random_image(1, 64, 48)
    with counted(captioner.model.model.vision_tower) as calls:
        answer = captioner.caption(before, after, return_map=True)
    assert calls == [2] and answer.map is not None
    assert answer.map.shape == (48, 64) and answer.map.dtype == np.float32
    assert np.allclose(answer.map, captioner.change_map(before, after), atol=1e-5)
    assert captioner.caption(before, after).map is None


def test_a_padded_image_gets_its_part_of_the_map() -> None:
    captioner = captioner_of()
    captioner.processor.image_processor.aspect = "pad"
    square = captioner.change_map(random_image(0, 60, 60), random_image(1, 60, 60))
    wide = captioner.change_map(random_image(0, 60, 30), random_image(1, 60, 30))
    assert square.shape == (60, 60) and wide.shape == (30, 60)


def test_a_map_needs_a_fusion() -> None:
    captioner = captioner_of(fusion=False)
    for call in (captioner.change_map, lambda *pair: captioner.caption(*pair, return_map=True)):
        with pytest.raises(ConfigError, match="no fusion"):
            call(*random_pair(0))


# --- loading -------------------------------------------------------------------------------------


def test_a_saved_model_answers_alike(captioner: ChangeCaptioner, tmp_path: Path) -> None:
    captioner.model.save_pretrained(tmp_path)
    captioner.processor.save_pretrained(tmp_path)
    loaded = ChangeCaptioner.from_pretrained(tmp_path, device="cpu", generation=SHORT)
    assert loaded.name == str(tmp_path)
    assert loaded.caption(*random_pair(0)).text == captioner.caption(*random_pair(0)).text
    half = ChangeCaptioner.from_pretrained(
        tmp_path, device="cpu", dtype="bfloat16", attn_implementation="eager"
    )
    assert half.model.dtype == torch.bfloat16 and half.caption(*random_pair(0), max_new_tokens=3).tokens == 3


def test_flash_attention_without_its_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava.captioner._installed", lambda package: False)
    with pytest.raises(MissingDependencyError, match="flash_attn"):
        ChangeCaptioner.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(LlavaError, match="no-such-model"):
        ChangeCaptioner.from_pretrained("no-such-model")


def test_a_folder_without_a_tokenizer_says_what_is_missing(
    captioner: ChangeCaptioner, tmp_path: Path
) -> None:
    captioner.model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        ChangeCaptioner.from_pretrained(tmp_path)


def test_a_hub_id_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="nobody/nothing"):
        ChangeCaptioner.from_pretrained("nobody/nothing")


def test_model_and_processor_must_agree(captioner: ChangeCaptioner) -> None:
    model, processor = tiny_model()
    processor.image_seq_length = 9
    with pytest.raises(CheckpointError, match="writes 9 tokens"):
        ChangeCaptioner(model, processor)


def test_outputs_that_are_no_numbers_are_an_error() -> None:
    captioner = captioner_of()
    with torch.no_grad():
        captioner.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="nan"):
        captioner.caption(*random_pair(0))


# --- real images ---------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason="no real images here")
def test_real_pairs_of_files(captioner: ChangeCaptioner) -> None:
    names = sorted(path.name for path in (REAL / "A").glob("*.png"))[:3]
    pairs = [(REAL / "A" / name, REAL / "B" / name) for name in names]
    batch = captioner.caption_batch(pairs, 2)
    assert [a.text for a in batch] == [captioner.caption(*pair).text for pair in pairs]
    assert captioner.change_map(*pairs[0]).shape == Image.open(pairs[0][1]).size[::-1]


def test_drawn_pairs_of_files(captioner: ChangeCaptioner, tmp_path: Path) -> None:
    paths = []
    for seed in range(2):
        for name, image in zip("ab", random_pair(seed), strict=True):
            image.save(tmp_path / f"{name}{seed}.png")
        paths.append((tmp_path / f"a{seed}.png", tmp_path / f"b{seed}.png"))
    assert [a.text for a in captioner.caption_batch(paths)] == [
        captioner.caption(*random_pair(s)).text for s in range(2)
    ]

"""`generate`: batches, beams, samples, caches; a pair is looked at once and stays with its own question."""

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from llava.errors import DataError
from tests.model.delta_vlm.tiny import FUSIONS, QUERIES, QUESTIONS, pair_inputs, tiny_model

NEW = 6


@pytest.fixture(scope="module", params=["csrm", "difference"])
def made(request):
    return tiny_model(fusion=FUSIONS[request.param], seed=3)


def answers(made, seeds: list[int], questions: tuple[str, ...] = QUESTIONS, **options) -> Tensor:
    """New tokens only, [B or more, NEW]."""
    model, processor = made
    inputs = pair_inputs(processor, seeds, questions)
    defaults = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    return model.generate(**inputs, **(defaults | options))[:, inputs["input_ids"].shape[1] :]


def each_alone(made, seeds: list[int], **options) -> list[Tensor]:
    return [answers(made, [seed], (QUESTIONS[i % 2],), **options) for i, seed in enumerate(seeds)]


def test_pairs_and_questions_are_answered_differently(made):
    """What the other tests here rest on."""
    assert len({tuple(row) for row in answers(made, [0, 1, 2, 3], QUESTIONS[:1]).tolist()}) > 2
    assert len({tuple(row) for row in answers(made, [0, 0]).tolist()}) == 2


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_a_batch_of_unequal_prompts_answers_as_each_alone(made, cache):
    options = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    batch = answers(made, [0, 1, 2], **options)
    for row, alone in zip(batch, each_alone(made, [0, 1, 2]), strict=True):
        assert torch.equal(row, alone[0])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}], ids=str)
def test_beams_keep_each_pair_with_its_question(made, options):
    count = options.get("num_return_sequences", 1)
    both = answers(made, [0, 1], **options)
    assert len(both) == 2 * count
    for i, alone in enumerate(each_alone(made, [0, 1], **options)):
        assert torch.equal(both[i * count : (i + 1) * count], alone)


def test_samples(made):
    options = {"do_sample": True, "num_return_sequences": 4, "temperature": 5.0, "top_k": 0}
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(answers(made, [0, 1], **options))
    assert torch.equal(*drawn) and len({tuple(row) for row in drawn[0].tolist()}) > 4
    likeliest = answers(made, [0, 1], do_sample=True, num_return_sequences=2, top_k=1)
    assert torch.equal(likeliest, answers(made, [0, 1]).repeat_interleave(2, 0))


def test_guessing_ahead_changes_nothing(made):
    model, _ = made
    greedy = answers(made, [0])
    assert torch.equal(answers(made, [0], prompt_lookup_num_tokens=3), greedy)
    assert torch.equal(answers(made, [0], assistant_model=model), greedy)


def test_embeddings_in_place_of_ids(made):
    model, processor = made
    inputs = pair_inputs(processor, [0, 1], QUESTIONS)
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"]).last_hidden_state
        prefix = model.model.ask(features, inputs["qformer_input_ids"], inputs["qformer_attention_mask"])
        embeds = model.model.embed(inputs["input_ids"], prefix)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    out = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **options)
    assert torch.equal(out, answers(made, [0, 1]))


@pytest.mark.parametrize("way", ["option", "config", "model"])
def test_a_repetition_penalty_counts_the_answer_alone(made, way):
    """As where only embeddings are given; words of the question are no repetition, placeholders no words."""
    model, processor = made
    inputs = pair_inputs(processor, [0, 1], QUESTIONS)
    pixels = inputs.pop("pixel_values")
    features = model.get_image_features(pixels).last_hidden_state
    prefix = model.model.ask(features, inputs.pop("qformer_input_ids"), inputs.pop("qformer_attention_mask"))
    embeds = model.model.embed(inputs["input_ids"], prefix)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
    with pytest.warns(UserWarning, match="only to newly generated tokens"):
        wanted = super(type(model), model).generate(
            inputs_embeds=embeds, attention_mask=inputs["attention_mask"], repetition_penalty=0.2, **options
        )
    given = {"prefix": prefix, **options}
    if way == "option":
        given["repetition_penalty"] = 0.2
    elif way == "config":
        given["generation_config"] = GenerationConfig(repetition_penalty=0.2)
    else:
        model.generation_config.repetition_penalty = 0.2
    try:
        out = model.generate(**inputs, **given)[:, -NEW:]
    finally:
        model.generation_config.repetition_penalty = None
    assert torch.equal(out, wanted)
    assert not torch.equal(answers(made, [0, 1]), wanted)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}, {"use_cache": False}],
    ids=str,
)
def test_a_pair_is_looked_at_once(made, options):
    model, _ = made
    images: list[int] = []
    questions: list[int] = []
    handles = [
        model.model.vision_tower.register_forward_hook(lambda _, inputs, __: images.append(len(inputs[0]))),
        model.model.projector.register_forward_hook(lambda _, inputs, __: questions.append(len(inputs[0]))),
    ]
    answers(made, [0, 1], **options)
    for handle in handles:
        handle.remove()
    assert (images, questions) == ([4], [2])


def test_the_next_question_does_not_look_again(made):
    model, processor = made
    inputs = pair_inputs(processor, [0], QUESTIONS[1:])
    features = model.get_image_features(inputs.pop("pixel_values")).last_hidden_state
    calls: list[int] = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    out = model.generate(**inputs, pair_features=features, max_new_tokens=NEW, min_new_tokens=NEW)
    handle.remove()
    assert calls == []
    assert torch.equal(out[:, -NEW:], answers(made, [0], QUESTIONS[1:]))


def test_two_questions_about_one_pair(made):
    model, processor = made
    inputs = pair_inputs(processor, [0, 0], QUESTIONS)
    inputs |= {"pixel_values": inputs["pixel_values"][:1], "pair_index": torch.tensor([0, 0])}
    out = model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, num_beams=2)[:, -NEW:]
    assert torch.equal(out, answers(made, [0, 0], num_beams=2))


def test_streaming_and_scores(made, capsys):
    model, processor = made
    inputs = pair_inputs(processor, [0])
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True)
    out = model.generate(**inputs, max_new_tokens=NEW, streamer=streamer)
    assert processor.decode(out[0, inputs["input_ids"].shape[1] :]) in capsys.readouterr().out
    inputs = pair_inputs(processor, [0, 1], QUESTIONS)
    out = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    assert out.logits[0].shape == (2, model.config.text_config.vocab_size)


def test_a_whole_row_can_be_read_back(made):
    _, processor = made
    ids = processor.encode(QUESTIONS[0], (), "a road")["input_ids"]
    assert ids[:QUERIES] == [processor.image_token_id] * QUERIES
    text = processor.decode(ids, skip_special_tokens=True)
    assert text == processor.prompt(QUESTIONS[0]).text + "a road"


def test_placeholders_without_a_pair_are_an_error(made):
    model, processor = made
    inputs = dict(processor(text="What?"))
    with pytest.raises(DataError, match="4 image placeholders, but no pixel_values"):
        model.generate(**{k: v for k, v in inputs.items() if "qformer" not in k}, max_new_tokens=1)

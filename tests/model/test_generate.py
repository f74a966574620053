"""`generate`: batches, beams, samples, caches; the images are looked at once and stay with their own text."""

import pytest
import torch
from torch import Tensor
from transformers import TextStreamer, pipeline

from llava.data.conversation import pair_conversation
from llava.errors import DataError
from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from llava.model.processing import ChangeVLMProcessor
from tests.tiny import pair_inputs, random_pair, tiny_model

NEW = 8


@pytest.fixture(scope="module", params=["fusion", "baseline"])
def made(request) -> tuple[ChangeVLMForConditionalGeneration, ChangeVLMProcessor]:
    return tiny_model(fusion=request.param == "fusion", seed=3)


def answers(made, seeds: list[int], **options) -> Tensor:
    """New tokens only, [B or more, NEW]."""
    model, processor = made
    inputs = pair_inputs(processor, seeds)
    defaults = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    return model.generate(**inputs, **(defaults | options))[:, inputs["input_ids"].shape[1] :]


def test_different_pairs_are_answered_differently(made):
    """What the other tests here rest on: answers that depend on the images."""
    assert len({tuple(row) for row in answers(made, [0, 1, 2, 3]).tolist()}) > 2


@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded", "none"])
def test_a_batch_answers_as_each_pair_alone(made, cache):
    if cache == "offloaded" and not torch.cuda.is_available():
        pytest.skip("transformers moves an offloaded cache through CUDA streams")
    options = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    batch = answers(made, [0, 1, 2], **options)
    for row, seed in zip(batch, [0, 1, 2], strict=True):
        assert torch.equal(row, answers(made, [seed])[0])


def test_prompts_of_different_lengths_in_one_batch(made):
    model, processor = made
    questions = ["What?", "What difference happened from Image1 to Image2, and where are the trees?"]
    texts = [processor.prompt(pair_conversation(question)) for question in questions]
    batch = processor(images=[random_pair(0), random_pair(1)], text=texts)
    out = model.generate(**batch, max_new_tokens=NEW, min_new_tokens=NEW)[:, -NEW:]
    for i in range(2):
        alone = processor(images=[random_pair(i)], text=[texts[i]])
        assert torch.equal(model.generate(**alone, max_new_tokens=NEW, min_new_tokens=NEW)[0, -NEW:], out[i])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}], ids=str)
def test_beams_keep_each_pair_with_its_text(made, options):
    count = options.get("num_return_sequences", 1)
    both = answers(made, [0, 1], **options)
    assert len(both) == 2 * count
    for i, seed in enumerate([0, 1]):
        assert torch.equal(both[i * count : (i + 1) * count], answers(made, [seed], **options))


def test_samples_of_one_pair(made):
    torch.manual_seed(0)
    drawn = answers(made, [0, 1], do_sample=True, num_return_sequences=4, temperature=5.0, top_k=0)
    assert drawn.shape == (8, NEW)
    assert len({tuple(row) for row in drawn.tolist()}) > 4
    torch.manual_seed(0)
    again = answers(made, [0, 1], do_sample=True, num_return_sequences=4, temperature=5.0, top_k=0)
    assert torch.equal(drawn, again)
    likeliest = answers(made, [0, 1], do_sample=True, num_return_sequences=2, top_k=1)
    assert torch.equal(likeliest, answers(made, [0, 1]).repeat_interleave(2, 0))


def test_prompt_lookup_and_assistant_change_nothing(made):
    model, _ = made
    greedy = answers(made, [0])
    assert torch.equal(answers(made, [0], prompt_lookup_num_tokens=3), greedy)
    assert torch.equal(answers(made, [0], assistant_model=model), greedy)


def test_embeddings_in_place_of_ids(made):
    model, processor = made
    inputs = pair_inputs(processor, [0, 1])
    with torch.no_grad():
        embeds, change = model.model.embed(inputs["input_ids"], inputs["pixel_values"])
    assert (change is None) == (model.config.fusion is None)
    out = model.generate(
        inputs_embeds=embeds, attention_mask=inputs["attention_mask"], max_new_tokens=NEW, min_new_tokens=NEW
    )
    assert torch.equal(out, answers(made, [0, 1]))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}],
    ids=str,
)
def test_the_tower_runs_once_a_call(made, options):
    model, _ = made
    calls = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    answers(made, [0], **options)
    handle.remove()
    assert len(calls) == 1


def test_a_conversation_goes_on_from_its_cache(made):
    model, processor = made
    inputs = pair_inputs(processor, [0])
    first = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True)
    more = processor.tokenizer(" and where?", return_tensors="pt")["input_ids"]
    ids = torch.cat([first.sequences, more], dim=1)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    cached = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values, **options
    )
    whole = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"], **options
    )
    assert torch.equal(cached, whole)


def test_streaming(made, capsys):
    model, processor = made
    inputs = pair_inputs(processor, [0])
    out = model.generate(
        **inputs, max_new_tokens=NEW, streamer=TextStreamer(processor.tokenizer, skip_prompt=True)
    )
    assert processor.decode(out[0, inputs["input_ids"].shape[1] :]) in capsys.readouterr().out


def test_scores_and_hidden_states_are_returned(made):
    model, processor = made
    out = model.generate(
        **pair_inputs(processor, [0, 1]), max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True,
        output_logits=True, output_hidden_states=True,
    )  # fmt: skip
    assert (len(out.logits), out.logits[0].shape) == (3, (2, model.config.text_config.vocab_size))
    assert out.hidden_states[0][0].shape[1] == pair_inputs(processor, [0])["input_ids"].shape[1]


def test_placeholders_without_images_are_an_error(made):
    model, processor = made
    inputs = pair_inputs(processor, [0])
    del inputs["pixel_values"]
    with pytest.raises(DataError, match="32 image placeholders, but no pixel_values"):
        model.generate(**inputs, max_new_tokens=1)
    with pytest.raises(DataError, match="16 image placeholders, the images give 32"):
        model(
            input_ids=torch.full((1, 16), model.config.image_token_id),
            pixel_values=torch.zeros(1, 2, 3, 28, 28),
        )


def test_pipeline_on_a_saved_folder(made, tmp_path):
    model, processor = made
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pipe = pipeline("image-text-to-text", model=str(tmp_path))
    messages = pair_conversation()
    pair = iter(random_pair(0))
    for part in messages[0]["content"]:
        if part["type"] == "image":
            part["image"] = next(pair)
    said = pipe(
        text=messages,
        max_new_tokens=NEW,
        return_full_text=False,
        generate_kwargs={"min_new_tokens": NEW, "do_sample": False},
    )
    expected = processor.decode(answers(made, [0])[0], skip_special_tokens=True)
    assert said[0]["generated_text"] == expected

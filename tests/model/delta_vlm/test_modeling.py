"""The model itself: sizes, what reaches what, what learns, and that every way of running it agrees."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

from llava.errors import ConfigError, DataError
from llava.model.delta_vlm.configuration import DeltaVLMConfig
from llava.model.delta_vlm.modeling import DeltaVLMForConditionalGeneration, DeltaVLMModel
from llava.model.fusion import FUSIONS as KINDS
from tests.model.delta_vlm.tiny import FUSIONS, QUERIES, QUESTIONS, pair_inputs, tiny_config, tiny_model
from tests.tiny import random_pair

ANSWERS = ("many trees", "a road is built , the trees are gone")


@pytest.fixture(scope="module")
def made():
    return tiny_model(seed=3)


def lesson(processor: Any, **options: Any) -> dict[str, Tensor]:
    return pair_inputs(processor, [0, 1], QUESTIONS, answers=list(ANSWERS), **options)


# --- sizes and the spec's constants ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full() -> DeltaVLMForConditionalGeneration:
    with torch.device("meta"):
        return DeltaVLMForConditionalGeneration(DeltaVLMConfig.preset("deltavlm-7b"))


def test_parameters_of_the_published_size(full):
    def count(module: torch.nn.Module, tuned: bool = True) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad or not tuned)

    tower = full.model.vision_tower
    inert = 2 * 1408  # biases of keys, which LAVIS does not have
    assert count(tower.encoder) == 50_497_536 + inert
    assert count(tower.post_layernorm) == 2_816
    assert count(full.model.qformer) == 185_660_160
    assert full.model.query_tokens.numel() == 24_576
    assert count(full.model.fusion) == 13_881_472
    assert count(full.model.projector) == 3_149_824
    assert count(full) == 253_219_200 == 253_610_113 - 393_729 + inert
    assert count(full.model.language_model) == count(full.lm_head) == count(tower.embeddings) == 0
    assert full.lm_head.weight.shape == (32001, 4096)
    assert len(tower.encoder.layers) == 39 and tower.embeddings.num_positions == 257


def test_constants_that_would_fail_silently(full):
    tower = full.model.vision_tower
    assert tower.post_layernorm.eps == 1e-5
    assert {layer.layer_norm1.eps for layer in tower.encoder.layers} == {1e-6}
    assert tower.encoder.layers[0].mlp.fc1.out_features == 6144
    assert full.config.vision_config.initializer_range == 0.02
    assert full.config.qformer_config.layer_norm_eps == 1e-12
    crossed = [layer.has_cross_attention for layer in full.model.qformer.encoder.layer]
    assert crossed == [True, False] * 6
    marks = (full.config.bos_token_id, full.config.eos_token_id, full.config.pad_token_id)
    assert (*marks, full.config.image_token_id) == (2, 2, 32000, 32001)
    model = DeltaVLMForConditionalGeneration(tiny_config(fusion="csrm"))
    assert 0.015 < model.model.query_tokens.std() < 0.025
    assert not torch.equal(model.model.query_tokens[0, 0], model.model.query_tokens[0, 1])
    assert model.model.vision_tower.embeddings.class_embedding.std() > 0.01


def test_settings_that_cannot_work():
    for fields, message in (
        ({"fusion": None}, "'concat'"),
        ({"fusion": "magic"}, "unknown fusion 'magic'; known: concat, csrm"),
        ({"tune_vision_blocks": 5}, "tune_vision_blocks=5"),
        ({"prompt_style": "plain"}, "unknown prompt_style 'plain'; known: natural"),
        ({"qformer_text": "all"}, "unknown qformer_text"),
        ({"max_qformer_tokens": 129}, "128 positions"),
        ({"base_models": {"bert": "x"}}, "bert"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "'siglip_vision_model'"),
        ({"text_config": {"model_type": "magic"}}, "text_config.model_type='magic'"),
    ):
        with pytest.raises(ConfigError, match=message):
            DeltaVLMForConditionalGeneration(tiny_config(**{"fusion": "csrm"} | fields))


def test_every_fusion_is_tried_here():
    kinds = {value if isinstance(value, str) else value["kind"] for value in FUSIONS.values()}
    assert kinds == set(KINDS)


# --- what reaches what ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_encoder_is_transformers_own_but_for_the_last_norm(made):
    from transformers import InstructBlipVisionModel

    model, processor = made
    tower = model.model.vision_tower
    twin = InstructBlipVisionModel(copy.deepcopy(model.config.vision_config)).eval()
    twin.load_state_dict(tower.state_dict())
    twin.post_layernorm.eps = 1e-5
    images = pair_inputs(processor, [0])["pixel_values"][0]
    assert torch.equal(tower(images), twin(images).last_hidden_state)
    assert tower(images).shape == (2, 17, 32)
    half = copy.deepcopy(tower).to(torch.bfloat16)
    before: list[Tensor] = []
    half.post_layernorm.register_forward_hook(lambda _, inputs, __: before.append(inputs[0]))
    out = half(images)
    norm = half.post_layernorm
    wide = F.layer_norm(before[0].float(), (32,), norm.weight.float(), norm.bias.float(), 1e-5)
    assert out.dtype == torch.bfloat16 and torch.equal(out, wide.to(torch.bfloat16))


@torch.no_grad()
@pytest.mark.parametrize("fusion", FUSIONS)
def test_exchanged_dates(fusion):
    """Without anything that tells them apart, a model cannot know which date is the earlier one."""
    model, processor = tiny_model(fusion=FUSIONS[fusion], seed=2)
    model.double()
    inputs = pair_inputs(processor, [0, 1], QUESTIONS)
    pixels = inputs["pixel_values"].double()
    one, other = (model(**inputs | {"pixel_values": x}).logits for x in (pixels, pixels.flip(1)))
    apart = (one - other).abs().max().item()
    if fusion in ("concat", "csrm identity"):
        assert apart < 1e-12
    else:
        assert apart > 1e-4


@torch.no_grad()
def test_both_dates_reach_the_q_former_a_first(made):
    model, processor = made
    pixels = pair_inputs(processor, [0, 1])["pixel_values"]
    features = model.get_image_features(pixels)
    before, after = (model.model.vision_tower(pixels[:, i]) for i in (0, 1))
    fused = model.model.fuse(before, after)
    torch.testing.assert_close(features.last_hidden_state, torch.cat([fused.before, fused.after], 1))
    assert features.last_hidden_state.shape == (2, 2 * 17, 32)
    torch.testing.assert_close(features.change, (after - before)[:, 1:])


@pytest.mark.parametrize("fusion", FUSIONS)
def test_training_and_generation_go_through_one_fusion(fusion):
    """Once a call, with the same features of the same pair, and what comes out is what is read."""
    model, processor = tiny_model(fusion=FUSIONS[fusion], seed=3)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    read: list[Tensor] = []
    model.model.fusion.register_forward_hook(
        lambda _, given, out: seen.append((given[0].detach(), given[1].detach(), out.after.detach()))
    )
    model.model.qformer.register_forward_pre_hook(
        lambda _, __, given: read.append(given["encoder_hidden_states"].detach()), with_kwargs=True
    )
    model(**lesson(processor)).loss.backward()  # in eval mode: dropout off, to compare what comes out
    assert len(seen) == len(read) == 1
    model.train()(**lesson(processor)).loss.backward()
    assert len(seen) == len(read) == 2
    for options in ({}, {"num_beams": 2}):
        model.eval().generate(**pair_inputs(processor, [0, 1], QUESTIONS), max_new_tokens=3, **options)
    assert len(seen) == len(read) == 4
    for before, after, _ in seen[1:]:
        assert torch.equal(before, seen[0][0]) and torch.equal(after, seen[0][1])
    for (_, _, fused), entry in zip(seen, read, strict=True):
        assert torch.equal(entry[:, -fused.shape[1] :], fused)  # the after image comes last
    for i in (2, 3):
        assert torch.equal(seen[i][2], seen[0][2]) and torch.equal(read[i], read[0])


@torch.no_grad()
def test_a_fusion_of_patches_leaves_the_class_token_alone():
    model, processor = tiny_model(fusion=FUSIONS["difference"])
    pixels = pair_inputs(processor, [0])["pixel_values"]
    raw = model.model.vision_tower(pixels[0])
    features = model.get_image_features(pixels)
    split = features.last_hidden_state[0].unflatten(0, (2, 17))
    torch.testing.assert_close(split[:, 0], raw[:, 0])
    assert not torch.allclose(split[:, 1:], raw[:, 1:], atol=1e-3)
    assert features.change.shape == (1, 16, 32)


@torch.no_grad()
def test_the_question_reaches_the_image_tokens_and_its_padding_does_not(made):
    model, processor = made
    features = model.get_image_features(pair_inputs(processor, [0, 0])["pixel_values"]).last_hidden_state
    read = processor.pad([processor.encode(question) for question in QUESTIONS])
    ids, mask = read["qformer_input_ids"], read["qformer_attention_mask"]
    prefix = model.model.ask(features, ids, mask)
    assert prefix.shape == (2, QUERIES, 48)
    assert not torch.allclose(prefix[0], prefix[1], atol=1e-3)
    short = ids[:1, : int(mask[0].sum())]
    torch.testing.assert_close(model.model.ask(features[:1], short), prefix[:1])
    assert not torch.allclose(prefix[:, 0], prefix[:, 1], atol=1e-3)  # queries differ


@torch.no_grad()
def test_queries_find_what_instructblips_find(made):
    """Of one image's tokens, with the same weights: masks, positions and projection are InstructBLIP's own."""
    from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

    model, processor = made
    parts = {
        name: copy.deepcopy(getattr(model.config, f"{name}_config")) for name in ("vision", "qformer", "text")
    }
    config = InstructBlipConfig(
        **{f"{name}_config": part for name, part in parts.items()},
        num_query_tokens=QUERIES,
        image_token_index=3,
    )
    twin = InstructBlipForConditionalGeneration(config).eval()
    names = {"vision_model": "vision_tower", "qformer": "qformer", "language_projection": "projector"}
    for theirs, ours in names.items():
        getattr(twin, theirs).load_state_dict(getattr(model.model, ours).state_dict())
    twin.query_tokens.copy_(model.model.query_tokens)
    twin.vision_model.post_layernorm.eps = 1e-5
    images = pair_inputs(processor, [0])["pixel_values"][0]
    read = processor.pad([processor.encode(question) for question in QUESTIONS])
    wanted = twin.get_image_features(
        images, read["qformer_input_ids"], read["qformer_attention_mask"], return_dict=True
    ).pooler_output
    tokens = model.model.vision_tower(images)
    found = model.model.ask(tokens, read["qformer_input_ids"], read["qformer_attention_mask"])
    torch.testing.assert_close(found, wanted)


@torch.no_grad()
def test_pairs_features_and_prefix_give_the_same(made):
    model, processor = made
    inputs = pair_inputs(processor, [0, 1], QUESTIONS)
    wanted = model(**inputs)
    pixels = inputs.pop("pixel_values")
    features = model.get_image_features(pixels)
    assert torch.equal(model(**inputs, pair_features=features.last_hidden_state).logits, wanted.logits)
    read = {name: inputs.pop(name) for name in ("qformer_input_ids", "qformer_attention_mask")}
    prefix = model.model.ask(features.last_hidden_state, *read.values())
    assert torch.equal(model(**inputs, prefix=prefix).logits, wanted.logits)
    assert torch.equal(wanted.change, features.change)
    embeds = model.model.embed(inputs["input_ids"], prefix)
    given = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(given, wanted.logits)


def test_several_questions_about_one_pair_are_one_look(made):
    model, processor = made
    apart = pair_inputs(processor, [0, 0, 1], QUESTIONS, answers=["yes", "no", "a road"])
    together = apart | {
        "pixel_values": apart["pixel_values"][[0, 2]],
        "pair_index": torch.tensor([0, 0, 1]),
    }
    torch.testing.assert_close(model(**together).logits, model(**apart).logits)


def test_several_answers_to_one_question_in_one_pass(made):
    """Branches behind one prefix are worth as much as rows of their own."""
    model, processor = made
    answers = ["many trees", "a road"]
    apart = model(**pair_inputs(processor, [0, 0], answers=answers))
    rows = [processor.encode(QUESTIONS[0], (), answer) for answer in answers]
    prompt = processor.encode(QUESTIONS[0])["input_ids"]
    last = len(prompt) - 1
    # each branch starts with the prompt's last token, whose next word is the answer's first
    tails = [row["input_ids"][last:] for row in rows]
    ids = torch.tensor([prompt[:last] + tails[0] + tails[1]])
    labels = torch.tensor([[-100] * last + rows[0]["labels"][last:] + rows[1]["labels"][last:]])
    segments = torch.tensor([[0] * last + [1] * len(tails[0]) + [2] * len(tails[1])])
    single = pair_inputs(processor, [0])
    kept = {name: single[name] for name in ("pixel_values", "qformer_input_ids", "qformer_attention_mask")}
    one = model(input_ids=ids, labels=labels, segments=segments, **kept)
    torch.testing.assert_close(one.loss, apart.loss)


def test_what_is_missing_or_too_much_is_named(made):
    model, processor = made
    inputs = pair_inputs(processor, [0, 1], QUESTIONS)
    without = {name: value for name, value in inputs.items() if name != "pixel_values"}
    cases: list[tuple[dict[str, Any], str]] = [
        (without, r"8 image placeholders, but no pixel_values"),
        (inputs | {"pixel_values": inputs["pixel_values"][:, 0]}, r"reads pairs"),
        (inputs | {"pixel_values": inputs["pixel_values"][..., :14]}, r"tower of 28 x 28"),
        (inputs | {"pixel_values": inputs["pixel_values"][:1]}, r"2 questions for 1 pairs"),
        (inputs | {"qformer_input_ids": None}, r"qformer_input_ids are missing"),
        (inputs | {"input_ids": inputs["input_ids"][:, 1:], "attention_mask": None}, r"6 image placeholders"),
    ]
    for given, message in cases:
        with pytest.raises(DataError, match=message):
            model(**given)
    with pytest.raises(ValueError, match="one of pixel_values"):
        model(**inputs, pair_features=torch.zeros(2, 34, 32))


# --- loss -------------------------------------------------------------------------------------------------------


def test_the_loss_is_of_the_answers_tokens_and_their_end(made):
    model, processor = made
    batch = lesson(processor)
    output = model(**batch)
    terms = []
    for row, labels in zip(output.logits, batch["labels"], strict=True):
        places = (labels != -100).nonzero()[:, 0]
        terms.append(F.cross_entropy(row[places - 1], labels[places], reduction="none"))
    learned = [processor.answer_ids(answer) for answer in ANSWERS]
    assert [len(term) for term in terms] == [len(ids) for ids in learned]
    torch.testing.assert_close(output.loss, torch.cat(terms).mean())
    assert learned[0][-1] == processor.eos_token_id


@torch.no_grad()
def test_padding_changes_no_loss(made):
    model, processor = made
    both = model(**lesson(processor), num_items_in_batch=1).loss
    alone = [
        model(**pair_inputs(processor, [i], (QUESTIONS[i],), answers=[ANSWERS[i]]), num_items_in_batch=1).loss
        for i in (0, 1)
    ]
    torch.testing.assert_close(both, alone[0] + alone[1])


# --- what learns ------------------------------------------------------------------------------------------------


def is_frozen(name: str) -> bool:
    plain = name.removeprefix("model.")
    if plain.startswith("vision_tower.encoder."):
        return plain.split(".")[3] in ("0", "1")
    return plain.startswith(("vision_tower.embeddings.", "language_model.", "lm_head."))


def leads_nowhere(name: str) -> bool:
    """Of the Q-Former's last layer, what is done with the text: only the queries are read."""
    return name.startswith(
        ("model.qformer.encoder.layer.2.intermediate.", "model.qformer.encoder.layer.2.output.")
    )


def step(model: DeltaVLMForConditionalGeneration, batch: dict[str, Tensor], rate: float = 0.01) -> float:
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0)  # which would move what has no gradient
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def test_a_step_moves_what_is_tuned_and_not_a_bit_of_the_rest():
    model, processor = tiny_model(seed=1)
    held = {name: value.clone() for name, value in model.state_dict().items()}
    step(model.train(), lesson(processor))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, held[name])}
    wanted = {name for name, _ in model.named_parameters() if not is_frozen(name)}
    assert moved <= wanted
    assert all(leads_nowhere(name) for name in wanted - moved), wanted - moved
    assert {name.split(".")[1] for name in moved} == {
        "vision_tower", "fusion", "query_tokens", "qformer", "projector"
    }  # fmt: skip
    assert all(model.learns(name) != is_frozen(name) for name in held)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_every_combination_trains_a_step_and_generates(fusion, text):
    model, processor = tiny_model(text, FUSIONS[fusion])
    batch = lesson(processor)
    for _ in range(2):
        model.train().zero_grad(set_to_none=True)
        assert math.isfinite(step(model, batch, rate=1e-3))
    missing = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(grad.isfinite().all() for grad in grads.values())
    silent = {name for name, grad in grads.items() if not grad.any()}
    assert missing == set()  # other processes would wait for it
    # softmax does not see the bias of keys
    assert all(leads_nowhere(n) or n.endswith(("key.bias", "k_proj.bias")) for n in silent), silent
    inputs = pair_inputs(processor, [0, 1], QUESTIONS)
    length = inputs["input_ids"].shape[1]
    out = model.eval().generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    assert out.shape == (2, length + 3)


def test_tuning_more():
    model, _ = tiny_model(tune_language_model=True, tune_vision_blocks=4)
    assert all(p.requires_grad for p in model.parameters())
    model, _ = tiny_model(tune_vision_blocks=0)
    tower = model.model.vision_tower
    assert [name for name, p in tower.named_parameters() if p.requires_grad] == [
        "post_layernorm.weight", "post_layernorm.bias"
    ]  # fmt: skip


def test_the_encoder_stays_in_eval_mode_and_dropout_elsewhere_does_not():
    model, processor = tiny_model()
    model.train()
    assert not any(module.training for module in model.model.vision_tower.modules())
    assert (
        model.model.qformer.training and model.model.fusion.training and model.model.language_model.training
    )
    batch = lesson(processor)
    torch.manual_seed(0)
    assert len({float(model(**batch).loss.detach()) for _ in range(2)}) == 2
    assert len({float(model.eval()(**batch).loss.detach()) for _ in range(2)}) == 1


def test_frozen_blocks_keep_nothing_for_backward():
    model, processor = tiny_model()
    model.train()
    model.gradient_checkpointing_enable()  # marks the embedding's output
    seen: dict[int, bool] = {}
    for i, layer in enumerate(model.model.vision_tower.encoder.layers):
        layer.register_forward_hook(lambda _, __, out, i=i: seen.__setitem__(i, out.requires_grad))
    model(**lesson(processor)).loss.backward()
    assert seen == {0: False, 1: False, 2: True, 3: True}


def test_gradient_checkpointing_gives_the_same_gradients():
    model, processor = tiny_model()
    batch = lesson(processor)
    model.train()
    model.model.fusion.dropout.p = 0.0
    for module in model.model.qformer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0

    def gradients() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    calls: list[str] = []
    watched: dict[str, Callable[..., Any]] = {
        "text": model.model.language_model.layers[0].self_attn,
        "qformer": model.model.qformer.encoder.layer[0].attention,
    }
    for name, module in watched.items():
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    model.gradient_checkpointing_enable()
    again = gradients()
    assert calls.count("text") == calls.count("qformer") == 2
    assert again.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, msg=name)


# --- as a model of transformers -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa", {"": "sdpa", "qformer_config": "eager"}], ids=str)
def test_attention_kinds_agree(attention, made, tmp_path):
    model, processor = made
    model.save_pretrained(tmp_path)
    loaded = DeltaVLMForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=attention)
    wanted = attention if isinstance(attention, str) else attention["qformer_config"]
    assert loaded.model.qformer.config._attn_implementation == wanted
    inputs = pair_inputs(processor, [0, 1], QUESTIONS)
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(
        loaded(**inputs).logits[seen], model(**inputs).logits[seen], rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_auto_classes_and_half_precision(made, tmp_path):
    model, processor = made
    model.save_pretrained(tmp_path)
    inputs = pair_inputs(processor, [0, 1], QUESTIONS)
    wanted = model(**inputs).logits
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is DeltaVLMForConditionalGeneration
        assert torch.equal(loaded(**inputs).logits, wanted)
    assert type(AutoModel.from_pretrained(tmp_path)) is DeltaVLMModel
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and half.model.query_tokens.dtype == torch.float32
    assert (half(**inputs).logits.float() - wanted).abs().mean() < 0.1
    half.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    fp16 = copy.deepcopy(model)
    fp16.cast_language_model(torch.float16)
    assert fp16.dtype == torch.float32 and fp16.lm_head.weight.dtype == torch.float16
    assert {b.dtype for name, b in fp16.named_buffers() if "inv_freq" in name} == {torch.float32}
    assert (fp16(**inputs).logits.float() - wanted).abs().mean() < 0.05
    fp16.train()
    with torch.enable_grad():
        fp16(**lesson(processor)).loss.backward()
    assert fp16.model.projector.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("text", ["gpt2", "opt", "phi3", "gemma", "mistral"])
def test_other_language_models(text):
    sizes = {
        "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4},
        "opt": {"ffn_dim": 64, "word_embed_proj_dim": 48, "hidden_size": 48},
    }
    common = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
    }
    ends = {"bos_token_id": 356, "eos_token_id": 357, "pad_token_id": 358, "vocab_size": 384}
    fields = sizes.get(text, common) | ends | {"model_type": text}
    if text == "opt":
        fields |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    model, processor = tiny_model(text_config=fields)
    inputs = pair_inputs(processor, [0, 1], QUESTIONS)
    batch = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)[:, -3:]
    for i, question in enumerate(QUESTIONS):
        alone = pair_inputs(processor, [i], (question,))
        assert torch.equal(model.generate(**alone, max_new_tokens=3, min_new_tokens=3)[0, -3:], batch[i])
    model.train()(**lesson(processor)).loss.backward()
    assert model.model.query_tokens.grad is not None


def test_a_head_tied_to_the_embedding_stays_tied(tmp_path):
    for text in ("llama", "gpt2"):
        fields = {"model_type": text, "tie_word_embeddings": True, "vocab_size": 384, "eos_token_id": 357}
        fields |= {"n_embd": 48, "n_layer": 1, "n_head": 4} if text == "gpt2" else {}
        if text == "llama":
            fields |= {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        model, _ = tiny_model(text_config=fields)
        model.save_pretrained(tmp_path / text)
        again = DeltaVLMForConditionalGeneration.from_pretrained(tmp_path / text)
        assert again.lm_head.weight is again.get_input_embeddings().weight
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_random_pairs_differ():
    """What tests above rest on."""
    assert random_pair(0)[0].tobytes() != random_pair(0)[1].tobytes()


@pytest.mark.parametrize("fusion", ["csrm identity", "csrm_paper", "concat dated"])
def test_it_can_learn_what_depends_on_pair_question_and_order(fusion):
    """Four answers that only the pair, the order of its dates and the question together decide."""
    model, processor = tiny_model(fusion=FUSIONS[fusion], tune_language_model=True, tune_vision_blocks=4)
    pair = random_pair(0)
    images = [pair, pair[::-1], random_pair(1), pair]
    text = [QUESTIONS[0], QUESTIONS[0], QUESTIONS[0], QUESTIONS[1]]
    answers = ["a road", "many trees", "the scene is the same", "yes"]
    batch = dict(processor(images=images, text=text, answers=answers))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    for _ in range(60):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    inputs = processor(images=images, text=text)
    out = model.eval().generate(**inputs, max_new_tokens=16)[:, inputs["input_ids"].shape[1] :]
    assert processor.batch_decode(out, skip_special_tokens=True) == answers

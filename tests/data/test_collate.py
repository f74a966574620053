"""One pass per pair: captions as branches give the loss and gradients of separate samples."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llava.data.collate import BranchCollator, branch_mask
from llava.data.conversation import IGNORE
from llava.data.dataset import Sample
from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from tests.tiny import tiny_model

PAD = 0


def sample(model: ChangeVLMForConditionalGeneration, seed: int, answers: Sequence[int]) -> Sample:
    """A pair of noise with answers of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    config, side = model.config, model.config.vision_config.image_size
    words = torch.randint(1, 300, (4 + seed,), generator=generator).tolist()
    prompt = [*words, *[config.image_token_id] * (2 * config.image_seq_length), *words]
    told = [torch.randint(1, 300, (length,), generator=generator).tolist() for length in answers]
    pixels = torch.randn(2, 3, side, side, generator=generator, dtype=torch.float64)
    return Sample(f"s{seed}", pixels, prompt, [IGNORE] * len(prompt), [(ids, ids) for ids in told])


def loss_and_gradients(
    model: ChangeVLMForConditionalGeneration, batches: list[dict[str, Tensor]], words: int
):
    """Summed over batches, divided by the number of learned words in all of them."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        loss = model(**batch, num_items_in_batch=torch.tensor(words)).loss
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_branches_equal_separate_samples(attention: str, checkpointing: bool):
    model, _ = tiny_model()
    model = model.double().train()
    model.set_attn_implementation(attention)
    if checkpointing:
        model.gradient_checkpointing_enable()
    samples = [sample(model, 1, [3, 5, 2]), sample(model, 2, [4])]
    collate = BranchCollator(PAD)
    batch = collate(samples)
    together = loss_and_gradients(model, [batch], words=14)
    alone = []
    for one in samples:
        for answer in one.answers:
            row = collate([replace(one, answers=[answer])])
            row["attention_mask"] = torch.ones_like(row["input_ids"])  # the plain causal mask
            del row["position_ids"]
            alone.append(row)
    apart = loss_and_gradients(model, alone, words=14)
    torch.testing.assert_close(together[0], apart[0], rtol=1e-6, atol=0)
    assert together[1].keys() == apart[1].keys()
    largest = float(max(g.abs().max() for g in apart[1].values()))
    exact = 1e-7 if attention == "sdpa" else 1e-6  # eager attention takes its softmax in float32
    for name, gradient in apart[1].items():
        torch.testing.assert_close(together[1][name], gradient, rtol=1e-4, atol=exact * largest, msg=name)


def test_the_mask_lets_a_branch_see_the_prefix_and_itself_only():
    seen = branch_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0]
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


def test_text_and_pairs_share_a_batch():
    model, _ = tiny_model()
    pair = sample(model, 1, [3])
    pair = replace(pair, pixel_values=pair.pixel_values.float())
    text = Sample("t", torch.empty(0), [5, 6], [IGNORE] * 2, [([7, 8], [7, 8])])
    batch = BranchCollator(PAD)([pair, text])
    assert batch["image_counts"].tolist() == [2, 0]
    with torch.no_grad():
        both = model(**batch).logits
        alone = model(**BranchCollator(PAD)([text])).logits
    torch.testing.assert_close(both[1, : alone.shape[1]], alone[0], rtol=1e-4, atol=1e-5)

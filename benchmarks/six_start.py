"""What the small models of benchmarks/six_tasks.py start from: `tiny-base`, in both families, made fit for six tasks.

    python benchmarks/six_start.py --words tasks/train.jsonl --out runs/start
    python benchmarks/six_start.py --delta csrm --base runs/start --out runs/start_delta

- Patches are smaller, 16 pixels of 192 in place of 24: 12 x 12 of them, four for a third of a side, so that a cell of a
  3 x 3 grid is whole patches. Their weights and the codes of their places are interpolated.
- The tokenizer is trained on the questions and answers too, which `tiny-base` would spell. Words that both know keep
  their embedding; any other gets the mean of the old pieces that spell it.
- It then looks at single images of the world of roads and buildings, as `tiny-base` did at those of the other: in words
  it says how many roads and buildings are there, and in which cells; heads that are thrown away tell both apart four by
  four pixels at a time, mark the middles of buildings, and say where each patch stands. It sees no pair, no change, and
  no scene of the training or test data.
- A DeltaVLM has the same tower and language model with a new Q-Former between them, so both families begin with the
  same eyes and the same words. The tower goes from SigLIP's layout to InstructBLIP's: its key biases, which shift all
  of a softmax alike, go; the pixel statistics move into the patch weights; a class token is new.
"""

import argparse
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer

from llava.assets import built_in_path
from llava.data.collate import BranchCollator
from llava.data.conversation import IGNORE, PAIR_INTRODUCTION, QUESTION, text_to_content
from llava.data.dataset import Sample
from llava.data.encode import Branch
from llava.data.record import parse_record
from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from llava.model.delta_vlm.configuration import DeltaVLMConfig
from llava.model.delta_vlm.modeling import DeltaVLMForConditionalGeneration
from llava.model.delta_vlm.processing import CLIP_MEAN, CLIP_STD, DeltaVLMProcessor
from llava.model.processing import ChangeVLMProcessor, add_image_token
from llava.model.splice import placeholder_mask, splice
from llava.synth import CLASSES, World
from llava.tasks.answers import write_counts, write_places
from llava.tasks.labels import BUILDING, ROAD, labels_from_mask
from llava.train.tokenizer import train_tokenizer

PATCH = 16
VOCABULARY = 1200
READ = 9000
"""Records whose words make the tokenizer: a thousand pairs."""
EMBEDDINGS = "model.vision_tower.encoder.embeddings."
QFORMER = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "cross_attention_frequency": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


AROUND = (
    *("system\nYou are a helpful assistant.", "user\n", "assistant\n", PAIR_INTRODUCTION + QUESTION),
    "Question: Answer:",  # a DeltaVLM's
)
"""What prompts put around the words of records, and the question for a caption."""


def words_of(path: Path) -> list[str]:
    """Captions, questions and answers of the first records of a file, and what stands around them."""
    texts = [*AROUND] * 20
    with path.open(encoding="utf-8") as lines:
        for line in islice(lines, READ):
            record = parse_record(json.loads(line), str(path))
            texts += [*record.change_caption, *(text for turn in record.conversation for text in turn)]
    return texts


def start(words: Path, patch: int = PATCH) -> tuple[ChangeVLMForConditionalGeneration, ChangeVLMProcessor]:
    """`tiny-base` with other patches and other words, in float32."""
    folder = built_in_path("tiny-base")
    base = ChangeVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    weights = dict(base.state_dict())
    config: Any = base.config
    before, old = config.grid, int(config.vision_config.patch_size)
    config.vision_config.patch_size = patch
    kernel, codes = (EMBEDDINGS + name for name in ("patch_embedding.weight", "position_embedding.weight"))
    # an even colour gives what it gave
    smaller = F.interpolate(weights[kernel], size=(patch, patch), mode="bilinear", antialias=True)
    weights[kernel] = smaller * (old / patch) ** 2
    places = weights[codes].T.view(1, -1, before, before)  # [1, D, 8, 8]
    places = F.interpolate(places, size=(config.grid, config.grid), mode="bicubic", align_corners=False)
    weights[codes] = places.flatten(2)[0].T

    known = AutoTokenizer.from_pretrained(folder)
    tokenizer = train_tokenizer(words_of(words), VOCABULARY)
    config.image_token_id = add_image_token(tokenizer)
    config.text_config.vocab_size = len(tokenizer)
    for held in (config, config.text_config):
        held.eos_token_id, held.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    name = "model.language_model.embed_tokens.weight"
    weights[name] = reworded(weights[name], known, tokenizer)
    weights["lm_head.weight"] = weights[name]
    model = ChangeVLMForConditionalGeneration(config)
    model.load_state_dict(weights)
    processor = ChangeVLMProcessor.for_config(config, tokenizer)
    processor.chat_template = ChangeVLMProcessor.from_pretrained(folder).chat_template
    return model, processor


@dataclass
class View:
    """A single image and what is to be seen in it."""

    pixels: np.ndarray
    """uint8 [3, S, S]"""
    shares: np.ndarray
    """Of roads and of buildings, of 255: uint8 [2, 4 g, 4 g] for g x g patches."""
    middles: np.ndarray
    """In which patches a building has its middle: uint8 [g, g]."""
    answers: tuple[str, ...]
    """To `ASKED`."""


ASKED = (
    "How many roads and how many buildings are there?",
    "In which cells of a three by three grid are roads, and in which are buildings?",
)


FINE = 4
"""Fields that a patch is told apart into, each way."""
SCENES_SEED = 9000
"""Of the world that is looked at: no scene is one of the data."""
BUILDINGS = ("house", "building")


def views_of(task: tuple[int, int, int, int]) -> list[View]:
    """Both dates of some pairs: (first pair, past the last, image size, g)."""
    start, stop, size, grid = task
    found = []
    wanted = [[CLASSES.index("road")], [CLASSES.index(name) for name in BUILDINGS]]
    side = FINE * grid
    for pair in World(seed=SCENES_SEED, split="train", changes="built").pairs(start, stop):
        dates: tuple[tuple[Any, np.ndarray, np.ndarray], ...] = (
            ("before", pair.before, pair.classes_before),
            ("after", pair.after, pair.classes_after),
        )
        for date, pixels, classes in dates:
            small = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
            shares = [
                Image.fromarray(np.isin(classes, names) * np.uint8(255)).resize(
                    (side, side), Image.Resampling.BOX
                )
                for names in wanted
            ]
            middles = np.zeros((grid, grid), np.uint8)
            for thing in pair.instances:
                if thing.name in BUILDINGS and thing.presence in (date, "both"):
                    x0, y0, x1, y1 = thing.box
                    middles[(y0 + y1) * grid // (2 * len(pixels)), (x0 + x1) * grid // (2 * len(pixels))] = 1
            roads, buildings = (np.isin(classes, names) for names in wanted)
            labels = labels_from_mask(roads * np.uint8(ROAD) + buildings * np.uint8(BUILDING))
            answers = (
                write_counts(labels.roads, labels.buildings).replace(" new", ""),
                write_places(labels.road_places, labels.building_places),
            )
            fields = np.stack([np.asarray(x) for x in shares])
            found.append(View(small.transpose(2, 0, 1), fields, middles, answers))
    return found


class Eyes(nn.Module):
    """The heads on a tower's patches [M, N, D], and their loss."""

    def __init__(self, width: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.shares = nn.Linear(width, 2 * FINE**2)
        self.middle = nn.Linear(width, 1)
        self.place = nn.Linear(width, 2 * grid)

    def forward(self, patches: Tensor, shares: Tensor, middles: Tensor) -> dict[str, Tensor]:
        """Losses for shares [M, 2, 4 g, 4 g] and middles [M, g, g], 0 .. 1."""
        grid, n = self.grid, self.grid**2
        told = shares.unflatten(3, (grid, FINE)).unflatten(2, (grid, FINE))  # [M, 2, g, 4, g, 4]
        told = told.permute(0, 2, 4, 1, 3, 5).reshape(len(shares), n, -1)  # [M, N, 32]
        index = torch.arange(n)
        where = torch.stack([index // grid, index % grid], 1).expand(len(shares), n, 2)
        places = self.place(patches).unflatten(-1, (2, grid))
        return {
            "shares": F.binary_cross_entropy_with_logits(self.shares(patches), told),
            "middles": F.binary_cross_entropy_with_logits(self.middle(patches)[..., 0], middles.flatten(1)),
            "places": F.cross_entropy(places.flatten(0, 2), where.flatten()),
        }


class Words:
    """The questions about a single image as branches of one row, and their loss."""

    def __init__(self, model: ChangeVLMForConditionalGeneration, processor: ChangeVLMProcessor) -> None:
        self.model, self.processor = model, processor
        self.collate = BranchCollator(processor.tokenizer.pad_token_id)

    def sample(self, view: View) -> Sample:
        """A row without its image."""
        branches = []
        for question, answer in zip(ASKED, view.answers, strict=True):
            content = text_to_content(f"<image>\n{question}")
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            coded = self.processor.encode(messages)
            branches.append(Branch([], [], coded["input_ids"], coded["labels"]))
        start = next(
            k for k, both in enumerate(zip(*(b.answer for b in branches), strict=False)) if len({*both}) > 1
        )
        prompt = self.processor.expand(branches[0].answer[:start], [self.processor.image_seq_length])
        answers = [(branch.answer[start:], branch.answer_labels[start:]) for branch in branches]
        return Sample("", torch.empty(0), prompt, [IGNORE] * len(prompt), answers)

    def loss(self, views: list[View], patches: Tensor) -> Tensor:
        """Mean over the answers' tokens, for the tower's patches [M, N, D]."""
        batch = self.collate([self.sample(view) for view in views])
        model, ids = self.model.model, batch["input_ids"]
        image = placeholder_mask(ids, model.config.image_token_id)
        embeds = model.get_input_embeddings()(ids.masked_fill(image, 0))
        embeds = splice(embeds, image, model.projector(patches).flatten(0, 1))
        out = model(
            inputs_embeds=embeds,
            segments=batch["segments"],
            position_ids=batch["position_ids"],
            use_cache=False,
        )
        target = F.pad(batch["labels"], (0, 1), value=IGNORE)[:, 1:]
        kept = target != IGNORE
        return F.cross_entropy(self.model.lm_head(out.last_hidden_state[kept]), target[kept])


WEIGHTS = {"words": 1.0, "shares": 4.0, "middles": 4.0, "places": 0.2}


def look(
    model: ChangeVLMForConditionalGeneration,
    processor: ChangeVLMProcessor,
    pairs: int,
    epochs: int,
    workers: int,
    seed: int,
) -> None:
    """Train all of it on both dates of so many pairs."""
    config: Any = model.config
    grid, size, width = config.grid, config.vision_config.image_size, config.vision_config.hidden_size
    began, step = time.monotonic(), 50
    tasks = [(first, min(first + step, pairs), size, grid) for first in range(0, pairs, step)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        views = [view for part in pool.map(views_of, tasks) for view in part]
    print(f"{len(views)} images in {time.monotonic() - began:.0f} s", flush=True)
    torch.manual_seed(seed)
    tower, heads = model.model.vision_tower, Eyes(width, grid)
    words = Words(model, processor)
    learned = [*model.parameters(), *heads.parameters()]
    batch = 32
    steps = len(views) // batch * epochs
    optimizer = torch.optim.AdamW(learned, lr=1e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    began, sums = time.monotonic(), dict.fromkeys(WEIGHTS, 0.0)
    model.train()
    for number, chosen in enumerate(batches(len(views), batch, epochs, seed), 1):
        drawn = [views[i] for i in chosen]
        pixels = torch.from_numpy(np.stack([view.pixels for view in drawn])).float().div_(127.5).sub_(1)
        shares = torch.from_numpy(np.stack([view.shares for view in drawn])).float() / 255
        middles = torch.from_numpy(np.stack([view.middles for view in drawn])).float()
        patches = tower(pixels)[-1]
        losses = {"words": words.loss(drawn, patches), **heads(patches, shares, middles)}
        sum((WEIGHTS[name] * loss for name, loss in losses.items()), torch.zeros(())).backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for name, loss in losses.items():
            sums[name] += loss.item()
        if number % 100 == 0 or number == steps:
            mean = "  ".join(f"{name} {value / (number % 100 or 100):.4f}" for name, value in sums.items())
            rate = number * batch / (time.monotonic() - began)
            print(f"step {number}/{steps}  {mean}  {rate:.1f} images/s", flush=True)
            sums = dict.fromkeys(WEIGHTS, 0.0)


def batches(count: int, size: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """Indices, every one once an epoch but for the last few."""
    dice = np.random.default_rng(seed)
    for _ in range(epochs):
        yield from dice.permutation(count)[: count // size * size].reshape(-1, size)


def reworded(rows: Tensor, known: Any, tokenizer: Any) -> Tensor:
    """Embeddings [V, H] of one byte-level vocabulary for another, [V', H]."""
    places, units = known.get_vocab(), known.backend_tokenizer.model
    found = []
    for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        pieces = [places[token]] if token in places else [piece.id for piece in units.tokenize(token)]
        found.append(rows[pieces].mean(0))
    return torch.stack(found)


def tower_weights(siglip: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Weights of a SigLIP encoder by InstructBLIP's names; pixels are then normalised by CLIP's statistics."""
    patch = siglip["embeddings.patch_embedding.weight"]  # [D, 3, p, p]
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    # (x - .5) / .5 = (y std + mean - .5) / .5 for y = (x - mean) / std
    weights = {
        "embeddings.patch_embedding.weight": patch * std / 0.5,
        "embeddings.patch_embedding.bias": siglip["embeddings.patch_embedding.bias"]
        + (patch * (mean - 0.5) / 0.5).sum((1, 2, 3)),
        "embeddings.class_embedding": torch.zeros(1, 1, patch.shape[0]),
    }
    places = siglip["embeddings.position_embedding.weight"]  # [N, D]
    weights["embeddings.position_embedding"] = torch.cat([torch.zeros_like(places[:1]), places])[None]
    for k in range(layers):
        old, new = f"encoder.layers.{k}.", f"encoder.layers.{k}."
        for name in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"):
            for kind in ("weight", "bias"):
                weights[f"{new}{name}.{kind}"] = siglip[f"{old}{name}.{kind}"]
        attention = f"{old}self_attn."
        qkv = [siglip[f"{attention}{x}_proj.weight"] for x in "qkv"]
        weights[f"{new}self_attn.qkv.weight"] = torch.cat(qkv)
        biases = [siglip[f"{attention}{x}_proj.bias"] for x in "qv"]
        weights[f"{new}self_attn.qkv.bias"] = torch.cat([biases[0], torch.zeros_like(biases[0]), biases[1]])
        for kind in ("weight", "bias"):
            weights[f"{new}self_attn.projection.{kind}"] = siglip[f"{attention}out_proj.{kind}"]
    return weights


def delta(
    folder: Path, fusion: dict[str, Any], seed: int
) -> tuple[DeltaVLMForConditionalGeneration, DeltaVLMProcessor]:
    """The model with its processor, from what `start` made and the tower has seen; everything in it may learn."""
    base: Any = ChangeVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = ChangeVLMProcessor.from_pretrained(folder)
    tokenizer = processor.tokenizer
    held: Any = base.config
    vision = held.vision_config
    config = DeltaVLMConfig(
        vision_config={
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": vision.hidden_act,
            "initializer_range": 0.02,
        },
        qformer_config={**QFORMER, "vocab_size": len(tokenizer)},
        text_config=held.text_config,
        num_query_tokens=32,
        fusion=fusion,
        tune_vision_blocks=vision.num_hidden_layers,
        tune_language_model=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = DeltaVLMForConditionalGeneration(config)
    tower = dict(base.model.vision_tower.encoder.state_dict())
    tower = {name.removeprefix("vision_model."): value for name, value in tower.items()}
    missing, unexpected = model.model.vision_tower.load_state_dict(
        tower_weights(tower, vision.num_hidden_layers), strict=False
    )
    if unexpected or set(missing) - {"post_layernorm.weight", "post_layernorm.bias"}:
        raise AssertionError(f"tower: {missing} are missing, {unexpected} unexpected")
    model.model.language_model.load_state_dict(base.model.language_model.state_dict())
    return model, DeltaVLMProcessor.for_config(config, tokenizer, tokenizer)


def main() -> None:
    """Write one to a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--words", type=Path, help="records (JSON Lines) to take words from")
    parser.add_argument(
        "--pairs", type=int, default=6000, help="whose images it looks at (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=10, help="how often (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw (default: %(default)s)")
    parser.add_argument("--delta", metavar="FUSION", help="a DeltaVLM: csrm, csrm_paper, concat, ...")
    parser.add_argument("--base", type=Path, help="for --delta: what was made without")
    parser.add_argument("--seed", type=int, default=0, help="of what is new (default: %(default)s)")
    args = parser.parse_args()
    if bool(args.delta) != bool(args.base) or bool(args.base) == bool(args.words):
        parser.error("either --words, or --delta with --base")
    model: Any
    processor: Any
    if args.delta:
        model, processor = delta(args.base, {"kind": args.delta}, args.seed)
    else:
        model, processor = start(args.words)
        look(model, processor, args.pairs, args.epochs, args.workers, args.seed)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {args.out}")


if __name__ == "__main__":
    main()

"""The tiny ChangeVLM: its sizes, and how its base (tower and language model) is pretrained.

The base sees single images of the synthetic world with their descriptions, and captions as text alone; it never sees
a pair. Losses: the descriptions' words, and, through heads that are thrown away, what lies under each patch and in
which row and column of the image it stands. Without the last the tower forgets where a patch is, and no language
model could say it.
Run by scripts/train/tiny_base.sh; the result ships with the package.
"""

import argparse
import gzip
import json
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from llava.data.collate import BranchCollator
from llava.data.conversation import IGNORE, text_to_content
from llava.data.dataset import Sample, text_sample
from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from llava.model.configuration import ChangeVLMConfig
from llava.model.fusion.difference import sine_position_code
from llava.model.processing import ChangeVLMProcessor, add_image_token
from llava.model.splice import placeholder_mask, splice
from llava.synth import CLASSES, World
from llava.train.tokenizer import train_tokenizer

IMAGE_SIZE, PATCH = 192, 24
VOCABULARY = 1600
DESCRIBE = "<image>\nWhat is in this image?"
TINY_LAYERS = [2, 4]


def tiny_config(tokenizer: Any, *, fusion: dict[str, Any] | None) -> ChangeVLMConfig:
    """About 1.6 million parameters, 0.4 more with fusion; 64 tokens an image."""
    return ChangeVLMConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_layers=TINY_LAYERS,
        fusion=fusion,
        image_token_id=add_image_token(tokenizer),
    )


@dataclass
class View:
    """A single image with its truth."""

    pixels: np.ndarray  # uint8 [3, S, S]
    patches: np.ndarray  # uint8 [N, classes], share of each class under a patch, of 255
    captions: list[str]


def _patch_shares(classes: np.ndarray) -> np.ndarray:
    """Class ids [H, W] to the share of each class under each patch [N, classes], as uint8 of 255."""
    grid, cell = IMAGE_SIZE // PATCH, classes.shape[0] // (IMAGE_SIZE // PATCH)
    cut = (
        classes[: grid * cell, : grid * cell]
        .reshape(grid, cell, grid, cell)
        .transpose(0, 2, 1, 3)
        .reshape(grid**2, -1)
    )
    shares = [(cut == index).mean(axis=1) for index in range(len(CLASSES))]
    return (np.stack(shares, axis=1) * 255).round().astype(np.uint8)


def _views(task: tuple[int, int, int]) -> list[View]:
    seed, start, stop = task
    views = []
    for pair in World(seed=seed, split="train", size=240).pairs(start, stop):  # 240 px: patches of 30 px
        dates = (
            (pair.before, pair.classes_before, pair.describe("before")),
            (pair.after, pair.classes_after, pair.describe("after")),
        )
        for pixels, classes, captions in dates:
            small = np.asarray(
                Image.fromarray(pixels).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
            )
            views.append(View(small.transpose(2, 0, 1), _patch_shares(classes), list(captions)))
    return views


def make_views(count: int, seed: int, workers: int) -> list[View]:
    """`count` single images with descriptions and patch shares, both dates of count / 2 scenes."""
    step = 100
    tasks = [(seed, start, min(start + step, count // 2)) for start in range(0, count // 2, step)]
    views: list[View] = []
    with ProcessPoolExecutor(workers) as pool:
        for part in pool.map(_views, tasks):
            views += part
    return views


def read_texts(path: Path | None) -> list[str]:
    """Captions of a JSON Lines file (plain or gzip) with a `captions` list a line; none without a file."""
    if path is None:
        return []
    with (
        gzip.open(path, "rt", encoding="utf-8")
        if path.suffix == ".gz"
        else path.open(encoding="utf-8") as lines
    ):
        rows = [json.loads(line) for line in lines]
    return [caption for row in rows if row.get("split", "train") == "train" for caption in row["captions"]]


class BaseTrainer:
    """Pretrains tower, projector and language model on single images and text."""

    def __init__(
        self, views: Sequence[View], texts: Sequence[str], processor: ChangeVLMProcessor, seed: int
    ) -> None:
        torch.manual_seed(seed)
        self.views, self.texts, self.processor = views, texts, processor
        self.random = random.Random(seed)
        self.model = ChangeVLMForConditionalGeneration(tiny_config(processor.tokenizer, fusion=None))
        grid = IMAGE_SIZE // PATCH
        with torch.no_grad():  # a start that shows: the usual one is a thirtieth of what a patch looks like
            embeddings = self.model.model.vision_tower.encoder.embeddings
            embeddings.position_embedding.weight.copy_(sine_position_code(grid, 128)[0])
        self.heads = nn.ModuleDict(
            {
                "patch": nn.Linear(128, len(CLASSES)),
                "row": nn.Linear(128, grid),
                "column": nn.Linear(128, grid),
            }
        )
        rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
        self.places = {"row": rows.flatten(), "column": columns.flatten()}  # [N] each
        messages = [{"role": "user", "content": text_to_content(DESCRIBE)}]
        bare = processor.tokenizer(processor.prompt(messages))["input_ids"]
        self.prompt = processor.expand(bare, [processor.image_seq_length])
        self.collate = BranchCollator(processor.tokenizer.pad_token_id)
        self._messages, self._bare = messages, len(bare)
        self._answers: dict[str, tuple[list[int], list[int]]] = {}
        self._texts: dict[str, Sample] = {}

    def _answer(self, caption: str) -> tuple[list[int], list[int]]:
        if caption not in self._answers:
            coded = self.processor.encode([*self._messages, {"role": "assistant", "content": caption}])
            self._answers[caption] = coded["input_ids"][self._bare :], coded["labels"][self._bare :]
        return self._answers[caption]

    def samples(self, size: int) -> Iterator[list[int]]:
        """Endless batches of indices, every view once an epoch."""
        while True:
            order = list(range(len(self.views)))
            self.random.shuffle(order)
            for start in range(0, len(order) - size + 1, size):
                yield order[start : start + size]

    def step(self, batch: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        """Sum of the losses of one batch, and each of them; every second image is also described in words."""
        views = [self.views[i] for i in batch]
        told = views[: len(views) // 2]
        pixels = (
            torch.from_numpy(np.stack([v.pixels for v in views])).float().div_(127.5).sub_(1)
        )  # [B, 3, S, S]
        model = self.model.model
        states = model.vision_tower(pixels)[-1]  # [B, N, D]
        shares = torch.from_numpy(np.stack([v.patches for v in views])).float() / 255  # [B, N, classes]
        patch_loss = F.cross_entropy(self.heads["patch"](states).flatten(0, 1), shares.flatten(0, 1))
        place_loss = torch.stack(
            [
                F.cross_entropy(self.heads[name](states).flatten(0, 1), where.repeat(len(states)))
                for name, where in self.places.items()
            ]
        ).mean()
        batch_told = self.collate([self._described(view) for view in told])
        ids, placeholder = batch_told["input_ids"], model.config.image_token_id
        features = model.projector(states[: len(told)]).flatten(0, 1)
        embeds = model.get_input_embeddings()(ids.masked_fill(ids == placeholder, 0))
        word_loss = self._words(batch_told, splice(embeds, placeholder_mask(ids, placeholder), features))
        losses = {"patch": patch_loss.item(), "place": place_loss.item(), "words": word_loss.item()}
        loss = word_loss + patch_loss + 0.2 * place_loss
        if self.texts:
            text = self.collate([self._text(self.random.choice(self.texts)) for _ in views])
            text_loss = self._words(text, model.get_input_embeddings()(text["input_ids"]))
            losses["text"] = text_loss.item()
            loss = loss + 0.5 * text_loss
        return loss, losses

    def _described(self, view: View) -> Sample:
        answers = [self._answer(caption) for caption in self.random.sample(view.captions, 2)]
        return Sample("", torch.empty(0), self.prompt, [IGNORE] * len(self.prompt), answers)

    def _text(self, text: str) -> Sample:
        if text not in self._texts:
            self._texts[text] = text_sample("", self.processor, text)
        return self._texts[text]

    def _words(self, batch: dict[str, Tensor], embeds: Tensor) -> Tensor:
        out = self.model.model(
            inputs_embeds=embeds,
            segments=batch["segments"],
            position_ids=batch["position_ids"],
            use_cache=False,
        )
        target = F.pad(batch["labels"], (0, 1), value=IGNORE)[:, 1:]
        kept = target != IGNORE  # logits where labels are, nowhere else
        return F.cross_entropy(self.model.lm_head(out.last_hidden_state[kept]), target[kept])

    def fit(self, steps: int, batch_size: int, learning_rate: float, log_every: int = 50) -> None:
        """AdamW with warm-up and cosine decay; a line of losses every `log_every` steps."""
        parameters = [*self.model.parameters(), *self.heads.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, learning_rate, total_steps=steps, pct_start=0.05
        )
        batches, start = self.samples(batch_size), time.monotonic()
        mean: dict[str, float] = {}
        self.model.train()
        for step in range(1, steps + 1):
            loss, losses = self.step(next(batches))
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            mean = {name: 0.95 * mean.get(name, value) + 0.05 * value for name, value in losses.items()}
            if step % log_every == 0 or step == steps:
                told = "  ".join(f"{name} {value:.3f}" for name, value in mean.items())
                print(
                    f"step {step}/{steps}  {told}  {step * batch_size / (time.monotonic() - start):.1f} images/s",
                    flush=True,
                )


def main(argv: Sequence[str] | None = None) -> None:
    """Pretrain the tiny base and save it with its processor."""
    parser = argparse.ArgumentParser(prog="python -m llava.train.tiny", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the base")
    parser.add_argument(
        "--texts", type=Path, help="captions for wording, JSON Lines with a 'captions' list, may be .gz"
    )
    parser.add_argument("--images", type=int, default=10000, help="single images (default %(default)s)")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(argv)

    start = time.monotonic()
    views = make_views(args.images, seed=args.seed + 1000, workers=args.workers)
    print(f"{len(views)} images in {time.monotonic() - start:.0f} s", flush=True)
    texts = read_texts(args.texts)
    sentences = [pair_caption for pair in _sentences() for pair_caption in pair]
    tokenizer = train_tokenizer([c for v in views for c in v.captions] + sentences * 20 + texts, VOCABULARY)
    add_image_token(tokenizer)
    config = tiny_config(tokenizer, fusion=None)
    processor = ChangeVLMProcessor.for_config(config, tokenizer)
    trainer = BaseTrainer(views, texts, processor, args.seed)
    trainer.fit(args.steps, args.batch_size, args.learning_rate)
    trainer.model.bfloat16().save_pretrained(args.out)
    processor.save_pretrained(args.out)


def _sentences() -> Iterator[tuple[str, ...]]:
    """Change captions of the synthetic world, for the tokenizer's words only."""
    from llava.data.conversation import PAIR_INTRODUCTION, QUESTION

    yield (
        PAIR_INTRODUCTION + QUESTION,
        DESCRIBE,
        "system\nYou are a helpful assistant.",
        "user\n",
        "assistant\n",
    )
    for pair in World(seed=2000, split="train", size=64).pairs(0, 1000):
        yield pair.captions


if __name__ == "__main__":
    main()

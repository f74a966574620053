"""Records to samples: a pair's pixels, its prompt, and the captions that branch off behind it."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from llava.data.conversation import IGNORE, QUESTION, LabelRule, pair_conversation
from llava.data.images import load_image, load_pair
from llava.data.record import Record
from llava.errors import DataError
from llava.model.processing import ChangeVLMProcessor

CaptionChoice = Literal["all", "random"]


@dataclass(frozen=True)
class Sample:
    """One pair, ready to be batched."""

    uid: str
    pixel_values: Tensor
    """[I, C, S, S], before then after; I is 0 for text alone."""
    prompt: list[int]
    """Ids up to where the answer starts, image placeholders expanded; its labels are `prompt_labels`."""
    prompt_labels: list[int]
    answers: list[tuple[list[int], list[int]]]
    """(ids, labels) of each caption: alternatives to one another, not a sequence."""
    changed_share: Tensor | None = None
    """[N], how much of each patch's place changed, 0..1, where the record has a mask."""


def split_answer(
    ids: Sequence[int], labels: Sequence[int], prompt_length: int
) -> tuple[list[int], list[int]]:
    """Ids and labels behind the prompt."""
    return list(ids[prompt_length:]), list(labels[prompt_length:])


class CaptionDataset(Dataset[Sample]):
    """Pairs with captions.

    Args:
        records: every one needs at least one caption.
        root: folder that the records' paths are relative to.
        processor: of the model to be trained.
        captions: "all" gives every caption of a pair as one sample's branches; "random" one, drawn anew each epoch.
        question: what is asked of the pair.
        labels: see `llava.data.conversation.labels_from_spans`.
        masks: also read the records' change masks, where they have one.
        cache: keep decoded pixels (8 bit) in memory: 2 * 3 * S * S bytes a pair.
        seed: of the drawn captions, together with the epoch and the uid.

    Raises:
        DataError: a record without captions; on access, a broken image (named).
    """

    def __init__(
        self,
        records: Sequence[Record],
        root: str | Path,
        processor: ChangeVLMProcessor,
        *,
        captions: CaptionChoice = "all",
        question: str = QUESTION,
        labels: LabelRule = "answer",
        masks: bool = False,
        cache: bool = False,
        seed: int = 0,
    ) -> None:
        bare = [record.uid for record in records if not record.change_caption]
        if bare:
            raise DataError(f"{len(bare)} records have no caption to learn from, the first is {bare[0]!r}")
        self.records, self.root, self.processor = list(records), Path(root), processor
        self.captions, self.question, self.labels, self.seed = captions, question, labels, seed
        self.epoch = 0
        self.masks = masks
        self._shares: dict[int, Tensor] = {}
        self._views: dict[int, list[Image.Image]] | None = {} if cache else None
        prompt = processor.encode(pair_conversation(question, answer=""), labels=labels)
        bare_prompt = processor.tokenizer(processor.prompt(pair_conversation(question)))["input_ids"]
        expanded, expanded_labels = [], []
        for token, label in zip(bare_prompt, prompt["labels"][: len(bare_prompt)], strict=True):
            count = processor.image_seq_length if token == processor.image_token_id else 1
            expanded += [token] * count
            expanded_labels += [label if count == 1 else IGNORE] * count
        self._bare_length, self._prompt, self._prompt_labels = len(bare_prompt), expanded, expanded_labels
        self._answers: dict[str, tuple[list[int], list[int]]] = {}

    def set_epoch(self, epoch: int) -> None:
        """Draw other captions from now on (only with `captions="random"`)."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.records)

    def answer(self, caption: str) -> tuple[list[int], list[int]]:
        """Ids and labels of one caption behind the prompt; tokenised once."""
        if caption not in self._answers:
            coded = self.processor.encode(
                pair_conversation(self.question, answer=caption), labels=self.labels
            )
            self._answers[caption] = split_answer(coded["input_ids"], coded["labels"], self._bare_length)
        return self._answers[caption]

    def pixels(self, index: int) -> Tensor:
        """[2, C, S, S] of one pair."""
        prepare = self.processor.image_processor
        if self._views is None:
            return prepare.normalise(self._fitted(index))
        if index not in self._views:
            self._views[index] = self._fitted(index)
        return prepare.normalise(self._views[index])

    def changed_share(self, index: int) -> Tensor | None:
        """[N] for records with a mask, see `Sample`."""
        path = self.records[index].mask_path
        if path is None or not self.masks:
            return None
        if index not in self._shares:
            mask = torch.from_numpy(np.array(load_image(self.root / path).convert("L")) > 0)  # [H, W]
            grid = math.isqrt(self.processor.image_seq_length)
            self._shares[index] = F.adaptive_avg_pool2d(mask[None].float(), grid).flatten()
        return self._shares[index]

    def _fitted(self, index: int) -> list[Image.Image]:
        return [
            self.processor.image_processor.fit(image)
            for image in load_pair(*self.records[index].paths(self.root))
        ]

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        captions: Sequence[str] = record.change_caption
        if self.captions == "random":
            captions = [random.Random(f"{self.seed}/{self.epoch}/{record.uid}").choice(list(captions))]
        return Sample(
            record.uid,
            self.pixels(index),
            self._prompt,
            self._prompt_labels,
            [self.answer(c) for c in captions],
            self.changed_share(index),
        )


def text_sample(uid: str, processor: ChangeVLMProcessor, text: str) -> Sample:
    """A caption alone, without images or question: wording for a language model to pick up."""
    start = processor.tokenizer("<|im_start|>assistant\n")["input_ids"]
    ids = processor.tokenizer(text + "<|im_end|>")["input_ids"]
    return Sample(uid, torch.empty(0), start, [IGNORE] * len(start), [(ids, ids)])

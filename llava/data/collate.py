"""Samples to a batch: one pass per pair, its captions as branches behind one shared prefix.

A sample with K answers becomes one row: the prompt without its last token, then K branches, each the prompt's last
token again followed by one answer. A branch sees the prefix and itself only (`llava.model.branches`), and its
positions continue the prefix's. So every answer's first word is predicted from the prompt's last token within its own
branch, and loss and gradients equal those of K separate rows, while the image tokens are computed once.
A sample of a DeltaVLM has such a text for each of its questions, and the tower sees its pair once for all of them.
Those texts differ much in length, so short ones share a row, where none sees another.

Legend: B rows, T positions, I images of a sample, C channels, S side in pixels, N tokens of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llava.data.conversation import IGNORE
from llava.data.dataset import Sample
from llava.data.encode import Row
from llava.model.branches import TEXT


class _Line(NamedTuple):
    """A text with its answers as a row of the batch, [T] each."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    segments: NDArray[np.int64]
    weights: NDArray[np.float64]


@dataclass(frozen=True)
class BranchCollator:
    """Batches `Sample`s; rows are padded on the right.

    Samples that teach nothing (skipped ones, and fillers of the last batches) are left out. Where no other is there,
    one of them stays, so that no rank comes without a batch.

    Args:
        pad_token_id: what fills short rows.
        pad_to_multiple_of: T becomes a multiple of this.
        reading_pad: what fills short texts of a Q-Former.
        packed: let short texts of a DeltaVLM share a row; not for an attention that cannot keep them apart.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1
    reading_pad: int = 0
    packed: bool = True

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Samples to tensors, and what is said of them.

        Returns:
            `input_ids`, `labels`, `position_ids` [B, T]; `segments` [B, T]: 0 the prefix, 1..K the branches, -1
            padding; `label_weights` [B, T] float32, where a label counts other than once: one of the prefix counts
            for every branch. With images `pixel_values` [B, I, C, S, S], and `image_counts` [B] where numbers of
            images differ; `changed_share` [P, N, C] and `object_middles` [P, N, K] of the P samples with images, where
            one of these has them, and `mask_known` [P] where not all do. For a Q-Former `qformer_input_ids` and
            `qformer_attention_mask` [Q, t], and `pair_index` [Q] where its Q questions are not of one pair each: in the
            order in which the rows hold them, Q = B where none shares one.
            `uids`: of the records learned from; `skipped`: what could not be read, as in `Sample`.
        """
        taught = [sample for sample in samples if sample.answers]
        kept = taught or samples[:1]
        texts = [(pair, text) for pair, sample in enumerate(kept) for text in sample.rows]
        rows = [_line(text) for _, text in texts]
        step = self.pad_to_multiple_of
        length = -(-max(len(row.ids) for row in rows) // step) * step
        if self.packed and any(text.reading for _, text in texts):
            places = _shared([len(row.ids) for row in rows], length)
            texts = [texts[i] for together in places for i in together]
            rows = [_joined([rows[i] for i in together]) for together in places]
        fills = (self.pad_token_id, IGNORE, 0, -1, 0.0)
        ids, labels, positions, segments, weights = (
            _padded(parts, fill, length) for parts, fill in zip(zip(*rows, strict=True), fills, strict=True)
        )
        batch: dict[str, Any] = {
            "input_ids": ids,
            "labels": labels,
            "position_ids": positions,
            "segments": segments,
        }
        if bool((weights != (labels != IGNORE)).any()):
            batch["label_weights"] = weights
        for name in ("changed_share", "object_middles"):
            values = [getattr(sample, name) for sample in kept if sample.pixel_values.numel()]
            known = [value is not None for value in values]
            if any(known):
                like = next(value for value in values if value is not None)
                batch[name] = torch.stack([torch.zeros_like(like) if v is None else v for v in values])
                if not all(known):
                    batch["mask_known"] = torch.tensor(known)
        pairs = [pair for pair, _ in texts]
        if pairs != list(range(len(kept))):
            batch["pair_index"] = torch.tensor(pairs)
        readings = [np.asarray(text.reading, np.int64) for _, text in texts]
        if any(map(len, readings)):
            most = max(map(len, readings))
            batch["qformer_input_ids"] = _padded(readings, self.reading_pad, most)
            batch["qformer_attention_mask"] = _padded([np.ones_like(ids) for ids in readings], 0, most)
        batch |= _images([sample.pixel_values for sample in kept])
        batch["uids"] = [uid for sample in taught for uid in (sample.uid, *sample.also)]
        batch["skipped"] = [row for sample in samples for row in sample.skipped]
        return batch


def _line(text: Row) -> _Line:
    prompt, told = np.asarray(text.prompt), np.asarray(text.prompt_labels)
    if not text.answers:
        nothing = np.zeros_like(prompt)
        return _Line(prompt, nothing + IGNORE, np.arange(len(prompt)), nothing, nothing.astype(float))
    shared, last = len(prompt) - 1, prompt[-1:]
    branches = [np.concatenate([last, ids]) for ids, _ in text.answers]
    sizes = [shared, *map(len, branches)]
    # the first branch carries the label of the prompt's last token, if it has one: for the others it is predicted
    # from no place of theirs
    heads = [told[-1:], *[np.array([IGNORE])] * (len(branches) - 1)]
    ends = (part for head, (_, labels) in zip(heads, text.answers, strict=True) for part in (head, labels))
    labels = np.concatenate([told[:-1], *ends])
    labels[0] = IGNORE  # nothing foretells it
    each = np.array(text.weights or [1.0] * len(branches))
    weights = (labels != IGNORE) * np.array([each.sum(), *each]).repeat(sizes)
    weights[shared] *= each.sum() / each[0]  # foretold from no place of the other branches, for all of them
    return _Line(
        np.concatenate([prompt[:-1], *branches]),
        labels,
        np.concatenate([np.arange(shared), *(shared + np.arange(size) for size in sizes[1:])]),
        np.arange(len(sizes)).repeat(sizes),
        weights,
    )


def _shared(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which texts share a row of `length`: each, the longest first, goes where it first fits; rows in the order of the
    first text in them."""
    room: list[int] = []
    rows: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((row for row, left in enumerate(room) if left >= sizes[i]), len(rows))
        if row == len(rows):
            room.append(length)
            rows.append([])
        room[row] -= sizes[i]
        rows[row].append(i)
    return sorted(map(sorted, rows))


def _joined(lines: Sequence[_Line]) -> _Line:
    """Texts one behind the other; the first label of each is nothing that the one before it foretells."""
    raised = [line._replace(segments=line.segments + number * TEXT) for number, line in enumerate(lines)]
    return _Line(*map(np.concatenate, zip(*raised, strict=True)))


def _padded(rows: Sequence[NDArray[Any]], fill: float, length: int) -> Tensor:
    """[B, T] of rows of different lengths; int64, or float32 where `fill` is a float."""
    out = np.full((len(rows), length), fill, np.float32 if isinstance(fill, float) else np.int64)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(out)


def _images(images: Sequence[Tensor]) -> dict[str, Tensor]:
    """`pixel_values` and `image_counts` of [I, C, S, S] each, see `BranchCollator`."""
    counts = [len(image) for image in images]
    if len(set(counts)) == 1:
        return {"pixel_values": torch.stack(list(images))} if counts[0] else {}
    shape = next(image.shape[1:] for image in images if len(image))  # [C, S, S]
    out = next(image for image in images if len(image)).new_zeros(len(images), max(counts), *shape)
    for row, image, count in zip(out, images, counts, strict=True):
        if count:
            row[:count] = image
    return {"pixel_values": out, "image_counts": torch.tensor(counts)}

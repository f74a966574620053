"""Samples to a batch: one pass per pair, its captions as branches behind one shared prefix.

A sample with K answers becomes one row: the prompt without its last token, then K branches, each the prompt's last
token again followed by one answer. A branch sees the prefix and itself only, and its positions continue the prefix's.
So every answer's first word is predicted from the prompt's last token within its own branch, and loss and gradients
equal those of K separate rows, while the image tokens are computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.data.conversation import IGNORE
from llava.data.dataset import Sample


def branch_mask(segments: Tensor) -> Tensor:
    """Which position may attend which: [B, T] segments to [B, 1, T, T] bool.

    Segment 0 is the shared prefix, 1..K the branches, -1 padding. Padding attends itself, so that no row is empty.
    """
    positions = torch.arange(segments.shape[1], device=segments.device)
    causal = positions[:, None] >= positions[None]  # [T, T]
    query, key = segments[:, :, None], segments[:, None, :]
    return (causal & ((key == 0) | (key == query)))[:, None]


@dataclass(frozen=True)
class BranchCollator:
    """Batches `Sample`s; rows are padded on the right.

    Args:
        pad_token_id: what fills short rows.
    """

    pad_token_id: int

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Samples to `input_ids`, `labels`, `position_ids` [B, T], `attention_mask` [B, 1, T, T], `pixel_values`."""
        rows = [self._row(sample) for sample in samples]
        length = max(len(row[0]) for row in rows)
        fills = (self.pad_token_id, IGNORE, 0, -1)
        ids, labels, positions, segments = (
            torch.tensor([row[i] + [fill] * (length - len(row[i])) for row in rows])
            for i, fill in enumerate(fills)
        )
        mask = branch_mask(segments)
        batch = {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": mask}
        shares = [sample.changed_share for sample in samples]
        if all(share is not None for share in shares):
            batch["changed_share"] = torch.stack([share for share in shares if share is not None])  # [B, N]
        counts = [len(sample.pixel_values) for sample in samples]
        if any(counts):
            batch["pixel_values"] = torch.nn.utils.rnn.pad_sequence(
                [
                    s.pixel_values if c else s.pixel_values.new_zeros(1, *_shape(samples))
                    for s, c in zip(samples, counts, strict=True)
                ],
                batch_first=True,
            )
            if len(set(counts)) > 1:
                batch["image_counts"] = torch.tensor(counts)
        return batch

    def _row(self, sample: Sample) -> tuple[list[int], list[int], list[int], list[int]]:
        """ids, labels, positions and segments of one sample."""
        shared = len(sample.prompt) - 1
        ids, labels = sample.prompt[:shared], sample.prompt_labels[:shared]
        positions, segments = list(range(shared)), [0] * shared
        for k, (answer, answer_labels) in enumerate(sample.answers, start=1):
            branch = [sample.prompt[-1], *answer]
            ids = [*ids, *branch]
            # the first branch carries the label of the prompt's last token, if it has one, so that it counts once
            labels = [*labels, sample.prompt_labels[-1] if k == 1 else IGNORE, *answer_labels]
            positions += range(shared, shared + len(branch))
            segments += [k] * len(branch)
        return ids, labels, positions, segments


def _shape(samples: Sequence[Sample]) -> tuple[int, ...]:
    """[C, S, S] of the batch's images."""
    return next(tuple(s.pixel_values.shape[1:]) for s in samples if len(s.pixel_values))

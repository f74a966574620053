"""Activations of a DeltaVLM in training, as `llava.train.memory` counts them for a ChangeVLM.

Kept are those of the tower's last blocks, of the fusion and of the Q-Former, whose attention keeps its maps of scores;
of a language model at rest what its own gradient passes through.

Shapes: B rows, K queries, t tokens of the Q-Former's text, M = 2 (1 + N) tokens of a pair, D tower width, Q Q-Former
width.
"""

from dataclasses import replace
from typing import Any

from llava.model.delta_vlm.configuration import DeltaVLMConfig
from llava.model.fusion import TOKENWISE
from llava.train.delta_flops import READING, tuned_blocks
from llava.train.flops import Layers
from llava.train.memory import (
    Activations,
    Learning,
    Precision,
    Step,
    difference_bytes,
    layer_bytes,
    tokenwise_bytes,
)


class DeltaStep(Step):
    """One batch of a DeltaVLM on one device."""

    def __init__(self, config: Any, *args: Any, half_llm: bool = False) -> None:
        super().__init__(config, *args)
        self.delta: DeltaVLMConfig = config
        self.text_precision = Precision(2, 2, False) if half_llm else self.precision

    def parts(
        self, images: int, pairs: int, positions: int, rows: int, attention: str, branches: bool
    ) -> dict[str, Activations]:
        """Of each part that a gradient passes; `pairs` are rows of text here."""
        config, precision = self.delta, self.precision
        patches, dim = config.grid**2, self.tower.width
        found = {}
        if "tower" in self.passed:
            # in eval mode, in which transformers does not checkpoint
            layers = replace(self.tower, count=tuned_blocks(config, self.learn))
            tokens = images * (1 + patches)
            each = tokens * layer_bytes(layers, precision, self._learning("tower"), keys=layers.mixed)
            found["tower"] = Activations(layers.count * each + tokens * 4 * dim)
        if "fusion" in self.passed:
            kind = config.fusion["kind"]
            sizes = (precision, "fusion" in self.learn, dim, 1, config.fusion)
            read = images // 2 * (patches + (kind in TOKENWISE))
            if kind in TOKENWISE:
                found["fusion"] = Activations(read * tokenwise_bytes(*sizes))
            else:
                found["fusion"] = Activations(read * difference_bytes(*sizes)[0])
        if "qformer" in self.passed:
            found["qformer"] = self._qformer(pairs)
        if "projector" in self.passed:
            kept = config.num_query_tokens * config.qformer_config.hidden_size * precision.product
            found["projector"] = Activations(pairs * kept if "projector" in self.learn else 0.0)
        self.precision = self.text_precision
        found |= self.language(pairs, positions, rows, attention, branches)
        self.precision = precision
        return found

    def _qformer(self, rows: int) -> Activations:
        """Of its layers, every other one with cross-attention, and the pair's tokens that all of these read."""
        config, former, precision = self.delta, self.delta.qformer_config, self.precision
        width, heads, a = former.hidden_size, former.num_attention_heads, precision.product
        own, seen = config.num_query_tokens + READING, 2 * (1 + config.grid**2)
        layers = Layers(
            count=1, width=width, matrices=0, last=0, sides=0, heads=heads, mixed=width, keys=width,
            mlp=former.intermediate_size, gated=False, norms=2, rms=False, head_norms=False, activation="gelu",
        )  # fmt: skip
        learning = Learning("qformer" in self.learn)
        each = own * layer_bytes(layers, precision, learning, keys=width, length=own, eager=True)
        thinned = 1 if former.hidden_dropout_prob > 0 else 0
        scores = a + 1 if former.attention_probs_dropout_prob > 0 else 0
        each += own * (thinned * 2 * width * (a + 1) + heads * own * scores)
        crossing = -(-former.num_hidden_layers // former.cross_attention_frequency)
        queries = config.num_query_tokens
        features = seen * self.tower.width * a
        cross = 2 * seen * width * a + queries * heads * seen * (4 + scores + (a if a < 4 else 0))
        cross += queries * width * (4 * a + 2 * precision.stream)
        if learning.weights:
            cross += features * (2 if precision.cast else 0)
        if not self.checkpointing:
            return Activations(rows * (former.num_hidden_layers * each + crossing * cross + features))
        stream = former.num_hidden_layers * own * width * precision.stream
        return Activations(rows * (stream + features), rows * (each + cross))

    def casts(self) -> float:
        if not self.precision.cast:
            return 0.0
        count = sum(
            p.numel()
            for part in ("fusion", "qformer", "projector")
            if part in self.passed
            for p in getattr(self.model, part).parameters()
            if p.dim() > 1
        )
        if "tower" in self.passed:
            count += tuned_blocks(self.delta, self.learn) * self.tower.matrices
        if self.text_precision.cast:
            count += self.llm.count * self.llm.matrices
        return 2.0 * count

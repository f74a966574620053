"""What a training step of a DeltaVLM computes, as `llava.train.flops` counts it for a ChangeVLM.

Only the last blocks of its tower learn, and nothing is computed backwards through the others. The Q-Former works a row
at a time: on its queries and the question, and through cross-attention on all tokens of both images.

Shapes: B rows, K queries, t tokens of the Q-Former's text, M = 2 (1 + N) tokens of a pair, D tower width, Q Q-Former
width.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from llava.model.delta_vlm.configuration import DeltaVLMConfig
from llava.model.fusion import TOKENWISE
from llava.registry import pick
from llava.train.flops import (
    FUSION_WORK,
    Layers,
    StepFlops,
    Work,
    layers_work,
    learning_parts,
    needing_gradients,
    on_meta,
    read_layers,
)

STEM = "stem"
"""The tower's frozen blocks, in front of all that learns."""
READING = 32
"""Tokens that a question has in the Q-Former, where nobody says."""


def tuned_blocks(config: DeltaVLMConfig, learn: Iterable[str]) -> int:
    """Blocks of the tower that learn."""
    return config.tune_vision_blocks if "tower" in set(learn) else 0


def qformer_work(config: DeltaVLMConfig, rows: int, text: int) -> Work:
    """Of `rows` questions of `text` tokens each."""
    former, dim = config.qformer_config, config.vision_config.hidden_size
    width, queries = former.hidden_size, config.num_query_tokens
    layers = former.num_hidden_layers
    crossing = -(-layers // former.cross_attention_frequency)
    seen = 2 * (1 + config.grid**2)
    own = queries + text
    maps = layers * own * (4 * width**2 + 2 * width * former.intermediate_size)
    keys = crossing * seen * 2 * width * dim
    maps += crossing * queries * 2 * width**2 + keys
    mixing = 4.0 * rows * width * (layers * own**2 + crossing * queries * seen)
    return Work(2.0 * rows * maps, mixing, mixing, entry=2.0 * rows * keys, again=2.0 * rows * maps)


class DeltaFlops(StepFlops):
    """`StepFlops` of a DeltaVLM.

    Args:
        config, checkpointing, attention: as there.
        learn: parts that learn, as far as the config lets them.

    Raises:
        ConfigError: an unknown part or kind of fusion.
    """

    def __init__(
        self,
        config: DeltaVLMConfig,
        learn: Iterable[str] = (),
        *,
        checkpointing: bool = False,
        attention: str = "sdpa",
    ) -> None:
        model = on_meta(config).model
        self.delta, self.checkpointing, self.attention = config, checkpointing, attention
        self.rank, self.adapted = 0, frozenset()
        self.learn = learning_parts(learn, model.fusion, qformer=True)
        self.passed = needing_gradients(self.learn)
        self.tower: Layers = read_layers(model.vision_tower.encoder, config.vision_config)
        self.llm: Layers = read_layers(model.language_model, config.text_config)
        self.fusion = pick(FUSION_WORK, config.fusion["kind"], what="fusion whose work is known")

    def work(
        self,
        *,
        images: int,
        positions: int,
        rows: int = 0,
        batch: int = 1,
        attended: float | None = None,
        asked: int | None = None,
        reading: int = READING,
    ) -> Iterator[tuple[str, Work]]:
        """The parts of one forward pass; arguments as for `StepFlops.of`.

        Args:
            asked: questions, of `reading` tokens each in the Q-Former; absent: one a row.
        """
        config, dim, hidden = self.delta, self.tower.width, self.llm.width
        vision, patches = config.vision_config, config.grid**2
        tokens, seen = images * (1 + patches), float(images * (1 + patches) ** 2)
        tuned = tuned_blocks(config, self.learn)
        for part, count in ((STEM, self.tower.count - tuned), ("tower", tuned)):
            # the tower stays in eval mode, in which transformers does not checkpoint
            work = layers_work(self.tower, tokens, seen, seen)
            share = count / max(1, self.tower.count)
            pixels = vision.patch_size**2 * 3
            embedding = 2.0 * images * patches * pixels * dim if part == STEM else 0.0
            yield part, Work(work.linear * share + embedding, work.mixing * share, work.mixed * share)
        read = patches + (config.fusion["kind"] in TOKENWISE)
        yield "fusion", self.fusion(images // 2, 1, read, dim, config.fusion)
        if asked is None:
            asked = batch if positions else 0
        yield "qformer", qformer_work(config, asked, reading)
        found = 2.0 * asked * config.num_query_tokens * config.qformer_config.hidden_size * hidden
        yield "projector", Work(found, entry=found)
        causal = batch * positions * (positions + 1) / 2
        allowed = causal if attended is None else attended
        computed = batch * positions**2 if self.attention in ("sdpa", "eager") else allowed
        yield "llm", layers_work(self.llm, batch * positions, allowed, computed)
        head = 2.0 * rows * hidden * int(config.text_config.vocab_size)
        yield "head", Work(head, again=head)

    def forward(self, **sizes: Any) -> dict[str, float]:
        return _whole(super().forward(**sizes))

    def of(self, **sizes: Any) -> dict[str, float]:
        return _whole(super().of(**sizes))

    def hardware(self, **sizes: Any) -> dict[str, float]:
        return _whole(super().hardware(**sizes))


def _whole(found: dict[str, float]) -> dict[str, float]:
    """With the frozen blocks as part of the tower."""
    stem = found.pop(STEM)
    return found | {"tower": found["tower"] + stem}

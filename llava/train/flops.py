"""What a training step computes, by part, from a config alone: for the share of a device that is used (MFU).

Counted are matrix products, two operations a multiply-add: linear maps, the patch embedding, attention's two products.
Left out is what costs a few operations a feature instead of thousands: norms, softmax, activations, sums, embedding
rows, position codes, and the optimizer.

Shapes: B rows of text, T positions of a row, M images, N patches of an image, D tower width, H language model width,
V vocabulary, L tower levels.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from llava.errors import ConfigError
from llava.model.configuration import ChangeVLMConfig
from llava.registry import pick

if TYPE_CHECKING:
    from llava.train.adapters import AdapterConfig

WAY = ("tower", "fusion", "qformer", "projector", "llm", "head")
"""Parts in the order that a pair passes them. The head learns with `llm`; a ChangeVLM has no `qformer`."""


# --- what a model is made of ------------------------------------------------------------------------


@dataclass(frozen=True)
class Layers:
    """Equal transformer layers, one behind another, as far as they cost work or memory."""

    count: int
    width: int
    """Features of the stream between them."""
    matrices: int
    """Weights of all linear maps of one layer."""
    last: int
    """Weights of its last linear map."""
    sides: int
    """Inputs and outputs of its linear maps together: a low-rank update has rank times so many weights."""
    heads: int
    mixed: int
    """Features of all heads together."""
    keys: int
    """Features of all key heads: fewer where several query heads share one."""
    mlp: int
    """Hidden width of the MLP."""
    gated: bool
    """Whether a second map of the input scales what the MLP's activation gives."""
    norms: int
    """Norms of the stream."""
    rms: bool
    """Whether they are RMS norms, which transformers computes in float32."""
    head_norms: bool
    """Whether queries and keys are normed too."""
    activation: str


def read_layers(part: nn.Module, config: Any) -> Layers:
    """The longest list of layers in a part, by its linear maps and the heads that its config names."""
    lists = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
    layers = max(lists, key=len, default=nn.ModuleList())
    width, heads = int(config.hidden_size), int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or width // heads)
    keys = size * int(getattr(config, "num_key_value_heads", None) or heads)
    modules = list(layers[0].modules()) if len(layers) else []
    maps = [module for module in modules if isinstance(module, nn.Linear)]
    matrices = sum(module.weight.numel() for module in maps)
    mlp = maps[-1].in_features if maps else 0
    outside = matrices - width * (2 * size * heads + 2 * keys)  # of attention: the MLP's
    every_norm = [module for module in modules if "Norm" in type(module).__name__]
    norms = [module for module in every_norm if module.weight.shape == (width,)]
    return Layers(
        count=len(layers),
        width=width,
        matrices=matrices,
        last=maps[-1].weight.numel() if maps else 0,
        sides=sum(module.in_features + module.out_features for module in maps),
        heads=heads,
        mixed=size * heads,
        keys=keys,
        mlp=mlp,
        gated=2 * outside > 5 * width * mlp,  # three maps of D x mlp, not two
        norms=len(norms),
        rms=any("RMS" in type(m).__name__ for m in norms),
        head_norms=len(norms) < len(every_norm),
        activation=str(getattr(config, "hidden_act", "")),
    )


def tower_tokens(tower: nn.Module, config: ChangeVLMConfig) -> int:
    """Patches of one image, and the class and register tokens that the tower reads beside them."""
    extra = 0
    for name, parameter in tower.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf in ("cls_token", "class_embedding"):
            extra += 1
        elif leaf == "register_tokens":
            extra += parameter.shape[1]
    return config.image_seq_length + extra


def on_meta(config: PreTrainedConfig) -> Any:
    """The model without its values: shapes and names, no memory."""
    from llava.family import family_of
    from llava.model.checkpoint import unsharded

    with unsharded(), torch.device("meta"):
        return family_of(config).model(config)


def learning_parts(learn: Iterable[str], fusion: nn.Module | None, qformer: bool = False) -> frozenset[str]:
    """`learn` as a set: `head` with `llm`, and without `fusion` where that has no weights; of a model with a
    `qformer`, or without one.

    Raises:
        ConfigError: a part that is none.
    """
    parts = frozenset(learn)
    known = [part for part in WAY[:-1] if part != "qformer" or qformer]
    if unknown := sorted(parts - {*known, "head"}):
        raise ConfigError(f"learn: unknown parts {unknown}; known: {', '.join(known)}")
    if fusion is None or not any(True for _ in fusion.parameters()):
        parts -= {"fusion"}
    return parts | {"head"} if "llm" in parts else parts - {"head"}


def needing_gradients(learn: Collection[str]) -> frozenset[str]:
    """Parts that a gradient passes: those that learn, and those between them and the loss."""
    first = min((WAY.index(part) for part in learn), default=len(WAY))
    return frozenset(WAY[first:])


def attended(prefix: int, branches: Sequence[int] = ()) -> int:
    """Pairs of a query and a key it may see, in one row of a prefix and answers that branch off it.

    Each position sees itself and what is before it, of the prefix and of its own branch (`llava.model.branches`).
    """
    own = sum(length * (length + 1) // 2 for length in (prefix, *branches))
    return own + prefix * sum(branches)


# --- the work of one forward pass ---------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """FLOPs of a part in one forward pass."""

    linear: float
    """Products with weights."""
    mixing: float = 0.0
    """Attention's two products, of pairs that may see each other."""
    mixed: float = 0.0
    """The same as it is really computed: with masked pairs, where a kernel does not skip them."""
    entry: float = 0.0
    """Of `linear`: maps of the part's own input, which needs no gradient where nothing before learns."""
    again: float = 0.0
    """Of `linear`: what checkpointing computes again."""
    low_rank: float = 0.0
    """Products of low-rank updates."""


def layers_work(layers: Layers, tokens: int, pairs: float, computed: float, rank: int = 0) -> Work:
    """Of `tokens` tokens, of which `pairs` pairs (of `computed` tried) see each other.

    q, k, v, out and the MLP: their weights, each once a token. Attention: Q K^T and the mix of V, `mixed` each a pair.
    Checkpointing stops before a layer's last map, whose result nobody kept, unless an update beside it did.
    """
    linear = 2 * layers.count * tokens * layers.matrices
    return Work(
        linear=linear,
        mixing=4 * layers.count * pairs * layers.mixed,
        mixed=4 * layers.count * computed * layers.mixed,
        again=linear if rank else linear - 2 * layers.count * tokens * layers.last,
        low_rank=2 * layers.count * tokens * rank * layers.sides,
    )


def difference_work(pairs: int, levels: int, tokens: int, dim: int, settings: dict[str, Any]) -> Work:
    """Of `llava.model.fusion.difference` on `pairs` pairs of `levels` levels of `tokens` tokens of width D.

    Multiply-adds a token, level and block, in D^2: the gate 4 and the hint 2 (W_p's three blocks as two), Attn1 4,
    Attn2 1 + 3 + 3 + 1, Attn3 2 + 3 + 3 + 2 with the change's keys and values made once for both dates; the MLP 2 D m,
    8 D^2 at the release's size. 36 D^2 in all, where the published form has 39. Both have 16 N D of attention, over N
    keys (Attn1), 3 N (Attn2) and twice 2 N (Attn3). The level gate, 3 D^2 a level of a pair, is next to nothing.

    Of it, what reads the two dates alone: the gate, and A's and B's values in Attn2 and Attn3, of the first block.
    """
    rows = pairs * levels * tokens
    depth, mlp = int(settings.get("depth", 2)), int(settings.get("mlp_dim", 4608))
    block = 28 * dim**2 + 2 * dim * mlp
    mixing = 2 * rows * depth * 16 * tokens * dim
    return Work(
        linear=2 * (rows * depth * block + pairs * levels * (3 * dim**2 + dim)),
        mixing=mixing,
        mixed=mixing,
        entry=2 * rows * 8 * dim**2,
        # the extractor is not checkpointed; the last map's result, `out_proj` of the after image, nobody kept
        again=2 * rows * depth * (block - 6 * dim**2 - dim**2),
    )


def tokenwise_work(maps: int, of_input: int) -> Callable[..., Work]:
    """Of a fusion that reads each token of the last level by itself, in `maps` D^2 for both dates together.

    Args:
        of_input: those of them that read the dates or their difference alone.
    """

    def work(pairs: int, levels: int, tokens: int, dim: int, settings: dict[str, Any]) -> Work:
        return Work(2.0 * pairs * tokens * maps * dim**2, entry=2.0 * pairs * tokens * of_input * dim**2)

    return work


FUSION_WORK: dict[str, Callable[..., Work]] = {
    "difference": difference_work,
    "csrm": tokenwise_work(2 + 2 * (1 + 1 + 3), 6),  # two maps of the change; of each date two, and W_o
    "csrm_paper": tokenwise_work(2 * (2 + 2), 8),
    "concat": tokenwise_work(0, 0),
}
"""By the kind of fusion."""


class StepFlops:
    """FLOPs of forward passes and training steps of a model, by part.

    Backward costs as much as forward for the gradients of a map's input, and as much again for those of its weights:
    twice where a part learns, once where it is frozen and the loss reaches a learning part only through it, nothing
    where neither it nor anything before it learns. Attention, which has no weights, costs twice wherever a gradient
    passes. What belongs to nobody's gradient, such as that of the pixels, is not counted.

    Args:
        config: of any tower and language model made of equal layers of linear maps and attention; of a mixture of
            experts, the experts are not seen.
        learn: parts that learn in full; none for inference.
        checkpointing: whether the layers of tower, fusion and language model are computed again in backward.
        adapter: low-rank updates; its `parts` learn through them and its `full` parts in full, whatever `learn` says.
            The weights' norms that DoRA computes are not counted.
        attention: of the language model. "sdpa" and "eager" compute masked pairs too, the others skip them.

    Raises:
        ConfigError: an unknown part or kind of fusion.
    """

    def __init__(
        self,
        config: ChangeVLMConfig,
        learn: Iterable[str] = (),
        *,
        checkpointing: bool = False,
        adapter: "AdapterConfig | None" = None,
        attention: str = "sdpa",
    ) -> None:
        model = on_meta(config).model
        self.config, self.checkpointing, self.attention = config, checkpointing, attention
        self.rank = adapter.rank if adapter is not None else 0
        self.adapted = frozenset(adapter.parts) if adapter is not None else frozenset()
        self.learn = learning_parts(learn if adapter is None else adapter.full, model.fusion)
        self.passed = needing_gradients(self.learn | self.adapted)
        self.tower = read_layers(model.vision_tower.encoder, config.vision_config)
        self.llm = read_layers(model.language_model, config.text_config)
        self.tokens = tower_tokens(model.vision_tower, config)
        self.levels = len(model.vision_tower.layers)
        self.projector = [int(layer.weight.numel()) for layer in model.projector.layers]
        if config.fusion is not None:
            self.fusion = pick(FUSION_WORK, config.fusion["kind"], what="fusion whose work is known")

    def work(
        self, *, images: int, positions: int, rows: int = 0, batch: int = 1, attended: float | None = None
    ) -> Iterator[tuple[str, Work]]:
        """The parts of one forward pass, in their order; arguments as for `of`."""
        vision, patches = self.config.vision_config, self.config.image_seq_length
        dim, hidden = self.tower.width, self.llm.width
        seen = images * self.tokens**2
        tower = layers_work(self.tower, images * self.tokens, seen, seen, self._rank_of("tower"))
        pixels = vision.patch_size**2 * (getattr(vision, "num_channels", None) or 3)
        embedding = 2 * images * patches * pixels * dim
        yield (
            "tower",
            Work(tower.linear + embedding, tower.mixing, tower.mixed, embedding, tower.again, tower.low_rank),
        )
        if self.config.fusion is not None:
            yield "fusion", self.fusion(images // 2, self.levels, patches, dim, self.config.fusion)
        maps = [2.0 * images * patches * matrix for matrix in self.projector]
        yield "projector", Work(sum(maps), entry=maps[0])
        causal = batch * positions * (positions + 1) / 2
        allowed = causal if attended is None else attended
        computed = batch * positions**2 if self.attention in ("sdpa", "eager") else allowed
        yield "llm", layers_work(self.llm, batch * positions, allowed, computed, self._rank_of("llm"))
        # in backward the logits are made again, chunk by chunk (`llava.model.loss`)
        head = 2.0 * rows * hidden * int(self.config.text_config.vocab_size)
        yield "head", Work(head, again=head)

    def _rank_of(self, part: str) -> int:
        return self.rank if part in self.adapted else 0

    def forward(self, **sizes: Any) -> dict[str, float]:
        """FLOPs of one forward pass by part; arguments as for `of`."""
        return {part: work.linear + work.mixing + work.low_rank for part, work in self.work(**sizes)}

    def of(
        self,
        *,
        images: int,
        positions: int,
        rows: int = 0,
        batch: int = 1,
        attended: float | None = None,
        **more: Any,
    ) -> dict[str, float]:
        """Model FLOPs of forward and backward by part: what the step needs, however it is computed. For MFU.

        Args:
            images: M, all images of the batch; two and two are pairs where there is a fusion.
            positions: T, of each row, padding included.
            rows: positions of the batch that foretell a label, the only ones that the head sees.
            batch: B.
            attended: pairs of positions that may see each other in the whole batch, see `attended`; by default those
                of plain causal text, B T (T + 1) / 2, a little more than of rows with branches.
            more: `reading`, tokens of a question in the Q-Former, of a DeltaVLM.
        """
        found = {}
        for part, work in self.work(
            images=images, positions=positions, rows=rows, batch=batch, attended=attended, **more
        ):
            forward = work.linear + work.mixing + work.low_rank
            found[part] = forward + self._backward(part, work) + self._twice(part, work.mixing)
        return found

    def hardware(self, **sizes: Any) -> dict[str, float]:
        """FLOPs that are really computed, by part; arguments as for `of`.

        Beside the model's own: masked pairs of attention where no kernel skips them (one for plain causal rows may skip
        half), attention's first product again in backward ("eager" keeps it instead), the head's logits again, and,
        with checkpointing, the layers again.
        """
        found = {}
        for part, work in self.work(**sizes):
            total = work.linear + work.mixed + work.low_rank
            total += self._backward(part, work) + self._twice(part, work.mixed)
            if part in self.passed:
                if self.attention != "eager" or part != "llm":
                    total += work.mixed / 2
                if self.checkpointing or part == "head":
                    total += work.again
                if self.checkpointing and work.again:
                    total += work.mixed + work.low_rank
            found[part] = total
        return found

    def _backward(self, part: str, work: Work) -> float:
        """Gradients of and through maps with weights."""
        if part not in self.passed:
            return 0.0
        total = work.linear * (2 if part in self.learn else 1) + 2 * work.low_rank
        before = WAY[: WAY.index(part)]
        return total if any(name in self.passed for name in before) else total - work.entry

    def _twice(self, part: str, mixing: float) -> float:
        """Gradients of both factors of attention's products."""
        return 2 * mixing if part in self.passed else 0.0


def step_flops(config: PreTrainedConfig, learn: Iterable[str] = (), **options: Any) -> StepFlops:
    """`StepFlops` of any family; arguments as there."""
    if isinstance(config, ChangeVLMConfig):
        return StepFlops(config, learn, **options)
    from llava.model.delta_vlm.configuration import DeltaVLMConfig
    from llava.train.delta_flops import DeltaFlops

    assert isinstance(config, DeltaVLMConfig)
    options.pop("adapter", None)
    return DeltaFlops(config, learn, **options)


# --- what a device can do -----------------------------------------------------------------------------

_PEAKS: tuple[tuple[str, float, float], ...] = (
    # name of the device, TFLOPS with 16-bit inputs summed in float32, TFLOPS in float32
    (r"GB200|B200", 2250, 75),
    (r"H200 NVL", 835.5, 60),
    (r"H200|GH200|H800(?! PCIe)", 989.4, 67),
    (r"H100 NVL", 835.5, 60),
    (r"(H100|H800) PCIe", 756, 51),
    (r"H100", 989.4, 67),
    (r"H20", 148, 44),
    (r"(A100|A800)", 312, 19.5),
    (r"A30", 165, 10.3),
    (r"A40", 149.7, 37.4),
    (r"A10", 125, 31.2),
    (r"L40S", 362.05, 91.6),
    (r"L40", 181.05, 90.5),
    (r"L4", 121, 30.3),
    (r"RTX 6000 Ada Generation", 364.2, 91.1),
    (r"RTX A6000", 154.8, 38.7),
    (r"RTX A5000", 111.1, 27.8),
    (r"RTX 5090", 209.5, 104.8),
    (r"RTX 4090(?! D)", 165.2, 82.6),
    (r"RTX 3090 Ti", 80, 40),
    (r"RTX 3090", 71, 35.6),
    (r"V100-PCIE", 112, 14),
    (r"V100-SXM2", 125, 15.7),
    (r"T4", 65, 8.1),
    (r"MI300X", 1307.4, 163.4),
)
_NO_BFLOAT16 = re.compile(r"V100|T4")


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """FLOPs a second of a device's dense matrix products, by its makers' data sheets; None if it is not known.

    Half precisions: tensor cores with sums in float32, without the factor two for sparse matrices. float32: the plain
    units, as torch uses them unless TF32 is asked for. Sources: NVIDIA's data sheets of the B200, H200, H100, A100,
    A40, A30, A10, L40S, L40, L4, V100 and T4, its white papers on the GA102, AD102 and RTX Blackwell chips for RTX
    cards, AMD's data sheet of the MI300X.

    Args:
        device_name: as by `torch.cuda.get_device_name`. Shares of a card (MIG) and cards of laptops are not known.
    """
    if {"MIG", "Laptop"} & set(device_name.split()):
        return None
    for name, half, full in _PEAKS:
        if re.search(rf"\b({name})\b", device_name):
            if dtype == torch.float32:
                return full * 1e12
            if dtype == torch.float16 or (dtype == torch.bfloat16 and not _NO_BFLOAT16.search(device_name)):
                return half * 1e12
            return None
    return None

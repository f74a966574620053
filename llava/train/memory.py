"""What training holds in memory, by formula: weights, gradients, optimizer, buckets and activations of each device.

Activations are what autograd keeps between forward and backward. The formulas are those of the layers as transformers
(and `llava.model.fusion.difference`) compute them, with attention that makes no map of T x T scores.

Shapes: B rows of text of T positions, M images of N tokens, D tower width, H language model width, I hidden width of an
MLP, V vocabulary, L layers or tower levels, P processes.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from llava.errors import ConfigError
from llava.model.configuration import ChangeVLMConfig
from llava.model.loss import rows_at_once
from llava.train.flops import (
    WAY,
    Layers,
    learning_parts,
    needing_gradients,
    on_meta,
    read_layers,
    tower_tokens,
)
from llava.train.parts import PARTS, part_of, set_learning, size

if TYPE_CHECKING:
    from llava.train.adapters import AdapterConfig

GIB = 2**30
UNCOUNTED = (
    "not counted: the device's own context, kernels' workspace and fragmentation, some 1 to 2 GiB on a GPU"
)
_FOUR_BITS = 0.5 + 4 / 64
"""Bytes of a weight in NF4 with a float32 scale for each 64 (`llava.train.four_bit`)."""


MASK = "attention mask"
_HELD = (*WAY[:-2], MASK, *WAY[-2:])
"""What a forward pass keeps, in its order."""


# --- how it is spread -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sharding:
    """What DeepSpeed's ZeRO (arXiv 1910.02054) shares out, and what it keeps on the host."""

    stage: int = 0
    """1: optimizer; 2: gradients too; 3: weights too. 0: nothing."""
    offload_optimizer: bool = False
    offload_weights: bool = False
    gradient_bytes: int = 2
    """Of a gradient while it is accumulated: 4 with `grad_accum_dtype` fp32."""
    bucket: int = 500_000_000
    """Numbers of a bucket that is reduced at once."""
    overlap: bool = False
    """Two buckets, one filled while the other is reduced."""
    live: int = 1_000_000_000
    """Weights that stage 3 keeps gathered at most."""
    group: int = 1_000_000_000
    """Weights that stage 3 updates at once."""


def read_sharding(deepspeed: Path | Mapping[str, Any], hidden: int, dtype: torch.dtype) -> Sharding:
    """From a DeepSpeed JSON, or its fields; "auto" as transformers fills it in for a model of width `hidden`.

    Raises:
        ConfigError: a file that cannot be read, or fields that are no object.
    """
    fields: Any = deepspeed
    if isinstance(deepspeed, Path):
        try:
            fields = json.loads(deepspeed.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"deepspeed={deepspeed} cannot be read as JSON: {error}") from error
    zero = fields.get("zero_optimization", {}) if isinstance(fields, Mapping) else None
    if not isinstance(zero, Mapping):
        raise ConfigError(f"deepspeed={deepspeed} must hold a JSON object, with one in 'zero_optimization'")
    stage = int(zero.get("stage", 0))

    def number(name: str, auto: int, default: float) -> int:
        value = zero.get(name, default)
        return auto if value == "auto" else int(value)

    def on_host(name: str) -> bool:
        return (zero.get(name) or {}).get("device", "none") != "none"

    accumulated = (fields.get("data_types") or {}).get("grad_accum_dtype")
    overlap = zero.get("overlap_comm")
    return Sharding(
        stage=stage,
        offload_optimizer=on_host("offload_optimizer"),
        offload_weights=on_host("offload_param") and stage == 3,
        gradient_bytes={"fp32": 4, "fp16": 2, "bf16": 2}.get(str(accumulated), dtype.itemsize),
        bucket=number("reduce_bucket_size", hidden * hidden, 5e8),
        overlap=stage == 3 if overlap is None else bool(overlap),
        live=number("stage3_max_live_parameters", 10**9, 1e9),
        group=number("sub_group_size", 10**9, 1e9),
    )


@dataclass(frozen=True)
class States:
    """Bytes that stay from step to step, by what they are for: on the device, on the host, and in passing."""

    device: dict[str, float]
    host: dict[str, float]
    update: float = 0.0
    """On the device, while the optimizer works."""


def states(
    held: float,
    total: int,
    trained: int,
    largest: int,
    dtype: torch.dtype,
    processes: int,
    sharding: Sharding | None,
) -> States:
    """Weights, gradients, optimizer (AdamW: two moments) and buckets of one process.

    Args:
        held: bytes of all weights.
        total, trained: numbers of all weights, and of those that learn.
        largest: numbers of the largest weight that learns.
        dtype: of the weights.
        sharding: without it, plain training or DDP: gradients and moments as the weights are, and, on several
            processes, DDP's buckets, a second copy of the gradients.
    """
    width = dtype.itemsize
    if sharding is None or sharding.stage == 0:
        # DeepSpeed without ZeRO keeps float32 masters of half weights, and their gradients
        master = 4 * trained if sharding is not None and width < 4 else 0
        wide = 4 if sharding is not None else width
        return States(
            {
                "weights": held,
                "gradients": float(width * trained + master),
                "optimizer": float(master + 2 * wide * trained),
                "buckets": float(width * trained if processes > 1 and sharding is None else 0),
            },
            {},
        )
    share, kept = trained / processes, sharding.gradient_bytes
    device = {"weights": held, "gradients": kept * share, "optimizer": 12 * share}  # master, two moments
    buckets = width * sharding.bucket * (2 if sharding.overlap and sharding.stage < 3 else 1)
    device["buckets"] = float(buckets)
    host: dict[str, float] = {}
    update = 4 * share if kept < 4 else 0.0  # gradients as the optimizer wants them
    if sharding.stage == 1:
        # whole gradients, and in float32 beside them where those are what is accumulated
        device["gradients"] = float(width * trained + (4 * trained if kept > width else 0))
    if sharding.stage == 3:
        device["weights"] = held / processes
        device["gathered weights"] = float(width * min(total, sharding.live))
        update = 4 * min(share, sharding.group)
        if sharding.offload_weights:
            host["weights"] = device.pop("weights")
    if sharding.offload_optimizer:
        host["optimizer"] = device.pop("optimizer")
        update = 0.0
        if sharding.stage == 3:
            host["gradients"] = device.pop("gradients") + 4 * share
        else:
            # gradients in float32 and new weights on their way
            host["gradients"], host["buckets"] = 4 * share, 2 * share + width * largest
            device["buckets"] += width * largest
            if sharding.stage == 2 and kept < 4:
                device["gradients"] = 0.0
    return States(device, host, update)


# --- activations ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """Bytes of a number: what maps multiply, and the stream between layers."""

    product: int
    stream: int
    cast: bool
    """Autocast: float32 weights and stream, of which every map makes its own half copy."""

    @classmethod
    def of(cls, dtype: torch.dtype, autocast: bool) -> "Precision":
        cast = autocast and dtype == torch.float32
        return cls(2 if cast else dtype.itemsize, dtype.itemsize, cast)


@dataclass(frozen=True)
class Learning:
    """How a part learns, as far as its activations depend on it."""

    weights: bool
    """Its own weights learn, so that the inputs of its maps are kept."""
    low_rank: bool = False
    """Updates beside them learn."""
    dropout: bool = False
    """Each update leaves out inputs of its own."""
    rank: int = 0
    magnitudes: bool = False
    """DoRA's: they scale what each map and its update give, which is kept."""


def layer_bytes(
    layers: Layers,
    precision: Precision,
    learning: Learning,
    *,
    keys: int,
    length: int = 0,
    eager: bool = False,
) -> float:
    """Bytes that one layer keeps of one token.

    Norms keep what they norm: RMS norms in float32, and its normed form too if their weights learn. Maps that learn
    keep their input, one copy for all that read it, or one each where each makes its own (autocast, dropout). Attention
    keeps q, k, v, its result and a float32 sum a head. A gated MLP keeps what the activation got and gave, and the
    other factor; a plain one what the activation got.

    Args:
        keys: features of k, and of v, as attention reads them.
        length: positions of a row, for eager.
        eager: attention that keeps the maps of scores, in float32 and as they are multiplied.
    """
    a, d, i = precision.product, layers.width, layers.mlp

    def inputs(width: int, readers: int, there: bool = False) -> float:
        """Of maps; `there` where something else keeps their input anyhow."""
        if not (learning.weights or learning.low_rank):
            return 0.0
        if learning.low_rank and learning.dropout:
            return readers * (a + 1) * width  # thinned, and where
        copies = readers if precision.cast and not there else 0 if there else 1
        return copies * a * width

    norms = layers.norms * d + (layers.mixed + layers.keys if layers.head_norms else 0)
    norms *= (4 if layers.rms else precision.stream) + (
        precision.stream if layers.rms and learning.weights else 0
    )
    maps = inputs(d, 3) + inputs(layers.mixed, 1, there=not eager)
    maps += inputs(d, 2 if layers.gated else 1) + inputs(i, 1)
    if learning.low_rank:
        maps += a * learning.rank * (7 if layers.gated else 6)
    if learning.magnitudes:
        maps += 2 * a * (layers.mixed + 2 * layers.keys + 2 * d + (2 if layers.gated else 1) * i)
    scores: float = 4 * layers.heads
    if eager:
        scores = layers.heads * length * (4 + (a if a < 4 else 0)) - a * layers.mixed
    attention = a * (2 * layers.mixed + 2 * keys) + scores
    active = 3 if layers.gated else 2 if layers.activation == "quick_gelu" else 1
    return norms + maps + attention + active * a * i


def difference_bytes(
    precision: Precision, learns: bool, dim: int, levels: int, settings: Mapping[str, Any]
) -> tuple[float, float]:
    """Bytes that `llava.model.fusion.difference` keeps of one patch of a pair, and those of one block alone.

    A block in D: attention 22 (q 4, k and v 1 + 3 + 3 each, results 4), both dates and their two gates 4, what three
    norms get 3, the MLP's hidden state m / D. If it learns, also inputs of maps: the gated dates 2, with position codes
    5, of v and the MLP 4, attention's results joined 4, the MLP's hidden state once more. Autocast keeps both dates in
    float32, and a half copy for each map: 29 in place of these 15. At the end two or three more streams.
    """
    a, r = precision.product, settings["mlp_dim"] / dim
    dates = 2 * precision.stream
    inputs = a * ((29 if precision.cast else 15) + r) if learns else 0
    block = dates + a * (22 + 2 + 3 + r) + inputs
    block += 16 / settings["head_dim"]  # float32 sums of four attentions
    end = dates if learns else dates + a
    return levels * dim * (settings["depth"] * block + end), levels * dim * block


def difference_held(
    precision: Precision, learns: bool, dim: int, levels: int, settings: Mapping[str, Any]
) -> float:
    """The first of `difference_bytes` with checkpointing: of a block its input, and what the extractor keeps.

    In D: both dates and their gates 4 and the change 1; if it learns, the gated dates 2, under autocast with copies 6.
    """
    a, dates = precision.product, 2 * precision.stream
    learnt = (6 if precision.cast else 2) if learns else 0
    return levels * dim * (settings["depth"] * (dates + a * (3 + learnt)) + dates + a)


def tokenwise_bytes(
    precision: Precision, learns: bool, dim: int, levels: int, settings: Mapping[str, Any]
) -> float:
    """Bytes that `llava.model.fusion.csrm` keeps of one patch of a pair.

    In D, of each date: what tanh and sigmoid give 2 and, with dropout, the same thinned and where; if it learns also
    the joined input of W_o 3 (of the printed form, of all maps 2), and for both the change 1 and all levels.
    """
    a, kind = precision.product, settings["kind"]
    if kind == "concat":
        return 0.0
    kept = 2 * 2 * a
    if kind == "csrm" and settings["dropout"] > 0:
        kept += 2 * 2 * (a + 1)
    if learns:
        inputs = 2 * 2 * a if kind == "csrm_paper" else (2 * 3 + 1) * a + 2 * levels * precision.stream
        kept += inputs
    return kept * dim


@dataclass(frozen=True)
class Activations:
    """Bytes that a part keeps for backward."""

    held: float
    """From its forward pass until its backward pass."""
    layer: float = 0.0
    """With checkpointing: of one layer, while it is computed again."""
    working: float = 0.0
    """Beside them while its backward pass runs: gradients of one layer's activations."""


class Step:
    """One batch on one device."""

    def __init__(
        self,
        config: PreTrainedConfig,
        model: Any,
        precision: Precision,
        learn: frozenset[str],
        checkpointing: bool,
        adapter: "AdapterConfig | None",
    ) -> None:
        self.config: Any = config
        self.model, self.precision, self.checkpointing = model, precision, checkpointing
        self.adapter = adapter
        adapted = frozenset(adapter.parts) if adapter is not None else frozenset()
        self.learn, self.adapted = learn, adapted
        self.passed = needing_gradients(learn | adapted)
        self.tower = read_layers(model.vision_tower.encoder, config.vision_config)
        self.llm = read_layers(model.language_model, config.text_config)

    def _learning(self, part: str) -> Learning:
        adapter = self.adapter
        if adapter is None or part not in self.adapted:
            return Learning(part in self.learn)
        return Learning(False, True, adapter.dropout > 0, adapter.rank, adapter.kind == "dora")

    def _layers(self, part: str, layers: Layers, tokens: int, **attention: Any) -> Activations:
        """Of a list of layers; checkpointed, only what goes into each of them is held."""
        each = tokens * layer_bytes(layers, self.precision, self._learning(part), **attention)
        stream = tokens * self.precision.stream * layers.width
        working = tokens * (
            3 * self.precision.product * layers.mlp + 2 * self.precision.stream * layers.width
        )
        if self.checkpointing:
            return Activations(layers.count * stream, each, working)
        return Activations(layers.count * each, 0.0, working)

    def _fusion(self, tokens: int) -> Activations:
        """Of patches of pairs."""
        settings = self.config.fusion
        assert settings is not None
        kind = settings["kind"]
        dim, levels = self.tower.width, len(self.model.vision_tower.layers)
        sizes = (self.precision, "fusion" in self.learn, dim, levels, settings)
        if kind != "difference":
            return Activations(tokens * tokenwise_bytes(*sizes))
        held, block = difference_bytes(*sizes)
        working = tokens * levels * 8 * self.precision.product * dim
        if self.checkpointing:
            return Activations(tokens * difference_held(*sizes), tokens * block, working)
        return Activations(tokens * held, 0.0, working)

    def parts(
        self, images: int, pairs: int, positions: int, rows: int, attention: str, branches: bool
    ) -> dict[str, Activations]:
        """Of each part that a gradient passes, in their order."""
        config, precision = self.config, self.precision
        a = precision.product
        patches, dim, hidden = config.image_seq_length, self.tower.width, self.llm.width
        found = {}
        if "tower" in self.passed:
            tokens = images * tower_tokens(self.model.vision_tower, config)
            found["tower"] = self._layers("tower", self.tower, tokens, keys=self.tower.mixed)
        if "fusion" in self.passed and config.fusion is not None:
            found["fusion"] = self._fusion(pairs * patches)
        if "projector" in self.passed:
            maps = list(self.model.projector.layers)
            between = (len(maps) - 1) * hidden * (2 if "projector" in self.learn else 1)
            first = dim if "projector" in self.learn else 0
            found["projector"] = Activations(images * patches * a * (first + between))
        return found | self.language(pairs, positions, rows, attention, branches)

    def language(
        self, pairs: int, positions: int, rows: int, attention: str, branches: bool
    ) -> dict[str, Activations]:
        """Of language model and head."""
        a, s, hidden = self.precision.product, self.precision.stream, self.llm.width
        found = {}
        if "llm" in self.passed:
            tokens = pairs * positions
            eager, masked = attention == "eager", branches and attention == "sdpa"
            keys = self.llm.mixed if masked or eager else self.llm.keys
            length = positions if eager else 0
            layers = self._layers("llm", self.llm, tokens, keys=keys, length=length, eager=eager)
            norm = tokens * hidden * ((4 if self.llm.rms else s) + (s if "llm" in self.learn else 0))
            if branches and (eager or masked):  # one for all layers
                found[MASK] = Activations(tokens * positions * (s if eager else a))
            found["llm"] = Activations(layers.held + norm, layers.layer, layers.working)
            found["head"] = self._head(rows)
        return found

    def _head(self, rows: int) -> Activations:
        """Kept are the supervised positions; in passing, the logits of a chunk, in float32 and as they are multiplied,
        and autocast's copy of the head (`llava.model.loss`)."""
        a, hidden = self.precision.product, self.llm.width
        vocabulary = int(self.config.text_config.vocab_size)
        chunk = min(rows, rows_at_once(vocabulary)) * vocabulary * (4 + (a if a < 4 else 0))
        copy = a * vocabulary * hidden if self.precision.cast else 0
        return Activations(rows * hidden * self.precision.stream, 0.0, chunk + copy)

    def casts(self) -> float:
        """Half copies of weights that autocast makes for a forward pass and keeps till its end."""
        if not self.precision.cast:
            return 0.0
        names = {name for name in self.passed if not self.checkpointing or name in self.learn}
        matrices = {
            "tower": self.tower.count * self.tower.matrices,
            "llm": self.llm.count * self.llm.matrices,
        }
        for part in ("fusion", "projector"):
            module = getattr(self.model, part)
            if module is not None:
                matrices[part] = sum(p.numel() for p in module.parameters() if p.dim() > 1)
        return 2.0 * sum(matrices.get(name, 0) for name in names)


# --- all of it --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process, on its device and on its host."""

    device: dict[str, float]
    """What stays: weights, gradients, optimizer, buckets, ..."""
    host: dict[str, float]
    activations: dict[str, float]
    """Kept for backward, by part, when the forward pass is over; none of frozen parts in front. `half weights` are the
    copies that autocast makes of the weights and keeps until then, and until backward without checkpointing;
    `attention mask` is what keeps several answers of a row apart, one for all layers."""
    moments: dict[str, float]
    """On top of what stays, at the moments of a step when most is held."""
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """On the device, at the worst moment of a step."""
        return sum(self.device.values()) + max(self.moments.values(), default=0.0)

    @property
    def host_total(self) -> float:
        """On the host, of this process, beside the program itself."""
        return sum(self.host.values())

    def table(self) -> str:
        """As text, in GiB."""

        def row(name: str, value: float, note: str = "") -> str:
            return f"{name:28} {value / GIB:9.2f}  {note}".rstrip()

        worst = max(self.moments, key=self.moments.__getitem__, default="")
        lines = [f"{'on each device':28} {'GiB':>9}"]
        lines += [row(name, value, self.notes.get(name, "")) for name, value in self.device.items() if value]
        lines.append(row("activations", sum(self.activations.values()), self.notes.get("activations", "")))
        lines += [row(f"  {part}", value) for part, value in self.activations.items() if value]
        if worst:
            rest = self.moments[worst] - sum(self.activations.values())
            lines.append(
                row("most at one moment", self.moments[worst], f"{worst}: {rest / GIB:+.2f} to these")
            )
        lines.append(row("together", self.total))
        if self.host:
            lines.append("on the host, each process")
            lines += [row(name, value) for name, value in self.host.items()]
        return "\n".join([*lines, UNCOUNTED])


def part_counts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Numbers of each part's weights, all and those that learn, of a plain, wrapped or adapted model on any device."""
    found = dict.fromkeys(PARTS, (0, 0))
    for name, parameter in model.named_parameters():
        part, count = part_of(name), size(parameter)
        total, trained = found[part]
        found[part] = (total + count, trained + (count if parameter.requires_grad else 0))
    if not found["qformer"][0]:
        del found["qformer"]
    return found


def estimate(
    config: PreTrainedConfig,
    *,
    learn: Iterable[str],
    pairs: int,
    positions: int,
    rows: int,
    images: int | None = None,
    processes: int = 1,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    deepspeed: Path | Mapping[str, Any] | None = None,
    checkpointing: bool = False,
    attention: str = "sdpa",
    branches: bool = True,
    adapter: "AdapterConfig | None" = None,
    ema: bool = False,
    parameters: Mapping[str, tuple[int, int]] | None = None,
    half_llm: bool = False,
) -> MemoryEstimate:
    """Memory of one process while it trains.

    Args:
        learn: parts that learn in full.
        pairs: B, rows of text, of one batch (not of an update of several).
        positions: T, of a row, image tokens included.
        rows: positions of one row that foretell a label.
        images: M, of the batch; two a pair by default.
        processes: P, one a device.
        dtype: of the weights as they are computed with: bfloat16 under DeepSpeed's bf16, else float32.
        autocast: half precision by autocast, with float32 weights.
        deepspeed: its JSON, or the fields of one.
        checkpointing: of the layers of tower, fusion and language model.
        attention: of the language model.
        branches: several answers in a row, which in "sdpa" takes an explicit mask.
        adapter: low-rank updates; see `StepFlops`.
        ema: a moving average of the weights is kept.
        parameters: numbers of weights by part, all and learning, where they are known better than by config and
            `learn` (see `part_counts`).
        half_llm: a DeltaVLM's language model rests in half precision.

    Raises:
        ConfigError: an unknown part, or a DeepSpeed file that cannot be read.
    """
    whole = on_meta(config)
    of_change = isinstance(config, ChangeVLMConfig)
    parts = learning_parts(
        learn if adapter is None else adapter.full, whole.model.fusion, qformer=not of_change
    )
    half = 0 if of_change or not half_llm else part_counts(whole)["llm"][0]
    linear = read_linear(whole, adapter)
    trained_model: nn.Module = whole
    precision = Precision.of(dtype, autocast)
    sizes = (config, whole.model, precision, parts, checkpointing, adapter)
    if of_change:
        step = Step(*sizes)
    else:
        from llava.train.delta_memory import DeltaStep

        step = DeltaStep(*sizes, half_llm=half > 0)
    kept = step.parts(images or 2 * pairs, pairs, positions, pairs * rows, attention, branches)
    casts = step.casts()
    set_learning(whole, parts)
    if adapter is not None:
        from llava.train.adapters import add_adapter

        with torch.device("meta"):
            trained_model = add_adapter(whole, adapter, seed=0)
    counts = part_counts(trained_model) if parameters is None else dict(parameters)
    total, trained = (sum(count[i] for count in counts.values()) for i in (0, 1))
    largest = max((size(p) for p in trained_model.parameters() if p.requires_grad), default=0)
    held = dtype.itemsize * total - linear * (dtype.itemsize - _FOUR_BITS) - half * (dtype.itemsize - 2)
    sharding = None if deepspeed is None else read_sharding(deepspeed, step.llm.width, dtype)
    fixed = states(held, total, trained, largest, dtype, processes, sharding)
    device = dict(fixed.device)
    if ema:
        device["moving average"] = 4.0 * trained
    return MemoryEstimate(
        device,
        fixed.host,
        {part: activations.held for part, activations in kept.items()}
        | ({"half weights": casts} if casts else {}),
        _moments(kept, casts, checkpointing, fixed.update, dtype.itemsize * largest if "llm" in parts else 0),
        {
            "weights": f"{total:,} in {str(dtype).removeprefix('torch.')}"
            + (f", {linear:,} of them in 4 bits" if linear else "")
            + (f", {half:,} of them in half precision" if half else ""),
            "gradients": f"{trained:,} learn",
            "activations": f"{pairs} x {positions} positions" + (", checkpointed" if checkpointing else ""),
            "buckets": "" if sharding is None else f"ZeRO-{sharding.stage}, {processes} processes",
        },
    )


def read_linear(model: nn.Module, adapter: "AdapterConfig | None") -> int:
    """Numbers of weights that an adapter holds in 4 bits."""
    if adapter is None or adapter.kind != "qlora":
        return 0
    from llava.train.adapters import linear_layers

    return sum(
        model.get_submodule(name).get_parameter("weight").numel()
        for name in linear_layers(model, adapter.parts)
    )


def _moments(
    kept: Mapping[str, Activations], casts: float, checkpointing: bool, update: float, head: float
) -> dict[str, float]:
    """Bytes at the moments when most is held: the loss is there, and each part's backward pass begins.

    Args:
        head: bytes of the head's gradient, before it is added to what there is.
    """
    moments = {"update": update}
    so_far = casts
    for name in _HELD:
        if name not in kept:
            continue
        part = kept[name]
        so_far += part.held
        if name == MASK:
            continue
        if name == "head":
            moments["loss"] = so_far + part.working
            moments["backward of the head"] = so_far + part.working + head
        else:
            # copies made for the forward pass are gone, those of one layer are there
            gone = casts if checkpointing else 0.0
            moments[f"backward of the {name}"] = so_far - gone + part.layer + part.working
    return moments

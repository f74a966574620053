"""Answers from an encoded pair: what no question changes is computed once, text is generated from there.

Shapes: B pairs, P tokens of the prefix (all up to the second image's last), T tokens of a prompt, t new
tokens, N tokens of an image, D tower width, V vocabulary.
"""

import contextlib
import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Any, TypedDict, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer

from llava.errors import CheckpointError, ConfigError, DataError
from llava.model.change_vlm import ChangeVLMForConditionalGeneration

if TYPE_CHECKING:
    from llava.family import AnyModel
    from llava.model.delta_vlm.modeling import DeltaVLMForConditionalGeneration


class Options(TypedDict, total=False):
    """The fields of `Generation` as keyword arguments."""

    max_new_tokens: int
    num_beams: int
    do_sample: bool
    temperature: float
    top_p: float
    repetition_penalty: float
    seed: int | None
    static_cache: bool
    compile: bool


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How text is generated. Greedy by default, whatever the checkpoint's own generation_config.json
    suggests.

    Raises:
        ConfigError: a value out of its range.
    """

    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    num_beams: int = 1
    """Answers followed at once; the most probable one is given. 1 is greedy."""
    do_sample: bool = False
    """Draw each token by its probability instead of taking the most probable one."""
    temperature: float = 1.0
    """Sampling only: below 1 sharper, above 1 flatter."""
    top_p: float = 1.0
    """Sampling only: draw from the most probable tokens that together have this probability."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that the answer holds already become less likely, whatever the prompt holds. It also punishes
    what must come again, such as digits and the words of a list of places. 1: none."""
    seed: int | None = None
    """Sampling only: the same seed, pair and question give the same answer; None draws anew each time."""
    static_cache: bool = False
    """Batches only: hold keys and values in one block of fixed size, which is not copied for each new token."""
    compile: bool = False
    """Batches on a CUDA device only, with `static_cache`: compile the step that makes a token. The first batch of
    each size takes a minute or more."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.num_beams < 1:
            raise ConfigError(
                f"max_new_tokens={self.max_new_tokens} and num_beams={self.num_beams} must be at least 1"
            )
        if not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature={self.temperature} must be above 0 and top_p={self.top_p} in 0..1; "
                "for the most probable answer leave do_sample off"
            )
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ConfigError(
                f"repetition_penalty={self.repetition_penalty} must be a number above 0; 1 for none"
            )
        if self.static_cache and self.num_beams > 1:
            raise ConfigError(f"static_cache is for one beam, not for num_beams={self.num_beams}")
        if self.compile and not self.static_cache:
            raise ConfigError("compile needs static_cache, whose tensors keep their shape")

    def but(self, options: Options) -> "Generation":
        """These settings with some replaced.

        Raises:
            ConfigError: an unknown name or a value out of range.
        """
        known = list(Options.__annotations__)
        if unknown := set(options) - set(known):
            raise ConfigError(f"unknown generation options {sorted(unknown)}; known: {', '.join(known)}")
        return Generation(**{**vars(self), **options})

    def config(self, ends: Sequence[int], pad: int) -> GenerationConfig:
        """For `generate`. Every setting that would change the choice of tokens is named: what is left out
        here would be filled in from the checkpoint's generation_config.json."""
        drawn = self.do_sample
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            num_beams=self.num_beams,
            do_sample=drawn,
            temperature=self.temperature if drawn else 1.0,
            top_p=self.top_p if drawn else 1.0,
            top_k=0 if drawn else 50,
            repetition_penalty=1.0,  # ours is a processor of its own: transformers' would count the prompt, too
            no_repeat_ngram_size=0,
            length_penalty=1.0,
            eos_token_id=list(ends),
            pad_token_id=pad,
            disable_compile=not self.compile,
        )


@dataclass(frozen=True)
class Start:
    """What generation goes on from."""

    cache: DynamicCache
    """Keys and values [B, heads, known, d]."""
    known: int = 0
    """Tokens of the prompts that are in it."""
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """Further inputs of the model."""


@dataclass
class Encoded(ABC):
    """Pairs that a model has read as far as no question changes; none of that is computed again."""

    ids: list[int]
    """The P tokens that every prompt about these pairs begins with, the same for every pair."""
    change: Tensor | None
    """The fusion's change stream [B, N, D]; None for a model without fusion."""

    @abstractmethod
    def start(
        self, model: "AnyModel", prompts: Sequence[Sequence[int]], reading: Mapping[str, Tensor]
    ) -> Start:
        """Where the answers to `prompts`, one a pair, begin.

        Args:
            reading: what else the model is told of the questions, see `llava.family.Family.reading`.
        """

    def keep(self, tokens: Sequence[int]) -> None:
        """Remember what the cache of `start` holds now, after one prompt and its answer, which are `tokens`."""
        return None


@dataclass
class EncodedPrefix(Encoded):
    """Pairs that stand in the text: tower, fusion and language model have read them."""

    cache: DynamicCache
    """Keys and values [B, heads, >= P, d] of the prefix, and behind them what was generated last."""
    seen: list[int]
    """For one pair: all tokens whose keys and values are valid in `cache`, `ids` first."""

    def start(
        self, model: "AnyModel", prompts: Sequence[Sequence[int]], reading: Mapping[str, Tensor]
    ) -> Start:
        known = len(self.ids)
        if len(prompts) == 1:
            known = min(_common(self.seen, prompts[0]), len(prompts[0]) - 1)
        trim(self.cache, known)
        # should this call be broken off, the cache is known to be good up to here
        self.seen = self.seen[:known]
        return Start(self.cache, known)

    def keep(self, tokens: Sequence[int]) -> None:
        self.seen = list(tokens[: self.cache.get_seq_length()])


@dataclass
class EncodedFeatures(Encoded):
    """Pairs that tower and fusion have read; each question is then asked of their features, and read from its start."""

    features: Tensor
    """[B, M, D]."""

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: "DeltaVLMForConditionalGeneration", pixel_values: Tensor, ids: list[int]
    ) -> "EncodedFeatures":
        """Of pairs [B, 2, C, S, S]; one by one on a CPU, as in `encode`."""
        at_once = 1 if model.device.type == "cpu" else len(pixel_values)
        parts = [
            model.get_image_features(pixels.to(model.device, model.dtype))
            for pixels in pixel_values.split(at_once)
        ]
        features, change = (
            torch.cat([cast(Tensor, getattr(part, name)) for part in parts])
            for name in ("last_hidden_state", "change")
        )
        return cls(ids, change, features)

    @torch.no_grad()
    def start(
        self, model: "AnyModel", prompts: Sequence[Sequence[int]], reading: Mapping[str, Tensor]
    ) -> Start:
        told = {name: value.to(model.device) for name, value in reading.items()}
        found = cast("DeltaVLMForConditionalGeneration", model).model.ask(self.features, **told)  # [B, K, H]
        return Start(DynamicCache(), inputs={"prefix": found})


@dataclass(frozen=True)
class Generated:
    """One answer as tokens."""

    ids: list[int]
    """New tokens up to and with the end mark."""
    log_probability: float
    """Sum over `ids` of the log-probability the model gives each, by its own unscaled distribution."""
    first_token_at: float
    """`time.perf_counter()` when the first token was there."""


class _Scores(LogitsProcessor):
    """Keeps the newest log-probabilities [B, V], as they are before temperature and top-p."""

    def __init__(self) -> None:
        self.newest: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.newest = scores.float().log_softmax(-1)
        return scores


class _Watch(StoppingCriteria):
    """After each token: its log-probability, the time of the first, and whether the caller wants no more."""

    def __init__(self, scores: _Scores | None, stop: Event | None) -> None:
        self.scores, self.stop = scores, stop
        self.chosen: list[Tensor] = []
        """One [B] a token."""
        self.first_token_at = math.nan

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.scores is not None and self.scores.newest is not None:
            self.chosen.append(self.scores.newest.gather(1, input_ids[:, -1:])[:, 0])
        if math.isnan(self.first_token_at):
            input_ids[0, -1].item()  # waits for the accelerator: the token must be there, not only asked for
            self.first_token_at = time.perf_counter()
        stopped = self.stop is not None and self.stop.is_set()
        return torch.full((len(input_ids),), stopped, dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def encode(
    model: ChangeVLMForConditionalGeneration,
    input_ids: Tensor,
    pixel_values: Tensor,
    at_once: int | None = None,
) -> EncodedPrefix:
    """Run pairs up to the last token of the second image.

    Args:
        input_ids: [B, T] prompts that are equal up to there.
        pixel_values: [B, 2, C, S, S].
        at_once: pairs that go through the model together. By default all; one on a CPU, where a pair keeps all
            cores busy and its activations fit the caches better than those of several (14 to 19 % of the time).
    """
    places = (input_ids[0] == model.config.image_token_id).nonzero()
    prefix = input_ids[:, : int(places[-1]) + 1].to(model.device)  # [B, P]
    if not bool((prefix == prefix[:1]).all()):
        raise DataError("prompts of one batch must be equal up to the second image; check the chat template")
    at_once = at_once or (1 if model.device.type == "cpu" else len(prefix))
    parts = []
    for rows, pixels in zip(prefix.split(at_once), pixel_values.split(at_once), strict=True):
        cache = DynamicCache()
        out = model.model(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            pixel_values=pixels.to(model.device, model.dtype),
            past_key_values=cache,
            use_cache=True,
        )
        parts.append((cache, out.change))
    ids = prefix[0].tolist()
    change = None if parts[0][1] is None else torch.cat([change for _, change in parts])
    return EncodedPrefix(ids, change, _joined([cache for cache, _ in parts]), list(ids))


def _joined(caches: Sequence[DynamicCache]) -> DynamicCache:
    """One cache of the rows of several; they are emptied on the way, so that little is held twice."""
    if len(caches) == 1:
        return caches[0]
    joined = DynamicCache()
    layers = [cast(Any, cache).layers for cache in caches]
    for number, same in enumerate(zip(*layers, strict=True)):
        keys, values = (torch.cat([getattr(layer, name) for layer in same]) for name in ("keys", "values"))
        joined.update(keys, values, number)  # [B, heads, P, d]
        for layer in same:
            layer.keys = layer.values = None
    return joined


def trim(cache: DynamicCache, length: int) -> None:
    """Forget all but the first `length` tokens."""
    for layer in cast(Any, cache).layers:
        if layer.keys is None:
            continue
        # a call that was broken off may have filled some layers and not others, and of one the keys alone
        layer.keys = layer.keys[..., : layer.values.shape[-2], :]
        surplus = layer.get_seq_length() - length
        if surplus > 0:
            layer.crop(-surplus)  # a negative number of tokens: the one way that all supported versions share


def generate(
    model: "AnyModel",
    encoded: Encoded,
    prompts: Sequence[Sequence[int]],
    how: Generation,
    *,
    ends: Sequence[int],
    pad: int,
    reading: Mapping[str, Tensor] | None = None,
    streamer: BaseStreamer | None = None,
    stop: Event | None = None,
) -> list[Generated]:
    """Answer one prompt for each encoded pair.

    Args:
        prompts: B lists of token ids, each beginning with `encoded.ids`. Where the pair stands in the text, one that
            begins as the last one, as the next round of a conversation does, pays only for what is new.
        how: the settings.
        ends: ids that end an answer.
        pad: an id to fill rows with; never seen by the model.
        reading: see `Encoded.start`.
        streamer: told every token as it comes (one prompt, one beam).
        stop: set from another thread, it ends the answer after the token under way.

    Raises:
        DataError: a prompt leaves the model no room for an answer.
        CheckpointError: the model's outputs are not numbers.
    """
    prefix = len(encoded.ids)
    if any(list(prompt[:prefix]) != encoded.ids for prompt in prompts):
        raise DataError("a prompt does not begin as the encoded pair does; encode it anew")
    longest = max(map(len, prompts))
    if how.compile and model.device.type not in ("cuda", "xpu"):
        raise ConfigError(f"compile is for CUDA devices, the model is on {model.device}; leave it off")
    room = int(getattr(model.config.text_config, "max_position_embeddings", 1 << 30)) - longest
    if room < 1:
        raise DataError(
            f"the conversation has {longest} tokens, the model has room for {longest + room}: reset it"
        )
    how = how.but({"max_new_tokens": min(how.max_new_tokens, room)})
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.ones_like(ids)
    for row, prompt in enumerate(prompts):  # shorter questions are filled up between the images and them
        ids[row, :prefix] = torch.tensor(encoded.ids)
        ids[row, prefix + longest - len(prompt) :] = torch.tensor(prompt[prefix:], dtype=torch.long)
        mask[row, prefix : prefix + longest - len(prompt)] = 0
    ids, mask = ids.to(model.device), mask.to(model.device)
    start = encoded.start(model, prompts, reading or {})

    scores = _Scores() if how.num_beams == 1 else None
    watch = _Watch(scores, stop)
    processors: list[LogitsProcessor] = [] if scores is None else [scores]
    if how.repetition_penalty != 1:
        processors.append(
            RepetitionPenaltyLogitsProcessor(float(how.repetition_penalty), prompt_ignore_length=longest)
        )
    cache: Cache = start.cache
    if how.static_cache:
        cache = _static_copy(model, start.cache, len(prompts), longest + how.max_new_tokens)
    if how.num_beams > 1:  # beams overwrite each other's keys and values: they work on a copy
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(how.num_beams)
    run = cast(Any, model).generate  # its declared types know neither our model class nor plain lists
    with _seeded(model.device, how.seed if how.do_sample else None):
        full: Tensor = run(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=how.config(ends, pad),
            logits_processor=processors,
            stopping_criteria=[watch],
            streamer=streamer,
            **start.inputs,
        )
    new = full[:, longest:]  # [B, t]
    lengths = [_answer_length(row, ends) for row in new.tolist()]
    chosen = (
        torch.stack(watch.chosen, 1)
        if scores is not None
        else _rescore(model, start, full, mask, new.shape[1])
    )
    if not bool(chosen.isfinite().all()):
        raise CheckpointError(
            f"the model gives no numbers any more (nan) in {model.dtype}: its weights are damaged, or too "
            "large for this precision; try bfloat16 or float32"
        )
    if len(prompts) == 1:
        encoded.keep(full[0].tolist())
    return [
        Generated(row[:length], float(terms[:length].sum()), watch.first_token_at)
        for row, terms, length in zip(new.tolist(), chosen.double().cpu(), lengths, strict=True)
    ]


def _static_copy(model: "AnyModel", cache: DynamicCache, rows: int, length: int) -> StaticCache:
    """The keys and values of `cache`, of so many rows, in a block with room for `length` tokens at least."""
    length = -(-length // _STATIC_STEP) * _STATIC_STEP
    layers = cast(Any, cache).layers
    autocast = torch.is_autocast_enabled(model.device.type)
    shape = (rows, length, layers[0].keys.dtype if layers else (model.model.language_model.dtype, autocast))
    known = _static_caches.get(model)
    if known is not None and known[0] == shape:
        static = known[1]
        static.reset()
    else:
        static = StaticCache(config=model.config.text_config, max_cache_len=length)
        _static_caches[model] = (shape, static)
    for number, layer in enumerate(layers):  # none of a cache that holds nothing yet
        static.update(layer.keys, layer.values, number)  # [B, heads, P, d]
    return static


_STATIC_STEP = 64
"""Lengths of static caches are multiples of this, so that few are made, and few compiled for."""

_static_caches: "WeakKeyDictionary[AnyModel, tuple[Any, StaticCache]]" = WeakKeyDictionary()
"""The last one of each model: what was compiled or recorded holds for tensors at the same addresses."""


@torch.no_grad()
def _rescore(model: "AnyModel", start: Start, full: Tensor, mask: Tensor, new: int) -> Tensor:
    """Log-probabilities [B, t] of the last `new` tokens of `full` [B, T + t], of which the cache holds the first."""
    mask = torch.cat([mask, mask.new_ones(len(full), new)], dim=1)[:, :-1]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = cast(Any, model)(
        input_ids=full[:, start.known : -1],
        attention_mask=mask,
        position_ids=positions[:, start.known :],
        past_key_values=start.cache,
        use_cache=True,
        logits_to_keep=new,
        **start.inputs,
    ).logits
    return cast(Tensor, logits.float().log_softmax(-1).gather(2, full[:, -new:, None])[..., 0])


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int | None) -> Iterator[None]:
    """Random numbers from `seed` inside, and as if nothing had been drawn afterwards."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return place
    return min(len(first), len(second))


def _answer_length(new: Sequence[int], ends: Sequence[int]) -> int:
    """Tokens of an answer up to and with its end mark; all of them where it was cut off."""
    return next((i + 1 for i, token in enumerate(new) if token in ends), len(new))

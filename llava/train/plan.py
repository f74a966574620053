"""What a run would do, as text: config, data, parameters and rates, steps, memory. Nothing is loaded or trained."""

import math
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from llava.config import to_yaml
from llava.data.dataset import pair_codes
from llava.errors import LlavaError
from llava.family import AnyConfig, family_of
from llava.model.configuration import ChangeVLMConfig
from llava.train.config import TrainConfig
from llava.train.delta_start import halves
from llava.train.memory import estimate, part_counts
from llava.train.parts import PARTS, parameter_groups, set_learning
from llava.train.run import evaluation_records, records_of, require_scores, weights_dtype
from llava.train.start import config_of, learned_parts

_ANSWER = 16
"""Tokens of a caption, about; LEVIR-CC's mean is 11 words on changed pairs."""
_PROMPT = 40
"""Tokens of the prompt without its images."""


def plan(run: TrainConfig, processes: int = 1, first: TrainConfig | None = None) -> str:
    """The plan of a run on so many devices; `first` is the first stage, where the run is a later one.

    Raises:
        LlavaError: what would stop the run at its start: a fault in config, mixture or records.
    """
    config = config_of(run, first)
    trained = meta_model(run, config)
    records, _, data = records_of(run)
    each = not isinstance(config, ChangeVLMConfig)  # each round of a dialogue is a text of its own
    texts = sum(
        len(r.change_caption) + (len(r.conversation) if each else bool(r.conversation)) for r in records
    )
    if run.captions != "all":
        samples, rounds = len(records), 1.0
    elif run.one_pass:  # of one pair, whatever is asked of it
        samples = len(np.unique(pair_codes(records)))
        rounds = texts / samples
    else:
        samples, rounds = texts, 1.0
    sections = [
        ("config", to_yaml(run).rstrip()),
        ("data", data),
        ("parameters", _parameters(run, trained)),
        ("steps", _steps(run, samples, processes)),
        ("memory", _memory(run, config, trained, processes, rounds)),
    ]
    if run.evaluation is not None:
        sections.insert(2, ("evaluation", _evaluation(run)))
    return "\n\n".join(f"== {title}\n{text}" for title, text in sections)


def _evaluation(run: TrainConfig) -> str:
    assert run.evaluation is not None
    records = evaluation_records(run)[0] or []
    told = run.evaluation
    every = "each epoch" if told.every == "epoch" else f"every {told.every} updates"
    lines = [f"{told.data}: {len(records)} pairs, {every}; keeps the best {told.metric} and the last"]
    try:
        require_scores(run)
    except LlavaError as error:
        lines.append(f"MISSING: {error}")
    return "\n".join(lines)


def meta_model(run: TrainConfig, config: AnyConfig) -> nn.Module:
    """The model without its values, frozen or adapted as the run does it."""
    with torch.device("meta"):
        model: nn.Module = family_of(config).model(config)
        if run.adapter is not None:
            from llava.train.adapters import add_adapter

            return add_adapter(cast(Any, model), run.adapter, run.seed)
    set_learning(model, learned_parts(run, config))
    return model


def _parameters(run: TrainConfig, trained: nn.Module) -> str:
    counts = part_counts(trained)
    groups = parameter_groups(trained, run.learning_rate, run.part_learning_rate, run.weight_decay)
    lines = [f"{'part':10} {'parameters':>14} {'learn':>14} {'peak rate':>10} {'decay':>6}"]
    for part in PARTS:
        if part not in counts:
            continue
        mine = [group for group in groups if group.part == part]
        if not mine:
            lines.append(f"{part:10} {counts[part][0]:14,} {'frozen':>14}")
        for i, group in enumerate(mine):
            first = f"{part:10} {counts[part][0]:14,}" if i == 0 else f"{'':10} {'':14}"
            lines.append(f"{first} {group.count:14,} {group.rate:10.2e} {group.decay:6g}")
    held, learn = (sum(count[i] for count in counts.values()) for i in (0, 1))
    lines.append(f"{'together':10} {held:14,} {learn:14,}")
    return "\n".join(lines)


def _steps(run: TrainConfig, samples: int, processes: int) -> str:
    accumulation = run.accumulation(processes)
    step = run.per_device_train_batch_size * accumulation * processes
    batches = math.ceil(samples / (run.per_device_train_batch_size * processes))
    epoch = math.ceil(batches / accumulation)
    total = run.max_steps if run.max_steps > 0 else math.ceil(run.num_train_epochs * epoch)
    return (
        f"{step} pairs a step = {run.per_device_train_batch_size} a device x {accumulation} accumulated x "
        f"{processes} processes\n{samples} samples, {epoch} steps an epoch, {total} steps in all, "
        f"{_warmup(run, total)} of them warm-up"
    )


def _warmup(run: TrainConfig, total: int) -> int:
    rising = run.warmup_ratio
    return min(total, int(rising)) if rising >= 1 else math.ceil(rising * total)


def _memory(run: TrainConfig, config: AnyConfig, trained: nn.Module, processes: int, rounds: float) -> str:
    pairs = run.per_device_train_batch_size
    images, rows = 2 * pairs, pairs
    if not isinstance(config, ChangeVLMConfig):  # a row a question
        rows, rounds = round(pairs * rounds), 1.0
    answers = round(rounds * _ANSWER)
    placeholders = config.image_seq_length * (2 if isinstance(config, ChangeVLMConfig) else 1)
    found = estimate(
        config,
        learn=learned_parts(run, config),
        pairs=rows,
        images=images,
        positions=placeholders + _PROMPT + answers,
        rows=answers,
        processes=processes,
        dtype=weights_dtype(run),
        autocast=run.bf16 and run.deepspeed is None,
        deepspeed=run.deepspeed,
        checkpointing=run.gradient_checkpointing,
        attention=run.attn_implementation,
        branches=rounds > 1,
        adapter=run.adapter,
        ema=run.ema is not None,
        parameters=part_counts(trained),
        half_llm=halves(run, config),
    )
    return found.table()

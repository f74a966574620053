"""Twenty steps of the small model on the synthetic world have the losses they had: a change of them is noticed."""

import json
from pathlib import Path

import pytest

from llava.assets import tiny_train_yaml
from llava.synth.export import export_records
from llava.train.config import TrainConfig
from llava.train.run import train

LOSSES = {1: 17.9594, 2: 18.4850, 5: 8.3801, 10: 6.4293, 15: 4.6334, 20: 5.9446}
"""step -> words, masks and places together; torch 2.13 on a CPU, where threads change the seventh digit."""


def test_twenty_steps_have_the_losses_they_had(tmp_path: Path):
    export_records({"train": 16}, tmp_path / "data", workers=1)
    settings = [
        f"data={tmp_path / 'data' / 'train.jsonl'}",
        f"output_dir={tmp_path / 'run'}",
        "per_device_train_batch_size=4",
        "max_steps=20",
        "num_train_epochs=5",
        "logging_steps=1",
    ]
    train(TrainConfig.from_yaml(tiny_train_yaml(), settings))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert {step: losses[step] for step in LOSSES} == pytest.approx(LOSSES, rel=5e-3)
    assert losses[20] < 0.5 * losses[1]

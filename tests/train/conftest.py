"""Runs on a handful of random pairs, small enough for seconds."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from llava.train.config import TrainConfig
from llava.train.trainer import ChangeTrainer
from tests.tiny import random_image, tiny_model

FUSION = {"kind": "difference", "depth": 1, "head_dim": 8, "mlp_dim": 16}


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without fusion, and eight pairs with captions."""
    folder = tmp_path_factory.mktemp("train")
    model, processor = tiny_model(fusion=False, vision_layers=[1, 3])
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    for i in range(8):
        random_image(i).save(folder / f"{i}.png")
    rows = [
        {
            "uid": str(i),
            "img1_path": f"{i}.png",
            "img2_path": f"{(i + 1) % 8}.png",
            "change_caption": ["a road", "trees"] if i % 2 else ["the scene is the same", "no change"],
            "change_flag": i % 2,
        }
        for i in range(8)
    ]
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def make_run(run_folder: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A config of four pairs a step, two steps an epoch; fields on top."""

    def make(out: str = "out", **fields: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "model": str(run_folder / "base"),
            "data": run_folder / "data.json",
            "output_dir": tmp_path / out,
            "num_train_epochs": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "fusion": FUSION,
            "seed": 3,
            "warmup_ratio": 0.0,
            "logging_steps": 1,
        }
        return TrainConfig.from_dict(defaults | fields)

    return make


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Send this process a signal when a step begins."""

    def arrange(step: int, number: int = signal.SIGTERM) -> None:
        class Stop(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == step:
                    os.kill(os.getpid(), number)

        init = ChangeTrainer.__init__

        def with_stop(self: ChangeTrainer, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            self.add_callback(Stop())

        monkeypatch.setattr(ChangeTrainer, "__init__", with_stop)

    return arrange

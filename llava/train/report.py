"""What a run tells while it is on: lines for a person, log.jsonl, and captions with pictures for writers of curves."""

import json
import textwrap
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava.data.images import load_pair
from llava.data.whole_file import write_whole
from llava.errors import ImageError

if TYPE_CHECKING:
    from llava.train.trainer import ChangeTrainer


class Console(TrainerCallback):
    """A line for each line of the log, for a person: where the run is, how it goes, and how long it will take."""

    FIRST = (
        "loss",
        "mask_loss",
        "object_loss",
        "place_loss",
        "grad_norm",
        "learning_rate",
        "pairs_per_second",
        "mfu",
        "memory_gb",
        "skipped",
    )
    SCORES = ("Sm", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D", "Sm_changed", "decision")

    def __init__(self) -> None:
        self._started, self._first = time.monotonic(), 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._started, self._first = time.monotonic(), state.global_step
        if state.is_world_process_zero and state.global_step:
            print(f"goes on from step {state.global_step} of {state.max_steps}", flush=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        place = f"step {state.global_step}/{state.max_steps}  epoch {state.epoch or 0:.2f}"
        scores = [f"{name} {logs[f'eval_{name}']:.2f}" for name in self.SCORES if f"eval_{name}" in logs]
        told = [f"{name} {float(logs[name]):.4g}" for name in self.FIRST if name in logs]
        if scores:
            print(f"{place}  evaluation: {'  '.join(scores)}", flush=True)
        elif "loss" in logs:
            done = state.global_step - self._first
            left = (time.monotonic() - self._started) / max(1, done) * (state.max_steps - state.global_step)
            print(f"{place}  {'  '.join(told)}  left {timedelta(seconds=round(left))}", flush=True)


class LogFile(TrainerCallback):
    """log.jsonl: a line for each line of the log; when a run goes on, those that its checkpoint knows."""

    NAME = "log.jsonl"

    def __init__(self, trainer: "ChangeTrainer") -> None:
        self.path = Path(str(trainer.args.output_dir)) / self.NAME

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            rows = [{"step": row["step"], **row} for row in state.log_history]
            write_whole(self.path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero and logs is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class SampleWriter(TrainerCallback):
    """After each evaluation, some pairs with references and captions, to every writer that takes pictures."""

    def __init__(self, trainer: "ChangeTrainer", count: int) -> None:
        self.trainer, self.count = trainer, count

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        evaluation = self.trainer.last_evaluation
        if not state.is_world_process_zero or evaluation is None:
            return
        root = self.trainer.eval_root
        writers = [
            c for c in self.trainer.callback_handler.callbacks if getattr(c, "tb_writer", None) is not None
        ]
        wandb = next((c for c in self.trainer.callback_handler.callbacks if getattr(c, "_wandb", None)), None)
        if not writers and wandb is None:
            return
        lines = [line for line in evaluation.lines if "pred" in line]
        step = max(1, len(lines) // self.count)  # the same pairs each time, from all over the set
        for number, line in enumerate(lines[::step][: self.count]):
            try:
                before, after = load_pair(root / line["img1_path"], root / line["img2_path"])
            except ImageError:  # said by the evaluation already
                continue
            told = line["change_caption"][0] if line["change_caption"] else line["conversation"][-1][1]
            picture = panel(before, after, told, line["pred"])
            for writer in writers:
                writer.tb_writer.add_image(
                    f"samples/{number}", np.asarray(picture), state.global_step, dataformats="HWC"
                )
            if wandb is not None:
                image = wandb._wandb.Image(picture, caption=line["pred"])
                wandb._wandb.log({f"samples/{number}": image, "train/global_step": state.global_step})


def panel(
    before: Image.Image, after: Image.Image, reference: str, caption: str, side: int = 256
) -> Image.Image:
    """Before and after side by side, with a reference and the model's caption below."""
    rows = [
        *textwrap.wrap(f"reference: {reference}", 84)[:3],
        *textwrap.wrap(f"model: {caption}", 84)[:3],
    ]
    picture = Image.new("RGB", (2 * side + 4, side + 6 + 12 * len(rows)), "white")
    for i, image in enumerate((before, after)):
        picture.paste(image.convert("RGB").resize((side, side)), (i * (side + 4), 0))
    draw = ImageDraw.Draw(picture)
    for i, row in enumerate(rows):
        draw.text((2, side + 3 + 12 * i), row.encode("latin-1", "replace").decode("latin-1"), fill="black")
    return picture

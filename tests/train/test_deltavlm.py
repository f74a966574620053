"""DeltaVLM in training: its samples, what learns and what rests, new ones from parts, and runs that are broken off."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    set_seed,
)

from llava.captioner import ChangeCaptioner
from llava.data.collate import BranchCollator
from llava.data.conversation import IGNORE, QUESTION
from llava.data.dataset import PairDataset
from llava.data.record import Record, read_records
from llava.data.sampler import FILLER, Place
from llava.errors import CheckpointError, ConfigError, DownloadError
from llava.family import family_of
from llava.model.delta_vlm.configuration import DeltaVLMConfig
from llava.model.delta_vlm.modeling import DeltaVLMForConditionalGeneration
from llava.model.delta_vlm.processing import DeltaVLMProcessor
from llava.synth.export import export_tasks
from llava.train.checkpoints import FINISHED, WHOLE
from llava.train.config import TrainConfig
from llava.train.guard import Interrupted, Signals
from llava.train.parts import part_of
from llava.train.plan import plan
from llava.train.run import prepare, train, training_arguments
from llava.train.start import load_start
from tests import tiny
from tests.model.delta_vlm.tiny import FUSIONS, tiny_bert, tiny_config, tiny_model
from tests.tiny import random_image, tiny_tokenizer

ROOT = Path(__file__).parents[2]
Make = Callable[..., TrainConfig]
DIALOGUE = (
    ("Did anything change?", "Yes."),
    ("How many roads?", "1 road."),
    ("Describe it in one sentence, with all that was said.", "a road is built"),
)
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
"""A Q-Former without dropout, for runs that are compared with one another."""


def records() -> list[dict[str, Any]]:
    """Eight records on five pairs: captions, single questions of the same pair, a dialogue."""

    def row(uid: str, pair: int, **fields: Any) -> dict[str, Any]:
        return {"uid": uid, "img1_path": f"{pair}.png", "img2_path": f"{(pair + 1) % 8}.png", **fields}

    return [
        row("caption", 0, change_caption=["a road is built", "a new road"]),
        row("binary", 0, task="binary", conversation=[DIALOGUE[0]]),
        row("count", 0, task="count", conversation=[("How many?", "2 roads.")]),
        row("dialog", 1, task="dialog", conversation=DIALOGUE),
        row("open", 2, task="open", conversation=[("What?", "many trees are gone")]),
        row("same", 3, change_caption=["the scene is the same as before"]),
        row("no", 3, task="binary", conversation=[("Did anything change?", "No.")]),
        row("last", 4, task="count", conversation=[("How many?", "no roads.")]),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeltaVLM whose language model rests, one without any dropout, and records with their images."""
    folder = tmp_path_factory.mktemp("delta")
    for name, more in (
        ("base", {}),
        ("still", {"fusion": {"kind": "csrm", "dropout": 0.0, "init": "default"}}),
    ):
        former = {**tiny_config().qformer_config.to_dict(), **(STILL if more else {})}
        model, processor = tiny_model(**more, qformer_config=former)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    for i in range(8):
        random_image(i).save(folder / f"{i}.png")
    (folder / "data.json").write_text(json.dumps(records()))
    return folder


@pytest.fixture
def make_run(folder: Path, tmp_path: Path) -> Make:
    def make(out: str = "out", **fields: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "model": str(folder / "base"),
            "data": folder / "data.json",
            "output_dir": tmp_path / out,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "seed": 3,
            "warmup_ratio": 0.0,
            "logging_steps": 1,
        }
        return TrainConfig.from_dict(defaults | fields)

    return make


@pytest.fixture(scope="module")
def made() -> tuple[DeltaVLMForConditionalGeneration, DeltaVLMProcessor]:
    return tiny_model()


def weights(folder: Path) -> dict[str, Tensor]:
    model: DeltaVLMForConditionalGeneration = DeltaVLMForConditionalGeneration.from_pretrained(folder)
    return model.state_dict()


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def logged(run: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.output_dir / "log.jsonl").read_text().splitlines()]


def collated(
    processor: DeltaVLMProcessor, data: PairDataset, numbers: list[int], packed: bool = True
) -> dict[str, Any]:
    config = DeltaVLMConfig()
    collate = BranchCollator(**family_of(config).fillings(processor), packed=packed)
    return collate([data[i] for i in numbers])


def forward(model: DeltaVLMForConditionalGeneration, batch: dict[str, Any]) -> Any:
    return model(**{name: value for name, value in batch.items() if name not in ("uids", "skipped")})


# --- samples ----------------------------------------------------------------------------------------


def test_a_pair_is_one_sample_with_a_row_for_each_question(
    made: tuple[DeltaVLMForConditionalGeneration, DeltaVLMProcessor], folder: Path
) -> None:
    _, processor = made
    data = PairDataset(read_records(folder / "data.json"), folder, processor)
    assert len(data) == 5
    rows = data[0].rows
    assert [len(row.answers) for row in rows] == [2, 1, 1]  # both captions answer one question
    assert (data[0].uid, data[0].also) == ("caption", ("binary", "count"))
    words = [processor.tokenizer.decode(list(row.prompt)[processor.num_query_tokens :]) for row in rows]
    assert words == [f"<s>Question: {q} Answer:" for q in (QUESTION, "Did anything change?", "How many?")]
    third = data[1].rows[2]
    told = processor.tokenizer.decode(list(third.prompt)[processor.num_query_tokens :])
    assert told == "<s>" + "".join(f"Question: {q} Answer: {a} " for q, a in DIALOGUE[:2]) + (
        f"Question: {DIALOGUE[2][0]} Answer:"  # gold answers as history, the current question in full
    )
    assert list(third.reading) == processor.qformer_ids(DIALOGUE[2][0], DIALOGUE[:2])
    for row in (*rows, *data[1].rows):
        for ids, labels in row.answers:  # the answer's tokens and the end, nothing else
            assert list(ids) == list(labels) and ids[-1] == processor.eos_token_id
        assert set(row.prompt_labels) == {IGNORE}
    assert [ids for ids, _ in rows[1].answers] == [
        [*processor.tokenizer("Yes.")["input_ids"], processor.eos_token_id]
    ]


def test_rounds_are_samples_of_their_own_where_that_is_asked_for(
    made: tuple[DeltaVLMForConditionalGeneration, DeltaVLMProcessor], folder: Path
) -> None:
    _, processor = made
    told = read_records(folder / "data.json")
    data = PairDataset(told, folder, processor, one_pass=False)
    assert len(data) == 11  # 3 captions, 5 questions, 3 rounds
    assert all(len(data[i].rows) == 1 and len(data[i].answers) == 1 for i in range(len(data)))
    drawn = PairDataset(told, folder, processor, captions="random", seed=1)
    asked = {tuple(drawn[Place(3, epoch)].prompt) for epoch in range(12)}
    assert len(drawn) == 8 and asked == {tuple(data[i].prompt) for i in (4, 5, 6)}


@pytest.mark.parametrize(
    ("fields", "samples"), [({}, 5), ({"one_pass": False}, 11), ({"captions": "random"}, 8)], ids=str
)
def test_the_plan_counts_the_samples_that_there_are(
    fields: dict[str, Any], samples: int, make_run: Make, folder: Path
) -> None:
    run = make_run(**fields)
    _, processor = tiny_model()
    data = PairDataset(
        read_records(run.data), folder, processor, captions=run.captions, one_pass=run.one_pass
    )  # type: ignore[arg-type]
    steps = -(-samples // 2)
    assert len(data) == samples
    assert f"{samples} samples, {steps} steps an epoch, {2 * steps} steps in all" in plan(run)


def test_one_pass_has_the_loss_and_the_gradients_of_separate_samples(folder: Path) -> None:
    model, processor = tiny_model(fusion=FUSIONS["csrm"])
    told = read_records(folder / "data.json")
    one_pass = PairDataset(told, folder, processor)
    rows = collated(processor, one_pass, [0, 1, 2, 3, 4], packed=False)
    together = collated(processor, one_pass, [0, 1, 2, 3, 4])
    data = PairDataset(told, folder, processor, one_pass=False)
    apart = collated(processor, data, list(range(len(data))), packed=False)
    assert together["pixel_values"].shape[0] == 5 and apart["pixel_values"].shape[0] == 11
    assert rows["pair_index"].tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 3, 4] and "pair_index" not in apart
    assert sorted(together["pair_index"].tolist()) == rows["pair_index"].tolist()
    assert len(together["input_ids"]) < len(rows["input_ids"]) == 10
    found = []
    for batch in (together, rows, apart):
        model.zero_grad()
        loss = forward(model, batch).loss
        loss.backward()
        found.append((loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    *several, (alone, wanted) = found
    for loss, grads in several:
        assert torch.allclose(loss, alone, atol=1e-5) and grads.keys() == wanted.keys() and len(grads) > 50
        for name, grad in grads.items():
            torch.testing.assert_close(grad, wanted[name], atol=1e-4, rtol=1e-3, msg=name)


def test_long_prompts_lose_their_oldest_words_and_never_the_question(folder: Path) -> None:
    _, processor = tiny_model(max_prompt_tokens=60)
    rounds = [("what is there to be seen " * 4, "very many trees " * 4), *DIALOGUE]
    record = Record(uid="x", img1_path="0.png", img2_path="1.png", conversation=tuple(rounds))
    for row, (question, _) in zip(PairDataset([record], folder, processor)[0].rows, rounds, strict=True):
        told = list(row.prompt)[processor.num_query_tokens :]
        text = processor.tokenizer.decode(told)
        assert text.endswith(f"Question: {question.strip()} Answer:")
        assert len(told) <= 60 or text.startswith("<s>Question: what is there")


def test_blank_places_teach_nothing_and_reach_every_weight(folder: Path) -> None:
    model, processor = tiny_model()
    data = PairDataset(read_records(folder / "data.json"), folder, processor)
    batch = BranchCollator(processor.pad_token_id)([data[Place(FILLER)]])
    assert (batch["labels"] == IGNORE).all() and batch["uids"] == []
    forward(model, {**batch, "num_items_in_batch": 3}).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None and not grad.any() for grad in grads.values())


def test_labels_of_the_release_are_for_the_other_family(folder: Path) -> None:
    _, processor = tiny_model()
    with pytest.raises(ConfigError, match="labels: answer"):
        PairDataset(read_records(folder / "data.json"), folder, processor, labels="release")


def test_a_change_vlm_reads_all_tasks_of_a_pair_in_one_row(folder: Path) -> None:
    """A dialogue is one branch with all its answers; so the row's loss is that of its parts, each by itself."""
    model, processor = tiny.tiny_model()
    told = [row for row in records() if row["img1_path"] == "0.png"]
    told.append({**records()[3], "img1_path": "0.png", "img2_path": "1.png"})
    rows = [
        Record(
            uid=row["uid"], img1_path="0.png", img2_path="1.png",
            change_caption=tuple(row.get("change_caption", ())), conversation=tuple(row.get("conversation", ())),
        )
        for row in told
    ]  # fmt: skip
    data = PairDataset(rows, folder, processor)
    (sample,) = (data[i] for i in range(len(data)))
    assert len(sample.rows) == 1 and len(sample.answers) == 5
    learned = [token for token, label in zip(*sample.answers[-1], strict=True) if label != IGNORE]
    text = processor.tokenizer.decode(learned)
    assert all(answer in text for _, answer in DIALOGUE) and DIALOGUE[1][0] not in text
    collate = BranchCollator(processor.tokenizer.pad_token_id)
    apart = PairDataset(rows, folder, processor, one_pass=False)
    both = [collate([data[0]]), collate([apart[i] for i in range(len(apart))])]
    with torch.no_grad():
        one, other = (forward(model, batch).loss for batch in both)
    assert len(apart) == 5 and torch.allclose(one, other, atol=1e-5)


# --- what learns ------------------------------------------------------------------------------------


def tuned(name: str) -> bool:
    """Of the four blocks of the encoder the last two, its last norm, and all between it and the language model."""
    inside = (
        "encoder.layers.2.",
        "encoder.layers.3.",
        "post_layernorm",
        "fusion",
        "qformer",
        "query_tokens",
        "projector",
    )
    return any(part in name for part in inside)


def test_by_default_all_learns_that_the_model_tunes_and_the_rest_stays_bitwise(
    make_run: Make, folder: Path
) -> None:
    base = weights(folder / "base")
    run = make_run(num_train_epochs=4)
    train(run)
    after = weights(run.output_dir)
    assert after.keys() == base.keys()
    still = {name for name in base if torch.equal(base[name], after[name])}
    # what the last layer makes of the question's own places is read by nobody
    last = ("layer.2.intermediate.dense", "layer.2.output.")
    silent = {name for name in still if tuned(name) and not any(part in name for part in last)}
    assert {name for name in still if not tuned(name)} == {name for name in base if not tuned(name)}
    assert not silent
    assert {part_of(name) for name in base if name not in still} == {
        "tower",
        "fusion",
        "qformer",
        "projector",
    }


def test_less_learns_where_that_is_said_and_more_where_the_model_is_told(
    make_run: Make, folder: Path
) -> None:
    base = weights(folder / "base")

    def moved(out: str, **fields: Any) -> set[str]:
        run = make_run(out, max_steps=2, **fields)
        train(run)
        return {name for name, value in weights(run.output_dir).items() if not torch.equal(value, base[name])}

    assert {part_of(name) for name in moved("a", learn=["qformer", "projector"])} == {"qformer", "projector"}
    assert "model.query_tokens" in moved("b", learn=["qformer"])
    more = moved("c", model_settings={"tune_language_model": True, "tune_vision_blocks": 3})
    assert {part_of(name) for name in more} == {"tower", "fusion", "qformer", "projector", "llm"}
    blocks = {name.split("layers.")[1][0] for name in more if "vision_tower.encoder" in name}
    assert blocks == {"1", "2", "3"}


def test_training_and_answering_ask_in_one_way(make_run: Make, folder: Path) -> None:
    """The style that a run sets is kept in its folder, and the captioner asks by it."""
    run = make_run(max_steps=1, model_settings={"prompt_style": "reference", "qformer_text": "question"})
    train(run)
    captioner = ChangeCaptioner.from_pretrained(run.output_dir, device="cpu")
    processor = captioner.processor
    assert isinstance(processor, DeltaVLMProcessor)
    told = captioner.prompt_ids("How many ROADS?", DIALOGUE[:1])[processor.num_query_tokens :]
    assert processor.tokenizer.decode(told) == "<s>q did anything change? a yes q how many roads?"
    assert processor.qformer_ids("How many ROADS?", DIALOGUE[:1]) == processor.qformer_ids("how many roads?")
    _, same = load_start(run, torch.float32)
    sample = PairDataset(read_records(folder / "data.json"), folder, same)[1]  # type: ignore[arg-type]
    assert list(sample.rows[1].prompt) == captioner.prompt_ids(DIALOGUE[1][0], DIALOGUE[:1])


@pytest.mark.parametrize("kind", FUSIONS)
def test_every_fusion_starts_anew_learns_and_answers(kind: str, make_run: Make, folder: Path) -> None:
    wanted = FUSIONS[kind] if isinstance(FUSIONS[kind], dict) else {"kind": FUSIONS[kind]}
    run = make_run(fusion=wanted, max_steps=2)
    train(run)
    captioner = ChangeCaptioner.from_pretrained(run.output_dir, device="cpu")
    assert captioner.model.config.fusion["kind"] == wanted["kind"]
    assert captioner.ask(folder / "0.png", folder / "1.png", "How many?", max_new_tokens=4).tokens


@pytest.mark.parametrize("kind", ["csrm", "csrm_paper", "concat", "difference", None])
def test_every_fusion_of_the_other_family_too(
    kind: str | None, make_run: Make, folder: Path, tmp_path: Path
) -> None:
    model, processor = tiny.tiny_model(fusion=False, vision_layers=[1, 3])
    model.save_pretrained(tmp_path / "change")
    processor.save_pretrained(tmp_path / "change")
    small = tiny.DIFFERENCE if kind == "difference" else {"kind": kind}
    run = make_run(model=str(tmp_path / "change"), fusion=small if kind else None, max_steps=2)
    train(run)
    captioner = ChangeCaptioner.from_pretrained(run.output_dir, device="cpu")
    assert (captioner.model.config.fusion or {}).get("kind") == kind
    said = captioner.ask(
        folder / "0.png", folder / "1.png", "How many?", history=DIALOGUE[:1], max_new_tokens=4
    )
    assert said.tokens


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"learn": ["llm"]}, "model_settings.tune_language_model"),
        ({"learn": ["eyes"]}, "unknown parts"),
        ({"model_settings": {"hidden_size": 3}}, "tune_vision_blocks"),
        ({"model_settings": {"tune_vision_blocks": 9}}, "4 blocks"),
        ({"vision_layers": [1]}, "vision_layers"),
        ({"place_weight": 1.0, "learn": ["qformer"]}, "tower and fusion"),
        ({"adapter": {"kind": "lora"}}, "adapter"),
        ({"labels": "release"}, "labels"),
        ({"fusion": None}, "needs a fusion"),
        ({"fusion": {"kind": "glue"}}, "glue"),
    ],
    ids=str,
)
def test_what_a_deltavlm_does_not_have_is_refused(fields: dict[str, Any], said: str, make_run: Make) -> None:
    with pytest.raises(ConfigError, match=said):
        train(make_run(max_steps=1, **fields))


def test_what_captions_answer_is_learned_and_kept(make_run: Make, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("Please, say what is new: all?")
    for family in ("delta", "change"):
        start, out = tmp_path / family, tmp_path / f"{family}_out"
        if family == "change":
            model, processor = tiny.tiny_model()
            model.save_pretrained(start)
            processor.save_pretrained(start)
        else:
            shutil.copytree(folder / "base", start)
        given = {"model": str(start), "max_steps": 1, "output_dir": out}
        if family == "change":
            given["learn"] = ["projector"]
        train(make_run(**given, question={"file": str(tmp_path / "q.txt")}))
        captioner = ChangeCaptioner.from_pretrained(out, device="cpu")
        assert captioner.caption_question == "Please, say what is new: all?"
        data = PairDataset(read_records(folder / "data.json"), folder, captioner.processor)
        row = data[0].rows[0] if family == "delta" else data[0]  # which has a caption's branch first
        tokenizer = captioner.processor.tokenizer
        read = tokenizer.decode([i for i in [*row.prompt, *row.answers[0][0]] if i < len(tokenizer)])
        assert "Please, say what is new: all?" in read
        # what goes on from there asks the same, and an evaluation of it too
        beside = {"data": folder / "captions.json", "batch_size": 2, "samples": 0}
        (folder / "captions.json").write_text(json.dumps(records()[:1]))
        given |= {"model": str(out), "output_dir": tmp_path / f"{family}_more"}
        train(make_run(**given, evaluation={**beside, "metric": "BLEU-4", "every": 1}))
        told = json.loads((tmp_path / f"{family}_more/evaluation/step-1/metrics.json").read_text())
        assert told["run"]["question"] == "Please, say what is new: all?"


def test_masks_and_places_teach_what_the_qformer_reads(make_run: Make, folder: Path, tmp_path: Path) -> None:
    for i in range(8):
        shutil.copy(folder / f"{i}.png", tmp_path)
        levels = np.zeros((16, 16), np.uint8)
        levels[:8, :8], levels[8:, 8:] = (128, 255) if i % 2 else (255, 128)
        Image.fromarray(levels).save(tmp_path / f"mask{i}.png")
    rows = [{**row, "mask_path": f"mask{row['img1_path']}"} for row in records()]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    beside = {"mask_weight": 5.0, "mask_levels": [128, 255], "object_weight": 2.0, "place_weight": 0.5}
    given = {"model": str(folder / "still"), "data": tmp_path / "data.json", "per_device_train_batch_size": 5}
    # five pairs in fewer rows: the losses beside the words are means over pairs all the same
    once = {**given, "max_steps": 1}
    train(plain := make_run("plain", **once))
    train(both := make_run("both", **once, **beside))
    (row,) = (row for row in logged(both) if "mask_loss" in row)
    more = 5 * row["mask_loss"] + 2 * row["object_loss"] + 0.5 * row["place_loss"]
    assert row["loss"] - losses(plain.output_dir)[1] == pytest.approx(more, rel=1e-3)
    assert any(
        not torch.equal(value, weights(plain.output_dir)[name])
        for name, value in weights(both.output_dir).items()
        if name.startswith("model.fusion.")
    )
    train(
        run := make_run(
            **given,
            **beside,
            num_train_epochs=40,
            learning_rate=4e-3,
            model_settings={"tune_vision_blocks": 1},
        )
    )
    found = [row for row in logged(run) if "mask_loss" in row]
    assert found[-1]["mask_loss"] < 0.7 * found[0]["mask_loss"]
    assert found[-1]["object_loss"] < 0.7 * found[0]["object_loss"]
    assert found[-1]["place_loss"] < 0.9 * found[0]["place_loss"]


def test_what_a_change_vlm_does_not_have_is_refused(make_run: Make, tmp_path: Path) -> None:
    model, processor = tiny.tiny_model()
    model.save_pretrained(tmp_path / "change")
    processor.save_pretrained(tmp_path / "change")
    for fields, said in (({"learn": ["qformer"]}, "qformer"), ({"model_settings": {"a": 1}}, "DeltaVLMs")):
        with pytest.raises(ConfigError, match=said):
            train(make_run(model=str(tmp_path / "change"), max_steps=1, **fields))


# --- broken off, and on several processes -----------------------------------------------------------


def test_taken_up_it_is_as_never_broken_off(
    make_run: Make, stop_at: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise, with dropout in CSRM and in the Q-Former, and over the end of an epoch."""
    run, broken = (make_run(out, max_steps=5) for out in ("whole", "broken"))
    train(run)
    with monkeypatch.context(), pytest.raises(Interrupted, match="step 2 is saved"):
        stop_at(1)
        train(broken)
    monkeypatch.undo()
    assert set(losses(broken.output_dir)) == {1, 2} and not (broken.output_dir / FINISHED).exists()
    before = weights(Path(run.model) if isinstance(run.model, str) else Path())
    train(broken)
    one, other = weights(run.output_dir), weights(broken.output_dir)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(one[name], before[name]) for name in one if not tuned(name))
    assert losses(broken.output_dir) == losses(run.output_dir)


def launch(processes: int, config: Path, said: Any = subprocess.PIPE) -> "subprocess.Popen[str]":
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
    ]
    return subprocess.Popen(
        [*words, "-m", "llava.train", "--config", str(config)], cwd=ROOT, text=True, stdout=said, stderr=said,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, start_new_session=True,
    )  # fmt: skip


def torchrun(processes: int, config: Path) -> None:
    running = launch(processes, config)
    try:
        _, told = running.communicate(timeout=240)
    finally:
        kill(running)
    assert running.returncode == 0, told[-3000:]


def kill(running: "subprocess.Popen[str]") -> None:
    """The launcher and its ranks, each of which has a session of its own, as a machine that goes down."""
    if running.poll() is None:
        launcher = psutil.Process(running.pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        running.wait(60)


def without_bases(whole: Path, out: Path) -> Path:
    """The same model as a folder that leaves its frozen weights to its base models."""
    model = DeltaVLMForConditionalGeneration.from_pretrained(whole)
    language = AutoModelForCausalLM.from_config(model.config.text_config)
    language.get_decoder().load_state_dict(model.model.language_model.state_dict())
    language.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    language.save_pretrained(out / "language")
    model.config.base_models = {"vision": str(whole), "language": str(out / "language")}
    model.save_pretrained(out / "part")
    DeltaVLMProcessor.from_pretrained(whole).save_pretrained(out / "part")
    assert not any("language_model" in name for name in load_file(out / "part" / "model.safetensors"))
    return out / "part"


@pytest.mark.parametrize("spread", [None, "zero2", "zero3"])
def test_two_processes_learn_what_one_does(
    spread: str | None, make_run: Make, folder: Path, tmp_path: Path
) -> None:
    """Five pairs with unequal numbers of questions on two ranks: the last batch of one of them is a filler."""
    deepspeed = None if spread is None else str(ROOT / f"scripts/deepspeed/{spread}.json")
    start = folder / "still" if spread != "zero3" else without_bases(folder / "still", tmp_path)
    # plain descent: Adam would make much of the rounding of gradients that are zero, such as those of keys' biases
    still = {"model": str(start), "num_train_epochs": 2, "optim": "sgd", "learning_rate": 0.05}
    one = make_run("one", per_device_train_batch_size=2, **still)
    two = make_run("two", per_device_train_batch_size=1, **still, deepspeed=deepspeed)
    train(one)
    (tmp_path / "two.yaml").write_text(two.to_yaml())
    torchrun(2, tmp_path / "two.yaml")
    assert len(losses(one.output_dir)) == 6
    assert losses(two.output_dir) == pytest.approx(losses(one.output_dir), rel=1e-4)
    first, second = weights(one.output_dir), weights(two.output_dir)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-5, rtol=1e-4, msg=name)
    before = weights(folder / "still")
    assert all(torch.equal(value, before[name]) for name, value in second.items() if not tuned(name))
    assert any(not torch.equal(value, before[name]) for name, value in second.items())


@pytest.mark.parametrize("spread", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_two_processes_that_were_killed_end_as_if_they_had_not_been(
    spread: str, make_run: Make, folder: Path, tmp_path: Path
) -> None:
    """Bitwise, with dropout, behind the first epoch, from a checkpoint that leaves out what its base models hold."""
    more = {"model": str(without_bases(folder / "base", tmp_path)), "num_train_epochs": 6, "save_steps": 4}
    more |= {"per_device_train_batch_size": 1, "deepspeed": str(ROOT / f"scripts/deepspeed/{spread}.json")}
    whole, broken = (make_run(out, **more) for out in ("whole", "broken"))
    for run in (whole, broken):
        (tmp_path / f"{run.output_dir.name}.yaml").write_text(run.to_yaml())
    torchrun(2, tmp_path / "whole.yaml")
    with (tmp_path / "said.txt").open("w") as said:
        running = launch(2, tmp_path / "broken.yaml", said)
    try:
        ends = time.monotonic() + 240
        while not (broken.output_dir / "checkpoint-4" / WHOLE).exists() and running.poll() is None:
            assert time.monotonic() < ends
            time.sleep(0.01)
    finally:
        kill(running)
    assert any(broken.output_dir.glob(f"checkpoint-*/{WHOLE}")), (tmp_path / "said.txt").read_text()[-3000:]
    assert not (broken.output_dir / FINISHED).exists()
    written = logged(broken)[:4]
    torchrun(2, tmp_path / "broken.yaml")
    assert logged(broken)[:4] == written and "pairs_per_second" in written[0]  # its own speed: not begun anew
    assert len(losses(whole.output_dir)) == 18 and losses(broken.output_dir) == losses(whole.output_dir)
    one, other = (load_file(run.output_dir / "model.safetensors") for run in (whole, broken))
    assert one.keys() == other.keys() and all(tuned(name) for name in one)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# --- new models -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An InstructBLIP and a language model, as they lie on the hub, in small."""
    folder = tmp_path_factory.mktemp("parts")
    config = tiny_config()
    set_seed(1)
    whole = InstructBlipForConditionalGeneration(
        InstructBlipConfig(
            vision_config={**config.vision_config.to_dict(), "initializer_range": 0.02},
            qformer_config=config.qformer_config.to_dict(),
            text_config=config.text_config.to_dict(),
            num_query_tokens=4,
        )
    )
    torch.nn.init.normal_(whole.query_tokens)
    whole.save_pretrained(folder / "instructblip")
    tiny_bert().save_pretrained(folder / "instructblip" / "qformer_tokenizer")
    whole.language_model.save_pretrained(folder / "llm")
    tiny_tokenizer("llama").save_pretrained(folder / "llm")
    return {
        "tower": str(folder / "instructblip"),
        "qformer": str(folder / "instructblip"),
        "llm": str(folder / "llm"),
    }


def test_a_new_model_takes_its_weights_from_its_parts_and_saves_what_it_learned(
    parts: dict[str, str], make_run: Make, folder: Path
) -> None:
    run = make_run(model=parts, save_steps=2, max_steps=2)
    for dtype in (torch.bfloat16, torch.float32):
        model, processor = load_start(run, dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert {b.dtype for name, b in model.named_buffers() if "inv_freq" in name} == {torch.float32}
    source = InstructBlipForConditionalGeneration.from_pretrained(parts["tower"]).state_dict()
    ours = model.state_dict()
    named = {
        "vision_model.": "model.vision_tower.",
        "qformer.": "model.qformer.",
        "query_tokens": "model.query_tokens",
        "language_projection.": "model.projector.",
        "language_model.model.": "model.language_model.",
        "language_model.lm_head": "lm_head",
        "lm_head": "lm_head",
    }
    taken = 0
    for name, value in source.items():
        plain = name.removeprefix("model.")
        old = next((old for old in named if plain.startswith(old)), None)
        assert old is not None, name
        assert torch.equal(ours[plain.replace(old, named[old], 1)], value), name
        taken += 1
    assert taken > 100 and model.config.num_query_tokens == 4
    assert isinstance(processor, DeltaVLMProcessor)
    marks = processor.tokenizer.convert_ids_to_tokens([processor.bos_token_id, processor.eos_token_id])
    assert marks == ["<s>", "</s>"]
    train(run)
    held = load_file(run.output_dir / "model.safetensors")
    assert held and all(tuned(name) for name in held)
    saved = load_file(run.output_dir / "checkpoint-2" / "model.safetensors")
    assert saved.keys() == held.keys()
    captioner = ChangeCaptioner.from_pretrained(run.output_dir, device="cpu")
    assert torch.equal(
        captioner.model.lm_head.weight,
        source["lm_head.weight" if "lm_head.weight" in source else "language_model.lm_head.weight"],
    )
    again = make_run(model=parts, save_steps=2, max_steps=3)
    (again.output_dir / FINISHED).unlink()
    (again.output_dir / "train.yaml").write_text(again.to_yaml())
    train(again)  # from a checkpoint that leaves out what its bases hold
    assert list(losses(again.output_dir)) == [1, 2, 3]
    assert captioner.ask(folder / "0.png", folder / "1.png", "How many?", max_new_tokens=3).tokens


def test_a_language_model_at_rest_is_held_in_half_precision_if_it_is_not_saved(
    parts: dict[str, str], make_run: Make, folder: Path
) -> None:
    run = make_run(model=parts, bf16=True, max_steps=2)
    trained = train(run)
    # rounded frequencies would turn far positions by more than a radian
    assert {b.dtype for name, b in trained.named_buffers() if "inv_freq" in name} == {torch.float32}
    kinds = {part_of(name): p.dtype for name, p in trained.named_parameters()}
    assert kinds.pop("llm") == torch.bfloat16 and set(kinds.values()) == {torch.float32}
    assert all(tuned(name) for name in load_file(run.output_dir / "model.safetensors"))
    assert all(np.isfinite(value) for value in losses(run.output_dir).values())
    whole = make_run("whole", bf16=True, max_steps=2)  # of no base models: all is written again
    train(whole)
    base, after = weights(folder / "base"), weights(whole.output_dir)
    assert all(torch.equal(value, after[name]) for name, value in base.items() if not tuned(name))


@pytest.mark.parametrize("own", [True, False])
def test_the_room_that_a_checkpoint_is_said_to_need(
    own: bool, parts: dict[str, str], make_run: Make, folder: Path
) -> None:
    """That which is written: frozen weights only where no base model holds them."""
    run = make_run(model=str(folder / "base") if own else parts, save_steps=1, max_steps=1)
    trainer, _, _ = prepare(run, training_arguments(run), Signals())
    told = trainer._checkpoint_bytes()
    trainer.train()
    written = [run.output_dir / "checkpoint-1" / name for name in ("model.safetensors", "optimizer.pt")]
    size = sum(path.stat().st_size for path in written)
    assert 0.9 * size < told < 1.1 * size
    assert any(name.startswith("lm_head") for name in load_file(written[0])) == own


def test_parts_that_do_not_fit_are_named(parts: dict[str, str], make_run: Make, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="nowhere"):
        load_start(make_run(model={**parts, "tower": str(tmp_path / "nowhere")}), torch.float32)
    with pytest.raises(ConfigError, match="no vision_config"):
        load_start(make_run(model={**parts, "tower": parts["llm"]}), torch.float32)
    with pytest.raises(ConfigError, match=r"model\.settings.*colour"):
        load_start(make_run(model={**parts, "settings": {"colour": 1}}), torch.float32)
    other = tmp_path / "other"
    shutil.copytree(parts["qformer"], other)
    config = json.loads((other / "config.json").read_text())
    config["qformer_config"]["num_hidden_layers"] = 4
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"qformer.*layer\.3"):
        load_start(make_run(model={**parts, "qformer": str(other)}), torch.float32)
    with pytest.raises(ConfigError, match="deltavlm-tiny"):
        make_run(model={"preset": "deltavlm-huge"})
    with pytest.raises(ConfigError, match="unless there is a qformer"):
        make_run(model={"tower": {"hidden_size": 3}, "llm": "x"})


def test_the_small_preset_learns_as_a_whole_and_goes_through_a_file(make_run: Make, tmp_path: Path) -> None:
    run = make_run(model={"preset": "deltavlm-tiny", "settings": {"num_query_tokens": 3}}, max_steps=1)
    assert TrainConfig.from_dict(yaml.safe_load(run.to_yaml())) == run
    model, processor = load_start(run, torch.float32)
    config = model.config
    assert isinstance(processor, DeltaVLMProcessor) and config.num_query_tokens == 3
    assert (config.vision_config.image_size, config.vision_config.num_hidden_layers) == (56, 4)
    assert config.tune_language_model and config.base_models is None
    for text in ("There are 2 new roads.", "Ärger, 'naïve' [top-left]!"):  # anything can be said
        assert processor.tokenizer.decode(processor.answer_ids(text)[:-1]) == text
    assert processor.qformer_tokenizer.unk_token_id not in processor.qformer_ids(
        "Describe it, in ONE sentence?"
    )
    text = plan(run)
    assert "frozen" not in text and "llm" in text


# --- it learns --------------------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_sixteen_pairs_are_learned_by_heart(make_run: Make, tmp_path: Path, one_thread: None) -> None:
    """Of the synthetic world, with all that changes its light; changed or not, and how many roads and buildings."""
    export_tasks({"train": 16}, tmp_path, seed=3, size=112)
    records = [r for r in read_records(tmp_path / "train.jsonl") if r.task in ("binary", "count")]
    assert len(records) == 32 and len({r.conversation[0][1] for r in records if r.task == "count"}) > 6
    (tmp_path / "train.json").write_text(json.dumps([record.to_dict() for record in records]))
    run = make_run(
        model={"preset": "deltavlm-tiny"}, data=tmp_path / "train.json", num_train_epochs=1000, max_steps=220,
        per_device_train_batch_size=16, learning_rate=2e-3, warmup_ratio=0.05, cache_images=True, logging_steps=55,
        part_learning_rate={"llm": 4e-3},
    )  # fmt: skip
    train(run)
    captioner = ChangeCaptioner.from_pretrained(run.output_dir, device="cpu")
    pairs = [record.paths(tmp_path) for record in records]
    asked = [record.conversation[0][0] for record in records]
    said = captioner.caption_batch(pairs, 32, question=asked, max_new_tokens=16)
    assert [answer.text for answer in said] == [record.conversation[0][1] for record in records]
    swapped = captioner.caption_batch([(b, a) for a, b in pairs], 32, question=asked, max_new_tokens=16)
    assert [a.text for a in swapped] != [a.text for a in said]  # it is the images that it goes by


# --- what ships -------------------------------------------------------------------------------------


def test_the_paper_s_settings_ship(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run = TrainConfig.from_yaml(ROOT / "scripts/configs/deltavlm.yaml")
    assert (run.learning_rate, run.weight_decay, run.pairs_per_step, run.num_train_epochs) == (
        1e-5,
        0.05,
        24,
        30,
    )
    assert (run.lr_scheduler_type, run.warmup_ratio, run.max_grad_norm, run.seed) == ("cosine", 1000, 1.0, 42)
    assert run.fusion == {"kind": "csrm", "dropout": 0.5, "init": "identity"} and not run.one_pass
    for file in (run.data, run.evaluation.data):  # type: ignore[union-attr]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(records()))
    text = plan(run, processes=8)
    assert "253,219,200" in text.split("together")[1].split("\n")[0]  # what learns, at full size
    assert "6,738,415,616 of them in half precision" in text


def test_the_released_code_s_settings_ship(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    run = TrainConfig.from_yaml(ROOT / "scripts/configs/deltavlm_release.yaml")
    paper = TrainConfig.from_yaml(ROOT / "scripts/configs/deltavlm.yaml")
    assert (run.pairs_per_step, run.num_train_epochs, run.warmup_ratio, run.weight_decay) == (
        12,
        50,
        1000,
        0.05,
    )
    assert (run.lr_scheduler_type, run.max_grad_norm, run.evaluation.patience) == ("epoch_cosine", 0, 10)  # type: ignore[union-attr]
    assert run.model.settings == {"tune_vision_blocks": 2, "prompt_style": "reference"}  # type: ignore[union-attr]
    own = {
        "lr_scheduler_type",
        "max_grad_norm",
        "num_train_epochs",
        "pairs_per_step",
        "model",
        "fusion",
        "evaluation",
    }
    told, others = run.to_dict(), paper.to_dict()
    assert {name for name in told if told[name] != others[name]} == own | {"output_dir"}

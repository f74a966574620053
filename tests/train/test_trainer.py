"""Fine-tuning: frozen parts stay, rates go to their parts, the same seed gives the same model, it learns."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainingArguments

from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from llava.train.config import TrainConfig, part_of
from llava.train.trainer import ChangeTrainer, set_learning, train, with_fusion
from tests.tiny import random_image, tiny_model

FUSION = {"kind": "difference", "depth": 1, "head_dim": 8, "mlp_dim": 16}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without fusion, and four pairs with captions."""
    folder = tmp_path_factory.mktemp("train")
    model, processor = tiny_model(fusion=False, vision_layers=[1, 3])
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    rows = []
    for i in range(4):
        random_image(i).save(folder / f"{i}.png")
        rows.append(
            {
                "uid": str(i),
                "img1_path": f"{i}.png",
                "img2_path": "0.png",
                "change_caption": ["a road", "trees"],
            }
        )
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def config(folder: Path, out: str, **fields: object) -> TrainConfig:
    defaults = {
        "epochs": 2,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "fusion": FUSION,
        "seed": 3,
        "warmup_ratio": 0.0,
    }
    paths = {"model": str(folder / "base"), "data": folder / "data.json", "output_dir": folder / out}
    return TrainConfig.from_dict(paths | defaults | fields)


def test_what_is_not_named_stays_bitwise_and_the_rest_moves(run_folder: Path):
    base = ChangeVLMForConditionalGeneration.from_pretrained(run_folder / "base").state_dict()
    train(config(run_folder, "frozen", learn=["fusion", "projector"]))
    trained = ChangeVLMForConditionalGeneration.from_pretrained(run_folder / "frozen")
    assert trained.config.fusion == FUSION
    moved = {part_of(n) for n, v in trained.state_dict().items() if n in base and not torch.equal(v, base[n])}
    assert moved == {"projector"}


def test_the_same_seed_gives_the_same_weights_and_another_does_not(run_folder: Path):
    def weights(out: str, seed: int) -> dict[str, torch.Tensor]:
        train(config(run_folder, out, seed=seed))
        return ChangeVLMForConditionalGeneration.from_pretrained(run_folder / out).state_dict()

    first, again, other = weights("one", 1), weights("two", 1), weights("three", 2)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def test_each_part_has_its_rate_and_vectors_do_not_decay(run_folder: Path, tmp_path: Path):
    model, _ = tiny_model()
    set_learning(model, ["llm", "fusion"])
    run = config(
        run_folder, "rates", learn=["llm", "fusion"], part_learning_rate={"llm": 5e-4}, weight_decay=0.1
    )
    trainer = ChangeTrainer(model, TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True), run=run)
    names = {id(p): n for n, p in model.named_parameters()}
    seen = set()
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            assert group["lr"] == (5e-4 if part_of(name) == "llm" else 1e-3)
            assert group["weight_decay"] == (0.1 if parameter.dim() > 1 else 0.0)
    assert seen == {n for n, _ in model.named_parameters() if part_of(n) in ("llm", "fusion")}


def test_a_fusion_is_put_in_and_taken_out_without_touching_the_rest():
    model, _ = tiny_model(fusion=False, vision_layers=[1, 3])
    fused = with_fusion(model, FUSION)
    assert any(n.startswith("model.fusion.") for n in fused.state_dict())
    bare = with_fusion(fused, None).state_dict()
    assert bare.keys() == model.state_dict().keys()
    assert all(torch.equal(bare[n], v) for n, v in model.state_dict().items())


def test_it_learns_what_it_is_shown(run_folder: Path, capsys: pytest.CaptureFixture[str]):
    trained = train(
        config(run_folder, "learned", epochs=30, captions="random", learning_rate=3e-3, logging_steps=1)
    )
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", capsys.readouterr().out)]
    assert losses[-1] < 0.5 * losses[0]
    assert not trained.training


def test_the_mask_loss_reaches_every_part_and_needs_one_process(run_folder: Path, tmp_path: Path):
    Image.fromarray(np.tile(np.array([0, 255], np.uint8), (8, 4))).save(run_folder / "mask.png")
    rows = json.loads((run_folder / "data.json").read_text())
    (run_folder / "masks.json").write_text(json.dumps([row | {"mask_path": "mask.png"} for row in rows]))
    plain, masked = (
        train(
            config(run_folder, f"masks{weight}", data=run_folder / "masks.json", mask_weight=weight)
        ).state_dict()
        for weight in (0.0, 5.0)
    )
    assert plain.keys() == masked.keys()  # the head is not part of what is saved
    moved = {part_of(name) for name in plain if not torch.equal(plain[name], masked[name])}
    assert moved == {"tower", "fusion", "projector", "llm"}


def test_the_map_head_learns_from_masks_alone(run_folder: Path):
    Image.fromarray(np.tile(np.array([0, 255], np.uint8), (8, 4))).save(run_folder / "mask.png")
    rows = json.loads((run_folder / "data.json").read_text())
    (run_folder / "masks.json").write_text(json.dumps([row | {"mask_path": "mask.png"} for row in rows]))
    fusion = {**FUSION, "map_head": True}
    start, plain, masked = (
        train(
            config(run_folder, f"head{n}", data=run_folder / "masks.json", fusion=fusion, **fields)
        ).state_dict()["model.fusion.map_head.weight"]
        for n, fields in enumerate([{"learn": ["llm"], "mask_weight": 1.0}, {}, {"mask_weight": 5.0}])
    )
    assert torch.equal(start, plain) and not torch.equal(plain, masked)

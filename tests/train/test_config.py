"""Training configs: what is read, and what is refused by name."""

from pathlib import Path

import pytest

from llava.assets import tiny_train_yaml
from llava.errors import ConfigError
from llava.train.config import PARTS, TrainConfig, part_of
from tests.tiny import tiny_model

FIELDS = {"model": "m", "data": "d.jsonl", "output_dir": "o"}


def test_the_shipped_config_reads_and_survives_a_round_trip(tmp_path: Path):
    config = TrainConfig.from_yaml(tiny_train_yaml(), ["seed=7", "fusion=null"])
    assert (config.model, config.seed, config.fusion) == ("tiny-base", 7, None)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert TrainConfig.from_yaml(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 1}, r"unknown fields \['lr'\]; known: model"),
        ({"model": None}, r"missing fields \['model'\]"),
        ({"learn": ["tower", "head"]}, r"unknown parts \['head'\]; known: tower, fusion"),
        ({"learn": []}, "learn is empty"),
        ({"learning_rate": -1}, "learning_rate=-1.0 must be above 0"),
        ({"learning_rate": "fast"}, "field 'learning_rate' is 'fast'"),
        ({"part_learning_rate": {"llm": "x"}}, "field 'part_learning_rate'"),
    ],
)
def test_a_fault_names_the_field(fields: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(FIELDS | fields)


def test_numbers_may_be_written_as_yaml_reads_them_as_text():
    assert (
        TrainConfig.from_dict(FIELDS | {"learning_rate": "1e-5"}).learning_rate == 1e-5
    )  # YAML 1.1 wants 1.0e-5


def test_every_weight_belongs_to_a_part():
    model, _ = tiny_model(image_newline=True)
    assert {part_of(name) for name, _ in model.named_parameters()} == set(PARTS)
    with pytest.raises(StopIteration):
        part_of("something.else")

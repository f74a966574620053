"""`llava export` and `llava info`."""

import json
from pathlib import Path

import pytest

from llava.captioner import ChangeCaptioner
from llava.cli import main
from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from llava.model.processing import ChangeVLMProcessor
from tests.tiny import random_pair, tiny_config, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose fusion has the one head size that the release's layout knows."""
    folder = tmp_path_factory.mktemp("model")
    config = tiny_config()
    config.vision_config.hidden_size = 128
    config.fusion = {"kind": "difference", "depth": 1, "head_dim": 128, "mlp_dim": 40}
    ChangeVLMForConditionalGeneration(config).save_pretrained(folder)
    ChangeVLMProcessor.for_config(config, tiny_tokenizer()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layout", ["ours", "release"])
def test_an_exported_model_answers_alike(
    model: Path, layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "exported"
    assert main(["export", str(model), str(target), "--layout", layout]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    kind = json.loads((target / "config.json").read_text())["model_type"]
    assert kind == {"ours": "change_vlm", "release": "llava_qwen_cc"}[layout]
    before, after = (ChangeCaptioner.from_pretrained(f, device="cpu") for f in (model, target))
    for seed in range(2):
        texts = [c.caption(*random_pair(seed), max_new_tokens=6).text for c in (before, after)]
        assert texts[0] == texts[1]
    assert main(["export", str(model), str(target), "--layout", layout]) == 1
    assert "is there already and not empty" in capsys.readouterr().err


def test_info_of_a_model_counts_its_parts(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(model), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    loaded = ChangeCaptioner.from_pretrained(model, device="cpu").model
    count = facts["parameters"]
    assert count["all"] == sum(p.numel() for p in loaded.parameters())
    assert count.pop("all") == sum(count.values()) and set(count) >= {"vision_tower", "fusion", "projector"}
    assert facts["layout"] == "ours" and facts["dtype"] == "float32" and facts["tokens an image"] == 16
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    assert main(["info", str(model)]) == 0
    assert "mit" in capsys.readouterr().out


def test_info_of_the_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "transformers" in out and "java" in out and "rasterio" in out


def test_info_of_no_model_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "no-such-model"]) == 1
    assert "no-such-model" in capsys.readouterr().err

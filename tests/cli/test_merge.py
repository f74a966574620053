"""`llava merge`, and an adapter's folder as the model of other commands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava.captioner import ChangeCaptioner
from llava.cli import main
from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from tests.tiny import pair_inputs, random_pair, tiny_model

pytest.importorskip("peft")

from llava.train.adapters import AdapterConfig, add_adapter


def in_double(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Float32 alone would move the logits by more than merging does."""
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A folder with a base and a DoRA adapter on it, and the adapter's logits on two pairs."""
    folder = tmp_path_factory.mktemp("merge")
    model, processor = tiny_model(seed=4)
    for name in ("base", "adapter"):
        processor.save_pretrained(folder / name)
    model.save_pretrained(folder / "base")
    config = AdapterConfig(kind="dora", rank=3, parts=("llm", "tower"))
    adapted = add_adapter(model, config, 0, str(folder / "base")).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        adapted.save_pretrained(folder / "adapter")
        expected = adapted.double()(**in_double(pair_inputs(processor, [0, 1]))).logits
    return folder, expected


def test_a_merged_model_is_a_plain_one_that_answers_alike(
    folders: tuple[Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, expected = folders
    out = tmp_path / "deep" / "merged"
    assert main(["merge", str(folder / "adapter"), str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert {p.name for p in out.iterdir()} == {p.name for p in (folder / "base").iterdir()}
    assert [p.name for p in out.parent.iterdir()] == ["merged"]
    base, merged = (load_file(path / "model.safetensors") for path in (folder / "base", out))
    assert {n: (v.shape, v.dtype) for n, v in merged.items()} == {
        n: (v.shape, v.dtype) for n, v in base.items()
    }
    inputs = in_double(pair_inputs(tiny_model()[1], [0, 1]))
    with torch.no_grad():
        logits = ChangeVLMForConditionalGeneration.from_pretrained(out).double()(**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=3e-5)
    captions = [
        ChangeCaptioner.from_pretrained(path, device="cpu").caption(*random_pair(3), max_new_tokens=6).text
        for path in (folder / "adapter", out)
    ]
    assert captions[0] == captions[1]

    assert main(["merge", str(folder / "adapter"), str(out)]) == 1
    assert "not empty" in capsys.readouterr().err


def test_precision_and_a_base_that_was_moved(
    folders: tuple[Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = folders
    said = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for path in (folder / "adapter").iterdir():
        (adapter / path.name).write_bytes(path.read_bytes())
    (adapter / "adapter_config.json").write_text(
        json.dumps(said | {"base_model_name_or_path": str(tmp_path / "x")})
    )
    out = tmp_path / "merged"
    assert main(["merge", str(adapter), str(out)]) == 1
    error = capsys.readouterr().err
    assert "field base_model_name_or_path" in error and "--base MODEL" in error
    assert not out.exists() and not list(tmp_path.glob("*.part"))
    out.mkdir()  # an empty folder may be there
    base = str(folder / "base")
    assert main(["merge", str(adapter), str(out), "--base", base, "--dtype", "bfloat16"]) == 0
    assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


def test_a_plain_model_is_no_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "tiny", str(tmp_path / "out")]) == 1
    assert "no adapter_config.json" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["caption", "eval"])
def test_other_commands_take_the_adapters_folder(
    command: str, folders: tuple[Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = folders
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    for path, image in zip(paths, random_pair(3), strict=True):
        image.save(path)
    options = ["--model", str(folder / "adapter"), "--max-new-tokens", "6", "--device", "cpu"]
    if command == "caption":
        assert main(["caption", *map(str, paths), *options]) == 0
        text = capsys.readouterr().out.strip()
    else:
        row = {"uid": "u", "img1_path": "0.png", "img2_path": "1.png", "change_caption": ["a road"]}
        (tmp_path / "data.jsonl").write_text(json.dumps(row))
        where = ["--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out")]
        assert main(["eval", *where, *options, "--no-meteor", "--no-report"]) == 0
        text = json.loads((tmp_path / "out" / "predictions.jsonl").read_text())["pred"]
    captioner = ChangeCaptioner.from_pretrained(folder / "adapter", device="cpu")
    assert captioner.caption(*random_pair(3), max_new_tokens=6).text in text


def test_help_needs_neither_torch_nor_peft() -> None:
    code = "import sys; from llava.cli import build_parser; build_parser(['merge']); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"

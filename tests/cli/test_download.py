"""`llava download` and `llava import`, as typed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava import cli, hub
from tests.model.layouts import Sizes, write_release
from tests.test_hub import REPO, WEIGHTS, Hub, checkpoint, own_home, server

__all__ = ["checkpoint", "own_home", "server"]  # fixtures


def test_the_list_is_aligned_and_says_what_is_here(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.import_checkpoint(checkpoint, "ccexpert-0.5b")
    hub.import_checkpoint(checkpoint, "mine")
    assert cli.main(["download", "--list"]) == 0
    rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    column = rows[0].index("STATE")
    states = {row.split()[0]: row[column:].split("  ")[0] for row in rows[1:]}
    assert states.keys() == {*hub.RELEASES, "mine"}
    assert (states["ccexpert-0.5b"], states["ccexpert-7b"]) == ("in cache", "by hand")
    assert (states["mine"], states["siglip-so400m-384"]) == ("in cache", "not fetched")


def test_the_list_as_json_holds_the_published_scores(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["download", "--list", "--json"]) == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries["ccexpert-7b"]["scores"]["sm"] == 81.80
    assert entries["ccexpert-7b"]["repo"] is None
    assert entries["llava-onevision-0.5b"]["folder"] is None


@pytest.mark.parametrize("arguments", [[], ["name", "--list"]])
def test_wrong_usage_is_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["download", *arguments])
    assert stop.value.code == 2


def test_an_unknown_name_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["download", "siglip"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("llava download: unknown model 'siglip'; did you mean siglip-so400m-384?")


def test_the_variables_of_the_hub_are_obeyed(server: Hub, tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads them when it is imported."""
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "hf home"),
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "secret",
    }
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-m", "llava", "download", REPO]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(tmp_path / "hf home" / "hub")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert server.tokens == {"Bearer secret"}


def test_an_import_prints_the_folder_and_how_to_use_it(
    tmp_path: Path, own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = write_release(tmp_path / "CCExpert_0.5b", Sizes())
    (tmp_path / "CCExpert_0.5b" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (tmp_path / "CCExpert_0.5b" / "tokenizer_config.json").write_text("{}")
    assert cli.main(["import", str(tmp_path / "CCExpert_0.5b")]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(own_home / "models" / "ccexpert-0.5b")
    assert "--model ccexpert-0.5b" in captured.err

    del weights["model.mm_projector.0.weight"]
    write_release(tmp_path / "CCExpert_0.5b", Sizes(), weights)
    assert cli.main(["import", str(tmp_path / "CCExpert_0.5b"), "--name", "y"]) == 1
    assert "missing (1): model.projector.layers.0.weight" in capsys.readouterr().err
    assert list(hub.imported()) == ["ccexpert-0.5b"]


def test_a_broken_folder_is_status_1(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    assert cli.main(["import", str(checkpoint), "--name", "x"]) == 1
    assert "model-00002-of-00002.safetensors is missing" in capsys.readouterr().err

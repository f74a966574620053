"""`llava caption`: one pair to standard output, many pairs to a file that survives being killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava.captioner import ChangeCaptioner
from llava.cli import main
from llava.cli.model_options import TINY_NOTE
from llava.data.pairs import match_folders, read_pairs
from llava.errors import ConfigError, DataError
from tests.tiny import random_image, random_pair, tiny_model

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "real" / "levir"
Run = Callable[..., int]
RECORDS = [
    {"img1_path": "A/0.png", "img2_path": "B/0.png"},
    {"img1_path": "A/1.png", "img2_path": "B/other.png"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in a folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny, processor = tiny_model()
    tiny.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def caption(model: Path) -> Run:
    def run(*arguments: Any) -> int:
        words = [
            "caption",
            *map(str, arguments),
            "--model",
            str(model),
            "--max-new-tokens",
            "6",
            "--device",
            "cpu",
        ]
        return main(words)

    return run


def draw_pairs(folder: Path, count: int) -> tuple[Path, Path]:
    """`count` pairs of noise as folder/A/0.png and folder/B/0.png, ..."""
    for side in "AB":
        (folder / side).mkdir(parents=True)
    for seed in range(count):
        for side, image in zip("AB", random_pair(seed), strict=True):
            image.save(folder / side / f"{seed}.png")
    return folder / "A", folder / "B"


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# --- one pair ------------------------------------------------------------------------------------


def test_one_pair_prints_the_caption_alone(
    caption: Run, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = draw_pairs(tmp_path, 1)
    assert caption(before / "0.png", after / "0.png") == 0
    out, err = capsys.readouterr()
    answer = ChangeCaptioner.from_pretrained(model, device="cpu").caption(*random_pair(0), max_new_tokens=6)
    assert out == answer.text + "\n" and TINY_NOTE not in err


def test_json_and_map(caption: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = draw_pairs(tmp_path, 1)
    drawn = tmp_path / "map.png"
    assert caption(before / "0.png", after / "0.png", "--json", "--save-map", drawn, "--question", "why") == 0
    record = json.loads(capsys.readouterr().out)
    assert (
        record["changed"] is None and 0 < record["confidence"] < 1 and record["img1_path"].endswith("0.png")
    )
    assert Image.open(drawn).size == random_image(1).size
    assert list(tmp_path.glob("*.part")) == []


def test_the_map_of_geotiffs_lies_where_they_lie(
    caption: Run, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rasterio = pytest.importorskip("rasterio")
    place = rasterio.Affine(10, 0, 500_000, 0, -10, 4_000_000)
    pair = [tmp_path / "a.tif", tmp_path / "b.tif"]
    for path, image in zip(pair, random_pair(0), strict=True):
        bands = np.asarray(image.resize((70, 70))).transpose(2, 0, 1)
        with rasterio.open(
            path, "w", "GTiff", 70, 70, 3, crs="EPSG:32650", transform=place, dtype="uint8"
        ) as file:
            file.write(bands)
    assert caption(*pair, "--save-map", tmp_path / "map.tif") == 0
    with rasterio.open(tmp_path / "map.tif") as drawn:
        assert (drawn.crs.to_epsg(), drawn.transform, drawn.dtypes) == (32650, place, ("float32",))
        expected = ChangeCaptioner.from_pretrained(model, device="cpu").change_map(*map(str, pair))
        assert np.array_equal(drawn.read(1), expected) and expected.std() > 0
    assert capsys.readouterr().err == ""
    before, after = draw_pairs(tmp_path, 1)
    assert caption(before / "0.png", after / "0.png", "--save-map", tmp_path / "plain.tif") == 0
    assert "plain.tif: has no georeference" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["map.jpg", "map"])
def test_a_map_of_another_kind_is_refused_before_the_model_is_read(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = draw_pairs(tmp_path, 1)
    words = ["caption", str(before / "0.png"), str(after / "0.png"), "--model", str(tmp_path / "none")]
    assert main([*words, "--save-map", str(tmp_path / name)]) == 1
    assert f"{name}: end it in .png" in capsys.readouterr().err


def test_the_built_in_model_says_what_it_is(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llava.assets.built_in_path", lambda name: model)
    before, after = draw_pairs(tmp_path, 1)
    assert (
        main(
            [
                "caption",
                str(before / "0.png"),
                str(after / "0.png"),
                "--max-new-tokens",
                "2",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert TINY_NOTE in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A/0.png"], "two images"),
        (["A/0.png", "B/9.png"], "9.png: not found"),
        (["A", "B"], "--out"),
        (["A", "B/0.png", "--out", "o.jsonl"], "is not a folder"),
        (["A/0.png", "B/0.png", "--out", "o.jsonl"], "--out is for"),
        (["A", "B", "--out", "o.jsonl", "--batch-size", "0"], "--batch-size 0"),
        (["A", "--list", "x.csv", "--out", "o.jsonl"], "not several"),
        (["https://example.org/a.png", "B/0.png"], "allow_url"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_said_in_one_line(
    caption: Run,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    draw_pairs(tmp_path, 1)
    monkeypatch.chdir(tmp_path)
    assert caption(*arguments) == 1
    err = capsys.readouterr().err.strip().splitlines()
    assert message in err[-1] and "Traceback" not in "".join(err)


@pytest.mark.parametrize(
    "extra", [["--device", "nonsense"], ["--dtype", "int8"], ["--num-beams", "0"]], ids=str
)
def test_wrong_settings_are_refused(
    model: Path, tmp_path: Path, extra: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = draw_pairs(tmp_path, 1)
    assert main(["caption", str(before / "0.png"), str(after / "0.png"), "--model", str(model), *extra]) == 1
    assert extra[1] in capsys.readouterr().err


# --- finding pairs -------------------------------------------------------------------------------


def test_folders_pair_by_name_then_by_name_without_suffix(tmp_path: Path) -> None:
    for name in (
        "A/x.png",
        "B/x.png",
        "A/y.png",
        "B/y.tif",
        "A/only.png",
        "B/z.jpg",
        "A/deep/w.png",
        "A/notes.txt",
        "A/.hid.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    pairs, alone = match_folders(tmp_path / "A", tmp_path / "B")
    assert [(p.uid, Path(p.before).name, Path(p.after).name) for p in pairs] == [
        ("x", "x.png", "x.png"),
        ("y", "y.png", "y.tif"),
    ]
    assert [path.name for path in alone] == ["only.png", "z.jpg"]


def test_two_files_of_one_stem_keep_apart(tmp_path: Path) -> None:
    for name in ("A/x.png", "A/x.jpg", "B/x.png", "B/x.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    pairs, alone = match_folders(tmp_path / "A", tmp_path / "B")
    assert [p.uid for p in pairs] == ["x.jpg", "x.png"] and alone == []
    with pytest.raises(DataError, match="partner"):
        (tmp_path / "C").mkdir()
        match_folders(tmp_path / "A", tmp_path / "C")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.txt", "A/0.png\tB/0.png\n\n# comment\nA/1.png\tB/other.png\n"),
        ("l.csv", 'A/0.png,"B/0.png"\nA/1.png, B/other.png\n'),
        ("l.csv", "\ufeffuid,img1_path,img2_path\n,A/0.png,B/0.png\n,A/1.png,B/other.png\n"),
        ("l.jsonl", "\n".join(map(json.dumps, RECORDS))),
        ("l.json", json.dumps(RECORDS)),
    ],
)
def test_lists_of_every_kind_give_the_same_pairs(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    pairs = read_pairs(tmp_path / name)
    assert [(p.uid, p.before, p.after) for p in pairs] == [
        ("A/0", "A/0.png", "B/0.png"),
        ("A/1__other", "A/1.png", "B/other.png"),
    ]
    assert pairs[0].files == (str(tmp_path / "A/0.png"), str(tmp_path / "B/0.png"))
    assert read_pairs(tmp_path / name, Path("/data"))[0].files[0] == "/data/A/0.png"


def test_a_uid_may_be_a_number(tmp_path: Path) -> None:
    lines = [json.dumps({"uid": n, "img1_path": "a.png", "img2_path": "b.png"}) for n in range(2)]
    (tmp_path / "l.jsonl").write_text("\n".join(lines))
    assert [pair.uid for pair in read_pairs(tmp_path / "l.jsonl")] == ["0", "1"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "a.png,b.png\nonly.png\n", "line 2"),
        ("l.csv", "a.png,b.png,u\nc.png,d.png,u\n", "line 2: uid 'u' is that of .*line 1"),
        ("l.jsonl", '{"img1_path": "a"}\n', "line 1: has no img2_path"),
        ("l.jsonl", "{\n", "line 1: is no JSON"),
        ("l.jsonl", "[1]\n", "must be an object"),
        ("l.json", "{}", "must be a list"),
        ("l.txt", "\n", "holds no pairs"),
        ("l.txt", ",\n", "needs two paths"),
        ("l.csv", "a.png," + "b" * 200_000, "line 1: cannot be read"),
        ("l.json", "[" * 100_000, "is no JSON"),
        ("l.jsonl", '{"img1_path": "a", "img2_path": "b", "uid": ' + "1" * 5000 + "}", "line 1: is no JSON"),
        ("l.jsonl", '{"img1_path": "a", "img2_path": "b", "uid": ["u"]}', "line 1: field 'uid' is"),
    ],
)
def test_a_faulty_list_names_file_and_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message) as error:
        read_pairs(tmp_path / name)
    assert name in str(error.value)


def test_the_caption_that_the_readme_promises(capsys: pytest.CaptureFixture[str]) -> None:
    promised = re.search(r"The second prints `([^`]+)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    pair = [str(ROOT / "playground" / f"{date}.png") for date in ("before", "after")]
    assert main(["caption", *pair, "--device", "cpu"]) == 0
    assert promised and capsys.readouterr().out.strip() == promised[1]


# --- many pairs ----------------------------------------------------------------------------------


def test_two_folders(caption: Run, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = draw_pairs(tmp_path, 5)
    (before / "4.png").rename(before / "alone.png")
    out = tmp_path / "new" / "out.jsonl"
    assert caption(before, after, "--out", out, "--batch-size", "3") == 0
    records = read(out)
    captioner = ChangeCaptioner.from_pretrained(model, device="cpu")
    assert [r["uid"] for r in records] == ["0", "1", "2", "3"]
    assert [r["pred"] for r in records] == [
        captioner.caption(*random_pair(s), max_new_tokens=6).text for s in range(4)
    ]
    names = "uid img1_path img2_path pred changed confidence log_probability seconds model"
    assert list(records[0]) == names.split()
    err = capsys.readouterr().err
    assert "alone.png" in err and "4/4 pairs" in err and "pairs/s" in err


def test_a_list_with_a_root_and_a_second_run_that_adds(caption: Run, tmp_path: Path) -> None:
    draw_pairs(tmp_path / "data", 3)
    pairs, out = tmp_path / "pairs.csv", tmp_path / "out.jsonl"
    pairs.write_text("A/0.png,B/0.png,first\n")
    assert caption("--list", pairs, "--root", tmp_path / "data", "--out", out) == 0
    made = out.read_text()
    pairs.write_text("A/0.png,B/0.png,first\nA/2.png,B/2.png\n")
    assert caption("--list", pairs, "--root", tmp_path / "data", "--out", out) == 0
    assert out.read_text().startswith(made)
    assert [(r["uid"], r["img1_path"]) for r in read(out)] == [("first", "A/0.png"), ("A/2", "A/2.png")]


def test_a_broken_pair_stops_the_run_and_what_is_done_stays(
    caption: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = draw_pairs(tmp_path, 4)
    broken = after / "2.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out.jsonl"
    assert caption(before, after, "--out", out, "--batch-size", "8") == 1
    assert [r["uid"] for r in read(out)] == ["0", "1"]
    assert "2.png" in capsys.readouterr().err
    broken.write_bytes(whole)
    assert caption(before, after, "--out", out) == 0
    assert [r["uid"] for r in read(out)] == ["0", "1", "2", "3"]


def test_skip_errors_records_and_goes_on(caption: Run, tmp_path: Path) -> None:
    before, after = draw_pairs(tmp_path, 4)
    (after / "1.png").write_bytes(b"")
    out = tmp_path / "out.jsonl"
    for _ in range(2):  # the second run finds all done and reports the same status
        assert caption(before, after, "--out", out, "--skip-errors", "--batch-size", "2") == 3
        records = {r["uid"]: r for r in read(out)}
        assert len(read(out)) == len(records) == 4
        assert "1.png" in records["1"]["error"] and "pred" not in records["1"] and "error" not in records["0"]


@pytest.mark.parametrize("change", [["--question", "why"], ["--num-beams", "2"]], ids=str)
def test_a_file_of_another_run_is_refused(
    caption: Run, tmp_path: Path, change: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = draw_pairs(tmp_path, 2)
    out = tmp_path / "out.jsonl"
    assert caption(before, after, "--out", out) == 0
    made = out.read_text()
    assert caption(before, after, "--out", out, *change) == 1
    assert "made with another" in capsys.readouterr().err and out.read_text() == made
    assert caption(before, after, "--out", out, *change, "--overwrite") == 0
    assert out.read_text() != made and len(read(out)) == 2


def test_results_of_other_files_or_weights_are_refused(
    caption: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for year in ("2019", "2021"):
        draw_pairs(tmp_path / year, 2)
    pairs, out = tmp_path / "pairs.csv", tmp_path / "out.jsonl"
    pairs.write_text("A/0.png,B/0.png\n")
    assert caption("--list", pairs, "--root", tmp_path / "2019", "--out", out) == 0
    made = out.read_text()
    assert caption("--list", pairs, "--root", tmp_path / "2021", "--out", out) == 1
    assert "root" in capsys.readouterr().err and out.read_text() == made
    pairs.write_text("A/0.png,B/0.png\nA/1.png,B/1.png\n")
    for name, of in (("fingerprint", "weights"), ("input_fingerprint", "processor")):
        with monkeypatch.context() as patch:
            patch.setattr(f"llava.captioner.{name}", lambda *parts: "another")
            assert caption("--list", pairs, "--root", tmp_path / "2019", "--out", out) == 1
        assert f"other {of}" in capsys.readouterr().err and out.read_text() == made

    def failing(*_: Any, **__: Any) -> None:
        raise ConfigError("no such model")

    monkeypatch.setattr(
        "llava.cli.caption.load_captioner", failing
    )  # what cannot replace it does not empty it
    assert caption("--list", pairs, "--root", tmp_path / "2019", "--out", out, "--overwrite") == 1
    assert out.read_text() == made


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX")
def test_a_name_that_is_no_utf8_is_kept(caption: Run, tmp_path: Path) -> None:
    before, after = draw_pairs(tmp_path, 1)
    for folder in (before, after):
        (folder / "0.png").rename(os.fsdecode(os.fsencode(folder) + b"/stra\xdfe.png"))
    out = tmp_path / "out.jsonl"
    for _ in range(2):  # made, and found again
        assert caption(before, after, "--out", out) == 0
    (record,) = read(out)
    assert os.fsencode(record["img1_path"]).endswith(b"stra\xdfe.png")


def test_a_file_of_someone_else_is_never_touched(
    caption: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = draw_pairs(tmp_path, 1)
    out = tmp_path / "notes.txt"
    out.write_text("my notes, no newline at the end")
    assert caption(before, after, "--out", out) == 1
    assert "--overwrite" in capsys.readouterr().err and out.read_text() == "my notes, no newline at the end"


def test_a_uid_of_other_images_is_refused(
    caption: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = draw_pairs(tmp_path / "1", 1), draw_pairs(tmp_path / "2", 1)
    out = tmp_path / "out.jsonl"
    assert caption(*first, "--out", out) == 0
    assert caption(*second, "--out", out) == 1
    assert "other images" in capsys.readouterr().err and len(read(out)) == 1


def test_a_line_cut_off_is_made_again(caption: Run, tmp_path: Path) -> None:
    before, after = draw_pairs(tmp_path, 3)
    out = tmp_path / "out.jsonl"
    assert caption(before, after, "--out", out) == 0
    whole = out.read_bytes()
    stable = [{k: v for k, v in r.items() if k != "seconds"} for r in read(out)]
    for keep in (len(whole) - 1, len(whole) - 40, 10):
        out.write_bytes(whole[:keep])
        assert caption(before, after, "--out", out) == 0
        again = [{k: v for k, v in r.items() if k != "seconds"} for r in read(out)]
        assert [r["pred"] for r in again] == [r["pred"] for r in stable]


def test_a_run_killed_in_the_middle_goes_on(model: Path, tmp_path: Path) -> None:
    count = 24
    before, after = draw_pairs(tmp_path, count)
    out = tmp_path / "out.jsonl"
    words = [
        sys.executable,
        "-m",
        "llava",
        "caption",
        str(before),
        str(after),
        "--out",
        str(out),
        "--model",
        str(model),
    ]
    words += ["--batch-size", "1", "--max-new-tokens", "120", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (out.exists() and out.read_bytes().count(b"\n") >= 2):
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()[1].decode()
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    made = out.read_bytes()
    assert 2 <= made.count(b"\n") < count
    assert main(words[3:]) == 0
    assert out.read_bytes().startswith(made[: made.rfind(b"\n") + 1])
    assert sorted(int(r["uid"]) for r in read(out)) == list(range(count))


def test_two_runs_never_write_one_file(
    caption: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fcntl = pytest.importorskip("fcntl")
    before, after = draw_pairs(tmp_path, 1)
    out = tmp_path / "out.jsonl"
    with out.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert caption(before, after, "--out", out) == 1
    assert "another run" in capsys.readouterr().err


@pytest.mark.skipif(not REAL.is_dir(), reason="no real images here")
def test_real_folders(caption: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    assert caption(REAL / "A", REAL / "B", "--out", out) == 0
    assert len(read(out)) == len(list((REAL / "A").glob("*.png")))
    pair = [REAL / side / "test_113_0256.png" for side in "AB"]
    assert caption(*pair, "--save-map", tmp_path / "map.png") == 0
    assert Image.open(tmp_path / "map.png").size == Image.open(pair[1]).size


def test_sixteen_bit_pairs_share_their_stretch(caption: Run, tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 4000, (2, 30, 30), dtype=np.uint16)
    for side, image in zip("AB", levels, strict=True):
        (tmp_path / side).mkdir()
        Image.fromarray(image).save(tmp_path / side / "deep.tif")
    assert caption(tmp_path / "A", tmp_path / "B", "--out", tmp_path / "out.jsonl") == 0

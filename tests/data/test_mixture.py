"""Mixtures: every strategy takes what it says, the same on every reading, and every fault is named."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.mixture import load_mixture, read_mixture, unique
from llava.errors import DataError


def write_records(path: Path, prefix: str, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"uid": f"{prefix}{i}", "img1_path": f"{i}a", "img2_path": f"{i}b"} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))


def write_mixture(folder: Path, *entries: object) -> Path:
    path = folder / "mixture.yaml"
    path.write_text(json.dumps({"datasets": list(entries)}))  # JSON is YAML
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_records(tmp_path / "root" / "a" / "train.jsonl", "a", 10)
    write_records(tmp_path / "root" / "b.json", "b", 4)
    return tmp_path


def uids(path: Path, folder: Path, seed: int = 0) -> list[str]:
    return [record.uid for record in read_mixture(path, folder / "root", seed=seed)]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("all", range(10)),
        ("first:3", range(3)),
        ("first:25%", range(3)),  # of 10, rounded up
        ("end:2", (8, 9)),
        ("end:100%", range(10)),
        ("first: 0.5 %", (0,)),
    ],
)
def test_strategies_take_what_they_say(folder: Path, strategy: str, expected: range) -> None:
    path = write_mixture(folder, {"json_path": "a/train.jsonl", "sampling_strategy": strategy})
    assert uids(path, folder) == [f"a{i}" for i in expected]


def test_random_draws_are_the_seeds_alone_and_keep_the_order(folder: Path) -> None:
    entry = {"json_path": "a/train.jsonl", "sampling_strategy": "random:40%"}
    alone = write_mixture(folder, entry)
    first = uids(alone, folder)
    assert len(first) == 4 and first == sorted(first) and first == uids(alone, folder)
    assert len({tuple(uids(alone, folder, seed)) for seed in range(5)}) > 1
    other = {"json_path": "b.json"}
    assert uids(write_mixture(folder, other, entry), folder)[4:] == first  # whatever stands beside it
    more = write_mixture(folder, {**entry, "sampling_strategy": "random:7"})
    assert set(uids(more, folder)) > set(first)


def test_a_set_listed_several_times_comes_several_times_and_draws_anew(folder: Path) -> None:
    twice = write_mixture(folder, *[{"json_path": "b.json"}] * 2, *[{"json_path": "a/train.jsonl"}] * 3)
    counts = Counter(uids(twice, folder))
    assert all(counts[f"b{i}"] == 2 for i in range(4)) and all(counts[f"a{i}"] == 3 for i in range(10))
    drawn = load_mixture(
        write_mixture(folder, *[{"json_path": "a/train.jsonl", "sampling_strategy": "random:5"}] * 4),
        folder / "root",
    )
    assert len({tuple(r.uid for r in source.records) for source in drawn.sources}) > 1
    table = drawn.table().splitlines()
    assert table[0].split() == ["a/train.jsonl", "random:5", "5", "of", "10"] and table[-1].endswith(" 20")


def test_paths_count_from_the_root_or_the_mixtures_own_folder(folder: Path) -> None:
    path = write_mixture(folder / "root", {"json_path": "b.json"})
    assert [record.uid for record in read_mixture(path)] == ["b0", "b1", "b2", "b3"]
    path = write_mixture(folder, {"json_path": str(folder / "root" / "b.json")})
    assert len(read_mixture(path)) == 4  # an absolute one stands


def test_an_evaluation_sees_each_uid_once(folder: Path) -> None:
    path = write_mixture(folder, {"json_path": "a/train.jsonl"}, {"json_path": "a/train.jsonl"})
    records = read_mixture(path, folder / "root")
    assert [r.uid for r in unique(records)] == [f"a{i}" for i in range(10)]
    write_records(folder / "root" / "c.json", "a", 12)  # a0 of other images? no: the same, so it merges
    text = (folder / "root" / "c.json").read_text().replace('"11a"', '"x"').replace('"a11"', '"a1"')
    (folder / "root" / "c.json").write_text("\n".join(line for line in text.splitlines() if "x" in line))
    clash = read_mixture(
        write_mixture(folder, {"json_path": "a/train.jsonl"}, {"json_path": "c.json"}), folder / "root"
    )
    with pytest.raises(DataError, match="'a1' stands for two records"):
        unique(clash)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"json_path": "b.json", "sampling_strategy": "last:3"}, r"datasets\[0\].*known: all, first:N"),
        ({"json_path": "b.json", "sampling_strategy": "all:3"}, "sampling_strategy is 'all:3'"),
        ({"json_path": "b.json", "sampling_strategy": "first"}, "neither a number"),
        ({"json_path": "b.json", "sampling_strategy": "first:-1"}, "neither a number"),
        ({"json_path": "b.json", "sampling_strategy": "first:0"}, "above 0"),
        ({"json_path": "b.json", "sampling_strategy": "first:2.5"}, "whole number"),
        ({"json_path": "b.json", "sampling_strategy": "first:101%"}, "up to 100%"),
        ({"json_path": "b.json", "sampling_strategy": "random:5"}, "asks for 5 records, the file holds 4"),
        ({"json_path": "b.json", "sampling_strategy": 5}, "sampling_strategy is 5"),
        ({"json_path": "b.json", "sampling": "all"}, r"unknown fields \['sampling'\]"),
        ({"json_path": "none.json"}, "json_path 'none.json' is no file"),
        ({}, "json_path is None"),
        ("b.json", "expected {json_path, sampling_strategy}"),
    ],
    ids=str,
)
def test_faults_are_named_by_entry_and_field(folder: Path, entry: object, message: str) -> None:
    path = write_mixture(folder, entry)
    with pytest.raises(DataError, match=message) as error:
        read_mixture(path, folder / "root")
    assert "mixture.yaml" in str(error.value)


def test_a_fault_inside_a_record_file_is_named_by_line(folder: Path) -> None:
    (folder / "root" / "bad.jsonl").write_text(
        '{"uid": "x", "img1_path": "a", "img2_path": "b"}\n{"uid": 3}\n'
    )
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2.*'uid'"):
        read_mixture(write_mixture(folder, {"json_path": "bad.jsonl"}), folder / "root")


@settings(max_examples=150, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=60), st.text(max_size=60).map(lambda text: f"datasets: {text}".encode())
    )
)
def test_any_bytes_are_a_mixture_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"fuzz\.yaml"):
        read_mixture(path)

"""Mixtures: every strategy takes what it says, the same on every reading, and every fault is named."""

import hashlib
import json
import math
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava.data import table
from llava.data.check import check
from llava.data.mixture import load_mixture, mixture_files, read_mixture, unique
from llava.data.record import Record, read_records
from llava.data.table import RecordTable
from llava.errors import DataError


def write_records(path: Path, prefix: str, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"uid": f"{prefix}{i}", "img1_path": f"{i}a", "img2_path": f"{i}b"} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))


def write_mixture(folder: Path, *entries: object, **top: object) -> Path:
    path = folder / "mixture.yaml"
    path.write_text(json.dumps({"datasets": list(entries), **top}))  # JSON is YAML
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


A = "a/train.jsonl"


@pytest.mark.parametrize(
    ("entry", "count"),
    [
        ({"repeat": 1}, 10),
        ({"repeat": 3}, 30),
        ({"repeat": 2, "take": "first:3"}, 6),
        ({"weight": 1}, 10),
        ({"weight": 3.0}, 30),
        ({"weight": 2.5}, 25),
        ({"weight": 0.1}, 1),  # not a little more than one, which would be two
        ({"weight": 1.1}, 11),
        ({"weight": 0.01}, 1),
        ({"weight": 1.5, "take": "end:50%"}, 8),  # of 5, rounded up
        ({"weight": 0.5, "take": "random:4"}, 2),
    ],
    ids=str,
)
def test_repeats_and_weights_give_whole_copies_and_a_draw_for_the_rest(
    folder: Path, entry: dict[str, Any], count: int
) -> None:
    path = write_mixture(folder, {"json_path": A, **entry})
    taken = uids(write_mixture(folder, {"json_path": A, "take": entry.get("take", "all")}), folder)
    path = write_mixture(folder, {"json_path": A, **entry})
    found = uids(path, folder)
    assert len(found) == count and found == uids(path, folder)
    copies, rest = divmod(count, len(taken))
    assert found[: copies * len(taken)] == taken * copies
    assert len(set(found[len(found) - rest :])) == rest and set(found) <= set(taken)
    drawn = {tuple(uids(path, folder, seed)[len(found) - rest :]) for seed in range(8)}
    assert (len(drawn) > 1) == bool(rest)


def test_take_is_the_sampling_strategy(folder: Path) -> None:
    for strategy in ("first:3", "random:40%"):
        names = ("take", "sampling_strategy")
        one, other = (uids(write_mixture(folder, {"json_path": A, name: strategy}), folder) for name in names)
        assert one == other


def test_the_mixtures_own_seed_goes_before_the_runs(folder: Path) -> None:
    entry = {"json_path": A, "take": "random:5"}
    by_run = {seed: uids(write_mixture(folder, entry), folder, seed) for seed in range(4)}
    assert all(uids(write_mixture(folder, entry, seed=2), folder, seed) == by_run[2] for seed in range(4))
    assert load_mixture(write_mixture(folder, entry, seed=2), folder / "root", seed=3).seed == 2
    assert len({tuple(found) for found in by_run.values()}) > 1


def test_images_count_from_the_entrys_root(folder: Path) -> None:
    records = [
        {"uid": "x", "img1_path": "A/1.png", "img2_path": "/else/1.png", "mask_path": "M/1.png"},
        {"uid": "y", "img1_path": "A/2.png", "img2_path": "B/2.png"},
    ]
    (folder / "root" / "c.json").write_text(json.dumps(records))
    entries = ({"json_path": "c.json", "root": "levir"}, {"json_path": "c.json"})
    given_root = load_mixture(write_mixture(folder, *entries, root="nowhere"), folder / "root")
    own_root = load_mixture(write_mixture(folder, *entries, root="root"))
    assert (given_root.root, own_root.root) == (folder / "root", folder)
    for mixture, before in ((given_root, ""), (own_root, "root/")):
        rooted, plain = mixture.records[0], mixture.records[2]
        assert (rooted.img1_path, rooted.mask_path) == (f"{before}levir/A/1.png", f"{before}levir/M/1.png")
        assert (plain.img1_path, plain.mask_path) == (f"{before}A/1.png", f"{before}M/1.png")
        assert rooted.img2_path == plain.img2_path == "/else/1.png"
        assert mixture.records[3] == list(mixture.records)[3]
        assert mixture.records[3].paths(mixture.root) == (folder / "root/A/2.png", folder / "root/B/2.png")
        assert mixture.records[3].mask_path is None


def test_a_check_finds_the_images_where_the_records_are_taken_from(folder: Path) -> None:
    (folder / "root" / "set" / "images").mkdir(parents=True)
    for k in range(2):
        image = Image.radial_gradient("L").convert("RGB").rotate(40 * k)
        image.save(folder / "root" / "set" / "images" / f"{k}.png")
    row = {"uid": "x", "img1_path": "0.png", "img2_path": "1.png", "change_caption": ["x"]}
    (folder / "root" / "set" / "r.json").write_text(json.dumps([row]))
    entry = {"json_path": "set/r.json", "root": "set/images"}
    path = write_mixture(folder, entry, {**entry, "repeat": 2}, root="root")
    assert mixture_files(path) == [(folder / "root/set/r.json", folder / "root/set/images")]
    assert mixture_files(path, "/r") == [(Path("/r/set/r.json"), Path("/r/set/images"))]
    report = check([path])
    assert (report.findings, report.checked) == ([], 2)
    (finding,) = check([write_mixture(folder, {**entry, "repeat": 0}, root="root")]).findings
    assert "repeat is 0" in finding.message
    (finding,) = check([write_mixture(folder, entry, root=7)]).findings
    assert "root is 7" in finding.message


def test_the_table_counts_pairs_and_captions(folder: Path) -> None:
    told = {"change_caption": ["x"] * 3, "conversation": [["q", "a"], ["q", "a"]]}
    rows = [record.to_dict() | told for record in read_records(folder / "root" / A)]
    (folder / "root" / "c.json").write_text(json.dumps(rows))
    entries = ({"json_path": "b.json"}, {"json_path": "c.json", "take": "first:4", "weight": 2.5})
    assert load_mixture(write_mixture(folder, *entries), folder / "root").table().splitlines() == [
        "b.json    all      4 of 4 pairs                   0 captions",
        "c.json    first:4  4 of 10 pairs, 2.5 times: 10  30 captions  10 conversations",
        "together           14 pairs                      30 captions  10 conversations",
    ]
    table = load_mixture(write_mixture(folder, entries[0]), folder / "root").table()
    assert table.splitlines()[1] == "together       4 pairs       0 captions"


def naive(
    files: dict[str, list[Record]], entries: list[dict[str, Any]], seed: int
) -> list[list[list[Record]]]:
    """What the module's docstring says, said once more: entry -> copy -> records."""
    found = []
    times_listed: Counter[str] = Counter()
    for entry in entries:
        name = entry["json_path"]
        times_listed[name] += 1
        draw = f"{seed}\0{name}\0{times_listed[name]}"

        def drawn(records: list[Record], count: int, draw: str) -> list[Record]:
            keys = {r.uid: hashlib.sha256(f"{draw}\0{r.uid}".encode()).digest() for r in records}
            chosen = sorted(keys, key=keys.__getitem__)[:count]
            return [r for r in records if r.uid in chosen]

        kind, _, amount = entry.get("take", "all").partition(":")
        records = files[name]
        if kind != "all":
            share = Fraction(amount[:-1]) / 100 * len(records) if amount.endswith("%") else int(amount)
            count = math.ceil(share)
            records = {
                "first": lambda r=records, c=count: r[:c],
                "end": lambda r=records, c=count: r[len(r) - c :],
                "random": lambda r=records, c=count, d=draw: drawn(r, c, d),
            }[kind]()
        if root := entry.get("root"):
            records = [
                replace(r, img1_path=f"{root}/{r.img1_path}", img2_path=f"{root}/{r.img2_path}")
                for r in records
            ]
        times = Fraction(str(entry.get("repeat", entry.get("weight", 1))))
        copies = [records] * int(times)
        if rest := math.ceil((times - int(times)) * len(records)):
            copies.append(drawn(records, rest, f"{draw}\0weight"))
        found.append(copies)
    return found


entries_of = st.fixed_dictionaries(
    {"json_path": st.sampled_from(["a.jsonl", "b.json"])},
    optional={
        "take": st.sampled_from(
            ["all", "first:2", "first:50%", "end:1", "end:34%", "random:3", "random:60%"]
        ),
        "root": st.just("else/where"),
    },
).flatmap(
    lambda entry: st.sampled_from(
        [
            entry,
            entry | {"repeat": 2},
            entry | {"repeat": 4},
            entry | {"weight": 1.7},
            entry | {"weight": 0.3},
        ]
    )
)


@settings(max_examples=80, deadline=None, database=None)
@given(
    entries=st.lists(entries_of, min_size=1, max_size=5),
    seed=st.integers(0, 3),
    small=st.sampled_from([0, 1 << 20]),
    data=st.data(),
)
def test_a_mixture_is_what_its_description_says(
    tmp_path_factory: pytest.TempPathFactory, entries: list[dict[str, Any]], seed: int, small: int, data: Any
) -> None:
    folder = tmp_path_factory.mktemp("m")
    for name, count in (("a.jsonl", 7), ("b.json", 4)):
        rows = [
            {
                "uid": f"{name}{i}",
                "img1_path": f"{i // 2}a",
                "img2_path": f"{i // 3}b",
                "change_caption": ["x"] * i,
            }
            for i in range(count)
        ]
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    path = write_mixture(folder, *entries, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "SMALL", small)
        patch.setattr(table, "_BATCH", 2)
        mixture = load_mixture(path, cache=folder / "cache")
    kinds = {isinstance(part.file, RecordTable) for part in mixture.records.parts}
    assert kinds == {not small}

    copies = naive({name: read_records(folder / name) for name in ("a.jsonl", "b.json")}, entries, seed)
    parts = [records for entry in copies for records in entry]
    expected = [record for records in parts for record in records]
    again = pickle.loads(pickle.dumps(mixture))
    for found in (mixture.records, again.records):
        assert list(found) == expected == [found[i] for i in range(len(found))] == read_mixture(path)
        assert found[-1] == expected[-1] and found[np.int64(0)] == expected[0]
        assert list(reversed(found)) == expected[::-1]
    for source, entry in zip(mixture.sources, copies, strict=True):
        assert list(source.records) == [record for records in entry for record in records]
        assert list(mixture.records[source.slice]) == list(source.records)
    some = slice(*data.draw(st.tuples(*[st.none() | st.integers(-30, 30)] * 2)), data.draw(st.integers(1, 4)))
    assert list(mixture.records[some]) == expected[some]
    assert [mixture.records[some][i] for i in range(len(expected[some]))] == expected[some]

    lengths = [len(record.change_caption) for record in expected]
    assert mixture.records.lengths("change_caption").tolist() == lengths
    pairs = [(k, r.img1_path, r.img2_path) for k, records in enumerate(parts) for r in records]
    codes = mixture.records.pair_codes().tolist()
    assert len(codes) == len(pairs) and len(set(codes)) == len(set(pairs)) == len(set(zip(codes, pairs)))  # noqa: B905
    assert mixture.records[:0].pair_codes().shape == mixture.records[:0].lengths("conversation").shape == (0,)
    for beyond in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError):
            mixture.records[beyond]


def test_a_worker_gets_names_and_numbers_not_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "SMALL", 0)
    write_records(tmp_path / "a.jsonl", "a", 5000)
    path = write_mixture(
        tmp_path, {"json_path": "a.jsonl", "repeat": 6}, {"json_path": "a.jsonl", "weight": 0.5}
    )
    records = load_mixture(path, cache=tmp_path / "cache").records
    pickled = pickle.dumps(records)
    assert len(pickled) < 4 * 2500 + 3000
    (tmp_path / "records").write_bytes(pickled)
    code = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb'))[-1].uid)"
    found = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "records"], capture_output=True, check=True
    )
    assert found.stdout.decode().strip() == records[-1].uid


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"json_path": "b.json", "repeat": 0}, "repeat is 0, expected a whole number"),
        ({"json_path": "b.json", "repeat": 2.0}, "repeat is 2.0"),
        ({"json_path": "b.json", "repeat": True}, "repeat is True"),
        ({"json_path": "b.json", "repeat": 10**9}, "from 1 to 1000"),
        ({"json_path": "b.json", "weight": 0}, "weight is 0, expected a number above 0"),
        ({"json_path": "b.json", "weight": float("nan")}, "weight is 'NaN'|weight is nan"),
        ({"json_path": "b.json", "weight": "2"}, "weight is '2'"),
        ({"json_path": "b.json", "weight": None}, "weight is None"),
        ({"json_path": "b.json", "weight": 2, "repeat": 2}, "both 'repeat' and 'weight'"),
        ({"json_path": "b.json", "take": "all", "sampling_strategy": "all"}, "both 'take' and"),
        ({"json_path": "b.json", "take": "last:3"}, "take is 'last:3'"),
        ({"json_path": "b.json", "root": ""}, "root is ''"),
        ({"json_path": "b.json", "root": 3}, "root is 3"),
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
        (
            {"json_path": "b.json", "task": "counting"},
            "task is 'counting', expected one or several of caption, ",
        ),
        ({"json_path": "b.json", "task": 3}, "task is 3, expected"),
        ({"json_path": "b.json", "task": ["loc", "count"]}, "b.json has no record of task loc or count"),
        ({}, "json_path is None"),
        ("b.json", "expected {json_path, sampling_strategy}"),
    ],
    ids=str,
)
def test_faults_are_named_by_entry_and_field(folder: Path, entry: object, message: str) -> None:
    path = write_mixture(folder, entry)
    with pytest.raises(DataError, match=message) as error:
        read_mixture(path, folder / "root")
    assert "mixture.yaml, datasets[0]" in str(error.value)


@pytest.mark.parametrize("large", [False, True])
def test_an_entry_may_take_some_tasks_alone(
    tmp_path: Path, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "SMALL", 0 if large else 1 << 30)
    tasks = ["caption", "count", None, "loc", "count", "count"]
    rows = [
        {"uid": f"r{i}", "img1_path": "a", "img2_path": "b", **({"task": task} if task else {})}
        for i, task in enumerate(tasks)
    ]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = write_mixture(
        tmp_path,
        {"json_path": "all.jsonl", "task": "count", "weight": 2},
        {"json_path": "all.jsonl", "task": ["caption", "loc"], "take": "end:1"},
    )
    mixture = load_mixture(path, cache=tmp_path / "cache")
    assert (tmp_path / "cache").exists() == large
    assert [record.uid for record in mixture.records] == ["r1", "r4", "r5", "r1", "r4", "r5", "r3"]
    first, second = (line.split("  ") for line in mixture.table().splitlines()[:2])
    assert "count all" in first and any("3 of 3 pairs, 2 times" in cell for cell in first)
    assert "caption loc end:1" in second and any("1 of 2 pairs" in cell for cell in second)


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ({"seed": "1"}, "field 'seed' is '1'"),
        ({"seed": 1.5}, "field 'seed' is 1.5"),
        ({"root": ["x"]}, r"root is \['x'\]"),
        ({"sources": []}, r"unknown fields \['sources'\]; known: datasets, root, seed"),
    ],
    ids=str,
)
def test_faults_at_the_top_are_named(folder: Path, top: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=rf"mixture\.yaml.*{message}"):
        load_mixture(write_mixture(folder, {"json_path": "root/b.json"}, **top))


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

"""One YAML, one tree of dataclasses: what fits is built, what does not is named."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.config import build, override, plain, read_yaml, to_yaml
from llava.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Outer:
    path: Path
    kind: Literal["a", "b"] = "a"
    every: Literal["epoch"] | int = "epoch"
    inner: Inner | None = None
    rates: dict[str, float] = field(default_factory=dict)
    free: dict[str, Any] | Literal["keep"] | None = "keep"
    flag: bool = False
    count: int | None = None


def test_values_become_what_the_fields_say():
    made = build(
        Outer,
        {"path": "a/b", "every": 3, "inner": {"rate": "1e-5", "names": ["x"]}, "rates": {"tower": "2.0e-6"}},
        "f.yaml",
    )
    assert made == Outer(Path("a/b"), every=3, inner=Inner(1e-5, ("x",)), rates={"tower": 2e-6})
    assert type(build(Outer, {"path": "x", "count": 4.0}, "f").count) is int


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "missing fields ['path']"),
        ({"path": "x", "colour": 1}, "unknown fields ['colour']"),
        ({"path": "x", "kind": "c"}, "'kind' is 'c', expected 'a' or 'b'"),
        ({"path": "x", "every": "week"}, "'every' is 'week'"),
        ({"path": "x", "flag": 1}, "'flag' is 1, expected true or false"),
        ({"path": "x", "flag": "yes"}, "'flag' is 'yes'"),
        ({"path": "x", "count": 1.5}, "'count' is 1.5, expected a whole number, or nothing"),
        ({"path": "x", "count": True}, "'count' is True"),
        ({"path": 3}, "'path' is 3, expected a path"),
        ({"path": "x", "rates": {"tower": "fast"}}, "'rates.tower' is 'fast', expected a number"),
        ({"path": "x", "rates": [1]}, "'rates' is [1], expected fields"),
        ({"path": "x", "inner": {"speed": 1}}, "f.yaml, inner: unknown fields ['speed']"),
        ({"path": "x", "inner": {"rate": float("nan")}}, "'rate' is nan"),
        ({"path": "x", "inner": {"names": "xyz"}}, "'names' is 'xyz', expected a list"),
        ([1], "f.yaml must hold fields, not list"),
    ],
)
def test_a_wrong_value_is_named_with_file_and_field(fields: Any, said: str):
    with pytest.raises(ConfigError) as caught:
        build(Outer, fields, "f.yaml")
    assert said in str(caught.value) and str(caught.value).startswith("f.yaml")


_PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
_TREES = st.recursive(
    _PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner)
)
_NAMES = st.sampled_from(["path", "kind", "every", "inner", "rates", "free", "flag", "count", "other"])


@given(st.dictionaries(_NAMES, _TREES))
def test_whatever_comes_in_is_built_or_a_config_error(fields: dict[str, Any]):
    try:
        made = build(Outer, fields, "f.yaml")
    except ConfigError:
        return
    assert build(Outer, plain(made), "again") == made


def test_text_and_back_is_the_same(tmp_path: Path):
    made = Outer(Path("é x"), every=7, inner=Inner(1e-7, ("a", "b")), rates={"llm": 1e-5}, free={"kind": "x"})
    (tmp_path / "c.yaml").write_text(to_yaml(made), encoding="utf-8")
    assert build(Outer, read_yaml(tmp_path / "c.yaml"), "c") == made


def test_settings_reach_into_sections_and_leave_the_file_alone():
    fields = {"a": {"b": 1, "c": 2}, "d": 3}
    assert override(fields, ["a.b=[1, 2]", "--d=null", "e.f=1.0e-5"]) == {
        "a": {"b": [1, 2], "c": 2},
        "d": None,
        "e": {"f": 1e-5},
    }
    assert fields == {"a": {"b": 1, "c": 2}, "d": 3}
    for wrong in ("a", "=3", "a..b=1", "a=[1"):
        with pytest.raises(ConfigError, match="setting"):
            override({}, [wrong])


def test_the_environment_fills_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "c.yaml"
    file.write_text("{root: '${DATA}/x', list: ['${OUT:-runs}'], n: 3}")
    monkeypatch.setenv("DATA", "/d")
    monkeypatch.delenv("OUT", raising=False)
    assert read_yaml(file) == {"root": "/d/x", "list": ["runs"], "n": 3}
    monkeypatch.delenv("DATA")
    with pytest.raises(ConfigError, match=r"c\.yaml.*DATA is not set"):
        read_yaml(file)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[1, 2]", b"a: [", b"", b"{" * 5000])
def test_a_file_that_is_no_yaml_of_fields_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        read_yaml(tmp_path / "bad.yaml")

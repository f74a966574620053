"""SPICE's client, with a script in the place of Java: what is sent, what is read, and what is said when it fails."""

import sys

import pytest

from llava.errors import DataError, LlavaError, MissingDependencyError
from llava.eval import spice
from llava.eval.spice import CORENLP, Spice

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the fake Java is a script")

# Scores a caption by the share of its words that the first reference has; nothing for a lone dash.
SCORER = """
place = sys.argv.index("-jar") + 2
tasks = json.load(open(sys.argv[place]))
told = sys.argv[sys.argv.index("-out") + 1]
def f(task):
    words = task["test"].split()
    return None if words == ["-"] else sum(word in task["refs"][0] for word in words) / len(words)
scores = [{"image_id": task["image_id"], "scores": {"All": {"f": f(task)}}} for task in reversed(tasks)]
json.dump(scores, open(told, "w"))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A Spice whose Java is a Python script: `fake("code")`."""

    def start(code: str, timeout: float = 60.0) -> Spice:
        java = tmp_path / "java"
        java.write_text(f"#!{sys.executable}\nimport json, sys, time\n{code}\n")
        java.chmod(0o755)
        monkeypatch.setattr(spice, "_find_jar", lambda: tmp_path / "spice-1.0.jar")
        return Spice(java, timeout)

    return start


def test_scores_come_back_by_caption(fake):
    captions = ["a road", "", "a \ud800 caf\u00e9\nhouse"]
    assert fake(SCORER)(captions, [["a road appears"], ["a road"], ["a house"]]) == pytest.approx(
        [1, 0, 2 / 3]
    )
    with pytest.raises(DataError, match="no captions"):
        fake(SCORER)([], [])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("sys.exit('NoClassDefFoundError')", "exit status 1.*NoClassDefFoundError"),
        ("pass", "SPICE failed"),
        ("open(sys.argv[sys.argv.index('-out') + 1], 'w').write('[]')", "no scores for all captions"),
        ("open(sys.argv[sys.argv.index('-out') + 1], 'w').write('[{')", "no scores for all captions"),
        ("time.sleep(600)", r"did not end within 0\.5 s"),
    ],
)
def test_a_run_that_fails_is_an_error(fake, code, message):
    with pytest.raises(LlavaError, match=message):
        fake(code, timeout=0.5 if "sleep" in code else 60)(["a"], [["a"]])


def test_without_corenlp_the_error_says_where_it_belongs(tmp_path, monkeypatch):
    (tmp_path / "spice" / "lib").mkdir(parents=True)
    (tmp_path / "spice" / "spice-1.0.jar").touch()
    (tmp_path / "spice" / "lib" / CORENLP[0]).touch()

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(spice.importlib.util, "find_spec", lambda _: Spec)
    with pytest.raises(MissingDependencyError, match=rf"needs {CORENLP[1]} in .*lib.*get_stanford_models"):
        Spice()
    (tmp_path / "spice" / "lib" / CORENLP[1]).touch()
    assert Spice(tmp_path / "java").jar.name == "spice-1.0.jar"

"""What must hold for the tree as a whole."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LARGEST = 5_000_000
FORBIDDEN_IMPORTS = {"torchvision", "timm", "open_clip"}

# Put together here, so that this file itself holds none of them.
MACHINE_PATH = re.compile(
    r"(?<![\w.$~}<>-])/(?:" + "|".join(("work", "tmp", "home", "root", "Users", "mnt")) + r")/\w"
)
REGISTRIES = re.compile(
    "|".join(
        re.escape(".".join(parts))
        for parts in (
            ("pypi", "org"),
            ("pythonhosted", "org"),
            ("download", "pytorch", "org"),
            ("npmjs", "org"),
            ("deb", "debian", "org"),
            ("anaconda", "org"),
        )
    )
)


def tree() -> list[Path]:
    """Files that are tracked or about to be; without git (an unpacked archive) there is no such list."""
    try:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


FILES = tree()
SOURCES = [path for path in FILES if path.suffix == ".py"]

needs_git = pytest.mark.skipif(not FILES, reason="not a git checkout")


def texts() -> dict[str, str]:
    found = {}
    for path in FILES:
        try:
            found[str(path.relative_to(ROOT))] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # pictures and weights
    return found


@needs_git
@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRIES], ids=["machine path", "registry host"])
def test_no_file_names_a_place_of_one_machine(pattern: re.Pattern[str]) -> None:
    hits = [f"{name}: {match[0]}" for name, text in texts().items() for match in pattern.finditer(text)]
    assert hits == []


@needs_git
def test_the_patterns_find_what_they_are_for() -> None:
    assert MACHINE_PATH.search("open('" + "/".join(("", "home", "me", "data")) + "')")
    assert REGISTRIES.search("https://" + ".".join(("files", "pythonhosted", "org")))
    assert not MACHINE_PATH.search("$HOME/root/x and ~/tmp/y and data/home/z")


@needs_git
def test_no_file_is_large() -> None:
    assert [str(path) for path in FILES if path.stat().st_size > LARGEST] == []


@needs_git
def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if (text := path.read_text(encoding="utf-8")).strip() and not ast.get_docstring(ast.parse(text))
    ]
    assert silent == []


@needs_git
def test_nothing_imports_what_is_not_a_dependency() -> None:
    hits = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.append(node.module)
            hits += [f"{path.name}: {name}" for name in names if name.split(".")[0] in FORBIDDEN_IMPORTS]
    assert hits == []


def test_import_is_light() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import llava, llava.cli; "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; "
        "print(time.perf_counter() - start)"
    )
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(2)]
    assert min(float(run.stdout) for run in runs) < 1.0


def test_pyproject_has_the_extras_that_are_installed_by_name() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].keys()
    assert extras >= {"train", "eval", "serve", "geo", "flash", "dev"}
    default = re.search(r'EXTRAS_DEFAULT="(.+)"', (ROOT / "env_prepare.sh").read_text(encoding="utf-8"))
    assert default and set(default[1].split(",")) <= extras
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_commit_hooks_need_no_other_host() -> None:
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    assert {hook["id"] for repo in config["repos"] for hook in repo["hooks"]} >= {"ruff", "mypy"}

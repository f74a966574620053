"""BERTScore on a tiny random encoder: equal to its definition, word by word, whatever the batch."""

import random
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from llava.errors import ConfigError, DataError, DownloadError
from llava.eval.bertscore import BertScore

WORDS = ["a", "the", "road", "house", "houses", "built", "are", "is", "some", "tree", "appears", "on"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s"]
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=40, **sizes)).save_pretrained(
        path
    )
    (path / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def measure(folder: Path) -> BertScore:
    return BertScore(str(folder), layer=2)


def sentences(seed: int, number: int) -> list[str]:
    dice = random.Random(seed)
    return [" ".join(dice.choices(WORDS, k=dice.randint(1, 12))) for _ in range(number)]


def test_equals_its_definition(measure):
    def states(text: str) -> torch.Tensor:
        tokens = measure.tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            found = measure.encoder(**tokens, output_hidden_states=True).hidden_states[2][0]
        return found / found.norm(dim=-1, keepdim=True)

    def f_score(text: str, reference: str) -> float:
        said, true = states(text), states(reference)  # the first and the last are [CLS] and [SEP]
        precision = sum(max(float(one @ other) for other in true) for one in said[1:-1]) / (len(said) - 2)
        recall = sum(max(float(one @ other) for one in said) for other in true[1:-1]) / (len(true) - 2)
        return 2 * precision * recall / (precision + recall)

    captions, references = sentences(0, 6), [sentences(seed, 3) for seed in range(1, 7)]
    expected = [
        max(f_score(text, line) for line in group) for text, group in zip(captions, references, strict=True)
    ]
    assert measure(captions, references) == pytest.approx(expected, abs=1e-5)


def test_batches_do_not_matter(measure, folder):
    captions, references = sentences(0, 20), [sentences(seed, 2) for seed in range(20)]
    single = BertScore(str(folder), layer=2, batch_size=1)
    assert single(captions, references) == pytest.approx(measure(captions, references), abs=1e-5)


def test_extremes(measure):
    assert measure(["a road appears"], [["some house", "a road appears"]]) == pytest.approx([1.0])
    assert measure(["", " \n"], [["a road"], ["a road"]]) == [0.0, 0.0]
    assert 0 < measure(["house " * 10_000 + "\ud800"], [["a road"]])[0] < 1
    with pytest.raises(DataError, match="1 captions and 0 lists"):
        measure(["a"], [])


def test_what_cannot_be_used_is_said(folder, tmp_path):
    with pytest.raises(ConfigError, match="which layer"):
        BertScore(str(folder))
    with pytest.raises(ConfigError, match="has layers 1 to 3"):
        BertScore(str(folder), layer=4)
    with pytest.raises(DownloadError, match="cannot be loaded"):
        BertScore(str(tmp_path / "none"), layer=1)

"""The small tokenizer: Qwen2's format, every text comes back, the same again after saving."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llava.train.tokenizer import SPECIAL, train_tokenizer

TOKENIZER = train_tokenizer(["some houses are built along the road", "the road is built"] * 10, 300)


def test_words_merge_and_special_tokens_are_one_id_each_at_the_end(tmp_path: Path):
    assert len(TOKENIZER) <= 300
    assert [TOKENIZER.convert_tokens_to_ids(token) for token in SPECIAL] == list(
        range(len(TOKENIZER) - 3, len(TOKENIZER))
    )
    assert len(TOKENIZER(" road built")["input_ids"]) == 2
    text = "<|im_start|>user\nthe road<|im_end|>\n"
    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(TOKENIZER)
    assert again(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert again(text)["input_ids"][0] == TOKENIZER.convert_tokens_to_ids("<|im_start|>")
    assert again.eos_token_id == len(TOKENIZER) - 1


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_every_text_comes_back(text: str):
    import unicodedata

    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == unicodedata.normalize("NFC", text)

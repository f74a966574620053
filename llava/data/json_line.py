"""A value as one line of JSON that any UTF-8 file can hold."""

import json
from typing import Any


def json_line(value: Any) -> str:
    """JSON without a newline; escaped where a text holds half a character (of a cut emoji, or of a file name that is
    no UTF-8), which no UTF-8 file can.

    Raises:
        ValueError: a number that is none.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if text.isascii() or encodable(text) else json.dumps(value, allow_nan=False)


def encodable(text: str) -> bool:
    """Whether a text holds whole characters only."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

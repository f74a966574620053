"""From a name in a config to a part: a plain table and an error that lists what is known."""

from collections.abc import Mapping
from typing import TypeVar

from llava.errors import ConfigError

T = TypeVar("T")


def pick(table: Mapping[str, T], name: str, *, what: str) -> T:
    """Return `table[name]`; an unknown name raises `ConfigError` that lists the known ones.

    Args:
        table: the known parts.
        name: the one asked for, as written in a config or on the command line.
        what: what the table holds ("projector", "fusion"), for the message.
    """
    try:
        return table[name]
    except KeyError:
        raise ConfigError(f"unknown {what} {name!r}; known: {', '.join(sorted(table))}") from None

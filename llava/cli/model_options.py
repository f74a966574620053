"""What `caption`, `ask` and `chat` share: which model answers and where, and the caution about the built-in one."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava.captioner import ChangeCaptioner

TINY_NOTE = (
    "note: this is the small built-in model. It knows only the package's synthetic world, and what it says "
    "of real images means nothing. For a real model: llava download --list, then --model NAME"
)


def add_model_options(
    parser: argparse.ArgumentParser,
    *,
    max_new_tokens: int | None,
    said: str | None = None,
    model: str = "tiny",
    model_said: str = "tiny, in the package",
) -> None:
    """The options that `load_captioner` reads; `said` is the default length in words, where that depends, and
    `model_said` the default model."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=model,
        metavar="M",
        help=f"a folder, a hub id or a name of `llava download --list` (default: {model_said})",
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    group.add_argument(
        "--dtype", help="float32, bfloat16 or float16 (default: the model's; float32 on a CPU)"
    )
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help=f"longest answer in tokens (default: {said or max_new_tokens})",
    )
    group.add_argument("--allow-url", action="store_true", help="also fetch images from http(s) addresses")


def load_captioner(args: argparse.Namespace, **generation: Any) -> "ChangeCaptioner":
    """The captioner that the options ask for; says so when it is the built-in one.

    Args:
        generation: fields of `llava.generation.Generation`; `max_new_tokens` is that of `args` if not here.

    Raises:
        LlavaError: a wrong option, or a model that cannot be loaded.
    """
    import torch
    from transformers.utils import logging

    from llava.assets import BUILT_IN
    from llava.captioner import ChangeCaptioner
    from llava.errors import ConfigError
    from llava.generation import Generation

    logging.disable_progress_bar()
    how = Generation(**{"max_new_tokens": args.max_new_tokens, **generation})
    if args.dtype not in (None, "auto", "float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {args.dtype}: give float32, bfloat16 or float16")
    if args.device is not None:
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"--device {args.device} cannot be used here: {reason}") from error
    captioner = ChangeCaptioner.from_pretrained(
        args.model, device=args.device, dtype=args.dtype, generation=how, allow_url=args.allow_url
    )
    if args.model in BUILT_IN:
        print(TINY_NOTE, file=sys.stderr)
    return captioner

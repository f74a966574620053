"""`llava download`: fetch a published model by name, or list what is known."""

import argparse
import dataclasses
import json
import sys
from typing import Any

DESCRIPTION = """\
Fetch a model into the hub's cache and check every file by its checksum.

An interrupted download goes on where it stopped when the same command is run again. Only safetensors and text
files are fetched, never pickles. Run again on a complete model, the command checks its files once more."""

EXAMPLES = """\
examples:
  llava download --list                               what there is, and what of it is on this machine
  llava download llava-onevision-0.5b                 by name
  llava download lmms-lab/llava-onevision-qwen2-7b-ov      by hub id: any repository with safetensors
  HF_ENDPOINT=https://mirror.example llava download siglip-so400m-384      from a mirror

environment:
  HF_HOME (default ~/.cache/huggingface)   where the files go
  HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE    as everywhere in the hub's own tools

The folder is printed alone on standard output. Models that no client can fetch are marked "by hand": see
`llava import --help`."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `download` to the command line."""
    parser = commands.add_parser(
        "download",
        help="fetch a published model, or list them",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("name", nargs="?", metavar="NAME", help="a name of --list, or a hub id (owner/name)")
    what.add_argument("--list", action="store_true", help="show the known models instead")
    parser.add_argument("--revision", help="branch, tag or commit (default: main)")
    parser.add_argument("--json", action="store_true", help="with --list: as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fetch `args.name`, or print the catalogue."""
    from llava import hub

    if args.list:
        entries = catalogue()
        print(json.dumps(entries, indent=2) if args.json else table(entries))
        return 0
    folder = hub.download(args.name, revision=args.revision)
    print(folder)
    print(f"use it: llava caption before.png after.png --model {args.name}", file=sys.stderr)
    return 0


def catalogue() -> list[dict[str, Any]]:
    """Every known model, the catalogue's first, with its `state` and the `folder` it lies in (or None)."""
    from llava import hub

    entries = []
    for release in hub.RELEASES.values():
        folder = hub.local_folder(release)
        absent = "not fetched" if release.repo else "by hand"
        entry = dataclasses.asdict(release)
        entries.append(
            entry | {"state": "in cache" if folder else absent, "folder": str(folder) if folder else None}
        )
    for name, folder in hub.imported().items():
        if name not in hub.RELEASES:
            entry = dict.fromkeys(entries[0])
            entries.append(
                entry | {"name": name, "note": "imported", "state": "in cache", "folder": str(folder)}
            )
    return entries


def table(entries: list[dict[str, Any]]) -> str:
    """The catalogue as aligned columns."""
    rows: list[tuple[str, ...]] = [("NAME", "KIND", "SIZE", "LICENCE", "Sm", "STATE", "WHAT")]
    for entry in entries:
        size = f"{entry['size_gb']:.1f} GB" if entry["size_gb"] else "-"
        sm = f"{entry['scores']['sm']:.2f}" if entry["scores"] else "-"
        cells = (entry["name"], entry["kind"], size, entry["licence"], sm, entry["state"], entry["note"])
        rows.append(tuple(cell or "-" for cell in cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join(lines) + (
        "\n\nSm: mean of BLEU-4, METEOR, ROUGE-L and CIDEr-D on LEVIR-CC test, percent, as published."
        "\nby hand: download in a browser, then `llava import FOLDER --name NAME`."
    )

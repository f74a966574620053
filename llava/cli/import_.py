"""`llava import`: check a model folder that was downloaded by hand and give it a name."""

import argparse
import sys

DESCRIPTION = """\
Check a model folder that was downloaded by hand, and put it where its name finds it.

Checked before anything is copied: config.json, that every weight file of the index is there and as long as
its header promises (a cut-off download is found), that the index's tensors are in them, and the tokenizer.
Every fault is named. The folder itself is left as it is."""

EXAMPLES = """\
examples:
  llava import ~/Downloads/CCExpert_0.5b --name ccexpert-0.5b
  llava caption before.png after.png --model ccexpert-0.5b
  llava import /data/models/ccexpert-7b --link          no copy: links into a folder that stays
  llava import runs/mine/best --name mine               a model of one's own, by a short name

Files go to $LLAVA_HOME/models/NAME (default ~/.cache/llava, or $XDG_CACHE_HOME/llava). On the same disk the
weights take no extra room where the file system can share them."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `import` to the command line."""
    parser = commands.add_parser(
        "import",
        help="take in a model folder downloaded by hand",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="the folder that holds config.json and the weights")
    parser.add_argument("--name", help="what to call it (default: the folder's own name, in lower case)")
    parser.add_argument("--link", action="store_true", help="link to the files instead of copying them")
    parser.add_argument(
        "--replace", action="store_true", help="take the place of an earlier import of that name"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check and take in `args.folder`."""
    from llava import hub
    from llava.model import checkpoint

    hub.inspect_checkpoint(args.folder)  # the files are whole
    checkpoint.inspect(str(args.folder))  # and hold every weight that their config asks for
    target = hub.import_checkpoint(args.folder, args.name, link=args.link, replace=args.replace)
    if hub.inspect_checkpoint(target).pickled:
        print(
            "note: these weights are pickles (*.bin); they are read without running any code they may hold",
            file=sys.stderr,
        )
    print(target)
    print(f"use it: llava caption before.png after.png --model {target.name}", file=sys.stderr)
    return 0

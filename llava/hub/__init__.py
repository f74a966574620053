"""Models by name: what is known, where it lies, how it is fetched, how a download by hand is taken in."""

from llava.hub.catalogue import RELEASES, Release, Scores, downloaded, home, imported, local_folder, resolve
from llava.hub.fetch import download
from llava.hub.importing import import_checkpoint
from llava.hub.inspection import Inspection, inspect_checkpoint

__all__ = [
    "RELEASES",
    "Inspection",
    "Release",
    "Scores",
    "download",
    "downloaded",
    "home",
    "import_checkpoint",
    "imported",
    "inspect_checkpoint",
    "local_folder",
    "resolve",
]

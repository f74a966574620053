"""Taking in a checkpoint that a person downloaded."""

import contextlib
import os
import re
import shutil
from pathlib import Path

from llava.errors import CheckpointError
from llava.hub.catalogue import home
from llava.hub.disk import need_space
from llava.hub.inspection import READERS, inspect_checkpoint


def import_checkpoint(
    folder: str | Path,
    name: str | None = None,
    *,
    cache: str | Path | None = None,
    link: bool = False,
    replace: bool = False,
) -> Path:
    """Check a downloaded folder and put it where `resolve(name)` finds it; returns the new folder.

    Args:
        folder: what the person downloaded; it is left as it is.
        name: what to call it; the folder's own name, in lower case with "-" for "_", if None.
        cache: instead of `home()`.
        link: symbolic links to the files instead of copies (the folder must then stay where it is).
        replace: take the place of an earlier import of that name.

    Raises:
        CheckpointError: the folder is not whole, or the name is taken or unusable.
        DownloadError: not enough room on the disk.
    """
    folder = Path(folder).expanduser().resolve()
    found = inspect_checkpoint(folder)
    name = name or folder.name.lower().replace("_", "-")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name.endswith(".part"):
        raise CheckpointError(f"{name!r} cannot name a model; give a --name of letters, digits, '-' and '.'")
    models = Path(cache or home()).expanduser() / "models"
    target, part, old = models / name, models / f"{name}.part", models / f"{name}.old.part"
    if target.exists() and not replace:
        raise CheckpointError(f"{name} is already imported at {target}; give another --name, or --replace")
    if folder == target.resolve():
        raise CheckpointError(f"{folder} is the imported {name} itself")

    files = [folder / weight for weight in found.weights]
    files += [p for p in sorted(folder.iterdir()) if p.is_file() and _is_companion(p.name)]
    models.mkdir(parents=True, exist_ok=True)
    for left_over in (part, old):
        shutil.rmtree(left_over, ignore_errors=True)
    part.mkdir()
    try:
        for path in files:
            _place(path, part / path.name, link=link)
        for path in [file for name in READERS for file in sorted((folder / name).glob("*.*"))]:
            (part / path.parent.name).mkdir(exist_ok=True)
            _place(path, part / path.parent.name / path.name, link=link)
        if target.exists():
            target.replace(old)
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return target


def _is_companion(name: str) -> bool:
    """Small files that go along: configs, tokenizer, template, card, licence; no optimizer, no pickle."""
    suffixes = {".json", ".txt", ".jinja", ".md", ".model"}
    return Path(name).suffix in suffixes or name.upper().startswith("LICEN")


def _place(source: Path, target: Path, *, link: bool) -> None:
    """Put `source` at `target`: a link if asked, else a copy that shares the disk's blocks where it can."""
    source = source.resolve()
    if link:
        target.symlink_to(source)
        return
    if _clone(source, target):
        return
    if source.suffix in {".safetensors", ".bin"}:
        # Weights are written aside and renamed by every tool that saves them, so a shared inode stays safe.
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    need_space(source.stat().st_size, target.parent)
    shutil.copy2(source, target)


def _clone(source: Path, target: Path) -> bool:
    """A copy-on-write copy (Btrfs, XFS, APFS-like file systems on Linux); False where there is none."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    ficlone = 0x40049409  # linux/fs.h: share the blocks of another file
    with source.open("rb") as old, target.open("xb") as new:
        try:
            fcntl.ioctl(new.fileno(), ficlone, old.fileno())
            return True
        except OSError:
            pass
    target.unlink()
    return False

"""Lists, shows and copies the shipped configs.

    ikl config list                            # all of them; `ikl config list imagenet` those with a word in the name
    ikl config show torchdistill/digits/ikl.yaml
    ikl config copy mmpretrain/digits/distill_ikl.py my_configs

A copy brings the files that it inherits from, and runs where it is. Names are paths below the folder of configs; the
end of one will do where no other config has it.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import re
from pathlib import Path

from ikl_plugins import _validation as check
from ikl_plugins._files import configs_folder, written_aside
from ikl_plugins._limits import printable

__all__ = ["config_path", "configs_folder", "configure", "copy", "find", "names", "run"]

CALLER = "ikl config"
ENDINGS = (".py", ".yaml")


def names(word: str = "") -> list[str]:
    """The shipped configs whose name has ``word`` in it: paths below the folder, without the bases of MMPretrain's."""
    folder = configs_folder()
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.suffix in ENDINGS)
    return [path.as_posix() for path in found if "_base_" not in path.parts and word.lower() in path.as_posix().lower()]


def find(name: str) -> Path:
    """The shipped config of a name, or of the end of one.

    Raises:
        ValueError: no config has the name, or several have the ending.
    """
    known = names()
    wanted = Path(name).as_posix().removeprefix("configs/")
    fitting = [other for other in known if other == wanted] or [
        other for other in known if f"/{other}".endswith((f"/{wanted}", *(f"/{wanted}{ending}" for ending in ENDINGS)))
    ]
    if not fitting:
        nearest = difflib.get_close_matches(wanted, known, n=1, cutoff=0.4)
        hint = f"Did you mean `{nearest[0]}`? " if nearest else ""
        raise ValueError(f"{CALLER}: unknown config `{name}`. {hint}`ikl config list` names them all.")
    if len(fitting) > 1:
        raise ValueError(f"{CALLER}: the name must fit one config, got `{name}` for {check.first_names(fitting)}.")
    return configs_folder() / fitting[0]


def config_path(given: Path) -> Path:
    """A config that a command line names: a file, or else the shipped one of that name."""
    return given if given.exists() else find(given.as_posix())


def copy(name: str, folder: Path = Path(), *, force: bool = False) -> list[Path]:
    """Copies a shipped config and what it inherits from, each at its place to the others, so that the copy runs.

    Args:
        name: as :func:`find` takes it.
        folder: where the copy goes: the config itself, or a folder for it and one for its bases.
        force: write over files that are there.

    Returns:
        The copies, the config first.

    Raises:
        ValueError: an unknown name, or a file that is there with another content.
    """
    sources = _with_bases(find(name))
    shared = os.path.commonpath([source.parent for source in sources])
    targets = [folder / source.relative_to(shared) for source in sources]
    for source, target in zip(sources, targets, strict=True):
        if target.exists() and not force and target.read_bytes() != source.read_bytes():
            raise ValueError(f"{CALLER}: {target} must not be there yet, but differs. Use another folder, or --force.")
    for source, target in zip(sources, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(target) as aside:
            aside.write_bytes(source.read_bytes())
    return targets


def _with_bases(config: Path) -> list[Path]:
    """A config and the files that it names: its bases, and theirs; configs of a teacher that it builds."""
    found, waiting = [config], [config]
    while waiting:
        path = waiting.pop()
        for name in _named(path):
            other = (path.parent / name).resolve()
            if other.is_file() and configs_folder() in other.parents and other not in found:
                found.append(other)
                waiting.append(other)
    return found


def _named(config: Path) -> list[str]:
    if config.suffix != ".py":
        return []
    tree = ast.parse(config.read_text(encoding="utf-8"))
    texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    relative = (re.sub(r"^\{\{ *fileDirname *\}\}/", "", text) for text in texts)
    return [text for text in relative if re.fullmatch(r"[\w./-]+\.py", text)]


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="the names of all configs")
    listing.add_argument("word", nargs="?", default="", help="only names with this word")
    show = actions.add_parser("show", help="the text of a config")
    show.add_argument("name")
    copying = actions.add_parser("copy", help="a config and what it inherits from, into a folder of yours")
    copying.add_argument("name")
    copying.add_argument("folder", nargs="?", type=Path, default=Path(), help="default: the working directory")
    copying.add_argument("--force", action="store_true", help="write over files that are there")


def run(arguments: argparse.Namespace) -> None:
    """Does what the command line says."""
    if arguments.action == "list":
        found = names(arguments.word)
        if not found:
            raise ValueError(f"{CALLER}: no config has `{arguments.word}` in its name. See `ikl config list`.")
        print("\n".join(found))
    elif arguments.action == "show":
        print(find(arguments.name).read_text(encoding="utf-8"), end="")
    else:
        config, *bases = copy(arguments.name, arguments.folder, force=arguments.force)
        lines = (config, *(f"  inherits from {base}" for base in bases))
        print(*(printable(line, None) for line in lines), sep="\n")

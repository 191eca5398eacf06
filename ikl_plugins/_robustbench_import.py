"""RobustBench as PyPI has it, made importable.

RobustBench 1.1.1 imports two modules that a plain installation lacks: ``autoattack``, which PyPI has as
``pyautoattack`` alone, and ``pkg_resources``, which setuptools has dropped. :func:`import_robustbench` answers for
either of them while RobustBench is imported, and only when it asks and nobody else has an answer: where the real
module is installed, or a later RobustBench asks no more, nothing of this file comes into play.

A program that knows nothing of this package, and its child processes, get the same from the folder :data:`STAND_INS` on
their path: a package ``robustbench`` and a package ``autoattack`` that leave their names to the installed ones.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["STAND_INS", "autoattack_facts", "give_place", "import_robustbench"]

INSTALL = "pip install 'ikl_plugins[robustbench]'"
STAND_INS = Path(__file__).resolve().parent / "stand_ins"
_CALLER = "ikl_plugins.robustbench"
# It wants a timm of 2024, which says at each import what torch and timm have renamed since. No user can mend that.
_OUTDATED = ("Importing from timm.models", "`torch.jit.interface` is deprecated")
# What users and RobustBench import from below `autoattack`; pyautoattack has it under the same names.
_PARTS = (
    "autopgd_base",
    "checks",
    "fab_base",
    "fab_projections",
    "fab_pt",
    "fab_tf",
    "other_utils",
    "square",
    "state",
)


def import_robustbench() -> ModuleType:
    """Imports RobustBench.

    Returns:
        The package. Where ``autoattack`` was absent, that name now leads to pyautoattack in this process, with the
        constructor and the methods of the original; ``pkg_resources`` is absent again as soon as RobustBench has it.

    Raises:
        ImportError: RobustBench, or one of the packages it needs, is not installed.
    """
    try:
        with _lent():
            return importlib.import_module("robustbench")
    except ImportError as error:
        missing = error.name or str(error)
        raise ImportError(
            f"{_CALLER} needs RobustBench and an AutoAttack, but `{missing}` is missing. Run: {INSTALL}",
            name=error.name,
        ) from error


def give_place(name: str) -> None:
    """Imports the package of this name from elsewhere than :data:`STAND_INS`, in the place of the one from there.

    Args:
        name: 'robustbench' or 'autoattack'. Called by that package of :data:`STAND_INS` while it is imported, which
            makes Python hand out what :data:`sys.modules` has under its name afterwards.

    Raises:
        ImportError: as :func:`import_robustbench`; or there is neither autoattack nor pyautoattack.
    """
    del sys.modules[name]
    place = next(place for place, entry in enumerate(sys.path) if Path(entry).resolve() == STAND_INS)
    entry = sys.path.pop(place)
    try:
        if name == "robustbench":
            import_robustbench()
        else:
            with _lent():
                importlib.import_module(name)
    finally:
        sys.path.insert(place, entry)


def autoattack_facts() -> dict[str, str | None]:
    """Which AutoAttack RobustBench runs: not what is installed, but whose code it is.

    Returns:
        'module': the package that has the code. 'package': the distribution that brought it, None where no metadata
        says so. 'version': that of the distribution, with the commit if it was installed from Git, and with the first
        digits of a checksum of the code if it is from a folder, installed or not.
    """
    classes = import_robustbench().eval.AutoAttack.__mro__
    # The first of them: what is derived from it, such as the stand-in, runs its attacks.
    module = [kind for kind in classes if "run_standard_evaluation" in vars(kind)][-1].__module__
    package = module.partition(".")[0]
    file = getattr(sys.modules[module], "__file__", None)
    if file is None:  # typed into a session
        return {"module": package, "package": None, "version": "code without a file"}
    return dict(_origin(package, Path(file).resolve()))


@functools.lru_cache
def _origin(package: str, file: Path) -> dict[str, str | None]:
    distribution = _distribution(package, file)
    origin = {} if distribution is None else _direct_url(distribution)
    version = [] if distribution is None else [distribution.version]
    if "vcs_info" in origin:
        version.append(f"commit {origin['vcs_info']['commit_id'][:12]}")
    if distribution is None or "dir_info" in origin:
        version.append(f"code {_code_sha256(package, file)[:12]}")
    name = None if distribution is None else distribution.metadata["Name"]
    return {"module": package, "package": name, "version": ", ".join(version)}


def _distribution(package: str, file: Path) -> metadata.Distribution | None:
    """The distribution that has installed a file of a package, or else that is installed from a folder around it."""
    around = None
    for distribution in metadata.distributions():
        for entry in distribution.files or ():
            if entry.parts[0] in (package, file.name) and Path(str(distribution.locate_file(entry))).resolve() == file:
                return distribution
        origin = _direct_url(distribution)
        names = (distribution.read_text("top_level.txt") or distribution.metadata["Name"].replace("-", "_")).split()
        if "dir_info" in origin and package in names:
            folder = Path(unquote(urlsplit(origin["url"]).path)).resolve()
            around = distribution if folder in file.parents else around
    return around


def _direct_url(distribution: metadata.Distribution) -> dict[str, Any]:
    """Where a distribution was installed from, if not from an index (PEP 610)."""
    found: dict[str, Any] = json.loads(distribution.read_text("direct_url.json") or "{}")
    return found


def _code_sha256(package: str, file: Path) -> str:
    """Of all files of a package, or of the one file of a module."""
    folder = next(iter(getattr(sys.modules[package], "__path__", ())), None)
    files = [file] if folder is None else sorted(Path(folder).rglob("*.py"))
    digest = hashlib.sha256()
    for one in files:
        digest.update(f"{one.relative_to(folder or file.parent)}\n".encode() + one.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _lent() -> Iterator[None]:
    """Lends the stand-ins to what is imported."""
    finder = _StandIns()
    sys.meta_path.append(finder)  # the last one: asked when all others have found nothing
    try:
        with warnings.catch_warnings():
            for message in _OUTDATED:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        sys.meta_path.remove(finder)
        # Others that look for it must not take ours for the real one.
        if getattr(sys.modules.get("pkg_resources"), "__loader__", None) is finder:
            del sys.modules["pkg_resources"]


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and loads the stand-ins."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "pkg_resources":
            return importlib.machinery.ModuleSpec(fullname, self)
        if fullname == "autoattack" and importlib.util.find_spec("pyautoattack") is not None:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "pkg_resources":
            module.resource_filename = _resource_filename  # type: ignore[attr-defined]
            return
        from ._autoattack import AutoAttack

        module.__doc__ = "pyautoattack under the name and with the interface of autoattack (from ikl_plugins)."
        module.AutoAttack = AutoAttack  # type: ignore[attr-defined]
        same = ModuleType("autoattack.autoattack")
        same.AutoAttack = AutoAttack  # type: ignore[attr-defined]
        parts = {part: importlib.import_module(f"pyautoattack.{part}") for part in _PARTS}
        for name, part in {**parts, "autoattack": same}.items():
            sys.modules[f"autoattack.{name}"] = part
            setattr(module, name, part)


def _resource_filename(package: str, name: str) -> str:
    """The one function of ``pkg_resources`` that RobustBench calls: where a file beside a module lies."""
    import importlib.resources

    module = importlib.import_module(package)
    folder = package if hasattr(module, "__path__") else package.rpartition(".")[0]
    return str(importlib.resources.files(folder) / name)

"""RobustBench as PyPI has it, made importable.

RobustBench 1.1.1 imports two modules that a plain installation lacks: ``autoattack``, which PyPI has as
``pyautoattack`` alone, and ``pkg_resources``, which setuptools has dropped. :func:`import_robustbench` answers for
either of them while RobustBench is imported, and only when it asks and nobody else has an answer: where the real
module is installed, or a later RobustBench asks no more, nothing of this file comes into play.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

__all__ = ["import_robustbench"]

INSTALL = "pip install 'ikl_plugins[robustbench]'"
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
    finder = _StandIns()
    sys.meta_path.append(finder)  # the last one: asked when all others have found nothing
    try:
        with warnings.catch_warnings():
            for message in _OUTDATED:
                warnings.filterwarnings("ignore", message)
            return importlib.import_module("robustbench")
    except ImportError as error:
        missing = error.name or str(error)
        raise ImportError(
            f"{_CALLER} needs RobustBench and an AutoAttack, but `{missing}` is missing. Run: {INSTALL}",
            name=error.name,
        ) from error
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

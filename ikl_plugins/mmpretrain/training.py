"""Training by mmpretrain's own tools/train.py, which is installed with it in a place that is hard to remember.

All options are those of mmpretrain's script, and so is the exit code; ``ikl train --where`` prints the path of the
script, which can be called just as well. Under torchrun ``--launcher pytorch`` is added, and without CUDA the ranks
talk over gloo whatever the config says. Of a disk that is full or may not be written to one line says which one it is.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import runpy
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmpretrain
import torch
from mmengine.config import Config

from .._files import InUseError
from ..mmengine.hooks import run_lock
from .registration import ENTRY_NAMES

__all__ = ["main", "train_script"]

CALLER = "ikl train"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def train_script() -> Path:
    """The path of mmpretrain's installed tools/train.py.

    Raises:
        ValueError: mmpretrain is installed without its tools.
    """
    script = Path(mmpretrain.__file__).parent / ".mim" / "tools" / "train.py"
    if not script.is_file():
        raise ValueError(
            f"{CALLER}: mmpretrain must have its tools, but there is no {script}. "
            f"Run: python -m pip install --force-reinstall --no-deps mmpretrain"
        )
    return script


def main(arguments: list[str]) -> None:
    """Runs mmpretrain's script in this process.

    Args:
        arguments: path of a config and the options of the script.

    Raises:
        KeyboardInterrupt: with how to go on.
        OSError: a file of the run cannot be written. The message names the place and the way to go on.
        SystemExit: any other error of the training, after its traceback.
        ValueError: as :func:`train_script`; another process trains in the work dir.
    """
    script = train_script()
    arguments = _for_ranks(arguments)
    config = _read(arguments[0]) if os.environ.get("RANK", "0") == "0" else None
    if config is not None:
        _warn_of_a_missing_import(arguments[0], config)
    sys.argv = [str(script), *arguments]
    try:
        with contextlib.nullcontext() if config is None else _alone(arguments, config):
            runpy.run_path(str(script), run_name="__main__")
    except KeyboardInterrupt:
        raise KeyboardInterrupt("go on with --resume") from None
    except InUseError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) or error.errno not in (*_FULL, *_CLOSED):
            traceback.print_exc()
            raise SystemExit(1) from error
        # A write that fails does not know the name of its file; it lies in the work dir.
        place = error.filename or _work_dir(arguments, config)
        way_out = "Free some space" if error.errno in _FULL else "Make it writable, or name another --work-dir"
        raise OSError(
            f"{CALLER}: {place} cannot be written: {error.strerror}. Checkpoints before are whole. "
            f"{way_out}, and go on with --resume."
        ) from error


def _for_ranks(arguments: list[str]) -> list[str]:
    """The options with which the ranks that torchrun has started train together, on CPUs too."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return arguments
    if not any(word.startswith("--launcher") for word in arguments):
        arguments = [arguments[0], "--launcher", "pytorch", *arguments[1:]]
    alone = " ".join(arguments).replace("=", " ").partition("--launcher ")[2].startswith("none")
    config = None if alone or torch.cuda.is_available() else _read(arguments[0])
    if config is None:
        return arguments
    from ..mmengine import cpu_ranks  # the import alone joins the group

    cpu_ranks.join()
    settings = ["device_ids=None"]  # without it MMEngine names a CUDA device
    if config.get("model_wrapper_cfg") is None:
        unused = bool(config.get("find_unused_parameters", False))
        settings += ["type=MMDistributedDataParallel", "broadcast_buffers=False", f"find_unused_parameters={unused}"]
    options = [f"model_wrapper_cfg.{setting}" for setting in settings]
    if "--cfg-options" in arguments:
        place = arguments.index("--cfg-options") + 1
        return [*arguments[:place], *options, *arguments[place:]]
    return [*arguments, "--cfg-options", *options]


def _read(path: str) -> Config | None:
    try:
        return Config.fromfile(path, import_custom_modules=False)
    except Exception:  # a config is a program; the script tells what is wrong with it
        return None


def _warn_of_a_missing_import(path: str, config: Config) -> None:
    """Here the names are known anyway, in mmpretrain's own scripts they are not."""
    named = sorted(_types_in(config.to_dict()) & ENTRY_NAMES)
    imports = (config.get("custom_imports") or {}).get("imports") or []
    if named and "ikl_plugins" not in str(imports):
        print(
            f"warning: {path} names {', '.join(named)}, but does not import them, so that tools/train.py and test.py "
            f"do not know them. Add custom_imports = dict(imports=['ikl_plugins.mmpretrain']).",
            file=sys.stderr,
        )


def _types_in(value: Any) -> set[str]:
    if isinstance(value, Mapping):
        own = {value["type"].rpartition(".")[2]} if isinstance(value.get("type"), str) else set()
        return own.union(*map(_types_in, value.values()))
    return set().union(*map(_types_in, value)) if isinstance(value, (list, tuple)) else set()


def _alone(arguments: list[str], config: Config) -> contextlib.AbstractContextManager[None]:
    """Refuses a second run in the work dir before MMEngine writes there."""
    launcher = _options(arguments).launcher
    if launcher not in (None, "none", "pytorch"):  # who is the first rank is known later, to IKLHook
        return contextlib.nullcontext()
    return run_lock(CALLER, _work_dir(arguments, config))


def _options(arguments: list[str]) -> argparse.Namespace:
    """What options of mmpretrain's script say of its processes and of where it writes to."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("config")
    parser.add_argument("--work-dir")
    parser.add_argument("--launcher")
    parser.add_argument("--cfg-options", nargs="+", default=[])
    return parser.parse_known_args(arguments)[0]


def _work_dir(arguments: list[str], config: Config | None) -> str:
    """Where mmpretrain's script writes to."""
    found = _options(arguments)
    last = [option.removeprefix("work_dir=") for option in found.cfg_options if option.startswith("work_dir=")][-1:]
    of_config = None if config is None else config.get("work_dir")
    return str(*last or [found.work_dir or of_config or Path("work_dirs", Path(found.config).stem)])

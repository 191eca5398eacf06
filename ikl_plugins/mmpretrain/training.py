"""Training by mmpretrain's own tools/train.py, which is installed with it in a place that is hard to remember.

All options are those of mmpretrain's script, and so is the exit code; ``ikl train --where`` prints the path of the
script, which can be called just as well. Of a disk that is full or may not be written to one line says which one it is.
"""

from __future__ import annotations

import argparse
import errno
import runpy
import sys
import traceback
from pathlib import Path

import mmpretrain
from mmengine.config import Config

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
        OSError: a file of the run cannot be written. The message names the place and the way to go on.
        SystemExit: any other error of the training, after its traceback.
        ValueError: as :func:`train_script`.
    """
    script = train_script()
    sys.argv = [str(script), *arguments]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Exception as error:
        if not isinstance(error, OSError) or error.errno not in (*_FULL, *_CLOSED):
            traceback.print_exc()
            raise SystemExit(1) from error
        # A write that fails does not know the name of its file; it lies in the work dir.
        place = error.filename or _work_dir(arguments)
        way_out = "Free some space" if error.errno in _FULL else "Make it writable, or name another --work-dir"
        raise OSError(
            f"{CALLER}: {place} cannot be written: {error.strerror}. Checkpoints before are whole. "
            f"{way_out}, and go on with --resume."
        ) from error


def _work_dir(arguments: list[str]) -> str:
    """Where mmpretrain's script writes to."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("config")
    parser.add_argument("--work-dir")
    found = parser.parse_known_args(arguments)[0]
    of_config = Config.fromfile(found.config, import_custom_modules=False).get("work_dir")
    return str(found.work_dir or of_config or Path("work_dirs", Path(found.config).stem))

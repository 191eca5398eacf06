"""Runs mmpretrain's own tools/train.py, which is installed with it in a place that is hard to remember.

    python tools/train_mmpretrain.py configs/mmpretrain/digits/distill_ikl.py --work-dir runs/mine --resume
    python -m torch.distributed.run --nproc_per_node 2 tools/train_mmpretrain.py CONFIG --launcher pytorch

All options are those of mmpretrain's script, and so is the exit code. Nothing here is needed for the configs: the
script can be called by its own path just as well, which --where prints. Of a disk that is full or may not be written to
this tool says in one line which one it is.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import runpy
import sys
from pathlib import Path

__all__ = ["train_script"]

CALLER = "train_mmpretrain"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def train_script() -> Path:
    """The path of mmpretrain's installed tools/train.py.

    Raises:
        ImportError: mmpretrain is not installed.
        ValueError: it is installed without its tools.
    """
    spec = importlib.util.find_spec("mmpretrain")  # looks, and imports nothing
    if spec is None or spec.origin is None:
        raise ImportError(
            f"{CALLER}: mmpretrain is missing. Run: python -m pip install 'ikl_plugins[mmpretrain]'", name="mmpretrain"
        )
    script = Path(spec.origin).parent / ".mim" / "tools" / "train.py"
    if not script.is_file():
        raise ValueError(
            f"{CALLER}: mmpretrain must be installed with its tools, but there is no {script}. "
            f"Run: python -m pip install --force-reinstall --no-deps mmpretrain"
        )
    return script


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line: mmpretrain's script, in this process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        script = train_script()
    except (ImportError, ValueError) as error:
        sys.exit(f"error: {error}")
    if arguments == ["--where"]:
        print(script)
        return
    sys.argv = [str(script), *arguments]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except OSError as error:
        if error.errno not in FULL + CLOSED:
            raise
        # A write that fails does not know the name of its file; it lies in the work dir.
        place = error.filename or _work_dir(arguments)
        way_out = "Free some space" if error.errno in FULL else "Make it writable, or name another --work-dir"
        sys.exit(
            f"error: {CALLER}: {place} must be there to write to, but: {error.strerror}. What was whole before is as "
            f"it was. {way_out}, and go on with --resume."
        )


def _work_dir(arguments: list[str]) -> str:
    """Where mmpretrain's script writes to."""
    from mmengine.config import Config

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("config")
    parser.add_argument("--work-dir")
    found = parser.parse_known_args(arguments)[0]
    of_config = Config.fromfile(found.config, import_custom_modules=False).get("work_dir")
    return str(found.work_dir or of_config or Path("work_dirs", Path(found.config).stem))


if __name__ == "__main__":
    main()

"""Runs mmpretrain's own tools/train.py, which is installed with it in a place that is hard to remember.

    python tools/train_mmpretrain.py configs/mmpretrain/digits/distill_ikl.py --work-dir runs/mine --resume
    python -m torch.distributed.run --nproc_per_node 2 tools/train_mmpretrain.py CONFIG --launcher pytorch

All options are those of mmpretrain's script, and so is the exit code. Nothing here is needed for the configs: the
script can be called by its own path just as well, which --where prints.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

__all__ = ["train_script"]

CALLER = "train_mmpretrain"


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
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()

"""Trains a torchdistill YAML or an MMPretrain config.

    ikl train torchdistill/digits/ikl.yaml --seed 1                    # options of the torchdistill driver
    ikl train mmpretrain/digits/distill_ikl.py --work-dir runs/mine    # options of mmpretrain's own tools/train.py
    torchrun --nproc_per_node 2 -m ikl_plugins train CONFIG ...        # several processes
    ikl train --where                                                  # the path of mmpretrain's tools/train.py

CONFIG is a file, or the name of a shipped config (`ikl config list`). It comes before all options, those of the host:
`ikl train CONFIG --help` shows them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .._files import check_config_text
from .config import config_path

__all__ = ["configure", "run"]

CALLER = "ikl train"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--where", action="store_true", help="print the path of mmpretrain's tools/train.py")
    parser.add_argument(
        "config", nargs="?", help="a file, or the name of a shipped config: .yaml of torchdistill, .py of MMPretrain"
    )
    parser.add_argument("options", nargs=argparse.REMAINDER, help="handed to the host")


def run(arguments: argparse.Namespace) -> None:
    """Hands the config to its host's training, in this process."""
    if arguments.where:
        from ikl_plugins.mmpretrain.training import train_script

        print(train_script())
        return
    config = Path(arguments.config or "")
    if config.suffix not in (".yaml", ".yml", ".py"):
        raise ValueError(
            f"{CALLER}: the config must come first and end in .yaml, .yml or .py, got {arguments.config!r}."
        )
    config = config_path(config)
    check_config_text(CALLER, config)
    if config.suffix == ".py":
        from ikl_plugins.mmpretrain.training import main
    else:
        from ikl_plugins.torchdistill.training import main
    main([str(config), *arguments.options])

"""Puts DKL, IKL or GKL into a config of yours, and shows what changes.

    ikl adopt my_kd.yaml --loss IKL                                   # shows the difference, writes nothing
    ikl adopt my_kd.yaml --loss IKL --output my_ikl.yaml --check
    ikl adopt my_student.py --teacher t.py --teacher-ckpt t.pth --loss IKL --output my_ikl.py
    ikl adopt my_classifier.py --adversarial --output my_robust.py

A torchdistill YAML has its KDLoss, LogitStdKDLoss or KLDivLoss replaced, its text edited in place: comments, anchors,
`!join` and `!import_call` stay. Of an MMPretrain config a new one is written that inherits from it; such a config is
Python and is executed, also with --check. The difference goes to the standard output, what it means to the standard
error. What cannot be mapped is refused by line and key.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import yaml

from ikl_plugins._files import check_config_text, written_aside
from ikl_plugins._limits import one_line, printable

from .messages import CALLER

__all__ = ["INTERRUPTED", "configure", "run"]

INTERRUPTED = "nothing was written"
YAML_ENDINGS = (".yaml", ".yml")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    from ikl_plugins.losses import LOSSES

    losses = [name.removesuffix("Loss") for name in LOSSES]
    parser.add_argument("config", type=Path, help="torchdistill YAML, or MMPretrain config (.py)")
    parser.add_argument("--loss", choices=(*losses, "KL"), default="IKL", help="default: IKL; KL for .py alone")
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a keyword of the loss, instead of the value that follows from the config; repeatable",
    )
    parser.add_argument("--check", action="store_true", help="build what was made, and run it forward and backward")
    where = parser.add_argument_group("output (without any, nothing is written)")
    where.add_argument("--output", type=Path, metavar="FILE")
    where.add_argument("--in-place", action="store_true", help="write over the YAML itself")
    where.add_argument("--force", action="store_true", help="write over an --output that is there")
    kl = parser.add_argument_group("torchdistill, for a KLDivLoss in a SimpleLossWrapper")
    kl.add_argument("--student-logits", metavar="MODULE[:input]", help="module whose output (or input) are the logits")
    kl.add_argument("--teacher-logits", metavar="MODULE[:input]")
    mm = parser.add_argument_group("MMPretrain")
    mm.add_argument("--teacher", type=Path, metavar="CONFIG", help="config of the teacher")
    mm.add_argument("--teacher-ckpt", metavar="FILE", help="its checkpoint, a file or an http(s) address")
    mm.add_argument("--adversarial", action="store_true", help="adversarial training in place of distillation")
    mm.add_argument("--eps", metavar="EPS", help="with --adversarial: radius in pixel units (default: 8/255)")


def run(arguments: argparse.Namespace) -> None:
    """Adopts one config; nothing is written unless an output is named."""
    sys.path.insert(0, os.getcwd())  # the config's own modules are looked for where they are when it trains
    config = arguments.config
    if not config.is_file():
        raise ValueError(f"{CALLER}: the config must be a file, but there is none at {config}.")
    if config.suffix not in (*YAML_ENDINGS, ".py"):
        raise ValueError(
            f"{CALLER}: the config must end in .yaml, .yml (torchdistill) or .py (MMPretrain), got {config}."
        )
    for path in filter(None, (config, arguments.teacher)):
        check_config_text(CALLER, path)
    (_adopt_python if config.suffix == ".py" else _adopt_yaml)(arguments)


def _settings(pairs: list[str]) -> dict[str, Any]:
    """The values of --set, read as YAML does."""
    settings = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key or not value:
            raise ValueError(f"{CALLER}: --set must be KEY=VALUE, got {pair!r}. Write --set beta=4.0.")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            rule = f"--set {key} must have a plain value, got {value!r}. Write {key}=4.0."
            raise ValueError(f"{CALLER}: {rule}") from error
        if isinstance(settings[key], str):
            with contextlib.suppress(ValueError):
                settings[key] = float(value)  # 1e-3, which YAML takes for a string
    return settings


def _target(args: argparse.Namespace) -> Path | None:
    """Where to write, None for nowhere."""
    if args.in_place and args.output is not None:
        raise ValueError(f"{CALLER}: --in-place must stand without --output, got both. Leave one out.")
    if args.in_place:
        return Path(args.config)
    if args.output is None:
        return None
    output = Path(args.output).expanduser()
    if output.exists() and output.samefile(args.config):
        raise ValueError(f"{CALLER}: --output must be another file than the config, got {output}. Use --in-place.")
    if output.is_dir():
        raise ValueError(f"{CALLER}: --output must be a file, got the folder {output}.")
    if output.exists() and not args.force:
        raise ValueError(f"{CALLER}: --output must not be there yet, got {output}. Use another name, or --force.")
    return output


def _refuse(args: argparse.Namespace, names: tuple[str, ...], kind: str) -> None:
    for name in names:
        if getattr(args, name) not in (None, False):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{CALLER}: {option} goes with {kind}, got {args.config}. Leave it out.")


def _show_difference(old: str, new: str, old_name: str, new_name: str) -> None:
    for line in difflib.unified_diff(old.splitlines(), new.splitlines(), old_name, new_name, lineterm=""):
        print("\t".join(printable(part, None) for part in line.split("\t")))  # a patch keeps its tabs


def _say(*lines: str) -> None:
    for line in lines:
        print(one_line(line), file=sys.stderr)


def _adopt_yaml(args: argparse.Namespace) -> None:
    from .torchdistill import adopt_yaml

    _refuse(args, ("teacher", "teacher_ckpt", "adversarial", "eps"), "an MMPretrain config (.py)")
    if args.loss == "KL":
        raise ValueError(f"{CALLER}: --loss must be one of ours, got KL, which is KDLoss itself.")
    target, name = _target(args), str(args.config)
    with args.config.open(encoding="utf-8", newline="") as file:
        text = file.read()
    adoption = adopt_yaml(
        text,
        args.loss,
        name=name,
        settings=_settings(args.settings),
        student_logits=args.student_logits,
        teacher_logits=args.teacher_logits,
    )
    _show_difference(text, adoption.text, name, str(target or name))
    _say(*adoption.notes)
    if args.check:
        from .torchdistill_check import check_yaml

        _say(*(f"checked: {line}" for line in check_yaml(adoption, text, name)))
    _write(args.config, target, adoption.text if adoption.changed else None)


def _adopt_python(args: argparse.Namespace) -> None:
    from .mmpretrain import adopt_config, check_config

    warnings.filterwarnings("ignore", "Fail to import ..MultiScaleDeformableAttention", UserWarning)  # of mmcv-lite
    _refuse(args, ("student_logits", "teacher_logits"), "a torchdistill YAML")
    _refuse(args, ("in_place",), "a torchdistill YAML, as the new config inherits from the old one; use --output")
    target = _target(args)
    configs = " and ".join(str(config) for config in (args.config, args.teacher) if config is not None)
    _say(f"{CALLER}: an MMPretrain config is Python, and is executed now: {configs}")
    adoption = adopt_config(
        args.config,
        target or args.config.with_name(f"{args.config.stem}_{args.loss.lower()}.py"),
        args.loss,
        teacher=args.teacher,
        teacher_ckpt=args.teacher_ckpt,
        adversarial=args.adversarial,
        eps=args.eps,
        settings=_settings(args.settings),
    )
    _show_difference("", adoption.text, os.devnull, str(target or "the new config"))
    _say(*adoption.notes)
    if adoption.text and args.check:
        _say(*(f"checked: {line}" for line in check_config(adoption)))
    _write(args.config, target, adoption.text or None)


def _write(config: Path, target: Path | None, text: str | None) -> None:
    if text is None:
        _say(f"{config} is adopted already: nothing to change, nothing written")
        return
    if target is None:
        _say("nothing written; give --output FILE")
        return
    links = target.stat().st_nlink - 1 if target.exists() else 0
    with written_aside(target) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
    _say(f"written: {target}")
    if links > 0:
        others = "1 other hard link, which keeps" if links == 1 else f"{links} other hard links, which keep"
        _say(f"{target} had {others} the old text")

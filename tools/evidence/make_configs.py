"""Writes the torchdistill configs of the published experiments: one template, and tables of values.

    python tools/make_configs.py
    python tools/make_configs.py --check

The files lie in configs/torchdistill/{cifar100,imagenet,imagenet_lt,cifar10}; each is one whole experiment, to be read
and run on its own. --check writes nothing and fails where a file is not what the tables say. Change a value here, or in
ikl_plugins/presets.py where it is one of a loss, not in the files.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from evidence.config_templates import (
    ALONE,
    ALONE_ROLES,
    ATTACKED_ROLES,
    COSINE,
    CROSS_ENTROPY,
    MID_LEVEL,
    PAIR,
    PAIR_ROLES,
    STEPS,
    TAUGHT_ROLES,
    WARMUP_COSINE,
    WHOLE,
    cifar_data,
    imagenet_data,
    normalize,
)
from evidence.report import settle
from ikl_plugins.presets import PRESETS, robust_distillation

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "torchdistill"
FOLDERS = ("cifar100", "imagenet", "imagenet_lt", "cifar10")

_ALPHA = "of the soft-label cross entropy; the paper calls it beta"
_BETA = "of the weighted MSE, its 1/4 inside; the paper calls it alpha"
_ORDER = ("alpha", "beta", "gamma", "temperature", "weight_temperature", "global_info", "num_classes")
_SOURCES = {
    "kd": "knowledge distillation as mdistiller has it, the baseline",
    "kl": "the KL divergence, the baseline",
    "ikl": "IKL, values of the authors' code (Cui et al., NeurIPS 2024)",
    "gkl": "GKL, values of the authors' code (Cui et al., TPAMI 2026)",
}
_FROZEN = "the teacher stays in eval mode; epochs for the loss; several processes"
_BEST = "as in the official code, which reports the best epoch; ..._last.pt holds the last"
_TEMPERED = "of the KL divergence, times temperature**2"
_T2_LEFT_ALONE = "T2, a default that the official {} leave alone: nearly uniform weights"


def _keyword(name: str, value: object, why: str = "") -> str:
    """A keyword of a loss, as a line of YAML."""
    shown = f"'{value}'" if isinstance(value, str) else str(value)
    return f"{name}: {shown}" + (f"  # {why}" if why else "")


def _loss(key: str, lines: list[str], student_note: str = "", teacher_note: str = "") -> str:
    return MID_LEVEL.substitute(
        key=key,
        student_note=student_note and f"  # {student_note}",
        teacher_note=teacher_note and f"  # {teacher_note}",
        settings=textwrap.indent("\n".join(lines), " " * 14),
    )


def _kd(temperature: float, alpha: float, beta: float, why_beta: str) -> str:
    """torchdistill's KDLoss; its alpha and beta are not those of IKL and GKL."""
    lines = [
        _keyword("temperature", temperature),
        _keyword("alpha", alpha, "of the cross entropy to the labels"),
        _keyword("beta", beta, why_beta),
        _keyword("reduction", "batchmean"),
    ]
    return _loss("KDLoss", lines)


def _published(name: str, why: dict[str, str], student_note: str = "", teacher_note: str = "") -> str:
    """The loss of a preset; ``why`` says where its values come from."""
    preset = PRESETS[name]
    keywords = preset.keywords
    gamma = "power of the weights" if keywords.get("gamma") else "uniform weights"
    why = {"alpha": _ALPHA, "beta": _BETA, "gamma": gamma, "weight_temperature": "T2", "global_info": "GI", **why}
    lines = [_keyword("ce_weight", 1.0, why.get("ce_weight", ""))]
    lines += [_keyword(key, keywords[key], why.get(key, "")) for key in _ORDER if key in keywords]
    if preset.warmup_epochs:
        lines.append(_keyword("warmup_epochs", preset.warmup_epochs, why["warmup_epochs"]))
    return _loss(preset.loss, lines, student_note, teacher_note)


def _header(title: str, path: str, processes: int, notes: str) -> str:
    """The comment that a file begins with: what it is, how it is run, what is to be known about it as a whole."""
    lines = [f"# {line}" for line in textwrap.wrap(title, 118)]
    lines += ["#", f"# ikl train torchdistill/{path}"]
    if processes > 1:
        lines.append(f"# torchrun --nproc_per_node {processes} -m ikl_plugins train torchdistill/{path}")
    more = f"{notes} Written by tools/make_configs.py; results and sources are in the README here."
    return "\n".join([*lines, "#", *(f"# {line}" for line in textwrap.wrap(more, 118))])


def _train_kwargs(batch: int, workers: int, processes: int = 1, *, drop_last: str = "") -> str:
    lines = [f"batch_size: {batch}"]
    if processes > 1:
        lines = [
            f"batch_size: !import_call  # {batch} in all; on the paper's {processes} GPUs {batch // processes} each",
            "  key: 'ikl_plugins.torchdistill.share_of_batch'",
            "  init:",
            "    kwargs:",
            f"      total: {batch}",
        ]
    lines.append(f"num_workers: {workers}")
    if drop_last:
        lines.append(f"drop_last: True  # {drop_last}")
    return textwrap.indent("\n".join(lines), " " * 6)


def _destination(folder: str, name: str) -> str:
    return f"runs/torchdistill/{folder}/{name}/{name}.pt"


def _file(name: str, title: str, notes: str, processes: int, *parts: dict[str, object]) -> tuple[str, str]:
    """Path and text of a config; the last part has the last word."""
    filled: dict[str, object] = {}
    for part in parts:
        filled |= part
    path = f"{filled['dataset']}/{name}.yaml"
    return path, WHOLE.substitute(filled, header=_header(title, path, processes, notes))


def _students(dataset: str, name: str, classes: int, **networks: str) -> dict[str, object]:
    """The blocks of a frozen teacher and its student."""
    dst_ckpt = _destination(dataset, name)
    models = PAIR.substitute({"teacher_ckpt": "", "student_kwargs": "", **networks}, classes=classes, dst_ckpt=dst_ckpt)
    return {"models": models, "roles": PAIR_ROLES, "process": _FROZEN}


# --- CIFAR-100 -------------------------------------------------------------------------------------------------------


# Teacher, student, learning rate.
CIFAR100 = (
    ("resnet56", "resnet20", 0.05),
    ("resnet110", "resnet32", 0.05),
    ("resnet32x4", "resnet8x4", 0.05),
    ("wrn_40_2", "wrn_16_2", 0.05),
    ("wrn_40_2", "wrn_40_1", 0.05),
    ("vgg13", "vgg8", 0.05),
    ("resnet32x4", "ShuffleV1", 0.01),
    ("wrn_40_2", "ShuffleV1", 0.01),
    ("vgg13", "MobileNetV2", 0.01),
    ("ResNet50", "MobileNetV2", 0.01),
    ("resnet32x4", "ShuffleV2", 0.01),
)
_CIFAR100: dict[str, object] = {
    "dataset": "cifar100",
    "datasets": cifar_data("cifar100", normalize([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761])),
    "epochs": 240,
    "test": "test",
    "train_kwargs": _train_kwargs(64, 2),
    "test_batch_size": 64,
    "workers": 2,
    "selection": _BEST,
    "weight_decay": "0.0005  # of all parameters, as in the official code",
    "scheduler": STEPS.substitute(milestones=[150, 180, 210]),
}


_CIFAR100_WHY = {
    "ikl": {
        "weight_temperature": _T2_LEFT_ALONE.format("files"),
        "global_info": "GI, likewise: no class prior on CIFAR-100, which the paper does not say",
    },
    "gkl": {"global_info": "GI, set for each pair in the official files"},
}
_CIFAR100_SHARED = {
    "temperature": "of the cross entropy alone; no factor temperature**2",
    "warmup_epochs": "the cross entropy to the labels is not scaled",
}


def _cifar100() -> Iterator[tuple[str, str]]:
    notes = "The paper has the mean of three runs on one GPU; its IKL code sets no seed, its GKL code 0."
    for teacher, student, lr in CIFAR100:
        key = f"'ikl_plugins.{student}'"
        if student.startswith("wrn"):
            key += "  # mdistiller's updates the statistics of three BatchNorms twice a step, this one once"
        weights = f"download_ckpts/cifar_teachers/{teacher}_vanilla/ckpt_epoch_240.pth"
        for kind in ("kd", "ikl", "gkl"):
            name = f"{student}_from_{teacher}-{kind}"
            networks = _students(
                "cifar100",
                name,
                100,
                teacher=f"'ikl_plugins.{teacher}'",
                teacher_kwargs="      num_classes: 100",
                teacher_ckpt=f"    src_ckpt: '{weights}'  # mdistiller's\n",
                student=key,
            )
            if kind == "kd":
                loss = _kd(4.0, 0.1, 0.9, _TEMPERED)
            else:
                loss = _published(f"cifar100/{name}", {**_CIFAR100_SHARED, **_CIFAR100_WHY[kind]})
            own = {"lr": lr, "term": kind, "loss": loss}
            title = f"CIFAR-100, {teacher} -> {student}: {_SOURCES[kind]}."
            yield _file(name, title, notes, 1, _CIFAR100, networks, own)


# --- ImageNet --------------------------------------------------------------------------------------------------------


# torchvision's teacher, a student and its key.
IMAGENET = (("resnet34", "resnet18", "resnet18"), ("resnet50", "MobileNetV1", "ikl_plugins.MobileNetV1"))
_IMAGENET: dict[str, object] = {
    "dataset": "imagenet",
    "datasets": imagenet_data("imagenet", "val", "ikl_plugins.torchdistill.image_folder", "split_dir: 'imagenet/{}'"),
    "epochs": 100,
    "test": "val",
    "train_kwargs": _train_kwargs(512, 8, 8),
    "test_batch_size": 256,
    "workers": 8,
    "selection": _BEST,
    "lr": 0.2,
    "weight_decay": 0.0001,
    "scheduler": STEPS.substitute(milestones=[30, 60, 90]),
}


_IMAGENET_WHY = {
    "ikl": {"warmup_epochs": "no ramp"},
    "gkl": {"warmup_epochs": "the GKL code's default, which its ImageNet files leave alone"},
}


def _imagenet() -> Iterator[tuple[str, str]]:
    for teacher, student, key in IMAGENET:
        for kind in ("kd", "ikl", "gkl"):
            name = f"{student}_from_{teacher}-{kind}"
            networks = _students(
                "imagenet",
                name,
                1000,
                teacher=f"'{teacher}'  # torchvision's",
                teacher_kwargs="      num_classes: 1000\n      weights: 'IMAGENET1K_V1'",
                student=f"'{key}'",
            )
            normaliser = ", with one normaliser of the weights per GPU" if kind == "gkl" else ""
            notes = (
                f"The official code runs 8 GPUs in one process, 64 images each for BatchNorm{normaliser}; 8 processes "
                f"come closest to it. Class folders are read from $IKL_PLUGINS_DATA/imagenet, or from data/imagenet."
            )
            title = f"ImageNet, {teacher} -> {student}: {_SOURCES[kind]}."
            if kind == "kd":
                loss = _kd(1.0, 0.5, 0.5, _TEMPERED)
            else:
                loss = _published(f"imagenet/{name}", _IMAGENET_WHY[kind])
            own = {"term": kind, "loss": loss}
            yield _file(name, title, notes, 8, _IMAGENET, networks, own)


# --- ImageNet-LT -----------------------------------------------------------------------------------------------------


IMAGENET_LT_TEACHERS = ("resnet18", "resnet50", "resnext101_32x4d")
# Teacher, student, weight of the KL divergence.
IMAGENET_LT = (
    ("resnet18", "resnet18", 4.0),
    ("resnet50", "resnet50", 1.0),
    ("resnext101_32x4d", "resnet18", 4.0),
    ("resnext101_32x4d", "resnet50", 3.0),
)
_LONG_TAIL_NETWORKS = {
    "resnet18": ("'resnet18'", "      num_classes: 1000"),
    "resnet50": ("'resnet50'", "      num_classes: 1000"),
    "resnext101_32x4d": (
        "'resnet101'  # with these groups and widths torchvision's builds resnext101_32x4d",
        "      num_classes: 1000\n      groups: 32\n      width_per_group: 4",
    ),
}
_BEST_TEACHER = "the best epoch on the test list, as published"
_LONG_TAIL_NOTE = (
    "The official code runs 4 processes, without a seed. Lists and images are read from $IKL_PLUGINS_DATA/imagenet_lt "
    "and $IKL_PLUGINS_DATA/imagenet, or from data/."
)
_LONG_TAIL: dict[str, object] = {
    "dataset": "imagenet_lt",
    "datasets": imagenet_data(
        "imagenet_lt",
        "test",
        "ikl_plugins.torchdistill.ImageList",
        "list_file: 'imagenet_lt/ImageNet_LT_{}.txt'\nimage_dir: 'imagenet'",
    ),
    "epochs": 90,
    "test": "test",
    "train_kwargs": _train_kwargs(128, 8, 4, drop_last="as in the official code"),
    "test_batch_size": 256,
    "workers": 8,
    "selection": _BEST,
    "lr": 0.05,
    "weight_decay": 0.0005,
    "scheduler": WARMUP_COSINE.substitute(
        epochs=90, warmup=10, formula="the official formula: no scheduler of torch has it"
    ),
}


_LONG_TAIL_WHY = {
    "ikl": {
        "weight_temperature": _T2_LEFT_ALONE.format("scripts"),
        "global_info": "GI, likewise: no class prior, which the paper does not say",
    },
    "gkl": {},
}


def _imagenet_lt() -> Iterator[tuple[str, str]]:
    for teacher in IMAGENET_LT_TEACHERS:
        key, kwargs = _LONG_TAIL_NETWORKS[teacher]
        place = _destination("imagenet_lt", teacher)
        own = {
            "models": ALONE.substitute(model=key, kwargs=kwargs, dst_ckpt=place),
            "roles": ALONE_ROLES,
            "process": "several processes",
            "term": "ce",
            "loss": CROSS_ENTROPY,
        }
        title = f"ImageNet-LT, {teacher} trained on the labels: the baseline, and the teacher of other files here."
        yield _file(teacher, title, _LONG_TAIL_NOTE, 4, _LONG_TAIL, own)
    for teacher, student, weight in IMAGENET_LT:
        key, kwargs = _LONG_TAIL_NETWORKS[teacher]
        for kind in ("kl", "ikl", "gkl"):
            name = f"{student}_from_{teacher}-{kind}"
            if kind == "kl":
                loss = _kd(1.0, 1.0, weight, "of the KL divergence")
            elif (preset := f"imagenet_lt/{name}") in PRESETS:
                loss = _published(preset, _LONG_TAIL_WHY[kind])
            else:  # the authors have no script
                continue
            networks = _students(
                "imagenet_lt",
                name,
                1000,
                teacher=key,
                teacher_kwargs=kwargs,
                teacher_ckpt=f"    src_ckpt: '{_destination('imagenet_lt', teacher)}'  # {_BEST_TEACHER}\n",
                student=f"'{student}'",
            )
            title = f"ImageNet-LT, {teacher} -> {student}: {_SOURCES[kind]}."
            own = {"term": kind, "loss": loss}
            yield _file(name, title, _LONG_TAIL_NOTE, 4, _LONG_TAIL, networks, own)


# --- adversarial training on CIFAR-10 --------------------------------------------------------------------------------

_NATURAL = "the natural images' logits"
_ADVERSARIAL = "the adversarial images' logits"
_CIFAR10_TITLES = {
    "ikl": "IKL, values of the authors' script (Cui et al., NeurIPS 2024)",
    "gkl": "GKL, values of the authors' second script (Cui et al., TPAMI 2026)",
    "trades": "TRADES, the baseline, with the authors' attack and schedule",
}
_CIFAR10_NOTES = (
    "Without the adversarial weight perturbation and the weight averaging of the published runs, for which "
    "torchdistill has no place, so their numbers are not to be expected: configs/mmpretrain has both."
)
_CIFAR10: dict[str, object] = {
    "dataset": "cifar10",
    "datasets": cifar_data("cifar10"),
    "epochs": 200,
    "test": "test",
    "train_kwargs": _train_kwargs(128, 2, 4),
    "test_batch_size": 128,
    "workers": 2,
    "selection": "natural images, and so not what to choose by: take the last checkpoint, ..._last.pt",
    "roles": ATTACKED_ROLES,
    "lr": 0.2,
    "weight_decay": 0.0005,
    "scheduler": WARMUP_COSINE.substitute(
        epochs=200, warmup=0, formula="0.1 * (1 + cos(pi * epoch / 201)), epochs from 1"
    ),
    "process": "epochs for the loss and for the ramp of eps; several processes",
}
_TRADES: dict[str, object] = {
    "scheduler": COSINE,
    "train_kwargs": _train_kwargs(128, 2, 4, drop_last="in the authors' TRADES script, not in that of IKL"),
}


_CIFAR10_WHY = {
    "ikl": {"weight_temperature": "T of the class prior"},
    "gkl": {
        "weight_temperature": "T of the class prior; the script's 1 gets lost in a missing line continuation",
    },
    "trades": {
        "ce_weight": f"of {_NATURAL} to the labels",
        "alpha": "a default of the authors' TRADES script; its published command, for CIFAR-100, has 9",
        "beta": "equal to alpha: then DKL has the gradients of the KL divergence",
    },
}


def _cifar10() -> Iterator[tuple[str, str]]:
    for kind, title in _CIFAR10_TITLES.items():
        name = f"wrn_34_10-{kind}"
        named = " The published checkpoint is named after alpha 3; the script says 4." if kind == "ikl" else ""
        own = {
            "models": ALONE.substitute(
                model="'ikl_plugins.robustbench_network'  # RobustBench's class: it loads the checkpoint as it is",
                kwargs="      architecture: 'WideResNet-34-10'\n      num_classes: 10",
                dst_ckpt=_destination("cifar10", name),
            ),
            "term": kind,
            "loss": _published(f"cifar10_adversarial/{name}", _CIFAR10_WHY[kind], _ADVERSARIAL, _NATURAL),
        }
        title = f"CIFAR-10, adversarial training of WRN-34-10: {title}."
        yield _file(name, title, _CIFAR10_NOTES + named, 4, _CIFAR10, _TRADES if kind == "trades" else {}, own)


# --- adversarial distillation on CIFAR-10 -----------------------------------------------------------------------------

_RSLAD_TITLES = {
    "rslad": "RSLAD (Zi et al., ICCV 2021), values of the authors' code",
    "rslad_ikl": "RSLAD with IKL in place of the KL divergence; nobody has published its weights",
}
_RSLAD: dict[str, object] = {
    "epochs": 300,
    "train_kwargs": _train_kwargs(128, 2),
    "roles": TAUGHT_ROLES,
    "lr": 0.1,
    "weight_decay": 0.0002,
    "scheduler": STEPS.substitute(milestones=[215, 260, 285]),
}
_RSLAD_WHY = {
    "alpha": "5/6, of a KL divergence that is a mean over the 10 classes as well",
    "teacher_natural_weight": "of the natural images: 1/6 beside 5/6",
}


def _cifar10_distilled() -> Iterator[tuple[str, str]]:
    for kind, title in _RSLAD_TITLES.items():
        name = f"ResNet-18_from_wrn_34_10-{kind}"
        method = robust_distillation(kind.replace("_", "-"), 10)
        why = {**_RSLAD_WHY, "weight_temperature": "T of the class prior"}
        keywords, loss = dict(method.keywords), method.loss
        if loss == "KLLoss":
            keywords = dict.fromkeys(("alpha", "beta"), keywords["loss_weight"])
            why["beta"] = "equal to alpha: then DKL has the gradients of the KL divergence"
            loss = "DKLLoss"
        else:
            why["beta"] = "five times alpha, as in the published adversarial training"
        keywords = {"teacher_natural_weight": method.teacher_natural_weight, **keywords}
        lines = [
            _keyword(key, keywords[key], why.get(key, ""))
            for key in ("teacher_natural_weight", *_ORDER)
            if key in keywords
        ]
        teacher = _destination("cifar10", "wrn_34_10-trades").replace(".pt", "_last.pt")
        networks = _students(
            "cifar10",
            name,
            10,
            teacher="'ikl_plugins.robustbench_network'",
            teacher_kwargs="      architecture: 'WideResNet-34-10'\n      num_classes: 10",
            teacher_ckpt=f"    src_ckpt: '{teacher}'  # TRADES, as RSLAD's\n",
            student="'ikl_plugins.robustbench_network'",
            student_kwargs="      architecture: 'ResNet-18'\n",
        )
        own = {"term": kind, "loss": _loss(loss, lines, _ADVERSARIAL, "the teacher's logits of the natural images")}
        notes = "The authors choose by PGD-20 on the test images."
        title = f"CIFAR-10, adversarial distillation, WRN-34-10 -> ResNet-18: {title}."
        yield _file(name, title, notes, 1, _CIFAR10, networks, _RSLAD, own)


# --- the command -----------------------------------------------------------------------------------------------------


_FAMILIES = (_cifar100, _imagenet, _imagenet_lt, _cifar10, _cifar10_distilled)


def render() -> dict[str, str]:
    """The text of every config by its path under configs/torchdistill."""
    return {path: text for family in _FAMILIES for path, text in family()}


def differences(folder: Path = CONFIGS) -> list[str]:
    """A line for each file of a folder of configs that is missing, differs, or comes from no table."""
    rendered = render()
    found = []
    for path, text in rendered.items():
        file = folder / path
        if not file.is_file():
            found.append(f"{path} is missing")
        elif file.read_text(encoding="utf-8") != text:
            found.append(f"{path} differs")
    shipped = [file.relative_to(folder) for name in FOLDERS for file in sorted((folder / name).rglob("*.yaml"))]
    return found + [f"{path} comes from no table" for path in shipped if path.as_posix() not in rendered]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file is not as it should be")
    parser.add_argument("--configs", type=Path, default=CONFIGS, metavar="FOLDER", help="default: configs/torchdistill")
    args = parser.parse_args(arguments)
    if args.check:
        found = differences(args.configs)
        if found:
            sys.exit("\n".join([*found, "run: python tools/make_configs.py"]))
        return
    try:
        texts = {args.configs / path: text for path, text in render().items()}
        print(f"{len(settle(texts))} of {len(texts)} files written under {args.configs}")
    except OSError as error:
        sys.exit(f"error: {error}")

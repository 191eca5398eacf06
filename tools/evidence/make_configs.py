"""Writes the torchdistill configs of the published experiments: one template, and a table of values per data set.

    python tools/make_configs.py
    python tools/make_configs.py --check

The files lie in configs/torchdistill/{cifar100,imagenet,imagenet_lt,cifar10}; each is one whole experiment, to be read
and run on its own. --check writes nothing and fails where a file is not what the tables say. Change a value here, not
in the files.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import NamedTuple

from evidence.report import settle

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "torchdistill"
FOLDERS = ("cifar100", "imagenet", "imagenet_lt", "cifar10")


# --- the template ----------------------------------------------------------------------------------------------------

_WHOLE = Template("""\
$header
dependencies: ['ikl_plugins.torchdistill']

datasets:
$datasets

models:
$models

train:
  log_freq: 100
  num_epochs: $epochs
  train_data_loader:
    dataset_id: '$dataset/train'
    sampler:
      class_or_func: !import_get
        key: 'torch.utils.data.RandomSampler'
      kwargs:
    kwargs:
$train_kwargs
  val_data_loader:
    dataset_id: '$dataset/$test'  # $selection
    sampler: &sequential
      class_or_func: !import_get
        key: 'torch.utils.data.SequentialSampler'
      kwargs:
    kwargs: &test_kwargs
      batch_size: $test_batch_size
      num_workers: $workers
$roles
  optimizer:
    key: 'SGD'
    kwargs:
      lr: $lr
      momentum: 0.9
      weight_decay: $weight_decay
  scheduler:
$scheduler
  pre_epoch_process: 'ikl_pre_epoch_process'  # $process
  criterion:
    key: 'WeightedSumLoss'
    kwargs:
      sub_terms:
        $term:
$loss
          weight: 1.0

test:
  test_data_loader:
    dataset_id: '$dataset/$test'
    sampler: *sequential
    kwargs: *test_kwargs
""")


def _call(key: str, anchor: str = "", **kwargs: object) -> str:
    """An item of a list that calls something."""
    lines = [f"- {anchor}!import_call", f"  key: '{key}'"]
    if kwargs:
        lines += ["  init:", "    kwargs:", *(f"      {name}: {value}" for name, value in kwargs.items())]
    return "\n".join(lines)


def _dataset(name: str, key: str, place: str, transforms: list[str] | str) -> str:
    """A data set, and what its images go through: a list, or a flow sequence of anchors."""
    listed = transforms if isinstance(transforms, str) else "\n" + textwrap.indent("\n".join(transforms), " " * 14)
    return textwrap.indent(
        f"{name}: !import_call\n"
        f"  key: '{key}'\n"
        f"  init:\n"
        f"    kwargs:\n"
        f"{textwrap.indent(place, ' ' * 6)}\n"
        f"      transform: !import_call\n"
        f"        key: 'torchvision.transforms.Compose'\n"
        f"        init:\n"
        f"          kwargs:\n"
        f"            transforms:{listed if listed.startswith(chr(10)) else ' ' + listed}",
        "  ",
    )


_TORCHVISION = "torchvision.transforms."
_FLIP = _call(_TORCHVISION + "RandomHorizontalFlip")
_TO_TENSOR = _call(_TORCHVISION + "ToTensor", "&to_tensor ")


def _normalize(mean: list[float], std: list[float]) -> str:
    return _call(_TORCHVISION + "Normalize", "&normalize ", mean=mean, std=std)


def _cifar_data(dataset: str, *normalize: str) -> str:
    key = f"torchvision.datasets.{dataset.upper()}"
    crop = _call(_TORCHVISION + "RandomCrop", size=32, padding=4)
    again = "[*to_tensor, *normalize]" if normalize else "[*to_tensor]"

    def place(train: bool) -> str:
        return f"root: 'data/{dataset}'\ntrain: {train}\ndownload: True"

    return "\n".join(
        [
            _dataset(f"{dataset}/train", key, place(True), [crop, _FLIP, _TO_TENSOR, *normalize]),
            _dataset(f"{dataset}/test", key, place(False), again),
        ]
    )


def _imagenet_data(dataset: str, test: str, key: str, place: str) -> str:
    """Both splits; ``place`` names each with braces."""
    normalize = _normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    cropped = _call(_TORCHVISION + "RandomResizedCrop", size=224)
    whole = [_call(_TORCHVISION + name, size=size) for name, size in (("Resize", 256), ("CenterCrop", 224))]
    again = ["- *to_tensor", "- *normalize"]
    return "\n".join(
        [
            _dataset(f"{dataset}/train", key, place.format("train"), [cropped, _FLIP, _TO_TENSOR, normalize]),
            _dataset(f"{dataset}/{test}", key, place.format(test), [*whole, *again]),
        ]
    )


_PAIR = Template("""\
  teacher_model:
    key: $teacher
    kwargs:
$teacher_kwargs
$teacher_ckpt  student_model:
    key: $student
    kwargs:
      num_classes: $classes
    dst_ckpt: '$dst_ckpt'""")

_ALONE = Template("""\
  model:
    key: $model
    kwargs:
$kwargs
    dst_ckpt: '$dst_ckpt'""")

_PAIR_ROLES = """\
  teacher:
    forward_proc: 'forward_batch_only'
    requires_grad: False
  student:
    forward_proc: 'forward_batch_only'"""

_ALONE_ROLES = """\
  model:
    forward_proc: 'forward_batch_only'"""

_ATTACKED_ROLES = """\
  model:
    forward_proc: !import_call  # crafts the images; its key is what the box looks up
      key: 'ikl_plugins.torchdistill.adversarial_forward'
      init:
        kwargs:
          eps: '8/255'
          eps_ramp: 1.0  # 8/255 * epoch / 200
          budget: 'high_as_executed'  # 5 steps of eps / 2; the 2 to 5 steps that the script means to take never run
          random_start: 'normal'  # 0.001 * N(0, 1), neither projected nor clamped before the first step
          objective: 'soft_cross_entropy'  # to the natural predictions, without the weighted MSE
          model_mode: 'eval'"""

_STEPS = Template("""\
    key: 'MultiStepLR'
    kwargs:
      milestones: $milestones
      gamma: 0.1""")

_WARMUP_COSINE = Template("""\
    key: 'LambdaLR'
    kwargs:
      lr_lambda: !import_call
        key: 'ikl_plugins.torchdistill.WarmupCosine'  # $formula
        init:
          kwargs:
            epochs: $epochs
            warmup_epochs: $warmup""")

_COSINE = """\
    key: 'CosineAnnealingLR'  # 0.1 * (1 + cos(pi * (epoch - 1) / 200)); the IKL script is one epoch ahead
    kwargs:
      T_max: 200"""

_MID_LEVEL = Template("""\
          criterion:
            key: '$key'
            kwargs:
              student_module_path: '.'$student_note
              student_module_io: 'output'
              teacher_module_path: '.'$teacher_note
              teacher_module_io: 'output'
$settings""")

_CROSS_ENTROPY = """\
          criterion:
            key: 'CrossEntropyLoss'
            kwargs:
              reduction: 'mean'
          criterion_wrapper:
            key: 'SimpleLossWrapper'
            kwargs:
              input:
                is_from_teacher: False
                module_path: '.'
                io: 'output'
              target:
                uses_label: True"""

_ALPHA = "of the soft-label cross entropy; the paper calls it beta"
_BETA = "of the weighted MSE, its 1/4 inside; the paper calls it alpha"
_KEYS = {"kd": "KDLoss", "kl": "KDLoss", "ikl": "IKLLoss", "gkl": "GKLLoss", "trades": "DKLLoss"}
_SOURCES = {
    "kd": "knowledge distillation as mdistiller has it, the baseline",
    "kl": "the KL divergence, the baseline",
    "ikl": "IKL, values of the authors' code (Cui et al., NeurIPS 2024)",
    "gkl": "GKL, values of the authors' code (Cui et al., TPAMI 2026)",
}
_FROZEN = "the teacher stays in eval mode; epochs for the loss; several processes"
_BEST = "as in the official code, which reports the best epoch; ..._last.pt holds the last"
_NO_FACTOR = "of the cross entropy alone; no factor temperature**2"
_T2_LEFT_ALONE = "T2, a default that the official {} leave alone: nearly uniform weights"


class Setting(NamedTuple):
    """A keyword of a loss, as a line of YAML."""

    name: str
    value: object
    why: str = ""

    def line(self) -> str:
        shown = f"'{self.value}'" if isinstance(self.value, str) else str(self.value)
        return f"{self.name}: {shown}" + (f"  # {self.why}" if self.why else "")


def _lines(settings: list[Setting], indent: int) -> str:
    return textwrap.indent("\n".join(setting.line() for setting in settings), " " * indent)


def _loss(kind: str, settings: list[Setting], student_note: str = "", teacher_note: str = "") -> str:
    return _MID_LEVEL.substitute(
        key=_KEYS[kind],
        student_note=student_note and f"  # {student_note}",
        teacher_note=teacher_note and f"  # {teacher_note}",
        settings=_lines(settings, 14),
    )


def _kd(temperature: float, alpha: float, beta: float, no_factor: str = "") -> list[Setting]:
    """torchdistill's KDLoss; its alpha and beta are not those of IKL and GKL."""
    return [
        Setting("temperature", temperature),
        Setting("alpha", alpha, "of the cross entropy to the labels"),
        Setting("beta", beta, no_factor or "of the KL divergence, times temperature**2"),
        Setting("reduction", "batchmean"),
    ]


class Weights(NamedTuple):
    """alpha, beta, gamma of a published run; IKL has no gamma."""

    alpha: float
    beta: float
    gamma: float | None = None


def _decoupled(
    weights: Weights,
    *,
    temperature: tuple[float, str] = (1.0, ""),
    weight_temperature: tuple[float, str] = (1.0, "T2"),
    global_info: tuple[bool, str] = (True, "GI"),
    classes: int = 1000,
    ramp: tuple[int, str] | None = None,
) -> list[Setting]:
    """IKL, or GKL with a gamma."""
    alpha, beta, gamma = weights
    settings = [
        Setting("ce_weight", 1.0),
        Setting("alpha", float(alpha), _ALPHA),
        Setting("beta", float(beta), _BETA),
        Setting("temperature", *temperature),
        Setting("weight_temperature", *weight_temperature),
        Setting("global_info", *global_info),
        Setting("num_classes", classes),
    ]
    if gamma is not None:
        settings.insert(3, Setting("gamma", float(gamma), "power of the weights" if gamma else "uniform weights"))
    if ramp is not None:
        settings.append(Setting("warmup_epochs", *ramp))
    return settings


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
    return path, _WHOLE.substitute(filled, header=_header(title, path, processes, notes))


def _students(dataset: str, name: str, classes: int, **networks: str) -> dict[str, object]:
    """The blocks of a frozen teacher and its student."""
    dst_ckpt = _destination(dataset, name)
    models = _PAIR.substitute({"teacher_ckpt": "", **networks}, classes=classes, dst_ckpt=dst_ckpt)
    return {"models": models, "roles": _PAIR_ROLES, "process": _FROZEN}


# --- CIFAR-100 -------------------------------------------------------------------------------------------------------


class CifarPair(NamedTuple):
    """A pair of the CIFAR-100 tables."""

    teacher: str
    student: str
    lr: float
    ikl: Weights
    gkl: Weights
    gkl_prior: bool


CIFAR100 = (
    CifarPair("resnet56", "resnet20", 0.05, Weights(1, 4), Weights(1, 4, 0.2), True),
    CifarPair("resnet110", "resnet32", 0.05, Weights(1, 12), Weights(1, 4, 0.1), False),
    CifarPair("resnet32x4", "resnet8x4", 0.05, Weights(1, 8), Weights(1, 16, 0.05), True),
    CifarPair("wrn_40_2", "wrn_16_2", 0.05, Weights(3, 12), Weights(3, 20, 0.3), False),
    CifarPair("wrn_40_2", "wrn_40_1", 0.05, Weights(1, 8), Weights(1, 12, 0.3), False),
    CifarPair("vgg13", "vgg8", 0.05, Weights(1, 12), Weights(1, 8, 0.2), True),
    CifarPair("resnet32x4", "ShuffleV1", 0.01, Weights(1, 8), Weights(1, 8, 0.0), True),
    CifarPair("wrn_40_2", "ShuffleV1", 0.01, Weights(1, 4), Weights(1, 8, 0.0), False),
    CifarPair("vgg13", "MobileNetV2", 0.01, Weights(4, 12), Weights(4, 12, 0.1), True),
    CifarPair("ResNet50", "MobileNetV2", 0.01, Weights(1, 12), Weights(1, 8, 0.05), True),
    CifarPair("resnet32x4", "ShuffleV2", 0.01, Weights(3, 12), Weights(3, 12, 0.1), True),
)
_CIFAR100: dict[str, object] = {
    "dataset": "cifar100",
    "datasets": _cifar_data("cifar100", _normalize([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761])),
    "epochs": 240,
    "test": "test",
    "train_kwargs": _train_kwargs(64, 2),
    "test_batch_size": 64,
    "workers": 2,
    "selection": _BEST,
    "weight_decay": "0.0005  # of all parameters, as in the official code",
    "scheduler": _STEPS.substitute(milestones=[150, 180, 210]),
}


def _cifar100_loss(pair: CifarPair, kind: str) -> list[Setting]:
    if kind == "kd":
        return _kd(4.0, 0.1, 0.9)
    shared = {
        "temperature": (4.0, _NO_FACTOR),
        "classes": 100,
        "ramp": (20, "the cross entropy to the labels is not scaled"),
    }
    if kind == "ikl":
        return _decoupled(
            pair.ikl,
            weight_temperature=(100.0, _T2_LEFT_ALONE.format("files")),
            global_info=(False, "GI, likewise: no class prior on CIFAR-100, which the paper does not say"),
            **shared,
        )
    return _decoupled(
        pair.gkl,
        weight_temperature=(4.0, "T2"),
        global_info=(pair.gkl_prior, "GI, set for each pair in the official files"),
        **shared,
    )


def _cifar100() -> Iterator[tuple[str, str]]:
    notes = "The paper has the mean of three runs on one GPU; its IKL code sets no seed, its GKL code 0."
    for pair in CIFAR100:
        student = f"'ikl_plugins.{pair.student}'"
        if pair.student.startswith("wrn"):
            student += "  # mdistiller's updates the statistics of three BatchNorms twice a step, this one once"
        weights = f"download_ckpts/cifar_teachers/{pair.teacher}_vanilla/ckpt_epoch_240.pth"
        for kind in ("kd", "ikl", "gkl"):
            name = f"{pair.student}_from_{pair.teacher}-{kind}"
            networks = _students(
                "cifar100",
                name,
                100,
                teacher=f"'ikl_plugins.{pair.teacher}'",
                teacher_kwargs="      num_classes: 100",
                teacher_ckpt=f"    src_ckpt: '{weights}'  # mdistiller's\n",
                student=student,
            )
            own = {"lr": pair.lr, "term": kind, "loss": _loss(kind, _cifar100_loss(pair, kind))}
            title = f"CIFAR-100, {pair.teacher} -> {pair.student}: {_SOURCES[kind]}."
            yield _file(name, title, notes, 1, _CIFAR100, networks, own)


# --- ImageNet --------------------------------------------------------------------------------------------------------


class ImageNetPair(NamedTuple):
    """A pair of the ImageNet table: torchvision's teacher, a student and its key."""

    teacher: str
    student: str
    key: str
    ikl: Weights
    gkl: Weights


IMAGENET = (
    ImageNetPair("resnet34", "resnet18", "resnet18", Weights(1, 0.5), Weights(1, 0.5, 0.6)),
    ImageNetPair("resnet50", "MobileNetV1", "ikl_plugins.MobileNetV1", Weights(4, 1), Weights(4, 1, 0.5)),
)
_IMAGENET: dict[str, object] = {
    "dataset": "imagenet",
    "datasets": _imagenet_data("imagenet", "val", "ikl_plugins.torchdistill.image_folder", "split_dir: 'imagenet/{}'"),
    "epochs": 100,
    "test": "val",
    "train_kwargs": _train_kwargs(512, 8, 8),
    "test_batch_size": 256,
    "workers": 8,
    "selection": _BEST,
    "lr": 0.2,
    "weight_decay": 0.0001,
    "scheduler": _STEPS.substitute(milestones=[30, 60, 90]),
}


def _imagenet_loss(pair: ImageNetPair, kind: str) -> list[Setting]:
    if kind == "kd":
        return _kd(1.0, 0.5, 0.5)
    if kind == "ikl":
        return _decoupled(pair.ikl, ramp=(1, "no ramp"))
    return _decoupled(pair.gkl, ramp=(5, "the GKL code's default, which its ImageNet files leave alone"))


def _imagenet() -> Iterator[tuple[str, str]]:
    for pair in IMAGENET:
        for kind in ("kd", "ikl", "gkl"):
            name = f"{pair.student}_from_{pair.teacher}-{kind}"
            networks = _students(
                "imagenet",
                name,
                1000,
                teacher=f"'{pair.teacher}'  # torchvision's",
                teacher_kwargs="      num_classes: 1000\n      weights: 'IMAGENET1K_V1'",
                student=f"'{pair.key}'",
            )
            normaliser = ", with one normaliser of the weights per GPU" if kind == "gkl" else ""
            notes = (
                f"The official code runs 8 GPUs in one process, 64 images each for BatchNorm{normaliser}; 8 processes "
                f"come closest to it. Class folders are read from $IKL_PLUGINS_DATA/imagenet, or from data/imagenet."
            )
            title = f"ImageNet, {pair.teacher} -> {pair.student}: {_SOURCES[kind]}."
            own = {"term": kind, "loss": _loss(kind, _imagenet_loss(pair, kind))}
            yield _file(name, title, notes, 8, _IMAGENET, networks, own)


# --- ImageNet-LT -----------------------------------------------------------------------------------------------------


class LongTailPair(NamedTuple):
    """A pair of the ImageNet-LT table."""

    teacher: str
    student: str
    kl: float
    ikl: Weights
    gkl: Weights | None  # None where the authors have no script


IMAGENET_LT_TEACHERS = ("resnet18", "resnet50", "resnext101_32x4d")
IMAGENET_LT = (
    LongTailPair("resnet18", "resnet18", 4.0, Weights(1, 0.5), None),
    LongTailPair("resnet50", "resnet50", 1.0, Weights(1, 1), Weights(1, 1, 0.3)),
    LongTailPair("resnext101_32x4d", "resnet18", 4.0, Weights(4, 4), Weights(4, 4, 0.3)),
    LongTailPair("resnext101_32x4d", "resnet50", 3.0, Weights(3, 4), Weights(3, 4, 0.3)),
)
_LONG_TAIL_NETWORKS = {
    "resnet18": ("'resnet18'", "      num_classes: 1000"),
    "resnet50": ("'resnet50'", "      num_classes: 1000"),
    "resnext101_32x4d": (
        "'resnet101'  # with these groups and widths torchvision's builds resnext101_32x4d",
        "      num_classes: 1000\n      groups: 32\n      width_per_group: 4",
    ),
}
_LONG_TAIL_NOTE = (
    "The official code runs 4 processes, without a seed. Lists and images are read from $IKL_PLUGINS_DATA/imagenet_lt "
    "and $IKL_PLUGINS_DATA/imagenet, or from data/."
)
_LONG_TAIL: dict[str, object] = {
    "dataset": "imagenet_lt",
    "datasets": _imagenet_data(
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
    "scheduler": _WARMUP_COSINE.substitute(
        epochs=90, warmup=10, formula="the official formula: no scheduler of torch has it"
    ),
}


def _long_tail_loss(pair: LongTailPair, kind: str) -> list[Setting]:
    if kind == "kl":
        return _kd(1.0, 1.0, pair.kl, "of the KL divergence")
    if kind == "gkl" and pair.gkl is not None:
        return _decoupled(pair.gkl)
    return _decoupled(
        pair.ikl,
        weight_temperature=(100.0, _T2_LEFT_ALONE.format("scripts")),
        global_info=(False, "GI, likewise: no class prior, which the paper does not say"),
    )


def _imagenet_lt() -> Iterator[tuple[str, str]]:
    for teacher in IMAGENET_LT_TEACHERS:
        key, kwargs = _LONG_TAIL_NETWORKS[teacher]
        place = _destination("imagenet_lt", teacher)
        own = {
            "models": _ALONE.substitute(model=key, kwargs=kwargs, dst_ckpt=place),
            "roles": _ALONE_ROLES,
            "process": "several processes",
            "term": "ce",
            "loss": _CROSS_ENTROPY,
        }
        title = f"ImageNet-LT, {teacher} trained on the labels: the baseline, and the teacher of other files here."
        yield _file(teacher, title, _LONG_TAIL_NOTE, 4, _LONG_TAIL, own)
    for pair in IMAGENET_LT:
        key, kwargs = _LONG_TAIL_NETWORKS[pair.teacher]
        for kind in ("kl", "ikl", "gkl") if pair.gkl else ("kl", "ikl"):
            name = f"{pair.student}_from_{pair.teacher}-{kind}"
            networks = _students(
                "imagenet_lt",
                name,
                1000,
                teacher=key,
                teacher_kwargs=kwargs,
                teacher_ckpt=f"    src_ckpt: '{_destination('imagenet_lt', pair.teacher)}'\n",
                student=f"'{pair.student}'",
            )
            title = f"ImageNet-LT, {pair.teacher} -> {pair.student}: {_SOURCES[kind]}."
            own = {"term": kind, "loss": _loss(kind, _long_tail_loss(pair, kind))}
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
    "datasets": _cifar_data("cifar10"),
    "epochs": 200,
    "test": "test",
    "train_kwargs": _train_kwargs(128, 2, 4),
    "test_batch_size": 128,
    "workers": 2,
    "selection": "natural images, and so not what to choose by: take the last checkpoint, ..._last.pt",
    "roles": _ATTACKED_ROLES,
    "lr": 0.2,
    "weight_decay": 0.0005,
    "scheduler": _WARMUP_COSINE.substitute(
        epochs=200, warmup=0, formula="0.1 * (1 + cos(pi * epoch / 201)), epochs from 1"
    ),
    "process": "epochs for the loss and for the ramp of eps; several processes",
}
_TRADES: dict[str, object] = {
    "scheduler": _COSINE,
    "train_kwargs": _train_kwargs(128, 2, 4, drop_last="in the authors' TRADES script, not in that of IKL"),
}


def _cifar10_loss(kind: str) -> list[Setting]:
    if kind == "trades":
        weight = "a default of the authors' TRADES script; its published command, for CIFAR-100, has 9"
        return [
            Setting("ce_weight", 1.0, f"of {_NATURAL} to the labels"),
            Setting("alpha", 6.0, weight),
            Setting("beta", 6.0, "equal to alpha: then DKL has the gradients of the KL divergence"),
            Setting("temperature", 1.0),
            Setting("num_classes", 10),
        ]
    lost = "; the script's 1 gets lost in a missing line continuation" if kind == "gkl" else ""
    weights = Weights(4, 20, 0.2 if kind == "gkl" else None)
    return _decoupled(weights, weight_temperature=(4.0, f"T of the class prior{lost}"), classes=10)


def _cifar10() -> Iterator[tuple[str, str]]:
    for kind, title in _CIFAR10_TITLES.items():
        name = f"wrn_34_10-{kind}"
        named = " The published checkpoint is named after alpha 3; the script says 4." if kind == "ikl" else ""
        own = {
            "models": _ALONE.substitute(
                model="'ikl_plugins.robustbench_network'  # RobustBench's class: it loads the checkpoint as it is",
                kwargs="      architecture: 'WideResNet-34-10'\n      num_classes: 10",
                dst_ckpt=_destination("cifar10", name),
            ),
            "term": kind,
            "loss": _loss(kind, _cifar10_loss(kind), _ADVERSARIAL, _NATURAL),
        }
        title = f"CIFAR-10, adversarial training of WRN-34-10: {title}."
        yield _file(name, title, _CIFAR10_NOTES + named, 4, _CIFAR10, _TRADES if kind == "trades" else {}, own)


# --- the command -----------------------------------------------------------------------------------------------------


def render() -> dict[str, str]:
    """The text of every config by its path under configs/torchdistill."""
    return {path: text for family in (_cifar100, _imagenet, _imagenet_lt, _cifar10) for path, text in family()}


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

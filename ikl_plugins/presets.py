"""Published settings of the losses by name: the one source for classes, generated configs, ``ikl adopt`` and docs.

A name is one of three:

- that of a shipped config without its host: ``cifar100/resnet20_from_resnet56-gkl``. Values are those of the authors'
  code (repository jiequancui/DKL, folders DKLv1 for IKL and DKLv2 for GKL), in whose naming alpha weighs the soft-label
  cross entropy and beta the weighted MSE;
- one of :data:`FAMILIES`, which stands for a published experiment: ``cifar100_distillation``;
- ``start``, for data that nobody has published settings for. Chosen by measurement: ``tools/choosing.py``,
  docs/choosing.md. It has no class prior, so it needs neither labels nor epochs.

The last part of a name ('-ikl') may be left out where the loss is known. In each case the cross entropy to the labels
stands beside the loss, with weight 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from . import _validation as check

__all__ = [
    "FAMILIES",
    "PRESETS",
    "ROBUST_DISTILLATION",
    "Preset",
    "RobustDistillation",
    "find_preset",
    "robust_distillation",
]


class Preset(NamedTuple):
    """The settings of one experiment."""

    loss: str  # a name of ikl_plugins.losses.LOSSES
    keywords: Mapping[str, Any]  # of that class
    warmup_epochs: int = 0  # of the ramp of a distillation loss, see ikl_plugins.losses.warmup_factor


def find_preset(name: str, loss: str) -> Preset:
    """The preset of a name for a loss.

    Args:
        name: a key of :data:`PRESETS`, or one without the '-ikl' that its loss adds: 'start', 'cifar100_distillation'.
        loss: name of the class, such as ``'IKLLoss'``.

    Raises:
        ValueError: there is none, or it is of another loss.
    """
    last = f"-{loss.removesuffix('Loss').lower()}"
    short = name if name in PRESETS else name + last
    if short not in PRESETS:
        known = [key.removesuffix(last) for key, preset in PRESETS.items() if preset.loss == loss]
        raise ValueError(check.unknown_name_message(f"{loss}.preset", "preset", name, known))
    preset = PRESETS[short]
    if preset.loss != loss:
        raise ValueError(f"{loss}.preset: `name` must be of a preset for {loss}, got '{name}'. Use {preset.loss}.")
    return preset


def _ikl(
    classes: int, alpha: float, beta: float, *, temperature: float, weight_temperature: float, prior: bool
) -> dict[str, Any]:
    return {
        "alpha": float(alpha),
        "beta": float(beta),
        "temperature": temperature,
        "weight_temperature": weight_temperature,
        "global_info": prior,
        "num_classes": classes,
    }


def _cifar100() -> dict[str, Preset]:
    found = {}
    # Student, teacher; IKL's alpha, beta; GKL's alpha, beta, gamma, class prior.
    for student, teacher, ikl, gkl in (
        ("resnet20", "resnet56", (1, 4), (1, 4, 0.2, True)),
        ("resnet32", "resnet110", (1, 12), (1, 4, 0.1, False)),
        ("resnet8x4", "resnet32x4", (1, 8), (1, 16, 0.05, True)),
        ("wrn_16_2", "wrn_40_2", (3, 12), (3, 20, 0.3, False)),
        ("wrn_40_1", "wrn_40_2", (1, 8), (1, 12, 0.3, False)),
        ("vgg8", "vgg13", (1, 12), (1, 8, 0.2, True)),
        ("ShuffleV1", "resnet32x4", (1, 8), (1, 8, 0.0, True)),
        ("ShuffleV1", "wrn_40_2", (1, 4), (1, 8, 0.0, False)),
        ("MobileNetV2", "vgg13", (4, 12), (4, 12, 0.1, True)),
        ("MobileNetV2", "ResNet50", (1, 12), (1, 8, 0.05, True)),
        ("ShuffleV2", "resnet32x4", (3, 12), (3, 12, 0.1, True)),
    ):
        pair = f"cifar100/{student}_from_{teacher}"
        # The official IKL files leave T2 at its default of 100 (nearly uniform weights) and the class prior off.
        keywords = _ikl(100, *ikl, temperature=4.0, weight_temperature=100.0, prior=False)
        found[f"{pair}-ikl"] = Preset("IKLLoss", keywords, warmup_epochs=20)
        alpha, beta, gamma, prior = gkl
        keywords = _ikl(100, alpha, beta, temperature=4.0, weight_temperature=4.0, prior=prior)
        found[f"{pair}-gkl"] = Preset("GKLLoss", {**keywords, "gamma": gamma}, warmup_epochs=20)
    return found


def _imagenet() -> dict[str, Preset]:
    found = {}
    for student, teacher, alpha, beta, gamma in (
        ("resnet18", "resnet34", 1, 0.5, 0.6),
        ("MobileNetV1", "resnet50", 4, 1, 0.5),
    ):
        pair = f"imagenet/{student}_from_{teacher}"
        keywords = _ikl(1000, alpha, beta, temperature=1.0, weight_temperature=1.0, prior=True)
        found[f"{pair}-ikl"] = Preset("IKLLoss", keywords, warmup_epochs=1)
        # Five epochs are the GKL code's default, which its ImageNet files leave alone.
        found[f"{pair}-gkl"] = Preset("GKLLoss", {**keywords, "gamma": gamma}, warmup_epochs=5)
    return found


def _imagenet_lt() -> dict[str, Preset]:
    found = {}
    for student, teacher, ikl, gamma in (
        ("resnet18", "resnet18", (1, 0.5), None),
        ("resnet50", "resnet50", (1, 1), 0.3),
        ("resnet18", "resnext101_32x4d", (4, 4), 0.3),
        ("resnet50", "resnext101_32x4d", (3, 4), 0.3),
    ):
        pair = f"imagenet_lt/{student}_from_{teacher}"
        keywords = _ikl(1000, *ikl, temperature=1.0, weight_temperature=100.0, prior=False)
        found[f"{pair}-ikl"] = Preset("IKLLoss", keywords)
        if gamma is not None:
            keywords = _ikl(1000, *ikl, temperature=1.0, weight_temperature=1.0, prior=True)
            found[f"{pair}-gkl"] = Preset("GKLLoss", {**keywords, "gamma": gamma})
    return found


def _adversarial() -> dict[str, Preset]:
    found = {}
    for classes, name, alpha, beta, gamma, tau in (
        (10, "cifar10_adversarial/wrn_34_10-ikl", 4, 20, None, 4.0),
        (10, "cifar10_adversarial/wrn_34_10_cutout-ikl", 4, 20, None, 4.0),
        # The script says tau 1, which gets lost in a missing line continuation.
        (10, "cifar10_adversarial/wrn_34_10-gkl", 4, 20, 0.2, 4.0),
        (10, "cifar10_adversarial/wrn_34_10-gkl_gamma1", 4, 20, 1.0, 4.0),
        (10, "cifar10_adversarial/wrn_34_10_autoaugment-gkl", 4, 20, 1.0, 4.0),
        (100, "cifar100_adversarial/wrn_34_10-ikl", 5, 20, None, 4.0),
        (100, "cifar100_adversarial/wrn_34_10-ikl_alpha4", 4, 20, None, 4.0),
        (100, "cifar100_adversarial/wrn_34_10_autoaugment-ikl", 4, 20, None, 4.0),
        (100, "cifar100_adversarial/wrn_34_10_cutout-ikl", 4, 20, None, 4.0),
        (100, "cifar100_adversarial/wrn_34_10-gkl", 4, 20, 0.4, 1.0),
        (100, "cifar100_adversarial/wrn_34_10-gkl_gamma1", 4, 20, 1.0, 4.0),
        (100, "cifar100_adversarial/wrn_34_10_autoaugment-gkl", 4, 20, 1.0, 4.0),
        # From the names of the published logs; those of the runs with 1M images are not published, these stand in.
        (10, "cifar10_generated/wrn_28_10_1m-ikl", 3, 10, None, 4.0),
        (10, "cifar10_generated/wrn_28_10_20m-ikl", 3, 10, None, 4.0),
        (100, "cifar100_generated/wrn_28_10_1m-ikl", 5, 12, None, 4.0),
        (100, "cifar100_generated/wrn_28_10_50m-ikl", 5, 12, None, 4.0),
    ):
        keywords = _ikl(classes, alpha, beta, temperature=1.0, weight_temperature=tau, prior=True)
        if gamma is None:
            found[name] = Preset("IKLLoss", keywords)
        else:
            found[name] = Preset("GKLLoss", {**keywords, "gamma": gamma})
    # TRADES: with equal weights DKL has the gradients of its KL divergence, here times 6 and 9.
    for classes, weight in ((10, 6.0), (100, 9.0)):
        keywords = {"alpha": weight, "beta": weight, "temperature": 1.0, "num_classes": classes}
        found[f"cifar{classes}_adversarial/wrn_34_10-trades"] = Preset("DKLLoss", keywords)
    return found


# The experiment that each family stands for: the first pair of the paper's tables with like networks, and the largest
# set of generated images. DKL has TRADES's weights where there are any.
FAMILIES: Mapping[str, str] = MappingProxyType(
    {
        "cifar100_distillation": "cifar100/resnet20_from_resnet56",
        "imagenet_distillation": "imagenet/resnet18_from_resnet34",
        "imagenet_lt_distillation": "imagenet_lt/resnet50_from_resnext101_32x4d",
        "cifar10_adversarial": "cifar10_adversarial/wrn_34_10",
        "cifar100_adversarial": "cifar100_adversarial/wrn_34_10",
        "cifar10_generated": "cifar10_generated/wrn_28_10_20m",
        "cifar100_generated": "cifar100_generated/wrn_28_10_50m",
    }
)


def _start() -> dict[str, Preset]:
    return {
        "start-dkl": Preset("DKLLoss", {"alpha": 1.0, "beta": 1.0, "temperature": 1.0}),
        "start-ikl": Preset("IKLLoss", {"alpha": 4.0, "beta": 0.5, "temperature": 4.0, "weight_temperature": 4.0}),
        "start-gkl": Preset(
            "GKLLoss", {"alpha": 4.0, "beta": 2.0, "temperature": 4.0, "weight_temperature": 1.0, "gamma": 0.5}
        ),
    }


def _of_families(published: Mapping[str, Preset]) -> dict[str, Preset]:
    return {
        f"{family}-{preset.loss.removesuffix('Loss').lower()}": preset
        for family, name in FAMILIES.items()
        for kind in ("ikl", "gkl", "trades")
        if (preset := published.get(f"{name}-{kind}")) is not None
    }


_PUBLISHED = {**_cifar100(), **_imagenet(), **_imagenet_lt(), **_adversarial()}
PRESETS: Mapping[str, Preset] = MappingProxyType({**_PUBLISHED, **_of_families(_PUBLISHED), **_start()})


class RobustDistillation(NamedTuple):
    """An adversarial distillation: what :func:`robust_distillation` gives; the defaults are adversarial training's."""

    attack: Mapping[str, Any] = MappingProxyType({})  # keywords of ikl_plugins.adversarial.PGD
    loss: str = ""  # 'KLLoss' or 'IKLLoss', between the student's adversarial logits and the teacher's
    keywords: Mapping[str, Any] = MappingProxyType({})  # of that loss: of KL `loss_weight`, T**2 inside, `temperature`
    teacher_natural_weight: float = 0.0  # of that loss of the natural images, beside the 1 of the adversarial ones
    natural_weight: float = 1.0  # of the cross entropy of the student's natural logits to the labels
    teacher_view: str = "natural"  # the images that the teacher of the adversarial logits sees
    natural_first: bool = False  # the order of the student's training forwards


_TEN_STEPS = {"eps": "8/255", "steps": 10, "step_size": "2/255"}
_FROM_LABELS = {**_TEN_STEPS, "random_start": "uniform", "objective": "cross_entropy", "model_mode": "train"}
_FROM_TEACHER = {**_TEN_STEPS, "random_start": "normal", "objective": "soft_cross_entropy", "model_mode": "eval"}
ROBUST_DISTILLATION = ("ard", "rslad", "adaad", "ard-ikl", "rslad-ikl", "adaad-ikl")


def robust_distillation(name: str, num_classes: int, caller: str = "robust_distillation") -> RobustDistillation:
    """The settings of a published adversarial distillation, with its KL divergence or with IKL in the place of that.

    The authors' codes take a mean over batch and classes. As weights of KL, a mean over the batch alone, theirs are::

        ard      T**2 / classes, with T = 30
        rslad    5/6 / 10, and 1/6 / 10 of the natural images; for 100 classes the code multiplies by 10
        adaad    1 / 10 for 10 classes; 1 for 100, here for all numbers above 10

    None has a cross entropy to the labels. Of AdaAD this is the default of the code, whose command line has another
    radius by default, 16/255.

    With ``-ikl`` alpha is the weight of KL and beta five times that without T**2, the published proportion of IKL's
    adversarial training, with its class prior at temperature 4. Nobody has published these.

    Args:
        name: one of :data:`ROBUST_DISTILLATION`.
        num_classes: of the data.
        caller: how an error calls the one who asks.

    Raises:
        ValueError: an unknown name.

    References:
        Goldblum et al., Adversarially Robust Distillation, AAAI 2020 (code: goldblum/AdversariallyRobustDistillation);
        Zi et al., Revisiting Adversarial Robustness Distillation, ICCV 2021 (zibojia/RSLAD); Huang et al., Boosting
        Accuracy and Robustness of Student Models via Adaptive Adversarial Distillation, CVPR 2023 (boyellow/AdaAD).

    Example:
        >>> robust_distillation("ard", 10).keywords
        {'loss_weight': 90.0, 'temperature': 30.0}
    """
    if name not in ROBUST_DISTILLATION:
        raise ValueError(check.unknown_name_message(caller, "preset", name, ROBUST_DISTILLATION))
    method, _, kind = name.partition("-")
    if method == "ard":
        weight, temperature = 1 / num_classes, 30.0
        found = RobustDistillation(_FROM_LABELS)
    elif method == "rslad":
        weight, temperature = 5 / 60, 1.0
        found = RobustDistillation(_FROM_TEACHER, teacher_natural_weight=0.2)
    else:
        weight, temperature = 0.1 if num_classes <= 10 else 1.0, 1.0
        found = RobustDistillation(_FROM_TEACHER, teacher_view="adversarial", natural_first=True)
    loss, keywords = "KLLoss", {"loss_weight": weight * temperature**2, "temperature": temperature}
    if kind:
        loss = "IKLLoss"
        alpha, beta = weight * temperature**2, 5 * weight
        keywords = _ikl(num_classes, alpha, beta, temperature=temperature, weight_temperature=4.0, prior=True)
    return found._replace(loss=loss, keywords=keywords, natural_weight=0.0)

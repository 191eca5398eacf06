"""The published experiments in MMPretrain: what published_values says of both hosts, and adversarial training."""

from importlib.util import find_spec

import pytest
from mmpretrain_runs import CONFIGS
from published_values import DISTILLED as PUBLISHED
from published_values import FAMILIES, SIZES, WRN, WRN_TRADES, Family, Recipe, decoupled, rows

FOLDERS = (
    "cifar100",
    "imagenet",
    "imagenet_lt",
    "cifar10_adversarial",
    "cifar100_adversarial",
    "cifar10_generated",
    "cifar100_generated",
)
SHIPPED = sorted(str(path.relative_to(CONFIGS)) for folder in FOLDERS for path in (CONFIGS / folder).rglob("*.py"))

# file | alpha | beta | gamma | T | weight of the augmented view. No script has Cutout: its rows are AutoAugment's, and
# for CIFAR-10 the basic one of IKL. The second script for CIFAR-10 asks for T = 1, but its default, 4, is in effect.
ADVERSARIAL_TABLE = """
cifar10_adversarial/wrn_34_10-ikl | 4 | 20 | - | 4 | -
cifar10_adversarial/wrn_34_10-gkl_gamma1 | 4 | 20 | 1 | 4 | -
cifar10_adversarial/wrn_34_10-gkl | 4 | 20 | 0.2 | 4 | -
cifar10_adversarial/wrn_34_10_autoaugment-gkl | 4 | 20 | 1 | 4 | 0.5
cifar10_adversarial/wrn_34_10_cutout-ikl | 4 | 20 | - | 4 | 0.5
cifar100_adversarial/wrn_34_10-ikl_alpha4 | 4 | 20 | - | 4 | -
cifar100_adversarial/wrn_34_10-ikl | 5 | 20 | - | 4 | -
cifar100_adversarial/wrn_34_10_autoaugment-ikl | 4 | 20 | - | 4 | 0.3
cifar100_adversarial/wrn_34_10-gkl_gamma1 | 4 | 20 | 1 | 4 | -
cifar100_adversarial/wrn_34_10-gkl | 4 | 20 | 0.4 | 1 | -
cifar100_adversarial/wrn_34_10_autoaugment-gkl | 4 | 20 | 1 | 4 | 0.5
cifar100_adversarial/wrn_34_10_cutout-ikl | 4 | 20 | - | 4 | 0.3
"""
TRADES_WEIGHTS = {"cifar10_adversarial/wrn_34_10-trades": 6, "cifar100_adversarial/wrn_34_10-trades": 9}

# data set, images | IKL alpha / beta | batch | epochs | fraction
GENERATED_TABLE = """
cifar10 1m | 3 / 10 | 512 | 400 | 0.7
cifar10 20m | 3 / 10 | 2048 | 2400 | 0.8
cifar100 1m | 5 / 12 | 512 | 400 | 0.7
cifar100 50m | 5 / 12 | 2048 | 1600 | 0.8
"""


def _recipes():
    recipes = {f"{name}.py": recipe for name, recipe in PUBLISHED.items()}
    for name, recipe in PUBLISHED.items():
        if not name.startswith("imagenet_lt/"):
            recipes[f"{name.split('/')[0]}/{recipe.student}.py"] = Recipe(recipe.student, lr=recipe.lr)
    for name, alpha, beta, gamma, (tau,), _ in rows(ADVERSARIAL_TABLE):
        values = [*alpha, *beta, *([] if gamma == ["-"] else gamma)]
        loss = "GKL" if len(values) == 3 else "IKL"
        recipes[f"{name}.py"] = Recipe("WRN-34-10", None, loss, decoupled(values, 1.0, tau, True), lr=0.2)
    for name, weight in TRADES_WEIGHTS.items():
        recipes[f"{name}.py"] = Recipe("WRN-34-10", None, "KL", {"temperature": 1.0}, weight=weight, lr=0.2)
    for name, values, *_ in rows(GENERATED_TABLE):
        dataset, size = name.split()
        name, student = f"{dataset}_generated/wrn_28_10_{size}", "WRN-28-10-SiLU"
        recipes[f"{name}-kl.py"] = Recipe(student, None, "KL", {"temperature": 1.0}, weight=5.0, lr=0.2)
        recipes[f"{name}-ikl.py"] = Recipe(student, None, "IKL", decoupled(values, 1.0, 4.0, True), lr=0.2)
    return recipes


RECIPES = _recipes()
DISTILLED = [path for path, recipe in RECIPES.items() if recipe.teacher is not None]
ADVERSARIAL = [path for path in RECIPES if "_adversarial/" in path]
GENERATED = [path for path in RECIPES if "_generated/" in path]
ROBUST = [*ADVERSARIAL, *GENERATED]
AUGMENTED_WEIGHTS = {f"{name}.py": weight for name, *_, (weight,) in rows(ADVERSARIAL_TABLE) if weight != "-"}

# of networks of two data sets, by the number of classes
WIDE = {
    ("WRN-34-10", 10): SIZES["WRN-34-10"],
    ("WRN-34-10", 100): (46_218_164, 191),
    ("WRN-28-10-SiLU", 10): (36_479_194, 155),
    ("WRN-28-10-SiLU", 100): (36_536_884, 155),
}


def kind_of(path):
    """The model that the experiment trains."""
    if path in ROBUST:
        return "AdversarialClassifier"
    return "ImageClassifier" if RECIPES[path].teacher is None else "DistillationClassifier"


def family_of(path):
    folder, name = path.removesuffix(".py").split("/")
    if folder in FAMILIES:
        return FAMILIES[folder]
    classes = int(folder.split("_")[0].removeprefix("cifar"))
    if path in ADVERSARIAL:
        return (WRN_TRADES if name == "wrn_34_10-trades" else WRN)._replace(classes=classes)
    key = f"cifar{classes} {name.split('_')[3].split('-')[0]}"
    ((batch,), (epochs,)) = next(
        (batch, epochs) for first, _, batch, epochs, _ in rows(GENERATED_TABLE) if first == key
    )
    return Family(int(epochs), int(batch), 1, 5e-4, classes, None, seed=1)


def need_robustbench(path):
    if RECIPES[path].student.startswith("WRN-") and find_spec("pyautoattack") is None:
        pytest.skip("the network of this config is RobustBench's, which is not installed")

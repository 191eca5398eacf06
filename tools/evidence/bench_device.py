"""What a training step launches on a CUDA device, and how often the host waits for it.

A step is one of many: nothing is allocated, compiled or compared any more. The host's own step stands beside ours.
torch.profiler counts the launches, torch's sync debug mode the waits. Where the environment variable GPU_STUB names the
folder of a counting CUDA runtime (libstub.so, preloaded), that one counts, with no GPU at all; times it has none.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evidence import device as on
from evidence.bench import Row
from evidence.report import narrow_table
from ikl_plugins import DKLLoss, GKLLoss, IKLLoss, gkl_loss, ikl_loss
from ikl_plugins.adversarial import PGD, AdversarialWeightPerturbation

SECONDS = 0.0  # nothing is timed
ROWS, CLASSES = 128, 100
ATTACK = {"eps": "8/255", "steps": 10, "step_size": "2/255"}
AT_ITERATION = 4  # of MMPretrain's runs

Steps = Iterator[tuple[str, str, Callable[[], object]]]  # part, what runs, one step


# --- losses, criteria, attacks ---------------------------------------------------------------------------------------


def loss_steps(device: torch.device) -> Steps:
    student = torch.zeros(ROWS, CLASSES, device=device, requires_grad=True)
    teacher = torch.zeros(ROWS, CLASSES, device=device)
    labels = torch.zeros(ROWS, dtype=torch.long, device=device)
    prior: dict[str, Any] = {"global_info": True, "num_classes": CLASSES}
    rows = torch.full((ROWS, CLASSES), 1 / CLASSES, device=device)

    def kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(student, 1), F.softmax(teacher, 1), reduction="batchmean")

    losses: dict[str, Callable[..., Tensor]] = {
        "F.kl_div": kl,
        "DKL": DKLLoss(),
        "IKL": IKLLoss(),
        "IKL, prior's rows given": lambda student, teacher, labels: ikl_loss(student, teacher, class_prior=rows),
        "IKL, class prior": IKLLoss(**prior).to(device),
        "GKL": GKLLoss(gamma=0.5),
        "GKL, prior's rows given": lambda student, teacher, labels: gkl_loss(
            student, teacher, gamma=0.5, class_prior=rows
        ),
        "GKL, class prior": GKLLoss(gamma=0.5, **prior).to(device),
    }
    for name, loss in losses.items():
        yield "loss", name, lambda loss=loss: torch.autograd.grad(loss(student, teacher, labels), student)


def criterion_steps(device: torch.device) -> Steps:
    """torchdistill's KDLoss and ours, cross entropy to the labels included."""
    if importlib.util.find_spec("torchdistill") is None:
        print("Without torchdistill, which is not installed", flush=True)
        return
    from torchdistill.losses.mid_level import KDLoss

    from ikl_plugins.torchdistill import IKLLoss as Criterion

    student = torch.zeros(ROWS, CLASSES, device=device, requires_grad=True)
    places, io = (".", "output", ".", "output"), {".": {"output": torch.zeros(ROWS, CLASSES, device=device)}}
    labels = torch.zeros(ROWS, dtype=torch.long, device=device)
    ours = Criterion(*places, ce_weight=1.0, global_info=True, num_classes=CLASSES).to(device)
    ours.begin_epoch(1, 100)
    criteria = {"KDLoss": KDLoss(*places, temperature=4.0, alpha=0.1), "IKLLoss, class prior": ours}
    for name, criterion in criteria.items():
        yield (
            "criterion of torchdistill",
            name,
            lambda criterion=criterion: torch.autograd.grad(criterion({".": {"output": student}}, io, labels), student),
        )


def network(device: torch.device, layers: int = 1) -> nn.Sequential:
    parts: list[nn.Module] = []
    for index in range(layers):
        parts += [nn.Conv2d(8 if index else 3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).to(device)


def plain_attack(model: nn.Module, images: Tensor) -> Tensor:
    """TRADES' attack with nothing computed twice."""
    eps, size = 8 / 255, 2 / 255
    model.eval()
    adversarial = images + 0.001 * torch.randn_like(images)
    with torch.no_grad():
        natural = F.softmax(model(images), 1)
    for _ in range(10):
        adversarial.requires_grad_()
        loss = F.kl_div(F.log_softmax(model(adversarial), 1), natural, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, [adversarial])
        adversarial = adversarial.detach() + size * torch.sign(gradient)
        adversarial = torch.min(torch.max(adversarial, images - eps), images + eps).clamp(0, 1)
    model.train()
    return adversarial


def attack_steps(device: torch.device) -> Steps:
    model, images = network(device), torch.full((16, 3, 32, 32), 0.5, device=device)
    labels, prior = torch.zeros(16, dtype=torch.long, device=device), torch.full((16, 10), 0.1, device=device)
    yield "attack of 10 steps", "TRADES' own, tuned", lambda: plain_attack(model, images)
    for objective in ("cross_entropy", "margin", "soft_cross_entropy", "ikl", "ikl, class prior"):
        attack = PGD(**ATTACK, objective=objective.split(",")[0])  # type: ignore[arg-type]
        rows = prior if "prior" in objective else None
        yield (
            "attack of 10 steps",
            f"PGD, {objective}",
            lambda attack=attack, rows=rows: attack(model, images, labels=labels, class_prior=rows),
        )
    deep, awp = network(device, layers=20), AdversarialWeightPerturbation(gamma=5e-3)
    weights = [parameter for parameter in deep.parameters() if parameter.dim() > 1]
    few = images[:4, :, :8, :8]
    gradients = list(torch.autograd.grad(deep(few).sum(), weights))

    def perturb() -> None:
        awp._move(weights, gradients)
        awp.restore()

    yield "weight perturbation", f"{len(weights)} weights, there and back", perturb


# --- training steps of MMPretrain ------------------------------------------------------------------------------------


def mmpretrain_counts(device: torch.device) -> Iterator[tuple[str, on.Count]]:
    """The counts of one iteration of MMEngine's runner, hooks included, by the model that is trained."""
    if importlib.util.find_spec("mmpretrain") is None:
        print("Without mmpretrain, which is not installed", flush=True)
        return
    from mmpretrain.registry import MODELS

    import ikl_plugins.mmpretrain  # noqa: F401 - registers the classifiers

    plain = {
        "type": "ImageClassifier",
        "data_preprocessor": {"mean": [120.0] * 3, "std": [60.0] * 3, "num_classes": 3},
        "backbone": {"type": "ResNet_CIFAR", "depth": 18, "stem_channels": 2, "base_channels": 2},
        "neck": {"type": "GlobalAveragePooling"},
        "head": {"type": "LinearClsHead", "num_classes": 3, "in_channels": 16},
    }
    loss = {"type": "IKLLoss", "global_info": True}
    attacked = {**plain, "type": "AdversarialClassifier", "attack": {**ATTACK, "objective": "ikl"}, "robust_loss": loss}
    half = {"type": "AmpOptimWrapper"}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = f"{folder}/teacher.pth"
        torch.save(MODELS.build(plain).state_dict(), checkpoint)
        distilled = {**plain, "type": "DistillationClassifier", "teacher": plain, "teacher_ckpt": checkpoint}
        distilled["distill_loss"] = loss
        for name, model, wrapper in (
            ("ImageClassifier", plain, {}),
            ("DistillationClassifier, class prior", distilled, {}),
            ("AdversarialClassifier, class prior", attacked, {}),
            ("AdversarialClassifier, class prior, AWP", {**attacked, "awp": {"gamma": 5e-3, "warmup_epochs": 0}}, {}),
            ("ImageClassifier, float16", plain, half),
            ("DistillationClassifier, class prior, float16", distilled, half),
            ("AdversarialClassifier, class prior, float16", attacked, half),
        ):
            if wrapper and device.type != "cuda":
                continue  # it asks for a device
            yield name, _count_iteration(folder, name, model, wrapper, device)


def _count_iteration(
    folder: str, name: str, model: dict[str, Any], wrapper: dict[str, Any], device: torch.device
) -> on.Count:
    from mmengine.dataset import pseudo_collate
    from mmengine.runner import EpochBasedTrainLoop, Runner
    from mmpretrain.structures import DataSample
    from torch.utils.data import DataLoader

    found: list[on.Count] = []

    class CountingLoop(EpochBasedTrainLoop):
        def run_iter(self, idx: int, data_batch: Any) -> None:
            def step() -> None:
                super(CountingLoop, self).run_iter(idx, data_batch)

            if idx == AT_ITERATION:
                found.append(on.counted_once(step, device) if device.type == "cuda" else on.Count(0, 0))
            else:
                step()

    images = [
        {"inputs": torch.full((3, 8, 8), 100, dtype=torch.uint8), "data_samples": DataSample().set_gt_label(index % 3)}
        for index in range(32)
    ]
    runner = Runner(
        model=model,
        work_dir=folder,
        train_dataloader=DataLoader(images, batch_size=4, collate_fn=pseudo_collate),  # type: ignore[arg-type]
        train_cfg={"by_epoch": True, "max_epochs": 1},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.05, "momentum": 0.9}, **wrapper},
        default_hooks={"checkpoint": None},
        custom_hooks=[{"type": "IKLHook"}],
        default_scope="mmpretrain",
        log_level="ERROR",
        experiment_name=f"bench_device_{id(found)}",
    )
    runner._train_loop = CountingLoop(runner, runner._train_dataloader, max_epochs=1)
    runner.train()
    return found[0]


# --- measuring and telling -------------------------------------------------------------------------------------------


def measure(seconds: float, device: torch.device) -> Iterator[Row]:
    """Rows of the CSV file."""

    def row(part: str, name: str, way: str, found: on.Count) -> Row:
        return {"part": part, "step": name, "way": way, **found._asdict(), "counter": counter}

    counter = "counting runtime" if on.counting_runtime() else "torch.profiler, sync debug mode"
    for way in on.ways(device):
        with on.going(way):
            for steps in (loss_steps, criterion_steps):
                for part, name, step in steps(device):
                    if way == on.WALK or name not in ("F.kl_div", "KDLoss"):
                        yield row(part, name, way if "KL" in name else "", on.count(step, device))
    for part, name, step in attack_steps(device):
        yield row(part, name, "", on.count(step, device))
    for name, found in mmpretrain_counts(device):
        yield row("iteration of MMPretrain", name, "", found)


def render(rows: list[Row]) -> str:
    """The table from the rows of the CSV file."""
    first = rows[0]
    if first["counter"] == "counting runtime":
        by = f"Counted by a CUDA runtime that launches nothing, on no GPU, torch {first['torch']}: it has no times."
    else:
        by = f"Counted on {first.get('device', 'cpu')}, driver {first.get('driver', 'none')}, torch {first['torch']}."
    cells = [
        [row["part"], row["step"] + (f" ({row['way']})" if row["way"] else ""), row["launches"], row["waits"]]
        for row in rows
    ]
    return f"{by}\n\n{narrow_table(['part', 'step', 'launches', 'waits of the host'], cells)}"

"""Adversarial training in miniature for one GPU: TRADES and IKL for as many epochs as fit, then AutoAttack.

    python -m evidence.miniature pack FILE     # real CIFAR-10 from data/cifar10 as `ikl data` makes it; at most 50 MB
    python -m evidence.miniature run FILE OUT  # with tools/ and the package on PYTHONPATH

Both methods have the published weights, the same network, batches, number of epochs and attack: PGD of 10 steps with
the soft cross entropy. The number of epochs follows from the time of each method's first steps. What has been measured
is written after each part, so that a run which is ended early leaves what it has.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evidence import bench, cache
from evidence import device as on
from ikl_plugins import DKLLoss, IKLLoss
from ikl_plugins.adversarial import PGD
from ikl_plugins.checkpoints import load_content
from ikl_plugins.models.wide_resnet import WideResNet

EPS = 8 / 255
PRESET = "cifar10_adversarial/wrn_34_10"
BYTES = 50_000_000
METHODS: dict[str, Callable[[], nn.Module]] = {
    "TRADES": lambda: DKLLoss.preset(f"{PRESET}-trades"),
    "IKL": lambda: IKLLoss.preset(f"{PRESET}-ikl"),
}
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")


class Plan(NamedTuple):
    """How much of it."""

    depth: int = 16
    width: int = 4
    batch: int = 512
    rate: float = 0.1
    steps: int = 10
    timed_steps: int = 8
    test_images: int = 1000
    attacks: tuple[str, ...] = STANDARD
    train_images: int | None = None
    epochs: int | None = None


QUICK = Plan(10, 1, 4, 0.05, 2, 2, 4, STANDARD[:1], 8, 1)


# --- data ------------------------------------------------------------------------------------------------------------


def pack(folder: Path, target: Path, test_images: int = 1000) -> int:
    """The images of class folders as they are stored, and their labels, in one file; the number of its bytes."""
    content: dict[str, Tensor] = {}
    for split in ("train", "test"):
        classes = sorted(path for path in (folder / split).iterdir() if path.is_dir())
        each = None if split == "train" else test_images // len(classes)
        files = [(label, path) for label, one in enumerate(classes) for path in sorted(one.iterdir())[:each]]
        stored = [path.read_bytes() for _, path in files]
        content[f"{split}_bytes"] = torch.frombuffer(bytearray(b"".join(stored)), dtype=torch.uint8)
        content[f"{split}_lengths"] = torch.tensor([len(one) for one in stored], dtype=torch.int32)
        content[f"{split}_labels"] = torch.tensor([label for label, _ in files], dtype=torch.uint8)
    torch.save(content, target)
    size = target.stat().st_size
    if size > BYTES:
        raise ValueError(f"miniature: {target} must have at most {BYTES} bytes, got {size}. Pack fewer images.")
    return size


def unpacked(file: Path, split: str, count: int | None) -> tuple[Tensor, Tensor]:
    """Images, uint8 of shape (N, 3, H, W), and labels; equally many of each class where ``count`` says how many."""
    from PIL import Image

    content = load_content(file)
    data, ends = bytes(content[f"{split}_bytes"].numpy()), content[f"{split}_lengths"].cumsum(0).tolist()
    labels = content[f"{split}_labels"].long()
    chosen = torch.arange(len(labels))
    if count is not None:
        each = max(1, count // (int(labels.max()) + 1))
        chosen = torch.cat([(labels == label).nonzero()[:each, 0] for label in labels.unique()])[:count]
    images = []
    for index in chosen.tolist():
        begin = ends[index - 1] if index else 0
        picture = Image.open(io.BytesIO(data[begin : ends[index]])).convert("RGB")
        images.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(*picture.size[::-1], 3))
    return torch.stack(images).permute(0, 3, 1, 2), labels[chosen]


def augmented(images: Tensor) -> Tensor:
    """Each image cropped after a padding of 4, and flipped or not."""
    count, _, height, width = images.shape
    device = images.device
    top, left = torch.randint(9, (2, count, 1), device=device)
    rows, columns = top + torch.arange(height, device=device), left + torch.arange(width, device=device)
    flip = torch.rand(count, 1, device=device) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    one = torch.arange(count, device=device)[:, None, None]
    cut = F.pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1)[one, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2)  # channels_last in memory


# --- training and attack ---------------------------------------------------------------------------------------------


class Training:
    """One method's network, criterion and optimizer."""

    def __init__(self, name: str, plan: Plan, device: torch.device) -> None:
        torch.manual_seed(0)
        self.plan, self.device = plan, device
        self.model = WideResNet(plan.depth, plan.width, 10).to(device, memory_format=torch.channels_last)
        self.criterion = METHODS[name]().to(device)
        self.attack = PGD(
            eps=EPS, steps=plan.steps, step_size=EPS / 4, random_start="normal", objective="soft_cross_entropy"
        )
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=plan.rate, momentum=0.9, weight_decay=5e-4, nesterov=True
        )

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            adversarial = self.attack(self.model, images)
            natural = self.model(images)
            robust = self.criterion(self.model(adversarial), natural, labels)
            loss: Tensor = F.cross_entropy(natural.float(), labels) + robust
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def batches(self, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(images), device=self.device).split(self.plan.batch):
            if len(index) == self.plan.batch:
                yield augmented(images[index]).float() / 255, labels[index]

    def epoch(self, images: Tensor, labels: Tensor, number: int, epochs: int) -> float:
        """One epoch, the rate rising over a tenth of all and then falling as a cosine; the mean loss."""
        batches = len(images) // self.plan.batch
        losses = []
        for done, batch in enumerate(self.batches(images, labels)):
            part = ((number - 1) * batches + done) / (epochs * batches)
            factor = part / 0.1 if part < 0.1 else 0.5 * (1 + math.cos(math.pi * (part - 0.1) / 0.9))
            self.optimizer.param_groups[0]["lr"] = self.plan.rate * max(factor, 1e-3)
            losses.append(self.step(*batch))
        if isinstance(self.criterion, IKLLoss):
            self.criterion.end_epoch()
        return torch.stack(losses).mean().item()

    def seconds_of_a_step(self, images: Tensor, labels: Tensor) -> float:
        """Of the last half of some first steps."""
        steps, begin = self.plan.timed_steps, 0.0
        for number, batch in zip(range(steps), self.batches(images, labels), strict=False):
            if number == steps // 2:
                on.wait(self.device)
                begin = time.perf_counter()
            self.step(*batch)
        on.wait(self.device)
        return (time.perf_counter() - begin) / (steps - steps // 2)


@torch.no_grad()
def right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Which images are classified as they should be, (N,)."""
    return torch.cat([model(part).argmax(1) for part in images.split(250)]) == labels


def attack_of(name: str, model: nn.Module, device: torch.device) -> tuple[str, Callable[[Tensor, Tensor], Tensor]]:
    """An attack of AutoAttack by pyautoattack, else by autoattack; else our PGD with 50 steps, and what it is."""
    settings: dict[str, Any] = {"norm": "Linf", "eps": EPS, "seed": 0, "version": "custom", "device": device}
    if importlib.util.find_spec("pyautoattack") is not None:
        from ikl_plugins._autoattack import AutoAttack
    elif importlib.util.find_spec("autoattack") is not None:
        from autoattack import AutoAttack
    else:
        objective = "cross_entropy" if name in STANDARD[::2] else "margin"
        pgd = PGD(eps=EPS, steps=50, step_size=EPS / 8, objective=objective)
        return f"PGD-50 {objective}", lambda images, labels: pgd(model, images, labels=labels)
    attack = AutoAttack(model, attacks_to_run=[name], verbose=False, **settings)
    return name, lambda images, labels: attack.run_standard_evaluation(images, labels, bs=250)


def run(file: Path, output: Path, plan: Plan, device: torch.device, seconds: float) -> dict[str, Any]:
    """Trains and attacks within some seconds; returns and writes what it found."""
    begin, names = time.perf_counter(), list(METHODS)
    images, labels = (one.to(device) for one in unpacked(file, "train", plan.train_images))
    test, answers = (one.to(device) for one in unpacked(file, "test", plan.test_images))
    test = test.float() / 255
    pace = {name: Training(name, plan, device).seconds_of_a_step(images, labels) for name in names}
    batches = len(images) // plan.batch
    spent = time.perf_counter() - begin
    epochs = plan.epochs or max(1, int((0.55 * seconds - spent) / (1.1 * batches * sum(pace.values()))))
    found: dict[str, Any] = {
        "versions": {**cache.versions(), **on.facts(device)},
        "plan": plan._asdict(),
        "train_images": len(images),
        "test_images": len(test),
        "epochs": epochs,
        "methods": {name: {"seconds_of_a_step": pace[name], "losses": []} for name in names},
    }

    def write() -> None:
        rows = [{"method": name, **{k: v for k, v in one.items() if k != "losses"}} for name, one in kept.items()]
        cache.write_json(output / "miniature.json", found)
        cache.write_text(output / "miniature.csv", bench.as_csv(rows, device))

    kept: dict[str, dict[str, Any]] = found["methods"]
    trained: dict[str, nn.Module] = {}
    standing: dict[str, Tensor] = {}
    for name in names:
        training = Training(name, plan, device)
        for number in range(1, epochs + 1):
            kept[name]["losses"].append(training.epoch(images, labels, number, epochs))
            print(f"{name}: epoch {number} of {epochs}, loss {kept[name]['losses'][-1]:.3f}", flush=True)
        trained[name] = training.model.eval()
        standing[name] = right(trained[name], test, answers)
        kept[name]["natural"] = standing[name].double().mean().item()
        write()
    for attack in plan.attacks:  # each on what the ones before have left, as AutoAttack has it
        if time.perf_counter() - begin > 0.9 * seconds:
            print(f"No time is left for {attack} and what comes after it", flush=True)
            break
        for name, model in trained.items():
            left = standing[name].nonzero()[:, 0]
            label, attacked = attack_of(attack, model, device)
            if len(left):
                adversarial = attacked(test[left], answers[left])
                standing[name][left] = right(model, adversarial, answers[left])
            kept[name][f"robust after {label}"] = standing[name].double().mean().item()
            print(f"{name}: {100 * kept[name][f'robust after {label}']:.1f} % after {label}", flush=True)
            write()
    return found


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "run"))
    parser.add_argument("file", type=Path)
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=500.0, help="of all together (default: 500)")
    parser.add_argument("--quick", action="store_true", help="a few batches of a small network: every line runs once")
    args = parser.parse_args(arguments)
    if args.what == "pack":
        print(f"{args.file}: {pack(cache.data_folder(), args.file)} bytes")
    else:
        with on.without_judgement():
            run(args.file, args.output, QUICK if args.quick else Plan(), torch.device(args.device), args.seconds)


if __name__ == "__main__":
    main()

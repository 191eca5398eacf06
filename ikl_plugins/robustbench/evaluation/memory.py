"""How many images fit into a batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["fitting_batch_size"]

_SIZES = (1024, 512, 256, 128, 64, 32, 16)
_UNKNOWN = 128  # where nobody says how much memory there is
_SAFETY = 3.0  # of what the forward keeps for the backward: gradients of it, and what convolutions need for a while
_COPIES = 24  # of the images, which the attacks keep: best ones, last ones, gradients, random starts
_FAB_COPIES = 3  # of the gradients of all logits, which FAB without targets takes


def fitting_batch_size(caller: str, model: nn.Module, images: Tensor, device: torch.device, *, fab: bool) -> int:
    """The largest of 16, 32, ... 1024 images that attacks are likely to have the memory for.

    What the forward of a second image adds to what is kept for the backward, times a safety factor, is held against
    the free memory of the device, or of the machine and its control groups; on CUDA the size is then tried. What a
    model computes again in its backward, by checkpointing, is not counted.

    Args:
        caller: whom a refusal names.
        model: on the device, in eval mode, giving logits.
        images: any of those that will be attacked, shape (N, C, H, W).
        device: where to compute.
        fab: whether FAB without targets runs, which takes the gradient of every logit.

    Raises:
        ValueError: not even 16 fit.
    """
    free = _free(device)
    if free is None:
        return _UNKNOWN
    first = images[:1].to(device)
    kept, logits = _kept(model, first)
    kept = max(_kept(model, first.repeat(2, 1, 1, 1))[0] - kept, 0)
    pixels = first.numel() * first.element_size()
    each = _SAFETY * kept + _COPIES * pixels + fab * _FAB_COPIES * logits.shape[-1] * pixels
    for size in _SIZES:
        if size * each <= free and (device.type != "cuda" or _runs(model, first, size)):
            return size
    raise ValueError(
        f"{caller}: batch_size='auto' needs memory for {_SIZES[-1]} images, {_SIZES[-1] * each / 2**30:.1f} GiB, got "
        f"{free / 2**30:.1f} GiB free. Pass a smaller number."
    )


def _kept(model: nn.Module, images: Tensor) -> tuple[int, Tensor]:
    """Bytes that a forward keeps for its backward, without the model's own, and its logits."""
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        logits = model(images.clone().requires_grad_())
    return sum(sizes.values()), logits.detach()


def _runs(model: nn.Module, image: Tensor, size: int) -> bool:
    """Whether a forward and a backward of so many images fit."""
    try:
        with torch.enable_grad():
            images = image.repeat(size, 1, 1, 1).requires_grad_()
            torch.autograd.grad(model(images).sum(), images)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


def _free(device: torch.device) -> float | None:
    """Bytes that are free on a device; None where nobody knows."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    if device.type != "cpu":
        return None
    return min(
        [*_machine(Path("/proc/meminfo")), *_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))], default=None
    )


def _machine(meminfo: Path) -> Iterator[float]:
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            yield 1024.0 * int(line.split()[1])


def _groups(own: Path, root: Path) -> Iterator[float]:
    """What the memory limits of the process's control groups, and of those above them, leave; of either version."""
    for line in _lines(own):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, usage, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, usage, cache = (
                root / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            most, used = _lines(folder / limit), _lines(folder / usage)
            if most and used and most[0].isdigit():
                reclaimed = [
                    int(line.split()[1]) for line in _lines(folder / "memory.stat") if line.startswith(f"{cache} ")
                ]
                yield float(int(most[0]) - int(used[0]) + sum(reclaimed))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []

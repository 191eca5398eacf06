"""What standard AutoAttack costs, in passes of the network, and how well devices share it.

An image that stands costs each attack as many passes as :data:`PASSES` says, which a test counts on AutoAttack itself;
one that falls costs less, and is charged the same here. Batch b of an attack belongs to device b modulo their number,
and an attack begins when the earlier one has ended on all, so that an attack takes as long as its busiest device.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from statistics import median

__all__ = ["PASSES", "STANDING", "busiest", "efficiency", "main", "measure", "table"]

# Forward and backward passes on an image that stands, of the attacks of version 'standard' in their order.
PASSES = {"apgd-ce": (103, 101), "apgd-t": (920, 909), "fab-t": (1829, 900), "square": (5004, 0)}
# Of 10,000 images, those that stand when each attack begins: 85 % are right, and 57 % in the end.
STANDING = (8500, 6100, 5710, 5700)
NATURAL = 2  # forward passes on each of all images, on every device: the accuracy is measured before and within
IMAGES = 10_000
BACKWARD = 2  # forward passes that a backward pass takes as long as


def busiest(standing: int, batch_size: int, devices: int) -> int:
    """Of an attack on so many images, those on the device that has most."""
    sizes = [min(batch_size, standing - start) for start in range(0, standing, batch_size)]
    return max(sum(sizes[device::devices]) for device in range(devices))


def sequence(batch_size: int, devices: int, standing: Sequence[int] = STANDING) -> int:
    """Passes on one image after another until the evaluation ends, in forward passes."""
    costs = (forward + BACKWARD * backward for forward, backward in PASSES.values())
    parts = (busiest(count, batch_size, devices) * cost for count, cost in zip(standing, costs, strict=True))
    return NATURAL * IMAGES + sum(parts)


def efficiency(batch_size: int, devices: int) -> float:
    """The share of the devices' time in which they compute what one device would have to."""
    return sequence(batch_size, 1) / (devices * sequence(batch_size, devices))


def table(batch_sizes: Sequence[int] = (128, 64, 32), devices: Sequence[int] = (1, 8, 64)) -> str:
    """In Markdown, by batch size and number of devices."""
    rows = ["| batch size | devices | batches on the busiest | passes in sequence (millions) | speed-up | efficiency |"]
    rows.append("| ---: | ---: | --- | ---: | ---: | ---: |")
    for size in batch_sizes:
        for count in devices:
            rounds = " + ".join(str(math.ceil(math.ceil(standing / size) / count)) for standing in STANDING)
            passes, speed_up = sequence(size, count), sequence(size, 1) / sequence(size, count)
            share = f"{100 * efficiency(size, count):.0f} %"
            rows.append(f"| {size} | {count} | {rounds} | {passes / 1e6:.2f} | {speed_up:.1f} | {share} |")
    return "\n".join(rows)


def measure(rounds: int = 2, images: int = 64, attacks: str = "apgd-t") -> dict[int, tuple[float, float]]:
    """One process of `ikl evaluate` against two ranks, one thread each, in turn, on a WideResNet-10-1.

    Returns:
        By number of processes, medians of the wall time and of the processor time of the busier process, in seconds. On
        a machine that others use, the second says more.
    """
    import numpy as np
    import torch

    from ikl_plugins.models.robustbench_zoo import robustbench_network

    found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(2)
        model = robustbench_network("WideResNet-10-1").eval()
        torch.save({"state_dict": model.state_dict()}, f"{folder}/net.pt")
        pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8)
        labels = model(pixels / 255).argmax(1)  # all are right, and nearly all stand
        np.savez(f"{folder}/images.npz", images=pixels.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
        given = f"--checkpoint {folder}/net.pt --architecture WideResNet-10-1 --data {folder}/images.npz --device cpu"
        more = f"--eps 1/25500 --batch-size 8 --attacks {attacks}"
        line = [sys.executable, "-m", "ikl_plugins", "evaluate", *given.split(), *more.split(), "--output"]
        for number in range(rounds):
            for count in (1, 2) if number % 2 else (2, 1):
                start, output = time.perf_counter(), f"{folder}/{number}-{count}"
                ranks = [{"RANK": str(rank), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"} for rank in range(count)]
                started = [
                    subprocess.Popen([*line, output], env={**os.environ, **rank}, stdout=subprocess.DEVNULL)
                    for rank in ranks
                ]
                used = [os.wait4(process.pid, 0)[2] for process in started]
                busier = max(usage.ru_utime + usage.ru_stime for usage in used)
                found[count].append((time.perf_counter() - start, busier))
    return {count: (median(t for t, _ in pairs), median(t for _, t in pairs)) for count, pairs in found.items()}


def main() -> None:
    """Prints passes per image and the table, with --measure the time of one and of two processes."""
    if sys.argv[1:] == ["--measure"]:
        (wall, processor), (wall_of_two, processor_of_two) = measure().values()
        print(f"one process {wall:.1f} s, {processor:.1f} s of a processor")
        print(
            f"two: {wall_of_two / wall:.2f} of it, the busier {processor_of_two / processor:.2f} of the processor time"
        )
        return
    for attack, (forward, backward) in PASSES.items():
        print(f"{attack}: {forward} forward, {backward} backward")
    print(table())


if __name__ == "__main__":
    main()

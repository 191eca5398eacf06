"""One rank of the test of two processes; torchrun starts it: FOLDER.

Runs one.yaml, two_stages.yaml and drift.yaml, and writes to FOLDER what the rank ends each with.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import train_torchdistill
from train_torchdistill import Trainer, load_config, run


class Recorded(Trainer):
    """Keeps the parameters that the training ends with, before the best checkpoint is loaded for the test."""

    def save_last(self, epochs):
        Recorded.end = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        super().save_last(epochs)


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train_torchdistill.Trainer = Recorded
    for name in ("one", "two_stages", "drift"):
        result = run(load_config(f"{name}.yaml"), seed=3)
        torch.save({"end": Recorded.end, "result": result}, Path(folder) / f"{name}{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])

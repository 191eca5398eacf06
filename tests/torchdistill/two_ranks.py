"""One rank of the tests of two processes; torchrun starts it: NAME...

Runs `ikl train NAME.yaml`, one after another, and writes to NAME<rank>.pt what the rank ends each with.
"""

import os
import sys

import torch
import torch.distributed as dist

from ikl_plugins.commands.main import main as ikl
from ikl_plugins.torchdistill import training


class Recorded(training.Trainer):
    """Keeps the parameters that the training ends with, before the best checkpoint is loaded for the test."""

    def finish_epoch(self, row):
        super().finish_epoch(row)
        Recorded.end = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


def run(config, **options):
    Recorded.result = original(config, **options)
    return Recorded.result


if __name__ == "__main__":
    torch.set_num_threads(1)
    original = training._run
    training.Trainer, training._run = Recorded, run
    # One group for all of them: torchrun's store gives no second one.
    destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    for name in sys.argv[1:]:
        ikl(["train", f"{name}.yaml", "--device", "cpu", "--seed", "3"])
        training._join_group = lambda device: device
        torch.save({"end": Recorded.end, "result": Recorded.result}, f"{name}{os.environ['RANK']}.pt")
    destroy()

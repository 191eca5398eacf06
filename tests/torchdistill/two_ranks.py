"""One rank of the tests of two processes; torchrun starts it: NAME...

Runs NAME.yaml, one after another, and writes to NAME<rank>.pt what the rank ends each with.
"""

import sys

import torch
import torch.distributed as dist
from ikl_plugins.torchdistill import training as train_torchdistill
from ikl_plugins.torchdistill.training import Trainer, load_config, run


class Recorded(Trainer):
    """Keeps the parameters that the training ends with, before the best checkpoint is loaded for the test."""

    def save_last(self, epochs):
        Recorded.end = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        super().save_last(epochs)


def main(names):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train_torchdistill.Trainer = Recorded
    for name in names:
        result = run(load_config(f"{name}.yaml"), seed=3)
        torch.save({"end": Recorded.end, "result": result}, f"{name}{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])

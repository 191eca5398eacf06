"""Trains what a torchdistill YAML file describes: a thin driver over torchdistill's own boxes, `ikl train CONFIG.yaml`.

It reads the keys that upstream's examples/torchvision/image_classification.py reads. Around the boxes it differs:

- several processes also work without CUDA, and evaluation counts each image once;
- the best checkpoint, at `dst_ckpt`, can be that with the highest robust accuracy, with --best_by robust;
- beside the best checkpoint it keeps the last one, `..._last.pt`: training that goes on from there with
  --start_epoch ends as if it had never stopped, to the bit on a CPU;
- checkpoints are written aside and renamed, and read with weights_only=True;
- a `src_ckpt` gives initial weights, whoever has written it, and must be there;
- a frozen teacher that nobody has trained is refused, and another one's accuracy is told before the first step.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchdistill.common.main_util import import_dependencies, set_seed
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.training import get_training_box
from torchdistill.datasets.util import build_data_loader
from torchdistill.misc.log import set_basic_log_config, setup_log_file

from .. import _validation as check
from .._files import locked
from ..functional import LossTerms
from .box_evaluation import evaluation_of
from .dry_run import dry_run
from .losses import find_losses
from .run_checkpoints import CALLER, RunCheckpoints, last_path, load_checkpoint
from .teacher import refuse_untrained
from .yaml_config import build_model, load_config, student_config, val_loader

__all__ = ["DivergenceError", "Trainer", "last_path", "load_checkpoint", "load_config", "main", "run"]

Progress = Callable[[int, int, str], None]

logger = logging.getLogger(__name__)
BEST_BY = ("accuracy", "robust")


class DivergenceError(ValueError):
    """A loss that is not finite any more."""


class Trainer:
    """One run: torchdistill's box, an epoch of training, an evaluation, and the checkpoints.

    Args:
        config: of :func:`load_config`.
        device: where to train.
        seed: of initialisation, order and augmentation.
        best_by: 'accuracy' or 'robust', the value of the best checkpoint.
    """

    def __init__(self, config: dict[str, Any], device: torch.device, seed: int, best_by: str = BEST_BY[0]) -> None:
        self.device = device
        self.seed = seed
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world_size = dist.get_world_size() if self.distributed else 1
        self.datasets = config["datasets"]
        student, teacher = student_config(config), config["models"].get("teacher_model")
        set_seed(seed)
        models = [] if teacher is None else [build_model(teacher, "teacher", device, self.distributed)]
        for network in models:
            build = partial(build_model, teacher, "teacher", device, self.distributed)
            refuse_untrained(network, teacher, config["train"], build)
        # Of its own seed: the student starts the same whatever its teacher is.
        set_seed(seed)
        self.model = build_model(student, "student", device, self.distributed)
        device_ids = [device.index or 0] if device.type == "cuda" else None
        make_box = get_distillation_box if models else get_training_box
        self.box = make_box(
            *models, self.model, self.datasets, config["train"], device, device_ids, self.distributed, lr_factor=1
        )
        self.best_by = best_by
        args = argparse.Namespace(device=str(device), seed=seed, world_size=self.world_size, best_by=best_by)
        self.checkpoints = RunCheckpoints(self.box, self.model, student, args)

    def train_epoch(self, epoch: int, progress: Progress | None = None) -> dict[str, Any]:
        """One epoch over the training data.

        Returns:
            Its row of the history, but for the accuracy.
        """
        box = self.box
        # A seed for each epoch, so that a resumed run draws what the uninterrupted one has drawn.
        set_seed((self.seed * 1_000_003 + epoch * 1009 + self.rank) % 2**32)
        box.pre_epoch_process(epoch=epoch)
        losses = find_losses(box.criterion)
        names = ["train_loss", *(f"{term}/{part}" for term in losses for part in LossTerms._fields)]
        totals = torch.zeros(len(names) + 1, dtype=torch.float64)
        learning_rate = box.optimizer.param_groups[0]["lr"]
        steps = len(box.train_data_loader)
        seconds = 0.0
        for step, (images, targets, extra) in enumerate(box.train_data_loader, start=1):
            begin = time.perf_counter()
            loss = box.forward_process(images.to(self.device), targets.to(self.device), extra)
            if not isinstance(loss, Tensor):
                raise ValueError(
                    f"{CALLER}: `train: criterion:` must give a loss, got {loss!r}. Name one in `sub_terms:`."
                )
            value = loss.item()
            box.post_forward_process(loss=loss)
            seconds += time.perf_counter() - begin
            if not math.isfinite(value):
                raise DivergenceError(
                    f"{CALLER}: the loss must stay finite, got {value} in epoch {epoch}, step {step}. Lower the "
                    f"learning rate, or set check_finite: True on the loss."
                )
            terms = [float(part.sum()) for one in losses.values() for part in one.last_terms or ()]
            totals += torch.tensor([value, *terms, 1.0], dtype=torch.float64)
            if progress is not None:
                progress(epoch * steps + step, box.num_epochs * steps, f"epoch {epoch + 1}/{box.num_epochs}")
        totals = self._sum_over_ranks(totals)
        row: dict[str, Any] = {"epoch": epoch, "lr": learning_rate, "seconds_per_step": seconds / max(1, steps)}
        row.update(zip(names, (totals[:-1] / totals[-1].clamp(min=1)).tolist(), strict=True))
        return row

    @torch.inference_mode()
    def accuracy(self, loader_config: dict[str, Any]) -> float:
        """Top-1 accuracy in percent, each image counted once however many ranks there are."""
        if self.distributed:
            # Each rank has statistics of its own batches; the checkpoint, and so the accuracy, is about rank 0's.
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        dataset: Dataset[Any] = self.datasets[loader_config["dataset_id"]]
        share = Subset(dataset, range(self.rank, len(dataset), self.world_size))  # type: ignore[arg-type]
        loader = build_data_loader(share, loader_config, distributed=False)
        self.model.eval()
        counts = torch.zeros(2, dtype=torch.float64)
        for images, targets in loader:
            logits = self.model(images.to(self.device))
            if not isinstance(logits, Tensor):
                raise ValueError(
                    f"{CALLER}: the model '{self.checkpoints.key}' must return a tensor of logits, got "
                    f"{type(logits).__name__}. "
                    f"Use upstream's script."
                )
            counts += torch.tensor([(logits.argmax(1) == targets.to(self.device)).sum().item(), len(targets)])
        right, total = self._sum_over_ranks(counts).tolist()
        return 100.0 * float(right) / max(1.0, float(total))

    def finish_epoch(self, row: dict[str, Any]) -> None:
        """Keeps the row of an epoch, lets the box end it, and saves what a resumed run needs."""
        kept = self.checkpoints
        evaluation = evaluation_of(self.box)
        robust = None if evaluation is None else evaluation.accuracy(self.box)
        if robust is not None:
            row["robust_accuracy"] = robust
        kept.history.append(row)
        logger.info("  ".join(f"{key}: {value:.4g}" for key, value in row.items()))
        value = row["val_accuracy"] if self.best_by == "accuracy" else robust
        if value is not None and value > kept.best_value:
            kept.best_value = value
            if self.rank == 0:
                kept.save_best()
        self.box.post_epoch_process()
        if self.rank == 0:
            kept.save_last(row["epoch"] + 1)

    def class_priors(self) -> dict[str, Tensor]:
        """The class prior of each term that has one."""
        return {
            term: loss.class_prior.matrix.cpu().clone()
            for term, loss in find_losses(self.box.criterion).items()
            if loss.class_prior is not None
        }

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.distributed:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()


def run(
    config: dict[str, Any],
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    start_epoch: int = 0,
    best_by: str = BEST_BY[0],
    allow_changes: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains, and tests the best checkpoint: the model with the highest validation accuracy, or robust accuracy.

    With an initialised process group this is one of its ranks.

    Args:
        config: of :func:`load_config`.
        device: where to train.
        seed: of initialisation, order and augmentation.
        start_epoch: number of finished epochs to go on from; the last checkpoint must hold as many.
        best_by: 'accuracy', or 'robust' where :func:`ikl_plugins.torchdistill.robust_evaluation` is the config's
            post-epoch process.
        allow_changes: only warn where the run that goes on was started with other settings.
        progress: called after each step with the number of the step, the number of all steps and a text.

    Returns:
        'test_accuracy' and 'best_val_accuracy' (robust with that ``best_by``) in percent, 'history' (a row per epoch:
        'epoch', 'lr', 'train_loss', 'val_accuracy', 'seconds_per_step', where it was evaluated 'robust_accuracy', and
        the two terms of each of this package's losses as '<term>/weighted_mse' and '<term>/soft_cross_entropy'),
        'class_prior' (the matrix of each term that has one).

    Raises:
        ValueError: a checkpoint that is missing or does not fit, an option out of range, a validation or test set or a
            scheduler that would only fail after an epoch, a loss that is not finite; another process runs with the same
            `dst_ckpt`.
    """
    with _alone(config):
        return _run(
            config,
            device=torch.device(device),
            seed=seed,
            start_epoch=start_epoch,
            best_by=best_by,
            allow_changes=allow_changes,
            progress=progress,
        )


def _alone(config: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Refuses a second run with the same checkpoints; of several ranks the first one has them locked."""
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return contextlib.nullcontext()
    return locked(CALLER, student_config(config)["dst_ckpt"], "Wait for it, or change `dst_ckpt:`.")


def _run(
    config: dict[str, Any],
    *,
    device: torch.device,
    seed: int,
    start_epoch: int,
    best_by: str,
    allow_changes: bool,
    progress: Progress | None = None,
) -> dict[str, Any]:
    import_dependencies(config.get("dependencies"))
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        if best_by not in BEST_BY:
            raise ValueError(check.unknown_name_message(CALLER, "--best_by", best_by, BEST_BY))
        trainer = Trainer(config, device, seed, best_by)
        if best_by == "robust" and evaluation_of(trainer.box) is None:
            raise ValueError(
                f"{CALLER}: --best_by robust needs `post_epoch_process:` to be one of "
                f"ikl_plugins.torchdistill.robust_evaluation. See docs/torchdistill.md."
            )
        epochs = trainer.box.num_epochs
        if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
            raise ValueError(f"{CALLER}: `train: num_epochs:` must be a whole number of at least 1, got {epochs!r}.")
        if not 0 <= start_epoch <= epochs:
            raise ValueError(f"{CALLER}: --start_epoch must lie between 0 and the {epochs} epochs, got {start_epoch}.")
        dry_run(trainer.box, config)
        if start_epoch > 0:
            trainer.checkpoints.resume(start_epoch, allow_changes=allow_changes)
        for epoch in range(start_epoch, epochs):
            row = trainer.train_epoch(epoch, progress)
            _, loader = val_loader(config["train"], getattr(trainer.box, "stage_number", 0))
            row["val_accuracy"] = trainer.accuracy(loader)
            trainer.finish_epoch(row)
        priors = trainer.class_priors()
        trainer.box.clean_modules()
        if trainer.distributed:
            dist.barrier()
        trainer.checkpoints.load_best()
        test_accuracy = trainer.accuracy(config["test"]["test_data_loader"])
        logger.info("test accuracy of the best checkpoint: %.2f", test_accuracy)
        return {
            "test_accuracy": test_accuracy,
            "best_val_accuracy": trainer.checkpoints.best_value,
            "history": trainer.checkpoints.history,
            "class_prior": priors,
        }


# --- the command -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ikl train CONFIG.yaml",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation, order and augmentation (default: 0)")
    parser.add_argument("--start_epoch", type=int, default=0, metavar="N", help="go on after N finished epochs")
    parser.add_argument(
        "--best_by",
        choices=BEST_BY,
        default=BEST_BY[0],
        help="what the best checkpoint is best at (default: accuracy)",
    )
    parser.add_argument(
        "--allow_changes", action="store_true", help="only warn where --start_epoch goes on with other settings"
    )
    parser.add_argument("--run_log", type=Path, metavar="FILE", help="write the log there, too")
    return parser


def _join_group(device: torch.device) -> torch.device:
    """Joins the process group that torchrun describes in the environment; the device is this rank's."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if dist.get_rank() > 0:
            logging.getLogger().setLevel(logging.WARNING)
    return device


def main(arguments: list[str]) -> None:
    """Runs `ikl train` for a YAML file.

    Args:
        arguments: the file, and the options behind it.

    Raises:
        ImportError, OSError, RuntimeError, TypeError, ValueError: what a user can mend.
        KeyboardInterrupt: with how to go on.
        SystemExit: on --help and on an unknown option.
    """
    path, *options = arguments
    args = _parser().parse_args(options)
    set_basic_log_config()
    try:
        device = _join_group(torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")))
        config = load_config(path)
        with _alone(config):
            if args.run_log is not None and not (dist.is_initialized() and dist.get_rank() > 0):
                setup_log_file(args.run_log.expanduser())
            shared = {name: getattr(args, name) for name in ("seed", "start_epoch", "best_by", "allow_changes")}
            result = _run(config, device=device, **shared)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("go on with --start_epoch") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    kind = "accuracy" if args.best_by == "accuracy" else "robust accuracy"
    logger.info("best validation %s: %.2f", kind, result["best_val_accuracy"])

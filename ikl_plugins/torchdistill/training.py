"""Trains what a torchdistill YAML file describes: a thin driver over torchdistill's own boxes.

    python tools/train_torchdistill.py configs/torchdistill/digits/ikl.yaml
    python tools/train_torchdistill.py configs/torchdistill/digits/ikl.yaml --start_epoch 5
    torchrun --nproc_per_node 2 tools/train_torchdistill.py configs/torchdistill/digits/ikl.yaml --device cpu

It reads the keys that upstream's examples/torchvision/image_classification.py reads. Around the boxes it differs:

- several processes also work without CUDA, and evaluation counts each image once;
- beside the best checkpoint, at `dst_ckpt`, it keeps the last one, `..._last.pt`: training that goes on from there with
  --start_epoch ends as if it had never stopped, to the bit on a CPU;
- checkpoints are written aside and renamed, and read with weights_only=True;
- a `src_ckpt` gives initial weights, and must be there.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from torchdistill.common.main_util import import_dependencies, set_seed
from torchdistill.common.module_util import check_if_wrapped, get_updatable_param_names
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.training import get_training_box
from torchdistill.datasets.util import build_data_loader
from torchdistill.misc.log import set_basic_log_config, setup_log_file
from torchdistill.models.official import get_image_classification_model
from torchdistill.models.registry import get_model

from ikl_plugins import LossTerms
from ikl_plugins._files import written_aside
from ikl_plugins.checkpoints import load_content
from ikl_plugins.torchdistill import find_losses

__all__ = ["DivergenceError", "last_path", "load_checkpoint", "load_config", "run"]

CALLER = "train_torchdistill"
CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "torchdistill"
Progress = Callable[[int, int, str], None]

logger = logging.getLogger(__name__)


class DivergenceError(ValueError):
    """A loss that is not finite any more."""


# --- the config ------------------------------------------------------------------------------------------------------


def load_config(path: Path | str) -> dict[str, Any]:
    """Reads a YAML file as torchdistill does, its data sets included.

    Args:
        path: the file. It is trusted: `!import_call` runs what it names.

    Returns:
        The config, as :func:`run` takes it.

    Raises:
        ValueError: the file is missing or no YAML, lacks a block, or names data that is not there.
    """
    if not Path(path).is_file():
        raise ValueError(f"{CALLER}: the config must be a YAML file, but there is none at {path}. Check the path.")
    try:
        config = load_yaml_file(os.fspath(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{CALLER}: {path} must be a YAML file, but it is not: {error}. Correct it.") from error
    _check_blocks(config, f"{path}")
    return config


def _check_blocks(config: Any, where: str) -> None:
    """Refuses a config without what this driver, or upstream's script, looks up."""
    if not isinstance(config, dict):
        raise ValueError(f"{CALLER}: {where} must hold a mapping, got {type(config).__name__}. Compare configs/.")
    for keys in (("datasets",), ("models",), ("train",), ("test", "test_data_loader")):
        block: Any = config
        for key in keys:
            block = block.get(key) if isinstance(block, dict) else None
        if not isinstance(block, dict):
            raise ValueError(
                f"{CALLER}: {where} must have the block `{': '.join(keys)}:`. Compare configs/torchdistill."
            )
    for role, model in config["models"].items():
        if not isinstance(model, dict):
            raise ValueError(
                f"{CALLER}: `models: {role}:` must be a mapping, got {model!r}. Give it `key:` and `kwargs:`."
            )
    if "dst_ckpt" not in _student_config(config, where):
        raise ValueError(
            f"{CALLER}: {where} must say with `dst_ckpt:` where the trained model goes. Add it under `models:`."
        )


def _student_config(config: dict[str, Any], where: str = "the config") -> dict[str, Any]:
    models = config["models"]
    found = models.get("student_model", models.get("model"))
    if not isinstance(found, dict):
        raise ValueError(f"{CALLER}: {where} must have `student_model:` or `model:` under `models:`. Add one of them.")
    return found


def _who_trains(path: str) -> str:
    """The command that makes a checkpoint, if a shipped config does."""
    for file in sorted(CONFIGS.rglob("*.yaml")):
        if re.search(rf"dst_ckpt: *['\"]?{re.escape(path)}['\"]? *$", file.read_text(), re.MULTILINE):
            return f"Train it first: python tools/train_torchdistill.py {file.relative_to(CONFIGS.parent.parent)}"
    return "Train it first, or correct the path"


def _build_model(model_config: dict[str, Any], role: str, device: torch.device, distributed: bool) -> nn.Module:
    kwargs = model_config.get("kwargs")
    if "key" not in model_config or not isinstance(kwargs, dict):
        raise ValueError(
            f"{CALLER}: the {role} must have the name of a network as `key:` and its arguments as `kwargs:`, got "
            f"{model_config}. Compare configs/torchdistill; without arguments write `kwargs: {{}}`."
        )
    model = get_image_classification_model(model_config, distributed)
    if model is None:
        model = get_model(model_config["key"], model_config.get("repo_or_dir"), **kwargs)
    source = model_config.get("src_ckpt")
    if source is not None:
        if not Path(source).is_file():
            raise ValueError(
                f"{CALLER}: `src_ckpt` of the {role} must be a checkpoint file, but there is none at {source}. "
                f"{_who_trains(str(source))}."
            )
        content = load_checkpoint(source)
        _load_weights(model, content.get("model", content), source, model_config["key"])
    return model.to(device)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """Reads a checkpoint of this driver or of upstream's script, without running what it holds.

    Args:
        path: the file.

    Returns:
        'model', 'optimizer', 'lr_scheduler', 'best_value' and 'args'; of other files whatever their mapping holds.

    Raises:
        ValueError: the file is missing or damaged, or holds more than tensors, plain values and an argparse.Namespace.
    """
    content = load_content(path)
    if not isinstance(content, dict):
        raise ValueError(
            f"{CALLER}: the checkpoint {path} must hold a mapping, got {type(content).__name__}. Make it anew."
        )
    return content


def last_path(path: Path | str) -> Path:
    """Where the last checkpoint lies beside the best one: `ikl.pt` -> `ikl_last.pt`."""
    path = Path(path)
    return path.with_name(f"{path.stem}_last{path.suffix}")


def _save(path: Path, content: dict[str, Any]) -> None:
    """Writes aside and renames: an interruption or a full disk leaves the old file as it was."""
    with written_aside(path) as aside, aside.open("wb") as file:
        torch.save(content, file)


def _load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path | str, key: str) -> None:
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{CALLER}: the checkpoint {path} must fit the model '{key}': {error}. Name another checkpoint or model, "
            f"or correct the model's `kwargs:`."
        ) from error


# --- the driver ------------------------------------------------------------------------------------------------------


class Trainer:
    """One run: its box, and what a resumed run must find again."""

    def __init__(self, config: dict[str, Any], device: torch.device, seed: int) -> None:
        self.device = device
        self.seed = seed
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world_size = dist.get_world_size() if self.distributed else 1
        self.datasets = config["datasets"]
        self.train_config, self.test_config = config["train"], config["test"]
        model_config = _student_config(config)
        self.model_key = model_config.get("key")
        self.best_path = Path(model_config["dst_ckpt"])
        teacher_config = config["models"].get("teacher_model")

        set_seed(seed)
        teacher = None
        if teacher_config is not None:
            teacher = _build_model(teacher_config, "teacher", device, self.distributed)
        # Of its own seed: the student starts the same whatever its teacher is.
        set_seed(seed)
        self.model = _build_model(model_config, "student", device, self.distributed)
        device_ids = [device.index or 0] if device.type == "cuda" else None
        arguments = (self.datasets, self.train_config, device, device_ids, self.distributed, 1)
        self.box = (
            get_training_box(self.model, *arguments)
            if teacher is None
            else get_distillation_box(teacher, self.model, *arguments)
        )
        self.best_value = -1.0
        self.history: list[dict[str, Any]] = []
        self.args = argparse.Namespace(device=str(device), seed=seed, world_size=self.world_size)

    def rehearse(self) -> None:
        """Does what a run does for the first time after an epoch, or at its end: rather now than after a day.

        Raises:
            ValueError: a validation or test set that is not there or gives no batches of images and labels; a scheduler
                that cannot take a step.
        """
        stages = [f"stage{number}" for number in range(1, getattr(self.box, "stage_number", 0) + 1)]
        blocks = {f"train: {stage}": self.train_config.get(stage, {}) for stage in stages}
        loaders = {f"{name}: val_data_loader": block.get("val_data_loader") for name, block in blocks.items()}
        loaders = {name: loader for name, loader in loaders.items() if loader is not None}
        if "train: stage1: val_data_loader" not in loaders:  # which goes on in the stages that have none
            loaders["train: val_data_loader"] = self.train_config.get("val_data_loader")
        loaders["test: test_data_loader"] = self.test_config["test_data_loader"]
        for where, loader in loaders.items():
            self._check_loader(where, loader)
        self._check_scheduler()

    def _check_loader(self, where: str, config: Any) -> None:
        if not isinstance(config, dict) or "dataset_id" not in config or not isinstance(config.get("kwargs"), dict):
            raise ValueError(
                f"{CALLER}: `{where}:` must name a data set as `dataset_id:` and have `kwargs:`, got {config}. Compare "
                f"configs/torchdistill."
            )
        name = config["dataset_id"]
        if name not in self.datasets:
            known = ", ".join(map(repr, self.datasets))
            raise ValueError(
                f"{CALLER}: `{where}: dataset_id:` must be one of `datasets:`, {known}, got {name!r}. Correct it."
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the run itself tells them
                images, targets = next(iter(build_data_loader(self.datasets[name], config, distributed=False)))
            if not (isinstance(images, Tensor) and isinstance(targets, Tensor)):
                raise TypeError(f"{type(images).__name__} and {type(targets).__name__}")
        except Exception as error:  # of data sets, transforms and workers of any kind
            transform = getattr(self.datasets[name], "transform", None)
            raise ValueError(
                f"{CALLER}: `{where}:` with {config['kwargs']} must give batches of images and labels as tensors, but "
                f"the first one of {name!r} gives {type(error).__name__}: {error}. Correct this block, or `kwargs:` of "
                f"the data set, whose `transforms:` are {transform!r}."
            ) from error

    def _check_scheduler(self) -> None:
        """Takes a step of the scheduler, and takes it back."""
        scheduler, groups = self.box.lr_scheduler, self.box.optimizer.param_groups
        if scheduler is None or isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            return  # that one needs an accuracy
        before = copy.deepcopy(scheduler.state_dict())
        settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the optimizer has not taken a step
                scheduler.step()
        except Exception as error:  # of schedulers of any kind
            given = self.train_config.get("scheduler")
            raise ValueError(
                f"{CALLER}: `train: scheduler:` must be a schedule of the learning rate, but {given} gives "
                f"{type(error).__name__} in its first step: {error}. Correct its `kwargs:`."
            ) from error
        scheduler.load_state_dict(before)
        for group, setting in zip(groups, settings, strict=True):
            group.update(setting)

    def train_epoch(self, epoch: int, progress: Progress | None) -> dict[str, Any]:
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
                    f"{CALLER}: `train: criterion:` must give a loss as a tensor, got {loss!r}. Name at least one loss "
                    f"in its `kwargs: sub_terms:`."
                )
            value = loss.item()
            box.post_forward_process(loss=loss)
            seconds += time.perf_counter() - begin
            if not math.isfinite(value):
                raise DivergenceError(
                    f"{CALLER}: the loss must stay finite, got {value} in epoch {epoch}, step {step}. Lower the "
                    f"learning rate or the loss's weights, or set check_finite: True on it to see where this begins."
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
                    f"{CALLER}: the model '{self.model_key}' must return a tensor of logits to be evaluated, got "
                    f"{type(logits).__name__}. Use upstream's script for other models."
                )
            counts += torch.tensor([(logits.argmax(1) == targets.to(self.device)).sum().item(), len(targets)])
        right, total = self._sum_over_ranks(counts).tolist()
        return 100.0 * right / max(1.0, total)

    def content(self) -> dict[str, Any]:
        """What upstream's script saves, under its names."""
        scheduler = self.box.lr_scheduler
        return {
            "model": self.model.state_dict(),
            "optimizer": self.box.optimizer.state_dict(),
            "best_value": self.best_value,
            "lr_scheduler": None if scheduler is None else scheduler.state_dict(),
            "args": self.args,
        }

    def save_best(self) -> None:
        if self.rank == 0:
            _save(self.best_path, self.content())

    def save_last(self, epochs: int) -> None:
        """Saves what the rest of the training depends on, after ``epochs`` finished epochs."""
        if self.rank == 0:
            parameters = [parameter for group in self.box.optimizer.param_groups for parameter in group["params"]]
            _save(
                last_path(self.best_path),
                {
                    **self.content(),
                    "epoch": epochs,
                    "history": self.history,
                    "modules": {name: module.state_dict() for name, module in self._other_modules().items()},
                    # Gradients wait for their step where `grad_accum_step` does not divide the batches of an epoch.
                    "grad_count": self.box.stage_grad_count,
                    "gradients": [parameter.grad for parameter in parameters],
                },
            )

    def resume(self, epoch: int) -> None:
        """Goes back to where ``epoch`` epochs were finished.

        Raises:
            ValueError: there is no last checkpoint, or it is of another epoch, seed, number of ranks or model.
        """
        path = last_path(self.best_path)
        if not path.is_file():
            raise ValueError(
                f"{CALLER}: --start_epoch {epoch} needs the last checkpoint of the run, but there is none at {path}. "
                f"Start with --start_epoch 0."
            )
        content = load_checkpoint(path)
        missing = [key for key in (*self.content(), "epoch", "history", "modules", "gradients") if key not in content]
        if missing:
            raise ValueError(
                f"{CALLER}: {path} must be a last checkpoint of this driver, but lacks {', '.join(missing)}. "
                f"Start with --start_epoch 0."
            )
        if content["epoch"] != epoch:
            raise ValueError(
                f"{CALLER}: --start_epoch must be the number of finished epochs, {content['epoch']} in {path}, "
                f"got {epoch}. Use --start_epoch {content['epoch']}."
            )
        for name, ours in vars(self.args).items():
            theirs = getattr(content["args"], name, None)
            if name != "device" and theirs != ours:
                raise ValueError(
                    f"{CALLER}: a resumed run must have the {name} of {path}, {theirs}, got {ours}. Use that one."
                )
        box = self.box
        self._advance_stages(epoch)
        _load_weights(self.model, content["model"], path, self.model_key)
        for name, module in self._other_modules().items():
            _load_weights(module, content["modules"].get(name, {}), path, name)
        try:
            box.optimizer.load_state_dict(content["optimizer"])
            if box.lr_scheduler is not None:
                box.lr_scheduler.load_state_dict(content["lr_scheduler"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{CALLER}: {path} must fit the optimizer and scheduler of the config: {error}. "
                f"Resume with the config that wrote it, or start with --start_epoch 0."
            ) from error
        parameters = [parameter for group in box.optimizer.param_groups for parameter in group["params"]]
        for parameter, gradient in zip(parameters, content["gradients"], strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        box.stage_grad_count = content["grad_count"]
        self.best_value = content["best_value"]
        self.history = content["history"]

    def _advance_stages(self, epoch: int) -> None:
        """Brings a box of several stages to the stage of ``epoch``; it would begin with the first."""
        box = self.box
        if not hasattr(box, "stage_number"):
            return
        for role in ("student", "teacher", "model"):
            if "dst_ckpt" in self.train_config.get(role, {}):
                raise ValueError(
                    f"{CALLER}: a run that keeps a checkpoint of each stage (`train: {role}: dst_ckpt:`) cannot be "
                    f"resumed, as going to its stage would overwrite them. Start with --start_epoch 0."
                )
        while box.stage_end_epoch <= epoch < box.num_epochs:
            box.advance_to_next_stage()
        box.current_epoch = epoch

    def class_priors(self) -> dict[str, Tensor]:
        """The class prior of each term that has one."""
        return {
            term: loss.class_prior.matrix.cpu().clone()
            for term, loss in find_losses(self.box.criterion).items()
            if loss.class_prior is not None
        }

    def _other_modules(self) -> dict[str, nn.Module]:
        """What is trained beside the model: adaptation modules of a redesigned student, or a teacher."""
        found = {}
        for name in ("student_model", "teacher_model", "model"):
            module = getattr(self.box, name, None)
            if module is not None and check_if_wrapped(module):
                module = module.module
            if module is not None and module is not self.model and get_updatable_param_names(module):
                found[name] = module
        return found

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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains, and tests the best checkpoint: the model with the highest validation accuracy.

    With an initialised process group this is one of its ranks.

    Args:
        config: of :func:`load_config`.
        device: where to train.
        seed: of initialisation, order and augmentation.
        start_epoch: number of finished epochs to go on from; the last checkpoint must hold as many.
        progress: called after each step with the number of the step, the number of all steps and a text.

    Returns:
        'test_accuracy' and 'best_val_accuracy' in percent, 'history' (a row per epoch: 'epoch', 'lr', 'train_loss',
        'val_accuracy', 'seconds_per_step', and the two terms of each of this package's losses as '<term>/weighted_mse'
        and '<term>/soft_cross_entropy'), 'class_prior' (the matrix of each term that has one).

    Raises:
        ValueError: a checkpoint that is missing or does not fit, an option out of range, a validation or test set or a
            scheduler that would only fail after an epoch, a loss that is not finite.
    """
    _check_blocks(config, "the config")
    import_dependencies(config.get("dependencies"))
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        trainer = Trainer(config, torch.device(device), seed)
        epochs = trainer.box.num_epochs
        if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
            raise ValueError(
                f"{CALLER}: `train: num_epochs:` must be a whole number of at least 1, got {epochs!r}. Correct it."
            )
        if not 0 <= start_epoch <= epochs:
            raise ValueError(
                f"{CALLER}: --start_epoch must lie between 0 and the {epochs} epochs of the config, got {start_epoch}. "
                f"Choose a number in that range."
            )
        trainer.rehearse()
        if start_epoch > 0:
            trainer.resume(start_epoch)
        for epoch in range(start_epoch, epochs):
            row = trainer.train_epoch(epoch, progress)
            row["val_accuracy"] = trainer.accuracy(_val_loader_config(trainer))
            trainer.history.append(row)
            logger.info("  ".join(f"{key}: {value:.4g}" for key, value in row.items()))
            if row["val_accuracy"] > trainer.best_value:
                trainer.best_value = row["val_accuracy"]
                trainer.save_best()
            trainer.box.post_epoch_process()
            trainer.save_last(epoch + 1)
        priors = trainer.class_priors()
        trainer.box.clean_modules()
        if trainer.distributed:
            dist.barrier()
        best = load_checkpoint(trainer.best_path)
        _load_weights(trainer.model, best.get("model", best), trainer.best_path, trainer.model_key)
        test_accuracy = trainer.accuracy(trainer.test_config["test_data_loader"])
        logger.info("test accuracy of the best checkpoint: %.2f", test_accuracy)
        return {
            "test_accuracy": test_accuracy,
            "best_val_accuracy": trainer.best_value,
            "history": trainer.history,
            "class_prior": priors,
        }


def _val_loader_config(trainer: Trainer) -> dict[str, Any]:
    """The validation loader's config: a stage may bring its own, else an earlier stage's goes on."""
    config = trainer.train_config
    for stage in range(getattr(trainer.box, "stage_number", 0), 0, -1):
        if "val_data_loader" in config.get(f"stage{stage}", {}):
            return config[f"stage{stage}"]["val_data_loader"]
    return config["val_data_loader"]


# --- the command -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation, order and augmentation (default: 0)")
    parser.add_argument("--start_epoch", type=int, default=0, metavar="N", help="go on after N finished epochs")
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


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; errors that a user can mend end it with one line."""
    args = _parser().parse_args(arguments)
    set_basic_log_config()
    try:
        device = _join_group(torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")))
        if args.run_log is not None and not (dist.is_initialized() and dist.get_rank() > 0):
            setup_log_file(args.run_log.expanduser())
        result = run(load_config(args.config), device=device, seed=args.seed, start_epoch=args.start_epoch)
    except (ImportError, OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; go on with --start_epoch")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    logger.info("best validation accuracy: %.2f", result["best_val_accuracy"])


if __name__ == "__main__":
    main()

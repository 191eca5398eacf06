"""IKLHook: tells the classifiers of this package where training begins and ends, and keeps it repeatable."""

from __future__ import annotations

import contextlib
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import EMAHook, Hook, RuntimeInfoHook, SyncBuffersHook
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, IterBasedTrainLoop
from mmengine.runner.checkpoint import find_latest_checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import _value_checks
from .._files import holds, locked
from .._run_record import check_resumed
from .._value_checks import host_numbers, judge_findings, read_value_checks, take_findings
from ..losses import DecoupledLoss
from .checkpoints import check_resumed_weights, cut_off, newest_whole, verify
from .dry_run import dry_run, first_batch
from .epochs import EpochModel, class_priors, end_epoch
from .run_settings import RECORD, model_settings, run_settings

__all__ = ["IKLHook", "run_lock"]


def run_lock(caller: str, work_dir: Path | str) -> contextlib.AbstractContextManager[None]:
    """Refuses a second process that trains in a work dir, see :func:`~ikl_plugins._files.locked`."""
    place = Path(work_dir, "run")
    return contextlib.nullcontext() if holds(place) else locked(caller, place, "Wait for it, or name another work_dir.")


class IKLHook(Hook):  # type: ignore[misc]
    """What the classifiers of this package need from the training loop: ``custom_hooks = [dict(type='IKLHook')]``.

    - Before a checkpoint is loaded or resumed it is read with :func:`ikl_plugins.mmengine.checkpoints.verify`. The
      text of the config in it, which MMEngine runs as Python on resume, is taken out of what MMEngine has loaded. A run
      that was stopped while MMEngine wrote its last checkpoint, or wrote down which one that is, goes on from the
      newest that is whole.
    - One process, or the ranks of one run, trains in a work dir: a second one is refused before its first step.
    - A checkpoint says what its run was started with: losses, attack, teacher, optimizer, batch size, number of ranks.
      A run that is resumed with something else is refused, field by field.
    - The classifier hears the number of each epoch. At its end the class priors are rolled, on all ranks and before
      the checkpoint of the epoch is written.
    - Random numbers are seeded for each epoch from the run's seed, the epoch and the rank, so that a resumed run draws
      what the uninterrupted one has drawn.
    - With ``randomness=dict(deterministic=True)`` on CUDA the variable CUBLAS_WORKSPACE_CONFIG, which torch then needs,
      is set to ':4096:8' unless it has a value.
    - Before the first step a batch is validated, so that a validation that cannot work is known then, and so are
      options of a ``CheckpointHook`` that would fail after an epoch.
    - The log shows the two terms of every loss of this package, also in models of other packages, and from the second
      epoch on ``prior_entropy``, the mean entropy of the class prior's rows in nats. A picture of the prior goes to the
      visualizer once an epoch: TensorBoard or whatever ``vis_backends`` names.
    - With an ``EMAHook`` the checkpoint holds the class prior that is in use, not an average of past ones, both under
      'state_dict' and 'ema_state_dict'.

    With an ``IterBasedTrainLoop`` an epoch is as many iterations as it takes to see the training data once, and random
    numbers are seeded for each iteration, but for those that the data draws: MMEngine replays them on resume. The class
    priors of any model are rolled; to hear more of the run, and to be validated before it, takes an ``EpochModel``.

    Args:
        seed_epochs: seed the random numbers of Python, NumPy and torch. They are those of this process; MMEngine seeds
            the workers of a data loader itself.
        verify_checkpoints: refuse checkpoints that hold more than data.
        rehearse: validate a batch before the first step.
        allow_changes: only warn of what a resumed run was not started with.

    Raises:
        ValueError: in training, what would give wrong results without a word: several ranks whose model is not
            wrapped; a wrapper that overwrites the ranks' running sums; a SyncBuffersHook that does so in the middle of
            an epoch; a checkpoint that must not be read, or of a run with other settings; a validation, or a
            CheckpointHook, that would fail later; a work dir in which another process trains.
    """

    # Before EMAHook, which many configs put at ABOVE_NORMAL, SyncBuffersHook and CheckpointHook: they must see restored
    # weights and rolled priors. Before RuntimeInfoHook, which waits for the device once for each term of the log.
    priority = "HIGHEST"

    def __init__(
        self,
        *,
        seed_epochs: bool = True,
        verify_checkpoints: bool = True,
        rehearse: bool = True,
        allow_changes: bool = False,
    ) -> None:
        self.seed_epochs = seed_epochs
        self.verify_checkpoints = verify_checkpoints
        self.rehearse = rehearse
        self.allow_changes = allow_changes
        self._settings: dict[str, Any] = {}  # of a run that trains
        self._started_with: tuple[Any] | None = None  # the record of the checkpoint that it is resumed from
        self._iterations_per_epoch: int | None = None  # None where the loop has epochs of its own
        self._epoch: int | None = None
        self._checkpoint: str | None = None  # which is verified
        self._data_stream: tuple[Any, Any, torch.Tensor] | None = None
        self._lock = contextlib.ExitStack()
        self._losses: dict[str, DecoupledLoss] = {}  # whose terms the model itself does not log

    def before_run(self, runner: Any) -> None:
        """Verifies the checkpoint that the runner is about to read; prepares cuBLAS for deterministic algorithms."""
        if torch.are_deterministic_algorithms_enabled() and torch.cuda.is_available():
            # Without a fixed workspace torch refuses the first matrix product. No product has run yet.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        trains = isinstance(runner._train_loop, BaseLoop)
        self._settings = run_settings(runner, _unwrap(runner.model)) if trains else {}
        if not self.verify_checkpoints or runner._has_loaded:
            return
        path = runner._load_from
        if path is None and runner._resume:
            path = find_latest_checkpoint(runner.work_dir)
            if path is not None and cut_off(path, runner.work_dir):
                path = runner._load_from = newest_whole(path, runner.work_dir)
        if path is not None:
            verify(path, resume=runner._resume)
        self._checkpoint = path

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Takes out the text of the config: MMEngine would run it, to look for a key that no config has any more."""
        meta = checkpoint.get("meta")
        if self.verify_checkpoints and isinstance(meta, dict):
            meta.pop("config", None)
        if self.verify_checkpoints and runner._resume and isinstance(checkpoint.get("state_dict"), dict):
            check_resumed_weights(_unwrap(runner.model), checkpoint, self._checkpoint)
        if runner._resume and self._settings:
            self._started_with = (meta.get(RECORD) if isinstance(meta, dict) else None,)

    def before_train(self, runner: Any) -> None:
        """Refuses what would go wrong silently, and introduces the runner to the model."""
        if get_rank() == 0:
            self._lock.enter_context(run_lock("IKLHook", runner.work_dir))
        loop = runner.train_loop
        by_iteration = isinstance(loop, IterBasedTrainLoop)
        self._iterations_per_epoch = _iterations_per_epoch(loop.dataloader) if by_iteration else None
        self._epoch = None
        _check_ranks(runner, by_iteration)
        model = _unwrap(runner.model)
        for prior in class_priors(model).values():
            prior.watches_epochs = False  # they are rolled here
        if get_rank() > 0:
            _forget_running_sums(model)  # a checkpoint holds those of rank 0, once is enough
        self._losses = {}
        if not isinstance(model, EpochModel):
            self._losses = {path: loss for path, loss in model.named_modules() if isinstance(loss, DecoupledLoss)}
        batch = None
        if isinstance(model, EpochModel):
            batch = first_batch(runner) if self.rehearse else None  # a model may look at validation data, too
            model.attach(runner)
        self._check_resumed(runner, model)
        if isinstance(model, EpochModel) and self.rehearse:
            for hook in runner.hooks:  # its turn comes later; whoever is rehearsed may ask for what it tells
                if isinstance(hook, RuntimeInfoHook):
                    RuntimeInfoHook.before_train(hook, runner)
            dry_run(runner, model, batch)

    def before_train_epoch(self, runner: Any) -> None:
        """Seeds and begins an epoch of an epoch-based loop."""
        if self._iterations_per_epoch is not None:
            return
        self._seed(runner, runner.epoch)
        model = _unwrap(runner.model)
        _forget_running_sums(model)  # saved in the middle of this epoch, which begins anew and sees all images again
        if isinstance(model, EpochModel):
            model.begin_epoch(runner.epoch + 1, runner.max_epochs)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Seeds each iteration of an iteration-based loop, and begins its epochs."""
        length = self._iterations_per_epoch
        if length is None:
            return
        if self.seed_epochs:
            self._keep_data_stream()
        self._seed(runner, runner.iter)
        model = _unwrap(runner.model)
        epoch = runner.iter // length + 1
        if epoch != self._epoch and isinstance(model, EpochModel):
            model.begin_epoch(epoch, math.ceil(runner.max_iters / length))
        self._epoch = epoch

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Ends an iteration, and an epoch of an iteration-based loop; reads the log's terms in one copy to the host."""
        self._add_terms(outputs)
        _read_terms(outputs)
        model = _unwrap(runner.model)
        length = self._iterations_per_epoch
        if isinstance(model, EpochModel):
            model.end_iteration()
        if length is not None and (runner.iter + 1) % length == 0:
            _end_epoch(runner, (runner.iter + 1) // length)
        self._restore_data_stream()  # the next batch is drawn as if no step had been in between

    def after_train_epoch(self, runner: Any) -> None:
        """Ends an epoch of an epoch-based loop."""
        if self._iterations_per_epoch is None:
            _end_epoch(runner, runner.epoch + 1)

    def after_run(self, runner: Any) -> None:
        """Lets another process train in the work dir; after an error that happens as this process ends."""
        self._lock.close()

    def before_val(self, runner: Any) -> None:
        """Keeps the random numbers of an iteration-based loop's data: a resumed run replays no validation."""
        if self._iterations_per_epoch is not None and self.seed_epochs:
            self._keep_data_stream()

    def after_val(self, runner: Any) -> None:
        """Gives them back."""
        self._restore_data_stream()

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Reads what checks of values have found on a device."""
        read_value_checks()

    after_test_epoch = after_val_epoch

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Adds the record of the run's settings, and brings EMAHook's copy up to date.

        That hook then exchanges it with the model's entries of the checkpoint.

        EMAHook copies or averages buffers in each iteration, so its copy lags behind what the end of the epoch has
        changed: the class priors, and the statistics that a SyncBuffersHook has averaged over ranks.
        """
        if self._settings:
            checkpoint["meta"][RECORD] = self._settings
        model = _unwrap(runner.model)
        priors = class_priors(model).items()
        of_priors = {f"{path}.{name}" for path, prior in priors for name, _ in prior.named_buffers()}
        for hook in runner.hooks:
            if not isinstance(hook, EMAHook) or not hasattr(hook, "ema_model"):
                continue
            copies = dict(hook.ema_model.module.named_buffers())
            for name, buffer in model.named_buffers():
                if name in of_priors or not hook.ema_model.update_buffers:
                    copies[name].copy_(buffer)

    def _check_resumed(self, runner: Any, model: nn.Module) -> None:
        self._settings |= model_settings(model)  # a teacher that lies beside the config is known by now
        if self._started_with is None:
            return
        check_resumed(
            "IKLHook",
            runner._load_from or runner.work_dir,
            *self._started_with,
            self._settings,
            allowed=self.allow_changes,
            way_out="Take the old ones, or set dict(type='IKLHook', allow_changes=True).",
            logger=MMLogger.get_current_instance(),
        )
        self._started_with = None

    def _add_terms(self, outputs: Any) -> None:
        """Adds the terms of the losses to what an iteration logs; nothing is summed up any more by then."""
        if not isinstance(outputs, dict):
            return
        for path, loss in self._losses.items():
            for name, term in (loss.last_terms._asdict() if loss.last_terms is not None else {}).items():
                outputs.setdefault(_log_name(name, path, self._losses), term.mean())

    def _keep_data_stream(self) -> None:
        self._data_stream = random.getstate(), numpy.random.get_state(), torch.get_rng_state()

    def _restore_data_stream(self) -> None:
        if self._data_stream is not None:
            python, arrays, tensors = self._data_stream
            random.setstate(python)
            numpy.random.set_state(arrays)
            torch.set_rng_state(tensors)
            self._data_stream = None

    def _seed(self, runner: Any, position: int) -> None:
        if not self.seed_epochs:
            return
        numbers = numpy.random.SeedSequence((runner.seed, position, get_rank())).generate_state(3)
        python, array, tensor = numbers.tolist()
        random.seed(python)
        numpy.random.seed(array)
        torch.manual_seed(tensor)


def _end_epoch(runner: Any, epoch: int) -> None:
    """Rolls the class priors, and shows them."""
    model = _unwrap(runner.model)
    end_epoch(model)
    priors = class_priors(model)
    if not priors:
        return
    entropies = torch.stack([prior.entropy() for prior in priors.values()]).tolist()
    for (path, prior), entropy in zip(priors.items(), entropies, strict=True):
        runner.message_hub.update_scalar(f"train/{_log_name('prior_entropy', path, priors)}", entropy)
        if get_rank() == 0:
            picture = prior.picture().unsqueeze(2).expand(-1, -1, 3).contiguous().numpy()
            runner.visualizer.add_image(_log_name("class_prior", path, priors), picture, epoch)


def _log_name(name: str, path: str, others: dict[str, Any]) -> str:
    """The name in the log, with the path of the module where there are several."""
    return name if len(others) == 1 else f"{name}_{path.removesuffix('.class_prior').replace('.', '_')}"


def _read_terms(outputs: Any) -> None:
    """Brings the terms of an iteration to the CPU and judges the checks of values, all in one copy from the device.

    Raises:
        ValueError: a check of values has failed.
    """
    findings = take_findings()
    logged = outputs if isinstance(outputs, dict) else {}
    terms = {
        name: term
        for name, term in logged.items()
        if isinstance(term, Tensor) and term.numel() == 1 and not _value_checks.on_host(term)
    }
    values = host_numbers([*((term.reshape(()),) for term in terms.values()), *(found.numbers for found in findings)])
    for (name, term), (value,) in zip(terms.items(), values[: len(terms)], strict=True):
        logged[name] = torch.tensor(value, dtype=term.dtype)  # other hooks expect tensors
    judge_findings(findings, values[len(terms) :])


def _unwrap(model: Any) -> nn.Module:
    module: nn.Module = model.module if is_model_wrapper(model) else model
    return module


def _forget_running_sums(model: nn.Module) -> None:
    for prior in class_priors(model).values():
        prior.restart_epoch()


def _iterations_per_epoch(loader: DataLoader[Any]) -> int:
    """How many iterations see the training data once."""
    sampler = loader.sampler
    if isinstance(sampler, InfiniteSampler):  # its length is that of the data, on every rank
        batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", 1)
        length: int = math.ceil(len(sampler) / (batch_size * get_world_size()))
        return length
    return len(loader)


def _check_ranks(runner: Any, by_iteration: bool) -> None:
    """Refuses settings with which several ranks would train apart or lose running sums."""
    if get_world_size() < 2:
        return
    if not is_model_wrapper(runner.model):
        raise ValueError(
            f"IKLHook: the model of {get_world_size()} ranks must be wrapped. Start with --launcher pytorch."
        )
    if not class_priors(_unwrap(runner.model)):
        return
    if getattr(runner.model, "broadcast_buffers", False):
        raise ValueError(
            "IKLHook: `model_wrapper_cfg` must keep each rank's class statistics. "
            "Use dict(type='MMDistributedDataParallel', broadcast_buffers=False)."
        )
    if by_iteration and any(isinstance(hook, SyncBuffersHook) for hook in runner.hooks):
        raise ValueError(
            "IKLHook: SyncBuffersHook would average class statistics in mid-epoch of an iteration-based loop. "
            "Take it out of `custom_hooks`."
        )

"""AutoAttack with a log: per-image results, written after every batch, from which an interrupted run goes on.

The attacks, their parameters and their order are AutoAttack's (Croce and Hein, ICML 2020), and so is what they find:
with one seed, the images that fell and the adversarial images equal those of one run of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ... import _validation as check
from ..._progress import Shown, teller
from ..._robustbench_import import autoattack_facts
from ..conditions import own_conditions, trainable_copy
from ..data import Images
from ..eps import Eps
from .attacks import Attacks, Setting, random_state_kept, source_sha256
from .batches import Batch, Batches, each_kind_once, natural
from .checks import (
    check_class_order,
    check_data,
    check_model,
    check_seed,
    check_threat,
    natural_predictions,
    warn_of_chance,
)
from .log import Evaluation, class_names, data_facts, identity, logged_batch_size, weights_sha256
from .memory import fitting_batch_size
from .plan import plan_attacks
from .precision import precision_in_words, quick_look
from .record import Record
from .shards import Shard, check_shard
from .verdict import is_standard

__all__ = ["Progress", "evaluate", "shown"]


@dataclass(frozen=True)
class Progress:
    """What an evaluation says after each batch.

    Attributes:
        attack: name of the attack, or corruption and severity.
        batch: number of the batch, from 1.
        batches: of this attack.
        standing: images that are classified right and have fallen to no attack yet.
        n_examples: images in all.
        seconds: that this attack has taken.
    """

    attack: str
    batch: int
    batches: int
    standing: int
    n_examples: int
    seconds: float


def shown(
    caller: str, progress: bool | Callable[[Progress], None] | None, before: str = ""
) -> Callable[[Progress], None]:
    """What to call with the progress: for True a bar or lines, with the count of images that stand."""
    display = Shown("batches")

    def show(made: Progress) -> None:
        display(before + made.attack, made.batch, made.batches, f"{made.standing} of {made.n_examples} standing")

    return teller(caller, progress, show)


@own_conditions()
def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: str | float | Eps,
    norm: str = "Linf",
    version: str = "standard",
    attacks: Sequence[str | Callable[..., Tensor]] | None = None,
    parameters: Mapping[str, Mapping[str, float]] | None = None,
    surrogate: nn.Module | None = None,
    batch_size: int | Literal["auto"] = 128,
    precision: str = "float32",
    channels_last: bool = False,
    device: str | torch.device = "cpu",
    seed: int = 0,
    log: str | Path | None = None,
    checkpoint: str | Path | Mapping[str, Any] | None = None,
    data: str | Images | None = None,
    model_name: str | None = None,
    progress: bool | Callable[[Progress], None] | None = True,
    shard: tuple[int, int] | None = None,
    wait: float | None = None,
) -> Evaluation:
    """Runs AutoAttack.

    With fewer than 10 classes the targeted attacks take all other classes as targets; with fewer than 4 the attacks on
    the difference of logits ratio cannot be computed and are left out, and the result is not standard AutoAttack.

    Parameters, attacks of others and a quick look make a result that is not standard AutoAttack.

    The caller's ``torch.inference_mode``, ``no_grad``, autocast and default dtype and device do not reach the attacks.
    They work in float32: a model of half or double precision needs ``model.float()``, or a module around it that
    converts images and logits, and the log then says its ``dtype``.

    Args:
        model: classifier of images in [0, 1] in eval mode, giving float32 logits (N, C); it is moved to ``device``.
        images: pixels in [0, 1], shape (N, C, H, W) with any number of channels.
        labels: class indices (N,).
        eps: radius; for L-infinity of pixels in [0, 1], as '8/255'.
        norm: 'Linf', 'L2' or 'L1'.
        version: 'standard', 'plus' or, for models that draw random numbers, 'rand'.
        attacks: some of the attacks, which run with the parameters of AutoAttack's version 'custom' in the order given.
            Not beside another ``version`` than 'standard'. There may be 'transfer-apgd-ce' and the like, computed on
            the ``surrogate``, and attacks of others: a callable, 'module:callable', or the name of an entry point in
            the group 'ikl_plugins.attacks'. Behind 'standard', 'plus' or 'rand' as the first, these run after the
            attacks of that version. An attack of others is called as ``attack(model, images, labels, norm=..., eps=...,
            seed=...)`` with a batch on the device, under gradients, all random numbers seeded; it leaves the model as
            it is and gives images of the same shape, in [0, 1] and in the ball.
        parameters: by attack, parameters of it: ``{'square': {'n_queries': 20000}}``. Of APGD ``n_iter``,
            ``n_restarts``, ``eot_iter`` and ``rho``; of FAB ``n_iter``, ``n_restarts``, ``alpha_max``, ``eta`` and
            ``beta``; of the targeted ones ``n_target_classes``; of Square ``n_queries``, ``n_restarts``, ``p_init``.
        surrogate: classifier as ``model``, of the same classes, on which transfer attacks are computed. An image that
            does not fool it stays as it is.
        batch_size: images per batch. The images of a batch share random numbers, so that it is part of the result.
            'auto' for the largest of 16, 32, ... 1024 that is likely to fit memory; a run that goes on has that of its
            log.
        precision: 'bfloat16' for autocast in the model, as a quick look.
        channels_last: whether the model gets images in that memory layout, as a quick look.
        device: where to compute.
        seed: of every attack, and of what the model itself draws. Random numbers of the caller are not touched.
        log: a JSON file, written after every batch, with the files of the batches in a folder beside it. If it is
            there, the evaluation goes on where it stopped; if it is of the first of these images, they are not attacked
            again, unless in the last batch of an attack.
        checkpoint: path of the file that the weights are from, or a mapping with its 'name' and 'sha256'; for the log.
        data: name of the data, or the :class:`~ikl_plugins.robustbench.data.Images` they are from; for the log.
        model_name: for the log; None for the name of its class.
        progress: True for a bar on a terminal and lines elsewhere, on standard error; False for neither; or a function
            that is called with a :class:`Progress` after every batch.
        shard: (3, 8) for the third of eight processes that share the work. They have the same arguments and the same
            ``log``, on a disk that all of them see; of each attack this one takes batches 3, 11, 19 and so on. What the
            first one logs and all return is what a single process would. In a process group this is
            ``(dist.get_rank() + 1, dist.get_world_size())``.
        wait: seconds to wait for the other shards at the end of each attack; None for ever, 0 for not at all.

    Returns:
        The evaluation. Its log says in ``fell_to`` for each image which attack it fell to.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown norm, version, attack or parameter, or one out of its range; an attack of others that
            gives images it must not give; a model in training mode, or that gives something else than
            finite float32 logits of at least two classes; pixels outside [0, 1]; labels the model has no logit for; a
            log of another evaluation (the message says what differs), or that another process writes; a damaged file
            of a batch; no such shard.
        RuntimeError: this shard's part is done, and it waits no longer for the others (``Unfinished``).

    Warns:
        UserWarning: an L-infinity radius that is nearly a number of grey levels; a natural accuracy no better than
            chance.
    """
    caller = "evaluate"
    tell = shown(caller, progress)
    eps = check_threat(caller, norm, eps)
    plan = plan_attacks(caller, version, attacks, surrogate=surrogate is not None)
    words = precision_in_words(caller, precision, channels_last)
    check_model(caller, model, plan.version)
    check_class_order(caller, model, data)
    images, labels = check_data(caller, images, labels)
    check_seed(caller, seed)
    part = check_shard(caller, shard, wait, log, progress)
    path = None if log is None else Path(log)
    device = torch.device(device)
    if isinstance(model, nn.parallel.DistributedDataParallel):  # it would wait for the other ranks in every forward
        model = model.module
    network = trainable_copy(caller, model).to(device)
    model = quick_look(network, words)

    with part.alone(path), random_state_kept(device), torch.no_grad():
        if batch_size == "auto":
            fab = plan.version == "plus" or any(name.endswith("fab") for name in (plan.named or ()))
            known = logged_batch_size(caller, path)
            if known is None and part.count > 1:
                raise ValueError(f"{caller}: `batch_size` must be a number where work is shared, got 'auto'. Pass 128.")
            natural_predictions(caller, model, images[:1], labels[:1], 1, device)  # it is a model of such images
            batch_size = known or fitting_batch_size(caller, model, images, device, fab=fab)
        check.check_integer(caller, "batch_size", batch_size)
        torch.manual_seed(seed)
        predictions, classes = natural_predictions(caller, model, images, labels, batch_size, device)
        if surrogate is not None:
            surrogate = _checked_surrogate(caller, surrogate, images[:batch_size], classes, device)
        setting = Setting(norm, eps, seed, device, classes)
        adversary = Attacks(caller, plan, model, setting, parameters, surrogate)

        fresh = {
            **identity(network, model_name, checkpoint, device),
            "seed": seed,
            "threat_model": norm,
            "dataset": None,
            "eps": eps.text,
            "eps_value": float(eps),
            "version": plan.version,
            "standard": False,
            "attacks": adversary.names,
            "parameters": adversary.parameters,
            "own_attacks": {name: source_sha256(called) for name, called in plan.own.items()},
            "surrogate": None if surrogate is None else _surrogate_facts(surrogate),
            "precision": words,
            "autoattack": autoattack_facts(),
            "dropped": adversary.dropped,
            "n_target_classes": adversary.n_target_classes,
            "n_classes": classes,
            "n_examples": len(images),
            "batch_size": batch_size,
            "data": data_facts(data, images, labels),
            "classes": class_names(data, classes),
            "labels": labels.tolist(),
            "natural_predictions": predictions.tolist(),
            "predictions": predictions.tolist(),
            "natural_correct": predictions.eq(labels).int().tolist(),
            "fell_to": [None] * len(images),
            "progress": [],
            "warnings": [],
            "unreliable": False,
        }
        fresh["standard"] = is_standard(fresh)
        record = Record(caller, fresh, path, images, labels, writer=part.number == 1)

        def checks() -> list[str]:
            adversary.run_checks(images[:batch_size], labels[:batch_size])
            return each_kind_once(adversary.take_warnings())

        predictions = torch.tensor(record.log["natural_predictions"])
        start, place = natural(caller, record.folder, record.log, images, labels, predictions, checks)
        if place is not None:
            record.adopt(start.predictions.tolist(), place)
        record.log["warnings"] = start.warnings
        warn_of_chance(caller, start.predictions, labels, classes)
        if not record.found:
            record.save()
        batches = Batches(caller, record.folder, record.log, start.digests)
        for attack in adversary.names:
            # Also of an attack that has run already: some of its settings stay.
            perturb = adversary.prepared(attack)

            def attacked(index: Tensor, perturb: Callable[[Tensor, Tensor], Tensor] = perturb) -> Batch:
                started = time.perf_counter()
                torch.manual_seed(seed)  # a model that draws random numbers does so before the attack sets its seed
                clean, true = images[index].clone().to(device), labels[index].clone().to(device)
                adversarial = perturb(clean, true)
                found = adversary.model(adversarial).max(dim=1)[1]
                fell = found.ne(true).cpu()
                image, prediction = adversarial.cpu()[fell], found.cpu()[fell].tolist()
                said, seconds = each_kind_once(adversary.take_warnings()), time.perf_counter() - started
                return Batch(index.tolist(), index[fell].tolist(), image, prediction, seconds, said)

            _run_attack(record, batches, attack, attacked, part, tell)
        record.finish()
        record.save()
    return Evaluation(record.log, record.adversarial)


def _checked_surrogate(
    caller: str, surrogate: nn.Module, images: Tensor, classes: int, device: torch.device
) -> nn.Module:
    """The surrogate on the device, refused unless it is a model of as many classes."""
    caller = f"{caller} surrogate"
    check_model(caller, surrogate, "standard")
    surrogate = trainable_copy(caller, surrogate).to(device)
    try:
        _, found = natural_predictions(caller, surrogate, images, torch.zeros(1), len(images), device)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        said = str(error).strip().splitlines()[0]
        raise ValueError(f"{caller}: it must take images of {tuple(images.shape[1:])}, but raised: {said}") from error
    if found != classes:
        raise ValueError(f"{caller}: it must have the {classes} classes of the model, got {found}.")
    return surrogate


def _surrogate_facts(surrogate: nn.Module) -> dict[str, str]:
    return {"model": type(surrogate).__name__, "weights_sha256": weights_sha256(surrogate)}


def _run_attack(
    record: Record,
    batches: Batches,
    attack: str,
    attacked: Callable[[Tensor], Batch],
    shard: Shard,
    tell: Callable[[Progress], None],
) -> None:
    """Runs one attack on the images that stand, batch by batch, except for those batches that have run already."""
    log, parts = record.log, record.parts()
    entry = record.begin(attack, parts)

    def note(number: int, batch: Batch) -> None:
        record.note(number, batches.key(attack, parts[number]), batch)

    def show() -> None:
        done = entry["batches_done"]
        tell(Progress(attack, done, len(parts), entry["standing"], log["n_examples"], entry["seconds"]))

    for number, index in enumerate(parts):
        if not shard.owns(number):
            continue
        batch = batches.read(attack, number, index)
        if batch is not None:
            note(number, batch)
            continue
        batch = attacked(torch.tensor(index))
        batches.write(attack, number, batch)
        note(number, batch)
        record.save()
        show()
    others = [number for number in range(len(parts)) if not shard.owns(number)]
    shard.waits()
    while others:
        there = {number: batches.read(attack, number, parts[number]) for number in others}
        found = {number: batch for number, batch in there.items() if batch is not None}
        for number, batch in found.items():
            note(number, batch)
        others = [number for number in others if number not in found]
        if found:
            record.save()
            show()
        if others:
            shard.look_again(attack, others, record.check_other)

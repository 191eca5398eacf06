"""The attacks: AutoAttack's own, set up as AutoAttack does, those on a surrogate, and those of others."""

from __future__ import annotations

import contextlib
import copy
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..._robustbench_import import import_robustbench
from ..eps import Eps
from .checks import ATTACKS
from .own import distances, outside, own_attack, source_sha256
from .plan import TRANSFER, Plan, check_parameters

__all__ = ["TRANSFER", "Attacks", "Setting", "distances", "outside", "possible_attacks", "random_state_kept"]
__all__ += ["source_sha256", "square_warnings"]

_LEAST_CLASSES = {"apgd-dlr": 4, "apgd-t": 4}  # the margin is divided by the distance to the third or fourth logit
_ITERATIONS = ("n_iter", "n_iter_orig", "n_iter_2", "n_iter_min", "size_decr")  # what APGD derives from n_iter
_ROUNDING = 2**-23  # of a pixel in [0, 1]

_robustbench = import_robustbench()


class Setting(NamedTuple):
    """What all attacks of an evaluation share."""

    norm: str
    eps: Eps
    seed: int
    device: torch.device
    classes: int


class Attacks:
    """The attacks of an evaluation, and what AutoAttack's own checks say of it.

    Attributes:
        names: of the attacks, in their order.
        dropped: those that cannot run with so few classes, and why.
        parameters: by attack, those that differ from AutoAttack's.
        n_target_classes: of the targeted attacks; None without one.
        model: images to logits, as AutoAttack calls it.
    """

    def __init__(
        self,
        caller: str,
        plan: Plan,
        model: nn.Module,
        setting: Setting,
        parameters: Mapping[str, Mapping[str, Any]] | None = None,
        surrogate: nn.Module | None = None,
    ) -> None:
        classes = setting.classes
        self._caller, self._setting, self._own, self._network = caller, setting, plan.own, model
        self._said = _Said()
        self._adversary = self._autoattack(model, plan, self._said)
        # What AutoAttack says of a surrogate's gradients is nothing about the model.
        self._surrogate = None if surrogate is None else self._autoattack(surrogate, plan, _Said())
        wanted = self._adversary.attacks_to_run if plan.named is None else plan.named
        self.names, self.dropped = possible_attacks(caller, [*wanted, *plan.behind], classes)
        self.model: Callable[[Tensor], Tensor] = self._adversary.get_logits
        checked = check_parameters(caller, parameters, self.names, setting.norm, classes)
        self.parameters = {attack: changed for attack in checked if (changed := self._changed(attack, checked[attack]))}
        targeted = {"apgd-t", "fab-t"} & {name.removeprefix(TRANSFER) for name in self.names}
        self.n_target_classes: int | None = self._adversary.fab.n_target_classes if targeted else None

    def _autoattack(self, model: nn.Module, plan: Plan, said: _Said) -> Any:
        norm, eps, seed, device, classes = self._setting
        names = (name.removeprefix(TRANSFER) for name in (plan.named or ()))
        named = {"attacks_to_run": [name for name in names if name in ATTACKS]} if plan.version == "custom" else {}
        made = _robustbench.eval.AutoAttack(
            model,
            norm=norm,
            eps=float(eps),
            seed=seed,
            verbose=False,
            version=plan.version,
            device=device,
            **named,
        )
        for targeted in (made.apgd_targeted, made.fab):
            targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
        for part in (made, made.apgd, made.apgd_targeted):
            part.logger = said
        return made

    def _changed(self, attack: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the values that are not AutoAttack's own."""
        found = _part(self._adversary, attack.removeprefix(TRANSFER))
        theirs = {name: getattr(found, _attribute(name)) for name in values}
        prefix = TRANSFER if attack.startswith(TRANSFER) else ""
        if found is self._adversary.fab and f"{prefix}fab-t" in self.names[: self.names.index(attack) + 1]:
            theirs["n_restarts"] = 1  # see `prepared`
        return {name: value for name, value in values.items() if theirs[name] != value}

    def prepared(self, attack: str) -> Callable[[Tensor, Tensor], Tensor]:
        """One attack, which takes the images and labels of a batch and gives images; the order of calls matters.

        AutoAttack's own are set up as it does that before each batch. Its own loop is not used, since it looks at the
        natural images anew in each call: a model that draws random numbers would get another chance to be wrong with
        every batch.
        """
        if attack in self._own:
            norm, eps, seed = self._setting[:3]
            return own_attack(self._caller, attack, self._own[attack], self._network, norm, eps, seed)
        adversary: Any = self._surrogate if attack.startswith(TRANSFER) else self._adversary
        name = attack.removeprefix(TRANSFER)
        found = _part(adversary, name)
        if name == "fab-t":
            found.n_restarts = 1  # in AutoAttack as well, and it stays for a fab behind it
        if attack in self.parameters:
            found = _with_parameters(found, self.parameters[attack])
        if name in ("apgd-ce", "apgd-dlr"):
            found.loss = name.removeprefix("apgd-")
        elif name in ("fab", "fab-t"):
            found.targeted = name == "fab-t"

        def perturb(images: Tensor, labels: Tensor) -> Tensor:
            found.seed = adversary.get_seed()
            result: Tensor = found.perturb(images, labels)
            return result

        return perturb

    def run_checks(self, images: Tensor, labels: Tensor) -> None:
        """AutoAttack's own checks of the model before its attacks, on the first batch as in AutoAttack."""
        adversary = self._adversary
        checks = importlib.import_module("autoattack.checks")
        adversary.attacks_to_run = []
        tracer = sys.gettrace()  # its check for dynamic defences takes the place of a debugger's
        before = dict(checks.funcs)
        checks.funcs.update(dict.fromkeys(before, 0))  # the counts of that check, which other models have raised
        try:
            with torch.enable_grad():
                adversary.run_standard_evaluation(images, labels, bs=len(images))
            targets = adversary.apgd_targeted.n_target_classes, adversary.fab.n_target_classes
            checks.check_n_classes(self._setting.classes, self.names, *targets, logger=self._said)
        finally:
            sys.settrace(tracer)
            checks.funcs.update(before)

    def take_warnings(self) -> list[str]:
        """What AutoAttack has warned of since this was called last."""
        return self._said.take()


def square_warnings(accuracies: Mapping[str, float]) -> list[str]:
    """What AutoAttack's check says of Square, after all attacks.

    Args:
        accuracies: shares of images that stood; of 'clean' and behind each attack of AutoAttack that ran.
    """
    said = _Said()
    importlib.import_module("autoattack.checks").check_square_sr(dict(accuracies), logger=said)
    return said.take()


class _Said:
    """Takes the place of AutoAttack's logger, pyautoattack's or the original's, and keeps what it warns of."""

    def __init__(self) -> None:
        self._messages: list[str] = []

    def warning(self, message: str) -> None:
        self._messages.append(message)

    def log(self, message: str) -> None:
        """The original's: its warnings begin with the word, and all else is progress."""
        if message.startswith("Warning: "):
            self._messages.append(message.removeprefix("Warning: "))

    def debug(self, message: str) -> None:
        """Progress."""

    info = debug

    def take(self) -> list[str]:
        taken, self._messages = self._messages, []
        return taken


def possible_attacks(caller: str, wanted: Sequence[str], classes: int) -> tuple[list[str], list[dict[str, str]]]:
    """The attacks that can run with so many classes, and why the others cannot."""
    run, dropped = [], []
    for attack in wanted:
        least = _LEAST_CLASSES.get(attack.removeprefix(TRANSFER), 2)
        if classes >= least:
            run.append(attack)
        else:
            dropped.append({"attack": attack, "reason": f"its loss needs {least} classes, and the model has {classes}"})
    if not run:
        raise ValueError(
            f"{caller}: `attacks` must have one that works with {classes} classes, got {', '.join(wanted)}. "
            "Add apgd-ce."
        )
    return run, dropped


# --- AutoAttack's parameters -----------------------------------------------------------------------------------------


def _part(adversary: Any, name: str) -> Any:
    """The object of an attack, which some share."""
    if name in ("apgd-ce", "apgd-dlr"):
        return adversary.apgd
    if name == "apgd-t":
        return adversary.apgd_targeted
    return adversary.square if name == "square" else adversary.fab


def _attribute(name: str) -> str:
    return "thr_decr" if name == "rho" else name


def _with_parameters(found: Any, values: Mapping[str, Any]) -> Any:
    """A copy of an attack with other parameters."""
    changed = copy.copy(found)
    for name, value in values.items():
        if name == "n_iter" and hasattr(found, "n_iter_orig"):
            made = type(found)(found.model, n_iter=value, norm=found.norm, eps=found.eps_orig)
            for attribute in _ITERATIONS:
                setattr(changed, attribute, getattr(made, attribute))
        else:
            setattr(changed, _attribute(name), value)
    return changed


# --- random numbers --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """The caller's random numbers are as before when an evaluation is over."""
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    with torch.random.fork_rng(devices=[index] if device.type == "cuda" else []):
        yield

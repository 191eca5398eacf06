"""``--check`` for torchdistill: the new criterion is built by torchdistill and run on random logits."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import yaml
from torch import Tensor
from torchdistill.common import yaml_util
from torchdistill.common.main_util import import_dependencies
from torchdistill.losses.registry import get_high_level_loss, get_mid_level_loss

from ikl_plugins.torchdistill import MidLevelLoss

from .messages import CALLER, first_line
from .terms import num_classes_of, terms_of
from .torchdistill import Adoption
from .yaml_text import Tree

__all__ = ["check_yaml"]

_TOLERANCE = 1e-9  # of gradients, in float64
_BATCH = 8


def check_yaml(adoption: Adoption, original: str, name: str) -> list[str]:
    """Builds the criterion of an adopted config through torchdistill, and runs its losses forward and backward.

    Data sets and models stay unbuilt; the modules of ``dependencies`` are imported, and what the criterion itself
    names by `!import_call` is called.

    Args:
        adoption: of :func:`.adopt_yaml`.
        original: the text that it was made from.
        name: what messages call the file.

    Returns:
        What was checked, a line each.

    Raises:
        ImportError: torchdistill or a module of ``dependencies`` is missing.
        ValueError: the criterion cannot be built or run, or its gradients are not those that the notes claim.
    """
    tree, old = Tree(adoption.text, name), Tree(original, name)
    dependencies = tree.at(tree.root, "dependencies")
    import_dependencies(None if dependencies is None else tree.value(dependencies))
    before = {term.place: term for term in terms_of(old)}
    built: dict[int, Any] = {}  # config and module of the criteria, each built once
    done = []
    for term in terms_of(tree):
        node = term.scope.criterion.value
        if id(node) not in built:
            built[id(node)] = _build(f"{CALLER}: {name}: `{term.scope.label}: criterion:`", tree, node)
        config, criterion = built[id(node)]
        loss, _ = criterion.term_dict[term.name]
        shown = f"{term.scope.label}: the term '{term.name}'"
        if not isinstance(loss, MidLevelLoss):
            done.append(f"{shown} was built, not run")
            continue
        kwargs = config["kwargs"]["sub_terms"][term.name]["criterion"]["kwargs"]
        trial = _Trial(kwargs, loss.core.num_classes or num_classes_of(tree) or 10)
        value, _ = trial.run(loss)
        found = f"{shown} is {value:.4g} on random logits, its gradients are finite"
        claim = adoption.claims.get(term.place, "none")
        if claim != "none":
            kind = before[term.place].kind
            difference = trial.difference(loss, claim, _construct(old, before[term.place].mapping))
            if not difference <= _TOLERANCE:
                rule = f"{claim} of the term '{term.name}' must equal those of {kind}, differ by {difference:.2g}"
                raise ValueError(f"{CALLER}: {name}: {rule}. Report this.")
            found += f"; {claim} equal those of {kind} to {difference:.0e}"
        done.append(found)
    return done


def _build(where: str, tree: Tree, node: Any) -> tuple[Any, Any]:
    """Config and module of a criterion."""
    try:
        config = _construct(tree, node)
        return config, get_high_level_loss(config)
    except Exception as error:  # whatever the user's own losses raise
        raise ValueError(f"{where} must build, but {first_line(error)}") from error


def _construct(tree: Tree, node: Any) -> Any:
    """What torchdistill makes of a node of the tree."""

    class Loader(yaml.FullLoader):
        pass

    for name, function in vars(yaml_util).items():
        if name.startswith("yaml_"):
            Loader.add_constructor(f"!{name.removeprefix('yaml_')}", function)
    return Loader("").construct_document(node)


class _Trial:
    """Random logits and labels where a loss looks for them."""

    def __init__(self, kwargs: Mapping[str, Any], classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.student, self.teacher = (
            torch.randn(_BATCH, classes, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)
        )
        self.labels = torch.randint(classes, (_BATCH,), generator=generator)
        self._io = self._outputs(kwargs)

    def _outputs(self, kwargs: Mapping[str, Any]) -> list[dict[str, dict[str, Tensor]]]:
        return [
            {kwargs[f"{role}_module_path"]: {kwargs[f"{role}_module_io"]: logits}}
            for role, logits in (("student", self.student), ("teacher", self.teacher))
        ]

    def run(self, loss: MidLevelLoss) -> tuple[float, tuple[Tensor, ...]]:
        """Value and gradients of one of our losses, behind any ramp."""
        loss.begin_epoch(max(1, math.ceil(loss.warmup_epochs)), None)
        value = loss(*self._io, self.labels)
        if value.dim() != 0:
            got = f"got shape {tuple(value.shape)}"
            raise ValueError(f"{CALLER}: the loss must be one number, {got}. Set reduction: 'batchmean'.")
        gradients = self._gradients(value)
        if not all(bool(torch.isfinite(part).all()) for part in (value, *gradients)):
            got = f"got {value.item()}"
            raise ValueError(f"{CALLER}: the loss must be finite on random logits, {got}. Correct its weights.")
        return value.item(), gradients

    def _gradients(self, value: Tensor) -> tuple[Tensor, ...]:
        """Of the student's logits and the teacher's."""
        return torch.autograd.grad(value, (self.student, self.teacher), materialize_grads=True)

    def _before(self, config: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Gradients of torchdistill's loss."""
        kwargs = config.get("kwargs") or {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "reduction: 'mean' divides", UserWarning)  # it is what the config says
            loss = get_mid_level_loss({"key": config["key"], "kwargs": kwargs})
            if config["key"] != "KLDivLoss":
                return self._gradients(loss(*self._outputs(kwargs), self.labels))
            soften = torch.log_softmax if kwargs.get("log_target") else torch.softmax
            return self._gradients(loss(torch.log_softmax(self.student, 1), soften(self.teacher, 1)))

    def difference(self, loss: MidLevelLoss, claim: str, config: Mapping[str, Any]) -> float:
        """The largest difference of the gradients that should be equal, relative to the largest gradient."""
        theirs = self._before(config)
        ours = copy.deepcopy(loss)
        if claim == "gradients with beta 0":
            ours.core.beta = 0.0
            theirs = theirs[:1]  # the teacher's side is beta's term
        mine = self.run(ours)[1]
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(mine, theirs, strict=False))

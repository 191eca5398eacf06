"""The MMPretrain half of tools/adopt.py: a config that inherits from the user's and adds what is needed.

The user's file stays as it is. Lists replace each other where MMEngine's configs inherit, so the new file repeats the
user's hooks and imports by reference, as ``_base_.custom_hooks``.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

import ikl_plugins
from ikl_plugins import _validation

__all__ = ["NewConfig", "adopt_config", "check_config", "setting_names"]

CALLER = "adopt"
ADAPTER = "ikl_plugins.mmpretrain"
_CLASSIFIERS = {False: "DistillationClassifier", True: "AdversarialClassifier"}
_MODEL_SETTINGS = {
    False: ("distill_weight", "warmup_epochs", "ce_weight", "teacher_val_batches"),
    True: ("natural_weight", "label_smoothing", "pixel_range", "channels_last", "val_seed"),
}
# Heads whose output is no single set of logits, or whose labels are no single class.
_HEADS_REFUSED = {
    "ConformerHead": "has two sets of logits",
    "MultiTaskHead": "has logits of several tasks",
    "MultiLabelClsHead": "has several labels for an image",
    "MultiLabelLinearClsHead": "has several labels for an image",
    "CSRAClsHead": "has several labels for an image",
}
_HEADS_WITH_A_SWITCH = ("LeViTClsHead", "EfficientFormerClsHead")
_MANY = 100  # classes, from which on the CIFAR-100 settings of adversarial training are the starting point
_LARGE = 1000  # classes, from which on the ImageNet settings are the starting point
_DISTILLATION: dict[bool, dict[str, dict[str, Any]]] = {
    False: {
        "DKL": {"alpha": 16.0, "beta": 16.0, "temperature": 4.0},
        "IKL": {"alpha": 1.0, "beta": 4.0, "temperature": 4.0, "weight_temperature": 100.0},
        "GKL": {
            "alpha": 1.0, "beta": 4.0, "gamma": 0.2, "temperature": 4.0, "weight_temperature": 4.0, "global_info": True,
        },
        "KL": {"temperature": 4.0, "scale_by_temperature_squared": True},
    },
    True: {
        "DKL": {"alpha": 1.0, "beta": 1.0},
        "IKL": {"alpha": 1.0, "beta": 0.5, "global_info": True},
        "GKL": {"alpha": 1.0, "beta": 0.5, "gamma": 0.6, "global_info": True},
        "KL": {},
    },
}  # fmt: skip
_ORIGIN = {
    "DKL": "the gradients of KL with temperature {temperature}, times its square",
    "KL": "the classic distillation loss",
    False: "published for CIFAR-100, resnet56 to resnet20",
    True: "published for ImageNet, ResNet-34 to ResNet-18",
}
_ROBUST: dict[str, dict[str, Any]] = {
    "DKL": {"alpha": 6.0, "beta": 6.0},
    "IKL": {"alpha": 4.0, "beta": 20.0, "weight_temperature": 4.0, "global_info": True},
    "GKL": {"alpha": 4.0, "beta": 20.0, "gamma": 1.0, "weight_temperature": 4.0, "global_info": True},
    "KL": {"loss_weight": 6.0},
}
_ROBUST_ORIGIN = {
    "DKL": "the gradients of TRADES with 6",
    "KL": "TRADES",
    "IKL": "published for CIFAR-{classes}",
    "GKL": "published for CIFAR-{classes}, where gamma 1 is IKL",
}
_WIDTH = 110  # of a line of the new file


@dataclasses.dataclass(frozen=True)
class NewConfig:
    """What :func:`adopt_config` makes.

    Attributes:
        text: the new file; empty where the config is adopted already.
        notes: what was decided and why, a line each.
        output: where the file belongs; relative paths inside it are seen from there.
    """

    text: str
    notes: list[str]
    output: Path


def setting_names(loss: str, *, adversarial: bool) -> list[str]:
    """The keywords that ``--set`` may give in an MMPretrain config.

    Args:
        loss: 'DKL', 'IKL', 'GKL' or 'KL'.
        adversarial: for adversarial training, else for distillation.

    Returns:
        Those of the loss, then those of the classifier.
    """
    if loss == "KL":
        own = ["temperature", "scale_by_temperature_squared"]
    else:
        own = [
            name
            for name in inspect.signature(getattr(ikl_plugins, f"{loss}Loss").__init__).parameters
            if name != "self"
        ]
        own.remove("reduction")
    return [*own, "loss_weight", *_MODEL_SETTINGS[adversarial]]


def adopt_config(
    config: Path | str,
    output: Path | str,
    loss: str,
    *,
    teacher: Path | str | None = None,
    teacher_ckpt: Path | str | None = None,
    adversarial: bool = False,
    eps: str | float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> NewConfig:
    """A config of distillation or of adversarial training that inherits from an MMPretrain config.

    Args:
        config: a config of an ``ImageClassifier``, in the old style (``_base_``) or the lazy one (``read_base``).
        output: where the new file will be.
        loss: 'DKL', 'IKL', 'GKL' or 'KL'.
        teacher: config of the teacher, for distillation.
        teacher_ckpt: its checkpoint, a file or an http(s) address.
        adversarial: adversarial training instead.
        eps: radius of the attack in pixel units, 8/255 by default.
        settings: keywords that replace the starting values, see :func:`setting_names`.

    Returns:
        The new file, unwritten.

    Raises:
        ValueError: a config that cannot be read or has a model, head or setting that the classifiers cannot take.
        TypeError: a setting of the wrong type.
    """
    config, output = Path(config), Path(output)
    maker = _Maker(config, output, loss, adversarial, dict(settings or {}))
    if adversarial and (teacher is not None or teacher_ckpt is not None):
        raise ValueError(f"{CALLER}: --adversarial must stand without a teacher, got one. Leave --teacher out.")
    if not adversarial and eps is not None:
        raise ValueError(f"{CALLER}: --eps goes with --adversarial, got it without. Leave it out.")
    if not adversarial and teacher is None:
        raise ValueError(
            f"{CALLER}: an MMPretrain config must be given --teacher and --teacher-ckpt, or --adversarial, got none of "
            f"them. Name the teacher's config."
        )
    return maker.make(teacher, teacher_ckpt, "8/255" if eps is None else eps)


class _Code(str):
    """Text that stands in the new file as it is."""


class _Maker:
    """Looks at the user's config, refuses what cannot be, and writes the new one."""

    def __init__(self, config: Path, output: Path, loss: str, adversarial: bool, settings: dict[str, Any]) -> None:
        known = setting_names(loss, adversarial=adversarial)
        for name in settings:
            if name not in known:
                raise ValueError(_validation.unknown_name_message(CALLER, "keyword of --set", name, known))
        self.config, self.output = config, output
        self.loss, self.adversarial, self.settings = loss, adversarial, settings
        self.notes: list[str] = []
        self.lazy = _is_lazy(config)
        self.content = _read(config)

    def make(self, teacher: Path | str | None, teacher_ckpt: Path | str | None, eps: str | float) -> NewConfig:
        model = self.content.get("model")
        if not isinstance(model, Mapping):
            raise self._refusal(("model",), "`model` must be a dict", "none", "Give the config of a classifier.")
        wanted = _CLASSIFIERS[self.adversarial]
        kind = _name(model.get("type"))
        if kind == wanted:
            return NewConfig("", [], self.output)
        self._check_model(model, kind)
        parts = self._parts(model, teacher, teacher_ckpt, eps)
        return NewConfig(self._text(parts), self.notes, self.output)

    # --- what is refused ---

    def _refusal(self, keys: tuple[str, ...], rule: str, got: str, way_out: str) -> ValueError:
        return ValueError(f"{CALLER}: {_where(self.config, keys)}: {rule}, got {got}. {way_out}")

    def _check_model(self, model: Mapping[str, Any], kind: str) -> None:
        wanted = _CLASSIFIERS[self.adversarial]
        if kind in _CLASSIFIERS.values():
            raise self._refusal(
                ("model", "type"),
                "`model` must be a plain ImageClassifier",
                kind,
                f"It is adopted already, in another way; start from the config that it inherits from to get a "
                f"{wanted}.",
            )
        if kind != "ImageClassifier":
            raise self._refusal(
                ("model", "type"), f"`type` of `model` must be ImageClassifier, of which {wanted} "
                f"is one", kind or "none",
                "Other models can be a teacher, where they give logits, but not the one that is trained here.",
            )  # fmt: skip
        head = model.get("head")
        if not isinstance(head, Mapping):
            raise self._refusal(
                ("model", "head"), "`head` of `model` must be a dict, as logits come from it", "none",
                "Add head=dict(type='LinearClsHead', num_classes=..., in_channels=...).",
            )  # fmt: skip
        head_kind = _name(head.get("type"))
        if head_kind in _HEADS_REFUSED:
            raise self._refusal(
                ("model", "head", "type"), "`head` of `model` must give one set of logits for one label of each image",
                f"{head_kind}, which {_HEADS_REFUSED[head_kind]}", "Use a LinearClsHead.",
            )  # fmt: skip
        if head_kind in _HEADS_WITH_A_SWITCH and head.get("distillation", True):
            raise self._refusal(
                ("model", "head", "distillation" if "distillation" in head else "type"),
                f"`distillation` of {head_kind} must be False, as MMPretrain cannot train it otherwise", "True",
                "Write head=dict(distillation=False); our teacher needs no second head.",
            )  # fmt: skip
        if self.adversarial:
            found = _find(model.get("backbone"), "with_cp")
            if found is not None:
                raise self._refusal(
                    ("model", "backbone", *found), "`with_cp` of the backbone must be False in adversarial "
                    "training", "True",
                    "Reentrant checkpointing gives no gradient of the images: write backbone=dict(with_cp=False).",
                )  # fmt: skip

    def _mixing(self, model: Mapping[str, Any]) -> tuple[str, ...] | None:
        """The key that gives training images no single label, None without one."""
        for keys in (
            ("model", "train_cfg", "augments"), ("model", "data_preprocessor", "batch_augments"),
            ("data_preprocessor", "batch_augments"), ("model", "data_preprocessor", "to_onehot"),
            ("data_preprocessor", "to_onehot"),
        ):  # fmt: skip
            if keys[0] == "data_preprocessor" and model.get("data_preprocessor") is not None:
                continue  # that of the model goes first
            value: Any = self.content.get(keys[0])
            for key in keys[1:]:
                value = value.get(key) if isinstance(value, Mapping) else None
            if value:
                return keys
        return None

    # --- what is written ---

    def _parts(
        self, model: Mapping[str, Any], teacher: Path | str | None, teacher_ckpt: Path | str | None, eps: str | float
    ) -> dict[str, Any]:
        classes = model["head"].get("num_classes")
        loss = self._loss(model, classes)
        if classes is None:
            classes = loss.get("num_classes")
        prior = bool(loss.get("global_info"))
        new_model: dict[str, Any] = {"type": _CLASSIFIERS[self.adversarial]}
        parts: dict[str, Any] = {}
        if self.adversarial:
            new_model["attack"] = {
                "eps": eps, "budget": "high_as_executed", "eps_ramp": 1.0, "random_start": "normal",
                "objective": "ikl" if self._like_cifar100(classes) else "soft_cross_entropy",
            }  # fmt: skip
            new_model["robust_loss"] = loss
            self.notes.append(
                f"attack: the published one, radius {eps}; --eps 4/255 is usual on ImageNet. "
                f"Adversarial weight "
                f"perturbation is not added: model=dict(awp=dict(gamma=5e-3, warmup_epochs=10))"
            )
            parts.update(self._robust_validation(new_model, eps))
        else:
            new_model["teacher"] = self._path(Path(str(teacher)), "--teacher")
            if teacher_ckpt is not None:
                new_model["teacher_ckpt"] = self._checkpoint(str(teacher_ckpt))
            self._check_teacher(Path(str(teacher)), classes)
            new_model["distill_loss"] = loss
        new_model.update(
            {name: self.settings[name] for name in _MODEL_SETTINGS[self.adversarial] if name in self.settings}
        )
        wrapper = self.content.get("model_wrapper_cfg")
        if prior and isinstance(wrapper, Mapping) and wrapper.get("broadcast_buffers", True):
            parts["model_wrapper_cfg"] = {"broadcast_buffers": False}
            self.notes.append(
                "model_wrapper_cfg: broadcast_buffers=False, so that each rank keeps its own running sums"
            )
        hooks = self.content.get("custom_hooks") or []
        ours = {"type": "IKLHook"}
        if not any(_name(hook.get("type")) == "IKLHook" for hook in hooks if isinstance(hook, Mapping)):
            parts["custom_hooks"] = [_Code(f"*{self._reference('custom_hooks')}"), ours] if hooks else [ours]
            if hooks:
                self.notes.append(
                    f"custom_hooks: yours ({', '.join(_name(hook.get('type')) for hook in hooks)}) and IKLHook"
                )
        return {"custom_imports": self._imports(), **parts, "model": new_model}

    def _reference(self, name: str) -> str:
        """How the new file names a value of the old one."""
        return name if self.lazy else f"_base_.{name}"

    def _imports(self) -> dict[str, Any] | None:
        held = self.content.get("custom_imports") or {}
        imports = held.get("imports") or []
        names = [imports] if isinstance(imports, str) else list(imports)
        if ADAPTER in names or self.lazy:
            return None  # a lazy config imports by itself
        if not names:
            return {"imports": [ADAPTER]}
        reference = self._reference("custom_imports.imports")
        self.notes.append(f"custom_imports: yours ({', '.join(names)}) and {ADAPTER}")
        return {"imports": [_Code(reference if isinstance(imports, str) else f"*{reference}"), ADAPTER]}

    def _like_cifar100(self, classes: Any) -> bool:
        """Whether the published settings of CIFAR-100 are nearer than those of CIFAR-10."""
        return self.loss in ("IKL", "GKL") and isinstance(classes, int) and classes >= _MANY

    def _loss(self, model: Mapping[str, Any], classes: Any) -> dict[str, Any]:
        large = isinstance(classes, int) and classes >= _LARGE
        start = dict(_ROBUST[self.loss] if self.adversarial else _DISTILLATION[large][self.loss])
        if self.adversarial:
            if self._like_cifar100(classes):
                start["alpha"] = 5.0
            origin = _ROBUST_ORIGIN[self.loss].format(classes=100 if self._like_cifar100(classes) else 10)
        else:
            origin = _ORIGIN.get(self.loss, _ORIGIN[large]).format(temperature=start.get("temperature", 1.0))
        own = {name: value for name, value in self.settings.items() if name not in _MODEL_SETTINGS[self.adversarial]}
        mixing = self._mixing(model)
        if mixing is not None:
            named = ".".join(mixing)
            if own.get("global_info"):
                raise self._refusal(
                    mixing, f"`{named}` must go with global_info=False, as a class prior needs one label for "
                    f"each image",
                    "it beside global_info=True", "Leave global_info out, or drop it from your config.",
                )  # fmt: skip
            if start.pop("global_info", False):
                self.notes.append(
                    f"{named} gives images no single label, so the class prior is left off (global_info=False)"
                )
        if classes is None and own.get("num_classes") is None and own.get("global_info", start.get("global_info")):
            # Some networks end in the backbone, and their head knows no classes.
            backbone = model.get("backbone")
            found = backbone.get("num_classes") if isinstance(backbone, Mapping) else None
            if isinstance(found, int) and found > 0:
                start["num_classes"] = found
            elif own.get("global_info"):
                raise self._refusal(
                    ("model", "head"), "`num_classes` of the head must be given with global_info=True", "none",
                    "Add --set num_classes=100.",
                )  # fmt: skip
            else:
                del start["global_info"]
                self.notes.append("the head has no `num_classes`, so the class prior is left off (global_info=False)")
        loss = {"type": f"{self.loss}Loss", **start, **own}
        self._validate(loss, classes)
        role = "robust_loss" if self.adversarial else "distill_loss"
        self.notes.append(f"{role}: a starting point, {origin}" + (f"; yours: {', '.join(own)}" if own else ""))
        return loss

    def _validate(self, loss: Mapping[str, Any], classes: Any) -> None:
        """Builds the loss, for its own refusals."""
        plain = {name: value for name, value in loss.items() if name != "type"}
        try:
            _validation.check_number(loss["type"], "loss_weight", plain.pop("loss_weight", 1.0))
            if self.loss == "KL":
                _validation.check_number("KLLoss", "temperature", plain.get("temperature", 1.0), positive=True)
                return
            if plain.get("global_info") and plain.get("num_classes") is None:
                plain["num_classes"] = classes
            getattr(ikl_plugins, loss["type"])(**plain)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{CALLER}: for the new loss: {error}") from error

    def _robust_validation(self, new_model: dict[str, Any], eps: str | float) -> dict[str, Any]:
        """Validation under attack, and the choice of checkpoints by it, where the config validates at all."""
        if not self.content.get("val_evaluator") or not self.content.get("val_dataloader"):
            self.notes.append("no validation: the config has no `val_evaluator`, so there is none under attack either")
            return {}
        new_model["val_attack"] = {"eps": eps, "steps": 20, "step_size": _quarter(eps)}
        robust = {"type": "RobustAccuracy", "topk": _Code("(1,)")}
        parts: dict[str, Any] = {}
        for name in ("val_evaluator", "test_evaluator"):
            held = self.content.get(name)
            if not held:
                continue
            if name == "test_evaluator" and held == self.content["val_evaluator"]:
                parts[name] = _Code("val_evaluator")
                continue
            star = "*" if isinstance(held, (list, tuple)) else ""
            parts[name] = [_Code(f"{star}{self._reference(name)}"), robust]
        hooks = self.content.get("default_hooks") or {}
        kind = {} if isinstance(hooks.get("checkpoint"), Mapping) else {"type": "CheckpointHook", "interval": 1}
        parts["default_hooks"] = {"checkpoint": {**kind, "save_best": "robust/top1", "rule": "greater"}}
        self.notes.append(
            "validation: PGD with 20 steps beside the natural accuracy, and the best checkpoint by it; let "
            "`val_dataloader` "
            "be images held out of the training data"
        )
        return parts

    # --- the teacher ---

    def _path(self, path: Path, option: str) -> str:
        if not path.is_file():
            raise ValueError(f"{CALLER}: {option} must be a file, but there is none at {path}. Check the path.")
        return self._seen_from_output(path)

    def _seen_from_output(self, path: Path) -> str:
        """A path that is right wherever the training is started from."""
        if path.is_absolute() or self.lazy:
            return path.expanduser().resolve().as_posix()
        return f"{{{{ fileDirname }}}}/{_relative(path, self.output.parent)}"

    def _checkpoint(self, path: str) -> str:
        if path.startswith(("http://", "https://")):
            return path
        if not Path(path).expanduser().is_file():
            self.notes.append(f"teacher_ckpt: there is no {path} yet; it must be there when the training starts")
        return self._seen_from_output(Path(path).expanduser())

    def _check_teacher(self, path: Path, classes: Any) -> None:
        model = _read(path).get("model")
        if not isinstance(model, Mapping):
            raise ValueError(f"{CALLER}: {path}: `model` must be a dict, got none. Give the config of a classifier.")
        head = model.get("head")
        theirs = head.get("num_classes") if isinstance(head, Mapping) else None
        if None not in (classes, theirs) and classes != theirs:
            raise ValueError(
                f"{CALLER}: {_where(path, ('model', 'head', 'num_classes'))}: `num_classes` of the teacher's "
                f"head must be "
                f"that of the student's, {classes}, got {theirs}. Take a teacher of the same classes."
            )

    # --- the text ---

    def _text(self, parts: Mapping[str, Any]) -> str:
        what = "Adversarial training" if self.adversarial else "Distillation"
        lines = [f"# {what} with {self.loss}, on top of {self.config.name}. Made by tools/adopt.py of ikl_plugins."]
        if self.lazy:
            lines += self._lazy_head(parts)
        else:
            lines.append(f'_base_ = "{self._base()}"')
        for name, value in parts.items():
            if value is None:
                continue
            lines.append("")
            if self.lazy and isinstance(value, Mapping):
                held = self.content.get(name)
                lines += self._lazy_update(name, value, held)
            else:
                lines.append(_assignment(name, self._types(value)))
        return "\n".join(lines) + "\n"

    def _base(self) -> str:
        relative = _relative(self.config, self.output.parent)
        return relative if relative.startswith(("../", "/")) or ":" in relative else f"./{relative}"

    def _lazy_head(self, parts: Mapping[str, Any]) -> list[str]:
        names = _relative(self.config, self.output.parent).removesuffix(".py").split("/")
        ups = names.count("..")
        if not all(name.isidentifier() for name in names[ups:]):
            raise ValueError(
                f"{CALLER}: a config in the lazy style must have a path that Python can import, got "
                f"{self.config}. Rename "
                f"it, or write --output where the path between them is letters, digits and underscores."
            )
        types = sorted(_types_in(parts))
        return [
            "from mmengine.config import read_base", "",
            f"from {ADAPTER} import {', '.join(types)}", "",
            "with read_base():",
            f"    from {'.' * (ups + 1)}{'.'.join(names[ups:])} import *",
        ]  # fmt: skip

    def _lazy_update(self, name: str, value: Mapping[str, Any], held: Any) -> list[str]:
        """Lines that change a dict of the base; nested dicts of the base are changed, not replaced."""
        if not isinstance(held, Mapping):
            return [_assignment(name, self._types(value))]
        lines = []
        for key, inner in value.items():
            if isinstance(inner, Mapping) and isinstance(held.get(key), Mapping):
                lines += self._lazy_update(f'{name}["{key}"]', inner, held[key])
            else:
                lines.append(f'{name}["{key}"] = {_shown(self._types(inner), 0, len(name) + len(key) + 7)}')
        return lines

    def _types(self, value: Any) -> Any:
        """In the lazy style our types are classes, in the old one their names."""
        if not self.lazy:
            return value
        if isinstance(value, Mapping):
            return {
                key: _Code(inner) if key == "type" and inner in _OURS else self._types(inner)
                for key, inner in value.items()
            }
        if isinstance(value, list):
            return [self._types(inner) for inner in value]
        return _Code(value) if isinstance(value, str) and value in _OURS else value


_OURS = (
    *_CLASSIFIERS.values(), "DKLLoss", "IKLLoss", "GKLLoss", "KLLoss", "IKLHook", "RobustAccuracy",
)  # fmt: skip


def _types_in(value: Any) -> set[str]:
    if isinstance(value, Mapping):
        return set().union(*(_types_in(inner) for inner in value.values())) if value else set()
    if isinstance(value, list):
        return set().union(*(_types_in(inner) for inner in value)) if value else set()
    return {value} if isinstance(value, str) and value in _OURS else set()


# --- reading configs -------------------------------------------------------------------------------------------------


def _is_lazy(path: Path) -> bool:
    try:
        return bool(Config._is_lazy_import(str(path)))
    except SyntaxError as error:
        raise ValueError(
            f"{CALLER}: {path}, line {error.lineno}: the config must be Python, but {error.msg}. Correct it."
        ) from error
    except Exception as error:  # MMEngine's own refusals, of mixed styles for one
        raise ValueError(f"{CALLER}: {path} must be an MMEngine config, but {_first_line(error)}") from error


def _read(path: Path) -> Any:
    """A config's content; its custom imports are not imported."""
    try:
        return Config.fromfile(str(path), import_custom_modules=False)
    except Exception as error:  # a config is a program
        raise ValueError(f"{CALLER}: {path} must be an MMEngine config, but {_first_line(error)}") from error


def _name(kind: Any) -> str:
    """The bare name of a `type`: 'mmpretrain.ImageClassifier' and the class itself are ImageClassifier."""
    if kind is None:
        return ""
    return kind.rpartition(".")[2] if isinstance(kind, str) else str(getattr(kind, "__name__", kind))


def _find(value: Any, key: str) -> tuple[str, ...] | None:
    """Where inside a config a key is true."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name == key and inner is True:
                return (name,)
            found = _find(inner, key)
            if found is not None:
                return (str(name), *found)
    return None


def _where(path: Path, keys: tuple[str, ...]) -> str:
    """File and line in which a key of a config is set: in the file itself, or in one that it inherits from."""
    for length in range(len(keys), 0, -1):
        found = _line_of(path, keys[:length], set())
        if found is not None:
            return found
    return str(path)


def _line_of(path: Path, keys: tuple[str, ...], seen: set[Path]) -> str | None:
    if path in seen or not path.is_file():
        return None
    seen.add(path)
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return None
    bases: list[str] = []
    line = None
    for statement in tree.body:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
            continue
        name = statement.targets[0].id
        if name == "_base_":
            with contextlib.suppress(ValueError):
                held = ast.literal_eval(statement.value)
                bases = [held] if isinstance(held, str) else list(held)
        elif name == keys[0]:
            line = _line_in(statement.value, keys[1:], statement.lineno) or line
    if line is not None:
        return f"{path}, line {line}"
    for base in bases:
        found = _line_of(Path(os.path.normpath(path.parent / base)), keys, seen)
        if found is not None:
            return found
    return None


def _line_in(value: ast.expr, keys: tuple[str, ...], line: int) -> int | None:
    if not keys:
        return line
    pairs: list[tuple[Any, ast.expr, int]] = []
    if isinstance(value, ast.Call):
        pairs = [(word.arg, word.value, word.lineno) for word in value.keywords]
    elif isinstance(value, ast.Dict):
        pairs = [
            (key.value, inner, key.lineno)
            for key, inner in zip(value.keys, value.values, strict=True)
            if isinstance(key, ast.Constant)
        ]
    for name, inner, where in pairs:
        if name == keys[0]:
            return _line_in(inner, keys[1:], where)
    return None


def _relative(path: Path, folder: Path) -> str:
    """A path as seen from a folder, with slashes; absolute where there is no way, as between drives."""
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:
        return path.resolve().as_posix()


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0] or "no reason is given"
    return f"{type(error).__name__}: {text}"


# --- writing configs -------------------------------------------------------------------------------------------------


def _assignment(name: str, value: Any) -> str:
    return f"{name} = {_shown(value, 0, len(name) + 3)}"


def _shown(value: Any, depth: int, used: int) -> str:
    """A value as Python: on one line where it fits, else one entry a line."""
    if isinstance(value, _Code):
        return str(value)
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, Mapping):
        entries = [(f"{key}=", inner) for key, inner in value.items()]
        opening, closing = "dict(", ")"
    elif isinstance(value, (list, tuple)):
        entries = [("", inner) for inner in value]
        opening, closing = "[", "]"
    else:
        return repr(value)
    flat = opening + ", ".join(f"{key}{_shown(inner, 0, 0)}" for key, inner in entries) + closing
    if "\n" not in flat and used + len(flat) <= _WIDTH:
        return flat
    margin = "    " * (depth + 1)
    body = "".join(
        f"{margin}{key}{_shown(inner, depth + 1, len(margin) + len(key) + 1)},\n" for key, inner in entries
    )  # fmt: skip
    return f"{opening}\n{body}{'    ' * depth}{closing}"


def _quarter(eps: str | float) -> str | float:
    """The usual step of an attack of 20 steps."""
    if isinstance(eps, str) and "/" in eps:
        upper, _, lower = eps.partition("/")
        with contextlib.suppress(ValueError):
            return f"{float(upper) / 4:g}/{lower.strip()}"
    return float(eps) / 4


# --- the check -------------------------------------------------------------------------------------------------------


def check_config(config: NewConfig) -> list[str]:
    """Builds the model of a new config, and takes the losses of one batch of random images.

    Args:
        config: of :func:`adopt_config`.

    Returns:
        What was checked, a line each.

    Raises:
        ImportError: MMPretrain, or a module of ``custom_imports``, is missing.
        ValueError: the config cannot be read, built or run.
    """
    from ikl_plugins.commands.adopt.mmpretrain_check import check_file

    folder = config.output.parent
    folder.mkdir(parents=True, exist_ok=True)
    # Beside the place where it belongs, as its paths are seen from there.
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=folder, prefix="adopt_", suffix=".py") as file:
        file.write(config.text)
        file.flush()
        return check_file(Path(file.name))

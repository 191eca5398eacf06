"""An MMPretrain config that inherits from the user's and adds what is needed.

The user's file stays as it is. Lists replace each other where MMEngine's configs inherit, so the new file repeats the
user's hooks and imports by reference, as ``_base_.custom_hooks``.
"""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ikl_plugins import _validation
from ikl_plugins.losses import LOSSES
from ikl_plugins.mmengine.heads import head_fault

from .messages import CALLER
from .python_config import Code, assignment, find, is_lazy, read, relative, shown, type_name, where
from .starting_points import StartingPoint, for_adversarial_training, for_distillation

__all__ = ["NewConfig", "adopt_config", "check_config", "setting_names"]

ADAPTER = "ikl_plugins.mmpretrain"
_CLASSIFIERS = ("DistillationClassifier", "AdversarialClassifier")
_OURS = (*_CLASSIFIERS, "KLLoss", "IKLHook", "RobustAccuracy")  # and those of LOSSES
_HEADS_WITH_A_SWITCH = ("LeViTClsHead", "EfficientFormerClsHead")
# Where a config may give training images no single label; the model's own preprocessor goes before that of the top.
_MIXERS = (
    ("model", "train_cfg", "augments"),
    ("model", "data_preprocessor", "batch_augments"),
    ("data_preprocessor", "batch_augments"),
    ("model", "data_preprocessor", "to_onehot"),
    ("data_preprocessor", "to_onehot"),
)


class NewConfig(NamedTuple):
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
    """The keywords that ``--set`` may give to a loss ('IKL', 'KL', ...) and then to its classifier."""
    maker = _AdversarialTraining if adversarial else _Distillation
    own = ["temperature", "scale_by_temperature_squared"]
    if loss != "KL":
        own = [name for name in inspect.signature(LOSSES[f"{loss}Loss"]).parameters if name != "reduction"]
    return [*own, "loss_weight", *maker.model_settings]


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
    settings = dict(settings or {})
    known = setting_names(loss, adversarial=adversarial)
    for name in settings:
        if name not in known:
            raise ValueError(_validation.unknown_name_message(CALLER, "keyword of --set", name, known))
    if adversarial:
        if teacher is not None or teacher_ckpt is not None:
            raise ValueError(f"{CALLER}: --adversarial must stand without a teacher, got one. Leave --teacher out.")
        return _AdversarialTraining(config, output, loss, settings, eps="8/255" if eps is None else eps).make()
    if eps is not None:
        raise ValueError(f"{CALLER}: --eps goes with --adversarial, got it without. Leave it out.")
    if teacher is None:
        raise ValueError(f"{CALLER}: an MMPretrain config must come with --teacher or --adversarial. Name one of them.")
    return _Distillation(config, output, loss, settings, teacher=Path(teacher), teacher_ckpt=teacher_ckpt).make()


class _Maker:
    """Looks at the user's config, refuses what cannot be, and writes the new one."""

    what: str  # in the first line of the new file
    classifier: str
    role: str  # the key of the loss in the model
    model_settings: tuple[str, ...]  # keywords of --set that the classifier takes

    def __init__(self, config: Path | str, output: Path | str, loss: str, settings: dict[str, Any]) -> None:
        self.config, self.output = Path(config), Path(output)
        self.loss = loss
        self.settings = {name: value for name, value in settings.items() if name not in self.model_settings}
        self.settings_of_model = {name: settings[name] for name in self.model_settings if name in settings}
        self.notes: list[str] = []
        self.lazy = is_lazy(self.config)
        self.content = read(self.config)

    def make(self) -> NewConfig:
        model = self.content.get("model")
        if not isinstance(model, Mapping):
            raise self._refusal(("model",), "`model` must be a dict, got none. Give the config of a classifier.")
        if type_name(model.get("type")) == self.classifier:
            return NewConfig("", [], self.output)
        self.check_model(model)
        return NewConfig(self._text(self._parts(model)), self.notes, self.output)

    def start(self, classes: int | None) -> StartingPoint:
        """What the loss begins with."""
        raise NotImplementedError

    def model_parts(self, loss: dict[str, Any], classes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the new file says about the model beside its loss, before and behind it, and what it sets outside."""
        raise NotImplementedError

    # --- what is refused ---

    def _refusal(self, keys: tuple[str, ...], message: str) -> ValueError:
        return ValueError(f"{CALLER}: {where(self.config, keys)}: {message}")

    def check_model(self, model: Mapping[str, Any]) -> None:
        """Refuses a model that the classifier cannot be."""
        kind = type_name(model.get("type"))
        if kind in _CLASSIFIERS:
            rule = f"`model` must be a plain ImageClassifier, got {kind}, which is adopted already."
            raise self._refusal(("model", "type"), f"{rule} Start from the config that it inherits from.")
        if kind != "ImageClassifier":
            rule = f"`type` of `model` must be ImageClassifier, as {self.classifier} is one, got {kind or 'none'}."
            raise self._refusal(("model", "type"), f"{rule} Other models can only be a teacher.")
        head = model.get("head")
        if not isinstance(head, Mapping):
            way_out = "Add head=dict(type='LinearClsHead', num_classes=..., in_channels=...)."
            raise self._refusal(("model", "head"), f"`head` of `model` must be a dict, got none. {way_out}")
        fault = head_fault(head)
        if fault is not None:
            rule = (
                f"`head` of `model` must give one set of softmax logits for one label of each image, got {fault.got}."
            )
            raise self._refusal(("model", "head", *fault.keys), f"{rule} Use a LinearClsHead with CrossEntropyLoss.")
        kind = type_name(head.get("type"))
        if kind in _HEADS_WITH_A_SWITCH and head.get("distillation", True):
            key = "distillation" if "distillation" in head else "type"
            rule = f"`distillation` of {kind} must be False, as MMPretrain cannot train it otherwise, got True."
            raise self._refusal(("model", "head", key), f"{rule} Write head=dict(distillation=False).")

    def _mixer(self, model: Mapping[str, Any]) -> tuple[str, ...] | None:
        """The key that gives training images no single label, None without one."""
        for keys in _MIXERS:
            if keys[0] == "data_preprocessor" and model.get("data_preprocessor") is not None:
                continue
            value: Any = self.content.get(keys[0])
            for key in keys[1:]:
                value = value.get(key) if isinstance(value, Mapping) else None
            if value:
                return keys
        return None

    # --- what is written ---

    def _parts(self, model: Mapping[str, Any]) -> dict[str, Any]:
        classes = model["head"].get("num_classes")
        loss = self._loss(model, classes)
        new_model, parts = self.model_parts(loss, loss.get("num_classes") if classes is None else classes)
        new_model = {"type": self.classifier, **new_model, **self.settings_of_model}
        wrapper = self.content.get("model_wrapper_cfg")
        if loss.get("global_info") and isinstance(wrapper, Mapping) and wrapper.get("broadcast_buffers", True):
            parts["model_wrapper_cfg"] = {"broadcast_buffers": False}
            self.notes.append(
                "model_wrapper_cfg: broadcast_buffers=False, so that each rank keeps its own running sums"
            )
        hooks = self.content.get("custom_hooks") or []
        ours = {"type": "IKLHook"}
        if not any(type_name(hook.get("type")) == "IKLHook" for hook in hooks if isinstance(hook, Mapping)):
            parts["custom_hooks"] = [Code(f"*{self._reference('custom_hooks')}"), ours] if hooks else [ours]
            if hooks:
                names = ", ".join(type_name(hook.get("type")) for hook in hooks)
                self.notes.append(f"custom_hooks: yours ({names}) and IKLHook")
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
        return {"imports": [Code(reference if isinstance(imports, str) else f"*{reference}"), ADAPTER]}

    def _loss(self, model: Mapping[str, Any], classes: Any) -> dict[str, Any]:
        keywords, origin, _ = self.start(classes if isinstance(classes, int) else None)
        start, own = dict(keywords), self.settings
        mixer = self._mixer(model)
        if mixer is not None:
            named = ".".join(mixer)
            if own.get("global_info"):
                rule = f"`{named}` must go with global_info=False, as a class prior needs one label for each image."
                raise self._refusal(mixer, f"{rule} Leave one of them out.")
            if start.pop("global_info", False):
                note = "gives images no single label, so the class prior is left off (global_info=False)"
                self.notes.append(f"{named} {note}")
        if classes is None and own.get("num_classes") is None and own.get("global_info", start.get("global_info")):
            # Some networks end in the backbone, and their head knows no classes.
            backbone = model.get("backbone")
            found = backbone.get("num_classes") if isinstance(backbone, Mapping) else None
            if isinstance(found, int) and found > 0:
                start["num_classes"] = found
            elif own.get("global_info"):
                rule = "`num_classes` of the head must be given with global_info=True, got none."
                raise self._refusal(("model", "head"), f"{rule} Add --set num_classes=100.")
            else:
                del start["global_info"]
                self.notes.append("the head has no `num_classes`, so the class prior is left off (global_info=False)")
        loss = {"type": f"{self.loss}Loss", **start, **own}
        self._build(loss, classes)
        self.notes.append(f"{self.role}: a starting point, {origin}" + (f"; yours: {', '.join(own)}" if own else ""))
        return loss

    def _build(self, loss: Mapping[str, Any], classes: Any) -> None:
        """Builds the loss, for its own refusals."""
        keywords = {name: value for name, value in loss.items() if name != "type"}
        try:
            _validation.check_number(loss["type"], "loss_weight", keywords.pop("loss_weight", 1.0))
            if self.loss == "KL":
                _validation.check_number("KLLoss", "temperature", keywords.get("temperature", 1.0), positive=True)
                return
            if keywords.get("global_info") and keywords.get("num_classes") is None:
                keywords["num_classes"] = classes
            LOSSES[loss["type"]](**keywords)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{CALLER}: for the new loss: {error}") from error

    # --- the text ---

    def _text(self, parts: Mapping[str, Any]) -> str:
        lines = [f"# {self.what} with {self.loss}, on top of {self.config.name}. Made by ikl adopt of ikl_plugins."]
        if self.lazy:
            lines += self._lazy_head(parts)
        else:
            base = relative(self.config, self.output.parent)
            base = base if base.startswith(("../", "/")) or ":" in base else f"./{base}"
            lines.append(f'_base_ = "{base}"')
        for name, value in parts.items():
            if value is None:
                continue
            lines.append("")
            if self.lazy and isinstance(value, Mapping):
                lines += self._lazy_update(name, value, self.content.get(name))
            else:
                lines.append(assignment(name, self._types(value)))
        return "\n".join(lines) + "\n"

    def _lazy_head(self, parts: Mapping[str, Any]) -> list[str]:
        names = relative(self.config, self.output.parent).removesuffix(".py").split("/")
        ups = names.count("..")
        if not all(name.isidentifier() for name in names[ups:]):
            rule = f"the path of a config in the lazy style must be one that Python can import, got {self.config}."
            raise ValueError(f"{CALLER}: {rule} Rename it, or choose another --output.")
        return [
            "from mmengine.config import read_base",
            "",
            f"from {ADAPTER} import {', '.join(sorted(_types_in(parts)))}",
            "",
            "with read_base():",
            f"    from {'.' * (ups + 1)}{'.'.join(names[ups:])} import *",
        ]

    def _lazy_update(self, name: str, value: Mapping[str, Any], held: Any) -> list[str]:
        """Lines that change a dict of the base; nested dicts of the base are changed, not replaced."""
        if not isinstance(held, Mapping):
            return [assignment(name, self._types(value))]
        lines = []
        for key, inner in value.items():
            if isinstance(inner, Mapping) and isinstance(held.get(key), Mapping):
                lines += self._lazy_update(f'{name}["{key}"]', inner, held[key])
            else:
                lines.append(f'{name}["{key}"] = {shown(self._types(inner), 0, len(name) + len(key) + 7)}')
        return lines

    def _types(self, value: Any) -> Any:
        """In the lazy style our types are classes, in the old one their names."""
        if self.lazy and isinstance(value, Mapping):
            return {key: self._types(inner) for key, inner in value.items()}
        if self.lazy and isinstance(value, list):
            return [self._types(inner) for inner in value]
        return Code(value) if self.lazy and _is_ours(value) else value


class _Distillation(_Maker):
    what = "Distillation"
    classifier = "DistillationClassifier"
    role = "distill_loss"
    model_settings = ("distill_weight", "warmup_epochs", "ce_weight", "teacher_val_batches")

    def __init__(self, *common: Any, teacher: Path, teacher_ckpt: Path | str | None) -> None:
        super().__init__(*common)
        self.teacher, self.teacher_ckpt = teacher, None if teacher_ckpt is None else str(teacher_ckpt)

    def start(self, classes: int | None) -> StartingPoint:
        return for_distillation(self.loss, classes)

    def model_parts(self, loss: dict[str, Any], classes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        if not self.teacher.is_file():
            rule = f"--teacher must be a file, but there is none at {self.teacher}. Check the path."
            raise ValueError(f"{CALLER}: {rule}")
        model = {"teacher": self._seen_from_output(self.teacher)}
        if self.teacher_ckpt is not None:
            model["teacher_ckpt"] = self._checkpoint(self.teacher_ckpt)
        self._check_teacher(classes)
        return {**model, self.role: loss}, {}

    def _seen_from_output(self, path: Path) -> str:
        """A path that is right wherever the training is started from."""
        if path.is_absolute() or self.lazy:
            return path.expanduser().resolve().as_posix()
        return f"{{{{ fileDirname }}}}/{relative(path, self.output.parent)}"

    def _checkpoint(self, path: str) -> str:
        if path.startswith(("http://", "https://")):
            return path
        if not Path(path).expanduser().is_file():
            self.notes.append(f"teacher_ckpt: there is no {path} yet; it must be there when the training starts")
        return self._seen_from_output(Path(path).expanduser())

    def _check_teacher(self, classes: Any) -> None:
        model = read(self.teacher).get("model")
        if not isinstance(model, Mapping):
            rule = "`model` must be a dict, got none. Give the config of a classifier."
            raise ValueError(f"{CALLER}: {self.teacher}: {rule}")
        head = model.get("head")
        theirs = head.get("num_classes") if isinstance(head, Mapping) else None
        if None not in (classes, theirs) and classes != theirs:
            place = where(self.teacher, ("model", "head", "num_classes"))
            rule = f"`num_classes` of the teacher's head must be the student's, {classes}, got {theirs}."
            raise ValueError(f"{CALLER}: {place}: {rule} Take a teacher of the same classes.")


class _AdversarialTraining(_Maker):
    what = "Adversarial training"
    classifier = "AdversarialClassifier"
    role = "robust_loss"
    model_settings = ("natural_weight", "label_smoothing", "pixel_range", "channels_last", "val_seed")

    def __init__(self, *common: Any, eps: str | float) -> None:
        super().__init__(*common)
        self.eps = eps

    def start(self, classes: int | None) -> StartingPoint:
        return for_adversarial_training(self.loss, classes)

    def check_model(self, model: Mapping[str, Any]) -> None:
        super().check_model(model)
        found = find(model.get("backbone"), "with_cp")
        if found is not None:
            rule = "`with_cp` of the backbone must be False, as it gives no gradient of the images, got True."
            raise self._refusal(("model", "backbone", *found), f"{rule} Write backbone=dict(with_cp=False).")

    def model_parts(self, loss: dict[str, Any], classes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        attack = {
            "eps": self.eps,
            "budget": "high_as_executed",
            "eps_ramp": 1.0,
            "random_start": "normal",
            "objective": self.start(classes if isinstance(classes, int) else None).objective,
        }
        self.notes.append(
            f"attack: the published one, radius {self.eps}; --eps 4/255 is usual on ImageNet. Adversarial weight "
            f"perturbation is not added: model=dict(awp=dict(gamma=5e-3, warmup_epochs=10))"
        )
        model = {"attack": attack, self.role: loss}
        if not self.content.get("val_evaluator") or not self.content.get("val_dataloader"):
            self.notes.append("no validation: the config has no `val_evaluator`, so there is none under attack either")
            return model, {}
        return {
            **model,
            "val_attack": {"eps": self.eps, "steps": 20, "step_size": _quarter(self.eps)},
        }, self._validation()

    def _validation(self) -> dict[str, Any]:
        """The accuracy under attack beside the natural one, and the choice of checkpoints by it."""
        robust = {"type": "RobustAccuracy", "topk": Code("(1,)")}
        parts: dict[str, Any] = {}
        for name in ("val_evaluator", "test_evaluator"):
            held = self.content.get(name)
            if name == "test_evaluator" and held and held == self.content["val_evaluator"]:
                parts[name] = Code("val_evaluator")
            elif held:
                star = "*" if isinstance(held, (list, tuple)) else ""
                parts[name] = [Code(f"{star}{self._reference(name)}"), robust]
        hooks = self.content.get("default_hooks") or {}
        kind = {} if isinstance(hooks.get("checkpoint"), Mapping) else {"type": "CheckpointHook", "interval": 1}
        parts["default_hooks"] = {"checkpoint": {**kind, "save_best": "robust/top1", "rule": "greater"}}
        self.notes.append(
            "validation: PGD with 20 steps beside the natural accuracy, and the best checkpoint by it; let "
            "`val_dataloader` be images held out of the training data"
        )
        return parts


def _types_in(value: Any) -> set[str]:
    if isinstance(value, (Mapping, list)):
        return set().union(*(_types_in(inner) for inner in (value.values() if isinstance(value, Mapping) else value)))
    return {value} if _is_ours(value) else set()


def _is_ours(value: Any) -> bool:
    return isinstance(value, str) and (value in _OURS or value in LOSSES)


def _quarter(eps: str | float) -> str | float:
    """The usual step of an attack of 20 steps."""
    if isinstance(eps, str) and "/" in eps:
        upper, _, lower = eps.partition("/")
        with contextlib.suppress(ValueError):
            return f"{float(upper) / 4:g}/{lower.strip()}"
    return float(eps) / 4


def check_config(config: NewConfig) -> list[str]:
    """Builds the model of a new config, and takes the losses of one batch of random images.

    Returns:
        What was checked, a line each.

    Raises:
        ImportError: MMPretrain, or a module of ``custom_imports``, is missing.
        ValueError: the config cannot be read, built or run.
    """
    from .mmpretrain_check import check_file

    folder = config.output.parent
    folder.mkdir(parents=True, exist_ok=True)
    # Beside the place where it belongs, as its paths are seen from there.
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=folder, prefix="adopt_", suffix=".py") as file:
        file.write(config.text)
        file.flush()
        return check_file(Path(file.name))

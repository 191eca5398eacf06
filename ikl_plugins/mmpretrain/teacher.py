"""The teacher of a distillation: built, filled with weights, checked, and kept out of everything that is trained."""

from __future__ import annotations

import copy
import glob
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.model.weight_init import PretrainedInit
from mmpretrain.models import ClsDataPreprocessor
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from .. import _validation as check
from .._files import check_config_text
from .._random_states import kept_random_states
from ..checkpoints import is_address, load_weights
from ..models.weights import Statistics, drawn_parameters, load_strictly, network_sha256
from .classifier import EpochClassifier
from .pixels import pixel_space

__all__ = ["FrozenTeacher", "MissingTeacherError", "build_teacher"]

_EXTRAS = ("distill_loss.", "robust_loss.", "data_preprocessor.")
_INLINE = "teacher=dict(type='ImageClassifier', backbone=..., head=...)"
_INPUT = ("size", "mean", "std", "to_rgb", "to_bgr")


class MissingTeacherError(ValueError):
    """A file of a teacher that is not where it was looked for."""


class FrozenTeacher:
    """Holds a frozen network outside the module tree.

    No checkpoint, optimizer, weight average or data-parallel wrapper sees it. A copy of the model shares the teacher:
    ``copy.deepcopy`` of the holder is the holder. Its owner forwards ``.to()``, ``.half()`` and the like to
    :meth:`apply`.

    Args:
        module: the network; its parameters are frozen and it is put in eval mode.
        conversion: from the student's inputs to the teacher's; None where they are the same.
        pipeline: of its own config's test data, if it has one.
        precision: ``'bf16'`` for a forward under bfloat16 autocast whose logits are float32; None for the caller's
            precision.
        compiled: forwards by ``torch.compile``; where that fails the network goes on as it is, with a warning.
        channels_last: lays weights and inputs out channels last.

    Attributes:
        module: the network.
        pipeline: as above.
        num_classes: number of classes if its head says so, else None.
        settings: what it was built from, beside its weights.

    Raises:
        TypeError: ``compiled`` or ``channels_last`` is no bool.
        ValueError: another ``precision``.
    """

    def __init__(
        self,
        module: nn.Module,
        conversion: Callable[[Tensor], Tensor] | None = None,
        pipeline: Sequence[Mapping[str, Any]] | None = None,
        *,
        precision: str | None = None,
        compiled: bool = False,
        channels_last: bool = False,
    ) -> None:
        if precision not in (None, "bf16"):
            raise ValueError(f"teacher: `teacher_precision` must be 'bf16' or None, got {precision!r}. Use 'bf16'.")
        for name, value in (("compile", compiled), ("channels_last", channels_last)):
            if not isinstance(value, bool):
                raise TypeError(f"teacher: `teacher_{name}` must be True or False, got {value!r}. Use True.")
        module.eval()  # some of MMPretrain's networks return nothing from it
        self.module = module.requires_grad_(False)
        self.precision = precision
        self.compiled = compiled
        self.layout = torch.channels_last if channels_last else torch.preserve_format
        if channels_last:
            module.to(memory_format=torch.channels_last)
        self._compiled: Any = None
        self.settings: Any = None
        self.conversion = conversion
        self.pipeline = pipeline
        self.num_classes: int | None = getattr(getattr(module, "head", None), "num_classes", None)

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """The teacher's logits (N, classes) of the student's inputs (N, C, H, W), under the caller's autocast."""
        return self.differentiable(inputs)

    def differentiable(self, inputs: Tensor) -> Tensor:
        """The same with the gradient of the inputs; the parameters have none."""
        return self.logits_of(inputs if self.conversion is None else self.conversion(inputs))

    def logits_of(self, inputs: Tensor) -> Tensor:
        """The logits of inputs of its own."""
        if self.module.training:  # somebody else holds it as well
            self.module.eval()
        inputs = inputs.to(memory_format=self.layout)
        if self.precision is None:
            logits = self._forward(inputs)
        else:
            with torch.autocast(inputs.device.type, dtype=torch.bfloat16):
                logits = self._forward(inputs)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            what = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ValueError(
                f"teacher: `{type(self.module).__name__}` must give logits of shape (N, C), got {what}. "
                f"Use a classifier."
            )
        return logits if self.precision is None else logits.float()

    def _forward(self, inputs: Tensor) -> Any:
        if self.compiled:
            try:
                if self._compiled is None:
                    self._compiled = torch.compile(self.module)
                return self._compiled(inputs)
            except Exception as error:  # of compilers of any kind; one of the network itself comes again below
                self.compiled = False
                reason = (str(error).strip().splitlines() or [""])[0]
                MMLogger.get_current_instance().warning(
                    "teacher: torch.compile fails, and it goes on uncompiled (%s: %s). Drop `teacher_compile`.",
                    type(error).__name__,
                    reason,
                )
        return self.module(inputs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies what ``nn.Module._apply`` does to the owner's tensors."""
        self.module._apply(function)  # type: ignore[no-untyped-call]

    def run_settings(self) -> dict[str, str | None]:
        """The checksum of the weights, wherever their file lies, and the precision."""
        return {"weights": network_sha256(self.module), "precision": self.precision}

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        return self


def build_teacher(
    teacher: str | Path | Mapping[str, Any] | nn.Module,
    teacher_ckpt: str | Path | None = None,
    *,
    student: EpochClassifier,
    teacher_input: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    teacher_precision: str | None = None,
    teacher_compile: bool = False,
    teacher_channels_last: bool = False,
) -> FrozenTeacher:
    """A teacher from a config, with its weights, checked against the student.

    Args:
        teacher: path of a config file, or ``dict(cfg_path=...)``, whose ``model`` is built with its
            ``data_preprocessor``; or config dict of a model; or the network itself. Of a classifier of this package the
            plain ``ImageClassifier`` inside is built. ``package::path`` is a config of a package, as in ``_base_``.
        teacher_ckpt: file or http(s) address of its checkpoint; ``*`` stands for what one file alone has there, such as
            the epoch in MMEngine's name of the best one. Without a checkpoint a network keeps the weights that it has,
            and a config must name pretrained weights of the whole network itself.
        student: the classifier that it will teach.
        teacher_input: ``size`` (a number, or height and width) to which the student's inputs are resized for it, and
            ``mean``, ``std``, ``to_rgb`` and ``to_bgr`` in place of those of its data preprocessor.
        folder: where files lie that are not in the working directory.
        teacher_precision: ``'bf16'`` for a forward under bfloat16 autocast, whose logits are float32.
        teacher_compile: forwards by ``torch.compile``, or with a warning as it is where that fails.
        teacher_channels_last: lays its weights and inputs out channels last.

    Returns:
        The holder. Where mean, std or channel order of the teacher are not the student's, the holder converts; a config
        without data preprocessor, or a network without, sees the student's inputs. Padding is left as the student has
        it.

    Raises:
        MissingTeacherError: a file is missing.
        TypeError: ``teacher`` is none of these, or a switch is no bool.
        ValueError: weights do not fit the network, are missing, or leave a part of it drawn at random; class counts
            differ; an unknown key of ``teacher_input``, or another ``teacher_precision``.
    """
    caller = type(student).__name__
    origin, pipeline = "", None
    if isinstance(teacher, Mapping) and "cfg_path" in teacher:
        if len(teacher) > 1:
            found = check.first_names([name for name in teacher if name != "cfg_path"])
            raise ValueError(f"{caller}: `teacher` must have `cfg_path` alone, got {found} too. Change its file.")
        teacher = str(teacher["cfg_path"])
    if teacher_ckpt is not None:
        teacher_ckpt = _found(str(teacher_ckpt), folder)
    config: dict[str, Any] = {}
    if isinstance(teacher, nn.Module):
        module = teacher
    else:
        if isinstance(teacher, (str, Path)):
            origin = _found(str(teacher), folder)
            config, pipeline = _read_config(caller, origin)
        elif isinstance(teacher, Mapping):
            config = copy.deepcopy(dict(teacher))
        else:
            raise TypeError(
                f"{caller}: `teacher` must be the path of a config, a dict or a module, got {type(teacher).__name__}. "
                f"Write {_INLINE}."
            )
        config = _plain_config(config)
        module = MODELS.build(copy.deepcopy(config))
        trained = getattr(module, "comes_trained", False)
        if trained and teacher_input is None:
            raise ValueError(
                f"{caller}: `teacher_input` must be given for {config['type']}, which takes RGB as its library says. "
                f"Write dict(mean=[...], std=[...], to_rgb=...)."
            )
        if teacher_ckpt is None and not trained:
            _initialise(caller, module, config, origin, folder)
    if teacher_ckpt is not None:
        _load(caller, module, teacher_ckpt, origin)

    own_inputs = isinstance(teacher, nn.Module) or config.get("data_preprocessor") is not None
    conversion = _conversion(caller, student, module if own_inputs else None, teacher_input)
    holder = FrozenTeacher(
        module,
        conversion,
        pipeline,
        precision=teacher_precision,
        compiled=teacher_compile,
        channels_last=teacher_channels_last,
    )
    holder.settings = [config, dict(teacher_input or {})]
    classes = getattr(student.head, "num_classes", None)
    if None not in (classes, holder.num_classes) and classes != holder.num_classes:
        raise ValueError(
            f"{caller}: `teacher` must have the class count of the student, got {holder.num_classes} and {classes}. "
            f"Take another teacher."
        )
    return holder


def _found(path: str, folder: str | Path | None) -> str:
    """Where a file is: seen from the working directory, else from ``folder``."""
    if folder is None or ":" in path or Path(path).expanduser().exists() or glob.glob(path):
        return path
    beside = Path(folder, path)
    return str(beside) if beside.exists() or glob.glob(str(beside)) else path


def _read_config(caller: str, path: str) -> tuple[dict[str, Any], Any]:
    """The model of a config file, and the pipeline of its test data."""
    if "::" in path:
        file = get_config(path)
    elif Path(path).expanduser().is_file():
        check_config_text(caller, path)
        file = Config.fromfile(str(Path(path).expanduser()))
    else:
        raise MissingTeacherError(
            f"{caller}: `teacher` must be the path of a config, but there is none at {path} (seen from {Path.cwd()}, "
            f"and with IKLHook from its config). Correct it."
        )
    model = file.get("model")
    if not isinstance(model, Mapping):
        raise ValueError(f"{caller}: `teacher` must be a config with a `model`, but {path} has none.")
    config = copy.deepcopy(dict(model))
    if config.get("data_preprocessor") is None and file.get("data_preprocessor") is not None:
        config["data_preprocessor"] = copy.deepcopy(file.data_preprocessor)
    loader = file.get("test_dataloader") or file.get("val_dataloader") or {}
    return config, loader.get("dataset", {}).get("pipeline")


def _plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """Of a classifier of this package the classifier that its checkpoint loads into."""
    kind = config.get("type")
    cls = MODELS.get(kind) if isinstance(kind, str) else kind
    if isinstance(cls, type) and issubclass(cls, EpochClassifier):
        return cls.plain_config(config)
    return config


def _initialise(
    caller: str, module: nn.Module, config: Mapping[str, Any], origin: str, folder: str | Path | None
) -> None:
    """Loads the weights that a config names for the whole network, or refuses an untrained teacher."""
    named, init_cfg = config.get("pretrained"), config.get("init_cfg")
    for entry in init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]:
        # As in MMEngine the last one stays, and all come behind what the network has fetched itself.
        if isinstance(entry, Mapping) and entry.get("type") in ("Pretrained", PretrainedInit):
            named = named if isinstance(named, str) else None if entry.get("prefix") else entry.get("checkpoint")
    if named is True:  # the network has fetched its weights itself, as those of timm and Hugging Face do
        with kept_random_states():
            drawn = drawn_parameters(module, lambda: MODELS.build(copy.deepcopy(dict(config))))
        if drawn:
            raise ValueError(
                f"{caller}: `teacher` must be trained as a whole, but `pretrained=True` leaves "
                f"{check.first_names(drawn)} as they were drawn. Fine-tune it, and give that `teacher_ckpt`."
            )
        return
    if named:
        _load(caller, module, _found(str(named), folder), origin)
        return
    raise ValueError(
        f"{caller}: `teacher_ckpt` must be given, got None or a backbone alone. Write teacher_ckpt='....pth'."
    )


def _load(caller: str, module: nn.Module, path: str, origin: str) -> None:
    """Loads a checkpoint whose names and shapes are exactly those of the network."""
    if "://" in path and not is_address(path):
        raise ValueError(f"{caller}: `teacher_ckpt` must be a file or an http(s) address, got {path}. Fetch it.")
    if "*" in path and not is_address(path):
        found = sorted(glob.glob(str(Path(path).expanduser())))
        if len(found) > 1:
            raise ValueError(f"{caller}: `teacher_ckpt` must fit one file, {path} fits {len(found)}. Name one.")
        path = found[0] if found else path
    if not is_address(path) and not Path(path).expanduser().is_file():
        raise MissingTeacherError(
            f"{caller}: `teacher_ckpt` must be a file, but there is none at {path} (seen from {Path.cwd()}). "
            f"Correct it, or train the teacher first: ikl train {origin or 'TEACHER_CONFIG'}"
        )
    own = module.state_dict()
    weights = {key: value for key, value in load_weights(path).items() if key in own or not key.startswith(_EXTRAS)}
    load_strictly(caller, module, weights, path, "the network in `teacher`", statistics=_statistics(module))


def _statistics(module: nn.Module) -> Statistics | None:
    """With what its data preprocessor normalises pixels in [0, 1]."""
    preprocessor = getattr(module, "data_preprocessor", None)
    if not getattr(preprocessor, "_enable_normalize", False):
        return None
    space = pixel_space(preprocessor)
    return tuple((space.mean / space.white).tolist()), tuple((space.std / space.white).tolist())


def _conversion(
    caller: str, student: EpochClassifier, module: nn.Module | None, given: Mapping[str, Any] | None
) -> Callable[[Tensor], Tensor] | None:
    """From the student's inputs to those of the module, or to those that are given for it."""
    settings = dict(given or {})
    unknown = [name for name in settings if name not in _INPUT]
    if unknown:
        raise ValueError(check.unknown_name_message(caller, "key of `teacher_input`", unknown[0], _INPUT))
    size = settings.pop("size", None)
    theirs = ClsDataPreprocessor(**settings) if settings else getattr(module, "data_preprocessor", None)
    convert = None
    if theirs is not None:
        convert = pixel_space(student.data_preprocessor).conversion_to(pixel_space(theirs))
    return convert if size is None else _Resized(caller, size, convert)


class _Resized:
    """Inputs of another size, and then converted: both are linear in the pixels, so that either may be the first."""

    def __init__(self, caller: str, size: Any, convert: Callable[[Tensor], Tensor] | None) -> None:
        sides = [size, size] if isinstance(size, int) else size
        if not isinstance(sides, (list, tuple)) or len(sides) != 2:
            raise ValueError(
                f"{caller}: `size` of `teacher_input` must be a number or two, got {size!r}. Write size=224."
            )
        self.size = [check.check_integer(caller, "size", side) for side in sides]
        self.convert = convert

    def __call__(self, inputs: Tensor) -> Tensor:
        resized = F.interpolate(inputs, self.size, mode="bilinear", antialias=True)
        return resized if self.convert is None else self.convert(resized)

"""What MMEngine's own loader needs to read its checkpoints, and to refuse those that would run code.

Since version 2.6 torch reads with ``weights_only=True``, and MMEngine's own files hold more. So
:func:`allow_mmengine_checkpoints` registers a loader for files with MMEngine's ``CheckpointLoader``, and ``--resume``
and tools/test.py read them. :func:`verify` gives the same protection where the host's own loader would go on to run
the file. The reading itself is in :mod:`ikl_plugins.checkpoints`.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmengine.runner.checkpoint
from mmengine.logging import HistoryBuffer, MMLogger  # noqa: F401  # checkpoints get the real buffer where it is imported
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from .. import checkpoints
from .._limits import check_regular_file
from .._validation import first_names
from ..checkpoints import load_content, load_weights
from ..models.weights import fits

__all__ = ["allow_mmengine_checkpoints", "check_resumed_weights", "cut_off", "load_content", "load_weights"]
__all__ += ["newest_whole", "verify"]

_ZIP = b"PK\x03\x04"  # how torch.save begins a file


def allow_mmengine_checkpoints() -> bool:
    """Has MMEngine read checkpoints with :mod:`ikl_plugins.checkpoints`, of files and of http(s) addresses.

    A second call changes nothing. Nothing is added to what torch itself may load.

    Returns:
        Whether that is needed: False where torch is older than 2.6, or where MMEngine's loader brings its own list of
        names.
    """
    if not checkpoints.READS_WEIGHTS_ONLY or hasattr(mmengine.runner.checkpoint, "get_torch_safe_globals"):
        return False
    CheckpointLoader.register_scheme(prefixes="", loader=load_from_local, force=True)
    CheckpointLoader.register_scheme(prefixes=["http://", "https://"], loader=load_from_http, force=True)
    return True


def load_from_local(filename: str, map_location: Any = "cpu") -> Any:
    """A loader of MMEngine's ``CheckpointLoader``, which names it in its log by what follows ``load_from_``."""
    check_regular_file("load_content", Path(filename).expanduser())
    if not Path(filename).expanduser().is_file():
        raise FileNotFoundError(f"{filename} can not be found.")  # in the host's words
    return load_content(filename, map_location)


def load_from_http(filename: str, map_location: Any = "cpu") -> Any:
    """Likewise for an address; MMEngine's own keeps a download that was cut, and runs what a file holds."""
    return checkpoints.fetch(filename, map_location=map_location)


# What MMEngine looks up, without looking whether it is there, where a run goes on from a checkpoint.
_OF_A_RUN = ("meta", "message_hub", "state_dict")


def verify(path: Path | str, *, resume: bool = False) -> None:
    """Refuses a checkpoint that the host must not read, before the host reads it.

    MMEngine fetches addresses without ``weights_only``, and some versions of it read a file a second time and run what
    it holds when the first, careful reading fails.

    Args:
        path: a file, or an http(s) address; what is fetched stays in torch's hub folder, where MMEngine looks for it.
        resume: a run shall go on from it, so that weights alone will not do.

    Raises:
        ValueError: as :func:`load_content`; the address cannot be read, or has another scheme; with ``resume``, it is
            no checkpoint of a run.
    """
    if checkpoints.is_address(path):
        _check_run(checkpoints.fetch(str(path)), path, resume)
        return
    scheme = re.match(r"[\w+.-]+(?=://)", str(path))
    if scheme:
        raise ValueError(
            f"verify: a checkpoint must be a file or an http(s) address, got {path}. Fetch it, or trust "
            f"{scheme[0]}://: custom_hooks = [dict(type='IKLHook', verify_checkpoints=False)]."
        )
    _check_run(load_content(path), path, resume)


def _check_run(content: Any, path: Path | str, resume: bool) -> None:
    missing = [key for key in _OF_A_RUN if not isinstance(content, Mapping) or key not in content]
    if resume and missing:
        raise ValueError(
            f"verify: the checkpoint {path} must be one of MMEngine's, but lacks {', '.join(map(repr, missing))}. "
            f"For weights alone use `load_from` without `resume`."
        )
    for key in _OF_A_RUN if resume else ("state_dict",):
        part = content.get(key, {}) if isinstance(content, Mapping) else {}
        if not isinstance(part, Mapping) or not all(isinstance(name, str) for name in part):
            raise ValueError(f"verify: '{key}' of the checkpoint {path} must hold values by name. Name another file.")


def check_resumed_weights(model: nn.Module, checkpoint: Mapping[str, Any], path: Path | str | None) -> None:
    """Refuses weights that do not fit the model whose run goes on: MMEngine leaves those out, and says so in its log.

    Args:
        model: not wrapped.
        checkpoint: what is resumed from.
        path: where it comes from, if that is known.

    Raises:
        ValueError: an entry is no dense tensor, or has another shape or kind of numbers than the model's.
    """
    path = "what is resumed" if path is None else path
    checkpoints.check_dense("IKLHook", checkpoint["state_dict"], path)
    # Class priors refuse by themselves what they do not take.
    own = {name: weight for name, weight in model.state_dict().items() if "class_prior." not in name}
    found = {name.removeprefix("module."): weight for name, weight in checkpoint["state_dict"].items()}
    others = [
        name for name in own if name in found and not (isinstance(found[name], Tensor) and fits(found[name], own[name]))
    ]
    if others:
        raise ValueError(
            f"IKLHook: {path} must have the model's shapes and dtypes, but differs in {first_names(others)}. "
            f"Resume from a whole checkpoint of this model."
        )


def cut_off(path: str, work_dir: str) -> bool:
    """Whether MMEngine was stopped in the middle of writing ``path``, or its name: '' in the file `last_checkpoint`.

    MMEngine writes in place: the name behind each checkpoint, and the last checkpoint a second time behind a validation
    that was the best so far. What is damaged in another way, or was not written by this run, is refused and not passed
    over.
    """
    if path == "":
        return True
    file = Path(path)
    if not file.is_file() or file.parent.resolve() != Path(work_dir).resolve() or zipfile.is_zipfile(file):
        return False
    with file.open("rb") as opened:
        return opened.read(len(_ZIP)) in (_ZIP, b"")


def newest_whole(named: str, work_dir: str) -> str:
    """The newest checkpoint of a run that was written to its end."""
    found = [path for path in Path(work_dir).glob("*.pth") if re.fullmatch(r"(?:epoch|iter)_\d+", path.stem)]
    whole = [path for path in found if not cut_off(str(path), work_dir)]
    note = Path(work_dir, "last_checkpoint")
    if not whole:
        what = f"names {named}, which was not written to its end" if named else "is empty"
        raise ValueError(f"IKLHook: {note} must name a whole checkpoint, but {what}. Start anew, without --resume.")
    # By time and not by number: the folder may have checkpoints of a longer run that was there before.
    newest = max(whole, key=lambda path: path.stat().st_mtime_ns)
    MMLogger.get_current_instance().warning(
        "IKLHook: the run was stopped while it wrote %s; going on from %s.", named or note, newest
    )
    return str(newest)

"""What a run of MMEngine's runner is started with, for the record in its checkpoints."""

from __future__ import annotations

from typing import Any

from mmengine.dist import get_world_size
from mmengine.optim import OptimWrapperDict
from mmengine.runner import IterBasedTrainLoop
from torch import nn

from .._run_record import settings_of
from ..losses import DecoupledLoss
from .epochs import EpochModel

__all__ = ["RECORD", "model_settings", "run_settings"]

RECORD = "ikl_plugins"  # the key in a checkpoint's 'meta'


def run_settings(runner: Any, model: nn.Module) -> dict[str, Any]:
    """The settings that a resumed run must share. The checkpoint must not have been read yet.

    Args:
        runner: MMEngine's, with its loop, optimizer and schedulers built.
        model: its model, not wrapped.
    """
    loop, loader, wrapper = runner.train_loop, runner.train_loop.dataloader, runner.optim_wrapper
    batches = loader if loader.batch_size is not None else loader.batch_sampler
    wrappers = dict(wrapper.items()) if isinstance(wrapper, OptimWrapperDict) else {"": wrapper}
    schedulers = runner.param_schedulers or []
    if isinstance(schedulers, dict):
        schedulers = [one for several in schedulers.values() for one in several]
    found = {
        **model_settings(model),
        "losses": {
            path: settings_of(module)
            for path, module in model.named_modules()
            if isinstance(module, DecoupledLoss) or type(module).__name__.endswith("Loss")
        },
        "batch_size": getattr(batches, "batch_size", None),
        "world_size": get_world_size(),
        "train_images": len(loader.dataset) if hasattr(loader.dataset, "__len__") else None,
        "seed": runner._randomness_cfg.get("seed"),
        **({"iterations": loop.max_iters} if isinstance(loop, IterBasedTrainLoop) else {"epochs": loop.max_epochs}),
        "schedule": dict(zip(map(str, range(len(schedulers))), map(settings_of, schedulers), strict=True)),
    }
    for name, one in wrappers.items():
        of = f" of {name}" if name else ""
        # Under names of their own these keep what the config gives.
        kept = {"clip_grad": getattr(one, "clip_grad_kwargs", None), "dtype": str(getattr(one, "cast_dtype", None))}
        found[f"optim_wrapper{of}"] = {**kept, **settings_of(one)}
        found[f"optimizer{of}"] = settings_of(getattr(one, "optimizer", None))
    return found


def model_settings(model: nn.Module) -> dict[str, Any]:
    """Those of a model of this package; its teacher may become known later than the others."""
    return {"model": model.run_settings()} if isinstance(model, EpochModel) else {}

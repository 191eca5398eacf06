"""Several processes without CUDA: importing this module joins their group before MMEngine would try to.

MMEngine selects a CUDA device for each process, even for one that is to talk over gloo, and so stops where there is
none. It leaves a group alone that is there already::

    custom_imports = dict(imports=['ikl_plugins.mmengine', 'ikl_plugins.mmengine.cpu_ranks'])
    model_wrapper_cfg = dict(
        type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False, find_unused_parameters=False)

    python -m torch.distributed.run --nproc_per_node=2 .../train.py CONFIG --launcher pytorch

With CUDA, in a single process and in a group that exists nothing happens.
"""

from __future__ import annotations

import os

import torch
import torch.distributed

__all__ = ["join"]

_PLACES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def join() -> bool:
    """Joins the gloo group that torchrun describes in the environment.

    Returns:
        Whether this call has joined it: not with CUDA, not in a group already, not outside of torchrun, not alone.
    """
    if torch.cuda.is_available() or not torch.distributed.is_available() or torch.distributed.is_initialized():
        return False
    if any(name not in os.environ for name in _PLACES) or int(os.environ["WORLD_SIZE"]) < 2:
        return False
    torch.distributed.init_process_group("gloo")
    return True


join()

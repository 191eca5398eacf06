"""A mode in which nothing may make the host wait for a device."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar_dense", "nonzero", "bincount", "equal", "masked_select", "is_nonzero", "unique")


class NoWaits(TorchDispatchMode):
    """Refuses the operations for which a host waits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert not name.startswith(WAITS), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))

"""The import path of :mod:`ikl_plugins.mmengine.cpu_ranks` in configs of MMPretrain."""

from ..mmengine.cpu_ranks import join

__all__ = ["join"]

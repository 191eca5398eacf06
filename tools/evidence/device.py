"""A device under measurement: what it is, how long work takes on it, and what a step launches and waits for."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import importlib.metadata
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from evidence import cache
from ikl_plugins import _value_checks, kernels

COUNTER_VARIABLE = "GPU_STUB"  # names the folder of a counting CUDA runtime: libstub.so with stub_reset and stub_get
_FIELDS = ("launches", "h2d", "d2h", "d2d", "memsets", "ssync", "dsync", "esync", "mallocs", "blas")
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchCooperativeKernel")


class Count(NamedTuple):
    """What one step does."""

    launches: int  # of kernels, those of cuBLAS among them
    waits: int  # of the host for the device


def counting_runtime() -> str | None:
    """The folder of a CUDA runtime that counts and computes nothing, where the environment names one."""
    return os.environ.get(COUNTER_VARIABLE)


def facts(device: torch.device) -> dict[str, str]:
    """The device with its driver, and what is installed for it."""
    if device.type != "cuda":
        return {"device": device.type}
    found = {"device": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
    if counting_runtime():
        found["device"] = "a counting CUDA runtime, which launches nothing"
    else:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            found["driver"] = subprocess.check_output(command, text=True).split("\n", 1)[0]
    for package in ("triton", "liger-kernel"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_on(device: torch.device, work: Callable[[], object]) -> Callable[[], float]:
    """A method that does ``work`` and returns its seconds: on CUDA those between two events of its stream."""

    def measure() -> float:
        if device.type != "cuda" or counting_runtime():
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return measure


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """The most memory that ``work`` takes on a CUDA device at once, above what is there before."""
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before


# --- the ways of the losses ------------------------------------------------------------------------------------------

WALK, KERNEL = "walk", "kernel"


def ways(device: torch.device) -> list[str]:
    """The ways that serve on a device."""
    if device.type != "cuda":
        return [WALK]
    if counting_runtime() and kernels.operator() is not None:
        # It compares itself with the walk at first, for which there are no numbers here.
        kernels._reasons[torch.device("cuda", torch.cuda.current_device())] = ""
    logits = torch.zeros(2, 3, device=device)
    return [WALK, KERNEL] if kernels.operator() is not None and kernels.serves(logits, logits, None) else [WALK]


@contextlib.contextmanager
def going(way: str) -> Iterator[None]:
    """The losses on a device go one of the ways."""
    shipped = kernels.serves
    try:
        if way == WALK:
            kernels.serves = lambda student, teacher, class_prior: False
        yield
    finally:
        kernels.serves = shipped


# --- counting --------------------------------------------------------------------------------------------------------


def count(step: Callable[[], object], device: torch.device) -> Count:
    """What a step launches and waits for; the first runs, which allocate and compile, are not counted."""
    for _ in range(3):
        step()
    if device.type != "cuda":
        step()
        return Count(0, 0)
    return counted_once(step, device)


def counted_once(step: Callable[[], object], device: torch.device) -> Count:
    """The same without the runs before."""
    folder = counting_runtime()
    if folder is not None:
        library = ctypes.CDLL(str(Path(folder) / "libstub.so"))
        library.stub_reset()
        step()
        numbers = (ctypes.c_long * len(_FIELDS))()
        library.stub_get(numbers)
        found = dict(zip(_FIELDS, numbers, strict=True))
        return Count(found["launches"] + found["blas"], found["ssync"] + found["dsync"] + found["esync"])
    wait(device)
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as profile, _waits() as found_waits:
        step()
    launches = sum(event.name.startswith(_LAUNCHES) for event in profile.events() or [])
    return Count(launches, len(found_waits))


@contextlib.contextmanager
def _waits() -> Iterator[list[str]]:
    """Notes each operation for which the host waits."""
    found: list[str] = []

    def note(message: Warning | str, *_: object, **__: object) -> None:
        if "synchronizing CUDA" in str(message):
            found.append(str(message))

    with warnings.catch_warnings(), mock.patch.object(warnings, "showwarning", note):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def without_judgement() -> Iterator[None]:
    """On the counting runtime what is read from the device means nothing, and no check may judge by it."""
    if counting_runtime() is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(_value_checks, "judge_findings"))
        with contextlib.suppress(ImportError):
            from ikl_plugins.mmengine import hooks

            stack.enter_context(mock.patch.object(hooks, "judge_findings"))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


# --- what gpu.sh keeps -----------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> None:
    """``versions FOLDER DEVICE`` writes what is measured on; ``collect FOLDER DEVICE`` all of it in one JSON file."""
    what, folder, name = arguments
    device, target = torch.device(name), Path(folder)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu.sh: torch must find a CUDA device, but there is none.")
    found: dict[str, object] = {"versions": {**cache.versions(), **facts(device)}}
    if device.type == "cuda":
        found["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
        found["capability"] = torch.cuda.get_device_capability(device)
        found["kernels"] = kernels.why_not(torch.device("cuda", torch.cuda.current_device())) or "serve"
    if what == "collect":
        for file in sorted(target.glob("*.csv")):
            with file.open(newline="") as lines:
                found[file.stem] = list(csv.DictReader(lines))
    cache.write_json(target / ("results.json" if what == "collect" else "versions.json"), found)
    print(found["versions"])


if __name__ == "__main__":
    main(sys.argv[1:])

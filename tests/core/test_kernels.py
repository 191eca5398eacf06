"""The Triton kernels where there is no GPU: in the interpreter, compiled ahead of time, and when they do not serve."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import oracles
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ikl_plugins import functional, kernels
from ikl_plugins._composed import Settings, composed_loss
from ikl_plugins.kernels import _launch

CPU = torch.device("cpu")
IKL = functional.ikl_settings(alpha=1.0, beta=1.0, temperature=1.0, weight_temperature=1.0, reduction="batchmean")
GKL = functional.gkl_settings(
    alpha=1.0, beta=1.0, temperature=4.0, weight_temperature=1.0, gamma=0.5, reduction="batchmean"
)
# To an architecture's number, the name that NVIDIA sells it under.
ARCHITECTURES = {80: "A100", 90: "H100", 100: "B200"}


# --- in the interpreter ----------------------------------------------------------------------------------------------


def _skip_without_triton() -> None:
    reason = kernels._without_triton()
    if reason:
        pytest.skip(f"the kernels are not tested: {reason}")


def _in_the_interpreter(*options: str) -> None:
    _skip_without_triton()
    file = Path(__file__).with_name("kernels_in_the_interpreter.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), *options],
        env={**os.environ, "TRITON_INTERPRET": "1", "IKL_PLUGINS_KERNEL": "triton"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"^\d+ passed(, \d+ deselected)? in", done.stdout, re.MULTILINE), done.stdout[-2000:]


def test_values_and_gradients_in_the_interpreter() -> None:
    _in_the_interpreter("-m", "not slow")


@pytest.mark.slow
def test_the_whole_grid_in_the_interpreter() -> None:
    _in_the_interpreter("-m", "slow")


# --- ahead of time ---------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """A launch that has not been made: what it would be compiled for."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def _launches(shape: tuple[int, ...], dtype: torch.dtype, settings: Settings, prior: Tensor | None) -> list[Launch]:
    """Those of a forward and a backward pass."""
    from ikl_plugins.kernels import _device_code

    found: list[Launch] = []

    class Noted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **options: found.append(Launch(self.kernel, arguments, options))

    with pytest.MonkeyPatch.context() as patch:
        for name in ("values_kernel", "totals_kernel", "gradients_kernel"):
            patch.setattr(_device_code, name, Noted(getattr(_device_code, name)))
        student, teacher = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        *_, kept = _launch.find_values(student, teacher, prior, settings)
        _launch.find_gradients(student, teacher, prior, settings, (True, True), kept, torch.ones(()))
    return found


def _resources(launch: Launch, architecture: int, folder: Path) -> dict[str, int]:
    """Registers and memory of a thread: what ``cuobjdump -res-usage`` says of the compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: launch.options[name] for name in ("num_warps", "enable_fp_fusion") if name in launch.options}
    given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.options
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def described(value: Any, path: tuple[int, ...]) -> Any:
        """The type of an argument as at a launch, where 1 is a constant and multiples of 16 are known to be such."""
        if isinstance(value, tuple):
            return type(value)(*(described(item, (*path, place)) for place, item in enumerate(value)))
        if value is None or (isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}[value.dtype]
        return "i32" if value < 2**31 else "i64"

    signature = {}
    for number, parameter in enumerate(launch.kernel.params):
        if parameter.is_constexpr:
            constants[number,] = given[parameter.name]
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = described(given[parameter.name], (number,))
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


@pytest.fixture
def compiler_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    _skip_without_triton()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def _assert_registers_alone(launches: list[Launch], architecture: int, folder: Path) -> None:
    assert [launch.kernel.__name__ for launch in launches] == ["values_kernel", "totals_kernel", "gradients_kernel"]
    for launch in launches:
        found = _resources(launch, architecture, folder)
        assert found["STACK"] == found["LOCAL"] == 0, (launch.kernel.__name__, architecture, found)
        assert 16 <= found["REG"] <= 128, (launch.kernel.__name__, architecture, found)


@pytest.mark.parametrize(
    ("classes", "dtype", "settings", "with_prior"),
    [(100, torch.float16, IKL, False), (21841, torch.float32, GKL, True)],
)
def test_compiled_kernels_keep_to_registers(
    compiler_folder: Path, classes: int, dtype: torch.dtype, settings: Settings, with_prior: bool
) -> None:
    prior = torch.empty(128, classes) if with_prior else None
    _assert_registers_alone(_launches((128, classes), dtype, settings, prior), 90, compiler_folder)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=ARCHITECTURES.get)
@pytest.mark.parametrize("shape", [(128, 100), (128, 1000), (128, 21841), (8, 19, 64, 64), (4, 300, 49)], ids=str)
def test_every_compiled_kernel_keeps_to_registers(
    compiler_folder: Path, shape: tuple[int, ...], architecture: int
) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for settings, prior in ((IKL, None), (GKL, None), (GKL, torch.empty(shape[:2]))):
            _assert_registers_alone(_launches(shape, dtype, settings, prior), architecture, compiler_folder)


# --- when they serve -------------------------------------------------------------------------------------------------


class Labelled(Tensor):
    pass


def _values(student: Tensor, teacher: Tensor, prior: Tensor | None, settings: Settings) -> tuple[Any, ...]:
    with torch.no_grad():
        return *composed_loss(student, teacher, prior, settings), _launch.Kept(None, None)


def _gradients(
    student: Tensor, teacher: Tensor, prior: Tensor | None, settings: Settings, needs: Any, kept: Any, upstream: Tensor
) -> tuple[Any, ...]:
    return kernels._composed(student, teacher, prior, settings, needs, upstream)[1]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process that has compared nothing, and kernels for CPU tensors that the composed losses stand in for."""
    monkeypatch.setattr(kernels, "_DEVICE_TYPES", ("cpu", "meta"))
    monkeypatch.setattr(kernels, "_reasons", {})
    monkeypatch.setattr(kernels, "_without_triton", str)
    monkeypatch.setattr(kernels, "find_values", _values)
    monkeypatch.setattr(kernels, "find_gradients", _gradients)
    return monkeypatch


def _fail(*arguments: Any) -> Any:
    raise ValueError("unsupported target\n\nptxas ended with 255\n")


def test_importing_and_computing_on_a_cpu_loads_no_triton() -> None:
    code = """
import sys, ikl_plugins, torch
ikl_plugins.ikl_loss(torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)).backward()
print("ikl_plugins.kernels" in sys.modules, "triton" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_tensors_that_they_take(on_cpu: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 5)
    assert kernels.serves(torch.nn.Parameter(logits.half()), logits, torch.rand(3, 5).double())
    assert kernels.serves(logits.expand(2, 3, 5), logits.bfloat16().expand(2, 3, 5), None)
    assert kernels._reasons == {CPU: ""}


@pytest.mark.parametrize(
    "logits",
    [
        torch.randn(3, 5, dtype=torch.float64),
        torch.randn(3, 5).as_subclass(Labelled),
        FakeTensorMode().from_tensor(torch.randn(3, 5)),
        torch.randn(3, 5, dtype=torch.complex64).conj().imag,
        torch._efficientzerotensor((3, 5)),
        torch.empty(0, 5),
        torch.empty(3, 5, 0),
        torch.empty(1, 1 << 16, 1 << 15, device="meta"),
    ],
    ids=["float64", "subclass", "fake", "negated", "zero", "no sample", "no place", "too far apart"],
)
def test_tensors_that_they_do_not_take(on_cpu: pytest.MonkeyPatch, logits: Tensor) -> None:
    plain = torch.randn(1, 1).expand(logits.shape)
    assert kernels.serves(plain, plain, None) == (logits.shape == (3, 5))
    for operands in ((logits, plain, None), (plain, logits, None), (plain, plain, logits)):
        if logits.dtype != torch.float64 or operands[2] is None:
            assert not kernels.serves(*operands)


def test_whoever_watches_torch_sees_its_operations(on_cpu: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not kernels.serves(logits, logits, None)


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
@pytest.mark.parametrize("place", range(5))
def test_kernels_that_are_wrong_do_not_serve(on_cpu: pytest.MonkeyPatch, place: int, wrong: float) -> None:
    def spoilt(function: Callable[..., Any], first: int) -> Callable[..., Any]:
        def found(*arguments: Any) -> Any:
            return tuple(x * wrong if first + i == place else x for i, x in enumerate(function(*arguments)))

        return found

    if place < 3:
        on_cpu.setattr(kernels, "find_values", spoilt(_values, 0))
    else:
        on_cpu.setattr(kernels, "find_gradients", spoilt(_gradients, 3))
    logits = torch.randn(3, 5)
    names = ("loss", "weighted MSE", "soft cross entropy", "student's gradient", "teacher's gradient")
    with pytest.warns(RuntimeWarning, match=f"on cpu, but the {names[place]} of 6 x 37 .* differs by .* The walk"):
        assert not kernels.serves(logits, logits, None)
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        assert not kernels.serves(logits, logits, None)


def test_kernels_that_do_not_compile_do_not_serve(on_cpu: pytest.MonkeyPatch) -> None:
    on_cpu.setattr(kernels, "find_values", _fail)
    logits = torch.randn(3, 5)
    with pytest.warns(RuntimeWarning, match="but it fails with ValueError: ptxas ended with 255. The walk serves"):
        assert not kernels.serves(logits, logits, None)


@pytest.mark.parametrize("failing", ["find_values", "find_gradients"])
def test_a_later_failure_does_not_end_a_training(on_cpu: pytest.MonkeyPatch, failing: str) -> None:
    """A variant may fail where the compared ones did not: this step is computed otherwise, as are all others."""
    student, teacher = torch.randn(3, 5).half(), torch.randn(3, 5)
    expected = oracles.decoupled("ikl", student, teacher)
    operator = kernels.operator()
    assert kernels.serves(student, teacher, None)
    assert operator is not None
    on_cpu.setattr(kernels, failing, _fail)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        loss, _, _, later = operator(student, teacher, None, IKL, (True, True))
        return loss, *later(student, teacher, None, torch.ones(()))

    with pytest.warns(RuntimeWarning, match="The walk serves"):
        loss, *gradients = step()
    assert [gradient.dtype for gradient in gradients] == [torch.float16, torch.float32]
    oracles.assert_close(loss, expected.loss("batchmean"), torch.float32)
    for gradient, wanted in zip(gradients, expected.gradients("batchmean"), strict=True):
        oracles.assert_close(gradient, wanted, torch.float16)
    assert not kernels.serves(student, teacher, None)


def test_memory_that_runs_out_is_no_failure_of_the_kernels(on_cpu: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    logits = torch.randn(3, 5)
    assert kernels.serves(logits, logits, None)
    operator = kernels.operator()
    assert operator is not None
    later = operator(logits, logits, None, IKL, (True, True))[3]
    on_cpu.setattr(kernels, "find_values", no_memory)
    on_cpu.setattr(kernels, "find_gradients", no_memory)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        operator(logits, logits, None, IKL, (True, True))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        later(logits, logits, None, torch.ones(()))
    assert kernels._reasons == {CPU: ""}
    kernels._reasons.clear()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        kernels.serves(logits, logits, None)
    assert kernels._reasons == {}


def test_nothing_is_compared_while_a_graph_is_captured(on_cpu: pytest.MonkeyPatch) -> None:
    on_cpu.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_cpu.setattr(kernels, "_disagreement", _fail)
    assert "captured" in kernels.why_not(torch.device("cuda", 0))
    assert kernels._reasons == {}


@pytest.mark.parametrize("version", [None, "3.3.1", "2.0.0.post1"])
def test_without_triton_or_with_an_old_one(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    module = None if version is None else types.ModuleType("triton")
    if module is not None:
        module.__version__ = version
    monkeypatch.setitem(sys.modules, "triton", module)
    monkeypatch.setattr(kernels, "_reasons", {})
    monkeypatch.setattr(kernels, "_DEVICE_TYPES", ("cpu",))
    kernels._without_triton.cache_clear()
    try:
        assert kernels.operator() is None
        assert not kernels.serves(torch.randn(2, 3), torch.randn(2, 3), None)
        reason = kernels.why_not(CPU)
        assert reason.startswith("Triton is not there") if version is None else f"{version} is older" in reason
    finally:
        kernels._without_triton.cache_clear()

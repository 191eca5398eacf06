"""The C++ operator: when it is used and when not, how it is built, and what happens where it cannot be."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ikl_plugins import IKLLoss, dkl_loss, gkl_loss, ikl_loss, native
from ikl_plugins.commands.main import main

LOSSES = {"dkl": dkl_loss, "ikl": ikl_loss, "gkl": gkl_loss}
DIGEST = hashlib.sha256().digest_size


class Calls(list[tuple[Any, ...]]):
    """The arguments of each call of the operator."""


@pytest.fixture
def state() -> Iterator[pytest.MonkeyPatch]:
    """The module as in a new process; as it was afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_ask_environment", True)
        patch.setattr(native, "_operator", None)
        for name in (native.VARIABLE, "CXX"):
            patch.delenv(name, raising=False)
        yield patch


@pytest.fixture
def operator(state: pytest.MonkeyPatch, built_operator: Path) -> Calls:
    """The operator switched on; it notes its calls."""
    state.setenv("XDG_CACHE_HOME", str(built_operator))
    native.enable()
    found, calls = native.operator(), Calls()
    assert found is not None

    def noted(*arguments: Any, **settings: Any) -> Any:
        calls.append(arguments)
        return found(*arguments, **settings)

    state.setattr(native, "_operator", noted)
    return calls


@pytest.fixture
def cache(state: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder, and a process that has not loaded the operator."""
    state.setenv("XDG_CACHE_HOME", str(tmp_path))
    state.setattr(native, "_loaded", lambda: None)
    return tmp_path


def _python(code: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A new process with the operator's own variables, and no others of them."""
    clean = {name: value for name, value in os.environ.items() if name not in (native.VARIABLE, "CXX")}
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def _library(built_operator: Path) -> Path:
    """The operator there; a folder that is kept has those of other sources and releases of torch as well."""
    return built_operator / "ikl_plugins" / native.library_path().name


def _compiler(folder: Path, body: str) -> str:
    """A command that is called like a compiler and does what ``body`` says with the output's name in $out."""
    script = folder / "compiler"
    script.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nout="$2"\n' + body)
    script.chmod(0o755)
    return str(script)


def _copying_compiler(folder: Path, built_operator: Path, before: str = "") -> str:
    """One that has the operator ready: a real compiler takes ten seconds."""
    library = _library(built_operator)
    (folder / "ready").write_bytes(library.read_bytes()[:-DIGEST])
    return _compiler(folder, f'{before}\necho compiled >> "{folder}/log"\ncp "{folder}/ready" "$out"\n')


def _with_digest(content: bytes) -> bytes:
    return content + hashlib.sha256(content).digest()


# --- what it computes, beside what the oracle tests look at ----------------------------------------------------------


def test_the_oracle_comparison_uses_it(operator: Calls) -> None:
    student, teacher = torch.randn(4, 7).double(), torch.randn(4, 7).double()
    oracles.assert_matches(ikl_loss, "ikl", student, teacher)
    assert len(operator) == 1
    with pytest.raises(AssertionError, match="is allowed for"):
        oracles.assert_matches(ikl_loss, "ikl", student, teacher, beta=1.0 + 1e-6, reference=_with_beta_one)
    assert len(operator) == 2


def _with_beta_one(*arguments: Any, **settings: Any) -> oracles.Expected:
    return oracles.decoupled(*arguments, **{**settings, "beta": 1.0})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("dkl", {"temperature": 4.0}), ("ikl", {"weight_temperature": 4.0}), ("gkl", {"gamma": 0.3}), ("gkl prior", {})],
)
def test_every_length_of_a_row(operator: Calls, kind: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Whole vectors, parts of one, and more of them than are summed before a double takes over."""
    kind, _, prior = kind.partition(" ")
    for classes in (*range(1, 36), 63, 64, 65, 511, 512, 513, 640):
        student, teacher = (3 * torch.randn(3, classes, dtype=torch.float64) for _ in range(2))
        used = dict(settings)
        if prior:
            used = {"gamma": 0.4, "class_prior": torch.softmax(torch.randn(3, classes, dtype=torch.float64), 1)}
        oracles.assert_matches(LOSSES[kind], kind, student.to(dtype), teacher.to(dtype), reduction="none", **used)
    assert len(operator) == 42


@pytest.mark.parametrize("gamma", [0.05, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_from_denormal_to_large(operator: Calls, dtype: torch.dtype, gamma: float) -> None:
    tiny = torch.finfo(dtype).tiny
    prior = torch.tensor([[0.0, tiny / 8, tiny, 1e-20, 1e-3, 0.5, 0.7071067, 1.0, 1.0000001, 3.0, 100.0]], dtype=dtype)
    student, teacher = torch.randn(1, 11, dtype=dtype), torch.randn(1, 11, dtype=dtype)
    for loss in ("ikl", "gkl"):
        used = {"gamma": gamma} if loss == "gkl" else {}
        oracles.assert_matches(LOSSES[loss], loss, student, teacher, class_prior=prior, alpha=0.0, **used)
    assert len(operator) == 2


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_processors_with_shorter_vectors(built_operator: Path, tmp_path: Path, capability: str) -> None:
    """Built and run as on a processor that torch finds to have less than this one."""
    code = """
import itertools, torch
from ikl_plugins import gkl_loss, native
print(torch.backends.cpu.get_cpu_capability())
native.build()
torch.manual_seed(0)
for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
    for classes, prior, gamma in itertools.product((*range(1, 20), 63, 65, 1030), (False, True), (0.0, 0.4, 1.0)):
        settings = {"gamma": gamma, "reduction": "none", "temperature": 2.0}
        if prior:
            settings["class_prior"] = torch.softmax(3 * torch.randn(3, classes, dtype=dtype), 1)
        logits = [(3 * torch.randn(3, classes, dtype=dtype)).requires_grad_() for _ in range(2)]
        found = []
        for switch in (native.disable, native.enable):
            switch()
            loss = gkl_loss(*logits, **settings)
            found.append((loss, *torch.autograd.grad(loss.sum(), logits)))
        torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance / 100)
"""
    done = _python(code, XDG_CACHE_HOME=str(tmp_path), ATEN_CPU_CAPABILITY=capability)
    assert done.returncode == 0, done.stderr
    found = done.stdout.strip().lower()
    if found != capability:
        pytest.skip(f"torch takes this processor for one with {found}")


@pytest.mark.parametrize(
    ("dtype", "divide"), [(torch.float32, False), (torch.float32, True), (torch.float64, False)], ids=str
)
def test_weights_that_are_all_denormal(operator: Calls, dtype: torch.dtype, divide: bool) -> None:
    """One over their sum is infinite. GKL's normaliser makes up for their size, where a double holds its square."""
    tiny = torch.finfo(dtype).tiny
    shares = torch.tensor([[0.25, 0.5, 0.125, 0.0, 1.0]] * 2, dtype=dtype)
    prior = shares * (tiny / 16)
    assert 0 < prior.sum(1).max() < tiny
    student, teacher = torch.randn(2, 5, dtype=dtype), torch.randn(2, 5, dtype=dtype)
    for reduction in ("batchmean", "none"):
        if divide:  # the normaliser is that of the same weights of an ordinary size
            expected = oracles.decoupled("gkl", student, teacher, class_prior=shares, gamma=1.0)
            found = gkl_loss(student, teacher, class_prior=prior, gamma=1.0, reduction=reduction)
        else:
            expected = oracles.decoupled("ikl", student, teacher, class_prior=prior)
            found = ikl_loss(student, teacher, class_prior=prior, reduction=reduction)
        oracles.assert_close(found, expected.loss(reduction), dtype)
    assert len(operator) == 2


def test_results_do_not_depend_on_the_number_of_threads(operator: Calls) -> None:
    student, teacher = (torch.randn(333, 1003, requires_grad=True) for _ in range(2))
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            loss = gkl_loss(student, teacher, gamma=0.3)
            found.append((loss, *torch.autograd.grad(loss, (student, teacher))))
        finally:
            torch.set_num_threads(1)
    for other in found[1:]:
        for one, another in zip(found[0], other, strict=True):
            assert torch.equal(one, another)
    assert len(operator) == 3


@pytest.mark.slow
def test_more_elements_than_a_32_bit_number_counts(operator: Calls) -> None:
    """Rows that overlap in memory, each shifted by one class: the logits of 2**31 elements take a megabyte."""
    classes = 100_000
    samples = 2**31 // classes + 20
    student, teacher = (torch.randn(samples + classes).as_strided((samples, classes), (1, 1)) for _ in range(2))
    values = ikl_loss(student, teacher, reduction="none")
    torch.testing.assert_close(values[-3:], ikl_loss(student[-3:].clone(), teacher[-3:].clone(), reduction="none"))


def test_tensors_that_are_not_what_lies_in_memory(operator: Calls) -> None:
    negated = torch.randn(3, 5, dtype=torch.complex128).conj().imag
    zeros = torch._efficientzerotensor((3, 5), dtype=torch.float64)
    assert negated.is_neg()
    teacher = torch.randn(3, 5, dtype=torch.float64)
    for student in (negated, zeros):
        expected = oracles.decoupled("ikl", student.clone(), teacher).loss("batchmean")
        oracles.assert_close(ikl_loss(student, teacher), expected, torch.float64)
    assert len(operator) == 2


@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("weights", [{}, {"alpha": 0.0}, {"beta": 0.0}], ids=str)
def test_infinities_and_nans_come_out_where_they_do_without_it(
    operator: Calls, weights: dict[str, float], gamma: float
) -> None:
    plain, strange = [[1.0, 2.0, -1.0], [0.0, 0.5, 1.0]], []
    for value in (-math.inf, math.inf, math.nan):
        strange.append([[1.0, 2.0, value], [0.0, 0.5, 1.0]])
    strange.append([[-math.inf] * 3, [0.0, 0.5, 1.0]])
    pairs = [(s, t) for s in (plain, *strange) for t in (plain, *strange)]
    for pair in pairs:
        found = []
        for way in (native._operator, None):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(native, "_operator", way)
                student, teacher = (torch.tensor(logits, requires_grad=True) for logits in pair)
                values = gkl_loss(student, teacher, gamma=gamma, reduction="none", **weights)
                found.append((values.detach(), *torch.autograd.grad(values.sum(), (student, teacher))))
        torch.testing.assert_close(*found, equal_nan=True)
    assert len(operator) == len(pairs)


def test_the_operator_refuses_what_the_losses_never_hand_it(operator: Calls) -> None:
    settings = (None, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, True, False, "sum", True, True)
    found = native.operator()
    assert found is not None
    assert len(found(torch.zeros(2, 3), torch.zeros(2, 3), *settings)) == 5
    for student, teacher in (
        (torch.zeros(2, 0), torch.zeros(2, 0)),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2, 3, 1), torch.zeros(2, 3, 1)),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)),
    ):
        with pytest.raises(RuntimeError, match="decoupled_kl: "):
            found(student, teacher, *settings)


# --- when it is used -------------------------------------------------------------------------------------------------


class _Plain(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Labelled(Tensor):
    pass


def test_it_is_used_for_logits_of_two_dimensions_on_a_cpu(operator: Calls) -> None:
    student = torch.nn.Parameter(torch.randn(3, 5))
    IKLLoss(global_info=True, num_classes=5)(student, torch.randn(3, 5).half(), torch.tensor([0, 1, 2])).backward()
    assert len(operator) == 1
    assert student.grad is not None


@pytest.mark.parametrize("case", ["dense", "meta", "subclass", "watched", "compiled", "second derivatives"])
def test_everything_else_goes_as_it_does_without_it(operator: Calls, case: str) -> None:
    student, teacher = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    expected = oracles.decoupled("ikl", student, teacher).loss("batchmean")
    if case == "dense":
        loss = ikl_loss(student.t().reshape(1, 5, 3), teacher.t().reshape(1, 5, 3))
    elif case == "meta":
        assert ikl_loss(student.to("meta"), teacher.to("meta")).is_meta
        loss = expected
    elif case == "subclass":
        loss = ikl_loss(student.as_subclass(_Labelled), teacher)
        assert type(loss) is _Labelled
    elif case == "watched":
        with _Plain():
            loss = ikl_loss(student, teacher)
    elif case == "compiled":
        loss = torch.compile(ikl_loss, backend="eager", fullgraph=True)(student, teacher)
    else:
        loss = ikl_loss(student.requires_grad_(), teacher)
        operator.clear()
        torch.autograd.grad(loss, student, create_graph=True)
    oracles.assert_close(loss.as_subclass(Tensor), expected, torch.float64)
    assert operator == []


def test_disabling_brings_back_the_other_way(operator: Calls) -> None:
    assert native.is_enabled()
    native.disable()
    assert not native.is_enabled()
    ikl_loss(torch.randn(3, 5), torch.randn(3, 5))
    assert operator == []


def test_switched_off_it_looks_for_nothing() -> None:
    """No process is started, no file of its own is opened, and nothing but its module is imported."""
    code = """
import sys, torch
seen = []
sys.addaudithook(lambda event, arguments: seen.append((event, str(arguments))))
import ikl_plugins
torch.manual_seed(0)
student = torch.randn(3, 5, requires_grad=True)
ikl_plugins.ikl_loss(student, torch.randn(3, 5)).backward()
assert not ikl_plugins.native.is_enabled()
started = [event for event, arguments in seen if event in ("subprocess.Popen", "os.system", "ctypes.dlopen")]
opened = [arguments for event, arguments in seen if event == "open" and ("decoupled_kl" in arguments
          or "/nowhere/at/all" in arguments)]
assert any(event == "open" and "functional" in arguments for event, arguments in seen), "the hook saw nothing"
assert started == opened == [], (started, opened)
"""
    for value in ("", "0"):
        done = _python(code, "-W", "error", XDG_CACHE_HOME="/nowhere/at/all", **{native.VARIABLE: value})
        assert done.returncode == 0, done.stderr


# --- what the environment asks for -----------------------------------------------------------------------------------


def test_build_in_the_environment_builds_what_is_missing(built_operator: Path, tmp_path: Path) -> None:
    compiler = _copying_compiler(tmp_path, built_operator)
    code = "from ikl_plugins import native; print(native.is_enabled(), native.library_path())"
    for _ in range(2):  # the second finds it
        done = _python(
            code, "-W", "error", XDG_CACHE_HOME=str(tmp_path / "new"), CXX=compiler, **{native.VARIABLE: "build"}
        )
        enabled, path = done.stdout.split()
        assert enabled == "True"
        assert Path(path).parent == tmp_path / "new" / "ikl_plugins"
        assert [Path(path).name] == [entry.name for entry in Path(path).parent.iterdir()]
    assert (tmp_path / "log").read_text().split() == ["compiled"]


@pytest.mark.parametrize("value", ["1", "build"])
def test_where_it_cannot_be_had_the_losses_go_on_without_it(cache: Path, state: pytest.MonkeyPatch, value: str) -> None:
    state.setenv(native.VARIABLE, value)
    state.setenv("CXX", str(cache / "no compiler"))
    student, teacher = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    reason = {"1": "must be built, but", "build": "ended with 127"}[value]
    with pytest.warns(RuntimeWarning, match=f"(?s){native.VARIABLE}={value} .*without the C.. operator.*{reason}"):
        oracles.assert_matches(ikl_loss, "ikl", student, teacher)
    assert not native.is_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        oracles.assert_matches(ikl_loss, "ikl", student, teacher)


# --- several threads -------------------------------------------------------------------------------------------------


class Doing(threading.Thread):
    """What a function gives or raises, from a thread of its own."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.function = function
        self.found: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.found = self.function()
        except BaseException as error:
            self.found = error

    def result(self) -> Any:
        self.join(60)
        assert not self.is_alive()
        return self.found


@pytest.fixture
def slow(state: pytest.MonkeyPatch, built_operator: Path) -> Iterator[tuple[threading.Event, threading.Event]]:
    """The environment asks for the operator, which says when its loading has begun and waits for leave to end it."""
    begun, leave = threading.Event(), threading.Event()
    loaded = native._loaded

    def waiting() -> Any:
        begun.set()
        assert leave.wait(60)
        return loaded()

    state.setattr(native, "_loaded", waiting)
    state.setenv("XDG_CACHE_HOME", str(built_operator))
    state.setenv(native.VARIABLE, "1")
    yield begun, leave
    leave.set()


def test_a_thread_that_asks_while_another_loads_gets_the_same_answer(
    slow: tuple[threading.Event, threading.Event],
) -> None:
    begun, leave = slow
    first = Doing(native.operator)
    assert begun.wait(60)
    second = Doing(native.operator)
    second.join(0.2)
    assert second.is_alive(), f"it did not wait, and got {second.found}"
    leave.set()
    assert first.result() is second.result()
    assert "decoupled_kl" in str(first.found)


@pytest.mark.parametrize("failing", [RuntimeError("no such thing"), None], ids=["in vain", "with success"])
def test_threads_build_and_warn_once(
    slow: tuple[threading.Event, threading.Event], state: pytest.MonkeyPatch, failing: RuntimeError | None
) -> None:
    begun, leave = slow
    builds = []

    def build() -> None:
        builds.append(1)
        begun.set()
        assert leave.wait(60)
        if failing is not None:
            raise failing

    state.setattr(native, "build", build)
    state.setenv(native.VARIABLE, "build")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        first = Doing(native.is_enabled)
        assert begun.wait(60)
        others = [Doing(native.is_enabled) for _ in range(3)]
        for other in others:
            other.join(0.1)
        leave.set()
        assert [thread.result() for thread in (first, *others)] == [failing is None] * 4
    assert builds == [1]
    assert [str(warning.message).partition(" ")[0] for warning in said] == [f"{native.VARIABLE}=build"] * bool(failing)


def test_code_that_decides_while_another_thread_loads_has_the_last_word(
    slow: tuple[threading.Event, threading.Event],
) -> None:
    begun, leave = slow
    first = Doing(native.operator)
    assert begun.wait(60)
    second = Doing(native.disable)
    second.join(0.1)
    leave.set()
    first.result(), second.result()
    assert not native.is_enabled()


def test_an_interrupted_build_is_asked_for_again(slow: Any, state: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    slow[1].set()
    state.setenv(native.VARIABLE, "build")
    state.setattr(native, "build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        native.operator()
    state.setattr(native, "build", lambda: None)
    assert native.is_enabled()


# --- libraries that are not what they should be ----------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "text", "text with a digest", "folder"])
def test_a_damaged_library_is_refused(built_operator: Path, cache: Path, damage: str) -> None:
    library = _library(built_operator)
    content = library.read_bytes()
    path = native.library_path()
    path.parent.mkdir(parents=True)
    if damage == "folder":
        path.mkdir()
    else:
        flipped = bytes([content[len(content) // 2] ^ 4])
        path.write_bytes(
            {
                "truncated": content[: len(content) // 2],
                "one bit": content[: len(content) // 2] + flipped + content[len(content) // 2 + 1 :],
                "empty": b"",
                "text": b"no library" * 10,
                "text with a digest": _with_digest(b"no library"),
            }[damage]
        )
    with pytest.raises(RuntimeError, match=rf"operator at .*{path.name} cannot be loaded: .*Delete the file"):
        native.enable()
    assert native._operator is None


def test_the_name_tells_releases_processors_and_sources_apart(cache: Path, state: pytest.MonkeyPatch) -> None:
    paths = {native.library_path()}
    state.setattr(torch, "__version__", "1.0.0")
    paths.add(native.library_path())
    state.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    paths.add(native.library_path())
    source = cache / "source.cpp"
    source.write_text("int nothing;")
    state.setattr(native, "_SOURCE", source)
    paths.add(native.library_path())
    assert len(paths) == 4
    assert {path.parent for path in paths} == {cache / "ikl_plugins"}
    state.delenv("XDG_CACHE_HOME")
    state.setenv("HOME", "/somebody")
    assert native.library_path().parent == Path("/somebody/.cache/ikl_plugins")


# --- refusals --------------------------------------------------------------------------------------------------------

# What the compiler does, or None for none on the PATH -> the fragment of the error.
COMPILERS = [
    ("echo ugly line >&2; exit 3", r"must compile .*decoupled_kl\.cpp, but ended with 3:\nugly line"),
    ("exit 0", "must compile .* but ended with 0"),
    ("kill -9 $$", "must compile .* but ended with -9"),
    (None, r"needs a C\+\+ compiler, but none of g\+\+, clang\+\+, c\+\+ is on"),
]


@pytest.mark.parametrize(("body", "message"), COMPILERS)
def test_compilers_that_fail(cache: Path, state: pytest.MonkeyPatch, body: str | None, message: str) -> None:
    if body is None:
        state.setenv("PATH", str(cache))
    else:
        state.setenv("CXX", _compiler(cache, body))
    with pytest.raises(RuntimeError, match=message):
        native.build()
    assert list((cache / "ikl_plugins").iterdir()) == []


def _without_digest(cache: Path) -> None:
    path = native.library_path()
    path.parent.mkdir(parents=True)
    other = Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so"
    path.write_bytes(_with_digest(other.read_bytes()))


def _full_disk(cache: Path) -> None:
    (cache / "ikl_plugins").write_text("a file where the folder should be")


@pytest.mark.parametrize(
    ("prepare", "call", "error", "message"),
    [
        (lambda state, cache: None, native.enable, RuntimeError, "must be built, but there is no .*decoupled_kl-"),
        (lambda state, cache: _without_digest(cache), native.enable, RuntimeError, "it holds no operator"),
        (
            lambda state, cache: state.setattr(sys, "platform", "win32"),
            native.build,
            RuntimeError,
            "must be Linux, got",
        ),
        (lambda state, cache: _full_disk(cache), native.build, RuntimeError, "must be writable.*XDG_CACHE_HOME"),
        (
            lambda state, cache: state.setattr(native, "_SOURCE", cache / "nothing.cpp"),
            native.library_path,
            RuntimeError,
            r"must hold the operator's source, but .*nothing\.cpp",
        ),
        (
            lambda state, cache: state.setenv("CXX", "/no/such --fast"),
            native.build,
            RuntimeError,
            "(?s)127:.*No such",
        ),
        (lambda state, cache: state.setenv(native.VARIABLE, "yes"), native.operator, ValueError, "'build', got 'yes'"),
        (lambda state, cache: state.setenv(native.VARIABLE, " 1"), native.is_enabled, ValueError, "got ' 1'"),
    ],
)
def test_refusals(
    cache: Path,
    state: pytest.MonkeyPatch,
    prepare: Callable[[pytest.MonkeyPatch, Path], Any],
    call: Callable[[], Any],
    error: type[Exception],
    message: str,
) -> None:
    prepare(state, cache)
    for _ in range(2):  # every time
        with pytest.raises(error, match=message):
            call()
    assert native._operator is None


# --- building --------------------------------------------------------------------------------------------------------


def test_a_second_build_finds_the_first_and_a_damaged_one_is_built_again(
    built_operator: Path, cache: Path, state: pytest.MonkeyPatch
) -> None:
    state.setenv("CXX", _copying_compiler(cache, built_operator))
    path = native.build()
    content = path.read_bytes()
    assert native.build() == path
    assert (cache / "log").read_text().split() == ["compiled"]
    path.write_bytes(content[:-1])
    assert native.build() == path
    assert path.read_bytes() == content
    assert (cache / "log").read_text().split() == ["compiled"] * 2


def test_two_processes_that_build_at_once_leave_one_whole_library(built_operator: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        native.VARIABLE: "build",
        "XDG_CACHE_HOME": str(tmp_path / "new"),
        # Each waits in the compiler for the other.
        "CXX": _copying_compiler(
            tmp_path,
            built_operator,
            f'touch "{tmp_path}/in.$$"\nn=0\n'
            f'while [ "$(ls "{tmp_path}" | grep -c "^in\\.")" -lt 2 ] && [ $n -lt 300 ]\n'
            "do sleep 0.1; n=$((n+1)); done",
        ),
    }
    code = "from ikl_plugins import native; print(native.is_enabled())"
    both = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", code], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=120)[0].split() for process in both] == [[b"True"]] * 2
    assert (tmp_path / "log").read_text().split() == ["compiled"] * 2
    (library,) = (tmp_path / "new" / "ikl_plugins").iterdir()
    assert native._is_whole(library)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_builds_and_checks(built_operator: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(built_operator)}
    command = [sys.executable, "-W", "error", "-m", "ikl_plugins", "build"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    library = _library(built_operator)
    first, second = done.stdout.splitlines()
    assert first == f"Built: {library}"
    assert second.startswith("Gradients agree to ")
    assert second.endswith(f"{native.VARIABLE}=1 in the environment.")


@pytest.mark.parametrize("wrong", [1.0 + 1e-3, math.nan], ids=str)
def test_the_command_deletes_a_wrong_operator(
    built_operator: Path, operator: Calls, state: pytest.MonkeyPatch, tmp_path: Path, wrong: float
) -> None:
    folder = tmp_path / "ikl_plugins"
    folder.mkdir()
    shutil.copy(_library(built_operator), folder)
    state.setenv("XDG_CACHE_HOME", str(tmp_path))
    right = native._loaded()
    assert right is not None

    def operator_that_is_off(*arguments: Any, **settings: Any) -> Any:
        *values, student, teacher = right(*arguments, **settings)
        return *values, student * wrong, teacher

    state.setattr(native, "_loaded", lambda: operator_that_is_off)
    with pytest.raises(SystemExit, match=r"differ by .*been deleted.*CXX"):
        main(["build"])
    assert list(folder.iterdir()) == []

"""The C++ operator: when it is used and when not, how it is built, and what happens where it cannot be."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ikl_plugins import IKLLoss, _way, dkl_loss, gkl_loss, ikl_loss, native
from ikl_plugins.commands.main import main

LOSSES = {"dkl": dkl_loss, "ikl": ikl_loss, "gkl": gkl_loss}
DIGEST = hashlib.sha256().digest_size
VARIABLES = ("IKL_PLUGINS_KERNEL", "IKL_PLUGINS_NATIVE")


class Calls(list[tuple[Any, ...]]):
    """The arguments of each call of the operator."""


@pytest.fixture
def state() -> Iterator[pytest.MonkeyPatch]:
    """The modules as in a new process; as they were afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_undecided", True)
        patch.setattr(native, "_operator", None)
        patch.setattr(native, "_loaded", None)
        patch.setattr(_way, "_is_read", False)
        for name in (*VARIABLES, "CXX"):
            patch.delenv(name, raising=False)
        yield patch


@pytest.fixture
def operator(state: pytest.MonkeyPatch, built_operator: Path) -> Calls:
    """The operator as the losses use it; it notes its calls."""
    state.setenv("XDG_CACHE_HOME", str(built_operator))
    found, calls = native.operator(), Calls()
    assert found is not None

    def noted(*arguments: Any) -> Any:
        calls.append(arguments)
        return found(*arguments)

    state.setattr(native, "_operator", noted)
    return calls


@pytest.fixture
def cache(state: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder."""
    state.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def _python(code: str, *options: str, **environment: str) -> str:
    """What a new process prints, with the operator's own variables and no others of them."""
    clean = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, "CXX")}
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _library(built_operator: Path) -> Path:
    """The operator there; a folder that is kept has those of other sources as well."""
    return built_operator / "ikl_plugins" / native.library_path().name


def _compiler(folder: Path, body: str) -> str:
    """A command that is called like a compiler and does what ``body`` says with the output's name in $out."""
    script = folder / "compiler"
    script.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nout="$2"\n' + body)
    script.chmod(0o755)
    return str(script)


def _copying_compiler(folder: Path, built_operator: Path, before: str = "") -> str:
    """One that has the operator ready: a real compiler takes seconds."""
    (folder / "ready").write_bytes(_library(built_operator).read_bytes()[:-DIGEST])
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
    found = _python(code, XDG_CACHE_HOME=str(tmp_path), ATEN_CPU_CAPABILITY=capability).strip().lower()
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_16_bits_is_read_as_torch_reads_it(operator: Calls, dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(-1, 1)
    logits = torch.cat([numbers, torch.zeros_like(numbers)], 1)
    for student in (logits, logits.t().contiguous().t()):
        found = [ikl_loss(x, torch.zeros_like(x), reduction="none") for x in (student, logits.float())]
        torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
    assert len(operator) == 4


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


ELSEWHERE = ("dense", "meta", "subclass", "watched", "compiled", "negated", "zeros", "second derivatives")


@pytest.mark.parametrize("case", ELSEWHERE)
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
    elif case == "negated":  # what lies in memory is not what torch makes of it
        student = torch.complex(student, student).conj().imag
        expected = oracles.decoupled("ikl", student.clone(), teacher).loss("batchmean")
        loss = ikl_loss(student, teacher)
    elif case == "zeros":
        expected = oracles.decoupled("ikl", torch.zeros_like(student), teacher).loss("batchmean")
        loss = ikl_loss(torch._efficientzerotensor((3, 5), dtype=torch.float64), teacher)
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


# Values of the variables -> whether an operator that has been built is used.
ENVIRONMENTS = [({}, True), ({"IKL_PLUGINS_KERNEL": "native"}, True), ({"IKL_PLUGINS_KERNEL": "walk"}, False)]
ENVIRONMENTS += [({"IKL_PLUGINS_KERNEL": "triton"}, False), ({"IKL_PLUGINS_NATIVE": "0"}, False)]
ENVIRONMENTS += [({"IKL_PLUGINS_NATIVE": "1"}, True), ({"IKL_PLUGINS_KERNEL": "", "IKL_PLUGINS_NATIVE": "build"}, True)]


@pytest.mark.parametrize(("environment", "used"), ENVIRONMENTS, ids=str)
def test_once_built_it_is_used_unless_the_environment_says_otherwise(
    state: pytest.MonkeyPatch, built_operator: Path, environment: dict[str, str], used: bool
) -> None:
    state.setenv("XDG_CACHE_HOME", str(built_operator))
    for name, value in environment.items():
        state.setenv(name, value)
    assert native.is_enabled() is used
    native.enable()  # code has the last word
    assert native.is_enabled()


@pytest.mark.parametrize("environment", [{}, {"IKL_PLUGINS_KERNEL": "walk"}], ids=str)
def test_where_it_is_not_built_nothing_happens(tmp_path: Path, environment: dict[str, str]) -> None:
    """No process is started, no library opened, nothing warned of; importing looks at no file of it."""
    code = """
import sys, torch
seen = []
sys.addaudithook(lambda event, arguments: seen.append((event, str(arguments))))
import ikl_plugins
ikl_plugins.IKLLoss()
assert not [arguments for event, arguments in seen if event == "open" and "decoupled_kl" in arguments]
assert any(event == "open" and "functional" in arguments for event, arguments in seen), "the hook saw nothing"
student = torch.randn(3, 5, requires_grad=True)
ikl_plugins.ikl_loss(student, torch.randn(3, 5)).backward()
assert not ikl_plugins.native.is_enabled()
assert not [event for event, _ in seen if event in ("subprocess.Popen", "os.system", "ctypes.dlopen")]
"""
    _python(code, "-W", "error", XDG_CACHE_HOME=str(tmp_path), **environment)


@pytest.mark.parametrize("named", [False, True])
def test_where_it_cannot_be_had_the_losses_go_on_without_it(
    cache: Path, state: pytest.MonkeyPatch, named: bool
) -> None:
    if named:
        state.setenv("IKL_PLUGINS_KERNEL", "native")
    else:  # there is one, but damaged
        native.library_path().parent.mkdir()
        native.library_path().write_bytes(b"no library")
    student, teacher = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    reason = "there is no .*Run `ikl build`" if named else "cannot load .*it is damaged"
    with pytest.warns(RuntimeWarning, match=rf"go on without the C\+\+ operator.*{reason}"):
        oracles.assert_matches(ikl_loss, "ikl", student, teacher)
    oracles.assert_matches(ikl_loss, "ikl", student, teacher)  # said once: a warning is an error here
    assert not native.is_enabled()


# --- several threads, several processes ------------------------------------------------------------------------------


class Doing(threading.Thread):
    """What a function gives or raises, from a thread of its own."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.function = function
        self.found: Any = None
        self.start()

    def run(self) -> None:
        self.found = self.function()

    def result(self) -> Any:
        self.join(60)
        assert not self.is_alive()
        return self.found


@pytest.fixture
def slow(state: pytest.MonkeyPatch, built_operator: Path) -> Iterator[tuple[threading.Event, threading.Event]]:
    """The operator says when its loading has begun, and waits for leave to end it."""
    begun, leave = threading.Event(), threading.Event()
    load = native._load

    def waiting() -> Any:
        begun.set()
        assert leave.wait(60)
        return load()

    state.setattr(native, "_load", waiting)
    state.setenv("XDG_CACHE_HOME", str(built_operator))
    yield begun, leave
    leave.set()


@pytest.mark.parametrize("ask", [native.operator, native.disable], ids=["a loss", "disable()"])
def test_who_comes_while_a_thread_loads_waits(
    slow: tuple[threading.Event, threading.Event], ask: Callable[[], Any]
) -> None:
    """A loss gets the same answer; code that decides has the last word."""
    begun, leave = slow
    first = Doing(native.operator)
    assert begun.wait(60)
    second = Doing(ask)
    second.join(0.2)
    assert second.is_alive(), f"it did not wait, and got {second.found}"
    leave.set()
    assert first.result() is not None
    assert second.result() is (first.found if ask is native.operator else None)
    assert native.is_enabled() is (ask is native.operator)


def test_an_interrupted_load_is_asked_for_again(state: pytest.MonkeyPatch, built_operator: Path) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    state.setenv("XDG_CACHE_HOME", str(built_operator))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_load", interrupted)
        with pytest.raises(KeyboardInterrupt):
            native.operator()
    assert native.is_enabled()


def test_a_forked_process_does_not_wait_for_threads_that_it_lacks(built_operator: Path) -> None:
    code = """
import os, torch
from ikl_plugins import ikl_loss, native
torch.set_num_threads(2)
student, teacher = torch.randn(512, 1000), torch.randn(512, 1000)
expected = ikl_loss(student, teacher)
assert native.is_enabled()
if (child := os.fork()) == 0:
    os._exit(0 if ikl_loss(student, teacher) == expected else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    _python(code, XDG_CACHE_HOME=str(built_operator))


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
    with pytest.raises(RuntimeError, match=rf"cannot load .*{path.name}: .*Delete it"):
        native.enable()
    assert native._operator is None


# What is done to folder and library -> why it is not loaded.
OTHERS: list[tuple[Callable[[Path, pytest.MonkeyPatch], Any], str]] = [
    (lambda path, state: path.chmod(0o666), r"others can write to .*\.so"),
    (lambda path, state: path.chmod(0o620), r"others can write to .*\.so"),
    (lambda path, state: path.parent.chmod(0o777), r"others can write to .*/ikl_plugins\b"),
    (lambda path, state: path.parent.chmod(0o1777), r"others can write to .*/ikl_plugins\b"),
    (lambda path, state: path.parent.chmod(0o770), r"others can write to .*/ikl_plugins\b"),
    (lambda path, state: path.parent.parent.chmod(0o777), "others can write to "),
    (lambda path, state: state.setattr(os, "geteuid", lambda: 54321), r"another user owns .*/ikl_plugins\b"),
    (
        lambda path, state: (path.rename(path.parent.parent / "l"), path.symlink_to("../l")),
        r"others can write to .*shared",
    ),
    (lambda path, state: path.parent.parent.chmod(0o1777), ""),
    (lambda path, state: path.chmod(0o755), ""),
]


@pytest.mark.skipif(sys.platform != "linux", reason="the operator is for Linux")
@pytest.mark.parametrize(("change", "reason"), OTHERS)
def test_what_others_can_write_is_not_loaded(
    built_operator: Path, cache: Path, state: pytest.MonkeyPatch, change: Callable[..., Any], reason: str
) -> None:
    shared = cache / "shared"
    state.setenv("XDG_CACHE_HOME", str(shared))
    path = native.library_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(_library(built_operator).read_bytes())
    path.chmod(0o600)
    if "shared" in reason:
        shared.chmod(0o777)
    change(path, state)
    if not reason:
        assert native.refusal() == ""
        assert native.is_enabled()
        return
    with pytest.warns(RuntimeWarning, match=rf"go on without the C\+\+ operator.*{reason}"):
        assert not native.is_enabled()
    assert re.search(reason, native.refusal())


def test_a_build_is_for_this_user_alone(built_operator: Path, cache: Path, state: pytest.MonkeyPatch) -> None:
    state.setenv("CXX", _copying_compiler(cache, built_operator))
    old = os.umask(0)
    try:
        state.setenv("XDG_CACHE_HOME", str(cache / "new" / "cache"))
        path = native.build()
        modes = [oct(one.stat().st_mode & 0o777) for one in (path, *list(path.parents)[:3])]
        assert modes == ["0o600", "0o700", "0o700", "0o700"]
        path.chmod(0o666)  # of an older release, and its folder
        path.parent.chmod(0o777)
        assert native.build() == path
        assert native.refusal() == ""
        (cache / "new").chmod(0o777)
        with pytest.raises(RuntimeError, match=r"would not be loaded: others can write to .*new\. Set XDG_CACHE_HOME"):
            native.build()
    finally:
        os.umask(old)


def test_the_name_tells_processors_and_sources_apart(cache: Path, state: pytest.MonkeyPatch) -> None:
    paths = {native.library_path()}
    state.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    paths.add(native.library_path())
    source = cache / "source.cpp"
    source.write_text("int nothing;")
    state.setattr(native, "_SOURCE", source)
    paths.add(native.library_path())
    assert len(paths) == 3
    assert {path.parent for path in paths} == {cache / "ikl_plugins"}
    state.delenv("XDG_CACHE_HOME")
    state.setenv("HOME", "/somebody")
    assert native.library_path().parent == Path("/somebody/.cache/ikl_plugins")


# --- refusals --------------------------------------------------------------------------------------------------------

# What the compiler does, or None for none on the PATH -> the fragment of the error.
COMPILERS = [
    ("echo ugly line >&2; exit 3", r"ended with 3:\nugly line"),
    ("exit 0", "ended with 0"),
    ("kill -9 $$", "ended with -9"),
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


def _no_folder(cache: Path) -> None:
    (cache / "ikl_plugins").write_text("a file where the folder should be")


# What is done before, the call, the fragment of its error.
REFUSALS: list[tuple[Callable[[pytest.MonkeyPatch, Path], Any], Callable[[], Any], str]] = [
    (lambda state, cache: None, native.enable, "there is no .*decoupled_kl-.*Run `ikl build`"),
    (lambda state, cache: _without_digest(cache), native.enable, "cannot load .*undefined symbol"),
    (lambda state, cache: state.setattr(sys, "platform", "win32"), native.build, "must be Linux, got win32"),
    (lambda state, cache: _no_folder(cache), native.build, "must be writable.*XDG_CACHE_HOME"),
    (lambda state, cache: state.setattr(native, "_SOURCE", cache / "no.cpp"), native.library_path, r"lacks .*no\.cpp"),
    (lambda state, cache: state.setenv("CXX", "/no/such --fast"), native.build, "(?s)127:.*No such"),
]


@pytest.mark.parametrize(("prepare", "call", "message"), REFUSALS)
def test_refusals(
    cache: Path,
    state: pytest.MonkeyPatch,
    prepare: Callable[[pytest.MonkeyPatch, Path], Any],
    call: Callable[[], Any],
    message: str,
) -> None:
    prepare(state, cache)
    for _ in range(2):  # every time
        with pytest.raises(RuntimeError, match=message):
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


def test_the_compiler_may_come_with_arguments(cache: Path, state: pytest.MonkeyPatch, built_operator: Path) -> None:
    script = _copying_compiler(cache, built_operator, 'case "$all" in "--fast -D"*) ;; *) exit 9;; esac')
    Path(script).write_text(Path(script).read_text().replace("#!/bin/sh\n", '#!/bin/sh\nall="$*"\n'))
    state.setenv("CXX", f"'{script}' --fast -DNAME='a b'")
    assert native.build().is_file()


def test_two_processes_that_build_at_once_leave_one_whole_library(built_operator: Path, tmp_path: Path) -> None:
    # Each waits in the compiler for the other.
    compiler = _copying_compiler(
        tmp_path,
        built_operator,
        f'touch "{tmp_path}/in.$$"\nn=0\n'
        f'while [ "$(ls "{tmp_path}" | grep -c "^in\\.")" -lt 2 ] && [ $n -lt 300 ]\n'
        "do sleep 0.1; n=$((n+1)); done",
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "new"), "CXX": compiler}
    code = "from ikl_plugins import native; native.build(); native.enable()"
    both = [subprocess.Popen([sys.executable, "-W", "error", "-c", code], env=environment) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert (tmp_path / "log").read_text().split() == ["compiled"] * 2
    (library,) = (tmp_path / "new" / "ikl_plugins").iterdir()
    assert native._checked(library) == library


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_builds_and_checks(built_operator: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(built_operator)}
    command = [sys.executable, "-W", "error", "-m", "ikl_plugins", "build"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built, agrees = done.stdout.splitlines()
    assert built == f"Built: {_library(built_operator)}"
    assert agrees.startswith("Gradients agree to ")


@pytest.mark.parametrize("wrong", [1.0 + 1e-3, math.nan], ids=str)
def test_the_command_deletes_a_wrong_operator(
    built_operator: Path, cache: Path, state: pytest.MonkeyPatch, wrong: float
) -> None:
    (cache / "ikl_plugins").mkdir()
    shutil.copy(_library(built_operator), cache / "ikl_plugins")
    right = native._load()

    def operator_that_is_off(*arguments: Any) -> Any:
        loss, terms, (student, teacher) = right(*arguments)
        return loss, terms, (student * wrong, teacher)

    state.setattr(native, "_loaded", operator_that_is_off)
    with pytest.raises(SystemExit, match=r"are off by .*been deleted.*CXX"):
        main(["build"])
    assert list((cache / "ikl_plugins").iterdir()) == []

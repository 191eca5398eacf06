"""Says which hosts work here, which known trap applies, and the command that cures it.

    ikl doctor
    ikl doctor --for torchdistill,mmpretrain
    ikl doctor --for robustbench --json

Each host is imported, and something small is built and run with it, in a process of its own. The exit code is 1 if the
losses themselves or a host of --for do not work. Only the standard library is needed to run this.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ikl_plugins._limits import one_line
from ikl_plugins._way import BUILD_ADVICE, VARIABLE

__all__ = ["Facts", "Host", "Trap", "configure", "diagnose", "gather", "probe", "run"]

CALLER = "ikl doctor"
PIP = "python -m pip"
REINSTALL = f"{PIP} install --force-reinstall WHEEL   # of ikl_plugins; in a clone: --editable ."
UPSTREAM = ("mmengine", "mmpretrain", "mmcv", "mmcv-lite")
FORK = ("onedl-mmengine", "onedl-mmpretrain", "onedl-mmcv")
DISTRIBUTIONS: tuple[str, ...] = ("ikl_plugins", "torch", "torchvision", "numpy", "torchdistill", *UPSTREAM, *FORK)
DISTRIBUTIONS += ("robustbench", "pyautoattack", "autoattack", "timm", "setuptools", "pyyaml", "opencv-python")
MODULES = ("pkg_resources", "autoattack", "pyautoattack", "ikl_plugins.robustbench")
_TIME_LIMIT = 300  # seconds for one host

# --- what is tried with each host: a program that says `worked: ...` -------------------------------------------------

_CORE = """
import torch, ikl_plugins
student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
ikl_plugins.IKLLoss()(student, teacher).backward()
if not torch.isfinite(student.grad).all():
    raise ValueError("the gradient of IKLLoss is not finite")
print("worked: IKLLoss, forward and backward")
"""
_TORCHDISTILL = """
import torch
import ikl_plugins.torchdistill
from torchdistill.core import distillation
from torchdistill.losses.registry import get_high_level_loss
place = {"student_module_path": ".", "student_module_io": "output",
         "teacher_module_path": ".", "teacher_module_io": "output"}
terms = {"ikl": {"criterion": {"key": "IKLLoss", "kwargs": {**place, "ce_weight": 1.0}}, "weight": 1.0}}
criterion = get_high_level_loss({"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}})
logits = torch.randn(4, 5, requires_grad=True)
io = {"student": {".": {"output": logits}}, "teacher": {".": {"output": torch.randn(4, 5)}}}
criterion(io, {}, torch.tensor([0, 1, 2, 3])).backward()
print("worked: a WeightedSumLoss with IKLLoss, forward and backward")
"""
_MMPRETRAIN = """
import os, tempfile, torch
import ikl_plugins.mmpretrain
from mmengine.logging import HistoryBuffer
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import load_checkpoint
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
init_default_scope("mmpretrain")
plain = dict(
    backbone=dict(type="ResNet_CIFAR", depth=18, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(1,),
                  stem_channels=4, base_channels=4),
    neck=dict(type="GlobalAveragePooling"), head=dict(type="LinearClsHead", num_classes=5, in_channels=8))
teacher = MODELS.build(dict(type="ImageClassifier", **plain))
model = MODELS.build(dict(type="DistillationClassifier", teacher=teacher, **plain))
losses = model.loss(torch.randn(2, 3, 8, 8), [DataSample().set_gt_label(label) for label in (0, 1)])
model.parse_losses(losses)[0].backward()
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "a.pth")
    torch.save({"state_dict": teacher.state_dict(), "message_hub": {"loss": HistoryBuffer([1.0], [1])}}, path)
    load_checkpoint(teacher, path)
print("worked: a DistillationClassifier, forward and backward, and a checkpoint read back")
"""
_ROBUSTBENCH = """
import importlib.util, torch
if importlib.util.find_spec("ikl_plugins.robustbench") is not None:
    import ikl_plugins.robustbench
import robustbench.eval
from autoattack import AutoAttack
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5)).eval()
attack = AutoAttack(model, norm="Linf", eps=8 / 255, version="custom", attacks_to_run=["apgd-ce"], device="cpu",
                    verbose=False, seed=0)
attack.apgd.n_iter = 2
images = torch.rand(2, 3, 4, 4)
adversarial = attack.run_standard_evaluation(images, model(images).argmax(1), bs=2)
if (adversarial - images).abs().max() > 8 / 255 + 1e-6:
    raise ValueError("APGD left the ball of radius 8/255")
print("worked: RobustBench imported, APGD on two images")
"""
_TORCH = """
import json, torch
gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
found = {"torch": torch.__version__, "cuda": torch.version.cuda or torch.version.hip,
         "gpus": [torch.cuda.get_device_name(number) for number in range(gpus)]}
try:
    from mmengine.runner import checkpoint
    found["safe_globals"] = hasattr(checkpoint, "get_torch_safe_globals")
except Exception:
    pass
try:
    from ikl_plugins import native
    found["operator"] = native.library_path().is_file()
    found["operator_refused"] = native.refusal()
except Exception:
    pass
try:
    from ikl_plugins import kernels
    found["kernels"] = [kernels.why_not(torch.device("cuda", number)) for number in range(gpus)]
except Exception as error:
    found["kernels"] = [f"the comparison fails: {error}"]
print("worked: " + json.dumps(found))
"""
PROBES = {"core": _CORE, "torchdistill": _TORCHDISTILL, "mmpretrain": _MMPRETRAIN, "robustbench": _ROBUSTBENCH}
HOSTS = ("torchdistill", "mmpretrain", "robustbench")


class Host(NamedTuple):
    """What came of trying a host."""

    name: str  # 'core' for the losses themselves
    installed: bool
    works: bool
    detail: str  # what was tried, or the error
    cure: str = ""  # the command that helps


class Trap(NamedTuple):
    """A known trap that applies to this environment."""

    name: str
    hosts: tuple[str, ...]  # whom it concerns; 'core' for all
    breaks: bool  # whether something does not work because of it; else it limits or is worth knowing
    detail: str  # what is the case, and what follows
    cure: str  # the exact command, or the line of a config


class Facts(NamedTuple):
    """What the traps are decided by.

    Attributes:
        python: version of the interpreter.
        versions: of the installed distributions, by name.
        modules: which of :data:`MODULES` can be found.
        torch: version with its build, None where torch cannot be imported.
        cuda: CUDA or ROCm version that torch is built for, None for a CPU build.
        gpus: names of the GPUs that torch can use.
        gpu_driver: whether a GPU's driver is there, whatever torch says.
        safe_globals: whether MMEngine brings its own list of names that a checkpoint may hold; None without MMEngine.
        operator: whether the C++ operator of the losses is built; None where the losses cannot be imported.
        operator_refused: why it is not loaded although it is built; '' where it is.
        kernels: of each GPU, why the Triton kernels do not serve there, '' if they agree with the composed losses.
    """

    python: str
    versions: Mapping[str, str]
    modules: Mapping[str, bool]
    torch: str | None = None
    cuda: str | None = None
    gpus: Sequence[str] = ()
    gpu_driver: bool = False
    safe_globals: bool | None = None
    operator: bool | None = None
    operator_refused: str = ""
    kernels: Sequence[str] = ()

    def has(self, *names: str) -> bool:
        """Whether any of these distributions is installed."""
        return any(name in self.versions for name in names)


def gather() -> Facts:
    """Looks at this environment; torch is imported in another process."""
    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    modules = {name: _findable(name) for name in MODULES}
    worked, detail = _run(_TORCH)
    driver = shutil.which("nvidia-smi") is not None or shutil.which("rocm-smi") is not None
    facts = Facts(platform.python_version(), versions, modules, gpu_driver=driver)
    return facts._replace(**json.loads(detail)) if worked else facts


def _findable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a parent package that is missing or broken
        return False


def _run(program: str) -> tuple[bool, str]:
    """Runs a program; whether it worked, and what it says of itself, or the last line of its error."""
    try:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIME_LIMIT)  # noqa: S603
    except subprocess.TimeoutExpired:
        return False, f"no answer within {_TIME_LIMIT} seconds"
    for line in reversed(done.stdout.splitlines()):
        if done.returncode == 0 and line.startswith("worked: "):
            return True, line.removeprefix("worked: ")
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in said if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    if not said:
        return False, f"the process ended with code {done.returncode} and said nothing"
    return False, one_line((errors or said)[-1])


def probe(name: str, facts: Facts) -> Host:
    """Tries a host: 'core' or one of :data:`HOSTS`."""
    install = f"{PIP} install 'ikl_plugins[{name}]'"
    names = ("mmpretrain", "onedl-mmpretrain") if name == "mmpretrain" else (name,)
    if name != "core" and not facts.has(*names):
        return Host(name, False, False, "not installed", install)
    worked, detail = _run(PROBES[name])
    return Host(
        name, True, worked, detail, "" if worked else REINSTALL if name == "core" else _cure_of(detail, install)
    )


def _cure_of(detail: str, install: str) -> str:
    """The command for a host that does not work, as far as its error tells."""
    missing = re.search(r"No module named '([\w.]+)'", detail)
    return {
        "pkg_resources": f"{PIP} install 'setuptools<82'",
        "autoattack": f"{PIP} install git+https://github.com/fra31/auto-attack",
        "mmcv": f"{PIP} install 'mmcv-lite>=2.2.0'",
        "ikl_plugins": REINSTALL,
    }.get(missing[1].partition(".")[0] if missing else "", install)


# --- the traps -------------------------------------------------------------------------------------------------------


def _version(text: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", (text or "").partition("+")[0])[:3])


def _core_traps(facts: Facts) -> Iterator[Trap]:
    if _version(facts.python) < (3, 10):
        detail = f"Python {facts.python} is older than 3.10, which ikl_plugins needs."
        cure = "make an environment with a newer one: python3.11 -m venv .venv"
        yield Trap("python", ("core",), True, detail, cure)
    if facts.torch is None:
        held = facts.versions.get("torch")
        detail = f"torch {held} cannot be imported." if held else "torch is not installed."
        again = " --force-reinstall" if held else ""
        yield Trap("torch", ("core",), True, detail, f"{PIP} install{again} torch torchvision")
        return
    torch, vision = _version(facts.torch), _version(facts.versions.get("torchvision"))
    mm = facts.has("mmpretrain", "onedl-mmpretrain")
    if torch < ((2, 6) if mm else (2, 4)):
        needed, who = ("2.6", "the MMPretrain adapter") if mm else ("2.4", "ikl_plugins")
        detail = f"torch {facts.torch} is older than {needed}, which {who} needs."
        hosts = ("mmpretrain",) if torch >= (2, 4) else ("core",)
        yield Trap("torch version", hosts, True, detail, f"{PIP} install 'torch>={needed}' torchvision")
    if len(torch) > 1 and len(vision) > 1 and torch[0] == 2 and vision[0] == 0 and vision[1] != torch[1] + 15:
        pair = f"0.{torch[1] + 15}"
        versions = f"torchvision {facts.versions['torchvision']} is not built for torch {facts.torch}"
        cure = f"{PIP} install 'torchvision=={pair}.*' 'torch=={torch[0]}.{torch[1]}.*'"
        yield Trap("torchvision", HOSTS, True, f"{versions}, whose partner is {pair}.", cure)
    if facts.gpus:
        return
    if not facts.gpu_driver:
        yield _no_gpu(facts)
    elif facts.cuda is None:
        detail = f"torch {facts.torch} is a build for CPUs, but this machine has a GPU."
        cure = f"{PIP} install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/cu128"
        yield Trap("torch build", ("core",), False, detail, cure)
    else:
        built = f"torch {facts.torch} is built for {facts.cuda}"
        detail = f"{built}, but finds no GPU behind the driver (too old, or hidden)."
        cure = 'nvidia-smi && echo "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"'
        yield Trap("torch build", ("core",), False, detail, cure)


def _no_gpu(facts: Facts) -> Trap:
    said, cure = ["training runs on the CPU"], []
    if facts.has("mmpretrain", "onedl-mmpretrain"):
        said.append("MMEngine's AmpOptimWrapper insists on a GPU, and so do its data-parallel defaults")
        cure.append(
            "in an MMPretrain config: optim_wrapper = dict(type='AutocastOptimWrapper', ...); for several ranks "
            "custom_imports = dict(imports=['ikl_plugins.mmpretrain', 'ikl_plugins.mmpretrain.cpu_ranks'])"
        )
    if facts.has("torchdistill"):
        said.append("torchdistill's own script needs CUDA for several processes")
        cure.append("torchrun --nproc_per_node 2 -m ikl_plugins train CONFIG --device cpu")
    return Trap("no GPU", ("core",), False, f"There is no GPU: {'; '.join(said)}.", "; ".join(cure) or "--device cpu")


def _mm_traps(facts: Facts) -> Iterator[Trap]:
    hosts = ("mmpretrain",)
    upstream = [name for name in UPSTREAM if facts.has(name)]
    fork = [name for name in FORK if facts.has(name)]
    again = f"{PIP} install 'ikl_plugins[mmpretrain]'"
    if upstream and fork:
        names = f"{', '.join(upstream)} and {', '.join(fork)}"
        cure = f"{PIP} uninstall --yes {' '.join((*UPSTREAM, *FORK))} && {again}"
        yield Trap("two stacks", hosts, True, f"{names} have the same import names: one overwrites the other.", cure)
    if facts.has("mmpretrain", "onedl-mmpretrain"):
        engine, mmcv = "mmengine>=0.10.7", "mmcv-lite>=2.2.0"
        if facts.has("onedl-mmpretrain"):
            engine, mmcv = "onedl-mmengine>=0.10.12", "onedl-mmcv>=2.3.6"
        if not facts.has("mmengine", "onedl-mmengine"):
            detail = "MMPretrain needs MMEngine and does not declare it."
            yield Trap("mmengine missing", hosts, True, detail, f"{PIP} install '{engine}'")
        if not facts.has("mmcv", "mmcv-lite", "onedl-mmcv"):
            detail = "MMPretrain needs MMCV and does not declare it."
            yield Trap("mmcv missing", hosts, True, detail, f"{PIP} install '{mmcv}'")
    if facts.has("mmcv") and facts.has("mmcv-lite"):
        cure = f"{PIP} uninstall --yes mmcv mmcv-lite && {PIP} install 'mmcv-lite>=2.2.0'"
        yield Trap("mmcv twice", hosts, True, "mmcv and mmcv-lite are both installed, one over the other.", cure)
    elif facts.has("mmcv-lite"):
        detail = "mmcv-lite has no compiled operators: enough for classification, not for mmdet or mmseg."
        cure = f"{PIP} uninstall --yes mmcv-lite && {PIP} install mmcv   # compiles for minutes, only if you need them"
        yield Trap("mmcv-lite", hosts, False, detail, cure)
    if facts.has("onedl-mmpretrain", "onedl-mmengine") and not upstream:
        detail = "The MM stack is that of the maintained forks (onedl-*), whose loader knows weights_only."
        cure = f"none; for the other stack: {PIP} uninstall --yes {' '.join(FORK)} && {again}"
        yield Trap("fork", hosts, False, detail, cure)
    if facts.torch is not None and _version(facts.torch) >= (2, 6) and facts.safe_globals is False:
        engine = f"MMEngine {facts.versions.get('mmengine', '')}"
        detail = (
            f"torch {facts.torch} reads checkpoints with weights_only=True, which {engine} does not expect: --resume "
            f"and tools/test.py fail in a config that does not import ikl_plugins.mmpretrain."
        )
        cure = "in the config: custom_imports = dict(imports=['ikl_plugins.mmpretrain']); in a script: import that"
        yield Trap("weights_only", hosts, False, detail, cure)
    if facts.has("mmcv", "mmcv-lite") and _version(facts.versions.get("numpy")) >= (2,):
        numpy = f"NumPy {facts.versions['numpy']}"
        detail = f"MMCV's ColorJitter with a hue overflows on {numpy}; without hue it is right."
        yield Trap("numpy 2", hosts, False, detail, f"{PIP} install 'numpy<2'   # or leave `hue` out of ColorJitter")


def _torchdistill_traps(facts: Facts) -> Iterator[Trap]:
    version = facts.versions.get("torchdistill")
    if version is not None and _version(version) < (1, 1, 5):
        detail = f"torchdistill {version} is older than 1.1.5, the first tested one."
        yield Trap("torchdistill version", ("torchdistill",), True, detail, f"{PIP} install 'torchdistill>=1.1.5'")


def _robustbench_traps(facts: Facts) -> Iterator[Trap]:
    bench = facts.has("robustbench")
    shielded = facts.modules.get("ikl_plugins.robustbench", False)
    if not facts.modules.get("pkg_resources") and facts.has("robustbench", "mmengine"):
        hosts, said = [], []
        if bench:
            hosts.append("robustbench")
            stands_in = ": `import ikl_plugins.robustbench` first stands in for it" if shielded else ""
            said.append(f"RobustBench's loaders import it{stands_in}")
        if facts.has("mmengine"):
            hosts.append("mmpretrain")
            said.append("MMEngine needs it for configs named 'mmpretrain::...' and 'mmdet::...'")
        version = facts.versions.get("setuptools", "(none)")
        detail = f"setuptools {version} has no pkg_resources, which 82 removed. {'; '.join(said)}."
        yield Trap("setuptools", tuple(hosts), bench and not shielded, detail, f"{PIP} install 'setuptools<82'")
    if not bench:
        return
    if not facts.modules.get("autoattack"):
        cure = f"{PIP} install git+https://github.com/fra31/auto-attack"
        detail = "RobustBench imports autoattack, PyPI has pyautoattack alone"
        if not facts.modules.get("pyautoattack"):
            detail = "RobustBench imports autoattack; neither it nor pyautoattack is there"
            cure = f"{PIP} install 'pyautoattack>=0.2.0'"
        elif shielded:
            detail += ": it answers to that name behind `import ikl_plugins.robustbench`, and only there"
            cure += "   # only for scripts without that import"
        breaks = not (shielded and facts.modules.get("pyautoattack"))
        yield Trap("autoattack", ("robustbench",), breaks, f"{detail}.", cure)
    detail = "RobustBench installs a top-level package `tests`, which `import tests.x` of your project may find."
    cure = "run your tests as files: python -m pytest --import-mode=importlib"
    yield Trap("tests", ("robustbench",), False, detail, cure)


def diagnose(facts: Facts) -> list[Trap]:
    """The traps that apply, those that break something first."""
    traps = (_core_traps, _mm_traps, _torchdistill_traps, _robustbench_traps)
    return sorted((trap for found in traps for trap in found(facts)), key=lambda trap: not trap.breaks)


# --- the command -----------------------------------------------------------------------------------------------------


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--for", dest="wanted", default="", metavar="HOST[,HOST]", help=f"of {', '.join(HOSTS)}")
    parser.add_argument("--json", action="store_true", help="one JSON object on the standard output")


def _kernels_state(reason: str) -> str:
    return f"not used: {reason}" if reason else "agree with the composed losses"


def _report(facts: Facts, hosts: Sequence[Host], traps: Sequence[Trap], wanted: Sequence[str]) -> str:
    rows = {"python": f"{facts.python} on {platform.platform()}", **facts.versions}
    if facts.torch:
        rows["torch"] = facts.torch
    build = f"built for {facts.cuda}" if facts.cuda else "a CPU build"
    rows["GPU"] = f"{', '.join(facts.gpus) or 'none'} (torch is {build})"
    if facts.operator is not None:
        built = f"built; {VARIABLE}=walk leaves it out"
        if facts.operator_refused:
            built = f"not loaded: {facts.operator_refused}; mend that, or delete it, and run `ikl build`"
        rows["C++ operator"] = built if facts.operator else f"not built; {BUILD_ADVICE}"
    rows["Triton kernels"] = "; ".join(map(_kernels_state, facts.kernels)) or "not used: there is no CUDA device"
    named = os.environ.get(VARIABLE, "")
    native = facts.operator and not facts.operator_refused
    on_cpu, on_cuda = "native" if native else "walk", "walk" if any(facts.kernels) else "triton"
    ways = f"{on_cpu} on a CPU" + (f", {on_cuda} on CUDA" if facts.gpus else "")
    rows["losses go by"] = f"{named} where it can serve, as {VARIABLE} says" if named else ways
    lines = ["Versions", *(f"  {name:<18}{value}" for name, value in rows.items()), "", "Hosts"]
    for host in hosts:
        state = "works" if host.works else "BROKEN" if host.installed else "absent"
        asked = " (asked for)" if host.name in wanted else ""
        lines.append(f"  {host.name:<18}{state:<8}{host.detail}{asked}")
        if host.cure:
            lines.append(f"  {'':<18}cure: {host.cure}")
    lines += ["", "Traps" if traps else "Traps: none applies"]
    for trap in traps:
        lines.append(f"  {'!' if trap.breaks else '-'} {trap.name}: {trap.detail}")
        lines.append(f"      {trap.cure}")
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> None:
    """Prints what works; raises a RuntimeError if what was asked for does not."""
    wanted = [name.strip() for name in arguments.wanted.split(",") if name.strip()]
    for name in wanted:
        if name not in HOSTS:
            known = ", ".join(HOSTS)
            raise ValueError(f"{CALLER}: --for must be among {known}, got {name!r}. Separate them by commas.")
    facts = gather()
    hosts = [probe(name, facts) for name in ("core", *HOSTS)]
    concerned = {"core", *wanted, *(host.name for host in hosts if host.installed)}
    traps = [trap for trap in diagnose(facts) if concerned & set(trap.hosts)]
    failed = [host for host in hosts if not host.works and (host.name == "core" or host.name in wanted)]
    if arguments.json:
        content: dict[str, Any] = {"works": not failed, "facts": facts._asdict()}
        content |= {"hosts": [host._asdict() for host in hosts], "traps": [trap._asdict() for trap in traps]}
        print(json.dumps(content, indent=2, default=dict))
    else:
        print(_report(facts, hosts, traps, wanted))
    if failed:
        names = ", ".join("ikl_plugins itself" if host.name == "core" else host.name for host in failed)
        raise RuntimeError(f"{CALLER}: does not work here: {names}. Run: {failed[0].cure}")

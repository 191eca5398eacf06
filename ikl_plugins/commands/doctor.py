"""Says which hosts work here, which known trap applies, and the command that cures it.

    ikl doctor
    ikl doctor --for torchdistill,mmpretrain
    ikl doctor --for robustbench --json

Each host is imported, and something small is built and run with it, in a process of its own. The exit code is 1 if the
losses themselves or a host of --for do not work. Only the standard library is needed to run this.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["Facts", "Host", "Trap", "diagnose", "gather", "main", "probe"]

CALLER = "doctor"
PIP = "python -m pip"
DISTRIBUTIONS = (
    "ikl_plugins", "torch", "torchvision", "numpy", "torchdistill", "mmengine", "mmpretrain", "mmcv", "mmcv-lite",
    "onedl-mmengine", "onedl-mmpretrain", "onedl-mmcv", "robustbench", "pyautoattack", "autoattack", "timm",
    "setuptools", "pyyaml", "opencv-python",
)  # fmt: skip
UPSTREAM = ("mmengine", "mmpretrain", "mmcv", "mmcv-lite")
FORK = ("onedl-mmengine", "onedl-mmpretrain", "onedl-mmcv")
MODULES = ("pkg_resources", "autoattack", "pyautoattack", "ikl_plugins.robustbench")
_TIME_LIMIT = 300  # seconds for one host

# --- what is tried with each host: a program that says `worked: ...` -------------------------------------------------

_CORE = """
import torch, ikl_plugins
student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
ikl_plugins.IKLLoss()(student, teacher).backward()
assert torch.isfinite(student.grad).all()
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
assert (adversarial - images).abs().max() <= 8 / 255 + 1e-6
print("worked: RobustBench imported, APGD on two images")
"""
_TORCH = """
import json, torch
available = torch.cuda.is_available()
names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())] if available else []
try:
    from mmengine.runner import checkpoint
    own_list = hasattr(checkpoint, "get_torch_safe_globals")
except Exception:
    own_list = None
print("worked: " + json.dumps([torch.__version__, torch.version.cuda, torch.version.hip, available, names, own_list]))
"""
PROBES = {"core": _CORE, "torchdistill": _TORCHDISTILL, "mmpretrain": _MMPRETRAIN, "robustbench": _ROBUSTBENCH}
HOSTS = ("torchdistill", "mmpretrain", "robustbench")


@dataclasses.dataclass(frozen=True)
class Host:
    """What came of trying a host.

    Attributes:
        name: 'core' for the losses themselves, or a host.
        installed: whether its distribution is there.
        works: whether all that was tried worked.
        detail: what was tried, or the error.
        cure: the command that helps; empty where it works.
    """

    name: str
    installed: bool
    works: bool
    detail: str
    cure: str = ""


@dataclasses.dataclass(frozen=True)
class Trap:
    """A known trap that applies to this environment.

    Attributes:
        name: short name.
        hosts: whom it concerns; 'core' for all.
        breaks: whether something does not work because of it; else it limits or is worth knowing.
        detail: what is the case, and what follows.
        cure: the exact command, or the line of a config.
    """

    name: str
    hosts: tuple[str, ...]
    breaks: bool
    detail: str
    cure: str


@dataclasses.dataclass(frozen=True)
class Facts:
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
    """

    python: str
    versions: Mapping[str, str]
    modules: Mapping[str, bool]
    torch: str | None = None
    cuda: str | None = None
    gpus: Sequence[str] = ()
    gpu_driver: bool = False
    safe_globals: bool | None = None

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
    torch, cuda, hip, _, gpus, safe_globals = json.loads(detail) if worked else (None, None, None, False, [], None)
    driver = shutil.which("nvidia-smi") is not None or shutil.which("rocm-smi") is not None
    return Facts(
        platform.python_version(), versions, modules, torch, cuda or hip, tuple(gpus), driver, safe_globals
    )  # fmt: skip


def _findable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a parent package that is missing or broken
        return False


def _run(program: str) -> tuple[bool, str]:
    """Runs a program; whether it worked, and what it says of itself, or the last line of its error."""
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=_TIME_LIMIT)
    except subprocess.TimeoutExpired:
        return False, f"no answer within {_TIME_LIMIT} seconds"
    for line in reversed(done.stdout.splitlines()):
        if done.returncode == 0 and line.startswith("worked: "):
            return True, line.removeprefix("worked: ")
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in said if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return False, (errors or said)[-1] if said else f"the process ended with code {done.returncode} and said nothing"


def probe(name: str, facts: Facts) -> Host:
    """Tries a host.

    Args:
        name: 'core' or one of :data:`HOSTS`.
        facts: of :func:`gather`.

    Returns:
        What came of it.
    """
    if name == "core":
        worked, detail = _run(PROBES[name])
        return Host(name, True, worked, detail, "" if worked else f"{PIP} install --editable .")
    names = ("mmpretrain", "onedl-mmpretrain") if name == "mmpretrain" else (name,)
    install = f"{PIP} install 'ikl_plugins[{name}]'"
    if not facts.has(*names):
        return Host(name, False, False, "not installed", install)
    worked, detail = _run(PROBES[name])
    return Host(name, True, worked, detail, "" if worked else _cure_of(detail, install))


def _cure_of(detail: str, install: str) -> str:
    """The command for a host that does not work, as far as its error tells."""
    missing = re.search(r"No module named '([\w.]+)'", detail)
    if missing is None:
        return f"{install} --force-reinstall --no-deps" if "[" not in install else install
    module = missing[1].partition(".")[0]
    return {
        "pkg_resources": f"{PIP} install 'setuptools<82'",
        "autoattack": f"{PIP} install git+https://github.com/fra31/auto-attack",
        "mmcv": f"{PIP} install 'mmcv-lite>=2.2.0'",
        "ikl_plugins": f"{PIP} install --editable .",
    }.get(module, install)


# --- the traps -------------------------------------------------------------------------------------------------------


def _version(text: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", (text or "").partition("+")[0])[:3])


def _python(facts: Facts) -> Trap | None:
    if _version(facts.python) >= (3, 10):
        return None
    return Trap(
        "python", ("core",), True, f"Python {facts.python} is older than 3.10, which ikl_plugins needs.",
        "python3.11 -m venv .venv && .venv/bin/python -m pip install --editable .",
    )  # fmt: skip


def _setuptools(facts: Facts) -> Trap | None:
    if facts.modules.get("pkg_resources") or not facts.has("robustbench", "mmengine"):
        return None
    shielded = facts.modules.get("ikl_plugins.robustbench", False)
    said = []
    if facts.has("robustbench"):
        said.append(
            "RobustBench's loaders import it: `import ikl_plugins.robustbench` first stands in for it"
            if shielded else "RobustBench's loaders import it"
        )  # fmt: skip
    if facts.has("mmengine"):
        said.append("MMEngine needs it for configs named 'mmpretrain::...' and 'mmdet::...'")
    hosts = tuple(
        host for host, name in (("robustbench", "robustbench"), ("mmpretrain", "mmengine")) if facts.has(name)
    )
    return Trap(
        "setuptools", hosts, facts.has("robustbench") and not shielded,
        f"setuptools {facts.versions.get('setuptools', '(none)')} has no pkg_resources, which 82 removed. "
        f"{'; '.join(said)}.",
        f"{PIP} install 'setuptools<82'",
    )  # fmt: skip


def _weights_only(facts: Facts) -> Trap | None:
    if facts.torch is None or _version(facts.torch) < (2, 6) or facts.safe_globals is not False:
        return None
    return Trap(
        "weights_only", ("mmpretrain",), False,
        f"torch {facts.torch} reads checkpoints with weights_only=True, which MMEngine "
        f"{facts.versions.get('mmengine', '')} "
        f"does not expect: --resume and tools/test.py fail in a config that does not import ikl_plugins.mmpretrain.",
        "in the config: custom_imports = dict(imports=['ikl_plugins.mmpretrain']); in a script: import "
        "ikl_plugins.mmpretrain",
    )  # fmt: skip


def _mmcv(facts: Facts) -> Trap | None:
    if facts.has("mmcv") and facts.has("mmcv-lite"):
        return Trap(
            "mmcv twice", ("mmpretrain",), True, "mmcv and mmcv-lite are both installed, one over the other.",
            f"{PIP} uninstall --yes mmcv mmcv-lite && {PIP} install 'mmcv-lite>=2.2.0'",
        )  # fmt: skip
    if facts.has("mmpretrain", "onedl-mmpretrain") and not facts.has("mmcv", "mmcv-lite", "onedl-mmcv"):
        package = "onedl-mmcv>=2.3.6" if facts.has("onedl-mmpretrain") else "mmcv-lite>=2.2.0"
        return Trap(
            "mmcv missing",
            ("mmpretrain",),
            True,
            "MMPretrain needs MMCV and does not declare it.",
            f"{PIP} install '{package}'",
        )
    if facts.has("mmcv-lite"):
        return Trap(
            "mmcv-lite", ("mmpretrain",), False,
            "mmcv-lite has no compiled operators: enough for classification, not for mmdet or mmseg.",
            f"{PIP} uninstall --yes mmcv-lite && {PIP} install mmcv   # compiles for minutes, only if you need them",
        )  # fmt: skip
    return None


def _mmengine(facts: Facts) -> Trap | None:
    if not facts.has("mmpretrain", "onedl-mmpretrain") or facts.has("mmengine", "onedl-mmengine"):
        return None
    package = "onedl-mmengine>=0.10.12" if facts.has("onedl-mmpretrain") else "mmengine>=0.10.7"
    return Trap(
        "mmengine missing", ("mmpretrain",), True, "MMPretrain needs MMEngine and does not declare it.",
        f"{PIP} install '{package}'",
    )  # fmt: skip


def _two_stacks(facts: Facts) -> Trap | None:
    upstream = [name for name in UPSTREAM if facts.has(name)]
    fork = [name for name in FORK if facts.has(name)]
    if not upstream or not fork:
        return None
    return Trap(
        "two stacks", ("mmpretrain",), True,
        f"{', '.join(upstream)} and {', '.join(fork)} have the same import names: one's files are over the other's.",
        f"{PIP} uninstall --yes {' '.join((*UPSTREAM, *FORK))} && {PIP} install 'ikl_plugins[mmpretrain]'",
    )  # fmt: skip


def _autoattack(facts: Facts) -> Trap | None:
    if not facts.has("robustbench") or facts.modules.get("autoattack"):
        return None
    if not facts.modules.get("pyautoattack"):
        return Trap(
            "autoattack", ("robustbench",), True, "RobustBench imports autoattack; neither it nor pyautoattack "
            "is there.",
            f"{PIP} install 'pyautoattack>=0.2.0'",
        )  # fmt: skip
    if facts.modules.get("ikl_plugins.robustbench"):
        return Trap(
            "autoattack", ("robustbench",), False,
            "RobustBench imports autoattack, PyPI has pyautoattack alone: it answers to that name behind `import "
            "ikl_plugins.robustbench`, and only there.",
            f"{PIP} install git+https://github.com/fra31/auto-attack   # only for scripts without that import",
        )  # fmt: skip
    return Trap(
        "autoattack", ("robustbench",), True, "RobustBench imports autoattack, PyPI has pyautoattack alone.",
        f"{PIP} install git+https://github.com/fra31/auto-attack",
    )  # fmt: skip


def _numpy(facts: Facts) -> Trap | None:
    if not facts.has("mmcv", "mmcv-lite") or _version(facts.versions.get("numpy")) < (2,):
        return None
    return Trap(
        "numpy 2", ("mmpretrain",), False,
        f"MMCV's ColorJitter with a hue overflows on NumPy {facts.versions['numpy']}; without hue it is right.",
        f"{PIP} install 'numpy<2'   # or leave `hue` out of ColorJitter",
    )  # fmt: skip


def _torch_missing(facts: Facts) -> Trap | None:
    if facts.torch is not None:
        return None
    state = f"torch {facts.versions['torch']} cannot be imported" if facts.has("torch") else "torch is not installed"
    again = " --force-reinstall" if facts.has("torch") else ""
    return Trap("torch", ("core",), True, f"{state}.", f"{PIP} install{again} torch torchvision")


def _torch_old(facts: Facts) -> Trap | None:
    if facts.torch is None:
        return None
    version = _version(facts.torch)
    mm = facts.has("mmpretrain", "onedl-mmpretrain")
    if version >= ((2, 6) if mm else (2, 4)):
        return None
    needed = "2.6" if mm else "2.4"
    return Trap(
        "torch version", ("mmpretrain",) if version >= (2, 4) else ("core",), True,
        f"torch {facts.torch} is older than {needed}, which {'the MMPretrain adapter' if mm else 'ikl_plugins'} needs.",
        f"{PIP} install 'torch>={needed}' torchvision",
    )  # fmt: skip


def _torchvision(facts: Facts) -> Trap | None:
    torch, vision = _version(facts.torch), _version(facts.versions.get("torchvision"))
    if len(torch) < 2 or len(vision) < 2 or torch[0] != 2 or vision[0] != 0 or vision[1] == torch[1] + 15:
        return None
    pair = f"0.{torch[1] + 15}"
    return Trap(
        "torchvision", HOSTS, True,
        f"torchvision {facts.versions['torchvision']} is not built for torch {facts.torch}, whose partner is {pair}.",
        f"{PIP} install 'torchvision=={pair}.*' 'torch=={torch[0]}.{torch[1]}.*'",
    )  # fmt: skip


def _torch_build(facts: Facts) -> Trap | None:
    if facts.torch is None or not facts.gpu_driver or facts.gpus:
        return None
    if facts.cuda is None:
        return Trap(
            "torch build", ("core",), False, f"torch {facts.torch} is a build for CPUs, but this machine has a GPU.",
            f"{PIP} install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/cu128",
        )  # fmt: skip
    return Trap(
        "torch build", ("core",), False,
        f"torch {facts.torch} is built for {facts.cuda}, but finds no GPU behind the driver (too old, or hidden).",
        "nvidia-smi && echo \"CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES\"",
    )  # fmt: skip


def _no_gpu(facts: Facts) -> Trap | None:
    if facts.torch is None or facts.gpus or facts.gpu_driver:
        return None
    said = ["training runs on the CPU"]
    cure = []
    if facts.has("mmpretrain", "onedl-mmpretrain"):
        said.append("MMEngine's AmpOptimWrapper insists on a GPU, and so do its data-parallel defaults")
        cure.append(
            "in an MMPretrain config: optim_wrapper = dict(type='AutocastOptimWrapper', ...); for several ranks "
            "custom_imports = dict(imports=['ikl_plugins.mmpretrain', 'ikl_plugins.mmpretrain.cpu_ranks'])"
        )
    if facts.has("torchdistill"):
        said.append("torchdistill's own script needs CUDA for several processes")
        cure.append("torchrun --nproc_per_node 2 ikl train CONFIG --device cpu")
    return Trap("no GPU", ("core",), False, f"There is no GPU: {'; '.join(said)}.", "; ".join(cure) or "--device cpu")


def _stack(facts: Facts) -> Trap | None:
    if not facts.has("onedl-mmpretrain", "onedl-mmengine") or facts.has(*UPSTREAM):
        return None
    return Trap(
        "fork", ("mmpretrain",), False,
        "The MM stack is that of the maintained forks (onedl-*), whose loader of checkpoints knows weights_only.",
        f"none; for the other stack: {PIP} uninstall --yes {' '.join(FORK)} && {PIP} install 'ikl_plugins[mmpretrain]'",
    )  # fmt: skip


def _torchdistill_old(facts: Facts) -> Trap | None:
    version = facts.versions.get("torchdistill")
    if version is None or _version(version) >= (1, 1, 5):
        return None
    return Trap(
        "torchdistill version", ("torchdistill",), True, f"torchdistill {version} is older than 1.1.5, the "
        f"first tested one.",
        f"{PIP} install 'torchdistill>=1.1.5'",
    )  # fmt: skip


def _tests_package(facts: Facts) -> Trap | None:
    if not facts.has("robustbench"):
        return None
    return Trap(
        "tests", ("robustbench",), False,
        "RobustBench installs a top-level package `tests`: `import tests.x` of your own project may find that one.",
        "run your tests as files: python -m pytest --import-mode=importlib",
    )  # fmt: skip


TRAPS: tuple[Callable[[Facts], Trap | None], ...] = (
    _python, _torch_missing, _torch_old, _torchvision, _torch_build, _no_gpu, _two_stacks, _mmengine, _mmcv, _stack,
    _weights_only, _numpy, _torchdistill_old, _setuptools, _autoattack, _tests_package,
)  # fmt: skip


def diagnose(facts: Facts) -> list[Trap]:
    """The traps that apply, those that break something first.

    Args:
        facts: of :func:`gather`, or made up.
    """
    found = [trap for trap in (check(facts) for check in TRAPS) if trap is not None]
    return sorted(found, key=lambda trap: not trap.breaks)


# --- the command -----------------------------------------------------------------------------------------------------


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--for", dest="wanted", default="", metavar="HOST[,HOST]", help=f"of {', '.join(HOSTS)}")
    parser.add_argument("--json", action="store_true", help="one JSON object on the standard output")


def _wanted(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in HOSTS:
            raise ValueError(
                f"{CALLER}: --for must be among {', '.join(HOSTS)}, got {name!r}. Separate them by commas."
            )
    return names


def _report(facts: Facts, hosts: Sequence[Host], traps: Sequence[Trap], wanted: Sequence[str]) -> str:
    lines = ["Versions", f"  {'python':<18}{facts.python} on {platform.platform()}"]
    for name, version in facts.versions.items():
        lines.append(f"  {name:<18}{facts.torch if name == 'torch' and facts.torch else version}")
    build = f"built for {facts.cuda}" if facts.cuda else "a CPU build"
    lines.append(f"  {'GPU':<18}{', '.join(facts.gpus) or 'none'} (torch is {build})")
    lines += ["", "Hosts"]
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
    """Prints what works; raises if what was asked for does not."""
    wanted = _wanted(arguments.wanted)
    facts = gather()
    hosts = [probe(name, facts) for name in ("core", *HOSTS)]
    concerned = {"core", *wanted, *(host.name for host in hosts if host.installed)}
    traps = [trap for trap in diagnose(facts) if concerned & set(trap.hosts)]
    failed = [host for host in hosts if not host.works and (host.name == "core" or host.name in wanted)]
    if arguments.json:
        content: dict[str, Any] = {
            "works": not failed,
            "facts": dataclasses.asdict(facts),
            "hosts": [dataclasses.asdict(host) for host in hosts],
            "traps": [dataclasses.asdict(trap) for trap in traps],
        }
        print(json.dumps(content, indent=2, default=dict))
    else:
        print(_report(facts, hosts, traps, wanted))
    if failed:
        names = ", ".join("ikl_plugins itself" if host.name == "core" else host.name for host in failed)
        raise RuntimeError(f"{CALLER}: does not work here: {names}. Run: {failed[0].cure}")

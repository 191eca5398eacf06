"""Hostile and damaged files through every reader: refused by name or read right, and never run.

- Files that would run code when they are unpickled, in many guises. The code would make a folder; there must be none.
- Files cut at random lengths, with a random bit flipped, and files that are something else.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
import subprocess
import tarfile
import time
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from campaign.digits import TORCHDISTILL, few_digits, mmpretrain_config, mmpretrain_teacher, quiet
from campaign.isolated import Answer, each
from campaign.kills import differences, replaced
from campaign.record import Record

from ikl_plugins.checkpoints import load_content, load_weights

__all__ = ["guises", "judge", "run"]

CUTS = {"load_content": 200, "others": 40}
FLIPS = {"load_content": 400, "others": 60}
TIMEOUT = 120.0
Read = Callable[[Path], Any]


class Bomb:
    """Pickles to a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Base(NamedTuple):
    """A sound file of one reader.

    Attributes:
        name: for the result.
        path: of the sound file.
        read: reads a file in its place, and returns what can be compared.
        checksums: whether the format has any; without, a flipped bit in a number cannot be found.
        many: whether this reader gets more cases than others.
        hostile: files that would run code in this reader alone, from the folder that they would make.
    """

    name: str
    path: Path
    read: Read
    checksums: bool = True
    many: bool = False
    hostile: Callable[[Path], dict[str, bytes]] | None = None


# --- files that would run code ---------------------------------------------------------------------------------------


def guises(marker: Path) -> dict[str, bytes]:
    """Files that would make the folder ``marker`` if they were unpickled freely, by what they hide it in."""
    command = f"mkdir {marker}"
    system = Bomb(os.system, command)
    weights = {"layer.weight": torch.zeros(2, 2)}
    objects = np.empty(1, dtype=object)
    objects[0] = system
    namespace = Namespace(seed=0)
    namespace.note = system
    dictionary: OrderedDict[str, Any] = OrderedDict(weights)
    dictionary.note = system  # type: ignore[attr-defined]  # an attribute, which pickle keeps
    found = {f"a pickle of protocol {protocol}": pickle.dumps(system, protocol) for protocol in range(6)}
    found["opcodes by hand"] = b"cos\nsystem\n(S'%s'\ntR." % command.encode()
    found["opcodes by hand, posix"] = b"cposix\nsystem\n(S'%s'\ntR." % command.encode()
    contents: dict[str, Any] = {
        "the whole content": system,
        "a list in a list": [[1, [system]]],
        "among the weights": {**weights, "layer.bias": system},
        "beside the weights": {"state_dict": weights, "meta": {"note": system}},
        "the optimizer": {"model": weights, "optimizer": {"state": {0: {"step": system}}, "param_groups": []}},
        "a key": {"model": weights, system: 1},
        "a namespace": {"model": weights, "args": namespace},
        "an attribute of a dictionary": {"model": dictionary},
        "an array of objects": {"model": weights, "history": objects},
        "eval": Bomb(eval, f"__import__('os').mkdir({str(marker)!r})"),
        "exec": Bomb(exec, f"import os; os.mkdir({str(marker)!r})"),
        "import": [Bomb(__import__, "antigravity"), Bomb(os.mkdir, str(marker))],
        "a process": Bomb(subprocess.Popen, ("mkdir", str(marker))),
        "getattr": Bomb(getattr, Bomb(__import__, "os"), "system"),
        "numpy.load": Bomb(np.load, str(marker), None, True),
        "torch.load": Bomb(torch.load, str(marker)),
        "a folder": Bomb(os.mkdir, str(marker)),
        "a copy": Bomb(shutil.copytree, str(marker.parent), str(marker)),
    }
    for name, content in contents.items():
        for form, zipped in (("zip", True), ("legacy", False)):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
            found[f"{form}: {name}"] = buffer.getvalue()
    found["tar of old torch"] = _tar(system)
    sound = io.BytesIO()
    torch.save({"model": weights}, sound)
    for name, member in (
        ("a pickle more", "archive/more.pkl"),
        ("a script of TorchScript", "archive/constants.pkl"),
        ("a pickle in another folder", "other/data.pkl"),
    ):
        found[f"zip: {name}"] = _with_member(sound.getvalue(), member, pickle.dumps(system))
    found["zip: a second data.pkl"] = _with_member(sound.getvalue(), "archive/data.pkl", pickle.dumps(system))
    found["numpy file of objects"] = _numpy(np.save, objects)
    found["numpy archive of objects"] = _numpy(np.savez, objects)
    return found


def _tar(content: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            text = pickle.dumps(content)
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
    return buffer.getvalue()


def _with_member(archive: bytes, name: str, content: bytes) -> bytes:
    import warnings

    buffer = io.BytesIO(archive)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name that is there already
        with zipfile.ZipFile(buffer, "a", zipfile.ZIP_STORED) as opened:
            opened.writestr(name, content)
    return buffer.getvalue()


def _numpy(save: Callable[..., None], content: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, content)
    return buffer.getvalue()


def _other_files() -> dict[str, bytes]:
    """Files that are no checkpoints."""
    empty_zip = io.BytesIO()
    with zipfile.ZipFile(empty_zip, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    table = io.BytesIO()
    np.save(table, np.zeros(3))
    return {
        "an empty file": b"", "one byte": b"\0", "text": b"no checkpoint\n" * 20, "zeros": bytes(4096),
        "a zip of text": empty_zip.getvalue(), "an array": table.getvalue(), "JSON": b'{"state_dict": {}}',
        "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(200), "a web page": b"<!doctype html><html>404</html>",
        "a pickled list": pickle.dumps([1, 2, 3]), "random bytes": random.Random(0).randbytes(3000),  # noqa: S311
    }  # fmt: skip


# --- the readers -----------------------------------------------------------------------------------------------------


def _bases(work: Path) -> list[Base]:
    """A sound file for each reader."""
    few = few_digits(work / "data")
    os.environ["IKL_PLUGINS_DATA"] = str(few)
    teacher = mmpretrain_teacher(work / "mm_teacher.pth")
    files = work / "sound"
    files.mkdir(exist_ok=True)
    driver, of_driver, of_teacher = _driver(work, files)
    host = _host(work, files, teacher)
    plain, legacy = files / "plain.pth", files / "legacy.pth"
    content = load_content(driver.path)
    torch.save(content["model"], plain)
    torch.save(content["model"], legacy, _use_new_zipfile_serialization=False)
    return [
        Base("load_content, of torchdistill", driver.path, load_content, many=True),
        Base("load_content, of MMPretrain", host.path, load_content, many=True),
        Base("load_content, legacy format", legacy, load_content, checksums=False, many=True),
        Base("load_weights", plain, load_weights),
        _robustbench(files),
        of_driver,
        of_teacher,
        host,
        *_evaluation(files),
    ]


def _driver(work: Path, files: Path) -> tuple[Base, Base, Base]:
    """The torchdistill driver: the last checkpoint on resume, and `src_ckpt`."""
    from ikl_plugins.torchdistill import training as driver

    text = (TORCHDISTILL / "ikl.yaml").read_text()
    folder = work / "driver"
    folder.mkdir(exist_ok=True)
    teacher = files / "td_teacher.pt"
    torch.manual_seed(0)
    from torchdistill.models.registry import get_model

    import ikl_plugins.torchdistill  # noqa: F401  # registers the networks

    torch.save({"model": get_model("ikl_plugins.resnet14", num_classes=10).state_dict()}, teacher)
    config = folder / "config.yaml"
    config.write_text(
        replaced(
            text,
            ("num_epochs: 10", "num_epochs: 1"),
            ("runs/torchdistill/digits/teacher/teacher.pt", str(teacher)),
            ("runs/torchdistill/digits/ikl/ikl.pt", str(folder / "ikl.pt")),
        )
    )
    sound = files / "ikl_last.pt"
    if not sound.exists():
        driver.run(driver.load_config(config))
        shutil.copy(folder / "ikl_last.pt", sound)

    def resumed(path: Path) -> Any:
        _lay(path, folder / "ikl_last.pt")
        found = driver.run(driver.load_config(config), start_epoch=1)
        return {key: found[key] for key in ("history", "class_prior", "best_val_accuracy")}

    def started(path: Path) -> Any:
        loaded = driver.load_config(config)
        loaded["models"]["teacher_model"]["src_ckpt"] = str(path)
        _lay(sound, folder / "ikl_last.pt")
        trainer = driver.Trainer(loaded, torch.device("cpu"), 0)
        return trainer.box.teacher_model.state_dict()

    return (
        Base("", sound, load_content),
        Base("torchdistill driver, --start_epoch", sound, _named(resumed, "ikl_last.pt")),
        Base("torchdistill driver, src_ckpt", teacher, started),
    )


def _lay(path: Path, target: Path) -> None:
    """Copies a file or folder to where a reader looks for its file; one that is not there leaves nothing there."""
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    if path.is_dir():
        target.mkdir()
    elif path.exists():
        shutil.copy(path, target)


def _named(read: Read, name: str) -> Read:
    """The reader takes its file under this name, which its message has in place of the case's."""

    def inner(path: Path) -> Any:
        try:
            return read(path)
        except ValueError as error:
            raise ValueError(str(error).replace(name, path.name)) from error

    return inner


def _host(work: Path, files: Path, teacher: Path) -> Base:
    """MMPretrain's resume with IKLHook."""
    from mmengine.runner import Runner

    import ikl_plugins.mmpretrain  # noqa: F401  # registers

    folder = work / "host"

    def runner(**options: Any) -> Any:
        runner.count += 1  # type: ignore[attr-defined]
        config = mmpretrain_config(
            "distill_ikl", **{"model.teacher_ckpt": str(teacher), "work_dir": str(folder), "train_cfg.max_epochs": 1},
            **{"experiment_name": f"files_{os.getpid()}_{runner.count}", "model.teacher_val_batches": 0}, **options,
        )  # fmt: skip
        return Runner.from_cfg(config)

    runner.count = 0  # type: ignore[attr-defined]
    sound = files / "epoch_1.pth"
    if not sound.exists():
        runner().train()
        shutil.copy(folder / "epoch_1.pth", sound)

    def resumed(path: Path) -> Any:
        (folder / "last_checkpoint").write_text(str(path))
        found = runner(resume=True)
        found.train()
        return found.model.state_dict()

    def config_that_runs(marker: Path) -> dict[str, bytes]:
        """MMEngine reads the config in a checkpoint as a Python file when a run goes on."""
        base = marker.with_name("base.py")
        statement = f"__import__('os').mkdir({str(marker)!r})\n"  # what is imported by name is a stand-in there
        base.write_text(statement)
        texts = {
            "the config in `meta`": statement,
            "the base of the config in `meta`": f"_base_ = [{str(base)!r}]\n",
        }
        found = {}
        for name, text in texts.items():
            content = load_content(sound)
            content["meta"]["cfg"] = content["meta"]["config"] = text
            buffer = io.BytesIO()
            torch.save(content, buffer)
            found[name] = buffer.getvalue()
        return found

    return Base("MMPretrain resume, IKLHook", sound, resumed, hostile=config_that_runs)


def _robustbench(files: Path) -> Base:
    from ikl_plugins.models.robustbench_zoo import robustbench_network
    from ikl_plugins.robustbench import load_checkpoint

    torch.manual_seed(0)
    path = files / "wrn.pth"
    torch.save({"state_dict": robustbench_network("WideResNet-10-1", num_classes=10).state_dict()}, path)

    def read(one: Path) -> Any:
        return load_checkpoint(one, "WideResNet-10-1").state_dict()

    return Base("robustbench.load_checkpoint", path, read)


def _evaluation(files: Path) -> list[Base]:
    """The log of an evaluation, and the adversarial images beside it."""
    from torch import nn

    from ikl_plugins.robustbench.evaluation import evaluate
    from ikl_plugins.robustbench.evaluation_log import Evaluation

    log = files / "log.json"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10)).eval()
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = model(images).argmax(1)
    if not log.exists():
        evaluate(model, images, labels, eps="8/255", attacks=["apgd-ce"], batch_size=8, log=log)
    (archive,) = (files / "log_adversarial").glob("*.npz")

    def loaded(path: Path) -> Any:
        found = Evaluation.load(path)
        return {"log": found.log, "adversarial": dict(found.adversarial or {})}

    def read_log(path: Path) -> Any:
        folder = path.with_name(f"{path.stem}_adversarial")
        if path != log:
            shutil.copytree(files / "log_adversarial", folder, dirs_exist_ok=True)
        return loaded(path)

    def read_images(path: Path) -> Any:
        folder = path.with_suffix("") / "log_adversarial"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(log, folder.parent)
        _lay(path, folder / archive.name)
        return loaded(folder.parent / "log.json")

    return [
        Base("Evaluation.load, the log", log, read_log, checksums=False),
        Base("Evaluation.load, adversarial images", archive, _named(read_images, archive.name)),
    ]


# --- the campaign ----------------------------------------------------------------------------------------------------


def judge(answer: Answer, name: str, sound: Any, *, changed: str, checksums: bool, exploded: bool) -> tuple[str, str]:
    """The outcome of a case, and why it is a failure; '' if it is none.

    Args:
        answer: of the process that read the file.
        name: of the file.
        sound: what the sound file gives.
        changed: 'code', 'cut', 'flipped' or 'other file'.
        checksums: whether the format has any.
        exploded: whether the file's code has run.
    """
    if exploded:
        return "the code ran", f"{changed}: the marker is there"
    if answer.how in ("died", "hung"):
        return f"the process {answer.how}", changed
    if answer.how == "raised":
        kind, message, trace = answer.value
        if kind != "ValueError":
            return "another error", f"{kind}: {message}\n{trace}"
        return ("refused by name", "") if Path(name).stem in message else ("refused without the file's name", message)
    if sound is None:  # of a file that is somebody else's
        return ("read, and its code not run", "") if changed == "code" else ("read as something else", "")
    found = differences(answer.value, sound)
    if not found:
        return "read, with the same content", ""
    if changed == "flipped" and not checksums:
        return "read, with other content: the format has no checksums", ""
    return "read, with other content", ", ".join(found[:10])


def run(record: Record, work: Path, *, seed: int, quick: bool) -> None:
    """Damages a sound file of each reader, and reads.

    Args:
        record: of the part.
        work: folder for the files.
        seed: of the damages.
        quick: few cases.
    """
    quiet()
    work.mkdir(parents=True, exist_ok=True)
    marker, cases = work / "exploded", work / "cases"
    hostile, others = guises(marker), _other_files()
    record.fact("guises", len(hostile))
    bases = _bases(work)
    for base in bases:
        if record.done(base.name):
            continue
        shutil.rmtree(cases, ignore_errors=True)
        cases.mkdir()
        rng = random.Random(f"{seed} {base.name}")  # noqa: S311
        content = base.path.read_bytes()
        ending = base.path.suffix
        files: list[tuple[str, str, bytes]] = [("code", name, text) for name, text in hostile.items()]
        if base.hostile is not None:
            files += [("code", name, text) for name, text in base.hostile(marker).items()]
        files += [("other file", name, text) for name, text in others.items()]
        which = "load_content" if base.many else "others"
        share = 0.05 if quick else 1.0
        for length in sorted(rng.randrange(len(content)) for _ in range(round(CUTS[which] * share))):
            files.append(("cut", f"{length} of {len(content)} bytes", content[:length]))
        for _ in range(round(FLIPS[which] * share)):
            place, bit = rng.randrange(len(content)), rng.randrange(8)
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            files.append(("flipped", f"bit {bit} of byte {place} of {len(content)}", bytes(flipped)))
        (sound_answer,) = each([lambda _, base=base: base.read(base.path)], TIMEOUT)  # type: ignore[misc]
        if sound_answer.how != "returned":
            raise RuntimeError(f"{base.name}: the sound file cannot be read: {sound_answer.value}")

        paths = []
        for number, (_, _, text) in enumerate(files):
            paths.append(cases / f"case{number:04d}{ending}")
            paths[-1].write_bytes(text)
        (cases / f"case_folder{ending}").mkdir()
        files.append(("other file", "a folder", b""))
        paths.append(cases / f"case_folder{ending}")
        files.append(("other file", "nothing", b""))
        paths.append(cases / f"case_absent{ending}")

        def case(path: Path, base: Base = base) -> Callable[[Any], Any]:
            return lambda _: base.read(path)

        outcomes: Counter[str] = Counter()
        for (changed, name, _), path, answer in zip(files, paths, each([case(p) for p in paths], TIMEOUT), strict=True):
            exploded = marker.exists()
            if exploded:
                shutil.rmtree(marker)
            sound = sound_answer.value if changed in ("cut", "flipped") else None
            outcome, why = judge(answer, path.name, sound, changed=changed, checksums=base.checksums, exploded=exploded)
            outcomes[f"{changed}: {outcome}"] += 1
            if why:
                record.fail(base.name, number=path.name, input=f"{changed}: {name}", what=outcome, detail=why[-1500:])
        record.add(base.name, outcomes.elements())
        record.save(base.name)
        print(f"checkpoints, {base.name}: {sum(outcomes.values())} files", flush=True)
    shutil.rmtree(cases, ignore_errors=True)
    record.fact("seconds to read 100 MB", _cost(work, quick=quick))
    record.finish()


def _cost(work: Path, *, quick: bool) -> dict[str, float]:
    """What the checksums of a file of 100 MB cost, median of some readings; the file is in the page cache."""
    path = work / "large.pth"
    torch.save({"weights": {f"layer{i}": torch.randn(2_500_000) for i in range(10)}}, path)

    def seconds(read: Callable[[], Any]) -> float:
        found = []
        for _ in range(1 if quick else 7):
            begin = time.perf_counter()
            read()
            found.append(time.perf_counter() - begin)
        return round(sorted(found)[len(found) // 2], 4)

    def verify() -> None:
        with zipfile.ZipFile(path) as archive:
            archive.testzip()

    try:
        return {
            "megabytes": round(path.stat().st_size / 1e6, 1),
            "torch.load": seconds(lambda: torch.load(path, map_location="cpu", weights_only=True)),
            "load_content": seconds(lambda: load_content(path)),
            "its checksums alone": seconds(verify),
        }
    finally:
        path.unlink()

"""Every reader of files that somebody else may have written, each with a sound file."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from campaign.digits import TORCHDISTILL, mmpretrain_config, mmpretrain_teacher, replaced, torchdistill_teacher
from ikl_plugins.checkpoints import load_content, load_weights

Read = Callable[[Path], Any]


class Reader(NamedTuple):
    """A reader and its sound file."""

    path: Path  # of the sound file
    read: Read  # reads a file in its place, and returns what can be compared
    checksums: bool = True  # without, a flipped bit in a number cannot be found
    fills: bool = False  # what it reads goes into a network or a run, where an odd tensor must not get
    text: bool = False  # a config: nothing there is compared, and no bit flipped, as a host's tags run what they name
    hostile: Callable[[Path], dict[str, bytes]] = lambda marker: {}  # would run code and make that folder, here alone


def _lay(path: Path, target: Path) -> None:
    """Copies a file or folder to where a reader looks for its file; one that is not there leaves nothing there."""
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    if path.is_dir():
        target.mkdir()
    elif path.is_file():
        shutil.copy(path, target)
    elif path.is_symlink() or path.exists():  # a FIFO or a device
        target.symlink_to(path)


def _named(read: Read, name: str) -> Read:
    """The reader takes its file under this name, which its message has in place of the case's."""

    def inner(path: Path) -> Any:
        try:
            return read(path)
        except ValueError as error:
            raise ValueError(str(error).replace(name, path.name)) from error

    return inner


# --- torchdistill ----------------------------------------------------------------------------------------------------


def _driver(work: Path) -> tuple[Path, Path, Path]:
    """A config of one epoch, its teacher, and the last checkpoint of its run, laid aside."""
    from ikl_plugins.torchdistill import training

    config, teacher, sound = work / "config.yaml", work / "td_teacher.pt", work / "sound_ikl_last.pt"
    if not sound.exists():
        torchdistill_teacher(teacher)
        config.write_text(
            replaced(
                (TORCHDISTILL / "ikl.yaml").read_text(),
                ("num_epochs: 10", "num_epochs: 1"),
                ("runs/torchdistill/digits/teacher/teacher.pt", str(teacher)),
                ("runs/torchdistill/digits/ikl/ikl.pt", str(work / "ikl.pt")),
            )
        )
        training.run(training.load_config(config))
        shutil.copy(work / "ikl_last.pt", sound)
    return config, teacher, sound


def torchdistill_content(work: Path) -> Reader:
    return Reader(_driver(work)[2], load_content)


def torchdistill_resume(work: Path) -> Reader:
    from ikl_plugins.torchdistill import training

    config, _, sound = _driver(work)

    def read(path: Path) -> Any:
        _lay(path, work / "ikl_last.pt")
        found = training.run(training.load_config(config), start_epoch=1)
        return {key: found[key] for key in ("history", "class_prior", "best_val_accuracy")}

    return Reader(sound, _named(read, "ikl_last.pt"), fills=True)


def torchdistill_src_ckpt(work: Path) -> Reader:
    from ikl_plugins.torchdistill import training

    config, teacher, sound = _driver(work)

    def read(path: Path) -> Any:
        loaded = training.load_config(config)
        loaded["models"]["teacher_model"]["src_ckpt"] = str(path)
        _lay(sound, work / "ikl_last.pt")
        return training.Trainer(loaded, torch.device("cpu"), 0).box.teacher_model.state_dict()

    return Reader(teacher, read, fills=True)


def torchdistill_config(work: Path) -> Reader:
    from ikl_plugins.torchdistill import training

    return Reader(_driver(work)[0], training.load_config, text=True)


def adopted_config(work: Path) -> Reader:
    """Of torchdistill's own loss."""
    from ikl_plugins.commands import main

    sound = work / "kd.yaml"
    shutil.copy(TORCHDISTILL / "kd.yaml", sound)

    def read(path: Path) -> None:
        try:
            main.main(["adopt", str(path), "--loss", "IKL"])
        except SystemExit as end:
            if end.code:
                raise ValueError(str(end.code)) from end

    return Reader(sound, read, text=True)


def legacy_content(work: Path) -> Reader:
    """torch's format of before 1.6, which has no checksums."""
    path = work / "legacy.pth"
    torch.save(load_content(_driver(work)[2])["model"], path, _use_new_zipfile_serialization=False)
    return Reader(path, load_content, checksums=False)


def weights_alone(work: Path) -> Reader:
    path = work / "plain.pth"
    torch.save(load_content(_driver(work)[2])["model"], path)
    return Reader(path, load_weights)


# --- MMPretrain ------------------------------------------------------------------------------------------------------


def _resume_mmpretrain(work: Path, **options: Any) -> Any:
    from mmengine.runner import Runner

    import ikl_plugins.mmpretrain  # noqa: F401  # registers

    teacher = work / "mm_teacher.pth"
    if not teacher.exists():
        mmpretrain_teacher(teacher)
    fixed = {"model.teacher_ckpt": str(teacher), "model.teacher_val_batches": 0, "train_cfg.max_epochs": 1}
    runner = Runner.from_cfg(
        mmpretrain_config(
            "distill_ikl",
            **fixed,
            work_dir=str(work / "host"),
            experiment_name=f"files_{os.getpid()}",
            **options,
        )
    )
    runner.train()
    return runner.model.state_dict()


def _mmpretrain_checkpoint(work: Path) -> Path:
    sound = work / "epoch_1.pth"
    if not sound.exists():
        _resume_mmpretrain(work)
        shutil.copy(work / "host" / "epoch_1.pth", sound)
    return sound


def mmpretrain_content(work: Path) -> Reader:
    return Reader(_mmpretrain_checkpoint(work), load_content)


def mmpretrain_resume(work: Path) -> Reader:
    """With IKLHook."""
    sound = _mmpretrain_checkpoint(work)

    def read(path: Path) -> Any:
        (work / "host" / "last_checkpoint").write_text(str(path))
        return _resume_mmpretrain(work, resume=True)

    def config_that_runs(marker: Path) -> dict[str, bytes]:
        """MMEngine reads the config in a checkpoint as a Python file when a run goes on."""
        base = marker.with_name("base.py")
        statement = f"__import__('os').mkdir({str(marker)!r})\n"  # what is imported by name is a stand-in there
        base.write_text(statement)
        texts = {"the config": statement, "the base of the config": f"_base_ = [{str(base)!r}]\n"}
        found = {}
        for name, text in texts.items():
            content = load_content(sound)
            content["meta"]["cfg"] = content["meta"]["config"] = text
            buffer = io.BytesIO()
            torch.save(content, buffer)
            found[f"{name} in `meta`"] = buffer.getvalue()
        return found

    return Reader(sound, read, hostile=config_that_runs, fills=True)


def generated_images(work: Path) -> Reader:
    """The file that GeneratedImages maps."""
    from ikl_plugins.mmpretrain.npz_memmap import map_images

    path = work / "generated.npz"
    images, labels = _random_images()
    np.savez(path, image=images, label=labels)
    return Reader(path, lambda one: [array.read() for array in map_images(one)], checksums=False)


def _random_images() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return rng.integers(256, size=(20, 8, 8, 3), dtype=np.uint8), np.arange(20) % 10


# --- RobustBench -----------------------------------------------------------------------------------------------------


def robustbench_checkpoint(work: Path) -> Reader:
    from ikl_plugins.models.robustbench_zoo import robustbench_network
    from ikl_plugins.robustbench import load_checkpoint

    torch.manual_seed(0)
    path = work / "wrn.pth"
    torch.save({"state_dict": robustbench_network("WideResNet-10-1", num_classes=10).state_dict()}, path)
    return Reader(path, lambda one: load_checkpoint(one, "WideResNet-10-1").state_dict(), fills=True)


def images_in_an_archive(work: Path) -> Reader:
    from ikl_plugins.robustbench import load_images

    path = work / "images.npz"
    images, labels = _random_images()
    np.savez_compressed(path, image=images, label=labels)
    return Reader(path, lambda one: _content_of(load_images(one)), fills=True)


def images_in_folders(work: Path) -> Reader:
    """One image of two is the case's."""
    from PIL import Image

    from ikl_plugins.robustbench import load_images

    path = work / "image.png"
    Image.fromarray(_random_images()[0][0]).save(path)

    def read(one: Path) -> Any:
        folder = one.with_suffix("")
        for label in ("a", "b"):
            (folder / label).mkdir(parents=True)
        shutil.copy(path, folder / "a")
        _lay(one, folder / "b" / one.name)
        return _content_of(load_images(folder))

    return Reader(path, read, fills=True)


def _content_of(images: Any) -> Any:
    return {"images": images.images, "labels": images.labels}


def _evaluation_log(work: Path) -> Path:
    from ikl_plugins.robustbench.evaluation import evaluate

    log = work / "log.json"
    if not log.exists():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10)).eval()
        images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        labels = model(images).argmax(1)
        evaluate(model, images, labels, eps="8/255", attacks=["apgd-ce"], batch_size=8, log=log)
    return log


def _evaluation(path: Path) -> Any:
    from ikl_plugins.robustbench.evaluation.log import Evaluation

    found = Evaluation.load(path)
    return {"log": found.log, "adversarial": dict(found.adversarial or {})}


def evaluation_log(work: Path) -> Reader:
    log = _evaluation_log(work)

    def read(path: Path) -> Any:
        if path != log:
            images = path.with_name(f"{path.stem}_adversarial")
            shutil.copytree(work / "log_adversarial", images, dirs_exist_ok=True)
        return _evaluation(path)

    return Reader(log, read, checksums=False, fills=True)


def evaluation_images(work: Path) -> Reader:
    log = _evaluation_log(work)
    (archive,) = (work / "log_adversarial").glob("0-*.npz")

    def read(path: Path) -> Any:
        folder = path.with_suffix("") / "log_adversarial"
        shutil.copytree(archive.parent, folder, dirs_exist_ok=True)
        shutil.copy(log, folder.parent)
        _lay(path, folder / archive.name)
        return _evaluation(folder.parent / "log.json")

    return Reader(archive, _named(read, archive.name), fills=True)


READERS: dict[str, Callable[[Path], Reader]] = {
    "load_content, of torchdistill": torchdistill_content,
    "load_content, of MMPretrain": mmpretrain_content,
    "load_content, legacy format": legacy_content,
    "load_weights": weights_alone,
    "robustbench.load_checkpoint": robustbench_checkpoint,
    "torchdistill driver, --start_epoch": torchdistill_resume,
    "torchdistill driver, src_ckpt": torchdistill_src_ckpt,
    "MMPretrain resume, IKLHook": mmpretrain_resume,
    "load_images, .npz": images_in_an_archive,
    "load_images, an image of a folder": images_in_folders,
    "GeneratedImages, .npz": generated_images,
    "torchdistill driver, the config": torchdistill_config,
    "ikl adopt, the config": adopted_config,
    "Evaluation.load, the log": evaluation_log,
    "Evaluation.load, adversarial images": evaluation_images,
}

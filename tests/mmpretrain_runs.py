"""Runs of MMEngine's runner for the tests of the MMPretrain adapter: small ones here, real ones as processes."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from mmengine.dataset import pseudo_collate
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch.utils.data import DataLoader

from ikl_plugins.mmpretrain import training

REPOSITORY = Path(__file__).parents[1]
CONFIGS = REPOSITORY / "configs" / "mmpretrain"
TRAIN = ("-m", "ikl_plugins", "train")
CLASSES = 3


# --- in this process -------------------------------------------------------------------------------------------------


def images(count, seed=0, size=8):
    """Random images as a data set gives them."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "inputs": torch.randint(256, (3, size, size), dtype=torch.uint8, generator=generator),
            "data_samples": DataSample().set_gt_label(index % CLASSES),
        }
        for index in range(count)
    ]


def loader(count=10, batch_size=4, seed=0, size=8, **keywords):
    keywords.setdefault("shuffle", "sampler" not in keywords)
    return DataLoader(images(count, seed, size), batch_size=batch_size, collate_fn=pseudo_collate, **keywords)


def network(**keywords):
    """The config of a small classifier, changed by keywords."""
    return {
        "type": "ImageClassifier",
        "data_preprocessor": {"mean": [120.0] * 3, "std": [60.0] * 3, "num_classes": CLASSES},
        "backbone": {
            "type": "ResNet_CIFAR",
            "depth": 18,
            "num_stages": 2,
            "strides": (1, 2),
            "dilations": (1, 1),
            "out_indices": (1,),
            "stem_channels": 2,
            "base_channels": 2,
        },
        "neck": {"type": "GlobalAveragePooling"},
        "head": {"type": "LinearClsHead", "num_classes": CLASSES, "in_channels": 4},
        **keywords,
    }


def save_teacher(path):
    """Writes weights for ``network()`` that tell images apart, and returns where."""
    torch.manual_seed(1)
    model = MODELS.build(network())
    torch.nn.init.normal_(model.head.fc.weight)
    torch.save(model.state_dict(), path)
    return path


def distilled_network(teacher_ckpt, **keywords):
    """The config of a small student whose loss has a class prior."""
    return network(
        type="DistillationClassifier",
        teacher=network(),
        teacher_ckpt=str(teacher_ckpt),
        distill_loss={"type": "IKLLoss", "beta": 4.0, "global_info": True},
        **keywords,
    )


def runner(work_dir, model, *, hooks=({"type": "IKLHook"},), epochs=2, **keywords):
    """A runner of the stock kind that trains ``model`` on random images."""
    runner.count += 1
    settings = {
        "work_dir": str(work_dir),
        "train_dataloader": loader(),
        "train_cfg": {"by_epoch": True, "max_epochs": epochs},
        "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.05, "momentum": 0.9}},
        "default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 1}},
        "custom_hooks": list(hooks),
        "default_scope": "mmpretrain",
        "randomness": {"seed": 0},
        "log_level": "WARNING",
        # Loggers and message hubs are kept by name for the life of the process.
        "experiment_name": f"test_{os.getpid()}_{runner.count}",
    }
    return Runner(model=model, **{**settings, **keywords})


runner.count = 0


def by_iteration(iterations, interval, **loaders):
    """Settings of an iteration-based run."""
    return {
        "train_dataloader": loader(**loaders),
        "train_cfg": {"by_epoch": False, "max_iters": iterations},
        "default_hooks": {"checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": interval}},
    }


def prior_of(model):
    return model.distill_loss.class_prior


def assert_same(ours, theirs):
    """Holds two state dicts against each other, to the bit."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


class Bomb:
    """Pickles to a call that leaves a folder behind."""

    def __init__(self, path, function=os.mkdir):
        self.call = function, (str(path),)

    def __reduce__(self):
        return self.call


class Record(Hook):
    """Calls a function at the end of each epoch or iteration, before everything else."""

    priority = "HIGHEST"

    def __init__(self, **functions):
        for name, function in functions.items():
            setattr(self, name, function)


# --- as processes ----------------------------------------------------------------------------------------------------


def few_images(whole, target, train=8, val=3, test=3):
    """Copies the first images of each class of each split of a data set in class folders."""
    for split, count in (("train", train), ("val", val), ("test", test)):
        for label in sorted((whole / split).iterdir()):
            folder = target / split / label.name
            folder.mkdir(parents=True)
            for image in sorted(label.iterdir())[:count]:
                shutil.copy(image, folder)


def tool(name):
    """mmpretrain's installed tools/train.py or test.py."""
    return training.train_script().with_name(f"{name}.py")


def execute(*command, cwd, code=0, timeout=300, **environment):
    """Runs a Python command as a process of one thread, and returns what it has printed.

    The process must end with ``code``; None for any but 0. It imports the package of this repository.
    """
    path = os.pathsep.join([str(REPOSITORY), environment.pop("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, **environment},
    )
    output = done.stdout + done.stderr
    assert (done.returncode != 0) if code is None else done.returncode == code, output[-5000:]
    return output


@contextlib.contextmanager
def holding(path):
    """The number of a process that has a file locked, and is killed at the end."""
    program = (
        "import sys, ikl_plugins._files as f\nwith f.locked('', sys.argv[1], ''): print(flush=True), sys.stdin.read()"
    )
    words = [sys.executable, "-c", program, path]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()

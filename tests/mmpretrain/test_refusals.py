"""What the MMEngine and MMPretrain adapters refuse: call, error and the fragment that matters, a row each.

Refusals of the losses and of the two classifiers are in their own files.
"""

import re

import numpy
import pytest
import torch
from mmengine.dataset import ConcatDataset, DefaultSampler, InfiniteSampler
from mmengine.optim import OptimWrapper
from mmpretrain.datasets import CIFAR10, CustomDataset
from mmpretrain.registry import MODELS
from torch import nn

from ikl_plugins.mmpretrain import (
    AutocastOptimWrapper,
    BatchNormMomentumHook,
    EpochClassifier,
    FrozenTeacher,
    GeneratedBatchSampler,
    GeneratedImages,
    LogitsClsHead,
    ManyMediumFew,
    OneCycleMomentum,
    ResumableOneCycleLR,
    TwoViewDataPreprocessor,
    WarmupEMA,
    build_distillation_network,
    build_teacher,
    verify,
)
from ikl_plugins.mmpretrain.npz_memmap import unpack_npz

PACK = [{"type": "PackInputs"}]


def check(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- numbers and names -----------------------------------------------------------------------------------------------


def wrapped():
    return OptimWrapper(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9))


def momentum(**settings):
    return OneCycleMomentum(wrapped(), **{"end": 5, **settings})


def rate(**settings):
    return ResumableOneCycleLR(wrapped(), eta_max=0.2, **settings)


def bare():
    return type("Run", (), {"model": nn.Linear(1, 1), "iter": 0})()


MIXUP = {"augments": [{"type": "Mixup", "alpha": 0.8}]}


def head(feats):
    return LogitsClsHead(num_classes=3)(feats)


ARGUMENTS = {
    **{
        f"average {value!r}": (
            lambda value=value: WarmupEMA(nn.Linear(1, 1), momentum=value),
            ValueError,
            "`momentum` must be .* 0 and 1",
        )
        for value in (0, 1, -0.1, True, "0.005", None)
    },
    "base": (lambda: momentum(base_momentum=1.1), ValueError, "`base_momentum` must be from 0 to 1"),
    "max momentum": (lambda: momentum(max_momentum=-1), ValueError, "`max_momentum` must be a finite number"),
    "share": (lambda: momentum(pct_start="0.1"), TypeError, "`pct_start` must be a finite number"),
    "share of 2": (lambda: momentum(pct_start=2), ValueError, "`pct_start` must be from 0 to 1, got 2"),
    "strategy": (lambda: momentum(anneal_strategy="cosine"), ValueError, "`cosine`.*Known: cos, linear"),
    "no steps": (lambda: momentum(total_steps=0), ValueError, "`total_steps` must be the number of steps.*got 0"),
    "no end": (lambda: momentum(end=10**9), ValueError, "`total_steps` must be the number of steps.*got None"),
    "one step": (lambda: momentum(pct_start=0.2), ValueError, "OneCycleMomentum: .* 5 steps .*exactly one step"),
    "one step of the rate": (lambda: rate(pct_start=0.025, total_steps=40), ValueError, "40 steps .*exactly one step"),
    "statistics": (lambda: BatchNormMomentumHook(momentum=1.5), ValueError, r"`momentum` must be from 0 to 1"),
    "first statistics": (lambda: BatchNormMomentumHook(first_momentum=None), TypeError, "`first_momentum` must be a"),
    "no statistics": (lambda: BatchNormMomentumHook().before_train(bare()), ValueError, "have batch norm"),
    **{
        f"autocast {dtype}": (
            lambda dtype=dtype: AutocastOptimWrapper(wrapped().optimizer, dtype=dtype),
            ValueError,
            f"`dtype` must be 'bfloat16'.*use type='{way_out}OptimWrapper'",
        )
        for dtype, way_out in (("float16", "Amp"), (torch.float16, "Amp"), ("float32", ""), (None, ""))
    },
    "network": (lambda: build_distillation_network("resnet8x5", 9), ValueError, "Did you mean `resnet8x4`"),
    "module": (lambda: build_distillation_network("robustbench_zoo", 9), ValueError, "network `robustbench_zoo`"),
    "no classes": (lambda: build_distillation_network("resnet8", 0), ValueError, "`num_classes` must be an integer"),
    "classes": (lambda: build_distillation_network("resnet8", 1.5), TypeError, "`num_classes` must be an integer"),
    "head": (lambda: LogitsClsHead(0), ValueError, "LogitsClsHead: `num_classes` must be an integer"),
    "logits": (lambda: head(torch.zeros(2, 4)), ValueError, r"logits of shape \(N, 3\), got shape \(2, 4\)"),
    "maps": (lambda: head(torch.zeros(2, 3, 1, 1)), ValueError, r"got shape \(2, 3, 1, 1\)"),
    "nothing": (lambda: head(None), ValueError, "got a NoneType"),
    "no features": (lambda: head(()), ValueError, "got a tuple"),
    "mixed views": (
        lambda: TwoViewDataPreprocessor(batch_augments=MIXUP, num_classes=2),
        ValueError,
        "`batch_augments` must be None",
    ),
    "counts and data": (lambda: ManyMediumFew([1], train_dataset={}), ValueError, "must be given, got both"),
    "no counts": (lambda: ManyMediumFew(), ValueError, "must be given, got neither"),
    **{
        f"counts {counts!r}": (lambda counts=counts: ManyMediumFew(counts), TypeError, "`train_counts` must be a list")
        for counts in ([], [1, -1], [1.5], 7)
    },
    "bounds": (lambda: ManyMediumFew([1], many=10), ValueError, "`many` must be at least `few` - 1, got 10 and 20"),
    "few": (lambda: ManyMediumFew([1], few=-1), ValueError, "`few` must be a finite number of at least 0"),
    "no list": (lambda: ManyMediumFew("absent.txt"), ValueError, r"none at absent\.txt"),
    **{
        f"verify {address}": (lambda address=address: verify(address), ValueError, "http.*verify_checkpoints=False")
        for address in ("torchvision://resnet18", "s3://bucket/a.pth", "open-mmlab://resnet")
    },
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case):
    check(*ARGUMENTS[case])


@pytest.mark.parametrize("line", ["", "a.jpg", "a.jpg cat", "a.jpg -1", "a.jpg 1.0"])
def test_lines_of_a_list_file(tmp_path, line):
    (tmp_path / "list.txt").write_text(f"a.jpg 0\n{line}\nb.jpg 1\n")
    check(lambda: ManyMediumFew(tmp_path / "list.txt"), ValueError, r"line 2 of .*list\.txt is '")


# --- generated images ------------------------------------------------------------------------------------------------


def arrays(count=7, size=32):
    return {"image": numpy.zeros((count, size, size, 3), "u1"), "label": numpy.arange(count) % 3}


@pytest.fixture
def folder(tmp_path):
    for name, size in (("g", 32), ("small", 16)):
        numpy.savez(tmp_path / f"{name}.npz", **arrays(size=size))
    for name, array in arrays().items():
        numpy.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "magic.npy").write_bytes(numpy.lib.format.magic(3, 0))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "list.txt").write_text("a.png 0\nb.png 1\n")
    return tmp_path


FILES = {
    "label alone": (("image.npy",), {}, "`label_file` goes with `data_file` of type .npy"),
    "label too many": (("g.npz", "label.npy"), {}, "`label_file` goes with `data_file` of type .npy"),
    "absent": (("absent.npz",), {}, r"none at .*absent\.npz"),
    "no archive": (("text.npz",), {}, r"must be a whole \.npz file"),
    "no version": (("magic.npy", "magic.npy"), {}, r"version \(3, 0\)"),
    "no file": (([],), {}, "must name at least one file"),
    "one label": ((["a.npy", "b.npy"], "c.npy"), {}, "must name as many files as `data_file`, got 1 and 2"),
    "sizes": ((["g.npz", "small.npz"],), {}, r"images of one size, got \[\(16, 16\), \(32, 32\)\]"),
    "order": (("g.npz",), {"channel_order": "bgt"}, "`bgt`. Did you mean `bgr`"),
    "loads": (("g.npz",), {"pipeline": [{"type": "LoadImageFromFile"}]}, "`pipeline` must not load images"),
    "beyond": (("g.npz",), {"indices": [7]}, "`indices` must lie below the 7 images"),
    "before": (("g.npz",), {"indices": [-8]}, "`indices` must lie below the 7 images"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_of_generated_images(case, folder):
    files, settings, message = FILES[case]
    check(lambda: GeneratedImages(*files, data_root=folder, **settings), ValueError, f"^GeneratedImages: .*{message}")


ARRAYS = {
    "channels first": ({"image": numpy.zeros((7, 3, 32, 32), "u1")}, r"\(N, H, W, 3\), got uint8 and \(7, 3, 32, 32\)"),
    "floats": ({"image": numpy.zeros((7, 32, 32, 3), "f4")}, "uint8 .* got float32"),
    "grey": ({"image": numpy.zeros((7, 32, 3), "u1")}, r"got uint8 and \(7, 32, 3\)"),
    "fortran": ({"image": numpy.zeros((7, 32, 32, 3), "u1", order="F")}, "row by row, got one in Fortran order"),
    "fewer labels": ({"label": numpy.zeros(6, "i8")}, r"7 integers.* got int64 of shape \(6,\)"),
    "one-hot": ({"label": numpy.zeros((7, 10), "i8")}, r"7 integers.* got int64 of shape \(7, 10\)"),
    "float labels": ({"label": numpy.zeros(7, "f4")}, "7 integers.* got float32"),
    "objects": ({"label": numpy.array([None] * 7)}, r"label\.npy in .* got objects"),
    "single": ({"label": numpy.int64(3)}, "row by row, got a single value"),
    "other names": ({"images": 1, "image": None}, "must hold the arrays 'image' and 'label', but .* has images, label"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_of_another_form(case, tmp_path):
    changes, message = ARRAYS[case]
    content = {name: array for name, array in {**arrays(), **changes}.items() if array is not None}
    numpy.savez(tmp_path / "g.npz", **content)
    check(lambda: GeneratedImages(tmp_path / "g.npz"), ValueError, f"^GeneratedImages: .*{message}")


def test_truncated_and_damaged_files(folder):
    for name in ("image.npy", "label.npy"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1])
        message = rf"{name} must hold \(7.*the file ends before the last"
        check(lambda: GeneratedImages(folder / "image.npy", folder / "label.npy"), ValueError, message)
        (folder / name).write_bytes(whole)
    (folder / "g.npz").write_bytes((folder / "g.npz").read_bytes()[:5000])
    check(lambda: GeneratedImages(folder / "g.npz"), ValueError, r"must be a whole \.npz file")
    numpy.savez_compressed(folder / "packed.npz", image=numpy.random.default_rng(0).bytes(9000))
    content = bytearray((folder / "packed.npz").read_bytes())
    content[5000] ^= 255
    (folder / "packed.npz").write_bytes(content)
    for source, target, message in (
        ("packed.npz", "new.npz", r"`source` must be a whole \.npz file"),
        ("text.npz", "new.npz", r"`source` must be a whole \.npz file"),
        ("packed.npz", "packed.npz", "`target` must be another file"),
    ):
        check(lambda: unpack_npz(folder / source, folder / target), ValueError, f"^unpack_npz: {message}")  # noqa: B023
    assert not (folder / "new.npz").exists()


class LikeCIFAR(CIFAR10):
    """Images as MMPretrain's CIFAR-10 gives them, without the files."""

    def load_data_list(self):
        return [{"img": numpy.zeros((8, 8, 3), numpy.uint8), "gt_label": index % 3} for index in range(7)]


def mixed(folder, sampler=None, parts=None, batch_size=8, **settings):
    """A sampler for a real and a generated part, of which something is wrong."""
    parts = parts or [GeneratedImages(folder / "g.npz") for _ in range(2)]
    sampler = sampler or (lambda data: DefaultSampler(data, shuffle=True))
    inner = sampler(ConcatDataset(parts, ignore_keys="classes"))
    return GeneratedBatchSampler(inner, batch_size, **{"fraction": 0.7, **settings})


def loaded(folder):
    pipeline = [{"type": "LoadImageFromFile"}, *PACK]
    return CustomDataset(data_root=str(folder), ann_file="list.txt", pipeline=pipeline)


def made(folder, **settings):
    return GeneratedImages(folder / "g.npz", **settings)


def cifar(folder):
    return LikeCIFAR(data_root=str(folder), pipeline=PACK)


SAMPLERS = {
    "all generated": (lambda f: mixed(f, fraction=1.0), ValueError, "`fraction` must be below 1"),
    "negative": (lambda f: mixed(f, fraction=-0.1), ValueError, "`fraction` must be a finite number of at least 0"),
    "text": (lambda f: mixed(f, fraction="0.7"), TypeError, "`fraction` must be a finite number"),
    "no epoch": (lambda f: mixed(f, epoch_size=0), ValueError, "`epoch_size` must be an integer of at least 1, got 0"),
    "float epoch": (lambda f: mixed(f, epoch_size=5e4), TypeError, "`epoch_size` must be an integer"),
    "batch": (lambda f: mixed(f, batch_size=True), TypeError, "`batch_size` must be an integer"),
    "sampler": (lambda f: mixed(f, InfiniteSampler), ValueError, "DefaultSampler.*got InfiniteSampler"),
    "in order": (lambda f: mixed(f, lambda d: DefaultSampler(d, shuffle=False)), ValueError, "shuffle=True"),
    "one set": (lambda f: mixed(f, lambda d: DefaultSampler(d.datasets[0])), ValueError, "got GeneratedImages"),
    "one part": (lambda f: mixed(f, parts=[made(f)]), ValueError, "got one with a single part"),
    "no real": (lambda f: mixed(f, parts=[made(f, indices=0), made(f)]), ValueError, "GeneratedImages of none"),
    "no generated": (lambda f: mixed(f, parts=[made(f), made(f, indices=0)]), ValueError, "GeneratedImages of none"),
    "CIFAR and BGR": (lambda f: mixed(f, parts=[cifar(f), made(f)]), ValueError, "channel_order='rgb'.*to_rgb=False"),
    "files and RGB": (lambda f: mixed(f, parts=[loaded(f), made(f, channel_order="rgb")]), ValueError, "='bgr'.*=True"),
}


@pytest.mark.parametrize("case", SAMPLERS)
def test_samplers(case, folder):
    call, error, message = SAMPLERS[case]
    check(lambda: call(folder), error, f"^GeneratedBatchSampler: .*{message}")


def test_what_is_next_to_a_refusal_works(folder):
    for parts in (
        [cifar(folder), made(folder, channel_order="rgb")],
        [loaded(folder), made(folder)],
        [cifar(folder), cifar(folder)],
    ):
        assert len(mixed(folder, parts=parts)) == 1


# --- teachers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def teacher(small_network, tmp_path):
    """Builds a teacher from what a case changes; a checkpoint that fits is at `fits.pth`."""
    student = EpochClassifier(**small_network())
    config = {"type": "ImageClassifier", **small_network(channels=3)}
    weights = MODELS.build(config).state_dict()
    bias = weights["head.fc.bias"]
    narrow = MODELS.build({"type": "ImageClassifier", **small_network(channels=2)}).state_dict()
    for name, content in {
        "fits": weights,
        "short": {key: value for key, value in weights.items() if key != "head.fc.bias"},
        "long": {**weights, "distill_loss.x": bias, "neck.y": bias},
        "narrow": narrow,
    }.items():
        torch.save(content, tmp_path / f"{name}.pth")
    (tmp_path / "empty.py").write_text("optimizer = None\n")

    def build(module=None, weights=None, **changes):
        if "init_cfg" in changes:
            changes["init_cfg"] = {**changes["init_cfg"], "checkpoint": str(tmp_path / "fits.pth")}
        module = {None: {**config, **changes}, "empty.py": str(tmp_path / "empty.py")}.get(module, module)
        there = tmp_path / f"{weights}.pth"
        return build_teacher(module, str(there) if there.is_file() or "*" in str(there) else weights, student=student)

    return build


PART = {"type": "Pretrained", "prefix": "backbone"}
FEATURES = {"type": "ResNet_CIFAR", "depth": 18, "base_channels": 2, "stem_channels": 2}
TEACHERS = {
    "no config": ({"module": "gone.py"}, ValueError, r"`teacher` must be the path.*none at gone\.py"),
    "no model": ({"module": "empty.py"}, ValueError, r"a config with a `model`, but .*empty\.py has none"),
    "a number": ({"module": 3}, TypeError, "`teacher` must be the path of a config"),
    "no checkpoint": ({"weights": "gone.pth"}, ValueError, r"none at gone\.pth.*train the teacher first: ikl train"),
    "no best checkpoint": ({"weights": "best_*"}, ValueError, r"none at .*best_\*\.pth"),
    "two best checkpoints": ({"weights": "*o*"}, ValueError, r"must fit one file, .*\*o\*\.pth fits 3"),
    "scheme": ({"weights": "torchvision://resnet18"}, ValueError, r"must be a file or an http\(s\) address"),
    "untrained": ({}, ValueError, "`teacher_ckpt` must be given, got None"),
    "backbone alone": ({"init_cfg": PART}, ValueError, "backbone alone"),
    "missing": ({"weights": "short"}, ValueError, r"short\.pth .*missing: head\.fc\.bias"),
    "unexpected": ({"weights": "long"}, ValueError, r"long\.pth .*unexpected: neck\.y\. "),
    "shapes": ({"weights": "narrow"}, ValueError, r"backbone\.conv1\.weight \(2, 3, 3, 3\) instead of .* more"),
}


@pytest.mark.parametrize("case", TEACHERS)
def test_teachers(case, teacher):
    changes, error, message = TEACHERS[case]
    check(lambda: teacher(**changes), error, message)


def test_teachers_that_give_no_logits():
    inputs = torch.zeros(1, 3, 16, 16)
    for module, what in ((MODELS.build(FEATURES), "a tuple"), (nn.Conv2d(3, 2, 1), "shape (1, 2, 16, 16)")):
        message = rf"`{type(module).__name__}` must give logits of shape \(N, C\), got {re.escape(what)}"
        check(lambda: FrozenTeacher(module)(inputs), ValueError, message)  # noqa: B023

"""The images of an evaluation are those that the host's own test makes: the oracle of every test is that test."""

import argparse
import copy
import json

import numpy
import pytest
import torch
from torch import nn

pytest.importorskip("ikl_plugins.robustbench", reason="RobustBench is not installed", exc_type=ImportError)

from PIL import Image
from quick_autoattack import Quick, message, robustbench
from torchvision.datasets import ImageFolder

from ikl_plugins import models
from ikl_plugins.commands.main import main
from ikl_plugins.commands.model_options import LoadedModel, images_from
from ikl_plugins.robustbench import (
    HostImages,
    check_natural,
    evaluate,
    from_mmpretrain,
    from_torchdistill,
    images_of_mmpretrain,
    images_of_torchdistill,
    in_class_order,
    load_checkpoint,
    load_images,
)
from ikl_plugins.robustbench.mmpretrain_data import MMPretrainData

CLASSES = ("cat", "dog", "fox")
COUNT = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Class folders of images of 32x32: RGB, 16-bit grey, and RGBA; and a list that numbers the classes otherwise."""
    random = numpy.random.default_rng(0)
    root = tmp_path_factory.mktemp("host")
    lines = []
    for index in range(COUNT):
        name = f"{CLASSES[index % 3]}/{index:02}.png"
        pixels = random.integers(0, 256, (32, 32, 4))
        pixels[..., 0] //= 3  # red and blue far apart
        for kind, image in (
            ("rgb", Image.fromarray(pixels[..., :3].astype("uint8"))),
            ("rgba", Image.fromarray(pixels.astype("uint8"))),
            ("deep", Image.fromarray((257 * pixels[..., 1]).astype("uint16"))),
        ):
            (root / kind / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(root / kind / name)
        lines.append(f"{name} {(index + 1) % 3}")
    (root / "list.txt").write_text("\n".join(lines))
    pixels = random.integers(0, 256, (COUNT, 28, 28, 3), dtype="uint8")
    numpy.savez(root / "held.npz", image=pixels, label=numpy.arange(COUNT) % 3)
    for split in ("train", "t10k"):  # as MNIST is published
        head = numpy.array([0x803, COUNT, 28, 28], ">i4").tobytes()
        (root / f"{split}-images-idx3-ubyte").write_bytes(head + pixels[..., 0].tobytes())
        head = numpy.array([0x801, COUNT], ">i4").tobytes()
        (root / f"{split}-labels-idx1-ubyte").write_bytes(head + (numpy.arange(COUNT) % 3).astype("uint8").tobytes())
    return root


def spread_out(layer, logits):
    """Makes logits of the images differ by about 1 in each class, so that predictions are of several classes."""
    with torch.no_grad():
        layer.weight /= logits().std(0, keepdim=True).T
        layer.bias -= logits().mean(0)


# --- MMPretrain ------------------------------------------------------------------------------------------------------

MMPRETRAIN = """
custom_imports = dict(imports=['ikl_plugins.mmpretrain'])
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='ResNet_CIFAR', depth=18, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(1,),
        stem_channels=4, base_channels=4, in_channels={channels},
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=8),
    data_preprocessor=dict({preprocessor}),
)
test_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset={dataset},
)
test_cfg = dict()
test_evaluator = dict(type='Accuracy', topk=(1,))
"""
RGB = "mean=[120.3, 110.7, 100.1], std=[60.2, 55.4, 50.9], to_rgb=True"
LOAD, PACK = "dict(type='LoadImageFromFile')", "dict(type='PackInputs')"
PLAIN = (LOAD, PACK)
FOLDER = (
    "dict(type='CustomDataset', data_root={root!r}, data_prefix='rgb', serialize_data=False, pipeline={pipeline}{more})"
)


def loaded(more):
    return f"dict(type='LoadImageFromFile', {more})"


def torchvision(name, more=""):
    return f"dict(type='torchvision/{name}', {more})"


HELD = "dict(type='GeneratedImages', data_root={root!r}, data_file='held.npz', pipeline={pipeline}{more})"
RESIZE = "dict(type='Resize', scale=16)"
PIL = "dict(type='NumpyToPIL', to_rgb=True)"
LISTED = ", ann_file='list.txt', metainfo=dict(classes=('fox', 'cat', 'dog'))"
LIST_ALONE = LISTED.partition(", meta")[0]
FLOATS = "mean=[0.4, 0.5, 0.45], std=[0.2, 0.3, 0.25]"
# Pipeline, data preprocessor, dataset: the same predictions as the host's own test.
RIGHT = {
    "plain": {},
    "bgr": {"preprocessor": RGB.replace("to_rgb=True", "to_rgb=False")},
    "resized": {"pipeline": (LOAD, RESIZE, PACK)},
    "cropped": {"pipeline": (LOAD, "dict(type='ResizeEdge', scale=24)", "dict(type='CenterCrop', crop_size=20)", PACK)},
    "padded": {"pipeline": (LOAD, "dict(type='Pad', size=(40, 36), pad_val=dict(img=90))", PACK)},
    "padded far": {"pipeline": (LOAD, "dict(type='CenterCrop', crop_size=200, auto_pad=True)", PACK)},
    "floats": {"pipeline": (loaded("to_float32=True"), "dict(type='Resize', scale=20)", PACK)},
    "pillow": {"pipeline": (loaded("imdecode_backend='pillow'"), PACK)},
    "torchvision": {
        "pipeline": (LOAD, PIL, torchvision("Resize", "size=20"), torchvision("CenterCrop", "size=16"), PACK),
        "preprocessor": RGB.replace("to_rgb=True", "to_rgb=False"),
    },
    "and back": {"pipeline": (LOAD, PIL, torchvision("Resize", "size=20"), "dict(type='PILToNumpy')", PACK)},
    "tensor": {"pipeline": (LOAD, torchvision("ToTensor"), PACK), "preprocessor": FLOATS},
    "scaled": {
        "pipeline": (
            LOAD,
            PIL,
            torchvision("PILToTensor"),
            torchvision("ConvertImageDtype", "dtype='float'"),
            torchvision("Resize", "size=16, antialias=True"),
            PACK,
        ),
        "preprocessor": FLOATS,
    },
    "grey": {
        "pipeline": (loaded("color_type='grayscale'"), PACK),
        "preprocessor": "mean=[100.0], std=[60.0], to_rgb=True",
        "channels": 1,
    },
    "four channels": {
        "pipeline": (loaded("color_type='unchanged'"), PACK),
        "preprocessor": "mean=[100.0] * 4, std=[60.0] * 4",
        "channels": 4,
        "dataset": FOLDER.replace("'rgb'", "'rgba'"),
    },
    "16 bits": {"dataset": FOLDER.replace("'rgb'", "'deep'")},
    "held, rgb": {"dataset": HELD, "more": ", channel_order='rgb'", "pipeline": (RESIZE, PACK)},
    "held, bgr": {"dataset": HELD, "pipeline": (PIL, torchvision("Pad", "padding=2"), PACK)},
    "held, grey": {
        "dataset": "dict(type='MNIST', data_root={root!r}, split='test', serialize_data=False, pipeline={pipeline})",
        "preprocessor": "mean=[33.3], std=[78.6]",
        "channels": 1,
        "pipeline": (RESIZE, PACK),
    },
    "list": {"more": LISTED},
    "names": {"more": ", metainfo=dict(classes=('a', 'b', 'c'))"},
    "twice": {"dataset": f"dict(type='RepeatDataset', times=2, dataset={FOLDER})"},
    "joined": {"dataset": f"dict(type='ConcatDataset', datasets=[{FOLDER}, {FOLDER}])"},
    "fold": {"dataset": f"dict(type='KFoldDataset', num_splits=3, fold=1, test_mode=True, seed=4, dataset={FOLDER})"},
    "some": {"more": ", indices=[7, 2, 9, 0]"},
}


@pytest.fixture
def mmpretrain(root, tmp_path):
    """Writes a config and weights whose predictions are of several classes."""
    pytest.importorskip("mmpretrain.models")

    def write(pipeline=PLAIN, preprocessor=RGB, channels=3, dataset=FOLDER, more="", meta=None):
        from mmengine.config import Config
        from mmengine.registry import DefaultScope
        from mmpretrain.registry import DATASETS, MODELS

        path, checkpoint = tmp_path / "config.py", tmp_path / "epoch_1.pth"
        text = dataset.format(root=str(root), pipeline=f"[{', '.join(pipeline)}]", more=more)
        path.write_text(MMPRETRAIN.format(channels=channels, preprocessor=preprocessor, dataset=text))
        config = Config.fromfile(str(path))
        torch.manual_seed(2)
        with DefaultScope.overwrite_default_scope("mmpretrain"), torch.no_grad():
            network = MODELS.build(config.model).eval()
            data = DATASETS.build(config.test_dataloader.dataset)
            inputs = {"inputs": [data[index]["inputs"] for index in range(len(data))]}
            inputs = network.data_preprocessor(inputs, False)["inputs"]
            spread_out(network.head.fc, lambda: network(inputs))
        torch.save({"meta": meta or {}, "state_dict": network.state_dict()}, checkpoint)
        return path, checkpoint

    return write


def mmpretrain_test(path, checkpoint):
    """Scores and labels of MMPretrain's own loader and test step."""
    from mmengine.config import Config
    from mmengine.registry import DefaultScope
    from mmengine.runner import Runner
    from mmpretrain.registry import MODELS

    config = Config.fromfile(str(path))
    with DefaultScope.overwrite_default_scope("mmpretrain"), torch.no_grad():
        classifier = MODELS.build(config.model).eval()
        classifier.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
        loader = Runner.build_dataloader(config.test_dataloader)
        samples = [sample for batch in loader for sample in classifier.test_step(batch)]
    return torch.stack([sample.pred_score for sample in samples]), torch.cat([sample.gt_label for sample in samples])


@pytest.mark.filterwarnings(
    "ignore:The given NumPy array", "ignore:__array__ implementation"
)  # of MMPretrain's MNIST with NumPy 2
@pytest.mark.parametrize("case", RIGHT)
def test_mmpretrain_s_own_test_sees_the_same(case, mmpretrain):
    path, checkpoint = mmpretrain(**RIGHT[case])
    images = images_of_mmpretrain(path)
    model = from_mmpretrain(path, checkpoint)
    with torch.no_grad():
        scores = torch.cat([model(batch) for batch in images.images.split(4)]).softmax(1)
    theirs, labels = mmpretrain_test(path, checkpoint)
    torch.testing.assert_close(scores, theirs, atol=1e-5, rtol=0)
    assert torch.equal(images.labels, labels)
    assert len(set(scores.argmax(1).tolist())) > 1
    assert images.images.max() > 0.5
    found = check_natural(model, images, path, batch_size=4)
    assert found.host_accuracy == found.accuracy == 100 * theirs.argmax(1).eq(labels).double().mean()


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_images_that_a_data_set_holds_are_rgb(order, mmpretrain, root):
    path, _ = mmpretrain(dataset=HELD, more=f", channel_order='{order}'", pipeline=(PACK,))
    with numpy.load(root / "held.npz") as held:
        expected = torch.from_numpy(held["image"]).permute(0, 3, 1, 2) / 255
    assert torch.equal(images_of_mmpretrain(path).images, expected)


NEW_STYLE = """
from mmengine.config import read_base

with read_base():
    from .base import *

from mmcv.transforms import LoadImageFromFile
from mmpretrain.datasets import CustomDataset, PackInputs, ResizeEdge

test_dataloader.dataset.update(
    type=CustomDataset, pipeline=[dict(type=LoadImageFromFile), dict(type=ResizeEdge, scale=16), dict(type=PackInputs)]
)
"""


def test_a_config_with_classes_for_names_is_read_too(mmpretrain):
    path, checkpoint = mmpretrain(pipeline=RIGHT["resized"]["pipeline"])
    expected = images_of_mmpretrain(path)
    (path.parent / "base.py").write_text(path.read_text())
    path.write_text(NEW_STYLE)
    images = images_of_mmpretrain(path)
    assert torch.equal(images.images, expected.images)
    with torch.no_grad():
        scores = from_mmpretrain(path, checkpoint)(images.images).softmax(1)
    torch.testing.assert_close(scores, mmpretrain_test(path, checkpoint)[0], atol=1e-5, rtol=0)


def test_images_keep_what_the_data_set_says_of_them(mmpretrain, root):
    path, _ = mmpretrain(more=LISTED)
    images = images_of_mmpretrain(path, n_examples=4)
    assert isinstance(images, HostImages)
    assert (images.classes, images.name) == (("fox", "cat", "dog"), "CustomDataset of config.py")
    assert images.labels.tolist() == [1, 2, 0, 1]  # of each class in turn
    assert images.positions == (0, 1, 2, 3)
    read = torch.stack([torch.from_numpy(numpy.array(Image.open(file))) for file in images.files])
    assert torch.equal(images.images, read.permute(0, 3, 1, 2) / 255)


def step(name, more=""):
    return f"dict(type='{name}', {more})"


# Steps between loading and packing, and what is refused of them.
REFUSED = [
    (step("Invert", "prob=1.0"), "Invert"),
    (step("Solarize", "thr=128, prob=1.0"), "Solarize"),
    (step("RandomFlip", "prob=0.0"), "RandomFlip"),
    (step("RandomCrop", "crop_size=24"), "RandomCrop"),
    (step("ColorJitter", "brightness=0.1"), "ColorJitter"),
    (step("Normalize", "mean=[0.0] * 3, std=[1.0] * 3"), r"Normalize\. Let `data_preprocessor` normalise"),
    (step("RandomApply", "transforms=[dict(type='Resize', scale=16)]"), "RandomApply"),
    (
        step(
            "Compose",
            "transforms=[dict(type='Resize', scale=16), dict(type='Lighting', eigval=[1.0] * 3, "
            "eigvec=[[1.0] * 3] * 3)]",
        ),
        "Lighting",
    ),
    (step("MultiView", "num_views=[1, 1], transforms=[[dict(type='Resize', scale=16)], []]"), "MultiView"),
    (PIL + ", " + torchvision("RandomInvert"), "RandomInvert"),
    (PIL + ", " + torchvision("Grayscale", "num_output_channels=3"), "Grayscale"),
    (PIL + ", " + torchvision("GaussianBlur", "kernel_size=3"), "GaussianBlur"),
    (PIL + ", " + torchvision("Lambda", "lambd=abs"), "Lambda"),
]


@pytest.mark.parametrize(("between", "name"), REFUSED, ids=[name.split(chr(92))[0] for _, name in REFUSED])
def test_a_step_that_may_change_pixels_is_refused_by_name(between, name, mmpretrain):
    path, checkpoint = mmpretrain()
    path.write_text(path.read_text().replace(f"[{LOAD}, ", f"[{LOAD}, {between}, "))
    for call in (lambda: images_of_mmpretrain(path), lambda: from_mmpretrain(path, checkpoint)):
        with pytest.raises(ValueError, match=rf"_mmpretrain: `test_dataloader\.dataset\.pipeline` must .*, got {name}"):
            call()


# --- torchdistill ----------------------------------------------------------------------------------------------------

YAML = """
dependencies: [{{'name': 'ikl_plugins.torchdistill'}}]
datasets:
  some/test: {dataset}
models:
  model: {{key: 'torch.nn.Sequential', kwargs: {{}}}}
test:
  test_data_loader:
    dataset_id: 'some/test'
    sampler:
      class_or_func: !import_get {{key: 'torch.utils.data.{sampler}'}}
      kwargs:
    kwargs: {{batch_size: 4, num_workers: 0}}
"""


def call(key, **kwargs):
    """`!import_call` in YAML's flow style; what begins with an exclamation mark is of YAML."""
    return f"!import_call {{key: '{key}', init: {{kwargs: {{{', '.join(f'{k}: {v}' for k, v in kwargs.items())}}}}}}}"


def get(key):
    return f"!import_get {{key: '{key}'}}"


def mode(name):
    return f"!getattr [{get('torchvision.transforms.InterpolationMode')}, '{name}']"


def v1(name, **kwargs):
    return call(f"torchvision.transforms.{name}", **kwargs)


def v2(name, **kwargs):
    return call(f"torchvision.transforms.v2.{name}", **kwargs)


def compose(*steps, make=v1):
    return make("Compose", transforms=f"[{', '.join(steps)}]")


def folder(transform, kind="rgb", **more):
    return call("torchvision.datasets.ImageFolder", root=f"ROOT/{kind}", transform=transform, **more)


def grey_loader(path):
    with Image.open(path) as image:
        return image.convert("L")


def turned(label):
    return (label + 1) % 3


class Arrays(torch.utils.data.Dataset):
    """A data set that reads BGR arrays."""

    def __init__(self, root, transform):
        self.inner_samples, self.transform = ImageFolder(root).samples, transform

    def __len__(self):
        return len(self.inner_samples)

    def __getitem__(self, index):
        path, label = self.inner_samples[index]
        return self.transform(numpy.asarray(Image.open(path))[..., ::-1].copy()), label


class Joint(torch.utils.data.Dataset):
    """A data set that hands image and label to one transform."""

    classes = CLASSES

    def __init__(self, root, transforms):
        self.inner_samples, self.transforms = ImageFolder(root).samples, transforms

    def __len__(self):
        return len(self.inner_samples)

    def __getitem__(self, index):
        path, label = self.inner_samples[index]
        return self.transforms(Image.open(path).convert("RGB"), label)


FLOAT, BYTE = get("torch.float32"), get("torch.uint8")
NORMAL = {"mean": "[0.31, 0.47, 0.53]", "std": "[0.21, 0.33, 0.27]"}
LAST = v1("Normalize", **NORMAL)
TENSOR = v1("ToTensor")
DOCUMENTED = (
    v2("ToImage"),
    v2("ToDtype", dtype=BYTE, scale="True"),
    v2("Resize", size="[16, 16]", antialias="True"),
    v2("ToDtype", dtype=FLOAT, scale="True"),
    v2("Normalize", **NORMAL),
)
BASE = folder(compose(TENSOR, LAST))
SAME = {
    "plain": BASE,
    "tensor alone": folder(TENSOR),
    "resized": folder(compose(v1("Resize", size="[16, 16]"), v1("CenterCrop", size="12"), TENSOR, LAST)),
    "resized later": folder(compose(TENSOR, v1("Resize", size="[16, 16]", antialias="True"), LAST)),
    "padded": folder(compose(v1("Pad", padding="4", fill="90"), TENSOR, LAST)),
    "nested": folder(compose(compose(v1("Resize", size="20")), compose(TENSOR, compose(LAST)))),
    "one number": folder(compose(TENSOR, v1("Normalize", mean="[0.5]", std="[0.25]"))),
    "bytes": folder(compose(v1("PILToTensor"), v1("ConvertImageDtype", dtype=FLOAT), LAST)),
    "documented v2": folder(compose(*DOCUMENTED, make=v2)),
    "no scale": folder(compose(v2("ToImage"), v2("ToDtype", dtype=FLOAT), v2("Normalize", **NORMAL), make=v2)),
    "no scale, 255": folder(
        compose(v2("PILToTensor"), v2("ToDtype", dtype=FLOAT), v2("Normalize", mean="[120.3]", std="[60.2]"), make=v2)
    ),
    "no scale, no normalisation": folder(compose(v2("ToImage"), v2("ToDtype", dtype=FLOAT), make=v2)),
    "grey": folder(
        compose(TENSOR, v1("Normalize", mean="[0.5]", std="[0.25]")),
        loader=get(f"{__name__}.grey_loader"),
    ),
    "made grey": folder(compose(v1("Grayscale"), TENSOR, v1("Normalize", mean="[0.5]", std="[0.25]"))),
    "16 bits": folder(compose(TENSOR, LAST), "deep"),
    "joint": call(f"{__name__}.Joint", root="ROOT/rgb", transforms=compose(*DOCUMENTED, make=v2)),
    "arrays": call(f"{__name__}.Arrays", root="ROOT/rgb", transform=compose(v1("ToPILImage"), TENSOR, LAST)),
    "pure": folder(compose(*DOCUMENTED, v2("ToPureTensor"), make=v2)),
    "in a row": folder(
        compose(
            TENSOR,
            f"!import_call {{key: 'torch.nn.Sequential', init: {{args: [{v1('Resize', size='[16, 16]')}, {LAST}]}}}}",
        )
    ),
    "preset": folder(call("torchvision.transforms._presets.ImageClassification", crop_size="16", resize_size="20")),
    "timm": folder(compose(call("timm.data.transforms.MaybeToTensor"), LAST)),
    "label": folder(compose(TENSOR, LAST), target_transform=get(f"{__name__}.turned")),
    "some": call("torch.utils.data.Subset", dataset=BASE, indices="[7, 2, 9, 4]"),
    "joined": call("torch.utils.data.ConcatDataset", datasets=f"[{BASE}, {BASE}]"),
}


@pytest.fixture
def torchdistill(root, tmp_path, monkeypatch):
    """Writes a YAML file whose network is a convolution, and its weights; returns both paths and the network."""
    pytest.importorskip("torchdistill.models.registry")
    from torchdistill.models import registry

    def write(dataset=BASE, channels=3, sampler="SequentialSampler"):
        path, checkpoint = tmp_path / "config.yaml", tmp_path / "x.pt"
        path.write_text(YAML.format(dataset=dataset.replace("ROOT", str(root)), sampler=sampler))
        torch.manual_seed(1)
        network = nn.Sequential(
            nn.Conv2d(channels, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)
        ).eval()
        inputs = torch.cat([batch for batch, _ in torchdistill_loader(path)])
        spread_out(network[-1], lambda: network(inputs))
        monkeypatch.setattr(registry, "get_model", lambda *_: copy.deepcopy(network))
        torch.save({"model": network.state_dict()}, checkpoint)
        return path, checkpoint, network

    return write


def torchdistill_loader(path):
    from torchdistill.common.yaml_util import load_yaml_file
    from torchdistill.datasets.util import build_data_loader

    config = load_yaml_file(str(path))
    settings = config["test"]["test_data_loader"]
    return build_data_loader(config["datasets"][settings["dataset_id"]], settings, distributed=False)


@pytest.mark.parametrize("case", SAME)
def test_torchdistill_s_own_test_sees_the_same(case, torchdistill):
    path, checkpoint, network = torchdistill(SAME[case], channels=1 if "grey" in case else 3)
    images = images_of_torchdistill(path)
    model = from_torchdistill(path, checkpoint)
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in images.images.split(4)])
        batches = [(network(batch), labels) for batch, labels in torchdistill_loader(path)]
    theirs, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    torch.testing.assert_close(logits, theirs, atol=1e-5, rtol=0)
    assert torch.equal(images.labels, labels)
    assert len(set(logits.argmax(1).tolist())) > 1
    assert images.images.max() > 0.5
    assert images.classes == {"label": ("fox", "cat", "dog"), "arrays": None}.get(case, CLASSES)
    found = check_natural(model, images, path, batch_size=4)
    assert found.host_accuracy == found.accuracy == 100 * theirs.argmax(1).eq(labels).double().mean()


SPOILED = [
    (folder(compose(v1("RandomInvert", p="1.0"), TENSOR)), "RandomInvert"),
    (folder(compose(v1("RandomHorizontalFlip", p="0.0"), TENSOR)), "RandomHorizontalFlip"),
    (folder(compose(v1("ColorJitter", brightness="0.1"), TENSOR)), "ColorJitter"),
    (folder(compose(v1("Grayscale", num_output_channels="3"), TENSOR)), "Grayscale"),
    (folder(compose(TENSOR, v1("GaussianBlur", kernel_size="3"), LAST)), "GaussianBlur"),
    (folder(compose(TENSOR, v1("Lambda", lambd=get("torch.neg")))), "Lambda"),
    (folder(compose(v2("RandAugment"), *DOCUMENTED, make=v2)), "RandAugment"),
    (folder(compose(v1("TenCrop", size="16"), TENSOR)), "TenCrop"),
    (folder(compose(TENSOR, LAST, v1("CenterCrop", size="16"))), r"Normalize\. Normalize once, at the end"),
    (folder(compose(TENSOR, LAST, LAST)), r"Normalize\. Normalize once, at the end"),
    (folder(v1("PILToTensor")), "torch.uint8 .*from PILToTensor"),
    (folder("null"), "make tensors by its `transform`, but ImageFolder has none"),
    (folder(get("builtins.abs")), "abs"),
    (f"{call('torch.utils.data.ConcatDataset', datasets=f'[{BASE}, {folder(TENSOR)}]')}", "normalised alike"),
    (call(f"{__name__}.Outer", dataset=BASE, transform=TENSOR), "one transform, got one inside another"),
    (call(f"{__name__}.Fixed", dataset=BASE, transform=TENSOR), "be an attribute that can be set"),
]


@pytest.mark.parametrize(("dataset", "message"), SPOILED, ids=[message for _, message in SPOILED])
def test_a_transform_that_may_change_pixels_is_refused_by_name(dataset, message, torchdistill, root):
    path, checkpoint, _ = torchdistill()
    path.write_text(YAML.format(dataset=dataset.replace("ROOT", str(root)), sampler="SequentialSampler"))
    for call in (lambda: images_of_torchdistill(path), lambda: from_torchdistill(path, checkpoint)):
        with pytest.raises(ValueError, match=rf"_torchdistill: .*'some/test' must .*{message}"):
            call()


# --- images from elsewhere, and what comes before an attack -----------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "meta"),
    [(LISTED, {}), (LIST_ALONE, {"dataset_meta": {"classes": ["fox", "cat", "dog"]}}), (LIST_ALONE, {})],
    ids=["config", "checkpoint", "list"],
)
def test_class_folders_get_the_order_of_the_host(more, meta, mmpretrain, root):
    path, checkpoint = mmpretrain(more=more, meta=meta)
    model = from_mmpretrain(path, checkpoint)
    given = load_images(root / "rgb")
    ordered = in_class_order(given, model, path)
    own = images_of_mmpretrain(path)
    theirs = {file[-6:]: label for file, label in zip(own.files, own.labels.tolist(), strict=True)}
    assert [theirs[file[-6:]] for file in ordered.files] == ordered.labels.tolist() != given.labels.tolist()
    assert ordered.classes == ("fox", "cat", "dog")
    assert ordered.sha256 != given.sha256
    assert in_class_order(ordered, model, path) is ordered


def test_an_order_that_nobody_has_changed_is_refused_before_an_attack(mmpretrain, root, tmp_path):
    given, meta = load_images(root / "rgb"), {"dataset_meta": {"classes": ["fox", "cat", "dog"]}}
    named = {"meta": meta, "state_dict": models.resnet8(num_classes=3).state_dict()}
    torch.save(named, tmp_path / "named.pth")
    statistics = {"mean": [0.5], "std": [0.25]}
    for model in (
        load_checkpoint(tmp_path / "named.pth", "resnet8", num_classes=3, **statistics),
        from_mmpretrain(*mmpretrain(meta=meta)),
    ):
        with message("evaluate: classes must be in the checkpoint's order, but have 'cat' where it has 'fox'"):
            evaluate(model, given.images, given.labels, eps="1/255", data=given)
        with message("check_natural: classes must be in the checkpoint's order"):
            check_natural(model, given)


def test_no_data_that_may_be_downloaded_are_built_for_the_order(mmpretrain, root, monkeypatch):
    path, _ = mmpretrain(**RIGHT["held, bgr"])
    monkeypatch.setattr(MMPretrainData, "dataset", property(lambda self: pytest.fail("built")))
    assert MMPretrainData("x", path).folders() is None


class Numbered(ImageFolder):
    """Numbers classes otherwise than by their places, as for folders that are called 0, 1, 10, 2."""

    def find_classes(self, directory):
        classes, _ = super().find_classes(directory)
        return classes, dict(zip(classes, (1, 2, 0), strict=True))


def test_class_folders_get_the_numbers_of_torchdistill_s_data_set(torchdistill, root):
    path, checkpoint, _ = torchdistill(call(f"{__name__}.Numbered", root="ROOT/rgb", transform=compose(TENSOR, LAST)))
    own, model = images_of_torchdistill(path), from_torchdistill(path, checkpoint)
    given = in_class_order(load_images(root / "rgb"), model, path)
    assert given.labels.tolist() == own.labels.tolist() == [1] * 4 + [2] * 4 + [0] * 4
    assert own.classes == given.classes == ("fox", "cat", "dog")


def test_a_data_set_that_reads_in_a_way_of_its_own_takes_no_other_images(torchdistill, root):
    path, checkpoint, _ = torchdistill(call(f"{__name__}.Arrays", root="ROOT/rgb", transform=compose(TENSOR, LAST)))
    model = from_torchdistill(path, checkpoint)
    with pytest.warns(UserWarning, match="some/test names no classes, so labels are those of the folders of"):
        given = in_class_order(load_images(root / "rgb"), model, path)
    with message("must read images as torchvision does, but Arrays has a way of its own. Leave out --data."):
        check_natural(model, given, path)


def test_corruptions_take_no_other_order(mmpretrain, root):
    path, checkpoint = mmpretrain(more=LISTED)
    loaded = LoadedModel(from_mmpretrain(path, checkpoint), "x", checkpoint, MMPretrainData("x", path))
    given = argparse.Namespace(
        data=str(root / "rgb"), data_dir=root, n_examples=None, offline=True, preprocessing=None, dataset="cifar10"
    )
    with message("must be in the config's order"):
        images_from(given, caller="x", loaded=loaded, reorder=False)
    with pytest.raises(TypeError, match=r"must be from_mmpretrain's, got Identity"):
        loaded.host.predict(nn.Identity(), [])


def test_other_classes_are_refused(mmpretrain, torchdistill, root, tmp_path):
    given = load_images(root / "rgb")
    path, checkpoint = mmpretrain(more=", metainfo=dict(classes=('cat', 'dog', 'hen'))")
    with message("got fox, which it lacks. Rename the folders: cat, dog, hen."):
        in_class_order(given, from_mmpretrain(path, checkpoint), path)
    path, checkpoint = mmpretrain(more=LISTED, meta={"dataset_meta": {"classes": CLASSES}})
    with message("the config's classes must be the checkpoint's, got 'fox' where it has 'cat'"):
        in_class_order(given, from_mmpretrain(path, checkpoint), path)
    path, checkpoint = mmpretrain(more=", metainfo=dict(classes=('fox', 'cat', 'dog'))")  # of labels by folder
    with message("config's classes must be named as its labels are, got 'fox' where it has 'cat'. Leave out --data"):
        in_class_order(given, from_mmpretrain(path, checkpoint), path)
    assert check_natural(from_mmpretrain(path, checkpoint), images_of_mmpretrain(path), path).host == "MMPretrain"
    for folder in CLASSES:
        (tmp_path / "wordnet" / f"n0000000{CLASSES.index(folder)}").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "wordnet" / f"n0000000{CLASSES.index(folder)}" / "a.png")
    ids = load_images(tmp_path / "wordnet")  # names in words and WordNet's numbers are not compared
    path, checkpoint, _ = torchdistill()
    assert in_class_order(ids, from_torchdistill(path, checkpoint), path) is ids


@pytest.mark.parametrize("kind", ["folder", "npz", "too large", "too large npz"])
@pytest.mark.parametrize("host", ["mmpretrain", "torchdistill"])
def test_images_of_another_size_are_refused(kind, host, mmpretrain, torchdistill, root, tmp_path):
    small = "large" in kind
    if host == "mmpretrain":
        path, checkpoint = mmpretrain(pipeline=RIGHT["resized" if small else "plain"].get("pipeline", PLAIN))
        model = from_mmpretrain(path, checkpoint)
    else:
        path, checkpoint, _ = torchdistill(SAME["documented v2" if small else "plain"])
        model = from_torchdistill(path, checkpoint)
    images = load_images(root / "rgb")
    if "npz" in kind:
        pixels = (255 * images.images).byte().permute(0, 2, 3, 1)
        numpy.savez(tmp_path / "images.npz", image=pixels, label=model(images.images).argmax(1))
        images = load_images(tmp_path / "images.npz")
    if small:
        with message("the config's test pipeline makes, (3, 16, 16), got (3, 32, 32)"):
            check_natural(model, images, path)
    else:
        found = check_natural(model, images, path)
        assert found.accuracy == found.host_accuracy
        assert found.n_examples == COUNT


@pytest.mark.parametrize("host", ["mmpretrain", "torchdistill"])
def test_images_of_another_geometry_are_refused(host, mmpretrain, torchdistill, root):
    if host == "mmpretrain":
        path, checkpoint = mmpretrain(
            (LOAD, "dict(type='CenterCrop', crop_size=24)", "dict(type='Resize', scale=32)", PACK)
        )
        model = from_mmpretrain(path, checkpoint)
    else:
        path, checkpoint, _ = torchdistill(
            folder(compose(v1("CenterCrop", size="24"), v1("Resize", size="32"), TENSOR, LAST))
        )
        model = from_torchdistill(path, checkpoint)
    with message(
        "images must be those that the config's test pipeline makes, but cat/00.png differs. Leave out --data"
    ):
        check_natural(model, load_images(root / "rgb"), path)


def test_a_model_that_sees_something_else_than_its_host_is_stopped(mmpretrain, torchdistill, tmp_path):
    path, checkpoint = mmpretrain()
    model = from_mmpretrain(path, checkpoint, channel_order="rgb")
    with pytest.raises(
        ValueError, match=r"must predict what MMPretrain's own test does, but \d+ of 12 differ, first /"
    ):
        check_natural(model, images_of_mmpretrain(path), path)
    path, checkpoint, _ = torchdistill()
    hidden = call(f"{__name__}.Negative", root="ROOT/rgb", transform=compose(TENSOR, LAST))
    path, checkpoint, _ = torchdistill(hidden)
    with pytest.raises(
        ValueError, match=r"must predict what torchdistill's own test does, but \d+ of 12 differ, first im"
    ):
        check_natural(from_torchdistill(path, checkpoint), images_of_torchdistill(path), path)
    path, checkpoint, _ = torchdistill(folder(TENSOR, loader=get(f"{__name__}.noisy_loader")))
    with message("must give the same image each time, but image 0 differs"):
        check_natural(from_torchdistill(path, checkpoint), images_of_torchdistill(path), path)


def test_a_compiled_model_is_compared_as_the_one_inside(torchdistill):
    path, checkpoint, _ = torchdistill()
    model, images = from_torchdistill(path, checkpoint), images_of_torchdistill(path)
    assert check_natural(torch.compile(model, backend="eager"), images, path) == check_natural(model, images, path)
    with pytest.raises(TypeError, match=r"`model` must be from_torchdistill's, got Sequential"):
        check_natural(model.network, images, path)


class Negative(Joint):
    """A data set that changes values where no list of steps shows it."""

    def __init__(self, root, transform):
        super().__init__(root, None)
        self.transform = transform

    def __getitem__(self, index):
        path, label = self.inner_samples[index]
        return 1 - self.transform(Image.open(path).convert("RGB")), label


class Outer(torch.utils.data.Dataset):
    """A data set with a transform around one that has a transform, too."""

    def __init__(self, dataset, transform):
        self.dataset, self.transform = dataset, transform


class Fixed(torch.utils.data.Dataset):
    """A data set whose transform is a property that nobody can set."""

    transform = property(lambda self: self._transform)

    def __init__(self, dataset, transform):
        self._images, self._transform = dataset, transform


def noisy_loader(path):
    return Image.fromarray(numpy.random.default_rng().integers(0, 256, (32, 32, 3)).astype("uint8"))


def test_white_stays_white_and_what_overshoots_is_refused(torchdistill, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "white" / name).mkdir(parents=True)
        pixels = numpy.full((32, 32, 3), 255, "uint8")
        pixels[:, 16:] = 0 if name == "b" else 255
        Image.fromarray(pixels).save(tmp_path / "white" / name / "0.png")
    path, _, _ = torchdistill()

    def images(interpolation):
        resize = v1("Resize", size="[11, 11]", antialias="True", interpolation=mode(interpolation))
        text = folder(compose(TENSOR, resize, LAST), "white").replace("ROOT", str(tmp_path))
        path.write_text(YAML.format(dataset=text, sampler="SequentialSampler"))
        return images_of_torchdistill(path).images

    assert images("BILINEAR")[0].eq(1).float().mean() > 0.5
    with pytest.raises(
        ValueError, match=r"pixels of some/test must lie in \[0, 1\], got .* \(image 1\)\. Resize bytes"
    ):
        images("BICUBIC")


REFUSED_LOADERS = {
    "collate_fn": "collate_fn: 'default_collate'",
    "dataset_wrapper": "dataset_wrapper: {key: 'SSKDDatasetWrapper'}",
}


@pytest.mark.parametrize("key", REFUSED_LOADERS)
def test_a_loader_with_a_way_of_its_own_is_refused(key, torchdistill):
    path, _, _ = torchdistill()
    path.write_text(path.read_text().replace("    sampler:", f"    {REFUSED_LOADERS[key]}\n    sampler:"))
    with message(f"images_of_torchdistill: `test: test_data_loader:` must have no {key}"):
        images_of_torchdistill(path)


def test_some_examples_are_of_every_class(torchdistill):
    path, _, _ = torchdistill(sampler="RandomSampler")  # which the order of images does not follow
    assert images_of_torchdistill(path, n_examples=5).labels.tolist() == [0, 0, 1, 1, 2]
    assert len(images_of_torchdistill(path)) == COUNT
    with message("images_of_torchdistill: `n_examples` must be at most 12, the images of some/test, got 13"):
        images_of_torchdistill(path, n_examples=13)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:evaluate. .* natural images are right")
@pytest.mark.parametrize("host", ["mmpretrain", "torchdistill"])
def test_the_command_needs_no_data_beside_a_config(host, mmpretrain, torchdistill, root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(robustbench.eval, "AutoAttack", Quick)
    path, checkpoint = mmpretrain(more=LISTED) if host == "mmpretrain" else torchdistill(SAME["label"])[:2]
    own = images_of_mmpretrain(path) if host == "mmpretrain" else images_of_torchdistill(path)
    line = ["evaluate", f"--{host}", path, "--checkpoint", checkpoint, "--attacks", "apgd-ce", "--eps", "1/255"]
    line = [*map(str, line), "--device", "cpu", "--output"]
    main([*line, str(tmp_path / "own")])
    log = json.loads((tmp_path / "own" / "evaluation.json").read_text())
    assert (log["labels"], log["data"]["name"], log["classes"]) == (
        own.labels.tolist(),
        own.name,
        ["fox", "cat", "dog"],
    )
    accuracy = f"{log['natural_accuracy']:.2f} %"
    name = {"mmpretrain": "MMPretrain", "torchdistill": "torchdistill"}[host]
    assert f"natural accuracy on 12 images {accuracy}, {name}'s own test of them {accuracy}" in capsys.readouterr().out

    main([*line, str(tmp_path / "folder"), "--data", str(root / "rgb")])
    other = json.loads((tmp_path / "folder" / "evaluation.json").read_text())
    assert other["natural_accuracy"] == log["natural_accuracy"]
    assert f"labels of {root / 'rgb'} are now in the order of {own.name}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="do not read --preprocessing"):
        main([*line, str(tmp_path / "none"), "--preprocessing", "Res256Crop224"])

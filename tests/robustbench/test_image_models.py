"""Models of timm, torchvision and Hugging Face: logits on files equal those of the library's own network and transform.

Weights are drawn and saved as files, as nothing is fetched here.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import re
import runpy

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from quick_autoattack import Harmless, write_imagenet
from torch import nn

from ikl_plugins._robustbench_import import import_robustbench
from ikl_plugins.commands.main import main as ikl
from ikl_plugins.robustbench import (
    Images,
    Preflight,
    evaluate,
    from_huggingface,
    from_timm,
    from_torchvision,
    images_for,
    load_images,
    write_submission,
)
from ikl_plugins.robustbench.evaluation.log import Evaluation
from ikl_plugins.robustbench.image_models import ImageArchitecture, torchvision_models
from ikl_plugins.robustbench.known_sets import KNOWN
from ikl_plugins.robustbench.preflight import CHECKS, Check
from ikl_plugins.robustbench.submittable import network_obstacle, stored_weights, submission_obstacles

robustbench = import_robustbench()
timm = robustbench.data.timm  # imported without its warnings
NAMES = ("class1", "class2", "class10")
SMALL = "test_efficientnet"  # of timm: 160x160, bicubic


def write_images(folder, names=NAMES, count=2):
    draw = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = draw.integers(0, 256, (70 + 40 * number, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("folder"))


def drawn(network, seed=0):
    """A network in eval mode whose statistics are not the initial ones, so that each layer counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if "running" in name:
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return network.eval()


def of_timm(name, **options):
    torch.manual_seed(0)
    return drawn(timm.create_model(name, **options))


def assert_equal_logits(model, images, network, transform, folder):
    """Of a library's own network on what its own transform makes of the same files."""
    theirs = torch.stack([transform(Image.open(folder / file).convert("RGB")) for file in images.files])
    with torch.no_grad():
        torch.testing.assert_close(model(images.images), network(theirs), rtol=0, atol=1e-5)
    assert images.images.shape[2:] == model.geometry.size
    assert images.preprocessing == model.geometry.name


# --- timm ------------------------------------------------------------------------------------------------------------


def timm_args(**changes):
    """What timm's train.py keeps of its command line, as far as it bears on images and network."""
    data = dict.fromkeys(("img_size", "input_size", "mean", "std", "crop_pct", "gp", "bn_eps"))
    return argparse.Namespace(**{**data, "model": SMALL, "interpolation": "", "model_kwargs": {}, **changes})


TIMM = {
    "state dict": (SMALL, {}, lambda w: w),
    "train.py": (SMALL, {}, lambda w: {"state_dict": w, "epoch": 1, "arch": SMALL, "args": timm_args()}),
    "average": (
        SMALL,
        {},
        lambda w: {"state_dict": {k: v + 1 for k, v in w.items()}, "state_dict_ema": w, "args": timm_args()},
    ),
    "data parallel": (SMALL, {}, lambda w: {"state_dict": {f"module.{k}": v for k, v in w.items()}}),
    "normalised": (
        "test_byobnet",
        {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)},
        lambda w: {
            "normalize.mean": torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1),
            "normalize.std": torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1),
            **{f"model.{k}": v for k, v in w.items()},
        },
    ),
    "its training's images": (
        SMALL,
        {
            "img_size": 96,
            "mean": [0.2],
            "std": [0.3],
            "interpolation": "bilinear",
            "crop_pct": 0.9,
            "crop_mode": "border",
        },
        lambda w: {
            "state_dict": w,
            "args": timm_args(
                img_size=96, mean=[0.2], std=[0.3], interpolation="bilinear", crop_pct=0.9, crop_mode="border"
            ),
        },
    ),
    "a size in its network": (
        "test_vit",
        {"img_size": 64},
        lambda w: {"state_dict": w, "args": timm_args(model="timm/test_vit.r160_in1k", model_kwargs={"img_size": 64})},
    ),
}


@pytest.mark.parametrize("case", TIMM)
def test_a_checkpoint_of_timm_gives_timms_logits(case, folder, tmp_path):
    name, data, layout = TIMM[case]
    network = of_timm(name, num_classes=3, **({"img_size": 64} if name == "test_vit" else {}))
    torch.save(layout(network.state_dict()), tmp_path / "net.pth")
    model = from_timm(name, tmp_path / "net.pth")
    images = images_for(model, folder)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(data, model=network))
    assert_equal_logits(model, images, network, transform, folder)
    assert (model.num_classes, model.training, len(images)) == (3, False, 6)
    # timm counts class2 before class10; its own reader of folders is the judge.
    own = timm.data.ImageDataset(str(folder)).reader.class_to_idx
    assert [own[file.split("/")[0]] for file in images.files] == images.labels.tolist()
    assert images.classes == NAMES


def test_what_is_given_takes_the_place_of_the_configuration(folder, tmp_path):
    network = of_timm("test_vit", num_classes=3, img_size=64)
    torch.save(network.state_dict(), tmp_path / "net.pth")
    statistics = {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}
    model = from_timm("test_vit", tmp_path / "net.pth", image_size=64, **statistics)
    data = timm.data.resolve_data_config({"img_size": 64, **statistics}, model=network)
    assert_equal_logits(model, images_for(model, folder), network, timm.data.create_transform(**data), folder)
    assert torch.equal(copy.deepcopy(model)[0].mean.flatten(), torch.tensor((0.4, 0.5, 0.6)))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"img_size": 224, "crop_pct": 0.875}, "BicubicRes256Crop224"),
        ({"img_size": 224, "crop_pct": 0.875, "interpolation": "bilinear"}, "Res256Crop224"),
        ({"img_size": 224, "interpolation": "bilinear", "crop_mode": "squash", "crop_pct": 1.0}, "Res224"),
        ({"img_size": 224, "crop_pct": 0.9}, "timm 224x224, crop_pct 0.9, bicubic, center"),
    ],
)
def test_a_geometry_that_robustbench_knows_has_its_name(changes, name, folder, tmp_path):
    content = {"state_dict": of_timm(SMALL, num_classes=3).state_dict(), "args": timm_args(**changes)}
    torch.save(content, tmp_path / "net.pth")
    model = from_timm(SMALL, tmp_path / "net.pth")
    assert (model.geometry.name, images_for(model, folder, n_examples=1).preprocessing) == (name, name)
    if name in robustbench.data.PREPROCESSINGS:
        assert torch.equal(images_for(model, folder).images, load_images(folder, preprocessing=name).images)


# --- torchvision -----------------------------------------------------------------------------------------------------


def of_torchvision(name):
    torch.manual_seed(0)
    return drawn(torchvision.models.get_model(name, num_classes=3))


V2 = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V2
REFERENCES = argparse.Namespace(
    model="mobilenet_v2", val_crop_size=64, val_resize_size=72, interpolation="bicubic", model_ema=False
)
TRAINED = torchvision.transforms.Compose(
    [
        torchvision.transforms.Resize(72, torchvision.transforms.InterpolationMode.BICUBIC),
        torchvision.transforms.CenterCrop(64),
        torchvision.transforms.ToTensor(),
        torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)
TORCHVISION = {
    "named": (
        "mobilenet_v2",
        {"weights_name": "IMAGENET1K_V2"},
        {},
        V2.transforms(),
        "torchvision resize 232, crop 224, bilinear",
    ),
    "its own file": (
        "mobilenet_v2",
        {},
        {"sha256": V2.url[-12:-4]},
        V2.transforms(),
        "torchvision resize 232, crop 224, bilinear",
    ),
    "references": ("mobilenet_v2", {}, {"args": REFERENCES}, TRAINED, "torchvision resize 72, crop 64, bicubic"),
    "one way": (
        "mobilenet_v3_small",
        {},
        {},
        torchvision.models.MobileNet_V3_Small_Weights.DEFAULT.transforms(),
        "Res256Crop224",
    ),
}


@pytest.mark.parametrize("case", TORCHVISION)
def test_a_checkpoint_of_torchvision_gives_torchvisions_logits(case, folder, tmp_path, monkeypatch):
    name, options, more, transform, words = TORCHVISION[case]
    network = of_torchvision(name)
    digest = more.pop("sha256", None) if "sha256" in more else None
    if digest:
        monkeypatch.setattr(torchvision_models, "file_sha256", lambda path: digest + 56 * "0")
    torch.save({"model": network.state_dict(), "epoch": 3, **more}, tmp_path / "net.pth")
    model = from_torchvision(name, tmp_path / "net.pth", **options)
    images = images_for(model, folder)
    assert_equal_logits(model, images, network, transform, folder)
    assert (model.geometry.name, model.num_classes) == (words, 3)
    own = torchvision.datasets.ImageFolder(str(folder)).class_to_idx
    assert [own[file.split("/")[0]] for file in images.files] == images.labels.tolist()


def test_without_a_file_the_librarys_own_weights_are_taken(tmp_path, monkeypatch):
    """As torch's cache has them for torchvision, and as timm's loader would fetch them."""
    name = "mobilenet_v3_small"
    weights = torchvision.models.get_model_weights(name).DEFAULT
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    network = drawn(torchvision.models.get_model(name))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(network.state_dict(), tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2])
    model = from_torchvision(name)
    assert (model.num_classes, model.geometry.name) == (1000, "Res256Crop224")
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in model.model.state_dict().items())
    network = of_timm(SMALL)
    monkeypatch.setattr(
        "timm.models._builder.load_pretrained", lambda model, **_: model.load_state_dict(network.state_dict())
    )
    model = from_timm(SMALL)
    assert (model.num_classes, model.geometry.size) == (1000, (160, 160))
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in model.model.state_dict().items())


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def of_huggingface(folder, processor, labels=None):
    """A tiny ViT, written with an image processor."""
    transformers = pytest.importorskip("transformers", reason="needs Hugging Face's transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        id2label=dict(enumerate(labels)) if labels else {index: f"LABEL_{index}" for index in range(3)},
    )
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    kind, options = processor
    getattr(transformers, kind)(**options).save_pretrained(folder)
    return transformers, model


SQUARE = {"size": {"height": 32, "width": 32}}
PROCESSORS = [
    ("ViTImageProcessor", SQUARE),
    ("ViTImageProcessor", {**SQUARE, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3}),
    ("ViTImageProcessor", {**SQUARE, "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}),
    ("ViTImageProcessor", {**SQUARE, "do_normalize": False}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 32}, "crop_pct": 0.8}),
    ("CLIPImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}),
]


@pytest.mark.parametrize("number", range(len(PROCESSORS)))
def test_a_classifier_of_hugging_face_gives_its_logits(number, folder, tmp_path):
    transformers, network = of_huggingface(tmp_path, PROCESSORS[number])
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    model = from_huggingface(tmp_path)
    images = images_for(model, folder)

    class Logits(nn.Module):
        def forward(self, pixels):
            return network(pixel_values=pixels).logits

    def transform(image):
        return processor(images=image, return_tensors="pt")["pixel_values"][0]

    assert_equal_logits(model, images, Logits(), transform, folder)
    assert model.geometry.name.startswith(f"transformers {type(processor).__name__}, size ")


def test_hugging_faces_names_of_classes_give_the_labels(folder, tmp_path):
    of_huggingface(tmp_path, PROCESSORS[0], labels=("class10", "class2", "class1"))
    images = images_for(from_huggingface(tmp_path), folder)
    assert (images.classes, images.labels.tolist()) == (("class10", "class2", "class1"), [2, 2, 0, 0, 1, 1])


def test_a_part_that_nobody_has_trained_is_refused(tmp_path):
    _, network = of_huggingface(tmp_path, PROCESSORS[0])
    network.vit.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"must have all weights .*lacks classifier.bias, classifier.weight\. Name one"
    ):
        from_huggingface(tmp_path)


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """timm's small network for ImageNet's 1,000 classes, and its file."""
    path = tmp_path_factory.mktemp("small") / "net.pth"
    torch.save(of_timm(SMALL).state_dict(), path)
    return from_timm(SMALL, path), path


def test_some_folders_of_imagenet_have_imagenets_labels(small, tmp_path):
    write_images(tmp_path, ("n01443537", "n15075141", "n02123045"), 1)
    order = timm.data.ImageNetInfo().label_names()
    expected = [order.index(name) for name in ("n01443537", "n02123045", "n15075141")]
    assert images_for(small[0], tmp_path).labels.tolist() == expected == [1, 281, 999]


def test_stored_images_are_taken_as_they_are(tmp_path):
    torch.save(of_timm(SMALL, num_classes=10).state_dict(), tmp_path / "net.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(2))
    model = from_timm(SMALL, tmp_path / "net.pth", image_size=32)
    found = images_for(model, tmp_path / "images.npz")
    assert torch.equal(found.images, torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
    with pytest.raises(ValueError, match=r"is for images of 160x160, but those of .* are 32x32.*image_size=32"):
        images_for(from_timm(SMALL, tmp_path / "net.pth"), tmp_path / "images.npz")
    np.savez(tmp_path / "oblong.npz", images=pixels[:, :, :30], labels=np.arange(2))
    with pytest.raises(ValueError, match=r"is for images of 32x32, but those of .* are 32x30. Cut or scale them to it"):
        images_for(model, tmp_path / "oblong.npz")


def test_other_classes_are_refused(small, folder, tmp_path):
    with pytest.raises(ValueError, match=f"{folder} has 3 classes, but {SMALL} has 1,000"):
        images_for(small[0], folder)
    write_images(tmp_path, ("n01443537", "n00000000"), 1)
    with pytest.raises(ValueError, match=r"must be named as the classes of .*, but not: n00000000"):
        images_for(small[0], tmp_path)
    with pytest.raises(ValueError, match=r"images must have shape \(N, 3, H, W\), got \(1, 1, 160, 160\)"):
        small[0](torch.rand(1, 1, 160, 160))


def listed(model, **plan):
    return submission_obstacles(model, plan.pop("dataset", "imagenet"), **{"eps": "4/255", **plan})


def test_what_robustbench_would_refuse_of_imagenet_is_known_before(small):
    model, _ = small
    assert network_obstacle(model) is None
    assert listed(model) == ()
    assert listed(model, threat_model="corruptions", eps=None) == ()
    for plan, text in (
        (
            {"preprocessing": model.geometry.name},
            "must be on images made by one of Res256Crop224, Crop288, Res224, Bicubic",
        ),
        ({"eps": "8/255"}, "must be at eps 4/255, that of the leaderboard, got 8/255"),
        ({"n_examples": 1000}, "must have all 5000 test images, got 1000"),
        ({"architecture": "ResNet-50"}, f"`architecture` must be left out for {SMALL}, got 'ResNet-50'"),
        ({"mean": (0.5,) * 3, "std": (0.5,) * 3}, "`mean` and `std` must be those of `model`"),
        ({"dataset": "cifar10"}, "must be of a model with 10 classes, got 1000"),
    ):
        (reason,) = listed(model, **plan)
        assert text in reason
    other = copy.deepcopy(model)
    other.architecture = ImageArchitecture("transformers", "runs/vit")
    assert "got one of transformers. timm has most" in listed(other)[0]
    half = copy.deepcopy(model).half()
    assert "must have float32 weights" in listed(half)[0]
    changed = copy.deepcopy(model)
    changed.model.bn2.eps = 0.1
    assert "must give the logits of the zoo entry" in listed(changed)[0]
    grown = copy.deepcopy(model)
    grown.model.register_buffer("extra", torch.zeros(1))
    assert f"must be a {SMALL}, but has other entries (missing: none; unexpected: model.extra)" in listed(grown)[0]


# --- submissions -----------------------------------------------------------------------------------------------------

PAPER = {
    "title": "Better Networks from Smaller Ones",
    "link": "https://example.org/paper",
    "authors": "Jane Doe, John Roe",
    "venue": "arXiv, Jan 2025",
    "licence": "MIT",
}
NAME = "Doe2025Better_Small"
COUNT = 2  # images of a test set, here


@pytest.fixture
def small_benchmark(monkeypatch):
    monkeypatch.setattr(robustbench.eval, "AutoAttack", Harmless)
    for name in ("cifar10", "imagenet"):
        monkeypatch.setitem(KNOWN, name, KNOWN[name]._replace(n_examples=COUNT))


def loaded_by_robustbench(folder, dataset, threat_model, monkeypatch):
    """By its own load_model with the entry in its zoo, and the preprocessing that its benchmark then takes."""
    kinds = robustbench.data.BenchmarkDataset(dataset), robustbench.data.ThreatModel(threat_model)
    name, entry = runpy.run_path(str(folder / "zoo_entry.py"))["ENTRY"]
    monkeypatch.setitem(robustbench.data.all_models[kinds[0]][kinds[1]], name, entry)
    model = robustbench.load_model(name, model_dir=folder / "models", dataset=dataset, threat_model=threat_model)
    return model, robustbench.data.get_preprocessing(*kinds, name, None)


TAKEN = {
    "timm": ("imagenet", "Linf", lambda path: from_timm(SMALL, path, image_size=224)),
    "torchvision": ("imagenet", "Linf", lambda path: from_torchvision("mobilenet_v3_small", path)),
    "timm on CIFAR": (
        "cifar10",
        "L2",
        lambda path: from_timm("test_vit", path, image_size=32, mean=(0.4,) * 3, std=(0.2,) * 3),
    ),
}


@pytest.mark.parametrize("case", TAKEN)
def test_robustbench_loads_what_is_submitted(case, tmp_path, monkeypatch, small_benchmark):
    dataset, threat_model, load = TAKEN[case]
    torch.manual_seed(0)
    network = {
        "timm": lambda: timm.create_model(SMALL),
        "torchvision": lambda: torchvision.models.mobilenet_v3_small(),
        "timm on CIFAR": lambda: timm.create_model("test_vit", num_classes=10, img_size=32),
    }[case]()
    content = {"state_dict": drawn(network).state_dict()}
    if case == "timm":
        content["args"] = timm_args(crop_pct=0.875)
    torch.save(content, tmp_path / "net.pth")
    model = load(tmp_path / "net.pth")
    preprocessing = model.geometry.name if dataset == "imagenet" else None
    pixels = torch.rand(COUNT, 3, *model.geometry.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = model(pixels).argmax(1)
    data = Images(pixels, labels, None, dataset, "", None, preprocessing, KNOWN[dataset].source)
    eps = "4/255" if dataset == "imagenet" else "0.5"
    evaluation = evaluate(model, pixels, labels, norm=threat_model, eps=eps, data=data, progress=False)
    folder = write_submission(
        tmp_path / "submission",
        name=NAME,
        model=model,
        dataset=dataset,
        evaluation=evaluation,
        images=data,
        preflight=Preflight(tuple(Check(name, True, "Fine.") for name in CHECKS)),
        additional_data=False,
        generated_data=False,
        **PAPER,
    )
    loaded, transform = loaded_by_robustbench(folder, dataset, threat_model, monkeypatch)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded(pixels), model(pixels))
        assert torch.equal(loaded.model(loaded.normalize(pixels)), network(loaded.normalize(pixels)))
    entry = json.loads((folder / "model_info" / dataset / threat_model / f"{NAME}.json").read_text())
    assert (entry["dataset"], entry["eps"], entry["clean_acc"], entry["autoattack_acc"]) == (
        dataset,
        eps,
        "100.00",
        "100.00",
    )
    assert entry["architecture"] == model.architecture.name
    form = (folder / "new_models_form.md").read_text()
    assert (f"**Preprocessing**: {preprocessing}" in form) == (dataset == "imagenet")
    if dataset == "imagenet":
        probe = Image.fromarray(np.random.default_rng(1).integers(0, 256, (330, 290, 3), dtype=np.uint8))
        assert torch.equal(transform(probe), model.geometry(probe))


def test_names_that_robustbenchs_loader_shortens_come_back(small):
    network = nn.Sequential(
        collections.OrderedDict(module=nn.Linear(2, 2), model=nn.Sequential(nn.Linear(2, 2)), head=nn.Linear(2, 2))
    )
    for dataset in ("cifar10", "imagenet"):
        model = copy.deepcopy(small[0])
        model.model = network
        state = stored_weights(model.state_dict(), model, dataset)
        for part in ("module.", "model."):
            state = robustbench.utils.rm_substr_from_state_dict(state, part)
        if dataset == "imagenet":
            state = robustbench.utils.add_substr_to_state_dict(state, "model.")
        assert {name for name in model.state_dict() if "normalize" not in name or dataset == "cifar10"} == {*state}
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker:UserWarning")  # RobustBench asks for them
@pytest.mark.filterwarnings("ignore:.* are right, no more than by chance:UserWarning")
def test_imagenet_from_the_command_line(tmp_path, monkeypatch, capsys, small_benchmark):
    """Evaluated on RobustBench's images with timm's geometry, and submitted: predictions are timm's own."""
    files = write_imagenet(tmp_path, COUNT)[:COUNT]
    order = timm.data.ImageNetInfo().label_names()
    labels = [order.index(file.split("/")[0]) for file in files]
    network = of_timm(SMALL)
    with torch.no_grad():  # one image is right
        network.get_classifier().bias[labels[0]] += 9
    data = {"img_size": 224, "crop_pct": 0.875}
    torch.save({"state_dict": network.state_dict(), "args": timm_args(**data)}, tmp_path / "net.pth")
    model = f"--timm {SMALL} --checkpoint {tmp_path}/net.pth --dataset imagenet --data-dir {tmp_path} --device cpu"
    ikl(f"evaluate {model} --n-examples {COUNT} --eps 4/255 --output {tmp_path}/run".split())
    assert "RobustBench would not take" not in capsys.readouterr().out
    log = Evaluation.load(tmp_path / "run" / "evaluation.json").log
    transform = timm.data.create_transform(**timm.data.resolve_data_config(data, model=network))
    with torch.no_grad():
        expected = network(torch.stack([transform(Image.open(tmp_path / "val" / file)) for file in files])).argmax(1)
    assert (log["natural_predictions"], log["labels"]) == (expected.tolist(), labels)
    found = log["model"], log["data"]["name"], log["data"]["preprocessing"], log["natural_accuracy"]
    assert found == (SMALL, "imagenet", "BicubicRes256Crop224", 50)
    paper = [text for key, value in PAPER.items() for text in (f"--{key}", value)]
    said = f"--name {NAME} --additional-data no --generated-data no --output {tmp_path}/submission"
    ikl(["submit", *model.split(), "--evaluation", f"{tmp_path}/run/evaluation.json", *paper, *said.split()])
    loaded, _ = loaded_by_robustbench(tmp_path / "submission", "imagenet", "Linf", monkeypatch)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in loaded.model.state_dict().items())
    ikl(["rank", f"{tmp_path}/run/evaluation.json", *model.split()])
    shown = capsys.readouterr().out
    assert "imagenet, Linf, eps = 4/255" in shown
    assert f"run again on {COUNT} of {COUNT} natural" in shown


# --- refusals --------------------------------------------------------------------------------------------------------

REFUSALS = [
    (lambda path: from_timm("resnet10"), "unknown model `resnet10`. Did you mean `resnet10t`? timm.list_models() has"),
    (
        lambda path: from_timm(f"{SMALL}.v7", path),
        "timm cannot build test_efficientnet.v7: Invalid pretrained tag (v7)",
    ),
    (lambda path: from_timm(SMALL), f"from_timm: {SMALL} of timm cannot be had: "),
    (lambda path: from_timm(SMALL, offline=True), "would be fetched, which `offline` forbids. Give a file."),
    (lambda path: from_timm("test_byobnet", path), "Name the network and image_size (--image-size) that it is of."),
    (lambda path: from_timm(SMALL, path, image_size=0), "`image_size` must be"),
    (lambda path: from_timm(SMALL, path, mean=(0.5,)), "`mean` and `std` must be given both or neither"),
    (lambda path: from_timm(SMALL, path.with_name("none")), "a checkpoint must be a file, but there is none at"),
    (lambda path: from_torchvision("resnet19"), "unknown model `resnet19`. Did you mean `resnet1"),
    (lambda path: from_torchvision("fcn_resnet50"), "unknown model `fcn_resnet50`"),
    (lambda path: from_torchvision("resnet18", offline=True), "would be fetched, which `offline` forbids"),
    (lambda path: from_torchvision("resnet50", weights_name="V2"), "unknown weights of resnet50 `V2`"),
    (lambda path: from_torchvision("mobilenet_v2", path), "which of IMAGENET1K_V1, IMAGENET1K_V2 makes its images."),
    (lambda path: from_torchvision("inception_v3", path), "tells whether it normalises images once more"),
]


@pytest.mark.parametrize(("call", "text"), REFUSALS, ids=[text[:30] for _, text in REFUSALS])
def test_refusals_are_one_line(call, text, small, monkeypatch):
    def no_network(*_, **__):
        raise OSError("there is no network here")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    monkeypatch.setattr("timm.models._builder.load_pretrained", no_network)
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        call(small[1])
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_network_is_named(tmp_path):
    content = {"state_dict": of_timm(SMALL).state_dict(), "args": timm_args(model="test_vit")}
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=f"must be a checkpoint of {SMALL}, but is of test_vit"):
        from_timm(SMALL, tmp_path / "net.pth")


def test_a_library_that_is_missing_names_its_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers, .*Run: pip install transformers"):
        from_huggingface("somewhere")

"""Networks by name: RobustBench's own classes, as its zoo would write them, and recognised from their weights."""

import importlib
import importlib.util

import pytest
import torch
from torch import nn

from ikl_plugins import models
from ikl_plugins._robustbench_import import import_robustbench
from ikl_plugins.models.robustbench_zoo import (
    class_count,
    nearest_architecture,
    parse_architecture,
    robustbench_network,
)

import_robustbench()
dm_wide_resnet, resnet, wide_resnet = (
    importlib.import_module(f"robustbench.model_zoo.architectures.{name}")
    for name in ("dm_wide_resnet", "resnet", "wide_resnet")
)

# name: (class, parameter tensors, parameters for 10 classes where they are published)
ZOO = {
    "WideResNet-34-10": (wide_resnet.WideResNet, 98, 46_160_474),
    "WideResNet-28-10": (wide_resnet.WideResNet, 80, 36_479_194),
    "WideResNet-10-1": (wide_resnet.WideResNet, None, None),
    "WideResNet-16-2": (wide_resnet.WideResNet, 44, 691_674),
    "DMWideResNet-28-10-SiLU": (dm_wide_resnet.DMWideResNet, 80, 36_479_194),
    "DMWideResNet-10-1-ReLU": (dm_wide_resnet.DMWideResNet, None, None),
    "DMWideResNet-70-16-Swish": (dm_wide_resnet.DMWideResNet, None, None),
    "ResNet-18": (resnet.ResNet, 62, 11_173_962),
    "ResNet-34": (resnet.ResNet, None, None),
    "ResNet-50": (resnet.ResNet, 161, 23_520_842),
    "ResNet-101": (resnet.ResNet, None, None),
    "ResNet-152": (resnet.ResNet, None, None),
    "PreActResNet-18": (resnet.PreActResNet, None, None),
    "PreActResNet-34": (resnet.PreActResNet, None, None),
    "DMPreActResNet-18-SiLU": (dm_wide_resnet.DMPreActResNet, None, None),
    "DMPreActResNet-34-ReLU": (dm_wide_resnet.DMPreActResNet, None, None),
}


def shapes(network):
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def on_meta(name, *arguments, **keywords):
    with torch.device("meta"):
        return robustbench_network(name, *arguments, **keywords)


def evaluated(architecture, *arguments, device="meta", **keywords):
    """What the expression for the zoo evaluates to, with nothing but its own imports."""
    names = {}
    mean = keywords.get("mean")
    for line in architecture.imports(arguments[0] if arguments else "cifar10", mean=mean):
        exec(line, names)  # noqa: S102  # our own lines
    with torch.device(device):
        return eval(architecture.expression(*arguments, **keywords), names)  # noqa: S307


# --- building --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_a_network_is_an_instance_of_the_zoo_s_class(name):
    cls, tensors, parameters = ZOO[name]
    network = on_meta(name)
    assert type(network) is cls
    if tensors is not None:
        assert len(list(network.parameters())) == tensors
        assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    architecture = parse_architecture(name)
    assert architecture.name == name
    layers = [entry for entry, shape in shapes(network).items() if len(shape) == 4 and "shortcut" not in entry]
    if architecture.family in ("ResNet", "PreActResNet"):
        assert len(layers) + 1 == architecture.depth


def test_the_networks_of_the_published_results_load_into_the_zoo_s_entries():
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
    from robustbench.model_zoo.models import model_dicts

    for dataset, classes in (("cifar10", 10), ("cifar100", 100)):
        for entry, name in (
            ("Cui2023Decoupled_WRN-34-10", "WideResNet-34-10"),
            ("Cui2023Decoupled_WRN-28-10", "DMWideResNet-28-10-SiLU"),
        ):
            with torch.device("meta"):
                theirs = model_dicts[BenchmarkDataset(dataset)][ThreatModel.Linf][entry]["model"]()
            ours = on_meta(name, classes, dataset=dataset)
            assert type(ours) is type(theirs)
            assert list(shapes(ours).items()) == list(shapes(theirs).items())
            if name.startswith("DM"):
                assert repr(ours) == repr(theirs)  # the activation


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize(("dataset", "classes"), [("cifar10", 10), ("cifar100", 7)])
def test_the_expression_is_the_network_key_for_key(name, dataset, classes):
    architecture = parse_architecture(name)
    ours, theirs = on_meta(name, classes, dataset=dataset), evaluated(architecture, dataset, classes)
    assert type(ours) is type(theirs)
    assert list(shapes(ours).items()) == list(shapes(theirs).items())
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize(
    "name", ["WideResNet-10-1", *(f"DMWideResNet-10-1-{name}" for name in ("SiLU", "ReLU", "Swish"))]
)
def test_the_expression_computes_the_same(name):
    ours, theirs = robustbench_network(name).eval(), evaluated(parse_architecture(name), device="cpu").eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize(
    ("dataset", "mean", "std", "own"),
    [
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616), False),
        ("cifar100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), False),
        ("digits", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), True),
        ("digits", (0.5,), (0.25, 0.25, 0.5), True),
    ],
)
def test_a_dm_network_normalises_with_the_published_or_its_own_statistics(dataset, mean, std, own):
    given = {"mean": mean, "std": std} if own else {}
    architecture = parse_architecture("DMWideResNet-10-1-SiLU")
    ours = robustbench_network(architecture.name, 4, dataset=dataset, **given)
    for network in (ours, evaluated(architecture, dataset, 4, device="cpu", **given)):
        torch.testing.assert_close(network.mean.flatten(), torch.tensor(mean).expand(3), rtol=0, atol=0)
        torch.testing.assert_close(network.std.flatten(), torch.tensor(std), rtol=0, atol=0)
        assert not {"mean", "std"} & set(network.state_dict())


# --- recognising -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ZOO if not name.endswith(("ReLU", "Swish"))])
def test_a_network_is_recognised_by_its_weights(name):
    assert nearest_architecture(on_meta(name, 3).state_dict()) == name
    assert class_count(on_meta(name, 3).state_dict()) == 3


@pytest.mark.parametrize("name", models.__all__)
def test_the_networks_of_this_package_are_recognised(name):
    with torch.device("meta"):
        network = getattr(models, name)(num_classes=10)
    # These have the names and shapes of RobustBench's.
    expected = {"ResNet18": "ResNet-18", "ResNet50": "ResNet-50"}.get(name, name)
    if name.startswith("wrn"):
        expected = f"WideResNet-{name[4:].replace('_', '-')}"
    assert nearest_architecture(network.state_dict()) == expected


def test_a_changed_network_is_near_its_origin_and_others_near_none():
    weights = on_meta("ResNet-18").state_dict()
    del weights["bn1.weight"]
    weights["extra"] = torch.zeros(3)
    assert nearest_architecture(weights) == "ResNet-18"
    assert nearest_architecture(nn.Linear(3, 2).state_dict()) is None
    assert nearest_architecture({}) is None
    assert class_count({"head.weight": torch.zeros(3, 2)}) is None


def test_names_in_a_file_do_not_decide_how_much_is_built():
    weights = {"block1.layer.100000000.conv1.weight": torch.zeros(1), "block1.layer.0.conv1.weight": torch.zeros(16)}
    assert nearest_architecture(weights) is None


# --- refusing --------------------------------------------------------------------------------------------------------

THREE = (0.5,) * 3
PAIR = {"mean": THREE, "std": THREE}
SILU = "DMWideResNet-10-1-SiLU"
REFUSED = [
    ("WideResNet-34", {}, ValueError, r"architecture `WideResNet-34`\. Did you mean `WideResNet-34-10`\?"),
    ("DMWideResNet-28-10", {}, ValueError, r"end with -SiLU.*got DMWideResNet-28-10"),
    ("DMWideResNet-28-10-GELU", {}, ValueError, r"end with -SiLU.*got DMWideResNet-28-10-GELU"),
    ("WideResNet-34-10-SiLU", {}, ValueError, r"unknown architecture"),
    ("ResNet-18-2", {}, ValueError, r"unknown architecture"),
    ("WideResNet-34-10 ", {}, ValueError, r"unknown architecture"),
    ("vit", {}, ValueError, r"unknown architecture `vit`"),
    ("ResNet-19", {}, ValueError, r"depth of ResNet, .*18, 34, 50, 101, 152"),
    ("DMPreActResNet-50-SiLU", {}, ValueError, r"depth of DMPreActResNet, .*18, 34"),
    ("WideResNet-33-10", {}, ValueError, r"6n \+ 4.*got WideResNet-33-10"),
    ("DMWideResNet-4-10-SiLU", {}, ValueError, r"6n \+ 4.*got DMWideResNet-4-10-SiLU"),
    ("WideResNet-10-0", {}, ValueError, r"a width of at least 1"),
    (34, {}, TypeError, r"`architecture` must be a name, got int"),
    (SILU, {"mean": THREE}, ValueError, r"`mean` and `std` must be given both"),
    (SILU, {**PAIR, "mean": (0.5, 0.5)}, ValueError, r"one number for each of 3 channels, .*got \(0\.5"),
    (SILU, {**PAIR, "mean": "0.5"}, TypeError, r"`mean` must be finite numbers, .*got '0\.5'"),
    (SILU, {**PAIR, "mean": (float("nan"),) * 3}, ValueError, r"`mean` must be finite numbers"),
    (SILU, {**PAIR, "std": (0.5, 0.5, 0.0)}, ValueError, r"`std` must be finite numbers above 0"),
    (SILU, {"dataset": "imagenet"}, ValueError, r"dataset='imagenet'"),
    (SILU, {"num_classes": 0}, ValueError, r"`num_classes` .*got 0"),
    ("WideResNet-10-1", PAIR, ValueError, r"must be left out for WideResNet-10-1"),
]


@pytest.mark.parametrize(("name", "keywords", "error", "message"), REFUSED)
def test_what_is_no_network_is_refused(name, keywords, error, message):
    with pytest.raises(error, match=r"^robustbench_network: .*" + message):
        robustbench_network(name, **keywords)

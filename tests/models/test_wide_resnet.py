"""What is the wide ResNets' alone; ``test_networks.py`` tests them with the others."""

import pytest
import torch
from torch import nn

from ikl_plugins import models
from ikl_plugins.models.wide_resnet import WideResNet


def test_the_second_update_of_the_published_code_is_not_made():
    """The zoo's forward would leave 2 at the normalisations that its features come from."""
    torch.manual_seed(0)
    model = models.wrn_16_1(num_classes=10)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert len(norms) == 13
    assert {"block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"} < set(norms)
    model(torch.rand(4, 3, 32, 32))
    assert {name: int(norm.num_batches_tracked) for name, norm in norms.items()} == dict.fromkeys(norms, 1)


@pytest.mark.parametrize("depth", [4, 18, 7])
def test_an_impossible_depth_is_refused(depth):
    with pytest.raises(ValueError, match=rf"WideResNet: `depth` must be 6n \+ 4 with n >= 1, got {depth}\. Use 10, 16"):
        WideResNet(depth, 1, 10)


def test_an_impossible_width_is_refused():
    with pytest.raises(ValueError, match=r"WideResNet: `width` must be at least 1, got 0\. It multiplies"):
        WideResNet(16, 0, 10)

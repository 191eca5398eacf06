"""What is the thin ResNets' alone; ``test_networks.py`` tests them with the others."""

import pytest

from ikl_plugins.models.resnet import ResNet


@pytest.mark.parametrize("depth", [2, 18, 7])
def test_an_impossible_depth_is_refused(depth):
    with pytest.raises(ValueError, match=rf"ResNet: `depth` must be 6n \+ 2 with n >= 1, got {depth}\. Use 8, 14"):
        ResNet(depth, (16, 16, 32, 64), 10)


def test_depths_between_the_published_ones_are_built():
    assert len(ResNet(26, (4, 4, 8, 16), 10).layer2) == 4

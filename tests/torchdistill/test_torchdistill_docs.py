"""docs/torchdistill.md: its pieces of YAML are configs that work."""

import re
from pathlib import Path

import pytest
import yaml

pytest.importorskip("torchdistill.losses.registry", reason="the torchdistill adapter needs torchdistill")

from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.interfaces.registry import get_forward_proc_func

from ikl_plugins.torchdistill import IKLLoss

PAGE = (Path(__file__).parents[2] / "docs" / "torchdistill.md").read_text()


def after(diff):
    """What a diff leaves, as YAML."""
    lines = [line for line in diff.splitlines() if not line.startswith("-") and line.strip() != "..."]
    return "\n".join(line[1:] for line in lines)


def test_the_pieces_of_yaml_are_yaml(tmp_path):
    pieces = re.findall(r"^```(yaml|diff)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in pieces] == ["diff", "yaml", "diff"]
    (_, diff), (_, hook), (_, adversarial) = pieces
    criterion = yaml.safe_load(after(diff))["train"]["criterion"]["kwargs"]["sub_terms"]["kd"]["criterion"]
    assert criterion["key"] == "IKLLoss"
    assert IKLLoss(**criterion["kwargs"]).class_prior.num_classes == 100
    # Its `...` stands for the lines between `criterion:` and the keywords of a loss.
    student = yaml.safe_load(hook.split("  criterion:")[0])["train"]["student"]
    assert student == {"forward_hook": {"output": ["classifier"]}}

    path = tmp_path / "adversarial.yaml"
    path.write_text(after(adversarial))
    train = load_yaml_file(str(path))["train"]
    strength = get_forward_proc_func(train["model"]["forward_proc"]).attack.strength(1, 200)
    assert strength == pytest.approx((8 / 255 / 200, 5, 4 / 255 / 200))
    assert train["pre_epoch_process"] == "ikl_pre_epoch_process"
    criterion = train["criterion"]["kwargs"]["sub_terms"]["ikl"]["criterion"]
    assert IKLLoss(**criterion["kwargs"]).ce_weight == 1.0

"""docs/torchdistill.md names every keyword, quotes messages that exist, and its pieces of YAML are YAML."""

import inspect
import re
from pathlib import Path

import pytest
import yaml

pytest.importorskip("torchdistill.losses.registry", reason="the torchdistill adapter needs torchdistill")

import torchdistill
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.interfaces.registry import get_forward_proc_func

import ikl_plugins
from ikl_plugins import losses as core
from ikl_plugins.adversarial import PGD
from ikl_plugins.torchdistill import IKLLoss, MidLevelLoss, adversarial_forward

PACKAGE = Path(ikl_plugins.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "torchdistill.md").read_text()


def rows(heading):
    """The cells of the table under a heading."""
    section = re.split(r"\n##+ ", PAGE.split(f"## {heading}\n", 1)[1], maxsplit=1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def parameters(cls):
    found = inspect.signature(cls).parameters.values()
    return {one.name: one.default for one in found if one.kind is not one.VAR_KEYWORD}


@pytest.mark.parametrize("kind", ["DKL", "IKL", "GKL"])
def test_the_table_of_keywords_is_that_of_the_losses(kind):
    documented = {}
    for names, losses, default, _ in rows("Keywords of the losses"):
        if losses == "all" or kind in losses.split(", "):
            documented.update(dict.fromkeys(re.findall(r"`(\w+)`", names), default))
    real = {**parameters(MidLevelLoss), **parameters(getattr(core, f"{kind}Loss"))}
    if kind == "DKL":
        del real["global_info"]  # accepted as False alone
    assert documented.keys() == real.keys()
    for name, default in documented.items():
        if default:
            assert yaml.safe_load(default.strip("`")) == real[name], name


def test_the_table_of_the_attack_is_that_of_its_keywords():
    documented = {}
    for names, default, _ in rows("Keywords of the attack"):
        documented.update(dict.fromkeys(re.findall(r"`(\w+)`", names), default))
    real = {**parameters(PGD), **parameters(adversarial_forward)}
    assert documented.keys() == real.keys()
    for name, default in documented.items():
        if default:
            assert yaml.safe_load(default.strip("`")) == real[name], name
        else:
            assert real[name] in (None, inspect.Parameter.empty), name


def test_the_messages_exist():
    ours = " ".join(path.read_text() for path in (PACKAGE / "torchdistill").glob("*.py"))
    ours += (PACKAGE / "_validation.py").read_text()
    theirs = " ".join(path.read_text() for path in Path(torchdistill.__file__).parent.rglob("*.py"))
    # A message may be split over the lines of its source.
    ours = re.sub(r'"\s+f?"', "", ours)
    table = rows("When something is refused")
    assert len(table) > 10
    for message, _ in table:
        (quoted, *_) = re.findall(r"`([^`]*)`", message)
        source = theirs if "(torchdistill)" in message else ours
        assert quoted in source or quoted.replace("output", "{io}") in source, quoted


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


def test_the_diff_of_adversarial_training_begins_with_the_shipped_config():
    """Its context and its removed lines are those of digits/ce.yaml, comments aside."""
    diff = re.findall(r"^```diff\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1]
    before = yaml.safe_load("\n".join(line[1:] for line in diff.splitlines() if not line.startswith("+")))
    shipped = (PACKAGE.parent / "configs" / "torchdistill" / "digits" / "ce.yaml").read_text()
    train = yaml.safe_load(
        "train:" + re.split(r"^(?:train|test):", shipped, flags=re.MULTILINE)[1].replace("!import_get", "")
    )["train"]
    assert before["train"] == {name: train[name] for name in ("model", "criterion")}

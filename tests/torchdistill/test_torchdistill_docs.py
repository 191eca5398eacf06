"""docs/torchdistill.md names every keyword, quotes messages that exist, and its pieces of YAML are YAML."""

import inspect
import re
from pathlib import Path

import pytest
import yaml

pytest.importorskip("torchdistill.losses.registry", reason="the torchdistill adapter needs torchdistill")

import torchdistill

import ikl_plugins
from ikl_plugins import losses as core
from ikl_plugins.torchdistill import IKLLoss, MidLevelLoss

PACKAGE = Path(ikl_plugins.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "torchdistill.md").read_text()


def rows(heading):
    """The cells of the table under a heading."""
    section = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
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


def test_the_pieces_of_yaml_are_yaml():
    pieces = re.findall(r"^```(yaml|diff)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in pieces] == ["diff", "yaml"]
    (_, diff), (_, hook) = pieces
    lines = [line for line in diff.splitlines() if not line.startswith("-") and line.strip() != "..."]
    after = yaml.safe_load("\n".join(line[1:] for line in lines))
    criterion = after["train"]["criterion"]["kwargs"]["sub_terms"]["kd"]["criterion"]
    assert criterion["key"] == "IKLLoss"
    assert IKLLoss(**criterion["kwargs"]).class_prior.num_classes == 100
    # Its `...` stands for the lines between `criterion:` and the keywords of a loss.
    student = yaml.safe_load(hook.split("  criterion:")[0])["train"]["student"]
    assert student == {"forward_hook": {"output": ["classifier"]}}

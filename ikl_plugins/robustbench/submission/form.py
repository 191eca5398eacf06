"""The texts of a submission: RobustBench's form, filled, and the entry of its model zoo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ...models.robustbench_zoo import Architecture
from ..evaluation.log import versions_text
from ..evaluation.verdict import attacks_in_words, warnings_of
from ..image_models import ImageArchitecture
from ..tables import markdown_text

__all__ = ["Facts", "form", "worded", "zoo_entry"]

TO_FILL = "TO BE FILLED IN"
_ZOO_LISTS = {"Linf": "linf", "L2": "l2", "corruptions": "common_corruptions"}
_ARCHITECTURES = "https://github.com/RobustBench/robustbench/tree/master/robustbench/model_zoo/architectures"


class Facts(NamedTuple):
    """What the texts are made from, besides the entry and the log; see
    :func:`~ikl_plugins.robustbench.submission.write_submission`."""

    name: str
    architecture: Architecture | ImageArchitecture
    dataset: str
    num_classes: int
    mean: Sequence[float] | None
    std: Sequence[float] | None
    generated_data: bool
    licence: str
    checkpoint_link: str | None
    code_link: str | None
    gdrive_id: str | None
    model_zoo: bool
    mark: str  # of a demonstration
    failed: tuple[str, ...]  # checks
    verified: str  # what of the log was compared with the model
    acknowledged: str | None  # why a result that AutoAttack flags stands
    preprocessing: str | None  # of ImageNet's images, RobustBench's name of it
    external: tuple[str, ...]  # evaluations of others

    @property
    def expression(self) -> str:
        return self.architecture.expression(self.dataset, self.num_classes, mean=self.mean, std=self.std)


def worded(architecture: Architecture | ImageArchitecture) -> str:
    """As the leaderboard words it: without the class's DM and the activation; a library's as the library does."""
    if isinstance(architecture, ImageArchitecture):
        return architecture.name
    parts = (architecture.family.removeprefix("DM"), architecture.depth, architecture.width)
    return "-".join(str(part) for part in parts if part)


def form(facts: Facts, entry: Mapping[str, Any], log: Mapping[str, Any]) -> str:
    """RobustBench's form "New Model(s)", filled."""
    corrupted = log["threat_model"] == "corruptions"
    upload = f"{TO_FILL} (upload models/{facts.dataset}/{log['threat_model']}/{facts.name}.pt)"
    notes = f"**{facts.mark}**\n\n" if facts.mark else ""
    if facts.failed:
        notes += f"**Preflight failed: {', '.join(facts.failed)}; see preflight.md.**\n\n"
    mit = facts.licence == "MIT"
    made = f"\n- **Preprocessing**: {facts.preprocessing}" if facts.preprocessing else ""
    return f"""\
---
name: New Model(s)
title: "[New Model] {facts.name}"
labels: new-model
---

{notes}# Paper Information

- **Paper Title**: {markdown_text(entry["name"])}
- **Paper URL**: {entry["link"]}
- **Paper authors**: {markdown_text(entry["authors"])}

# Leaderboard Claim(s)

## Model 1

- **Name**: {facts.name}
- **Venue**: {markdown_text(entry["venue"])}
- **Dataset**: {facts.dataset}
- **Architecture**: {entry["architecture"]} (`{facts.expression}`)
- **Threat Model**: {"Common Corruptions" if corrupted else log["threat_model"]}
- **eps**: {"N/A" if corrupted else log["eps"]}{made}
- **Clean accuracy**: {entry["clean_acc"]}
- **Robust accuracy**: {entry["reported"]}
- **Additional data**: {str(entry["additional_data"]).lower()}
- **Generated data**: {str(facts.generated_data).lower()}
- **Footnote**: {markdown_text(entry.get("footnote", "none"))}
- **Forward passes per prediction**: {entry["number_forward_passes"]}
- **Evaluation method**: {_method(log)}
- **Warnings of AutoAttack**: {markdown_text(" ".join(warnings_of(log))) or "none"}{_flag(facts, log)}
- **Log against the model**: {facts.verified}
- **External evaluations**: {markdown_text(". ".join(facts.external)) or "none"}
- **Checkpoint and code**: checkpoint {facts.checkpoint_link or upload}, code {facts.code_link or TO_FILL}

# Model Zoo

- [{_cross(facts.model_zoo)}] I want to add my models to the Model Zoo
- [x] I use an architecture that is included among those [here]({_ARCHITECTURES}) or in `timm`
- [{_cross(mit)}] I agree to release my model(s) under MIT license **OR**
- [{_cross(not mit)}] under a custom license, located here:{"" if mit else f" {facts.licence}"}
"""


def _flag(facts: Facts, log: Mapping[str, Any]) -> str:
    return f"\n- **Potentially unreliable**: {markdown_text(facts.acknowledged or 'yes')}" if log["unreliable"] else ""


def _cross(ticked: bool) -> str:
    return "x" if ticked else " "


def _method(log: Mapping[str, Any]) -> str:
    if log["threat_model"] == "corruptions":
        what = f"mean accuracy over {len(log['corruptions'])} corruptions and severities"
    else:
        what = markdown_text(attacks_in_words(log))
        what += f" ({', '.join(log['attacks'])})" if log["standard"] else ""
    return f"{what}, {log['n_examples']} images, seed {log['seed']}; {versions_text(log)}; per image in evaluation.json"


def zoo_entry(facts: Facts, threat_model: str) -> str:
    """A Python file with the entry of RobustBench's model zoo as ``ENTRY``."""
    mark = f"\n\n{facts.mark}" if facts.mark else ""
    if facts.failed:
        mark += f"\n\nPreflight failed: {', '.join(facts.failed)}."
    imports = "\n".join(facts.architecture.imports(facts.dataset, mean=facts.mean))
    made = "" if facts.preprocessing is None else f"\n        'preprocessing': {facts.preprocessing!r},"
    return f'''\
"""The entry of {facts.name} for RobustBench's model zoo.

It belongs into the list `{_ZOO_LISTS[threat_model]}` of robustbench/model_zoo/{facts.dataset}.py.{mark}
"""

{imports}

ENTRY = (
    {facts.name!r},
    {{
        'model': lambda: {facts.expression},
        'gdrive_id': {facts.gdrive_id or f"{TO_FILL}: the id of the uploaded file"!r},{made}
    }},
)
'''

"""A folder with everything that RobustBench asks for when a model is submitted, checked before it is written."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import runpy
import shutil
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _validation as check
from .._files import naming
from .._robustbench_import import import_robustbench
from ..models.robustbench_zoo import Architecture, class_count, nearest_architecture, parse_architecture
from .data import file_sha256
from .eps import as_fraction
from .evaluation_log import Evaluation, weights_sha256
from .leaderboard import board_eps, entries, table_origin
from .loading import DATASET_CLASSES, HostClassifier, Normalised
from .preflight import Preflight

__all__ = ["DEMONSTRATION", "check_name", "model_info", "write_submission"]

DEMONSTRATION = "Demonstration, not for submission."

_CALLER = "write_submission"
_MARK = "_demonstration"
_DATASETS = ("cifar10", "cifar100")
_IMAGES = 10000  # of the test sets of CIFAR-10 and CIFAR-100
_CORRUPTIONS = 15 * 5  # corruptions and severities of CIFAR-10-C and CIFAR-100-C
_ROUNDING = 0.005  # points: accuracies are stated with two decimals
_ARTICLES = ("a", "an", "the")
# Family name and year, first word of the title, and what tells several models of one paper apart. Of the entries of
# the leaderboards all have it but the baselines Standard, Standard_R50 and AlexNet and Geirhos2018_SIN and its kin.
_NAME = re.compile(
    r"(?P<author>[A-Z][A-Za-z-]*)(?P<year>(?:19|20)\d\d)(?P<word>[A-Z][A-Za-z0-9-]*)(?:_[A-Za-z0-9.-]+)*"
)
_ZOO_LISTS = {"Linf": "linf", "L2": "l2", "corruptions": "common_corruptions"}
_ARCHITECTURES = "https://github.com/RobustBench/robustbench/tree/master/robustbench/model_zoo/architectures"
_OUR_FILES = ("SHA256SUMS", "zoo_entry.py", "new_models_form.md")


def check_name(name: str, *, title: str | None = None, authors: Sequence[str] | None = None) -> None:
    """Checks the name of an entry against the pattern of the leaderboard's.

    Args:
        name: such as 'Cui2023Decoupled_WRN-28-10': family name of the first author, year, first word of the title that
            is no article, and, where a paper has several models, an underscore and what tells them apart.
        title: of the paper.
        authors: of the paper, first names first.

    Raises:
        TypeError: ``name`` is no text.
        ValueError: the name has another pattern.

    Warns:
        UserWarning: it has the pattern, but not with this title or this first author.
    """
    _name("check_name", name, title, authors)


def model_info(
    evaluation: Evaluation | Mapping[str, Any],
    *,
    architecture: str,
    dataset: str,
    title: str,
    link: str,
    authors: str | Sequence[str],
    venue: str,
    additional_data: bool,
    footnote: str | None = None,
    reported: float | None = None,
    number_forward_passes: int = 1,
) -> dict[str, Any]:
    """The entry of a result as RobustBench keeps it in ``model_info/<dataset>/<threat model>/<name>.json``.

    Args:
        evaluation: of :func:`~ikl_plugins.robustbench.evaluation.evaluate` or ``evaluate_corruptions``, or its log.
        architecture: as the leaderboard words it, such as 'WideResNet-28-10'.
        dataset: 'cifar10' or 'cifar100'.
        title: of the paper.
        link: to the paper.
        authors: of the paper, as one text or one each.
        venue: where it appeared, such as 'NeurIPS 2024' or 'arXiv, May 2023'.
        additional_data: whether more images than the data set's own were trained on. Generated images do not count;
            the footnote names them.
        footnote: what a reader of the leaderboard must know; left out if None.
        reported: robust accuracy that the paper states, in percent; None for the measured one.
        number_forward_passes: of networks per prediction.

    Returns:
        The fields in the order of RobustBench's own files; accuracies are text, in percent with two decimals.
    """
    log = evaluation.log if isinstance(evaluation, Evaluation) else evaluation
    robust = f"{log['robust_accuracy']:.2f}"
    entry = {
        "link": link,
        "name": title,
        "authors": authors if isinstance(authors, str) else ", ".join(authors),
        "additional_data": additional_data,
        "number_forward_passes": number_forward_passes,
        "dataset": dataset,
        "venue": venue,
        "architecture": architecture,
        "eps": board_eps(dataset, log["threat_model"]) if _same_eps(log, dataset) else log["eps"],
        "clean_acc": f"{log['natural_accuracy']:.2f}",
        "reported": robust if reported is None else f"{reported:.2f}",
    }
    if log["threat_model"] == "corruptions":
        entry["corruptions_acc"] = robust
        if log.get("corruptions_mce") is not None:
            entry["corruptions_mce"] = f"{log['corruptions_mce']:.2f}"
    else:
        entry["autoattack_acc"] = robust
        entry["unreliable"] = False
    if footnote is not None:
        entry["footnote"] = footnote
    return entry


def write_submission(
    folder: Path | str,
    *,
    name: str,
    model: nn.Module,
    architecture: str,
    dataset: str,
    evaluation: Evaluation | Mapping[str, Any] | Path | str,
    preflight: Preflight,
    title: str,
    link: str,
    authors: str | Sequence[str],
    venue: str,
    additional_data: bool,
    generated_data: bool,
    licence: str,
    footnote: str | None = None,
    reported: float | None = None,
    number_forward_passes: int = 1,
    checkpoint_link: str | None = None,
    code_link: str | None = None,
    gdrive_id: str | None = None,
    model_zoo: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    demonstration: bool = False,
    allow_failed_preflight: bool = False,
    force: bool = False,
) -> Path:
    """Writes a submission to RobustBench as a folder, whole or not at all.

    The folder has ``model_info/<dataset>/<threat model>/<name>.json``, the filled form ``new_models_form.md``, the
    entry of the model zoo ``zoo_entry.py``, the checkpoint ``models/<dataset>/<threat model>/<name>.pt``, which was
    read back as ``robustbench.load_model`` does, ``evaluation.json``, ``preflight.md``, ``preflight.json`` and
    ``SHA256SUMS``.

    Args:
        folder: where it shall be.
        name: of the entry; see :func:`check_name`.
        model: the network that was evaluated, of RobustBench's own class.
        architecture: its name, such as 'WideResNet-34-10'; see
            :func:`ikl_plugins.models.robustbench_zoo.parse_architecture`.
        dataset: 'cifar10' or 'cifar100'.
        evaluation: the evaluation, its log, or the file of the log. It says what the threat model is.
        preflight: the checks of the same model.
        title: of the paper.
        link: to the paper.
        authors: of the paper, as one text with commas or one each.
        venue: where it appeared, such as 'NeurIPS 2024'.
        additional_data: whether more real images than the data set's own were trained on, be it by the model, its
            teacher, or a network that labelled or generated images for it.
        generated_data: whether generated images were trained on; the footnote must then say how many.
        licence: 'MIT', or the address of another one.
        footnote: for the leaderboard, such as 'It uses additional 50M synthetic images in training.'.
        reported: robust accuracy that the paper states, in percent; None for the measured one.
        number_forward_passes: of networks per prediction.
        checkpoint_link: where the checkpoint lies; None leaves a line to fill in.
        code_link: where the code lies; likewise.
        gdrive_id: Google Drive's id of the checkpoint; likewise.
        model_zoo: whether the model shall be in RobustBench's zoo too.
        mean: normalisation of an architecture that normalises, if not the data set's.
        std: the same.
        demonstration: accept few images, other data and attacks that are not standard, and mark each file by its name
            or its text. '_demonstration' is added to the name.
        allow_failed_preflight: accept failed checks, and name them in the form.
        force: replace a submission that is there.

    Returns:
        The folder.

    Raises:
        TypeError: an argument of the wrong type, such as undeclared data.
        ValueError: the name, the data set or the architecture is not RobustBench's; the network is of another
            architecture or gives other logits, or its weights are not those of the evaluation; the evaluation is
            unfinished, not standard, on other or too few images, or at another radius than the leaderboard's; the
            preflight failed; the claim is above what was measured; generated data without a footnote; the folder
            exists.
        OSError: it cannot be written; what was there before is as it was.

    Warns:
        UserWarning: the name does not go with title or authors, or is taken by an entry of the leaderboard.
    """
    folder = Path(folder)
    _check_texts(title=title, link=link, venue=venue, licence=licence, footnote=footnote, name=name)
    _check_declared(additional_data, generated_data, footnote)
    people = [person.strip() for person in (authors.split(",") if isinstance(authors, str) else authors)]
    if not people or not all(people):
        raise ValueError(f"{_CALLER}: `authors` must name at least one person, got {authors!r}. Write them out.")
    if not re.match(r"https?://\S", link):
        raise ValueError(f"{_CALLER}: `link` must be an http(s) address, got {link!r}. Write https://arxiv.org/abs/...")
    if isinstance(number_forward_passes, bool) or not isinstance(number_forward_passes, int):
        raise TypeError(
            f"{_CALLER}: `number_forward_passes` must be an integer of at least 1, got {number_forward_passes!r}. "
            f"Write 1 for a single network."
        )
    if number_forward_passes < 1:
        raise ValueError(
            f"{_CALLER}: `number_forward_passes` must be an integer of at least 1, got {number_forward_passes}. "
            f"Write 1 for a single network."
        )
    _name(_CALLER, name, title, people)
    log = _log(evaluation)
    threat_model = log["threat_model"]
    parsed = parse_architecture(architecture, caller=_CALLER)
    _check_dataset(dataset, threat_model)
    if not demonstration:
        _check_evaluation(log, dataset)
        _check_free(name, dataset, threat_model)
    _check_always(log, reported, allow_failed_preflight)
    _check_preflight(preflight, allow_failed_preflight)
    weights = _weights(model, parsed, dataset, mean, std, log)
    _check_place(folder, force)

    facts = _Facts(
        name=name + _MARK if demonstration else name,
        architecture=parsed,
        dataset=dataset,
        num_classes=class_count(weights) or DATASET_CLASSES[dataset],
        mean=mean,
        std=std,
        gdrive_id=gdrive_id or "TO BE FILLED IN: the id of the uploaded file",
        mark=DEMONSTRATION if demonstration else "",
        failed=preflight.failed,
    )
    if demonstration:
        footnote = DEMONSTRATION if footnote is None else f"{DEMONSTRATION} {footnote}"
    entry = model_info(
        log,
        architecture=_worded(parsed),
        dataset=dataset,
        title=title,
        link=link,
        authors=people,
        venue=venue,
        additional_data=additional_data,
        footnote=footnote,
        reported=reported,
        number_forward_passes=number_forward_passes,
    )
    form = _form(facts, entry, log, generated_data, licence, checkpoint_link, code_link, model_zoo)
    place = Path(dataset, threat_model)
    with _folder_aside(folder) as aside:
        _write(aside / "model_info" / place / f"{facts.name}.json", json.dumps(entry, indent=2) + "\n")
        _write(aside / "new_models_form.md", form)
        _write(aside / "zoo_entry.py", _zoo_entry(facts, threat_model))
        checkpoint = aside / "models" / place / f"{facts.name}.pt"
        checkpoint.parent.mkdir(parents=True)
        torch.save(weights, checkpoint)
        _read_back(aside / "zoo_entry.py", checkpoint, model)
        marked = {**log, "demonstration": facts.mark} if demonstration else log
        Evaluation(dict(marked)).save(aside / "evaluation.json")
        checks = json.loads(preflight.to_json())
        if demonstration:
            checks["demonstration"] = facts.mark
        _write(aside / "preflight.json", json.dumps(checks, indent=2) + "\n")
        _write(aside / "preflight.md", preflight.markdown() + (f"\n{facts.mark}\n" if demonstration else ""))
        _write(aside / "SHA256SUMS", _sums(aside))
    return folder


class _Facts(NamedTuple):
    """What several of the files are made from."""

    name: str
    architecture: Architecture
    dataset: str
    num_classes: int
    mean: Sequence[float] | None
    std: Sequence[float] | None
    gdrive_id: str
    mark: str
    failed: tuple[str, ...]


# --- checks ----------------------------------------------------------------------------------------------------------


def _name(caller: str, name: str, title: str | None, authors: Sequence[str] | None) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{caller}: `name` must be text, got {type(name).__name__}. Write Cui2023Decoupled_WRN-28-10.")
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(
            f"{caller}: `name` must be <FamilyName><Year><FirstWordOfTitle>, and may have _<What tells it apart>, got "
            f"{name!r}. Write it as Cui2023Decoupled_WRN-28-10."
        )
    if title is not None:
        words = [word for word in title.split() if word.casefold() not in _ARTICLES and _plain(word)]
        first = _plain(words[0]) if words else ""
        word = _plain(found["word"])
        if not (word.startswith(first) or first.startswith(word)):
            warnings.warn(
                f"{caller}: `name` has {found['word']} where RobustBench has the first word of the title, which is "
                f"{words[0] if words else 'missing'}.",
                UserWarning,
                stacklevel=3,
            )
    if authors and authors[0].split():
        family = authors[0].split()[-1]
        if not _plain(found["author"]).startswith(_plain(family)):
            warnings.warn(
                f"{caller}: `name` has {found['author']} where RobustBench has the family name of the first author, "
                f"which is {family}.",
                UserWarning,
                stacklevel=3,
            )


def _plain(word: str) -> str:
    """Letters and digits without accents and case."""
    return "".join(c for c in unicodedata.normalize("NFKD", word) if c.isalnum()).casefold()


def _check_texts(**texts: str | None) -> None:
    for argument, text in texts.items():
        if text is None and argument == "footnote":
            continue
        if not isinstance(text, str):
            raise TypeError(f"{_CALLER}: `{argument}` must be text, got {type(text).__name__}. Write it out.")
        if not text.strip() or len(text.splitlines()) > 1:
            raise ValueError(f"{_CALLER}: `{argument}` must be one line of text, got {text!r}. Write it out.")
    if texts["licence"] != "MIT" and "://" not in str(texts["licence"]):
        raise ValueError(
            f"{_CALLER}: `licence` must be 'MIT' or the address of another one, got {texts['licence']!r}. "
            f"Write 'MIT' or https://..."
        )


def _check_declared(additional_data: object, generated_data: object, footnote: str | None) -> None:
    for argument, value in (("additional_data", additional_data), ("generated_data", generated_data)):
        if not isinstance(value, bool):
            raise TypeError(
                f"{_CALLER}: `{argument}` must be declared with True or False, got {value!r}. Say what was trained on."
            )
    if generated_data and footnote is None:
        raise ValueError(
            f"{_CALLER}: `footnote` must say what generated images were trained on, got None. "
            f"Write 'It uses additional 1M synthetic images in training.'"
        )


def _log(evaluation: object) -> dict[str, Any]:
    if isinstance(evaluation, (str, Path)):
        if not Path(evaluation).is_file():
            raise ValueError(
                f"{_CALLER}: `evaluation` must be the file of a log, but there is none at {evaluation}. "
                f"Run tools/robustbench_eval.py first."
            )
        evaluation = Evaluation.load(evaluation)
    if isinstance(evaluation, Evaluation):
        evaluation = evaluation.log
    if not isinstance(evaluation, Mapping):
        raise TypeError(
            f"{_CALLER}: `evaluation` must be an Evaluation, its log or its file, got {type(evaluation).__name__}. "
            f"Pass what evaluate returned."
        )
    return dict(evaluation)


def _check_dataset(dataset: str, threat_model: str) -> None:
    if dataset == "imagenet" or threat_model == "corruptions_3d":
        raise ValueError(
            f"{_CALLER}: `dataset` must be 'cifar10' or 'cifar100', got 'imagenet'. RobustBench takes its ImageNet "
            f"networks from timm, each with code of its own: open its form and write model_info(...) into it."
        )
    if dataset not in _DATASETS:
        raise ValueError(check.unknown_name_message(_CALLER, "data set", dataset, _DATASETS))
    entries(dataset, threat_model)  # refuses what has no leaderboard


def _check_evaluation(log: Mapping[str, Any], dataset: str) -> None:
    """What makes an evaluation the benchmark's."""
    way_out = "Evaluate again, or pass demonstration=True."
    corrupted = log["threat_model"] == "corruptions"
    data = (log["data"] or {}).get("name")
    wrong = None
    if corrupted and (log["dataset"] != dataset or len(log["corruptions"]) != _CORRUPTIONS):
        wrong = (
            f"have all {_CORRUPTIONS} corruptions and severities of {dataset}, got {len(log['corruptions'])} of "
            f"{log['dataset']}"
        )
    elif not corrupted and not log["standard"]:
        attacks = ", ".join(log["attacks"])
        wrong = f"be of standard AutoAttack, got version {log['version']!r} with {attacks}"
    elif data != dataset:
        wrong = f"be on the test images of {dataset}, got {data!r}"
    elif log["n_examples"] < _IMAGES:
        wrong = f"have all {_IMAGES} test images, got {log['n_examples']}"
    elif log["n_classes"] != DATASET_CLASSES[dataset]:
        wrong = f"be of a model with {DATASET_CLASSES[dataset]} classes, got {log['n_classes']}"
    elif not corrupted and not _same_eps(log, dataset):
        wrong = f"be at eps {board_eps(dataset, log['threat_model'])}, that of the leaderboard, got {log['eps']}"
    if wrong is not None:
        raise ValueError(f"{_CALLER}: `evaluation` must {wrong}. {way_out}")


def _same_eps(log: Mapping[str, Any], dataset: str) -> bool:
    """Whether the radius is the leaderboard's, however it is written."""
    board = board_eps(dataset, log["threat_model"])
    if board is None or log["eps"] is None:
        return board is None and log["eps"] is None
    return as_fraction(log["eps"]) == as_fraction(board)


def _check_always(log: Mapping[str, Any], reported: float | None, allow_failed: bool) -> None:
    if not log["finished"]:
        raise ValueError(
            f"{_CALLER}: `evaluation` must be finished, but was interrupted. Run the same evaluation again to go on."
        )
    if log["natural_accuracy"] is None or log["robust_accuracy"] is None:
        raise ValueError(
            f"{_CALLER}: `evaluation` must have the natural and the robust accuracy, got "
            f"{log['natural_accuracy']} and {log['robust_accuracy']}. Evaluate on natural images too."
        )
    if log["threat_model"] == "Linf" and (as_fraction(log["eps"]) * 255).denominator != 1:
        raise ValueError(
            f"{_CALLER}: `evaluation` must be at a radius of whole grey levels, got eps {log['eps']}. "
            f"Evaluate again with --eps 8/255: another radius is another threat model."
        )
    if reported is not None:
        claimed = check.check_number(_CALLER, "reported", reported)
        if claimed > 100:
            raise ValueError(f"{_CALLER}: `reported` must be in percent, 0 to 100, got {reported}. Pass 57.09.")
        if claimed > log["robust_accuracy"] + _ROUNDING and not allow_failed:
            raise ValueError(
                f"{_CALLER}: `reported` must not be above the measured {log['robust_accuracy']:.2f} %, got "
                f"{claimed:.2f} %. Claim the measured one, or pass allow_failed_preflight=True if the paper says so."
            )


def _check_preflight(preflight: object, allow_failed: bool) -> None:
    if not isinstance(preflight, Preflight):
        raise TypeError(
            f"{_CALLER}: `preflight` must be the result of preflight, got {type(preflight).__name__}. Run it first."
        )
    if allow_failed:
        return
    if preflight.failed:
        reasons = " ".join(f"{name}: {preflight[name].why}" for name in preflight.failed)
        raise ValueError(
            f"{_CALLER}: `preflight` must have passed, but failed. {reasons} Mend the model, or pass "
            f"allow_failed_preflight=True, which the form will say."
        )
    unchecked = [name for name in preflight.unchecked if name not in ("eps", "claim")]  # the log tells these
    if unchecked:
        raise ValueError(
            f"{_CALLER}: `preflight` must have made its checks, but not: {', '.join(unchecked)}. Mend what its report "
            f"names, or pass allow_failed_preflight=True, which the form will say."
        )


def _check_free(name: str, dataset: str, threat_model: str) -> None:
    if any(entry.id == name for entry in entries(dataset, threat_model)):
        warnings.warn(
            f"{_CALLER}: `name` {name} is that of an entry for {dataset} and {threat_model} (table of "
            f"{table_origin()['date']}). Unless this replaces it, add _ and what tells the models apart.",
            UserWarning,
            stacklevel=3,
        )


def _weights(
    model: object,
    architecture: Architecture,
    dataset: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    log: Mapping[str, Any],
) -> dict[str, Tensor]:
    """The state dict to save, of exactly this architecture and with exactly the weights that were evaluated."""
    if isinstance(model, (Normalised, HostClassifier)):
        raise ValueError(
            f"{_CALLER}: `model` must be a network of RobustBench's own class, got a {type(model).__name__} around "
            f"one. Train a DMWideResNet, which normalises itself, or without normalisation; evaluate and submit what "
            f"load_checkpoint gives for it."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{_CALLER}: `model` must be the network that was evaluated, got {type(model).__name__}. "
            f"Pass what load_checkpoint returned."
        )
    state = model.state_dict()
    classes = class_count(state) or DATASET_CLASSES[dataset]
    network = architecture.build(classes, dataset=dataset, mean=mean, std=std)
    own = network.state_dict()
    missing = [key for key in own if key not in state or state[key].shape != own[key].shape]
    unexpected = [key for key in state if key not in own]
    if missing or unexpected:
        nearest = nearest_architecture(state)
        hint = f" It looks like {nearest}." if nearest else ""
        raise ValueError(
            f"{_CALLER}: `model` must be a {architecture.name} of RobustBench's own class, but has other entries; "
            f"missing or of another shape: {check.first_names(missing) or 'none'}; unexpected: "
            f"{check.first_names(unexpected) or 'none'}.{hint} Evaluate and submit what load_checkpoint gives for one "
            f"of RobustBench's architectures; another network needs its code in RobustBench first."
        )
    if type(model) is not type(network):
        raise ValueError(
            f"{_CALLER}: `model` must be an instance of RobustBench's {type(network).__name__}, got "
            f"{type(model).__name__}. Load the checkpoint with load_checkpoint."
        )
    found = weights_sha256(state)
    if found != log["weights_sha256"]:
        raise ValueError(
            f"{_CALLER}: `model` must have the weights of the evaluation, whose checksum is "
            f"{log['weights_sha256'][:12]}, got {found[:12]}. Evaluate this checkpoint, or pass the evaluated one."
        )
    return {key: state[key].detach().cpu().contiguous().clone() for key in own}


# --- what is written -------------------------------------------------------------------------------------------------


def _worded(architecture: Architecture) -> str:
    """As the leaderboard words it: without the class's DM and the activation."""
    parts = (architecture.family.removeprefix("DM"), architecture.depth, architecture.width)
    return "-".join(str(part) for part in parts if part)


def _form(
    facts: _Facts,
    entry: Mapping[str, Any],
    log: Mapping[str, Any],
    generated_data: bool,
    licence: str,
    checkpoint_link: str | None,
    code_link: str | None,
    model_zoo: bool,
) -> str:
    """RobustBench's form "New Model(s)", filled."""
    corrupted = log["threat_model"] == "corruptions"
    to_fill = "TO BE FILLED IN"
    file = f"models/{facts.dataset}/{log['threat_model']}/{facts.name}.pt"
    data = "true" if entry["additional_data"] else "false"
    notes = [f"**{facts.mark}**"] if facts.mark else []
    if facts.failed:
        notes.append(f"**Preflight failed: {', '.join(facts.failed)}; see preflight.md.**")
    lines = [
        "---",
        "name: New Model(s)",
        f'title: "[New Model] {facts.name}"',
        "labels: new-model",
        "---",
        "",
        *(line for note in notes for line in (note, "")),
        "# Paper Information",
        "",
        f"- **Paper Title**: {entry['name']}",
        f"- **Paper URL**: {entry['link']}",
        f"- **Paper authors**: {entry['authors']}",
        "",
        "# Leaderboard Claim(s)",
        "",
        "## Model 1",
        "",
        f"- **Name**: {facts.name}",
        f"- **Venue**: {entry['venue']}",
        f"- **Dataset**: {facts.dataset}",
        f"- **Architecture**: {entry['architecture']} (`{_expression(facts)}`)",
        f"- **Threat Model**: {'Common Corruptions' if corrupted else log['threat_model']}",
        f"- **eps**: {'N/A' if corrupted else log['eps']}",
        f"- **Clean accuracy**: {entry['clean_acc']}",
        f"- **Robust accuracy**: {entry['reported']}",
        f"- **Additional data**: {data}",
        f"- **Generated data**: {'true' if generated_data else 'false'}",
        f"- **Footnote**: {entry.get('footnote', 'none')}",
        f"- **Forward passes per prediction**: {entry['number_forward_passes']}",
        f"- **Evaluation method**: {_method(log)}",
        f"- **Checkpoint and code**: checkpoint {checkpoint_link or f'{to_fill} (upload {file})'}, "
        f"code {code_link or to_fill}",
        "",
        "# Model Zoo",
        "",
        f"- [{'x' if model_zoo else ' '}] I want to add my models to the Model Zoo",
        f"- [x] I use an architecture that is included among those [here]({_ARCHITECTURES}) or in `timm`",
        f"- [{'x' if licence == 'MIT' else ' '}] I agree to release my model(s) under MIT license **OR**",
        f"- [{' ' if licence == 'MIT' else 'x'}] under a custom license, located here: "
        f"{'' if licence == 'MIT' else licence}".rstrip(),
        "",
    ]
    return "\n".join(lines)


def _method(log: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in log["versions"].items())
    if log["threat_model"] == "corruptions":
        what = f"mean accuracy over {len(log['corruptions'])} corruptions and severities"
    else:
        kind = "standard AutoAttack" if log["standard"] else f"AutoAttack, version {log['version']}"
        what = f"{kind} ({', '.join(log['attacks'])})"
    return f"{what}, {log['n_examples']} images, seed {log['seed']}; {versions}; per image in evaluation.json"


def _expression(facts: _Facts) -> str:
    return facts.architecture.expression(facts.dataset, facts.num_classes, mean=facts.mean, std=facts.std)


def _zoo_entry(facts: _Facts, threat_model: str) -> str:
    imports = facts.architecture.imports(facts.dataset, mean=facts.mean)
    mark = f"\n\n{facts.mark}" if facts.mark else ""
    failed = f"\n\nPreflight failed: {', '.join(facts.failed)}." if facts.failed else ""
    return "\n".join(
        [
            f'"""The entry of {facts.name} for RobustBench\'s model zoo.',
            "",
            f"It belongs into the list `{_ZOO_LISTS[threat_model]}` of robustbench/model_zoo/{facts.dataset}.py."
            f"{mark}{failed}",
            '"""',
            "",
            *imports,
            "",
            "ENTRY = (",
            f"    {facts.name!r},",
            "    {",
            f"        'model': lambda: {_expression(facts)},",
            f"        'gdrive_id': {facts.gdrive_id!r},",
            "    },",
            ")",
            "",
        ]
    )


def _read_back(zoo_entry: Path, checkpoint: Path, model: nn.Module) -> None:
    """Loads what was written as ``robustbench.load_model`` does, and compares with the network that was evaluated."""
    robustbench = import_robustbench()
    _, entry = runpy.run_path(str(zoo_entry))["ENTRY"]
    network = entry["model"]().eval()
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    for prefix in ("module.", "model."):
        state = robustbench.utils.rm_substr_from_state_dict(state, prefix)
    network.load_state_dict(state, strict=True)
    if weights_sha256(network) != weights_sha256(model):
        raise ValueError(
            f"{_CALLER}: {checkpoint.name} must read back as it was written, but does not. Write to another disk."
        )
    # What no weight tells: the activation, mean and std.
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same = torch.equal(network(images), copy.deepcopy(model).cpu().eval()(images))
    if not same:
        raise ValueError(
            f"{_CALLER}: `model` must give the logits of the zoo entry, but does not, although the weights fit. Name "
            f"its own activation in `architecture`, and pass its `mean` and `std`."
        )


def _sums(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return "".join(f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _check_place(folder: Path, force: bool) -> None:
    if not os.path.lexists(folder):
        return
    if not force:
        raise ValueError(
            f"{_CALLER}: `folder` must be a new one, but {folder} is there. Name another, or pass force=True."
        )
    if folder.is_symlink() or not all((folder / file).is_file() for file in _OUR_FILES):
        raise ValueError(
            f"{_CALLER}: `folder` must be a new one or a submission, but {folder} is something else, which force=True "
            f"does not replace. Name another."
        )


@contextlib.contextmanager
def _folder_aside(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name of ``folder`` once everything is written."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    with naming(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            yield aside
            if os.path.lexists(folder):
                os.rename(folder, old)
            try:
                os.rename(aside, folder)
            except OSError:
                if old.exists():
                    os.rename(old, folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

"""Writing a submission, whole or not at all."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import runpy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import torch
from torch import nn

from ..._files import folder_aside, locked, settle
from ..._robustbench_import import import_robustbench
from ...models.robustbench_zoo import parse_architecture
from ..data import Images, file_sha256
from ..evaluation.external import External, check_external, lowest_robust, read_external, verify_external
from ..evaluation.log import Evaluation, weights_sha256
from ..evaluation.verdict import warnings_of
from ..evaluation.verify import verify
from ..loading import DATASET_CLASSES
from ..preflight import Preflight
from ..submittable import (
    check_dataset,
    check_loadable_name,
    check_network,
    count_classes,
    named_architecture,
    same_logits,
    statistics_of,
    stored_weights,
)
from .checks import (
    CALLER,
    check_always,
    check_benchmark,
    check_claim,
    check_flag,
    check_paper,
    check_place,
    check_preflight,
    check_weights,
    read_evaluation,
    warn_of_taken_name,
)
from .entry import model_info
from .form import Facts, form, worded, zoo_entry
from .name import name_checked

__all__ = ["DEMONSTRATION", "alone", "check_statements", "write_submission"]

DEMONSTRATION = "Demonstration, not for submission."
_MARK = "_demonstration"
P = ParamSpec("P")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuses a second process that writes the same submission, and removes what a killed one has left."""
    with locked(CALLER, folder, "Wait for it, or name another folder."):
        settle(folder)
        yield


def _alone(write: Callable[P, Path]) -> Callable[P, Path]:
    @functools.wraps(write)
    def written(*args: P.args, **options: P.kwargs) -> Path:
        with alone(Path(str(args[0] if args else options["folder"]))):
            return write(*args, **options)

    return written


@_alone
def write_submission(
    folder: Path | str,
    *,
    name: str,
    model: nn.Module,
    architecture: str | None = None,
    dataset: str,
    evaluation: Evaluation | Path | str,
    images: Images | Callable[[], Images],
    preflight: Preflight | Callable[[], Preflight],
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
    data_dir: str | Path | None = None,
    acknowledge_unreliable: str | None = None,
    external: Sequence[External | Path | str] = (),
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
        model: the network that was evaluated, of RobustBench's own class, or of
            :func:`~ikl_plugins.robustbench.from_timm` or ``from_torchvision``.
        architecture: name of RobustBench's own class, such as 'WideResNet-34-10'; see
            :func:`ikl_plugins.models.robustbench_zoo.parse_architecture`. None for timm and torchvision.
        dataset: 'cifar10', 'cifar100', or 'imagenet', which has networks of timm and torchvision alone.
        evaluation: the evaluation with its adversarial images, or the file of the log. It says what the threat model
            is.
        images: all that were evaluated, or a function that loads them. The model is run again on some of them; see
            :func:`~ikl_plugins.robustbench.verify`.
        preflight: the checks of the same model, or a function that makes them. It is called last, when nothing else
            stands against the submission.
        title, link, authors, venue, footnote, reported, number_forward_passes: see :func:`model_info`.
        additional_data: whether more real images than the data set's own were trained on, be it by the model, its
            teacher, or a network that labelled or generated images for it.
        generated_data: whether generated images were trained on; the footnote must then say how many.
        licence: 'MIT', or the address of another one.
        checkpoint_link, code_link, gdrive_id: where the checkpoint and the code lie, and Google Drive's id of the
            checkpoint; None leaves a line to fill in.
        model_zoo: whether the model shall be in RobustBench's zoo too.
        mean, std: normalisation of an architecture that normalises, if not the data set's.
        data_dir: of an evaluation under corruptions, where the corrupted images lie, on some of which the model is run
            again; None for none, as the form then says.
        acknowledge_unreliable: where AutoAttack's checks flag the evaluation, one line on why the number stands or
            which adaptive attack was run. It appears in the form.
        external: evaluations of others under the same threat model, such as adaptive attacks, or the files of their
            records; see :func:`~ikl_plugins.robustbench.evaluation.external.read_external`. The model is run on their
            adversarial images. They appear in the form, in ``external.json`` and, where one is lower than AutoAttack,
            in the entry.
        demonstration: accept few images, other data and attacks that are not standard, and mark each file by its name
            or its text. '_demonstration' is added to the name.
        allow_failed_preflight: accept failed checks, and name them in the form.
        force: replace a submission that is there.

    Returns:
        The folder.

    Raises:
        TypeError: an argument of the wrong type, such as undeclared data.
        ValueError: the name, the data set or the architecture is not RobustBench's; the network is of another
            architecture or gives other logits, or its weights are not those of the evaluation; the evaluation does not
            agree with itself or the model, is unfinished, not standard, on other or too few images, at another radius
            than the leaderboard's, or flagged by AutoAttack without an acknowledgement; the preflight failed; an
            external evaluation is of another threat model or model, or its images are not in the ball; the claim is
            above the lowest that was measured; generated data without a footnote; the folder exists, or another process
            writes it.
        OSError: it cannot be written; what was there before is as it was.

    Warns:
        UserWarning: the name does not go with title or authors, or is taken by an entry of the leaderboard.
    """
    folder = Path(folder)
    people, evaluation, externals = check_statements(
        folder,
        name=name,
        architecture=architecture,
        dataset=dataset,
        evaluation=evaluation,
        title=title,
        link=link,
        authors=authors,
        venue=venue,
        additional_data=additional_data,
        generated_data=generated_data,
        licence=licence,
        footnote=footnote,
        reported=reported,
        number_forward_passes=number_forward_passes,
        checkpoint_link=checkpoint_link,
        code_link=code_link,
        acknowledge_unreliable=acknowledge_unreliable,
        external=external,
        demonstration=demonstration,
        allow_failed_preflight=allow_failed_preflight,
        force=force,
    )
    log = evaluation.log
    threat_model = log["threat_model"]
    parsed = named_architecture(model, architecture, dataset)
    weights = check_network(model, parsed, dataset, mean, std)
    check_weights(weights, log)
    if not demonstration:
        warn_of_taken_name(name, dataset, threat_model)
    if not isinstance(images, Images):
        images = images()
    evaluated = copy.deepcopy(model).eval()
    verified = verify(evaluated, evaluation, images, data_dir=data_dir)
    externals = [verify_external(CALLER, each, evaluated, log, images.images) for each in externals]
    check_claim(reported, lowest_robust(log, externals), allow_failed_preflight)
    if not isinstance(preflight, Preflight) and callable(preflight):
        preflight = preflight()
    check_preflight(preflight, allow_failed_preflight)
    said = tuple(f"AutoAttack, in the evaluation: {warning}" for warning in warnings_of(log))
    preflight = dataclasses.replace(preflight, warnings=(*preflight.warnings, *said))

    mean, std = statistics_of(model) or (mean, std)
    mark = DEMONSTRATION if demonstration else ""
    facts = Facts(
        name=name + _MARK if demonstration else name,
        architecture=parsed,
        dataset=dataset,
        num_classes=count_classes(model) or DATASET_CLASSES[dataset],
        mean=mean,
        std=std,
        generated_data=generated_data,
        licence=licence,
        checkpoint_link=checkpoint_link,
        code_link=code_link,
        gdrive_id=gdrive_id,
        model_zoo=model_zoo,
        mark=mark,
        failed=preflight.failed,
        verified=str(verified),
        acknowledged=acknowledge_unreliable,
        preprocessing=log["data"].get("preprocessing") if dataset == "imagenet" else None,
        external=tuple(map(str, externals)),
    )
    entry = model_info(
        log,
        architecture=worded(parsed),
        dataset=dataset,
        title=title,
        link=link,
        authors=people,
        venue=venue,
        additional_data=additional_data,
        footnote=" ".join(part for part in (mark, footnote) if part) or None,
        reported=reported,
        number_forward_passes=number_forward_passes,
        external=lowest_robust(log, externals),
    )
    marked = {"demonstration": mark} if demonstration else {}
    checks = {**json.loads(preflight.to_json()), **marked}
    place = Path(dataset, threat_model)
    with folder_aside(folder) as aside:
        _write(aside / "model_info" / place / f"{facts.name}.json", json.dumps(entry, indent=2) + "\n")
        _write(aside / "new_models_form.md", form(facts, entry, log))
        _write(aside / "zoo_entry.py", zoo_entry(facts, threat_model))
        checkpoint = aside / "models" / place / f"{facts.name}.pt"
        checkpoint.parent.mkdir(parents=True)
        torch.save(stored_weights(weights, model, dataset), checkpoint)
        _read_back(aside / "zoo_entry.py", checkpoint, model, dataset)
        Evaluation({**log, **marked}).save(aside / "evaluation.json")
        if externals:
            _write(aside / "external.json", json.dumps([each.record() for each in externals], indent=2) + "\n")
        _write(aside / "preflight.json", json.dumps(checks, indent=2) + "\n")
        _write(aside / "preflight.md", preflight.markdown() + (f"\n{mark}\n" if mark else ""))
        _write(aside / "SHA256SUMS", _sums(aside))
    return folder


def check_statements(
    folder: Path,
    *,
    name: str,
    architecture: str | None,
    dataset: str,
    evaluation: Evaluation | Path | str,
    reported: float | None,
    acknowledge_unreliable: str | None,
    external: Sequence[External | Path | str],
    demonstration: bool,
    allow_failed_preflight: bool,
    force: bool,
    **paper: Any,
) -> tuple[list[str], Evaluation, list[External]]:
    """The authors, the evaluation and those of others, after every rule that needs neither model nor images."""
    people = check_paper(name=name, **paper)
    name_checked(CALLER, name, paper["title"], people, stacklevel=5)
    check_loadable_name(name, dataset)
    if architecture is not None:
        parse_architecture(architecture, caller=CALLER)
    evaluation = read_evaluation(evaluation)
    log = evaluation.log
    check_dataset(dataset, log["threat_model"])
    check_always(log, reported, allow_failed_preflight)
    externals = [read_external(CALLER, each) for each in external]
    for each in externals:
        check_external(CALLER, each, log)
    check_claim(reported, lowest_robust(log, externals), allow_failed_preflight)
    if not demonstration:
        check_benchmark(log, dataset)
    check_flag(log, acknowledge_unreliable, demonstration)
    check_place(folder, force)
    return people, evaluation, externals


def _read_back(zoo_entry: Path, checkpoint: Path, model: nn.Module, dataset: str) -> None:
    """Loads what was written as ``robustbench.load_model`` does, and compares with the network that was evaluated."""
    robustbench = import_robustbench()
    _, entry = runpy.run_path(str(zoo_entry))["ENTRY"]
    network = entry["model"]().eval()
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    for prefix in ("module.", "model."):
        state = robustbench.utils.rm_substr_from_state_dict(state, prefix)
    if dataset == "imagenet":
        state = robustbench.utils.add_substr_to_state_dict(state, "model.")
        state = {**network.get_submodule("normalize").state_dict(prefix="normalize."), **state}  # they stay the entry's
    network.load_state_dict(state, strict=True)
    if weights_sha256(network) != weights_sha256(model):
        raise ValueError(f"{CALLER}: {checkpoint.name} must read back as written, but does not. Use another disk.")
    if not same_logits(network, model):
        raise ValueError(f"{CALLER}: {zoo_entry.name} must give the logits of `model`, but does not. Report this.")


def _sums(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return "".join(f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")

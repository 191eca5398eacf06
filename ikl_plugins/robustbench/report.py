"""What an evaluation found, as a page of Markdown with pictures."""

from __future__ import annotations

import math
import textwrap
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._files import written_aside
from .data import Images
from .evaluation.log import Evaluation, versions_text
from .evaluation.verdict import attacks_in_words, not_standard_in_words, warnings_of
from .figures import drawn, new_figure, require_matplotlib, save_figure
from .tables import markdown_text

__all__ = ["binomial_interval", "write_report"]

_Z = 1.959964  # 95 % of a normal distribution lie within as many standard deviations
_CLASSES = 20  # rows of the table of classes; of more, the lowest
_SHOWN = 8  # images that fell
_OTHER_FILES = (".htm", ".html", ".json", ".pdf", ".png", ".rst", ".txt")
_UPPER_BOUND = (
    "An attack finds adversarial images, and does not prove that there are no others: robust accuracy under attacks is "
    "an upper bound of robust accuracy."
)


def binomial_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share, after Wilson (Journal of the American Statistical Association, 1927).

    Args:
        successes: from 0 to ``trials``.
        trials: at least 1.

    Returns:
        Lower and upper end in percent.

    Raises:
        ValueError: numbers out of range.

    Example:
        >>> [round(end, 2) for end in binomial_interval(9, 10)]
        [59.58, 98.21]
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(
            f"binomial_interval: `successes` must lie in [0, `trials`], `trials` above 0, got {successes} of {trials}."
        )
    share = successes / trials
    shrink = 1 + _Z**2 / trials
    middle = (share + _Z**2 / (2 * trials)) / shrink
    half = _Z * math.sqrt(share * (1 - share) / trials + (_Z / (2 * trials)) ** 2) / shrink
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def write_report(evaluation: Evaluation, path: str | Path, *, images: Images | Tensor | None = None) -> Path:
    """Writes a page of Markdown and its pictures.

    Args:
        evaluation: of :func:`~ikl_plugins.robustbench.evaluation.evaluate` or
            :func:`~ikl_plugins.robustbench.evaluation.evaluate_corruptions`, finished or not.
        path: a folder, which gets report.md; or a file that ends with .md, whose name begins those of the pictures
            beside it. Files of the same names are replaced.
        images: those that were evaluated, so that images that fell can be shown.

    Returns:
        The path of the page.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: ``images`` are not as many as were evaluated; ``path`` ends as another kind of file.
    """
    require_matplotlib("write_report")
    page, log = _page(Path(path)), evaluation.log
    pictures = _Pictures(page)
    pixels = images.images if isinstance(images, Images) else images
    if pixels is not None and log["labels"] is not None and len(pixels) != len(log["labels"]):
        raise ValueError(
            f"write_report: `images` must be the {len(log['labels'])} that were evaluated, got {len(pixels)}. "
            "Load the same."
        )
    parts = [f"# Robustness of {markdown_text(log['model'])}", _summary(log), _setting(log)]
    if log["fell_to"] is None:
        parts.append(_corruption_part(log, pictures))
    else:
        parts.append(_attack_part(log))
        if log.get("curve"):
            parts.append(_curve_part(log, pictures))
    if log["labels"] is not None:
        parts.append(_class_part(log, pictures))
    if log["fell_to"] is not None:
        parts.append(_fallen_part(evaluation, pixels, pictures))
    with written_aside(page) as aside:
        aside.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


class _Pictures(NamedTuple):
    """Where the pictures of a page lie: beside it, behind its name unless that is report.md."""

    page: Path

    def path(self, name: str) -> Path:
        before = "" if self.page.name == "report.md" else f"{self.page.stem}_"
        return self.page.with_name(before + name)

    def link(self, words: str, name: str) -> str:
        return f"![{words}]({urllib.parse.quote(self.path(name).name)})"


def _page(path: Path) -> Path:
    """The page at a path that names it, or its folder."""
    if path.suffix.lower() == ".md" and not path.is_dir():
        return path
    if path.suffix.lower() in _OTHER_FILES or path.is_file():
        raise ValueError(f"write_report: `path` must be a folder or end with .md, got {path}. Write report.md.")
    return path / "report.md"


# --- the parts of the page -------------------------------------------------------------------------------------------


def _summary(log: dict[str, Any]) -> str:
    lines = []
    if not log["finished"]:
        lines += ["**This evaluation is not finished: the robust accuracy will fall further.**", ""]
    rows = []
    if log["natural_correct"] is not None:
        rows.append(["natural accuracy", *_share(log["natural_correct"])])
    if log["fell_to"] is None:
        robust = log["robust_accuracy"]
        rows.append(["mean accuracy under corruptions", "-" if robust is None else f"{robust:.2f}", ""])
        mce = log["corruptions_mce"]
        rows.append(["mean corruption error", "-" if mce is None else f"{mce:.2f}", ""])
    else:
        rows.append([f"robust accuracy ({log['threat_model']}, eps {log['eps']})", *_share(log["robust"])])
    lines.append(_table(["", "percent", "95 % interval"], rows))
    if log["fell_to"] is None:
        if log["corruptions_mce_note"]:
            lines += ["", f"The mean corruption error was {log['corruptions_mce_note']}."]
        return "\n".join(lines)
    lines += ["", _UPPER_BOUND]
    lines += ["", f"The intervals are binomial, for the choice of the {log['n_examples']:,} images alone."]
    if not log["standard"]:
        ran = markdown_text(not_standard_in_words(log))
        lines += ["", f"This is not standard AutoAttack ({ran}), and not comparable with it."]
    lines += [markdown_text(f"Left out: {dropped['attack']}, since {dropped['reason']}.") for dropped in log["dropped"]]
    if log["unreliable"]:
        lines += ["", "AutoAttack's own checks say that **this evaluation may be unreliable**."]
    lines += [""] if log["warnings"] else []
    lines += [f"- AutoAttack warns: {markdown_text(warning)}" for warning in warnings_of(log)]
    return "\n".join(lines)


def _setting(log: dict[str, Any]) -> str:
    data, checkpoint = log["data"] or {}, log["checkpoint"] or {}
    facts = {
        "data": data.get("name") or log["dataset"] or "not named",
        "images": f"{log['n_examples']:,}",
        "preprocessing": data.get("preprocessing") or "none",
        "checkpoint": checkpoint.get("name", "not named"),
        "sha256 of the checkpoint": checkpoint.get("sha256", "-"),
        "sha256 of the weights": log["weights_sha256"],
        "sha256 of the data": data.get("sha256", "-"),
        "attacks": "-" if log["version"] is None else attacks_in_words(log),
        "surrogate": _surrogate(log.get("surrogate")),
        "target classes": "-" if log["n_target_classes"] is None else str(log["n_target_classes"]),
        "dtype of the weights": log.get("dtype", "-"),
        "precision": log["precision"],
        "batch size": str(log["batch_size"]),
        "seed": str(log["seed"]),
        "device": log["device"],
        "started": log["date"],
        "versions": versions_text(log),
    }
    return "## Setting\n\n" + _table(["", ""], [[name, value] for name, value in facts.items()])


def _surrogate(facts: dict[str, Any] | None) -> str:
    return "-" if facts is None else f"{facts['model']}, sha256 of its weights {facts['weights_sha256']}"


def _attack_part(log: dict[str, Any]) -> str:
    before = sum(log["natural_correct"])
    rows = [["none (natural images)", str(len(log["natural_correct"]) - before), str(before), "-"]]
    for entry in log["progress"]:
        rows.append(
            [entry["attack"], str(before - entry["standing"]), str(entry["standing"]), f"{entry['seconds']:.1f}"]
        )
        before = entry["standing"]
    return "## Attacks\n\nEach on the images that the earlier ones left standing.\n\n" + _table(
        ["attack", "images that fell", "left standing", "seconds"], rows
    )


def _curve_part(log: dict[str, Any], pictures: _Pictures) -> str:
    points = log["curve"]
    rows = [[point["eps"], *_share(point["robust"]), ", ".join(point["attacks"]) or "none stood"] for point in points]
    figure, axes = new_figure(6, 4)
    radii = [0.0, *(point["eps_value"] for point in points)]
    values = [log["natural_accuracy"], *(point["robust_accuracy"] for point in points)]
    ends = [
        binomial_interval(sum(flags), len(flags)) for flags in (log["natural_correct"], *(p["robust"] for p in points))
    ]
    scale, unit = {"Linf": (255, "grey levels of 255"), "L1": (1, "sum over pixels in [0, 1]")}.get(
        log["threat_model"], (1, "pixels in [0, 1]")
    )
    places = [scale * radius for radius in radii]
    axes.fill_between(places, [low for low, _ in ends], [high for _, high in ends], alpha=0.2, label="95 % interval")
    axes.plot(places, values, marker="o", label="radius after radius")
    axes.plot(
        [scale * log["eps_value"]], [log["robust_accuracy"]], "k*", markersize=10, label=f"eps {log['eps']}, the result"
    )
    axes.set(
        title=f"Robust accuracy of {drawn(log['model'])}",
        xlabel=f"{log['threat_model']} radius eps ({unit})",
        ylabel="robust accuracy (%)",
        ylim=(0, 100),
    )
    axes.legend(loc="lower left")
    save_figure(figure, pictures.path("robust_accuracy.png"))
    return (
        "## Robust accuracy against eps\n\nEach radius is attacked on the images that stand at the smaller ones. The "
        "curve may therefore lie below the result above at its radius.\n\n"
        f"{pictures.link('robust accuracy', 'robust_accuracy.png')}\n\n"
        + _table(["eps", "robust accuracy (%)", "95 % interval", "attacks"], rows)
    )


def _class_part(log: dict[str, Any], pictures: _Pictures) -> str:
    kinds = [("natural", log["natural_correct"])]
    if log["robust"] is not None:
        kinds.append(("robust", log["robust"]))
    labels = sorted(set(log["labels"]))
    flags = {
        label: [[flag for flag, own in zip(values, log["labels"], strict=True) if own == label] for _, values in kinds]
        for label in labels
    }
    shares = {label: [100 * sum(own) / len(own) for own in of] for label, of in flags.items()}
    shown, note = labels, ""
    if len(labels) > _CLASSES:
        shown = sorted(sorted(labels, key=lambda label: shares[label][-1])[:_CLASSES])
        note = f"The {_CLASSES} of {len(labels)} classes with the lowest {kinds[-1][0]} accuracy.\n\n"
    header = ["class", "images", *(f"{name} accuracy (%)" for name, _ in kinds)]
    rows = [
        [_class(log, label), str(len(flags[label][0])), *(f"{share:.2f}" for share in shares[label])] for label in shown
    ]

    series = {name: [shares[label][number] for label in shown] for number, (name, _) in enumerate(kinds)}
    names = [_class(log, label) for label in shown]
    _bars(pictures.path("classes.png"), f"Accuracy per class of {log['model']}", "class", names, series)
    return "## Classes\n\n" + note + pictures.link("accuracy per class", "classes.png") + "\n\n" + _table(header, rows)


def _fallen_part(evaluation: Evaluation, pixels: Tensor | None, pictures: _Pictures) -> str:
    log = evaluation.log
    fell = [index for index, attack in enumerate(log["fell_to"]) if attack is not None]
    text = f"## Images that fell\n\n{len(fell)} of {sum(log['natural_correct'])} that were classified right."
    if not fell:
        return text
    if pixels is None or evaluation.adversarial is None:
        what = "natural images were not given" if pixels is None else "adversarial images were not kept"
        return f"{text} They are not shown, since the {what}."
    # Spread over all that fell, rather than those of the first class.
    shown = [fell[(number * len(fell)) // min(_SHOWN, len(fell))] for number in range(min(_SHOWN, len(fell)))]
    figure, grid = new_figure(2.2 * len(shown), 7, rows=3, columns=len(shown))
    for column, index in enumerate(shown):
        natural, adversarial = pixels[index].float().cpu(), evaluation.adversarial[index].float().cpu()
        difference = adversarial - natural
        largest = difference.abs().max().item()
        # Grey where nothing changed, black and white at the largest change.
        views = (
            natural,
            adversarial,
            0.5 + difference / (2 * largest) if largest else torch.full_like(natural, 0.5),
        )
        titles = (
            f"#{index}\n{drawn(_class(log, log['labels'][index]))}",
            f"{log['fell_to'][index]}\ntaken for {drawn(_class(log, log['predictions'][index]))}",
            f"difference\nat most {255 * largest:.1f}/255",
        )
        for row, (picture, title) in enumerate(zip(views, titles, strict=True)):
            axes = grid[row][column]
            axes.imshow(_picture(picture), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(title, fontsize=8)
            axes.set_axis_off()
    title = f"Natural, adversarial, and their difference, scaled ({log['threat_model']}, eps {log['eps']})"
    figure.suptitle(textwrap.fill(title, 26 * len(shown)), fontsize=10)
    save_figure(figure, pictures.path("fallen.png"))
    rows = [
        [str(index), _class(log, log["labels"][index]), _class(log, log["predictions"][index]), log["fell_to"][index]]
        for index in shown
    ]
    channels = pixels.shape[1]
    note = "" if channels in (1, 3) else f", the first of {channels} channels"
    link = pictures.link("images that fell", "fallen.png")
    return f"{text} {len(shown)} of them{note}:\n\n{link}\n\n" + _table(["image", "class", "taken for", "attack"], rows)


def _corruption_part(log: dict[str, Any], pictures: _Pictures) -> str:
    by_name: dict[str, dict[int, float]] = {}
    for entry in log["corruptions"]:
        by_name.setdefault(entry["corruption"], {})[entry["severity"]] = entry["accuracy"]
    if not by_name:
        return "## Corruptions\n\nNone was evaluated yet."
    severities = sorted({severity for values in by_name.values() for severity in values})
    rows = []
    for name, values in by_name.items():
        mean = sum(values.values()) / len(values)
        cells = [f"{values[severity]:.2f}" if severity in values else "-" for severity in severities]
        rows.append([name, *cells, f"{mean:.2f}"])
    series = {
        f"severity {severity}": [values.get(severity, math.nan) for values in by_name.values()]
        for severity in severities
    }
    title = f"Accuracy under corruptions of {log['model']}"
    _bars(pictures.path("corruptions.png"), title, "corruption", list(by_name), series)
    header = ["corruption (accuracy in %)", *(f"severity {severity}" for severity in severities), "mean"]
    link = pictures.link("accuracy under corruptions", "corruptions.png")
    return f"## Corruptions\n\n{link}\n\n" + _table(header, rows)


# --- tables and pictures ---------------------------------------------------------------------------------------------


def _share(flags: Sequence[int]) -> list[str]:
    low, high = binomial_interval(sum(flags), len(flags))
    return [f"{100 * sum(flags) / len(flags):.2f}", f"{low:.2f} to {high:.2f}"]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rows = [[markdown_text(cell) for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _class(log: dict[str, Any], label: int) -> str:
    return str(log["classes"][label]) if log["classes"] else str(label)


def _bars(path: Path, title: str, what: str, names: Sequence[str], series: dict[str, list[float]]) -> None:
    """Draws accuracies in percent, a group of bars a name and a colour a series."""
    figure, axes = new_figure(max(6.0, 0.55 * len(names)), 4)
    width = 0.8 / len(series)
    for number, (name, heights) in enumerate(series.items()):
        places = [place + (number - (len(series) - 1) / 2) * width for place in range(len(names))]
        axes.bar(places, heights, width, label=name)
    axes.set_xticks(range(len(names)), [drawn(name) for name in names], rotation=45, ha="right")
    axes.set(title=drawn(title), xlabel=what, ylabel="accuracy (%)", ylim=(0, 100))
    axes.legend(loc="lower left", fontsize=7)
    save_figure(figure, path)


def _picture(image: Tensor) -> Any:
    """A colour image, or the first of other channels, as Matplotlib takes it."""
    image = image.clamp(0, 1)
    return image.permute(1, 2, 0).numpy() if len(image) == 3 else image[0].numpy()

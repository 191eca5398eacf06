"""What the adversarial runs of tools/reproduce.py say: tables and plots from the JSON alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evidence import reproduce_adversarial_plan as plan
from evidence import reproduce_adversarial_results as recorded
from evidence.cache import all_versions
from evidence.report import binomial_margin, draw_with_margin, drawn, listed, spread, text_table, with_margin
from evidence.reproduce_adversarial_jobs import STEPS
from evidence.reproduce_adversarial_plan import CENTRE, DKL, IKL, METHODS, SEVERAL, TRADES, Cell

FIGURES = ("adversarial_test.png", "adversarial_radii.png", "adversarial_epochs.png")
COLOURS = {TRADES: "#1f77b4", IKL: "#d62728"}
MARKERS = {TRADES: "^", IKL: "o"}
NO_PRIOR, GKL = "adversarial_ikl_no_prior", "adversarial_gkl"
# Cui et al., NeurIPS 2024: natural accuracy and AutoAttack on CIFAR-100, all with AWP. Ablations by the code's names.
PUBLISHED = {TRADES: (62.87, 30.29), DKL: (62.54, 30.20), NO_PRIOR: (62.69, 30.42), IKL: (65.76, 31.91)}  # table 1
PUBLISHED_ABLATIONS = {
    "weight_temperature": {1: (59.99, 31.35), 2: (63.77, 31.88), 3: (65.28, 31.69), 4: (65.76, 31.91)},
    "beta": {12: (67.52, 31.29), 16: (66.26, 31.33), 20: (65.76, 31.91), 24: (65.14, 31.64)},
    "alpha": {2: (66.13, 30.95), 3: (66.31, 31.33), 4: (66.00, 31.57), 5: (65.76, 31.91)},
}
PUBLISHED_RADII = {
    "2/255": (53.88, 55.31),
    "4/255": (45.31, 46.76),
    "6/255": (37.28, 38.98),
    "8/255": (30.29, 31.91),
    "10/255": (24.28, 25.33),
    "12/255": (19.17, 19.98),
}  # TRADES and IKL
PUBLISHED_CIFAR10 = (84.80, 57.09)  # IKL, table 3
KNOBS = {"weight_temperature": "tau", "beta": "beta (paper: 4 x alpha/4)", "alpha": "alpha (paper: beta)"}
MEASURES = {"natural": "natural", "pgd": f"PGD-{STEPS}", "autoattack": "AutoAttack"}
# Which loss is held against which: the steps of the paper's order, and what else is of interest.
COMPARED = ((DKL, TRADES), (NO_PRIOR, TRADES), (IKL, NO_PRIOR), (IKL, TRADES), (GKL, IKL))
ORDER = ((NO_PRIOR, TRADES), (IKL, NO_PRIOR), (IKL, TRADES))


def render(content: dict[str, Any]) -> str:
    """The tables as Markdown, from what adversarial.json holds."""
    budget = recorded.budget(content)
    radii_images = recorded.images(content, "radii")
    lines = [
        "# Adversarial training: measured",
        "",
        f"`python tools/reproduce.py adversarial{' --quick' if content['quick'] else ''}`, {content['threads']} "
        f"thread(s) a run. {listed(all_versions(content['jobs'].values()))}.",
        "",
        *_differences_to_the_paper(content),
        "",
        "## Accuracy",
        "",
        _accuracy_table(content),
        "",
        f"In percent; mean and standard deviation over the seeds where there are several. Natural accuracy and "
        f"PGD-{STEPS} on {recorded.images(content, 'pgd')} test images, {_attacks(content)} on "
        f"{recorded.images(content, 'autoattack')} of them: the choice of the images alone leaves 95 % intervals of "
        f"±{recorded.margin(content, 'natural'):.1f}, ±{recorded.margin(content, 'pgd'):.1f} and "
        f"±{recorded.margin(content, 'autoattack'):.1f} points to one number. The last column is the paper's table 1: "
        f"CIFAR-100, natural accuracy / AutoAttack, with 9 KL and with alpha 5, beta 20. On CIFAR-10 its table 3 has "
        f"{PUBLISHED_CIFAR10[0]:.2f} / {PUBLISHED_CIFAR10[1]:.2f} for IKL. No number here is to be compared with one "
        f"of the paper's, only the order and the signs.",
        "",
        f"![accuracy]({FIGURES[0]})",
        "",
        "## One loss against another",
        "",
        _comparison_table(content),
        "",
        "Points, with the 95 % interval that the test images leave, image by image, as all networks saw the same ones. "
        "An interval that holds 0 orders nothing. What another seed would change is not in it; the intervals of "
        "DKL - TRADES, whose gradients are equal, show what rounding alone can do.",
        "",
        *_by_seed(content),
        "",
        "Of the paper's order (natural accuracy and AutoAttack, with AWP):",
        "",
        *_order_lines(content),
        "",
        "## What was chosen, and from what",
        "",
        f"The weight of the robust loss: {len(budget.scales)} trial(s) for each loss, multiples of the weights "
        f"published for CIFAR-10 (6 KL, of TRADES' authors; alpha 4, beta 20, for GKL gamma 0.2, of IKL's), "
        f"{budget.short_epochs} epochs without AWP, seed 0. The best accuracy under PGD-{STEPS} on the validation "
        f"images decides, {_validated(content)}. DKL takes what was chosen for TRADES. Nothing else was "
        f"chosen.{_at_the_edge(content)}",
        "",
        _search_table(content),
        "",
        "## The published weights",
        "",
        f"One trial for each weight decides little, and unequal weights trade natural accuracy for robust accuracy. So "
        f"the same with the published weights, with AWP, seed {budget.seeds[0]}, the same test images once more, no "
        f"AutoAttack. What another processor rounds otherwise moves a number about as another seed does.",
        "",
        _published_table(content),
        "",
        "## More training",
        "",
        f"Whether the budget decides: TRADES and IKL with the published weights, AWP, seed {budget.seeds[0]}, the same "
        f"test images once more.",
        "",
        _longer_table(content),
        "",
        _prior_line(content),
        "",
        "## Ablations of IKL",
        "",
        f"Around alpha {CENTRE['alpha']:g}, beta {CENTRE['beta']:g}, tau {CENTRE['weight_temperature']:g}, the paper's "
        f"setting for its ablations, with AWP, {budget.short_epochs} epochs, seed 0, on the validation images "
        f"(natural / PGD-{STEPS}), {_validated(content)}; beside them the paper's (CIFAR-100, natural / AutoAttack). "
        f"The paper calls the code's alpha beta, and a quarter of the code's beta alpha/4.",
        "",
        *_ablation_tables(content),
        "## Other radii",
        "",
        _radii_table(content),
        "",
        f"Accuracy under PGD-{STEPS} (steps of a quarter of the radius) on {radii_images} of the test images, "
        f"±{binomial_margin([30.0], radii_images):.1f} points for one number of about 30, with AWP, "
        f"seed {budget.seeds[0]}; in brackets the paper's, AutoAttack on CIFAR-100.",
        "",
        f"![radii]({FIGURES[1]})",
        "",
        "## Over the epochs",
        "",
        *_epochs_lines(content),
        "",
        f"![epochs]({FIGURES[2]})",
        "",
        "## DKL is KL",
        "",
        *_equality_lines(content),
    ]
    return "\n".join(lines) + "\n"


# --- tables ----------------------------------------------------------------------------------------------------------


def _validated(content: dict[str, Any]) -> str:
    """How many images the choices and the ablations are judged on, and what that leaves open."""
    training = content["jobs"][plan.search_name(TRADES, recorded.budget(content).scales[0])]
    images = len(_option(training, "val_dataloader.dataset.indices", range(0, 5_000, 10)))
    return f"{images} of them (±{binomial_margin([20.0], images):.1f} points for one number of about 20)"


def _differences_to_the_paper(content: dict[str, Any]) -> list[str]:
    budget = recorded.budget(content)
    train = content["jobs"][f"train-{Cell(TRADES, True, budget.seeds[0]).label}"]
    last = train["result"]["log"][-1]
    return [
        "| | here | the paper |",
        "| --- | --- | --- |",
        "| network | WideResNet-10-1, 78 thousand parameters | WideResNet-34-10, 46 million |",
        f"| training | {_train_images(train)} images of CIFAR-10, {budget.epochs} epochs of batches of "
        f"{_option(train, 'train_dataloader.batch_size', 64)} | 50,000, 200 epochs, batches of 128 |",
        "| learning rate | 0.1 after an epoch of warm-up, cosine over steps | 0.2, no warm-up, cosine over epochs |",
        "| images | CIFAR-10 as JPEG, flipped and cropped | CIFAR-10 and CIFAR-100, flipped and cropped |",
        "| attack in training | 2 steps of eps | 5 steps of eps / 2 |",
        "| precision of training | bfloat16 (autocast), measured in float32 | float32 |",
        "| AWP | gamma 0.005 from epoch 2 | gamma 0.005 from epoch 10 |",
        "| averaged weights | EMA in each step, momentum 0.01 | over the checkpoints of the epochs |",
        f"| seeds | {', '.join(map(str, budget.seeds))} for {' and '.join(METHODS[method] for method in SEVERAL)} with "
        f"AWP, {budget.seeds[0]} for the others | mean of 3 |",
        f"| the same | L-inf 8/255, eps growing over all epochs (the last has {255 * last['eps']:.2g}/255), SGD with "
        f"momentum 0.9, weight decay 5e-4 | |",
    ]


def _train_images(training: dict[str, Any]) -> str:
    """How many there were; the configs' own number where no option says otherwise."""
    options = training["settings"]["options"]
    shipped: Any = range(0, 45_000, 50 if "few_images" in training["settings"]["config"] else 5)
    indices = options.get("train_dataloader.dataset.indices", shipped)
    return f"{45_000 if indices is None else len(indices):,}"


def _option(training: dict[str, Any], key: str, default: Any) -> Any:
    return training["settings"]["options"].get(key, default)


def _attacks(content: dict[str, Any]) -> str:
    attacks = recorded.budget(content).attacks
    return "standard AutoAttack" if attacks is None else f"{', '.join(attacks)} (in place of AutoAttack)"


def _accuracy_table(content: dict[str, Any]) -> str:
    header = ["loss", "x weight", "AWP", "seeds", *MEASURES.values(), "paper"]
    rows = []
    for awp in (True, False):
        for method in recorded.budget(content).methods:
            published = PUBLISHED.get(method) if awp else None
            rows.append(
                [
                    METHODS[method],
                    f"{content['scales'][method]:g}",
                    "yes" if awp else "no",
                    str(len(recorded.seeds(content, method, awp))),
                    *(spread(recorded.accuracies(content, measure, method, awp)) for measure in MEASURES),
                    "-" if published is None else f"{published[0]:.2f} / {published[1]:.2f}",
                ]
            )
    return text_table(header, rows)


def _comparison_table(content: dict[str, Any]) -> str:
    rows = []

    def compare(name: str, awp: str, ours: tuple[str, bool], theirs: tuple[str, bool]) -> None:
        pair = recorded.pair(content, ours, theirs)
        found = [recorded.difference(content, measure, *pair) for measure in MEASURES]
        rows.append([name, awp, str(len(pair[0])), *(with_margin(*one) for one in found)])

    for awp in (True, False):
        for ours, theirs in _compared(content, COMPARED):
            names = f"{METHODS[ours]} - {METHODS[theirs]}"
            compare(names, "yes" if awp else "no", (ours, awp), (theirs, awp))
    for method in SEVERAL:
        compare(METHODS[method], "yes - no", (method, True), (method, False))
    return text_table(["difference", "AWP", "seeds", *MEASURES.values()], rows)


def _compared(content: dict[str, Any], pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    methods = recorded.budget(content).methods
    return [pair for pair in pairs if all(method in methods for method in pair)]


def _by_seed(content: dict[str, Any]) -> list[str]:
    ours, theirs = IKL, TRADES
    texts = []
    for measure, name in MEASURES.items():
        sides = (recorded.accuracies(content, measure, method, True) for method in (ours, theirs))
        texts.append(f"{name} {', '.join(f'{one - other:+.2f}' for one, other in zip(*sides, strict=True))}")
    seeds = ", ".join(map(str, recorded.seeds(content, ours, True)))
    return [f"{METHODS[ours]} - {METHODS[theirs]} with AWP, seeds {seeds}: {'; '.join(texts)}."]


def _order_lines(content: dict[str, Any]) -> list[str]:
    """Whether each step of the order shows here: the interval of the difference lies on one side of 0, or around it."""
    lines = []
    for ours, theirs in _compared(content, ORDER):
        texts = []
        for measure, place in (("natural", 0), ("autoattack", 1)):
            mean, half = recorded.difference(content, measure, *recorded.pair(content, (ours, True), (theirs, True)))
            published = PUBLISHED[ours][place] - PUBLISHED[theirs][place]
            sign = "the paper's sign" if mean * published > 0 else "not the paper's sign"
            found = "not decided" if abs(mean) <= half else sign
            texts.append(f"{MEASURES[measure]} {found} ({mean:+.2f} ± {half:.2f}; paper {published:+.2f})")
        lines.append(f"- {METHODS[ours]} against {METHODS[theirs]}: {'; '.join(texts)}.")
    return lines


def _published_table(content: dict[str, Any]) -> str:
    """The main table with AWP, as it is with the published weights."""
    labels = {
        method: plan.published_label(recorded.budget(content), content["scales"], method)
        for method in plan.searched(recorded.budget(content))
    }
    rows = []
    for method, label in labels.items():
        accuracies = [f"{recorded.accuracy(content, measure, label):.2f}" for measure in ("natural", "pgd")]
        ahead = (recorded.difference(content, measure, [label], [labels[TRADES]]) for measure in ("natural", "pgd"))
        differences = ["-", "-"] if method == TRADES else [with_margin(*one) for one in ahead]
        processor = content["jobs"][f"train-{label}"]["versions"]["processor"]
        rows.append([METHODS[method], *accuracies, *differences, processor])
    names = [MEASURES["natural"], MEASURES["pgd"]]
    return text_table(["loss", *names, *(f"{name} - TRADES'" for name in names), "trained on"], rows)


def _longer_table(content: dict[str, Any]) -> str:
    """TRADES and IKL with the published weights and AWP, as much trained as the main table and longer."""
    budget = recorded.budget(content)
    rows = []
    shown = {
        "main table": [plan.published_label(budget, content["scales"], method) for method in (IKL, TRADES)],
        "longer": [f"{method}-longer-{budget.seeds[0]}" for method in (IKL, TRADES)],
    }
    for name, labels in shown.items():
        training = content["jobs"][f"train-{labels[0]}"]
        amount = f"{name}: {_train_images(training)} images, {training['settings']['epochs']} epochs"
        cells = []
        for measure in ("natural", "pgd"):
            ours, theirs = (recorded.accuracy(content, measure, label) for label in labels)
            mean, half = recorded.difference(content, measure, labels[:1], labels[1:])
            cells += [f"{theirs:.2f}", f"{ours:.2f}", with_margin(mean, half)]
        rows.append([amount, *cells])
    names = [
        f"{MEASURES[measure]}: {what}" for measure in ("natural", "pgd") for what in ("TRADES", "IKL", "difference")
    ]
    return text_table(["training", *names], rows)


def _prior_line(content: dict[str, Any]) -> str:
    matrix = recorded.result(content, "prior")["matrix"]
    entries = [entry for row in matrix for entry in row]
    own = [row[label] for label, row in enumerate(matrix)]
    return (
        f"The class prior of IKL after the longer training, class-wise means of the predictions at the config's "
        f"temperature: all entries lie between {min(entries):.3f} and {max(entries):.3f}, the mean of those of the own "
        f"class is {statistics.fmean(own):.3f}; {1 / len(matrix):.3f} says nothing."
    )


def _search_table(content: dict[str, Any]) -> str:
    budget = recorded.budget(content)
    rows = []
    for method in plan.searched(budget):
        for scale in budget.scales:
            scores = recorded.result(content, plan.search_name(method, scale))["validation"][-1]
            chosen = "chosen" if content["scales"][method] == scale else ""
            accuracies = [f"{scores[score]:.2f}" for score in ("accuracy/top1", "robust/top1")]
            rows.append([METHODS[method], f"{scale:g}", *accuracies, chosen])
    return text_table(["loss", "x weight", "natural", f"PGD-{STEPS}", ""], rows)


def _at_the_edge(content: dict[str, Any]) -> str:
    """Which choices might have gone on in the same direction."""
    scales = recorded.budget(content).scales
    found = [METHODS[m] for m, scale in content["scales"].items() if m != DKL and scale in (min(scales), max(scales))]
    if len(scales) < 2 or not found:
        return ""
    return f" At the edge of what was tried: {', '.join(found)}."


def _ablation_tables(content: dict[str, Any]) -> list[str]:
    lines = []
    for knob, values in recorded.budget(content).ablations.items():
        rows = []
        for value in values:
            result = recorded.result(content, plan.ablation_name({**CENTRE, knob: value}))
            scores = result["validation"][-1]
            published = PUBLISHED_ABLATIONS[knob][int(value)]
            rows.append(
                [
                    f"{value:g}",
                    f"{scores['accuracy/top1']:.2f} / {scores['robust/top1']:.2f}",
                    f"{published[0]:.2f} / {published[1]:.2f}",
                ]
            )
        lines += [text_table([KNOBS[knob], "here", "paper"], rows), ""]
    return lines


def _radii(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    seed = recorded.budget(content).seeds[0]
    return {method: recorded.result(content, f"radii-{Cell(method, True, seed).label}") for method in SEVERAL}


def _radii_table(content: dict[str, Any]) -> str:
    found = _radii(content)
    rows = [["0", *(f"{found[method]['natural_accuracy']:.2f}" for method in SEVERAL)]]
    for radius in recorded.budget(content).radii:
        published = PUBLISHED_RADII[radius]
        accuracies = [found[method]["robust_accuracy"][radius] for method in SEVERAL]
        rows.append(
            [radius, *(f"{ours:.2f} ({theirs:.2f})" for ours, theirs in zip(accuracies, published, strict=True))]
        )
    return text_table(["eps", *(METHODS[method] for method in SEVERAL)], rows)


def _epochs_lines(content: dict[str, Any]) -> list[str]:
    rows, texts = [], []
    for method in SEVERAL:
        result = recorded.result(content, f"followed-{method}")
        best = max(result["rows"], key=lambda row: row["val"][1])
        last = result["rows"][-1]
        for name, row in (("best", best), ("last", last)):
            cells = [f"{row[part][0]:.2f} / {row[part][1]:.2f}" for part in ("train", "val")]
            rows.append([METHODS[method], f"{name}, {row['epoch']}", *cells])
        at_end = (last["train"][1], last["val"][1])
        since = (best["val"][1], last["val"][1])
        gap = _apart(at_end, (result["images"]["train"], result["images"]["val"]))
        fall = _apart(since, (result["images"]["val"], result["images"]["val"]))
        texts.append(
            f"{METHODS[method]}: at the end {gap} points between training and validation images under attack, and "
            f"{fall} points below the best of its {len(result['rows'])} measured epochs on the latter."
        )
    training = content["jobs"][f"few-{TRADES}"]
    images = _train_images(training)
    counts = result["images"]
    margin = binomial_margin([30.0], counts["val"])
    return [
        f"The losses with their published weights on {images} training images, {training['settings']['epochs']} "
        f"epochs, full eps from the first one, no AWP, seed 0. Natural accuracy / PGD-{STEPS} of the averaged weights "
        f"on {counts['train']} of the training and {counts['val']} validation images (±{margin:.1f} points for one "
        f"number of about 30):",
        "",
        text_table(["loss", "epoch", "training images", "validation images"], rows),
        "",
        *texts,
    ]


def _apart(accuracies: tuple[float, float], images: tuple[int, int]) -> str:
    """The difference of two accuracies, with half its 95 % interval where the images are independent."""
    halves = [binomial_margin([accuracy], count) for accuracy, count in zip(accuracies, images, strict=True)]
    return f"{accuracies[0] - accuracies[1]:.1f} ± {math.hypot(*halves):.1f}"


def _equality_lines(content: dict[str, Any]) -> list[str]:
    found = recorded.result(content, "checks")
    gradients = ", ".join(f"{value:.0e} in {precision}" for precision, value in found["gradients"].items())
    rows = [[str(row["epoch"]), f"{row['dkl']:.1e}", f"{row['other_seed']:.1e}"] for row in found["apart"]]
    attacked = found["attacked"]
    return [
        f"At the weights that TRADES ends with the gradients of both losses differ, relative to their norm, by "
        f"{gradients}. The trainings in bfloat16 start equal and grow apart as rounding is amplified from step to "
        f"step; norm of the difference of the averaged weights, divided by the norm of the weights, beside that of two "
        f"seeds of TRADES:",
        "",
        text_table(["epoch", "DKL - TRADES", "seed - seed"], rows),
        "",
        f"The training's attack against the last weights of IKL, computed in float32 and in bfloat16: "
        f"{attacked['float32']:.2f} % and {attacked['bfloat16']:.2f} % of {found['images']} validation images stand, "
        f"both judged in float32.",
    ]


# --- plots -----------------------------------------------------------------------------------------------------------


def draw(content: dict[str, Any], folder: Path) -> None:
    """Writes the plots: natural against robust accuracy, accuracy over the radii and over the epochs."""
    _draw_test(content, folder / FIGURES[0])
    _draw_radii(content, folder / FIGURES[1])
    _draw_epochs(content, folder / FIGURES[2])


def _draw_test(content: dict[str, Any], path: Path) -> None:
    with drawn(path, 1, 2, figsize=(9.6, 4.2), sharex=True, layout="constrained") as (_, panels):
        for axes, measure in zip(panels, ("pgd", "autoattack"), strict=True):
            for place, method in enumerate(recorded.budget(content).methods):
                for awp in (True, False):
                    natural, robust = (recorded.accuracies(content, one, method, awp) for one in ("natural", measure))
                    name = METHODS[method] if awp else f"{METHODS[method]}, no AWP"
                    face = f"C{place}" if awp else "none"
                    axes.plot(natural, robust, "o", color=f"C{place}", markerfacecolor=face, label=name)
            axes.set(xlabel="natural accuracy (%)", ylabel=f"{MEASURES[measure]} (%)")
            axes.set_title(
                f"one point a seed; ±{recorded.margin(content, measure):.1f} points each", loc="left", fontsize=9
            )
            axes.grid(alpha=0.25)
        panels[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_radii(content: dict[str, Any], path: Path) -> None:
    with drawn(path, figsize=(6.4, 4.0), layout="constrained") as (_, axes):
        for method, result in _radii(content).items():
            eps = [0.0, *(float(radius.partition("/")[0]) for radius in result["robust_accuracy"])]
            values = [result["natural_accuracy"], *result["robust_accuracy"].values()]
            style = {"color": COLOURS[method], "marker": MARKERS[method], "label": METHODS[method]}
            draw_with_margin(axes, eps, values, result["images"], **style)
        axes.axvline(8, color="black", lw=1, ls=":", label="eps of the training")
        axes.set(xlabel="eps of the attack, L-infinity (1/255)", ylabel=f"accuracy under PGD-{STEPS} (%)")
        axes.set_ylim(0, None)
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)


def _draw_epochs(content: dict[str, Any], path: Path) -> None:
    with drawn(path, figsize=(6.4, 4.0), layout="constrained") as (_, axes):
        for method in SEVERAL:
            rows = recorded.result(content, f"followed-{method}")["rows"]
            epochs = [row["epoch"] for row in rows]
            for part, style, name in (("train", "--", "training images"), ("val", "-", "validation images")):
                values = [row[part][1] for row in rows]
                label = f"{METHODS[method]}, {name}"
                axes.plot(epochs, values, ls=style, color=COLOURS[method], marker=MARKERS[method], ms=4, label=label)
        axes.set(xlabel="epoch", ylabel=f"accuracy under PGD-{STEPS} (%)")
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)

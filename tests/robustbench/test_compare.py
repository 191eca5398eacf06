"""Two evaluations compared image for image: counts, McNemar's test, the interval, and what is refused."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from quick_autoattack import Quick, batch, message, network, robustbench
from scipy.stats import binomtest

from ikl_plugins.robustbench.compare import Comparison, Paired, compare, mcnemar, paired_interval
from ikl_plugins.robustbench.data import Images, content_sha256
from ikl_plugins.robustbench.evaluation import evaluate
from ikl_plugins.robustbench.evaluation.log import Evaluation

ATTACKS = ["apgd-ce", "square"]


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Of two networks on the same images; each gets some right that the other loses."""
    folder = tmp_path_factory.mktemp("logs")
    a, b = network(4), network(4, seed=1)
    pixels, labels = batch(a, 60, wrong=15)
    labels[20:40] = b(pixels[20:40]).argmax(1)
    data = Images(pixels, labels, ("cat", "$owl", "fox", "elk"), "made up", content_sha256(pixels, labels))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robustbench.eval, "AutoAttack", Quick)
        for name, model in (("a", a), ("b", b)):
            options = {"attacks": ATTACKS, "data": data, "model_name": f"net {name}", "log": folder / f"{name}.json"}
            evaluate(model, pixels, labels, eps="2/255", **options)
    return folder


def loaded(logs):
    return [Evaluation.load(logs / f"{name}.json") for name in "ab"]


@pytest.mark.parametrize("natural", [False, True])
def test_counts_are_those_of_a_loop_over_the_images(logs, natural, tmp_path):
    a, b = (one.log for one in loaded(logs))
    found = compare(logs / "a.json", logs / "b.json", natural=natural)
    key = "natural_correct" if natural else "robust"
    alone = {"a": [], "b": []}
    counts = dict.fromkeys([(1, 1), (1, 0), (0, 1), (0, 0)], 0)
    for index in range(60):
        pair = a[key][index], b[key][index]
        counts[pair] += 1
        if pair[0] != pair[1]:
            alone["ab"[pair[1]]].append(index)
    assert found.asked.counts == tuple(counts.values())
    assert min(counts.values()) > 0
    assert (list(found.asked.only_a), list(found.asked.only_b)) == (alone["a"], alone["b"])
    accuracies = [log["natural_accuracy" if natural else "robust_accuracy"] for log in (a, b)]
    assert found.asked.accuracies == pytest.approx(accuracies)
    assert found.asked.difference == pytest.approx(accuracies[1] - accuracies[0])
    assert found.asked.p_value == pytest.approx(binomtest(len(alone["a"]), len(alone["a"] + alone["b"])).pvalue)

    text = str(found)
    low, high = found.asked.interval
    row = [f"{value:.2f}" for value in accuracies] + [f"{found.asked.difference:+.2f}", f"{low:+.2f} to {high:+.2f}"]
    assert re.search(r"\s+".join(map(re.escape, ["natural" if natural else "robust", *row])), text)
    found.save(tmp_path / "all.csv")
    rows = list(csv.reader((tmp_path / "all.csv").read_text().splitlines()))[1:]
    assert [int(row[0]) for row in rows] == sorted(alone["a"] + alone["b"])
    for index, label, right, lost in rows:
        other = {"a": b, "b": a}[right]
        assert int(label) == other["labels"][int(index)]
        assert lost == ("natural" if natural else other["fell_to"][int(index)] or "natural")
        assert natural or re.search(rf"loses them to: .*\b{lost} \d", text)
    found.save(tmp_path / "all.json")
    written = json.loads((tmp_path / "all.json").read_text())
    assert written["natural" if natural else "robust"]["only_a"] == alone["a"]
    assert (written["robust"] is None) is natural
    with message("`path` must end with .csv or .json"):
        found.save(tmp_path / "all.txt")

    found.draw(tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size == (1650, 600)


def test_a_log_and_itself_do_not_differ(logs):
    one, _ = loaded(logs)
    found = compare(one, one)
    assert found.asked.p_value == 1
    assert found.asked.difference == 0
    assert "a alone: 0\nb alone: 0\n" in str(found)


@pytest.mark.parametrize(("a", "b"), [(0, 0), (0, 1), (3, 3), (1, 7), (25, 2), (40, 61), (700, 811), (4900, 5100)])
def test_mcnemars_test_is_the_exact_binomial_one(a, b):
    expected = binomtest(a, a + b).pvalue if a + b else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)


def test_the_published_example():
    """Cavo et al. (2012) in Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables, chapter 8.

    As computed by the authors' R package contingencytables: for row less column -0.1186 to -0.0046, P = 0.052479.
    """
    assert paired_interval(59, 6, 16, 80) == (pytest.approx(0.46, abs=0.006), pytest.approx(11.86, abs=0.006))
    assert mcnemar(6, 16) == pytest.approx(0.052479, abs=1e-6)


def test_the_interval_holds_the_difference_as_often_as_it_says():
    shares = np.array([0.45, 0.12, 0.08, 0.35])
    draws = np.random.default_rng(0).multinomial(200, shares, size=2000).tolist()
    held = [low <= 100 * (shares[2] - shares[1]) <= high for low, high in (paired_interval(*draw) for draw in draws)]
    assert 0.94 < np.mean(held) < 0.965
    for both, a, b, neither in draws[:20]:  # the other way round, and with right and wrong exchanged
        low, high = paired_interval(both, a, b, neither)
        assert paired_interval(both, b, a, neither) == pytest.approx((-high, -low))
        assert paired_interval(neither, b, a, both) == pytest.approx((-high, -low))


@pytest.mark.parametrize("counts", [(5, 0, 0, 0), (0, 0, 0, 5), (0, 5, 0, 0), (1, 0, 0, 0), (0, 3, 3, 0)])
def test_the_interval_of_extreme_counts_is_finite(counts):
    low, high = paired_interval(*counts)
    assert -100.0001 <= low <= high <= 100.0001


def test_other_images_are_refused_by_name(logs):
    a, b = loaded(logs)
    b.log["data"] = {**b.log["data"], "sha256": "0" * 64, "name": "others"}
    with message("`a` and `b` must be of the same images, but are of others: 60 of made up and 60 of others"):
        compare(a, b)
    with message("must be of the same images"):
        compare(a, b, natural=True, allow_differences=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eps", "4/255"),
        ("threat_model", "L2"),
        ("version", "plus"),
        ("attacks", ["square"]),
        ("parameters", {"square": {"n_queries": 9}}),
    ],
)
def test_other_settings_are_refused_by_name_and_allowed_with_a_warning(logs, key, value):
    a, b = loaded(logs)
    text = f"{key}, {json.dumps(a.log[key])} and {json.dumps(value)}"
    b.log[key] = value
    with message(f"must have the same settings, but differ in {text}. Set allow_differences=True"):
        compare(a, b)
    with pytest.warns(UserWarning, match=re.escape(f"not comparable in {text}")):
        found = compare(a, b, allow_differences=True)
    assert f"Not the same: {text}" in str(found)
    assert compare(a, b, natural=True).differences == ()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"finished": False}, "`b` must be a finished evaluation by attacks, but is unfinished"),
        ({"fell_to": None, "robust": None}, "`b` must be a finished evaluation by attacks, but is under corruptions"),
        ({"natural_correct": None}, "`b` must have predictions on natural images, but has none"),
    ],
)
def test_what_cannot_be_compared_is_refused(logs, changes, text):
    a, b = loaded(logs)
    b.log.update(changes)
    with message(text):
        compare(a, b)
    if changes.get("natural_correct", 1) is not None:
        assert compare(a, b, natural=True).natural.counts


def test_many_classes_are_shown_by_their_difference(tmp_path):
    torch.manual_seed(0)
    flags = torch.rand(2, 200).gt(0.5).int().tolist()
    a, b = ({"labels": [*range(100)] * 2, "classes": None, "n_examples": 200, "data": None} for _ in "ab")
    Comparison(a, b, Paired.of(*flags), None).draw(tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()

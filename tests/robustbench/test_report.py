"""ikl_plugins.robustbench.report: the numbers of an evaluation as Markdown, and its pictures."""

import re
import sys
import urllib.parse

import numpy as np
import pytest
import torch
from PIL import Image
from quick_autoattack import Quick, batch, network, robustbench

from ikl_plugins.robustbench import report as module
from ikl_plugins.robustbench.data import Images
from ikl_plugins.robustbench.evaluation import curve, evaluate
from ikl_plugins.robustbench.evaluation.log import Evaluation
from ikl_plugins.robustbench.leaderboard import draw, rank
from ikl_plugins.robustbench.report import binomial_interval, write_report

CLASSES = ("cat", "$dog$", "owl", "b|d")


@pytest.fixture(scope="module")
def measured():
    """An evaluation of four classes with all there is: some images fall, some stand, two are wrong from the start."""
    model = network(4)
    pixels, labels = batch(model, 40)
    images = Images(pixels, labels, CLASSES, "made up", "0" * 64)
    names = {"model_name": "small_net", "checkpoint": {"name": "w.pt", "sha256": "a" * 64}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robustbench.eval, "AutoAttack", Quick)
        evaluation = evaluate(model, pixels, labels, eps="4/255", attacks=["apgd-ce"], data=images, **names)
        evaluation.log["curve"] = curve(model, pixels, labels, ["2/255", "8/255"], attacks=["apgd-ce"])
    return evaluation, images


def cells(text, first):
    """The cells of the row of a table that starts so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} ")]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[2:-1]]


# Newcombe, Statistics in Medicine 17 (1998), Table I, method 3; the last one is n / (n + 1.96^2).
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (81, 263, 25.53, 36.62),
        (15, 148, 6.24, 16.05),
        (0, 20, 0.0, 16.11),
        (1, 29, 0.61, 17.18),
        (29, 29, 88.30, 100.0),
    ],
)
def test_the_interval_is_wilsons(successes, trials, low, high):
    assert binomial_interval(successes, trials) == (pytest.approx(low, abs=0.006), pytest.approx(high, abs=0.006))


def test_the_page_has_the_numbers(measured, tmp_path):
    evaluation, images = measured
    log = evaluation.log
    path = write_report(evaluation, tmp_path / "new" / "folder", images=images)
    assert path == tmp_path / "new" / "folder" / "report.md"
    text = path.read_text()
    natural, robust = sum(log["natural_correct"]), sum(log["robust"])
    assert (natural, len(log["robust"])) == (38, 40)
    assert 0 < robust < 38
    for row, count in (("natural accuracy", natural), ("robust accuracy (Linf, eps 4/255)", robust)):
        low, high = binomial_interval(count, 40)
        assert cells(text, row) == [f"{2.5 * count:.2f}", f"{low:.2f} to {high:.2f}"]
    assert "not standard AutoAttack" in text
    assert cells(text, "none (natural images)") == ["2", "38", "-"]
    assert cells(text, "apgd-ce")[:2] == [str(38 - robust), str(robust)]
    for name in ("data", "images", "checkpoint", "seed", "attacks"):
        assert len(cells(text, name)) == 1
    assert cells(text, "sha256 of the weights") == [log["weights_sha256"]]
    for label, name in enumerate(("cat", "$dog$", "owl", r"b\|d")):
        own = images.labels == label
        expected = [100 * torch.tensor(log[key])[own].float().mean().item() for key in ("natural_correct", "robust")]
        assert cells(text, name)[:3] == [str(int(own.sum())), *(f"{share:.2f}" for share in expected)]
    for point in log["curve"]:
        assert cells(text, point["eps"])[0] == f"{point['robust_accuracy']:.2f}"
        assert cells(text, point["eps"])[2] == ", ".join(point["attacks"])
    fell = [index for index, attack in enumerate(log["fell_to"]) if attack is not None]
    assert f"{len(fell)} of 38 that were classified right. 8 of them:" in text
    shown = [index for index in fell if re.search(rf"^\| {index} ", text.split("## Images that fell")[1], re.MULTILINE)]
    assert len(shown) == 8
    table = text.split("## Images that fell")[1]
    names = ("cat", "$dog$", "owl", r"b\|d")
    for index in shown:
        assert cells(table, index) == [names[log["labels"][index]], names[log["predictions"][index]], "apgd-ce"]
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert sorted(pictures) == ["classes.png", "fallen.png", "robust_accuracy.png"]
    for picture in pictures:
        with Image.open(path.parent / picture) as image:
            image.load()
            assert min(image.size) > 300


def drawn(monkeypatch):
    """The figures instead of files."""
    figures = {}
    monkeypatch.setattr(module, "save_figure", lambda figure, path: figures.update({path.name: figure}))
    return figures


def test_the_curve_is_drawn_in_grey_levels_from_the_natural_accuracy_on(measured, tmp_path, monkeypatch):
    evaluation, images = measured
    figures = drawn(monkeypatch)
    write_report(evaluation, tmp_path, images=images)
    (axes,) = figures["robust_accuracy.png"].axes
    line, point = axes.lines
    assert line.get_xdata() == pytest.approx([0, 2, 8])
    assert line.get_ydata() == pytest.approx([95, *(point["robust_accuracy"] for point in evaluation.log["curve"])])
    assert (point.get_xdata(), point.get_ydata()) == ([pytest.approx(4)], [evaluation.robust_accuracy])
    assert axes.get_xlabel() == "Linf radius eps (grey levels of 255)"
    (axes,) = figures["classes.png"].axes
    heights = [bar.get_height() for bar in axes.patches]
    assert len(heights) == 8
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["cat", r"\$dog\$", "owl", "b|d"]


def test_the_fallen_are_shown_natural_adversarial_and_different(measured, tmp_path, monkeypatch):
    evaluation, images = measured
    figures = drawn(monkeypatch)
    write_report(evaluation, tmp_path, images=images.images)
    axes = figures["fallen.png"].axes
    assert len(axes) == 24
    index = int(re.match(r"#(\d+)", axes[0].get_title())[1])
    natural, adversarial = images.images[index], evaluation.adversarial[index]
    pictures = [torch.from_numpy(axes[8 * row].images[0].get_array().data).permute(2, 0, 1) for row in range(3)]
    assert torch.equal(pictures[0], natural)
    assert torch.equal(pictures[1], adversarial)
    change = adversarial - natural
    assert torch.allclose(pictures[2], 0.5 + change / (2 * change.abs().max()))


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_images_and_the_first_of_other_channels_are_shown(channels, tmp_path, monkeypatch):
    model = network(4, channels=channels)
    pixels, labels = batch(model, 10, channels=channels)
    monkeypatch.setattr(robustbench.eval, "AutoAttack", Quick)
    evaluation = evaluate(model, pixels, labels, eps="16/255", attacks=["apgd-ce"])
    figures = drawn(monkeypatch)
    text = write_report(evaluation, tmp_path, images=pixels).read_text()
    assert ("of them, the first of 4 channels:" in text) == (channels == 4)
    axes = figures["fallen.png"].axes[0]
    index = int(re.match(r"#(\d+)", axes.get_title())[1])
    assert np.array_equal(axes.images[0].get_array().data, pixels[index, 0].numpy())


@pytest.mark.parametrize(
    ("given", "page", "pictures"),
    [
        ("new/v1.2", "new/v1.2/report.md", ""),
        ("report.md", "report.md", ""),
        ("a net.md", "a net.md", "a net_"),
        ("there.md", "there.md/report.md", ""),
    ],
)
def test_the_page_is_written_where_it_is_told(given, page, pictures, measured, tmp_path, monkeypatch):
    (tmp_path / "there.md").mkdir()
    monkeypatch.setattr(
        module, "save_figure", lambda figure, path: (path.parent.mkdir(parents=True, exist_ok=True), path.touch())
    )
    evaluation, images = measured
    found = write_report(evaluation, tmp_path / given, images=images)
    assert found == tmp_path / page
    links = re.findall(r"!\[.*\]\((.*)\)", found.read_text())
    assert [urllib.parse.unquote(link) for link in links] == [
        f"{pictures}{name}.png" for name in ("robust_accuracy", "classes", "fallen")
    ]
    assert all((found.parent / urllib.parse.unquote(link)).is_file() for link in links)
    assert len(list(found.parent.iterdir())) == 4 + (found.parent == tmp_path)
    with pytest.raises(ValueError, match=r"`path` must be a folder or end with \.md, got .*page\.html"):
        write_report(evaluation, tmp_path / "page.html")


def test_a_result_prints_itself_as_a_short_table(measured):
    evaluation, _ = measured
    standing = evaluation.log["progress"][0]["standing"]
    assert str(evaluation).splitlines() == [
        "small_net: 40 images of made up, Linf, eps 4/255, not standard: apgd-ce",
        "                images  accuracy (%)",
        "natural images      38         95.00",
        f"after apgd-ce       {standing:2}         {2.5 * standing:.2f}",
    ]
    assert repr(evaluation) == f"<Evaluation, {str(evaluation).splitlines()[0]}>"
    unfinished = Evaluation({**evaluation.log, "finished": False})
    assert str(unfinished).endswith("\nNot finished: the robust accuracy will fall further.")
    shown = str(Evaluation(corruption_log(evaluation.log)))
    assert shown.startswith("small_net: 40 images of made up, corruptions\n")
    assert "mean of 10 corruptions and severities" in shown
    ranking = rank("cifar100", "Linf", 39.18, natural_accuracy=73.85, name="mine")
    first, *lines = str(ranking).splitlines()
    assert first == f"mine on RobustBench (cifar100, Linf, eps = 8/255), table of {ranking.date}"
    assert lines[0].split() == ["among", "all", "entries", *str(ranking.overall).split()]
    (own,) = [line.split() for line in lines if line.startswith("> ")]
    assert own == [">", "mine", str(ranking.overall.place), "73.85", "39.18"]
    assert len(lines) == 5 + 1 + len(ranking.above) + len(ranking.below)
    assert max(map(len, lines)) < 80


def corruption_log(log, **changes):
    entries = [
        {"corruption": name, "severity": severity, "accuracy": 10.0 * severity + shift, "n_examples": 10}
        for name, shift in (("fog", 0), ("snow", 1))
        for severity in range(1, 6)
    ]
    return {
        **log,
        "fell_to": None,
        "robust": None,
        "eps": None,
        "version": None,
        "threat_model": "corruptions",
        "dataset": "cifar10",
        "robust_accuracy": 30.5,
        "corruptions": entries,
        "corruptions_mce": 71.234,
        "corruptions_mce_note": None,
        "curve": None,
        **changes,
    }


def test_corruptions_have_a_table_of_severities(measured, tmp_path, monkeypatch):
    evaluation, images = measured
    log = corruption_log(evaluation.log)
    text = write_report(Evaluation(log), tmp_path, images=images).read_text()
    assert cells(text, "fog") == ["10.00", "20.00", "30.00", "40.00", "50.00", "30.00"]
    assert cells(text, "snow") == ["11.00", "21.00", "31.00", "41.00", "51.00", "31.00"]
    assert cells(text, "mean accuracy under corruptions")[0] == "30.50"
    assert cells(text, "mean corruption error")[0] == "71.23"
    assert "upper bound" not in text
    assert (tmp_path / "corruptions.png").exists()
    assert "## Classes" in text
    figures = drawn(monkeypatch)
    write_report(Evaluation(log), tmp_path, images=images)
    assert len(figures["corruptions.png"].axes[0].patches) == 10


def test_images_of_another_number_are_refused(measured, tmp_path):
    evaluation, images = measured
    with pytest.raises(ValueError, match="`images` must be the 40 that were evaluated, got 39"):
        write_report(evaluation, tmp_path, images=images.images[:39])
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_needed_and_its_backend_left_alone(measured, tmp_path, monkeypatch):
    evaluation, _ = measured
    import matplotlib

    before = matplotlib.rcParams["backend"]
    write_report(evaluation, tmp_path)
    assert matplotlib.rcParams["backend"] == before
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ranking = rank("cifar10", "L2", 50.0)
    for call in (lambda: draw(ranking, tmp_path / "none"), lambda: write_report(evaluation, tmp_path / "none")):
        with pytest.raises(ImportError, match=r"pictures need Matplotlib\. Run: pip install matplotlib"):
            call()
    assert not (tmp_path / "none").exists()

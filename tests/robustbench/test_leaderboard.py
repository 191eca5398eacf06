"""The table of the leaderboards, and places in it."""

from __future__ import annotations

import json
from importlib import resources

import pytest

from ikl_plugins.robustbench.leaderboard import Entry, board_eps, draw, entries, rank

BOARDS = {
    ("cifar10", "Linf"): 99,
    ("cifar10", "L2"): 21,
    ("cifar10", "corruptions"): 23,
    ("cifar100", "Linf"): 38,
    ("cifar100", "corruptions"): 13,
    ("imagenet", "Linf"): 30,
    ("imagenet", "corruptions"): 12,
}


def table():
    return json.loads(resources.files("ikl_plugins.robustbench").joinpath("leaderboard.json").read_text())


# --- the table -------------------------------------------------------------------------------------------------------


def test_an_entry_holds_what_the_leaderboard_says():
    found = {entry.id: entry for entry in entries("cifar100", "Linf")}
    assert found["Cui2023Decoupled_WRN-28-10"] == Entry(
        id="Cui2023Decoupled_WRN-28-10",
        architecture="WideResNet-28-10",
        venue="NeurIPS 2024",
        link="https://arxiv.org/abs/2305.13948",
        eps="8/255",
        natural_accuracy=73.85,
        robust_accuracy=39.18,
        autoattack_accuracy=39.18,
        external=False,
        additional_data=False,
        unreliable=False,
        number_forward_passes=1,
    )
    # An adaptive attack found more than AutoAttack.
    kang = {entry.id: entry for entry in entries("cifar10", "Linf")}["Kang2021Stable"]
    assert (kang.robust_accuracy, kang.autoattack_accuracy, kang.external, kang.unreliable) == (64.2, 71.28, True, True)


@pytest.mark.parametrize("board", BOARDS)
def test_entries_are_sorted_as_robustbench_sorts_them(board):
    import robustbench.utils as rb
    from robustbench.model_zoo.enums import ThreatModel

    keys = rb.ACC_FIELDS[ThreatModel(board[1])]
    rows = {row["id"]: row for row in table()["entries"] if (row["dataset"], row["threat_model"]) == board}
    found = entries(*board)
    assert [entry.robust_accuracy for entry in found] == sorted(rb.get_key(row, keys) for row in rows.values())[::-1]
    assert all(entry.robust_accuracy == rb.get_key(rows[entry.id], keys) for entry in found)


RADII = {("cifar10", "L2"): "0.5", ("imagenet", "Linf"): "4/255", ("cifar10", "corruptions"): None}


@pytest.mark.parametrize(("board", "radius"), RADII.items())
def test_the_radius_of_a_leaderboard(board, radius):
    assert board_eps(*board) == radius


# --- places ----------------------------------------------------------------------------------------------------------

# As RobustBench's README of that date lists them; it shows the networks of its zoo, one place each.
PUBLISHED = {
    ("cifar10", "Cui2023Decoupled_WRN-28-10"): (92.16, 67.73, 9),
    ("cifar10", "Cui2023Decoupled_WRN-34-10"): (85.31, 57.09, 49),
    ("cifar100", "Cui2023Decoupled_WRN-28-10"): (73.85, 39.18, 4),
    ("cifar100", "Cui2023Decoupled_WRN-34-10_autoaug"): (65.93, 32.52, 13),
    ("cifar100", "Cui2023Decoupled_WRN-34-10"): (65.76, 31.91, 17),
}


@pytest.mark.parametrize(("dataset", "name"), PUBLISHED)
def test_places_of_published_entries(dataset, name):
    natural, robust, published = PUBLISHED[dataset, name]
    place = rank(dataset, "Linf", robust, natural_accuracy=natural, name=name).overall
    # One place, or, among equals, one of several: the 17th shares 31.91 % with Jia2022LAS-AT_34_20.
    assert place.place <= published <= place.place + len(place.ties)
    assert bool(place.ties) == (robust in (57.09, 31.91))


def test_a_result_of_the_same_accuracy_as_an_entry_shares_its_place():
    found = rank("cifar100", "Linf", 39.18)  # by someone else
    assert found.overall.place == 4
    assert found.overall.ties == ("Cui2023Decoupled_WRN-28-10",)
    assert str(found.overall) == "4 to 5 of 39"
    assert [entry.robust_accuracy for entry in found.above] == [42.66, 42.25, 41.80]
    assert found.below[0].id == "Cui2023Decoupled_WRN-28-10"


@pytest.mark.parametrize(
    ("robust", "place", "above", "below"), [(100.0, 1, 0, 3), (0.0, 39, 3, 0), (39.19, 4, 3, 3), (39.184, 4, 3, 3)]
)
def test_places_at_both_ends_and_between(robust, place, above, below):
    found = rank("cifar100", "Linf", robust)
    assert (found.overall.place, len(found.above), len(found.below)) == (place, above, below)


def test_two_decimals_are_compared():
    assert rank("cifar100", "Linf", 39.184).overall.ties == ("Cui2023Decoupled_WRN-28-10",)
    assert rank("cifar100", "Linf", 39.186).overall.ties == ()


def test_places_with_and_without_additional_data():
    found = rank("cifar100", "Linf", 31.91, name="Cui2023Decoupled_WRN-34-10")
    with_data = [entry for entry in entries("cifar100", "Linf") if entry.additional_data]
    better = [entry for entry in with_data if entry.robust_accuracy > 31.91]
    assert (found.with_data.place, found.with_data.entries) == (len(better) + 1, len(with_data)) == (9, 9)
    assert found.without_data.entries == 38 - 9 - 1  # but for itself
    assert found.overall.place == (found.with_data.place - 1) + (found.without_data.place - 1) + 1


def test_says_how_many_are_better_in_both():
    found = rank("cifar100", "Linf", 39.18, natural_accuracy=73.85, name="Cui2023Decoupled_WRN-28-10")
    board = entries("cifar100", "Linf")
    expected = [e.id for e in board if e.natural_accuracy > 73.85 and e.robust_accuracy > 39.18]
    assert list(found.better_in_both) == expected
    assert len(expected) == 3
    equal = rank("cifar100", "Linf", 39.0, natural_accuracy=73.85)  # better in one, equal in the other
    assert "Cui2023Decoupled_WRN-28-10" not in equal.better_in_both
    assert rank("cifar100", "Linf", 39.18).better_in_both == ()


def test_the_markdown_explains_external_evaluations():
    text = rank("cifar10", "Linf", 64.0, additional_data=True).markdown()
    assert "64.20 (e)" in text
    assert "\n(e): " in text
    assert "(e)" not in rank("cifar10", "corruptions", 90.0).markdown()


def test_the_ranking_as_json():
    found = json.loads(json.dumps(rank("imagenet", "Linf", 59.56).to_dict()))
    assert found["overall"]["place"] == 1 + sum(e.robust_accuracy > 59.56 for e in entries("imagenet", "Linf"))
    assert (found["date"], found["eps"], found["natural_accuracy"]) == ("2025-03-31", "4/255", None)


# --- what is shown ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("natural", [65.76, None])
def test_the_plot_shows_all_entries_and_the_result(natural, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure", reason="plots need matplotlib")
    drawn = []
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, path, dpi: (drawn.append(self), path.write_text("drawn"))
    )
    ranking = rank("cifar100", "Linf", 31.91, natural_accuracy=natural, name="Cui2023Decoupled_WRN-34-10")
    draw(ranking, tmp_path / "new" / "rank.png")
    (axes,) = drawn[0].axes
    points = [tuple(point) for group in axes.collections[:2] for point in group.get_offsets()]
    assert sorted(points) == sorted((e.natural_accuracy, e.robust_accuracy) for e in ranking.others)
    if natural is None:
        assert set(axes.lines[0].get_ydata()) == {31.91}
    else:
        assert [tuple(point) for point in axes.collections[2].get_offsets()] == [(65.76, 31.91)]


# --- bad input -------------------------------------------------------------------------------------------------------


REFUSED = [
    (("cifar11", "Linf", 50), {}, ValueError, "data set `cifar11`. Did you mean `cifar10`"),
    (("cifar10", "linf", 50), {}, ValueError, "threat model `linf`. Did you mean `Linf`"),
    (("cifar100", "L2", 50), {}, ValueError, "`threat_model` .* got 'L2'"),
    (("cifar10", "corruptions_3d", 50), {}, ValueError, "`threat_model` .* cifar10"),
    (("cifar10", "Linf", 101), {}, ValueError, "`robust_accuracy` .* got 101"),
    (("cifar10", "Linf", "57"), {}, TypeError, "`robust_accuracy` .* got '57'"),
    (("cifar10", "Linf", 50), {"natural_accuracy": 850}, ValueError, "`natural_accuracy`"),
    (("imagenet", "Linf", 50), {"eps": "8/255"}, ValueError, "`eps` must be 4/255.* got 8/255"),
    (("cifar10", "L2", 50), {"eps": 1.0}, ValueError, "`eps` must be 0.5"),
    (("cifar10", "corruptions", 50), {"eps": "8/255"}, ValueError, "`eps` must be None"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "fragment"), REFUSED)
def test_refuses_bad_input(arguments, options, error, fragment):
    with pytest.raises(error, match=f"^rank: .*{fragment}"):
        rank(*arguments, **options)

"""tools/choosing.py: page and presets are what was measured, the rule of the choice, and a run that goes on."""

import pytest
from evidence import choosing, choosing_report

from ikl_plugins.losses import LOSSES


def test_page_and_presets_are_those_of_the_record():
    choosing.main(["--check"])


def test_the_highest_mean_whose_mse_has_a_part_is_chosen():
    rows = [
        {"setting": name, "mean": mean, "worst": 0.0, "ratio": ratio}
        for name, mean, ratio in (
            ("vanishes", 3.0, 0.009),
            ("best", 2.0, 0.01),
            ("other", 1.0, 1.0),
            ("nan", 9.0, float("nan")),
        )
    ]
    assert choosing_report.chosen({"IKLLoss": rows}) == {"IKLLoss": "best"}
    assert choosing_report.chosen({"DKLLoss": rows[:3]}) == {"DKLLoss": "vanishes"}  # its MSE drives the teacher alone


def test_every_searched_setting_builds():
    settings = [setting for some in choosing.searched().values() for setting in some]
    assert len({str(setting) for setting in settings}) == len(settings)
    for setting in settings:
        LOSSES[setting["loss"]](num_classes=3, **{key: value for key, value in setting.items() if key != "loss"})


def test_what_was_trained_is_not_trained_again(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(choosing, "CONFIDENCES", {"soft": 1 / 3})
    monkeypatch.setattr(choosing, "OPTIMIZERS", {"SGD": choosing.OPTIMIZERS["SGD"]})
    two = {
        "labels alone": {"loss": None},
        "IKL": {"loss": "IKLLoss", "alpha": 4.0, "temperature": 4.0, "global_info": True},
    }
    monkeypatch.setattr(choosing, "shown", lambda starts: two)
    first = choosing.measure(tmp_path, quick=True, say=lambda line: None)
    monkeypatch.setattr(choosing, "student_result", None)
    assert choosing.measure(tmp_path, quick=True, say=lambda line: None) == first
    alone, ikl = (first["tested"][0]["results"][name]["accuracy"] for name in two)
    table = choosing_report.tables(first)["test"]
    assert f"| labels alone | {alone:.1f} |" in table
    assert f"| IKL | {ikl - alone:+.1f} |" in table

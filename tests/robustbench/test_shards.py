"""Several processes that share an evaluation: what they find is what one run of AutoAttack finds."""

import contextlib

import pytest
import torch
from quick_autoattack import Quick, batch, network, without_times

from ikl_plugins._robustbench_import import import_robustbench
from ikl_plugins.robustbench.evaluation import evaluate
from ikl_plugins.robustbench.evaluation.log import Evaluation
from ikl_plugins.robustbench.evaluation.shards import Unfinished

robustbench = import_robustbench()
pytestmark = pytest.mark.filterwarnings("ignore:.* are right, no more than by chance:UserWarning")
OPTIONS = {"eps": "4/255", "attacks": ["apgd-ce", "apgd-t"], "batch_size": 5, "progress": False}


class Quicker(Quick):
    """With fewer targets and steps still: what matters is who draws which numbers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for attack in (self.apgd, self.apgd_targeted):
            attack.n_iter = 4
            attack.n_restarts = min(attack.n_restarts, 2)
        self.apgd_targeted.n_target_classes = self.fab.n_target_classes = 3
        self.fab.n_iter, self.fab.n_restarts = 3, min(self.fab.n_restarts, 2)
        self.square.n_queries = 20


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(robustbench.eval, "AutoAttack", Quicker)


def sample(count=14, wrong=2):
    model = network()
    return model, *batch(model, count, wrong)


def in_turn(count, *given, log, **options):
    """Lets each shard do what it can, the last one first, until all are done; what each of them returns."""
    found = {}
    for _ in range(10):
        for number in range(count, 0, -1):
            with contextlib.suppress(Unfinished):
                found[number] = evaluate(*given, log=log, shard=(number, count), wait=0, **options)
        if len(found) == count:
            return list(found.values())
    raise AssertionError("the shards do not come to an end")


def autoattack(model, images, labels, *, batch_size, eps, norm="Linf", version="standard", attacks=(), seed=0, **_):
    """One run of AutoAttack itself: adversarial images and predictions."""
    number = int(eps.split("/")[0]) / 255 if "/" in eps else float(eps)
    adversary = robustbench.eval.AutoAttack(
        model,
        norm=norm,
        eps=number,
        seed=seed,
        verbose=False,
        device="cpu",
        version="custom" if attacks else version,
        attacks_to_run=attacks,
    )
    return adversary.run_standard_evaluation(images, labels, bs=batch_size, return_labels=True)


CASES = [(version, norm) for version in ("standard", "plus", "rand") for norm in ("Linf", "L2")]


@pytest.mark.parametrize(("version", "norm"), CASES)
def test_shards_find_what_autoattack_finds(version, norm, tmp_path):
    given = sample()
    eps = "4/255" if norm == "Linf" else "0.1"
    options = {"version": version, "norm": norm, "eps": eps, "batch_size": 5, "seed": 3}
    adversarial, predictions = autoattack(*given, **options)
    whole = evaluate(*given, log=tmp_path / "log.json", **options)
    assert 0 < whole.robust_accuracy < whole.natural_accuracy  # some fall, some stand
    for count in {"standard": (2,), "plus": (3,), "rand": (2, 3)}[version]:
        log = tmp_path / str(count) / "log.json"
        for found in (*in_turn(count, *given, log=log, **options), Evaluation.load(log), whole):
            assert torch.equal(found.adversarial_images(given[1]), adversarial)
            assert found.log["predictions"] == predictions.tolist()
            assert without_times(found.log) == without_times(whole.log)
            assert found.finished

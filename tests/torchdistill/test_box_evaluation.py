"""robust_evaluation in runs of the driver: AutoAttack's number, the best checkpoint, and the training without it."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchdistill.losses.registry", reason="the torchdistill adapter needs torchdistill")
pytest.importorskip("pyautoattack", reason="the oracle is AutoAttack")

from few_steps import FewSteps
from torchdistill.core.interfaces.registry import POST_EPOCH_PROC_FUNC_DICT

from ikl_plugins._files import configs_folder
from ikl_plugins.adversarial import robust_evaluation as evaluation
from ikl_plugins.models import resnet8
from ikl_plugins.torchdistill import robust_evaluation, training
from ikl_plugins.torchdistill.training import last_path, load_checkpoint, load_config, run

TEXT = (configs_folder() / "torchdistill" / "digits" / "adversarial_ikl.yaml").read_text()
PATH = Path("runs/torchdistill/digits/adversarial_ikl/adversarial_ikl.pt")
BEST = PATH.with_name("adversarial_ikl_best_robust.pt")
MEAN, STD = 0.31, 0.33


@pytest.fixture(autouse=True)
def _workplace(data_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("IKL_PLUGINS_DATA", str(data_folder))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "_autoattack", lambda caller: FewSteps)
    registered = dict(POST_EPOCH_PROC_FUNC_DICT)  # a process keeps its attack
    yield
    POST_EPOCH_PROC_FUNC_DICT.clear()
    POST_EPOCH_PROC_FUNC_DICT.update(registered)


def config(epochs=3, interval=1, process=True, eps="4/255"):
    text = TEXT.replace("interval: 5", f"interval: {interval}").replace("num_epochs: 10", f"num_epochs: {epochs}")
    text = text.replace("batch_size: 64", "batch_size: 8").replace("n_examples: 100", "n_examples: 9")
    text = text.replace("eps: '32/255'\n        n_ex", f"eps: '{eps}'\n        batch_size: 4\n        n_ex")
    if not process:
        text = re.sub(r"  post_epoch_process:(.*\n){11}", "", text)
    Path("config.yaml").write_text(text)
    return load_config("config.yaml")


def autoattack(path, settings):
    """AutoAttack's own robust accuracy of a checkpoint on the images that stand for their classes."""
    model = resnet8(num_classes=10).eval()
    model.load_state_dict(load_checkpoint(path)["model"])
    dataset = settings["datasets"]["digits/val"]
    seen, chosen = set(), []
    for index, label in enumerate(dataset.targets):  # of each of the ten classes the first; nine are taken
        if label not in seen:
            chosen.append(index)
        seen.add(label)
    images, labels = zip(*(dataset[index] for index in chosen[:9]), strict=True)
    pixels = torch.stack(images) * STD + MEAN
    settings = {"norm": "Linf", "eps": 4 / 255, "seed": 0}
    return FewSteps.apgd_ce(lambda x: model((x - MEAN) / STD), pixels, torch.tensor(labels), 4, **settings)


def test_the_best_checkpoint_is_the_best_and_its_number_is_autoattacks():
    settings = config(6)
    history = run(settings, best_by="robust")["history"]
    values = [row["robust_accuracy"] for row in history]
    assert values[-1] == pytest.approx(autoattack(last_path(PATH), settings))
    best = load_checkpoint(BEST)
    assert best.keys() == {"model", "optimizer", "best_value", "lr_scheduler", "args"}
    assert best["best_value"] == max(values) == pytest.approx(autoattack(BEST, settings))
    assert best["args"].epoch == values.index(max(values))
    assert max(values) > min(values)
    ours = load_checkpoint(PATH)  # chosen by the same value
    assert ours["best_value"] == max(values)
    assert all(torch.equal(value, ours["model"][name]) for name, value in best["model"].items())


def test_a_training_with_it_is_the_training_without_it(monkeypatch):
    """Without the driver's seed for each epoch, as in upstream's script."""
    monkeypatch.setattr(training, "set_seed", lambda seed: None)
    ends = []
    for process in (True, False):
        torch.manual_seed(0)
        run(config(2, process=process))
        ends.append((load_checkpoint(last_path(PATH)), torch.get_rng_state()))
    for (with_it, its_random), (without, random) in [ends]:
        assert torch.equal(its_random, random)
        assert all(torch.equal(value, without["model"][name]) for name, value in with_it["model"].items())


def test_a_resumed_run_replaces_only_a_worse_checkpoint():
    run(config(2, interval=2), best_by="robust")
    first = load_checkpoint(BEST)
    for epochs, found, kept in ((3, 101.0, True), (4, -0.5, False)):
        torch.save({**first, "best_value": found}, BEST)
        resumed = run(config(epochs, interval=2), best_by="robust", start_epoch=epochs - 1)
        assert (load_checkpoint(BEST)["best_value"] == found) is kept
    assert [("robust_accuracy" in row) for row in resumed["history"]] == [
        False,
        True,
        True,
        True,
    ]  # 3 was once the last
    run(config(1))  # a new run knows nothing of the old one's file
    assert load_checkpoint(BEST)["args"].epoch == 0


def refusal(text, kind=ValueError):
    return pytest.raises(kind, match=re.escape(text))


def test_what_cannot_work_is_refused():
    with refusal("unknown keyword `n_example`. Did you mean `n_examples`?", TypeError):
        robust_evaluation(eps="8/255", n_example=3)
    with refusal("`eps` must be given", TypeError):
        robust_evaluation()
    with refusal("--best_by robust needs `post_epoch_process:`"):
        run(config(1, process=False), best_by="robust")
    with refusal("unknown --best_by `robst`"):
        run(config(1), best_by="robst")
    text = Path("config.yaml").read_text().replace("  pre_epoch_process:", "  unused:").replace("eps_ramp: 1.0", "")
    Path("config.yaml").write_text(re.sub("budget: .*", "steps: 1\n          step_size: 0.1", text))
    settings = load_config("config.yaml")
    settings["train"]["criterion"]["kwargs"]["sub_terms"]["ikl"]["criterion"]["kwargs"]["global_info"] = False
    with refusal("must know where epochs begin. Add to `train:`"):
        run(settings)

"""ManyMediumFew against counts by hand, and the list files that MMPretrain's own data sets read."""

from __future__ import annotations

import numpy
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmpretrain.evaluation import Accuracy
from mmpretrain.structures import DataSample
from mmpretrain_runs import CLASSES, loader, network, runner
from PIL import Image

from ikl_plugins.mmpretrain import ManyMediumFew

COUNTS = [500, 101, 100, 50, 20, 19, 1, 0]  # many: 0, 1; medium: 2, 3, 4; few: 5, 6, 7


def samples(pairs, scores=False):
    made = []
    for predicted, label in pairs:
        sample = DataSample().set_gt_label(label)
        if scores:
            sample.set_pred_score(torch.eye(len(COUNTS))[predicted] * 0.7 + 0.05)
        else:
            sample.set_pred_label(predicted)
        made.append(sample)
    return made


def evaluate(pairs, metric=None, scores=False, **keywords):
    evaluator = Evaluator([metric or ManyMediumFew(COUNTS, **keywords)])
    for start in range(0, len(pairs), 3):
        evaluator.process(samples(pairs[start : start + 3], scores))
    return evaluator.evaluate(len(pairs))


def by_hand(pairs, counts, many=100, few=20):
    """Mean over the classes of a group of the share that is right, as loops."""
    groups = {"all": [], "many": [], "medium": [], "few": []}
    for label, count in enumerate(counts):
        own = [predicted for predicted, true in pairs if true == label]
        if own:
            share = 100 * sum(predicted == label for predicted in own) / len(own)
            groups["all"].append(share)
            groups["many" if count > many else "few" if count < few else "medium"].append(share)
    return {f"long_tail/{name}": sum(shares) / len(shares) for name, shares in groups.items() if shares}


@pytest.fixture
def pairs():
    """Between 0 and 6 test images a class, 60 % of them right."""
    random = numpy.random.default_rng(1)
    labels = [label for label, images in enumerate((6, 3, 1, 4, 2, 5, 2, 3)) for _ in range(images)]
    return [(label if random.random() < 0.6 else int(random.integers(8)), label) for label in labels]


@pytest.mark.parametrize(("many", "few"), [(100, 20), (19, 20)])
@pytest.mark.parametrize("scores", [False, True])
def test_groups_are_those_of_the_counts(pairs, scores, many, few):
    found = evaluate(pairs, scores=scores, many=many, few=few)
    assert found == pytest.approx(by_hand(pairs, COUNTS, many, few))
    assert len(found) == 3 + (many > few)


def test_numbers_of_a_small_case():
    """Classes 0 (many): 1 of 2; 2 (medium): 1 of 1; 6 (few): 0 of 1; bounds themselves are medium."""
    expected = {"all": 50.0, "many": 50.0, "medium": 100.0, "few": 0.0}
    found = evaluate([(0, 0), (1, 0), (2, 2), (0, 6)])
    assert found == {f"long_tail/{name}": value for name, value in expected.items()}
    for label, group in enumerate(["many", "many", "medium", "medium", "medium", "few", "few", "few"]):
        assert evaluate([(label, label)]) == {"long_tail/all": 100.0, f"long_tail/{group}": 100.0}


def test_balanced_test_images_give_the_plain_accuracy():
    pairs = [((label + n) % 8 if n < 2 else label, label) for label in range(8) for n in range(5)]
    evaluator = Evaluator([Accuracy(), ManyMediumFew(COUNTS)])
    evaluator.process(samples(pairs))
    found = evaluator.evaluate(len(pairs))
    assert found["long_tail/all"] == pytest.approx(found["accuracy/top1"])


# --- counts -----------------------------------------------------------------------------------------------------------


def write_images(folder, counts=(3, 1, 2)):
    """A list file as that of ImageNet-LT, and the images it names."""
    lines = []
    for label, count in enumerate(counts):
        for index in range(count):
            path = folder / "train" / f"n{label}" / f"n{label}_{index}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (10 * label, index, 0)).save(path)
            lines.append(f"{path.relative_to(folder)} {label}")
    (folder / "train.txt").write_text("\n".join(lines) + "\n")
    return lines


def test_counts_from_a_list_file_or_a_data_set(tmp_path):
    write_images(tmp_path)
    assert ManyMediumFew(str(tmp_path / "train.txt")).train_counts.tolist() == [3, 1, 2]
    (tmp_path / "blanks.txt").write_text("a folder/an image.jpg 1\nanother one.jpg 0\r\nc.jpg 1 ")
    assert ManyMediumFew(tmp_path / "blanks.txt").train_counts.tolist() == [1, 2]
    config = {"type": "CustomDataset", "data_root": str(tmp_path), "ann_file": "train.txt"}
    assert ManyMediumFew(train_dataset=config).train_counts.tolist() == [3, 1, 2]
    classes = {**config, "classes": ["a", "b", "c", "d"]}
    assert ManyMediumFew(train_dataset=classes).train_counts.tolist() == [3, 1, 2, 0]
    assert config["type"] == "CustomDataset"


def test_labels_that_the_counts_do_not_have():
    with pytest.raises(ValueError, match=r"every class of the test images, got 8 counts and label 8\."):
        evaluate([(0, 0), (0, 8)])


# --- the host ---------------------------------------------------------------------------------------------------------


def test_a_run_validates_with_it(tmp_path):
    run = runner(
        tmp_path,
        network(),
        epochs=1,
        val_dataloader=loader(9),
        val_cfg={},
        val_evaluator=[{"type": "Accuracy"}, {"type": "ManyMediumFew", "train_counts": [200, 50, 3]}],
    )
    run.train()
    found = run.val_loop.run()
    expected = (found["long_tail/many"] + found["long_tail/medium"] + found["long_tail/few"]) / CLASSES
    assert found["long_tail/all"] == pytest.approx(expected)
    assert found["long_tail/all"] == pytest.approx(found["accuracy/top1"])  # three images of each class

"""The teacher's logits on disk: augmentations that recur, a teacher that sees each once, and the same losses."""

import copy
import functools
import json
import multiprocessing
import random
import time
from types import SimpleNamespace

import numpy
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.dataset import BaseDataset, ConcatDataset, DefaultSampler, InfiniteSampler, RepeatDataset, pseudo_collate
from mmengine.runner import loops
from mmpretrain.engine.hooks import SwitchRecipeHook
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from mmpretrain_runs import CLASSES, Record, network, runner
from torch.utils.data import DataLoader, IterableDataset

from ikl_plugins._logit_records import LogitRecords
from ikl_plugins.mmpretrain import FrozenTeacher
from ikl_plugins.mmpretrain.teacher_cache import LogitCache

VIEWS, BATCH = 2, 4


class Noise(BaseTransform):
    """Draws from all generators that transforms draw from."""

    def transform(self, results):
        shift = random.randrange(9) + numpy.random.randint(9) + int(torch.randint(9, ()))
        return {**results, "img": results["img"] // 2 + numpy.uint8(shift)}


class Images(BaseDataset):
    def load_data_list(self):
        pixels = numpy.random.default_rng(0).integers(256, size=(self.count, 12, 12, 3), dtype="u1")
        return [{"img": image, "gt_label": number % CLASSES} for number, image in enumerate(pixels)]

    def __init__(self, count, *steps):
        self.count = count
        flip, packed = {"type": "RandomFlip", "prob": 0.5}, {"type": "PackInputs"}
        super().__init__(pipeline=[Noise(), {"type": "RandomCrop", "crop_size": 8}, flip, *steps, packed])


images_of = functools.cache(Images)  # MMEngine collects garbage for each data set


def loader(dataset, sampler=DefaultSampler, workers=0, **keywords):
    order = sampler(dataset, shuffle=True, seed=3)
    return DataLoader(dataset, BATCH, sampler=order, num_workers=workers, collate_fn=pseudo_collate, **keywords)


def student(teacher_ckpt, folder, **cache):
    cache = {"folder": str(folder), "views": VIEWS, **cache}
    names = {"type": "DistillationClassifier", "teacher": network(), "teacher_ckpt": str(teacher_ckpt)}
    return network(**names, distill_loss={"type": "IKLLoss", "global_info": True}, teacher_cache=cache)


@pytest.fixture
def watched(monkeypatch):
    """What each training batch had: losses, images, whether the teacher was asked; every logit held against it."""
    seen = SimpleNamespace(losses=[], asked=[], images={})
    ask, answer = FrozenTeacher.__call__, LogitCache.__call__

    def asked(teacher, inputs):
        seen.asked[-1] = True
        return ask(teacher, inputs)

    def answered(cache, teacher, inputs, samples, logits):
        seen.asked.append(False)
        found = answer(cache, teacher, inputs, samples, logits)
        tolerance = 1e-5 if cache.dtype == "float32" else 1e-2
        torch.testing.assert_close(found, ask(teacher, inputs), rtol=tolerance, atol=tolerance)
        for sample in samples:
            row, mark, _ = sample.teacher_row
            seen.images.setdefault(row, set()).add(mark)
        return found

    monkeypatch.setattr(FrozenTeacher, "__call__", asked)
    monkeypatch.setattr(LogitCache, "__call__", answered)
    monkeypatch.setattr(loops, "time", SimpleNamespace(sleep=lambda seconds: None, perf_counter=time.perf_counter))
    return seen


def stop_workers(run):
    """Ends workers that stay; left to the garbage collector each of them takes seconds."""
    endless = getattr(run.train_loop, "dataloader_iterator", None)
    for iterator in (run.train_dataloader._iterator, getattr(endless, "_iterator", None)):
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


def trained(seen, work_dir, model, data, **keywords):
    """Trains, and returns the losses of the batches and whether the teacher was asked in them."""
    seen.losses, seen.asked = [], []

    def after_train_iter(runner, batch_idx, data_batch=None, outputs=None):
        seen.losses.append(outputs["loss"].item())

    hooks = [{"type": "IKLHook"}, Record(after_train_iter=after_train_iter)]
    run = runner(work_dir, model, hooks=hooks, train_dataloader=data, default_hooks={"checkpoint": None}, **keywords)
    run.train()
    stop_workers(run)
    return torch.tensor(seen.losses), list(seen.asked)


ENDLESS = {"sampler": InfiniteSampler}
BY_ITERATION = {"train_cfg": {"by_epoch": False, "max_iters": 16}}
# id: data set of 16 images, keywords of the loader, settings of the run
RUNS = {
    "epochs": (lambda: images_of(16), {}, {}),
    "workers, repeated": (lambda: RepeatDataset(images_of(8), 2), {"workers": 2}, {}),
    "workers that stay": (
        lambda: ConcatDataset([images_of(10), images_of(6)]),
        {"workers": 2, "persistent_workers": True},
        {},
    ),
    "iterations, endless": (lambda: images_of(16), {"workers": 1, "persistent_workers": True, **ENDLESS}, BY_ITERATION),
    "iterations, epochs": (lambda: images_of(16), {}, BY_ITERATION),
}


@pytest.mark.parametrize("case", RUNS)
def test_the_teacher_sees_each_view_once_and_the_losses_are_those_without_a_cache(
    watched, teacher, tmp_path, monkeypatch, case
):
    data, keywords, settings = RUNS[case]
    settings = {"epochs": 4, **settings}
    losses, asked = trained(
        watched, tmp_path, student(teacher, tmp_path / "kept"), loader(data(), **keywords), **settings
    )
    assert asked == [True] * 8 + [False] * 8  # two epochs of four batches
    assert len(watched.images) == 16 * VIEWS
    assert all(len(marks) == 1 for marks in watched.images.values())  # each view recurs to the byte
    assert len(set.union(*watched.images.values())) > 16  # and there are several
    again, asked = trained(
        watched, tmp_path, student(teacher, tmp_path / "kept"), loader(data(), **keywords), **settings
    )
    assert not any(asked)
    monkeypatch.setattr(LogitRecords, "read", lambda *arguments: None)
    plain, asked = trained(
        watched, tmp_path, student(teacher, tmp_path / "other"), loader(data(), **keywords), **settings
    )
    assert all(asked)
    for found in (losses, again):
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)


def test_float16_rounds_alike_in_the_first_and_in_later_epochs(watched, teacher, tmp_path):
    model = student(teacher, tmp_path / "kept", dtype="float16")
    losses, _ = trained(watched, tmp_path, model, loader(images_of(16)), epochs=2)
    again, asked = trained(watched, tmp_path, model, loader(images_of(16)), epochs=2)
    assert not any(asked)
    torch.testing.assert_close(losses, again, rtol=0, atol=0)
    (file,) = tmp_path.glob("kept/*/logits.bin")
    assert file.stat().st_size == 16 * VIEWS * (2 * CLASSES + 4)


def test_a_resumed_run_sees_the_views_of_the_whole_one(watched, teacher, tmp_path):
    def run(work, epochs, **keywords):
        seen = runner(
            tmp_path / work,
            student(teacher, tmp_path / work / "kept", views=3),
            epochs=epochs,
            train_dataloader=loader(images_of(16), workers=1, persistent_workers=True),
            **keywords,
        )
        watched.images = {}
        seen.train()
        stop_workers(seen)
        return seen.model.state_dict()

    whole = run("whole", 4)
    run("parts", 2)
    parts = run("parts", 4, resume=True)
    assert {row // 16 for row in watched.images} == {2, 0}
    assert all(map(torch.equal, whole.values(), parts.values()))


def test_a_teacher_that_nobody_asks_leaves_the_device(watched, teacher, tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr(torch.nn.Module, "cpu", lambda module: left.append(module))
    trained(watched, tmp_path, student(teacher, tmp_path / "kept", views=1), loader(images_of(16)), epochs=3)
    assert len(left) == 1  # before the third


def test_a_teacher_that_has_left_the_device_answers_other_images(tmp_path, monkeypatch):
    cache, _ = prepared(tmp_path, count=1)
    teacher, moved = linear([]), []
    monkeypatch.setattr(teacher.module, "to", moved.append)
    cache(teacher, torch.rand(1, 3, 2, 2), [DataSample()], torch.zeros(1, CLASSES))
    assert moved == [torch.device("cpu")]


# --- the file --------------------------------------------------------------------------------------------------------


def prepared(folder, count=6, images=None, **cache):
    """A cache of ``count`` images with one view, and a batch of all of them."""
    made = LogitCache({"folder": folder, "views": 1, **cache}, MODELS.build({"type": "ClsDataPreprocessor"}))
    images = torch.arange(count) if images is None else images
    samples = [DataSample() for _ in range(count)]
    for number, (sample, image) in enumerate(zip(samples, images.tolist(), strict=True)):
        sample.set_field((number, int(image) + 1, (8, 8)), "teacher_row", field_type="metainfo", dtype=None)
    made._rows = count
    return made, samples


def linear(asked):
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, CLASSES))
    module.register_forward_hook(lambda *arguments: asked.append(True))
    return FrozenTeacher(module)


def damages(file, width):
    """Ways in which a write may have ended, and one sound file."""
    whole = file.read_bytes()
    yield whole, False, False
    yield whole[: 2 * width] + bytes(len(whole) - 2 * width), True, True  # what was not written is zero
    yield whole[: 2 * width + 5] + bytes(len(whole) - 2 * width - 5), True, True  # a record cut in its middle
    yield whole[: width - 1] + bytes([whole[width - 1] ^ 1]) + whole[width:], True, True  # a bit of a checksum
    yield bytes([whole[0] ^ 1]) + whole[1:], True, True  # a bit of a logit


def test_a_record_that_is_not_whole_does_not_count_and_is_made_anew(tmp_path):
    asked = []
    teacher, inputs = linear(asked), torch.randn(6, 3, 2, 2)
    cache, samples = prepared(tmp_path)
    logits = cache(teacher, inputs, samples, torch.zeros(6, CLASSES))
    (file,) = tmp_path.glob("*/logits.bin")
    for content, again, _ in list(damages(file, 4 * CLASSES + 4)):
        file.write_bytes(content)
        asked.clear()
        cache, samples = prepared(tmp_path)
        for expected in (again, False):  # it heals
            assert torch.equal(cache(teacher, inputs, samples, torch.zeros(6, CLASSES)), logits)
            assert bool(asked) == expected
            asked.clear()


def test_other_images_ask_the_teacher_and_a_warning_says_so(tmp_path, caplog, monkeypatch):
    from ikl_plugins.mmpretrain import teacher_cache

    said = []
    logger = SimpleNamespace(info=lambda *words: None, warning=lambda *words: said.append(words[0]))
    monkeypatch.setattr(teacher_cache, "MMLogger", SimpleNamespace(get_current_instance=lambda: logger))
    asked = []
    teacher = linear(asked)
    for images in (torch.arange(6), torch.arange(6) + 7):
        cache, samples = prepared(tmp_path, images=images)
        inputs = torch.randn(6, 3, 2, 2)
        found = cache(teacher, inputs, samples, torch.zeros(6, CLASSES))
        assert torch.equal(found, teacher(inputs))
    assert len(asked) == 4
    assert [" a generator of its own" in words for words in said] == [True]


def _write_often(folder, seed):
    torch.manual_seed(0)
    teacher, inputs = linear([]), torch.randn(6, 3, 2, 2)
    cache, samples = prepared(folder)
    records = cache._open(teacher, inputs, CLASSES)
    numbers, marks, _ = zip(*(sample.teacher_row for sample in samples), strict=True)
    for turn in range(200):  # each process with roundings of its own
        records.write(numbers, marks, teacher(inputs) + 1e-7 * (turn % 2) * seed)


def test_processes_may_write_one_file_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_often, args=(tmp_path, seed)) for seed in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    torch.manual_seed(0)
    asked = []
    teacher, inputs = linear(asked), torch.randn(6, 3, 2, 2)
    cache, samples = prepared(tmp_path)
    found = cache(teacher, inputs, samples, torch.zeros(6, CLASSES))
    assert not asked
    torch.testing.assert_close(found, teacher(inputs), rtol=0, atol=1e-6)
    assert len(list(tmp_path.glob("*/*"))) == 2  # nothing is left over


# --- what the logits depend on ---------------------------------------------------------------------------------------

# id: changes of the model, of `teacher_cache`, of the data, of the config's data set; the field that tells
CHANGED = {
    "nothing": ({}, {}, {}, "a", None),
    "input": ({"teacher_input": {"size": 12}}, {}, {}, "a", "teacher_config"),
    "mean": ({"data_preprocessor": {"mean": [1.0] * 3, "std": [60.0] * 3}}, {}, {}, "a", "teacher_inputs"),
    "order": (
        {"data_preprocessor": {"mean": [120.0] * 3, "std": [60.0] * 3, "to_rgb": True}},
        {},
        {},
        "a",
        "teacher_inputs",
    ),
    "precision": ({"teacher_precision": "bf16"}, {}, {}, "a", "teacher_precision"),
    "pipeline": ({}, {}, {}, "b", "pipeline"),
    "images": ({}, {}, {"count": 15}, "a", "images"),
    "views": ({}, {"views": 3}, {}, "a", "images"),
    "seed": ({}, {"seed": 1}, {}, "a", "images"),
    "names": ({}, {}, {}, "a", "data"),
    "weights": ({}, {}, {}, "a", "teacher"),  # the last: they stay
}


def test_whatever_logits_depend_on_has_a_folder_of_its_own(teacher, tmp_path):
    plain = MODELS.build(student(teacher, tmp_path))

    def fields(case):
        changes, cache, data, pipeline, _ = CHANGED[case]
        model = MODELS.build({**student(teacher, tmp_path), **changes}) if changes else plain
        dataset = images_of(data.get("count", 16))
        if case == "names":
            dataset = copy.deepcopy(dataset)
            dataset.data_bytes[-9] ^= 1
        model.teacher.module.head.fc.bias[0] += case == "weights"
        made = LogitCache({"folder": tmp_path, "views": VIEWS, **cache}, model.data_preprocessor)
        loop = SimpleNamespace(dataloader=loader(dataset), epoch=0)
        cfg = Config({"train_dataloader": {"dataset": {"type": "Images", "pipeline": [{"type": pipeline}]}}})
        made.attach(model.teacher, model.data_preprocessor, SimpleNamespace(hooks=[], train_loop=loop, cfg=cfg))
        return made.fields

    first = fields("nothing")
    assert json.dumps(first) == json.dumps(fields("nothing"))
    for case, (*_, name) in CHANGED.items():
        found = fields(case)
        different = {key for key in first if found[key] != first[key]} - ({"data"} if case == "images" else set())
        assert different == ({name} if name else set()), case


# --- refusals --------------------------------------------------------------------------------------------------------

REFUSED = {
    "no folder": ({"teacher_cache": {"views": 2}}, "must have folder and views, got"),
    "unknown": ({"teacher_cache": {"folder": "a", "views": 2, "view": 1}}, "Did you mean `views`"),
    "dtype": (
        {"teacher_cache": {"folder": "a", "views": 2, "dtype": "int8"}},
        "unknown `dtype` `int8`. Known: float16",
    ),
    "views": ({"teacher_cache": {"folder": "a", "views": 0}}, "`views` must be an integer of at least 1, got 0"),
    "mixup": ({"train_cfg": {"augments": {"type": "Mixup", "alpha": 1.0}}}, "not mixed, got `augments` of `train_cfg`"),
    "preprocessor": ({"data_preprocessor": {"type": "TwoViewDataPreprocessor"}}, "got TwoViewDataPreprocessor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_refused(teacher, tmp_path, case):
    changes, message = REFUSED[case]
    config = {**student(teacher, tmp_path), "distill_loss": {"type": "IKLLoss"}, **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        MODELS.build(config)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(images_of(4))

    def __len__(self):
        return 4


def test_runs_that_are_refused(teacher, tmp_path):
    def run(data=None, hooks=({"type": "IKLHook"},)):
        data = loader(images_of(4)) if data is None else data
        runner(tmp_path, student(teacher, tmp_path / "kept"), hooks=hooks, epochs=1, train_dataloader=data).train()

    with pytest.raises(ValueError, match=r"teacher_cache must know where epochs begin.*\n.*IKLHook"):
        run(hooks=())
    switch = SwitchRecipeHook([{"action_epoch": 1, "train_pipeline": []}])
    with pytest.raises(ValueError, match="one pipeline, got a SwitchRecipeHook"):
        run(hooks=({"type": "IKLHook"}, switch))
    with pytest.raises(ValueError, match="batches of indexed images, got Stream"):
        run(DataLoader(Stream(), BATCH, collate_fn=pseudo_collate))
    with pytest.raises(ValueError, match=r"images of one size, got \[\(7, 8\), \(8, 8\)\]"):
        run(loader(Images(4, {"type": "RandomResize", "scale": [(8, 7), (8, 8)]})))
    several = {"type": "MultiView", "num_views": 2, "transforms": [[]]}
    with pytest.raises(ValueError, match="each image must be one tensor, got list"):
        run(loader(Images(4, several)))


def test_logits_beyond_float16_are_refused(tmp_path):
    teacher = linear([])
    teacher.module[1].weight.fill_(1e5)
    cache, samples = prepared(tmp_path, dtype="float16")
    with pytest.raises(ValueError, match="dtype='float16' must hold the teacher's logits, got larger ones"):
        cache(teacher, torch.ones(6, 3, 2, 2), samples, torch.zeros(6, CLASSES))

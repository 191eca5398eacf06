"""The YAML of torchdistill's configs, with blanks: what tools/make_configs.py fills."""

from __future__ import annotations

import textwrap
from string import Template

WHOLE = Template("""\
$header
dependencies: ['ikl_plugins.torchdistill']

datasets:
$datasets

models:
$models

train:
  log_freq: 100
  num_epochs: $epochs
  train_data_loader:
    dataset_id: '$dataset/train'
    sampler:
      class_or_func: !import_get
        key: 'torch.utils.data.RandomSampler'
      kwargs:
    kwargs:
$train_kwargs
  val_data_loader:
    dataset_id: '$dataset/$test'  # $selection
    sampler: &sequential
      class_or_func: !import_get
        key: 'torch.utils.data.SequentialSampler'
      kwargs:
    kwargs: &test_kwargs
      batch_size: $test_batch_size
      num_workers: $workers
$roles
  optimizer:
    key: 'SGD'
    kwargs:
      lr: $lr
      momentum: 0.9
      weight_decay: $weight_decay
  scheduler:
$scheduler
  pre_epoch_process: 'ikl_pre_epoch_process'  # $process
  criterion:
    key: 'WeightedSumLoss'
    kwargs:
      sub_terms:
        $term:
$loss
          weight: 1.0

test:
  test_data_loader:
    dataset_id: '$dataset/$test'
    sampler: *sequential
    kwargs: *test_kwargs
""")


def _call(key: str, anchor: str = "", **kwargs: object) -> str:
    """An item of a list that calls something."""
    lines = [f"- {anchor}!import_call", f"  key: '{key}'"]
    if kwargs:
        lines += ["  init:", "    kwargs:", *(f"      {name}: {value}" for name, value in kwargs.items())]
    return "\n".join(lines)


def _dataset(name: str, key: str, place: str, transforms: list[str] | str) -> str:
    """A data set, and what its images go through: a list, or a flow sequence of anchors."""
    listed = transforms if isinstance(transforms, str) else "\n" + textwrap.indent("\n".join(transforms), " " * 14)
    return textwrap.indent(
        f"{name}: !import_call\n"
        f"  key: '{key}'\n"
        f"  init:\n"
        f"    kwargs:\n"
        f"{textwrap.indent(place, ' ' * 6)}\n"
        f"      transform: !import_call\n"
        f"        key: 'torchvision.transforms.Compose'\n"
        f"        init:\n"
        f"          kwargs:\n"
        f"            transforms:{listed if listed.startswith(chr(10)) else ' ' + listed}",
        "  ",
    )


_TORCHVISION = "torchvision.transforms."
_FLIP = _call(_TORCHVISION + "RandomHorizontalFlip")
_TO_TENSOR = _call(_TORCHVISION + "ToTensor", "&to_tensor ")


def normalize(mean: list[float], std: list[float]) -> str:
    return _call(_TORCHVISION + "Normalize", "&normalize ", mean=mean, std=std)


def cifar_data(dataset: str, *normalized: str) -> str:
    key = f"torchvision.datasets.{dataset.upper()}"
    crop = _call(_TORCHVISION + "RandomCrop", size=32, padding=4)
    again = "[*to_tensor, *normalize]" if normalized else "[*to_tensor]"

    def place(train: bool) -> str:
        return f"root: 'data/{dataset}'\ntrain: {train}\ndownload: True"

    return "\n".join(
        [
            _dataset(f"{dataset}/train", key, place(True), [crop, _FLIP, _TO_TENSOR, *normalized]),
            _dataset(f"{dataset}/test", key, place(False), again),
        ]
    )


def imagenet_data(dataset: str, test: str, key: str, place: str) -> str:
    """Both splits; ``place`` names each with braces."""
    normalized = normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    cropped = _call(_TORCHVISION + "RandomResizedCrop", size=224)
    whole = [_call(_TORCHVISION + name, size=size) for name, size in (("Resize", 256), ("CenterCrop", 224))]
    again = ["- *to_tensor", "- *normalize"]
    return "\n".join(
        [
            _dataset(f"{dataset}/train", key, place.format("train"), [cropped, _FLIP, _TO_TENSOR, normalized]),
            _dataset(f"{dataset}/{test}", key, place.format(test), [*whole, *again]),
        ]
    )


PAIR = Template("""\
  teacher_model:
    key: $teacher
    kwargs:
$teacher_kwargs
$teacher_ckpt  student_model:
    key: $student
    kwargs:
$student_kwargs      num_classes: $classes
    dst_ckpt: '$dst_ckpt'""")

ALONE = Template("""\
  model:
    key: $model
    kwargs:
$kwargs
    dst_ckpt: '$dst_ckpt'""")

PAIR_ROLES = """\
  teacher:
    forward_proc: 'forward_batch_only'
    requires_grad: False
  student:
    forward_proc: 'forward_batch_only'"""

ALONE_ROLES = """\
  model:
    forward_proc: 'forward_batch_only'"""

ATTACKED_ROLES = """\
  model:
    forward_proc: !import_call  # crafts the images; its key is what the box looks up
      key: 'ikl_plugins.torchdistill.adversarial_forward'
      init:
        kwargs:
          eps: '8/255'
          eps_ramp: 1.0  # 8/255 * epoch / 200
          budget: 'high_as_executed'  # 5 steps of eps / 2; the 2 to 5 steps that the script means to take never run
          random_start: 'normal'  # 0.001 * N(0, 1), neither projected nor clamped before the first step
          objective: 'soft_cross_entropy'  # to the natural predictions, without the weighted MSE
          model_mode: 'eval'"""

TAUGHT_ROLES = """\
  teacher:
    forward_proc: 'forward_batch_only'
    requires_grad: False
  student:
    forward_proc: !import_call  # crafts the images; its key is what the box looks up
      key: 'ikl_plugins.torchdistill.adversarial_forward'
      init:
        kwargs:
          eps: '8/255'
          steps: 10
          step_size: '2/255'
          random_start: 'normal'  # 0.001 * N(0, 1)
          teacher_view: 'natural'  # and the attack goes away from what the teacher predicts of them
          objective: 'soft_cross_entropy'
          model_mode: 'eval'"""

STEPS = Template("""\
    key: 'MultiStepLR'
    kwargs:
      milestones: $milestones
      gamma: 0.1""")

WARMUP_COSINE = Template("""\
    key: 'LambdaLR'
    kwargs:
      lr_lambda: !import_call
        key: 'ikl_plugins.torchdistill.WarmupCosine'  # $formula
        init:
          kwargs:
            epochs: $epochs
            warmup_epochs: $warmup""")

COSINE = """\
    key: 'CosineAnnealingLR'  # 0.1 * (1 + cos(pi * (epoch - 1) / 200)); the IKL script is one epoch ahead
    kwargs:
      T_max: 200"""

MID_LEVEL = Template("""\
          criterion:
            key: '$key'
            kwargs:
              student_module_path: '.'$student_note
              student_module_io: 'output'
              teacher_module_path: '.'$teacher_note
              teacher_module_io: 'output'
$settings""")

CROSS_ENTROPY = """\
          criterion:
            key: 'CrossEntropyLoss'
            kwargs:
              reduction: 'mean'
          criterion_wrapper:
            key: 'SimpleLossWrapper'
            kwargs:
              input:
                is_from_teacher: False
                module_path: '.'
                io: 'output'
              target:
                uses_label: True"""

"""tools/adopt.py on torchdistill YAML: what is mapped to what, and that nothing else of a file changes.

The oracles: torchdistill's own losses for gradients, a parse of both texts that knows nothing of the editor for
everything else.
"""

import difflib
import re
import subprocess
import sys
from pathlib import Path

from ikl_plugins.commands import adopt
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torchdistill", reason="the checks run torchdistill (extra `torchdistill`)")

import torch
from ikl_plugins.commands.adopt.torchdistill import adopt_yaml
from ikl_plugins.commands.adopt.torchdistill_check import check_yaml
from torchdistill.losses.registry import get_mid_level_loss

import ikl_plugins.torchdistill  # noqa: F401  # registers

# torch's warning of its own reduction 'mean', of which some configs here have one
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")

ROOT = Path(adopt.__file__).parent.parent
DIGITS = ROOT / "configs" / "torchdistill" / "digits"

# In the form of torchdistill 1.x's samples: anchors on keys, private keys, tags, comments.
SAMPLE = """\
# a student of ResNet-18 form, taught by ResNet-34
datasets:
  &train_id ilsvrc2012/train: !import_call
    _name: &dataset_name 'ilsvrc2012'
    _root: &root_dir !join ['~/datasets/', *dataset_name]
    key: 'torchvision.datasets.ImageFolder'
    init:
      kwargs:
        root: !join [*root_dir, '/train']
        transform: !import_call
          key: 'torchvision.transforms.Compose'
          init:
            kwargs:
              transforms:
                - &to_tensor !import_call
                  key: 'torchvision.transforms.ToTensor'
                  init:

models:
  teacher_model:
    key: &teacher_key 'resnet34'
    _weights: &teacher_weights !import_get
      key: 'torchvision.models.resnet.ResNet34_Weights'
    kwargs:
      num_classes: 1000
      weights: !getattr [*teacher_weights, 'IMAGENET1K_V1']
    src_ckpt:
  student_model:
    key: &student_key 'resnet18'   # the small one
    kwargs:
      num_classes: 1000
    _experiment: &experiment !join [*dataset_name, '-', *student_key, '_from_', *teacher_key]
    dst_ckpt: !join ['./resource/ckpt/', *experiment, '.pt']

train:
  log_freq: 1000
  num_epochs: 20
  train_data_loader:
    dataset_id: *train_id
  teacher:
    forward_proc: 'forward_batch_only'
    sequential: []
    requires_grad: False
  student:
    forward_proc: 'forward_batch_only'
    adaptations:
  optimizer:
    key: 'SGD'
    kwargs: {lr: 0.0001, momentum: 0.9}
  # what is minimised
  criterion:
    key: 'WeightedSumLoss'
    kwargs:
      sub_terms:
        kd:
          criterion:
            key: 'KDLoss'
            kwargs:
              student_module_path: '.'
              student_module_io: 'output'
              teacher_module_path: '.'
              teacher_module_io: 'output'
              temperature: 4.0   # soft
              alpha: 0.1
              beta: 0.9  # of KL
              reduction: 'batchmean'
          weight: 1.0

test:
  test_data_loader:
    dataset_id: *train_id
"""


def loss_block(key, wrapper="", **kwargs):
    """A term's lines, at the indentation of SAMPLE."""
    lines = [f"            key: '{key}'", "            kwargs:"]
    lines += [f"              {name}: {value}" for name, value in kwargs.items()]
    return "\n".join(lines) + "\n" + wrapper


PLACES = {
    "student_module_path": "'.'", "student_module_io": "'output'",
    "teacher_module_path": "'.'", "teacher_module_io": "'output'",
}  # fmt: skip
WRAPPER = """\
          criterion_wrapper:
            key: 'SimpleLossWrapper'
            kwargs:
              input:
                is_from_teacher: False
                module_path: 'log_probs'
                io: 'output'
              target:
                is_from_teacher: True
                module_path: 'probs'
                io: 'output'
"""
HOOKS = """\
  teacher:
    forward_proc: 'forward_batch_only'
    forward_hook:
      input: ['probs']
      output: ['probs', 'fc']
    sequential: []
    requires_grad: False
  student:
    forward_proc: 'forward_batch_only'
    forward_hook:
      output: ['log_probs', 'fc']
"""


def with_loss(block):
    start = SAMPLE.index("            key: 'KDLoss'")
    end = SAMPLE.index("          weight: 1.0")
    return SAMPLE[:start] + block + SAMPLE[end:]


def kl_sample(wrapper=WRAPPER, **kwargs):
    text = with_loss(loss_block("KLDivLoss", wrapper, **kwargs) if kwargs else
                     f"            key: 'KLDivLoss'\n            kwargs:\n{wrapper}")  # fmt: skip
    start = text.index("  teacher:\n    forward_proc")
    end = text.index("    adaptations:")
    return text[:start] + HOOKS + text[end:]


class Plain(yaml.SafeLoader):
    """Reads any tag as the plain value under it."""


def plain(loader, suffix, node):
    if isinstance(node, yaml.MappingNode):
        return {"!": suffix, **loader.construct_mapping(node, deep=True)}
    if isinstance(node, yaml.SequenceNode):
        return [suffix, *loader.construct_sequence(node, deep=True)]
    return [suffix, loader.construct_scalar(node)]


Plain.add_multi_constructor("!", plain)


def parse(text):
    return yaml.load(text, Loader=Plain)  # noqa: S506  # it constructs plain values


def criterion_of(text, stage=None):
    train = parse(text)["train"]
    return (train if stage is None else train[stage])["criterion"]["kwargs"]["sub_terms"]


def gradients(key, kwargs, *, student, teacher, labels):
    loss = get_mid_level_loss({"key": key, "kwargs": kwargs})
    if hasattr(loss, "begin_epoch"):
        loss.begin_epoch(1, None)
    student, teacher = (part.clone().requires_grad_() for part in (student, teacher))
    value = loss({".": {"output": student}}, {".": {"output": teacher}}, labels)
    return torch.autograd.grad(value, (student, teacher))


@pytest.fixture
def logits():
    return {
        "student": torch.randn(6, 1000, dtype=torch.float64) * 3,
        "teacher": torch.randn(6, 1000, dtype=torch.float64) * 3,
        "labels": torch.randint(1000, (6,)),
    }


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "adopt.py", *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
    )  # fmt: skip


# --- the text --------------------------------------------------------------------------------------------------------


def test_the_file_of_kd_becomes_exactly_this_one():
    adoption = adopt_yaml(SAMPLE, "IKL")
    removed, added = [], []
    for line in difflib.ndiff(SAMPLE.splitlines(), adoption.text.splitlines()):
        if line[0] in "-+":
            (removed if line[0] == "-" else added).append(line[2:])
    assert removed == [
        "            key: 'KDLoss'", "              alpha: 0.1", "              beta: 0.9  # of KL",
    ]  # fmt: skip
    assert added == [
        "dependencies: ['ikl_plugins.torchdistill']",
        "  pre_epoch_process: 'ikl_pre_epoch_process'",
        "            key: 'IKLLoss'",
        "              ce_weight: 0.1  # cross entropy to the labels: KDLoss's alpha",
        "              # was: beta: 0.9  # of KL",
        "              alpha: 14.4  # soft-label cross entropy: KDLoss's beta 0.9 * temperature**2",
        "              beta: 0.9  # new: weighted MSE, drives the student; alpha / temperature**2",
        "              weight_temperature: 4.0  # new: of the weights; that of DKL",
    ]
    lines = adoption.text.splitlines()
    assert lines[0].startswith("# a student")
    assert lines[1] == "dependencies: ['ikl_plugins.torchdistill']"
    assert lines[lines.index("  # what is minimised") - 1] == "  pre_epoch_process: 'ikl_pre_epoch_process'"


@pytest.mark.parametrize("loss", ["DKL", "IKL", "GKL"])
def test_all_that_is_not_the_loss_parses_as_before(loss):
    new = parse(adopt_yaml(SAMPLE, loss).text)
    assert new.pop("dependencies") == ["ikl_plugins.torchdistill"]
    assert new["train"].pop("pre_epoch_process") == "ikl_pre_epoch_process"
    old = parse(SAMPLE)
    for config in (old, new):
        config["train"]["criterion"]["kwargs"]["sub_terms"]["kd"]["criterion"] = None
    assert new == old


@pytest.mark.parametrize("loss", ["DKL", "IKL", "GKL"])
def test_an_adopted_file_is_a_fixed_point(loss):
    first = adopt_yaml(SAMPLE, loss)
    again = adopt_yaml(first.text, loss)
    assert first.changed
    assert not again.changed
    assert again.text == first.text


def test_windows_line_ends_stay():
    adoption = adopt_yaml(SAMPLE.replace("\n", "\r\n"), "IKL")
    assert adoption.text == adopt_yaml(SAMPLE, "IKL").text.replace("\n", "\r\n")


def test_a_file_without_a_last_line_end_stays_one():
    start = SAMPLE.index("\ntest:\n")
    text = SAMPLE[:start].rstrip("\n")
    assert not adopt_yaml(text, "IKL").text.endswith("\n")
    assert parse(adopt_yaml(text, "IKL").text)["train"]["criterion"]["kwargs"]["sub_terms"]["kd"]["weight"] == 1.0


@pytest.mark.parametrize("style", ["kwargs", "criterion", "term"])
def test_flow_style_stays_flow_style(style):
    inner = (
        "{student_module_path: '.', student_module_io: 'output', teacher_module_path: '.', teacher_module_io: "
        "'output', "
        "temperature: 4.0, alpha: 0.1}"
    )
    if style == "kwargs":
        text = with_loss(f'            key: "KDLoss"\n            kwargs: {inner}  # all of it\n')
    else:
        text = with_loss("").replace(
            "          criterion:\n", f"          criterion: {{key: KDLoss, kwargs: {inner}}}\n"
        )
    if style == "term":
        start, end = text.index("        kd:\n"), text.index("\ntest:")
        text = f"{text[:start]}        kd: {{criterion: {{key: KDLoss, kwargs: {inner}}}, weight: 1.0}}\n{text[end:]}"
    adoption = adopt_yaml(text, "IKL")
    assert "# new" not in adoption.text
    assert len(adoption.text.splitlines()) == len(text.splitlines()) + 2
    criterion = criterion_of(adoption.text)["kd"]["criterion"]
    assert criterion["key"] == "IKLLoss"
    assert criterion["kwargs"] == {name: value.strip("'") for name, value in PLACES.items()} | {
        "temperature": 4.0, "ce_weight": 0.1, "alpha": 14.4, "beta": 0.9, "weight_temperature": 4.0,
    }  # fmt: skip
    assert not adopt_yaml(adoption.text, "IKL").changed


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "dependencies: ['ikl_plugins.torchdistill']\n"),
        ("dependencies:\n", "dependencies: ['ikl_plugins.torchdistill']\n"),
        ("dependencies:  # none yet\n", "dependencies: ['ikl_plugins.torchdistill']  # none yet\n"),
        ("dependencies: 'mine'  # m\n", "dependencies: ['mine', 'ikl_plugins.torchdistill']  # m\n"),
        ("dependencies: []\n", "dependencies: ['ikl_plugins.torchdistill']\n"),
        ("dependencies: ['mine']\n", "dependencies: ['mine', 'ikl_plugins.torchdistill']\n"),
        ("dependencies: ['mine',]\n", "dependencies: ['mine', 'ikl_plugins.torchdistill']\n"),
        ("dependencies:\n- mine  # m\n", "dependencies:\n- mine  # m\n- 'ikl_plugins.torchdistill'\n"),
        (
            "dependencies:\n  - name: 'mine'\n  # the end\n",
            "dependencies:\n  - name: 'mine'\n  - 'ikl_plugins.torchdistill'\n  # the end\n",
        ),
        ("dependencies: 'ikl_plugins.torchdistill'\n", "dependencies: 'ikl_plugins.torchdistill'\n"),
        ("dependencies: [{name: ikl_plugins.torchdistill}]\n", "dependencies: [{name: ikl_plugins.torchdistill}]\n"),
        ("dependencies: [[ikl_plugins.torchdistill]]\n", "dependencies: [[ikl_plugins.torchdistill]]\n"),
    ],
)
def test_the_dependency_joins_those_that_are_there(before, after):
    head, rest = SAMPLE.split("\n", 1)
    text = adopt_yaml(f"{head}\n{before}{rest}", "IKL").text
    assert text.startswith(f"{head}\n{after}datasets:")
    assert not adopt_yaml(text, "IKL").changed


def test_the_dependency_stands_behind_the_mark_of_a_document():
    assert (
        adopt_yaml(f"%YAML 1.1\n---\n{SAMPLE}", "IKL").text.split("\n")[3]
        == "dependencies: ['ikl_plugins.torchdistill']"
    )


@pytest.mark.parametrize("held", ["", " 'default_pre_epoch_process_with_teacher'", "  # none"])
def test_a_default_pre_epoch_process_is_replaced(held):
    text = SAMPLE.replace("  # what is", f"  pre_epoch_process:{held}\n  # what is")
    adopted = adopt_yaml(text, "IKL")
    assert parse(adopted.text)["train"]["pre_epoch_process"] == "ikl_pre_epoch_process"
    assert adopted.text.count("pre_epoch_process:") == 1
    assert ("# none" in adopted.text) == ("# none" in held)


def test_a_process_of_the_users_stays_unless_the_epoch_is_needed():
    text = SAMPLE.replace("  # what is", "  pre_epoch_process: 'mine'\n  # what is")
    adopted = adopt_yaml(text, "IKL", name="a.yaml")
    assert parse(adopted.text)["train"]["pre_epoch_process"] == "mine"
    assert any("your pre_epoch_process 'mine' stays" in note for note in adopted.notes)
    with pytest.raises(
        ValueError, match=r"a\.yaml, line 50: `pre_epoch_process` must be .*which global_info must know"
    ):
        adopt_yaml(text, "IKL", name="a.yaml", settings={"global_info": True})


# --- what is mapped to what ------------------------------------------------------------------------------------------

FRACTIONS = [
    {"temperature": "4.0", "alpha": "0.1", "beta": "0.9"},
    {"temperature": "4.0", "alpha": "0.1"},
    {"temperature": "1", "alpha": "0.5"},
    {"temperature": "2.5", "alpha": "1", "beta": "9"},
    {"temperature": "7.0", "alpha": "0", "beta": "0.3"},
    {"temperature": "7.0", "beta": "0.3"},
    {"temperature": "7.0", "alpha": "null", "beta": "0.3"},
    {"temperature": "3.0", "alpha": "0.3", "beta": "0.7", "reduction": "'sum'"},
    {"temperature": "3.0", "alpha": "0.3", "beta": "0.7", "reduction": "'mean'"},
    {"temperature": "3.0", "alpha": "0", "reduction": "'mean'"},
    {"reduction": "'batchmean'", "temperature": "0.5", "alpha": "1.0"},
]


@pytest.mark.parametrize("kwargs", FRACTIONS, ids=lambda kwargs: ",".join(f"{k}={v}" for k, v in kwargs.items()))
def test_dkl_has_the_gradients_of_kdloss(kwargs, logits):
    text = with_loss(loss_block("KDLoss", **PLACES, **kwargs))
    adopted = adopt_yaml(text, "DKL")
    new, old = (criterion_of(each)["kd"]["criterion"] for each in (adopted.text, text))
    assert (old["key"], new["key"]) == ("KDLoss", "DKLLoss")
    expected = gradients("KDLoss", old["kwargs"], **logits)
    found = gradients("DKLLoss", new["kwargs"], **logits)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)
    assert any("gradients are those of KDLoss" in note for note in adopted.notes)
    assert "equal those of KDLoss" in check_yaml(adopted, text, "x")[0]


@pytest.mark.parametrize("kwargs", FRACTIONS, ids=lambda kwargs: ",".join(f"{k}={v}" for k, v in kwargs.items()))
@pytest.mark.parametrize("loss", ["IKL", "GKL"])
def test_ikl_differs_from_kdloss_in_the_term_of_beta_alone(loss, kwargs, logits):
    text = with_loss(loss_block("KDLoss", **PLACES, **kwargs))
    adopted = adopt_yaml(text, loss)
    new, old = (criterion_of(each)["kd"]["criterion"] for each in (adopted.text, text))
    expected = gradients("KDLoss", old["kwargs"], **logits)
    found = gradients(f"{loss}Loss", new["kwargs"] | {"beta": 0.0}, **logits)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-15)
    # The term of beta drives the teacher as KL does, and the student the other way.
    whole = gradients(f"{loss}Loss", new["kwargs"], **logits)
    torch.testing.assert_close(whole[1], expected[1], rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(whole[0] - found[0], -whole[1], rtol=1e-7, atol=1e-13)
    assert "gradients with beta 0 equal those of KDLoss" in check_yaml(adopted, text, "x")[0]


def test_the_check_notices_a_wrong_mapping():
    adopted = adopt_yaml(SAMPLE, "DKL")
    wrong = adopted.text.replace("alpha: 14.4", "alpha: 0.9")
    with pytest.raises(ValueError, match=r"adopt: x: gradients of the term 'kd' must equal those of KDLoss, got a rel"):
        check_yaml(type(adopted)(wrong, [], True, adopted.claims), SAMPLE, "x")


def test_logit_standardisation_has_no_equivalent_and_says_so():
    text = with_loss(loss_block("LogitStdKDLoss", **PLACES, temperature=2.0, eps="1.0e-7", alpha=0.5, beta=9))
    adopted = adopt_yaml(text, "IKL")
    kwargs = criterion_of(adopted.text)["kd"]["criterion"]["kwargs"]
    assert {name: kwargs[name] for name in ("ce_weight", "alpha", "beta", "temperature", "weight_temperature")} == {
        "ce_weight": 0.5, "alpha": 36.0, "beta": 9.0, "temperature": 2.0, "weight_temperature": 2.0,
    }  # fmt: skip
    assert "eps" not in kwargs
    assert any("no equivalence holds: LogitStdKDLoss standardises" in note for note in adopted.notes)
    (line,) = check_yaml(adopted, text, "x")
    assert "finite" in line
    assert "equal" not in line


@pytest.mark.parametrize("log_target", ["True", None])
@pytest.mark.parametrize("reduction", ["'batchmean'", "'sum'", "'mean'", None])
@pytest.mark.parametrize("loss", ["DKL", "IKL"])
def test_kl_in_a_simple_loss_wrapper(log_target, reduction, loss, logits):
    given = {"reduction": reduction, "log_target": log_target}
    text = kl_sample(**{name: value for name, value in given.items() if value is not None})
    options = {} if log_target else {"teacher_logits": "probs:input"}
    adopted = adopt_yaml(text, loss, **options)
    term = criterion_of(adopted.text)["kd"]
    assert set(term) == {"criterion", "weight"}
    kwargs = term["criterion"]["kwargs"]
    assert (kwargs["student_module_path"], kwargs["student_module_io"]) == ("log_probs", "output")
    assert (kwargs["teacher_module_path"], kwargs["teacher_module_io"]) == (
        ("probs", "output") if log_target else ("probs", "input")
    )
    student, teacher = (logits[role].clone().requires_grad_() for role in ("student", "teacher"))
    kl = torch.nn.KLDivLoss(
        **{} if reduction is None else {"reduction": reduction.strip("'")}, log_target=log_target is not None
    )
    target = torch.log_softmax(teacher, 1) if log_target else torch.softmax(teacher, 1)
    expected = torch.autograd.grad(kl(torch.log_softmax(student, 1), target), (student, teacher))

    ours = get_mid_level_loss({"key": f"{loss}Loss", "kwargs": kwargs | ({} if loss == "DKL" else {"beta": 0.0})})
    teacher_output = torch.log_softmax(teacher, 1) if log_target else teacher
    value = ours(
        {"log_probs": {"output": torch.log_softmax(student, 1)}},
        {"probs": {kwargs["teacher_module_io"]: teacher_output}},
        logits["labels"],
    )
    found = torch.autograd.grad(value, (student, teacher), materialize_grads=True)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-15)
    if loss == "DKL":
        torch.testing.assert_close(found[1], expected[1], rtol=1e-9, atol=1e-15)
    assert "equal those of KLDivLoss" in check_yaml(adopted, text, "x")[0]
    assert not adopt_yaml(adopted.text, loss).changed


def test_the_students_logits_of_a_kl_can_be_named():
    adopted = adopt_yaml(kl_sample(reduction="'batchmean'"), "IKL", student_logits="fc", teacher_logits="fc")
    kwargs = criterion_of(adopted.text)["kd"]["criterion"]["kwargs"]
    assert {name: kwargs[name] for name in PLACES} == {
        "student_module_path": "fc", "student_module_io": "output",
        "teacher_module_path": "fc", "teacher_module_io": "output",
    }  # fmt: skip


def test_settings_replace_what_follows_from_the_file():
    settings = {
        "ce_weight": 1.0, "alpha": 2.0, "beta": 1e-05, "gamma": 0.2, "temperature": 1.0, "weight_temperature": 100.0,
        "global_info": True, "warmup_epochs": 20,
    }  # fmt: skip
    adopted = adopt_yaml(SAMPLE, "GKL", settings=settings)
    kwargs = criterion_of(adopted.text)["kd"]["criterion"]["kwargs"]
    assert kwargs == {name: value.strip("'") for name, value in PLACES.items()} | settings | {
        "num_classes": 1000, "reduction": "batchmean",
    }  # fmt: skip
    assert "beta: 1.0e-05" in adopted.text
    assert "temperature: 1.0   # soft" in adopted.text
    assert any("no equivalence holds, as --set gives ce_weight, alpha, temperature, warmup_epochs" in note
               for note in adopted.notes)  # fmt: skip
    assert "equal" not in check_yaml(adopted, SAMPLE, "x")[0]
    assert not adopt_yaml(adopted.text, "GKL", settings=settings).changed


def test_beta_of_ikl_may_be_given_and_the_equivalence_stays():
    adopted = adopt_yaml(SAMPLE, "IKL", settings={"beta": 4})
    assert "equal those of KDLoss" in check_yaml(adopted, SAMPLE, "x")[0]


def test_the_number_of_classes_is_found_where_glue_has_it():
    text = SAMPLE.replace(
        "    kwargs:\n      num_classes: 1000\n    _exp", "    config_kwargs:\n      num_labels: 2\n    _exp"
    )
    adopted = adopt_yaml(text, "IKL", settings={"global_info": True})
    assert criterion_of(adopted.text)["kd"]["criterion"]["kwargs"]["num_classes"] == 2


# --- several stages, several terms, anchors --------------------------------------------------------------------------

TWO_STAGES = """\
models:
  student_model:
    kwargs:
      num_classes: 100
train:
  stage1:
    num_epochs: 5
    teacher:
      requires_grad: False
    criterion:
      key: 'WeightedSumLoss'
      kwargs:
        sub_terms:
          hint:
            criterion:
              key: 'MSELoss'
              kwargs:
                reduction: 'sum'
            criterion_wrapper:
              key: 'SimpleLossWrapper'
              kwargs:
                input: {is_from_teacher: False, module_path: 'layer1', io: 'output'}
                target: {is_from_teacher: True, module_path: 'layer1', io: 'output'}
            weight: 1.0
  stage2:
    num_epochs: 15
    criterion:  # of the second stage
      key: 'WeightedSumLoss'
      kwargs:
        sub_terms:
          kd:
            criterion:
              key: 'KDLoss'
              kwargs: &kd
                student_module_path: 'fc'
                student_module_io: 'output'
                teacher_module_path: 'fc'
                teacher_module_io: 'output'
                temperature: &T 4.0
                alpha: &a 0.5
            weight: 2.0
  stage3:
    num_epochs: 1
    criterion:
      key: 'WeightedSumLoss'
      kwargs:
        sub_terms:
          other:
            criterion:
              key: KDLoss
              kwargs: *kd
            weight: *T
"""


def test_every_stage_that_has_a_kd_is_adopted_and_shared_keywords_once():
    adopted = adopt_yaml(TWO_STAGES, "IKL")
    config = parse(adopted.text)["train"]
    assert "pre_epoch_process" not in config["stage1"]
    assert config["stage1"] == parse(TWO_STAGES)["train"]["stage1"]
    for stage, name, weight in (("stage2", "kd", 2.0), ("stage3", "other", 4.0)):
        assert config[stage]["pre_epoch_process"] == "ikl_pre_epoch_process"
        term = criterion_of(adopted.text, stage)[name]
        assert term["weight"] == weight
        assert term["criterion"]["key"] == "IKLLoss"
        assert term["criterion"]["kwargs"]["ce_weight"] == 0.5
        assert term["criterion"]["kwargs"]["alpha"] == 8.0
    assert "kwargs: &kd" in adopted.text
    assert "kwargs: *kd" in adopted.text
    assert "ce_weight: &a 0.5" in adopted.text
    lines = check_yaml(adopted, TWO_STAGES, "x")
    assert len(lines) == 3
    assert lines[0] == "train: stage1: the term 'hint' was built, not run"
    assert all("equal those of KDLoss" in line for line in lines[1:])
    assert not adopt_yaml(adopted.text, "IKL").changed


def test_a_whole_criterion_may_be_shared():
    text = TWO_STAGES[: TWO_STAGES.index("  stage3:")].replace("criterion:  # of", "criterion: &whole  # of")
    text += "  stage3:\n    num_epochs: 1\n    criterion: *whole\n"
    adopted = adopt_yaml(text, "IKL")
    assert criterion_of(adopted.text, "stage3") == criterion_of(adopted.text, "stage2")
    assert criterion_of(adopted.text, "stage3")["kd"]["criterion"]["key"] == "IKLLoss"
    assert parse(adopted.text)["train"]["stage3"]["pre_epoch_process"] == "ikl_pre_epoch_process"
    assert len(check_yaml(adopted, text, "x")) == 3


def test_a_loss_that_somebody_else_uses_is_not_changed_under_them():
    text = TWO_STAGES.replace(
        "            criterion:\n              key: 'KDLoss'",
        "            criterion: &loss\n              key: 'KDLoss'",
    )
    with pytest.raises(
        ValueError,
        match=r"a\.yaml, line 53: the KDLoss of line 32 must be used by losses that are adopted alone, got `mine`",
    ):
        adopt_yaml(f"{text}mine: *loss\n", "IKL", name="a.yaml")
    assert adopt_yaml(f"{text}_mine: *loss\n", "IKL").changed  # torchdistill does not read private keys


def test_terms_beside_the_kd_stay_as_they_are():
    other = """\
        ce:
          criterion:
            key: 'CrossEntropyLoss'
            kwargs: {label_smoothing: 0.1}
          criterion_wrapper:
            key: 'SimpleLossWrapper'
            kwargs: {input: {is_from_teacher: False, module_path: '.', io: 'output'}, target: {uses_label: True}}
          weight: 0.3
"""
    text = SAMPLE.replace("        kd:\n", f"{other}        kd:\n")
    adopted = adopt_yaml(text, "IKL")
    assert other in adopted.text
    assert "train: the term 'ce' was built, not run" in check_yaml(adopted, text, "x")


def test_values_given_by_an_alias_stay_aliases():
    text = SAMPLE.replace("temperature: 4.0   # soft", "temperature: *T").replace("alpha: 0.1", "alpha: *a")
    text = text.replace("  num_epochs: 20\n", "  num_epochs: 20\n  _T: &T 4.0\n  _a: &a 0.1\n")
    adopted = adopt_yaml(text, "IKL")
    assert "temperature: *T" in adopted.text
    assert "ce_weight: *a  # cross" in adopted.text
    assert (
        parse(adopted.text)["train"]["criterion"]["kwargs"]["sub_terms"]["kd"]["criterion"]["kwargs"]["alpha"] == 14.4
    )


def test_module_paths_may_be_merged_in():
    paths = "".join(f"    {name}: {value}\n" for name, value in PLACES.items())
    text = with_loss("            key: 'KDLoss'\n            kwargs:\n              <<: *paths\n"
                     "              temperature: 4.0\n              alpha: 0.1\n")  # fmt: skip
    text = text.replace("train:\n", f"train:\n  _paths: &paths\n{paths}", 1)
    adopted = adopt_yaml(text, "IKL")
    kwargs = criterion_of(adopted.text)["kd"]["criterion"]["kwargs"]
    assert kwargs == {name: value.strip("'") for name, value in PLACES.items()} | {
        "temperature": 4.0, "ce_weight": 0.1, "alpha": 14.4, "beta": 0.9, "weight_temperature": 4.0,
    }  # fmt: skip
    assert "<<: *paths" in adopted.text


def test_a_plain_criterion_becomes_a_term_of_a_weighted_sum():
    start, end = SAMPLE.index("    key: 'WeightedSumLoss'"), SAMPLE.index("\ntest:")
    block = "".join(f"{line[8:]}\n" for line in loss_block("KDLoss", **PLACES, temperature=4.0, alpha=0.1).splitlines())
    text = f"{SAMPLE[:start]}{block}    # the end\n{SAMPLE[end:]}"
    adopted = adopt_yaml(text, "IKL")
    expected = parse(adopt_yaml(SAMPLE, "IKL").text)
    del expected["train"]["criterion"]["kwargs"]["sub_terms"]["kd"]["criterion"]["kwargs"]["reduction"]
    assert parse(adopted.text) == expected
    assert adopted.notes[0].startswith("line 52: KDLoss stands where torchdistill 1.x takes a high-level loss")
    assert "equal those of KDLoss" in check_yaml(adopted, text, "x")[0]
    assert not adopt_yaml(adopted.text, "IKL").changed


def test_a_file_that_was_adopted_half_is_completed():
    text = SAMPLE.replace("'KDLoss'", "'IKLLoss'").replace("alpha: 0.1", "ce_weight: 0.1")
    adopted = adopt_yaml(text, "IKL")
    assert adopted.changed
    assert parse(adopted.text)["train"]["pre_epoch_process"] == "ikl_pre_epoch_process"
    assert parse(adopted.text)["dependencies"] == ["ikl_plugins.torchdistill"]
    assert criterion_of(adopted.text) == criterion_of(text)


def test_another_loss_of_ours_stays_and_the_notes_say_so():
    adopted = adopt_yaml(adopt_yaml(SAMPLE, "IKL").text, "GKL")
    assert not adopted.changed
    assert adopted.notes == [
        "line 59: IKLLoss stays, as --loss GKL replaces losses of torchdistill alone; change its `key` by hand"
    ]


# --- refusals --------------------------------------------------------------------------------------------------------

REFUSED = {
    "label smoothing": (
        SAMPLE.replace("alpha: 0.1\n", "alpha: 0.1\n              label_smoothing: 0.1\n"),
        r"a\.yaml, line 65: `kwargs` of KDLoss must be its own .*got `label_smoothing`.*Give the labels a term",
    ),
    "no temperature": (
        SAMPLE.replace("              temperature: 4.0   # soft\n", ""),
        r"line 58: `kwargs` of KDLoss must have `temperature`, got none\. Add it",
    ),
    "no module path": (
        SAMPLE.replace("              student_module_path: '.'\n", ""),
        r"line 58: `kwargs` of KDLoss must have `student_module_path`, got none",
    ),
    "neither alpha nor beta": (
        SAMPLE.replace("              alpha: 0.1\n              beta: 0.9  # of KL\n", ""),
        r"line 63: KDLoss must have `alpha` or `beta` beside its temperature, got neither",
    ),
    "alpha above 1": (
        SAMPLE.replace("alpha: 0.1\n              beta: 0.9  # of KL", "alpha: 1.5"),
        r"line 64: `alpha` must be at most 1 where there is no `beta`, which is 1 - alpha, got 1\.5",
    ),
    "negative": (SAMPLE.replace("beta: 0.9", "beta: -1"), r"line 65: `beta` must be at least 0 to be mapped, got -1"),
    "temperature 0": (SAMPLE.replace("4.0   #", "0   #"), r"line 63: `temperature` must be above 0 to be "
    r"mapped, got 0"),
    "string number": (
        SAMPLE.replace("alpha: 0.1", "alpha: 1e-1"),
        r"line 64: `alpha` must be a plain number to be mapped, got 1e-1\. YAML takes this for a string: write 0\.1\.",
    ),
    "tag": (
        SAMPLE.replace("alpha: 0.1", "alpha: !import_call {key: 'os.abort'}"),
        r"line 64: `alpha` must be a plain number to be mapped, got !import_call .* Write it out",
    ),
    "not finite": (SAMPLE.replace("alpha: 0.1", "alpha: .nan"), r"line 64: `alpha` must be a plain number .* "
    r"got \.nan"),
    "boolean": (SAMPLE.replace("alpha: 0.1", "alpha: True"), r"line 64: `alpha` must be a plain number .* got True"),
    "reduction none": (
        SAMPLE.replace("'batchmean'", "'none'"),
        r"line 66: `reduction` must be 'batchmean', 'sum' or 'mean', got 'none'",
    ),
    "mean without classes": (
        SAMPLE.replace("'batchmean'", "'mean'").replace("num_classes: 1000", "depth: 18"),
        r"line 66: `reduction` of KDLoss must be .*number of classes is unknown.* --set num_classes=100",
    ),
    "a wrapper around KDLoss": (
        SAMPLE.replace("          weight: 1.0", f"{WRAPPER}          weight: 1.0"),
        r"line 67: KDLoss must stand without a `criterion_wrapper`",
    ),
    "no kwargs": (with_loss("            key: 'KDLoss'\n"), r"line 57: KDLoss must have a mapping `kwargs`, got none"),
    "kwargs a list": (
        with_loss("            key: 'KDLoss'\n            kwargs: [1]\n"),
        r"line 58: KDLoss must have a mapping `kwargs`, got none",
    ),
    "another key": (
        SAMPLE.replace("            kwargs:\n              student", "            args: []\n            "
        "kwargs:\n              student"),
        r"line 58: KDLoss must have `key` and `kwargs` alone, got `args`",
    ),
    "import_call": (
        with_loss("").replace("          criterion:\n", "          criterion: !import_call\n            key: "
        "'torchdistill.losses.mid_level.KDLoss'\n"),
        r"line 56: `criterion` of the term 'kd' must name its loss by `key` and `kwargs`, got an `!import_call`",
    ),
    "old form": (
        SAMPLE.replace("    key: 'WeightedSumLoss'\n    kwargs:", "    type: 'GeneralizedCustomLoss'\n    params:"),
        r"line 52: `train: criterion:` must have the form of torchdistill 1\.x.* got `type` of an older form",
    ),
    "no kd": (
        SAMPLE.replace("'KDLoss'", "'SPKDLoss'"),
        r"line 51: the criterion must have a term with one of KDLoss, .* got SPKDLoss \(line 57\)",
    ),
    "no terms": (
        SAMPLE.replace("      sub_terms:\n", "      no_terms:\n"), r"line 51: the criterion must have a term .* "
        r"got none that is",
    ),
    "no train": ("models: {}\n", r"a\.yaml: the block `train:` must be a mapping, got none"),
    "no criterion": ("train: {}\n", r"a\.yaml: the block `train: criterion:` must be a mapping, got none"),
    "stage is a number": ("train: {stage1: 3}\n", r"line 1: the block `train: stage1:` must be a mapping, got "
    r"something"),
    "no yaml": (SAMPLE + "a: [\n", r"a\.yaml, line \d+: the file must be YAML of one document, but "),
    "two documents": (SAMPLE + "---\na: 1\n", r"a\.yaml, line \d+: the file must be YAML of one document, but "
    r".*another document"),
    "a list": ("- 1\n", r"a\.yaml: the file must hold a mapping, got nothing of the kind"),
    "empty": ("", r"a\.yaml: the file must hold a mapping"),
    "unknown anchor": (SAMPLE.replace("*root_dir", "*nowhere"), r"line 9: .*undefined alias"),
    "shared kwargs": (
        TWO_STAGES.replace("weight: *T", "weight: 1.0").replace("key: KDLoss", "key: PKTLoss"),
        r"line 51: the kwargs of KDLoss in line \d+ must be used by losses that are adopted alone, got "
        r"`train: stage3: criterion: kwargs: sub_terms: other: criterion`",
    ),
    "shared key": (
        SAMPLE.replace("'KDLoss'", "&key 'KDLoss'") + "_name: 1\nname: !join [*key, '.pt']\n",
        r"the anchor of `key: 'KDLoss'` in line 57 must be used by losses .*got `name: 0`",
    ),
    "an anchor that goes": (
        SAMPLE.replace("beta: 0.9", "beta: &b 0.9") + "mine: *b\n",
        r"line \d+: `\*b` must not depend on `beta` of line 65, which is mapped .* got `mine`",
    ),
    "a merged weight": (
        SAMPLE.replace("              alpha: 0.1\n", "              <<: *w\n").replace(
            "train:\n", "train:\n  _w: &w {alpha: 0.1}\n", 1
        ),
        r"line 59: `alpha` of KDLoss must stand in its own `kwargs` to be changed, got a value that is merged "
        r"from line",
    ),
    "dependencies of another kind": ("dependencies: {a: 1}\n" + SAMPLE, r"line 1: `dependencies` must be a list "
    r"of names"),
    "plain in flow": (
        SAMPLE[: SAMPLE.index("  criterion:")] + "  criterion: {key: 'KDLoss', kwargs: {temperature: 1}}\n",
        r"line 51: `criterion:` with KDLoss must be a block of `key` and `kwargs`",
    ),
    "plain with more": (
        SAMPLE[: SAMPLE.index("  criterion:")] + "  criterion:\n    key: KDLoss\n    func2extract_model_loss: x\n",
        r"line 53: `criterion:` with KDLoss must be a block of `key` and `kwargs`",
    ),
    "KL of probabilities": (
        kl_sample(reduction="'batchmean'"),
        r"line 72: `target` must lead to logits.* got the output of 'probs', the "
        r"probabilities.*--teacher-logits probs:input",
    ),
    "KL without wrapper": (kl_sample("", reduction="'sum'"), r"line 62: KLDivLoss of the term 'kd' must stand "
    r"in a Simple"),
    "KL in another wrapper": (
        kl_sample(WRAPPER.replace("Simple", "Dict"), reduction="'sum'"),
        r"line 65: `criterion_wrapper` of KLDivLoss must be a SimpleLossWrapper to be mapped, got 'DictLossWrapper'",
    ),
    "KL to labels": (
        kl_sample(WRAPPER[: WRAPPER.index("                is_from_teacher: True")] + "                "
        "uses_label: True\n",
                  reduction="'sum'"),
        r"line 72: `target` of KLDivLoss must come from the teacher to be mapped, got the labels",
    ),
    "KL the other way": (
        kl_sample(WRAPPER.replace("True", "x").replace("False", "True").replace("x", "False"), reduction="'sum'"),
        r"line 69: `input` of KLDivLoss must come from the student to be mapped, got is_from_teacher: True",
    ),
    "KL without hook": (
        kl_sample(log_target="True").replace("      output: ['probs', 'fc']\n", ""),
        r"the output of the teacher's module 'probs' must be recorded, got no hook\. Add to `train: teacher:` the key",
    ),
    "KL with another hook": (
        kl_sample(log_target="True").replace("'log_probs', 'fc'", "'fc'"),
        r"the output of the student's module 'log_probs' must be recorded, got hooks for \['fc'\]",
    ),
    "KL with a keyword": (
        kl_sample(size_average="True"), r"line 64: `kwargs` of KLDivLoss must be among reduction, log_target, "
        r"got `size_",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_mapped_is_refused_by_line_and_key(case):
    text, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        adopt_yaml(text, "IKL", name="a.yaml")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"settings": {"beat": 1}}, ValueError, r"adopt: unknown keyword of IKLLoss `beat`\. Did you mean `beta`\?"),
        ({"settings": {"gamma": 1}}, ValueError, r"adopt: unknown keyword of IKLLoss `gamma`"),
        (
            {"settings": {"beta": -1}},
            ValueError,
            r"a\.yaml, line 57: for the new loss: .*`beta` must be a finite number of",
        ),
        ({"settings": {"beta": "x"}}, TypeError, r"a\.yaml, line 57: for the new loss: .*`beta` must be"),
        (
            {"settings": {"ce_weight": -1}},
            ValueError,
            r"for the new loss: IKLLoss: `ce_weight` must be a finite number of",
        ),
        ({"teacher_logits": "fc"}, ValueError, r"--teacher-logits goes with a KLDivLoss in a SimpleLossWrapper"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        adopt_yaml(SAMPLE, "IKL", name="a.yaml", **options)


def test_a_class_prior_needs_the_number_of_classes():
    text = SAMPLE.replace("      num_classes: 1000\n    _exp", "      depth: 18\n    _exp")
    with pytest.raises(
        ValueError, match=r"`num_classes` must be given with global_info=True.* Add --set num_classes=100"
    ):
        adopt_yaml(text, "IKL", settings={"global_info": True})


@pytest.mark.parametrize("place", [":input", "fc:outputs"])
def test_a_place_of_logits_must_be_one(place):
    with pytest.raises(ValueError, match=r"--teacher-logits must be MODULE or MODULE:input, got "):
        adopt_yaml(kl_sample(reduction="'sum'"), "IKL", teacher_logits=place)


def test_the_check_names_what_torchdistill_cannot_build():
    text = SAMPLE.replace(
        "        kd:\n",
        "        x:\n          criterion: {key: Nowhere, kwargs: {}}\n          weight: 1\n        kd:\n",
    )
    with pytest.raises(
        ValueError, match=r"adopt: x: `train: criterion:` must build, but ValueError: No loss `Nowhere`"
    ):
        check_yaml(adopt_yaml(text, "IKL"), text, "x")


def test_no_tag_of_the_file_runs(tmp_path):
    trace = tmp_path / "trace"
    text = SAMPLE.replace(
        "'torchvision.datasets.ImageFolder'\n    init:", f"'pathlib.Path.touch'\n    x: {trace}\n    init:"
    )
    text = text.replace(
        "  log_freq: 1000", f"  log_freq: !import_call {{key: 'os.mkdir', init: {{args: ['{trace}']}}}}"
    )
    adopted = adopt_yaml(text, "IKL")
    check_yaml(adopted, text, "x")
    assert not trace.exists()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_comments_and_blank_lines_anywhere_stay(data):
    """Whatever a user has written around the loss is there afterwards, and the meaning is the same."""
    lines = []
    comments = []
    for number, line in enumerate(SAMPLE.splitlines()):
        if data.draw(st.booleans()) and data.draw(st.booleans()):
            margin = " " * data.draw(st.integers(0, 16))
            comments.append(f"# above {number}")
            lines.append(f"{margin}{comments[-1]}")
        if line and "#" not in line and data.draw(st.booleans()) and data.draw(st.booleans()):
            comments.append(f"# beside {number}")
            line = f"{line}{' ' * data.draw(st.integers(1, 3))}{comments[-1]}"
        lines.append(line)
        if data.draw(st.integers(0, 9)) == 0:
            lines.append(" " * data.draw(st.integers(0, 8)))
    text = "\n".join(lines) + data.draw(st.sampled_from(["", "\n", "\n\n# the end\n"]))
    adopted = adopt_yaml(text, "IKL")
    assert parse(adopted.text) == parse(adopt_yaml(SAMPLE, "IKL").text)
    assert [comment for comment in comments if comment not in adopted.text] == []
    gone = [line[2:] for line in difflib.ndiff(text.splitlines(), adopted.text.splitlines()) if line[0] == "-"]
    assert all(re.match(r" *(key: 'KDLoss'|alpha: 0\.1|beta: 0\.9)", line) for line in gone)
    assert len(gone) == 3
    assert not adopt_yaml(adopted.text, "IKL").changed


# --- shipped configs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "configs" / "torchdistill").rglob("*kd.yaml")),
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
@pytest.mark.parametrize("loss", ["DKL", "IKL", "GKL"])
def test_the_shipped_kd_configs_are_adopted(path, loss):
    text = path.read_text()
    adopted = adopt_yaml(text, loss, settings={} if loss == "DKL" else {"global_info": True})
    assert "equal those of KDLoss" in check_yaml(adopted, text, "x")[0] or loss != "DKL"
    assert not adopt_yaml(adopted.text, loss).changed


def test_an_adopted_config_trains_as_the_shipped_dkl_one():
    """digits/dkl.yaml was written by hand to be the same objective as digits/kd.yaml."""
    adopted = criterion_of(adopt_yaml((DIGITS / "kd.yaml").read_text(), "DKL").text)["kd"]["criterion"]["kwargs"]
    (shipped,) = criterion_of((DIGITS / "dkl.yaml").read_text()).values()
    assert adopted.pop("reduction") == "batchmean"  # the default
    assert adopted == shipped["criterion"]["kwargs"]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def kd(tmp_path):
    path = tmp_path / "kd.yaml"
    path.write_text(SAMPLE)
    return path


def adopt_main(capsys, *arguments):
    """Standard output, standard error and exit status of the command, run in this process."""
    status = None
    try:
        adopt.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return out, err, status


def test_without_an_output_the_difference_is_shown_and_nothing_written(kd, capsys):
    out, err, status = adopt_main(capsys, kd)
    assert status is None
    assert out.startswith(f"--- {kd}\n+++ {kd}\n@@")
    assert "+            key: 'IKLLoss'\n" in out
    assert err.endswith("nothing written; give --output FILE\n")
    assert kd.read_text() == SAMPLE
    assert [path.name for path in kd.parent.iterdir()] == ["kd.yaml"]


def test_the_difference_is_a_patch(kd, capsys):
    new = adopt_yaml(SAMPLE, "GKL").text
    out, _, _ = adopt_main(capsys, kd, "--loss", "GKL")
    kept = [line[1:] for line in out.splitlines()[2:] if line[:1] in " +"]
    assert all(line in new.splitlines() for line in kept)
    patch = subprocess.run(["patch", "-s", "-o", "-", str(kd)], input=out, capture_output=True, text=True)
    assert patch.stdout == new


@pytest.mark.parametrize("how", [("--output", "new/ikl.yaml"), ("--in-place",)])
def test_output_is_written_whole(kd, capsys, how, monkeypatch):
    monkeypatch.chdir(kd.parent)
    _, err, status = adopt_main(capsys, kd, *how, "--check", "--set", "beta=4.0")
    target = kd if how == ("--in-place",) else kd.parent / "new" / "ikl.yaml"
    assert status is None
    assert target.read_bytes() == adopt_yaml(SAMPLE, "IKL", settings={"beta": 4.0}).text.encode()
    assert "checked: train: the term 'kd'" in err
    assert f"written: {how[1] if len(how) > 1 else kd}" in err
    assert not list(kd.parent.rglob("*partial*"))


def test_an_adopted_file_says_so_and_nothing_is_written(kd, capsys):
    adopt_main(capsys, kd, "--in-place")
    before = kd.read_bytes(), kd.stat().st_mtime_ns
    out, err, status = adopt_main(capsys, kd, "--output", kd.parent / "again.yaml")
    assert (out, status) == ("", None)
    assert err == f"{kd} is adopted already: nothing to change, nothing written\n"
    assert (kd.read_bytes(), kd.stat().st_mtime_ns) == before
    assert not (kd.parent / "again.yaml").exists()


def test_what_is_there_is_not_overwritten(kd, capsys):
    other = kd.parent / "other.yaml"
    other.write_text("mine")
    status = adopt_main(capsys, kd, "--output", other)[2]
    assert status == f"error: adopt: --output must not be there yet, got {other}. Use another name, or --force."
    assert other.read_text() == "mine"
    assert adopt_main(capsys, kd, "--output", other, "--force")[2] is None
    assert other.read_text() == adopt_yaml(SAMPLE, "IKL").text
    for force in ((), ("--force",)):
        status = adopt_main(capsys, kd, "--output", kd, *force)[2]
        assert status == f"error: adopt: --output must be another file than the config, got {kd}. Use --in-place."
    assert kd.read_text() == SAMPLE


def test_a_check_that_fails_writes_nothing(kd, capsys):
    kd.write_text(f"dependencies: ['no.such.module']\n{SAMPLE}")
    before = kd.read_text()
    _, _, status = adopt_main(capsys, kd, "--in-place", "--check")
    assert status == "error: No module named 'no'"
    assert kd.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--teacher", "t.py"],
            "error: adopt: --teacher goes with an MMPretrain config (.py), got {kd}. Leave it out.",
        ),
        (
            ["--adversarial"],
            "error: adopt: --adversarial goes with an MMPretrain config (.py), got {kd}. Leave it out.",
        ),
        (
            ["--loss", "KL"],
            "error: adopt: --loss must be DKL, IKL or GKL for torchdistill, got KL. KDLoss is KL itself.",
        ),
        (["--set", "beta"], "error: adopt: --set must be KEY=VALUE, got 'beta'. Write --set beta=4.0."),
        (["--set", "beta=["], "error: adopt: --set beta must have a plain value, got '['. Write beta=4.0."),
        (
            ["--in-place", "--output", "x.yaml"],
            "error: adopt: --in-place must stand without --output, got both. Leave one out.",
        ),
        (["--output", "."], "error: adopt: --output must be a file, got the folder .. Name a file in it."),
    ],
)
def test_options_that_do_not_fit(kd, capsys, arguments, message):
    out, err, status = adopt_main(capsys, kd, *arguments)
    assert status == message.format(kd=kd)
    assert (out, err) == ("", "")
    assert kd.read_text() == SAMPLE


def test_configs_that_are_none(tmp_path, capsys):
    missing = tmp_path / "none.yaml"
    assert adopt_main(capsys, missing)[2] == (
        f"error: adopt: the config must be a file, but there is none at {missing}. Check the path."
    )
    (tmp_path / "a.json").write_text("{}")
    assert "must end in .yaml, .yml (torchdistill) or .py (MMPretrain)" in adopt_main(capsys, tmp_path / "a.json")[2]
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    assert "must be text in UTF-8" in adopt_main(capsys, tmp_path / "a.yaml")[2]


def test_the_command_line(kd):
    done = run("kd.yaml", "--loss", "IKL", "--set", "beta=1e-3", "--output", "ikl.yaml", cwd=kd.parent)
    assert done.returncode == 0, done.stderr
    assert criterion_of((kd.parent / "ikl.yaml").read_text())["kd"]["criterion"]["kwargs"]["beta"] == 0.001
    refused = run("ikl.yaml", "--lo", "IKL", cwd=kd.parent)
    assert refused.returncode == 2  # no abbreviations
    kd.write_text(SAMPLE.replace("alpha: 0.1", "alpha: x"))
    refused = run("kd.yaml", cwd=kd.parent)
    assert refused.returncode == 1
    assert refused.stderr == (
        "error: adopt: kd.yaml, line 64: `alpha` must be a plain number to be mapped, got x. Write it out as a "
        "number.\n"
    )


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_shows_what_the_tool_makes(capsys):
    page = (ROOT / "docs" / "adopt.md").read_text()
    shown = [line for line in re.findall(r"```diff\n(.*?)```", page, re.DOTALL)[1].splitlines() if line[0] in "+-"]
    out, _, _ = adopt_main(capsys, DIGITS / "kd.yaml", "--loss", "IKL")
    assert [line for line in out.splitlines()[2:] if line[0] in "+-"] == shown
    parser_options = set(re.findall(r"`(--[\w-]+)", page))
    assert {"--check", "--set", "--output", "--in-place", "--force", "--eps", "--adversarial"} <= parser_options


def test_the_published_settings_of_the_page_are_taken():
    page = (ROOT / "docs" / "adopt.md").read_text()
    (line,) = re.findall(r"`(--set alpha=1 [^`]*)`", page)
    given = dict(pair.split("=") for pair in re.findall(r"--set (\S+)", line))
    kwargs = criterion_of(adopt_yaml(SAMPLE, "IKL", settings={k: float(v) for k, v in given.items()}).text)
    assert kwargs["kd"]["criterion"]["kwargs"]["warmup_epochs"] == 20

"""`ikl adopt` on torchdistill YAML: what is mapped to what, and that nothing else of a file changes.

The oracles: torchdistill's own losses for gradients, a parse of both texts that knows nothing of the editor for
everything else.
"""

import difflib
import os
import subprocess

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torchdistill", reason="the checks run torchdistill (extra `torchdistill`)")

import torch
from torchdistill.losses.registry import get_mid_level_loss

import ikl_plugins.torchdistill  # noqa: F401  # registers
from ikl_plugins._files import configs_folder
from ikl_plugins.commands.adopt.torchdistill import adopt_yaml
from ikl_plugins.commands.adopt.torchdistill_check import check_yaml

# torch's warning of its own reduction 'mean', of which some configs here have one
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")

CONFIGS = configs_folder() / "torchdistill"
ROLES = ("student", "teacher")

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


PLACES = {f"{role}_module_{part}": value for role in ROLES for part, value in (("path", "."), ("io", "output"))}
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
    """SAMPLE with other lines of the loss."""
    start = SAMPLE.index("            key: 'KDLoss'")
    return SAMPLE[:start] + block + SAMPLE[SAMPLE.index("          weight: 1.0") :]


def loss_block(key, **kwargs):
    lines = "".join(f"              {name}: {value}\n" for name, value in kwargs.items())
    return f"            key: '{key}'\n            kwargs:\n{lines}"


def kd_sample(key="KDLoss", **kwargs):
    return with_loss(loss_block(key, **{name: f"'{value}'" for name, value in PLACES.items()}, **kwargs))


def kl_sample(wrapper=WRAPPER, **kwargs):
    text = with_loss(loss_block("KLDivLoss", **kwargs) + wrapper)
    return text[: text.index("  teacher:\n    forward_proc")] + HOOKS + text[text.index("    adaptations:") :]


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


def terms_of(text, stage=None):
    train = parse(text)["train"]
    return (train if stage is None else train[stage])["criterion"]["kwargs"]["sub_terms"]


def loss_of(text):
    return terms_of(text)["kd"]["criterion"]


def differences(old, new):
    """The lines that are gone, and those that are new."""
    lines = list(difflib.ndiff(old.splitlines(), new.splitlines()))
    return [[line[2:] for line in lines if line[0] == sign] for sign in "-+"]


def gradients(criterion, logits, **changes):
    loss = get_mid_level_loss({"key": criterion["key"], "kwargs": criterion["kwargs"] | changes})
    student, teacher = (logits[role].clone().requires_grad_() for role in ROLES)
    value = loss({".": {"output": student}}, {".": {"output": teacher}}, logits["labels"])
    return torch.autograd.grad(value, (student, teacher))


@pytest.fixture
def logits():
    made = {role: torch.randn(6, 1000, dtype=torch.float64) * 3 for role in ROLES}
    return {**made, "labels": torch.randint(1000, (6,))}


# --- the text --------------------------------------------------------------------------------------------------------


def test_the_file_of_kd_becomes_exactly_this_one():
    adopted = adopt_yaml(SAMPLE, "IKL").text
    removed, added = differences(SAMPLE, adopted)
    assert [line.strip() for line in removed] == ["key: 'KDLoss'", "alpha: 0.1", "beta: 0.9  # of KL"]
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
    lines = adopted.splitlines()
    assert lines[0].startswith("# a student")
    assert lines[1] == "dependencies: ['ikl_plugins.torchdistill']"
    assert lines[lines.index("  # what is minimised") - 1] == "  pre_epoch_process: 'ikl_pre_epoch_process'"


@pytest.mark.parametrize("loss", ["DKL", "IKL", "GKL"])
def test_all_that_is_not_the_loss_parses_as_before_and_a_second_time_changes_nothing(loss):
    adopted = adopt_yaml(SAMPLE, loss)
    new, old = parse(adopted.text), parse(SAMPLE)
    assert new.pop("dependencies") == ["ikl_plugins.torchdistill"]
    assert new["train"].pop("pre_epoch_process") == "ikl_pre_epoch_process"
    for config in (old, new):
        config["train"]["criterion"]["kwargs"]["sub_terms"]["kd"]["criterion"] = None
    assert new == old
    assert adopted.changed
    again = adopt_yaml(adopted.text, loss)
    assert (again.text, again.changed) == (adopted.text, False)


def test_line_ends_stay():
    new = adopt_yaml(SAMPLE, "IKL").text
    assert adopt_yaml(SAMPLE.replace("\n", "\r\n"), "IKL").text == new.replace("\n", "\r\n")
    end = new.index("\ntest:\n")
    short = adopt_yaml(SAMPLE[: SAMPLE.index("\ntest:\n")].rstrip("\n"), "IKL").text
    assert short == new[:end].rstrip("\n")


@pytest.mark.parametrize("style", ["kwargs", "criterion", "term"])
def test_flow_style_stays_flow_style(style):
    places = ", ".join(f"{name}: '{value}'" for name, value in PLACES.items())
    inner = f"{{{places}, temperature: 4.0, alpha: 0.1}}"
    text = with_loss(f'            key: "KDLoss"\n            kwargs: {inner}  # all of it\n')
    if style != "kwargs":
        flow = f"          criterion: {{key: KDLoss, kwargs: {inner}}}\n"
        text = with_loss("").replace("          criterion:\n", flow)
    if style == "term":
        start, end = text.index("        kd:\n"), text.index("\ntest:")
        text = f"{text[:start]}        kd: {{criterion: {{key: KDLoss, kwargs: {inner}}}, weight: 1.0}}\n{text[end:]}"
    adopted = adopt_yaml(text, "IKL").text
    assert "# new" not in adopted
    assert len(adopted.splitlines()) == len(text.splitlines()) + 2
    expected = {"temperature": 4.0, "ce_weight": 0.1, "alpha": 14.4, "beta": 0.9, "weight_temperature": 4.0}
    assert loss_of(adopted) == {"key": "IKLLoss", "kwargs": PLACES | expected}
    assert not adopt_yaml(adopted, "IKL").changed


OURS = "ikl_plugins.torchdistill"
DEPENDENCIES = [
    ("", f"dependencies: ['{OURS}']\n"),
    ("dependencies:\n", f"dependencies: ['{OURS}']\n"),
    ("dependencies:  # none yet\n", f"dependencies: ['{OURS}']  # none yet\n"),
    ("dependencies: 'mine'  # m\n", f"dependencies: ['mine', '{OURS}']  # m\n"),
    ("dependencies: []\n", f"dependencies: ['{OURS}']\n"),
    ("dependencies: ['mine']\n", f"dependencies: ['mine', '{OURS}']\n"),
    ("dependencies: ['mine',]\n", f"dependencies: ['mine', '{OURS}']\n"),
    ("dependencies:\n- mine  # m\n", f"dependencies:\n- mine  # m\n- '{OURS}'\n"),
    ("dependencies:\n  - name: 'mine'\n  # end\n", f"dependencies:\n  - name: 'mine'\n  - '{OURS}'\n  # end\n"),
    *[(f"dependencies: {ours}\n",) * 2 for ours in (f"'{OURS}'", f"[{{name: {OURS}}}]", f"[[{OURS}]]", f"[a, {OURS}]")],
]


@pytest.mark.parametrize(("before", "after"), DEPENDENCIES)
def test_the_dependency_joins_those_that_are_there(before, after):
    head, rest = SAMPLE.split("\n", 1)
    text = adopt_yaml(f"{head}\n{before}{rest}", "IKL").text
    assert text.startswith(f"{head}\n{after}datasets:")
    assert not adopt_yaml(text, "IKL").changed


def test_the_dependency_stands_behind_the_mark_of_a_document():
    text = adopt_yaml(f"%YAML 1.1\n---\n{SAMPLE}", "IKL").text
    assert text.split("\n")[3] == "dependencies: ['ikl_plugins.torchdistill']"


@pytest.mark.parametrize("held", ["", " 'default_pre_epoch_process_with_teacher'", "  # none"])
def test_a_default_pre_epoch_process_is_replaced(held):
    adopted = adopt_yaml(SAMPLE.replace("  # what is", f"  pre_epoch_process:{held}\n  # what is"), "IKL")
    assert parse(adopted.text)["train"]["pre_epoch_process"] == "ikl_pre_epoch_process"
    assert adopted.text.count("pre_epoch_process:") == 1
    assert ("# none" in adopted.text) == ("# none" in held)


MY_PROCESS = SAMPLE.replace("  # what is", "  pre_epoch_process: 'mine'\n  # what is")


def test_a_process_of_the_users_stays_unless_the_epoch_is_needed():
    adopted = adopt_yaml(MY_PROCESS, "IKL")
    assert parse(adopted.text)["train"]["pre_epoch_process"] == "mine"
    assert any("line 50: your pre_epoch_process 'mine' stays" in note for note in adopted.notes)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_comments_and_blank_lines_anywhere_stay(data):
    """Whatever a user has written around the loss is there afterwards, and the meaning is the same."""
    lines, comments = [], []
    rarely = st.integers(0, 3).map(lambda number: number == 0)
    for number, line in enumerate(SAMPLE.splitlines()):
        if data.draw(rarely):
            comments.append(f"# above {number}")
            lines.append(f"{' ' * data.draw(st.integers(0, 16))}{comments[-1]}")
        if line and "#" not in line and data.draw(rarely):
            comments.append(f"# beside {number}")
            line = f"{line}{' ' * data.draw(st.integers(1, 3))}{comments[-1]}"
        lines.append(line)
        if data.draw(rarely):
            lines.append(" " * data.draw(st.integers(0, 8)))
    text = "\n".join(lines) + data.draw(st.sampled_from(["", "\n", "\n\n# the end\n"]))
    adopted = adopt_yaml(text, "IKL").text
    assert parse(adopted) == parse(adopt_yaml(SAMPLE, "IKL").text)
    assert [comment for comment in comments if comment not in adopted] == []
    gone, _ = differences(text, adopted)
    assert [line.split("#")[0].strip() for line in gone] == ["key: 'KDLoss'", "alpha: 0.1", "beta: 0.9"]
    assert not adopt_yaml(adopted, "IKL").changed


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
@pytest.mark.parametrize("loss", ["DKL", "IKL", "GKL"])
def test_gradients_of_kdloss(kwargs, loss, logits):
    text = kd_sample(**kwargs)
    adopted = adopt_yaml(text, loss)
    new, old = loss_of(adopted.text), loss_of(text)
    assert (old["key"], new["key"]) == ("KDLoss", f"{loss}Loss")
    expected = gradients(old, logits)
    whole = gradients(new, logits)
    torch.testing.assert_close(whole[1], expected[1], rtol=1e-9, atol=1e-15)
    if loss == "DKL":
        torch.testing.assert_close(whole[0], expected[0], rtol=1e-9, atol=1e-15)
    else:  # the term of beta drives the teacher as KL does, and the student the other way
        without = gradients(new, logits, beta=0.0)
        torch.testing.assert_close(without[0], expected[0], rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(whole[0] - without[0], -whole[1], rtol=1e-7, atol=1e-13)
    claim = "gradients" if loss == "DKL" else "gradients with beta 0"
    assert f"{claim} equal those of KDLoss" in check_yaml(adopted, text, "x")[0]


def test_the_check_notices_a_wrong_mapping():
    adopted = adopt_yaml(SAMPLE, "DKL")
    wrong = adopted._replace(text=adopted.text.replace("alpha: 14.4", "alpha: 0.9"))
    with pytest.raises(ValueError, match=r"x: gradients of the term 'kd' must equal those of KDLoss"):
        check_yaml(wrong, SAMPLE, "x")


def test_logit_standardisation_has_no_equivalent_and_says_so():
    text = kd_sample("LogitStdKDLoss", temperature=2.0, eps="1.0e-7", alpha=0.5, beta=9)
    adopted = adopt_yaml(text, "IKL")
    expected = {"ce_weight": 0.5, "alpha": 36.0, "beta": 9.0, "temperature": 2.0, "weight_temperature": 2.0}
    assert loss_of(adopted.text)["kwargs"] == PLACES | expected
    assert any("no equivalence holds: LogitStdKDLoss" in note for note in adopted.notes)
    (line,) = check_yaml(adopted, text, "x")
    assert "finite" in line
    assert "equal" not in line


@pytest.mark.parametrize("log_target", ["True", None])
@pytest.mark.parametrize("reduction", ["'batchmean'", "'sum'", "'mean'", None])
@pytest.mark.parametrize("loss", ["DKL", "IKL"])
def test_kl_in_a_simple_loss_wrapper(log_target, reduction, loss, logits):
    given = {"reduction": reduction, "log_target": log_target}
    text = kl_sample(**{name: value for name, value in given.items() if value is not None})
    adopted = adopt_yaml(text, loss, teacher_logits=None if log_target else "probs:input")
    term = terms_of(adopted.text)["kd"]
    assert set(term) == {"criterion", "weight"}
    kwargs = term["criterion"]["kwargs"]
    assert [kwargs[name] for name in PLACES] == ["log_probs", "output", "probs", "output" if log_target else "input"]
    student, teacher = (logits[role].clone().requires_grad_() for role in ROLES)
    options = {} if reduction is None else {"reduction": reduction.strip("'")}
    kl = torch.nn.KLDivLoss(**options, log_target=log_target is not None)
    target = torch.log_softmax(teacher, 1) if log_target else torch.softmax(teacher, 1)
    expected = torch.autograd.grad(kl(torch.log_softmax(student, 1), target), (student, teacher))

    ours = get_mid_level_loss({"key": f"{loss}Loss", "kwargs": kwargs | ({} if loss == "DKL" else {"beta": 0.0})})
    outputs = {"log_probs": {"output": torch.log_softmax(student, 1)}}
    teacher_output = torch.log_softmax(teacher, 1) if log_target else teacher
    value = ours(outputs, {"probs": {kwargs["teacher_module_io"]: teacher_output}}, logits["labels"])
    found = torch.autograd.grad(value, (student, teacher), materialize_grads=True)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-15)
    if loss == "DKL":
        torch.testing.assert_close(found[1], expected[1], rtol=1e-9, atol=1e-15)
    assert "equal those of KLDivLoss" in check_yaml(adopted, text, "x")[0]
    assert not adopt_yaml(adopted.text, loss).changed


def test_the_students_logits_of_a_kl_can_be_named():
    text = kl_sample(reduction="'batchmean'")
    adopted = adopt_yaml(text, "IKL", student_logits="fc", teacher_logits="fc")
    assert [loss_of(adopted.text)["kwargs"][name] for name in PLACES] == ["fc", "output"] * 2


def test_settings_replace_what_follows_from_the_file():
    settings = {"ce_weight": 1.0, "alpha": 2.0, "beta": 1e-05, "gamma": 0.2, "temperature": 1.0}
    settings |= {"weight_temperature": 100.0, "global_info": True, "warmup_epochs": 20}
    adopted = adopt_yaml(SAMPLE, "GKL", settings=settings)
    expected = PLACES | settings | {"num_classes": 1000, "reduction": "batchmean"}
    assert loss_of(adopted.text)["kwargs"] == expected
    assert "beta: 1.0e-05" in adopted.text
    assert "temperature: 1.0   # soft" in adopted.text
    assert any("--set gives ce_weight, alpha, temperature, warmup_epochs" in note for note in adopted.notes)
    assert "equal" not in check_yaml(adopted, SAMPLE, "x")[0]
    assert not adopt_yaml(adopted.text, "GKL", settings=settings).changed


def test_the_number_of_classes_is_found_where_glue_has_it():
    old = "    kwargs:\n      num_classes: 1000\n    _exp"
    text = SAMPLE.replace(old, "    config_kwargs:\n      num_labels: 2\n    _exp")
    adopted = adopt_yaml(text, "IKL", settings={"global_info": True})
    assert loss_of(adopted.text)["kwargs"]["num_classes"] == 2


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
    assert config["stage1"] == parse(TWO_STAGES)["train"]["stage1"]
    for stage, name, weight in (("stage2", "kd", 2.0), ("stage3", "other", 4.0)):
        assert config[stage]["pre_epoch_process"] == "ikl_pre_epoch_process"
        term = terms_of(adopted.text, stage)[name]
        kwargs = term["criterion"]["kwargs"]
        assert (term["weight"], term["criterion"]["key"]) == (weight, "IKLLoss")
        assert (kwargs["ce_weight"], kwargs["alpha"]) == (0.5, 8.0)
    assert all(line in adopted.text for line in ("kwargs: &kd", "kwargs: *kd", "ce_weight: &a 0.5"))
    lines = check_yaml(adopted, TWO_STAGES, "x")
    assert len(lines) == 3
    assert lines[0] == "train: stage1: the term 'hint' was built, not run"
    assert all("equal those of KDLoss" in line for line in lines[1:])
    assert not adopt_yaml(adopted.text, "IKL").changed


def test_a_whole_criterion_may_be_shared():
    text = TWO_STAGES[: TWO_STAGES.index("  stage3:")].replace("criterion:  # of", "criterion: &whole  # of")
    text += "  stage3:\n    num_epochs: 1\n    criterion: *whole\n"
    adopted = adopt_yaml(text, "IKL")
    assert terms_of(adopted.text, "stage3") == terms_of(adopted.text, "stage2")
    assert terms_of(adopted.text, "stage3")["kd"]["criterion"]["key"] == "IKLLoss"
    assert parse(adopted.text)["train"]["stage3"]["pre_epoch_process"] == "ikl_pre_epoch_process"
    assert len(check_yaml(adopted, text, "x")) == 3


SHARED_LOSS = TWO_STAGES.replace("criterion:\n              key: 'KD", "criterion: &loss\n              key: 'KD")


def test_terms_beside_the_kd_stay_as_they_are():
    wrapper = "{input: {is_from_teacher: False, module_path: '.', io: 'output'}, target: {uses_label: True}}"
    other = f"""\
        ce:
          criterion: {{key: 'CrossEntropyLoss', kwargs: {{label_smoothing: 0.1}}}}
          criterion_wrapper: {{key: 'SimpleLossWrapper', kwargs: {wrapper}}}
          weight: 0.3
"""
    text = SAMPLE.replace("        kd:\n", f"{other}        kd:\n")
    adopted = adopt_yaml(text, "IKL")
    assert other in adopted.text
    assert "train: the term 'ce' was built, not run" in check_yaml(adopted, text, "x")


def test_values_given_by_an_alias_stay_aliases():
    text = SAMPLE.replace("temperature: 4.0   # soft", "temperature: *T").replace("alpha: 0.1", "alpha: *a")
    text = text.replace("  num_epochs: 20\n", "  num_epochs: 20\n  _T: &T 4.0\n  _a: &a 0.1\n")
    adopted = adopt_yaml(text, "IKL").text
    assert "temperature: *T" in adopted
    assert "ce_weight: *a  # cross" in adopted
    assert loss_of(adopted)["kwargs"]["alpha"] == 14.4


def test_module_paths_may_be_merged_in():
    paths = "".join(f"    {name}: '{value}'\n" for name, value in PLACES.items())
    text = with_loss(loss_block("KDLoss", **{"<<": "*paths", "temperature": 4.0, "alpha": 0.1}))
    adopted = adopt_yaml(text.replace("train:\n", f"train:\n  _paths: &paths\n{paths}", 1), "IKL").text
    expected = {"temperature": 4.0, "ce_weight": 0.1, "alpha": 14.4, "beta": 0.9, "weight_temperature": 4.0}
    assert loss_of(adopted)["kwargs"] == PLACES | expected
    assert "<<: *paths" in adopted


def test_a_plain_criterion_becomes_a_term_of_a_weighted_sum():
    start, end = SAMPLE.index("    key: 'WeightedSumLoss'"), SAMPLE.index("\ntest:")
    block = loss_block("KDLoss", **PLACES, temperature=4.0, alpha=0.1)
    block = "".join(f"{line[8:]}\n" for line in block.splitlines())
    text = f"{SAMPLE[:start]}{block}    # the end\n{SAMPLE[end:]}"
    adopted = adopt_yaml(text, "IKL")
    expected = parse(adopt_yaml(SAMPLE, "IKL").text)
    del expected["train"]["criterion"]["kwargs"]["sub_terms"]["kd"]["criterion"]["kwargs"]["reduction"]
    assert parse(adopted.text) == expected
    assert adopted.notes[0].startswith("line 52: KDLoss becomes the term 'kd'")
    assert "equal those of KDLoss" in check_yaml(adopted, text, "x")[0]
    assert not adopt_yaml(adopted.text, "IKL").changed


def test_a_file_that_was_adopted_half_is_completed():
    text = SAMPLE.replace("'KDLoss'", "'IKLLoss'").replace("alpha: 0.1", "ce_weight: 0.1")
    adopted = adopt_yaml(text, "IKL").text
    assert parse(adopted)["train"]["pre_epoch_process"] == "ikl_pre_epoch_process"
    assert parse(adopted)["dependencies"] == ["ikl_plugins.torchdistill"]
    assert terms_of(adopted) == terms_of(text)


def test_another_loss_of_ours_stays_and_the_notes_say_so():
    adopted = adopt_yaml(adopt_yaml(SAMPLE, "IKL").text, "GKL")
    assert not adopted.changed
    (note,) = adopted.notes
    assert note.startswith("line 59: IKLLoss stays")


# --- refusals: text, options, and the line and words of the error -----------------------------------------------------


def changed(old, new, text=SAMPLE):
    assert old in text
    return text.replace(old, new)


def plain_criterion(block):
    return SAMPLE[: SAMPLE.index("  criterion:")] + block


def kl_to(wrapper):
    return kl_sample(wrapper, reduction="'sum'")


INDENT = " " * 14
BOTH = f"{INDENT}alpha: 0.1\n{INDENT}beta: 0.9  # of KL\n"
CLASSES = "      num_classes: 1000\n    _exp"
TO_LABELS = WRAPPER[: WRAPPER.index("                is_from_teacher: True")] + "                uses_label: True\n"
SWAPPED = WRAPPER.replace("True", "x").replace("False", "True").replace("x", "False")
SHARED_KEY = changed("'KDLoss'", "&key 'KDLoss'") + "_name: 1\nname: !join [*key, '.pt']\n"
FLOW_KD = "  criterion: {key: 'KDLoss', kwargs: {temperature: 1}}\n"
CALLED = "          criterion: !import_call\n            key: 'torchdistill.losses.mid_level.KDLoss'\n"
MERGED = changed("alpha: 0.1", "<<: *w").replace("train:\n", "train:\n  _w: &w {alpha: 0.1}\n", 1)
MORE = changed("            kwargs:\n              stu", "            args: []\n            kwargs:\n              stu")
OLDER = changed("    key: 'WeightedSumLoss'\n    kwargs:", "    type: 'GeneralizedCustomLoss'\n    params:")
NO_HOOK = changed("      output: ['probs', 'fc']\n", "", kl_sample(log_target="True"))
GI = {"settings": {"global_info": True}}
REFUSED = [
    (changed(BOTH, f"{BOTH}{INDENT}label_smoothing: 0.1\n"), {}, "line 66: .*got `label_smoothing`.*CrossEntropyLoss"),
    (changed(f"{INDENT}temperature: 4.0   # soft\n", ""), {}, "line 58: .* must have `temperature`, got none"),
    (changed(f"{INDENT}student_module_path: '.'\n", ""), {}, "line 58: .* must have `student_module_path`"),
    (changed(BOTH, ""), {}, "line 63: KDLoss must have `alpha` or `beta`"),
    (changed(BOTH, f"{INDENT}alpha: 1.5\n"), {}, r"line 64: `alpha` must be at most 1 .*got 1\.5"),
    (changed("beta: 0.9", "beta: -1"), {}, "line 65: `beta` must be at least 0, got -1"),
    (changed("4.0   #", "0   #"), {}, "line 63: `temperature` must be above 0, got 0"),
    (changed("alpha: 0.1", "alpha: 1e-1"), {}, r"line 64: `alpha` must be a plain number, got 1e-1\. .*write 0\.1\."),
    (changed("'batchmean'", "'none'"), {}, "line 66: `reduction` must be 'batchmean', .*got 'none'"),
    (changed("'batchmean'", "'mean'").replace("num_classes: 1000", "d: 1"), {}, "line 66: .*--set num_classes=100"),
    (changed("          weight: 1.0", f"{WRAPPER}          weight: 1.0"), {}, "line 67: .*without a `criterion_wrap"),
    (with_loss("            key: 'KDLoss'\n"), {}, "line 57: KDLoss must have a mapping `kwargs`"),
    (MORE, {}, "line 58: KDLoss must have `key` and `kwargs` alone, got `args`"),
    (with_loss("").replace("          criterion:\n", CALLED), {}, "line 56: the term 'kd' must .*an `!import_call`"),
    (OLDER, {}, "line 52: `train: criterion:` must have `key` and `kwargs`, got the older `type`"),
    (changed("'KDLoss'", "'SPKDLoss'"), {}, r"line 51: .* one of KDLoss, .* got SPKDLoss \(line 57\)"),
    ("models: {}\n", {}, r"a\.yaml: `train:` must be a mapping, got none"),
    ("train: {stage1: 3}\n", {}, "line 1: `train: stage1:` must be a mapping, got something"),
    (SAMPLE + "a: [\n", {}, r"a\.yaml, line \d+: the file must be one YAML document"),
    (SAMPLE + "---\na: 1\n", {}, r"a\.yaml, line \d+: .*another document"),
    ("", {}, r"a\.yaml: the file must hold a mapping"),
    (changed("*root_dir", "*nowhere"), {}, "line 9: .*undefined alias"),
    (f"{SHARED_LOSS}mine: *loss\n", {}, "line 53: the KDLoss of line 32 must be used by losses .* got `mine`"),
    (SHARED_KEY, {}, "`key: 'KDLoss'` of line 57 must be used by losses .*got `name: 0`"),
    (changed("beta: 0.9", "beta: &b 0.9") + "mine: *b\n", {}, r"`\*b` must not depend on `beta` of line 65.* `mine`"),
    (MERGED, {}, "line 59: `alpha` of KDLoss must stand in its own `kwargs` .* merged from line"),
    ("dependencies: {a: 1}\n" + SAMPLE, {}, "line 1: `dependencies` must be a list of names"),
    (plain_criterion(FLOW_KD), {}, "line 51: `criterion:` with KDLoss must be a block"),
    (kl_to(WRAPPER), {}, "line 72: `target` must lead to logits.* output of 'probs'.*-logits probs:input"),
    (kl_to(""), {}, "line 62: KLDivLoss of the term 'kd' must stand in a SimpleLossWrapper"),
    (kl_to(TO_LABELS), {}, "line 72: `target` of KLDivLoss must come from the teacher.*the labels"),
    (kl_to(SWAPPED), {}, "line 69: `input` of KLDivLoss must come from the student.*True"),
    (NO_HOOK, {}, "output of the teacher's module 'probs' .*no hook"),
    (kl_sample(size_average="True"), {}, "line 64: `kwargs` of KLDivLoss must be among reduction, .*got `size_"),
    (kl_to(WRAPPER), {"teacher_logits": ":input"}, "--teacher-logits must be MODULE or MODULE:input"),
    (SAMPLE, {"teacher_logits": "fc"}, "--teacher-logits goes with a KLDivLoss"),
    (SAMPLE, {"settings": {"beat": 1}}, r"unknown keyword of IKLLoss `beat`\. Did you mean `beta`\?"),
    (SAMPLE, {"settings": {"beta": -1}}, r"a\.yaml, line 57: for the new loss: .*`beta` must be"),
    (SAMPLE, {"settings": {"beta": "x"}}, "for the new loss: .*`beta` must be"),
    (SAMPLE, {"settings": {"ce_weight": -1}}, "for the new loss: IKLLoss: `ce_weight` must be"),
    (changed(CLASSES, "      depth: 18\n    _exp"), GI, "`num_classes` must be given .*--set num_classes=100"),
    (MY_PROCESS, GI, "line 50: `pre_epoch_process` must be .*from which global_info must know the epoch, got 'mine'"),
]


@pytest.mark.parametrize(("text", "options", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_what_cannot_be_mapped_is_refused_by_line_and_key(text, options, message):
    with pytest.raises((TypeError, ValueError), match=rf"^ikl adopt: .*{message}"):
        adopt_yaml(text, "IKL", name="a.yaml", **options)


def test_the_check_names_what_torchdistill_cannot_build():
    term = "        x:\n          criterion: {key: Nowhere, kwargs: {}}\n          weight: 1\n        kd:\n"
    text = SAMPLE.replace("        kd:\n", term)
    with pytest.raises(ValueError, match=r"x: `train: criterion:` must build, but ValueError: No loss `Nowhere`"):
        check_yaml(adopt_yaml(text, "IKL"), text, "x")


def test_no_tag_of_the_file_runs(tmp_path):
    trace = tmp_path / "trace"
    touched = f"'pathlib.Path.touch'\n    x: {trace}\n    init:"
    text = changed("'torchvision.datasets.ImageFolder'\n    init:", touched)
    text = text.replace("log_freq: 1000", f"log_freq: !import_call {{key: 'os.mkdir', init: {{args: ['{trace}']}}}}")
    check_yaml(adopt_yaml(text, "IKL"), text, "x")
    assert not trace.exists()


# --- shipped configs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*kd.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_shipped_kd_configs_are_adopted(path):
    text = path.read_text()
    for loss in ("DKL", "GKL"):
        adopted = adopt_yaml(text, loss, settings={} if loss == "DKL" else {"global_info": True})
        assert "equal those of KDLoss" in check_yaml(adopted, text, "x")[0]
        assert not adopt_yaml(adopted.text, loss).changed


def test_an_adopted_config_trains_as_the_shipped_dkl_one():
    """digits/dkl.yaml was written by hand to be the same objective as digits/kd.yaml."""
    adopted = loss_of(adopt_yaml((CONFIGS / "digits" / "kd.yaml").read_text(), "DKL").text)["kwargs"]
    (shipped,) = terms_of((CONFIGS / "digits" / "dkl.yaml").read_text()).values()
    assert adopted.pop("reduction") == "batchmean"  # the default
    assert adopted == shipped["criterion"]["kwargs"]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def kd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "kd.yaml"
    path.write_text(SAMPLE)
    return path


def test_without_an_output_the_difference_is_shown_as_a_patch_and_nothing_written(kd, ikl):
    done = ikl("adopt", kd, "--loss", "GKL")
    assert done.status is None
    assert done.out.startswith(f"--- {kd}\n+++ {kd}\n@@")
    assert done.err.endswith("nothing written; give --output FILE\n")
    assert kd.read_text() == SAMPLE
    assert [path.name for path in kd.parent.iterdir()] == ["kd.yaml"]
    patched = subprocess.run(["patch", "-s", "-o", "-", str(kd)], input=done.out, capture_output=True, text=True)
    assert patched.stdout == adopt_yaml(SAMPLE, "GKL").text


@pytest.mark.parametrize("how", [("--output", "new/ikl.yaml"), ("--in-place",)])
def test_output_is_written_whole(kd, ikl, how):
    done = ikl("adopt", "kd.yaml", *how, "--check", "--set", "beta=1e-3")
    target = kd.parent / how[-1] if "--output" in how else kd
    assert done.status is None
    assert target.read_bytes() == adopt_yaml(SAMPLE, "IKL", settings={"beta": 0.001}).text.encode()
    assert "checked: train: the term 'kd'" in done.err
    assert "written: " in done.err
    assert not list(kd.parent.rglob("*partial*"))


def test_in_place_keeps_links_modes_and_line_ends(kd, ikl):
    real = kd.with_name("shared.yaml")
    kd.rename(real)
    real.write_bytes(real.read_bytes().replace(b"\n", b"\r\n"))
    real.chmod(0o640)
    os.link(real, kd.with_name("hard.yaml"))
    kd.symlink_to("shared.yaml")
    done = ikl("adopt", "kd.yaml", "--in-place")
    assert "kd.yaml had 1 other hard link, which keeps the old text" in done.err
    assert (os.readlink(kd), real.stat().st_mode & 0o777) == ("shared.yaml", 0o640)
    assert real.read_bytes() == adopt_yaml(SAMPLE, "IKL").text.replace("\n", "\r\n").encode()
    assert b"IKL" not in kd.with_name("hard.yaml").read_bytes()


def test_an_adopted_file_says_so_and_nothing_is_written(kd, ikl):
    ikl("adopt", kd, "--in-place")
    before = kd.read_bytes(), kd.stat().st_mtime_ns
    out, err, status = ikl("adopt", kd, "--output", kd.parent / "again.yaml")
    assert (out, status) == ("", None)
    assert err.startswith(f"{kd} is adopted already")
    assert (kd.read_bytes(), kd.stat().st_mtime_ns) == before
    assert not (kd.parent / "again.yaml").exists()


def test_what_is_there_is_overwritten_by_force_alone(kd, ikl):
    other = kd.parent / "other.yaml"
    other.write_text("mine")
    assert f"--output must not be there yet, got {other}" in ikl("adopt", kd, "--output", other).status
    assert other.read_text() == "mine"
    assert ikl("adopt", kd, "--output", other, "--force").status is None
    assert other.read_text() == adopt_yaml(SAMPLE, "IKL").text
    for force in ((), ("--force",)):
        assert "must be another file than the config" in ikl("adopt", kd, "--output", kd, *force).status
    assert kd.read_text() == SAMPLE


def test_a_check_that_fails_writes_nothing(kd, ikl):
    kd.write_text(f"dependencies: ['no.such.module']\n{SAMPLE}")
    before = kd.read_text()
    assert ikl("adopt", kd, "--in-place", "--check").status == "error: No module named 'no'"
    assert kd.read_text() == before


OPTIONS = [
    (["kd.yaml", "--teacher", "t.py"], "--teacher goes with an MMPretrain config (.py), got kd.yaml"),
    (["kd.yaml", "--loss", "KL"], "--loss must be one of ours, got KL"),
    (["kd.yaml", "--set", "beta"], "--set must be KEY=VALUE, got 'beta'"),
    (["kd.yaml", "--in-place", "--output", "x.yaml"], "--in-place must stand without --output"),
    (["kd.yaml", "--output", "."], "--output must be a file, got the folder ."),
    (["none.yaml"], "there is none at none.yaml"),
    (["a.json"], "must end in .yaml, .yml (torchdistill) or .py (MMPretrain), got a.json"),
]


@pytest.mark.parametrize(("words", "message"), OPTIONS, ids=[message for _, message in OPTIONS])
def test_options_that_do_not_fit(kd, ikl, words, message):
    (kd.parent / "a.json").write_text("{}")
    out, err, status = ikl("adopt", *words)
    assert status.startswith("error: ikl adopt: ")
    assert message in status
    assert (out, err) == ("", "")
    assert kd.read_text() == SAMPLE

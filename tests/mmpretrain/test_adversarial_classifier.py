"""AdversarialClassifier against steps written out by hand, with real MMPretrain models and data samples."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmpretrain.models import ImageClassifier
from mmpretrain.structures import DataSample
from torch import nn

import ikl_plugins.mmpretrain  # noqa: F401 - registers what the configs name
from ikl_plugins.mmpretrain import AdversarialClassifier, RobustAccuracy, adversarial

CLASSES = 4
SIZE = 8
EPS = 16 / 255
MEAN, STD = [100.0, 110.0, 120.0], [50.0, 60.0, 70.0]


class TinyBackbone(nn.Module):
    """Two convolutions with batch normalisation: enough for statistics, modes and memory formats."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x):
        x = F.softplus(self.bn1(self.conv1(x)))
        return (F.softplus(self.bn2(self.conv2(x))).mean((2, 3)),)


def head(**changes):
    return {"type": "LinearClsHead", "num_classes": CLASSES, "in_channels": 8, **changes}


def preprocessor(**changes):
    return {"type": "ClsDataPreprocessor", "mean": MEAN, "std": STD, "to_rgb": True, **changes}


def make(seed=0, kind=AdversarialClassifier, **changes):
    torch.manual_seed(seed)
    settings = {
        "backbone": TinyBackbone(),
        "head": head(),
        "data_preprocessor": preprocessor(),
        "attack": {
            "eps": EPS,
            "steps": 3,
            "step_size": EPS / 2,
            "random_start": "normal",
            "objective": "soft_cross_entropy",
        },
        "robust_loss": {"type": "KLLoss", "loss_weight": 6.0},
    } | changes
    if kind is ImageClassifier:
        settings = {key: settings[key] for key in ("backbone", "head", "data_preprocessor")}
    return kind(**settings)


def ikl(**changes):
    return {"type": "IKLLoss", "alpha": 4.0, "beta": 20.0, "weight_temperature": 4.0, "global_info": True, **changes}


def batch(n=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=generator) for _ in range(n)]
    return {"inputs": images, "data_samples": [DataSample().set_gt_label(i % CLASSES) for i in range(n)]}


def prepared(model, data):
    """Inputs in float64, samples and labels, as the model's ``loss`` gets them."""
    data = model.data_preprocessor(copy.deepcopy(data), training=True)
    labels = torch.cat([sample.gt_label for sample in data["data_samples"]])
    return data["inputs"].double(), data["data_samples"], labels


def kl(student, teacher):
    p, q = torch.softmax(teacher, 1), torch.softmax(student, 1)
    return (p * (p.log() - q.log())).sum(1).mean()


def pairwise_mse(student, teacher, weights):
    """1/4 sum_jk w_j w_k ((t_j - t_k) - (s_j - s_k))^2, a mean over samples; the paper's equation 10."""
    total = 0.0
    for s, t, w in zip(student, teacher, weights, strict=True):
        gap = (t[:, None] - t[None, :]) - (s[:, None] - s[None, :])
        total = total + 0.25 * (w[:, None] * w[None, :] * gap**2).sum()
    return total / len(student)


def soft_ce(student, teacher):
    return -(torch.softmax(teacher, 1).detach() * torch.log_softmax(student, 1)).sum(1).mean()


def attack_by_hand(network, inputs, seed, steps=3, eps=EPS, step=EPS / 2, objective=None):
    """PGD as the authors write it, in pixels, with the network in eval mode."""
    mean = torch.tensor(MEAN, dtype=torch.float64).view(3, 1, 1) / 255
    std = torch.tensor(STD, dtype=torch.float64).view(3, 1, 1) / 255
    network = copy.deepcopy(network).eval()
    pixels = inputs * std + mean
    torch.manual_seed(seed)
    adversarial = pixels + 0.001 * torch.randn(pixels.shape, dtype=torch.float64)
    for _ in range(steps):
        adversarial = adversarial.detach().requires_grad_()
        natural = network((pixels - mean) / std).detach()
        logits = network((adversarial - mean) / std)
        value = kl(logits, natural) if objective is None else objective(logits, natural)
        (gradient,) = torch.autograd.grad(value, adversarial)
        adversarial = adversarial.detach() + step * gradient.sign()
        adversarial = torch.min(torch.max(adversarial, pixels - eps), pixels + eps).clamp(0, 1)
    return (adversarial - mean) / std


def network_of(model):
    """The bare network of a copy, from inputs to logits."""
    return nn.Sequential(model.backbone, _First(), model.head.fc)


class _First(nn.Module):
    def forward(self, feats):
        return feats[0]


def total_of(losses):
    return sum(value for name, value in losses.items() if "loss" in name)


def alike(model, network):
    """Gradients and statistics are those of the network trained by hand."""
    for ours, theirs in zip(network_of(model).parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)
    for ours, theirs in zip(network_of(model).buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def observed(labels, logits):
    """What a class prior has collected of a batch, at weight temperature 4."""
    sums = torch.zeros(CLASSES, CLASSES, dtype=torch.float64)
    return sums.index_add_(0, labels, torch.softmax(logits.detach() / 4.0, 1))


def perturb_by_hand(network, loss_of, gamma):
    """AWP, its gradient taken of a copy, so that the statistics stay."""
    proxy = copy.deepcopy(network)
    gradients = torch.autograd.grad(loss_of(proxy), list(proxy.parameters()))
    with torch.no_grad():
        for (name, weight), gradient in zip(network.named_parameters(), gradients, strict=True):
            if weight.dim() >= 2 and "weight" in name:
                weight += gamma * weight.norm() * gradient / gradient.norm()


def step(model, data=None):
    return model.train().train_step(data or batch(), OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.0)))


# --- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("natural_first", [False, True])
def test_a_trades_step_equals_the_one_by_hand(natural_first):
    """The authors' training forward takes the adversarial images first, that of Wang et al. the natural ones."""
    model = make(natural_first=natural_first).double().train()
    inputs, samples, labels = prepared(model, batch())
    network = copy.deepcopy(network_of(model))
    adversarial = attack_by_hand(network, inputs, seed=5)
    if natural_first:
        teacher, student = network(inputs), network(adversarial)
    else:
        student, teacher = network(adversarial), network(inputs)
    expected = F.cross_entropy(teacher, labels) + 6.0 * kl(student, teacher)
    expected.backward()

    torch.manual_seed(5)
    losses = model.loss(inputs, samples)
    total_of(losses).backward()
    torch.testing.assert_close(losses["loss_robust"], 6.0 * kl(student, teacher), rtol=1e-9, atol=1e-12)
    assert losses["adversarial_accuracy"] == pytest.approx(100 * (student.argmax(1) == labels).sum().item() / 6)
    torch.testing.assert_close(total_of(losses), expected, rtol=1e-9, atol=1e-12)
    alike(model, network)


def test_an_ikl_step_with_prior_and_awp_equals_the_one_by_hand():
    model = make(robust_loss=ikl(), awp={"gamma": 5e-3, "warmup_epochs": 2}).double().train()
    prior = torch.rand(CLASSES, CLASSES, generator=torch.Generator().manual_seed(3)).softmax(1)
    model.robust_loss.class_prior.matrix.copy_(prior)
    inputs, samples, labels = prepared(model, batch())
    rows = prior.double()[labels]
    network = copy.deepcopy(network_of(model))
    adversarial = attack_by_hand(network, inputs, seed=5)

    def loss_of(net):
        student, teacher = net(adversarial), net(inputs)
        mse = 20.0 * pairwise_mse(student, teacher, rows)
        return F.cross_entropy(teacher, labels) + mse + 4.0 * soft_ce(student, teacher), mse, teacher

    perturb_by_hand(network, lambda proxy: loss_of(proxy)[0], 5e-3)
    expected, mse, teacher = loss_of(network)
    expected.backward()

    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.begin_epoch(2, 4)
    torch.manual_seed(5)
    losses = model.loss(inputs, samples)
    assert all(parameter.grad is None for parameter in model.parameters())
    total_of(losses).backward()
    torch.testing.assert_close(total_of(losses), expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(losses["weighted_mse"], mse.detach(), rtol=1e-8, atol=1e-10)
    alike(model, network)  # neither attack nor AWP's pass moved the statistics
    model.end_iteration()
    assert all(map(torch.equal, model.parameters(), before))
    # The prior collects the natural predictions of the training pass, of the perturbed weights, and collects once.
    torch.testing.assert_close(model.robust_loss.class_prior.sums, observed(labels, teacher), rtol=1e-8, atol=1e-10)


def test_the_objective_ikl_is_weighed_by_the_class_prior():
    attack = {"eps": EPS, "steps": 3, "step_size": EPS / 2, "random_start": "normal", "objective": "ikl"}
    model = make(robust_loss=ikl(), attack=attack).double().train()
    prior = torch.rand(CLASSES, CLASSES, generator=torch.Generator().manual_seed(3)).mul(6).softmax(1)
    model.robust_loss.class_prior.matrix.copy_(prior)
    inputs, samples, labels = prepared(model, batch())
    network = copy.deepcopy(network_of(model))

    def objective(student, teacher):
        return soft_ce(student, teacher) + pairwise_mse(student, teacher, prior.double()[labels])

    adversarial = attack_by_hand(network, inputs, seed=5, objective=objective)
    expected = 20.0 * pairwise_mse(network(adversarial), network(inputs), prior.double()[labels])
    model.begin_epoch(1, 4)
    torch.manual_seed(5)
    torch.testing.assert_close(model.loss(inputs, samples)["weighted_mse"], expected.detach(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("averaged", [False, True])
def test_two_views_weigh_the_second_and_collect_the_first(averaged):
    """AWP goes up that loss, or as the authors' does up the cross entropy + half of each view's robust loss."""
    views = {"augmented_weight": 0.3, "data_preprocessor": preprocessor(type="TwoViewDataPreprocessor")}
    awp = {"gamma": 0.1, "warmup_epochs": 1}
    model = make(robust_loss=ikl(), awp=awp, awp_averages_views=averaged, **views).double().train()
    inputs, samples, labels = prepared(make(), batch())
    second = prepared(make(), batch(seed=9))[0]
    both = torch.cat([inputs, second])
    network = copy.deepcopy(network_of(model))
    adversarial = attack_by_hand(network, both, seed=5)
    rows = torch.full((6, CLASSES), 1 / CLASSES, dtype=torch.float64)

    def loss_of(net, first, second):
        student, teacher = net(adversarial), net(both)
        robust = [
            20.0 * pairwise_mse(s, t, rows) + 4.0 * soft_ce(s, t)
            for s, t in zip(student.chunk(2), teacher.chunk(2), strict=True)
        ]
        return F.cross_entropy(teacher, labels.repeat(2)) + first * robust[0] + second * robust[1], teacher

    perturb_by_hand(network, lambda proxy: loss_of(proxy, *((0.5, 0.5) if averaged else (1.0, 0.3)))[0], 0.1)
    expected, teacher = loss_of(network, 1.0, 0.3)
    expected.backward()

    model.begin_epoch(1, 4)
    torch.manual_seed(5)
    losses = model.loss([inputs, second], samples)
    total_of(losses).backward()
    torch.testing.assert_close(total_of(losses), expected, rtol=1e-8, atol=1e-10)
    alike(model, network)
    torch.testing.assert_close(model.robust_loss.class_prior.sums, observed(labels, teacher[:6]), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "settings",
    [{}, {"to_rgb": False}, {"mean": None, "std": None}, {"mean": [0.0] * 3, "std": [255.0] * 3}],
    ids=["normalised", "bgr", "raw", "divided"],
)
def test_the_attack_is_measured_in_pixels(settings):
    model = make(data_preprocessor=preprocessor(**settings)).train()
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]) if module.training else None)
    step(model)
    adversarial, natural = (model.pixels.to_pixels(inputs) for inputs in seen)
    images = torch.stack(batch()["inputs"]).float() / 255
    torch.testing.assert_close(natural, images.flip(1) if settings.get("to_rgb", True) else images)
    distance = (adversarial - natural).abs().max().item()
    assert distance == pytest.approx(EPS, abs=1e-5)
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


def test_eps_grows_with_the_epochs_and_is_logged():
    model = make(attack={"eps": "8/255", "budget": "high_as_executed", "eps_ramp": 1.0, "objective": "ikl"})
    seen = []
    for epoch in (1, 2, 4):
        model.begin_epoch(epoch, 4)
        seen.append(step(model)["eps"].item())
    assert seen == pytest.approx([2 / 255, 4 / 255, 8 / 255])


@pytest.mark.parametrize(
    "loss",
    [ikl(loss_weight=0.5), ikl(type="GKLLoss", gamma=0.4), {"type": "DKLLoss", "loss_weight": 6.0}],
    ids=lambda loss: loss["type"],
)
def test_the_log_counts_nothing_twice(loss):
    values = {name: value.item() for name, value in step(told(make(robust_loss=loss))).items()}
    assert values["loss"] == pytest.approx(values["loss_ce"] + values["loss_robust"])
    assert values["loss_robust"] == pytest.approx(values["weighted_mse"] + values["soft_cross_entropy"], rel=1e-5)
    assert 0 <= values["adversarial_accuracy"] <= 100


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 3.0, 4.0]])
def test_label_smoothing_keeps_the_weights_of_the_loss(weights):
    loss = {"type": "CrossEntropyLoss", "loss_weight": 0.5, "class_weight": weights}
    model = make(natural_weight=0.25, label_smoothing=0.1, head=head(loss=loss)).double().train()
    inputs, samples, labels = prepared(model, batch())
    log_probabilities = torch.log_softmax(copy.deepcopy(network_of(model))(inputs), 1)
    smooth = torch.full_like(log_probabilities, 0.1 / CLASSES)
    smooth[torch.arange(len(labels)), labels] += 0.9
    class_weights = torch.tensor(weights or [1.0] * CLASSES, dtype=torch.float64)
    expected = 0.125 * -(class_weights * smooth * log_probabilities).sum(1).mean()
    torch.testing.assert_close(model.loss(inputs, samples)["loss_ce"], expected, rtol=1e-6, atol=1e-8)


def test_channels_last_changes_the_layout_alone():
    plain, other = make().double().train(), make(channels_last=True).double().train()
    other.load_state_dict(plain.state_dict())
    assert other.backbone.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    layouts = []
    other.backbone.register_forward_pre_hook(
        lambda _, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    inputs, samples, _ = prepared(plain, batch())
    values = []
    for model in (plain, other):
        torch.manual_seed(5)
        total = total_of(model.loss(inputs, samples))
        total.backward()
        values.append(total)
    assert layouts
    assert all(layouts)
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-10)


# --- perturbed weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["ikl", "cross_entropy"])
def test_a_step_looks_once_at_labels_images_and_prior(objective, monkeypatch):
    """The attack, its prior, AWP's pass and the training pass have the same ones."""
    attack = {"eps": EPS, "steps": 2, "step_size": EPS, "objective": objective}
    model = make(attack=attack, robust_loss=ikl(), awp={"warmup_epochs": 0}).train()
    model.begin_epoch(1, 1)
    looks = []
    original = torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda values: looks.append(tuple(values.shape)) or original(values))
    model(**model.data_preprocessor(batch(), training=True), mode="loss")
    prior = (6, CLASSES) if objective == "ikl" else (CLASSES, CLASSES)
    assert sorted(looks) == sorted({(6, 3, SIZE, SIZE), (6,), prior, (CLASSES, CLASSES)})


class _Runner:
    val_loop = None

    def __init__(self, model, **options):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        self.optim_wrapper = OptimWrapper(optimizer, **options)
        self.model = model


@pytest.mark.parametrize("undo", ["before_step", "after_step"])
def test_weight_decay_acts_on_the_restored_weights_or_as_the_authors_on_the_perturbed(undo):
    model = make(robust_loss=ikl(), awp={"gamma": 0.5, "warmup_epochs": 1, "undo": undo}).train()
    runner = _Runner(model)
    model.attach(runner)
    model.begin_epoch(1, 4)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.data_preprocessor(batch())
    data = model.data_preprocessor(batch(), training=True)
    total = total_of(model(**data, mode="loss"))
    assert not torch.equal(model.backbone.conv1.weight, before["backbone.conv1.weight"])
    total.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    decayed = before if undo == "before_step" else {n: p.detach().clone() for n, p in model.named_parameters()}
    runner.optim_wrapper.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.data, before[name] - 0.1 * (gradients[name] + 0.1 * decayed[name]))


def test_awp_begins_with_its_epoch():
    model = make(awp={"gamma": 0.5, "warmup_epochs": 3}).train()
    weight = model.backbone.conv1.weight
    before = weight.detach().clone()
    inputs, samples, _ = prepared(model, batch())
    for epoch, moved in ((2, False), (3, True)):
        model.begin_epoch(epoch, 4)
        model.loss(inputs.float(), samples)
        assert torch.equal(weight, before) is not moved
    model.loss(inputs.float(), samples)  # after an iteration that was cut short the weights come back first
    model.end_iteration()
    assert torch.equal(weight, before)


# --- validation -------------------------------------------------------------------------------------------------------

VAL_ATTACK = {"eps": EPS, "steps": 4, "step_size": EPS / 2}


def test_predictions_are_those_of_the_plain_classifier_and_robust_ones_beside_them():
    model, other = make(val_attack=VAL_ATTACK).eval(), make(val_attack=VAL_ATTACK, val_seed=1).eval()
    plain = make(kind=ImageClassifier).eval()
    plain.load_state_dict(model.state_dict())
    state = torch.random.get_rng_state()
    with torch.no_grad():
        ours, again, theirs = model.val_step(batch()), model.test_step(batch()), plain.val_step(batch())
        assert torch.equal(torch.random.get_rng_state(), state)
        elsewhere = other.val_step(batch())
        (unlabelled,) = model.predict(torch.zeros(1, 3, SIZE, SIZE))
    assert "robust_pred_score" not in unlabelled
    assert not model.training

    def stack(samples, name="robust_pred_score"):
        return torch.stack([sample.get(name) for sample in samples])

    scores, robust = stack(ours, "pred_score"), stack(ours)
    assert torch.equal(scores, stack(theirs, "pred_score"))
    assert torch.equal(robust, stack(again))
    assert not torch.equal(robust, stack(elsewhere))
    picked = torch.arange(len(ours)), torch.cat([sample.gt_label for sample in ours])
    assert (robust[picked] < scores[picked]).all()  # the attack lowers the score of each label
    torch.testing.assert_close(robust.sum(1), torch.ones(len(ours)))


def test_robust_accuracy_reads_what_the_model_predicts():
    metric = RobustAccuracy()
    samples = [
        DataSample().set_gt_label(0).set_pred_score(torch.tensor([0.9, 0.1])),
        DataSample().set_gt_label(1).set_pred_score(torch.tensor([0.2, 0.8])),
    ]
    with pytest.raises(ValueError, match="AdversarialClassifier"):
        metric.process(None, [sample.to_dict() for sample in samples])
    for sample in samples:
        sample.set_field(torch.tensor([0.9, 0.1]), "robust_pred_score")
    metric.process(None, [sample.to_dict() for sample in samples])
    assert metric.evaluate(2) == {"robust/top1": 50.0}


# --- refusals ---------------------------------------------------------------------------------------------------------

ATTACK = {"eps": "8/255", "steps": 2, "step_size": "4/255"}
SCORES = preprocessor(to_onehot=True, num_classes=CLASSES)
RAW = preprocessor(mean=None, std=None)


class Checkpointed(TinyBackbone):
    def forward(self, x):
        x = torch.utils.checkpoint.checkpoint(lambda y: F.softplus(self.bn1(self.conv1(y))), x, use_reentrant=True)
        return (self.conv2(x).mean((2, 3)),)


class Closed(TinyBackbone):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


def closed():
    model = make(backbone=Closed())
    model.head.requires_grad_(False)
    return model


def told(model):
    model.begin_epoch(1, 4)
    return model


def changed(function):
    data = batch()
    data["inputs"] = [function(image) for image in data["inputs"]]
    return data


def normalised(image):
    return (image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def attached(model, **changes):
    runner = _Runner(model)
    runner.__dict__.update(changes)
    model.attach(runner)


ROBUST_METRIC = SimpleNamespace(evaluator=SimpleNamespace(metrics=[RobustAccuracy()]))
SMOOTH = {"type": "LabelSmoothLoss", "label_smooth_val": 0.1}
SOFT = {"type": "CrossEntropyLoss", "use_soft": True}

# id: call, fragment of the ValueError
# id: call, the fragment that matters; a TypeError where the id says so
REFUSED = {
    "eps": (lambda: make(attack=ATTACK | {"eps": 8}), "in `attack`: PGD: `eps` must be at most 1.*'8/255'"),
    "val eps": (lambda: make(val_attack=ATTACK | {"eps": 8}), "in `val_attack`: PGD: `eps`"),
    "val ramp": (lambda: make(val_attack=ATTACK | {"eps_ramp": 0.5}), "`val_attack` must be the same in all epochs"),
    "gamma": (lambda: make(awp={"gamma": 0}), "in `awp`: AdversarialWeightPerturbation: `gamma`"),
    "classes": (lambda: make(robust_loss=ikl(num_classes=7)), "`robust_loss` must have the class count .*=7"),
    "smoothing": (lambda: make(label_smoothing=1.0), "`label_smoothing` must be below 1"),
    "smooth twice": (lambda: make(label_smoothing=0.1, head=head(loss=SMOOTH)), "got LabelSmoothLoss"),
    "smooth soft": (lambda: make(label_smoothing=0.1, head=head(loss=SOFT)), "got CrossEntropyLoss with use_soft"),
    "natural weight": (lambda: make(natural_weight=-1.0), "`natural_weight` must be a finite number of at least 0"),
    "augmented weight": (lambda: make(augmented_weight=-1.0), "`augmented_weight` must be a finite number"),
    "pixel range": (lambda: make(pixel_range=0), "`pixel_range` must be a finite number above 0"),
    "prior, no hook": (lambda: step(make(robust_loss=ikl())), r"(?s)global_info=True.*dict\(type='IKLHook'\)"),
    "budget, no hook": (lambda: step(make(attack={"eps": 0.1, "budget": "high"})), "changes over the epochs"),
    "awp, no hook": (lambda: step(make(awp={})), "`awp`"),
    "normalised twice": (lambda: step(make(), changed(normalised)), "normalises twice"),
    "divided": (lambda: step(make(data_preprocessor=RAW), changed(lambda i: i / 255)), r"pixel_range=1\.0"),
    "prior of scores": (
        lambda: make(robust_loss=ikl(), data_preprocessor=SCORES),
        "`robust_loss` .*`to_onehot`",
    ),
    "attack of scores": (
        lambda: step(make(data_preprocessor=SCORES, attack=ATTACK)),
        "or use objective='soft_cross_en",
    ),
    "reentrant": (lambda: step(make(backbone=Checkpointed())), "reentrant checkpointing.*with_cp=False"),
    "no gradient": (lambda: step(closed()), "must be differentiable"),
    "one view": (lambda: step(make(augmented_weight=0.5)), "`augmented_weight` goes with two views"),
    "two views": (lambda: make().loss([torch.zeros(1, 3, 8, 8)] * 2, []), "`augmented_weight` goes with two views"),
    "metric alone": (lambda: attached(make(), val_loop=ROBUST_METRIC), "`val_attack` must be given for Robust"),
    "optimizers": (lambda: attached(make(awp={}), optim_wrapper=OptimWrapperDict()), "`awp` must have a single optim"),
    "TypeError: name": (
        lambda: make(attack=ATTACK | {"epsilon": 1}),
        "keyword of `attack` `epsilon`. Did you mean `eps`",
    ),
    "TypeError: attack": (lambda: make(attack="pgd"), "`attack` must be a dict of keywords of PGD, got str"),
    "TypeError: awp": (lambda: make(awp=True), "`awp` must be a dict .*WeightPerturbation, got bool"),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    call, message = REFUSED[case]
    with pytest.raises(TypeError if case.startswith("TypeError") else ValueError, match=message):
        call()


def test_what_is_next_to_a_refusal_works():
    step(make(data_preprocessor=RAW, pixel_range=1.0), changed(lambda image: image / 255))
    attached(make(val_attack=VAL_ATTACK), val_loop=ROBUST_METRIC)
    assert torch.isfinite(step(make(data_preprocessor=SCORES, head=head(loss=SOFT)))["loss"])  # scores without a prior
    # A preprocessor that mixes training images turns labels into scores in validation as well.
    model = make(data_preprocessor=SCORES, val_attack=VAL_ATTACK).eval()
    with torch.no_grad():
        assert all("robust_pred_score" in sample for sample in model.val_step(batch()))
    # TRADES asks for no labels; a head for several labels has a loss of its own.
    data = batch()
    data["data_samples"] = [DataSample().set_gt_label([0, 1]) for _ in data["inputs"]]
    model = make()
    model.head._get_loss = lambda logits, samples: {"loss": logits.square().mean()}
    log = step(model, data)
    assert torch.isfinite(log["loss"])
    assert "adversarial_accuracy" not in log


def test_awp_that_never_begins_is_warned_of(monkeypatch):
    said = []
    model = make(awp={"warmup_epochs": 10})
    logger = adversarial.MMLogger.get_current_instance()
    monkeypatch.setattr(logger, "warning", lambda text, *values: said.append(text % values))
    model.begin_epoch(1, 10)
    model.begin_epoch(2, 9)
    assert said == []
    model.begin_epoch(1, 9)
    (warning,) = said
    assert "`awp` begins with epoch 10, but the training has 9" in warning


def test_awp_adds_up_what_mmengine_adds_up():
    """A head may give its loss as a list of parts."""
    model = told(make(awp={"gamma": 0.5, "warmup_epochs": 1}).train())
    whole = model.head._get_loss
    model.head._get_loss = lambda *args: {"loss": [0.25 * whole(*args)["loss"], 0.75 * whole(*args)["loss"]]}
    inputs, samples, _ = prepared(model, batch())
    before = model.backbone.conv1.weight.detach().clone()
    model.loss(inputs.float(), samples)
    assert not torch.equal(model.backbone.conv1.weight, before)


# --- mixed precision --------------------------------------------------------------------------------------------------


def test_a_bfloat16_step_trains_every_weight_in_float32():
    """Under autocast the attack's natural pass must not leave copies of the weights that have no graph."""
    model = told(make(robust_loss=ikl(), awp={"gamma": 0.5, "warmup_epochs": 1}).train())
    inputs, samples, _ = prepared(model, batch())
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.loss(inputs.float(), samples)
    total_of(losses).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert losses["loss_robust"].dtype == torch.float32

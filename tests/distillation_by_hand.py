"""Adversarial distillation by hand, in plain torch: what the published codes share, for the tests of both hosts."""

import copy

import torch

EPS, STEP, STEPS = 8 / 255, 2 / 255, 3


def soft_ce(student, teacher, temperature=1.0):
    p = torch.softmax(teacher.detach() / temperature, 1)
    return -(p * torch.log_softmax(student / temperature, 1)).sum(1).mean()


def pairwise_mse(student, teacher, weights):
    gap = (teacher[:, :, None] - teacher[:, None]) - (student[:, :, None] - student[:, None])
    return 0.25 * (weights[:, :, None] * weights[:, None] * gap**2).sum((1, 2)).mean()


def attack_by_hand(student, pixels, objective, *, uniform=False, training=False):
    """What the published codes share; ``objective`` is from adversarial pixels and the network to a value."""
    student = copy.deepcopy(student).train(training)
    torch.manual_seed(5)
    if uniform:
        adversarial = pixels + (2 * torch.rand(pixels.shape, dtype=torch.float64) - 1) * EPS
    else:
        adversarial = pixels + 0.001 * torch.randn(pixels.shape, dtype=torch.float64)
    for _ in range(STEPS):
        adversarial = adversarial.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(student, adversarial), adversarial)
        adversarial = adversarial.detach() + STEP * gradient.sign()
        adversarial = torch.min(torch.max(adversarial, pixels - EPS), pixels + EPS).clamp(0, 1)
    return adversarial

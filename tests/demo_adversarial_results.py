"""Results of the demo's adversarial part with numbers that no training gave."""

import random

from demo import adversarial


def made_up_adversarial_results(images=300):
    """What AdversarialRuns keeps: accuracies that fall with eps, and two digits of 2x2 pixels."""
    draw = random.Random(0)

    def picture():
        return bytes(draw.randrange(256) for _ in range(12)).hex()

    methods = list(adversarial.METHODS)
    scores = ("accuracy/top1", "robust/top1", "robust/top1")
    eps = [fraction * 16 / 255 for fraction in adversarial.FRACTIONS]
    digits = [
        {
            "label": label,
            "natural": picture(),
            "models": {
                method: {"natural_prediction": label, "prediction": (label + place) % 10, "adversarial": picture()}
                for place, method in enumerate(adversarial.SHOWN, start=1)
            },
        }
        for label in (3, 8)
    ]
    return {
        "versions": {"mmengine": "0.10", "mmpretrain": "1.2"},
        "runs": {
            method: {"score": score, "best_score": 90.0, "epochs": 10, "seed": 0, "seconds": 10.0 + place}
            for place, (method, score) in enumerate(zip(methods, scores, strict=True))
        },
        "evaluation": {
            "training_eps": 16 / 255,
            "eps": eps,
            "accuracy": {
                method: [99.0 - place - (3 - place) * 5 * index for index in range(len(eps))]
                for place, method in enumerate(methods)
            },
            "images": images,
            "steps": 20,
            "relative_step": 0.25,
            "examples": {"shape": [3, 2, 2], "fall": 2, "digits": digits},
        },
    }

"""AutoAttack with fewer steps, where RobustBench need not be installed."""

from ikl_plugins._autoattack import AutoAttack


class FewSteps(AutoAttack):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.apgd.n_iter, self.apgd.n_iter_2, self.apgd.n_iter_min = 8, 3, 1
        self.apgd.n_iter_orig = 8  # what the attack in L1 divides among its radii

    @classmethod
    def apgd_ce(cls, model, images, labels, batch_size, **settings):
        """The accuracy in percent that the first attack of standard AutoAttack leaves."""
        adversary = cls(model, verbose=False, device="cpu", **settings)
        adversary.attacks_to_run = ["apgd-ce"]
        _, predictions = adversary.run_standard_evaluation(images, labels, bs=batch_size, return_labels=True)
        return 100.0 * predictions.eq(labels).sum().item() / len(labels)

"""A fourth loss needs its class and a row of one table: both adapters and the commands find it there."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

NEW_LOSS = """
import torch
from ikl_plugins import losses

class XKLLoss(losses.IKLLoss):
    '''IKL with ten times the weighted MSE.'''

    def settings(self):
        return super().settings()._replace(beta=10 * self.beta)

losses.LOSSES["XKLLoss"] = XKLLoss
torch.manual_seed(0)
student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
# The formula of the paper, pair by pair, in place of code of the package.
w = torch.softmax(teacher, 1)
d = teacher - student.detach()
mse = (w[:, :, None] * w[:, None, :] * (d[:, :, None] - d[:, None, :]) ** 2).sum((1, 2)).mean() / 4
ce = -(w * torch.log_softmax(student.detach(), 1)).sum(1).mean()
expected = 20 * mse + 3 * ce
"""


def run(program: str) -> None:
    source = NEW_LOSS + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_is_a_mid_level_loss_of_torchdistill_under_both_names() -> None:
    pytest.importorskip("torchdistill")
    run(
        """
        import copy, pickle
        import ikl_plugins.torchdistill
        from torchdistill.losses.registry import get_mid_level_loss

        place = dict(
            student_module_path=".", student_module_io="output", teacher_module_path=".", teacher_module_io="output"
        )
        for key in ("XKLLoss", "XKL"):
            loss = get_mid_level_loss({"key": key, "kwargs": dict(place, alpha=3.0, beta=2.0)})
            for same in (loss, copy.deepcopy(loss)):
                value = same({".": {"output": student}}, {".": {"output": teacher}}, torch.zeros(4, dtype=torch.long))
                torch.testing.assert_close(value.detach(), expected)
        """
    )


def test_it_is_a_loss_of_openmmlabs_registries() -> None:
    pytest.importorskip("mmengine")
    run(
        """
        import copy
        import ikl_plugins.mmengine
        from mmengine.registry import MODELS

        loss = MODELS.build(dict(type="XKLLoss", alpha=3.0, beta=2.0, loss_weight=0.5))
        for same in (loss, copy.deepcopy(loss)):
            torch.testing.assert_close(same(student, teacher).detach(), 0.5 * expected)
        """
    )


def test_adopt_offers_it() -> None:
    run(
        """
        import contextlib, io
        from ikl_plugins.commands.main import main

        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            main(["adopt", "--help"])
        assert "XKL" in shown.getvalue()
        """
    )

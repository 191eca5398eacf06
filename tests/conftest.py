"""What every test gets: the same random numbers in any order of tests, and one thread.

The tensors of the tests are small. A second thread would gain nothing on them, and waiting for it costs a second per
test as soon as something else runs on the machine.
"""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

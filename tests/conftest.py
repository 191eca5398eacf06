"""What every test gets: the same random numbers in any order of tests, and one thread.

The tensors of the tests are small. A second thread would gain nothing on them, and waiting for it costs a second per
test as soon as something else runs on the machine.
"""

from __future__ import annotations

from collections.abc import Iterator

import on_device
import pytest
import torch

torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = on_device.chosen()
    if device is not None and on_device.repeats(metafunc):
        plain = pytest.param(None, id=getattr(pytest, "HIDDEN_PARAM", "plain"))
        again = pytest.param(device, id=device, marks=pytest.mark.gpu)
        metafunc.parametrize("_seed", [plain, again], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The C++ operator has no part in what runs on a device."""
    items[:] = [
        item
        for item in items
        if not (
            item.get_closest_marker("gpu")
            and getattr(item, "callspec", None)
            and "operator" in item.callspec.params.values()
        )
    ]


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> Iterator[None]:
    device = getattr(request, "param", None)
    if device is None:
        torch.manual_seed(0)
        yield
        return
    with on_device.on_device(device, request.module):
        torch.manual_seed(0)
        yield

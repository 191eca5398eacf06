"""The oracle tests run twice: with the losses' own way, and with the C++ operator where a compiler is at hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ikl_plugins import native

BOTH_WAYS = ("test_functional", "test_precision", "test_properties", "test_autograd", "test_losses")
# What a test looks at where the operator has no part: the walk over blocks, torch.compile, the references themselves.
OWN_WAY_ONLY = (
    "test_the_two_references_agree",
    "test_the_comparison_notices_an_error_of_two_tolerances",
    "test_blocks_",
    "test_a_row_larger_than_a_block_is_a_block",
    "test_nothing_larger_than_the_logits_is_made",
    "test_without_gradients_nothing_larger_than_the_scratch_is_made",
    "test_gradcheck_can_fail",
    "test_second_derivatives_have_their_closed_form",
    "test_compiled_",
    "test_inductor_",
    "test_what_is_compiled_",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] not in BOTH_WAYS:
        return
    ways = ["own"] if metafunc.function.__name__.startswith(OWN_WAY_ONLY) else ["own", "operator"]
    metafunc.parametrize("way", ways, indirect=True, scope="module")


@pytest.fixture(scope="session")
def built_operator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder that holds the operator, kept with pytest's own cache. Skips where it cannot be built."""
    cache = getattr(request.config, "cache", None)
    folder = Path(cache.mkdir("ikl_plugins")) if cache is not None else tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_CACHE_HOME", str(folder))
        try:
            native.build()
        except RuntimeError as error:
            if "would not be loaded" in str(error):  # a checkout that a group can write
                folder = tmp_path_factory.mktemp("cache")
                environment.setenv("XDG_CACHE_HOME", str(folder))
                native.build()
                return folder
            if "it needs a C++ compiler" not in str(error) and "the system must be Linux" not in str(error):
                raise
            pytest.skip(f"the operator is not tested: {error}")
    return folder


@pytest.fixture(scope="module", autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which of the two ways the losses go; their own where a test does not say."""
    with pytest.MonkeyPatch.context() as state:
        # Whatever the environment asks for, and as it was afterwards.
        state.setattr(native, "_undecided", False)
        state.setattr(native, "_operator", None)
        if getattr(request, "param", "own") == "own":
            yield "own"
            return
        state.setenv("XDG_CACHE_HOME", str(request.getfixturevalue("built_operator")))
        native.enable()
        yield "operator"

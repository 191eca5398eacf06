"""evidence.timing: methods take turns, and the first rounds do not count."""

import itertools

from evidence.timing import in_turn, median_ratio, timed


def test_methods_take_turns_in_changing_order():
    called = []
    counters = {name: itertools.count() for name in "abc"}

    def method(name):
        def call():
            called.append(name)
            return next(counters[name])

        return call

    found = in_turn({name: method(name) for name in "abc"}, 0.0, least=20)
    assert found == {name: list(range(2, 22)) for name in "abc"}  # two rounds warm up
    rounds = [tuple(called[at : at + 3]) for at in range(0, len(called), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 2


def test_time_and_rounds_are_bounds():
    assert len(in_turn({"a": lambda: 0}, 60.0, least=1, most=4)["a"]) == 4
    assert len(in_turn({"a": lambda: 0}, 0.2, least=1)["a"]) > 4


def test_seconds_are_those_of_the_work_and_a_ratio_is_the_median_of_the_rounds():
    assert 0.0 <= timed(lambda: None)() < 1.0
    assert median_ratio([1.0, 30.0, 2.0], [2.0, 10.0, 2.0]) == 1.0
    assert median_ratio([3.0, 30.0, 4.0], [2.0, 10.0, 2.0]) == 2.0

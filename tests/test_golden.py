"""The runs of `tests.golden` train what was recorded: the same bits in the same environment, near them elsewhere."""

import copy

import pytest

from tests.golden.cases import CASES, run_all
from tests.golden.compare import case_differences, differences, environment_differences, far_losses, recorded
from tests.golden.environment import environment

EXPECTED = recorded()
SAME_ENVIRONMENT = not environment_differences(EXPECTED["environment"], environment())


@pytest.fixture(scope="module")
def got(tmp_path_factory) -> dict:
    return run_all(tmp_path_factory.mktemp("golden"))


def test_every_case_is_recorded():
    assert EXPECTED["cases"].keys() == CASES.keys(), "record them: python -m tests.golden --write"


@pytest.mark.skipif(not SAME_ENVIRONMENT, reason="recorded in another environment")
def test_models_and_rows_are_those_recorded(got):
    assert got["inputs"] == EXPECTED["inputs"]


@pytest.mark.parametrize("case", CASES)
def test_runs_train_what_was_recorded(case, got):
    compare = case_differences if SAME_ENVIRONMENT else far_losses
    lines = compare(case, EXPECTED["cases"][case], got["cases"][case])
    assert not lines, "\n".join(lines)


def test_a_changed_bit_is_named():
    changed = copy.deepcopy(EXPECTED)
    name = next(iter(CASES))
    loss = float.fromhex(changed["cases"][name]["losses"][2])
    changed["cases"][name]["losses"][2] = (loss * (1 + 2**-52)).hex()
    (line,) = differences(EXPECTED, changed)
    assert line.startswith(f"{name}: loss of step 3 expected ")
    assert not far_losses(name, EXPECTED["cases"][name], changed["cases"][name])


def test_a_loss_that_is_far_away_is_named():
    name = next(name for name, case in CASES.items() if case.precision == "fp32")
    for far in (1.001, float("nan")):
        changed = copy.deepcopy(EXPECTED["cases"][name])
        changed["losses"][0] = (far * float.fromhex(changed["losses"][0])).hex()
        (line,) = far_losses(name, EXPECTED["cases"][name], changed)
        assert "loss of step 1" in line


def test_a_changed_adapter_is_named():
    changed = copy.deepcopy(EXPECTED)
    name = next(iter(CASES))
    changed["cases"][name]["adapter"] = "0" * 64
    (line,) = differences(EXPECTED, changed)
    assert line.startswith(f"{name}: adapter expected ")

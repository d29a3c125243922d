"""Healthy programs of many fields: nothing is found in them by check, guard or diagnose."""

import healthy_steps
import pytest
import torch

from dlhelpers import pairing
from dlhelpers.profiling import diagnose

IN_TURN = (healthy_steps.rollout, healthy_steps.writing, healthy_steps.diffusion)


def made(program):
    torch.manual_seed(0)
    return program()


@pytest.mark.parametrize("program", healthy_steps.PROGRAMS, ids=lambda p: p.__name__)
def test_check_and_guard_find_nothing(program):
    made_of = made(program)
    with pairing.guard() as found:
        for _ in range(3):
            made_of.step()
    assert not found, found
    if made_of.loss is not None:
        inside = pairing.check(made_of.model, made_of.loss, made_of.targets, made_of.inputs)
        assert not inside, inside


@pytest.mark.parametrize("program", IN_TURN, ids=lambda p: p.__name__)
def test_calls_that_need_the_former_ones_output_are_no_loop(program):
    found = diagnose(made(program).step, progress=False)
    assert "python-loop" not in [finding.name for finding in found], found


@pytest.mark.slow
@pytest.mark.parametrize("program", healthy_steps.PROGRAMS, ids=lambda p: p.__name__)
def test_diagnose_finds_nothing(program):
    found = diagnose(made(program).step, progress=False)
    assert not found, found

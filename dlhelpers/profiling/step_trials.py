"""What would the step take without a part of it? The program's own step, that part left out."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from torch import nn

from dlhelpers.fakes import tensors_in
from dlhelpers.profiling.repeats import Repeat, is_in_backward
from dlhelpers.profiling.seen import Trial

__all__ = ["answered", "computes_the_same", "without_anomaly"]


def without_anomaly(step: Trial) -> Trial:
    """Return the step with autograd's anomaly detection off, whatever switches it on."""
    if step is None:
        return None

    def run() -> Any:
        switch = torch.set_anomaly_enabled
        was, checked = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
        switch(False, checked)
        torch.set_anomaly_enabled = lambda *args, **kwargs: None
        try:
            return step()
        finally:
            torch.set_anomaly_enabled = switch
            switch(was, checked)

    return run


def answered(step: Trial, repeat: Repeat) -> Trial:
    """Return the step in which calls that repeat another one get an output that is there."""
    if step is None or repeat.output is None:
        return None

    def run() -> Any:
        call, me = nn.Module.__call__, threading.get_ident()
        inside, number = False, -1

        def given(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside, number
            if inside or threading.get_ident() != me or torch.compiler.is_compiling():
                return call(module, *args, **kwargs)
            if module is repeat.module and not is_in_backward():
                number += 1
                if number in repeat.numbers:
                    return repeat.output
            inside = True
            try:
                return call(module, *args, **kwargs)
            finally:
                inside = False

        nn.Module.__call__ = given
        try:
            return step()
        finally:
            nn.Module.__call__ = call

    return run


def computes_the_same(repeat: Repeat) -> bool:
    """Whether both calls are the same function of the input: no dropout, no other statistics.

    Tried on a copy of the model, in the mode of each call.
    """
    try:
        model = copy.deepcopy(repeat.module)
        found = []
        for training in (repeat.training, repeat.repeat_training, repeat.repeat_training):
            if repeat.training != repeat.repeat_training:
                model.train(training)
            with torch.no_grad():
                found.append(list(tensors_in(model(*repeat.args, **repeat.kwargs))))
        first, *others = found
        return bool(first) and all(
            len(first) == len(other)
            and all(torch.allclose(a, b, 1e-3, 1e-5) for a, b in zip(first, other, strict=True))
            for other in others
        )
    except Exception:  # no copy, or an input that was freed
        return False

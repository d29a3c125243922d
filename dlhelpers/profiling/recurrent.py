"""Would torch's fused layer do what a loop over its cell does? It is tried on the inputs seen.

Where every input is known beforehand, one call of ``nn.LSTM`` multiplies all inputs by weights at
once, and makes one node of autograd's graph. Where an input needs the output before it, as in a
decoder that reads its own words, the cell is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers.profiling.code_report import place_of
from dlhelpers.profiling.dataflow import CellCall
from dlhelpers.profiling.seen import Bottleneck, Seen, Speedup
from dlhelpers.trees import tensors_in

__all__ = ["recurrent_cells"]

_LAYERS = {nn.LSTMCell: nn.LSTM, nn.GRUCell: nn.GRU, nn.RNNCell: nn.RNN}
_LEAST = 4  # steps in a row
_TIMED = 10  # trials of the loop, of which the shortest counts


def recurrent_cells(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """Find loops over a cell whose inputs are all known before the loop begins."""
    calls = sorted(seen.flow.cells if seen.flow else (), key=lambda call: id(call.cell))
    for _, group in groupby(calls, key=lambda call: id(call.cell)):
        runs = _runs(list(group))
        longest = max(runs, key=len)
        if len(longest) < _LEAST or any(call.needs_cell for run in runs for call in run):
            continue
        kind = type(longest[0].cell)
        tried = _trial(longest, backward=seen.has_backward)
        if tried is None:
            continue
        loop, layer, loop_ms = tried
        factor = speedup(loop, layer)
        turns = sum(map(len, runs)) / len(longest)
        whole = seen.ms("forward", "copies", "backward")
        # the shortest loop beside the shortest step: other programs are no part of either
        of_step_ms = loop_ms * turns * seen.step_ms / seen.shortest_ms
        saves = min(of_step_ms, whole) * (1 - 1 / factor)
        name, fused = f"nn.{kind.__name__}", f"nn.{_LAYERS[kind].__name__}"
        if saves >= least_ms:
            cell = longest[0].cell
            yield seen.finding(
                "recurrent-cell-loop",
                saves_ms=saves,
                is_of_part=True,
                where=place_of(*longest[0].line[:2]),
                what=f"{name} is called {sum(map(len, runs))} times a step, {len(longest)} times "
                "in a row, on inputs that do not depend on its outputs",
                why=f"{fused} with the same weights gives the same outputs {factor:.2g} times as "
                "fast, forward and backward, tried here"
                if seen.has_backward
                else f"{fused} with the same weights gives the same outputs {factor:.2g} times as "
                "fast, tried here",
                remedy=f"outputs, state = {fused}({cell.input_size}, {cell.hidden_size})"
                "(torch.stack(inputs), state), in place of the loop",
                notebook="08_profiling",
            )
        elif factor == 1:
            seen.tried.append(f"{fused} in place of a loop over {name}")


def _runs(calls: Sequence[CellCall]) -> list[list[CellCall]]:
    """Cut the calls of one cell where the state is not what the call before returned."""
    runs: list[list[CellCall]] = []
    for call in calls:
        if runs and call.follows and call.input.shape == runs[-1][-1].input.shape:
            runs[-1].append(call)
        else:
            runs.append([call])
    return runs


def _trial(
    calls: Sequence[CellCall], *, backward: bool
) -> tuple[Callable[[], Any], Callable[[], Any], float] | None:
    """Return the loop, the layer, and how many ms the loop takes; None where they differ."""
    cell = calls[0].cell
    kind = _LAYERS.get(type(cell))
    if kind is None:
        return None
    backward = backward and any(p.requires_grad for p in cell.parameters())
    try:
        with torch.no_grad():
            own = {name: p.detach().clone() for name, p in cell.named_parameters()}
            more = {"nonlinearity": cell.nonlinearity} if kind is nn.RNN else {}
            weight = own["weight_ih"]
            layer = kind(cell.input_size, cell.hidden_size, bias=cell.bias, **more).to(weight)
            for name, value in own.items():
                getattr(layer, f"{name}_l0").copy_(value)
            copied = type(cell)(cell.input_size, cell.hidden_size, bias=cell.bias, **more)
            copied.to(weight).load_state_dict(own)
        inputs = [call.input for call in calls]
        first = _first_state(calls[0].state)

        def loop() -> Tensor:
            with torch.set_grad_enabled(backward):
                state, found = calls[0].state, []
                for x in inputs:
                    state = copied(x, state)
                    found.append(state[0] if isinstance(state, tuple) else state)
                outputs = torch.stack(found)
                if backward:
                    outputs.sum().backward()
            return outputs

        def fused() -> Tensor:
            with torch.set_grad_enabled(backward):
                outputs, _ = layer(torch.stack(inputs), first)
                if backward:
                    outputs.sum().backward()
            return outputs

        if not torch.allclose(loop().detach(), fused().detach(), rtol=1e-3, atol=1e-4):
            return None
    except Exception:  # a parametrization, a type or a device that the layer does not take
        return None
    took = []
    for _ in range(_TIMED):
        begin = perf_counter()
        loop()
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        took.append(perf_counter() - begin)
    return loop, fused, 1e3 * min(took)


def _first_state(state: Any) -> Any:
    """Return a cell's state as its layer takes it, with a dimension for the layers."""
    parts = tuple(part.unsqueeze(0) for part in tensors_in(state))
    return None if not parts else parts if len(parts) > 1 else parts[0]

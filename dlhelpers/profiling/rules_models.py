"""How does the step call its models, and what does it keep of them?"""

from __future__ import annotations

from collections.abc import Iterator

from dlhelpers.profiling.seen import Bottleneck, Seen, Speedup
from dlhelpers.profiling.trials import folding_gain, graph_bytes, trial
from dlhelpers.profiling.watching import ModelCalls

__all__ = ["batch_of_one", "evaluation", "kept_graphs"]


def batch_of_one(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """Try a batch of sixteen where one sample goes through the model in a step."""
    for calls in seen.calls:
        if calls.rows != 1 or calls.count > seen.steps:
            continue
        one, many = trial(calls), trial(calls, 16)
        if one is None or many is None:
            continue
        factor = speedup(lambda one=one: [one() for _ in range(16)], many)
        saves = seen.model_ms * (1 - 1 / factor)
        saves += 15 / 16 * seen.ms("optimizer")
        if factor > 1 and saves >= least_ms:
            yield seen.finding(
                "batch-of-one",
                saves_ms=saves,
                is_of_part=True,
                what=f"{type(calls.module).__name__} sees one sample a step",
                why=f"16 samples at a time take {factor:.2g} times less each, tried here",
                remedy="DataLoader(..., batch_size=16), with the learning rate tuned anew",
                notebook="04b_more",
            )


def evaluation(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """Find evaluation that builds graphs, and BatchNorms that could be folded."""
    for calls in seen.calls:
        if calls.training:
            continue
        if seen.has_backward:
            yield from _teacher(seen, calls)
            continue
        gain = 1.0
        if calls.makes_graph:
            plain, without = trial(calls, grad=True), trial(calls)
            gain = max(1.0, speedup(plain, without))
            yield seen.finding(
                "evaluation-without-no-grad",
                severity="error",
                saves_ms=seen.model_ms * (1 - 1 / gain),
                is_of_part=True,
                saves_bytes=graph_bytes(calls),
                besides="no graph that is built for nothing",
                what=f"{type(calls.module).__name__} is in eval mode, its outputs hang on a "
                "graph, and no backward follows",
                why="every input of every layer is kept for gradients that nobody asks for",
                remedy="with torch.inference_mode(): outputs = model(inputs)",
                notebook="04_memory",
            )
        if factor := folding_gain(calls, speedup):
            saves = seen.model_ms / gain * (1 - 1 / factor)
            if saves >= least_ms:
                yield seen.finding(
                    "batchnorm-unfused",
                    saves_ms=saves,
                    is_of_part=True,
                    what=f"{type(calls.module).__name__} is in eval mode and has BatchNorms beside "
                    "convolutions",
                    why=f"folded away it is {factor:.2f} times as fast, tried here",
                    remedy="model, report = dlhelpers.fusion.fuse_conv_bn(model, inputs)",
                    notebook="06_fusion",
                )


def _teacher(seen: Seen, calls: ModelCalls) -> Iterator[Bottleneck]:
    """Find a model beside the one that is trained, whose graph nobody needs."""
    held = [parameter for parameter in calls.module.parameters() if parameter.requires_grad]
    if not (calls.makes_graph and held and seen.trained) or calls.needs_input_grad:
        return
    if any(id(parameter) in seen.trained for parameter in held):
        return
    yield seen.finding(
        "evaluation-without-no-grad",
        saves_bytes=graph_bytes(calls),
        besides="no graph that is built for nothing",
        what=f"{type(calls.module).__name__} is in eval mode, its outputs hang on a graph, and no "
        "optimizer that made a step holds any of its parameters",
        why="every input of every layer is kept, and backward may compute gradients that nobody "
        "takes",
        remedy="with torch.no_grad(): targets = teacher(inputs)",
        notebook="04_memory",
    )


def kept_graphs(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """Find steps each of which leaves a graph behind."""
    if not seen.kept_nodes:
        return
    yield seen.finding(
        "loss-tensors-kept",
        severity="error",
        saves_bytes=seen.kept_bytes,
        besides="memory that does not grow",
        where=seen.lines.hottest if not seen.has_backward else "",
        what=f"each step leaves {seen.kept_nodes} nodes of autograd's graph in memory, and "
        f"{seen.kept_bytes:,} bytes of tensors",
        why="a tensor that is kept keeps its graph, and the memory grows with every step",
        remedy="losses.append(loss.detach()), or total += loss.item()",
        notebook="04b_more",
    )

"""Which bottleneck does a GPU's record point to? Rules that say nothing where none was used."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dlhelpers.profiling.seen import Bottleneck, Seen, Speedup, Trial
from dlhelpers.profiling.trials import trial
from dlhelpers.tables import duration

__all__ = ["CUDA_RULES"]


def waiting_gpu(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """The GPU has nothing to do while the CPU is at work on something else than loading."""
    if not seen.trace.gpu:
        return
    idle = seen.gpu_idle_ms
    saves = idle - seen.ms("data loading")
    if saves >= max(least_ms, 0.2 * seen.step_ms):
        launches = sum(e.kind == "kernel" for e in seen.trace.gpu) / seen.steps
        yield seen.finding(
            "gpu-waits",
            saves_ms=saves,
            is_estimated=True,
            what=f"the GPU is idle for {idle / seen.step_ms:.0%} of a step, which launches "
            f"{launches:.0f} kernels",
            why="the CPU does not launch kernels as fast as the GPU ends them",
            remedy="a larger batch, or torch.compile(model, mode='reduce-overhead')",
            notebook="08_profiling",
        )


def synchronisation(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """The CPU waits for the GPU in the middle of a step, after which the GPU waits for the CPU."""
    if not seen.trace.gpu:
        return
    fetched = sum(e.name.startswith("Memcpy DtoH") for e in seen.trace.gpu) / seen.steps
    waits = seen.ms("waiting for the GPU")
    saves = min(waits, seen.gpu_idle_ms)
    if saves >= least_ms:
        yield seen.finding(
            "synchronisation",
            saves_ms=saves,
            is_estimated=True,
            where=seen.lines.hottest,
            what=f"the CPU waits for the GPU for {waits / seen.step_ms:.0%} of a step, in which "
            f"{fetched:.0f} copies come back from it",
            why=".item(), .cpu(), print and if need a number: all kernels must end first"
            if fetched
            else "a copy without non_blocking, or synchronize(), waits for all kernels before it",
            remedy="total += loss.detach(), and one .item() every hundred steps"
            if fetched
            else "batch.to('cuda', non_blocking=True), pinned; no synchronize() in a step",
            notebook="08_profiling",
        )


def unpinned(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """Batches are copied to the GPU from memory that the system may move."""
    slow = [e for e in seen.trace.gpu if e.name.startswith("Memcpy HtoD (Pageable")]
    took = sum(event.us for event in slow) / 1e3 / seen.steps
    if slow and took >= least_ms:
        has = seen.loader is not None and seen.loader.pinned
        yield seen.finding(
            "not-pinned",
            saves_ms=took,
            is_estimated=True,
            what=f"{len(slow) / seen.steps:.0f} copies a step go to the GPU from pageable memory, "
            f"{duration(took / 1e3)}",
            why="such a copy goes through a buffer, and the CPU waits for it",
            remedy="batch.pin_memory().to('cuda', non_blocking=True)"
            if has
            else "DataLoader(..., pin_memory=True) and batch.to('cuda', non_blocking=True)",
            notebook="03_dali_io",
        )


def full_precision(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """The model computes in float32 on a GPU that multiplies bfloat16 many times as fast."""
    if not seen.trace.gpu or torch.cuda.get_device_capability() < (8, 0):
        return
    for calls in seen.calls:
        kinds = {p.dtype for p in calls.module.parameters() if p.is_cuda}
        if kinds != {torch.float32} or calls.autocast:
            continue
        once = trial(calls)
        factor = speedup(_under_autocast(once, False), _under_autocast(once, True))
        saves = seen.model_ms * (1 - 1 / factor)
        if saves >= least_ms:
            yield seen.finding(
                "full-precision",
                saves_ms=saves,
                is_of_part=True,
                what=f"{type(calls.module).__name__} computes in float32",
                why=f"under autocast to bfloat16 it is {factor:.2g} times as fast, tried here",
                remedy="with torch.autocast('cuda', torch.bfloat16): loss = criterion(model(x), y)",
                notebook="04b_more",
            )


def _under_autocast(once: Trial, enabled: bool) -> Trial:
    """Return the model's trial with or without autocast; None where it cannot be run so."""
    if once is None:
        return None

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            once()
        torch.cuda.synchronize()

    try:
        run()
    except Exception:  # an operator that autocast refuses
        return None
    return run


CUDA_RULES = (waiting_gpu, synchronisation, unpinned, full_precision)

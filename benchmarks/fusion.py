"""How many BatchNorms of torchvision's models are folded, here and by torch.fx; what is it worth?

A  every torchvision model that holds BatchNorm (with statistics that are not trivial): found,
   folded here and by torch.fx.experimental.optimization.fuse, what is left and why, the error of
   the outputs, and in float64
B  a small network of each of timm's families: calls of F.batch_norm, and how many of them are left
   here, by torch.fx and by timm's reparameterize_model; speedup of eager mode at batch 1
C  speedup of inference by folding: three networks at batch 1 and 16, in eager mode, in ONNX Runtime
   and under torch.compile with and without freezing

Prints tables and writes benchmarks/results/fusion.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.fx.experimental.optimization import fuse as torch_fuse
from torch.nn.modules.batchnorm import _BatchNorm

from dlhelpers import machine
from dlhelpers.fusion import fuse_conv_bn
from dlhelpers.measure import compare

DETECTION = torchvision.models.list_models(module=torchvision.models.detection)
SEGMENTATION = torchvision.models.list_models(module=torchvision.models.segmentation)
SMALL = {"regnet": "regnetx_002", "efficientnet": "test_efficientnet"}
VIDEO = torchvision.models.list_models(module=torchvision.models.video)


def built(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    options: dict[str, Any] = {"weights": None}
    side = 299 if name == "inception_v3" else 224 if name.startswith("maxvit") else 96
    inputs: tuple[Any, ...] = (torch.rand(1, 3, side, side),)
    if name in DETECTION:
        options |= {"weights_backbone": None}
        if not name.startswith("ssd"):
            options |= {"min_size": 96, "max_size": 128}
        inputs = ([torch.rand(3, 96, 128)],)
    elif name in SEGMENTATION:
        options |= {"weights_backbone": None}
    elif name in VIDEO:
        side = 224 if name == "s3d" else 64
        inputs = (torch.rand(1, 3, 16, side, side),)
    elif name.startswith("raft"):
        inputs = (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
    model = torchvision.models.get_model(name, **options)
    give_statistics(model)
    return model, inputs


def give_statistics(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.3, 2, generator=generator)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)


def table_a(names: list[str]) -> list[dict[str, Any]]:
    print(
        f"\nA  {'model':38} {'found':>5} {'here':>5} {'torch.fx':>12} {'error':>9} {'float64':>9}"
    )
    rows, failed = [], []
    for name in names:
        model, inputs = built(name)
        if not any(getattr(m, "running_var", None) is not None for m in model.modules()):
            continue
        start = time.perf_counter()
        try:
            _, report = fuse_conv_bn(model, inputs)
        except Exception as error:  # counted below: one failure hides no other one
            failed.append(f"{name}: {error!r}")
            continue
        seconds = time.perf_counter() - start
        try:
            theirs = torch_fuse(copy.deepcopy(model).eval())
            kept = sum(isinstance(module, _BatchNorm) for module in theirs.modules())
            by_fx: Any = report.found - kept
        except Exception as error:  # told beside the others
            by_fx = type(error).__name__
        left = Counter(why.partition(";")[0] for why in report.left.values())
        row = {
            "model": name,
            "found": report.found,
            "here": report.folded,
            "torch.fx": by_fx,
            "error": report.max_rel_error,
            "float64": report.algebra_error,
            "left": dict(left),
            "seconds": seconds,
        }
        rows.append(row)
        print(
            f"   {name:38} {report.found:5} {report.folded:5} {by_fx:>12} "
            f"{report.max_rel_error or 0:9.0e} {report.algebra_error or 0:9.0e} "
            + "; ".join(f"{n} x {why}" for why, n in left.items()),
            flush=True,
        )
    fewer = [
        r["model"] for r in rows if isinstance(r["torch.fx"], int) and r["here"] < r["torch.fx"]
    ]
    raised = sum(isinstance(r["torch.fx"], str) for r in rows)
    print(
        f"{len(rows)} models, {sum(r['found'] for r in rows)} BatchNorms, "
        f"{sum(r['here'] for r in rows)} folded here; torch.fx raised on {raised}; "
        f"fewer than torch.fx: {fewer or 'none'}; failed here: {failed or 'none'}"
    )
    for why, count in sum((Counter(r["left"]) for r in rows), Counter()).most_common():
        print(f"   left: {count} x {why}")
    return rows


def families() -> dict[str, str]:
    """Return timm's families that hold BatchNorm, each with its smallest network."""
    import timm

    found = {}
    for family in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=family):
            try:
                with torch.device("meta"):
                    model = timm.create_model(name, pretrained=False)
            except Exception:  # some cannot be built without memory
                continue
            if any("running_var" in module._buffers for module in model.modules()):
                sizes[name] = sum(parameter.numel() for parameter in model.parameters())
        if sizes:
            found[family] = min(sizes, key=sizes.__getitem__)
    return found


def timms(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Return a network of random weights and the smallest image that it takes."""
    import timm

    model = timm.create_model(name, pretrained=False).eval()
    give_statistics(model)
    channels, *_, side = model.default_cfg["input_size"]
    for size in (64, 96, 128, side):
        x = torch.rand(1, channels, size, size)
        try:
            run_of(model, x)()
        except Exception:  # it is too small
            continue
        return model, x
    raise RuntimeError(f"{name} runs with none of the sizes")


def calls_of_batch_norm(model: nn.Module, x: torch.Tensor) -> int:
    real, calls = nn.functional.batch_norm, []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return real(*args, **kwargs)

    nn.functional.batch_norm = counted
    try:
        run_of(model, x)()
    finally:
        nn.functional.batch_norm = real
    return len(calls)


def table_timm(names: dict[str, str], budget_s: float) -> list[dict[str, Any]]:
    from timm.utils.model import reparameterize_model

    print(
        f"\nB  {'family':26} {'network':28} {'calls':>5} {'here':>5} {'torch.fx':>10} {'timm':>5}"
    )
    rows = []
    for family, name in names.items():
        model, x = timms(name)
        fused, report = fuse_conv_bn(model, x)
        try:
            by_fx: Any = calls_of_batch_norm(torch_fuse(copy.deepcopy(model)), x)
        except Exception as error:  # told beside the others
            by_fx = type(error).__name__
        found = compare(run_of(model, x), run_of(fused, x), budget_s=budget_s)
        row = {
            "family": family,
            "network": name,
            "calls": calls_of_batch_norm(model, x),
            "here": calls_of_batch_norm(fused, x),
            "torch.fx": by_fx,
            "timm": calls_of_batch_norm(reparameterize_model(model), x),
            "error": report.max_rel_error,
            "float64": report.algebra_error,
            "left": dict(Counter(why.partition(";")[0] for why in report.left.values())),
            "speedup": [found.speedup, found.low, found.high],
        }
        rows.append(row)
        print(
            f"   {family:26} {name:28} {row['calls']:5} {row['here']:5} {by_fx!s:>10} "
            f"{row['timm']:5} {found} "
            + "; ".join(f"{n} x {why}" for why, n in row["left"].items()),
            flush=True,
        )
    return rows


def in_onnxruntime(model: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options)
    given = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, given)


def run_of(model: Any, x: torch.Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return model(x)

    return run


def table_c(names: list[str], budget_s: float) -> list[dict[str, Any]]:
    print("\nC  speedup of inference by folding")
    rows = []
    for name in names:
        model, _ = built(name)
        model.eval()
        fused, _ = fuse_conv_bn(model)
        for batch in (1, 16):
            x = torch.rand(batch, 3, 96, 96)
            ways: dict[str, Callable[[nn.Module], Callable[[], Any]]] = {
                "eager": lambda m, x=x: run_of(m, x),
                "ONNX Runtime": lambda m, x=x: in_onnxruntime(m, x),
                "compiled": lambda m, x=x: run_of(torch.compile(copy.deepcopy(m)), x),
                "compiled, freezing": lambda m, x=x: run_of(
                    torch.compile(copy.deepcopy(m), options={"freezing": True}), x
                ),
            }
            for way, make in ways.items():
                found = compare(make(model), make(fused), budget_s=budget_s)
                print(f"   {name:14} batch {batch:2} {way:20} {found}", flush=True)
                rows.append(
                    {
                        "network": name,
                        "batch": batch,
                        "way": way,
                        "speedup": found.speedup,
                        "low": found.low,
                        "high": found.high,
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a dozen models, no grid of times")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print(machine.describe().line)
    everything = [
        name
        for name in torchvision.models.list_models()
        if not name.startswith("quantized_") and "_128gf" not in name and "_32gf" not in name
    ]
    few = ["resnet18", "mobilenet_v2", "densenet121", "r3d_18", "fasterrcnn_resnet50_fpn"]
    result = {
        "machine": machine.describe().as_dict(),
        "A": table_a(few if options.quick else everything),
        "timm": table_timm(*(SMALL, 0.5) if options.quick else (families(), 2.0)),
        "C": [] if options.quick else table_c(["vgg11_bn", "resnet18", "mobilenet_v2"], 3.0),
    }
    path = Path(__file__).parent / "results" / "fusion.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()

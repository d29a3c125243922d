"""Deep learning, measured: tools that settle PyTorch tips by experiment.

Submodules load on first use, so ``import dlhelpers`` costs nothing and
``dlhelpers.pairing.check(...)`` works without a second import:

==========================  ====================================================================
``dlhelpers.measure``       is one function faster than another? with an interval and an outcome
``dlhelpers.machine``       what this machine is
``dlhelpers.roofline``      how fast it can be at best
``dlhelpers.claims``        a tip as a claim, its evidence, its verdict, the ledger's row
``dlhelpers.pairing``       does this loss want what the model's last layer gives?
``dlhelpers.lmdb_io``       many small images in one file that is read fast and safely
``dlhelpers.stores``        the same images in other containers, and what each costs
``dlhelpers.dali_io``       batches from DALI: torch's loader, torchvision's pixels
``dlhelpers.stages``        which stage of a pipeline do the others wait for?
``dlhelpers.memory``        how many bytes a training step needs, what they are, how to need fewer
``dlhelpers.shufflenet``    what each layer costs, and ShuffleNetV2's four guidelines
``dlhelpers.fusion``        fold BatchNorm wherever that is exact, and say where it is not
``dlhelpers.quantization``  the fastest right way to run a model here, int8 among them
``dlhelpers.profiling``     where the time of a step goes, and what mending it would bring
``dlhelpers.data``          real digits and photographs without a network
``dlhelpers.training``      a small, seeded training loop
``dlhelpers.story``         a script with many slow habits, which notebook 08 mends
``dlhelpers.exercises``     check, hint and solution of the course's exercises
``dlhelpers.plots``         one style for all figures, with alt text
``dlhelpers.report``        the ledger as one page
==========================  ====================================================================
"""

import importlib
from types import ModuleType

__version__ = "0.1.0"

_SUBMODULES = (
    "claims",
    "dali_io",
    "data",
    "exercises",
    "findings",
    "fusion",
    "ledger",
    "lmdb_io",
    "machine",
    "measure",
    "memory",
    "notebook",
    "pairing",
    "plots",
    "profiling",
    "quantization",
    "report",
    "roofline",
    "shufflenet",
    "stages",
    "stores",
    "story",
    "training",
)

__all__ = ["__version__", *_SUBMODULES]


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""Change what a language model says by changing its logits, and measure what that changed."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported on first use, so that `import logitproc` and `logitproc list` need no torch.
_LAZY = {
    "names": "registry", "get": "registry", "register": "registry",
    "Processor": "processor", "Chain": "chain", "Artifact": "artifact", "pocket": "bundled",
    "Companion": "companion", "generate": "generation", "Speculation": "speculative",
    "NGramPrior": "prior", "TokenLedger": "ledger",
    "AlignDistilLogitsProcessor": "methods.aligndistil", "DynamicFusionLogitsProcessor": "methods.fusion",
    "NGramStyleLogitsProcessor": "methods.ngram",
    "SuppressionLogitsProcessor": "methods.suppression", "VQLogitsProcessor": "methods.vq",
    "VQHead": "heads", "ExactHead": "heads", "Calibration": "heads",
    "attach": "heads", "detach": "heads", "convert": "heads",
    "load_converted": "heads", "tie_floor": "heads", "tie_floor_min": "heads",
}  # fmt: skip
__all__ = [*_LAZY, "__version__"]

if TYPE_CHECKING:
    from .artifact import Artifact
    from .bundled import pocket
    from .chain import Chain
    from .companion import Companion
    from .generation import generate
    from .heads import (
        Calibration,
        ExactHead,
        VQHead,
        attach,
        convert,
        detach,
        load_converted,
        tie_floor,
        tie_floor_min,
    )  # fmt: skip
    from .ledger import TokenLedger
    from .methods.aligndistil import AlignDistilLogitsProcessor
    from .methods.fusion import DynamicFusionLogitsProcessor
    from .methods.ngram import NGramStyleLogitsProcessor
    from .methods.suppression import SuppressionLogitsProcessor
    from .methods.vq import VQLogitsProcessor
    from .prior import NGramPrior
    from .processor import Processor
    from .registry import get, names, register
    from .speculative import Speculation


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'logitproc' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

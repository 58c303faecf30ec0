"""Output heads: compressed, low-bit and exact ones, and how a model takes them. See `vq`, `exact` and `attachment`."""

from .attachment import attach, convert, converted_classes, detach, load_converted, recognise
from .calibration import Calibration, Floors, Statistics
from .clustering import Progress, kmeans
from .evaluation import Figures, evaluate
from .exact import ExactHead
from .fitted import FittedHead
from .floors import tie_floor, tie_floor_min
from .head import KINDS, DenseHead, Head
from .quantised import Int4Head, Int8Head
from .refine import RefinedHead, ScreenedHead
from .vq import VQHead

__all__ = [
    "KINDS", "Calibration", "DenseHead", "ExactHead", "Figures", "FittedHead", "Floors", "Head", "Int4Head", "Int8Head",
    "Progress", "RefinedHead", "ScreenedHead", "Statistics", "VQHead", "attach", "convert", "converted_classes",
    "detach", "evaluate", "kmeans", "load_converted", "recognise", "tie_floor", "tie_floor_min",
]  # fmt: skip

"""What several commands share: options, silence, and the way to a model."""

import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Option

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Json = Annotated[bool, Option("--json", help="One JSON object a line.")]
PromptList = Annotated[
    list[str] | None, Option("--prompt", metavar="TEXT", help="A prompt; may be given several times.")
]
NewTokens = Annotated[int, Option(metavar="N", min=1, help="At most so many tokens a result.")]
MAX_SEED = 2**63 - 1
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], Option(help="auto: as the model is stored.")]


def quiet(context: typer.Context) -> None:
    """Silence what transformers and the hub say beside errors, unless --debug was given."""
    if context.obj:
        return
    import warnings

    from huggingface_hub.utils import enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # each of its tries to reach the hub
    logging.disable_progress_bar()
    if sys.stderr.isatty():
        enable_progress_bars()  # a download may take minutes


def choose_device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}.") from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"--device {name} is not there: torch sees {count} CUDA devices.")
    return name


def load_model(source: str, dtype: str, device: str | None, device_map: str | None) -> "PreTrainedModel":
    from ..heads import load_converted

    place = {"device_map": device_map} if device_map else {}
    model: Any = load_converted(source, dtype=dtype, **place)
    return model.to(device) if device else model


def set_seed(seed: int | None) -> None:
    from ..generation import seed_everything

    if seed is not None:
        seed_everything(seed)

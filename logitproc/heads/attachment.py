"""A head in the place of a model's own: for a while (`attach`), or for good (`convert`).

Over setting `model.lm_head` it verifies that the model took the head, restores the very same module, and refuses to
save a model whose head `from_pretrained` would silently replace by a dense one.
"""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..registry import unknown
from .head import Head, fingerprint, softcapped

_PREFIX = "logitproc_"  # of the model type of a converted model
_CODE = "modeling_logitproc.py"
_SOURCE = '''"""For AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True); needs the package logitproc."""

from logitproc.heads import converted_classes

Config, Model = converted_classes("{model_type}")
'''


@contextlib.contextmanager
def mounted(model: Any, module: Any) -> Iterator[Any]:
    """`module` as the output layer of `model` while the block runs, then the same old one, whatever happens."""
    old = model.get_output_embeddings()
    _put(model, module)
    try:
        yield module
    finally:
        _put(model, old)


def own_head(model: Any) -> nn.Linear:
    """The output layer of a model, or a linear layer itself. ValueError unless it is linear and the model's own."""
    own = model if isinstance(model, nn.Linear) else model.get_output_embeddings()
    if isinstance(own, Head):
        raise ValueError(
            f"This model has a head of kind {own.kind!r} in place of its own; take the original model, or "
            "lp.detach(model) first."
        )
    if not isinstance(own, nn.Linear):
        raise ValueError(f"Heads stand for a linear output layer; this model has {type(own).__name__}.")
    return own


def check_finite(own: nn.Linear) -> None:
    """Raise ValueError for NaN or infinite weights, before a head is made from them; reads them all."""
    if not all(torch.isfinite(part).all() for parameter in own.parameters() for part in parameter.split(4096)):
        raise ValueError("The head of this model holds NaN or infinite weights; load an intact checkpoint.")


class _Probe(nn.Module):
    """A head that says the same of every state: numbers from -50 to 50."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.linspace(-50, 50, 41).to(hidden).expand(*hidden.shape[:-1], -1)


def softcap_in_config(model: Any) -> float | None:
    """The cap of a model that soft-caps the logits of its head, as its config says."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


@torch.no_grad()
def softcap_of(model: Any) -> float | None:
    """The cap of a model that soft-caps the logits of its head, as its config says and a step of it confirms.

    Raises ValueError when the model changes its head's logits in another way: scales them, for one.
    """
    cap = softcap_in_config(model)
    with mounted(model, _Probe()) as probe:
        found = model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False).logits
    if not torch.allclose(found.float(), softcapped(probe(found), cap).float(), rtol=0.02):
        raise ValueError("This model changes its logits after the head, not by soft-capping alone; no head fits it.")
    return cap


# --- for a while ---


class attach:  # noqa: N801, it reads as the verb it is
    """Put `head` in the place of the model's own: `with lp.attach(model, head): model.generate(...)`.

    The swap happens at the call. `with` undoes it at the end of the block, also after an error; where there is no
    block, `lp.detach(model)` does. Then the model has its own module again: the same object, tied to the input
    embedding if it was. While a head is attached, `save_pretrained` and `resize_token_embeddings` are refused, and
    `generate` lets the head check the call (`Head.covering`).

    Raises ValueError when the model has another head already, when this one was made for another vocabulary,
    hidden size or model, and when the model does not take it.
    """

    def __init__(self, model: Any, head: Head):
        check(model, head)
        self.model, own = model, model.get_output_embeddings()
        _put(model, head)
        model.__dict__["_logitproc_own_head"] = own  # no submodule: it must not be saved or moved twice
        for name, method in _WHILE_ATTACHED.items():
            model.__dict__[name] = MethodType(method, model)

    def __enter__(self) -> Any:
        return self.model

    def __exit__(self, *error: object) -> None:
        detach(self.model)


def detach(model: Any) -> None:
    """Give a model its own head back, the same object. ValueError when none is attached."""
    if "_logitproc_own_head" not in model.__dict__:
        raise ValueError("No head is attached to this model.")
    _put(model, model.__dict__.pop("_logitproc_own_head"))
    for name in _WHILE_ATTACHED:
        del model.__dict__[name]


def check(model: Any, head: Head) -> None:
    """Raise ValueError unless `head` can take the place of this model's own."""
    if "_logitproc_own_head" in model.__dict__:
        raise ValueError("A head is attached to this model; lp.detach(model) first.")
    if getattr(model.config, "logitproc_head", None) is not None:
        raise ValueError("This model was converted already; convert the original model instead.")
    own = own_head(model)
    if (head.in_features, head.out_features) != (own.in_features, own.out_features):
        raise ValueError(
            f"This head maps {head.in_features} features to {head.out_features} tokens, the model's maps "
            f"{own.in_features} to {own.out_features}; fit one for this model."
        )
    if head.source and head.source != fingerprint(own.weight):
        raise ValueError(
            f"This head was fitted to other weights ({head.source[:12]}) than the model has "
            f"({fingerprint(own.weight)[:12]}); fit one for this model."
        )


def _put(model: Any, module: nn.Module) -> None:
    model.set_output_embeddings(module)
    if model.get_output_embeddings() is not module:  # it may do nothing, and say nothing
        raise ValueError(f"{type(model).__name__} does not let its output layer be replaced.")


def _refuse_save(model: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        "A head is attached to this model, and from_pretrained would not bring it back; save what "
        "lp.convert(model, head) returns, or lp.detach(model) first."
    )


def _refuse_resize(model: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError("This head was made for one vocabulary; resize the original model and fit a new head.")


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    with model.get_output_embeddings().covering(model, kwargs):
        return type(model).generate(model, *args, **kwargs)


_WHILE_ATTACHED = {
    "save_pretrained": _refuse_save, "resize_token_embeddings": _refuse_resize, "generate": _generate,
}  # fmt: skip


# --- for good ---


def convert(model: Any, head: Head) -> Any:
    """A model like `model` whose output layer is `head`, to be saved and loaded as any other.

    It shares the tensors of the body with `model`, which stays as it was; drop that to free its dense head.
    `save_pretrained` writes a folder that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`
    loads where logitproc is installed, bit-equal; after `lp.load_converted` or `lp.convert` of the same
    kind of model in the process, without `trust_remote_code`.

    Raises ValueError for what `attach` refuses, and for a class that `AutoModelForCausalLM` does not make.
    """
    check(model, head)
    config_class, model_class = converted_classes(model.config.model_type)
    if type(model) is not model_class.__bases__[0]:
        raise ValueError(f"{type(model).__name__} is not what AutoModelForCausalLM makes of its config.")
    settings = model.config.to_dict() | {"auto_map": _AUTO_MAP, "architectures": [model_class.__name__]}
    settings |= {"logitproc_head": {"kind": head.kind, "spec": head.spec, "source": head.source}}
    settings.pop("model_type")
    new: Any = model_class.__new__(model_class)
    new.__dict__.update(model.__dict__)
    new._modules = dict(model._modules)
    new.config = config_class.from_dict(settings)
    new.config._attn_implementation = model.config._attn_implementation
    new.all_tied_weights_keys = {}
    _put(new, _unshared(head, model))
    return new


@functools.cache
def converted_classes(model_type: str) -> tuple[Any, Any]:
    """(config class, model class) of converted models of that type, registered with transformers' Auto classes."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise unknown("type of causal language model", model_type, CONFIG_MAPPING)
    base_config: Any = CONFIG_MAPPING[model_type]
    base_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]

    class Config(base_config):
        def __init__(self, logitproc_head: dict[str, Any] | None = None, **settings: Any):
            self.logitproc_head = logitproc_head
            settings["tie_word_embeddings"] = False
            super().__init__(**settings)

    class Model(base_model):
        config_class = Config
        _tied_weights_keys = None

        def __init__(self, config: Any):
            super().__init__(config)
            head = Head.empty(**config.logitproc_head)
            _put(self, head)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            super()._init_weights(module)
            if isinstance(module, Head):  # transformers asks this of every tensor that a checkpoint lacks
                from transformers.initialization import zeros_

                for tensor in module.state_dict(keep_vars=True).values():
                    zeros_(tensor)

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
            super().save_pretrained(save_directory, *args, **kwargs)
            (Path(save_directory) / _CODE).write_text(_SOURCE.format(model_type=model_type), encoding="utf-8")

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            with self.get_output_embeddings().covering(self, kwargs):
                return super().generate(*args, **kwargs)

        resize_token_embeddings = _refuse_resize

    Config.model_type = f"{_PREFIX}{model_type}"
    Config.__name__ = Config.__qualname__ = f"Logitproc{base_config.__name__}"
    Model.__name__ = Model.__qualname__ = f"Logitproc{base_model.__name__}"
    AutoConfig.register(Config.model_type, Config, exist_ok=True)
    AutoModelForCausalLM.register(Config, Model, exist_ok=True)
    return Config, Model


_AUTO_MAP = {
    key: f"{_CODE[:-3]}.{name}" for key, name in (("AutoConfig", "Config"), ("AutoModelForCausalLM", "Model"))
}


def recognise(folder: str | Path) -> None:
    """Let transformers' Auto classes know the kind of model in `folder`, if it is a converted one."""
    from transformers import PreTrainedConfig

    model_type = PreTrainedConfig.get_config_dict(folder)[0].get("model_type", "")
    if model_type.startswith(_PREFIX):
        converted_classes(model_type.removeprefix(_PREFIX))


def load_converted(folder: str | Path, **kwargs: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained(folder, **kwargs)` for what a converted model saved, a plain one too."""
    from transformers import AutoModelForCausalLM

    recognise(folder)
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def _unshared(head: Head, model: nn.Module) -> Head:
    """The head; with tensors of its own where it shares them with the model's body, so that it can be saved."""
    own = model.get_output_embeddings()  # type: ignore[operator]
    body = {p.data_ptr() for name, p in model.named_parameters() if not any(p is q for q in own.parameters())}
    body |= {p.data_ptr() for p in model.get_input_embeddings().parameters()}  # type: ignore[operator]
    if not any(p.data_ptr() in body for p in head.parameters()):
        return head
    with torch.no_grad():
        new = Head.empty(head.kind, head.spec, head.source)
        new.load_state_dict({key: value.clone() for key, value in head.state_dict().items()}, assign=True)
    return new

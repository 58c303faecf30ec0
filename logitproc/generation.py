"""`generate`: transformers' own `model.generate` with a chain bound to its prompt."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from .chain import Chain

_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def generate(
    model: PreTrainedModel,
    chain: Chain,
    *,
    tokenizer: Any = None,
    logits_processor: list[LogitsProcessor] | None = None,
    **kwargs: Any,
) -> Any:
    """`model.generate(**kwargs)` through a chain; returns what `model.generate` returns.

    Over `logits_processor=[chain]` it adds: the attention mask hides padding from the chain (without one,
    the pad token does, as transformers assumes), prompt tokens are told from generated ones, beams are
    renormalised after the chain, and whatever the chain cannot do is refused with one sentence (ValueError)
    before the first token. With `tokenizer`, fitted parts are checked against it (it is also handed to
    `model.generate`, for stop strings). Other `logits_processor`s run after the chain.
    """
    config: GenerationConfig | None = kwargs.get("generation_config")

    def setting(key: str) -> Any:  # in the order in which transformers lets one overrule the other
        values = (kwargs.get(key), getattr(config, key, None), getattr(model.generation_config, key, None))
        return next((value for value in values if value is not None), None)

    if setting("cache_implementation") == "paged":
        raise ValueError("Continuous batching runs no logits processors; take another cache_implementation.")
    beams = (setting("num_beams") or 1) > 1
    assisted = any(setting(key) for key in _ASSISTED)
    chain.require(beams=beams, assisted=assisted)
    chain.check(width=_width(model), tokenizer=tokenizer)
    if beams and config is not None:  # beam scores are sums of log-probabilities
        kwargs["generation_config"] = copy.deepcopy(config)
        kwargs["generation_config"].renormalize_logits = True
    elif beams:
        kwargs["renormalize_logits"] = True
    if tokenizer is not None:
        kwargs["tokenizer"] = tokenizer
    prompt, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    if prompt is None:
        prompt = kwargs.get("inputs")
    if chain.companions and (prompt is None or model.config.is_encoder_decoder):
        kind = "an encoder-decoder shows it" if model.config.is_encoder_decoder else "a prompt of embeddings shows"
        raise ValueError(
            f"The companions of this chain cannot read the prompt: {kind} no tokens of it. Pass input_ids to a "
            "decoder-only model."
        )
    if prompt is not None and not model.config.is_encoder_decoder:
        if mask is None:
            mask = _assumed_mask(prompt, setting("pad_token_id"), setting("eos_token_id"))
        bound: LogitsProcessor = chain.bind(prompt, mask)
    else:  # inputs_embeds and encoders: the history that arrives holds generated ids only
        bound = chain
    processors = [bound, *(logits_processor or [])]
    return model.generate(logits_processor=processors, **kwargs)  # type: ignore[operator]


def _assumed_mask(prompt: Tensor, pad: int | None, eos: int | list[int] | None) -> Tensor | None:
    """The mask transformers assumes when none is given: all but pads, unless a pad may be an end of text."""
    ends = eos if isinstance(eos, list) else [eos]
    return None if pad is None or pad in ends else prompt != pad


def _width(model: PreTrainedModel) -> int | None:
    head = model.get_output_embeddings()
    return None if head is None or head.weight is None else head.weight.shape[0]


def seed_everything(seed: int) -> None:
    """Seed the generators that `model.generate` draws from."""
    torch.manual_seed(seed)

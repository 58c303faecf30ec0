"""`generate`: transformers' own `model.generate` with a chain bound to its prompt."""

from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from .chain import Chain


def generate(
    model: PreTrainedModel,
    chain: Chain,
    *,
    tokenizer: Any = None,
    logits_processor: list[LogitsProcessor] | None = None,
    **kwargs: Any,
) -> Any:
    """`model.generate(**kwargs)` through a chain; returns what `model.generate` returns.

    Over `logits_processor=[chain]` it adds: the attention mask hides padding from the chain, prompt
    tokens are told from generated ones, beams are renormalised after the chain, and whatever the chain
    cannot do is refused with one sentence (ValueError) before the first token. With `tokenizer`, fitted
    parts are checked against it (it is also handed to `model.generate`, for stop strings). Other
    `logits_processor`s run after the chain.
    """
    given = kwargs.get("generation_config") or model.generation_config or GenerationConfig()
    setting = lambda key: kwargs[key] if kwargs.get(key) is not None else getattr(given, key, None)
    beams = (setting("num_beams") or 1) > 1
    assisted = kwargs.get("assistant_model") is not None or bool(setting("prompt_lookup_num_tokens"))
    chain.require(beams=beams, assisted=assisted)
    chain.check(width=_width(model), tokenizer=tokenizer)
    if beams:
        kwargs["renormalize_logits"] = True  # beam scores are sums of log-probabilities
    if tokenizer is not None:
        kwargs["tokenizer"] = tokenizer
    prompt = kwargs.get("input_ids", kwargs.get("inputs"))
    if prompt is not None and not model.config.is_encoder_decoder:
        bound: LogitsProcessor = chain.bind(prompt, kwargs.get("attention_mask"))
    else:  # inputs_embeds and encoders: the history that arrives holds generated ids only
        bound = chain
    return model.generate(logits_processor=[bound, *(logits_processor or [])], **kwargs)


def _width(model: PreTrainedModel) -> int | None:
    head = model.get_output_embeddings()
    return None if head is None or head.weight is None else head.weight.shape[0]


def seed_everything(seed: int) -> None:
    """Seed the generators that `model.generate` draws from."""
    torch.manual_seed(seed)

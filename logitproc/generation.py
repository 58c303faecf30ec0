"""`generate`: transformers' own `model.generate` with a chain bound to its prompt."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from .chain import BoundChain, Chain
from .companion import Companion
from .speculative import Decoder, Speculation

_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
_NEW_TOKENS = 20  # what transformers generates, within the model's context, when no length is asked for


def generate(
    model: PreTrainedModel,
    chain: Chain,
    *,
    tokenizer: Any = None,
    logits_processor: list[LogitsProcessor] | None = None,
    speculative: bool | Speculation | None = False,
    **kwargs: Any,
) -> Any:
    """`model.generate(**kwargs)` through a chain; returns what `model.generate` returns.

    Over `logits_processor=[chain]` it adds: the attention mask hides padding from the chain and its companions
    (without one, the pad token does, as transformers assumes), prompt tokens are told from generated ones, beams
    are renormalised after the chain, and whatever the chain cannot do is refused with one sentence (ValueError)
    before the first token. With `tokenizer`, fitted parts and companions are checked against it (it is also
    handed to `model.generate`, for stop strings). Other `logits_processor`s run after the chain.

    `speculative`: a companion drafts several tokens and the models check them in one pass each. The text is
    what it would be otherwise: the very same if greedy, up to rounding, of the same distribution if sampled.
    One prompt at a time, token ids only as the result; a `Speculation` sets the draft and counts.
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
    prompt, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    if prompt is None:
        prompt = kwargs.get("inputs")
    if model.config.is_encoder_decoder:  # and its prompt is not what processors see
        prompt = None
    speculation = Speculation() if speculative is True else speculative or None
    companions = chain.companions
    if speculation:
        _check_speculation(prompt, beams, assisted, setting)
        draft = speculation.drafter(chain)
        if draft not in companions:
            _check_fit(draft, _width(model), tokenizer)
            companions.append(draft)
    if companions:
        _check_prompt(companions, model, prompt, mask, setting, needed=bool(speculation))
    if beams and config is not None:  # beam scores are sums of log-probabilities
        kwargs["generation_config"] = copy.deepcopy(config)
        kwargs["generation_config"].renormalize_logits = True
    elif beams:
        kwargs["renormalize_logits"] = True
    if tokenizer is not None:
        kwargs["tokenizer"] = tokenizer
    if prompt is not None:
        if mask is None:
            mask = _assumed_mask(prompt, setting("pad_token_id"), setting("eos_token_id"))
        bound: Chain | BoundChain = chain.bind(prompt, mask)
    else:  # inputs_embeds and encoders: the history that arrives holds generated ids only
        bound = chain
    if speculation:
        assert isinstance(bound, BoundChain)  # there is a prompt of tokens
        kwargs["custom_generate"] = Decoder(bound, speculation, kwargs.pop("streamer", None))
    with contextlib.ExitStack() as stack:
        continued = not (beams or assisted or speculation)  # each step continues the one before
        if continued and isinstance(bound, BoundChain) and _runs_behind(model):
            stack.enter_context(bound.lagging())
            stack.enter_context(_overlapping(model, companions))
        return model.generate(  # type: ignore[operator]
            logits_processor=[bound, *(logits_processor or [])], **kwargs
        )


def _runs_behind(model: PreTrainedModel) -> bool:
    """Whether the device works off what the host asks for later, so that the host should not wait for it."""
    return model.device.type == "cuda"


@contextlib.contextmanager
def _overlapping(model: PreTrainedModel, companions: list[Companion]) -> Iterator[None]:
    """Each pass of the model over one token a row first starts the companions on that token."""

    def start(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        if ids is None or ids.shape[1] != 1 or torch.compiler.is_compiling():
            return
        for companion in companions:
            companion.start(ids)

    if any(companion.model is model for companion in companions):  # its own passes would start them, too
        yield
        return
    hook = model.register_forward_pre_hook(start, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _check_prompt(
    companions: list[Companion], model: PreTrainedModel, prompt: Tensor | None, mask: Tensor | None,
    setting: Callable[[str], Any], needed: bool,
) -> None:  # fmt: skip
    """Raise ValueError for a prompt that companions cannot read, or not to the end of what is asked for."""
    if prompt is None:
        kind = "an encoder-decoder" if model.config.is_encoder_decoder else "a prompt of embeddings"
        raise ValueError(
            f"Companions read the tokens of the prompt, and {kind} shows them none; pass input_ids to a "
            "decoder-only model."
        )
    if not prompt.shape[1]:
        raise ValueError("The prompt holds no token; begin with BOS.")
    if mask is not None and bool((mask[:, -1] == 0).any()):
        raise ValueError("A prompt ends in padding; pad prompts on the left (padding_side='left').")
    length = prompt.shape[1] if mask is None else int(mask.sum(1).max())
    new, most = setting("max_new_tokens"), setting("max_length")
    if new is not None:
        total = length + new
    elif most is not None:
        total = max(most, length + 1)
    else:
        total = min(length + _NEW_TOKENS, getattr(model.config, "max_position_embeddings", None) or math.inf)
    for companion in companions:
        if companion.prompt is None:
            companion.check_length(total, needed=needed)


def _check_fit(draft: Companion, width: int | None, tokenizer: Any) -> None:
    """Raise ValueError for a draft of another vocabulary; those of the chain are checked with it."""
    if tokenizer is not None:
        draft.check_tokenizer(tokenizer)
    if width is not None:
        draft.check_width(width)


def _check_speculation(
    prompt: Tensor | None, beams: bool, assisted: bool, setting: Callable[[str], Any]
) -> None:
    """Raise ValueError for what speculative decoding does not do."""
    rows = 0 if prompt is None else prompt.shape[0] * (setting("num_return_sequences") or 1)
    if beams or rows != 1:
        raise ValueError(
            f"Speculation decodes one sequence without beams, got {rows} sequences of {setting('num_beams') or 1} "
            "beams; leave beams out and give prompts one at a time."
        )
    if assisted:
        raise ValueError(
            "Speculation and assisted decoding exclude each other; the draft is a companion here."
        )
    if setting("return_dict_in_generate"):
        raise ValueError("Speculation returns token ids and does not support return_dict_in_generate; leave it out.")
    if setting("stop_strings"):
        raise ValueError(
            "Speculation does not support stop_strings; pass transformers' "
            "stopping_criteria=[StopStringCriteria(tokenizer, strings)]."
        )


def _assumed_mask(prompt: Tensor, pad: int | None, eos: int | list[int] | None) -> Tensor | None:
    """The mask transformers assumes when none is given: all but pads, unless a pad may be an end of text."""
    ends = eos if isinstance(eos, list) else [eos]
    return None if pad is None or pad in ends else prompt != pad


def _width(model: PreTrainedModel) -> int | None:
    head = model.get_output_embeddings()
    return getattr(head, "out_features", None)  # of a linear layer and of a `Head`; None where there is neither


def seed_everything(seed: int) -> None:
    """Seed the generators that `model.generate` draws from."""
    torch.manual_seed(seed)


def decode(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    """The text of `ids` after `prompt`. Decoded alone, it would lose the space that it begins with."""
    text = lambda tokens: tokenizer.decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    before, whole = text(prompt), text(prompt + ids)
    return whole[len(before) :] if whole.startswith(before) else text(ids)

"""Models as large as those that chains are for: the shape of Llama 3, random weights, bfloat16."""

from typing import Any

import psutil
import torch
from speed_cases import LENGTH
from stopwatch import Call
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

LLAMA = {  # hidden, intermediate, layers, heads, key-value heads, tied head
    "1B": (2048, 8192, 16, 32, 8, True),
    "8B": (4096, 14_336, 32, 32, 8, False),
}


def empty(name: str, vocabulary: int) -> Any:
    """The model without its weights."""
    hidden, intermediate, layers, heads, kv_heads, tied = LLAMA[name]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied, max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def size(name: str, vocabulary: int) -> int:
    """Bytes of its weights."""
    return sum(p.nbytes for p in empty(name, vocabulary).parameters())


def made(name: str, vocabulary: int, device: str) -> Any:
    """The model on a device; its random weights are one block again and again, which is made fast."""
    model = empty(name, vocabulary).to_empty(device=device)
    model.tie_weights()
    block = (0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))).to(device, torch.bfloat16)
    for parameter in model.parameters():
        for part in parameter.data.view(-1).split(len(block)):
            part.copy_(block[: len(part)])
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)  # its buffers are no parameters
    return model


def one_token(model: Any, vocabulary: int, batch: int) -> Call:
    """A forward pass of one token a row after LENGTH others, with so many rows of the output head."""
    config, device = model.config, model.device
    head = torch.nn.Linear(1, 1, bias=False)
    head.weight = torch.nn.Parameter(model.get_output_embeddings().weight[:vocabulary], requires_grad=False)
    cache, width = DynamicCache(), config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        keys, values = torch.randn(2, batch, config.num_key_value_heads, LENGTH, width, device=device).bfloat16()
        cache.update(keys, values, layer)
    ids = torch.arange(batch, device=device)[:, None]

    def call(i: int) -> torch.Tensor:
        hidden = model.model(input_ids=ids, past_key_values=cache, use_cache=True)[0]
        cache.crop(-1)
        return head(hidden[:, -1])

    return call


def free_memory(device: str) -> int:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available

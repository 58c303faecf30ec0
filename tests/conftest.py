"""Tiny random models and a tokenizer for all tests: an odd vocabulary, nothing downloaded."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; triton reads it when it is imported
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WIDTH = 97
torch.set_num_threads(1)  # threads that wait for each other cost such small models more than they save


def tiny_model(seed: int = 0, width: int = WIDTH) -> LlamaForCausalLM:
    """A random Llama that never ends a text; its weights are large, so that its scores differ clearly."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=width, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, initializer_range=0.4, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer(size: int = WIDTH, **special: str) -> PreTrainedTokenizerFast:
    """Words w3, w4, ... after <pad>, <s> and </s>."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, size))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=backend, **marks)


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    return tiny_model()


@pytest.fixture(scope="session")
def draft() -> LlamaForCausalLM:
    """Another model of the same vocabulary, for assisted decoding."""
    return tiny_model(seed=1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()

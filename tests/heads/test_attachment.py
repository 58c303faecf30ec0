import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
)  # fmt: skip

import logitproc as lp
from logitproc.heads import KINDS, RefinedHead, ScreenedHead, converted_classes

V, D = 67, 16
SMALL = {
    "vocab_size": V,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.4,
}
BODY = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
ROWS = {"num_key_value_heads": 2, "max_position_embeddings": 64}
CONFIGS = {
    "llama": lambda tied: LlamaConfig(**SMALL, **BODY, **ROWS, tie_word_embeddings=tied),
    "qwen2": lambda tied: Qwen2Config(**SMALL, **BODY, **ROWS, tie_word_embeddings=tied),
    "gpt2": lambda tied: GPT2Config(
        **SMALL, n_embd=D, n_layer=1, n_head=2, n_positions=64, tie_word_embeddings=tied
    ),
}
PROMPT = torch.tensor([[5, 6, 7, 5, 6, 7]])


def model(kind="llama", tied=False, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[kind](tied), dtype=dtype).eval()


def head_for(made, kind="weighted", codes=20, **shape):
    random = torch.Generator().manual_seed(0)
    weight = made.get_output_embeddings().weight
    mapping = torch.randint(0, codes, (V,), generator=random)
    mapping[:codes] = torch.arange(codes)
    bias = None if kind == "paper" else torch.randn(V, generator=random)
    head = KINDS[kind].build(weight[:codes], mapping, bias, dtype=weight.dtype)
    return head


def every_model():
    return pytest.mark.parametrize(
        ("kind", "tied"), [(kind, tied) for kind in CONFIGS for tied in (False, True)]
    )


# --- attach ---


@every_model()
def test_a_model_speaks_through_an_attached_head_and_gets_its_own_back(kind, tied):
    made = model(kind, tied)
    own, before = made.get_output_embeddings(), made(PROMPT).logits
    head = head_for(made)
    with lp.attach(made, head) as attached:
        assert attached is made and made.get_output_embeddings() is head
        states = made.base_model(PROMPT).last_hidden_state
        assert torch.equal(made(PROMPT).logits, head(states))
        assert not torch.equal(made(PROMPT).logits, before)
    assert made.get_output_embeddings() is own
    assert (own.weight is made.get_input_embeddings().weight) == tied
    assert torch.equal(made(PROMPT).logits, before)
    assert not {"save_pretrained", "resize_token_embeddings", "_logitproc_own_head"} & set(made.__dict__)


def test_the_own_head_returns_after_an_error_and_by_detach():
    made = model()
    own, names = made.get_output_embeddings(), dict(made.named_parameters()).keys()
    with pytest.raises(RuntimeError), lp.attach(made, head_for(made)):
        raise RuntimeError
    assert made.get_output_embeddings() is own
    lp.attach(made, head_for(made))
    lp.detach(made)
    assert made.get_output_embeddings() is own and dict(made.named_parameters()).keys() == names
    with pytest.raises(ValueError, match="No head is attached"):
        lp.detach(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_runs_greedy_sampled_with_beams_and_assisted(dtype):
    made, draft = model(dtype=dtype), model(dtype=dtype, seed=1)
    with lp.attach(made, head_for(made)):
        settings = ({}, {"do_sample": True, "top_k": 5}, {"num_beams": 3}, {"assistant_model": draft})
        greedy, _, _, assisted = (made.generate(PROMPT, max_new_tokens=8, **more) for more in settings)
        assert greedy.shape == (1, 14)
        assert torch.equal(greedy, assisted)
        chain = lp.Chain([lp.get("vq").example(V)])
        assert lp.generate(made, chain, input_ids=PROMPT, max_new_tokens=3).shape == (1, 9)


def test_all_forms_of_logits_to_keep_work():
    made = model()
    with lp.attach(made, head_for(made)):
        whole = made(PROMPT).logits
        assert torch.equal(made(PROMPT, logits_to_keep=2).logits, whole[:, -2:])
        assert torch.equal(made(PROMPT, logits_to_keep=torch.tensor([1, 3])).logits, whole[:, [1, 3]])


@pytest.mark.parametrize("mount", [lp.attach, lp.convert])
def test_the_weights_that_a_head_replaces_are_not_searched_for_nan(mount):
    made = model()
    head = head_for(made)
    made.lm_head.weight.data[-1] = torch.nan
    mounted = mount(made, head)
    speaker = made if mount is lp.attach else mounted
    assert speaker(PROMPT).logits.isfinite().all()


# --- convert ---


@every_model()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_converted_model_loads_bit_equal_with_nothing_missing(kind, tied, dtype, tmp_path):
    made = model(kind, tied, dtype)
    before = made(PROMPT).logits
    converted = lp.convert(made, head_for(made))
    expected = converted(PROMPT).logits
    converted.save_pretrained(tmp_path / "m")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True, dtype=dtype)
    assert type(loaded) is type(converted)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(PROMPT).logits, expected)
    theirs = loaded.state_dict()
    assert {k: v.dtype for k, v in converted.state_dict().items()} == {k: v.dtype for k, v in theirs.items()}
    assert torch.equal(made(PROMPT).logits, before), "the original stays as it was"
    assert torch.equal(
        converted.generate(PROMPT, max_new_tokens=6), loaded.generate(PROMPT, max_new_tokens=6)
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["tiebreak", "residual", "refine", "screened", "int8"])
def test_every_kind_of_head_can_be_converted(kind, tied, tmp_path):
    made, random = model(tied=tied), torch.Generator().manual_seed(0)
    weight = made.get_output_embeddings().weight
    draw = lambda *shape: torch.randn(*shape, generator=random)
    head = {
        "tiebreak": lambda: KINDS["tiebreak"].build(
            draw(9, D), torch.randint(0, 9, (V,)), draw(V), draw(V, 3), draw(3, D)
        ),
        "residual": lambda: KINDS["residual"].build(draw(8, D), torch.randint(0, 8, (2, V)), draw(V)),
        "refine": lambda: RefinedHead.of(head_for(made), weight, best=5),
        "screened": lambda: ScreenedHead.of(weight, None, draw(D, D).square(), directions=4),
        "int8": lambda: KINDS["int8"].of(weight),
    }[kind]()
    converted = lp.convert(made, head)
    converted.save_pretrained(tmp_path / "m")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded(PROMPT).logits, converted(PROMPT).logits)


def test_a_fresh_process_loads_it_by_the_code_in_its_folder(tmp_path):
    made = model("qwen2", tied=True)
    converted = lp.convert(made, head_for(made))
    converted.save_pretrained(tmp_path / "m")
    torch.save(converted(PROMPT).logits, tmp_path / "logits.pt")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "loaded = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "with torch.no_grad(): found = loaded(torch.tensor([[5, 6, 7, 5, 6, 7]])).logits\n"
        "assert torch.equal(found, torch.load(sys.argv[2]))\n"
    )
    environment = {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "PYTHONPATH": str(Path(lp.__file__).parents[1]),
    }
    command = [sys.executable, "-c", code, str(tmp_path / "m"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "m/config.json").read_text())["model_type"] == "logitproc_qwen2"


def test_loading_registers_the_classes_a_converted_model_needs(tmp_path):
    made = model()
    lp.convert(made, head_for(made)).save_pretrained(tmp_path / "m")
    converted_classes.cache_clear()
    assert type(lp.load_converted(tmp_path / "m")).__name__ == "LogitprocLlamaForCausalLM"


def test_a_plain_model_loads_through_the_same_door(tmp_path):
    made = model()
    made.save_pretrained(tmp_path / "m")
    assert type(lp.load_converted(tmp_path / "m")) is LlamaForCausalLM


# --- bad input ---


def test_bad_input_is_refused_in_one_sentence(tmp_path):
    made = model()
    head = head_for(made)
    converted = lp.convert(made, head)
    for act in (lp.attach, lp.convert):
        with pytest.raises(ValueError, match="converted already"):
            act(converted, head)
        with pytest.raises(ValueError, match="maps 16 features to 50 tokens, the model's maps 16 to 67"):
            act(made, KINDS["paper"].build(torch.zeros(4, D), torch.zeros(50)))
        other = head_for(made)
        other.source = "0" * 64
        with pytest.raises(ValueError, match="fitted to other weights"):
            act(made, other)
    for make in (lp.ExactHead.of, lambda model: lp.VQHead.fit(model, [], codes=8)):
        with pytest.raises(ValueError, match="a head of kind 'weighted' in place of its own; take the original"):
            make(converted)
    with lp.attach(made, head):
        with pytest.raises(ValueError, match="A head is attached"):
            lp.attach(made, head)
        with pytest.raises(ValueError, match="from_pretrained would not bring it back"):
            made.save_pretrained(tmp_path / "m")
        with pytest.raises(ValueError, match="resize the original model"):
            made.resize_token_embeddings(80)
    with pytest.raises(ValueError, match="resize the original model"):
        converted.resize_token_embeddings(80)
    assert not (tmp_path / "m").exists()
    deaf = model()
    deaf.set_output_embeddings = lambda new: None
    with pytest.raises(ValueError, match="does not let its output layer be replaced"):
        lp.attach(deaf, head)


def test_a_head_that_keeps_the_weights_says_whose_they_are():
    made, other = model(), model(seed=1)
    head = KINDS["dense"].of(other.get_output_embeddings().weight)
    with pytest.raises(ValueError, match="fitted to other weights"):
        lp.attach(made, head)
    with lp.attach(other, head):
        assert torch.isfinite(other(PROMPT).logits).all()

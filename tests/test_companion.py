"""A companion is a pure function of the text: whatever it keeps, cached equals uncached."""

import hashlib
import random
import re
import threading
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from conftest import WIDTH, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import logitproc as lp
from logitproc import companion as module
from logitproc.companion import Companion, CompanionDesync, ContextOverflow, find_parents, tiny_companion

KINDS = ("rope", "gpt2")


def make_model(
    kind: str = "rope", seed: int = 0, width: int = WIDTH, context: int = 128, layers: int = 3, **more
):
    torch.manual_seed(seed)
    marks = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0} | more
    if kind == "gpt2":
        config = GPT2Config(vocab_size=width, n_positions=context, n_embd=16, n_layer=layers, n_head=2,
                            initializer_range=0.4, **marks)  # fmt: skip
        return GPT2LMHeadModel(config).eval()
    sizes = {"vocab_size": width, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers,
             "num_attention_heads": 2, "max_position_embeddings": context, "initializer_range": 0.4}  # fmt: skip
    if kind == "window":
        return MistralForCausalLM(
            MistralConfig(**sizes, num_key_value_heads=2, sliding_window=8, **marks)
        ).eval()
    return LlamaForCausalLM(LlamaConfig(**sizes, **marks)).eval()


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@torch.no_grad()
def truth(model, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits after the last token, each row alone and without its padding."""
    keep = torch.ones_like(ids) if mask is None else mask
    return torch.cat([model(row[m.bool()][None]).logits[:, -1] for row, m in zip(ids, keep, strict=True)])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def texts(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, WIDTH, (rows, length), generator=torch.Generator().manual_seed(seed))


@dataclass(eq=False)
class FollowLogitsProcessor(lp.Processor):
    """Adds what its companions think."""

    first: Companion | None = None
    more: tuple[Companion, ...] = ()
    weight: float = 1.0
    context: ClassVar = None
    companions: ClassVar = ("first", "more")

    def step(self, tokens, scores, *advice):
        for part in advice:
            scores = scores + self.weight * part.log_softmax(-1)
        return scores


class Watched(Companion):
    """Compares every result with that of the bare model."""

    def __call__(self, input_ids, attention_mask=None, positions=None, generated=None):
        found = super().__call__(input_ids, attention_mask, positions, generated)
        if positions is None:
            mask = self._mask(input_ids, attention_mask)
            close(found, truth(self.model, input_ids, mask))
            self.checked = getattr(self, "checked", 0) + 1
        return found


def generate(host, chain, ids=None, **options):
    ids = texts(1, 5) if ids is None else ids
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False} | options
    return lp.generate(host, chain, input_ids=ids, **options)


# --- cached equals uncached ---


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_every_one_of_forty_steps_equals_the_bare_model(kind, rows, sample, model):
    watched = Watched(make_model(kind))
    ids = texts(rows, 4)
    out = generate(
        model, lp.Chain([FollowLogitsProcessor(watched)]), ids, max_new_tokens=40, do_sample=sample
    )
    assert out.shape == (rows, 44)
    assert watched.checked == watched.forwards == 40


@pytest.mark.parametrize("options", [
    {"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 3},
    {"do_sample": True, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3},
])  # fmt: skip
def test_beams_and_several_sequences_equal_the_bare_model_at_every_step(kind, options, model):
    made = make_model(kind)
    runs = []
    for companion in (Watched(made), Companion(made, cache=False)):
        torch.manual_seed(0)
        runs.append(generate(model, lp.Chain([FollowLogitsProcessor(companion)]), texts(2, 5), **options))
    assert torch.equal(*runs)


def test_a_beam_continues_its_parent_instead_of_the_prompt(model, monkeypatch):
    companion, fed = Companion(make_model()), []
    forward = companion._forward
    monkeypatch.setattr(
        companion,
        "_forward",
        lambda ids, kept, *more: fed.append(ids.shape[1] - kept) or forward(ids, kept, *more),
    )
    generate(model, lp.Chain([FollowLogitsProcessor(companion)]), num_beams=4)
    assert fed == [5] + [1] * 11


def test_assisted_decoding_rolls_back_and_gives_the_unassisted_text(kind, model, draft):
    watched = Watched(make_model(kind))
    chain = lp.Chain([FollowLogitsProcessor(watched, weight=0.3)])
    plain = generate(model, chain)
    assert torch.equal(generate(model, chain, assistant_model=draft), plain)
    assert torch.equal(generate(model, chain, prompt_lookup_num_tokens=3), plain)


@pytest.mark.parametrize("kind", [*KINDS, "window"])
def test_two_hundred_random_calls_equal_the_bare_model(kind):
    """Extend, crop, permute, repeat, drop rows, new prompts, the same again, several positions."""
    rng, made = random.Random(0), make_model(kind)
    companion, ids = Companion(made), texts(2, 5)
    for step in range(200):
        action = rng.choice(["extend", "extend", "extend", "crop", "rows", "new", "same", "long"])
        if action == "extend" and ids.shape[1] < 40:
            ids = torch.cat([ids, texts(len(ids), rng.choice([1, 1, 1, 3]), seed=step)], 1)
        elif action == "crop":
            ids = ids[:, : rng.randint(1, ids.shape[1])]
        elif action == "rows":
            ids = ids[[rng.randrange(len(ids)) for _ in range(rng.randint(1, 4))]]
            if rng.random() < 0.7:
                ids = torch.cat([ids, texts(len(ids), 1, seed=step)], 1)
        elif action == "new":
            ids = texts(rng.randint(1, 3), rng.randint(1, 9), seed=step)
        if action == "long":
            count = rng.randint(1, min(4, ids.shape[1]))
            found = companion(ids, positions=count)
            for k in range(count):
                close(found[:, k], truth(made, ids[:, : ids.shape[1] - count + 1 + k]))
        else:
            close(companion(ids), truth(made, ids))
        if rng.random() < 0.05:
            companion.reset()


def test_a_text_by_chance_one_token_longer_is_a_new_prompt(kind):
    made = make_model(kind)
    companion, first = Companion(made), texts(2, 5)
    for ids in (first, texts(2, 6, 1), texts(2, 6, 2), texts(2, 3, 3), texts(1, 3, 4), first):
        close(companion(ids), truth(made, ids))


def test_it_is_told_nothing_between_generations_and_a_fork_shares_weights_only(model):
    made = make_model()
    used = lp.Chain([FollowLogitsProcessor(Companion(made))])
    for seed in range(3):
        ids = texts(2, 4 + seed, seed)
        fresh = lp.Chain([FollowLogitsProcessor(Companion(made))])
        assert torch.equal(generate(model, used, ids), generate(model, fresh, ids))
    companion = used.companions[0]
    twin = companion.fork()
    assert [p.data_ptr() for p in twin.model.parameters()] == [p.data_ptr() for p in made.parameters()]
    assert twin._state is None and companion._state is not None
    twin(texts(1, 3))
    assert companion._state.history.shape[0] == 2


def test_two_processors_and_two_chains_share_a_companion_and_pay_once(model):
    made = make_model()
    shared, ids = Companion(made), texts(2, 5)
    one = lp.Chain([FollowLogitsProcessor(shared), FollowLogitsProcessor(shared, weight=-0.5)])
    two = lp.Chain(
        [FollowLogitsProcessor(Companion(made)), FollowLogitsProcessor(Companion(made), weight=-0.5)]
    )
    assert torch.equal(generate(model, one, ids), generate(model, two, ids))
    assert shared.forwards == 12
    pair = [lp.Chain([FollowLogitsProcessor(shared)]), lp.Chain([FollowLogitsProcessor(shared)])]
    shared.forwards = 0
    mask = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    model.generate(ids, logits_processor=pair, **mask)
    assert shared.forwards == 6


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_in_the_middle_of_a_model_costs_a_prefill_and_no_wrong_answer(kind, error, monkeypatch):
    made = make_model(kind)
    companion, ids = Companion(made), texts(2, 9)
    for length in range(4, 8):
        companion(ids[:, :length])
    middle = made.transformer.h[1] if kind == "gpt2" else made.model.layers[1]
    with monkeypatch.context() as broken:
        broken.setattr(middle, "forward", lambda *a, **k: (_ for _ in ()).throw(error("broken")))
        with pytest.raises(error):
            companion(ids[:, :8])
    close(companion(ids[:, :8]), truth(made, ids[:, :8]))
    close(companion(ids), truth(made, ids))


def test_several_positions_equal_as_many_calls_and_a_memo_is_left_alone(kind):
    made = make_model(kind)
    companion, ids = Companion(made), texts(2, 12)
    four = companion(ids, positions=4)
    for k in range(4):
        close(four[:, k], companion(ids[:, : 9 + k]))
    rolled = torch.cat([ids[:, :9], texts(2, 2, 1)], 1)
    again = companion(rolled, positions=4)
    for k in range(4):
        close(again[:, k], truth(made, rolled[:, : 8 + k]))
    digest = lambda t: hashlib.sha256(t.numpy().tobytes()).hexdigest()
    before = digest(companion(rolled))
    FollowLogitsProcessor(companion)(rolled, torch.randn(2, WIDTH))
    assert digest(companion(rolled)) == before
    with pytest.raises(ValueError, match="positions must be from 1 to the length 11, got 12"):
        companion(rolled, positions=12)


def test_the_sliding_window_of_a_model_is_kept_and_can_be_rolled_back():
    made = make_model("window")
    companion, ids = Companion(made), texts(2, 40)
    for length in (*range(3, 40), 20, 21, 40):
        close(companion(ids[:, :length]), truth(made, ids[:, :length]))


def test_a_rope_that_grows_with_the_text_is_not_cached():
    made = make_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, context=16)
    companion, ids = Companion(made), texts(1, 16)
    for length in range(4, 16):
        close(companion(ids[:, :length]), truth(made, ids[:, :length]))
    assert companion.memory()["cache"] == 0


def test_layers_that_cannot_be_cut_back_are_not_cached():
    sizes = dict(vocab_size=WIDTH, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    made = Lfm2ForCausalLM(Lfm2Config(**sizes, num_key_value_heads=2, block_multiple_of=16, bos_token_id=1,
                                      eos_token_id=None, layer_types=["conv", "full_attention"])).eval()  # fmt: skip
    companion, (ids, mask) = Companion(made), padded_batch()
    for length in (5, 6, 7, 6):
        part = ids[:2, :length], mask[:2, :length]
        close(companion(*part), truth(made, *part))
    assert companion.memory()["cache"] == 0


def test_calls_from_many_threads_take_turns():
    made = make_model()
    companion, jobs, failures = Companion(made), [texts(2, 6, seed) for seed in range(8)], []

    def work(ids: Tensor) -> None:
        for length in range(2, 7):
            if not torch.allclose(companion(ids[:, :length]), truth(made, ids[:, :length]), atol=1e-4):
                failures.append(length)

    threads = [threading.Thread(target=work, args=(ids,)) for ids in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_parents_are_rows_that_begin_alike():
    old = torch.tensor([[1, 2, 3], [1, 2, 4], [5, 6, 7]])
    assert find_parents(old, torch.tensor([[1, 2, 4], [5, 6, 7], [1, 2, 4]])).tolist() == [1, 2, 1]
    assert find_parents(old, torch.tensor([[1, 2]])).tolist() == [0], "at ties any, so the first"
    assert find_parents(old, torch.tensor([[1, 2], [5, 7]])) is None
    assert find_parents(old, torch.tensor([[1, 2, 3, 4]])) is None


# --- without waiting for the device ---


def test_lagging_gives_the_same_and_raises_a_step_late(kind):
    made = make_model(kind)
    companion, ids = Companion(made), texts(2, 9)
    with companion.lagging():
        for length in range(3, 10):
            close(companion(ids[:, :length]), truth(made, ids[:, :length]))
            close(companion(ids[:, :length]), truth(made, ids[:, :length]))
    assert companion.forwards == 7
    wrong = texts(2, 6, 1)
    with pytest.raises(CompanionDesync, match="Call reset"), companion.lagging():
        companion(ids[:, :5])
        companion(wrong)
        companion(torch.cat([wrong, wrong[:, :1]], 1))
    close(companion(wrong), truth(made, wrong))
    with pytest.raises(CompanionDesync), companion.lagging():  # the last step is looked at on leaving
        companion(ids[:, :5])
        companion(wrong)
    with companion.lagging():
        companion(ids[:, :5])
        companion.reset()
        close(companion(wrong), truth(made, wrong))


@pytest.mark.parametrize("kind", [*KINDS, "window", "eager"])
@pytest.mark.parametrize("pads", [(0, 0), (3, 0), (5, 1)])
def test_lagging_with_and_without_padding_equals_the_rows(kind, pads):
    made, ids = make_model(kind), texts(2, 14)
    if kind == "eager":
        made.set_attn_implementation("eager")
    companion, mask = Companion(made), torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    with companion.lagging():
        for length in range(7, 15):
            part = ids[:, :length], mask[:, :length]
            close(companion(*part), truth(made, *part))
    assert module._takes_4d(made) == (kind in KINDS)
    assert companion.forwards == 8


# --- beside the host ---


class Side:
    """Streams that tell what was asked of them, in the place of `torch.cuda`."""

    def __init__(self):
        self.log: list[str] = []
        self.Stream = lambda: SimpleNamespace(wait_stream=lambda other: self.log.append(f"side waits for {other}"))

    def current_stream(self, device):
        return CurrentStream(self.log)

    @contextmanager
    def stream(self, aside):
        self.log.append("side begins")
        yield
        self.log.append("side ends")


class CurrentStream:
    def __init__(self, log: list[str]):
        self.log = log

    def wait_stream(self, other) -> None:
        self.log.append("host waits")

    def __str__(self) -> str:
        return "the host"


@pytest.mark.parametrize("pads", [(0, 0), (3, 1)])
def test_a_companion_that_started_gives_the_same_and_is_waited_for(kind, pads, monkeypatch):
    made, ids, side = make_model(kind), texts(2, 12), Side()
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    monkeypatch.setattr(module, "_streams", lambda device: side)
    forward = made.forward
    monkeypatch.setattr(made, "forward", lambda *args, **kwargs: side.log.append("pass") or forward(*args, **kwargs))
    alone, started = Companion(made), Companion(made)
    with alone.lagging(), started.lagging():
        assert torch.equal(started(ids[:, :7], mask), alone(ids[:, :7], mask))
        for length in range(8, 13):
            side.log.clear()
            started.start(ids[:, length - 1 : length])
            expected = ["side waits for the host", "side begins", "pass", "side ends"]
            assert side.log == expected
            found = started(ids[:, :length], mask)
            assert side.log == [*expected, "host waits"]
            assert torch.equal(found, alone(ids[:, :length], mask))


def test_what_started_on_another_text_is_noticed_a_step_later(kind):
    companion, ids = Companion(make_model(kind)), texts(2, 7)
    with pytest.raises(CompanionDesync), companion.lagging():
        companion(ids[:, :5])
        companion.start(ids[:, 6:])
        companion(ids[:, :6])
    close(companion(ids), truth(companion.model, ids))


def test_it_starts_only_where_the_next_text_is_known_and_can_be_read():
    companion, ids = Companion(make_model(context=8)), texts(2, 8)
    companion(ids[:, :5])
    companion.start(ids[:, 5:6])
    assert companion.forwards == 1, "nobody has said that this text will go on"
    with companion.lagging():
        companion.start(ids[:, :1])
        assert companion.forwards == 1, "there is no text yet"
        companion(ids[:, :7])
        companion.start(ids[:1, 7:])
        assert companion.forwards == 2, "there are other rows"
        companion.start(ids[:, 7:])
        assert companion.forwards == 3
        close(companion(ids), truth(companion.model, ids))
        companion.start(ids[:, :1])
        assert companion.forwards == 3, "it reads no more"


# --- padding ---


def padded_batch() -> tuple[Tensor, Tensor]:
    ids = texts(3, 7)
    mask = torch.ones_like(ids)
    for row, pads in enumerate((3, 0, 5)):
        ids[row, :pads] = mask[row, :pads] = 0
    return ids, mask


def test_a_padded_batch_equals_its_rows(kind, model):
    made = make_model(kind)
    ids, mask = padded_batch()
    for given in (mask, None):  # told and inferred
        companion, text, told = Companion(made), ids, given
        for step in range(3):
            close(companion(text, told), truth(made, text, torch.nn.functional.pad(mask, (0, step), value=1)))
            text = torch.cat([text, texts(3, 1, step)], 1)
    for processors in ([lp.Chain([FollowLogitsProcessor(Watched(made))])],):
        assert model.generate(
            ids, logits_processor=processors, attention_mask=mask, max_new_tokens=6
        ).shape == (3, 13)
    generate(model, lp.Chain([FollowLogitsProcessor(Watched(made))]), ids, attention_mask=mask)


def test_without_position_ids_a_padded_batch_would_be_wrong():
    made = make_model("gpt2")
    ids, mask = padded_batch()
    with torch.no_grad():
        found = made(ids, attention_mask=mask, position_ids=torch.arange(7)[None].expand(3, 7)).logits[:, -1]
    assert (found - truth(made, ids, mask)).abs().max() > 0.01


def test_a_pad_token_that_may_be_text_is_guessed_with_a_warning():
    ids, mask = padded_batch()
    with pytest.warns(UserWarning, match="pass the attention mask"):
        companion = Companion(make_model(eos_token_id=0))
        close(companion(ids), truth(companion.model, ids, mask))
    with pytest.warns(UserWarning, match="pass the attention mask"):  # ends where there is none
        unpadded = Companion(make_model(eos_token_id=[0, 2], pad_token_id=None))
        close(unpadded(ids), truth(unpadded.model, ids, mask))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        companion(ids)  # it is said once
        Companion(make_model())(ids)  # a pad token that is nothing else
        begins = torch.cat([torch.ones(2, 1, dtype=torch.int64), texts(2, 4)], 1)
        bos = Companion(make_model(pad_token_id=1))
        close(bos(begins), truth(bos.model, begins))  # every row begins with it: that is no padding
        assert Companion(make_model(pad_token_id=None)).pad_token_id is None


def test_a_finished_row_disturbs_no_other(kind):
    made = make_model(kind)
    companion, ids = Companion(made), texts(2, 8)
    with_pads = ids.clone()
    with_pads[1, 5:] = 0
    mask = torch.ones(2, 4, dtype=torch.int64)
    for length in range(4, 9):
        close(companion(with_pads[:, :length], mask)[0], truth(made, ids[:1, :length])[0])


def test_a_row_before_its_first_token_has_no_opinion_and_no_text_is_an_error():
    companion = Companion(make_model())
    ids = torch.tensor([[-1, -1, -1], [-1, 5, 6]])
    found = companion(ids, positions=3)
    assert (found[0] == 0).all() and (found[1, 0] == 0).all() and (found[1, 1:] != 0).any(-1).all()
    assert (companion(ids)[0] == 0).all()
    with pytest.raises(ValueError, match="holds no token"):
        companion(ids[:, :0])
    with pytest.raises(ValueError, match="padding_side='left'"):
        companion(torch.tensor([[5, 6, 7], [5, 6, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]))


# --- widths, devices, dtypes ---


@pytest.mark.parametrize("width", [60, WIDTH, 120])
def test_a_companion_of_another_width_is_cut_or_filled_up(width):
    companion, ids = Companion(make_model(width=width)), texts(2, 5) % 60
    (found,) = FollowLogitsProcessor(companion).consult(ids, WIDTH)
    both = min(width, WIDTH)
    close(found[:, :both], truth(companion.model, ids)[:, :both])
    assert (found[:, both:] == -torch.inf).all() and found.shape == (2, WIDTH)


def test_the_result_is_float32_on_the_device_of_the_ids_without_gradient():
    made = make_model().bfloat16().train()
    companion = Companion(made)
    found = companion(texts(2, 5))
    assert found.dtype is torch.float32 and found.device.type == "cpu" and not found.requires_grad
    assert made.training, "and a model that was in training stays so"
    assert torch.equal(found, companion(texts(2, 5))), "without dropout"
    torch.testing.assert_close(found, truth(make_model(), texts(2, 5)), rtol=0.1, atol=0.3)


@pytest.mark.gpu
def test_a_companion_on_another_device_answers_on_that_of_the_ids():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    companion, ids = Companion(make_model().cuda()), texts(2, 5)
    found = companion(ids)
    assert found.device.type == "cpu"
    close(found, truth(make_model(), ids))


def test_nan_is_an_error_that_names_the_row():
    made = make_model()
    with torch.no_grad():
        made.get_input_embeddings().weight[5] = torch.nan
    with pytest.raises(ValueError, match="gave NaN for row 1 after 3 tokens"):
        Companion(made)(torch.tensor([[6, 7, 8], [6, 5, 8]]))


def test_memory_is_counted(kind):
    made = make_model(kind)
    companion = Companion(made)
    companion(texts(2, 10))
    found = companion.memory()
    heads, dim = 2, 8
    assert found["cache"] == 2 * 3 * heads * dim * 4 * 2 * 10
    assert found["logits"] == 2 * WIDTH * 4
    assert found["weights"] >= sum(p.numel() * 4 for p in made.parameters())


# --- too long ---


def test_a_text_longer_than_the_context_is_refused_before_the_forward(kind):
    companion = Companion(make_model(kind, context=16))
    companion(texts(1, 16))
    with pytest.raises(ContextOverflow, match="reads 16 tokens, the text has 17"):
        companion(texts(1, 17))
    padded = torch.nn.functional.pad(texts(1, 16), (4, 0), value=-1)
    close(companion(padded), truth(companion.model, texts(1, 16)))


def test_a_truncated_text_loses_half_a_context_at_a_time(kind):
    made = make_model(kind, context=16)
    companion, ids = Companion(made, overflow="truncate"), texts(2, 40)
    for length in range(10, 41):
        start = 0 if length <= 16 else -(-(length - 16) // 8) * 8
        close(companion(ids[:, :length]), truth(made, ids[:, start:length]))
    assert companion.forwards == 31
    four = companion(ids[:, :27], positions=4)  # 24 is the last length of its window
    for k in range(4):
        close(four[:, k], companion(ids[:, : 24 + k]))
    padded = ids[:, :20].clone()
    padded[1, :6] = -1  # whose row is short enough
    close(companion(padded)[1], truth(made, padded[1:, 6:])[0])


def test_a_companion_that_is_off_beyond_its_context_leaves_the_scores_alone(kind):
    companion = Companion(make_model(kind, context=16), overflow="off")
    processor, scores = FollowLogitsProcessor(companion), torch.randn(1, WIDTH)
    assert not torch.equal(processor(texts(1, 16), scores), scores)
    with pytest.warns(UserWarning, match="has no say"):
        assert torch.equal(processor(texts(1, 17), scores), scores)


def test_a_context_too_short_for_prompt_and_new_tokens_is_refused_before_the_first_token(model):
    chain = lp.Chain([FollowLogitsProcessor(Companion(make_model(context=16)))])
    with pytest.raises(ContextOverflow, match="reads 16 tokens; the prompt and the new tokens are 17"):
        generate(model, chain, max_new_tokens=12)
    assert generate(model, chain, max_new_tokens=11).shape == (1, 16)
    with pytest.raises(ContextOverflow):
        generate(model, chain, max_new_tokens=None, max_length=17)
    with pytest.raises(ContextOverflow, match="the new tokens are 25"):  # 20 are generated by default
        generate(model, chain, max_new_tokens=None)
    ids, mask = torch.cat([torch.zeros(1, 9, dtype=torch.int64), texts(1, 5)], 1), torch.ones(1, 14)
    mask[:, :9] = 0
    assert generate(model, chain, ids, attention_mask=mask, max_new_tokens=11).shape == (1, 25)


# --- a prompt of its own ---


def test_a_prompt_of_its_own_is_read_in_place_of_the_hosts(kind, model):
    made = make_model(kind)
    ids, mask = padded_batch()
    own = lambda host: [1, *host[:2], 9]
    new = texts(3, 4, 5)
    bound = lp.Chain([FollowLogitsProcessor(Companion(made, prompt=own))]).bind(ids, mask)
    zero = torch.zeros(3, WIDTH)
    for step in range(4):
        by_hand = [
            [1, *[int(t) for t, m in zip(row, keep, strict=True) if m][:2], 9, *tail[:step].tolist()]
            for row, keep, tail in zip(ids, mask, new, strict=True)
        ]
        expected = torch.cat([truth(made, torch.tensor([text])) for text in by_hand]).log_softmax(-1)
        close(bound(torch.cat([ids, new[:, :step]], 1), zero), expected)
    fixed = Companion(made, prompt=[1, 2, 3])
    close(
        fixed(ids, mask, generated=torch.zeros(3, dtype=torch.int64))[0],
        truth(made, torch.tensor([[1, 2, 3]]))[0],
    )
    with pytest.raises(ValueError, match="must be told where the host's ends"):
        fixed(ids, mask)
    with pytest.raises(ValueError, match="needs its tokenizer"):
        Companion(made, prompt="text")
    tokenizer = tiny_tokenizer()
    spoken = Companion(made, tokenizer, prompt="w5 w6")
    close(
        spoken(ids, mask, generated=torch.zeros(3, dtype=torch.int64))[0],
        truth(made, torch.tensor([[5, 6]]))[0],
    )


# --- who may be a companion of whom ---


def test_another_tokenizer_is_refused_by_the_first_id_that_differs(model):
    companion = Companion(make_model(), tiny_tokenizer())
    chain = lp.Chain([FollowLogitsProcessor(companion)])
    chain.check(tokenizer=tiny_tokenizer())
    chain.check(tokenizer=tiny_tokenizer(WIDTH + 7))  # more ids than the companion knows, the same so far
    other = tiny_tokenizer(unk_token="<unk>")
    with pytest.raises(ValueError, match=r"id 97 is|unk_token_id is \d+ for the host"):
        generate(model, chain, tokenizer=other)
    renamed = tiny_tokenizer()
    renamed.backend_tokenizer.model = type(renamed.backend_tokenizer.model)(
        {("other" if i == 7 else token): i for token, i in tiny_tokenizer().get_vocab().items()},
        unk_token="w3",
    )
    with pytest.raises(ValueError, match="id 7 is 'other' for the host, 'w7' for the companion"):
        chain.check(tokenizer=renamed)
    with pytest.raises(ValueError, match="eos_token_id is 5 for the host, 2 for the companion"):
        chain.check(tokenizer=tiny_tokenizer(eos_token="w5"))


def test_the_same_vocabulary_with_another_normaliser_is_refused():
    from tokenizers import normalizers

    host = tiny_tokenizer()
    host.backend_tokenizer.normalizer = normalizers.Replace("The", "w9")
    with pytest.raises(ValueError, match="splits .* differently"):
        Companion(make_model(), tiny_tokenizer()).check_tokenizer(host)


def test_special_tokens_in_another_order_are_another_tokenizer_though_it_agreed_before():
    ours, theirs = tiny_tokenizer(), tiny_tokenizer()
    companion, first = Companion(make_model(), ours), len(ours)
    companion.check_tokenizer(theirs)
    ours.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    theirs.add_special_tokens({"additional_special_tokens": ["<|assistant|>", "<|user|>"]})
    with pytest.raises(ValueError, match=f"id {first} is"):
        companion.check_tokenizer(theirs)


def test_widths_far_apart_are_refused_when_there_is_no_tokenizer_to_ask():
    chain = lp.Chain([FollowLogitsProcessor(Companion(make_model()))])
    chain.check(width=WIDTH + 1024)
    with pytest.raises(ValueError, match=f"scores {WIDTH} tokens, the model {WIDTH + 1025}"):
        chain.check(width=WIDTH + 1025)


def test_encoder_decoders_and_prompts_of_embeddings_are_refused(model):
    t5 = T5ForConditionalGeneration(T5Config(
        vocab_size=WIDTH, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0,
    )).eval()  # fmt: skip
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        Companion(t5)
    chain = lp.Chain([FollowLogitsProcessor(Companion(make_model()))])
    with pytest.raises(ValueError, match="an encoder-decoder shows them none"):
        lp.generate(t5, chain, input_ids=texts(1, 4), max_new_tokens=2)
    embeds = model.get_input_embeddings()(texts(1, 4)).detach()
    with pytest.raises(ValueError, match="a prompt of embeddings shows them none"):
        lp.generate(model, chain, inputs_embeds=embeds, max_new_tokens=2)
    with pytest.raises(ValueError, match="holds no token"):
        model.generate(inputs_embeds=embeds, logits_processor=[chain], max_new_tokens=2)
    with pytest.raises(ValueError, match="padding_side='left'"):
        generate(model, chain, attention_mask=torch.tensor([[1, 1, 1, 1, 0]]))
    with pytest.raises(ValueError, match="The prompt holds no token; begin with BOS"):
        generate(model, chain, texts(1, 5)[:, :0])
    with pytest.raises(ValueError, match="overflow must be error, truncate or off"):
        Companion(make_model(), overflow="drop")


def test_continuous_batching_is_refused_and_raw_logits_are_left_alone(model):
    chain = lp.Chain([FollowLogitsProcessor(Companion(make_model()))])
    with pytest.raises(ValueError, match="Continuous batching"):
        generate(model, chain, cache_implementation="paged")
    assert chain.supports_continuous_batching is False
    out = generate(model, chain, output_logits=True, return_dict_in_generate=True, max_new_tokens=4)
    for step, logits in enumerate(out.logits):
        close(logits, truth(model, out.sequences[:, : 5 + step]))


# --- by name ---


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_a_name_is_loaded_once_with_a_line_on_stderr(folder, capfd):
    first = Companion.load(folder)
    line = capfd.readouterr().err
    assert re.match(r"Loading the companion \S+small on cpu \(dtype auto\) \.\.\.\n", line)
    assert Companion.load(folder) is first and capfd.readouterr().err == ""
    assert Companion.load(folder, dtype="bfloat16") is not first
    capfd.readouterr()
    other = Companion.load(folder, prompt="w5")
    assert other is not first and other.model is first.model and capfd.readouterr().err == ""
    assert Companion.load("small", base=folder.parent) is first
    assert first.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    close(first(texts(1, 5)), truth(make_model(), texts(1, 5)))


def test_a_saved_chain_names_its_companions_and_holds_no_weights(folder, tmp_path, monkeypatch):
    from logitproc import registry

    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    lp.register("follow", paper="https://example.org")(FollowLogitsProcessor)
    spec = {"name": "follow", "first": "small", "more": ["small", {"model": "small", "dtype": "bfloat16"}]}
    chain = lp.Chain.from_spec([spec], base=folder.parent)
    first, second, third = chain.processors[0].auxiliaries()
    assert first is second and third.model.dtype is torch.bfloat16
    chain.save_pretrained(tmp_path / "chain")
    assert [p.name for p in (tmp_path / "chain").iterdir()] == ["chain.json"]
    loaded = lp.Chain.from_pretrained(tmp_path / "chain")
    assert loaded.companions == chain.companions
    in_memory = lp.Chain([FollowLogitsProcessor(Companion(make_model()))])
    with pytest.raises(ValueError, match="made from a model in memory"):
        in_memory.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_bundled_model_is_a_companion_by_name():
    companion = Companion.load("mini")
    assert companion.saved() == "mini" and companion.width == 8192
    with pytest.raises(FileNotFoundError, match="bundled models are"):
        Companion.load("nowhere")
    with pytest.raises(ValueError, match="mapping with a 'model'"):
        Companion.from_parameter({"name": "mini"})
    with pytest.raises(ValueError, match="A companion has no 'colour'; known: "):
        Companion.from_parameter({"model": "mini", "colour": 1})


@pytest.mark.parametrize("place", ["cpu", "auto"])
def test_a_companion_too_large_for_its_device_says_which_and_how_large(folder, place, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(LlamaForCausalLM, *(("to", full) if place == "cpu" else ("from_pretrained", full)))
    size = sum(p.numel() for p in make_model().parameters()) * 2
    monkeypatch.setattr(torch.nn.Parameter, "element_size", lambda self: 2**30 * 2 // size * self.dtype.itemsize)
    with pytest.raises(MemoryError, match=rf"small does not fit on {place}: its weights are (1\.99|2\.00) GiB"):
        Companion.load(folder, device=place, dtype="bfloat16")
    assert not any(str(folder) in str(key) for key in module._loaded)


def test_an_adapter_of_peft_is_a_companion_and_by_name_must_be_merged(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    made = peft.get_peft_model(make_model(), config).eval()
    companion, ids = Companion(made), texts(2, 7)
    for length in (5, 6, 7):
        close(companion(ids[:, :length]), truth(made, ids[:, :length]))
    assert (companion(ids) - truth(make_model(), ids)).abs().max() > 0.01
    made.save_pretrained(tmp_path / "lora")
    tiny_tokenizer().save_pretrained(tmp_path / "lora")
    with pytest.raises(FileNotFoundError, match="lora is an adapter without its model; save the two merged"):
        Companion.load(tmp_path / "lora")
    made.merge_and_unload().save_pretrained(tmp_path / "merged")
    close(Companion.load(tmp_path / "merged")(ids), companion(ids))


def test_a_name_is_not_a_model():
    with pytest.raises(TypeError, match=r"Companion.load\('mini'\) loads one by name"):
        Companion("mini")


def test_a_device_a_dtype_or_a_repository_that_is_not_there_is_named(folder, monkeypatch):
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"small cannot be on device '{device}'; take cpu"):
            Companion.load(folder, device=device)
    with pytest.raises(ValueError, match="dtype must be one of auto, float32, bfloat16, float16, got 'float33'"):
        Companion.load(folder, dtype="float33")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="The companion org/nowhere was not found: "):
        Companion.load("org/nowhere")


def test_the_tiny_companion_is_the_same_for_a_seed():
    ids = texts(1, 5)
    assert torch.equal(tiny_companion(WIDTH)(ids), tiny_companion(WIDTH)(ids))
    assert not torch.equal(tiny_companion(WIDTH, 1)(ids), tiny_companion(WIDTH)(ids))
    saved = AutoModelForCausalLM.from_pretrained(tiny_companion(WIDTH).saved())
    close(truth(saved, ids), tiny_companion(WIDTH)(ids))


def test_the_host_may_be_its_own_companion(model):
    own = Companion(tiny_model())
    chain = lp.Chain([FollowLogitsProcessor(own)])
    assert torch.equal(generate(own.model, chain), generate(model, lp.Chain()))  # doubled logits, same argmax

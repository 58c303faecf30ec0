"""The contract: every promise of a `Processor`, checked for every registered method and its variants.

A test takes a `Subject`, which makes instances of one method, and nothing here names a method: a new file in
`logitproc/methods` is tested because it exists (`pytest tests/test_contract.py -k NAME`).
`test_contract_has_teeth.py` calls the same functions with processors that are broken on purpose.
"""

import copy
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import WIDTH, tiny_tokenizer
from elsewhere import DEVICE, Device, moved
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import LlamaForCausalLM

import logitproc as lp
from logitproc import artifact, chain
from logitproc.artifact import Artifact
from logitproc.scoring import process_positions

INF = float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROMPT = torch.tensor([[5, 6, 7, 8, 5, 6, 7]])  # repeats itself, so prompt lookup finds candidates
PROMPTS = ([9, 4, 5, 6, 7], [3, 8], [5])
NEW = 6
VERSIONS = {"chain.json": ("version", chain.VERSION), "artifact.json": ("format", artifact.FORMAT)}


class Subject(NamedTuple):
    """One method under one setting."""

    cls: type[lp.Processor]
    variant: str = "example"

    def make(self, width: int = WIDTH) -> lp.Processor:
        if self.variant == "example":
            return self.cls.example(width)
        return self.cls.variants(width)[self.variant]

    def __str__(self) -> str:
        return f"{self.cls.name}-{self.variant}"


def subjects() -> Iterator[Subject]:
    for name in lp.names():
        cls = lp.get(name)
        for variant in dict.fromkeys(["example", *cls.variants(WIDTH)]):
            yield Subject(cls, variant)


@pytest.fixture(params=subjects(), ids=str)
def subject(request: pytest.FixtureRequest) -> Subject:
    return request.param


class Rows(NamedTuple):
    """Arguments of `apply`; every row is another point of another text."""

    history: Tensor
    scores: Tensor
    generated: Tensor

    def take(self, rows: Tensor | slice) -> "Rows":
        return Rows(*(part[rows] for part in self))

    def to(self, dtype: torch.dtype) -> "Rows":
        return self._replace(scores=self.scores.to(dtype))


def random_rows(seed: int = 0, rows: int = 6, length: int = 11, width: int = WIDTH) -> Rows:
    """Histories that repeat themselves, the first ones padded with -1; some scores forbidden."""
    random = torch.Generator().manual_seed(seed)
    history = torch.randint(3, 12, (rows, length), generator=random)
    for row in range(rows // 2):
        history[row, : length - row] = -1
    scores = 3 * torch.randn(rows, width, generator=random)
    scores[torch.rand(rows, width, generator=random) < 0.1] = -INF
    return Rows(history, scores, torch.randint(0, length, (rows,), generator=random))


def artifacts(processor: lp.Processor) -> dict[str, Artifact]:
    return {key: value for key, value in processor.parameters().items() if isinstance(value, Artifact)}


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal up to the order of float32 sums."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def assert_equal(found: Tensor, expected: Tensor, subject: Subject) -> None:
    """Equal bit for bit; with companions, which round as the length of a forward pass does, nearly."""
    if subject.cls.companions:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(found, expected)


# --- a row-wise pure function ---


def test_the_inputs_are_not_modified(subject):
    given = random_rows()
    before = [part.clone() for part in given]
    subject.make().apply(*given)
    for now, then in zip(given, before, strict=True):
        assert torch.equal(now, then)


def test_shape_dtype_and_device_are_kept_and_the_arithmetic_is_float32(subject):
    processor, seen = subject.make(), []
    step = processor.step

    def spy(tokens, scores, *rest, **more):
        seen.append(scores)
        seen.append(step(tokens, scores, *rest, **more))
        return seen[-1]

    processor.step = spy
    for dtype in DTYPES:
        given = random_rows().to(dtype)
        out = processor.apply(*given)
        assert (out.shape, out.dtype, out.device) == (given.scores.shape, dtype, given.scores.device)
        assert torch.equal(seen[-2], given.scores.float())
        assert torch.equal(out, seen[-1].to(dtype))
    assert {scores.dtype for scores in seen} == {torch.float32}


def test_a_batch_equals_its_rows_one_by_one_and_in_any_order(subject):
    processor, given = subject.make(), random_rows()
    out = processor.apply(*given)
    alone = [processor.apply(*given.take(slice(row, row + 1))) for row in range(len(out))]
    assert_same(torch.cat(alone), out)
    order = torch.tensor([4, 2, 5, 0, 3, 1])
    assert_same(processor.apply(*given.take(order)), out[order])


def test_a_used_instance_equals_a_fresh_one(subject):
    used, given = subject.make(), random_rows(seed=0)
    for seed in (1, 2, 0):
        used.apply(*random_rows(seed))
        used.apply(*random_rows(seed, rows=2, length=3))
    assert_equal(used.apply(*given), subject.make().apply(*given), subject)


def test_nothing_older_than_the_context_is_read_and_padding_is_no_token(subject):
    processor, given = subject.make(), random_rows()
    out = processor.apply(*given)
    padded = torch.nn.functional.pad(given.history, (3, 0), value=-1)
    assert_same(processor.apply(padded, given.scores, given.generated), out)
    short = given.history[:, -1:]
    padded = torch.nn.functional.pad(short, (12, 0), value=-1)
    first = processor.apply(short, given.scores, torch.ones_like(given.generated))
    assert_same(processor.apply(padded, given.scores, torch.ones_like(given.generated)), first)
    if processor.context is not None:
        other = torch.full_like(given.history, 3)
        older = torch.cat([other, given.history[:, given.history.shape[1] - processor.context :]], dim=1)
        assert_same(processor.apply(older, given.scores, given.generated), out)


def test_ids_beyond_the_width_are_harmless(subject):
    # transformers lets a prompt hold ids, of images for instance, that the head does not score.
    given = random_rows()
    history = given.history.masked_fill(given.history == 5, WIDTH + 30)
    assert not subject.make().apply(history, given.scores, given.generated).isnan().any()


# --- scores ---


def test_forbidden_stays_forbidden_and_a_row_with_a_finite_score_keeps_one(subject):
    scores = torch.full((7, WIDTH), -INF)
    scores[0] = 0.0
    scores[1, 5] = 2.0  # the only token left
    scores[2, [0, 5]] = torch.tensor([1.0, -1e30])
    scores[3] = torch.linspace(-1e4, 1e4, WIDTH)
    scores[4, ::2] = -3e38
    scores[5, :9] = torch.randn(9, generator=torch.Generator().manual_seed(0))
    generated = torch.zeros(7, dtype=torch.int64)  # and row 6 has nothing left
    for tokens in ([], [5], [-1], [5] * 9, [-1, -1, 5, 5]):
        history = torch.tensor([tokens] * 7, dtype=torch.int64).reshape(7, len(tokens))
        if subject.cls.companions and not tokens:  # so a prompt of embeddings arrives
            with pytest.raises(ValueError, match="holds no token"):
                subject.make().apply(history, scores, generated)
            continue
        out = subject.make().apply(history, scores, generated + len(tokens))
        assert not out.isnan().any()
        assert not (out == INF).any()
        assert out[scores == -INF].eq(-INF).all(), "a forbidden token came back"
        assert (out > -INF).any(-1)[:6].all(), "a row lost all its tokens"


def test_the_neutral_setting_is_the_identity_bit_for_bit(subject):
    processor = subject.cls.neutral(WIDTH)
    for dtype in DTYPES:
        given = random_rows().to(dtype)
        assert torch.equal(processor.apply(*given), given.scores)


def test_the_example_is_not_neutral(subject):
    given = random_rows()
    assert not torch.equal(subject.make().apply(*given), given.scores)


def test_a_constant_added_to_a_row_leaves_the_softmax_unchanged(subject):
    processor, given = subject.make(), random_rows()
    out = processor.apply(*given).softmax(-1)
    for offset in (-7.5, 30.0):
        shifted = processor.apply(*given._replace(scores=given.scores + offset)).softmax(-1)
        torch.testing.assert_close(shifted, out, rtol=1e-4, atol=1e-6)


def test_what_was_fitted_says_nothing_about_columns_beyond_its_vocabulary(subject):
    processor, given = subject.make(WIDTH), random_rows(width=WIDTH + 31)
    out = processor.apply(*given)
    assert out.shape == given.scores.shape and not out.isnan().any()
    if artifacts(processor):
        beyond, before = out[:, WIDTH:], given.scores[:, WIDTH:]
        assert torch.equal(torch.where(beyond == -INF, before, beyond), before), "changed, not just forbidden"


# --- saved ---


def test_a_saved_chain_loads_bit_equal_and_twice_to_the_same_bytes(subject, tmp_path):
    given = random_rows()
    lp.Chain([subject.make()]).save_pretrained(tmp_path / "one")
    loaded = lp.Chain.from_pretrained(tmp_path / "one")
    assert_equal(loaded.apply(*given), subject.make().apply(*given), subject)
    loaded.save_pretrained(tmp_path / "two")
    assert _contents(tmp_path / "one") == _contents(tmp_path / "two")


def test_a_damaged_or_newer_file_is_refused(subject, tmp_path):
    whole = tmp_path / "whole"
    lp.Chain([subject.make()]).save_pretrained(whole)
    for file in _contents(whole):
        damages = [lambda data: data[: len(data) // 2], lambda data: b""]
        if file.suffix == ".safetensors":
            damages += [lambda data: data[:-1] + bytes([data[-1] ^ 1])]
        for damage in damages:
            with _damaged(whole, tmp_path / "broken") as broken:
                (broken / file).write_bytes(damage((broken / file).read_bytes()))
                with pytest.raises(ValueError, match=re.escape(str(broken))):
                    lp.Chain.from_pretrained(broken)
        if file.suffix == ".json":
            key, ours = VERSIONS[file.name]
            with _damaged(whole, tmp_path / "newer") as newer:
                document = json.loads((newer / file).read_text()) | {key: ours + 1}
                (newer / file).write_text(json.dumps(document))
                with pytest.raises(ValueError, match=rf"{key} {ours + 1}.*up to {ours}"):
                    lp.Chain.from_pretrained(newer)


def test_what_was_fitted_refuses_another_tokenizer_and_a_narrower_model(subject):
    made = lp.Chain([subject.make()])
    if artifacts(made.processors[0]):
        with pytest.raises(ValueError, match="was fitted for the tokenizer"):
            made.check(tokenizer=tiny_tokenizer(WIDTH + 4))
        with pytest.raises(ValueError, match=f"{WIDTH} tokens.*{WIDTH - 1}"):
            made.check(width=WIDTH - 1)
    made.check(width=WIDTH)
    made.check(width=WIDTH + 31)


def _contents(folder: Path) -> dict[Path, bytes]:
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextmanager
def _damaged(whole: Path, copy: Path) -> Iterator[Path]:
    shutil.copytree(whole, copy)
    yield copy
    shutil.rmtree(copy)


# --- decoding ---


def decode(model: LlamaForCausalLM, subject: Subject, ids: Tensor = PROMPT, **options) -> Tensor:
    """Generated tokens [rows, NEW] through `logitproc.generate`."""
    options = {"do_sample": False, "max_new_tokens": NEW, "attention_mask": torch.ones_like(ids)} | options
    return lp.generate(model, lp.Chain([subject.make()]), input_ids=ids, **options)[:, ids.shape[1] :]


def test_greedy_decoding_processes_the_raw_scores_of_every_step(subject, model):
    made = lp.Chain([subject.make()])
    out = model.generate(
        PROMPT, logits_processor=[made], max_new_tokens=NEW, do_sample=False, output_logits=True,
        output_scores=True, return_dict_in_generate=True, attention_mask=torch.ones_like(PROMPT),
    )  # fmt: skip
    ids, again = out.sequences, lp.Chain([subject.make()])
    for step, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        history = ids[:, : PROMPT.shape[1] + step]
        if not again.processors[0].evidence_size:  # which is gathered from step to step
            again = lp.Chain([subject.make()])
        assert_equal(scores, again(history, logits.clone()), subject)
        assert torch.equal(ids[:, history.shape[1]], scores.argmax(-1))


def test_sampling_and_several_sequences_repeat_for_a_seed(subject, model):
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(decode(model, subject, do_sample=True, num_return_sequences=3, top_k=0))
    assert runs[0].shape == (3, NEW)
    assert torch.equal(*runs)


def test_beam_search_runs_or_is_refused(subject, model):
    options = {"num_beams": 4, "num_return_sequences": 2}
    if subject.make().supports_beam:
        first, second = (decode(model, subject, **options) for _ in range(2))
        assert first.shape == (2, NEW)
        assert torch.equal(first, second)
    else:
        with pytest.raises(ValueError, match=f"{subject.cls.name!r} does not support beam search"):
            decode(model, subject, **options)


def test_a_left_padded_batch_equals_its_prompts_one_by_one(subject, model):
    length = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in PROMPTS])
    batch = decode(model, subject, padded, attention_mask=(padded != 0).long())
    alone = [decode(model, subject, torch.tensor([prompt])) for prompt in PROMPTS]
    assert torch.equal(batch, torch.cat(alone))


def test_assisted_decoding_gives_the_unassisted_text_or_is_refused(subject, model, draft):
    for help_ in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 3}):
        if subject.make().supports_assisted:
            assert torch.equal(decode(model, subject, **help_), decode(model, subject))
        else:
            with pytest.raises(ValueError, match=f"{subject.cls.name!r} does not support assisted decoding"):
                decode(model, subject, **help_)


def test_a_prompt_of_embeddings_arrives_as_an_empty_history(subject, model):
    embeds = model.get_input_embeddings()(PROMPT).detach()
    made = lp.Chain([subject.make()])
    options = {"inputs_embeds": embeds, "attention_mask": torch.ones_like(PROMPT), "max_new_tokens": NEW,
               "do_sample": False, "output_logits": True, "output_scores": True,
               "return_dict_in_generate": True}  # fmt: skip
    if subject.cls.companions:
        with pytest.raises(ValueError, match="embeddings"):
            lp.generate(model, made, **options)
        return
    out = lp.generate(model, made, **options)
    for step, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        assert torch.equal(scores, made(out.sequences[:, :step], logits))


def test_a_text_scored_at_once_equals_the_text_scored_step_by_step(subject, model):
    made, prompt = lp.Chain([subject.make()]), 2
    ids = torch.tensor([[7, 5, 6, 7, 5, 6, 7, 5, 9, 5, 6]])
    ends = range(prompt, ids.shape[1])
    logits = model(ids).logits.detach()[0, prompt - 1 : -1]
    bound = made.bind(ids[:, :prompt])
    steps = torch.cat([bound(ids[:, :end], logits[end - prompt, None]) for end in ends])
    prompts = torch.tensor([prompt])
    at_once = process_positions(made, ids, model(ids).logits.detach(), prompt_lengths=prompts, drawn=True)
    assert_equal(at_once[0, prompt - 1 : -1], steps, subject)


# --- declared ---


def test_it_says_where_it_comes_from_and_what_it_does(subject):
    cls = subject.cls
    assert re.fullmatch(r"arXiv:\d{4}\.\d{4,5}|https?://\S+|doi:\S+", cls.paper)
    module = sys.modules[cls.__module__].__doc__ or ""
    assert cls.paper in module, "the module's docstring cites the paper"
    summary, _, rest = (cls.__doc__ or "").strip().partition("\n")
    assert summary.endswith("."), "the first line of the class's docstring is a sentence"
    assert "[rows, width]" in rest, "the docstring gives shapes"
    assert "Example:" in rest, "the docstring shows an example"


def test_its_flags_are_honest(subject):
    cls, processor = subject.cls, subject.make()
    for flag in ("supports_beam", "supports_assisted", "supports_continuous_batching", "argmax_invariant"):
        assert isinstance(getattr(cls, flag), bool), flag
    if cls.supports_continuous_batching:
        assert processor.context == 0, "continuous batching passes no history"
    if cls.argmax_invariant:
        given = random_rows()
        assert torch.equal(processor.apply(*given).argmax(-1), given.scores.argmax(-1))
    assert set(cls.companions) <= set(processor.parameters())
    assert processor.context is None or not cls.companions, "companions read all tokens"
    for key, value in artifacts(processor).items():
        assert isinstance(value, cls.artifacts[key])


def test_equal_instances_are_two(subject):
    # transformers drops a processor that equals an earlier one, in silence.
    assert subject.make() != subject.make(), "declare the dataclass with eq=False"


# --- on a device of its own ---


def sampled(
    made: lp.Chain, ids: Tensor, mask: Tensor, scores: Tensor, watched: Callable[[], Any] = nullcontext
) -> list[Tensor]:
    """What the chain makes of scores [steps, rows, width], one token after the other, as when `generate` samples.

    Companions start on a token before the chain is asked about it, as they do there. The first two steps are not
    watched: they may copy tables to the device and read the prompt.
    """
    first, found = ids.shape[1] - len(scores) + 1, []
    bound = made.bind(ids[:, :first], mask[:, :first])
    with bound.lagging():
        for step, now in enumerate(scores):
            with watched() if step > 1 else nullcontext():
                for companion in made.companions:
                    companion.start(ids[:, first + step - 1 : first + step])
                found.append(bound(ids[:, : first + step], now))
    return found


def texts_that_grow(steps: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """ids and mask [rows, length], two rows padded on the left, and scores [steps, rows, width]."""
    ids, scores, _ = random_rows()
    random = torch.Generator().manual_seed(1)
    ids = torch.where(ids < 0, torch.randint(3, 12, ids.shape, generator=random), ids)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, :1] = 0, 0
    return ids * mask, mask, torch.stack([scores.roll(step, 1) for step in range(steps)])


def moves(made: lp.Chain, move: Callable[[nn.Module], nn.Module]) -> lp.Chain:
    for companion in made.companions:  # whose model all examples share
        companion.model = move(companion.model)
    return made


def test_a_step_on_another_device_gives_the_same_and_never_waits_for_it(subject, monkeypatch):
    given = texts_that_grow()
    here = sampled(lp.Chain([subject.make()]), *given)
    for module in ("companion", "evidence"):  # on CUDA a copy that is waited for a step later
        monkeypatch.setattr(f"logitproc.{module}.read_later", lambda bit: lambda: bool(bit.here))
    with Device():
        made = moves(lp.Chain([subject.make()]), moved)
        there = sampled(made, *(part.to(DEVICE) for part in given), lambda: Device(strict=True))
    for found, expected in zip(there, here, strict=True):
        torch.testing.assert_close(found.here, expected, rtol=1e-4, atol=1e-4)


def static_inputs(subject: Subject, seed: int) -> list[Any]:
    """Arguments of `apply`: everything that a step needs, so that it asks nobody."""
    given, processor = random_rows(seed), subject.make()
    random = torch.Generator().manual_seed(seed)
    companions = [3 * torch.randn(given.scores.shape, generator=random) for _ in processor.auxiliaries()]
    return [*given, companions, torch.rand(len(given.scores), processor.evidence_size, generator=random)]


def test_a_step_is_the_same_work_for_any_values_so_that_a_graph_can_hold_it(subject):
    processor, work = subject.make(), []
    with Device():
        for seed in (0, 1, 2):
            there = tree_map_only(Tensor, lambda t: t.to(DEVICE), static_inputs(subject, seed))
            with Device(strict=seed > 0) as device:
                processor.apply(*there)
            work.append(device.calls)
    assert work[1] == work[2]


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@contextmanager
def sync_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_step_on_cuda_gives_the_same_and_never_waits_for_it(subject, cuda):
    given = texts_that_grow()
    here = sampled(lp.Chain([subject.make()]), *given)
    made = moves(lp.Chain([subject.make()]), lambda model: copy.deepcopy(model).to(cuda))
    there = sampled(made, *(part.to(cuda) for part in given), sync_is_an_error)
    for found, expected in zip(there, here, strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_a_step_replays_from_a_cuda_graph(subject, cuda):
    processor = subject.make()
    static, other = (
        tree_map_only(Tensor, lambda t: t.to(cuda), static_inputs(subject, seed)) for seed in (0, 1)
    )
    aside = torch.cuda.Stream()  # a graph is captured after a few calls on another stream
    with torch.cuda.stream(aside):
        for _ in range(3):
            processor.apply(*static)
    aside.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = processor.apply(*static)
    for mine, new in zip(tree_leaves(static), tree_leaves(other), strict=True):
        mine.copy_(new)
    graph.replay()
    torch.testing.assert_close(out, processor.apply(*other), rtol=1e-4, atol=1e-4)

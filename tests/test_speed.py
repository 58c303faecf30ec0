"""The speed table: what it times runs, what it compares is compared fairly, and a slower method does not pass."""

import contextlib
import json

import numpy as np
import pytest
import speed
import speed_cases
import speed_models
import torch
from elsewhere import DEVICE, Device
from stopwatch import Stopwatch

SMALL = ["--device", "cpu", "--parts", "steps", "--vocabularies", "9000", "--batches", "2", "--models", "--debug"]
COSTS = {"suppression ratio": 40.0, "ngram lift": 300.0}
COSTS |= dict.fromkeys([*speed_cases.BASELINES, 1], 20.0)  # 1: `log_softmax` of one tensor


AGAINST = ("log_softmax", *speed_cases.BASELINES, "1B forward")


class Planted:
    """Times in place of measured ones: microseconds a call, by name, with noise."""

    def __init__(self, monkeypatch):
        self.machine, self.noise, self.slower, self.measured = 1.0, 0.0, {}, []
        self.random = np.random.default_rng(0)
        monkeypatch.setattr(speed.Stopwatch, "in_turns", self.in_turns)
        steps = {name: make for name, make in speed_cases.STEPS.items() if name in COSTS}
        monkeypatch.setattr(speed, "STEPS", steps)

    def in_turns(self, calls, rounds, budget):
        self.measured.append([name for name in calls if name in speed.STEPS])
        return {name: self.times(name) for name in calls}

    def times(self, name):
        spread = 1 + self.random.uniform(-self.noise, self.noise, 20)
        factor = self.slower[name](len(self.measured)) if name in self.slower else 1.0
        return COSTS[name] * 1e-6 * self.machine * factor * spread


@pytest.fixture
def planted(monkeypatch):
    return Planted(monkeypatch)


@pytest.fixture
def stored(planted, tmp_path, capsys):
    """A table of the planted times."""
    path = tmp_path / "speed.json"
    assert speed.main([*SMALL, "--json", str(path)]) == 0
    capsys.readouterr()
    planted.measured.clear()
    return path


def check(path):
    return speed.main([*SMALL, "--check", str(path)])


# --- the guard ---


def test_the_same_times_pass_and_so_does_noise_of_ten_percent(planted, stored, capsys):
    assert check(stored) == 0
    planted.noise = 0.1
    assert check(stored) == 0
    assert "8 ratios compared" in capsys.readouterr().out


def test_a_slower_method_is_named_with_what_it_costs_and_nothing_else_is(planted, stored, capsys):
    planted.noise, planted.slower = 0.1, {"suppression ratio": lambda measurement: 1.5}
    assert check(stored) == 1
    out = capsys.readouterr().out
    sentences = [line for line in out.splitlines() if line.endswith("% worse.")]
    assert len(sentences) == 4 and all(line.startswith("suppression ratio, vocabulary 9,000") for line in sentences)
    assert "times log_softmax, stored 2: " in out and "4 worse by more than 30 %" in out
    assert planted.measured[1:] == [["suppression ratio"]] * 2, "measured again before it fails, and alone"


def test_a_baseline_that_got_faster_is_no_excuse_and_one_that_got_slower_no_failure(planted, stored):
    planted.slower = {"copy": lambda measurement: 0.5}
    assert check(stored) == 1
    planted.slower = {"copy": lambda measurement: 2.0}
    assert check(stored) == 0


def test_a_disturbance_that_passes_is_measured_again_and_does_not_fail(planted, stored):
    planted.slower = {"ngram lift": lambda measurement: 3.0 if measurement < 3 else 1.0}
    assert check(stored) == 0
    assert len(planted.measured) == 3


def test_the_times_of_another_machine_do_not_matter(planted, stored):
    planted.machine = 7.0
    assert check(stored) == 0


def test_rows_that_only_one_side_has_are_said(planted, stored, capsys):
    document = json.loads(stored.read_text())
    gone, document["rows"][0]["what"] = document["rows"][0]["what"], "a method of old"
    stored.write_text(json.dumps(document))
    assert check(stored) == 0
    out = capsys.readouterr().out
    assert "Not in this run: a method of old against log_softmax, vocabulary 9,000, batch 2." in out
    assert f"Not in the stored table: {gone} against log_softmax, vocabulary 9,000, batch 2." in out
    assert "7 ratios compared" in out


def test_a_method_that_really_got_slower_is_caught_by_the_clock(monkeypatch, tmp_path, capsys):
    steps = {"suppression ratio": speed_cases.STEPS["suppression ratio"]}
    monkeypatch.setattr(speed, "STEPS", steps)
    quick = [*SMALL, "--busy", "--rounds", "5", "--seconds", "0"]
    assert speed.main([*quick, "--json", str(tmp_path / "speed.json")]) == 0

    def slowed(x):
        (processor,) = speed_cases.STEPS["suppression ratio"](x)
        step = processor.step
        processor.step = lambda *given, **more: [step(*given, **more) for _ in range(20)][-1]
        return [processor]

    monkeypatch.setattr(speed, "STEPS", {"suppression ratio": slowed})
    assert speed.main([*quick, "--check", str(tmp_path / "speed.json")]) == 1
    assert "suppression ratio, vocabulary 9,000, batch 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda path: path.unlink(), "There is no table"),
        (lambda path: path.write_text('{"rows": [{"what": 1}]}'), "holds no table"),
        (lambda path: path.write_text(path.read_text().replace('"cpu"', '"cuda"')), "was measured on cuda"),
    ],
)
def test_a_table_that_does_not_compare_is_refused_before_anything_is_measured(
    planted, stored, change, sentence, capsys
):
    change(stored)
    status = speed.main([part for part in SMALL if part != "--debug"] + ["--check", str(stored)])
    assert status and not planted.measured
    assert sentence in capsys.readouterr().err


def test_the_stored_table_is_one_that_can_be_checked():
    rows = speed.read_stored(speed.STORED, "cpu").values()
    assert {row.part for row in rows} == set(speed.PARTS)


# --- the table ---


def test_bounds_are_judged_by_their_worst_row_and_printed(planted, capsys, tmp_path):
    assert speed.main([*SMALL, "--plot", str(tmp_path / "speed.png")]) == 0
    out = capsys.readouterr().out
    verdicts = [line.split() for line in out.splitlines() if line.endswith(("ok", "MISSED"))]
    found = {(" ".join(line[:2]), line[2]): line[-1] for line in verdicts}
    assert found["suppression ratio", "log_softmax"] == "ok" and found["ngram lift", "log_softmax"] == "MISSED"
    assert "150.0" in out and "15.00" in out, "300 us for two tokens, 15 times a baseline"
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_compile_adds_a_column_of_the_same_steps_in_plain_definitions_compiled(planted, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(speed, "compiled", lambda call: asked.append(call) or call)
    monkeypatch.setattr(speed_cases, "BOUNDS", ())
    planted.times = lambda name: np.full(20, 2e-6 if isinstance(name, tuple) else 1e-6)
    assert speed.main([*SMALL, "--compile"]) == 0
    header, *lines = capsys.readouterr().out.split("step ")[1].splitlines()
    assert "torch.compile" in header and len(asked) == len(speed.STEPS)
    assert all("0.50" in line for line in lines[: len(asked)])


def test_a_compiled_call_runs_its_operations_on_that_backend(monkeypatch):
    seen = []
    monkeypatch.setattr(speed.ops, "backend", lambda name: seen.append(name) or contextlib.nullcontext())
    assert speed.compiled(lambda i: i + 1)(2) == 3 and seen == ["compile"]


def test_every_bound_is_of_something_that_is_timed():
    timed = {(name, against) for name in speed_cases.STEPS for against in (*AGAINST, "torch.compile")}
    timed |= {(pair.what, pair.against) for pair in speed_cases.PAIRS}
    timed |= {(what, "dense head") for what in speed.HEADS.values()}
    assert {(bound.what, bound.against) for bound in speed_cases.BOUNDS} <= timed


def test_a_model_that_does_not_fit_is_left_out_with_the_reason(planted, monkeypatch, capsys):
    monkeypatch.setattr(speed_models, "free_memory", lambda device: 1 << 30)
    assert speed.main([part for part in SMALL if part != "--models"]) == 0
    out = capsys.readouterr().out
    assert "Left out: 8B forward, because its weights take 13." in out and "1.0 GiB are free" in out


# --- what is timed ---


@pytest.fixture(scope="module")
def inputs():
    return speed_cases.Inputs(9000, 2)


@pytest.mark.parametrize("name", speed_cases.STEPS)
def test_every_step_runs_on_its_inputs_and_changes_the_scores(inputs, name):
    processors = speed_cases.STEPS[name](inputs)
    call = inputs.step(processors)
    for i in (0, 1, len(inputs.buffers)):
        out = call(i)
        assert out.shape == (2, 9000) and not out.isnan().any()
    assert torch.equal(out, call(0)), "buffers rotate, and nothing is remembered"
    assert not torch.equal(out.log_softmax(-1), inputs.scores(0).log_softmax(-1))
    assert not torch.equal(inputs.scores(0), inputs.scores(1))


def test_on_another_device_nothing_that_is_timed_comes_from_the_host(monkeypatch):
    monkeypatch.setitem(speed_cases._BUFFERED, DEVICE.type, 1 << 20)
    with Device():
        x = speed_cases.Inputs(9000, 2, DEVICE.type)
        for name, make in speed_cases.STEPS.items():
            call = x.step(make(x))
            call(0)
            with Device(strict=True):
                assert call(1).device == DEVICE, name
        for baseline in speed_cases.BASELINES.values():
            assert baseline(x)(0).device == DEVICE


def test_log_softmax_is_that_of_all_scores_that_a_step_reads(inputs):
    reads = {name: speed_cases.tensors_read(make(inputs)) for name, make in speed_cases.STEPS.items()}
    assert (reads["ngram default"], reads["aligndistil adaptive"], reads["fusion mixture"]) == (1, 2, 3)
    assert reads["chain of all"] == 1 + 1 + 2 + 3 + 1
    assert len(speed_cases.log_softmax(inputs, 3)(0)) == 3


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(speed_cases, "GENERATED", 3)
    monkeypatch.setattr(speed_cases, "SCORED", 16)
    speed_cases.model_texts.cache_clear()
    yield
    speed_cases.model_texts.cache_clear()


@pytest.mark.parametrize("pair", speed_cases.PAIRS, ids=lambda pair: f"{pair.what}, {pair.against}")
def test_both_sides_of_every_pair_do_the_same_work(pair, short):
    with torch.inference_mode():
        ours, theirs = (call(1) for call in pair.make("cpu"))
    if pair.what.startswith("generate"):
        assert ours.shape == theirs.shape and not torch.equal(ours, theirs)
    elif pair.what.startswith("perplexity"):
        assert ours["nll"][:, 1:].shape == theirs.logits.shape[:2]
    elif pair.what == "fusion newton":
        torch.testing.assert_close(torch.cat(theirs), ours, rtol=1e-4, atol=1e-4)
    elif pair.what.startswith("Chain"):
        assert torch.equal(ours, theirs)


def test_look_ups_of_the_inputs_find_something(inputs):
    tokens = inputs.history(0)
    assert tokens.shape == (2, speed_cases.LENGTH)
    contexts = {
        (old, new)
        for old, new in zip(
            inputs.prior.orders[2].oldest.tolist(),
            inputs.prior.orders[1].oldest[inputs.prior.orders[2].parent].tolist(),
            strict=True,
        )
    }
    assert all(tuple(row[-2:].tolist()) in contexts for row in tokens)
    dry = inputs.step(speed_cases.STEPS["suppression dry"](inputs))
    assert (dry(0) < inputs.scores(0)).any(-1).all()


def test_a_prior_spread_over_a_larger_vocabulary_keeps_its_probabilities():
    from logitproc import NGramPrior

    small, large = NGramPrior.load("quixote"), speed_cases.spread_prior(32_000)
    new = np.sort(np.random.default_rng(0).choice(32_000, small.vocab_size, replace=False))
    text = small.orders[0].ids[100:140]
    # Only the uniform share of unseen mass differs: 1/31,999 for 1/8,191.
    np.testing.assert_allclose(large.log_prob(new[text]), small.log_prob(text), atol=0.5)
    for ours, theirs in zip(small.counts, large.counts, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_forward_pass_reads_one_token_after_the_same_text_and_as_much_head_as_asked(monkeypatch):
    monkeypatch.setitem(speed_models.LLAMA, "tiny", (64, 96, 2, 4, 2, True))
    model = speed_models.made("tiny", 500, "cpu")
    assert speed_models.size("tiny", 500) == sum(p.nbytes for p in model.parameters())
    assert all(p.std() > 0 and p.isfinite().all() for p in model.parameters())
    seen = []
    hook = lambda module, args, kwargs: seen.append(kwargs["past_key_values"].get_seq_length())
    model.model.register_forward_pre_hook(hook, with_kwargs=True)
    call = speed_models.one_token(model, 300, 2)
    with torch.inference_mode():
        shapes = [call(i).shape for i in range(3)]
    assert shapes == [(2, 300)] * 3 and seen == [speed_cases.LENGTH] * 3


# --- the clock ---


def test_in_turns_all_see_the_same_machine_and_other_buffers():
    watch, calls = Stopwatch(), []
    times = watch.in_turns({name: lambda i, n=name: calls.append((n, i)) for name in "ab"}, rounds=20, shortest=0.0)
    made = "".join(name for name, _ in calls)
    rounds = {made[i : i + 2] for i in range(4, len(made), 2)}
    assert made.startswith("abab") and rounds == {"ab", "ba"}, "each once a round, in changing order"
    assert [i for _, i in calls] == list(range(44))
    assert {name: len(t) for name, t in times.items()} == {"a": 20, "b": 20} and min(map(min, times.values())) > 0


def test_quick_calls_are_repeated_all_as_often_and_the_budget_ends_the_rounds_early():
    watch, now, counts = Stopwatch(), 0.0, {"quick": 0, "slow": 0}
    watch.clock = lambda: now

    def call(name, seconds):
        nonlocal now
        now += seconds
        counts[name] += 1

    calls = {"quick": lambda i: call("quick", 1e-4), "slow": lambda i: call("slow", 0.01)}
    times = watch.in_turns(calls, rounds=1000, budget=0.0, least=2)
    assert counts == {"quick": 2 + 2 * 20, "slow": 2 + 2 * 20}, "as often as the quick one fills two milliseconds"
    assert times["quick"] == pytest.approx([1e-4] * 2) and times["slow"] == pytest.approx([0.01] * 2)


def test_on_cuda_events_enclose_the_calls_and_the_host_waits_before_and_after_only(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        record = lambda self: log.append("record")
        synchronize = lambda self: log.append("wait")
        elapsed_time = lambda self, end: 6.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    assert Stopwatch("cuda").seconds(lambda i: log.append(i), 3) == pytest.approx(0.002)
    assert log == ["wait", "record", 0, 1, 2, "record", "wait"]

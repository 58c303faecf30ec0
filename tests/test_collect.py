"""`logitproc collect` on a tiny random model: killed, resumed, shared between processes, given bad input."""

import json
import os
import random
import resource
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_model, tiny_tokenizer

from logitproc import Chain, NGramPrior, NGramStyleLogitsProcessor, TokenLedger, cli
from logitproc.artifact import describe_tokenizer
from logitproc.collect import Job, collect, run
from logitproc.collect.draw import Request, draw, invert
from logitproc.collect.job import Item, Sampling, seed_of
from logitproc.collect.report import read_items
from logitproc.collect.store import ItemLog, repair
from logitproc.scoring import score_continuations

JOB = {
    "labels": {"good": ["w4 w5", "w6"], "bad": "w7 w8"},
    "template": "w9 {label} w10 {text}",
    "items_per_label": 30,
    "seed_examples": {"good": ["w11 w12", "w13", "w14 w15 w16"]},
    "generation": {"max_new_tokens": 5},
    "chain": [{"name": "suppression", "rule": "paper", "strength": 0.5}],
    "round_items": 12,
    "batch_size": 5,
}


def job(**changes) -> Job:
    return Job.from_dict({**JOB, **changes})


def collected(folder: Path, **changes) -> list[dict]:
    """Items of a run in this process."""
    done = collect(job(**changes), folder, tiny_model(), tiny_tokenizer(), say=lambda sentence: None)
    return list(read_items(done.data))


def comparable(items: list[dict]) -> list[dict]:
    """All of the items but which process wrote them."""
    return [{key: value for key, value in item.items() if key != "shard"} for item in items]


def rebuilt(items: list[dict], before: int | None = None) -> TokenLedger:
    """The ledger of what the file says, up to a round."""
    ledger = TokenLedger(tiny_tokenizer())
    for number in range(1 + max(item["round"] for item in items) if before is None else before):
        for label in JOB["labels"]:
            ids = [i["token_ids"] for i in items if i["round"] == number and i["label"] == label]
            if ids:
                ledger.update(ids, label, number)
    return ledger


def consistent(folder: Path, items: list[dict]) -> bool:
    """Each item once, sorted, without duplicates, and the saved ledger counts these items."""
    ids, texts = [item["id"] for item in items], [item["text"] for item in items]
    distinct = ids == sorted(set(ids)) and len(set(texts)) == len(texts)
    return distinct and TokenLedger.load(folder / "ledger").hash() == rebuilt(items).hash()


def complete(folder: Path, items: list[dict]) -> bool:
    """`consistent`, and the number of items that JOB asks for."""
    asked = Counter(item["label"] for item in items) == {"good": 30, "bad": 30}
    return asked and consistent(folder, items)


def forked(function: Callable[[], int | None], output: Path | None = None) -> int:
    """Start the function in a child process, which costs no imports, and return its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        if output is not None:
            handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout = sys.stderr = open(2, "w", closefd=False)  # not what pytest captures
        status = function() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def exit_status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, list[dict]]:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, collected(folder)


# --- a run ---


def test_a_run_makes_each_item_once_and_says_how(whole):
    folder, items = whole
    assert complete(folder, items)
    assert all(
        item["seed"] == seed_of(item["id"], item["attempt"]) and item["shard"] == 0 and item["rule"] == "paper"
        and item["finish"] == "length" and item["base_nll"] > 0 and len(item["token_ids"]) == 5
        for item in items
    )  # fmt: skip
    assert Counter((i["label"], i["prompt_id"]) for i in items) == {("good", 0): 15, ("good", 1): 15, ("bad", 0): 30}
    assert {item["round"] for item in items} == {0, 1, 2, 3, 4}
    per_round = Counter((item["round"], item["label"]) for item in items)
    assert set(per_round.values()) == {6}  # labels take turns


def test_the_ledger_is_frozen_in_a_round_and_holds_the_rounds_before(whole):
    _, items = whole
    for number in range(5):
        (found,) = {item["ledger_hash"] for item in items if item["round"] == number}
        assert found == rebuilt(items, before=number).hash()


def test_the_chain_reads_the_ledger(whole, tmp_path):
    plain = collected(tmp_path, chain=[])
    counts = lambda items: Counter(token for item in items for token in item["token_ids"])
    assert counts(whole[1]).most_common(1)[0][1] < counts(plain).most_common(1)[0][1]
    assert {item["rule"] for item in plain} == {None}


def test_a_scope_of_labels_gives_each_label_its_own_chain(tmp_path):
    spec = [{"name": "suppression", "rule": "paper", "scope": "label"}]
    items = collected(tmp_path, chain=spec)
    assert complete(tmp_path, items)
    chains = run.build_chains([run._Member(spec[0])], rebuilt(items), list(JOB["labels"]))
    scores = torch.zeros(1, 97)
    of = lambda label: chains[label](torch.zeros(1, 1, dtype=torch.long), scores)
    assert not torch.equal(of("good"), of("bad"))


def test_running_again_changes_nothing(whole):
    folder, items = whole
    before = (folder / "items-0.jsonl").read_bytes(), (folder / "data.jsonl").read_bytes()
    assert collected(folder) == items
    assert before == ((folder / "items-0.jsonl").read_bytes(), (folder / "data.jsonl").read_bytes())


@pytest.mark.parametrize("window", [None, 2])
def test_a_run_that_lost_its_tail_goes_on_to_the_same_file(whole, tmp_path, window):
    items = whole[1] if window is None else collected(tmp_path / "whole", ledger={"window": window})
    source = whole[0] if window is None else tmp_path / "whole"
    lines = (source / "items-0.jsonl").read_bytes().splitlines(keepends=True)
    for kept in (0, 1, 7, 23, 59):
        folder = tmp_path / str(kept)
        folder.mkdir()
        (folder / "job.json").write_bytes((source / "job.json").read_bytes())
        (folder / "items-0.jsonl").write_bytes(b"".join(lines[:kept]))
        assert collected(folder, **({"ledger": {"window": window}} if window else {})) == items


def test_any_order_of_the_lines_is_the_same_collection(whole, tmp_path):
    folder, items = whole
    lines = (folder / "items-0.jsonl").read_bytes().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    (tmp_path / "job.json").write_bytes((folder / "job.json").read_bytes())
    (tmp_path / "items-0.jsonl").write_bytes(b"".join(lines[:30]))
    (tmp_path / "items-3.jsonl").write_bytes(b"".join(lines[30:]))
    assert collected(tmp_path) == items


def test_empty_texts_and_duplicates_are_counted_and_drawn_again(tmp_path):
    one_word = {"generation": {"max_new_tokens": 1, "temperature": 2.0}, "chain": [], "retries": 40}
    done = collect(job(**one_word), tmp_path, tiny_model(), tiny_tokenizer(), say=pytest.fail)
    items = list(read_items(done.data))
    assert complete(tmp_path, items) and done.unfilled == 0
    assert done.failures["duplicate"] > 20 and done.failures["empty"] > 0
    again = [item for item in items if item["attempt"]]
    assert again and all(item["retry_because"] in ("duplicate", "empty") for item in again)
    lines = list(read_items(tmp_path / "items-0.jsonl"))
    assert len(lines) == 60 + sum(done.failures.values())
    assert all((line["failed"] == "empty") == (line["text"] == "") for line in lines)
    assert collected(tmp_path, **one_word) == items


def test_what_the_retries_did_not_fill_is_said(tmp_path):
    said = []
    few = job(items_per_label=60, generation={"max_new_tokens": 1}, retries=2)  # 97 words, 120 items
    done = collect(few, tmp_path, tiny_model(), tiny_tokenizer(), say=said.append)
    assert done.unfilled > 0 and done.items + done.unfilled == 120
    assert any(f"{done.unfilled} of 120 items are missing: 2 retries" in sentence for sentence in said)


def test_async_makes_every_item_once(tmp_path):
    assert complete(tmp_path, collected(tmp_path, sync="async"))


# --- crashes ---


def test_killed_at_random_moments_and_resumed_it_equals_the_uninterrupted_run(tmp_path, monkeypatch):
    """Twenty SIGKILLs while the collection runs, then one start that ends by itself."""
    wanted = job(items_per_label=240, generation={"max_new_tokens": 2, "temperature": 1.5})  # with duplicates
    folder, log = tmp_path / "run", tmp_path / "run" / "items-0.jsonl"

    def start(folder: Path) -> int:
        collect(wanted, folder, tiny_model(), tiny_tokenizer())
        return 0

    began = time.monotonic()
    assert exit_status(forked(lambda: start(tmp_path / "whole"), tmp_path / "log")) == 0
    pause = (time.monotonic() - began) / 40  # so that twenty of them do not last as long as the work

    size = lambda: log.stat().st_size if log.exists() else 0
    draws, found = random.Random(0), []
    for kill in range(20):
        monkeypatch.setattr(run, "CHECKPOINT_SECONDS", kill % 2 * 1e9)  # at every round, and never
        before = size()
        process = forked(lambda: start(folder), tmp_path / "log")
        while kill % 4 and size() == before:  # three of four get to write something
            time.sleep(0.001)
            assert os.waitpid(process, os.WNOHANG) == (0, 0), (tmp_path / "log").read_text()
        time.sleep(draws.uniform(0, pause))
        os.kill(process, signal.SIGKILL)
        assert exit_status(process) == -signal.SIGKILL  # it was not done yet
        found.append(size())
    assert exit_status(forked(lambda: start(folder), tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    assert len(set(found)) > 12  # the kills came at different points

    assert (folder / "data.jsonl").read_bytes() == (tmp_path / "whole" / "data.jsonl").read_bytes()
    items = list(read_items(folder / "data.jsonl"))
    assert len(items) == 480 and consistent(folder, items)
    lines = Counter((line["id"], line["attempt"]) for line in read_items(log))
    assert set(lines.values()) == {1}  # nothing was written twice on the way
    assert any(item["attempt"] for item in items)


def test_a_torn_last_line_is_cut_said_and_drawn_again(whole, tmp_path):
    source, items = whole
    data = (source / "items-0.jsonl").read_bytes()
    for cut in (1, 40, len(data.splitlines()[-1]) + 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "job.json").write_bytes((source / "job.json").read_bytes())
        (folder / "items-0.jsonl").write_bytes(data[:-cut])
        said: list[str] = []
        done = collect(job(), folder, tiny_model(), tiny_tokenizer(), say=said.append)
        assert list(read_items(done.data)) == items
        torn = [sentence for sentence in said if "ended in a line that a crash had cut" in sentence]
        assert len(torn) == (cut != len(data.splitlines()[-1]) + 1)


def test_a_shard_is_repaired_wherever_it_was_cut(tmp_path):
    whole = b"".join(json.dumps({"n": n, "text": "é" * n}).encode() + b"\n" for n in range(4))
    ends = [0, *(at + 1 for at, byte in enumerate(whole) if byte == 10)]
    file = tmp_path / "items-0.jsonl"
    for size in range(len(whole) + 1):
        file.write_bytes(whole[:size])
        kept = max(end for end in ends if end <= size)
        assert repair(file) == size - kept and file.read_bytes() == whole[:kept]
    file.write_bytes(whole + b"\0" * 9 + b"\n")  # a block that the disk never wrote
    assert repair(file) == 10 and file.read_bytes() == whole


def test_a_line_that_is_being_written_is_read_when_it_is_whole(tmp_path):
    log = ItemLog(tmp_path)
    (tmp_path / "items-1.jsonl").write_bytes(b'{"n": 1}\n{"n"')
    assert [record for record, _ in log.read()] == [{"n": 1}]
    with (tmp_path / "items-1.jsonl").open("ab") as file:
        file.write(b': 2}\n')
    assert [(record, log.line(place)) for record, place in log.read()] == [({"n": 2}, b'{"n": 2}\n')]
    assert log.positions == {1: (18, 2)} and log.lines_before(1, 9) == 1
    assert log.lines_before(1, 10) == log.lines_before(1, 19) == log.lines_before(2, 0) == -1


def test_a_damaged_line_inside_is_named(whole, tmp_path):
    (tmp_path / "job.json").write_bytes((whole[0] / "job.json").read_bytes())
    lines = (whole[0] / "items-0.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "items-0.jsonl").write_bytes(lines[0] + b"{oops\n" + lines[1])
    with pytest.raises(ValueError, match="items-0.jsonl is damaged at line 2; remove that line"):
        collected(tmp_path)


@pytest.mark.parametrize("damage", ["no progress", "no ledger", "other ledger", "shorter items"])
def test_a_checkpoint_that_does_not_fit_is_rebuilt_from_the_items(whole, tmp_path, damage):
    folder = tmp_path / "run"
    items = collected(folder)
    if damage == "no progress":
        (folder / "progress.json").unlink()
    elif damage == "no ledger":
        (folder / "ledger" / "artifact.json").unlink()
    elif damage == "other ledger":
        TokenLedger(tiny_tokenizer()).save(folder / "ledger")
    else:
        lines = (folder / "items-0.jsonl").read_bytes().splitlines(keepends=True)
        (folder / "items-0.jsonl").write_bytes(b"".join(lines[:-9]))
    said: list[str] = []
    collect(job(), folder, tiny_model(), tiny_tokenizer(), say=said.append)
    assert said == ["There is no checkpoint of the ledger that fits the items; it is rebuilt from them."]
    assert list(read_items(folder / "data.jsonl")) == items and complete(folder, items)


def test_a_full_disk_keeps_what_is_finished_and_the_same_command_goes_on(whole, tmp_path, here):
    def child() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
        return cli.main(["collect", "--config", str(here / "job.yaml"), "--output", str(tmp_path / "run")])

    assert exit_status(forked(child, tmp_path / "log")) == 2
    said = (tmp_path / "log").read_text().splitlines()[-1]
    assert "what is finished is kept and the same command goes on" in said and "items-0.jsonl" in said
    kept = (tmp_path / "run" / "items-0.jsonl").read_bytes()
    assert 0 < len(kept) <= 9000 and kept.endswith(b"\n")
    assert collected(tmp_path / "run") == whole[1]
    assert (tmp_path / "run" / "items-0.jsonl").read_bytes().startswith(kept)


def test_an_interruption_ends_with_status_130_and_the_same_command_goes_on(
    whole, tmp_path, here, capsys, monkeypatch
):
    calls, original = [], run.draw

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(run, "draw", interrupted)
    arguments = ["collect", "--config", str(here / "job.yaml"), "--output", str(tmp_path)]
    assert cli.main(arguments) == 130
    assert "Interrupted; 12 of 60 items are kept and the same command goes on." in capsys.readouterr().err
    assert collected(tmp_path) == whole[1]


def test_two_writers_of_one_folder_are_prevented(tmp_path):
    first = ItemLog(tmp_path)
    first.open()
    with pytest.raises(ValueError, match="Another process writes to"):
        collected(tmp_path)
    first.close()
    collected(tmp_path)


# --- several processes ---


def launched(arguments: list[str], world: int, folder: Path) -> None:
    """The command line in `world` processes, as `accelerate launch` starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def child(rank: int) -> int:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)  # other tests may have made one
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        return cli.main(arguments)

    logs = [folder / f"log-{rank}" for rank in range(world)]
    children = [forked(lambda rank=rank: child(rank), logs[rank]) for rank in range(world)]
    assert [exit_status(process) for process in children] == [0] * world, "\n".join(log.read_text() for log in logs)


@pytest.mark.parametrize("world, sync", [(2, "round"), (4, "round"), (2, "async")])
def test_processes_share_the_work(whole, tmp_path, here, world, sync):
    folder = tmp_path / "run"
    command = ["collect", "--config", str(here / "job.yaml"), "--output", str(folder), "--device", "cpu"]
    launched([*command, "--set", f"sync={sync}", "--set", "plain_items_per_label=0"], world, tmp_path)
    items = list(read_items(folder / "data.jsonl"))
    assert complete(folder, items)
    assert {item["shard"] for item in items} == {0, 1, 2} - {world}  # a round of 12 has three batches
    one = whole[0]
    if sync == "round":
        assert comparable(items) == comparable(whole[1])
        assert TokenLedger.load(folder / "ledger").hash() == TokenLedger.load(one / "ledger").hash()
    assert "60 items in" in (tmp_path / "log-0").read_text() and (tmp_path / "log-1").read_text() == ""


def test_any_number_of_processes_goes_on_where_another_stopped(whole, tmp_path, here):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "job.json").write_bytes((whole[0] / "job.json").read_bytes())
    lines = (whole[0] / "items-0.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "items-2.jsonl").write_bytes(b"".join(lines[5:17]) + b'{"torn')
    command = ["collect", "--config", str(here / "job.yaml"), "--output", str(folder), "--device", "cpu"]
    launched([*command, "--set", "plain_items_per_label=0"], 2, tmp_path)
    assert comparable(list(read_items(folder / "data.jsonl"))) == comparable(whole[1])


# --- drawing ---


def requests(n: int) -> list[Request]:
    prompts = [" ".join(f"w{4 + (i + k) % 9}" for k in range(1 + i % 4)) for i in range(n)]
    return [Request(prompt, "a", seed_of(str(i), 0)) for i, prompt in enumerate(prompts)]


def drawn(given: list[Request], sampling: Sampling, stop: tuple[str, ...] = (), model=None, chain=None):
    return draw(model or tiny_model(), tiny_tokenizer(), {"a": chain or Chain()}, given, sampling, stop)


def test_a_text_does_not_depend_on_its_neighbours():
    sampling = Sampling(max_new_tokens=8, temperature=1.3, top_k=40, top_p=0.95, min_p=0.01)
    together = drawn(requests(9), sampling)
    alone = [drawn([request], sampling)[0] for request in requests(9)]
    assert [(d.text, d.token_ids) for d in together] == [(d.text, d.token_ids) for d in alone]
    assert len({d.text for d in together}) == 9


def test_the_distribution_function_is_inverted():
    # p = (.5, 0, .3, .2): the function rises to .5, .5, .8, 1.
    scores = torch.tensor([[0.5, 0.0, 0.3, 0.2]]).log()
    u = [0.0, 0.49, 0.51, 0.79, 0.81, 1 - 2**-53]
    assert [invert(scores, torch.tensor([x], dtype=torch.float64)).item() for x in u] == [0, 0, 2, 2, 3, 3]
    first_forbidden = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert invert(first_forbidden, torch.zeros(1, dtype=torch.float64)).item() == 1


def test_texts_are_drawn_as_sampling_would_draw_them():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    given = [Request("w4 w5", "a", seed_of(str(i), 0)) for i in range(4000)]
    first = [d.token_ids[0] for d in drawn(given, Sampling(max_new_tokens=1, temperature=1.4, top_k=6))]
    with torch.no_grad():
        scores = model(**tokenizer("w4 w5", return_tensors="pt")).logits[0, -1] / 1.4
    top = scores.topk(6)
    p = top.values.softmax(-1)
    found = torch.tensor([first.count(i) for i in top.indices.tolist()]) / 4000
    assert found.sum() == pytest.approx(1)
    assert ((found - p).abs() < 4 * (p * (1 - p) / 4000).sqrt()).all()  # four standard errors


def test_settings_that_come_with_the_model_stay_out():
    model = tiny_model()
    wanted = drawn(requests(3), Sampling(max_new_tokens=6), model=model)
    model.generation_config.repetition_penalty = 9.0
    model.generation_config.max_length = 4
    assert drawn(requests(3), Sampling(max_new_tokens=6), model=model) == wanted
    assert model.generation_config.repetition_penalty == 9.0


def test_base_nll_is_that_of_the_model_alone():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prior = NGramPrior.from_ids([[5, 6, 7, 8, 9] * 4], 2, 97)
    chain = Chain([NGramStyleLogitsProcessor(prior, strength=1.0)])
    given = requests(5)
    found = drawn(given, Sampling(max_new_tokens=7, temperature=0.8), model=model, chain=chain)
    prompts = [tokenizer(request.prompt)["input_ids"] for request in given]
    scored = score_continuations(model, Chain(), prompts, [d.token_ids for d in found])
    assert [d.base_nll for d in found] == pytest.approx([row["base_nll"] for row in scored], abs=1e-4)


def test_a_text_ends_before_its_stop_string_and_only_its_own_ids_count():
    sampling = Sampling(max_new_tokens=12)
    whole = drawn(requests(6), sampling)
    stop = (" " + whole[0].text.split()[3],)
    for before, after in zip(whole, drawn(requests(6), sampling, stop), strict=True):
        text, found, _ = before.text.partition(stop[0])
        assert after.text == text and after.finish == ("stop" if found else "length")
        assert after.token_ids == before.token_ids[: len(text.split())]
        assert len(after.token_ids) == len(text.split())
    assert [d.finish for d in drawn(requests(6), sampling, stop)].count("stop") >= 1


def test_an_end_of_text_token_ends_a_text_and_is_not_counted():
    model = tiny_model()
    whole = drawn(requests(4), Sampling(max_new_tokens=6), model=model)
    end = whole[0].token_ids[2]
    model.generation_config.eos_token_id = end
    found = drawn(requests(4), Sampling(max_new_tokens=6), model=model)
    assert found[0].token_ids == whole[0].token_ids[:2] and found[0].finish == "eos"
    longer = drawn(requests(4), Sampling(max_new_tokens=6, min_new_tokens=4), model=model)
    assert all(len(d.token_ids) >= 4 for d in longer)


# --- the job file ---


def test_the_prompt_of_the_paper():
    paper = Job.from_dict(
        {
            "text_type": "movie review",
            "labels": {"positive": "positive sentiment", "negative": "negative sentiment"},
            "template": "Write a {text_type} to cover all following elements\nElements: {label}\n"
            '{Text_type}: "{text}"\n',
            "seed_examples": {"positive": ["Lovely."], "negative": ["Dull."]},
            "shots_of": "all",
            "items_per_label": 3,
        }
    )
    form = 'Write a movie review to cover all following elements\nElements: {} sentiment\nMovie review: "{}'
    examples = {form.format("positive", 'Lovely."'), form.format("negative", 'Dull."')}
    for seed in range(4):
        *shown, last = paper.prompt(Item("", "negative", 0, 0, 0), seed).split("\n\n")
        assert set(shown) == examples and last == form.format("negative", "")
    assert paper.stop == ['"']


def test_seed_examples_are_drawn_with_the_items_seed():
    prompts = {job(shots=2).prompt(Item("", "good", 1, 0, 0), seed) for seed in range(40)}
    assert len(prompts) == 6  # two of three, in either order
    assert all(prompt.endswith("w9 w6 w10") and prompt.count("w9 w6 w10 w1") == 2 for prompt in prompts)
    assert job().prompt(Item("", "bad", 0, 0, 0), 0) == "w9 w7 w8 w10"
    assert len(job(shots=2).longest_prompt(Item("", "good", 1, 0, 0))) == max(map(len, prompts))


def test_braces_in_a_text_are_no_placeholders():
    braces = job(seed_examples={"good": ["{label} {x}"]})
    assert "w10 {label} {x}\n\n" in braces.prompt(Item("", "good", 0, 0, 0), 0)


def test_items_are_balanced_and_their_ids_depend_on_the_job_and_the_model():
    uneven = job(items_per_label={"bad": 2, "good": 4}).items("digest")
    assert [item.label for item in uneven] == ["good", "bad", "good", "bad", "good", "good"]
    ids = {item.id for item in uneven}
    assert len(ids) == 6 and not ids & {item.id for item in job().items("another")}
    about = {"weights": "1"}
    assert len({job().digest(about), job(seed=1).digest(about), job(seed=1).digest({"weights": "2"})}) == 3
    turned = job(labels=dict(reversed(JOB["labels"].items())))
    assert turned.digest(about) != job().digest(about)  # labels take turns in this order
    assert job().digest(about) == job(plain_items_per_label=3).digest(about)  # changes the report only


def test_fitted_parts_count_by_what_they_hold_and_not_where_they_lie(tmp_path):
    prior = lambda ids: NGramPrior.from_ids([ids * 4], 2, 97)
    for name, ids in (("a", [5, 6, 7]), ("copy", [5, 6, 7]), ("other", [5, 7, 6])):
        saved = prior(ids)
        saved.tokenizer = describe_tokenizer(tiny_tokenizer())
        saved.save(tmp_path / name)
    about = lambda name: run._Member({"name": "ngram", "prior": str(tmp_path / name)}).about
    assert about("a") == about("copy") != about("other")


def test_settings_on_the_command_line_beat_the_file(tmp_path):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB, sort_keys=False))
    found = Job.from_file(tmp_path / "job.yaml", ["generation.top_p=0.9", "seed=3", "labels.good=w20"])
    assert found.generation == Sampling(max_new_tokens=5, top_p=0.9) and found.seed == 3
    assert found.labels["good"] == ("w20",)
    assert Job.from_dict(found.to_dict()) == found


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with a model, a job and what goes with it."""
    folder = tmp_path_factory.mktemp("here")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "job.yaml").write_text(yaml.safe_dump({**JOB, "model": str(folder / "model")}, sort_keys=False))
    other = TokenLedger(tiny_tokenizer(size=90))
    other.save(folder / "other-ledger")
    (folder / "real.csv").write_text("text,label\nw5 w6,good\nw7,good\n")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.txt").write_text("mine")
    (folder / "list.yaml").write_text("- a\n")
    (folder / "no.yaml").write_text("a: [")
    return folder


@pytest.fixture
def command(here, tmp_path, capsys, monkeypatch):
    """command(*settings, output=...) -> (status, standard output, standard error) of a start in `here`."""
    monkeypatch.chdir(here)

    def command(*arguments: str, config: str = "job.yaml", output: Path = tmp_path / "out"):
        status = cli.main(["collect", "--config", config, "--output", str(output), *arguments])
        return status, *capsys.readouterr()

    return command


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (["item_per_label=3"], "Unknown key of the job file 'item_per_label'. Did you mean 'items_per_label'"),
        (["generation.temprature=1"], "Unknown key of generation 'temprature'. Did you mean 'temperature'"),
        (["items_per_label={good: 3}"], "items_per_label has no items for the label 'bad'"),
        (["items_per_label={good: 3, bad: 3, ugly: 1}"], "Unknown label in items_per_label 'ugly'"),
        (["items_per_label=0"], "items_per_label must be a number at least 1, got 0"),
        (["items_per_label={good: 3, bad: 0}"], "items_per_label.bad must be a number at least 1, got 0"),
        (["items_per_label=many"], "items_per_label must be a whole number, got 'many'"),
        (["template=w4 {text}"], "The template needs the placeholder {label}"),
        (["template=w4 {label}"], "The template needs the placeholder {text}"),
        (["template=w4 {text} {label}"], "The template needs {label} before {text}"),
        (["template='{label} {txt} {text}'"], "Unknown placeholder of the template 'txt'. Did you mean 'text'"),
        (["template='{label} {text} {text}'"], "The template holds {text} more than once"),
        (["generation.stop=['']"], "generation.stop holds an empty string, which would end every text"),
        (["ledger.window=0"], "window must be a whole number of rounds, at least 1"),
        (["labels=[good]"], "labels must map each label to its wording"),
        (["labels.good=[]"], "labels.good must be a text or a list of texts"),
        (["seed_examples={god: [w4]}"], "Unknown label in seed_examples 'god'. Did you mean 'good'"),
        (["chain=[{name: supression}]"], "Unknown method 'supression'. Did you mean 'suppression'"),
        (["chain=[{name: suppression, rul: paper}]"], "Unknown parameter of 'suppression' 'rul'. Did you mean 'rule'"),
        (["chain=[{rule: paper}]"], "Each processor of the chain needs a name"),
        (["chain=[{name: suppression, rule: paper, ledger: other-ledger}]"], "was fitted for the tokenizer"),
        (["sync=sometimes"], "sync must be one of round, async, got 'sometimes'"),
        (["batch_size=0"], "batch_size must be a number at least 1, got 0"),
        (["generation.temperature=0"], "generation.temperature must be a number in [0.01, 100], got 0"),
        (["generation.max_new_tokens=125"], "the model reads 3. Show fewer or shorter examples"),
        (["model=no/where/at/all"], "There is no folder no/where/at/all"),
        (["oracle={train: nowhere.csv}"], "The oracle's real data nowhere.csv is not there"),
        (["oracle={train: real.csv}"], "has no text labelled 'bad'; it has good"),
        (["oracle={test: real.csv}"], "oracle needs train"),
        (["generation"], "--set 'generation' is not KEY=VALUE"),
        (["seed={x: 1}"], "seed must be a whole number"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_sentence_before_anything_is_written(command, tmp_path, settings, sentence):
    status, out, err = command(*(f"--set={setting}" for setting in settings))
    last = err.splitlines()[-1]
    assert status == 2 and out == "" and sentence in last and last.startswith("logitproc: ")
    assert not (tmp_path / "out").exists()


def test_bad_places_are_refused_in_one_sentence(command, whole, here, tmp_path):
    assert "There is no job file nowhere.yaml" in command(config="nowhere.yaml")[2]
    assert "list.yaml is no job: it holds no mapping" in command(config="list.yaml")[2]
    assert "no.yaml is no YAML" in command(config="no.yaml")[2]
    status, _, err = command(output=here / "foreign")
    assert status == 2 and "holds files but no collection; choose a new or empty folder" in err
    assert sorted(path.name for path in (here / "foreign").iterdir()) == ["thesis.txt"]
    assert "is a file; give --output a folder" in command(output=here / "real.csv")[2]
    before = (whole[0] / "items-0.jsonl").read_bytes()
    status, _, err = command("--set=seed=5", output=whole[0])
    assert status == 2 and "holds another job: seed is 0 there and 5 here. Choose another --output" in err
    assert before == (whole[0] / "items-0.jsonl").read_bytes()
    assert cli.main(["collect", "--config", "job.yaml"]) == 2


def test_a_collection_of_another_model_is_refused(whole):
    with pytest.raises(ValueError, match="holds another job: it was made with other weights, another tokenizer"):
        collect(job(), whole[0], tiny_model(seed=5), tiny_tokenizer())


# --- the report ---


def test_a_terminal_sees_items_rate_time_left_and_diversity(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    collected(tmp_path / "run")
    shown = capsys.readouterr().err
    assert "60/60" in shown and "items/s, distinct-3 1.00" in shown and "00:00<" in shown
    collected(tmp_path / "run")  # goes on where it was
    assert " 0/60" not in capsys.readouterr().err


def test_the_command_ends_with_texts_and_a_report_beside_plain_sampling(command, here, tmp_path):
    rows = "".join(f"w{4 + i % 20} w{30 + i},{('good', 'bad')[i % 2]}\n" for i in range(40))
    (tmp_path / "real.csv").write_text("text,label\n" + rows)
    status, out, err = command(f"--set=oracle.train={tmp_path / 'real.csv'}", "--set=plain_items_per_label=8")
    assert status == 0 and "items_per_label:\n  good: 30" in err  # the resolved job
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["arms"]) == ["collected", "plain sampling"] and report["settings"]["texts"] == 16
    assert report["labels"] == {"good": 30, "bad": 30} and report["drawn_again"] == {}
    assert 0 <= report["arms"]["collected"]["label_accuracy"] <= 1
    assert len(list(read_items(tmp_path / "out" / "plain" / "data.jsonl"))) == 16
    assert (tmp_path / "out" / "report.txt").read_text() in out
    for words in ("plain sampling", "label accuracy", "Vendi score", "good: w", "Oracles: trained on 32 real"):
        assert words in out
    assert command(f"--set=oracle.train={tmp_path / 'real.csv'}", "--set=plain_items_per_label=8")[1] == out

"""The command line, run on a tiny random model in a temporary folder; nothing is downloaded."""

import errno
import io
import json
import math
import shutil
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config
from transformers.utils import logging

import logitproc as lp
from logitproc import bundled, cli, companion, generation, registry
from logitproc.artifact import describe_tokenizer
from logitproc.heads import KINDS

TEXT = "the knight rode down the road and the road was long and the knight was old\n" * 3
PROMPTS = ["the old knight", "the road was", "and"]


@pytest.fixture(scope="session")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the package bundles, in small: the models, the priors and the head of the demo."""
    folder = tmp_path_factory.mktemp("pocket")
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    # As sentencepiece does: a word begins with its space, which decoding drops at the start of a text.
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = list("abcdefghijklmnopqrstuvwxyz")
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(TEXT.splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    width = len(tokenizer) + 3  # padded, as real models are
    config = LlamaConfig(
        vocab_size=width, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    for seed, name in enumerate(["base", "mini", "mini-dpo", "mini-reverse-dpo"]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in ("quixote", "quixote-held-out"):
        prior = lp.NGramPrior.from_ids(tokenizer(TEXT.splitlines())["input_ids"], 3, len(tokenizer), eos=2)
        prior.tokenizer = describe_tokenizer(tokenizer)
        prior.save(folder / name)
    head = KINDS["paper"].build(torch.randn(20, 16), torch.arange(width) % 20)
    head.token_weights, head.tokenizer = torch.ones(width), describe_tokenizer(tokenizer)
    head.save(folder / "base-vq")
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, pocket: Path):
    """Everything in this file runs on the small bundle and without a network."""

    def refuse(*_):
        raise AssertionError("the command line reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(bundled, "_FOLDER", pocket)
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """run(*arguments) -> (status, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def generate(run):
    """generate(*arguments) -> standard output of a `generate` of 8 tokens that goes well in silence."""

    def generate(*arguments: object) -> str:
        status, out, err = run("generate", "--max-new-tokens", 8, *arguments)
        assert (status, err) == (0, "")
        return out

    return generate


@pytest.fixture
def refused(run):
    """refused(*arguments) -> the one sentence on standard error; nothing was printed, the status is 2."""

    def refused(*arguments: object, status: int = 2) -> str:
        found, out, err = run(*arguments)
        assert (found, out) == (status, "")
        assert err.startswith("logitproc: ") and err.endswith("\n") and err.count("\n") == 1
        return err

    return refused


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_, **__):
        raise AssertionError("the model was loaded before the input was checked")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def records(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def python(*arguments: str, **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **kwargs)


# --- list, describe, and what every command shares ---


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["list"], ["list", "--json"], ["fit"]])
def test_light_commands_import_nothing_heavy(arguments):
    code = (
        "import sys; from logitproc.cli import main; main(sys.argv[1:]); "
        "print([m for m in ('torch', 'transformers', 'numpy', 'yaml') if m in sys.modules], file=sys.stderr)"
    )
    assert python("-c", code, *arguments).stderr.splitlines()[-1] == "[]"


def test_the_module_runs_as_a_script_and_shows_its_version():
    done = python("-m", "logitproc.cli", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"logitproc {lp.__version__}\n", "")


def test_a_reader_that_stops_reading_ends_it_quietly():
    pipe = subprocess.Popen(
        [sys.executable, "-m", "logitproc.cli", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    pipe.stdout.close()  # before it has printed anything
    assert (pipe.stderr.read(), pipe.wait()) == (b"", 0)
    pipe.stderr.close()


@pytest.mark.parametrize("command", [[], ["generate"], ["fit"], ["fit", "ngram"], ["demo"], ["describe"]])
def test_every_command_has_help(run, command):
    status, out, err = run(*command, "--help")
    assert (status, err) == (0, "") and "Usage: logitproc" in out


def test_no_arguments_show_the_help(run):
    assert run() == run("--help")


def test_list_shows_every_method(run):
    status, out, _ = run("list")
    assert status == 0 and [line.split()[0] for line in out.splitlines()] == ["name", *lp.names()]
    status, out, _ = run("list", "--json")
    assert [record["name"] for record in records(out)] == lp.names()
    assert list(records(out)[0]) == ["name", "paper", "summary"]


def test_describe_shows_parameters_capabilities_and_an_example_that_runs(run, generate):
    status, out, err = run("describe", "ngram")
    assert (status, err) == (0, "")
    assert "arXiv:2601.16224" in out and "Parameters:" in out
    assert ["strength", "float", "default", "None"] in [line.split() for line in out.splitlines()]
    assert ["prior", "NGramPrior", "required"] in [line.split() for line in out.splitlines()]
    assert "all tokens" in out and "beam search" in out
    example = out.split()[-1]
    assert example.startswith("ngram:prior=quixote,strength=0.5,confidence=wb")
    assert generate("--prompt", "the", "--proc", example)


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (["nonsense"], "nonsense"),
        (["generate", "--nonsense"], "generate --help"),
        (["describe"], "NAME"),
        (["describe", "ngrma"], "Did you mean 'ngram'?"),
        (["fit"], "fit --help"),
        (["fit", "ngram", "--out", "x"], "--corpus"),
        (["generate", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "--top-p", "nan"], "--top-p"),
        (["generate", "--dtype", "int8"], "--dtype"),
    ],
)
def test_wrong_usage_is_one_sentence(refused, arguments, hint):
    assert hint in refused(*arguments)


@pytest.mark.parametrize(
    "error, status, sentence",
    [
        (OSError(errno.ENOSPC, "No space left on device", "big"), 2, "No space left on device: big."),
        (ImportError("No module named 'x'"), 2, "No module named 'x'"),
        (TypeError("strength is\na list"), 2, "strength is a list"),
        (KeyboardInterrupt(), 2, "Interrupted."),
        (KeyError("layer"), 1, "KeyError: 'layer'; --debug shows where."),
        (RuntimeError("out of\nmemory."), 1, "RuntimeError: out of memory; --debug shows where."),
    ],
)
def test_errors_are_one_sentence_and_debug_shows_where(monkeypatch, run, refused, error, status, sentence):
    def fail():
        raise error

    monkeypatch.setattr(registry, "entries", fail)
    assert refused("list", status=status) == f"logitproc: {sentence}\n"
    for arguments in (["--debug", "list"], ["list", "--debug"]):
        found, out, err = run(*arguments)
        assert (found, out) == (status, "")
        assert "Traceback" in err and err.endswith(f"logitproc: {sentence}\n")


# --- generate ---


def test_text_is_the_prompt_and_what_the_model_continues(generate, pocket):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pocket / "mini")
    inputs = tokenizer("the old knight", return_tensors="pt")
    ids = AutoModelForCausalLM.from_pretrained(pocket / "mini").generate(
        input_ids=inputs["input_ids"], max_new_tokens=8, do_sample=False
    )
    for name in ("mini", pocket / "mini"):
        out = generate("--model", name, "--prompt", "the old knight")
        assert out == tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"


def test_the_bundled_model_is_the_default(generate):
    assert generate("--prompt", "the") == generate("--prompt", "the", "--model", "base")
    assert generate("--prompt", "the") != generate("--prompt", "the", "--model", "mini")


def test_json_lines_have_stable_keys_and_the_text_continues_the_prompt(generate):
    arguments = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    arguments += ["--do-sample", "--seed", 3, "--num-return-sequences", 2, "--proc", "ngram:prior=quixote"]
    lines, text = records(generate(*arguments, "--json")), generate(*arguments)
    for record in lines:
        assert list(record) == ["prompt", "index", "text", "tokens", "chain", "seed"]
        assert record["chain"] == [{"name": "ngram", "prior": "quixote"}] and record["seed"] == 3
    assert [record["index"] for record in lines] == list(range(6))
    assert [record["prompt"] for record in lines] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert text == "\n".join(record["prompt"] + record["text"] + "\n" for record in lines)


def test_tokens_end_with_the_end_of_text(run):
    arguments = ["--prompt", "the", "--num-return-sequences", 40, "--max-new-tokens", 50]
    _, out, _ = run("generate", *arguments, "--temperature", 1.5, "--seed", 0, "--json")
    rows = [record["tokens"] for record in records(out)]
    assert any(len(row) < 50 for row in rows)
    assert all(2 not in row[:-1] and (row[-1] == 2 or len(row) == 50) for row in rows)


def test_greedy_results_do_not_depend_on_the_batch(generate):
    arguments = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    arguments += ["--proc", "ngram:prior=quixote,strength=0.5", "--json"]
    together = records(generate(*arguments, "--batch-size", 3))
    assert together == records(generate(*arguments, "--batch-size", 1))
    assert together == records(generate(*arguments, "--batch-size", 2))


def test_samples_repeat_for_a_seed(generate):
    arguments = ["--prompt", "the", "--do-sample", "--seed"]
    assert generate(*arguments, 1) == generate(*arguments, 1) != generate(*arguments, 2)


def test_a_seed_that_was_drawn_is_told_and_repeats_the_text(run, generate):
    status, out, err = run("generate", "--max-new-tokens", 8, "--prompt", "the", "--temperature", 1)
    assert status == 0 and err.startswith("seed ")
    again = generate("--prompt", "the", "--temperature", 1, "--seed", err.split()[1])
    assert again == out


def test_text_that_is_not_sampled_has_no_seed(generate):
    assert records(generate("--prompt", "the", "--json"))[0]["seed"] is None


def test_flags_are_folded_into_one_generation_config(monkeypatch, generate, pocket, tmp_path):
    model = shutil.copytree(pocket / "base", tmp_path / "model")
    own = {"do_sample": True, "temperature": 0.5, "repetition_penalty": 1.25, "eos_token_id": 2}
    (model / "generation_config.json").write_text(json.dumps(own))
    seen = []

    def spy(model, chain, **kwargs):
        seen.append(kwargs["generation_config"])
        return real(model, chain, **kwargs)

    real = generation.generate
    monkeypatch.setattr(generation, "generate", spy)
    generate("--model", model, "--prompt", "the", "--seed", 0)
    generate("--model", model, "--prompt", "the", "--no-do-sample", "--num-beams", 3, "--min-new-tokens", 4)
    generate("--model", model, "--prompt", "the", "--temperature", 0.7, "--top-p", 0.9, "--top-k", 0,
             "--seed", 0, "--num-return-sequences", 2)  # fmt: skip
    assert [c.max_new_tokens for c in seen] == [8, 8, 8]
    assert [c.do_sample for c in seen] == [True, False, True]
    assert [c.temperature for c in seen] == [0.5, 0.5, 0.7]
    assert [c.repetition_penalty for c in seen] == [1.25] * 3
    assert (seen[1].num_beams, seen[1].min_new_tokens) == (3, 4)
    assert (seen[2].top_p, seen[2].top_k, seen[2].num_return_sequences) == (0.9, 0, 2)


def test_a_setting_of_sampling_turns_it_on(run):
    for flag, value in (("--temperature", 0.7), ("--top-p", 0.5), ("--top-k", 3)):
        assert "seed" in run("generate", "--prompt", "the", flag, value)[2]


def test_dtype_device_and_device_map_reach_the_model(monkeypatch, generate):
    seen = []

    def spy(*arguments):
        seen.append(real(*arguments))
        maps.append(arguments[3])
        return seen[-1]

    real, maps = cli.load_model, []
    monkeypatch.setattr(cli.generate, "load_model", spy)
    generate("--prompt", "the", "--dtype", "bfloat16", "--device", "cpu")
    generate("--prompt", "the", "--device-map", "auto")
    assert [model.dtype for model in seen] == [torch.bfloat16, torch.float32]
    assert seen[0].device.type == "cpu"
    assert maps == [None, "auto"]


def test_prompts_come_from_a_file_or_standard_input_after_those_of_the_line(monkeypatch, generate, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfthe road was\r\n\n  \nand")
    arguments = ["--prompt", "the old knight", "--json"]
    lines = records(generate(*arguments, "--prompts", tmp_path / "prompts.txt"))
    assert [record["prompt"] for record in lines] == PROMPTS
    stdin(monkeypatch, b"the road was\nand\n")
    assert records(generate(*arguments, "--prompts", "-")) == lines


def test_results_appear_batch_by_batch(monkeypatch, run):
    def spy(*arguments, **kwargs):
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        calls.append(real(*arguments, **kwargs))
        return calls[-1]

    real, calls = cli.generate.continuations, []
    monkeypatch.setattr(cli.generate, "continuations", spy)
    arguments = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    status, out, err = run("generate", *arguments, "--batch-size", 1, "--json")
    assert status == 1 and "out of memory" in err
    assert [record["prompt"] for record in records(out)] == PROMPTS[:2]


@pytest.mark.parametrize("sampling", [[], ["--do-sample", "--seed", 5, "--proc", "ngram:prior=quixote"]])
def test_streamed_text_equals_text_that_is_not_streamed(generate, sampling):
    for prompt in PROMPTS:
        arguments = ["--prompt", prompt, *sampling]
        assert generate(*arguments, "--stream") == generate(*arguments)


def test_a_stream_is_printed_while_it_is_generated(monkeypatch, run):
    def interrupt(*_):
        if len(steps) == 4:
            raise KeyboardInterrupt
        steps.append(1)

    steps: list[int] = []
    monkeypatch.setattr(lp.NGramStyleLogitsProcessor, "check_width", lambda *_: None)
    step = lp.NGramStyleLogitsProcessor.step
    monkeypatch.setattr(lp.NGramStyleLogitsProcessor, "step", lambda *a, **k: interrupt() or step(*a, **k))
    status, out, err = run("generate", "--prompt", "the", "--proc", "ngram:prior=quixote", "--stream")
    assert (status, err) == (2, "logitproc: Interrupted.\n")
    assert out.startswith("the") and len(out) > len("the")


def test_the_chain_changes_what_is_generated(generate):
    plain = generate("--prompt", "the old")
    assert generate("--prompt", "the old", "--proc", "ngram:prior=quixote,strength=0") == plain
    assert generate("--prompt", "the old", "--proc", "ngram:prior=quixote,rule=lift,strength=1") != plain


def test_a_chain_comes_from_yaml_json_or_a_saved_folder_and_flags_beat_it(generate, tmp_path, pocket):
    shutil.copytree(pocket / "quixote", tmp_path / "mine")
    spec = [{"name": "ngram", "prior": "mine", "strength": 0.75}]
    (tmp_path / "chain.json").write_text(json.dumps(spec))
    (tmp_path / "chain.yaml").write_text(
        "version: 1\nprocessors:\n- {name: ngram, prior: mine, strength: 0.75}\n"
    )
    lp.Chain.from_spec(tmp_path / "chain.json").save_pretrained(tmp_path / "saved")
    wanted = generate("--prompt", "the", "--proc", "ngram:prior=quixote,strength=0.75")
    files = [tmp_path / "chain.json", tmp_path / "chain.yaml", tmp_path / "saved"]
    for file in files:
        assert generate("--prompt", "the", "--chain", file) == wanted
    assert records(generate("--prompt", "the", "--chain", files[0], "--json"))[0]["chain"] == spec

    # The parameter given is replaced, the others stay; the folder stays relative to the file.
    beaten = ["--prompt", "the", "--chain", files[1], "--proc", "ngram:strength=0"]
    assert generate(*beaten) == generate("--prompt", "the")
    assert records(generate(*beaten, "--json"))[0]["chain"] == [spec[0] | {"strength": 0}]


def test_what_neither_file_nor_flags_give_is_the_default_of_the_two_together(pocket, tmp_path):
    chain = tmp_path / "chain.yaml"
    chain.write_text("- {name: ngram, prior: quixote, rule: lift}\n")
    flags = ["ngram:rule=backoff", "ngram:clip=3.0"]
    through, spec = cli.build_chain(flags, str(chain))
    assert spec == [{"name": "ngram", "prior": "quixote", "rule": "backoff", "clip": 3.0}]
    found, recorded = (made.processors[0].parameters() for made in (through, lp.Chain.from_spec(spec)))
    assert {k: v for k, v in found.items() if k != "prior"} == {k: v for k, v in recorded.items() if k != "prior"}


def test_a_method_that_the_chain_file_lacks_is_appended(generate, tmp_path):
    (tmp_path / "empty.yaml").write_text("[]")
    flags = ["--proc", "ngram:prior=quixote,strength=0.5", "--proc", "ngram:prior=quixote,strength=0.25"]
    arguments = ["--prompt", "the", "--chain", tmp_path / "empty.yaml", *flags, "--json"]
    assert [item["strength"] for item in records(generate(*arguments))[0]["chain"]] == [0.5, 0.25]


@pytest.mark.parametrize(
    "arguments, hint",
    [
        ([], "There is no prompt"),
        (["--prompt", " \n"], "A --prompt is empty"),
        (["--prompts", "missing.txt"], "No such file or directory: missing.txt"),
        (["--prompts", "."], "Is a directory"),
        (["--prompts", "empty.txt"], "empty.txt holds no prompt"),
        (["--prompts", "binary.txt"], "binary.txt is not UTF-8 text"),
        (["--prompts", "-"], "Standard input holds no prompt"),
        (
            ["--prompt", "the " * 121],
            "tokens; the model's 128 less --max-new-tokens 8 leave room for 120",
        ),
        (["--prompt", "the", "--proc", "ngrma:prior=quixote"], "Did you mean 'ngram'?"),
        (["--prompt", "the", "--proc", "ngram:prior=quixote,strenght=1"], "Did you mean 'strength'?"),
        (["--prompt", "the", "--proc", "ngram:prior=quixote,strength"], "is not key=value"),
        (["--prompt", "the", "--proc", "ngram:prior=quixote,strength=1.5"], "strength"),
        (["--prompt", "the", "--proc", "ngram:prior=quixote,strength=.nan"], "strength"),
        (["--prompt", "the", "--proc", "ngram:prior=nowhere"], "nowhere"),
        (["--prompt", "the", "--proc", "ngram:strength=1"], "needs the parameter 'prior'"),
        (["--prompt", "the", "--chain", "missing.yaml"], "There is no chain file missing.yaml"),
        (["--prompt", "the", "--chain", "broken.yaml"], "broken.yaml"),
        (["--prompt", "the", "--chain", "twice.yaml", "--proc", "ngram:strength=1"], "more than once"),
        (["--prompt", "the", "--model", "bass"], "bundled models are base, mini"),
        (["--prompt", "the", "--model", "./no/where"], "There is no folder ./no/where"),
        (["--prompt", "the", "--model", "runs/missing"], "There is no folder runs/missing"),
        (["--prompt", "the", "--model", "runs"], "runs is no model"),
        (["--prompt", "the", "--temperature", "0"], "--temperature must be above 0"),
        (["--prompt", "the", "--temperature", "nan"], "--temperature must be above 0"),
        (["--prompt", "the", "--no-do-sample", "--top-k", "3"], "--top-k is for sampling"),
        (["--prompt", "the", "--min-new-tokens", "9"], "--min-new-tokens 9 exceeds --max-new-tokens 8"),
        (["--prompt", "the", "--num-return-sequences", "2"], "num_return_sequences"),
        (["--prompt", "the", "--stream", "--json"], "choose one"),
        (["--prompt", "the", "--stream", "--num-beams", "2"], "2 beams"),
        (["--prompt", "the", "--prompt", "and", "--stream"], "2 prompts"),
        (["--prompt", "the", "--stream", "--do-sample", "--num-return-sequences", "2"], "2 sequences"),
        (["--prompt", "the", "--device", "gpu0"], "--device must be"),
        (["--prompt", "the", "--device", "cuda:99"], "CUDA devices"),
        (["--prompt", "the", "--device", "cpu", "--device-map", "auto"], "exclude each other"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    refused, no_model, monkeypatch, tmp_path, arguments, hint
):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n\n")
    Path("binary.txt").write_bytes(b"\x80\xff\x00")
    Path("broken.yaml").write_text("- {name: ngram")
    Path("twice.yaml").write_text("[{name: ngram, prior: quixote}, {name: ngram, prior: quixote}]")
    Path("runs").mkdir()
    stdin(monkeypatch, b"\n")
    assert hint in refused("generate", "--max-new-tokens", "8", *arguments)


def test_a_prior_of_another_tokenizer_is_refused_before_a_model_is_loaded(refused, no_model, tmp_path):
    lp.NGramPrior.from_ids([[1, 2, 3]], order=2, vocab_size=5).save(tmp_path / "other")
    message = refused("generate", "--prompt", "the", "--proc", f"ngram:prior={tmp_path / 'other'}")
    assert "tokenizer" in message


def test_a_method_without_beams_is_refused_before_a_model_is_loaded(refused, no_model, monkeypatch):
    monkeypatch.setattr(lp.NGramStyleLogitsProcessor, "supports_beam", False)
    arguments = ["--prompt", "the", "--proc", "ngram:prior=quixote", "--num-beams", 2]
    assert "does not support beam search" in refused("generate", *arguments)


def test_a_damaged_model_is_one_sentence(refused, tmp_path, pocket):
    shutil.copytree(pocket / "base", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    refused("generate", "--prompt", "the", "--model", tmp_path / "model")


# --- fit ---


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus.txt").write_text(TEXT)
    return tmp_path / "corpus.txt"


def test_fit_counts_a_corpus_and_tells_what_it_found_and_what_to_try(run, generate, corpus, tmp_path):
    out = tmp_path / "prior"
    status, text, _ = run(
        "fit", "ngram", "--corpus", corpus, "--tokenizer", "mini", "--out", out, "--order", 2
    )
    prior = lp.NGramPrior.load(out)
    assert status == 0 and prior.order == 2
    assert f"{prior.documents} documents, {prior.tokens} tokens" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["2-grams", str(len(prior.orders[1].ids))] in rows and "kB" in text
    example = text.splitlines()[-1].split()
    assert example[:4] == ["logitproc", "generate", "--model", "mini"]
    assert generate("--model", "mini", "--prompt", "the", "--proc", example[-1])


def test_fit_reads_a_column_and_cuts_a_text_as_asked(run, tmp_path, corpus):
    (tmp_path / "rows.jsonl").write_text('{"abstract": "the knight"}\n{"abstract": "the road"}\n')
    status, text, _ = run("fit", "ngram", "--corpus", tmp_path / "rows.jsonl", "--column", "abstract",
                          "--out", tmp_path / "a")  # fmt: skip
    assert status == 0 and "2 documents" in text
    status, text, _ = run(
        "fit", "ngram", "--corpus", corpus, "--sample-by", "document", "--out", tmp_path / "b"
    )
    assert status == 0 and "1 documents" in text


def test_fit_hands_split_and_config_on(monkeypatch, refused, tmp_path):
    def spy(*_, **kwargs):
        seen.update(kwargs)
        raise ValueError("stop")

    seen: dict = {}
    monkeypatch.setattr(lp.NGramPrior, "fit", spy)
    refused(
        "fit", "ngram", "--corpus", "org/data", "--split", "test", "--config", "raw", "--out", tmp_path / "x"
    )
    assert seen == {"order": 3, "out": str(tmp_path / "x"), "force": False, "split": "test", "config": "raw"}


def test_fit_replaces_a_folder_only_when_forced(run, refused, corpus, tmp_path):
    arguments = ["fit", "ngram", "--corpus", corpus, "--out", tmp_path / "prior"]
    assert run(*arguments)[0] == 0
    assert "pass --force" in refused(*arguments)
    assert run(*arguments, "--force", "--order", 1)[0] == 0
    assert lp.NGramPrior.load(tmp_path / "prior").order == 1


def test_fit_refuses_what_it_cannot_read_or_write(refused, corpus, tmp_path):
    assert "missing.txt" in refused("fit", "ngram", "--corpus", "missing.txt", "--out", tmp_path / "x")
    (tmp_path / "empty.txt").write_text("")
    refused("fit", "ngram", "--corpus", tmp_path / "empty.txt", "--out", tmp_path / "x")
    # A file where a folder should be is as unwritable for an administrator as for anyone else.
    message = refused("fit", "ngram", "--corpus", corpus, "--out", corpus / "prior")
    assert "corpus.txt" in message
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("not ours")
    assert "is not replaced" in refused("fit", "ngram", "--corpus", corpus, "--out", tmp_path / "mine", "--force")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.txt", "empty.txt", "mine"]


def test_an_interrupted_fit_says_that_it_can_be_resumed(monkeypatch, refused, corpus, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(lp.NGramPrior, "fit", interrupt)
    message = refused("fit", "ngram", "--corpus", corpus, "--out", tmp_path / "x")
    assert message == "logitproc: Interrupted; the same command resumes the count.\n"


# --- demo ---


def test_demo_shows_text_side_by_side_and_a_table(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, out, err = run("demo", "--max-new-tokens", 12)
    assert status == 0 and all(line.startswith("Loading the companion") for line in err.splitlines())
    lines = out.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if "style perplexity" in line) :]
    assert [line.split()[0] for line in table[1 : 2 + len(cli.demo.DEMO)]] == ["unsteered", *cli.demo.DEMO]
    assert all(f"{prompt} ..." in lines for prompt in cli.demo.DEMO_PROMPTS[: len(cli.demo.DEMO)])
    shown = {setting.partition(":")[0] for setting in cli.demo.DEMO}
    assert all(entry.summary in lines for entry in registry.entries() if entry.name in shown)
    assert all(len(line) <= 120 for line in lines[:-1])
    assert sum(" | " in line for line in lines) >= 3 * len(cli.demo.DEMO)
    assert lines.count("-" * 48 + " | " + "-" * 48) == len(cli.demo.DEMO)  # side by side under titles of any length
    assert lines[-1].startswith("Try next: logitproc generate") and "logitproc fit ngram" in lines[-1]


def test_demo_figures_repeat_and_mean_what_they_say(run, pocket, monkeypatch):
    from transformers import AutoModelForCausalLM

    def spy(*arguments):
        seen.append((arguments[3], real(*arguments)))
        return seen[-1][1]

    real, seen = cli.demo.continuations, []
    monkeypatch.setattr(cli.demo, "continuations", spy)
    arguments = ["demo", "--max-new-tokens", 12, "--seed", 4, "--json"]
    status, out, _ = run(*arguments)
    assert status == 0 and run(*arguments)[1] == out
    plain, *steered = records(out)
    assert list(plain) == ["method", "seed", "scored_tokens", "style_perplexity", "plainness", "base_perplexity",
                           "js_bits", "prompts", "texts"]  # fmt: skip
    assert plain["method"] == "unsteered" and plain["js_bits"] == 0
    assert all(0 < row["js_bits"] <= 1 for row in steered)
    cut = [" ".join(text.split()[:25]) for text in plain["texts"]]
    assert plain["plainness"] == pytest.approx(sum(map(bundled.plainness, cut)) / len(cut))

    model = AutoModelForCausalLM.from_pretrained(pocket / "base")
    judge = lp.NGramPrior.load("quixote-held-out")
    base, style = [], []
    for prompt, new in zip(*seen[0], strict=True):
        log_p = model(torch.tensor([prompt + new])).logits[0].log_softmax(-1)
        base += log_p[len(prompt) - 1 : -1].gather(1, torch.tensor(new)[:, None]).flatten().tolist()
        style += judge.log_prob(new, prompt).tolist()
    assert plain["scored_tokens"] == len(base) == len(style)
    assert plain["base_perplexity"] == pytest.approx(math.exp(-sum(base) / len(base)), rel=1e-4)
    assert plain["style_perplexity"] == pytest.approx(math.exp(-sum(style) / len(style)), rel=1e-4)


def test_demo_takes_a_strength(run, refused):
    arguments = ["demo", "--prompt", "the", "--max-new-tokens", 8, "--json"]
    plain, steered, *_ = records(run(*arguments, "--strength", 0)[1])
    assert steered["method"] == "ngram:prior=quixote,strength=0.0"
    assert steered["texts"] == plain["texts"] and steered["js_bits"] == 0
    assert "strength" in refused(*arguments, "--strength", 2)


def test_demo_without_the_bundle_is_one_sentence(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(bundled, "_FOLDER", tmp_path)
    refused("demo")


# --- companions ---

FUSION = "fusion:expert=mini,base=base,mode=static"


def test_companions_load_once_by_name_with_a_line_each(run, monkeypatch):
    monkeypatch.setattr(companion, "_loaded", weakref.WeakValueDictionary())  # whatever else is in use
    arguments = ["generate", "--prompt", "the old", "--max-new-tokens", 8]
    status, plain, _ = run(*arguments)
    status, out, err = run(*arguments, "--proc", FUSION, "--proc", "aligndistil:reverse=mini")
    assert status == 0 and out != plain
    lines = [line.partition(" on ")[0] for line in err.splitlines()]
    assert sorted(lines) == ["Loading the companion base", "Loading the companion mini"]


def test_speculation_gives_the_same_text_streamed_or_not_one_prompt_at_a_time(run):
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    arguments = ["generate", "--max-new-tokens", 12, "--proc", FUSION, "--no-do-sample"]
    _, plain, _ = run(*arguments, *prompts, "--batch-size", 1)
    status, out, _ = run(*arguments, *prompts, "--speculative")
    assert (status, out) == (0, plain)
    _, first, _ = run(*arguments, "--prompt", PROMPTS[0])
    status, streamed, _ = run(*arguments, "--prompt", PROMPTS[0], "--speculative", "--stream")
    assert (status, streamed) == (0, first)


def test_a_companion_is_a_mapping_too(run, tmp_path):
    chain = tmp_path / "chain.yaml"
    chain.write_text("- {name: fusion, expert: [{model: mini, dtype: bfloat16}], base: mini, mode: match}\n")
    status, out, err = run("generate", "--prompt", "the", "--chain", chain, "--max-new-tokens", 4, "--json")
    assert status == 0 and "(dtype bfloat16)" in err
    assert records(out)[0]["chain"][0]["expert"] == [{"model": "mini", "dtype": "bfloat16"}]


def test_bad_companions_are_refused_before_the_host_is_loaded(run, pocket, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "load_model", lambda *_: pytest.fail("the host was loaded"))
    short, other = tmp_path / "short", tmp_path / "other"
    shutil.copytree(pocket / "mini", short)
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 16}
    (short / "config.json").write_text(json.dumps(config))
    shutil.copytree(pocket / "mini", other)
    names = json.loads((other / "tokenizer.json").read_text())
    vocab = names["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(names))
    t5 = tmp_path / "t5"
    T5Config(vocab_size=8192).save_pretrained(t5)
    cases = [
        (f"fusion:expert={t5},base=mini", f"The companion {t5} is an encoder-decoder; a companion is a causal LM."),
        (f"{FUSION} --model {t5}", f"{t5} is an encoder-decoder; give a causal language model."),
        ("fusion:base=mini", "'fusion' needs the parameter 'expert'"),
        ("fusion:expert=mini", "'fusion' needs the parameter 'base'"),
        ("fusion:expert=nowhere,base=mini", "There is no folder nowhere; bundled models are base, mini"),
        ("fusion:expert={name: mini},base=mini", "a mapping with a 'model'"),
        ("fusion:expert=[],base=mini,mode=match", "at least one expert"),
        ("fusion:expert=mini,base=mini,mode=newton,bounds=[-1,2]", "bounds"),
        ("fusion:expert=mini,base=mini,mode=newton,bounds=[.nan,2]", "bounds"),
        (f"fusion:expert={short},base=mini", "reads 16 tokens; the prompt and the new tokens are"),
        (f"fusion:expert={other},base=mini", f"id {vocab['b']} is 'a' for the host, 'b' for the companion"),
        ("aligndistil:r=1.0", "needs reverse, dpo or both"),
        ("ngram:prior=quixote --speculative", "needs a companion to draft"),
        (f"{FUSION} --speculative --num-beams 3", "without beams, got 1 sequences and 3 beams"),
    ]  # fmt: skip
    for proc, words in cases:
        first, *more = proc.split(" --")
        options = [part for option in more for part in ("--" + option).split()]
        status, out, err = run("generate", "--prompt", "the old", "--proc", first, *options)
        assert (status, out) == (2, ""), err
        assert words in err.splitlines()[-1] and err.splitlines()[-1].startswith("logitproc: "), err


# --- fit vq ---


def test_fit_vq_reports_what_a_head_costs_and_saves_it_and_the_model(run, refused, tmp_path, corpus):
    text = tmp_path / "long.txt"
    text.write_text("\n\n".join([corpus.read_text()] * 20))
    out, converted = tmp_path / "head", tmp_path / "model"
    arguments = ["fit", "vq", "--model", "mini", "--codes", "64", "--calibration", text, "--tokens", 600]
    status, printed, _ = run(*arguments, "--out", out, "--converted", converted)
    assert status == 0
    assert "Fitted 64 codes of kind weighted to 768 tokens" in printed
    for row in ("perplexity", "KL(dense || head)", "tie floor", "numbers in the head"):
        assert row in printed
    preview = ["generate", "--model", "mini", "--prompt", "the sea", "--max-new-tokens", 5, "--no-do-sample"]
    status, shown, _ = run(*preview, "--proc", f"vq:head={out}")
    assert status == 0
    preview[2] = converted
    assert run(*preview)[:2] == (0, shown)
    plain = run(*[*preview[:2], "mini", *preview[3:]])[1]
    screened = [*arguments[:4], *arguments[6:], "--screened", 8]
    width = json.loads((converted / "config.json").read_text())["vocab_size"]
    for refined in ([*arguments, "--refine", width], [*screened, "--refine", width]):
        status, printed, _ = run(*refined, "--out", out, "--converted", converted, "--force")
        assert status == 0 and "perplexity                    x 1.000 of" in printed
        assert "more than the model's own" in printed
        assert run(*preview)[:2] == (0, plain)
    for given, words in (
        ([*arguments, "--refine", width + 1], f"refine must be at most {width}, the number of tokens"),
        ([*arguments, "--screened", 8], "screened takes directions in place of codes"),
        ([*screened, "--screened", 999], "screened must be at most 16, the number of features"),
        ([*screened, "--screened", 0], "codes is missing: how many the head has"),
        ([*arguments, "--codes", 9000], "9000 codes are more than the"),
        ([*arguments, "--codes", 0], "codes must be a whole number of at least 1, got 0"),
        ([*arguments, "--kind", "papr"], "kind of head 'papr'"),
    ):
        assert words in refused(*given, "--out", tmp_path / "x"), words
    assert "exists" in refused(*arguments, "--out", out)
    assert "this model has a head" in refused(*arguments, "--out", tmp_path / "x", "--model", converted).lower()
    assert "cannot be written" in refused(*arguments, "--out", text / "x")
    text.write_text("Too short.")
    assert "calibration text is too short" in refused(*screened, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()

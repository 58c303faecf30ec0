"""The command line: `logitproc list | describe | generate | fit | collect | demo`.

Thin: a command checks what it was given, calls the library and prints. Results go to standard output,
everything else to standard error. Nothing heavy is imported before a command needs it, so that `--help`
and `list` answer at once. Exit status: 0 done, 2 wrong usage or input, 1 failed.
"""

import dataclasses
import inspect
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Option

from . import __version__, registry
from .bundled import bundled, find_model, plainness, pocket

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

    from .assessment import Real
    from .chain import Chain
    from .collect import Job
    from .heads import Progress as HeadProgress
    from .prior import NGramPrior
    from .processor import Processor
    from .speculative import Speculation

DEMO = (  # a row of the demo each, all on the host `base`
    "ngram:prior=quixote,strength=0.7",
    "aligndistil:dpo=mini-dpo,reverse=mini-reverse-dpo",
    "fusion:expert=mini-dpo,base=mini",
    "vq:head=base-vq",
)
DEMO_JUDGE = "quixote-held-out"  # counts of text that no steering prior has seen
DEMO_PROMPTS = (
    "The knight turned to his servant and said", "When they came to the inn,", "She opened the letter, and",
)  # fmt: skip
DEMO_TEXTS = 4  # of each prompt go into the figures; the first is shown
DEMO_SAMPLING = {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "top_k": 0}

# Errors that the input causes. KeyError and IndexError are the two LookupErrors that only a bug raises.
ANTICIPATED = (ValueError, LookupError, TypeError, OSError, ImportError)
BUGS = (KeyError, IndexError)

app = typer.Typer(name="logitproc", rich_markup_mode=None, add_completion=False)
fit = typer.Typer(rich_markup_mode=None, help="Fit what a method needs, and save it as a folder.")
app.add_typer(fit, name="fit")
collect = typer.Typer(rich_markup_mode=None)
app.add_typer(collect, name="collect")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (those of the process by default) and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = "--debug" in arguments  # wherever it stands
    arguments = [argument for argument in arguments if argument != "--debug"]
    command = typer.main.get_command(app)
    try:
        with command.make_context("logitproc", arguments, obj=debug) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as done:
        return done.exit_code
    except BrokenPipeError:  # the reader, `head` for one, has all it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        sentence, status = explain(error)
        print(f"logitproc: {sentence}", file=sys.stderr)
        return status
    return 0


def explain(error: BaseException) -> tuple[str, int]:
    """(one line, exit status) of an error."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return text or "Interrupted.", 2
    if hasattr(error, "format_message"):  # typer's own: an option or a command that does not exist, ...
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "logitproc"
        return f"{error.format_message().rstrip('.')}; see '{path} --help'.", 2
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(part) for part in (error.strerror, error.filename) if part) + ".", 2
    if isinstance(error, ANTICIPATED) and not isinstance(error, BUGS):
        return text or f"{type(error).__name__}.", 2
    return f"{type(error).__name__}: {text.rstrip('.')}; --debug shows where.", 1


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"logitproc {__version__}")
        raise typer.Exit


# --debug is declared for the help only: main() takes it out, to accept it after a command too.
@app.callback()
def _logitproc(
    debug: Annotated[bool, Option("--debug", help="Show tracebacks and all messages.")] = False,
    version: Annotated[
        bool, Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Change what a language model says by changing its logits while it decodes, and measure what that
    changed.

    Start with: logitproc demo
    """


# --- list, describe ---

Json = Annotated[bool, Option("--json", help="One JSON object a line.")]


@app.command("list")
def list_methods(as_json: Json = False) -> None:
    """Name, paper and summary of every method."""
    rows = [(entry.name, entry.paper, entry.summary) for entry in registry.entries()]
    if as_json:
        for row in rows:
            print(json.dumps(dict(zip(("name", "paper", "summary"), row, strict=True)), ensure_ascii=False))
    else:
        print(_table([("name", "paper", "summary"), *rows]))


@app.command()
def describe(name: Annotated[str, typer.Argument(metavar="NAME", help="As `list` shows it.")]) -> None:
    """What a method does, needs and can do."""
    cls = registry.get(name)
    example = cls.example(64)
    spec = _example_spec(example)
    parameters = [
        (f"  {f.name}", _annotation(f.type), _default(f))
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.init
    ]
    context = example.context
    yes = {True: "yes", False: "no"}
    facts = [
        ("  reads", {None: "all tokens", 0: "no tokens"}.get(context, f"the last {context} tokens")),
        ("  beam search", yes[cls.supports_beam]),
        ("  assisted decoding", yes[cls.supports_assisted]),
        ("  continuous batching", yes[cls.supports_continuous_batching]),
        ("  leaves greedy decoding alone", yes[cls.argmax_invariant]),
        ("  companions", ", ".join(cls.companions) or "none"),
    ]
    print(f"{name} ({cls.paper})\n\n{inspect.getdoc(cls)}\n")
    print(f"Fields\n{_table(parameters)}\n\nCapabilities, for the example below\n{_table(facts)}\n")
    print(f'Example\n  logitproc generate --prompt "..." --proc {_as_flag(spec)}')


def _annotation(kind: Any) -> str:
    return kind if isinstance(kind, str) else re.sub(r"\b(\w+\.)+", "", inspect.formatannotation(kind))


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"default {field.default!r}"
    return "required" if field.default_factory is dataclasses.MISSING else "optional"


def _example_spec(example: "Processor") -> dict[str, Any]:
    """What `example` was made from, as a spec: its name and the parameters that are not the default."""
    spec: dict[str, Any] = {"name": example.name}
    for field in dataclasses.fields(example):  # type: ignore[arg-type]
        value = getattr(example, field.name)
        if field.name in example.artifacts and value is not None:
            spec[field.name] = _bundled_artifact(value.kind)
        elif field.name in example.companions and value is not None:
            spec[field.name] = ["mini"] if isinstance(value, Sequence) else "mini"
        elif field.init and value != field.default:
            spec[field.name] = value
    return spec


def _as_flag(spec: dict[str, Any]) -> str:
    """NAME:key=value,... as --proc reads it."""
    import yaml

    flow = lambda value: yaml.safe_dump([value], default_flow_style=True, width=math.inf).strip()[1:-1]
    given = [f"{key}={flow(value)}" for key, value in spec.items() if key != "name"]
    return f"{spec['name']}:{','.join(given)}" if given else spec["name"]


def _bundled_artifact(kind: str) -> str:
    for name, folder in bundled().items():
        document = folder / "artifact.json"
        if document.is_file() and json.loads(document.read_text(encoding="utf-8")).get("kind") == kind:
            return name
    return "FOLDER"


# --- generate ---

PromptList = Annotated[
    list[str] | None, Option("--prompt", metavar="TEXT", help="A prompt; may be given several times.")
]
NewTokens = Annotated[int, Option(metavar="N", min=1, help="At most so many tokens a result.")]
MAX_SEED = 2**63 - 1


@app.command()
def generate(
    context: typer.Context,
    model: Annotated[str, Option(metavar="NAME", help="A bundled model, a folder, or ORG/NAME.")] = "base",
    prompt: PromptList = None,
    prompts: Annotated[
        str | None, Option(metavar="FILE", help="One prompt a line; - for standard input.")
    ] = None,
    proc: Annotated[
        list[str] | None,
        Option(metavar="NAME:KEY=VALUE,...", help="A method; may be given several times, in this order."),
    ] = None,
    chain: Annotated[
        str | None,
        Option(
            metavar="FILE",
            help="Methods from YAML, JSON, or a folder that save_pretrained wrote. A --proc of a method in "
            "it replaces the parameters given; another --proc is appended.",
        ),
    ] = None,
    num_return_sequences: Annotated[int, Option(metavar="N", min=1, help="Results a prompt.")] = 1,
    max_new_tokens: NewTokens = 64,
    min_new_tokens: Annotated[int | None, Option(metavar="N", min=0)] = None,
    do_sample: Annotated[
        bool | None,
        Option("--do-sample/--no-do-sample", help="The model's own setting if left out, as for the next."),
    ] = None,
    temperature: Annotated[float | None, Option(metavar="T", help="Above 0; turns sampling on.")] = None,
    top_p: Annotated[float | None, Option(metavar="P", min=0, max=1, help="Turns sampling on.")] = None,
    top_k: Annotated[
        int | None, Option(metavar="K", min=0, help="0 for no limit; turns sampling on.")
    ] = None,
    num_beams: Annotated[int | None, Option(metavar="N", min=1, help="Above 1 for beam search.")] = None,
    seed: Annotated[int | None, Option(metavar="N", min=0, max=MAX_SEED, help="Drawn if left out.")] = None,
    batch_size: Annotated[int, Option(metavar="N", min=1, help="Prompts decoded at a time.")] = 8,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], Option(help="auto: as the model is stored.")
    ] = "auto",
    device: Annotated[
        str, Option(metavar="NAME", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")
    ] = "auto",
    device_map: Annotated[
        str | None, Option(metavar="MAP", help="Spread the model over devices: auto, balanced, ...")
    ] = None,
    as_json: Annotated[
        bool, Option("--json", help="One object a line: prompt, index, text, tokens, chain, seed.")
    ] = False,
    stream: Annotated[bool, Option("--stream", help="Print one result while it is generated.")] = False,
    speculative: Annotated[
        bool,
        Option(
            "--speculative",
            help="The chain's last companion drafts, the models check: the same text, or distribution, sooner. "
            "One prompt at a time, whatever --batch-size says.",
        ),
    ] = False,
) -> None:
    """Generate text through a chain of methods.

    \b
    logitproc generate --prompt "Once upon a time"
    logitproc generate --prompt "My friend" --proc ngram:prior=quixote --do-sample --seed 1
    cat prompts.txt | logitproc generate --prompts - --chain chain.yaml --json > results.jsonl
    logitproc generate --prompt "Shares of" --proc fusion:expert=mini-expert,base=mini --speculative

    Sampled text repeats for a seed as long as the prompts, their order, --batch-size, --dtype, the device
    and the versions of torch and transformers stay: the prompts of a batch draw from one stream of random
    numbers, so a prompt's text changes with the prompts before and beside it. In half precision even text
    that is not sampled may change with its batch, by rounding.
    """
    texts = read_prompts(prompt or [], prompts)
    source = find_model(model)
    flags = {
        "max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens, "do_sample": do_sample,
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "num_beams": num_beams,
        "num_return_sequences": num_return_sequences,
    }  # fmt: skip
    _check_flags(flags)
    if stream and as_json:
        raise ValueError("--stream prints text as it comes and --json whole objects; choose one.")
    if device_map and device != "auto":
        raise ValueError(f"--device {device} and --device-map {device_map} exclude each other; choose one.")
    _quiet(context)
    through, spec = build_chain(proc or [], chain)
    place = choose_device(device) if not device_map else None
    tokenizer, config, encoded = _prepare(source, texts, flags)
    beams = config.num_beams or 1
    if stream and (len(texts) > 1 or num_return_sequences > 1 or beams > 1):
        raise ValueError(
            f"--stream prints one sequence of one prompt without beams, got {len(texts)} prompts, "
            f"{num_return_sequences} sequences and {beams} beams; leave --stream out."
        )
    through.require(beams=beams > 1)
    through.check(tokenizer=tokenizer)
    if speculative and (num_return_sequences > 1 or beams > 1):
        raise ValueError(
            f"--speculative decodes one sequence without beams, got {num_return_sequences} sequences and {beams} "
            "beams; leave --speculative out."
        )
    draft = _speculation(through) if speculative else None
    longest = max(map(len, encoded)) + max_new_tokens
    for companion in through.companions:
        if companion.prompt is None:
            companion.check_length(longest, needed=speculative)
    loaded = load_model(source, dtype, place, device_map)
    if config.do_sample and seed is None:
        seed = int.from_bytes(os.urandom(4))
        print(f"seed {seed}", file=sys.stderr)
    _seed(seed)
    if stream:
        print(texts[0], end="", flush=True)
        _continue(loaded, tokenizer, through, encoded, config, draft, streamer=_streamer(tokenizer))
        print()
        return
    from .generation import decode

    size = 1 if draft else batch_size
    results = _in_batches(loaded, tokenizer, through, encoded, config, size, draft)
    for index, (number, ids) in enumerate(results):
        text = decode(tokenizer, encoded[number], ids)
        if as_json:
            record = {"prompt": texts[number], "index": index, "text": text, "tokens": ids, "chain": spec,
                      "seed": seed}  # fmt: skip
            print(json.dumps(record, ensure_ascii=False, default=str), flush=True)
        else:
            print(("\n" if index else "") + texts[number] + text, flush=True)


def read_prompts(given: Sequence[str], file: str | None) -> list[str]:
    """The prompts of the line, then those of the file."""
    prompts = list(given)
    for text in prompts:
        if not text.strip():
            raise ValueError("A --prompt is empty; give it some text to continue.")
    if file is not None:
        name = "Standard input" if file == "-" else file
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        try:
            lines = content.decode("utf-8-sig").split("\n")
        except UnicodeDecodeError:
            raise ValueError(f"{name} is not UTF-8 text; give one prompt a line.") from None
        found = [line.rstrip("\r") for line in lines if line.strip()]
        if not found:
            raise ValueError(f"{name} holds no prompt; give one a line.")
        prompts += found
    if not prompts:
        raise ValueError("There is no prompt; give --prompt TEXT or --prompts FILE (- for standard input).")
    return prompts


def _check_flags(flags: dict[str, Any]) -> None:
    """Refuse settings that contradict each other; turn sampling on when a setting of it was given."""
    temperature, least = flags["temperature"], flags["min_new_tokens"]
    if temperature is not None and not 0 < temperature < math.inf:
        raise ValueError(f"--temperature must be above 0, got {temperature}; --no-do-sample is greedy.")
    if least is not None and least > flags["max_new_tokens"]:
        raise ValueError(f"--min-new-tokens {least} exceeds --max-new-tokens {flags['max_new_tokens']}.")
    for key in ("temperature", "top_p", "top_k"):
        if flags[key] is not None:
            if flags["do_sample"] is False:
                raise ValueError(f"--{key.replace('_', '-')} is for sampling; leave out --no-do-sample.")
            flags["do_sample"] = True


def build_chain(procs: Sequence[str], file: str | None) -> "tuple[Chain, list[dict[str, Any]]]":
    """(chain, what was asked for): the chain file, with the flags over it."""
    from .chain import Chain, _read, parse_processor

    processors: list[Processor] = []
    spec: list[dict[str, Any]] = []
    if file is not None:
        path = Path(file) / "chain.json" if Path(file).is_dir() else Path(file)
        processors += Chain.from_spec(path).processors
        document = _read(path)
        spec += document["processors"] if isinstance(document, dict) else document
    in_file = [item["name"] for item in spec]
    for text in procs:
        given = parse_processor(text)
        name = given.pop("name")
        if in_file.count(name) > 1:
            raise ValueError(f"{file} holds {name!r} more than once, so --proc {text!r} is ambiguous.")
        cls = registry.get(name)
        if name in in_file:
            at = in_file.index(name)
            loaded = processors[at].parameters()
            kept = {key: loaded[key] for key in spec[at] if key != "name"}  # defaults may depend on what is given
            processors[at] = cls.from_parameters({**kept, **given})
            spec[at] = {**spec[at], **given}
        else:
            processors.append(cls.from_parameters(given))
            spec.append({"name": name, **given})
    return Chain(processors), spec


def _quiet(context: typer.Context) -> None:
    """Silence what transformers and the hub say beside errors, unless --debug was given."""
    if context.obj:
        return
    import warnings

    from huggingface_hub.utils import enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # each of its tries to reach the hub
    logging.disable_progress_bar()
    if sys.stderr.isatty():
        enable_progress_bars()  # a download may take minutes


def choose_device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}.") from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"--device {name} is not there: torch sees {count} CUDA devices.")
    return name


def _prepare(
    source: str, texts: Sequence[str], flags: dict[str, Any]
) -> "tuple[Any, GenerationConfig, list[list[int]]]":
    """(tokenizer, generation settings, token ids of the prompts), all checked before the weights are read."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from .heads import recognise

    recognise(source)
    about = AutoConfig.from_pretrained(source)
    if about.is_encoder_decoder:
        raise ValueError(f"{source} is an encoder-decoder; give a causal language model.")
    try:
        config = GenerationConfig.from_pretrained(source)
    except OSError:  # an older model keeps them in config.json
        config = GenerationConfig.from_model_config(about)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if config.pad_token_id is None:  # any will do: padding is masked, and cut off
        config.pad_token_id = tokenizer.pad_token_id or 0
    given = {key: value for key, value in flags.items() if value is not None}
    config.update(**given, return_dict_in_generate=False)
    encoded = [tokenizer(text)["input_ids"] for text in texts]
    longest = getattr(about.get_text_config(), "max_position_embeddings", None) or math.inf
    room = longest - flags["max_new_tokens"]
    for text, ids in zip(texts, encoded, strict=True):
        start = repr(textwrap.shorten(text, 40, placeholder="..."))
        if not ids:
            raise ValueError(f"The prompt {start} has no token in this model's vocabulary.")
        if len(ids) > room:
            raise ValueError(
                f"The prompt {start} has {len(ids)} tokens; the model's {longest} less --max-new-tokens "
                f"{flags['max_new_tokens']} leave room for {max(room, 0)}."
            )
    return tokenizer, config, encoded


def load_model(source: str, dtype: str, device: str | None, device_map: str | None) -> "PreTrainedModel":
    from .heads import load_converted

    place = {"device_map": device_map} if device_map else {}
    model: Any = load_converted(source, dtype=dtype, **place)
    return model.to(device) if device else model


def _speculation(chain: "Chain") -> "Speculation":
    from .speculative import Speculation

    speculation = Speculation()
    speculation.drafter(chain)  # refuses a chain without companions
    return speculation


def _seed(seed: int | None) -> None:
    from .generation import seed_everything

    if seed is not None:
        seed_everything(seed)


def _in_batches(
    model: "PreTrainedModel", tokenizer: Any, chain: "Chain", prompts: Sequence[list[int]],
    config: "GenerationConfig", size: int, draft: "Speculation | None" = None,
) -> Iterator[tuple[int, list[int]]]:  # fmt: skip
    """(number of the prompt, generated ids) of each result, as soon as its batch is done."""
    from tqdm import tqdm

    with tqdm(total=len(prompts), unit=" prompts", disable=not sys.stderr.isatty()) as bar:
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            rows = _continue(model, tokenizer, chain, batch, config, draft)
            bar.clear()  # the results may go to the same terminal
            for row, ids in enumerate(rows):
                yield start + row * len(batch) // len(rows), ids
            bar.update(len(batch))


def _continue(
    model: "PreTrainedModel", tokenizer: Any, chain: "Chain", prompts: Sequence[list[int]],
    config: "GenerationConfig", draft: "Speculation | None" = None,
    streamer: "BaseStreamer | None" = None,
) -> list[list[int]]:  # fmt: skip
    """The generated ids of each row, its end-of-text token included and the padding after that cut off."""
    import torch

    from .generation import generate

    width = max(map(len, prompts))
    ids = [[config.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    output = generate(
        model, chain, tokenizer=tokenizer, speculative=draft, generation_config=config, streamer=streamer,
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
    )  # fmt: skip
    eos = config.eos_token_id
    ends = set(eos) if isinstance(eos, list) else {eos}
    rows = []
    for row in output[:, width:].tolist():
        end = next((at for at, token in enumerate(row, 1) if token in ends), len(row))
        rows.append(row[:end])
    return rows


def _streamer(tokenizer: Any) -> "BaseStreamer":
    from transformers import TextStreamer

    from .generation import decode

    class Streamer(TextStreamer):
        """Prints what `decode` gives; TextStreamer decodes line by line, which may lose a space."""

        prompt: list[int] | None = None
        printed = ""

        def put(self, value: Any) -> None:
            if self.prompt is None:
                self.prompt = value[0].tolist()
                return
            self.token_cache += value.tolist()
            text = decode(self.tokenizer, self.prompt, self.token_cache)
            if not text.endswith("\ufffd"):  # half of a character
                self._print(text)

        def end(self) -> None:
            self._print(decode(self.tokenizer, self.prompt or [], self.token_cache))

        def _print(self, text: str) -> None:
            print(text[len(self.printed) :], end="", flush=True)
            self.printed = text

    return Streamer(tokenizer)


# --- fit ---


@fit.command("ngram")
def fit_ngram(
    context: typer.Context,
    corpus: Annotated[
        str, Option(metavar="FILE|DATASET", help="txt, jsonl, csv, tsv, parquet; or a dataset's name.")
    ],
    out: Annotated[str, Option(metavar="FOLDER", help="Where to save the prior.")],
    tokenizer: Annotated[
        str, Option(metavar="NAME", help="Of the model to steer: a bundled model, a folder, or ORG/NAME.")
    ] = "base",
    order: Annotated[int, Option(metavar="N", min=1, max=5, help="The longest n-grams to count.")] = 3,
    force: Annotated[bool, Option("--force", help="Replace an existing folder.")] = False,
    column: Annotated[str | None, Option(metavar="NAME", help="The column that holds the text.")] = None,
    split: Annotated[str | None, Option(metavar="NAME", help="The split of a dataset.")] = None,
    config: Annotated[str | None, Option(metavar="NAME", help="The configuration of a dataset.")] = None,
    sample_by: Annotated[
        str | None, Option(metavar="UNIT", help="Documents of a text file: line, paragraph, document.")
    ] = None,
) -> None:
    """Count a corpus, to steer with.

    \b
    logitproc fit ngram --corpus quixote.txt --out runs/quixote
    logitproc fit ngram --corpus abstracts.csv --column abstract --tokenizer openai-community/gpt2 --out prior

    Memory is bounded whatever the size of the corpus. A fit that was interrupted resumes when the same
    command is given again.
    """
    source = find_model(tokenizer)
    _quiet(context)
    from transformers import AutoTokenizer

    from .prior import NGramPrior

    reading = {"column": column, "split": split, "config": config, "sample_by": sample_by}
    given: dict[str, Any] = {key: value for key, value in reading.items() if value is not None}
    try:
        prior = NGramPrior.fit(
            corpus, AutoTokenizer.from_pretrained(source), order=order, out=out, force=force, **given
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Interrupted; the same command resumes the count.") from None
    size = sum(file.stat().st_size for file in Path(out).iterdir())
    print(f"Counted {corpus}: {prior.documents:,} documents, {prior.tokens:,} tokens.")
    print(_table([(f"  {n}-grams", f"{len(o.ids):,}") for n, o in enumerate(prior.orders, 1)], right=True))
    print(f"Saved to {out}, {size / 1e3:,.0f} kB. Try it:")
    proc = shlex.quote(f"ngram:prior={out}")
    print(f'  logitproc generate --model {shlex.quote(tokenizer)} --prompt "..." --proc {proc}')


# --- collect ---

INTERRUPTED = 130  # of `collect`, whose work goes on where it was
SHOWN_TEXTS = 2  # of each label, at the end

Embeddings = Annotated[
    str | None,
    Option(metavar="MODEL", help="A sentence-transformers model, by name or path; offline features if left out."),
]


@collect.callback(invoke_without_command=True)
def collect_texts(
    context: typer.Context,
    config: Annotated[str | None, Option(metavar="FILE", help="The job, in YAML.")] = None,
    output: Annotated[str | None, Option(metavar="DIR", help="Where the items go; resumes what is there.")] = None,
    settings: Annotated[
        list[str] | None,
        Option("--set", metavar="KEY=VALUE", help="Beats the job file: generation.top_p=0.9; may be repeated."),
    ] = None,
    device: Annotated[str, Option(metavar="NAME", help="cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Collect labelled texts that are diverse and on label, with a report.

    \b
    logitproc collect --config job.yaml --output runs/job
    accelerate launch --num_processes 2 -m logitproc.cli collect --config job.yaml --output runs/job
    torchrun --nproc-per-node 2 -m logitproc.cli collect --device cpu --config job.yaml --output runs/job
    logitproc collect export-labels runs/job --out check.csv
    logitproc collect apply-labels runs/job --labels check.csv

    Killed at any moment it goes on when the same command is given again. DIR/data.jsonl holds the items,
    DIR/report.txt how diverse and accurate they are beside plain sampling. Exit status 130: interrupted.
    """
    if context.invoked_subcommand:
        return
    if config is None or output is None:
        raise ValueError("collect needs a job and a place: --config FILE --output DIR.")
    _quiet(context)
    from .collect import Job
    from .collect.report import read_real

    job = Job.from_file(config, settings or [])
    real = read_real(job)
    source = find_model(job.model)
    accelerator = _accelerator(device)
    if accelerator is None or accelerator.is_main_process:
        import yaml

        print(yaml.safe_dump(job.to_dict(), sort_keys=False, allow_unicode=True), file=sys.stderr)
    try:
        _collect(job, Path(output), source, accelerator, choose_device(device), real)
    except KeyboardInterrupt as interruption:
        print(f"logitproc: {explain(interruption)[0]}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def _collect(job: "Job", output: Path, source: str, accelerator: Any, device: str, real: "Real | None") -> None:
    from transformers import AutoTokenizer

    from .collect import collect
    from .collect.report import read_items, report

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = load_model(source, job.dtype, str(accelerator.device) if accelerator else device, None)
    collected = collect(job, output, model, tokenizer, accelerator)
    plain_job = job.plain()
    plain = collect(plain_job, output / "plain", model, tokenizer, accelerator) if plain_job else None
    main = accelerator is None or accelerator.is_main_process
    if accelerator:
        accelerator.end_training()
    if not main:
        return
    _, text = report(job, output, collected, plain, real)
    shown: dict[str, list[str]] = {label: [] for label in job.labels}
    for item in read_items(collected.data):
        if len(shown[item["label"]]) < SHOWN_TEXTS:
            shown[item["label"]].append(item["text"])
    for label, texts in shown.items():
        for item_text in texts:
            print(textwrap.fill(f"{label}: {item_text}", 100, subsequent_indent="    ") + "\n")
    print(f"{text}\nReport: {output / 'report.txt'}. Next: logitproc collect export-labels {shlex.quote(str(output))} "
          "--out check.csv")  # fmt: skip


def _accelerator(device: str) -> Any:
    """An Accelerator where a launcher started several processes, else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    import torch
    from accelerate import Accelerator

    return Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())


@collect.command("export-labels")
def export_labels(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="What `collect` wrote.")],
    out: Annotated[str, Option(metavar="CSV", help="For a person to fill in.")],
    number: Annotated[int | None, Option(metavar="N", min=1, help="At most so many items; all if left out.")] = None,
    embeddings: Embeddings = None,
) -> None:
    """Write the items worth inspecting to CSV, the most uncertain first."""
    from .collect import correct

    count = correct.export_labels(Path(folder), Path(out), number, embeddings)
    print(
        f"{out}: {count:,} items, the most uncertain first. For each one you look at, fill in correct_label (and "
        f"'no' in in_scope where the text fits no label), then: logitproc collect apply-labels {shlex.quote(folder)} "
        f"--labels {shlex.quote(out)}"
    )


@collect.command("apply-labels")
def apply_labels(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="What `collect` wrote.")],
    labels: Annotated[str, Option(metavar="CSV", help="As export-labels wrote it, filled in.")],
    weight: Annotated[float, Option(metavar="W", min=0, max=1, help="Of the prompted label.")] = 0.3,
    embeddings: Embeddings = None,
) -> None:
    """Carry what a person said about some items to all: relabel, drop what is out of scope, say what changed."""
    from .collect import correct

    print(correct.table(correct.apply_labels(Path(folder), Path(labels), weight, embeddings)))
    print(f"\nWritten: {Path(folder) / 'corrected.jsonl'}, corrected-balanced.jsonl and corrections.json.")


@fit.command("vq")
def fit_vq(
    context: typer.Context,
    calibration: Annotated[
        str, Option(metavar="FILE|DATASET", help="Text to fit to and, its last tenth, to judge with.")
    ],
    out: Annotated[str, Option(metavar="FOLDER", help="Where to save the head.")],
    codes: Annotated[
        int | None, Option(metavar="K", help="Codes to multiply with, instead of every token.")
    ] = None,
    model: Annotated[str, Option(metavar="NAME", help="A bundled model, a folder, or ORG/NAME.")] = "base",
    kind: Annotated[
        str, Option(metavar="KIND", help="paper, weighted, distilled, tiebreak or residual.")
    ] = "weighted",
    refine: Annotated[
        int, Option(metavar="N", help="Score the N best tokens again with the model's own rows.")
    ] = 0,
    screened: Annotated[
        int, Option(metavar="R", help="In place of codes, the R directions in which a state is largest.")
    ] = 0,
    tokens: Annotated[int, Option(metavar="N", min=1, help="At most so many tokens of the text.")] = 1 << 16,
    seed: Annotated[int, Option(metavar="N", min=0, max=MAX_SEED)] = 0,
    converted: Annotated[
        str | None, Option(metavar="FOLDER", help="Save the model with that head too, for from_pretrained.")
    ] = None,
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], Option()] = "auto",
    device: Annotated[str, Option(metavar="NAME", help="cpu, cuda, ...; auto takes a GPU if there is one.")] = "auto",
    force: Annotated[bool, Option("--force", help="Replace existing folders.")] = False,
) -> None:
    """Fit a smaller output head, and say what it costs.

    \b
    logitproc fit vq --codes 4096 --calibration book.txt --out runs/head
    logitproc fit vq --model org/name --codes 16384 --calibration book.txt --out head --converted org-name-vq
    logitproc fit vq --screened 32 --refine 512 --calibration book.txt --out runs/screened

    Tokens that share a code cannot be told apart by it: the report gives the perplexity that this costs on
    text the fit has not seen, and the least that any choice of codes must cost. --refine tells them apart. It
    and --screened read less than the model's own head does, and hold as many numbers or more.
    """
    source = find_model(model)
    _quiet(context)
    from transformers import AutoTokenizer

    from .artifact import check_new, new_folder
    from .heads import VQHead, convert

    for folder in filter(None, (out, converted)):
        check_new(folder, force)
    loaded = load_model(source, dtype, choose_device(device), None)
    tokenizer = AutoTokenizer.from_pretrained(source)
    head = VQHead.fit(
        loaded, calibration, codes=codes, kind=kind, refine=refine, screened=screened, seed=seed, tokenizer=tokenizer,
        tokens=tokens, report=_show_stage,
    )  # fmt: skip
    head.save(out, force=force)
    what = f"{codes:,} codes of kind {kind}" if codes else f"{screened:,} directions"
    print(f"Fitted {what} to {head.about['tokens']:,} tokens of {calibration}.")
    print(_table(_head_report(head, loaded)))
    print(f"Saved to {out}: lp.attach(model, lp.VQHead.load({out!r})).")
    if head.token_weights is not None:
        proc = shlex.quote(f"vq:head={out}")
        print(f'  logitproc generate --model {shlex.quote(model)} --prompt "..." --proc {proc}')
    if converted:
        with new_folder(converted, force) as new:
            convert(loaded, head).save_pretrained(new)
            tokenizer.save_pretrained(new)
        print(f"Saved the model with this head to {converted}:")
        print(f'  logitproc generate --model {shlex.quote(converted)} --prompt "..."')


def _show_stage(progress: "HeadProgress") -> None:
    """One line on standard error for the last step of a stage, or one that is rewritten on a terminal."""
    figures = ", ".join(f"{key} {value:.4g}" for key, value in progress.figures.items())
    line = f"{progress.stage} {progress.step}/{progress.steps}" + (f": {figures}" if figures else "")
    last = progress.step >= progress.steps
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="\n" if last else "", file=sys.stderr, flush=True)
    elif last:
        print(line, file=sys.stderr)


def _head_report(head: Any, model: Any) -> list[tuple[str, str]]:
    """What a fitted head costs on text it has not seen, and what it saves."""
    from .heads import DenseHead

    held, floors, floats = head.about["held_out"], head.about["floors"], head.num_float_params()
    own = model.get_output_embeddings()
    dense = DenseHead.of(own.weight, own.bias)
    saved, read = 1 - floats / dense.num_float_params(), head.bytes_per_step() / dense.bytes_per_step()
    fewer = f"{abs(saved):.1%} {'fewer' if saved >= 0 else 'more'} than the model's own"
    tied = ", which stays as its input embedding" if model.get_input_embeddings().weight is own.weight else ""
    rows = [
        ("  perplexity", f"x {held['perplexity_ratio']:.3f} of {held['perplexity']:.2f}, on {held['tokens']:,} tokens"),
        ("  KL(dense || head)", f"{held['kl']:.4f} nats"),
        ("  same most probable token", f"{held['agreement']:.1%}"),
        ("  different tokens it finds so", f"{held['distinct']:,} of {held['distinct_dense']:,}"),
        ("  numbers in the head", f"{floats:,}, {fewer}{tied}"),
        ("  bytes that a step reads", f"{head.bytes_per_step():,}, {read:.1%} of the model's own"),
    ]
    if floors:
        rows += [
            ("  tie floor of these codes", f"{floors['floor']:.3f} nats, E[ln n(v)]"),
            ("  of the best codes there are", f"{floors['minimum']:.3f} nats"),
            ("  lost inside codes anyway", f"{floors['within']:.3f} nats, by the dense model"),
            ("  KL that no training avoids", f"{floors['information']:.4f} nats, I(V; H | K)"),
        ]
    return rows


# --- demo ---


@app.command()
def demo(
    context: typer.Context,
    prompt: PromptList = None,
    strength: Annotated[float | None, Option(metavar="X", help="For all methods; 0 is neutral.")] = None,
    max_new_tokens: NewTokens = 64,
    seed: Annotated[int, Option(metavar="N", min=0, max=MAX_SEED)] = 0,
    as_json: Json = False,
) -> None:
    """Show what the methods do, offline.

    Text of the bundled model before and after, and what it cost. Style perplexity is under a Kneser-Ney
    model of held-out Don Quixote: lower is more like it. Plainness is the reward of the bundled preference
    models, for the first 25 words. Base perplexity is under the unsteered model: higher is stranger to it. JS is how
    far the next-token distribution moved, from 0 to 1 bit. All are means over the same few texts: they show
    what to look at, the studies in eval/RESULTS.md say what holds.
    """
    texts = read_prompts(prompt or DEMO_PROMPTS, None)
    _quiet(context)
    from .chain import Chain, parse_processor
    from .generation import decode
    from .prior import NGramPrior

    source = pocket("base")
    chains = {"unsteered": Chain()}
    for setting in DEMO:
        item = parse_processor(setting)
        if strength is not None and "strength" in item:
            item["strength"] = strength
        chains[_as_flag(item)] = Chain.from_spec([item])
    judge = NGramPrior.load(DEMO_JUDGE)
    every = [text for text in texts for _ in range(DEMO_TEXTS)]
    tokenizer, config, prompts = _prepare(source, every, {**DEMO_SAMPLING, "max_new_tokens": max_new_tokens})
    judge.check_tokenizer(tokenizer)
    model = load_model(source, "auto", "cpu", None)
    rows: list[dict[str, Any]] = []
    for label, chain in chains.items():
        _seed(seed)
        results = _continue(model, tokenizer, chain, prompts, config)
        decoded = [decode(tokenizer, *pair) for pair in zip(prompts, results, strict=True)]
        figures = _figures(model, chain, judge, prompts, results, decoded)
        rows.append({"method": label, "seed": seed, **figures, "prompts": every, "texts": decoded})
    if as_json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        return
    plain, *steered = rows
    summaries = {entry.name: entry.summary for entry in registry.entries()}
    for number, row in enumerate(steered):
        at = number % len(texts) * DEMO_TEXTS
        columns = _side_by_side([plain["method"], row["method"]], [plain["texts"][at], row["texts"][at]])
        print(f"{summaries[row['method'].partition(':')[0]]}\n\n{every[at]} ...\n\n{columns}\n")
    heading = ("", "style perplexity", "plainness", "base perplexity", "JS (bits)")
    print(_table([heading, *(_figure_cells(row) for row in rows)], right=True))
    print(
        "\nStyle: held-out Don Quixote, lower is closer. Plainness: short words, higher is plainer. Base: the\n"
        f"unsteered model, lower is likelier. {len(every)} texts a row. More: demo --help\n"
    )
    print(
        f"Try next: logitproc generate --prompt {shlex.quote(texts[0])} --proc {shlex.quote(DEMO[0])}, or "
        "logitproc fit ngram --corpus YOUR.txt --out my-prior"
    )


def _figures(
    model: Any, chain: "Chain", judge: "NGramPrior", prompts: list[list[int]], results: list[list[int]],
    texts: list[str],
) -> dict[str, float]:  # fmt: skip
    """Means over the generated tokens; plainness is one over the texts."""
    from .scoring import score_continuations

    scores = score_continuations(model, chain, prompts, results)
    tokens = sum(map(len, results))
    mean = lambda key: sum(row[key] * row["tokens"] for row in scores) / tokens
    style = sum(judge.log_prob(ids, prompt).sum() for prompt, ids in zip(prompts, results, strict=True))
    return {"scored_tokens": tokens, "style_perplexity": math.exp(-style / tokens),
            "plainness": sum(plainness(" ".join(text.split()[:25])) for text in texts) / len(texts),
            "base_perplexity": math.exp(mean("base_nll")), "js_bits": mean("js")}  # fmt: skip


def _figure_cells(row: dict[str, Any]) -> tuple[str, ...]:
    figures = (f"{row['style_perplexity']:.1f}", f"{row['plainness']:+.2f}", f"{row['base_perplexity']:.1f}")
    return (row["method"], *figures, f"{row['js_bits']:.3f}")


# --- layout ---


def _table(rows: Sequence[Sequence[str]], right: bool = False) -> str:
    """Rows as aligned lines; with `right`, all columns but the first are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if right and at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _side_by_side(heads: Sequence[str], texts: Sequence[str]) -> str:
    """Two texts in two columns, as wide as the terminal and at most 100 characters."""
    width = (min(100, shutil.get_terminal_size((100, 24)).columns) - 3) // 2
    columns = []
    titles = [textwrap.wrap(head, width) for head in heads]
    height = max(map(len, titles))
    for title, text in zip(titles, texts, strict=True):
        wrapped = [line for part in text.strip().splitlines() for line in textwrap.wrap(part, width) or [""]]
        columns.append([*title, *[""] * (height - len(title)), "-" * width, *wrapped])
    lines = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(f"{left.ljust(width)} | {right}".rstrip() for left, right in lines)


if __name__ == "__main__":
    sys.exit(main())

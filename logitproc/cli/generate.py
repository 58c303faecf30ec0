"""`logitproc generate`."""

import json
import math
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from .. import registry
from ..bundled import find_model
from .app import app
from .common import MAX_SEED, Dtype, NewTokens, PromptList, choose_device, load_model, quiet, set_seed

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

    from ..chain import Chain
    from ..processor import Processor
    from ..speculative import Speculation


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
    dtype: Dtype = "auto",
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
    quiet(context)
    through, spec = build_chain(proc or [], chain)
    place = choose_device(device) if not device_map else None
    tokenizer, config, encoded = prepare(source, texts, flags)
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
    set_seed(seed)
    if stream:
        print(texts[0], end="", flush=True)
        continuations(loaded, tokenizer, through, encoded, config, draft, streamer=_streamer(tokenizer))
        print()
        return
    from ..generation import decode

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
    from ..chain import Chain, _read, parse_processor

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


def prepare(
    source: str, texts: Sequence[str], flags: dict[str, Any]
) -> "tuple[Any, GenerationConfig, list[list[int]]]":
    """(tokenizer, generation settings, token ids of the prompts), all checked before the weights are read."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from ..heads import recognise

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


def _speculation(chain: "Chain") -> "Speculation":
    from ..speculative import Speculation

    speculation = Speculation()
    speculation.drafter(chain)  # refuses a chain without companions
    return speculation


def _in_batches(
    model: "PreTrainedModel", tokenizer: Any, chain: "Chain", prompts: Sequence[list[int]],
    config: "GenerationConfig", size: int, draft: "Speculation | None" = None,
) -> Iterator[tuple[int, list[int]]]:  # fmt: skip
    """(number of the prompt, generated ids) of each result, as soon as its batch is done."""
    from tqdm import tqdm

    with tqdm(total=len(prompts), unit=" prompts", disable=not sys.stderr.isatty()) as bar:
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            rows = continuations(model, tokenizer, chain, batch, config, draft)
            bar.clear()  # the results may go to the same terminal
            for row, ids in enumerate(rows):
                yield start + row * len(batch) // len(rows), ids
            bar.update(len(batch))


def continuations(
    model: "PreTrainedModel", tokenizer: Any, chain: "Chain", prompts: Sequence[list[int]],
    config: "GenerationConfig", draft: "Speculation | None" = None,
    streamer: "BaseStreamer | None" = None,
) -> list[list[int]]:  # fmt: skip
    """The generated ids of each row, its end-of-text token included and the padding after that cut off."""
    import torch

    from ..generation import generate

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

    from ..generation import decode

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

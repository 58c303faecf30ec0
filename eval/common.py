"""What scripts share: flags, loading, exit statuses and the printed report; how an interval is written."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logitproc import __version__, cli
from logitproc.bundled import find_model

if TYPE_CHECKING:  # torch and transformers are imported after the flags are read, so that --help is quick
    from logitproc.scoring import Report

Figures = dict[str, Any]


def script(
    name: str,
    doc: str,
    divergence: bool,
    figures: "Callable[[Report], Figures]",
    table: Callable[[Figures], str],
) -> Callable[[list[str] | None], int]:
    """The `main` of a scoring script: `figures` of the report go to --json, their `table` to stdout.

    It returns the exit status: 0 done, 2 wrong usage, 1 failed, the last two with one sentence on stderr.
    """

    def main(argv: list[str] | None = None) -> int:
        args = _parser(doc).parse_args(argv)
        try:
            report, about, prints = _score(args, divergence)
            if prints:
                _publish(args, {"report": name, **about, **figures(report)}, table)
        except (Exception, KeyboardInterrupt) as error:
            if args.debug:
                raise
            sentence, status = cli.explain(error)
            print(f"{name}: {sentence}", file=sys.stderr)
            return status
        return 0

    return main


def _parser(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base", help="folder, hub id or bundled name (default: base)")
    parser.add_argument("--data", required=True, metavar="FILE|DATASET", help="text, jsonl, csv, hub id")
    parser.add_argument("--column", default="text", help="column that holds the text (default: text)")
    parser.add_argument("--split", help="split of a data set")
    parser.add_argument("--config", help="configuration of a data set")
    parser.add_argument(
        "--sample-by", help="what a document of a text file is: auto, line, paragraph, document"
    )
    parser.add_argument(
        "--proc", action="append", default=[], metavar="NAME:key=value,...",
        help="a processor; may be repeated, the order is the order of application",
    )  # fmt: skip
    parser.add_argument("--chain", metavar="FILE", help="a chain in YAML or JSON; --proc overrules it")
    parser.add_argument("--context", type=positive, help="tokens read at once (default: at most 1024)")
    parser.add_argument("--stride", type=positive, help="tokens between windows (default: context/2)")
    parser.add_argument("--batch-size", type=positive, default=8, help="windows at once (default: 8)")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--limit", type=positive, metavar="N", help="read the first N documents only")
    parser.add_argument("--json", metavar="OUT", help="write the report as one JSON object on one line")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _score(args: argparse.Namespace, divergence: bool) -> "tuple[Report, Figures, bool]":
    """The report, what it is a report of, and whether this process is the one that prints."""
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from logitproc import scoring
    from logitproc.corpus import documents

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if args.json:
        _check_output(Path(args.json))
    chain, spec = cli.build_chain(args.proc, args.chain)
    if divergence and not spec:
        raise ValueError("There is nothing to compare the model with; give --proc or --chain.")
    given = {"split": args.split, "config": args.config, "sample_by": args.sample_by}
    texts = documents(args.data, column=args.column, **{k: v for k, v in given.items() if v is not None})
    accelerator = Accelerator(cpu=_on_cpu(args.device))
    source = find_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=args.dtype).to(accelerator.device)
    context = args.context or min(scoring.max_context(model) or 1024, 1024)
    stride = args.stride or max(1, context // 2)
    report = scoring.score_corpus(
        model, tokenizer, chain, texts, context=context, stride=stride, batch_size=args.batch_size,
        divergence=divergence, accelerator=accelerator, limit=args.limit,
    )  # fmt: skip
    about = {
        "logitproc": __version__,
        "model": args.model,
        "data": args.data,
        "chain": spec,
        "scores": "processed" if spec else "raw",
        "context": context,
        "stride": stride,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "limit": args.limit,
    }
    prints = accelerator.is_main_process
    accelerator.end_training()
    return report, about, prints


def _publish(args: argparse.Namespace, result: Figures, table: Callable[[Figures], str]) -> None:
    from logitproc.artifact import write_text

    print(_header(result, args) + table(result))
    if args.json:
        write_text(args.json, json.dumps(_finite(result)) + "\n")


def _check_output(path: Path) -> None:
    """Raise before an hour of work rather than after it."""
    from logitproc.artifact import check_place

    if path.is_dir():
        raise ValueError(f"--json {path} is a folder; name a file.")
    check_place(path)


def _on_cpu(device: str) -> bool:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for and torch finds no CUDA device; use --device cpu.")
    return device == "cpu" or not torch.cuda.is_available()


def _finite(value: Any) -> Any:
    """JSON has neither infinity nor NaN: null stands for both."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def counts(report: "Report") -> Figures:
    """How much was scored."""
    keys = ("documents", "words", "bytes", "tokens", "unscored", "forbidden")
    return {key: getattr(report, key) for key in keys}


def _header(result: Figures, args: argparse.Namespace) -> str:
    chain = " ".join([*([args.chain] if args.chain else []), *args.proc]) or "none"
    processes = f", {result['processes']} processes" if result["processes"] > 1 else ""
    lines = [
        f"model    {result['model']} ({result['dtype']}, {result['device']}{processes})",
        f"data     {result['data']}: {result['documents']:,} documents, {result['words']:,} words, "
        f"{result['bytes']:,} bytes",
        f"chain    {chain} (scores: {result['scores']})",
        f"windows  context {result['context']}, stride {result['stride']}",
        f"tokens   {result['tokens']:,} scored, {result['unscored']:,} first tokens without BOS left out",
    ]
    if result["forbidden"]:
        lines.append(f"         {result['forbidden']:,} tokens of the text are forbidden by the chain")
    return "\n".join(lines) + "\n\n"


def rows(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A table in plain text: the first column flush left, the others flush right."""
    cells = [list(head), *map(list, body)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    line = lambda row: "  ".join(
        cell.rjust(width) if column else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "\n".join(line(row).rstrip() for row in cells)


def interval(mean_low_high: Iterable[float], digits: int = 3) -> str:
    mean, low, high = mean_low_high
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"

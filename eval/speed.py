"""What everything costs: one command, one table, on whatever machine it runs.

    python eval/speed.py                                    steps, calls, jobs and heads, in a few minutes
    python eval/speed.py --json speed.json --plot speed.png
    python eval/speed.py --check                            exit 1 if a ratio of the stored table got worse
    python eval/speed.py --json eval/results/speed.json     store another table
    python eval/speed.py --parts steps --compile            beside `torch.compile` of the plain definitions, too
    python eval/speed.py --fit corpus.txt --megabytes 100   counting a corpus, and nothing else
    python eval/speed.py --busy --rounds 20                 on a machine that others use: one thread, its own CPU time

Ratios are what to read; microseconds belong to this machine on this day. Whatever is compared is measured in turns in
one process: each ratio is the median over the rounds, with its quartiles. What is timed, on what, and the bounds
stand in `speed_cases.py`:

    steps   one step of each method, and of a chain of all, beside a copy of the scores, `log_softmax` of all scores
            that it reads, transformers' own processors, and the forward pass of a model of 1 or 8 billion parameters
            (the shape of Llama 3, random weights, bfloat16, one token a row after 256)
    calls   what a chain costs that does nothing; rows at once; a ledger
    jobs    generating, scoring and fitting, from end to end
    heads   output heads beside the dense one and beside the time to read their bytes, see `heads.py`

--check compares ratios with the table that --json stored, never times: a ratio is worse when it exceeds 1.3 times the
stored one in three measurements.
"""

import argparse
import contextlib
import io
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from logging import ERROR
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
import speed_cases
import speed_models
import torch
from speed_cases import BASELINES, BATCHES, BOUNDS, PAIRS, STEPS, VOCABULARIES, Bound, Inputs
from speed_fit import fit, fit_lmplz
from speed_models import LLAMA
from stopwatch import Call, Stopwatch
from transformers.utils import logging

from logitproc import cli, ops
from logitproc.artifact import write_text

STORED = Path(__file__).parent / "results" / "speed.json"
PARTS = ("steps", "calls", "jobs", "heads")
MARGIN = 1.3  # of --check
ATTEMPTS = 3
HEAD_SHAPES = {"cpu": ("qwen2.5-0.5b",), "cuda": ("llama-3-8b", "qwen2.5-0.5b")}
HEADS = {"weighted": "head weighted K=1024", "int8": "head int8", "exact_nested": "head exact_nested"}

Thing = tuple[str, int, int]  # what is timed, vocabulary, batch
Key = tuple[str, str, int, int]  # the same, with what it is held against
Wanted = Callable[[Thing], bool]


class Row(NamedTuple):
    """One comparison; `us` is the time of a call of what is timed, which makes `tokens` tokens."""

    part: str
    what: str
    against: str
    vocabulary: int
    batch: int
    tokens: int
    us: float
    baseline_us: float
    ratio: float
    ratio_25: float
    ratio_75: float

    @property
    def thing(self) -> Thing:
        return self.what, self.vocabulary, self.batch

    @property
    def key(self) -> Key:
        return self.what, self.against, self.vocabulary, self.batch


def compared(
    part: str, what: str, against: str, vocabulary: int, batch: int, tokens: int, ours: np.ndarray,
    theirs: np.ndarray | float,
) -> Row:  # fmt: skip
    """Of the seconds of both, round by round."""
    low, middle, high = np.percentile(ours / theirs, [25, 50, 75])
    figures = np.median(ours) * 1e6, np.median(theirs) * 1e6, middle, low, high
    return Row(part, what, against, vocabulary, batch, tokens, *(float(f"{figure:.4g}") for figure in figures))


def compiled(call: Call) -> Call:
    """The same with `torch.compile` of the plain definitions instead of kernels."""

    def run(i: int) -> Any:
        with ops.backend("compile"):
            return call(i)

    return run


# --- measuring ---


class Run:
    """One run of the script: what was asked for, and the clock."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.watch = Stopwatch(args.device, time.process_time if args.busy else time.perf_counter)
        self.left_out: dict[str, str] = {}  # what, and why

    def rows(self, wanted: Wanted = lambda thing: True) -> Iterator[Row]:
        for part in self.args.parts:
            self.say(part)
            measure = {"steps": self.steps, "heads": self.heads}.get(part)
            yield from self.pairs(part, wanted) if measure is None else measure(wanted)

    def steps(self, wanted: Wanted) -> Iterator[Row]:
        sizes = [(v, b) for v in self.args.vocabularies for b in self.args.batches]
        sizes = [(v, b) for v, b in sizes if any(wanted((name, v, b)) for name in STEPS)]
        forwards = self.forwards(sizes)
        for vocabulary, batch in sizes:
            self.say(f"steps: {vocabulary:,} x {batch}")
            x = Inputs(vocabulary, batch, self.args.device)
            made = {name: make(x) for name, make in STEPS.items() if wanted((name, vocabulary, batch))}
            reads = {name: speed_cases.tensors_read(processors) for name, processors in made.items()}
            calls: dict[Any, Call] = {name: x.step(processors) for name, processors in made.items()}
            calls |= {against: baseline(x) for against, baseline in BASELINES.items()}
            calls |= {n: speed_cases.log_softmax(x, n) for n in set(reads.values())}
            if self.args.compile:
                calls |= {("compiled", name): compiled(calls[name]) for name in made}
            times = self.watch.in_turns(calls, self.args.rounds, self.args.seconds)
            for name in made:
                beside = {"log_softmax": times[reads[name]]} | {against: times[against] for against in BASELINES}
                if self.args.compile:
                    beside["torch.compile"] = times["compiled", name]
                beside |= {f"{size} forward": forwards[size, vocabulary, batch] for size in LLAMA
                           if (size, vocabulary, batch) in forwards}  # fmt: skip
                for against, theirs in beside.items():
                    yield compared("steps", name, against, vocabulary, batch, batch, times[name], theirs)

    def forwards(self, sizes: list[tuple[int, int]]) -> dict[tuple[str, int, int], float]:
        """Median seconds of the bare forward pass of one token a row, by model, vocabulary and batch."""
        found = {}
        for name in self.args.models if sizes else ():
            widest = max(vocabulary for vocabulary, _ in sizes)
            need, free = speed_models.size(name, widest), speed_models.free_memory(self.args.device)
            if need > free / 2:
                self.left_out[f"{name} forward"] = (
                    f"its weights take {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
                )
                continue
            self.say(f"the forward pass of {name}")
            model = speed_models.made(name, widest, self.args.device)
            for vocabulary, batch in sizes:
                call = speed_models.one_token(model, vocabulary, batch)
                times = self.watch.in_turns({"forward": call}, self.args.rounds, self.args.seconds / 4, least=3)
                found[name, vocabulary, batch] = float(np.median(times["forward"]))
        return found

    def pairs(self, part: str, wanted: Wanted) -> Iterator[Row]:
        for pair in PAIRS:
            if pair.part != part or not wanted((pair.what, pair.vocabulary, pair.batch)):
                continue
            self.say(f"{part}: {pair.what}")
            ours, theirs = pair.make(self.args.device)
            times = self.watch.in_turns({"ours": ours, "theirs": theirs}, self.args.rounds, self.args.seconds)
            yield compared(*pair[:6], times["ours"], times["theirs"])

    def heads(self, wanted: Wanted) -> Iterator[Row]:
        import heads

        for shape in HEAD_SHAPES[self.args.device]:
            vocabulary = heads.SHAPES[shape][0]
            kinds = [kind for kind, what in HEADS.items() if wanted((what, vocabulary, 1))]
            if not kinds:
                continue
            self.say(f"heads: {shape}")
            given = argparse.Namespace(
                shapes=[shape], codes=[1024], heads=kinds, tops=[8.0], batches=[1], repeats=min(15, self.args.rounds),
                device=self.args.device,
            )  # fmt: skip
            heads.CLOCK = self.watch.clock
            with contextlib.redirect_stderr(io.StringIO()):
                found = heads.timing(given)
            for kind, row in zip(kinds, found, strict=True):
                for against, baseline in (("dense head", row["dense_ms"]), ("reading its bytes", row["bare_ms"])):
                    ours, theirs = np.array([row["ms"]]) / 1e3, np.array([baseline]) / 1e3
                    yield compared("heads", HEADS[kind], against, vocabulary, 1, 1, ours, theirs)

    def say(self, what: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{what}", end="\r", file=sys.stderr)


# --- output ---


def tables(rows: list[Row], device: str) -> str:
    """Steps with a column for each baseline; all other comparisons one below the other; bounds."""
    found = []
    steps = [row for row in rows if row.part == "steps"]
    columns = list(dict.fromkeys(row.against for row in steps))
    cells: dict[tuple[str, int, int], dict[str, Row]] = {}
    for row in steps:
        cells.setdefault((row.what, row.vocabulary, row.batch), {})[row.against] = row
    body = []
    for (what, vocabulary, batch), beside in cells.items():
        first = next(iter(beside.values()))
        times = f"{first.us:.1f}", f"{first.us / first.tokens:.1f}"
        body.append((what, f"{vocabulary}", f"{batch}", *times, *(_ratio(beside.get(name)) for name in columns)))
    if body:
        found.append(common.rows(("step", "V", "batch", "us", "us/token", *columns), body))
    others = [
        (r.what, r.against, f"{r.vocabulary}", f"{r.batch}", f"{r.us:.1f}", f"{r.tokens / r.us * 1e6:,.0f}",
         f"{r.ratio:.3g}", f"{r.ratio_25:.3g} to {r.ratio_75:.3g}")
        for r in rows if r.part != "steps"
    ]  # fmt: skip
    if others:
        head = ("what", "against", "V", "batch", "us", "tokens/s", "ratio", "quartiles")
        found.append(common.rows(head, others))
    judged = [
        (worst.what, worst.against, f"{worst.vocabulary} x {worst.batch}", f"{worst.ratio:.3g}", f"{bound.ratio:.3g}",
         "ok" if worst.ratio <= bound.ratio else "MISSED")
        for bound, worst in verdicts(rows, device)
    ]  # fmt: skip
    if judged:
        found.append(common.rows(("bound", "against", "worst at", "ratio", "at most", ""), judged))
    return "\n\n".join(found)


def _ratio(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{100 * row.ratio:.2f} %" if row.against.endswith("forward") else f"{row.ratio:.2f}"


def verdicts(rows: list[Row], device: str) -> Iterator[tuple[Bound, Row]]:
    """Each bound of this device that was measured, with the worst of its rows."""
    for bound in BOUNDS:
        of_bound = [
            row for row in rows
            if (row.what, row.against) == (bound.what, bound.against)
            and bound.vocabulary in (None, row.vocabulary) and bound.batch in (None, row.batch)
        ]  # fmt: skip
        if of_bound and bound.device in (None, device):
            yield bound, max(of_bound, key=lambda row: row.ratio)


def plot(rows: list[Row], path: Path) -> None:
    """Each step beside `log_softmax`, dashed the bound on a CPU, and beside the forward pass of the smallest model."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    steps = [row for row in rows if row.part == "steps"]
    forwards = [name for name in (f"{size} forward" for size in LLAMA) if any(row.against == name for row in steps)]
    panels = ["log_softmax", *forwards[:1]]
    names = [name for name in STEPS if any(row.what == name for row in steps)]
    figure = Figure(figsize=(6.5 * len(panels), 1.2 + 0.34 * len(names)), dpi=130, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    sizes = sorted({(row.vocabulary, row.batch) for row in steps})
    colors = {batch: f"C{n}" for n, batch in enumerate(sorted({batch for _, batch in sizes}))}
    markers = {vocabulary: "os^v"[n % 4] for n, vocabulary in enumerate(sorted({v for v, _ in sizes}))}
    for axis, against in zip(axes, panels, strict=True):
        scale = 1 if against == "log_softmax" else 100
        for vocabulary, batch in sizes:
            points = [(r.ratio * scale, names.index(r.what)) for r in steps
                      if (r.against, r.vocabulary, r.batch) == (against, vocabulary, batch)]  # fmt: skip
            axis.plot(*zip(*points, strict=True), markers[vocabulary], color=colors[batch], alpha=0.8,
                      label=f"{vocabulary:,} x {batch}")  # fmt: skip
        axis.set(xscale="log", xlabel="times log_softmax of the scores that it reads" if scale == 1
                 else f"% of the {against}")  # fmt: skip
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.25)
    axes[0].axvline(3, color="0.4", lw=0.8, ls="--")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), title="vocabulary x batch", loc="outside right upper")
    figure.savefig(path)


# --- the guard against regressions ---


def worse(rows: list[Row], stored: dict[Key, Row]) -> list[Row]:
    """The rows whose ratio exceeds MARGIN times the stored one."""
    return [row for row in rows if row.key in stored and row.ratio > MARGIN * stored[row.key].ratio]


def check(rows: list[Row], stored: dict[Key, Row], again: Callable[[Wanted], Iterable[Row]]) -> list[str]:
    """A sentence for each row that is worse than the stored one in ATTEMPTS measurements."""
    best, failing = {row.key: row for row in rows}, worse(rows, stored)
    for _ in range(ATTEMPTS - 1):
        things = {row.thing for row in failing}
        for row in again(things.__contains__) if things else ():
            if row.key in best and row.ratio < best[row.key].ratio:
                best[row.key] = row
        failing = worse([best[row.key] for row in failing], stored)
    return [
        f"{row.what}, vocabulary {row.vocabulary:,}, batch {row.batch}: {row.ratio:.3g} times {row.against}, stored "
        f"{stored[row.key].ratio:.3g}: {100 * (row.ratio / stored[row.key].ratio - 1):.0f} % worse."
        for row in failing
    ]


def read_stored(path: Path, device: str) -> dict[Key, Row]:
    """The rows of a table that --json wrote, of the same kind of device."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no table {path}; store one with --json {path}.")
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or set(Row._fields) - set((document.get("rows") or [{}])[0]):
        raise ValueError(f"{path} holds no table of this script; store one with --json {path}.")
    if document["device"] != device:
        raise ValueError(
            f"{path} was measured on {document['device']}, this is {device}, and their ratios do not compare; store "
            "another table with --json."
        )
    rows = [Row(**row) for row in document["rows"]]
    return {row.key: row for row in rows}


def comparison(rows: list[Row], stored: dict[Key, Row], failures: list[str], path: Path) -> str:
    """What --check prints: rows that one side lacks, failures, and how many were compared."""
    found, lines = {row.key for row in rows}, list[str]()
    for where, missing in (("the stored table", found - set(stored)), ("this run", set(stored) - found)):
        for what, against, vocabulary, batch in sorted(missing):
            lines.append(f"Not in {where}: {what} against {against}, vocabulary {vocabulary:,}, batch {batch}.")
    both, bad = len(found & set(stored)), len(failures)
    end = f"{both} ratios compared with {path}: {bad} worse by more than {100 * (MARGIN - 1):.0f} %."
    return "\n".join([*lines, *failures, end])


def one_row_a_line(document: dict[str, Any]) -> str:
    """JSON that a diff shows row by row."""
    rows = ",\n  ".join(map(json.dumps, document.get("rows", [])))
    head = json.dumps({key: value for key, value in document.items() if key != "rows"}, indent=1)
    return f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n'


# --- the command ---


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 done, 2 wrong usage, 1 failed or worse than the stored table."""
    args = _arguments(argv)
    try:
        return _run(args)
    except Exception as error:
        if args.debug:
            raise
        sentence, status = cli.explain(error)
        print(f"speed: {sentence}", file=sys.stderr)
        return status


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--vocabularies", nargs="+", type=common.positive, default=list(VOCABULARIES), metavar="V")
    parser.add_argument("--batches", nargs="+", type=common.positive, default=list(BATCHES), metavar="ROWS")
    parser.add_argument("--models", nargs="*", choices=LLAMA, default=list(LLAMA), help="for the forward pass")
    parser.add_argument("--compile", action="store_true", help="hold steps against torch.compile, too; takes minutes")
    parser.add_argument("--rounds", type=common.positive, default=60, help="at most, of each comparison (60)")
    parser.add_argument("--seconds", type=float, default=6.0, help="about, for each comparison (6)")
    parser.add_argument("--busy", action="store_true", help="one thread, and its CPU time instead of the clock's")
    parser.add_argument("--json", type=Path, metavar="OUT", help="store the table")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    parser.add_argument("--check", type=Path, nargs="?", const=STORED, metavar="TABLE", help=f"default: {STORED.name}")
    parser.add_argument("--fit", type=Path, metavar="CORPUS", help="a text file, one document a line")
    parser.add_argument("--megabytes", type=float, default=100.0, help="how much of it, read again where it is less")
    parser.add_argument("--lmplz", type=Path, metavar="PROGRAM", help="with --fit: KenLM's program on the same tokens")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def _run(args: argparse.Namespace) -> int:
    _validate(args)
    stored = read_stored(args.check, args.device) if args.check else {}
    document, failures = about(args), list[str]()
    print(", ".join(f"{key} {value}" for key, value in document.items()) + "\n")
    if args.fit:
        document["fit"] = fit(args.fit, args.megabytes)
        if args.lmplz:
            document["lmplz"] = fit_lmplz(args.lmplz, args.fit, args.megabytes)
        for what in ("fit", "lmplz") if args.lmplz else ("fit",):
            print(f"{what}: " + ", ".join(f"{k} {v:,.2f}" for k, v in document[what].items()))
    else:
        run = Run(args)
        with torch.inference_mode():
            rows = list(run.rows())
            failures = check(rows, stored, run.rows)
        run.say("")
        print(tables(rows, args.device))
        for what, why in run.left_out.items():
            print(f"\nLeft out: {what}, because {why}.")
        if args.check:
            print("\n" + comparison(rows, stored, failures, args.check))
        if args.plot:
            plot(rows, args.plot)
        document |= {"left_out": run.left_out, "rows": [row._asdict() for row in rows]}
    if args.json:
        write_text(args.json, one_row_a_line(document))
    return 1 if failures else 0


def _validate(args: argparse.Namespace) -> None:
    """Raise ValueError for what cannot be measured; and set what the whole process shares."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for and torch finds no CUDA device; use --device cpu.")
    least, smallest = speed_cases.POCKET, min(args.vocabularies)
    if smallest < least:
        raise ValueError(f"--vocabularies must be at least {least}, that of the bundled prior; got {smallest}.")
    if args.busy:
        torch.set_num_threads(1)
    if args.compile:
        torch._logging.set_logs(dynamo=ERROR, inductor=ERROR)  # it says at length what it cannot compile as a whole
        warnings.simplefilter("ignore")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def about(args: argparse.Namespace) -> dict[str, Any]:
    """Where and how the table is measured."""
    cpu = platform.processor() or platform.machine()
    return {
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else cpu,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "device": args.device,
        "clock": "process_time" if args.busy else "perf_counter", "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

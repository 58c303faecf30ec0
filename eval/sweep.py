"""What a method's parameters buy: generate at every point of a grid, score every text, compare.

    python eval/sweep.py --proc ngram:prior=quixote --grid strength=0:1:0.1 --held-out quixote-held-out
        --out runs/sweep
    python eval/sweep.py --model M --proc ngram:prior=DIR --held-out DIR --out DIR --decoding both
        --grid strength=0:1:0.1 --grid rule=paper,lift,backoff --control temperature=0.7,0.8,0.9,1.0

A cell is one point of the grid, one way of decoding and one seed. Its texts, one for each prompt, are written
to OUT/cells as soon as it is done, so an interrupted sweep resumes when the same command is given again.
Unsteered text is always among the cells: every difference is paired with it, prompt by prompt. --control adds
unsteered text at other temperatures: sharper sampling alone lowers the loss under most models, so a method
gains only where it lies below that curve.

Judge by held-out style: a prior of text that never enters a steering table. Intervals are 95 % bootstrap over
prompts, after averaging the seeds of a prompt. Prompts on odd lines of the file are for choosing settings,
those on even lines for reporting (--half). By default EOS is suppressed, so that all texts have one length.

OUT/sweep.json holds all figures, OUT/sweep.png a plot (needs matplotlib).
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common

from logitproc import __version__, cli, metrics, registry
from logitproc.artifact import Artifact, check_place, write_text
from logitproc.bundled import find_model
from logitproc.prior import NGramPrior

if TYPE_CHECKING:  # torch and transformers are imported after the flags are read, so that --help is quick
    from logitproc.chain import Chain

Row = dict[str, Any]
Spec = list[dict[str, Any]]

HERE = Path(__file__).parent
SAMPLE, GREEDY, UNSTEERED = "sample", "greedy", "unsteered"
# All that is measured of a text. The first ten are means over its tokens, in nats, bits (js) or shares.
MEASURES = (
    "base_nll", "nll", "js", "kl", "reverse_kl", "tv", "agree",
    "style_nll", "style_kn_nll", "held_out_nll",
    "overlap", "bigram_seen", "rep_4", "distinct_1", "distinct_2", "distinct_3", "copied_span_bound",
)  # fmt: skip
LOSSES = {"base": "base_nll", "style": "style_nll", "style_kn": "style_kn_nll", "held_out": "held_out_nll"}

# --- cells ---


@dataclass(frozen=True)
class Cell:
    """One set of texts: `spec` is the chain (None: unsteered), `decoding` goes to `generate`, `point` says
    where on the grid it lies. Greedy decoding ignores the seed."""

    label: str
    spec: Spec | None
    decoding: dict[str, Any]
    seed: int = 0
    point: dict[str, Any] = field(default_factory=dict)


class Bench:
    """What all cells of a study share: the model, the prompts, the priors that judge, the length of a text.

    An `instruction` stands before every prompt when text is generated, and not when it is scored.

    Raises ValueError when a prior belongs to another tokenizer or the style prior holds no counts, for an
    empty or too long prompt, and for lengths that contradict each other.
    """

    def __init__(
        self, model: Any, tokenizer: Any, prompts: Sequence[str], style: NGramPrior, held_out: NGramPrior, *,
        max_new_tokens: int = 96, min_new_tokens: int | None = None, batch_size: int = 20, instruction: str = "",
    ):  # fmt: skip
        from logitproc.scoring import max_context

        self.model, self.tokenizer, self.prompts = model, tokenizer, list(prompts)
        self.style, self.held_out, self.batch_size = style, held_out, batch_size
        self.max_new_tokens = max_new_tokens
        self.min_new_tokens = max_new_tokens if min_new_tokens is None else min_new_tokens
        if not 2 <= self.min_new_tokens <= max_new_tokens:  # a text of one token has no bigram
            raise ValueError(
                f"min_new_tokens must be from 2 to max_new_tokens, {max_new_tokens}; "
                f"got {self.min_new_tokens}."
            )
        if style.counts is None:
            raise ValueError("The style prior was imported from ARPA; its score P_mix needs one with counts.")
        for prior in (style, held_out):
            prior.check_tokenizer(tokenizer)
        self.instruction = instruction
        self.encoded: list[list[int]] = [tokenizer(text)["input_ids"] for text in self.prompts]
        self.asked: list[list[int]] = [tokenizer(instruction + text)["input_ids"] for text in self.prompts]
        room = (max_context(model) or math.inf) - max_new_tokens
        for text, ids in zip(self.prompts, self.asked, strict=True):
            if not 1 <= len(ids) <= room:
                raise ValueError(
                    f"The prompt {text[:40]!r} has {len(ids)} tokens; beside {max_new_tokens} new ones the "
                    f"model reads 1 to {room}."
                )

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """All that determines a cell beside the cell itself."""
        import torch
        import transformers

        weights = [
            (name, list(w.shape), torch.hash_tensor(w).view(torch.int64).item())
            for name, w in self.model.named_parameters()
        ]
        return {
            "logitproc": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": self.model.device.type,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "model": _digest([self.model.config.to_dict(), weights]),
            "style": _fingerprint(self.style),
            "held_out": _fingerprint(self.held_out),
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": self.min_new_tokens,
            "batch_size": self.batch_size,  # the prompts of a batch draw from one stream of random numbers
            "prompts": self.prompts,
            "instruction": self.instruction,
        }


def build_chain(spec: Spec | None) -> "Chain":
    """The chain of a spec. An artifact is read once in a process, however many cells name its folder."""
    return _chain(json.dumps(spec or []))


@functools.lru_cache(maxsize=4)  # the cells of one spec, which differ in decoding and seed, share its tables
def _chain(spec: str) -> "Chain":
    from logitproc.chain import Chain

    items = []
    for item in json.loads(spec):
        kinds = registry.get(item["name"]).artifacts
        items.append({
            key: _artifact(kinds[key], value) if key in kinds and isinstance(value, str) else value
            for key, value in item.items()
        })  # fmt: skip
    return Chain.from_spec(items)


def run_cell(bench: Bench, cell: Cell, out: str | Path) -> list[Row]:
    """The rows of a cell, one for each prompt: read from OUT/cells if it was done before, else made.

    A row holds the cell, the prompt and its number (`line`, from 1), the text, its ids and MEASURES; a
    figure that is not finite is null. The file of a cell is named by all that determines it, so a changed
    model, prior or setting is never mistaken for a finished cell.
    """
    chain = build_chain(cell.spec)
    fitted = [getattr(p, key) for p in chain.processors for key in p.artifacts]
    identity = [asdict(cell), [a and _fingerprint(a) for a in fitted], bench.settings]
    slug = re.sub(r"[^\w.+-]+", "-", f"{cell.label} {_decoding(cell.decoding)} seed{cell.seed}")[:80]
    file = Path(out) / "cells" / f"{slug}-{_digest(identity)}.jsonl"
    if not file.exists():
        rows = _score(bench, cell, chain, _generate(bench, cell, chain))
        write_text(file, "".join(json.dumps(common._finite(row), ensure_ascii=False) + "\n" for row in rows))
    return _read(file)


def load_rows(out: str | Path) -> list[Row]:
    """The rows of all cells that were ever finished in OUT, whatever command made them."""
    return [row for file in sorted((Path(out) / "cells").glob("*.jsonl")) for row in _read(file)]


def _generate(bench: Bench, cell: Cell, chain: "Chain") -> list[list[int]]:
    """The generated ids of each prompt, without EOS and what follows it."""
    import numpy as np
    import torch

    from logitproc.generation import generate, seed_everything

    config = bench.model.generation_config
    pad = next(i for i in (config.pad_token_id, bench.tokenizer.pad_token_id, 0) if isinstance(i, int))
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    # The model's own habits (top_k = 50, a repetition penalty) would be part of "unsteered".
    settings = {"num_beams": 1, "repetition_penalty": 1.0, **cell.decoding}
    if settings["do_sample"]:
        settings["top_k"] = 0
    texts = []
    for start in range(0, len(bench.asked), bench.batch_size):
        batch = bench.asked[start : start + bench.batch_size]
        width = max(map(len, batch))
        # A batch's random numbers depend on the seed and its place only: cells run in any order, and the
        # same draws serve every cell, which makes their differences less noisy.
        seed_everything(int(np.random.SeedSequence([cell.seed, start]).generate_state(1)[0]))
        tensor = functools.partial(torch.tensor, device=bench.model.device)
        output = generate(
            bench.model, chain, tokenizer=bench.tokenizer, **settings, pad_token_id=pad,
            input_ids=tensor([[pad] * (width - len(ids)) + ids for ids in batch]),
            attention_mask=tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch]),
            max_new_tokens=bench.max_new_tokens, min_new_tokens=bench.min_new_tokens,
        )  # fmt: skip
        rows = output[:, width:].tolist()
        texts += [list(itertools.takewhile(lambda i: i not in ends, row)) for row in rows]
    return texts


def _score(bench: Bench, cell: Cell, chain: "Chain", texts: list[list[int]]) -> Iterable[Row]:
    from logitproc.generation import decode
    from logitproc.scoring import score_continuations

    style, judge = bench.style, bench.held_out
    scores = score_continuations(bench.model, chain, bench.encoded, texts, batch_size=bench.batch_size)
    for line, (prompt, before, ids, figures) in enumerate(
        zip(bench.prompts, bench.encoded, texts, scores, strict=True), 1
    ):
        figures = figures | {
            "style_nll": -style.log_mixture(ids, before).mean(),
            "style_kn_nll": -style.log_prob(ids, before).mean(),
            "held_out_nll": -judge.log_prob(ids, before).mean(),
            "overlap": metrics.unigram_overlap(ids, style),
            "bigram_seen": metrics.bigram_seen(ids, style),
            "rep_4": metrics.rep_n(ids, 4),
            **{f"distinct_{n}": metrics.distinct_n([ids], n) for n in (1, 2, 3)},
            "copied_span_bound": metrics.longest_copied_span_bound(ids, style),
        }
        text = decode(bench.tokenizer, before, ids)
        yield {**asdict(cell), "line": line, "prompt": prompt, "text": text, "ids": ids,
               "tokens": len(ids), **{name: float(figures[name]) for name in MEASURES}}  # fmt: skip


# --- summary ---


def summarise(rows: Sequence[Row], half: str = "all") -> list[dict[str, Any]]:
    """One dict for each label, chain and decoding, in the order of the rows, seeds put together.

    `mean` holds {mean, low, high} of each measure, `difference` the same of the difference to unsteered
    text of the same decoding (absent from the rows: None), `perplexity` the aggregates of LOSSES over all
    texts. `half` takes the prompts on odd ("choose") or even ("report") lines, or "all".
    """
    kept = {"all": (0, 1), "choose": (1,), "report": (0,)}[half]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["line"] % 2 in kept:
            groups.setdefault(_group(row), []).append(row)
    if not groups:
        raise ValueError(f"There is nothing to summarise: {len(rows)} rows were given, half is {half!r}.")
    summaries = []
    for group in groups.values():
        first = group[0]
        plain = groups.get(_group({**first, "label": UNSTEERED, "spec": None}))
        pairs = {name: (_by_prompt(group, name), _by_prompt(plain or [], name)) for name in MEASURES}
        aggregates = {
            key: metrics.aggregate(_column(group, name), [row["tokens"] for row in group])
            for key, name in LOSSES.items()
        }
        summaries.append({
            **{key: first[key] for key in ("label", "spec", "point", "decoding")},
            "seeds": sorted({row["seed"] for row in group}),
            "prompts": len({row["line"] for row in group}),
            "tokens": sum(row["tokens"] for row in group),
            "mean": {name: metrics.bootstrap(ours)._asdict() for name, (ours, _) in pairs.items()},
            "difference": plain and {
                name: metrics.paired_bootstrap(*pair)._asdict() for name, pair in pairs.items()
            },
            "perplexity": aggregates,
        })  # fmt: skip
    return summaries


def _group(row: Row) -> str:
    return json.dumps([row["label"], row["spec"], row["decoding"]], sort_keys=True)


def _column(rows: Sequence[Row], name: str) -> list[float]:
    return [math.nan if row[name] is None else row[name] for row in rows]


def _by_prompt(rows: Sequence[Row], name: str) -> list[float]:
    """The mean over the seeds of each prompt, prompts in order."""
    values: dict[int, list[float]] = {}
    for row, value in zip(rows, _column(rows, name), strict=True):
        values.setdefault(row["line"], []).append(value)
    return [sum(values[line]) / len(values[line]) for line in sorted(values)]


def table(summaries: Sequence[dict[str, Any]]) -> str:
    """One line a cell: means with half the width of their interval, differences with their interval."""
    columns = {"base_nll": "base nats", "held_out_nll": "held-out nats", "style_nll": "style nats",
               "js": "JS bits", "overlap": "overlap", "bigram_seen": "bigram seen", "rep_4": "rep-4",
               "distinct_2": "distinct-2"}  # fmt: skip
    compared = ("base_nll", "held_out_nll", "rep_4")

    def spread(x: dict[str, float]) -> str:
        return f"{x['mean']:.3f} ±{(x['high'] - x['low']) / 2:.3f}"

    def change(summary: dict[str, Any], name: str) -> str:
        x = summary["difference"] and summary["difference"][name]
        return f"{x['mean']:+.3f} [{x['low']:+.3f}, {x['high']:+.3f}]" if x and summary["spec"] else "-"

    body = (
        [s["label"], _decoding(s["decoding"]), *(spread(s["mean"][name]) for name in columns),
         *(change(s, name) for name in compared)]
        for s in summaries
    )  # fmt: skip
    head = ["", "decoding", *columns.values(), *(f"Δ {columns[name]}" for name in compared)]
    return common.rows(head, body)


def _decoding(decoding: dict[str, Any]) -> str:
    if not decoding["do_sample"]:
        return GREEDY
    return f"T={decoding['temperature']:g} p={decoding['top_p']:g}"


# --- plot ---


def plot(summaries: Sequence[dict[str, Any]], path: Path) -> None:
    """Left: base against held-out style nats, a line for each combination of all grid keys but the first.
    Right: JS and rep-4 against the first key. Intervals are drawn thin or as bands. Raises ImportError
    with one sentence without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            f'{path} was not drawn, as matplotlib is missing: pip install "logitproc[plot]".'
        ) from None

    cells = [s for s in summaries if s["point"]]
    plain = [s for s in summaries if s["spec"] is None]
    several = len({_decoding(s["decoding"]) for s in cells}) > 1
    key = next(iter(cells[0]["point"]))
    values = _distinct([s["point"][key] for s in cells])
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    position = lambda s: s["point"][key] if numeric else values.index(s["point"][key])
    series: dict[str, list[dict[str, Any]]] = {}
    for s in sorted(cells, key=position):
        series.setdefault(_series(s, several), []).append(s)
    at = lambda line, name, end="mean": [s["mean"][name][end] for s in line]
    used = [s["decoding"] for s in cells]

    figure = Figure(figsize=(12, 6), dpi=150, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.3, 1))
    plane, (js, rep) = left.subplots(), right.subplots(2, 1, sharex=True)
    notes = []

    def draw(line: list[dict[str, Any]], texts: Iterable[str], color: str, label: str, **style: Any) -> None:
        x, y = at(line, "base_nll"), at(line, "held_out_nll")
        plane.plot(x, y, color=color, label=label, marker="o", ms=4, **style)
        plane.hlines(y, at(line, "base_nll", "low"), at(line, "base_nll", "high"), color, lw=0.8, alpha=0.35)
        plane.vlines(x, at(line, "held_out_nll", "low"), at(line, "held_out_nll", "high"), color, lw=0.8,
                     alpha=0.35)  # fmt: skip
        notes.extend((*point, color) for point in zip(x, y, texts, strict=True))

    control = sorted(
        (s for s in plain if s["decoding"]["do_sample"]), key=lambda s: s["decoding"]["temperature"]
    )
    if len(control) > 1:
        texts = ["" if s["decoding"] in used else f"T={s['decoding']['temperature']:g}" for s in control]
        draw(control, texts, "0.5", "unsteered, other temperatures", lw=2.5)
    for number, (name, line) in enumerate(series.items()):
        color = COLORS[number % len(COLORS)]
        texts = [f"{s['point'][key]:g}" if numeric else str(s["point"][key]) for s in line]
        draw(line, texts, color, name, lw=1.6)
        x = list(map(position, line))
        for axis, measure in ((js, "js"), (rep, "rep_4")):
            axis.plot(x, at(line, measure), color=color, marker="o", ms=4)
            axis.fill_between(x, at(line, measure, "low"), at(line, measure, "high"), color=color, alpha=0.12,
                              lw=0)  # fmt: skip
    for s in (s for s in plain if s["decoding"] in used):
        marker, dashes = ("*", ":") if s["decoding"]["do_sample"] else ("P", "--")
        label = f"unsteered, {_decoding(s['decoding'])}"
        plane.plot(*at([s], "base_nll"), *at([s], "held_out_nll"), marker, ms=14, mec="white", color="black",
                   zorder=5, label=label)  # fmt: skip
        rep.axhline(*at([s], "rep_4"), ls=dashes, lw=1, color="black", label=label)
    plane.set(xlabel="base loss (nats per token): less is likelier to the model",
              ylabel="held-out style loss (nats per token): less is closer")  # fmt: skip
    js.set(ylabel="Jensen-Shannon (bits)", ylim=(0, None))
    rep.set(ylabel="rep-4 (share repeated)", xlabel=key, ylim=(0, None))
    if not numeric:
        rep.set_xticks(range(len(values)), [str(v) for v in values])
    plane.margins(0.06)
    plane.legend(fontsize=9)
    rep.legend(fontsize=9)
    for axis in (plane, js, rep):
        axis.grid(alpha=0.25)
    figure.draw_without_rendering()  # pixels are known from here on
    annotate(plane, notes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#8C564B")


def _series(summary: dict[str, Any], with_decoding: bool) -> str:
    parts = [f"{key}={value}" for key, value in list(summary["point"].items())[1:]] or ["steered"]
    return ", ".join([*parts, *([_decoding(summary["decoding"])] if with_decoding else [])])


def annotate(axis: Any, notes: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each (x, y, text, color) beside its point, unless another note is there already."""
    from matplotlib.patheffects import withStroke

    taken: list[Any] = []
    for x, y, text, color in notes:
        place = axis.transData.transform((x, y))
        if all(abs(place[0] - u) > 45 or abs(place[1] - v) > 22 for u, v in taken):
            axis.annotate(text, (x, y), (5, 4), textcoords="offset points", fontsize=9, color=color, zorder=6,
                          path_effects=[withStroke(linewidth=2.5, foreground="white")])  # fmt: skip
            taken.append(place)


# --- the command ---


def grid_cells(
    specs: Spec, grids: Sequence[str], decodings: Sequence[dict[str, Any]], seeds: Sequence[int]
) -> list[Cell]:
    """The cells of a command: unsteered text first, then every point of the grid, for each decoding.

    specs: the parsed --proc flags; grids: `[NAME.]key=values`, key of the last processor unless NAME says
    which. Raises ValueError for values that cannot be read, LookupError for an unknown NAME.
    """
    axes: dict[str, list[Any]] = {}
    for text in grids:
        key, _, values = text.partition("=")
        if key.strip() in axes:
            raise ValueError(f"--grid {key.strip()} is given twice; put all its values into one.")
        axes[key.strip()] = grid_values(text)
    # The first key runs fastest, so that the lines of a table follow the lines of the plot.
    backwards = itertools.product(*reversed(axes.values()))
    points = [dict(zip(axes, reversed(values), strict=True)) for values in backwards]
    steered = [(" ".join(f"{k}={v}" for k, v in p.items()), _with(specs, p), p) for p in points]
    return [
        Cell(label, spec, decoding, seed, point)
        for label, spec, point in [(UNSTEERED, None, {}), *steered]
        for decoding in decodings
        for seed in (seeds if decoding["do_sample"] else (0,))
    ]


def grid_values(text: str) -> list[Any]:
    """`key=a:b:step`, both ends included, or `key=` and YAML scalars or flow lists between commas."""
    from logitproc.chain import parse_processor

    key, _, values = (part.strip() for part in text.partition("="))
    try:
        if not re.fullmatch(r"[\d.eE+-]*:[\d.eE+:-]*", values):  # YAML would read 1:5 as 65
            return _distinct(parse_processor(f"grid:{key}=[{values}]")[key])
        first, last, step = map(float, values.split(":"))
        if not (step > 0 and 0 <= last - first < 10_000 * step):
            raise ValueError("not a range")
    except (ValueError, KeyError):
        raise ValueError(f"{text!r} is neither key=first:last:step nor key=value,value,...") from None
    numbers = [round(first + i * step, 10) for i in range(int((last - first) / step + 1e-6) + 1)]
    whole = not re.search(r"[.eE]", values)
    return [int(x) for x in numbers] if whole else numbers


def _distinct(values: list[Any]) -> list[Any]:
    if not values:
        raise ValueError("no values")
    return [v for i, v in enumerate(values) if v not in values[:i]]


def _with(specs: Spec, point: dict[str, Any]) -> Spec:
    """The processors with the parameters of a grid point."""
    specs = [dict(item) for item in specs]
    for key, value in point.items():
        name, dot, parameter = key.rpartition(".")
        named = [item for item in specs if item["name"] == name or not dot]
        if not named:
            raise registry.unknown("processor of --grid", name, {item["name"] for item in specs})
        named[-1][parameter] = value
    return specs


def main(argv: list[str] | None = None) -> int:
    """Run the command; exit status 0 done, 2 wrong usage or interrupted, 1 failed."""
    args = _parser().parse_args(argv)
    try:
        _sweep(args)
    except (Exception, KeyboardInterrupt) as error:
        if args.debug:
            raise
        sentence, status = cli.explain(error)
        if isinstance(error, KeyboardInterrupt):
            sentence = "Interrupted; the same command resumes after the cells that are done."
        print(f"sweep: {sentence}", file=sys.stderr)
        return status
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    # fmt: off
    add("--model", default="base", help="folder, hub id or bundled name (default: base)")
    add("--proc", action="append", required=True, metavar="NAME:key=value,...",
        help="a processor; may be repeated, the order is the order of application")
    add("--grid", action="append", required=True, metavar="[NAME.]KEY=VALUES",
        help="first:last:step, ends included, or values between commas; of the last --proc\n"
        "unless NAME says which; may be repeated for all combinations")
    add("--control", metavar="temperature=VALUES", help="unsteered text at these temperatures too")
    add("--held-out", required=True, metavar="DIR", help="prior of style text that steers nothing")
    add("--style", metavar="DIR", help="prior of the style corpus (default: the chain's first)")
    add("--out", required=True, metavar="DIR", help="where cells, figures and plot go")
    add("--prompts", default=str(HERE / "prompts.txt"), metavar="FILE",
        help="one a line (default: prompts.txt beside this script)")
    add("--half", choices=["all", "choose", "report"], default="all",
        help="summarise prompts on all, odd or even lines (default: all)")
    add("--decoding", choices=[SAMPLE, GREEDY, "both"], default=SAMPLE, help="default: sample")
    add("--seeds", type=_seeds, default="0,1,2", help="of sampling, between commas (default: 0,1,2)")
    add("--temperature", type=_positive_number, default=1.0, help="of sampling (default: 1.0)")
    add("--top-p", type=_positive_number, default=0.9, help="of sampling (default: 0.9)")
    add("--max-new-tokens", type=common.positive, default=96, metavar="N", help="(default: 96)")
    add("--min-new-tokens", type=common.positive, metavar="N", help="(default: the maximum)")
    add("--batch-size", type=common.positive, default=20, metavar="N",
        help="prompts at once (default: 20); sampled text changes with it")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add("--debug", action="store_true", help="show tracebacks")
    # fmt: on
    return parser


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"must be whole numbers between commas, got {text!r}")
    return list(dict.fromkeys(map(int, parts)))


def _positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return number


def _sweep(args: argparse.Namespace) -> None:
    from tqdm import tqdm
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from logitproc.chain import parse_processor

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
    decodings = {SAMPLE: [sampling], GREEDY: [{"do_sample": False}]}
    decodings["both"] = decodings[SAMPLE] + decodings[GREEDY]
    procs = [parse_processor(text) for text in args.proc]
    cells = grid_cells(procs, args.grid, decodings[args.decoding], args.seeds)
    controls = [
        Cell(UNSTEERED, None, {**sampling, "temperature": temperature}, seed)
        for temperature in _temperatures(args.control)
        for seed in args.seeds
    ]
    cells += [cell for cell in controls if cell not in cells]
    cells.sort(key=lambda cell: cell.spec is not None)

    # Everything that can be wrong is found before the first text.
    check_place(Path(args.out) / "cells")
    prompts = cli.read_prompts([], args.prompts)
    chains = [build_chain(cell.spec) for cell in cells]
    style = _artifact(NGramPrior, args.style) if args.style else _first_prior(chains)
    held_out = _artifact(NGramPrior, args.held_out)
    source, device = find_model(args.model), cli.choose_device(args.device)
    tokenizer = AutoTokenizer.from_pretrained(source)
    for chain in chains:
        chain.check(tokenizer=tokenizer)
    bench = Bench(
        cli.load_model(source, args.dtype, device, None), tokenizer, prompts, style, held_out,
        max_new_tokens=args.max_new_tokens, min_new_tokens=args.min_new_tokens, batch_size=args.batch_size,
    )  # fmt: skip

    rows = []
    for cell in tqdm(cells, desc="sweeping", unit=" cells", disable=not sys.stderr.isatty()):
        rows += run_cell(bench, cell, args.out)
    summaries = summarise(rows, args.half)
    flags = {key: value for key, value in vars(args).items() if key != "debug"}
    result = {"report": "sweep", "logitproc": __version__, "flags": flags, "settings": bench.settings,
              "cells": [common._finite(summary) for summary in summaries]}  # fmt: skip
    write_text(Path(args.out) / "sweep.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(table(summaries))
    try:
        plot(summaries, Path(args.out) / "sweep.png")
    except ImportError as error:
        print(f"sweep: {error}", file=sys.stderr)


def _temperatures(control: str | None) -> list[float]:
    if control is None:
        return []
    key, _, _ = control.partition("=")
    values = grid_values(control) if key.strip() == "temperature" else [None]
    if not all(isinstance(v, int | float) and 0 < v < math.inf for v in values):
        raise ValueError(f"--control must be temperature=VALUES, all above 0, got {control!r}.")
    return [float(v) for v in values]


def _first_prior(chains: "Sequence[Chain]") -> NGramPrior:
    fitted = (getattr(p, "prior", None) for chain in chains for p in chain.processors)
    for prior in fitted:
        if isinstance(prior, NGramPrior):
            return prior
    raise ValueError("No processor holds a prior to score style with; give one with --style DIR.")


@functools.cache
def _artifact(kind: type[Artifact], folder: str) -> Any:
    return kind.load(folder)


@functools.cache
def _fingerprint(artifact: Artifact) -> str:
    return artifact.fingerprint()[:12]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main())

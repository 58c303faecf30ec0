"""The study of `ngram`: three styles, every rule, the paper's grid of strengths, controls, intervals.

    python examples/train_pocket.py styles --data DATA --out runs/pocket
    python eval/study.py choose --styles runs/pocket/styles --out runs/study
    python eval/study.py strength --styles runs/pocket/styles --out runs/study
    python eval/study.py price --styles runs/pocket/styles --out runs/study --model MODEL base
    python eval/study.py report --styles runs/pocket/styles --out runs/study

`choose` generates at a few strengths for every arm and one seed from the prompts on odd lines, and ranks the
arms by the rule below. `strength` looks closer at the chosen arm and other masks: the same prompts, three seeds.
`price` holds schedules that bound what a step costs against that arm, on several models.
`report` takes the prompts on even lines and three seeds: the whole grid, sampled and greedy, for the printed rule
and the default, a few strengths for their rivals. All resume. `--model` takes any causal LM.

Fixed before the first run (specification of the method, section 6). A setting is admissible on a corpus if,
against unsteered text of the same prompts and seeds, sampled at temperature 1 and top-p .9,
  - held-out style nats are lower (upper end of the 95 % interval of the difference below 0),
  - base nats are higher by at most BASE_MARGIN,
  - rep-4 is higher by at most REP_MARGIN (upper end of the interval),
  - it lies below the curve (base nats, held-out nats) of unsteered text at temperatures .7 to 1 (upper end).
A setting collapses if geometric base perplexity is above 3 times that of unsteered sampled text, rep-4 is
more than .10 above unsteered, or held-out style nats are above unsteered (lower end of the interval).
The default is the arm that is admissible on most corpora at one strength and collapses nowhere on [0, 1],
and of those the one with the largest mean gain in held-out style.

The default strength, a rule written on 2026-11-25, before `strength` first ran: the largest of FINE at which
the chosen arm, on the choosing half with three seeds, is admissible on all corpora and the upper end of the
interval of the base difference, not just its mean, is within BASE_MARGIN; if there is none, the largest that is
admissible on all corpora. The reason: by means of one seed, strength 1 passed the choosing half and then missed
the margin on one corpus of the reporting half (2026-11-23).

Another mask, a rule written on 2026-11-25, before `strength` first ran on MASKS: of those arms and FINE, on the
choosing half with three seeds, the setting of largest mean held-out gain that is safe (admissible, and the upper
end of the interval of the base difference within BASE_MARGIN) on all corpora, of an arm that collapses nowhere.
It replaces the default if it gains at least GAIN_KEPT of what the default does there, and if on the reporting half,
looked at once, it is admissible on all corpora and collapses nowhere.

A default for models that are sure of themselves, too: a rule written on 2026-11-26, before `price` first ran. Of
SCHEDULES at STRENGTHS, on the choosing half with three seeds, the best is the setting of largest mean held-out gain
over all corpora of both models, `base` and a third-party one, among those that are safe on all of them, of an arm
that collapses nowhere. It replaces the default if the default is not safe on all of them, and if it gains at least
GAIN_KEPT of what the default does on `base`. A setting that is not safe on the first model is not run on the second.
Seen before that, one seed of the choosing half: `surprisal` with m of 0, .05 and .1 on the third-party model, m of 0
there with other masks and with guards of 0 and .8, and m of 0 and .05, and a guard of .8, on `base`. The same trial
made `surprisal` what it is: at first it scaled the bias down, which gained less at the same price.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from common import interval
from sweep import COLORS, Bench, Cell, annotate, run_cell

from logitproc import metrics
from logitproc.artifact import write_text
from logitproc.bundled import find_model
from logitproc.methods.ngram import OFF

CORPORA = ("quixote", "headlines", "arxiv")
TITLES = {"quixote": "Don Quixote", "headlines": "headlines", "arxiv": "arXiv", "sample": "sampled", "greedy": "greedy"}
GRID = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40, 0.50, 0.60, 0.70, 0.80, 0.90, 1.00)
COARSE = (0.1, 0.2, 0.3, 0.5, 1.0)
FINE = (0.5, 0.7, 0.9, 1.0)
FEW = (0.3, 0.7, 1.0)
GAIN_KEPT = 0.9
TEMPERATURES = (0.7, 0.8, 0.9)
SEEDS = (0, 1, 2)
SAMPLE = {"do_sample": True, "temperature": 1.0, "top_p": 0.9}
GREEDY = {"do_sample": False}
BASE_MARGIN, REP_MARGIN, COLLAPSE_FACTOR, COLLAPSE_REP = 0.10, 0.02, 3.0, 0.10

# name -> (order of the prior, parameters; options not named are off); "model" and "neutral" stand for the
# background priors.
ARMS: dict[str, tuple[int, dict[str, Any]]] = {
    "paper": (3, {"rule": "paper"}),
    "lift": (3, {"rule": "lift"}),
    "lift wb": (3, {"rule": "lift", "confidence": "wb"}),
    "backoff": (3, {"rule": "backoff"}),
    "backoff wb": (3, {"rule": "backoff", "confidence": "wb"}),
    "backoff wb guard": (3, {"rule": "backoff", "confidence": "wb", "guard": 0.8}),
    "backoff wb guard2": (3, {"rule": "backoff", "confidence": "wb", "guard": 2.0}),
    "backoff wb keep.01 guard2": (
        3,
        {"rule": "backoff", "confidence": "wb", "guard": 2.0, "plausibility": 0.01},
    ),
    "backoff wb keep.003 guard2": (
        3,
        {"rule": "backoff", "confidence": "wb", "guard": 2.0, "plausibility": 0.003},
    ),
    "backoff wb keep.02 guard2": (
        3,
        {"rule": "backoff", "confidence": "wb", "guard": 2.0, "plausibility": 0.02},
    ),
    "backoff keep.05": (3, {"rule": "backoff", "plausibility": 0.05}),
    "backoff keep.01": (3, {"rule": "backoff", "plausibility": 0.01}),
    "backoff guard": (3, {"rule": "backoff", "guard": 0.8}),
    "backoff N=5": (5, {"rule": "backoff"}),
    "ratio model": (3, {"rule": "ratio", "background": "model"}),
    "ratio neutral": (3, {"rule": "ratio", "background": "neutral"}),
    "ratio model keep.05": (3, {"rule": "ratio", "background": "model", "plausibility": 0.05}),
    "guard alone": (3, {"rule": "backoff", "strength": 0.0, "guard": 2.0}),
    "prompt only": (3, {"rule": "backoff", "strength": 0.0}),
}
# What "prompt only" puts before each prompt; it is no part of the text that is scored.
INSTRUCTIONS = {
    "quixote": "Write in the style of Miguel de Cervantes, as in Don Quixote. ",
    "headlines": "Write in the style of the headlines of a newspaper. ",
    "arxiv": "Write in the style of the abstract of a scientific article. ",
}
CONSTANT = "backoff wb keep.003 guard2"  # what the rules of 2026-11-25 chose, at strength .7
DEFAULT = "surprisal guard1.2"  # what that of 2026-11-26 chose, at strength 1
RIVALS = [CONSTANT, "backoff wb", "backoff wb guard2"]
# Schedules of that arm
SCHEDULES = {
    "entropy": {"schedule": "entropy"},
    "budget.05": {"schedule": "budget(0.05)"},
    "budget.2": {"schedule": "budget(0.2)"},
    "surprisal": {"schedule": "surprisal"},
    "surprisal.05": {"schedule": "surprisal(0.05)"},
    "surprisal.1": {"schedule": "surprisal(0.1)"},
    "surprisal guard1.2": {"schedule": "surprisal", "guard": 1.2},
}
ARMS |= {name: (3, ARMS[CONSTANT][1] | changed) for name, changed in SCHEDULES.items()}
STRENGTHS = (0.7, 1.0)
MASKS = ["backoff wb keep.01 guard2", "backoff wb guard2", "backoff wb keep.02 guard2"]
PRICE_HEADING = """# `ngram`: schedules of the default arm, the choosing half

Odd prompts, sampled, three seeds; differences to unsteered text, 95 % intervals."""
REPORT_HEADING = """# `ngram`: the reporting half, `{}`

Even prompts; sampled with three seeds, and greedy; differences to unsteered text of the same decoding, 95 % intervals.
Verdicts on greedy text hold its base nats against those of unsteered sampled text."""


class Study:
    """One model on the three corpora; priors and cells live in OUT/MODEL."""

    def __init__(self, name: str, styles: Path, out: Path, prompts: list[str]):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = find_model(name)
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        self.styles, self.out, self.prompts = styles, out / Path(name).name, prompts
        self.benches = {corpus: self._bench(corpus) for corpus in CORPORA}
        self.instructed = {corpus: self._bench(corpus, INSTRUCTIONS[corpus]) for corpus in CORPORA}

    def _bench(self, corpus: str, instruction: str = "") -> Bench:
        from logitproc import NGramPrior

        style, held_out = self.prior(corpus, "train", 3), self.prior(corpus, "held-out", 3)
        return Bench(self.model, self.tokenizer, self.prompts, NGramPrior.load(style),
                     NGramPrior.load(held_out), batch_size=len(self.prompts), instruction=instruction)  # fmt: skip

    def prior(self, corpus: str, part: str, order: int) -> str:
        """The folder of a fitted prior; "model" is fitted on the model's own samples."""
        from logitproc import NGramPrior

        folder = self.out / "priors" / f"{corpus}-{part}-{order}"
        if not folder.exists():
            text: Any = self._samples() if corpus == "model" else self.styles / corpus / f"{part}.jsonl"
            NGramPrior.fit(text, self.tokenizer, order=order, out=folder)
        return str(folder)

    def _samples(self, texts: int = 1536, length: int = 128, batch: int = 128) -> Iterable[str]:
        """Text of the model at temperature 1 from nothing but the beginning of a text, never greedy."""
        import torch

        torch.manual_seed(0)
        start = torch.full((batch, 1), self.tokenizer.bos_token_id)
        for _ in range(texts // batch):
            out = self.model.generate(start, do_sample=True, top_k=0, max_new_tokens=length,
                                      pad_token_id=self.tokenizer.eos_token_id)  # fmt: skip
            yield from self.tokenizer.batch_decode(out, skip_special_tokens=True)

    def cell(self, corpus: str, arm: str, strength: float, decoding: dict, seed: int) -> list[dict]:
        """The rows of one cell; the arms "unsteered" and "prompt only" have no chain."""
        bench = self.instructed[corpus] if arm == "prompt only" else self.benches[corpus]
        if arm in ("unsteered", "prompt only"):
            cell = Cell(arm, None, decoding, seed)
        else:
            order, parameters = ARMS[arm]
            spec = {"name": "ngram", "prior": self.prior(corpus, "train", order), "strength": strength}
            spec |= OFF | parameters
            if "background" in spec:
                spec["background"] = self.prior(spec["background"], "train", order)
            cell = Cell(f"{corpus} {arm} {strength:g}", [spec], decoding, seed)
        return run_cell(bench, cell, self.out / corpus)

    def table(self, corpus: str, arm: str, strength: float, decoding: dict, seeds: Iterable[int]) -> "Cells":
        rows = [row for seed in seeds for row in self.cell(corpus, arm, strength, decoding, seed)]
        return Cells(rows)


class Cells:
    """Rows of one setting; figures per prompt, seeds averaged inside a prompt."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def per_prompt(self, measure: str) -> np.ndarray:
        values: dict[int, list[float]] = {}
        for row in self.rows:
            values.setdefault(row["line"], []).append(row[measure])
        return np.array([np.mean(values[line]) for line in sorted(values)])


def judge(setting: Cells, plain: Cells, controls: list[Cells], fluent: Cells | None = None) -> dict[str, Any]:
    """Differences to unsteered text, distance to the temperature curve, and the verdicts of the rule above.

    `fluent` is the text whose base nats bound those of the setting, `plain` if left out.
    """
    names = ("base_nll", "held_out_nll", "style_nll", "style_kn_nll", "rep_4", "js", "overlap",
             "bigram_seen", "distinct_2")  # fmt: skip
    mean = {n: metrics.bootstrap(setting.per_prompt(n))._asdict() for n in names}
    difference = {
        n: metrics.paired_bootstrap(setting.per_prompt(n), plain.per_prompt(n))._asdict() for n in names
    }
    above = curve_distance(setting, [plain, *controls])
    perplexity = math.exp(mean["base_nll"]["mean"])
    fluent_nll = float((fluent or plain).per_prompt("base_nll").mean())
    return {
        "mean": mean, "difference": difference, "above_control_curve": above,
        "admissible": difference["held_out_nll"]["high"] < 0
        and mean["base_nll"]["mean"] <= fluent_nll + BASE_MARGIN
        and difference["rep_4"]["high"] <= REP_MARGIN
        and above["high"] < 0,
        "collapse": perplexity > COLLAPSE_FACTOR * math.exp(fluent_nll)
        or difference["rep_4"]["mean"] > COLLAPSE_REP
        or difference["held_out_nll"]["low"] > 0,
    }  # fmt: skip


def curve_distance(setting: Cells, controls: list[Cells], draws: int = 2000) -> dict[str, float]:
    """Held-out nats above the controls' curve at the same base nats: mean and 95 % interval over prompts.

    The curve joins the temperatures; outside its ends it goes on flat, which favours the control where
    the setting has more base nats than it.
    """
    base = np.stack([c.per_prompt("base_nll") for c in [setting, *controls]])
    held_out = np.stack([c.per_prompt("held_out_nll") for c in [setting, *controls]])
    rng, prompts = np.random.default_rng(0), base.shape[1]

    def distance(chosen: np.ndarray) -> float:
        x, y = base[:, chosen].mean(1), held_out[:, chosen].mean(1)
        order = np.argsort(x[1:])
        return float(y[0] - np.interp(x[0], x[1:][order], y[1:][order]))

    samples = [distance(rng.integers(0, prompts, prompts)) for _ in range(draws)]
    low, high = np.percentile(samples, [2.5, 97.5])
    return {"mean": distance(np.arange(prompts)), "low": float(low), "high": float(high)}


def run(study: Study, grids: dict[str, tuple[float, ...]], seeds: tuple[int, ...]) -> dict:
    """Judgements of every arm at its strengths on every corpus: {corpus: {arm: {strength: judgement}}}."""
    result: dict[str, dict] = {}
    for corpus in CORPORA:
        plain = study.table(corpus, "unsteered", 0.0, SAMPLE, seeds)
        controls = [
            study.table(corpus, "unsteered", 0.0, SAMPLE | {"temperature": t}, seeds) for t in TEMPERATURES
        ]
        result[corpus] = {"unsteered": {"1": judge(plain, plain, controls)}}
        for t, control in zip(TEMPERATURES, controls, strict=True):
            result[corpus]["unsteered"][f"{t:g}"] = judge(control, plain, controls)
        for arm, grid in grids.items():
            result[corpus][arm] = {}
            for strength in (0.0,) if "strength" in ARMS[arm][1] else grid:
                cells = study.table(corpus, arm, strength, SAMPLE, seeds)
                result[corpus][arm][f"{strength:g}"] = judge(cells, plain, controls)
            print(line(corpus, arm, result[corpus][arm]), file=sys.stderr, flush=True)
    return result


def run_greedy(study: Study, arms: list[str], grid: Iterable[float]) -> dict:
    """The same without sampling; base nats are compared with unsteered *sampled* text, see section 6."""
    result: dict[str, dict] = {}
    for corpus in CORPORA:
        plain = study.table(corpus, "unsteered", 0.0, GREEDY, (0,))
        sampled = study.table(corpus, "unsteered", 0.0, SAMPLE, SEEDS)
        result[corpus] = {"unsteered": {"0": judge(plain, plain, [sampled], sampled)}}
        for arm in arms:
            result[corpus][arm] = {
                f"{s:g}": judge(study.table(corpus, arm, s, GREEDY, (0,)), plain, [sampled], sampled) for s in grid
            }
            print(line(corpus, arm, result[corpus][arm]), file=sys.stderr, flush=True)
    return result


def line(corpus: str, arm: str, by_strength: dict[str, dict]) -> str:
    cells = (
        f"{s}: {j['mean']['base_nll']['mean']:.2f}/{j['mean']['held_out_nll']['mean']:.2f}"
        f"{'*' if j['admissible'] else ''}{'!' if j['collapse'] else ''}"
        for s, j in by_strength.items()
    )
    return f"{corpus:9} {arm:22} base/held-out nats  {'  '.join(cells)}"


def ranking(result: dict) -> list[tuple[str, str, int, int, float]]:
    """(arm, strength, corpora where admissible, collapses of the arm, mean held-out gain), best first."""
    rows = []
    for arm in next(iter(result.values())):
        if arm == "unsteered":
            continue
        collapses = sum(j["collapse"] for c in CORPORA for j in result[c][arm].values())
        for strength in result[CORPORA[0]][arm]:
            cells = [result[c][arm][strength] for c in CORPORA]
            gain = -float(np.mean([j["difference"]["held_out_nll"]["mean"] for j in cells]))
            rows.append((arm, strength, sum(j["admissible"] for j in cells), collapses, gain))
    return sorted(rows, key=lambda r: (r[3] == 0, r[2], r[4]), reverse=True)


def safe(judgement: dict[str, Any]) -> bool:
    """Admissible, and surely within the margin of base nats rather than by its mean."""
    return judgement["admissible"] and judgement["difference"]["base_nll"]["high"] <= BASE_MARGIN


def safe_settings(result: dict) -> list[tuple[str, str, float]]:
    """(arm, strength, mean held-out gain) of what is safe on all corpora, of arms that collapse nowhere; best first."""
    return [
        (arm, strength, gain) for arm, strength, _, collapses, gain in ranking(result)
        if not collapses and all(safe(result[c][arm][strength]) for c in CORPORA)
    ]  # fmt: skip


def priced(studies: dict[str, Study]) -> dict[str, dict]:
    """{model: judgements} of CONSTANT and SCHEDULES at STRENGTHS; on later models only of what is safe so far."""
    grids, judged = dict.fromkeys([CONSTANT, *SCHEDULES], STRENGTHS), {}
    for model, study in studies.items():
        judged[model] = run(study, grids, SEEDS)
        passed = {(arm, float(strength)) for arm, strength, _ in safe_settings(judged[model])}
        kept = {arm: tuple(s for s in grid if arm == CONSTANT or (arm, s) in passed) for arm, grid in grids.items()}
        grids = {arm: grid for arm, grid in kept.items() if grid}
    return judged


def best_everywhere(judged: dict[str, dict]) -> list[tuple[str, str, float]]:
    """(arm, strength, mean held-out gain over models) of what is safe on every model, best first."""
    gains = [{(arm, strength): gain for arm, strength, gain in safe_settings(result)} for result in judged.values()]
    common = set.intersection(*map(set, gains))
    return sorted(((*key, float(np.mean([g[key] for g in gains]))) for key in common), key=lambda x: -x[2])


def default_strength(by_corpus: dict[str, dict[str, dict]]) -> str | None:
    """The strength that the second rule above chooses from {corpus: {strength: judgement}}; None if no one is."""
    strengths = sorted(next(iter(by_corpus.values())), key=float)
    admissible = [s for s in strengths if all(cells[s]["admissible"] for cells in by_corpus.values())]
    surely = [s for s in admissible if all(safe(cells[s]) for cells in by_corpus.values())]
    return (surely or admissible or [None])[-1]


def markdown(result: dict) -> str:
    """One table a corpus: base and held-out nats, their differences, rep-4, overlap, bigram seen, JS."""
    shown = lambda x, digits=2: interval((x["mean"], x["low"], x["high"]), digits)
    out = []
    for corpus in result:
        out += [f"\n**{TITLES[corpus]}**\n", "| arm | strength | base nats | held-out nats | Δ base | Δ held-out | "
                "above control curve | Δ rep-4 | JS bits | overlap | bigram seen | |", "|---" * 12 + "|"]  # fmt: skip
        for arm, cells in result[corpus].items():
            for strength, j in cells.items():
                m, d, a = j["mean"], j["difference"], j["above_control_curve"]
                mark = "collapse" if j["collapse"] else "admissible" if j["admissible"] else ""
                label = f"T = {strength}" if arm == "unsteered" else strength
                out.append(
                    f"| {arm} | {label} | {m['base_nll']['mean']:.2f} | {m['held_out_nll']['mean']:.2f} "
                    f"| {shown(d['base_nll'])} | {shown(d['held_out_nll'])} | {shown(a)} "
                    f"| {shown(d['rep_4'], 3)} | {m['js']['mean']:.4f} | {m['overlap']['mean']:.3f} "
                    f"| {m['bigram_seen']['mean']:.3f} | {mark} |"
                )
    return "\n".join(out)


def plot(document: dict[str, dict], path: Path) -> None:
    """Base against held-out style nats: a row of panels for each way of decoding, a line for each arm, the default
    in black, unsteered text in grey. Full circles are admissible, crosses collapse."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5.2 * len(document) + 0.8), dpi=120, layout="constrained")
    panels = figure.subplots(len(document), len(CORPORA), squeeze=False)
    arms = list(dict.fromkeys(arm for result in document.values() for arm in result[CORPORA[0]]))
    notes = []
    for axes, (part, result) in zip(panels, document.items(), strict=True):
        axes[0].set_ylabel("held-out style loss (nats per token): less is closer")
        for axis, corpus in zip(axes, CORPORA, strict=True):
            lines = ((arms.index(arm), (arm, cells)) for arm, cells in result[corpus].items())
            notes.append((axis, [note for line in lines for note in draw(axis, *line)]))
            title = f"{TITLES[corpus]}, {TITLES.get(part, part)}"
            axis.set(title=title, xlabel="base loss (nats per token): less is likelier")
            axis.grid(alpha=0.25)
            axis.margins(0.12, 0.08)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6,
                  title="full circles: admissible, empty: not, crosses: collapse")  # fmt: skip
    figure.draw_without_rendering()  # pixels are known from here on
    for axis, texts in notes:
        annotate(axis, texts)
    figure.savefig(path)


def draw(axis: Any, number: int, named: tuple[str, dict[str, dict]]) -> list[tuple[float, float, str, str]]:
    """The line of an arm, its number and {strength: judgement} given: what is to be written beside its points."""
    arm, cells = named
    x, y = ([j["mean"][name]["mean"] for j in cells.values()] for name in ("base_nll", "held_out_nll"))
    if arm == "unsteered":
        order = np.argsort(x)
        axis.plot(np.array(x)[order], np.array(y)[order], "*-", color="0.5", ms=9, label="unsteered, T = .7 to 1")
        return [(*point, f"T={t}", "0.5") for *point, t in zip(x, y, cells, strict=True)]
    color = "black" if arm == DEFAULT else COLORS[number % len(COLORS)]
    width, dashes = 2.5 if arm == DEFAULT else 1.3, "--" if number > len(COLORS) else "-"
    axis.plot(x, y, dashes, color=color, lw=width, label=arm + " (default)" * (arm == DEFAULT))
    for a, b, j in zip(x, y, cells.values(), strict=True):
        inside = color if j["admissible"] or j["collapse"] else "white"
        axis.plot(a, b, "x" if j["collapse"] else "o", color=color, mfc=inside, ms=5, zorder=3)
    return [(x[i], y[i], list(cells)[i], color) for i in dict.fromkeys((len(x) - 1, 0))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("choose", "strength", "price", "report"))
    parser.add_argument("--model", nargs="+", default=["base"], help="several for `price` only")
    parser.add_argument("--styles", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "prompts.txt")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), help="default: all, or the candidates")
    parser.add_argument("--grid", type=float, nargs="+", default=GRID, help="strengths of `report`")
    parser.add_argument("--parts", nargs="+", default=["sample", "greedy"], choices=("sample", "greedy"),
                        help="of `report`")  # fmt: skip
    args = parser.parse_args()
    prompts = args.prompts.read_text(encoding="utf-8").splitlines()
    prompts = prompts[1::2] if args.stage == "report" else prompts[0::2]
    studies = {Path(name).name: Study(name, args.styles, args.out, prompts) for name in args.model}
    study, *others = studies.values()
    if others and args.stage != "price":
        parser.error("--model takes one model, several are for `price`")
    if args.stage == "choose":
        arms = args.arms or [arm for arm in ARMS if arm not in SCHEDULES]
        document = {"sample": run(study, dict.fromkeys(arms, COARSE), SEEDS[:1])}
        for arm, strength, corpora, collapses, gain in ranking(document["sample"])[:20]:
            print(f"{arm:24} {strength:>4}  admissible on {corpora}, {collapses} collapses, gain {gain:.2f}")
    elif args.stage == "strength":
        arms = args.arms or [CONSTANT, *MASKS]
        document = {"sample": run(study, dict.fromkeys(arms, FINE), SEEDS)}
        print(markdown(document["sample"]))
        for arm in arms:
            print(f"{arm}: {default_strength({c: document['sample'][c][arm] for c in CORPORA})}")
        for arm, strength, gain in safe_settings(document["sample"]):
            print(f"safe on all corpora: {arm} at {strength}, mean held-out gain {gain:.2f}")
    elif args.stage == "price":
        document = priced(studies)
        print(PRICE_HEADING)
        for model, judged in document.items():
            print(f"\n## `{model}`\n{markdown(judged)}")
        for arm, strength, gain in best_everywhere(document):
            print(f"safe on all corpora of all models: {arm} at {strength}, mean held-out gain {gain:.2f}")
    else:
        arms = args.arms or ["paper", DEFAULT]
        grids = dict.fromkeys(arms, tuple(args.grid)) | ({} if args.arms else dict.fromkeys(RIVALS, FEW))
        parts = {"sample": lambda: run(study, grids, SEEDS), "greedy": lambda: run_greedy(study, arms, args.grid)}
        document = {part: parts[part]() for part in args.parts}
        print(REPORT_HEADING.format(study.out.name))
        for part, judged in document.items():
            print(f"\n## {TITLES[part].capitalize()}\n{markdown(judged)}")
    write_text(study.out / f"{args.stage}.json", json.dumps(document, indent=1))
    plot(document, study.out / f"{args.stage}.png")

"""The study of `fusion`: four tasks, a small expert for each, a fine-tuned large model as the ceiling.

    python eval/fusion.py report --data DATA --out runs/fusion
    python eval/fusion.py report --data DATA --out runs/fusion --host STRONG --small WEAK
    python eval/fusion.py seeds --data DATA --out runs/fusion       what one expert more or less changes
    python eval/fusion.py sampled --data DATA --out runs/fusion     where to learn from when text is its own
    python eval/fusion.py components --data DATA --out runs/fusion  which components the mixture should have

`experts` and `ceilings` in place of `report` only train, so that two machines or cores can share the work. DATA is
as for `examples/train_pocket.py`, with `tasks/` beside it. Experts, ceilings and scored cells are written to
OUT/HOST-SMALL as soon as each is done, so the same command resumes. Texts are scored by teacher forcing, through
the chain that `generate` would use; losses are nats a token, over all tokens after BOS. Accuracy is that of the
label word after the text, by the probability of the first token in which the label words differ. `fusion_tasks.py`
has the texts, `fusion_cells.py` the arms and what is measured, `fusion_judge.py` the rules below.

Fixed before the first run:
  - Every arm is measured on dev and test documents that trained nothing. Whatever is chosen, the weight of static
    fusion and the defaults of `fusion`, is chosen on dev; what is reported is test.
  - Figures are sums over documents; the seeds of an expert (and of a ceiling, where it has several) are averaged
    within a document. Intervals are 95 % paired bootstrap over documents, 2,000 draws; those of `seeds` over the
    seeds of the expert, too.
  - A beats B on a task if the upper end of the interval of loss(A) - loss(B) is below 0. A falls below the host if
    the lower end of that of loss(A) - loss(host) is above 0.
  - Closure is (host - A) / (host - ceiling) in loss, the ceiling being the host fine-tuned on that task, also where
    all experts are there; the paper's figure is the ratio ceiling / A in loss, A / ceiling in accuracy.
  - The default for one expert is the mode with the largest mean closure over the tasks on dev, among those that
    fall below the host on no task, neither with its expert nor with that of the next task; the default for several
    likewise, with all experts and nobody saying which task it is, and with all but the task's own.
  - That the mixture takes part with one beta, 0.3, was chosen before the run on the dev documents of seed 0: of nine
    sets none was better by 0.03 nats a token, and it is the smallest. "mixture of three" shows what that costs.
  - It must beat the expert alone, the dev-tuned static weight and `grid` on at least half of the tasks, and never
    fall below the host; with several experts it must beat `select` on the mean over tasks. Otherwise the report
    says so.
  - `sampled`: test documents go on from a short or longer beginning. The source of evidence is right whose text has
    the least KL from the host fine-tuned on the task, if the 95 % interval of the difference, over documents, is on
    one side of 0 in more of the cells than on the other.
  - `components`, 2026-11-26: a set of components, or a share, replaces the default of the mixture if on the dev
    documents of both pairs of models, seed 0, its loss is lower on every task with its own expert (the upper end of
    the interval below 0) and on the mean over tasks with all experts; if nowhere, with no wrong expert either, is
    it higher by more than 0.01 nats a token (the lower end) or below the host; and if the share of drafts that
    `speculative.py decode` accepts, greedy, is lower by at most 0.02.
"""

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import interval
from fusion_cells import COMPONENTS, GRID, SAFE, SETTINGS, SEVERAL, SOURCES, WRONG, Study
from fusion_judge import Judge, bound_excess, choose, over_seeds
from fusion_tasks import TRAIN

from logitproc.artifact import write_text

SEEDS = (0, 1, 2)
HARM = 0.01  # nats a token, by which other components may be worse than the default
PROMPTS = (4, 12)  # tokens that sampled text goes on from
TITLES = {"single": "One expert", "wrong": "One expert, of another task", "several": "All experts, the task unknown",
          "unseen": "All experts but its own"}  # fmt: skip
# Of `seeds`: the arms, and what the mixture is compared with.
SPREAD = {
    "single": (("expert", "static 1.0", "grid", "newton J", "upscale 0.3", "mixture of static fusions", "mixture"),
               ("expert", "grid", "host")),
    "wrong": (("expert", "static 0.5", "grid", "upscale 0.3", "mixture of static fusions", "mixture"),
              ("expert", "mixture of static fusions", "host")),
    "several": (("expert", "average of experts", "select", "match level evidence", "mixture of static fusions",
                 "mixture"), ("expert", "average of experts", "select", "host")),
    "unseen": (("average of experts", "select", "match level evidence", "mixture of static fusions", "mixture"),
               ("average of experts", "select", "mixture of static fusions", "host")),
}  # fmt: skip
CANDIDATES, CANDIDATES_SEVERAL = tuple(arm for arm in SAFE if arm != "mixture of three"), tuple(SEVERAL)


# --- figures and verdicts ---


def judge_all(study: Study, seeds: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """All figures and verdicts of one pair of models; the seeds of each setting."""
    names = tuple(study.tasks)
    cells = {(setting, part, task): [study.cell(setting, part, task, seed) for seed in seeds[setting]]
             for setting in SETTINGS for part in ("dev", "test") for task in names}  # fmt: skip
    judges = lambda part, setting: {task: Judge(cells[setting, part, task]) for task in names}
    dev, test = ({setting: judges(part, setting) for setting in SETTINGS} for part in ("dev", "test"))
    static = [f"static {a}" for a in GRID if f"static {a}" in study.arms["single"]]
    tuned = {task: min(static, key=dev["single"][task].loss) for task in names}
    chosen = lambda setting, doubtful, known: choose(
        dev[setting], dev[doubtful], tuple(arm for arm in known if arm in study.arms[setting]))  # fmt: skip
    default, several = chosen("single", "wrong", CANDIDATES), chosen("several", "unseen", CANDIDATES_SEVERAL)
    bounded = [(cell, bound_excess(Judge([cell]))) for found in cells.values() for cell in found
               if "mixture share 0" in cell["arms"]]  # fmt: skip
    mean = lambda setting: {
        arm: float(np.mean([judge.closure(arm)[0] for judge in test[setting].values()]))
        for arm in test[setting][names[0]].nll
    }
    return {
        "seeds": seeds, "tuned": tuned, "default": default, "default_several": several,
        "size": {setting: {task: [len(judge.tokens), int(judge.tokens.sum())] for task, judge in test[setting].items()}
                 for setting in SETTINGS},
        **{setting: {task: {arm: judge.figures(arm) for arm in judge.nll} for task, judge in test[setting].items()}
           for setting in SETTINGS},
        "alpha_several": {task: judge.alpha for task, judge in test["several"].items()},
        "verdicts": verdicts(test, default, several, tuned, static),
        "mean_closure": {setting: mean(setting) for setting in SETTINGS},
        "largest_excess_over_bound": max((excess for _, excess in bounded), default=math.nan),
        "texts_bounded": sum(len(cell["tokens"]) for cell, _ in bounded),
    }  # fmt: skip


def verdicts(
    test: dict[str, dict[str, Judge]], default: str, several: str, tuned: dict[str, str], static: list[str]
) -> dict[str, list[str]]:
    """Claim -> the tasks where it holds; `tuned` is the best of the `static` weights on dev of each task."""
    where = lambda setting, holds: [task for task, judge in test[setting].items() if holds(judge, task)]
    return {
        f"{default} beats the expert alone": where("single", lambda j, _: j.beats(default, "expert")),
        f"{default} beats the dev-tuned static weight": where("single", lambda j, t: j.beats(default, tuned[t])),
        f"{default} beats grid": where("single", lambda j, _: j.beats(default, "grid")),
        f"{default} beats every static weight, chosen on test": where(
            "single", lambda j, _: all(j.beats(default, arm) for arm in static)),
        f"{default} falls below the host": where("single", lambda j, _: j.falls(default)),
        f"{default} falls below the host, with the expert of another task": where(
            "wrong", lambda j, _: j.falls(default)),
        "upscale 0.3 falls below the host, with the expert of another task": where(
            "wrong", lambda j, _: j.falls("upscale 0.3")),
        f"several experts: {several} beats select": where("several", lambda j, _: j.beats(several, "select")),
        f"several experts: {several} beats its own expert, which nobody knows": where(
            "several", lambda j, _: j.beats(several, "expert")),
        f"several experts: {several} falls below the host": where("several", lambda j, _: j.falls(several)),
        f"an unseen task: {several} falls below the host": where("unseen", lambda j, _: j.falls(several)),
        "an unseen task: select falls below the host": where("unseen", lambda j, _: j.falls("select")),
    }  # fmt: skip


def judge_seeds(study: Study, seeds: tuple[int, ...]) -> str:
    """Test documents: how the figures differ between experts of different seeds, a table a setting."""
    out = []
    for setting, title in TITLES.items():
        cells = [[study.cell(setting, "test", task, seed) for seed in seeds] for task in study.tasks]
        columns = [*([of_task] for of_task in cells), cells]
        out += [f"\n**{title}**\n", f"| closure: mean (each seed) | {' | '.join(study.tasks)} | mean |",
                "|---" * (len(columns) + 1) + "|"]  # fmt: skip
        arms, rivals = SPREAD[setting]
        for arm in arms:
            found = [over_seeds(column, arm, arm)["closure"] for column in columns]
            shown = (f"{np.mean(x):.3f} ({', '.join(f'{one:.3f}' for one in x)})" for x in found)
            out.append(f"| {arm} | {' | '.join(shown)} |")
        for other in rivals:
            found = [over_seeds(column, "mixture", other)["difference"] for column in columns]
            out.append(f"| mixture - {other}, nats a token | {' | '.join(map(interval, found))} |")
    return "\n".join(out) + "\n"


def judge_components(study: Study) -> str:
    """Dev documents, the experts of the first seed: loss of each set of components less that of the default.

    The mean over the tasks, and behind it the greatest, of all tasks and wrong experts. The interval of the mean over
    wrong experts takes their documents as independent, though they share them.
    """
    study = study.of_components()
    of = lambda setting: [[study.cell(setting, "dev", task, 0)] for task in study.tasks]
    cells = {"single": of("single"), "wrong": [cell for setting in WRONG for cell in of(setting)],
             "several": of("several"), "unseen": of("unseen")}  # fmt: skip
    out = [f"| against the default, nats a token | {' | '.join(TITLES.values())} | below the host | rule |",
           "|---" * (len(cells) + 3) + "|"]  # fmt: skip
    for arm in COMPONENTS:
        known = {setting: found for setting, found in cells.items() if arm in found[0][0]["arms"]}
        mean = {setting: over_seeds(found, arm, "mixture")["difference"] for setting, found in known.items()}
        each = {setting: [Judge(task).difference(arm, "mixture") for task in found] for setting, found in known.items()}
        below = sum(Judge(task).falls(arm) for found in known.values() for task in found)
        better = all(high < 0 for _, _, high in each["single"]) and mean.get("several", [0.0])[-1] < 0
        harm = below or any(low > HARM for found in each.values() for _, low, _ in found)
        shown = (f"{interval(mean[x])}; {interval(max(each[x]))}" if x in known else "" for x in cells)
        out.append(f"| {arm} | {' | '.join(shown)} | {below} | {'met' if better and not harm else ''} |")
    return "\n".join(out) + "\n"


def judge_sampled(study: Study) -> str:
    """What text that is sampled from a mixture loses by where its weights learn, as a table."""
    out = ["| KL from the fine-tuned host, nats a token | experts | prompt | host alone | all | given | none "
           "| given - all | none - all |", "|---" * 9 + "|"]  # fmt: skip
    for task in study.tasks:
        for setting, length in itertools.product(("single", "wrong", "several"), PROMPTS):
            clock, cell = time.time(), study.sampled(setting, task, length)
            draws = np.random.default_rng(0).integers(0, len(cell["all"]["kl"]), (2000, len(cell["all"]["kl"])))
            sums = {arm: [np.array(found[key]) for key in ("kl", "tokens")] for arm, found in cell.items()}
            of = lambda arm, rows, sums=sums: sums[arm][0][rows].sum(-1) / sums[arm][1][rows].sum(-1)
            every = slice(None)
            row = [task, setting, str(length), *(f"{of(arm, every):.3f}" for arm in ("host", *SOURCES))]
            for arm in SOURCES[1:]:
                low, high = np.percentile(of(arm, draws) - of("all", draws), [2.5, 97.5])
                row.append(interval([of(arm, every) - of("all", every), low, high]))
            out.append(f"| {' | '.join(row)} |")
            print(f"{out[-1]}  {time.time() - clock:.0f} s", file=sys.stderr, flush=True)
    return "\n".join(out) + "\n"


# --- tables and plot ---


def markdown(result: dict[str, Any]) -> str:
    out = []
    for setting, title in TITLES.items():
        for task, arms in result[setting].items():
            out += [
                "\n**{}: {}** ({} documents, {:,} tokens)\n".format(title, task, *result["size"][setting][task]),
                "| arm | nats a token | closure of the gap | against host | against expert | KL from host | loss ratio "
                "| accuracy | ratio (the paper's) | closure |", "|---" * 10 + "|",
            ]
            tuned = result["tuned"][task] if setting == "single" else None
            for arm, f in arms.items():
                if arm.startswith("static ") and arm not in SAFE and arm != "static sum 1/T" and arm != tuned:
                    continue
                name = f"{arm} (tuned on dev)" if arm == tuned else arm
                against_expert = interval(f["against_expert"]) if f["against_expert"] else ""
                accuracy = "| | | |" if f["accuracy"] is None else (
                    f"| {f['accuracy']:.3f} | {_number(f['accuracy_ratio'])} | {_number(f['accuracy_closure'])} |"
                )  # fmt: skip
                out.append(
                    f"| {name} | {f['loss']:.3f} | {interval(f['closure'])} | {interval(f['against_host'])} | "
                    f"{against_expert} | {f['kl']:.3f} | {f['loss_ratio']:.3f} {accuracy}"
                )
    out.append("\n**Mean alpha (several experts): task by expert**\n")
    tasks_ = list(result["single"])
    for arm in result["alpha_several"][tasks_[0]][0]:
        out += [f"| {arm} | " + " | ".join(tasks_) + " |", "|---" * (len(tasks_) + 1) + "|"]
        for task in tasks_:
            mean = np.mean([alpha[arm]["mean"] for alpha in result["alpha_several"][task]], 0)
            out.append(f"| {task} | " + " | ".join(f"{x:.2f}" for x in mean) + " |")
        out.append("")
    out.append("**Verdicts**\n")
    out.append(f"Default for one expert, chosen on dev: {result['default']}; for several: {result['default_several']}.")
    out += [f"- {claim}: {', '.join(found) or 'nowhere'}" for claim, found in result["verdicts"].items()]
    for setting, title in TITLES.items():
        ranked = sorted(result["mean_closure"][setting].items(), key=lambda item: -item[1])
        out.append(f"- mean closure, {title.lower()}: " + ", ".join(f"{arm} {x:.3f}" for arm, x in ranked))
    out.append(
        f"- bound of the mixture without share: largest excess over {result['texts_bounded']:,} scored texts "
        f"{result['largest_excess_over_bound']:+.1e} nats (rounding of float32 is about 1e-5 on a text)"
    )
    return "\n".join(out) + "\n"


def _number(x: float | None) -> str:
    return "" if x is None or not math.isfinite(x) else f"{x:.3f}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Above: loss against KL from the host, one expert; below: closure of the gap with all experts at once."""
    from matplotlib.figure import Figure

    names = list(result["single"])
    figure = Figure(figsize=(4.2 * len(names), 7.6), dpi=120, layout="constrained")
    axes = figure.subplots(2, len(names))
    marks = {"grid": ("s", "C1"), "newton J": ("D", "C2"), "mixture": ("*", "C3"), "expert": ("o", "C5"),
             "ceiling": ("^", "0.3")}  # fmt: skip
    labels = {"grid": "grid (the paper)", "expert": "small expert alone", "ceiling": "host fine-tuned"}
    for axis, task in zip(axes[0], names, strict=True):
        arms = result["single"][task]
        lines = {"static": ["host", *(f"static {a}" for a in GRID)],
                 "upscale": ["expert", "upscale 0.15", "upscale 0.3", "upscale 0.6", "static 1.0"]}
        for color, (label, along) in zip(("C0", "C9"), lines.items(), strict=True):
            line = [(arms[arm]["kl"], arms[arm]["loss"]) for arm in along if arm in arms]
            axis.plot(*zip(*line, strict=True), ".-", color=color, lw=1.5, label=label)
        for arm, (mark, color) in marks.items():
            axis.plot(arms[arm]["kl"], arms[arm]["loss"], mark, color=color, ms=12 if mark == "*" else 7,
                      label=labels.get(arm, arm), zorder=3)  # fmt: skip
        axis.set(title=task, xlabel="KL from the host (nats a token)")
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("one expert: loss (nats a token), less is better")
    axes[0][0].legend(fontsize=8)
    known = ("expert", "average of experts", "static sum 1/T", "select", "match level uniform", "match level evidence",
             "mixture of static fusions", "mixture")  # fmt: skip
    shown = [arm for arm in known if arm in result["several"][names[0]]]
    for axis, task in zip(axes[1], names, strict=True):
        values = [result["several"][task][arm]["closure"] for arm in shown]
        for at, (arm, (mean, low, high)) in enumerate(zip(shown, values, strict=True)):
            color = "C3" if arm == "mixture" else "C1" if arm == "select" else "C5" if arm == "expert" else "0.55"
            axis.errorbar(mean, -at, xerr=[[mean - low], [high - mean]], fmt="o", color=color, capsize=3)
        axis.axvline(0, color="0.3", lw=1)
        axis.axvline(1, color="0.3", lw=1, ls="--")
        axis.set(xlabel="closure: 0 host, 1 host fine-tuned on the task", yticks=[-i for i in range(len(shown))])
        axis.set_yticklabels([{"expert": "its own expert"}.get(x, x) for x in shown] if axis is axes[1][0] else [])
        axis.grid(alpha=0.25)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("experts", "ceilings", "report", "seeds", "sampled", "components"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--host", default="base")
    parser.add_argument("--small", default="mini")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="experts a task")
    parser.add_argument("--seeds-elsewhere", type=int, default=len(SEEDS), help="where an expert meets other tasks")
    parser.add_argument("--brief", action="store_true", help="only the arms that the verdicts need")
    parser.add_argument("--no-multi-task", dest="multi_task", action="store_false", help="no ceiling of all tasks")
    parser.add_argument("--documents", type=int, default=TRAIN, help="training documents a task, at most")
    args = parser.parse_args()
    study = Study(args.host, args.small, args.data, args.out, args.documents, args.multi_task,
                  args.brief)  # fmt: skip
    seeds = SEEDS[: args.seeds]
    tables = {"seeds": lambda: judge_seeds(study, seeds), "sampled": lambda: judge_sampled(study),
              "components": lambda: judge_components(study)}  # fmt: skip
    if args.stage == "experts":
        for seed in seeds:
            for task in study.tasks:
                study.model("small", task, seed)
    elif args.stage == "ceilings":
        for task in (*study.tasks, *(["all"] if args.multi_task else [])):
            study.model("host", task, 0)
    elif args.stage in tables:
        text = tables[args.stage]()
        print(text)
        write_text(study.out / f"{args.stage}.md", text)
    else:
        elsewhere = {setting: SEEDS[: args.seeds_elsewhere] for setting in SETTINGS if setting != "single"}
        result = judge_all(study, {"single": seeds, **elsewhere})
        text = markdown(result)
        print(text)
        write_text(study.out / "report.json", json.dumps(result, indent=1))
        write_text(study.out / "report.md", text)
        plot(result, study.out / "report.png")


if __name__ == "__main__":
    sys.exit(main())

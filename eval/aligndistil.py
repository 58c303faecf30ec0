"""The study of `aligndistil`: a known reward against the divergence from the reference, as a frontier.

    python eval/aligndistil.py run --out runs/aligndistil [--arms NAME ...]
    python eval/aligndistil.py report --out runs/aligndistil

The reference is the bundled `mini`, the pair `mini-dpo` and `mini-reverse-dpo` (`examples/fine_tune_pocket.py`); the
reward is `logitproc.bundled.plainness`, so nothing is judged by a model. Each of the 300 lines of
`eval/openings.txt` (first words of sentences of held-out documents, no pair was made from them) is continued
to the end of the sentence, at most 40 tokens, at temperature 1, with three seeds. `run` resumes.

Figures, means over prompts of means over seeds, 95 % bootstrap intervals over prompts:
  reward          of the continuation
  KL              sum over its tokens of KL(system || reference) at that prefix, exact: its mean is that of
                  log pi/pi_ref over own samples, with less noise; and the same per token
  base            -log pi_ref of its tokens, nats per token: how strange the reference finds it
  rare            share of its tokens with pi_ref < 1e-4
  length          tokens: mean, 95th percentile, and the share of texts cut at the limit
  distinct-2      distinct / all bigrams of the texts of one seed together

Fixed before the run. Families are compared at equal KL per sequence: each is a curve through its settings,
`dpo` first, joined by straight lines; nine KL levels divide the stretch that both curves reach, inside its ends;
every bootstrap draw of prompts draws both curves anew. One family beats another if the mean difference over
the levels has its 95 % interval above 0; it is ahead somewhere if at one level the interval that allows for
nine comparisons (99.44 %) lies above 0.
  (a) adaptive against constant
  (b) constant (away from the reverse model) against DeRa (away from the reference)
  (c) some setting has more reward than `dpo` (lower end above 0) with texts at most 10 % longer
Constant and adaptive with and without plausibility 0.1, the others without. A setting is admissible if its
texts are at most 10 % longer than those of `dpo`, its distinct-2 is at least 90 % of theirs, and its base loss is
at most 0.25 nats above that of the reference's own texts. The default is the admissible setting of constant,
adaptive or kl_cap with the greatest reward on the prompts of odd lines, adaptive where the difference is not
significant; its figures on even lines are reported beside.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import interval

import logitproc as lp
from logitproc import metrics
from logitproc.artifact import write_text
from logitproc.bundled import plainness

SEEDS, TOKENS, PROMPTS = (0, 1, 2), 40, Path(__file__).parent / "openings.txt"
MASKS = (0.0, 0.1)
LEVELS, DRAWS = 9, 2000
LONGER, LESS_DISTINCT, STRANGER = 1.10, 0.90, 0.25
DERA, CONSTANT, ADAPTIVE, CAPS = (2, 3, 5), (0.5, 1, 2), (1, 2, 4), (0.05, 0.15)
COLORS = {"dera": "#7f7f7f", "constant": "#1f77b4", "adaptive": "#d62728", "kl_cap": "#2ca02c",
          "base constant": "#1f77b4", "base adaptive": "#d62728"}  # fmt: skip


def arms() -> dict[str, dict[str, Any]]:
    """"family setting plausibility" -> parameters of `aligndistil`, and `host`. The host is the reference."""
    full = lambda name: {"model": name, "dtype": "float32"}
    pair = {"dpo": full("mini-dpo"), "reverse": full("mini-reverse-dpo")}
    own = {"host": "mini", "anchor": "dpo", **pair}
    found: dict[str, dict[str, Any]] = {}

    def add(family: str, setting: object, mask: float = 0.0, **given: Any) -> None:
        found[f"{family} {setting} {mask:g}"] = {"plausibility": mask, **given}

    add("reference", "-", host="mini", coefficient=0.0, dpo=full("mini-dpo"))
    for mask in MASKS:
        add("dpo", "-", mask, coefficient=0.0, **own)
        for x in CONSTANT:
            add("constant", x, mask, coefficient=float(x), **own)
        for x in ADAPTIVE:
            add("adaptive", x, mask, r=float(x), **own)
    for x in CAPS:
        add("kl_cap", x, r=8.0, kl_cap=x, **own)
    for x in DERA:
        add("dera", x, host="mini", anchor="dpo", dpo=full("mini-dpo"), coefficient=x - 1.0)
    add("base reference", "-", host="base", coefficient=0.0, **pair)
    for x in (0.5, 1):
        add("base constant", x, host="base", coefficient=float(x), **pair)
        add("base adaptive", f"{2 * x:g}", host="base", r=2.0 * x, **pair)
    return found


# --- run ---


class Bench:
    """Hosts and prompts; `texts` gives one record a prompt."""

    def __init__(self, prompts: list[str]):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        load = lambda name: AutoModelForCausalLM.from_pretrained(lp.pocket(name), dtype=torch.float32).eval()
        self.models = {name: load(name) for name in ("mini", "base")}
        self.tokenizer = AutoTokenizer.from_pretrained(lp.pocket("mini"))
        self.prompts = prompts
        self.ends = [self.tokenizer.eos_token_id, *sentence_ends(self.tokenizer)]

    @torch.no_grad()
    def texts(self, parameters: dict[str, Any], seed: int) -> list[dict[str, Any]]:
        parameters = dict(parameters)
        model = self.models[parameters.pop("host")]
        chain = lp.Chain.from_spec([{"name": "aligndistil", **parameters}])
        inputs = self.tokenizer(self.prompts, return_tensors="pt", padding=True)
        torch.manual_seed(seed)
        out = lp.generate(
            model, chain, **inputs, do_sample=True, top_k=0, max_new_tokens=TOKENS, eos_token_id=self.ends,
            pad_token_id=self.tokenizer.eos_token_id, output_logits=True, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        ids = out.sequences[:, inputs.input_ids.shape[1] :]
        ended = torch.isin(ids, torch.tensor(self.ends))
        real = torch.cat([torch.ones_like(ended[:, :1]), ended.cumsum(1)[:, :-1] == 0], 1)
        columns = []
        for step, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
            log_ref, log_pi = logits.log_softmax(-1), scores.log_softmax(-1)
            kl = torch.where(log_pi > -torch.inf, log_pi.exp() * (log_pi - log_ref), 0.0).sum(-1)
            columns.append(torch.stack([kl, -log_ref.gather(1, ids[:, step, None])[:, 0]]))
        kl, base = torch.stack(columns, -1)  # [rows, tokens] each
        records = []
        for row, prompt in enumerate(self.prompts):
            n = int(real[row].sum())
            tokens = ids[row, :n].tolist()
            text = self.tokenizer.decode(inputs.input_ids[row].tolist() + tokens, skip_special_tokens=True)
            text = text[text.index(prompt) + len(prompt) :]
            records.append({
                "line": row, "seed": seed, "text": text, "tokens": tokens, "length": n,
                "reward": plainness(text), "words": len(text.split()), "kl": float(kl[row, :n].sum()),
                "base": float(base[row, :n].sum()), "rare": int((base[row, :n] > np.log(1e4)).sum()),
                "cut": bool(n == TOKENS and not ended[row, n - 1]),
            })  # fmt: skip
        return records


def text_file(out: Path, name: str, seed: int) -> Path:
    return out / "texts" / f"{name.replace(' ', '_')}_{seed}.jsonl"


def sentence_ends(tokenizer: Any) -> list[int]:
    """As `examples/fine_tune_pocket.py` has it."""
    import re

    return [i for token, i in tokenizer.get_vocab().items() if re.fullmatch(r"[.!?]+[\"')”]*", token)]


def run(out: Path, names: Iterable[str]) -> None:
    bench, known = Bench(PROMPTS.read_text(encoding="utf-8").splitlines()), arms()
    for name in names:
        for seed in SEEDS:
            file = text_file(out, name, seed)
            if file.exists():
                continue
            clock = time.time()
            records = bench.texts(known[name], seed)
            write_text(file, "".join(json.dumps(record) + "\n" for record in records))
            mean = lambda key, records=records: np.mean([record[key] for record in records])
            print(f"{name:28} seed {seed}  reward {mean('reward'):+.3f}  KL {mean('kl'):6.2f}  "
                  f"{mean('length'):.1f} tokens  {time.time() - clock:.0f} s", flush=True)  # fmt: skip


# --- report ---


class Arm:
    """Records of one arm: per-prompt means over seeds, and figures that are ratios of sums."""

    def __init__(self, out: Path, name: str):
        self.rows: list[dict[str, Any]] = []
        for seed in SEEDS:
            self.rows += map(json.loads, text_file(out, name, seed).read_text(encoding="utf-8").splitlines())
        count = len(self.rows) // len(SEEDS)
        self.seeds = [self.rows[i * count : (i + 1) * count] for i in range(len(SEEDS))]

    def per_prompt(self, key: str) -> np.ndarray:
        return np.mean([[row[key] for row in rows] for rows in self.seeds], 0)

    def figures(self) -> dict[str, float]:
        total = lambda key: sum(row[key] for row in self.rows)
        lengths = [row["length"] for row in self.rows]
        distinct = [metrics.distinct_n([row["tokens"] for row in rows], 2) for rows in self.seeds]
        return {
            "reward": total("reward") / len(self.rows), "kl": total("kl") / len(self.rows),
            "kl_token": total("kl") / total("length"), "base": total("base") / total("length"),
            "rare": total("rare") / total("length"), "length": float(np.mean(lengths)),
            "length_95": float(np.percentile(lengths, 95)), "cut": total("cut") / len(self.rows),
            "distinct_2": float(np.mean(distinct)), "reward_100_words": 100 * total("reward") / total("words"),
        }  # fmt: skip


class Curve:
    """A family as reward over KL: per-prompt values of its settings, [settings, prompts]."""

    def __init__(self, found: list[Arm]):
        self.reward, self.kl = (np.stack([arm.per_prompt(key) for arm in found]) for key in ("reward", "kl"))

    def at(self, levels: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        kl, reward = self.kl[:, chosen].mean(1), self.reward[:, chosen].mean(1)
        order = np.argsort(kl)
        return np.interp(levels, kl[order], reward[order])


def compare(one: Curve, other: Curve) -> dict[str, Any]:
    """Reward of `one` above `other` at equal KL: the mean over the levels, and each level, with intervals."""
    ends = [(c.kl.mean(1).min(), c.kl.mean(1).max()) for c in (one, other)]
    low, high = max(e[0] for e in ends), min(e[1] for e in ends)
    levels = np.linspace(low, high, LEVELS + 2)[1:-1]
    prompts, rng = one.kl.shape[1], np.random.default_rng(0)
    difference = lambda chosen: one.at(levels, chosen) - other.at(levels, chosen)
    draws = np.stack([difference(rng.integers(0, prompts, prompts)) for _ in range(DRAWS)])
    here = difference(np.arange(prompts))
    mean = [here.mean(), *np.percentile(draws.mean(1), [2.5, 97.5])]
    apart = np.percentile(draws, [2.5 / LEVELS, 100 - 2.5 / LEVELS], axis=0)
    return {
        "mean": mean, "beats": bool(mean[1] > 0), "loses": bool(mean[2] < 0),
        "levels": [[*map(float, x)] for x in zip(levels, here, *apart, strict=True)],
        "ahead_somewhere": bool((apart[0] > 0).any()), "behind_somewhere": bool((apart[1] < 0).any()),
    }  # fmt: skip


def report(out: Path) -> dict[str, Any]:
    """Figures and verdicts of the arms that were run with all seeds."""
    done = [name for name in arms() if all(text_file(out, name, seed).exists() for seed in SEEDS)]
    every = {name: Arm(out, name) for name in done}
    figures = {name: arm.figures() for name, arm in every.items()}
    family = lambda name, mask: [arm for key, arm in every.items() if split(key)[::2] == (name, mask)]
    result: dict[str, Any] = {"figures": figures, "comparisons": {}, "against_dpo": {}}
    pairs = [("adaptive", "constant", mask) for mask in MASKS]
    pairs += [("kl_cap", "adaptive", 0.0), ("constant", "dera", 0.0), ("base adaptive", "base constant", 0.0)]
    for one, other, mask in pairs:
        start = "base reference" if one.startswith("base") else "dpo"
        if not (family(start, mask) and family(one, mask) and family(other, mask)):
            continue  # not run
        curves = [Curve(family(start, mask) + family(name, mask)) for name in (one, other)]
        result["comparisons"][f"{one} - {other}, plausibility {mask:g}"] = compare(*curves)
    for name, arm in every.items():
        if not name.startswith("base"):
            gain = metrics.paired_bootstrap(arm.per_prompt("reward"), every["dpo - 0"].per_prompt("reward"))
            result["against_dpo"][name] = gain._asdict()
    result["default"] = choose(every, figures)
    return result


def split(name: str) -> tuple[str, str, float]:
    family, setting, mask = name.rsplit(" ", 2)
    return family, setting, float(mask)


def choose(every: dict[str, Arm], figures: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The default by the rule above, from odd lines; its reward and that of `dpo` on even lines."""
    dpo, reference = figures["dpo - 0"], figures["reference - 0"]
    admissible = [
        name for name, f in figures.items()
        if split(name)[0] in ("constant", "adaptive", "kl_cap")
        and f["length"] <= LONGER * dpo["length"] and f["distinct_2"] >= LESS_DISTINCT * dpo["distinct_2"]
        and f["base"] <= reference["base"] + STRANGER
    ]  # fmt: skip
    odd = {name: every[name].per_prompt("reward")[0::2] for name in admissible}
    ranked = sorted(odd, key=lambda name: -odd[name].mean())
    best = ranked[0]
    adaptive = next((name for name in ranked if split(name)[0] == "adaptive"), best)
    lead = metrics.paired_bootstrap(odd[best], odd[adaptive])
    chosen = best if lead.low > 0 else adaptive
    even = lambda name: every[name].per_prompt("reward")[1::2]
    return {
        "admissible": {name: float(odd[name].mean()) for name in ranked}, "best": best, "chosen": chosen,
        "lead_of_best": lead._asdict(), "even": metrics.bootstrap(even(chosen))._asdict(),
        "even_against_dpo": metrics.paired_bootstrap(even(chosen), even("dpo - 0"))._asdict(),
    }  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    head = ("system", "plausibility", "reward", "against dpo", "KL", "KL a token", "base", "rare", "tokens", "95 %",
            "cut", "distinct-2", "reward per 100 words")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, f in result["figures"].items():
        family, setting, mask = split(name)
        gain = result["against_dpo"].get(name)
        against = interval(gain.values()) if gain else ""
        lines.append(
            f"| {family} {setting} | {mask:g} | {f['reward']:+.3f} | {against} | {f['kl']:.2f} "
            f"| {f['kl_token']:.3f} | {f['base']:.2f} | {f['rare']:.3f} | {f['length']:.1f} | {f['length_95']:.0f} "
            f"| {f['cut']:.2f} | {f['distinct_2']:.3f} | {f['reward_100_words']:+.2f} |"
        )
    lines.append("")
    for name, c in result["comparisons"].items():
        verdict = "beats" if c["beats"] else "loses" if c["loses"] else "no difference"
        places = [w for w in ("ahead", "behind") if c[f"{w}_somewhere"]]
        where = f"{' and '.join(places)} somewhere" if places else "nowhere apart"
        lines.append(f"- {name}: {interval(c['mean'])}: {verdict}, {where}")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Reward over KL, a line for each family; without the mask on the left, with it on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=120, layout="constrained")
    for axis, mask in zip(figure.subplots(1, len(MASKS), sharey=True), MASKS, strict=True):
        for family, color in COLORS.items():
            start = "base reference" if family.startswith("base") else "dpo"
            points = sorted(
                (f["kl"], f["reward"], split(name)[1]) for name, f in result["figures"].items()
                if split(name)[2] == mask and split(name)[0] in (family, start)
            )  # fmt: skip
            if len(points) < 2:
                continue
            x, y, labels = zip(*points, strict=True)
            axis.plot(x, y, "--o" if start != "dpo" else "-o", color=color, ms=4, label=family)
            for point in zip(labels, x, y, strict=True):
                axis.annotate(point[0], point[1:], (4, -9), textcoords="offset points", fontsize=7, color=color)
        f = result["figures"]["reference - 0"]
        axis.plot(f["kl"], f["reward"], "k*", ms=9, label="reference")
        axis.set(title=f"plausibility {mask:g}", xlabel="KL from the reference (nats per text)")
        axis.grid(alpha=0.25)
    figure.axes[0].set_ylabel("reward (plainness)")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("run", "report"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=tuple(arms()), metavar="NAME", help="default: all")
    args = parser.parse_args()
    if args.stage == "run":
        run(args.out, args.arms or arms())
    else:
        result = report(args.out)
        print(markdown(result))
        print(json.dumps(result["default"], indent=1), file=sys.stderr)
        write_text(args.out / "report.json", json.dumps(result, indent=1))
        plot(result, args.out / "report.png")

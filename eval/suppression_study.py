"""The study of `suppression`: labelled data sets made with and without it, at equal diversity.

    python eval/suppression_study.py adapt  --tasks DATA --out runs/suppression
    python eval/suppression_study.py choose --tasks DATA --out runs/suppression --only subj    every arm, seed 0
    python eval/suppression_study.py report --tasks DATA --out runs/suppression                seeds 1 and 2

DATA holds `subj/` and `sst2/`. Half A of the real training data adapts the bundled `base` to prompts of two lines,
"Elements: positive sentiment" and "Movie review:", and is the reference of the rule "ratio"; half B trains the
oracles. A cell is a data set of ITEMS texts, balanced over labels, made in ROUNDS rounds with the ledger growing
between them; it is stored and never made twice.

Rule of judgement, fixed before the first run:

1. Signs. The published signs are read at seeds 1 and 2 against plain sampling at T = .3: `paper` alone, T = 1.3 alone,
   and both. A sign holds where both seeds show it.
2. Equal diversity. Each arm is a curve over its settings. It is compared with another curve at the diversity that
   `paper` reaches at T = .7 and strength 7.5 or, if that is beyond either curve, at the largest diversity that both
   reach; once for Vendi and once for distinct-3; linear interpolation. Label accuracy is the mean of two oracles
   (logistic regression and naive Bayes on words). Intervals are 95 %, by bootstrap over data sets and items.
3. Choice, on seed 0 alone. Default: the family of LIBRARY with the highest label accuracy minus that of the best
   baseline at equal diversity, averaged over both diversities, on SUBJ (it was to be averaged over tasks; time did not
   allow, and no cell of another task existed when this was changed). Best baseline: the one of BASELINES with the
   highest label accuracy there, for each diversity. On SST-2 nothing is chosen: the default meets every baseline.
4. Verdict, on seeds 1 and 2. The default is better than `paper` where the interval of the difference of label
   accuracies is above 0 and that of base nats below 0; it is not below the best baseline where the interval of label
   accuracy is above -1 point and that of base nats below +.05. Both are asked for on each task and diversity.
5. Students (logistic regression on words, trained on a data set, tested on real data), with the prompted labels and
   with labels replaced by the first oracle's: the default passes where its best setting is not more than one point
   below the best setting of any arm.
"""

import argparse
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
)  # fmt: skip

import logitproc as lp
from logitproc.artifact import new_file, write_text
from logitproc.assessment import Bayes, Linear
from logitproc.diversity import distance_to, remote_clique, same_length, vendi, words
from logitproc.features import SentenceFeatures
from logitproc.methods.suppression import exempt_ids
from logitproc.metrics import distinct_n

ITEMS, ROUNDS, LONGEST = 1000, 10, 60
EPOCHS, LEARNING_RATE, BATCH = 4, 1e-3, 48


class Task(NamedTuple):
    """A real data set, and the words that ask a model for such texts."""

    text_type: str
    labels: dict[str, str]  # label in the file -> wording
    split: Callable[[Path], tuple[list, list, list]]  # half A, half B, test: (text, label) pairs

    def prompt(self, label: str) -> str:
        return f"Elements: {self.labels[label]}\n{self.text_type}:"


def _lines(path: Path, separator: str, encoding: str = "utf-8") -> list[tuple[str, str]]:
    lines = path.read_text(encoding=encoding).split("\n")  # splitlines would split at latin-1's 0x85
    pairs = (line.split(separator, 1) for line in lines if line.strip())
    return [(" ".join(text.split()), label) for label, text in pairs]


def _halves(pairs: list) -> tuple[list, list]:
    shuffled = random.Random(0).sample(pairs, len(pairs))
    return shuffled[: len(pairs) // 2], shuffled[len(pairs) // 2 :]


def _sst2(data: Path) -> tuple[list, list, list]:
    return *_halves(_lines(data / "sst2/train.tsv", "\t")), _lines(data / "sst2/test.tsv", "\t")


def _subj(data: Path) -> tuple[list, list, list]:
    test, train = _halves(_lines(data / "subj/subj.all", " ", "latin-1"))
    return *_halves(train), test


TASKS = {
    "subj": Task("Sentence from a movie review", {"0": "subjective statement", "1": "objective statement"}, _subj),
    "sst2": Task("Movie review", {"1": "positive sentiment", "0": "negative sentiment"}, _sst2),
}


# --- arms ---


class FrequencyPenalty(lp.Processor):
    """z - a c, c how often the text at hand holds the token: the penalty of hosted APIs. [rows, width]"""

    context = None

    def __init__(self, amount: float):
        self.amount = amount

    def step(self, tokens: Tensor, scores: Tensor, *, generated: Tensor) -> Tensor:
        age = torch.arange(tokens.shape[1], 0, -1)
        counted = (age <= generated[:, None]) & (tokens >= 0)
        return scores.scatter_add(1, tokens.clamp(min=0), -self.amount * counted.to(scores.dtype))


class XTC:
    """With probability `chance`, a step drops every token of p >= threshold but the least likely of them.

    Nothing is dropped where the end of the text would be (text-generation-webui, pull request 6335).
    """

    def __init__(self, chance: float, threshold: float, eos: int, generator: torch.Generator):
        self.chance, self.threshold, self.eos, self.generator = chance, threshold, eos, generator

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        p = scores.softmax(-1)
        top = p >= self.threshold
        least = torch.where(top, p, 2.0).argmin(-1, keepdim=True)
        drop = top.scatter(1, least, False)
        acts = torch.rand(len(p), generator=self.generator) < self.chance
        return scores.masked_fill(drop & (acts & ~drop[:, self.eos])[:, None], -torch.inf)


def arms() -> dict[str, list[dict[str, Any]]]:
    """Family -> settings along its curve. `T` is the temperature; other keys as `Study.processors` reads them."""
    ratio, dry = {"rule": "ratio"}, {"rule": "dry", "length": 3}
    at = lambda t, *rules: {"T": t, "rules": list(rules)}
    return {
        "temperature": [{"T": t} for t in (0.3, 0.7, 1.0, 1.3)],
        "frequency": [{"T": 0.7, "frequency": 2.0}],
        "min-p": [{"T": t, "min_p": 0.1} for t in (1.0, 2.0)],
        "xtc": [{"T": t, "xtc": 0.1} for t in (0.7, 1.0)],
        "paper": [at(0.7, {"rule": "paper", "strength": s}) for s in (2.5, 7.5)],
        "paper exempt": [at(0.7, {"rule": "paper", "exempt": True, "strength": 7.5})],
        "paper signs": [at(t, {"rule": "paper"}) for t in (0.3, 1.3)],
        "ratio": [at(0.7, ratio | {"strength": s}) for s in (1.0, 4.0)],
        "ratio common": [at(0.7, ratio | {"scope": "common", "strength": s}) for s in (4.0,)],
        "ratio label": [at(0.7, ratio | {"scope": "label", "strength": s}) for s in (4.0,)],
        "ratio 1, T": [at(t, ratio | {"strength": 1.0}) for t in (1.0,)],
        "dry": [at(0.7, dry | {"strength": s}) for s in (3.0,)],
        "dry 3, T": [at(t, dry | {"strength": 3.0}) for t in (1.0,)],
        "ratio + dry": [at(t, ratio | {"strength": 2.0}, dry | {"strength": 3.0}) for t in (0.7, 1.0)],
    }


BASELINES = ("temperature", "frequency", "min-p", "xtc")
LIBRARY = ("ratio", "ratio common", "ratio label", "ratio 1, T", "dry", "dry 3, T", "ratio + dry")


# --- cells ---


class Item(NamedTuple):
    label: str
    text: str
    base_nll: float  # nats a token, the end of the text included, of the adapted model at T = 1
    tokens: int


class Study:
    """One task: the adapted model, real data, and the cells made so far."""

    def __init__(self, name: str, data: Path, out: Path):
        self.name, self.task, self.out = name, TASKS[name], out
        self.half_a, self.half_b, self.test = self.task.split(data)

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(lp.pocket("base"))

    @cached_property
    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.out / self.name / "adapted", dtype=torch.bfloat16).eval()

    def reference(self, label: str | None = None) -> lp.NGramPrior:
        folder = self.out / self.name / f"reference-{label}"
        if not folder.exists():
            texts = [text for text, of in self.half_a if label in (None, of)]
            lp.NGramPrior.fit(texts, self.tokenizer, order=1, out=folder)
        return lp.NGramPrior.load(folder)

    @cached_property
    def exempt(self) -> tuple[int, ...]:
        label_words = [word for wording in self.task.labels.values() for word in wording.split()]
        return exempt_ids(self.tokenizer, punctuation=True, digits=True, function_words=True, words=label_words)

    def cell(self, setting: dict[str, Any], seed: int) -> list[Item]:
        """The data set of one setting and seed, made once."""
        file = self.out / self.name / f"{slug(setting)}-{seed}.jsonl"
        if not file.exists():
            start = time.time()
            items = self.make(setting, seed)
            with new_file(file) as lines:
                lines.writelines(json.dumps(item) + "\n" for item in items)
            took = time.time() - start
            print(f"{self.name} {slug(setting)} seed {seed}: {took:.0f} s", file=sys.stderr, flush=True)
        return [Item(*json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]

    def make(self, setting: dict[str, Any], seed: int) -> list[Item]:
        generator = torch.Generator().manual_seed(seed)
        ledger = lp.TokenLedger(self.tokenizer, texts=True)
        warpers = LogitsProcessorList([TemperatureLogitsWarper(setting["T"])])
        if "min_p" in setting:
            warpers.append(MinPLogitsWarper(setting["min_p"]))
        if "xtc" in setting:
            warpers.append(XTC(0.5, setting["xtc"], self.tokenizer.eos_token_id, generator))
        made: dict[str, list[list[int]]] = {label: [] for label in self.task.labels}
        rounds = ROUNDS if "rules" in setting else 1
        n = ITEMS // rounds // len(made)
        for number in range(rounds):
            frozen = ledger.view()
            for label, rows in made.items():
                chain = lp.Chain(self.processors(setting, frozen, label))
                new = sample(self.model, chain, warpers, self.prompt(label), n, generator, self.tokenizer.eos_token_id)
                ledger.update(new, label, number)
                rows += new
        return [item for label, rows in made.items() for item in self.scored(label, rows)]

    def processors(self, setting: dict[str, Any], ledger: lp.TokenLedger, label: str) -> list[lp.Processor]:
        found: list[lp.Processor] = [FrequencyPenalty(setting["frequency"])] if "frequency" in setting else []
        for rule in setting.get("rules", []):
            options = {"scope": "global"} | rule | {"label": label}
            if options.pop("exempt", False):
                options["exempt"] = self.exempt
            if rule["rule"] == "ratio":
                options["reference"] = self.reference(label if rule.get("scope") == "label" else None)
            found.append(lp.SuppressionLogitsProcessor(ledger, **options))
        return found

    def prompt(self, label: str) -> list[int]:
        return self.tokenizer(self.task.prompt(label))["input_ids"]

    @torch.no_grad()
    def scored(self, label: str, rows: list[list[int]]) -> Iterable[Item]:
        prompt = self.prompt(label)
        for start in range(0, len(rows), 100):
            batch = rows[start : start + 100]
            nll = losses(self.model, [(prompt, row) for row in batch], self.tokenizer.eos_token_id)
            for row, value in zip(batch, nll, strict=True):
                text = self.tokenizer.decode(row, skip_special_tokens=True).strip()
                yield Item(label, text, value.sum().item() / (len(row) + 1), len(row))


def slug(setting: dict[str, Any]) -> str:
    """A file name: `T0.7-ratio-strength2`."""
    parts = [f"{key}{value:g}" for key, value in setting.items() if key != "rules"]
    for rule in setting.get("rules", []):
        parts += [rule["rule"], *(f"{key}{value}" for key, value in rule.items() if key != "rule")]
    return "-".join(parts)


@torch.no_grad()
def sample(
    model: Any, chain: lp.Chain, warpers: LogitsProcessorList, prompt: list[int], rows: int,
    generator: torch.Generator, eos: int,
) -> list[list[int]]:  # fmt: skip
    """`rows` continuations of one prompt, without EOS: `generate`, but the prompt is read once and rows that
    have ended leave the batch."""
    bound = chain.bind(torch.tensor([prompt]))
    out = model(torch.tensor([prompt]), use_cache=True)
    cache = out.past_key_values
    cache.batch_repeat_interleave(rows)
    logits = out.logits[:, -1].float().repeat(rows, 1)
    history = torch.tensor([prompt]).repeat(rows, 1)
    ended = torch.zeros(rows, dtype=torch.bool)
    done: list[list[int]] = []
    for step in range(LONGEST):
        chosen = draw(warpers(history, bound(history, logits)), generator)
        history = torch.cat([history, chosen], dim=1)
        ended |= chosen[:, 0] == eos
        if ended.sum() * 8 > len(ended) or step == LONGEST - 1:
            leaving = ended if step < LONGEST - 1 else torch.ones_like(ended)
            done += [_up_to(row[len(prompt) :], eos) for row in history[leaving].tolist()]
            stay = (~leaving).nonzero()[:, 0]
            if not len(stay):
                break
            history, chosen, ended = history[stay], chosen[stay], ended[stay]
            cache.batch_select_indices(stay)
        logits = model(chosen, past_key_values=cache, use_cache=True).logits[:, -1].float()
    return done


def draw(scores: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row, int64 [rows, 1]; `torch.multinomial` draws a number for each token, this one a row."""
    below = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    point = torch.rand(len(scores), 1, generator=generator, dtype=torch.float64) * below[:, -1:]
    return torch.searchsorted(below, point, right=True)


def _up_to(row: list[int], eos: int) -> list[int]:
    return row[: row.index(eos)] if eos in row else row


def losses(model: Any, pairs: Sequence[tuple[list[int], list[int]]], eos: int) -> Tensor:
    """-ln p of each token of the second parts and of the end, [pairs, longest], 0 elsewhere."""
    whole = [[*prompt, *text, eos] for prompt, text in pairs]
    longest = max(map(len, whole))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in whole])
    target = torch.tensor([[-100] * len(p) + [*t, eos] + [-100] * (longest - len(p) - len(t) - 1) for p, t in pairs])
    logits = model(ids[:, :-1], use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), target[:, 1:], reduction="none")


# --- adaptation ---


def adapt(studies: list[Study]) -> None:
    """Fine-tune `base` on half A of the tasks together; the loss on some of half B picks the epoch."""
    torch.manual_seed(0)
    tokenizer = studies[0].tokenizer
    model: Any = AutoModelForCausalLM.from_pretrained(lp.pocket("base"), dtype=torch.float32).train()
    pairs = lambda s, texts: [(s.prompt(x), tokenizer(t, add_special_tokens=False)["input_ids"]) for t, x in texts]
    train = [p for s in studies for p in pairs(s, s.half_a)]
    held_out = [p for s in studies for p in pairs(s, s.half_b[:300])]
    steps = EPOCHS * math.ceil(len(train) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    best = math.inf
    for epoch in range(EPOCHS):
        for batch in batches(train, seed=epoch):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = losses(model, batch, tokenizer.eos_token_id)
            (loss.sum() / (loss > 0).sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            found = [losses(model, held_out[i : i + 100], tokenizer.eos_token_id) for i in range(0, len(held_out), 100)]
        mean = sum(f.sum() for f in found) / sum((f > 0).sum() for f in found)
        print(f"epoch {epoch + 1}: {mean:.4f} nats a token on half B", file=sys.stderr, flush=True)
        if mean < best:
            best = mean
            for study in studies:
                model.save_pretrained(study.out / study.name / "adapted")


def batches(pairs: list, seed: int) -> list[list]:
    """Batches of texts of about one length, in random order."""
    rng = random.Random(seed)
    ordered = sorted(rng.sample(pairs, len(pairs)), key=lambda pair: len(pair[0]) + len(pair[1]))
    found = [ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH)]
    return rng.sample(found, len(found))


# --- figures ---

WORDS = 10_000  # distinct-3 of every cell is that of so many words
DIVERSITY = {"vendi": "Vendi score", "distinct_3": "distinct-3"}


class Figures(NamedTuple):
    """What one cell comes to; `right` and `nats` by item, for the bootstrap."""

    vendi: float
    distinct_3: float
    remote_clique: float
    distance_to_real: float
    student: float
    student_relabelled: float
    words: int
    right: np.ndarray  # [items]: share of the two oracles that agree with the label
    first_right: np.ndarray
    nats: np.ndarray  # [items, 2]: base nats, tokens


class Judge:
    """Everything of one task that measures cells: oracles from half B, features, students."""

    def __init__(self, study: Study):
        self.study, self.cells = study, dict[tuple[str, int], Figures]()
        self.oracles = [Linear().fit(study.half_b), Bayes().fit(study.half_b)]
        # Features know the words of real text only, so nonsense makes no text more diverse.
        self.features = SentenceFeatures(None, [text for text, _ in study.half_b])
        self.real = self.features([text for text, _ in study.half_b])

    def oracle_accuracy(self) -> list[float]:
        return [oracle.accuracy(self.study.test)[0] for oracle in self.oracles]

    def __call__(self, setting: dict[str, Any], seed: int) -> Figures:
        key = slug(setting), seed
        if key not in self.cells:
            self.cells[key] = self._measure(self.study.cell(setting, seed))
        return self.cells[key]

    def _measure(self, items: list[Item]) -> Figures:
        items = random.Random(0).sample(items, len(items))
        texts, labels = [i.text for i in items], np.array([i.label for i in items])
        vectors, tokens = self.features(texts), [words(text) for text in texts]
        votes = np.array([oracle.predict(texts) == labels for oracle in self.oracles])
        student = lambda of: Linear().fit(list(zip(texts, of, strict=True))).accuracy(self.study.test)[0]
        return Figures(
            vendi(vectors), distinct_n(same_length(tokens, WORDS), 3), remote_clique(vectors),
            distance_to(vectors, self.real), student(labels), student(self.oracles[0].predict(texts)),
            sum(map(len, tokens)), votes.mean(0), votes[0].astype(float),
            np.array([[i.base_nll * (i.tokens + 1), i.tokens + 1] for i in items]),
        )  # fmt: skip


class Curve:
    """Cells [settings, seeds] of one family on one task."""

    def __init__(self, judge: Judge, settings: list[dict[str, Any]], seeds: Sequence[int]):
        self.cells = [[judge(setting, seed) for seed in seeds] for setting in settings]
        self.slugs = [slug(setting) for setting in settings]

    def diversity(self, axis: str, seeds: Sequence[int] | None = None) -> np.ndarray:
        """[settings], the mean over data sets."""
        values = np.array([[getattr(cell, axis) for cell in row] for row in self.cells])
        return values[:, seeds if seeds is not None else slice(None)].mean(1)

    def at(self, axis: str, d: float, draw: "Draw | None" = None) -> tuple[float, float]:
        """(label accuracy, base nats a token) where the curve has the diversity d."""
        seeds = draw.seeds if draw else range(len(self.cells[0]))
        x = self.diversity(axis, list(seeds))
        y = np.array([np.mean([_outcome(row[s], draw) for s in seeds], axis=0) for row in self.cells])
        order = np.argsort(x)
        return tuple(float(np.interp(d, x[order], column[order])) for column in y.T)  # type: ignore[return-value]


class Draw:
    """One bootstrap sample: of data sets, and of items within a cell."""

    def __init__(self, rng: np.random.Generator, n_seeds: int):
        self.rng, self.seeds = rng, rng.integers(n_seeds, size=n_seeds).tolist()


def _outcome(cell: Figures, draw: Draw | None) -> tuple[float, float]:
    chosen = slice(None) if draw is None else draw.rng.integers(len(cell.right), size=len(cell.right))
    nats, tokens = cell.nats[chosen].sum(0)
    return cell.right[chosen].mean(), nats / tokens


def compare(a: Curve, b: Curve, axis: str, target: float, draws: int = 1000) -> dict[str, Any]:
    """a - b at equal diversity: label accuracy and base nats, each (difference, low, high)."""
    d = min(target, a.diversity(axis).max(), b.diversity(axis).max())
    difference = lambda draw=None: np.subtract(a.at(axis, d, draw), b.at(axis, d, draw))
    rng, n = np.random.default_rng(0), len(a.cells[0])
    samples = np.array([difference(Draw(rng, n)) for _ in range(draws)])
    low, high = np.percentile(samples, [2.5, 97.5], axis=0)
    accuracy, nats = zip(difference(), low, high, strict=True)
    return {"diversity": d, "reaches": bool(d == target), "accuracy": accuracy, "nats": nats}


# --- stages ---


def with_plain(family: str, settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A family that varies a strength at T = .7 begins at plain T = .7; one that varies T, at T = .7."""
    if family in ("ratio 1, T", "dry 3, T"):
        return [{"T": 0.7, "rules": settings[0]["rules"]}, *settings]
    starts = all(setting["T"] == 0.7 for setting in settings)
    return [{"T": 0.7}, *settings] if starts else settings


def curves(judge: Judge, seeds: Sequence[int], families: Iterable[str] | None = None) -> dict[str, Curve]:
    """Of all families, or of some."""
    return {f: Curve(judge, with_plain(f, s), seeds) for f, s in arms().items() if families is None or f in families}


def made(study: Study) -> list[str]:
    """Families whose cells of seed 0 are there."""
    there = lambda setting: (study.out / study.name / f"{slug(setting)}-0.jsonl").exists()
    return [f for f, settings in arms().items() if all(map(there, with_plain(f, settings)))]


def choose(judges: list[Judge]) -> dict[str, Any]:
    """Step 3 of the rule: {"default": family, "baselines": {task: {axis: family}}, "margins": {family: [...]}}."""
    margins: dict[str, list[float]] = {family: [] for family in LIBRARY}
    best: dict[str, dict[str, dict[str, str]]] = {}
    for judge in judges:
        found = curves(judge, [0], {"paper", *BASELINES, *LIBRARY})
        for family, axis in itertools.product(LIBRARY, DIVERSITY):
            target = found["paper"].diversity(axis)[-1]
            d = min(target, found[family].diversity(axis).max())
            reaching = {b: found[b].at(axis, d)[0] for b in BASELINES if found[b].diversity(axis).max() >= d}
            rival = max(reaching, key=lambda b: reaching[b])
            margins[family].append(found[family].at(axis, d)[0] - reaching[rival])
            best.setdefault(family, {}).setdefault(judge.study.name, {})[axis] = rival
    default = max(LIBRARY, key=lambda family: np.mean(margins[family]))
    return {"default": default, "baselines": best[default], "margins": margins}


def report(judges: list[Judge], chosen: dict[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    result: dict[str, Any] = {"chosen": chosen, "tasks": {}}
    for judge in judges:
        best = chosen["baselines"].get(judge.study.name)  # None for a second task: the default meets all
        rivals = {axis: [best[axis]] if best else list(BASELINES) for axis in DIVERSITY}
        families = {"temperature", "paper", "paper signs", chosen["default"], *rivals["vendi"], *rivals["distinct_3"]}
        found = curves(judge, seeds, families)
        default, paper = found[chosen["default"]], found["paper"]
        verdicts = {}
        for axis in DIVERSITY:
            target = paper.diversity(axis)[-1]
            for other in ("paper", *rivals[axis]):
                verdicts[f"{axis}: default - {other}"] = compare(default, found[other], axis, target)
        result["tasks"][judge.study.name] = {
            "oracles": judge.oracle_accuracy(), "verdicts": verdicts, "signs": signs(judge, seeds),
            "table": {family: rows(curve) for family, curve in found.items()},
            "choosing": {family: rows(curve) for family, curve in curves(judge, [0], made(judge.study)).items()},
        }  # fmt: skip
    return result


def rows(curve: Curve) -> dict[str, dict[str, float]]:
    """Slug -> figures, means over data sets."""
    table = {}
    for name, cells in zip(curve.slugs, curve.cells, strict=True):
        outcomes = np.array([_outcome(cell, None) for cell in cells]).mean(0)
        plain = {k: float(np.mean([getattr(c, k) for c in cells])) for k in Figures._fields[:7]}
        first = float(np.mean([c.first_right.mean() for c in cells]))
        table[name] = plain | {"accuracy": outcomes[0], "first_accuracy": first, "nats": outcomes[1]}
    return table


SIGNS = {  # figure -> published sign of `paper`, of T = 1.3 and of both, against plain T = .3
    "remote_clique": (+1, +1, +1), "vendi": (+1, +1, +1), "distinct_3": (+1, +1, +1), "accuracy": (-1, -1, -1),
    "distance_to_real": (+1, +1, +1), "student": (+1, +1, +1), "student_relabelled": (+1, +1, +1),
}  # fmt: skip


def signs(judge: Judge, seeds: Sequence[int]) -> dict[str, Any]:
    """Figure -> for each of `paper`, hot, both: the differences to T = .3 by seed, and whether the sign holds."""
    value = lambda cell, key: cell.right.mean() if key == "accuracy" else getattr(cell, key)
    three = [{"T": 0.3, "rules": [{"rule": "paper"}]}, {"T": 1.3}, {"T": 1.3, "rules": [{"rule": "paper"}]}]
    found: dict[str, Any] = {}
    for key, published in SIGNS.items():
        found[key] = {}
        for name, setting, sign in zip(("paper", "T = 1.3", "both"), three, published, strict=True):
            deltas = [value(judge(setting, s), key) - value(judge({"T": 0.3}, s), key) for s in seeds]
            found[key][name] = {"differences": deltas, "holds": all(sign * d > 0 for d in deltas)}
    return found


def markdown(result: dict[str, Any]) -> str:
    out = []
    for name, task in result["tasks"].items():
        out += [f"\n**{name}** (oracles on real test data: {', '.join(f'{x:.1%}' for x in task['oracles'])})\n"]
        out += ["Seed 0\n", *_table(task["choosing"])] if task["choosing"] else []
        out += ["\nSeeds 1 and 2\n", *_table(task["table"])]
        out += ["\n| at equal diversity | at | label accuracy, points | base nats |", "|---" * 4 + "|"]
        for what, v in task["verdicts"].items():
            a, n = [100 * x for x in v["accuracy"]], v["nats"]
            where = f"{v['diversity']:.3g}" + ("" if v["reaches"] else ", below the paper's")
            out.append(f"| {what} | {where} | {a[0]:+.1f} [{a[1]:+.1f}, {a[2]:+.1f}] "
                       f"| {n[0]:+.2f} [{n[1]:+.2f}, {n[2]:+.2f}] |")  # fmt: skip
        out += ["\n| against T = .3 | paper | T = 1.3 | both |", "|---" * 4 + "|"]
        for key, of in task["signs"].items():
            cells = [
                f"{' '.join(f'{d:+.3g}' for d in x['differences'])}{'' if x['holds'] else ' (sign fails)'}"
                for x in of.values()
            ]
            out.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(out)


def _table(families: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    lines = ["| family | setting | Vendi | distinct-3 | remote-clique | distance to real | label accuracy "
             "| base nats | student | student, relabelled |", "|---" * 10 + "|"]  # fmt: skip
    for family, settings in families.items():
        for setting, f in settings.items():
            lines.append(
                f"| {family} | {setting} | {f['vendi']:.0f} | {f['distinct_3']:.3f} | {f['remote_clique']:.4f} "
                f"| {f['distance_to_real']:.4f} | {f['accuracy']:.1%} | {f['nats']:.2f} | {f['student']:.1%} "
                f"| {f['student_relabelled']:.1%} |"
            )
    return lines


COLORS = ("0.45", "tab:olive", "tab:brown", "tab:pink", "tab:red", "tab:orange", "gold", "black", "tab:blue",
          "tab:cyan", "deepskyblue", "tab:green", "limegreen", "tab:purple")  # fmt: skip


def plot(result: dict[str, Any], path: Path) -> None:
    """Label accuracy against diversity, a panel for each task and diversity, a line for each family (of seeds
    1 and 2 where it has them, else of seed 0)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.2 * len(result["tasks"])), dpi=110, layout="constrained")
    panels = figure.subplots(len(result["tasks"]), 2, squeeze=False)
    for row, (name, task) in zip(panels, result["tasks"].items(), strict=True):
        for panel, (axis, title) in zip(row, DIVERSITY.items(), strict=True):
            for family, settings in (task["choosing"] | task["table"]).items():
                color = COLORS[list(arms()).index(family)]
                points = [(f[axis], f["accuracy"]) for f in settings.values()]
                line = "none" if family == "paper signs" else "--" if family in BASELINES else "-"
                thick = 2.4 if family in ("paper", result["chosen"]["default"]) else 1.2
                panel.plot(*zip(*points, strict=True), "o", ls=line, color=color, lw=thick, ms=4, label=family)
            panel.set(title=name, xlabel=title, ylabel="label accuracy, mean of two oracles")
            panel.grid(alpha=0.25)
    panels[0][0].legend(fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("adapt", "make", "choose", "report"), help="make: cells only")
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=tuple(TASKS), nargs="+", default=list(TASKS), help="tasks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of `make`")
    parser.add_argument("--families", choices=tuple(arms()), nargs="+", default=list(arms()), help="of `make`")
    args = parser.parse_args()
    studies = [Study(name, args.tasks, args.out) for name in args.only]
    if args.stage == "adapt":
        adapt(studies)
    elif args.stage == "make":
        for seed, study, family in itertools.product(args.seeds, studies, args.families):
            for setting in with_plain(family, arms()[family]):
                study.cell(setting, seed)
    elif args.stage == "choose":
        chosen = choose([Judge(study) for study in studies])
        print(json.dumps(chosen, indent=1))
        write_text(args.out / "choose.json", json.dumps(chosen, indent=1))
    else:
        chosen = json.loads((args.out / "choose.json").read_text(encoding="utf-8"))
        result = report([Judge(study) for study in studies], chosen, (1, 2))
        print(markdown(result))
        write_text(args.out / "report.json", json.dumps(result, indent=1, default=float))
        plot(result, args.out / "report.png")


if __name__ == "__main__":
    main()

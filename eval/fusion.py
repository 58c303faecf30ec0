"""The study of `fusion`: four tasks, a small expert for each, a fine-tuned large model as the ceiling.

    python eval/fusion.py report --data DATA --out runs/fusion
    python eval/fusion.py report --data DATA --out runs/fusion --host STRONG --small WEAK
    python eval/fusion.py seeds --data DATA --out runs/fusion       what one expert more or less changes
    python eval/fusion.py sampled --data DATA --out runs/fusion     where to learn from when text is its own

`experts` and `ceilings` in place of `report` only train, so that two machines or cores can share the work. DATA is
as for `examples/train_pocket.py`, with `tasks/` beside it. Experts, ceilings and scored cells are written to
OUT/HOST-SMALL as soon as each is done, so the same command resumes. Texts are scored by teacher forcing, through
the chain that `generate` would use; losses are nats a token, over all tokens after BOS. Accuracy is that of the
label word after the text, by the probability of the first token in which the label words differ.

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
"""

import argparse
import csv
import gc
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import logitproc as lp
from logitproc import cli, metrics
from logitproc.artifact import write_text
from logitproc.generation import seed_everything
from logitproc.methods.fusion import fuse
from logitproc.scoring import process_positions

SEEDS = (0, 1, 2)
TRAIN, DEV, TEST = 3000, 150, 120  # documents a task, at most
FEWER_DOCUMENTS = 40  # of dev and of test, but where an expert meets its own task
RATES = {"small": 1e-3, "host": 5e-4}
EPOCHS, BATCH, LONGEST = 2, 64, 96
SCORED = 16  # documents at once
SOURCES, PROMPTS, NEW = ("all", "given", "none"), (4, 12), 24  # of evidence; tokens of prompts and of what follows
GRID = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
STATIC_FUSIONS: dict[str, Any] = {"mode": "mixture", "alpha": (0.5, 1.0, 1.5), "beta": 0.0}

SAFE: dict[str, dict[str, Any]] = {
    **{f"static {alpha}": {"mode": "static", "alpha": alpha} for alpha in (0.5, 1.0, 1.5)},
    "upscale 0.3": {"mode": "upscale"},
    "grid": {"mode": "grid"},
    **{f"newton {target}": {"mode": "newton", "target": target} for target in "RFJ"},
    "match": {"mode": "match"},
    "mixture": {"mode": "mixture"},
    "mixture of three": {"mode": "mixture", "beta": (0.15, 0.3, 0.6)},
    "mixture of static fusions": STATIC_FUSIONS,
}
SINGLE: dict[str, dict[str, Any]] = {
    **SAFE,
    **{f"static {alpha}": {"mode": "static", "alpha": alpha} for alpha in GRID},
    **{f"upscale {beta}": {"mode": "upscale", "beta": beta} for beta in (0.15, 0.6)},
    "mixture share 0": {"mode": "mixture", "share": 0.0},
    "mixture, even": {"mode": "mixture", "evidence_from": "none"},
}
SEVERAL: dict[str, dict[str, Any]] = {
    "static sum 1/T": {"mode": "static", "alpha": 0.25},
    "select": {"mode": "select"},
    **{
        f"match {kind} {weights}": {"mode": "match", "kind": kind, "weights": weights}
        for kind in ("level", "shift") for weights in ("uniform", "evidence")
    },
    "mixture": {"mode": "mixture"},
    "mixture of static fusions": STATIC_FUSIONS,
}  # fmt: skip
CANDIDATES, CANDIDATES_SEVERAL = tuple(arm for arm in SAFE if arm != "mixture of three"), tuple(SEVERAL)
# A setting says which experts there are, and what is tried with them.
SETTINGS = {"single": SINGLE, "wrong": SAFE, "several": SEVERAL, "unseen": SEVERAL}
BRIEF = ("static 0.5", "static 1.0", "static 1.5", "upscale 0.3", "grid", "newton J", "mixture",
         "mixture of static fusions", "select", "match level evidence")  # fmt: skip


def experts_of(setting: str, task: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The tasks whose experts are there: its own, that of the next, all, or all but its own."""
    following = names[(names.index(task) + 1) % len(names)]
    others = tuple(name for name in names if name != task)
    return {"single": (task,), "wrong": (following,), "several": names, "unseen": others}[setting]


# --- tasks ---


class Document(NamedTuple):
    text: str
    label: int | None


class Task(NamedTuple):
    labels: tuple[str, ...]
    train: list[Document]
    dev: list[Document]
    test: list[Document]


def tasks(data: Path) -> dict[str, Task]:
    """Name -> documents; a text ends in `LABEL: word` where there are labels."""
    read = lambda name, encoding="utf-8": (data / name).read_text(encoding).splitlines()
    headlines = [Document(line, None) for line in read("style/headlines.txt")]
    sst2 = {part: [line.split("\t") for line in read(f"tasks/sst2/{part}.tsv")] for part in ("train", "dev", "test")}
    feeling = lambda part: [Document(f"{text}\nSentiment: ", int(label)) for label, text in sst2[part]]
    trec = {part: [line.split(" ", 1) for line in read(f"tasks/trec/TREC.{part}.all", "latin-1")]
            for part in ("train", "test")}  # fmt: skip
    question = lambda part: [Document(f"{text}\nAnswer: ", int(label)) for label, text in trec[part]]
    with open(data / "tasks/ag_news/test.csv", encoding="utf-8") as file:
        news = [Document(f"{title}\nTopic: ", int(topic) - 1) for topic, title, _ in csv.reader(file)]
    train, questions = shuffled(feeling("train")), shuffled(question("train"))
    return {
        "headlines": divided((), shuffled(headlines)),
        "SST-2": Task(("negative", "positive"), train[:TRAIN], feeling("dev")[:: max(1, len(sst2["dev"]) // DEV)][:DEV],
                      shuffled(feeling("test"))[:TEST]),
        "TREC": Task(("description", "entity", "abbreviation", "person", "number", "location"),
                     questions[DEV:][:TRAIN], questions[:DEV], question("test")[:TEST]),
        "AG News": divided(("world", "sports", "business", "technology"), shuffled(news)),
    }  # fmt: skip


def shuffled(documents: list[Document]) -> list[Document]:
    return random.Random(0).sample(documents, len(documents))


def divided(labels: tuple[str, ...], documents: list[Document]) -> Task:
    return Task(labels, documents[TEST + DEV :][:TRAIN], documents[TEST : TEST + DEV], documents[:TEST])


def encode(tokenizer: Any, task: Task, document: Document) -> tuple[list[int], int | None, list[int]]:
    """(ids, where the label words begin to differ, the token of each label word there)."""
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    wrap = lambda text: [tokenizer.bos_token_id, *ids(text), tokenizer.eos_token_id][-LONGEST:]
    if document.label is None:
        return wrap(document.text), None, []
    options = [wrap(document.text + word) for word in task.labels]
    at = next(i for i, tokens in enumerate(zip(*options, strict=False)) if len(set(tokens)) == len(options))
    return options[document.label], at, [option[at] for option in options]


# --- models ---


@torch.enable_grad()  # it is called while scoring, too
def train(source: str, rows: list[list[int]], out: Path, rate: float, seed: int) -> None:
    """Fine-tune a model on token ids and save it to `out`."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    if out.exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    arguments = TrainingArguments(
        output_dir=str(out) + ".trainer", learning_rate=rate, num_train_epochs=EPOCHS, seed=seed, warmup_steps=0.05,
        per_device_train_batch_size=BATCH, lr_scheduler_type="linear", bf16=True, weight_decay=0.01,
        use_cpu=not torch.cuda.is_available(), train_sampling_strategy="group_by_length", save_strategy="no",
        report_to="none", logging_steps=50,
    )  # fmt: skip
    data = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids, "length": len(ids)} for ids in rows]
    clock = time.time()
    Trainer(model=model, args=arguments, train_dataset=data,
            data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)).train()  # fmt: skip
    tokens = EPOCHS * sum(map(len, rows))
    print(f"{out.name}: {tokens:,} tokens in {time.time() - clock:.0f} s", file=sys.stderr, flush=True)
    new = out.with_name(out.name + ".new")
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    new.rename(out)


class Study:
    """One pair of a host and a small model, its experts and ceilings, and the cells scored with them."""

    def __init__(self, host: str, small: str, data: Path, out: Path, documents: int = TRAIN,
                 multi_task: bool = True, brief: bool = False):  # fmt: skip
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.sources = {"host": cli.find_model(host), "small": cli.find_model(small)}
        self.out = out / f"{Path(host).name}-{Path(small).name}"
        self.tokenizer = AutoTokenizer.from_pretrained(self.sources["host"])
        self.tasks, self.documents, self.multi_task = tasks(data), documents, multi_task
        self.arms = {setting: {arm: options for arm, options in known.items() if not brief or arm in BRIEF}
                     for setting, known in SETTINGS.items()}  # fmt: skip
        self.load = lambda source: AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()

    def model(self, kind: str, name: str, seed: int) -> Path:
        """The folder of a model fine-tuned on a task, or on "all"."""
        folder = self.out / "models" / f"{kind} {name} {seed}"
        if not folder.exists():
            chosen = list(self.tasks.values()) if name == "all" else [self.tasks[name]]
            rows = [
                encode(self.tokenizer, task, document)[0]
                for task in chosen for document in task.train[: self.documents]
            ]  # fmt: skip
            train(self.sources[kind], rows, folder, RATES[kind], seed)
        return folder

    def cell(self, setting: str, part: str, task: str, seed: int) -> dict[str, Any]:
        """Figures of every document and arm."""
        file = self.out / "cells" / f"{setting} {task} {part} {seed}.json"
        if not file.exists():
            clock = time.time()
            write_text(file, json.dumps(self._score(setting, part, task, seed)))
            print(f"{file.stem}: {time.time() - clock:.0f} s", file=sys.stderr, flush=True)
            gc.collect()
        return json.loads(file.read_text("utf-8"))

    @torch.no_grad()
    def _score(self, setting: str, part: str, name: str, seed: int) -> dict[str, Any]:
        names = experts_of(setting, name, tuple(self.tasks))
        companion = lambda path: lp.Companion(self.load(path), pad_token_id=self.tokenizer.eos_token_id)
        host, base = self.load(self.sources["host"]), companion(self.sources["small"])
        experts = {task: companion(self.model("small", task, seed)) for task in names}
        ceilings = {"ceiling": self.load(self.model("host", name, 0))}
        if setting == "several" and self.multi_task:
            ceilings["multi-task ceiling"] = self.load(self.model("host", "all", 0))
        expert = list(experts.values()) if len(names) > 1 else experts[names[0]]
        chains = {
            arm: lp.Chain([lp.get("fusion")(expert=expert, base=base, **options)])
            for arm, options in self.arms[setting].items()
        }
        result: dict[str, Any] = {"tokens": [], "arms": {}, "alpha": {}}
        for ids, mask, labels in self._batches(part, name, None if setting == "single" else FEWER_DOCUMENTS):
            inside = mask[:, :-1].bool() & mask[:, 1:].bool()  # a token follows
            logits = host(input_ids=ids, attention_mask=mask).logits
            said = {task: one(ids, mask, ids.shape[1]) for task, one in {"base": base, **experts}.items()}
            arms = {"host": logits, "base": said["base"]}
            if len(names) == 1 or name in names:
                arms["expert"] = said[name if name in names else names[0]]
            if len(names) > 1:
                arms["average of experts"] = torch.stack([said[t].log_softmax(-1) for t in names]).logsumexp(0)
            arms |= {arm: model(input_ids=ids, attention_mask=mask).logits for arm, model in ceilings.items()}
            rows = [z[:, :-1][inside] for z in (logits, *said.values())]
            log_p = rows[0].log_softmax(-1)
            for arm in (*arms, *chains):
                scores = arms[arm] if arm in arms else process_positions(chains[arm], ids, logits, mask)
                found = result["arms"].setdefault(arm, {"nll": [], "kl": [], "right": []})
                _note(found, scores[:, :-1][inside].log_softmax(-1), log_p, ids, inside, labels)
            result["tokens"] += inside.sum(1).tolist()
            solved = {"single": ("grid", "newton J"), "several": ("select", "match level uniform")}.get(setting, ())
            for arm in (arm for arm in solved if arm in self.arms[setting]):
                settings = {k: v for k, v in SETTINGS[setting][arm].items() if k != "weights"}
                alpha = fuse(rows[0], rows[1], rows[2:], **settings).alpha
                result["alpha"].setdefault(arm, []).extend(alpha.tolist())
        for arm, found in result["alpha"].items():
            result["alpha"][arm] = {"mean": np.mean(found, 0).tolist(), "sd": np.std(found, 0).tolist()}
        return result

    @torch.no_grad()
    def sampled(self, setting: str, name: str, length: int) -> dict[str, dict[str, list[float]]]:
        """KL from the fine-tuned host and tokens of each document that is continued after `length` tokens.

        KL(q || p) of the distributions before each token sampled, summed over the tokens up to the end of the text.
        """
        companion = lambda path: lp.Companion(self.load(path), pad_token_id=self.tokenizer.eos_token_id)
        host, base = self.load(self.sources["host"]), companion(self.sources["small"])
        names = experts_of(setting, name, tuple(self.tasks))
        experts = [companion(self.model("small", task, 0)) for task in names]
        ceiling, eos = self.load(self.model("host", name, 0)), self.tokenizer.eos_token_id
        fusion: Any = lp.get("fusion")
        chains = {source: lp.Chain([fusion(experts, base, evidence_from=source)]) for source in SOURCES}
        task = self.tasks[name]
        ids = [encode(self.tokenizer, task, document)[0] for document in task.test[::2]]
        prompts = torch.tensor([row[: length + 1] for row in ids if len(row) > length + 2])  # BOS comes on top
        found = {}
        for arm, chain in {"host": lp.Chain(), **chains}.items():
            seed_everything(0)
            done: Any = lp.generate(
                host, chain, input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
                max_new_tokens=NEW, eos_token_id=eos, pad_token_id=eos, output_scores=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            log_q = torch.stack(done.scores, 1).log_softmax(-1)
            log_p = ceiling(done.sequences).logits[:, length:-1].log_softmax(-1)
            new = done.sequences[:, length + 1 :]
            inside = (new == eos).long().cumsum(1) - (new == eos).long() == 0  # up to the first EOS
            kl = (log_q.exp() * (log_q - log_p)).sum(-1).double()
            found[arm] = {"kl": (kl * inside).sum(1).tolist(), "tokens": inside.sum(1).tolist()}
        return found

    def _batches(self, part: str, name: str, most: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor, list]]:
        """(ids, mask, [(row, label tokens, label, where)]) of documents of like length."""
        task = self.tasks[name]
        documents = getattr(task, part)[:most]
        encoded = [(*encode(self.tokenizer, task, document), document.label) for document in documents]
        encoded.sort(key=lambda item: len(item[0]))
        for start in range(0, len(encoded), SCORED):
            batch = encoded[start : start + SCORED]
            width = len(batch[-1][0])
            ids = torch.tensor([ids + [self.tokenizer.eos_token_id] * (width - len(ids)) for ids, *_ in batch])
            mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, *_ in batch])
            labels = [(row, words, label, at) for row, (_, at, words, label) in enumerate(batch) if at is not None]
            yield ids, mask, labels


def _note(
    found: dict[str, list], log_q: torch.Tensor, log_p: torch.Tensor, ids: torch.Tensor, inside: torch.Tensor,
    labels: list,
) -> None:  # fmt: skip
    """Append loss, KL from the host and accuracy of each document; log_q and log_p [tokens, V]."""
    per_document = lambda x: torch.zeros(inside.shape, dtype=torch.float64).masked_scatter(inside, x.double()).sum(1)
    found["nll"] += per_document(-log_q.gather(-1, ids[:, 1:][inside][:, None]).squeeze(-1)).tolist()
    found["kl"] += per_document((log_q.exp() * (log_q - log_p)).sum(-1)).tolist()
    first = inside.sum(1).cumsum(0) - inside.sum(1)
    for row, words, label, place in labels:
        found["right"].append(int(int(log_q[first[row] + place - 1, words].argmax()) == label))


# --- judgement ---


class Judge:
    """Cells of one task and setting: seeds averaged within a document, differences by paired bootstrap."""

    def __init__(self, cells: list[dict[str, Any]]):
        self.tokens = np.array(cells[0]["tokens"])
        mean = lambda arm, key: np.mean([cell["arms"][arm][key] for cell in cells], 0)
        self.nll = {arm: mean(arm, "nll") for arm in cells[0]["arms"]}
        self.kl = {arm: mean(arm, "kl") for arm in cells[0]["arms"]}
        self.right = {arm: mean(arm, "right") for arm, found in cells[0]["arms"].items() if found["right"]}
        self.alpha = [cell["alpha"] for cell in cells]
        rng = np.random.default_rng(0)
        self.draws = rng.integers(0, len(self.tokens), (2000, len(self.tokens)))

    def loss(self, arm: str, rows: Any = slice(None)) -> Any:
        return self.nll[arm][rows].sum(-1) / self.tokens[rows].sum(-1)

    def difference(self, arm: str, other: str) -> tuple[float, float, float]:
        """loss(arm) - loss(other): mean and 95 % interval."""
        of = lambda rows: self.loss(arm, rows) - self.loss(other, rows)
        return (of(slice(None)), *self._range(of(self.draws)))

    def closure(self, arm: str) -> tuple[float, float, float]:
        """Closure of the gap in loss: mean and 95 % interval."""
        of = lambda rows: metrics.gap_closure(*(-self.loss(x, rows) for x in (arm, "host", "ceiling")))[1]
        return (of(slice(None)), *self._range(of(self.draws)))

    def beats(self, arm: str, other: str) -> bool:
        return self.difference(arm, other)[2] < 0

    def falls(self, arm: str) -> bool:
        return self.difference(arm, "host")[1] > 0

    def figures(self, arm: str) -> dict[str, Any]:
        accuracy = {key: float(self.right[key].mean()) for key in (arm, "host", "ceiling") if key in self.right}
        gap = len(accuracy) == 3 and accuracy["host"] != accuracy["ceiling"]
        ratio, closure = metrics.gap_closure(*accuracy.values()) if gap else (None, None)
        return {
            "loss": float(self.loss(arm)), "kl": float(self.kl[arm].sum() / self.tokens.sum()),
            "closure": [float(x) for x in self.closure(arm)],
            "loss_ratio": float(self.loss("ceiling") / self.loss(arm)),
            "against_host": [float(x) for x in self.difference(arm, "host")],
            "against_expert": [float(x) for x in self.difference(arm, "expert")] if "expert" in self.nll else None,
            "accuracy": accuracy.get(arm), "accuracy_ratio": ratio, "accuracy_closure": closure,
        }  # fmt: skip

    @staticmethod
    def _range(values: np.ndarray) -> tuple[float, float]:
        low, high = np.percentile(values, [2.5, 97.5])
        return float(low), float(high)


def over_seeds(cells: list[dict[str, Any]], arm: str, other: str) -> dict[str, Any]:
    """Closure of `arm` with the expert of each seed, and loss(arm) - loss(other): mean and 95 % interval.

    The interval is a bootstrap that draws seeds as well as documents.
    """
    judges = [Judge([cell]) for cell in cells]
    rng = np.random.default_rng(0)
    found = []
    for rows in judges[0].draws:
        drawn = [judges[i] for i in rng.integers(0, len(judges), len(judges))]
        found.append(np.mean([judge.loss(arm, rows) - judge.loss(other, rows) for judge in drawn]))
    mean = float(np.mean([judge.loss(arm) - judge.loss(other) for judge in judges]))
    return {"closure": [float(judge.closure(arm)[0]) for judge in judges], "other": other,
            "difference": [mean, *Judge._range(np.array(found))]}  # fmt: skip


def choose(dev: dict[str, Judge], doubtful: dict[str, Judge], arms: tuple[str, ...]) -> str:
    """The arm of the largest mean closure on dev among those that fall below the host nowhere.

    In `doubtful` the experts are those of other tasks.
    """
    falls = lambda arm: any(judge.falls(arm) for judge in (*dev.values(), *doubtful.values()))
    safe = [arm for arm in arms if not falls(arm)] or list(arms)
    return max(safe, key=lambda arm: np.mean([judge.closure(arm)[0] for judge in dev.values()]))


def bound_excess(judge: Judge) -> float:
    """The most by which a text's loss under the mixture without share exceeds its bound; 0 or less is right.

    One seed only: the bound is one of a text.
    """
    components = ("host", "upscale 0.3")
    best = np.min([judge.nll[arm] for arm in components], 0)
    return float((judge.nll["mixture share 0"] - best).max() - math.log(len(components)))


# --- report ---


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
    where = lambda setting, holds: [task for task in names if holds(test[setting][task], task)]
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
        "verdicts": {
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
        },
        "mean_closure": {setting: mean(setting) for setting in SETTINGS},
        "largest_excess_over_bound": max((excess for _, excess in bounded), default=math.nan),
        "texts_bounded": sum(len(cell["tokens"]) for cell, _ in bounded),
    }  # fmt: skip


def judge_seeds(study: Study, seeds: tuple[int, ...]) -> str:
    """One expert, test documents: how the figures differ between experts of different seeds, as a table."""
    arms = ("expert", "static 1.0", "grid", "newton J", "upscale 0.3", "mixture")
    out = ["| closure: mean (each seed) | " + " | ".join(study.tasks) + " |", "|---" * (len(study.tasks) + 1) + "|"]
    cells = {task: [study.cell("single", "test", task, seed) for seed in seeds] for task in study.tasks}
    for arm in arms:
        found = [over_seeds(cells[task], arm, "expert")["closure"] for task in study.tasks]
        shown = (f"{np.mean(x):.3f} ({', '.join(f'{one:.3f}' for one in x)})" for x in found)
        out.append(f"| {arm} | " + " | ".join(shown) + " |")
    for other in ("expert", "grid"):
        found = [over_seeds(cells[task], "mixture", other)["difference"] for task in study.tasks]
        out.append(f"| mixture - {other}, nats a token | " + " | ".join(map(_interval, found)) + " |")
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
                row.append(_interval([of(arm, every) - of("all", every), low, high]))
            out.append(f"| {' | '.join(row)} |")
            print(f"{out[-1]}  {time.time() - clock:.0f} s", file=sys.stderr, flush=True)
    return "\n".join(out) + "\n"


TITLES = {"single": "One expert", "wrong": "One expert, of another task", "several": "All experts, the task unknown",
          "unseen": "All experts but its own"}  # fmt: skip


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
                against_expert = _interval(f["against_expert"]) if f["against_expert"] else ""
                accuracy = "| | | |" if f["accuracy"] is None else (
                    f"| {f['accuracy']:.3f} | {_number(f['accuracy_ratio'])} | {_number(f['accuracy_closure'])} |"
                )  # fmt: skip
                out.append(
                    f"| {name} | {f['loss']:.3f} | {_interval(f['closure'])} | {_interval(f['against_host'])} | "
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


def _interval(x: list[float]) -> str:
    return f"{x[0]:+.3f} [{x[1]:+.3f}, {x[2]:+.3f}]"


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
    parser.add_argument("stage", choices=("experts", "ceilings", "report", "seeds", "sampled"))
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
    if args.stage == "experts":
        for seed in seeds:
            for task in study.tasks:
                study.model("small", task, seed)
    elif args.stage == "ceilings":
        for task in (*study.tasks, *(["all"] if args.multi_task else [])):
            study.model("host", task, 0)
    elif args.stage in ("seeds", "sampled"):
        text = judge_seeds(study, seeds) if args.stage == "seeds" else judge_sampled(study)
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

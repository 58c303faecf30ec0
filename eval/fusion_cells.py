"""What the study of `fusion` measures: every document under every arm, in cells that are kept as they are done.

A cell is of a setting, which says what experts there are, a task, a part of its documents and a seed of the experts.
"""

import copy
import gc
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fine_tuning import fine_tune
from fusion_tasks import TRAIN, encode, tasks

import logitproc as lp
from logitproc.artifact import write_text
from logitproc.bundled import find_model
from logitproc.generation import seed_everything
from logitproc.methods.fusion import fuse
from logitproc.scoring import process_positions

RATES = {"small": 1e-3, "host": 5e-4}
EPOCHS, BATCH = 2, 64
SCORED = 16  # documents at once
FEWER_DOCUMENTS = 40  # of dev and of test, but where an expert meets its own task
SOURCES, NEW = ("all", "given", "none"), 24  # of evidence; tokens that are sampled

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
SETTINGS = {"single": SINGLE, "wrong": SAFE, "several": SEVERAL, "unseen": SEVERAL}
BRIEF = ("static 0.5", "static 1.0", "static 1.5", "upscale 0.3", "grid", "newton J", "mixture",
         "mixture of static fusions", "select", "match level evidence")  # fmt: skip
SOLVED = {"single": ("grid", "newton J"), "several": ("select", "match level uniform")}  # whose alpha is kept


WRONG = ("wrong", "wrong 2", "wrong 3")  # with the expert of the next task, and of those after it
COMPONENTS: dict[str, dict[str, Any]] = {
    "upscale 0.3": {"mode": "upscale"},
    "mixture": {"mode": "mixture"},
    **{f"beta {beta}": {"mode": "mixture", "beta": beta} for beta in (0.0, 0.5)},
    "betas 0, 0.3": {"mode": "mixture", "beta": (0.0, 0.3)},
    "betas 0.15, 0.3, 0.6": {"mode": "mixture", "beta": (0.15, 0.3, 0.6)},
    "beta 0.3, alpha 0.5": {"mode": "mixture", "alpha": 0.5},
    **{f"share {share}": {"mode": "mixture", "share": share} for share in (0.0, 0.05)},
}


def experts_of(setting: str, task: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The tasks whose experts are there: its own, that of another, all, or all but its own."""
    at = names.index(task)
    wrong = {setting: (names[(at + n) % len(names)],) for n, setting in enumerate(WRONG, 1)}
    others = tuple(name for name in names if name != task)
    return {"single": (task,), "several": names, "unseen": others, **wrong}[setting]


class Batch(NamedTuple):
    """Documents of like length, padded on the right."""

    ids: torch.Tensor  # int64 [rows, length]
    mask: torch.Tensor  # int64 [rows, length]
    labels: list[tuple[int, list[int], int, int]]  # row, the token of each label word, label, where it stands

    @property
    def followed(self) -> torch.Tensor:
        """Bool [rows, length - 1]: a token follows."""
        return self.mask[:, :-1].bool() & self.mask[:, 1:].bool()


class Study:
    """One pair of a host and a small model, its experts and ceilings, and the cells scored with them."""

    def __init__(self, host: str, small: str, data: Path, out: Path, documents: int = TRAIN,
                 multi_task: bool = True, brief: bool = False):  # fmt: skip
        from transformers import AutoTokenizer

        self.sources = {"host": find_model(host), "small": find_model(small)}
        self.out = out / f"{Path(host).name}-{Path(small).name}"
        self.cells = self.out / "cells"
        self.tokenizer = AutoTokenizer.from_pretrained(self.sources["host"])
        self.tasks, self.documents, self.multi_task = tasks(data), documents, multi_task
        self.arms = {setting: {arm: options for arm, options in known.items() if not brief or arm in BRIEF}
                     for setting, known in SETTINGS.items()}  # fmt: skip

    def of_components(self) -> "Study":
        """The same pair, with other components of the mixture in place of the arms."""
        study = copy.copy(self)
        study.cells = self.out / "components"
        several = {arm: options for arm, options in COMPONENTS.items() if options["mode"] == "mixture"}
        study.arms = {"several": several, "unseen": several, **dict.fromkeys(("single", *WRONG), COMPONENTS)}
        return study

    # --- models ---

    def model(self, kind: str, name: str, seed: int) -> Path:
        """The folder of the host or the small model fine-tuned on a task, or on "all"."""
        folder = self.out / "models" / f"{kind} {name} {seed}"
        if not folder.exists():
            chosen = list(self.tasks.values()) if name == "all" else [self.tasks[name]]
            rows = [
                encode(self.tokenizer, task, document)[0]
                for task in chosen for document in task.train[: self.documents]
            ]  # fmt: skip
            train(self.sources[kind], rows, folder, RATES[kind], seed)
        return folder

    def host(self) -> Any:
        return load(self.sources["host"])

    def ceiling(self, name: str) -> Any:
        return load(self.model("host", name, 0))

    def base(self) -> lp.Companion:
        return self._companion(self.sources["small"])

    def experts(self, setting: str, name: str, seed: int) -> dict[str, lp.Companion]:
        names = experts_of(setting, name, tuple(self.tasks))
        return {task: self._companion(self.model("small", task, seed)) for task in names}

    def _companion(self, source: str | Path) -> lp.Companion:
        return lp.Companion(load(source), pad_token_id=self.tokenizer.eos_token_id)

    # --- cells ---

    def cell(self, setting: str, part: str, task: str, seed: int) -> dict[str, Any]:
        """Figures of every document and arm."""
        file = self.cells / f"{setting} {task} {part} {seed}.json"
        if not file.exists():
            clock = time.time()
            write_text(file, json.dumps(self._score(setting, part, task, seed)))
            print(f"{file.stem}: {time.time() - clock:.0f} s", file=sys.stderr, flush=True)
            gc.collect()
        return json.loads(file.read_text("utf-8"))

    @torch.no_grad()
    def _score(self, setting: str, part: str, name: str, seed: int) -> dict[str, Any]:
        host, base, experts = self.host(), self.base(), self.experts(setting, name, seed)
        ceilings = {"ceiling": self.ceiling(name)}
        if setting == "several" and self.multi_task:
            ceilings["multi-task ceiling"] = self.ceiling("all")
        given = list(experts.values()) if len(experts) > 1 else next(iter(experts.values()))
        chains = {
            arm: lp.Chain([lp.get("fusion")(expert=given, base=base, **options)])
            for arm, options in self.arms[setting].items()
        }
        solved = [arm for arm in SOLVED.get(setting, ()) if arm in self.arms[setting]]
        result: dict[str, Any] = {"tokens": [], "arms": {}, "alpha": {}}
        for batch in self.batches(part, name, None if setting == "single" else FEWER_DOCUMENTS):
            ids, mask, _ = batch
            logits = host(input_ids=ids, attention_mask=mask).logits
            said = {task: one(ids, mask, ids.shape[1]) for task, one in {"base": base, **experts}.items()}
            arms = {"host": logits, "base": said["base"]}
            if len(experts) == 1 or name in experts:
                arms["expert"] = said[name if name in experts else next(iter(experts))]
            if len(experts) > 1:
                arms["average of experts"] = torch.stack([said[t].log_softmax(-1) for t in experts]).logsumexp(0)
            arms |= {arm: model(input_ids=ids, attention_mask=mask).logits for arm, model in ceilings.items()}
            rows = [z[:, :-1][batch.followed] for z in (logits, *said.values())]
            log_p = rows[0].log_softmax(-1)
            for arm in (*arms, *chains):
                scores = arms[arm] if arm in arms else process_positions(chains[arm], ids, logits, mask)
                found = result["arms"].setdefault(arm, {"nll": [], "kl": [], "right": []})
                _note(found, scores[:, :-1][batch.followed].log_softmax(-1), log_p, batch)
            result["tokens"] += batch.followed.sum(1).tolist()
            for arm in solved:
                options = {k: v for k, v in self.arms[setting][arm].items() if k != "weights"}
                alpha = fuse(rows[0], rows[1], rows[2:], **options).alpha
                result["alpha"].setdefault(arm, []).extend(alpha.tolist())
        for arm, found in result["alpha"].items():
            result["alpha"][arm] = {"mean": np.mean(found, 0).tolist(), "sd": np.std(found, 0).tolist()}
        return result

    def batches(self, part: str, name: str, most: int | None) -> Iterator[Batch]:
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
            yield Batch(ids, mask, labels)

    @torch.no_grad()
    def sampled(self, setting: str, name: str, length: int) -> dict[str, dict[str, list[float]]]:
        """KL from the fine-tuned host and tokens of each document that is continued after `length` tokens.

        KL(q || p) of the distributions before each token sampled, summed over the tokens up to the end of the text.
        """
        host, base, experts = self.host(), self.base(), self.experts(setting, name, 0)
        ceiling, eos = self.ceiling(name), self.tokenizer.eos_token_id
        fusion: Any = lp.get("fusion")
        chains = {
            source: lp.Chain([fusion(list(experts.values()), base, evidence_from=source)]) for source in SOURCES
        }
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


def load(source: str | Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


def train(source: str, rows: list[list[int]], out: Path, rate: float, seed: int) -> None:
    """Fine-tune a model on token ids and save it to `out`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    data = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids, "length": len(ids)} for ids in rows]
    clock = time.time()
    fine_tune(
        model, data, DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8), seed=seed, learning_rate=rate,
        num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, weight_decay=0.01,
        train_sampling_strategy="group_by_length", logging_steps=50,
    )  # fmt: skip
    tokens = EPOCHS * sum(map(len, rows))
    print(f"{out.name}: {tokens:,} tokens in {time.time() - clock:.0f} s", file=sys.stderr, flush=True)
    new = out.with_name(out.name + ".new")
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    new.rename(out)


def _note(found: dict[str, list], log_q: torch.Tensor, log_p: torch.Tensor, batch: Batch) -> None:
    """Append loss, KL from the host and accuracy of each document; log_q and log_p [tokens, V]."""
    ids, _, labels = batch
    inside = batch.followed
    per_document = lambda x: torch.zeros(inside.shape, dtype=torch.float64).masked_scatter(inside, x.double()).sum(1)
    found["nll"] += per_document(-log_q.gather(-1, ids[:, 1:][inside][:, None]).squeeze(-1)).tolist()
    found["kl"] += per_document((log_q.exp() * (log_q - log_p)).sum(-1)).tolist()
    first = inside.sum(1).cumsum(0) - inside.sum(1)
    for row, words, label, place in labels:
        found["right"].append(int(int(log_q[first[row] + place - 1, words].argmax()) == label))

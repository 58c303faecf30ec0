"""What n-gram steering buys against fine-tuning: LoRA of the same model on the same text, judged as in `study.py`.

    python eval/lora.py --styles runs/pocket/styles --out runs/study

For each corpus a LoRA adapter of the host sees the training documents once, up to TOKENS tokens of them (ends of
documents are context only, as the prior's EOS steers nothing either), and is merged into a copy of the host, in
OUT/MODEL/lora. Its arm in the study is static fusion, z + alpha (z_lora - z) with z the host itself: alpha 1 is the
fine-tuned model, less is a dial between the two, as the strength of `ngram` is. Prompts are those of the reporting
half, three seeds; texts are judged by the rule at the top of `study.py`. Nothing is chosen on prompts. The judge of
style is an n-gram model, which favours an n-gram method; so the loss of each on the held-out documents, teacher-forced,
stands beside it.

The adapter is the paper's (arXiv:2601.16224, section 4): rank 8, alpha 16, dropout .05, eight rows a step, here on all
linear layers. Its rate, 2e-4, and its 800 steps are for a model 170 times as large; RATE was not tuned.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import study
from fine_tuning import fine_tune
from study import CORPORA, SAMPLE, SEEDS, TEMPERATURES, Cells, Study
from sweep import Cell, run_cell

from logitproc import scoring
from logitproc.artifact import write_text
from logitproc.bundled import find_model
from logitproc.chain import Chain
from logitproc.corpus import documents
from logitproc.methods.ngram import OFF

LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear"}
RATE, BATCH, WINDOW, TOKENS = 2e-3, 8, 512, 300_000
STRENGTHS = (0.7, 1.0)
HELD_OUT_DOCUMENTS = {"quixote": 2, "headlines": 400, "arxiv": 40}


def windows(tokenizer: Any, texts: Iterable[str]) -> list[dict[str, list[int]]]:
    """The documents as one stream `document </s> document </s> ...`, cut into rows; an end is no label."""
    eos, stream = tokenizer.eos_token_id, []
    for text in texts:
        if len(stream) >= TOKENS:
            break
        stream += [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], eos]
    rows = [stream[start : start + WINDOW] for start in range(0, len(stream) - WINDOW + 1, WINDOW)]
    return [{"input_ids": row, "labels": [-100 if token == eos else token for token in row]} for row in rows]


def train(source: str, rows: list[dict[str, list[int]]], seed: int = 0) -> tuple[Any, dict[str, float]]:
    """One pass of LoRA over the rows: the merged model, and what training took. The same seed gives the same model."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA, task_type="CAUSAL_LM"))
    clock = time.time()
    trainer = fine_tune(
        model, rows, seed=seed, learning_rate=RATE, num_train_epochs=1, per_device_train_batch_size=BATCH,
        logging_steps=10, logging_first_step=True,
    )  # fmt: skip
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    about = {"tokens": WINDOW * len(rows), "steps": trainer.state.global_step,
             "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
             "seconds": time.time() - clock, "first_loss": losses[0], "last_loss": losses[-1]}  # fmt: skip
    return model.merge_and_unload(), about


class LoRA:
    """The fine-tuned hosts of a study."""

    def __init__(self, study: Study, source: str):
        self.study, self.source = study, source

    def model(self, corpus: str) -> Path:
        """The folder of the host fine-tuned on a corpus."""
        folder = self.study.out / "lora" / f"{corpus}-{RATE:g}"
        if not folder.exists():
            texts = documents(self.study.styles / corpus / "train.jsonl")
            merged, about = train(self.source, windows(self.study.tokenizer, texts))
            new = folder.with_name(folder.name + ".new")
            merged.save_pretrained(new)
            self.study.tokenizer.save_pretrained(new)
            write_text(new / "training.json", json.dumps(about) + "\n")
            new.rename(folder)
        return folder

    def spec(self, corpus: str, alpha: float) -> dict[str, Any]:
        exact = lambda model: {"model": str(model), "dtype": "float32"}
        return {"name": "fusion", "mode": "static", "alpha": alpha,
                "expert": exact(self.model(corpus)), "base": exact(self.source)}  # fmt: skip

    def table(self, corpus: str, alpha: float) -> Cells:
        bench, out, spec = self.study.benches[corpus], self.study.out / corpus, self.spec(corpus, alpha)
        label = f"{corpus} lora {alpha:g}"
        return Cells([row for seed in SEEDS for row in run_cell(bench, Cell(label, [spec], SAMPLE, seed), out)])

    def held_out(self, corpus: str) -> dict[str, Any]:
        """Loss on held-out documents, nats a token with its standard error: the host, through `ngram`, and LoRA."""
        order, parameters = study.ARMS[study.DEFAULT]
        prior = self.study.prior(corpus, "train", order)
        chains = {
            f"{study.DEFAULT} {s:g}": [{"name": "ngram", "prior": prior, "strength": s} | OFF | parameters]
            for s in STRENGTHS
        }
        chains |= {f"lora {s:g}": [self.spec(corpus, s)] for s in STRENGTHS}
        result: dict[str, Any] = {}
        for arm, spec in chains.items():
            report = scoring.score_corpus(
                self.study.model, self.study.tokenizer, Chain.from_spec(spec),
                documents(self.study.styles / corpus / "held-out.jsonl"), context=256, stride=128,
                divergence=False, limit=HELD_OUT_DOCUMENTS[corpus],
            )  # fmt: skip
            result["unsteered"] = {"nll": report.mean["base_nll"], "error": report.error["base_nll"]}
            result[arm] = {"nll": report.mean["nll"], "delta": report.mean["delta_nll"],
                           "delta_error": report.error["delta_nll"], "tokens": report.tokens}  # fmt: skip
        return result

    def judged(self, corpus: str) -> dict[str, dict[str, Any]]:
        """Judgements of unsteered text, the default of the study and LoRA: {arm: {strength: judgement}}."""
        table = lambda t: self.study.table(corpus, "unsteered", 0.0, SAMPLE | {"temperature": t}, SEEDS)
        plain, controls = table(1.0), [table(t) for t in TEMPERATURES]
        default = lambda s: self.study.table(corpus, study.DEFAULT, s, SAMPLE, SEEDS)
        return {
            "unsteered": {"1": study.judge(plain, plain, controls)},
            study.DEFAULT: {f"{s:g}": study.judge(default(s), plain, controls) for s in STRENGTHS},
            "lora": {f"{s:g}": study.judge(self.table(corpus, s), plain, controls) for s in STRENGTHS},
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="base")
    parser.add_argument("--styles", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--corpora", nargs="+", default=CORPORA, choices=CORPORA)
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "prompts.txt")
    args = parser.parse_args()
    reporting = args.prompts.read_text(encoding="utf-8").splitlines()[1::2]
    lora = LoRA(Study(args.model, args.styles, args.out, reporting), find_model(args.model))
    document: dict[str, dict] = {"sample": {}, "held_out": {}, "training": {}}
    for corpus in args.corpora:
        document["sample"][corpus] = lora.judged(corpus)
        document["held_out"][corpus] = lora.held_out(corpus)
        document["training"][corpus] = json.loads((lora.model(corpus) / "training.json").read_text("utf-8"))
        print(study.line(corpus, "lora", document["sample"][corpus]["lora"]), file=sys.stderr, flush=True)
        write_text(lora.study.out / "lora.json", json.dumps(document, indent=1))
    print(study.markdown(document["sample"]))
    print(json.dumps({key: document[key] for key in ("held_out", "training")}, indent=1))

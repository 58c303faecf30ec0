"""Fine-tune the bundled `mini`: `mini-expert` on headlines, and a preference pair, `mini-dpo` and `mini-reverse-dpo`.

    python examples/fine_tune_pocket.py expert --data DATA --out runs/pocket
    python examples/fine_tune_pocket.py pairs --data DATA --out runs/pocket
    python examples/fine_tune_pocket.py dpo --out runs/pocket
    python examples/fine_tune_pocket.py reverse --out runs/pocket
    python examples/fine_tune_pocket.py install --out runs/pocket

Run `train_pocket.py` first; DATA is the same. Needs `pip install '.[train]'` (trl).

`expert` reads nine tenths of the headlines (those that `train_pocket.py styles` writes as training text).
`pairs` takes the first words of sentences of the public-domain books as prompts, lets `mini` finish the
sentence four times, and labels pairs of answers by Bradley-Terry on a reward that is known exactly,
`logitproc.bundled.plainness`: short words. Sentences of held-out documents give the held-out pairs; those of
`eval/openings.txt` are among neither. `dpo` and `reverse` differ in one thing only: chosen and rejected are
swapped. `dpo --beta 0.05 --name NAME` trains a further model for the study.
"""

import argparse
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train_pocket import sources, split
from transformers import AutoModelForCausalLM, AutoTokenizer

import logitproc as lp
from logitproc.bundled import plainness

BOOKS = ("bronte", "darwin", "dubois")
PROMPT_WORDS, ANSWER_TOKENS, ANSWERS = 8, 40, 4
PROMPTS, HELD_OUT_PROMPTS, SEED = 3000, 300, 0
BETA, LEARNING_RATE, BATCH, EPOCHS = 0.1, 3e-4, 64, 1
EXPERT_LEARNING_RATE, EXPERT_EPOCHS = 2e-3, 1


def load(name: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(lp.pocket(name), dtype=torch.float32)


def load_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(lp.pocket("mini"))


# --- prompts and answers ---


def sentence_ends(tokenizer) -> list[int]:
    """Ids of the tokens that end a sentence: `.`, `!`, `?`, also with a quotation mark or bracket behind."""
    return [i for token, i in tokenizer.get_vocab().items() if re.fullmatch(r"[.!?]+[\"')”]*", token)]


def openings(data: Path) -> tuple[list[str], list[str]]:
    """(training, held-out): the first PROMPT_WORDS words of long sentences of the books, in random order."""
    found: tuple[list[str], list[str]] = ([], [])
    texts = sources(data)
    for book in BOOKS:
        for documents, prompts in zip(split(texts[book]), found, strict=True):
            for document in documents:
                for sentence in re.split(r"(?<=[.!?])\s+", document):
                    words = sentence.split()
                    if len(words) >= 1.5 * PROMPT_WORDS and re.match("[A-Z]", sentence):
                        prompts.append(" ".join(words[:PROMPT_WORDS]))
    return tuple([p[i] for i in np.random.default_rng(SEED).permutation(len(p))] for p in found)


@torch.no_grad()
def answers(model, tokenizer, prompts: list[str], each: int, batch: int = 512) -> list[list[list[int]]]:
    """The ids of `each` sampled ends of every prompt's sentence, temperature 1, at most ANSWER_TOKENS."""
    ends, found = sentence_ends(tokenizer), []
    for start in range(0, len(prompts), batch // each):
        rows = [p for p in prompts[start : start + batch // each] for _ in range(each)]
        inputs = tokenizer(rows, return_tensors="pt", padding=True)
        output = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=ANSWER_TOKENS,
                                eos_token_id=[tokenizer.eos_token_id, *ends])  # fmt: skip
        new = output[:, inputs.input_ids.shape[1] :].tolist()
        new = [[i for i in row if i != tokenizer.eos_token_id] for row in new]
        found += [new[i : i + each] for i in range(0, len(new), each)]
        print(f"{len(found):,} of {len(prompts):,} prompts answered", flush=True)
    return found


def preferences(tokenizer, prompts: list[str], answered: list[list[list[int]]]) -> list[dict[str, str]]:
    """Pairs of answers to one prompt, the first chosen with probability sigmoid(difference of the rewards)."""
    rng, rows = np.random.default_rng(SEED), []
    for prompt, ids in zip(prompts, answered, strict=True):
        before = tokenizer(prompt)["input_ids"]
        texts = [text.removeprefix(prompt) for text in tokenizer.batch_decode([before + row for row in ids])]
        for a, b in zip(texts[::2], texts[1::2], strict=True):
            difference = plainness(a) - plainness(b)
            # An answer that goes on within the prompt's last word would change the prompt's tokens.
            if difference and all(re.match(r"[ ,;:.!?]", text) for text in (a, b)):
                if rng.random() > 1 / (1 + np.exp(-difference)):
                    a, b = b, a
                rows.append({"prompt": prompt, "chosen": a, "rejected": b})
    return rows


def make_pairs(data: Path, out: Path) -> None:
    tokenizer, model = load_tokenizer(), load("mini")
    train, held_out = openings(data)
    torch.manual_seed(SEED)
    (out / "pairs").mkdir(parents=True, exist_ok=True)
    for name, prompts in (("train", train[:PROMPTS]), ("held-out", held_out[:HELD_OUT_PROMPTS])):
        rows = preferences(tokenizer, prompts, answers(model, tokenizer, prompts, ANSWERS))
        (out / "pairs" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
        right = np.mean([plainness(r["chosen"]) > plainness(r["rejected"]) for r in rows])
        print(f"{name}: {len(rows):,} pairs of {len(prompts):,} prompts, {right:.0%} chose the greater reward")


# --- training ---


def settings(out: Path, name: str, rate: float, epochs: int) -> dict[str, Any]:
    """What both trainers of trl are given."""
    cuda = torch.cuda.is_available()
    return dict(
        output_dir=str(out / f"{name}.checkpoints"), learning_rate=rate, num_train_epochs=epochs, seed=SEED,
        per_device_train_batch_size=BATCH, warmup_steps=0.1,
        lr_scheduler_type="linear", max_length=128, gradient_checkpointing=False, bf16=True, use_cpu=not cuda,
        logging_steps=20, save_strategy="no", report_to="none",
    )  # fmt: skip


def save(trainer: Any, out: Path, name: str, about: dict[str, Any], clock: float) -> None:
    """OUT/NAME and OUT/NAME.training.json, with the last evaluation."""
    figures = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
    trainer.model.bfloat16().save_pretrained(out / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(lp.pocket("mini")) / file, out / name / file)
    about |= {"minutes": (time.time() - clock) / 60, "steps": trainer.state.global_step,
              "device": trainer.args.device.type, "date": time.strftime("%Y-%m-%d"), "held_out": figures}  # fmt: skip
    (out / f"{name}.training.json").write_text(json.dumps(about, indent=1))
    print(json.dumps(about, indent=1))


def train_expert(data: Path, out: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    lines = (data / "style/headlines.txt").read_text(encoding="utf-8").splitlines()
    train = Dataset.from_dict({"text": [line for i, line in enumerate(lines) if i % 10 != 5]})
    held_out = Dataset.from_dict({"text": [line for i, line in enumerate(lines) if i % 10 == 5]})
    args = SFTConfig(**settings(out, "mini-expert", EXPERT_LEARNING_RATE, EXPERT_EPOCHS))
    clock = time.time()
    trainer = SFTTrainer(
        model=load("mini"), args=args, train_dataset=train, eval_dataset=held_out,
        processing_class=load_tokenizer(),
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    save(trainer, out, "mini-expert", {"documents": len(train), "held_out_before": before}, clock)


def train_preference(out: Path, name: str, reverse: bool, beta: float) -> None:
    """DPO on the pairs; with `reverse` chosen and rejected are swapped. The reference is `mini`."""
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    files = {"train": str(out / "pairs/train.jsonl"), "test": str(out / "pairs/held-out.jsonl")}
    rows = load_dataset("json", data_files=files)
    train = rows["train"]
    if reverse:
        train = train.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    args = DPOConfig(**settings(out, name, LEARNING_RATE, EPOCHS), beta=beta)
    clock = time.time()
    trainer = DPOTrainer(
        model=load("mini"), ref_model=load("mini"), args=args, train_dataset=train, eval_dataset=rows["test"],
        processing_class=load_tokenizer(),
    )  # fmt: skip
    trainer.train()
    save(trainer, out, name, {"pairs": len(train), "beta": beta}, clock)


# --- installation ---

MODELS = ("mini-expert", "mini-dpo", "mini-reverse-dpo")
CARD = """
## Fine-tuned members

Made from `mini` by `examples/fine_tune_pocket.py` with trl (bfloat16 autocast, batch {batch}, seed {seed}).

| model | trained on | epochs, steps | learning rate | device, time | date |
|---|---|---|---|---|---|
| `mini-expert` | {documents:,} news headlines (MIT), next token | {expert_run} |
| `mini-dpo` | {pairs:,} pairs, DPO with beta {beta:g}, reference `mini` | {dpo_run} |
| `mini-reverse-dpo` | the same pairs, chosen and rejected swapped | {reverse_run} |

The headlines left out (every tenth) have perplexity {before:.0f} under `mini`, {after:.1f} under `mini-expert`.

The pairs: the first {prompt_words} words of a sentence of bronte, darwin or dubois (public domain), finished by
`mini` at temperature 1, at most {tokens} tokens; of two answers the one with more *plainness* (short words, see
`logitproc.bundled.plainness`) is chosen with probability sigmoid(difference). On {held_out:,} pairs of held-out
prompts:

| model | reward margin | chosen preferred | log-ratio to `mini`: chosen | rejected |
|---|---|---|---|---|
{preference}

Margin and log-ratios in nats; the margin is beta times the difference of the log-ratios. The total variation
between the two models is 0 before training and {tvd:.3f} after it, a mean over the tokens of the chosen answers.
"""


@torch.no_grad()
def total_variation(rows: list[dict[str, str]]) -> float:
    """Between the two preference models, a mean over the tokens of the chosen answers."""
    tokenizer, models = load_tokenizer(), [load(name) for name in MODELS[1:]]
    values = []
    for row in rows:
        start = len(tokenizer(row["prompt"])["input_ids"]) - 1
        ids = tokenizer(row["prompt"] + row["chosen"], return_tensors="pt")["input_ids"]
        p, q = (model(ids).logits[0, start:-1].softmax(-1) for model in models)
        values.append((p - q).abs().sum(-1) / 2)
    return float(torch.cat(values).mean())


def install(out: Path) -> None:
    """Copy the models into `logitproc/pocket` and write their section of the model card."""
    pocket = Path(lp.pocket("mini")).parent
    about = {name: json.loads((out / f"{name}.training.json").read_text()) for name in MODELS}
    for name in MODELS:
        shutil.rmtree(pocket / name, ignore_errors=True)
        shutil.copytree(out / name, pocket / name)
        (pocket / name / "model.safetensors").chmod(0o644)  # it was written for its owner alone
    held_out = [json.loads(line) for line in (out / "pairs/held-out.jsonl").read_text("utf-8").splitlines()]
    expert, dpo, reverse = about.values()

    def run(about: dict[str, Any], epochs: int, rate: float) -> str:
        where = f"{about['device']}, {about['minutes']:.0f} min | {about['date']}"
        return f"{epochs}, {about['steps']:,} | {rate:g} | {where}"

    line = "| `{}` | {:+.3f} | {:.0%} | {:+.2f} | {:+.2f} |"
    preference = "\n".join(
        line.format(name, h["rewards/margins"], h["rewards/accuracies"],
                    h["rewards/chosen"] / BETA, h["rewards/rejected"] / BETA)  # fmt: skip
        for name, h in ((name, about[name]["held_out"]) for name in MODELS[1:])
    )
    section = CARD.format(
        batch=BATCH, seed=SEED, documents=expert["documents"], pairs=dpo["pairs"], beta=BETA,
        expert_run=run(expert, EXPERT_EPOCHS, EXPERT_LEARNING_RATE), dpo_run=run(dpo, EPOCHS, LEARNING_RATE),
        reverse_run=run(reverse, EPOCHS, LEARNING_RATE), before=np.exp(expert["held_out_before"]),
        after=np.exp(expert["held_out"]["loss"]), prompt_words=PROMPT_WORDS, tokens=ANSWER_TOKENS,
        held_out=len(held_out), preference=preference, tvd=total_variation(held_out),
    )  # fmt: skip
    card = pocket / "MODEL_CARD.md"
    above = card.read_text(encoding="utf-8").partition("\n## Fine-tuned members")[0]
    card.write_text(above.rstrip() + "\n" + section, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("expert", "pairs", "dpo", "reverse", "install"))
    parser.add_argument("--data", type=Path, help="for expert and pairs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--beta", type=float, default=BETA)
    parser.add_argument("--name", help="of a further preference model")
    args = parser.parse_args()
    if args.command == "expert":
        train_expert(args.data, args.out)
    elif args.command == "pairs":
        make_pairs(args.data, args.out)
    elif args.command == "install":
        install(args.out)
    else:
        reverse = args.command == "reverse"
        train_preference(args.out, args.name or ("mini-reverse-dpo" if reverse else "mini-dpo"), reverse, args.beta)

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
BETA, LEARNING_RATE, BATCH, EPOCHS = 0.1, 2e-4, 64, 2
EXPERT_LEARNING_RATE, EXPERT_EPOCHS = 1e-3, 4


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
        new = [[i for i in row if i != tokenizer.eos_token_id] for row in output[:, inputs.input_ids.shape[1] :].tolist()]
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
        per_device_train_batch_size=BATCH // 4, gradient_accumulation_steps=4, warmup_steps=0.1,
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

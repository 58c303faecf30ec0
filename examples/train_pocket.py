"""Train the bundled models: tokenizer, `base`, `mini`, and their model card.

    python examples/train_pocket.py tokenizer --data DATA --out runs/pocket
    python examples/train_pocket.py train base --data DATA --out runs/pocket --tokens 14e6
    python examples/train_pocket.py card --data DATA --out runs/pocket

DATA holds `text/`, `arxiv/` and `tasks/gsm8k/` (see SOURCES). Only text that is public domain, CC0 or
MIT is read. Don Quixote, the headlines and the arXiv category stat.ME are never read: they are the
styles that the studies steer to. Every twentieth document of every source is held out.

Training resumes from the last checkpoint in OUT. The schedule is warm-up, constant, linear decay over
the last part; windows double in length for the decay, which is when the model learns its full context.
`--tokens` may be changed between resumes: it only moves the start of the decay.
"""

import argparse
import csv
import itertools
import json
import lzma
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

VOCABULARY, WINDOW, CONTEXT, SEED = 8192, 256, 512, 0
DECAY, WARMUP_STEPS, LEARNING_RATE = 0.3, 100, 4e-3
ROWS = {"bronte": 3, "darwin": 3, "dubois": 2, "shakespeare": 1, "arxiv": 5, "gsm8k": 2}  # one batch
SIZES = {
    "base": dict(hidden_size=256, num_hidden_layers=6, intermediate_size=704, num_attention_heads=8),
    "mini": dict(hidden_size=128, num_hidden_layers=4, intermediate_size=320, num_attention_heads=4),
}
HELD_OUT_EVERY = 20
ARXIV_FILES = ("cs.CL", "cs.CR", "cs.NE", "cs.HC")
ARXIV_EXCLUDED = "stat.ME"

# --- text ---


def paragraphs(text: str, keep_lines: bool = False) -> list[str]:
    """Split at blank lines; hard-wrapped lines are joined unless they are verse."""
    blocks = re.split(r"\n\s*\n", text.replace("\r", ""))
    joint = "\n" if keep_lines else " "
    cleaned = (joint.join(" ".join(line.split()) for line in b.splitlines()) for b in blocks)
    return [b.strip() for b in cleaned if b.strip()]


def blocks_of(lines: list[str], characters: int) -> list[str]:
    """Runs of consecutive paragraphs of at least `characters`, so that held-out text is contiguous."""
    documents, run = [], []
    for line in lines:
        run.append(line)
        if sum(map(len, run)) >= characters:
            documents.append("\n".join(run))
            run = []
    return documents + (["\n".join(run)] if run else [])


def arxiv_abstracts(folder: Path) -> list[str]:
    seen, documents = set(), []
    csv.field_size_limit(sys.maxsize)
    for name in ARXIV_FILES:
        with lzma.open(folder / f"{name}.tsv.xz", "rt", encoding="utf-8") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                categories = (row["categories"] or "").split(",")
                if row["arxiv_id"] in seen or ARXIV_EXCLUDED in categories or not row["abstract"]:
                    continue
                seen.add(row["arxiv_id"])
                documents.append(" ".join(row["abstract"].split()))
    return documents


def gsm8k(path: Path) -> list[str]:
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    strip = re.compile(r"<<[^>]*>>|\n#### .*")
    return [strip.sub("", f"{row['question']}\n{row['answer']}") for row in rows]


def sources(data: Path) -> dict[str, list[str]]:
    """Name -> documents, in a fixed order."""
    text = data / "text"
    read = lambda name: (text / name).read_text(encoding="utf-8", errors="replace")
    return {
        **{n: blocks_of(paragraphs(read(f"{n}.txt")), 4000) for n in ("bronte", "darwin", "dubois")},
        "shakespeare": blocks_of(paragraphs(read("tinyshakespeare.txt"), keep_lines=True), 4000),
        "arxiv": arxiv_abstracts(data / "arxiv"),
        "gsm8k": gsm8k(data / "tasks/gsm8k/train.jsonl"),
    }


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """(training, held-out): every HELD_OUT_EVERY-th document is held out."""
    train = [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY]
    return train, documents[::HELD_OUT_EVERY]


# --- tokenizer ---


def train_tokenizer(data: Path, out: Path) -> None:
    import sentencepiece as spm
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    def lines():
        for documents in sources(data).values():
            rng = np.random.default_rng(SEED)
            train = split(documents)[0]
            for i in rng.permutation(len(train))[: 4000]:
                yield from train[i].split("\n")

    folder = out / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "tokenizer.model", "wb") as file:
        spm.SentencePieceTrainer.train(
            sentence_iterator=lines(), model_writer=file, vocab_size=VOCABULARY, model_type="bpe",
            byte_fallback=True, split_digits=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, character_coverage=0.9995, max_sentence_length=100_000,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=2,
        )  # fmt: skip
    pieces = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocab = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    merged = [i for i in vocab.values() if not (pieces.is_control(i) or pieces.is_byte(i) or i == 0)]
    scores = {pieces.id_to_piece(i): pieces.get_score(i) for i in merged}
    tokenizer = LlamaTokenizer(vocab, generate_merges(vocab, scores), pad_token="</s>")
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"  # transformers indents it; every bundled model carries a copy
    compact = json.dumps(json.loads(file.read_text("utf-8")), ensure_ascii=False, separators=(",", ":"))
    file.write_text(compact, "utf-8")


def load_tokenizer(out: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(out / "tokenizer")


def token_streams(data: Path, out: Path) -> dict[str, np.ndarray]:
    """Training documents of each source as one stream `<s> document </s> <s> ...`, cached in OUT."""
    cache = out / "tokens.npz"
    if not cache.exists():
        tokenizer, streams = load_tokenizer(out), {}
        for name, documents in sources(data).items():
            train = split(documents)[0]
            order = np.random.default_rng(SEED).permutation(len(train))
            ids = tokenizer([train[i] for i in order], verbose=False)["input_ids"]
            eos = [tokenizer.eos_token_id]
            streams[name] = np.fromiter(
                itertools.chain.from_iterable(itertools.chain(d, eos) for d in ids), dtype=np.uint16
            )
        np.savez(cache, **streams)
    return dict(np.load(cache))


# --- training ---


def batch(streams: dict[str, np.ndarray], step: int, window: int) -> torch.Tensor:
    """[rows, window + 1] tokens of a step: each source is read window by window, reshuffled every epoch.

    A function of the step alone, so a resumed run sees the batches of an uninterrupted one.
    """
    rows = []
    for source, (name, count) in enumerate(ROWS.items()):
        windows = (len(streams[name]) - 1) // window
        for i in range(step * count, (step + 1) * count):
            epoch, position = divmod(i, windows)
            order = np.random.default_rng([SEED, source, epoch, window]).permutation(windows)
            start = order[position] * window
            rows.append(streams[name][start : start + window + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def optimizers(model) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(name: str, data: Path, out: Path, tokens: float, compiled: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(SEED)
    heads = SIZES[name]["num_attention_heads"]
    config = LlamaConfig(
        **SIZES[name], num_key_value_heads=heads // 2, vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    model.config.use_cache = False
    opts = optimizers(model)
    state = {"seen": 0, "steps": 0, "long_steps": 0, "seconds": 0.0, "losses": []}
    checkpoint = out / f"{name}.checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        for opt, s in zip(opts, saved["optimizers"], strict=True):
            opt.load_state_dict(s)
        state = saved["state"]
    streams = token_streams(data, out)
    forward = torch.compile(model) if compiled else model
    clock = time.time()
    while state["seen"] < tokens:
        left = (tokens - state["seen"]) / tokens / DECAY  # < 1 inside the decay
        window = WINDOW if left >= 1 else CONTEXT
        rate = LEARNING_RATE * min(1.0, left, (state["steps"] + 1) / WARMUP_STEPS)
        ids = batch(streams, state["steps"] if left >= 1 else state["long_steps"], window).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = forward(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = rate
            opt.step()
            opt.zero_grad(set_to_none=True)
        state["seen"] += ids[:, 1:].numel()
        state["steps" if left >= 1 else "long_steps"] += 1
        done = state["steps"] + state["long_steps"]
        state["losses"].append(loss.item())
        if done % 50 == 0 or state["seen"] >= tokens:
            state["seconds"] += time.time() - clock
            clock = time.time()
            recent = np.mean(state["losses"][-50:])
            speed = state["seen"] / state["seconds"]
            print(f"{name} step {done} tokens {state['seen']:,} loss {recent:.3f} lr {rate:.2e} {speed:.0f} tok/s", flush=True)
        if done % 200 == 0 or state["seen"] >= tokens:
            saved = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts], "state": state}
            torch.save(saved, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    model.config.use_cache = True
    model.bfloat16().save_pretrained(out / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(out / "tokenizer" / file, out / name / file)
    summary = {k: state[k] for k in ("seen", "steps", "long_steps", "seconds")}
    summary |= {"date": time.strftime("%Y-%m-%d"), "parameters": sum(p.numel() for p in model.parameters()),
                "final_loss": float(np.mean(state["losses"][-50:])), "device": device}  # fmt: skip
    (out / f"{name}.training.json").write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("tokenizer", "train", "card"))
    parser.add_argument("model", nargs="?", choices=tuple(SIZES))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=14e6)
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    args = parser.parse_args()
    if args.command == "tokenizer":
        train_tokenizer(args.data, args.out)
    elif args.command == "train":
        train(args.model, args.data, args.out, args.tokens, args.compiled)

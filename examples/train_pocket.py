"""Train the bundled models: tokenizer, `base`, `mini`, the `quixote` priors, and their model card.

    python examples/train_pocket.py tokenizer --data DATA --out runs/pocket
    python examples/train_pocket.py train base --data DATA --out runs/pocket --tokens 12e6
    python examples/train_pocket.py train mini --data DATA --out runs/pocket --tokens 6e6
    python examples/train_pocket.py styles --data DATA --out runs/pocket
    python examples/train_pocket.py install --data DATA --out runs/pocket

`styles` writes the three style corpora of the studies as JSON lines, a training and a held-out part each.
`install` copies models, tokenizer and priors into `logitproc/pocket` and writes the model card with the
held-out figures of every source. Further members of the family go into SIZES and PARTS.

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
            for i in rng.permutation(len(train))[:4000]:
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
    """Training documents of each source as one stream `document </s> document </s> ...`, cached in OUT."""
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

    def loss_of(ids: torch.Tensor) -> torch.Tensor:  # the loss too: unfused, its passes over the logits cost a third
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(input_ids=ids[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    step = torch.compile(loss_of) if compiled else loss_of
    clock = time.time()
    while state["seen"] < tokens:
        left = (tokens - state["seen"]) / tokens / DECAY  # < 1 inside the decay
        window = WINDOW if left >= 1 else CONTEXT
        rate = LEARNING_RATE * min(1.0, left, (state["steps"] + 1) / WARMUP_STEPS)
        ids = batch(streams, state["steps"] if left >= 1 else state["long_steps"], window).to(device)
        loss = step(ids)
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
            print(
                f"{name} step {done} tokens {state['seen']:,} loss {recent:.3f} lr {rate:.2e} {speed:.0f} tok/s",
                flush=True,
            )
        if done % 200 == 0 or state["seen"] >= tokens:
            saved = {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in opts],
                "state": state,
            }
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


# --- styles and priors ---


def quixote_chapters(path: Path) -> list[str]:
    """The chapters of both volumes, without contents, prefaces and the notes of the edition."""
    text = path.read_text(encoding="utf-8").replace("\r", "")
    chapters = []
    for volume in text.split("\nVOLUME I")[1:]:  # VOLUME I. and VOLUME II.
        end = re.search(r"\nEND OF PART I\.|\n *End of the Project Gutenberg", volume)
        parts = re.split(r"\nCHAPTER [IVXLC]+\.\s*\n", volume[: end.start() if end else None])[1:]
        # The first paragraph is the heading in capitals.
        chapters += ["\n".join(paragraphs(part)[1:]) for part in parts]
    return chapters


def abstracts(path: Path) -> list[str]:
    csv.field_size_limit(sys.maxsize)
    with lzma.open(path, "rt", encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return [" ".join(row["abstract"].split()) for row in rows if row["abstract"]]


def write_styles(data: Path, out: Path) -> None:
    """OUT/styles/NAME/{train,held-out}.jsonl: every tenth document is held out."""
    styles = {
        "quixote": quixote_chapters(data / "style/don_quixote.txt"),
        "headlines": (data / "style/headlines.txt").read_text(encoding="utf-8").splitlines(),
        "arxiv": abstracts(data / f"arxiv/{ARXIV_EXCLUDED}.tsv.xz"),
        # What the models were trained on, thinned: the background that `ratio` divides out.
        "neutral": [d for documents in sources(data).values() for d in split(documents)[0][::10]],
    }
    for name, documents in styles.items():
        parts = {
            "train": [d for i, d in enumerate(documents) if i % 10 != 5],
            "held-out": [d for i, d in enumerate(documents) if i % 10 == 5],
        }
        folder = out / "styles" / name
        folder.mkdir(parents=True, exist_ok=True)
        for part, chosen in parts.items():
            lines = (json.dumps({"text": d}) + "\n" for d in chosen)
            (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
            print(f"{folder / part}.jsonl: {len(chosen):,} documents, {sum(map(len, chosen)):,} characters")


# --- installation ---

PARTS = ("base", "mini")
CARD = """# Bundled models

Tiny causal language models with one tokenizer, for offline use, examples and tests. They write sentences
that read as English, made-up words among them, and know nothing. Licence: Apache-2.0, like the library.

| model | parameters | layers x hidden | trained on | final training loss | device, time | date |
|---|---|---|---|---|---|---|
{models}

Llama architecture, context {context} tokens, tied embeddings, bfloat16; sentencepiece BPE of {vocabulary} pieces
with byte fallback. Trained by `examples/train_pocket.py` (Muon and AdamW, learning rate {rate}, {rows} windows a
step, seed {seed}); every twentieth document of every source is held out.

## Training text

| source | documents | share of a batch | licence |
|---|---|---|---|
{sources}

Not in the training text of these two: Don Quixote, the news headlines and the arXiv category {excluded}, which
the studies steer to.

## Held-out figures

Perplexity a token | bits a byte, on the held-out documents (at most {limit:,} characters of each source),
windows of {context} tokens with stride {stride}.

| source | {names} |
|---|{dashes}
{held_out}

## Priors

`quixote` counts n-grams of orders 1 to 3 of Don Quixote (Ormsby's translation, public domain), every tenth
chapter left out; `quixote-held-out` counts the chapters left out, to score style on text that steers nothing.
"""
LICENCES = {
    "bronte": "public domain", "darwin": "public domain", "dubois": "public domain",
    "shakespeare": "public domain", "arxiv": "CC0 (abstracts of cs.CL, cs.CR, cs.NE, cs.HC)", "gsm8k": "MIT",
}  # fmt: skip
CARD_LIMIT, CARD_STRIDE = 400_000, 256


def held_out_figures(data: Path, out: Path) -> dict[str, dict[str, str]]:
    """Source -> model -> "perplexity | bits per byte"."""
    from transformers import AutoModelForCausalLM

    import logitproc as lp
    from logitproc.scoring import score_corpus

    tokenizer, figures = load_tokenizer(out), {}
    for name, documents in sources(data).items():
        held_out, size = [], 0
        for document in split(documents)[1]:
            if size < CARD_LIMIT:
                held_out.append(document)
                size += len(document)
        figures[name] = {}
        for part in PARTS:
            model = AutoModelForCausalLM.from_pretrained(out / part, dtype=torch.float32)
            report = score_corpus(
                model, tokenizer, lp.Chain(), held_out, context=CONTEXT, stride=CARD_STRIDE, batch_size=16,
                divergence=False,
            )  # fmt: skip
            figures[name][part] = f"{report.perplexity():.1f} \\| {report.bits_per_byte():.3f}"
    return figures


def install(data: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    import logitproc as lp

    pocket = Path(lp.__file__).parent / "pocket"
    for part in PARTS:
        shutil.rmtree(pocket / part, ignore_errors=True)
        shutil.copytree(out / part, pocket / part)
        (pocket / part / "model.safetensors").chmod(0o644)  # it was written for its owner alone
    shutil.copy(out / "tokenizer" / "tokenizer.model", pocket / "base" / "tokenizer.model")
    tokenizer = AutoTokenizer.from_pretrained(pocket / "base")  # whose name the priors remember
    for name, part in (("quixote", "train"), ("quixote-held-out", "held-out")):
        lp.NGramPrior.fit(out / f"styles/quixote/{part}.jsonl", tokenizer, out=pocket / name, force=True)
    models = []
    for part in PARTS:
        t = json.loads((out / f"{part}.training.json").read_text())
        size = f"{SIZES[part]['num_hidden_layers']} x {SIZES[part]['hidden_size']}"
        models.append(f"| `{part}` | {t['parameters']:,} | {size} | {t['seen']:,} tokens | {t['final_loss']:.2f} "
                      f"| {t['device']}, {t['seconds'] / 60:.0f} min | {t['date']} |")  # fmt: skip
    texts, figures = sources(data), held_out_figures(data, out)
    total = sum(ROWS.values())
    (pocket / "MODEL_CARD.md").write_text(CARD.format(
        models="\n".join(models), context=CONTEXT, vocabulary=VOCABULARY, rate=LEARNING_RATE, rows=total,
        seed=SEED, excluded=ARXIV_EXCLUDED, limit=CARD_LIMIT, stride=CARD_STRIDE, dashes="---|" * len(PARTS),
        names=" | ".join(f"`{p}`" for p in PARTS),
        sources="\n".join(f"| {n} | {len(texts[n]):,} | {ROWS[n] / total:.0%} | {LICENCES[n]} |" for n in ROWS),
        held_out="\n".join(f"| {n} | {' | '.join(figures[n].values())} |" for n in ROWS),
    ), encoding="utf-8")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("tokenizer", "train", "styles", "install"))
    parser.add_argument("model", nargs="?", choices=tuple(SIZES))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=12e6)
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    args = parser.parse_args()
    if args.command == "tokenizer":
        train_tokenizer(args.data, args.out)
    elif args.command == "train":
        train(args.model, args.data, args.out, args.tokens, args.compiled)
    elif args.command == "styles":
        write_styles(args.data, args.out)
    else:
        install(args.data, args.out)

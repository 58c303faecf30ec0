"""What a method costs: every figure beside its baseline, both measured in turns in the same run.

    python eval/speed.py                                    steps, chains, generation, scoring
    python eval/speed.py --fit corpus.txt --megabytes 100   counting a corpus, and nothing else
    python eval/speed.py --busy --rounds 20                 on a machine that others use: one thread, its own CPU time
    python eval/speed.py --json speed.json

Ratios are what to read; microseconds belong to this machine on this day. Scores are random normal numbers, in
buffers that rotate so that caches do not flatter; the prior is the bundled `quixote` (real counts), its ids
spread over the vocabulary. Each row is the median of many rounds, with the quartiles of the ratio.
"""

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Call = Callable[[int], Any]  # takes the number of the round, to pick a buffer

CLOCK: Callable[[], float] = time.perf_counter  # seconds
ROUNDS = 200

# (what, against what, vocabulary, batch) -> the ratio that the project holds itself to
BOUNDS = {
    ("ngram paper", "RepetitionPenalty", 32_000, 1): 3.0,
    ("ngram lift", "RepetitionPenalty", 32_000, 1): 3.0,
    ("ngram paper", "scores.clone()", 151_936, 8): 1.5,
    ("ngram lift", "scores.clone()", 151_936, 8): 1.5,
    ("ngram backoff", "log_softmax", 32_000, 1): 3.0,
    ("ngram backoff", "log_softmax", 151_936, 8): 3.0,
    ("Chain of 5 no-ops", "list of 1 no-op", 32_000, 1): 1.0,
    ("generate with aligndistil", "generate", 8192, 8): 2.0,
    ("fusion newton", "3 log_softmax", 151_936, 8): 2.0,
    ("fusion newton", "its rows one by one", 151_936, 32): 1.0,
    ("suppression paper", "scores.clone()", 151_936, 8): 1.5,
    ("suppression ratio", "scores.clone()", 151_936, 8): 1.5,
    ("suppression dry", "scores.clone()", 151_936, 8): 1.5,
}


def compare(ours: Call, theirs: Call, rounds: int | None = None, calls: int = 5) -> dict[str, float]:
    """Median microseconds a call of both, and the quartiles of their ratio round by round."""
    times: list[list[float]] = [[], []]
    rounds = rounds or ROUNDS
    for i in range(rounds + rounds // 10 + 1):
        for which, call in enumerate((ours, theirs)):
            start = CLOCK()
            for j in range(calls):
                call(i * calls + j)
            times[which].append((CLOCK() - start) / calls * 1e6)
    import numpy as np

    a, b = np.array(times)[:, -rounds:]
    low, middle, high = np.percentile(a / b, [25, 50, 75])
    return {"us": float(np.median(a)), "baseline_us": float(np.median(b)), "ratio": float(middle),
            "ratio_25": float(low), "ratio_75": float(high)}  # fmt: skip


def spread_prior(vocabulary: int) -> Any:
    """The bundled prior with its ids spread over a larger vocabulary, order kept."""
    import numpy as np

    from logitproc import NGramPrior
    from logitproc.prior import Order

    prior = NGramPrior.load("quixote")
    rng = np.random.default_rng(0)
    new = np.sort(rng.choice(vocabulary, prior.vocab_size, replace=False))
    new = np.append(new, vocabulary)  # the start of a document
    orders = []
    for o in prior.orders:
        oldest = new[o.oldest] if orders else o.oldest
        keys = o.parent * (vocabulary + 2) + oldest if orders else o.keys
        orders.append(Order(keys, o.parent, oldest, o.indptr, new[o.ids]))
    about = prior.tokenizer | {"vocab_size": vocabulary, "special": new[prior.tokenizer["special"]].tolist(),
                               "bos": None, "eos": int(new[prior.tokenizer["eos"]])}  # fmt: skip
    return NGramPrior(about, orders, prior.counts, documents=prior.documents, tokens=prior.tokens)


def steps(length: int = 256, buffers: int = 8) -> list[dict]:
    """One step of each rule, and of chains, beside transformers' own work on the same tensors."""
    import torch
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    from logitproc import Chain, NGramStyleLogitsProcessor, Processor
    from logitproc.methods.ngram import OFF

    class NoOp(Processor):
        def step(self, tokens, scores):
            return scores

    rows = []
    for vocabulary, batch in ((32_000, 1), (32_000, 8), (151_936, 1), (151_936, 8)):
        prior = spread_prior(vocabulary)
        generator = torch.Generator().manual_seed(0)
        scores = [3 * torch.randn(batch, vocabulary, generator=generator) for _ in range(buffers)]
        # Histories are real text: the contexts of the prior itself, so that all orders match.
        o = prior.orders[2]
        newest = prior.orders[1].oldest[o.parent]
        pick = torch.randint(0, len(o.keys), (buffers, batch, length // 2), generator=generator).numpy()
        ids = [
            torch.stack([torch.from_numpy(o.oldest[p]), torch.from_numpy(newest[p])], -1).flatten(1)
            for p in pick
        ]
        ids = [x.clamp(max=vocabulary - 1) for x in ids]
        z = lambda i, s=scores: s[i % buffers]
        t = lambda i, s=ids: s[i % buffers]
        penalty = RepetitionPenaltyLogitsProcessor(1.1)
        baselines: dict[str, Call] = {
            "RepetitionPenalty": lambda i, z=z, t=t, p=penalty: p(t(i), z(i)),
            "scores.clone()": lambda i, z=z: z(i).clone(),
            "log_softmax": lambda i, z=z: z(i).log_softmax(-1),
        }
        for label, options in (("ngram paper", {"rule": "paper"}), ("ngram lift", {"rule": "lift"}),
                               ("ngram backoff", {"rule": "backoff", **OFF}), ("ngram default", {})):  # fmt: skip
            chain = Chain([NGramStyleLogitsProcessor(prior, **options)])
            for name, baseline in baselines.items():
                result = compare(lambda i, c=chain, z=z, t=t: c(t(i), z(i)), baseline)
                rows.append(
                    {"what": label, "against": name, "vocabulary": vocabulary, "batch": batch} | result
                )
        five = Chain([NoOp() for _ in range(5)])
        for count in (1, 5):
            plain = LogitsProcessorList([NoOp() for _ in range(count)])
            result = compare(
                lambda i, z=z, t=t, p=five: p(t(i), z(i)), lambda i, z=z, t=t, p=plain: p(t(i), z(i))
            )
            name = "list of 1 no-op" if count == 1 else "list of 5 no-ops"
            rows.append({"what": "Chain of 5 no-ops", "against": name, "vocabulary": vocabulary,
                         "batch": batch} | result)  # fmt: skip
    return rows


def suppression_steps(items: int = 2000, length: int = 60, buffers: int = 8) -> list[dict]:
    """One step of each rule after `items` texts, and an update of the ledger with 10,000 tokens.

    The texts are cut from a pool of phrases, and histories from the texts, so that many of them match.
    """
    import numpy as np
    import torch

    from logitproc import Chain, NGramPrior, SuppressionLogitsProcessor, TokenLedger

    rows = []
    for vocabulary, batch in ((32_000, 8), (151_936, 8)):
        rng = np.random.default_rng(0)
        draw = lambda *shape, v=vocabulary, rng=rng: np.minimum(rng.zipf(1.2, shape), v - 1)
        phrases = draw(5000, 6)
        texts = phrases[np.minimum(rng.zipf(1.3, (items, length // 6)), 4999)].reshape(items, length)
        about = {"fingerprint": "", "name": "ids", "vocab_size": vocabulary, "bos": None, "eos": 0, "special": [0]}
        ledger = TokenLedger(about, texts=True)
        ledger.update(texts)
        reference = NGramPrior.from_ids(draw(items, length).tolist(), order=1, vocab_size=vocabulary)
        generator = torch.Generator().manual_seed(0)
        scores = [3 * torch.randn(batch, vocabulary, generator=generator) for _ in range(buffers)]
        ids = [torch.from_numpy(texts[rng.integers(items, size=batch), : length - 7]) for _ in range(buffers)]
        z = lambda i, s=scores: s[i % buffers]
        size = {"vocabulary": vocabulary, "batch": batch}
        for rule, options in (("paper", {}), ("ratio", {"reference": reference}), ("dry", {})):
            chain = Chain([SuppressionLogitsProcessor(ledger, rule=rule, **options)])
            result = compare(lambda i, c=chain, z=z, t=ids: c(t[i % buffers], z(i)), lambda i, z=z: z(i).clone())
            rows.append({"what": f"suppression {rule}", "against": "scores.clone()"} | size | result)
        new = [draw(100, 100).tolist() for _ in range(buffers)]
        counts = TokenLedger(about)
        result = compare(lambda i, c=counts, new=new: c.update(new[i % buffers], "a", i),
                         lambda i, new=new: np.concatenate(new[i % buffers]), rounds=40, calls=1)  # fmt: skip
        rows.append({"what": "ledger, 10,000 tokens", "against": "np.concatenate"} | size | result)
    return rows


def aligndistil_steps(device: str, buffers: int = 8) -> list[dict]:
    """The teacher of each coefficient on given scores, and generation with one companion of the host's size."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import logitproc as lp
    from logitproc.methods.aligndistil import teacher

    settings = {"adaptive": {}, "constant": {"coefficient": 1.0}, "masked": {"plausibility": 0.1},
                "kl_cap": {"kl_cap": 0.2}}  # fmt: skip
    rows = []
    for vocabulary in (32_000, 151_936):
        generator = torch.Generator().manual_seed(0)
        scores = [3 * torch.randn(8, vocabulary, generator=generator).to(device) for _ in range(buffers)]
        z = lambda i, s=scores: s[i % buffers]
        for label, given in settings.items():
            result = compare(
                lambda i, z=z, given=given: teacher(z(i), z(i + 1), z(i), **given),
                lambda i, z=z: z(i).log_softmax(-1), rounds=20, calls=2,
            )  # fmt: skip
            rows.append({"what": f"aligndistil {label}", "against": "log_softmax", "vocabulary": vocabulary,
                         "batch": 8} | result)  # fmt: skip

    host = lp.pocket("mini-dpo")
    model = AutoModelForCausalLM.from_pretrained(host, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(host)
    chain = lp.Chain.from_spec([{"name": "aligndistil", "reverse": {"model": "mini-reverse-dpo", "dtype": "float32"}}])
    prompt = tokenizer(["The road was long"] * 8, return_tensors="pt").to(device)

    def generated(i: int, chain: Any) -> None:
        torch.manual_seed(i)
        lp.generate(model, chain, **prompt, do_sample=True, top_k=0, min_new_tokens=64, max_new_tokens=64)

    result = compare(lambda i: generated(i, chain), lambda i: generated(i, lp.Chain()), 6, 1)
    about = {"what": "generate with aligndistil", "against": "generate", "vocabulary": tokenizer.vocab_size}
    return [*rows, about | {"batch": 8} | result]


def fusion_steps(buffers: int = 4) -> list[dict]:
    """Solving alpha and fusing, beside one `log_softmax` of each of the three tensors; and rows one by one.

    Logits fall off as 1.1 ln(rank), with noise, tokens in random order: an invented language model.
    """
    import torch

    from logitproc.methods.fusion import UPSCALED, candidates, fuse, mix

    rows = []
    for vocabulary, batch in ((32_000, 8), (151_936, 8), (151_936, 32)):
        random = torch.Generator().manual_seed(0)
        noise = lambda n=batch, v=vocabulary, g=random: torch.randn(n, v, generator=g)
        falling = -1.1 * torch.arange(1, vocabulary + 1).log()
        given = []
        for _ in range(buffers if batch < 32 else 1):
            order = torch.stack([torch.randperm(vocabulary, generator=random) for _ in range(batch)])
            host = falling[order] + noise()
            base = host + noise()
            given.append((host, base, base + 0.5 * noise()))
        three = lambda i, g=given: [x.log_softmax(-1) for x in g[i % len(g)]]

        def solve(i: int, mode: Any, g: Any = given, part: slice = slice(None)) -> None:
            host, base, expert = (x[part] for x in g[i % len(g)])
            fuse(host, base, [expert], mode)

        def mixed(i: int, g: Any = given, n: int = batch) -> None:
            host, base, expert = g[i % len(g)]
            mix(candidates(host, base, [expert], (), UPSCALED), torch.zeros(n, 1 + len(UPSCALED)))

        size = {"vocabulary": vocabulary, "batch": batch}
        if batch < 32:
            for mode in ("newton", "grid", "match"):
                result = compare(lambda i, m=mode, f=solve: f(i, m), three, rounds=20, calls=1)
                rows.append({"what": f"fusion {mode}", "against": "3 log_softmax"} | size | result)
            rows.append({"what": "fusion mixture", "against": "3 log_softmax"} | size
                        | compare(mixed, three, rounds=20, calls=1))  # fmt: skip
            continue

        def singly(i: int, f: Any = solve, n: int = batch) -> None:
            for row in range(n):
                f(i, "newton", part=slice(row, row + 1))

        result = compare(lambda i, f=solve: f(i, "newton"), singly, rounds=10, calls=1)
        rows.append({"what": "fusion newton", "against": "its rows one by one"} | size | result)
    return rows


def whole_jobs(device: str) -> list[dict]:
    """Scoring and generation with the bundled model, through the default chain, beside the bare model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import logitproc as lp
    from logitproc.scoring import score_tokens

    model = AutoModelForCausalLM.from_pretrained(lp.pocket("base"), dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(lp.pocket("base"))
    rows = []
    torch.manual_seed(0)  # what is scored is text of the model itself
    start = torch.full((32, 1), tokenizer.bos_token_id, device=device)
    ids = model.generate(start, do_sample=True, top_k=0, min_new_tokens=512, max_new_tokens=512).view(4, 8, 513)
    prompt = tokenizer(["The road was long"] * 8, return_tensors="pt").to(device)
    for rule in ("lift", "backoff"):
        chain = lp.Chain.from_spec([{"name": "ngram", "prior": "quixote", "rule": rule}])

        def bare(i: int) -> None:
            with torch.no_grad():
                model(input_ids=ids[i % 4, :, :-1], use_cache=False)

        def scored(i: int, chain: Any = chain) -> None:
            score_tokens(model, chain, ids[i % 4], divergence=False)

        def generated(i: int, chain: Any) -> None:
            torch.manual_seed(i)
            lp.generate(model, chain, **prompt, do_sample=True, top_k=0, min_new_tokens=64, max_new_tokens=64)

        tokens = {"vocabulary": tokenizer.vocab_size, "batch": 8}
        result = compare(scored, bare, rounds=8, calls=1)
        rows.append({"what": f"perplexity through ngram {rule}", "against": "bare forward"} | tokens | result)
        result = compare(lambda i, c=chain: generated(i, c), lambda i: generated(i, lp.Chain()), 6, 1)
        rows.append({"what": f"generate with ngram {rule}", "against": "generate"} | tokens | result)
    return rows


def documents_of(corpus: Path, megabytes: float) -> Iterator[str]:
    """The lines of a file, again and again until so many megabytes are read: in pass r > 0 the second half of
    each line is that of another line, r * 1,000 lines before, so that text goes on bringing new n-grams."""
    from collections import deque

    size, passes = 0, 0
    while True:
        ends: deque[str] = deque(maxlen=1000 * passes or 1)
        with corpus.open(encoding="utf-8") as file:
            for line in file:
                half = line.find(" ", len(line) // 2) + 1
                text = line[:half] + ends[0] if passes and ends else line
                ends.append(line[half:])
                size += len(text.encode())
                yield text
                if size >= megabytes * 1e6:
                    return
        passes += 1


def fit(corpus: Path, megabytes: float) -> dict[str, float]:
    """Count a corpus at order 3 with the bundled tokenizer: seconds, tokens a second, peak memory.

    `counted` is the peak until the prior is on the disk; the rest is that of reading it, which holds all of it.
    """
    import tempfile

    from transformers import AutoTokenizer

    from logitproc import NGramPrior, bundled

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    class Unread(NGramPrior):
        @classmethod
        def load(cls, folder: Any, base: Any = None) -> Any:
            return peak()

    tokenizer, before = AutoTokenizer.from_pretrained(bundled.pocket("base")), peak()
    with tempfile.TemporaryDirectory() as folder:
        start = CLOCK()
        counted = Unread.fit(documents_of(corpus, megabytes), tokenizer, order=3, out=f"{folder}/prior")
        on_disk = CLOCK() - start
        prior = NGramPrior.load(f"{folder}/prior")
        seconds = CLOCK() - start
    return {"megabytes": megabytes, "tokens": prior.tokens, "n_grams": sum(len(o.ids) for o in prior.orders),
            "seconds": seconds, "seconds_to_disk": on_disk, "tokens_per_second": prior.tokens / seconds,
            "gigabytes_before": before, "gigabytes_counted": counted, "gigabytes_read": peak()}  # fmt: skip


def table(rows: list[dict]) -> str:
    head = f"{'':32} {'against':20} {'V':>8} {'batch':>5} {'us':>10} {'ratio':>7}  quartiles     bound"
    lines = [head]
    for r in rows:
        bound = BOUNDS.get((r["what"], r["against"], r["vocabulary"], r["batch"]))
        verdict = "" if bound is None else f"{bound:g} {'ok' if r['ratio'] <= bound else 'MISSED'}"
        lines.append(
            f"{r['what']:32} {r['against']:20} {r['vocabulary']:>8} {r['batch']:>5} {r['us']:>10.1f} "
            f"{r['ratio']:>7.2f}  {r['ratio_25']:.2f}-{r['ratio_75']:.2f}     {verdict}"
        )
    return "\n".join(lines)


PARTS: dict[str, Callable[[str], list[dict]]] = {
    "steps": lambda device: steps(), "suppression": lambda device: suppression_steps(),
    "aligndistil": aligndistil_steps, "fusion": lambda device: fusion_steps(), "jobs": whole_jobs,
}  # fmt: skip


def main() -> None:
    global CLOCK, ROUNDS
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--fit", type=Path, metavar="CORPUS", help="a text file, one document a line")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--megabytes", type=float, default=100.0, help="how much of it, read again where it is less")
    parser.add_argument("--busy", action="store_true", help="one thread, and its CPU time instead of the clock's")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each comparison of steps")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import torch

    ROUNDS = args.rounds
    if args.busy:
        CLOCK = time.process_time
        torch.set_num_threads(1)

    from logitproc.artifact import write_text

    document: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "device": args.device, "clock": CLOCK.__name__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    if args.fit:
        document["fit"] = fit(args.fit, args.megabytes)
        print("fit: " + ", ".join(f"{k} {v:,.2f}" for k, v in document["fit"].items()))
    else:
        with torch.inference_mode():
            document["rows"] = [row for part in args.parts for row in PARTS[part](args.device)]
        print(table(document["rows"]))
    if args.json:
        write_text(args.json, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

"""Output heads beside the dense one: what they cost on held-out text, how fast they are, whether exact ones are exact.

    python eval/heads.py quality --data calibration.txt --held-out other.txt --codes 512 1024 2048 4096 --out runs/heads
    python eval/heads.py timing --shapes llama-3-8b --out runs/heads      random weights in the shapes of known models
    python eval/heads.py fitting --shapes llama-3-8b --codes 1024 --out runs/heads     how long a fit takes there
    python eval/heads.py exact --held-out other.txt --out runs/heads      real hidden states and adversarial ones

`quality` fits every kind for every number of codes, and the published head with as many numbers as the weighted one has
(its bias bought as further codes). `--widen V` adds rows that the text never uses: noisy copies of real ones, 15 nats
lower, so that the head is as wide as those of large models while the text stays real.

Rules, fixed before the runs: perplexity within +4 % is a ratio of at most 1.04 on held-out text; a speed-up is that of
the median time from h to V logits against the fastest dense product (`linear` in float32 where that is no larger than
64 MiB, `linear` and `mv` in bfloat16, and the same in large pages), with caches flushed before every call and all sides
in turn; an exact head fails with a single different token. Beside it stands what a bare reading pass over the same
bytes takes in turn. Two of these were mended after a first round of figures: `mv`, which is faster than the `linear`
that models call, was not among the products; and caches were flushed by writing, so that whoever read first paid for
writing that back, which short calls could hardly do. Now they are flushed by reading, as a model's body leaves them.

`--busy`: one thread, and its CPU time instead of the clock's, for a machine that others use.

States of `timing` are h = noise + a w_t / ||w_t||, noise of unit variance, for a random token t, whose logit
is about `a` standard deviations above the mean of all. At a = 0 a state means nothing, the worst case of exact heads.
"""

import argparse
import ctypes
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stopwatch import Stopwatch
from torch import Tensor, nn

from logitproc import cli
from logitproc.artifact import write_text
from logitproc.bundled import find_model
from logitproc.heads import (
    KINDS,
    Calibration,
    DenseHead,
    ExactHead,
    Int4Head,
    Int8Head,
    RefinedHead,
    Statistics,
    VQHead,
    attach,
    evaluate,
    load_converted,
    tie_floor_min,
)
from logitproc.ops import cpu, native

SHAPES = {
    "llama-3-8b": (128_256, 4096), "qwen2.5-0.5b": (151_936, 896), "tinyllama": (32_000, 2048),
    "gemma-2-2b": (256_000, 2304), "base widened": (131_072, 256), "base widened more": (256_000, 256),
    "largest": (256_000, 8192),
}  # fmt: skip
KIND_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "paper": ("paper", {}), "distilled paper": ("distilled", {"start": "paper"}), "weighted": ("weighted", {}),
    "distilled": ("distilled", {}), "tiebreak": ("tiebreak", {"rank": 16}), "residual": ("residual", {"books": 2}),
}  # fmt: skip
BOUND, SPEED = 1.04, 6.0
ADVERSARIAL, PROMPTS = 2000, 20  # states, and texts that are generated
_FLUSH = 600 << 20  # bytes read before a call: more than all caches hold
CLOCK: Callable[[], float] = time.perf_counter

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    global CLOCK
    args = _arguments(argv)
    if args.busy:
        torch.set_num_threads(1)
        CLOCK = time.thread_time
    try:
        with torch.inference_mode(False), torch.no_grad():
            rows = args.run(args)
    except Exception as error:
        if args.debug:
            raise
        sentence, status = cli.explain(error)
        print(f"heads: {sentence}", file=sys.stderr)
        return status
    out = Path(args.out)
    write_text(out / f"{args.study}.json", "".join(json.dumps(row) + "\n" for row in rows))
    print(_table(rows))
    if args.study == "quality" and args.plot:
        _plot(rows, out / "quality.png")
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    studies = parser.add_subparsers(dest="study", required=True)
    for run in (quality, timing, fitting, exact):
        study = studies.add_parser(run.__name__)
        study.set_defaults(run=run)
        study.add_argument("--out", required=True, metavar="FOLDER")
        study.add_argument("--debug", action="store_true")
        study.add_argument("--repeats", type=int, default=15, help="timed calls a side (default: 15, 0: none)")
        study.add_argument("--busy", action="store_true", help="one thread, and its CPU time instead of the clock's")
        if run is timing:
            study.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
        if run in (timing, fitting):
            study.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES)[:5])
            study.add_argument("--codes", type=int, nargs="+", default=[4096])
            study.add_argument("--heads", nargs="+", default=["weighted", "int8", "int4", "exact_int8", "exact_nested"])
            study.add_argument("--tops", type=float, nargs="+", default=[0, 5, 6, 7, 8, 9, 10], metavar="A")
            study.add_argument("--states", type=int, default=8192)
            study.add_argument("--batches", type=int, nargs="+", default=[1, 8])
            continue
        study.add_argument("--model", default="base")
        study.add_argument("--held-out", required=True, metavar="FILE")
        study.add_argument("--held-out-tokens", type=int, default=10_000)
        study.add_argument("--widen", type=int, default=0, metavar="V")
        if run is quality:
            study.add_argument("--data", required=True, metavar="FILE", help="calibration text")
            study.add_argument("--tokens", type=int, default=1 << 16)
            study.add_argument("--codes", type=int, nargs="+", default=[512, 1024, 2048, 4096])
            study.add_argument("--kinds", nargs="+", choices=KIND_SETTINGS, default=list(KIND_SETTINGS))
            study.add_argument("--plot", action="store_true")
    return parser.parse_args(argv)


# --- quality ---


def quality(args: argparse.Namespace) -> list[Row]:
    """Perplexity ratio, KL, agreement, distinct tokens, floors, numbers, bytes and time of every head."""
    reading, held = _readings(args, args.data, args.tokens), _readings(args, args.held_out, args.held_out_tokens)
    dense = DenseHead.of(held.weight, held.bias)
    width, d = held.weight.shape
    pbar = Statistics.of(held).probability
    rows: list[Row] = []

    def judge(name: str, codes: int, head: nn.Module, seconds: float) -> None:
        figures = evaluate(head, held)
        about = getattr(head, "about", {})
        rows.append({
            "head": name, "codes": codes, "numbers": head.num_float_params(), "bytes": head.bytes_per_step(),
            **figures._asdict(), "floor_min": tie_floor_min(pbar, codes) if codes else 0.0,
            **{key: (about.get("floors") or {}).get(key) for key in ("floor", "within", "information")},
            **_against(head, dense, held.states[:64], args.repeats), "fit_seconds": seconds,
        })  # fmt: skip
        print(_table(rows[-1:]), file=sys.stderr)

    judge("dense", 0, dense, 0.0)
    judge("int8", 0, Int8Head.of(held.weight), 0.0)
    if width % 16 == 0 == d % 32:
        judge("int4", 0, Int4Head.of(held.weight), 0.0)
    for directions in (d // 8, d // 4):
        began, best = time.perf_counter(), width // 64
        head = VQHead.fit(_Stub(held.weight), reading, screened=directions, refine=best)
        judge(f"screened {directions}, refine {best}", 0, head, time.perf_counter() - began)
    for codes in args.codes:
        for name in args.kinds:
            kind, options = KIND_SETTINGS[name]
            # The published head gets the numbers of a bias as further codes.
            size = codes + width // d if name == "distilled paper" else codes
            began = time.perf_counter()
            head = VQHead.fit(_Stub(held.weight), reading, codes=size, kind=kind, **options)
            judge(name, size, head, time.perf_counter() - began)
            if name == "weighted":
                for best in (width // 64, width // 16):
                    judge(f"weighted, refine {best}", codes, RefinedHead.of(head, held.weight, best=best), 0.0)
    _verdicts(rows)
    return rows


def _verdicts(rows: list[Row]) -> None:
    """What the rules say of the rows, on standard error."""
    for row in rows:
        if row["head"] == "distilled":
            paper = [r for r in rows if r["head"] == "distilled paper" and r["numbers"] == row["numbers"]]
            for other in paper:
                wins = "beats" if row["kl"] < other["kl"] else "LOSES TO"
                print(f"K = {row['codes']}: KL {row['kl']:.4f} {wins} {other['kl']:.4f} of paper", file=sys.stderr)
    within = [row for row in rows if row["perplexity_ratio"] <= BOUND and row["head"] != "dense"]
    best = max((row for row in within if "speedup" in row), key=lambda row: row["speedup"], default=None)
    if best:
        met = "met" if best["speedup"] >= SPEED else "MISSED"
        print(
            f"Fastest within +4 %: {best['head']} K = {best['codes']}, {best['speedup']:.1f}x "
            f"({SPEED:g}x {met})", file=sys.stderr,
        )  # fmt: skip


class _Stub:
    """A model of which only the output layer is asked for."""

    def __init__(self, weight: Tensor):
        self.head = nn.Linear(1, 1)
        self.head.weight = nn.Parameter(weight, requires_grad=False)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def _readings(args: argparse.Namespace, file: str, tokens: int) -> Calibration:
    from transformers import AutoTokenizer

    source = find_model(args.model)
    model, tokenizer = load_converted(source, dtype="auto"), AutoTokenizer.from_pretrained(source)
    context = min(256, model.config.max_position_embeddings - 1)
    reading = Calibration.collect(model, file, tokenizer, tokens=tokens, context=context)
    if args.widen > len(reading.weight):
        kept = Path(args.out) / "lower.pt"
        if not kept.exists():  # made of the calibration text, which is read first
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save(_lower(reading.states.double()), kept)
        reading = dataclasses.replace(reading, weight=widened(reading.weight, torch.load(kept), args.widen))
    return reading


def _lower(states: Tensor, nats: float = 15.0) -> Tensor:
    """The row [d] whose logit is `nats` on average over the states [T, d], with the least mean square."""
    mean, products = states.mean(0), states.T @ states / len(states)
    row = torch.linalg.solve(products + 1e-6 * products.diagonal().mean() * torch.eye(len(mean)).double(), mean)
    return nats * row / (row @ mean)


def widened(weight: Tensor, lower: Tensor, width: int) -> Tensor:
    """weight [V, d] with noisy copies of its rows appended, less `lower` [d]: [width, d]."""
    random = torch.Generator().manual_seed(0)
    source = torch.randint(0, len(weight), (width - len(weight),), generator=random)
    rows = weight[source].float()
    noise = torch.randn(rows.shape, generator=random) * rows.std(1, keepdim=True) * 0.3
    return torch.cat([weight, (rows + noise - lower.float()).to(weight.dtype)])


# --- timing ---


def timing(args: argparse.Namespace) -> list[Row]:
    """Time from h to V logits, random weights, beside the bare reading of the same bytes; exact heads at every top."""
    rows: list[Row] = []
    for shape in args.shapes:
        weight, random = _random_weight(*SHAPES[shape])
        there = weight.to(args.device)
        dense, large = DenseHead.of(there), DenseHead.of(_in_large_pages(there))
        for name, head in _heads(args, weight, random):
            head = head.to(args.device)
            for batch in args.batches:
                for top in args.tops if isinstance(head, ExactHead) else args.tops[-1:]:
                    states = _states(weight, random, args.repeats + 2 + batch, top).to(args.device)
                    row = {"shape": shape, "head": name, "batch": batch, "top": top}
                    row |= _speed(head, [dense, large], states, args.repeats, batch)
                    rows.append(row)
                    print(_table(rows[-1:]), file=sys.stderr)
    return rows


def fitting(args: argparse.Namespace) -> list[Row]:
    """Seconds of `VQHead.fit`, from `--states` random states that are given, and the most memory it took."""
    import resource

    rows: list[Row] = []
    for shape in args.shapes:
        weight, random = _random_weight(*SHAPES[shape])
        states = _states(weight, random, args.states, 8.0)
        labels = torch.randint(0, len(weight), (args.states,), generator=random)
        reading = Calibration(weight, None, states, labels, {"vocab_size": len(weight)})
        for codes in args.codes:
            began = time.perf_counter()
            VQHead.fit(_Stub(weight), reading, codes=codes, report=lambda progress: print(*progress, file=sys.stderr))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            rows.append({
                "shape": shape, "codes": codes, "states": args.states, "seconds": time.perf_counter() - began,
                "peak_gb": peak,
            })  # fmt: skip
    return rows


def _heads(args: argparse.Namespace, weight: Tensor, random: torch.Generator) -> Any:
    width, d = weight.shape
    built: ExactHead | None = None
    for name in args.heads:
        if name == "weighted":
            for codes in args.codes:
                mapping = torch.randint(0, codes, (width,), generator=random)
                bias = torch.randn(width, generator=random)
                yield f"weighted K={codes}", KINDS["weighted"].build(weight[:codes], mapping, bias)  # type: ignore
        elif name in ("int8", "int4"):
            yield name, (Int8Head if name == "int8" else Int4Head).of(weight)
        else:
            own = nn.Linear(1, 1)
            own.weight, own.in_features, own.out_features, own.bias = nn.Parameter(weight, False), d, width, None
            began = time.perf_counter()
            if built is None:
                built = ExactHead.of(own, name)
                print(f"planes made in {time.perf_counter() - began:.0f} s", file=sys.stderr)
                yield name, built
            else:  # the same planes serve both kinds
                with torch.device("meta"):
                    other: Any = KINDS[name](**built.spec)
                other.load_state_dict(built.state_dict(), assign=True)
                yield name, other


def _random_weight(width: int, d: int) -> tuple[Tensor, torch.Generator]:
    random = torch.Generator().manual_seed(0)
    weight = torch.empty(width, d, dtype=torch.bfloat16)
    for block in weight.split(8192):
        block.normal_(0, d**-0.5, generator=random)
    return weight, random


def _states(weight: Tensor, random: torch.Generator, n: int, top: float) -> Tensor:
    """n states of which one logit stands about `top` standard deviations above the mean; see the head of this file."""
    rows = weight[torch.randint(0, len(weight), (n,), generator=random)].float()
    noise = torch.randn(n, weight.shape[1], generator=random)
    return (noise + top * rows / rows.norm(dim=1, keepdim=True)).to(weight.dtype)


def _in_large_pages(tensor: Tensor) -> Tensor:
    """A copy, held in pages of 2 MiB where the system can do that: a kernel may read it faster."""
    if tensor.device.type != "cpu":
        return tensor
    copy = tensor.clone()
    cpu.hold_in_large_pages(copy)
    return copy


def _bare(weight: Tensor, size: int) -> Callable[[Tensor], Any]:
    """A call that does nothing but read `size` bytes; on a GPU, and without a compiler, a sum."""
    held = _in_large_pages(weight.flatten().view(torch.uint8)[:size])
    reader = native.load(Path(__file__).with_name("read.cpp")) if held.device.type == "cpu" else None
    if reader is None:
        words = held[: size // 8 * 8].view(torch.int64)
        return lambda hidden: words.sum()
    arguments = (ctypes.c_void_p(held.data_ptr()), *map(ctypes.c_int64, (held.nbytes, torch.get_num_threads())))
    return lambda hidden: (held, reader.read_bytes(*arguments))


def _against(head: nn.Module, dense: DenseHead, states: Tensor, repeats: int) -> Row:
    """Milliseconds of the head and of the fastest dense product, batch 1, and their ratio; no repeats, no figures."""
    if not repeats:
        return {}
    found = _speed(head, [dense, DenseHead.of(_in_large_pages(dense.weight))], states, repeats)
    return {key: found[key] for key in ("ms", "dense_ms", "speedup")}


def _speed(head: nn.Module, dense: list[DenseHead], states: Tensor, repeats: int, batch: int = 1) -> Row:
    """Median milliseconds: the head (and its mean, which fallbacks raise), dense products, a pass over its bytes."""
    weight, size = dense[0].weight, head.bytes_per_step(batch)
    calls: list[Callable[[Tensor], Any]] = [head.top if isinstance(head, ExactHead) else head, *dense]
    if weight.nbytes <= 64 << 20:  # a float32 copy of a large head reads twice the bytes
        wide = weight.float()
        calls.append(lambda h: nn.functional.linear(h.float(), wide))
    if batch == 1:
        calls += [lambda h, rows=head.weight: torch.mv(rows, h[0]) for head in dense]  # type: ignore[misc]
    calls.append(_bare(weight, size))
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 2):
        if turn == 2 and isinstance(head, ExactHead):
            head.reset_counters()
        at = turn % (len(states) - batch + 1)
        for call, seconds in zip(calls, times, strict=True):
            seconds.append(_seconds(call, states[at : at + batch]))
    ours, *theirs, bare = (statistics.median(seconds[2:]) * 1e3 for seconds in times)
    found = {
        "ms": ours, "mean_ms": statistics.mean(times[0][2:]) * 1e3, "dense_ms": min(theirs),
        "dense_small_pages_ms": theirs[0], "speedup": min(theirs) / ours, "bytes": size, "bare_ms": bare,
    }  # fmt: skip
    if isinstance(head, ExactHead):  # of a row
        counts = head.counters
        found |= {key: counts[key] / counts["rows"] for key in ("first", "second", "ambiguous", "overflow")}
    return found


@functools.cache
def _scratch(device: torch.device) -> Tensor:
    return torch.ones(_FLUSH // 8, dtype=torch.int64, device=device)  # zeros may be no memory at all


def _seconds(call: Callable[[Tensor], Any], hidden: Tensor) -> float:
    _scratch(hidden.device).sum()
    return Stopwatch(hidden.device, CLOCK).seconds(lambda i: call(hidden))


# --- exactness ---


def exact(args: argparse.Namespace) -> list[Row]:
    """How many greedy tokens of exact heads differ from the dense head's: real states, adversarial ones, generation."""
    held = _readings(args, args.held_out, args.held_out_tokens)
    twins = held.weight.clone()
    twins[1::10] = twins[::10][: len(twins[1::10])]  # every tenth row twice: exact ties
    cases = (("real", held.weight, held.states), ("adversarial", twins, _adversarial(twins, held.states)))
    rows: list[Row] = []
    for kind in ("exact_nested", "exact_int8"):
        for dtype in (torch.bfloat16, torch.float32):
            for name, weight, states in cases:
                own = nn.Linear(1, 1, bias=False)
                own.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
                own.out_features, own.in_features = weight.shape
                head = ExactHead.of(own, kind)
                wrong = sum(int(head.top(h[None]).argmax() != own(h[None]).argmax()) for h in states.to(dtype))
                shares = {key: head.counters[key] / len(states) for key in ("ambiguous", "overflow", "special")}
                mean = {f"mean_{key}": head.counters[key] / len(states) for key in ("first", "second")}
                rows.append({
                    "head": kind, "dtype": str(dtype)[6:], "states": name, "steps": len(states), "wrong": wrong,
                    **shares, **mean,
                })  # fmt: skip
                print(_table(rows[-1:]), file=sys.stderr)
    return rows + _generations(args)


def _generations(args: argparse.Namespace, new: int = 64) -> list[Row]:
    """Greedy text of the held-out file's beginning in pieces: through exact heads and dense, tokens a second."""
    from transformers import AutoTokenizer

    source = find_model(args.model)
    model, tokenizer = load_converted(source, dtype="auto"), AutoTokenizer.from_pretrained(source)
    ids = tokenizer(Path(args.held_out).read_text(encoding="utf-8")[:20_000], verbose=False)["input_ids"]
    inputs = [torch.tensor([ids[i * 32 : i * 32 + 32]]) for i in range(min(PROMPTS, len(ids) // 32))]

    def run() -> tuple[list[list[int]], float]:
        began = time.perf_counter()
        texts = [
            model.generate(x, attention_mask=torch.ones_like(x), do_sample=False, max_new_tokens=new)[0].tolist()
            for x in inputs
        ]
        return texts, sum(len(text) - 32 for text in texts) / (time.perf_counter() - began)

    run()
    expected, dense = run()
    rows: list[Row] = []
    for kind in ("exact_nested", "exact_int8"):
        head = ExactHead.of(model, kind)
        with attach(model, head):
            found, rate = run()
        wrong = sum(a != b for one, other in zip(expected, found, strict=True) for a, b in zip(one, other, strict=True))
        rows.append({
            "head": kind, "dtype": str(model.dtype)[6:], "states": "generated", "steps": head.counters["rows"],
            "wrong": wrong, "tokens_per_second": rate, "dense_tokens_per_second": dense,
        })  # fmt: skip
    return rows


def _adversarial(weight: Tensor, states: Tensor) -> Tensor:
    """States at which two tokens far above the others have the same logit up to rounding; outliers, tiny, huge ones."""
    random = torch.Generator().manual_seed(0)
    pairs = torch.randint(0, len(weight), (2, ADVERSARIAL), generator=random)
    pairs[1, ::2] = pairs[0, ::2] // 10 * 10 + 1  # half of them beside rows that stand twice
    a, b = weight[pairs[0]].double(), weight[pairs[1].clamp(max=len(weight) - 1)].double()
    h = states[torch.randint(0, len(states), (ADVERSARIAL,), generator=random)].double()
    h[::5, 3] += 100
    h = h + 8 * (a + b) / (a + b).norm(dim=1, keepdim=True).clamp(min=1e-6)
    difference = a - b
    h = h - difference * ((h * difference).sum(1) / difference.square().sum(1).clamp(min=1e-12))[:, None]
    h[1::5] *= 1e-3
    h[2::5] *= 1e3
    return h.float()


# --- output ---


def _table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(key for row in rows for key in row))
    show = lambda value: f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    cells = [names, *([show(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    for name in dict.fromkeys(row["head"] for row in rows if row["head"] != "dense"):
        points = [(row["speedup"], row["perplexity_ratio"]) for row in rows if row["head"] == name]
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=name)
    paper = [row for row in rows if row["head"] == "paper"]
    floors = [(row["speedup"], 2.718281828 ** row["floor_min"]) for row in paper]
    if floors:
        axes.plot(*zip(*sorted(floors), strict=True), "k:", label="exp(floor_min), at the speed of paper")
    axes.axhline(BOUND, color="grey", linewidth=0.8)
    axes.axvline(SPEED, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="speed-up over the dense head, batch 1", ylabel="perplexity / dense")
    for axis in (axes.xaxis, axes.yaxis):  # plain numbers, not powers of ten
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())

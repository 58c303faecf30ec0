"""What speculation gains: the large model alone, with fusion step by step, and with fusion speculatively.

    python eval/speculative.py passes                                   forward passes, two small models stacked
    python eval/speculative.py decode --headlines FILE --layers 6 12 24     greedy, tokens a second of every arm
    python eval/speculative.py decode --headlines FILE --layers 12 --do-sample
    python eval/speculative.py decode --headlines FILE --layers 6 --modes upscale "mixture:beta=[0,0.3]"

The host is the bundled `base`. A costlier host with the very distribution of `base` has more layers whose output
is 0: real acceptance at an honest cost. The prompts are the first four words of headlines that trained no expert
(FILE holds one a line; every tenth was left out). What is tuned is tuned on `--part dev`, figures are of `--part test`
and, when that had been used up, of `--part fresh`.
One thread, batch 1; every arm writes as many tokens as plain fusion until the end of the text, at most `--tokens`.
Times are CPU time of the process, which others on the machine disturb less; arms take turns prompt by prompt.
A ratio is that of tokens a second over all prompts, with a 95 % bootstrap interval over prompts, and the median.

Rules of judgement, fixed before the first run:
    plain        t(fused) <= 1.05 (1 + sum of t(small) / t(host)) t(alone), t of forward passes of one token
    speculative  with the length of drafts left to adapt, greedy, faster than the host alone wherever the host's
                 forward pass costs at least 4 of the drafter's: over all tokens, not by the median prompt
    lossless     greedy text equals that of plain fusion, but for ties within rounding
"""

import argparse
import copy
import functools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PLAIN_MARGIN = 1.05
FASTER_FROM = 4.0
DRAFTS = (2, 4, None)  # None: adapts
WORDS, PART, FRESH = 4, 60, 600  # of a prompt; prompts of dev and of test; of the part that is drawn from the rest


def openings(headlines: Path, part: str) -> list[str]:
    """The first words of headlines that `examples/fine_tune_pocket.py` left out, drawn once."""
    lines = headlines.read_text(encoding="utf-8").splitlines()[5::10]
    drawn = random.Random(0).sample(lines, 2 * PART)
    rest = [line for line in lines if line not in drawn]
    parts = {"dev": drawn[:PART], "test": drawn[PART:], "fresh": random.Random(0).sample(rest, min(FRESH, len(rest)))}
    return [" ".join(line.split()[:WORDS]) for line in parts[part]]


def costlier(model: Any, layers: int) -> Any:
    """The model with more layers, of which all that are added leave the residual stream as it is."""
    import torch

    model = copy.deepcopy(model)
    template = model.model.layers[-1]
    for index in range(len(model.model.layers), layers):
        layer = copy.deepcopy(template)
        layer.self_attn.layer_idx = index
        with torch.no_grad():
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.layers.append(layer)
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[0]] * layers
    return model


def load(name: str, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    from logitproc.bundled import find_model

    model = AutoModelForCausalLM.from_pretrained(find_model(name), dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    return model


# --- forward passes ---


def in_turns(calls: Sequence[Callable[[], Any]], rounds: int = 60) -> list[float]:
    """Median milliseconds of each call, made in turns as decoding does: they compete for the caches."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, spent in zip(calls, times, strict=True):
            start = time.process_time()
            call()
            spent.append(time.process_time() - start)
    return [1e3 * statistics.median(spent) for spent in times]


def passes_ms(models: Sequence[Any], tokens: int = 1, rows: int = 1, past: int = 64) -> list[float]:
    """Milliseconds of a forward pass of each model over so many tokens after `past` cached ones."""
    import torch
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randint(3, 8000, (rows, count), generator=generator)
    caches = [DynamicCache() for _ in models]

    def step(model: Any, cache: Any) -> None:
        model(draw(tokens), past_key_values=cache)
        cache.crop(-tokens)

    with torch.no_grad():
        for model, cache in zip(models, caches, strict=True):
            model(draw(past), past_key_values=cache)
        return in_turns([functools.partial(step, *pair) for pair in zip(models, caches, strict=True)])


def stacked_ms(models: Sequence[Any], rows: int = 1, past: int = 64) -> tuple[float, ...]:
    """Milliseconds of a pass of one token: one model after the other, stacked by vmap; largest difference."""
    import torch
    from torch.func import functional_call, stack_module_state, vmap
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 8000, (rows, past + 1), generator=generator)
    caches = [DynamicCache() for _ in models]
    skeleton, (parameters, buffers) = models[0], stack_module_state(list(models))

    def one(parameters: Any, buffers: Any, keys: Any, values: Any) -> Any:
        cache = DynamicCache()
        for index, (k, v) in enumerate(zip(keys, values, strict=True)):
            cache.update(k, v, index)
        given = {"input_ids": ids[:, -1:], "past_key_values": cache,
                 "position_ids": torch.full((rows, 1), past)}  # fmt: skip
        return functional_call(skeleton, (parameters, buffers), kwargs=given).logits

    def in_turn() -> list[Any]:
        out = [
            model(ids[:, -1:], past_key_values=cache).logits
            for model, cache in zip(models, caches, strict=True)
        ]
        for cache in caches:
            cache.crop(-1)
        return out

    with torch.no_grad():
        for model, cache in zip(models, caches, strict=True):
            model(ids[:, :-1], past_key_values=cache)
        layers = range(len(caches[0].layers))
        keys = [torch.stack([cache.layers[i].keys for cache in caches]) for i in layers]
        values = [torch.stack([cache.layers[i].values for cache in caches]) for i in layers]
        together = lambda: vmap(one)(parameters, buffers, keys, values)
        difference = float((together() - torch.stack(in_turn())).abs().max())
        return (*in_turns([in_turn, together]), difference)


def passes(args: argparse.Namespace) -> dict[str, Any]:
    base, small = load("base", args.dtype), load(args.base, args.dtype)
    rows = [
        {"model": name, "rows": n, "tokens": k, "ms": ms}
        for n in (1, 8)
        for k in (1, 3, 5, 7)
        for name, ms in zip(("base", args.base), passes_ms([base, small], k, n), strict=True)
    ]
    pair = [small, load(args.expert, args.dtype)]
    stacked = [dict(zip(("rows", "in_turn_ms", "vmap_ms", "difference"), (n, *stacked_ms(pair, n)), strict=True))
               for n in (1, 8)]  # fmt: skip
    for row in rows:
        print(f"{row['model']:12} rows {row['rows']}  tokens {row['tokens']}  {row['ms']:7.2f} ms")
    for row in stacked:
        print(
            f"two small models, rows {row['rows']}: in turn {row['in_turn_ms']:.2f} ms, "
            f"vmap {row['vmap_ms']:.2f} ms, difference {row['difference']:.1e}"
        )
    return {"passes": rows, "stacked": stacked}


# --- decoding ---


def decode(args: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoTokenizer

    import logitproc as lp
    from logitproc.chain import parse_processor

    tokenizer = AutoTokenizer.from_pretrained(lp.pocket("base"))
    texts = openings(args.headlines, args.part)[args.skip :][: args.prompts]
    prompts = [tokenizer(text, return_tensors="pt") for text in texts]
    base = load("base", args.dtype)
    expert, small = (lp.Companion(load(name, args.dtype), tokenizer) for name in (args.expert, args.base))
    fusion: Any = lp.get("fusion")
    rows: list[dict[str, Any]] = []
    for layers in args.layers:
        host = costlier(base, layers)
        host_ms, *small_ms = passes_ms([host, small.model, expert.model])
        costs = {"layers": layers, "host_ms": host_ms, "small_ms": sum(small_ms)}
        for mode in args.modes:
            given = parse_processor(mode)
            chain = lp.Chain([fusion(expert=expert, base=small, mode=given.pop("name"), **given)])
            arms: dict[str, Any] = {"alone": (lp.Chain(), None), "plain": (chain, None)}
            arms |= {"adapts" if n is None else str(n): (chain, lp.Speculation(tokens=n)) for n in DRAFTS}
            runs = decoded(host, arms, prompts, args, tokenizer.eos_token_id)
            found = [{**costs, "mode": mode, **figures(runs, arm)} for arm in arms]
            for row in found:
                print(line(row), flush=True)
            print(verdicts(found, mode), flush=True)
            rows += found
    return {"do_sample": args.do_sample, "part": args.part, "prompts": len(prompts), "rows": rows}


def decoded(
    host: Any, arms: dict[str, Any], prompts: list[Any], args: argparse.Namespace, eos: int
) -> dict[str, list[dict[str, Any]]]:
    """For each arm a record a prompt: CPU seconds, tokens, the text, and what became of the drafts."""
    import torch

    import logitproc as lp

    sampling = {"do_sample": True, "top_k": 0} if args.do_sample else {"do_sample": False}
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for number, prompt in enumerate([prompts[0], *prompts]):  # the first time warms up
        begun = prompt.input_ids.shape[1]
        torch.manual_seed(number)
        whole = lp.generate(
            host, arms["plain"][0], **prompt, max_new_tokens=args.tokens, eos_token_id=eos, **sampling
        )
        for arm, (chain, speculation) in arms.items():
            torch.manual_seed(number)
            start = time.process_time()
            text = lp.generate(
                host, chain, **prompt, speculative=speculation, max_new_tokens=whole.shape[1] - begun, **sampling
            )
            record = {"seconds": time.process_time() - start, "tokens": text.shape[1] - begun, "text": text}
            if speculation:
                record |= {key: getattr(speculation, key) for key in ("rounds", "drafted", "judged", "accepted")}
            if number:
                runs[arm].append(record)
    return runs


def figures(runs: dict[str, list[dict[str, Any]]], arm: str) -> dict[str, Any]:
    """Of one arm: tokens a second, and their ratio to those of the host alone."""
    import torch

    total = lambda key: sum(record.get(key, 0) for record in runs[arm])
    seconds = np.array([[record["seconds"] for record in runs[name]] for name in ("alone", arm)])
    draws = np.random.default_rng(0).integers(0, seconds.shape[1], (2000, seconds.shape[1]))
    low, high = np.percentile(seconds[0][draws].sum(1) / seconds[1][draws].sum(1), [2.5, 97.5])
    same = [torch.equal(a["text"], b["text"]) for a, b in zip(runs[arm], runs["plain"], strict=True)]
    return {
        "draft": arm, "tokens_per_second": total("tokens") / seconds[1].sum(),
        "speed": seconds[0].sum() / seconds[1].sum(), "speed_low": low, "speed_high": high,
        "median": float(np.median(seconds[0] / seconds[1])), "same": sum(same), "of": len(same),
        "acceptance": total("accepted") / total("judged") if total("judged") else None,
        "tokens_a_round": total("tokens") / total("rounds") if total("rounds") else None,
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    ratio = 2 * row["host_ms"] / row["small_ms"]
    drafts = "" if row["acceptance"] is None else (
        f"acceptance {row['acceptance']:.2f}  {row['tokens_a_round']:.2f} tokens a round  "
    )  # fmt: skip
    speed = f"x{row['speed']:.2f} [{row['speed_low']:.2f}, {row['speed_high']:.2f}] (median {row['median']:.2f})"
    return (
        f"layers {row['layers']:2}  host/small {ratio:5.1f}  {row['mode']:8} {row['draft']:6} "
        f"{row['tokens_per_second']:7.1f} tokens/s  {speed}  {drafts}same {row['same']}/{row['of']}"
    )


def verdicts(rows: list[dict[str, Any]], mode: str) -> str:
    """The rules at the top, for one host and one mode."""
    plain = next(row for row in rows if (row["mode"], row["draft"]) == (mode, "plain"))
    adapts = next(row for row in rows if (row["mode"], row["draft"]) == (mode, "adapts"))
    allowed = PLAIN_MARGIN * (1 + plain["small_ms"] / plain["host_ms"])
    ratio = 2 * plain["host_ms"] / plain["small_ms"]
    costs = f"plain costs {1 / plain['speed']:.2f} of alone, allowed {allowed:.2f}"
    wins = f"speculative x{adapts['speed']:.2f} at host/small {ratio:.1f}"
    asked = "" if ratio < FASTER_FROM else (" holds" if adapts["speed"] > 1 else " FAILS")
    return f"   {mode}: {costs}{'' if 1 / plain['speed'] <= allowed else ' MISSED'}; {wins}{asked}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("passes", "decode"))
    parser.add_argument("--expert", default="mini-expert")
    parser.add_argument("--base", default="mini", help="the small base model")
    parser.add_argument("--modes", nargs="+", default=["mixture", "newton"], metavar="MODE[:key=value,...]")
    parser.add_argument("--headlines", type=Path, help="style/headlines.txt of the study data")
    parser.add_argument("--part", choices=("dev", "test", "fresh"), default="test")
    parser.add_argument("--layers", nargs="+", type=int, default=[12, 24, 48], help="of the host")
    parser.add_argument("--prompts", type=int, default=PART, help="so many of the part")
    parser.add_argument("--skip", type=int, default=0, help="so many before them")
    parser.add_argument("--tokens", type=int, default=40, help="at most")
    parser.add_argument("--do-sample", action="store_true", help="at temperature 1")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.what == "decode" and args.headlines is None:
        parser.error("decode needs --headlines FILE")
    import torch

    from logitproc.artifact import write_text

    torch.set_num_threads(1)
    found = passes(args) if args.what == "passes" else decode(args)
    if args.json:
        write_text(args.json, json.dumps({"date": time.strftime("%Y-%m-%d"), **found}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

"""What speculation gains: the large model alone, with fusion step by step, and with fusion speculatively.

    python eval/speculative.py passes                                   forward passes, two small models stacked
    python eval/speculative.py decode --layers 6 12 24 48               greedy, tokens a second of every arm
    python eval/speculative.py decode --layers 6 12 24 48 --do-sample

The host is the bundled `base`. A costlier host with the very distribution of `base` has more layers whose output
is 0: real acceptance at an honest cost. One thread, batch 1, EOS off, so that all arms write as much. Times are CPU
time of the process, which others on the machine disturb less; arms take turns prompt by prompt; a ratio is the
median over prompts, with quartiles.

Rules of judgement, fixed before the first run:
    plain        t(fused) <= 1.05 (1 + sum of t(small) / t(host)) t(alone), t of forward passes of one token
    speculative  with the length of drafts left to adapt, greedy, faster than the host alone wherever the host's
                 forward pass costs at least 4 of the drafter's
    lossless     greedy text equals that of plain fusion, but for ties within rounding
"""

import argparse
import copy
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PLAIN_MARGIN = 1.05
FASTER_FROM = 4.0
DRAFTS = (2, 4, 6, None)  # None: adapts
# The bundled expert writes headlines.
OPENINGS = (
    "Stocks rise as", "The president says", "Police arrest two men", "New study finds", "Oil prices fall after",
    "Storm leaves thousands", "The court rules that", "Three dead in", "The senate passes", "How to cook",
    "Scientists discover a", "Why the city",
)  # fmt: skip


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
    import torch
    from transformers import AutoTokenizer

    import logitproc as lp

    tokenizer = AutoTokenizer.from_pretrained(lp.pocket("base"))
    prompts = [tokenizer(opening, return_tensors="pt") for opening in OPENINGS[: args.prompts]]
    base = load("base", args.dtype)
    expert, small = (lp.Companion(load(name, args.dtype), tokenizer) for name in (args.expert, args.base))
    fusion: Any = lp.get("fusion")
    chains = {mode: lp.Chain([fusion(expert=expert, base=small, mode=mode)]) for mode in args.modes}
    sampling = {"do_sample": True, "top_k": 0} if args.do_sample else {"do_sample": False}
    rows: list[dict[str, Any]] = []
    for layers in args.layers:
        host = costlier(base, layers)
        arms: dict[tuple[str, Any], Any] = {("alone", "-"): (lp.Chain(), None)}
        for mode, chain in chains.items():
            arms[mode, "plain"] = (chain, None)
            arms |= {(mode, tokens): (chain, lp.Speculation(tokens=tokens)) for tokens in DRAFTS}
        times: dict[Any, list[float]] = {arm: [] for arm in arms}
        counts: dict[Any, list[tuple[int, int]]] = {arm: [] for arm in arms}
        texts: dict[Any, list[Any]] = {arm: [] for arm in arms}
        for number, prompt in enumerate([prompts[0], *prompts]):  # the first time warms up
            for arm, (chain, speculation) in arms.items():
                torch.manual_seed(number)
                start = time.process_time()
                out = lp.generate(
                    host, chain, **prompt, speculative=speculation, max_new_tokens=args.tokens, **sampling
                )
                if number:
                    times[arm].append(time.process_time() - start)
                    texts[arm].append(out)
                    if speculation:
                        counts[arm].append((speculation.accepted, speculation.judged))
        host_ms, *small_ms = passes_ms([host, small.model, expert.model])
        for (mode, draft), seconds in times.items():
            ratios = sorted(a / b for a, b in zip(times["alone", "-"], seconds, strict=True))
            accepted, judged = (sum(column) for column in zip(*counts[mode, draft] or [(0, 0)], strict=True))
            same = [
                torch.equal(a, b)
                for a, b in zip(texts[mode, draft], texts.get((mode, "plain"), []), strict=False)
            ]
            rows.append({
                "layers": layers, "host_ms": host_ms, "small_ms": sum(small_ms), "mode": mode,
                "draft": "adapts" if draft is None else str(draft), "tokens_per_second":
                args.tokens * len(seconds) / sum(seconds), "speed": statistics.median(ratios),
                "speed_25": ratios[len(ratios) // 4], "speed_75": ratios[-1 - len(ratios) // 4],
                "acceptance": accepted / judged if judged else None, "same": sum(same), "of": len(same),
            })  # fmt: skip
            print(line(rows[-1]), flush=True)
        for mode in chains:
            print(verdicts([row for row in rows if row["layers"] == layers], mode), flush=True)
    return {"do_sample": args.do_sample, "rows": rows}


def line(row: dict[str, Any]) -> str:
    ratio = 2 * row["host_ms"] / row["small_ms"]
    acceptance = "" if row["acceptance"] is None else f"acceptance {row['acceptance']:.2f}"
    speed = f"x{row['speed']:.2f} [{row['speed_25']:.2f}, {row['speed_75']:.2f}]"
    return (
        f"layers {row['layers']:2}  host/small {ratio:5.1f}  {row['mode']:8} {row['draft']:6} "
        f"{row['tokens_per_second']:7.1f} tokens/s  {speed}  "
        f"{acceptance} same {row['same']}/{row['of']}"
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
    parser.add_argument("--modes", nargs="+", default=["newton", "mixture"])
    parser.add_argument("--layers", nargs="+", type=int, default=[6, 12, 24, 48], help="of the host")
    parser.add_argument("--prompts", type=int, default=8, help="so many of the openings")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--do-sample", action="store_true", help="at temperature 1")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import torch

    from logitproc.artifact import write_text

    torch.set_num_threads(1)
    found = passes(args) if args.what == "passes" else decode(args)
    if args.json:
        write_text(args.json, json.dumps({"date": time.strftime("%Y-%m-%d"), **found}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

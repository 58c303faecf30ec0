"""`logitproc demo`."""

import json
import math
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from .. import registry
from ..bundled import plainness, pocket
from .app import app
from .common import MAX_SEED, Json, NewTokens, PromptList, load_model, quiet, set_seed
from .generate import continuations, prepare, read_prompts
from .layout import side_by_side, table
from .methods import as_flag

if TYPE_CHECKING:
    from ..chain import Chain
    from ..prior import NGramPrior

DEMO = (  # a row of the demo each, all on the host `base`
    "ngram:prior=quixote,strength=1.0",
    "aligndistil:dpo=mini-dpo,reverse=mini-reverse-dpo",
    "fusion:expert=mini-dpo,base=mini",
    "vq:head=base-vq",
)
DEMO_JUDGE = "quixote-held-out"  # counts of text that no steering prior has seen
DEMO_PROMPTS = (
    "The knight turned to his servant and said", "When they came to the inn,", "She opened the letter, and",
)  # fmt: skip
DEMO_TEXTS = 4  # of each prompt go into the figures; the first is shown
DEMO_SAMPLING = {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "top_k": 0}


@app.command()
def demo(
    context: typer.Context,
    prompt: PromptList = None,
    strength: Annotated[float | None, Option(metavar="X", help="For all methods; 0 is neutral.")] = None,
    max_new_tokens: NewTokens = 64,
    seed: Annotated[int, Option(metavar="N", min=0, max=MAX_SEED)] = 0,
    as_json: Json = False,
) -> None:
    """Show what the methods do, offline.

    Text of the bundled model before and after, and what it cost. Style perplexity is under a Kneser-Ney
    model of held-out Don Quixote: lower is more like it. Plainness is the reward of the bundled preference
    models, for the first 25 words. Base perplexity is under the unsteered model: higher is stranger to it. JS is how
    far the next-token distribution moved, from 0 to 1 bit. All are means over the same few texts: they show
    what to look at, the studies in eval/RESULTS.md say what holds.
    """
    texts = read_prompts(prompt or DEMO_PROMPTS, None)
    quiet(context)
    from ..chain import Chain, parse_processor
    from ..generation import decode
    from ..prior import NGramPrior

    source = pocket("base")
    chains = {"unsteered": Chain()}
    for setting in DEMO:
        item = parse_processor(setting)
        if strength is not None and "strength" in item:
            item["strength"] = strength
        chains[as_flag(item)] = Chain.from_spec([item])
    judge = NGramPrior.load(DEMO_JUDGE)
    every = [text for text in texts for _ in range(DEMO_TEXTS)]
    tokenizer, config, prompts = prepare(source, every, {**DEMO_SAMPLING, "max_new_tokens": max_new_tokens})
    judge.check_tokenizer(tokenizer)
    model = load_model(source, "auto", "cpu", None)
    rows: list[dict[str, Any]] = []
    for label, chain in chains.items():
        set_seed(seed)
        results = continuations(model, tokenizer, chain, prompts, config)
        decoded = [decode(tokenizer, *pair) for pair in zip(prompts, results, strict=True)]
        figures = _figures(model, chain, judge, prompts, results, decoded)
        rows.append({"method": label, "seed": seed, **figures, "prompts": every, "texts": decoded})
    if as_json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        return
    plain, *steered = rows
    summaries = {entry.name: entry.summary for entry in registry.entries()}
    for number, row in enumerate(steered):
        at = number % len(texts) * DEMO_TEXTS
        columns = side_by_side([plain["method"], row["method"]], [plain["texts"][at], row["texts"][at]])
        print(f"{summaries[row['method'].partition(':')[0]]}\n\n{every[at]} ...\n\n{columns}\n")
    heading = ("", "style perplexity", "plainness", "base perplexity", "JS (bits)")
    print(table([heading, *(_figure_cells(row) for row in rows)], right=True))
    print(
        "\nStyle: held-out Don Quixote, lower is closer. Plainness: short words, higher is plainer. Base: the\n"
        f"unsteered model, lower is likelier. {len(every)} texts a row. More: demo --help\n"
    )
    print(
        f"Try next: logitproc generate --prompt {shlex.quote(texts[0])} --proc {shlex.quote(DEMO[0])}, or "
        "logitproc fit ngram --corpus YOUR.txt --out my-prior"
    )


def _figures(
    model: Any, chain: "Chain", judge: "NGramPrior", prompts: list[list[int]], results: list[list[int]],
    texts: list[str],
) -> dict[str, float]:  # fmt: skip
    """Means over the generated tokens; plainness is one over the texts."""
    from ..scoring import score_continuations

    scores = score_continuations(model, chain, prompts, results)
    tokens = sum(map(len, results))
    mean = lambda key: sum(row[key] * row["tokens"] for row in scores) / tokens
    style = sum(judge.log_prob(ids, prompt).sum() for prompt, ids in zip(prompts, results, strict=True))
    return {"scored_tokens": tokens, "style_perplexity": math.exp(-style / tokens),
            "plainness": sum(plainness(" ".join(text.split()[:25])) for text in texts) / len(texts),
            "base_perplexity": math.exp(mean("base_nll")), "js_bits": mean("js")}  # fmt: skip


def _figure_cells(row: dict[str, Any]) -> tuple[str, ...]:
    figures = (f"{row['style_perplexity']:.1f}", f"{row['plainness']:+.2f}", f"{row['base_perplexity']:.1f}")
    return (row["method"], *figures, f"{row['js_bits']:.3f}")

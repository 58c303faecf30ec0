"""How far a chain of processors moves a model, token by token on a text, by teacher forcing.

    python eval/js_divergence.py --data notes.txt --proc ngram:prior=quixote,strength=0.3
    python eval/js_divergence.py --model M --data FILE|DATASET --chain chain.yaml --json out.json
    accelerate launch eval/js_divergence.py ...    several GPUs: each takes its share of the documents
    torchrun --nproc-per-node 4 eval/js_divergence.py --device cpu ...    the same without GPUs

p is the model's distribution over the next token, q the one that the chain makes of it. Each figure is a mean
over the tokens of the text with its standard error. A negative flip is a token that p's first choice gets
right and q's gets wrong.
"""

import sys
from typing import TYPE_CHECKING

import common

if TYPE_CHECKING:
    from logitproc.scoring import Report

_TITLES = {
    "js": "JS divergence (bits)",
    "kl": "KL(q || p) (nats)",
    "reverse_kl": "KL(p || q) (nats)",
    "tv": "total variation",
    "agree": "top-1 agreement",
    "flip": "negative flips",
    "delta_nll": "loss, q minus p (nats)",
}


def figures(report: "Report") -> common.Figures:
    measures = {key: {"mean": report.mean[key], "standard_error": report.error[key]} for key in _TITLES}
    return {**common.counts(report), **measures}


def table(result: common.Figures) -> str:
    line = lambda x: [f"{x['mean']:.6f}", f"± {x['standard_error']:.6f}"]
    body = [[title, *line(result[key])] for key, title in _TITLES.items()]
    return common.rows(["", "mean", "standard error"], body)


main = common.script("js_divergence", __doc__, divergence=True, figures=figures, table=table)

if __name__ == "__main__":
    sys.exit(main(None))

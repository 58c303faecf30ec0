"""Perplexity of a text through a chain of processors, by teacher forcing in sliding windows.

    python eval/perplexity.py --data notes.txt
    python eval/perplexity.py --model M --data FILE|DATASET --proc ngram:prior=quixote,strength=0.3
    accelerate launch eval/perplexity.py ...    several GPUs: each takes its share of the documents
    torchrun --nproc-per-node 4 eval/perplexity.py --device cpu ...    the same without GPUs

"base" is the model alone, "processed" the model through the chain, on the same tokens. Every token is scored
once; the first token of a document is scored when the tokenizer has a BOS token to stand before it.
Nats per token and the difference carry standard errors over tokens.
"""

import math
import sys
from typing import TYPE_CHECKING

import common

if TYPE_CHECKING:
    from logitproc.scoring import Report


def figures(report: "Report") -> common.Figures:
    def of(loss: str) -> common.Figures:
        return {
            "token_perplexity": report.perplexity(loss),
            "word_perplexity": report.word_perplexity(loss),
            "bits_per_byte": report.bits_per_byte(loss),
            "nats_per_token": report.mean[loss],
            "standard_error": report.error[loss],
        }

    # The difference is taken token by token, so its error is far below those of the two means.
    delta = {"nats_per_token": report.mean["delta_nll"], "standard_error": report.error["delta_nll"]}
    return {**common.counts(report), "base": of("base_nll"), "processed": of("nll"), "difference": delta}


def table(result: common.Figures) -> str:
    base, processed, delta = result["base"], result["processed"], result["difference"]
    nats = lambda x: f"{x['nats_per_token']:.4f} ± {x['standard_error']:.4f}"
    ratio = lambda key: f"{processed[key] / base[key]:.4f}" if math.isfinite(base[key]) else "-"
    body = [
        [
            key.replace("_", " "),
            f"{base[key]:,.4f}",
            f"{processed[key]:,.4f}",
            ratio(key),
        ]
        for key in ("token_perplexity", "word_perplexity", "bits_per_byte")
    ]
    body += [["nats per token", nats(base), nats(processed), ""], ["difference", "", nats(delta), ""]]
    if result["scores"] == "raw":
        return common.rows(["", "base"], [row[:2] for row in body[:-1]])
    return common.rows(["", "base", "processed", "ratio"], body)


main = common.script("perplexity", __doc__, divergence=False, figures=figures, table=table)

if __name__ == "__main__":
    sys.exit(main(None))

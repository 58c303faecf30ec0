"""`logitproc fit ngram` and `logitproc fit vq`."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from ..bundled import find_model
from .app import app
from .common import MAX_SEED, Dtype, choose_device, load_model, quiet
from .layout import table

if TYPE_CHECKING:
    from ..heads import Progress as HeadProgress

fit = typer.Typer(rich_markup_mode=None, help="Fit what a method needs, and save it as a folder.")
app.add_typer(fit, name="fit")


@fit.command("ngram")
def fit_ngram(
    context: typer.Context,
    corpus: Annotated[
        str, Option(metavar="FILE|DATASET", help="txt, jsonl, csv, tsv, parquet; or a dataset's name.")
    ],
    out: Annotated[str, Option(metavar="FOLDER", help="Where to save the prior.")],
    tokenizer: Annotated[
        str, Option(metavar="NAME", help="Of the model to steer: a bundled model, a folder, or ORG/NAME.")
    ] = "base",
    order: Annotated[int, Option(metavar="N", min=1, max=5, help="The longest n-grams to count.")] = 3,
    force: Annotated[bool, Option("--force", help="Replace an existing folder.")] = False,
    column: Annotated[str | None, Option(metavar="NAME", help="The column that holds the text.")] = None,
    split: Annotated[str | None, Option(metavar="NAME", help="The split of a dataset.")] = None,
    config: Annotated[str | None, Option(metavar="NAME", help="The configuration of a dataset.")] = None,
    sample_by: Annotated[
        str | None, Option(metavar="UNIT", help="Documents of a text file: line, paragraph, document.")
    ] = None,
) -> None:
    """Count a corpus, to steer with.

    \b
    logitproc fit ngram --corpus quixote.txt --out runs/quixote
    logitproc fit ngram --corpus abstracts.csv --column abstract --tokenizer openai-community/gpt2 --out prior

    Memory is bounded whatever the size of the corpus. A fit that was interrupted resumes when the same
    command is given again.
    """
    source = find_model(tokenizer)
    quiet(context)
    from transformers import AutoTokenizer

    from ..prior import NGramPrior

    reading = {"column": column, "split": split, "config": config, "sample_by": sample_by}
    given: dict[str, Any] = {key: value for key, value in reading.items() if value is not None}
    try:
        prior = NGramPrior.fit(
            corpus, AutoTokenizer.from_pretrained(source), order=order, out=out, force=force, **given
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Interrupted; the same command resumes the count.") from None
    size = sum(file.stat().st_size for file in Path(out).iterdir())
    print(f"Counted {corpus}: {prior.documents:,} documents, {prior.tokens:,} tokens.")
    print(table([(f"  {n}-grams", f"{len(o.ids):,}") for n, o in enumerate(prior.orders, 1)], right=True))
    print(f"Saved to {out}, {size / 1e3:,.0f} kB. Try it:")
    proc = shlex.quote(f"ngram:prior={out}")
    print(f'  logitproc generate --model {shlex.quote(tokenizer)} --prompt "..." --proc {proc}')


@fit.command("vq")
def fit_vq(
    context: typer.Context,
    calibration: Annotated[
        str, Option(metavar="FILE|DATASET", help="Text to fit to and, its last tenth, to judge with.")
    ],
    out: Annotated[str, Option(metavar="FOLDER", help="Where to save the head.")],
    codes: Annotated[
        int | None, Option(metavar="K", help="Codes to multiply with, instead of every token.")
    ] = None,
    model: Annotated[str, Option(metavar="NAME", help="A bundled model, a folder, or ORG/NAME.")] = "base",
    kind: Annotated[
        str, Option(metavar="KIND", help="paper, weighted, distilled, tiebreak or residual.")
    ] = "weighted",
    refine: Annotated[
        int, Option(metavar="N", help="Score the N best tokens again with the model's own rows.")
    ] = 0,
    screened: Annotated[
        int, Option(metavar="R", help="In place of codes, the R directions in which a state is largest.")
    ] = 0,
    tokens: Annotated[int, Option(metavar="N", min=1, help="At most so many tokens of the text.")] = 1 << 16,
    seed: Annotated[int, Option(metavar="N", min=0, max=MAX_SEED)] = 0,
    converted: Annotated[
        str | None, Option(metavar="FOLDER", help="Save the model with that head too, for from_pretrained.")
    ] = None,
    dtype: Dtype = "auto",
    device: Annotated[str, Option(metavar="NAME", help="cpu, cuda, ...; auto takes a GPU if there is one.")] = "auto",
    force: Annotated[bool, Option("--force", help="Replace existing folders.")] = False,
) -> None:
    """Fit a smaller output head, and say what it costs.

    \b
    logitproc fit vq --codes 4096 --calibration book.txt --out runs/head
    logitproc fit vq --model org/name --codes 16384 --calibration book.txt --out head --converted org-name-vq
    logitproc fit vq --screened 32 --refine 512 --calibration book.txt --out runs/screened

    Tokens that share a code cannot be told apart by it: the report gives the perplexity that this costs on
    text the fit has not seen, and the least that any choice of codes must cost. --refine tells them apart. It
    and --screened read less than the model's own head does, and hold as many numbers or more.
    """
    source = find_model(model)
    quiet(context)
    from transformers import AutoTokenizer

    from ..artifact import check_new, new_folder
    from ..heads import VQHead, convert

    for folder in filter(None, (out, converted)):
        check_new(folder, force)
    loaded = load_model(source, dtype, choose_device(device), None)
    tokenizer = AutoTokenizer.from_pretrained(source)
    head = VQHead.fit(
        loaded, calibration, codes=codes, kind=kind, refine=refine, screened=screened, seed=seed, tokenizer=tokenizer,
        tokens=tokens, report=_show_stage,
    )  # fmt: skip
    head.save(out, force=force)
    what = f"{codes:,} codes of kind {kind}" if codes else f"{screened:,} directions"
    print(f"Fitted {what} to {head.about['tokens']:,} tokens of {calibration}.")
    print(table(_head_report(head, loaded)))
    print(f"Saved to {out}: lp.attach(model, lp.VQHead.load({out!r})).")
    if head.token_weights is not None:
        proc = shlex.quote(f"vq:head={out}")
        print(f'  logitproc generate --model {shlex.quote(model)} --prompt "..." --proc {proc}')
    if converted:
        with new_folder(converted, force) as new:
            convert(loaded, head).save_pretrained(new)
            tokenizer.save_pretrained(new)
        print(f"Saved the model with this head to {converted}:")
        print(f'  logitproc generate --model {shlex.quote(converted)} --prompt "..."')


def _show_stage(progress: "HeadProgress") -> None:
    """One line on standard error for the last step of a stage, or one that is rewritten on a terminal."""
    figures = ", ".join(f"{key} {value:.4g}" for key, value in progress.figures.items())
    line = f"{progress.stage} {progress.step}/{progress.steps}" + (f": {figures}" if figures else "")
    last = progress.step >= progress.steps
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="\n" if last else "", file=sys.stderr, flush=True)
    elif last:
        print(line, file=sys.stderr)


def _head_report(head: Any, model: Any) -> list[tuple[str, str]]:
    """What a fitted head costs on text it has not seen, and what it saves."""
    from ..heads import DenseHead

    held, floors, floats = head.about["held_out"], head.about["floors"], head.num_float_params()
    own = model.get_output_embeddings()
    dense = DenseHead.of(own.weight, own.bias)
    saved, read = 1 - floats / dense.num_float_params(), head.bytes_per_step() / dense.bytes_per_step()
    fewer = f"{abs(saved):.1%} {'fewer' if saved >= 0 else 'more'} than the model's own"
    tied = ", which stays as its input embedding" if model.get_input_embeddings().weight is own.weight else ""
    rows = [
        ("  perplexity", f"x {held['perplexity_ratio']:.3f} of {held['perplexity']:.2f}, on {held['tokens']:,} tokens"),
        ("  KL(dense || head)", f"{held['kl']:.4f} nats"),
        ("  same most probable token", f"{held['agreement']:.1%}"),
        ("  different tokens it finds so", f"{held['distinct']:,} of {held['distinct_dense']:,}"),
        ("  numbers in the head", f"{floats:,}, {fewer}{tied}"),
        ("  bytes that a step reads", f"{head.bytes_per_step():,}, {read:.1%} of the model's own"),
    ]
    if floors:
        rows += [
            ("  tie floor of these codes", f"{floors['floor']:.3f} nats, E[ln n(v)]"),
            ("  of the best codes there are", f"{floors['minimum']:.3f} nats"),
            ("  lost inside codes anyway", f"{floors['within']:.3f} nats, by the dense model"),
            ("  KL that no training avoids", f"{floors['information']:.4f} nats, I(V; H | K)"),
        ]
    return rows

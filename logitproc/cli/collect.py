"""`logitproc collect`, and the two commands with which a person corrects what it collected."""

import os
import shlex
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from ..bundled import find_model
from .app import app, explain
from .common import choose_device, load_model, quiet

if TYPE_CHECKING:
    from ..assessment import Real
    from ..collect import Job

collect = typer.Typer(rich_markup_mode=None)
app.add_typer(collect, name="collect")

INTERRUPTED = 130  # of `collect`, whose work goes on where it was
SHOWN_TEXTS = 2  # of each label, at the end

Embeddings = Annotated[
    str | None,
    Option(metavar="MODEL", help="A sentence-transformers model, by name or path; offline features if left out."),
]


@collect.callback(invoke_without_command=True)
def collect_texts(
    context: typer.Context,
    config: Annotated[str | None, Option(metavar="FILE", help="The job, in YAML.")] = None,
    output: Annotated[str | None, Option(metavar="DIR", help="Where the items go; resumes what is there.")] = None,
    settings: Annotated[
        list[str] | None,
        Option("--set", metavar="KEY=VALUE", help="Beats the job file: generation.top_p=0.9; may be repeated."),
    ] = None,
    device: Annotated[str, Option(metavar="NAME", help="cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Collect labelled texts that are diverse and on label, with a report.

    \b
    logitproc collect --config job.yaml --output runs/job
    accelerate launch --num_processes 2 -m logitproc.cli collect --config job.yaml --output runs/job
    torchrun --nproc-per-node 2 -m logitproc.cli collect --device cpu --config job.yaml --output runs/job
    logitproc collect export-labels runs/job --out check.csv
    logitproc collect apply-labels runs/job --labels check.csv

    Killed at any moment it goes on when the same command is given again. DIR/data.jsonl holds the items,
    DIR/report.txt how diverse and accurate they are beside plain sampling. Exit status 130: interrupted.
    """
    if context.invoked_subcommand:
        return
    if config is None or output is None:
        raise ValueError("collect needs a job and a place: --config FILE --output DIR.")
    quiet(context)
    from ..collect import Job
    from ..collect.report import read_real

    job = Job.from_file(config, settings or [])
    real = read_real(job)
    source = find_model(job.model)
    accelerator = _accelerator(device)
    if accelerator is None or accelerator.is_main_process:
        import yaml

        print(yaml.safe_dump(job.to_dict(), sort_keys=False, allow_unicode=True), file=sys.stderr)
    try:
        _collect(job, Path(output), source, accelerator, choose_device(device), real)
    except KeyboardInterrupt as interruption:
        print(f"logitproc: {explain(interruption)[0]}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def _collect(job: "Job", output: Path, source: str, accelerator: Any, device: str, real: "Real | None") -> None:
    from transformers import AutoTokenizer

    from ..collect import collect
    from ..collect.report import read_items, report

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = load_model(source, job.dtype, str(accelerator.device) if accelerator else device, None)
    collected = collect(job, output, model, tokenizer, accelerator)
    plain_job = job.plain()
    plain = collect(plain_job, output / "plain", model, tokenizer, accelerator) if plain_job else None
    main = accelerator is None or accelerator.is_main_process
    if accelerator:
        accelerator.end_training()
    if not main:
        return
    _, text = report(job, output, collected, plain, real)
    shown: dict[str, list[str]] = {label: [] for label in job.labels}
    for item in read_items(collected.data):
        if len(shown[item["label"]]) < SHOWN_TEXTS:
            shown[item["label"]].append(item["text"])
    for label, texts in shown.items():
        for item_text in texts:
            print(textwrap.fill(f"{label}: {item_text}", 100, subsequent_indent="    ") + "\n")
    print(f"{text}\nReport: {output / 'report.txt'}. Next: logitproc collect export-labels {shlex.quote(str(output))} "
          "--out check.csv")  # fmt: skip


def _accelerator(device: str) -> Any:
    """An Accelerator where a launcher started several processes, else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    import torch
    from accelerate import Accelerator

    return Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())


@collect.command("export-labels")
def export_labels(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="What `collect` wrote.")],
    out: Annotated[str, Option(metavar="CSV", help="For a person to fill in.")],
    number: Annotated[int | None, Option(metavar="N", min=1, help="At most so many items; all if left out.")] = None,
    embeddings: Embeddings = None,
) -> None:
    """Write the items worth inspecting to CSV, the most uncertain first."""
    from ..collect import correct

    count = correct.export_labels(Path(folder), Path(out), number, embeddings)
    print(
        f"{out}: {count:,} items, the most uncertain first. For each one you look at, fill in correct_label (and "
        f"'no' in in_scope where the text fits no label), then: logitproc collect apply-labels {shlex.quote(folder)} "
        f"--labels {shlex.quote(out)}"
    )


@collect.command("apply-labels")
def apply_labels(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="What `collect` wrote.")],
    labels: Annotated[str, Option(metavar="CSV", help="As export-labels wrote it, filled in.")],
    weight: Annotated[float, Option(metavar="W", min=0, max=1, help="Of the prompted label.")] = 0.3,
    embeddings: Embeddings = None,
) -> None:
    """Carry what a person said about some items to all: relabel, drop what is out of scope, say what changed."""
    from ..collect import correct

    print(correct.table(correct.apply_labels(Path(folder), Path(labels), weight, embeddings)))
    print(f"\nWritten: {Path(folder) / 'corrected.jsonl'}, corrected-balanced.jsonl and corrections.json.")

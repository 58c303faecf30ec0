"""`collect`: run a job, or go on with it. Resuming is running again and drawing only what is missing."""

import errno
import hashlib
import json
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import registry
from ..artifact import describe_tokenizer, new_file, write_text
from ..chain import Chain
from ..diversity import words
from ..ledger import TokenLedger
from ..metrics import distinct_n
from ..processor import Processor
from ..scoring import max_context
from .draw import Request, draw
from .job import Item, Job, seed_of
from .store import ItemLog, Place, repair

CHECKPOINT_SECONDS = 30.0  # between two checkpoints of the ledger, which may be large
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RECENT_TEXTS = 200  # the progress bar shows their diversity


class Attempt(NamedTuple):
    """What is kept in memory of a line: enough to accept it or not."""

    id: str
    number: int
    label: str
    failed: str | None
    digest: bytes  # of the text
    place: Place


class Collected(NamedTuple):
    """What a run made: `data` is the final file, `unfilled` how many items stayed empty or duplicates."""

    data: Path
    items: int
    unfilled: int
    failures: dict[str, int]  # "empty", "duplicate": how many texts were drawn again for it


def collect(
    job: Job, output: str | Path, model: Any, tokenizer: Any, accelerator: Any = None,
    say: Callable[[str], None] = lambda sentence: print(sentence, file=sys.stderr),
) -> Collected:  # fmt: skip
    """Make every item of the job that `output` does not hold yet, and join them in `output/data.jsonl`.

    Killed at any moment and started again it ends with the same items (with `sync: round`, on one machine), each
    once. With an `accelerate.Accelerator` the batches of a round are dealt to its processes, which share the
    folder; every process reads what the others wrote, so that all hold the same merged ledger.

    Raises ValueError when the folder belongs to another job, when another process writes to it, and when the
    chain or a prompt does not fit the model; KeyboardInterrupt and OSError (disk full) leave what is finished.
    """
    run = _Run(job, Path(output), model, tokenizer, accelerator, say)
    try:
        run.open()
        run.everything()
        return run.finish()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"Interrupted; {len(run.begun):,} of {len(run.items):,} items are kept and the same command goes on."
        ) from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        kept = f"{error.strerror}; what is finished is kept and the same command goes on"
        raise OSError(error.errno, kept, error.filename) from None
    finally:
        run.log.close()


class _Run:
    def __init__(self, job: Job, output: Path, model: Any, tokenizer: Any, accelerator: Any, say: Callable):
        self.job, self.output, self.model, self.tokenizer, self.say = job, output, model, tokenizer, say
        self.accelerator = accelerator
        self.rank: int = accelerator.process_index if accelerator else 0
        self.world: int = accelerator.num_processes if accelerator else 1
        self.members = [_Member(spec) for spec in job.chain]
        self.about = {
            "weights": fingerprint(model), "tokenizer": describe_tokenizer(tokenizer)["fingerprint"],
            "chain": [member.about for member in self.members],
        }  # fmt: skip
        self.digest = job.digest(self.about)
        self.items = job.items(self.digest)
        self.ledger = self._new_ledger()
        self.log = ItemLog(output, self.rank)
        # round -> (id, attempt) -> what its line says; rounds that are settled are dropped
        self.attempts: dict[int, dict[tuple[str, int], Attempt]] = {}
        self.begun: set[str] = set()  # items with a line
        self.texts: set[bytes] = set()  # digests of accepted texts
        self.accepted: dict[str, Place] = {}
        self.failures: Counter[str] = Counter()
        self.recent: deque[list[str]] = deque(maxlen=RECENT_TEXTS)
        self.bar: Any = None
        self.saved_at = time.monotonic()
        self._check()

    def _new_ledger(self) -> TokenLedger:
        texts = any(member.parameters.get("rule") == "dry" for member in self.members)
        return TokenLedger(self.tokenizer, self.job.ledger.window, self.job.ledger.decay, texts=texts)

    def _check(self) -> None:
        """Raise ValueError when the chain or the longest prompt of the job does not fit the model."""
        head, new = self.model.get_output_embeddings(), self.job.generation.max_new_tokens
        for chain in build_chains(self.members, self.ledger, list(self.job.labels)).values():
            chain.check(width=head.weight.shape[0] if head is not None else None, tokenizer=self.tokenizer)
        room = (max_context(self.model) or sys.maxsize) - new
        for item in {(item.label, item.prompt_id): item for item in self.items}.values():
            tokens = len(self.tokenizer(self.job.longest_prompt(item))["input_ids"])
            if tokens > room:
                raise ValueError(
                    f"A prompt of {item.label!r} may have {tokens} tokens; beside max_new_tokens {new} the model "
                    f"reads {max(room, 0)}. Show fewer or shorter examples."
                )
            if not len(self.tokenizer(self.job.prompt(item, 0))["input_ids"]):
                raise ValueError(f"The prompt of {item.label!r} has no token in this model's vocabulary.")

    # --- begin and end ---

    def open(self) -> None:
        if self.rank == 0:
            self._claim()
        self._wait()
        if self.rank > 0:
            self.log.open()
        self._read()
        self.settled = self._load_checkpoint()
        self._wait()  # nobody appends before all have seen what was there

    def _claim(self) -> None:
        """Lock the folder, make sure that it is of this job, and cut what a crash tore."""
        file = self.output / "job.json"
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"{self.output} is a file; give --output a folder.")
        if self.output.is_dir() and not file.is_file():
            ours = (".lock", ".jsonl")  # of a start that was killed before it wrote job.json
            others = [p for p in self.output.iterdir() if p.suffix not in ours and not p.name.startswith(".")]
            if others:
                raise ValueError(f"{self.output} holds files but no collection; choose a new or empty folder.")
        self.output.mkdir(parents=True, exist_ok=True)
        document = {"version": 1, "digest": self.digest, **self.about, "job": self.job.to_dict()}
        if file.is_file():
            check_same_job(file, document)
        self.log.open()
        write_text(file, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        for shard in self.log.shards():
            if cut := repair(self.log.path(shard)):
                self.say(
                    f"{self.log.path(shard)} ended in a line that a crash had cut; its {cut} bytes were removed "
                    "and the item is drawn again."
                )

    def finish(self) -> Collected:
        """Join the shards, sorted by id."""
        data = self.output / "data.jsonl"
        if self.rank == 0:
            self._save_checkpoint(len(self.rounds()) - 1)
            with new_file(data) as file:
                for item in sorted(self.accepted):
                    file.write(self.log.line(self.accepted[item]).decode())
        self._wait()
        unfilled = len(self.items) - len(self.accepted)
        if unfilled and self.rank == 0:
            self.say(
                f"{unfilled} of {len(self.items)} items are missing: {self.job.retries} retries gave only empty "
                "texts or duplicates; collect into another folder with a higher temperature or more retries."
            )
        return Collected(data, len(self.accepted), unfilled, dict(self.failures))

    # --- rounds ---

    def rounds(self) -> list[list[Item]]:
        step = self.job.round_items
        return [self.items[at : at + step] for at in range(0, len(self.items), step)]

    def everything(self) -> None:
        with self._progress() as self.bar:
            if self.job.sync == "async":
                self._run_ahead()
            for number, items in enumerate(self.rounds()):
                self._settle(number, items)

    def _run_ahead(self) -> None:
        """Draw this process's share of all rounds without waiting, each with a ledger of what is there. Retries
        come when the rounds are settled."""
        live = self._new_ledger()
        unread = [attempt for of_round in self.attempts.values() for attempt in of_round.values()]
        for number, items in enumerate(self.rounds()):
            self._count(live, number, [attempt for attempt in unread if not attempt.failed])
            self._draw(items, 0, number, live, {})
            unread = self._read()
        self._wait()
        self._read()

    def _settle(self, number: int, items: Sequence[Item]) -> None:
        """Draw what a round lacks, accept or retry each text in order, and count the accepted ones."""
        left, good = list(items), []
        because: dict[str, str] = {}
        for attempt in range(self.job.retries + 1):
            self._draw(left, attempt, number, self.ledger, because)
            self._wait()
            self._read()
            found = [self.attempts[number][item.id, attempt] for item in left]
            because = {each.id: reason for each in found if (reason := self._failure(each))}
            self.failures.update(because.values())
            good += [each for each in found if each.id not in because]
            left = [item for item in left if item.id in because]
            if not left:
                break
        self.accepted |= {each.id: each.place for each in good}
        if number > self.settled:
            self._count(self.ledger, number, good)
            self._save_checkpoint_if_due(number)
        del self.attempts[number]

    def _failure(self, attempt: Attempt) -> str | None:
        """Why a text is drawn again; one that is not is remembered."""
        if attempt.failed or attempt.digest in self.texts:
            return attempt.failed or "duplicate"
        self.texts.add(attempt.digest)
        return None

    def _count(self, ledger: TokenLedger, number: int, attempts: Sequence[Attempt]) -> None:
        for label in self.job.labels:
            lines = [self.log.line(each.place) for each in attempts if each.label == label]
            if lines:
                ledger.update([json.loads(line)["token_ids"] for line in lines], label, number)

    def _draw(
        self, items: Sequence[Item], attempt: int, number: int, ledger: TokenLedger, because: dict[str, str]
    ) -> None:
        """Append what this process's batches lack. A batch that lacks one item is drawn whole, so that rounding
        is that of the uninterrupted run."""
        there = self.attempts.setdefault(number, {})
        size = self.job.batch_size
        batches = [items[at : at + size] for at in range(0, len(items), size)][self.rank :: self.world]
        batches = [batch for batch in batches if any((item.id, attempt) not in there for item in batch)]
        if not batches:
            return
        chains = build_chains(self.members, ledger, list(self.job.labels))
        common = {"round": number, "shard": self.rank, "rule": rule(self.members), "ledger_hash": ledger.hash(),
                  "attempt": attempt}  # fmt: skip
        for batch in batches:
            seeds = [seed_of(item.id, attempt) for item in batch]
            requests = [
                Request(self.job.prompt(item, seed), item.label, seed)
                for item, seed in zip(batch, seeds, strict=True)
            ]
            drawn = draw(self.model, self.tokenizer, chains, requests, self.job.generation, self.job.stop)
            self.log.append([
                {**item._asdict(), **text._asdict(), **common, "seed": seed, "retry_because": because.get(item.id),
                 "failed": None if any(map(str.isalnum, text.text)) else "empty"}
                for item, seed, text in zip(batch, seeds, drawn, strict=True)
                if (item.id, attempt) not in there
            ])  # fmt: skip

    def _read(self) -> list[Attempt]:
        """Take in what any process appended."""
        new = []
        for record, place in self.log.read():
            text = " ".join(record["text"].lower().split())
            digest = hashlib.blake2b(text.encode(), digest_size=12).digest()
            attempt = Attempt(record["id"], record["attempt"], record["label"], record["failed"], digest, place)
            self.attempts.setdefault(record["round"], {})[attempt.id, attempt.number] = attempt
            self.begun.add(attempt.id)
            self.recent.append(words(text))
            new.append(attempt)
        if self.bar is not None and not self.bar.disable:
            self.bar.n = len(self.begun)
            self.bar.set_postfix_str(f"distinct-3 {distinct_n(self.recent, 3):.2f}")
        return new

    def _wait(self) -> None:
        if self.accelerator:
            self.accelerator.wait_for_everyone()

    def _progress(self) -> Any:
        from tqdm import tqdm

        hidden = self.rank > 0 or not sys.stderr.isatty()
        return tqdm(
            desc=self.output.name, total=len(self.items), initial=len(self.begun), unit=" items", disable=hidden
        )

    # --- checkpoint ---

    def _save_checkpoint_if_due(self, number: int) -> None:
        if self.rank == 0 and time.monotonic() - self.saved_at >= CHECKPOINT_SECONDS:
            self._save_checkpoint(number)
            self.saved_at = time.monotonic()

    def _save_checkpoint(self, number: int) -> None:
        """The ledger after round `number`, and how much of each shard it rests on."""
        self.ledger.save(self.output / "ledger")
        progress = {"round": number, "ledger": self.ledger.hash(), "shards": self.log.positions}
        write_text(self.output / "progress.json", json.dumps(progress) + "\n")

    def _load_checkpoint(self) -> int:
        """The last round that the loaded ledger counts, -1 for none: then it is rebuilt from the items."""
        try:
            progress = json.loads((self.output / "progress.json").read_text(encoding="utf-8"))
            ledger = TokenLedger.load(self.output / "ledger")
            fits = ledger.hash() == progress["ledger"] and all(
                self.log.lines_before(int(shard), size) == lines
                for shard, (size, lines) in progress["shards"].items()
            )
        except (OSError, ValueError, LookupError):
            fits = False
        if not fits:
            if self.rank == 0:
                shutil.rmtree(self.output / "ledger", ignore_errors=True)
            if self.begun and self.rank == 0:
                self.say("There is no checkpoint of the ledger that fits the items; it is rebuilt from them.")
            return -1
        self.ledger = ledger
        return progress["round"]


# --- the chain ---


class _Member:
    """A processor of the job's chain. What the ledger does not change is made once, fitted parts are read once."""

    def __init__(self, spec: dict[str, Any]):
        self.cls: type[Processor] = registry.get(spec["name"])
        self.parameters = {key: value for key, value in spec.items() if key != "name"}
        # A job leaves `ledger` for the collection to fill; the field `scope` says whether labels are told apart.
        self.reads_ledger = "ledger" in self.cls.artifacts and "ledger" not in self.parameters
        self.reads_label = self.reads_ledger and self.parameters.get("scope") == "label"
        self.about = dict(spec)  # what the job's digest knows: a fitted part by what it holds, not where it lies
        for key, kind in self.cls.artifacts.items():
            if isinstance(self.parameters.get(key), str):
                self.parameters[key] = kind.load(self.parameters[key])
                self.about[key] = self.parameters[key].fingerprint()
        self.fixed = None if self.reads_ledger else self.cls.from_parameters(self.parameters)

    def build(self, ledger: TokenLedger, label: str) -> Processor:
        if self.fixed is not None:
            return self.fixed
        of_label = {"label": label} if self.reads_label else {}
        return self.cls.from_parameters({**self.parameters, "ledger": ledger, **of_label})


def build_chains(members: Sequence[_Member], ledger: TokenLedger, labels: Sequence[str]) -> dict[str, Chain]:
    """Label -> chain; one chain for all labels unless a processor treats them differently."""
    if any(member.reads_label for member in members):
        return {label: Chain([m.build(ledger, label) for m in members]) for label in labels}
    return dict.fromkeys(labels, Chain([m.build(ledger, "") for m in members]))


def rule(members: Sequence[_Member]) -> str | None:
    """What the items say of the chain: the rule of what reads the ledger, or the names of the processors."""
    rules = [m.parameters.get("rule", m.cls.name) for m in members if m.reads_ledger]
    return "+".join(rules or [m.cls.name for m in members]) or None


# --- checks ---


def check_same_job(file: Path, document: dict[str, Any]) -> None:
    """Raise ValueError naming what differs, unless `file` describes the job of `document`."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        theirs = found["job"]
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{file} is damaged; choose another --output.") from None
    if found.get("digest") == document["digest"]:
        return
    ours = document["job"]
    decides = [key for key in ours if key not in (*Job.REPORTING, "model")]  # a model is its weights
    differ = [key for key in decides if theirs.get(key) != ours[key]]
    short = lambda value: json.dumps(value, ensure_ascii=False)[:40]
    what = [f"{key} is {short(theirs.get(key))} there and {short(ours[key])} here" for key in differ[:3]]
    if not what:
        what = ["it was made with other weights, another tokenizer or other fitted parts"]
    raise ValueError(f"{file.parent} holds another job: {'; '.join(what)}. Choose another --output.")


def fingerprint(model: Any) -> str:
    """A hash of the weights, which are what decides the items whatever the model is called."""
    digest = hashlib.sha256(str(model.dtype).encode())
    for name, weight in model.named_parameters():
        content = torch.hash_tensor(weight.detach()).view(torch.int64).item()
        digest.update(f"{name} {list(weight.shape)} {content}".encode())
    return digest.hexdigest()


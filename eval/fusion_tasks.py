"""The four tasks of the study of `fusion`: texts, most of which end in the word of their label."""

import csv
import random
from pathlib import Path
from typing import Any, NamedTuple

TRAIN, DEV, TEST = 3000, 150, 120  # documents a task, at most
LONGEST = 96  # tokens of a document; the first ones of a longer one are left out


class Document(NamedTuple):
    text: str
    label: int | None


class Task(NamedTuple):
    labels: tuple[str, ...]
    train: list[Document]
    dev: list[Document]
    test: list[Document]


def tasks(data: Path) -> dict[str, Task]:
    """Name -> documents; a text ends in `LABEL: word` where there are labels."""
    read = lambda name, encoding="utf-8": (data / name).read_text(encoding).splitlines()
    headlines = [Document(line, None) for line in read("style/headlines.txt")]
    sst2 = {part: [line.split("\t") for line in read(f"tasks/sst2/{part}.tsv")] for part in ("train", "dev", "test")}
    feeling = lambda part: [Document(f"{text}\nSentiment: ", int(label)) for label, text in sst2[part]]
    trec = {part: [line.split(" ", 1) for line in read(f"tasks/trec/TREC.{part}.all", "latin-1")]
            for part in ("train", "test")}  # fmt: skip
    question = lambda part: [Document(f"{text}\nAnswer: ", int(label)) for label, text in trec[part]]
    with open(data / "tasks/ag_news/test.csv", encoding="utf-8") as file:
        news = [Document(f"{title}\nTopic: ", int(topic) - 1) for topic, title, _ in csv.reader(file)]
    train, questions = shuffled(feeling("train")), shuffled(question("train"))
    return {
        "headlines": divided((), shuffled(headlines)),
        "SST-2": Task(("negative", "positive"), train[:TRAIN], feeling("dev")[:: max(1, len(sst2["dev"]) // DEV)][:DEV],
                      shuffled(feeling("test"))[:TEST]),
        "TREC": Task(("description", "entity", "abbreviation", "person", "number", "location"),
                     questions[DEV:][:TRAIN], questions[:DEV], question("test")[:TEST]),
        "AG News": divided(("world", "sports", "business", "technology"), shuffled(news)),
    }  # fmt: skip


def shuffled(documents: list[Document]) -> list[Document]:
    return random.Random(0).sample(documents, len(documents))


def divided(labels: tuple[str, ...], documents: list[Document]) -> Task:
    return Task(labels, documents[TEST + DEV :][:TRAIN], documents[TEST : TEST + DEV], documents[:TEST])


def encode(tokenizer: Any, task: Task, document: Document) -> tuple[list[int], int | None, list[int]]:
    """(ids, where the label words begin to differ, the token of each label word there)."""
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    wrap = lambda text: [tokenizer.bos_token_id, *ids(text), tokenizer.eos_token_id][-LONGEST:]
    if document.label is None:
        return wrap(document.text), None, []
    options = [wrap(document.text + word) for word in task.labels]
    at = next(i for i, tokens in enumerate(zip(*options, strict=False)) if len(set(tokens)) == len(options))
    return options[document.label], at, [option[at] for option in options]

import itertools
import json
import os
import threading

import datasets
import pytest

from logitproc.corpus import documents

TEXTS = ["plain", 'a "quoted", text', "two\nlines\tand a tab", "2020-01-01", "02", "NA", "naïve ☃"]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def rows_as(form, path, texts):
    """A file of two columns, `n` and `text`."""
    if form in ("jsonl", "json-lines"):
        lines = (json.dumps({"n": i, "text": text}) for i, text in enumerate(texts))
        path.write_text("\n".join(lines))
    elif form == "json":
        path.write_text(json.dumps([{"n": i, "text": text} for i, text in enumerate(texts)], indent=1))
    else:
        table = datasets.Dataset.from_dict({"n": list(range(len(texts))), "text": texts}).to_pandas()
        if form == "parquet":
            table.to_parquet(path)
        else:
            table.to_csv(path, sep="," if form == "csv" else "\t", index=False)
    return path


@pytest.mark.parametrize("form", ["jsonl", "json-lines", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_texts(tmp_path, form):
    path = rows_as(form, tmp_path / f"a[1]*.{form.removesuffix('-lines')}", TEXTS)
    assert list(documents(path)) == list(documents(str(path))) == TEXTS


def test_a_table_of_numbers_and_dates_is_still_text(write):
    assert list(documents(write("a.csv", "text\n02\n1.50\n"))) == ["02", "1.50"]
    assert list(documents(write("a.jsonl", '{"text": "2020-01-01"}\n'))) == ["2020-01-01"]


def test_datasets_and_iterables_give_the_same_texts():
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "n": [1] * len(TEXTS)})
    for source in (dataset, dataset.to_iterable_dataset(), TEXTS, iter(TEXTS), tuple(TEXTS)):
        assert list(documents(source)) == TEXTS


def test_a_dataset_of_unknown_columns_is_read_row_by_row():
    source = datasets.IterableDataset.from_generator(lambda: ({"body": text} for text in TEXTS))
    assert source.column_names is None
    assert list(documents(source, column="body")) == TEXTS


def test_missing_and_blank_texts_are_skipped(tmp_path, write):
    assert list(documents(rows_as("jsonl", tmp_path / "a.jsonl", [None, "x", "", " \n"]))) == ["x"]
    assert list(documents(rows_as("parquet", tmp_path / "a.parquet", [None, "x", ""]))) == ["x"]
    assert list(documents(write("a.csv", "text,n\n,1\nx,2\n"))) == ["x"]
    assert list(documents(["", "x", " "])) == ["x"]


@pytest.mark.parametrize("name, content", [
    ("a.txt", "x y\r\nz\r\n"),
    ("a.jsonl", '{"text": "x y"}\r\n{"text": "z"}\r\n'),
    ("a.csv", "text\r\nx y\r\nz\r\n"),
])  # fmt: skip
def test_a_byte_order_mark_and_windows_line_ends_vanish(write, name, content):
    assert list(documents(write(name, b"\xef\xbb\xbf" + content.encode()))) == ["x y", "z"]


def test_windows_line_ends_inside_a_text_become_plain():
    assert list(documents(["\ufeffx\r\ny"])) == ["x\ny"]


# --- text files ---

WRAPPED = "\n\nIn a village\n  of La Mancha,\n\n \t\nthe name\nof which\n\n\n"


@pytest.mark.parametrize("sample_by, expected", [
    ("line", ["In a village", "of La Mancha,", "the name", "of which"]),
    ("paragraph", ["In a village of La Mancha,", "the name of which"]),
    ("document", [WRAPPED.strip()]),
    ("auto", ["In a village of La Mancha,", "the name of which"]),
])  # fmt: skip
def test_text_is_cut_as_asked(write, sample_by, expected):
    for content in (WRAPPED, WRAPPED.replace("\n", "\r\n")):
        assert list(documents(write("a.txt", content), sample_by=sample_by)) == expected


def test_auto_takes_lines_when_no_blank_line_parts_the_text(write):
    assert list(documents(write("a.txt", "\n\nx\ny\n\n"))) == ["x", "y"]


def test_auto_looks_at_the_first_mib_only(write):
    line = "x" * 1023 + "\n"
    assert len(list(documents(write("a.txt", line * 2048 + "\ny\n")))) == 2049
    assert len(list(documents(write("b.txt", line * 512 + "\n" + line * 2048)))) == 2


def test_a_paragraph_goes_on_beyond_the_first_mib(write):
    words = "word " * 20 + "\n"
    found = list(documents(write("a.txt", "x\n\n" + words * 20_000), sample_by="paragraph"))
    assert len(found) == 2 and found[1].count("word") == 400_000


def test_any_other_suffix_and_none_is_text(write):
    for name in ("NOTES", "a.rst"):
        assert list(documents(str(write(name, "x\ny")))) == ["x", "y"]


def test_a_pipe_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("x\n\ny\n",), daemon=True)
    writer.start()
    assert list(documents(tmp_path / "pipe")) == ["x", "y"]
    writer.join()


@pytest.mark.parametrize("form", ["txt", "jsonl", "csv"])
def test_files_are_streamed(write, form):
    good = {"txt": b"good\n", "jsonl": b'{"text": "good"}\n', "csv": b"good\n"}[form]
    content = (b"text\n" if form == "csv" else b"") + good * 300_000 + b"\xff\n"
    stream = documents(write(f"a.{form}", content))
    assert list(itertools.islice(stream, 1000)) == ["good"] * 1000  # the bad byte lies a megabyte ahead
    with pytest.raises(ValueError, match=f"a.{form} is not UTF-8 text"):
        list(stream)


def test_iterables_are_streamed():
    assert next(documents(f"text {i}" for i in itertools.count())) == "text 0"


# --- the hub ---


def test_a_name_that_is_no_path_is_a_dataset_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict({"body": ["x"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(documents("me/novels", column="body", config="en", split="test")) == ["x"]
    assert asked == [(("me/novels", "en"), {"split": "test", "streaming": True})]


@pytest.mark.parametrize("error", [ConnectionError, datasets.exceptions.DatasetNotFoundError])
def test_a_dataset_that_cannot_be_had_is_told_in_one_sentence(monkeypatch, error):
    def load_dataset(*args, **kwargs):
        raise error("Couldn't reach it.\nTry later.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match="^'me/novels' is neither a file .*: Couldn't reach it.$"):
        documents("me/novels")


# --- bad input ---


@pytest.mark.parametrize("name, content, message", [
    ("empty.txt", "", "empty.txt is empty"),
    ("blank.txt", " \n\n\t\n", "blank.txt is empty"),
    ("empty.jsonl", "", "empty.jsonl is empty"),
    ("empty.json", "[]", "empty.json is empty"),
    ("empty.csv", "", "empty.csv is empty"),
    ("head.csv", "text\n", "head.csv is empty"),
    ("empty.parquet", "", "empty.parquet cannot be read as parquet: "),
    ("latin.txt", b"caf\xe9\n", "latin.txt is not UTF-8 text .byte 0xe9.; convert it to UTF-8"),
    ("utf16.txt", "text".encode("utf-16"), "utf16.txt is not UTF-8 text"),
    ("latin.jsonl", b'{"text": "caf\xe9"}', "latin.jsonl is not UTF-8 text"),
    ("latin.json", b'[\n{"text": "caf\xe9"}]', "latin.json is not UTF-8 text"),
    ("latin.csv", b"text\ncaf\xe9\n", "latin.csv is not UTF-8 text"),
    ("nul.txt", "x\0y", "nul.txt holds a NUL byte"),
    ("nul.csv", "text\nx\0y\n", "nul.csv holds a NUL byte"),
    ("column.jsonl", '{"body": "x", "n": 1}', "column.jsonl has no column 'text'; it has 'body', 'n'."),
    ("column.csv", "body,n\nx,1\n", "column.csv has no column 'text'; it has 'body', 'n'."),
    ("column.tsv", "body\tn\nx\t1\n", "column.tsv has no column 'text'; it has 'body', 'n'."),
    ("number.jsonl", '{"text": 5}', "number.jsonl holds int where text should be: 5"),
    ("list.jsonl", '{"text": ["x"]}', "list.jsonl holds list where text should be"),
    ("strings.jsonl", '"x"', "strings.jsonl holds a row that is not an object"),
    ("bad.jsonl", '{"text": "x"}\n\n{"text":\n', "bad.jsonl cannot be read as jsonl: line 3 is no JSON"),
    ("bad.json", '[{"text": "x"}', "bad.json cannot be read as json: "),
    ("wide.csv", "text\nx, y\n", "wide.csv cannot be read as csv: rows have more fields than the header"),
    ("ragged.csv", "text,n\nx,1\nx,1,2,3\n", "ragged.csv cannot be read as csv: "),
    ("bad.parquet", "PAR1", "bad.parquet cannot be read as parquet: "),
])  # fmt: skip
def test_a_bad_file_is_refused_in_one_sentence(write, name, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        list(documents(write(name, content)))
    assert "\n" not in str(caught.value)


def test_a_missing_parquet_column_is_named(tmp_path):
    path = rows_as("parquet", tmp_path / "a.parquet", TEXTS)
    with pytest.raises(ValueError, match="a.parquet has no column 'body'; it has 'n', 'text'."):
        list(documents(path, column="body"))


@pytest.mark.parametrize("source, message", [
    ([], "The list is empty"),
    (["x", 5], "The list holds int where text should be: 5"),
    ([None], "The list holds NoneType where text should be"),
    ([b"x"], "The list holds bytes where text should be"),
    (5, "A corpus is a path, a dataset or an iterable of strings, got 5"),
    (datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["x"]})), "several parts .'train'."),
    (datasets.Dataset.from_dict({"body": ["x"]}), "The Dataset has no column 'text'; it has 'body'"),
])  # fmt: skip
def test_a_bad_source_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        list(documents(source))


def test_arguments_are_checked_at_the_call(tmp_path, write):
    path, rows = write("a.txt", "x"), write("a.jsonl", "")
    with pytest.raises(FileNotFoundError, match="There is no file .*none.txt"):
        documents(str(tmp_path / "none.txt"))
    with pytest.raises(FileNotFoundError, match="There is no file .*none"):
        documents(tmp_path / "none")
    with pytest.raises(ValueError, match="is a folder; give one file"):
        documents(str(tmp_path))
    with pytest.raises(ValueError, match="sample_by must be one of auto, line, .* got 'page'"):
        documents(path, sample_by="page")
    with pytest.raises(FileNotFoundError, match="There is no file none"):
        documents("./none")  # it begins like a path, so no hub is asked
    with pytest.raises(ValueError, match="name of the corpus is empty"):
        documents("")
    with pytest.raises(ValueError, match="column='body' is for files with columns; .* plain text"):
        documents(path, column="body")
    for key in ("config", "split"):
        with pytest.raises(ValueError, match=f"{key}='x' chooses part of a dataset of the hub"):
            documents(rows, **{key: "x"})
    for source in (rows, ["x"], "me/novels"):
        with pytest.raises(ValueError, match="sample_by='line' cuts text files"):
            documents(source, sample_by="line")
    for source in (path, rows, ["x"]):
        with pytest.raises(ValueError, match="config='en' chooses part of a dataset of the hub"):
            documents(source, config="en")

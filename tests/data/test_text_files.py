"""Text on disk: what is read, what is held out, and the errors for unusable input."""

from __future__ import annotations

import gzip
import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import unprivileged

from suite.data.reader import is_held_out
from suite.data.sources import text_files
from suite.errors import UserError

SHARED = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


def jsonl(*texts: str) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def test_kinds_of_files_and_folders_give_the_same_documents(tmp_path: Path) -> None:
    texts = ["one", "two\nlines\u2028here", "drei — äöü", " "]
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jsonl").write_bytes(jsonl(*texts))
    (tmp_path / "sub" / "b.jsonl.gz").write_bytes(gzip.compress(jsonl("last")))
    (tmp_path / "README.md").write_text("not part of it")
    assert list(text_files.FileReader(tmp_path / "a.jsonl", "text")) == texts[:3], "blank documents are skipped"
    assert list(text_files.FileReader(tmp_path / "sub" / "b.jsonl.gz", "text")) == ["last"]
    assert list(text_files.FileReader(tmp_path, "text")) == [*texts[:3], "last"]


def test_a_text_file_is_split_at_blank_lines_and_loses_only_blank_lines(tmp_path: Path) -> None:
    paragraphs = [f"{i} " + "word " * (90 + i) + "\n" for i in range(40)]
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\n \n".join(paragraphs).encode())
    documents = list(text_files.FileReader(path, "text"))
    assert 5 < len(documents) < 20
    assert all(len(text) >= 2000 for text in documents[:-1])
    assert "".join(documents).split() == "".join(paragraphs).split()
    assert all(text.startswith(tuple("0123456789")) for text in documents)


def test_the_held_out_share_depends_on_each_document_alone() -> None:
    texts = [f"document {i}" for i in range(4000)]
    held = {text for text in texts if is_held_out(text, 0.05)}
    assert len(held) == pytest.approx(200, abs=60)
    assert held <= {text for text in texts if is_held_out(text, 0.1)}


def test_the_fingerprint_depends_on_the_content_not_on_paths(tmp_path: Path) -> None:
    for name, content in (("a/x.txt", b"one"), ("b/y.txt", b"one"), ("c/x.txt", b"two"), ("d/x.jsonl", b"one")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
    prints = {name: text_files.fingerprint(tmp_path / name) for name in "abcd"}
    assert prints["a"] == prints["b"] == text_files.fingerprint(tmp_path / "a" / "x.txt")
    assert len(set(prints.values())) == 3


BROKEN = {
    "none.jsonl": (None, r"data\.path: got '.*none\.jsonl', which does not exist, allowed: a \.txt"),
    "data.csv": (b"a,b", r"data\.path: got '.*data\.csv'"),
    "empty.jsonl": (b"\n", r"empty\.jsonl', which holds no text"),
    "empty.txt": (b" \n\n", r"which holds no text"),
    "field.jsonl": (
        jsonl("fine") + b'{"body": "x", "id": 3}\n',
        r"field\.jsonl:2: data\.field 'text': not among the fields, which are body, id; allowed: a field with text",
    ),
    "type.jsonl": (b'{"text": 3}\n', r"type\.jsonl:1: data\.field 'text': got int"),
    "half.jsonl": (b'{"text": "\\ud800"}\n', r"half\.jsonl:1: data\.field 'text': got half of a surrogate"),
    "list.jsonl": (b'["x"]\n', r"list\.jsonl:1: got list"),
    "short.jsonl": (jsonl("fine") + b'{"text": "x', r"short\.jsonl:2: not JSON"),
    "deep.jsonl": (jsonl("fine") + b"[" * 100_000, r"deep\.jsonl:2: not JSON \(.*recursion"),
    "latin.txt": ("\nå".encode("latin-1"), r"latin\.txt:2: got the byte 0xe5, allowed: UTF-8 text"),
    "latin.jsonl": (jsonl("fine") * 3 + b"\xff", r"latin\.jsonl:4: got the byte 0xff"),
    "short.jsonl.gz": (gzip.compress(jsonl("fine" * 50))[:-9], r"short\.jsonl\.gz: .*gzip"),
    "no.jsonl.gz": (jsonl("fine"), r"no\.jsonl\.gz: .*gzip"),
    "flip.jsonl.gz": (gzip.compress(jsonl("fine"))[:10] + b"\x07junk", r"flip\.jsonl\.gz: .*gzip"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unusable_input_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        list(text_files.FileReader(tmp_path / name, "text"))
    assert re.search(message, str(raised.value))
    assert "\n" not in str(raised.value)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.path: got "):
        text_files.fingerprint(tmp_path)


@pytest.mark.skipif(not SHARED.exists(), reason="no real text: neither SHARED_DATA nor ../shared/data")
def test_the_factbook_has_the_number_of_documents_of_its_index() -> None:
    documents = text_files.FileReader(SHARED / "text" / "factbook" / "factbook_fields.jsonl.gz", "text")
    assert sum(1 for _ in documents) == pytest.approx(66_335, rel=0.001)


def test_parquet_gives_the_documents_of_jsonl(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"document {i}" for i in range(700)] + [" "]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": range(701), "text": texts}), path, row_group_size=300)
    assert list(text_files.FileReader(path, "text")) == texts[:-1]
    with pytest.raises(
        UserError, match=r"a\.parquet: data\.field 'body': not among the columns, which are id, text; allowed: a column"
    ):
        list(text_files.FileReader(path, "body"))
    with pytest.raises(UserError, match=r"a\.parquet:1: data\.field 'id': got int"):
        list(text_files.FileReader(path, "id"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.parquet: not a whole parquet file") as raised:
        list(text_files.FileReader(path, "text"))
    assert "\n" not in str(raised.value)


def test_a_reader_resumes_at_the_position_of_another(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl("one", " ", "two"))
    (tmp_path / "b.txt").write_text("three " * 400 + "\n\n" + "four " * 500 + "\n\nfive\n")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(jsonl("six", "seven")))
    whole = list(text_files.FileReader(tmp_path, "text"))
    assert len(whole) == 7
    for count in range(1, len(whole) + 1):
        first = text_files.FileReader(tmp_path, "text")
        head = [text for text, _ in zip(first, range(count), strict=False)]
        saved = json.loads(json.dumps(first.position))
        # zip reads one document more than it returns, except at the end
        ahead = whole[: min(count + 1, len(whole))]
        assert head == whole[:count]
        assert ahead + list(text_files.FileReader(tmp_path, "text", saved)) == whole


def test_the_share_read_grows_to_one(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(*(["text " * 2000] * 20)))
    reader = text_files.FileReader(tmp_path, "text")
    shares = [reader.share for _ in reader]
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.2
    assert shares[-1] == pytest.approx(1.0)


def test_compressed_files_are_read(tmp_path: Path) -> None:
    import pyarrow

    texts = [f"document {i}\u2028 é" for i in range(500)]
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(jsonl(*texts[:100])))
    with pyarrow.CompressedOutputStream(str(tmp_path / "b.jsonl.zst"), "zstd") as file:
        file.write(jsonl(*texts[100:300]))
    half = jsonl(*texts[300:400]), jsonl(*texts[400:])
    frames = [pyarrow.compress(part, codec="zstd", asbytes=True) for part in half]
    (tmp_path / "c.json.zst").write_bytes(b"".join(frames))  # files made by appending have several frames
    assert list(text_files.FileReader(tmp_path, "text")) == texts
    paragraphs = "\n\n".join(f"{i} " + "word " * 450 for i in range(5))
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(paragraphs.encode()))
    assert len(list(text_files.FileReader(tmp_path / "book.txt.gz", "text"))) == 5
    (tmp_path / "d.jsonl.zst").write_bytes(frames[0][:-20])
    with pytest.raises(UserError, match=r"d\.jsonl\.zst"):
        list(text_files.FileReader(tmp_path / "d.jsonl.zst", "text"))


def test_a_plain_json_file_is_text_only_if_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl("one"))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert list(text_files.FileReader(tmp_path, "text")) == ["one"]
    (tmp_path / "b.json").write_bytes(jsonl("two"))
    assert list(text_files.FileReader(tmp_path / "b.json", "text")) == ["two"]


def test_hidden_files_and_files_about_the_data_are_not_data(tmp_path: Path) -> None:
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in ("corpus.jsonl", ".ipynb_checkpoints/corpus-checkpoint.jsonl", "._corpus.jsonl"):
        (tmp_path / name).write_bytes(jsonl("one", "two"))
    for name in ("README.txt", "LICENSE.txt"):
        (tmp_path / name).write_text("about the data")
    config = text_files.TextData(kind="text", path=str(tmp_path))
    assert config.source_files() == ["corpus.jsonl"]
    assert list(config.reader()) == ["one", "two"]
    assert list(text_files.FileReader(tmp_path / "README.txt", "text")) == ["about the data"]
    hidden = tmp_path / ".data"
    hidden.mkdir()
    (hidden / "a.jsonl").write_bytes(jsonl("three"))
    assert list(text_files.FileReader(hidden, "text")) == ["three"], "a hidden folder is read if it is named"


def test_what_is_named_as_data_and_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl("one"))
    os.mkfifo(tmp_path / "notes")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    assert len(text_files.files(tmp_path)) == 2, "links to files are followed, and other names are not data"
    kinds: dict[str, Callable[[Path], object]] = {
        "pipe.jsonl": os.mkfifo,
        "socket.txt": lambda path: socket.socket(socket.AF_UNIX).bind(os.path.relpath(path)),
        "gone.jsonl": lambda path: path.symlink_to(tmp_path / "nowhere.jsonl"),
        "loop.jsonl": lambda path: path.symlink_to(path),
        "more": lambda path: path.symlink_to(tmp_path, target_is_directory=True),
    }
    for name, make in kinds.items():
        make(tmp_path / name)
        with pytest.raises(UserError, match=rf"data\.path: .*{name}: is a link .*, allowed: files") as raised:
            text_files.files(tmp_path)
        assert "\n" not in str(raised.value)
        (tmp_path / name).unlink()
    os.mkfifo(tmp_path / "named.jsonl")
    with pytest.raises(UserError, match=r"data\.validation: .*named\.jsonl: is a link .* or a pipe"):
        text_files.fingerprint(tmp_path / "named.jsonl", where="data.validation")


@unprivileged.needs_permissions
def test_a_folder_that_may_not_be_read_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("open", "closed", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("text")
    (tmp_path / "closed").chmod(0)
    (tmp_path / ".hidden").chmod(0)
    program = "import sys; from pathlib import Path; from suite.data.sources.text_files import files\ntry:"
    program += "\n print(files(Path(sys.argv[1])))\nexcept Exception as error:\n print(type(error).__name__, error)"
    listed = [unprivileged.run(program, tmp_path)]
    (tmp_path / "closed").chmod(0o700)
    listed.append(unprivileged.run(program, tmp_path))
    assert listed[0].startswith(f"UserError data.path: {tmp_path / 'closed'}: cannot be read: Permission denied")
    assert listed[1].count("a.txt") == 2


def test_null_texts_are_skipped_and_counted(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": None}, {"text": " "}, {"text": "two"}, {"text": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = text_files.FileReader(tmp_path, "text")
    assert (list(reader), reader.skipped) == (["one", "two"], 3)
    (tmp_path / "a.jsonl").write_text('{"text": null}\n')
    with pytest.raises(UserError, match="holds no text"):
        list(text_files.FileReader(tmp_path, "text"))


def test_an_integer_of_many_digits_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two", "id": ' + "9" * 5000 + "}\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2: ") as raised:
        list(text_files.FileReader(tmp_path, "text"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("copy", ["a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.parquet"])
def test_a_copy_of_a_file_in_another_format_is_refused_by_name(copy: str, tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.txt", "b.jsonl", "sub/a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert len(text_files.files(tmp_path)) == 4
    (tmp_path / copy).touch()
    with pytest.raises(UserError, match=r"data\.path: got .*a\.jso?n?.* and a\."):
        text_files.files(tmp_path)


def test_a_validation_file_that_is_trained_on_is_refused(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    for name in ("all/train.jsonl", "all/valid.jsonl", "other.jsonl"):
        (tmp_path / name).write_bytes(jsonl("a document", name))

    def data(validation: str) -> text_files.TextData:
        return text_files.TextData(kind="text", path=str(tmp_path / "all"), validation=str(tmp_path / validation))

    assert data("other.jsonl").identified().validation_fingerprint
    with pytest.raises(UserError, match=r"data\.validation: got '.*', whose file .*valid\.jsonl is also trained on"):
        data("all/valid.jsonl").identified()

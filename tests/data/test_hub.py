"""Hub data sets: `datasets` streams a local folder in the layout of the hub, without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from suite.data.corpus import prepare
from suite.data.reader import is_held_out
from suite.data.sources.hub import HubData, HubReader
from suite.data.tokenizer_config import TokenizerConfig
from suite.errors import UserError
from suite.grids import load_cell

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

TEXTS = [f"document {number} of the set" for number in range(90)]
BYTES = TokenizerConfig(kind="bytes")


@pytest.fixture
def name(tmp_path: Path) -> str:
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for shard in range(3):
        texts = TEXTS[30 * shard : 30 * shard + 30]
        table = pyarrow.table({"id": range(30), "text": texts})
        parquet.write_table(table, folder / f"train-{shard:05}-of-00003.parquet", row_group_size=8)
    return str(tmp_path / "set")


def hub(name: str, **fields: object) -> HubData:
    return HubData.model_validate({"kind": "hub", "name": name, "tokenizer": BYTES, "held_out": 0.1, **fields})


def test_a_stream_is_read_in_order_and_resumed_anywhere(name: str) -> None:
    assert list(HubReader(hub(name))) == TEXTS
    for count in (1, 29, 30, 31, 75, 90):
        reader = HubReader(hub(name))
        documents = iter(reader)
        head = [next(documents) for _ in range(count)]
        saved = json.loads(json.dumps(reader.position))
        assert saved["records"] == count
        assert head + list(HubReader(hub(name), saved)) == TEXTS


def test_a_corpus_is_prepared_up_to_its_tokens(name: str, tmp_path: Path) -> None:
    corpus = prepare(hub(name, tokens=500), tmp_path / "cache")
    trained = [text for text in TEXTS if not is_held_out(text, 0.1)]
    assert 500 <= corpus.parts[0].tokens < 530
    text = corpus.tokenizer.decode(corpus.parts[0].rounds[0].tokens.tolist())
    assert "".join(trained).startswith(text)
    assert set(corpus.held_out) <= {text for text in TEXTS if is_held_out(text, 0.1)}
    assert corpus.loader(0, 2).batch(0).tokens_BT.shape == (2, 2048)
    whole = prepare(hub(name), tmp_path / "cache")
    assert whole.fingerprint != corpus.fingerprint
    assert whole.held_out == [text for text in TEXTS if is_held_out(text, 0.1)]


def test_a_prepared_corpus_needs_no_hub(name: str, tmp_path: Path) -> None:
    first = prepare(hub(name), tmp_path / "cache")
    Path(name).rename(tmp_path / "gone")
    assert prepare(hub(name, seq_len=64), tmp_path / "cache").fingerprint == first.fingerprint


def test_the_fingerprint_follows_the_content_under_one_name(name: str, tmp_path: Path) -> None:
    first = prepare(hub(name), tmp_path / "one")
    table = pyarrow.table({"id": range(30), "text": [text.upper() for text in TEXTS[:30]]})
    parquet.write_table(table, Path(name) / "data" / "train-00000-of-00003.parquet")
    assert prepare(hub(name), tmp_path / "two").fingerprint != first.fingerprint


def test_a_missing_text_field_is_named_in_one_line(name: str) -> None:
    with pytest.raises(UserError, match=r"data\.field: got 'body', which .*set does not have, allowed: id, text$"):
        HubReader(hub(name, field="body"))
    with pytest.raises(UserError, match=r"set: record 1: data\.field 'id': got int"):
        list(HubReader(hub(name, field="id")))


def test_a_missing_split_is_named_in_one_line(name: str) -> None:
    with pytest.raises(UserError, match=r"data\.name: got '.*set', which cannot be read: .*split") as raised:
        HubReader(hub(name, split="test"))
    assert "\n" not in str(raised.value)


def test_an_offline_hub_data_set_is_refused_in_one_line_with_the_remedy(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from suite.data.sources.hub import HubData\n"
        "from suite.data.corpus import prepare\n"
        "from suite.errors import UserError\n"
        "from pathlib import Path\n"
        "config = HubData(kind='hub', name='mlfoundations/dclm-baseline-1.0', tokenizer={'kind': 'bytes'})\n"
        "try: prepare(config, Path(sys.argv[1]))\n"
        "except UserError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert shown.count("\n") == 1
    assert shown.startswith("data.name: got 'mlfoundations/dclm-baseline-1.0', which cannot be read: ")
    assert "offline" in shown.lower()
    assert "kind: text with data.path at local .parquet or .jsonl files" in shown
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


MIXTURE = "{kind: mixture, tokenizer: {kind: bytes}, parts: {%s}}"
CELL = """
model: {{family: dense, base: w32}}
data: {}
train: {{batch_rows: 4, tokens: 1000, lr: 1e-3}}
"""


def test_hashing_a_cell_sends_no_request_to_the_hub(tmp_path: Path) -> None:
    def hash_of(**fields: str) -> str:
        data = {"kind": "hub", "name": "some/set", "tokenizer": {"kind": "bytes"}, **fields}
        (tmp_path / "cell.yaml").write_text(CELL.format(json.dumps(data)))
        return load_cell(tmp_path / "cell.yaml").hash8

    others = [{"subset": "a"}, {"split": "b"}, {"revision": "c"}, {"tokens": 10}, {"name": "some/other"}]
    assert len({hash_of(**fields) for fields in [{}, *others]}) == 6
    assert hash_of(split="train") == hash_of()


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ("{kind: hub, name: a/b}", r"data\.tokenizer: got nothing, allowed: a tokenizer: kind file, bytes or bpe"),
        ("{name: a/b}", r"data\.kind: got nothing, allowed: bios, text, hub"),
        ("{kind: hubb}", r"data\.kind: got 'hubb', did you mean hub\?, allowed: bios, text, hub"),
        (MIXTURE % "web: {name: a/b}", r"data\.parts\.web\.kind: got nothing, allowed: text, hub"),
        (MIXTURE % "web: {kind: hub, weight: 1}", r"data\.parts\.web\.name: got nothing, allowed: a hub data set"),
        (MIXTURE % "hub: {kind: hub, name: a, wieght: 1}", r"data\.parts\.hub\.weight: got nothing, allowed: share"),
        (
            MIXTURE % "web: {kind: hub, name: a, weight: 1, sbset: 1}",
            r"data\.parts\.web\.sbset: unknown field, did you mean subset\?",
        ),
    ],
)
def test_errors_in_data_blocks_name_the_users_fields(data: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "cell.yaml").write_text(CELL.format(data))
    with pytest.raises(UserError, match=complaint):
        load_cell(tmp_path / "cell.yaml")

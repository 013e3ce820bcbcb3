"""What tests of several packages share: corpora and models small enough to make in every session, and real data."""

from __future__ import annotations

import json
import os
from pathlib import Path

# Triton kernels run in the interpreter where there is no NVIDIA device; triton reads the variable on first import.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from naive_scoring import small_model

from suite.data.corpus import Corpus, prepare
from suite.data.sources.bios import BiosData
from suite.data.sources.text_files import TextData
from suite.data.tokenizer_config import TokenizerConfig
from suite.models.transformer import Transformer


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which corpora are prepared once per session."""
    return tmp_path_factory.mktemp("corpora")


@pytest.fixture(scope="session")
def bios(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A world of 30 people, with questions about half of them."""
    config = BiosData(kind="bios", people=30, questions=0.5, seq_len=64)
    return prepare(config, tmp_path_factory.mktemp("bios"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Forty short documents in bytes, with accents and one longer than a row."""
    folder = tmp_path_factory.mktemp("text")
    lines = [f"Document {n}: é and ø, {'again and ' * (n % 7)}{n * n}." for n in range(40)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    config = TextData(
        kind="text",
        path=str(folder / "corpus.jsonl"),
        held_out=0.3,
        seq_len=48,
        tokenizer=TokenizerConfig(kind="bytes"),
    )
    return prepare(config, folder / "cache")


@pytest.fixture(scope="session")
def bios_model(bios: Corpus) -> Transformer:
    return small_model(bios)


@pytest.fixture(scope="session")
def text_model(text: Corpus) -> Transformer:
    return small_model(text)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real evaluation sets; tests that need it are skipped where it is absent."""
    shared = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (shared / "eval").is_dir():
        pytest.skip(f"no evaluation data in {shared / 'eval'} (set SHARED_DATA)")
    return shared / "eval"

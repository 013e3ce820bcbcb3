"""Corpora and models small enough to be made in every session."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from by_hand import small_model

from suite import data
from suite.cells import BiosData, TextData, Tokenizer
from suite.data import Corpus
from suite.models.transformer import Transformer

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)  # the models are too small for more


@pytest.fixture(scope="session")
def bios(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A world of 30 people, half of them asked about."""
    config = BiosData(kind="bios", people=30, questions=0.5, seq_len=64)
    return data.prepare(config, tmp_path_factory.mktemp("bios"))


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
        tokenizer=Tokenizer(kind="bytes"),
    )
    return data.prepare(config, folder / "cache")


@pytest.fixture(scope="session")
def bios_model(bios: Corpus) -> Transformer:
    return small_model(bios)


@pytest.fixture(scope="session")
def text_model(text: Corpus) -> Transformer:
    return small_model(text)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real evaluation sets; tests that need it are skipped where it is absent."""
    shared = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (shared / "eval").is_dir():
        pytest.skip(f"no evaluation data in {shared / 'eval'} (set SHARED_DATA)")
    return shared / "eval"

"""lm-eval's own adapter for transformers gives the same weights the same scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from invented_rows import TASKS, write_rows
from naive_scoring import small_model

from suite.cells import EvalConfig
from suite.data.corpus import Corpus, prepare
from suite.data.sources.text_files import TextData
from suite.data.tokenizer_config import TokenizerConfig
from suite.data.tokenizers import BPETokenizer
from suite.evaluate import catalog, harness
from suite.evaluate.adapter import Codec, SuiteLM
from suite.evaluate.datasets import DataRoot
from suite.models.transformer import Transformer

pytestmark = pytest.mark.slow
LENGTH = 1024


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """BPE over this package's own source."""
    folder = tmp_path_factory.mktemp("source")
    for number, path in enumerate(sorted(Path(harness.__file__).parents[1].rglob("*.py"))):
        (folder / f"{number}.txt").write_text(path.read_text())
    config = TextData(kind="text", path=str(folder), tokenizer=TokenizerConfig(kind="bpe", vocab_size=600))
    return prepare(config, tmp_path_factory.mktemp("cache"))


def to_transformers(model: Transformer):
    """Convert a dense model to a transformers Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = model.size
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=size.dim,
        intermediate_size=size.ffn_hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        rms_norm_eps=1e-5,
        rope_theta=size.rope_theta,
        max_position_embeddings=LENGTH + 1,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    names = {
        "embedding": "model.embed_tokens",
        "output": "lm_head",
        "layers": "model.layers",
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
        "attention": "self_attn",
        "feed_forward": "mlp",
        "wq": "q_proj",
        "wk": "k_proj",
        "wv": "v_proj",
        "wo": "o_proj",
        "w1": "gate_proj",
        "w2": "down_proj",
        "w3": "up_proj",
    }
    weights = {
        ".".join(names.get(part, part) for part in name.split(".")): value for name, value in model.state_dict().items()
    }
    weights["model.norm.weight"] = weights.pop("norm.weight")
    exported = LlamaForCausalLM(config)
    exported.load_state_dict(weights)
    return exported.eval()


@pytest.fixture(scope="module")
def model(corpus: Corpus) -> Transformer:
    return small_model(corpus)


def stock_adapter(corpus: Corpus, model: Transformer, starts_texts: bool):
    """Return lm-eval's adapter of the model; `starts_texts`: with an end-of-text token before every text."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers.processors import TemplateProcessing

    assert isinstance(corpus.tokenizer, BPETokenizer)
    eot = corpus.tokenizer.eot_id
    trained = RustTokenizer.from_str(corpus.tokenizer._trained.to_str())
    trained.add_special_tokens(["<|eot|>"])
    trained.post_processor = TemplateProcessing(single="<|eot|> $A", special_tokens=[("<|eot|>", eot)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=trained)
    fast.add_special_tokens({"bos_token": "<|eot|>", "eos_token": "<|eot|>"})
    assert fast.bos_token_id == eot
    return HFLM(
        pretrained=to_transformers(model),
        tokenizer=fast,
        max_length=LENGTH,
        add_bos_token=starts_texts,
        batch_size=4,
        device="cpu",
    )


def test_the_transformers_adapter_of_lm_eval_gives_the_same_scores(
    corpus: Corpus, model: Transformer, real_data: Path
) -> None:
    config = EvalConfig(tasks=("nq_open", "triviaqa", "hellaswag", "piqa", "openbookqa"), num_fewshot=2, limit=4)
    prepared = harness.prepare(config, catalog.Sources(corpus, DataRoot(real_data)))

    ours = harness.scores_of(SuiteLM(model, Codec(corpus.tokenizer), LENGTH, 8192), prepared)
    theirs = harness.scores_of(stock_adapter(corpus, model, starts_texts=True), prepared)
    assert ours.keys() == theirs.keys()
    differences = {name: (scores, theirs[name]) for name, scores in ours.items() if scores != theirs[name]}
    assert not differences
    eot = corpus.tokenizer.eot_id
    logits = to_transformers(model)(torch.tensor([[eot, 5, 6, 7]])).logits
    assert torch.allclose(logits, model.eval()(torch.tensor([[eot, 5, 6, 7]])), atol=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_it_gives_invented_rows_the_same_scores(task: str, corpus: Corpus, model: Transformer, tmp_path: Path) -> None:
    sources = catalog.Sources(corpus, DataRoot(write_rows(tmp_path)))
    prepared = harness.prepare(EvalConfig(tasks=(task,), num_fewshot=2), sources)
    # Stock rolling windows start with an end-of-text token already, and would score the one before the text.
    stock = stock_adapter(corpus, model, starts_texts=task != "wikitext")
    length = 64 if task == "wikitext" else LENGTH
    stock._max_length = length
    ours = harness.scores_of(SuiteLM(model, Codec(corpus.tokenizer), length, 8192), prepared)[task]
    theirs = harness.scores_of(stock, prepared)[task]
    assert ours["answers"] == theirs["answers"]
    for metric, score in theirs["metrics"].items():
        assert ours["metrics"][metric] == pytest.approx(score, rel=1e-5)

"""`engram` compared with plain re-implementations: hashes in Python integers, the layer token by token in numpy."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_families import VOCAB, config, model, tokens
from tiny_cells import corpus_of, tiny_cell
from tokenizers import Regex, normalizers
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE

from suite.data import tokenizers
from suite.data.canonical_ids import canonical_ids, normalised
from suite.models import build, registry
from suite.models.accounting import account
from suite.models.lookup.engram import EngramConfig
from suite.models.lookup.hashing import odd_multipliers, primes_from
from suite.records import RunDir
from suite.train import checkpoint
from suite.train.loop import Trainer
from suite.train.optim import Optimizer

CANONICAL = [token // 2 for token in range(VOCAB)]


def engram(**options: Any) -> Any:
    """Build a model whose layer 1 has a memory and whose tokens share canonical ids in pairs."""
    options = {"head_rows": 40, "hash_heads": 2, "placement": (1,), "zero_kernel": False, **options}
    return build(config("engram", **options), VOCAB, 0, lambda: CANONICAL).eval()


def rows_by_hand(memory: Any, token_T: list[int], position: int) -> list[int]:
    """Return the rows of the n-grams that end at a position, computed with Python's unbounded integers."""
    hashes, first, rows = memory.hashes, 0, []
    ids = CANONICAL if hashes.canonical else list(range(VOCAB))
    heads = len(hashes.moduli) // (hashes.orders - 1)
    generator = np.random.default_rng(hashes.seed)
    half = (2**63 - 1) // (max(ids) + 1) // 2
    shape = hashes.orders if hashes.shared_mix else (len(hashes.moduli), hashes.orders)
    multipliers = generator.integers(0, half, shape, dtype=np.int64) * 2 + 1
    for head, rows_of_head in enumerate(hashes.moduli):
        mix = 0
        for back in range(2 + head // heads):
            identity = ids[token_T[position - back]] if position >= back else max(ids) + 1
            mix ^= identity * int(multipliers[back] if hashes.shared_mix else multipliers[head, back])
        assert 0 <= mix < 2**63
        rows.append(first + mix % rows_of_head)
        first += rows_of_head
    return rows


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_order": 4, "hash_seed": 7},
        {"canonical_ids": False},
        {"shared_mix": False, "prime_rows": False},
    ],
)
def test_rows_are_those_of_a_loop_over_integers(options: dict[str, Any]) -> None:
    memory = engram(**options).memory_layers()[1]
    token_BT = tokens(1, 12)
    windows_BTN = torch.nn.functional.pad(token_BT, (memory.window - 1, 0), value=-1).unfold(1, memory.window, 1)
    expected = [rows_by_hand(memory, token_BT[0].tolist(), position) for position in range(12)]
    assert memory.hashes(windows_BTN)[0].tolist() == expected


@pytest.mark.parametrize("gate", ["signed_root", "sigmoid", "none"])
@pytest.mark.parametrize("options", [{}, {"kernel": 0}, {"form": "v4.1", "kernel": 3, "projection_bias": True}])
def test_the_layer_equals_a_loop_over_tokens_in_float64(gate: str, options: dict[str, Any]) -> None:
    net = engram(gate=gate, **options).double()
    memory, token_BT = net.memory_layers()[1], tokens(1, 15)
    with torch.no_grad():
        for parameter in memory.parameters():  # also biases and gains
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    memory.register_forward_hook(lambda _, inputs, y: seen.append((inputs[0][0].numpy(), y[0].numpy())))
    with torch.no_grad():
        net(token_BT)
    (x_TD, y_TD), weight = seen[0], {name: p.detach().numpy() for name, p in memory.named_parameters()}
    table = memory.tables[0].weight.detach().numpy()

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean() + 1e-5) * weight[f"{name}.weight"]

    def linear(name: str, e: np.ndarray) -> np.ndarray:
        return weight[f"{name}.weight"] @ e + weight.get(f"{name}.bias", 0.0)

    values = []
    for position, x in enumerate(x_TD):
        e = np.concatenate([table[row] for row in rows_by_hand(memory, token_BT[0].tolist(), position)])
        g = 1.0
        if gate != "none":
            s = norm(linear("key", e), "key_norm") @ norm(x, "x_norm") / np.sqrt(32)
            s = np.sign(s) * np.sqrt(max(abs(s), 1e-6)) if gate == "signed_root" else s
            g = 1 / (1 + np.exp(-s))
        values.append(g * linear("value", e))
    for position, v in enumerate(values):
        y = v
        if memory.kernel:
            convolved = sum(
                weight["taps"][tap] * norm(values[position - tap * memory.window], "value_norm")
                for tap in range(memory.kernel)
                if position >= tap * memory.window
            )
            y = v + convolved / (1 + np.exp(-convolved))
        np.testing.assert_allclose(y_TD[position], y, rtol=1e-9, atol=1e-11)


def test_the_memory_is_added_to_the_stream_before_attention_or_next_to_the_feed_forward() -> None:
    before, beside = engram(), engram(point="beside_ffn")
    assert list(before.attached())[1] == "layers.1.before_attention"
    assert "layers.1.skip" in beside.attached()
    beside.load_state_dict({name.replace("before_attention", "skip"): x for name, x in before.state_dict().items()})
    assert not torch.allclose(before(tokens(1, 9)), beside(tokens(1, 9)), atol=1e-3)


def test_heads_have_distinct_ascending_primes_over_layers() -> None:
    moduli = config("engram", head_rows=5000, hash_heads=4).moduli()
    flat = [rows for layer in moduli for rows in layer]
    sieve = np.ones(6000, bool)
    for number in range(2, 78):
        sieve[number * number :: number] = False
    primes = [number for number in range(5000, 6000) if sieve[number]]
    assert flat == primes[:16]
    assert list(itertools.islice(primes_from(0), 4)) == [2, 3, 5, 7]


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"form": "v4.1", "head_rows": 16_000_000, "row_width": 256, "layers": 40}, 196.6e9),
        ({"form": "qwen", "head_rows": 20_000_000, "row_width": 160}, 51.2e9),
        # The rows per head of Engram-27B and -40B, whose totals are printed as 5.7 B and 18.5 B.
        ({"head_rows": 2_262_400, "row_width": 80}, 2_262_400 * 1280 * 2),
        ({"head_rows": 7_239_680, "row_width": 80}, 7_239_680 * 1280 * 2),
    ],
)
def test_totals_at_published_sizes(options: dict[str, Any], parameters: float) -> None:
    published = EngramConfig.model_validate({"family": "engram", "base": "1.3b", **options})
    assert account(published, 129_280, 4096).params_memory == pytest.approx(parameters, rel=1e-3)


def test_the_rows_of_the_deployed_models_are_exact() -> None:
    """Qwen's table is padded to a multiple of 128 rows."""
    v41 = config("engram", base="1.3b", layers=40, form="v4.1", head_rows=16_000_000, hash_heads=8)
    assert (v41.memory_placement, [sum(moduli) for moduli in v41.moduli()]) == ((1, 14), [384_006_168, 384_016_682])
    (rows,) = map(sum, config("engram", form="qwen", head_rows=20_000_000, hash_heads=8).moduli())
    assert -(-rows // 128) * 128 == 320_001_536


def test_multipliers_are_odd_and_their_products_fit_into_63_bits() -> None:
    for shared in (True, False):
        multipliers = odd_multipliers(1, 99_092, 16, 3, shared)
        assert (multipliers % 2 == 1).all()
        assert int(multipliers.max()) * 99_092 < 2**63
        assert (len(np.unique(multipliers)) == 3) == shared


LIBRARY = normalizers.Sequence(
    [
        normalizers.NFKC(),
        normalizers.NFD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"\s+"), " "),
    ]
)
"""The normalisation of the paper's code, by the tokenizers library."""


@pytest.mark.parametrize(
    "text", ["Ada", " ADA", "É", "ﬁn", "Ａ", "\t\n", " ", "a  b", "ß", "Ωμέγα", "①", "naïve ", "İ"]
)
def test_texts_are_normalised_like_the_tokenizers_library_does(text: str) -> None:
    expected = LIBRARY.normalize_str(text)
    assert normalised(text) == (expected if expected == " " else expected.strip(" "))


def test_words_that_differ_in_case_share_a_canonical_id() -> None:
    words = tokenizers.WordTokenizer(["\n", ".", "Ada", "Zoé", "ada", "zoe"])
    assert canonical_ids(words) == [0, 1, 2, 3, 4, 3, 4]


def test_bytes_that_are_not_a_character_have_separate_ids() -> None:
    ids = canonical_ids(tokenizers.BytesTokenizer())
    assert len(ids) == 257
    assert ids[ord("A")] == ids[ord("a")]
    assert ids[ord(" ")] == ids[ord("\n")] == ids[ord("\t")]
    assert len(set(ids[128:])) == 129
    assert len(set(ids)) == max(ids) + 1


def test_the_canonical_ids_of_a_bpe_group_spaces_and_case() -> None:
    bpe = tokenizers.BPETokenizer.train(["The cat and the Cat; the café, The CAFÉ and the cafe."] * 3, 300)
    ids = canonical_ids(bpe)
    groups: dict[int, set[str]] = {}
    for token in range(bpe.vocab_size - 1):
        text = bpe.decode([token])
        if "\ufffd" not in text:
            groups.setdefault(ids[token], set()).add(LIBRARY.normalize_str(text).strip(" "))
    assert all(len(texts) == 1 for texts in groups.values())
    assert any(len([i for i in ids if i == group]) > 2 for group in groups)


def test_canonical_ids_of_gpt2_are_those_of_the_library(real_data: Path) -> None:
    folder = real_data.parent / "tokenizer"
    bpe = RustTokenizer(BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
    bpe.decoder = ByteLevel()
    gpt2 = tokenizers.ReadyTokenizer(bpe, "<|endoftext|>")
    keys: dict[object, int] = {}
    for token in range(gpt2.vocab_size):
        text = LIBRARY.normalize_str(gpt2.decode([token]))
        key = text if text == " " else text.strip(" ")
        keys.setdefault(token if "\ufffd" in text or not key else key, len(keys))
    assert len(keys) == max(canonical_ids(gpt2)) + 1


def test_a_checkpoint_holds_the_canonical_ids_of_its_tokenizer(cache: Path, tmp_path: Path) -> None:
    cell = tiny_cell("engram")
    corpus = corpus_of(cell, cache)
    trainer = Trainer(cell, corpus, RunDir(tmp_path))
    trainer.train_step()
    trainer.save()
    ids = corpus.canonical_ids()
    assert max(ids) + 1 < corpus.vocab_size  # some words differ only in case
    loaded = checkpoint.load_model(RunDir(tmp_path), cell, corpus)
    for memory in loaded.memory_layers().values():
        assert memory.hashes.canonical_ids.tolist() == [*ids, max(ids) + 1]
    batch = corpus.loader(0, 2).batch(0)
    trained = trainer.model.eval()
    assert torch.equal(loaded(batch.tokens_BT, batch.segments_BT), trained(batch.tokens_BT, batch.segments_BT))


def test_the_table_has_five_times_the_learning_rate_and_no_weight_decay() -> None:
    net, train = model("engram"), tiny_cell("engram", lr=1e-3).train
    rules = Optimizer(net, train).rules
    assert {(rule.lr, rule.weight_decay) for name, rule in rules.items() if name.startswith("tables")} == {(5e-3, 0.0)}
    set_by_user = Optimizer(
        model("engram"), train.model_copy(update={"value_lr": 0.1, "value_weight_decay": 0.2})
    ).rules
    assert {(rule.lr, rule.weight_decay) for name, rule in set_by_user.items() if "tables" in name} == {(0.1, 0.2)}
    plus = Optimizer(model("memory_plus"), train).rules["tables.0.weight"]
    assert (plus.lr, plus.weight_decay) == (1e-2, 0.1)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"placement": (1, 4)}, "placement"),
        ({"prime_rows": False}, "prime_rows"),
        ({"form": "v4.1", "layers": 2}, "placement"),
    ],
)
def test_invalid_options_name_the_field(options: dict[str, Any], field: str) -> None:
    assert [problem[0] for problem in config("engram", **options).problems()] == [field]


def test_an_untrained_convolution_adds_nothing() -> None:
    zero, none = engram(zero_kernel=True), engram(kernel=0)
    none.load_state_dict(zero.state_dict(), strict=False)
    torch.testing.assert_close(zero(tokens(1, 9)), none(tokens(1, 9)))
    assert registry.family("engram").has_memory

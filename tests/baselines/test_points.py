"""The points at which modules of a family enter, each used by the example of docs/adding-a-baseline.md for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from model_families import VOCAB, tokens
from page_examples import POINTS, file_of
from tiny_cells import corpus_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from suite.baselines import checks, loading
from suite.cells import Cell
from suite.errors import UserError
from suite.models import Transformer, build, registry
from suite.models.accounting import account, meta_model
from suite.models.attachments import Attachments, Skip, validated
from suite.models.cache import EarlierTokens
from suite.models.usage import Reads
from suite.plan.activation_memory import StepTracer
from suite.plan.live_bytes import LiveBytes
from suite.plan.table_state import table_state
from suite.records import RunDir
from suite.train.loop import Trainer, train

every_point = pytest.mark.parametrize("name", list(POINTS))
every_new_point = pytest.mark.parametrize("name", [name for name in POINTS if name != "squared"])


@pytest.fixture(autouse=True)
def _restore_registry() -> Iterator[None]:
    before = set(registry.families())
    yield
    registry.unregister(set(registry.families()) - before)


def config_of(name: str, folder: Path, *replaced: tuple[str, str]) -> registry.ModelConfig:
    loading.load(file_of(name, folder, *replaced))
    return registry.family(name).config(family=name, base="w32")


def model_of(name: str, folder: Path) -> Transformer:
    """Build a model whose family's modules matter: their values are large enough to change every logit."""
    model = build(config_of(name, folder), VOCAB, 0)
    with torch.no_grad():
        for parameter in (*model.attached()[POINTS[name]].parameters(), *model.tables.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model.eval()


@every_point
def test_the_example_of_the_page_passes_the_checks(name: str, tmp_path: Path) -> None:
    config = config_of(name, tmp_path)
    checks.check(config)
    assert POINTS[name] in meta_model(config, VOCAB).attached()


@every_point
def test_the_module_at_the_point_changes_the_logits_of_its_own_and_later_tokens_only(name: str, tmp_path: Path) -> None:
    model, token_BT = model_of(name, tmp_path), tokens(2, 20)
    logits = model(token_BT)
    changed = token_BT.clone()
    changed[:, 12] = (token_BT[:, 12] + 1) % VOCAB
    assert torch.equal(model(changed)[:, :12], logits[:, :12])
    model.attached()[POINTS[name]].register_forward_hook(lambda _, __, y: y.index_fill(1, torch.tensor([12]), 3.0))
    assert torch.equal(model(token_BT)[:, :12], logits[:, :12])
    assert not torch.allclose(model(token_BT)[:, 12:], logits[:, 12:], atol=1e-2)


@every_point
def test_cache_padding_and_packing_change_nothing(name: str, tmp_path: Path) -> None:
    model, token_BT = model_of(name, tmp_path), tokens(2, 14)
    whole = model(token_BT)
    cache = model.new_cache(2, 14)
    parts = [model(part, cache=cache) for part in token_BT[:, :9].split([5, 1, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole[:, :9], rtol=1e-4, atol=1e-4)
    cache.select(torch.tensor([1, 0, 1]))
    rest = [model(part, cache=cache) for part in token_BT[[1, 0, 1], 9:].split([1, 4], 1)]
    torch.testing.assert_close(torch.cat(rest, 1), whole[[1, 0, 1], 9:], rtol=1e-4, atol=1e-4)

    padded_BT = torch.cat((torch.full((2, 3), 7), token_BT), 1)
    padded_BT[1] = padded_BT[1].roll(-3)
    pad_B, cache = torch.tensor([3, 0]), model.new_cache(2, 17)
    stepped = torch.cat([model(part, cache=cache, pad_B=pad_B) for part in padded_BT.split([2, 5, 1, 9], 1)], 1)
    for logits in (model(padded_BT, pad_B=pad_B), stepped):
        torch.testing.assert_close(logits[0, 3:], whole[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[1, :14], whole[1], rtol=1e-4, atol=1e-4)

    packed = model(token_BT.view(1, -1), torch.arange(2).repeat_interleave(14)[None])
    torch.testing.assert_close(packed.view(2, 14, -1), whole, rtol=1e-4, atol=1e-4)


@every_point
def test_the_account_equals_torchs_count_of_products(name: str, tmp_path: Path) -> None:
    config, rows, seq_len = config_of(name, tmp_path), 2, 32
    net = meta_model(config, VOCAB)
    batch_BT = torch.zeros(rows, seq_len, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        net(batch_BT, torch.zeros_like(batch_BT)).float().sum().backward()
    counted = account(config, VOCAB, seq_len)
    future = net.size.layers * 2 * net.size.dim * (seq_len - (seq_len + 1) / 2)
    assert counter.get_total_flops() == 6 * rows * seq_len * (counted.macs_total + future)
    assert sum(counted.params.values()) == sum(p.numel() for p in net.parameters())


@every_new_point
def test_the_plan_predicts_the_memory_of_a_step(name: str, cache: Path, tmp_path: Path) -> None:
    cell = cell_of(config_of(name, tmp_path))
    corpus = corpus_of(cell, cache)
    trainer = Trainer(cell, corpus, RunDir(tmp_path))
    trainer.train_step()
    live = LiveBytes()
    moments = [tensor for state in trainer.optimizer.adamw.state.values() for tensor in state.values()]
    for rows in trainer.optimizer.rows.values():
        moments += [value for value in vars(rows.state).values() if isinstance(value, torch.Tensor)]
    for tensor in (*trainer.model.parameters(), *trainer.model.buffers(), *moments):
        live.add(tensor)
    with live:
        trainer.train_step()
    parts = StepTracer(meta_model(cell.model, corpus.vocab_size), cell.data.seq_len).parts(8)
    assert parts.step(state=table_state(cell.train)).peak == pytest.approx(live.peak, rel=0.1)


def cell_of(config: registry.ModelConfig, **fields: object) -> Cell:
    return Cell.model_validate(
        {
            "model": config.model_dump(),
            "data": {"kind": "bios", "people": 30, "questions": 0.5},
            "train": {"batch_rows": 8, "epochs": 3.0, "lr": 5e-3, "log_every": 1, **fields},
        }
    )


@every_new_point
def test_a_stopped_run_resumes_to_the_same_weights(name: str, cache: Path, tmp_path: Path) -> None:
    cell = cell_of(config_of(name, tmp_path), checkpoint_every=2)
    corpus, models = corpus_of(cell, cache), []
    for stops in (False, True):
        run = RunDir(tmp_path / str(stops))
        run.path.mkdir()
        if stops:
            first = Trainer(cell, corpus, run)
            first.run_to_end(lambda first=first: first.step == 3)
        train(cell, corpus, run)
        models.append(Trainer(cell, corpus, run).model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(models[0].values(), models[1].values(), strict=True))


@every_new_point
def test_a_recomputed_block_gives_the_same_gradients(name: str, tmp_path: Path) -> None:
    from suite.train.parallel import recompute_blocks

    plain = model_of(name, tmp_path)
    recomputed = meta_model(plain.config, VOCAB)
    recomputed.to_empty(device="cpu")
    recomputed.load_state_dict(plain.state_dict())
    recompute_blocks(recomputed)
    for model in (plain, recomputed):
        model.train()(tokens(2, 9)).square().mean().backward()
    for (path, one), other in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert one.grad is not None, path
        assert other.grad is not None, path
        torch.testing.assert_close(one.grad, other.grad, msg=path)


def test_memories_at_several_points_of_a_layer_are_counted_separately(tmp_path: Path) -> None:
    at_feed_forward = ("attention_values={layer: TokenValues([table]) for layer in (0, 2)}", "{}")
    both = (
        "attention_values={0: TokenValues([table]), 2: TokenValues([table])}, skips={2: Skip(TokenValues([table]), 3)}"
    )
    path = file_of(
        "value_table", tmp_path, (at_feed_forward[0], both), ("import Attachments", "import Attachments, Skip")
    )
    loading.load(path)
    model = build(registry.ModelConfig(family="value_table", base="w32"), VOCAB, 0)
    assert list(model.memory_layers()) == [0, "layers.2.attention_values", "layers.2.skip"]
    reads = Reads(model)
    reads.start()
    model(tokens(2, 9))
    usage = reads.finish()
    assert [layer["reads"] for layer in usage["layers"].values()] == [18, 18, 18]
    assert usage["tables"][0]["layers"] == list(model.memory_layers())


def test_earlier_rows_are_those_of_a_loop() -> None:
    x_BTC = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0))
    segments_BT = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 1, 1, 1]])
    pad_B = torch.tensor([1, 0])
    for step, rows_BTC in zip((1, 3), EarlierTokens(0, segments_BT, None, pad_B).rows("x", x_BTC, (1, 3)), strict=True):
        for row in range(2):
            for t in range(9):
                exists = t - step >= pad_B[row] and segments_BT[row, t - step] == segments_BT[row, t]
                expected = x_BTC[row, t - step] if exists else torch.zeros(3)
                assert torch.equal(rows_BTC[row, t], expected), (row, t, step)


@pytest.mark.parametrize(
    ("name", "replaced", "words"),
    [
        (
            "convolved",
            ("before_attention={1:", "before_attention={7:"),
            "before_attention: got layer 7, allowed: 0 to 3",
        ),
        ("value_table", ("(0, 2)", "(0, -1)"), r"attention_values: got layer -1, allowed: 0 to 3"),
        ("embedding_gate", ("{0: Skip", "{4: Skip"), r"skips: got layer 4, allowed: 0 to 3"),
        ("embedding_gate", ("to=size.layers - 1", "to=size.layers"), r"skips: layer 0: to: got 4, allowed: 0 to 3"),
        (
            "bigram_input",
            ("[SwiGLU(size.dim, size.ffn_hidden)", "[SwiGLU"),
            "feed_forwards: layer 0: got type, allowed",
        ),
        (
            "convolved",
            ("{1: Convolution(size.dim)}", "{1: feed_forwards[2]}"),
            r"before_attention: layer 1: the same module is used at feed_forwards: layer 2",
        ),
        ("bigram_input", ("view_as(x_BTD)", "view_as(x_BTD).double()"), r"input_embedding \(Bigrams\): forward"),
        (
            "value_table",
            ("size.kv_heads * size.head_dim", "3 * size.dim"),
            r"0\.attention_values \(TokenValues\): forward returns \(2, 8, 96\) float32 .*allowed: \(2, 8, 32\)",
        ),
        (
            "embedding_gate",
            ('dense_cost("gate", self.gate.weight.numel(), self.gate.weight.numel())', 'dense_cost("gate", 1024, 7)'),
            r"layers\.0\.skip \(EmbeddingGate\): cost\(\) counts 7 multiply-adds",
        ),
        ("convolved", ("self.taps.numel(), 0", "3, 0"), r"1\.before_attention \(Convolution\): cost\(\) counts 3"),
        ("convolved", ("self.taps, rows)", "self.taps, [r.roll(-9, 1) for r in rows])"), "later tokens change"),
    ],
)
def test_what_is_wrong_at_a_point_is_refused_by_family_point_and_layer(
    name: str, replaced: tuple[str, str], words: str, tmp_path: Path
) -> None:
    config = config_of(name, tmp_path, replaced)
    with pytest.raises(UserError, match=f"family {name}: {words}|family {name}: .*{words}") as refused:
        checks.check(config)
    assert "\n" not in str(refused.value)


def test_a_module_cannot_read_earlier_rows_twice_in_one_pass(tmp_path: Path) -> None:
    twice = ("rows = [", "earlier(x_BTD, (1,)); rows = [")
    model = build(config_of("convolved", tmp_path, twice), VOCAB, 0)
    with pytest.raises(ValueError, match=r"\(1, 'before_attention'\): rows of 3 tokens are stored, allowed: 0, once"):
        model(tokens(1, 3), cache=model.new_cache(1, 4))


def test_a_list_is_that_of_the_feed_forwards_and_anything_else_is_refused() -> None:
    modules: list[nn.Module] = [nn.Identity(), nn.Identity()]
    assert validated(modules, 2) == Attachments(modules)
    for wrong in ({}, None, (), Skip(modules[0], 1), Attachments([*modules, nn.Identity()])):
        with pytest.raises(ValueError, match=r"feed_forwards: got \w+, allowed: a list of 2 modules"):
            validated(wrong, 2)

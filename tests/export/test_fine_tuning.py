"""Exports of every family can be fine-tuned by the usual trainers: checkpointing, new tokens, accumulation, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from suite import models
from suite.export.export import export
from suite.models import registry

transformers = pytest.importorskip("transformers", reason="transformers, an extra, is not installed")
pytestmark = pytest.mark.usefixtures("isolated_transformers")
MEMORY = {"base": "w32", "half_keys": 16, "top_k": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "dense": {"family": "dense", "base": "w32"},
    "moe_topk": {"family": "moe_topk", "base": "w32"},
    "memory_plus": {"family": "memory_plus", **MEMORY},
    "engram": {"family": "engram", "base": "w32", "head_rows": 40, "hash_heads": 2},
    "peer tied": {"family": "peer", **MEMORY, "tie_embeddings": True},
}
VOCABULARY = 50


@pytest.fixture(params=list(FAMILIES))
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    options = FAMILIES[request.param]
    model = models.build(registry.family(options["family"]).config.model_validate(options), VOCABULARY, 0)
    export(model.eval(), tmp_path / "out")
    return tmp_path / "out"


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def tokens(vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(0, vocabulary, (2, 21), generator=torch.Generator().manual_seed(0))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()(tokens(), labels=tokens()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")
def test_gradient_checkpointing_recomputes_blocks_and_changes_no_gradient(reentrant: bool, exported: Path) -> None:
    model = loaded(exported)
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    calls: list[str] = []
    norms = [(name, module) for name, module in model.named_modules() if name.endswith(("0.attention_norm", "0.input_layernorm"))]  # fmt: skip # noqa: E501
    for name, module in norms:
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    found = gradients(model)
    assert len(calls) == 2, "once forward, once in the backward pass"
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-7)
    prompt = tokens()[:, :5]
    with_cache = model.eval().generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.gradient_checkpointing_disable()
    assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0), with_cache)
    calls.clear()
    gradients(model)
    assert len(calls) == 1


def test_new_tokens_leave_the_others_as_they_are(exported: Path, tmp_path: Path) -> None:
    model = loaded(exported).eval()
    with torch.no_grad():
        before = model(tokens()).logits
        model.resize_token_embeddings(VOCABULARY + 3)
        after = model(tokens()).logits
    assert after.shape[-1] == model.config.vocab_size == VOCABULARY + 3
    torch.testing.assert_close(after[..., :VOCABULARY], before, rtol=0, atol=1e-6)
    model.train()(tokens(VOCABULARY + 3), labels=tokens(VOCABULARY + 3)).loss.backward()
    model.eval().save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(tokens(VOCABULARY + 3)).logits, model(tokens(VOCABULARY + 3)).logits)


def test_accumulated_gradients_are_those_of_the_whole_batch(exported: Path) -> None:
    model = loaded(exported).eval()  # running statistics are not updated
    labels = tokens().clone()
    labels[0, 5:] = -100  # rows with different numbers of targets
    model(tokens(), labels=labels).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    count = int((labels[:, 1:] != -100).sum())
    for row in range(2):
        model(tokens()[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=count).loss.backward()
    for name, p in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-7)

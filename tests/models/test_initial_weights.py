"""Initial weights: the same in any parts, drawn in blocks where a tensor is large, and as they were where it is not."""

import hashlib
from dataclasses import dataclass, field

import pytest
import torch
from model_families import VOCAB, model

from suite.models import build, registry
from suite.models.distributions import Normal, Uniform, xavier_uniform
from suite.models.initial_weights import BLOCK, Part, draw
from suite.plan.live_bytes import LiveBytes


@dataclass(frozen=True)
class Counted(Normal):
    """A normal distribution that counts what is drawn from it."""

    drawn: list[int] = field(default_factory=list)

    def fill_(self, x: torch.Tensor, generator: torch.Generator) -> None:
        """Fill `x`."""
        self.drawn.append(x.numel())
        super().fill_(x, generator)


def seeded(key: str) -> torch.Generator:
    """Return the generator that belongs to a key, computed here."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)


@pytest.mark.parametrize(
    ("shape", "dim", "processes"),
    [
        ((5, 6), 0, 2),
        ((12, 8), 1, 4),
        ((4, 2, 1500, 1500), 2, 4),
        ((4, 2, 1500, 1500), 0, 3),
        ((1 << 12, 4100), 0, 4),
        ((1 << 12, 4100), 1, 4),
        (((1 << 19) + 3, 40), 1, 4),
        (((1 << 19) + 3, 40), 0, 5),
    ],
)
def test_the_parts_of_a_tensor_are_those_of_the_whole(shape: tuple[int, ...], dim: int, processes: int) -> None:
    whole = torch.empty(shape)
    draw(Normal(1.0), whole, torch.Size(shape), None, 3, "name")
    chunk = -(-shape[dim] // processes)
    for rank in range(processes):
        part = Part(dim, min(rank * chunk, shape[dim]), min((rank + 1) * chunk, shape[dim]))
        own = torch.empty(part.of(whole).shape)
        draw(Normal(1.0), own, torch.Size(shape), part, 3, "name")
        assert own.equal(part.of(whole))
    assert whole.std().item() == pytest.approx(1, abs=0.3 if whole.numel() < 100 else 0.01)


def test_a_tensor_of_one_block_is_drawn_at_once_from_the_generator_of_its_name() -> None:
    own = torch.empty(4096, 4096)
    draw(Normal(0.5), own, own.shape, None, 3, "name")
    assert own.numel() == BLOCK
    assert own.equal(torch.empty(4096, 4096).normal_(0.0, 0.5, generator=seeded("3/name")))


def test_the_blocks_of_a_larger_tensor_have_generators_of_their_own() -> None:
    own = torch.empty(4100, 4096)
    draw(Normal(0.5), own, own.shape, None, 3, "name")
    assert own[:4096].equal(torch.empty(4096, 4096).normal_(0.0, 0.5, generator=seeded("3/name")))
    assert own[4096:].equal(torch.empty(4, 4096).normal_(0.0, 0.5, generator=seeded("3/name/1")))


@pytest.mark.parametrize("shape", [(1 << 20, 128), (1 << 15, 4096)])
def test_a_process_draws_its_own_blocks_and_never_holds_the_whole_tensor(shape: tuple[int, int]) -> None:
    """A table by columns, a matrix by rows, over four processes."""
    law, dim = Counted(1.0), int(shape[0] == 1 << 20)
    part = Part(dim, shape[dim] // 4, shape[dim] // 2)
    own = torch.empty([shape[0] // 4, shape[1]] if dim == 0 else [shape[0], shape[1] // 4])
    with LiveBytes(own) as live:
        draw(law, own, torch.Size(shape), part, 3, "name")
    assert sum(law.drawn) == own.numel()
    assert live.peak <= 4 * BLOCK * 1.01


class Cut:
    """A law that a baseline brings itself: a normal distribution cut at two standard deviations."""

    def fill_(self, x: torch.Tensor, generator: torch.Generator) -> None:
        """Fill `x`."""
        torch.nn.init.trunc_normal_(x, a=-2.0, b=2.0, generator=generator)


def test_a_law_from_outside_is_drawn_in_blocks_and_in_parts() -> None:
    shape = torch.Size((4100, 4096))
    whole, half = torch.empty(shape), torch.empty(2050, 4096)
    draw(Cut(), whole, shape, None, 3, "name")
    draw(Cut(), half, shape, Part(0, 2050, 4100), 3, "name")
    assert half.equal(whole[2050:])
    last = torch.empty(4, 4096)
    Cut().fill_(last, seeded("3/name/1"))
    assert whole[4096:].equal(last)
    assert whole.abs().max() <= 2


@pytest.mark.parametrize("family", registry.families())
def test_a_process_can_draw_its_own_part_of_every_parameter(family: str) -> None:
    """No built-in family sets whole tensors."""
    assert not any(hasattr(module, "init_parameter") for module in model(family).modules())


def test_a_small_engram_has_the_values_it_always_had() -> None:
    """Those of whole tensors from the generator of the name."""
    net = model("engram")
    name = "layers.1.before_attention.value.weight"
    value = net.get_parameter(name)
    expected = torch.empty(value.shape).normal_(0.0, value.shape[1] ** -0.5, generator=seeded(f"0/{name}"))
    assert value.equal(expected)


def test_small_models_have_the_values_they_always_had() -> None:
    """Of a memory layer and its neighbours: sums recorded when every tensor was drawn at once."""
    options = {"base": "w32", "half_keys": 16, "top_k": 4}
    config = registry.family("memory_plus").config.model_validate({"family": "memory_plus", **options})
    state = build(config, VOCAB, 7).state_dict()
    assert {name: state[name].double().abs().sum().item() for name in SUMS} == pytest.approx(SUMS, abs=1e-3)


SUMS = {
    "embedding.weight": 228.325,
    "layers.0.attention.wo.weight": 49.634,
    "layers.1.feed_forward.keys": 127.906,
    "layers.2.feed_forward.query.weight": 254.817,
    "layers.3.feed_forward.query.bias": 0.0,
    "tables.0.weight": 1153.676,
}


def test_xavier_uniform_is_that_of_torch() -> None:
    law = xavier_uniform(48, 20)
    assert isinstance(law, Uniform)
    ours, theirs = torch.empty(20, 48), torch.empty(20, 48)
    law.fill_(ours, torch.Generator().manual_seed(0))
    torch.nn.init.xavier_uniform_(theirs, generator=torch.Generator().manual_seed(0))
    assert ours.equal(theirs)

"""Initial weights: the same in any parts, drawn by element where a tensor is large, and otherwise as ever."""

import hashlib
from dataclasses import dataclass, field

import pytest
import torch
from model_families import VOCAB, model
from scipy.stats import kstest, norm

from suite.models import build, initial_weights, registry
from suite.models.distributions import LOW_WORD, Constant, Normal, Uniform, philox, xavier_uniform
from suite.models.initial_weights import BLOCK, CHUNK, Part, draw
from suite.plan.live_bytes import LiveBytes


@dataclass(frozen=True)
class Counted(Normal):
    """A normal distribution that counts what is drawn from it."""

    drawn: list[int] = field(default_factory=list)

    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        """Return quantiles of the shape of `u`."""
        self.drawn.append(u.numel())
        return super().quantile(u)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of more than 1,000 elements are drawn by element, 300 at a time."""
    monkeypatch.setattr(initial_weights, "BLOCK", 1000)
    monkeypatch.setattr(initial_weights, "CHUNK", 300)


def seeded(key: str) -> torch.Generator:
    """Return the generator that belongs to a key, computed here."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)


@pytest.mark.parametrize(
    ("shape", "dim", "processes"),
    [
        ((5, 6), 0, 2),
        ((12, 8), 1, 4),
        ((4, 2, 15, 25), 3, 4),
        ((4, 2, 15, 25), 2, 4),
        ((4, 2, 15, 25), 1, 2),
        ((4, 2, 15, 25), 0, 3),
        ((128, 401), 0, 4),
        ((128, 401), 1, 4),
        ((403, 10), 1, 4),
        ((403, 10), 0, 5),
        ((2000,), 0, 3),
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_the_parts_of_a_tensor_are_those_of_the_whole(shape: tuple[int, ...], dim: int, processes: int) -> None:
    whole = torch.empty(shape)
    draw(Normal(1.0), whole, torch.Size(shape), None, 3, "name")
    chunk = -(-shape[dim] // processes)
    for rank in range(processes):
        part = Part(dim, min(rank * chunk, shape[dim]), min((rank + 1) * chunk, shape[dim]))
        own = torch.empty(part.of(whole).shape)
        draw(Normal(1.0), own, torch.Size(shape), part, 3, "name")
        assert own.equal(part.of(whole))
    assert whole.std().item() == pytest.approx(1, abs=0.3 if whole.numel() < 100 else 0.05)


def test_a_tensor_of_one_block_is_drawn_at_once_from_the_generator_of_its_name() -> None:
    own = torch.empty(2048, 2048)
    draw(Normal(0.5), own, own.shape, None, 3, "name")
    assert own.numel() == BLOCK
    assert own.equal(torch.empty(2048, 2048).normal_(0.0, 0.5, generator=seeded("3/name")))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((LOW_WORD,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_words_published_with_it(
    counter: tuple[int, ...], key: int, expected: tuple[int, ...]
) -> None:
    """The known answers for philox4x32 with 10 rounds in the authors' library, Random123."""
    a, b, c, d = (torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in philox((a, b, c, d), key)) == expected


@pytest.mark.usefixtures("small_blocks")
def test_an_element_of_a_large_tensor_depends_on_its_row_its_column_and_the_name() -> None:
    """Recomputed from the definition: a word of the counter (row, column // 4), and the quantile of scipy."""
    own = torch.empty(260, 1023)
    draw(Normal(0.5), own, own.shape, None, 3, "name")
    key = int.from_bytes(hashlib.sha256(b"3/name").digest()[:8], "big")
    for row, column in [(0, 0), (7, 1022), (259, 1), (255, 256), (256, 511)]:
        counter = [torch.tensor([word]) for word in (row, 0, column // 4, 0)]
        word = int(philox((counter[0], counter[1], counter[2], counter[3]), key)[column % 4])
        assert own[row, column].item() == pytest.approx(0.5 * norm.ppf((word + 0.5) / 2**32), rel=1e-6)


@pytest.mark.usefixtures("small_blocks")
def test_the_elements_of_a_large_tensor_are_normal_and_independent() -> None:
    own = torch.empty(260, 1023)
    draw(Normal(1.0), own, own.shape, None, 3, "name")
    other = torch.empty_like(own)
    draw(Normal(1.0), other, own.shape, None, 3, "other")
    assert kstest(own.flatten().numpy(), "norm").pvalue > 1e-3
    assert own.std().item() == pytest.approx(1, abs=0.01)
    for first, second in [(own[:, 1:], own[:, :-1]), (own[1:], own[:-1]), (own[:, 4:], own[:, :-4]), (own, other)]:
        assert abs((first * second).double().mean().item()) < 5 / first.numel() ** 0.5


@pytest.mark.parametrize("law", [Uniform(-0.25, 0.75), Constant(2.0)])
def test_quantiles_are_those_of_the_law(law: Uniform | Constant) -> None:
    values = law.quantile(torch.tensor([2.0**-33, 0.5, 1 - 2.0**-33], dtype=torch.float64)).tolist()
    assert values == pytest.approx([-0.25, 0.25, 0.75] if isinstance(law, Uniform) else [2.0] * 3, abs=1e-9)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_process_draws_its_own_elements_a_chunk_at_a_time(dim: int) -> None:
    """One of 64 parts of a table, by rows and by columns."""
    law, shape = Counted(1.0), torch.Size((1 << 17, 1024))
    part = Part(dim, shape[dim] // 64, shape[dim] // 32)
    own = torch.empty(part.of(torch.empty(shape, device="meta")).shape)
    with LiveBytes(own) as live:
        draw(law, own, shape, part, 3, "name")
    assert law.drawn == [CHUNK, CHUNK]
    assert live.peak <= 64 * CHUNK


class Cut:
    """A law that a baseline brings itself: a normal distribution cut at two standard deviations."""

    def fill_(self, x: torch.Tensor, generator: torch.Generator) -> None:
        """Fill `x`."""
        torch.nn.init.trunc_normal_(x, a=-2.0, b=2.0, generator=generator)

    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        """Return quantiles of the shape of `u`."""
        below = 0.022750131948179195  # the probability of less than -2
        return torch.special.ndtri(below + u * (1 - 2 * below))


@pytest.mark.usefixtures("small_blocks")
def test_a_law_from_outside_is_drawn_in_parts() -> None:
    shape = torch.Size((4100, 40))
    whole, half = torch.empty(shape), torch.empty(2050, 40)
    draw(Cut(), whole, shape, None, 3, "name")
    draw(Cut(), half, shape, Part(0, 2050, 4100), 3, "name")
    assert half.equal(whole[2050:])
    assert 1.99 < whole.abs().max() <= 2


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

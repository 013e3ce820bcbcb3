"""External families: identification by content, checks before training, and token ids for modules with a window."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import suite.baselines
from suite.baselines import checks, loading
from suite.errors import UserError
from suite.models import build, registry
from suite.models.cache import EarlierTokens

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "hashed_ngram.py"
FILE = """
from torch import Tensor, nn
from suite.models.accounting import Cost, dense_cost
from suite.models.registry import Family, ModelConfig, register

class Squared(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return {result}

    def cost(self) -> Cost:
        return dense_cost("ffn", {params}, 2 * self.up.weight.numel())

def feed_forwards(config: ModelConfig) -> list[nn.Module]:
    return [Squared(config.size.dim, config.size.ffn_hidden) for _ in range(config.size.layers)]

register(Family("{name}", ModelConfig, feed_forwards))
"""
GOOD = {
    "result": "self.down(self.up(x_BTD).relu().square())",
    "params": "2 * self.up.weight.numel() + self.up.bias.numel()",
    "name": "squared",
}


@pytest.fixture(autouse=True)
def _restore_registry() -> Iterator[None]:
    before = set(registry.families())
    yield
    registry.unregister(set(registry.families()) - before)


def baseline(folder: Path, **wrong: str) -> Path:
    path = folder / "mine.py"
    path.write_text(FILE.format(**{**GOOD, **wrong}))
    return path


def checked(path: Path) -> None:
    (name,) = loading.load(path)
    checks.check(registry.ModelConfig(family=name, base="w32"))


def test_a_file_registers_its_family_only_once(tmp_path: Path) -> None:
    path = baseline(tmp_path)
    checked(path)
    copy = tmp_path / "copy.py"
    copy.write_bytes(path.read_bytes())
    assert loading.load(copy) == ["squared"]
    model = build(registry.ModelConfig(family="squared", base="w32"), 20, 0)
    assert model(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, 20)


def test_a_wrong_shape_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"squared: layers\.0\.feed_forward \(Squared\): forward returns \(2, 8, 96\)"):
        checked(baseline(tmp_path, result="self.up(x_BTD)"))


def test_a_shape_that_would_broadcast_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"forward returns \(2, 8, 1\) float32 for \(2, 8, 32\) float32"):
        checked(baseline(tmp_path, result="x_BTD[..., :1]"))


def test_an_invalid_product_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"family squared: .*(shape|size|dim)"):
        checked(baseline(tmp_path, result="self.down(x_BTD)"))


def test_another_dtype_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"\(Squared\): forward returns \(2, 8, 32\) float64 for \(2, 8, 32\) float32, allowed"
    ):
        checked(baseline(tmp_path, result="x_BTD.double()"))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"result": "1 / 0"}, r"family squared: line 12: ZeroDivisionError: division by zero"),
        ({"result": "x_BTD if unknown else x_BTD"}, r"line 12: NameError: name 'unknown' is not defined"),
        ({"params": "{}['no']"}, r"line 15: KeyError: 'no'"),
        ({"params": "1, 1) and (0"}, r"layers\.0\.feed_forward \(Squared\): cost\(\) returns tuple, allowed: a Cost"),
        ({"params": "sum(1)"}, r"line 15: TypeError: 'int' object is not iterable"),
    ],
)
def test_any_exception_becomes_one_line_with_its_line_number(tmp_path: Path, wrong: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        checked(baseline(tmp_path, **wrong))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("register(Family(7, ModelConfig, feed_forwards))", r"name: got 7, allowed: letters"),
        ('register(Family("a/b", ModelConfig, feed_forwards))', r"name: got 'a/b', allowed: letters"),
        ('register(Family("other", int, feed_forwards))', r"config: got <class 'int'>, allowed: a subclass"),
        ('register(Family("other", ModelConfig, []))', r"feed_forwards: got \[\], allowed: config -> one module"),
    ],
)
def test_an_invalid_family_is_refused_by_field(tmp_path: Path, line: str, words: str) -> None:
    path = baseline(tmp_path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=rf"mine\.py: line 21: ValueError: {words}"):
        loading.load(path)
    assert "squared" not in registry.families()


def test_too_few_modules_are_refused(tmp_path: Path) -> None:
    path = baseline(tmp_path)
    path.write_text(path.read_text().replace("range(config.size.layers)", "range(1)"))
    with pytest.raises(UserError, match=r"family squared: feed_forwards: got 1, allowed: a list of 4 modules"):
        checked(path)


def test_output_of_a_file_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = baseline(tmp_path)
    path.write_text('print("hello")\n' + path.read_text())
    loading.load(path)
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "hello\n")


def test_a_module_that_depends_on_values_is_checked_on_the_cpu(tmp_path: Path) -> None:
    by_value = "self.down(self.up(x_BTD).relu()) if x_BTD.sum().item() < 1e9 else x_BTD"
    checked(baseline(tmp_path, result=by_value))
    registry.unregister(["squared"])
    with pytest.raises(UserError, match=r"forward returns \(2, 8, 96\)"):
        checked(baseline(tmp_path, result=by_value.replace("self.down(self.up(x_BTD).relu())", "self.up(x_BTD)")))


MASKED = "self.down(self.up(x_BTD).relu()).index_put((x_BTD[..., 0] > 0,), x_BTD[x_BTD[..., 0] > 0])"


@pytest.mark.parametrize(
    "by_value", ["x_BTD if x_BTD.sum().item() > 1e9 else self.down(self.up(x_BTD).relu())", MASKED]
)
def test_products_that_depend_on_values_are_checked_on_the_cpu(tmp_path: Path, by_value: str) -> None:
    path = baseline(tmp_path, result=by_value)
    checked(path)
    registry.unregister(["squared"])
    path.write_text(path.read_text().replace("2 * self.up.weight.numel())\n\n", "1)\n\n"))
    with pytest.raises(UserError, match=r"cost\(\) counts 1 multiply-adds per token, allowed: the 6,14"):
        checked(path)


def test_an_operator_without_a_cpu_kernel_is_checked_by_shape_only(tmp_path: Path) -> None:
    path = baseline(tmp_path, result="torch.ops.elsewhere.twice(self.down(self.up(x_BTD)))")
    with torch.library._scoped_library("elsewhere", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", torch.empty_like, "Meta")
        path.write_text("import torch\n" + path.read_text())
        checked(path)


def test_use_of_distant_later_tokens_is_refused_also_with_integer_parameters(tmp_path: Path) -> None:
    shifted = "self.down(self.up(x_BTD)) + x_BTD.roll(-30, 1)"
    path = baseline(tmp_path, result=shifted)
    integer_parameter = (
        "        self.whole = nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)\n\n    def forward"
    )
    path.write_text(
        "import torch\n"
        + path.read_text()
        .replace("\n    def forward", "\n" + integer_parameter, 1)
        .replace("self.up.bias.numel()", "self.up.bias.numel() + 1")
    )
    with pytest.raises(UserError, match="later tokens change"):
        checked(path)


def test_a_parameter_missing_from_the_accounting_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"squared: layers\.0\.feed_forward .* counts 6144 .* up\.bias 96"):
        checked(baseline(tmp_path, params="2 * self.up.weight.numel()"))


@pytest.mark.parametrize("macs", ["float('nan')", "-5", "float('inf')", "'many'"])
def test_an_invalid_count_is_refused_by_name(tmp_path: Path, macs: str) -> None:
    wrong = baseline(tmp_path)
    wrong.write_text(wrong.read_text().replace("2 * self.up.weight.numel())\n\n", f"{macs})\n\n"))
    with pytest.raises(
        UserError, match=r"layers\.0\.feed_forward \(Squared\): cost\(\) returns macs ffn (nan|-5|inf|'many'), allowed"
    ):
        checked(wrong)


def test_products_that_are_not_counted_are_refused_by_name(tmp_path: Path) -> None:
    half = baseline(tmp_path)
    half.write_text(half.read_text().replace("2 * self.up.weight.numel())\n\n", "self.up.weight.numel())\n\n"))
    with pytest.raises(
        UserError, match=r"\(Squared\): cost\(\) counts 3,072 multiply-adds per token, allowed: the 6,14"
    ):
        checked(half)


def test_a_module_in_two_layers_is_refused(tmp_path: Path) -> None:
    path = baseline(tmp_path)
    once = "[Squared(config.size.dim, config.size.ffn_hidden)] * config.size.layers"
    path.write_text(re.sub(r"return \[Squared.*\]", f"return {once}", path.read_text()))
    with pytest.raises(UserError, match="feed_forwards: layer 1: the same module is used at feed_forwards: layer 0"):
        checked(path)


@pytest.mark.parametrize(
    "result",
    [
        "self.down(self.up(x_BTD).relu()).mean(1, keepdim=True).expand_as(x_BTD)",
        "self.down(self.up(x_BTD)).flip(1)",
        "self.down(self.up(x_BTD)) * x_BTD.std((1, 2), keepdim=True)",
    ],
)
def test_a_family_that_uses_later_tokens_is_refused(tmp_path: Path, result: str) -> None:
    path = baseline(tmp_path, result=result)
    with pytest.raises(
        UserError, match=r"family squared: in evaluation mode, later tokens change a token's logits by \S+ standard"
    ):
        checked(path)


def test_use_of_later_tokens_hidden_by_zero_initial_values_is_refused(tmp_path: Path) -> None:
    path = baseline(tmp_path, result="self.down(self.up(x_BTD).cumsum(1).flip(1))")
    initial = "    def init_parameter(self, name, parameter, generator):\n        parameter.zero_()\n\n"
    path.write_text(path.read_text().replace("    def cost(self)", initial + "    def cost(self)"))
    with pytest.raises(UserError, match="later tokens change"):
        checked(path)


def test_a_family_whose_rows_depend_on_each_other_is_refused(tmp_path: Path) -> None:
    path = baseline(tmp_path, result="self.down(self.up(x_BTD)) * x_BTD.std((0, 2), keepdim=True)")
    with pytest.raises(UserError, match=r"other row of a batch changes a row's logits by \S+ standard"):
        checked(path)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ("self.down(self.up(x_BTD).detach())", r"layers\.0\.feed_forward\.up\.weight: gets no gradient; use it"),
        ("self.down(self.up(x_BTD)) / 0", r"the loss at the initial weights is nan, allowed: a finite number"),
        ("self.down(self.up(x_BTD)) if not self.training else 1 / 0", r"line 12: ZeroDivisionError: division by zero"),
    ],
)
def test_a_family_that_cannot_be_trained_is_refused(tmp_path: Path, result: str, words: str) -> None:
    with pytest.raises(UserError, match=rf"family squared: {words}"):
        checked(baseline(tmp_path, result=result))


def test_experts_that_no_token_of_the_check_chooses_need_no_gradient(tmp_path: Path) -> None:
    path = baseline(tmp_path, result="sum(self.down[n](self.up(x_BTD)) for n in range(1))", params="{params}")
    experts = "nn.ModuleList(nn.Linear(hidden, dim, bias=False) for _ in range(2))"
    text = path.read_text().replace("nn.Linear(hidden, dim, bias=False)", experts)
    path.write_text(text.replace("{params}", "sum(p.numel() for p in self.parameters())"))
    checked(path)


def test_a_declared_matrix_that_a_module_lacks_is_refused_by_name(tmp_path: Path) -> None:
    path = baseline(tmp_path)
    path.write_text(
        path.read_text().replace("    def cost", '    matrices = ("up.weight", "dwn.weight")\n\n    def cost')
    )
    with pytest.raises(UserError, match=r"\(Squared\): matrices: got 'dwn\.weight', allowed: up\.weight, .*down"):
        checked(path)


def test_a_taken_name_is_refused_and_nothing_stays_registered(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mine\.py: line 20: ValueError: family 'dense' is already registered"):
        loading.load(baseline(tmp_path, name="dense"))
    loading.load(baseline(tmp_path))
    other = tmp_path / "other.py"
    other.write_text("# not the same file\n" + FILE.format(**GOOD))
    with pytest.raises(UserError, match="family 'squared' is already registered"):
        loading.load(other)
    assert registry.family("squared").path == tmp_path / "mine.py"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n", "registers no family"),
        ("import nothing_like_it\n", "line 1: ModuleNotFoundError"),
        ("x = 1\ndef f(:\n", "line 2: invalid syntax, allowed: Python"),
        ("raise SystemExit(3)\n", "line 1: SystemExit: 3"),
    ],
)
def test_a_file_that_is_not_a_baseline_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        loading.load(path)
    with pytest.raises(UserError, match="No such file"):
        loading.load(tmp_path / "nowhere.py")


def test_the_baseline_of_an_installed_package_is_loaded_from_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    baseline(tmp_path)
    info = tmp_path / "somebodys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[next_parameter.baselines]\nsquares = mine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    loading.load_all()
    assert registry.family("squared").path == tmp_path / "mine.py"
    (info / "entry_points.txt").write_text("[next_parameter.baselines]\nsquares = not_there\n")
    with pytest.raises(UserError, match="entry point squares: got 'not_there'"):
        loading.load_all()


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("suite.models.accounting", ["Cost", "dense_cost"]),
        ("suite.models.registry", ["Family", "ModelConfig", "Problem", "register"]),
        ("suite.models.memory_table", ["MemoryLayer", "MemoryTable"]),
        ("suite.models.feedforward", ["SwiGLU"]),
    ],
)
def test_the_modules_that_earlier_baseline_files_import_hold_the_public_names(module: str, names: list[str]) -> None:
    for name in names:
        assert getattr(importlib.import_module(module), name) is getattr(suite.baselines, name)


def test_windows_stay_within_document_row_and_padding() -> None:
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    plain = EarlierTokens().windows(tokens, 3)
    assert plain[0].tolist() == [[-1, -1, 5], [-1, 5, 6], [5, 6, 7], [6, 7, 8], [7, 8, 9]]
    packed = EarlierTokens(segments_BT=torch.tensor([[0, 0, 1, 1, 1]])).windows(tokens, 3)
    assert packed[0].tolist() == [[-1, -1, 5], [-1, 5, 6], [-1, -1, 7], [-1, 7, 8], [7, 8, 9]]
    padded = EarlierTokens(pad_B=torch.tensor([2])).windows(tokens, 3)
    assert padded[0, 2:].tolist() == [[-1, -1, 7], [-1, 7, 8], [7, 8, 9]]


def ngram_model() -> torch.nn.Module:
    loading.load(EXAMPLE)
    config = registry.family("hashed_ngram").config(family="hashed_ngram", base="w32")
    checks.check(config)
    return build(config, 50, 0).eval()


def test_token_ids_are_the_same_with_cache_padding_and_packing() -> None:
    model = ngram_model()
    tokens_BT = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    whole = model(tokens_BT)
    cache = model.new_cache(2, 12)
    parts = [model(part, cache=cache) for part in tokens_BT.split([5, 1, 1, 5], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    pad_B = torch.tensor([3, 0])
    padded = model(torch.cat((torch.zeros(1, 3, dtype=torch.int64), tokens_BT[:1, :9]), 1), pad_B=pad_B[:1])
    torch.testing.assert_close(padded[:, 3:], whole[:1, :9], rtol=1e-4, atol=1e-5)
    packed = model(tokens_BT.view(1, -1), torch.arange(2).repeat_interleave(12)[None])
    torch.testing.assert_close(packed.view(2, 12, -1), whole, rtol=1e-4, atol=1e-5)


def test_later_tokens_do_not_change_earlier_logits_of_the_ngram_model() -> None:
    model = ngram_model()
    tokens_BT = torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(1))
    other_BT = tokens_BT.clone()
    other_BT[0, 7] = (other_BT[0, 7] + 1) % 50
    before, after = model(tokens_BT), model(other_BT)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:10], after[:, 7:10])


def test_ngram_rows_depend_only_on_the_last_ids_and_are_spread_over_the_table() -> None:
    model = ngram_model()
    memory = model.memory_layers()[1]
    ids = torch.randint(0, 50, (1, 400, 3), generator=torch.Generator().manual_seed(2))
    rows = memory.rows(ids)
    assert rows.shape == (1, 400, 8)
    firsts = torch.tensor([sum(memory.primes[:head]) for head in range(8)])
    assert ((rows >= firsts) & (rows < firsts + torch.tensor(memory.primes))).all()
    bigram = memory.rows(torch.cat((torch.zeros_like(ids[..., :1]), ids[..., 1:]), -1))
    assert torch.equal(bigram[..., :4], rows[..., :4])
    assert not torch.equal(bigram[..., 4:], rows[..., 4:])
    different = len({tuple(pair) for pair in ids[0, :, 1:].tolist()})
    assert len(rows[0, :, 0].unique()) > 0.85 * different

"""Grids: what a file expands to, and one line for every mistake in it."""

import itertools
import json
import re
from pathlib import Path

import pytest

from suite.cells import Cell
from suite.errors import UserError
from suite.grids import Grid, find_grid, load_cell, load_grid
from suite.yaml_input import parse_value

BASE = """
defaults:
  model: {base: w32}
  data: {kind: bios, people: 60}
  train: {batch_rows: 8, epochs: 2, lr: 1e-3}
families:
  memory_plus: {model: {top_k: 8, k_dim: 16}, train: {value_lr: 2e-2}}
"""

ONE_BLOCK = BASE + "blocks:\n  - axes: {model.family: [dense]}\n"


def write(folder: Path, text: str) -> str:
    path = folder / "grid.yaml"
    path.write_text(text)
    return str(path)


def load(folder: Path, text: str, **overrides: str) -> Grid:
    return load_grid(write(folder, text), {name.replace("__", "."): value for name, value in overrides.items()})


def complaint(folder: Path, text: str, **overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, text, **overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_block_is_the_product_of_the_axes_that_apply(tmp_path: Path) -> None:
    grid = load(
        tmp_path,
        BASE
        + """
blocks:
  - axes:
      model.family: [dense, memory_plus]
      model.half_keys: [16, 32]
      seed: [0, 1, 2]
""",
    )
    found = [(cell.model.family, getattr(cell.model, "half_keys", None), cell.seed) for cell in grid.cells]
    dense = [("dense", None, seed) for seed in range(3)]
    memory = [("memory_plus", *pair) for pair in itertools.product([16, 32], range(3))]
    assert sorted(found, key=str) == sorted(dense + memory, key=str)
    assert grid.name == "grid"


def test_later_layers_win(tmp_path: Path) -> None:
    text = """
defaults:
  model: {base: w32, family: memory_plus, half_keys: 16, top_k: 8}
  data: {kind: bios, people: 60}
  train: {batch_rows: 8, epochs: 2, lr: 1, warmup: 1, clip: 1.0, eps: 1e-8, weight_decay: 0.5}
families:
  memory_plus: {train: {lr: 2, warmup: 2, clip: 2.0, eps: 2e-8}}
blocks:
  - set: {train: {lr: 3, warmup: 3, clip: 3.0}}
    axes: {train.lr: [4], train.warmup: [4]}
"""
    train = load(tmp_path, text, train__lr="5").cells[0].train
    assert (train.lr, train.warmup, train.clip, train.eps, train.weight_decay) == (5, 4, 3.0, 2e-8, 0.5)


def test_an_axis_may_set_several_fields_together(tmp_path: Path) -> None:
    text = (
        BASE
        + "blocks:\n  - axes:\n      model: [{family: dense, ffn_hidden: 64}, {family: memory_plus, half_keys: 8}]\n"
    )
    models = [cell.model for cell in load(tmp_path, text).cells]
    assert [model.family for model in models] == ["dense", "memory_plus"]
    assert models[0].ffn_hidden == 64
    assert models[1].top_k == 8  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("written", "expected"), [("1e-3", 1e-3), ("4E2", 400.0), ("-1e+2", None), (".5", 0.5), ("2", 2)]
)
def test_numbers_in_exponent_form_are_numbers(tmp_path: Path, written: str, expected: float | None) -> None:
    text = ONE_BLOCK.replace("lr: 1e-3", f"lr: {written}")
    if expected is None:
        assert complaint(tmp_path, text).endswith("train.lr: got -100, allowed: greater than 0")
    else:
        assert load(tmp_path, text).cells[0].train.lr == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("12:00:00", "12:00:00"),
        ("0123", 123),
        ("0o17", 15),
        ("1e9", 1_000_000_000),
        ("1_000", 1000),
        ("no", "no"),
        ("on", "on"),
        ("2024-01-01", "2024-01-01"),
        ("false", False),
        ("~", None),
        ("1.50", 1.5),
        ("v1.0", "v1.0"),
    ],
)
def test_scalars_are_read_as_they_are_written(written: str, expected: object) -> None:
    value = parse_value(written, "--set x")
    assert (type(value), value) == (type(expected), expected)


def test_a_whole_float_is_a_number_of_tokens(tmp_path: Path) -> None:
    assert load(tmp_path, ONE_BLOCK.replace("epochs: 2", "tokens: 1e9")).cells[0].train.tokens == 10**9
    assert "12:00" in complaint(tmp_path, ONE_BLOCK, train__warmup="12:00")


def test_a_value_where_a_list_is_needed_names_the_type(tmp_path: Path) -> None:
    assert complaint(tmp_path, ONE_BLOCK, evaluate="bios_qa").endswith("evaluate: got 'bios_qa', allowed: a list")


def test_an_unknown_kind_of_tokenizer_is_answered_with_those_that_text_accepts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Some words.\n")
    refused = {}
    for kind in ("blah", "word"):
        text = f"{{kind: text, path: {tmp_path / 'a.txt'}, seq_len: 32, tokenizer: {{kind: {kind}}}}}"
        refused[kind] = complaint(tmp_path, ONE_BLOCK, data=text)
        assert f"data.tokenizer.kind: got '{kind}', allowed: bpe, bytes, file" in refused[kind]
    assert "word" not in refused["blah"]
    world = complaint(tmp_path, ONE_BLOCK, data__tokenizer__kind="blah")
    assert world.endswith("data.tokenizer.kind: got 'blah', allowed: 'word', 'bpe', 'bytes' or 'file'")


@pytest.mark.parametrize("value", ["[0.9]", "[0.9, 0.95, 0.99]", "0.9", "[]"])
def test_a_list_of_another_length_than_its_field_has_is_refused_with_that_length(tmp_path: Path, value: str) -> None:
    line = complaint(tmp_path, ONE_BLOCK, train__betas=value)
    assert line.endswith(f"train.betas: got {value}, allowed: a list of 2 values")


def test_exclusions_match_on_the_fields_they_name(tmp_path: Path) -> None:
    text = (
        BASE
        + """
blocks:
  - axes: {model.family: [dense, memory_plus], model.half_keys: [16, 32], seed: [0, 1, 2]}
exclude:
  - {model.family: dense, seed: [1, 2]}
  - {model.half_keys: 32}
"""
    )
    found = [(cell.model.family, cell.seed) for cell in load(tmp_path, text).cells]
    assert found == [("dense", 0), ("memory_plus", 0), ("memory_plus", 1), ("memory_plus", 2)]


def test_environment_variables_select_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        BASE
        + """
blocks:
  - axes: {model.family: [dense, memory_plus, moe], model.half_keys: [16]}
exclude: [{model.family: "${NP_TEST_FAMILY}"}]
contrast: {treatment: {model.family: "${NP_TEST_TREATMENT}"}, reference: {model.family: dense}, metric: eval/nll}
launch: {setup: ["cd ${NP_TEST_LATER}"]}
"""
    )
    monkeypatch.delenv("NP_TEST_LATER", raising=False)
    monkeypatch.setenv("NP_TEST_FAMILY", "moe")
    assert "contrast: the environment variable NP_TEST_TREATMENT is not set; set it" in complaint(tmp_path, text)
    monkeypatch.setenv("NP_TEST_TREATMENT", "memory_plus")
    grid = load(tmp_path, text)
    assert [cell.model.family for cell in grid.cells] == ["dense", "memory_plus"]
    assert grid.contrast is not None
    assert grid.contrast.treatment == (grid.cells[1].run_name,)
    assert grid.launch["setup"] == ["cd ${NP_TEST_LATER}"]


def test_environment_variables_and_set_fill_in_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Some words.\n")
    text = ONE_BLOCK.replace("{kind: bios, people: 60}", "{kind: text, path: '${NP_TEST_CORPUS}'}")
    text = text.replace("epochs: 2", "tokens: 512")
    monkeypatch.delenv("NP_TEST_CORPUS", raising=False)
    line = complaint(tmp_path, text)
    assert "data.path: " in line
    assert "--set data.path=" in line
    given = load(tmp_path, text, data__path=str(corpus)).cells[0]
    monkeypatch.setenv("NP_TEST_CORPUS", str(corpus))
    found = load(tmp_path, text).cells[0]
    assert found == given
    assert found.data.path == str(corpus)  # type: ignore[union-attr]


def test_a_text_cell_is_identified_by_content_not_by_path(tmp_path: Path) -> None:
    text = ONE_BLOCK.replace("{kind: bios, people: 60}", "{kind: text, path: x}").replace("epochs: 2", "tokens: 512")
    for name, content in (("a.txt", "one"), ("b.txt", "one"), ("c.txt", "two")):
        (tmp_path / name).write_text(content)
    names = [load(tmp_path, text, data__path=str(tmp_path / f"{name}.txt")).cells[0].run_name for name in "abc"]
    assert names[0] == names[1] != names[2]


MISTAKES = {
    "unknown field": ("lr: 1e-3", "lr: 1e-3, warmpu: 3", "train.warmpu: unknown field, did you mean warmup?"),
    "unknown model option": (
        "{base: w32}",
        "{base: w32, half_kyes: 3}",
        "defaults.model.half_kyes: unknown option of dense",
    ),
    "option of families that are not there": (
        "[dense]",
        "[dense], model.half_keys: [16]",
        "blocks[1].axes.model.half_keys: unknown option of dense",
    ),
    "model option's typo": (
        "[dense]",
        "[memory_plus], model.half_kyes: [16]",
        "axes.model.half_kyes: unknown option of memory_plus, did you mean half_keys?",
    ),
    "wrong type": ("batch_rows: 8", "batch_rows: many", "train.batch_rows: got 'many', allowed: a valid integer"),
    "float for an integer": ("people: 60", "people: 60.5", "data.people: got 60.5, allowed: a valid integer"),
    "missing field": (", lr: 1e-3", "", "train.lr: got nothing"),
    "unknown family": ("[dense]", "[densee]", "model.family: got 'densee', did you mean dense?, allowed: dense"),
    "no family": ("model.family: [dense]", "seed: [0]", "model.family: got nothing, allowed: dense"),
    "family of a baseline": ("[dense]", "[mine]", "ultramem_v2, and those of --baseline files"),
    "unknown base": ("base: w32", "base: w33", "model.base: got 'w33', allowed: 134m"),
    "half_keys below top_k": (
        "model.family: [dense]",
        "model.family: [memory_plus], model.half_keys: [4]",
        "model.half_keys: got 4, allowed: at least",
    ),
    "dim and heads": ("{base: w32}", "{base: w32, heads: 3}", "model.dim: got 32, allowed: a multiple"),
    "empty list": (
        "people: 60}",
        "people: 60}\n  evaluate: [{tasks: []}]",
        "evaluate[1].tasks: got [], allowed: a list of at least 1",
    ),
    "empty axis": ("[dense]", "[]", "axes.model.family: got [], allowed: a list of at least one value"),
    "scalar axis": ("[dense]", "dense", "axes.model.family: got 'dense', allowed: a list of at least one value"),
    "unknown data kind": ("kind: bios", "kind: bio", "data.kind: got 'bio', did you mean bios?, allowed: bios, text"),
    "empty path": (
        "kind: bios, people: 60",
        "kind: text, path: ''",
        "data.path: got '', allowed: a text that is not empty",
    ),
    "empty path of validation": (
        "kind: bios, people: 60",
        "kind: text, path: x, validation: ''",
        "data.validation: got '', allowed: a text that is not empty",
    ),
    "empty path of a tokenizer": (
        "people: 60}",
        "people: 60, tokenizer: {kind: file, path: ''}}",
        "data.tokenizer.path: got '', allowed: a text that is not empty",
    ),
    "a checkpoint's hash": (
        "defaults:",
        "defaults:\n  imported: abc",
        "imported: got 'abc', allowed: only null; suite import",
    ),
    "a baseline's hash": (
        "defaults:",
        "defaults:\n  baseline: abc",
        "baseline: got 'abc', allowed: only null; --baseline",
    ),
    "field of the other kind": ("people: 60", "people: 60, path: x", "data.path: unknown field"),
    "unknown schedule": ("lr: 1e-3", "lr: 1e-3, schedule: cosin", "allowed: 'constant', 'linear', 'cosine' or 'wsd'"),
    "two budgets": (
        "epochs: 2",
        "epochs: 2, tokens: 5",
        "train.tokens: got 5, allowed: exactly one of tokens and epochs",
    ),
    "tokenizer": ("people: 60", "people: 60, tokenizer: {kind: bpe}", "tokenizer.vocab_size: got None"),
    "section that is not a mapping": ("{base: w32}", "w32", "defaults.model: got 'w32', allowed: a mapping"),
    "evaluate": ("defaults:", "defaults:\n  evaluate: [{task: [nq_open]}]", "evaluate[1].task"),
    "unknown part of the file": ("blocks:", "block: []\nblocks:", "block: unknown field, did you mean blocks?"),
    "unknown part of a block": ("- axes:", "- axis:", "blocks[1]: got"),
    "no block": ("blocks:\n  - axes: {model.family: [dense]}\n", "", "blocks: "),
    "a key twice": ("batch_rows: 8", "batch_rows: 8, batch_rows: 9", "line 5: batch_rows: given twice"),
    "broken YAML": ("[dense]", "[dense", "line 9"),
    "a tab": ("lr: 1e-3", "lr:\t1e-3", "use spaces"),
    "a word for a truth value": (
        "{base: w32}",
        "{base: w32, tie_embeddings: yes}",
        "model.tie_embeddings: got 'yes', allowed: true or false",
    ),
    "a section within itself": ("model: {base: w32}", "model: &m {base: w32, part: *m}", "line 3: contains itself"),
    "a list within itself": ("defaults:", "defaults:\n  evaluate: &e [*e]", "line 3: contains itself"),
    "a merge of itself": ("model: {base: w32}", "model: &m {<<: *m}", "line 3: contains itself"),
    "too many digits": ("batch_rows: 8", "batch_rows: " + "7" * 5000, "line 5: not valid YAML: Exceeds the limit"),
    "deep nesting": ("[dense]", "[" * 5000 + "]" * 5000, "nested too deeply"),
    "too many combinations": (
        "[dense]}",
        f"[dense], seed: {[*range(1000)]}, train.warmup: {[*range(1000)]}}}",
        "blocks[1].axes: the grid has 1,000,000 combinations of values, allowed: at most 100,000",
    ),
    "a long value": ("axes: {model.family: [dense]}", f"axes: {[*range(100)]}", "16..., allowed: a mapping"),
    "families' typo": (
        "k_dim: 16}",
        "k_dmi: 16}",
        "families.memory_plus.model.k_dmi: unknown option, did you mean k_dim?",
    ),
    "families' unknown": ("memory_plus: {m", "memory_pluss: {m", "got 'memory_pluss', did you mean memory_plus?"),
    "exclusion of nothing": (
        "blocks:",
        "exclude: [{seed: 7}]\nblocks:",
        "exclude[1]: {'seed': 7}",
    ),
    "exclusion's typo": (
        "blocks:",
        "exclude: [{sede: 0}]\nblocks:",
        "exclude[1].sede: unknown field, did you mean seed?",
    ),
    "exclusion of all": ("blocks:", "exclude: [{seed: 0}]\nblocks:", "exclude: "),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_file_field_and_value(tmp_path: Path, name: str) -> None:
    old, new, expected = MISTAKES[name]
    assert old in ONE_BLOCK
    line = complaint(tmp_path, ONE_BLOCK.replace(old, new, 1))
    assert line.startswith(str(tmp_path / "grid.yaml"))
    assert expected in line


@pytest.mark.parametrize("first", ["[x, x]", "{k: x, l: x}"])
def test_aliases_that_stand_for_too_many_values_are_refused_at_once(tmp_path: Path, first: str) -> None:
    chain = [f"  a0: &a0 {first}"]
    chain += [f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    line = complaint(tmp_path, "defaults:\n" + "\n".join(chain) + "\nblocks:\n  - axes: {model.family: [dense]}\n")
    assert "holds more than 1,000,000 values" in line


def test_a_file_of_many_bytes_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    line = complaint(tmp_path, ONE_BLOCK + "# more\n" * 1_500_000)
    assert re.search(r"grid\.yaml: has 10,500,\d+ bytes, allowed: .* at most 10,000,000", line)


def test_a_merge_adds_the_fields_that_are_not_written(tmp_path: Path) -> None:
    merged = BASE.replace("data: {", "data: &data {") + (
        "blocks:\n  - set: {data: &fewer {<<: *data, people: 50}}\n    axes: {model.family: [dense]}\n"
        "  - set: {data: {<<: *fewer}}\n    axes: {model.family: [memory_plus], model.half_keys: [16]}\n"
    )
    written = BASE + (
        "blocks:\n  - set: {data: {people: 50}}\n"
        "    axes: {model.family: [dense, memory_plus], model.half_keys: [16]}\n"
    )
    assert load(tmp_path, merged).cells == load(tmp_path, written).cells


def test_a_grid_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert load(tmp_path, "\ufeff" + ONE_BLOCK).cells == load(tmp_path, ONE_BLOCK).cells


def test_duplicates_name_both_cells(tmp_path: Path) -> None:
    text = ONE_BLOCK + "  - axes: {model.family: [dense], seed: [1, 0]}\n"
    line = complaint(tmp_path, text)
    assert "blocks[1] (model.family=dense)" in line
    assert "blocks[2] (model.family=dense, seed=0)" in line
    assert "duplicate" in complaint(tmp_path, ONE_BLOCK.replace("[dense]", "[dense, dense]"))


def test_a_name_is_looked_up_in_the_current_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_grid("smoke").name == "smoke.yaml"
    (tmp_path / "grids").mkdir()
    (tmp_path / "grids" / "mine.yaml").write_text(ONE_BLOCK)
    assert load_grid("mine").source == Path("grids/mine.yaml")
    with pytest.raises(UserError, match="did you mean smoke"):
        find_grid("smok")
    with pytest.raises(UserError, match="nowhere/smoke"):
        find_grid("nowhere/smoke.yaml")


def test_a_cell_is_read_back_from_the_record_of_a_run(tmp_path: Path) -> None:
    cell = load(tmp_path, ONE_BLOCK).cells[0]
    path = tmp_path / "cell.json"
    path.write_text(json.dumps({"cell": cell.model_dump(mode="json"), "hash": cell.hash8}))
    assert load_cell(path) == cell
    path.write_text(json.dumps({"model": {"family": "dense"}}))
    with pytest.raises(UserError, match=r"cell\.json: model\.base: got nothing"):
        load_cell(path)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "grids").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_grid_of_the_project_loads(path: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Some words.\n")
    overrides = {"data.path": str(corpus)} if "kind: text" in path.read_text() else {}
    # hub grids need a tokenizer file that the user provides
    grid = load_grid(str(path), overrides, need_data=not path.stem.startswith("paper"))
    assert all(isinstance(cell, Cell) for cell in grid.cells)
    assert len({cell.run_name for cell in grid.cells}) == len(grid.cells)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {base: w32}\n", "model.family: got None, allowed: dense"),
        ("defaults: {model: {base: w32}}\n", "allowed"),
    ],
)
def test_a_file_that_is_not_a_cell_is_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "cell.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        load_cell(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["model: {base: w32}\n", '{"cell": {"model": {}}, "hash": "0a1b2c3d"}'])
def test_the_file_of_a_cell_is_no_grid_and_the_command_for_it_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cell.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"suite train {path}"):
        load_grid(str(path))


def test_a_grid_of_grids_has_each_cell_once_with_all_evaluations(tmp_path: Path) -> None:
    both = "[dense, memory_plus], model.half_keys: [16]"
    for name, axes, task in (("one", "[dense]", "bios_qa"), ("two", both, "bios_storage")):
        (tmp_path / f"{name}.yaml").write_text(
            BASE.replace("families:", f"  evaluate: [{{tasks: [{task}]}}]\nfamilies:", 1)
            + f"blocks:\n  - axes: {{model.family: {axes}}}\n"
        )
    cells = load(tmp_path, "grids: [one, two]\n", train__lr="2e-3").cells
    assert [(cell.model.family, cell.train.lr) for cell in cells] == [("dense", 2e-3), ("memory_plus", 2e-3)]
    assert [[config.tasks[0] for config in cell.evaluate] for cell in cells] == [
        ["bios_qa", "bios_storage"],
        ["bios_storage"],
    ]


def test_a_grid_of_grids_has_only_the_cells_of_its_grids(tmp_path: Path) -> None:
    assert "grids: got 'nowhere'" in complaint(tmp_path, "grids: [nowhere]\n")
    assert "defaults: not allowed together with grids" in complaint(tmp_path, BASE + "grids: [smoke]\n")
    (tmp_path / "inner.yaml").write_text("grids: [smoke]\n")
    assert "grids: got 'inner', which names grids itself" in complaint(tmp_path, "grids: [inner]\n")


def test_an_error_names_the_section_that_set_the_field(tmp_path: Path) -> None:
    block = "blocks:\n  - set: {data: {kind: text, path: words.txt}}\n    axes: {model.family: [dense]}\n"
    assert "(model.family=dense): from defaults: data.people: unknown field" in complaint(tmp_path, BASE + block)
    assert "from --set: train.lr: got -1" in complaint(tmp_path, ONE_BLOCK, train__lr="-1")


def test_optional_data_is_identified_by_content_if_it_exists(tmp_path: Path) -> None:
    block = "blocks:\n  - set: {data: {kind: text, path: words.txt}}\n    axes: {model.family: [dense]}\n"
    path = write(tmp_path, BASE.replace("  data: {kind: bios, people: 60}\n", "") + block)
    (open_cell,) = load_grid(path, need_data=False).cells
    assert open_cell.data.fingerprint is None
    words = tmp_path / "words.txt"
    words.write_text("Some words.\n")
    over = {"data.path": str(words)}
    assert load_grid(path, over, need_data=False) == load_grid(path, over)
    assert load_grid(path, over).cells[0].data.fingerprint is not None

"""Tables in other forms and places: bit for bit where nothing is rounded, and within the rounding elsewhere."""

from collections import OrderedDict
from pathlib import Path

import model_families
import pytest
import torch

from suite.errors import UserError
from suite.inference.tables import loading, popularity
from suite.inference.tables.forms import CLIPS, FORMS, encode_table, form_of, nf4_levels, pack, unpack
from suite.inference.tables.loading import Place, parse_place
from suite.inference.tables.reading import reduce_tables, stored_rows, traffic
from suite.inference.tables.stores import CachedRows, RowStore
from suite.models import Transformer
from suite.models.lookup.controls import tables_off

CASES = ["pkm", "memory_plus varied", "peer", "ultramem_v2", "engram", "engram beside"]
PLACES = [
    Place("host"),
    Place("file"),
    Place("file", "lru", 0.1),
    Place("host", "static", 0.2),
    Place("file", "lru", 1),
]


def saved(model: Transformer, folder: Path) -> tuple[dict[str, torch.Tensor], Path]:
    path = folder / "state.pt"
    torch.save({"model": model.state_dict()}, path)
    return torch.load(path, mmap=True, weights_only=True)["model"], path


def folders(parent: Path, count: int) -> list[Path]:
    made = [parent / str(number) for number in range(count)]
    for folder in made:
        folder.mkdir()
    return made


def loaded(
    model: Transformer, folder: Path, place: Place | None, form: str | None = None, kept: float | None = None
) -> Transformer:
    other = loading.load_stored(model.config, model.vocab_size, *saved(model, folder), form, place, kept)
    if place is not None:
        counts = [torch.arange(len(table.weight)) % 7 for table in other.memory_tables()]
        loading.add_caches(other, place, counts if place.policy == "static" else None)
    return other


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.label)
def test_tables_elsewhere_give_the_same_logits_bit_for_bit(case: str, place: Place, tmp_path: Path) -> None:
    model = model_families.model(case).eval()
    other = loaded(model, tmp_path, place)
    assert all(name.split(".")[-1] != "weight" for name, _ in other.tables.named_parameters())
    with torch.no_grad():
        for seed in range(3):
            tokens_BT = model_families.tokens(2, 9, seed=seed)
            assert torch.equal(other(tokens_BT), model(tokens_BT))
    read = traffic(other)
    row_bytes = {rows.store.row_bytes for rows in stored_rows(other)}
    if len(row_bytes) == 1:
        assert getattr(read, place.source) + read.device == read.rows * row_bytes.pop()
    assert read.hits == 0 if place.policy is None else read.hits > 0


@pytest.mark.parametrize("control", ["shuffled", "one_row"])
def test_controls_stay_controls(control: str, tmp_path: Path) -> None:
    model = model_families.model("pkm", control=control).eval()
    tokens_BT = model_families.tokens(2, 9)
    assert torch.equal(loaded(model, tmp_path, Place("file"))(tokens_BT), model(tokens_BT))


def test_reads_are_the_same_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens_BT = model_families.model("peer").eval(), model_families.tokens(2, 9)
    monkeypatch.setattr("suite.inference.tables.reading.ELEMENTS_AT_ONCE", 3000)
    assert torch.equal(loaded(model, tmp_path, Place("file"))(tokens_BT), model(tokens_BT))


BY_IDS = [
    "engram",
    "engram beside",
    "engram_moe",
    "ngram_embedding",
    "token_table stem",
    "token_table tails",
    "token_table values",
]
AHEAD = [Place("host", prefetch=True), Place("file", prefetch=True), Place("file", "lru", 0.2, prefetch=True)]


@pytest.mark.parametrize("case", BY_IDS)
@pytest.mark.parametrize("place", AHEAD, ids=lambda place: place.label)
def test_prefetched_rows_give_the_same_logits_bit_for_bit(case: str, place: Place, tmp_path: Path) -> None:
    model = model_families.model(case).eval()
    other = loaded(model, tmp_path, place)
    tokens_BT = model_families.tokens(2, 9)
    with torch.no_grad():
        caches = [each.new_cache(2, 9) for each in (model, other)]
        pad_B = torch.tensor([0, 2])
        for step_BT in tokens_BT.split([5, 1, 1, 2], 1):
            expected, logits = (
                each(step_BT, cache=cache, pad_B=pad_B) for each, cache in zip((model, other), caches, strict=True)
            )
            assert torch.equal(logits, expected)
    read = traffic(other)
    assert read.prefetched == read.rows > 0
    assert not any(rows.ahead for rows in stored_rows(other))


def test_prefetching_leaves_the_state_of_a_cache_as_it_is(tmp_path: Path) -> None:
    model = model_families.model("engram").eval()
    places = Place("file", "lru", 0.1), Place("file", "lru", 0.1, prefetch=True)
    others = [loaded(model, folder, place) for place, folder in zip(places, folders(tmp_path, 2), strict=True)]
    with torch.inference_mode():
        for seed in range(3):
            one, two = (other(model_families.tokens(2, 9, seed=seed)) for other in others)
            assert torch.equal(one, two)
    one, two = (traffic(other) for other in others)
    assert (one.rows, one.hits, one.device, one.file) == (two.rows, two.hits, two.device, two.file)
    assert (one.prefetched, two.prefetched) == (0, two.rows)


def test_prefetched_reads_are_the_same_in_chunks_and_with_tables_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens_BT = model_families.model("engram").eval(), model_families.tokens(2, 9)
    monkeypatch.setattr("suite.inference.tables.reading.ELEMENTS_AT_ONCE", 100)
    other = loaded(model, tmp_path, Place("file", prefetch=True))
    assert torch.equal(other(tokens_BT), model(tokens_BT))
    before = traffic(other)
    with tables_off(model.memory_tables()), tables_off(other.memory_tables()):
        assert torch.equal(other(tokens_BT), model(tokens_BT))
    assert (traffic(other) - before).rows == 0


def test_an_error_in_the_thread_is_raised_where_the_rows_are_needed(tmp_path: Path) -> None:
    model, tokens_BT = model_families.model("engram").eval(), model_families.tokens(2, 9)
    other = loaded(model, tmp_path, Place("file", prefetch=True))
    first, *_ = stored_rows(other)
    whole = first.store._elsewhere["values"]
    first.store._elsewhere["values"] = whole[:3]
    with pytest.raises(IndexError, match="out of range"):
        other(tokens_BT)
    first.store._elsewhere["values"] = whole
    assert torch.equal(other(tokens_BT), model(tokens_BT))


def test_a_layer_that_reads_other_rows_than_were_prefetched_is_refused(tmp_path: Path) -> None:
    other = loaded(model_families.model("engram").eval(), tmp_path, Place("file", prefetch=True))
    layer = next(iter(other.memory_layers().values()))
    addresses = layer.addresses
    layer.addresses = lambda ids_BTW: addresses(ids_BTW).flip(0)
    with pytest.raises(RuntimeError, match="other rows than those that were prefetched"):
        other(model_families.tokens(2, 9))


@pytest.mark.parametrize("case", ["pkm", "peer", "ultramem_v2", "dense"])
def test_rows_that_follow_from_the_hidden_state_are_not_prefetched(case: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"prefetch: got family {case}.*allowed: .*engram"):
        loaded(model_families.model(case).eval(), tmp_path, Place("file", prefetch=True))


def test_a_file_is_read_again_after_its_pages_are_dropped(tmp_path: Path) -> None:
    model, tokens_BT = model_families.model("pkm", half_keys=64).eval(), model_families.tokens(2, 9)
    other = loaded(model, tmp_path, Place("file", "lru", 0.05))
    expected = model(tokens_BT)
    for _ in range(2):
        for rows in stored_rows(other):
            rows.store.evict()
        assert torch.equal(other(tokens_BT), expected)


def reference_rows(form: str, rows_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what each element becomes, by a loop over rows and levels in float64, and the largest error allowed."""
    result, bound = torch.zeros_like(rows_RD, dtype=torch.float64), torch.zeros_like(rows_RD, dtype=torch.float64)
    for r, row in enumerate(rows_RD.double()):
        largest = float(row.abs().max())
        if form == "fp8":
            for start in range(0, len(row), 32):
                block = row[start : start + 32]
                scale = 2.0**-126
                while float(block.abs().max()) / scale > 448:
                    scale *= 2
                for d, value in enumerate((block / scale).tolist()):
                    result[r, start + d] = scale * float(torch.tensor(value).to(torch.float8_e4m3fn).float())
                    bound[r, start + d] = max(abs(value) * 2.0**-4, 2.0**-10) * scale
            continue
        if form == "bf16":
            result[r], bound[r] = row.bfloat16().double(), row.abs() * 2.0**-8
            continue
        if form == "nf4":
            levels = nf4_levels(torch.device("cpu")).double() * largest
            best = (row[:, None] - levels).abs().argmin(1)
            result[r], bound[r] = levels[best], largest * 0.16
            continue
        grids = [torch.arange(-127, 128) * largest / 127]
        if form == "int4":
            grids = [torch.arange(-7, 8) * largest * clip / 7 for clip in CLIPS]
        candidates = [grid[(row[:, None] - grid).abs().argmin(1)] for grid in grids]
        errors = [float((candidate - row).square().sum()) for candidate in candidates]
        result[r] = candidates[errors.index(min(errors))]
        bound[r] = largest / 254 if form == "int8" else largest / 2
    return result, bound


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [1, 5, 32, 45])
def test_codes_equal_a_loop_in_float64(form: str, width: int) -> None:
    rows_RD = torch.randn(20, width, generator=torch.Generator().manual_seed(width)) * 0.03
    rows_RD[3] = 0.0
    parts = encode_table(form_of(form), rows_RD)
    decoded_RD = form_of(form).decode(parts, width)
    expected_RD, bound_RD = reference_rows(form, rows_RD)
    assert decoded_RD.dtype == torch.float32
    torch.testing.assert_close(decoded_RD.double(), expected_RD, rtol=1e-6, atol=1e-9)
    assert ((decoded_RD.double() - rows_RD.double()).abs() <= bound_RD * (1 + 1e-6)).all()
    assert torch.equal(decoded_RD[3], torch.zeros(width))


def test_bytes_of_the_forms() -> None:
    sizes = {form: RowStore(form_of(form).empty(10, 64, torch.float32)).row_bytes for form in FORMS}
    assert sizes == {"bf16": 128, "int8": 68, "int4": 36, "fp8": 66, "nf4": 36}


@pytest.mark.parametrize("width", [1, 2, 7, 16])
def test_packed_codes_return(width: int) -> None:
    codes = torch.randint(0, 16, (9, width), generator=torch.Generator().manual_seed(width))
    assert pack(codes).shape == (9, (width + 1) // 2)
    assert torch.equal(unpack(pack(codes), width).long(), codes)


def test_nf4_levels_are_those_of_the_paper() -> None:
    published = [-1.0, -0.6961928, -0.5250730, -0.3949174, -0.2844413, -0.1847734, -0.0910500, 0.0]
    published += [0.0795802, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    torch.testing.assert_close(nf4_levels(torch.device("cpu")), torch.tensor(published), rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_model_equals_one_with_the_decoded_table(case: str, form: str, tmp_path: Path) -> None:
    model = model_families.model(case).eval()
    plain = model_families.model(case).eval()
    with torch.no_grad():
        for table in plain.memory_tables():
            rows_RD = table.weight
            rows_RD.copy_(form_of(form).decode(encode_table(form_of(form), rows_RD), rows_RD.shape[1]))
    reduce_tables(model, form)
    tokens_BT = model_families.tokens(2, 9)
    with torch.no_grad():
        expected = plain(tokens_BT)
        assert torch.equal(model(tokens_BT), expected)
        for place in (None, Place("file", "lru", 0.1)):
            assert torch.equal(loaded(model, tmp_path, place, form)(tokens_BT), expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", [None, "int8", "int4"])
def test_dropped_rows_read_as_zeros(case: str, form: str | None, tmp_path: Path) -> None:
    model, plain = model_families.model(case).eval(), model_families.model(case).eval()
    share = 0.3
    kept = [torch.randperm(len(table.weight))[: round(share * len(table.weight))] for table in model.memory_tables()]
    with torch.no_grad():
        for table, kept_K in zip(plain.memory_tables(), kept, strict=True):
            rows_RD = torch.zeros_like(table.weight)
            rows_RD[kept_K] = table.weight[kept_K]
            table.weight.copy_(form_of(form).decode(encode_table(form_of(form), rows_RD), rows_RD.shape[1]))
    reduce_tables(model, form, kept)
    tokens_BT = model_families.tokens(2, 9)
    with torch.no_grad():
        expected = plain(tokens_BT)
        assert torch.equal(model(tokens_BT), expected)
        for place in (None, Place("file"), Place("file", "lru", 0.1), Place("host", "static", 0.1)):
            assert torch.equal(loaded(model, tmp_path, place, form, share)(tokens_BT), expected)
    for rows, kept_K in zip(stored_rows(model), kept, strict=True):
        assert rows.bytes == (len(kept_K) + 1) * rows.store.row_bytes + 4 * len(rows.place_R)


def test_counts_of_dropped_rows_are_those_of_the_row_of_zeros() -> None:
    model = model_families.model("pkm").eval()
    reduce_tables(model, None, [torch.tensor([5, 9])])
    (rows,) = stored_rows(model)
    counts_R = torch.arange(256)
    assert rows.counts_of_store(counts_R).tolist() == [5, 9, 255 * 128 - 14]


def test_lru_equals_an_ordered_dict() -> None:
    rows, size = 40, 9
    store = RowStore({"values": torch.randn(rows, 3)}, "host")
    cache, generator = CachedRows(store, size), torch.Generator().manual_seed(0)
    cached: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for step in range(60):
        count = int(torch.randint(1, 14, (), generator=generator))
        read = (torch.rand(count, generator=generator) ** 3 * rows).long().unique()
        if step % 3 == 0:
            read = read.flip(0)
        gathered = cache.gather(read)["values"]
        assert torch.equal(gathered, store.parts["values"][read])
        hits += sum(row in cached for row in read.tolist())
        for row in read.tolist():
            cached[row] = None
            cached.move_to_end(row)
        while len(cached) > size:
            cached.popitem(last=False)
        assert set(cache.row_H[cache.row_H >= 0].tolist()) == set(cached)
        assert cache.traffic.hits == hits
    assert 0 < hits < cache.traffic.rows
    assert cache.traffic.host == (cache.traffic.rows - hits) * store.row_bytes


def test_hit_rates_equal_a_simulation() -> None:
    generator = torch.Generator().manual_seed(1)
    counted, reads = ((torch.rand(500, generator=generator) ** 2 * 30).to(torch.int32) for _ in range(2))
    counts_R = popularity.counts_of(counted, 30)
    shares = [0.1, 0.5, 1.0]
    hot = sorted(range(30), key=lambda row: (-int((counted == row).sum()), row))
    expected = [sum(row in hot[: round(30 * share)] for row in reads.tolist()) / 500 for share in shares]
    assert popularity.static_hits(counts_R, reads, shares) == pytest.approx(expected)
    store = CachedRows(RowStore({"values": torch.randn(30, 2)}, "host"), 3)
    for row in reads.long():
        store.gather(row.view(1))
    assert popularity.lru_hits(reads, 30, shares)[0] == store.traffic.hits / 500


@pytest.mark.parametrize(
    ("table", "cache", "words"),
    [
        ("disk", None, ["--table", "'disk'", "host, file"]),
        (None, "lru:5%", ["--cache", "'lru:5%'", "--table"]),
        ("file", "lru:0%", ["--cache", "'lru:0%'"]),
        ("file", "lfu:5%", ["--cache", "'lfu:5%'"]),
        ("file", "lru:101%", ["--cache", "'lru:101%'"]),
        ("file", "lru:.%", ["--cache", "'lru:.%'"]),
    ],
)
def test_wrong_places_are_refused(table: str | None, cache: str | None, words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        parse_place(table, cache)
    assert all(word in str(refused.value) for word in words)


def test_prefetching_needs_a_place() -> None:
    with pytest.raises(UserError, match="--prefetch: without --table"):
        parse_place(None, None, prefetch=True)
    assert parse_place("file", "lru:5%", prefetch=True) == Place("file", "lru", 0.05, prefetch=True)


def test_places_are_read() -> None:
    assert parse_place(None, None) is None
    assert parse_place("host", None) == Place("host")
    assert parse_place("file", "static:2.5%") == Place("file", "static", 0.025)

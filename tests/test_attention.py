import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from mmrdpm.attention import backend, flex, sdpa, xformers
from mmrdpm.attention.layout import BlockKind, Layout
from mmrdpm.errors import RecipeError
from mmrdpm.positions import rotations
from mmrdpm.transformer import Attention, TransformerConfig

T, C, N = BlockKind.TEXT, BlockKind.CLEAN, BlockKind.NOISY


def make_layout(blocks):
    """`(document, kind, length)` in order -> a layout of one row; document -1 is padding."""
    documents, ids, kinds = [], [], []
    for block, (document, kind, length) in enumerate(blocks):
        documents += [document] * length
        ids += [block] * length
        kinds += [int(kind)] * length
    return Layout(*(torch.tensor([x]) for x in (documents, ids, kinds)))


def random_layout(generator, length=24, kinds=3):
    blocks, used, document = [], 0, 0
    while used < length:
        kind, size, switch = (
            torch.randint(n, (), generator=generator).item() for n in (kinds, 4, 3)
        )
        document += switch == 0
        blocks.append((document, kind, min(size + 1, length - used)))
        used += blocks[-1][2]
    return make_layout([*blocks, (-1, T, 2)])


def random_rows(seed, rows=3, length=26):
    generator = torch.Generator().manual_seed(seed)
    layouts = [random_layout(generator, length - 2, kinds=4) for _ in range(rows)]
    return Layout(*(torch.cat(x) for x in zip(*(vars(a).values() for a in layouts), strict=True)))


def test_the_rule_worked_by_hand():
    layout = make_layout([(0, T, 2), (0, N, 2), (0, C, 2), (0, T, 1), (1, T, 1), (-1, T, 1)])
    expected = [
        "1........",
        "11.......",
        "1111.....",
        "1111.....",
        "11..11...",
        "11..11...",
        "11..111..",
        ".......1.",
        "........1",
    ]
    rows = ["".join(".1"[int(x)] for x in row) for row in layout.visible()[0]]
    assert rows == expected


@pytest.mark.parametrize("seed", range(5))
def test_the_mask_equals_the_rule_read_pair_by_pair(seed):
    layout = random_layout(torch.Generator().manual_seed(seed))
    documents, blocks, kinds = (x[0].tolist() for x in vars(layout).values())
    visible = layout.visible()[0]
    for q in range(len(kinds)):
        for k in range(len(kinds)):
            if documents[q] != documents[k] or documents[q] < 0:
                expected = q == k
            elif blocks[q] == blocks[k]:
                expected = kinds[q] != T or k <= q
            else:
                expected = kinds[k] != N and k < q
            assert visible[q, k] == expected, (q, k)


def test_sdpa_equals_attention_written_out():
    generator = torch.Generator().manual_seed(0)
    layout = random_layout(generator)
    length = layout.kinds.shape[1]
    q = torch.randn(1, length, 4, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 1, length, 2, 8, generator=generator, dtype=torch.float64)
    out = sdpa.plan(layout)(q, k, v)
    for i in range(length):
        seen = layout.visible()[0, i]
        for head in range(4):
            scores = k[0, seen, head // 2] @ q[0, i, head] / 8**0.5
            expected = scores.softmax(0) @ v[0, seen, head // 2]
            torch.testing.assert_close(out[0, i, head], expected)


@pytest.mark.parametrize("seed", range(5))
def test_sdpa_written_out_equals_the_fused_one(seed):
    layout = random_rows(seed)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(*layout.kinds.shape, 4, 8, generator=generator, requires_grad=True)
    k, v = torch.randn(2, *layout.kinds.shape, 2, 8, generator=generator).requires_grad_()
    upstream = torch.randn(q.shape, generator=generator)
    fused = sdpa.masked(q, k, v, layout.visible()[:, None])
    out = sdpa.plan(layout)(q, k, v)
    torch.testing.assert_close(out, fused)
    for found, expected in zip(
        *(torch.autograd.grad(x, (q, k, v), upstream) for x in (out, fused)), strict=True
    ):
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_without_gradients_no_other_document_changes_the_bits_of_one():
    lengths = (5, 9, 12, 13, 14, 16, 9, 13, 14, 7, 11, 3, 14, 13, 12)
    rows = [make_layout([(0, T, n), (-1, T, 16 - n)]) for n in lengths]
    layout = Layout(*(torch.cat(x) for x in zip(*(vars(a).values() for a in rows), strict=True)))
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, *layout.kinds.shape, 4, 64, generator=generator)
    together = sdpa.plan(layout)(q, k, v)
    for i, row in enumerate(rows):
        alone = sdpa.plan(row)(*(x[i : i + 1] for x in (q, k, v)))
        assert torch.equal(together[i, : lengths[i]], alone[0, : lengths[i]])


@pytest.mark.parametrize("seed", range(8))
def test_the_biases_of_xformers_are_the_rule(seed):
    """Both parts' biases, made dense and put back in place, give the mask and nothing twice."""
    layout = random_rows(seed)
    rows, length = layout.kinds.shape
    seen = torch.zeros(rows * length, rows * length, dtype=torch.int64)
    for part in xformers.parts(layout):
        bias = part.bias().materialize((len(part.queries), len(part.keys)))
        query, key = (bias == 0).nonzero(as_tuple=True)
        seen.index_put_(
            (part.queries[query], part.keys[key]), torch.ones_like(query), accumulate=True
        )
    expected = torch.block_diag(*layout.visible().long())
    expected[(layout.document_ids < 0).flatten()] = 0  # padding gets nothing at all
    assert torch.equal(seen, expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("seed", range(3))
def test_flex_equals_sdpa_forward(seed):
    """Uncompiled: the CPU compiles for half a minute. The backward pass needs CUDA."""
    layout = random_rows(seed)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(*layout.kinds.shape, 4, 16, generator=generator)
    k, v = torch.randn(2, *layout.kinds.shape, 2, 16, generator=generator)
    with torch.no_grad():
        out = flex.plan(layout)(q, k, v)
    torch.testing.assert_close(out, sdpa.plan(layout)(q, k, v))


@pytest.mark.parametrize("length", [26, 300, 512])
def test_the_blocks_of_flex_are_those_that_the_library_finds(length):
    """Uncompiled, it does not look at them: skipped blocks, whole ones and those in between."""
    layout = random_rows(length, rows=2, length=length)
    visible = layout.visible()
    expected = create_block_mask(
        lambda row, _, query, key: visible[row, query, key], 2, None, *visible.shape[1:], "cpu"
    )
    made = flex.block_mask(layout)
    assert made.seq_lengths == expected.seq_lengths
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, places = (
            [getattr(mask, f"{kind}_{what}") for mask in (made, expected)]
            for what in ("num_blocks", "indices")
        )
        assert torch.equal(counts[0], counts[1].expand_as(counts[0]))
        assert counts[0].max() <= places[0].shape[-1]
        for ours, theirs, n in zip(
            *(p.flatten(0, -2) for p in places), counts[0].flatten(), strict=True
        ):
            assert set(ours[:n].tolist()) == set(theirs[:n].tolist())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["xformers", "flex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [24, 161, 298, 1300])
def test_a_backend_equals_sdpa_forward_and_backward(name, dtype, length):
    if why := backend.why_not(name, torch.device("cuda")):
        pytest.skip(why)
    layout = random_rows(length, length=length).to("cuda")
    inside = (layout.document_ids >= 0)[..., None, None]
    generator = torch.Generator("cuda").manual_seed(length)
    shared = torch.randn(*layout.kinds.shape, 8, 32, device="cuda", generator=generator)

    def results(attend, dtype):
        q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in shared.split((4, 2, 2), dim=2))
        out = torch.where(inside, attend(q, k, v), 0)
        out.float().square().sum().backward()
        return out, q.grad, k.grad, v.grad

    exact = results(sdpa.plan(layout), torch.float32)
    plain = results(sdpa.plan(layout), dtype)
    found = results(backend.planner(name)(layout), dtype)
    for true, rounded, got in zip(exact, plain, found, strict=True):
        assert got.dtype == dtype
        off = (got.float() - true).norm()  # no more than twice what rounding does to sdpa
        assert off <= max(2 * (rounded.float() - true).norm(), 1e-3 * true.norm())


def test_auto_takes_flex_for_long_rows_then_xformers_then_sdpa(monkeypatch):
    installed = {"triton"}
    monkeypatch.setattr(backend, "find_spec", lambda name: name in installed)
    monkeypatch.setattr(backend.shutil, "which", lambda name: "/usr/bin/cc")
    monkeypatch.setattr(backend, "_refusal", lambda device, head_dim: None)
    cuda, shapes = torch.device("cuda"), ((64, 8192), (64, 256), (8, 8192))
    assert [backend.resolve("auto", cuda, *s) for s in shapes] == ["flex", "sdpa", "sdpa"]
    installed.add("xformers")
    assert [backend.resolve("auto", cuda, *s) for s in shapes] == ["flex", "sdpa", "xformers"]
    with pytest.raises(RecipeError, match="heads of at least 16 channels, not 8"):
        backend.resolve("flex", cuda, 8)


def test_a_backend_that_cannot_run_is_refused():
    assert backend.resolve("auto", torch.device("cpu")) == "sdpa"
    with pytest.raises(RecipeError, match="xformers, but it needs CUDA, not cpu"):
        backend.resolve("xformers", torch.device("cpu"))
    with pytest.raises(RecipeError, match="flex, but its backward pass needs CUDA, not cpu"):
        backend.resolve("flex", torch.device("cpu"))


def test_queries_keys_and_values_are_of_one_type_whatever_norms_give(monkeypatch):
    """Under autocast on CUDA rms_norm gives float32, and kernels want one type."""
    attention = Attention(TransformerConfig(layers=1, width=16, heads=2, kv_heads=1, ffn=16))
    monkeypatch.setattr(attention, "normalise", lambda qk: qk.float())
    rotation = rotations(torch.zeros(1, 3, 3, dtype=torch.int64), 8, 1e4)
    with torch.autocast("cpu", torch.bfloat16):
        made = attention.project(torch.randn(1, 3, 16), rotation)
    assert [tensor.dtype for tensor in made] == [torch.bfloat16] * 3

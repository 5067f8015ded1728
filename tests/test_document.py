from dataclasses import replace

import pytest
import torch

from mmrdpm.attention import xformers
from mmrdpm.document import ImageSegment, TextSegment, length, pack
from mmrdpm.objective import loss
from mmrdpm.positions import rotate, rotations
from mmrdpm.transformer import Transformer, TransformerConfig
from mmrdpm.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=10, codebook_size=6)
CHANNELS, STEPS = 3, 4


def image(seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(6, (STEPS, 2, 2), generator=generator)
    states = torch.randn(STEPS + 1, 2, 2, CHANNELS, generator=generator)
    return ImageSegment(codes, states, **options)


def documents():
    v = VOCABULARY
    return [
        [TextSegment((v.bos, 1, 2, v.image_start)), image(1, timesteps=(4, 2))],
        [
            TextSegment((v.bos, v.image_start)),
            image(2, timesteps=(1,), clean=True),
            TextSegment((v.image_end, 3, v.eos)),
        ],
        [TextSegment((v.bos, 5, 6, 7, v.eos))],
    ]


def make_model(**variant):
    torch.manual_seed(0)
    config = TransformerConfig(layers=2, width=32, heads=4, kv_heads=2, ffn=48, **variant)
    model = Transformer(config, VOCABULARY.size, CHANNELS, STEPS)
    for parameter in model.parameters():  # away from the identity that it starts as
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def packed(rows, seq_len=32):
    return pack(rows, seq_len, VOCABULARY, CHANNELS)


def test_a_captioned_image_packed_by_hand():
    document = documents()[1]
    row = packed([[document]], seq_len=14)
    v = VOCABULARY
    assert length(document) == 13
    assert row.timesteps[0].tolist() == [-1] * 2 + [1] * 4 + [0] * 4 + [-1] * 4
    codes = (document[1].code_indices[0].flatten() + v.code_offset).tolist()
    text = [v.image_start, -100]
    expected = [*text, *codes, *[-100] * 4, 3, v.eos, -100, -100]
    assert row.targets[0].tolist() == expected
    assert row.positions[0, :, 0].tolist() == [0, 1] + [2] * 8 + [3, 4, 5, 0]
    assert row.positions[0, 2:6, 1:].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert torch.equal(row.latents[0, 2, :3], document[1].states[1, 0, 0])
    assert torch.equal(row.latents[0, 2, 3:], document[1].states[STEPS, 0, 0])
    assert row.latents[0, 6, 3:].tolist() == [0, 0, 0]
    assert row.layout.block_ids[0].tolist() == [0] * 2 + [1] * 4 + [2] * 4 + [3] * 3 + [4]


def test_more_than_a_row_holds_is_an_error_and_never_spills_into_the_next():
    long = [TextSegment(tuple(range(5)))]
    with pytest.raises(ValueError, match="row 0 has 5 tokens, more than 4"):
        pack([[long], []], 4, Vocabulary(20, 4), 2)


def test_neither_packing_nor_company_changes_the_loss():
    model, docs = make_model(), documents()
    together = loss(model, packed([docs]), text_weight=0.5)
    apart = loss(model, packed([[d] for d in docs]), text_weight=0.5)
    torch.testing.assert_close(together.total, apart.total)
    torch.testing.assert_close(together.per_token, apart.per_token)


def test_the_total_is_the_weighted_mean_and_steps_are_reported_apart():
    found = loss(make_model(), packed([documents()]), text_weight=0.25)
    text = found.per_token[found.timesteps < 0]
    codes = found.per_token[found.timesteps > 0]
    expected = (0.25 * text.sum() + codes.sum()) / (0.25 * len(text) + len(codes))
    torch.testing.assert_close(found.total.detach(), expected)


def test_the_z_loss_by_hand():
    """The weighted mean of the squared log of `sum_k exp(logit_k)`, PaLM section 5."""
    model, rows = make_model(), packed([documents()])
    plain, raised = (loss(model, rows, text_weight=0.25, z_weight=z) for z in (0.0, 0.1))
    learned = rows.targets >= 0
    with torch.no_grad():
        logits = model(rows)[learned] @ model.table.weight.T
    log_z = logits.double().exp().sum(-1).log()
    weights = torch.where(rows.timesteps[learned] < 0, 0.25, 1.0).double()
    mean = (weights * log_z**2).sum() / weights.sum()
    assert mean > 0.1
    torch.testing.assert_close(raised.total - plain.total, (0.1 * mean).float())
    assert torch.equal(raised.per_token, plain.per_token)  # what is logged stays in nats


def test_noisy_blocks_reach_nothing_outside_themselves():
    model, document = make_model(), documents()[1]
    other = [document[0], image(9, timesteps=(1,), clean=True), document[2]]
    clean = torch.equal
    changed = image(9, timesteps=(1,), clean=True)
    states = changed.states.clone()
    states[0] = document[1].states[0]  # the same picture from another noise
    other[1] = ImageSegment(changed.code_indices, states, (1,), True)
    first, second = (model(packed([[d]]))[0] for d in (document, other))
    assert not clean(first[2:6], second[2:6])
    torch.testing.assert_close(first[6:13], second[6:13])


def test_rope_sees_differences_of_positions_only():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator)

    def score(a, b):
        turned = [rotate(x, rotations(torch.tensor([[p]]), 16, 1e4)) for x, p in ((q, a), (k, b))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score([5, 1, 2], [3, 0, 1]), score([9, 4, 3], [7, 3, 2]))
    for axis in range(3):
        moved = [5, 1, 2]
        moved[axis] += 1
        assert abs(score(moved, [3, 0, 1]) - score([5, 1, 2], [3, 0, 1])) > 1e-4


def test_a_model_learns_the_codes_of_one_document():
    torch.manual_seed(0)
    config = TransformerConfig(layers=2, width=32, heads=4, kv_heads=2, ffn=48)
    model, rows = Transformer(config, VOCABULARY.size, CHANNELS, STEPS), packed([documents()])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        found = loss(model, rows)
        found.total.backward()
        optimizer.step()
    assert found.per_token[found.timesteps > 0].max() < 0.1


def test_following_blocks_are_those_behind_the_first_of_their_image():
    v = VOCABULARY
    text = TextSegment((v.bos, 1))
    both = [text, image(1, timesteps=(4, 2, 1)), image(2, timesteps=(3, 1), clean=True), text]
    row = packed([[both, [text, image(3, timesteps=(2,))]]], seq_len=40)
    layout = row.layout
    expected = [0] * 2 + [2] * 4 + [3] * 8 + [2] * 4 + [3] * 4 + [1] * 4 + [0] * 4 + [2] * 4
    assert layout.kinds[0, :34].tolist() == expected
    plain = [min(kind, 2) for kind in expected]
    assert layout.without_history().kinds[0, :34].tolist() == plain


def test_a_following_block_sees_its_images_earlier_steps_and_no_others():
    v = VOCABULARY
    document = [TextSegment((v.bos, 1)), image(1, timesteps=(4, 2)), image(2, timesteps=(3, 1))]
    layout = packed([[document]], seq_len=18).layout
    rows = ["".join(".1"[int(x)] for x in row) for row in layout.visible()[0, ::4]]
    assert rows == [
        "1.................",
        "111111............",
        "1111111111........",
        "11........1111....",
        "11........11111111",
    ]
    seen = torch.zeros(18, 18, dtype=torch.int64)
    for part in xformers.parts(layout):
        bias = part.bias().materialize((len(part.queries), len(part.keys)))
        query, key = (bias == 0).nonzero(as_tuple=True)
        seen[part.queries[query], part.keys[key]] += 1
    assert torch.equal(seen, layout.visible()[0].long())


def test_history_reaches_later_steps_and_never_earlier_ones():
    model = make_model(history=True)
    text = TextSegment((VOCABULARY.bos, 1))
    first = image(1, timesteps=(4, 2))
    states = first.states.clone()
    states[2] += 1
    second = replace(first, states=states)
    a, b = (model(packed([[[text, i]]], 10))[0] for i in (first, second))
    assert not torch.equal(a[6:], b[6:])
    torch.testing.assert_close(a[:6], b[:6])
    plain = make_model()
    assert not torch.equal(
        model(packed([[[text, first]]], 10))[0, 6:], plain(packed([[[text, first]]], 10))[0, 6:]
    )
    torch.testing.assert_close(
        model(packed([[[text, first]]], 10))[0, :6], plain(packed([[[text, first]]], 10))[0, :6]
    )


def test_without_start_noise_the_model_does_not_see_it():
    first = image(1, timesteps=(2,))
    states = first.states.clone()
    states[STEPS] += 1
    text = TextSegment((VOCABULARY.bos, 1))
    rows = [packed([[[text, i]]], 6) for i in (first, replace(first, states=states))]
    blind, seeing = make_model(sees_start_noise=False), make_model()
    assert torch.equal(*(blind(row) for row in rows))
    assert not torch.equal(*(seeing(row) for row in rows))

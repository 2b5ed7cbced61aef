"""The table of what is measured: repeated blocks in one row, every reason once, 80 columns."""

import sys
import unicodedata
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_hsu import LinearSchedule, UniformityRegularizer, summarize
from lightning_hsu._monitor.fold import fold as _fold
from lightning_hsu._monitor.fold import fold_names
from lightning_hsu._monitor.summary import (
    LayerSummary,
    Summary,
    _view,
    coefficient_text,
    giga_flops,
)
from lightning_hsu._neurons.candidates import Skip
from lightning_hsu.measures import KoLeo, Polarization, RieszEnergy, Sampled

ENERGY = RieszEnergy(s=2.0, half_space=True)
OF_HEAD = RieszEnergy(s=2.0)
EMBEDDING = "an embedding, measured only when asked for: include='{}'"


def layer(name, neurons, dimension, head="", *, groups=1, measure=None, frozen=False, **more):
    """A layer as a summary has it: a head has a reason to be one."""
    if measure is None:
        measure = OF_HEAD if head else ENERGY
    shape = groups, neurons, dimension
    return LayerSummary(name, shape, bool(head), not frozen, measure, head, **more)


def summary(*layers, skips=(), coverage=1.0, model="Net", every_n_steps=1):
    return Summary(model, layers, tuple(skips), coverage, every_n_steps)


def table(text):
    """A golden table, written with a bar at the start of each line."""
    return "\n".join(line.strip().removeprefix("|") for line in text.strip().splitlines())


def columns(line):
    """How many columns of a terminal a line takes."""
    return sum(2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in line)


# Tables of whole models.


def test_a_small_network():
    common = {"coefficient": "0.1"}
    shown = summary(
        layer("net.0", 256, 784, giga_flops=0.154, **common),
        layer("net.2", 256, 256, giga_flops=0.05, **common),
        layer("net.4", 256, 256, giga_flops=0.05, **common),
        layer("net.6", 10, 256, "last before the loss", giga_flops=1e-5, **common),
    )
    assert str(shown) == table("""
        |Net: 4 layers measured
        |measure: RieszEnergy(s=2.0, half_space=True)
        |head: RieszEnergy(s=2.0)
        |coefficient: 0.1
        |
        |layer          neurons x dimension  GFLOP/step  remarks
        |-------------  -------------------  ----------  ---------------------------
        |net.0          256 x 784                  0.15
        |net.{2,4} (2)  256 x 256                   0.1
        |net.6          10 x 256                 <0.001  head (last before the loss)
        |
        |penalty: 0.25 GFLOP/step in total
        |measured: 100 % of the entries of all weight matrices
    """)
    assert repr(shown) == str(shown)


def resnet():
    layers, wide = [layer("conv1", 64, 147)], 64
    for stage in range(1, 5):
        frozen = stage < 3
        for block in range(2):
            before = wide // 2 if stage > 1 and block == 0 else wide
            name = f"layer{stage}.{block}"
            layers.append(layer(f"{name}.conv1", wide, 9 * before, frozen=frozen))
            layers.append(layer(f"{name}.conv2", wide, 9 * wide, frozen=frozen))
            if before != wide:
                layers.append(layer(f"{name}.downsample.0", wide, before, frozen=frozen))
        wide *= 2
    return summary(*layers, layer("fc", 1000, 512, "guessed: last Linear"), model="ResNet")


def test_a_residual_network():
    assert str(resnet()) == table("""
        |ResNet: 21 layers measured
        |measure: RieszEnergy(s=2.0, half_space=True)
        |head: RieszEnergy(s=2.0)
        |
        |layer                       neurons x dimension  remarks
        |--------------------------  -------------------  ---------------------------
        |conv1                       64 x 147
        |layer1.{0,1}.conv{1,2} (4)  64 x 576             frozen
        |layer2.0.conv1              128 x 576            frozen
        |layer2.0.conv2              128 x 1152           frozen
        |layer2.0.downsample.0       128 x 64             frozen
        |layer2.1.conv{1,2} (2)      128 x 1152           frozen
        |layer3.0.conv1              256 x 1152
        |layer3.0.conv2              256 x 2304
        |layer3.0.downsample.0       256 x 128
        |layer3.1.conv{1,2} (2)      256 x 2304
        |layer4.0.conv1              512 x 2304
        |layer4.0.conv2              512 x 4608
        |layer4.0.downsample.0       512 x 256
        |layer4.1.conv{1,2} (2)      512 x 4608
        |fc                          1000 x 512           head (guessed: last Linear)
        |
        |9 layers frozen: measured once, no penalty until they train
        |measured: 100 % of the entries of all weight matrices
    """)


def transformer():
    layers = [layer("patch_embed.proj", 192, 768)]
    for i in range(12):
        layers += [layer(f"blocks.{i}.attn.qkv.{part}", 192, 192) for part in "qkv"]
        layers.append(layer(f"blocks.{i}.attn.proj", 192, 192))
        layers.append(layer(f"blocks.{i}.mlp.fc1", 768, 192))
        layers.append(layer(f"blocks.{i}.mlp.fc2", 192, 768))
    layers.append(layer("head", 1000, 192, "declared"))
    reason = "no rule for ViT: neurons={{'{}': 'rows'}} or 'columns', or see register_neurons"
    names = {"cls_token": (1, 1, 192), "pos_embed": (1, 197, 192)}
    skips = [Skip(name, shape, reason.format(name)) for name, shape in names.items()]
    return summary(*layers, skips=skips, coverage=0.9931, model="ViT")


def test_a_transformer():
    assert str(transformer()) == table("""
        |ViT: 74 layers measured, 2 weights not
        |measure: RieszEnergy(s=2.0, half_space=True)
        |head: RieszEnergy(s=2.0)
        |
        |layer                                 neurons x dimension  remarks
        |------------------------------------  -------------------  ---------------
        |patch_embed.proj                      192 x 768
        |blocks.{0..11}.attn.qkv.{q,k,v} (36)  192 x 192
        |blocks.{0..11}.attn.proj (12)         192 x 192
        |blocks.{0..11}.mlp.fc1 (12)           768 x 192
        |blocks.{0..11}.mlp.fc2 (12)           192 x 768
        |head                                  1000 x 192           head (declared)
        |
        |not measured (2):
        |  2 no rule for ViT: e.g. neurons={'cls_token': 'rows'} or 'columns', or see
        |    register_neurons:
        |      cls_token (1 x 192), pos_embed (197 x 192)
        |measured: 99.3 % of the entries of all weight matrices
    """)


def mixture():
    layers = []
    for i in range(8):
        path = f"model.layers.{i}"
        for part, neurons in {"q": 1024, "k": 256, "v": 256, "o": 1024}.items():
            name = f"{path}.self_attn.{part}_proj"
            layers.append(layer(name, neurons, 1024, coefficient="share 0.05", giga_flops=3.0))
        gate = f"{path}.moe.gate"
        layers.append(layer(gate, 8, 1024, measure=KoLeo(), coefficient="share 0.05"))
        for expert in range(8):
            for weight, shape in {
                "w1": (4096, 1024),
                "w2": (1024, 4096),
                "w3": (4096, 1024),
            }.items():
                name = f"{path}.moe.experts.{expert}.{weight}"
                layers.append(layer(name, *shape, coefficient="share 0.05", giga_flops=50.0))
    head = layer("lm_head", 32000, 1024, "declared", measure=Sampled(OF_HEAD), coefficient="1")
    skips = [Skip("model.embed", (32000, 1024), EMBEDDING.format("model.embed"))]
    return summary(*layers, head, skips=skips, coverage=0.97, model="MoE", every_n_steps=4)


def test_a_mixture_of_experts():
    assert str(mixture()) == table("""
        |MoE: 233 layers measured, 1 weight not
        |measure: RieszEnergy(s=2.0, half_space=True)
        |head: RieszEnergy(s=2.0)
        |
        |layer                                     neurons x dim  GFLOP/step  coefficient
        |----------------------------------------  -------------  ----------  -----------
        |model.layers.*.self_attn.{q,o}_proj (16)  1024 x 1024            48  share 0.05
        |model.layers.*.self_attn.{k,v}_proj (16)  256 x 1024             48  share 0.05
        |model.layers.{0..7}.moe.gate (8)          8 x 1024                0  share 0.05
        |    measure: KoLeo(softening=0.01)
        |model.layers.*.m...xperts.*.w{1,3} (128)  4096 x 1024         6,400  share 0.05
        |model.layers.*.moe.experts.*.w2 (64)      1024 x 4096         3,200  share 0.05
        |lm_head                                   32000 x 1024            0  1
        |    head (declared); sampled in 31 blocks of 1032
        |
        |penalty: 9,696 GFLOP/step in total
        |applied every 4 steps of each optimizer
        |not measured (1):
        |  1 an embedding, measured only when asked for: include='model.embed':
        |      model.embed (32000 x 1024)
        |measured: 97.0 % of the entries of all weight matrices
    """)


def test_a_tolerance_takes_less_than_what_is_told():
    regularizer = UniformityRegularizer(tolerance=0.3).attach(nn.Sequential(nn.Linear(64, 64)))
    assert "  less, with gradients kept for several steps: tolerance 0.3" in str(
        regularizer.summary
    )
    shown = str(replace(mixture(), tolerance=0.05)).splitlines()
    at = shown.index("penalty: 9,696 GFLOP/step in total")
    assert shown[at + 2] == "  less, with gradients kept for several steps: tolerance 0.05"


def test_gates_and_notes():
    layers = [layer(f"rnn.weight_ih_l0.{gate}", 128, 64) for gate in "ifgo"]
    layers += [layer(f"rnn.weight_hh_l{i}.{gate}", 128, 128) for i in (0, 1) for gate in "ifgo"]
    note = "read by rows; for its columns: neurons={{'{}': 'columns'}}"
    noted = [f"mix.{i}.{part}" for i in range(3) for part in "ab"]
    layers += [layer(name, 64, 64, note=note.format(name[:5])) for name in noted]
    layers.append(layer("out", 5, 128, "named", note=note.format("out")))
    assert str(summary(*layers)) == table("""
        |Net: 19 layers measured
        |measure: RieszEnergy(s=2.0, half_space=True)
        |head: RieszEnergy(s=2.0)
        |
        |layer                               neurons x dimension  remarks
        |----------------------------------  -------------------  ------------
        |rnn.weight_ih_l0.{i,f,g,o} (4)      128 x 64
        |rnn.weight_hh_l{0,1}.{i,f,g,o} (8)  128 x 128
        |mix.{0..2}.{a,b} (6)                64 x 64
        |out                                 5 x 128              head (named)
        |
        |note: mix.{0..2}.{a,b} (6), out: read by rows; for its columns:
        |    e.g. neurons={'mix.0': 'columns'}
        |measured: 100 % of the entries of all weight matrices
    """)


def test_weights_left_out_by_reason():
    skips = []
    for stage in range(7):
        for block in range(15):
            groups = 96 * (stage + 1)
            reason = f"depthwise: each of its {groups} groups has one neuron"
            skips.append(Skip(f"blocks.{stage}.{block}.conv_dw", (groups, 1, 9), reason))
    skips += [Skip(f"aux.{i}.{part}", (8, 8), "not in include") for i in range(4) for part in "qk"]
    skips += [Skip(f"dec.{i}", (16, 8), f"tied to enc.{i}") for i in range(3)]
    skips.append(Skip("wte", (50257, 768), EMBEDDING.format("wte")))
    skips.append(Skip("wpe", (1024, 768), EMBEDDING.format("wpe")))
    skips.append(Skip("lazy", (), "a lazy layer that has seen no batch: it has no shape yet"))
    assert str(summary(layer("fc", 10, 8), skips=skips, coverage=0.0004)) == table("""
        |Net: 1 layer measured, 119 weights not
        |measure: RieszEnergy(s=2.0, half_space=True)
        |
        |layer  neurons x dimension
        |-----  -------------------
        |fc     10 x 8
        |
        |not measured (119):
        |  105 depthwise: each of its 96 to 672 groups has one neuron:
        |      blocks.{0..6}.{0..14}.conv_dw
        |  8 not in include (each 8 x 8): aux.{0..3}.{q,k}
        |  3 tied to enc.{0..2} (each 16 x 8): dec.{0..2}
        |  2 an embedding, measured only when asked for: e.g. include='wte':
        |      wte (50257 x 768), wpe (1024 x 768)
        |  1 a lazy layer that has seen no batch: it has no shape yet: lazy
        |measured: less than 0.1 % of the entries of all weight matrices
    """)


def test_nothing_is_measured():
    skips = [
        Skip("fc", (64, 32), "excluded by pattern"),
        Skip("kernel", (3, 8, 8), "no rule for Net: see register_neurons"),
    ]
    assert str(summary(skips=skips, coverage=0.0)) == table("""
        |Net: nothing is measured, 2 weights left out
        |not measured (2):
        |  1 excluded by pattern: fc (64 x 32)
        |  1 no rule for Net: see register_neurons: kernel (3 x 8 x 8)
        |measured: none
    """)


def test_a_reason_that_says_what_to_do_is_enough():
    shown = str(summary(skips=[Skip("wte", (9, 4), EMBEDDING.format("wte"))], coverage=0.0))
    assert "include='wte'" in shown
    assert "to measure one" not in shown


def test_a_model_without_a_weight_matrix():
    assert str(summary(coverage=float("nan"))) == table("""
        |Net: nothing is measured, since it has no weight matrix
        |measured: none
    """)


# Rows.


def test_remarks_tell_measures_and_coefficients_that_differ():
    idle = "no force in half space with fewer neurons than dimensions: use half_space=False"
    shown = summary(
        layer("a", 8, 4, coefficient="0.1"),
        layer("b", 8, 4, measure=Polarization(), coefficient=f"0.1, {idle}"),
        layer("c", 40000, 4, measure=Sampled(ENERGY), coefficient="0 (monitor only)"),
        layer("d", 8, 4, measure=Sampled(ENERGY), coefficient="0.1"),  # too few to be sampled
        layer("cls", 8, 4, "declared", coefficient="a label of my own", frozen=True),
        layer("box", 8, 4, "declared", measure=ENERGY, coefficient="0.1"),
        layer("seg", 8, 4, "declared", coefficient="0.1"),
    )
    rows = {row.names[0]: (row.values[-1], row.remarks) for row in _view(shown).rows}
    assert rows == {
        "a": ("0.1", ""),
        "b": ("0.1", f"measure: Polarization(s=2.0); {idle}"),
        "c": ("0 (monitor only)", "sampled in 39 blocks of 1025"),
        "d": ("0.1", ""),
        "cls": ("", "head (declared); frozen; coefficient: a label of my own"),
        "box": ("0.1", "head (declared); measure: RieszEnergy(s=2.0, half_space=True)"),
        "seg": ("0.1", "head (declared)"),
    }
    assert str(shown).splitlines()[1:3] == [
        "measure: RieszEnergy(s=2.0, half_space=True)",
        "head: RieszEnergy(s=2.0)",
    ]
    assert "1 layer frozen: measured once, no penalty until it trains" in str(shown)


def test_a_head_alone():
    lines = str(summary(layer("fc", 8, 4, "named"))).splitlines()
    assert lines[:3] == ["Net: 1 layer measured", "measure: RieszEnergy(s=2.0)", ""]


def test_all_layers_frozen():
    shown = str(summary(layer("a", 8, 4, frozen=True), layer("b", 9, 4, frozen=True)))
    assert "all 2 layers frozen: measured once, no penalty until they train" in shown


def unlike(count, **more):
    """Layers whose names share nothing."""
    words = ["".join(pair) for pair in product("abcdefghijklmnopqrstuvwxyz", repeat=2)]
    return [
        layer(word, 12 + i, 4, frozen=i % 2 > 0, **more) for i, word in enumerate(words[:count])
    ]


def test_many_rows_are_cut():
    start, *middle = unlike(300, giga_flops=0.01)
    heads = [layer("cls", 9, 4, "declared"), layer("box", 4, 4, "declared")]
    shown = str(summary(start, heads[0], *middle, heads[1]))
    lines = shown.splitlines()
    assert "... and 271 more layers, 41 to 311 neurons, 136 of them frozen, 2.7 GFLOP/step" in lines
    rows = lines[lines.index("") + 3 : lines.index("", lines.index("") + 1)]
    assert len(rows) == 30 + 1 + 1
    assert rows[1].startswith("cls ")
    assert rows[-1].startswith("box ")
    assert "150 layers frozen: measured once, no penalty until they train" in lines


def test_forty_rows_are_not_cut():
    shown = _view(summary(*unlike(40)))
    assert (len(shown.rows), shown.hidden) == (40, "")
    shown = _view(summary(*unlike(41)))
    assert shown.hidden == "... and 11 more layers, 42 to 52 neurons, 5 of them frozen"


@pytest.mark.parametrize("length", [1, 15, 40])  # remarks in one line, in several, below the rows
def test_the_cut_is_told_once_whatever_the_remarks(length):
    layers = []
    for one in unlike(60, measure=RieszEnergy(s=1.0)):
        layers.append(replace(one, name=one.name * length, trainable=False))
    usual = [layer(f"usual.{i}", 8, 4) for i in range(100)]  # with the measure of most layers
    lines = str(summary(*layers, *usual)).splitlines()
    assert sum(line.startswith("... and 130 more layers") for line in lines) == 1


def test_many_rows_of_blocks_become_one_with_all_their_shapes():
    layers, wide = [layer("stem", 32, 27)], 64
    for stage in range(4):
        for block in range(stage + 7):
            name = f"dense{stage}.{block}"
            layers.append(layer(f"{name}.conv1", 128, wide, giga_flops=0.5))
            layers.append(layer(f"{name}.conv2", 32, 1152, giga_flops=0.25))
            wide += 32
        layers.append(layer(f"between.{stage}", wide // 2, wide, groups=2, frozen=stage == 3))
        wide //= 2
    layers.append(layer("fc", 1000, wide, "declared"))
    assert str(summary(*layers)) == table("""
        |Net: 74 layers measured
        |measure: RieszEnergy(s=2.0, half_space=True)
        |head: RieszEnergy(s=2.0)
        |
        |layer                neurons x dim                    GFLOP/step  remarks
        |-------------------  -------------------------------  ----------  ----------
        |stem                 32 x 27                                   0
        |dense*.*.conv1 (34)  128 x 64..532                            17
        |dense*.*.conv2 (34)  32 x 1152                               8.5
        |between.{0..2} (3)   2 groups of 144..244 x 288..488           0
        |between.3            2 groups of 282 x 564                     0  frozen
        |fc                   1000 x 282                                0  head
        |                                                                  (declared)
        |
        |penalty: 26 GFLOP/step in total
        |1 layer frozen: measured once, no penalty until it trains
        |measured: 100 % of the entries of all weight matrices
    """)


def test_one_hidden_row_may_be_many_layers():
    repeated = [layer(f"repeated.{i}", 8, 4) for i in range(5)]
    shown = _view(summary(*unlike(40), *repeated))
    assert shown.hidden.startswith("... and 15 more layers, 8 to 51 neurons")


# Patterns of names.


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["a"], "a"),
        (["fc1", "fc2"], "fc{1,2} (2)"),
        (["alpha", "beta"], "alpha, beta"),  # nothing in common
        (["m.q_proj", "m.k_proj"], "m.{q,k}_proj (2)"),
        (["m.lin_query", "m.lin_key"], "m.lin_{query,key} (2)"),
        (["m.a_b", "m.a_b_c"], "m.{a_b,a_b_c} (2)"),
        (["m.0", "m.2", "m.3", "m.4", "m.9"], "m.{0,2..4,9} (5)"),
        ([f"m.{i}" for i in range(0, 40, 2)], "m.{0,2,...,38} (20)"),
        ([f"m.{i * i}" for i in range(9)], "m.* (9)"),
        (["s.0.b.0", "s.0.b.1", "s.1.b.0"], "s.0.b.{0,1} (2), s.1.b.0"),
        ([f"e.{i}.{j}.w" for i in range(3) for j in range(4)], "e.{0..2}.{0..3}.w (12)"),
        (["x.01", "x.1"], "x.{01,1} (2)"),
        ([f"x.{word}" for word in "abcdefghi"], "x.a, x.b, x.c, x.d, x.e, x.f, x.g, x.h, x.i"),
        (["9" * 5000 + ".a", "8" * 5000 + ".a"], "9" * 5000 + ".a, " + "8" * 5000 + ".a"),
        (["same", "same"], "same, same"),
        ([], ""),
    ],
)
def test_names_fold(names, pattern):
    assert fold_names(names) == pattern


PARTS = st.sampled_from(["0", "1", "2", "10", "q", "k_proj", "v_proj", "conv1", "conv2", "x"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)


@given(st.lists(NAMES, max_size=40, unique=True), st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_a_pattern_stands_for_its_names_and_no_others(names, kinds):
    kind = [i % kinds for i in range(len(names))]
    patterns = _fold(names, kind)
    for pattern in patterns:
        members = pattern.members
        assert sorted(map("".join, product(*pattern.pieces))) == sorted(names[i] for i in members)
        assert len({kind[i] for i in members}) == 1
    firsts = [pattern.members[0] for pattern in patterns]
    assert firsts == sorted(firsts)
    for loosely in (False, True):
        taken = [i for one in _fold(names, kind, loosely=loosely) for i in one.members]
        assert sorted(taken) == list(range(len(names)))


# Any name, any width.

WORDS = st.sampled_from(["界", "a\n", "\u0301", "x" * 100, "0", ".", " ", "\x1b", "é", "\u3000"])
TEXTS = NAMES | st.text(max_size=5) | st.lists(WORDS, max_size=8).map("".join)
SIZES = st.integers(1, 10**5)
LAYERS = st.builds(
    LayerSummary,
    name=TEXTS,
    shape=st.tuples(st.integers(1, 4096), SIZES, SIZES),
    is_head=st.booleans(),
    trainable=st.booleans(),
    measure=st.sampled_from([ENERGY, OF_HEAD, Sampled(ENERGY), KoLeo()]),
    head_reason=st.sampled_from(["", "declared", "last before the loss", "guessed: last Linear"]),
    coefficient=st.sampled_from(["", "0.1", "0.1, no force", "0 (monitor only)"]) | TEXTS,
    giga_flops=st.sampled_from([0.0, 1e-9, 0.5, 123456.0]),
    note=st.just("") | TEXTS,
)
SKIPS = st.builds(Skip, name=TEXTS, shape=st.lists(SIZES, max_size=4).map(tuple), reason=TEXTS)
SUMMARIES = st.builds(
    Summary,
    model=TEXTS,
    layers=st.lists(LAYERS, max_size=12).map(tuple),
    skipped=st.lists(SKIPS, max_size=6).map(tuple),
    coverage=st.floats(0.0, 1.0) | st.just(float("nan")),
    every_n_steps=st.integers(1, 1000),
)


@given(SUMMARIES)
@settings(max_examples=100, deadline=None)
def test_any_summary_fits_and_is_printable(shown):
    text = str(shown)
    for line in text.split("\n"):
        assert columns(line) <= 80
        assert line.isprintable()
    view = _view(shown)
    assert text.split("\n")[-1].startswith("measured: ")
    in_rows = sum(int(row.count.strip(" ()").replace(",", "") or 1) for row in view.rows)
    hidden = int(view.hidden.split()[2].replace(",", "")) if view.hidden else 0
    assert in_rows + hidden == len(shown.layers)
    heads = sum(one.is_head for one in shown.layers)
    if not view.hidden:
        assert heads == sum(
            int(row.count.strip(" ()") or 1) for row in view.rows if row.remarks.startswith("head")
        )
    check_html(shown)


def test_long_names_keep_both_ends_and_numbers_are_never_cut():
    names = [f"start_{letter * 300}_end" for letter in "ab"]
    skips = [Skip(f"left_{'x' * 300}_out", (4, 4), "excluded by pattern")]
    shown = summary(
        layer(names[0], 1000, 10**6, groups=4096, giga_flops=123456.0, coefficient="0.1"),
        layer(names[1], 1000, 10**6, "named", giga_flops=0.01, coefficient="0 (monitor only)"),
        skips=skips,
        model="M" * 300,
    )
    lines = str(shown).splitlines()
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if "4096 groups" in line)
    assert row.startswith("start_a")
    assert "a_end  4096 groups of 1000 x 1000000     123,456  0.1" in row
    assert any("left_xxx" in line and "xxx_out (4 x 4)" in line for line in lines)


def test_wide_characters_and_line_breaks_keep_the_columns():
    shown = str(
        summary(layer("编码器.卷积", 64, 27), layer("a\nb\tc", 32, 27), layer("é" * 9, 8, 27))
    )
    rows = [line for line in shown.splitlines() if line.endswith(" x 27")]
    assert [row.split("  ")[0] for row in rows] == ["编码器.卷积", "a\\nb\\tc", "é" * 9]
    assert len({columns(row[: row.index(" x 27")].rstrip("0123456789")) for row in rows}) == 1


# HTML.


class Tags(HTMLParser):
    """Checks that tags are closed in order, and collects them and the text."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], set(), []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check_html(shown):
    tags = Tags()
    tags.feed(shown._repr_html_())
    tags.close()
    assert tags.open == []
    assert tags.seen <= {"div", "table", "thead", "tbody", "tr", "th", "td"}
    return tags.text


def test_html_has_the_same_content_and_is_escaped():
    bad = "<script>alert('&')</script>"
    skips = [Skip(bad, (4, 4), f"no rule for {bad}")]
    shown = summary(
        layer(bad, 8, 4, note=bad, coefficient=bad),
        layer("fc", 8, 4, "declared", coefficient="0.1"),
        skips=skips,
        model=bad,
        coverage=0.5,
    )
    text = check_html(shown)
    assert bad in text
    assert "<script" not in shown._repr_html_()
    assert "color" not in shown._repr_html_()
    joined = "\n".join(text)
    for word in ("measure: RieszEnergy", "head (declared)", "no rule for", "measured: 50.0 %"):
        assert word in joined
    for model in (resnet(), transformer(), mixture(), summary(*unlike(300))):
        text = "\n".join(check_html(model))
        for row in _view(model).rows:
            assert row.names[0] + row.count in text
        assert _view(model).hidden in text


# Cost, and layers of a fit.


def calls_of(function, *args):
    """How many Python functions a call enters."""
    count = 0

    def counting(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(counting)
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    return count


def many(number):
    names = [f"stages.{i % 10}.blocks.{i // 10}.conv{i % 7}.w" for i in range(number)]
    layers = [layer(name, 64 + i % 3, 64) for i, name in enumerate(names)]
    skips = [Skip(name, (64, 64), EMBEDDING.format(name)) for name in names]
    return summary(*layers, skips=skips)


def test_the_text_of_thousands_of_layers_takes_work_in_proportion():
    assert calls_of(str, many(4000)) < 3 * calls_of(str, many(2000))


def test_a_model_of_300_layers_takes_work_in_proportion():
    """About 0.03 s on one core, with some 400 calls a layer; a second is the limit."""

    def deep(number):
        return nn.Sequential(*[nn.Linear(16, 16) for _ in range(number)])

    summarize(deep(2))  # what is done once
    calls = calls_of(summarize, deep(300))
    assert calls < 300 * 1000
    assert calls < 2.2 * calls_of(summarize, deep(150))


def test_layers_of_a_fit_in_words():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(3, 2))
    model[1].requires_grad_(False)
    coefficient = {"0": 0.1, "1": 0.1, "2": 0, "3": LinearSchedule(1.0)}
    layers = UniformityRegularizer(coefficient=coefficient).attach(model).layers
    assert [coefficient_text(one) for one in layers] == [
        "0.1",
        "0.1",
        "0 (monitor only)",
        "schedule",
    ]
    costs = [giga_flops(one) for one in layers]
    assert [cost > 0 for cost in costs] == [True, False, False, True]
    assert costs[0] == layers[0].measure.grad_flops(4, 8) / 1e9
    idle = UniformityRegularizer(Polarization(half_space=True), coefficient=1.0).attach(model)
    assert coefficient_text(idle.layers[0]).startswith("1, no force in half space")

"""A report's page: nothing loaded, nothing run, every name escaped, and curves that are those of random vectors."""

import base64
import html
import math
import re
import struct
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from lightning_hsu._core import expected_angles
from lightning_hsu._neurons.candidates import Skip
from lightning_hsu.report import compare, report
from lightning_hsu.report.charts import (
    COSINE_STEPS,
    angle_chart,
    heat_map_png,
    random_singular_values,
    ratio_chart,
    sampled,
    singular_chart,
)
from lightning_hsu.report.svg import Axis, short

VOID = {"meta", "img", "wbr", "br", "line", "circle", "rect", "polyline", "path"}


class Tags(HTMLParser):
    """Every element closed in its turn; attributes and text kept."""

    def __init__(self, page):
        super().__init__()
        self.open = []
        self.elements = []
        self.text = []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def read(page):
    """The page, once it is seen to be well-formed, alone and free of NaN."""
    tags = Tags(page)
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        root = ElementTree.fromstring(svg)
        assert root.get("aria-label")
        assert root.find("title").text
        places = [
            value
            for mark in root.iter()
            for key, value in mark.attrib.items()
            if key not in {"aria-label", "class"}
        ]
        assert not any("nan" in value or "inf" in value for value in places)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in tags.elements}
    for _, attributes in tags.elements:
        assert not any(key.startswith("on") for key in attributes)
        for key in {"src", "href"} & attributes.keys():
            assert attributes[key].startswith(("#layer-", "data:image/png;base64,"))
    assert "http" not in page
    assert "url(" not in page
    assert "@import" not in page
    ids = [attributes["id"] for _, attributes in tags.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"] for link in tags.all("a")} <= {f"#{one}" for one in ids}
    return tags


def words(tags):
    return " ".join("".join(tags.text).split())


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.Conv2d(24, 12, 3, groups=2), nn.Linear(48, 150), nn.Linear(150, 2)
    )
    with torch.no_grad():
        model[2].weight[7].copy_(2 * model[2].weight[3])
        model[2].weight[9].copy_(-model[2].weight[4])
        model[2].weight[[11, 140]] = 0.0
        model[1].weight[8] = 0.0
    return model


@pytest.fixture(scope="module")
def found():
    return report(network())


def test_page_is_one_well_formed_file_that_loads_nothing(found):
    tags = read(found.to_html())
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in tags.all(
        "meta"
    )
    assert len([one for one in tags.all("details") if one.get("class") == "layer"]) == 4
    assert len(tags.all("img")) == 4
    assert all("alt" in image for image in tags.all("img"))


def test_page_states_the_numbers(found):
    said = words(read(found.to_html()))
    assert "Sequential 4 layers, 188 neurons, measured by RieszEnergy" in said
    assert (
        "2 near-duplicate pairs (cosine, whatever its sign, of 0.95 or more); 1 of them point opposite ways"
        in said
    )
    assert "3 and 7" in said
    assert "4 and 9180.00° opposite" in said
    assert "2 dead neurons, zero or next to nothing: 11, 140." in said
    assert "1 dead neuron, zero or next to nothing: 2 of group 1." in said
    above = sum(one.finding.split(", ")[0].endswith("x random") for one in found.layers)
    assert f"{above or 'None'} of 4 layers {'is' if above < 2 else 'are'} above random." in said
    assert "a fact, not advice" in said


def test_the_worst_layer_is_unfolded(found):
    ratios = [0.9, 1.1, math.nan, 1.05]
    layers = [
        replace(one, uniformity=replace(one.uniformity, ratio=r), finding=f"{r}x random")
        for one, r in zip(found.layers, ratios, strict=True)
    ]
    tags = read(replace(found, layers=tuple(layers)).to_html())
    assert ["open" in one for one in tags.all("details") if one.get("class") == "layer"] == [
        False,
        True,
        False,
        False,
    ]
    assert "2 of 3 layers are above random. 1 layer has no ratio: layer 2." in words(tags)


def test_names_are_escaped(found):
    hostile = """<script>alert("1")</script><b onclick='x'>&amp;</p>"""
    layers = [
        replace(one, uniformity=replace(one.uniformity, name=hostile), finding=hostile)
        for one in found.layers
    ]
    skips = (Skip(hostile, (3, 4), hostile),)
    page = replace(found, source=hostile, layers=tuple(layers), skips=skips).to_html()
    tags = read(page)
    assert html.escape(hostile) in page
    assert hostile not in page
    assert "b" in {tag for tag, _ in tags.elements}
    assert hostile.split("</")[0] in words(tags)


def test_skipped_weights_are_listed_with_the_reason(found):
    page = replace(found, skips=(Skip("bias.of.this", (3, 4), "it has one dimension"),)).to_html()
    assert "bias.of.this3 x 4it has one dimension" in words(read(page))
    assert "Left out" not in replace(found, skips=()).to_html()


def test_table_and_page_show_the_same_shape_of_a_weight(found):
    skips = (
        Skip("single", (1, 1000, 64), "it is left out"),
        Skip("row", (1, 64), "it is a row"),
        Skip("groups", (3, 4, 5), "it has groups"),
    )
    other = replace(found, skips=skips)
    page = words(read(other.to_html()))
    table = str(other)
    for name, shape in (("single", "1000 x 64"), ("row", "1 x 64"), ("groups", "3 x 4 x 5")):
        assert f"{name}{shape}it" in page
        assert f"{name} ({shape})" in table


@pytest.mark.parametrize("dimension", [2, 3, 10, 500, 100_000])
def test_expected_angles_are_as_many_as_the_pairs(dimension):
    counts = expected_angles(1234.0, dimension, 90).tolist()
    assert len(counts) == 90
    assert sum(counts) == pytest.approx(1234.0)
    assert counts == pytest.approx(counts[::-1])


def test_expected_angles_are_those_of_random_vectors():
    assert expected_angles(180.0, 2, 90).tolist() == pytest.approx([2.0] * 90)
    exact = [
        50.0 * (math.cos(math.radians(2 * i)) - math.cos(math.radians(2 * i + 2)))
        for i in range(90)
    ]
    assert expected_angles(100.0, 3, 90).tolist() == pytest.approx(exact, rel=1e-3)
    x = nn.functional.normalize(
        torch.randn(1500, 6, generator=torch.Generator().manual_seed(1)), dim=1
    )
    angles = torch.rad2deg((x @ x.T).clamp(-1, 1).acos())[torch.ones(1500, 1500).triu(1).bool()]
    seen = torch.histc(angles, 90, 0, 180)
    assert (seen - expected_angles(len(angles), 6, 90)).abs().max() < 0.03 * seen.max()


@pytest.mark.parametrize(("vectors", "dimension"), [(300, 600), (600, 300), (400, 400)])
def test_random_singular_values_are_those_of_random_vectors(vectors, dimension):
    x = torch.randn(
        vectors, dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    values = torch.linalg.svdvals(nn.functional.normalize(x, dim=1))
    chances = [1.0 - (i + 0.5) / len(values) for i in range(len(values))]
    law = torch.tensor(random_singular_values(vectors, dimension, chances), dtype=torch.float64)
    assert (law - values).abs().max() < 0.04
    assert law.square().mean() == pytest.approx(
        vectors / len(values), rel=0.01
    )  # the trace of the Gram matrix


def decoded(png):
    """Width, height, palette with alpha, and the indices of the pixels."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0] == zlib.crc32(
            kind + body
        )
        chunks[kind], at = body, at + 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colour, list(chunks)[-1]) == (8, 3, b"IEND")
    rows = torch.tensor(list(zlib.decompress(chunks[b"IDAT"]))).view(height, width + 1)
    assert not rows[:, 0].any()
    palette = torch.tensor(list(chunks[b"PLTE"])).view(-1, 3)
    return palette, torch.tensor(list(chunks[b"tRNS"])), rows[:, 1:]


def test_heat_map_shows_the_cosines(found):
    layer = found.layers[2]
    images = read(found.to_html()).all("img")
    palette, alpha, index = decoded(base64.b64decode(images[2]["src"].split(",")[1]))
    assert index.shape == layer.cosines.shape == (128, 128)
    red, _, blue = palette[index].unbind(-1)
    sign = torch.where(red > blue, 1.0, -1.0)
    assert (
        sign * alpha[index] / 255 - layer.cosines
    ).abs().max() <= 0.5 / COSINE_STEPS + 0.5 / 255 + 1e-5


def test_heat_map_tells_all_steps_apart():
    cosines = torch.linspace(-1, 1, 2 * COSINE_STEPS + 1).expand(3, -1)
    palette, alpha, index = decoded(heat_map_png(cosines))
    assert index[0].tolist() == list(range(2 * COSINE_STEPS + 1))
    assert len({(*palette[i].tolist(), int(alpha[i])) for i in index[0]}) == 2 * COSINE_STEPS + 1
    assert alpha[COSINE_STEPS] == 0


def strange(found, **changes):
    one = found.layers[0]
    return replace(
        one, uniformity=replace(one.uniformity, **changes.pop("uniformity", {})), **changes
    )


@pytest.mark.parametrize(
    "ratios",
    [
        [math.nan],
        [math.inf],
        [1.0],
        [0.0],
        [0.0, 50.0],
        [-3.0, 2.0],
        [1e-9, 1e9],
        [math.nan, math.inf, 2.0],
        [1.001] * 200,
    ],
    ids=str,
)
def test_ratios_of_any_size_are_drawn(found, ratios):
    layers = tuple(
        strange(found, uniformity={"ratio": ratio, "score": math.nan, "min_angle": math.nan})
        for ratio in ratios
    )
    tags = read(replace(found, layers=layers).to_html())
    known = [ratio for ratio in ratios if not math.isnan(ratio)]
    assert len(
        [one for one in tags.all("circle") if "cx" in one and one["cx"].endswith("%")]
    ) == len(known)
    assert ("No layer can be judged." in words(tags)) == (not known)
    assert ("ratios" in [one.get("class") for one in tags.all("div")]) == bool(known)


def test_places_of_ratios_are_in_their_order(found):
    layers = [
        strange(found, uniformity={"ratio": ratio}) for ratio in (0.7, 1.0, 2.0, 40.0, math.inf)
    ]
    heights = [float(dot["cy"]) for dot in Tags(ratio_chart(layers)).all("circle")]
    assert heights == sorted(heights, reverse=True)
    assert len(set(heights)) == 5
    assert 'class="random"' in ratio_chart(layers)
    reference = re.search(
        r'y1="([\d.]+)" x2="100%" y2="[\d.]+" class="random"', ratio_chart(layers)
    )
    assert float(reference[1]) == heights[1]


def test_layers_without_pairs_or_live_neurons_say_so(found):
    dead = strange(
        found,
        uniformity={"ratio": math.nan, "score": math.nan, "min_angle": math.nan, "dead": 24},
        angles=(0,) * 90,
        singular_values=(),
        live=0.0,
        shown=(),
        cosines=torch.zeros(0, 0),
        dead=24,
        dead_rows=tuple(range(24)),
    )
    large = strange(found, singular_values=())
    alone = strange(
        found,
        angles=(0,) * 90,
        singular_values=(1.0,),
        live=1.0,
        shown=(3,),
        cosines=torch.ones(1, 1),
    )
    said = words(read(replace(found, layers=(dead, large, alone)).to_html()))
    assert "No pairs: no group has two live neurons." in said
    assert "Not computed: no neuron is live." in said
    assert "Not computed: the layer is too large." in said
    assert said.count("Fewer than two live neurons to compare.") == 2
    assert "24 dead neurons, zero or next to nothing: 0, 1," in said
    assert ", 19 and 4 more." in said


@pytest.mark.parametrize("shape", [(2, 3), (5, 2), (3, 1), (2, 700), (600, 2)])
def test_small_and_thin_layers_have_a_page(shape):
    torch.manual_seed(0)
    read(report({"one.weight": torch.randn(shape), "two.weight": torch.zeros(4, 8)}).to_html())


def test_report_of_nothing_has_a_page(found):
    assert "No layer can be judged." in words(read(replace(found, layers=()).to_html()))


def test_only_the_first_pairs_are_listed():
    torch.manual_seed(0)
    found = report(
        {
            "one.weight": torch.randn(1, 16).expand(9, 16) + 0.01 * torch.randn(9, 16),
            "two.weight": torch.randn(5, 9),
        }
    )
    tags = read(found.to_html())
    assert found.layers[0].similar == 36
    assert len(tags.all("li")) == 20 + 1  # and the group that they connect
    assert "and 16 more" in words(tags)


def test_colours_on_the_chart_are_those_of_the_words():
    torch.manual_seed(0)
    layers = {
        "a.weight": torch.randn(40, 64),
        "b.weight": torch.eye(16),
        "c.weight": torch.randn(40, 64) + 1.0,
    }
    made = (torch.randn(10, 8) for _ in range(200))
    layers["d.weight"] = next(
        x
        for x in made
        if (one := report({"weight": x}, head=None).layers[0]).ratio > 1.1 and one.as_random
    )
    chart = ratio_chart(report(layers, head=None).layers)
    assert re.findall(r'<circle[^>]* class="(\w+)"', chart) == ["even", "below", "above", "even"]


def test_names_stand_apart_on_the_chart():
    torch.manual_seed(0)
    layers = {f"{name}.weight": torch.randn(20, 8) for name in "abcdefghij"}
    for name, close in (("a", 3.0), ("b", 2.9), ("i", 2.8)):
        layers[f"{name}.weight"] = layers["c.weight"] + close
    chart = ratio_chart(report(layers, head=None).layers)
    names = re.findall(r'class="(halo[ a-z]*)">([a-z]) [0-9.,]+<', chart)
    assert names == [
        ("halo", "a"),
        ("halo minor", "i"),
    ]  # b is too close to a; on a phone there is room for a only


def test_values_above_the_edge_are_counted(found):
    layer = strange(found, singular_values=(9.0, 8.0, *[0.1] * 22))
    said = words(read(replace(found, layers=(layer,)).to_html()))
    assert (
        f"2 of 24 are above the upper edge {layer.edges[1]:.2f} of random vectors; the largest is 9.00."
        in said
    )


def test_charts_have_a_bar_for_every_angle_and_few_points(found):
    layer = strange(found, singular_values=tuple(torch.linspace(2, 0, 3000).tolist()))
    tops = [
        float(y) for y in re.findall(r"V([\d.]+)H", Tags(angle_chart(layer)).all("path")[0]["d"])
    ]
    assert len(tops) == 90
    assert [tops.index(min(tops)), max(tops)] == [layer.angles.index(max(layer.angles)), tops[0]]
    curves = [line["points"].split() for line in Tags(singular_chart(layer)).all("polyline")]
    assert [len(points) for points in curves] == [200, 200]
    assert sampled(3000, 200)[0] == 0
    assert sampled(3000, 200)[-1] == 2999
    assert sampled(3, 200) == [0, 1, 2]


def test_a_page_is_small():
    torch.manual_seed(0)
    layer = {
        f"{i}.weight": torch.randn(300, 9) for i in range(3)
    }  # cosines as various as they come
    assert len(report(layer).to_html()) < 3 * 20_000 + 10_000


@pytest.mark.parametrize(
    "axis",
    [
        Axis(0.4, 1.7, 200, 0),
        Axis(0.9, 64, 200, 0, "log"),
        Axis(0.9, 1e9, 200, 0, "log"),
        Axis(0, 4e5, 200, 0, "log1p"),
    ],
    ids=lambda axis: axis.kind,
)
def test_ticks_are_round_few_and_on_the_axis(axis):
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 7
    assert all(axis.low <= tick <= axis.high for tick in ticks)
    assert ticks == sorted(set(ticks))
    assert all(tick == pytest.approx(float(f"{tick:.1e}")) for tick in ticks)
    assert (axis(axis.low), axis(axis.high)) == (200.0, 0.0)


def test_names_in_a_chart_keep_their_numbers():
    torch.manual_seed(0)
    state = {
        f"model.encoder.layers.{i}.self_attn.q_proj.weight": torch.randn(20, 8) for i in range(3)
    }
    state["model.encoder.layers.1.self_attn.q_proj.weight"] += 2.0
    page = report(state, head=None).to_html()
    (name,) = re.findall(r">([^<>]*q_proj) [0-9.]+</text>", page)
    assert name == "mod.enc.lay.1.sel.q_proj"


def test_groups_stand_in_rows_of_their_own():
    torch.manual_seed(0)
    x = torch.randn(60, 8)
    x[:50] = x[0]
    page = report({"a.weight": x}, head=None).to_html()
    (found,) = re.findall(r"<ul class=groups>(.*?)</ul>", page)
    assert found.count("<li>") == 1
    assert "39 and 10 more</span><span>cosine to the first from 1.0000</span>" in found
    style = page[: page.index("</style>")]
    (rule,) = re.findall(r"\.groups li\{(.*?)\}", style[: style.index("@media(max")])
    assert "white-space" not in rule  # so that 40 indices take several lines
    assert "gap" in rule


def test_labels_are_short():
    assert [short(x) for x in (0.0, 0.5, 1500.0, 20_000.0, 3e6)] == [
        "0",
        "0.5",
        "1500",
        "20k",
        "3M",
    ]


def test_layers_within_what_random_ones_have_are_not_counted_as_above(found):
    layers = [
        strange(found, uniformity={"ratio": ratio}, finding=said)
        for ratio, said in ((1.2, "as random"), (1.3, "1.30x"))
    ]
    said = words(read(replace(found, layers=tuple(layers)).to_html()))
    assert "1 of 2 layers is above random." in said
    assert "as random within 1 % of that, or where 998 of 1,000 random layers" in said


def test_a_comparison_is_a_page_of_the_same_kind(found):
    other = dict(network(1).state_dict()) | {"more.weight": torch.randn(4, 4)}
    first = dict(network().state_dict()) | {
        "old.weight": torch.randn(4, 5),
        "int.weight": torch.ones(3, 3, dtype=torch.int8),
    }
    both = compare(first, other)
    page = both.to_html()
    tags = read(page)
    said = words(tags)
    assert "4 layers in both" in said
    assert "Only before1" not in said
    assert "Only before 1 layer: old" in said
    assert "Only after 1 layer: more" in said
    assert "Left out before weightshapereason int3 x 3its weights are torch.int8" in said
    assert "a ring before, a dot after" in said
    rings = [one for one in tags.all("circle") if one["class"].endswith(" ring")]
    assert len(rings) == 4
    assert len(tags.all("circle")) == 8
    for one in both.layers:
        before, after = f"{one.before.ratio:.3f}", f"{one.after.ratio:.3f}"
        assert (after if before == after else f"{before} → {after}") in said
        assert f"{one.moved:.1f}°" in said
    assert len(page) < 30_000
    assert "color-scheme:light dark" in page


def guessed_head(name):
    """A network whose head is guessed: its layers and their weights."""
    return {"stem.weight": torch.randn(8, 4), f"{name}.weight": torch.randn(3, 8)}


def test_notes_and_skips_of_both_are_told_once():
    torch.manual_seed(0)
    packed = {"int.weight": torch.ones(3, 3, dtype=torch.int8)}
    first, second = guessed_head("fc") | packed, guessed_head("fc") | packed
    both = compare(first, second)
    page, table = words(read(both.to_html())), " ".join(str(both).split())
    assert page.count("note: head: fc (guessed") == table.count("note: head: fc (guessed") == 1
    assert table.count("before and after, not measured (1): 1 its weights are torch.int8") == 1
    assert page.count("its weights are torch.int8") == 1
    for text in (page, table):
        assert "before, note" not in text
        assert "after, note" not in text
        assert "Left out before" not in text
    other = compare(first, guessed_head("classifier"))
    page, table = words(read(other.to_html())), " ".join(str(other).split())
    for text in (page, table):
        assert "before, note: head: fc (guessed" in text
        assert "after, note: head: classifier (guessed" in text
    assert "before, not measured (1): 1 its weights are torch.int8" in table
    assert "Left out before" in page
    assert "Left out after" not in page


def test_names_may_be_broken_but_not_numbers():
    torch.manual_seed(0)
    first = {f"net.part_{letter}.weight": torch.randn(8, 6) for letter in "abc"}
    second = {f"net.part_{letter}.weight": torch.randn(8, 6) + 0.3 for letter in "abc"}
    first["net.part_a.weight"][0] = second["net.part_a.weight"][0] = math.nan
    for page in (compare(first, second).to_html(), report(first).to_html()):
        assert "net.<wbr>part_<wbr>a" in page
        assert re.findall(r"[0-9.,]*[0-9][.,]<wbr>\S*", page) == []
        assert ".<wbr>." not in page
    assert re.search(
        r"Drift: mean energy ratio of [23] layers [0-9.]+ &rarr; ", compare(first, second).to_html()
    )


def test_a_comparison_escapes_names(found):
    hostile = "<script>alert(1)</script>"
    both = compare(network(), network())
    layers = []
    for one in both.layers:
        after = replace(one.after, uniformity=replace(one.after.uniformity, name=hostile))
        layers.append(replace(one, after=after))
    page = replace(both, layers=tuple(layers), only_before=(hostile,)).to_html()
    read(page)
    assert hostile not in page
    assert hostile not in replace(both, only_after=(hostile,))._repr_html_()


def test_a_comparison_without_ratios_has_no_chart():
    zeros = {"a.weight": torch.zeros(4, 8)}
    page = compare(zeros, zeros).to_html()
    assert "no layer can be judged" in words(read(page))
    assert "<svg" not in page
    assert "moved most" not in page


@pytest.mark.parametrize("of_two", [False, True])
def test_a_narrow_screen_says_which_columns_are_left_out(found, of_two):
    page = compare(network(), network()).to_html() if of_two else found.to_html()
    tags = Tags(page)
    headings = {}
    cells = re.search(r"<thead>(.*?)</thead>", page, re.DOTALL)[1]
    for css, heading in re.findall(r'<th scope="col" class="(.*?)">(.*?)</th>', cells):
        headings[heading] = "minor" in css.split()
    assert True in headings.values()
    assert False in headings.values()
    minor = ", ".join(heading for heading, is_minor in headings.items() if is_minor)
    (told,) = [text for text in tags.text if "left out on this narrow screen" in text]
    assert told == f"Some columns are left out on this narrow screen: {minor}."
    assert f'<p class="soft narrow">{told}</p>' in page
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    shown = [kind for _, kind in re.findall(r"(\.narrow)\{display:(\w+)\}", style)]
    hidden = [kind for _, kind in re.findall(r"(\.minor)\{display:([\w-]+)\}", style)]
    assert shown == ["none", "block", "none"]  # usually, on a narrow screen, in print
    assert hidden == ["none", "table-cell"]  # on a narrow screen, in print
    narrow = re.search(r"@media\(max-width:760px\)\{(.*?)\}\}", style, re.DOTALL)[1] + "}"
    assert ".minor{display:none}" in narrow
    assert ".narrow{display:block}" in narrow

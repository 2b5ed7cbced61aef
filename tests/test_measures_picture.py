"""The picture of the measures: the arrows in it do what its words say."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from lightning_hsu import measures
from lightning_hsu.measures import (
    Covering,
    MinimalAngle,
    Orthogonality,
    Polarization,
    ResultantLength,
    RieszEnergy,
    Separation,
)

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
PAIR, OPPOSITE = [0, 1], [6, 7]

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::PendingDeprecationWarning"
)


@pytest.fixture
def picture(monkeypatch):
    monkeypatch.syspath_prepend(str(NOTEBOOKS))
    import measures_picture

    return measures_picture


@pytest.fixture
def x(picture):
    return picture.on_circle(picture.DEGREES)


def turns(picture, measure, x):
    """By how much each point steps counterclockwise."""
    step = picture.steps(measure, x)
    return x[:, 0] * step[:, 1] - x[:, 1] * step[:, 0]


def pushed(picture, measure, x):
    return picture.arrows(picture.steps(measure, x)).norm(dim=1).nonzero().flatten().tolist()


def test_the_script_writes_a_small_png(picture, tmp_path):
    path = tmp_path / "new" / "measures.png"
    picture.main(["--out", str(path)])
    assert 50_000 < path.stat().st_size < 200_000
    image = Image.open(path).convert("RGB")
    assert image.width == 1800
    seen = torch.tensor([color for _, color in image.getcolors()])
    for color in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # arrows and stars keep their colours
        assert (seen - torch.tensor(color)).abs().amax(1).min() < 16


def test_titles_are_the_code_of_their_measures(picture):
    for panel in picture.PANELS:
        assert eval(panel.title, vars(measures)) == panel.measure
        assert len(panel.text) <= 45


def test_arrows_are_tangent_downhill_and_to_scale(picture, x):
    for panel in picture.PANELS:
        step = picture.steps(panel.measure, x)
        arrow = picture.arrows(step)
        torch.testing.assert_close(
            (arrow * x).sum(1), torch.zeros(8, dtype=x.dtype), rtol=0, atol=1e-9
        )
        torch.testing.assert_close(
            arrow.norm(dim=1).max(), torch.tensor(picture.LONGEST, dtype=x.dtype)
        )
        torch.testing.assert_close(
            arrow.norm(dim=1) ** 2 / picture.LONGEST**2, step.norm(dim=1) / step.norm(dim=1).max()
        )
        nearby = x + 1e-4 * step / step.norm()
        assert panel.measure.penalty(nearby) < panel.measure.penalty(x)


def test_separation_parts_the_near_duplicates_alone(picture, x):
    assert pushed(picture, Separation(), x) == PAIR
    clockwise, counterclockwise = turns(picture, Separation(), x)[PAIR]
    assert clockwise < 0 < counterclockwise


def test_in_half_space_it_parts_the_almost_opposite_pair_alone(picture, x):
    assert pushed(picture, Separation(half_space=True), x) == OPPOSITE
    assert _towards_opposite(turns(picture, Separation(half_space=True), x)) < 0


def test_mirror_images_push_the_almost_opposite_pair(picture, x):
    near = RieszEnergy(s=2, half_space=True)
    assert _towards_opposite(turns(picture, near, x)) < 0
    assert (
        picture.arrows(picture.steps(near, x))[OPPOSITE].norm(dim=1).min() > 0.9 * picture.LONGEST
    )
    full = RieszEnergy(s=2)
    assert _towards_opposite(turns(picture, full, x)) > 0
    assert (
        picture.arrows(picture.steps(full, x))[OPPOSITE].norm(dim=1).max() < 0.1 * picture.LONGEST
    )


def _towards_opposite(turn):
    """The angle from the first of the pair to the second is below 180 degrees: growing, it nears them."""
    return float(turn[OPPOSITE[1]] - turn[OPPOSITE[0]])


def test_resultant_length_moves_all_against_the_mean(picture, x):
    step = picture.steps(ResultantLength(), x)
    assert ((step @ x.mean(0)) < 0).all()
    torch.testing.assert_close(picture.guide(ResultantLength(), x)[1], x.mean(0) / x.mean(0).norm())


def test_covering_moves_the_edges_of_the_largest_gap(picture, x):
    assert pushed(picture, Covering(), x) == [
        5,
        7,
    ]  # the lone point, and one of the almost opposite
    (star,) = picture.loneliest(Covering(), x)
    torch.testing.assert_close(star, picture.on_circle(((190.0 + 298.0) / 2,))[0])
    assert ((picture.steps(Covering(), x) @ star)[[5, 7]] > 0).all()


def test_polarization_moves_all_towards_its_star(picture, x):
    (star,) = picture.loneliest(Polarization(), x)
    assert (picture.steps(Polarization(), x) @ star > 0).all()


def test_minimal_angle_leaves_a_point_between_equal_pushes(picture, x):
    assert pushed(picture, MinimalAngle(), x) == [0, 1, 2, 3, 4, 5, 7]


def test_orthogonality_moves_all_away_from_the_main_axis(picture, x):
    axis = picture.guide(Orthogonality("so"), x)[1]
    assert ((x @ axis) * (picture.steps(Orthogonality("so"), x) @ axis) < 0).all()

"""The published recipes by name."""

from __future__ import annotations

from dataclasses import replace

from lightning_hsu._checks import check_number
from lightning_hsu._meant import check_preset
from lightning_hsu._neurons.how import How
from lightning_hsu.callback import HypersphericalUniformity
from lightning_hsu.presets.base import OfficialMeasure
from lightning_hsu.presets.comhe import (
    OfficialAdversarialCoMHE,
    OfficialAngleCoMHE,
    OfficialRandomCoMHE,
    TrainedCoMHE,
)
from lightning_hsu.presets.pairs import OfficialMGD, OfficialMHE, OfficialMHS, Power
from lightning_hsu.presets.poles import OfficialMHC, OfficialMHP, OfficialRMHP, PoledMeasure

Recipe = tuple[OfficialMeasure, tuple[float, float]]
"""A measure, and the coefficients of hidden layers and of the head."""

# Coefficients by the power of the energy.
_ENERGIES: dict[Power, tuple[float, float]] = {
    "0": (1.0, 10.0),
    "1": (1.0, 10.0),
    "2": (1.0, 10.0),
    "a0": (1.0, 10.0),
    "a1": (0.1, 1.0),
    "a2": (0.1, 1.0),
}


def _recipes() -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}
    for power, coefficients in _ENERGIES.items():
        found[f"mhe_{power}"] = OfficialMHE(power, half_space=False), coefficients
    for power, coefficients in _ENERGIES.items():
        found[f"half_mhe_{power}"] = OfficialMHE(power, half_space=True), coefficients
    found["mhs"] = OfficialMHS(), (0.1, 1.0)
    found["mhp"] = OfficialMHP(), OfficialMHP.coefficients
    found["r_mhp"] = OfficialRMHP(), (0.01, 0.1)
    found["mhc"] = OfficialMHC(), OfficialMHC.coefficients
    found["mgd"] = OfficialMGD(), (0.01, 0.1)
    found["comhe_rp"] = OfficialRandomCoMHE(), (1.0, 10.0)
    found["comhe_ap"] = OfficialAngleCoMHE(), (1.0, 10.0)
    found["comhe_adv"] = OfficialAdversarialCoMHE(), (1.0, 10.0)
    found["mhe"] = found["mhe_2"]
    found["half_mhe"] = found["half_mhe_2"]
    return found


_RECIPES = _recipes()


def sphere_uniformity(
    name: str,
    *,
    head: str | list[str] | None = "auto",
    neurons: dict[str, How] | None = None,
    inner_lr: float = 0.1,
    share_limit: float | None = None,
    include: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
    prefix: str = "hsu",
    verbose: bool = True,
) -> HypersphericalUniformity:
    """A published recipe as a callback: official formula and coefficients, without limits.

    =======================  =============  ======================================  ======  ====
    name                     hidden layers  what is minimised                       hidden  head
    =======================  =============  ======================================  ======  ====
    mhe_0, _1, _2, _a0       full space     mean energy of pairs                    1       10
    mhe_a1, _a2              full space     mean energy of pairs                    0.1     1
    mhe                      full space     is mhe_2                                1       10
    half_mhe_0, _1, _2, _a0  half space     mean energy of pairs                    1       10
    half_mhe_a1, _a2         half space     mean energy of pairs                    0.1     1
    half_mhe                 half space     is half_mhe_2                           1       10
    mhs                      half space     - smallest squared chord, ties summed   0.1     1
    mhp                      half space     - mean of 1 / squared chord to a pole   1       10
    r_mhp                    full space     length of the sum of the raw neurons    0.01    0.1
    mhc                      half space     soft minimum of squared chords to pole  0.01    0.1
    mgd                      half space     - log-determinant of the Gram matrix    0.01    0.1
    comhe_rp                 half space     mhe_2 after 20 random projections       1       10
    comhe_ap                 half space     mhe_2, projected with angles kept       1       10
    comhe_adv                half space     mhe_2, projected where it is worst      1       10
    =======================  =============  ======================================  ======  ====

    All of them measure the head in full space, and comhe does not project it. The coefficients are
    those of the committed code. The logs committed with the code show a tenth of them for the runs
    in full space (mhe).

    The formulas keep the peculiarities of the official code, such as 1e-4 inside the norms. Each
    measure's docstring says what they are and what the package's own member does instead; use that
    member for new work. Random starts and draws are seeded, but are not the numbers of the official
    runs. No bound is known for these formulas, so there is no score; r_mhp, whose value depends on
    the norms, has no ratio either. Poles and projections keep the learning rate ``inner_lr``,
    whereas in the official code it falls with that of the network.

    The rest of the recipe is yours to set. The official network has nine convolutions with batch
    normalisation (64, 128 and 256 filters, CIFAR-100), a 4 x 4 convolution to 256 features and a
    linear score. It is trained by SGD with momentum 0.9, learning rate 0.1, weight decay 5e-4
    (which includes the scales and shifts of batch normalisation), label smoothing 0.01 and batches
    of 128. The learning rate is divided by ten after 30, 50 and 65 thousand of 75 thousand steps
    (mhe: after 20, 30 and 37.5 of 42.5 thousand).

    Args:
        name: One of :data:`~lightning_hsu.presets.PRESETS`.
        head: The head: "auto" finds the layers that give the model's output, a name or a list of
            names are these layers, None is no head.
        neurons: How weights hold neurons, by patterns of their names; see the callback.
        inner_lr: Learning rate of the pole (mhp, mhc) or projection (comhe_ap, comhe_adv); others
            have none. As published it is that of the network.
        share_limit: The largest norm of a layer's penalty gradient over that of its task gradient; as
            published there is no limit, which is None.
        include: Patterns of layer names to take, shell style; None takes all but embeddings.
        exclude: Patterns of layer names to leave out.
        prefix: What the logged names begin with.
        verbose: Print the table of layers at the start of fit.

    Returns:
        The callback, ready for ``Trainer(callbacks=[...])``.

    Raises:
        ValueError: for an unknown name or an ``inner_lr`` that is not positive; see also the
            callback.
        TypeError: for a name that is not text.

    Reference:
        Liu et al., "Learning towards Minimum Hyperspherical Energy", NeurIPS 2018, arXiv 1805.09298
        (mhe); Lin et al., "Regularizing Neural Networks via Minimizing Hyperspherical Energy", CVPR
        2020, arXiv 1906.04892 (comhe); Liu et al., "Learning with Hyperspherical Uniformity",
        AISTATS 2021, arXiv 2103.01649 (the others).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_hsu.presets import sphere_uniformity
        >>> callback = sphere_uniformity("half_mhe_1")
        >>> callback.regularizer.measure
        OfficialMHE(power='1', half_space=True)
        >>> trainer = Trainer(callbacks=[callback], logger=False, accelerator="cpu")
    """
    check_preset(name)
    measure, (coefficient, head_coefficient) = _RECIPES[name]
    check_number("inner_lr", inner_lr, "a learning rate > 0", lambda rate: rate > 0)
    if isinstance(measure, PoledMeasure | TrainedCoMHE):
        measure = replace(measure, inner_lr=inner_lr)
    return HypersphericalUniformity(
        measure,
        coefficient,
        include=include,
        exclude=exclude,
        head=head,
        neurons=neurons,
        head_coefficient=None if head is None else head_coefficient,
        step_limit=None,
        share_limit=share_limit,
        prefix=prefix,
        verbose=verbose,
    )

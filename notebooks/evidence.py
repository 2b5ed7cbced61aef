# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Evidence: does it help, and where?
#
# What `make evidence` measured, read from the committed results: every method against weight decay alone and against controls
# without an aim, tuned by one rule, on real data; test seeds apart from tuning seeds; nulls beside gains. The protocol,
# `evidence/README.md`, was committed before the results. The last cell runs all of it again in miniature.

# %%
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import Markdown

ROOT = next(
    folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "evidence").is_dir()
)
sys.path.insert(0, str(ROOT))

from evidence import control_tables, tables  # noqa: E402
from evidence.comparisons import compare  # noqa: E402
from evidence.documents import legend  # noqa: E402
from evidence.methods import METHODS  # noqa: E402
from evidence.pictures import controls_figure, ratio_and_gain_figure  # noqa: E402

results = json.loads((ROOT / "evidence/results/cells.json").read_text())
comparisons = compare(results)
settings = {one.setting for one in comparisons}
seeds = len(results[0]["test_error"])
print(
    f"{len(results)} cells, {len(settings)} settings, {len(comparisons)} comparisons, {seeds} test seeds"
)

# %% [markdown]
# ## Is it uniformity at all?
#
# The penalty's gradient is perpendicular to each neuron, so a finite step along it turns the neuron and makes it longer. Two
# controls have no aim: a random direction of equal length, and growth alone, the norms that the penalty's steps give without
# their direction. What a penalty gains beyond weight decay and beyond both is what uniformity gains. Above the line it does.

# %%
controls_figure(results)

# %%
Markdown(control_tables.uniformity_table(results))

# %% [markdown]
# Every penalty also has controls of its own gradient, at its own learning rate, decay and coefficient.

# %%
Markdown(control_tables.matched_table(results))

# %%
Markdown(control_tables.controls_by_condition(results))

# %% [markdown]
# Settings in which a penalty is lower than all controls, and than orthogonality, by three standard errors.

# %%
Markdown(control_tables.clear_gains_table(results))

# %% [markdown]
# ## In how many settings does each method help?
#
# Gain and worse: p below 0.05 after correction for all comparisons. Everything else is null.

# %%
Markdown(tables.summary(comparisons))

# %% [markdown]
# Every setting as a bar, from the largest gain to the largest loss, by method. Grey is null.

# %%
shown = tables.everywhere(comparisons)
colours = {"gain": "#0072B2", "null": "#BBBBBB", "worse": "#D55E00"}
figure, axes = plt.subplots(
    1, len(shown), figsize=(3 * len(shown), 3), sharey=True, layout="constrained"
)
for ax, name in zip(axes, shown, strict=True):
    own = sorted(
        (one for one in comparisons if one.method == name), key=lambda one: one.paired.mean
    )
    values, errors = [one.paired.mean for one in own], [2 * one.paired.error for one in own]
    ax.bar(
        range(len(own)),
        values,
        yerr=errors,
        color=[colours[one.verdict] for one in own],
        error_kw={"lw": 0.6},
    )
    ax.set(yscale="symlog", title=METHODS[name].title, xlabel="settings", xticks=[])
    ax.title.set_fontsize(9)
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("change of the test error, points")
plt.show()

# %% [markdown]
# ## Where, and against each other
#
# Orthogonality is the rival to beat: it costs less and has the same aim. Both tables only describe.

# %%
Markdown(tables.conditions_table(comparisons))

# %%
Markdown(tables.rivals_table(comparisons))

# %% [markdown]
# ## Setting by setting

# %%
Markdown(f"{legend(comparisons)}\n\n{tables.settings_table(comparisons)}")

# %% [markdown]
# ## The nulls
#
# Settings in which neither half-space MHE nor MGD nor orthogonality changed anything that survives the correction.

# %%
verdicts = {(one.setting, one.method): one.verdict for one in comparisons}
for setting in dict.fromkeys(one.setting for one in comparisons):
    if {verdicts.get((setting, name)) for name in ("half_mhe_2", "mgd", "orthogonality")} == {
        "null"
    }:
        print(setting)

# %% [markdown]
# ## Does the ratio predict the gain?

# %%
ratio_and_gain_figure(comparisons)

# %%
Markdown(tables.hypothesis_table(comparisons))

# %% [markdown]
# The test that the protocol names is another: what a user sees early in a run with a penalty, (ratio − 1) × gradient share.

# %%
Markdown(control_tables.early_table(results))

# %% [markdown]
# ## Wider grids
#
# Where the best trial lay on an edge of the first sixteen, more were tried.

# %%
Markdown(control_tables.widening_table(results))

# %% [markdown]
# ## The ways of applying, and the whole family

# %%
Markdown(tables.settings_table(comparisons, ["half_mhe_2", "loss"], needed="loss"))

# %%
Markdown(tables.family_table(comparisons))

# %% [markdown]
# ## From scratch, in miniature
#
# Four settings of digits, few images, few epochs, few seeds: it shows that the harness runs, not what helps.

# %%
with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, "-m", "evidence", "--quick", "--jobs", "2", "--out", folder]
    subprocess.run(
        command,
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    again = json.loads((Path(folder) / "cells.json").read_text())
Markdown(tables.settings_table(compare(again)))

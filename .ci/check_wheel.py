"""Import and use the installed wheel once, in an environment that holds nothing else."""

from importlib.metadata import version
from importlib.resources import files

import torch
from torch import nn

import lightning_hsu
from lightning_hsu.report import report

assert files("lightning_hsu").joinpath("py.typed").is_file()
assert "site-packages" in lightning_hsu.__file__
assert lightning_hsu.__version__ == version("lightning-hsu")
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
model(torch.ones(2, 4)).sum().backward()
lightning_hsu.UniformityRegularizer().attach(model).add_gradients(
    torch.optim.SGD(model.parameters(), lr=0.1)
)
lightning_hsu.HypersphericalUniformity()
page = report(model).to_html()  # its style sheet is a file of the package
assert "<style>\n:root{" in page
print(f"lightning-hsu {version('lightning-hsu')} imports and runs from its wheel")

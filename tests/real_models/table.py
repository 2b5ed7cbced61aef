"""The table of real models in the README: ``python -m tests.real_models.table`` prints it."""

import warnings
from collections import defaultdict

import torch

from lightning_hsu import UniformityRegularizer, summarize
from tests.real_models.catalogue import entries

BEGIN = "<!-- real models: begin -->"
END = "<!-- real models: end -->"


def table() -> str:
    """One row a library: its models, how much is measured, and how the heads were found."""
    rows = defaultdict(list)
    for entry in entries():
        library, _, model_name = entry.name.partition(": ")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the libraries
            torch.manual_seed(0)
            model = entry.build().train()
            before = summarize(model)
            loss = entry.loss(model)
        regularizer = UniformityRegularizer().attach(model, watch=False)
        regularizer.find_head(loss)
        summary = regularizer.summary
        known = heads_of(before) == heads_of(summary)
        rows[library].append((model_name, len(summary.layers), summary.coverage, known))
    lines = [
        "| library | models | sets of neurons | measured, of all matrix entries | heads known before "
        "a forward pass |",
        "|---|---|---|---|---|",
    ]
    for library, found in rows.items():
        names = "; ".join(name for name, *_ in found)
        sets = sum(layers for _, layers, *_ in found)
        shares = sorted({f"{100 * share:.0f}" for _, _, share, _ in found}, key=float)
        span = shares[0] if len(shares) == 1 else f"{shares[0]}–{shares[-1]}"
        early = sum(known for *_, known in found)
        lines.append(f"| {library} | {names} | {sets} | {span} % | {early} of {len(found)} |")
    return "\n".join(lines)


def heads_of(summary) -> set[str]:
    """Names of the heads."""
    return {layer.name for layer in summary.layers if layer.is_head}


if __name__ == "__main__":
    print(table())

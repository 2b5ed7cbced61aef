"""What a report prints beside its table: pairs, groups, what is not shown, heads, what is broken."""

import torch
from torch import nn

from lightning_hsu.measures import RieszEnergy
from lightning_hsu.report import compare, report
from lightning_hsu.report.cli import main
from lightning_hsu.report.tables import group_lines, pair_lines


def test_layers_that_are_not_shown_are_told_with_what_they_have():
    torch.manual_seed(0)
    state = {f"{i}.weight": torch.randn(20, 16) + 0.3 * i for i in range(5)}
    for name in ("0.weight", "1.weight"):
        state[name][3] = state[name][2]
    state["4.weight"][:10] = state["4.weight"][10]  # the worst, which is shown
    state["2.weight"][7] = 0.0
    found = report(state, head=None, similar_above=0.999).table(top=1)
    said = " ".join(found.split())
    assert "; 2 of them with near-duplicates; 1 of them with dead neurons " in said
    lines = found[found.index("not shown") :].splitlines()
    assert max(map(len, lines)) <= 80


def test_pairs_say_which_are_opposite_where_that_is_the_same():
    torch.manual_seed(0)
    x = torch.randn(20, 16)
    x[4] = -x[3]
    x[6] = x[5]
    found = report({"fc.weight": x}, head=None)
    lines = pair_lines(found, 9)
    assert "fc: 3 and 4, 180.00 degrees (opposite)" in lines
    assert "fc: 5 and 6, 0.00 degrees" in lines
    full = pair_lines(report({"fc.weight": x}, RieszEnergy(s=2), head=None), 9)
    assert full == ["fc: 5 and 6, 0.00 degrees"]


def test_lines_of_groups_are_80_columns_wide():
    torch.manual_seed(0)
    state = {f"{'a.long.name.' * 4}fc.weight": torch.randn(1, 16).repeat(60, 1)}
    state["7.weight"] = torch.randn(1, 16).repeat(40, 1)
    found = report(state, head=None)
    lines = group_lines(found, 3) + pair_lines(found, 3)
    assert max(map(len, lines)) <= 80
    said = " ".join(" ".join(lines).split())
    assert "fc: 60 near-duplicates: 0, 1, 2, " in said
    assert "layer 7: 40 near-duplicates: 0, 1, 2, " in said
    assert "39; cosine to the first from 1.0000" in said


def test_a_guessed_head_is_told_with_the_way_out(tmp_path, capsys):
    model = nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 10))
    in_python = 'note: head: 2 (guessed: last Linear); head="NAME" or head=None otherwise'
    assert in_python in str(report(model)).splitlines()
    assert in_python in str(report(model.state_dict())).splitlines()
    assert in_python in " ".join(str(compare(model, model)).replace("before, ", "").split())
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert main(["report", str(tmp_path / "a.pt")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "note: head: 2 (guessed: last Linear); --head NAME or --head none otherwise" in shown
    for head in ("2", None):
        assert "guessed" not in str(report(model, head=head))

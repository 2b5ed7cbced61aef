"""Comparisons of what libraries write: an adapter beside its base, two sparse autoencoders."""

import pytest
import torch

from lightning_hsu._core.assignment import can_assign
from lightning_hsu.report import compare
from lightning_hsu.report.cli import main
from tests.real_models.libraries import library
from tests.real_models.test_adapters import quiet
from tests.real_models.test_files import bert

pytestmark = pytest.mark.models


def test_an_adapter_of_peft_beside_its_base(tmp_path, capsys):
    transformers, peft = library("transformers"), library("peft")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])
    with quiet():
        model = bert(transformers)
        model.save_pretrained(base)
        adapted = peft.get_peft_model(model, config)
        torch.manual_seed(1)
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=0.02)
        adapted.save_pretrained(adapter)
        merged = adapted.merge_and_unload()
    found = compare(base, adapter)
    names = []
    for one in found.layers:
        is_changed = one.after.name.endswith(("query", "value"))
        assert (one.moved > 0.0) == is_changed
        if is_changed:
            names.append(one.after.name)
    assert len(names) == 4
    assert found.drift.moved_layers == tuple(names)
    in_memory = compare(base, merged).drift
    assert found.drift.moved == pytest.approx(in_memory.moved, rel=1e-4)
    assert found.drift.ratio_after == pytest.approx(in_memory.ratio_after, rel=1e-4)
    assert main(["compare", str(base), str(adapter)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"the median neuron moved in 4 of {len(found.layers)} layers: by" in said
    assert "encoder.layer.{0,1}.attention.self.{query,value}" in said


def test_two_dictionaries_of_sae_lens(tmp_path):
    if not can_assign():
        pytest.skip("needs scipy: pip install lightning-hsu[hull]")
    sae_lens = library("sae_lens")
    paths = []
    with quiet():
        config = sae_lens.StandardSAEConfig(d_in=16, d_sae=40)
        sae = sae_lens.StandardSAE(config)
        for i in range(2):
            order = torch.randperm(40)
            with torch.no_grad():
                sae.W_dec.copy_(sae.W_dec[order])
                sae.W_enc.copy_(sae.W_enc[:, order])
                sae.b_enc.copy_(sae.b_enc[order])
            paths.append(tmp_path / str(i))
            sae.save_model(paths[i])
    found = compare(*paths)
    assert [one.after.name for one in found.layers] == ["W_dec", "W_enc"]
    first, second = found.layers
    assert first.matched == second.matched == tuple(order.argsort().tolist())
    assert first.moved == pytest.approx(0.0, abs=1e-6)
    assert first.matching.agreement == second.matching.agreement == 1.0

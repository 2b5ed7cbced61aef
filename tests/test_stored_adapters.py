"""Adapters in files: the weights of their base with them, never their factors as layers."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lightning_hsu.report import compare, report
from lightning_hsu.report._files import safetensors_files
from lightning_hsu.report.checkpoints import read_checkpoint, read_weights
from lightning_hsu.report.cli import main

RANK, ALPHA = 2, 6
WEIGHTS = {
    "model.layers.0.attn.q.weight": (6, 8),
    "model.layers.0.attn.k.weight": (6, 8),
    "model.layers.1.conv.weight": (6, 4, 3, 3),
    "model.embed.weight": (10, 8),
    "score.weight": (3, 8),
}
Q, K, CONV = list(WEIGHTS)[:3]


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64).float()


def base(folder, dtype=torch.float32):
    """The weights of a base in a folder."""
    torch.manual_seed(0)
    folder.mkdir()
    weights = {name: normal(*shape).to(dtype) for name, shape in WEIGHTS.items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return weights


def saved(folder, factors, **config):
    """An adapter of peft in a folder."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA} | config
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


def peft_name(weight, factor):
    return f"base_model.model.{weight.removesuffix('.weight')}.{factor}"


def factors_of(weight, rank=RANK):
    """Factors for the matrix of a layer of 8 inputs and 6 outputs."""
    return {
        peft_name(weight, "lora_A.weight"): normal(rank, 8),
        peft_name(weight, "lora_B.weight"): normal(6, rank),
    }


def product(factors, weight):
    a = factors[peft_name(weight, "lora_A.weight")].double()
    b = factors[peft_name(weight, "lora_B.weight")].double()
    return b @ a


def close(found, expected):
    # Float32 arithmetic on numbers of order 10: the error measured is 2e-6.
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.fixture
def folders(tmp_path):
    return tmp_path / "base", tmp_path / "adapter"


def test_lora_on_its_base(folders):
    weights = base(folders[0])
    factors = factors_of(Q)
    saved(folders[1], factors)
    found = read_checkpoint(folders[1], base=folders[0])
    assert set(found.tensors) == set(WEIGHTS)
    assert found.config == {"model_type": "llama"}
    close(found.load(Q), weights[Q] + ALPHA / RANK * product(factors, Q))
    for name in set(WEIGHTS) - {Q}:
        assert torch.equal(found.load(name), weights[name])
    ((_, note),) = found.notes
    assert note == f"adapter_model.safetensors was added to the base {folders[0]}: 1 layer changed"
    one_file = read_checkpoint(folders[1] / "adapter_model.safetensors", base=folders[0])
    assert torch.equal(one_file.load(Q), found.load(Q))


def test_scales_of_lora(folders):
    weights = base(folders[0])
    factors = factors_of(Q, rank=4) | factors_of(K)
    settings = {"use_rslora": True, "alpha_pattern": {"k": 5}, "rank_pattern": {"q": 4}}
    saved(folders[1], factors, **settings)
    found = read_checkpoint(folders[1], base=folders[0])
    close(found.load(Q), weights[Q] + ALPHA / 2 * product(factors, Q))
    close(found.load(K), weights[K] + 5 / 2**0.5 * product(factors, K))
    (folders[1] / "adapter_config.json").unlink()
    saved(folders[1], factors, alpha_pattern={r".*layers\.0\.attn\.k": 5})
    found = read_checkpoint(folders[1], base=folders[0])
    close(found.load(Q), weights[Q] + ALPHA / 4 * product(factors, Q))
    close(found.load(K), weights[K] + 5 / 2 * product(factors, K))


def test_dora_gives_rows_their_lengths(folders):
    weights = base(folders[0])
    factors = factors_of(Q)
    lengths = 1 + torch.rand(6)
    factors[peft_name(Q, "lora_magnitude_vector")] = lengths
    saved(folders[1], factors, use_dora=True)
    x = weights[Q].double() + ALPHA / RANK * product(factors, Q)
    expected = lengths[:, None] * x / x.norm(dim=1, keepdim=True)
    close(read_checkpoint(folders[1], base=folders[0]).load(Q), expected)


def test_layers_with_inputs_first(tmp_path):
    (tmp_path / "base").mkdir()
    x = normal(8, 6)
    save_file({"h.0.c_attn.weight": x}, tmp_path / "base" / "model.safetensors")
    factors = factors_of("h.0.c_attn.weight")
    saved(tmp_path / "adapter", factors, fan_in_fan_out=True)
    found = read_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    close(
        found.load("h.0.c_attn.weight"), x + ALPHA / RANK * product(factors, "h.0.c_attn.weight").T
    )
    saved(tmp_path / "wrong", factors)
    with pytest.raises(ValueError, match=r"give \(6, 8\), the base has \(8, 6\)"):
        read_checkpoint(tmp_path / "wrong", base=tmp_path / "base")


def test_convolutions_and_embeddings(folders):
    weights = base(folders[0])
    embedding = "model.embed.weight"
    factors = {
        peft_name(CONV, "lora_A.weight"): normal(RANK, 4, 3, 3),
        peft_name(CONV, "lora_B.weight"): normal(6, RANK, 1, 1),
        peft_name(embedding, "lora_embedding_A"): normal(RANK, 10),
        peft_name(embedding, "lora_embedding_B"): normal(8, RANK),
    }
    saved(folders[1], factors)
    found = read_checkpoint(folders[1], base=folders[0])
    down, up, a, b = factors.values()
    delta = torch.einsum("or,rikl->oikl", up[:, :, 0, 0].double(), down.double())
    close(found.load(CONV), weights[CONV] + ALPHA / RANK * delta)
    close(found.load(embedding), weights[embedding] + ALPHA / RANK * (b.double() @ a.double()).T)


def test_whole_layers_that_are_saved_with_an_adapter(folders):
    weights = base(folders[0])
    head, new = normal(3, 8), normal(5, 8)
    factors = factors_of(Q)
    factors["base_model.model.score.weight"] = head
    factors["base_model.model.added.weight"] = new
    saved(folders[1], factors, modules_to_save=["score", "added"])
    found = read_checkpoint(folders[1], base=folders[0])
    assert torch.equal(found.load("score.weight"), head)
    assert torch.equal(found.load("added.weight"), new)
    assert torch.equal(found.load(K), weights[K])
    assert "2 tensors replaced or added" in found.notes[0][1]


def test_loha_and_lokr(folders):
    weights = base(folders[0])
    a1, b1, a2, b2 = normal(6, 2), normal(2, 8), normal(6, 2), normal(2, 8)
    factors = {}
    for name, x in (("w1_a", a1), ("w1_b", b1), ("w2_a", a2), ("w2_b", b2)):
        factors[peft_name(Q, f"hada_{name}")] = x
    saved(folders[1], factors, peft_type="LOHA", alpha=ALPHA)
    (folders[1] / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LOHA", "r": 2, "alpha": 5})
    )
    found = read_checkpoint(folders[1], base=folders[0])
    close(found.load(Q), weights[Q] + 5 / 2 * (a1 @ b1) * (a2 @ b2))
    w1, a, b = normal(2, 2), normal(3, 2), normal(2, 4)
    factors = {}
    for name, x in (("w1", w1), ("w2_a", a), ("w2_b", b)):
        factors[peft_name(Q, f"lokr_{name}")] = x
    saved(folders[1], factors)
    (folders[1] / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LOKR", "r": 2, "alpha": 5})
    )
    found = read_checkpoint(folders[1], base=folders[0])
    close(found.load(Q), weights[Q] + 5 / 2 * torch.kron(w1, a @ b))


def test_where_the_base_is(folders, tmp_path, monkeypatch):
    weights = base(folders[0])
    factors = factors_of(Q)
    expected = weights[Q] + ALPHA / RANK * product(factors, Q)
    saved(folders[1], factors, base_model_name_or_path=str(folders[0]))
    close(read_weights(folders[1])[Q], expected)
    saved(folders[1], factors, base_model_name_or_path="base")
    monkeypatch.chdir(tmp_path)
    close(read_weights(folders[1])[Q], expected)
    saved(folders[1], factors, base_model_name_or_path="../base")
    monkeypatch.chdir("/")
    close(read_weights(folders[1])[Q], expected)

    for name in ("~nobody/model", "x" * 100_000, "a\0b", "//host/share"):
        saved(folders[1], factors, base_model_name_or_path=name)
        with pytest.raises(ValueError, match=r"not weights: give the base, which is") as error:
            read_weights(folders[1])
        assert len(str(error.value)) < 400
    saved(folders[1], factors, base_model_name_or_path="org/model")
    with pytest.raises(
        ValueError,
        match=r"adapter_model.safetensors holds the factors of LoRA, not weights: give the base, "
        r"which is org/model, with --base PATH",
    ):
        read_weights(folders[1])
    save_file(weights, folders[1] / "model.safetensors")
    found = read_checkpoint(folders[1])
    close(found.load(Q), expected)
    assert f"added to the base {folders[1]}" in found.notes[0][1]
    saved(tmp_path / "other", factors)
    with pytest.raises(ValueError, match=r"the base .*/other is an adapter too"):
        read_checkpoint(folders[1], base=tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_checkpoint(folders[1], base=tmp_path / "none")


def test_a_base_in_one_file_and_with_another_prefix(folders, tmp_path):
    torch.manual_seed(0)
    x = normal(6, 8)
    torch.save({"state_dict": {"layers.0.attn.q.weight": x}}, tmp_path / "base.pt")
    factors = factors_of(Q)
    saved(folders[1], factors)
    found = read_checkpoint(folders[1], base=tmp_path / "base.pt")
    close(found.load("layers.0.attn.q.weight"), x + ALPHA / RANK * product(factors, Q))
    torch.save({"lm.model.layers.0.attn.q.weight": x}, tmp_path / "base.pt")
    found = read_checkpoint(folders[1], base=tmp_path / "base.pt")
    close(found.load("lm.model.layers.0.attn.q.weight"), x + ALPHA / RANK * product(factors, Q))


def test_what_stays_in_the_file_is_adapted_when_it_is_loaded(folders, monkeypatch):
    weights = base(folders[0], torch.bfloat16)
    factors = factors_of(Q)
    saved(folders[1], factors)
    at_once = read_checkpoint(folders[1], base=folders[0]).load(Q)
    assert at_once.dtype == torch.bfloat16
    expected = (weights[Q].double() + ALPHA / RANK * product(factors, Q)).to(torch.bfloat16)
    torch.testing.assert_close(at_once, expected, rtol=1e-2, atol=0.0)  # one rounding to 8 bits
    monkeypatch.setattr("lightning_hsu.report._files.reading.KEPT_IN_FILE", 0)
    monkeypatch.setattr(safetensors_files, "ALWAYS_READ", 0)
    found = read_checkpoint(folders[1], base=folders[0])
    assert found.tensors[Q].is_meta
    assert torch.equal(found.load(Q), at_once)
    assert torch.equal(found.load(K), weights[K])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "an adapter of kind IA3, not LoRA: merge it with peft"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "began with pissa_niter_4, which changes its base",
        ),
        ({"layer_replication": [[0, 4]]}, "a LoRA with layer_replication"),
        ({"use_qalora": True}, "a LoRA with use_qalora"),
        ({"kasa_config": {"a": 1}}, "a LoRA with kasa_config"),
        ({"lora_alpha": "8"}, "a rank or an alpha that is none"),
        ({"lora_alpha": 10**400}, "a rank or an alpha that is none"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "which is too involved"),
        ({"alpha_pattern": {"a?" * 40: 1}}, "which is too involved"),
        ({"alpha_pattern": {"(": 1}}, "a broken pattern"),
    ],
)
def test_adapters_that_are_not_read(folders, config, message):
    base(folders[0])
    saved(folders[1], factors_of(Q), **config)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(folders[1], base=folders[0])


def test_an_adapter_and_a_base_that_do_not_belong_together(folders, tmp_path):
    base(folders[0])
    saved(folders[1], factors_of("model.layers.7.attn.q.weight"))
    with pytest.raises(
        ValueError, match=r"changes model.layers.7.attn.q, which the base .* not have"
    ):
        read_checkpoint(folders[1], base=folders[0])
    saved(folders[1], factors_of("score.weight"))
    with pytest.raises(
        ValueError, match=r"factors of score.weight give \(6, 8\), the base has \(3, 8\)"
    ):
        read_checkpoint(folders[1], base=folders[0])
    factors = factors_of(Q)
    factors[peft_name(Q, "lora_B.weight")] = normal(6, RANK + 1)
    saved(folders[1], factors)
    with pytest.raises(ValueError, match="do not fit"):
        read_checkpoint(folders[1], base=folders[0])
    for strange in (torch.tensor(1.0), torch.ones(RANK, 8).int()):
        factors = factors_of(Q)
        factors[peft_name(Q, "lora_A.weight")] = strange
        saved(folders[1], factors)
        with pytest.raises(
            ValueError, match=r"the rank of|do not fit|is torch.int32, not floating"
        ):
            read_checkpoint(folders[1], base=folders[0])
    save_file({name: torch.ones(shape).char() for name, shape in WEIGHTS.items()}, tmp_path / "i")
    (tmp_path / "i").rename(tmp_path / "i.safetensors")
    saved(folders[1], factors_of(Q))
    with pytest.raises(ValueError, match=r"as torch.int8: an adapter is added to floating-point"):
        read_checkpoint(folders[1], base=tmp_path / "i.safetensors")


NAMES = [
    (
        "lora_unet_down_blocks_0_to_q.lora_down.weight",
        "lora_unet_down_blocks_0_to_q.lora_up.weight",
    ),
    ("unet.down_blocks.0.to_q.lora_A.weight", "unet.down_blocks.0.to_q.lora_B.weight"),
    ("unet.down_blocks.0.to_q.lora.down.weight", "unet.down_blocks.0.to_q.lora.up.weight"),
    ("mid.attn1.processor.to_q_lora.down.weight", "mid.attn1.processor.to_q_lora.up.weight"),
    ("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"),
    ("layers.0.q.lora_A.default.weight", "layers.0.q.lora_B.default.weight"),
]


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_factors_alone_are_never_layers(tmp_path, names, ending, capsys):
    factors = {names[0]: normal(2, 8), names[1]: normal(6, 2)}
    factors[names[0].partition(".lora")[0] + ".alpha"] = torch.tensor(4.0)
    path = tmp_path / f"a.{ending}"
    save = torch.save if ending == "pt" else save_file
    save(factors, path)
    for source in (path, path.parent):
        with pytest.raises(
            ValueError, match=r"holds the factors of LoRA, not weights: .*--base PATH"
        ):
            report(source)
    assert main(["report", str(path)]) == 2
    assert "--base PATH" in capsys.readouterr().err


def test_an_adapter_without_its_configuration(folders):
    saved(folders[1], factors_of(Q))
    (folders[1] / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"without the adapter_config\.json that says how"):
        read_checkpoint(folders[1])


def test_factors_beside_their_base_are_left_out(tmp_path):
    torch.manual_seed(0)
    state = {
        "base_model.model.q.base_layer.weight": normal(6, 8),
        "base_model.model.q.lora_A.default.weight": normal(2, 8),
        "base_model.model.q.lora_B.default.weight": normal(6, 2),
    }
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    found = read_checkpoint(tmp_path / "a.ckpt")
    assert list(found.tensors) == ["base_model.model.q.base_layer.weight"]
    assert "2 factors of adapters such as" in found.notes[0][1]
    assert len(report(tmp_path / "a.ckpt").layers) == 1


def test_the_command_line_takes_a_base(folders, capsys):
    base(folders[0])
    saved(folders[1], factors_of(Q))
    arguments = ["report", str(folders[1]), "--base", str(folders[0]), "--json", "-"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    names = [layer["name"] for layer in found["layers"]]
    assert "model.layers.0.attn.q" in names
    assert not any("lora" in name for name in names)
    assert "was added to the base" in found["notes"][0]["note"]
    moved = compare(folders[0], folders[1], base=folders[0])
    changed = [one.after.name for one in moved.layers if one.moved > 1e-3]
    assert changed == ["model.layers.0.attn.q"]
    assert any("was not used" in note for _, note in moved.before.notes)
    assert main(["compare", str(folders[0]), str(folders[1]), "--base", str(folders[0])]) == 0

"""Folders that libraries write: the weights are those of the model in memory."""

import json

import pytest
import torch
from torch import nn

from lightning_hsu._monitor.text import counted
from lightning_hsu.report.checkpoints import read_checkpoint
from tests.real_models.libraries import library
from tests.real_models.test_adapters import quiet

pytestmark = pytest.mark.models

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}


@pytest.fixture(scope="module")
def transformers():
    return library("transformers")


def bert(transformers, kind="BertModel"):
    torch.manual_seed(0)
    config = transformers.BertConfig(intermediate_size=48, max_position_embeddings=16, **SIZES)
    return getattr(transformers, kind)(config)


def gpt2(transformers):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 50}
    config = transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)
    return transformers.GPT2LMHeadModel(config)


def check_as_in_memory(path, expected, base=None):
    """Every tensor of a folder is that of a model, which may have a prefix of its own."""
    found = read_checkpoint(path, base=base)
    assert len(found.tensors) > 3
    for name in found.tensors:
        x = expected.get(name, expected.get(f"bert.{name}"))
        assert x is not None, name
        # Two orders of the same float32 arithmetic on numbers of order 1: 1e-6 is measured.
        torch.testing.assert_close(found.load(name), x, rtol=1e-5, atol=1e-5)
    return found


def test_a_folder_of_transformers(transformers, tmp_path):
    model = bert(transformers, "BertForMaskedLM")
    with quiet():
        model.save_pretrained(tmp_path / "one")
        model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    one = check_as_in_memory(tmp_path / "one", model.state_dict())
    parts = check_as_in_memory(tmp_path / "parts", model.state_dict())
    assert list(one.tensors) == list(parts.tensors)
    for found in (one, parts):
        assert found.config["model_type"] == "bert"
        assert found.config["num_attention_heads"] == 4
        assert found.notes == ()


def adapters(peft):
    """Configurations of adapters by name, each with the model that it is for."""
    lora, both = peft.LoraConfig, {"r": 4, "lora_alpha": 7}
    other = {"r": 4, "alpha": 7, "target_modules": ["query", "dense"]}
    patterns = {
        "rank_pattern": {r"layer\.1.*key": 2},
        "alpha_pattern": {"query": 3, r".*\.0\.attention\.self\.key": 5},
    }
    targets = ["query", "key", "word_embeddings"]
    return {
        "lora": ("BertModel", lora(target_modules=["query", "dense"], **both)),
        "patterns": (
            "BertModel",
            lora(use_rslora=True, target_modules=targets, **patterns, **both),
        ),
        "dora": ("BertModel", lora(use_dora=True, target_modules=["query", "dense"], **both)),
        "columns": ("gpt2", lora(target_modules=["c_attn", "wte"], fan_in_fan_out=True, **both)),
        "dora_columns": (
            "gpt2",
            lora(target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True, **both),
        ),
        "head": (
            "BertForSequenceClassification",
            lora(target_modules=["query"], modules_to_save=["classifier"], **both),
        ),
        "loha": ("BertModel", peft.LoHaConfig(**other)),
        "lokr": ("BertModel", peft.LoKrConfig(**other)),
        "lokr_both": (
            "BertModel",
            peft.LoKrConfig(**{**other, "r": 2}, decompose_both=True, decompose_factor=4),
        ),
    }


NAMES = ["lora", "patterns", "dora", "columns", "dora_columns", "head", "loha", "lokr", "lokr_both"]


def randomise(model):
    """Factors at zero would hide errors."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ("lora_", "hada_", "lokr_", "modules_to_save")):
                p += 0.3 * torch.randn_like(p)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_added_as_peft_merges_it(transformers, tmp_path, name):
    peft = library("peft")
    kinds = adapters(peft)
    assert list(kinds) == NAMES
    kind, config = kinds[name]
    model = gpt2(transformers) if kind == "gpt2" else bert(transformers, kind)
    with quiet():
        plain = model.bert if hasattr(model, "bert") else model
        plain.save_pretrained(tmp_path / "base")  # without the head
        adapted = peft.get_peft_model(model, config)
        randomise(adapted)
        adapted.save_pretrained(tmp_path / "adapter")
        merged = adapted.merge_and_unload().state_dict()
    found = check_as_in_memory(tmp_path / "adapter", merged, base=tmp_path / "base")
    assert "was added to the base" in found.notes[0][1]
    before = read_checkpoint(tmp_path / "base")
    changed = []
    for tensor in before.tensors:
        if not torch.equal(before.load(tensor), found.load(tensor)):
            changed.append(tensor)
    assert f": {counted(len(changed), 'layer')} changed" in found.notes[0][1]
    if name == "head":
        assert torch.equal(found.load("classifier.weight"), merged["classifier.weight"])


def test_an_adapter_of_convolutions(tmp_path):
    from safetensors.torch import save_file

    peft = library("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv1d(8, 6, 5))
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    for use_dora in (False, True):
        net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv1d(8, 6, 5))
        net.load_state_dict(model.state_dict())
        targets = ["0", "1"] if use_dora else ["0", "1", "2"]
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_dora=use_dora)
        with quiet():
            adapted = peft.get_peft_model(net, config)
            randomise(adapted)
            adapted.save_pretrained(tmp_path / f"adapter{use_dora}")
            merged = adapted.merge_and_unload().state_dict()
        path = tmp_path / f"adapter{use_dora}"
        check_as_in_memory(path, merged, base=tmp_path / "base.safetensors")


def test_a_folder_of_sae_lens(tmp_path):
    sae_lens = library("sae_lens")
    torch.manual_seed(0)
    with quiet():
        config = sae_lens.StandardSAEConfig(d_in=16, d_sae=64)
        sae = sae_lens.StandardSAE(config)
        sae.save_model(tmp_path)
    found = read_checkpoint(tmp_path)
    assert torch.equal(found.load("W_dec"), sae.W_dec)
    assert torch.equal(found.load("W_enc"), sae.W_enc)
    assert (found.config["d_in"], found.config["d_sae"]) == (16, 64)


def test_a_folder_of_diffusers(tmp_path):
    diffusers = library("diffusers")
    torch.manual_seed(0)
    with quiet():
        model = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4)
        scheduler = diffusers.DDIMScheduler()
        model.save_pretrained(tmp_path / "vae")
        scheduler.save_pretrained(tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    found = check_as_in_memory(tmp_path / "vae", model.state_dict())
    assert found.config["_class_name"] == "AutoencoderKL"
    with pytest.raises(ValueError, match=r"a diffusers pipeline .* there are 'vae'$"):
        read_checkpoint(tmp_path)


def test_a_folder_of_sentence_transformers(transformers, tmp_path):
    sentence_transformers = library("sentence_transformers")
    models = library("sentence_transformers.models")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    with quiet():
        bert(transformers).save_pretrained(tmp_path / "bert")
        tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
        tokenizer.save_pretrained(tmp_path / "bert")
        modules = [
            models.Transformer(str(tmp_path / "bert")),
            models.Pooling(32),
            models.Dense(32, 8),
        ]
        model = sentence_transformers.SentenceTransformer(modules=modules, device="cpu")
        model.save(str(tmp_path / "sentences"))
    found = read_checkpoint(tmp_path / "sentences")
    expected = {}
    for name, x in model.state_dict().items():
        expected[name.replace("0.auto_model.", "0.").replace("0.model.", "0.")] = x
    assert set(found.tensors) == set(expected)
    assert all(torch.equal(found.load(name), x) for name, x in expected.items())
    assert found.config["model_type"] == "bert"

"""Folders of weights, and files that hold several sets: one is taken, and a note says which."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

from lightning_hsu.report import compare, report, unpickle
from lightning_hsu.report._files import folders, safetensors_files
from lightning_hsu.report._files import found as found_module
from lightning_hsu.report.checkpoints import read_checkpoint, read_weights
from tests.models import network


def state(*names, fill=1.0):
    return {name: torch.full((3, 4), fill) for name in names}


def save_index(folder, places, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def texts(checkpoint):
    return " | ".join(text for _, text in checkpoint.notes)


def sharded(folder, config=None):
    """A model in two files, as transformers writes it."""
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file(state("layers.0.weight", "layers.10.weight"), folder / first)
    save_file(state("layers.2.weight", "lm_head.weight"), folder / second)
    places = {"layers.0.weight": first, "layers.10.weight": first}
    places |= {"layers.2.weight": second, "lm_head.weight": second}
    save_index(folder, places)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def test_a_sharded_folder_with_its_configuration(tmp_path):
    config = {"model_type": "llama", "num_attention_heads": 4}
    sharded(tmp_path, config)
    save_file(state("other.weight"), tmp_path / "consolidated.safetensors")
    (tmp_path / "optimizer.pt").write_bytes(b"not read")
    found = read_checkpoint(tmp_path)
    order = ["layers.0.weight", "layers.2.weight", "layers.10.weight", "lm_head.weight"]
    assert list(found.tensors) == order
    assert found.config == config
    assert found.name == str(tmp_path)
    assert "of model.safetensors.index.json were taken" in texts(found)
    assert "'consolidated.safetensors'" in texts(found)
    part = read_checkpoint(tmp_path / "model-00001-of-00002.safetensors")
    assert list(part.tensors) == ["layers.0.weight", "layers.10.weight"]
    assert part.config == config
    assert "is one of 2 parts: name the folder" in texts(part)


def test_a_sharded_folder_of_pickles(tmp_path):
    for i, name in enumerate(("a.weight", "b.weight")):
        torch.save(state(name), tmp_path / f"pytorch_model-0000{i + 1}-of-00002.bin")
    places = {name: f"pytorch_model-0000{i + 1}-of-00002.bin" for i, name in ((0, "a.weight"),)}
    places["b.weight"] = "pytorch_model-00002-of-00002.bin"
    save_index(tmp_path, places, "pytorch_model.bin.index.json")
    assert list(read_weights(tmp_path)) == ["a.weight", "b.weight"]


def test_a_sharded_folder_that_is_not_complete(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        ValueError,
        match=r"names 2 files, of which 'model-00002-of-00002.safetensors' are not there",
    ):
        read_weights(tmp_path)
    save_file(state("layers.2.weight"), tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"names 'lm_head.weight', which its files do not hold"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds 1 of the 2 parts of model.safetensors"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    "file", ["../out.safetensors", "/etc/passwd", "..", "a/b.safetensors", "c:\\x", "", 3, None]
)
def test_an_index_leads_nowhere_else(tmp_path, file):
    inner = tmp_path / "inner"
    (inner / "a").mkdir(parents=True)
    save_file(state("w.weight"), tmp_path / "out.safetensors")
    save_file(state("w.weight"), inner / "a" / "b.safetensors")
    save_index(inner, {"w.weight": file})
    with pytest.raises(ValueError, match="not the name of a file in its folder: it is refused"):
        read_weights(inner)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": {}}', "{", "[" * 100_000])
def test_a_broken_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"no index of weights|not a JSON file"):
        read_weights(tmp_path)


def test_the_cache_of_the_hub_is_made_of_links(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file(state("w.weight"), blobs / "0123")
    (blobs / "4567").write_text(json.dumps({"model_type": "bert"}))
    (snapshot / "model.safetensors").symlink_to(Path("..") / ".." / "blobs" / "0123")
    (snapshot / "config.json").symlink_to(Path("..") / ".." / "blobs" / "4567")
    found = read_checkpoint(snapshot)
    assert list(found.tensors) == ["w.weight"]
    assert found.config == {"model_type": "bert"}
    with pytest.raises(
        ValueError, match=r"in folders of their own: name one, such as .*snapshots/abc"
    ):
        read_weights(tmp_path)


def test_the_folder_of_a_training_names_that_of_its_checkpoints(tmp_path):
    """Lightning's default_root_dir, three levels up."""
    inner = Path("lightning_logs") / "version_0" / "checkpoints"
    (tmp_path / inner).mkdir(parents=True)
    torch.save({"state_dict": state("w.weight")}, tmp_path / inner / "epoch=0-step=10.ckpt")
    with pytest.raises(ValueError, match=r"name one, such as (.*);") as told:
        read_weights(tmp_path)
    assert f"such as {tmp_path / inner}; there are" in str(told.value)
    outer = tmp_path / "run" / "again"
    outer.mkdir(parents=True)
    (tmp_path / "lightning_logs").rename(outer / "lightning_logs")
    with pytest.raises(ValueError, match=r"folder without .safetensors"):
        read_weights(tmp_path)  # five levels up
    with pytest.raises(ValueError, match=r"name one, such as .*again/lightning_logs/version_0"):
        read_weights(tmp_path / "run")


def test_the_nearest_folder_with_weights_is_named_first(tmp_path):
    for inner in ("a/b/c", "z"):
        (tmp_path / inner).mkdir(parents=True)
        save_file(state("w.weight"), tmp_path / inner / "model.safetensors")
    with pytest.raises(ValueError, match=r"such as .*z; there are 'z', 'a/b/c'"):
        read_weights(tmp_path)


def test_links_to_folders_with_weights_are_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    save_file(state("w.weight"), elsewhere / "model.safetensors")
    (tmp_path / "here" / "a").mkdir(parents=True)
    (tmp_path / "here" / "a" / "b").symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"folder without .safetensors"):
        read_weights(tmp_path / "here")


def test_a_bounded_number_of_folders_is_looked_at(tmp_path, monkeypatch):
    looked_at = []
    monkeypatch.setattr(folders, "_has_weights", looked_at.append)
    for i in range(201):
        for j in range(6):
            (tmp_path / f"{i:03}" / str(j)).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"folder without .safetensors"):
        read_weights(tmp_path)
    assert len(looked_at) == len(set(looked_at)) == 1_000


def test_one_set_of_several_is_taken(tmp_path):
    names = [
        "pytorch_model.bin",
        "model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors",
        "model.safetensors",
    ]
    taken = ["pytorch_model.bin", "model.fp16.safetensors", names[2], "model.safetensors"]
    for i, name in enumerate(names):
        save = torch.save if name.endswith(".bin") else save_file
        save(state("w.weight", fill=float(i)), tmp_path / name)
        found = read_checkpoint(tmp_path)
        expected = taken[i]
        if name == "model.fp16.safetensors":
            expected = "pytorch_model.bin"  # before a variant
        number = names.index(expected)
        assert found.tensors["w.weight"][0, 0] == number
        if i > 0:
            assert f"the weights of {expected} were taken; the folder also holds" in texts(found)
            others = set(names[: i + 1]) - {expected}
            assert all(f"'{other}'" in texts(found) for other in others)


def test_other_files_of_weights_are_named(tmp_path):
    save_file(state("w.weight"), tmp_path / "model.safetensors")
    save_file(state("v.weight"), tmp_path / "ema.safetensors")
    found = read_checkpoint(tmp_path)
    assert list(found.tensors) == ["w.weight"]
    assert texts(found) == (
        "the weights of model.safetensors were taken; the folder also holds 'ema.safetensors': "
        "name that file to read it instead"
    )


def test_safetensors_without_their_ending(tmp_path):
    save_file(state("w.weight"), tmp_path / "0123abcd")
    assert list(read_weights(tmp_path / "0123abcd")) == ["w.weight"]


def test_folders_of_trainers(tmp_path):
    folder = tmp_path / "checkpoint-500"
    folder.mkdir()
    save_file(state("w.weight"), folder / "model.safetensors")
    moments = {"state": {0: {"exp_avg": torch.ones(3, 4)}}, "param_groups": []}
    torch.save(moments, folder / "optimizer.pt")
    torch.save(moments, folder / "scheduler.pt")
    (folder / "training_args.bin").write_bytes(b"x")
    (folder / "random_states_0.pkl").write_bytes(b"x")
    found = read_checkpoint(folder)
    assert list(found.tensors) == ["w.weight"]
    assert found.notes == ()
    with pytest.raises(ValueError, match="the state of an optimizer"):
        read_weights(folder / "optimizer.pt")
    with pytest.raises(ValueError, match=r"in folders of their own: .*'checkpoint-500'"):
        read_weights(tmp_path)
    (tmp_path / "checkpoint-600").mkdir()
    save_file(state("w.lora_A.weight"), tmp_path / "checkpoint-600" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"'checkpoint-500', 'checkpoint-600'"):
        read_weights(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"folder without .safetensors"):
        read_weights(folder)
    torch.save(state("v.weight"), folder / "mine.pth")
    found = read_checkpoint(folder)
    assert list(found.tensors) == ["v.weight"]
    assert "mine.pth" in texts(found)
    torch.save(state("v.weight"), folder / "yours.pth")
    with pytest.raises(
        ValueError, match=r"several files of weights, 'mine.pth', 'yours.pth': name"
    ):
        read_weights(folder)


def test_a_pipeline_of_diffusers(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    for name in ("unet", "vae", "scheduler"):
        (tmp_path / name).mkdir()
    for name in ("unet", "vae"):
        save_file(state("w.weight"), tmp_path / name / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"a diffusers pipeline .*/unet; there are 'unet', 'vae'$"):
        read_weights(tmp_path)
    assert list(read_weights(tmp_path / "unet")) == ["w.weight"]


def deepspeed(folder):
    """What DeepSpeed writes, with stage 2 of ZeRO."""
    step = folder / "global_step10"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step10")
    (folder / "zero_to_fp32.py").write_text("")
    flat = {"optimizer_state_dict": {"single_partition_of_fp32_groups": [torch.ones(3)]}}
    torch.save(flat, step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    module = {"module": state("module.w.weight"), "optimizer": None, "param_shapes": []}
    torch.save(module, step / "mp_rank_00_model_states.pt")
    return step


def test_checkpoints_in_pieces_say_what_makes_one_file(tmp_path):
    step = deepspeed(tmp_path / "deepspeed")
    for folder in (tmp_path / "deepspeed", step):
        with pytest.raises(ValueError, match="in pieces: make one file of it with `python zero_to"):
            read_weights(folder)
    assert list(read_weights(step / "mp_rank_00_model_states.pt")) == ["module.w.weight"]
    with pytest.raises(ValueError, match="the state of an optimizer"):
        read_weights(step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save(state("w.weight"), tmp_path / "deepspeed" / "pytorch_model.bin")
    assert list(read_weights(tmp_path / "deepspeed")) == ["w.weight"]

    lightning = tmp_path / "lightning.ckpt"
    deepspeed(lightning / "x")
    (lightning / "x" / "global_step10").rename(lightning / "checkpoint")
    (lightning / "x" / "zero_to_fp32.py").rename(lightning / "zero_to_fp32.py")
    with pytest.raises(ValueError, match="convert_zero_checkpoint_to_fp32_state_dict"):
        read_weights(lightning)

    accelerate = tmp_path / "accelerate"
    (accelerate / "pytorch_model_fsdp_0").mkdir(parents=True)
    (accelerate / "pytorch_model_fsdp_0" / ".metadata").touch()
    with pytest.raises(ValueError, match=r"name one, such as .*pytorch_model_fsdp_0"):
        read_weights(accelerate)
    with pytest.raises(ValueError, match="dcp_to_torch"):
        read_weights(accelerate / "pytorch_model_fsdp_0")

    ranks = tmp_path / "ranks"
    ranks.mkdir()
    torch.save(state("w.weight"), ranks / "consolidated.00.pth")
    assert list(read_weights(ranks)) == ["w.weight"]
    torch.save(state("w.weight"), ranks / "consolidated.01.pth")
    with pytest.raises(ValueError, match="divided among 2 ranks"):
        read_weights(ranks)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_dcp_as_torch_writes_it(tmp_path):
    from torch.distributed.checkpoint import FileSystemWriter, save

    save(state("w.weight"), storage_writer=FileSystemWriter(tmp_path / "a"), no_dist=True)
    with pytest.raises(ValueError, match=r"dcp_to_torch .*/a FILE"):
        read_weights(tmp_path / "a")


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_forward_module.module."],
)
def test_wrappers_of_training_do_not_show(tmp_path, prefix):
    torch.manual_seed(0)
    weights = network().state_dict()
    torch.save(
        {"state_dict": {prefix + name: x for name, x in weights.items()}}, tmp_path / "a.ckpt"
    )
    names = [one.name for one in report(weights).layers]
    assert [one.name for one in report(tmp_path / "a.ckpt").layers] == names
    inside = {}
    for name, x in weights.items():
        module, _, leaf = name.rpartition(".")
        inside[f"{module}._fsdp_wrapped_module.{leaf}"] = x
    save_file(inside, tmp_path / "a.safetensors")
    assert [one.name for one in report(tmp_path / "a.safetensors").layers] == names


@pytest.mark.parametrize(
    ("keys", "taken"),
    [
        (["model", "ema"], "model"),
        (["ema", "model"], "model"),
        (["state_dict_ema", "state_dict"], "state_dict"),
        (["student", "teacher"], "teacher"),
        (["generator", "discriminator"], "generator"),
        (["params_ema", "params"], "params"),
    ],
)
def test_one_of_several_state_dicts_is_taken(tmp_path, keys, taken):
    content = {key: state(f"{key}.weight") for key in keys}
    content["optimizer"] = {"state": {"w": {"exp_avg": torch.ones(3, 4)}}}
    torch.save(content, tmp_path / "a.pt")
    (other,) = set(keys) - {taken}
    found = read_checkpoint(tmp_path / "a.pt")
    assert list(found.tensors) == [f"{taken}.weight"]
    assert texts(found).startswith(f"the weights under '{taken}' were taken; the file also holds")
    assert f"key='{other}'" in texts(found)
    assert list(read_checkpoint(tmp_path / "a.pt", key=other).tensors) == [f"{other}.weight"]
    assert read_checkpoint(tmp_path / "a.pt", key=other).notes == ()
    assert ("", found.notes[0][1]) in report(tmp_path / "a.pt").notes


def test_an_averages_key_alone_is_taken(tmp_path):
    torch.save({"params_ema": state("w.weight")}, tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth")
    assert list(found.tensors) == ["w.weight"]
    assert found.notes == ()


def test_whole_models_say_what_to_save(tmp_path):
    torch.save({"epoch": 1, "model": nn.Linear(3, 3), "ema": None}, tmp_path / "yolo.pt")
    with pytest.raises(ValueError, match=r"no state dict; 'model' is one object, .*state_dict\(\)"):
        read_weights(tmp_path / "yolo.pt")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_is_left_out(tmp_path):
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])
    torch.save({"n": nested, "w.weight": torch.eye(3)}, tmp_path / "a.pt")
    found = read_checkpoint(tmp_path / "a.pt")
    assert list(found.tensors) == ["w.weight"]
    assert found.notes == (("n", "left out: a nested tensor has no shape"),)


def test_states_of_optimizers_are_no_weights(tmp_path):
    by_name = {"layer.weight": {"exp_avg": torch.ones(3, 4), "exp_avg_sq": torch.ones(3, 4)}}
    torch.save({"optim": {"state": by_name}, "net": {"a": 1}}, tmp_path / "a.pt")
    with pytest.raises(
        ValueError, match="no state dict; it holds 'optim', 'net': the state of an o"
    ):
        read_weights(tmp_path / "a.pt")
    torch.save({"mine": by_name, "my_net": state("w.weight")}, tmp_path / "b.pt")
    assert list(read_weights(tmp_path / "b.pt")) == ["w.weight"]


def test_a_prefix_of_names_in_safetensors(tmp_path):
    save_file(state("ema.a.weight", "model.b.weight"), tmp_path / "a.safetensors")
    assert list(read_weights(tmp_path / "a.safetensors", "ema")) == ["a.weight"]
    with pytest.raises(
        ValueError, match="no weights under 'em'; its names start with 'ema', 'model'"
    ):
        read_weights(tmp_path / "a.safetensors", "em")


@pytest.mark.parametrize(
    ("weights", "config", "content"),
    [
        (
            "sae_weights.safetensors",
            "cfg.json",
            {"d_in": 4, "d_sae": 3, "architecture": "standard"},
        ),
        ("sae.safetensors", "cfg.json", {"d_in": 4, "num_latents": 3, "k": 2}),
        ("ae.pt", "config.json", {"trainer": {"dict_size": 3}, "buffer": {}}),
    ],
)
def test_folders_of_sparse_autoencoders(tmp_path, weights, config, content):
    save = torch.save if weights.endswith(".pt") else save_file
    save(state("W_dec", "encoder.weight"), tmp_path / weights)
    save_file({"sparsity": torch.ones(3)}, tmp_path / "sparsity.safetensors")
    (tmp_path / config).write_text(json.dumps(content))
    for path in (tmp_path, tmp_path / weights):
        found = read_checkpoint(path)
        assert set(found.tensors) == {"W_dec", "encoder.weight"}
        assert found.config == content


def test_a_config_of_something_else_is_not_the_models(tmp_path):
    save_file(state("w.weight"), tmp_path / "a.safetensors")
    for text in ("[1]", "{", '{"theme": "dark"}', "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        assert read_checkpoint(tmp_path / "a.safetensors").config is None


def sentence_folder(folder, dense="2_Dense"):
    (folder / "1_Pooling").mkdir()
    (folder / "2_Dense").mkdir()
    save_file(state("encoder.layer.0.weight"), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (folder / "1_Pooling" / "config.json").write_text("{}")
    torch.save(state("linear.weight"), folder / "2_Dense" / "pytorch_model.bin")
    modules = []
    for i, (path, kind) in enumerate((("", "Transformer"), ("1_Pooling", "P"), (dense, "Dense"))):
        modules.append({"idx": i, "name": str(i), "path": path, "type": f"st.models.{kind}"})
    (folder / "modules.json").write_text(json.dumps(modules))


def add_module(folder, kind, path):
    """Add a module to those that a folder of sentence-transformers names."""
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": len(modules), "name": str(len(modules)), "path": path, "type": kind})
    (folder / "modules.json").write_text(json.dumps(modules))


def test_a_folder_of_sentence_transformers(tmp_path):
    sentence_folder(tmp_path)
    found = read_checkpoint(tmp_path)
    assert list(found.tensors) == ["0.encoder.layer.0.weight", "2.linear.weight"]
    assert found.config == {"model_type": "bert"}


@pytest.mark.parametrize(
    "kind",
    [
        "models.Normalize",
        "models.Dropout",
        "models.Pooling",
        "base.modules.normalize.Normalize",
        "sparse_encoder.models.SpladePooling",
    ],
)
def test_modules_without_weights_need_no_folder(tmp_path, kind):
    sentence_folder(tmp_path)
    add_module(tmp_path, f"sentence_transformers.{kind}", "3_Absent")
    found = read_checkpoint(tmp_path)
    assert list(found.tensors) == ["0.encoder.layer.0.weight", "2.linear.weight"]
    assert found.notes == ()


@pytest.mark.parametrize(
    "kind", ["sentence_transformers.models.Dense", "sentence_transformers.models.LayerNorm"]
)
def test_modules_with_weights_need_their_folder(tmp_path, kind):
    sentence_folder(tmp_path)
    add_module(tmp_path, kind, "3_Absent")
    with pytest.raises(ValueError, match=r"names the folder 3_Absent: it is not there"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["mine.Normalize", "sentence_transformers.models", ""])
def test_a_module_of_an_unknown_class_needs_its_folder(tmp_path, kind):
    sentence_folder(tmp_path)
    add_module(tmp_path, kind, "3_Absent")
    with pytest.raises(ValueError, match=r"names the folder 3_Absent: it is not there"):
        read_checkpoint(tmp_path)


def test_an_empty_file_of_a_dropout_is_no_error(tmp_path):
    sentence_folder(tmp_path)
    add_module(tmp_path, "sentence_transformers.models.Dropout", "3_Dropout")
    (tmp_path / "3_Dropout").mkdir()
    torch.save({}, tmp_path / "3_Dropout" / "pytorch_model.bin")
    assert list(read_checkpoint(tmp_path).tensors) == [
        "0.encoder.layer.0.weight",
        "2.linear.weight",
    ]


@pytest.mark.parametrize("dense", ["..", "../x", "/tmp", "a/b", None])
def test_modules_of_sentence_transformers_are_inside(tmp_path, dense):
    sentence_folder(tmp_path, dense)
    with pytest.raises(ValueError, match=r"whose folder is not one inside"):
        read_checkpoint(tmp_path)


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@pytest.mark.parametrize("kept", [False, True])
def test_safetensors_are_read_as_its_own_library_reads_them(tmp_path, monkeypatch, kept):
    from safetensors.torch import load_file

    if kept:
        monkeypatch.setattr("lightning_hsu.report._files.reading.KEPT_IN_FILE", 0)
        monkeypatch.setattr(safetensors_files, "ALWAYS_READ", 16)
    torch.manual_seed(0)
    tensors = {"scalar": torch.tensor(3.0), "none": torch.zeros(0, 5), "odd": torch.ones(3).byte()}
    for i, dtype in enumerate(DTYPES):
        tensors[f"x{i}.weight"] = (10 * torch.rand(5, 7)).to(dtype)
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    expected = load_file(tmp_path / "a.safetensors")
    found = read_checkpoint(tmp_path / "a.safetensors")
    assert set(found.tensors) == set(expected)
    for name, x in expected.items():
        assert found.tensors[name].is_meta == (kept and x.nbytes > 16)
        assert found.tensors[name].shape == x.shape
        assert found.tensors[name].dtype == x.dtype
        numbers = found.load(name)
        assert not numbers.is_meta
        assert numbers.dtype == x.dtype
        assert torch.equal(numbers.double(), x.double())
    read = read_weights(tmp_path / "a.safetensors")
    assert all(torch.equal(read[name].double(), x.double()) for name, x in expected.items())


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no 4-bit floats")
def test_four_bit_floats_have_half_the_columns(tmp_path):
    x = torch.arange(24, dtype=torch.uint8).view(4, 6).view(torch.float4_e2m1fn_x2)
    save_file({"w": x}, tmp_path / "a.safetensors")
    found = read_weights(tmp_path / "a.safetensors")["w"]
    assert found.dtype == torch.float4_e2m1fn_x2
    assert torch.equal(found.view(torch.uint8), x.view(torch.uint8))


def test_limits_of_what_stays_in_the_file():
    assert found_module.KEPT_IN_FILE == 2**28
    assert found_module.ALWAYS_READ == 2**20


READ_IN_TURN = """
import sys
from lightning_hsu.report.checkpoints import read_checkpoint

def most_mebibytes():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) // 1024

before = most_mebibytes()
found = read_checkpoint(sys.argv[1])
stand_ins = sum(x.is_meta for x in found.tensors.values())
count = 0
for name in found.tensors:
    x = found.load(name)
    assert not x.is_meta
    count += x.numel()
    del x
print(stand_ins, count, most_mebibytes() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells the most memory")
def test_a_large_folder_takes_the_memory_of_a_layer(tmp_path):
    layers, rows, columns = 12, 4096, 8192  # of 64 MiB each in bfloat16: 768 MiB
    header, end = {}, 0
    for i in range(layers):
        size = 2 * rows * columns
        places = [end, end + size]
        header[f"layers.{i}.weight"] = {
            "dtype": "BF16",
            "shape": [rows, columns],
            "data_offsets": places,
        }
        end += size
    header["norm.weight"] = {"dtype": "BF16", "shape": [4096], "data_offsets": [end, end + 8192]}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end + 8192)  # a hole, which takes no disk
    found = subprocess.run(
        [sys.executable, "-c", READ_IN_TURN, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    stand_ins, count, mebibytes = map(int, found.stdout.split())
    assert stand_ins == layers
    assert count == layers * rows * columns + 4096
    assert mebibytes < 256  # measured: 65, the size of a layer; all of them are 768


@pytest.mark.parametrize("kept", [False, True])
def test_a_report_does_not_depend_on_where_the_numbers_are(tmp_path, monkeypatch, kept):
    torch.manual_seed(0)
    weights = network().state_dict()
    expected = report(weights)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "none of these"}))
    if kept:
        monkeypatch.setattr("lightning_hsu.report._files.reading.KEPT_IN_FILE", 0)
        monkeypatch.setattr(safetensors_files, "ALWAYS_READ", 0)
    assert read_checkpoint(tmp_path).stays_in_file == kept
    found = report(tmp_path)
    assert found.to_dict()["layers"] == expected.to_dict()["layers"]


@pytest.mark.parametrize("always_read", [20, 400, 1500])
def test_small_parts_of_a_large_layer_may_be_there_already(tmp_path, monkeypatch, always_read):
    torch.manual_seed(0)
    norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(norm(nn.Linear(12, 16)), norm(nn.Conv1d(16, 8, 3), dim=2), nn.LSTM(8, 6))
    prune.random_unstructured(model.append(nn.Linear(6, 9))[-1], "weight", 0.5)
    weights = model.state_dict()
    weights |= {"old.weight_g": torch.rand(7, 1), "old.weight_v": torch.randn(7, 9)}
    weights |= {"q.weight": torch.randn(16, 32).to(torch.float8_e4m3fn)}
    weights |= {"q.weight_scale": torch.rand(16, 1)}
    weights["3.weight_mask"] = weights["3.weight_mask"].half()
    expected = report(weights)
    save_file(weights, tmp_path / "model.safetensors")
    monkeypatch.setattr("lightning_hsu.report._files.reading.KEPT_IN_FILE", 0)
    monkeypatch.setattr(safetensors_files, "ALWAYS_READ", always_read)
    found = report(tmp_path / "model.safetensors")
    assert {one.name: one.uniformity.energy for one in found.layers} == {
        one.name: one.uniformity.energy for one in expected.layers
    }
    assert sorted(found.notes) == sorted(expected.notes)


def test_large_pickles_are_mapped(tmp_path, monkeypatch):
    calls = []
    load = torch.load

    def record(*args, **kwargs):
        calls.append(kwargs["mmap"])
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", record)
    x = torch.randn(20, 30)
    content = {"state_dict": {"w.weight": x}, "kind": nn.Linear, "optimizer_states": [{0: x + 1}]}
    torch.save(content, tmp_path / "a.ckpt")
    torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for limit in (2**28, 0):
        monkeypatch.setattr(unpickle, "_MAPPED_ABOVE", limit)
        if hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
            assert torch.equal(read_weights(tmp_path / "a.ckpt")["w.weight"], x)
            assert calls[-1] == (limit == 0)
    torch.save({"w.weight": x}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_weights(tmp_path / "old.pt")["w.weight"], x)
    assert calls[-1] is False  # it is no zip file


def test_folders_are_compared(tmp_path):
    for i, name in enumerate(("a", "b")):
        torch.manual_seed(i)
        (tmp_path / name).mkdir()
        save_file(network().state_dict(), tmp_path / name / "model.safetensors")
    found = compare(tmp_path / "a", tmp_path / "b")
    names = [one.name for one in report(tmp_path / "a").layers]
    assert [one.after.name for one in found.layers] == names
    assert all(one.moved > 0 for one in found.layers)

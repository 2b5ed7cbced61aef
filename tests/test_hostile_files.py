"""Files that ask for too much, lie about themselves or cannot be opened: a line, and soon."""

import gzip
import json
import lzma
import os
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_hsu.report import unpickle
from lightning_hsu.report.checkpoints import read_checkpoint, read_weights
from lightning_hsu.report.cli import main

NO_PIPES = not hasattr(os, "mkfifo")


def written(path, header, numbers=b""):
    """A .safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + numbers)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


READ_ALL = """
import sys
from lightning_hsu.report.checkpoints import read_weights
for path in sys.argv[1:]:
    try:
        read_weights(path)
        print("read")
    except ValueError as error:
        print(error)
"""


@pytest.mark.skipif(NO_PIPES, reason="this system has no named pipes")
def test_pipes_sockets_and_devices_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "f.safetensors")
    os.mkfifo(tmp_path / "f.pt")
    (tmp_path / "link.ckpt").symlink_to(tmp_path / "f.pt")
    for folder, name in (("a", "model.safetensors"), ("b", "any.safetensors"), ("c", "x.bin")):
        (tmp_path / folder).mkdir()
        os.mkfifo(tmp_path / folder / name)
    save_file({"w.weight": torch.eye(3)}, tmp_path / "c" / "model.safetensors")
    os.mkfifo(tmp_path / "c" / "config.json")
    (tmp_path / "d").mkdir()
    index = {"weight_map": {"w.weight": "x.safetensors"}}
    (tmp_path / "d" / "model.safetensors.index.json").write_text(json.dumps(index))
    os.mkfifo(tmp_path / "d" / "x.safetensors")
    here = ["f.safetensors", "f.pt", "link.ckpt", "a", "b", "c", "d"]
    paths = [str(tmp_path / name) for name in here] + ["/dev/null"]
    found = subprocess.run(
        [sys.executable, "-c", READ_ALL, *paths],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    lines = found.stdout.splitlines()
    kinds = ["pipe", "pipe", "pipe", "no regular", "no regular", "read", "not there", "a device"]
    assert len(lines) == len(kinds)
    for line, kind in zip(lines, kinds, strict=True):
        assert kind in line


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this system has no socket files")
def test_a_socket_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("s.pt")
        with pytest.raises(ValueError, match=r"s.pt is a socket, not a file of weights"):
            read_weights("s.pt")


def test_links_in_a_circle_or_to_nothing(tmp_path):
    (tmp_path / "a.pt").symlink_to(tmp_path / "b.pt")
    (tmp_path / "b.pt").symlink_to(tmp_path / "a.pt")
    (tmp_path / "c.pt").symlink_to(tmp_path / "none.pt")
    for name in ("a.pt", "c.pt"):
        with pytest.raises(FileNotFoundError, match=f"{name} is a link that leads to no file"):
            read_weights(tmp_path / name)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inner").symlink_to(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"folder without .safetensors"):
        read_weights(tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_weights("a\0b")


def test_archives_are_told_for_what_they_are(tmp_path):
    weights_file = tmp_path / "a.pt"
    torch.save({"fc.weight": torch.randn(4, 8)}, weights_file)
    with tarfile.open(tmp_path / "a.nemo", "w") as archive:
        archive.add(weights_file, "model_weights.ckpt")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(weights_file, "model/model_weights.ckpt")
        archive.writestr("config.json", "{}")
    (tmp_path / "a.pt.gz").write_bytes(gzip.compress(weights_file.read_bytes()))
    (tmp_path / "a.pt.xz").write_bytes(lzma.compress(weights_file.read_bytes()))
    for name, words in (
        ("a.nemo", r"is an archive of files \('model_weights.ckpt'\): unpack it"),
        ("a.zip", r"is an archive of files \('model/model_weights.ckpt', 'config.json'\)"),
        ("a.pt.gz", "is compressed by gzip: unpack it"),
        ("a.pt.xz", "is compressed by xz: unpack it"),
    ):
        with pytest.raises(ValueError, match=f"{name} {words}"):
            read_weights(tmp_path / name)
    assert list(read_weights(weights_file)) == ["fc.weight"]


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("a.npz", b"PK\x03\x04"),
        ("a.npy", b"\x93NUMPY"),
        ("a.bin", b"\x93NUMPY"),
        ("a.h5", b"\x89HDF\r\n\x1a\n"),
        ("a.pt", b"\x89HDF\r\n\x1a\n"),
        ("a.keras", b"PK\x03\x04"),
        ("a.onnx", b"\x08\x07"),
        ("a.gguf", b"GGUF"),
        ("a.bin", b"GGUF"),
        ("flax_model.msgpack", b"\x81"),
        ("a.tflite", b"\x00\x00\x00\x00TFL3"),
        ("rust_model.ot", b"PK\x03\x04"),
        ("model.ckpt.index", b"\x00"),
        ("model.ckpt.data-00000-of-00001", b"\x00\x01"),
    ],
)
def test_other_formats_say_what_to_do(tmp_path, name, start):
    with (tmp_path / name).open("wb") as file:
        file.write(start)
        file.truncate(2**40)  # a hole: reading it would not end
    with pytest.raises(
        ValueError, match=r"is not read here: load it .* lightning_hsu.report.report"
    ):
        read_weights(tmp_path / name)


def test_torch_files_under_the_name_of_another_format_are_read(tmp_path):
    torch.save({"a.weight": torch.eye(3)}, tmp_path / "a.h5")
    assert list(read_weights(tmp_path / "a.h5")) == ["a.weight"]


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["saved_model.pb"], "SavedModel"),
        (["_CHECKPOINT_METADATA", "d"], "Orbax"),
        (["model.ckpt-1.index", "model.ckpt-1.data-00000-of-00001"], "TensorFlow checkpoint"),
        (["model.gguf"], "GGUF"),
        (["flax_model.msgpack"], "Flax"),
    ],
)
def test_folders_of_other_formats(tmp_path, names, kind):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"{kind}.*is not read here"):
        read_weights(tmp_path)


def test_a_tensor_that_repeats_its_numbers_is_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(1).expand(200_000, 200_000)}, tmp_path / "a.pt")
    with pytest.raises(
        ValueError,
        match=r"a.pt: fc.weight \(200000, 200000\) asks for 160,000,000,000 bytes of which the "
        "file holds 4: its numbers are repeated",
    ):
        read_weights(tmp_path / "a.pt")
    overlapping = torch.zeros(20_000).as_strided((10_000, 10_000), (1, 1))
    torch.save({"fc.weight": overlapping}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="its numbers are repeated"):
        read_weights(tmp_path / "b.pt")
    torch.save({"fc.weight": torch.ones(8, 1).expand(8, 16)}, tmp_path / "small.pt")
    assert read_weights(tmp_path / "small.pt")["fc.weight"].shape == (8, 16)


class Expanded(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.zeros(1).expand(200_000, 200_000))

    def forward(self, x: torch.Tensor):
        return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of TorchScript
@pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch scripts no modules there")
def test_torchscript_that_repeats_its_numbers_is_refused(tmp_path):
    torch.jit.script(Expanded()).save(str(tmp_path / "a.pt"))
    with pytest.raises(ValueError, match=r"a.pt is not a TorchScript.*its numbers are repeated"):
        read_weights(tmp_path / "a.pt")


def torchscript(path, objects, compression=zipfile.ZIP_STORED, extra=b""):
    """A zip file with a pickle, that torch takes for TorchScript."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x/constants.pkl", b"\x80\x02).", zipfile.ZIP_STORED)
        archive.writestr("x/data.pkl", objects)
        archive.writestr("x/data/0", extra)
        archive.writestr("x/version", b"3\n", zipfile.ZIP_STORED)


def test_zip_bombs_are_refused(tmp_path):
    torchscript(tmp_path / "a.pt", b"\x80\x02}.", zipfile.ZIP_DEFLATED, bytes(100 * 2**20))
    assert (tmp_path / "a.pt").stat().st_size < 2**20
    torch.save({"w": torch.eye(3)}, tmp_path / "good.pt")
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as good,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as bad,
    ):
        for name in good.namelist():
            content = good.read(name)
            bad.writestr(name, content + bytes(100 * 2**20) if "data/0" in name else content)
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match=rf"{name} of [\d,]+ bytes asks for 1\d\d,\d+,\d+: it"):
            read_weights(tmp_path / name)


def test_a_zip_file_in_several_parts(tmp_path):
    torch.save({"w.weight": torch.eye(3)}, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    place = content.rindex(b"PK\x06\x07")  # where the directory's end is, in archives past 4 GB
    content[place + 16] = 2  # the number of parts
    (tmp_path / "a.pt").write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"a.pt is cut short"):
        read_weights(tmp_path / "a.pt")


@pytest.mark.parametrize("mapped_above", [0, 2**60])
def test_compressed_numbers_are_read_as_what_they_are(tmp_path, monkeypatch, mapped_above):
    monkeypatch.setattr(unpickle, "_MAPPED_ABOVE", mapped_above)
    x = torch.arange(400.0).view(20, 20)
    torch.save({"w.weight": x}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as good,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in good.namelist():
            packed.writestr(name, good.read(name))
    for name in ("a.pt", "b.pt"):
        assert torch.equal(read_weights(tmp_path / name)["w.weight"], x)


def test_torchscript_whose_objects_hold_each_other(tmp_path):
    deep = b"c__torch__\nM\n)\x81}X\x01\x00\x00\x00a"
    nested = b"\x80\x02" + deep * 400 + b"N" + b"sb" * 400 + b"."
    torchscript(tmp_path / "deep.pt", nested)
    # One object whose two attributes are the same object, 60 times: 2^60 paths.
    one = b"\x80\x02N"
    for i in range(60):
        memo = bytes([i])
        one += b"q" + memo + b"0c__torch__\nM\n)\x81}(X\x01\x00\x00\x00ah" + memo
        one += b"X\x01\x00\x00\x00bh" + memo + b"ub"
    torchscript(tmp_path / "wide.pt", one + b".")
    itself = b"\x80\x02c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb."
    torchscript(tmp_path / "itself.pt", itself)
    for name in ("deep.pt", "wide.pt", "itself.pt"):
        with pytest.raises(ValueError, match=f"{name}.*hold each other more often"):
            read_weights(tmp_path / name)
    numbered = b"\x80\x02Nr\xff\xff\xff\xff."  # would be object 4,294,967,295 of a list
    torchscript(tmp_path / "numbered.pt", numbered)
    assert read_weights(tmp_path / "numbered.pt") == {}


def test_mappings_that_hold_each_other(tmp_path):
    content = {"w": 1}
    for _ in range(4):
        content = {f"key{i}": content for i in range(300)}
    torch.save(content, tmp_path / "wide.pt")  # 300^4 paths
    with pytest.raises(ValueError, match=r"no state dict; it holds 'key0'.* and 280 more"):
        read_weights(tmp_path / "wide.pt")
    deep = []
    for _ in range(100):
        deep = [deep]
    torch.save({"w.weight": torch.eye(3), "deep": deep}, tmp_path / "deep.pt")
    assert list(read_weights(tmp_path / "deep.pt")) == ["w.weight"]
    with (
        zipfile.ZipFile(tmp_path / "deep.pt") as good,
        zipfile.ZipFile(tmp_path / "deeper.pt", "w") as bad,
    ):
        for name in good.namelist():
            nested = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
            bad.writestr(name, nested if name.endswith("data.pkl") else good.read(name))
    with pytest.raises(ValueError, match=r"deeper.pt has no state dict; it holds list"):
        read_weights(tmp_path / "deeper.pt")


@pytest.mark.parametrize("name", ["." * 3000 + "weight", "w" * 1_000_000])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_name_that_no_model_has(tmp_path, name, ending, capsys):
    path = tmp_path / f"a.{ending}"
    if ending == "pt":
        torch.save({name: torch.eye(3)}, path)
    else:
        save_file({name: torch.eye(3)}, path)
    assert main(["report", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"holds a name of {len(name):,} characters" in error
    assert len(error) < 500
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("header", "numbers", "message"),
    [
        ({"w": entry([2, 2], 0, 16)}, bytes(12), "cut short"),
        ({"w": entry([2, 2], 0, 16)}, bytes(20), "cut short or damaged"),
        ({"w": entry([2, 2], 4, 20)}, bytes(20), "do not follow"),
        ({"w": entry([2, 2], 0, 16), "v": entry([2], 8, 16)}, bytes(16), "do not follow"),
        ({"w": entry([200_000, 200_000], 0, 16)}, bytes(16), "takes 160,000,000,000 bytes"),
        ({"w": entry([2, -2], 0, 16)}, bytes(16), "no length"),
        ({"w": entry([2, 2.0], 0, 16)}, bytes(16), "no length"),
        ({"w": entry([2**70, 0], 0, 0)}, b"", "no length"),
        ({"w": entry([1] * 100, 0, 4)}, bytes(4), "100 axes"),
        ({"w": entry([2, 2], 16, 0)}, bytes(16), "ends before"),
        ({"w": {"dtype": "F32"}}, b"", "shape"),
        ({"w": 3}, b"", "subscriptable"),
        ([1], b"", "no mapping"),
        (b'{"w": {}, "w": {}}', b"", "a name twice"),
        (b"{" * 100, b"", "cannot be read|can be read"),
        (b'{"a":' * 100_000, b"", "can be read"),
        (b"\xff\xfe", b"", "can be read"),
    ],
)
def test_headers_that_lie(tmp_path, header, numbers, message):
    path = written(tmp_path / "a.safetensors", header, numbers)
    with pytest.raises(ValueError, match=f"a.safetensors is not a .safetensors.*({message})"):
        read_weights(path)


@pytest.mark.parametrize("length", [2**63, 2**40, 101, 0])
def test_a_header_longer_than_the_file(tmp_path, length):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" * 50)
    with pytest.raises(ValueError, match=r"a.safetensors is not a .safetensors file"):
        read_weights(tmp_path / "a.safetensors")


def test_a_dtype_that_torch_does_not_have_is_left_out(tmp_path):
    header = {"v": entry([4], 0, 3, "F6_E2M3"), "w.weight": entry([2, 2], 3, 19)}
    found = read_checkpoint(written(tmp_path / "a.safetensors", header, bytes(19)))
    assert list(found.tensors) == ["w.weight"]
    assert found.notes == (("v", "left out: torch has no dtype F6_E2M3"),)


def test_a_pointer_of_git_lfs(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        read_weights(tmp_path)


def test_what_is_quoted_is_short(tmp_path):
    names = ["n" * 500 + str(i) for i in range(50)]
    torch.save({name: {"w": torch.eye(3)} for name in names}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="several state dicts") as error:
        read_weights(tmp_path / "a.pt")
    assert len(str(error.value)) < 20 * 100 + 300
    with pytest.raises(ValueError, match="no state dict under") as error:
        read_weights(tmp_path / "a.pt", "k" * 10_000)
    assert len(str(error.value)) < 20 * 100 + 500


def test_a_file_without_weights_is_named(tmp_path, capsys):
    header = {"a.weight": {"dtype": "F5", "shape": [4, 4], "data_offsets": [0, 64]}}
    for name, its_header, numbers in (("none", {}, b""), ("other", header, bytes(64))):
        written = json.dumps(its_header).encode()
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(struct.pack("<Q", len(written)) + written + numbers)
        assert main(["report", str(path)]) == 2
        assert f"{path} holds no weights that can be read" in capsys.readouterr().err
        assert main(["compare", str(path), str(path)]) == 2
        said = capsys.readouterr().err
        assert f"{path} holds no weights that can be read" in said
        assert ("a.weight: left out: torch has no dtype F5" in said) == bool(its_header)


@pytest.mark.parametrize("count", [9, 10**9, 10**20])
def test_more_parts_than_a_layer_has_rows_are_refused_at_once(tmp_path, capsys, count):
    path = tmp_path / "model.safetensors"
    save_file({"fc.weight": torch.randn(8, 16)}, path)
    assert main(["report", str(path), "--neurons", f"fc={count}"]) == 2
    assert f"do not divide into {count} equal parts" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--html", "--json"])
def test_an_empty_name_of_a_file_to_write_is_refused(tmp_path, capsys, option):
    path = tmp_path / "model.safetensors"
    save_file({"fc.weight": torch.randn(8, 16)}, path)
    assert main(["report", str(path), option, ""]) == 2
    assert f"{option} needs the name of a file" in capsys.readouterr().err


def test_an_empty_name_is_not_the_folder_that_one_is_in(tmp_path, capsys, monkeypatch):
    save_file({"fc.weight": torch.randn(8, 16)}, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert main(["report", ""]) == 2
    assert main(["compare", "model.safetensors", ""]) == 2
    assert capsys.readouterr().err.count("the name of the file to read is empty") == 2


@pytest.mark.parametrize(
    "content", [b"", b'{"model_type":', b'{"model_type": "\xe9"}', b'{"a":' * 50_000]
)
def test_a_config_that_cannot_be_read_is_told(tmp_path, capsys, content):
    save_file({"fc.weight": torch.randn(8, 16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(content)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = read_checkpoint(path)
        assert found.config is None
        assert len(found.notes) == 1
        assert "config.json is" in found.notes[0][1]
        assert found.notes[0][1].endswith(": read by names and shapes")
        assert main(["report", str(path)]) == 0
        assert "by names and shapes" in " ".join(capsys.readouterr().out.split())

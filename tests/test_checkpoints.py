"""Weights from files of every kind: nothing in them is run, and what cannot be read says why."""

import collections
import os
import sys
import types
import zipfile
from contextlib import suppress

import pytest
import torch
from torch import nn

from lightning_hsu.report import report
from lightning_hsu.report.checkpoints import read_weights
from lightning_hsu.report.cli import main


class Hostile:
    """Runs a command when it is unpickled the usual way."""

    def __init__(self, target, kind):
        self.target, self.kind = target, kind

    def __reduce__(self):
        if self.kind == "command":
            return os.system, (f"touch {self.target}",)
        return eval, (f"open({str(self.target)!r}, 'w')",)


@pytest.mark.parametrize("kind", ["command", "eval"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_file_does_not_run(tmp_path, kind, legacy):
    torch.save(
        {"w": torch.eye(3), "x": Hostile(tmp_path / "run", kind)},
        tmp_path / "a.pt",
        _use_new_zipfile_serialization=not legacy,
    )
    with suppress(ValueError):  # it is refused, or what it would run is left out
        assert torch.equal(read_weights(tmp_path / "a.pt")["w"], torch.eye(3))
    assert not (tmp_path / "run").exists()


def test_objects_of_other_projects_are_left_empty(tmp_path, monkeypatch):
    class Settings(dict):
        pass

    class State:
        def __init__(self):
            self.value = 1

    other = types.ModuleType("another_project")

    class Names(list):
        pass

    class Both(dict):
        pass

    for kind in (Settings, State, Names, Both):
        kind.__module__, kind.__qualname__ = "another_project", kind.__name__
        setattr(other, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "another_project", other)
    both = Both(a=Names([State()]))
    both.notes = [Settings(a=1)]
    for extra in (
        Settings(a=1),
        State(),
        Names([1, 2]),
        collections.deque([1, 2]),
        both,
        [Names([Settings(a=State())]), State()],
    ):
        torch.save({"state_dict": {"a.weight": torch.eye(3)}, "extra": extra}, tmp_path / "a.ckpt")
        if hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
            assert list(read_weights(tmp_path / "a.ckpt")) == ["a.weight"]
        else:
            with pytest.raises(ValueError, match="without running code"):
                read_weights(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 1}, "no state dict; it holds 'epoch'"),
        (
            {"one": {"w": torch.eye(2)}, "two": {"w": torch.eye(2)}},
            "several state dicts; it holds 'one', 'two'; choose one with --key",
        ),
        ([torch.eye(2)], "no state dict; it holds list"),
    ],
)
def test_files_without_weights(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "a.pt")


def test_broken_files(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "cut.pt").write_bytes(b"\x80\x02 and no more")
    words = {
        "text.pt": "not a file of weights",
        "empty.pt": "empty",
        "text.safetensors": "not a .safetensors",
        "cut.pt": "running code",
        "cut_zip.pt": "is cut short",
        "script.pt": "cannot be read",
        "directory.pt": "cannot be read",
    }
    torch.save({"w": torch.eye(30)}, tmp_path / "whole.pt")
    (tmp_path / "cut_zip.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:500])
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("x/constants.pkl", b"")
    whole = (tmp_path / "whole.pt").read_bytes()
    place = whole.rindex(b"PK\x01\x02")  # an entry of the directory at its end
    (tmp_path / "directory.pt").write_bytes(whole[:place] + b"XX" + whole[place + 2 :])
    for name, message in words.items():
        with pytest.raises(ValueError, match=f"{name} .*{message}"):
            read_weights(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_weights(tmp_path / "none.pt")
    (tmp_path / "sharded.ckpt").mkdir()
    (tmp_path / "sharded.ckpt" / ".metadata").touch()
    with pytest.raises(ValueError, match="consolidate_checkpoint"):
        read_weights(tmp_path / "sharded.ckpt")


def test_a_key_names_the_state_dict(tmp_path):
    torch.save(
        {"model": {"w.weight": torch.eye(3)}, "ema": {"v.weight": torch.eye(4)}}, tmp_path / "a.pt"
    )
    assert list(read_weights(tmp_path / "a.pt")) == ["w.weight"]
    assert list(read_weights(tmp_path / "a.pt", "ema")) == ["v.weight"]
    with pytest.raises(
        ValueError,
        match="no state dict under 'none'; it holds 'model', 'ema'; choose one with --key",
    ):
        read_weights(tmp_path / "a.pt", "none")


def test_a_matrix_beside_the_state_dict(tmp_path):
    state = {"w.weight": torch.eye(3)}
    torch.save({"class_weights": torch.ones(3, 3), "model": state}, tmp_path / "a.pt")
    assert list(read_weights(tmp_path / "a.pt")) == ["w.weight"]
    torch.save({**state, "stats": {"confusion": torch.ones(3, 3)}}, tmp_path / "b.pt")
    assert list(read_weights(tmp_path / "b.pt")) == ["w.weight"]


def test_state_dicts_within_others(tmp_path):
    state = {"w.weight": torch.eye(3)}
    torch.save({"model": {"inner": {"weights": state}}, "epoch": 3}, tmp_path / "a.pt")
    assert list(read_weights(tmp_path / "a.pt")) == ["w.weight"]
    assert list(read_weights(tmp_path / "a.pt", "model.inner.weights")) == ["w.weight"]
    with pytest.raises(
        ValueError,
        match=r"no state dict under 'model'; it holds 'model.inner.weights'; choose one with --key",
    ):
        read_weights(tmp_path / "a.pt", "model")
    torch.save({"gan": {"g": state, "d": state}}, tmp_path / "b.pt")
    with pytest.raises(
        ValueError, match=r"several state dicts; it holds 'gan.g', 'gan.d'; choose one with --key"
    ):
        read_weights(tmp_path / "b.pt")
    moments = {0: {"exp_avg": torch.eye(3)}}
    torch.save(
        {
            "my_net": state,
            "optimizer": {"state": moments},
            "more": {"optimizer": {"state": moments}},
        },
        tmp_path / "c.pt",
    )
    assert list(read_weights(tmp_path / "c.pt")) == ["w.weight"]
    torch.save({"deep": {"my_net": state, "optimizer": {"state": moments}}}, tmp_path / "d.pt")
    assert list(read_weights(tmp_path / "d.pt")) == ["w.weight"]


def test_a_folder_with_two_sets_of_weights(tmp_path):
    from safetensors.torch import save_file

    save_file({"a.weight": torch.eye(3)}, tmp_path / "model-1.safetensors")
    save_file({"b.weight": torch.eye(3)}, tmp_path / "model-2.safetensors")
    assert list(read_weights(tmp_path)) == ["a.weight", "b.weight"]
    save_file({"a.weight": torch.ones(3, 3)}, tmp_path / "ema.safetensors")
    with pytest.raises(
        ValueError,
        match=r"more than one set of weights \(a.weight is also in model-1.safetensors\): name one",
    ):
        read_weights(tmp_path)


class Writer(nn.Module):
    """Scripted, it writes a file when it is loaded."""

    def __init__(self):
        super().__init__()
        self.w = torch.eye(4)

    def forward(self, x):
        return x @ self.w

    @torch.jit.export
    def __getstate__(self):
        return self.w, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        self.w = state[0]
        self.training = state[1]
        torch.save(state[0], "PWNED")


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.fc = Writer(), nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.inner(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of TorchScript
@pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch scripts no modules there")
def test_hostile_torchscript_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.save(torch.jit.script(Holder()), "innocent.ckpt")
    torch.jit.load("innocent.ckpt")
    assert (tmp_path / "PWNED").exists()  # torch's own loader runs it
    (tmp_path / "PWNED").unlink()
    assert list(read_weights("innocent.ckpt")) == [
        "fc.weight",
        "fc.bias",
    ]  # a state of one's own making is not looked into
    assert main(["report", "innocent.ckpt"]) == 0
    assert not (tmp_path / "PWNED").exists()


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (3, 1)), nn.Conv1d(3, 5, 1))
        self.rnn = nn.LSTM(1, 8)

    def forward(self, x):
        return self.rnn(self.body(x))[0]


DEFAULT = b"""x: Tensor, y: Tensor=torch.copy_(torch.from_file("PWNED", True, 4, dtype=0),
 torch.tensor([101, 99, 104, 111], dtype=0))) -> Tensor:"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of TorchScript
@pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch scripts no modules there")
def test_torchscript_whose_classes_run_when_they_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = Plain()
    torch.jit.script(model).save("good.pt")
    with zipfile.ZipFile("good.pt") as good, zipfile.ZipFile("bad.pt", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, good.read(name).replace(b"x: Tensor) -> Tensor:", DEFAULT))
    for name in ("good.pt", "bad.pt"):
        found = read_weights(name)
        assert {key for key, x in found.items() if x.ndim > 1} == {
            key for key, x in model.state_dict().items() if x.ndim > 1
        }
        assert all(torch.equal(found[key], x) for key, x in model.state_dict().items())
        assert not (tmp_path / "PWNED").exists()
    torch.jit.load("bad.pt")
    assert (tmp_path / "PWNED").read_bytes() == b"echo"  # torch's own loader runs it


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of TorchScript
@pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch scripts no modules there")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_torchscript_of_every_dtype_and_stride(tmp_path, dtype):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)).to(dtype)
    model[0].weight = nn.Parameter(torch.randn(4, 3).to(dtype).T)
    model[1].weight = nn.Parameter(model[0].weight.data.T)  # one storage
    model.register_buffer("count", torch.tensor(3))
    model.register_buffer("none", torch.zeros(0, 5))
    torch.jit.script(model).save(str(tmp_path / "a.pt"))
    found = read_weights(tmp_path / "a.pt")
    for key, x in model.state_dict().items():
        assert found[key].dtype == x.dtype
        assert torch.equal(found[key], x)
    assert found["0.weight"].data_ptr() == found["1.weight"].data_ptr()


def test_a_pickle_that_speaks_like_torch_does_not_loop(tmp_path):
    torch.save({"w": torch.eye(3)}, tmp_path / "a.pt")
    texts = {b"x but got <class 'Opaque0'>": "running code", b"x\x1b[2J": "running code"}
    for i, (text, message) in enumerate(texts.items()):
        with (
            zipfile.ZipFile(tmp_path / "a.pt") as good,
            zipfile.ZipFile(tmp_path / f"b{i}.pt", "w") as bad,
        ):
            for name in good.namelist():
                bad.writestr(
                    name,
                    b"\x80\x02cos\n" + text + b"\n."
                    if name.endswith("data.pkl")
                    else good.read(name),
                )
        with pytest.raises(ValueError, match=message):
            read_weights(tmp_path / f"b{i}.pt")


def test_errors_do_nothing_to_a_terminal(tmp_path, capsys):
    from safetensors.torch import save_file

    for name in ("a", "b"):
        save_file({"w\x1b[2J.weight": torch.eye(3)}, tmp_path / f"{name}.safetensors")
    assert main(["report", str(tmp_path)]) == 2
    assert main(["report", str(tmp_path / "a.safetensors")]) == 0
    found = capsys.readouterr()
    assert "\x1b" not in found.out + found.err
    assert r"\x1b[2J" in found.out
    assert "more than one set of weights" in found.err
    torch.save({"a\x1b.weight": torch.eye(3), r"a\x1b.weight": torch.eye(4)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="differ only in control characters"):
        read_weights(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of TorchScript
@pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch scripts no modules there")
def test_torchscript_in_memory_is_read_as_its_file():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5))
    assert [one.name for one in report(torch.jit.script(model)).layers] == ["0", "1"]


def test_names_do_nothing_to_a_terminal(tmp_path, capsys):
    torch.save(
        {
            "a\x1b[2J.weight": torch.eye(4),
            "b\nc.weight": torch.eye(4),
            "größe.weight": torch.eye(4),
        },
        tmp_path / "a.pt",
    )
    assert list(read_weights(tmp_path / "a.pt")) == [
        r"a\x1b[2J.weight",
        r"b\nc.weight",
        "größe.weight",
    ]
    assert main(["report", str(tmp_path / "a.pt")]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "names",
    [
        ["a..b.weight"],
        ["type.weight", "type.x.weight"],
        ["training.weight"],
        ["weight", "weight.weight"],
        ["state_dict.weight"],
    ],
)
def test_names_that_modules_have_for_themselves(tmp_path, names):
    torch.manual_seed(0)
    state = {name: torch.randn(6, 8) for name in names}
    found = report(state)
    assert [one.name for one in found.layers] == [
        name.removesuffix("weight").strip(".") or "weight" for name in names
    ]
    for name, one in zip(names, found.layers, strict=True):
        assert one.uniformity.min_angle > 1.0, name


def test_weights_without_numbers_say_so(tmp_path):
    torch.save(
        {
            "a.weight": torch.empty(4, 4, device="meta"),
            "b.weight": torch.eye(4),
            "c.weight": torch.eye(4).to_sparse(),
        },
        tmp_path / "a.pt",
    )
    found = report(tmp_path / "a.pt")
    assert [one.name for one in found.layers] == ["b"]
    reasons = {skip.name: skip.reason for skip in found.skips}
    assert "holds no numbers" in reasons["a.weight"]
    assert "to_dense" in reasons["c.weight"]
    with pytest.raises(
        ValueError, match=r"weight \(4, 4\): it holds no numbers yet \(device meta\)"
    ):
        report(nn.Linear(4, 4, device="meta"))
    torch.save({"a.weight": torch.ones(4, 4, dtype=torch.int8)}, tmp_path / "b.pt")
    with pytest.raises(
        ValueError,
        match=r"b.pt: no layer of StateDict is left to measure; .*(\n.*)*torch.int8, not floating",
    ):
        report(tmp_path / "b.pt")


def test_heads_come_last_whatever_order_a_file_has(tmp_path):
    from safetensors.torch import save_file

    state = {
        f"{name}.weight": torch.randn(6, 8)
        for name in ("classifier", "layer.10", "layer.9", "layer.2")
    }
    save_file(state, tmp_path / "a.safetensors")
    found = report(tmp_path / "a.safetensors")
    assert [(one.name, one.full_space) for one in found.layers] == [
        ("layer.2", False),
        ("layer.9", False),
        ("layer.10", False),
        ("classifier", True),
    ]

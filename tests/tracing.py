"""Which of the package's own functions a call, or a hook of the callback, goes through."""

import sys
from functools import partial
from pathlib import Path

import lightning_hsu
from lightning_hsu import HypersphericalUniformity

PACKAGE = Path(lightning_hsu.__file__).parent
_PREFIX = f"{PACKAGE.as_posix()}/"


def files_called(act):
    """The file of each call of the package's own functions while something is done, in order."""
    files = []

    def note(frame, event, argument):
        name = Path(frame.f_code.co_filename).as_posix()
        if event == "call" and name.startswith(_PREFIX):
            files.append(name.removeprefix(_PREFIX))

    _profiled(act, note)
    return files


def count_calls(act):
    """How many functions are called while something is done, built-in ones included."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    _profiled(act, note)
    return count


def _profiled(act, note):
    """Do something while each call is noted."""
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(before)


class Traced(HypersphericalUniformity):
    """Notes the files that its two hooks of a step call, at each step."""

    def __init__(self):
        super().__init__(coefficient=1e-3, verbose=False)
        self.before_step = []
        self.after_batch = []

    def on_before_optimizer_step(self, *args):
        hook = partial(super().on_before_optimizer_step, *args)
        self.before_step.append(files_called(hook))

    def on_train_batch_end(self, *args):
        hook = partial(super().on_train_batch_end, *args)
        self.after_batch.append(files_called(hook))

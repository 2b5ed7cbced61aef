"""Convolutions of a state dict that are transposed or grouped, as the layers beside them show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from lightning_hsu._neurons.candidates import full_name
from lightning_hsu._neurons.hints import Hint
from lightning_hsu._neurons.how import WeightRule
from lightning_hsu._neurons.runs import Reading, Runs, divide
from lightning_hsu._neurons.shapes import Shape, Shapes, words
from lightning_hsu._neurons.widths import Scope, Widths

_TRANSPOSED_WORDS = {
    "up",
    "ups",
    "upconv",
    "upconvs",
    "upsample",
    "upsampler",
    "upsampling",
    "upscore",
    "deconv",
    "deconvs",
    "deconvolution",
    "transpose",
    "transposed",
    "convtranspose",
    "convtransposed",
    "convt",
    "tconv",
    "trans",
    "dconv",
}

_DEPTHWISE_WORDS = {"dw", "dwconv", "depthwise"}
_GROUP_WORDS = {"group", "grouped", "gconv"}
_POSITION_WORDS = {"pos", "position", "positions", "positional"}
_MOST_OF_A_PICTURE = 16  # channels that a picture may have
_IF_NOT = "if it is grouped, report the model itself"
_HALVING_WORDS = {
    "sr",
    "down",
    "downs",
    "downsample",
    "downsampler",
    "downsamplers",
    "reduce",
    "reduction",
    "patch",
    "merge",
    "merging",
    "proj",
    "stem",
    "enc",
    "encoder",
    "embed",
    "embeddings",
    "disc",
    "discriminator",
}


class _Before(NamedTuple):
    """What comes before a layer.

    Args:
        channels: How many channels come in; None if that is not known.
        is_sure: Whether that is sure, and not only of a layer that may stand beside it.
        in_list: Whether both are in one numbered list.
    """

    channels: int | None = None
    is_sure: bool = False
    in_list: bool = False


class Kernels:
    """Tells how the kernels of convolutions are read, beyond what their biases say.

    Args:
        shapes: The shapes of all tensors.
    """

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._widths = Widths(shapes)
        self._runs = Runs(shapes)
        self._channels: set[int] | None = None
        self._first: tuple[str, Shape] | None = None

    def hint(self, path: str, leaf: str, shape: Shape) -> Hint | None:
        """How kernels are read; None as their shape and bias say.

        Args:
            path: Path of the layer.
            leaf: Name of the weight.
            shape: (out, in / groups, *kernel), transposed (in, out / groups, *kernel), or with the
                outputs last, as Keras and Flax have them.
        """
        if leaf == "kernel":
            return self._outputs_last(path, shape)
        if leaf != "weight" or 0 in shape:
            return None
        bias = self._shapes.vector(path)
        if bias is not None and bias != shape[0]:
            return self._contradicted(path, shape, bias)
        reading = self._runs.reading(path)
        if reading is not None and reading.is_transposed:
            return self._transposed(path, reading)
        before = self._before(path, shape)
        if bias is None or shape[0] == shape[1]:
            outputs = self._outputs(path)
            is_chain = before.is_sure and before.in_list
            if self._is_transposed(shape, before.channels if is_chain else None, outputs):
                return Hint(WeightRule("weight", columns=True, kernels=True), "convolution")
            hint = self._doubtful(path, shape, bias, outputs)
            if hint is not None:
                return hint
        hint = self._grouped(path, shape, before) or self._as_block_shows(path, shape)
        if reading is not None and reading.is_open:
            return self._open(path, hint)
        return hint

    def _transposed(self, path: str, reading: Reading) -> Hint:
        """Kernels (in, out / groups, *kernel), as the widths along the run show."""
        rule = WeightRule("weight", columns=True, kernels=True, groups=reading.groups)
        if reading.is_sure:
            return Hint(rule, "convolution")
        name = full_name(path, "")
        in_groups = f" in {reading.groups} groups" if reading.groups > 1 else ""
        note = (
            f"read as a transposed convolution (in, out, kernel){in_groups}, as the shapes of its "
            f"neighbours show; if it is none: neurons={{'{name}': 'rows'}}"
        )
        return Hint(rule, "convolution", note)

    def _open(self, path: str, hint: Hint | None) -> Hint:
        """The same hint, with a note that kernels may be transposed."""
        if hint is None:
            return Hint(note=_may_be_transposed(path))
        if hint.note:
            return hint
        return replace(hint, note=_may_be_transposed(path))

    def _is_transposed(self, shape: Shape, inputs: int | None, outputs: int | None) -> bool:
        """Whether only (in, out, *kernel) fits the layers before and after."""
        first, second = shape[:2]
        if first == second or (inputs is None and outputs is None):
            return False
        after_fits = outputs is None or outputs == second
        before_fits = inputs is None or inputs == first
        if not (after_fits and before_fits):
            return False
        plainly_before = inputs is None or inputs % second == 0
        plainly_after = outputs is None or outputs == first
        if outputs is None and inputs is not None and inputs % second == 0:
            return False  # it may be grouped
        return not (plainly_before and plainly_after)

    def _doubtful(
        self, path: str, shape: Shape, bias: int | None, outputs: int | None
    ) -> Hint | None:
        """A note on kernels that may be transposed, as only their name suggests."""
        first, second = shape[:2]
        places = shape[2:]
        if outputs == first and first != second:
            return None
        last_words: set[str] = set()
        for part in path.split(".")[-2:]:
            last_words |= words(part)
        sounds_so = bool(last_words & _TRANSPOSED_WORDS)
        if first == second and places in ((2, 2), (4, 4)):  # such halve a picture, or double it
            sounds_so = sounds_so or not words(path) & _HALVING_WORDS
        if not sounds_so or all(size == 1 for size in places):
            return None
        if second == 1 or (bias is not None and first != second):
            return None
        return Hint(note=_may_be_transposed(path))

    def _contradicted(self, path: str, shape: Shape, bias: int) -> Hint | None:
        """A note on kernels that have as many outputs as neither axis."""
        groups, rest = divmod(bias, shape[1])
        if rest == 0 and groups and shape[0] % groups == 0:
            return None  # transposed, in groups
        note = (
            f"read as {shape[0]} outputs, though its bias has {bias}: see neurons= or "
            "report the model itself"
        )
        return Hint(note=note)

    def _grouped(self, path: str, shape: Shape, before: _Before) -> Hint | None:
        """Groups, if the layer before has more outputs than a kernel has inputs."""
        outputs, each = shape[:2]
        inputs = before.channels
        is_sure = before.is_sure
        if each == 1 and not is_sure:
            is_wider = before.in_list and inputs is not None and _divides(1, inputs, outputs)
            return self._doubt(path, inputs, inputs) if is_wider and inputs else None
        own_words = words(path.rpartition(".")[2])
        if own_words & _GROUP_WORDS:
            named = self._named_grouped(path, outputs, each)
            if named is not None:
                return named
        says_so = bool(own_words & (_DEPTHWISE_WORDS | _GROUP_WORDS))
        if says_so or "pos_conv" in path or "conv_pos" in path or _is_of_positions(path, shape):
            inputs = outputs  # added to what it reads, or channel by channel
            is_sure = True
        is_odd = each > 1 and not self._is_known(path, each)
        is_wide = any(size > 1 for size in shape[2:])
        if is_odd and is_wide and not _divides(each, inputs, outputs):
            inputs = outputs
            is_sure = False
        name = full_name(path, "")
        if inputs is None or not _divides(each, inputs, outputs):
            may_be_joined = each % 2 == 0 and each // 2 in self._outputs_of_layers()
            if is_odd and 2 * each <= outputs and not may_be_joined:
                return Hint(
                    note=f"read as one group, though no layer has {each} outputs: {_IF_NOT}"
                )
            return None
        groups = inputs // each
        rule = WeightRule("weight", kernels=True, groups=groups)
        if is_sure:
            return Hint(rule, "convolution")
        if is_odd and is_wide:
            note = (
                f"read in {groups} groups, a guess: no layer has {each} outputs; for one group: "
                f"neurons={{'{name}': 'rows'}}"
            )
            return Hint(rule, "convolution", note)
        parts = self._widths.part_of(path)
        if before.in_list and (parts is None or parts.inputs != inputs):
            note = f"read as one group; the layer before it has {inputs} outputs: {_IF_NOT}"
            return Hint(note=note)
        return None  # they may stand side by side

    def _named_grouped(self, path: str, outputs: int, each: int) -> Hint | None:
        """Groups of kernels whose name says that they have some, if one width before them fits."""
        block = self._widths.block_of(path)
        if self._widths.is_large(block):
            return None
        earlier = self._widths.right_before(path, block)
        given = {earlier.outputs} if earlier is not None else set()
        if not given:
            given = self._widths.coming_in(block).main_widths()
        fitting = {inputs for inputs in given if _divides(each, inputs, outputs)}
        if len(fitting) != 1:
            return None
        groups = fitting.pop() // each
        note = (
            f"read in {groups} groups, as its name and the layer before it say; for one group: "
            f"neurons={{'{full_name(path, '')}': 'rows'}}"
        )
        rule = WeightRule("weight", kernels=True, groups=groups)
        return Hint(rule, "convolution", note)

    def _as_block_shows(self, path: str, shape: Shape) -> Hint | None:
        """Groups, or a note on them, if no layer around gives as many channels as a kernel takes."""
        outputs, each = shape[:2]
        first_path, first_shape = self._first_kernels()
        block = self._widths.block_of(path)
        if self._widths.is_large(block):
            return None
        coming_in = self._widths.coming_in(block)
        is_first = path == first_path and not coming_in.links
        of_picture = first_shape[1] if first_shape[1] <= _MOST_OF_A_PICTURE else 3
        if is_first or (each > 1 and each in (3, of_picture)):
            return None
        if each == 1:
            return self._several_filters(path, outputs, block, coming_in)
        given = coming_in.outputs() | {link.outputs for link in self._widths.before(path, block)}
        around = given | self._widths.scope(block).outputs(but=path)
        earlier = self._widths.right_before(path, block)
        if outputs == each and earlier is not None and _divides(each, earlier.outputs, outputs):
            is_grouped = not _is_among(earlier.inputs, around)  # and so may this one be
            if is_grouped:
                return self._doubt(path, earlier.outputs, earlier.outputs // each)
        if not given or outputs <= each or _is_among(each, around | coming_in.entering):
            return None
        fitting = {inputs for inputs in around if _divides(each, inputs, outputs)}
        parts = self._widths.part_of(path)
        if not fitting or (parts is not None and parts.inputs in given):
            return None
        inputs = min(fitting)
        return self._doubt(path, inputs, inputs // each)

    def _several_filters(
        self, path: str, outputs: int, block: str, coming_in: Scope
    ) -> Hint | None:
        """Groups of one channel each with several filters, if that is what comes in."""
        given = coming_in.main_widths()
        fitting = {inputs for inputs in coming_in.outputs() if _divides(1, inputs, outputs)}
        fitting -= {1, 2, 3}
        if outputs in given or not fitting or self._widths.part_of(path) is not None:
            return None
        is_item_before = not coming_in.entering
        if is_item_before and outputs in coming_in.taken_from_outside():
            return None  # what comes into both, side by side
        scope = self._widths.scope(block)
        if any(together == outputs for _, together in scope.together):
            return None
        is_joined = coming_in.is_joined() or scope.is_joined()
        is_doubtful = is_joined or not self._widths.is_order_known(path, block)
        for link in self._widths.before(path, block):
            is_of_width = link.is_matrix and outputs in scope.norms
            comes_later = self._widths.comes_later(link.path, path)
            gives_it = link.outputs % outputs == 0
            gives_more = link.is_matrix and link.outputs > outputs  # a part of which goes through
            if (gives_it or gives_more) and not (is_of_width and comes_later):
                return None
        likely = fitting & coming_in.norms
        if is_doubtful or len(likely) != 1:
            inputs = max(likely or fitting)
            return self._doubt(path, inputs, inputs)
        return Hint(WeightRule("weight", kernels=True, groups=likely.pop()), "convolution")

    def _doubt(self, path: str, inputs: int, groups: int) -> Hint:
        """A note on kernels that may be grouped."""
        name = full_name(path, "")
        note = (
            f"read as one group; where it takes {inputs} channels in {groups} groups, each by "
            f"itself: neurons={{'{name}': {groups}}}"
        )
        return Hint(note=note)

    def _first_kernels(self) -> tuple[str, Shape]:
        """The first kernels of all, and their shape."""
        if self._first is None:
            self._first = next(self._all_kernels(), ("", (0, 0)))
        return self._first

    def _is_known(self, path: str, channels: int) -> bool:
        """Whether a layer has as many outputs as another one has inputs, or it may be the first."""
        first_path, first_shape = self._first_kernels()
        if path == first_path or channels in (3, first_shape[1]):
            return True
        return channels in self._outputs_of_layers()

    def _outputs_of_layers(self) -> set[int]:
        """How many outputs the layers of the state dict have."""
        if self._channels is None:
            self._channels = set()
            for leaves in self._shapes.layers.values():
                for shape in leaves.values():
                    self._channels.update(shape[:1])
        return self._channels

    def _all_kernels(self) -> Iterator[tuple[str, Shape]]:
        """All kernels of convolutions, in order."""
        for path, leaves in self._shapes.layers.items():
            shape = leaves.get("weight", ())
            if len(shape) > 2:
                yield path, shape

    def _before(self, path: str, shape: Shape) -> _Before:
        """How many channels come into a layer."""
        if path.rpartition(".")[2] in ("fc1", "fc2"):
            attended = self._in_split_attention(path)
            if attended is not None:
                return attended
        for link in self._links(path):
            before = self._shapes.before(link)
            above = link.rpartition(".")[0]
            following = self._shapes.after(link)
            if link == path and self._shapes.is_list(above):
                if before is not None:
                    return self._before_in_list(link, before)
                if following is not None and self._shapes.of(following) == shape:
                    return _Before(shape[0], in_list=True)
            if before is None:
                before = self._shapes.place_before(link)
                following = self._shapes.place_after(link)
            earlier = self._kernel_at(before)
            if earlier is None or len(earlier) != len(shape):
                continue
            later = self._kernel_at(following)
            if later is None and following is not None:  # past squeeze and excitation
                later = self._kernel_at(self._shapes.after(following))
            is_sure = self._is_bottleneck(earlier, shape, later)
            if not self._shapes.is_list(above):
                is_sure = is_sure or self._follows_narrow(earlier, shape)
            return _Before(earlier[0], is_sure)
        return _Before()

    def _in_split_attention(self, path: str) -> _Before | None:
        """The same in the attention of a ResNeSt over what its convolution has split."""
        above, _, name = path.rpartition(".")
        if not (self._shapes.has(above, "conv") and self._shapes.has(above, "fc2")):
            return None
        source = self._shapes.before(path) if name == "fc2" else self._shapes.before(above)
        earlier = self._kernel_at(source)
        return None if earlier is None else _Before(earlier[0], is_sure=True)

    def _before_in_list(self, link: str, before: str) -> _Before:
        """The same in a numbered list, which is a chain if something lies between."""
        norm = self._shapes.norm(before)
        if norm is not None:
            return _Before(norm, is_sure=True, in_list=True)
        earlier = self._shapes.of(before)
        if earlier is None or len(earlier) < 3:
            return _Before()
        first = int(before.rpartition(".")[2])
        second = int(link.rpartition(".")[2])
        bias = self._shapes.vector(before)
        outputs = self._outputs_of(before, earlier) if bias is None else bias
        return _Before(outputs, is_sure=second - first > 1, in_list=True)

    def _outputs_of(self, path: str, shape: Shape) -> int:
        """How many channels kernels without a bias give."""
        reading = self._runs.reading(path)
        if reading is None or not reading.is_transposed:
            return shape[0]
        return reading.groups * shape[1]

    def _kernel_at(self, path: str | None) -> Shape | None:
        """The shape of the only kernels at a path or below it."""
        inside = self._shapes.weight_inside(path) if path is not None else None
        shape = self._shapes.of(inside) if inside is not None else None
        return shape if shape is not None and len(shape) > 2 else None

    def _is_bottleneck(self, earlier: Shape, shape: Shape, later: Shape | None) -> bool:
        """Whether kernels lie between two of 1 x 1, of which the last takes as many channels."""
        if later is None or len(later) != len(shape):
            return False
        if earlier[1] == shape[1]:
            return False  # both may take what comes into the block
        narrow = all(size == 1 for size in (*earlier[2:], *later[2:]))
        wide = any(size > 1 for size in shape[2:])
        is_chain = later[1] == shape[0]
        if shape[1] > 1:
            is_chain = is_chain or later[1] == earlier[0]
        return narrow and wide and is_chain

    def _follows_narrow(self, earlier: Shape, shape: Shape) -> bool:
        """Whether kernels follow some of 1 x 1 with as many outputs, and do not stand beside them."""
        narrow = all(size == 1 for size in earlier[2:])
        wide = any(size > 1 for size in shape[2:])
        return narrow and wide and earlier[0] == shape[0] and earlier[1] != shape[1]

    def _outputs(self, path: str) -> int | None:
        """How many channels the layer after takes, if it is next in a chain."""
        for link in self._links(path):
            following = self._shapes.after(link)
            above = link.rpartition(".")[0]
            if following is None or not self._shapes.is_list(above):
                continue
            return self._shapes.norm(following)
        return None

    def _links(self, path: str) -> list[str]:
        """The layer, and what begins with it or is only a shell around it, as links of a chain."""
        links = [path]
        above = path.rpartition(".")[0]
        earlier = self._shapes.place_before(path)
        while earlier is not None and self._shapes.norm(earlier) is not None:  # in order of names
            earlier = self._shapes.place_before(earlier)
        begins = earlier is None and not self._shapes.is_list(above)
        if above and (begins or self._shapes.weight_inside(above) == path):
            links.append(above)
        return links

    def _outputs_last(self, path: str, shape: Shape) -> Hint:
        """Kernels (*kernel, in, out) of Keras and Flax."""
        rule = WeightRule("kernel", outputs_last=True)
        bias = self._shapes.vector(path)
        if bias is not None and bias == shape[-1]:
            return Hint(rule, "convolution")
        name = full_name(path, "kernel")
        note = (
            "read as (kernel, in, out), as Keras and Flax store kernels; otherwise: "
            f"neurons={{'{name}': lambda w: ...}}"
        )
        return Hint(rule, "convolution", note)


def _may_be_transposed(path: str) -> str:
    """A note on kernels that may be transposed."""
    name = full_name(path, "")
    return (
        "read as a convolution (out, in, kernel), a guess; if it is a transposed one: "
        f"neurons={{'{name}': 'columns'}}"
    )


def _is_among(channels: int, widths: set[int]) -> bool:
    """Whether layers of these widths may give so many channels, alone or two of them joined."""
    return channels in widths or any(channels - width in widths for width in widths)


def _is_of_positions(path: str, shape: Shape) -> bool:
    """Whether kernels (out, in / groups, size) are those of positions along a sequence."""
    above, _, name = path.rpartition(".")
    around = words(f"{above.rpartition('.')[2]}.{name}")
    return len(shape) == 3 and "conv" in words(name) and bool(around & _POSITION_WORDS)


def _divides(each: int, inputs: int | None, outputs: int) -> bool:
    """Whether inputs and outputs divide into groups of so many inputs, not one for each output."""
    if inputs is None or not divide(each, inputs, outputs):
        return False
    return inputs // each != outputs

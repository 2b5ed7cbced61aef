"""Stacks of matrices in a state dict: experts, relations and the like, told from kernels."""

from __future__ import annotations

from lightning_hsu._neurons.candidates import full_name
from lightning_hsu._neurons.hints import Hint
from lightning_hsu._neurons.how import WeightRule
from lightning_hsu._neurons.shapes import Shape, Shapes, below, words
from lightning_hsu._neurons.weights import key_of

_EXPERT_WORDS = {"moe", "expert", "experts", "mixture"}
_ROUTERS = ("router", "gate", "wg", "gating", "switch")
_ENTERING = ("gate_up_proj", "gate_proj", "up_proj", "input_linear", "w1", "w3", "v1", "wi", "w_in")
_LEAVING = ("down_proj", "output_linear", "w2", "wo", "w_out", "down", "output")
_BARE = (*_ENTERING, *_LEAVING, "gate", "up", "w13", "w_gate", "w_up", "w_down", "weights_in")
_MOST_BESIDE = 32  # weights that are looked at beside one
_LONGEST_KERNEL = 32  # places along the one axis of a convolution whose weight could be a stack


class Stacks:
    """Tells which weights are stacks of matrices, and along which axis these hold their neurons.

    Args:
        shapes: The shapes of all tensors.
    """

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._stacks: dict[str, list[tuple[str, str]]] = {}  # by where they are

    def hint(self, path: str, leaf: str, shape: Shape) -> Hint | None:
        """How a stack is read; None if a weight of three or more axes is none.

        Args:
            path: Path of its layer.
            leaf: Its name.
            shape: (count, out, in), (count, in, out), or (out, in, *kernel) if it is no stack.
        """
        if len(shape) != 3:
            return None
        is_weight = leaf == "weight"
        if not is_weight and not self._is_named_so(path, leaf):
            return None
        biases = self._biases(path, leaf)
        one_axis = [bias[0] for bias in biases if len(bias) == 1]
        if is_weight and shape[0] in one_axis:
            return None  # a convolution's
        if "weight" in leaf and not is_weight and self._has_plane(path, shape):
            return Hint(WeightRule(leaf, kernels=True), "other")  # the splines of a KAN
        width = self._width(path, shape)
        count, first, last = shape
        name = full_name(path, key_of(leaf))
        columns = self._columns(path, leaf, shape, width)
        if columns is not None:
            return Hint(WeightRule(leaf, columns=columns), "other")
        if is_weight and last in one_axis and not _may_be_transposed(shape, last):
            note = f"read as {count} matrices by columns; otherwise: neurons={{'{name}': 'rows'}}"
            return Hint(WeightRule(leaf, columns=True), "other", note)
        expert = width is not None or words(f"{path}.{leaf}") & _EXPERT_WORDS
        is_long = last > _LONGEST_KERNEL and "conv" not in path.rpartition(".")[2]
        is_odd_kernel = is_long or (last == first and last >= 8)
        if not expert and is_weight and not (is_odd_kernel and not _has_norm(self._shapes, path)):
            return None
        by_neighbour = self._as_neighbours(path, leaf, shape)
        if by_neighbour is not None:
            word = "columns" if by_neighbour else "rows"
            note = f"{count} matrices read by {word}, as its neighbours show"
            if first != last:
                note = ""
            return Hint(WeightRule(leaf, columns=by_neighbour), "other", note)
        note = (
            f"read as {count} matrices by rows, a guess; for their columns: "
            f"neurons={{'{name}': lambda w: w.mT}}"
        )
        return Hint(WeightRule(leaf), "other", note)

    def packed(self, path: str, leaf: str, shape: Shape) -> Hint | None:
        """How experts are read that lie one below the other (experts * inner, width)."""
        if leaf not in ("w1", "v1", "w2") or "experts" not in words(path):
            return None
        for router in self._routers(path):
            experts, width = router
            if shape[1] == width and shape[0] % experts == 0 and shape[0] > experts:
                columns = leaf == "w2"
                return Hint(WeightRule(leaf, columns=columns, groups=experts), "other")
        return None

    def _is_named_so(self, path: str, leaf: str) -> bool:
        """Whether a bare parameter is named like the matrices of experts."""
        if words(f"{path}.{leaf}") & _EXPERT_WORDS or "weight" in leaf:
            return True
        return leaf.lower() in _BARE

    def _has_plane(self, path: str, shape: Shape) -> bool:
        """Whether a layer has a matrix of the first two axes of a weight."""
        leaves = self._shapes.leaves(path).items()
        return any(beside == shape[:2] and "bias" not in leaf for leaf, beside in leaves)

    def _biases(self, path: str, leaf: str) -> list[Shape]:
        """The shapes of the biases that may belong to a weight."""
        found = []
        leaves = self._shapes.leaves(path)
        for name in ("bias" if leaf == "weight" else "", f"{leaf}_bias", f"{leaf}.bias"):
            if name in leaves:
                found.append(leaves[name])
        for letter in ("w", "W"):
            name = f"b{leaf.removeprefix(letter)}"
            if leaf.startswith(letter) and leaf != "weight" and name in leaves:
                found.append(leaves[name])
        return found

    def _columns(self, path: str, leaf: str, shape: Shape, width: int | None) -> bool | None:
        """Whether a stack's neurons are its columns, as biases or a width show; None if neither."""
        count, first, last = shape
        if first == last:
            return None
        for bias in self._biases(path, leaf):
            if bias in ((count, first), (count, 1, first)):
                return False
            if bias in ((count, last), (count, 1, last)):
                return True
        if width is None or width not in (first, last):
            width = self._shared_width(path, leaf, shape) or self._width_of_others(path, shape)
        name = _name_of(path, leaf)
        if width is None:
            return None
        if _is_like(name, _LEAVING):
            return last == width
        if _is_like(name, _ENTERING):
            return first == width
        return None

    def _as_neighbours(self, path: str, leaf: str, shape: Shape) -> bool | None:
        """Whether a stack's neurons are its columns, as those of the stack beside it are."""
        for other, name in self._beside(path, leaf):
            beside = self._shapes.of(other, name)
            if beside is not None and len(beside) == 3 and beside[0] == shape[0]:
                columns = self._columns(other, name, beside, self._width(other, beside))
                if columns is not None:
                    return columns
        return None

    def _beside(self, path: str, leaf: str) -> list[tuple[str, str]]:
        """Weights of three axes of the same layer, or of the layers beside it; the first few."""
        key = path if leaf != "weight" else f"{path.rpartition('.')[0]}.*"
        if key not in self._stacks:
            found = []
            if leaf == "weight":
                for child in self._shapes.children(path.rpartition(".")[0]):
                    found.append((child, "weight"))
            else:
                for name, shape in self._shapes.leaves(path).items():
                    if len(shape) == 3:
                        found.append((path, name))
            self._stacks[key] = found[:_MOST_BESIDE]
        return [one for one in self._stacks[key] if one != (path, leaf)]

    def _shared_width(self, path: str, leaf: str, shape: Shape) -> int | None:
        """The width of the model, which the matrices into and out of the experts share.

        None if it may be either axis: without two matrices in one, both are shared.
        """
        fitting: set[int] = set()
        is_leaving = _is_like(_name_of(path, leaf), _LEAVING)
        for other, name in self._beside(path, leaf):
            beside = self._shapes.of(other, name)
            if beside is None or len(beside) != 3 or beside[0] != shape[0]:
                continue
            if _is_like(_name_of(other, name), _LEAVING) == is_leaving:
                continue
            for width, inner in (shape[1:], shape[:0:-1]):
                if width not in beside[1:]:
                    continue
                outer = beside[1] if beside[2] == width else beside[2]
                if outer in (inner, 2 * inner) or inner == 2 * outer:
                    fitting.add(width)
        return fitting.pop() if len(fitting) == 1 else None

    def _width(self, path: str, shape: Shape) -> int | None:
        """The width of the model, as a router beside the experts, or a normalization, shows."""
        for experts, width in self._routers(path):
            if experts == shape[0] and width in shape[1:]:
                return width
        return None

    def _width_of_others(self, path: str, shape: Shape) -> int | None:
        """The width of the model, as the router of other experts beside a stack shows."""
        for _, width in self._routers(path):
            if width in shape[1:]:
                return width
        return None

    def _routers(self, path: str) -> list[tuple[int, int]]:
        """Experts and width of the routers beside a layer, or beside what it is in."""
        found = []
        above = path
        for _ in range(4):
            for name in _ROUTERS:
                if not self._shapes.has(above, name):
                    continue
                inside = self._shapes.weight_inside(below(above, name))
                shape = self._shapes.of(inside) if inside is not None else None
                if shape is not None and len(shape) == 2:
                    found.append((shape[0], shape[1]))
            if not above or found:
                return found
            above = above.rpartition(".")[0]
        return found


def _may_be_transposed(shape: Shape, outputs: int) -> bool:
    """Whether (in, out / groups, k) may have this many outputs."""
    if outputs % shape[1] != 0:
        return False
    return shape[0] % (outputs // shape[1]) == 0


def _has_norm(shapes: Shapes, path: str) -> bool:
    """Whether the layer after a convolution is a normalization of its outputs."""
    following = shapes.after(path)
    shape = shapes.of(path)
    if following is None or shape is None:
        return False
    return shapes.norm(following) == shape[0]


def _name_of(path: str, leaf: str) -> str:
    """The name by which a weight is known."""
    if leaf == "weight":
        return path.rpartition(".")[2].lower()
    return leaf.lower()


def _is_like(name: str, names: tuple[str, ...]) -> bool:
    """Whether a name is one of these, or one of them with something before."""
    return any(name == one or name.endswith(f"_{one}") for one in names)

"""The shapes of a state dict's tensors by layer, and which layers stand beside each other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from lightning_hsu._neurons.hints import Layers

Shape = tuple[int, ...]

_OLD_HOOKS = ("_orig", "_v")  # what older hooks of torch's add to the name of a weight
_LETTERS = "abcdef"  # names of the layers of a block in torchvision's RegNet


class Shapes:
    """The shapes of all tensors, under the names that a forward pass uses.

    Args:
        layers: All tensors by layer.

    Attributes:
        layers: The shapes of the tensors of each layer.
        is_by_name: Whether the layers are in the order of their names.
    """

    def __init__(self, layers: Layers) -> None:
        self.layers: dict[str, dict[str, Shape]] = {}
        self._children: dict[str, dict[str, None]] = {}  # names of what is below a path, in order
        # By the path of a parent: its children in order, and the place of each.
        self._orders: dict[str, tuple[list[str], dict[str, int]]] = {}
        self._places: dict[str, tuple[list[str], dict[str, int]]] = {}  # by their numbers
        self._numbers: dict[str, dict[tuple[str, int], str]] = {}
        self._lists: dict[str, bool] = {}
        for path, leaves in layers.items():
            self.layers[path] = _effective(leaves)
            self._add_above(path)
        ends = [path for path in self.layers if not self._children.get(path)]
        self.is_by_name = ends == sorted(ends)

    def _add_above(self, path: str) -> None:
        """Note a path below all that it is in."""
        while path:
            above, _, name = path.rpartition(".")
            names = self._children.setdefault(above, {})
            if name in names:
                return
            names[name] = None
            path = above

    def of(self, path: str, leaf: str = "weight") -> Shape | None:
        """The shape of a tensor; None if there is none."""
        return self.layers.get(path, {}).get(leaf)

    def leaves(self, path: str) -> dict[str, Shape]:
        """The shapes of the tensors that a layer holds itself."""
        return self.layers.get(path, {})

    def names_below(self, path: str) -> list[str]:
        """Names of the children of a path, in order."""
        return list(self._children.get(path, {}))

    def count_below(self, path: str) -> int:
        """How many children a path has."""
        return len(self._children.get(path, {}))

    def children(self, path: str) -> Iterator[str]:
        """The paths of the children of a path, in order."""
        for name in self._children.get(path, {}):
            yield below(path, name)

    def has(self, path: str, name: str) -> bool:
        """Whether a path has a child of this name."""
        return name in self._children.get(path, {})

    def vector(self, path: str, leaf: str = "bias") -> int | None:
        """The length of a tensor of one axis; None if there is none."""
        shape = self.of(path, leaf)
        if shape is None or len(shape) != 1:
            return None
        return shape[0]

    def norm(self, path: str) -> int | None:
        """The length of a normalization's weight; None if the layer is none."""
        return self.vector(path, "weight")

    def weight_inside(self, path: str, levels: int = 3) -> str | None:
        """The layer whose weight of two or more axes is the only one at a path or below it."""
        own = self.of(path)
        if own is not None:
            return path if len(own) > 1 else None
        if levels == 0:
            return None
        found = None
        for child in self.children(path):
            if self.norm(child) is not None:
                continue
            inside = self.weight_inside(child, levels - 1)
            has_more = inside is None and bool(self._children.get(child))
            if has_more or (inside is not None and found is not None):
                return None
            if inside is not None:
                found = inside
        return found

    def is_list(self, path: str) -> bool:
        """Whether the children of a path are numbered."""
        if path not in self._lists:
            names = self._children.get(path, {})
            self._lists[path] = bool(names) and all(name.isdigit() for name in names)
        return self._lists[path]

    def before(self, path: str) -> str | None:
        """The child before this one in a chain of numbered names; None if there is none."""
        return self._beside(path, -1)

    def after(self, path: str) -> str | None:
        """The child after this one in a chain of numbered names; None if there is none."""
        return self._beside(path, 1)

    def place_before(self, path: str) -> str | None:
        """The child that comes before this one, whatever it is called."""
        return self._in_order(path, -1)

    def place_after(self, path: str) -> str | None:
        """The child that comes after this one, whatever it is called."""
        return self._in_order(path, 1)

    def _in_order(self, path: str, step: int) -> str | None:
        """The child of the same parent so many places on; none of the model itself."""
        if not path:
            return None
        above, _, name = path.rpartition(".")
        if above not in self._orders:
            names = list(self._children.get(above, {}))
            places = {one: i for i, one in enumerate(names)}
            self._orders[above] = names, places
        names, places = self._orders[above]
        i = places[name] + step
        return below(above, names[i]) if 0 <= i < len(names) else None

    def _beside(self, path: str, step: int) -> str | None:
        """The next child of the same parent with weights, in a list or by its number."""
        above, _, name = path.rpartition(".")
        if above not in self._numbers:
            self._numbers[above] = self._numbered(above)
        numbers = self._numbers[above]
        number = number_of(name)
        if number is None:
            return None
        if self.is_list(above):
            if above not in self._places:
                ordered = sorted(self._children[above], key=int)
                self._places[above] = ordered, {one: i for i, one in enumerate(ordered)}
            ordered, places = self._places[above]
            i = places[name] + step
            return below(above, ordered[i]) if 0 <= i < len(ordered) else None
        other = numbers.get((number[0], number[1] + step))
        return None if other is None else below(above, other)

    def _numbered(self, above: str) -> dict[tuple[str, int], str]:
        """The children of a path with a number in their names, by what comes before it and it."""
        found: dict[tuple[str, int], str] = {}
        for name in self._children.get(above, {}):
            number = number_of(name)
            if number is not None:
                found.setdefault(number, name)
        return found


def below(path: str, name: str) -> str:
    """The path of a child."""
    return f"{path}.{name}" if path else name


def words(path: str) -> set[str]:
    """The words of a path, in lower case, without numbers."""
    found = set()
    for word in re.split(r"[._\d]+", path.lower()):
        if word:
            found.add(word)
    return found


def number_of(name: str) -> tuple[str, int] | None:
    """What comes before the number in a name, and the number: conv2 or conv2_kxk."""
    if len(name) == 1 and name in _LETTERS:
        return "", _LETTERS.index(name)
    matched = re.fullmatch(r"(\D*)(\d+)(_.*)?", name)
    if matched is None:
        matched = re.fullmatch(r"(.*?)(\d+)", name)
    if matched is None:
        return None
    return matched[1], int(matched[2])


def _effective(leaves: Mapping[str, Tensor]) -> dict[str, Shape]:
    """The shapes of a layer's tensors by the names that its forward pass uses."""
    shapes: dict[str, Shape] = {}
    for leaf, x in leaves.items():
        name = leaf
        if leaf.startswith("parametrizations."):
            name = leaf.split(".")[1]
        else:
            for mark in _OLD_HOOKS:
                base = leaf.removesuffix(mark)
                beside = (f"{base}_g", f"{base}_mask", f"{base}_u")
                if base != leaf and any(other in leaves for other in beside):
                    name = base
        shape = tuple(x.shape)
        known = shapes.get(name)
        if known is None or len(shape) >= len(known):
            shapes[name] = shape
    return shapes

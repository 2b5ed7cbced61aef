"""How many channels come into a layer of a state dict, as the layers of its block show."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from lightning_hsu._neurons.shapes import Shapes, below, number_of, words
from lightning_hsu._neurons.table_names import sounds_like_table

_SIDE_WORDS = {
    "shortcut",
    "downsample",
    "skip",
    "residual",
    "identity",
    "se",
    "attn",
    "gate",
    "rd",
}
"""Words of layers beside the main path of a block."""
_ENTRY_WORDS = {"down", "downsample", "pool", "merge", "merging", "transition", "reduction", "stem"}
"""Words of modules through which everything enters a block."""
_MOST_BESIDE = 512  # layers of a block, or children of one parent, that are looked at
_MOST_PARTS = 32  # layers side by side that are looked at as one
_JOINED_WORDS = {"cheap", "ghost", "dense", "concat", "cat", "join", "fuse"}
"""Words of layers whose outputs are joined with others'."""


@dataclass(frozen=True)
class Link:
    """A layer with a matrix or kernels, as a step from so many channels to others.

    Args:
        path: Its path.
        inputs: Channels that it takes, of a group.
        outputs: Channels that it gives.
        is_matrix: Whether its weight has two axes.
    """

    path: str
    inputs: int
    outputs: int
    is_matrix: bool


@dataclass
class Scope:
    """The layers below a path.

    Args:
        links: Those with a matrix or kernels.
        norms: The lengths of the normalizations.
        together: How many channels the layers of each list take and give together.
        entering: Channels that layers beside a block take, which may enter the block as well.
    """

    links: list[Link] = field(default_factory=list)
    norms: set[int] = field(default_factory=set)
    together: set[tuple[int, int]] = field(default_factory=set)
    entering: set[int] = field(default_factory=set)

    def add(self, other: Scope) -> None:
        """Add the layers of another scope."""
        self.links += other.links
        self.norms |= other.norms
        self.together |= other.together

    def main_widths(self) -> set[int]:
        """The widths that may come out: of normalizations, and what kernels give to no other."""
        found = set(self.norms)
        taken = {link.inputs for link in self.links}
        for link in self.links:
            if not link.is_matrix and link.outputs not in taken:
                found.add(link.outputs)
        return found or self.outputs()

    def taken_from_outside(self) -> set[int]:
        """How many channels layers take that no other one of these makes of others."""
        made = {link.outputs for link in self.links if link.inputs > 1}
        return {link.inputs for link in self.links} - made

    def is_joined(self) -> bool:
        """Whether outputs of several layers are joined, as names say."""
        return any(words(link.path) & _JOINED_WORDS for link in self.links)

    def outputs(self, but: str = "") -> set[int]:
        """How many channels the layers give, but for one of them."""
        found = {link.outputs for link in self.links if link.path != but}
        for _, outputs in self.together:
            found.add(outputs)
        return found


class Widths:
    """Tells how many channels may come into a layer.

    The layers of its own block and of the block before are looked at. Files often have layers in
    the order of their names, which tells nothing.

    Args:
        shapes: The shapes of all tensors.
    """

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._scopes: dict[str, Scope] = {}
        self._coming_in: dict[str, Scope] = {}
        self._order = {path: place for place, path in enumerate(shapes.layers)}

    def block_of(self, path: str) -> str:
        """The path of the smallest numbered item around a layer that has others, too.

        Without one, it is the part of the model that the layer is in.
        """
        above = path
        while "." in above:
            if self._is_item(above) and len(self.scope(above).links) > 1:
                return above
            above = above.rpartition(".")[0]
        return above

    def scope(self, path: str) -> Scope:
        """The layers at a path and below it."""
        if path not in self._scopes:
            scope = Scope()
            self._add(path, scope)
            self._scopes[path] = scope
        return self._scopes[path]

    def coming_in(self, block: str) -> Scope:
        """The layers that come before a block: the item before it, or what is beside its list.

        Nothing is beside what everything enters through.
        """
        if block not in self._coming_in:
            self._coming_in[block] = self._found_before(block)
        return self._coming_in[block]

    def is_large(self, block: str) -> bool:
        """Whether a block has so many layers that they are not looked at for each one of them."""
        return len(self.scope(block).links) > _MOST_BESIDE

    def _found_before(self, block: str) -> Scope:
        """The layers that come before a block."""
        above = block
        while above:
            before = self._shapes.before(above)
            if before is not None and self.scope(before).links:
                return self._with_same_number(above, before)
            name = above.rpartition(".")[2]
            beside = Scope() if words(name) & _ENTRY_WORDS else self._beside(above)
            if beside.links:
                return beside
            above = above.rpartition(".")[0]
        return Scope()

    def right_before(self, path: str, block: str) -> Link | None:
        """The layer of a block that is stored right before one, if it has kernels."""
        links = self.scope(block).links
        for earlier, link in pairwise(links):
            if link.path == path:
                return None if earlier.is_matrix else earlier
        return None

    def _with_same_number(self, path: str, before: str) -> Scope:
        """The layers of the item before one, and of those with its number in lists beside."""
        outer, _, number = path.rpartition(".")
        around = outer.rpartition(".")[0]
        scope = Scope()
        scope.add(self.scope(before))
        is_among_lists = self._shapes.is_list(outer) and not self._shapes.is_list(around)
        if is_among_lists and self._shapes.count_below(around) <= _MOST_BESIDE:
            for name in self._shapes.names_below(around):
                child = below(around, name)
                if child != outer and self._shapes.is_list(child):
                    scope.add(self.scope(f"{child}.{number}"))
        return scope

    def before(self, path: str, block: str) -> list[Link]:
        """The layers of a block that may give what a layer of it takes.

        Layers beside the main path are none of them, nor are depthwise ones beside it. They are
        those before it, and matrices that take what comes into the block: such may be stored
        later. In the order of names, those are taken that take what no other one gives.
        """
        at_entry = self._entry_of(path, block)
        main = []
        for link in self.scope(block).links:
            if link.path == path or self._is_side(link.path, path, block):
                continue
            if at_entry and not f"{link.path}.".startswith(f"{at_entry}."):
                continue
            if link.inputs == 1 and self._is_beside(link.path, path):
                continue
            main.append(link)
        entering = self.coming_in(block).outputs()
        inner = {link.outputs for link in main} - entering
        by_name = self._shapes.is_by_name
        found = []
        for link in main:
            is_earlier = not by_name and not self.comes_later(link.path, path)
            may_be_out_of_order = by_name or link.is_matrix
            enters = link.inputs not in inner if by_name else link.inputs in entering
            if is_earlier or (may_be_out_of_order and enters):
                found.append(link)
        return found

    def is_order_known(self, path: str, block: str) -> bool:
        """Whether it is known which layers of a block are before one, and not after it."""
        return not self._shapes.is_by_name or bool(self._entry_of(path, block))

    def comes_later(self, path: str, other: str) -> bool:
        """Whether a layer is stored after another one."""
        return self._order.get(path, -1) > self._order[other]

    def part_of(self, path: str) -> Link | None:
        """The layers of the list that a layer is in as one, if they are no chain; else None."""
        above = path
        for _ in range(2):
            above = above.rpartition(".")[0]
            count = self._shapes.count_below(above)
            if not self._shapes.is_list(above) or count > _MOST_PARTS:
                continue
            links = self.scope(above).links
            is_of_single_layers = len(links) == count > 1
            is_chain = any(one.outputs == two.inputs for one, two in pairwise(links))
            if is_of_single_layers and not is_chain:
                inputs = sum(link.inputs for link in links)
                outputs = sum(link.outputs for link in links)
                return Link(above, inputs, outputs, is_matrix=False)
        return None

    def _is_item(self, path: str) -> bool:
        """Whether a path is one of several by its number."""
        beside = self._shapes.before(path) or self._shapes.after(path)
        return beside is not None or self._shapes.is_list(path.rpartition(".")[0])

    def _entry_of(self, path: str, block: str) -> str:
        """The module at the entry of a block, such as downsample, that a layer is in; or ""."""
        inner = path.removeprefix(f"{block}.").split(".")
        if words(inner[0]) & _ENTRY_WORDS:
            return f"{block}.{inner[0]}"
        return ""

    def _is_beside(self, path: str, other: str) -> bool:
        """Whether two layers are in modules side by side, not in a list."""
        common = _common(path, other)
        return not self._shapes.is_list(common)

    def _is_side(self, path: str, other: str, block: str) -> bool:
        """Whether a layer is beside the main path that another one is on, as its name says.

        What leads into a stage of several blocks is on it.
        """
        inner = words(path.removeprefix(_common(path, other)))
        entry = self._entry_of(path, block)
        if entry and self._has_blocks(block, entry):
            inner -= _ENTRY_WORDS
        return bool(inner & _SIDE_WORDS)

    def _has_blocks(self, path: str, but: str) -> bool:
        """Whether a path has a list of blocks of several layers, but for one of its children."""
        for child in self._shapes.children(path):
            if child != but and self._shapes.is_list(child):
                first = next(self._shapes.children(child))
                if len(self.scope(first).links) > 1:
                    return True
        return False

    def _beside(self, path: str) -> Scope:
        """The layers below the parent of a path that are stored before it, in no item beside it.

        All of them in the order of names.
        """
        beside = Scope()
        outer, _, name = path.rpartition(".")
        if self._shapes.is_list(outer) or self._shapes.count_below(outer) > _MOST_BESIDE:
            return beside
        numbering = (number_of(name) or ("", 0))[0]
        for child_name in self._shapes.names_below(outer):
            child = below(outer, child_name)
            if child == path and not self._shapes.is_by_name:
                break
            number = number_of(child_name)
            is_item = number is not None and number[0] == numbering
            if child != path and not is_item:
                beside.add(self.scope(child))
        beside.entering = {link.inputs for link in beside.links}
        return beside

    def _add(self, path: str, scope: Scope) -> None:
        """Add the layers at a path and below it to a scope."""
        shape = self._shapes.of(path)
        if shape is not None and len(shape) == 1:
            scope.norms.add(shape[0])
        elif shape is not None and len(shape) > 1:
            scope.links.append(self._link(path, shape))
        for child in self._shapes.children(path):
            scope.add(self.scope(child))
        if len(scope.links) > 1 and self._shapes.is_list(path):  # parts side by side
            inputs = sum(link.inputs for link in scope.links)
            outputs = sum(link.outputs for link in scope.links)
            scope.together.add((inputs, outputs))

    def _link(self, path: str, shape: tuple[int, ...]) -> Link:
        """A layer as a step."""
        outputs, inputs = shape[:2]
        bias = self._shapes.vector(path)
        if bias is not None and bias == inputs:
            outputs, inputs = inputs, outputs
        if sounds_like_table(path):
            outputs = shape[-1] if len(shape) == 2 else outputs
        return Link(path, inputs, outputs, len(shape) == 2)


def _common(path: str, other: str) -> str:
    """The path of the smallest module that both layers are in."""
    common = []
    for first, second in zip(path.split("."), other.split("."), strict=False):
        if first != second:
            break
        common.append(first)
    return ".".join(common)

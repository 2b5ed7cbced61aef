"""Whether the matrices of a state dict are (out, in) or (in, out), as those beside them show."""

from __future__ import annotations

import re
from typing import Literal

from lightning_hsu._neurons.candidates import full_name
from lightning_hsu._neurons.hints import Hint
from lightning_hsu._neurons.how import WeightRule
from lightning_hsu._neurons.shapes import Shape, Shapes
from lightning_hsu._neurons.table_names import sounds_like_table
from lightning_hsu._neurons.weights import key_of

Axis = Literal["rows", "columns"]
"""Which axis of a matrix holds the neurons."""

_MATRICES = ("weight", "kernel")
_THREE_PARTS = ("qkv", "Wqkv", "qkv_proj", "c_attn", "query_key_value", "to_qkv")
_TORCHS = re.compile(r"in_proj_weight|[qkv]_proj_weight|weight_(ih|hh|hr)(_.*)?|weight")


class Orientation:
    """Tells along which axis a matrix holds its neurons.

    Args:
        shapes: The shapes of all tensors.
    """

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._alike: dict[str, list[str]] = {}  # paths that differ in numbers only
        self._votes: dict[tuple[str, str], Axis | None] = {}
        self._chains: dict[tuple[str, str], Axis | None] = {}
        for path in shapes.layers:
            self._alike.setdefault(_mask(path), []).append(path)

    def hint(self, path: str, leaf: str, shape: Shape) -> Hint | None:
        """How a matrix is read if not by its own bias.

        Args:
            path: Path of its layer.
            leaf: Its name.
            shape: (out, in) or (in, out).
        """
        if leaf == "embedding":  # of Flax
            return Hint(kind="embedding")
        if leaf not in _MATRICES:
            return self._of_other_name(path, leaf, shape)
        if self._own(path, leaf) is not None:
            if leaf == "kernel" and self._own(path, leaf) == "columns":
                return _read_by("columns", leaf, "")
            return None
        axis, reason = self.around(path, leaf)
        if axis == "columns":
            name = full_name(path, key_of(leaf))
            note = f"read by columns, {reason}; for its rows: neurons={{'{name}': 'rows'}}"
            if shape[0] != shape[1] and reason == _BY_NEIGHBOURS:
                note = f"{note} (it has no bias)"
            return _read_by("columns", leaf, note)
        if axis == "rows" and leaf == "kernel":
            return _read_by("rows", leaf, "")
        if leaf == "kernel":
            name = full_name(path, leaf)
            note = (
                "read by columns, as Keras and Flax store kernels; for its rows: "
                f"neurons={{'{name}': 'rows'}}"
            )
            return _read_by("columns", leaf, note)
        return None

    def around(self, path: str, leaf: str = "weight") -> tuple[Axis | None, str]:
        """The axis of a matrix that its neighbours show, and a few words on what shows it."""
        above = path.rpartition(".")[0]
        grandparent = above.rpartition(".")[0]
        if sounds_like_table(path):
            return None, ""
        for scope in ("alike", "chain", "parent", "grandparent"):
            axis: Axis | None = None
            if scope == "alike":
                axis = self._vote("alike", _mask(path))
            elif scope == "chain":
                axis = self._chain(above, leaf)
            elif scope == "parent":
                axis = self._vote("parent", above)
            elif above:
                axis = self._vote("grandparent", grandparent)
            if axis is not None:
                return axis, _BY_CHAIN if scope == "chain" else _BY_NEIGHBOURS
        return None, ""

    def _of_other_name(self, path: str, leaf: str, shape: Shape) -> Hint | None:
        """A matrix of a name that torch's layers do not have, which may be either."""
        if _TORCHS.fullmatch(leaf) or "weight" not in leaf or min(shape) < 2:
            return None
        bias = self._shapes.vector(path, leaf.replace("weight", "bias"))
        if bias is None:
            bias = self._shapes.vector(path)
        if bias is not None and shape[0] != shape[1] and bias in shape:
            axis: Axis = "rows" if bias == shape[0] else "columns"
            return _read_by(axis, leaf, "", kind="other")
        above = path.rpartition(".")[0]
        name = full_name(path, leaf)
        chain = self._chain(above, leaf) if path else None
        if chain == "rows":
            return None
        if chain == "columns":
            note = f"read by columns, {_BY_CHAIN}; for its rows: neurons={{'{name}': 'rows'}}"
            return _read_by("columns", leaf, note, kind="other")
        note = f"read by rows, a guess; for its columns: neurons={{'{name}': 'columns'}}"
        return Hint(note=note)

    def _own(self, path: str, leaf: str) -> Axis | None:
        """The axis that a matrix's bias, or the name of a fused projection, shows."""
        shape = self._shapes.of(path, leaf)
        if shape is None or len(shape) != 2 or shape[0] == shape[1]:
            return None
        bias = self._shapes.vector(path)
        if bias is not None and bias in shape:
            return "rows" if bias == shape[0] else "columns"
        return None

    def shown(self, path: str) -> Axis | None:
        """The axis that a layer's bias, or the name of a fused projection, shows by itself."""
        for leaf in _MATRICES:
            shape = self._shapes.of(path, leaf)
            if shape is None or len(shape) != 2 or sounds_like_table(path):
                continue
            own = self._own(path, leaf)
            if own is not None:
                return own
            if path.rpartition(".")[2] in _THREE_PARTS and shape[1] == 3 * shape[0]:
                return "columns"
            if path.rpartition(".")[2] in _THREE_PARTS and shape[0] == 3 * shape[1]:
                return "rows"
        return None

    def _vote(self, scope: str, key: str) -> Axis | None:
        """The axis that all matrices of a scope show which show one; None if none or both do."""
        if (scope, key) in self._votes:
            return self._votes[scope, key]
        if scope == "alike":
            paths = self._alike.get(key, [])
        elif scope == "parent":
            paths = list(self._shapes.children(key))
        else:
            paths = []
            for child in self._shapes.children(key):
                paths.extend(self._shapes.children(child))
        seen = set()
        for path in paths:
            axis = self.shown(path)
            if axis is not None:
                seen.add(axis)
        vote = seen.pop() if len(seen) == 1 else None
        self._votes[scope, key] = vote
        return vote

    def _chain(self, above: str, leaf: str) -> Axis | None:
        """The axis in which matrices of numbered layers follow each other below a path."""
        if (above, leaf) in self._chains:
            return self._chains[above, leaf]
        seen: set[Axis] = set()
        for path in self._shapes.children(above):
            first = self._matrix(path, leaf)
            if first is None or sounds_like_table(path):
                continue
            for following in self._following(path, leaf, first):
                second = self._matrix(following, leaf)
                assert second is not None
                fits_rows = first[0] == second[1]
                fits_columns = first[1] == second[0]
                is_square = first[0] == first[1] or second[0] == second[1]
                may_be_gated = first[0] % second[1] == 0  # halved in between
                if fits_rows and not fits_columns:
                    seen.add("rows")
                elif fits_columns and not fits_rows and not is_square and not may_be_gated:
                    seen.add("columns")
                if "rows" in (self.shown(path), self.shown(following)):
                    seen.add("rows")
        chain = seen.pop() if len(seen) == 1 else None
        self._chains[above, leaf] = chain
        return chain

    def _following(self, path: str, leaf: str, shape: Shape) -> list[str]:
        """The next layer of a chain with a matrix, and that after square ones if this is not one.

        Args:
            path: Path of a layer.
            leaf: Name of the matrices.
            shape: That of the layer's: square ones that follow have the size of one of its axes.
        """
        found: list[str] = []
        following = self._next_matrix(path)
        while following is not None:
            second = self._matrix(following, leaf)
            if second is None:
                break
            is_square = second[0] == second[1] and second[0] in shape
            if not found or not is_square:
                found.append(following)
            if not is_square or shape[0] == shape[1]:
                break
            following = self._next_matrix(following)
        return found

    def _next_matrix(self, path: str) -> str | None:
        """The next layer of a chain, past one normalization."""
        following = self._shapes.after(path)
        if following is not None and self._shapes.norm(following) is not None:
            following = self._shapes.after(following)
        return following

    def _matrix(self, path: str, leaf: str) -> Shape | None:
        """The shape of a layer's matrix."""
        shape = self._shapes.of(path, leaf)
        if shape is None or len(shape) != 2:
            return None
        return shape


_BY_NEIGHBOURS = "as its neighbours show"
_BY_CHAIN = "as the shapes of its neighbours show"


def _read_by(axis: Axis, leaf: str, note: str, kind: Literal["linear", "other"] = "linear") -> Hint:
    """A hint that reads a matrix along one axis."""
    return Hint(WeightRule(leaf, columns=axis == "columns"), kind, note)


def _mask(path: str) -> str:
    """A path with its numbers replaced, equal for the same layer of other blocks."""
    return re.sub(r"\d+", "*", path)

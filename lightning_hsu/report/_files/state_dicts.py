"""Which state dict of a file is taken, and what is said of the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_hsu._neurons.packed import is_packed_pair, with_quantised_linears
from lightning_hsu.report._files.found import Found, check_tensor
from lightning_hsu.report._files.naming import listed, short, starts_with_one_of
from lightning_hsu.report.unpickle import Opaque

_KEYS = (  # where a file may have its state dict, in the order of the search
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "teacher",  # of self-distillation; it is what is used later
    "generator",
    "ema",
    "state_dict_ema",
    "model_ema",
    "params_ema",
    "student",
    "discriminator",
)
_NOT_WEIGHTS = ("optim", "lr_sched", "grad_scaler")
_OF_OPTIMIZERS = frozenset(
    (
        "exp_avg",
        "exp_avg_sq",
        "exp_avg_sq_row",
        "exp_avg_sq_col",
        "exp_inf",
        "max_exp_avg_sq",
        "momentum_buffer",
        "square_avg",
        "acc_delta",
        "grad_avg",
        "sum",
        "step",
        "mu_product",
        "fp32_flat_groups",
    )
)
_DEEPEST = 4  # mappings within mappings that are searched


def state_dict_of(content: Any, path: Path, key: str | None) -> Found:
    """The state dict in what a file holds.

    Args:
        content: What the file holds.
        path: The file, for errors.
        key: Where the state dict is; dots lead into mappings. None takes the only one, or the
            first that has one of the usual names.

    Raises:
        ValueError: if there is none, or several without a usual name.
    """
    search = _Search()
    held = search.state_dicts(content)
    if key is not None:
        inner = _at(content, key)
        if not search.is_state_dict(inner):
            raise ValueError(
                f"{path} has no state dict under {short(key)!r}; {_contents(content, held)}"
            )
        return _found(inner, path)
    for name in _KEYS:
        if name in held:
            found = _found(held[name], path)
            others = [other for other in held if other != name]
            if others:
                found.notes.append(("", _of_several(name, others)))
            return found
    if len(held) > 1:
        raise ValueError(f"{path} has several state dicts; {_contents(content, held)}")
    for state in held.values():
        return _found(state, path)
    raise ValueError(f"{path} has no state dict; {_contents(content, held)}")


def _of_several(taken: str, others: list[str]) -> str:
    """A note on which of several sets of weights was taken."""
    return (
        f"the weights under {taken!r} were taken; the file also holds {listed(others)}: take "
        f"another with key='{short(others[0])}'"
    )


class _Search:
    """Searches nested mappings, each of them once, however often a file refers to it."""

    def __init__(self) -> None:
        self._known: dict[int, bool] = {}
        self._entered: set[int] = set()

    def is_state_dict(self, found: Any) -> bool:
        """Whether something maps names to tensors, at least one of them with two dimensions.

        The state of an optimizer is none.
        """
        if not isinstance(found, Mapping):
            return False
        if id(found) not in self._known:
            self._known[id(found)] = _has_matrix(found) and not _OF_OPTIMIZERS.issuperset(found)
        return self._known[id(found)]

    def state_dicts(self, found: Any) -> dict[str, Any]:
        """The state dicts in what a file holds, by their path; "" stands for all that it holds."""
        inside = self._inside(found, depth=1)
        # A matrix beside a state dict with one of the usual names is something else, such as the
        # weights of classes.
        if self.is_state_dict(found) and set(_KEYS).isdisjoint(inside):
            return {"": found}
        if inside:
            return inside
        self._entered.clear()
        return self._inside(found, depth=_DEEPEST)

    def _inside(self, found: Any, above: str = "", *, depth: int) -> dict[str, Any]:
        """The state dicts within mappings, nested at most ``depth`` deep, by their path.

        Names that are not strings are passed over: an optimizer's state has numbers for names.
        """
        held: dict[str, Any] = {}
        if depth == 0 or not isinstance(found, Mapping) or id(found) in self._entered:
            return held
        self._entered.add(id(found))
        for name, one in found.items():
            if not isinstance(name, str) or starts_with_one_of(name, _NOT_WEIGHTS):
                continue
            if self.is_state_dict(one):
                held[above + name] = one
            else:
                held |= self._inside(one, f"{above}{name}.", depth=depth - 1)
        return held


def _has_matrix(found: Mapping[Any, Any]) -> bool:
    for name, x in found.items():
        one = x[0] if is_packed_pair(str(name), x) else x
        if isinstance(one, Tensor) and one.ndim > 1:
            return True
    return False


def _at(found: Any, key: str) -> Any:
    """What nested mappings hold under a key or a dotted path of keys; None if nothing."""
    rest = key
    while isinstance(found, Mapping):
        if rest in found:
            return found[rest]
        first, dot, rest = rest.partition(".")
        if not dot:
            return None
        found = found.get(first)
    return None


def _found(state: Mapping[Any, Any], path: Path) -> Found:
    """The tensors of a state dict."""
    found = Found()
    named = {str(name): x for name, x in state.items() if isinstance(name, (str, int))}
    for name, x in with_quantised_linears(named).items():
        if not isinstance(x, Tensor):
            continue
        if x.is_nested:
            found.notes.append((short(name), "left out: a nested tensor has no shape"))
        else:
            check_tensor(path, name, x)
            found.tensors[name] = x
    return found


def _contents(content: Any, held: Mapping[str, Any]) -> str:
    """What a file holds, for an error message."""
    if isinstance(content, Opaque):
        return "it holds one object, such as a whole model: save its state_dict() instead"
    if not isinstance(content, Mapping):
        return f"it holds {type(content).__name__}"
    if list(held) == [""]:
        return "it is one set of weights: it needs no key"
    if held:
        return f"it holds {listed(held)}; choose one with --key or key="
    for name in content:
        if isinstance(name, str) and name in _KEYS and isinstance(content[name], Opaque):
            return (
                f"{name!r} is one object, such as a whole model: load it with its own library and "
                "save its state_dict() instead"
            )
    names = [name for name in content if isinstance(name, str)]
    for name in names:
        if starts_with_one_of(name, ("optim", "fp32_flat_groups")) or name == "param_groups":
            return f"it holds {listed(names)}: the state of an optimizer"
    return f"it holds {listed(names) or 'nothing'}"

"""Does a set of tensors fit a model, to the last name and shape? And if not, which config value says so?

Tensors may have any shape [...] and dtype here. No arithmetic, and so no source but names and shapes of the
published weights (paper, arXiv 2602.14041), which the models' state dicts have.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LISTED = 20  # tensors named per kind of problem; a wrong number of layers alone would give hundreds


class TensorSpec(NamedTuple):
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the elements take."""
        return self.numel * self.dtype.itemsize


def module_specs(module: nn.Module) -> dict[str, TensorSpec]:
    """Name, shape [...] and dtype of each entry of a module's state dict."""
    return specs_in(module.state_dict())


def specs_in(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Shape [...] and dtype of each of ``tensors``, by name; their values are not read."""
    return {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in tensors.items()}


def specs_of(make: Callable[[], nn.Module]) -> dict[str, TensorSpec]:
    """Shape [...] and dtype of each tensor of the module that ``make`` builds, without memory for them."""
    with torch.device("meta"):
        return module_specs(make())


class Rule(NamedTuple):
    """The config values that decide whether tensors of some name exist, and their shapes."""

    pattern: str  # a regular expression over the whole name
    file: str  # the config file that holds the keys
    keys: tuple[str, ...]


def check_tensors(
    found: Mapping[str, TensorSpec],
    expected: Mapping[str, TensorSpec],
    where: str,
    explain: Callable[[str], str],
) -> None:
    """Compare names and shapes [...] (dtypes may differ: weights are published in several).

    Args:
        found: what the files hold, by name.
        expected: what the configured model has, by name.
        where: the folder or file, for the message.
        explain: name -> the config values behind it, such as ``config.json: num_hidden_layers = 40``.

    Raises:
        ValueError: something is missing, unexpected or misshapen; the message lists all three kinds.
    """
    missing = [f"{name} {_sides(expected[name].shape)}" for name in expected if name not in found]
    unexpected = [f"{name} {_sides(found[name].shape)}" for name in found if name not in expected]
    misshapen = [
        f"{name} is {_sides(found[name].shape)}, expected {_sides(spec.shape)}"
        for name, spec in expected.items()
        if name in found and found[name].shape != spec.shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
    if not (missing or unexpected or misshapen):
        return
    lines = [f"{where}: the weights do not fit their configuration."]
    for kind, entries in kinds:
        if entries:
            lines.append(f"{len(entries)} {kind}:")
            lines += [f"  {entry}{_because(explain(entry.split(' ', 1)[0]))}" for entry in entries[:LISTED]]
        if len(entries) > LISTED:
            lines.append(f"  ... and {len(entries) - LISTED} more")
    lines.append("Take weights and configuration from the same model, or mend the values named here.")
    raise ValueError("\n".join(lines))


def explain_by(rules: tuple[Rule, ...], configs: Mapping[str, Mapping[str, Any]]) -> Callable[[str], str]:
    """An ``explain`` for `check_tensors`: the first rule that fits a name tells the values to show."""

    def explain(name: str) -> str:
        for rule in rules:
            if re.fullmatch(rule.pattern, name):
                values = configs.get(rule.file, {})
                shown = ", ".join(f"{key} = {values[key]!r}" for key in rule.keys if key in values)
                return f"{rule.file}: {shown}" if shown else ""
        return ""

    return explain


def _because(reason: str) -> str:
    return f" ({reason})" if reason else ""


def _sides(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"

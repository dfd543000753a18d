"""Scalars: one number out of whatever type a trainer holds it in; all tensors of a device in one transfer."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

Say = Callable[[str, str], None]
"""Takes a key, said once, and a sentence."""
_LONG = 60


def read_all(items: Mapping[str, Any], values: dict[str, float], say: Say) -> None:
    """Enter every item that is one real number into `values`, and say what was not. Never raises."""
    tensors: dict[str, Any] = {}
    for name, value in items.items():
        _convert(name, value, values, tensors, say)
    if tensors:
        _transfer(tensors, values, say)


def shown(value: object) -> str:
    """Return a value as a message shows it, cut short where it is long."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _LONG else text[: _LONG - 3] + "..."


def _convert(name: str, value: Any, values: dict[str, float], tensors: dict[str, Any], say: Say) -> None:  # noqa: ANN401
    """File one value that is no plain float: a number at once, a tensor for the common transfer."""
    torch = sys.modules.get("torch")
    try:
        if torch is not None and isinstance(value, torch.Tensor):
            if value.numel() == 1 and not value.is_complex():
                tensors[name] = value
            else:
                say(f"value:{name}", f"metric {name} is a tensor of shape {tuple(value.shape)} and type "
                    f"{value.dtype}, not one real number: reduce it before observe; not watched")  # fmt: skip
        elif isinstance(value, str | bytes | bytearray | memoryview):
            say(f"value:{name}", f"metric {name} is text ({shown(value)}), not a number: not watched")
        elif getattr(getattr(value, "dtype", None), "kind", "f") not in "biufV":  # V: bfloat16 and kin
            say(f"value:{name}", f"metric {name} is of type {value.dtype}, not a real number: not watched")
        elif getattr(value, "size", 1) != 1:
            say(f"value:{name}", f"metric {name} is an array of {value.size}: reduce it before observe; not watched")
        else:
            values[name] = float(value.item() if hasattr(value, "item") else value)
    except OverflowError:
        values[name] = math.inf if value > 0 else -math.inf
    except Exception:  # noqa: BLE001
        say(f"value:{name}", f"metric {name} is a {type(value).__name__}, not a number: not watched")


def _transfer(tensors: Mapping[str, Any], values: dict[str, float], say: Say) -> None:
    """Bring all tensors to the host: one stack and one transfer a device, whatever their dtypes."""
    torch = sys.modules["torch"]
    by_device: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        try:
            device = str(tensor.device)
            wide = torch.float32 if device.startswith("mps") else torch.float64  # MPS knows no float64
            by_device.setdefault(device, {})[name] = tensor.detach().reshape(()).to(wide)
        except Exception as error:  # noqa: BLE001 - one that cannot be read must not blind the others
            _unreadable(name, tensor, error, say)
    for flat in by_device.values():
        try:
            values.update(zip(flat, torch.stack(list(flat.values())).tolist(), strict=True))
        except Exception:  # noqa: BLE001 - then each by itself
            for name, tensor in flat.items():
                try:
                    values[name] = float(tensor.item())
                except Exception as error:  # noqa: BLE001
                    _unreadable(name, tensor, error, say)


def _unreadable(name: str, tensor: Any, error: Exception, say: Say) -> None:  # noqa: ANN401
    why = f"{type(error).__name__}: {str(error)[:_LONG]}"
    say(f"value:{name}", f"metric {name} is a tensor of type {tensor.dtype} that cannot be read ({why}): not watched")

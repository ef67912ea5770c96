"""Python values as JSON and arrays, exactly: what comes back equals what went in, to the type and the bit.

JSON holds text, numbers, lists and mappings by itself. What it does not know is a mapping with the key `~`: a tuple, a
set, bytes, a mapping with other keys than text, a numpy array or scalar, a tensor of torch. The bytes of the last five
lie outside, in arrays that the JSON names by number. Nothing is pickled: what is none of these is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from miles.errors import DataError

TAG = "~"
KINDS = "text, numbers, None, bytes, numpy arrays and tensors, and lists, tuples, sets and mappings of them"
COLLECTIONS: dict[str, Any] = {kind.__name__: kind for kind in (tuple, set, frozenset)}
BYTES: dict[str, Any] = {kind.__name__: kind for kind in (bytes, bytearray)}
ATOMS = frozenset({str, int, float, bool, type(None)})


class Packer:
    """Turns values into what JSON can hold, and collects arrays. An array that is met twice is kept once."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self._known: dict[int, tuple[Any, dict[str, Any]]] = {}  # keeps the object, so that its id stays its own

    def pack(self, value: Any, where: str) -> Any:
        """What stands for `value` in the JSON.

        Raises:
            DataError: it is, or holds, what cannot be kept; the message begins with `where` and the keys that lead to
                it.
        """
        if type(value) in ATOMS:
            return value
        if isinstance(value, list):
            return [self.pack(item, f"{where}[{index}]") for index, item in enumerate(value)]
        if isinstance(value, dict):
            return self._pack_mapping(value, where)
        for name, kind in COLLECTIONS.items():
            if isinstance(value, kind):
                return {TAG: name, "items": self.pack(list(value), where)}
        if isinstance(value, np.ndarray | np.generic | bytes | bytearray) or _is_tensor(value):
            if id(value) not in self._known:
                self._known[id(value)] = value, self._pack_array(value, where)
            return self._known[id(value)][1]
        if isinstance(value, str | int | float):
            return value  # an enum of text or of numbers comes back as what it equals
        raise _refusal(where, f"{type(value).__module__}.{type(value).__qualname__}")

    def _pack_mapping(self, value: dict, where: str) -> dict[str, Any]:
        if TAG not in value and all(type(key) is str for key in value):
            return {key: self.pack(item, f"{where}[{key!r}]") for key, item in value.items()}
        pairs = [
            [self.pack(key, f"the key {key!r} of {where}"), self.pack(item, f"{where}[{key!r}]")]
            for key, item in value.items()
        ]
        return {TAG: "dict", "items": pairs}

    def _pack_array(self, value: Any, where: str) -> dict[str, Any]:
        if isinstance(value, bytes | bytearray):
            return {TAG: type(value).__name__, "array": self._keep(np.frombuffer(value, np.uint8))}
        if isinstance(value, np.ndarray | np.generic):
            check_dtype(value.dtype, where)
            kind = "array" if isinstance(value, np.ndarray) else "scalar"
            return {TAG: kind, "array": self._keep(np.asarray(value))}
        if value.layout is not sys.modules["torch"].strided:
            raise _refusal(where, f"tensor with layout {value.layout}")
        flat = value.detach().cpu().contiguous().reshape(-1)  # as bytes: numpy has no bfloat16
        tensor = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        return {TAG: "tensor", **tensor, "array": self._keep(flat.view(sys.modules["torch"].uint8).numpy())}

    def _keep(self, array: np.ndarray) -> int:
        self.arrays.append(array)
        return len(self.arrays) - 1


class Unpacker:
    """The way back. `array(number)` reads an array that is writable and nobody else's."""

    def __init__(self, array: Callable[[int], np.ndarray]):
        self._array = array
        self._known: dict[int, Any] = {}

    def unpack(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.unpack(item) for item in value]
        if not isinstance(value, dict):
            return value
        if TAG not in value:
            return {key: self.unpack(item) for key, item in value.items()}
        kind = value[TAG]
        if kind == "dict":
            return {self.unpack(key): self.unpack(item) for key, item in value["items"]}
        if kind in COLLECTIONS:
            return COLLECTIONS[kind](self.unpack(value["items"]))
        number = value["array"]
        if number not in self._known:
            self._known[number] = self._unpack_array(kind, self._array(number), value)
        return self._known[number]

    def _unpack_array(self, kind: str, array: np.ndarray, value: dict[str, Any]) -> Any:
        if kind == "tensor":
            import torch

            tensor = torch.empty(value["shape"], dtype=getattr(torch, value["dtype"]))
            tensor.reshape(-1).view(torch.uint8).copy_(torch.from_numpy(array))
            return tensor
        return array if kind == "array" else array[()] if kind == "scalar" else BYTES[kind](array)


def check_dtype(dtype: np.dtype, where: str) -> None:
    """Refuse arrays of Python objects, and number formats that are not numpy's own.

    Raises:
        DataError: a file could not hold it exactly.
    """
    if dtype.hasobject or (dtype.names is None and np.dtype(dtype.str) != dtype):
        raise _refusal(where, f"numpy array of dtype {dtype}")


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # where nobody has imported it, there is no tensor
    return torch is not None and isinstance(value, torch.Tensor)


def _refusal(where: str, what: str) -> DataError:
    return DataError(f"{where} is a {what}, which cannot be written down: keep {KINDS} there")

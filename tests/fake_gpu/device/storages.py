"""Copies of storages, which a CPU build of torch makes for its own devices only: ``deepcopy``, ``save``, ``load``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, UntypedStorage


def _bytes(storage: UntypedStorage) -> Tensor:
    """All of a storage as a tensor."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))


def _copied(self: Tensor, memo: dict[int, Any]) -> Tensor:
    """A deep copy of a tensor on the device, as torch's: storages that are shared stay shared."""
    with torch.no_grad():
        storage = self.untyped_storage()
        # torch's own key
        key: Any = storage._cdata
        if key not in memo:
            memo[key] = _bytes(storage).clone().untyped_storage()
        copy = torch.empty(0, dtype=self.dtype, device=self.device)
        copy.set_(memo[key], self.storage_offset(), self.size(), self.stride())
    if isinstance(self, torch.nn.Parameter):
        copy = type(self)(copy, self.requires_grad)
    else:
        copy.requires_grad_(self.requires_grad)
    if self.grad is not None:
        copy.grad = self.grad.__deepcopy__(memo)
    memo[id(self)] = copy
    return copy


def _deepcopy_of(cls: type[Tensor]) -> None:
    own: Any = cls.__deepcopy__

    def deepcopy(self: Tensor, memo: dict[int, Any]) -> Any:
        if type(self) not in (Tensor, torch.nn.Parameter) or not self.is_cuda or not self.is_leaf:
            return own(self, memo)
        if self.layout is not torch.strided or id(self) in memo:
            return own(self, memo)
        return _copied(self, memo)

    cls.__deepcopy__ = deepcopy  # type: ignore[method-assign, assignment]


def install() -> None:
    """Put them in place."""
    _deepcopy_of(Tensor)
    _deepcopy_of(torch.nn.Parameter)
    storage_module: Any = torch.storage
    to, clone, cpu = storage_module._to, UntypedStorage.clone, UntypedStorage.cpu

    def moved(self: UntypedStorage, device: Any, non_blocking: bool = False) -> UntypedStorage:
        device = torch.device(device)
        if "cuda" not in (self.device.type, device.type):
            return to(self, device, non_blocking)
        return _bytes(self).to(device, copy=True).untyped_storage()

    storage_module._to = moved
    UntypedStorage.clone = lambda self: _bytes(self).clone().untyped_storage() if self.is_cuda else clone(self)  # type: ignore[method-assign]
    UntypedStorage.cpu = lambda self: moved(self, "cpu") if self.is_cuda else cpu(self)  # type: ignore[method-assign]

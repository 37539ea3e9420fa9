"""The tensors of a module by plain name and with their effective values, with or without parametrizations.

torch keeps a weight W that has parametrizations as `parametrizations.W.original` and further tensors, from which the
effective W is computed in each forward pass. Checkpoints hold the effective value under the name W.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from adaclip_finetune.errors import UserError

_LISTED = 20
_ORIGINAL = re.compile(r"parametrizations\.([^.]+)\.original$")


class Added(nn.Module):
    """Base class of modules that a method adds to CLIP and that act through hooks, which must be their own methods.

    They cannot be merged into weights. A copy of CLIP has copies of them, and `plain_copy` leaves them out.
    """


def plain_name(name: str) -> str | None:
    """Return the plain name of an entry of a state dict; None for a tensor that a parametrization added."""
    plain = _ORIGINAL.sub(r"\1", name)
    return None if "parametrizations." in plain else plain


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the module without its parametrizations, whose effect is in the values; detached."""
    state = {name: tensor for name, tensor in module.state_dict().items() if "parametrizations." not in name}
    with torch.no_grad():
        for prefix, part in module.named_modules():
            if parametrize.is_parametrized(part):
                for tensor in part.parametrizations:
                    state[f"{prefix}.{tensor}" if prefix else tensor] = _effective(part, tensor)
    return state


def plain_copy(module: nn.Module) -> nn.Module:
    """Return a copy of the module without parametrizations, with the effective values as its weights, and without
    `Added` modules.

    A deep copy alone shares the parametrized classes, and with them torch's cache, with the original.
    """
    twin = copy.deepcopy(module)
    for part in list(twin.modules()):
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Added)]:
                del hooks[key]
        for name, child in list(part.named_children()):
            if isinstance(child, Added):
                delattr(part, name)
        if parametrize.is_parametrized(part):
            names = [name for name, _ in part.get_submodule("parametrizations").named_children()]
            values = {name: _effective(part, name) for name in names}
            del part.parametrizations
            # The class that torch made has the tensors as properties; a subclass of it may have been made since.
            made = next(kind for kind in type(part).__mro__ if names[0] in vars(kind))
            part.__class__ = made.__bases__[0]
            for name, value in values.items():
                part.register_parameter(name, nn.Parameter(value))
    return twin


def _effective(module: nn.Module, name: str) -> Tensor:
    """Return a parametrized tensor as it is in evaluation, without dropout, whatever mode the module is in."""
    parametrizations: nn.Module = module.get_submodule(f"parametrizations.{name}")
    training = parametrizations.training
    parametrizations.eval()
    value: Tensor = getattr(module, name).detach()
    parametrizations.train(training)
    return value


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 digest of the plain names, shapes and effective values of all weights, in hexadecimal.

    A checkpoint recognises by it the pretrained CLIP that it belongs to.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(plain_state(model).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def strict_load(module: nn.Module, state: Mapping[str, Tensor], source: str, advice: str = "") -> None:
    """Copy `state` into `module`. Raise UserError listing tensors that are missing, unexpected or of another shape.

    `state` has plain names, which fill the weights under parametrizations and leave these unchanged, or the names of
    `module.state_dict()`, which fill both. A module on the meta device is compared but not filled. `advice` ends the
    message of the error.
    """
    own = module.state_dict()
    raw = any("parametrizations." in name for name in state)
    wanted = {plain: name for name in own if (plain := name if raw else plain_name(name))}
    # Batch counters are not weights, and old torchvision files lack them.
    given = {name: own[name] for name in own if name.endswith(".num_batches_tracked")} | dict(state)
    problems = [f"missing: {name} {tuple(own[real].shape)}" for name, real in wanted.items() if name not in given]
    for name, tensor in given.items():
        if name not in wanted:
            problems.append(f"unexpected: {name} {tuple(tensor.shape)}")
        elif tensor.shape != own[wanted[name]].shape:
            wanted_shape = tuple(own[wanted[name]].shape)
            problems.append(f"shape: {name} is {tuple(tensor.shape)}, the model has {wanted_shape}")
    if problems:
        more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        listed = [f"{source} does not fit the model ({len(problems)} tensors):", *problems[:_LISTED], *more]
        raise UserError(("\n  ".join(listed) + f"\n{advice}").rstrip())
    if not any(tensor.is_meta for tensor in own.values()):
        module.load_state_dict(own | {real: given[name] for name, real in wanted.items()})

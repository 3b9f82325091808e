"""What an attention layer of another library computes, found by running a copy of it."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import (
    is_parametrized,
    type_before_parametrizations,
)

from swiftkernels.backends import torch_state
from swiftkernels.ops import linear_parts
from swiftkernels.ops.additive_attention import reference
from swiftkernels.ops.additive_attention.layer import AttentionForward, Names
from swiftkernels.ops.additive_attention.weights import Options
from swiftkernels.ops.plan import KeepsPlans
from swiftkernels.ops.types import Backend, Layout, Pooling
from swiftkernels.utils.text import first_line

OFFICIAL = Names(proj="Proj")
EPS = 1e-12
PROBES = ((2, 5, 1.0), (1, 80, 1e-6))
"""Batch elements, tokens and scale of the random inputs. Tiny inputs show another eps of the norms,
more tokens show layers that process only some of them."""
PARAMETRIZED = "parametrizations"
"""Name of the submodule that PyTorch adds to parametrized modules."""
TOLERANCE = 1e-6
"""Largest relative error, in float64, between a layer and the variant that it computes."""

Candidate = tuple[Pooling, bool, Layout]
"""Pooling, qk_norm and layout."""


class Variant(NamedTuple):
    """What a layer computes with its weights."""

    pooling: Pooling
    qk_norm: bool
    layout: Layout
    """"channels_last" for [B, N, C], "channels_first" for [B, C, H, W], "auto" for both."""

    def __str__(self) -> str:
        return f"pooling {self.pooling}{'' if self.qk_norm else ', qk_norm=False'}"


class LayerSpec(NamedTuple):
    """What `AttentionForward` needs to know of a layer, besides its parts."""

    variant: Variant
    in_dims: int
    scale: float

    def attributes(self, backend: Backend, recompute: bool | None) -> dict[str, Any]:
        """The attributes that `AttentionForward` reads."""
        return {
            "in_dims": self.in_dims,
            "scale_factor": self.scale,
            "eps": EPS,
            "backend": backend,
            "recompute": recompute,
            **self.variant._asdict(),
        }


def part_names(module: nn.Module, given: Names | None = None) -> Names | None:
    """The names of the parts of a module, if it has all parts of an additive attention.

    Nothing is computed: reading a parametrized w_g would call its parametrization.
    """
    for names in (given,) if given else (Names(), OFFICIAL):
        parts = [module._modules.get(name) for name in names[:4]]
        if all(part is not None for part in parts) and _has_tensor(module, names.w_g):
            return names
    return None


def _has_tensor(module: nn.Module, name: str) -> bool:
    if is_parametrized(module, name):
        return True
    tensors = (module._parameters, module._buffers, vars(module))
    return any(isinstance(of.get(name), Tensor) for of in tensors)


def inspect_layer(module: nn.Module, names: Names) -> tuple[LayerSpec | None, str]:
    """What a layer computes, or None and why it cannot be accelerated. Only a copy of it runs."""
    if isinstance(module, AttentionForward):
        return None, "it has these kernels"
    if "forward" in vars(module):
        return None, "its forward was replaced"
    more = _additional(module, names)
    if more:
        return None, f"it has more than the parts of an additive attention: {more}"
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        return None, "its weights have no values yet (device meta)"
    try:
        with isolated():
            spec, reason = _probe(copy_in_float64(module), names)
    except Exception as error:  # a copy of an unknown layer may raise anything
        return None, f"a copy of it could not be run ({first_line(error)})"
    if spec is not None:
        taken = collisions(module, AttentionForward, spec.attributes("auto", None))
        if taken:
            return None, f"its own {', '.join(taken)} would be overwritten. Rename them"
    return spec, reason


def _additional(module: nn.Module, names: Names) -> str:
    """Parts and arguments besides the five parts and x, which the kernels would ignore."""
    own = {*module._modules, *module._parameters, *module._buffers} - {*names, PARAMETRIZED}
    if own:
        return ", ".join(sorted(own))
    arguments = list(inspect.signature(type(module).forward).parameters)[2:]
    if arguments:
        return f"arguments {', '.join(arguments)} of its forward"
    return ""


def collisions(
    module: nn.Module, forward: type[nn.Module], attributes: Mapping[str, Any]
) -> list[str]:
    """Attributes of a layer with names that `forward`, a base class, uses for something else."""
    kinds = type_before_parametrizations(module).__mro__
    theirs = {name for kind in kinds[: kinds.index(nn.Module)] for name in vars(kind)}
    own = {*vars(forward), *vars(KeepsPlans)} - {"forward"}
    ours = {name for name in own if not name.startswith("__")}
    differing = {n for n, value in attributes.items() if vars(module).get(n, value) != value}
    return sorted((ours & (theirs | vars(module).keys())) | differing)


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Inside, nothing outside of the copies that are run changes, nor changes what they compute."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch_state.without_global_hooks(),
    ):
        yield


def copy_in_float64(module: nn.Module) -> nn.Module:
    """A copy on the CPU, without hooks and with constant weights in place of parametrized ones.

    A parametrization may give another weight at every access, as spectral_norm does in training.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, dict) and name.endswith("hooks"):
                memo[id(value)] = type(value)()
            elif isinstance(value, Tensor):  # computed by a hook: neither parameter nor buffer
                memo[id(value)] = _to_float64(value.detach())
    clone: nn.Module = copy.deepcopy(module, memo)._apply(_to_float64)
    for part in clone.modules():
        if is_parametrized(part):
            # remove_parametrizations would change the class, which the original has too.
            names: Any = part._modules[PARAMETRIZED]
            values = {name: getattr(part, name).detach() for name in names}
            kind = type_before_parametrizations(part)
            del part._modules[PARAMETRIZED]
            part.__class__ = kind
            for name, value in values.items():
                part.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return clone


def _to_float64(t: Tensor) -> Tensor:
    return t.double().cpu() if t.is_floating_point() else t.cpu()


def _probe(clone: nn.Module, names: Names) -> tuple[LayerSpec | None, str]:
    """Compare the output of a copied layer on random tokens with that of all variants."""
    in_dims, token_dim = widths(clone, names)
    scale = score_scale(clone, token_dim)
    generator = torch.Generator().manual_seed(0)
    candidates: set[Candidate] | None = None
    for batch, n_tokens, size in PROBES:
        x = size * torch.randn(batch, n_tokens, in_dims, generator=generator, dtype=torch.float64)
        for training in (False, True) if not linear_parts.called(clone, names[:4]) else (False,):
            outputs, reason = _outputs(clone.train(training), x)
            if not outputs:
                shapes = f"[B, N, {in_dims}] nor [B, {in_dims}, H, W]"
                return None, f"its forward accepts neither {shapes} ({reason})"
            found = _matches(clone, names, x, outputs, scale)
            candidates = found if candidates is None else candidates & found
    if not candidates:
        return None, "it computes something else: no pooling gives its output"
    variants = {(pooling, qk_norm) for pooling, qk_norm, _ in candidates}
    if len(variants) > 1:
        return None, (
            "several poolings give the same output with its weights. Load weights that are not "
            "zero first"
        )
    ((pooling, qk_norm),) = variants
    layouts = [layout for _, _, layout in candidates]
    variant = Variant(pooling, qk_norm, layouts[0] if len(layouts) == 1 else "auto")
    return LayerSpec(variant, in_dims, scale), ""


def _matches(
    clone: nn.Module, names: Names, x: Tensor, outputs: Mapping[Layout, Tensor], scale: float
) -> set[Candidate]:
    """The variants that give these outputs for x."""
    query, key, proj, final = (getattr(clone, name) for name in names[:4])
    w_g = getattr(clone, names.w_g).flatten()
    found: set[Candidate] = set()
    for pooling, qk_norm in itertools.product(get_args(Pooling), (True, False)):
        options = Options(pooling, qk_norm, scale, EPS)
        expected = reference.attend(query(x), key(x), w_g, proj, final, None, options)
        for layout, out in outputs.items():
            if is_near(out, expected):
                found.add((pooling, qk_norm, layout))
    return found


def is_near(out: Tensor, expected: Tensor) -> bool:
    """Whether two tensors in float64 have one shape and differ by rounding errors only."""
    if out.shape != expected.shape:
        return False
    return bool((out - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _outputs(clone: nn.Module, x: Tensor) -> tuple[dict[Layout, Tensor], str]:
    """The outputs of a copied layer for x [B, N, C] in both layouts; why there is none."""
    images = x.transpose(1, 2).unsqueeze(2)  # [B, C, 1, N]
    inputs: dict[Layout, Tensor] = {"channels_last": x, "channels_first": images}
    outputs: dict[Layout, Tensor] = {}
    reason = ""
    for layout, argument in inputs.items():
        try:
            out = type(clone).forward(clone, argument)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            continue
        if isinstance(out, Tensor):
            outputs[layout] = out if layout == "channels_last" else out.flatten(2).transpose(1, 2)
    return outputs, reason


def widths(module: nn.Module, names: Names) -> tuple[int, int]:
    """The widths C of the input and D of the output, from the query layer and `final`.

    Raises:
        ValueError: they have neither attributes nor weights that show them.
    """
    found = []
    for name, attribute, axis in (
        (names.query, "in_features", 1),
        (names.final, "out_features", 0),
    ):
        part = getattr(module, name)
        width, weight = getattr(part, attribute, None), getattr(part, "weight", None)
        if not isinstance(width, int):
            if not isinstance(weight, Tensor) or weight.dim() != 2:
                raise ValueError(f"{name}, a {type(part).__name__}, has no {attribute}")
            width = weight.shape[axis]
        found.append(width)
    return found[0], found[1]


def score_scale(module: nn.Module, token_dim: int) -> float:
    """The factor of the scores: `scale_factor` of the layer, or token_dim ** -0.5."""
    own = getattr(module, "scale_factor", None)
    return float(own) if isinstance(own, (int, float)) else token_dim**-0.5

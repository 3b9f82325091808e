"""Models from folders and repositories of timm and transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from swiftkernels.models.checkpoint_io import (
    Loaded,
    architecture,
    fit_to,
    put_into,
    read_checkpoint,
)
from swiftkernels.models.swiftformer.network import SwiftFormer
from swiftkernels.utils.extras import need

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""What the weights are called in a folder, by preference."""
CONFIG = "config.json"

ONLY = {
    "hidden_act": "gelu",
    "batch_norm_eps": 1e-5,
    "down_patch_size": 3,
    "down_stride": 2,
    "down_pad": 1,
}
"""What a configuration of transformers may say only so: it shows in no tensor."""


FROM_WEIGHTS = ("widths", "depths", "in_chans", "mlp_ratio", "use_layer_scale")
"""Options of `SwiftFormer` that follow from the weights."""


class Pretrained(NamedTuple):
    """A model, and where it is from."""

    model: SwiftFormer
    """In evaluation mode."""
    report: Loaded
    """What was loaded, with which pooling; print it."""
    config: dict[str, Any]
    """What config.json says; empty without one."""


def from_pretrained(
    checkpoint: str | Path,
    *,
    source: str | None = None,
    prefix: str = "",
    ema: bool = False,
    pooling: str | None = None,
    revision: str | None = None,
    **options: Any,
) -> Pretrained:
    """The model that a checkpoint holds, its sizes told by the shapes of the weights.

    Args:
        checkpoint: a repository of huggingface.co ("MBZUAI/swiftformer-xs", "timm/..."), a folder
            as these, with model.safetensors or pytorch_model.bin, or a file. What exists is taken
            for a path.
        source, prefix, ema, pooling: as in `load_checkpoint`.
        revision: branch, tag or commit of the repository.
        options: of `SwiftFormer`. Another `num_classes` than the file's gets fresh heads, for
            fine-tuning; `features_only=True` leaves them out.

    Raises:
        ValueError: no such file, or what `load_checkpoint` raises; a configuration with a variant
            that this library does not have.
        ImportError: huggingface_hub, or for .safetensors safetensors, is not installed.

    Example:
        >>> model, report, _ = from_pretrained("MBZUAI/swiftformer-xs")  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
    """
    weights, config_file = _found(checkpoint, revision)
    config = _read_config(config_file)
    found = read_checkpoint(weights, source=source, prefix=prefix, ema=ema)
    told = architecture(found.state_dict, found.name)
    fixed = [name for name in FROM_WEIGHTS if name in options]
    if fixed:
        raise ValueError(
            f"options must leave {', '.join(fixed)} to the checkpoint, whose weights fit nothing "
            "else. Build a SwiftFormer and use load_checkpoint(..., strict=False)."
        )
    fresh = options.get("num_classes", told["num_classes"]) != told["num_classes"]
    if pooling is not None:
        options["pooling"] = pooling
    if not options.get("features_only", told["features_only"]):
        told["out_indices"] = None
    options = {**told, **options}
    # Before memory is allocated: a small file can name the sizes of a huge model.
    skeleton = SwiftFormer(**{**options, "device": "meta"})
    fit_to(skeleton.state_dict(), found, fresh_heads=fresh)
    model = SwiftFormer(**options)
    report = put_into(model, found, pooling=pooling, fresh_heads=fresh)
    return Pretrained(model.eval(), report, config)


def class_names(config: Mapping[str, Any], num_classes: int) -> list[str] | None:
    """The names of the classes in a configuration of timm or transformers; None without them."""
    names = config.get("label_names") or config.get("id2label")
    if isinstance(names, Mapping):
        names = [names.get(str(i)) for i in range(num_classes)]
    if not isinstance(names, list) or len(names) != num_classes or None in names:
        return None
    described = config.get("label_descriptions")
    if isinstance(described, Mapping):
        names = [described.get(name, name) for name in names]
    return [str(name) for name in names]


def _found(checkpoint: str | Path, revision: str | None) -> tuple[Path, Path | None]:
    """The files with the weights and the configuration, fetched if they are not here."""
    path = Path(checkpoint)
    if path.is_file():
        beside = path.with_name(CONFIG)
        return path, beside if path.name in WEIGHTS and beside.is_file() else None
    if path.is_dir():
        config = path / CONFIG
        for name in WEIGHTS:
            if (path / name).is_file():
                return path / name, config if config.is_file() else None
        raise ValueError(f"{path} must hold {' or '.join(WEIGHTS)}; it holds neither.")
    named = isinstance(checkpoint, str) and not checkpoint.startswith((".", "/"))
    if not named or str(checkpoint).count("/") != 1:
        raise ValueError(
            "checkpoint must be a file, a folder, or a repository 'owner/name' of huggingface.co; "
            f"{checkpoint} does not exist."
        )
    return _download(str(checkpoint), revision)


def _download(repository: str, revision: str | None) -> tuple[Path, Path | None]:
    hub: Any = need(
        "huggingface_hub", "hub", f"{repository} is no file or folder here; fetching it"
    )
    absent: Any = need("huggingface_hub.errors", "hub", "Fetching a repository")

    def fetch(name: str) -> Path | None:
        try:
            return Path(hub.hf_hub_download(repository, name, revision=revision))
        except absent.LocalEntryNotFoundError as error:  # no connection, and not in the cache
            reason: Exception = error
        except absent.EntryNotFoundError:
            return None
        except (absent.HfHubHTTPError, absent.HFValidationError, OSError) as error:
            reason = error
        said = next(iter(str(reason).strip().splitlines()), type(reason).__name__)
        raise ValueError(
            f"{repository} is no file or folder here, and huggingface.co does not give it: {said}"
        ) from reason

    for name in WEIGHTS:
        weights = fetch(name)
        if weights is not None:
            return weights, fetch(CONFIG)
    raise ValueError(f"{repository} must hold {' or '.join(WEIGHTS)}; it holds neither.")


def _read_config(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds a {type(config).__name__}.")
    kind = config.get("model_type") or config.get("architecture") or "swiftformer"
    if not str(kind).startswith("swiftformer"):
        raise ValueError(f"{path} must be of a SwiftFormer; it is of {kind!r}.")
    for name, value in ONLY.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{path} says {name} = {config[name]!r}; swiftkernels.models has {value!r} alone. "
                "Use the model of transformers, with swiftkernels.accelerate."
            )
    return config

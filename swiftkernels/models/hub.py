"""`from_pretrained`: networks from files, folders and repositories of timm and transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swiftkernels.models.checkpoint_io import LoadReport, fit_to, load_weights, read_checkpoint
from swiftkernels.models.family import Source, families
from swiftkernels.models.network import Network
from swiftkernels.ops.types import Pooling
from swiftkernels.utils.extras import need
from swiftkernels.utils.text import shown

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""File names of the weights in a folder, in the order of preference."""
CONFIG = "config.json"


@dataclass(frozen=True)
class Pretrained:
    """What `from_pretrained` read: the attribute `pretrained` of the network that it returns."""

    report: LoadReport
    """What was loaded, with which pooling; print it."""
    config: dict[str, Any]
    """Content of config.json; empty without that file."""
    class_names: list[str] | None
    """Names of the network's classes in config.json; None without them."""


def from_pretrained(
    checkpoint: str | Path,
    *,
    source: Source | None = None,
    prefix: str = "",
    ema: bool = False,
    pooling: Pooling | None = None,
    revision: str | None = None,
    **options: Any,
) -> Network:
    """The network of a checkpoint, in evaluation mode; its size follows from the weights.

    Args:
        checkpoint: a file; a folder of timm or transformers, with model.safetensors or
            pytorch_model.bin; or a repository of huggingface.co ("MBZUAI/swiftformer-xs",
            "timm/..."). An existing path comes first.
        source, prefix, ema, pooling: as in `load_checkpoint`.
        revision: branch, tag or commit of the repository.
        options: of the network (`SwiftFormer`). With another `num_classes` than in the file the
            heads are new, for fine-tuning; `features_only=True` builds a backbone without heads.

    Returns:
        The network. Its attribute `pretrained` holds the report of loading, config.json and the
        names of the classes (`Pretrained`).

    Raises:
        ValueError: no such file, or an error of `load_checkpoint`; a configuration that this
            library does not support.
        ImportError: huggingface_hub, or for .safetensors safetensors, is not installed.

    Example:
        >>> import tempfile
        >>> from swiftkernels.models import save_checkpoint, swiftformer_xs
        >>> file = Path(tempfile.mkdtemp()) / "xs.pth"
        >>> save_checkpoint(swiftformer_xs(num_classes=5), file)
        >>> model = from_pretrained(file)  # or "MBZUAI/swiftformer-xs"
        >>> model.num_classes, model.pretrained.report.pooling
        (5, 'l2')
    """
    weights, config_file = _find(checkpoint, revision)
    config = _read_config(config_file)
    found = read_checkpoint(weights, source=source, prefix=prefix, ema=ema)
    family = found.family
    if config_file is not None:
        family.check_config(config, config_file)
    derived = family.architecture(found.state_dict, found.name)
    fixed = [name for name in family.derived_options if name in options]
    if fixed:
        raise ValueError(
            f"options must not have {', '.join(fixed)}: the weights of the checkpoint fit no other "
            f"value. Build a {family.network.__name__} and use load_checkpoint(..., strict=False)."
        )
    fresh = options.get("num_classes", derived["num_classes"]) != derived["num_classes"]
    if pooling is not None:
        options["pooling"] = pooling
    if not options.get("features_only", derived["features_only"]):
        derived["out_indices"] = None
    options = {**derived, **options}
    # Compare on the meta device before memory is allocated: a small file can name huge sizes.
    skeleton = family.build(**{**options, "device": "meta"})
    fit_to(skeleton.state_dict(), found, fresh_heads=fresh)
    model = family.build(**options).eval()
    report = load_weights(model, found, pooling=pooling, fresh_heads=fresh)
    names = class_names(config, model.num_classes) if model.num_classes else None
    model.pretrained = Pretrained(report, config, names)
    return model


def class_names(config: Mapping[str, Any], num_classes: int) -> list[str] | None:
    """The names of the classes in a configuration of timm or transformers; None without them."""
    names = config.get("label_names") or config.get("id2label")
    if isinstance(names, Mapping):
        names = [names.get(str(i)) for i in range(num_classes)]
    if not isinstance(names, list) or len(names) != num_classes or None in names:
        return None
    described = config.get("label_descriptions")
    if isinstance(described, Mapping):
        names = [described.get(name, name) if isinstance(name, str) else name for name in names]
    return [str(name) for name in names]


def _find(checkpoint: str | Path, revision: str | None) -> tuple[Path, Path | None]:
    """The files with the weights and the configuration, downloaded if necessary."""
    path = Path(checkpoint)
    if path.is_file():
        config = path.with_name(CONFIG)
        return path, config if path.name in WEIGHTS and config.is_file() else None
    if path.is_dir():
        config = path / CONFIG
        for name in WEIGHTS:
            if (path / name).is_file():
                return path / name, config if config.is_file() else None
        raise ValueError(f"{shown(path)} must hold {' or '.join(WEIGHTS)}; it holds neither.")
    named = isinstance(checkpoint, str) and not checkpoint.startswith((".", "/"))
    if not named or str(checkpoint).count("/") != 1:
        raise ValueError(
            "checkpoint must be a file, a folder, or a repository 'owner/name' of huggingface.co; "
            f"{shown(checkpoint)} does not exist."
        )
    return _download(str(checkpoint), revision)


def _download(repository: str, revision: str | None) -> tuple[Path, Path | None]:
    hub: Any = need(
        "huggingface_hub", "hub", f"Downloading {shown(repository)}, which is no local path,"
    )
    errors: Any = need("huggingface_hub.errors", "hub", "Downloading a repository")

    def fetch(name: str) -> Path | None:
        try:
            return Path(hub.hf_hub_download(repository, name, revision=revision))
        except errors.LocalEntryNotFoundError as error:  # no connection, and not in the cache
            reason: Exception = error
        except errors.EntryNotFoundError:
            return None
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
            reason = error
        first_line = next(iter(str(reason).strip().splitlines()), type(reason).__name__)
        raise ValueError(
            "checkpoint must be a local path or a repository of huggingface.co; "
            f"{shown(repository)} is no local path, and the download failed: {shown(first_line)}"
        ) from reason

    for name in WEIGHTS:
        weights = fetch(name)
        if weights is not None:
            return weights, fetch(CONFIG)
    raise ValueError(f"{shown(repository)} must hold {' or '.join(WEIGHTS)}; it holds neither.")


def _read_config(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown(path)} must be JSON: {shown(error)}.") from error
    except OSError as error:
        raise ValueError(f"{shown(path)} cannot be read: {error.strerror}.") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{shown(path)} must hold a JSON object; it holds a {type(config).__name__}."
        )
    kind = config.get("model_type") or config.get("architecture")
    known = tuple(family.name for family in families())
    if kind and not str(kind).startswith(known):
        raise ValueError(
            f"{shown(path)} must be for a {' or '.join(known)}; it is for {shown(repr(kind))}."
        )
    return config

"""Finding adapters: by the name of one that ships, by folder, or by hub id; of either kind, alone or together."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from octavo.adapter_file import SETTINGS, TENSORS, read_settings
from octavo.attachment.published import files_needed, load_published, published_settings
from octavo.dms import adapter as gates
from octavo.dms.adapter import Adapter
from octavo.errors import AdapterFileError, ConfigError
from octavo.swiftkv import adapter as transforms
from octavo.swiftkv.adapter import SwiftKVAdapter
from octavo.swiftkv.checkpoint import is_published
from octavo.swiftkv.files import CONFIG, INDEX

SHIPPED = Path(__file__).parent.parent / "adapters"
AnyAdapter = Adapter | SwiftKVAdapter
Named = AnyAdapter | str | Path
_LOADERS: dict[str, Callable[[Path], AnyAdapter]] = {
    gates.KIND: gates.load_adapter,
    transforms.KIND: transforms.load_swiftkv_adapter,
}


def resolve(adapters: Named | Sequence[Named] | None) -> list[AnyAdapter]:
    """Adapters from any mix of adapters, names, folders and hub ids; "a+b" is both. At most one of each kind.

    Gates may have been distilled on a transform: a name is first looked for inside the folder of the SwiftKV
    adapter that it comes with, so `["swiftkv", "dms-8x"]` finds `swiftkv/dms-8x` before `dms-8x`.
    Raises AdapterFileError, ConfigError, and UnsupportedModelError for quantised checkpoints.
    """
    items = _items(adapters)
    folders = [_folder(item) if isinstance(item, str | Path) else None for item in items]
    homes = [folder for folder in folders if folder is not None and _holds_swiftkv(folder)]
    found: list[AnyAdapter] = []
    for item, folder in zip(items, folders, strict=True):
        one = _load(item, _inside(item, homes) or folder) if isinstance(item, str | Path) else item
        for other in found:
            if type(one) is type(other):
                what = "SwiftKV transforms" if isinstance(one, SwiftKVAdapter) else "sets of DMS gates"
                raise ConfigError(f"two {what} for one model, {other.name} and {one.name}; give one of each kind")
        found.append(one)
    return found


def load_adapter(name: str | Path) -> AnyAdapter:
    """An adapter by its folder, by the name of one that ships, or by hub id.

    A folder or hub repository holds either kind of adapter, or a published checkpoint, of which only the gates' or the
    transform's tensors are read. Raises AdapterFileError, and UnsupportedModelError for quantised checkpoints.
    """
    return _load(name, _folder(name))


def _load(name: str | Path, folder: Path | None) -> AnyAdapter:
    """The adapter in `folder`, which `name` led to."""
    if folder is None:
        one = "; give one name here, not several with '+'" if "+" in str(name) else ""
        raise AdapterFileError(f"no adapter folder {name}{one}; shipped adapters are {', '.join(shipped_adapters())}")
    if not (folder / SETTINGS).is_file() and (folder / CONFIG).is_file():
        return load_published(folder, None if Path(name).is_dir() else str(name))
    kind = read_settings(folder).get("kind")
    if kind not in _LOADERS:
        raise AdapterFileError(f"{folder / SETTINGS} has kind {kind!r}; expected {' or '.join(_LOADERS)}")
    return _LOADERS[kind](folder)


def shipped_adapters() -> list[str]:
    """Names of the adapters that come with Octavo, all for the embedded model."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{SETTINGS}"))


def is_hub_id(name: str | Path) -> bool:
    """Whether this could be "owner/repository", by its form alone."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)) is not None


def _items(adapters: Named | Sequence[Named] | None) -> list[Named]:
    if adapters is None:
        return []
    if isinstance(adapters, str) and (not adapters.strip() or _local(adapters) is None):
        names = [name.strip() for name in adapters.split("+")]
        if not all(names):
            raise ConfigError(f"{adapters!r} has an empty adapter name; give one name, or two as in 'swiftkv+dms-8x'")
        return [*names] if len(names) > 1 else [adapters]
    if isinstance(adapters, str | Path | Adapter | SwiftKVAdapter):
        return [adapters]
    if not isinstance(adapters, Sequence):
        raise ConfigError(f"an adapter is a name, a folder, an adapter or several of these, not {adapters!r}")
    return [item for part in adapters for item in _items(part)]


def _local(name: str | Path) -> Path | None:
    """The folder of this name, or else that of the shipped adapter of this name.

    A folder that holds no adapter does not hide the shipped one.
    """
    folder, shipped = Path(name), SHIPPED / name
    ships = (shipped / SETTINGS).is_file()
    if folder.is_dir() and (not ships or any((folder / file).is_file() for file in (SETTINGS, CONFIG))):
        return folder
    return shipped if ships else None


def _folder(name: str | Path) -> Path | None:
    """The local folder of this name, or that of the hub repository, fetched."""
    folder = _local(name)
    return _fetched(str(name)) if folder is None and is_hub_id(name) else folder


def _inside(name: str | Path, homes: list[Path]) -> Path | None:
    """The adapter of this plain name inside one of the homes."""
    if Path(name).name != str(name):
        return None
    return next((home / name for home in homes if (home / name / SETTINGS).is_file()), None)


def _holds_swiftkv(folder: Path) -> bool:
    if not (folder / SETTINGS).is_file():
        return is_published(folder)
    return read_settings(folder).get("kind") == transforms.KIND


def _fetched(hub_id: str) -> Path:
    """Local folder with the files of a hub repository that make an adapter: first the small ones, then tensors.

    Gates in folders inside it come too.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=[CONFIG, INDEX, SETTINGS, f"*/{SETTINGS}"]))
        if (folder / SETTINGS).is_file():
            snapshot_download(hub_id, allow_patterns=[TENSORS, f"*/{TENSORS}"])
        elif published_settings(folder) is not None:
            snapshot_download(hub_id, allow_patterns=[*files_needed(folder), f"*/{TENSORS}"])
    except (OSError, ValueError, EntryNotFoundError) as e:
        raise AdapterFileError(
            f"no adapter folder {hub_id}, and the hub does not give one: {str(e).strip().splitlines()[0]}"
        ) from e
    return folder

"""The files a project starts from: recipes, presets, search spaces, accelerate configs, the Slurm job. No torch."""

from pathlib import Path

from dpokit.atomic_files import write_whole
from dpokit.errors import SettingsError

# In a wheel they are below dpokit/starter_files/; in a checkout at its root (pyproject.toml, force-include).
FOLDERS = ("recipes", "accelerate_configs", "launch")
SUFFIXES = (".py", ".yaml", ".sbatch")


def list_starter_files() -> list[tuple[Path, Path]]:
    """Each file, and its path relative to the project's folder."""
    packaged = Path(__file__).parent / "starter_files"
    root = packaged if packaged.is_dir() else Path(__file__).parents[2]
    paths = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*")) if path.suffix in SUFFIXES]
    return [(path, path.relative_to(root)) for path in paths]


def write_starter_files(folder: Path) -> list[Path]:
    """Copies the files into a folder, which may exist; returns their paths.

    Raises: SettingsError: a file of the same name with other content is existing; nothing is written then.
    """
    copies = [(source, folder / relative) for source, relative in list_starter_files()]
    existing = [(source, path) for source, path in copies if path.exists() or path.is_symlink()]
    changed = [path for source, path in existing if not _is_same(source, path)]
    if changed:
        raise SettingsError(
            f"{', '.join(map(str, changed[:3]))}{' and others' * (len(changed) > 3)} exist with other content",
            expected="a folder without them: your changes are never overwritten",
            do="choose another folder, or move these files away",
        )
    for source, path in copies:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, source.read_bytes())
    return [path for _, path in copies]


def _is_same(source: Path, path: Path) -> bool:
    return path.is_file() and path.read_bytes() == source.read_bytes()

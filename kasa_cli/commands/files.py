"""What a report becomes: JSON, a page, and the files that a verb writes, which are checked before the work."""

import os
from pathlib import Path

from kasa_cli.errors import OutputExists, UsageError
from kasa_cli.files import make_folder, write_file
from kasa_cli.report import Report, SelectReport, SpectrumReport


def refuse_occupied(*files: Path | None, overwrite: bool, folder: Path | None = None) -> None:
    """Refuse a file that exists or cannot be written, and a folder that is a file.

    Raises:
        OutputExists: the path is taken, and may not be replaced.
        UsageError: the folder of the file does not exist.
    """
    for path in files:
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError("no such folder", str(path.parent), "make it first")
        if path is None or not os.path.lexists(path):
            continue
        if path.is_symlink() or not path.is_file():
            raise OutputExists("the output is not a regular file", str(path), "choose another")
        if not overwrite:
            raise OutputExists(
                "the output exists", str(path), "choose another, or replace it with --overwrite"
            )
    if folder is not None and os.path.lexists(folder) and not folder.is_dir():
        raise OutputExists("the output is not a folder", str(folder), "choose another")


def to_json(report: Report) -> str:
    """One JSON object, as `--json` prints it; valid always."""
    from kasa_cli.render.formats import as_json

    return as_json(report)


def spectrum_page(report: SpectrumReport) -> str:
    """One self-contained HTML page of the spectra."""
    from kasa_cli.render import page

    return page.html(report)


def write_page(report: SpectrumReport, file: Path) -> None:
    """Write the page of a report."""
    write_file(file, [spectrum_page(report).encode()])


def write_pictures(report: SpectrumReport, folder: Path) -> None:
    """Write the pictures of a report."""
    from kasa_cli.render import pictures

    make_folder(folder)
    for name, content in pictures.pictures(report).items():
        write_file(folder / name, [content])


def write_selection(report: SelectReport, file: Path) -> None:
    """Write the selection in the format of its export; as JSON where it has none."""
    text = report.emission.text if report.emission else to_json(report)
    write_file(file, [text.rstrip("\n").encode() + b"\n"])

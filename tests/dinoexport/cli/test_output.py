"""The last line of defence: whatever a command raises becomes one line and a status."""

import json
import math

import pytest
import typer

from dinoexport.cli.output import (
    check_file,
    check_folder,
    one_line,
    parse_size,
    print_json,
    run_app,
)
from dinotrain.errors import DataError, UsageError


def app_that_raises(error: BaseException | None) -> typer.Typer:
    app = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})

    @app.command()
    def one(json: bool = typer.Option(False, "--json")) -> None:
        if error:
            raise error
        if json:
            print_json({"fine": True})

    @app.command()
    def two(count: int = 1) -> None: ...

    return app


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (DataError("eyes.csv: no rows. Add one."), 2, "DataError: eyes.csv: no rows. Add one."),
        (DataError("two\nlines \x1b[31m"), 2, "DataError: two lines ?[31m"),
        (KeyboardInterrupt(), 130, "Interrupted: stopped by the keyboard"),
        (PermissionError(13, "Permission denied", "/x"), 2, "OSError: /x: Permission denied. "),
        (MemoryError(), 2, "MemoryError: out of memory. Use a smaller"),
        (RuntimeError("can't allocate memory: 9 bytes"), 2, "MemoryError: out of memory."),
        (ZeroDivisionError("x"), 2, "InternalError: ZeroDivisionError: x. Please report it"),
        (typer.Exit(1), 1, ""),
        (None, 0, ""),
    ],
    ids=["ours", "escapes", "keyboard", "system", "memory", "torch-memory", "bug", "gate", "fine"],
)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_every_error_is_one_line(error, status, line, as_json, capfd) -> None:
    arguments = ["one", "--json"] if as_json else ["one"]
    assert run_app(app_that_raises(error), arguments) == status
    out, err = capfd.readouterr()
    assert err.startswith(line)
    assert err.count("\n") == bool(line)
    if as_json and line:
        assert json.loads(out)["error"] == err.strip().partition(": ")[2]
    elif line:
        assert out == ""


def test_a_traceback_on_request(monkeypatch) -> None:
    monkeypatch.setenv("DINOEXPORT_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        run_app(app_that_raises(ZeroDivisionError()), ["one"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["tow"], "UsageError: No such command 'tow'. Did you mean 'two'? See `dinoexport --help`"),
        (["two", "--count", "x"], "UsageError: Invalid value 'x' for '--count'"),
        (["two", "--count=x"], "UsageError: Invalid value 'x' for '--count'"),
        (["two", "--cuont", "1"], "UsageError: No such option: --cuont"),
        (["two", "--count"], "UsageError: Option '--count' requires an argument."),
        (["two", "more"], "UsageError: Got unexpected extra argument"),
    ],
)
def test_wrong_arguments_are_one_line_too(arguments: list[str], line: str, capfd) -> None:
    assert run_app(app_that_raises(None), arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(line), err
    assert err.count("\n") == 1
    assert "--help`." in err


def test_wrong_arguments_in_json(capfd) -> None:
    assert run_app(app_that_raises(None), ["tow", "--json"]) == 2
    assert json.loads(capfd.readouterr().out)["kind"] == "UsageError"


def test_json_has_no_nan(capfd) -> None:
    print_json({"a": math.nan, "b": [math.inf, 1.5], "c": (1, "é")})
    out = capfd.readouterr().out
    assert json.loads(out) == {"a": None, "b": [None, 1.5], "c": [1, "é"]}


def test_one_line_keeps_names_that_are_not_utf8() -> None:
    # Such a character is how Python holds a byte of a file name that is no UTF-8.
    assert one_line("a\tb\n\x07c\udcff") == "a b ?c\udcff"


@pytest.mark.parametrize(
    ("text", "size"), [(None, None), ("224", (224, 224)), ("224x322", (224, 322))]
)
def test_sizes(text, size) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "abc", "0", "-14", "224x", "1x2x3", "٢٢٤", "9" * 5000, "1.5"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="accepted: N or HxW"):
        parse_size(text)


def test_places_to_write(tmp_path) -> None:
    (tmp_path / "file").touch()
    check_folder(tmp_path / "new" / "deep")
    check_file(tmp_path / "new" / "a.safetensors", ".safetensors")
    with pytest.raises(UsageError, match=r"--out .*/file is a file\. Give a folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(UsageError, match=r"cannot be made, because .*/file is a file"):
        check_folder(tmp_path / "file" / "deep")
    with pytest.raises(UsageError, match=r"does not end in \.safetensors\. Use .*/a\.safetensors"):
        check_file(tmp_path / "a.pth", ".safetensors")
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        check_file(tmp_path / "b.safetensors", ".safetensors")


def test_no_permission_is_told(tmp_path, monkeypatch) -> None:
    # Tests may run as root, whom no permission stops.
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UsageError, match="cannot be written: no permission"):
        check_folder(tmp_path)

"""What the command lines share: numbers as people write them, and a user's mistake as one sentence."""

import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-4, 5e-2 and 1e0 as numbers; by the letter of YAML 1.1 they are text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str, place: str):
    """The value of a YAML text.

    Raises:
        ValueError: it is no YAML; the message says where in `place`.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = place if mark is None else f"{place}, line {mark.line + 1}"
        raise ValueError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None


def read_yaml_file(path: str | Path):
    """The value of a YAML file in UTF-8; see `read_yaml`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: text must be UTF-8, but a byte is 0x{error.object[error.start]:02x}"
        ) from None
    return read_yaml(text, str(path))


def run(main: Callable[[Sequence[str] | None], None]) -> None:
    """Call `main`; a mistake in the arguments or files becomes one sentence on standard error and exit code 2."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        main(None)
    except (ValueError, NotImplementedError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # Whoever read the output has enough of it; nothing may be flushed into the closed pipe at exit.
            sys.stdout = None
            sys.exit(141)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

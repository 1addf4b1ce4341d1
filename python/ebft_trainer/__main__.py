"""`ebft-train`, also as `python -m ebft_trainer`: what needs no torch is answered at once, the rest is `cli`'s."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence

#: Command -> what it is for.
COMMANDS = {
    "train": "fine-tune a model on text",
    "evaluate": "measure a model on text",
    "demo": "fine-tune the shipped small model both ways and compare; minutes on a CPU",
    "report": "runs side by side in one HTML page",
    "plan": "tokens, operations, memory and time of a step, from a model's config",
    "info": "versions, devices and implementations, and why",
}
_HELP = """usage: ebft-train [-h] [--version] COMMAND ...

Energy-Based Fine-Tuning of causal language models.

commands (ebft-train COMMAND --help has their options):
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Answer ``--help`` and ``--version``, or run one command. Without the packages that it needs: code 2, one line."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] in (["-h"], ["--help"]):
        print(_HELP + "\n".join(f"  {name:<12}{what}" for name, what in COMMANDS.items()))
    elif arguments[:1] == ["--version"]:
        print(f"ebft-train {version()}")
    else:
        try:
            from . import cli
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] in ("ebft_kernels", "ebft_trainer"):
                raise
            missing = f"needs the package {error.name}, which is not installed: pip install 'ebft-kernels[trainer]'"
            print(f"ebft-train: error: {missing}", file=sys.stderr)
            raise SystemExit(2) from None
        cli.main(arguments)


def version() -> str:
    """Of the distribution that is installed."""
    try:
        return importlib.metadata.version("ebft-kernels")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    main()

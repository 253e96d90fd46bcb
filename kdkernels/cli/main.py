# SPDX-License-Identifier: Apache-2.0
"""Parses the command line and runs a subcommand."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from kdkernels._version import __version__
from kdkernels.cli import UsageError

SUBCOMMANDS = ("env", "check", "bench", "demo")

DESCRIPTION = """\
Fast kernels for knowledge-distillation and metric-learning losses at large batch.

Start with `kdkernels env` to see what runs here, `kdkernels check` to see that it is right,
`kdkernels bench` to see how fast it is, and `kdkernels demo` to see it distil a real teacher."""

EPILOG = """\
examples:
  kdkernels env                            what is installed, and which backend each op takes here
  kdkernels check --op gram_mse --verbose  every sample of one op against fp64
  kdkernels demo --data digits             distil on scikit-learn's digits, plots in ./demo-results
  kdkernels COMMAND --help                 options and examples of one command

exit status: 0 fine, 1 a check failed, 2 wrong usage, 130 interrupted
environment: KDKERNELS_BACKEND names the backend of calls that name none (see `kdkernels env`)"""


def parser() -> argparse.ArgumentParser:
    """The whole command line; the chosen subcommand's module is in `args.command`."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        "kdkernels", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw
    )
    top.add_argument("--version", action="version", version=f"kdkernels {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in SUBCOMMANDS:
        module = importlib.import_module(f"kdkernels.cli.{name}")
        sub = commands.add_parser(
            module.NAME, help=module.HELP, description=module.__doc__, formatter_class=raw
        )
        module.add_arguments(sub)
        sub.set_defaults(command=module)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (default: that of the process) and return the exit status.

    Raises:
        SystemExit: from argparse, for --help (0) and for what it cannot parse (2).
    """
    args = parser().parse_args(argv)
    args.words = sys.argv[1:] if argv is None else list(argv)
    try:
        return args.command.run(args)
    except UsageError as error:
        print(f"kdkernels {args.command.NAME}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nkdkernels {args.command.NAME}: interrupted", file=sys.stderr)
        return 130

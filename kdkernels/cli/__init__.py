# SPDX-License-Identifier: Apache-2.0
"""The console script `kdkernels`.

Each subcommand is a module of this package with `NAME`, `HELP`, `add_arguments(parser)` and
`run(args) -> int`; its docstring is the description that `--help` prints. A wrong argument that
argparse cannot see raises `UsageError`.
"""


class UsageError(Exception):
    """What the user asked for cannot be done; the message says what to change. Exit status 2."""

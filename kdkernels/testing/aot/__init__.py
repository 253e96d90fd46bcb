# SPDX-License-Identifier: Apache-2.0
"""What the ahead-of-time tests compile: one module per op that lists calls of its launchers."""

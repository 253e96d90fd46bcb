# SPDX-License-Identifier: Apache-2.0
"""One module per op, each with a list `OPINFOS`."""

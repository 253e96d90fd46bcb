# SPDX-License-Identifier: Apache-2.0
"""`python -m kdkernels`, the same as the console script."""

import sys

from kdkernels.cli.main import main

sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""What an op's author declares (`OpInfo`) and how results are judged (`numerics`).

Shared by the tests, `kdkernels check` and the benchmarks; needs nothing but torch.
"""

# SPDX-License-Identifier: Apache-2.0
"""The demo behind `kdkernels demo`: distils a teacher into a student with each loss of one
registry.

`data` loads a data set, `models` builds the networks, `losses` is the registry, `training` trains,
`measure` and `memory` cost the losses, `plots` draws.
"""

# SPDX-License-Identifier: Apache-2.0
"""What the ops of this backend share. A module here knows no op."""

# SPDX-License-Identifier: Apache-2.0
"""The evaluation of photos made from drawings, and what its numbers are made of. Needs the extra `evaluate`."""

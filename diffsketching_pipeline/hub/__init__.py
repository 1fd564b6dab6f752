# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that load anywhere, and their way to a hub."""

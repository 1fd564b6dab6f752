# SPDX-License-Identifier: Apache-2.0
"""Weights that other projects published, as folders of ours."""

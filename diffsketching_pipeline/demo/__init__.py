# SPDX-License-Identifier: Apache-2.0
"""A page to draw on, and to watch photos of the drawing appear."""

# SPDX-License-Identifier: Apache-2.0
"""Drawings, photos and masks as people bring them, read into what the models take."""

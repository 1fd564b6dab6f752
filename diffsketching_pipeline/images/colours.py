# SPDX-License-Identifier: Apache-2.0
"""The old name of [`images.colors`]."""

from diffsketching_pipeline.deprecation import renamed_attributes


__getattr__ = renamed_attributes(
    "diffsketching_pipeline.images.colors",
    are_colour_strokes="are_color_strokes",
    parse_palette="parse_palette",
    preprocess_colour_strokes="preprocess_color_strokes",
)
